"""Labelled subsets against naive loops over the file, and the lists that bring them from one run to another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune.__main__ import main as finetune
from poserelay.config import LabelsConfig
from poserelay.datasets.coco import CocoAnnotations, read_coco
from poserelay.errors import UserError
from poserelay.subsets import (
    Chosen,
    PersonSubset,
    Subset,
    choose_labelled,
    drop_labels,
    read_labels,
    read_subset,
    write_labels,
    write_subset,
)

JOINTS = {"person": [[4, 5, 2, 0, 0, 0], [4, 5, 1, 6, 7, 2]], "crowd": [[4, 5, 2, 6, 7, 2]], "jointless": [[0] * 6]}


def coco(images: list[int], persons: list[tuple[int, int, str]]) -> dict[str, Any]:
    """A file with images of these ids and, in this order, annotations (id, image id, person | crowd | jointless)."""
    return {
        "categories": [{"id": 1, "name": "person", "keypoints": ["nose", "tail"]}],
        "images": [{"id": id_, "file_name": f"{id_}.jpg", "height": 60, "width": 80} for id_ in images],
        "annotations": [
            {"id": id_, "image_id": image, "category_id": 1, "bbox": [1, 2, 30, 40], "iscrowd": int(kind == "crowd"),
             "keypoints": JOINTS[kind][id_ % len(JOINTS[kind])]}
            for id_, image, kind in persons
        ],
    }  # fmt: skip


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """A COCO file with at least one labelled person, its annotations in no order."""
    images = draw(st.lists(st.integers(0, 10**9), min_size=1, max_size=8, unique=True))
    ids = draw(st.lists(st.integers(0, 10**9), min_size=1, max_size=16, unique=True))
    kinds = st.sampled_from(["person", "person", "person", "crowd", "jointless"])
    persons = [(id_, draw(st.sampled_from(images)), draw(kinds)) for id_ in ids]
    assume(any(kind == "person" for _, _, kind in persons))
    return coco(images, persons)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("subsets")


def read(data: dict[str, Any], folder: Path) -> CocoAnnotations:
    (folder / "annotations.json").write_text(json.dumps(data))
    return read_coco(folder / "annotations.json")


def walked(data: dict[str, Any]) -> list[tuple[int, int]]:
    """(annotation id, image id) of the persons with a joint, as Semi_Human_Pose's loader walks them."""
    found = []
    for image in data["images"]:
        for record in data["annotations"]:
            if record["image_id"] == image["id"] and not record["iscrowd"] and any(record["keypoints"][2::3]):
                found.append((record["id"], image["id"]))
    return found


def ranked(ids: list[int], seed: int) -> list[int]:
    return sorted(ids, key=lambda id_: hashlib.sha256(f"{seed}:{id_}".encode()).digest())


def ids_of(annotations: CocoAnnotations, chosen: Chosen) -> list[int]:
    assert (np.diff(chosen.rows) > 0).all()
    on = {annotations.image_ids[image] for image in annotations.image_index[chosen.rows]}
    assert chosen.images == [id_ for id_ in annotations.image_ids if id_ in on]
    return annotations.ids[chosen.rows].tolist()


@settings(max_examples=40)
@given(
    data=files(),
    by=st.sampled_from(["images", "persons"]),
    protocol=st.sampled_from(["random", "first"]),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 100),
)
def test_a_choice_is_that_of_a_naive_loop(
    folder: Path, data: dict[str, Any], by: Any, protocol: Any, share: float, seed: int
) -> None:
    annotations = read(data, folder)
    persons = walked(data)
    units = list(dict.fromkeys(person[by == "images"] for person in persons))
    count = round(share * len(units))
    ordered = units if protocol == "first" else ranked(units, seed)
    expected = {id_ for id_, image in persons if (image if by == "images" else id_) in ordered[:count]}
    choices: list[dict[str, Any]] = [{"ratio": share}, {"count": count}]
    for asked in choices if count else []:
        chosen = choose_labelled(annotations, LabelsConfig(**asked, by=by, protocol=protocol, seed=seed))
        assert set(ids_of(annotations, chosen)) == expected
    everything = choose_labelled(annotations, LabelsConfig(by=by, protocol=protocol, seed=seed))
    assert set(ids_of(annotations, everything)) == {id_ for id_, _ in persons}


