"""All reading and writing of weights: the hand-off file between stages and the resume files of one stage.

A hand-off file is safetensors with one metadata key, `poserelay` (JSON), that rebuilds the model from the file alone.
Nothing here unpickles a foreign object: hand-off files hold no pickle, resume files are read with `weights_only=True`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import UserError
from .keypoints import Skeleton, match_joints
from .run import UNCOMPARED, file_sha256, recorded_exports, write_atomic


class StageState(Protocol):
    """A stage's own dataclass of what changes during training."""

    world: int
    samples: int


State = TypeVar("State", bound=StageState)

FORMAT = 1

AUXILIARY = "auxiliary."
"""What the names of CCM's auxiliary decoder begin with in its head."""

# A pose head reads HRNet's top branch alone and drops the rows of the last fusion that feed the others.
UNUSED_FUSE_ROWS = re.compile(r"stage4\.2\.fuse_layers\.[123]\.")


def write_export(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a hand-off file atomically; `metadata` as made by `describe`. Equal runs give equal bytes."""
    plain = {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in sorted(plain.items())}
    text = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
    write_atomic(path, lambda temporary: _save(save_file, tensors, temporary, metadata={"poserelay": text}))


def describe(
    *,
    stage: str,
    method: str,
    model: Mapping[str, Any],
    skeleton: Skeleton | None,
    config: Mapping[str, Any],
    upstream: Mapping[str, Any] | None,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Metadata of a hand-off file. Paths, times and the run directory are left out, so that equal runs agree."""
    backbone = {"name": model["backbone"]["name"], "kwargs": dict(model["backbone"]["kwargs"])}
    backbone["kwargs"].pop("pretrained", None)
    unstored = {*UNCOMPARED, "data", "init_from", "model"}
    return {
        "stage": stage,
        "method": method,
        "backbone": backbone,
        "head": model.get("head"),
        "refiner": model.get("refiner"),
        "skeleton": skeleton.to_dict() if skeleton else None,
        "input": model["input"],
        "config": {name: value for name, value in config.items() if name not in unstored},
        "upstream": upstream,
        "metrics": dict(metrics),
    }


def read_export(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a hand-off file.

    Raises UserError when it is absent, truncated, a pickle, or safetensors that no stage of ours wrote.
    """
    with _opened(Path(path)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _described(file, Path(path))  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the export/model.safetensors of an earlier run")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a hand-off file ({error}); give the export/model.safetensors of an earlier run "
            "(a .pth file is never unpickled here; `python -m poserelay import-weights` turns it into a hand-off file)"
        ) from error


def _described(file: Any, path: Path) -> dict[str, Any]:
    metadata = (file.metadata() or {}).get("poserelay")
    if metadata is None:
        raise UserError(f"{path}: safetensors without the metadata key 'poserelay'; give a file that a stage exported")
    try:
        described = json.loads(metadata)
        found = described["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: the metadata 'poserelay' is damaged; export the file again") from error
    if found != FORMAT:
        raise UserError(f"{path}: hand-off format {found!r}, this version reads {FORMAT}; export it with this version")
    return described


def verify_handoff(path: str | Path) -> str:
    """The sha256 of a hand-off file, to be asked for before a stage reads or writes anything.

    A file RUN/export/NAME.safetensors must be what the run RUN recorded of it when it finished. Of other files,
    imported weights say, nothing is recorded.

    Raises:
        UserError: no such file, its run has not finished, or the file has changed since.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path)).parent
    run = folder.parent
    in_run = path.suffix == ".safetensors" and folder.name == "export"
    if not in_run or not any((run / name).exists() for name in ("config.yaml", "status.json")):
        with _opened(path):
            return file_sha256(path)
    exports = recorded_exports(run)
    if exports is None:
        damaged = (run / "done.json").exists()
        problem = f"done.json of {run} is damaged" if damaged else f"the run {run} has not finished{_state(run)}"
        raise UserError(f"{path}: {problem}; start that run again to go on, and this when it is done")
    if path.name not in exports:
        raise UserError(f"{path}: not a file that the run {run} wrote; it has {', '.join(sorted(exports))}")
    sha256 = file_sha256(path) if path.is_file() else ""
    if sha256 != exports[path.name]:
        problem = "has changed" if sha256 else "is gone"
        raise UserError(f"{path}: {problem} since the run {run} finished; start that run again, which writes it anew")
    return sha256


