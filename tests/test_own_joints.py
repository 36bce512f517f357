"""Conversion of files that bring their own joints: CSV of DeepLabCut and lightning-pose, and any COCO-keypoint file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poserelay.datasets.coco import CocoAnnotations, read_coco
from poserelay.errors import UserError
from poserelay.keypoints import load_skeleton, resolve_skeleton, skeleton_from_category

from .test_convert import convert, needs_data, picture, real, records, refusal, written

PARTS = ["snout", "leftear", "rightear", "tail"]


def converted(dataset: str, source: Path, tmp_path: Path, images: Path | None = None, *more: object) -> CocoAnnotations:
    """What `read_coco` makes of the file; it and its report have equal bytes each time."""
    out, report = tmp_path / "out.json", tmp_path / "out.report.json"
    assert convert(dataset, source, out, images, *more) == 0
    first = out.read_bytes(), report.read_bytes()
    assert convert(dataset, source, out, images, *more) == 0
    assert (out.read_bytes(), report.read_bytes()) == first
    return read_coco(out)


def reported(tmp_path: Path) -> dict[str, Any]:
    """What the report says was left out: by reason, the count and the names."""
    report = json.loads((tmp_path / "out.report.json").read_text())
    return {entry["reason"]: (entry["count"], entry["names"]) for entry in report["dropped"]}


# DeepLabCut


def single(path: Path, rows: list[list[Any]], parts: list[str] = PARTS, index: int = 1) -> Path:
    """A CSV of one animal; a row is the path's parts and x, y of each bodypart."""
    blank = [""] * (index - 1)
    doubled = [part for part in parts for _ in "xy"]
    header = [
        ["scorer", *blank, *["me"] * len(doubled)],
        ["bodyparts", *blank, *doubled],
        ["coords", *blank, *["x", "y"] * len(parts)],
    ]
    return table(path, [*header, *rows])


