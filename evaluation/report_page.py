"""The page of a report: one HTML file that needs no network and no script. Imports no torch."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from .report_charts import COLOURS, DASHES, Dots, Line, colour_legend, dot_chart, legend, line_chart
from .report_diagnosis import (
    GAINS,
    GROUPINGS,
    KIND_COLOURS,
    KINDS,
    Diagnosis,
    calibration_chart,
    errors_chart,
    gains_chart,
    joints_chart,
    mean_diagnosis,
    parts_chart,
)
from .report_runs import BASELINE, OWN, Measured, RunRecord, canonical, comparable
from .report_style import STYLE

if TYPE_CHECKING:
    from .report_pictures import Gallery, Shown

HIGHER_IS_BETTER = re.compile(r"(mean |teacher )?(AP|AR|PCK|PCKh|AUC|top|accuracy|score-OKS)")
"""How the names of metrics begin that are marked where they are best."""
MAIN = ("AP", "PCK", "PCKh@0.5", "top1")
"""Of these the first two there are stand for all, as in the learning curves."""
SERIES = 8
"""Rows that a chart of dots holds; of more there is the table alone."""
LONG = 28
"""Letters of a cell from which on it is given room."""
WIDE = 9
"""Columns of a table; of more the headings are turned in print."""
COLUMNS = 6
"""Of a table of differences; more go to another one below it, so that all are legible in print."""
OPEN = 4
"""Evaluations whose details are unfolded; of more they are folded."""


class Closer(NamedTuple):
    """What a second look at an evaluation found."""

    diagnosis: Diagnosis | None
    gallery: Gallery | None


class Entry(NamedTuple):
    """An evaluation of a run, with what a second look at it found."""

    record: RunRecord
    measured: Measured
    closer: Closer

    @property
    def name(self) -> str:
        """Of the run, and of the evaluation where it has several."""
        return f"{self.record.name}: {self.measured.name}" if self.measured.name else self.record.name


class Row(NamedTuple):
    """Evaluations that differ in nothing but the seeds of their runs, by one protocol."""

    title: str
    protocol: int
    """Its number, from 1."""
    style: int
    entries: list[Entry]

    def values(self, metric: str) -> list[float]:
        """Of the entries that have one."""
        found = [entry.measured.metrics.get(metric) for entry in self.entries]
        return [value for value in found if value is not None]

    def mean(self, metric: str) -> float | None:
        """None where nothing was measured."""
        return statistics.fmean(values) if (values := self.values(metric)) else None


class Report(NamedTuple):
    """All that the page shows."""

    records: list[RunRecord]
    entries: list[Entry]
    rows: list[Row]
    protocols: list[tuple[str, dict[str, Any]]]
    """Number 1 first: evaluation or own validation, and the protocol."""
    styles: dict[str, int]
    """Of the groups of runs."""
    warnings: list[str]
    command: str
    version: str


def gather(
    records: Sequence[RunRecord],
    closer: Mapping[tuple[str, str], Closer],
    problems: Sequence[str],
    command: str,
    version: str,
) -> Report:
    """Number the protocols, and group the evaluations. closer: by the names of run and evaluation; problems: more."""
    entries = [
        Entry(record, measured, closer.get((record.name, measured.name), Closer(None, None)))
        for record in records
        for measured in record.measured
        if measured.metrics or measured.source != OWN
    ]
    protocols: dict[tuple[str, str], dict[str, Any]] = {}
    styles = {title: number for number, title in enumerate(dict.fromkeys(record.title for record in records))}
    grouped: dict[tuple[str, str, int], list[Entry]] = {}
    for entry in entries:
        key = (entry.measured.source, comparable(entry.measured.protocol))
        protocols.setdefault(key, entry.measured.protocol)
        place = list(protocols).index(key) + 1
        grouped.setdefault((entry.record.group, entry.measured.name, place), []).append(entry)
    rows: list[Row] = []
    for (_, name, place), members in grouped.items():
        title = members[0].record.title + (f": {name}" if name else "")
        taken = [row.title for row in rows]
        style = styles[members[0].record.title] if not name else styles.setdefault(title, len(styles))
        if title in taken:
            title = f"{title} (protocol {place})"
            style = styles.setdefault(title, len(styles))
        rows.append(Row(title, place, style, members))
    listed = [(source, protocol) for (source, _), protocol in protocols.items()]
    warnings = protocol_warnings(listed, rows)
    warnings += [f"{record.name}: {problem}" for record in records for problem in record.problems]
    warnings += [f"{record.name}: {record.state}" for record in records if record.state.startswith("unfinished")]
    return Report([*records], entries, rows, listed, styles, [*warnings, *problems], command, version)


def protocol_warnings(protocols: Sequence[tuple[str, Mapping[str, Any]]], rows: Sequence[Row]) -> list[str]:
    """One line for each protocol but the first of its kind: in what it differs from that one, and who it is of."""
    lines = []
    first: dict[str, int] = {}
    for place, (source, protocol) in enumerate(protocols, start=1):
        other = first.setdefault(source, place)
        if other == place:
            continue
        before = protocols[other - 1][1]
        names = differing([before, protocol])
        told = [f"{name} {shown(before.get(name))} / {shown(protocol.get(name))}" for name in names]
        who = ", ".join(row.title for row in rows if row.protocol == place)
        lines.append(
            f"Protocols {other} and {place} differ ({'; '.join(told)}): the metrics of {who} do not compare with those "
            f"by protocol {other}."
        )
    return lines


def differing(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields that are not the same in all; the baseline's apart, which the metrics of a model do not depend on."""
    names = dict.fromkeys(name for protocol in protocols for name in protocol if name != "baseline")
    return [name for name in names if len({canonical(protocol.get(name)) for protocol in protocols}) > 1]


