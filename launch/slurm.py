"""The cluster `slurm`: job arrays through submitit, and what Slurm says of them. Imports no torch."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from poserelay.errors import UserError
from poserelay.run import write_atomic

from .commands import COMMANDS
from .config import Slurm
from .graph import Job
from .plan import Plan, Submitted, submitted_ids, write_submitted
from .task import Task

NO_SBATCH = (
    "sbatch is not on this machine: submit from a login node of the cluster, or run the same graph here with "
    "--cluster local"
)


# What a user's own environment may choose where the graph does not.
DEFAULTED = ("partition", "account", "qos", "constraint")


class _Executor(SlurmExecutor):
    """Prints scripts where there is no Slurm, too."""

    @classmethod
    def affinity(cls) -> int:
        return 2


@dataclass(frozen=True)
class Array:
    """Jobs of one stage that are submitted together: a Slurm array, or a plain job where it is one."""

    jobs: list[Job]
    dependency: str | None
    """As sbatch takes it."""


@dataclass(frozen=True)
class QueueEntry:
    """What Slurm says of a job."""

    state: str
    """PENDING, RUNNING, COMPLETING, FAILED, ..."""
    reason: str
    """Why it waits: Dependency, Resources, Priority, ...; None where it does not."""
    live: bool
    """Whether it runs or will run."""


def submit(plan: Plan, jobs: Sequence[Job], submitted: Submitted) -> Iterator[Array]:
    """Submit `jobs`, stage by stage, and enter their ids in `submitted`, which is written before and after each array.

    Yields each array once it is submitted. Ctrl-C is not heeded in between.

    Jobs upstream that are not among `jobs` are waited for if `submitted` has an id of them: they are under way.

    Raises:
        UserError: Slurm refuses, in its words. What was submitted before by this call is cancelled.
    """
    if not shutil.which("sbatch"):
        raise UserError(NO_SBATCH)
    names = {job.name for job in jobs}
    waited = {name: job_id for name, job_id in submitted.ids.items() if name not in names}
    sizes = _whole_arrays(plan, waited)
    new: list[str] = []
    for stage in dict.fromkeys(job.stage for job in jobs):
        for array in arrays([job for job in jobs if job.stage == stage], waited, sizes):
            comment = f"poserelay {uuid.uuid4().hex}"
            submitted.begun[comment] = [job.name for job in array.jobs]
            write_submitted(plan, submitted)
            with _uninterrupted():
                try:
                    ids = _submit_array(plan, array, comment)
                except (FailedJobError, FailedSubmissionError, OSError) as error:
                    cancel(new)
                    raise UserError(
                        f"stage {stage}: sbatch: {_words(error)}; nothing of this was queued (without a cluster: "
                        "--cluster local)"
                    ) from error
                new += ids
                sizes[ids[0].split("_")[0]] = len(ids)
                for job, job_id in zip(array.jobs, ids, strict=True):
                    waited[job.name] = submitted.ids[job.name] = job_id
                del submitted.begun[comment]
                write_submitted(plan, submitted)
            yield array


def adopt(submitted: Submitted, owner: int) -> list[str]:
    """Enter the ids of submissions that were killed before they noted them: Slurm knows them by their comment.

    Returns the jobs whose ids these are.
    """
    adopted: dict[str, str] = {}
    for line in (_squeue(owner, "%A|%F|%k") or []) if submitted.begun else []:
        job_id, array, comment = line.split("|", 2)
        names = submitted.begun.get(comment.strip(), [])
        known = submitted_ids(names, array.strip() if len(names) > 1 else job_id.strip()) if names else {}
        adopted |= {name: known[name] for name in names if name not in submitted.ids}
    submitted.ids |= adopted
    return list(adopted)


def supply(plan: Plan, submitted: Submitted, names: Sequence[str]) -> None:
    """Write the tasks of adopted jobs, which submitit does only after sbatch: they wait a minute for them, and fail."""
    for job in plan.jobs:
        if job.name in names:
            path = plan.run / "launch" / "submitit" / f"{submitted.ids[job.name]}_submitted.pkl"
            if not path.exists():
                write_atomic(path, DelayedSubmission(task_of(plan, job)).dump)


def _whole_arrays(plan: Plan, ids: Mapping[str, str]) -> dict[str, int]:
    """Arrays that are a whole stage, with their number of jobs.

    Of others it is not known how many jobs they had: one that was submitted anew may have been the last.
    """
    found = {}
    for stage in dict.fromkeys(job.stage for job in plan.jobs):
        theirs = [ids.get(job.name, "") for job in plan.jobs if job.stage == stage]
        array = theirs[0].partition("_")[0]
        if array and theirs == [f"{array}_{place}" for place in range(len(theirs))]:
            found[array] = len(theirs)
    return found


def arrays(jobs: Sequence[Job], ids: Mapping[str, str], sizes: Mapping[str, int]) -> list[Array]:
    """Jobs of one stage in as few arrays as their dependencies allow.

    `ids` are those of the jobs that may be waited for, `sizes` the numbers of jobs of whole arrays. A job that waits
    for its own element of an array of the same size does so by aftercorr, others by afterok on what they need.
    """
    needs = {job.name: tuple(ids[name] for name in job.upstream if name in ids) for job in jobs}
    by_arrays: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        by_arrays.setdefault(tuple(dict.fromkeys(need.split("_")[0] for need in needs[job.name])), []).append(job)
    found = []
    for group in by_arrays.values():
        rows = [needs[job.name] for job in group]
        columns = _corresponding(rows, sizes)
        rest = [tuple(need for need in row if need.split("_")[0] not in columns) for row in rows]
        if len(set(rest)) == 1:
            found.append(Array(group, _dependency(rest[0], sizes, columns)))
            continue
        alike: dict[tuple[str, ...], list[Job]] = {}
        for job, row in zip(group, rows, strict=True):
            alike.setdefault(row, []).append(job)
        found += [Array(part, _dependency(row, sizes, [])) for row, part in alike.items()]
    return found


def _corresponding(needs: Sequence[tuple[str, ...]], sizes: Mapping[str, int]) -> list[str]:
    """Arrays of which every job needs the element of its own position, and that alone."""
    found = []
    for array in dict.fromkeys(need.split("_")[0] for row in needs for need in row if "_" in need):
        theirs = [[need for need in row if need.split("_")[0] == array] for row in needs]
        if sizes.get(array) == len(needs) and theirs == [[f"{array}_{place}"] for place in range(len(needs))]:
            found.append(array)
    return found if len(needs) > 1 else []


def _dependency(needs: Sequence[str], sizes: Mapping[str, int], corresponding: Sequence[str]) -> str | None:
    """sbatch's --dependency: all of `needs` have ended well, whole arrays named as such."""
    whole = [array for array, size in sizes.items() if size > 1 and {f"{array}_{n}" for n in range(size)} <= set(needs)]
    waits = [*whole, *(need for need in dict.fromkeys(needs) if need.split("_")[0] not in whole)]
    parts = [f"afterok:{':'.join(waits)}"] if waits else []
    parts += [f"aftercorr:{array}" for array in corresponding]
    return ",".join(parts) or None


