"""`python -m finetune [pseudo-labels] --config FILE [--field value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from poserelay.command import run_command

from .config import FinetuneConfig
from .pseudo_labels_config import PseudoLabelsConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage, or label unlabelled pictures by trained models; returns the exit code."""

    def train(config: FinetuneConfig) -> None:
        from .train import main as run

        run(config)

    def label(config: PseudoLabelsConfig) -> None:
        from .pseudo_labels import main as run

        run(config)

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["pseudo-labels"]:
        return run_command(arguments[1:], "finetune pseudo-labels", PseudoLabelsConfig, label)
    return run_command(arguments, "finetune", FinetuneConfig, train)


if __name__ == "__main__":
    sys.exit(main())