def render(report: Report) -> str:
    """The page."""
    sections: list[tuple[str, str, Callable[[Report], str]]] = [
        ("runs", "Runs", runs_section),
        ("protocols", "Protocol", protocols_section),
        ("metrics", "Metrics", metrics_section),
        ("curves", "Learning curves", curves_section),
        ("joints", "Joint by joint", joints_section),
        ("diagnosis", "Diagnosis", diagnosis_section),
        ("calibration", "Score calibration", calibration_section),
        ("gallery", "Persons", gallery_section),
        ("differences", "What differs between the runs", differences_section),
        ("made", "How it was made", made_section),
    ]
    bodies = [(ident, heading, draw(report)) for ident, heading, draw in sections]
    there = [(ident, heading, body) for ident, heading, body in bodies if body]
    title = report.records[0].name if len(report.records) == 1 else f"{len(report.records)} runs"
    nav = "".join(f'<li><a href="#{ident}">{escape(heading)}</a></li>' for ident, heading, _ in there)
    main = "".join(
        f'<section id="{ident}" aria-labelledby="{ident}-h"><h2 id="{ident}-h">{escape(heading)}</h2>{body}</section>'
        for ident, heading, body in there
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        # Whatever a name may hold, the page loads nothing and runs nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Report: {escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>Report: {escape(title)}</h1>{lead(report)}</header>{warnings_box(report)}"
        f'<nav aria-label="Contents"><ul>{nav}</ul></nav><main>{main}</main></body></html>\n'
    )


def lead(report: Report) -> str:
    """What there is, and what is best, in a sentence or two."""
    states = [record.state for record in report.records]
    counts = {
        "finished": states.count("done"),
        "unfinished": sum(state not in ("done", "evaluation alone", "unknown") for state in states),
        "in a state that is not known": states.count("unknown"),
        "known by an evaluation alone": states.count("evaluation alone"),
    }
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    sentences = [f"{told[:1].upper()}{told[1:]}; {_counted(len(report.entries), 'evaluation')}."]
    metric = next((name for name in MAIN if any(row.values(name) for row in report.rows)), None)
    if metric is not None:
        best = best_rows(report.rows, metric)
        several = len({row.protocol for row in best}) > 1
        parts = [
            f"{cell(row, metric, digits_of(report.rows, metric))} ({row.title}"
            + (f", by protocol {row.protocol})" if several else ")")
            for row in best
        ]
        # Where all are alike none is best.
        sentences += (
            [f"{'Best ' if len(report.rows) > len(best) else ''}{metric}: {'; '.join(parts)}."] if parts else []
        )
    return f"<p>{escape(' '.join(sentences))}</p>"


