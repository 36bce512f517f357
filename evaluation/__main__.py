"""`python -m evaluation COMMAND ...`."""

from __future__ import annotations

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
    """`compare A B --annotations FILE` as `compare --annotations FILE --a=A --b=B`, wherever the files are."""
    if arguments[:1] != ["compare"]:
        return list(arguments)
    files, named = without_flags(arguments[1:])
    if len(files) == 2 and {"--a", "--b"}.isdisjoint(flag.split("=")[0] for flag in named):
        files = [f"--a={files[0]}", f"--b={files[1]}"]
    return ["compare", *named, *files]


def name_runs(arguments: Sequence[str]) -> list[str]:
    """`report RUN... --out FILE` as `report --out FILE --runs+=[RUN, ...]`, the runs before flags or after them."""
    if arguments[:1] != ["report"]:
        return list(arguments)
    rest = list(arguments[1:])
    for place, argument in enumerate(rest[:-1]):
        if argument == "--runs" and not rest[place + 1].startswith("["):
            del rest[place]  # `--runs A B`
            break
    runs, named = without_flags(rest)
    return ["report", *named, *([f"--runs+={json.dumps(runs, ensure_ascii=False)}"] if runs else [])]


def without_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that belong to no flag, and the flags with their values."""
    free, named, rest = list[str](), list[str](), list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            free.append(argument)
            continue
        named.append(argument)
        alone = ("-h", "--help", "--print_config", "--json")
        if argument not in alone and "=" not in argument:
            named += rest[:1]
            del rest[:1]
        elif argument == "--json" and rest[:1] in (["true"], ["false"]):
            named.append(rest.pop(0))
    return free, named


if __name__ == "__main__":
    sys.exit(main())
