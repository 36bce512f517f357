"""From a graph file to its jobs: sweeps multiplied out, `${stage}` resolved, every job's configuration checked.

Imports no torch and writes nothing.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from poserelay.command import parse, to_plain, with_absolute_paths
from poserelay.errors import UserError

from .commands import COMMANDS, Command
from .config import LaunchConfig, Resources, Slurm, Stage
from .configurations import Configurations

REFERENCE = re.compile(r"\$\{([^}]*)\}?")
# Folders of the run directory that are not a stage's, and first parts of our own options.
RESERVED = {"launch", "collect", *(field.name for field in fields(LaunchConfig))}

Axes = dict[str, list[Any]]


@dataclass(frozen=True)
class Job:
    """One run of one command: an element of a stage's sweep, or the stage itself."""

    name: str
    """STAGE, or STAGE/ELEMENT of a sweep: the job's folder relative to the launch's."""
    stage: str
    command: str
    """What follows `python -m`."""
    axes: dict[str, Any]
    """Swept field, the stage's own or one that it follows upstream, to this job's value."""
    folder: str
    """Absolute: the run directory of a training command, or where another command writes."""
    upstream: list[str]
    """Names of the jobs that must have ended well before this one starts."""
    resources: Resources
    slurm: Slurm


@dataclass(frozen=True)
class Graph:
    """Jobs in an order in which each comes after those that it waits for."""

    jobs: list[Job]
    configs: dict[str, dict[str, Any]]
    """Job name to the resolved configuration of its command, paths absolute."""
    missing: dict[str, list[str]]
    """Stage to the files and folders it names that are neither there nor made by a stage."""


def build_graph(
    config: LaunchConfig,
    more: Mapping[str, Sequence[str]],
    base: Path,
    moved: Callable[[Path], Path] = lambda path: path,
) -> Graph:
    """Jobs of a graph file. `more` maps stages to further arguments of their commands, as typed on a command line.

    Relative paths lie under `base`; `moved` then says where a file of this checkout lies for the jobs (their snapshot).

    Raises:
        UserError: a cycle, an unknown stage, command or field, an axis that does not match, a missing recipe, a value
            that the command refuses.
    """
    run_dir = base / config.run_dir
    jobs: dict[str, list[Job]] = {}
    axes: dict[str, Axes] = {}
    configs: dict[str, dict[str, Any]] = {}
    named_paths: dict[str, dict[Path, None]] = {name: {} for name in config.stages}
    for part in ("resources", "slurm", "local"):
        if getattr(config, part) is None:
            raise UserError(f"{part} is empty; give it fields or leave it out")
    _check_names(config.stages, more)
    for name in _in_order(config.stages, more):
        stage = config.stages[name]
        command = _command(name, stage, more.get(name, ()))
        if stage.existing:
            axes[name], jobs[name] = {}, [_existing(name, stage, command, base)]
            continue
        resources = _changed(config.resources, stage.resources, f"stage {name}: resources")
        if resources.world > 1 and not command.trains:
            raise UserError(
                f"stage {name}: {stage.command or name} runs as one process, but its resources ask for "
                f"{resources.world}; set nodes, gpus and processes of this stage's resources to 1 at most"
            )
        slurm = _changed(config.slurm, stage.slurm, f"stage {name}: slurm")
        axes[name] = _axes(name, stage, axes, _references(stage, more.get(name, ())))
        own = {_field(key) for key in stage.sweep}
        jobs[name] = []
        configurations = Configurations(command.config, stage.command or name)
        for element in _elements(axes[name]):
            job_name = "/".join([name, *([_element_name(element)] if element else [])])
            alike = itertools.chain([job_name], (f"{job_name}_{number}" for number in itertools.count(2)))
            job_name = next(name for name in alike if name not in configs)
            folder = run_dir / job_name
            values = {**stage.overrides, **assignments({key: element[key] for key in element if key in own})}
            arguments, named = _arguments(name, values, more.get(name, ()), element, jobs)
            arguments = [*([f"--config={stage.config}"] if stage.config else []), *arguments]
            arguments += [f"--{command.field}={folder / command.written}"]
            where = f"stage {name} ({job_name.partition('/')[2]})" if element else f"stage {name}"
            found = configurations.parse(arguments, where)
            configs[job_name] = to_plain(with_absolute_paths(found, base, partial(_noted, named_paths[name], moved)))
            waits = [*(job for other in stage.after for job in jobs[other]), *named]
            upstream = list(dict.fromkeys(job.name for job in waits if not config.stages[job.stage].existing))
            text = stage.command or name
            jobs[name].append(Job(job_name, name, text, element, str(folder), upstream, resources, slurm))
    missing = {
        name: [str(path) for path in paths if not path.is_relative_to(run_dir) and not path.exists()]
        for name, paths in named_paths.items()
    }
    listed = [job for group in jobs.values() for job in group if job.name in configs]
    return Graph(listed, configs, {name: paths for name, paths in missing.items() if paths})


