"""What a report tells of runs: found, read, named and grouped, whatever state they are in. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from poserelay.errors import UserError
from poserelay.run import UNCOMPARED, read_config, read_metrics

BASELINE = "mean pose "
OWN = "own validation"
HAND_OFF = Path("export") / "model.safetensors"
NOT_METRICS = ("kind", "step", "attempt", "epoch", "seconds")
"""Of the rows of metrics.jsonl."""
UNCOMPARABLE_NOT = ("baseline",)
"""Fields of a protocol that the metrics of a model do not depend on."""


class Series(NamedTuple):
    """What a run logged of one quantity."""

    steps: list[float]
    """Optimiser steps since the start of the run."""
    values: list[float]


@dataclass(frozen=True)
class Measured:
    """What one evaluation of a run found."""

    name: str
    """Of the evaluation, where its run has several; else empty."""
    source: Literal["evaluation", "own validation"]
    folder: Path | None
    """Where metrics.json lies; None of a training's own validation."""
    metrics: dict[str, float | None]
    """None where a metric had nothing to measure."""
    protocol: dict[str, Any]
    joints: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Joint to its `joint_accuracy.joint_means`."""


@dataclass(frozen=True)
class RunRecord:
    """A run, or an evaluation whose run is not known."""

    name: str
    """No other run of the report has it."""
    path: str
    """As it was given, or below what was given."""
    folder: Path | None
    """The run directory; None of an evaluation alone."""
    stage: str
    state: str
    """done, unfinished (and why), or evaluation alone."""
    steps: tuple[int, int] | None
    """Made and planned."""
    date: float | None
    """Of its last sign of life, seconds since 1970."""
    config: dict[str, Any]
    """Dotted field to value; empty where it cannot be read."""
    made: dict[str, Any]
    """versions, git_commit, attempts, threads, seconds: those that are known."""
    curves: dict[str, Series]
    """loss, and what was validated: `validation AP`."""
    measured: list[Measured]
    problems: list[str]
    group: str
    """Runs that differ in their seed alone have the same."""
    title: str
    """Of the group; no other one has it."""
    long_title: str
    """With fields that `title` does without."""


class _Launch(NamedTuple):
    root: Path
    jobs: dict[str, dict[str, Any]]
    evaluated: dict[str, str]
    """Evaluation job to the one run whose hand-off file it took; those of several or of a foreign one are not here."""


_Launches = dict[Path, _Launch | None]
"""Those that have been read, by their folder."""


class _Place(NamedTuple):
    """Where a run lies: its directory, and evaluations that lie elsewhere; what the launch knows of it."""

    folder: Path | None
    evaluations: tuple[Path, ...]
    path: str
    launch: _Launch | None
    job: str | None


def read_runs(paths: Sequence[str]) -> list[RunRecord]:
    """The runs that `paths` name, in their order, none twice: run directories, folders of an evaluation, launches.

    Raises UserError for a path that is none of these; what is damaged in one is told in its `problems`.
    """
    places: dict[Path, _Place] = {}
    launches: _Launches = {}
    for path in paths:
        for place in _places(path, launches):
            key = place.folder or place.evaluations[0]
            known = places.get(key)
            if known is not None:
                more = tuple(folder for folder in place.evaluations if folder not in known.evaluations)
                place = known._replace(evaluations=known.evaluations + more)
            places[key] = place
    folders = [place.folder or place.evaluations[0] for place in places.values()]
    names = unique_names(folders, [place.job.count("/") + 1 if place.job else 1 for place in places.values()])
    records = [_read(place, name) for place, name in zip(places.values(), names, strict=True)]
    return _titled(_without_repeats(records))


def unique_names(folders: Sequence[Path], least: Sequence[int]) -> list[str]:
    """For each of some different folders the fewest of its last parts, but `least`, that no other one ends with."""
    names = []
    for folder, length in zip(folders, least, strict=True):
        own, others = folder.parts, [other.parts for other in folders if other != folder]
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        names.append("/".join(own[-length:]))
    return names


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted field and value of a nested configuration; a part without fields has none."""
    for name, value in config.items():
        dotted = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            yield from flat(value, dotted)
        else:
            yield dotted, value


def canonical(value: Any) -> str:
    """A text that equal values have in common."""
    return json.dumps(value, sort_keys=True, default=str)


