"""What `launch status`, `logs` and `cancel` say of records that are written here by hand. Starts nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import launch.control
import launch.slurm
import launch.status
from launch.__main__ import main
from launch.attempts import append_event, read_events
from launch.collect import collect
from launch.config import Local, Resources, Slurm
from launch.graph import Job
from launch.plan import Plan, Submitted, outdated, read_submitted, write_plan, write_submitted
from launch.slurm import ENDED, QueueEntry
from launch.status import JobStatus, job_statuses, read_progress

SUBMITTED: dict[str, Any] = {"event": "submitted"}
START: dict[str, Any] = {"event": "start", "attempt": "7.0", "host": "n1", "job": "7"}


def end(code: int, *, rank: int = 0, attempt: str = "7.0", **values: Any) -> dict[str, Any]:
    return {"event": "end", "attempt": attempt, "rank": rank, "code": code, "reason": None, **values}


class Launch:
    """A launch of a -> b -> c, with what is told of it."""

    def __init__(self, run: Path, cluster: str, patch: pytest.MonkeyPatch) -> None:
        upstream: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["b"]}
        jobs = [
            Job(name, name, "finetune", {}, str(run / name), others, Resources(), Slurm())
            for name, others in upstream.items()
        ]
        self.plan = Plan(run, cluster, "g.yaml", "abc+", str(run / "launch/code"), 20, Local(), jobs)
        self.patch = patch
        (run / "launch").mkdir(parents=True)
        write_plan(self.plan)
        self.submit()
        self.entries({})
        self.held(False)

    def submit(self, *cancelled: str) -> None:
        ids = {"a": "7", "b": "8_0", "c": "9"} if self.plan.cluster == "slurm" else {}
        write_submitted(self.plan, Submitted(ids, {}, list(cancelled), socket.gethostname(), os.getpid()))

    def events(self, name: str, *rows: Mapping[str, Any]) -> None:
        (job,) = self.plan.named(name)
        for row in rows:
            append_event(self.plan.record(job), **row)

    def entries(self, entries: Mapping[str, tuple[str, str]] | None) -> None:
        known = None
        if entries is not None:
            known = {key: QueueEntry(state, reason, state not in ENDED) for key, (state, reason) in entries.items()}
        self.patch.setattr(launch.status, "queue", lambda ids, owner: known)

    def held(self, held: bool) -> None:
        self.patch.setattr(launch.status, "is_held", lambda plan: held)

    def finish(self, name: str) -> None:
        self.events(name, START, end(0))
        folder = self.plan.run / name
        (folder / "export").mkdir(parents=True)
        (folder / "export/model.safetensors").touch()
        (folder / "done.json").touch()

    def status(self, name: str) -> JobStatus:
        return next(status for status in job_statuses(self.plan)[0] if status.name == name)

    def state(self, name: str = "a") -> tuple[str, str | None]:
        status = self.status(name)
        return status.state, status.reason


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    return Launch(tmp_path / "run", "slurm", monkeypatch)


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    return Launch(tmp_path / "run", "local", monkeypatch)


# Slurm


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (("PENDING", "Priority"), ("pending", "Priority")),
        (("PENDING", "Dependency"), ("pending", "Dependency")),
        (("PENDING", "JobHeldUser"), ("pending", "JobHeldUser")),
        (("REQUEUED", "BeginTime"), ("pending", "BeginTime")),
        (("CONFIGURING", "None"), ("running", None)),
        (("RUNNING", "None"), ("running", None)),
        (("SUSPENDED", "None"), ("pending", "suspended")),
        (("COMPLETING", "None"), ("running", None)),
    ],
)
def test_a_job_in_the_queue(slurm: Launch, entry: tuple[str, str], expected: tuple[str, str | None]) -> None:
    slurm.events("a", SUBMITTED)
    slurm.entries({"7": entry})
    assert slurm.state() == expected


def test_a_job_that_waits_to_run_again(slurm: Launch) -> None:
    slurm.events("a", SUBMITTED, START, end(75, reason="SIGUSR2 at step 3", requeued=True))
    slurm.entries({"7": ("PENDING", "BeginTime")})
    assert slurm.state() == ("pending", "BeginTime")
    slurm.events("a", {**START, "attempt": "7.1", "host": "n2"})
    slurm.entries({"7": ("RUNNING", "None")})
    found = slurm.status("a")
    assert (found.state, found.reason, found.restarts, found.host, found.job) == ("running", None, 1, "n2", "7")


@pytest.mark.parametrize("entries", [{}, {"7": ("RUNNING", "None")}, {"7": ("COMPLETED", "None")}, None])
def test_a_done_job_is_done_whatever_slurm_says(slurm: Launch, entries: dict[str, tuple[str, str]] | None) -> None:
    slurm.finish("a")
    slurm.entries(entries)
    assert slurm.state() == ("done", None)


def test_an_end_without_its_files_is_no_success(slurm: Launch) -> None:
    slurm.finish("a")
    (slurm.plan.run / "a/export/model.safetensors").unlink()
    state, reason = slurm.state()
    assert state == "failed"
    assert "lacks export/model.safetensors" in str(reason)


def test_a_job_is_not_done_by_the_files_of_an_earlier_start(slurm: Launch) -> None:
    slurm.finish("a")
    slurm.events("a", {**START, "attempt": "7.1"}, end(1, attempt="7.1", reason="worse"))
    assert slurm.state() == ("failed", "worse")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_failure_tells_its_reason(slurm: Launch, rank: int) -> None:
    slurm.events("a", START, end(1, rank=rank, reason="exit code 1: boom"))
    for entries in ({}, {"7": ("FAILED", "NonZeroExitCode")}, None):
        slurm.entries(entries)
        assert slurm.state() == ("failed", "exit code 1: boom")


def test_the_first_failure_is_the_reason(slurm: Launch) -> None:
    slurm.events("a", START, end(3, rank=1, reason="no room"), end(3, rank=0, reason="another process ended"))
    assert slurm.state() == ("failed", "no room")
    # That of an attempt before does not count.
    slurm.events("a", SUBMITTED, {**START, "attempt": "8.0"}, end(2, attempt="8.0", reason="new"))
    assert slurm.state() == ("failed", "new")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (None, "out of memory, kill -9, or a lost node"),
        (("TIMEOUT", "TimeLimit"), "its time limit"),
        (("OUT_OF_MEMORY", "OutOfMemory"), "out of memory"),
        (("NODE_FAIL", "None"), "its node failed"),
        (("FAILED", "NonZeroExitCode"), "Slurm says FAILED"),
    ],
)
def test_a_job_that_ended_without_a_word(slurm: Launch, entry: tuple[str, str] | None, told: str) -> None:
    slurm.events("a", START)
    slurm.entries({"7": entry} if entry else {})
    assert slurm.state() == ("failed", f"ended without a word: {told}")


def test_an_interrupted_job_that_nobody_starts_again(slurm: Launch) -> None:
    slurm.events("a", START, end(75, reason="saved; not started again", requeued=False))
    slurm.entries({"7": ("FAILED", "NonZeroExitCode")})
    assert slurm.state() == ("interrupted", "saved; not started again")
    assert slurm.state("b") == ("blocked", "a interrupted: saved; not started again")
    assert slurm.state("c") == ("blocked", "a interrupted: saved; not started again")


def test_cancelled_jobs(slurm: Launch) -> None:
    slurm.events("a", START, end(75, reason="saved", requeued=False, slurm="CANCELLED"))
    assert slurm.state() == ("cancelled", "by scancel; it had saved")
    assert slurm.state("b") == ("blocked", "a cancelled: by scancel; it had saved")
    slurm.submit("a")
    assert slurm.state() == ("cancelled", "by `launch cancel`")


def test_cancelled_by_scancel_with_and_without_a_start(slurm: Launch) -> None:
    slurm.entries({"7": ("CANCELLED", "None")})
    assert slurm.state() == ("cancelled", "by scancel, before it started")
    slurm.events("a", START)
    assert slurm.state() == ("cancelled", "by scancel")


@pytest.mark.parametrize(
    "entry", [None, ("CANCELLED", "DependencyNeverSatisfied"), ("PENDING", "DependencyNeverSatisfied")]
)
def test_dependents_of_a_failure_are_blocked_and_say_by_what(slurm: Launch, entry: tuple[str, str] | None) -> None:
    slurm.events("a", START, end(1, reason="boom"))
    slurm.entries({"8_0": entry, "9": entry} if entry else {})
    assert slurm.state("b") == ("blocked", "a failed: boom")
    assert slurm.state("c") == ("blocked", "a failed: boom")


@pytest.mark.parametrize(
    ("entry", "told"), [(None, "Slurm no longer knows it"), (("FAILED", "None"), "Slurm says FAILED")]
)
def test_a_job_that_left_the_queue_before_it_started(slurm: Launch, entry: tuple[str, str] | None, told: str) -> None:
    slurm.entries({"7": entry} if entry else {})
    assert slurm.state() == ("failed", f"left the queue before it started: {told}")


def test_a_job_that_was_never_submitted(slurm: Launch) -> None:
    write_submitted(slurm.plan, Submitted())
    assert slurm.state()[0] == "interrupted"


def test_without_squeue_the_records_speak_and_a_note_says_so(slurm: Launch) -> None:
    slurm.entries(None)
    slurm.events("b", START)
    statuses, note = job_statuses(slurm.plan)
    assert [status.state for status in statuses] == ["pending", "running", "pending"]
    assert "squeue does not answer" in str(note)
    # What the records tell is told.
    slurm.events("a", START, end(1, reason="boom"))
    slurm.submit("c")
    assert slurm.state("a") == ("failed", "boom")
    assert slurm.state("c")[0] == "cancelled"


@pytest.mark.parametrize("values", [{"requeued": True}, {"requeued": False, "slurm": "REQUEUED"}])
def test_without_squeue_a_requeued_job_is_not_given_up(slurm: Launch, values: dict[str, Any]) -> None:
    slurm.entries(None)
    slurm.events("a", START, end(75, reason="saved", **values))
    assert slurm.state() == ("pending", None)
    assert slurm.state("b") == ("pending", None)


def test_without_squeue_a_dependent_of_a_failure_does_not_wait(slurm: Launch) -> None:
    slurm.entries(None)
    slurm.events("a", START, end(1, reason="boom"))
    assert slurm.state("b") == ("blocked", "a failed: boom")


def test_a_job_whose_script_failed_is_quoted(slurm: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    log = launch.status.batch_log(slurm.plan, "8_0")
    log.parent.mkdir()
    log.write_text("first\nmodule: no such thing\n\n")
    slurm.finish("a")
    told = "left the queue before it started: Slurm says FAILED; its script's last words: module: no such thing"
    slurm.entries({"8_0": ("FAILED", "NonZeroExitCode")})
    assert slurm.state("b") == ("failed", told)
    assert slurm.state("c") == ("blocked", f"b failed: {told}")
    assert main(["logs", str(slurm.plan.run), "b"]) == 0
    assert capsys.readouterr().out == f"==> {log} <==\nfirst\nmodule: no such thing\n"


def test_a_job_that_slurm_removed_was_not_cancelled(slurm: Launch) -> None:
    """For a job that it waited for, and which has run again since."""
    slurm.finish("a")
    slurm.entries({"8_0": ("CANCELLED", "DependencyNeverSatisfied"), "9": ("CANCELLED", "None")})
    assert slurm.state("b") == ("blocked", "Slurm removed it, for a job that it waited for had been removed")


@pytest.mark.parametrize("variable", ["SQUEUE_PARTITION", "SQUEUE_ACCOUNT"])
def test_squeue_hides_nothing(slurm: Launch, tmp_path: Path, variable: str) -> None:
    """A squeue that says what it was asked, and prints no job where the environment filters them."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n[ "${variable}" ] || echo "7|RUNNING|None"\n')
    squeue.chmod(0o755)
    slurm.patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm.patch.setenv(variable, "other")
    assert launch.slurm.queue(["7"], 1234) == {"7": QueueEntry("RUNNING", "None", live=True)}
    assert "--user 1234 " in (tmp_path / "asked").read_text()


