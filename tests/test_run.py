"""The run directory: nothing written is lost, nobody shares it, a changed configuration is refused."""

from __future__ import annotations

import errno
import json
import multiprocessing
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from poserelay import run as runs
from poserelay.errors import UserError
from poserelay.run import file_sha256, is_finished, open_run, read_metrics, write_atomic, write_json

CONFIG = {"optim": {"lr": 0.1}, "workers": 2, "run_dir": "a"}


def test_a_second_start_is_told_who_holds_it(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", "finetune", CONFIG, "auto")
    queue = multiprocessing.get_context("fork").Queue()

    def other() -> None:
        try:
            open_run(tmp_path / "run", "finetune", CONFIG, "auto")
            queue.put("opened")
        except UserError as error:
            queue.put(str(error))

    process = multiprocessing.get_context("fork").Process(target=other)
    process.start()
    message = queue.get(timeout=30)
    process.join()
    assert "in use by process" in message
    run.close()
    open_run(tmp_path / "run", "finetune", CONFIG, "auto").close()


def test_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    open_run(tmp_path, "finetune", CONFIG, "auto").close()
    with pytest.raises(UserError, match=r"optim\.lr: 0\.1 -> 0\.2"):
        open_run(tmp_path, "finetune", {**CONFIG, "optim": {"lr": 0.2}}, "auto")
    open_run(tmp_path, "finetune", {**CONFIG, "workers": 7, "run_dir": "b"}, "auto").close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG


def test_resume_policies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to resume"):
        open_run(tmp_path / "new", "finetune", CONFIG, "must")
    open_run(tmp_path / "run", "finetune", CONFIG, "never").close()
    with pytest.raises(UserError, match="already here"):
        open_run(tmp_path / "run", "finetune", CONFIG, "never")


def test_a_foreign_folder_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a run directory"):
        open_run(tmp_path, "finetune", CONFIG, "auto")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_temporary_files_of_a_killed_attempt_go(tmp_path: Path) -> None:
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / ".last.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    open_run(tmp_path, "finetune", CONFIG, "auto").close()
    assert list((tmp_path / "resume").iterdir()) == []


def test_finished(tmp_path: Path) -> None:
    run = open_run(tmp_path, "finetune", CONFIG, "auto")
    assert not is_finished(tmp_path, CONFIG)
    run.export_path.parent.mkdir()
    run.export_path.write_bytes(b"weights")
    run.heartbeat(10, 10)
    run.finish({"AP": 0.5}, None, threads=2)
    run.close()
    assert is_finished(tmp_path, {**CONFIG, "run_dir": "elsewhere"})
    assert not is_finished(tmp_path, {**CONFIG, "optim": {"lr": 3}})
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["export_sha256"] == file_sha256(run.export_path)
    assert done["metrics"] == {"AP": 0.5}
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["total"]) == ("done", 10, 10)


def test_a_copy_of_the_code_tells_its_own_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a launcher makes it, in a folder of a checkout that has another commit by now."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *names, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    code = tmp_path / "runs/launch/code"
    (code / "poserelay").mkdir(parents=True)
    monkeypatch.setattr(runs, "__file__", str(code / "poserelay/run.py"))

    def recorded(name: str) -> object:
        run = open_run(tmp_path / name, "finetune", CONFIG, "auto")
        run.export_path.parent.mkdir()
        run.export_path.write_bytes(b"weights")
        run.finish({}, None, threads=1)
        run.close()
        start = next(row for row in read_metrics(run.path / "metrics.jsonl") if row["kind"] == "start")
        assert start["code"] == str(code / "poserelay")
        return json.loads((run.path / "done.json").read_text())["git_commit"]

    assert recorded("checkout") == f"{head.stdout.strip()}+"
    (code / "SNAPSHOT.json").write_text('{"commit": "abc"}')
    assert recorded("snapshot") == "abc"
    (code / "SNAPSHOT.json").write_text("{")
    assert recorded("damaged") is None


def test_metrics_survive_a_torn_line_and_a_second_attempt(tmp_path: Path) -> None:
    run = open_run(tmp_path, "pretrain", CONFIG, "auto")
    for step in (1, 2, 3):
        run.log("train", step, loss=float(step))
    run.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    run = open_run(tmp_path, "pretrain", CONFIG, "auto")
    assert run.attempt == 2
    run.log("train", 3, loss=30.0)
    run.log("train", 4, loss=40.0)
    run.close()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert [(row["step"], row["loss"], row["attempt"]) for row in rows] == [
        (1, 1, 1),
        (2, 2, 1),
        (3, 30, 2),
        (4, 40, 2),
    ]


@given(cut=st.integers(0, 200))
def test_any_cut_of_metrics_reads(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    lines = "".join(json.dumps({"kind": "train", "step": step, "loss": 0.5}) + "\n" for step in range(5))
    path.write_text(lines[:cut])
    whole = lines[:cut].count("}")
    assert [row["step"] for row in read_metrics(path)] == list(range(min(whole, 5)))


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses_is_the_users_to_mend(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"good")

    def half(temporary: Path) -> None:
        temporary.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; what was there before is intact"):
        write_atomic(path, half)
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]
