"""Accuracy per joint and SCIO's reliance against naive loops, and the command end to end."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import config as fields
from evaluation import scio
from evaluation import test as testing
from evaluation.__main__ import main
from evaluation.joint_accuracy import joint_means
from evaluation.reliance import (
    annotated_crops,
    blindness,
    displaced,
    format_reliance,
    losses_at,
    reliance,
    reliance_crops,
    shuffled,
)
from poserelay.checkpoint import describe, write_export
from poserelay.command import to_plain
from poserelay.config import Decoding, DistalJoints, InputConfig, ModelConfig, Named
from poserelay.datasets.coco import read_coco
from poserelay.geometry import apply_affine, box_to_affine
from poserelay.keypoints import load_skeleton
from poserelay.model import PoseModel, build_model, load_model

# A tiny network of random weights is confident of nothing.
ANYWHERE = Decoding(scio=DistalJoints(steps=6, proximal_threshold=-1.0, step=4), flip=False, nms_threshold=1.0)


@pytest.fixture(scope="module")
def folder(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rendered people, of whom some joints are not labelled, and two models of random weights."""
    folder = tmp_path_factory.mktemp("scio")
    shutil.copytree(people / "images", folder / "images")
    data = json.loads((people / "annotations.json").read_text())
    for number, person in enumerate(data["annotations"]):
        for joint in (number % 17, (5 * number) % 17):
            person["keypoints"][3 * joint : 3 * joint + 3] = [0, 0, 0]
    (folder / "annotations.json").write_text(json.dumps(data))
    for name, refiner in (
        ("scio", Named("scio", {"width": 3, "feature_channels": 2, "dilations": [1, 2], "sigma": 1.0})),
        ("plain", None),
    ):
        torch.manual_seed(0)
        skeleton = load_skeleton("coco17")
        config = ModelConfig(
            Named("timm", {"model": "test_resnet"}),
            Named("simple", {"deconv_channels": [8, 8, 8]}),
            refiner,
            "coco17",
            InputConfig(64, 64),
        )
        model = build_model(config, skeleton)
        for part in (model.head.final_layer, *([] if model.refiner is None else model.refiner.modules())):
            if isinstance(part, torch.nn.Conv2d):  # maps and losses that differ by more than rounding
                torch.nn.init.normal_(part.weight, std=0.3)
        described = describe(
            stage="finetune",
            method="simple",
            model=to_plain(config),
            skeleton=skeleton,
            config={},
            upstream=None,
            metrics={},
        )
        write_export(folder / f"{name}.safetensors", model.state_dict(), described)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> PoseModel:
    return load_model(folder / "scio.safetensors")


def asked(folder: Path, out: Path, **changes: Any) -> fields.ScioConfig:
    given = {
        "checkpoint": str(folder / "scio.safetensors"),
        "annotations": str(folder / "annotations.json"),
        "images": str(folder / "images"),
        "out": str(out),
        "decoding": ANYWHERE,
        "workers": 0,
        "device": "cpu",
    }
    return fields.ScioConfig(**{**given, **changes})


def naive_terms(distance: float, area: float, sigma: float) -> tuple[float, float]:
    """Accuracy and OKS term of one joint; a NaN distance is no prediction."""
    if math.isnan(distance):
        return 0.0, 0.0
    ratio = distance / (math.sqrt(area) * 2 * sigma)
    return 2 / (1 + math.exp(ratio)), math.exp(-(distance**2) / (2 * area * (2 * sigma) ** 2))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_accuracy_of_joints_equals_a_naive_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    persons, joints = rng.integers(1, 6), 4
    predicted, truth = rng.uniform(0, 60, (2, persons, joints, 2))
    predicted[rng.random(persons) < 0.2] = np.nan
    labelled = rng.random((persons, joints)) < 0.7
    areas, sigmas = rng.uniform(50, 5000, persons), (0.026, 0.05, 0.1, 0.3)
    found = joint_means(predicted, truth, labelled, areas, ("a", "b", "c", "d"), sigmas)
    for joint, name in enumerate("abcd"):
        terms = [
            naive_terms(math.dist(predicted[row, joint], truth[row, joint]), areas[row], sigmas[joint])
            for row in range(persons)
            if labelled[row, joint]
        ]
        assert found[name]["count"] == len(terms)
        for key, values in zip(("accuracy", "oks"), zip(*terms, strict=True), strict=False):
            assert found[name][key] == pytest.approx(sum(values) / len(values), abs=1e-12)
        if not terms:
            assert found[name] == {"accuracy": None, "oks": None, "count": 0}


