from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from evaluation import config as fields
from evaluation.__main__ import main
from evaluation.compare import paired_bootstrap, precision_of_sample
from poserelay.keypoints import Skeleton
from poserelay.scoring import coco_ap, evaluate_oks

JOINTS = ("nose", "paw", "tail")
ANIMAL = Skeleton(name="animal", joints=JOINTS, sigmas=(0.1, 0.05, 0.2))


def truth_of(joints: np.ndarray, image_of: list[int], images: list[int]) -> dict[str, Any]:
    """Persons at joints `[N, 3, 3]` in boxes of 100 x 100."""
    box = {"bbox": [0.0, 0.0, 100.0, 100.0], "area": 10000.0, "iscrowd": 0}
    persons = [
        {"id": n, "image_id": image, "category_id": 1, "keypoints": triples.ravel().tolist(), **box}
        for n, (image, triples) in enumerate(zip(image_of, joints, strict=True), start=1)
    ]
    pictures = [{"id": image, "file_name": f"{image}.jpg", "width": 100, "height": 100} for image in images]
    category = {"id": 1, "name": "animal", "keypoints": list(JOINTS), "skeleton": []}
    return {"images": pictures, "categories": [category], "annotations": persons}


def poses_of(joints: np.ndarray, image_of: list[int], scores: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"image_id": image, "category_id": 1, "keypoints": triples.ravel().tolist(), "score": float(score)}
        for image, triples, score in zip(image_of, joints, scores, strict=True)
    ]


def persons(rng: np.random.Generator, count: int) -> np.ndarray:
    joints = rng.uniform(20, 80, (count, 3, 3))
    joints[..., 2] = 2
    return joints


def moved(rng: np.random.Generator, joints: np.ndarray, pixels: float) -> np.ndarray:
    return joints + rng.normal(0, pixels, joints.shape) * [1, 1, 0]


def write(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


@pytest.mark.parametrize("seed", range(4))
def test_ap_of_a_sample_is_that_of_a_file_with_the_images_repeated(seed: int) -> None:
    """pycocotools itself on copies of the images, with false poses, missed, hidden and crowded persons among them."""
    rng = np.random.default_rng(seed)
    image_of = rng.integers(0, 6, 12).tolist()
    joints = persons(rng, 12)
    joints[rng.random((12, 3)) < 0.2] = 0
    truth = truth_of(joints, image_of, list(range(7)))  # image 6 has nobody
    truth["annotations"][3]["iscrowd"] = 1
    posed = [*image_of[2:], 6, 0]
    results = poses_of(moved(rng, np.concatenate([joints[2:], persons(rng, 2)]), 5), posed, rng.permutation(12) / 12)
    average_precision = precision_of_sample(evaluate_oks(truth, results, ANIMAL))
    assert average_precision(np.ones(7, dtype=np.int64)) == coco_ap(truth, results, ANIMAL)["AP"]

    weights = np.bincount(rng.integers(7, size=7), minlength=7)
    copies: dict[str, list[Any]] = {"images": [], "annotations": [], "results": []}
    for image, weight in enumerate(weights):
        for copy in range(weight):
            name = 10 * image + copy
            copies["images"].append({**truth["images"][image], "id": name})
            for kind, records in (("annotations", truth["annotations"]), ("results", results)):
                copies[kind] += [{**record, "image_id": name} for record in records if record["image_id"] == image]
    repeated = {**truth, "images": copies["images"], "annotations": copies["annotations"]}
    expected = coco_ap(repeated, copies["results"], ANIMAL)["AP"]
    assert average_precision(weights) == pytest.approx(expected, abs=1e-12)


def test_ap_of_a_sample_without_poses_or_persons() -> None:
    truth = truth_of(persons(np.random.default_rng(0), 1), [0], [0, 1])
    average_precision = precision_of_sample(evaluate_oks(truth, [], ANIMAL))
    assert average_precision(np.array([1, 1])) == 0.0
    assert math.isnan(average_precision(np.array([0, 2])))


def test_bootstrap_equals_a_naive_loop() -> None:
    """One pair of files: every resample written out person by person, from the same draws."""
    rng = np.random.default_rng(0)
    correct, total = rng.integers(0, 4, (2, 1, 9)), np.full(9, 3)
    found = paired_bootstrap(lambda weights: correct @ weights / (total @ weights), 9, 200, seed=5)
    draws, naive = np.random.default_rng(5), []
    for _ in range(200):
        right, labelled = [0, 0], 0
        for person in draws.integers(9, size=9):
            labelled += total[person]
            for side in (0, 1):
                right[side] += correct[side, 0, person]
        naive.append((right[0] - right[1]) / labelled)
    assert (found.low, found.high) == pytest.approx(np.percentile(naive, [2.5, 97.5]))
    tail = min(sum(value <= 0 for value in naive), sum(value >= 0 for value in naive))
    assert found.p == pytest.approx(min(1.0, 2 * (tail + 1) / 201))
    assert found.difference == pytest.approx((correct[0].sum() - correct[1].sum()) / 27)
    assert found.seed_spread is None


def test_spread_of_the_seeds_alone_gives_the_t_interval() -> None:
    """Where all persons are alike only the seeds are left, and the interval is that of the paired t-test."""
    first, second = np.array([0.71, 0.74, 0.70]), np.array([0.70, 0.71, 0.69])
    found = paired_bootstrap(lambda _: np.stack([first, second]), 5, 10_000)
    peer = scipy.stats.ttest_rel(first, second)
    low, high = peer.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.01)
    assert found.p == pytest.approx(peer.pvalue, rel=0.01)
    assert found.seed_spread == pytest.approx(np.std(first - second, ddof=1))


