"""`python -m poserelay import-weights`: other people's weights as a hand-off file, strictly and without their code."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .backbones import BACKBONES
from .checkpoint import describe, write_export
from .command import to_plain
from .config import ImportConfig, InputConfig, ModelConfig, Named
from .errors import UserError
from .keypoints import Skeleton, load_skeleton
from .layouts import LAYOUTS, deduce_backbone, recognise, summary
from .model import build_backbone, build_model
from .run import file_sha256
from .unpickling import read_pickled

# The skeletons of the published pose models; other numbers of joints are told by --skeleton.
SKELETONS = {17: "coco17", 16: "mpii16"}
SHOWN = 6


@dataclass(frozen=True)
class Imported:
    """Foreign weights under the names of a hand-off file."""

    layout: str
    tensors: dict[str, Tensor]
    """`backbone.*`, and `head.*` of a pose model."""
    model: ModelConfig
    skeleton: Skeleton | None
    """Of a pose model."""
    dropped: Counter[str]
    """How many keys were left out, by the layout's rule."""
    uncounted: int
    """How many `num_batches_tracked` the file lacks, all of them 0 here."""


def main(config: ImportConfig) -> None:
    """Write the hand-off file and say what was taken."""
    path, out = Path(config.weights), Path(config.out)
    if os.path.lexists(out):
        raise UserError(f"out {out}: is already there; name a new file")
    state, marks = read_weights(path)
    found = convert(state, path, config, marks)
    for name, value in found.tensors.items():
        _check_values(value, name, path)
    described = describe(
        stage="import",
        method=found.layout,
        model=to_plain(found.model),
        skeleton=found.skeleton,
        config={"layout": found.layout, "source_sha256": file_sha256(path)},
        upstream=None,
        metrics={},
    )
    write_export(out, found.tensors, described)
    print(report(found, config))


def report(found: Imported, config: ImportConfig) -> str:
    """What was taken from the file, as text."""
    crop = found.model.input
    backbone = found.model.backbone
    lines = [
        f"layout       {found.layout}" + (" (recognised by its keys)" if config.layout == "auto" else ""),
        f"backbone     {backbone.kwargs.get('model', backbone.name)}",
        f"input        {crop.height} x {crop.width}, {crop.color}, mean {list(crop.mean)}, std {list(crop.std)}",
        f"tensors      {len(found.tensors)} taken, {found.dropped.total()} left out"
        + "".join(f", {start}* {count}" for start, count in found.dropped.items()),
    ]
    if found.model.head and found.skeleton:
        joints = f"{len(found.skeleton.joints)} joints of {found.skeleton.name}"
        lines.insert(2, f"head         {found.model.head.name}, {joints}")
    if found.uncounted:
        lines.append(f"not in file  {found.uncounted} num_batches_tracked (torch before 0.4.1 wrote none), taken as 0")
    return "\n".join([*lines, f"wrote        {config.out}"])


def read_weights(path: Path) -> tuple[dict[str, Any], frozenset[str]]:
    """The state dict of a .pth, .ckpt or .safetensors file, and the names of what lies beside it.

    `module.` and `_orig_mod.` are stripped where all keys have them. Values that are no tensors stay: a key may be left
    out by its layout.

    Raises:
        UserError: no such file, not a file of weights, one of our own hand-off files, or one without tensors.
    """
    if not path.is_file():
        raise UserError(f"weights {path}: no such file")
    try:
        saved: Any = _read_safetensors(path) if _is_safetensors(path) else read_pickled(path)
    except OSError as error:
        raise UserError(f"weights {path}: cannot be read: {error.strerror}") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path}: holds no dict of tensors (a whole pickled network?); save its state_dict() instead")
    marks = frozenset(str(key) for key in saved)
    inner = (saved[name] for name in ("state_dict", "model") if isinstance(saved.get(name), dict))
    state = next((part for part in inner if _holds_tensors(part)), saved)
    if not _holds_tensors(state):
        raise UserError(f"{path}: holds no weights, only {', '.join(sorted(marks)[:SHOWN]) or 'an empty dict'}")
    if strange := [key for key in state if not isinstance(key, str)]:
        raise UserError(f"{path}: a key of the state dict is {strange[0]!r}, expected a name")
    return _without_wrappers(dict(state)), marks


