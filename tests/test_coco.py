from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poserelay.datasets.coco import check_images_exist, read_coco, read_detections
from poserelay.errors import UserError

FILE: dict[str, Any] = {
    "categories": [
        {"id": 3, "name": "chair"},
        {"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"], "skeleton": []},
    ],
    "images": [
        {"id": 7, "file_name": "a.jpg", "height": 60, "width": 80},
        {"id": 5, "file_name": "sub/b.jpg", "height": 100, "width": 50},
    ],
    "annotations": [
        {"id": 11, "image_id": 5, "category_id": 1, "bbox": [1, 2, 30, 40.5], "area": 600, "iscrowd": 0,
         "keypoints": [4, 5, 2, 99, 99, 0, 6.5, 7, 1]},
        {"id": 12, "image_id": 7, "category_id": 3, "bbox": [0, 0, 0, 0]},
        {"id": 13, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10], "keypoints": [0] * 9},
        {"id": 14, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 1, "keypoints": [1, 1, 2] * 3},
        {"id": 15, "image_id": 7, "category_id": 1, "bbox": [2, 2, 10, 20], "keypoints": [3, 3, 2] * 3},
        {"id": 16, "image_id": 7, "category_id": 1, "bbox": [2, 2, 10, 20]},
    ],
}  # fmt: skip


def write(folder: Path, data: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_reads_the_keypoint_category(tmp_path: Path) -> None:
    found = read_coco(write(tmp_path, FILE))
    assert found.joints == ("nose", "left_eye", "right_eye")
    assert found.image_ids == [7, 5]
    assert found.file_names == ["a.jpg", "sub/b.jpg"]
    np.testing.assert_array_equal(found.image_sizes, [[60, 80], [100, 50]])
    np.testing.assert_array_equal(found.ids, [11, 13, 14, 15, 16])
    np.testing.assert_array_equal(found.image_index, [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.boxes[0], [1, 2, 30, 40.5])
    # Unlabelled joints carry no coordinates, an absent area is CrowdPose's share of the box.
    np.testing.assert_array_equal(found.keypoints[0], [[4, 5], [0, 0], [6.5, 7]])
    np.testing.assert_array_equal(found.visibility[0], [2, 0, 1])
    np.testing.assert_allclose(found.areas, [600, 53, 53, 106, 106])
    np.testing.assert_array_equal(found.persons, [0, 3])
    assert found.labelled_image_ids == [7, 5]


def test_no_annotations(tmp_path: Path) -> None:
    found = read_coco(write(tmp_path, FILE | {"annotations": []}))
    assert found.keypoints.shape == (0, 3, 2)
    assert len(found.persons) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("\x00\x01", "not a JSON file"),
        ("[]", "not a COCO annotation file: a JSON list"),
        ("{}", "no list images and no list annotations and no list categories"),
        ('{"images": [], "annotations": {}, "categories": []}', "no list annotations$"),
    ],
)
def test_not_coco(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_coco(write(tmp_path, text))
    assert "annotations.json" in str(caught.value)


def test_absent_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: cannot be read .No such file"):
        read_coco(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match=r"binary\.json: not a JSON file"):
        read_coco(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("annotations", 0, "keypoints"), [1, 2, 2], "annotation 11: field keypoints: has 3 numbers, expected 9"),
        (("annotations", 0, "keypoints"), "1,2", "annotation 11: field keypoints: .* is not a list"),
        (("annotations", 0, "keypoints", 0), float("nan"), "annotation 11: field keypoints: .*NaN"),
        (("annotations", 4, "keypoints", 4), float("inf"), "annotation 15: field keypoints: .*infinity"),
        (("annotations", 4, "keypoints", 0), None, "annotation 15: field keypoints: .* is not numeric"),
        (("annotations", 4, "keypoints", 0), "12", "annotation 15: field keypoints: .* is not numeric"),
        (("annotations", 4, "keypoints", 2), 3, "annotation 15: field keypoints: .*visibility that is not 0, 1 or 2"),
        (("annotations", 4, "keypoints", 2), 0.5, "annotation 15: field keypoints: .*visibility that is not 0, 1 or 2"),
        (("annotations", 4, "bbox", 2), 0, "annotation 15: field bbox: .*has no area"),
        (("annotations", 4, "bbox", 3), -4, "annotation 15: field bbox: .*has no area"),
        (("annotations", 4, "bbox", 0), float("nan"), "annotation 15: field bbox: .*NaN"),
        (("annotations", 4, "bbox", 0), 80, "annotation 15: field bbox: .*outside its image"),
        (("annotations", 4, "bbox"), [1, 2, 3], "annotation 15: field bbox: has 3 numbers, expected 4"),
        (("annotations", 4, "area"), -1, "annotation 15: field area"),
        (("annotations", 4, "image_id"), 6, "annotation 15: field image_id: 6 is not among the images"),
        (("annotations", 4, "image_id"), [5], "annotation 15: field image_id: .* is not an integer"),
        (("annotations", 4, "id"), 11, "annotation 11: field id: 11 appears twice"),
        (("annotations", 4), 8, "an entry of the annotations is a JSON value"),
        (("images", 1, "id"), 7, "image 7: field id: 7 appears twice"),
        (("images", 1, "id"), "7", "image 7: field id: \"7\" is not an integer"),
        (("images", 1, "width"), 0, "image 5: field width: 0 is not a positive number"),
        (("images", 1, "file_name"), "", "image 5: field file_name"),
        (("categories", 0, "keypoints"), ["seat"], "2 categories with keypoints .'chair', 'person'."),
        (("categories", 1, "keypoints"), [], "0 categories with keypoints .none., expected exactly one"),
        (("categories", 1, "keypoints"), [1, 2, 3], "field keypoints: expected a list of joint names"),
    ],
)  # fmt: skip
def test_bad_records_are_named(tmp_path: Path, where: tuple, value: Any, message: str) -> None:
    data = copy.deepcopy(FILE)
    place: Any = data
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(UserError, match=message) as caught:
        read_coco(write(tmp_path, data))
    assert str(caught.value).startswith(str(tmp_path / "annotations.json"))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("images", 1, "height"), "image 5: field height is missing"),
        (("images", 1, "id"), "image number 2 of its list: field id is missing"),
        (("annotations", 4, "bbox"), "annotation 15: field bbox is missing"),
        (("annotations", 4, "category_id"), "annotation 15: field category_id is missing"),
    ],
)
def test_missing_fields_are_named(tmp_path: Path, where: tuple, message: str) -> None:
    data = copy.deepcopy(FILE)
    del data[where[0]][where[1]][where[2]]
    with pytest.raises(UserError, match=message):
        read_coco(write(tmp_path, data))


