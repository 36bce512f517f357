from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import loadmat, savemat

from poserelay.__main__ import main
from poserelay.convert import SKELETONS, Pictures, tidy_coco
from poserelay.convert.mpii import crop_box
from poserelay.convert.ochuman import max_ious
from poserelay.datasets.coco import CocoAnnotations, read_coco
from poserelay.errors import UserError
from poserelay.geometry import box_to_affine
from poserelay.keypoints import load_skeleton, resolve_skeleton

DATA = os.environ.get("POSERELAY_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="POSERELAY_DATA names no folder of real data")


def real(*parts: str) -> Path:
    return Path(DATA or "", *parts)


def picture(folder: Path, name: str, size: tuple[int, int]) -> None:
    """A picture of (width, height)."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", size).save(folder / name)


def written(tmp_path: Path, value: Any, name: str = "source.json") -> Path:
    (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
    return tmp_path / name


def convert(dataset: str, source: Path, out: Path, images: Path | None = None, *more: object) -> int:
    pictures = [] if images is None else ["--images", str(images)]
    given = ["--dataset", dataset, "--annotations", str(source), "--out", str(out)]
    return main(["convert", *given, *pictures, *map(str, more)])


def converted(dataset: str, source: Path, tmp_path: Path, images: Path | None = None, *more: object) -> CocoAnnotations:
    """What `read_coco` makes of the file, which has the joints of the packaged skeleton and equal bytes each time."""
    out = tmp_path / "out.json"
    assert convert(dataset, source, out, images, *more) == 0
    first = out.read_bytes()
    assert convert(dataset, source, out, images, *more) == 0
    assert out.read_bytes() == first
    found = read_coco(out)
    assert resolve_skeleton("auto", found.category) == load_skeleton(SKELETONS[dataset])
    return found


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return json.loads((tmp_path / "out.json").read_text())["annotations"]


def refusal(
    capsys: pytest.CaptureFixture[str], dataset: str, source: Path, out: Path, images: Path | None = None, *more: object
) -> str:
    """The message of a conversion that is the user's mistake and writes nothing."""
    before = out.read_bytes() if out.is_file() else None
    assert convert(dataset, source, out, images, *more) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) <= 2
    assert (out.read_bytes() if out.is_file() else None) == before
    return message


# MPII


def hrnet_affine(center: list[float], scale: float, width: int, height: int) -> np.ndarray:
    """As HRNet's mpii.py and transforms.py do it, step by step: from MPII's numbers to the 2x3 map of the crop."""
    c = np.array(center)
    s = scale
    c[1] = c[1] + 15 * s
    s = s * 1.25
    c = c - 1
    source_width = s * 200
    up = np.array([0.0, -source_width / 2])
    source = [c, c + up, c + up + np.array([up[1], up[0]])]
    middle, up = np.array([width / 2, height / 2]), np.array([0.0, -width / 2])
    target = [middle, middle + up, middle + up + np.array([up[1], up[0]])]
    points = np.column_stack([np.array(source), np.ones(3)])
    return np.linalg.solve(points, np.array(target)).T


@pytest.mark.parametrize("size", [(256, 256), (192, 256), (384, 384)])
def test_an_mpii_crop_is_hrnets(size: tuple[int, int]) -> None:
    width, height = size
    draws = np.random.default_rng(0)
    for x, y, scale in np.column_stack([draws.uniform(-50, 2000, (40, 2)), draws.uniform(0.1, 12, 40)]).tolist():
        ours = box_to_affine(crop_box((x, y), scale), (height, width), padding=1.25)
        np.testing.assert_allclose(ours, hrnet_affine([x, y], scale, width, height), rtol=1e-9, atol=1e-7)


def listed(image: str, **fields: Any) -> dict[str, Any]:
    """A record of HRNet's lists; joint k lies at (10 + k, 20 + k), pixels from 1."""
    joints = [[10.0 + k, 20.0 + k] for k in range(16)]
    return {"image": image, "center": [18, 21], "scale": 0.1, "joints": joints, "joints_vis": [1] * 16, **fields}


def test_mpii_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "images", "a.jpg", (90, 60))
    picture(tmp_path / "images", "b.png", (80, 70))
    people = [
        listed("a.jpg", joints_vis=[0, 1] + [1] * 14),
        listed("b.png", center=[-1, -1]),
        listed("a.jpg", center=[500, 500]),
        listed("b.png", scale=0),
        listed("b.png", joints_vis=[0] * 16),
    ]
    found = converted("mpii", written(tmp_path, people), tmp_path, tmp_path / "images")
    assert found.file_names == ["a.jpg", "b.png"]
    np.testing.assert_array_equal(found.image_sizes, [[60, 90], [70, 80]])
    np.testing.assert_array_equal(found.ids, [1, 5])
    np.testing.assert_array_equal(found.persons, [0])
    np.testing.assert_array_equal(found.visibility[0], [0] + [2] * 15)
    np.testing.assert_array_equal(found.keypoints[0, :3], [[0, 0], [10, 20], [11, 21]])
    # The centre is (17, 20) from 0 and moves down by 1.5, the side is 20.
    np.testing.assert_allclose(found.boxes[0], [7, 11.5, 20, 20])
    assert [record["bbox_clip"] for record in records(tmp_path)] == [False, False]
    report = capsys.readouterr().err
    assert "2 pictures, 2 persons, 1 of them with labelled joints" in report
    assert "left out: 2 persons without a position or a scale" in report
    assert "left out: 1 persons whose box lies outside its picture" in report
    assert "PCKh needs --head_boxes" in report


def test_mpii_head_boxes_of_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "images", "a.jpg", (90, 60))
    people = [listed("a.jpg"), listed("a.jpg", joints_vis=[0] + [1] * 15)]
    source, heads = written(tmp_path, people), tmp_path / "gt.mat"
    joints = np.array([person["joints"] for person in people]).transpose(1, 2, 0)
    missing = 1 - np.array([person["joints_vis"] for person in people]).T
    boxes = np.zeros((2, 2, 2))
    boxes[:, :, 0] = [[11, 21], [14, 25]]
    boxes[:, :, 1] = [[31, 41], [37, 49]]
    content = {"pos_gt_src": joints, "jnt_missing": missing, "headboxes_src": boxes}
    savemat(heads, content)
    found = converted("mpii", source, tmp_path, tmp_path / "images", "--head_boxes", heads)
    assert [record["head_box"] for record in records(tmp_path)] == [[10, 20, 13, 24], [30, 40, 36, 48]]
    np.testing.assert_allclose(found.head_sizes, [0.6 * 5, 0.6 * 10])

    out = tmp_path / "other.json"
    for change, message in (
        ({"headboxes_src": boxes[..., :1]}, "1 head boxes for the 2 persons"),
        ({"headboxes_src": boxes * np.nan}, "NaN or infinity"),
        ({"pos_gt_src": joints[..., ::-1] + 3}, "person 1 (a.jpg): has other joints in"),
        ({"jnt_missing": missing * 0}, "person 2 (a.jpg): has other joints in"),
    ):
        savemat(heads, content | change)
        capsys.readouterr()
        assert message in refusal(capsys, "mpii", source, out, tmp_path / "images", "--head_boxes", heads)
    savemat(heads, {"preds": joints})
    message = refusal(capsys, "mpii", source, out, tmp_path / "images", "--head_boxes", heads)
    assert "no variable headboxes_src (it holds preds)" in message


