"""The table of an experiment, and how it is written down. Imports neither torch nor matplotlib."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

BASELINE = "mean pose "
FIXED = ("stage", "source", "metric", "mean", "std", "n", "expected", "protocol", "values")


@dataclass(frozen=True)
class Measured:
    """What one job measured."""

    job: str
    seeds: dict[str, Any]
    """Dotted field to value, of the axes that are seeds."""
    metrics: dict[str, float | None]
    """None where a metric had nothing to measure."""


@dataclass(frozen=True)
class Summary:
    """One metric over the seeds of a row."""

    mean: float | None
    std: float | None
    """Sample standard deviation (n - 1); None of a single value."""
    values: list[tuple[Measured, float]]

    @property
    def n(self) -> int:
        """Values that there are; a metric that is null is none."""
        return len(self.values)


@dataclass(frozen=True)
class Row:
    """The jobs of one stage that differ in nothing but seeds and were measured by one protocol."""

    stage: str
    source: Literal["evaluation", "own validation"]
    """Who measured: an evaluation command, or the training stage itself on its validation set."""
    axes: dict[str, Any]
    """Dotted field to value, without seeds."""
    expected: int
    """Jobs that the plan has with these axes."""
    protocol: int | None
    """Its number, from 1; None where nothing is measured yet."""
    measured: list[Measured]

    def summary(self, metric: str) -> Summary:
        """Mean and spread of a metric."""
        values = [(one, value) for one in self.measured if (value := one.metrics.get(metric)) is not None]
        numbers = [value for _, value in values]
        mean = statistics.mean(numbers) if numbers else None
        return Summary(mean, statistics.stdev(numbers) if len(numbers) > 1 else None, values)


@dataclass(frozen=True)
class Missing:
    """A job that gave no figures, and why."""

    name: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Table:
    """The figures of an experiment."""

    rows: list[Row]
    protocols: list[dict[str, Any]]
    """Number 1 first."""
    missing: list[Missing]
    linked: list[tuple[str, ...]]
    """Axes that were swept together."""

    @property
    def axes(self) -> list[str]:
        """Dotted fields that tell rows apart, in the order of the plan."""
        return list(dict.fromkeys(name for row in self.rows for name in row.axes))

    @property
    def metrics(self) -> list[str]:
        """Metrics that any row has a value of."""
        names = dict.fromkeys(name for row in self.rows for one in row.measured for name in one.metrics)
        return [name for name in names if any(row.summary(name).n for row in self.rows)]


def divisions(table: Table) -> list[str]:
    """One line for each group of jobs that was measured by several protocols, with what differs between them."""
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        groups.setdefault(canonical([row.stage, row.axes]), []).append(row)
    lines = []
    for rows in (rows for rows in groups.values() if len(rows) > 1):
        numbers = [row.protocol for row in rows if row.protocol is not None]
        protocols = [table.protocols[number - 1] for number in numbers]
        fields = dict.fromkeys(name for protocol in protocols for name in protocol)
        differing = [
            f"{name} {' / '.join(shown(protocol.get(name)) for protocol in protocols)}"
            for name in fields
            if len({canonical(protocol.get(name)) for protocol in protocols}) > 1
        ]
        lines.append(
            f"{described(rows[0])}: measured by protocols {' and '.join(map(str, numbers))} "
            f"({', '.join(differing) or 'null in one, absent in another'}), kept in separate rows"
        )
    return lines


def to_json(table: Table) -> dict[str, Any]:
    """{"rows": one per row and metric, "protocols": [{number, protocol}], "missing": [{name, stage, reason}]}."""
    return {
        "rows": [
            {
                "stage": row.stage,
                "source": row.source,
                "axes": row.axes,
                "metric": metric,
                "mean": (summary := row.summary(metric)).mean,
                "std": summary.std,
                "n": summary.n,
                "expected": row.expected,
                "protocol": row.protocol,
                "values": [{"job": one.job, "seeds": one.seeds, "value": value} for one, value in summary.values],
            }
            for row in table.rows
            for metric in dict.fromkeys(name for one in row.measured for name in one.metrics)
        ],
        "protocols": [
            {"number": number, "protocol": protocol} for number, protocol in enumerate(table.protocols, start=1)
        ],
        "missing": [{"name": job.name, "stage": job.stage, "reason": job.reason} for job in table.missing],
    }


def format_csv(table: Table) -> str:
    """A line per row and metric, a column per axis; empty where a stage has no such axis or a figure is undefined."""
    text = io.StringIO()
    columns = {name: f"axes.{name}" if name in FIXED else name for name in table.axes}
    writer = csv.DictWriter(text, [*FIXED[:2], *columns.values(), *FIXED[2:]], lineterminator="\n")
    writer.writeheader()
    for row in to_json(table)["rows"]:
        axes = {columns[name]: shown(value) for name, value in row.pop("axes").items()}
        writer.writerow({**row, **axes, "values": json.dumps(row["values"])})
    return text.getvalue()


def format_markdown(table: Table, *, by_joint: bool = True) -> str:
    """A line per row and a column per metric, the baseline's and the joints' in tables of their own; then the notes."""
    headings = {
        (False, False): "Mean ± sample standard deviation over the seeds.",
        (True, False): "The baseline: the mean pose of the training persons, placed in the same boxes.",
        (False, True): "By joint.",
        (True, True): "The baseline by joint.",
    }
    blocks = []
    for kind, heading in headings.items():
        metrics = [name for name in table.metrics if (name.startswith(BASELINE), "/" in name) == kind]
        if (metrics or not blocks) and (by_joint or not kind[1]):
            rows = [row for row in table.rows if not blocks or any(row.summary(name).n for name in metrics)]
            blocks += [heading, _markdown_table(table, rows, metrics)]
    if any(row.source == "own validation" for row in table.rows):
        blocks.append(
            "(own validation): measured by the training stage itself on its validation set; no evaluation follows it."
        )
    if table.protocols:
        blocks.append(
            "\n".join(f"- protocol {number}: {text}" for number, text in enumerate(protocol_lines(table), start=1))
        )
    if table.missing:
        lines = [f"- {job.name}: {job.reason}" for job in table.missing]
        blocks.append("\n".join([f"Missing ({len(table.missing)}):", "", *lines]))
    return "\n\n".join(blocks)


def _markdown_table(table: Table, rows: Sequence[Row], metrics: Sequence[str]) -> str:
    lines = [["stage", *table.axes, "n", *metrics, "protocol"]]
    for row in rows:
        n = len(row.measured)
        cells = [row.stage if row.source == "evaluation" else f"{row.stage} (own validation)"]
        cells += [shown(row.axes[name]) if name in row.axes else "-" for name in table.axes]
        cells.append(str(n) if n == row.expected else f"{n} of {row.expected}")
        cells += [_cell(row.summary(metric), n) for metric in metrics]
        lines.append([*cells, "-" if row.protocol is None else str(row.protocol)])
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    escaped.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in escaped
    )


def _cell(summary: Summary, n: int) -> str:
    """`0.412 ± 0.013`; with its own n where a metric is undefined for some of the row's jobs."""
    if summary.mean is None:
        return "-"
    digits = 3 if abs(summary.mean) < 10 else 1
    spread = "" if summary.std is None else f" ± {summary.std:.{digits}f}"
    return f"{summary.mean:.{digits}f}{spread}" + (f" (n = {summary.n})" if summary.n < n else "")


def protocol_lines(table: Table) -> list[str]:
    return [
        ", ".join(f"{name} {shown(value)}" for name, value in protocol.items()) or "not stated"
        for protocol in table.protocols
    ]


def described(row: Row) -> str:
    return ", ".join([row.stage, *(f"{name}={shown(value)}" for name, value in row.axes.items())])


def shown(value: Any) -> str:
    """A value as YAML has it: text as it is, null, true, lists."""
    return value if isinstance(value, str) else json.dumps(value)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def last_part(name: str) -> str:
    return name.rpartition(".")[2]
