"""Two processes over gloo against one with twice the batch."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from poserelay import distributed
from poserelay.checkpoint import read_export
from poserelay.errors import CheckFailed
from poserelay.run import read_metrics

from .processes import finish, kill, ranks, start
from .test_training import STAGES, Stage, assert_same_run

NO_BATCH_NORM = (
    "--model.backbone",
    "{name: timm, kwargs: {model: test_convnext}}",
    "--model.head",
    "{name: simple, kwargs: {deconv_channels: []}}",
)


def run_two(main: Stage, arguments: list[str], log: Path) -> None:
    processes = [start(main, arguments, log, environment) for environment in ranks(2)]
    assert [finish(process) for process in processes] == [0, 0], log.read_text()


def test_two_processes_train_like_one_with_twice_the_batch(people: Path, tmp_path: Path) -> None:
    finetune, arguments = STAGES["finetune"]
    ten_steps = ("--labels.count", "24", "--optim.epochs", "3")
    one = arguments(people, tmp_path / "one", *NO_BATCH_NORM, *ten_steps, "--optim.batch_size", "8")
    two = arguments(people, tmp_path / "two", *NO_BATCH_NORM, *ten_steps, "--optim.batch_size", "4")
    assert finetune(one) == 0
    run_two(finetune, two, tmp_path / "log")
    steps = {run: read_metrics(tmp_path / run / "metrics.jsonl")[-1]["step"] for run in ("one", "two")}
    assert steps["one"] == steps["two"] >= 10
    first, _ = read_export(tmp_path / "one/export/model.safetensors")
    second, _ = read_export(tmp_path / "two/export/model.safetensors")
    difference = math.sqrt(sum(float((first[name] - second[name]).double().square().sum()) for name in first))
    size = math.sqrt(sum(float(value.double().square().sum()) for value in first.values()))
    print(f"relative difference after {steps['one']} steps: {difference / size:.2e}")
    assert difference / size < 1e-5


@pytest.mark.slow
def test_three_processes_interrupted_end_with_the_same_bytes(people: Path, tmp_path: Path) -> None:
    # From three on the order of a sum shows in its last bits.
    pretrain, arguments = STAGES["pretrain"]

    def run(folder: Path, *, stopped: bool) -> list[int]:
        argv = arguments(people, folder, "--optim.batch_size", "2", "--optim.epochs", "3")
        processes = [start(pretrain, argv, tmp_path / "log", environment) for environment in ranks(3)]
        while stopped and not any(row["step"] >= 4 for row in read_metrics(folder / "metrics.jsonl")):
            time.sleep(0.01)
        for process in processes if stopped else []:
            os.kill(process, signal.SIGUSR2)
        return [finish(process) for process in processes]

    assert run(tmp_path / "whole", stopped=False) == [0, 0, 0], (tmp_path / "log").read_text()
    assert run(tmp_path / "cut", stopped=True) == [75, 75, 75], (tmp_path / "log").read_text()
    assert run(tmp_path / "cut", stopped=False) == [0, 0, 0], (tmp_path / "log").read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_two_processes_with_batch_norm_end_with_finite_weights(people: Path, tmp_path: Path) -> None:
    for name, (main, arguments) in STAGES.items():
        run_two(main, arguments(people, tmp_path / name), tmp_path / "log")
        state, _ = read_export(tmp_path / name / "export/model.safetensors")
        assert all(value.isfinite().all() for value in state.values())
        log = (tmp_path / "log").read_text()
        assert "x 2), batch norm over" in log


def test_a_process_that_waits_in_vain_names_the_host(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "RENDEZVOUS_SECONDS", 2)
    finetune, arguments = STAGES["finetune"]
    alone = ranks(2)[1]
    assert finish(start(finetune, arguments(people, tmp_path / "run"), tmp_path / "log", alone)) == 2
    assert f"no rendezvous at 127.0.0.1:{alone['MASTER_PORT']} within 2 s" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("name", "killed"), [("finetune", 0), ("pretrain", 1)])
def test_a_killed_process_ends_the_other(people: Path, tmp_path: Path, name: str, killed: int) -> None:
    """Within seconds and in one line, whichever of them it is."""
    main, arguments = STAGES[name]
    run = tmp_path / "run"
    argv = arguments(people, run, "--optim.epochs", "2000")
    logs = [tmp_path / f"log{rank}" for rank in (0, 1)]
    both = [start(main, argv, log, environment) for log, environment in zip(logs, ranks(2), strict=True)]
    until = time.monotonic() + 60
    while not any(row["step"] >= 3 for row in read_metrics(run / "metrics.jsonl")):
        assert time.monotonic() < until, [log.read_text() for log in logs]
        time.sleep(0.01)
    kill(both[killed])
    left = logs[1 - killed]
    assert finish(both[1 - killed], seconds=10) == 3, left.read_text()
    last = left.read_text().splitlines()[-1]
    assert re.fullmatch(
        r"stopped: another process of this run ended: .*Connection (reset|closed) by peer( \S+)?; see its output, then "
        r"start again",
        last,
    )
    assert "Traceback" not in left.read_text()
    if killed == 1:
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], f"stopped: {status['reason']}") == ("failed", last)


def test_only_a_lost_peer_is_taken_for_one() -> None:
    several: Any = SimpleNamespace(world_size=2)
    alone: Any = SimpleNamespace(world_size=1)
    lost = "[/pytorch/gloo/transport/tcp/pair.cc:1] Connection closed by peer [10.0.0.1]:2. Check the logs.\nmore"
    others = [
        (several, RuntimeError("CUDA out of memory")),
        (several, RuntimeError("NCCL error: invalid usage; Duplicate GPU detected : rank 1 and rank 0")),
        (several, RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")),
        (several, OSError(errno.EPIPE, "Broken pipe")),
        (alone, RuntimeError(lost)),
    ]
    for fabric, error in others:
        with pytest.raises(type(error)) as raised, distributed.watching_peers(fabric):
            raise error
        assert raised.value is error
    with pytest.raises(CheckFailed) as stopped, distributed.watching_peers(several):
        raise RuntimeError(lost)
    assert str(stopped.value) == (
        "another process of this run ended: Connection closed by peer [10.0.0.1]:2; see its output, then start again"
    )


def test_another_number_of_processes_does_not_resume(people: Path, tmp_path: Path) -> None:
    finetune, arguments = STAGES["finetune"]
    argv = arguments(people, tmp_path / "run")
    run_two(finetune, argv, tmp_path / "log")
    (tmp_path / "run" / "done.json").unlink()
    assert finetune(argv) == 2