EMPTY = np.zeros((0, 0))


def structs(*rows: dict[str, Any]) -> np.ndarray:
    """A struct array `[1, N]` as MATLAB has it: one set of fields for all, empty where a row has none."""
    fields = list(dict.fromkeys(field for row in rows for field in row))
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for index, row in enumerate(rows):
        for field in fields:
            array[field][0, index] = row.get(field, EMPTY)
    return array


def cells(*values: Any) -> np.ndarray:
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


def site_file(path: Path, pictures: np.ndarray, training: list[int], single: np.ndarray) -> None:
    release = {"annolist": pictures, "img_train": np.array([training]), "single_person": single, "version": "12"}
    savemat(path, {"RELEASE": release})


def point(joint: int, visible: Any = EMPTY) -> dict[str, Any]:
    return {"x": 10.5 + joint, "y": 20.25 + joint, "id": joint, "is_visible": visible}


def test_mpiis_test_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of its pictures in their order; a box for each person that has a position, with its annorect."""
    for name in ("z.jpg", "a.jpg"):
        picture(tmp_path / "images", name, (90, 60))
    placed = {"scale": 0.1, "objpos": {"x": 18, "y": 21}}
    other = {"scale": 0.2, "objpos": {"x": 30, "y": 31}}
    pictures = structs(
        {"image": {"name": "z.jpg"}, "annorect": structs({"scale": 0.1}, placed, other)},
        {"image": {"name": "known.jpg"}, "annorect": structs(placed)},
        {"image": {"name": "a.jpg"}},
    )
    source, out = tmp_path / "mpii.mat", tmp_path / "test.json"
    site_file(source, pictures, [0, 1, 0], cells(EMPTY, EMPTY, EMPTY))
    arguments = ["convert", "--dataset", "mpii", "--annotations", str(source), "--split", "test", "--out", str(out)]
    assert main([*arguments, "--images", str(tmp_path / "images")]) == 0
    written = json.loads(out.read_text())
    assert [(image["id"], image["file_name"]) for image in written["images"]] == [(1, "z.jpg"), (2, "a.jpg")]
    assert written["annotations"] == []
    boxes = json.loads((tmp_path / "test.boxes.json").read_text())
    common = {"image_id": 1, "category_id": 1, "score": 1.0}
    assert boxes == [
        {**common, "bbox": [7.0, 11.5, 20.0, 20.0], "annorect": 2},
        {**common, "bbox": [9.0, 13.0, 40.0, 40.0], "annorect": 3},
    ]
    assert "left out: 1 persons without a position or a scale" in capsys.readouterr().err

    (tmp_path / "images/a.jpg").unlink()
    assert main([*arguments, "--images", str(tmp_path / "images")]) == 2
    assert "a.jpg: missing or unreadable" in capsys.readouterr().err


def test_mpii_of_the_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b.jpg", "d.jpg"):
        picture(tmp_path / "images", name, (90, 60))
    placed = {"scale": 0.1, "objpos": {"x": 18, "y": 21}}
    head = {"x1": 11, "y1": 21, "x2": 14, "y2": 25}
    points = [point(6, "1"), point(9), point(0, "0"), point(1, 1), point(2, 0), point(15, np.array([[1.0]]))]
    several = structs(
        {**placed, **head, "annopoints": {"point": structs(*points)}},
        {**head, "annopoints": {"point": structs(point(9))}},
        {**placed, "annopoints": {"point": structs(point(9))}},
        placed,
    )
    pictures = structs(
        {"image": {"name": "a.jpg"}, "annorect": several},
        {"image": {"name": "t.jpg"}, "annorect": structs(placed)},
        {"image": {"name": "b.jpg"}},
        {"image": {"name": "d.jpg"}, "annorect": {**placed, "annopoints": {"point": structs(point(3, "1"))}}},
        {"image": {"name": "lost.jpg"}, "annorect": placed},
    )
    source = tmp_path / "mpii.mat"
    site_file(source, pictures, [1, 0, 1, 1, 1], cells(np.array([[1], [3]]), EMPTY, EMPTY, 1, EMPTY))
    found = converted("mpii", source, tmp_path, tmp_path / "images", "--max_unreadable", 0.25)
    assert found.file_names == ["a.jpg", "b.jpg", "d.jpg"]
    assert found.image_ids == [1, 2, 3]
    np.testing.assert_array_equal(found.ids, [1, 3, 4, 5])
    np.testing.assert_array_equal(found.image_index, [0, 0, 0, 2])
    by_joint = dict(enumerate(found.visibility[0]))
    assert {joint: seen for joint, seen in by_joint.items() if seen} == {0: 1, 1: 2, 2: 1, 6: 2, 9: 2, 15: 2}
    np.testing.assert_allclose(found.keypoints[0, [0, 15]], [[9.5, 19.25], [24.5, 34.25]])
    np.testing.assert_array_equal(found.visibility[1:].sum(axis=1), [2, 0, 2])
    np.testing.assert_allclose(found.boxes, [[7, 11.5, 20, 20]] * 4)
    assert [record.get("head_box") for record in records(tmp_path)] == [[10, 20, 13, 24], None, None, None]
    assert [record["single_person"] for record in records(tmp_path)] == [True, True, False, True]
    report = capsys.readouterr().err
    for line in (
        "left out: 1 pictures of the test set",
        "left out: 1 pictures that are missing or unreadable",
        "left out: 1 persons on a picture that is missing or unreadable",
        "left out: 1 persons without a position or a scale",
        "1 of the persons have a head box",
    ):
        assert line in report

    out = tmp_path / "other.json"
    message = refusal(capsys, "mpii", source, out, tmp_path / "images")
    assert "lost.jpg: missing or unreadable, as 1 of 4 pictures are" in message
    message = refusal(capsys, "mpii", source, out, tmp_path / "images", "--head_boxes", source)
    assert "has head boxes itself" in message


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (structs(point(16)), "annolist(1).annorect(1) (a.jpg): a point without x, y or an id of 0 to 15"),
        (structs({"x": 1.0, "id": 3}), "annolist(1).annorect(1) (a.jpg): a point without x, y"),
        (structs({**point(3), "y": np.nan}), "annolist(1).annorect(1) (a.jpg): a point without x, y"),
        (structs(point(3, "2")), "(a.jpg): field is_visible: found '2'"),
        (structs(point(3, "yes")), "(a.jpg): field is_visible: found 'yes'"),
    ],
)
def test_bad_points_of_the_site_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], points: np.ndarray, message: str
) -> None:
    person = {"scale": 1.0, "objpos": {"x": 18, "y": 21}, "annopoints": {"point": points}}
    source = tmp_path / "mpii.mat"
    site_file(source, structs({"image": {"name": "a.jpg"}, "annorect": person}), [1], cells(EMPTY))
    assert message in refusal(capsys, "mpii", source, tmp_path / "out.json", tmp_path)


@needs_data
def test_mpii_real_gives_the_published_pckh(tmp_path: Path) -> None:
    source, heads = real("mpii", "valid.json"), real("mpii", "gt_valid.mat")
    found = converted("mpii", source, tmp_path, real("mpii", "images"), "--head_boxes", heads)
    assert (len(found.image_ids), len(found.persons)) == (60, 65)
    for box, person in zip(found.boxes, json.loads(source.read_text()), strict=True):
        expected = hrnet_affine(person["center"], person["scale"], 256, 256)
        np.testing.assert_allclose(box_to_affine(box, (256, 256)), expected, rtol=1e-9, atol=1e-8)
    # gt_valid.mat and the list have the same positions, pixels from 1.
    positions = loadmat(heads)["pos_gt_src"].transpose(2, 0, 1)
    labelled = found.visibility > 0
    np.testing.assert_array_equal(found.keypoints[labelled], positions[labelled] - 1)
    # HRNet's predictions count pixels from 1, ours from 0.
    predicted = loadmat(real("mpii", "pred.mat"))["preds"] - 1
    correct = counted = 0
    for record, joints in zip(records(tmp_path), predicted, strict=True):
        x1, y1, x2, y2 = record["head_box"]
        size = 0.6 * np.hypot(x2 - x1, y2 - y1)
        for joint in set(range(16)) - {6, 7}:
            x, y, visibility = record["keypoints"][3 * joint : 3 * joint + 3]
            if visibility:
                counted += 1
                correct += np.hypot(joints[joint][0] - x, joints[joint][1] - y) / size <= 0.5
    assert round(100 * correct / counted, 3) == 82.110


@needs_data
def test_mmposes_mpii_list_is_the_same(tmp_path: Path) -> None:
    found = converted("mpii", real("samples", "mpii", "test_mpii.json"), tmp_path, real("samples", "mpii"))
    assert len(found.persons) == 5
    (tmp_path / "out.json").unlink()
    reference = converted("mpii", real("mpii", "valid.json"), tmp_path, real("mpii", "images"))
    for row, name in enumerate(found.file_names):
        if name in reference.file_names:
            same = reference.image_index == reference.file_names.index(name)
            distance = np.abs(reference.keypoints[same] - found.keypoints[row]).max(axis=(1, 2))
            assert distance.min() < 0.01


# AI Challenger


def aic_list() -> list[dict[str, Any]]:
    joints = [value for k in range(14) for value in (10 + k, 20 + k, 1)]
    other = [*joints[:3], 30, 40, 2, 0, 0, 3, *joints[9:]]
    return [
        {
            "image_id": "a0f6",
            "url": "",
            "human_annotations": {"human1": [5, 6, 45, 56], "human2": [0, 0, 20, 30], "human3": [4, 4, 4, 9]},
            "keypoint_annotations": {"human2": other, "human1": joints, "human4": joints, "human3": joints},
        },
        {
            "image_id": "b1",
            "human_annotations": {"human1": [90, 6, 99, 56], "human2": [1, 2, 3, 4]},
            "keypoint_annotations": {"human1": joints},
        },
    ]


def test_aic_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a0f6.jpg", "b1.jpg"):
        picture(tmp_path / "images", name, (80, 60))
    found = converted("aic", written(tmp_path, aic_list()), tmp_path, tmp_path / "images")
    assert found.file_names == ["a0f6.jpg", "b1.jpg"]
    np.testing.assert_array_equal(found.ids, [1, 2, 6])
    np.testing.assert_array_equal(found.boxes, [[5, 6, 40, 50], [0, 0, 20, 30], [1, 2, 2, 2]])
    np.testing.assert_array_equal(found.visibility, [[2] * 14, [2, 1, 0] + [2] * 11, [0] * 14])
    np.testing.assert_array_equal(found.keypoints[1, :4], [[10, 20], [30, 40], [0, 0], [13, 23]])
    np.testing.assert_allclose(found.areas[:2], [0.53 * 2000, 0.53 * 600])
    report = capsys.readouterr().err
    assert "2 pictures, 3 persons, 2 of them with labelled joints" in report
    for reason in ("without a box", "whose box has no area", "whose box lies outside its picture"):
        assert f"left out: 1 persons {reason}" in report


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ((0, "image_id"), 5, "record 1: expected an object with image_id"),
        ((1, "human_annotations"), [], "record 2 (picture b1): field human_annotations"),
        ((0, "human_annotations", "human1"), [1, 2, 3], "a0f6, human1: field human_annotations: found [1, 2, 3]"),
        ((0, "keypoint_annotations", "human2", 5), 0, "picture a0f6, human2: field keypoint_annotations: a visibility"),
        ((0, "keypoint_annotations", "human2", 0), None, "a0f6, human2: field keypoint_annotations: found null among"),
        ((0, "keypoint_annotations", "human2"), [1] * 41, "expected 42 numbers"),
        ((0, "keypoint_annotations", "human1", 0), float("nan"), "a0f6, human1: field keypoint_annotations: found NaN"),
    ],
)  # fmt: skip
def test_bad_aic_records_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: tuple[Any, ...], value: Any, message: str
) -> None:
    for name in ("a0f6.jpg", "b1.jpg"):
        picture(tmp_path / "images", name, (80, 60))
    data: Any = aic_list()
    target = data
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    assert message in refusal(capsys, "aic", written(tmp_path, data), tmp_path / "out.json", tmp_path / "images")


@needs_data
def test_aic_layouts_agree_on_the_real_sample(tmp_path: Path) -> None:
    """The competition's list, rebuilt from mmpose's file, gives the same persons."""
    source = real("samples", "aic", "test_aic.json")
    found = converted("aic", source, tmp_path)
    assert (len(found.image_ids), len(found.persons)) == (3, 9)
    data = json.loads(source.read_text())
    np.testing.assert_array_equal(found.keypoints[0, 0], data["annotations"][0]["keypoints"][:2])
    pictures = {image["id"]: image["file_name"].removesuffix(".jpg") for image in data["images"]}
    record: dict[str, Any] = {
        name: {"image_id": name, "human_annotations": {}, "keypoint_annotations": {}} for name in pictures.values()
    }
    for person in data["annotations"]:
        x, y, width, height = person["bbox"]
        name, human = pictures[person["image_id"]], f"human{person['id']}"
        record[name]["human_annotations"][human] = [x, y, x + width, y + height]
        values = list(person["keypoints"])
        values[2::3] = [3 if v == 0 else 3 - v for v in values[2::3]]
        record[name]["keypoint_annotations"][human] = values
    (tmp_path / "out.json").unlink()
    again = converted("aic", written(tmp_path, list(record.values())), tmp_path, real("samples", "aic"))
    assert sorted(again.file_names) == sorted(found.file_names)

    def people(annotations: CocoAnnotations) -> list[Any]:
        rows = range(len(annotations.ids))
        names = [annotations.file_names[annotations.image_index[row]] for row in rows]
        parts = (annotations.boxes, annotations.visibility, annotations.keypoints)
        return sorted([names[row], *(part[row].tolist() for part in parts)] for row in rows)

    assert people(again) == people(found)


# LSP


def lsp_joints(number: int) -> np.ndarray:
    """`[14, 2]`, pixels from 1, of picture `number` from 1: 26 wide and 52 high."""
    return np.column_stack([11 + 2 * np.arange(14), 16 + 4 * np.arange(14)]) + number


def test_lsp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joints = np.zeros((3, 14, 4))
    for number in range(1, 5):
        picture(tmp_path / "images", f"im000{number}.jpg", (100 + number, 120))
        joints[:2, :, number - 1] = lsp_joints(number).T
    joints[2, 3, 2] = 1  # hidden in the third picture
    source = tmp_path / "joints.mat"
    savemat(source, {"joints": joints})
    found = converted("lsp", source, tmp_path, tmp_path / "images")
    assert found.image_ids == [1, 2, 3, 4]
    np.testing.assert_array_equal(found.image_sizes[:, 1], [101, 102, 103, 104])
    np.testing.assert_array_equal(found.keypoints[2], lsp_joints(3) - 1)
    assert found.visibility.sum() == 4 * 14 * 2 - 1
    assert found.visibility[2, 3] == 1
    # The margin is a tenth of the height, 52, on each side.
    np.testing.assert_allclose(found.boxes[0], [11 - 5.2, 16 - 5.2, 26 + 10.4, 52 + 10.4])
    train = converted("lsp", source, tmp_path, tmp_path / "images", "--split", "train")
    test = converted("lsp", source, tmp_path, tmp_path / "images", "--split", "test")
    assert train.file_names == ["im0001.jpg", "im0002.jpg"]
    assert test.file_names == ["im0003.jpg", "im0004.jpg"]
    assert test.image_ids == test.ids.tolist() == [3, 4]
    np.testing.assert_array_equal(test.keypoints, found.keypoints[2:])
    assert "2 pictures, 2 persons" in capsys.readouterr().err


def test_lsp_extended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joints = np.zeros((14, 3, 4))
    for number in range(1, 5):
        picture(tmp_path / "images", f"im0000{number}.jpg", (100, 120))
        joints[:, :2, number - 1] = lsp_joints(number)
        joints[:, 2, number - 1] = 1
    joints[5, :, 1] = (-30, np.nan, 0)  # no place, as it is not labelled
    joints[1:, 2, 2] = 0
    joints[:, :2, 3] += 500
    source = tmp_path / "joints.mat"
    savemat(source, {"joints": joints})
    found = converted("lsp", source, tmp_path, tmp_path / "images")
    np.testing.assert_array_equal(found.ids, [1, 2])
    np.testing.assert_array_equal(found.visibility[1], [2] * 5 + [0] + [2] * 8)
    np.testing.assert_array_equal(found.keypoints[0], lsp_joints(1) - 1)
    report = capsys.readouterr().err
    assert "left out: 1 persons without two labelled joints" in report
    assert "left out: 1 persons whose box lies outside its picture" in report

    out = tmp_path / "other.json"
    assert "all for training" in refusal(capsys, "lsp", source, out, tmp_path / "images", "--split", "test")
    joints[3, 0, 1] = np.inf
    savemat(source, {"joints": joints})
    assert "picture 2 (im00002.jpg): NaN or infinity" in refusal(capsys, "lsp", source, out, tmp_path / "images")
    joints[3, :, 1] = (3, 3, 2)
    savemat(source, {"joints": joints})
    assert "neither 0 nor 1" in refusal(capsys, "lsp", source, out, tmp_path / "images")
    savemat(source, {"joints": joints[:, :2]})
    assert "joints is 14 x 2 x 4, expected" in refusal(capsys, "lsp", source, out, tmp_path / "images")


# CrowdPose, and what COCO files share


def crowdpose_file() -> dict[str, Any]:
    joints = list(load_skeleton("crowdpose14").joints)
    keypoints = [value for k in range(14) for value in (10 + k, 20 + k, 2)]
    person = {"category_id": 1, "image_id": 7, "bbox": [5, 6, 40, 50], "keypoints": keypoints, "iscrowd": 0}
    data = {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 80, "height": 60, "crowdIndex": 0.25, "coco_url": "x"},
            {"id": 8, "file_name": "b.jpg", "width": 90, "height": 60},
        ],
        "annotations": [{**person, "id": number, "num_keypoints": 3} for number in (3, 4, 5)],
        "categories": [{"id": 1, "name": "person", "keypoints": joints, "skeleton": [[16, 14]]}],
    }
    return json.loads(json.dumps(data))  # so that no two records share a list


def test_crowdpose_leaves_out_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = crowdpose_file()
    first, second, third = data["annotations"]
    more = [
        {"id": 5},
        {"id": 11, "image_id": 99},
        {"id": 12, "bbox": [5, 5, 0, 9]},
        {"id": 13, "bbox": [80, 5, 4, 9]},
        {"id": 14, "category_id": 2},
    ]
    data["annotations"] += [{**first, **change} for change in more]
    second |= {"keypoints": [0, 0, 0] * 14, "bbox": [-20, 0, 10, 0]}
    third |= {"keypoints": [5, 5, 0, *third["keypoints"][3:]], "area": 77.5, "iscrowd": True}
    data["images"].append(dict(data["images"][0]))
    # The joints in another order, and in other spelling.
    data["categories"][0]["keypoints"] = [
        joint.replace("_", " ").title() for joint in data["categories"][0]["keypoints"]
    ]
    names = data["categories"][0]["keypoints"]
    names[0], names[13] = names[13], names[0]
    found = converted("crowdpose", written(tmp_path, data), tmp_path)
    np.testing.assert_array_equal(found.ids, [3, 4, 5])
    np.testing.assert_array_equal(found.keypoints[0, [0, 1, 13]], [[23, 33], [11, 21], [10, 20]])
    np.testing.assert_array_equal(found.visibility.sum(axis=1), [28, 0, 26])
    np.testing.assert_array_equal(found.keypoints[2, 13], [0, 0])
    # the file's own, wrong as they are: CrowdPose's evaluator goes by them
    assert [record["num_keypoints"] for record in records(tmp_path)] == [3, 3, 3]
    np.testing.assert_allclose(found.areas, [0.53 * 2000, 0, 77.5])
    assert found.iscrowd.tolist() == [False, False, True]
    images = json.loads((tmp_path / "out.json").read_text())["images"]
    assert images[0] == {"id": 7, "file_name": "a.jpg", "width": 80, "height": 60, "crowdIndex": 0.25}
    report = capsys.readouterr().err
    for line in (
        "1 images whose id appeared before",
        "1 persons whose id appeared before",
        "1 persons whose image is not in the file",
        "1 persons whose box has no area",
        "1 persons whose box lies outside its picture",
        "1 persons of another category",
        "1 pictures have no crowdIndex",
    ):
        assert line in report
    # What has been converted is a file of the same layout, and already tidy.
    assert convert("crowdpose", tmp_path / "out.json", tmp_path / "again.json") == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "out.json").read_bytes()
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("images", 0, "id"), "7", "image '7': expected an object with an integer id"),
        (("images", 0, "width"), 0, "image 7: fields width and height: found [0, 60]"),
        (("images", 0, "height"), None, "image 7: fields width and height: found null among its 2"),
        (("images", 0, "file_name"), 4, "image 7: field file_name: found 4"),
        (("images", 0, "crowdIndex"), "high", "image 7: field crowdIndex: found 'high'"),
        (("annotations", 1), 4, "annotation 4: expected an object"),
        (("annotations", 1, "image_id"), None, "annotation 4: expected an object with an integer id and image_id"),
        (("annotations", 1, "bbox"), None, "annotation 4: field bbox: found null, expected 4 numbers"),
        (("annotations", 1, "keypoints"), [1, 2, 2], "annotation 4: field keypoints: found [1, 2, 2], expected 42"),
        (("annotations", 1, "keypoints", 2), 3, "annotation 4: field keypoints: a visibility is not 0, 1 or 2"),
        (("annotations", 1, "keypoints", 0), float("inf"), "annotation 4: field keypoints: found Infinity"),
        (("annotations", 1, "area"), 10**400, "annotation 4: field area: found 1000"),
        (("annotations", 1, "area"), -2, "annotation 4: field area: found -2"),
        (("categories", 0, "keypoints", 3), "tail", "category 'person' has other joints (left_shoulder,"),
        (("categories", 0, "keypoints"), [], "0 categories with keypoints"),
        (("images",), {}, "not a COCO file: no lists images and annotations"),
        (("annotations",), [], "no person left to convert (it has none)"),
    ],
)  # fmt: skip
def test_bad_coco_records_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: tuple[Any, ...], value: Any, message: str
) -> None:
    data: Any = crowdpose_file()
    target = data
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    assert message in refusal(capsys, "crowdpose", written(tmp_path, data), tmp_path / "out.json")


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 120), st.floats(-50, 150), st.text(max_size=3), st.just(float("nan"))
)
VALUES = st.one_of(SCALARS, st.lists(st.integers(-100, 100), min_size=4, max_size=4), st.lists(SCALARS, max_size=4))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), VALUES), min_size=1, max_size=3))
def test_whatever_is_not_refused_can_be_read(tmp_path: Path, changes: list[tuple[int, int, Any]]) -> None:
    file = crowdpose_file()
    for number, field, value in changes:
        record = [*file["images"], *file["annotations"]][number]
        record[list(record)[field % len(record)]] = value
    skeleton = load_skeleton("crowdpose14")
    try:
        found = tidy_coco(Path("file.json"), file, skeleton)
    except UserError:
        return
    out = tmp_path / "out.json"
    categories = [{"id": 1, "name": "person", "keypoints": list(skeleton.joints)}]
    out.write_text(json.dumps({"images": found.images, "annotations": found.annotations, "categories": categories}))
    assert len(read_coco(out).ids) + sum(found.dropped.values()) >= 3


@needs_data
def test_crowdpose_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(real("crowdpose", "crowdpose_val.json").read_text())
    data["images"] = data["images"][:200]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [person for person in data["annotations"] if person["image_id"] in kept]
    source = written(tmp_path, data)
    before = read_coco(source)
    assert len(before.persons) > 500
    assert convert("crowdpose", source, tmp_path / "out.json") == 0
    counts = f"200 pictures, {len(before.ids)} persons, {len(before.persons)} of them with labelled joints"
    assert counts in capsys.readouterr().err
    found = read_coco(tmp_path / "out.json")
    for field in ("ids", "image_index", "image_sizes", "boxes", "areas", "keypoints", "visibility", "iscrowd"):
        np.testing.assert_array_equal(getattr(found, field), getattr(before, field))
    images = json.loads((tmp_path / "out.json").read_text())["images"]
    crowding = {image["id"]: image["crowdIndex"] for image in data["images"]}
    assert {image["id"]: image["crowdIndex"] for image in images} == crowding


# OCHuman

OCHUMAN_JOINTS = [
    *("right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist", "right_hip"),
    *("right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "head", "neck", "right_ear", "left_ear"),
    *("nose", "right_eye", "left_eye"),
]
MASK = {"outer": [[5, 5, 9, 5, 9, 9]], "inner": [], "height": 60, "width": 80}


def ochuman_person(**fields: Any) -> dict[str, Any]:
    """A whole person; joint k of the file's lies at (10 + k, 20 + k), with the codes 0, 1, 2, 3 in turn."""
    keypoints = [value for k in range(19) for value in (10 + k, 20 + k, k % 4)]
    return {"bbox": [5, 6, 45, 56], "keypoints": keypoints, "segms": MASK, "max_iou": 0.6, **fields}


