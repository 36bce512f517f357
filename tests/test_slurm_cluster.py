"""What the launcher builds upon: how Slurm preempts, requeues and signals jobs, and when their dependents run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .slurm_cluster import Cluster, daemons, missing, namespace, slurm_cluster, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

# Writes what it gets into the file; exits with the code, if one is given, on SIGTERM.
PROBE = """
import os, signal, sys, time
name, code = sys.argv[1], sys.argv[2:]
def note(text):
    with open(name, "a") as file:
        file.write(f"{text} {time.time()}\\n")
def handle(number, frame):
    note(signal.Signals(number).name)
    if number == signal.SIGTERM and code:
        sys.exit(int(code[0]))
signal.signal(signal.SIGTERM, handle)
signal.signal(signal.SIGUSR2, handle)
child = os.fork()
note("task" if child else "child")
time.sleep(120)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _probe(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    return cluster.run("sbatch", "--parsable", "-o", str(folder / "%j.out"), *options, "--wrap", script)


def probe(folder: Path, *code: int) -> str:
    return " ".join([f"{sys.executable} {folder}/probe.py {folder}/notes", *map(str, code)])


def notes(folder: Path, what: str) -> list[float]:
    """The times at which the probes noted `what`."""
    if not (folder / "notes").exists():
        return []
    lines = (folder / "notes").read_text().splitlines()
    return [float(line.split()[1]) for line in lines if line.split()[0] == what]


def wait_until(seen: Callable[[], object], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < until, f"not seen within {seconds} s"
        time.sleep(0.1)


def test_two_nodes(cluster: Cluster) -> None:
    seen = cluster.run("srun", "-N2", "sh", "-c", "echo $SLURMD_NODENAME $(hostname) $(getent hosts n1)")
    assert sorted(seen.splitlines()) == ["n1 n1 127.0.0.1 n1", "n2 n2 127.0.0.1 n1"]


def test_gpus(cluster: Cluster) -> None:
    seen = cluster.run("srun", "-N2", "--gpus-per-node=2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert seen.splitlines() == ["0,1", "0,1"]
    with pytest.raises(RuntimeError, match="Requested node configuration is not available"):
        cluster.run("srun", "-N1", "--gpus-per-node=3", "true")


def test_preempted_job_is_requeued_and_its_dependent_waits(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "srun " + probe(tmp_path, 75), "-N2", "--exclusive", "--requeue")
    after = submit(cluster, tmp_path, "true", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    wait_until(lambda: len(notes(tmp_path, "task")) == 2, 20)
    submit(cluster, tmp_path, "true", "-p", "high", "-N2", "--exclusive")
    wait_until(lambda: len(notes(tmp_path, "task")) == 4, 30)  # seen after 10 s
    assert len(notes(tmp_path, "SIGTERM")) >= 2
    assert cluster.job(job)["Restarts"] == "1"
    assert cluster.job(after)["JobState"] == "PENDING"
    cluster.run("scancel", job)
    assert cluster.wait(after, "CANCELLED")["Reason"] == "DependencyNeverSatisfied"


def test_signal_before_the_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "srun " + probe(tmp_path), "-t", "1", "--signal=USR2@30")
    wait_until(lambda: notes(tmp_path, "SIGUSR2"), 50)
    left = notes(tmp_path, "task")[0] + 60 - notes(tmp_path, "SIGUSR2")[0]
    assert 29 < left < 61  # slurmctld looks every 30 s
    wait_until(lambda: len(notes(tmp_path, "SIGUSR2")) == 2, 5)  # the task's children get it too
    assert cluster.job(job)["JobState"] == "RUNNING"
    cluster.run("scancel", "--signal=KILL", job)


def test_dependencies_on_array_tasks(cluster: Cluster, tmp_path: Path) -> None:
    kill = "--kill-on-invalid-dep=yes"
    array = submit(cluster, tmp_path, "sleep $SLURM_ARRAY_TASK_ID; test $SLURM_ARRAY_TASK_ID != 2", "--array=0-2")
    one = submit(cluster, tmp_path, "true", f"--dependency=afterok:{array}_1", kill)
    failed = submit(cluster, tmp_path, "true", f"--dependency=afterok:{array}_2", kill)
    below = submit(cluster, tmp_path, "true", f"--dependency=afterok:{failed}", kill)
    held = submit(cluster, tmp_path, "true", f"--dependency=afterok:{array}_2")
    pairs = submit(cluster, tmp_path, "true", "--array=0-2", f"--dependency=aftercorr:{array}", kill)
    assert cluster.wait(f"{array}_2", "FAILED")["ExitCode"] == "1:0"
    for job, state in [(one, "COMPLETED"), (failed, "CANCELLED"), (below, "CANCELLED")]:
        cluster.wait(job, state)
    for task, state in [(0, "COMPLETED"), (1, "COMPLETED"), (2, "CANCELLED")]:
        cluster.wait(f"{pairs}_{task}", state)
    wait_until(lambda: cluster.job(held)["Reason"] == "DependencyNeverSatisfied", 10)
    assert cluster.job(held)["JobState"] == "PENDING"
    forgotten = submit(cluster, tmp_path, "true", "--dependency=afterok:99999", kill)
    cluster.wait(forgotten, "COMPLETED")  # a job that Slurm has forgotten counts as done, whatever became of it


def test_grace_time(tmp_path: Path) -> None:
    """A job that ends by itself in the grace time is not requeued; one that asks for it is; only steps are told."""
    requeue = "trap 'scontrol requeue $SLURM_JOB_ID' TERM; echo start >> FILE; sleep 60 & wait; sleep 20"
    asks = requeue.replace("FILE", str(tmp_path / "asks"))
    (tmp_path / "asks.sh").write_text(asks)
    with slurm_cluster(tmp_path / "slurm", grace_time=60) as cluster:
        ends = submit(cluster, tmp_path, "srun " + probe(tmp_path, 75), "-w", "n1", "--exclusive")
        asks = submit(cluster, tmp_path, f"srun bash {tmp_path}/asks.sh", "-w", "n2", "-n1")
        untold = submit(cluster, tmp_path, "exec sleep 60", "-w", "n2", "-n1")
        wait_until(lambda: notes(tmp_path, "task") and (tmp_path / "asks").exists(), 20)
        cluster.wait(untold, "RUNNING")
        submit(cluster, tmp_path, "true", "-p", "high", "-N2", "--exclusive")
        fields = cluster.wait(ends, "FAILED")
        assert (fields["Reason"], fields["ExitCode"], fields["Restarts"]) == ("NonZeroExitCode", "75:0", "0")
        fields = cluster.job(untold)
        assert (fields["JobState"], fields["Reason"]) == ("RUNNING", "None")
        assert fields["PreemptTime"] != "None"
        cluster.run("scancel", untold)  # or the job of `high` would wait for it
        wait_until(lambda: (tmp_path / "asks").read_text() == "start\nstart\n", 30)
        assert cluster.job(asks)["Restarts"] == "1"


def test_stopped_with_all_that_its_jobs_left(tmp_path: Path) -> None:
    hosts = Path("/etc/hosts").read_text()
    folder = tmp_path / "slurm"
    cluster = start(folder)
    try:
        with pytest.raises(RuntimeError, match="runs here already"):
            start(folder)
        script = f"setsid sh -c 'echo $$ > {tmp_path}/left; exec sleep 300' > /dev/null 2>&1 &"
        cluster.wait(submit(cluster, tmp_path, script), "COMPLETED")
        wait_until(lambda: (tmp_path / "left").exists() and (tmp_path / "left").read_text(), 5)
        processes = [int((tmp_path / "left").read_text()), *daemons(folder).values()]
        assert len(processes) == 5
        assert all(namespace(pid) for pid in processes)
    finally:
        stop(folder)
    assert not any(namespace(pid) for pid in processes)
    assert Path("/etc/hosts").read_text() == hosts
