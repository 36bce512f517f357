"""`python -m finetune [cir | pseudo-labels] --config FILE [--field value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import yaml

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
    if arguments[:1] != ["pseudo-labels"] and (mistaken := wrong_recipe(arguments)):
        print(f"error: {mistaken}", file=sys.stderr)
        return 2
    if arguments[:1] == ["pseudo-labels"]:
        return run_command(arguments[1:], "finetune pseudo-labels", PseudoLabelsConfig, label)
    if arguments[:1] == ["cir"]:
        return run_command(arguments[1:], "finetune cir", CIRConfig, train_single_stage)
    return run_command(arguments, "finetune", FinetuneConfig, train)


def wrong_recipe(arguments: Sequence[str]) -> str | None:
    """What is wrong where the recipe of `--config` is of the other kind of model, whose fields have other types.

    Everything else about the file is told when it is parsed.
    """
    if "--config" not in arguments[:-1] or any(argument.startswith("--model.head") for argument in arguments):
        return None
    path = arguments[arguments.index("--config") + 1]
    try:
        with open(path, encoding="utf-8") as file:
            head = yaml.safe_load(file)["model"]["head"]["name"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    if (head == "cir") == (arguments[0] == "cir"):
        return None
    command = "python -m finetune cir" if head == "cir" else "python -m finetune"
    return f"{path}: model.head is {head!r}, which `{command}` trains; start that command with this recipe"


if __name__ == "__main__":
    sys.exit(main())
