"""What Slurm starts on every node, once per process of a job: it starts the stage, passes signals on, and requeues.

Imports neither torch nor a stage, so that it adds little to a job's start. The stage is a process of its own, since a
stage's exit code is what decides: submitit's own handler would requeue on a signal, before anything is saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .attempts import (
    INTERRUPTED,
    append_event,
    failures,
    good_attempt,
    is_interruption,
    read_events,
    reason_of,
    requeues,
)
from .process import contract, start

# That scontrol is tried again while slurmctld cannot be reached.
SECONDS_FOR_SLURM = 300


@dataclass(frozen=True)
class Task:
    """A job as it is pickled for submitit; called in each of the job's processes."""

    name: str
    """Of the job."""
    arguments: list[str]
    """What follows `python -m`."""
    record: str
    """Folder of the job's attempts and logs."""
    code: str
    """Folder of the code."""
    upstream: dict[str, str]
    """Jobs that must have ended well: name to the folder of their attempts."""
    cpus: int
    saves: bool
    """Whether the stage goes on where a signal stopped it, and does not begin again."""
    max_requeues: int

    def __call__(self) -> None:
        """Run the stage; SystemExit with its exit code when that is not 0."""
        code = self._run(int(os.environ["SLURM_PROCID"]))
        if code:
            sys.exit(code if code > 0 else 128 - code)

    def _run(self, rank: int) -> int:
        record, job = Path(self.record), slurm_id()
        attempt = f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"  # the same in all of the job's processes
        log = record / f"rank{rank}.log"
        offset = log.stat().st_size if log.exists() else 0
        upstream = {name: good_attempt(read_events(Path(folder))) for name, folder in self.upstream.items()}
        if rank == 0:
            who = {"job": job, "host": socket.gethostname(), "pid": os.getpid()}
            append_event(record, "start", attempt=attempt, **who, upstream=upstream)
        unfinished = [name for name, seen in upstream.items() if seen is None]
        if unfinished:
            reason = f"upstream {unfinished[0]} has not ended well; `launch status` tells why, `launch resume` goes on"
            append_event(record, "end", attempt=attempt, rank=rank, code=2, reason=reason)
            return 2
        received: list[str] = []
        code = self._stage(rank, log, received)
        if code == 0 or (rank and is_interruption(code)):
            # An end of another code would let srun end rank 0, which may be saving yet.
            append_event(record, "end", attempt=attempt, rank=rank, code=code)
            return 0
        end: dict[str, Any] = {"attempt": attempt, "rank": rank, "code": code, "reason": reason_of(code, log, offset)}
        if not is_interruption(code):
            append_event(record, "end", **end)
            return code
        return self._interrupted(record, job, end, received)

    def _stage(self, rank: int, log: Path, received: list[str]) -> int:
        """Start the stage and wait for it; signals that come are passed on and added to `received`."""
        process: subprocess.Popen[bytes] | None = None

        def pass_on(number: int, _frame: Any) -> None:
            received.append(signal.Signals(number).name)
            if process:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, pass_on)
        if received:
            return INTERRUPTED
        process = start(self.arguments, Path(self.code), slurm_contract(), self.cpus, log, session=False)
        if received:
            process.terminate()
        return process.wait()

    def _interrupted(self, record: Path, job: str, end: dict[str, Any], received: list[str]) -> int:
        """The stage is saved, or had not begun: start the job again, unless Slurm has decided what becomes of it.

        In a preemption's grace time Slurm has not, and would take a job that ends by itself for a failed one.
        """
        end["signal"] = received[-1] if received else None
        events = read_events(record)
        verdict = slurm_verdict(job)
        if failures(events, end["attempt"]):
            # Another process failed, and srun ended this one for it.
            append_event(record, "end", **end, requeued=False)
        elif verdict != "RUNNING":
            if verdict == "unknown":
                end["reason"] = f"{end['reason']}; Slurm did not answer, so it was not started again"
            if verdict == "TIMEOUT":
                end["reason"] = f"{end['reason']}; too late to be started again: raise slurm.signal_delay"
            append_event(record, "end", **end, requeued=False, slurm=verdict)
        elif end["code"] == -signal.SIGUSR2 and not self.saves:
            end["reason"] = "its time limit was near, and it would begin from the start again: raise slurm.time"
            append_event(record, "end", **end, requeued=False)
        elif requeues(events) >= self.max_requeues:
            end["reason"] = (
                f"{end['reason']}; not started again: that was done max_requeues = {self.max_requeues} times"
            )
            append_event(record, "end", **end, requeued=False)
        else:
            append_event(record, "end", **end, requeued=True)
            done = scontrol("requeue", job)
            # Slurm now ends what is left of the job, and waits KillWait for processes that do not end by themselves.
            if done.returncode:
                reason = f"saved, but `scontrol requeue {job}` said: {done.stderr.strip()}"
                append_event(record, "end", **{**end, "reason": reason}, requeued=False)
        return INTERRUPTED


def slurm_id() -> str:
    """Id of this job as squeue prints it: 123, or 123_4 of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run scontrol to its end: Slurm sends its signals, some of them twice, to every process of a job.

    A slurmctld that is restarted is waited for.
    """

    def heed_none() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    until = time.monotonic() + SECONDS_FOR_SLURM
    while True:
        command = ["scontrol", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=heed_none)
        away = any(words in done.stderr for words in ("contact", "timed out", "Communication"))
        if done.returncode == 0 or not away or time.monotonic() > until:
            return done
        time.sleep(5)


def slurm_verdict(job: str) -> str:
    """What Slurm has decided of a job that got a signal: RUNNING is nothing yet, else CANCELLED, TIMEOUT or REQUEUED.

    All of these are COMPLETING while their processes end; one that is requeued has no end by then.
    """
    shown = scontrol("show", "job", "-o", job)
    fields = {name: value for name, _, value in (field.partition("=") for field in shown.stdout.split())}
    state = fields.get("JobState", "unknown")
    if state == "COMPLETING":
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if fields.get("EndTime") == "Unknown" or int(fields.get("Restarts", "0")) > restarts:
            return "REQUEUED"
        return "TIMEOUT" if fields.get("Reason") == "TimeLimit" else "CANCELLED"
    return "REQUEUED" if state == "PENDING" else state


def slurm_contract() -> dict[str, str]:
    """The environment of the design's Processes contract, from Slurm's own."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    world, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    return contract(
        rank=int(os.environ["SLURM_PROCID"]),
        world=world,
        local_rank=int(os.environ["SLURM_LOCALID"]),
        local_world=world // nodes,
        node=int(os.environ["SLURM_NODEID"]),
        address="127.0.0.1" if nodes == 1 else SlurmJobEnvironment().hostnames[0],
        # The same for every process of the job, another for every job of a node.
        port=20000 + int(os.environ["SLURM_JOB_ID"]) % 12000,
    )
