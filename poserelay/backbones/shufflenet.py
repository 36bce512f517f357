"""ShuffleNet-v2 (torchvision), up to its last 1x1 convolution, from which pose models deconvolve."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision import models

from .features import Backbone, fetch


class ShuffleNetFeatures(nn.Module):
    """A torchvision ShuffleNet-v2 without its classifier; maps of strides 4, 8, 16 and of the last convolution."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.conv1 = network.conv1
        self.maxpool = network.maxpool
        self.stage2 = network.stage2
        self.stage3 = network.stage3
        self.stage4 = network.stage4
        self.conv5 = network.conv5

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn images `[B, 3, H, W]` into four maps."""
        fine = self.maxpool(self.conv1(images))
        stage2 = self.stage2(fine)
        stage3 = self.stage3(stage2)
        return [fine, stage2, stage3, self.conv5(self.stage4(stage3))]


def shufflenet_v2_x1_5(*, pretrained: bool = False) -> Backbone:
    """ShuffleNet-v2 at width 1.5."""
    weights = models.ShuffleNet_V2_X1_5_Weights.DEFAULT if pretrained else None
    network = fetch("shufflenet_v2_x1_5", lambda: models.shufflenet_v2_x1_5(weights=weights))
    return Backbone(ShuffleNetFeatures(network), [24, 176, 352, 1024], [4, 8, 16, 32])
