"""Hard negatives: detections that touch nobody's box."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.__main__ import main as evaluation
from finetune.__main__ import main as finetune
from finetune.hard_negatives import read_hard_negatives, touching
from poserelay.datasets.coco import CocoAnnotations, read_coco
from poserelay.errors import UserError
from poserelay.synthesize import SynthesizeConfig
from poserelay.synthesize import main as synthesize

BOX = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 8), st.integers(0, 8))
PLACED = st.lists(st.tuples(BOX, st.integers(0, 3)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(PLACED, PLACED)
def test_touching_is_a_shared_area_on_the_same_image(boxes: list, others: list) -> None:
    expected = []
    for (x, y, w, h), image in boxes:
        pixels = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        expected.append(
            any(
                place == image and pixels & {(column, row) for column in range(a, a + c) for row in range(b, b + d)}
                for (a, b, c, d), place in others
            )
        )

    def arrays(placed: list) -> tuple[np.ndarray, np.ndarray]:
        found = np.array([box for box, _ in placed], dtype=float).reshape(-1, 4)
        return found, np.array([image for _, image in placed], dtype=np.int64)

    assert touching(*arrays(boxes), *arrays(others)).tolist() == expected


def files(folder: Path, detections: list[dict]) -> tuple[Path, Path]:
    """Image 1: a person and a crowd; image 2: nobody; image 3: a person without a labelled joint."""
    person = {"category_id": 1, "iscrowd": 0, "keypoints": [10, 10, 2], "num_keypoints": 1}
    truth = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "one", "keypoints": ["nose"]}],
        "annotations": [
            {**person, "id": 1, "image_id": 1, "bbox": [5, 5, 20, 20]},
            {**person, "id": 2, "image_id": 1, "bbox": [60, 60, 30, 30], "iscrowd": 1},
            {**person, "id": 3, "image_id": 3, "bbox": [0, 0, 50, 50], "keypoints": [0, 0, 0], "num_keypoints": 0},
        ],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "detections.json").write_text(json.dumps(detections))
    return folder / "truth.json", folder / "detections.json"


def detection(image: int, *box: float, score: float = 0.9) -> dict:
    return {"image_id": image, "category_id": 1, "bbox": list(box), "score": score}


def test_sure_detections_clear_of_everybody_are_taken(tmp_path: Path) -> None:
    truth, detections = files(
        tmp_path,
        [
            detection(1, 30, 5, 20, 20),  # clear
            detection(1, 25, 5, 10, 10, score=0.5),  # touches the person's edge, shares no area; at the threshold
            detection(1, 24, 5, 10, 10),  # one pixel of the person
            detection(1, 55, 55, 20, 20),  # the crowd
            detection(2, 0, 0, 90, 90),  # nobody in the picture
            detection(2, 0, 0, 90, 90, score=0.49),
            detection(3, 40, 40, 20, 20),  # a person without joints
            detection(2, 100, 0, 20, 20),  # outside the picture
            detection(2, -20, 0, 20, 20),
        ],
    )
    annotations = read_coco(truth)
    found = read_hard_negatives(str(detections), annotations, 0.5)
    assert found.boxes[:, 0].tolist() == [30, 25, 0]
    assert found.image_index.tolist() == [0, 0, 1]
    assert found.skipped == 6
    assert read_hard_negatives(str(detections), annotations, 0.5, [1]).boxes[:, 0].tolist() == [30, 25]


def test_files_without_a_hard_negative_are_told(tmp_path: Path) -> None:
    truth, detections = files(tmp_path, [detection(1, 6, 6, 5, 5), detection(2, 0, 0, 5, 5, score=0.2)])
    with pytest.raises(
        UserError, match=r"0 outside their picture, 1 touch an annotated box; lower hard_negatives\.score_threshold"
    ):
        read_hard_negatives(str(detections), read_coco(truth), 0.5)
    truth, detections = files(tmp_path, [detection(9, 6, 6, 5, 5)])
    with pytest.raises(UserError, match="none of its 1 detections"):
        read_hard_negatives(str(detections), read_coco(truth), 0.5)


def planted(annotations: CocoAnnotations, seed: int) -> list[dict]:
    """At most two boxes of a person's shape per picture, clear of everybody."""
    rng = np.random.default_rng(seed)
    found = []
    for row, (image, (height, width)) in enumerate(
        zip(annotations.image_ids, annotations.image_sizes.tolist(), strict=True)
    ):
        wide = rng.uniform(0.2, 0.4, 200) * width
        high = rng.uniform(1.3, 2, 200) * wide
        near = rng.uniform(0, 1, (2, 200)) * (width - wide, height - high)
        boxes = np.stack([*near, wide, high], 1)
        clear = ~touching(boxes, np.full(200, row), annotations.boxes, annotations.image_index)
        found += [detection(image, *box) for box in boxes[clear][:2].tolist()]
    return found


