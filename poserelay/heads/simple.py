"""SimpleBaseline's head: deconvolutions and one 1x1 convolution (Xiao et al., ECCV 2018, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from ..errors import UserError


class DeconvHead(nn.Module):
    """Deconvolution, batch norm and ReLU, each doubling the resolution of the coarsest map, then one map per joint.

    The names in the state dict are those of the authors' pose_resnet.

    Args:
        in_channels: of the backbone's maps, fine to coarse.
        num_joints: K.
        deconv_channels: width of each deconvolution.
        deconv_kernel: of all of them (Table 1).
    """

    level = -1
    """The one of the backbone's maps that is read."""
    joint_axes: ClassVar[dict[str, int]] = {"final_layer.weight": 0, "final_layer.bias": 0}
    """Dimension of a tensor of the state that holds the joints, each an equal part of it, by the tensor's name."""

    def __init__(
        self,
        in_channels: Sequence[int],
        num_joints: int,
        *,
        deconv_channels: Sequence[int] = (256, 256, 256),
        deconv_kernel: Literal[2, 3, 4] = 4,
    ) -> None:
        super().__init__()
        if min(deconv_channels, default=1) < 1:
            raise UserError(f"model.head: deconv_channels is {list(deconv_channels)}; give numbers of at least 1")
        # Padding that doubles the size exactly.
        padding, output_padding = {4: (1, 0), 3: (1, 1), 2: (0, 0)}[deconv_kernel]
        layers = []
        width = in_channels[self.level]
        for channels in deconv_channels:
            layers += [
                nn.ConvTranspose2d(width, channels, deconv_kernel, 2, padding, output_padding, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            width = channels
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = nn.Conv2d(width, num_joints, 1)
        # Heatmap pixels per pixel of the map that is read.
        self.upsampling = 2 ** len(deconv_channels)
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001)
        nn.init.zeros_(self.final_layer.bias)  # pyright: ignore[reportArgumentType]

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """What the last layer reads of the backbone's maps, `[B, C, h, w]`."""
        return self.deconv_layers(maps[self.level])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn the backbone's maps into heatmaps `[B, K, h, w]`."""
        return self.final_layer(self.features(maps))
