"""Two augmented views of a picture with the distribution of MoCo v2 (Chen et al., 2020), made on the CPU.

The operations, their order and their ranges are those of the official SimSiam and MoCo v2 code and of lightly's
MoCoV2Transform: random resized crop, horizontal flip, colour jitter, grey, Gaussian blur. Normalisation is left to the
device. All frames are pixels, x right and y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from poserelay.datasets.sampling import Draws

# ITU-R 601 luma, the weights of PIL's mode L, on which torchvision's jitter of PIL images rests.
LUMA = np.array([0.299, 0.587, 0.114])

CROP_ASPECT = (3 / 4, 4 / 3)

# the operations of the colour jitter, each with the factor that changes nothing
JITTER = (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.0))


@dataclass(frozen=True)
class ViewDraw:
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

    def __call__(self, image: np.ndarray, generator: Draws) -> Tensor:
        """Return both views, uint8 RGB `[2, 3, size, size]`.

        Args:
            image: uint8 RGB `[H, W, 3]`.
            generator: gives the generator of view 0 or 1, so that a view's draws depend on nothing but its number.
        """
        views = np.empty((2, 3, self.size, self.size), np.uint8)
        for number, view in enumerate(views):
            draw = draw_view(self, image.shape[0], image.shape[1], generator(number))
            cv2.split(render_view(image, draw, self.size), list(view))
        return torch.from_numpy(views)


def draw_view(views: TwoViews, height: int, width: int, generator: np.random.Generator) -> ViewDraw:
    """Draw one view of a picture of `height` x `width` pixels.

    Every operation is drawn whether it is applied or not, so another probability leaves the other draws as they were.
    """
    flip, jitter, grey, blur = generator.random(4) < (
        views.flip_probability,
        views.jitter_probability,
        views.grey_probability,
        views.blur_probability,
    )
    strengths = (views.brightness, views.contrast, views.saturation, views.hue)
    shifts = generator.uniform(-1, 1, len(JITTER)) * strengths
    order = [i for i in generator.permutation(len(JITTER)) if jitter and strengths[i] > 0]
    sigma = generator.uniform(*views.blur_sigma)
    return ViewDraw(
        *draw_crop(views.crop_area, height, width, generator),
        flip=bool(flip),
        jitter=tuple((JITTER[i][0], JITTER[i][1] + shifts[i]) for i in order),
        grey=bool(grey),
        blur_sigma=sigma if blur else 0.0,
    )


def draw_crop(
    area_range: tuple[float, float], height: int, width: int, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a crop in pixels as torchvision's RandomResizedCrop does.

    Ten tries at an area and a log-uniform aspect that fit in the picture; then the largest central crop of an allowed
    aspect.
    """
    log_aspect = (math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1]))
    for _ in range(10):
        area = height * width * generator.uniform(*area_range)
        aspect = math.exp(generator.uniform(*log_aspect))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(height - crop_height + 1))
            left = int(generator.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, round(height * CROP_ASPECT[1]))
    crop_height = min(height, round(width / CROP_ASPECT[0]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def render_view(image: np.ndarray, draw: ViewDraw, size: int) -> np.ndarray:
    """Apply a draw to a uint8 RGB picture `[H, W, 3]`; returns the view, uint8 RGB `[size, size, 3]`."""
    crop = image[draw.top : draw.top + draw.height, draw.left : draw.left + draw.width]
    view = resize(crop, size)
    if draw.flip:
        view = cv2.flip(view, 1)
    view = jitter_colour(view, draw.jitter, draw.grey)
    if draw.blur_sigma > 0:
        kernel = blur_kernel(draw.blur_sigma)
        view = cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return view


def resize(crop: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 `[h, w, 3]` to `[size, size, 3]` with PIL's bilinear filter, which widens as it shrinks a picture.

    OpenCV's bilinear filter does not, so it would alias the views of a large picture.
    """
    # torch's vectorised kernel wants channels last, and gives them back
    pixels = torch.from_numpy(np.ascontiguousarray(crop))[None].permute(0, 3, 1, 2)
    resized = interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def jitter_colour(view: np.ndarray, jitter: tuple[tuple[str, float], ...], grey: bool) -> np.ndarray:
    """Apply the jitter's operations in their order, then grey, to uint8 RGB `[h, w, 3]`.

    Each blends the picture with a reference as PIL's ImageEnhance does: black (brightness), its mean luma (contrast),
    its luma (saturation, and grey at factor 0); hue turns the H of HSV. All round and clip to 0..255 on their own.
    """
    for name, factor in jitter:
        view = turn_hue(view, factor) if name == "hue" else cv2.transform(view, colour_matrix(name, factor, view))
    return cv2.transform(view, colour_matrix("saturation", 0.0, view)) if grey else view


def colour_matrix(name: str, factor: float, view: np.ndarray) -> np.ndarray:
    """Return the affine `[3, 4]` map of colours that is brightness, contrast or saturation by `factor`."""
    matrix = factor * np.eye(3, 4)
    if name == "contrast":
        matrix[:, 3] = (1 - factor) * (LUMA @ cv2.mean(view)[:3])
    elif name == "saturation":
        matrix[:, :3] += (1 - factor) * LUMA
    return matrix


def turn_hue(view: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue of uint8 RGB `[h, w, 3]` by a share of the full circle, in steps of 1/256."""
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(256 * turn) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


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
    kernel = np.convolve(np.convolve(box, box), box)
    # exact symmetry is what lets OpenCV take its integer filter, three times as fast
    return (kernel + kernel[::-1]) / 2
