"""Labels by stand-ins whose heatmaps are known, thresholds against a naive search, training on what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetune import pseudo_labels
from finetune.__main__ import main
from finetune.pseudo_labels import nearest_threshold
from poserelay import __version__
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.datasets.coco import read_coco
from poserelay.datasets.topdown import TopDownDataset
from poserelay.keypoints import Skeleton, load_skeleton, resolve_skeleton
from poserelay.model import build_model
from poserelay.run import file_sha256

from .test_ensemble import OTHER, Colours, export, network, together
from .test_inference import BOXES, FIRST, SECOND, picture
from .test_training import finetune_arguments

LIMBS = (("red", "left_green"), ("red", "right_blue"))
SKELETON = Skeleton("blobs", ("red", "left_green", "right_blue"), limbs=LIMBS, sigmas=(0.1, 0.1, 0.1))
FIRST_BOX, SECOND_BOX = BOXES.tolist()
CLOSE = [41.0, 31.0, 58.0, 88.0]  # another box of the first person
EMPTY = [0.0, 120.0, 40.0, 50.0]


def found(image: int, box: list[float], score: float, category: int = 1) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


PERSONS = [
    found(11, CLOSE, 0.9),
    found(11, SECOND_BOX, 0.8),
    found(11, FIRST_BOX, 0.95),
    found(11, EMPTY, 0.99),
    found(12, FIRST_BOX, 0.6),
    found(12, FIRST_BOX, 0.7, category=2),
    found(13, FIRST_BOX, 0.2),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hand-off files."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate("pq"):
        export(folder / f"{name}.safetensors", network(seed))
    return folder


@pytest.fixture
def folder(weights: Path, tmp_path: Path) -> Path:
    """Three pictures: both persons, the first with a faint blue joint, nobody; and two files of real weights."""
    (tmp_path / "in").mkdir()
    faint = picture((180, 240), FIRST)
    faint[..., 2] = (0.7 * faint[..., 2]).astype(np.uint8)
    pictures = {"a": picture((180, 240), FIRST, SECOND), "b": faint, "c": np.zeros((180, 240, 3), np.uint8)}
    for name, image in pictures.items():
        cv2.imwrite(str(tmp_path / f"in/{name}.png"), image[..., ::-1])
    images = [
        {"id": 11 + row, "file_name": f"{name}.png", "height": 180, "width": 240} for row, name in enumerate(pictures)
    ]
    write(tmp_path / "people.images.json", {"images": images, "annotations": [], "categories": [{"id": 1}]})
    write(tmp_path / "people.json", PERSONS)
    for file in weights.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the networks two that see colours, of strides 8 and 4."""
    models = Colours(8, skeleton=SKELETON, **OTHER), Colours(4, skeleton=SKELETON)
    monkeypatch.setattr(pseudo_labels, "load_models", lambda _: together(*models))


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def arguments(folder: Path, *more: str) -> list[str]:
    fixed = {
        "checkpoints": f"[{folder}/p.safetensors, {folder}/q.safetensors]",
        "images": f"{folder}/in",
        "boxes": f"{folder}/people.json",
        "out": f"{folder}/pseudo.json",
        "workers": "0",
        "threads": "1",
        "device": "cpu",
    }
    return ["pseudo-labels", *(part for name, value in fixed.items() for part in (f"--{name}", value)), *more]


def labelled_file(path: Path, persons: int, images: int) -> str:
    """A labelled file; a crowd, a person without a joint and an image without anyone must not count as persons."""
    joints = [1, 2, 2, 0, 0, 0, 5, 6, 1]
    records = [{"keypoints": joints} for _ in range(persons)]
    records += [{"keypoints": joints, "iscrowd": 1}, {"keypoints": [0] * 9}]
    fixed = {"image_id": 0, "category_id": 4, "bbox": [0, 0, 9, 9]}
    pictures = [{"id": row, "file_name": f"{row}.png", "height": 9, "width": 9} for row in range(images)]
    return str(
        write(
            path,
            {
                "images": pictures,
                "annotations": [{"id": row, **fixed, **record} for row, record in enumerate(records)],
                "categories": [{"id": 4, "name": "blob", "keypoints": list(SKELETON.joints)}],
            },
        )
    )