def ochuman_picture(number: str, *people: dict[str, Any]) -> dict[str, Any]:
    size = {"width": 80, "height": 60}
    return {"image_id": number, "file_name": f"{number}.jpg", **size, "annotations": list(people)}


def ochuman_file(*pictures: dict[str, Any]) -> dict[str, Any]:
    codes = {"missing": 0, "vis": 1, "self_occluded": 2, "others_occluded": 3}
    return {"keypoint_names": OCHUMAN_JOINTS, "keypoint_visible": codes, "images": list(pictures)}


def as_its_api_has_it(data: dict[str, Any], low: float = 0.0, high: float = 1.0) -> list[dict[str, Any]]:
    """Persons as OCHumanApi's toCocoFormart writes them, without masks and with the file names instead of its ids."""
    written = []
    for picture in sorted(data["images"], key=lambda picture: picture["image_id"]):
        for person in picture["annotations"]:
            if not person["keypoints"] or not person["segms"] or not low <= person["max_iou"] < high:
                continue
            x1, y1, x2, y2 = person["bbox"]
            keypoints, count = [], 0
            for joint in load_skeleton("coco17").joints:
                start = 3 * OCHUMAN_JOINTS.index(joint)
                x, y, v = person["keypoints"][start : start + 3]
                count += v in (1, 2, 3)
                keypoints += [x, y, {0: 0, 1: 2, 2: 2, 3: 1}[v]] if v else [0, 0, 0]
            box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
            fields = {"bbox": box, "area": area, "keypoints": keypoints, "num_keypoints": count, "iscrowd": 0}
            written.append({"file": picture["file_name"], **fields})
    return written


