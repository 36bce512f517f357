"""The clusters `local` and `debug`: scheduling on processes without torch, then real stages."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch.local
import launch.submission
from launch.__main__ import main
from launch.config import Local, Resources, Slurm
from launch.graph import Job
from launch.local import run_local
from launch.plan import Plan, Submitted, read_plan, write_plan, write_submitted
from launch.snapshot import PACKAGES, ROOT
from launch.status import job_statuses
from launch.submission import start as start_jobs
from poserelay.errors import CheckFailed, Interrupted, UserError
from poserelay.run import read_metrics
from poserelay.synthesize import synthesize

from .processes import finish, kill, start
from .test_training import SMALL, assert_same_run

FAKE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

code = Path(__file__).resolve().parent.parent
record = Path(sys.argv[-1]).parent
run, name = str(record).split("/launch/jobs/")
events = code / "events"

def note(what):
    handle = os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    row = {"name": name, "event": what, "pid": os.getpid(), **{key: os.environ.get(key) for key in KEYS}}
    os.write(handle, (json.dumps(row) + "\\n").encode())
    os.close(handle)

KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
        "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
rank = int(os.environ["RANK"])
rows = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
attempt = sum(row["name"] == name and row["event"] == "start" and row["RANK"] == str(rank) for row in rows)
note("start")
exec(json.loads((code / "behaviour.json").read_text()).get(name, "time.sleep(0.1)"))
for file in ("export/model.safetensors", "done.json"):
    Path(run, name, file).parent.mkdir(parents=True, exist_ok=True)
    Path(run, name, file).write_text("{}")
note("end")
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Plan]:
    """Makes a launch of jobs whose `python -m finetune` is a small script; behaviour maps them to Python."""

    def make(jobs: list[Job], behaviour: dict[str, str] | None = None, **fields: Any) -> Plan:
        run, code = tmp_path / "run", tmp_path / "code"
        (code / "finetune").mkdir(parents=True)
        (code / "finetune" / "__main__.py").write_text(FAKE)
        (code / "behaviour.json").write_text(json.dumps(behaviour or {}))
        values: dict[str, Any] = {"cluster": "local", "max_requeues": 2, "local": Local(gpus=[])}
        plan = Plan(run=run, graph="g.yaml", commit=None, code=str(code), jobs=jobs, **{**values, **fields})
        for job in jobs:
            plan.record(job).mkdir(parents=True)
        write_plan(plan)
        return plan

    def placed(names: dict[str, list[str]], behaviour: dict[str, str] | None = None, **fields: Any) -> Plan:
        resources = fields.pop("resources", {})
        jobs = [
            Job(
                name, name.split("/")[0], "finetune", {}, str(tmp_path / "run" / name), upstream,
                resources.get(name, Resources()), Slurm(),
            )
            for name, upstream in names.items()
        ]  # fmt: skip
        return make(jobs, behaviour, **fields)

    return placed


def events(plan: Plan) -> list[dict[str, Any]]:
    path = Path(plan.code, "events")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def states(plan: Plan) -> dict[str, tuple[str, str | None]]:
    return {status.name: (status.state, status.reason) for status in job_statuses(plan)[0]}


def until(seen: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_jobs_run_in_order_at_most_so_many_at_once_and_no_gpu_is_shared(make: Callable[..., Plan]) -> None:
    gpus = {"a/0": 1, "a/1": 2, "a/2": 1, "b": 0, "c": 3, "d/0": 1, "d/1": 1}
    upstream = {"a/0": [], "a/1": [], "a/2": [], "b": ["a/0"], "c": ["a/1", "b"], "d/0": ["a/2"], "d/1": []}
    # It ends once two others have begun beside it.
    waits = (
        "for _ in range(1000):\n  if all(n in events.read_text() for n in ('a/2', '\"b\"')): break\n  time.sleep(0.02)"
    )
    plan = make(
        upstream,
        {"a/1": waits, "a/2": waits},
        local=Local(jobs=3, gpus=[4, 5, 7]),
        resources={name: Resources(gpus=number, cpus=2) for name, number in gpus.items()},
    )
    run_local(plan, plan.jobs)
    running: dict[str, set[str]] = {}
    ended: set[str] = set()
    at_once = 0
    for row in events(plan):
        assert row["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "2")
        name = row["name"]
        taken = set(filter(None, row["CUDA_VISIBLE_DEVICES"].split(",")))
        if row["event"] == "start" and name not in running:
            assert ended.issuperset(upstream[name]), name
            assert taken <= {"4", "5", "7"}
            assert len(taken) == gpus[name]
            assert not taken & set().union(*running.values())
            running[name] = taken
            at_once = max(at_once, len(running))
            assert len(running) <= 3
        elif row["event"] == "end" and row["RANK"] == "0":
            ended.add(name)
            del running[name]
    assert ended == set(upstream)
    assert at_once == 3
    assert states(plan) == dict.fromkeys(upstream, ("done", None))


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_jobs_than_asked_for_run_at_once(make: Callable[..., Plan], limit: int) -> None:
    names = [f"a/{number}" for number in range(4)]
    sleeps = dict.fromkeys(names, "time.sleep(0.3)")
    plan = make({name: [] for name in names}, sleeps, local=Local(jobs=limit, gpus=[]))
    run_local(plan, plan.jobs)
    running = most = 0
    for row in events(plan):
        running += 1 if row["event"] == "start" else -1
        most = max(most, running)
    assert most <= limit
    assert states(plan) == dict.fromkeys(names, ("done", None))


def test_processes_of_a_job_get_the_contract(make: Callable[..., Plan]) -> None:
    plan = make({"a": []}, local=Local(gpus=[0, 1, 2, 3]), resources={"a": Resources(nodes=2, gpus=2)})
    run_local(plan, plan.jobs)
    rows = sorted((row for row in events(plan) if row["event"] == "start"), key=lambda row: row["RANK"])
    # One machine whatever the graph calls it: ranks of the machine are ranks of the job.
    assert [[row[key] for key in ("RANK", "LOCAL_RANK", "GROUP_RANK")] for row in rows] == [
        ["0", "0", "0"],
        ["1", "1", "0"],
        ["2", "2", "1"],
        ["3", "3", "1"],
    ]
    same = {
        tuple(row[k] for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")) for row in rows
    }
    assert same == {("4", "4", "127.0.0.1", "0,1,2,3")}
    assert len({row["MASTER_PORT"] for row in rows}) == 1
    assert sorted(path.name for path in plan.record(plan.jobs[0]).glob("*.log")) == [f"rank{n}.log" for n in range(4)]


SAYS = "print('error: the words of it', file=sys.stderr); sys.exit({code})"


@pytest.mark.parametrize(("code", "kind"), [(2, UserError), (3, CheckFailed), (1, CheckFailed)])
def test_a_failure_stops_its_dependents_alone(make: Callable[..., Plan], code: int, kind: type[Exception]) -> None:
    upstream = {"a": [], "b": ["a"], "c": ["b"], "d": [], "e": ["d"]}
    plan = make(upstream, {"a": SAYS.format(code=code)})
    with pytest.raises(kind, match=r"^a failed: the words of it \(3 of 5 jobs failed or were not run; ") as raised:
        run_local(plan, plan.jobs)
    assert f"python -m launch status {plan.run}" in str(raised.value)
    assert {row["name"] for row in events(plan)} == {"a", "d", "e"}
    assert states(plan) == {
        "a": ("failed", "the words of it"),
        "b": ("blocked", "a failed: the words of it"),
        "c": ("blocked", "a failed: the words of it"),
        "d": ("done", None),
        "e": ("done", None),
    }


def test_what_is_done_is_not_run_again(make: Callable[..., Plan]) -> None:
    plan = make({"a": [], "b": ["a"], "c": ["b"]}, {"b": "sys.exit(3) if attempt == 0 else None"})
    with pytest.raises(CheckFailed):
        start_jobs(plan, plan.jobs, Submitted())
    assert main(["resume", str(plan.run)]) == 0
    starts = [row["name"] for row in events(plan) if row["event"] == "start"]
    assert starts == ["a", "b", "b", "c"]
    assert states(plan) == dict.fromkeys("abc", ("done", None))
    assert main(["resume", str(plan.run)]) == 0
    assert len([row for row in events(plan) if row["event"] == "start"]) == 4


def test_an_interrupted_job_is_started_again_so_many_times(make: Callable[..., Plan]) -> None:
    plan = make({"a": [], "b": ["a"]}, {"a": "sys.exit(75) if attempt < 2 else None"})
    run_local(plan, plan.jobs)
    assert [row["name"] for row in events(plan) if row["event"] == "start"] == ["a", "a", "a", "b"]
    (a, _), _ = job_statuses(plan)
    assert (a.state, a.restarts) == ("done", 2)


def test_a_job_that_is_interrupted_for_ever_is_given_up(make: Callable[..., Plan]) -> None:
    plan = make({"a": [], "b": ["a"]}, {"a": "print('interrupted: saved', file=sys.stderr); sys.exit(75)"})
    with pytest.raises(CheckFailed, match="a failed: saved; not started again: that was done max_requeues = 2 times"):
        run_local(plan, plan.jobs)
    assert [row["name"] for row in events(plan)] == ["a"] * 3
    found = states(plan)
    assert found["a"][0] == "interrupted"
    assert found["b"][0] == "blocked"
    # Asked for again it has as many starts again.
    assert main(["resume", str(plan.run)]) == 3
    assert [row["name"] for row in events(plan)] == ["a"] * 6


def test_a_process_that_fails_ends_the_others(make: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.local, "SECONDS_TO_END", 0.3)
    behaviour = "time.sleep(100) if rank != 1 else (print('stopped: alone', file=sys.stderr), sys.exit(3))"
    plan = make({"a": [], "b": []}, {"a": behaviour}, resources={"a": Resources(processes=3)})
    with pytest.raises(CheckFailed, match=r"^a failed: alone \(1 of 2 jobs"):
        run_local(plan, plan.jobs)
    assert states(plan) == {"a": ("failed", "alone"), "b": ("done", None)}
    assert not any(alive(row["pid"]) for row in events(plan))


def test_what_a_process_leaves_behind_is_ended(make: Callable[..., Plan]) -> None:
    behaviour = "left = subprocess.Popen(['sleep', '100']); (code / 'worker').write_text(str(left.pid)); os._exit(3)"
    plan = make({"a": []}, {"a": behaviour})
    with pytest.raises(CheckFailed):
        run_local(plan, plan.jobs)
    worker = int(Path(plan.code, "worker").read_text())
    until(lambda: not alive(worker))


def test_a_killed_process_is_a_failure_that_says_so(make: Callable[..., Plan]) -> None:
    plan = make({"a": []}, {"a": "os.kill(os.getpid(), signal.SIGKILL)"})
    with pytest.raises(CheckFailed, match="killed by SIGKILL"):
        run_local(plan, plan.jobs)
    assert states(plan)["a"] == ("failed", "killed by SIGKILL (out of memory, or by hand)")


SAVES = """
def save(number, frame):
    print("interrupted: saved at signal", number, file=sys.stderr)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, save)
