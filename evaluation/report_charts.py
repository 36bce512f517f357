"""Charts as SVG, to be put into a page: small, with a text alternative, legible on a phone. Imports no torch.

Every chart is `WIDTH` units wide and is shown at about as many pixels. Colours are those of Okabe and Ito, which
colour-blind readers tell apart; lines differ by their dashes and marks by their shapes as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 360
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
POINTS = 300
"""Of a line, at most: more are not told apart."""
TEXT, GRID, AXIS = "#1a1a1a", "#dddddd", "#767676"
RIGHT, TOP, BOTTOM = 14, 10, 40
"""Around the area of a line chart; the left margin holds the longest number."""
ROW = 19
"""Height of a row of a bar or dot chart."""
BESIDE = 20
"""Letters of a name that find room at the left; longer ones are written above a bar."""
LETTER = 7.0
"""Width of a letter, a generous mean."""


class Line(NamedTuple):
    """One line of a chart."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int
    """Colour, dashes and mark, from 0; lines of one style are told apart by their tooltips."""


class Dots(NamedTuple):
    """One mark in each row of a chart."""

    label: str
    values: Sequence[float | None]
    style: int


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    *,
    description: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    marks: bool = False,
    diagonal: bool = False,
) -> str:
    """Lines over a common x, the title naming what they show; `log`: of positive values, on a logarithmic scale.

    A range that is not given is that of the values.
    """
    height = 236
    low, high = x_range or _range([x for line in lines for x in line.xs])
    bottom, top = y_range or _range([y for line in lines for y in line.ys], log=log)
    rungs = log_ticks(bottom, top) if log else ticks(bottom, top)
    left = 12 + LETTER * max((len(number(rung)) for rung in rungs), default=0)

    def place(x: float, y: float) -> tuple[float, float]:
        along = (math.log(y / bottom) / math.log(top / bottom)) if log else (y - bottom) / (top - bottom)
        return (
            left + (x - low) / (high - low) * (WIDTH - left - RIGHT),
            height - BOTTOM - along * (height - TOP - BOTTOM),
        )

    parts = []
    for tick in rungs:
        _, y = place(low, tick)
        parts.append(_rule(left, y, WIDTH - RIGHT, y, GRID))
        parts.append(_text(left - 5, y + 4, number(tick), "end"))
    for tick in ticks(low, high, 5):
        x, _ = place(tick, bottom)
        parts.append(_rule(x, height - BOTTOM, x, height - BOTTOM + 4, AXIS))
        parts.append(_tick_text(x, height - BOTTOM + 16, tick))
    parts.append(_rule(left, height - BOTTOM, WIDTH - RIGHT, height - BOTTOM, AXIS))
    if diagonal:
        parts.append(_rule(*place(low, low), *place(high, high), AXIS, "3 3"))
    for line in lines:
        points = [place(x, y) for x, y in thinned(list(zip(line.xs, line.ys, strict=True)))]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        colour, dashes = COLOURS[line.style % len(COLOURS)], DASHES[line.style // len(COLOURS) % len(DASHES)]
        drawn = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.7"{_dashed(dashes)}/>'
        if marks or len(points) == 1:
            drawn += "".join(mark(x, y, line.style) for x, y in points)
        parts.append(f"<g><title>{escape(line.label)}</title>{drawn}</g>")
    parts.append(_text((left + WIDTH - RIGHT) / 2, height - 6, x_label, "middle"))
    return figure(title, "".join(parts), height, description)


def dot_chart(title: str, rows: Sequence[str], dots: Sequence[Dots], x_label: str, *, description: str) -> str:
    """A row for each name, a mark in it for each of `dots`, from 0 or the least value below on."""
    left = _margin(rows)
    values = [value for its in dots for value in its.values if value is not None]
    low, high = min([0.0, *values]), max([1e-3, *values])
    height = ROW * len(rows) + 46

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT)

    parts = []
    for tick in ticks(low, high, 4):
        parts.append(_rule(place(tick), 4, place(tick), height - 40, GRID))
        parts.append(_tick_text(place(tick), height - 26, tick))
    for row, name in enumerate(rows):
        y = 4 + ROW * (row + 0.5)
        parts.append(_rule(left, y, WIDTH - RIGHT, y, GRID))
        parts.append(_text(left - 6, y + 4, _fitted(name, left), "end"))
    for place_in_row, its in enumerate(dots):
        aside = (place_in_row - (len(dots) - 1) / 2) * min(3.0, 10 / len(dots))  # so that equal values are all seen
        marks = [
            f"<g><title>{escape(f'{its.label}, {name}: {number(value)}')}</title>"
            f"{mark(place(value), 4 + ROW * (row + 0.5) + aside, its.style)}</g>"
            for row, (name, value) in enumerate(zip(rows, its.values, strict=True))
            if value is not None
        ]
        parts += marks
    parts.append(_text((left + WIDTH - RIGHT) / 2, height - 6, x_label, "middle"))
    return figure(title, "".join(parts), height, description)