@pytest.mark.usefixtures("stand_ins")
def test_labels_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A doubled box, a box without a person, another category, a faint joint, a score below, a picture of nobody."""
    # the mean map of strides 8 and 4 peaks at 0.75 to 1 of a blob
    assert main(arguments(folder, "--box_threshold", "0.3", "--joint_threshold", "0.72")) == 0
    out, error = capsys.readouterr()
    assert out == f"{folder}/pseudo.json\n"
    assert error.splitlines()[-2:] == [
        "pseudo-labels: 3 persons on 2 of 3 pictures, 8 joints kept of 15, boxes scored at least 0.3",
        "pseudo-labels: left out: 1 persons without a confident joint, 1 duplicates",
    ]
    text = (folder / "pseudo.json").read_text()
    written = json.loads(text)
    assert [image["file_name"] for image in written["images"]] == ["a.png", "b.png", "c.png"]
    assert written["categories"] == [
        {"id": 1, "name": "blobs", "keypoints": list(SKELETON.joints), "skeleton": [[1, 2], [1, 3]]}
    ]
    second, first, faint = written["annotations"]
    assert [(r["id"], r["image_id"], r["bbox"]) for r in (second, first, faint)] == [
        (1, 11, SECOND_BOX),
        (2, 11, FIRST_BOX),  # the likelier of its two boxes
        (3, 12, FIRST_BOX),
    ]
    for record, joints, box_score in ((second, SECOND, 0.8), (first, FIRST, 0.95), (faint, FIRST, 0.6)):
        kept = np.reshape(record["keypoints"], (3, 3))
        labelled = [2, 2, 0] if record is faint else [2, 2, 2]
        assert kept[:, 2].tolist() == labelled
        # 1.2 are a tenth of a pixel of the coarser map
        np.testing.assert_allclose(kept[:, :2], np.where(np.array(labelled)[:, None] > 0, joints, 0), atol=1.2)
        np.testing.assert_array_equal(kept, kept.round(2))
        assert record["num_keypoints"] == sum(flag > 0 for flag in labelled)
        assert 0.6 * box_score < record["score"] < box_score
        assert record["iscrowd"] == 0
    assert written["info"] == {
        "description": "pseudo-labels: joints predicted by models, none of them annotated",
        "poserelay": __version__,
        "checkpoints": [
            {"name": name, "sha256": file_sha256(folder / name)} for name in ("p.safetensors", "q.safetensors")
        ],
        "boxes": {"name": "people.json", "sha256": file_sha256(folder / "people.json")},
        "pictures": {"name": "people.images.json", "sha256": file_sha256(folder / "people.images.json")},
        "match": None,
        "persons_per_picture": None,
        "box_threshold": 0.3,
        "joint_threshold": 0.72,
        "decoding": {
            "refine": "parabola",
            "blur": 0.0,
            "flip": True,
            "flip_shift": None,
            "rescore_threshold": 0.2,
            "nms": "hard",
            "nms_threshold": 0.9,
        },
        "counts": {
            "pictures": 3,
            "pictures_with_persons": 2,
            "pictures_unreadable": 0,
            "persons": 3,
            "persons_without_joint": 1,
            "persons_duplicate": 1,
            "joints": 8,
            "joints_predicted": 15,
        },
    }
    assert str(folder) not in text
    # again, with another number of data processes, over what is there
    assert main(arguments(folder, "--box_threshold", "0.3", "--joint_threshold", "0.72", "--workers", "1")) == 0
    assert (folder / "pseudo.json").read_text() == text


@pytest.mark.usefixtures("stand_ins")
def test_what_is_written_is_read_as_labels(folder: Path) -> None:
    assert main(arguments(folder, "--box_threshold", "0.3", "--joint_threshold", "0.72")) == 0
    annotations = read_coco(folder / "pseudo.json")
    assert annotations.persons.tolist() == [0, 1, 2]
    assert annotations.visibility.tolist() == [[2, 2, 2], [2, 2, 2], [2, 2, 0]]
    np.testing.assert_allclose(annotations.areas, 0.53 * 60 * 90)
    crops = TopDownDataset(annotations, folder / "in", resolve_skeleton("auto", annotations.category), (96, 64))
    image = crops[2].image
    for (x, y), channel in zip(crops[2].keypoints.round().astype(int)[:2], (0, 1), strict=True):
        assert image[channel, y, x] > 240  # where the blob is brightest


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=20),
    st.integers(1, 8),
    st.integers(1, 12),
    st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_the_nearest_threshold_equals_a_naive_search(
    tenths: list[int], pictures: int, persons: int, of_pictures: int
) -> None:
    scores = np.array(tenths) / 10
    wanted = Fraction(persons, of_pictures) * pictures
    best = None
    for threshold in sorted(set(scores.tolist()), reverse=True):
        distance = abs(sum(score >= threshold for score in scores.tolist()) - wanted)
        if best is None or distance < best[0]:
            best = distance, threshold
    assert best is not None
    assert nearest_threshold(scores, pictures, persons, of_pictures) == best[1]


def test_a_tie_takes_the_higher_threshold_and_equal_scores_stay_together() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.1])
    assert nearest_threshold(scores, 2, 1, 1) == 0.9  # 1 or 3 of the 2 wanted
    assert nearest_threshold(scores, 5, 1, 2) == 0.5  # 3 of the 2.5 wanted
    assert nearest_threshold(scores, 1, 1, 100) == 0.9  # somebody is left


@pytest.mark.usefixtures("stand_ins")
def test_the_threshold_follows_a_labelled_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 persons on 3 pictures: of the six persons of the detector (0.99, 0.95, 0.9, 0.8, 0.6, 0.2) the first four."""
    match = labelled_file(folder / "labelled.json", persons=4, images=3)
    assert main(arguments(folder, "--match", match, "--joint_threshold", "0.72")) == 0
    error = capsys.readouterr().err
    assert "boxes scored at least 0.8, chosen for 1.333 persons per picture" in error
    assert "warning" not in error
    info = json.loads((folder / "pseudo.json").read_text())["info"]
    assert (info["box_threshold"], info["persons_per_picture"]) == (0.8, 4 / 3)
    assert info["match"] == {"name": "labelled.json", "sha256": file_sha256(folder / "labelled.json")}
    assert info["counts"]["joints_predicted"] == 3 * 4


