"""Single-stage models in `evaluation`: numbers by another way, scores against true OKS by hand and by pycocotools."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from evaluation import config as fields
from evaluation import predict, score, test
from evaluation.__main__ import main
from evaluation.calibration import NOT_MEASURED, calibration, correlation, format_scores, true_oks
from evaluation.cir_figures import LABEL, draw_quality, draw_scores, few_per_image, free_corner
from finetune.__main__ import main as finetune
from poserelay.checkpoint import describe, write_export
from poserelay.command import to_plain
from poserelay.config import Decoding, InputConfig, ModelConfig, Named, WholeImages
from poserelay.datasets.coco import read_coco
from poserelay.drawing import draw_poses
from poserelay.keypoints import Skeleton
from poserelay.model import build_single_stage, load_model
from poserelay.scoring import evaluate_oks, scored_truth
from poserelay.whole_images import predict_whole
from semi.__main__ import main as semi

from .test_evaluation import SKELETON, annotation, write
from .test_training import semi_arguments

HEAD = {"general_channels": 16, "joint_channels": 4, "instance_channels": 8, "points": 2}


def export_single_stage(path: Path, *, level: float = 0.5) -> Path:
    """A small model of random weights, whose score map has peaks about `level`."""
    torch.manual_seed(0)
    config = ModelConfig(Named("timm", {"model": "test_resnet"}), Named("cir", HEAD), None, "auto", InputConfig(64, 64))
    model = build_single_stage(config, SKELETON)
    for name, parameter in model.head.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05 if name.startswith("score") else 0.5)
    torch.nn.init.constant_(model.head.score.bias, level)  # pyright: ignore[reportArgumentType]
    described = describe(
        stage="finetune", method="cir", model=to_plain(config), skeleton=SKELETON, config={}, upstream=None, metrics={}
    )
    write_export(path, model.state_dict(), described)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, persons near some of what the model finds in them, one in none, and the model."""
    root = tmp_path_factory.mktemp("single stage")
    rng = np.random.default_rng(0)
    (root / "images" / "sub").mkdir(parents=True)
    names = ["a.png", "b.jpg", "sub/c.png", "nobody.png"]
    for name in names:
        coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "images" / name), cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC))
    export_single_stage(root / "model.safetensors")
    model = load_model(root / "model.safetensors")
    annotations: list[dict[str, Any]] = []
    for image, name in enumerate(names[:3], start=1):
        found = model.predict([root / "images" / name])
        for place, record in enumerate(found[:6:2]):
            person = annotation(len(annotations) + 1, image, [10, 10, 60, 70])
            triples = np.reshape(record["keypoints"], (3, 3))
            triples[:, :2] += rng.normal(0, 3 + 4 * place, (3, 2))
            triples[:, 2] = [2, 1, 1]
            annotations.append({**person, "area": 900.0 + 300 * place, "keypoints": triples.ravel().tolist()})
    images = [{"id": n, "file_name": name, "height": 120, "width": 160} for n, name in enumerate(names, start=1)]
    category = {"id": 1, "name": "stick", "keypoints": list(SKELETON.joints), "skeleton": [[1, 2], [1, 3]]}
    write(root / "val.json", {"images": images, "annotations": annotations, "categories": [category]})
    write(root / "skeleton.yaml", SKELETON.to_dict())
    return root


def config_for_test(made: Path, out: Path, **changes: Any) -> fields.TestConfig:
    given = {
        "checkpoint": str(made / "model.safetensors"),
        "annotations": str(made / "val.json"),
        "images": str(made / "images"),
        "out": str(out),
        "workers": 0,
        "device": "cpu",
    }
    return fields.TestConfig(**{**given, **changes})