def named(tmp_path: Path) -> list[dict[str, Any]]:
    """The records of out.json with their file names instead of ids."""
    images = json.loads((tmp_path / "out.json").read_text())["images"]
    names = {image["id"]: image["file_name"] for image in images}
    kept = ("bbox", "area", "keypoints", "num_keypoints", "iscrowd")
    return [{"file": names[r["image_id"]]} | {field: r[field] for field in kept} for r in records(tmp_path)]


def test_ochuman(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ochuman_file(
        ochuman_picture("000020", ochuman_person(max_iou=0.75), ochuman_person(bbox=[0, 0, 10, 20], max_iou=0.5)),
        ochuman_picture("000007", ochuman_person(keypoints=None), ochuman_person(max_iou=0.7499)),
        ochuman_picture("000009", ochuman_person(segms=None), ochuman_person(keypoints=None)),
        ochuman_picture("000030", ochuman_person(max_iou=0.1)),
    )
    source = written(tmp_path, data)
    found = converted("ochuman", source, tmp_path)
    assert found.file_names == ["000007.jpg", "000020.jpg", "000030.jpg"]
    assert (found.image_ids, found.ids.tolist()) == ([1, 2, 3], [1, 2, 3, 4])
    assert named(tmp_path) == as_its_api_has_it(data)
    assert found.areas.tolist() == [2000, 2000, 200, 2000]  # the whole box
    report = capsys.readouterr().err
    assert "left out: 1 persons without joints and a mask" in report
    assert "left out: 1 pictures without a person with joints and a mask" in report

    moderate = converted("ochuman", source, tmp_path, None, "--iou_range", "[0.5,0.75]")
    assert named(tmp_path) == as_its_api_has_it(data, 0.5, 0.75)
    # The ids of the whole file, so that its detections serve.
    assert (moderate.image_ids, moderate.ids.tolist()) == ([1, 2], [1, 3])
    report = capsys.readouterr().err
    assert "left out: 2 persons with a MaxIoU outside [0.5, 0.75)" in report
    assert "left out: 1 pictures without a person in that range" in report
    converted("ochuman", source, tmp_path, None, "--iou_range", "[0.75,1]")
    assert named(tmp_path) == as_its_api_has_it(data, 0.75, 1)
    capsys.readouterr()
    message = refusal(capsys, "ochuman", source, tmp_path / "no.json", None, "--iou_range", "[0.9,1]")
    assert "no person left to convert" in message


def test_ochuman_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """val is the first 2,500 pictures with a whole person, by id; each split's ids count from 1."""
    pictures = [ochuman_picture(f"{number:06d}", ochuman_person()) for number in range(2503, 0, -1)]
    pictures[2000]["annotations"] = []
    source = written(tmp_path, ochuman_file(*pictures))  # picture 503 has nobody
    out = tmp_path / "out.json"
    assert convert("ochuman", source, out, None, "--split", "val") == 0
    val = read_coco(out)
    assert (len(val.ids), val.file_names[0], val.file_names[-1]) == (2500, "000001.jpg", "002501.jpg")
    assert "000503.jpg" not in val.file_names
    assert convert("ochuman", source, out, None, "--split", "test") == 0
    test = read_coco(out)
    assert (test.file_names, test.image_ids, test.ids.tolist()) == (["002502.jpg", "002503.jpg"], [1, 2], [1, 2])
    assert "left out: 2500 pictures of the other split" in capsys.readouterr().err
    # What it wrote is a COCO file, which is one part, and stays as it is.
    again = tmp_path / "again.json"
    assert "is no ochuman.json but one part" in refusal(capsys, "ochuman", out, again, None, "--split", "val")
    assert convert("ochuman", out, again) == 0
    assert again.read_bytes() == out.read_bytes()


def test_ochuman_overlaps_are_computed_where_they_are_not_stated(tmp_path: Path) -> None:
    # The first two share 30 x 10 of 500: IoU 0.6. The third, who has no mask, lies within the second: 250 of 400.
    boxes = [[0, 0, 40, 10], [10, 0, 50, 10], [20, 0, 45, 10]]
    people = [ochuman_person(bbox=box) for box in boxes]
    people[2]["segms"] = None
    for person in people[:2]:
        del person["max_iou"]
    source = written(tmp_path, ochuman_file(ochuman_picture("000001", *people)))
    found = converted("ochuman", source, tmp_path, None, "--iou_range", "[0.6,0.62]")
    assert found.ids.tolist() == [1]
    found = converted("ochuman", source, tmp_path, None, "--iou_range", "[0.62,1]")
    assert found.ids.tolist() == [2]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.integers(0, 9)] * 2, *[st.integers(1, 9)] * 2), max_size=5))