@pytest.mark.usefixtures("stand_ins")
def test_too_few_detections_are_all_taken_with_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    match = labelled_file(folder / "labelled.json", persons=5, images=2)
    assert main(arguments(folder, "--match", match, "--joint_threshold", "0.72")) == 0
    error = capsys.readouterr().err
    assert "6 detections on 3 pictures, but 2.5 persons per picture" in error
    assert "are 7; all are taken" in error
    assert "boxes scored at least 0.2" in error


@pytest.mark.usefixtures("stand_ins")
def test_unreadable_pictures_are_left_out_up_to_a_share(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "in/a.png").write_bytes((folder / "in/a.png").read_bytes()[:200])
    options = ("--box_threshold", "0.3", "--joint_threshold", "0.72")
    assert main(arguments(folder, *options)) == 3
    assert "1 of 2 pictures with a person are unreadable (named above)" in capsys.readouterr().err
    assert not (folder / "pseudo.json").exists()
    assert main(arguments(folder, *options, "--max_unreadable", "0.5")) == 0
    error = capsys.readouterr().err
    assert f"warning: left out: {folder}/in/a.png: " in error
    assert "left out: 1 unreadable pictures" in error
    written = json.loads((folder / "pseudo.json").read_text())
    assert [record["image_id"] for record in written["annotations"]] == [12]
    assert len(written["images"]) == 3
    (folder / "in/b.png").write_bytes(b"")
    assert main(arguments(folder, *options, "--max_unreadable", "1")) == 3


def overwrite(name: str, value: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder / name, value)


