"""CCM's decoder: cascaded context mixers (Zhang, Chen and Tao, "Towards High Performance Human Keypoint Detection").

Eq. and section numbers are the paper's; readings CCM 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError


class ContextMixer(nn.Module):
    """One context mixer, `[B, C, h, w]` to `[B, channels, 2 h, 2 w]` (section 3.2.1, Eq. 1-4).

    Three branches: the residual one, four dilated convolutions and a deconvolution (HDC), and a weight in 0..1 of each
    of its channels from the whole map (SE). Without `hdc` the deconvolution reads the map itself. Without both it is
    alone, a layer of SimpleBaseline, which is Table 2's baseline.

    Args:
        in_channels: of the map that is read.
        channels: of the map that is made, a multiple of 4.
        se: with the squeeze-and-excitation branch.
        hdc: with the dilated convolutions.
        upsample: double the resolution; else a 3x3 convolution takes the deconvolution's place (section 6.2.1).
    """

    def __init__(self, in_channels: int, channels: int, *, se: bool, hdc: bool, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.residual = nn.Conv2d(in_channels, channels, 1, bias=False) if se or hdc else None
        self.residual_norm = nn.BatchNorm2d(channels) if se or hdc else None
        # No batch norm: the map is 1x1.
        self.se = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(in_channels, channels // 4, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels // 4, channels, 1),
                nn.Sigmoid(),
            )
            if se
            else None
        )
        self.dilated = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels, channels // 4, 3, padding=dilation, dilation=dilation, bias=False),
                nn.BatchNorm2d(channels // 4),
                nn.ReLU(inplace=True),
            )
            for dilation in (1, 2, 3, 4)
            if hdc
        )
        width = channels if hdc else in_channels
        self.deconv = (
            nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False)
            if upsample
            else nn.Conv2d(width, channels, 3, padding=1, bias=False)
        )
        self.deconv_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map `[B, C, h, w]`."""
        mixed = torch.cat([convolution(x) for convolution in self.dilated], 1) if len(self.dilated) else x
        context = self.deconv_norm(self.deconv(mixed))  # Eq. 3
        if self.residual is None or self.residual_norm is None:
            return functional.relu(context)
        if self.se is not None:
            context = context * self.se(x)  # Eq. 2
        # Eq. 1 upsamples before the 1x1 convolution. The two commute, and this way round it costs a quarter.
        residual = self.residual(x)
        if self.upsample:
            residual = functional.interpolate(residual, scale_factor=2, mode="bilinear")
        return functional.relu(context + self.residual_norm(residual))  # Eq. 4


class CCMHead(nn.Module):
    """K context mixers in a row on the coarsest map, then one map per joint (Eq. 6 and 7).

    On an HRNet the map is its branch of highest resolution. The auxiliary decoder (section 3.2.3) is a second such
    head for the map of the penultimate stage; `PoseModel.supervised` runs it, in training alone.

    Args:
        in_channels: of the backbone's maps, fine to coarse.
        num_joints: of the heatmaps.
        channels: C_k of each mixer, so that their number is K; multiples of 4.
        upsampling_mixers: how many of the mixers, the first ones, double the resolution; None: all. The paper's HRNets
            with K = 2 and 3 have one.
        se: Table 2's SE.
        hdc: Table 2's HDC.
        auxiliary: Table 2's AD.

    Raises:
        UserError: widths that are no multiples of 4, or more upsampling mixers than there are.
    """

    level = -1
    """The one of the backbone's maps that is read."""
    joint_axes: ClassVar[dict[str, int]] = {
        f"{decoder}final_layer.{part}": 0 for decoder in ("", "auxiliary.") for part in ("weight", "bias")
    }
    """As `DeconvHead.joint_axes`."""

    def __init__(
        self,
        in_channels: Sequence[int],
        num_joints: int,
        *,
        channels: Sequence[int] = (256, 256, 256),
        upsampling_mixers: int | None = None,
        se: bool = True,
        hdc: bool = True,
        auxiliary: bool = True,
    ) -> None:
        super().__init__()
        if not channels or any(width < 4 or width % 4 for width in channels):
            raise UserError(f"model.head: channels is {list(channels)}; give a multiple of 4 for each context mixer")
        upsampling = len(channels) if upsampling_mixers is None else upsampling_mixers
        if not 0 <= upsampling <= len(channels):
            raise UserError(f"model.head: upsampling_mixers is {upsampling}; there are {len(channels)} context mixers")
        widths = [in_channels[self.level], *channels]
        self.mixers = nn.Sequential(
            *(
                ContextMixer(width, out, se=se, hdc=hdc, upsample=number < upsampling)
                for number, (width, out) in enumerate(zip(widths, channels, strict=False))
            )
        )
        self.final_layer = nn.Conv2d(channels[-1], num_joints, 1)
        # Heatmap pixels per pixel of the map that is read.
        self.upsampling = 2**upsampling
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.auxiliary = (
            CCMHead(
                # An HRNet's map of stage 3 is as wide as its only one here.
                in_channels[:-1] or in_channels,
                num_joints,
                channels=channels,
                upsampling_mixers=upsampling_mixers,
                se=se,
                hdc=hdc,
                auxiliary=False,
            )
            if auxiliary
            else None
        )

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """What the last layer reads of the backbone's maps, `[B, C, h, w]`."""
        return self.mixers(maps[self.level])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn the backbone's maps into heatmaps `[B, K, h, w]`."""
        return self.final_layer(self.features(maps))