def warnings_box(report: Report) -> str:
    """What a reader is to know first."""
    if not report.warnings:
        return ""
    items = "".join(f"<li>{breakable(line)}</li>" for line in report.warnings)
    many = len(report.warnings) > 6
    listed = f"<ul>{items}</ul>"
    if many:
        listed = f"<details><summary>{len(report.warnings)} notes</summary>{listed}</details>"
    return f'<aside class="warnings" aria-label="Take care"><h2>Take care</h2>{listed}</aside>'


def runs_section(report: Report) -> str:
    """What each run is."""
    head = ["run", "stage", "method", "backbone", "input", "starts from", "labels", "seed", "steps", "last loss"]
    rows = []
    for record in report.records:
        loss = record.curves.get("loss")
        steps = "-"
        if record.steps is not None:
            made, planned = record.steps
            steps = f"{made:,} of {'-' if planned is None else f'{planned:,}'}"
        cells = [record.stage, method_of(record.config), backbone_of(record.config), input_of(record.config)]
        cells += [origin_of(record.config), labels_of(record.config), shown(record.config.get("seed"))]
        cells += [steps, "-" if loss is None else f"{loss.values[-1]:.4g}"]
        rows.append([record.name, *cells, record.state])
    return table([*head, "state"], rows, caption="Every run of this report")


def protocols_section(report: Report) -> str:
    """A column for each protocol, what differs marked."""
    if not report.protocols:
        return "<p>Nothing is measured yet.</p>"
    marked = {
        name
        for source in ("evaluation", OWN)
        for name in differing([protocol for kind, protocol in report.protocols if kind == source])
    }
    names = dict.fromkeys(name for _, protocol in report.protocols for name in protocol)
    many = len(report.protocols) > 1
    rows = [
        [f"{name} ≠" if name in marked else name, *(shown(protocol.get(name)) for _, protocol in report.protocols)]
        for name in names
    ]
    head = ["field", *(f"{place}: {source}" for place, (source, _) in enumerate(report.protocols, start=1))]
    who = [
        f"<li>Protocol {place}: {escape(', '.join(row.title for row in report.rows if row.protocol == place))}</li>"
        for place in range(1, len(report.protocols) + 1)
    ]
    note = "<p>Metrics compare within a protocol alone. ≠ marks what differs.</p>" if marked else ""
    if not many:
        note = (
            "<p>All evaluations were made by one protocol: their metrics compare.</p>" if len(report.rows) > 1 else ""
        )
    return f"{note}{table(head, rows, caption='Protocols')}<ul>{''.join(who) if many else ''}</ul>"


def metrics_section(report: Report) -> str:
    """A row for each group of runs, its seeds below it; the best of every protocol marked."""
    names = [name for name in metric_names(report.rows) if "/" not in name]
    if not names:
        return ""
    digits = {name: digits_of(report.rows, name) for name in names}
    best = {name: [id(row) for row in best_rows(report.rows, name, digits[name])] for name in names}
    alone = {row.protocol: sum(other.protocol == row.protocol for other in report.rows) == 1 for row in report.rows}

    def part(names: Sequence[str]) -> str:
        rows: list[list[str]] = []
        classes: list[str] = []
        for row in report.rows:
            cells = [
                best_cell(cell(row, name, digits[name]), id(row) in best[name] and not alone[row.protocol])
                for name in names
            ]
            rows.append([escape(row.title), str(len(row.entries)), str(row.protocol), *cells])
            classes.append("group")
            for entry in row.entries if len(row.entries) > 1 else []:
                values = [figure_of(entry.measured.metrics.get(name), digits[name]) for name in names]
                rows.append([breakable(entry.name), "", "", *values])
                classes.append("member")
        for place, values in baselines(report.rows):
            cells = [figure_of(values.get(name), digits[name]) for name in names]
            rows.append(["mean pose (baseline)", "", str(place), *cells])
            classes.append("member")
        return table(["run", "n", "protocol", *names], rows, caption="Metrics", classes=classes, safe=True, numbers=1)

    several = any(len(row.entries) > 1 for row in report.rows)
    text = "Bold: the best of its protocol. " if any(best.values()) and not all(alone.values()) else ""
    text += "Mean ± sample standard deviation over n runs that differ in their seed alone. " if several else ""
    if len(report.rows) > 1:
        text += "<code>evaluation compare</code> tells whether a difference is more than chance."
    across = 4 if several else 7  # that many fit a printed page
    parts = [part(names[start : start + across]) for start in range(0, len(names), across)]
    return f"<p>{text}</p>{''.join(parts)}"