def table(path: Path, rows: list[list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_deeplabcut_with_one_animal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        picture(tmp_path / "images", name, (100, 60))
    source = single(
        tmp_path / "CollectedData_me.csv",
        [
            ["labeled-data/v/a.png", 10.25, 20.5, 30, 15.125, "", "", "NaN", "nan"],
            ["labeled-data/v/b.png", *[""] * 8],
            ["labeled-data/v/c.png", 90, 50, *[""] * 6],
            ["labeled-data/v/d.png", 500, 50, 510, 50, *[""] * 4],
        ],
    )
    found = converted("deeplabcut", source, tmp_path, tmp_path / "images")
    assert found.file_names == ["a.png", "c.png", "d.png"]
    assert (found.image_ids, found.ids.tolist()) == ([1, 3, 4], [1, 2])
    np.testing.assert_array_equal(found.visibility, [[2, 2, 0, 0], [2, 0, 0, 0]])
    np.testing.assert_array_equal(found.keypoints[0], [[10.25, 20.5], [30, 15.125], [0, 0], [0, 0]])
    # 20 pixels beyond the points, cut at 0, 0 and at 100, 60; one point is enough.
    np.testing.assert_array_equal(found.boxes, [[0, 0, 50, 40.5], [70, 30, 30, 30]])
    assert found.category["name"] == "animal"
    assert skeleton_from_category(found.category).flip_pairs == (("leftear", "rightear"),)
    assert reported(tmp_path) == {
        "pictures without a labelled point": (1, ["b.png"]),
        "animals whose box has no area": (1, ["d.png"]),
    }
    said = capsys.readouterr().err
    assert "left out: 1 animals whose box has no area" in said
    assert "mirror pairs by the names: leftear and rightear" in said
    wide = converted("deeplabcut", source, tmp_path, tmp_path / "images", "--box_margin", 5)
    np.testing.assert_array_equal(wide.boxes[0], [5.25, 10.125, 29.75, 15.375])


def test_deeplabcut_with_several_animals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "images", "a.png", (100, 60))
    columns = [("m1", "snout"), ("m1", "tail"), ("m2", "snout"), ("m2", "tail"), ("single", "corner")]
    doubled = [column for column in columns for _ in "xy"]
    header = [
        ["scorer", "", "", *["me"] * 10],
        ["individuals", "", "", *[individual for individual, _ in doubled]],
        ["bodyparts", "", "", *[part for _, part in doubled]],
        ["coords", "", "", *["x", "y"] * 5],
    ]
    row = ["labeled-data", "v", "a.png", 1, 2, 3, 4, *[""] * 2, 50, 40, 99, 1]
    source = table(tmp_path / "labeled-data" / "v" / "CollectedData_me.csv", [*header, row])
    found = converted("deeplabcut", source, tmp_path, tmp_path / "images")
    assert found.joints == ("snout", "tail")
    np.testing.assert_array_equal(found.keypoints, [[[1, 2], [3, 4]], [[0, 0], [50, 40]]])
    np.testing.assert_array_equal(found.visibility, [[2, 2], [0, 2]])
    assert "unique bodyparts belong to no animal, and their points are left out: corner (1)" in capsys.readouterr().err


def test_the_files_of_a_deeplabcut_project_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By columns of the path, with one more bodypart in the second video, and from each of the project's folders."""
    project = tmp_path / "project"
    for video in "ab":
        (project / "labeled-data" / video).mkdir(parents=True)
        picture(project / "labeled-data" / video, "1.png", (100, 60))
    first = [["labeled-data", "a", "1.png", 1, 2, 3, 4]]
    single(project / "labeled-data" / "a" / "CollectedData_me.csv", first, ["snout", "tail"], index=3)
    second = [["labeled-data\\b\\1.png", 5, 6, 7, 8, 9, 10]]
    single(project / "labeled-data" / "b" / "CollectedData_me.csv", second, ["snout", "ear", "tail"])
    expected = [[[1, 2], [3, 4], [0, 0]], [[5, 6], [9, 10], [7, 8]]]
    for source, images, prefix in (
        (project, project, "labeled-data/"),
        (project / "labeled-data", project / "labeled-data", ""),
    ):
        found = converted("deeplabcut", source, tmp_path, images)
        assert found.joints == ("snout", "tail", "ear")
        assert found.file_names == [f"{prefix}a/1.png", f"{prefix}b/1.png"]
        np.testing.assert_array_equal(found.keypoints, expected)
        assert "merged 2 files" in capsys.readouterr().err
    alone = converted("deeplabcut", project / "labeled-data" / "b", tmp_path, project / "labeled-data" / "b")
    assert (alone.file_names, alone.joints) == (["1.png"], ("snout", "ear", "tail"))
    capsys.readouterr()
    again = project / "labeled-data" / "a" / "CollectedData_you.csv"
    single(again, first, ["snout", "tail"], index=3)
    message = refusal(capsys, "deeplabcut", project, tmp_path / "no.json", project)
    assert f"{again}: line 4: labeled-data/a/1.png is in" in message
    assert "CollectedData_me.csv: line 4 as well" in message


def test_a_skeleton_orders_and_picks_the_bodyparts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "images", "a.png", (100, 60))
    source = single(tmp_path / "CollectedData_me.csv", [["a.png", 1, 2, 3, 4, 5, 6, 7, 8]])
    skeleton = tmp_path / "mouse.yaml"
    skeleton.write_text("name: mouse\njoints: [Tail, left_ear, snout]\nlimbs: [[snout, Tail]]\n")
    found = converted("deeplabcut", source, tmp_path, tmp_path / "images", "--skeleton", skeleton)
    assert found.joints == ("Tail", "left_ear", "snout")
    np.testing.assert_array_equal(found.keypoints, [[[7, 8], [3, 4], [1, 2]]])
    assert found.category["skeleton"] == [[3, 1]]
    assert "bodyparts that mouse does not have are left out: rightear" in capsys.readouterr().err
    message = refusal(capsys, "deeplabcut", source, tmp_path / "no.json", tmp_path / "images", "--skeleton", "coco17")
    assert "--skeleton coco17: nose, left_eye" in message
    assert "not among the bodyparts of" in message


ROW = ["a.png", 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, 0, "frame"), "its first rows begin with 'frame', 'bodyparts', 'coords', 'a.png', expected scorer"),
        ((2, 4, "z"), "column 5: found 'leftear z', expected x and y of a bodypart, once each"),
        ((1, 3, "snout"), "column 4: found 'snout x', expected"),
        ((2, 8, "likelihood"), "have a likelihood, so that they are predictions and no labels"),
        ((3, 0, "17"), "line 4: '17' is no picture's name"),
        ((3, 1, ""), "line 4: snout: found x '' and y '2', expected two numbers, or none"),
        ((3, 6, "inf"), "line 4: rightear: found x '5' and y 'inf'"),
        ((3, 6, "six"), "line 4: rightear: found x '5' and y 'six'"),
        ((3, 8, None), "line 4: 8 cells, but 9 in line 3"),
        ((1, slice(3, 5), ["Snout", "Snout"]), "its bodyparts are no joints"),
        ((3, slice(1, 9), [""] * 8), "no person left to convert (left out: 1 pictures without a labelled point (a.png"),
    ],
)  # fmt: skip
def test_deeplabcut_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[int, Any, Any], message: str
) -> None:
    picture(tmp_path / "images", "a.png", (100, 60))
    source = single(tmp_path / "CollectedData_me.csv", [ROW])
    rows = list(csv.reader(source.open(newline="")))
    line, place, value = change
    if value is None:
        del rows[line][place]
    else:
        rows[line][place] = value
    table(source, rows)
    shown = refusal(capsys, "deeplabcut", source, tmp_path / "no.json", tmp_path / "images")
    assert message in shown
    assert str(source) in shown


