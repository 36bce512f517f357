"""`launch logs` and `launch cancel`."""

from __future__ import annotations

import os
import signal
import socket
import sys

from poserelay.errors import UserError

from .config import CancelConfig, LogsConfig
from .plan import is_held, read_plan, read_submitted, write_submitted
from .status import batch_log, job_statuses


def logs(config: LogsConfig) -> None:
    """Print the last lines of every process of a stage's jobs, each file under its name."""
    plan = read_plan(config.run)
    found, submitted = False, read_submitted(plan)
    for job in plan.named(config.stage):
        for path in sorted(plan.record(job).glob("rank*.log"), key=lambda path: int(path.stem[4:])):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found = True
            print(f"==> {path} <==")
            print("\n".join(lines[-config.lines :] if config.lines else lines))
        batch = submitted.ids.get(job.name) if not any(plan.record(job).glob("rank*.log")) else None
        if batch and batch_log(plan, batch).exists():
            found = True
            print(f"==> {batch_log(plan, batch)} <==")
            print(batch_log(plan, batch).read_text(encoding="utf-8", errors="replace").rstrip())
    if not found:
        print(f"{config.stage}: no logs: no process of it has started", file=sys.stderr)


def cancel(config: CancelConfig) -> None:
    """Stop jobs that run or wait. Raises UserError for a part of a local launch, and for one of another machine."""
    plan = read_plan(config.run)
    wanted = {job.name for job in (plan.named(config.stage) if config.stage else plan.jobs)}
    if plan.cluster == "slurm":
        from . import slurm

        statuses, note = job_statuses(plan)
        if note:
            raise UserError(f"{plan.run}: {note}; nothing was cancelled")
        names = [status.name for status in statuses if status.name in wanted and status.state in ("running", "pending")]
        submitted = read_submitted(plan)
        slurm.adopt(submitted, (plan.run / "launch").stat().st_uid)
        submitted.cancelled = [*submitted.cancelled, *(name for name in names if name not in submitted.cancelled)]
        write_submitted(plan, submitted)
        slurm.cancel([submitted.ids[name] for name in names if name in submitted.ids])
        print(f"{len(names)} of {len(wanted)} jobs cancelled; the others were not under way", file=sys.stderr)
        return
    submitted = read_submitted(plan)
    if config.stage:
        raise UserError(
            f"{plan.run}: a {plan.cluster} launch is cancelled as a whole; leave out --stage {config.stage}"
        )
    if not is_held(plan):
        print(f"{plan.run}: nothing runs", file=sys.stderr)
        return
    if submitted.host != socket.gethostname() or not submitted.pid:
        raise UserError(f"{plan.run}: it runs on {submitted.host}; cancel it there")
    submitted.cancelled = [status.name for status in job_statuses(plan)[0] if status.state != "done"]
    write_submitted(plan, submitted)
    os.kill(submitted.pid, signal.SIGTERM)
    print(f"{plan.run}: process {submitted.pid} was told to save its jobs and stop", file=sys.stderr)