def test_submissions_that_were_killed_are_found_by_their_comment(slurm: Launch) -> None:
    """squeue tells an array's id, and that of each element that it keeps apart."""
    lines = [
        "31|31|poserelay one",
        "41|40|poserelay two ",
        "40|40|poserelay two",
        "50|50|poserelay other",
        "51|51|(null)",
    ]
    slurm.patch.setattr(launch.slurm, "_squeue", lambda owner, form: lines)
    begun = {"poserelay one": ["a"], "poserelay two": ["b", "c"], "poserelay three": ["d"]}
    submitted = Submitted(begun=begun)
    assert sorted(launch.slurm.adopt(submitted, 0)) == ["a", "b", "c"]
    assert submitted.ids == {"a": "31", "b": "40_0", "c": "40_1"}
    # An id that was noted since is the later one.
    submitted = Submitted({"a": "60"}, begun)
    launch.slurm.adopt(submitted, 0)
    assert submitted.ids["a"] == "60"


def test_an_array_without_its_last_job_is_not_whole(slurm: Launch) -> None:
    jobs = [replace(slurm.plan.jobs[0], name=f"s/{n}", stage="s") for n in range(3)]
    plan = replace(slurm.plan, jobs=[*jobs, *slurm.plan.jobs])
    ids = {f"s/{n}": f"5_{n}" for n in range(3)} | {"a": "6"}
    assert launch.slurm._whole_arrays(plan, ids) == {"5": 3}
    assert launch.slurm._whole_arrays(plan, {**ids, "s/2": "7"}) == {}
    assert launch.slurm._whole_arrays(plan, {name: ids[name] for name in ("s/0", "s/1")}) == {}
    assert launch.slurm._whole_arrays(plan, {**ids, "s/0": "5_1", "s/1": "5_0"}) == {}


