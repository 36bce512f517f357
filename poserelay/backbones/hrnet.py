"""HRNet with the names of the official code: the four branches of stage 4, without the classification head."""

from __future__ import annotations

from typing import Any

from timm.models.hrnet import HighResolutionNetFeatures

from ..errors import UserError
from .features import Backbone, timm_backbone


def hrnet(model: str, *, pretrained: bool = False) -> Backbone:
    """timm's `model` (hrnet_w32, ...) with all four branches; `pretrained` takes the authors' ImageNet weights."""
    return timm_backbone(f"{model}.ms_in1k", pretrained=pretrained, feature_location="")


def is_hrnet(backbone: Backbone) -> bool:
    """Whether the maps are HRNet's branches."""
    return isinstance(backbone.network, HighResolutionNetFeatures)


def drop_unused_fuse(backbone: Backbone) -> None:
    """Leave only the top branch's row of the last fusion, as the authors' pose_hrnet: the backbone gives one map.

    Raises:
        UserError: the backbone is not an HRNet.
    """
    network: Any = backbone.network
    if not is_hrnet(backbone):
        raise UserError("only an HRNet has fuse rows to drop; use an hrnet backbone")
    last = network.stage4[-1]
    last.fuse_layers = last.fuse_layers[:1]
    backbone.channels = backbone.channels[:1]
    backbone.strides = backbone.strides[:1]
