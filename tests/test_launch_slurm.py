"""The launcher on a real Slurm: the whole experiment, many nodes, and what befalls jobs there.

All launches are submitted at once and what befalls their jobs happens in threads, for most of the time is waiting; a
test waits for its own. Nothing befalls seed 0 of the array, whose bytes the other long runs must reach.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.__main__ import main
from launch.attempts import read_events
from launch.config import Local, Resources, Slurm
from launch.graph import Job
from launch.plan import Plan, Submitted, read_plan, read_submitted, write_plan
from launch.snapshot import PACKAGES, ROOT
from launch.status import JobStatus, job_statuses
from launch.submission import start
from poserelay.run import read_metrics

from .slurm_cluster import Cluster, all_processes, daemons, missing, slurm_cluster
from .test_training import assert_same_run, finetune_arguments, pretrain_arguments

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

OVER = threading.Event()  # the cluster is being stopped
STEPS = 100  # of 24 pictures in batches of 6: long enough to be met under way
# A job of `high` that wants a node's GPUs preempts the one that has them, and no other.
ALL_GPUS = {"n1": {"gres": "gpu:2", "extra": {"nodelist": "n1"}}, "n2": {"gres": "gpu:2", "extra": {"nodelist": "n2"}}}
SMALL_JOB = {"command": "poserelay synthesize", "overrides": {"images": 1, "size": 64, "workers": 1}}


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m launch`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def submit(folder: Path, stages: dict[str, Any], *arguments: object, **fields: Any) -> tuple[int, str, str]:
    """Launch a graph into FOLDER on the cluster slurm."""
    file = folder.with_suffix(".graph.yaml")
    # Three jobs to a node: more would hardly end within KillWait on two cores.
    file.write_text(yaml.safe_dump({"stages": stages, "resources": {"memory": 20}, **fields}))
    return call("--config", file, "--run_dir", folder, "--cluster", "slurm", *arguments)


def statuses(run: Path) -> dict[str, JobStatus]:
    found, note = job_statuses(read_plan(run))
    assert note is None
    return {status.name: status for status in found}


def wait_until(seen: Callable[[], Any], seconds: float = 400, told: Callable[[], object] = lambda: "") -> Any:
    until = time.monotonic() + seconds
    while not (found := seen()):
        assert not OVER.is_set()
        assert time.monotonic() < until, f"not seen within {seconds} s: {told()}"
        time.sleep(0.1)
    return found


def ended(run: Path, *jobs: str, seconds: float = 400) -> dict[str, JobStatus]:
    """The status of a launch once none of `jobs`, or of all, is under way."""

    def seen() -> dict[str, JobStatus] | None:
        found = statuses(run)
        under_way = [name for name in jobs or found if found[name].state in ("running", "pending")]
        return None if under_way else found

    return wait_until(seen, seconds, lambda: [(s.name, s.state, s.reason) for s in statuses(run).values()])


def resume_apart(run: Path) -> None:
    """In a process of its own: signals are for main threads alone."""
    command = [sys.executable, "-m", "launch", "resume", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def slurm_id(run: Path, job: str) -> str:
    return read_submitted(read_plan(run)).ids[job]


def started(run: Path, job: str, attempt: int = 1, step: int = 5) -> int:
    """Wait until a training job has logged `step` in its attempt; the process of its stage."""
    metrics = run / job / "metrics.jsonl"

    def seen() -> bool:
        rows = read_metrics(metrics) if metrics.exists() else []
        rows = [row for row in rows if row["attempt"] >= attempt and row["kind"] == "train"]
        return len(rows) >= step

    wait_until(seen, told=lambda: statuses(run)[job])
    return json.loads((run / job / "status.json").read_text())["pid"]


def parent(process: int) -> int:
    """The launcher's process, which started a stage's."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def processes_of(run: Path, job: str) -> dict[int, int]:
    """Rank to the process of a job's stage."""
    config, found = str(run / "launch" / "jobs" / job / "config.yaml"), {}
    for process in all_processes():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            if config in command:
                variables = Path(f"/proc/{process}/environ").read_text().split("\0")
                found[next(int(value[5:]) for value in variables if value.startswith("RANK="))] = process
    return found


