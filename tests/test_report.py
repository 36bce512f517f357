"""The report: what it says of runs in any state, against figures taken by hand; and how it looks in a browser."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import statistics
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evaluation import error_types
from evaluation.__main__ import main, name_runs
from evaluation.config import ReportConfig
from evaluation.diagnose import diagnose
from evaluation.report import main as report
from evaluation.report_charts import COLOURS, POINTS, Line, ink, line_chart, log_ticks, thinned, ticks
from evaluation.report_diagnosis import KINDS
from evaluation.report_runs import read_runs, unique_names, without_seed
from poserelay.datasets.coco import read_coco
from poserelay.errors import UserError
from poserelay.keypoints import load_skeleton
from poserelay.scoring import coco_ap, read_results, scored_truth

from .chromium import EXECUTABLE, browser

PROTOCOL = {"split": "val", "boxes": "gt", "flip": True, "decode": "quarter", "nms": 0.9, "instances": 30}
NASTY = "<script>alert('&\"')<script>"


class Read(HTMLParser):
    """The texts of a page: its tables as rows of cells by their captions, and what is bold in them."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.bold: set[str] = set()
        self.charts: dict[str, str] = {}
        self.text = ""
        self._rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if given.get("role") == "region":
            self._rows = self.tables.setdefault(given["aria-label"], [])
        if tag == "svg" and "aria-label" in given:
            self.charts[given["aria-label"].partition(". ")[0]] = given["aria-label"]
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in ("wbr", "meta", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "the page is well-formed"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open[-1:] in (["td"], ["th"], ["b"]) and {"td", "th"} & {*self._open}:
            self._rows[-1][-1] += data
            if "b" in self._open:
                self.bold.add(data)

    def column(self, caption: str, name: str) -> dict[str, str]:
        """First cell to the one in column `name`."""
        head, *rows = self.tables[caption]
        return {row[0]: row[head.index(name)] for row in rows}


def write_run(
    folder: Path,
    stage: str = "finetune",
    *,
    seed: int = 0,
    losses: Sequence[float] = (0.5, 0.25),
    state: str = "done",
    metrics: dict[str, Any] | None = None,
    protocol: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """What a stage leaves in its run directory, and `evaluation test` in evaluation/."""
    folder.mkdir(parents=True)
    model = {"backbone": {"name": "resnet18", "kwargs": {}}, "head": {"name": "simple"}, "input": {"height": 64}}
    fields = {"model": model, "run_dir": str(folder), "workers": seed, "labels": {"seed": seed}, "seed": seed, **config}
    (folder / "config.yaml").write_text(f"# python -m {stage} --config THIS_FILE\n{yaml.safe_dump(fields)}")
    rows = [{"kind": "start", "step": 0, "versions": {"torch": "2.0"}}]
    rows += [{"kind": "train", "step": 10 * (n + 1), "loss": loss} for n, loss in enumerate(losses)]
    rows.append({"kind": "validation", "step": 20, "AP": 0.25, "APl": -1})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "tr')
    status = {"stage": stage, "state": state, "step": 20, "total": 40, "reason": None, "heartbeat": 1795287523.0}
    (folder / "status.json").write_text(json.dumps(status))
    if state == "done":
        done = {"stage": stage, "metrics": {}, "versions": {"torch": "2.0"}, "git_commit": "a" * 40, "seconds": 3671}
        (folder / "done.json").write_text(json.dumps(done))
    if metrics is not None:
        write_evaluation(folder / "evaluation", metrics, protocol)
    return folder


def write_evaluation(folder: Path, metrics: dict[str, Any], protocol: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    written = {"metrics": metrics, "protocol": PROTOCOL if protocol is None else protocol}
    (folder / "metrics.json").write_text(json.dumps(written))
    return folder


def page_of(out: Path, *runs: Path, **more: Any) -> Read:
    report(ReportConfig([str(run) for run in runs], str(out), **more))
    return Read(out)


def test_seeds_are_averaged_and_the_best_is_marked(tmp_path: Path) -> None:
    """Runs of two settings and three seeds, which start from runs that differ in their seed as well."""
    values = {"few": [0.3, 0.36, 0.42], "many": [0.5, 0.52, 0.51]}
    runs = []
    for seed in range(3):
        start = write_run(tmp_path / f"start_seed={seed}", "pretrain", seed=seed)
        for name, aps in values.items():
            metrics = {"AP": aps[seed], "APl": -1.0, "mean pose AP": 0.1, "PCK": 0.7, "PCK/left_wrist": aps[seed] / 2}
            origin = str(start / "export" / "model.safetensors")
            fields: dict[str, Any] = {"init_from": origin, "optim": {"lr": 0.1 if name == "few" else 0.2}}
            runs.append(write_run(tmp_path / f"{name}_seed={seed}", seed=seed, metrics=metrics, **fields))
    page = page_of(tmp_path / "report.html", *runs)
    found = page.column("Metrics", "AP")
    for name, aps in values.items():
        assert found[name].removesuffix(" (best)") == f"{np.mean(aps):.3f} ± {np.std(aps, ddof=1):.3f}"
        assert [found[f"{name}_seed={seed}"] for seed in range(3)] == [f"{ap:.3f}" for ap in aps]
    assert page.column("Metrics", "n")["few"] == "3"
    assert found["mean pose (baseline)"] == "0.100"
    assert "APl" not in page.tables["Metrics"][0]  # no person of that size
    assert page.bold == {"0.510 ± 0.010"}  # not PCK, which is equal in all
    assert "Best AP: 0.510 ± 0.010 (many)." in page.text
    assert page.column("PCK by joint", "left_wrist") == {"few": "0.180", "many": "0.255"}
    assert "many: left_wrist 0.255" in page.charts["PCK by joint"]
    differing = page.tables["finetune: fields"]
    assert differing[0] == ["run", "init_from", "labels.seed", "optim.lr", "seed"]  # neither run_dir nor workers
    assert page.column("finetune: fields", "optim.lr")["many_seed=1"] == "0.2"
    assert "Take care" not in page.text


def test_what_runs_are_and_how_they_were_made(tmp_path: Path) -> None:
    pretrained = write_run(tmp_path / "pretrained", "pretrain", method={"name": "mscl"}, losses=(-0.5, -0.75))
    fields = {"teacher": {"name": "dual"}, "init_from": str(pretrained / "export" / "model.safetensors")}
    student = write_run(tmp_path / "student", "semi", **fields)
    single = write_run(tmp_path / "single", "finetune cir", metrics={"AP": 0.5})
    page = page_of(tmp_path / "report.html", pretrained, student, single)
    assert page.column("Every run of this report", "method") == {
        "pretrained": "mscl + simple",
        "student": "dual + simple",
        "single": "simple",
    }
    assert page.column("Every run of this report", "starts from")["student"] == "pretrained"
    assert page.column("Every run of this report", "last loss")["pretrained"] == "-0.75"
    assert page.column("Every run of this report", "steps")["single"] == "20 of 40"
    made = page.tables["How the runs were made"][3]
    assert made[1:4] == [f"python -m finetune cir --config {single}/config.yaml", "2026-11-21 18:58", "1:01:11"]
    assert "single: 0.5 at step 10, 0.25 at step 20" in page.charts["finetune cir: training loss"]
    assert "student: 0.25 at step 20" in page.charts["semi: validation AP"]
    assert not any("APl" in name for name in page.charts)


def test_protocols_that_differ_are_told_and_judged_apart(tmp_path: Path) -> None:
    detected = {**PROTOCOL, "boxes": "detections", "flip": False, "baseline": "train"}
    first = write_run(tmp_path / "a", metrics={"AP": 0.7}, protocol={**PROTOCOL, "baseline": "other"})
    second = write_run(tmp_path / "b", metrics={"AP": 0.6}, seed=1, optim=1)
    third = write_run(tmp_path / "c", metrics={"AP": 0.4}, protocol=detected, optim=2)
    fourth = write_run(tmp_path / "d", metrics={"AP": 0.5}, protocol=detected, optim=3)
    page = page_of(tmp_path / "report.html", first, second, third, fourth)
    assert page.column("Metrics", "protocol") == {"a": "1", "b": "1", "c": "2", "d": "2"}
    assert page.bold == {"0.700", "0.500"}
    warning = "Protocols 1 and 2 differ (boxes gt / detections; flip true / false): the metrics of c, d do not compare"
    assert warning in page.text
    assert page.column("Protocols", "2: evaluation")["boxes ≠"] == "detections"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("{", "damaged (Expecting property name"),
        ('{"metrics": {"AP": NaN}, "protocol": {}}', "damaged (holds NaN, which is no JSON)"),
        ('{"metrics": {"AP": "high"}, "protocol": {}}', "damaged (AP is 'high', expected a number or null)"),
        ("[1]", "damaged (holds a list, expected an object)"),
        ('{"protocol": {}}', "damaged (lacks 'metrics')"),
        ('{"metrics": [], "protocol": {}}', "damaged"),
        ("\x00\xff", "damaged"),
    ],
)
def test_what_is_damaged_is_told_and_the_rest_shown(tmp_path: Path, damage: str, told: str) -> None:
    good = write_run(tmp_path / "good", metrics={"AP": 0.5})
    bad = write_run(tmp_path / "bad", metrics={"AP": 0.9})
    (bad / "evaluation" / "metrics.json").write_text(damage, encoding="latin-1")
    page = page_of(tmp_path / "report.html", good, bad)
    assert f"bad: evaluation/metrics.json: {told}" in page.text
    assert page.column("Metrics", "AP") == {"good": "0.500"}


def test_unfinished_and_empty_runs(tmp_path: Path) -> None:
    stopped = write_run(tmp_path / "stopped", state="interrupted")
    unlogged = write_run(tmp_path / "unlogged", state="failed", losses=())
    (unlogged / "metrics.jsonl").write_text('{"kind": ["x"], "step": 1}\n{"kind": "train", "step": 3, "loss": null}\n')
    (unlogged / "config.yaml").write_text("{")
    (unlogged / "status.json").write_text("[]")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.yaml").write_text("seed: 0\n")
    (fresh / "evaluation").mkdir()
    page = page_of(tmp_path / "report.html", stopped, unlogged, fresh)
    states = page.column("Every run of this report", "state")
    assert states == {"stopped": "unfinished (interrupted)", "unlogged": "unknown", "fresh": "not started"}
    for line in ("unlogged: config.yaml: ", "unlogged: metrics.jsonl: damaged", "unlogged: status.json: damaged"):
        assert line in page.text
    assert "fresh: evaluation/metrics.json: not measured yet" in page.text
    assert "Nothing is measured yet." in page.text
    assert "Metrics" not in page.tables


def test_names_are_told_apart_and_escaped(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / side / "run", metrics={"AP": 0.1}, note=NASTY + side) for side in "xy"]
    nasty = write_run(tmp_path / "a<b>&'\"", metrics={"AP": 0.2, NASTY: 0.3, f"PCK/{NASTY}": 0.5})
    (nasty / "evaluation" / "metrics.json").write_text(
        json.dumps({"metrics": {"AP": 0.2, NASTY: 0.3, f"PCK/{NASTY}": 0.5}, "protocol": {"split": NASTY}})
    )
    out = tmp_path / "report.html"
    page = page_of(out, *runs, nasty, runs[0])  # one of them twice
    assert [row[0] for row in page.tables["Every run of this report"][1:]] == ["x/run", "y/run", "a<b>&'\""]
    assert NASTY in page.tables["Metrics"][0]
    text = out.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")  # nothing is fetched from anywhere