def test_max_iou_is_that_of_the_boxes_as_pixels(boxes: list[tuple[int, int, int, int]]) -> None:
    pixels = [{(x, y) for x in range(a, a + w) for y in range(b, b + h)} for a, b, w, h in boxes]
    expected = [
        max((len(one & other) / len(one | other) for j, other in enumerate(pixels) if i != j), default=0.0)
        for i, one in enumerate(pixels)
    ]
    assert max_ious(boxes) == expected


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("keypoint_names", 0), "tail", "keypoint_names without COCO's 17 joints"),
        (("images",), {}, "no list images"),
        (("images", 0), [], "picture number 1: expected an object with image_id"),
        (("images", 1, "image_id"), "000001", "picture number 2: image_id '000001' appears twice"),
        (("images", 1, "image_id"), 2, "picture number 2: image_id 2 appears twice, or is of another kind"),
        (("images", 0, "annotations"), None, "picture number 1 (000001): field annotations: expected a list"),
        (("images", 0, "annotations", 0), 5, "picture number 1 (000001): field annotations: expected a list"),
        (("images", 0, "width"), None, "picture 000001: fields width and height: found null among"),
        (("images", 0, "annotations", 0, "bbox"), [1, 2], "picture 000001, person 1: field bbox: found [1, 2]"),
        (("images", 0, "annotations", 0, "keypoints"), [1], "picture 000001, person 1: field keypoints: found [1]"),
        (("images", 0, "annotations", 0, "keypoints", 2), 4, "field keypoints: a visibility is not 0, 1, 2 or 3"),
    ],
)  # fmt: skip
def test_bad_ochuman_records_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: tuple[Any, ...], value: Any, message: str
) -> None:
    pictures = [ochuman_picture(number, ochuman_person()) for number in ("000001", "000002")]
    data: Any = json.loads(json.dumps(ochuman_file(*pictures)))
    target = data
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    assert message in refusal(capsys, "ochuman", written(tmp_path, data), tmp_path / "out.json")