def curves_section(report: Report) -> str:
    """Training losses, a panel for each stage, and what was validated meanwhile."""
    panels: dict[tuple[str, str], list[tuple[RunRecord, Any]]] = {}
    for record in report.records:
        wanted = main_curves(record.curves)
        for name in wanted:
            panels.setdefault((record.stage, name), []).append((record, record.curves[name]))
    if not panels:
        return ""
    drawn, used = [], []
    for (stage, name), members in sorted(panels.items(), key=lambda item: item[0][1] != "loss"):
        lines = [
            Line(record.name, series.steps, series.values, report.styles[record.title]) for record, series in members
        ]
        values = [value for _, series in members for value in series.values]
        log = min(values) > 0 and max(values) / min(values) > 20
        told = ". ".join(
            f"{record.name}: {series.values[0]:.4g} at step {series.steps[0]:g}, {series.values[-1]:.4g} at step "
            f"{series.steps[-1]:g}"
            for record, series in members
        )
        what = "training loss" if name == "loss" else name
        drawn.append(
            line_chart(f"{stage}: {what}", lines, "optimiser steps", description=told, log=log, marks=name != "loss")
        )
        used += [record.title for record, _ in members]
    keys = [(title, report.styles[title]) for title in dict.fromkeys(used)]
    note = ""
    if any(sum(record.title == title for record in report.records) > 1 for title in used):
        note = "<p>Runs that differ in their seed alone are drawn alike.</p>"
    repeats = len(keys) > len(COLOURS) * len(DASHES)
    note += "<p>More runs than line styles: some styles come twice; hover to see the name.</p>" if repeats else ""
    return f'{note}{legend(keys)}<div class="charts">{"".join(drawn)}</div>'


def joints_section(report: Report) -> str:
    """Of every metric that there is for each joint a chart where it is legible, and the table."""
    names = [name for name in metric_names(report.rows) if "/" in name]
    blocks: list[tuple[str, list[str], list[tuple[Row, list[float | None]]]]] = []
    for family in dict.fromkeys(name.partition("/")[0] for name in names):
        its = [name for name in names if name.partition("/")[0] == family]
        rows = [row for row in report.rows if any(row.values(name) for name in its)]
        joints = [name.partition("/")[2] for name in its]
        blocks.append((family, joints, [(row, [row.mean(name) for name in its]) for row in rows]))
    rows = [row for row in report.rows if any(entry.measured.joints for entry in row.entries)]
    joints = list(dict.fromkeys(joint for row in rows for entry in row.entries for joint in entry.measured.joints))
    for key, heading in (("oks", "OKS term"), ("accuracy", "accuracy as SCIO has it")):
        found = [(row, [mean_of_joint(row, joint, key) for joint in joints]) for row in rows]
        blocks += [(heading, joints, found)] if joints else []
    if not blocks:
        return ""
    drawn = [
        (row.title, row.style) for row in report.rows if any(row is its for _, _, found in blocks for its, _ in found)
    ]
    few = len(drawn) <= SERIES
    keys = legend(drawn, marks=True) if few and len(drawn) > 1 else ""
    charts = "".join(_joints_chart(*block) for block in blocks) if few else ""
    tables = [
        folded(
            f"{heading} as a table",
            table(
                ["run", *joints],
                [[row.title, *(figure_of(value, 3) for value in values)] for row, values in found],
                caption=f"{heading} by joint",
                numbers=1,
            ),
            is_open=not few,
        )
        for heading, joints, found in blocks
    ]
    return f'{keys}<div class="charts">{charts}</div>{"".join(tables)}'


