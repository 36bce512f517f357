"""SCIO's self-constrained learning: what its networks are trained to, and whose turn it is (Kan et al., section 3.3).

Eq. numbers are the paper's; readings SCIO 2 to 5.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from poserelay.heads import SCIO
from poserelay.heatmaps import render
from poserelay.losses import joints_mse
from poserelay.model import PoseModel

Side = Literal["prediction", "verification"]
SIDES: tuple[Side, Side] = ("prediction", "verification")


class Loop(NamedTuple):
    """Heatmaps of one pass through both sides, each `[B, G, h, w]`."""

    distal: Tensor
    """Of D, by the prediction networks."""
    verified: Tensor
    """Of A, by the verification networks."""


def side_of(epoch: int) -> Side:
    """Which side an epoch trains: they take turns, the prediction networks first."""
    return SIDES[epoch % 2]


def set_side(networks: SCIO, side: Side) -> None:
    """Training mode for one side; the other is frozen, its batch norms' statistics too."""
    for name in SIDES:
        part: nn.Module = getattr(networks, name)
        part.train(name == side)
        part.requires_grad_(name == side)


def constraint_loop(networks: SCIO, side: Side, heatmaps: Tensor, features: Tensor) -> Loop:
    """Eq. 5's loop from the side that is trained: D and from it A, or A from the heatmaps' own D and from it D.

    heatmaps: of the head, `[B, K, h, w]`; features: f, `[B, C, h, w]`.
    """
    if side == "prediction":
        distal = networks.predict(heatmaps, features)
        return Loop(distal, networks.verify(heatmaps, distal, features))
    verified = networks.verify(heatmaps, heatmaps[:, networks.distal], features)
    return Loop(networks.predict_from(verified, heatmaps, features), verified)


def constraint_loss(found: Loop, networks: SCIO, targets: Tensor, weight: Tensor, norm: Literal["mse", "l2"]) -> Tensor:
    """L_P (Eq. 9 and 10) or L_V (Eq. 11), a scalar: both ask for the true maps of A and of D.

    targets: Gaussians of all joints, `[B, K, h, w]`; weight: `[B, K]`. mse: HRNet's, as the heatmaps' own loss
    (readings SCIO 2); l2: the plain norm of each map's difference, averaged over maps.
    """
    compare = joints_mse if norm == "mse" else joints_norm
    distal, verified = networks.distal, networks.verified
    return compare(found.distal, targets[:, distal], weight[:, distal]) + compare(
        found.verified, targets[:, verified], weight[:, verified]
    )


def joints_norm(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """|| predicted - target ||_2 of each joint's map, times its weight, averaged over the joints.

    predicted and target `[B, K, h, w]`, weight `[B, K]`; joints of weight 0 still divide.
    """
    return (torch.linalg.vector_norm((predicted - target).flatten(-2), dim=-1) * weight).mean()


class Displaced(NamedTuple):
    """Distal joints moved away from the truth."""

    distal: Tensor
    """Gaussians at the places they were moved to, `[B, G, h, w]`."""
    share: Tensor
    """How much of A's map is left to ask for, 1 at the truth and 0 at `reach` and beyond, `[B, G]`."""


def displace(
    keypoints: Tensor, size: tuple[int, int], sigma: float, reach: float, generator: torch.Generator
) -> Displaced:
    """Gaussians of distal joints at random distances of 0 to `reach` in random directions (readings SCIO 5).

    The paper trains the verification networks on distal joints that are right, or as wrong as the head's. As f all but
    shows where A is, nothing in Eq. 11 keeps them from leaving D unread, and then the search is blind. Here, which is
    ours, A is asked for the more faintly the further D is off: the loss of Eq. 8 becomes a bowl around the true D.

    Args:
        keypoints: the true D, `[B, G, 2]`, heatmap pixels.
        size: (h, w) of the maps.
        sigma: of the Gaussians, heatmap pixels.
        reach: heatmap pixels.
        generator: on the CPU.
    """
    distance, angle = torch.rand(2, *keypoints.shape[:2], generator=generator).to(keypoints.device).unbind()
    direction = torch.stack(((2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()), -1)
    moved = keypoints + reach * distance[..., None] * direction
    return Displaced(render(moved, size, sigma), 1 - distance)


def displaced_loss(verified: Tensor, share: Tensor, networks: SCIO, targets: Tensor, weight: Tensor) -> Tensor:
    """Loss of Gamma's maps `[B, G, h, w]` for `displace`d distal joints, of groups whose A and D are labelled."""
    joints = networks.verified
    both = weight[:, joints] * weight[:, networks.distal]
    return joints_mse(verified, targets[:, joints] * share[..., None, None], both)


class Outputs(NamedTuple):
    """What training compares with labels."""

    maps: Tensor
    """`[B, K, h, w]`, the head's."""
    auxiliary: Tensor | None
    """`[B, K, h', w']`, of CCM's auxiliary decoder, where there is one that is trained."""
    loop: Loop | None
    """Where the model carries SCIO."""
    displaced: Tensor | None
    """Gamma's maps `[B, G, h, w]` for displaced distal joints, where they are given."""


class Supervised(nn.Module):
    """A pose model whose call gives every heatmap that training supervises. Several processes wrap it as one network.

    Args:
        model: the pose model.
        freeze_base: run everything but SCIO's networks without gradients, and no auxiliary decoder.
    """

    def __init__(self, model: PoseModel, *, freeze_base: bool = False) -> None:
        super().__init__()
        self.model = model
        self.freeze_base = freeze_base

    def forward(self, images: Tensor, side: Side | None = None, displaced: Tensor | None = None) -> Outputs:
        """Turn normalised crops `[B, 3, H, W]` into maps.

        side: of SCIO's networks, the one that is trained. displaced: H_D in place of the head's `[B, G, h, w]`, for one
        more pass through the verification networks.
        """
        networks = self.model.refiner
        if self.freeze_base:
            with torch.no_grad():
                maps, features = self.model.with_features(images)
            auxiliary = None
        else:
            maps, auxiliary, features = self.model.supervised(images)
        if networks is None or side is None:
            return Outputs(maps, auxiliary, None, None)
        loop = constraint_loop(networks, side, maps, features)
        return Outputs(
            maps,
            auxiliary,
            loop,
            None if displaced is None else networks.verify(maps, displaced.to(maps.dtype), features),
        )
