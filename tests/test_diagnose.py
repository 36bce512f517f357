from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from evaluation.__main__ import main
from evaluation.diagnose import diagnose, format_diagnosis, optimal_scores, others_around
from evaluation.diagnosis_figures import draw_breakdown, draw_errors, draw_gains, draw_reliability, overview
from evaluation.error_types import GOOD, INVERSION, JITTER, KINDS, MISS, SWAP, ErrorTypes, classify, error_types
from evaluation.oks_matching import THRESHOLDS, Scene, precision_of, scene_of
from poserelay.datasets.coco import read_coco
from poserelay.errors import UserError
from poserelay.keypoints import Skeleton, load_skeleton, resolve_skeleton
from poserelay.scoring import Truth, coco_ap, evaluate_oks, oks_metrics, parsed_truth, read_results, scored_truth

JOINTS = ("nose", "left_hand", "right_hand", "left_foot", "right_foot", "tail")
MIRROR = (0, 2, 1, 4, 3, 5)
SIGMAS = (0.05, 0.08, 0.08, 0.1, 0.1, 0.06)
ANIMAL = Skeleton("animal", JOINTS, flip_pairs=(JOINTS[1:3], JOINTS[3:5]), sigmas=SIGMAS)
AREA = 80.0**2
# Of a person, so far apart that no joint is near another's place: 2 k s is 32 pixels at most.
BESIDE = np.array([3000.0, 0])
PLACES = np.array([[200.0, 0], [0, 200], [400, 200], [0, 400], [400, 400], [200, 600]])


def truth_dict(
    keypoints: np.ndarray, visibility: np.ndarray, images: list[int], areas: np.ndarray, **fields: list[Any]
) -> dict[str, Any]:
    """A file of persons `[N, 6, 2]`, whose boxes are the extents of their joints; fields: of each annotation."""
    triples = np.concatenate([np.where(visibility[..., None] > 0, keypoints, 0), visibility[..., None]], axis=-1)
    persons = []
    for row, image in enumerate(images):
        low, high = keypoints[row].min(0), keypoints[row].max(0)
        person = {
            "id": row + 1,
            "image_id": image,
            "category_id": 1,
            "keypoints": triples[row].ravel().tolist(),
            "bbox": [*low.tolist(), *(high - low).tolist()],
            "area": float(areas[row]),
            "iscrowd": 0,
            **{name: values[row] for name, values in fields.items() if values[row] is not None},
        }
        persons.append(person)
    pictures = [{"id": i, "file_name": f"{i}.jpg", "width": 99999, "height": 9999} for i in sorted({0, 1, 2, *images})]
    category = {"id": 1, "name": "animal", "keypoints": list(JOINTS), "skeleton": []}
    return {"images": pictures, "annotations": persons, "categories": [category]}


def result_list(poses: np.ndarray, images: list[int], scores: Any) -> list[dict[str, Any]]:
    return [
        {
            "image_id": int(image),
            "category_id": 1,
            "keypoints": [number for x, y in pose.tolist() for number in (x, y, 1)],
            "score": float(score),
        }
        for pose, image, score in zip(poses, images, scores, strict=True)
    ]


def read_truth(path: Path, data: dict[str, Any], skeleton: Skeleton = ANIMAL, **options: Any) -> Truth:
    path.write_text(json.dumps(data))
    return scored_truth(read_coco(path), skeleton, **options)