def mean_of_joint(row: Row, joint: str, key: str) -> float | None:
    """Over the seeds, of a joint's `joint_means`."""
    values = [entry.measured.joints.get(joint, {}).get(key) for entry in row.entries]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def diagnosis_section(report: Report) -> str:
    """Kinds of error, what correcting them gains, and where persons are hard."""
    known = [(entry, its) for entry in report.entries if (its := entry.closer.diagnosis) is not None]
    if not known:
        return ""
    rows = diagnosed_rows(report)
    parts = [
        "<p>Every labelled joint of a person that a pose is matched to is good, or a jitter (near its place), an "
        "inversion (at the mirror joint's place), a swap (at another person's) or a miss (Ronchi and Perona, 2017). "
        "Charts show "
        "the mean over seeds.</p>",
        colour_legend(KINDS, KIND_COLOURS),
    ]
    charts, keys = [errors_chart([(title, its) for title, its, _ in rows])], ""
    few = len(rows) <= SERIES
    if few:
        keys = legend([(title, style) for title, _, style in rows], marks=True) if len(rows) > 1 else ""
        charts.append(gains_chart(rows))
        charts += [parts_chart(name, rows) for name in GROUPINGS if any(its.parts.get(name) for _, its, _ in rows)]
    parts.append(f'{keys}<div class="charts">{"".join(charts)}</div>')
    gains = list(dict.fromkeys(name for _, its in known for name in its.gains))
    head = ["run", *KINDS, "labelled joints", *(f"AP gained: {GAINS.get(name, name)}" for name in gains)]
    cells = [
        [
            entry.name,
            *([f"{share:.1%}" for share in its.shares] or ["-"] * len(KINDS)),
            f"{its.labels:,}",
            *(figure_of(its.gains.get(name), 3) for name in gains),
        ]
        for entry, its in known
    ]
    parts.append(table(head, cells, caption="Kinds of error", numbers=1))
    if not few:
        parts += [_parts_table(name, known) for name in GROUPINGS if any(its.parts.get(name) for _, its in known)]
    for entry, its in known:
        confused = "".join(f"<li>{escape(line)}</li>" for line in its.confused)
        listed = f"<p>Most often confused:</p><ul>{confused}</ul>" if confused else ""
        alone = "; ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in its.background.items())
        counted = f"<p>{escape(alone[:1].upper() + alone[1:])}.</p>" if alone else ""
        body = f'<div class="charts">{joints_chart(its)}<div>{listed}{counted}</div></div>'
        parts.append(folded(f"{entry.name}: joint by joint", body, is_open=len(known) <= OPEN))
    return "".join(parts)


def diagnosed_rows(report: Report) -> list[tuple[str, Diagnosis, int]]:
    """Title, mean over the seeds and style of the rows with a diagnosis."""
    found = [
        (row, [its for entry in row.entries if (its := entry.closer.diagnosis) is not None]) for row in report.rows
    ]
    return [(row.title, mean_diagnosis(its), row.style) for row, its in found if its]


def calibration_section(report: Report) -> str:
    """How well scores tell how good poses are."""
    found = [(row, entry) for row in report.rows for entry in row.entries if entry.closer.diagnosis is not None]
    known = [(row, entry, its) for row, entry in found if (its := entry.closer.diagnosis) is not None and its.bins]
    if not known:
        return ""
    drawn = [(entry.name, its, row.style) for row, entry, its in known]
    styles = dict.fromkeys((row.title, row.style) for row, _, _ in known)
    keys = legend([*styles]) if len(known) > 1 else ""
    rows = [[entry.name, figure_of(its.error, 3), figure_of(its.spearman, 3)] for _, entry, its in known]
    head = ["run", "calibration error", "Spearman of score and OKS"]
    return (
        "<p>Below the dotted line scores promise more OKS than poses have. AP depends on their order alone.</p>"
        f'{keys}<div class="charts">{calibration_chart(drawn)}</div>'
        f"{table(head, rows, caption='Calibration', numbers=1)}"
    )


