"""`python -m evaluation report`: runs side by side, as a table and as loss curves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from poserelay.errors import UserError
from poserelay.run import read_config, read_metrics, write_atomic, write_text

from .config import ReportConfig
from .curves import Curve, read_curve

matplotlib.use("agg")

COLUMNS = ("AP", "AP50", "PCK", "mean pose PCK")


def main(config: ReportConfig) -> str:
    """Write `out`/report.md and `out`/losses.png; print and return the table."""
    runs = [Path(run) for run in config.runs]
    table = format_table([describe_run(run) for run in runs])
    out = Path(config.out)
    write_text(out / "report.md", table + "\n")
    write_atomic(out / "losses.png", lambda path: plot_losses(runs).savefig(path, format="png", dpi=120))
    print(table)
    print(f"{out / 'report.md'} and {out / 'losses.png'} written", file=sys.stderr)
    return table


def describe_run(run: Path) -> dict[str, str]:
    """One row: what was run, what it started from, how many labels it had, and its test metrics where there are any."""
    config = read_config(run)
    rows = read_metrics(run / "metrics.jsonl")
    last = [row for row in rows if row["kind"] == "train"][-1:]
    done = (run / "done.json").exists()
    row = {
        "run": run.name,
        "init_from": Path(config["init_from"]).parent.parent.name if config.get("init_from") else "-",
        "labels": _labels(config.get("labels")),
        "steps": str(last[0]["step"]) if last else "0",
        "loss": f"{last[0]['loss']:.4g}" if last else "-",
        "state": "done" if done else "unfinished",
    }
    metrics = _test_metrics(run)
    return row | {name: f"{metrics[name]:.3f}" if isinstance(metrics.get(name), float) else "-" for name in COLUMNS}


def format_table(rows: list[dict[str, str]]) -> str:
    """A Markdown table, columns aligned."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = ["| " + " | ".join(name.ljust(widths[name]) for name in names) + " |"]
    lines.append("|" + "|".join("-" * (widths[name] + 2) for name in names) + "|")
    lines += ["| " + " | ".join(row[name].ljust(widths[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def plot_losses(runs: list[Path]) -> Figure:
    """Training loss over steps, one panel per stage, one line per run."""
    curves: dict[str, list[Curve]] = {}
    for curve in map(read_curve, runs):
        curves.setdefault(curve.stage, []).append(curve)
    figure = Figure(figsize=(5 * len(curves), 3.6), layout="constrained")
    for axes, (stage, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for curve in lines:
            axes.plot(curve.steps, curve.losses["loss"], label=curve.name)
        axes.set(title=stage, xlabel="optimiser steps", ylabel="training loss")
        if stage == "finetune":
            axes.set_yscale("log")
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def _labels(labels: dict[str, Any] | None) -> str:
    if labels is None:
        return "-"
    if labels["count"] is not None:
        return f"{labels['count']} images"
    return "all" if labels["ratio"] is None else f"{labels['ratio']:.0%}"


def _test_metrics(run: Path) -> dict[str, Any]:
    path = run / "evaluation" / "metrics.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what `evaluation test` writes ({error!r}); run it again") from error
