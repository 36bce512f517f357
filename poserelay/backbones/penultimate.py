"""The map of the penultimate stage: ICON contrasts it (readings ICON 1), CCM's auxiliary decoder reads it (CCM 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .features import Backbone
from .hrnet import is_hrnet


def penultimate_level(backbone: Backbone) -> int:
    """The one of the backbone's maps whose channels and stride the penultimate stage's map has.

    It is ResNet's conv4_x, the third of four maps; of an HRNet the branch of highest resolution, though as stage 3
    leaves it, which is none of the backbone's own maps.
    """
    return 0 if is_hrnet(backbone) else 2


def with_penultimate(backbone: Backbone, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The backbone's maps of normalised images `[B, 3, H, W]`, and its penultimate stage's, `[B, C, h, w]`."""
    if not is_hrnet(backbone):
        maps = backbone(images)
        return maps, maps[penultimate_level(backbone)]
    kept: list[Tensor] = []
    network: Any = backbone.network
    handle = network.stage3.register_forward_hook(lambda _module, _inputs, branches: kept.append(branches[0]))
    try:
        return backbone(images), kept[0]
    finally:
        handle.remove()