def gallery_section(report: Report) -> str:
    """Persons found best, about as well as half of them, and worst."""
    known = [(entry, its) for entry in report.entries if (its := entry.closer.gallery) is not None]
    if not known:
        return ""
    blocks = [
        "<p>At the left the truth, at the right the pose that is matched to the person: left joints orange, right ones "
        "blue. Worst: who loses most OKS, joint by joint. Who has no pose is counted, not shown.</p>"
    ]
    for entry, its in known:
        kinds = [("Best", its.best), ("Median", its.median), ("Worst", its.worst)]
        drawn = "".join(
            f'<h4>{heading}</h4><div class="gallery">{"".join(map(_shown_person, persons))}</div>'
            for heading, persons in kinds
            if persons
        )
        counted = f"{its.matched:,} of {its.matched + its.missed:,} persons have a pose"
        blocks.append(folded(f"{entry.name}: {counted}", drawn, is_open=len(known) <= OPEN))
    return "".join(blocks)


def differences_section(report: Report) -> str:
    """The fields of the configurations that are not the same in all runs of a stage."""
    from poserelay.run import UNCOMPARED

    blocks = []
    for stage in dict.fromkeys(record.stage for record in report.records):
        its = [record for record in report.records if record.stage == stage and record.config]
        names = dict.fromkeys(name for record in its for name in record.config if name.split(".")[0] not in UNCOMPARED)
        fields = [name for name in names if len({canonical(record.config.get(name, ABSENT)) for record in its}) > 1]
        if len(its) < 2:
            continue
        heading = f"<h3>{escape(stage)}: {len(its)} runs</h3>"
        if not fields:
            blocks.append(f"{heading}<p>Their configurations are the same.</p>")
            continue
        if len(its) > len(fields):
            cells = [[shown(record.config.get(name, ABSENT)) for record in its] for name in fields]
            columns, names, first = [*zip(fields, cells, strict=True)], [record.name for record in its], "run"
        else:
            columns, names, first = pooled(its, fields), fields, "field"
        count = math.ceil(len(columns) / COLUMNS)
        width = math.ceil(len(columns) / count)
        for place in range(count):
            part = columns[place * width : (place + 1) * width]
            which = f" ({place + 1} of {count})" if count > 1 else ""
            lines = [list(line) for line in zip(names, *(column for _, column in part), strict=True)]
            heading += table([first, *(name for name, _ in part)], lines, caption=f"{stage}: fields{which}")
        blocks.append(heading)
    if not blocks:
        return ""
    return (
        "<p>Of each stage the fields that differ; where a run writes and how many workers it has are left out.</p>"
        + ("".join(blocks))
    )