def bar_chart(
    title: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    names: Sequence[str],
    colours: Sequence[str],
    *,
    description: str,
) -> str:
    """Rows of shares that add up to 1 at most, beside each other in the order of `names`, told where there is room."""
    above = max((len(label) for label, _ in rows), default=0) > BESIDE
    left = 2 if above else _margin([name for name, _ in rows])
    room = WIDTH - left - RIGHT
    step = 2 * ROW if above else ROW
    height = step * len(rows) + 26
    parts = []
    for row, (label, shares) in enumerate(rows):
        top, x = 4 + step * row + (ROW - 4 if above else 0), float(left)
        if above:
            parts.append(_text(left, top - 4, _fitted(label, WIDTH), "start"))
        else:
            parts.append(_text(left - 6, top + 12, _fitted(label, left), "end"))
        for name, share, colour in zip(names, shares, colours, strict=True):
            width = share * room
            told = f"<title>{escape(f'{label}, {name}: {share:.1%}')}</title>"
            parts.append(
                f'<g>{told}<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{ROW - 4}" fill="{colour}" '
                'stroke="#ffffff" stroke-width="0.8"/></g>'
            )
            if width >= 26:
                parts.append(_text(x + width / 2, top + 11.5, f"{100 * share:.0f}", "middle", f'fill="{ink(colour)}"'))
            x += width
    for tick in (0.0, 0.5, 1.0):
        anchor = {0.0: "start", 1.0: "end"}.get(tick, "middle")
        parts.append(_text(left + tick * room, height - 6, f"{100 * tick:.0f} %", anchor))
    return figure(title, "".join(parts), height, description)


def figure(title: str, body: str, height: float, description: str) -> str:
    """A drawing with its heading and its text alternative."""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(f"{title}. {description}")}">'
        f"{body}</svg></figure>"
    )


def legend(labels: Sequence[tuple[str, int]], *, marks: bool = False) -> str:
    """What the styles of the charts beside it stand for: (label, style)."""
    items = []
    for label, style in labels:
        colour, dashes = COLOURS[style % len(COLOURS)], DASHES[style // len(COLOURS) % len(DASHES)]
        line = f'<line x1="1" y1="6" x2="29" y2="6" stroke="{colour}" stroke-width="2"{_dashed(dashes)}/>'
        drawn = mark(15, 6, style) if marks else line
        items.append(f'<li><svg viewBox="0 0 30 12" aria-hidden="true">{drawn}</svg>{escape(label)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def colour_legend(names: Sequence[str], colours: Sequence[str]) -> str:
    """What the colours of bars stand for, in their order."""
    items = [
        f'<li><svg viewBox="0 0 30 12" aria-hidden="true"><rect x="2" width="26" height="12" fill="{colour}"/></svg>'
        f"{escape(name)}</li>"
        for name, colour in zip(names, colours, strict=True)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def mark(x: float, y: float, style: int) -> str:
    """A mark of a style's colour and of a shape that goes with it."""
    colour, size = COLOURS[style % len(COLOURS)], 4.5
    shapes = {
        0: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"',
        1: f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"',
        2: _polygon((x, y - size), (x + size, y + 3.6), (x - size, y + 3.6)),
        3: _polygon((x, y - 5), (x + 5, y), (x, y + 5), (x - 5, y)),
        4: _polygon((x, y + size), (x + size, y - 3.6), (x - size, y - 3.6)),
        5: _polygon((x - 4.5, y - 2), (x + 4.5, y - 2), (x + 4.5, y + 2), (x - 4.5, y + 2)),
        6: _polygon((x - 2, y - 4.5), (x + 2, y - 4.5), (x + 2, y + 4.5), (x - 2, y + 4.5)),
    }
    filled = f'fill="{colour}" stroke="#ffffff"'
    hollow = f'fill="#ffffff" stroke="{colour}"'
    paint = filled if style < len(COLOURS) else hollow
    return f'{shapes[style % len(COLOURS)]} {paint} stroke-width="{1 if style < len(COLOURS) else 1.8}"/>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count`."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * tick, 12) for tick in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from `low` to `high`, the powers alone where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    every = max(1, len(powers) // 6)
    found = [factor * 10.0**power for power in powers[::every] for factor in factors]
    return [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def number(value: float) -> str:
    """Up to four significant digits, as short as may be: 1,200 and 0.05 and 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` of them, evenly spread, the first and the last among them."""
    if len(points) <= POINTS:
        return points
    return [points[round(row * (len(points) - 1) / (POINTS - 1))] for row in range(POINTS)]


def ink(colour: str) -> str:
    """Black or white, what stands out more on a colour `#RRGGBB` (contrast as WCAG 2 has it)."""
    levels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def _range(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """From the least to the greatest value with a little room, none of no width."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if log:
        return low / 1.08, high * 1.08
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - (room if low else 0.0), high + room


def _margin(names: Sequence[str]) -> int:
    """Room for the longest of the names at the left, up to a limit."""
    return round(min(154, 14 + LETTER * max((len(name) for name in names), default=0)))


def _fitted(name: str, left: float) -> str:
    """A name, its middle left out where it is longer than the margin."""
    most = max(5, int((left - 12) / LETTER))
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    fill = "" if "fill=" in more else f' fill="{TEXT}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{fill} {more}>{escape(text)}</text>'


def _tick_text(x: float, y: float, tick: float) -> str:
    """Below its tick, and within the chart."""
    text = number(tick)
    return _text(min(x, WIDTH - 1 - LETTER / 2 * len(text)), y, text, "middle")


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{_dashed(dashes)}/>'


def _dashed(dashes: str) -> str:
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _polygon(*points: tuple[float, float]) -> str:
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"'
