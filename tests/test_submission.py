"""What `test --submit` writes, read back as its receiver would."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat

from evaluation import config as fields
from evaluation import test
from evaluation.submission import SKELETONS, Kind, check_submission, mpii_mat, write_submission
from poserelay.datasets.coco import read_coco
from poserelay.errors import UserError
from poserelay.inference import Poses, to_results
from poserelay.keypoints import load_skeleton
from poserelay.scoring import Truth, scored_truth

from .test_evaluation import config_for_test, detections, files, hidden_file, write  # noqa: F401


def truth_of(tmp_path: Path, kind: Kind, name: str = "image_info_test-dev2017") -> Truth:
    """Three images, the joints in another order than the skeleton's, one person in the first and two in the last."""
    skeleton = load_skeleton(SKELETONS[kind])
    joints = [skeleton.joints[-1], *skeleton.joints[:-1]]
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 90, "height": 90} for n in (7, 3, 5)]
    persons = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": [0, 0, 80, 80], "keypoints": [9, 9, 2] * len(joints)}
        for n, image in enumerate((7, 5, 5))
    ]
    category = {"id": 1, "name": "person", "keypoints": joints}
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"images": images, "annotations": persons, "categories": [category]}))
    return scored_truth(read_coco(path), skeleton)


def poses_of(truth: Truth, rng: np.random.Generator) -> Poses:
    joints = len(truth.common.joints)
    return Poses(
        keypoints=rng.uniform(0, 80, (3, joints, 2)),
        joint_scores=rng.random((3, joints)),
        scores=rng.random(3),
        boxes=np.tile([0.0, 0.0, 80.0, 80.0], (3, 1)),
        areas=np.full(3, 6400.0),
        image_ids=[7, 5, 5],
        annotation_ids=[0, 1, 2],
    )


@pytest.mark.parametrize("kind", ["coco", "crowdpose"])
def test_results_are_in_the_order_of_the_test_set(tmp_path: Path, kind: Kind) -> None:
    truth = truth_of(tmp_path, kind)
    poses = poses_of(truth, np.random.default_rng(0))
    path = write_submission(kind, tmp_path / "Ours, v2", poses, to_results(poses, 1), truth, "gt")
    if kind == "coco":
        assert path.name == "person_keypoints_test-dev2017_Ours-v2_results.zip"
        with zipfile.ZipFile(path) as archive:
            assert archive.namelist() == ["person_keypoints_test-dev2017_Ours-v2_results.json"]
            records = json.loads(archive.read(archive.namelist()[0]))
    else:
        assert path.name == "crowdpose_results.json"
        records = json.loads(path.read_text())
    assert [record.keys() for record in records] == [{"image_id", "category_id", "keypoints", "score"}] * 3
    assert [record["image_id"] for record in records] == [7, 5, 5]
    assert [record["score"] for record in records] == poses.scores.tolist()
    triples = np.reshape([record["keypoints"] for record in records], (3, -1, 3))
    turned = np.roll(poses.keypoints, -1, axis=1)  # the file's first joint is the skeleton's last
    np.testing.assert_array_equal(triples[..., :2], np.round(turned, 1))
    assert (triples[..., 2] == 1).all()
    before = path.read_bytes()
    write_submission(kind, tmp_path / "Ours, v2", poses, to_results(poses, 1), truth, "gt")
    assert path.read_bytes() == before


def points_of(pred: Any, image: int, rect: int) -> np.ndarray:
    """[16, 3] of x, y, id, indices from 1 as MATLAB's."""
    points = pred[image - 1].annorect[rect - 1].annopoints.point
    return np.array([[point.x, point.y, point.id] for point in points])


def test_mpii_mat_reads_back(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, "mpii")
    poses = poses_of(truth, np.random.default_rng(1))
    path = write_submission("mpii", tmp_path, poses, [], truth, "gt")
    pred = loadmat(path, struct_as_record=False)["pred"]
    assert pred.shape == (1, 3)  # a row of structs, every picture of the file
    assert [str(np.squeeze(each.image[0, 0].name)) for each in pred[0]] == ["7.jpg", "3.jpg", "5.jpg"]
    squeezed = loadmat(path, struct_as_record=False)["pred"][0]
    assert squeezed[1].annorect.size == 0
    assert [squeezed[place].annorect.shape for place in (0, 2)] == [(1, 1), (1, 2)]
    expected = np.roll(poses.keypoints, -1, axis=1) + 1
    for row, (image, rect) in enumerate(((0, 0), (2, 0), (2, 1))):
        points = squeezed[image].annorect[0, rect].annopoints[0, 0].point[0]
        found = np.array([[np.squeeze(getattr(point, axis)) for axis in ("x", "y", "id")] for point in points])
        np.testing.assert_array_equal(found[:, :2], expected[row])
        np.testing.assert_array_equal(found[:, 2], np.arange(16))