def test_a_person_without_area_divides_by_nothing() -> None:
    predicted = np.array([[[3.0, 3.0], [3.0, 4.0]]])
    found = joint_means(predicted, np.full((1, 2, 2), 3.0), np.ones((1, 2), bool), np.zeros(1), ("a", "b"), (0.1, 0.1))
    assert found == {
        "a": {"accuracy": 1.0, "oks": 1.0, "count": 1},
        "b": {"accuracy": 0.0, "oks": 0.0, "count": 1},
    }


@pytest.mark.parametrize("crowded", [False, True])
def test_joints_of_the_report_are_those_of_the_written_predictions(
    folder: Path, tmp_path: Path, crowded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a model without SCIO, in annotated boxes; the report has no other new key."""
    data = json.loads((folder / "annotations.json").read_text())
    for image in data["images"]:
        image |= {"crowdIndex": 0.5} if crowded else {}
    (tmp_path / "annotations.json").write_text(json.dumps(data))
    paths = {"checkpoint": str(folder / "plain.safetensors"), "images": str(folder / "images")}
    settings = {"decoding": ANYWHERE, "out": str(tmp_path), "workers": 0, "device": "cpu", "json": True}
    report = testing.main(fields.TestConfig(annotations=str(tmp_path / "annotations.json"), **paths, **settings))
    assert report.keys() == {"metrics", "protocol", "joints", "scores"}
    assert json.loads(capsys.readouterr().out) == report == json.loads((tmp_path / "metrics.json").read_text())
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    skeleton = load_skeleton("coco17")
    terms: dict[str, list[tuple[float, float]]] = {name: [] for name in skeleton.joints}
    persons = [person for person in data["annotations"] if any(person["keypoints"][2::3])]
    waiting = list(predictions)
    for person in persons:
        # No pose is dropped at this threshold, so an image's poses stand in the order of its persons.
        pose = next(record for record in waiting if record["image_id"] == person["image_id"])
        waiting.remove(pose)
        area = 0.53 * person["bbox"][2] * person["bbox"][3] if crowded else person["area"]
        for joint, name in enumerate(skeleton.joints):
            (x, y), (u, v, seen) = pose["keypoints"][3 * joint :][:2], person["keypoints"][3 * joint :][:3]
            if seen:
                terms[name].append(naive_terms(math.dist((x, y), (u, v)), area, skeleton.sigmas[joint]))
    for name, values in terms.items():
        assert report["joints"][name]["count"] == len(values)
        assert report["joints"][name]["accuracy"] == pytest.approx(np.mean([a for a, _ in values]), rel=1e-6)
        assert report["joints"][name]["oks"] == pytest.approx(np.mean([o for _, o in values]), rel=1e-6, abs=1e-12)


def test_with_detections_persons_without_a_pose_count_as_missed(folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "annotations.json").read_text())
    images = [person["image_id"] for person in data["annotations"]]
    alone = next(p for p in data["annotations"] if images.count(p["image_id"]) == 1 and p["keypoints"][3 * 11 + 2])
    record = {"image_id": alone["image_id"], "category_id": 1, "bbox": alone["bbox"], "score": 1.0}
    (tmp_path / "boxes.json").write_text(json.dumps([record]))
    report = testing.main(
        fields.TestConfig(
            checkpoint=str(folder / "plain.safetensors"),
            annotations=str(folder / "annotations.json"),
            images=str(folder / "images"),
            boxes=str(tmp_path / "boxes.json"),
            out=str(tmp_path),
            workers=0,
            device="cpu",
        )
    )
    (pose,) = json.loads((tmp_path / "predictions.json").read_text())
    found = report["joints"]["left_hip"]
    assert found["count"] == sum(person["keypoints"][3 * 11 + 2] > 0 for person in data["annotations"])
    sigma = load_skeleton("coco17").sigmas[11]
    accuracy, _ = naive_terms(math.dist(pose["keypoints"][33:35], alone["keypoints"][33:35]), alone["area"], sigma)
    assert found["accuracy"] == pytest.approx(accuracy / found["count"], rel=1e-6)


@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(13, 40),
    distances=st.tuples(st.floats(0, 3), st.floats(3, 6)),
)
@settings(max_examples=20, deadline=None)
def test_displaced_points_stay_on_the_map_and_are_as_far_as_asked(
    seed: int, height: int, distances: tuple[float, float]
) -> None:
    rng = np.random.default_rng(seed)
    size = (height, 17)
    xy = rng.uniform(0, [16, height - 1], (40, 3, 2))
    moved = displaced(xy, distances, size, rng)
    assert ((moved >= 0) & (moved <= [16, height - 1])).all()
    lengths = np.linalg.norm(moved - xy, axis=-1)
    assert ((lengths >= distances[0] - 1e-9) & (lengths <= distances[1] + 1e-9)).all()


@given(seed=st.integers(0, 2**32 - 1), persons=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_another_persons_joint_is_never_its_own(seed: int, persons: int) -> None:
    rng = np.random.default_rng(seed)
    counted = rng.random((persons, 3)) < 0.6
    xy = np.arange(persons * 6, dtype=float).reshape(persons, 3, 2)
    others, found = shuffled(xy, counted, rng)
    for group in range(3):
        rows = np.flatnonzero(counted[:, group])
        assert found[:, group].tolist() == (counted[:, group] & (len(rows) > 1)).tolist()
        if len(rows) > 1:  # each lends its point once, to another
            lent = others[rows, group, 0].tolist()
            assert sorted(lent) == xy[rows, group, 0].tolist()
            assert all(point != own for point, own in zip(lent, xy[rows, group, 0].tolist(), strict=True))


def naive_loss(model: PoseModel, maps: torch.Tensor, features: torch.Tensor, group: int, xy: list[float]) -> float:
    """Eq. 8 of one person and group, with the whole verification network and a Gaussian drawn pixel by pixel."""
    networks = model.refiner
    assert networks is not None
    height, width = maps.shape[-2:]
    distal = torch.zeros(1, len(networks.distal), height, width)
    for row in range(height):
        for column in range(width):
            squared = (column - xy[0]) ** 2 + (row - xy[1]) ** 2
            distal[0, group, row, column] = math.exp(-squared / (2 * networks.sigma**2))
    difference = networks.verify(maps, distal, features)[0, group] - maps[0, networks.verified[group]]
    return float((difference**2).mean())


@torch.no_grad()
def test_reliance_equals_a_naive_loop(folder: Path, model: PoseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.reliance.PERSONS", 5)
    annotations = read_coco(folder / "annotations.json")
    crops = reliance_crops(model, annotations, str(folder / "images"))
    assert crops is not None
    dataset = crops.dataset
    assert len(dataset) == 5
    places: list[np.ndarray] = []
    monkeypatch.setattr("evaluation.reliance.losses_at", lambda *a: (places.append(a[2].numpy()), losses_at(*a))[1])
    found = reliance(model, crops, 2, 0)
    true, others, moved = places[0]
    names = [group.distal for group in model.skeleton.groups]
    losses: dict[str, list[list[float]]] = {name: [[], [], []] for name in names}
    for person in range(5):
        record = dataset[person]
        image = torch.from_numpy(record.image)[None]
        maps, features = model.with_features(model.preprocess(image))
        for group, declared in enumerate(model.skeleton.groups):
            a, d = model.skeleton.indices((declared.proximal[0], declared.distal))
            x, y = record.keypoints[d] / 4
            if record.visibility[a] and record.visibility[d] and 0 <= x <= 15 and 0 <= y <= 15:
                assert true[person, group].tolist() == pytest.approx([x, y], abs=1e-4)
                assert 2 - 1e-5 <= math.dist(moved[person, group], (x, y)) <= 6 + 1e-5
                for kind, xy in enumerate((true, others, moved)):
                    losses[declared.distal][kind].append(
                        naive_loss(model, maps, features, group, xy[person, group].tolist())
                    )
    every = [[loss for name in names for loss in losses[name][kind]] for kind in range(3)]
    assert min(len(losses[name][0]) for name in names) > 1  # so that each has another's to borrow
    for expected, means in [*((losses[name], found["groups"][name]) for name in names), (every, found["all"])]:
        assert means["count"] == len(expected[0])
        for kind, key in enumerate(("true", "shuffled", "displaced")):
            assert means[key] == pytest.approx(np.mean(expected[kind]), rel=1e-4)
        assert means["reliance"] == pytest.approx(1 - np.mean(expected[0]) / np.mean(expected[2]), abs=1e-4)


def test_networks_that_do_not_read_d_are_blind_whatever_the_batch(folder: Path, model: PoseModel) -> None:
    annotations = read_coco(folder / "annotations.json")
    blind = load_model(folder / "scio.safetensors")
    assert blind.refiner is not None
    with torch.no_grad():
        blind.refiner.verification.of_heatmaps.weight[:, 2] = 0
    crops = reliance_crops(blind, annotations, str(folder / "images"))
    assert crops is not None
    found = reliance(blind, crops, 64, 0)
    assert found["all"]["true"] == pytest.approx(found["all"]["displaced"])
    assert all(abs(its["reliance"]) < 1e-9 for its in found["groups"].values())
    assert "reliance on the distal joint 0.000 (0: blind)" in format_reliance(found).replace("-0.000", "0.000")
    names = list(found["groups"])
    assert all(name in str(blindness(found)) for name in names)
    some = {name: {**its, "reliance": 0.3 * (name != names[1])} for name, its in found["groups"].items()}
    warning = str(blindness({**found, "groups": some}))
    assert names[1] in warning
    assert names[0] not in warning
    assert blindness({**found, "groups": {name: {"reliance": 0.3} for name in names}}) is None
    assert blindness(None) is None
    reads = reliance(model, crops, 64, 0)
    assert max(abs(its["reliance"]) for its in reads["groups"].values()) > 1e-3
    small = reliance(model, crops, 3, 0)
    assert small["all"] == pytest.approx(reads["all"], rel=1e-5)


def test_evaluation_reports_the_reliance_of_a_model_with_scio(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(folder / "scio.safetensors"), "--images", str(folder / "images")]
    arguments += ["--annotations", str(folder / "annotations.json"), "--device", "cpu", "--workers", "0"]
    assert main(["test", *arguments, "--decoding.scio.output", "base", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["scio"]["all"]["count"] == sum(its["count"] for its in written["scio"]["groups"].values()) > 0
    assert lines[-2].startswith("SCIO loss ")
    assert lines[-1].startswith("SCIO reliance on the distal joint ")
    table = {line.split()[0]: line.split()[1:] for line in lines[-19:-2]}
    assert set(table) == set(written["joints"])
    for name, (accuracy, oks, count) in table.items():
        assert written["joints"][name]["accuracy"] == pytest.approx(float(accuracy), abs=5e-5)
        assert written["joints"][name]["oks"] == pytest.approx(float(oks), abs=5e-5)
        assert written["joints"][name]["count"] == int(count)


def test_the_command_measures_and_draws(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = scio.main(asked(folder, tmp_path, json=True))
    assert json.loads(capsys.readouterr().out) == report == json.loads((tmp_path / "scio.json").read_text())
    for name in ("joints.png", "search.png", "correlation.png", "planted.png", "before_after.jpg"):
        assert np.ptp(cv2.imread(str(tmp_path / name))) > 0  # pyright: ignore[reportArgumentType, reportCallIssue]
    metrics, protocol = report["metrics"], report["protocol"]
    joints = metrics["joints"]
    distal = [name for name, found in joints.items() if found["distal"]]
    assert sorted(distal) == sorted(group.distal for group in load_skeleton("coco17").groups)

    # Accuracy and error as `evaluation test` and a loop over its poses have them.
    for output in ("base", "optimisation"):
        decoding = Decoding(
            scio=DistalJoints(output=output, steps=6, proximal_threshold=-1.0, step=4), flip=False, nms_threshold=1.0
        )
        tested = testing.main(
            fields.TestConfig(
                checkpoint=str(folder / "scio.safetensors"),
                annotations=str(folder / "annotations.json"),
                images=str(folder / "images"),
                decoding=decoding,
                workers=0,
                device="cpu",
            )
        )
        capsys.readouterr()
        assert tested["protocol"]["instances"] == protocol["instances"]  # each has a labelled distal joint
        for name, found in joints.items():
            assert found["count"] == tested["joints"][name]["count"]
            assert found[output]["accuracy"] == pytest.approx(tested["joints"][name]["accuracy"], rel=1e-4, abs=1e-9)
            assert found[output]["oks"] == pytest.approx(tested["joints"][name]["oks"], rel=1e-4, abs=1e-9)

    # Where all labelled distal joints are sampled, the search starts at "learning" and ends at "optimisation".
    search = metrics["search"]
    if protocol["distal_joints_sampled"] == sum(joints[name]["count"] for name in distal):
        for step, output in ((0, "learning"), (-1, "optimisation")):
            total = sum(joints[name][output]["accuracy"] * joints[name]["count"] for name in distal)
            assert search["accuracy"][step] == pytest.approx(total / search["count"], rel=1e-4)
    assert len(search["loss"]) == 7
    assert all(later <= earlier for earlier, later in zip(search["loss"], search["loss"][1:], strict=False))
    assert search["loss"][-1] < search["loss"][0]

    planted = metrics["planted"]
    assert planted["count"] == search["count"] == protocol["distal_joints_sampled"]
    quantiles = [planted["before"][str(percent)] for percent in (10, 25, 50, 75, 90)]
    assert quantiles == sorted(quantiles)
    assert 2 <= quantiles[0] < quantiles[-1] <= 6
    assert 0 <= planted["reduced"] <= 1
    assert metrics["correlation"]["found"]["count"] == planted["count"]


def test_errors_in_heatmap_pixels_and_draws_do_not_depend_on_batches(
    folder: Path, model: PoseModel, tmp_path: Path
) -> None:
    small, large = (asked(folder, tmp_path, batch_size=size, count=12) for size in (5, 64))
    dataset = scio.choose_persons(model, small)
    distal = scio.true_distal(model, dataset)
    areas = np.ones(len(dataset))
    first, second = (scio.measure(model, dataset, distal, areas, config) for config in (small, large))
    np.testing.assert_array_equal(first.before, second.before)
    np.testing.assert_allclose(first.losses, second.losses, rtol=1e-4)
    affines = box_to_affine(dataset.boxes, (64, 64))
    for person in range(0, len(dataset), 7):
        for output, poses in first.poses.items():
            there = apply_affine(affines[person], poses[person]) / 4
            true = apply_affine(affines[person], dataset.keypoints[person]) / 4
            for joint in np.flatnonzero(dataset.visibility[person]):
                error = first.errors[output][person, joint]
                assert error == pytest.approx(math.dist(there[joint], true[joint]), abs=1e-3)


def test_correlations_are_those_of_a_line_a_curve_and_a_constant() -> None:
    losses = np.array([[1.0, 1.0, 2.0], [2.0, 2.0, 2.0], [3.0, 4.0, 2.0], [9.0, 9.0, 2.0]])
    accuracy = np.array([[0.9, 1.0, 0.1], [0.6, 0.5, 0.2], [0.3, 0.25, 0.3], [7.0, 7.0, 0.4]])
    sampled = np.array([[True] * 3] * 3 + [[False] * 3])
    found = scio.correlations(sampled, losses, accuracy, ("line", "curve", "constant"))
    assert found["count"] == 9
    assert found["pearson"] == pytest.approx(np.corrcoef(losses[:3].ravel(), accuracy[:3].ravel())[0, 1])
    assert found["groups"]["line"] == pytest.approx({"count": 3, "pearson": -1.0, "spearman": -1.0})
    assert found["groups"]["curve"]["spearman"] == pytest.approx(-1.0)
    assert -1 < found["groups"]["curve"]["pearson"] < -0.9
    assert found["groups"]["constant"] == {"count": 3, "pearson": None, "spearman": None}


def test_persons_are_spread_over_those_with_a_distal_joint(folder: Path, model: PoseModel, tmp_path: Path) -> None:
    everyone = annotated_crops(model, read_coco(folder / "annotations.json"), str(folder / "images"))
    chosen = scio.choose_persons(model, asked(folder, tmp_path, count=3))
    assert len(chosen) == 3
    assert chosen.annotation_ids[0] == everyone.annotation_ids[0]
    assert chosen.annotation_ids[-1] == everyone.annotation_ids[-1]


def test_what_cannot_be_measured_ends_with_exit_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((folder / "annotations.json").read_text())
    names = [group.distal for group in load_skeleton("coco17").groups]
    for person in data["annotations"]:
        for joint in load_skeleton("coco17").indices(names):
            person["keypoints"][3 * joint + 2] = 0
    (tmp_path / "without.json").write_text(json.dumps(data))

    def message(**changes: str) -> str:
        given = {"checkpoint": str(folder / "scio.safetensors"), "annotations": str(folder / "annotations.json")}
        given |= {
            "images": str(folder / "images"),
            "out": str(tmp_path / "out"),
            "workers": "0",
            "device": "cpu",
            "count": "1",
        }
        arguments = [f"--{name}={value}" for name, value in {**given, **changes}.items()]
        assert main(["scio", *arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "plain.safetensors: carries no SCIO networks" in message(checkpoint=str(folder / "plain.safetensors"))
    without = message(annotations=str(tmp_path / "without.json"))
    assert "without.json: none of its" in without
    assert "left_wrist" in without
    assert "lower decoding.scio.proximal_threshold" in message(**{"decoding.scio.proximal_threshold": "1e9"})
    assert "planted is [3.0, 2.0]" in message(planted="[3, 2]")
