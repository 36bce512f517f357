"""`python -m poserelay COMMAND ...`: what needs no stage."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .command import run_commands
from .config import InspectConfig
from .synthesize import SynthesizeConfig
from .synthesize import main as synthesize


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""

    def inspect(config: InspectConfig) -> None:
        from .inspection import main as run

        run(config)

    commands = {"synthesize": (SynthesizeConfig, synthesize), "inspect": (InspectConfig, inspect)}
    return run_commands(argv, "poserelay", commands, partly=("inspect",))


if __name__ == "__main__":
    sys.exit(main())