def has_pending(process: int, number: signal.Signals) -> bool:
    """Whether a stopped process will get this signal when it goes on, or it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return True
    return any(int(line.split()[1], 16) >> (number - 1) & 1 for line in lines if line.startswith("ShdPnd"))


class Launches:
    """The launches of this file in one folder, and what befalls their jobs."""

    def __init__(self, cluster: Cluster, folder: Path, people: Path) -> None:
        self.cluster, self.folder, self.people = cluster, folder, people
        self.pretrain, self.finetune = folder / "pretrain.yaml", folder / "finetune.yaml"
        pretrain_arguments(people, self.pretrain.with_suffix(""))
        finetune_arguments(people, self.finetune.with_suffix(""))
        self.long = {"command": "pretrain", "config": str(self.pretrain), "overrides": {"optim.epochs": STEPS // 4}}
        self.events: dict[str, Future[Any]] = {}

    def befall(self, pool: ThreadPoolExecutor, name: str, event: Callable[[], Any]) -> None:
        self.events[name] = pool.submit(event)

    def preempt(self, node: str) -> None:
        """Take the node's GPUs for a second."""
        self.cluster.run("sbatch", "-p", "high", "-w", node, "--gres=gpu:2", "-o", "/dev/null", "--wrap", "sleep 1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.run(
            *("scontrol", "create", "PartitionName=graceful", "Nodes=n1,n2"), *("PriorityTier=1", "GraceTime=60")
        )
        yield cluster


@pytest.fixture(scope="module")
def launches(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, people: Path) -> Iterator[Launches]:
    launches = Launches(cluster, tmp_path_factory.mktemp("launches"), people)
    pool = ThreadPoolExecutor(32)
    try:
        for befall in (_stopped, _array, _ended, _demo, _peers, _code, _mistakes):
            befall(launches, pool)
        yield launches
    finally:
        OVER.set()
        pool.shutdown()


def _stopped(launches: Launches, pool: ThreadPoolExecutor) -> None:
    """Jobs that are stopped, saved, and started again by Slurm or by the launcher."""
    run, cluster = launches.folder / "stopped", launches.cluster
    stages = {
        "limited": {**launches.long, "slurm": {"time": "1", "signal_delay": 5}},
        "preempted": {**launches.long, "slurm": ALL_GPUS["n2"]},
        "graceful": {**launches.long, "slurm": {"partition": "graceful", **ALL_GPUS["n1"]}},
    }
    assert submit(run, stages)[0] == 0

    def limited() -> None:
        """The stage is held up until Slurm has told it that the limit is near."""
        process = started(run, "limited")
        with contextlib.suppress(ProcessLookupError):  # it may have been told before
            os.kill(process, signal.SIGSTOP)
            wait_until(lambda: has_pending(process, signal.SIGUSR2), 90)
            os.kill(process, signal.SIGCONT)

    def preempted() -> None:
        for attempt in (1, 2):
            started(run, "preempted", attempt)
            launches.preempt("n2")
        started(run, "preempted", 3)
        cluster.run("scontrol", "requeue", slurm_id(run, "preempted"))

    def graceful() -> None:
        started(run, "graceful")
        launches.preempt("n1")

    for event in (limited, preempted, graceful):
        launches.befall(pool, event.__name__, event)


def _ended(launches: Launches, pool: ThreadPoolExecutor) -> None:
    """One job that is ended in three ways, each time submitted again by `launch resume`, and its dependent."""
    run, cluster = launches.folder / "ended", launches.cluster
    assert submit(run, {"train": launches.long, "after": {**SMALL_JOB, "after": ["train"]}})[0] == 0

    def fates() -> dict[str, dict[str, JobStatus]]:
        told = {}
        started(run, "train")
        cluster.run("scancel", slurm_id(run, "train"))
        told["scancel"] = ended(run)
        resume_apart(run)
        process = started(run, "train", 2)
        cluster.run("scancel", slurm_id(run, "after"))
        told["pending"] = ended(run, "after")
        os.kill(process, signal.SIGKILL)
        told["stage"] = ended(run)
        resume_apart(run)
        process = started(run, "train", 3)
        os.kill(parent(process), signal.SIGKILL)
        told["task"] = ended(run)
        wait_until(lambda: process not in all_processes(), 20)
        assert not (run / "after").exists()
        resume_apart(run)
        told["end"] = ended(run)
        return told

    launches.befall(pool, "fates", fates)


def _array(launches: Launches, pool: ThreadPoolExecutor) -> None:
    """Two seeds in one array: nothing befalls seed 0; seed 1 is told to save twice, and may be started again once."""
    run = launches.folder / "array"
    stages = {
        "train": {**launches.long, "sweep": {"seed": [0, 1]}},
        "weights": {"command": "poserelay export-weights", "overrides": {"checkpoint": "${train}", "layout": "timm"}},
    }
    assert submit(run, stages, max_requeues=1)[0] == 0

    def told_twice() -> dict[str, JobStatus]:
        for attempt in (1, 2):
            started(run, "train/seed=1", attempt)
            launches.cluster.run("scancel", "--signal=USR2", slurm_id(run, "train/seed=1"))
        return ended(run)

    launches.befall(pool, "told_twice", told_twice)


