"""Learning curves over the number of labels. Imports matplotlib only to draw."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .table import BASELINE, Row, Table, canonical, last_part, protocol_lines, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
STYLES = ("solid", "dashed", "dotted", "dashdot")
MARKERS = "osD^vP"


def curve_axis(table: Table) -> str | None:
    """The axis that learning curves run over: the first ratio or count with two measured values, None without one."""
    rows = [row for row in table.rows if _main_metrics([row])]
    for axis in (axis for axis in table.axes if last_part(axis) in ("ratio", "count")):
        if len({_position(row, axis) for row in rows} - {None}) > 1:
            return axis
    return None


def plot_curves(table: Table, axis: str) -> Figure:
    """Metric over labels, one line per stage, protocol and other axes: mean, ± std, the single seeds as faint dots."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = _lines(table, axis)
    metrics = _main_metrics([row for rows in lines.values() for row in rows])
    xs, ticks = _places(lines, axis)
    width = 1.2 + 4.6 * len(metrics)
    labels = [textwrap.fill(label, int(14 * width)) for label in _labels(lines)]
    columns = max(1, min(len(labels) + 1, int(width / (0.6 + 0.066 * max(map(len, labels))))))
    caption = _caption(table, axis, lines, int(23 * width))
    height = 3.8 + 0.17 * (sum(label.count("\n") + 1 for label in labels) + 1) / columns + 0.11 * len(caption)
    figure = Figure(figsize=(width, height), layout="constrained")
    baseline = False
    for metric, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True):
        for number, (rows, shift) in enumerate(zip(lines.values(), _shifts(ticks, len(lines)), strict=True)):
            _draw_line(axes, [(xs[_position(row, axis)] * shift, row) for row in rows], metric, _style(number), axis)
        baseline |= _draw_baseline(axes, lines, metric, xs, axis)
        margin = (max(ticks) / min(ticks)) ** 0.07
        axes.set(xlabel=_axis_label(axis), ylabel=metric, xscale="log")
        axes.set_xlim(min(ticks) / margin, max(ticks) * margin)
        axes.minorticks_off()
        axes.set_xticks(list(ticks), _thinned(ticks))
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], **_style(number), label=label) for number, label in enumerate(labels)]
    if baseline:
        handles.append(Line2D([], [], color="0.4", linestyle="--", linewidth=0.8, label="mean pose"))
    figure.legend(handles=handles, ncols=columns, fontsize=8, loc="outside upper left", frameon=False)
    figure.supxlabel("\n".join(caption), x=0.01, ha="left", fontsize=6, color="0.35", linespacing=1.3)
    return figure


def _draw_line(axes: Axes, points: list[tuple[float, Row]], metric: str, style: dict[str, Any], axis: str) -> None:
    summaries = [(x, row.summary(metric)) for x, row in points]
    for x, summary in summaries:
        axes.plot([x] * summary.n, [value for _, value in summary.values], ".", color=style["color"], alpha=0.35, ms=8)
    # All the images, of an unknown number, are no point of a scale of counts: shown, not joined.
    joined = [_position(row, axis) != math.inf for _, row in points]
    for is_joined, line in ((True, style), (False, {**style, "linestyle": "none"})):
        group = [one for one, its in zip(summaries, joined, strict=True) if its == is_joined and one[1].n]
        if group:
            axes.errorbar(
                [x for x, _ in group],
                [math.nan if s.mean is None else s.mean for _, s in group],
                yerr=[math.nan if s.std is None else s.std for _, s in group],
                capsize=2.5,
                **line,
            )


def _draw_baseline(
    axes: Axes, lines: Mapping[Any, list[Row]], metric: str, xs: Mapping[float | None, float], axis: str
) -> bool:
    """The mean pose's metric, a line per protocol, right across where the labels do not change it."""
    found: dict[int | None, dict[float, list[float]]] = {}
    for row in (row for rows in lines.values() for row in rows):
        values = [value for _, value in row.summary(BASELINE + metric).values]
        found.setdefault(row.protocol, {}).setdefault(xs[_position(row, axis)], []).extend(values)
    drawn = False
    for places in found.values():
        means = {x: statistics.mean(values) for x, values in sorted(places.items()) if values}
        if len({value for values in places.values() for value in values}) == 1:
            axes.axhline(next(iter(means.values())), color="0.4", linestyle="--", linewidth=0.8)
        elif means:
            axes.plot(list(means), list(means.values()), color="0.4", linestyle="--", linewidth=0.8)
        drawn |= bool(means)
    return drawn


def _lines(table: Table, axis: str) -> dict[tuple[Any, ...], list[Row]]:
    """Measured rows by what tells lines apart, each line in rising order of `axis`."""
    rows = [row for row in table.rows if _main_metrics([row]) and _position(row, axis) is not None]
    following = _following(table, axis)
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        others = {name: value for name, value in row.axes.items() if name != axis and name not in following}
        lines.setdefault((row.stage, row.source, canonical(others), row.protocol), []).append(row)
    return {key: sorted(line, key=lambda row: _position(row, axis) or 0) for key, line in lines.items()}


def _following(table: Table, axis: str) -> list[str]:
    """Axes swept together with `axis` that have one value for each of its values."""
    linked = dict.fromkeys(name for names in table.linked if axis in names for name in names if name != axis)
    following = []
    for name in linked:
        values: dict[str, set[str]] = {}
        for row in (row for row in table.rows if axis in row.axes):
            values.setdefault(canonical(row.axes[axis]), set()).add(canonical(row.axes.get(name)))
        if all(len(found) == 1 for found in values.values()):
            following.append(name)
    return following


