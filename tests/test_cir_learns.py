"""CIR learns six pictures by heart, and then finds everybody in them from the pictures alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from evaluation.__main__ import main as evaluation
from finetune.__main__ import main as finetune
from poserelay.run import read_metrics
from poserelay.synthesize import synthesize


@pytest.mark.slow
def test_six_pictures_by_heart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = synthesize(tmp_path / "people", 6, 3, size=96)
    images = str(tmp_path / "people/images")
    config = {
        "model": {
            "backbone": {"name": "timm", "kwargs": {"model": "test_resnet"}},
            "head": {"name": "cir"},
            "skeleton": "coco17",
            "input": {"height": 96, "width": 96},
        },
        "data": {"annotations": str(annotations), "images": images},
        "run_dir": str(tmp_path / "run"),
        "optim": {"lr": 3e-3, "lr_batch": 3, "batch_size": 3, "steps": 300, "drops": [220]},
        "augmentation": {"rotation": 0, "scale": [1, 1], "shift": 0, "flip_probability": 0, "jitter": [0, 0, 0, 0]},
        "threads": 1,
        "workers": 0,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert finetune(["cir", "--config", str(tmp_path / "config.yaml")]) == 0
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["kind"] == "train"]
    assert rows[-1]["displacement_loss"] < 0.2 * rows[0]["displacement_loss"]
    assert rows[-1]["oks"] > 0.8
    capsys.readouterr()
    checkpoint = str(tmp_path / "run/export/model.safetensors")
    data = ["--annotations", str(annotations), "--images", images, "--workers", "0", "--threads", "1"]
    alone = ["--decoding.flip", "false", "--json"]  # no picture was mirrored in training
    assert evaluation(["test", "--checkpoint", checkpoint, *data, *alone]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metrics"]["AP"] > 0.8  # 1.0 after 400 steps
    assert report["protocol"]["boxes"] == "none"
    # Somebody's pose is ranked before what is left of the background.
    assert report["scores"]["poses"] >= 7
