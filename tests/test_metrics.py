"""Metrics beside AP, and what `score` says where they cannot be had or records are odd."""

from __future__ import annotations

import copy
import itertools
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.__main__ import main
from poserelay.__main__ import main as poserelay
from poserelay.datasets.coco import read_coco
from poserelay.errors import UserError
from poserelay.keypoints import Skeleton, load_skeleton
from poserelay.pckh import pckh
from poserelay.scoring import (
    AUC_THRESHOLDS,
    PckReference,
    beyond_best,
    check_results,
    coco_ap,
    crowdpose_ap,
    keypoint_recall,
    of_iou_range,
    oks_metrics,
    pck,
    pck_auc,
    pck_of_truth,
    poses_of_persons,
    recall_of_truth,
    repeated_records,
    scored_truth,
)

from .test_scoring import ANIMAL, SIGMAS, THREE, coco_file, displaced, person, pose, random_scene, read, real_data


@given(st.integers(0, 2**32 - 1))
def test_auc_is_the_area_under_pck(seed: int) -> None:
    """PCK at each threshold by itself, then trapezoids, as MPII's toolkit integrates; a pose of NaN is never near."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0, 50, (6, 4, 2))
    predicted = truth + rng.normal(0, 6, truth.shape)
    predicted[1] = np.nan
    predicted[2, 0] = truth[2, 0] + [0.1 * 20, 0]  # on a threshold
    visibility = rng.integers(0, 3, (6, 4))
    reference = np.array([10.0, 20.0, 20.0, np.nan, 0.0, 35.0])
    curve = [pck(predicted, truth, visibility, reference, t)["PCK"] for t in AUC_THRESHOLDS.tolist()]
    area = sum((low + high) / 2 for low, high in itertools.pairwise(curve)) / 50
    assert pck_auc(predicted, truth, visibility, reference) == pytest.approx(area, nan_ok=True)


def test_auc_of_a_hand_made_case() -> None:
    """Every joint 0.25 of the length away: 0 until 0.24, 1 from 0.25 on."""
    truth = np.zeros((2, 3, 2))
    predicted = truth + np.array([5.0, 0.0])
    lengths = np.full(2, 20.0)
    assert pck_auc(predicted, truth, np.ones((2, 3)), lengths) == pytest.approx(25.5 / 50)
    assert pck_auc(truth, truth, np.ones((2, 3)), lengths) == 1.0
    assert math.isnan(pck_auc(truth, truth, np.zeros((2, 3)), lengths))
    found, _ = pckh(predicted, truth, np.ones((2, 3)), lengths, ("head_top", "pelvis", "thorax"))
    assert found["PCKh AUC"] == pytest.approx(25.5 / 50)
    predicted[:, 1:] = 99.0  # pelvis and thorax do not count
    again, _ = pckh(predicted, truth, np.ones((2, 3)), lengths, ("head_top", "pelvis", "thorax"))
    assert again["PCKh AUC"] == found["PCKh AUC"]


def test_recall_counts_what_is_surer_than_the_threshold() -> None:
    confidences = np.array([[0.3, 0.35, 0.9], [np.nan, np.nan, np.nan], [0.95, 0.2, 0.0]])
    visibility = np.array([[2, 1, 0], [2, 0, 0], [1, 2, 2]])
    found = keypoint_recall(confidences, visibility)
    # Labelled: 0.3, 0.35, nobody, 0.95, 0.2, 0.0; at the threshold is not above it.
    expected = [4, 3, 2, 1, 1, 1, 1, 1, 1]
    assert list(found) == [f"recall@{t}" for t in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    assert list(found.values()) == pytest.approx([count / 6 for count in expected])
    assert math.isnan(keypoint_recall(confidences, np.zeros((3, 3)))["recall@0.1"])


def test_recall_is_of_the_matched_pose_wherever_its_joints_lie(tmp_path: Path) -> None:
    truth = scored_truth(read(tmp_path, person(1, 0, THREE), person(2, 1, [*THREE[:6], 0.0, 0.0, 0])), ANIMAL)
    far = [THREE[0] + 500, THREE[1], 0.45, *THREE[3:5], 0.55, *THREE[6:8], 0.15]
    nobody = [900.0, 900.0, 0.99] * 3
    poses = poses_of_persons(truth.common, [pose(0, nobody), pose(0, far)])
    found, details = recall_of_truth(truth, poses[..., 2])  # five labels, of which the second person's two are missed
    assert [round(5 * found[f"recall@{t}"]) for t in (0.1, 0.2, 0.5, 0.6)] == [3, 2, 1, 0]
    assert details == {"recall_confidence": "of the joint"}
    alike = np.array([[0.4, 0.4, 0.4], [0.7, 0.7, 0.7]])
    assert recall_of_truth(truth, alike)[1] == {"recall_confidence": "of the pose, one for all its joints"}
    for flags, named in ((np.ones((2, 3)), "1"), (np.array([[2, 1, np.nan]] * 2), "1 or 2")):
        with pytest.raises(UserError, match=rf"mine\.json: the third number of every joint is {named}, no confidence"):
            recall_of_truth(truth, flags, "mine.json")


def test_pck_by_torso_or_box_as_it_is_asked_for(tmp_path: Path) -> None:
    with_torso = Skeleton("animal", ANIMAL.joints, sigmas=SIGMAS, torso=("nose", "paw"))
    truth = scored_truth(read(tmp_path, person(1, 0, THREE)), with_torso)
    predicted = truth.common.keypoints + np.array([0.0, 12.0])  # 0.12 of the box, 0.29 of the torso
    cases: list[tuple[PckReference, str, float]] = [
        ("auto", "nose to paw", 0.0),
        ("torso", "nose to paw", 0.0),
        ("box", "longer side of the box", 1.0),
    ]
    for reference, name, expected in cases:
        found, details = pck_of_truth(truth, predicted, with_torso, 0.2, reference)
        assert (found["PCK"], details["pck_reference"]) == (expected, name)
    with pytest.raises(UserError, match="PCK by the torso of skeleton animal cannot be had, the skeleton names no tor"):
        pck_of_truth(truth, predicted, ANIMAL, 0.2, "torso")
    absent = Skeleton("other", (*ANIMAL.joints, "hip"), torso=("nose", "hip"))
    with pytest.raises(UserError, match="the file lacks nose or hip; take pck_reference box"):
        pck_of_truth(truth, predicted, absent, 0.2, "torso")


@pytest.mark.parametrize("seed", range(4))
def test_crowd_levels_equal_the_files_of_their_images_alone(seed: int) -> None:
    """pycocotools on the images of a level, each written to a file of its own."""
    persons, results = random_scene(seed)
    file = coco_file(*persons, images=4)  # the last has nobody
    for image, crowding in zip(file["images"], (0.9, 0.1, 0.5, 0.6), strict=True):
        image["crowdIndex"] = crowding
    found = crowdpose_ap(file, results, ANIMAL)
    for name, ids in (("easy", {1}), ("medium", {2, 3}), ("hard", {0})):
        alone = copy.deepcopy(file)
        alone["images"] = [image for image in file["images"] if image["id"] in ids]
        alone["annotations"] = [{**record, "area": 0.53 * 80 * 80} for record in persons if record["image_id"] in ids]
        expected = coco_ap(alone, [record for record in results if record["image_id"] in ids], ANIMAL)["AP"]
        assert found[f"AP {name}"] == expected


def test_ochuman_ranges_equal_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`score` of a whole file against `score` of the files that `convert --iou_range` writes of it, of any poses."""
    rng = np.random.default_rng(3)
    # Persons beside each other by so many pixels: in image 0 two are hard and one is moderate, in image 2 neither.
    image_of, apart = [0, 0, 0, 1, 1, 2, 2, 3, 3], [0.0, 1.5, 7.0, 0.0, 5.0, 0.0, 14.0, 0.0, 1.0]
    joints = rng.uniform(10, 50, (4, 17, 2))[image_of] + np.array(apart)[:, None, None]
    boxes = [[*at.min(0).tolist(), *np.ptp(at, 0).tolist()] for at in joints]
    persons = [
        person(n, image, np.column_stack([at, np.full(17, 2)]).ravel().tolist(), bbox=box, area=900.0)
        for n, (image, at, box) in enumerate(zip(image_of, joints, boxes, strict=True))
    ]
    skeleton = converted(tmp_path, persons)
    capsys.readouterr()
    results = []
    for n in [*range(9), 0, 3, 5, 6]:  # of some persons two
        moved = np.column_stack([joints[n] + rng.normal(0, 1.5, (17, 2)), rng.random(17)])
        results.append(pose(image_of[n], moved.ravel().tolist(), rng.random(), category_id=1))
    (tmp_path / "results.json").write_text(json.dumps(results))

    def scored(truth: str, predictions: str) -> dict[str, Any]:
        given = ["--annotations", str(tmp_path / truth), "--predictions", str(tmp_path / predictions)]
        assert main(["score", *given, "--skeleton", skeleton, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    whole = scored("all.json", "results.json")
    assert whole["protocol"]["iou_ranges"].endswith("poses of the image, also on persons outside the range")
    ious = {record["max_iou"] for record in json.loads((tmp_path / "all.json").read_text())["annotations"]}
    assert min(ious) < 0.5
    assert max(ious) >= 0.75
    for name in ("moderate", "hard"):
        shown = {image["id"] for image in json.loads((tmp_path / f"{name}.json").read_text())["images"]}
        its = [record for record in results if record["image_id"] in shown]
        (tmp_path / "its.json").write_text(json.dumps(its))
        alone = scored(f"{name}.json", "its.json")
        assert whole["metrics"][f"AP {name}"] == alone["metrics"]["AP"] == alone["metrics"][f"AP {name}"]
        assert 0 < alone["metrics"]["AP"] < 1


def converted(tmp_path: Path, persons: list[dict[str, Any]]) -> str:
    """all.json, moderate.json and hard.json of `persons` through `poserelay convert`; returns the skeleton's name."""
    file = coco_file(*({**record, "category_id": 1} for record in persons), images=4)
    file["categories"] = [{"id": 1, "name": "person", "keypoints": list(load_skeleton("coco17").joints)}]
    (tmp_path / "source.json").write_text(json.dumps(file))
    given = ["convert", "--dataset", "ochuman", "--annotations"]
    assert poserelay([*given, str(tmp_path / "source.json"), "--out", str(tmp_path / "all.json")]) == 0
    for name, bounds in (("moderate", "[0.5,0.75]"), ("hard", "[0.75,1]")):
        out = ["--out", str(tmp_path / f"{name}.json"), "--iou_range", bounds]
        assert poserelay([*given, str(tmp_path / "all.json"), *out]) == 0
    return "coco17"


def test_max_iou_is_kept_from_file_to_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of a range has fewer boxes than the MaxIoU is of: what is stated stays, and 1 is hard."""
    boxes = [[10.0, 10.0, 20.0, 20.0], [10.0, 10.0, 20.0, 20.0], [10.0, 10.0, 20.0, 12.0]]  # 1, 1, 0.6
    people = [person(n, 0, [15.0, 15.0, 2] * 17, bbox=box) for n, box in enumerate(boxes)]
    converted(tmp_path, people)
    capsys.readouterr()
    whole = json.loads((tmp_path / "all.json").read_text())
    assert [record["max_iou"] for record in whole["annotations"]] == pytest.approx([1.0, 1.0, 0.6])
    moderate = json.loads((tmp_path / "moderate.json").read_text())["annotations"]
    assert [record["max_iou"] for record in moderate] == pytest.approx([0.6])  # alone in its file
    assert [record["id"] for record in of_iou_range(whole, "hard")["annotations"]] == [0, 1]
    part = {**whole, "annotations": [{k: v for k, v in r.items() if k != "max_iou"} for r in whole["annotations"]]}
    part["annotations"][0]["max_iou"] = 0.5  # not of all: no ranges
    skeleton = Skeleton("coco17", tuple(whole["categories"][0]["keypoints"]))
    assert "AP hard" not in oks_metrics(part, [], skeleton)[0]


CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({"score": True}, False),
    ({"score": math.nan}, False),
    ({"score": "1"}, False),
    ({"score": 10**400}, False),
    ({"score": np.float64(0.5)}, True),
    ({"image_id": 7}, False),
    ({"image_id": None}, False),
    ({"image_id": [0]}, False),
    ({"category_id": [7]}, False),
    ({"category_id": 7.0}, True),
    ({"keypoints": None}, False),
    ({"keypoints": [1.0] * 8}, False),
    ({"keypoints": [*THREE[:8], True]}, False),
    ({"keypoints": [*THREE[:8], math.inf]}, False),
    ({"keypoints": [None, *THREE[1:]]}, False),
    ({"bbox": [1, None, 3, 4]}, False),
    ({"keypoints": (1.0,) * 9}, False),
    ({"bbox": [1, 2, 3]}, False),
    ({"bbox": [1, 2, 3, 4]}, True),
    ({"other": None}, True),
]


@pytest.mark.parametrize(("change", "valid"), CHANGES)
def test_records_are_judged_alike_together_and_one_by_one(change: dict[str, Any], valid: bool) -> None:
    """A list is valid exactly if each record is, and the first wrong one is named."""

    def problem(*some: dict[str, Any]) -> str | None:
        try:
            check_results(some, [0, 1], 7, 3)
        except UserError as error:
            return str(error)
        return None

    record = {**pose(0, THREE), **change}
    alone = problem(record)
    assert (alone is None) == valid
    assert problem(pose(0, THREE), pose(1, THREE), record, pose(0, THREE)) == (
        alone and alone.replace("record 0", "record 2")
    )


def test_odd_records_are_counted() -> None:
    records = [pose(0, THREE, 0.5), pose(1, THREE, 0.5), pose(0, THREE, 0.5), pose(0, THREE, 0.4), pose(0, THREE, 0.5)]
    assert repeated_records(records) == [2, 4]
    assert repeated_records(records[:2]) == []
    crowd = [pose(0, THREE)] * 23 + [pose(1, THREE)] * 20 + [pose(2, THREE)] * 21
    assert beyond_best(crowd) == (2, 4)
    assert beyond_best([]) == (0, 0)


def files(tmp_path: Path, truth: dict[str, Any], results: list[Any]) -> list[str]:
    (tmp_path / "val.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return ["score", "--annotations", str(tmp_path / "val.json"), "--predictions", str(tmp_path / "results.json")]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([pose(9, THREE)], "record 0: image_id 9 is not in the annotation file"),
        ([pose(0, THREE), {"image_id": 0, "category_id": 7, "keypoints": THREE}], "record 1: has no score"),
        ([pose(0, THREE, math.nan)], "record 0: score is nan, expected a finite number"),
        ([pose(0, [math.nan, *THREE[1:]])], "record 0: keypoints holds nan, expected finite numbers"),
        ([pose(0, [None, *THREE[1:]])], "record 0: keypoints holds None, expected finite numbers"),
        ([pose(0, THREE[:6])], "record 0: keypoints has 6 numbers, expected a list of 9"),
        ({"annotations": []}, "expected a list of results, found dict"),
    ],
)
@pytest.mark.parametrize("metric", ["oks", "all"])
def test_results_that_cannot_be_scored_end_with_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], results: Any, message: str, metric: str
) -> None:
    assert main([*files(tmp_path, coco_file(person(1, 0, THREE)), results), "--metric", metric]) == 2
    error = capsys.readouterr().err
    assert f"results.json: {message}" in error
    assert "Traceback" not in error


def test_annotations_with_one_id_twice_end_with_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(tmp_path, coco_file(person(1, 0, THREE), person(1, 1, THREE)), [])) == 2
    assert "val.json: annotation 1: field id: 1 appears twice; ids must be unique" in capsys.readouterr().err


def test_persons_whom_ap_leaves_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CrowdPose's num_keypoints is 0 where only head and neck are labelled."""
    left_out = {**person(2, 1, THREE), "num_keypoints": 0}
    arguments = files(tmp_path, coco_file(person(1, 0, THREE), left_out), [pose(0, THREE)])
    assert main([*arguments, "--json"]) == 0
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert (protocol["instances"], protocol["oks_instances"]) == (2, 1)


def test_what_makes_an_ap_hard_to_compare_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = person(1, 0, THREE)
    del bare["area"]
    results = [pose(0, displaced(0.9), n / 30) for n in range(22)] + [pose(0, displaced(0.9), 0.0)]
    arguments = files(tmp_path, coco_file(bare, person(2, 1, THREE)), results)
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["protocol"]["oks_area"] == "annotated, or 0.53 of the box (1 persons)"
    errors = captured.err.splitlines()
    assert len(errors) == 4
    assert "results.json: records that say the same as an earlier one: 1, the first is record 22" in errors[0]
    assert "val.json: 1 of its 2 annotations have no area: OKS takes 0.53 of the box instead" in errors[1]
    assert errors[2] == "warning: the sigmas of skeleton animal are assumed: its AP compares only with itself"
    assert (
        "results.json: more than 20 poses on 1 of the images; AP looks at the 20 best of each, and so not at 3"
        in (errors[3])
    )
    yaml = tmp_path / "animal.yaml"
    yaml.write_text(json.dumps({"name": "animal", "joints": list(ANIMAL.joints), "sigmas": list(SIGMAS)}))
    arguments = files(tmp_path, coco_file(person(1, 0, THREE)), results[1:20])
    assert main([*arguments, "--skeleton", str(yaml)]) == 0
    assert capsys.readouterr().err == ""
    flat = {**person(2, 1, THREE), "area": 0}
    assert main([*files(tmp_path, coco_file(person(1, 0, THREE), flat), results[1:20]), "--skeleton", str(yaml)]) == 0
    assert "val.json: 1 labelled persons have an area of 0" in capsys.readouterr().err
    assert main([*files(tmp_path, coco_file(bare), results), "--metric", "pck"]) == 0  # no AP, nothing to say of it
    assert [line.split(": ")[2][:20] for line in capsys.readouterr().err.splitlines()] == ["records that say the"]


def test_all_gives_what_the_truth_allows_and_names_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sure = [*THREE[:2], 0.9, *THREE[3:5], 0.5, *THREE[6:8], 0.3]
    arguments = [*files(tmp_path, coco_file(person(1, 0, THREE)), [pose(0, sure)]), "--metric", "all"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"AP", "AR", "PCK", "AUC", "PCK/tail", "recall@0.1", "recall@0.9"} <= report["metrics"].keys()
    without = {"pckh": "no person has a head_box or a head_size, which PCKh measures by"}
    assert report["protocol"]["not_scored"] == without
    assert report["joints"]["paw"] == {"accuracy": 1.0, "oks": 1.0, "count": 1}
    assert report["scores"]["poses"] == 1
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"\nno pckh: {without['pckh']}\n(metric all" in printed
    assert "not_scored" not in printed
    assert "\njoint  accuracy" in printed

    headed = coco_file(person(1, 0, THREE, head_size=10.0))
    flat = [pose(0, [v if i % 3 < 2 else 1 for i, v in enumerate(THREE)])]
    arguments = [*files(tmp_path, headed, flat), "--metric", "all"]
    assert main([*arguments, "--pck_reference", "torso", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metrics"].keys() >= {"PCKh@0.5", "PCKh AUC"}
    assert report["protocol"]["not_scored"] == {
        "pck": "PCK by the torso of skeleton animal cannot be had, the skeleton names no torso",
        "recall": "the third number of every joint is 1, no confidence, which keypoint recall goes by",
    }
    for metric, message in (("pck", "take pck_reference box"), ("recall", "results.json: the third number of")):
        assert main([*arguments[:-1], metric, "--pck_reference", "torso"]) == 2
        assert message in capsys.readouterr().err

    empty = coco_file(person(1, 0, [0.0] * 9), person(2, 0, THREE, num_keypoints=0))
    assert main([*files(tmp_path, empty, [pose(0, sure)]), "--metric", "all", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["protocol"]["not_scored"]["oks"].startswith("the annotations hold no person with labelled joints")
    assert report["metrics"]["PCK"] == 1.0


def test_all_of_mpii_files_is_pckh(capsys: pytest.CaptureFixture[str]) -> None:
    folder = real_data("mpii")
    given = ["--annotations", str(folder / "gt_valid.mat"), "--predictions", str(folder / "pred.mat"), "--json"]
    assert main(["score", *given, "--metric", "all"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert f"{100 * report['metrics']['PCKh@0.5']:.3f}" == "82.110"
    assert report["protocol"]["not_scored"].keys() == {"oks", "pck", "recall"}


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
            {
                **{"AP": 0.7877, "AP50": 0.9881, "AP75": 0.7314, "AR": 0.8222, "AR50": 1.0, "AR75": 0.7778},
                **{"AP easy": 1.0, "AP medium": 0.9802, "AP hard": 0.4116},
            },
        ),
    ],
)
def test_published_examples_from_the_command_line(
    capsys: pytest.CaptureFixture[str], truth: str, predictions: str, expected: dict[str, float]
) -> None:
    folder = real_data("eval_examples")
    given = ["--annotations", str(folder / f"{truth}.json"), "--predictions", str(folder / f"{predictions}.json")]
    printed = []
    for metric in ("oks", "all"):
        assert main(["score", *given, "--metric", metric, "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out)["metrics"])
    assert {name: round(printed[0][name], 4) for name in expected} == expected
    assert {name: printed[1][name] for name in printed[0]} == printed[0]


def test_benchmark_has_a_line_for_each_metric(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which it reaches only where both sides have the same figures; what it measures is not judged here."""
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "score.py"
    small = ["--images", "30", "--persons", "40", "--poses", "3", "--rounds", "1", "--json"]
    monkeypatch.setattr(sys, "argv", [str(script), *small])
    runpy.run_path(str(script), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["benchmark"] for line in lines] == ["score_oks", "score_all"]
    assert all(line["ratio"] > 0 and line["poses"] == 90 for line in lines)


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth that keeps its JSON never opens the file again."""
    (tmp_path / "val.json").write_text(json.dumps(coco_file(person(1, 0, THREE))))
    data = json.loads((tmp_path / "val.json").read_text())
    annotations = read_coco(tmp_path / "val.json", data)
    (tmp_path / "val.json").unlink()
    assert scored_truth(annotations, ANIMAL, data=data).parsed is data