def test_undefined_resamples_are_left_out() -> None:
    values = [np.full((2, 1), math.nan), np.array([[0.5], [0.2]])]
    found = paired_bootstrap(lambda weights: values[int(weights[0] > 0)], 3, 200)
    assert (found.low, found.high) == pytest.approx((0.3, 0.3))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """60 persons in 30 images; three seeds of a and b, a more exact."""
    rng = np.random.default_rng(0)
    image_of = [n // 2 for n in range(60)]
    joints = persons(rng, 60)
    truth = truth_of(joints, image_of, list(range(30)))
    for person in truth["annotations"][:40]:
        person["head_size"] = 10.0
    found: dict[str, Any] = {"folder": tmp_path, "truth": write(tmp_path / "val.json", truth), "a": [], "b": []}
    for side, pixels in (("a", 2.0), ("b", 12.0)):
        for seed in range(3):
            results = poses_of(moved(rng, joints, pixels), image_of, rng.random(60))
            found[side].append(write(tmp_path / f"{side}{seed}.json", results))
    return found


def compare(files: dict[str, Any], a: Any, b: Any, *more: str) -> int:
    """Exit code; a list is written as on the command line, a single file as it is."""
    first, second = (side if isinstance(side, str) else json.dumps(side) for side in (a, b))
    given = ["--annotations", files["truth"], "--a", first, "--b", second, "--resamples", "100", *more]
    return main(["compare", *given])


def run(files: dict[str, Any], capsys: pytest.CaptureFixture[str], a: Any, b: Any, *more: str) -> dict[str, Any]:
    assert compare(files, a, b, *more, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("metric", ["oks", "pck", "pckh"])
def test_a_known_shift_is_found_and_equal_predictions_are_equal(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str], metric: str
) -> None:
    given = ["--metric", metric, "--pck_threshold", "0.1"]
    report = run(files, capsys, files["a"], files["b"], *given)
    metrics, name = report["metrics"], {"oks": "AP", "pck": "PCK", "pckh": "PCKh@0.5"}[metric]
    assert metrics["difference"] == pytest.approx(metrics[f"{name} a"] - metrics[f"{name} b"])
    assert 0 < metrics["difference low"] < metrics["difference"] < metrics["difference high"]
    assert metrics["smallest difference"] < metrics["difference"]
    assert metrics["p"] == pytest.approx(2 / 101, abs=0.01)
    assert [entry["predictions"] for entry in report["files"]["b"]] == files["b"]
    assert np.mean([entry[name] for entry in report["files"]["b"]]) == pytest.approx(metrics[f"{name} b"])
    assert report["protocol"]["drawn"] == "images"
    assert report["protocol"]["units"] == {"oks": 30, "pck": 30, "pckh": 20}[metric]  # a third has no head size

    same = run(files, capsys, files["a"][:2], files["a"][:2], *given)["metrics"]
    assert [same[key] for key in ("difference", "difference low", "difference high", "p")] == [0, 0, 0, 1]


def test_the_figures_are_those_of_score(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for metric, name in (("oks", "AP"), ("pck", "PCK"), ("pckh", "PCKh@0.5")):
        report = run(files, capsys, files["a"][0], files["b"][0], "--metric", metric)
        arguments = ["--annotations", files["truth"], "--predictions", files["b"][0], "--metric", metric, "--json"]
        assert main(["score", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["metrics"][name] == report["metrics"][f"{name} b"]
        assert report["protocol"]["seed_spread"] is None


def test_the_text_says_what_was_shown(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    def text(a: Any, b: Any) -> str:
        assert compare(files, a, b, "--metric", "pck", "--pck_threshold", "0.02") == 0
        return capsys.readouterr().out

    assert "a is worse than b: the 95 % interval leaves out 0.\n" in text(files["b"], files["a"])
    alike = text(files["a"][0], files["a"][1])
    smallest = re.search(r"smallest difference  (\S+)", alike)
    assert smallest
    assert f"One below {smallest[1]} could not have been shown" in alike
    assert "One file each" in alike
    assert "are they the same predictions?" in text(files["a"], files["a"])


def test_files_that_cannot_be_compared_end_with_exit_2(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(a: Any, b: Any, *more: str) -> str:
        assert compare(files, a, b, *more) == 2
        return capsys.readouterr().err

    assert "a names 3 files and b 2; expected as many of each" in refused(files["a"], files["b"][:2])
    assert "a names 0 files" in refused([], [])
    folder = files["folder"]
    elsewhere = write(folder / "other.json", poses_of(np.zeros((1, 3, 3)), [99], np.ones(1)))
    four = write(folder / "four.json", poses_of(np.zeros((1, 4, 3)), [1], np.ones(1)))
    for metric in ("oks", "pck"):
        message = refused(files["a"][0], elsewhere, "--metric", metric)
        assert "other.json: record 0: image_id 99 is not in the annotation file" in message
        assert "four.json: record 0: keypoints has 12 numbers" in refused(four, elsewhere, "--metric", metric)
    truth = json.loads(Path(files["truth"]).read_text())
    for person in truth["annotations"]:
        person["head_size"] = None
    files["truth"] = write(folder / "headless.json", truth)
    message = refused(files["a"], files["b"], "--metric", "pckh")
    assert "headless.json: no person has a head_box or a head_size" in message


def test_one_file_and_a_list_of_one_are_the_same() -> None:
    assert fields.CompareConfig("t", "a", ["b"]).metric == "oks"
    with pytest.raises(ValueError, match="resamples is 1"):
        fields.CompareConfig("t", "a", "b", resamples=1)


def test_persons_of_an_image_are_drawn_together(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Every resample written out image by image, from the same draws: within 0.1 of the box or not."""
    report = run(files, capsys, files["a"][0], files["b"][0], "--metric", "pck", "--pck_threshold", "0.1")
    truth = json.loads(Path(files["truth"]).read_text())["annotations"]
    hits = np.zeros((2, 30))
    for side, path in enumerate((files["a"][0], files["b"][0])):
        for person, record in zip(truth, json.loads(Path(path).read_text()), strict=True):
            joints, predicted = (np.reshape(each["keypoints"], (3, 3))[:, :2] for each in (person, record))
            hits[side, person["image_id"]] += sum(
                math.dist(*pair) <= 10 for pair in zip(joints, predicted, strict=True)
            )
    draws, naive = np.random.default_rng(0), []
    for _ in range(100):
        naive.append(sum(hits[0, image] - hits[1, image] for image in draws.integers(30, size=30)) / (30 * 6))
    metrics = report["metrics"]
    expected = np.percentile(naive, [2.5, 97.5]).tolist()
    assert [metrics["difference low"], metrics["difference high"]] == pytest.approx(expected)
    assert report["protocol"]["pck_reference"] == "longer side of the box"


def test_two_paths_before_the_flags_are_a_and_b(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--annotations", files["truth"], "--metric", "pck", "--resamples", "100", "--json"]
    assert main(["compare", files["a"][0], files["b"][0], *given]) == 0
    assert json.loads(capsys.readouterr().out) == run(files, capsys, files["a"][0], files["b"][0], "--metric", "pck")
    for wrong in ([files["a"][0]], [*files["a"]], [files["a"][0], files["b"][0], "--a", files["a"][1]]):
        assert main(["compare", *wrong, *given]) == 2
        assert files["a"][0] in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["oks", "pck"])
def test_a_single_image_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str) -> None:
    rng = np.random.default_rng(0)
    joints = persons(rng, 3)
    truth = write(tmp_path / "truth.json", truth_of(joints, [0, 0, 0], [0]))
    sides = [
        write(tmp_path / name, poses_of(moved(rng, joints, pixels), [0, 0, 0], np.array([0.5, 0.6, 0.7])))
        for name, pixels in (("a.json", 1), ("b.json", 15))
    ]
    arguments = ["compare", "--annotations", truth, *sides, "--metric", metric]
    assert main(arguments) == 0
    assert "A single image: nothing can be drawn anew" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert [metrics[name] for name in ("difference low", "difference high", "p", "smallest difference")] == [None] * 4
    assert metrics["difference"] > 0


@pytest.mark.parametrize("metric", ["oks", "pck"])
def test_a_skeleton_of_fewer_joints_compares_those(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str], metric: str
) -> None:
    """As `score` has it, and as files without that joint give it."""
    folder = files["folder"]
    (folder / "two.yaml").write_text(json.dumps({"name": "two", "joints": ["tail", "nose"], "sigmas": [0.2, 0.1]}))
    given = ["--metric", metric, "--skeleton", str(folder / "two.yaml")]
    report = run(files, capsys, files["a"][0], files["b"][0], *given)
    assert (report["protocol"]["joints_scored"], report["protocol"]["unscored"]) == (2, ["paw"])
    name = {"oks": "AP", "pck": "PCK"}[metric]
    for side in ("a", "b"):
        arguments = ["--annotations", files["truth"], "--predictions", files[side][0], *given, "--json"]
        assert main(["score", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["metrics"][name] == report["metrics"][f"{name} {side}"]

    cut = {}
    for key, path in (("truth", files["truth"]), ("a", files["a"][0]), ("b", files["b"][0])):
        content = json.loads(Path(path).read_text())
        for record in content["annotations"] if key == "truth" else content:
            del record["keypoints"][3:6]
        if key == "truth":
            content["categories"][0]["keypoints"] = ["nose", "tail"]
        cut[key] = write(folder / f"cut_{key}.json", content)
    by_hand = run(cut, capsys, cut["a"], cut["b"], *given)
    assert by_hand["metrics"] == report["metrics"]
