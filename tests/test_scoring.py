from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poserelay.datasets.coco import CocoAnnotations, read_coco
from poserelay.errors import UserError
from poserelay.keypoints import Skeleton, resolve_skeleton
from poserelay.scoring import (
    box_reference,
    check_results,
    coco_ap,
    match_poses,
    match_results,
    mean_pose,
    pck,
    pck_of_persons,
    place_pose,
    read_results,
    torso_reference,
)

SIGMAS = (0.1, 0.05, 0.2)
ANIMAL = Skeleton(name="animal", joints=("nose", "paw", "tail"), sigmas=SIGMAS)


def person(number: int, image: int, keypoints: list[float], **fields: Any) -> dict[str, Any]:
    box = [0.0, 0.0, 100.0, 100.0]
    return {
        "id": number,
        "image_id": image,
        "category_id": 7,
        "keypoints": keypoints,
        "bbox": box,
        "area": 10000.0,
        "iscrowd": 0,
        **fields,
    }


def coco_file(*persons: dict[str, Any], images: int = 3) -> dict[str, Any]:
    return {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "width": 100, "height": 100} for number in range(images)
        ],
        "categories": [{"id": 7, "name": "animal", "keypoints": ["nose", "paw", "tail"], "skeleton": []}],
        "annotations": list(persons),
    }


