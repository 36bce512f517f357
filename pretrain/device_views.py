"""Colour and blur of MoCo v2's views on the device, batched, every view with draws of its own.

What `TwoViews` with colour "device" leaves out: jitter in the drawn order, grey, Gaussian blur. Colours are 0..255 floats
until the end. The affine operations before the turn of the hue make one map, those after it another; colours are clipped
after each map, not after each operation. The turn itself is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from .views import JITTER, LUMA, TwoViews


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


@dataclass(frozen=True)
class DeviceColour:
    """Applies the colour operations and the blur of `views` to the crops that it makes with colour "device"."""

    views: TwoViews

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the views, uint8 `[V, B, 3, S, S]` on the device of `images`.

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
    jitter = chances[0] < views.jitter_probability
    neutral = torch.tensor([factor for _, factor in JITTER], device=device)
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
    hue = JITTER.index(("hue", 0.0))
    turn_place = (order == hue).int().argmax(1, keepdim=True)
    places = torch.arange(len(JITTER), device=images.device)

    colours = images.flatten(2).float()
    first = _affine(colours, order, factors, places < turn_place)
    colours = turn_hue(_map(first, colours), factors[:, hue])
    last = _affine(colours, order, factors, places > turn_place)
    last = torch.where(grey[:, None, None], _luma(last), last)
    views = _map(last, colours).view(images.shape)
    if len(blurred):
        blurred = blurred.to(images.device, non_blocking=True)
        views[blurred] = blur(views[blurred], kernels.to(images.device, non_blocking=True))
    return views.round_().byte()


def _map(maps: Tensor, colours: Tensor) -> Tensor:
    """Apply affine maps `[N, 3, 4]` to colours `[N, 3, pixels]` and clip them."""
    return torch.baddbmm(maps[..., 3:], maps[..., :3], colours).clamp_(0, 255)


def _affine(colours: Tensor, order: Tensor, factors: Tensor, applied: Tensor) -> Tensor:
    """Compose brightness, contrast and saturation where `applied` `[N, 4]`, in their order, into maps `[N, 3, 4]`.

    Each blends with its reference as in `pretrain.views.blend`; `colours` is `[N, 3, pixels]`.
    """
    mean = torch.cat([colours.mean(2), torch.ones_like(colours[:, 0, :1])], dim=1)[..., None]
    maps = torch.eye(3, 4, device=colours.device).repeat(len(colours), 1, 1)
    last_column = torch.tensor([0.0, 0.0, 0.0, 1.0], device=colours.device)
    for place in range(order.shape[1]):
        operation = order[:, place, None, None]
        factor = factors.gather(1, order[:, place, None])[..., None]
        luma = _luma(maps)
        contrast = (luma @ mean) * last_column
        reference = torch.where(operation == 1, contrast, torch.where(operation == 2, luma, 0.0))
        maps = torch.where(applied[:, place, None, None], factor * maps + (1 - factor) * reference, maps)
    return maps


def _luma(maps: Tensor) -> Tensor:
    """The luma `[N, 1, 4]` of what maps `[N, 3, 4]` give."""
    return torch.tensor(LUMA, dtype=maps.dtype, device=maps.device) @ maps[:, None]


def turn_hue(colours: Tensor, turns: Tensor) -> Tensor:
    """Turn the H of HSV of colours `[N, 3, ...]`, of any scale from 0 up, by `turns` `[N]` of the full circle."""
    value, low = colours.amax(1), colours.amin(1)
    red, green, blue = colours.unbind(1)
    chroma = value - low
    safe = chroma.clamp(min=torch.finfo(colours.dtype).tiny)
    # in sixths of the circle from red
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + 6 * turns.view(-1, *[1] * (hue.dim() - 1))
    channels = []
    for offset in (5, 3, 1):
        place = torch.remainder(hue + offset, 6)
        channels.append(value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter float images `[N, C, h, w]`, each along both sides with its own kernel of `[N, K]`, the border repeated."""
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