def _noted(seen: dict[Path, None], moved: Callable[[Path], Path], path: Path) -> Path:
    seen[path] = None
    return moved(path)


def split_arguments(argv: Sequence[str], stages: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """`argv` without its `--STAGE.FIELD VALUE`, and these by stage as `--FIELD=VALUE`."""
    ours: list[str] = []
    theirs: dict[str, list[str]] = {}
    names = set(stages)
    position = 0
    while position < len(argv):
        stage, dot, rest = argv[position].removeprefix("--").partition(".")
        if not (argv[position].startswith("--") and dot and stage in names):
            ours.append(argv[position])
        elif "=" in rest:
            theirs.setdefault(stage, []).append(f"--{rest}")
        else:
            position += 1
            if position == len(argv):
                raise UserError(f"{argv[-1]}: its value is missing")
            theirs.setdefault(stage, []).append(f"--{rest}={argv[position]}")
        position += 1
    return ours, theirs


def _check_names(stages: Mapping[str, Stage], more: Mapping[str, Sequence[str]]) -> None:
    for name, stage in stages.items():
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z][\w-]*", name)) or name in RESERVED:
            raise UserError(
                f"stages: {name!r} cannot name a stage; take letters, digits, - and _, and none of "
                f"{', '.join(sorted(RESERVED))}"
            )
        for part in ("overrides", "sweep", "after", "resources", "slurm"):
            entries = getattr(stage, part)
            if entries is None:
                raise UserError(f"stage {name}: {part} is empty; give it entries or leave it out")
            for entry in entries:
                if not isinstance(entry, str):
                    raise UserError(f"stage {name}: {part}: {entry!r} is no name; put it in quotes")
        for other in [*stage.after, *_references(stage, more.get(name, ()))]:
            if other not in stages:
                near = difflib.get_close_matches(other, stages, n=1)
                meant = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(stages)}"
                raise UserError(f"stage {name}: there is no stage {other!r} in this graph; {meant}")


def _in_order(stages: Mapping[str, Stage], more: Mapping[str, Sequence[str]]) -> list[str]:
    """Stage names, each after those it waits for, otherwise as in the file. UserError naming a cycle."""
    done: list[str] = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            raise UserError(
                f"stages: {' -> '.join([*path[path.index(name) :], name])} is a cycle, each waits for the next; "
                "remove one of these from `after` or from `${}`"
            )
        if name not in done:
            stage = stages[name]
            for other in [*stage.after, *_references(stage, more.get(name, ()))]:
                visit(other, [*path, name])
            done.append(name)

    for name in stages:
        visit(name, [])
    return done