def test_other_deeplabcut_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, images = tmp_path / "out.json", tmp_path / "images"
    images.mkdir()
    source = single(tmp_path / "CollectedData_me.csv", [ROW])
    for name, content, message in (
        ("a.h5", b"\x89HDF", "HDF5 is not read here; give the CollectedData_SCORER.csv"),
        ("a.csv", b"\xff\xfe\x00", "not a CSV file"),
        ("b.csv", b"", "its first rows begin with nothing"),
    ):
        (tmp_path / name).write_bytes(content)
        assert message in refusal(capsys, "deeplabcut", tmp_path / name, out, images)
    assert "no CollectedData*.csv in it" in refusal(capsys, "deeplabcut", images, out, images)
    assert "cannot be read (No such file" in refusal(capsys, "deeplabcut", tmp_path / "c.csv", out, images)
    assert "name their folder by --images" in refusal(capsys, "deeplabcut", source, out)
    assert "a.png: missing or unreadable, as 1 of 1" in refusal(capsys, "deeplabcut", source, out, images)


NUMBERS = st.floats(1, 299, allow_nan=False).map(float)
POINTS = st.one_of(st.none(), st.tuples(NUMBERS, NUMBERS))


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(POINTS, min_size=6, max_size=6), min_size=1, max_size=3), st.booleans(), st.integers(1, 3))
def test_a_csv_keeps_every_coordinate(
    tmp_path: Path, rows: list[list[tuple[float, float] | None]], animals: bool, index: int
) -> None:
    """Six columns: of one animal with six bodyparts, or of two with three each; the path in one to three columns."""
    names = [f"{number}.png" for number in range(len(rows))]
    for name in names:
        if not (tmp_path / name).exists():
            picture(tmp_path, name, (300, 300))
    parts, individuals = ("abc", "12") if animals else ("abcdef", "1")
    columns = [(individual, part) for individual in individuals for part in parts for _ in "xy"]
    blank = [""] * (index - 1)
    header = [
        ["scorer", *blank, *["me"] * 12],
        *([["individuals", *blank, *[individual for individual, _ in columns]]] if animals else []),
        ["bodyparts", *blank, *[part for _, part in columns]],
        ["coords", *blank, *"xy" * 6],
    ]
    lines = [
        [*["folder"] * (index - 1), name, *[value for point in row for value in point or ("", "")]]
        for name, row in zip(names, rows, strict=True)
    ]
    source = table(tmp_path / "CollectedData.csv", [*header, *lines])
    expected = [
        (name, [(*point, 2) if point else (0, 0, 0) for point in row[start : start + len(parts)]])
        for name, row in zip(names, rows, strict=True)
        for start in range(0, 6, len(parts))
        if any(row[start : start + len(parts)])
    ]
    if not expected:
        return
    out = tmp_path / "out.json"
    assert convert("deeplabcut", source, out, tmp_path) == 0
    data = json.loads(out.read_text())
    files = {image["id"]: image["file_name"] for image in data["images"]}
    triples = [
        (files[record["image_id"]], [tuple(record["keypoints"][k : k + 3]) for k in range(0, 3 * len(parts), 3)])
        for record in data["annotations"]
    ]
    assert triples == expected


@needs_data
def test_the_mouse_keeps_every_coordinate(tmp_path: Path) -> None:
    """Each number is the CSV's, bit for bit, and the conversion that another made of it, which rounds to 0.01."""
    folder = real("mirror_mouse")
    found = converted("deeplabcut", folder / "CollectedData.csv", tmp_path, folder / "images")
    with open(folder / "CollectedData.csv", newline="") as file:
        rows = list(csv.reader(file))[3:]
    numbers = np.array([[float(cell or "nan") for cell in row[1:]] for row in rows]).reshape(90, 17, 2)
    np.testing.assert_array_equal(found.visibility > 0, ~np.isnan(numbers[..., 0]))
    np.testing.assert_array_equal(found.keypoints, np.nan_to_num(numbers))
    reference = read_coco(folder / "annotations.json")
    assert (found.joints, found.file_names) == (reference.joints, reference.file_names)
    np.testing.assert_array_equal(found.image_sizes, reference.image_sizes)
    np.testing.assert_array_equal(found.visibility, reference.visibility)
    np.testing.assert_allclose(found.keypoints, reference.keypoints, atol=0.00501)
    # Its boxes have 15 pixels around the points.
    fifteen = converted("deeplabcut", folder / "CollectedData.csv", tmp_path, folder / "images", "--box_margin", 15)
    np.testing.assert_allclose(fifteen.boxes, reference.boxes, atol=0.0101)


