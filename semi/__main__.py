"""`python -m semi --config FILE [--field value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from poserelay.command import run_command

from .config import SemiConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""

    def train(config: SemiConfig) -> None:
        from .train import main as run

        run(config)

    return run_command(argv, "semi", SemiConfig, train)


if __name__ == "__main__":
    sys.exit(main())
