"""Colour and blur of MoCo v2's views on the device, batched, every view with draws of its own.

What `TwoViews` with colour "device" leaves out: jitter in the drawn order, grey, Gaussian blur. As with colour "fused",
affine operations are composed to one map before and one after the turn of the hue and clipped after a map; the turn is
exact, and nothing is rounded before the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from poserelay.colour import JITTER, LUMA

from .views import TwoViews

CONTRAST, SATURATION, HUE = (
    [name for name, _ in JITTER].index(operation) for operation in ("contrast", "saturation", "hue")
)


class ColourDraws(NamedTuple):
    """What happens to the colours of N views."""

    order: Tensor
    """int64 `[N, 4]`: the operations of JITTER, by index, in the order they are applied."""
    factors: Tensor
    """float32 `[N, 4]`: the factor of each operation of JITTER; neutral where the jitter was not drawn."""
    grey: Tensor
    """bool `[N]`."""
    blur_sigma: Tensor
    """float32 `[N]`, pixels of the view; 0 where the blur was not drawn."""


class ColourMaps(NamedTuple):
    """N affine maps of colours, each number `[N]`, as `poserelay.colour.ColourMap`."""

    scale: Tensor
    luma: Tensor
    shift: Tensor


@dataclass(frozen=True)
class DeviceColour:
    """Applies the colour operations and the blur of `views` to the crops that it makes with colour "device"."""

    views: TwoViews

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the views, uint8 RGB `[V, B, 3, S, S]` on the device of `images`.

        Args:
            images: uint8 RGB `[V, B, 3, S, S]`.
            generator: of all draws. One on the CPU gives the same draws on every device and waits for none.
        """
        draws = draw_colours(self.views, images.shape[0] * images.shape[1], generator)
        return apply_colours(images.flatten(0, 1), draws).unflatten(0, images.shape[:2])


def draw_colours(views: TwoViews, count: int, generator: torch.Generator) -> ColourDraws:
    """Draw for `count` views, on the generator's device, with the distribution of `draw_view`."""
    device = generator.device
    chances = torch.rand(3, count, generator=generator, device=device)
    shifts = 2 * torch.rand(count, len(JITTER), generator=generator, device=device) - 1
    order = torch.rand(count, len(JITTER), generator=generator, device=device).argsort(1)
    low, high = views.blur_sigma
    sigma = low + (high - low) * torch.rand(count, generator=generator, device=device)
    strengths = torch.tensor((views.brightness, views.contrast, views.saturation, views.hue), device=device)
    neutral = torch.tensor([factor for _, factor in JITTER], device=device)
    jitter = chances[0] < views.jitter_probability
    return ColourDraws(
        order,
        neutral + strengths * shifts * jitter[:, None],
        chances[1] < views.grey_probability,
        sigma * (chances[2] < views.blur_probability),
    )


def apply_colours(images: Tensor, draws: ColourDraws) -> Tensor:
    """Apply draws to uint8 RGB `[N, 3, S, S]`; returns the same, on the device of `images`."""
    blurred = draws.blur_sigma.nonzero()[:, 0]
    kernels = blur_kernels(draws.blur_sigma[blurred])
    order, factors, grey, _ = (draw.to(images.device, non_blocking=True) for draw in draws)
    turn_place = (order == HUE).int().argmax(1, keepdim=True)
    places = torch.arange(len(JITTER), device=images.device)

    colours = images.flatten(2).float()
    unchanged = ColourMaps(torch.ones_like(factors[:, 0]), *torch.zeros_like(factors[:, :2]).unbind(1))
    before = compose(unchanged, colours, order, factors, places < turn_place)
    waits = (before.luma == 0) | (factors[:, HUE] == 0)  # as in jitter_colour, the turn may then come first
    colours = map_colours(select(waits, unchanged, before), colours)
    colours = turn_hue(colours, factors[:, HUE])
    after = compose(select(waits, before, unchanged), colours, order, factors, places > turn_place)
    greyed = ColourMaps(torch.zeros_like(after.scale), after.scale + after.luma, after.shift)
    views = map_colours(select(grey, greyed, after), colours).view(images.shape)
    if len(blurred):
        blurred = blurred.to(images.device, non_blocking=True)
        views[blurred] = blur(views[blurred], kernels.to(images.device, non_blocking=True))
    return views.round_().byte()


