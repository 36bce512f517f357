"""`python -m evaluation COMMAND ...`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from poserelay.command import run_commands

from .config import (
    CompareConfig,
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
        "predict": (PredictConfig, of("predict")),
        "visualize": (VisualizeConfig, of("visualize")),
        "embeddings": (EmbeddingsConfig, of("embeddings")),
        "scio": (ScioConfig, of("scio")),
        "report": (ReportConfig, of("report")),
    }
    return run_commands(argv, "evaluation", commands)


if __name__ == "__main__":
    sys.exit(main())
