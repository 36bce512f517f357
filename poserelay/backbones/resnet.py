"""ResNet and ResNeXt, with torchvision's names and ImageNet weights."""

from __future__ import annotations

from typing import Literal

from .features import Backbone, timm_backbone


def resnet(
    model: str,
    *,
    pretrained: bool = False,
    output_stride: Literal[8, 16, 32] = 32,
    zero_init_residual: bool = False,
) -> Backbone:
    """conv2_x to conv5_x of timm's `model`.

    Args:
        model: resnet18, ...; the weights are torchvision's.
        pretrained: start from ImageNet weights, downloaded at first use.
        output_stride: of conv5_x; below 32 its last stages dilate instead of striding.
        zero_init_residual: start every block as the identity (SimSiam).
    """
    # timm starts blocks as the identity unless told; the pose papers do not.
    return timm_backbone(
        f"{model}.tv_in1k", pretrained=pretrained, output_stride=output_stride, zero_init_last=zero_init_residual
    )