def _state(run: Path) -> str:
    """What the status.json of a run says, in brackets; nothing where there is none, or a damaged one."""
    try:
        status = json.loads((run / "status.json").read_text(encoding="utf-8"))
        return f" ({status['state']}, step {status['step']} of {status['total']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def upstream_of(path: str | Path) -> dict[str, Any]:
    """What a later stage records of the file it starts from: its stage and sha256.

    Raises UserError as `verify_handoff` and `read_export`.
    """
    sha256 = verify_handoff(path)
    with _opened(Path(path)) as file:
        return {"stage": _described(file, Path(path))["stage"], "sha256": sha256}


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` into `module`; UserError naming every missing, unexpected or misshapen key."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{source}: does not fit this model: {'; '.join(problems[:4])}{more}; use the same backbone, head and "
            "refiner, with the same kwargs"
        )
    module.load_state_dict(dict(state))


@dataclass(frozen=True)
class InitReport:
    """What `init_from` took from a hand-off file."""

    stage: str
    head_copied: bool
    joints_initialised: tuple[str, ...]
    """Joints whose part of the head is not in the file and starts from the initialisation."""
    auxiliary_initialised: bool = False
    """Whether the auxiliary decoder, which the file lacks, starts from the initialisation."""
    refiner_initialised: bool = False
    """Whether SCIO's networks, which the file lacks or has for other groups, start from the initialisation."""

    refiner_left: bool = False
    """Whether the file has networks of a refiner, and the model none."""

    def lines(self, path: str | Path) -> list[str]:
        """What a stage says at its start of the file that it starts from."""
        told = [f"not in {path}, initialised: {'; '.join(self.news)}"] if self.news else []
        return told + [f"of {path} left out: the networks of model.refiner"] * self.refiner_left

    @property
    def news(self) -> list[str]:
        """What starts from the initialisation, in words."""
        joints = ["joints " + ", ".join(self.joints_initialised)] if self.joints_initialised else []
        refiner = ["the networks of model.refiner"] * self.refiner_initialised
        return joints + ["the auxiliary decoder"] * self.auxiliary_initialised + refiner


def init_from(model: nn.Module, path: str | Path) -> InitReport:
    """Start a pose model (`.backbone`, `.head`, `.refiner`, `.skeleton`, `.config`) from an earlier stage's file.

    A backbone hand-off loads exactly its backbone. A pose model's also loads the head; where the skeletons differ, what
    belongs to a joint (the head's `joint_axes`) is copied by joint name. CCM's auxiliary decoder, which only training
    has, may be in one of the two alone: it is left, or starts from the initialisation. So are SCIO's networks, which
    also start anew where the skeletons' groups differ. Any other missing or unexpected key is a UserError.
    """
    state, described = read_export(path)
    backbone: Any = model.backbone
    head: Any = model.head
    config: Any = model.config
    skeleton: Any = model.skeleton
    if described["backbone"]["name"] != config.backbone.name:
        found = described["backbone"]["name"]
        raise UserError(f"{path}: holds a {found} backbone, the config names {config.backbone.name}; use the same one")
    parts = {
        part: {n.removeprefix(f"{part}."): v for n, v in state.items() if n.startswith(f"{part}.")}
        for part in ("backbone", "head", "refiner")
    }
    strays = [name for name in state if not name.startswith(("backbone.", "head.", "refiner."))]
    if strays:
        raise UserError(f"{path}: unexpected {strays[0]}; a hand-off holds backbone.*, head.* and refiner.* only")
    for name in ("color", "mean", "std"):
        found, wanted = described["input"][name], getattr(config.input, name)
        if list(found) != list(wanted):
            raise UserError(
                f"{path}: expects pictures with input.{name} {found}, the config has {wanted}; set --model.input.{name}"
            )
    own = backbone.state_dict()
    kept = {name: value for name, value in parts["backbone"].items() if name in own or not UNUSED_FUSE_ROWS.match(name)}
    if described["skeleton"] is None:  # a backbone alone, or with a classifier
        load_exactly(backbone, kept, path)
        return InitReport(described["stage"], head_copied=False, joints_initialised=())
    if config.head is None or described["head"]["name"] != config.head.name:
        found = described["head"]["name"]
        raise UserError(
            f"{path}: holds a {found} head, the config names {config.head and config.head.name}; use the same head, or "
            "start from a backbone alone: the file that this model itself started from or, but for HRNets, its own by "
            "`python -m poserelay export-weights` and `import-weights`"
        )
    given, own_head = parts["head"], head.state_dict()
    trained, wanted = (any(name.startswith(AUXILIARY) for name in names) for names in (given, own_head))
    if trained and not wanted:
        given = {name: value for name, value in given.items() if not name.startswith(AUXILIARY)}
    source = Skeleton.from_dict(described["skeleton"])
    copied, missing = parts_by_joint(given, own_head, head.joint_axes, source, skeleton)
    if wanted and not trained:
        copied |= {name: value for name, value in own_head.items() if name.startswith(AUXILIARY)}
    load_exactly(backbone, kept, path)
    load_exactly(head, copied, path)
    refiner: Any = model.refiner
    same_groups = bool(parts["refiner"]) and source.groups == skeleton.groups
    if refiner is not None and same_groups:
        load_exactly(refiner, parts["refiner"], path)
    return InitReport(
        described["stage"],
        head_copied=True,
        joints_initialised=missing,
        auxiliary_initialised=wanted and not trained,
        refiner_initialised=refiner is not None and not same_groups,
        refiner_left=refiner is None and bool(parts["refiner"]),
    )


def parts_by_joint(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    axes: Mapping[str, int],
    source: Skeleton,
    target: Skeleton,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Reorder what belongs to a joint from the joints of `source` to those of `target`, by joint name.

    axes: of the tensors that hold joints, the dimension that does (`joint_axes` of a head). Returns the state and the
    joints of `target` that `source` lacks: their parts are `own`'s, the initialisation.
    """
    if source.joints == target.joints:
        return dict(state), ()
    indices = match_joints(source.joints, target.joints)
    result = dict(state)
    for name in state.keys() & own.keys() & axes.keys():
        # The joints come first, and the other dimensions follow: [K, a joint's part of the dimension, ...].
        found, fresh = (tensor.cpu().movedim(axes[name], 0) for tensor in (state[name], own[name]))
        each = len(fresh) // len(target.joints)
        # another width is told by name when the whole head is compared
        if found.shape == (each * len(source.joints), *fresh.shape[1:]):
            found, fresh = (tensor.unflatten(0, (-1, each)) for tensor in (found, fresh))
            parts = [fresh[row] if index is None else found[index] for row, index in enumerate(indices)]
            result[name] = torch.cat(parts).movedim(0, axes[name])
    return result, tuple(joint for joint, index in zip(target.joints, indices, strict=True) if index is None)


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, fabric: Fabric, upstream: Mapping[str, Any] | None, state: Any
) -> dict[str, Any]:
    """Everything that changes during training, for `save_resume`; `state` is the stage's own dataclass."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),
        "upstream": dict(upstream) if upstream else None,
        "state": dataclasses.asdict(state),
    }


def restore_training(
    saved: Mapping[str, Any] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    fabric: Fabric,
    upstream: Mapping[str, Any] | None,
    state: State,
) -> State:
    """Put a `training_state` back and return the stage's state in it, or `state` unchanged where nothing was saved.

    Raises UserError when a file of `upstream` is no longer the one that the run started from, and when another
    number of processes (`state.world`) or of samples would make other batches.
    """
    if saved is None:
        return state
    if saved["upstream"] != (dict(upstream) if upstream else None):
        fields = "init_from or teacher_from" if "teacher_sha256" in (upstream or {}) else "init_from"
        raise UserError(
            f"{fields}: the file has changed since this run started from it; put it back, name a new run_dir, or "
            "remove this run to train it anew"
        )
    if saved["state"]["world"] != state.world:
        raise UserError(
            f"resume: this run was started with {saved['state']['world']} processes and now has {state.world}, whose "
            "batches differ; start the same number, or name a new run_dir"
        )
    if saved["state"]["samples"] != state.samples:
        raise UserError(
            f"resume: this run was started on {saved['state']['samples']} samples and now finds {state.samples}; "
            "put the data back as it was, or name a new run_dir"
        )
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    fabric.strategy.precision.load_state_dict(saved["precision"])
    return type(state)(**saved["state"])


def save_resume(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `folder/last.pt`, keeping the one before it as `previous.pt`: at every moment one of them is whole."""
    last = folder / "last.pt"

    def write(temporary: Path) -> None:
        _save(torch.save, dict(state), temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if last.exists():
            os.replace(last, folder / "previous.pt")

    write_atomic(last, write)


def _save(function: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Call a writer of torch or safetensors, whose errors about the disk come as other types, as OSError."""
    try:
        function(*arguments, **options)
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"the disk took only a part ({str(error).splitlines()[0]})") from error


def save_best(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write `folder/best.pt`, the weights to export when a later step is not better."""
    write_atomic(folder / "best.pt", lambda temporary: _save(torch.save, dict(state), temporary))


def load_best(folder: Path) -> dict[str, Tensor]:
    """Weights written by `save_best`."""
    return torch.load(folder / "best.pt", map_location="cpu", weights_only=True)


def load_resume(folder: Path) -> dict[str, Any] | None:
    """State of the newest whole resume file of `folder`, on the CPU, or None where there is none.

    Raises UserError when files are there and none can be read.
    """
    paths = [path for path in (folder / "last.pt", folder / "previous.pt") if path.exists()]
    reasons = []
    for path in paths:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reasons.append(f"{path.name}: {type(error).__name__}")
    if reasons:
        raise UserError(f"{folder}: no resume file is whole ({'; '.join(reasons)}); start in a new folder")
    return None