@settings(max_examples=40)
@given(
    data=files(),
    by=st.sampled_from(["images", "persons"]),
    protocol=st.sampled_from(["random", "first"]),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    in_counts=st.booleans(),
    seed=st.integers(0, 100),
    draws=st.randoms(use_true_random=False),
)
def test_choices_are_nested_and_a_random_one_does_not_depend_on_the_order(
    folder: Path, data: dict[str, Any], by: Any, protocol: Any, shares: Any, in_counts: bool, seed: int, draws: Any
) -> None:
    annotations = read(data, folder)
    units = len({person[by == "images"] for person in walked(data)})
    small, large = sorted(shares)
    assume(round(small * units) > 0)

    def chosen(annotations: CocoAnnotations, share: float) -> set[int]:
        asked: dict[str, Any] = {"count": round(share * units)} if in_counts else {"ratio": share}
        labels = LabelsConfig(**asked, by=by, protocol=protocol, seed=seed)
        return set(ids_of(annotations, choose_labelled(annotations, labels)))

    few = chosen(annotations, small)
    assert few <= chosen(annotations, large)
    if protocol == "random":
        shuffled = {key: draws.sample(records, len(records)) for key, records in data.items()}
        assert chosen(read(shuffled, folder), small) == few


def test_the_choice_of_images_is_that_of_earlier_versions(tmp_path: Path) -> None:
    annotations = read(coco(list(range(100)), [(1000 + n, n, "person") for n in range(100)]), tmp_path)
    tenth = [15, 36, 44, 46, 69, 74, 76, 85, 87, 99]
    assert choose_labelled(annotations, LabelsConfig(count=10)).images == tenth
    assert choose_labelled(annotations, LabelsConfig(ratio=0.05, seed=3)).images == [5, 22, 58, 85, 89]


def test_what_cannot_be_chosen(tmp_path: Path) -> None:
    annotations = read(coco([1, 2, 3], [(7, 1, "person"), (8, 1, "person"), (9, 3, "person")]), tmp_path)
    with pytest.raises(UserError, match=r"labels.count is 3, but only 2 images carry labelled persons in .*lower it"):
        choose_labelled(annotations, LabelsConfig(count=3))
    with pytest.raises(UserError, match=r"labels.count is 4, but only 3 persons are labelled in"):
        choose_labelled(annotations, LabelsConfig(count=4, by="persons"))
    with pytest.raises(UserError, match=r"labels.ratio is 0.1, which rounds to none: only 3 persons .*raise it"):
        choose_labelled(annotations, LabelsConfig(ratio=0.1, by="persons"))
    nobody = read(coco([1], [(7, 1, "crowd"), (8, 1, "jointless")]), tmp_path)
    with pytest.raises(UserError, match=r"annotations\.json: no person with a labelled joint"):
        choose_labelled(nobody, LabelsConfig())
    with pytest.raises(ValueError, match="give count or file, not both"):
        LabelsConfig(count=3, file="x")


# --- the lists ------------------------------------------------------------------------------------------------------

CROWDED = [(n, n % 7, "person" if n % 5 else "jointless") for n in range(40)]


@pytest.mark.parametrize("by", ["images", "persons"])
@pytest.mark.parametrize("asked", [{"ratio": 0.5}, {"count": 3, "protocol": "first"}, {}])
def test_a_list_makes_the_same_choice_again(tmp_path: Path, by: Any, asked: dict[str, Any]) -> None:
    annotations = read(coco(list(range(7)), CROWDED), tmp_path)
    chosen = choose_labelled(annotations, LabelsConfig(**asked, by=by, seed=5))
    write_labels(tmp_path, chosen)
    file = tmp_path / "labels.json"
    again = choose_labelled(annotations, LabelsConfig(file=str(file)))
    np.testing.assert_array_equal(again.rows, chosen.rows)
    assert again.images == chosen.images
    assert again.subset == chosen.subset == read_labels(file)
    (tmp_path / "next").mkdir()
    write_labels(tmp_path / "next", again)
    assert (tmp_path / "next/labels.json").read_bytes() == file.read_bytes()
    assert str(tmp_path) not in file.read_text()
    document = json.loads(file.read_text())
    if by == "images" or not asked:
        assert document["images"] == [f"{id_}.jpg" for id_ in chosen.images]
        assert read_subset(file).method == asked.get("protocol", "random" if asked else "all")
    else:
        assert document["persons"] == sorted(annotations.ids[chosen.rows].tolist())
        assert (document["kind"], document["seed"]) == ("persons", 0 if "protocol" in asked else 5)


def test_ratio_and_count_of_the_same_choice_give_equal_bytes(tmp_path: Path) -> None:
    annotations = read(coco(list(range(7)), CROWDED), tmp_path)
    written = []
    for name, labels in {
        "ratio": LabelsConfig(ratio=0.5, by="persons", protocol="first"),
        "count": LabelsConfig(count=16, by="persons", protocol="first", seed=4),
        "other": LabelsConfig(count=15, by="persons", protocol="first"),
    }.items():
        (tmp_path / name).mkdir()
        write_labels(tmp_path / name, choose_labelled(annotations, labels))
        written.append((tmp_path / name / "labels.json").read_bytes())
    assert written[0] == written[1] != written[2]