def test_a_launch_stands_for_its_runs_with_their_evaluations(tmp_path: Path) -> None:
    """STAGE/ELEMENT with its evaluation at OTHER/ELEMENT, as a plan says; moved after it ran."""
    root, jobs, aps = tmp_path / "moved", [], {}
    for seed in range(2):
        for ratio in (0.1, 0.2):
            element, old = f"ratio={ratio}_seed={seed}", "/elsewhere/launch"
            aps[ratio, seed] = 0.5 + ratio + 0.1 * seed
            write_run(root / "tune" / element, seed=seed, labels={"ratio": ratio, "seed": seed})
            write_evaluation(root / "judge" / element, {"AP": aps[ratio, seed]})
            record = root / "launch" / "jobs" / "judge" / element
            record.mkdir(parents=True)
            checkpoint = f"{old}/tune/{element}/export/model.safetensors"
            (record / "config.yaml").write_text(yaml.safe_dump({"checkpoint": checkpoint}))
            axes = {"seed, labels.seed": [seed, seed], "labels.ratio, optim.epochs": [ratio, 3]}
            for stage, command, upstream in (
                ("tune", "finetune", []),
                ("judge", "evaluation test", [f"tune/{element}"]),
            ):
                job = {"name": f"{stage}/{element}", "stage": stage, "command": command, "axes": axes}
                jobs.append({**job, "folder": f"{old}/{stage}/{element}", "upstream": upstream})
    (root / "launch" / "plan.json").write_text(json.dumps({"jobs": jobs}))
    whole = page_of(tmp_path / "whole.html", root)
    found = whole.column("Metrics", "AP")
    for ratio in (0.1, 0.2):
        values = [aps[ratio, 0], aps[ratio, 1]]
        expected = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        assert found[f"tune, ratio={ratio}"].removesuffix(" (best)") == expected
    one = "ratio=0.1_seed=1"
    for paths in ([root / "tune" / one], [root / "judge" / one], [root / "judge" / one, root / "tune" / one]):
        (record,) = read_runs([str(path) for path in paths])
        assert (record.name, record.folder) == (f"tune/{one}", root / "tune" / one)
        assert [its.metrics["AP"] for its in record.measured] == [aps[0.1, 1]]


