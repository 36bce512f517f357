"""kill -9 at any moment, started again: the same bytes as without. No code of the stages knows of these tests."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from poserelay.run import read_metrics
from pretrain.__main__ import main as pretrain

from .processes import finish, kill, start
from .test_training import STAGES, assert_same_run, pretrain_arguments

# The others are trained by the same loops or write by the same code: what they add is killed at random moments alone.
LOOPS = ("finetune", "pretrain", "semi")


def kill_when(process: int, seen: Callable[[], bool], seconds: float = 60) -> bool:
    """Kill the process group as soon as `seen`; False if it ended before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if seen():
            kill(process)
            return True
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
    raise AssertionError("neither seen nor ended")


def being_written(folder: Path, name: str, process: int) -> Callable[[], bool]:
    """Whether a temporary file for `name` of this process is there: the file is being replaced at this moment."""

    def seen() -> bool:
        try:
            return any(entry.name == f".{name}.{process}.tmp" for entry in os.scandir(folder))
        except FileNotFoundError:
            return False

    return seen


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in LOOPS])
def test_killed_while_a_file_is_replaced(people: Path, tmp_path: Path, stage: str) -> None:
    main, arguments = STAGES[stage]
    large = ("--model.backbone", "{name: resnet18, kwargs: {}}", "--save_every", "3")  # long enough writes to hit
    assert finish(start(main, arguments(people, tmp_path / "whole", *large), tmp_path / "log")) == 0
    cut = arguments(people, tmp_path / "cut", *large, "--workers", "1")
    killed = 0
    for folder, name in [("resume", "last.pt")] * 2 + [("export", "model.safetensors")]:
        process = start(main, cut, tmp_path / "log")
        killed += kill_when(process, being_written(tmp_path / "cut" / folder, name, process))
    assert finish(start(main, cut, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert killed >= 2
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    done = json.loads((tmp_path / "cut" / "done.json").read_text())
    assert done["attempts"] >= killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "workers"),
    [("finetune", "0"), *((stage, "2") for stage in STAGES)],
)
def test_killed_at_random_moments(people: Path, tmp_path: Path, stage: str, workers: str) -> None:
    main, arguments = STAGES[stage]
    epochs = ("--optim.epochs", "8", "--workers", workers)
    began = time.monotonic()
    assert finish(start(main, arguments(people, tmp_path / "whole", *epochs), tmp_path / "log")) == 0
    seconds = time.monotonic() - began
    chance = random.Random(7)
    cut = arguments(people, tmp_path / "cut", *epochs)
    for _ in range(2):
        process = start(main, cut, tmp_path / "log")
        time.sleep(chance.uniform(0.02, 0.8 * seconds))
        kill(process)
    assert finish(start(main, cut, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def on_a_full_disk(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """`main` where no file can grow beyond 100 kB: the state of a run does not fit."""

    def limited(arguments: list[str]) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return main(arguments)

    return limited


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage in ("finetune", "semi") else pytest.mark.slow) for stage in LOOPS]
)
def test_a_full_disk_leaves_the_last_state(people: Path, tmp_path: Path, stage: str) -> None:
    main, arguments = STAGES[stage]
    assert finish(start(main, arguments(people, tmp_path / "whole"), tmp_path / "log")) == 0
    cut = arguments(people, tmp_path / "cut")
    process = start(main, cut, tmp_path / "log")
    kill_when(process, being_written(tmp_path / "cut/export", "model.safetensors", process))
    last = tmp_path / "cut/resume/last.pt"
    before = last.read_bytes()
    code = finish(start(on_a_full_disk(main), cut, tmp_path / "full"))
    assert code == 2, (tmp_path / "full").read_text()
    assert "cannot be written" in (tmp_path / "full").read_text()
    assert last.read_bytes() == before
    assert finish(start(main, cut, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_every_process_of_the_job_saves(people: Path, tmp_path: Path, number: signal.Signals) -> None:
    cut = pretrain_arguments(people, tmp_path / "cut", "--optim.epochs", "200", "--workers", "2")
    process = start(pretrain, cut, tmp_path / "log")
    metrics = tmp_path / "cut/metrics.jsonl"
    until = time.monotonic() + 60
    while not any(row["step"] >= 3 for row in read_metrics(metrics)):
        assert time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.01)
    os.killpg(process, number)
    assert finish(process) == 75, (tmp_path / "log").read_text()
    assert number.name in json.loads((tmp_path / "cut/status.json").read_text())["reason"]