def compose(maps: ColourMaps, colours: Tensor, order: Tensor, factors: Tensor, applied: Tensor) -> ColourMaps:
    """Follow N maps of colours `[N, 3, pixels]` by brightness, contrast, saturation where `applied` `[N, 4]`.

    As `poserelay.colour.blend`, for the operation at each place of `order` in turn.
    """
    mean = colours.mean(2) @ torch.tensor(LUMA, dtype=colours.dtype, device=colours.device)
    for place in range(order.shape[1]):
        operation = order[:, place]
        factor = factors.gather(1, operation[:, None])[:, 0]
        grey = maps.scale + maps.luma  # what the map does to a colour without saturation
        contrast, saturation = operation == CONTRAST, operation == SATURATION
        blended = ColourMaps(
            factor * maps.scale,
            factor * maps.luma + (1 - factor) * grey * saturation,
            factor * maps.shift + (1 - factor) * ((grey * mean + maps.shift) * contrast + maps.shift * saturation),
        )
        maps = select(applied[:, place], blended, maps)
    return maps


def select(condition: Tensor, yes: ColourMaps, no: ColourMaps) -> ColourMaps:
    """The maps of `yes` where `condition` `[N]`, else of `no`."""
    return ColourMaps(*(torch.where(condition, a, b) for a, b in zip(yes, no, strict=True)))


def map_colours(maps: ColourMaps, colours: Tensor) -> Tensor:
    """Apply N maps to colours `[N, 3, pixels]` and clip them to 0..255."""
    eye = torch.eye(3, device=colours.device)
    luma = torch.tensor(LUMA, dtype=colours.dtype, device=colours.device).expand(3, 3)
    matrices = maps.scale[:, None, None] * eye + maps.luma[:, None, None] * luma
    return torch.baddbmm(maps.shift[:, None, None], matrices, colours).clamp_(0, 255)


def turn_hue(colours: Tensor, turns: Tensor) -> Tensor:
    """Turn the H of HSV of colours `[N, 3, ...]`, of any scale from 0 up, by `turns` `[N]` of the full circle."""
    red, green, blue = colours.unbind(1)
    value, low = colours.amax(1), colours.amin(1)
    chroma = value - low
    divisor = chroma.clamp(min=torch.finfo(colours.dtype).tiny)
    hue = torch.where(  # in sixths of the circle, from red
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue += 6 * turns.view(-1, *[1] * (hue.dim() - 1))
    turned = torch.empty_like(colours)
    for channel, offset in enumerate((5, 3, 1)):
        place = torch.remainder(hue + offset, 6)
        turned[:, channel] = value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)
    return turned


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter float images `[N, C, h, w]` along both sides, each with its own of kernels `[N, K]`, border repeated."""
    count, channels = images.shape[:2]
    radius = kernels.shape[1] // 2
    weights = kernels.repeat_interleave(channels, 0)[:, None, None]
    planes = images.reshape(1, count * channels, *images.shape[2:])
    planes = conv2d(pad(planes, (radius, radius, 0, 0), mode="replicate"), weights, groups=len(weights))
    planes = conv2d(pad(planes, (0, 0, radius, radius), mode="replicate"), weights.mT, groups=len(weights))
    return planes.view_as(images)


def blur_kernels(sigma: Tensor) -> Tensor:
    """The kernels `[N, K]` of `pretrain.views.blur_kernel` for sigma `[N]` (pixels), padded to one odd length K."""
    variance = sigma[:, None].double() ** 2 / 3
    half = ((12 * variance + 1).sqrt() - 1).div(2).floor()
    end = (2 * half + 1) * (half * (half + 1) - 3 * variance) / (6 * (variance - (half + 1) ** 2))
    reach = int(half.max()) + 1 if len(sigma) else 0
    offsets = torch.arange(-reach, reach + 1, device=sigma.device).abs()
    box = torch.where(offsets <= half, 1.0, torch.where(offsets == half + 1, end, 0.0))
    box = box / box.sum(1, keepdim=True)
    # the product of spectra long enough that the cyclic convolution is the plain one
    length = 6 * reach + 1
    return torch.fft.irfft(torch.fft.rfft(box, length) ** 3, length).to(sigma.dtype)