def finish_chain(launched: Launch) -> None:
    """a, b and c have ended well, each from the one before."""
    before: dict[str, str] = {}
    for name, job_id in (("a", "7"), ("b", "8_0"), ("c", "9")):
        attempt = f"{job_id}.0"
        start = {**START, "attempt": attempt, "job": job_id, "upstream": before}
        launched.finish(name)
        launched.events(name, start, end(0, attempt=attempt))
        before = {name: attempt}


def test_what_comes_from_a_replaced_upstream_is_outdated(slurm: Launch) -> None:
    finish_chain(slurm)
    assert [slurm.state(name) for name in "abc"] == [("done", None)] * 3
    (slurm.plan.run / "b/done.json").unlink()
    assert slurm.state("a") == ("done", None)
    assert slurm.state("b")[0] == "failed"
    assert slurm.state("c") == ("outdated", "b is to be run again")
    (slurm.plan.run / "b/done.json").touch()
    slurm.events("a", SUBMITTED, {**START, "attempt": "17.0", "job": "17"}, end(0, attempt="17.0"))
    assert [slurm.state(name) for name in "bc"] == [("outdated", "a was run again since")] * 2
    # Submitted anew they wait, and are not submitted once more; without Slurm's word they are what their files say.
    write_submitted(slurm.plan, Submitted({"a": "17", "b": "18", "c": "19"}))
    slurm.entries({"18": ("RUNNING", "None"), "19": ("PENDING", "Dependency")})
    assert [slurm.state(name) for name in "bc"] == [("running", None), ("pending", "Dependency")]
    slurm.entries({})
    assert slurm.state("c") == ("outdated", "a was run again since")


