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
RUN_FILES = ("config.yaml", "status.json", "done.json", "metrics.jsonl")
"""Any of them makes a folder a run directory."""
POSE_STAGES = ("finetune", "semi")
"""How the stages begin whose runs predict poses."""
EVALUATION_FILES = ("metrics.json", "diagnosis.json", "predictions.json")
"""Any of them makes a folder that of an evaluation."""


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
    made_by: tuple[str, str] = ("", "")
    """Stage of the launch that made it, or else its folder, and what was swept in it alone, without seeds."""


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
    """done, unfinished (and why), not started, unknown, or evaluation alone."""
    steps: tuple[int, int | None] | None
    """Made and planned; None where that is not known."""
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
    return _titled(_named(_without_repeats(records)))


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
    if os.path.exists(path / "launch" / "plan.json"):
        launch = _read_launch(path, launches)
        if launch is None:
            raise UserError(f"{path / 'launch' / 'plan.json'}: not the plan of a launch; name its runs instead")
        return _places_of_launch(launch, given)
    evaluated = _holds(path, EVALUATION_FILES)
    # Of a folder that nobody may look into the page tells just that.
    if os.path.exists(path / "config.yaml") or (_is_run(path) and not evaluated) or not os.access(path, os.X_OK):
        return [_place_of_run(path, given, launches)]
    if not evaluated:
        raise UserError(
            f"{given}: holds no config.yaml, metrics.json or launch/plan.json; give a run directory, the folder of an "
            "evaluation, or a launch's"
        )
    if path.name == "evaluation" and _holds(path.parent, RUN_FILES):
        return [_place_of_run(path.parent, _as_given(path.parent, given), launches)]
    launch, job = _launch_of(path, launches)
    if launch and job in launch.evaluated:
        run = launch.evaluated[job]
        return [_Place(launch.root / run, (path,), _as_given(launch.root / run, given), launch, run)]
    return [_Place(None, (path,), given, launch, job)]


def _holds(folder: Path, names: Sequence[str]) -> bool:
    """Whether there is one of these files; unlike Path.exists, os.path.exists raises nothing."""
    return any(os.path.exists(folder / name) for name in names)


def _is_run(folder: Path) -> bool:
    """Even one without its configuration."""
    return _holds(folder, RUN_FILES) or _holds(folder / "evaluation", EVALUATION_FILES)


def _as_given(path: Path, given: str) -> str:
    """A path related to a given one, absolute or relative as that one is."""
    return str(path) if os.path.isabs(given) else os.path.relpath(path)


def _place_of_run(folder: Path, given: str, launches: _Launches) -> _Place:
    own = (folder / "evaluation",) if os.path.isdir(folder / "evaluation") else ()
    launch, job = _launch_of(folder, launches)
    its = [name for name, run in launch.evaluated.items() if run == job] if launch else []
    return _Place(folder, own + tuple(launch.root / name for name in its if launch), given, launch, job)


def _places_of_launch(launch: _Launch, given: str) -> list[_Place]:
    """Every run of it that has begun, then its evaluations of something else."""
    runs = [name for name, job in launch.jobs.items() if _trains(job) and _is_run(launch.root / name)]
    known: _Launches = {launch.root: launch}
    places = [_place_of_run(launch.root / name, f"{given.rstrip('/')}/{name}", known) for name in runs]
    taken = {folder for place in places for folder in place.evaluations}
    others = [name for name, job in launch.jobs.items() if job.get("command") == "evaluation test"]
    folders = [(name, launch.root / name) for name in others if _holds(launch.root / name, ["metrics.json"])]
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
        launch = _read_launch(root, launches) if _holds(root / "launch", ["plan.json"]) else None
        if launch and name in launch.jobs:
            return launch, name
    return None, None


def _trains(job: Mapping[str, Any]) -> bool:
    return not str(job.get("command")).startswith("evaluation ")


