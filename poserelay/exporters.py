"""`python -m poserelay export-weights`: the backbone of a hand-off file under torchvision's or timm's own names."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from safetensors.torch import save

from .checkpoint import UNUSED_FUSE_ROWS, read_export, verify_handoff
from .config import ExportConfig, Named
from .errors import UserError
from .layouts import summary
from .run import write_atomic

TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "shufflenet_v2_x1_5",
)


def main(config: ExportConfig) -> None:
    """Write the plain state dict and say what it holds."""
    path, out = Path(config.checkpoint), Path(config.out)
    if os.path.lexists(out):
        raise UserError(f"out {out}: is already there; name a new file")
    verify_handoff(path)
    state, described = read_export(path)
    backbone = Named(**described["backbone"])
    own = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    names = torchvision_names(backbone, own) if config.layout == "torchvision" else timm_names(backbone, own)
    plain = {names[name]: value for name, value in own.items()}
    if out.suffix == ".safetensors":
        content = save(plain)
    else:
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        content = buffer.getvalue()
    write_atomic(out, lambda temporary: temporary.write_bytes(content))
    others = [name for name in state if not name.startswith("backbone.")]
    print(f"backbone     {backbone.name} {backbone.kwargs or ''}".rstrip())
    if others:
        print(f"left out     the pose model's other parts, for which {config.layout} has no names: {summary(others)}")
    if backbone.name.startswith("hrnet") and not any(map(UNUSED_FUSE_ROWS.match, own)):
        print("not in file  stage4.2.fuse_layers.1 to .3, which a pose model does not have: load with strict=False")
    crop = described["input"]
    print(f"pictures     {crop['color']}, mean {list(crop['mean'])}, std {list(crop['std'])}: the file does not say")
    print(f"wrote        {out}: {len(plain)} tensors, keys as in {config.layout}")


def torchvision_names(backbone: Named, own: Iterable[str]) -> dict[str, str]:
    """Our key -> torchvision's: the same, for the backbones that torchvision has.

    Raises:
        UserError: torchvision has no such network.
    """
    if backbone.name not in TORCHVISION:
        raise UserError(
            f"layout torchvision: has no names for {_shown(backbone)}, only for {', '.join(TORCHVISION)}; try timm"
        )
    return {name: name for name in own}


def timm_names(backbone: Named, own: Iterable[str]) -> dict[str, str]:
    """Our key -> the key of timm's classifier of that name.

    Raises:
        UserError: timm has no such network.
    """
    model = backbone.kwargs.get("model", backbone.name)
    if not timm.is_model(model):
        raise UserError(f"layout timm: timm has no {_shown(backbone)}; try torchvision")
    with torch.device("meta"):
        theirs = timm.create_model(model).state_dict()
    # timm's feature extractors write stages_0 for stages.0.
    flat = {name.replace(".", "_"): name for name in theirs}
    return {name: flat[name.replace(".", "_")] for name in own}


def _shown(backbone: Named) -> str:
    return str(backbone.kwargs.get("model", backbone.name))
