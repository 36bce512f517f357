"""HRNet's head: one 1x1 convolution on the top branch (Sun et al., CVPR 2019, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn


class HRNetHead(nn.Module):
    """One map per joint from the branch of highest resolution.

    Args:
        in_channels: of the backbone's maps, fine to coarse.
        num_joints: K.
    """

    level = 0
    """The one of the backbone's maps that is read."""
    upsampling = 1
    """Heatmap pixels per pixel of the map that is read."""
    joint_axes: ClassVar[dict[str, int]] = {"final_layer.weight": 0, "final_layer.bias": 0}
    """As `DeconvHead.joint_axes`."""

    def __init__(self, in_channels: Sequence[int], num_joints: int) -> None:
        super().__init__()
        self.final_layer = nn.Conv2d(in_channels[self.level], num_joints, 1)
        nn.init.normal_(self.final_layer.weight, std=0.001)
        nn.init.zeros_(self.final_layer.bias)  # pyright: ignore[reportArgumentType]

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """What the last layer reads of the backbone's maps, `[B, C, h, w]`."""
        return maps[self.level]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn the backbone's maps into heatmaps `[B, K, h, w]`."""
        return self.final_layer(self.features(maps))