@needs_data
def test_ochuman_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two pairs of the sample overlap by 0.588 and 0.781; of their boxes the areas are the whole."""
    source = real("samples", "ochuman", "test_ochuman.json")
    before = read_coco(source)
    found = converted("ochuman", source, tmp_path)
    for field in ("ids", "boxes", "areas", "keypoints", "visibility"):
        np.testing.assert_array_equal(getattr(found, field), getattr(before, field))
    np.testing.assert_array_equal(found.areas, found.boxes[:, 2] * found.boxes[:, 3])
    assert converted("ochuman", source, tmp_path, None, "--iou_range", "[0.5,0.75]").ids.tolist() == [2, 3]
    assert converted("ochuman", source, tmp_path, None, "--iou_range", "[0.75,1]").ids.tolist() == [4, 5]
    assert "MaxIoU is of the boxes in this file" in capsys.readouterr().err


# PoseTrack18


def posetrack_frame(number: int, **fields: Any) -> dict[str, Any]:
    """A frame as the site has it: without its size."""
    name = f"images/val/{number // 10:06d}_mpii_test/{number % 10:06d}.jpg"
    return {"id": number, "frame_id": number, "file_name": name, "vid_id": "1", "is_labeled": True, **fields}


def posetrack_person(number: int, **fields: Any) -> dict[str, Any]:
    """Joints at (20 + k, 10 + 2k), the ears not labelled."""
    keypoints = [v for k in range(17) for v in ((0, 0, 0) if k in (3, 4) else (20 + k, 10 + 2 * k, 1))]
    placed = {"bbox": [1, 2, 30, 40], "bbox_head": [20, 8, 3, 4], "track_id": 0, "scores": [], "category_id": 1}
    return {"id": number, "image_id": number // 100, "keypoints": keypoints, **placed, **fields}


def posetrack_folder(tmp_path: Path) -> Path:
    """Two videos: a labelled frame each and another, four persons that can be used and an ignored region."""
    joints = list(load_skeleton("posetrack18").joints)
    regions = {"ignore_regions_x": [[5, 20, 10], []], "ignore_regions_y": [[1, 7, 31], []]}
    single = posetrack_person(1004)
    single |= {"bbox": None, "keypoints": [*single["keypoints"][:3], *[0, 0, 0] * 16]}
    boxless = posetrack_person(1001, bbox_head=[0, 0, 0, 0])
    del boxless["bbox"]
    videos = {
        "000001_mpii_test.json": (
            [posetrack_frame(10, **regions), posetrack_frame(11, is_labeled=False, **regions)],
            [posetrack_person(1000), boxless, posetrack_person(1100), single],
        ),
        "000002_mpii_test.json": (
            [posetrack_frame(20, width=64, height=48), posetrack_frame(21)],
            [posetrack_person(2000, keypoints=[0] * 51), posetrack_person(2001), posetrack_person(2100)],
        ),
    }
    folder = tmp_path / "val"
    folder.mkdir()
    category = {"id": 1, "name": "person", "keypoints": joints, "skeleton": [[16, 14]]}
    for name, (frames, people) in videos.items():
        content = {"images": frames, "annotations": people, "categories": [category]}
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    for name, size in (("000001_mpii_test/000000.jpg", (90, 60)), ("000002_mpii_test/000000.jpg", (9, 9))):
        (tmp_path / "images" / "val" / name).parent.mkdir(parents=True)
        picture(tmp_path / "images" / "val" / name.split("/")[0], "000000.jpg", size)
    return folder


def test_posetrack18(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = posetrack_folder(tmp_path)
    found = converted("posetrack18", folder, tmp_path, tmp_path, "--max_unreadable", 0.5)
    assert found.image_ids == [10, 20]  # 21's picture is missing
    np.testing.assert_array_equal(found.image_sizes, [[60, 90], [48, 64]])  # the file's own where it says them
    assert found.ids.tolist() == [1000, 1001, 2000, 2001, 2002]
    assert found.iscrowd.tolist() == [False] * 4 + [True]
    # Joints reach over (20, 10) to (36, 42); 15 % of 16 and 32 are 2.4 and 4.8. The region is a triangle.
    np.testing.assert_allclose(found.boxes[[0, 1, 4]], [[1, 2, 30, 40], [17.6, 5.2, 20.8, 41.6], [5, 1, 15, 30]])
    np.testing.assert_array_equal(found.visibility[0], [2, 2, 2, 0, 0] + [2] * 12)
    assert found.keypoints[0, 16].tolist() == [36, 42]
    assert found.visibility[2].sum() == 0
    np.testing.assert_allclose(found.head_sizes, [3, np.nan, 3, 3, np.nan])  # 0.6 of 5
    report = capsys.readouterr().err
    for line in (
        "2 pictures, 5 persons, 3 of them with labelled joints",
        "left out: 1 frames that are not labelled",
        "left out: 1 persons on a frame that is not labelled",
        "left out: 1 pictures that are missing or unreadable",
        "left out: 1 persons on a picture that is missing or unreadable",
        "left out: 1 persons without two labelled joints, which have no box",
        "1 of the persons are marked iscrowd",
    ):
        assert line in report
    more = ("--max_unreadable", 0.5, "--ignore_regions", "false")
    assert converted("posetrack18", folder, tmp_path, tmp_path, *more).ids.tolist() == [1000, 1001, 2000, 2001]


def test_posetrack18_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = posetrack_folder(tmp_path), tmp_path / "out.json"
    assert "does not say how large its pictures are" in refusal(capsys, "posetrack18", folder, out)
    inside = folder / "out.json"
    assert "is in the folder that --annotations reads" in refusal(capsys, "posetrack18", folder, inside, tmp_path)
    assert "no .json in it" in refusal(capsys, "posetrack18", tmp_path / "images", out, tmp_path)
    copy = folder / "copy.json"
    first = folder / "000001_mpii_test.json"
    copy.write_bytes(first.read_bytes())
    message = refusal(capsys, "posetrack18", folder, out, tmp_path, "--max_unreadable", 0.5)
    assert f"{copy}: image 10 is in {first} as well" in message
    copy.unlink()
    original = json.loads(first.read_text())
    for kind, field, value, expected in (
        ("images", "id", "10", "number 1 of its images: expected an object with integer id"),
        ("images", "file_name", 3, "image 10: field file_name: found 3"),
        ("images", "ignore_regions_x", [[1, 2, 3]], "image 10: fields ignore_regions_x and ignore_regions_y: expected"),
        ("images", "ignore_regions_x", [[1, 2], []], "ignore_regions_y: found [1, 7, 31], expected 2 numbers"),
        ("images", "ignore_regions_x", [5, 6], "image 10: fields ignore_regions_x and ignore_regions_y: expected"),
        ("annotations", "image_id", None, "number 1 of its annotations: expected an object with integer id and"),
        ("annotations", "bbox", [1, 2], "annotation 1000: field bbox: found [1, 2]"),
        ("annotations", "bbox_head", [1, 2], "annotation 1000: field bbox_head: found [1, 2]"),
        ("annotations", "keypoints", [1, 2], "annotation 1000: field keypoints: found [1, 2]"),
        ("categories", "keypoints", ["nose"], "has other joints (nose) than posetrack18"),
    ):  # fmt: skip
        data = json.loads(json.dumps(original))
        data[kind][0][field] = value
        first.write_text(json.dumps(data))
        message = refusal(capsys, "posetrack18", folder, out, tmp_path, "--max_unreadable", 1)
        assert expected in message
        assert first.name in message


@needs_data
def test_posetrack18_real(tmp_path: Path) -> None:
    """The folder of videos and mmpose's file of the same frames agree; boxes without the files' are the files'."""
    source = real("samples", "posetrack18", "annotations", "val")
    found = converted("posetrack18", source, tmp_path)
    assert (len(found.image_ids), len(found.persons), int(found.iscrowd.sum())) == (3, 14, 15)
    assert found.visibility[:, 3:5].sum() == 0  # the ears
    (tmp_path / "videos").mkdir()
    for file in source.iterdir():
        data = json.loads(file.read_text())
        for record in data["annotations"]:
            del record["bbox"]
        for record in data["images"]:
            del record["width"], record["height"]
        (tmp_path / "videos" / file.name).write_text(json.dumps(data))
    derived = converted("posetrack18", tmp_path / "videos", tmp_path, real("samples", "posetrack18"))
    np.testing.assert_allclose(derived.boxes, found.boxes, rtol=1e-9)
    np.testing.assert_array_equal(derived.image_sizes, found.image_sizes)

    def by_id(annotations: CocoAnnotations) -> list[Any]:
        parts = (annotations.boxes, annotations.keypoints, annotations.visibility)
        return sorted([number, *(part[row].tolist() for part in parts)] for row, number in enumerate(annotations.ids))

    one = converted("posetrack18", source.parent / "test_posetrack18_val.json", tmp_path)
    assert by_id(one)[:14] == by_id(found)[:14]
    assert sorted(one.boxes[one.iscrowd].tolist()) == sorted(found.boxes[found.iscrowd].tolist())


