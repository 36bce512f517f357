"""`python -m poserelay COMMAND ...`: what needs no stage."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .command import run_commands
from .config import (
    ConvertConfig,
    DetectConfig,
    ExportConfig,
    ExportModelConfig,
    ImportConfig,
    InspectConfig,
    PrepareConfig,
    SelectConfig,
)
from .synthesize import SynthesizeConfig
from .synthesize import main as synthesize


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""

    def inspect(config: InspectConfig) -> None:
        if config.data is None:
            from .inspection import main as run
        else:
            from .statistics import main as run

        run(config)

    def convert(config: ConvertConfig) -> None:
        from .convert import main as run

        run(config)

    def prepare(config: PrepareConfig) -> None:
        from .preparation import main as run

        run(config)

    def select(config: SelectConfig) -> None:
        from .selection import main as run

        run(config)

    def detect(config: DetectConfig) -> None:
        from .detection import main as run

        run(config)

    def import_weights(config: ImportConfig) -> None:
        from .importers import main as run

        run(config)

    def export_weights(config: ExportConfig) -> None:
        from .exporters import main as run

        run(config)

    def export_model(config: ExportModelConfig) -> None:
        from .deployment import main as run

        run(config)

    commands = {
        "synthesize": (SynthesizeConfig, synthesize),
        "inspect": (InspectConfig, inspect),
        "convert": (ConvertConfig, convert),
        "prepare": (PrepareConfig, prepare),
        "select": (SelectConfig, select),
        "detect": (DetectConfig, detect),
        "import-weights": (ImportConfig, import_weights),
        "export-weights": (ExportConfig, export_weights),
        "export-model": (ExportModelConfig, export_model),
    }
    return run_commands(argv, "poserelay", commands, partly={"inspect": ("model",)})


if __name__ == "__main__":
    sys.exit(main())