def changed_truth(made: Path, out: Path, kind: str) -> str:
    """The truth as it is, with crowdIndex and head boxes, or with other joints in another order."""
    truth = json.loads((made / "val.json").read_text())
    if kind == "crowded":
        for image in truth["images"]:
            image["crowdIndex"] = 0.25 * image["id"]
        for person in truth["annotations"]:
            person["head_box"] = [10, 10, 22, 26]
        truth["annotations"][0]["keypoints"][5] = 0
    if kind == "other joints":
        truth["categories"][0]["keypoints"] = ["right_foot", "tail", "head"]
        for person in truth["annotations"]:
            head, _, foot = np.reshape(person["keypoints"], (3, 3)).tolist()
            person["keypoints"] = [*foot, 20.0, 90.0, 2, *head]
    return str(write(out / "truth.json", truth))


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [("plain", {}), ("crowded", {"labelled_joints": 3}), ("other joints", {"joints": "visible"})],
)
def test_scoring_the_written_predictions_gives_the_same_numbers(
    made: Path, tmp_path: Path, kind: str, chosen: dict[str, Any]
) -> None:
    """By another way through the code; AP is neither 0 nor 1."""
    truth = changed_truth(made, tmp_path, kind)
    report = test.main(config_for_test(made, tmp_path, annotations=truth, **chosen))
    assert json.loads((tmp_path / "metrics.json").read_text()) == report
    assert 0 < report["metrics"]["AP"] < 1
    asked = fields.ScoreConfig(
        truth, str(tmp_path / "predictions.json"), skeleton=str(made / "skeleton.yaml"), **chosen
    )
    for metric in ("oks", "pckh", "pck") if kind == "crowded" else ("oks", "pck"):
        scored = score.main(replace(asked, metric=metric))
        assert scored["metrics"] == {name: report["metrics"][name] for name in scored["metrics"]}
        assert scored["protocol"]["instances"] == report["protocol"]["instances"]
    counted = {"pearson", "spearman", "poses", "of_best"}
    assert report["scores"].keys() == counted
    assert all(report["scores"][name] is not None for name in counted)
    assert ("AP hard" in report["metrics"]) == (kind == "crowded")
    if kind == "other joints":
        assert report["protocol"]["unscored"] == ["tail"]
        written = json.loads((tmp_path / "predictions.json").read_text())
        assert all(record["keypoints"][3:6] == [0, 0, 0] for record in written)


