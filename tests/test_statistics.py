"""`poserelay inspect --data`: the figures of an annotation file, and its chart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from poserelay.__main__ import main
from poserelay.statistics import annotation_statistics, draw_statistics, format_statistics

from .test_convert import needs_data, picture, real

NOTHING = [0, 0, 0]


def annotated(number: int, image: int, box: list[float], keypoints: list[int], **fields: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": 1, "bbox": box, "keypoints": keypoints, **fields}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four pictures: with three persons, of whom two overlap by a half, with one, with a crowd and a box, with none."""
    whole = [1, 1, 2, 5, 5, 1, 9, 9, 2]
    persons = [
        annotated(1, 1, [0, 0, 30, 20], whole, area=1023.9),
        annotated(2, 1, [10, 0, 30, 20], [1, 1, 2, *NOTHING, *NOTHING], area=1024, head_box=[0, 0, 3, 4]),
        annotated(3, 1, [60, 60, 20, 20], [*NOTHING, 5, 5, 2, 9, 9, 1]),
        annotated(4, 2, [0, 0, 100, 200], whole, area=9216),
        annotated(5, 3, [0, 0, 50, 50], whole, iscrowd=1),
        annotated(6, 3, [0, 0, 50, 50], NOTHING * 3),
    ]
    images = [{"id": number, "file_name": f"{number}.png", "width": 100, "height": 200} for number in range(1, 5)]
    images[0]["crowdIndex"] = 0.5
    categories = [{"id": 1, "name": "fish", "keypoints": ["mouth", "left_fin", "right_fin"]}]
    other = {"id": 9, "image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5]}
    data = {"images": images, "annotations": [other, *persons], "categories": [*categories, {"id": 2, "name": "net"}]}
    (tmp_path / "fish.json").write_text(json.dumps(data))
    return tmp_path / "fish.json"


def test_statistics_by_hand(source: Path, tmp_path: Path) -> None:
    picture(tmp_path / "images", "2.png", (100, 200))
    figures = annotation_statistics(source, tmp_path / "images")
    assert figures == {
        "pictures": 4,
        "pictures_with_persons": 2,
        "pictures_missing": {"count": 3, "names": ["1.png", "3.png", "4.png"]},
        "pictures_without_crowd_index": 3,
        "persons": 4,
        "crowds": 1,
        "without_labelled_joints": 1,
        "persons_without_area": 1,
        "persons_without_head_size": 3,
        "persons_per_picture": [2, 1, 0, 1],
        "persons_by_labelled_joints": [0, 1, 1, 2],
        "sizes": {"small": 2, "medium": 1, "large": 1},  # the third has 0.53 of 400
        "overlaps": {"none": 2, "below 0.5": 0, "0.5 to 0.75": 2, "0.75 to 1": 0},  # 400 of 800
        "joints": {
            "mouth": {"unlabelled": 1, "hidden": 0, "visible": 3},
            "left_fin": {"unlabelled": 1, "hidden": 2, "visible": 1},
            "right_fin": {"unlabelled": 1, "hidden": 1, "visible": 2},
        },
        "skeleton": "fish",
        "sigmas": {"mouth": 0.05, "left_fin": 0.05, "right_fin": 0.05},
        "sigmas_assumed": True,
    }
    text = format_statistics(figures)
    for line in (
        "pictures     4: persons 2 with 0, 1 with 1, 1 with 3; 3 missing in the folder, such as 1.png",
        "persons      4; and 1 crowds, 1 boxes without a labelled joint",
        "small 50.0%, medium 25.0%, large 25.0%",
        "annotated for 3 persons, 0.53 of the box for 1",
        "annotated for 1 persons, no PCKh for 3",
        "50.0% visible, 25.0% hidden, 25.0% unlabelled of 3 per person; half of the persons have 3 or more",
        "sigmas       of fish, assumed: OKS compares only with itself",
        "    2         1   25.0%  ####################",
        "left_fin          1        2            1   0.05",
    ):
        assert line in text


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--data", str(source), "--out", str(tmp_path / "charts"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == annotation_statistics(source)
    assert figures["pictures_missing"] is None
    assert main(["inspect", "--data", str(source)]) == 0
    assert capsys.readouterr().out == format_statistics(figures) + "\n"
    chart = tmp_path / "charts" / "statistics.png"
    first = chart.read_bytes()
    draw_statistics(figures, chart)
    assert chart.read_bytes() == first


def test_the_chart_has_the_shares(source: Path, tmp_path: Path) -> None:
    """The lengths of a row's three colours are the shares of the joint's labels."""
    figures = annotation_statistics(source)
    draw_statistics(figures, tmp_path / "chart.png")
    pixels = np.asarray(cv2.imread(str(tmp_path / "chart.png")))[:, :, ::-1]
    half = pixels[:, pixels.shape[1] // 2 :]
    colours = {"visible": (0x00, 0x72, 0xB2), "hidden": (0xD5, 0x5E, 0x00), "unlabelled": (0xCC, 0xCC, 0xCC)}
    masks = {state: (half == colour).all(axis=2) for state, colour in colours.items()}
    # Rows of the bars: where the three together are longest; the legend is much shorter.
    lengths = np.sum([mask.sum(axis=1) for mask in masks.values()], axis=0)
    rows = np.flatnonzero(lengths > 0.9 * lengths.max())
    bars = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    assert len(bars) == 3
    for bar, counts in zip(bars, figures["joints"].values(), strict=True):
        middle = bar[len(bar) // 2]
        for state, mask in masks.items():
            assert mask[middle].sum() / lengths[middle] == pytest.approx(counts[state] / 4, abs=0.01)


def test_mistakes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {backbone: {name: resnet18}}\ndata: {annotations: a.json, images: b}\n")
    data = json.loads(source.read_text())
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({**data, "annotations": []}))
    for arguments, message in (
        ([], "give --config FILE, a recipe with the model to describe, or --data FILE"),
        (["--config", recipe, "--data", source], "give --config FILE"),
        (["--config", recipe, "--out", "charts"], "out is given without data"),
        (["--config", recipe, "--images", "charts"], "images is given without data"),
        (["--data", source, "--images", tmp_path / "none"], "none: no such folder of pictures; check --images"),
        (["--data", empty], "empty.json: no person with a labelled joint among its 0 annotations"),
        # A value that would be a flag but for its first two letters.
        (["--data", "x.json"], "error: x.json: cannot be read"),
    ):
        assert main(["inspect", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


@needs_data
def test_coco_real() -> None:
    """Counted again in plain Python, from the JSON."""
    path = real("coco", "annotations.json")
    figures = annotation_statistics(path, real("coco", "images"))
    data = json.loads(path.read_text())
    people = [r for r in data["annotations"] if not r["iscrowd"] and any(r["keypoints"][2::3])]
    assert figures["persons"] == len(people) == 424
    labelled = Counter(sum(v > 0 for v in record["keypoints"][2::3]) for record in people)
    assert figures["persons_by_labelled_joints"] == [labelled[number] for number in range(18)]
    for column, counts in enumerate(figures["joints"].values()):
        states = Counter(record["keypoints"][3 * column + 2] for record in people)
        assert counts == {"unlabelled": states[0], "hidden": states[1], "visible": states[2]}
    areas = [record["area"] for record in people]
    assert figures["sizes"]["small"] == sum(area < 32**2 for area in areas)
    assert figures["sizes"]["large"] == sum(area >= 96**2 for area in areas)
    of_picture = Counter(record["image_id"] for record in people)
    per_picture = Counter(of_picture[image["id"]] for image in data["images"])
    assert figures["persons_per_picture"] == [per_picture[number] for number in range(max(per_picture) + 1)]
    assert figures["pictures_missing"] == {"count": 0, "names": []}
    assert figures["skeleton"] == "coco17"
