"""Every layout that `poserelay convert` reads: random persons are written in it, converted, and stay what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from poserelay.convert import SKELETONS
from poserelay.datasets.coco import read_coco
from poserelay.keypoints import load_skeleton

from .test_convert import OCHUMAN_JOINTS, cells, convert, ochuman_file, ochuman_person, picture, site_file, structs

Person = list[tuple[float, float, int]]
"""Joints in the order of the packaged skeleton: x, y in pixels from 0, visibility."""

SIZE = 200
JOINTS = {name: load_skeleton(skeleton).joints for name, skeleton in SKELETONS.items()}
PLACES = st.floats(1, SIZE - 2)


def flat(person: Person, codes: dict[int, int]) -> list[float]:
    """x, y and the layout's code of the visibility, joint after joint."""
    return [value for x, y, v in person for value in (x, y, codes[v])]


def mpii_list(folder: Path, people: list[Person]) -> Path:
    records = [
        {
            "image": "1.png",
            "center": [100, 100],
            "scale": 0.5,
            "joints": [[x + 1, y + 1] for x, y, _ in person],
            "joints_vis": [int(v > 0) for *_, v in person],
        }
        for person in people
    ]
    return dumped(folder, records)


def mpii_mat(folder: Path, people: list[Person]) -> Path:
    rects = [
        {
            "scale": 0.5,
            "objpos": {"x": 100, "y": 100},
            "annopoints": {
                "point": structs(
                    *({"x": x + 1, "y": y + 1, "id": k, "is_visible": v - 1} for k, (x, y, v) in enumerate(person) if v)
                )
            },
        }
        for person in people
    ]
    pictures = structs({"image": {"name": "1.png"}, "annorect": structs(*rects)})
    site_file(folder / "source.mat", pictures, [1], cells(np.zeros((0, 0))))
    return folder / "source.mat"


def aic_list(folder: Path, people: list[Person]) -> Path:
    named = {f"human{number}": person for number, person in enumerate(people)}
    record = {
        "image_id": "1",
        "human_annotations": {name: [1, 1, 199, 199] for name in named},
        "keypoint_annotations": {name: flat(person, {0: 3, 1: 2, 2: 1}) for name, person in named.items()},
    }
    return dumped(folder, [record])


def lsp_mat(folder: Path, people: list[Person]) -> Path:
    """Of LSP, which places every joint: 0 is visible, 1 hidden."""
    joints = [[(x + 1, y + 1, 2 - v) for x, y, v in person] for person in people]
    savemat(folder / "source.mat", {"joints": np.array(joints).transpose(2, 1, 0)})
    return folder / "source.mat"


def lspet_mat(folder: Path, people: list[Person]) -> Path:
    """Of LSP Extended: 1 is labelled."""
    joints = [[(x + 1, y + 1, v > 0) for x, y, v in person] for person in people]
    # A third dimension of one picture is lost in a .mat; joints that are 0 are of nobody.
    stacked = np.array([*joints, [(0, 0, 0)] * 14], dtype=np.float64).transpose(1, 2, 0)
    savemat(folder / "source.mat", {"joints": stacked})
    return folder / "source.mat"


def coco_file(folder: Path, people: list[Person], dataset: str) -> Path:
    records = [
        {
            "id": number,
            "image_id": 5,
            "category_id": 1,
            "bbox": [1, 1, 198, 198],
            "keypoints": flat(person, {0: 0, 1: 1, 2: 2}),
            "num_keypoints": sum(v > 0 for *_, v in person),
        }
        for number, person in enumerate(people, 1)
    ]
    images = [{"id": 5, "file_name": "1.png", "width": SIZE, "height": SIZE, "crowdIndex": 0.5}]
    categories = [{"id": 1, "name": "person", "keypoints": list(JOINTS[dataset])}]
    return dumped(folder, {"images": images, "annotations": records, "categories": categories})


def ochuman(folder: Path, people: list[Person]) -> Path:
    def keypoints(person: Person) -> list[float]:
        by_name = dict(zip(JOINTS["ochuman"], person, strict=True))
        return flat([by_name.get(joint, (3.0, 3.0, 0)) for joint in OCHUMAN_JOINTS], {0: 0, 1: 3, 2: 1})

    persons = [ochuman_person(bbox=[1, 1, 199, 199], keypoints=keypoints(person)) for person in people]
    shown = {"image_id": "1", "file_name": "1.png", "width": SIZE, "height": SIZE, "annotations": persons}
    return dumped(folder, ochuman_file(shown))


def posetrack(folder: Path, people: list[Person]) -> Path:
    coco_file(folder, people, "posetrack18").rename(folder / "video.json")
    (folder / "videos").mkdir(exist_ok=True)
    (folder / "video.json").rename(folder / "videos" / "video.json")
    return folder / "videos"


def dumped(folder: Path, value: Any) -> Path:
    (folder / "source.json").write_text(json.dumps(value))
    return folder / "source.json"


def crowdpose(folder: Path, people: list[Person]) -> Path:
    return coco_file(folder, people, "crowdpose")


LAYOUTS: dict[str, tuple[str, Callable[[Path, list[Person]], Path], tuple[int, ...]]] = {
    "mpii list": ("mpii", mpii_list, (0, 2)),
    "mpii mat": ("mpii", mpii_mat, (0, 1, 2)),
    "aic list": ("aic", aic_list, (0, 1, 2)),
    "lsp": ("lsp", lsp_mat, (1, 2)),
    "lsp extended": ("lsp", lspet_mat, (0, 2)),
    "crowdpose": ("crowdpose", crowdpose, (0, 1, 2)),
    "ochuman": ("ochuman", ochuman, (0, 1, 2)),
    "posetrack18": ("posetrack18", posetrack, (0, 2)),
}
"""Dataset, writer, and the visibilities that the layout can tell apart."""


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_conversion_keeps_every_coordinate(layout: str, tmp_path: Path, data: st.DataObject) -> None:
    dataset, write, codes = LAYOUTS[layout]
    joint = st.tuples(PLACES, PLACES, st.sampled_from(codes))
    # Two labelled joints that are apart: all layouts have a box for such a person.
    fixed: Person = [(20.5, 30.25, 2), (150.125, 160.75, 2)]
    person = st.lists(joint, min_size=len(JOINTS[dataset]) - 2, max_size=len(JOINTS[dataset]) - 2)
    people = [fixed + rest for rest in data.draw(st.lists(person, min_size=2, max_size=3))]
    for number in range(1, 4):
        for name in (f"{number}.png", f"{number}.jpg", f"im000{number}.jpg", f"im0000{number}.jpg"):
            if not (tmp_path / name).exists():
                picture(tmp_path, name, (SIZE, SIZE))
    source, out = write(tmp_path, people), tmp_path / "out.json"
    lenient = ("--max_unreadable", 1)  # Extended's picture of nobody
    assert convert(dataset, source, out, tmp_path, *lenient) == 0
    first = out.read_bytes()
    assert convert(dataset, source, out, tmp_path, *lenient) == 0
    assert out.read_bytes() == first
    # Some layouts are in MPII's and LSP's pixels, which count from 1: adding 1 and taking it away may round once.
    found = [
        [tuple(record["keypoints"][start : start + 3]) for start in range(0, len(record["keypoints"]), 3)]
        for record in json.loads(first)["annotations"]
    ]
    shift = 1 if dataset in ("mpii", "lsp") else 0
    assert found == [[(x + shift - shift, y + shift - shift, v) if v else (0, 0, 0) for x, y, v in p] for p in people]
    assert len(set(read_coco(out).ids.tolist())) == len(people)
