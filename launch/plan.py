"""What a launch has on disk beside its jobs' own folders. Imports no torch.

RUN/launch/plan.json        the jobs, as submitted; its presence makes RUN a launch
RUN/launch/graph.yaml       the graph file and options, resolved
RUN/launch/submitted.json   what became of each submission: Slurm's job id, or the process of the local launcher
RUN/launch/code/            the code that the jobs run, with SNAPSHOT.json and local.diff
RUN/launch/jobs/JOB/        config.yaml, attempts.jsonl, rank0.log, rank1.log ...
RUN/JOB/                    the job's own folder
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from poserelay.errors import UserError
from poserelay.run import write_json

from .attempts import ended_well, good_attempt, read_events
from .commands import COMMANDS
from .config import Local, Resources, Slurm
from .graph import Job

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """A launch: where its jobs run, and which they are."""

    run: Path
    """Absolute."""
    cluster: str
    graph: str
    """Path of the graph file as it was given."""
    commit: str | None
    """Of the checkout at submission, with `+` where it had local changes."""
    code: str
    """Folder of the code that the jobs run."""
    max_requeues: int
    local: Local
    jobs: list[Job]

    @property
    def typed(self) -> str:
        """The run directory as one types it in a shell."""
        return shlex.quote(str(self.run))

    def record(self, job: Job) -> Path:
        """Folder of a job's configuration, attempts and logs."""
        return self.run / "launch" / "jobs" / job.name

    def upstream_attempts(self, job: Job) -> dict[str, str | None]:
        """Of each job that `job` waits for, the attempt that ended well, None where the last one did not."""
        waits = [other for other in self.jobs if other.name in job.upstream]
        return {other.name: good_attempt(read_events(self.record(other))) for other in waits}

    def named(self, stage: str) -> list[Job]:
        """Jobs of a stage, or the one of this name. Raises UserError where there is none."""
        found = [job for job in self.jobs if stage in (job.stage, job.name)]
        if not found:
            names = list(dict.fromkeys(job.stage for job in self.jobs))
            raise UserError(f"{self.run}: no stage or job {stage!r} in this launch; choose from {', '.join(names)}")
        return found


@dataclass
class Submitted:
    """What a submission left to look after."""

    ids: dict[str, str] = field(default_factory=dict)
    """Job name to Slurm's id of its last submission, 123 or 123_4."""
    begun: dict[str, list[str]] = field(default_factory=dict)
    """Comment of a submission that was begun, and may have been killed before its ids were noted, to its jobs."""
    cancelled: list[str] = field(default_factory=list)
    """Jobs that `launch cancel` stopped and nothing has started again."""
    host: str | None = None
    """Of the process that runs the jobs itself (local, debug)."""
    pid: int | None = None
    """Its process id."""


def make_launch(run: Path) -> Path:
    """Make RUN/launch for a new launch, and no other can.

    Raises:
        UserError: a launch is here, or was interrupted before its jobs were recorded; the folder cannot be made.
    """
    folder = run / "launch"
    try:
        run.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError as error:
        if not folder.exists():
            raise UserError(f"run_dir {run}: not a folder; name another one") from error
        if (folder / "plan.json").exists():
            raise UserError(
                f"{run}: a launch is already here; `python -m launch status {shlex.quote(str(run))}` tells how it "
                "stands, `launch resume` goes on with it, another run_dir starts anew"
            ) from error
        raise UserError(
            f"{run}: another launch is being submitted here, or was killed before it submitted anything; wait, or "
            f"remove {folder}"
        ) from error
    except OSError as error:
        raise UserError(f"run_dir {run}: cannot be made: {error.strerror}; name another folder") from error
    return folder


def write_plan(plan: Plan) -> None:
    """Write plan.json, atomically: from now on RUN is a launch."""
    values = {
        "format": FORMAT,
        "run": str(plan.run),
        **{name: getattr(plan, name) for name in ("cluster", "graph", "commit", "code", "max_requeues")},
        "local": asdict(plan.local),
        "jobs": [asdict(job) for job in plan.jobs],
    }
    write_json(plan.run / "launch" / "plan.json", values)


def read_plan(run: str | Path) -> Plan:
    """The launch of a folder. Raises UserError where there is none, or its plan.json is damaged."""
    path = Path(os.path.abspath(run)) / "launch" / "plan.json"
    if not path.exists():
        raise UserError(f"{run}: no launch here (it has no launch/plan.json); give the run_dir of `python -m launch`")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(f"{path}: format {values['format']!r}, this version reads {FORMAT}")
        if os.path.realpath(values["run"]) != os.path.realpath(path.parent.parent):
            raise UserError(
                f"{run}: this launch was made as {values['run']}, where its jobs' folders are; move it back, or look "
                "there"
            )
        jobs = [
            Job(**{**job, "resources": Resources(**job["resources"]), "slurm": Slurm(**job["slurm"])})
            for job in values["jobs"]
        ]
        return Plan(
            run=path.parent.parent,
            jobs=jobs,
            local=Local(**values["local"]),
            **{name: values[name] for name in ("cluster", "graph", "commit", "code", "max_requeues")},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); launch into another run_dir") from error


def read_submitted(plan: Plan) -> Submitted:
    """What was submitted so far."""
    path = plan.run / "launch" / "submitted.json"
    try:
        return Submitted(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Submitted()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: damaged ({error}); `launch resume` cannot tell what runs; remove it once nothing does"
        ) from error


def submitted_ids(names: Sequence[str], array: str) -> dict[str, str]:
    """Slurm's ids of jobs that were submitted together as `array`; one alone is no array."""
    return dict(zip(names, [f"{array}_{n}" for n in range(len(names))] if len(names) > 1 else [array], strict=True))


def write_submitted(plan: Plan, submitted: Submitted) -> None:
    """Replace submitted.json atomically."""
    write_json(plan.run / "launch" / "submitted.json", asdict(submitted))


@contextlib.contextmanager
def submitting(plan: Plan) -> Iterator[None]:
    """While jobs are submitted or run from here; UserError when another process does so for this launch."""
    with open(plan.run / "launch" / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"{plan.run}: {file.read().strip() or 'another process'} is running this launch; wait for it, or "
                f"`launch cancel {plan.typed}`"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_held(plan: Plan) -> bool:
    """Whether a process runs this launch from here now (local, debug), or submits it."""
    path = plan.run / "launch" / "lock"
    if not path.exists():
        return False
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def is_done(job: Job, record: Path) -> bool:
    """Whether a job has ended well: its command returned 0, and what it leaves is there."""
    command = COMMANDS[job.command]
    return ended_well(read_events(record)) and all(
        Path(job.folder, name).exists() for name in (command.leaves, command.hands_off)
    )


def outdated(plan: Plan) -> dict[str, str]:
    """Jobs that are done, but from what a job upstream has replaced since: name to which that is."""
    found: dict[str, str] = {}
    events = {job.name: read_events(plan.record(job)) for job in plan.jobs}
    done = {job.name: is_done(job, plan.record(job)) for job in plan.jobs}
    for job in plan.jobs:
        seen = next((row for row in reversed(events[job.name]) if row["event"] == "start"), {}).get("upstream") or {}
        for name in job.upstream if done[job.name] else ():
            if name in found:
                found[job.name] = found[name]
            elif name in seen and (not done[name] or good_attempt(events[name]) != seen[name]):
                found[job.name] = f"{name} was run again since" if done[name] else f"{name} is to be run again"
    return found