def test_a_run_keeps_its_labels(tmp_path: Path) -> None:
    annotations = read(coco(list(range(7)), CROWDED), tmp_path)
    three = choose_labelled(annotations, LabelsConfig(count=3))
    write_labels(tmp_path, three)
    before = (tmp_path / "labels.json").stat().st_mtime_ns
    write_labels(tmp_path, three)
    assert (tmp_path / "labels.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"labels\.json: the run here was started with other labels; put the data back"):
        write_labels(tmp_path, choose_labelled(annotations, LabelsConfig(count=4)))


def test_a_list_of_select_chooses_the_images(tmp_path: Path) -> None:
    subset = Subset(["a.jpg", "é/b.jpg"], ["c.jpg"], "kmeans", 2, 7, 0.98, "0" * 64)
    file = tmp_path / "subset.json"
    write_subset(file, subset)
    labels = LabelsConfig(file=str(file), by="persons")  # the list says itself what it lists

    def images(names: dict[int, str], persons: list[int]) -> list[int]:
        data = coco(list(names), [(10 + image, image, "person") for image in persons])
        for record in data["images"]:
            record["file_name"] = names[record["id"]]
        return choose_labelled(read(data, tmp_path), labels).images

    names = {9: "other.jpg", 5: "c.jpg", 3: "./é/b.jpg", 2: "a.jpg"}
    assert images(names, [9, 2, 5, 3]) == [5, 3, 2]
    assert images(names, [9, 5, 3]) == [5, 3]  # of a.jpg no person is labelled
    with pytest.raises(UserError, match="none of its 3 images carries a labelled person"):
        images(names, [9])
    del names[2]
    with pytest.raises(UserError, match=r"'a.jpg' is not among the images of the annotation file .1 of 3 are not"):
        images(names, [9, 5])


def test_a_list_of_persons_of_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    write_subset(file, PersonSubset([4, 6], ["1.jpg", "2.jpg"], "random", 2, 0))
    labels = LabelsConfig(file=str(file))
    fitting = [(4, 1, "person"), (5, 1, "person"), (6, 2, "person")]
    assert choose_labelled(read(coco([1, 2, 3], fitting), tmp_path), labels).rows.tolist() == [0, 2]
    with pytest.raises(UserError, match=r"person 6 is not among the annotations of .*\(1 of 2 are not\)"):
        choose_labelled(read(coco([1, 2], fitting[:2]), tmp_path), labels)
    with pytest.raises(UserError, match=r"some of its persons are on '3\.jpg', which it does not list"):
        choose_labelled(read(coco([1, 2, 3], [*fitting[:2], (6, 3, "person")]), tmp_path), labels)
    unlabelled = [(4, 1, "jointless"), (6, 2, "crowd"), (7, 2, "person")]
    with pytest.raises(UserError, match="none of its 2 persons has a labelled joint"):
        choose_labelled(read(coco([1, 2], unlabelled), tmp_path), labels)


def test_a_damaged_list_is_told(tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    write_subset(file, PersonSubset([4, 6], ["1.jpg", "2.jpg"], "random", 2, 0))
    document = json.loads(file.read_text())
    for change in ({"persons": [4]}, {"images": ["1.jpg"]}, {"seed": 1}, {"kind": "images"}):
        file.write_text(json.dumps({**document, **change}))
        with pytest.raises(UserError, match="changed since it was written"):
            read_labels(file)
    for text in ("{", "[1]", json.dumps({**document, "kind": "animals"}), json.dumps({**document, "kind": []})):
        file.write_text(text)
        with pytest.raises(UserError, match=r"not a list of pictures or persons; give the labels.json of a run"):
            read_labels(file)
    with pytest.raises(UserError, match="no such file"):
        read_labels(tmp_path / "absent")


# --- in a stage and on real data ------------------------------------------------------------------------------------


def test_a_run_writes_its_labels_and_another_takes_them(people: Path, tmp_path: Path) -> None:
    config = {
        "model": {
            "backbone": {"name": "timm", "kwargs": {"model": "test_resnet"}},
            "head": {"name": "simple", "kwargs": {"deconv_channels": [8]}},
            "skeleton": "coco17",
            "input": {"height": 64, "width": 64},
        },
        "data": {"annotations": str(people / "annotations.json"), "images": str(people / "images")},
        "optim": {"batch_size": 5, "lr_batch": 5, "epochs": 1, "drops": []},
        "threads": 1,
        "workers": 0,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))

    def trained(run: Path, *labels: str) -> dict[str, torch.Tensor]:
        assert finetune(["--config", str(tmp_path / "recipe.yaml"), "--run_dir", str(run), *labels]) == 0
        return torch.load(run / "resume/last.pt", weights_only=True)["model"]

    one = trained(tmp_path / "one", *("--labels.count", "5", "--labels.by", "persons", "--labels.protocol", "first"))
    written = (tmp_path / "one/labels.json").read_bytes()
    expected = [id_ for id_, _ in walked(json.loads((people / "annotations.json").read_text()))][:5]
    assert json.loads(written)["persons"] == sorted(expected)
    other = trained(tmp_path / "other", "--labels.file", str(tmp_path / "one/labels.json"))
    assert (tmp_path / "other/labels.json").read_bytes() == written
    assert all(torch.equal(value, other[name]) for name, value in one.items())


DATA = os.environ.get("POSERELAY_DATA")


@pytest.mark.skipif(not DATA, reason="POSERELAY_DATA names no folder of real data")
@pytest.mark.parametrize("count", [1, 50, 400])
def test_the_first_persons_of_coco_as_pycocotools_walks_them(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The loop of Semi_Human_Pose's loader; the annotations of the file are not in the order of its images."""
    from pycocotools.coco import COCO

    path = Path(str(DATA), "coco/annotations.json")
    annotations, peer = read_coco(path), COCO(path)
    expected = []
    for image in json.loads(path.read_text())["images"]:
        for record in peer.loadAnns(peer.getAnnIds(imgIds=image["id"], iscrowd=False)):
            if record["area"] > 0 and max(record.get("keypoints", [0])) > 0:
                expected.append(record["id"])
    chosen = choose_labelled(annotations, LabelsConfig(count=count, by="persons", protocol="first"))
    assert set(annotations.ids[chosen.rows].tolist()) == set(expected[:count])
    assert len(chosen.rows) == count


# --- annotated joints taken away (CCM section 6.5) -------------------------------------------------------------------


def persons_file(folder: Path, visibilities: list[list[int]]) -> Path:
    joints = [f"joint{number}" for number in range(len(visibilities[0]))]
    triples = [[value for v in row for value in ((7, 9, v) if v else (0, 0, 0))] for row in visibilities]
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 50, "height": 50} for i in range(len(triples))],
        "categories": [{"id": 1, "name": "one", "keypoints": joints}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 20, 20], "keypoints": triple}
            for i, triple in enumerate(triples)
        ],
    }
    (folder / "persons.json").write_text(json.dumps(data))
    return folder / "persons.json"


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0, 1, 2, 2]), min_size=4, max_size=4), min_size=2, max_size=6), st.integers(0, 3)
)
def test_dropped_joints_are_counted_and_drawn_with_the_seed(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("drop")
    table = np.array(rows)
    hidden, visible = int((table == 1).sum()), int((table == 2).sum())
    if not (table > 0).any():
        return
    annotations = read_coco(persons_file(folder, rows))
    chosen = choose_labelled(annotations, LabelsConfig())
    for drop, value in (("invisible", 1), ("visible", 2)):
        labels = LabelsConfig(drop=drop, seed=seed)
        left = visible if drop == "invisible" else hidden + visible - hidden
        if not hidden or (drop == "visible" and visible < hidden) or not left:
            with pytest.raises(UserError, match=r"labels\.drop"):
                drop_labels(annotations, chosen, labels)
            continue
        dropped, kept = drop_labels(annotations, chosen, labels)
        gone = annotations.visibility - dropped.visibility
        assert (gone[gone > 0] == value).all()
        assert (gone > 0).sum() == hidden
        assert (dropped.keypoints[dropped.visibility == 0] == 0).all()
        assert kept.rows.tolist() == [row for row in chosen.rows if dropped.visibility[row].any()]
        assert kept.subset == chosen.subset
        again = drop_labels(annotations, chosen, labels)[0]
        assert (again.visibility == dropped.visibility).all()
    assert annotations.visibility.tolist() == rows  # the file's own stay


def test_as_many_visible_joints_are_drawn_of_all_chosen_persons_alike(tmp_path: Path) -> None:
    annotations = read_coco(persons_file(tmp_path, [[1, 2, 2, 2]] * 50 + [[1, 1, 1, 1]] * 50))
    labelled = choose_labelled(annotations, LabelsConfig())
    chosen = dataclasses.replace(labelled, rows=labelled.rows[:50])
    taken = []
    for seed in range(20):
        dropped, _ = drop_labels(annotations, chosen, LabelsConfig(drop="visible", seed=seed))
        assert (dropped.visibility[50:] == 1).all()  # persons that were not chosen keep theirs
        assert (dropped.visibility[:, 0] == 1).all()
        taken.append((dropped.visibility[:50, 1:] == 0).sum(0))
    assert len({tuple(counts) for counts in taken}) > 10
    assert np.mean(taken, axis=0) == pytest.approx([50 / 3] * 3, abs=2)