def convert(
    state: Mapping[str, Any], source: Path, config: ImportConfig, marks: frozenset[str] = frozenset()
) -> Imported:
    """Rename the keys of a state dict and check them against the network that they are for.

    source: the file, for messages; marks: what lay beside the state dict.

    Raises:
        UserError: unknown or ambiguous layout, a backbone that is not supported or not the one named, another number of
            joints than the skeleton's, and every missing, unexpected, misshapen or contradictory key.
    """
    layout = _layout(state, source, config.layout, marks)
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    for key, value in state.items():
        name, _ = _rename(key, layout)
        if name and isinstance(value, Tensor):
            part, _, rest = name.partition(".")
            parts[part][rest] = value
    if not parts["backbone"]:
        raise UserError(f"{source}: no key fits the layout {layout}: {summary(state)}; name another --layout")
    backbone = _backbone({name: value.shape for name, value in parts["backbone"].items()}, source, config.backbone)
    head, skeleton = None, None
    if any((new or "").startswith("head.") for _, new in LAYOUTS[layout].renames):
        skeleton = _skeleton(parts["head"], source, config.skeleton)
        head = _head(parts["head"], backbone, source)
    elif config.skeleton != "auto":
        raise UserError(f"skeleton {config.skeleton!r}: {layout} files hold a backbone without joints; leave it out")
    crop = _input(config, layout, skeleton)
    model = ModelConfig(backbone, head, skeleton=skeleton.name if skeleton else "auto", input=crop)
    own = _expected(model, skeleton)
    names, dropped = _names(state, layout, own)
    tensors, uncounted, problems = _match(state, names, own)
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(
            f"{source}: does not hold exactly a {backbone.kwargs.get('model', backbone.name)} in the layout {layout}: "
            f"{'; '.join(problems[:SHOWN])}{more}; name another --layout or --backbone, or fetch the file again"
        )
    return Imported(layout, tensors, model, skeleton, dropped, uncounted)


def _check_values(value: Tensor, key: str, source: Path) -> None:
    """Raise UserError for a tensor that holds no finite numbers to copy."""
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise UserError(f"{source}: {key} is a sparse, quantised or empty tensor; save a plain state dict")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise UserError(f"{source}: {key} holds NaN or infinity: its training failed; give another file")


def _names(keys: Iterable[str], layout: str, own: Mapping[str, Tensor]) -> tuple[dict[str, str], Counter[str]]:
    """The name here of each key (empty where no rule has one), and how many keys each rule left out."""
    # timm's feature extractors write stages_0 for stages.0.
    flat = {name.replace(".", "_"): name for name in own}
    names: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    for key in keys:
        name, start = _rename(key, layout)
        if name is not None:
            names[key] = flat.get(name.replace(".", "_"), name)
        elif start is None:
            names[key] = ""
        elif f"backbone.{key}" in own:
            # A rule of timm's layout for other networks than this one.
            names[key] = f"backbone.{key}"
        else:
            dropped[start] += 1
    return names, dropped


def _match(
    state: Mapping[str, Any], names: Mapping[str, str], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int, list[str]]:
    """The tensors of `state` under `names`; how many counters it lacks; every way in which it is not exactly `own`."""
    sources: dict[str, str] = {}
    problems = []
    for key, name in names.items():
        if name not in own:
            problems.append(f"unexpected {key}")
        elif problem := _misfit(key, state[key], own[name]):
            problems.append(problem)
        elif name in sources and not _same(state[sources[name]], state[key]):
            problems.append(f"{key} differs from {sources[name]}")
        sources.setdefault(name, key)
    tensors = {name: state[key] for name, key in sources.items()}
    counters = [name for name in own if name.endswith("num_batches_tracked")]
    uncounted = [] if any(name in tensors for name in counters) else counters
    tensors.update({name: torch.zeros((), dtype=torch.int64) for name in uncounted})
    return tensors, len(uncounted), [*(f"missing {name}" for name in own if name not in tensors), *problems]


def _layout(state: Mapping[str, Any], source: Path, wanted: str, marks: frozenset[str]) -> str:
    if wanted != "auto":
        return wanted
    found = recognise(state, marks)
    if len(found) == 1:
        return found[0]
    what = f"fits several layouts ({', '.join(found)})" if found else "is of no layout known here"
    raise UserError(f"{source}: {what}; its keys are {summary(state)}; name its --layout: {', '.join(LAYOUTS)}")


def _rename(key: str, layout: str) -> tuple[str | None, str | None]:
    """The key's name here, or None, and the start by which a rule of the layout took it, or None."""
    for start, new in LAYOUTS[layout].renames:
        if key.startswith(start):
            # torch.compile also wraps parts of a network.
            rest = key.removeprefix(start).removeprefix("_orig_mod.")
            return (None if new is None else new + rest), start
    return None, None