def test_outdated_jobs_of_a_launcher_that_runs_wait_for_their_turn(local: Launch) -> None:
    finish_chain(local)
    local.events("a", SUBMITTED, {**START, "attempt": "x.1"}, end(0, attempt="x.1"))
    assert local.state("b")[0] == "outdated"
    local.events("b", SUBMITTED)
    local.held(True)
    assert local.state("b") == ("pending", "waits for its turn or for a job upstream")


def test_outdated_jobs_are_missing_in_the_table(slurm: Launch) -> None:
    finish_chain(slurm)
    slurm.events("a", SUBMITTED, {**START, "attempt": "17.0", "job": "17"}, end(0, attempt="17.0"))
    missing = collect(slurm.plan.jobs[2:], outdated(slurm.plan)).missing
    assert [(each.name, each.reason) for each in missing] == [
        ("c", "outdated: a was run again since; resume the launch")
    ]


def test_a_torn_line_of_the_record_loses_only_itself(slurm: Launch) -> None:
    slurm.events("a", SUBMITTED, START)
    with open(slurm.plan.record(slurm.plan.jobs[0]) / "attempts.jsonl", "a") as file:
        file.write('{"event": "end", "attempt": "7.0", "ra')
    slurm.finish("a")
    slurm.events("a", SUBMITTED)
    assert [row["event"] for row in read_events(slurm.plan.record(slurm.plan.jobs[0]))] == [
        *("submitted", "start", "start", "end", "submitted")
    ]
    assert slurm.state() == ("done", None)


