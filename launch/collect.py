"""`python -m launch collect`: the metrics of an experiment, mean and spread over its seeds, and its learning curves.

Two figures are averaged only where they were measured alike: same stage, same axes but for seeds, same protocol.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poserelay.errors import UserError
from poserelay.run import write_atomic, write_json, write_text

from .commands import COMMANDS
from .config import CollectConfig
from .curves import curve_axis, plot_curves
from .graph import Job, parts_of
from .plan import outdated, read_plan
from .table import (
    Measured,
    Missing,
    Row,
    Table,
    canonical,
    divisions,
    format_csv,
    format_markdown,
    last_part,
    to_json,
)

EVALUATION = "evaluation test"


def main(config: CollectConfig) -> Table:
    """Collect a launch, see `collect_run`."""
    return collect_run(Path(config.run), config.json)


def collect_run(run: Path, json_only: bool = False) -> Table:
    """Write RUN/collect/table.{csv,json,md} and, where labels were swept, curves.png; print and return the table.

    `json_only` prints the JSON object instead of the Markdown. Raises UserError where `run` is no launch's directory;
    a damaged metrics file is listed as missing.
    """
    plan = read_plan(run)
    table = collect(plan.jobs, outdated(plan))
    out = run / "collect"
    as_json, markdown = to_json(table), format_markdown(table)
    write_text(out / "table.csv", format_csv(table))
    write_text(out / "table.md", markdown + "\n")
    write_json(out / "table.json", as_json)
    axis = curve_axis(table)
    if axis is None:
        (out / "curves.png").unlink(missing_ok=True)
    else:
        figure = plot_curves(table, axis)
        write_atomic(out / "curves.png", lambda path: figure.savefig(path, format="png", dpi=150))
    print(json.dumps(as_json) if json_only else format_markdown(table, by_joint=False))
    if not table.rows:
        print("no job of this launch measures anything; `evaluation test` does", file=sys.stderr)
    for line in divisions(table):
        print(f"warning: {line}", file=sys.stderr)
    names = "table.md, table.csv, table.json" + ("" if axis is None else ", curves.png")
    print(f"{names} written to {out}", file=sys.stderr)
    return table


def collect(jobs: Sequence[Job], outdated: Mapping[str, str] | None = None) -> Table:
    """Read what the jobs have measured so far and group it; what is `outdated` (job to reason) counts as missing.

    A training's own validation figures are taken where no evaluation waits for that very job. Raises UserError for
    axes that are damaged; a job that is not done or whose file is damaged is listed as missing.
    """
    evaluated = {name for job in jobs if job.command == EVALUATION for name in job.upstream}
    wanted = [job for job in jobs if job.command == EVALUATION]
    wanted += [job for job in jobs if COMMANDS[job.command].trains and job.name not in evaluated]
    protocols: dict[str, dict[str, Any]] = {}
    missing: list[Missing] = []
    groups: dict[str, dict[str, Any]] = {}
    for job in wanted:
        axes = split_axes(job)
        seeds = {name: value for name, value in axes.items() if last_part(name) == "seed"}
        others = {name: value for name, value in axes.items() if name not in seeds}
        key = canonical([job.stage, others])
        group = groups.setdefault(key, {"job": job, "axes": others, "expected": 0, "measured": {}})
        group["expected"] += 1
        try:
            if outdated and job.name in outdated:
                raise UserError(f"outdated: {outdated[job.name]}; resume the launch")
            metrics, protocol = read_figures(job)
        except UserError as error:
            missing.append(Missing(job.name, job.stage, str(error)))
            continue
        if metrics:
            protocols.setdefault(canonical(protocol), protocol)
            number = list(protocols).index(canonical(protocol)) + 1
            group["measured"].setdefault(number, []).append(Measured(job.name, seeds, metrics))
    rows = []
    for group in groups.values():
        job = group["job"]
        source = "evaluation" if job.command == EVALUATION else "own validation"
        # Whether a training that is not done will measure anything is not known; that an evaluation will is.
        measured = group["measured"] or ({None: []} if source == "evaluation" else {})
        rows += [
            Row(job.stage, source, group["axes"], group["expected"], number, measured[number])
            for number in sorted(measured, key=lambda number: number or 0)
        ]
    linked = dict.fromkeys(parts_of(name) for job in wanted for name in job.axes if len(parts_of(name)) > 1)
    return Table(rows, list(protocols.values()), missing, list(linked))


def split_axes(job: Job) -> dict[str, Any]:
    """Dotted field to value; fields that were swept together ("labels.ratio, optim.epochs") each for itself.

    Raises UserError where their values are not as many as the fields.
    """
    found: dict[str, Any] = {}
    for names, value in job.axes.items():
        parts = parts_of(names)
        if len(parts) == 1:
            found[names] = value
        elif isinstance(value, list) and len(value) == len(parts):
            found |= zip(parts, value, strict=True)
        else:
            raise UserError(
                f"job {job.name}: axis {names!r} has the value {value!r}, expected a list of {len(parts)}; "
                "plan.json is damaged, launch again"
            )
    return found


def read_figures(job: Job) -> tuple[dict[str, float | None], dict[str, Any]]:
    """A job's metrics, None where one is undefined, and their protocol.

    Raises UserError where the job is not done and, naming the file, where what it wrote is damaged.
    """
    trains = COMMANDS[job.command].trains
    path = Path(job.folder) / ("done.json" if trains else "metrics.json")
    if not path.exists():
        raise UserError("not done")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        metrics = dict(content["metrics"])
        protocol = dict(metrics.pop("protocol", {}) if trains else content["protocol"])
        if "scores" in content:
            metrics["score-OKS Spearman"] = content["scores"]["spearman"]
        return {
            name: _number(name, value)
            for name, value in metrics.items()
            # An export's step says where it was taken, and details are not metrics.
            if name != "step" and not isinstance(value, (dict, list))
        }, protocol
    except (OSError, ValueError, KeyError, TypeError) as error:
        damaged = "it" if trains else "its folder"  # without done.json a training ends anew from its resume file
        raise UserError(
            f"{path}: not what `{job.command}` writes ({error!r}); remove {damaged} and resume the launch"
        ) from error


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a number or null")
    return None if value == -1 else float(value)  # pycocotools: no person of that size


def _refuse(constant: str) -> None:
    raise ValueError(f"holds {constant}, which is no JSON")
