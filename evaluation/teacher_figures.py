"""What a teacher of `semi` does over the steps: how much it teaches, how sure it is, and what becomes of the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from poserelay.errors import UserError
from poserelay.run import read_config, read_metrics

from .cir_figures import short_name
from .curves import distinct_names

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
DEFAULT_GAMMA = {"pseudo": 0.75, "distill": 0.75}
"""Of the teachers that a run's configuration may leave at their default; the others' is 0."""
SHARES = {"kept": ("joints taught", "solid"), "agreement": ("student agrees", "dashed")}
LOSSES = {"supervised": ("labelled", "solid"), "unlabelled": ("unlabelled", "dashed")}
CONTRASTS = {"skcc": ("SKCC", "solid"), "prcc": ("PRCC", "dashed")}
PEAKS = {"peak_q50": ("unlabelled, median", "solid"), "labelled_peak": ("labelled, mean", "dashed")}
PRECISION = {
    "AP": ("exported network", "solid"),
    "mean AP": ("mean of both networks", "dashed"),
    "teacher AP": ("trained teacher", "dotted"),
}


class Lesson(NamedTuple):
    """What a run of `semi` has logged."""

    run: Path
    teacher: str
    gamma: float
    """The confidence above which a joint is taught; 0: all are."""
    steps: np.ndarray
    """`[S]`."""
    logged: dict[str, np.ndarray]
    """Each `[S]`, NaN where it was not logged; without what never was."""
    validated: np.ndarray
    """`[V]`, steps."""
    precision: dict[str, np.ndarray]
    """`[V]`, AP on the validation set, likewise."""


def draw_teacher(runs: list[Path]) -> Figure:
    """A panel for the shares that are taught and agreed on, one for the peaks' height, one for the losses; and where
    runs have them one for ICON's contrast and one for the validation set's AP.

    A run has a colour, what is measured a style. Raises UserError for a run that has no teacher, or no row yet.
    """
    lessons = [read_lesson(run) for run in runs]
    panels: list[tuple[str, str, dict[str, Any]]] = [
        ("how much is taught", "share of the unlabelled joints", SHARES),
        ("how high the peaks are", "height of a heatmap's peak", PEAKS),
        ("heatmap losses", "mean squared error", LOSSES),
    ]
    if any(name in its.logged for its in lessons for name in CONTRASTS):
        panels.append(("ICON's contrast", "loss", CONTRASTS))
    if any(len(its.validated) for its in lessons):
        panels.append(("validation set", "AP", PRECISION))
    across = 2 if len(panels) == 4 else 3
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.3 * across, 3.7 * down + 0.4), layout="constrained")
    cells = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (title, label, named) in zip(cells, panels, strict=False):
        for colour, its in zip(colours_of(lessons), lessons, strict=True):
            draw_curves(axes, its, named, colour)
        styled = [Line2D([], [], color="black", linestyle=style, label=text) for text, style in named.values()]
        if named is PEAKS and any(its.gamma > 0 for its in lessons):
            styled.append(Line2D([], [], color="black", linestyle="dotted", label="taught above"))
        axes.legend(handles=styled, fontsize=8, framealpha=0.7)
        axes.set(title=title, xlabel="steps", ylabel=label)
        axes.grid(alpha=0.3)
    for axes in cells[:2]:
        axes.set_ylim(0, 1.02)
    cells[2].set_yscale("log")
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    names = distinct_names([run.name for run in runs], [f"{run.parent.name}/{run.name}" for run in runs])
    lines = [
        Line2D([], [], color=colour, linewidth=3, label=f"{short_name(name, 44)} ({its.teacher})")
        for colour, name, its in zip(colours_of(lessons), names, lessons, strict=True)
    ]
    columns = max(1, min(3, 70 // max(len(str(line.get_label())) for line in lines)))
    figure.legend(handles=lines, ncols=columns, fontsize=9, loc="outside lower center")
    return figure


def draw_curves(axes: Axes, lesson: Lesson, named: dict[str, Any], colour: str) -> None:
    """The curves of a run in one panel; of peaks also where the middle 80 % are, and what is taught from."""
    steps, values = (lesson.validated, lesson.precision) if named is PRECISION else (lesson.steps, lesson.logged)
    for name, (_, style) in named.items():
        if name in values:
            axes.plot(steps, values[name], color=colour, linestyle=style, linewidth=1.4, gid=name)
    if named is PEAKS:
        axes.fill_between(steps, values["peak_q10"], values["peak_q90"], color=colour, alpha=0.13, linewidth=0)
        if lesson.gamma > 0:
            axes.axhline(lesson.gamma, color=colour, linestyle="dotted", linewidth=1.4, gid="gamma")


def colours_of(lessons: Sequence[Lesson]) -> list[str]:
    """A colour for each run."""
    return [COLOURS[number % len(COLOURS)] for number in range(len(lessons))]


def read_lesson(run: Path) -> Lesson:
    """What a run of `semi` has logged. Raises UserError: no run, none with a teacher, or one that has not begun."""
    chosen: Any = read_config(run).get("teacher")
    rows = read_metrics(run / "metrics.jsonl")
    trained = [row for row in rows if row["kind"] == "train"]
    if not isinstance(chosen, dict) or chosen.get("name") in (None, "none"):
        raise UserError(f"{run}: a run without a teacher; give the run_dir of python -m semi with --teacher")
    if not any("kept" in row for row in trained):
        raise UserError(f"{run}: has not logged what its teacher does; give the run_dir of a training that has begun")
    gamma = (chosen.get("kwargs") or {}).get("gamma", DEFAULT_GAMMA.get(chosen["name"], 0.0))
    validated = [row for row in rows if row["kind"] == "validation"]
    wanted = [*SHARES, *LOSSES, *CONTRASTS, *PEAKS, "peak_q10", "peak_q90"]
    return Lesson(
        run,
        str(chosen["name"]),
        float(gamma),
        np.array([row["step"] for row in trained]),
        columns(trained, wanted),
        np.array([row["step"] for row in validated]),
        columns(validated, list(PRECISION)),
    )


def columns(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The numbers of the rows by name, NaN where a row has none; without names that none has."""
    found = {name: np.array([as_number(row.get(name)) for row in rows], dtype=np.float64) for name in names}
    return {name: values for name, values in found.items() if np.isfinite(values).any()}


def as_number(value: Any) -> float:
    """A logged number, NaN for anything else."""
    return float(value) if isinstance(value, int | float) else math.nan
