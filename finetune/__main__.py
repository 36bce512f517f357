"""`python -m finetune [cir | pseudo-labels] --config FILE [--field value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from poserelay.command import run_command

from .cir_config import CIRConfig
from .config import FinetuneConfig
from .pseudo_labels_config import PseudoLabelsConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Train a top-down or, with `cir`, a single-stage model, or label pictures by models; returns the exit code."""

    def train(config: FinetuneConfig) -> None:
        from .train import main as run

        run(config)

    def label(config: PseudoLabelsConfig) -> None:
        from .pseudo_labels import main as run

        run(config)

    def train_single_stage(config: CIRConfig) -> None:
        from .train_cir import main as run

        run(config)

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["pseudo-labels"]:
        return run_command(arguments[1:], "finetune pseudo-labels", PseudoLabelsConfig, label)
    if arguments[:1] == ["cir"]:
        return run_command(arguments[1:], "finetune cir", CIRConfig, train_single_stage)
    return run_command(arguments, "finetune", FinetuneConfig, train)


if __name__ == "__main__":
    sys.exit(main())