def test_the_poses_are_those_of_predict_and_the_protocol_says_how(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoding = Decoding(nms_threshold=0.5, flip=False, whole=WholeImages((1.0, 0.5), max_poses=7))
    asked = config_for_test(made, tmp_path, decoding=decoding, batch_size=2)
    report = test.main(asked)
    printed = capsys.readouterr().out
    expected = {
        "split": "val",
        "boxes": "none",
        "images": 4,
        "instances": 9,
        "short_side": 64,
        "scales": [1.0, 0.5],
        "flip": False,
        "max_poses": 7,
        "nms": 0.5,
        "matching": "nearest pose of the image",
    }
    assert expected.items() <= report["protocol"].items()
    assert "boxes_predicted" not in report["protocol"]
    assert format_scores(report["scores"]) in printed.splitlines()
    # All pictures have one size, so that batches pad nothing.
    written = json.loads((tmp_path / "predictions.json").read_text())
    model: Any = load_model(made / "model.safetensors")
    names = {image["id"]: image["file_name"] for image in json.loads((made / "val.json").read_text())["images"]}
    for image_id, name in names.items():
        alone = predict_whole(model, [made / "images" / name], asked.decoding)
        its = [record for record in written if record["image_id"] == image_id]
        assert len(its) == len(alone) > 0
        for one, other in zip(its, alone, strict=True):
            np.testing.assert_allclose(one["keypoints"], other["keypoints"], rtol=1e-4, atol=1e-3)
    # The default batch holds all four.
    again = test.main(replace(asked, batch_size=None, json=True))
    assert again["metrics"] == pytest.approx(report["metrics"], nan_ok=True, abs=1e-6)


def test_the_mean_pose_stands_in_the_annotated_boxes(made: Path, tmp_path: Path) -> None:
    """Of persons who all stand alike in their boxes it is the truth."""
    boxes: list[tuple[int, list[float]]] = [
        (1, [10, 10, 40, 80]),
        (1, [60, 20, 60, 90]),
        (2, [30, 5, 80, 100]),
        (3, [5, 5, 50, 100]),
    ]
    truth = json.loads((made / "val.json").read_text())
    truth["annotations"] = [annotation(number, image, box) for number, (image, box) in enumerate(boxes)]
    truth["annotations"].append(
        {**truth["annotations"][0], "id": 9, "image_id": 4, "keypoints": [0] * 9, "num_keypoints": 0}
    )
    alike = str(write(tmp_path / "alike.json", truth))
    report = test.main(config_for_test(made, tmp_path, annotations=alike, baseline_annotations=alike))
    assert report["metrics"]["mean pose PCK"] == 1.0
    assert report["metrics"]["mean pose AP"] == pytest.approx(1.0)
    assert report["metrics"]["PCK"] < 1
    assert report["protocol"]["baseline"] == "alike"


def hidden_file(made: Path, out: Path) -> str:
    truth = json.loads((made / "val.json").read_text())
    return str(write(out / "image_info.json", {"images": truth["images"], "categories": []}))


def test_a_hidden_test_set_needs_no_boxes(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test.main(config_for_test(made, tmp_path))
    expected = json.loads((tmp_path / "predictions.json").read_text())
    capsys.readouterr()
    hidden = hidden_file(made, tmp_path)
    report = test.main(config_for_test(made, tmp_path / "hidden", annotations=hidden))
    assert json.loads((tmp_path / "hidden" / "predictions.json").read_text()) == expected
    assert (report["metrics"], report["joints"], report["scores"]) == ({}, {}, NOT_MEASURED)
    assert report["protocol"]["truth"] == "hidden, nothing is scored"
    assert "Spearman" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--boxes", "{root}/val.json"], "a single-stage model finds the persons itself; leave boxes out"),
        (["--annotations", "{hidden}"], "give out, a folder for the predictions"),
        (["--annotations", "{hidden}", "--out", "{out}", "--joints", "visible"], "leave out baseline_annotations"),
        (["--checkpoint", "[{root}/model.safetensors, {out}/twin.safetensors]"], "holds a single-stage model"),
        (["--images", "{out}"], "cannot list this image folder"),
        (["--batch_size", "0"], "batch_size is 0"),
    ],
)
def test_mistakes_end_with_exit_2(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    shutil.copy(made / "model.safetensors", tmp_path / "twin.safetensors")
    values = {"{root}": str(made), "{out}": str(tmp_path), "{hidden}": hidden_file(made, tmp_path)}
    for name, value in values.items():
        more = [part.replace(name, value) for part in more]
    given = ["--checkpoint", f"{made}/model.safetensors", "--annotations", f"{made}/val.json"]
    arguments = ["test", *given, "--images", f"{made}/images", "--workers", "0", "--device", "cpu", *more]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def predict_config(made: Path, out: Path, **changes: Any) -> fields.PredictConfig:
    given = {"checkpoint": str(made / "model.safetensors"), "images": str(made / "images"), "out": str(out)}
    return fields.PredictConfig(**{**given, "batch_size": 1, "device": "cpu", **changes})


def test_predict_finds_all_persons_of_every_upright_picture(made: Path, tmp_path: Path) -> None:
    model = load_model(made / "model.safetensors")
    results = predict.main(predict_config(made, tmp_path / "drawn"))
    assert json.loads((tmp_path / "drawn" / "predictions.json").read_text()) == results
    names = sorted(path.relative_to(made / "images").as_posix() for path in (made / "images").rglob("*.*"))
    for image_id, name in enumerate(names, start=1):
        alone = model.predict([made / "images" / name])
        its = [record for record in results if record["file_name"] == name]
        assert its == [{**record, "image_id": image_id, "file_name": name} for record in alone]
        drawn = cv2.imread(str(tmp_path / "drawn/pictures" / (name if name.endswith("jpg") else f"{name}.jpg")))
        original = cv2.imread(str(made / "images" / name))
        assert np.abs(np.int64(drawn) - np.int64(original)).max() > 100  # pyright: ignore[reportArgumentType]
    x, y, width, height = results[0]["bbox"]
    triples = np.reshape(results[0]["keypoints"], (3, 3))
    np.testing.assert_allclose([x, y, x + width, y + height], [*triples[:, :2].min(0), *triples[:, :2].max(0)])

    data = (made / "images" / "b.jpg").read_bytes()
    # EXIF with the single tag Orientation = 6: shown turned by a quarter.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    turned = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    (tmp_path / "turned.jpg").write_bytes(turned)
    found = predict.main(predict_config(made, tmp_path / "upright", images=str(tmp_path / "turned.jpg")))
    stored = cv2.imread(str(made / "images" / "b.jpg"))
    assert stored is not None
    upright = np.ascontiguousarray(cv2.cvtColor(np.rot90(stored, -1), cv2.COLOR_BGR2RGB))
    assert [record["keypoints"] for record in found] == [record["keypoints"] for record in model.predict([upright])]
    drawn = cv2.imread(str(tmp_path / "upright/pictures/turned.jpg"))
    assert drawn is not None
    assert drawn.shape == (160, 120, 3)


def test_a_picture_without_anybody_is_drawn_as_it_is(made: Path, tmp_path: Path) -> None:
    export_single_stage(tmp_path / "blind.safetensors", level=-5.0)
    shutil.copytree(made / "images", tmp_path / "images")
    blind = predict_config(made, tmp_path / "drawn", checkpoint=str(tmp_path / "blind.safetensors"))
    assert predict.main(replace(blind, images=str(tmp_path / "images"))) == []
    assert json.loads((tmp_path / "drawn" / "predictions.json").read_text()) == []
    drawn, original = cv2.imread(str(tmp_path / "drawn/pictures/a.png.jpg")), cv2.imread(str(made / "images/a.png"))
    assert np.abs(np.int64(drawn) - np.int64(original)).mean() < 3  # pyright: ignore[reportArgumentType]
    # And nothing found is nothing scored well, not an error.
    report = test.main(config_for_test(made, tmp_path, checkpoint=str(tmp_path / "blind.safetensors")))
    assert (report["metrics"]["AP"], report["metrics"]["PCK"]) == (0.0, 0.0)
    assert report["scores"] == NOT_MEASURED
    assert format_scores(report["scores"]).startswith("score against true OKS: Spearman -, Pearson - over 0 poses (")


def test_predict_takes_no_boxes(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--checkpoint", f"{made}/model.safetensors", "--images", f"{made}/images", "--device", "cpu"]
    assert main(["predict", *given, "--boxes", f"{made}/val.json", "--out", str(tmp_path / "drawn")]) == 2
    assert "a single-stage model finds the persons itself; leave boxes out" in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize("command", ["timing", "scio", "embeddings", "pseudo_labels", "semi"])
def test_commands_for_crops_of_persons_refuse_a_single_stage_model(
    made: Path, people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    checkpoint, out = f"{made}/model.safetensors", str(tmp_path / "out")
    data = ["--annotations", f"{made}/val.json", "--images", f"{made}/images"]
    boxes = write(tmp_path / "b.json", [{"image_id": 1, "category_id": 1, "bbox": [9, 9, 40, 80], "score": 1}])
    labels = ["--boxes", str(boxes), "--box_threshold", "0", "--out", f"{out}.json"]
    code = {
        "timing": lambda: main(["timing", "--checkpoint", checkpoint, *data, "--out", out]),
        "scio": lambda: main(["scio", "--checkpoint", checkpoint, *data, "--out", out]),
        "embeddings": lambda: main(["embeddings", "--checkpoints", f"[{checkpoint}]", *data, "--out", out]),
        "pseudo_labels": lambda: finetune(["pseudo-labels", "--checkpoints", f"[{checkpoint}]", *data, *labels]),
        "semi": lambda: semi(
            semi_arguments(people, tmp_path / "out", "--teacher", "{name: pseudo}", "--teacher_from", checkpoint)
        ),
    }[command]()
    error = capsys.readouterr().err
    assert code == 2
    assert f"{checkpoint}: holds a single-stage model (head cir), and this works on crops of persons" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


TWO = Skeleton("two", ("a", "b"), sigmas=(0.05, 0.1))


def two_joints(tmp_path: Path, *, crowd: bool = False) -> Path:
    """On image 1 two persons, one of them without b; on image 2 a person and a crowd; on image 3 nobody."""
    persons = [
        {"image_id": 1, "area": 100.0, "keypoints": [10, 10, 2, 20, 10, 1]},
        {"image_id": 1, "area": 400.0, "keypoints": [50, 50, 2, 0, 0, 0]},
        {"image_id": 2, "bbox": [0, 0, 10, 20], "keypoints": [5, 5, 2, 5, 15, 2]},
        {"image_id": 2, "iscrowd": 1, "area": 9.0, "keypoints": [90, 90, 2, 90, 90, 2]},
        {"image_id": 2, "area": 9.0, "keypoints": [0, 0, 0, 0, 0, 0], "num_keypoints": 0},
    ]
    default = {"category_id": 1, "bbox": [0, 0, 60, 60]}
    images = [{"id": n, "file_name": f"{n}.png", "width": 100, "height": 100} for n in (1, 2, 3)]
    category = {"id": 1, "name": "person", "keypoints": ["a", "b"]}
    records = [{"id": number, **default, **person} for number, person in enumerate(persons, start=1)]
    if crowd:
        images = [{**image, "crowdIndex": 0.5} for image in images]
    return write(tmp_path / "two.json", {"images": images, "annotations": records, "categories": [category]})


def pose(image: int, xy: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": 1, "keypoints": [*xy[:2], 1.0, *xy[2:], 1.0], "score": score}


def test_true_oks_and_its_correlation_by_hand(tmp_path: Path) -> None:
    """k = 2 sigma: 2 s^2 k^2 is 0.02 s^2 of joint a and 0.08 s^2 of joint b."""
    results = [
        pose(1, [11, 10, 20, 12], 0.9),  # the first person: 1 and 2 pixels off
        pose(1, [50, 54, 0, 0], 0.5),  # the second, whose b is not labelled: 4 pixels off
        pose(2, [5, 5, 5, 15], 0.8),  # the truth
        pose(2, [90, 90, 90, 90], 0.7),  # the crowd's truth, which is no person
        pose(3, [5, 5, 5, 15], 0.6),  # an image with nobody
    ]
    first = (np.exp(-1 / (0.02 * 100)) + np.exp(-4 / (0.08 * 100))) / 2
    second = np.exp(-16 / (0.02 * 400))
    truth = scored_truth(read_coco(two_joints(tmp_path)), TWO)
    found = true_oks(truth, results, TWO)
    np.testing.assert_allclose(found, [first, second, 1, 0, 0], atol=1e-9)
    # Ranks of the scores 5, 1, 4, 3, 2 and of the OKS 4, 3, 5, 1.5, 1.5: covariance 5.5 of variances 10 and 9.5.
    ranks = np.array([[5, 1, 4, 3, 2], [4, 3, 5, 1.5, 1.5]]) - 3
    by_hand = float((ranks[0] * ranks[1]).sum() / np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    assert by_hand == pytest.approx(5.5 / np.sqrt(95))
    scores = np.array([record["score"] for record in results])
    linear = np.corrcoef(scores, [first, second, 1, 0, 0])[0, 1]
    report = calibration(truth, results, TWO)
    # The best of the images score 0.9, 0.8 and 0.6: ranks 3, 2, 1 against those of the OKS, 2, 3, 1.
    of_best = {"1": pytest.approx(0.5), "2": pytest.approx(by_hand), "5": pytest.approx(by_hand)}
    whole = {"spearman": pytest.approx(by_hand), "pearson": pytest.approx(linear), "poses": 5}
    assert report == {**whole, "of_best": of_best}
    assert format_scores(report) == (
        f"score against true OKS: Spearman +0.5643, Pearson {linear:+.4f} over 5 poses (Spearman +0.5000 of the "
        "best 1, +0.5643 of the best 2, +0.5643 of the best 5 of an image)"
    )

    crowded = scored_truth(read_coco(two_joints(tmp_path, crowd=True)), TWO)
    area = 0.53 * 60 * 60  # CrowdPose's, whatever the file says
    first = (np.exp(-1 / (0.02 * area)) + np.exp(-4 / (0.08 * area))) / 2
    np.testing.assert_allclose(true_oks(crowded, results, TWO)[0], first)


def test_only_joints_and_persons_that_are_scored_count(tmp_path: Path) -> None:
    """With joints visible b counts for the person of image 2 alone; with two labelled joints the second of image 1,
    and the poses that are nearest to it, are left out."""
    results = [pose(1, [10, 10, 99, 99], 0.9), pose(1, [50, 50, 0, 0], 0.5), pose(2, [5, 5, 99, 99], 0.8)]
    annotations = read_coco(two_joints(tmp_path))
    np.testing.assert_allclose(true_oks(scored_truth(annotations, TWO, "visible"), results, TWO), [1, 1, 0.5])
    full = scored_truth(annotations, TWO, labelled_joints=2)
    assert calibration(full, results, TWO)["poses"] == 2
    only = Skeleton("one", ("b",), sigmas=(0.1,))
    b = [{**record, "keypoints": record["keypoints"][3:]} for record in results]
    b[2]["keypoints"] = [5, 15, 1]
    np.testing.assert_allclose(true_oks(scored_truth(annotations, only), b, only), [0, 0, 1], atol=1e-9)


@pytest.mark.parametrize(("scores", "oks"), [([], []), ([0.5], [0.5]), ([0.5, 0.5], [0.1, 0.2]), ([1, 2], [0, 0])])
def test_a_coefficient_that_is_not_defined_is_none(scores: list[float], oks: list[float]) -> None:
    expected = {"spearman": None, "pearson": None, "poses": len(scores)}
    assert correlation(np.array(scores), np.array(oks)) == expected


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), images=st.integers(1, 5), crowd=st.booleans())
def test_true_oks_is_that_of_pycocotools(
    tmp_path_factory: pytest.TempPathFactory, seed: int, images: int, crowd: bool
) -> None:
    rng = np.random.default_rng(seed)
    listed: list[dict[str, Any]] = [
        {"id": 7 * n, "file_name": f"{n}.png", "width": 100, "height": 100} for n in range(images)
    ]
    persons, results = [], []
    for image in listed:
        image |= {"crowdIndex": 0.5} if crowd else {}
        for _ in range(rng.integers(0, 5)):
            triples = np.column_stack([rng.uniform(0, 100, (3, 2)), rng.integers(0, 3, 3)])
            triples[triples[:, 2] == 0] = 0
            person = {"image_id": image["id"], "keypoints": triples.ravel().tolist(), "category_id": 1}
            person |= {"id": len(persons), "bbox": [*rng.uniform(0, 50, 2), *rng.uniform(10, 80, 2)]}
            persons.append(person | ({"area": rng.uniform(50, 5000)} if rng.random() < 0.7 else {}))
        for _ in range(rng.integers(0, 9)):
            xy = rng.uniform(0, 100, (3, 2))
            results.append(
                pose(image["id"], [0] * 4, rng.random()) | {"keypoints": np.c_[xy, xy[:, 0]].ravel().tolist()}
            )
    persons.append({"image_id": 0, "id": 99, "category_id": 1, "bbox": [1, 1, 9, 9], "keypoints": [5, 5, 2] + [0] * 6})
    order = rng.permutation(len(results))
    results, persons = [results[row] for row in order], [persons[row] for row in rng.permutation(len(persons))]
    category = {"id": 1, "name": "stick", "keypoints": list(SKELETON.joints)}
    file = tmp_path_factory.mktemp("random") / "truth.json"
    data = {"images": listed, "annotations": persons, "categories": [category]}
    write(file, data)
    found = true_oks(scored_truth(read_coco(file), SKELETON), results, SKELETON)

    theirs = evaluate_oks(data, results, SKELETON, area_of_box=crowd)
    for image in listed:
        rows = [row for row, record in enumerate(results) if record["image_id"] == image["id"]]
        rows.sort(key=lambda row: -results[row]["score"])
        labelled = [any(person["keypoints"][2::3]) for person in persons if person["image_id"] == image["id"]]
        matrix = np.reshape(theirs.ious[image["id"], 1], (len(rows), -1 if rows else len(labelled)))
        expected = matrix[:, np.flatnonzero(labelled)].max(1, initial=0)
        np.testing.assert_allclose(found[rows], expected, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(images=st.lists(st.integers(0, 6), max_size=60), seed=st.integers(0, 2**31))
def test_five_poses_of_an_image_are_drawn_at_random(images: list[int], seed: int) -> None:
    ids = np.array(images, dtype=np.int64)
    rows = few_per_image(ids, seed)
    assert np.all(np.diff(rows) > 0)
    for image in set(images):
        assert (ids[rows] == image).sum() == min(5, images.count(image))


def test_every_pose_can_be_drawn() -> None:
    chosen = np.zeros(20)
    for seed in range(200):
        chosen[few_per_image(np.zeros(20, dtype=np.int64), seed)] += 1
    assert (chosen > 20).all()  # 50 on average
    assert (chosen < 90).all()


@pytest.fixture(scope="module")
def results(made: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The results of `test`, and worse ones whose scores tell nothing."""
    root = tmp_path_factory.mktemp("results")
    test.main(config_for_test(made, root / "good"))
    records = json.loads((root / "good" / "predictions.json").read_text())
    rng = np.random.default_rng(1)
    for record in records:
        record["keypoints"] = (np.array(record["keypoints"]) + np.tile([*rng.normal(0, 6, 2), 0], 3)).tolist()
        record["score"] = float(rng.random())
    (root / "worse").mkdir()
    return [str(root / "good/predictions.json"), str(write(root / "worse/predictions.json", records))]


def figure_config(made: Path, out: Path, results: list[str], figure: Any, **changes: Any) -> fields.VisualizeConfig:
    given = {"annotations": str(made / "val.json"), "predictions": results, "skeleton": str(made / "skeleton.yaml")}
    return fields.VisualizeConfig(figure, str(out), **given, **changes)


def test_the_scatter_has_the_poses_and_the_coefficient_of_test(made: Path, tmp_path: Path, results: list[str]) -> None:
    figure = draw_scores(figure_config(made, tmp_path, results, "scores"))
    report = test.main(config_for_test(made, tmp_path))
    good, worse = figure.axes[:2]
    total = report["scores"]["poses"]
    assert good.get_title() == f"good\nSpearman {report['scores']['spearman']:+.3f} over {total:,} poses"
    assert worse.get_title().startswith("worse\nSpearman ")
    records = json.loads(Path(results[0]).read_text())
    truth = scored_truth(read_coco(made / "val.json"), SKELETON)
    all_points = {
        (record["score"], value) for record, value in zip(records, true_oks(truth, records, SKELETON), strict=True)
    }
    points = np.asarray(good.collections[0].get_offsets())
    images = [record["image_id"] for record in records]
    assert len(points) == sum(min(5, images.count(image)) for image in set(images)) < total
    assert {tuple(point) for point in points.tolist()} <= all_points
    assert (
        points.tolist()
        != np.asarray(
            draw_scores(figure_config(made, tmp_path, results, "scores", seed=1)).axes[0].collections[0].get_offsets()
        ).tolist()
    )


def test_the_pictures_show_the_best_poses_with_score_and_oks(made: Path, tmp_path: Path, results: list[str]) -> None:
    asked = figure_config(made, tmp_path, results, "quality", images=str(made / "images"), count=2)
    figure = draw_quality(asked)
    cells = np.array(figure.axes).reshape(2, 2)
    assert [cell.get_title() for cell in cells[0]] == ["good", "worse"]
    assert [cell.get_ylabel() for cell in cells[:, 0]] == ["a.png", "sub/c.png"]  # evenly, of those with a person
    records = [record for record in json.loads(Path(results[0]).read_text()) if record["image_id"] == 1]
    best = sorted(records, key=lambda record: -record["score"])[:3]  # as many as persons
    oks = true_oks(scored_truth(read_coco(made / "val.json"), SKELETON), best, SKELETON)
    expected = [f"Conf. {r['score']:.2f}\nOKS {value:.2f}" for r, value in zip(best, oks, strict=True)]
    assert [text.get_text() for text in cells[0, 0].texts] == expected
    picture = cv2.imread(str(made / "images/a.png"))
    assert picture is not None
    rgb = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), (512, 384), interpolation=cv2.INTER_CUBIC)
    places = np.reshape([record["keypoints"] for record in best], (-1, 3, 3))[..., :2]
    scores = np.repeat([[record["score"]] for record in best], 3, axis=1)
    drawn = draw_poses(rgb, (places + 0.5) * 3.2 - 0.5, scores, SKELETON, threshold=-1)
    assert np.array_equal(cells[0, 0].get_images()[0].get_array(), drawn)


@settings(max_examples=30, deadline=None)
@given(wanted=st.lists(st.tuples(st.floats(-300, 800), st.floats(-300, 300)), max_size=5))
def test_labels_lie_in_the_picture_and_on_no_other(wanted: list[tuple[float, float]]) -> None:
    corners: list[np.ndarray] = []
    for place in wanted:
        corner = free_corner(np.array(place), corners, (512, 580))  # 5 labels below the lowest that is wanted
        assert (corner >= 0).all()
        assert (corner + LABEL <= (512, 580)).all()
        assert not any((np.abs(corner - other) < np.array(LABEL) - 1e-9).all() for other in corners)
        corners.append(corner)
    assert corners[:1] == [] or np.array_equal(corners[0], np.clip(wanted[0], 0, (512 - 104, 580 - 46)))


def test_the_command_draws_both_figures(made: Path, tmp_path: Path, results: list[str]) -> None:
    given = ["--annotations", f"{made}/val.json", "--predictions", json.dumps(results), "--out", str(tmp_path)]
    assert main(["visualize", "--figure", "scores", *given]) == 0
    assert main(["visualize", "--figure", "quality", "--images", f"{made}/images", "--count", "1", *given]) == 0
    for name in ("scores.png", "quality.png"):
        picture = cv2.imread(str(tmp_path / name))
        assert picture is not None
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 5


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--figure", "scores"], "figure scores: annotations is missing"),
        (["--figure", "scores", "--annotations", "{truth}"], "figure scores: predictions is missing"),
        (
            ["--figure", "scores", "{given}", "--images", "{root}/images"],
            "images is of figure gradcam, quality, features,",
        ),
        (["--figure", "quality", "{given}"], "figure quality: images is missing"),
        (
            ["--figure", "losses", "--runs", "[x]", "{given}"],
            "annotations is of figure scores, quality, features,",
        ),
        (["--figure", "scores", "--annotations", "{truth}", "--predictions", "[x, x]"], "predictions names x twice"),
        (
            ["--figure", "scores", "--annotations", "{truth}", "--predictions", "[{truth}]"],
            "expected a list of results",
        ),
        (["--figure", "scores", "--annotations", "{hidden}", "--predictions", "[x]"], "image_info.json: "),
        (["--figure", "quality", "{given}", "--images", "{root}"], "cannot list this image folder"),
        (["--figure", "scores", "{given}", "--seed", "-1"], "seed is -1"),
    ],
)
def test_mistakes_about_the_figures(
    made: Path,
    tmp_path: Path,
    results: list[str],
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    expected: str,
) -> None:
    place = more.index("{given}") if "{given}" in more else len(more)
    given = ["--annotations", "{truth}", "--predictions", f"[{results[0]}]"] if "{given}" in more else []
    more = [*more[:place], *given, *more[place + 1 :]]
    values = {"{truth}": f"{made}/val.json", "{root}": str(made), "{hidden}": hidden_file(made, tmp_path)}
    for name, value in values.items():
        more = [part.replace(name, value) for part in more]
    assert main(["visualize", *more, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_ranks_are_those_of_scipy_with_ties() -> None:
    """Spearman's coefficient is Pearson's of the ranks; the reported one is not of the values."""
    scores, oks = np.array([0.1, 0.2, 0.3, 10.0, 10.0]), np.array([0.0, 0.2, 0.1, 0.3, 0.9])
    found = correlation(scores, oks)
    assert found["spearman"] == pytest.approx(np.corrcoef(rankdata(scores), rankdata(oks))[0, 1])
    assert found["pearson"] == pytest.approx(np.corrcoef(scores, oks)[0, 1])
    assert abs(found["spearman"] - found["pearson"]) > 0.01
