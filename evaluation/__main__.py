"""`python -m evaluation COMMAND ...`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from poserelay.command import run_commands

from .config import (
    CompareConfig,
    DiagnoseConfig,
    EmbeddingsConfig,
    PredictConfig,
    ReportConfig,
    ScioConfig,
    ScoreConfig,
    TestConfig,
    TimingConfig,
    VisualizeConfig,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""

    def of(module: str) -> Callable[[Any], object]:
        return lambda config: import_module(f"evaluation.{module}").main(config)

    commands = {
        "test": (TestConfig, of("test")),
        "score": (ScoreConfig, of("score")),
        "timing": (TimingConfig, of("timing")),
        "compare": (CompareConfig, of("compare")),
        "diagnose": (DiagnoseConfig, of("diagnose")),
        "predict": (PredictConfig, of("predict")),
        "visualize": (VisualizeConfig, of("visualize")),
        "embeddings": (EmbeddingsConfig, of("embeddings")),
        "scio": (ScioConfig, of("scio")),
        "report": (ReportConfig, of("report")),
    }
    return run_commands(name_sides(name_runs(list(sys.argv[1:] if argv is None else argv))), "evaluation", commands)


def name_sides(arguments: Sequence[str]) -> list[str]:
    """`compare A B --annotations FILE` as `compare --a A --b B --annotations FILE`; other arguments as they are."""
    paths = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    flags = {argument.split("=")[0] for argument in arguments}
    if paths[:1] != ["compare"] or len(paths) != 3 or not flags.isdisjoint(("--a", "--b")):
        return list(arguments)
    return ["compare", "--a", paths[1], "--b", paths[2], *arguments[3:]]


def name_runs(arguments: Sequence[str]) -> list[str]:
    """`report RUN... --out FILE` as `report --out FILE --runs+=[RUN, ...]`, the runs before flags or after them."""
    if arguments[:1] != ["report"]:
        return list(arguments)
    named, runs, rest = ["report"], list[str](), list(arguments[1:])
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            runs.append(argument)
            continue
        if argument == "--runs" and rest and not rest[0].startswith("["):
            continue
        named.append(argument)
        if argument not in ("-h", "--help", "--print_config") and "=" not in argument:
            named += rest[:1]
            del rest[:1]
    return [*named, f"--runs+={json.dumps(runs, ensure_ascii=False)}"] if runs else named


if __name__ == "__main__":
    sys.exit(main())
