"""QEM: keypoint and pose query encoding, and the score map that CIR supervises (Xiao et al., AAAI 2022).

Eq. and section names are the paper's ("Learning Quality-Aware Representation for Multi-Person Pose Regression");
readings CIR 1 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError

PoseQuery = Literal["none", "automatic", "semantic", "keypoint", "query"]


class JointMaps(NamedTuple):
    """What `CIRHead.displacements` reads, of B images."""

    features: Tensor
    """R_k `[B, K, C, h, w]`, the separated keypoint features."""
    to_query: Tensor | None
    """D_{c->q} `[B, K, 2, h, w]`, x and y in map pixels, float32; None without KQE."""


class CIRMaps(NamedTuple):
    """What the head gives for B images; a map pixel is as many input pixels as the backbone's finest stride says."""

    score: Tensor
    """`[B, h, w]`, how good a pose this pixel predicts (CIR), or how likely a person's centre is there; not bounded."""
    quality: Tensor | None
    """`[B, h, w]`, of the additional quality estimation branch (Table 3), where there is one."""
    joints: JointMaps

    @property
    def confidence(self) -> Tensor:
        """What poses are ranked by, `[B, h, w]`: the score, times the quality (in 0..1) where it is estimated."""
        return self.score if self.quality is None else self.score * self.quality.clamp(0, 1)