def comparable(protocol: Mapping[str, Any]) -> str:
    """What two protocols have in common by which metrics are to be compared."""
    kept = {name: value for name, value in protocol.items() if name not in UNCOMPARABLE_NOT and value is not None}
    return canonical(kept)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object without NaN or Infinity. Raises UserError that tells what is wrong with the file."""

    def refuse(constant: str) -> float:
        raise ValueError(f"holds {constant}, which is no JSON")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"damaged ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(value, dict):
        raise UserError(f"damaged (holds a {type(value).__name__}, expected an object)")
    return value


def reason(error: Exception) -> str:
    """Why a file could not be taken apart, in a few words."""
    if isinstance(error, KeyError):
        return f"lacks {error.args[0]!r}"
    return str(error) if isinstance(error, ValueError) else "a value of another kind than expected"


def _places(given: str, launches: _Launches) -> list[_Place]:
    path = Path(os.path.abspath(os.path.expanduser(given)))
    if path.is_file() and path.parts[-2:] == HAND_OFF.parts:
        path = path.parent.parent
    if path.is_file() and path.name == "metrics.json":
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{given}: no such folder; give a run directory, the folder of an evaluation, or a launch's")
    if (path / "launch" / "plan.json").exists():
        launch = _read_launch(path, launches)
        if launch is None:
            raise UserError(f"{path / 'launch' / 'plan.json'}: not the plan of a launch; name its runs instead")
        return _places_of_launch(launch, given)
    if (path / "config.yaml").exists():
        return [_place_of_run(path, given, launches)]
    if not any((path / name).exists() for name in ("metrics.json", "diagnosis.json", "predictions.json")):
        raise UserError(
            f"{given}: holds no config.yaml, metrics.json or launch/plan.json; give a run directory, the folder of an "
            "evaluation, or a launch's"
        )
    if path.name == "evaluation" and (path.parent / "config.yaml").exists():
        return [_place_of_run(path.parent, _as_given(path.parent, given), launches)]
    launch, job = _launch_of(path, launches)
    if launch and job in launch.evaluated:
        run = launch.evaluated[job]
        return [_Place(launch.root / run, (path,), _as_given(launch.root / run, given), launch, run)]
    return [_Place(None, (path,), given, launch, job)]


def _as_given(path: Path, given: str) -> str:
    """A path related to a given one, absolute or relative as that one is."""
    return str(path) if os.path.isabs(given) else os.path.relpath(path)


def _place_of_run(folder: Path, given: str, launches: _Launches) -> _Place:
    own = (folder / "evaluation",) if (folder / "evaluation").is_dir() else ()
    launch, job = _launch_of(folder, launches)
    its = [name for name, run in launch.evaluated.items() if run == job] if launch else []
    return _Place(folder, own + tuple(launch.root / name for name in its if launch), given, launch, job)


def _places_of_launch(launch: _Launch, given: str) -> list[_Place]:
    """Every run of it that has begun, then its evaluations of something else."""
    runs = [name for name in launch.jobs if (launch.root / name / "config.yaml").exists()]
    known: _Launches = {launch.root: launch}
    places = [_place_of_run(launch.root / name, f"{given.rstrip('/')}/{name}", known) for name in runs]
    taken = {folder for place in places for folder in place.evaluations}
    others = [name for name, job in launch.jobs.items() if job.get("command") == "evaluation test"]
    folders = [(name, launch.root / name) for name in others if (launch.root / name / "metrics.json").exists()]
    places += [
        _Place(None, (folder,), f"{given.rstrip('/')}/{name}", launch, name)
        for name, folder in folders
        if folder not in taken
    ]
    if not places:
        raise UserError(f"{given}: no job of this launch has begun; report it later")
    return places


def _read_launch(root: Path, launches: _Launches) -> _Launch | None:
    if root not in launches:
        try:
            jobs = {str(job["name"]): dict(job) for job in read_object(root / "launch" / "plan.json")["jobs"]}
            runs = {name: _evaluated_by(root, jobs, name) for name in jobs}
            launches[root] = _Launch(root, jobs, {name: run for name, run in runs.items() if run is not None})
        except (UserError, KeyError, TypeError, ValueError):
            launches[root] = None
    return launches[root]


def _launch_of(folder: Path, launches: _Launches) -> tuple[_Launch | None, str | None]:
    """The launch that made a folder, STAGE or STAGE/ELEMENT of it, and the job's name."""
    for root in folder.parents[:2]:
        name = folder.relative_to(root).as_posix()
        launch = _read_launch(root, launches) if (root / "launch" / "plan.json").exists() else None
        if launch and name in launch.jobs:
            return launch, name
    return None, None


