"""SCIO's search with networks that were trained: what it makes of planted errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from evaluation.__main__ import main as evaluation
from finetune.__main__ import main as finetune
from poserelay.synthesize import SynthesizeConfig
from poserelay.synthesize import main as synthesize


@pytest.mark.slow
def test_displaced_joints_teach_the_search_to_reduce_errors(tmp_path: Path) -> None:
    """On other persons than those of training."""
    for name, seed, images in (("train", 0, 100), ("test", 1, 40)):
        synthesize(SynthesizeConfig(out=str(tmp_path / name), images=images, seed=seed, size=96, workers=1))
    config = {
        "model": {
            "backbone": {"name": "timm", "kwargs": {"model": "test_resnet"}},
            "head": {"name": "simple", "kwargs": {"deconv_channels": [32, 32, 32]}},
            "skeleton": "coco17",
            "input": {"height": 96, "width": 96},
        },
        "data": {"annotations": str(tmp_path / "train/annotations.json"), "images": str(tmp_path / "train/images")},
        "optim": {"batch_size": 8, "lr_batch": 8, "lr": 3e-3, "steps": 150, "drops": [120]},
        "augmentation": {"rotation": 0, "scale": 0},
        "sigma": 1.5,
        "threads": 1,
        "workers": 0,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    trained = ["--config", str(tmp_path / "config.yaml")]
    assert finetune([*trained, "--run_dir", str(tmp_path / "base")]) == 0
    refiner = "{name: scio, kwargs: {sigma: 1.5, width: 8, dilations: [1, 2, 4, 8]}}"
    on_top = ["--model.refiner", refiner, "--init_from", str(tmp_path / "base/export/model.safetensors")]
    frozen = ["--scio.freeze_base", "true", "--optim.steps", "300", "--optim.drops", "[220]"]
    frozen += ["--scio.perturb_distal", "8"]
    assert finetune([*trained, *on_top, *frozen, "--run_dir", str(tmp_path / "scio")]) == 0
    asked = ["--checkpoint", str(tmp_path / "scio/export/model.safetensors")]
    asked += ["--workers", "0", "--decoding.flip", "false"]
    asked += ["--annotations", str(tmp_path / "test/annotations.json"), "--images", str(tmp_path / "test/images")]
    asked += ["--decoding.scio.proximal_threshold", "0.05"]
    assert evaluation(["scio", *asked, "--out", str(tmp_path / "figures")]) == 0
    planted = json.loads((tmp_path / "figures/scio.json").read_text())["metrics"]["planted"]
    print(planted)
    assert planted["before"]["mean"] == pytest.approx(4, abs=0.3)
    assert planted["after"]["mean"] < planted["before"]["mean"]
    assert planted["reduced"] > 0.5
