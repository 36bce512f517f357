"""Training losses of runs, read from their run directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from poserelay.errors import UserError
from poserelay.run import read_config, read_metrics


@dataclass(frozen=True)
class Curve:
    """The rows that a run's training logged, each a mean over the steps since the one before."""

    name: str
    """Of the run's folder."""
    stage: str
    steps: list[int]
    """Optimiser steps since the start of the run."""
    total: int
    """Steps of the whole run."""
    losses: dict[str, list[float]]
    """`loss`, the one that is trained on, and its terms: `loss_conv2` .. `loss_conv5` of MSCL."""


def read_curve(run: Path) -> Curve:
    """What a run has logged so far; no steps where it has not begun.

    Raises:
        UserError: not a run directory, or its status.json is damaged.
    """
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    if not rows:
        read_config(run)  # tells when this is no run directory
        return Curve(run.name, "not started", [], 0, {"loss": []})
    names = [name for name in rows[0] if name == "loss" or name.startswith("loss_")]
    try:
        status = json.loads((run / "status.json").read_text(encoding="utf-8"))
        losses = {name: [float(row[name]) for row in rows] for name in names}
        return Curve(run.name, status["stage"], [row["step"] for row in rows], status["total"], losses)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}: status.json or metrics.jsonl is damaged ({error!r}); put the run back") from error


def epochs_of(run: Path, curve: Curve) -> list[float]:
    """The epochs that the run had gone through at each of the curve's rows.

    Raises:
        UserError: the run has no number of epochs.
    """
    epochs = (read_config(run).get("optim") or {}).get("epochs")
    if not curve.steps or not epochs or not curve.total:
        raise UserError(f"{run}: no training loss over epochs here; give the run_dir of a training that has begun")
    return [step * epochs / curve.total for step in curve.steps]


def distinct_names(names: Sequence[str], longer: Sequence[str]) -> list[str]:
    """`names`, or where two are alike `longer`."""
    return list(names if len(set(names)) == len(names) else longer)