def pose(image: int, keypoints: list[float], score: float = 1.0, **fields: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": 7, "keypoints": keypoints, "score": score, **fields}


THREE = [10.0, 10.0, 2, 50.0, 20.0, 2, 30.0, 80.0, 1]


def displaced(similarity: float) -> list[float]:
    """THREE with every joint moved so that each one's OKS term, so the OKS, is `similarity` at area 10000."""
    moved = list(THREE)
    for joint, sigma in enumerate(SIGMAS):
        moved[3 * joint] += math.sqrt(-2 * math.log(similarity) * 10000) * 2 * sigma
    return moved


def test_ap_of_one_person_is_the_share_of_thresholds_its_oks_reaches() -> None:
    metrics = coco_ap(coco_file(person(1, 0, THREE)), [pose(0, displaced(0.72))], ANIMAL)
    assert metrics["AP"] == pytest.approx(0.5)  # 0.50, 0.55, 0.60, 0.65, 0.70 of ten
    assert metrics["AP50"] == pytest.approx(1.0)
    assert metrics["AP75"] == 0.0
    assert metrics["APl"] == pytest.approx(0.5)
    assert metrics["APm"] == -1  # nobody of medium size


def test_unlabelled_joints_do_not_enter() -> None:
    truth = [*THREE[:6], 0.0, 0.0, 0]
    predicted = [*THREE[:6], 999.0, -999.0, 1]
    assert coco_ap(coco_file(person(1, 0, truth)), [pose(0, predicted)], ANIMAL)["AP"] == pytest.approx(1.0)


def test_false_positive_above_the_truth_halves_precision() -> None:
    results = [pose(0, displaced(0.01), score=0.9), pose(0, THREE, score=0.5)]
    assert coco_ap(coco_file(person(1, 0, THREE)), results, ANIMAL)["AP"] == pytest.approx(0.5)


def test_annotation_id_zero_counts() -> None:
    """pycocotools marks a match by the annotation's id and would take a match with id 0 for none."""
    persons = [person(0, 0, THREE), person(1, 1, THREE)]
    assert coco_ap(coco_file(*persons), [pose(0, THREE), pose(1, THREE)], ANIMAL)["AP"] == pytest.approx(1.0)


def test_crowd_and_unlabelled_persons_are_ignored_not_missed() -> None:
    persons = [person(1, 0, THREE), person(2, 0, [0.0] * 9), person(3, 1, THREE, iscrowd=1)]
    # The second and third predictions fall on the ignored persons.
    results = [pose(0, THREE), pose(0, displaced(0.01), 0.5), pose(1, THREE)]
    assert coco_ap(coco_file(*persons), results, ANIMAL)["AP"] == pytest.approx(1.0)


def test_num_keypoints_of_the_file_decides_who_is_ignored() -> None:
    persons = [person(1, 0, THREE), person(2, 1, THREE, num_keypoints=0)]
    assert coco_ap(coco_file(*persons), [pose(0, THREE)], ANIMAL)["AP"] == pytest.approx(1.0)


def test_area_falls_back_to_a_share_of_the_box() -> None:
    bare = person(1, 0, THREE)
    del bare["area"]
    explicit = person(1, 0, THREE, area=0.53 * 100 * 100)
    results = [pose(0, displaced(0.8))]
    assert coco_ap(coco_file(bare), results, ANIMAL) == coco_ap(coco_file(explicit), results, ANIMAL)


def test_empty_results_score_zero_and_inputs_stay_as_they_were() -> None:
    truth, results = coco_file(person(1, 0, THREE)), [pose(0, THREE, bbox=[0, 0, 9, 9]), pose(0, THREE)]
    before = copy.deepcopy((truth, results))
    assert coco_ap(truth, [], ANIMAL)["AP"] == 0.0
    coco_ap(truth, results, ANIMAL)
    assert (truth, results) == before


def test_nothing_labelled_is_an_error() -> None:
    with pytest.raises(UserError, match="no person with labelled joints"):
        coco_ap(coco_file(person(1, 0, [0.0] * 9)), [], ANIMAL)


def test_a_joint_without_a_sigma_is_named() -> None:
    with pytest.raises(UserError, match="skeleton 'partial' lacks paw, tail of the annotation file"):
        coco_ap(coco_file(person(1, 0, THREE)), [], Skeleton(name="partial", joints=("nose",)))


@settings(max_examples=20)
@given(st.permutations(range(3)), st.floats(-500, 500), st.integers(0, 2**32 - 1))
def test_ap_is_invariant_to_joint_order_translation_and_record_order(order: list[int], shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0, 100, (4, 3, 3))
    truth[..., 2] = rng.integers(1, 3, (4, 3))
    noisy = truth + rng.normal(0, 6, truth.shape) * [1, 1, 0]

    def score(offset: float, joints: list[int], records: list[int]) -> dict[str, float]:
        move = np.array([offset, offset, 0])
        persons = [person(n, n % 3, (truth[n, joints] + move).ravel().tolist()) for n in range(4)]
        results = [pose(n % 3, (noisy[n, joints] + move).ravel().tolist(), 0.5 + n / 10) for n in records]
        file = coco_file(*persons)
        file["categories"][0]["keypoints"] = [ANIMAL.joints[joint] for joint in joints]
        return coco_ap(file, results, ANIMAL)

    assert score(shift, order, [2, 0, 3, 1]) == pytest.approx(score(0.0, [0, 1, 2], [0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("text", "record 1: expected an object, found str"),
        ({"image_id": 0, "score": 1.0}, "record 1: has no category_id, keypoints"),
        (pose(99, THREE), "record 1: image_id 99 is not in the annotation file"),
        (pose([0], THREE), r"record 1: image_id \[0\]"),
        (pose(0, THREE, category_id=1), "record 1: category_id is 1, the annotations' category is 7"),
        (pose(0, THREE[:6]), "record 1: keypoints has 6 numbers, expected a list of 9"),
        (pose(0, [math.nan, *THREE[1:]]), "record 1: keypoints holds nan"),
        (pose(0, ["1", *THREE[1:]]), "record 1: keypoints holds '1'"),
        (pose(0, THREE, score=math.inf), "record 1: score is inf"),
        (pose(0, THREE, bbox=[1, 2, 3]), "record 1: bbox has 3 numbers, expected a list of 4"),
    ],
)
def test_malformed_records_are_named(broken: Any, message: str) -> None:
    with pytest.raises(UserError, match="^mine.json: " + message):
        check_results([pose(0, THREE), broken], [0, 1], 7, 3, "mine.json")


def test_read_results(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with pytest.raises(UserError, match=r"results\.json: No such file"):
        read_results(file)
    file.write_text("{oh")
    with pytest.raises(UserError, match="not JSON"):
        read_results(file)
    file.write_text('{"annotations": []}')
    with pytest.raises(UserError, match="expected a list of results, found dict"):
        read_results(file)
    file.write_text("[]")
    assert read_results(file) == []


@pytest.mark.parametrize(
    ("truth", "predictions", "expected"),
    [
        (
            "example_coco_val",
            "example_coco_preds",
            {"AP": 0.8609, "AP50": 0.9931, "AP75": 0.9109, "APm": 0.7756, "APl": 0.9373, "AR": 0.875},
        ),
        (
            "faster_coco_eval_keypoints_gt_dataset",
            "faster_coco_eval_keypoints_dt_dataset",
            {"AP": 0.5049, "AP50": 0.7228, "AP75": 0.6337},
        ),
        (
            "example_crowdpose_val",
            "example_crowdpose_preds",
            {"AP": 0.7877, "AP50": 0.9881, "AP75": 0.7314, "AR": 0.8222, "AR50": 1.0, "AR75": 0.7778},
        ),
    ],
)
def test_published_examples_to_the_last_digit(truth: str, predictions: str, expected: dict[str, float]) -> None:
    if "POSERELAY_DATA" not in os.environ:
        pytest.skip("POSERELAY_DATA does not name the folder of real data (eval_examples)")
    folder = Path(os.environ["POSERELAY_DATA"]) / "eval_examples"
    parsed = json.loads((folder / f"{truth}.json").read_text())
    skeleton = resolve_skeleton("auto", parsed["categories"][0])
    metrics = coco_ap(folder / f"{truth}.json", read_results(folder / f"{predictions}.json"), skeleton)
    assert {name: round(metrics[name], 4) for name in expected} == expected


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1.0))
def test_pck_equals_a_naive_loop(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0, 50, (6, 4, 2))
    predicted = truth + rng.normal(0, 8, truth.shape)
    predicted[0, 0] = np.nan
    visibility = rng.integers(0, 3, (6, 4))
    reference = rng.uniform(10, 40, 6)
    reference[1], reference[2] = np.nan, 0.0
    hits, total, persons = [0] * 4, [0] * 4, set()
    for n in range(6):
        for k in range(4):
            if visibility[n, k] > 0 and reference[n] > 0:
                persons.add(n)
                total[k] += 1
                hits[k] += math.dist(predicted[n, k], truth[n, k]) <= threshold * reference[n]
    found = pck(predicted, truth, visibility, reference, threshold)
    assert found["persons"] == len(persons)
    np.testing.assert_allclose(found["PCK"], sum(hits) / sum(total) if sum(total) else math.nan)
    np.testing.assert_allclose(found["per_joint"], [h / t if t else math.nan for h, t in zip(hits, total, strict=True)])


def test_pck_of_a_hand_made_case() -> None:
    truth = np.array([[[0.0, 0.0], [10.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    predicted = np.array([[[0.0, 2.0], [13.0, 0.0]], [[99.0, 0.0], [2.0, 0.0]]])
    found = pck(predicted, truth, np.array([[2, 1], [0, 2]]), np.array([10.0, 10.0]), threshold=0.2)
    assert found["PCK"] == pytest.approx(2 / 3)  # on the threshold counts as within
    assert found["per_joint"].tolist() == [1.0, 0.5]


def test_references() -> None:
    keypoints = np.array([[[0.0, 0.0], [3.0, 4.0]], [[0.0, 0.0], [3.0, 4.0]]])
    lengths = torso_reference(keypoints, np.array([[2, 1], [2, 0]]), (0, 1))
    assert lengths[0] == 5.0
    assert np.isnan(lengths[1])
    assert box_reference(np.array([[1.0, 2.0, 30.0, 40.0], [0.0, 0.0, 9.0, 2.0]])).tolist() == [40.0, 9.0]


def test_closest_pairs_are_matched_first_and_only_once() -> None:
    truth = np.zeros((3, 2, 2)) + np.array([0.0, 10.0, 200.0])[:, None, None]
    predicted = np.zeros((2, 2, 2)) + np.array([9.0, 6.0])[:, None, None]
    visibility = np.full((3, 2), 2)
    # Person 1 takes pose 0 (1 px away), so that person 0 gets pose 1; person 2 is left without.
    assert match_poses(predicted, truth, visibility).tolist() == [1, 0, -1]
    assert match_poses(predicted[:0], truth, visibility).tolist() == [-1, -1, -1]
    assert match_poses(predicted, truth, np.zeros((3, 2))).tolist() == [-1, -1, -1]


def test_mean_pose_follows_the_box() -> None:
    boxes = np.array([[0.0, 0.0, 10.0, 20.0], [100.0, 100.0, 20.0, 10.0]])
    keypoints = np.array([[[5.0, 0.0], [10.0, 20.0], [1.0, 1.0]], [[105.0, 105.0], [0.0, 0.0], [1.0, 1.0]]])
    visibility = np.array([[2, 1, 0], [2, 0, 0]])
    mean = mean_pose(keypoints, visibility, boxes)
    np.testing.assert_allclose(mean, [[0.375, 0.25], [1.0, 1.0], [0.5, 0.5]])
    np.testing.assert_allclose(place_pose(mean, boxes)[1], [[107.5, 102.5], [120.0, 110.0], [110.0, 105.0]])


def read(tmp_path: Path, *persons: dict[str, Any]) -> CocoAnnotations:
    file = tmp_path / "val.json"
    file.write_text(json.dumps(coco_file(*persons)))
    return read_coco(file)


def test_results_are_matched_within_their_image(tmp_path: Path) -> None:
    persons = [person(1, 0, THREE), person(2, 1, [0.0] * 9), person(3, 2, THREE), person(4, 1, THREE)]
    truth = read(tmp_path, *persons)
    near = [value + 1 for value in THREE]
    matched = match_results(truth, [pose(1, displaced(0.5)), pose(0, near), pose(1, THREE)])
    assert truth.ids[truth.persons].tolist() == [1, 3, 4]
    np.testing.assert_allclose(matched[0], np.reshape(near, (3, 3))[:, :2])
    assert np.isnan(matched[1]).all()
    np.testing.assert_allclose(matched[2], np.reshape(THREE, (3, 3))[:, :2])
    assert np.isnan(match_results(truth, [])).all()


def test_pck_of_persons_measures_by_the_torso_or_else_the_box(tmp_path: Path) -> None:
    truth = read(tmp_path, person(1, 0, THREE), person(2, 1, [*THREE[:3], 0.0, 0.0, 0, *THREE[6:]]))
    predicted = truth.keypoints + np.array([0.0, 12.0])
    by_box, details = pck_of_persons(truth, predicted, ANIMAL, 0.2)  # within 20 of the 100 px boxes
    assert by_box["PCK"] == 1.0
    assert details == {"pck_threshold": 0.2, "pck_reference": "longer side of the box", "pck_instances": 2}
    with_torso = Skeleton(name="animal", joints=ANIMAL.joints, torso=("nose", "paw"))
    by_torso, details = pck_of_persons(truth, predicted, with_torso, 0.2)  # within 8.2 of the 41 px torso
    assert by_torso == {"PCK": 0.0, "PCK/nose": 0.0, "PCK/paw": 0.0, "PCK/tail": 0.0}
    assert details == {"pck_threshold": 0.2, "pck_reference": "nose to paw", "pck_instances": 1}
