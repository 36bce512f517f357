from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from evaluation import config as fields
from evaluation import predict, score, test
from evaluation.__main__ import main
from poserelay.checkpoint import describe, write_export
from poserelay.command import to_plain
from poserelay.config import Decoding, InputConfig, ModelConfig, Named
from poserelay.drawing import FIRST_SIDE
from poserelay.errors import UnreadableImage, UserError
from poserelay.keypoints import Skeleton
from poserelay.model import build_model

SKELETON = Skeleton(
    name="stick",
    joints=("head", "left_foot", "right_foot"),
    flip_pairs=(("left_foot", "right_foot"),),
    limbs=(("head", "left_foot"), ("head", "right_foot")),
    sigmas=(0.1, 0.1, 0.1),
    torso=("head", "left_foot"),
)
# Every person stands in its box alike, so that the mean pose is right about all of them.
SHAPE = np.array([[0.5, 0.1], [0.8, 0.9], [0.2, 0.9]])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three pictures of noise, persons at known places, and a model of random weights."""
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    names = ["a.png", "b.jpg", "sub/c.png"]
    for name in names:
        cv2.imwrite(str(tmp_path / "images" / name), rng.integers(0, 255, (120, 160, 3), dtype=np.uint8))
    boxes = [(1, [10, 10, 40, 80]), (1, [60, 20, 60, 90]), (2, [30, 5, 80, 100]), (3, [5, 5, 50, 100])]
    annotations = [annotation(number, image, box) for number, (image, box) in enumerate(boxes)]
    images = [{"id": n, "file_name": name, "height": 120, "width": 160} for n, name in enumerate(names, start=1)]
    category = {"id": 1, "name": "stick", "keypoints": list(SKELETON.joints), "skeleton": [[1, 2], [1, 3]]}
    write(tmp_path / "val.json", {"images": images, "annotations": annotations, "categories": [category]})

    torch.manual_seed(0)
    model_config = ModelConfig(
        Named("resnet18"), Named("simple", {"deconv_channels": [8, 8, 8]}), None, "auto", InputConfig(96, 64)
    )
    model = build_model(model_config, SKELETON)
    for parameter in model.head.parameters():  # random peaks all over the map instead of maps near zero
        torch.nn.init.normal_(parameter, std=0.3)
    described = describe(
        stage="finetune",
        method="simple",
        model=to_plain(model_config),
        skeleton=SKELETON,
        config={},
        upstream=None,
        metrics={},
    )
    write_export(tmp_path / "model.safetensors", model.state_dict(), described)
    return tmp_path


def annotation(number: int, image: int, box: list[float]) -> dict[str, Any]:
    # The annotated box is inclusive of its far corner for HRNet, so it measures one pixel more than what is cropped.
    joints = np.array(box[:2]) + SHAPE * (np.array(box[2:]) - 1)
    keypoints = np.column_stack([joints, [2, 2, 1]]).ravel().tolist()
    area = box[2] * box[3] / 2
    fields = {"id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "num_keypoints": 3}
    return {**fields, "bbox": box, "area": area, "keypoints": keypoints}


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def config_for_test(files: Path, **changes: Any) -> fields.TestConfig:
    given = {
        "checkpoint": str(files / "model.safetensors"),
        "annotations": str(files / "val.json"),
        "images": str(files / "images"),
        "out": str(files / "out"),
        "baseline_annotations": str(files / "val.json"),
        "workers": 0,
        "device": "cpu",
    }
    return fields.TestConfig(**{**given, **changes})


def detections(files: Path) -> Path:
    boxes = [(1, [10, 10, 40, 80], 0.9), (1, [10, 10, 40, 80], 0.8), (2, [30, 5, 80, 100], 0.7), (3, [0, 0, 9, 9], 0.1)]
    records = [{"image_id": i, "category_id": 1, "bbox": box, "score": s} for i, box, s in boxes]
    return write(files / "detections.json", records)


@pytest.mark.parametrize("boxes", ["gt", "detections"])
def test_scoring_the_written_predictions_gives_the_same_numbers(files: Path, boxes: str) -> None:
    """What `test` reports is what `score` finds in the file it wrote, by another way through the code."""
    chosen = "gt" if boxes == "gt" else str(detections(files))
    report = test.main(config_for_test(files, boxes=chosen))
    assert json.loads((files / "out" / "metrics.json").read_text()) == report
    write(files / "skeleton.yaml", SKELETON.to_dict())
    asked = fields.ScoreConfig(str(files / "val.json"), str(files / "out" / "predictions.json"))
    for metric in ("oks", "pck"):
        scored = score.main(replace(asked, metric=metric, skeleton=str(files / "skeleton.yaml")))
        assert scored["metrics"] == {name: report["metrics"][name] for name in scored["metrics"]}


def with_a_tail(files: Path) -> Path:
    """Persons near what the model predicts; a joint that it does not have, one of its own missing, another order."""
    test.main(config_for_test(files, baseline_annotations=None))
    predicted = json.loads((files / "out" / "predictions.json").read_text())
    truth = json.loads((files / "val.json").read_text())
    truth["categories"][0]["keypoints"] = ["right_foot", "tail", "head"]
    for number, (person, record) in enumerate(zip(truth["annotations"], predicted, strict=True)):
        head, _, foot = np.reshape(record["keypoints"], (3, 3))[:, :2] + [3 * number, 2]
        person["keypoints"] = [*foot, 2, *head, 2, *head, 1]
    truth["annotations"][2]["keypoints"][:3] = [0, 0, 0]
    truth["annotations"][-1]["keypoints"] = [0, 0, 0, 20.0, 90.0, 2, 0, 0, 0]  # nothing but a tail
    return write(files / "tail.json", truth)


@pytest.mark.parametrize("boxes", ["gt", "detections"])
def test_a_model_of_other_joints_is_scored_on_the_common_ones(files: Path, boxes: str) -> None:
    """`score` finds the same in the written file, which has the annotations' joints; and so does a file without tails
    with the results cut by hand."""
    truth = with_a_tail(files)
    chosen = "gt" if boxes == "gt" else str(detections(files))
    report = test.main(config_for_test(files, annotations=str(truth), boxes=chosen, baseline_annotations=str(truth)))
    expected = {"joints_scored": 2, "unscored": ["tail"], "not_in_file": ["left_foot"], "instances": 3}
    assert expected.items() <= report["protocol"].items()
    assert report["metrics"].keys() >= {"PCK/head", "PCK/right_foot", "mean pose AP"}
    assert "PCK/tail" not in report["metrics"]
    written = json.loads((files / "out" / "predictions.json").read_text())
    assert all(record["keypoints"][3:6] == [0, 0, 0] and record["keypoints"][0] != 0 for record in written)

    skeleton = str(write(files / "skeleton.yaml", SKELETON.to_dict()))
    asked = fields.ScoreConfig(str(truth), str(files / "out" / "predictions.json"), skeleton=skeleton)
    scored = {metric: score.main(replace(asked, metric=metric)) for metric in ("oks", "pck")}
    for found in scored.values():
        assert found["metrics"] == {name: report["metrics"][name] for name in found["metrics"]}
        assert expected.items() <= found["protocol"].items()
    assert list(scored["pck"]["metrics"]) == ["PCK", "AUC", "PCK/right_foot", "PCK/head"]

    cut = json.loads(truth.read_text())
    cut["categories"][0]["keypoints"] = ["right_foot", "head"]
    for record in [*cut["annotations"], *written]:
        del record["keypoints"][3:6]
        record["num_keypoints"] = sum(v > 0 for v in record["keypoints"][2::3])
    two = str(write(files / "two.yaml", {"name": "two", "joints": ["right_foot", "head"], "sigmas": [0.1, 0.1]}))
    by_hand = replace(
        asked,
        annotations=str(write(files / "cut.json", cut)),
        predictions=str(write(files / "results.json", written)),
        skeleton=two,
    )
    assert score.main(by_hand)["metrics"] == scored["oks"]["metrics"]
    assert 0 < scored["oks"]["metrics"]["AP"] < 1


def test_labels_are_chosen_alike_by_test_and_score(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = json.loads((files / "val.json").read_text())
    truth["annotations"][0]["keypoints"][5] = 0  # the left foot, so that this person has two labels
    annotations = str(write(files / "some.json", truth))
    asked = config_for_test(files, annotations=annotations, boxes=str(detections(files)), joints="invisible")
    report = test.main(replace(asked, labelled_joints=3))
    assert report["metrics"]["mean pose PCK/right_foot"] == pytest.approx(1 / 3)  # two of three were not detected
    assert report["metrics"]["PCK/head"] is None
    assert {"joints": "invisible", "labelled_joints": 3, "instances": 3, "persons_left_out": 1}.items() <= report[
        "protocol"
    ].items()
    capsys.readouterr()
    skeleton = str(write(files / "skeleton.yaml", SKELETON.to_dict()))
    arguments = ["score", "--annotations", annotations, "--predictions", str(files / "out" / "predictions.json")]
    arguments += ["--skeleton", skeleton, "--joints", "invisible", "--labelled_joints", "3", "--json"]
    for metric in ("oks", "pck"):
        assert main([*arguments, "--metric", metric]) == 0
        scored = json.loads(capsys.readouterr().out)
        assert scored["metrics"] == {name: report["metrics"][name] for name in scored["metrics"]}
        assert {"joints": "invisible", "labelled_joints": 3, "instances": 3, "persons_left_out": 1}.items() <= scored[
            "protocol"
        ].items()
    assert main([*arguments[:-2], "1"]) == 2
    assert "some.json: none of its 4 persons has a joint labelled invisible to score among" in capsys.readouterr().err
    assert main([*arguments[:-2], "0"]) == 2
    assert "labelled_joints is 0, expected" in capsys.readouterr().err


def hidden_file(files: Path, **category: Any) -> str:
    truth = json.loads((files / "val.json").read_text())
    kept = {"images": truth["images"], "categories": [{"id": 1, "name": "stick", **category}]}
    return str(write(files / "image_info.json", kept))


def test_a_hidden_test_set_is_predicted_and_not_scored(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same poses as with the truth at hand, and a file without metrics that says why."""
    boxes = str(detections(files))
    test.main(config_for_test(files, boxes=boxes, baseline_annotations=None))
    expected = json.loads((files / "out" / "predictions.json").read_text())
    capsys.readouterr()
    hidden = config_for_test(files, annotations=hidden_file(files), boxes=boxes, baseline_annotations=None)
    report = test.main(replace(hidden, out=str(files / "hidden")))
    printed = capsys.readouterr().out
    assert f"image_info.json holds no annotations: nothing is scored. {len(expected)} poses are in" in printed
    assert json.loads((files / "hidden" / "predictions.json").read_text()) == expected
    assert json.loads((files / "hidden" / "metrics.json").read_text()) == report
    assert report["metrics"] == {}
    protocol = {
        "truth": "hidden, nothing is scored",
        "boxes": "detections.json",
        "instances": None,
        "split": "image_info",
    }
    assert protocol.items() <= report["protocol"].items()

    turned = hidden_file(files, id=1, keypoints=["right_foot", "tail", "head"])  # it says which joints it wants
    test.main(replace(hidden, annotations=turned, out=str(files / "turned")))
    written = json.loads((files / "turned" / "predictions.json").read_text())
    whole = np.reshape([record["keypoints"] for record in expected], (-1, 3, 3))
    np.testing.assert_array_equal(
        np.reshape([record["keypoints"] for record in written], (-1, 3, 3)),
        np.stack([whole[:, 2], np.zeros_like(whole[:, 0]), whole[:, 0]], axis=1),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": "gt"}, "give boxes, a COCO detections JSON, and out"),
        ({"out": None}, "give boxes, a COCO detections JSON, and out"),
        ({"joints": "visible"}, "leave out baseline_annotations, joints and labelled_joints"),
    ],
)
def test_a_hidden_test_set_needs_boxes_and_a_folder(files: Path, changes: dict[str, Any], message: str) -> None:
    given = {"boxes": str(detections(files)), "baseline_annotations": None, **changes}
    with pytest.raises(UserError, match=rf"image_info\.json: holds no annotations.*{message}"):
        test.main(config_for_test(files, annotations=hidden_file(files), **given))