def pooled(records: Sequence[RunRecord], fields: Sequence[str]) -> list[tuple[str, list[str]]]:
    """A column for each group of runs: its title, and of each field the values that its seeds have, each once."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    columns = []
    for its in groups.values():
        values = [dict.fromkeys(shown(record.config.get(name, ABSENT)) for record in its) for name in fields]
        title = its[0].name if len(its) == 1 else f"{its[0].title} ({len(its)} runs)"
        columns.append((title, [", ".join(found) for found in values]))
    return columns


def made_section(report: Report) -> str:
    """Commands, versions and dates."""
    common = {canonical(record.made.get("versions")) for record in report.records if record.folder is not None}
    head = ["run", "command", "last sign of life (UTC)", "took", "attempts", "threads", "commit"]
    rows = []
    for record in report.records:
        made = record.made
        command = f"python -m {record.stage} --config {record.path}/config.yaml" if record.folder else record.path
        command = "-" if record.folder and not record.config else command
        date = "-" if record.date is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(record.date))
        commit = made.get("git_commit")
        short = f"{commit[:12]}{'+' if commit.endswith('+') else ''}" if isinstance(commit, str) else "-"
        line = [record.name, command, date, _duration(made.get("seconds"))]
        line += [shown(made.get(key)) for key in ("attempts", "threads")]
        rows.append([*line, short, *([_versions(made)] if len(common) > 1 else [])])
    head += ["versions"] if len(common) > 1 else []
    first = next((record for record in report.records if record.folder is not None), None)
    versions = f"<p>{escape(_versions(first.made))}.</p>" if first and len(common) == 1 else ""
    return (
        f"<p>This page: <code>{breakable(report.command)}</code>, poserelay {escape(report.version)}.</p>{versions}"
        "<p>Commit: + marks a checkout with local changes.</p>" + table(head, rows, caption="How the runs were made")
    )


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str,
    classes: Sequence[str] = (),
    safe: bool = False,
    numbers: int | None = None,
) -> str:
    """A table in a box of its own that scrolls; `safe`: cells are HTML already; `numbers`: columns from here on are."""
    align = ["" if numbers is None or place < numbers else ' class="num"' for place in range(len(head))]
    wide = ' class="wide"' if len(head) > WIDE else ""
    kinds = [' class="long"' if len(name) > LONG and not kind else kind for name, kind in zip(head, align, strict=True)]
    top = "".join(f'<th scope="col"{kind}>{breakable(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    body = []
    for place, row in enumerate(rows):
        cells = row if safe else [breakable(text) for text in row]
        first, *rest = cells
        name = f' class="{classes[place]}"' if classes else ""
        named = zip(row[1:], align[1:], strict=True)
        kinds = [' class="long"' if len(text) > LONG and not kind else kind for text, kind in named]
        line = "".join(f"<td{kind}>{text}</td>" for text, kind in zip(rest, kinds, strict=True))
        body.append(f'<tr{name}><th scope="row">{first}</th>{line}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table{wide}>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def folded(heading: str, body: str, *, is_open: bool) -> str:
    """A block that a reader folds and unfolds."""
    return f"<details{' open' if is_open else ''}><summary>{breakable(heading)}</summary>{body}</details>"


def breakable(text: str) -> str:
    """Escaped, and to be broken after slashes, underscores and the dots of a field."""
    return re.sub(r"([/_=]|(?<=[A-Za-z])\.(?=[A-Za-z])|,(?=\S))(?!$)", r"\1<wbr>", escape(text))


def best_rows(rows: Sequence[Row], metric: str, digits: int = 6) -> list[Row]:
    """Of each protocol the rows that are best to so many digits.

    None where it is not known what is better, and where all are alike.
    """
    if not HIGHER_IS_BETTER.match(metric):
        return []
    means = [(row, round(value, digits)) for row in rows if (value := row.mean(metric)) is not None]
    best: list[Row] = []
    for place in dict.fromkeys(row.protocol for row, _ in means):
        its = [(row, value) for row, value in means if row.protocol == place]
        highest = max(value for _, value in its)
        if len(its) == 1 or any(value < highest for _, value in its):
            best += [row for row, value in its if value == highest]
    return best


def metric_names(rows: Iterable[Row]) -> list[str]:
    """Those of any evaluation that has a value of it, without the baseline's."""
    found = dict.fromkeys(name for row in rows for entry in row.entries for name in entry.measured.metrics)
    rows = [*rows]
    return [name for name in found if not name.startswith(BASELINE) and any(row.values(name) for row in rows)]


def baselines(rows: Sequence[Row]) -> list[tuple[int, dict[str, float | None]]]:
    """The metrics of the mean pose, each with its protocol's number; those that are alike once."""
    found: dict[str, tuple[int, dict[str, float | None]]] = {}
    for row in rows:
        for entry in row.entries:
            its = entry.measured.metrics.items()
            values = {name.removeprefix(BASELINE): value for name, value in its if name.startswith(BASELINE)}
            if values:
                found.setdefault(canonical([row.protocol, values]), (row.protocol, values))
    return list(found.values())


def digits_of(rows: Sequence[Row], metric: str) -> int:
    """Decimals that tell the values of a metric apart: three, four of small ones, one of those above ten."""
    high = max((abs(value) for row in rows for value in row.values(metric)), default=0.0)
    return 4 if high < 0.1 else 3 if high < 10 else 1


