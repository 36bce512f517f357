"""`launch status`: where every job is, from its own record, its run directory and Slurm. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .attempts import INTERRUPTED, failures, good_attempt, read_events
from .commands import COMMANDS
from .config import StatusConfig
from .graph import Job
from .plan import Plan, Submitted, is_done, is_held, outdated, read_plan, read_submitted
from .slurm import QueueEntry, adopt, queue

State = Literal["done", "running", "pending", "failed", "interrupted", "cancelled", "blocked", "outdated"]

TAIL = 65536
"""Bytes of metrics.jsonl that are looked at: the last rows."""


@dataclass(frozen=True)
class JobStatus:
    """Where a job is."""

    name: str
    stage: str
    state: State
    """pending: waits in the queue, or for its turn; interrupted: saved and not in the queue; blocked: will not run, for
    a job upstream did not end well; outdated: done, but with what a job upstream has replaced since."""
    reason: str | None
    """Of a failure, an interruption or a wait."""
    step: int | None
    """Optimiser steps so far, of training commands."""
    total: int | None
    images_per_second: float | None
    """Over all processes, at the last row of metrics.jsonl."""
    eta_seconds: float | None
    """Until the last step at the rate of the last two rows; of running jobs."""
    restarts: int
    """Starts after the first."""
    metric: dict[str, float] | None
    """The last validation's or evaluation's main figure, or else the last loss."""
    job: str | None
    """Slurm's id of the last submission or start."""
    host: str | None
    folder: str


def main(config: StatusConfig) -> dict[str, Any]:
    """Print and return the status of a launch. Raises UserError where there is none."""
    plan = read_plan(config.run)
    statuses, note = job_statuses(plan)
    counts = {state: sum(status.state == state for status in statuses) for state in State.__args__}
    report = {
        "run": str(plan.run),
        "cluster": plan.cluster,
        "commit": plan.commit,
        "counts": counts,
        "note": note,
        "jobs": [asdict(status) for status in statuses],
    }
    print(json.dumps(report, allow_nan=False) if config.json else format_status(plan, statuses, note))
    return report


def job_statuses(plan: Plan, *, from_here: bool = False) -> tuple[list[JobStatus], str | None]:
    """Status of every job in the plan's order, and what could not be found out.

    `from_here` says that this very process runs or submits the launch.
    """
    submitted = read_submitted(plan)
    entries: dict[str, QueueEntry] | None = {}
    if plan.cluster == "slurm":
        owner = (plan.run / "launch").stat().st_uid
        adopt(submitted, owner)
        entries = queue(list(submitted.ids.values()), owner)
    note = None
    if entries is None:
        note = "squeue does not answer: states are from the run directories alone, and a job called running may be gone"
    held = plan.cluster != "slurm" and not from_here and is_held(plan)
    known: dict[str, JobStatus] = {}
    old = outdated(plan)
    for job in plan.jobs:
        status = _status(plan, job, submitted, entries, held, known)
        if job.name in old and status.state == "done":
            status = replace(status, state="outdated", reason=old[job.name])
        known[job.name] = status
    return list(known.values()), note


def _status(
    plan: Plan,
    job: Job,
    submitted: Submitted,
    entries: Mapping[str, QueueEntry] | None,
    held: bool,
    known: Mapping[str, JobStatus],
) -> JobStatus:
    events = read_events(plan.record(job))
    starts = [row for row in events if row["event"] == "start"]
    noted = [row["job"] for row in events if row["event"] in ("submitted", "start") and row.get("job")]
    job_id = submitted.ids.get(job.name) or (noted[-1] if noted else None)
    entry = (entries or {}).get(job_id or "")
    state, reason = _state(plan, job, submitted, events, entry, entries is None, held, known)
    progress = read_progress(Path(job.folder)) if starts else {}
    if state != "running":
        progress.pop("eta_seconds", None)
    return JobStatus(
        name=job.name,
        stage=job.stage,
        state=state,
        reason=reason,
        step=progress.get("step"),
        total=progress.get("total"),
        images_per_second=progress.get("images_per_second"),
        eta_seconds=progress.get("eta_seconds"),
        restarts=max(0, len(starts) - 1),
        metric=progress.get("metric"),
        job=job_id,
        host=starts[-1].get("host") if starts else None,
        folder=job.folder,
    )