# Any COCO file


def zoo() -> dict[str, Any]:
    """Two species with the same three joints, and a category without any."""
    keypoints = [10, 20, 2, 30.5, 40.25, 1, 5, 5, 0]
    animal = {"image_id": 7, "category_id": 4, "bbox": [5, 6, 40, 50], "keypoints": keypoints, "area": 99.5}
    joints = ["nose", "L_ear", "R_ear"]
    family = {"keypoints": joints, "supercategory": "cats", "skeleton": [[1, 2]]}
    data = {
        "images": [{"id": 7, "file_name": "a.png", "width": 100, "height": 60, "license": 3}],
        "annotations": [{**animal, "id": 1}, {**animal, "id": 2, "category_id": 9}, {"id": 3, "category_id": 5}],
        "categories": [
            {"id": 4, "name": "lion", **family},
            {"id": 5, "name": "cage"},
            {"id": 9, "name": "lynx", **family},
        ],
    }
    return json.loads(json.dumps(data))


def test_categories_with_the_same_joints_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, zoo())
    with pytest.raises(UserError, match="convert --dataset coco"):
        read_coco(source)
    found = converted("coco", source, tmp_path)
    assert found.category["name"] == "cats"
    assert found.category["skeleton"] == [[1, 2]]
    assert resolve_skeleton("auto", found.category).flip_pairs == (("L_ear", "R_ear"),)
    np.testing.assert_array_equal(found.ids, [1, 2])
    np.testing.assert_array_equal(found.keypoints[1], [[10, 20], [30.5, 40.25], [0, 0]])
    np.testing.assert_array_equal(found.visibility[1], [2, 1, 0])
    np.testing.assert_array_equal(found.areas, [99.5, 99.5])
    assert reported(tmp_path) == {"persons of another category": (1, ["annotation 3"])}
    assert "2 categories are one now, cats: lion (1), lynx (1)" in capsys.readouterr().err

    data = zoo()
    data["categories"][2]["keypoints"] = ["eye"]
    message = refusal(capsys, "coco", written(tmp_path, data), tmp_path / "no.json")
    assert "categories with different joints ('lynx': 1, 'lion': 3); name those to take by --skeleton" in message
    yaml = tmp_path / "ears.yaml"
    yaml.write_text("name: ears\njoints: [r_ear, nose]\n")
    picked = converted("coco", tmp_path / "source.json", tmp_path, None, "--skeleton", yaml)
    assert (picked.joints, picked.ids.tolist()) == (("r_ear", "nose"), [1])
    np.testing.assert_array_equal(picked.keypoints, [[[0, 0], [10, 20]]])
    assert records(tmp_path)[0]["num_keypoints"] == 1
    capsys.readouterr()
    message = refusal(capsys, "coco", tmp_path / "source.json", tmp_path / "no.json", None, "--skeleton", "coco17")
    assert "--skeleton coco17: left_eye, right_eye" in message
    assert "not among the joints of" in message


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    data = zoo()
    first = data["annotations"][0]
    changes: list[dict[str, Any]] = [
        {"id": "4"},
        {"id": 5, "keypoints": [1, 2]},
        {"id": 6, "keypoints": [1, 2, 3] * 3},
        {"id": 7, "bbox": "none"},
        {"id": 8, "bbox": None, "keypoints": [0] * 9},
        {"id": 9, "bbox": [200, 0, 5, 5]},
        {"id": 10, "image_id": 70},
        {"id": 1},
        {"id": 11, "bbox": None, "head_box": [1, 2, 4, 6], "bbox_clip": False, "max_iou": 0.5, "head_size": -1},
    ]
    data["annotations"] += [{**first, **change} for change in changes] + [5]
    data["images"] += [{"id": 8}, {**data["images"][0]}, "b.png"]
    found = converted("coco", written(tmp_path, data), tmp_path)
    assert found.ids.tolist() == [1, 2, 11]
    np.testing.assert_array_equal(found.boxes[2], [0, 0, 50.5, 60])  # 20 pixels beyond the joints, in the picture
    assert found.head_sizes[2] == pytest.approx(0.6 * 5)
    kept = {field: records(tmp_path)[2].get(field) for field in ("head_box", "bbox_clip", "max_iou", "head_size")}
    assert kept == {"head_box": [1, 2, 4, 6], "bbox_clip": False, "max_iou": 0.5, "head_size": None}
    found_out = reported(tmp_path)
    count, names = found_out["persons whose record cannot be read"]
    assert count == 6
    assert names[0] == "annotation '4': expected an object with an integer id and image_id"
    assert names[1] == "annotation 5: field keypoints: found [1, 2], expected 9 numbers"
    assert names[4] == "annotation 8: neither bbox nor a labelled joint"
    assert found_out["persons whose box lies outside its picture"] == (1, ["annotation 9"])
    assert found_out["persons whose image is not in the file"] == (1, ["annotation 10"])
    assert found_out["persons whose id appeared before"] == (1, ["annotation 1"])
    assert found_out["images whose record cannot be read"][0] == 2
    assert found_out["images whose id appeared before"] == (1, ["image 7"])