note("ready")
if attempt == 0:
    time.sleep(100)
"""


def launcher(plan: Plan) -> Callable[[list[str]], int]:
    def run(arguments: list[str]) -> int:
        return main(["resume", str(plan.run)])

    return run


def ready(plan: Plan, names: set[str]) -> Callable[[], bool]:
    return lambda: names <= {row["name"] for row in events(plan) if row["event"] == "ready"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_its_jobs(
    make: Callable[..., Plan], tmp_path: Path, number: signal.Signals
) -> None:
    plan = make({"a": [], "b": [], "c": ["a"]}, {"a": SAVES, "b": SAVES}, local=Local(jobs=2, gpus=[]))
    process = start(launcher(plan), [], tmp_path / "log")
    until(ready(plan, {"a", "b"}))
    found = states(plan)
    assert [found[name][0] for name in "abc"] == ["running", "running", "pending"]
    os.kill(process, number)
    assert finish(process) == 75, (tmp_path / "log").read_text()
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last == f"interrupted: {number.name}: 3 of 3 jobs are not done; `python -m launch resume {plan.run}` goes on"
    found = states(plan)
    assert [found[name][0] for name in "abc"] == ["interrupted", "interrupted", "blocked"]
    assert "saved at signal" in str(found["a"][1])
    assert main(["resume", str(plan.run)]) == 0
    assert states(plan) == dict.fromkeys("abc", ("done", None))


def test_cancel_stops_a_local_launch(make: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make({"a": []}, {"a": SAVES})
    process = start(launcher(plan), [], tmp_path / "log")
    until(ready(plan, {"a"}))
    assert main(["cancel", str(plan.run), "--stage", "a"]) == 2
    assert main(["cancel", str(plan.run)]) == 0
    assert finish(process) == 75
    assert states(plan)["a"] == ("cancelled", "by `launch cancel`")
    assert main(["cancel", str(plan.run)]) == 0  # nothing runs


def test_a_signal_while_a_job_is_started_reaches_it(make: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make({"a": []}, {"a": "time.sleep(100)"})
    real = launch.local.start

    def interrupted(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        process = real(*arguments, **named)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(launch.local, "start", interrupted)
    began = time.monotonic()
    with pytest.raises(Interrupted):
        run_local(plan, plan.jobs)
    assert time.monotonic() - began < 10
    assert states(plan)["a"][0] == "interrupted"


def test_a_killed_launcher(make: Callable[..., Plan], tmp_path: Path) -> None:
    """Its jobs save; status does not call them running, and resume goes on."""
    plan = make({"a": [], "b": ["a"]}, {"a": SAVES})
    process = start(launcher(plan), [], tmp_path / "log")
    until(ready(plan, {"a"}))
    os.kill(process, signal.SIGKILL)
    assert finish(process) == -9
    (pid,) = {row["pid"] for row in events(plan)}
    until(lambda: not alive(pid))
    assert "saved at signal" in (plan.record(plan.jobs[0]) / "rank0.log").read_text()
    found = states(plan)
    assert found["a"] == ("interrupted", "the launcher ended, killed or with its machine, while the job ran")
    assert found["b"][0] == "blocked"
    assert main(["resume", str(plan.run)]) == 0
    assert states(plan) == {"a": ("done", None), "b": ("done", None)}


def test_one_launcher_at_a_time(make: Callable[..., Plan], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = make({"a": []}, {"a": SAVES})
    process = start(launcher(plan), [], tmp_path / "log")
    until(ready(plan, {"a"}))
    assert main(["resume", str(plan.run)]) == 2
    message = capfd.readouterr().err
    assert f"process {process} on " in message
    assert "wait for it, or `launch cancel" in message
    kill(process)


def test_a_job_that_asks_for_more_gpus_than_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    overrides = {"data.images": str(tmp_path)}
    config = "pretrain/configs/demo.yaml"
    graph = {"a": {"command": "pretrain", "config": config, "overrides": overrides, "resources": {"gpus": 2}}}
    arguments = write_graph(tmp_path, graph)
    for _ in range(2):  # and nothing is left that would stand in the way of the next
        assert main([*arguments, "--cluster", "local"]) == 2
        message = capsys.readouterr().err
        assert "stage a: its resources ask for 2 GPUs, this machine has 1" in message
        assert main([*arguments, "--cluster", "debug"]) == 2
        assert "use --cluster local" in capsys.readouterr().err
        assert not (tmp_path / "run/launch").exists()


def test_gpus_may_have_names(make: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1, MIG-2")
    plan = make({"a": []}, local=Local(), resources={"a": Resources(gpus=2)})
    run_local(plan, plan.jobs)
    assert {row["CUDA_VISIBLE_DEVICES"] for row in events(plan)} == {"MIG-1,MIG-2"}


def test_jobs_go_on_when_nobody_reads_what_is_said(make: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    plan = make({"a": [], "b": ["a"]})
    with open(writing, "w", buffering=1) as nobody, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", nobody)
        run_local(plan, plan.jobs)
        with contextlib.suppress(OSError):
            nobody.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
    assert states(plan) == {"a": ("done", None), "b": ("done", None)}


def test_the_code_of_a_launch_is_gone(make: Callable[..., Plan], capsys: pytest.CaptureFixture[str]) -> None:
    plan = make({"a": []})
    shutil.rmtree(plan.code)
    assert main(["resume", str(plan.run)]) == 2
    assert f"{plan.code}: the code of this launch is gone; `launch resume --new_code`" in capsys.readouterr().err


# Real stages


def write_graph(tmp_path: Path, stages: dict[str, Any], **fields: Any) -> list[str]:
    file = tmp_path / "graph.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "stages": stages, **fields}, sort_keys=False))
    return ["--config", str(file)]


PICTURES = {"command": "poserelay synthesize", "overrides": {"images": 6, "size": 64, "workers": 1}}


def training(people: Path, epochs: int = 2) -> dict[str, Any]:
    """A graph of both training stages and the evaluation."""
    loop = {"threads": 1, "workers": 0, "save_every": 2, "log_every": 1}
    model = {"model.backbone": SMALL, "model.input": {"height": 32, "width": 32}}
    data = {"annotations": str(people / "annotations.json"), "images": str(people / "images")}
    heads = {"model.head": {"name": "simple", "kwargs": {"deconv_channels": [8, 8]}}, "model.skeleton": "coco17"}
    method = {"name": "mscl", "kwargs": {"width": 16, "prediction_width": 8}}
    return {
        "pretrain": {
            "overrides": {
                **model, **loop, "data.images": data["images"], "method": method,
                "optim.batch_size": 6, "optim.epochs": epochs,
            }
        },
        "finetune": {
            "overrides": {
                **model, **loop, **heads, "data": data, "init_from": "${pretrain}",
                "optim.batch_size": 4, "optim.lr_batch": 4, "optim.epochs": 1, "optim.drops": [],
            },
            "sweep": {"labels.count": [5, 10]},
        },
        "test": {
            "command": "evaluation test",
            "overrides": {**data, "checkpoint": "${finetune}", "workers": 0, "threads": 1, "decoding.flip": False},
        },
    }  # fmt: skip


TRAINED = ("pretrain", "finetune/count=5", "finetune/count=10")


def test_a_graph_runs_locally(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two real stages, each a process of its own."""
    shards = {"command": "poserelay prepare", "overrides": {"images": "${pictures}/images", "workers": 1}}
    arguments = write_graph(tmp_path, {"pictures": PICTURES, "shards": shards}, cluster="local")
    assert main(arguments) == 0, capfd.readouterr().err
    run = tmp_path / "run"
    expected = synthesize(tmp_path / "expected", 6, 0, size=64)
    assert (run / "pictures/annotations.json").read_bytes() == expected.read_bytes()
    index = json.loads((run / "shards/index.json").read_text())
    assert [len(shard["members"]) for shard in index["shards"]] == [6]
    shown = capfd.readouterr().err
    assert "pictures: done in" in shown
    assert "(2 of 2)" in shown
    snapshot = run / "launch/code"
    recorded = json.loads((snapshot / "SNAPSHOT.json").read_text())
    assert read_plan(run).commit == recorded["commit"]
    for name in PACKAGES:
        for file in (ROOT / name).rglob("*.py"):
            assert (snapshot / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    assert not list(snapshot.rglob("__pycache__/*.pyc")) or (snapshot / "poserelay").is_dir()
    # A second launch into it is refused and changes nothing.
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    assert main(arguments) == 2
    message = capfd.readouterr().err
    assert "a launch is already here" in message
    assert "launch resume" in message
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    assert main(["resume", str(run)]) == 0
    assert "nothing to start" in capfd.readouterr().err
    assert main(["logs", str(run), "pictures"]) == 0
    assert str(run / "pictures/annotations.json") in capfd.readouterr().out


def test_debug_runs_a_graph_in_this_process(people: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*write_graph(tmp_path, training(people)), "--cluster", "debug"]) == 0, capfd.readouterr().err
    plan = read_plan(tmp_path / "run")
    statuses, note = job_statuses(plan)
    assert note is None
    assert [(s.name, s.state, s.restarts) for s in statuses] == [
        (name, "done", 0) for name in (*TRAINED, "test/count=5", "test/count=10")
    ]
    by_name = {status.name: status for status in statuses}
    assert by_name["pretrain"].step == by_name["pretrain"].total == 8
    assert "AP" in (by_name["test/count=5"].metric or {})
    upstream = json.loads((tmp_path / "run/finetune/count=5/done.json").read_text())["upstream"]
    export = json.loads((tmp_path / "run/pretrain/done.json").read_text())["export_sha256"]
    assert upstream["sha256"] == export
    assert "RANK" not in os.environ
    # A stage that refuses: its exit code, its words, and no dependents.
    capfd.readouterr()
    (tmp_path / "other").mkdir()
    stages = training(people)
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    stages["finetune"]["overrides"]["data"] = {**stages["finetune"]["overrides"]["data"], "annotations": str(damaged)}
    assert main([*write_graph(tmp_path / "other", stages), "--cluster", "debug"]) == 2
    message = capfd.readouterr().err
    assert f"finetune/count=5 failed: {damaged}" in message
    assert "(4 of 5 jobs failed or were not run" in message