def test_seeds_with_several_evaluations_are_averaged(tmp_path: Path) -> None:
    """Two evaluations of each run, as a launch names them; of the last seed one is missing."""
    root, jobs, aps = tmp_path / "launched", [], {"learnt": [0.3, 0.36, 0.42], "searched": [0.5, 0.54]}
    for seed in range(3):
        run = f"tune/seed={seed}"
        write_run(root / run, seed=seed)
        jobs.append({"name": run, "stage": "tune", "command": "finetune", "axes": {"seed": seed}, "folder": run})
        for output, values in aps.items():
            name = f"judge/seed={seed}_output={output}"
            axes = {"seed": seed, "decoding.output": output}
            judge = {"name": name, "stage": "judge", "command": "evaluation test", "axes": axes, "upstream": [run]}
            jobs.append({**judge, "folder": name})
            if seed < len(values):
                write_evaluation(root / name, {"AP": values[seed]}, {**PROTOCOL, "decode": output})
    (root / "launch").mkdir()
    (root / "launch" / "plan.json").write_text(json.dumps({"jobs": jobs}))
    page = page_of(tmp_path / "r.html", root)
    found, counts = page.column("Metrics", "AP"), page.column("Metrics", "n")
    for output, values in aps.items():
        title = f"tune: output={output}"
        assert (found[title], counts[title]) == (
            f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}",
            f"{len(values)}",
        )
        for seed, value in enumerate(values):
            assert found[f"tune/seed={seed}: output={output}"] == f"{value:.3f}"
    assert len(found) == 2 + 5


