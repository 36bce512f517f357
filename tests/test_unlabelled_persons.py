"""Unlabelled crops against the labelled crops of the same persons, whose pixels they must share and nothing else."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from poserelay.config import Augmentation, LabelsConfig
from poserelay.datasets.coco import CocoAnnotations, read_coco
from poserelay.datasets.sampling import draw_generator
from poserelay.datasets.topdown import TopDownDataset
from poserelay.datasets.unlabelled_persons import read_images, unlabelled_persons, with_pseudo_labels
from poserelay.errors import UserError
from poserelay.geometry import apply_affine
from poserelay.keypoints import Skeleton, load_skeleton
from poserelay.subsets import choose_labelled

SKELETON = Skeleton("toy", ("nose", "left_hand", "right_hand"), flip_pairs=(("left_hand", "right_hand"),))
SIZE = (64, 48)
DRAWN = Augmentation(rotation=30, scale=0.2)
JOINTS = [20, 30, 2, 40, 35, 1, 30, 50, 2]
BOX = [10, 12, 50, 60]


def record(id_: int, image: int, **changes: Any) -> dict[str, Any]:
    return {"id": id_, "image_id": image, "category_id": 1, "bbox": BOX, "keypoints": JOINTS, **changes}


RECORDS = [
    record(1, 7),
    record(2, 8, bbox=[-5, -5, 40, 200]),
    record(3, 7, bbox=[1, 2, 30, 40]),
    record(4, 9, iscrowd=1),
    record(5, 9, keypoints=[0] * 9),
    record(6, 9, bbox=[20, 20, 30, 30]),
]
BOXES_ALONE = [
    record(1, 7, keypoints=[0] * 9),
    record(2, 7, keypoints=[0] * 9, iscrowd=1),
    record(3, 8, keypoints=[0] * 9, bbox=[3, 3, 0, 10]),
    record(4, 8, keypoints=[0] * 9, bbox=[500, 3, 10, 10]),
    record(5, 9, keypoints=[0] * 9, bbox=[30, 40, 20, 10]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of noise."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for name in (7, 8, 9):
        noise = np.random.default_rng(name).integers(0, 255, (100, 90, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{name}.png"), noise)
    return folder


def write(path: Path, records: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    images = [{"id": id_, "file_name": f"{id_}.png", "height": 100, "width": 90} for id_ in (7, 8, 9)]
    categories = [{"id": 1, "name": "person", "keypoints": list(SKELETON.joints)}]
    data = {"images": images, "annotations": records or [], "categories": categories, **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return path


@pytest.fixture(name="annotations")
def _annotations(tmp_path: Path) -> CocoAnnotations:
    return read_coco(write(tmp_path / "toy.json", RECORDS))


def detections(path: Path, *found: tuple[int, float, Any]) -> str:
    records = [{"image_id": i, "category_id": 1, "score": score, "bbox": box} for i, score, box in found]
    path.write_text(json.dumps(records))
    return str(path)


def test_crops_are_those_of_the_persons_without_their_labels(folder: Path, annotations: CocoAnnotations) -> None:
    unlabelled = unlabelled_persons(
        annotations, folder, SKELETON, SIZE, augmentation=DRAWN, labelled_rows=np.array([0, 2])
    )
    labelled = TopDownDataset(annotations, folder, SKELETON, SIZE, augmentation=DRAWN, rows=np.array([1, 5]))
    assert len(unlabelled) == 2  # neither the crowd nor the person without a joint
    for index in range(2):
        generator = partial(draw_generator, 0, 3, index)
        one, other = unlabelled.sample(index, generator), labelled.sample(index, generator)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.affine, other.affine)
        np.testing.assert_array_equal(one.box, other.box)
        assert one.image_id == other.image_id
        assert other.visibility.any()
        assert not one.visibility.any()
        assert not one.keypoints.any()
        assert one.annotation_id is None
    everyone = unlabelled_persons(annotations, folder, SKELETON, SIZE, augmentation=None)
    assert everyone.boxes.tolist() == TopDownDataset(annotations, folder, SKELETON, SIZE).boxes.tolist()


def test_no_half_body_without_labels(folder: Path, annotations: CocoAnnotations) -> None:
    half = Augmentation(rotation=0, scale=0, flip_probability=0, half_body_probability=1, half_body_min_joints=0)
    whole = Augmentation(rotation=0, scale=0, flip_probability=0)
    labelled = TopDownDataset(annotations, folder, SKELETON, SIZE, augmentation=half)
    unlabelled = unlabelled_persons(annotations, folder, SKELETON, SIZE, augmentation=half)
    pseudo = with_pseudo_labels(unlabelled, labelled.keypoints, labelled.visibility / 2, 0.0)
    assert pseudo.visibility.sum() == 2 * 3 * len(pseudo)
    generator = partial(draw_generator, 0, 0, 0)
    expected = TopDownDataset(annotations, folder, SKELETON, SIZE, augmentation=whole).sample(0, generator).affine
    assert not np.allclose(labelled.sample(0, generator).affine, expected)
    np.testing.assert_array_equal(unlabelled.sample(0, generator).affine, expected)
    np.testing.assert_array_equal(pseudo.sample(0, generator).affine, expected)


@pytest.mark.parametrize("by", ["images", "persons"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_every_person_is_either_labelled_or_not(people: Path, by: Any, ratio: float) -> None:
    annotations = read_coco(people / "annotations.json")
    skeleton = load_skeleton("coco17")
    rows = choose_labelled(annotations, LabelsConfig(ratio=ratio, by=by)).rows
    labelled = TopDownDataset(annotations, people / "images", skeleton, SIZE, rows=rows)
    unlabelled = unlabelled_persons(
        annotations, people / "images", skeleton, SIZE, augmentation=None, labelled_rows=rows
    )
    both = [(i, *box) for part in (labelled, unlabelled) for i, box in zip(part.image_index, part.boxes, strict=True)]
    everyone = TopDownDataset(annotations, people / "images", skeleton, SIZE)
    assert sorted(both) == sorted((i, *box) for i, box in zip(everyone.image_index, everyone.boxes, strict=True))


def test_detections_on_images_without_a_labelled_person(
    folder: Path, annotations: CocoAnnotations, tmp_path: Path
) -> None:
    found = [(8, 0.9, [-5, -5, 40, 200]), (7, 0.9, [1, 2, 3, 4]), (9, 0.5, [2, 3, 4, 5]), (9, 0.4, BOX)]
    boxes = detections(tmp_path / "boxes.json", *found)
    load = partial(unlabelled_persons, annotations, folder, SKELETON, SIZE, augmentation=None, boxes=boxes)
    some = load(box_threshold=0.5, labelled_rows=np.array([0]))
    np.testing.assert_array_equal(some.boxes, [[-5, -5, 40, 200], [2, 3, 4, 5]])  # not clipped
    assert [some[index].image_id for index in range(2)] == [8, 9]
    assert some.scores.tolist() == [0.9, 0.5]
    assert not some.visibility.any()
    assert len(load()) == 4
    with pytest.raises(UserError, match=r"boxes\.json: all its 2 detections are on images with labelled persons"):
        load(box_threshold=0.9, labelled_rows=np.array([0, 1]))


def test_a_file_of_boxes_alone(folder: Path, tmp_path: Path) -> None:
    annotations = read_coco(write(tmp_path / "boxes.json", BOXES_ALONE))
    unlabelled = unlabelled_persons(annotations, folder, SKELETON, SIZE, augmentation=DRAWN)
    np.testing.assert_array_equal(unlabelled.boxes, [[10, 12, 49, 59], [30, 40, 19, 9]])  # HRNet's clip takes a pixel
    assert [unlabelled[index].image_id for index in range(2)] == [7, 9]


def test_nobody_is_left(folder: Path, annotations: CocoAnnotations, tmp_path: Path) -> None:
    load = partial(unlabelled_persons, image_dir=folder, skeleton=SKELETON, size=SIZE, augmentation=None)
    with pytest.raises(UserError) as caught:
        load(annotations, labelled_rows=annotations.persons)
    assert "toy.json: all its 4 persons with labelled joints are labelled ones, nobody is left" in str(caught.value)
    assert "labels.ratio" in str(caught.value)
    assert "unlabelled.keep_labelled" in str(caught.value)
    assert "boxes without a labelled joint alone: there are 1" in str(caught.value)
    alone = read_coco(write(tmp_path / "alone.json", BOXES_ALONE[1:4]))
    with pytest.raises(UserError, match=r"alone\.json: no person with a box .* give a detections JSON"):
        load(alone)


def test_lists_of_images(folder: Path, tmp_path: Path) -> None:
    """unlabeled2017 names 80 categories without joints, and no annotations."""
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}]
    listed = write(tmp_path / "list.json", categories=categories)
    for path in (
        listed,
        write(tmp_path / "bare.json", categories=None, annotations=None),
        write(tmp_path / "instances.json", [{"id": 1, "image_id": 7, "category_id": 2}], categories=categories),
        write(tmp_path / "joints.json", annotations=None),
    ):
        images = read_images(path, SKELETON)
        empty = read_coco(write(tmp_path / "empty.json"))
        assert (images.image_ids, images.file_names) == (empty.image_ids, empty.file_names)
        np.testing.assert_array_equal(images.image_sizes, empty.image_sizes)
        assert images.joints == SKELETON.joints
        for field in ("ids", "image_index", "boxes", "keypoints", "visibility", "iscrowd", "areas"):
            assert getattr(images, field).shape == getattr(empty, field).shape
            assert getattr(images, field).dtype == getattr(empty, field).dtype
    boxes = detections(tmp_path / "boxes.json", (9, 0.5, BOX), (7, 0.4, BOX), (4, 0.9, BOX))
    images = read_images(listed, SKELETON)
    unlabelled = unlabelled_persons(images, folder, SKELETON, SIZE, augmentation=DRAWN, boxes=boxes)
    assert [unlabelled[index].image_id for index in range(len(unlabelled))] == [9, 7]
    with pytest.raises(UserError, match=r"list\.json: no person with a box"):
        unlabelled_persons(images, folder, SKELETON, SIZE, augmentation=DRAWN)
    full = write(tmp_path / "full.json", RECORDS)
    np.testing.assert_array_equal(read_images(full, SKELETON).visibility, read_coco(full).visibility)
    for text in ("[]", "{}", '{"images": []}'):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(UserError, match=r"wrong\.json: not a COCO file"):
            read_images(tmp_path / "wrong.json", SKELETON)


def test_pseudo_labels_follow_the_crop(folder: Path, annotations: CocoAnnotations) -> None:
    unlabelled = unlabelled_persons(annotations, folder, SKELETON, SIZE, augmentation=DRAWN)
    generator = np.random.default_rng(0)
    keypoints, confidence = generator.uniform(0, 90, (4, 3, 2)), generator.uniform(0, 1, (4, 3))
    confidence[0] = [0.6, 0.5, 0.7]
    pseudo = with_pseudo_labels(unlabelled, keypoints, confidence, 0.5)
    np.testing.assert_array_equal(pseudo.visibility[0], [2, 0, 2])
    mirrored = []
    for epoch in range(12):
        crop = pseudo.sample(0, partial(draw_generator, 0, epoch, 0))
        mirrored.append(np.linalg.det(crop.affine[:, :2]) < 0)
        order = [0, 2, 1] if mirrored[-1] else [0, 1, 2]
        np.testing.assert_array_equal(crop.visibility, np.array([2, 0, 2])[order])
        expected = apply_affine(crop.affine, keypoints[0])[order]
        np.testing.assert_array_equal(crop.keypoints[crop.visibility > 0], expected[crop.visibility > 0])
        assert not crop.keypoints[crop.visibility == 0].any()
    assert set(mirrored) == {False, True}
    assert not unlabelled.visibility.any()  # the original is as it was
    assert not unlabelled[0].keypoints.any()
    with pytest.raises(ValueError, match="do not fit 4 persons of 3 joints"):
        with_pseudo_labels(unlabelled, keypoints[:1], confidence[:1], 0.5)


DATA = os.environ.get("POSERELAY_DATA")


@pytest.mark.skipif(not DATA, reason="POSERELAY_DATA names no folder of real data")
def test_the_unlabelled_persons_of_coco() -> None:
    path = Path(str(DATA), "coco/annotations.json")
    annotations = read_coco(path)
    rows = choose_labelled(annotations, LabelsConfig(ratio=0.1)).rows
    unlabelled = unlabelled_persons(
        annotations, path.parent / "images", load_skeleton("coco17"), (256, 192), augmentation=DRAWN, labelled_rows=rows
    )
    assert len(unlabelled) == len(annotations.persons) - len(rows) > 300
    assert not set(unlabelled.image_index.tolist()) & set(annotations.image_index[rows].tolist())
    assert not unlabelled.sample(0, partial(draw_generator, 0, 0, 0)).visibility.any()
