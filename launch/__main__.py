"""`python -m launch --config GRAPH [--field value ...]`, and `python -m launch COMMAND RUN` to look after it."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from poserelay.command import run_command, run_commands
from poserelay.errors import UserError, exit_code

from .config import CancelConfig, CollectConfig, LaunchConfig, LogsConfig, ResumeConfig, StatusConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Submit a graph or run a command; returns the exit code."""

    def of(module: str, function: str) -> Callable[[Any], object]:
        return lambda config: getattr(import_module(f"launch.{module}"), function)(config)

    commands = {
        "status": (StatusConfig, of("status", "main"), ("run",)),
        "logs": (LogsConfig, of("control", "logs"), ("run", "stage")),
        "cancel": (CancelConfig, of("control", "cancel"), ("run",)),
        "resume": (ResumeConfig, of("submission", "resume"), ("run",)),
        "collect": (CollectConfig, of("collect", "main"), ("run",)),
    }
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and (arguments[0].startswith("--") or arguments[0] == "-h"):
        return launch(["--help" if argument == "-h" else argument for argument in arguments])
    if arguments[:1] and arguments[0] in commands:
        arguments = name_positions(arguments, commands[arguments[0]][2])
    else:
        print("python -m launch --config GRAPH submits; python -m launch --help lists its fields.\n", file=sys.stderr)
    return run_commands(arguments, "launch", {name: (c, function) for name, (c, function, _) in commands.items()})


def launch(arguments: list[str]) -> int:
    """Submit a graph; `--STAGE.FIELD VALUE` goes to the stage."""
    from .graph import split_arguments

    more: dict[str, list[str]] = {}

    def split() -> None:
        nonlocal arguments, more
        graph = read_graph(arguments)
        check_times(graph, str(graph_file(arguments)))
        arguments, more = split_arguments(arguments, [name for name in stages_of(graph) if isinstance(name, str)])
        check_heads(arguments, stages_of(graph))

    def submit(config: LaunchConfig) -> None:
        from .submission import launch as run

        run(config, more, graph_file(arguments) or "command line")

    return exit_code(split) or run_command(arguments, "launch", LaunchConfig, submit, references=True)


def graph_file(arguments: Sequence[str]) -> str | None:
    """What follows --config."""
    following = [*arguments[1:], ""]
    named = [after for argument, after in zip(arguments, following, strict=True) if argument == "--config"]
    named += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    return named[-1] if named else None


def read_graph(arguments: Sequence[str]) -> dict[str, Any]:
    """The graph file as it is; empty where it cannot be read, which is told when it is parsed."""
    file = graph_file(arguments)
    try:
        graph = yaml.safe_load(Path(file).read_text("utf-8-sig")) if file else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return graph if isinstance(graph, dict) else {}


def stages_of(graph: Mapping[str, Any]) -> dict[Any, Any]:
    """Name to stage, neither checked."""
    stages = graph.get("stages")
    return stages if isinstance(stages, dict) else {}


def check_times(graph: Mapping[str, Any], file: str) -> None:
    """YAML reads 24:00:00 without quotes as the number 86400, which sbatch would take for minutes."""
    for where, owner in [("", graph), *((f"stage {name}: ", stage) for name, stage in stages_of(graph).items())]:
        slurm = owner.get("slurm") if isinstance(owner, dict) else None
        time = slurm.get("time") if isinstance(slurm, dict) else None
        if time is not None and not isinstance(time, str):
            raise UserError(
                f'{file}: {where}slurm.time is the number {time}: put it in quotes, "60" for minutes or "24:00:00" '
                "(without them YAML reads 24:00:00 as 86400)"
            )


def check_heads(arguments: Sequence[str], stages: Iterable[Any]) -> None:
    """`--NAME.FIELD` whose NAME is neither a stage nor an option of ours."""
    own = [field.name for field in dataclasses.fields(LaunchConfig)]
    for argument in arguments:
        head, dot, _ = argument.removeprefix("--").partition("=")[0].partition(".")
        if argument.startswith("--") and dot and head not in (*own, "print_config"):
            near = difflib.get_close_matches(head, [*map(str, stages), *own], n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"the stages are {', '.join(map(str, stages)) or 'none'}"
            raise UserError(f"{argument}: there is no stage or option {head!r}; {meant}")


def name_positions(arguments: Sequence[str], fields: Sequence[str]) -> list[str]:
    """`status RUN` as `status --run RUN`, also after a flag: `status --json RUN`, `logs --lines 5 RUN STAGE`."""
    named = list(arguments[:1])
    rest, left = list(arguments[1:]), list(fields)
    while rest:
        argument = rest.pop(0)
        if left and not argument.startswith("-"):
            named += [f"--{left.pop(0)}", argument]
            continue
        named.append(argument)
        alone = argument in ("--json", "--new_code", "--help", "-h") and rest[:1] not in (["true"], ["false"])
        if argument.startswith("--") and "=" not in argument and not alone and rest:
            named.append(rest.pop(0))
    return named


if __name__ == "__main__":
    sys.exit(main())