def test_mpii_boxes_say_which_annorect_they_are_of(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, "mpii")
    poses = poses_of(truth, np.random.default_rng(1))
    records = [{"image_id": image, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1.0} for image in (7, 5, 5)]
    for record, rect in zip(records, (3, 2, 1), strict=True):
        record["annorect"] = rect
    boxes = str(write(tmp_path / "boxes.json", records))
    check_submission("mpii", truth, boxes)
    path = write_submission("mpii", tmp_path, poses, [], truth, boxes)
    pred = loadmat(path, struct_as_record=False, squeeze_me=True)["pred"]
    assert [np.size(rect.annopoints) for rect in pred[0].annorect] == [0, 0, 1]
    expected = np.roll(poses.keypoints, -1, axis=1) + 1
    for row, (image, rect) in enumerate(((1, 3), (3, 2), (3, 1))):
        np.testing.assert_array_equal(points_of(pred, image, rect)[:, :2], expected[row])
    whole = mpii_mat(poses, truth, [3, 2, 1], list(range(16)))
    assert len(whole) > 300

    for change, message in (
        ({"annorect": 1}, "boxes.json: box 2: field annorect: 1 is not a number from 1 that its image has once"),
        ({"annorect": 0}, "box 1: field annorect: 0 is not"),
        ({"score": 0.1, "annorect": 2}, "boxes.json: 1 of its boxes are of another image or category or scored under"),
    ):
        changed = [dict(record) for record in records]
        changed[1] |= change
        with pytest.raises(UserError, match=message):
            check_submission("mpii", truth, str(write(tmp_path / "boxes.json", changed)), 0.5)
    with pytest.raises(UserError, match="it takes a top-down model and boxes"):
        check_submission("mpii", truth, "gt", single_stage=True)


@pytest.mark.parametrize(("kind", "other"), [("coco", "mpii"), ("mpii", "crowdpose"), ("crowdpose", "coco")])
def test_joints_that_do_not_fit_are_refused(tmp_path: Path, kind: Kind, other: Kind) -> None:
    count = {"coco": 17, "mpii": 16, "crowdpose": 14}[kind]
    with pytest.raises(UserError, match=rf"submit {kind}: its {count} joints are {SKELETONS[kind]}'s, .* lacks "):
        check_submission(kind, truth_of(tmp_path, other), "gt")


def test_submissions_of_a_hidden_test_set(
    files: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through `test`, of the stick figure's three joints: COCO's has what predictions.json has, MPII's all boxes."""
    hidden = config_for_test(
        files,
        annotations=hidden_file(files),
        boxes=str(detections(files)),
        baseline_annotations=None,
        submit="coco",
    )
    with pytest.raises(UserError, match="submit coco: its 17 joints are coco17's, and the model or image_info"):
        test.main(hidden)
    assert not (files / "out").exists()
    stick = str(files / "stick.yaml")
    write(files / "stick.yaml", {"name": "stick", "joints": ["right_foot", "head", "left_foot"]})
    monkeypatch.setattr("evaluation.submission.SKELETONS", {"coco": stick, "mpii": stick})
    test.main(hidden)
    written = json.loads((files / "out" / "predictions.json").read_text())
    path = next((files / "out").glob("*.zip"))
    assert f"submission: {path}" in capsys.readouterr().err
    with zipfile.ZipFile(path) as archive:
        records = json.loads(archive.read(archive.namelist()[0]))
    ours = np.reshape([record["keypoints"] for record in written], (-1, 3, 3))[:, [2, 0, 1], :2]
    np.testing.assert_array_equal(np.reshape([r["keypoints"] for r in records], (-1, 3, 3))[..., :2], ours.round(1))
    assert [r["score"] for r in records] == [r["score"] for r in written]

    test.main(fields.TestConfig(**{**vars(hidden), "submit": "mpii"}))
    pred = loadmat(files / "out" / "pred_keypoints_mpii.mat", struct_as_record=False)["pred"][0]
    assert [image.annorect.shape[1] for image in pred] == [2, 1, 1]  # one box twice, which OKS-NMS leaves one of
    assert len(records) == 3
    with pytest.raises(ValueError, match="submit coco needs out"):
        fields.TestConfig(**{**vars(hidden), "out": None})