def _references(stage: Stage, more: Sequence[str]) -> list[str]:
    """Stages that are named by `${}`."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, str):
            found.extend(match.split(".")[0] for match in REFERENCE.findall(value))
        elif isinstance(value, Mapping):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    walk([stage.overrides, stage.sweep, list(more)])
    return list(dict.fromkeys(found))


def _command(name: str, stage: Stage, more: Sequence[str]) -> Command:
    """What a stage runs, once its recipe is there and no field is set from two sides."""
    text = stage.command or name
    if text not in COMMANDS:
        raise UserError(
            f"stage {name}: there is no command {text!r}; set its `command` to one of {', '.join(COMMANDS)}"
        )
    command = COMMANDS[text]
    if stage.config is not None and not Path(stage.config).is_file():
        raise UserError(f"stage {name}: config {stage.config}: no such file; give the path of a recipe")
    swept = [part for axis in stage.sweep for part in parts_of(axis)]
    typed = [argument[2:].partition("=")[0] for argument in more]
    for key in [*stage.overrides, *swept, *typed]:
        if key in swept and key in (*stage.overrides, *typed):
            raise UserError(
                f"stage {name}: {key} is swept and set to one value, too; leave one out (`--stages.{name}.sweep "
                "'{...}'` replaces the sweep)"
            )
        if key.split(".")[0] == "config":
            raise UserError(f"stage {name}: {key}: give the recipe as the stage's own `config`, beside `overrides`")
        if key.split(".")[0] == command.field:
            raise UserError(
                f"stage {name}: {key} is chosen by the launcher ({command.field} is RUN/{name}); leave it out"
            )
    return command


def _existing(name: str, stage: Stage, command: Command, base: Path) -> Job:
    """A stage that has been run: not a job, but what others name by `${}`."""
    if stage.sweep:
        raise UserError(f"stage {name}: existing is one run, and the stage has a sweep; leave one of them out")
    folder = base / str(stage.existing)
    found = folder / command.hands_off
    if not found.exists() or (command.trains and not (folder / "done.json").exists()):
        raise UserError(
            f"stage {name}: existing {stage.existing}: no finished {stage.command or name} there (it lacks "
            f"{command.hands_off or 'everything'}{' or done.json' if command.trains else ''}); give its folder"
        )
    return Job(name, name, stage.command or name, {}, str(folder), [], Resources(), Slurm())


def _axes(name: str, stage: Stage, known: Mapping[str, Axes], upstream: Sequence[str]) -> Axes:
    """The stage's axes: those of the stages it names by `${}`, in their order, then its own.

    An axis that both have, the stage perhaps linked with further fields, takes the stage's own values, each of which
    the upstream must have.
    """
    own: Axes = {}
    for key, values in stage.sweep.items():
        parts = parts_of(key)
        if not values:
            raise UserError(f"stage {name}: sweep {key!r} has no values")
        if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < len(values):
            raise UserError(f"stage {name}: sweep {key!r} has a value twice: {values}")
        for value in values if len(parts) > 1 else []:
            if not isinstance(value, list) or len(value) != len(parts):
                raise UserError(
                    f"stage {name}: sweep {key!r} changes {len(parts)} fields together, but has the value {value!r}; "
                    f"give lists of {len(parts)}"
                )
        own[_field(key)] = values
    assigned = [part for key in own for part in parts_of(key)]
    if len(set(assigned)) < len(assigned):
        raise UserError(f"stage {name}: a field is in two axes of its sweep ({', '.join(own)}); keep it in one")
    axes: Axes = {}
    for other in upstream:
        for key, values in known[other].items():
            ours = next((mine for mine in own if set(parts_of(key)) <= set(parts_of(mine))), None)
            if ours is not None:
                shown = [assignments({ours: value}) for value in own[ours]]
                known_values = [assignments({key: value}) for value in values]
                strange = [
                    value for value in shown if {part: value[part] for part in parts_of(key)} not in known_values
                ]
                if strange:
                    found = ", ".join(repr(strange[0][part]) for part in parts_of(key))
                    raise UserError(
                        f"stage {name}: sweeps {key} over {found}, which stage {other} does not have ({values}); axes "
                        "that two stages share match value by value"
                    )
                axes[ours] = own[ours]
            elif key in axes and axes[key] != values:
                raise UserError(
                    f"stage {name}: {other} and another stage that it names sweep {key} over different values "
                    f"({values}, {axes[key]}); give {name} a sweep of {key} over those they share"
                )
            else:
                axes[key] = values
    axes |= {key: values for key, values in own.items() if key not in axes}
    for key, other in itertools.combinations(axes, 2):
        both = set(parts_of(key)) & set(parts_of(other))
        if both:
            raise UserError(
                f"stage {name}: {min(both)} is in two axes, {key!r} and {other!r} (its own, and those of stages that "
                "it names); axes match only where they have the same fields, so write one of them like the other"
            )
    return axes


def _elements(axes: Axes) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _arguments(
    name: str,
    values: Mapping[str, Any],
    more: Sequence[str],
    element: Mapping[str, Any],
    jobs: Mapping[str, list[Job]],
) -> tuple[list[str], list[Job]]:
    """A job's command line with every `${}` replaced, and the jobs that these name."""
    named: list[Job] = []
    ours = assignments(element)

    def path(match: re.Match[str]) -> str:
        stage, _, file = match[1].partition(".")
        if not match[0].endswith("}") or (file and not re.fullmatch(r"[\w-]+", file)):
            raise UserError(f"stage {name}: {match[0]!r}: write ${{stage}}, ${{stage.file}} or ${{stage.run_dir}}")
        job = next(
            job for job in jobs[stage] if all(ours[key] == value for key, value in assignments(job.axes).items())
        )
        named.append(job)
        found = Path(job.folder, _handed_off(name, match[0], COMMANDS[job.command], file))
        after = match.string[match.end() :]
        if after.startswith("/") and found.suffix:
            raise UserError(
                f"stage {name}: {match.string!r}: {match[0]} is the file {found.name}; "
                f"write ${{{stage}.run_dir}}{after}"
            )
        return str(found)

    def resolved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: resolved(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [resolved(item) for item in value]
        return REFERENCE.sub(path, value) if isinstance(value, str) else value

    flags = [_flag(key, resolved(value)) for key, value in values.items()]
    return [*flags, *(resolved(argument) for argument in more)], named


def _handed_off(name: str, reference: str, command: Command, file: str) -> str:
    """What `${stage.FILE}` stands for, relative to the stage's folder."""
    if file == "run_dir":
        return ""
    if file and not command.trains:
        raise UserError(f"stage {name}: {reference}: that stage exports no weights; write {reference.split('.')[0]}}}")
    return f"export/{file}.safetensors" if file else command.hands_off


def _changed(defaults: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A dataclass of the graph with a stage's changes, checked like a command line."""
    if not changes:
        return defaults
    values = {**asdict(defaults), **changes}
    try:
        if isinstance(changes.get("time"), int):
            Slurm(time=changes["time"])  # as a flag it would be a text
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    try:
        return parse(type(defaults), [_flag(key, value) for key, value in values.items()], "launch")
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('command line: ')}") from error


def _flag(key: str, value: Any) -> str:
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def parts_of(key: str) -> tuple[str, ...]:
    """The fields that an axis changes: one, or several that are linked."""
    return tuple(part.strip() for part in key.split(","))


def _field(key: str) -> str:
    """An axis' name, its linked fields separated in one way."""
    return ", ".join(parts_of(key))


def assignments(element: Mapping[str, Any]) -> dict[str, Any]:
    """Field to value, linked axes taken apart."""
    values: dict[str, Any] = {}
    for key, value in element.items():
        parts = parts_of(key)
        values |= dict(zip(parts, value, strict=True)) if len(parts) > 1 else {key: value}
    return values


def _element_name(element: Mapping[str, Any]) -> str:
    """A folder name such as ratio=0.1_seed=0: the last parts of the fields, or all where these are ambiguous.

    Of linked fields the first is named. Two elements may get the same name, where values hold other signs.
    """
    firsts = {parts_of(key)[0]: value[0] if len(parts_of(key)) > 1 else value for key, value in element.items()}
    short = {key: key.rpartition(".")[2] for key in firsts}
    names = [short[key] if list(short.values()).count(short[key]) == 1 else key for key in firsts]
    values = [_plain(value) for value in firsts.values()]
    return "_".join(f"{name}={value}" for name, value in zip(names, values, strict=True))[:120]


def _plain(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    match = REFERENCE.fullmatch(text)
    # A minus in front is a sign.
    return re.sub(r"[^\w.+-]+", "-", re.sub(r"^[^\w.+-]+|[^\w.+-]+$", "", match[1] if match else text))