def _peers(launches: Launches, pool: ThreadPoolExecutor) -> None:
    """Two nodes: one job that is told to save once, one whose second process is killed."""
    run = launches.folder / "peers"
    two = {**launches.long, "resources": {"nodes": 2}}
    assert submit(run, {"train": two, "bereft": two})[0] == 0

    def two_nodes() -> JobStatus:
        started(run, "train")
        launches.cluster.run("scancel", "--signal=USR2", slurm_id(run, "train"))
        return ended(run, "train")["train"]

    def bereft() -> tuple[JobStatus, float]:
        started(run, "bereft")
        killed = time.monotonic()
        os.kill(processes_of(run, "bereft")[1], signal.SIGKILL)
        found = ended(run, "bereft")["bereft"]
        return found, time.monotonic() - killed

    launches.befall(pool, "bereft", bereft)
    launches.befall(pool, "two_nodes", two_nodes)


def _mistakes(launches: Launches, pool: ThreadPoolExecutor) -> None:
    """A file that is not there, on one node and on two; a time limit too short for what cannot save."""
    run = launches.folder / "mistakes"
    wrong = {
        "command": "finetune",
        "config": str(launches.finetune),
        "overrides": {"data.annotations": str(launches.folder / "absent.json")},
    }
    stages = {
        "one": wrong,
        "two": {**wrong, "resources": {"nodes": 2}},
        "after": {**SMALL_JOB, "after": ["one"]},
        "unsaved": {**SMALL_JOB, "overrides": {**SMALL_JOB["overrides"], "images": 100_000}},
    }
    assert submit(run, stages)[0] == 0

    def unsaved() -> JobStatus:
        wait_until((run / "unsaved/images").exists)
        launches.cluster.run("scancel", "--signal=USR2", slurm_id(run, "unsaved"))
        return ended(run, "unsaved")["unsaved"]

    launches.befall(pool, "unsaved", unsaved)
    launches.befall(pool, "mistakes", lambda: ended(run))