def script(plan: Plan, array: Array) -> str:
    """The sbatch script of an array."""
    executor = _executor(plan, array, None)
    if len(array.jobs) > 1:
        executor.parameters["map_count"] = len(array.jobs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _submit_array(plan: Plan, array: Array, comment: str) -> list[str]:
    executor = _executor(plan, array, comment)
    tasks = [task_of(plan, job) for job in array.jobs]
    # submitit prints Slurm's refusal and raises it too.
    with _own_options(array.jobs[0].slurm), contextlib.redirect_stderr(io.StringIO()):
        if len(tasks) == 1:
            return [executor.submit(tasks[0]).job_id]
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
        return [job.job_id for job in jobs]


def task_of(plan: Plan, job: Job) -> Task:
    """What Slurm starts for a job."""
    by_name = {other.name: other for other in plan.jobs}
    return Task(
        name=job.name,
        arguments=[*job.command.split(), "--config", str(plan.record(job) / "config.yaml")],
        record=str(plan.record(job)),
        code=plan.code,
        upstream={name: str(plan.record(by_name[name])) for name in job.upstream},
        cpus=job.resources.cpus,
        saves=COMMANDS[job.command].trains,
        max_requeues=plan.max_requeues,
    )


def _executor(plan: Plan, array: Array, comment: str | None) -> _Executor:
    first = array.jobs[0]
    resources, slurm = first.resources, first.slurm
    executor = _Executor(folder=plan.run / "launch" / "submitit")
    options: dict[str, Any] = {
        "job_name": f"{plan.run.name}.{first.stage}",
        "time": minutes(slurm.time),
        "signal_delay_s": slurm.signal_delay,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.processes_per_node,
        "cpus_per_task": resources.cpus,
        "gpus_per_node": resources.gpus or None,
        "mem": None if resources.memory is None else f"{round(resources.memory * 1024)}M",
        "dependency": array.dependency,
        "comment": comment,
        "array_parallelism": slurm.max_parallel,
        "stderr_to_stdout": True,
        **{name: getattr(slurm, name) for name in ("partition", "account", "qos", "constraint", "gres")},
        **{name: getattr(slurm, name) for name in ("mail_user", "mail_type")},
        # Before our own first line, in which PYTHONPATH's first entry must be the snapshot.
        "setup": [*slurm.setup, f"export PYTHONPATH={shlex.quote(plan.code)}${{PYTHONPATH:+:$PYTHONPATH}}"],
        # From Slurm 22.05 on srun does not take --cpus-per-task from the job. When one process fails, the others, which
        # wait for it, are ended; one that is done does not end the others.
        "srun_args": [f"--cpus-per-task={resources.cpus}", "--kill-on-bad-exit=1", "--wait=0", "--export=ALL"],
        "additional_parameters": {
            "chdir": plan.code,
            "requeue": True,
            "kill-on-invalid-dep": "yes",
            **{name.replace("_", "-"): value for name, value in slurm.extra.items()},
        },
    }
    # submitit's own default names a workload key, which some sites refuse.
    executor.update_parameters(wckey=None, **{name: value for name, value in options.items() if value is not None})
    return executor


def minutes(time: str) -> int:
    """Whole minutes, rounded up, of a time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, (mins, seconds) = 0, [*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)


def cancel(ids: Sequence[str]) -> None:
    """scancel; ids that Slurm no longer knows are no error."""
    if ids and shutil.which("scancel"):
        subprocess.run(["scancel", *ids], capture_output=True, check=False)


def queue(ids: Sequence[str], owner: int) -> dict[str, QueueEntry] | None:
    """What Slurm says of these jobs of user `owner`: those in the queue, and ended ones that it still remembers.

    None where it does not answer. Accounting (sacct) is asked for jobs that have left, and may know nothing.
    """
    if not ids:
        return {}
    lines = _squeue(owner, "%i|%T|%r")
    if lines is None:
        return None
    wanted, found = set(ids), {}
    for line in lines:
        job_id, state, reason = (part.strip() for part in [*line.split("|", 2), "", ""][:3])
        if job_id in wanted:
            found[job_id] = QueueEntry(state, reason, live=state not in ENDED)
    missing = sorted(wanted - set(found))
    return {**_accounted(missing), **found} if missing else found


def _squeue(owner: int, form: str) -> list[str] | None:
    """Lines of squeue about all jobs of a user that it knows, a line for every element of an array."""
    command = ["squeue", "--user", str(owner), "--array", "--noheader", "--states=all", f"--format={form}"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}  # they hide jobs
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=own)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if shown.returncode else shown.stdout.splitlines()


# Of `man squeue`, job states that a job does not leave.
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


def _accounted(ids: Sequence[str]) -> dict[str, QueueEntry]:
    """Ended jobs as the accounting database knows them; none without one."""
    command = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State", "--jobs", ",".join(ids)]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = (line.split("|") for line in shown.stdout.splitlines() if line.count("|") == 1)
    return {
        job_id: QueueEntry(state.split()[0], "None", live=False)
        for job_id, state in rows
        if job_id in ids and state.split() and state.split()[0] in ENDED
    }


@contextlib.contextmanager
def _own_options(slurm: Slurm) -> Iterator[None]:
    """Without variables that sbatch would prefer to the script's options, or that are another job's.

    A user's own SBATCH_PARTITION and the like hold where the graph says nothing. (submitit's `clean_env` removes these,
    and SLURM_CONF.)
    """
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SBATCH_CLUSTERS", "SBATCH_RESERVATION"}
    kept |= {f"SBATCH_{name.upper()}" for name in DEFAULTED if getattr(slurm, name) is None}
    ours = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
    removed = {name: value for name, value in os.environ.items() if name.startswith(ours) and name not in kept}
    for name in removed:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(removed)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C, which sbatch would get as well, is not heeded: a job whose id is not noted could not be cancelled."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _words(error: Exception) -> str:
    """Slurm's own words in one line."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip()).removeprefix("sbatch: ")
