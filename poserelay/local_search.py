"""SCIO's self-constrained optimisation: a local search for each distal joint (Kan et al., ECCV 2022, section 3.4).

Eq. numbers are the paper's; readings SCIO 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DistalJoints
from .heads.scio import SCIO
from .heatmaps import parts_in_cache, render

MARGIN = 1e-9
"""What a loss must fall by to count: less is rounding, which differs between batches."""
TURN = math.pi * (3 - math.sqrt(5))
"""Radians between two directions. The golden angle leaves no sector untried, whatever the number of turns."""


class Search(NamedTuple):
    """How points moved, and what it was worth; the first entry of every trace is the start."""

    xy: Tensor
    """`[..., 2]`, where the search ended."""
    loss: Tensor
    """`[...]`, there."""
    positions: Tensor
    """`[steps + 1, ..., 2]`, the points after each step."""
    losses: Tensor
    """`[steps + 1, ...]`, theirs: nowhere rising."""


def local_search(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    step: float,
    radius: float,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Search:
    """Move every point to where its loss is lowest, all at once, by steps of one length (Eq. 12).

    A point takes a step where that lowers its loss by more than MARGIN and stays within `radius` of its start, and
    goes on in that direction; else it stays and turns by TURN. The first direction is x. A loss that is not finite is
    never gone to, and a start whose loss is NaN stays. A lowest place beyond `radius`, or off the map, is not
    approached along the border.

    Args:
        loss: from points `[..., 2]` to their losses `[...]`; a point's may depend on nothing but that point.
        start: `[..., 2]`, any unit.
        steps: evaluations of the loss after the first.
        step: length of a step, in the unit of `start`.
        radius: delta of Eq. 12, in the unit of `start`.
        low, high: the smallest and largest x and y that are gone to, `[2]`; None: any.

    A start outside low and high is left where it is unless a step leads inside.
    """
    position, best = start, loss(start)
    direction = torch.zeros_like(best)
    positions, losses = [position], [best]
    for _ in range(steps):
        candidate = position + step * torch.stack((direction.cos(), direction.sin()), -1)
        found = loss(candidate)
        allowed = (candidate - start).square().sum(-1) <= radius**2
        if low is not None:
            allowed &= (candidate >= low).all(-1)
        if high is not None:
            allowed &= (candidate <= high).all(-1)
        better = allowed & found.isfinite() & (found < best - MARGIN)
        position = torch.where(better[..., None], candidate, position)
        best = torch.where(better, found, best)
        direction = torch.where(better, direction, direction + TURN)
        positions.append(position)
        losses.append(best)
    return Search(position, best, torch.stack(positions), torch.stack(losses))


class SelfConstraint:
    """The self-constraint loss of persons' distal joints as a function of where they are (Eq. 8 and 12).

    What does not depend on the distal joints is computed once, here: each call renders the Gaussians, and runs the
    verification networks from their first batch norm on.

    Args:
        networks: in eval mode.
        heatmaps: of the base model, `[B, K, h, w]`.
        features: f, `[B, C, h, w]`.
    """

    def __init__(self, networks: SCIO, heatmaps: Tensor, features: Tensor) -> None:
        self.networks = networks
        self.target = heatmaps[:, networks.verified]
        gamma = networks.verification
        self._rest = gamma.without_last(heatmaps[:, networks.proximal[:, 1:]], gamma.context(features))

    def verified(self, xy: Tensor) -> Tensor:
        """Gamma's heatmaps of A, `[B, G, h, w]`, for distal joints at `[B, G, 2]`, heatmap pixels."""
        size = (self.target.shape[-2], self.target.shape[-1])
        rendered = render(xy, size, self.networks.sigma).to(self._rest)
        parts = parts_in_cache(self._rest)
        return torch.cat([self.networks.verification.with_last(rendered[part], self._rest[part]) for part in parts])

    def loss(self, xy: Tensor) -> Tensor:
        """Mean squared difference of H_A and Gamma's answer, `[B, G]`, for distal joints at `[B, G, 2]`."""
        return (self.target - self.verified(xy)).square().mean((-2, -1))

    def score(self, xy: Tensor) -> Tensor:
        """The verification score in 0..1, `[B, G]`: 1 - |H_A - Gamma|^2 / (|H_A|^2 + |Gamma|^2).

        1 where the two maps of A are equal, 0 where they share nothing; 0 where both are empty.
        """
        found = self.verified(xy)
        overlap = 2 * (self.target * found).sum((-2, -1))
        energy = (self.target.square() + found.square()).sum((-2, -1))
        return (overlap / energy.clamp(min=1e-30)).clamp(0, 1)


class BothCrops:
    """`SelfConstraint` of crops and their mirror images, averaged: what the flip test is to heatmaps.

    Args:
        crops: as they are.
        mirrored: the mirrored ones, from the networks' answers to them.
        mirror: for each group the one that its joints make in the mirror, `[G]`.
        shift: of the mirrored heatmaps, heatmap pixels (`heatmaps.flip_back`).
    """

    def __init__(self, crops: SelfConstraint, mirrored: SelfConstraint, mirror: Tensor, shift: float) -> None:
        self.target = crops.target
        self._crops, self._mirrored, self._mirror = crops, mirrored, mirror
        self._last = crops.target.shape[-1] - 1 + shift

    def _in_mirror(self, xy: Tensor) -> Tensor:
        return torch.stack((self._last - xy[..., 0], xy[..., 1]), -1)[:, self._mirror]

    def loss(self, xy: Tensor) -> Tensor:
        """The mean loss `[B, G]` for distal joints at `[B, G, 2]` in the heatmap pixels of the crops as they are."""
        return (self._crops.loss(xy) + self._mirrored.loss(self._in_mirror(xy))[:, self._mirror]) / 2

    def score(self, xy: Tensor) -> Tensor:
        """The mean verification score in 0..1, `[B, G]`."""
        return (self._crops.score(xy) + self._mirrored.score(self._in_mirror(xy))[:, self._mirror]) / 2


def mirror_groups(networks: SCIO, flip_index: Sequence[int]) -> Tensor | None:
    """For each group the one that its joints make in the mirror, `[G]`; None where one makes none."""
    mirrored = [[flip_index[joint] for joint in group] for group in networks.groups]
    if not all(group in networks.groups for group in mirrored):
        return None
    return torch.tensor([networks.groups.index(group) for group in mirrored], device=networks.distal.device)


def search_distal(constraint: SelfConstraint | BothCrops, start: Tensor, config: DistalJoints, stride: float) -> Search:
    """`local_search` of the distal joints from `start` `[B, G, 2]`, heatmap pixels, on the map.

    stride: input pixels per heatmap pixel.
    """
    height, width = constraint.target.shape[-2:]
    return local_search(
        constraint.loss,
        start,
        steps=config.steps,
        step=config.step / stride if config.unit == "input" else config.step,
        radius=config.radius,
        low=start.new_zeros(2),
        high=start.new_tensor([width - 1, height - 1]),
    )