def cell(row: Row, metric: str, digits: int) -> str:
    """`0.412 ± 0.013`, with its own n where some runs have no value."""
    values = row.values(metric)
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    fewer = f" (n = {len(values)})" if len(values) < len(row.entries) else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}{fewer}"


def best_cell(text: str, is_best: bool) -> str:
    """Bold, and told to who does not see it."""
    return f'<b>{escape(text)}<span class="hidden"> (best)</span></b>' if is_best else escape(text)


def figure_of(value: float | None, digits: int) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def main_curves(curves: Mapping[str, Any]) -> list[str]:
    """The loss, and the two first of what was validated that stand for the rest."""
    others = [name for name in curves if name != "loss"]
    main = [name for name in others if name.rpartition(" ")[2] in MAIN]
    return (["loss"] if "loss" in curves else []) + (main or others)[:2]


ABSENT = "(absent)"


def shown(value: Any) -> str:
    """A value as YAML has it, text as it is, a dash for null."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def method_of(config: Mapping[str, Any]) -> str:
    """The pretraining method or the teacher, or else the head and the networks on top of it."""
    name = config.get("method.name") or config.get("teacher.name")
    parts = [name, config.get("model.head.name"), config.get("model.refiner.name")]
    return " + ".join(str(part) for part in parts if part) or "-"


def backbone_of(config: Mapping[str, Any]) -> str:
    """Its name, or timm's name of it."""
    return shown(config.get("model.backbone.kwargs.model") or config.get("model.backbone.name"))


def input_of(config: Mapping[str, Any]) -> str:
    """Width and height of what the network sees, pixels."""
    width, height = config.get("model.input.width"), config.get("model.input.height")
    return f"{width}x{height}" if width and height else "-"


def origin_of(config: Mapping[str, Any]) -> str:
    """The run whose hand-off file this one started from."""
    path = config.get("init_from")
    parts = str(path).split("/")
    return "-" if not path else parts[-3] if len(parts) > 2 and parts[-2] == "export" else parts[-1]


def labels_of(config: Mapping[str, Any]) -> str:
    """How many labels a run had."""
    if not any(name.startswith("labels.") for name in config):
        return "-"
    count, ratio, file = (config.get(f"labels.{name}") for name in ("count", "ratio", "file"))
    if file:
        return str(file).rpartition("/")[2]
    unit = shown(config.get("labels.by")) if config.get("labels.by") else "images"
    if count is not None:
        return f"{count} {unit}"
    return f"{ratio:.3g} of {unit}" if isinstance(ratio, (int, float)) else "all"


def _joints_chart(heading: str, joints: Sequence[str], found: Sequence[tuple[Row, Sequence[float | None]]]) -> str:
    told = ". ".join(
        f"{row.title}: " + ", ".join(f"{joint} {figure_of(its, 3)}" for joint, its in zip(joints, values, strict=True))
        for row, values in found
    )
    dots = [Dots(row.title, values, row.style) for row, values in found]
    return dot_chart(f"{heading} by joint", joints, dots, heading, description=told)


def _parts_table(grouping: str, known: Sequence[tuple[Entry, Diagnosis]]) -> str:
    names = list(dict.fromkeys(part.name for _, its in known for part in its.parts.get(grouping, [])))
    rows = []
    for entry, its in known:
        found = {part.name: part.ap for part in its.parts.get(grouping, [])}
        rows.append([entry.name, *(figure_of(found.get(name), 3) for name in names)])
    return f"<h3>AP by {GROUPINGS[grouping]}</h3>" + table(["run", *names], rows, caption=grouping, numbers=1)


def _shown_person(person: Shown) -> str:
    width, height = person.size
    errors = f"<br>{breakable(person.errors)}" if person.errors else ""
    alt = f"A person with the true joints at the left and the predicted ones at the right; {person.caption}"
    return (
        f'<figure><img src="data:image/jpeg;base64,{person.jpeg}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}"><figcaption>{breakable(person.caption)}{errors}</figcaption></figure>'
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        return "-"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"


def _versions(made: Mapping[str, Any]) -> str:
    versions = made.get("versions") or {}
    return ", ".join(f"{name} {shown(version)}" for name, version in versions.items()) or "versions not known"
