from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from poserelay.datasets.coco import CocoAnnotations, read_coco
from poserelay.errors import UserError
from poserelay.keypoints import Skeleton, load_skeleton, resolve_skeleton
from poserelay.pckh import GROUPS, NAMES_IN_MAT, pckh, pckh_of_persons, read_mpii
from poserelay.scoring import (
    CROWD_LEVELS,
    box_reference,
    check_results,
    coco_ap,
    crowdpose_ap,
    match_poses,
    match_results,
    mean_pose,
    oks_metrics,
    parsed_truth,
    pck,
    pck_of_persons,
    pck_of_truth,
    place_joints,
    place_pose,
    read_results,
    results_that_count,
    scored_truth,
    take_joints,
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
    # 12 of 41.2 px are within 0.30, ..., 0.50: 20 steps of 0.01 and half of the one before, of 50.
    auc = by_torso.pop("AUC")
    assert auc == pytest.approx(20.5 / 50)
    assert by_torso == {"PCK": 0.0, "PCK/nose": 0.0, "PCK/paw": 0.0, "PCK/tail": 0.0}
    assert details == {"pck_threshold": 0.2, "pck_reference": "nose to paw", "pck_instances": 1}


def by_pycocotools(
    file: dict[str, Any], results: list[dict[str, Any]], sigmas: list[float], capsys: pytest.CaptureFixture[str]
) -> list[float]:
    """The ten figures of a file and results reduced by hand, straight from pycocotools."""
    truth: Any = COCO()
    truth.dataset = file
    truth.createIndex()
    evaluation: Any = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "keypoints")
    evaluation.params.kpt_oks_sigmas = np.array(sigmas)
    evaluation.params.maxDets = [20]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    return evaluation.stats.tolist()


