"""The benchmarks run and end with one JSON line; what they measure is not judged here."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "name",
    [
        *("decode", "nms", "loader", "views", "shards", "neighbours", "pretrain_step", "icon"),
        *("diagnose", "video", "report"),
    ],
)
def test_benchmark(
    name: str, people: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["--images", str(people / "images")]
    arguments = {
        "decode": ["--batch", "2", "--repeats", "1"],
        "nms": ["--images", "2"],
        "loader": ["--annotations", str(people / "annotations.json"), *images],
        "views": [*images, "--count", "4", "--rounds", "1"],
        "shards": [*images, "--rounds", "1"],
        "neighbours": ["--bank", "300", "--queries", "20", "--classes", "3", "--neighbours", "10", "--repeats", "1"],
        "pretrain_step": [
            "--method",
            "simsiam",
            "--backbone",
            "resnet18",
            "--size",
            "32",
            "--batch",
            "2",
            "--rounds",
            "1",
        ],
        "diagnose": ["--images", "20", "--persons", "30", "--poses", "200", "--rounds", "1"],
        "video": ["--quick"],
        "report": ["--runs", "2", "--annotations", str(people / "annotations.json"), *images],
        "icon": [
            *("--peer_batch", "3", "--batches", "3", "--joints", "17", "--backbone", "resnet18", "--size", "64", "32"),
            *("--step_batch", "2", "--loss_batch", "4", "--rounds", "1"),
        ],
    }
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments[name], "--json"])
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert figures["ours"] > 0
    assert figures["peer"] > 0
    assert figures["ratio"] == pytest.approx(figures["ours"] / figures["peer"], rel=0.05)


def test_single_stage_has_a_line_for_each_figure(
    people: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each after its own check: the persons put into the maps are found, the targets are the loop's."""
    data = ["--annotations", str(people / "annotations.json"), "--images", str(people / "images"), "--samples", "2"]
    small = ["--backbone", "resnet18", "--size", "128", "--persons", "1", "3", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["single_stage.py", *small, *data, "--json"])
    runpy.run_path(str(ROOT / "benchmarks" / "single_stage.py"), run_name="__main__")
    lines = {line["figure"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(lines) == ["postprocessing", "targets", "inference", "head", "loader"]
    for name, line in lines.items():
        ratio = line["ours"] / line["peer"]
        assert line["ratio"] == pytest.approx(1 / ratio if name in ("targets", "head") else ratio)
    assert lines["targets"]["pixels"] > 22 * 20
    assert lines["head"]["peak_mib"]["ours"] < lines["head"]["peak_mib"]["peer"]