def test_a_changed_export_upstream_is_refused(people: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = training(people)
    stages["finetune"]["sweep"]["labels.count"] = [5]
    del stages["test"]
    assert main([*write_graph(tmp_path, stages), "--cluster", "debug"]) == 0, capfd.readouterr().err
    run = tmp_path / "run"
    shutil.rmtree(run / "finetune")
    export = run / "pretrain/export/model.safetensors"
    export.write_bytes(export.read_bytes()[:-4] + b"\0\0\0\0")
    assert states(read_plan(run))["finetune/count=5"][0] == "failed"
    capfd.readouterr()
    assert main(["resume", str(run)]) == 2
    message = capfd.readouterr().err
    assert str(export) in message
    assert "finetune/count=5 failed" in message


def test_an_interrupted_submission_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(plan: Plan, graph: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.submission, "write_configs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main([*write_graph(tmp_path, {"pictures": PICTURES}), "--cluster", "local"])
    assert list((tmp_path / "run").iterdir()) == []


def test_debug_resumes_to_the_same_bytes(people: Path, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    stages = training(people, epochs=4)
    del stages["test"]
    argv = {name: [*write_graph(tmp_path / name, stages), "--cluster", "debug"] for name in ("whole", "cut")}
    assert finish(start(main, argv["whole"], tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    process = start(main, argv["cut"], tmp_path / "log")
    run = tmp_path / "cut/run"
    until(lambda: any(row["step"] >= 3 for row in read_metrics(run / "pretrain/metrics.jsonl")))
    os.kill(process, signal.SIGTERM)
    assert finish(process) == 75, (tmp_path / "log").read_text()
    found = states(read_plan(run))
    assert found["pretrain"][0] == "interrupted"
    assert {found[name][0] for name in TRAINED[1:]} == {"blocked"}
    assert finish(start(main, ["resume", str(run)], tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    for name in TRAINED:
        assert_same_run(tmp_path / "whole/run" / name, run / name)


@pytest.mark.slow
def test_a_local_launch_is_interrupted_and_resumed_to_the_bytes_of_debug(people: Path, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    stages = training(people, epochs=20)
    stages["finetune"]["sweep"]["labels.count"] = [5]
    del stages["test"]
    whole = [*write_graph(tmp_path / "whole", stages), "--cluster", "debug"]
    assert finish(start(main, whole, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    run = tmp_path / "cut/run"
    process = start(main, [*write_graph(tmp_path / "cut", stages), "--cluster", "local"], tmp_path / "log")
    until(lambda: any(row["step"] >= 3 for row in read_metrics(run / "pretrain/metrics.jsonl")), 120)
    (status, *_), _ = job_statuses(read_plan(run))
    assert (status.state, status.total) == ("running", 80)
    os.kill(process, signal.SIGTERM)
    assert finish(process) == 75, (tmp_path / "log").read_text()
    assert states(read_plan(run))["pretrain"][0] == "interrupted"
    assert json.loads((run / "pretrain/status.json").read_text())["state"] == "interrupted"
    assert finish(start(main, ["resume", str(run)], tmp_path / "log"), 240) == 0, (tmp_path / "log").read_text()
    for name in TRAINED[:2]:
        assert_same_run(tmp_path / "whole/run" / name, run / name)
    # The code is the snapshot's.
    rows = [json.loads(line) for line in (run / "pretrain/metrics.jsonl").read_text().splitlines()]
    codes = {row["code"] for row in rows if row["kind"] == "start"}
    assert codes == {str(run / "launch/code/poserelay")}


@pytest.mark.slow
def test_jobs_run_the_code_as_it_was_at_submission(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in PACKAGES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    second = {**PICTURES, "after": ["first"]}
    (tmp_path / "g").mkdir()
    arguments = write_graph(tmp_path / "g", {"first": PICTURES, "second": second}, cluster="local")
    run = tmp_path / "g/run"
    environment = {**os.environ, "PYTHONPATH": str(checkout)}

    def launch_(*argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "launch", *argv], cwd=checkout, env=environment, stderr=subprocess.PIPE, text=True
        )

    process = launch_(*arguments)
    until(lambda: (run / "launch/plan.json").exists())
    edited = checkout / "poserelay/synthesize/__init__.py"
    edited.write_text(edited.read_text() + "\nraise SystemExit(9)\n")
    assert not (run / "launch/jobs/second/attempts.jsonl").exists() or not any(
        json.loads(line)["event"] == "start"
        for line in (run / "launch/jobs/second/attempts.jsonl").read_text().splitlines()
    )
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert (run / "second/annotations.json").read_bytes() == (run / "first/annotations.json").read_bytes()
    plan = read_plan(run)
    assert (plan.commit, Path(plan.code)) == (None, run / "launch/code")
    # The edited code is taken where it is asked for.
    shutil.rmtree(run / "second")
    edited.write_text(edited.read_text().replace("raise SystemExit(9)", "synthesize = None"))
    again = launch_("resume", str(run), "--new_code")
    _, told = again.communicate(timeout=120)
    assert again.returncode != 0
    assert "'NoneType' object is not callable" in told, told


def on_a_full_disk(message: Path, size: int) -> Callable[[list[str]], int]:
    """The launcher where no file can grow beyond `size` bytes; its words are in `message` afterwards."""

    def run(arguments: list[str]) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with contextlib.redirect_stderr(io.StringIO()) as told:
            code = main(arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        message.write_text(told.getvalue())
        return code

    return run


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_full_disk_at_submission(tmp_path: Path, size: int) -> None:
    arguments = write_graph(tmp_path, {"pictures": PICTURES}, cluster="local")
    assert finish(start(on_a_full_disk(tmp_path / "message", size), arguments, tmp_path / "log")) == 2
    message = (tmp_path / "message").read_text()
    assert len(message.strip().splitlines()) <= 2, message
    assert len(message) < 1000
    assert "make room" in message
    assert not (tmp_path / "run/launch").exists()
    assert main(arguments) == 0


def test_a_full_disk_while_jobs_run(make: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make({"a": [], "b": ["a"]})
    record = plan.record(plan.jobs[0])
    (record / "attempts.jsonl").write_text("x" * 5000 + "\n")
    write_submitted(plan, Submitted())
    argv = ["resume", str(plan.run)]
    assert finish(start(on_a_full_disk(tmp_path / "message", 5000), argv, tmp_path / "log")) == 2
    message = (tmp_path / "message").read_text()
    assert f"{record / 'attempts.jsonl'}: cannot be written" in message
    assert "Traceback" not in message
    assert main(argv) == 0
    assert states(plan) == {"a": ("done", None), "b": ("done", None)}


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    arguments = write_graph(tmp_path, {"pictures": PICTURES}, cluster="local")
    for run_dir, word in [
        ("/proc/run", "cannot be made"),
        (f"{tmp_path}/file", "not a folder"),
        (f"{tmp_path}/file/x", "cannot"),
    ]:
        assert main([*arguments, "--run_dir", run_dir]) == 2
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1
        assert f"run_dir {run_dir}" in message
        assert word in message
        assert "name another" in message


def test_two_launches_at_the_same_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other has made its folder, and not yet recorded its jobs."""
    arguments = write_graph(tmp_path, {"pictures": PICTURES}, cluster="local")
    (tmp_path / "run/launch").mkdir(parents=True)
    assert main(arguments) == 2
    assert "another launch is being submitted here" in capsys.readouterr().err
    assert list((tmp_path / "run/launch").iterdir()) == []


def test_submission_imports_no_torch(tmp_path: Path) -> None:
    stages = {"pretrain": {"config": "pretrain/configs/demo.yaml"}, "pictures": PICTURES}
    arguments = [*write_graph(tmp_path, stages), "--cluster", "slurm", "--dry_run"]
    script = (
        "import sys; from launch.__main__ import main; code = main(sys.argv[1:]); "
        "import launch.local, launch.status, launch.control, launch.task, launch.slurm; "
        "print(code, sorted({'torch', 'torchvision', 'timm', 'lightly', 'lightning_fabric'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
