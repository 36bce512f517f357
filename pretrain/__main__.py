"""`python -m pretrain [linear] --config FILE [--field value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from poserelay.command import run_command

from .config import PretrainConfig
from .linear_config import LinearConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage, or the linear probe of a backbone; returns the exit code."""

    def train(config: PretrainConfig) -> None:
        from .train import main as run

        run(config)

    def probe(config: LinearConfig) -> None:
        from .linear import main as run

        run(config)

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["linear"]:
        return run_command(arguments[1:], "pretrain linear", LinearConfig, probe)
    return run_command(arguments, "pretrain", PretrainConfig, train)


if __name__ == "__main__":
    sys.exit(main())