def test_unlabelled_person_may_have_an_empty_box(tmp_path: Path) -> None:
    data = copy.deepcopy(FILE)
    data["annotations"][2]["bbox"] = [0, 0, 0, 0]
    assert len(read_coco(write(tmp_path, data)).persons) == 2


def test_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = read_coco(write(tmp_path, FILE))
    good = {"image_id": 5, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9}
    path = tmp_path / "boxes.json"
    other = [good | {"score": 0.1, "bbox": [0, 0, 0, 0]}, good | {"image_id": 99}, good | {"category_id": 3}]
    path.write_text(json.dumps([*other, good, good | {"image_id": 7, "bbox": [5, 6, 7, 8]}]))
    found = read_detections(path, annotations, score_threshold=0.5)
    np.testing.assert_array_equal(found.image_index, [1, 0])
    np.testing.assert_array_equal(found.boxes, [[1, 2, 3, 4], [5, 6, 7, 8]])
    np.testing.assert_array_equal(found.scores, [0.9, 0.9])
    assert found.skipped == 3
    assert "1 of its 5 detections are on images that" in capsys.readouterr().err

    def refuse(data: Any, message: str) -> None:
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match=message):
            read_detections(path, annotations)

    refuse(FILE, "not a detection file: a JSON object")
    refuse([good, {"image_id": 5, "bbox": [1, 2, 3, 4], "score": 1}], "detection number 2 .*category_id is missing")
    refuse([good | {"score": float("nan")}], "field score: NaN is not a finite number")
    refuse([good | {"bbox": [1, 2, 0, 4]}], "field bbox: .*has no area")
    refuse([*other[1:], good, good | {"bbox": [1, 2, 0, 4]}], "detection number 4 of its list: field bbox: .*no area")
    refuse([good | {"bbox": [1, 2, 3]}], "field bbox: has 3 numbers")
    refuse([good | {"image_id": 99}], "none of its 1 detections")
    refuse([], "an empty list")
    path.write_text(json.dumps([good, good | {"image_id": 99, "score": 2}]))
    with pytest.raises(UserError, match=r"none of its 1 detections .* at least 1, the best 0\.9; lower"):
        read_detections(path, annotations, score_threshold=1)


def test_missing_pictures_are_counted(tmp_path: Path) -> None:
    names = ["a.jpg", "sub/b.jpg"]
    with pytest.raises(UserError, match=r"sub: cannot list this image folder"):
        check_images_exist(names, tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jpg").touch()
    check_images_exist(["a.jpg"], tmp_path)
    with pytest.raises(UserError, match=r"sub.b\.jpg: no such picture \(1 of 2 are missing\)"):
        check_images_exist(names, tmp_path)
    (tmp_path / "sub" / "b.jpg").touch()
    check_images_exist(names, tmp_path)


DATA = os.environ.get("POSERELAY_DATA")


@pytest.mark.skipif(not DATA, reason="POSERELAY_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("name", "images", "annotations", "joints"),
    [
        ("lspet/val.json", 500, 500, 14),
        ("coco/annotations.json", 161, 556, 17),
        ("mirror_mouse/annotations.json", 90, 90, 17),
        ("crowdpose/crowdpose_val.json", 2000, 8527, 14),
        ("eval_examples/example_crowdpose_val.json", 4, 10, 14),
    ],
)
def test_real_files_agree_with_pycocotools(
    name: str, images: int, annotations: int, joints: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from pycocotools.coco import COCO

    path = Path(str(DATA), name)
    found, peer = read_coco(path), COCO(path)
    assert (len(found.image_ids), *found.visibility.shape) == (images, annotations, joints)
    for row in range(0, len(found.ids), 37):
        record = peer.anns[int(found.ids[row])]
        triples = np.reshape(record["keypoints"], (-1, 3))
        np.testing.assert_array_equal(found.visibility[row], triples[:, 2])
        np.testing.assert_array_equal(found.keypoints[row][triples[:, 2] > 0], triples[triples[:, 2] > 0, :2])
        np.testing.assert_array_equal(found.boxes[row], record["bbox"])
        assert found.image_ids[found.image_index[row]] == record["image_id"]
    # num_keypoints is not used: CrowdPose's leaves labelled persons at 0.
    expected = [r["id"] for r in peer.anns.values() if any(r["keypoints"][2::3]) and not r["iscrowd"]]
    assert sorted(found.ids[found.persons].tolist()) == sorted(expected)


def test_joints_of_one_name_are_refused(tmp_path: Path) -> None:
    data = copy.deepcopy(FILE)
    keypoints = next(category for category in data["categories"] if category.get("keypoints"))["keypoints"]
    keypoints[1] = keypoints[0].upper().replace("_", "-")
    with pytest.raises(UserError, match="are one name"):
        read_coco(write(tmp_path, data))