# Here


def test_jobs_of_a_launcher_that_runs(local: Launch) -> None:
    local.held(True)
    local.finish("a")
    local.events("b", SUBMITTED, START)
    local.events("c", SUBMITTED)
    assert [local.state(name) for name in "abc"] == [
        ("done", None),
        ("running", None),
        ("pending", "waits for its turn or for a job upstream"),
    ]


def test_a_job_that_the_launcher_starts_again_or_not(local: Launch) -> None:
    local.held(True)
    local.events("a", START, end(75, reason="saved", requeued=True))
    assert local.state() == ("pending", "is started again")
    local.events("a", {**START, "attempt": "7.1"}, end(75, attempt="7.1", reason="too often", requeued=False))
    assert local.state() == ("interrupted", "too often")
    assert local.state("b") == ("blocked", "a interrupted: too often")


def test_a_failure_is_told_while_other_jobs_run(local: Launch) -> None:
    local.held(True)
    # The job's other processes may still be ending.
    local.events("a", START, end(1, rank=1, reason="boom"))
    assert local.state() == ("failed", "boom")
    assert local.state("b") == ("blocked", "a failed: boom")


def test_jobs_of_a_launcher_that_is_gone(local: Launch) -> None:
    local.events("a", START)
    assert local.state() == ("interrupted", "the launcher ended, killed or with its machine, while the job ran")
    assert local.state("b")[0] == "blocked"
    local.events("a", end(-15, reason="killed by SIGTERM", requeued=False))
    assert local.state() == ("interrupted", "killed by SIGTERM")


def test_a_job_whose_turn_did_not_come(local: Launch) -> None:
    local.finish("a")
    local.events("b", SUBMITTED)
    assert local.state("b") == ("interrupted", "not started: the launcher ended before its turn")


# Progress


