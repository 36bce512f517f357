"""Two augmented views of a picture with the distribution of MoCo v2 (Chen et al., 2020), made on the CPU.

The operations, their order and their ranges are those of the official SimSiam and MoCo v2 code and of lightly's
MoCoV2Transform: random resized crop, horizontal flip, colour jitter, grey, Gaussian blur. Normalisation is left to the
device, and on request so are colour and blur (`device_views`). All frames are pixels, x right and y down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from poserelay.colour import JITTER, jitter_colour
from poserelay.datasets.sampling import Draws

Colour = Literal["fused", "exact", "device"]

CROP_ASPECT = (3 / 4, 4 / 3)


class ViewDraw(NamedTuple):
    """What one view does to its picture: the crop in pixels of the picture, then the operations in order."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    """(operation, factor) in the order they are applied; empty where the jitter was not drawn."""
    grey: bool
    blur_sigma: float
    """Pixels of the view; 0 where the blur was not drawn."""
    reduction: int = 1
    """1, 2, 4 or 8: the crop still has the view's pixels, and its edges whole ones, in a picture so much smaller."""


@dataclass(frozen=True)
class TwoViews:
    """Makes the two views of a picture; each is drawn from its own generator. The defaults are MoCo v2's.

    A factor of brightness, contrast or saturation is uniform in 1 - strength .. 1 + strength, a turn of the hue in
    -hue .. hue of the full circle; they are applied in random order with `jitter_probability`.
    """

    size: int = 224
    """Side of a view, pixels."""
    crop_area: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the picture's area."""
    flip_probability: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter_probability: float = 0.8
    grey_probability: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation, pixels of the view."""
    blur_probability: float = 0.5
    colour: Colour = "fused"
    """fused: affine operations on colours composed, clipped at the end; exact: clipped after each, as PIL does; device:
    crop and flip alone, `DeviceColour` does the rest."""

    def __call__(self, image: np.ndarray, generator: Draws) -> Tensor:
        """Return both views, uint8 RGB `[2, 3, size, size]`.

        Args:
            image: uint8 RGB `[H, W, 3]`.
            generator: gives the generator of view 0 or 1, so that a view's draws depend on nothing but its number.
        """
        return self._render(image, self._draw(image.shape[0], image.shape[1], generator), 1)

    def at_scale(self, size: tuple[int, int], decode: Callable[[int], np.ndarray], generator: Draws) -> Tensor:
        """As calling with `decode(1)`, but decodes at the smallest scale that still has the pixels of both views.

        Args:
            size: (height, width) of the picture, pixels.
            decode: reduction (1, 2, 4 or 8) -> the picture, uint8 RGB `[ceil(H / reduction), ceil(W / reduction), 3]`.
            generator: as for calling.
        """
        draws = self._draw(*size, generator)
        reduction = min(draw.reduction for draw in draws)
        image = decode(reduction)
        if image.shape[:2] != (-(-size[0] // reduction), -(-size[1] // reduction)):
            return self(decode(1) if reduction > 1 else image, generator)  # the size came from a header that lies
        return self._render(image, draws, reduction)

    def _draw(self, height: int, width: int, generator: Draws) -> list[ViewDraw]:
        return [draw_view(self, height, width, generator(number)) for number in range(2)]

    def _render(self, image: np.ndarray, draws: Sequence[ViewDraw], reduction: int) -> Tensor:
        views = np.empty((2, 3, self.size, self.size), np.uint8)
        for draw, view in zip(draws, views, strict=True):
            cv2.split(render_view(image, draw, self.size, self.colour, reduction), list(view))
        return torch.from_numpy(views)


def draw_view(views: TwoViews, height: int, width: int, generator: np.random.Generator) -> ViewDraw:
    """Draw one view of a picture of `height` x `width` pixels.

    Every operation is drawn whether it is applied or not, so another probability leaves the other draws as they were.
    """
    flip, jitter, grey, blur, sigma, *rest = generator.random(5 + 2 * len(JITTER)).tolist()
    strengths = (views.brightness, views.contrast, views.saturation, views.hue)
    shifts = [strength * (2 * draw - 1) for strength, draw in zip(strengths, rest, strict=False)]
    places = rest[len(JITTER) :]
    jittered = [i for i in range(len(JITTER)) if jitter < views.jitter_probability and strengths[i] > 0]
    low, high = views.blur_sigma
    crop = draw_crop(views.crop_area, height, width, generator)
    reduction = next((r for r in (8, 4, 2) if min(crop[2:]) >= r * views.size), 1)
    return ViewDraw(
        *snap_crop(crop, height, width, reduction),
        flip=flip < views.flip_probability,
        jitter=tuple((JITTER[i][0], JITTER[i][1] + shifts[i]) for i in sorted(jittered, key=places.__getitem__)),
        grey=grey < views.grey_probability,
        blur_sigma=low + (high - low) * sigma if blur < views.blur_probability else 0.0,
        reduction=reduction,
    )


def draw_crop(
    area_range: tuple[float, float], height: int, width: int, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a crop in pixels as torchvision's RandomResizedCrop does.

    Ten tries at an area and a log-uniform aspect that fit in the picture; then the largest central crop of an allowed
    aspect.
    """
    (low, high), (narrow, wide) = area_range, CROP_ASPECT
    for _ in range(10):
        share, shape, down, right = generator.random(4).tolist()
        area = height * width * (low + (high - low) * share)
        aspect = narrow * (wide / narrow) ** shape
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(down * (height - crop_height + 1)), int(right * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, round(height * CROP_ASPECT[1]))
    crop_height = min(height, round(width / CROP_ASPECT[0]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def snap_crop(crop: tuple[int, int, int, int], height: int, width: int, step: int) -> tuple[int, int, int, int]:
    """Round the edges of (top, left, height, width) to multiples of `step` within a picture of `height` x `width`."""
    top, left, crop_height, crop_width = (round(edge / step) for edge in crop)
    crop_height, crop_width = min(crop_height, height // step), min(crop_width, width // step)
    top, left = min(top, height // step - crop_height), min(left, width // step - crop_width)
    return step * top, step * left, step * crop_height, step * crop_width


def render_view(image: np.ndarray, draw: ViewDraw, size: int, colour: Colour, reduction: int = 1) -> np.ndarray:
    """Apply a draw to a uint8 RGB picture `[H, W, 3]`; returns the view, uint8 RGB `[size, size, 3]`.

    The picture may be a reduced one, by `reduction`, which divides that of the draw.
    """
    top, left = draw.top // reduction, draw.left // reduction
    view = resize(image[top : top + draw.height // reduction, left : left + draw.width // reduction], size)
    if draw.flip:
        view = cv2.flip(view, 1)
    if colour == "device":
        return view
    view = jitter_colour(view, draw.jitter, draw.grey, fused=colour == "fused")
    return blur(view, draw.blur_sigma) if draw.blur_sigma > 0 else view


def resize(crop: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 `[h, w, 3]` to `[size, size, 3]` with PIL's bilinear filter, which widens as it shrinks a picture.

    OpenCV's bilinear filter does not, so it would alias the views of a large picture.
    """
    # torch's vectorised kernel wants channels last, and gives them back
    pixels = torch.from_numpy(np.ascontiguousarray(crop))[None].permute(0, 3, 1, 2)
    if crop.shape[0] > size:  # vertically first, which is over twice as fast, where that leaves fewer rows
        pixels = interpolate(pixels, size=(size, crop.shape[1]), mode="bilinear", antialias=True)
    resized = interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """Blur uint8 `[h, w, 3]` with `blur_kernel` in 8 bits, its border repeated; sigma in steps of 0.01 pixels."""
    taps = _taps(round(100 * sigma))
    return cv2.sepFilter2D(view, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)


@cache
def _taps(hundredths: int) -> np.ndarray:
    """`blur_kernel` in whole 256ths, which OpenCV's integer filter takes, without the taps that round to nothing."""
    kernel = blur_kernel(hundredths / 100)
    # rounding the running sum keeps the weight of the tails; what they leave goes to the centre
    tail = np.diff(np.round(256 * np.cumsum(kernel[: len(kernel) // 2])), prepend=0.0)
    tail = tail[tail.cumsum() > 0]
    return np.concatenate([tail, [256 - 2 * tail.sum()], tail[::-1]]) / 256


def blur_kernel(sigma: float) -> np.ndarray:
    """Return the 1-d kernel of PIL's GaussianBlur: three passes of a box whose length is fitted to sigma (pixels).

    The box has fractional ends, so the kernel's variance is sigma squared however small sigma is; a sampled Gaussian's
    is not below about half a pixel (Gwosdek et al., 2011).
    """
    variance = sigma**2 / 3
    half = int((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * half + 1) * (half * (half + 1) - 3 * variance) / (6 * (variance - (half + 1) ** 2))
    box = np.full(2 * half + 3, 1.0)
    box[[0, -1]] = end
    box /= box.sum()
    return np.convolve(np.convolve(box, box), box)
