"""Fields of `python -m launch` and its commands. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from poserelay.config import File, OptionalFile, check_ranges


@dataclass(frozen=True)
class Resources:
    """What one job of a stage gets, on every kind of cluster."""

    nodes: int = 1
    """Machines; the local cluster takes them all from this one."""
    gpus: int = 0
    """Per node; each gets a process of its own. 0 runs on the CPU."""
    processes: int | None = None
    """Per node; null: one per GPU, and one where there is none."""
    cpus: int = 1
    """Cores per process: its data workers and one for itself."""
    memory: float | None = None
    """GB per node; null leaves the cluster's default."""

    def __post_init__(self) -> None:
        check_ranges(self, {"nodes": (1, math.inf), "gpus": (0, math.inf), "cpus": (1, math.inf)}, "resources.")
        if self.processes is not None:
            check_ranges(self, {"processes": (1, math.inf)}, "resources.")
            if self.gpus and self.processes != self.gpus:
                raise ValueError(
                    f"resources.processes is {self.processes} with {self.gpus} GPUs per node: it is one per GPU; "
                    "leave it out"
                )
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"resources.memory is {self.memory}, expected GB above 0")

    @property
    def processes_per_node(self) -> int:
        """Processes that each node runs."""
        return self.processes or max(1, self.gpus)

    @property
    def world(self) -> int:
        """Processes of a job over all its nodes."""
        return self.nodes * self.processes_per_node


# Options of sbatch that are not the user's.
SET_BY_US = {
    "array",
    "chdir",
    "comment",
    "dependency",
    "error",
    "job-name",
    "kill-on-invalid-dep",
    "output",
    "requeue",
    "signal",
}


@dataclass(frozen=True)
class Slurm:
    """How jobs are submitted: sbatch's options of the same names."""

    partition: str | None = None
    """Null: the cluster's default."""
    account: str | None = None
    """Null: the user's default."""
    qos: str | None = None
    """Null: the user's default."""
    constraint: str | None = None
    """Features that the nodes must have."""
    gres: str | None = None
    """Generic resources per node, beside resources.gpus (gpu:a100:4 instead of it, where a type must be named)."""
    time: str = "24:00:00"
    """Limit of one start, as sbatch takes it: minutes, "HH:MM:SS" (quoted) or "D-HH". A longer run is requeued."""
    signal_delay: int = 120
    """Seconds before the limit at which a job is told to save; longer than `log_every` steps and a validation."""
    mail_user: str | None = None
    """Address that Slurm writes to."""
    mail_type: str | None = None
    """When: END, FAIL, ..."""
    max_parallel: int = 256
    """Jobs of one array that run at once."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the job's own, such as `module load cuda`."""
    extra: dict[str, Value] = field(default_factory=dict)
    """Further options of sbatch: {exclude: node7, reservation: mine}."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d\d?(:\d\d){0,2}", self.time):
            raise ValueError(f"slurm.time is {self.time!r}, expected minutes, HH:MM:SS or D-HH:MM:SS")
        check_ranges(self, {"signal_delay": (1, 65535), "max_parallel": (1, math.inf)}, "slurm.")
        taken = SET_BY_US & {name.replace("_", "-") for name in self.extra}
        if taken:
            raise ValueError(f"slurm.extra: {min(taken)} is set by the launcher; leave it out")


@dataclass(frozen=True)
class Local:
    """How this machine runs jobs, of the cluster `local`."""

    jobs: int = 1
    """Jobs that run at once."""
    gpus: list[int] | None = None
    """GPUs to give to the jobs that ask for some; null: all of this machine's."""

    def __post_init__(self) -> None:
        check_ranges(self, {"jobs": (1, math.inf)}, "local.")
        if self.gpus is not None and (len(set(self.gpus)) < len(self.gpus) or min(self.gpus, default=0) < 0):
            raise ValueError(f"local.gpus is {self.gpus}, expected different numbers from 0 on")


# Not Any: the parser would read a text such as "1:00:00" as YAML, the number 3600.
Value = str | bool | int | float | list[Any] | dict[str, Any] | None


@dataclass(frozen=True)
class Stage:
    """One command, as one job or as a sweep of them."""

    command: str | None = None
    """What is run, `python -m COMMAND`: finetune, evaluation test, ...; null: the stage's name."""
    config: str | None = None
    """Recipe of that command; null: its defaults and `overrides`."""
    overrides: dict[str, Value] = field(default_factory=dict)
    """Dotted fields of the command to values. `${s}` is what stage s hands off, `${s.net2}` another file of its export,
    `${s.run_dir}` its folder."""
    sweep: dict[str, list[Value]] = field(default_factory=dict)
    """Dotted fields to the values they take, every combination a job; "a, b": [[1, 2], [3, 4]] changes two together."""
    existing: OptionalFile = None
    """Folder of an earlier run of this stage, alone or in another launch: it is not run again, `${s}` is what it left.
    (`--stages.NAME.existing DIR` on the command line.)"""
    after: list[str] = field(default_factory=list)
    """Stages to wait for as a whole, beside those that are named by `${}`."""
    resources: dict[str, Value] = field(default_factory=dict)
    """Fields of `resources` that differ for this stage."""
    slurm: dict[str, Value] = field(default_factory=dict)
    """Fields of `slurm` that differ for this stage."""


@dataclass(frozen=True)
class LaunchConfig:
    """Run a graph of stages. (`python -m launch status RUN`, logs, cancel, resume and collect look after it.)"""

    run_dir: File
    """Folder of the experiment; a stage's jobs run in RUN/STAGE, or RUN/STAGE/ratio=0.1_seed=0 of a sweep."""
    stages: dict[str, Stage]
    """Name to stage. `--NAME.FIELD VALUE` on the command line overrides a field of the stage's command."""
    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm submits and returns; local runs everything here, in order of dependency; debug too, in this process."""
    resources: Resources = field(default_factory=Resources)
    slurm: Slurm = field(default_factory=Slurm)
    local: Local = field(default_factory=Local)
    max_requeues: int = 20
    """Times that the launcher starts a job again which a signal stopped and which is saved (exit 75). Slurm's own
    requeues after a preemption do not count."""
    dry_run: bool = False
    """Print the jobs, what they wait for, their resources and scripts; write and submit nothing."""

    def __post_init__(self) -> None:
        check_ranges(self, {"max_requeues": (0, math.inf)})
        if not self.stages:
            raise ValueError("stages is empty, expected at least one")


@dataclass(frozen=True)
class StatusConfig:
    """Tell where every job of a launch is."""

    run: File
    """The launch's run_dir."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class LogsConfig:
    """Print what the jobs of a stage wrote."""

    run: File
    """The launch's run_dir."""
    stage: str
    """Stage, or one job of it: finetune/ratio=0.1_seed=0."""
    lines: int = 40
    """Last lines of each file; 0 prints all."""

    def __post_init__(self) -> None:
        check_ranges(self, {"lines": (0, math.inf)})


@dataclass(frozen=True)
class CancelConfig:
    """Stop the jobs of a launch; what they saved stays."""

    run: File
    """The launch's run_dir."""
    stage: str | None = None
    """Stage, or one job of it; null: all."""


@dataclass(frozen=True)
class ResumeConfig:
    """Start again what is neither done nor under way."""

    run: File
    """The launch's run_dir."""
    new_code: bool = False
    """Run the checkout's present code instead of the code of the first submission."""


@dataclass(frozen=True)
class CollectConfig:
    """Put the metrics of all jobs into one table, with mean and spread over seeds, and draw learning curves."""

    run: File
    """The launch's run_dir."""
    json: bool = False
    """Print one JSON object instead of the table."""
