"""What every backbone is: a network that turns images into four maps, with the widths and strides of those maps."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..errors import UserError

LEVELS = 4


class Backbone(nn.Module):
    """A feature extractor. Its state dict carries the network's own names (conv1.weight, not network.conv1.weight).

    Args:
        network: turns images `[B, 3, H, W]` into a list of maps, fine to coarse.
        channels: of those maps.
        strides: of those maps, input pixels per map pixel.
    """

    def __init__(self, network: nn.Module, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.channels = list(channels)
        self.strides = list(strides)
        self.register_load_state_dict_pre_hook(_to_network_names)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn normalised images `[B, 3, H, W]` into maps `[B, channels[i], H / strides[i], W / strides[i]]`."""
        return self.network(images)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The network's state under the names that published weights have."""
        return self.network.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)


def _to_network_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}network.{name.removeprefix(prefix)}"] = state.pop(name)


def timm_backbone(model: str, *, pretrained: bool = False, **options: Any) -> Backbone:
    """The levels of a timm model whose stride is at least 4; `options` are its own.

    Raises:
        UserError: they are not four, channels-first maps, or the pretrained weights cannot be fetched.
    """
    reductions = _reductions(model, options)
    levels = tuple(index for index, reduction in enumerate(reductions) if reduction >= 4)
    if len(levels) != LEVELS:
        raise UserError(
            f"model.backbone: timm's {model} has maps at strides {reductions}, {len(levels)} of them at 4 or more; "
            f"use a model with {LEVELS}"
        )
    network: Any = fetch(
        model,
        lambda: timm.create_model(model, pretrained=pretrained, features_only=True, out_indices=levels, **options),
    )
    return Backbone(network, network.feature_info.channels(), network.feature_info.reduction())


def timm_model(*, model: str, pretrained: bool = False) -> Backbone:
    """Any other four-level convolutional model of timm, by its name there (an HRNet gives its branches).

    Raises:
        UserError: timm has no such model, or as `timm_backbone`.
    """
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; timm.list_models() lists them"
        raise UserError(f"model.backbone.kwargs.model: timm has no model {model!r}{hint}")
    # By default timm widens an HRNet's branches with a part of its classifier.
    options = {"feature_location": ""} if model.startswith("hrnet") else {}
    return timm_backbone(model, pretrained=pretrained, **options)


def fetch(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """`build()`, with a failed download of the pretrained weights as a UserError."""
    try:
        return build()
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.backbone: the pretrained weights of {name} cannot be fetched ({reason}); connect once to fill the "
            "cache, or set pretrained to false"
        ) from error


def _reductions(model: str, options: dict[str, Any]) -> list[int]:
    with torch.device("meta"):
        try:
            network: Any = timm.create_model(model, features_only=True, **options)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"model.backbone: timm's {model} gives no feature maps ({error}); use another") from error
    if str(getattr(network, "output_fmt", "NCHW")).rpartition(".")[2] != "NCHW":
        raise UserError(f"model.backbone: timm's {model} gives channels-last maps; use a convolutional model")
    return list(network.feature_info.reduction())
