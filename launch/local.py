"""The clusters `local` (processes of this machine) and `debug` (this very process). Import no torch."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from poserelay.errors import CheckFailed, Interrupted, UserError

from .attempts import append_event, is_interruption, read_events, reason_of, requeues
from .graph import Job
from .plan import Plan
from .process import contract, start

SECONDS_BETWEEN_LOOKS = 0.05
# The processes of a job whose first has failed wait for it in vain; they get this long to notice.
SECONDS_TO_END = 20


@dataclass
class Running:
    """A started job."""

    job: Job
    attempt: str
    processes: list[subprocess.Popen[bytes]]
    offsets: list[int]
    """Bytes of the logs before this attempt."""
    gpus: list[str]
    began: float
    codes: dict[int, int] = field(default_factory=dict)
    """Rank to exit code, of those that have ended."""
    ending: float | None = None
    """When the others were told to end, for one that failed."""


def run_local(plan: Plan, jobs: Sequence[Job]) -> None:
    """Run `jobs` here, each after those upstream, as many at once as `plan.local` allows.

    Raises:
        UserError: a job asks for more GPUs than there are; a job failed by a mistake of the user's.
        CheckFailed: a job failed otherwise.
        Interrupted: a signal came; every job was told, and is saved.
    """
    gpus = _check_gpus(plan, jobs)
    waiting, running, failed = list(jobs), list[Running](), dict[str, tuple[int, str]]()
    done = {job.name for job in plan.jobs if job not in jobs}
    total, stopped = len(jobs), list[int]()

    def stop(number: int, _frame: Any) -> None:
        stopped.append(number)
        for job in running:
            _signal(job, number)

    with _handling(stop):
        while running or (waiting and not stopped):
            for job in list(waiting) if not stopped else []:
                if any(name in failed for name in job.upstream):
                    waiting.remove(job)
                    name = next(name for name in job.upstream if name in failed)
                    failed[job.name] = (0, f"not run: {name} failed")
                elif (
                    len(running) < plan.local.jobs
                    and done.issuperset(job.upstream)
                    and len(gpus) >= job.resources.gpus * job.resources.nodes
                ):
                    waiting.remove(job)
                    taken = [gpus.pop(0) for _ in range(job.resources.gpus * job.resources.nodes)]
                    running.append(_start(plan, job, taken))
                    if stopped:  # while it was started, before `stop` could see it
                        _signal(running[-1], stopped[0])
                    _say(f"{job.name}: started")
            for current in list(running):
                if not _ended(plan, current):
                    continue
                running.remove(current)
                gpus.extend(current.gpus)
                name, seconds = current.job.name, time.monotonic() - current.began
                code, reason, again = _outcome(plan, current, bool(stopped))
                if again:
                    waiting.insert(0, current.job)
                    _say(f"{name}: interrupted and saved; starting it again")
                elif code == 0:
                    done.add(name)
                    ended = len(done) - len(plan.jobs) + total
                    _say(f"{name}: done in {seconds:.0f} s ({ended} of {total})")
                elif not (stopped and is_interruption(code)):
                    failed[name] = (code, reason)
                    _say(f"{name}: failed: {reason}")
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if stopped:
        raise Interrupted(
            f"{signal.Signals(stopped[0]).name}: {total - len(set(done) & {job.name for job in jobs})} of {total} jobs "
            f"are not done; `python -m launch resume {plan.typed}` goes on"
        )
    report_failures(plan, failed)


def report_failures(plan: Plan, failed: dict[str, tuple[int, str]]) -> None:
    """Raise what the first failure of a launch is to its user; `failed` maps jobs to exit code and reason."""
    if not failed:
        return
    name, (code, reason) = next(item for item in failed.items() if item[1][0])
    kind = UserError if code == 2 else CheckFailed
    raise kind(
        f"{name} failed: {reason} ({len(failed)} of {len(plan.jobs)} jobs failed or were not run; "
        f"`python -m launch status {plan.typed}` lists them, `launch resume` starts them again)"
    )


def run_here(plan: Plan, jobs: Sequence[Job]) -> None:
    """Run `jobs` one after the other in this process, for a debugger; errors of ours end with their traceback.

    Raises UserError and CheckFailed as `run_local`, Interrupted when a job stopped at a signal.
    """
    failed: dict[str, tuple[int, str]] = {}
    for job in jobs:
        if job.resources.world > 1:
            raise UserError(
                f"stage {job.stage}: its resources ask for {job.resources.world} processes, and the cluster debug is "
                "one; use --cluster local"
            )
    for number, job in enumerate(jobs):
        record = plan.record(job)
        before = [name for name in job.upstream if name in failed]
        if before:
            failed[job.name] = (0, f"not run: {before[0]} failed")
            continue
        attempt = f"{socket.gethostname()}.{os.getpid()}.{number}"
        _note_start(plan, job, attempt)
        module, *command = job.command.split()
        main = import_module(f"{module}.__main__").main
        with _environment(
            contract(rank=0, world=1, local_rank=0, local_world=1, node=0, address="127.0.0.1", port=_free_port())
        ):
            log = record / "rank0.log"
            offset = log.stat().st_size if log.exists() else 0
            try:
                with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stderr(_Both(sys.stderr, file)):
                    code = main([*command, "--config", str(record / "config.yaml")])
            except BaseException as error:
                told = f"{type(error).__name__}: {error}"
                append_event(record, "end", attempt=attempt, rank=0, code=1, reason=told)
                raise
        reason = reason_of(code, log, offset) if code else None
        append_event(record, "end", attempt=attempt, rank=0, code=code, reason=reason)
        if is_interruption(code):
            raise Interrupted(f"{job.name} was interrupted; `python -m launch resume {plan.typed}` goes on")
        if code:
            failed[job.name] = (code, str(reason))
    report_failures(plan, failed)


class _Both(io.TextIOBase):
    """What a stage tells on the terminal, kept in its log too."""

    def __init__(self, terminal: IO[str], file: IO[str]) -> None:
        self._terminal, self._file = terminal, file

    def write(self, text: str, /) -> int:
        self._file.write(text)
        return self._terminal.write(text)

    def flush(self) -> None:
        self._file.flush()
        self._terminal.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()


def _start(plan: Plan, job: Job, gpus: Sequence[str]) -> Running:
    """Start all processes of a job."""
    record, port = plan.record(job), _free_port()
    number = sum(row["event"] == "start" for row in read_events(record))
    attempt = f"{socket.gethostname()}.{os.getpid()}.{number}"
    local = job.resources.processes_per_node
    logs = [record / f"rank{rank}.log" for rank in range(job.resources.world)]
    offsets = [log.stat().st_size if log.exists() else 0 for log in logs]
    _note_start(plan, job, attempt)
    processes = []
    for rank, log in enumerate(logs):
        environment = contract(
            rank=rank,
            world=job.resources.world,
            # All on one machine: a node of the graph is a part of it, with its own GPUs.
            local_rank=rank,
            local_world=job.resources.world,
            node=rank // local,
            address="127.0.0.1",
            port=port,
        )
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        arguments = [*job.command.split(), "--config", str(record / "config.yaml")]
        processes.append(start(arguments, Path(plan.code), environment, job.resources.cpus, log, session=True))
    return Running(job, attempt, processes, offsets, list(gpus), time.monotonic())


def _note_start(plan: Plan, job: Job, attempt: str) -> None:
    who = {"job": None, "host": socket.gethostname(), "pid": os.getpid()}
    append_event(plan.record(job), "start", attempt=attempt, **who, upstream=plan.upstream_attempts(job))


def _ended(plan: Plan, running: Running) -> bool:
    """Note which processes have ended, end those that wait for a failed one; whether all have."""
    for rank, process in enumerate(running.processes):
        if rank in running.codes or process.poll() is None:
            continue
        code = running.codes[rank] = process.returncode
        _kill_group(process)
        record = plan.record(running.job)
        if rank or (code and not is_interruption(code)):
            reason = reason_of(code, record / f"rank{rank}.log", running.offsets[rank]) if code else None
            append_event(record, "end", attempt=running.attempt, rank=rank, code=code, reason=reason)
        if code and not is_interruption(code) and running.ending is None:
            running.ending = time.monotonic()
    left = [process for rank, process in enumerate(running.processes) if rank not in running.codes]
    if left and running.ending is not None and time.monotonic() - running.ending > SECONDS_TO_END:
        for process in left:
            _kill_group(process)
    return not left


def _outcome(plan: Plan, running: Running, stopped: bool) -> tuple[int, str, bool]:
    """Exit code of a job that has ended, why, and whether it is to be started again; the end is recorded."""
    record = plan.record(running.job)
    bad = {rank: code for rank, code in running.codes.items() if code and not is_interruption(code)}
    rank, code = next(iter(bad.items()), (0, running.codes[0]))
    reason = reason_of(code, record / f"rank{rank}.log", running.offsets[rank]) if code else ""
    if bad:
        return code, reason, False
    again = code != 0 and not stopped and requeues(read_events(record)) < plan.max_requeues
    if code and not again and not stopped:
        reason += f"; not started again: that was done max_requeues = {plan.max_requeues} times"
    append_event(record, "end", attempt=running.attempt, rank=0, code=code, reason=reason or None, requeued=again)
    return code, reason, again


def _signal(running: Running, number: int) -> None:
    number = signal.SIGTERM if number == signal.SIGINT else number  # which Python would make an exception, exit code 1
    for rank, process in enumerate(running.processes):
        if rank not in running.codes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End what a process left behind, such as the workers of one that was killed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _handling(stop: Any) -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_gpus(plan: Plan, jobs: Sequence[Job]) -> list[str]:
    """Numbers or names of the GPUs that jobs may get. UserError where one needs more than there are."""
    gpus = [str(gpu) for gpu in plan.local.gpus] if plan.local.gpus is not None else _gpus_here()
    for job in jobs:
        wanted = job.resources.gpus * job.resources.nodes
        if wanted > len(gpus):
            raise UserError(
                f"stage {job.stage}: its resources ask for {wanted} GPUs, this machine has {len(gpus)} for it; set its "
                "resources.gpus and resources.nodes lower (the batch per process stays, so look at batch_size and lr)"
            )
    return gpus


def _gpus_here() -> list[str]:
    """GPUs that this process may use, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(gpu) for gpu in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # `2>&1 | head` has seen enough; the jobs go on
        print(line, file=sys.stderr, flush=True)
