"""What a single-stage model is trained to: centre areas, score targets and both losses (CIR, Methods).

Eq. numbers are the paper's ("Learning Quality-Aware Representation for Multi-Person Pose Regression"); readings CIR 2,
4 and 5. B images, S slots for persons, K joints; everything is in map pixels (input pixels / stride) and batched over
images, persons, pixels and joints on the device.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from poserelay.heads.cir import pixel_grid

Target = Literal["cir", "gaussian", "discrete"]

BETA = 1 / 9
"""Of the smooth-L1 loss, as in DEKR's code."""
BACKGROUND = 0.1
"""Weight of the pixels outside all centre areas (Eq. 3)."""


class CentreAreas(NamedTuple):
    """Omega_n of each person: the pixels nearer to its centre than the radius, W candidates for each."""

    centres: Tensor
    """`[B, S, 2]`, mean of the labelled joints; meaningless where the slot is empty."""
    present: Tensor
    """`[B, S]` bool: the slot holds a person."""
    pixels: Tensor
    """`[B, S, W, 2]` float32 (x, y), whole numbers, clamped to the map."""
    owned: Tensor
    """`[B, S, W]` bool: the pixel lies on the map, in the area, and no smaller person has it (of equal ones the first
    slot wins). No pixel of an image is owned twice."""
    size: tuple[int, int]
    """(h, w) of the map."""

    def spread(self, values: Tensor) -> Tensor:
        """A map `[B, h, w]` with `values` `[B, S, W]` at the owned pixels and 0 elsewhere."""
        height, width = self.size
        nowhere = height * width
        index = self.pixels[..., 1].long() * width + self.pixels[..., 0].long()
        index = torch.where(self.owned, index, nowhere).flatten(1)
        spread = values.new_zeros(len(values), nowhere + 1).scatter(1, index, values.flatten(1))
        return spread[:, :nowhere].unflatten(1, (height, width))


def centre_areas(
    keypoints: Tensor, visibility: Tensor, areas: Tensor, size: tuple[int, int], radius: float = 4.0
) -> CentreAreas:
    """The centre areas of all persons (Eq. 2; radius: gamma, map pixels).

    keypoints `[B, S, K, 2]`, which may lie outside the map, visibility `[B, S, K]` (labelled where > 0), areas
    `[B, S]`. A person's centre may lie outside the map, too; what of its area is on the map still counts.
    """
    height, width = size
    labelled = (visibility > 0)[..., None]
    count = labelled.sum(2)
    centres = torch.where(labelled, keypoints, 0).sum(2) / count.clamp(min=1)
    present = count[..., 0] > 0
    nearest = centres.round()[:, :, None] + _window(radius, centres.device)
    last = torch.tensor([width - 1, height - 1], device=centres.device)
    on_map = ((nearest >= 0) & (nearest <= last)).all(-1)
    near = (nearest - centres[:, :, None]).square().sum(-1) < radius**2
    candidate = near & on_map & present[..., None]
    pixels = nearest.clamp(min=0).minimum(last)
    index = pixels[..., 1].long() * width + pixels[..., 0].long()
    order = areas.argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)[..., None].expand_as(index)  # 0: the smallest person
    nobody = areas.shape[1]
    claims = torch.where(candidate, rank, nobody).flatten(1)
    smallest = rank.new_full((len(areas), height * width), nobody).scatter_reduce(1, index.flatten(1), claims, "amin")
    owned = candidate & (smallest.gather(1, index.flatten(1)).view_as(rank) == rank)
    return CentreAreas(centres, present, pixels, owned, size)


def gaussian_scores(areas: CentreAreas, sigma: float = 4.0) -> Tensor:
    """The Gaussian instance label `[B, h, w]` that CIR is compared with (Table 2), the persons' largest at each pixel.

    sigma: map pixels; beyond 3 sigma it is 0. The paper prints neither; these are its parent DEKR's.
    """
    grid = pixel_grid(*areas.size, areas.centres.device)
    x, y = ((areas.centres[..., axis, None] - grid[:, axis]).square() for axis in (0, 1))  # [B, S, h w]
    scores = torch.exp(-(x + y) / (2 * sigma**2))
    scores = torch.where((x + y < (3 * sigma) ** 2) & areas.present[..., None], scores, 0)
    return scores.amax(1).unflatten(1, areas.size)


def region_mask(regions: Tensor, affine: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Which map pixels show a region, `[B, h, w]` bool.

    regions `[B, R, 4]` xywh, image pixels, empty ones without area; affine `[B, 2, 3]`, image -> input pixels.
    """
    height, width = size
    linear = torch.linalg.inv(affine[..., :2])[..., None]
    # Rows and columns apart, x and y ahead of them: sums and reductions over a short last axis are slow on the CPU.
    across = (torch.arange(width, device=regions.device) * stride - affine[:, 0, 2, None])[:, None, None]
    down = (torch.arange(height, device=regions.device) * stride - affine[:, 1, 2, None])[:, None, :, None]
    places = linear[:, :, :1] * across + linear[:, :, 1:] * down  # [B, 2, h, w], image pixels
    low = regions[..., :2, None, None]
    high = low + regions[..., 2:, None, None]
    inside = (places[:, None] >= low) & (places[:, None] < high)  # [B, R, 2, h, w]
    # Likewise `any` of booleans, 90 times as slow as of bytes.
    return (inside[:, :, 0] & inside[:, :, 1]).to(torch.uint8).any(1).bool()


def score_weights(areas: CentreAreas, regions: Tensor) -> Tensor:
    """W of Eq. 3, `[B, h, w]`: 1 in centre areas, 0 in regions `[B, h, w]` outside them, 0.1 elsewhere."""
    return areas.spread(areas.owned.float()).maximum(torch.where(regions, 0.0, BACKGROUND))


def score_loss(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """L_I (Eq. 3) of maps `[B, h, w]`: the weighted squared difference, averaged by its weights."""
    return (weight * (predicted - target).square()).sum() / weight.sum().clamp(min=1)


def quality_loss(predicted: Tensor, target: Tensor, areas: CentreAreas) -> Tensor:
    """Mean squared difference of maps `[B, h, w]` in the centre areas alone (Table 3's additional branch)."""
    owned = areas.spread(areas.owned.float())
    return (owned * (predicted - target).square()).sum() / owned.sum().clamp(min=1)


def displacement_loss(predicted: Tensor, keypoints: Tensor, visibility: Tensor, areas: CentreAreas) -> Tensor:
    """L_D (Eq. 5 and 6): smooth-L1 of the displacements, averaged over owned pixels, labelled joints and x and y.

    predicted `[B, S, W, K, 2]` from the areas' pixels; keypoints `[B, S, K, 2]` and visibility `[B, S, K]`.
    """
    target = keypoints[:, :, None] - areas.pixels[..., None, :]
    supervised = areas.owned[..., None] & (visibility > 0)[:, :, None]
    loss = functional.smooth_l1_loss(predicted, target.expand_as(predicted), beta=BETA, reduction="none").sum(-1)
    return torch.where(supervised, loss, 0).sum() / (2 * supervised.sum()).clamp(min=1)


def _window(radius: float, device: torch.device) -> Tensor:
    """Offsets `[W, 2]` from a centre rounded to a pixel to all pixels that may be nearer to it than the radius."""
    reach = math.ceil(radius)
    steps = torch.arange(-reach, reach + 1, device=device).float()
    offsets = torch.cartesian_prod(steps, steps).flip(-1)
    # Rounding moves the centre by half a pixel at most.
    least = (offsets.abs() - 0.5).clamp(min=0).square().sum(-1)
    return offsets[least < radius**2]