def write_rows(folder: Path, *rows: Mapping[str, Any], torn: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def train(step: int, seconds: float, attempt: int = 1, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "attempt": attempt, "seconds": seconds, "images_per_second": 50.0, **values}


def test_progress_of_a_running_job(slurm: Launch) -> None:
    slurm.events("a", START)
    slurm.entries({"7": ("RUNNING", "None")})
    folder = slurm.plan.run / "a"
    write_rows(folder, train(10, 5.0, loss=0.5), train(20, 9.0, loss=0.25), torn='{"kind": "train", "step": 3')
    (folder / "status.json").write_text('{"step": 18, "total": 100}')
    found = slurm.status("a")
    assert (found.step, found.total, found.images_per_second, found.metric) == (20, 100, 50.0, {"loss": 0.25})
    assert found.eta_seconds == pytest.approx((100 - 20) * (9.0 - 5.0) / 10)
    # Only a running job has a time of arrival.
    slurm.entries({"7": ("PENDING", "BeginTime")})
    assert slurm.status("a").eta_seconds is None


def test_progress_after_a_restart_is_that_of_the_new_start(tmp_path: Path) -> None:
    write_rows(tmp_path, train(80, 70.0), train(90, 80.0), train(61, 2.0, 2), train(62, 5.0, 2))
    (tmp_path / "status.json").write_text('{"step": 90, "total": 100}')
    found = read_progress(tmp_path)
    assert (found["step"], found["eta_seconds"]) == (62, pytest.approx(38 * 3.0))
    # The first row of a start tells no pace.
    write_rows(tmp_path, train(80, 70.0), train(90, 80.0), train(61, 2.0, 2))
    assert "eta_seconds" not in read_progress(tmp_path)


def test_the_main_figure_comes_before_the_loss(tmp_path: Path) -> None:
    validation = {"kind": "validation", "step": 5, "attempt": 1, "AP": 0.5, "loss": 3.0}
    write_rows(tmp_path, validation, {**validation, "AP": 0.75}, train(20, 9.0, loss=0.25))
    assert read_progress(tmp_path)["metric"] == {"AP": 0.75}
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.json").write_text('{"metrics": {"AP": 0.125, "PCK": 0.5, "other": 1.0}}')
    assert read_progress(tmp_path) == {"metric": {"AP": 0.125, "PCK": 0.5}}


def test_progress_of_a_long_run_is_read_from_its_end(tmp_path: Path) -> None:
    write_rows(tmp_path, *(train(step, float(step), loss=1.0) for step in range(1, 5000)))
    assert (tmp_path / "metrics.jsonl").stat().st_size > 4 * launch.status.TAIL
    assert read_progress(tmp_path)["step"] == 4999


@pytest.mark.parametrize(
    "text", ["", "[1]\n", "{}\n", '{"kind": "train"}\n', '{"kind": "train", "step": 3, "attempt": 1}\n']
)
def test_odd_files_are_no_progress(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "status.json").write_text(text)
    assert read_progress(tmp_path).get("total") is None


# The commands


def test_json_is_one_object(slurm: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.finish("a")
    slurm.events("b", START)
    slurm.entries({"8_0": ("RUNNING", "None"), "9": ("PENDING", "Dependency")})
    write_rows(slurm.plan.run / "b", train(10, 5.0, loss=float("nan")), train(20, 9.0, loss=float("nan")))
    assert main(["status", str(slurm.plan.run), "--json"]) == 0
    shown = capsys.readouterr()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads(shown.out, parse_constant=refuse)
    assert len(shown.out.splitlines()) == 1
    assert not shown.err
    assert (report["cluster"], report["commit"], report["note"]) == ("slurm", "abc+", None)
    assert {state: count for state, count in report["counts"].items() if count} == {
        "done": 1,
        "running": 1,
        "pending": 1,
    }
    assert [(job["name"], job["state"], job["job"]) for job in report["jobs"]] == [
        ("a", "done", "7"),
        ("b", "running", "8_0"),
        ("c", "pending", "9"),
    ]


@pytest.mark.parametrize("flags", [["--json"], ["--json=true"], ["--json", "true"]])
def test_the_run_may_come_before_and_after_a_flag(
    slurm: Launch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    run = str(slurm.plan.run)
    for arguments in ([run, *flags], ["--run", run, *flags], [*flags, "--run", run]):
        assert main(["status", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["run"] == run
    assert main(["status", "--json", run]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == run


def test_the_table_says_what_to_do(slurm: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.events("a", START, end(1, reason="boom"))
    assert main(["status", str(slurm.plan.run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["job", "state"]
    assert lines[1].split()[:2] == ["a", "failed"]
    assert lines[1].endswith("boom")
    assert lines[2].split()[:2] == ["b", "blocked"]
    assert lines[-1] == f"3 of 3 will not end by themselves; `launch resume {slurm.plan.run}` starts them"


def test_logs(local: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(local.plan.run)
    assert main(["logs", run, "a"]) == 0
    assert "no process of it has started" in capsys.readouterr().err
    local.events("a", START)
    record = local.plan.record(local.plan.jobs[0])
    for rank in (0, 2, 10):
        (record / f"rank{rank}.log").write_text("".join(f"{rank}: {line}\n" for line in range(100)))
    assert main(["logs", run, "a", "--lines", "2"]) == 0
    expected = [line for r in (0, 2, 10) for line in (f"==> {record}/rank{r}.log <==", f"{r}: 98", f"{r}: 99")]
    assert capsys.readouterr().out.splitlines() == expected
    assert main(["logs", run, "a", "--lines", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 303
    assert main(["logs", run, "d"]) == 2
    assert "no stage or job 'd' in this launch; choose from a, b, c" in capsys.readouterr().err


def test_cancel_on_slurm(slurm: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[list[str]] = []
    slurm.patch.setattr(launch.slurm, "cancel", lambda ids: asked.append(list(ids)))
    slurm.finish("a")
    slurm.events("b", START)
    slurm.entries({"8_0": ("RUNNING", "None"), "9": ("PENDING", "Dependency")})
    assert main(["cancel", str(slurm.plan.run), "--stage", "c"]) == 0
    assert "1 of 1 jobs cancelled" in capsys.readouterr().err
    assert main(["cancel", str(slurm.plan.run)]) == 0
    assert "2 of 3 jobs cancelled" in capsys.readouterr().err
    assert asked == [["9"], ["8_0", "9"]]
    assert sorted(read_submitted(slurm.plan).cancelled) == ["b", "c"]
    slurm.entries({})
    assert [slurm.state(name) for name in "abc"] == [
        ("done", None),
        ("cancelled", "by `launch cancel`"),
        ("cancelled", "by `launch cancel`"),
    ]
    slurm.entries(None)
    assert main(["cancel", str(slurm.plan.run)]) == 2
    assert "nothing was cancelled" in capsys.readouterr().err
    assert len(asked) == 2


def test_cancel_here(local: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    local.patch.setattr(launch.control.os, "kill", lambda pid, number: told.append((pid, number)))
    run = str(local.plan.run)
    assert main(["cancel", run]) == 0
    assert "nothing runs" in capsys.readouterr().err
    local.patch.setattr(launch.control, "is_held", lambda plan: True)
    assert main(["cancel", run, "--stage", "a"]) == 2
    assert "cancelled as a whole; leave out --stage a" in capsys.readouterr().err
    write_submitted(local.plan, Submitted(host="elsewhere", pid=1))
    assert main(["cancel", run]) == 2
    assert "it runs on elsewhere; cancel it there" in capsys.readouterr().err
    assert not told
    local.submit()
    assert main(["cancel", run]) == 0
    assert told == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize("command", [["status"], ["resume"], ["cancel"], ["logs", "a"]])
def test_damaged_records_are_named(local: Launch, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    run = local.plan.run

    def refused(*parts: str) -> None:
        assert main([command[0], str(run), *command[1:]]) == 2
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1
        assert all(part in message for part in parts), message

    path = run / "launch/plan.json"
    whole = path.read_text()
    for text in ("", "[]", "{}", whole[: len(whole) // 2], whole.replace('"resources"', '"resourses"')):
        path.write_text(text)
        refused(str(path), "damaged")
    path.write_text(whole.replace('"format": 1', '"format": 2'))
    refused(str(path), "format 2")
    path.unlink()
    refused("no launch here", "launch/plan.json")


def test_a_damaged_record_of_submissions_is_named(slurm: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    path = slurm.plan.run / "launch/submitted.json"
    for text in ("", '{"ids"', '{"idz": {}}'):
        path.write_text(text)
        assert main(["status", str(slurm.plan.run)]) == 2
        assert f"{path}: damaged" in capsys.readouterr().err
