"""What a model costs: parameters, multiply-accumulates and output size, worked out without computing anything."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .config import InspectConfig, ModelConfig, Named
from .keypoints import load_skeleton
from .model import build_backbone, build_model


def main(config: InspectConfig) -> None:
    """Print `inspect_model`, as text or as one JSON object."""
    figures = inspect_model(config.model)
    print(json.dumps(figures) if config.json else format_inspection(figures))


def inspect_model(config: ModelConfig) -> dict[str, Any]:
    """Figures of a model for one input picture, or of the backbone alone where `config.head` is null.

    `macs` counts convolutions and matrix products of the inference path; `macs_deconv_at_output` counts deconvolutions
    once per output pixel and kernel entry, as the papers' tables do (their "GFLOPs" is this over 2^30). `output` is
    `[K, h, w]`, or the coarsest map's `[C, h, w]` of a backbone. `joints` says which skeleton gives K: coco17 where the
    config leaves it to the data.

    Raises:
        UserError: as `build_model`.
    """
    # Weights change no figure, and must not be downloaded for one.
    kwargs = {name: value for name, value in config.backbone.kwargs.items() if name != "pretrained"}
    backbone = Named(config.backbone.name, kwargs)
    joints = "coco17 (assumed)" if config.skeleton == "auto" else config.skeleton
    with torch.device("meta"):
        if config.head is None:
            model: nn.Module = build_backbone(backbone)
            joints = None
        else:
            skeleton = load_skeleton("coco17" if config.skeleton == "auto" else config.skeleton)
            model = build_model(replace(config, backbone=backbone), skeleton)
        images = torch.zeros(1, 3, config.input.height, config.input.width)
    used: dict[int, int] = {}
    extra = 0

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal extra
        used.update((id(parameter), parameter.numel()) for parameter in module.parameters(recurse=False))
        if isinstance(module, nn.ConvTranspose2d):
            per_pixel = module.weight.numel()
            extra += per_pixel * (_pixels(output) - _pixels(inputs[0]))

    for module in model.modules():
        module.register_forward_hook(record)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model.eval()(images)
    macs = counter.get_total_flops() // 2
    return {
        "parameters_training": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_inference": sum(used.values()),
        "macs": macs,
        "macs_deconv_at_output": macs + extra,
        "output": list((output if isinstance(output, Tensor) else output[-1]).shape[1:]),
        "joints": joints,
    }


def format_inspection(figures: dict[str, Any]) -> str:
    """The figures of `inspect_model` as a text of a few lines."""
    joints = f", joints of {figures['joints']}" if figures["joints"] else ", coarsest map of the backbone"
    return "\n".join(
        [
            f"parameters   {figures['parameters_training'] / 1e6:.2f} M in training, "
            f"{figures['parameters_inference'] / 1e6:.2f} M at inference",
            f"MACs         {figures['macs'] / 1e9:.2f} G (as the papers' tables count: "
            f"{figures['macs_deconv_at_output'] / 2**30:.2f} x 2^30, deconvolutions at output resolution)",
            f"output       {' x '.join(map(str, figures['output']))}{joints}",
        ]
    )


def _pixels(maps: Tensor) -> int:
    return maps.shape[-2] * maps.shape[-1]
