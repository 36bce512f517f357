"""`python -m finetune --config FILE [--field value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from poserelay.command import run_command

from .config import FinetuneConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""

    def train(config: FinetuneConfig) -> None:
        from .train import main as run

        run(config)

    return run_command(argv, "finetune", FinetuneConfig, train)


if __name__ == "__main__":
    sys.exit(main())