def _state(
    plan: Plan,
    job: Job,
    submitted: Submitted,
    events: Sequence[Mapping[str, Any]],
    entry: QueueEntry | None,
    unknown: bool,
    held: bool,
    known: Mapping[str, JobStatus],
) -> tuple[State, str | None]:
    """State and its reason. What the job itself recorded comes before what Slurm remembers, which it soon forgets."""
    last = next((row for row in reversed(events) if row["event"] in ("submitted", "start")), None)
    attempt = last.get("attempt") if last and last["event"] == "start" else None
    started = attempt is not None
    # One that was outdated, and that `launch resume` has submitted since, has the files of its earlier start.
    before = (good_attempt(events) or "").rpartition(".")[0]
    again = (entry is not None and entry.live and before != submitted.ids.get(job.name, before)) or (
        held and not started
    )
    if is_done(job, plan.record(job)) and not again:
        return "done", None
    ends = [row for row in events if row["event"] == "end" and started and row.get("attempt") == attempt]
    bad = failures(events, attempt) if attempt else []
    running = started and not bad and not any(row.get("rank") == 0 for row in ends)
    upstream = [known[name] for name in job.upstream if known[name].state in ("failed", "blocked", "cancelled")]
    stopped = [known[name] for name in job.upstream if known[name].state == "interrupted"]
    if plan.cluster == "slurm":
        if entry and entry.state == "PENDING" and entry.reason == "DependencyNeverSatisfied":
            return "blocked", _blocked(upstream)
        if entry and entry.live:
            waiting = entry.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
            if entry.state == "SUSPENDED":
                return "pending", "suspended"
            return ("pending" if waiting else "running"), (entry.reason if waiting else None)
        waits = not upstream and not stopped if not started else any(_goes_on(row) for row in ends)
        if unknown and (running or waits) and job.name not in submitted.cancelled:
            return ("running" if running else "pending"), None
    elif held:
        if running:
            return "running", None
        if not upstream and not stopped and not ends:
            return "pending", "waits for its turn or for a job upstream"
    if job.name in submitted.cancelled:
        return "cancelled", "by `launch cancel`"
    if bad:
        return "failed", bad[0].get("reason") or f"exit code {bad[0].get('code')}"
    own = [row for row in ends if row.get("rank") == 0]
    if (entry and entry.state == "CANCELLED" and started) or (own and own[-1].get("slurm") == "CANCELLED"):
        saved = "; it had saved" if own and own[-1].get("code") == INTERRUPTED else ""
        return "cancelled", f"by scancel{saved}"
    if own and own[-1].get("code") != 0:
        if held and own[-1].get("requeued"):
            return "pending", "is started again"
        return "interrupted", own[-1].get("reason")
    if own:
        command = COMMANDS[job.command]
        lacks = [name for name in (command.leaves, command.hands_off) if not Path(job.folder, name).exists()]
        return "failed", f"ended with 0, but {job.folder} lacks {lacks[0] or 'everything' if lacks else 'nothing now'}"
    if running and plan.cluster != "slurm":
        return "interrupted", "the launcher ended, killed or with its machine, while the job ran"
    if running:
        word = {"TIMEOUT": "its time limit", "OUT_OF_MEMORY": "out of memory", "NODE_FAIL": "its node failed"}
        told = word.get(entry.state, f"Slurm says {entry.state}") if entry else "out of memory, kill -9, or a lost node"
        return "failed", f"ended without a word: {told}"
    if upstream:
        return "blocked", _blocked(upstream)
    if stopped:
        return "blocked", _blocked(stopped)  # Slurm has cancelled it for that
    if entry and entry.state == "CANCELLED" and entry.reason == "DependencyNeverSatisfied":
        return "blocked", "Slurm removed it, for a job that it waited for had been removed"
    if entry and entry.state == "CANCELLED":
        return "cancelled", "by scancel, before it started"
    if plan.cluster == "slurm" and job.name in submitted.ids:
        said = f"Slurm says {entry.state}" if entry else "Slurm no longer knows it"
        words = _last_line(batch_log(plan, submitted.ids[job.name]))
        return "failed", f"left the queue before it started: {said}" + (
            f"; its script's last words: {words}" if words else ""
        )
    return "interrupted", "not started: the launcher ended before its turn"