def away(similarity: float, joint: int, angle: float, area: float = AREA) -> np.ndarray:
    """The offset at which a joint has this similarity."""
    distance = math.sqrt(-8 * area * SIGMAS[joint] ** 2 * math.log(similarity))
    return distance * np.array([math.cos(angle), math.sin(angle)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diagnose")


def crowd(seed: int, persons: int = 14, poses: int = 60) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Persons upon each other in three images, poses near them and elsewhere, with all that pycocotools treats apart:
    crowds, unlabelled persons, num_keypoints that contradict, equal scores, equal persons, more than 20 poses."""
    rng = np.random.default_rng(seed)
    places = PLACES / 8 * rng.uniform(0.6, 1.6, (persons, 1, 1)) + rng.uniform(0, 120, (persons, 1, 2))
    visibility = rng.choice([0, 1, 2], (persons, 6), p=[0.25, 0.15, 0.6])
    visibility[0] = 0
    images = rng.integers(0, 2, persons).tolist()
    areas = rng.choice([700.0, 30.0**2 * 4, 110.0**2], persons)
    places[4], visibility[4], images[4], areas[4] = places[3], visibility[3], images[3], areas[3]
    crowds = (rng.random(persons) < 0.1).astype(int).tolist()
    stated: list[Any] = [None] * persons
    stated[1], stated[2] = 0, 6
    data = truth_dict(places, visibility, images, areas, iscrowd=crowds, num_keypoints=stated)
    of = rng.integers(0, persons, poses)
    moved = places[of] + rng.normal(0, 1, (poses, 6, 2)) * rng.choice([1, 5, 20], (poses, 6, 1))
    turned = rng.random(poses) < 0.2
    moved[turned] = moved[turned][:, MIRROR]
    moved[-5:] = rng.uniform(0, 300, (5, 6, 2))
    scores = rng.integers(1, 25, poses) / 25
    return data, result_list(moved, [images[row] for row in of[:-2]] + [2, 0], scores)


# matching and AP


@pytest.mark.parametrize("seed", range(6))
def test_matches_and_precision_are_pycocotools(seed: int, tmp_path: Path) -> None:
    data, results = crowd(seed)
    if seed % 2:  # the size of a pose is then its box's
        results = [{**record, "bbox": [0, 0, 20.0 + 10 * (row % 12), 60]} for row, record in enumerate(results)]
    scene = scene_of(read_truth(tmp_path / "a.json", data), results, ANIMAL)
    matched = scene.match(THRESHOLDS)
    evaluation = evaluate_oks(data, results, ANIMAL)
    seen = 0
    for image in filter(None, evaluation.evalImgs[:3]):
        for column, pose in enumerate(image["dtIds"]):
            (row,) = np.flatnonzero(scene.pose_rows == pose - 1)
            ids = np.where(matched[:, row] >= 0, scene.person_rows[matched[:, row]] + 1, 0)
            assert ids.tolist() == image["dtMatches"][:, column].tolist()
            seen += 1
    assert seen == len(scene.poses) < len(results)
    expected = coco_ap(data, results, ANIMAL)
    found = precision_of(scene, matched).figures
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-12)
    sizes = {its["name"]: its for its in diagnose(read_truth(tmp_path / "a.json", data), results, ANIMAL)["by"]["size"]}
    for name, short in (("medium", "m"), ("large", "l")):
        assert sizes[name]["AP"] == pytest.approx(expected[f"AP{short}"], abs=1e-12)
        assert sizes[name]["AR"] == pytest.approx(expected[f"AR{short}"], abs=1e-12)


@pytest.mark.skipif("POSERELAY_DATA" not in os.environ, reason="real files; set POSERELAY_DATA")
@pytest.mark.parametrize("name", ["example_coco", "example_crowdpose", "faster_coco_eval"])
def test_precision_of_the_published_examples(name: str) -> None:
    folder = Path(os.environ["POSERELAY_DATA"]) / "eval_examples"
    files = {
        "faster_coco_eval": ("faster_coco_eval_keypoints_gt_dataset", "faster_coco_eval_keypoints_dt_dataset"),
    }.get(name, (f"{name}_val", f"{name}_preds"))
    path, predictions = (folder / f"{file}.json" for file in files)
    annotations = read_coco(path)
    skeleton = resolve_skeleton("auto", annotations.category)
    truth, results = scored_truth(annotations, skeleton), read_results(predictions)
    metrics, _ = oks_metrics(parsed_truth(truth), results, skeleton)
    found = diagnose(truth, results, skeleton)
    assert found["metrics"] == pytest.approx({key: metrics[key] for key in found["metrics"]}, abs=1e-12)
    assert sum(found["errors"]["all"].values()) == pytest.approx(1)
    if "APm" in metrics:
        assert [its["AP"] for its in found["by"]["size"][1:]] == pytest.approx([metrics["APm"], metrics["APl"]])


# the kinds


KIND_OF_JOINT = st.tuples(
    st.sampled_from([GOOD, GOOD, JITTER, INVERSION, MISS, SWAP]),
    st.floats(0.01, 0.99),
    st.floats(0, 6.2),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(KIND_OF_JOINT, min_size=6, max_size=6), min_size=2, max_size=2),
    st.lists(st.lists(st.sampled_from([0, 1, 2]), min_size=6, max_size=6), min_size=2, max_size=2),
)
def test_planted_errors_are_told_exactly(folder: Path, planted: list[list[Any]], visibility: list[list[int]]) -> None:
    """Two persons whose joints are far from each other; the nose and the tail are good, so that both are matched."""
    truth = np.stack([PLACES, PLACES + BESIDE])
    seen = np.array(visibility)
    seen[:, [0, 5]] = 2
    poses, kinds, confused = truth.copy(), np.full((2, 6), GOOD), np.full((2, 6), -1)
    for person in range(2):
        for joint in range(1, 5):
            kind, share, angle, mirrored = planted[person][joint]
            place, similarity = (person, joint), 0.86 + 0.139 * share
            if kind == JITTER:
                similarity = 0.51 + 0.33 * share
            elif kind == INVERSION and seen[person, MIRROR[joint]]:
                place, similarity = (person, MIRROR[joint]), 0.51 + 0.48 * share
            elif kind == SWAP and seen[1 - person, MIRROR[joint] if mirrored else joint]:
                place, similarity = (1 - person, MIRROR[joint] if mirrored else joint), 0.51 + 0.48 * share
            elif kind == MISS:
                similarity = 0.02 + 0.46 * share
            elif kind != GOOD:  # on a place that is not labelled
                kind, place, similarity = MISS, (1 - person, MIRROR[joint]), 0.3
            poses[person, joint] = truth[place] + away(similarity, joint, angle)
            kinds[person, joint] = kind
            confused[person, joint] = place[1] if kind in (INVERSION, SWAP) else -1
    unlabelled = seen == 0
    kinds[unlabelled], confused[unlabelled] = -1, -1
    file = read_truth(folder / "planted.json", truth_dict(truth, seen, [1, 1], np.full(2, AREA)))
    found = error_types(file, result_list(poses, [1, 1], [0.4, 0.9]), ANIMAL)
    assert found.poses.tolist() == [1, 0]  # the better-scored one first
    order = found.persons
    assert order.tolist() == [1, 0]
    assert found.kinds.tolist() == kinds[order].tolist()
    assert found.confused.tolist() == confused[order].tolist()


def naive_types(truth: Truth, results: list[dict[str, Any]], skeleton: Skeleton) -> dict[int, tuple[Any, ...]]:
    """From the definition, joint by joint, on pycocotools' own matches at 0.1."""
    evaluation = evaluate_oks(parsed_truth(truth), results, skeleton)
    evaluation.params.iouThrs = np.array([0.1])
    evaluation.evaluate()
    data = json.loads(truth.file.path.read_text())["annotations"]
    position = {int(row): place for place, row in enumerate(truth.counted.persons)}
    found = {}
    for image in filter(None, evaluation.evalImgs[: len(truth.file.image_ids)]):
        for column, pose in enumerate(image["dtIds"]):
            row = int(image["dtMatches"][0, column]) - 1
            if row < 0 or image["dtIgnore"][0, column]:
                continue
            joints = np.reshape(results[pose - 1]["keypoints"], (-1, 3))
            mates = [r for r, person in enumerate(data) if person["image_id"] == image["image_id"]]
            mates = [row, *(r for r in mates if r != row)]
            kinds, confused = [], []
            for joint, (x, y, _) in enumerate(joints):
                if truth.counted.visibility[row, joint] == 0:
                    kinds.append(-1)
                    confused.append(-1)
                    continue
                best = (-1.0, 0, 0)
                for inverted in (False, True):
                    for mate in mates:
                        at = skeleton.flip_index[joint] if inverted else joint
                        px, py, v = np.reshape(data[mate]["keypoints"], (-1, 3))[at]
                        variance = (2 * skeleton.sigmas[joint]) ** 2
                        exponent = ((x - px) ** 2 + (y - py) ** 2) / (2 * variance * data[mate]["area"])
                        if v and math.exp(-exponent) > best[0]:
                            best = (math.exp(-exponent), mate, at)
                similarity, mate, at = best
                if similarity < 0.5:
                    kinds.append(MISS)
                elif mate != row:
                    kinds.append(SWAP)
                elif at != joint:
                    kinds.append(INVERSION)
                else:
                    kinds.append(GOOD if similarity >= 0.85 else JITTER)
                confused.append(at if kinds[-1] in (SWAP, INVERSION) else -1)
            found[pose - 1] = (position[row], kinds, confused)
    return found


def as_dict(found: ErrorTypes) -> dict[int, tuple[Any, ...]]:
    rows = zip(*(values.tolist() for values in (found.poses, found.persons, found.kinds, found.confused)), strict=True)
    return {pose: tuple(rest) for pose, *rest in rows}


@pytest.mark.parametrize("seed", range(6))
def test_kinds_of_a_crowd_equal_a_naive_loop(seed: int, tmp_path: Path) -> None:
    data, results = crowd(100 + seed)
    truth = read_truth(tmp_path / "a.json", data)
    found = error_types(truth, results, ANIMAL)
    assert as_dict(found) == naive_types(truth, results, ANIMAL)
    assert set(found.kinds.ravel().tolist()) >= {-1, GOOD, JITTER, MISS, SWAP}


def test_hidden_joints_are_places_where_visible_ones_alone_count(tmp_path: Path) -> None:
    """joints=visible leaves the hidden label without a kind, yet a prediction on it is an inversion, not a miss."""
    seen = np.array([[2, 2, 1, 2, 2, 2]])
    poses = PLACES[None].copy()
    poses[0, 1] = PLACES[2]
    truth = read_truth(tmp_path / "a.json", truth_dict(PLACES[None], seen, [0], np.array([AREA])), joints="visible")
    found = error_types(truth, result_list(poses, [0], [1]), ANIMAL)
    assert found.kinds.tolist() == [[GOOD, INVERSION, -1, GOOD, GOOD, GOOD]]
    assert found.confused.tolist() == [[-1, 2, -1, -1, -1, -1]]


def test_of_equal_places_the_own_one_wins_then_another_persons_same_joint(tmp_path: Path) -> None:
    """Two persons in one place; of the second the left foot is where the first has its right one."""
    truth = np.stack([PLACES, PLACES])
    truth[1, 3:5] = truth[0, [4, 3]]
    truth[1, 5] += 500  # so that the pose is the first one's
    poses = truth[:1].copy()
    poses[0, 1] = truth[0, 2]  # both left hands are elsewhere, both right ones here
    poses[0, 3] = truth[0, 4]  # its own right foot, the other's left one
    file = read_truth(tmp_path / "a.json", truth_dict(truth, np.full((2, 6), 2), [0, 0], np.full(2, AREA)))
    found = error_types(file, result_list(poses, [0], [1]), ANIMAL)
    assert found.persons.tolist() == [0]
    assert found.kinds.tolist() == [[GOOD, INVERSION, GOOD, SWAP, GOOD, GOOD]]
    assert found.confused.tolist() == [[-1, 2, -1, 3, -1, -1]]


def test_a_joint_whose_mirror_is_not_scored_is_missed(tmp_path: Path) -> None:
    lone = Skeleton("lone", JOINTS[:2], sigmas=SIGMAS[:2])  # of its right hand nothing is known
    poses = PLACES[None].copy()
    poses[0, 1] = PLACES[2]
    data = truth_dict(PLACES[None], np.full((1, 6), 2), [0], np.array([AREA]))
    truth = read_truth(tmp_path / "a.json", data, lone)
    found = error_types(truth, result_list(poses[:, :2], [0], [1]), lone)
    assert found.kinds.tolist() == [[GOOD, MISS]]


# what it costs


def planted_scene(path: Path, kind: int) -> tuple[Truth, list[dict[str, Any]]]:
    """Eight persons in two images, each with the same one kind of error in some joints."""
    rng = np.random.default_rng(kind)
    truth = PLACES + 3000 * np.arange(8)[:, None, None] * [1, 0]
    poses = truth + rng.normal(0, 1, truth.shape)
    for person in range(8):
        # With more joints on another person than at home the pose would be that one's.
        count = person % 2 + 1 if kind == SWAP else person % 4 + 1
        for joint in rng.choice([1, 2, 3, 4], count, replace=False):
            place, similarity = (person, joint), {JITTER: 0.6, MISS: 0.1}.get(kind, 0.7)
            if kind == INVERSION:
                place = (person, MIRROR[joint])
            elif kind == SWAP:
                place = (person ^ 1, joint)
            poses[person, joint] = truth[place] + away(similarity, joint, rng.uniform(0, 6))
    images = [person // 4 for person in range(8)]
    data = truth_dict(truth, np.full((8, 6), 2), images, np.full(8, AREA))
    return read_truth(path, data), result_list(poses, images, rng.random(8))


def as_results(scene: Scene) -> list[dict[str, Any]]:
    return result_list(scene.poses, scene.pose_image.tolist(), scene.scores)


@pytest.mark.parametrize("kind", [JITTER, INVERSION, MISS, SWAP])
def test_correcting_the_only_error_takes_it_away_and_never_costs(kind: int, tmp_path: Path) -> None:
    truth, results = planted_scene(tmp_path / "a.json", kind)
    found = diagnose(truth, results, ANIMAL)
    planted = 12 if kind == SWAP else 20
    assert found["errors"]["all"][KINDS[kind]] == planted / 48
    assert found["errors"]["all"]["good"] == (48 - planted) / 48
    classified = classify(scene_of(truth, results, ANIMAL), truth, ANIMAL)
    corrected = as_results(classified.scene.moved(classified.corrected(kind)))
    again = diagnose(truth, corrected, ANIMAL)
    assert again["errors"]["all"][KINDS[kind]] == 0
    # Beside its place where coco-analyze puts it: of these similarities the fourth root.
    reached = {JITTER: 0.85, MISS: 0.5}.get(kind, 0.7) ** 0.25
    mended = classify(scene_of(truth, corrected, ANIMAL), truth, ANIMAL).similar
    assert mended[classified.kinds == kind] == pytest.approx(reached)
    data = parsed_truth(truth)
    gain = coco_ap(data, corrected, ANIMAL)["AP"] - coco_ap(data, results, ANIMAL)["AP"]
    assert found["gains"][KINDS[kind]]["AP"] == pytest.approx(gain, abs=1e-12)
    assert gain > 0
    others = set(KINDS[1:]) - {KINDS[kind]}
    assert {found["gains"][name]["AP"] for name in (*others, "background_fp", "background_fn")} == {0.0}


@pytest.mark.parametrize("seed", range(3))
def test_gains_are_pycocotools_of_the_corrected_predictions(seed: int, tmp_path: Path) -> None:
    data, results = crowd(200 + seed)
    truth = read_truth(tmp_path / "a.json", data)
    found = diagnose(truth, results, ANIMAL)["gains"]
    scene = scene_of(truth, results, ANIMAL)
    classified = classify(scene, truth, ANIMAL)
    before = coco_ap(data, as_results(scene), ANIMAL)
    better = {name: scene.moved(classified.corrected(kind)) for kind, name in enumerate(KINDS) if kind}
    better["score"] = scene.rescored(optimal_scores(scene))
    for name, its in better.items():
        after = coco_ap(data, as_results(its), ANIMAL)
        expected = {figure: after[figure] - before[figure] for figure in found[name]}
        assert found[name] == pytest.approx(expected, abs=1e-12)
    assert found["score"]["AP"] > 0


def test_optimal_scores_by_hand(tmp_path: Path) -> None:
    """Of two alike poses of a person the worse one decays by exp(-OKS^2 / .5) of the two; one of nobody gets 0."""
    seen = np.full((1, 6), 2)
    truth = read_truth(tmp_path / "a.json", truth_dict(PLACES[None], seen, [0], np.array([AREA])))
    poses = np.stack([PLACES, PLACES, PLACES + 5000])
    poses[1, 0] += away(0.4, 0, 1)
    scene = scene_of(truth, result_list(poses, [0] * 3, [0.9, 0.8, 0.99]), ANIMAL)
    scores = dict(zip(scene.pose_rows.tolist(), optimal_scores(scene), strict=True))
    extent = np.prod(np.ptp(poses[:2], axis=1), axis=1).mean()
    alike = (5 + math.exp(-((poses[1, 0] - PLACES[0]) ** 2).sum() / (8 * SIGMAS[0] ** 2 * extent))) / 6
    assert scores[0] == pytest.approx(1)
    assert scores[1] == pytest.approx(5.4 / 6 * math.exp(-(alike**2) / 0.5))
    assert scores[2] == pytest.approx(0, abs=1e-12)
    assert scene.pose_rows.tolist() == [2, 0, 1]
    assert scene.rescored(np.ones(3)).pose_rows.tolist() == [0, 1, 2]  # of equals the earlier record


def test_background_by_hand(tmp_path: Path) -> None:
    """Taking the poses of nobody out of the file, and the persons that nobody finds, gains as much as is said."""
    truth = PLACES + 3000 * np.arange(4)[:, None, None] * [1, 0]
    data = truth_dict(truth, np.full((4, 6), 2), [0, 0, 1, 1], np.full(4, AREA))
    found_poses = truth[:3] + np.random.default_rng(0).normal(0, 4, (3, 6, 2))
    poses = np.concatenate([found_poses, truth[:1] + 9000, truth[:1] + 2, truth[1:2] + 9000])
    results = result_list(poses, [0, 0, 1, 1, 0, 2], [0.5, 0.6, 0.4, 0.9, 0.3, 0.55])
    found = diagnose(read_truth(tmp_path / "a.json", data), results, ANIMAL)
    assert found["background"] == {"false_positives": 3, "duplicates": 1, "false_negatives": 1}
    assert found["protocol"]["matched"] == 3
    before = coco_ap(data, results, ANIMAL)["AP"]
    without = coco_ap(data, results[:3], ANIMAL)["AP"] - before
    assert found["gains"]["background_fp"]["AP"] == pytest.approx(without, abs=1e-12)
    fewer = {**data, "annotations": data["annotations"][:3]}
    assert found["gains"]["background_fn"]["AP"] == pytest.approx(coco_ap(fewer, results, ANIMAL)["AP"] - before)
    assert without > 0.1


def test_a_person_whom_a_group_finds_is_not_forgiven_in_it(tmp_path: Path) -> None:
    """A pose between two persons is the first one's; ignoring that one, it is the second's up to an OKS of 0.69."""
    truth = np.stack([PLACES, PLACES + BESIDE / 300])
    seen = np.full((2, 6), 2)
    seen[0, 5] = 0
    file = read_truth(tmp_path / "a.json", truth_dict(truth, seen, [0, 0], np.full(2, AREA)))
    found = diagnose(file, result_list(truth[:1], [0], [1]), ANIMAL)
    assert found["background"]["false_negatives"] == 1
    (row,) = [its for its in found["by"]["visible_joints"] if its["name"] == "6"]
    assert row["AP"] == pytest.approx(0.4)  # 0.5 to 0.65
    # From 0.7 on nobody is left to be found.
    assert row["gains"]["background_fn"] == pytest.approx(0.6)


def test_calibration_by_hand(tmp_path: Path) -> None:
    seen = np.full((2, 6), 2)
    truth = np.stack([PLACES, PLACES + BESIDE])
    poses = np.concatenate([truth, PLACES[None] + 9000])
    poses[1, :3] += 900
    file = read_truth(tmp_path / "a.json", truth_dict(truth, seen, [0, 0], np.full(2, AREA)))
    its = diagnose(file, result_list(poses, [0] * 3, [1.0, 0.62, 0.68]), ANIMAL)["calibration"]
    assert [found["poses"] for found in its["bins"]] == [0] * 6 + [2, 0, 0, 1]
    assert its["bins"][6] == pytest.approx({"low": 0.6, "high": 0.7, "poses": 2, "score": 0.65, "oks": 0.25})
    assert its["error"] == pytest.approx(2 / 3 * 0.4)
    assert its["spearman"] == pytest.approx(0.5)  # 1 - 6 (0 + 1 + 1) / (3 (9 - 1))
    # Tenths begin the bin that they name, also those that binary fractions miss.
    tenths = diagnose(file, result_list(poses, [0] * 3, [0.3, 0.6, 0.7]), ANIMAL)["calibration"]["bins"]
    assert [found["poses"] for found in tenths] == [0, 0, 0, 1, 0, 0, 1, 1, 0, 0]
    wide = diagnose(file, result_list(poses, [0] * 3, [30, 10, 20]), ANIMAL)["calibration"]
    assert (wide["bins"][0]["low"], wide["bins"][-1]["high"], wide["error"]) == (10, 30, None)
    assert sum(found["poses"] for found in wide["bins"]) == 3


# by group


def test_ap_of_a_group_is_pycocotools_with_the_others_ignored(tmp_path: Path) -> None:
    """num_keypoints = 0 is how a file tells pycocotools to ignore a person."""
    data, results = crowd(300)
    data["annotations"][5]["iscrowd"] = 1
    truth = read_truth(tmp_path / "a.json", data)
    found = diagnose(truth, results, ANIMAL)["by"]
    scene = scene_of(truth, results, ANIMAL)
    counted = np.isin(np.arange(len(data["annotations"])), scene.person_rows[~scene.ignored])
    labelled = truth.file.visibility.astype(bool).sum(1)
    around = np.zeros(len(counted), dtype=int)
    for row, person in enumerate(data["annotations"]):
        for other in data["annotations"]:
            if other is not person and other["image_id"] == person["image_id"] and not other["iscrowd"]:
                around[row] += box_iou(person["bbox"], other["bbox"]) > 0.1
    assert others_around(scene).tolist() == around[scene.person_rows].tolist()
    groups = [
        ("visible_joints", "1 to 5", counted & (labelled >= 1) & (labelled <= 5)),
        ("visible_joints", "6", counted & (labelled == 6)),
        ("crowding", "alone", counted & (around == 0)),
        ("crowding", "1 or 2 others", counted & (around >= 1) & (around <= 2)),
        ("crowding", "3 others or more", counted & (around >= 3)),
    ]
    for key, name, members in groups:
        (row,) = [its for its in found[key] if its["name"] == name]
        assert row["persons"] == members.sum()
        if not members.any():
            assert row["AP"] is None
            continue
        persons = [
            {**person, "num_keypoints": 6 if member else 0}
            for person, member in zip(data["annotations"], members, strict=True)
        ]
        expected = coco_ap({**data, "annotations": persons}, results, ANIMAL)
        assert (row["AP"], row["AR"]) == pytest.approx((expected["AP"], expected["AR"]), abs=1e-12)
    for key in ("size", "crowding", "visible_joints"):
        assert sum(its["found"] for its in found[key]) == diagnose(truth, results, ANIMAL)["protocol"]["matched"]
    grid = [its for its in found["grid"] if its["visible_joints"] == "6"]
    assert (
        sum(its["persons"] for its in grid) == next(r for r in found["visible_joints"] if r["name"] == "6")["persons"]
    )


def box_iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def test_gains_of_a_group_that_is_everybody_are_the_gains(tmp_path: Path) -> None:
    truth, results = planted_scene(tmp_path / "a.json", MISS)
    found = diagnose(truth, results, ANIMAL)
    (row,) = [its for its in found["by"]["visible_joints"] if its["name"] == "6"]
    assert row["persons"] == 8
    assert row["gains"] == {name: its["AP"] for name, its in found["gains"].items()}
    assert row["miss"] == found["errors"]["all"]["miss"] > 0


def test_joints_pairs_and_confusions(tmp_path: Path) -> None:
    poses = np.stack([PLACES, PLACES + BESIDE])
    truth = poses.copy()
    poses[:, 1] = truth[:, 2]  # both left hands at the own right ones
    poses[0, 3] = truth[1, 4]
    file = read_truth(tmp_path / "a.json", truth_dict(truth, np.full((2, 6), 2), [0, 0], np.full(2, AREA)))
    its = diagnose(file, result_list(poses, [0, 0], [0.5, 0.6]), ANIMAL)["errors"]
    assert its["confused"] == [
        {"predicted": "left_hand", "at": "right_hand", "whose": "own", "count": 2},
        {"predicted": "left_foot", "at": "right_foot", "whose": "other", "count": 1},
    ]
    assert its["joints"]["left_hand"] == dict.fromkeys(KINDS, 0.0) | {"inversion": 1.0, "labels": 2}
    assert list(its["pairs"]) == ["left_hand, right_hand", "left_foot, right_foot"]
    assert its["pairs"]["left_foot, right_foot"] == dict.fromkeys(KINDS, 0.0) | {
        "good": 0.75,
        "swap": 0.25,
        "labels": 4,
    }


# the command


def write_files(folder: Path, data: Any, results: Any) -> list[str]:
    (folder / "truth.json").write_text(json.dumps(data))
    (folder / "poses.json").write_text(json.dumps(results))
    return ["diagnose", "--annotations", str(folder / "truth.json"), "--predictions", str(folder / "poses.json")]


def test_command_of_a_skeleton_without_sigmas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MPII's joints, in a file of other names than COCO's and with no packaged sigmas but assumed ones."""
    mpii = load_skeleton("mpii16")
    rng = np.random.default_rng(0)
    places = rng.uniform(100, 500, (5, 16, 2))
    data = truth_dict(np.zeros((0, 6, 2)), np.zeros((0, 6)), [], np.zeros(0))
    data["categories"][0]["keypoints"] = [f"{joint} x" for joint in mpii.joints]
    for row, person in enumerate(places):
        triples = np.column_stack([person, np.full(16, 2)]).ravel().tolist()
        record = {
            "id": row + 1,
            "image_id": row % 2,
            "category_id": 1,
            "keypoints": triples,
            "bbox": [50, 50, 500, 500],
        }
        data["annotations"].append(record)
    poses = places + rng.normal(0, 25, places.shape)
    argv = write_files(tmp_path, data, result_list(poses, [0, 1, 0, 1, 0], rng.random(5)))
    assert main([*argv, "--json", "--out", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert printed == written
    assert printed["protocol"]["sigmas"] == "animal (assumed)"
    assert printed["protocol"]["oks_area"] == "0.53 of the box"
    assert printed["errors"]["labels"] == 16 * printed["protocol"]["matched"] > 0
    # The limbs of a name with a word more are still mirror pairs; head and body have none.
    assert len(printed["errors"]["pairs"]) == 6
    picture = cv2.imread(str(tmp_path / "out" / "diagnosis.png"))
    assert picture is not None
    assert picture.shape[1] > 1200
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert text.rstrip() == format_diagnosis(printed)
    assert f"AP {printed['metrics']['AP']:.4f}" in text
    assert len(text.splitlines()) < 60


def test_without_mirror_pairs_nothing_is_inverted_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, results = crowd(0)
    data["categories"][0]["keypoints"] = list("abcdef")
    assert main(write_files(tmp_path, data, results)) == 0
    captured = capsys.readouterr()
    assert "has no mirror pairs: no joint can be inverted" in captured.err
    (row,) = [line for line in captured.out.splitlines() if line.startswith("a ")]
    assert row.split()[3] == "-"


def test_no_predictions_leave_everything_unmeasured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, _ = crowd(0)
    argv = write_files(tmp_path, data, [])
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["AP"] == 0
    assert set(found["errors"]["all"].values()) == {None}
    assert found["background"]["false_negatives"] == found["protocol"]["instances"] > 0
    assert found["gains"]["background_fn"]["AP"] is None
    assert (found["gains"]["jitter"]["AP"], found["calibration"]["spearman"]) == (0, None)
    assert main(argv) == 0


def test_bad_input_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, results = crowd(0)
    for person in data["annotations"]:
        person["keypoints"], person["num_keypoints"] = [0] * 18, 0
    assert main(write_files(tmp_path, data, results)) == 2
    assert "holds no person with labelled joints" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing to diagnose"):
        diagnose(read_truth(tmp_path / "a.json", data), results, ANIMAL)
    data, results = crowd(0)
    results[3]["score"] = None  # type: ignore[assignment]
    assert main(write_files(tmp_path, data, results)) == 2
    assert "record 3: score is None" in capsys.readouterr().err


def test_charts_show_the_numbers(tmp_path: Path) -> None:
    data, results = crowd(1)
    found = diagnose(read_truth(tmp_path / "a.json", data), results, ANIMAL)

    def drawn(draw: Callable[[Figure, Any], None]) -> list[Any]:
        figure = Figure()
        draw(figure, found)
        return figure.axes

    (axes,) = drawn(draw_errors)
    widths = np.array([[bar.get_width() for bar in bars] for bars in axes.containers])
    rows = [found["errors"]["all"], *found["errors"]["joints"].values()]
    assert widths == pytest.approx(np.array([[row[kind] for row in rows] for kind in KINDS[1:]]))
    (axes,) = drawn(draw_gains)
    assert [bar.get_width() for bar in axes.containers[0]] == [its["AP"] for its in found["gains"].values()]
    upper, lower = drawn(draw_reliability)
    assert [bar.get_height() for bar in lower.containers[0]] == [its["poses"] for its in found["calibration"]["bins"]]
    assert f"{found['calibration']['error']:.3f}" in upper.get_title()
    texts = [text.get_text() for axes in drawn(draw_breakdown) for text in axes.texts]
    recalls = [its["AR"] for key in ("size", "crowding", "visible_joints") for its in found["by"][key]]
    assert texts == ["nobody" if recall is None else f"AR {recall:.3f}" for recall in recalls]
    nothing = diagnose(read_truth(tmp_path / "a.json", data), [], ANIMAL)
    overview(nothing).draw_without_rendering()


def test_a_scene_does_not_depend_on_the_order_of_images_in_the_file(tmp_path: Path) -> None:
    data, results = crowd(2)
    turned = {**data, "images": data["images"][::-1]}
    first, second = (diagnose(read_truth(tmp_path / "a.json", its), results, ANIMAL) for its in (data, turned))
    assert first == second