def test_what_is_lost_of_a_run_is_told_and_the_rest_shown(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", metrics={"AP": 0.5})
    runs = {name: write_run(tmp_path / name, metrics={"AP": 0.5}) for name in ("blank", "silent", "noise", "folder")}
    runs |= {name: write_run(tmp_path / name) for name in ("endless", "unclear", "alone")}
    (runs["blank"] / "config.yaml").unlink()
    (runs["silent"] / "metrics.jsonl").unlink()
    (runs["noise"] / "metrics.jsonl").write_bytes(bytes(range(256)))
    (runs["folder"] / "metrics.jsonl").unlink()
    (runs["folder"] / "metrics.jsonl").mkdir()
    (runs["endless"] / "status.json").unlink()
    (runs["unclear"] / "done.json").unlink()
    page = page_of(tmp_path / "r.html", good, *runs.values())
    for line in (
        "blank: config.yaml: missing",
        "silent: metrics.jsonl: missing",
        "noise: metrics.jsonl: holds no row that can be read",
        "folder: metrics.jsonl: cannot be read (Is a directory)",
        "endless: status.json: missing",
        "unclear: done.json: missing or empty, though status.json says done",
        "alone: not evaluated",
    ):
        assert page.text.count(line) == 1
    assert "good: " not in page.text.partition("How it was made")[0].replace("good: 0.5 at step", "")
    steps, states = (page.column("Every run of this report", name) for name in ("steps", "state"))
    assert (steps["endless"], steps["silent"]) == ("20 of -", "20 of 40")
    assert (states["unclear"], states["blank"]) == ("unknown", "done")
    assert set(page.column("Metrics", "AP").values()) == {"0.500"}
    assert "Best" not in page.text  # all are alike
    assert "AP: ." not in page.text
    assert page.column("How the runs were made", "command")["blank"] == "-"


def test_what_differs_fits_on_paper(tmp_path: Path) -> None:
    """Seeds share a column, and no table has more than six of them."""
    names = [f"field{n}" for n in range(30)]
    runs = [
        write_run(tmp_path / f"lr{number}_seed={seed}", seed=seed, settings=dict.fromkeys(names, number))
        for number in range(7)
        for seed in range(3)
    ]
    page = page_of(tmp_path / "r.html", *runs)
    first, second = page.tables["finetune: fields (1 of 2)"], page.tables["finetune: fields (2 of 2)"]
    assert first[0] == ["field", *(f"lr{number} (3 runs)" for number in range(4))]
    assert second[0] == ["field", *(f"lr{number} (3 runs)" for number in range(4, 7))]
    assert page.column("finetune: fields (2 of 2)", "lr5 (3 runs)")["settings.field3"] == "5"
    assert page.column("finetune: fields (2 of 2)", "lr5 (3 runs)")["seed"] == "0, 1, 2"


def test_an_evaluation_alone_and_a_trainings_own_validation(tmp_path: Path) -> None:
    alone = write_evaluation(tmp_path / "scores", {"AP": 0.4, "AR": None})
    own = write_run(tmp_path / "own")
    done = {"stage": "finetune", "metrics": {"AP": 0.3, "step": 7, "protocol": {"split": "small"}}}
    (own / "done.json").write_text(json.dumps(done))
    page = page_of(tmp_path / "report.html", alone, own)
    assert page.column("Metrics", "AP") == {"scores": "0.400", "own": "0.300"}
    assert page.tables["Metrics"][0] == ["run", "n", "protocol", "AP"]
    assert page.tables["Protocols"][0] == ["field", "1: evaluation", "2: own validation"]
    assert "Take care" not in page.text  # two ways of measuring, not two protocols of one


def test_repeats_of_a_seed_are_no_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, metrics={"AP": 0.5}) for name in ("first", "again")]
    assert page_of(tmp_path / "report.html", *runs).column("Metrics", "n") == {"first": "1", "again": "1"}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics={"AP": 0.5, "PCK/nose": 0.3})
    for out in ("a.html", "b.html"):
        page_of(tmp_path / out, run)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "--out", "r.html"], "nowhere: no such folder; give a run directory"),
        (["empty", "--out", "r.html"], "empty: holds no config.yaml, metrics.json or launch/plan.json"),
        (["run", "--out", "r"], "out r: expected a file that ends in .html"),
        (["run", "--out", "folder.html"], "out folder.html: expected a file that ends in .html"),
        (["--out", "r.html"], "runs"),
        (["run", "--out", "r.html", "--images", "empty"], "images and skeleton want annotations"),
        (["run", "--out", "r.html", "--annotations", "nowhere.json"], "nowhere.json"),
        (["broken", "--out", "r.html"], "plan.json: not the plan of a launch"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    for folder in ("empty", "folder.html", "broken/launch"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "broken" / "launch" / "plan.json").write_text("{}")
    assert main(["report", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["a b", "c'd", "--out", "r.html"],
        ["--out", "r.html", "a b", "c'd"],
        ["--out=r.html", "--runs", "a b", "c'd"],
        ["--runs", '["a b", "c\'d"]', "--out", "r.html"],
        ["--runs=[a b]", "c'd", "--out", "r.html"],
    ],
)
def test_runs_are_named_with_and_without_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b", "c'd"):
        write_run(tmp_path / name)
    assert main(["report", *arguments]) == 0
    assert [row[0] for row in Read(tmp_path / "r.html").tables["Every run of this report"][1:]] == ["a b", "c'd"]
    assert name_runs(["score", "x"]) == ["score", "x"]


@pytest.fixture(scope="module")
def judged(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs whose predictions are the labels of rendered people, moved by 1, 4 and 12 pixels."""
    root = tmp_path_factory.mktemp("judged")
    annotations = read_coco(people / "annotations.json")
    for number, (name, size) in enumerate({"near": 1.0, "middling": 4.0, "far_seed=0": 12.0}.items()):
        rng = np.random.default_rng(number)
        records = []
        for row in annotations.persons.tolist():
            triples = np.ones((len(annotations.joints), 3))
            triples[:, :2] = annotations.keypoints[row] + rng.normal(0, size, (len(annotations.joints), 2))
            image = annotations.image_ids[annotations.image_index[row]]
            score = float(rng.uniform(0.3, 0.9))
            records.append({"image_id": image, "category_id": 1, "keypoints": triples.ravel().tolist(), "score": score})
        protocol = {**PROTOCOL, "instances": len(annotations.persons)}
        ap = coco_ap(people / "annotations.json", records, load_skeleton("coco17"))["AP"]
        metrics = {"AP": ap, "PCK/left_wrist": 0.8 / size, "PCK/nose": 0.9 / size}
        folder = write_run(root / name, metrics=metrics, protocol=protocol, optim={"lr": size}) / "evaluation"
        (folder / "predictions.json").write_text(json.dumps(records))
    return root


def test_the_diagnosis_is_diagnoses_and_the_persons_are_shown(people: Path, judged: Path, tmp_path: Path) -> None:
    runs = [judged / "near", judged / "middling"]
    more = {"annotations": str(people / "annotations.json"), "images": str(people / "images")}
    page = page_of(tmp_path / "a.html", *runs, **more)
    skeleton = load_skeleton("coco17")
    truth = scored_truth(read_coco(people / "annotations.json"), skeleton)
    for run in runs:
        found = diagnose(truth, read_results(run / "evaluation" / "predictions.json"), skeleton)
        for kind, share in found["errors"]["all"].items():
            assert page.column("Kinds of error", kind)[run.name] == f"{share:.1%}"
        assert page.column("Kinds of error", "AP gained: jitter")[run.name] == f"{found['gains']['jitter']['AP']:.3f}"
        assert page.column("Calibration", "calibration error")[run.name] == f"{found['calibration']['error']:.3f}"
    assert "Take care" not in page.text
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    pictures = [base64.b64decode(its) for its in re.findall(r'src="data:image/jpeg;base64,([^"]*)"', text)]
    captions = [float(its) for its in re.findall(r"<figcaption>OKS ([\d.]+)", text)]
    assert len(pictures) == len(captions) == 2 * 9
    assert min(captions[:3]) >= max(captions[6:9])  # best against worst
    shapes = {cv2.imdecode(np.frombuffer(its, np.uint8), cv2.IMREAD_COLOR).shape for its in pictures}  # pyright: ignore[reportOptionalMemberAccess]
    assert shapes == {(240, 486, 3)}
    page_of(tmp_path / "b.html", *runs, **more)
    assert text == (tmp_path / "b.html").read_text(encoding="utf-8")


def test_a_diagnosis_that_is_there_is_taken_and_a_damaged_one_told(people: Path, judged: Path, tmp_path: Path) -> None:
    run = tmp_path / "near"
    shutil.copytree(judged / "near", run)
    skeleton = load_skeleton("coco17")
    truth = scored_truth(read_coco(people / "annotations.json"), skeleton)
    found = diagnose(truth, read_results(run / "evaluation" / "predictions.json"), skeleton)
    found["errors"]["all"] = {"good": 0.5, "jitter": 0.25, "inversion": 0.125, "miss": 0.125, "swap": 0}
    file = run / "evaluation" / "diagnosis.json"
    file.write_text(json.dumps(found))
    page = page_of(tmp_path / "r.html", run)
    assert page.column("Kinds of error", "jitter") == {"near": "25.0%"}
    for broken in ("[]", '{"errors": {}}', json.dumps({**found, "gains": {"jitter": 3}})):
        file.write_text(broken)
        page = page_of(tmp_path / "r.html", run)
        assert f"near: {file}: damaged" in page.text
        assert "Kinds of error" not in page.tables
    found["errors"]["all"]["good"] = 7
    file.write_text(json.dumps(found))
    assert "are not in 0..1" in page_of(tmp_path / "r.html", run).text


def test_predictions_of_other_pictures_are_told(people: Path, judged: Path, tmp_path: Path) -> None:
    run = tmp_path / "near"
    shutil.copytree(judged / "near", run)
    (run / "evaluation" / "predictions.json").write_text('[{"image_id": 99}]')
    page = page_of(tmp_path / "r.html", run, judged / "middling", annotations=str(people / "annotations.json"))
    assert re.search(r"near: .*predictions\.json: record 0: has no category_id", page.text)
    assert list(page.column("Kinds of error", "good")) == ["middling"]
    measured = json.loads((run / "evaluation" / "metrics.json").read_text())
    measured["protocol"]["instances"] = 7
    (run / "evaluation" / "metrics.json").write_text(json.dumps(measured))
    shutil.copy(judged / "near" / "evaluation" / "predictions.json", run / "evaluation")
    page = page_of(tmp_path / "r.html", run, annotations=str(people / "annotations.json"))
    assert "near: its metrics are of 7 persons" in page.text
    measured["protocol"]["instances"], measured["metrics"]["AP"] = None, 0.125
    (run / "evaluation" / "metrics.json").write_text(json.dumps(measured))
    page = page_of(tmp_path / "r.html", run, annotations=str(people / "annotations.json"))
    assert "near: metrics.json has AP 0.1250, what is diagnosed has AP " in page.text


def test_pictures_that_are_missing_stop_at_once(people: Path, judged: Path, tmp_path: Path) -> None:
    more = {"annotations": str(people / "annotations.json"), "images": str(tmp_path)}
    with pytest.raises(UserError, match=r"\.jpg|\.png"):
        page_of(tmp_path / "r.html", judged / "near", **more)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e3, 1e3)), min_size=3, max_size=40, unique_by=lambda p: p[0]))
def test_a_line_lies_where_its_values_are(points: list[tuple[float, float]]) -> None:
    """Drawn points are an affine image of the values: x rises with x, and y falls with y."""
    points.sort()
    xs, ys = zip(*points, strict=True)
    drawn = line_chart("t", [Line("l", xs, ys, 0)], "x", description="d")
    places = re.search(r'points="([^"]*)"', drawn)
    assert places
    found = np.array([pair.split(",") for pair in places[1].split()], dtype=float)
    for values, axis, sign in ((np.array(xs), 0, 1), (np.array(ys), 1, -1)):
        extent, its = np.ptp(values), found[:, axis]
        if extent > 1e-6:
            expected = (values - values[0]) / extent * np.ptp(its) * sign
            np.testing.assert_allclose(its - its[0], expected, atol=0.21)  # told to a tenth
    assert (found[:, 0] >= 0).all()
    assert (found[:, 0] <= 360).all()


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_within(low: float, extent: float) -> None:
    high = low + extent
    if high <= low:
        return
    found = ticks(low, high)
    steps = np.diff(found)
    assert 1 <= len(found) <= 7
    room = 1e-6 * extent + 1e-9
    assert low - room <= found[0] <= found[-1] <= high + room
    if len(steps) and abs(low) < 1e3 * extent:
        np.testing.assert_allclose(steps, steps[0], rtol=1e-3)


def test_small_things() -> None:
    assert log_ticks(0.008, 0.03) == pytest.approx([0.01, 0.02])
    assert log_ticks(1e-6, 1e3)[0] == pytest.approx(1e-6)
    points = [(float(x), float(x)) for x in range(1000)]
    kept = thinned(points)
    assert (len(kept), kept[0], kept[-1]) == (POINTS, points[0], points[-1])
    assert [ink(colour) for colour in ("#000000", "#ffffff", "#0072B2", "#E69F00")] == [
        "#ffffff",
        "#000000",
        "#ffffff",
        "#000000",
    ]
    assert len({*COLOURS}) == 7
    assert KINDS == error_types.KINDS
    names = ["few_seed=1", "few-seed2", "seed=3_few", "seed=0_lambda=1", "seed=2", "proceed1"]
    assert [without_seed(name) for name in names] == ["few", "few", "_few", "_lambda=1", "seed=2", "proceed1"]
    folders = [Path("/a/x/run"), Path("/a/y/run"), Path("/b/y/run"), Path("/a/z")]
    assert unique_names(folders, [1, 1, 1, 2]) == ["x/run", "a/y/run", "b/y/run", "a/z"]


def test_a_report_of_real_photographs(tmp_path: Path) -> None:
    """COCO's own example of results: the AP beside the diagnosis, and persons of its pictures."""
    if "POSERELAY_DATA" not in os.environ:
        pytest.skip("POSERELAY_DATA does not name the folder of real data (eval_examples)")
    folder = Path(os.environ["POSERELAY_DATA"]) / "eval_examples"
    evaluation = write_evaluation(tmp_path / "example", {"AP": 0.5}, {"split": "val"})
    shutil.copy(folder / "example_coco_preds.json", evaluation / "predictions.json")
    page = page_of(tmp_path / "r.html", evaluation, annotations=str(folder / "example_coco_val.json"))
    shares = [float(page.column("Kinds of error", kind)["example"].rstrip("%")) for kind in ("good", "jitter", "miss")]
    assert 0 < sum(shares) <= 100.2


@pytest.mark.skipif(EXECUTABLE is None, reason="no chromium here")
def test_the_page_in_a_browser(people: Path, judged: Path, tmp_path: Path) -> None:
    """At the width of a phone and of a desk: only tables are wider than the page, all is drawn, nothing fetched."""
    runs = [judged / name for name in ("near", "middling", "far_seed=0")]
    long = write_run(
        tmp_path / ("long" * 30), metrics={f"AP{n}": 0.5 for n in range(30)}, protocol={"x" * 90: "y" * 90}
    )
    more = {"annotations": str(people / "annotations.json"), "images": str(people / "images")}
    out = tmp_path / "report.html"
    page_of(out, *runs, long, **more)
    with browser(tmp_path / "profile") as page:
        for width in (360, 1400):
            page.open(out.as_uri(), width)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("Math.max(...[...document.querySelectorAll('.scroll')].map(s => s.scrollWidth))") > 500
            picture = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None
            assert picture.shape[1] == width
            shown = page.evaluate(
                "[...document.querySelectorAll('.chart svg, .gallery img, thead')].filter(e => e.checkVisibility())"
                ".map(e => e.getBoundingClientRect()).map(r => [r.x, r.y + scrollY, r.right, r.bottom + scrollY])"
            )
            assert len(shown) > 40
            for left, top, right, bottom in np.array(shown).round().astype(int).tolist():
                part = picture[top:bottom, left : min(right, width)]
                assert left >= 0
                assert np.ptp(part) > 100, "something is drawn there"
            texts = page.evaluate(
                "[...document.querySelectorAll('svg text')].filter(t => t.checkVisibility())"
                ".map(t => parseFloat(getComputedStyle(t).fontSize) * t.getCTM().a)"
            )
            assert min(texts) > 9  # CSS pixels, on the screen
        assert page.evaluate("document.images.length > 0 && [...document.images].every(i => i.naturalWidth > 0)")
        page.call("Emulation.setEmulatedMedia", media="print")
        page.open(out.as_uri(), 690)  # A4 within its margins
        wider = "[...document.querySelectorAll('section:not(#metrics) .scroll')].map(s => s.scrollWidth)"
        assert max(page.evaluate(wider)) <= 690
        folded = "[...document.querySelectorAll('details')].every(d => d.getBoundingClientRect().height > 60)"
        assert page.evaluate(folded)  # what is folded on the screen is printed
        assert page.pdf().startswith(b"%PDF")
        assert {its.partition(":")[0] for its in page.requests} == {"file", "data"}
        assert page.messages == []