def test_several_checkpoints_are_an_ensemble(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean of a model and its twin is the model; a changed file of a run is refused wherever it stands."""
    alone = test.main(config_for_test(files, baseline_annotations=None))
    expected = json.loads((files / "out" / "predictions.json").read_text())
    shutil.copy(files / "model.safetensors", files / "twin.safetensors")
    both = [str(files / "model.safetensors"), str(files / "twin.safetensors")]
    together = test.main(config_for_test(files, checkpoint=both, baseline_annotations=None))
    assert json.loads((files / "out" / "predictions.json").read_text()) == expected
    assert together == {**alone, "protocol": {**alone["protocol"], "ensemble": 2}}
    export = files / "run" / "export"
    export.mkdir(parents=True)
    (files / "run" / "config.yaml").touch()
    shutil.copy(files / "model.safetensors", export / "model.safetensors")
    arguments = ["--annotations", str(files / "val.json"), "--images", str(files / "images"), "--checkpoint"]
    assert main(["test", *arguments, json.dumps([both[0], str(export / "model.safetensors")])]) == 2
    assert "has not finished" in capsys.readouterr().err
    assert main(["test", *arguments, "[]"]) == 2
    assert "checkpoint is an empty list" in capsys.readouterr().err


def test_report_holds_the_protocol_and_the_mean_pose(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = test.main(config_for_test(files, json=True, decoding=Decoding(refine="parabola")))
    assert json.loads(capsys.readouterr().out) == report
    assert report["metrics"]["mean pose PCK"] == 1.0
    assert report["metrics"]["mean pose AP"] == pytest.approx(1.0)
    expected = {
        "split": "val",
        "boxes": "gt",
        "flip": True,
        "flip_shift": "exact",
        "decode": "parabola",
        "rescoring": 0.2,
        "nms": 0.9,
        "nms_method": "hard",
        "instances": 4,
        "boxes_predicted": 4,
        "pck_reference": "head to left_foot",
        "pck_instances": 4,
        "baseline": "val",
    }
    assert expected.items() <= report["protocol"].items()
    assert not any(str(files) in str(value) for value in report["protocol"].values())


def test_detections_below_the_threshold_are_left_out(files: Path) -> None:
    report = test.main(config_for_test(files, boxes=str(detections(files)), box_threshold=0.5, out=None))
    assert report["protocol"]["boxes"] == "detections.json"
    assert report["protocol"]["boxes_predicted"] == 3
    assert report["protocol"]["box_threshold"] == 0.5
    assert report["metrics"]["mean pose PCK"] == pytest.approx(2 / 4)  # two of the four persons were detected
    assert not (files / "out").exists()


def test_an_unreadable_picture_stops_the_test(files: Path) -> None:
    picture = files / "images" / "b.jpg"
    picture.write_bytes(picture.read_bytes()[:-500])
    with pytest.raises(UnreadableImage, match=r"b\.jpg"):
        test.main(config_for_test(files))
    assert not (files / "out").exists()


def test_baseline_with_other_joints_is_refused(files: Path) -> None:
    other = json.loads((files / "val.json").read_text())
    other["categories"][0]["keypoints"][0] = "beak"
    with pytest.raises(UserError, match=r"other\.json: lacks head"):
        test.main(config_for_test(files, baseline_annotations=str(write(files / "other.json", other))))


def test_mean_pose_of_another_joint_order(files: Path) -> None:
    annotations = test.read_coco(files / "val.json")
    turned = json.loads((files / "val.json").read_text())
    turned["categories"][0]["keypoints"] = [SKELETON.joints[joint] for joint in (2, 0, 1)]
    for person in turned["annotations"]:
        person["keypoints"] = np.reshape(person["keypoints"], (3, 3))[[2, 0, 1]].ravel().tolist()
    expected = test.mean_pose_of(str(files / "val.json"), annotations)
    np.testing.assert_allclose(test.mean_pose_of(str(write(files / "turned.json", turned)), annotations), expected)


@pytest.mark.parametrize("metric", ["oks", "pck"])
def test_score_of_perfect_predictions(files: Path, metric: Any, capsys: pytest.CaptureFixture[str]) -> None:
    truth = json.loads((files / "val.json").read_text())["annotations"]
    results = [{key: a[key] for key in ("image_id", "category_id", "keypoints")} | {"score": 1.0} for a in truth]
    predictions = write(files / "perfect.json", results)
    arguments = ["score", "--annotations", str(files / "val.json"), "--predictions", str(predictions)]
    assert main([*arguments, "--metric", metric, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metrics"]["AP" if metric == "oks" else "PCK"] == pytest.approx(1.0)
    assert report["protocol"]["instances"] == 4
    assert report["protocol"]["predictions"] == "perfect.json"
    if metric == "oks":
        assert report["protocol"]["sigmas"] == "stick (assumed)"


def test_bad_predictions_end_with_exit_2(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = write(files / "bad.json", [{"image_id": 1, "category_id": 1, "keypoints": [1, 2, 3], "score": 1}])
    for metric in ("oks", "pck"):
        arguments = ["--annotations", str(files / "val.json"), "--predictions", str(predictions), "--metric", metric]
        assert main(["score", *arguments]) == 2
        error = capsys.readouterr().err
        assert "bad.json: record 0: keypoints has 3 numbers, expected a list of 9" in error
        assert "Traceback" not in error


def test_table_marks_what_cannot_be_measured() -> None:
    report = {"metrics": {"AP": 0.12345, "APm": -1.0, "PCK": None}, "protocol": {"flip": True, "nms": None}}
    assert score.format_report(report) == "AP   0.1235\nAPm  -\nPCK  -\n(flip True)"
    assert score.without_nan({"PCK": math.nan, "AP": 0.5}) == {"PCK": None, "AP": 0.5}


def with_heads(files: Path) -> Path:
    """val.json with head boxes of diagonal 20 but for the last person, and crowdIndex in every picture."""
    truth = json.loads((files / "val.json").read_text())
    for person in truth["annotations"][:-1]:
        person["head_box"] = [10, 10, 22, 26]
    for image, crowding in zip(truth["images"], (0.1, 0.5, 0.9), strict=True):
        image["crowdIndex"] = crowding
    return write(files / "heads.json", truth)


def test_head_boxes_and_crowd_index_bring_their_metrics(files: Path) -> None:
    """`test` measures them unasked, `score` finds the same in the file that it wrote."""
    truth = str(with_heads(files))
    report = test.main(config_for_test(files, annotations=truth, baseline_annotations=truth, crowd_levels="icon"))
    assert report["metrics"]["mean pose PCKh@0.5"] == 1.0
    assert report["metrics"]["mean pose AP hard"] == pytest.approx(1.0)
    assert report["metrics"]["mean pose AP easy"] == -1.0  # 0.1 is ICON's medium
    expected = {"pckh_instances": 3, "without_head_size": 1, "oks_area": "0.53 of the box"}
    assert expected.items() <= report["protocol"].items()
    assert report["protocol"]["crowd_levels"].startswith("icon (easy < 0.1")
    skeleton = str(write(files / "skeleton.yaml", SKELETON.to_dict()))
    predictions = str(files / "out" / "predictions.json")
    for metric in ("oks", "pckh"):
        scored = score.main(fields.ScoreConfig(truth, predictions, metric, "icon", skeleton))
        assert scored["metrics"] == {name: report["metrics"][name] for name in scored["metrics"]}
        assert len(scored["metrics"]) == (9 if metric == "oks" else 4)  # none of MPII's groups


def test_pckh_of_mpii_files_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    if "POSERELAY_DATA" not in os.environ:
        pytest.skip("POSERELAY_DATA does not name the folder of real data (mpii)")
    folder = Path(os.environ["POSERELAY_DATA"]) / "mpii"
    arguments = ["score", "--annotations", str(folder / "gt_valid.mat"), "--predictions", str(folder / "pred.mat")]
    assert main([*arguments, "--metric", "pckh"]) == 0
    assert "PCKh@0.5           0.82110\n" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "are scored by --metric pckh, not oks" in capsys.readouterr().err
    assert main([*arguments, "--metric", "pckh", "--labelled_joints", "16"]) == 2
    assert "joints and labelled_joints choose among the labels of COCO JSON" in capsys.readouterr().err


def test_pckh_without_heads_or_of_mixed_files_ends_with_exit_2(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["score", "--metric", "pckh", "--annotations", str(files / "val.json"), "--predictions"]
    assert main([*arguments, str(write(files / "none.json", []))]) == 2
    assert "val.json: no person has a head_box or a head_size" in capsys.readouterr().err
    assert main([*arguments, str(files / "pred.mat")]) == 2
    assert "pred.mat: a .mat of predictions needs MPII's gt_valid.mat as annotations" in capsys.readouterr().err


def predict_config(files: Path, **changes: Any) -> fields.PredictConfig:
    given = {
        "checkpoint": str(files / "model.safetensors"),
        "images": str(files / "images"),
        "out": str(files / "drawn"),
        "joint_threshold": -100.0,
        "batch_size": 1,
        "device": "cpu",
    }
    return fields.PredictConfig(**{**given, **changes})


def test_predict_draws_every_picture_and_writes_the_poses(files: Path) -> None:
    results = predict.main(predict_config(files))
    assert json.loads((files / "drawn" / "predictions.json").read_text()) == results
    assert [record["file_name"] for record in results] == ["a.png", "b.jpg", "sub/c.png"]
    assert {tuple(record["bbox"]) for record in results} == {(0.0, 0.0, 160.0, 120.0)}
    drawn = sorted(p.relative_to(files / "drawn").as_posix() for p in (files / "drawn").rglob("*.jpg"))
    assert drawn == ["overview.jpg", "pictures/a.png.jpg", "pictures/b.jpg", "pictures/sub/c.png.jpg"]
    x, y = np.rint(results[1]["keypoints"][3:5]).astype(int).clip(0, (159, 119))
    picture = cv2.imread(str(files / "drawn" / "pictures" / "b.jpg"))
    assert picture is not None
    original = cv2.imread(str(files / "images" / "b.jpg"))
    assert original is not None
    orange = np.array(FIRST_SIDE[::-1], dtype=float)
    assert np.abs(picture[y, x] - orange).sum() < np.abs(original[y, x] - orange).sum()


def test_predict_with_the_boxes_of_an_annotation_file(files: Path) -> None:
    results = predict.main(predict_config(files, boxes=str(files / "val.json")))
    assert [record["image_id"] for record in results] == [1, 1, 2, 3]
    assert results[1]["bbox"] == [60, 20, 60, 90]


def test_predict_with_a_list_of_boxes(files: Path) -> None:
    boxes = [
        {"file_name": "sub/c.png", "bbox": [5, 5, 50, 100], "score": 0.5},
        {"file_name": "a.png", "bbox": [10, 10, 40, 80], "score": 0.2},
        {"file_name": "absent.png", "bbox": [10, 10, 40, 80], "score": 0.9},
    ]
    file = str(write(files / "boxes.json", boxes))
    whole = predict.main(predict_config(files, boxes=file))
    assert [record["file_name"] for record in whole] == ["a.png", "sub/c.png"]
    single = predict.main(predict_config(files, boxes=file, box_threshold=0.4))
    assert single == whole[1:]
    unscored = predict.main(predict_config(files, boxes=str(write(files / "one.json", [{**boxes[0], "score": 1.0}]))))
    assert single[0]["score"] == pytest.approx(0.5 * unscored[0]["score"])


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([{"file_name": "a.png", "bbox": [1, 2, 3], "score": 1}], r"record 0: bbox \[1, 2, 3\] and score"),
        ([{"file_name": "a.png", "bbox": [1, 2, 3, 0], "score": 1}], "record 0: .* has no area"),
        ([{"file_name": "a.png", "bbox": [1, 2, 3, math.nan], "score": 1}], "record 0: bbox"),
        ([{"bbox": [1, 2, 3, 4], "score": 1}], "'file_name' is missing"),
        ({"images": []}, "'annotations' is missing"),
        ([{"file_name": "absent.png", "bbox": [1, 2, 3, 4], "score": 1}], "no box for a picture of"),
        ([{"file_name": "a.png", "bbox": [1, 2, 3, 4], "score": 0.2}], r"of 1 the best is scored 0\.2, below"),
    ],
)
def test_boxes_that_cannot_be_used_are_named(files: Path, boxes: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"boxes\.json: .*" + message):
        predict.main(predict_config(files, boxes=str(write(files / "boxes.json", boxes)), box_threshold=0.3))


def test_boxes_of_no_picture_and_pictures_without_a_box_are_counted(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = [{"file_name": f"gone/{number}.png", "bbox": [1, 2, 3, 4], "score": 1} for number in range(2)]
    boxes = [{"file_name": "a.png", "bbox": [10, 10, 40, 80], "score": 0.9}, *absent]
    predict.main(predict_config(files, boxes=str(write(files / "boxes.json", boxes))))
    told = capsys.readouterr().err
    assert "2 of 3 boxes belong to no picture of" in told
    assert "such as that of gone/0.png" in told
    total = len(list((files / "images").iterdir()))
    assert f"{total - 1} of {total} pictures are left out: they have no box" in told


def test_one_picture_is_turned_upright_unless_boxes_refer_to_it(files: Path) -> None:
    shutil.copy(files / "images" / "b.jpg", files / "one.jpg")
    data = (files / "one.jpg").read_bytes()
    # EXIF with the single tag Orientation = 6: shown turned by a quarter.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    (files / "one.jpg").write_bytes(data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:])
    upright = predict.main(predict_config(files, images=str(files / "one.jpg")))
    assert upright[0]["bbox"] == [0.0, 0.0, 120.0, 160.0]
    boxes = write(files / "boxes.json", [{"file_name": "one.jpg", "bbox": [0, 0, 160, 120], "score": 1}])
    stored = predict.main(predict_config(files, images=str(files / "one.jpg"), boxes=str(boxes)))
    assert cv2.imread(str(files / "drawn" / "pictures" / "one.jpg")).shape == (120, 160, 3)  # pyright: ignore
    assert stored[0]["bbox"] == [0.0, 0.0, 160.0, 120.0]


def test_all_metrics_of_score_are_those_of_test(files: Path) -> None:
    """Also how well each joint is found and what the scores tell, by predictions in detected boxes."""
    chosen = {"boxes": str(detections(files)), "baseline_annotations": None, "annotations": str(with_heads(files))}
    report = test.main(config_for_test(files, pck_reference="box", **chosen))
    skeleton = str(write(files / "skeleton.yaml", SKELETON.to_dict()))
    asked = fields.ScoreConfig(chosen["annotations"], str(files / "out" / "predictions.json"), "all", skeleton=skeleton)
    scored = score.main(replace(asked, pck_reference="box"))
    assert {"AP hard", "PCK", "AUC", "PCKh@0.5", "PCKh AUC", "recall@0.9"} <= scored["metrics"].keys()
    assert [scored[part] for part in ("metrics", "joints", "scores")] == [
        report[part] for part in ("metrics", "joints", "scores")
    ]
    assert report["protocol"]["pck_reference"] == "longer side of the box"
    with pytest.raises(
        UserError, match=r"tail\.json: PCK by the torso of skeleton stick cannot be had, the file lacks"
    ):
        test.main(config_for_test(files, annotations=str(with_a_tail(files)), pck_reference="torso"))


def test_iou_ranges_equal_the_files_of_a_range(files: Path) -> None:
    """In annotated boxes a range's persons have their own poses alone, here of an image with one of each range."""
    asked = config_for_test(files, baseline_annotations=None)
    test.main(asked)
    truth = json.loads((files / "val.json").read_text())
    predicted = json.loads((files / "out" / "predictions.json").read_text())
    for number, (person, record) in enumerate(zip(truth["annotations"], predicted, strict=True)):
        person["max_iou"] = (0.6, 0.8, 0.74, 0.2)[number]
        places = np.reshape(record["keypoints"], (3, 3))[:, :2] + [4 * number, 2]
        person["keypoints"] = np.column_stack([places, [2, 2, 2]]).ravel().tolist()
    report = test.main(replace(asked, annotations=str(write(files / "whole.json", truth))))
    assert report["protocol"]["iou_ranges"].endswith("poses of its persons alone")
    moderate = [truth["annotations"][0], truth["annotations"][2]]
    part = {**truth, "images": truth["images"][:2], "annotations": moderate}
    alone = test.main(replace(asked, annotations=str(write(files / "moderate.json", part))))["metrics"]
    assert report["metrics"]["AP moderate"] == alone["AP"] == alone["AP moderate"] > 0
    assert alone["AP hard"] == -1.0 < report["metrics"]["AP hard"]


def test_published_coco_example_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    if "POSERELAY_DATA" not in os.environ:
        pytest.skip("POSERELAY_DATA does not name the folder of real data (eval_examples)")
    folder = Path(os.environ["POSERELAY_DATA"]) / "eval_examples"
    arguments = ["--annotations", str(folder / "example_coco_val.json")]
    arguments += ["--predictions", str(folder / "example_coco_preds.json"), "--metric", "oks", "--json"]
    assert main(["score", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    printed = {name: round(value, 4) for name, value in report["metrics"].items()}
    assert {
        "AP": 0.8609,
        "AP50": 0.9931,
        "AP75": 0.9109,
        "APm": 0.7756,
        "APl": 0.9373,
        "AR": 0.875,
    }.items() <= printed.items()
    assert report["protocol"]["sigmas"] == "coco17"


def test_predict_never_draws_over_the_pictures_it_reads(files: Path) -> None:
    folder = files / "mine" / "pictures"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes((files / "images" / "b.jpg").read_bytes())
    for images, out in ((folder, files / "mine"), (files / "mine", files / "mine"), (folder, folder)):
        with pytest.raises(UserError, match="draw among, what it reads"):
            predict.main(replace(predict_config(files), images=str(images), out=str(out)))
    assert (folder / "a.jpg").read_bytes() == (files / "images" / "b.jpg").read_bytes()


def test_predict_never_writes_over_a_picture_called_overview(files: Path) -> None:
    mine = files / "mine"
    mine.mkdir()
    (mine / "overview.jpg").write_bytes((files / "images" / "b.jpg").read_bytes())
    with pytest.raises(UserError, match="write over"):
        predict.main(replace(predict_config(files), images=str(mine / "overview.jpg"), out=str(mine)))