class CIRHead(nn.Module):
    """General feature, keypoint query encoding and pose query encoding on all of a backbone's maps.

    The maps are brought to the finest one's size and reduced to the general feature R_g by one 1x1 convolution
    (readings CIR 1). The K joints' branches are grouped 1x1 convolutions; nothing in them looks at neighbours but the
    sampling, so that displacements can be asked for at some pixels alone.

    Args:
        in_channels: of the backbone's maps, fine to coarse.
        num_joints: K.
        general_channels: of R_g; with 256 the head has the 0.1 M parameters more than DEKR's that Table 1 says.
        joint_channels: C, of each R_k.
        instance_channels: of R_I.
        kqe: Table 2's KQE; without it the displacement is read off R_k at the pixel itself.
        points: N, semantic points of each query (Table 4); 0 takes R_k at the query itself.
        pose_query: where R_I is sampled for the score (Table 6): query, Eq. 7's; keypoint, at the predicted joints;
            semantic, at the semantic points, summed over each query's; automatic, at K places that R_I itself proposes;
            none, at the pixel itself, Table 2 without PQE.
        quality: with the additional quality estimation branch (Table 3).

    Raises:
        UserError: a width below 1, `points` below 0, or a pose query that needs KQE or its points without them.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_joints: int,
        *,
        general_channels: int = 256,
        joint_channels: int = 15,
        instance_channels: int = 32,
        kqe: bool = True,
        points: int = 9,
        pose_query: PoseQuery = "query",
        quality: bool = False,
    ) -> None:
        super().__init__()
        widths = {"general": general_channels, "joint": joint_channels, "instance": instance_channels}
        for name, width in widths.items():
            if width < 1:
                raise UserError(f"model.head: {name}_channels is {width}; give at least 1")
        if points < 0:
            raise UserError(f"model.head: points is {points}; give 0 or more")
        if pose_query in ("query", "semantic") and not kqe:
            raise UserError(f"model.head: pose_query {pose_query} needs kqe; take keypoint, automatic or none")
        if pose_query == "semantic" and not points:
            raise UserError("model.head: pose_query semantic needs points of at least 1")
        self.num_joints = num_joints
        self.points = points
        self.pose_query: PoseQuery = pose_query

        def branches(channels: int, each: int) -> nn.Conv2d:
            return nn.Conv2d(num_joints * channels, num_joints * each, 1, groups=num_joints)

        self.general = nn.ModuleList(nn.Conv2d(width, general_channels, 1, bias=False) for width in in_channels)
        self.general_norm = nn.BatchNorm2d(general_channels)
        self.joint_features = nn.Sequential(
            nn.Conv2d(general_channels, num_joints * joint_channels, 1, bias=False),
            nn.BatchNorm2d(num_joints * joint_channels),
            nn.ReLU(inplace=True),
        )
        self.to_query = branches(joint_channels, 2) if kqe else None
        self.to_points = branches(joint_channels, 2 * points) if kqe and points else None
        self.to_keypoint = branches(joint_channels, 2)
        self.instance = nn.Sequential(
            nn.Conv2d(general_channels, instance_channels, 1, bias=False),
            nn.BatchNorm2d(instance_channels),
            nn.ReLU(inplace=True),
        )
        self.automatic = nn.Conv2d(instance_channels, 2 * num_joints, 1) if pose_query == "automatic" else None
        gathered = instance_channels * (1 if pose_query == "none" else num_joints)
        self.pose = nn.Sequential(
            nn.Conv2d(gathered, instance_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(instance_channels),
            nn.ReLU(inplace=True),
        )
        self.score = nn.Conv2d(instance_channels, 1, 1)
        self.quality = nn.Conv2d(instance_channels, 1, 1) if quality else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.to_points is not None:
            # Points that start at one place would all get the same gradient and never part.
            nn.init.normal_(self.to_points.bias)  # pyright: ignore[reportArgumentType]

    @property
    def joint_axes(self) -> dict[str, int]:
        """As `DeconvHead.joint_axes`."""
        branches = ("joint_features.", "to_query.", "to_points.", "to_keypoint.", "automatic.")
        axes = {name: 0 for name, value in self.state_dict().items() if name.startswith(branches) and value.dim()}
        return axes if self.pose_query == "none" else {**axes, "pose.0.weight": 1}

    def forward(self, levels: Sequence[Tensor]) -> CIRMaps:
        """Turn the backbone's maps, fine to coarse, into the score map and what `displacements` reads."""
        size = levels[0].shape[-2:]
        # The 1x1 convolution of the upsampled, concatenated maps, before the upsampling: the two commute, and this way
        # round it costs a third.
        reduced = [convolution(level) for convolution, level in zip(self.general, levels, strict=True)]
        finest, *coarser = reduced
        for level in coarser:
            finest = finest + functional.interpolate(level, size=size, mode="bilinear")
        general = functional.relu(self.general_norm(finest))
        features = self.joint_features(general)
        to_query = None if self.to_query is None else self._displacement(self.to_query, features).unflatten(1, (-1, 2))
        joints = JointMaps(features.unflatten(1, (self.num_joints, -1)), to_query)
        pose = self.pose(self._pose_queries(self.instance(general), joints))
        quality = None if self.quality is None else self.quality(pose)[:, 0]
        return CIRMaps(self.score(pose)[:, 0], quality, joints)

    def displacements(self, maps: JointMaps, pixels: Tensor) -> Tensor:
        """D_{c->k} `[B, P, K, 2]` (Eq. 4) from the map pixels `[B, P, 2]` (x, y) to the keypoints, float32 map pixels.

        A keypoint is its pixel plus this (readings CIR 2, Eq. 5's sign turned round).
        """
        at = pixels[:, None].to(torch.float32)  # [B, 1, P, 2]
        if maps.to_query is None:
            here = sample(maps.features, at.expand(-1, self.num_joints, -1, -1))
            return self._at_points(self.to_keypoint, here).movedim(1, 2)
        query = at + sample(maps.to_query, at.expand(-1, self.num_joints, -1, -1)).movedim(2, -1)  # [B, K, P, 2]
        if self.to_points is None:
            transformed = sample(maps.features, query)
        else:
            places = self._semantic_points(maps, query)  # [B, K, P, N, 2]
            transformed = sample(maps.features, places.flatten(2, 3)).unflatten(-1, (-1, self.points)).sum(-1)
        return (query - at + self._at_points(self.to_keypoint, transformed)).movedim(1, 2)

    def _semantic_points(self, maps: JointMaps, query: Tensor) -> Tensor:
        """Places `[B, K, P, N, 2]` around the queries `[B, K, P, 2]`, from R_k at the query (readings CIR 3)."""
        moved = self._at_points(self.to_points, sample(maps.features, query))  # [B, K, P, 2 N]
        return query[..., None, :] + moved.unflatten(-1, (self.points, 2))

    def _pose_queries(self, instance: Tensor, maps: JointMaps) -> Tensor:
        """R'_I (Eq. 7) of R_I `[B, C, h, w]`: R_I at each pixel's K places, `[B, K C, h, w]`."""
        if self.pose_query == "none":
            return instance
        height, width = instance.shape[-2:]
        grid = pixel_grid(height, width, instance.device)[None].expand(instance.shape[0], -1, -1)  # [B, h w, 2]
        count = 1
        if self.pose_query == "automatic":
            moved = self._displacement(self.automatic, instance).unflatten(1, (-1, 2))
            places = grid[:, None] + moved.flatten(3).movedim(2, -1)  # [B, K, h w, 2]
        elif self.pose_query == "keypoint":
            places = grid[:, None] + self.displacements(maps, grid).movedim(2, 1)
        else:
            assert maps.to_query is not None
            places = grid[:, None] + maps.to_query.flatten(3).movedim(2, -1)
            if self.pose_query == "semantic":
                count = self.points
                places = self._semantic_points(maps, places).flatten(2, 3)
        found = sample(instance[:, None], places.flatten(1, 2)[:, None])[:, 0]  # [B, C, K h w count]
        found = found.unflatten(-1, (self.num_joints, height, width, count)).sum(-1)
        return found.movedim(1, 2).flatten(1, 2)

    @staticmethod
    def _displacement(layer: Any, features: Tensor) -> Tensor:
        """A layer whose answer is in pixels, of which half precision would keep too few digits."""
        with full_precision(features.device):
            return layer(features.float())

    def _at_points(self, layer: Any, features: Tensor) -> Tensor:
        """A grouped layer on the joints' features `[B, K, C, P]`: `[B, K, P, its channels]`."""
        found = self._displacement(layer, features.flatten(1, 2)[..., None])[..., 0]
        return found.unflatten(1, (self.num_joints, -1)).movedim(2, -1)


def sample(maps: Tensor, places: Tensor) -> Tensor:
    """Bilinear values `[B, G, C, P]` of maps `[B, G, C, h, w]` at places `[B, G, P, 2]` (x, y), map pixels, float32.

    Zero beyond the map, fading over its last pixel.
    """
    size = torch.tensor([maps.shape[-1], maps.shape[-2]], device=places.device)
    grid = (2 * places + 1) / size - 1
    with full_precision(maps.device):
        found = functional.grid_sample(
            maps.flatten(0, 1).float(), grid.flatten(0, 1)[:, :, None].float(), align_corners=False
        )
    return found[..., 0].unflatten(0, maps.shape[:2])


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast is off inside; the meta device, on which `inspection` runs a model, knows none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def pixel_grid(height: int, width: int, device: torch.device) -> Tensor:
    """The pixels (x, y) of a map row by row, `[height * width, 2]` float32."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack((x, y), -1).flatten(0, 1).float()
