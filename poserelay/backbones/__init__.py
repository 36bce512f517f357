"""Backbones by name. Each gives maps at four levels, fine to coarse; add one here and in a file of its family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .features import Backbone, timm_model
from .hrnet import hrnet
from .mobilenet import mobilenetv2_100
from .resnet import resnet
from .shufflenet import shufflenet_v2_x1_5

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet18": partial(resnet, "resnet18"),
    "resnet34": partial(resnet, "resnet34"),
    "resnet50": partial(resnet, "resnet50"),
    "resnet101": partial(resnet, "resnet101"),
    "resnet152": partial(resnet, "resnet152"),
    "resnext50_32x4d": partial(resnet, "resnext50_32x4d"),
    "mobilenetv2_100": mobilenetv2_100,
    "shufflenet_v2_x1_5": shufflenet_v2_x1_5,
    "hrnet_w32": partial(hrnet, "hrnet_w32"),
    "hrnet_w48": partial(hrnet, "hrnet_w48"),
    "timm": timm_model,
}

__all__ = ["BACKBONES", "Backbone"]