@pytest.mark.slow
def test_hard_negatives_lower_the_scores_of_false_detections_and_leave_recall(tmp_path: Path) -> None:
    """On other pictures than those that the false detections of training are on."""
    for name, seed, images in (("train", 0, 80), ("test", 1, 60)):
        synthesize(SynthesizeConfig(out=str(tmp_path / name), images=images, seed=seed, size=128, workers=1))
        detections = planted(read_coco(tmp_path / name / "annotations.json"), seed)
        assert len(detections) > images
        (tmp_path / f"{name}.json").write_text(json.dumps(detections))
    config = {
        "model": {
            "backbone": {"name": "timm", "kwargs": {"model": "test_resnet"}},
            "head": {"name": "simple", "kwargs": {"deconv_channels": [32, 32, 32]}},
            "skeleton": "coco17",
            "input": {"height": 64, "width": 64},
        },
        "data": {
            "annotations": str(tmp_path / "train/annotations.json"),
            "images": str(tmp_path / "train/images"),
        },
        "optim": {"batch_size": 16, "lr_batch": 16, "lr": 3e-3, "steps": 220, "drops": [160]},
        "augmentation": {"rotation": 0, "scale": 0},
        "sigma": 1.5,
        "threads": 1,
        "workers": 0,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    hard = ("--hard_negatives.detections", str(tmp_path / "train.json"), "--hard_negatives.ratio", "0.5")

    def scores_and_recall(arm: str, boxes: str) -> tuple[float, float, float]:
        """Mean score of the poses, AR, and share of joints found; every pose stays."""
        asked = {"annotations": tmp_path / "test/annotations.json", "images": tmp_path / "test/images", "boxes": boxes}
        model, out = tmp_path / arm / "export/model.safetensors", tmp_path / arm / "scores"
        arguments = [text for name, value in asked.items() for text in (f"--{name}", str(value))]
        arguments += ["--checkpoint", str(model), "--out", str(out), "--workers", "0", "--decoding.nms_threshold", "1"]
        assert evaluation(["test", *arguments]) == 0
        metrics = json.loads((out / "metrics.json").read_text())["metrics"]
        poses = json.loads((out / "predictions.json").read_text())
        return float(np.mean([pose["score"] for pose in poses])), metrics["AR"], metrics["PCK"]

    persons, nobody = {}, {}
    for arm, more in (("without", ()), ("with", hard)):
        assert finetune(["--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / arm), *more]) == 0
        persons[arm] = scores_and_recall(arm, "gt")
        nobody[arm] = scores_and_recall(arm, str(tmp_path / "test.json"))
    print(persons, nobody)
    assert nobody["without"][0] > 0.3
    assert nobody["with"][0] < 0.2 * nobody["without"][0]
    assert persons["with"][0] > 0.8 * persons["without"][0]
    assert persons["with"][1] == pytest.approx(persons["without"][1], abs=0.02)
    assert persons["with"][2] == pytest.approx(persons["without"][2], abs=0.04)