def test_a_report_names_at_most_20(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = zoo()
    data["annotations"] += [{"id": 100 + number, "category_id": 5} for number in range(30)]
    converted("coco", written(tmp_path, data), tmp_path)
    count, names = reported(tmp_path)["persons of another category"]
    assert (count, len(names), names[-1]) == (31, 20, "annotation 118")
    # Another's file of the report's name stays.
    (tmp_path / "own.report.json").write_text("{}")
    capsys.readouterr()
    message = refusal(capsys, "coco", tmp_path / "source.json", tmp_path / "own.json")
    assert "own.report.json: exists and is no coco file that we converted" in message
    assert not (tmp_path / "own.json").exists()


def test_sizes_that_are_not_stated_are_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = zoo()
    del data["images"][0]["width"]
    source = written(tmp_path, data)
    assert "name their folder by --images" in refusal(capsys, "coco", source, tmp_path / "no.json")
    picture(tmp_path / "images", "a.png", (90, 70))
    assert converted("coco", source, tmp_path, tmp_path / "images").image_sizes.tolist() == [[70, 90]]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("categories", None, "no category with an id and a list keypoints of joint names"),
        ("images", None, "not a COCO file: no lists images and annotations"),
        ("annotations", [], "no person left to convert (it has none)"),
    ],
)
def test_files_that_are_no_keypoint_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any, message: str
) -> None:
    assert message in refusal(capsys, "coco", written(tmp_path, zoo() | {field: value}), tmp_path / "no.json")


@needs_data
@pytest.mark.parametrize(
    ("name", "persons", "joints", "name_of_category"),
    [
        ("ap10k/test_ap10k", 2, 17, "merged"),
        ("animalpose/test_animalpose", 2, 20, "cat"),
        ("atrw/test_atrw", 2, 15, "tiger"),
        ("horse10/test_horse10", 3, 22, "horse"),
        ("humanart/test_humanart", 4, 21, "person"),
        ("jhmdb/test_jhmdb_sub1", 3, 15, "person"),
        ("macaque/test_macaque", 2, 17, "macaque"),
        ("mhp/test_mhp", 4, 16, "person"),
        ("mpii/test_mpii_trb", 5, 40, "person"),
    ],
)
def test_real_coco_files(tmp_path: Path, name: str, persons: int, joints: int, name_of_category: str) -> None:
    source = real("samples", f"{name}.json")
    found = converted("coco", source, tmp_path)
    assert (len(found.persons), len(found.joints), found.category["name"]) == (persons, joints, name_of_category)
    assert reported(tmp_path) == {}
    originals = {record["id"]: record for record in json.loads(source.read_text())["annotations"]}
    for record in records(tmp_path):
        original = originals[record["id"]]
        triples = original.get("keypoints_21", original["keypoints"])
        expected = [
            value for k in range(0, len(triples), 3) for value in (triples[k : k + 3] if triples[k + 2] else [0, 0, 0])
        ]
        assert record["keypoints"] == expected
        assert record["bbox"] == original.get("bbox", record["bbox"])
    if name.startswith("humanart"):
        seventeen = converted("coco", source, tmp_path, None, "--skeleton", "coco17")
        assert resolve_skeleton("auto", seventeen.category) == load_skeleton("coco17")
        for record in records(tmp_path):
            assert record["keypoints"][2::3] == originals[record["id"]]["keypoints"][2::3]
