"""MobileNet-v2 (timm), up to its last 1x1 convolution, from which pose models deconvolve."""

from __future__ import annotations

from typing import Any, Literal

import timm
from torch import Tensor, nn

from .features import Backbone, fetch


class MobileNetFeatures(nn.Module):
    """A timm MobileNet-v2 without its classifier; the maps of strides 4, 8 and 16 and of the last convolution."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.conv_stem = network.conv_stem
        self.bn1 = network.bn1
        self.blocks = network.blocks
        self.conv_head = network.conv_head
        self.bn2 = network.bn2

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn images `[B, 3, H, W]` into four maps."""
        x = self.bn1(self.conv_stem(images))
        maps = []
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if index in (1, 2, 4):  # the last of their stride
                maps.append(x)
        return [*maps, self.bn2(self.conv_head(x))]


def mobilenetv2_100(*, pretrained: bool = False, output_stride: Literal[8, 16, 32] = 32) -> Backbone:
    """MobileNet-v2 at width 1; `output_stride` below 32 dilates the last stages instead of striding."""
    network = fetch(
        "mobilenetv2_100",
        lambda: timm.create_model("mobilenetv2_100.ra_in1k", pretrained=pretrained, output_stride=output_stride),
    )
    strides = [min(stride, output_stride) for stride in (4, 8, 16, 32)]
    return Backbone(MobileNetFeatures(network), [24, 32, 96, 1280], strides)
