"""Hard negatives: detections that touch nobody's box."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.hard_negatives import read_hard_negatives, touching
from poserelay.datasets.coco import read_coco
from poserelay.errors import UserError

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
        ],
    )
    annotations = read_coco(truth)
    found = read_hard_negatives(str(detections), annotations, 0.5)
    assert found.boxes[:, 0].tolist() == [30, 25, 0]
    assert found.image_index.tolist() == [0, 0, 1]
    assert found.skipped == 4
    assert read_hard_negatives(str(detections), annotations, 0.5, [1]).boxes[:, 0].tolist() == [30, 25]


def test_files_without_a_hard_negative_are_told(tmp_path: Path) -> None:
    truth, detections = files(tmp_path, [detection(1, 6, 6, 5, 5), detection(2, 0, 0, 5, 5, score=0.2)])
    with pytest.raises(UserError, match=r"every one touches an annotated box; lower hard_negatives\.score_threshold"):
        read_hard_negatives(str(detections), read_coco(truth), 0.5)
    truth, detections = files(tmp_path, [detection(9, 6, 6, 5, 5)])
    with pytest.raises(UserError, match="none of its 1 detections"):
        read_hard_negatives(str(detections), read_coco(truth), 0.5)