def _evaluated_by(root: Path, jobs: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
    """The one run whose hand-off file a job took, as its configuration says; None where it took several or none."""
    if jobs[name].get("command") != "evaluation test":
        return None
    waits = [str(other) for other in jobs[name].get("upstream") or [] if _is_run(root / str(other))]
    try:
        checkpoint = read_config(root / "launch" / "jobs" / name)["checkpoint"]
    except (UserError, KeyError, ValueError):
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
        except OSError as error:
            problems.append(f"{what}: cannot be read ({error.strerror})")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            problems.append(f"{what}: damaged ({reason(error)})")
        return otherwise

    folder = place.folder
    done: dict[str, Any] = {}
    status: dict[str, Any] = {}
    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    if folder is not None and not os.access(folder, os.X_OK):
        problems.append("the folder cannot be read (Permission denied)")
    elif folder is not None:
        if os.path.exists(folder / "config.yaml"):
            config = attempt("config.yaml", lambda: read_config(folder), {})
            problems += [] if config or problems else ["config.yaml: holds nothing"]
        else:
            problems.append("config.yaml: missing; what the run was made with is not known")
        rows = attempt("metrics.jsonl", lambda: read_metrics(folder / "metrics.jsonl"), [])
        for file, content in (("done.json", done), ("status.json", status)):
            if os.path.exists(folder / file):
                content |= attempt(file, lambda file=file: read_object(folder / file), {})
        problems += _losses(folder, done, status, rows, problems)
    measured = []
    for evaluation in place.evaluations:
        where = f"{evaluation.name}/metrics.json" if folder and evaluation.parent == folder else f"{evaluation}"
        if not os.path.exists(evaluation / "metrics.json"):
            problems.append(f"{where}: not measured yet; `python -m evaluation test --out {evaluation}` writes it")
            continue
        found = attempt(where, lambda evaluation=evaluation: _read_evaluation(evaluation), None)
        measured += [] if found is None else [replace(found, made_by=_made_by(place, evaluation))]
    if not place.evaluations and done.get("metrics"):
        found = attempt("done.json", lambda: _own_validation(done), None)
        measured += [] if found is None else [found]
    group, title, long_title = _group(place, config, name)
    stage, state = _stage(folder, done, status) if folder else "evaluation", _state(folder, done, status, config, rows)
    if state == "done" and stage.partition(" ")[0] in POSE_STAGES and not (measured or place.evaluations):
        problems.append("not evaluated: no evaluation of it is known here; `python -m evaluation test` makes one")
    started = next((row for row in rows if row.get("kind") == "start"), {})
    made = {key: done[key] for key in ("versions", "git_commit", "attempts", "threads", "seconds") if key in done}
    made.setdefault("versions", started.get("versions"))
    return RunRecord(
        name=name,
        path=place.path,
        folder=folder,
        stage=stage,
        state=state,
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


def _losses(
    folder: Path,
    done: Mapping[str, Any],
    status: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    told: Sequence[str],
) -> list[str]:
    """What a run must have left and has not, but for what is `told` already."""
    ended = bool(done) or status.get("state") == "done"
    logged = os.path.exists(folder / "metrics.jsonl")
    lost: dict[str, str] = {}
    if not rows and (ended or (logged and os.path.getsize(folder / "metrics.jsonl"))):
        lost["metrics.jsonl"] = "holds no row that can be read" if logged else "missing; there are no learning curves"
    if ended and not done:
        lost["done.json"] = "missing or empty, though status.json says done; whether the run has finished is not known"
    if not status and (done or rows):
        lost["status.json"] = "missing or empty; how many steps were planned is not known"
    known = {problem.partition(":")[0] for problem in told}
    return [f"{file}: {problem}" for file, problem in lost.items() if file not in known]


def _made_by(place: _Place, evaluation: Path) -> tuple[str, str]:
    """`Measured.made_by`, of a job of the launch that made the run what was not swept in the run as well."""
    launch = place.launch
    name = evaluation.relative_to(launch.root).as_posix() if launch and evaluation.is_relative_to(launch.root) else ""
    if not launch or name not in launch.jobs:
        return evaluation.name, ""
    swept = _axes(launch.jobs[place.job]) if place.job else []
    known = {(name, canonical(value)) for linked in swept for name, value in linked.items()}
    own = [
        _assigned(name, value)
        for linked in _axes(launch.jobs[name])
        for name, value in linked.items()
        if name.rpartition(".")[2] != "seed" and (name, canonical(value)) not in known
    ]
    return str(launch.jobs[name].get("stage")), ", ".join(own)


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
    if state in ("done", "unknown"):  # done, but without the file that says so
        return "unknown"
    return f"unfinished ({state})" if not reason else f"unfinished ({state}: {' '.join(str(reason).split())})"


def _steps(status: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[int, int | None] | None:
    made, total = _number(status.get("step")), _number(status.get("total"))
    logged = [step for row in rows if row.get("kind") == "train" and (step := _number(row.get("step"))) is not None]
    made = max([*logged, made or 0])
    return (int(made), int(total) if total else None) if logged or total else None


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
            with contextlib.suppress(UserError, ValueError):  # then it is known by its path
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


def _named(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Evaluations called by what made them, alike in all runs of a group, where a run has several or they differ."""
    made: dict[str, list[list[tuple[str, str]]]] = {}
    for record in records:
        its = [measured.made_by for measured in record.measured if measured.folder is not None]
        made.setdefault(record.group, []).append(its)
    return [replace(record, measured=_called(record.measured, made[record.group])) for record in records]


def _called(measured: Sequence[Measured], made: Sequence[Sequence[tuple[str, str]]]) -> list[Measured]:
    """Of one run; made: by what the evaluations of each run of its group were made."""
    stages = {stage for its in made for stage, _ in its}
    swept = {axes for its in made for _, axes in its}
    if len(swept) < 2 and all(len(its) < 2 for its in made):
        return [*measured]
    names = [
        (axes or stage) if len(stages) < 2 else ", ".join(filter(None, (stage, axes)))
        for stage, axes in (one.made_by for one in measured)
    ]
    if len({*names}) < len(names):  # seeds of the evaluation: they do not make another run
        names = unique_names([one.folder for one in measured if one.folder], [1] * len(measured))
    return [replace(one, name=its if one.folder else "") for one, its in zip(measured, names, strict=True)]


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