def _evaluated_by(root: Path, jobs: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
    """The one run whose hand-off file a job took, as its configuration says; None where it took several or none."""
    if jobs[name].get("command") != "evaluation test":
        return None
    waits = [str(other) for other in jobs[name].get("upstream") or [] if (root / str(other) / "config.yaml").exists()]
    try:
        checkpoint = read_config(root / "launch" / "jobs" / name)["checkpoint"]
    except (UserError, KeyError):
        return waits[0] if len(waits) == 1 else None
    file = Path(checkpoint if isinstance(checkpoint, str) else "")
    return next((other for other in waits if file.is_relative_to(str(jobs[other]["folder"]))), None)


def _read(place: _Place, name: str) -> RunRecord:
    problems: list[str] = []

    def attempt(what: str, read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except UserError as error:
            problems.append(f"{what}: {error}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{what}: damaged ({reason(error)})")
        return otherwise

    folder = place.folder
    done: dict[str, Any] = {}
    status: dict[str, Any] = {}
    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    if folder is not None:
        config = attempt("config.yaml", lambda: read_config(folder), {})
        rows = attempt("metrics.jsonl", lambda: read_metrics(folder / "metrics.jsonl"), [])
        for file, content in (("done.json", done), ("status.json", status)):
            if (folder / file).exists():
                content |= attempt(file, lambda file=file: read_object(folder / file), {})
    measured = []
    for evaluation in place.evaluations:
        where = f"{evaluation.name}/metrics.json" if folder and evaluation.parent == folder else f"{evaluation}"
        if not (evaluation / "metrics.json").exists():
            problems.append(f"{where}: not measured yet; `python -m evaluation test --out {evaluation}` writes it")
            continue
        found = attempt(where, lambda evaluation=evaluation: _read_evaluation(evaluation), None)
        measured += [] if found is None else [found]
    if len(measured) > 1:
        names = unique_names([one.folder for one in measured if one.folder], [1] * len(measured))
        measured = [replace(one, name=its) for one, its in zip(measured, names, strict=True)]
    if not place.evaluations and done.get("metrics"):
        found = attempt("done.json", lambda: _own_validation(done), None)
        measured += [] if found is None else [found]
    group, title, long_title = _group(place, config, name)
    started = next((row for row in rows if row.get("kind") == "start"), {})
    made = {key: done[key] for key in ("versions", "git_commit", "attempts", "threads", "seconds") if key in done}
    made.setdefault("versions", started.get("versions"))
    return RunRecord(
        name=name,
        path=place.path,
        folder=folder,
        stage=_stage(folder, done, status) if folder else "evaluation",
        state=_state(folder, done, status, config, rows),
        steps=_steps(status, rows),
        date=_number(status.get("heartbeat")),
        config=dict(flat(config)),
        made=made if isinstance(made["versions"], dict) else {**made, "versions": {}},
        curves=_curves(rows),
        measured=measured,
        problems=problems,
        group=group,
        title=title,
        long_title=long_title,
    )


def _read_evaluation(folder: Path) -> Measured:
    content = read_object(folder / "metrics.json")
    joints = content.get("joints") or {}
    means = {str(joint): {key: _metric(key, value) for key, value in its.items()} for joint, its in joints.items()}
    metrics = {name: _metric(name, value) for name, value in content["metrics"].items()}
    rank = (content.get("scores") or {}).get("spearman")
    if rank is not None:
        metrics["score-OKS Spearman"] = _metric("spearman", rank)
    return Measured("", "evaluation", folder, metrics, dict(content.get("protocol") or {}), means)


def _own_validation(done: Mapping[str, Any]) -> Measured:
    metrics = dict(done["metrics"])
    protocol = dict(metrics.pop("protocol", None) or {})
    kept = {
        name: _metric(name, value)
        for name, value in metrics.items()
        # An export's step says where it was taken, and details are not metrics.
        if name != "step" and not isinstance(value, (dict, list))
    }
    return Measured("", OWN, None, kept, protocol)


def _metric(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if _number(value) is None:
        raise ValueError(f"{name} is {value!r}, expected a number or null")
    return None if value == -1 else float(value)  # pycocotools: no person of that size


def _number(value: Any) -> float | None:
    wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    return None if wrong else float(value)


def _stage(folder: Path, done: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    """What follows `python -m` in the first line of config.yaml, or else as the run calls its stage."""
    try:
        first = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        first = ""
    match = re.match(r"# python -m (.+) --config", first)
    return match[1] if match else str(done.get("stage") or status.get("stage") or "unknown")


def _state(
    folder: Path | None,
    done: Mapping[str, Any],
    status: Mapping[str, Any],
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> str:
    if folder is None:
        return "evaluation alone"
    if done:
        return "done"
    if not rows and not status:
        return "not started" if config else "unknown"
    state, reason = str(status.get("state") or "unknown"), status.get("reason")
    return f"unfinished ({state})" if not reason else f"unfinished ({state}: {' '.join(str(reason).split())})"


def _steps(status: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    made, total = _number(status.get("step")), _number(status.get("total"))
    logged = [step for row in rows if row.get("kind") == "train" and (step := _number(row.get("step"))) is not None]
    made = max([*logged, made or 0])
    return (int(made), int(total or 0)) if logged or total else None


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Of the training its loss, of validations every number; values that are none are left out."""
    found: dict[str, Series] = {}
    for row in rows:
        step, kind = _number(row.get("step")), str(row.get("kind"))
        names = ["loss"] if kind == "train" else [] if kind == "start" else [n for n in row if n not in NOT_METRICS]
        for name in names:
            value = _number(row.get(name))
            if step is not None and value is not None and not (kind != "train" and value == -1):
                series = found.setdefault(name if kind == "train" else f"{kind} {name}", Series([], []))
                series.steps.append(step)
                series.values.append(value)
    return found


def _group(place: _Place, config: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    """What runs that differ in their seed alone have in common, and how to call them, in short and in full."""
    if place.launch and place.job:
        job = place.launch.jobs[place.job]
        axes = [
            [(name, value) for name, value in linked.items() if name.rpartition(".")[2] != "seed"]
            for linked in _axes(job)
        ]
        stage, others = str(job.get("stage")), [linked for linked in axes if linked]
        title = ", ".join([stage, *(_assigned(*linked[0]) for linked in others)])
        long_title = ", ".join([stage, *(_assigned(*each) for linked in others for each in linked)])
        seeded = len(others) < len(axes) or any(len(linked) > 1 for linked in _axes(job))
        return canonical([str(place.launch.root), stage, others, seeded or place.job]), title, long_title
    if not config or place.folder is None:
        return canonical(["alone", str(place.folder or place.evaluations[0])]), name, name
    title = without_seed(name)
    return canonical([_stage(place.folder, {}, {}), _without_seeds(config)]), title, title


def _axes(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Dotted field to value of each axis; of fields that were swept together there are several."""
    found: list[dict[str, Any]] = []
    for names, value in (job.get("axes") or {}).items():
        parts = [part.strip() for part in str(names).split(",")]
        linked = isinstance(value, list) and len(value) == len(parts) > 1
        found.append(dict(zip(parts, value, strict=True)) if linked else {str(names): value})
    return found


def _without_seeds(config: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """A configuration without seeds and without what does not matter, hand-off files as the runs that wrote them."""
    kept = {}
    for name, value in flat({name: value for name, value in config.items() if name not in UNCOMPARED}):
        if name.rpartition(".")[2] == "seed":
            continue
        if isinstance(value, str) and Path(value).parts[-2:] == HAND_OFF.parts and depth < 5:
            with contextlib.suppress(UserError):  # then it is known by its path
                value = [HAND_OFF.name, _without_seeds(read_config(Path(value).parent.parent), depth + 1)]
        kept[name] = value
    return kept


def without_seed(name: str) -> str:
    """A run's name without the seed in it: `few_seed=1` and `few-seed1` are `few`."""
    return re.sub(r"[_\-. ,]*\bseeds?[=_\-]?\d+|[_\-. ,]+seeds?[=_\-]?\d+", "", name).strip("/") or name


def _without_repeats(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs of one group have other seeds each: a second run of a seed is a group of its own."""
    seen: dict[str, int] = {}
    kept = []
    for record in records:
        seeds = {name: value for name, value in record.config.items() if name.rpartition(".")[2] == "seed"}
        key = canonical([record.group, seeds if record.config else record.name])
        seen[key] = seen.get(key, 0) + 1
        kept.append(record if seen[key] == 1 else replace(record, group=canonical([record.group, seen[key]])))
    return kept


def _titled(records: Sequence[RunRecord]) -> list[RunRecord]:
    """A group of one is called as its run is; no two groups are called alike."""
    size: dict[str, int] = {}
    for record in records:
        size[record.group] = size.get(record.group, 0) + 1
    titles: dict[str, str] = {}
    for record in records:
        if record.group not in titles:
            wanted = [record.name] if size[record.group] == 1 else [record.title, record.long_title]
            last = f"{record.name} and its other seeds"
            titles[record.group] = next((title for title in wanted if title not in titles.values()), last)
    return [replace(record, title=titles[record.group]) for record in records]


def _assigned(name: str, value: Any) -> str:
    return f"{name.rpartition('.')[2]}={value if isinstance(value, str) else json.dumps(value)}"
