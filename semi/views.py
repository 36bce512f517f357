"""The hard view of an unlabelled crop: RandAugment, joint cutout, and a further affine map, drawn and made in batches.

The easy view is the loader's (`Augmentation`). Numbers are those of Semi_Human_Pose, the code of Xie et al., "An
Empirical Study of the Collapsing Problem in Semi-Supervised 2D Human Pose Estimation", ICCV 2021 (ESCP).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as colour

from poserelay.heatmaps import input_to_heatmap

CUTOUT_JITTER = 10.0
"""Standard deviation of a square's distance from its joint, and half its side is 10 to 19: pixels of inputs whose
shorter side is 192."""
CUTOUT_SIDES = (10, 20)
CUTOUT_INPUT = 192
RECTANGLE = (125, 123, 114)

# By name: (pictures uint8 [n, 3, H, W], strength 0..1, sign of the change) -> pictures, with the ranges of
# Semi_Human_Pose. The rectangle, which needs draws of its own, is `_rectangle`.
Operation = Callable[[Tensor, float, int], Tensor]
OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda images, _strength, _sign: colour.autocontrast(images),
    "equalize": lambda images, _strength, _sign: colour.equalize(images),
    "invert": lambda images, _strength, _sign: colour.invert(images),
    "posterize": lambda images, strength, _sign: colour.posterize(images, max(2, 6 - int(4 * strength))),
    "solarize": lambda images, strength, _sign: _solarize(images, 256 - 256 * strength),
    "solarize_add": lambda images, strength, _sign: _solarize(
        (images.int() + int(110 * strength)).clamp(max=255).to(torch.uint8), 128
    ),
    "color": lambda images, strength, sign: colour.adjust_saturation(images, 1 + sign * 0.9 * strength),
    "contrast": lambda images, strength, sign: colour.adjust_contrast(images, 1 + sign * 0.9 * strength),
    "brightness": lambda images, strength, sign: colour.adjust_brightness(images, 1 + sign * 0.9 * strength),
    "sharpness": lambda images, strength, sign: colour.adjust_sharpness(images, 1 + sign * 0.9 * strength),
}
# Those that the sign of the change makes another operation.
SIGNED = ("color", "contrast", "brightness", "sharpness")


class HardViews:
    """Makes hard views; every number comes from the generator that is given, drawn on the CPU.

    Args:
        rotation: standard deviation of the angle in degrees, clipped at twice this.
        rotation_probability: share of the crops that are turned.
        scale: standard deviation of the scale around 1, clipped at 1 - scale and 1 + scale.
        cutout_joints: squares per crop, 0 for none.
        rand_augment: colour operations per crop, 0 for none.
        magnitude: of these operations, 0 to 30.
        alignment: of the model's input and heatmaps.
        compat: as the published code, which turns in coordinates normalised by width and height (so a crop that is not
            square is sheared), samples half a pixel off the heatmaps' own grid, and clamps the squares' y at the width
            (so that joints in the bottom quarter of 256 x 192 are never cut), in pixels of any input.
    """

    def __init__(
        self,
        *,
        rotation: float = 30.0,
        rotation_probability: float = 0.8,
        scale: float = 0.25,
        cutout_joints: int = 5,
        rand_augment: int = 0,
        magnitude: int = 20,
        alignment: Literal["hrnet", "udp"] = "hrnet",
        compat: bool = False,
    ) -> None:
        self.rotation = rotation
        self.rotation_probability = rotation_probability
        self.scale = scale
        self.cutout_joints = cutout_joints
        self.rand_augment = rand_augment
        self.magnitude = magnitude
        self.alignment: Literal["hrnet", "udp"] = alignment
        self.compat = compat

    def draw_turns(self, batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Further turns and scales of a batch, `[B, 2, 2]`: hard -> easy input pixels, from the crop's centre."""
        turn, zoom = torch.randn(2, batch, generator=generator).unbind()
        turned = torch.rand(batch, generator=generator) < self.rotation_probability
        angle = torch.deg2rad(turn.clamp(-2, 2) * self.rotation) * turned
        return turn_matrices(angle, 1 + zoom.clamp(-1, 1) * self.scale).to(device, non_blocking=True)

    def colour(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """RandAugment of uint8 crops `[B, 3, H, W]`: `rand_augment` operations each, drawn with replacement."""
        for _ in range(self.rand_augment):
            images = self._one_operation(images, generator)
        return images

    def _one_operation(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, strength = len(images), self.magnitude / 30
        chosen = torch.randint(len(OPERATIONS) + 1, (count,), generator=generator)
        signs = torch.randint(2, (count,), generator=generator) * 2 - 1
        corners = torch.rand(count, 2, generator=generator)
        result = images.clone()
        # A pass over the operations, each on all the crops that drew it, not over the crops.
        for number, (name, operation) in enumerate(OPERATIONS.items()):
            for sign in (-1, 1) if name in SIGNED else (1,):
                rows = ((chosen == number) & (signs == sign if name in SIGNED else True)).nonzero().flatten()
                if len(rows):
                    rows = rows.to(images.device)
                    result[rows] = operation(images[rows], strength, sign)
        rows = (chosen == len(OPERATIONS)).nonzero().flatten()
        if len(rows):
            result[rows.to(images.device)] = _rectangle(
                images[rows.to(images.device)], corners[rows].to(images.device), 80 * strength
            )
        return result

    def cut(self, images: Tensor, joints: Tensor, generator: torch.Generator) -> Tensor:
        """Joint cutout: zeros in squares about some of `joints` `[B, K, 2]`, input pixels.

        images: normalised `[B, 3, H, W]`, where 0 is the mean colour. Each crop draws `cutout_joints` of its K joints
        with replacement; a square lies N(0, 10) px beside its joint and measures 20 to 38 px on inputs whose shorter
        side is 192, in proportion on others.
        """
        if not self.cutout_joints:
            return images
        batch, count = joints.shape[:2]
        height, width = images.shape[-2:]
        drawn = torch.randint(count, (batch, self.cutout_joints), generator=generator)
        jitter = torch.randn(batch, self.cutout_joints, 2, generator=generator) * CUTOUT_JITTER
        half = torch.randint(*CUTOUT_SIDES, (batch, self.cutout_joints, 2), generator=generator).float()
        unit = 1.0 if self.compat else min(height, width) / CUTOUT_INPUT
        drawn, jitter, half = (
            value.to(images.device, non_blocking=True) for value in (drawn, jitter * unit, half * unit)
        )
        centre = (joints.take_along_dim(drawn[..., None], 1) + jitter).trunc()
        limit = centre.new_tensor([height, width] if self.compat else [width, height])
        near, far = (centre - half).clamp(min=0).minimum(limit), (centre + half).clamp(min=0).minimum(limit)

        def within(length: int, axis: int) -> Tensor:
            pixels = torch.arange(length, device=images.device)
            return (pixels >= near[..., axis, None].ceil()) & (pixels < far[..., axis, None].ceil())

        squares = within(height, 1)[..., :, None] & within(width, 0)[..., None, :]  # [B, squares, H, W]
        return images.masked_fill(squares.any(1, keepdim=True), 0.0)

    def turn(self, maps: Tensor, turns: Tensor, input_size: tuple[int, int]) -> Tensor:
        """Easy crops, or heatmaps of them, `[B, C, h, w]` as those of the hard view: bilinear, zeros outside.

        turns: of `draw_turns`; input_size: (height, width) of the crops.
        """
        if self.compat:
            with torch.autocast(maps.device.type, enabled=False):
                theta = functional.pad(turns, (0, 1)).to(maps.dtype)
                grid = functional.affine_grid(theta, list(maps.shape), align_corners=False)
                return functional.grid_sample(maps, grid, align_corners=False)
        return resample(maps, turns, input_size, self.alignment)


def turn_matrices(angle: Tensor, factor: Tensor) -> Tensor:
    """`[B, 2, 2]`: turn by `angle` `[B]` in radians and stretch by `factor` `[B]`."""
    cosine, sine = factor * angle.cos(), factor * angle.sin()
    return torch.stack((cosine, sine, -sine, cosine), -1).unflatten(-1, (2, 2))


def resample(
    maps: Tensor, linear: Tensor, input_size: tuple[int, int], alignment: Literal["hrnet", "udp"] = "hrnet"
) -> Tensor:
    """Crops, or maps of crops, `[B, C, h, w]` under an affine map about the crop's centre: bilinear, zeros outside.

    linear: `[B, 2, 2]`, pixels of the result -> of the source, both input pixels from the crop's centre; input_size:
    (height, width) of the crop, which `alignment` relates to the maps' pixels (`heatmaps.input_to_heatmap`).
    """
    with torch.autocast(maps.device.type, enabled=False):  # whose few digits would move the places by half a pixel
        return _resample(maps, linear, input_size, alignment)


def _resample(maps: Tensor, linear: Tensor, input_size: tuple[int, int], alignment: Literal["hrnet", "udp"]) -> Tensor:
    size = (maps.shape[-2], maps.shape[-1])
    height, width = size
    extent = torch.tensor([input_size[1], input_size[0]], dtype=torch.float32, device=maps.device)
    centre = input_to_heatmap((extent - 1) / 2, input_size, size, alignment)
    ratio = input_to_heatmap(torch.ones_like(extent), input_size, size, alignment)
    x, y = torch.arange(width, device=maps.device), torch.arange(height, device=maps.device)
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    # Through input pixels, in which a turn is a turn: the two axes of a udp heatmap have units of their own.
    source = torch.einsum("bij,hwj->bhwi", linear.float(), (pixels - centre) / ratio) * ratio + centre
    grid = source / extent.new_tensor([max(width - 1, 1), max(height - 1, 1)]) * 2 - 1
    return functional.grid_sample(maps, grid.to(maps.dtype), align_corners=True)


def _solarize(images: Tensor, threshold: float) -> Tensor:
    return torch.where(images < threshold, images, 255 - images)


def _rectangle(images: Tensor, corners: Tensor, side: float) -> Tensor:
    """RandAugment's cutout: a grey rectangle of up to `side` pixels, about a place drawn in 0..1."""
    height, width = images.shape[-2:]
    extent = corners.new_tensor([width, height])
    near = (corners * extent - side / 2).clamp(min=0).trunc()
    far = (near + side).minimum(extent)

    def within(length: int, axis: int) -> Tensor:
        pixels = torch.arange(length, device=images.device)
        return (pixels >= near[:, axis, None]) & (pixels <= far[:, axis, None])

    inside = within(height, 1)[:, None, :, None] & within(width, 0)[:, None, None, :]
    return torch.where(inside, images.new_tensor(RECTANGLE)[:, None, None], images)
