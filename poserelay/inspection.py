"""What a model costs: parameters, multiply-accumulates and output size, worked out without computing anything."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .config import DistalJoints, InspectConfig, ModelConfig, Named
from .keypoints import Skeleton, load_skeleton
from .local_search import SelfConstraint
from .model import PoseModel, build_backbone, build_model, build_single_stage, is_single_stage


def main(config: InspectConfig) -> None:
    """Print `inspect_model`, as text or as one JSON object."""
    assert config.model is not None, "checked by InspectConfig"
    figures = inspect_model(config.model)
    print(json.dumps(figures) if config.json else format_inspection(figures))


def inspect_model(config: ModelConfig) -> dict[str, Any]:
    """Figures of a model for one input picture, or of the backbone alone where `config.head` is null.

    `macs` counts convolutions and matrix products of the inference path; `macs_deconv_at_output` counts deconvolutions
    once per output pixel and kernel entry, as the papers' tables do (their "GFLOPs" is this over 2^30). `output` is
    `[K, h, w]`, or the coarsest map's `[C, h, w]` of a backbone. `joints` says which skeleton gives K: coco17 where the
    config leaves it to the data.

    Where `config.refiner` is given, both parameter counts include its own, and `refiner_figures` are added; `macs`
    stays what the heatmaps cost. Of a single-stage model there are `single_stage_figures`.

    Raises:
        UserError: as `build_model` or `build_single_stage`.
    """
    # Weights change no figure, and must not be downloaded for one.
    kwargs = {name: value for name, value in config.backbone.kwargs.items() if name != "pretrained"}
    backbone = Named(config.backbone.name, kwargs)
    joints = "coco17 (assumed)" if config.skeleton == "auto" else config.skeleton
    named = "coco17" if config.skeleton == "auto" else config.skeleton
    if is_single_stage(config.head):
        figures = single_stage_figures(replace(config, backbone=backbone), load_skeleton(named))
        return {**figures, "joints": joints}
    with torch.device("meta"):
        if config.head is None:
            model: nn.Module = build_backbone(backbone)
            joints = None
        else:
            model = build_model(replace(config, backbone=backbone), load_skeleton(named))
        images = torch.zeros(1, 3, config.input.height, config.input.width)
    model.eval()
    refiner = refiner_figures(model, images) if isinstance(model, PoseModel) and model.refiner else {}
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
        output = model(images)
    macs = counter.get_total_flops() // 2
    return {
        "parameters_training": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_inference": sum(used.values()) + refiner.get("parameters_refiner", 0),
        "macs": macs,
        "macs_deconv_at_output": macs + extra,
        "output": list((output if isinstance(output, Tensor) else output[-1]).shape[1:]),
        "joints": joints,
        **refiner,
    }


def single_stage_figures(config: ModelConfig, skeleton: Skeleton) -> dict[str, Any]:
    """Figures of a single-stage model for one image of the input's size; none counts the bilinear sampling.

    `macs` is of the maps, and of no displacement that the maps do not need; `macs_pose` of the displacements at one
    pixel, which are asked for at the peaks alone. `macs_concatenated` is of every layer at every pixel of the finest
    map: the general feature from the upsampled, concatenated maps, and all pixels' displacements. So CIR's paper
    describes it; its "GFLOPs" are this over 10^9, to 1.5 %. `output` is `[1, h, w]`, of the score map.
    """
    with torch.device("meta"):
        model = build_single_stage(config, skeleton).eval()
        images, pixel = torch.zeros(1, 3, config.input.height, config.input.width), torch.zeros(1, 1, 2)
    with torch.no_grad():
        with FlopCounterMode(display=False) as of_backbone:
            levels = model.backbone(images)
        with FlopCounterMode(display=False) as of_head:
            maps = model.head(levels)
        with FlopCounterMode(display=False) as of_pose:
            model.head.displacements(maps.joints, pixel)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    macs = (of_backbone.get_total_flops() + of_head.get_total_flops()) // 2
    layers = [module for module in model.head.modules() if isinstance(module, nn.Conv2d)]
    per_pixel = sum(layer.weight.numel() for layer in layers)
    return {
        "parameters_training": parameters,
        "parameters_inference": parameters,
        "macs": macs,
        "macs_deconv_at_output": macs,
        "macs_pose": of_pose.get_total_flops() // 2,
        "macs_concatenated": of_backbone.get_total_flops() // 2 + per_pixel * _pixels(maps.score),
        "output": list(maps.score.shape),
    }


def refiner_figures(model: PoseModel, images: Tensor) -> dict[str, int]:
    """What SCIO's networks add to a model, for one crop, normalised `[1, 3, H, W]`, and all groups.

    `parameters_refiner` of both sides; `macs_prediction` of the prediction networks' pass; `macs_step` of one step of
    the search; `macs_search` of the whole search of `steps` steps, `DistalJoints`' default, with what it computes once,
    the loss where it starts and the verification score where it ends. The flip test predicts for the mirrored crop,
    too, but does not search there.
    """
    assert model.refiner is not None
    networks, steps = model.refiner, DistalJoints().steps
    with torch.no_grad():
        maps, features = model.with_features(images)
        with FlopCounterMode(display=False) as prediction:
            networks.predict(maps, features)
        with FlopCounterMode(display=False) as once:
            constraint = SelfConstraint(networks, maps, features)
        with FlopCounterMode(display=False) as step:
            constraint.loss(torch.zeros(1, len(networks.distal), 2, device=images.device))
    step_macs = step.get_total_flops() // 2
    return {
        "parameters_refiner": sum(parameter.numel() for parameter in networks.parameters()),
        "macs_prediction": prediction.get_total_flops() // 2,
        "macs_step": step_macs,
        "steps": steps,
        "macs_search": once.get_total_flops() // 2 + (steps + 2) * step_macs,
    }


def format_inspection(figures: dict[str, Any]) -> str:
    """The figures of `inspect_model` as a text of a few lines."""
    joints = f", joints of {figures['joints']}" if figures["joints"] else ", coarsest map of the backbone"
    macs = (
        f"as the papers' tables count: {figures['macs_deconv_at_output'] / 2**30:.2f} x 2^30, deconvolutions at output "
        "resolution"
    )
    if "macs_pose" in figures:
        macs = (
            f"and {figures['macs_pose'] / 1e6:.4f} M per pose, sampling not counted; as CIR's table counts: "
            f"{figures['macs_concatenated'] / 1e9:.2f} G, the maps concatenated and a pose at every pixel"
        )
    lines = [
        f"parameters   {figures['parameters_training'] / 1e6:.2f} M in training, "
        f"{figures['parameters_inference'] / 1e6:.2f} M at inference",
        f"MACs         {figures['macs'] / 1e9:.2f} G ({macs})",
        f"output       {' x '.join(map(str, figures['output']))}{joints}",
    ]
    if "parameters_refiner" in figures:
        lines.append(
            f"SCIO         {figures['parameters_refiner'] / 1e6:.2f} M of the parameters; MACs beside those above: "
            f"{figures['macs_prediction'] / 1e9:.3f} G to predict, {figures['macs_search'] / 1e9:.3f} G to search in "
            f"{figures['steps']} steps ({figures['macs_step'] / 1e9:.3f} G each)"
        )
    return "\n".join(lines)


def _pixels(maps: Tensor) -> int:
    return maps.shape[-2] * maps.shape[-1]