def random_scene(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Twelve persons of three joints in three images, some without a label, one a crowd; two noisy poses of each."""
    rng = np.random.default_rng(seed)
    persons, results = [], []
    for n in range(12):
        triples = np.column_stack([rng.uniform(0, 100, (3, 2)), rng.integers(0, 3, 3)])
        box = [*rng.uniform(0, 20, 2).tolist(), 80.0, 80.0]
        area = float(rng.uniform(500, 12000))
        persons.append(person(n + 1, n % 3, triples.ravel().tolist(), bbox=box, area=area, iscrowd=int(n == 11)))
        for noise in (8, 20):
            moved = triples + np.column_stack([rng.normal(0, noise, (3, 2)), np.zeros(3)])
            results.append(pose(n % 3, moved.ravel().tolist(), float(rng.uniform(0.1, 1))))
    persons[0]["keypoints"] = [*THREE[:8], 2]  # so that some person has all three, each kind is there,
    persons[1]["keypoints"] = [*THREE[:6], 0.0, 0.0, 0]  # and one has no more than two
    persons[2]["keypoints"] = list(THREE)
    return persons, results


def kept(keypoints: list[float], visible: tuple[int, ...]) -> list[float]:
    """The triples whose v is among `visible`, 0, 0, 0 in place of the others."""
    triples = [keypoints[3 * joint : 3 * joint + 3] for joint in range(len(keypoints) // 3)]
    return [number for triple in triples for number in (triple if triple[2] in visible else [0.0, 0.0, 0])]


def without_poses_of(
    left_out: list[int], persons: list[dict[str, Any]], results: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """By loops: a pose is the person's that it is matched to, the closest pair first, or else the nearest person's."""

    def distance(record: dict[str, Any], found: dict[str, Any]) -> float:
        labelled = [k for k in range(3) if found["keypoints"][3 * k + 2] > 0]
        apart = [
            math.dist(found["keypoints"][3 * k : 3 * k + 2], record["keypoints"][3 * k : 3 * k + 2]) for k in labelled
        ]
        return sum(apart) / len(apart)

    seen = [found for found in persons if any(found["keypoints"][2::3]) and not found["iscrowd"]]
    pairs = [
        (distance(record, found), number, found["id"])
        for number, record in enumerate(results)
        for found in seen
        if found["image_id"] == record["image_id"]
    ]
    owner: dict[int, int] = {}
    for _, number, person_id in sorted(pairs):
        if number not in owner and person_id not in owner.values():
            owner[number] = person_id
    for _, number, person_id in sorted(pairs):
        owner.setdefault(number, person_id)
    return [record for number, record in enumerate(results) if owner.get(number) not in left_out]


def figures(truth: Any, results: list[dict[str, Any]], skeleton: Skeleton) -> list[float]:
    """The ten figures of what `truth` counts, from the whole file's results."""
    counting = results_that_count(truth, take_joints(results, truth.columns))
    return list(oks_metrics(parsed_truth(truth), counting, skeleton)[0].values())


def test_joints_that_the_skeleton_lacks_are_not_scored(tmp_path: Path) -> None:
    """The OKS is of nose and tail alone, whose sigmas stand in another order; nothing is expected at the paw."""
    bird = Skeleton(name="bird", joints=("tail", "beak", "nose"), sigmas=(0.2, 0.9, 0.1))
    only_a_paw = [0.0, 0.0, 0, 60.0, 60.0, 2, 0.0, 0.0, 0]
    file = read(tmp_path, person(1, 0, THREE), person(2, 1, only_a_paw))
    truth = scored_truth(file, bird)
    assert truth.protocol == {"joints_scored": 2, "unscored": ["paw"], "not_in_file": ["beak"]}
    assert truth.common.joints == ("nose", "tail")
    poses = [pose(0, [*displaced(0.72)[:3], 0.0, 0.0, 0.0, *displaced(0.72)[6:]], 0.5), pose(1, [50.0, 50.0, 1] * 3)]
    metrics, _ = oks_metrics(parsed_truth(truth), take_joints(poses, truth.columns), bird)
    assert metrics["AP"] == pytest.approx(0.5)  # the other person is neither missed nor its pose a false positive
    assert metrics["AR"] == pytest.approx(0.5)
    found, details = pck_of_truth(truth, np.array([[[10.0, 10.0], [30.0, 80.0]]]), bird)
    assert found == {"PCK": 1.0, "AUC": 1.0, "PCK/nose": 1.0, "PCK/tail": 1.0}
    assert details["pck_instances"] == 1


def test_results_keep_their_places_where_joints_are_not_scored() -> None:
    taken = take_joints([pose(0, [1, 2, 3, 4, 5, 6, 7, 8, 9])], [2, 0])
    assert taken[0]["keypoints"] == [7, 8, 9, 1, 2, 3]
    assert place_joints(taken, [2, 0], 4)[0]["keypoints"] == [1, 2, 3, 0, 0, 0, 7, 8, 9, 0, 0, 0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("what", ["skeleton", "visible", "invisible", "two", "two hidden"])
def test_what_counts_equals_pycocotools_on_a_file_reduced_by_hand(
    tmp_path: Path, what: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    persons, results = random_scene(seed)
    file = read(tmp_path, *persons)
    by_hand = coco_file(*copy.deepcopy(persons))
    sigmas, poses = list(SIGMAS), results
    if what == "skeleton":  # without paws
        skeleton = Skeleton("short", ("tail", "nose"), sigmas=(0.2, 0.1))
        truth = scored_truth(file, skeleton)
        by_hand["categories"][0]["keypoints"] = ["nose", "tail"]
        for record in by_hand["annotations"]:
            del record["keypoints"][3:6]
        poses, sigmas = copy.deepcopy(results), [0.1, 0.2]
        for record in poses:
            del record["keypoints"][3:6]
    else:
        skeleton = ANIMAL
        visible = {"visible": (2,), "invisible": (1,), "two": (1, 2), "two hidden": (1,)}[what]
        joints: Any = {"two": "all", "two hidden": "invisible"}.get(what, what)
        truth = scored_truth(file, ANIMAL, joints, 2 if "two" in what else None)
        left_out = []
        for record in by_hand["annotations"]:
            labelled = sum(v > 0 for v in record["keypoints"][2::3])
            record["keypoints"] = kept(record["keypoints"], visible if "two" not in what or labelled == 2 else ())
            if labelled and not record["iscrowd"] and not any(record["keypoints"]):
                left_out.append(record["id"])
        assert truth.protocol["persons_left_out"] == len(left_out) > 0
        by_hand["annotations"] = [record for record in by_hand["annotations"] if record["id"] not in left_out]
        poses = without_poses_of(left_out, persons, results)
    for record in by_hand["annotations"]:
        record["num_keypoints"] = sum(v > 0 for v in record["keypoints"][2::3])
    assert figures(truth, results, skeleton) == by_pycocotools(by_hand, poses, sigmas, capsys)
    counting = [record for record in by_hand["annotations"] if record["num_keypoints"] and not record["iscrowd"]]
    assert truth.counted.ids[truth.counted.persons].tolist() == [record["id"] for record in counting]


def test_poses_of_persons_that_are_left_out_are_no_false_positives(tmp_path: Path) -> None:
    """Any number of them and however bad; but where two lie on such a person, one is what the other person has."""
    away = [200.0, 200.0, 2, 220.0, 200.0, 2, 0.0, 0.0, 0]
    truth = scored_truth(read(tmp_path, person(1, 0, THREE), person(2, 0, away)), ANIMAL, labelled_joints=3)
    right, bad = pose(0, THREE, 0.5), pose(0, [150.0, 150.0, 1] * 3, 0.9)
    for poses, expected in (
        ([right, bad, bad, bad], 1.0),
        ([pose(0, away, 0.9), right], 1.0),
        ([right, bad, pose(0, displaced(0.3), 0.9)], 0.5),  # a second one of the person that counts
        ([right, pose(1, THREE, 0.9)], 0.5),  # where nobody is
        ([bad, bad], 0.0),
    ):
        assert figures(truth, poses, ANIMAL)[0] == pytest.approx(expected)
    assert len(results_that_count(truth, [bad, pose(0, away)])) == 1


def test_a_person_that_the_file_ignores_stays_ignored(tmp_path: Path) -> None:
    file = read(tmp_path, person(1, 0, THREE), person(2, 1, THREE, num_keypoints=0))
    assert figures(scored_truth(file, ANIMAL, "visible"), [pose(0, THREE)], ANIMAL)[0] == pytest.approx(1.0)


def test_where_everything_counts_the_file_is_scored_as_it_is(tmp_path: Path) -> None:
    """Also with a skeleton of more joints: a num_keypoints that contradicts the visibilities stays."""
    contradicting = person(2, 1, [0.0] * 9, num_keypoints=3)
    file = read(tmp_path, person(1, 0, THREE), contradicting)
    more = Skeleton(name="more", joints=("wing", *ANIMAL.joints), sigmas=(0.1, *SIGMAS))
    truth = scored_truth(file, more)
    assert truth.protocol == {"joints_scored": 3, "not_in_file": ["wing"]}
    assert truth.counted is file
    assert parsed_truth(truth) == coco_file(person(1, 0, THREE), contradicting)


def test_pck_of_hidden_joints_is_measured_by_the_whole_person(tmp_path: Path) -> None:
    """The torso's joints are visible ones, and so are left out; its length stays."""
    skeleton = Skeleton(name="animal", joints=ANIMAL.joints, sigmas=SIGMAS, torso=("nose", "paw"))
    truth = scored_truth(read(tmp_path, person(1, 0, THREE), person(2, 0, [*THREE[:8], 2])), skeleton, "invisible")
    torso = math.dist((10, 10), (50, 20))
    for share, expected in ((0.19, 1.0), (0.21, 0.0)):
        predicted = np.array([[[900.0, 900.0], [900.0, 900.0], [30.0 + share * torso, 80.0]]])
        found, details = pck_of_truth(truth, predicted, skeleton)
        assert found["PCK"] == found["PCK/tail"] == expected
        assert math.isnan(found["PCK/nose"])
        assert details == {"pck_threshold": 0.2, "pck_reference": "nose to paw", "pck_instances": 1}


@pytest.mark.parametrize(
    ("joints", "count", "message"),
    [
        ("visible", None, r"val\.json: of its labelled joints all have v = 2, .*with joints all"),
        ("invisible", None, r"val\.json: of its labelled joints all have v = 2"),
        (
            "all",
            2,
            r"val\.json: none of its 1 persons has a labelled joint to score among those with 2 labelled joints",
        ),
    ],
)
def test_labels_that_cannot_be_told_apart_are_an_error(
    tmp_path: Path, joints: Any, count: int | None, message: str
) -> None:
    file = read(tmp_path, person(1, 0, [*THREE[:8], 2]))
    with pytest.raises(UserError, match=message):
        scored_truth(file, ANIMAL, joints, count)


def test_no_joint_in_common_is_an_error(tmp_path: Path) -> None:
    message = r"its joints \(nose, paw, tail\) have none in common with skeleton fish \(fin\)"
    with pytest.raises(UserError, match=message):
        scored_truth(read(tmp_path, person(1, 0, THREE)), Skeleton(name="fish", joints=("fin",)))


def crowd_file(*crowd_index: float) -> dict[str, Any]:
    """One person in each image."""
    file = coco_file(*(person(n, n, THREE) for n in range(len(crowd_index))), images=len(crowd_index))
    for image, value in zip(file["images"], crowd_index, strict=True):
        image["crowdIndex"] = value
    return file


def test_crowd_levels_hold_their_lower_bound() -> None:
    # The images at and just under each bound; the hits are at 0.2 and 0.8.
    file = crowd_file(0.0, 0.19, 0.2, 0.79, 0.8, 1.0)
    results = [pose(2, THREE), pose(4, THREE)]
    metrics = crowdpose_ap(file, results, ANIMAL)
    half = pytest.approx(51 / 101)  # recall reaches 0, 0.01, ..., 0.5 of the 101 thresholds
    assert (metrics["AP easy"], metrics["AP medium"], metrics["AP hard"]) == (0.0, half, half)
    assert metrics["AP50"] == pytest.approx(34 / 101)
    assert list(metrics) == ["AP", "AP50", "AP75", "AR", "AR50", "AR75", "AP easy", "AP medium", "AP hard"]
    by_icon = crowdpose_ap(file, results, ANIMAL, CROWD_LEVELS["icon"])  # 0.19 is medium: one of three
    assert (by_icon["AP easy"], by_icon["AP medium"]) == (0.0, pytest.approx(34 / 101))
    assert crowdpose_ap(crowd_file(0.5), [], ANIMAL)["AP easy"] == -1.0  # no such image


def test_crowdpose_area_is_the_box_whatever_is_annotated(tmp_path: Path) -> None:
    file = crowd_file(0.5)
    moved = [pose(0, displaced(0.72))]  # at the annotated area of 10000; 0.53 of the box makes it 0.538
    assert crowdpose_ap(file, moved, ANIMAL)["AP"] == pytest.approx(0.1)
    path = tmp_path / "crowd.json"
    path.write_text(json.dumps(file))
    metrics, details = oks_metrics(path, moved, ANIMAL, "icon")
    assert metrics["AP"] == pytest.approx(0.1)
    assert details["crowd_levels"] == "icon (easy < 0.1 <= medium < 0.8 <= hard)"
    assert details["oks_area"] == "0.53 of the box"
    file["images"].append({"id": 9, "file_name": "9.jpg", "width": 100, "height": 100})  # of another data set
    path.write_text(json.dumps(file))
    metrics, details = oks_metrics(path, moved, ANIMAL)
    assert metrics["AP"] == pytest.approx(0.5)
    assert details == {
        "oks_area": "annotated",
        "poses_per_image": 20,
        "crowd_levels": "not scored: crowdIndex on 1 of 2 images",
    }


def real_data(folder: str) -> Path:
    if "POSERELAY_DATA" not in os.environ:
        pytest.skip(f"POSERELAY_DATA does not name the folder of real data ({folder})")
    return Path(os.environ["POSERELAY_DATA"]) / folder


def test_published_crowdpose_example_to_the_last_digit() -> None:
    folder = real_data("eval_examples")
    results = read_results(folder / "example_crowdpose_preds.json")
    metrics, _ = oks_metrics(folder / "example_crowdpose_val.json", results, load_skeleton("crowdpose14"))
    expected = {"AP": 0.7877, "AP50": 0.9881, "AP75": 0.7314, "AR": 0.8222, "AR50": 1.0, "AR75": 0.7778}
    expected |= {"AP easy": 1.0, "AP medium": 0.9802, "AP hard": 0.4116}
    assert {name: round(value, 4) for name, value in metrics.items()} == expected


def hrnet_pckh(error: np.ndarray, labelled: np.ndarray, heads: np.ndarray, threshold: float) -> tuple[float, list]:
    """HRNet's evaluator, in its own order of steps: joints `[16, N]`, the mean weighted by the joints' counts."""
    within = (error / heads <= threshold) & labelled
    per_joint, count = within.sum(1) / labelled.sum(1), labelled.sum(1)
    counted = [joint for joint in range(16) if joint not in (6, 7)]
    mean = sum(per_joint[joint] * count[joint] / count[counted].sum() for joint in counted)
    pairs = [(13, 12), (14, 11), (15, 10), (3, 2), (4, 1), (5, 0)]
    return mean, [per_joint[9], *(0.5 * (per_joint[left] + per_joint[right]) for left, right in pairs)]


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_pckh_equals_the_evaluator_of_hrnet(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0, 300, (8, 16, 2))
    predicted = truth + rng.normal(0, 12, truth.shape)
    visibility = rng.integers(0, 3, (8, 16))
    visibility[0] = 2  # every joint is labelled somewhere
    heads = rng.uniform(20, 60, 8)
    found, details = pckh(predicted, truth, visibility, heads, load_skeleton("mpii16").joints)
    error = np.linalg.norm(predicted - truth, axis=-1).T
    for threshold in (0.5, 0.1):
        mean, groups = hrnet_pckh(error, visibility.T > 0, heads, threshold)
        assert found[f"PCKh@{threshold}"] == pytest.approx(mean)
        assert [found[f"PCKh@{threshold}/{name}"] for name in GROUPS] == pytest.approx(groups)
    assert found["PCKh@0.11"] == pytest.approx(hrnet_pckh(error, visibility.T > 0, heads, 0.11)[0])
    assert (details["pckh_instances"], details["without_head_size"]) == (8, 0)


def test_persons_without_a_head_size_are_left_out_and_counted() -> None:
    joints = load_skeleton("mpii16").joints
    truth = np.zeros((3, 16, 2))
    predicted = truth + np.array([[[5.0, 0.0]], [[999.0, 0.0]], [[5.1, 0.0]]])
    found, details = pckh(predicted, truth, np.ones((3, 16)), np.array([10.0, np.nan, 10.0]), joints)
    assert found["PCKh@0.5"] == 0.5  # at the threshold is within
    assert (details["pckh_instances"], details["without_head_size"]) == (2, 1)


def test_head_sizes_of_a_file(tmp_path: Path) -> None:
    boxed = person(1, 0, THREE, head_box=[10, 20, 40, 60])
    truth = read(
        tmp_path, boxed, person(2, 0, THREE, head_size=12), person(3, 0, THREE), person(4, 0, THREE, head_box=None)
    )
    assert truth.head_sizes[:2].tolist() == pytest.approx([30.0, 12.0])  # 0.6 of a diagonal of 50
    assert np.isnan(truth.head_sizes[2:]).all()
    with pytest.raises(UserError, match=r"annotation 1: field head_box: has 3 numbers, expected 4"):
        read(tmp_path, person(1, 0, THREE, head_box=[1, 2, 3]))
    with pytest.raises(UserError, match=r"annotation 1: field head_size: 0 gives no size above 0"):
        read(tmp_path, person(1, 0, THREE, head_size=0))
    with pytest.raises(UserError, match=r"val\.json: no person has a head_box or a head_size.*poserelay convert"):
        pckh_of_persons(read(tmp_path, person(1, 0, THREE)), np.zeros((1, 3, 2)))


def mpii_files(tmp_path: Path, persons: int = 4, **changes: Any) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    names = np.empty((1, 16), dtype=object)
    names[0] = list(NAMES_IN_MAT)
    heads = np.zeros((2, 2, persons))
    heads[1] = [[30.0] * persons, [40.0] * persons]
    truth = rng.uniform(0, 300, (16, 2, persons))
    missing = np.zeros((16, persons), dtype=np.uint8)
    missing[0, 1] = 1
    fields = {"dataset_joints": names, "jnt_missing": missing, "pos_gt_src": truth, "headboxes_src": heads}
    preds = {"preds": np.moveaxis(truth, -1, 0) + np.array([3.0, 4.0])}
    for file, values in (("gt_valid.mat", fields), ("pred.mat", preds)):
        kept = {name: changes.get(name, value) for name, value in values.items()}
        scipy.io.savemat(tmp_path / file, {name: value for name, value in kept.items() if value is not None})
    return tmp_path / "gt_valid.mat", tmp_path / "pred.mat"


def test_mpii_files_are_read(tmp_path: Path) -> None:
    poses = read_mpii(*mpii_files(tmp_path))
    assert poses.joints == load_skeleton("mpii16").joints
    np.testing.assert_allclose(np.linalg.norm(poses.predicted - poses.truth, axis=-1), 5.0)
    assert poses.head_sizes.tolist() == pytest.approx([30.0] * 4)
    assert np.argwhere(~poses.visibility).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preds": None, "other": 1}, r"pred\.mat: has no preds, found nothing"),
        ({"jnt_missing": None}, r"gt_valid\.mat: has no jnt_missing, found dataset_joints, pos_gt_src"),
        ({"preds": np.zeros((3, 16, 2))}, r"pred\.mat: field preds: 3 x 16 x 2 of float64, expected 4 x 16 x 2"),
        ({"preds": np.zeros((4, 17, 2))}, r"pred\.mat: field preds: 4 x 17 x 2 .* as gt_valid\.mat has"),
        ({"headboxes_src": np.zeros((2, 4))}, r"gt_valid\.mat: field headboxes_src: 2 x 4 of"),
        ({"dataset_joints": np.array([["rank", "beak"]], dtype=object)}, "dataset_joints: beak is not a joint of MPII"),
    ],
)
def test_mpii_files_that_cannot_be_used_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_mpii(*mpii_files(tmp_path, **changes))


def test_broken_mpii_files_are_named(tmp_path: Path) -> None:
    truth, preds = mpii_files(tmp_path)
    preds.write_bytes(preds.read_bytes()[:300])
    with pytest.raises(UserError, match=r"pred\.mat: not a MATLAB file"):
        read_mpii(truth, preds)
    with pytest.raises(UserError, match=r"absent\.mat: cannot be read"):
        read_mpii(truth, tmp_path / "absent.mat")


def test_pckh_of_the_mpii_photographs_to_the_last_digit(tmp_path: Path) -> None:
    """From the .mat files, and from a COCO file made of them with head boxes and a results list."""
    folder = real_data("mpii")
    poses = read_mpii(folder / "gt_valid.mat", folder / "pred.mat")
    found, _ = pckh(poses.predicted, poses.truth, poses.visibility, poses.head_sizes, poses.joints)
    assert f"{100 * found['PCKh@0.5']:.3f}" == "82.110"

    corners = scipy.io.loadmat(folder / "gt_valid.mat")["headboxes_src"]
    names = [record["image"] for record in json.loads((folder / "valid.json").read_text())]
    ids = {name: number for number, name in enumerate(dict.fromkeys(names))}
    persons, results = [], []
    for n, name in enumerate(names):
        triples = np.column_stack([poses.truth[n] - 1, 2 * poses.visibility[n]]).ravel().tolist()
        head = (corners[..., n].ravel() - 1).tolist()
        persons.append(person(n, ids[name], triples, bbox=[0, 0, 900, 900], head_box=head))
        predicted = np.column_stack([poses.predicted[n] - 1, np.ones(16)]).ravel().tolist()
        results.append(pose(ids[name], predicted))
    file = coco_file(*persons, images=len(ids))
    file["categories"][0]["keypoints"] = list(poses.joints)
    (tmp_path / "mpii.json").write_text(json.dumps(file))
    truth = read_coco(tmp_path / "mpii.json")
    from_coco, details = pckh_of_persons(truth, match_results(truth, results))
    assert from_coco == pytest.approx(found)
    assert details["pckh_instances"] == 65