def _backbone(shapes: Mapping[str, torch.Size], source: Path, wanted: str) -> Named:
    deduced, found = deduce_backbone(shapes)
    named = {name: Named(name) for name in BACKBONES if name != "timm"}
    if wanted == "auto":
        if deduced is None:
            raise UserError(
                f"{source}: an unsupported backbone: {found}; known by their keys are {', '.join(named)}; "
                "name another one of timm's with --backbone"
            )
        return named[deduced]
    if wanted in named:
        if deduced not in (None, wanted):
            raise UserError(f"backbone {wanted!r}: {source} holds a {deduced} ({found}); leave the field out")
        return named[wanted]
    if not timm.is_model(wanted):
        raise UserError(f"backbone {wanted!r} is not known; choose from {', '.join(named)} or timm.list_models()")
    return Named("timm", {"model": wanted})


def _skeleton(head: Mapping[str, Tensor], source: Path, wanted: str) -> Skeleton:
    """The joints of the head's last layer."""
    rows = [len(value) for name, value in head.items() if name.startswith("final_layer.") and value.ndim]
    if not rows:
        raise UserError(f"{source}: missing final_layer.weight and final_layer.bias of a heatmap head")
    if wanted == "auto" and rows[0] not in SKELETONS:
        raise UserError(f"{source}: has {rows[0]} joints; say which with --skeleton (a packaged name or a YAML file)")
    skeleton = load_skeleton(SKELETONS[rows[0]] if wanted == "auto" else wanted)
    if rows[0] != len(skeleton.joints):
        raise UserError(
            f"skeleton {skeleton.name}: has {len(skeleton.joints)} joints and {source} has {rows[0]}; name another"
        )
    return skeleton


def _head(head: Mapping[str, Tensor], backbone: Named, source: Path) -> Named:
    """The head that has these tensors."""
    if backbone.name.startswith("hrnet"):
        return Named("hrnet")
    # In the Sequential of deconvolution, batch norm and ReLU; [in, out, kernel, kernel].
    deconvolutions = {
        int(name.split(".")[1]): value.shape
        for name, value in head.items()
        if name.startswith("deconv_layers.") and value.ndim == 4
    }
    kernels = sorted({shape[2] for shape in deconvolutions.values()})
    if kernels not in ([2], [3], [4]):
        raise UserError(f"{source}: deconvolutions with kernels {kernels}; supported are 2, 3 or 4 for all of them")
    channels = [shape[1] for _, shape in sorted(deconvolutions.items())]
    return Named("simple", {"deconv_channels": channels, "deconv_kernel": kernels[0]})


def _input(config: ImportConfig, layout: str, skeleton: Skeleton | None) -> InputConfig:
    """What the network sees: the sizes of the published models where the user names none."""
    given = config.input
    color = LAYOUTS[layout].color if config.color == "auto" else config.color
    height, width = (224, 224) if skeleton is None else (256, 256) if skeleton.name == "mpii16" else (256, 192)
    return InputConfig(given.height or height, given.width or width, given.mean, given.std, color, given.alignment)


def _expected(model: ModelConfig, skeleton: Skeleton | None) -> dict[str, Tensor]:
    with torch.device("meta"):
        if model.head:
            return build_model(model, skeleton).state_dict()
        return {f"backbone.{name}": value for name, value in build_backbone(model.backbone).state_dict().items()}


def _same(one: Any, other: Any) -> bool:
    return (
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(_bits(one), _bits(other))
    )


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _misfit(key: str, value: Any, own: Tensor) -> str | None:
    if not isinstance(value, Tensor):
        return f"{key} is no tensor"
    if value.shape != own.shape:
        return f"{key} is {list(value.shape)}, expected {list(own.shape)}"
    if value.is_floating_point() != own.is_floating_point():
        return f"{key} is {str(value.dtype).removeprefix('torch.')}, expected {str(own.dtype).removeprefix('torch.')}"
    return None


def _holds_tensors(part: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in part.values())


def _without_wrappers(state: dict[str, Any]) -> dict[str, Any]:
    for wrapper in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def _is_safetensors(path: Path) -> bool:
    """By its content: the length of a JSON header, then the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if "poserelay" in (file.metadata() or {}):
                raise UserError(f"{path}: is a hand-off file already; give it to --init_from or --checkpoint as it is")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors ({error}); fetch the file again") from error