def _position(row: Row, axis: str) -> float | None:
    """The row's value of `axis`; where it is null and chooses nothing else, all images: 1 of a ratio, infinitely many
    of a count. None for what has no place on a logarithmic scale."""
    value = row.axes.get(axis, "")
    if value is None:
        folder = axis.rpartition(".")[0]
        others = [f"{folder}.{name}" if folder else name for name in ("ratio", "count", "file")]
        if any(row.axes.get(name) is not None for name in others):
            return None
        return 1.0 if last_part(axis) == "ratio" else math.inf
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    return float(value) if is_number else None


def _places(lines: Mapping[Any, list[Row]], axis: str) -> tuple[dict[float | None, float], dict[float, str]]:
    """Where each value of `axis` is drawn, and the ticks' labels by place."""
    values = sorted({_position(row, axis) or 0 for rows in lines.values() for row in rows})
    finite = [value for value in values if value < math.inf]
    ratio = last_part(axis) == "ratio"
    places: dict[float | None, float] = {value: value for value in finite}
    ticks = {value: f"{value * 100:g} %" if ratio else f"{value:,.10g}" for value in finite}
    if len(finite) < len(values):
        places[math.inf] = 3 * finite[-1]
        ticks[3 * finite[-1]] = "all"
    return places, ticks


def _shifts(ticks: Mapping[float, str], count: int) -> list[float]:
    """Factors that set lines side by side, so that error bars do not cover each other nor reach the next tick."""
    logs = [math.log(place) for place in sorted(ticks)]
    closest = min(after - before for before, after in pairwise(logs))
    step = min(0.012 * (logs[-1] - logs[0]), 0.5 * closest / count)
    return [math.exp(step * (number - (count - 1) / 2)) for number in range(count)]


def _thinned(ticks: Mapping[float, str]) -> list[str]:
    """Labels of the ticks in rising order, left out where they would run into the one before."""
    kept: list[str] = []
    last, apart = -math.inf, 0.075 * math.log(max(ticks) / min(ticks))
    for place, label in ticks.items():
        clear = math.log(place) - last >= apart
        kept.append(label if clear else "")
        last = math.log(place) if clear else last
    return kept


def _main_metrics(rows: list[Row]) -> list[str]:
    """AP and PCK, or without them the first two that there are."""
    names = [
        name
        for name in dict.fromkeys(name for row in rows for one in row.measured for name in one.metrics)
        if not name.startswith(BASELINE) and any(row.summary(name).n for row in rows)
    ]
    return [name for name in ("AP", "PCK") if name in names] or names[:2]


def _labels(lines: Mapping[Any, list[Row]]) -> list[str]:
    """For the legend what tells each line from the others, and its seeds."""
    keys = list(lines)
    axes = [json.loads(others) for _, _, others, _ in keys]
    names = dict.fromkeys(name for one in axes for name in one)
    varied = [name for name in names if len({canonical(one.get(name, "")) for one in axes}) > 1]
    short = [last_part(name) for name in varied]
    titles = dict(zip(varied, short if len(set(short)) == len(short) else varied, strict=True))
    values = {name: _short_values([shown(one[name]) for one in axes if name in one]) for name in varied}
    several_stages = len({key[:2] for key in keys}) > 1
    several_protocols = len({key[3] for key in keys}) > 1
    labels = []
    for (stage, source, _, protocol), own, rows in zip(keys, axes, lines.values(), strict=True):
        parts = [stage if source == "evaluation" else f"{stage} (own validation)"]
        parts = parts if several_stages or not varied else []
        parts += [f"{titles[name]}={values[name][shown(own[name])]}" for name in varied if name in own]
        parts += [f"protocol {protocol}"] if several_protocols else []
        counts = sorted({len(row.measured) for row in rows})
        n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        if any(len(row.measured) < row.expected for row in rows):
            n += f" of {max(row.expected for row in rows)}"
        labels.append(f"{', '.join(parts)} (n = {n})")
    return labels


def _axis_label(axis: str) -> str:
    unit = "share of the images labelled" if last_part(axis) == "ratio" else "labelled images"
    return f"{unit} ({axis})" if axis.endswith(("labels.ratio", "labels.count")) else axis


def _caption(table: Table, axis: str, lines: Mapping[Any, list[Row]], width: int) -> list[str]:
    texts, following = protocol_lines(table), _following(table, axis)
    drawn = sorted({row.protocol for rows in lines.values() for row in rows if row.protocol is not None})
    caption = ["mean ± sample standard deviation over n seeds; pale dots: the single seeds"]
    caption += [f"each {axis} has its own {', '.join(following)}"] if following else []
    caption += [f"protocol {number}: {texts[number - 1]}" for number in drawn]
    return [line for text in caption for line in textwrap.wrap(text, width, subsequent_indent="  ")]


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": STYLES[number // len(COLOURS) % len(STYLES)],
        "linewidth": 1.3,
        "markersize": 4.5,
    }


def _short_values(values: Sequence[str], length: int = 36) -> dict[str, str]:
    """Each value without the folders that all paths among them share, at either end, and without its middle if long."""
    paths = {value: value.split("/") for value in values if "/" in value}
    while len(paths) > 1 and len({parts[0] for parts in paths.values()}) == 1 and min(map(len, paths.values())) > 1:
        paths = {value: parts[1:] for value, parts in paths.items()}
    while len(paths) > 1 and len({parts[-1] for parts in paths.values()}) == 1 and min(map(len, paths.values())) > 1:
        paths = {value: parts[:-1] for value, parts in paths.items()}
    short = {value: "/".join(paths.get(value, [value])) for value in values}
    half = length // 2 - 1
    return {value: text if len(text) <= length else f"{text[:half]}...{text[-half:]}" for value, text in short.items()}
