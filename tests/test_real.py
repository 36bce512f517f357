"""Training on real photographs, found through POSERELAY_DATA."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from evaluation.__main__ import main as evaluation
from finetune.__main__ import main as finetune
from poserelay.datasets.coco import read_coco

DATA = Path(os.environ.get("POSERELAY_DATA", "nowhere"))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "lspet").exists(), reason="POSERELAY_DATA names no folder with lspet")
def test_three_hundred_steps_overfit_32_persons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PCK@0.2 of the torso above 0.95 on the persons that were trained on; the mean pose is far from it."""
    annotations = read_coco(DATA / "lspet/train.json")
    left, right = annotations.joints.index("left_shoulder"), annotations.joints.index("right_hip")
    whole = annotations.persons[(annotations.visibility[annotations.persons][:, [left, right]] > 0).all(1)][:32]
    images = set(annotations.image_index[whole].tolist())
    data = json.loads((DATA / "lspet/train.json").read_text())
    data["images"] = [image for row, image in enumerate(data["images"]) if row in images]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [person for person in data["annotations"] if person["image_id"] in kept]
    truth = tmp_path / "32.json"
    truth.write_text(json.dumps(data))
    config = {
        "model": {
            "backbone": {"name": "resnet18"},
            "head": {"name": "simple", "kwargs": {"deconv_channels": [64, 64, 64]}},
            "skeleton": "lsp14",
            "input": {"height": 96, "width": 96},
        },
        "data": {"annotations": str(truth), "images": str(DATA / "lspet/images")},
        "optim": {"lr": 1e-3, "lr_batch": 16, "batch_size": 16, "epochs": 150, "drops": [120]},
        "augmentation": {"rotation_probability": 0, "scale": 0, "flip_probability": 0},
        "sigma": 1.5,
        "workers": 1,
        "threads": 1,  # the suite runs a test on each core
        "run_dir": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert finetune(["--config", str(tmp_path / "config.yaml")]) == 0
    assert json.loads((tmp_path / "run/status.json").read_text())["step"] == 300
    capsys.readouterr()
    arguments = ["--annotations", str(truth), "--images", str(DATA / "lspet/images"), "--json"]
    export = str(tmp_path / "run/export/model.safetensors")
    decoding = ["--decoding.refine", "parabola", "--decoding.flip", "false"]
    baseline = ["--baseline_annotations", str(truth)]
    assert evaluation(["test", "--checkpoint", export, *arguments, *decoding, *baseline]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    print(f"PCK@0.2 {metrics['PCK']:.3f}, mean pose {metrics['mean pose PCK']:.3f}")
    assert metrics["PCK"] > 0.95
    assert metrics["mean pose PCK"] < 0.5