def _code(launches: Launches, pool: ThreadPoolExecutor) -> None:
    """Submitted from a copy of the checkout, which is broken before the jobs, held back, may start."""
    run, checkout = launches.folder / "code", launches.folder / "checkout"
    for name in PACKAGES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    held = {"slurm": {"extra": {"hold": True}}}
    stages = {
        "first": {
            "command": "finetune",
            "config": str(launches.finetune),
            "overrides": {"device": "cpu"},
            "resources": {"gpus": 1},
            **held,
        },
        "second": {
            "command": "finetune",
            "config": str(launches.finetune),
            "overrides": {"init_from": "${first}"},
            **held,
        },
    }
    graph = checkout / "graph.yaml"
    graph.write_text(yaml.safe_dump({"run_dir": str(run), "stages": stages}))
    done = subprocess.run(
        [sys.executable, "-m", "launch", "--config", str(graph)], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in PACKAGES:
        if (checkout / name).is_dir():
            (checkout / name / "__init__.py").write_text("raise SystemExit('the checkout, not the snapshot')\n")

    def changed() -> dict[str, JobStatus]:
        launches.cluster.run("scontrol", "release", slurm_id(run, "first"))
        ended(run, "first")
        export = run / "first/export/model.safetensors"
        content = bytearray(export.read_bytes())
        content[-1] ^= 1
        export.write_bytes(content)
        launches.cluster.run("scontrol", "release", slurm_id(run, "second"))
        return ended(run)

    launches.befall(pool, "changed", changed)


def demo(launches: Launches) -> dict[str, Any]:
    """The stages of the label-ratio experiment, small."""
    return {
        "train": {
            "command": "poserelay synthesize",
            "overrides": {"images": 16, "size": 64, "seed": 3, "workers": 1},
        },
        "test": {"command": "poserelay synthesize", "overrides": {"images": 6, "size": 64, "seed": 4, "workers": 1}},
        "pretrain": {"config": str(launches.pretrain), "overrides": {"data.images": "${train}/images"}},
        "finetune": {
            "config": str(launches.finetune),
            "overrides": {
                "data.images": "${train}/images",
                "data.annotations": "${train}/annotations.json",
                "init_from": "${pretrain}",
                "labels.count": None,
            },
            "sweep": {"labels.ratio": [0.5, 1.0], "seed, labels.seed": [[0, 0], [1, 1]]},
        },
        "evaluate": {
            "command": "evaluation test",
            "overrides": {
                "checkpoint": "${finetune}",
                "annotations": "${test}/annotations.json",
                "images": "${test}/images",
                "workers": 0,
                "threads": 1,
            },
        },
    }


def _demo(launches: Launches, pool: ThreadPoolExecutor) -> None:
    run = launches.folder / "demo"
    assert submit(run, demo(launches))[0] == 0
    launches.befall(pool, "demo", lambda: ended(run))


def test_demo_graph_as_on_this_machine(launches: Launches) -> None:
    here = launches.folder / "here"
    file = launches.folder / "demo.graph.yaml"
    code, _, err = call("--config", file, "--run_dir", here, "--cluster", "local", "--local.jobs", "2")
    assert code == 0, err
    found = launches.events["demo"].result()
    assert {name: status.state for name, status in found.items()} == dict.fromkeys(found, "done")
    assert len(found) == 11
    tables = []
    for run in (launches.folder / "demo", here):
        code, out, err = call("collect", run, "--json")
        assert code == 0, err
        tables.append(json.loads(out))
    assert tables[0] == tables[1]
    assert "evaluate" in (here / "collect/table.md").read_text()
    for name in found:
        if name.startswith(("pretrain", "finetune")):
            assert_same_run(launches.folder / "demo" / name, here / name)


# Scheduling alone, of stages without torch


STAGE = """
import signal, sys, time
from pathlib import Path
run, name = str(Path(sys.argv[-1]).parent).split("/launch/jobs/")
gate, told = Path(run, "gate." + name.partition("/")[0]), []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda *_: told.append(Path(run, "told").touch()))
while gate.exists() and not told:
    time.sleep(0.05)
while told and Path(run, "saving").exists():
    time.sleep(0.05)
if told:
    sys.exit(75)
for file in ("export/model.safetensors", "done.json"):
    Path(run, name, file).parent.mkdir(parents=True, exist_ok=True)
    Path(run, name, file).write_text("{}")
"""
# a(3) -> b(3) -> c(3), job by job, and z after all of c.
CHAIN = {
    **{f"a/{n}": list[str]() for n in range(3)},
    **{f"b/{n}": [f"a/{n}"] for n in range(3)},
    **{f"c/{n}": [f"b/{n}"] for n in range(3)},
    "z": [f"c/{n}" for n in range(3)],
}


def bare(run: Path, upstream: dict[str, list[str]], *gates: str, **slurm: dict[str, Any]) -> Plan:
    """A launch that is not submitted yet; jobs of the stages `gates` wait for RUN/gate.STAGE to be removed."""
    code = run / "launch" / "code"
    for name in ("launch", "poserelay"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "finetune").mkdir()
    (code / "finetune/__init__.py").touch()
    (code / "finetune/__main__.py").write_text(STAGE)
    jobs = []
    for name, needs in upstream.items():
        stage = name.partition("/")[0]
        options = Slurm(**slurm.get(stage, {}))
        jobs.append(Job(name, stage, "finetune", {}, str(run / name), needs, Resources(cpus=1, memory=1), options))
    plan = Plan(run, "slurm", "g.yaml", None, str(code), 2, Local(), jobs)
    for job in jobs:
        plan.record(job).mkdir(parents=True)
    for stage in gates:
        (run / f"gate.{stage}").touch()
    write_plan(plan)
    return plan


def states(plan: Plan) -> dict[str, tuple[str, str | None]]:
    return {name: (status.state, status.reason) for name, status in statuses(plan.run).items()}


def starts(plan: Plan) -> dict[str, int]:
    return {job.name: sum(row["event"] == "start" for row in read_events(plan.record(job))) for job in plan.jobs}


def queued(cluster: Cluster, plan: Plan) -> list[str]:
    """The stage of every job of this launch that runs or waits, an element of an array each."""
    lines = cluster.run("squeue", "-r", "-h", "-o", "%j").splitlines()
    return sorted(line.rpartition(".")[2] for line in lines if line.startswith(f"{plan.run.name}."))


def submit_with(sbatch: str, plan: Plan, folder: Path) -> int:
    """Submit in a process that finds the script `sbatch`; its exit code.

    $real in it is the real one, $n the number of the call.
    """
    folder.mkdir()
    head = f"#!/bin/bash\nreal={shutil.which('sbatch')}; echo >> {folder}/calls; n=$(wc -l < {folder}/calls)\n"
    (folder / "sbatch").write_text(head + sbatch)
    (folder / "sbatch").chmod(0o755)
    code = (
        "import sys; from launch.plan import *; from launch.submission import start\n"
        "plan = read_plan(sys.argv[1])\nwith submitting(plan):\n    start(plan, plan.jobs, Submitted())"
    )
    path = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", code, str(plan.run)]
    return subprocess.run(command, cwd=ROOT, env=path, capture_output=True).returncode


@pytest.mark.parametrize("call_number", [1, 2])
def test_a_submission_killed_before_it_noted_the_ids(cluster: Cluster, tmp_path: Path, call_number: int) -> None:
    """The first call submits one job, the second an array."""
    plan = bare(tmp_path / f"killed{call_number}", {"o": [], **CHAIN}, "o", "a")
    killed = f'out=$($real "$@"); [ $n = {call_number} ] && kill -9 $PPID; echo "$out"'
    assert submit_with(killed, plan, tmp_path / "bin") == -signal.SIGKILL
    there = ["o"] if call_number == 1 else ["a", "a", "a", "o"]
    assert queued(cluster, plan) == there
    found = statuses(plan.run)
    assert {s.stage for s in found.values() if s.state in ("pending", "running")} == set(there)
    assert {s.state for s in found.values() if s.stage not in there} <= {"interrupted", "blocked"}
    if call_number == 1:
        assert call("cancel", plan.run)[0] == 0
        wait_until(lambda: not queued(cluster, plan), 20)
        assert states(plan)["o"] == ("cancelled", "by `launch cancel`")
        return
    assert call("resume", plan.run)[0] == 0
    assert queued(cluster, plan) == sorted(job.stage for job in plan.jobs)
    for stage in "oa":
        (plan.run / f"gate.{stage}").unlink()
    assert {s.state for s in ended(plan.run, seconds=60).values()} == {"done"}
    assert set(starts(plan).values()) == {1}


def test_ctrl_c_while_sbatch_runs_loses_no_id(cluster: Cluster, tmp_path: Path) -> None:
    plan = bare(tmp_path / "interrupted", CHAIN, "a")
    submit_with('kill -INT $PPID; exec $real "$@"', plan, tmp_path / "bin")
    submitted = read_submitted(plan)
    assert not submitted.begun
    assert queued(cluster, plan) == sorted(job.stage for job in plan.jobs if job.name in submitted.ids)
    assert call("cancel", plan.run)[0] == 0
    wait_until(lambda: not queued(cluster, plan), 20)


def test_a_chain_is_cancelled_resumed_robbed_of_a_job_and_partly_run_again(cluster: Cluster, tmp_path: Path) -> None:
    plan = bare(tmp_path / "chain", CHAIN, "a")
    start(plan, plan.jobs, Submitted())
    assert call("cancel", plan.run)[0] == 0
    wait_until(lambda: not queued(cluster, plan), 20)
    assert {state for state, _ in states(plan).values()} == {"cancelled"}

    # The same arrays again, job by job.
    before = starts(plan)
    assert call("resume", plan.run)[0] == 0
    arrays = [slurm_id(plan.run, f"{stage}/0").partition("_")[0] for stage in "abc"]
    ids = [slurm_id(plan.run, name) for name in CHAIN if name != "z"]
    assert ids == [f"{array}_{n}" for array in arrays for n in range(3)]
    for stage, above in (("b", arrays[0]), ("c", arrays[1])):
        assert f"aftercorr:{above}_" in cluster.job(slurm_id(plan.run, f"{stage}/0"))["Dependency"]

    # The last of an array: what is left of it looks like a whole one.
    old = {name: slurm_id(plan.run, name) for name in CHAIN}
    cluster.run("scancel", old["b/2"])
    wait_until(lambda: states(plan)["b/2"][0] not in ("pending", "running"), 20)
    assert call("resume", plan.run)[0] == 0
    assert {name for name in CHAIN if slurm_id(plan.run, name) != old[name]} == {"b/2", "c/2", "z"}
    assert queued(cluster, plan) == sorted(job.stage for job in plan.jobs)
    (plan.run / "gate.a").unlink()
    assert {name: s.state for name, s in ended(plan.run, seconds=60).items()} == dict.fromkeys(CHAIN, "done")
    again = starts(plan)
    assert {name: again[name] - before[name] for name in CHAIN if name[0] != "a"} == dict.fromkeys([*CHAIN][3:], 1)

    # The folder of a finished job is removed.
    shutil.rmtree(plan.run / "b/1")
    found = states(plan)
    assert found["b/1"][0] == "failed"
    assert found["c/1"] == found["z"] == ("outdated", "b/1 is to be run again")
    assert {found[name][0] for name in CHAIN if name not in ("b/1", "c/1", "z")} == {"done"}
    (plan.run / "gate.b").touch()
    assert call("resume", plan.run)[0] == 0
    new = ("b/1", "c/1", "z")
    assert {states(plan)[name][0] for name in new} <= {"pending", "running"}
    assert "nothing to start" in call("resume", plan.run)[2]
    (plan.run / "gate.b").unlink()
    assert {s.state for s in ended(plan.run, seconds=60).values()} == {"done"}
    last = starts(plan)
    assert {name: last[name] - again[name] for name in CHAIN if last[name] > again[name]} == dict.fromkeys(new, 1)


def test_variables_of_sbatch_do_not_beat_the_graph(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        **{"SBATCH_PARTITION": "high", "SBATCH_TIMELIMIT": "7", "SBATCH_NO_REQUEUE": "1", "SBATCH_SIGNAL": "HUP@9"},
        **{"SBATCH_ARRAY_INX": "0-4", "SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE", "SLURM_MEM_PER_CPU": "x"},
        "SQUEUE_PARTITION": "graceful",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = {"mine": {"partition": "low", "time": "11"}, "free": {"time": "12"}}
    plan = bare(tmp_path / "variables", {"mine": [], "free": []}, "mine", "free", **options)
    start(plan, plan.jobs, Submitted())
    monkeypatch.delenv("SLURM_MEM_PER_CPU")  # scontrol's own
    for name, partition, limit in (("mine", "low", "00:11:00"), ("free", "high", "00:12:00")):
        job = cluster.job(slurm_id(plan.run, name))
        assert (job["Partition"], job["TimeLimit"], job["Requeue"]) == (partition, limit, "1")
        assert "ArrayJobId" not in job
    assert {state for state, _ in states(plan).values()} <= {"pending", "running"}
    for name in options:
        (plan.run / f"gate.{name}").unlink()
    assert {s.state for s in ended(plan.run, seconds=40).values()} == {"done"}
    assert os.environ["SBATCH_TIMELIMIT"] == "7"


def test_a_script_that_fails_before_its_stage_is_quoted_and_its_dependents_are_blocked(
    cluster: Cluster, tmp_path: Path
) -> None:
    del cluster
    upstream = {"x/0": [], "x/1": [], "y/0": ["x/0"], "y/1": ["x/1"], "z": ["y/0", "y/1"]}
    plan = bare(tmp_path / "script", upstream, x={"setup": ["echo my words; exit 3"]})
    start(plan, plan.jobs, Submitted())
    found = {name: (s.state, s.reason or "") for name, s in ended(plan.run, seconds=40).items()}
    for name in ("x/0", "x/1"):
        assert found[name][0] == "failed"
        assert found[name][1].endswith("; its script's last words: my words")
    assert {found[name] for name in ("y/0", "z")} == {("blocked", f"x/0 failed: {found['x/0'][1]}")}
    assert found["y/1"][0] == "blocked"
    code, out, _ = call("logs", plan.run, "x")
    assert code == 0
    assert out.count("my words") == 2
    assert out.splitlines()[0].endswith(f"{slurm_id(plan.run, 'x/0')}_0_log.out <==")


def test_the_launch_of_another_user_is_seen(cluster: Cluster, tmp_path: Path) -> None:
    theirs = {"x": {"extra": {"uid": 65534, "hold": True}}, "y": {"extra": {"uid": 65534}}}
    plan = bare(tmp_path / "others", {"x": [], "y": ["x"]}, **theirs)
    start(plan, plan.jobs, Submitted())
    assert states(plan)["x"][0] == "failed"  # asked for its folder's owner, squeue knows none
    os.chown(plan.run / "launch", 65534, -1)
    assert [state for state, _ in states(plan).values()] == ["pending", "pending"]
    assert call("cancel", plan.run)[0] == 0
    wait_until(lambda: not queued(cluster, plan), 20)


def test_a_job_that_is_requeued_and_held_was_not_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    plan = bare(tmp_path / "held", {"x": [], "y": ["x"]}, "x")
    start(plan, plan.jobs, Submitted())
    wait_until(lambda: starts(plan)["x"], 20)
    cluster.run("scontrol", "requeuehold", slurm_id(plan.run, "x"))
    seen: set[str] = set()
    wait_until(lambda: seen.add(states(plan)["x"][0]) or states(plan)["x"][0] == "pending", 30)
    assert states(plan)["x"] == ("pending", "job requeued in held state")
    assert seen <= {"running", "pending"}
    ends = [row for row in read_events(plan.record(plan.jobs[0])) if row["event"] == "end"]
    assert [(row["slurm"], row["requeued"]) for row in ends] == [("REQUEUED", False)]
    (plan.run / "gate.x").unlink()
    cluster.run("scontrol", "release", slurm_id(plan.run, "x"))
    assert {s.state for s in ended(plan.run, seconds=40).values()} == {"done"}


def test_two_nodes_train_as_two_processes_here(launches: Launches) -> None:
    here, run = launches.folder / "peers-here", launches.folder / "peers"
    stages = {"train": {**launches.long, "resources": {"processes": 2}}}
    file = launches.folder / "peers-here.graph.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}))
    code, _, err = call("--config", file, "--run_dir", here, "--cluster", "local")
    assert code == 0, err
    status = launches.events["two_nodes"].result()
    assert (status.state, status.restarts, status.host) == ("done", 1, "n1")
    assert "batch 12 in all (6 x 2)" in (run / "launch/jobs/train/rank0.log").read_text()
    assert sorted(path.name for path in (run / "launch/jobs/train").glob("rank*.log")) == ["rank0.log", "rank1.log"]
    assert_same_run(run / "train", here / "train")


def test_one_killed_process_ends_its_job(launches: Launches) -> None:
    status, seconds = launches.events["bereft"].result()
    assert status.state == "failed"
    assert "killed by SIGKILL" in (status.reason or "")
    assert seconds < 30


def test_a_users_mistake_is_told_and_not_tried_again(launches: Launches) -> None:
    run = launches.folder / "mistakes"
    found = launches.events["mistakes"].result()
    for name in ("one", "two"):
        assert found[name].state == "failed"
        assert "absent.json" in (found[name].reason or "")
        assert found[name].restarts == 0
        code, out, _ = call("logs", run, name)
        assert code == 0
        assert "error: " in out
        assert "absent.json" in out
        assert "Traceback" not in out
    assert (found["after"].state, found["after"].restarts) == ("blocked", 0)
    assert "one failed: " in (found["after"].reason or "")
    codes = {row["code"] for row in read_events(run / "launch/jobs/two") if row["event"] == "end"}
    assert 2 in codes


def test_a_job_that_cannot_save_is_not_begun_again_at_its_time_limit(launches: Launches) -> None:
    status = launches.events["unsaved"].result()
    assert (status.state, status.restarts) == ("interrupted", 0)
    assert "raise slurm.time" in (status.reason or "")


def test_gpus(launches: Launches) -> None:
    run = launches.folder / "code"
    assert launches.events["changed"].result()["first"].state == "done"
    assert "gpu:1" in launches.cluster.job(slurm_id(run, "first"))["TresPerNode"]


def test_max_requeues(launches: Launches) -> None:
    found = launches.events["told_twice"].result()
    status = found["train/seed=1"]
    assert (status.state, status.restarts) == ("interrupted", 1)
    assert "max_requeues = 1" in (status.reason or "")
    assert found["train/seed=0"].state == found["weights/seed=0"].state == "done"
    assert found["weights/seed=1"].state == "blocked"
    assert "train/seed=1 interrupted" in (found["weights/seed=1"].reason or "")


def test_jobs_run_the_snapshot_and_refuse_a_changed_upstream(launches: Launches) -> None:
    run = launches.folder / "code"
    found = launches.events["changed"].result()
    rows = read_metrics(run / "first/metrics.jsonl")
    assert [row["code"] for row in rows if row["kind"] == "start"] == [str(run / "launch/code/poserelay")]
    assert found["first"].state == "done"
    assert found["second"].state == "failed"
    assert "changed" in (found["second"].reason or ""), found["second"]
    ends = [row for row in read_events(run / "launch/jobs/second") if row["event"] == "end"]
    assert [row["code"] for row in ends] == [2]


def test_stopped_jobs_go_on_to_the_same_bytes(launches: Launches) -> None:
    run = launches.folder / "stopped"
    for name in ("limited", "preempted", "graceful"):
        launches.events[name].result()
    found = ended(run)
    assert {name: status.state for name, status in found.items()} == dict.fromkeys(found, "done")
    assert found["preempted"].restarts == 3
    assert found["graceful"].restarts == 1
    assert found["limited"].restarts >= 1
    rows = read_events(run / "launch/jobs/limited")
    assert any(row.get("signal") == "SIGUSR2" and row["requeued"] for row in rows)
    launches.events["told_twice"].result()
    for name in found:
        assert_same_run(launches.folder / "array/train/seed=0", run / name)


def test_ended_jobs_are_told_of_and_resumed_to_the_same_bytes(launches: Launches) -> None:
    told = launches.events["fates"].result()
    state = {moment: (found["train"].state, found["train"].reason) for moment, found in told.items()}
    assert state["scancel"][0] == "cancelled"
    assert state["scancel"][1] in ("by scancel; it had saved", "by scancel")  # it gets KillWait to end
    assert state["stage"] == ("failed", "killed by SIGKILL (out of memory, or by hand)")
    assert state["task"] == ("failed", "ended without a word: Slurm says FAILED")
    assert state["end"] == ("done", None)
    dependent = {moment: (found["after"].state, found["after"].reason) for moment, found in told.items()}
    assert dependent["scancel"] == ("blocked", f"train cancelled: {state['scancel'][1]}")
    assert dependent["pending"] == ("cancelled", "by scancel, before it started")
    assert dependent["task"] == ("blocked", "train failed: ended without a word: Slurm says FAILED")
    assert dependent["end"] == ("done", None)
    assert told["end"]["train"].restarts == 3
    launches.events["told_twice"].result()
    assert_same_run(launches.folder / "array/train/seed=0", launches.folder / "ended/train")


def test_refused_by_slurm(launches: Launches, tmp_path: Path) -> None:
    """In Slurm's words; nothing stays in the queue, and the folder can be used."""
    stages = {
        "first": {**SMALL_JOB, "sweep": {"seed": [0, 1]}},
        "second": {**SMALL_JOB, "after": ["first"]},
        "third": {**SMALL_JOB, "slurm": {"partition": "nowhere"}, "after": ["second"]},
    }
    code, _, err = submit(tmp_path / "refused", stages)
    assert code == 2
    assert "stage third" in err
    assert "invalid partition specified: nowhere" in err
    assert len(err.strip().splitlines()) <= 4
    queued = launches.cluster.run("squeue", "-h", "-t", "all", "-o", "%j %T").splitlines()
    assert {line.split()[1] for line in queued if line.startswith("refused.")} <= {"CANCELLED", "COMPLETING"}
    code, out, _ = call("status", tmp_path / "refused", "--json")
    told = {job["name"]: job["state"] for job in json.loads(out)["jobs"]} if code == 0 else {}
    assert set(told.values()) <= {"cancelled", "blocked"}, told
    stages["third"] = {**SMALL_JOB, "after": ["second"]}
    if code == 0:
        shutil.rmtree(tmp_path / "refused")
    assert submit(tmp_path / "refused", stages)[0] == 0
    assert {status.state for status in ended(tmp_path / "refused").values()} == {"done"}


def test_first_stage_refused(launches: Launches, tmp_path: Path) -> None:
    del launches
    code, _, err = submit(tmp_path / "run", {"only": {**SMALL_JOB, "slurm": {"partition": "nowhere"}}})
    assert code == 2
    assert "invalid partition specified: nowhere" in err
    assert len(err.strip().splitlines()) == 1
    assert submit(tmp_path / "run", {"only": SMALL_JOB}, "--dry_run")[0] == 0
    code, _, err = submit(tmp_path / "run", {"only": {**SMALL_JOB, "slurm": {"extra": {"hold": True}}}})
    assert code == 0, err
    assert call("cancel", tmp_path / "run")[0] == 0
    found = ended(tmp_path / "run")["only"]
    assert (found.state, found.reason) == ("cancelled", "by `launch cancel`")


def test_a_job_saves_while_slurmctld_is_away(cluster: Cluster, tmp_path: Path) -> None:
    """Last: nothing else may ask Slurm meanwhile."""
    plan = bare(tmp_path / "away", {"x": [], "y": ["x"]}, "x")
    (plan.run / "saving").touch()
    start(plan, plan.jobs, Submitted())
    wait_until(lambda: starts(plan)["x"] and states(plan)["x"][0] == "running", 20)
    time.sleep(0.5)  # for the stage's handlers
    cluster.run("scancel", "--signal=USR2", slurm_id(plan.run, "x"))
    wait_until((plan.run / "told").exists, 20)
    alive = daemons(cluster.folder)
    os.kill(alive["slurmctld"], signal.SIGTERM)
    wait_until(lambda: "slurmctld" not in daemons(cluster.folder), 20)
    (plan.run / "gate.x").unlink()
    (plan.run / "saving").unlink()
    time.sleep(2)
    found, note = job_statuses(plan)
    assert "squeue does not answer" in str(note)
    assert [status.state for status in found] == ["running", "pending"]
    subprocess.run(["nsenter", f"--mount=/proc/{alive['munged']}/ns/mnt", "slurmctld"], check=True)
    wait_until(lambda: job_statuses(plan)[1] is None, 30)
    done = ended(plan.run, seconds=60)
    assert {name: (s.state, s.restarts) for name, s in done.items()} == {"x": ("done", 1), "y": ("done", 0)}
