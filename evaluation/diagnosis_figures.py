"""The charts of a diagnosis, each of `diagnose.diagnose`'s dict or of diagnosis.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

matplotlib.use("agg")

ERRORS = {
    "jitter": ("#8CC5E3", ""),
    "inversion": ("#E69F00", "///"),
    "miss": ("#35475B", ""),
    "swap": ("#CC6699", "..."),
}
"""Colour and hatch of each kind: told apart by colour-blind eyes, and in grey."""
BAR, LINE, QUIET = "#0072B2", "#D55E00", "#6B6B6B"
GAINS = {
    "jitter": "jitter",
    "inversion": "inversions",
    "miss": "misses",
    "swap": "swaps",
    "score": "scores",
    "background_fp": "background false positives",
    "background_fn": "persons nobody found",
}
BREAKDOWNS = {
    "size": "size (COCO's areas)",
    "crowding": "persons whose box overlaps (IoU > 0.1)",
    "visible_joints": "labelled joints",
}


def overview(diagnosis: Mapping[str, Any]) -> Figure:
    """All four on one page."""
    tall = max(6.2, 1.5 + 0.27 * (1 + len(diagnosis["errors"]["joints"])))
    figure = Figure(figsize=(12.4, tall + 3.7), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(tall, 3.3), hspace=0.02)
    top, bottom = halves
    left, right = top.subfigures(1, 2, wspace=0.02)
    upper, lower = right.subfigures(2, 1, height_ratios=(2.8, 3.4), hspace=0.02)
    draw_errors(left, diagnosis)
    draw_gains(upper, diagnosis)
    draw_reliability(lower, diagnosis)
    draw_breakdown(bottom, diagnosis)
    protocol = diagnosis["protocol"]
    source = f"{protocol['predictions']} on {protocol['split']}" if "predictions" in protocol else protocol["split"]
    figure.suptitle(
        f"{source}: AP {_fraction(diagnosis['metrics']['AP'])}, {protocol['matched']:,} of "
        f"{protocol['instances']:,} persons found, {diagnosis['errors']['labels']:,} labelled joints",
        fontsize=11,
    )
    return figure


def draw_errors(figure: Figure | SubFigure, diagnosis: Mapping[str, Any]) -> None:
    """The shares of each kind of error of every joint, stacked; the share of good joints beside each bar."""
    errors = diagnosis["errors"]
    rows = {"all joints": {**errors["all"], "labels": errors["labels"]}, **errors["joints"]}
    axes = figure.subplots()
    _stack(axes, list(rows.values()))
    axes.set_yticks(range(len(rows)), [_plain(name) for name in rows])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.axhline(0.5, color=QUIET, linewidth=0.6)
    most = _widest(rows.values())
    for place, its in enumerate(rows.values()):
        text = "not labelled" if its["good"] is None else f"{100 * its['good']:.1f} % good"
        end = 0 if its["good"] is None else 1 - its["good"]
        axes.text(end + 0.015 * most, place, text, va="center", fontsize=7.5, color=QUIET)
    _limit(axes, most, 1.22)
    axes.set_title("Localisation errors", fontsize=10)
    axes.set_xlabel("share of the labelled joints of the persons found", fontsize=9)
    _legend(figure, "outside lower center")


def draw_gains(figure: Figure | SubFigure, diagnosis: Mapping[str, Any]) -> None:
    """The AP that correcting each kind of error alone would gain."""
    found = [diagnosis["gains"][name]["AP"] for name in GAINS]
    axes = figure.subplots()
    values = [value or 0.0 for value in found]
    axes.barh(range(len(found)), values, 0.68, color=BAR)
    axes.set_yticks(range(len(found)), list(GAINS.values()), fontsize=8.5)
    axes.invert_yaxis()
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.22 * ((high - low) or 1.0)
    for place, (value, shown) in enumerate(zip(found, values, strict=True)):
        text = "not measured" if value is None else f"{value:+.3f}"
        right = shown >= 0
        axes.annotate(
            text,
            (shown, place),
            (4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8,
        )
    axes.set_xlim(low - room * (low < 0), high + room)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_title(f"What correcting it alone gains (AP {_fraction(diagnosis['metrics']['AP'])})", fontsize=10)
    axes.set_xlabel("AP gained", fontsize=9)
    _quiet(axes, "x")


def draw_reliability(figure: Figure | SubFigure, diagnosis: Mapping[str, Any]) -> None:
    """Mean OKS against mean score of the bins of the calibration, and how many poses each holds."""
    its = diagnosis["calibration"]
    bins = its["bins"]
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    middle = [(low + high) / 2 for low, high in ((found["low"], found["high"]) for found in bins)]
    width = 0.92 * (bins[0]["high"] - bins[0]["low"] or 1.0)
    having = [found for found in bins if found["poses"]]
    upper.bar(middle, [found["oks"] or 0.0 for found in bins], width, color=BAR, alpha=0.28)
    upper.plot([f["score"] for f in having], [f["oks"] for f in having], "o-", color=BAR, markersize=4, linewidth=1.4)
    if its["error"] is not None:
        upper.plot([0, 1], [0, 1], color=LINE, linewidth=1.1, linestyle=(0, (4, 3)), label="score = OKS")
        upper.legend(loc="upper left", fontsize=8, frameon=False)
    upper.set_xlim(bins[0]["low"] - 0.04 * width, bins[-1]["high"] + 0.04 * width)
    upper.set_ylim(0, 1)
    upper.set_ylabel("mean OKS", fontsize=9)
    lower.bar(middle, [found["poses"] for found in bins], width, color=QUIET)
    lower.set_ylabel("poses", fontsize=9)
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.set_xlabel("score", fontsize=9)
    error = "not measured (scores outside 0..1)" if its["error"] is None else f"{its['error']:.3f}"
    spearman = "-" if its["spearman"] is None else f"{its['spearman']:+.3f}"
    upper.set_title(f"Scores: calibration error {error}, Spearman {spearman}", fontsize=10)
    for axes in (upper, lower):
        _quiet(axes, "y")


def draw_breakdown(figure: Figure | SubFigure, diagnosis: Mapping[str, Any]) -> None:
    """The shares of each kind of error, and AR, by size, by crowding and by labelled joints."""
    panels: Sequence[Axes] = figure.subplots(1, len(BREAKDOWNS), sharex=True)
    for axes, (key, title) in zip(panels, BREAKDOWNS.items(), strict=True):
        rows = diagnosis["by"][key]
        _stack(axes, rows)
        counts = [f"{its['persons']:,} person{'s' * (its['persons'] != 1)}" for its in rows]
        names = [f"{its['name']}\n{count}" for its, count in zip(rows, counts, strict=True)]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.set_title(title, fontsize=9.5)
    most = _widest(its for key in BREAKDOWNS for its in diagnosis["by"][key])
    for axes, key in zip(panels, BREAKDOWNS, strict=True):
        for place, its in enumerate(diagnosis["by"][key]):
            end = 0 if its["good"] is None else 1 - its["good"]
            # Not AP, which counts the poses of nobody against every group.
            text = "nobody" if not its["persons"] else f"AR {_fraction(its['AR'], 3)}"
            axes.text(end + 0.02 * most, place, text, va="center", fontsize=8)
        _limit(axes, most, 1.36)
    panels[1].set_xlabel("share of the labelled joints of the persons found", fontsize=9)
    _legend(figure, "outside lower center")


def _widest(rows: Iterable[Mapping[str, Any]]) -> float:
    """The longest bar, and of no errors at all not 0."""
    return max([0.01, *(1 - its["good"] for its in rows if its["good"] is not None)])


def _stack(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Horizontal bars of the four kinds of error, the first row on top."""
    left = np.zeros(len(rows))
    for kind, (colour, hatch) in ERRORS.items():
        values = np.array([its[kind] or 0.0 for its in rows])
        axes.barh(
            range(len(rows)), values, 0.72, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5
        )
        left += values
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _quiet(axes, "x")


def _limit(axes: Axes, most: float, room: float) -> None:
    """Room for a text after the longest bar, without ticks there."""
    axes.set_xlim(0, room * most)
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, most)
    ticks = [tick for tick in ticks if 0 <= tick <= min(1.0, 1.1 * most)]
    axes.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])


def _legend(figure: Figure | SubFigure, place: Any) -> None:
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=kind)
        for kind, (colour, hatch) in ERRORS.items()
    ]
    figure.legend(handles=handles, loc=place, ncols=len(handles), fontsize=8.5, frameon=False)


def _quiet(axes: Axes, axis: Any) -> None:
    axes.grid(axis=axis, alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)


def _plain(joint: str) -> str:
    return joint.replace("_", " ")


def _fraction(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