WRONG: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "neither": (bool, [], "give either box_threshold or match"),
    "both": (bool, ["--box_threshold", "0.5", "--match", "a.json"], "give either box_threshold or match"),
    "box": (bool, ["--box_threshold", "1.5"], "box_threshold is 1.5, expected at least 0 and at most 1"),
    "nan": (bool, ["--box_threshold", ".nan"], "box_threshold is nan"),
    "joint": (
        bool,
        ["--box_threshold", "0", "--joint_threshold", "-0.1"],
        "joint_threshold is -0.1, expected at least 0",
    ),
    "soft": (bool, ["--box_threshold", "0", "--decoding.nms", "soft"], "keeps every duplicate; choose hard or fuse"),
    "nothing": (bool, ["--box_threshold", "0", "--checkpoints", "[]"], "checkpoints is empty"),
    "high": (
        bool,
        ["--box_threshold", "1"],
        "these images is scored at least 1.0, the best 0.99",
    ),
    "ids": (
        overwrite("people.json", [found(99, FIRST_BOX, 0.9)]),
        ["--box_threshold", "0"],
        "none of its 1 detections has",
    ),
    "empty": (overwrite("people.json", []), ["--box_threshold", "0"], "an empty list, no detection in it"),
    "flat": (
        overwrite("people.json", [found(11, [5, 5, 0, 9], 0.9)]),
        ["--box_threshold", "0"],
        "(x, y, width, height) has no area",
    ),
    "outside": (
        overwrite("people.json", [found(11, FIRST_BOX, 0.9), found(12, [240, 5, 9, 9], 0.9)]),
        ["--box_threshold", "0"],
        "bbox [240.0, 5.0, 9.0, 9.0] of image 12 lies outside its 240 x 180 pixels (1 such boxes)",
    ),
    "list": (
        lambda folder: (folder / "people.images.json").unlink(),
        ["--box_threshold", "0"],
        "no people.images.json beside it",
    ),
    "missing": (lambda folder: (folder / "in/b.png").unlink(), ["--box_threshold", "0"], "in/b.png: no such picture"),
    "unlabelled": (
        lambda folder: labelled_file(folder / "m.json", persons=0, images=2),
        ["--match", "FOLDER/m.json"],
        "m.json: no person with a labelled joint to count",
    ),
    "out": (
        overwrite("pseudo.json", {"images": []}),
        ["--box_threshold", "0"],
        "exists and holds no pseudo-labels of ours; name another file",
    ),
    "sure": (bool, ["--box_threshold", "0"], "has a confidence above joint_threshold (0.9), the best has"),
    "twice": (
        bool,
        ["--box_threshold", "0", "--checkpoints", "[FOLDER/p.safetensors, FOLDER/p.safetensors]"],
        "named twice; a model in an ensemble counts once",
    ),
    "joints": (
        lambda folder: export(folder / "q.safetensors", network(0, joints=("red", "blue", "green"))),
        ["--box_threshold", "0"],
        "cannot be averaged: the first has the joints",
    ),
    "size": (
        lambda folder: export(folder / "q.safetensors", network(0, height=96)),
        ["--box_threshold", "0"],
        "cannot be averaged: input.height is 64 of the first and 96",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_told(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, more, message = WRONG[name]
    if prepare is not bool:
        prepare(folder)
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    assert main(arguments(folder, *(text.replace("FOLDER", str(folder)) for text in more))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == before


def test_no_input_is_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels of an earlier round may be what the next is matched to, but not while they are replaced."""
    labels = json.loads(Path(labelled_file(folder / "earlier.json", persons=2, images=2)).read_text())
    write(folder / "pseudo.json", {"info": {"description": pseudo_labels.DESCRIPTION}, **labels})
    assert main(arguments(folder, "--match", f"{folder}/pseudo.json")) == 2
    assert "would write over what the labels are made from" in capsys.readouterr().err


def test_rendered_people_from_real_files_to_a_step_of_training(people: Path, tmp_path: Path) -> None:
    """The whole way with networks of ours, of strides 16 and 8, sure of every joint."""
    coco = load_skeleton("coco17")
    for deconvolutions, name in ((1, "p"), (2, "q")):
        head = Named("simple", {"deconv_channels": [8] * deconvolutions})
        backbone = Named("timm", {"model": "test_resnet"})
        model = build_model(ModelConfig(backbone, head, input=InputConfig(height=64, width=64)), coco)
        bias: Any = model.head.final_layer.bias
        nn.init.constant_(bias, 0.95)
        export(tmp_path / f"{name}.safetensors", model)
    data = json.loads((people / "annotations.json").read_text())
    boxes = [found(p["image_id"], p["bbox"], 0.9) for p in data["annotations"] if min(p["bbox"][2:]) > 0]
    write(tmp_path / "people.json", boxes[:8])
    match = ("--match", str(people / "annotations.json"), "--annotations", str(people / "annotations.json"))
    assert main(arguments(tmp_path, "--images", str(people / "images"), *match)) == 0
    labels = read_coco(tmp_path / "pseudo.json")
    assert labels.joints == coco.joints
    assert len(labels.image_ids) == len(data["images"])
    assert (labels.visibility == 2).all()
    assert 0 < len(labels.persons) <= 8
    unlabelled = {"annotations": f"{tmp_path}/pseudo.json", "images": f"{people}/images"}
    new = [f"--pseudo_labelled.{name}={value}" for name, value in unlabelled.items()]
    assert main(finetune_arguments(people, tmp_path / "run", *new, "--train_on", "CU", "--optim.steps", "1")) == 0
    assert json.loads((tmp_path / "run/done.json").read_text())["stage"] == "finetune"
