"""SCIO's networks: prediction and verification of joints within structural groups (Kan et al., ECCV 2022, section 3).

Eq. and section numbers are the paper's; readings SCIO 1 to 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError


class GroupNetworks(nn.Module):
    """One FCN for each of G groups: three heatmaps and the feature map f to one heatmap (Eq. 3 and 4).

    f is reduced by a 1x1 convolution; 3x3 convolution, batch norm and ReLU for each of `dilations`; a 1x1 convolution
    to the heatmap. No group sees another: all convolutions but the first are grouped ones. The first 3x3 convolution
    is kept as its two summands, of f and of the heatmaps, so that a search that moves one heatmap need not repeat the
    rest (`context`).

    Args:
        in_channels: of f.
        groups: G.
        feature_channels: that f is reduced to, per group.
        width: of the 3x3 layers, per group.
        dilations: of the 3x3 layers, whose number is the depth.
    """

    def __init__(
        self, in_channels: int, groups: int, *, feature_channels: int, width: int, dilations: Sequence[int]
    ) -> None:
        super().__init__()
        first, *others = dilations

        def convolution(channels: int, dilation: int) -> nn.Conv2d:
            return nn.Conv2d(
                groups * channels, groups * width, 3, padding=dilation, dilation=dilation, groups=groups, bias=False
            )

        self.groups = groups
        self.reduce = nn.Conv2d(in_channels, groups * feature_channels, 1)
        self.of_features = convolution(feature_channels, first)
        self.of_heatmaps = convolution(3, first)
        self.layers = nn.Sequential(nn.BatchNorm2d(groups * width), nn.ReLU(inplace=True))
        for dilation in others:
            self.layers.append(convolution(width, dilation))
            self.layers.append(nn.BatchNorm2d(groups * width))
            self.layers.append(nn.ReLU(inplace=True))
        self.to_heatmap = nn.Conv2d(groups * width, groups, 1, groups=groups)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.to_heatmap.weight, std=0.001)  # as the last layer of every other head

    def context(self, features: Tensor) -> Tensor:
        """What f `[B, C, h, w]` adds to the first layer, `[B, G * width, h, w]`."""
        return self.of_features(self.reduce(features))

    def forward(self, heatmaps: Tensor, context: Tensor) -> Tensor:
        """Turn the groups' three heatmaps `[B, G, 3, h, w]` and `context` into one each, `[B, G, h, w]`."""
        return self.to_heatmap(self.layers(self.of_heatmaps(heatmaps.flatten(1, 2)) + context))

    def without_last(self, heatmaps: Tensor, context: Tensor) -> Tensor:
        """The sum before the first batch norm for the first two heatmaps `[B, G, 2, h, w]` alone."""
        return context + self._of_some(heatmaps.flatten(1, 2), slice(2))

    def with_last(self, last: Tensor, rest: Tensor) -> Tensor:
        """`forward` from the third heatmap of each group, `[B, G, h, w]`, and `without_last` of the first two."""
        return self.to_heatmap(self.layers(self._of_some(last, slice(2, 3)).add_(rest)))

    def _of_some(self, heatmaps: Tensor, which: slice) -> Tensor:
        """`of_heatmaps` of some of each group's three."""
        layer: Any = self.of_heatmaps
        return nn.functional.conv2d(
            heatmaps, layer.weight[:, which], padding=layer.padding, dilation=layer.dilation, groups=self.groups
        )


class SCIO(nn.Module):
    """Prediction networks Phi and verification networks Gamma of all groups {A, B, C | D} (sections 3.2 and 3.3).

    f is the map that the last layer of the model's head reads, of the heatmaps' size. The paper's FCN is not printed:
    dilations instead of its pooling let every pixel see the joints at the other end of its limb (31 heatmap pixels to
    each side by default) at the heatmaps' resolution.

    Args:
        in_channels: of f.
        groups: for each group the positions of A, B, C and D among the joints, `[G][4]`.
        feature_channels: that f is reduced to, per group and network.
        width: of the 3x3 layers, per group and network.
        dilations: of the 3x3 layers, whose number is the depth.
        sigma: of the Gaussians that the search renders, heatmap pixels: the training targets'.

    Raises:
        UserError: no group, or an argument that is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        groups: Sequence[Sequence[int]],
        *,
        feature_channels: int = 16,
        width: int = 16,
        dilations: Sequence[int] = (1, 2, 4, 8, 16),
        sigma: float = 2.0,
    ) -> None:
        super().__init__()
        if not groups:
            raise UserError("model.refiner: scio needs the skeleton's groups; declare {proximal: [A, B, C], distal: D}")
        for name, value in {"feature_channels": feature_channels, "width": width, "sigma": sigma}.items():
            if not 0 < value < math.inf:
                raise UserError(f"model.refiner: {name} is {value}; give a positive number")
        if not dilations or min(dilations) < 1:
            raise UserError(f"model.refiner: dilations is {list(dilations)}; give at least one, each 1 or more")
        self.sigma = sigma
        self.groups = [list(group) for group in groups]
        # Fixed by the skeleton, so not among the weights.
        self.register_buffer("joints", torch.tensor(self.groups), persistent=False)

        def networks() -> GroupNetworks:
            return GroupNetworks(
                in_channels, len(groups), feature_channels=feature_channels, width=width, dilations=dilations
            )

        self.prediction = networks()
        self.verification = networks()

    @property
    def distal(self) -> Tensor:
        """Position of each group's D among the joints, `[G]`."""
        return self.get_buffer("joints")[:, 3]

    @property
    def verified(self) -> Tensor:
        """Position of each group's A, which the verification networks predict back, `[G]`."""
        return self.get_buffer("joints")[:, 0]

    @property
    def proximal(self) -> Tensor:
        """Positions of each group's A, B and C, `[G, 3]`."""
        return self.get_buffer("joints")[:, :3]

    def predict(self, heatmaps: Tensor, features: Tensor) -> Tensor:
        """Phi(H_A, H_B, H_C; f), the heatmaps `[B, G, h, w]` of the distal joints (Eq. 3).

        heatmaps: of all joints, `[B, K, h, w]`; features: f, `[B, C, h, w]`.
        """
        return self.prediction(heatmaps[:, self.proximal], self.prediction.context(features))

    def verify(self, heatmaps: Tensor, distal: Tensor, features: Tensor) -> Tensor:
        """Gamma(H_B, H_C, H_D; f), the heatmaps `[B, G, h, w]` of the groups' A (Eq. 4 and 5).

        heatmaps: of all joints, `[B, K, h, w]`; distal: H_D of each group, `[B, G, h, w]`; features: f, `[B, C, h, w]`.
        """
        given = torch.cat((heatmaps[:, self.proximal[:, 1:]], distal[:, :, None]), 2)
        return self.verification(given, self.verification.context(features))

    def predict_from(self, verified: Tensor, heatmaps: Tensor, features: Tensor) -> Tensor:
        """`predict` with the groups' H_A `[B, G, h, w]` given apart, the second half of Eq. 11's loop."""
        given = torch.cat((verified[:, :, None], heatmaps[:, self.proximal[:, 1:]]), 2)
        return self.prediction(given, self.prediction.context(features))