def batch_log(plan: Plan, job_id: str) -> Path:
    """What a job's script wrote before and around the stage."""
    return plan.run / "launch" / "submitit" / f"{job_id}_0_log.out"


def _last_line(path: Path) -> str | None:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def _goes_on(end: Mapping[str, Any]) -> bool:
    """Whether an attempt's process ended for the job to be started again, by the launcher or by Slurm."""
    return bool(end.get("requeued")) or end.get("slurm") == "REQUEUED"


def _blocked(upstream: Sequence[JobStatus]) -> str:
    """Why a job does not run: the first job of the chain that did not end well."""
    if not upstream:
        return "a job upstream did not end well"
    first = upstream[0]
    return first.reason or "" if first.state == "blocked" else f"{first.name} {first.state}: {first.reason}"


def read_progress(folder: Path) -> dict[str, Any]:
    """What a job's folder tells: step, total, images_per_second, eta_seconds, metric; each only where it is known."""
    found: dict[str, Any] = {}
    status = _json(folder / "status.json")
    if isinstance(status.get("step"), int) and status.get("total"):
        found |= {"step": status["step"], "total": status["total"]}
    rows = _last_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if row.get("kind") == "train" and isinstance(row.get("step"), int)]
    if trained:
        last = trained[-1]
        found["step"] = last["step"]
        found["images_per_second"] = last.get("images_per_second")
        found["metric"] = {"loss": last["loss"]} if isinstance(last.get("loss"), float) else None
        before = [row for row in trained[:-1] if row["attempt"] == last["attempt"] and row["step"] < last["step"]][-1:]
        if before and found.get("total"):
            pace = (last["seconds"] - before[0]["seconds"]) / (last["step"] - before[0]["step"])
            found["eta_seconds"] = round(pace * (found["total"] - last["step"]), 1)
    validated = [row for row in rows if row.get("kind") == "validation"]
    figures = validated[-1] if validated else _json(folder / "metrics.json").get("metrics") or {}
    main_figures = {name: figures[name] for name in ("AP", "PCK", "accuracy") if isinstance(figures.get(name), float)}
    if main_figures:
        found["metric"] = main_figures
    return found


def format_status(plan: Plan, statuses: Sequence[JobStatus], note: str | None) -> str:
    """A line per job, and what there is to do."""
    rows = [["job", "state", "step", "img/s", "ETA", "restarts", "metric", "reason"]]
    for status in statuses:
        metric = " ".join(f"{name} {value:.4g}" for name, value in (status.metric or {}).items())
        rows.append(
            [
                status.name,
                status.state,
                f"{status.step}/{status.total}" if status.total else "-",
                f"{status.images_per_second:.4g}" if status.images_per_second else "-",
                _duration(status.eta_seconds) if status.eta_seconds is not None else "-",
                str(status.restarts),
                metric or "-",
                status.reason or "",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    open_ends = sum(
        status.state in ("failed", "interrupted", "cancelled", "blocked", "outdated") for status in statuses
    )
    if open_ends:
        lines.append(
            f"{open_ends} of {len(statuses)} will not end by themselves; `launch resume {plan.typed}` starts them"
        )
    if note:
        lines.append(f"note: {note}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of a metrics.jsonl, which grows long; a torn one is left out, NaN is null."""
    if not path.exists():
        return []
    rows = []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        for line in file.read().decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line, parse_constant=lambda _: None)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