# The command


def test_out_is_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, crowdpose_file())
    assert "is no crowdpose file that we converted" in refusal(capsys, "crowdpose", source, source)
    (tmp_path / "folder.json").mkdir()
    assert "is no crowdpose file that we converted" in refusal(capsys, "crowdpose", source, tmp_path / "folder.json")
    out = tmp_path / "out.json"
    assert convert("crowdpose", source, out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "is no aic file that we converted" in refusal(capsys, "aic", source, out)
    assert "would write over what --annotations reads" in refusal(capsys, "crowdpose", out, out)


def test_fields_that_do_not_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = written(tmp_path, crowdpose_file()), tmp_path / "out.json"
    assert "only lsp and mpii have train and test" in refusal(capsys, "crowdpose", source, out, None, "--split", "test")
    for dataset, split in (("lsp", "val"), ("ochuman", "train"), ("posetrack18", "val")):
        assert f"split is {split}, but" in refusal(capsys, dataset, source, out, None, "--split", split)
    for dataset, value in (("crowdpose", "[0.5,0.75]"), ("ochuman", "[0.75,0.5]"), ("ochuman", "[0.5,1.5]")):
        message = refusal(capsys, dataset, source, out, None, "--iou_range", value)
        assert "expected ochuman's MaxIoU, 0 <= low < high <= 1" in message
    assert "they are posetrack18's" in refusal(capsys, "aic", source, out, None, "--ignore_regions", "false")
    assert "they are mpii's" in refusal(capsys, "aic", source, out, None, "--head_boxes", "x.mat")
    for dataset, value in (("mpii", [listed("a.jpg")]), ("aic", aic_list())):
        message = refusal(capsys, dataset, written(tmp_path, value, f"{dataset}.json"), out)
        assert "does not say how large its pictures are; name their folder by --images" in message


@pytest.mark.parametrize(
    ("dataset", "name", "content", "message"),
    [
        ("mpii", "a.json", b"[", "not a JSON file"),
        ("mpii", "a.json", b"{}", "not an MPII list"),
        ("mpii", "a.json", b"[4]", "person 1: expected an object"),
        ("mpii", "a.json", b'[{"image": "a.jpg", "center": [1]}]', "(a.jpg): field center: found [1], expected 2"),
        ("mpii", "a.json", b'[{"image": "a.jpg", "center": [1, 2]}]', "person 1 (a.jpg): field scale: found null"),
        ("mpii", "a.mat", b"MATLAB 5.0 MAT-file, cut short", "not a MATLAB file"),
        ("aic", "a.json", b"[]", "neither AI Challenger's list of pictures nor a COCO file"),
        ("lsp", "joints.mat", b"", "not a MATLAB file"),
    ],
)  # fmt: skip
def test_files_that_are_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    shown = refusal(capsys, dataset, tmp_path / name, tmp_path / "out.json", tmp_path)
    assert message in shown
    assert name in shown
    absent = refusal(capsys, dataset, tmp_path / f"absent-{name}", tmp_path / "out.json", tmp_path)
    assert "cannot be read (No such file or directory)" in absent


def test_sizes_are_read_from_headers(tmp_path: Path) -> None:
    expected = {}
    for number in range(300):  # more than one thread's share
        expected[f"{number}.png"] = (1 + number, 2)
        picture(tmp_path / "images", f"{number}.png", (1 + number, 2))
    turned = Image.new("RGB", (30, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "images" / "turned.jpg", exif=exif)
    # Only the header is there: a picture that is cut short is found by whoever decodes it.
    cut = (tmp_path / "images" / "turned.jpg").read_bytes()
    (tmp_path / "images" / "cut.jpg").write_bytes(cut[:-9])
    (tmp_path / "images" / "text.jpg").write_text("no picture")
    expected |= {"turned.jpg": (30, 20), "cut.jpg": (30, 20)}
    names = [*expected, "text.jpg", "absent.jpg"]
    assert Pictures(tmp_path / "images", 0.01).sizes(names) == expected
    with pytest.raises(UserError, match=r"text\.jpg: missing or unreadable, as 2 of 304 pictures are"):
        Pictures(tmp_path / "images", 0.001).sizes(names)
    with pytest.raises(UserError, match=r"absent: no such folder of pictures"):
        Pictures(tmp_path / "absent", 1).sizes(names)


def test_the_file_is_named_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("coco", tmp_path / "absent.json", tmp_path / "out.txt") == 2
    assert "expected a name that ends in .json" in capsys.readouterr().err
