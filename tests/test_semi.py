"""The semi-supervised stage from end to end on a few rendered people: hand-offs, teachers, what users get wrong."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from evaluation.__main__ import main as evaluation
from finetune.__main__ import main as finetune
from poserelay.checkpoint import read_export
from poserelay.model import load_model
from poserelay.run import read_config, read_metrics
from semi.__main__ import main as semi

from .test_training import finetune_arguments, semi_arguments, stop_after, write


def few(people: Path, run_dir: Path, *more: str) -> list[str]:
    """One epoch of a few steps, of labels alone unless `more` says otherwise."""
    arguments = semi_arguments(people, run_dir, "--optim.epochs", "1", "--optim.drops", "[]")
    return [*arguments, "--teacher", "{name: none}", "--icon.lambda_p", "0", *more]


@pytest.fixture(scope="module")
def teacher(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-off of a pose model trained for a few steps."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert finetune(finetune_arguments(people, run, "--optim.epochs", "1")) == 0
    return run / "export/model.safetensors"


def test_two_networks_are_exported_and_the_better_is_the_model(people: Path, tmp_path: Path) -> None:
    truth = ("--data.validation_annotations", str(people / "annotations.json"))
    run = tmp_path / "run"
    assert semi(few(people, run, "--teacher", "{name: dual}", "--icon.lambda_p", "1", *truth)) == 0
    exports = {name: read_export(run / f"export/{name}.safetensors") for name in ("model", "net1", "net2")}
    metrics = json.loads((run / "done.json").read_text())["metrics"]
    assert metrics["AP"] == max(metrics["net1 AP"], metrics["net2 AP"])
    assert metrics["mean AP"] == pytest.approx((metrics["net1 AP"] + metrics["net2 AP"]) / 2)
    chosen = "net2" if metrics["net2 AP"] > metrics["net1 AP"] else "net1"
    assert metrics["protocol"]["export"].startswith(chosen)
    for name, value in exports["model"][0].items():
        assert torch.equal(value, exports[chosen][0][name])
    assert any(not torch.equal(value, exports["net2"][0][name]) for name, value in exports["net1"][0].items())
    # The projection head stays behind: the keys are those of a fine-tuned model.
    assert finetune(finetune_arguments(people, tmp_path / "plain", "--optim.epochs", "1")) == 0
    assert set(exports["model"][0]) == set(read_export(tmp_path / "plain/export/model.safetensors")[0])
    described = exports["model"][1]
    assert (described["stage"], described["method"]) == ("semi", "dual+icon")
    assert str(tmp_path) not in json.dumps(described)


def test_the_model_goes_on_into_fine_tuning_and_evaluation(people: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert semi(few(people, run)) == 0
    export = str(run / "export/model.safetensors")
    more = ("--init_from", export, "--optim.epochs", "1")
    assert finetune(finetune_arguments(people, tmp_path / "tuned", *more)) == 0
    truth = ("--annotations", str(people / "annotations.json"), "--images", str(people / "images"), "--workers", "0")
    assert evaluation(["test", "--checkpoint", export, *truth, "--out", str(tmp_path / "scores")]) == 0
    assert "PCK" in json.loads((tmp_path / "scores/metrics.json").read_text())["metrics"]


def test_a_mean_teacher_is_handed_off(people: Path, tmp_path: Path) -> None:
    assert semi(few(people, tmp_path / "run", "--teacher", "{name: mean, kwargs: {decay: 0.5}}")) == 0
    model, student, mean = (
        read_export(tmp_path / f"run/export/{name}.safetensors")[0] for name in ("model", "net1", "net2")
    )
    name = "head.final_layer.weight"
    assert torch.equal(model[name], mean[name])
    assert not torch.equal(student[name], mean[name])


def test_a_stopped_mean_teacher_goes_on_where_it_was(people: Path, tmp_path: Path) -> None:
    def mean(run: Path) -> list[str]:
        return few(people, run, "--teacher", "{name: mean, kwargs: {decay: 0.9}}", "--optim.steps", "5")

    assert semi(mean(tmp_path / "whole")) == 0
    with stop_after(tmp_path / "cut", 2, signal.SIGTERM):
        assert semi(mean(tmp_path / "cut")) == 75
    assert semi(mean(tmp_path / "cut")) == 0
    for name in ("model", "net1", "net2"):
        whole, cut = ((tmp_path / run / f"export/{name}.safetensors").read_bytes() for run in ("whole", "cut"))
        assert whole == cut


@pytest.mark.parametrize("offline", [False, True])
def test_a_trained_teacher_that_never_passes_gamma_is_said(
    people: Path, tmp_path: Path, teacher: Path, offline: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run then is the one of labels alone, bit by bit."""
    kwargs = f"{{name: pseudo, kwargs: {{gamma: 5.0, offline: {str(offline).lower()}}}}}"
    taught = few(people, tmp_path / "taught", "--teacher", kwargs, "--teacher_from", str(teacher))
    assert semi([*taught, "--optim.epoch_of", "labelled", "--optim.steps", "3"]) == 0
    assert "no unlabelled joint passes the teacher's gamma of 5" in capsys.readouterr().err
    rows = [row for row in read_metrics(tmp_path / "taught/metrics.jsonl") if row["kind"] == "train"]
    assert all(row["kept"] == row["unlabelled"] == 0 for row in rows)
    alone = [*few(people, tmp_path / "alone"), "--optim.steps", "3"]
    assert semi(alone) == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "alone/metrics.jsonl") if row["kind"] == "train"]
    # The student's batch norms see the unlabelled crops too, so only the first loss is the same.
    assert rows[0]["loss"] == losses[0]


def test_offline_labels_are_predicted_once(
    people: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = few(people, run, "--teacher_from", str(teacher))
    arguments += ["--teacher", "{name: pseudo, kwargs: {gamma: 0.0, offline: true}}"]
    assert semi(arguments) == 0
    stored = (run / "pseudo_labels.safetensors").read_bytes()
    (run / "done.json").unlink()
    assert semi(arguments) == 0
    assert (run / "pseudo_labels.safetensors").read_bytes() == stored
    with safe_open(run / "pseudo_labels.safetensors", framework="pt") as file:
        heights = file.get_tensor("confidence").flatten()
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert all(heights.min() - 1e-6 <= row["peak_q10"] <= row["peak_q90"] <= heights.max() + 1e-6 for row in rows)
    # Labels of other persons are not taken for these.
    (run / "done.json").unlink()
    annotations = json.loads((people / "annotations.json").read_text())
    for person in annotations["annotations"]:
        person["bbox"][2] += 1
    other = tmp_path / "annotations.json"
    other.write_text(json.dumps(annotations))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(people / "annotations.json"), str(other)))
    assert semi([*arguments, "--data.annotations", str(other)]) == 2
    assert "made by another teacher, or of other persons" in capsys.readouterr().err
    kept = [row["kept"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert max(kept) > 0.5


def test_labels_and_the_rest_share_nobody(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert semi(few(people, tmp_path / "run", "--teacher", "{name: consistency}", "--labels.count", "7")) == 0
    told = capsys.readouterr().err
    annotations = json.loads((people / "annotations.json").read_text())["annotations"]
    persons = [a for a in annotations if any(v > 0 for v in a["keypoints"][2::3])]
    labelled = int(told.split(" labelled persons")[0].rsplit(" ", 1)[1])
    unlabelled = int(told.split(" unlabelled of")[0].rsplit(" ", 1)[1])
    assert labelled + unlabelled == len(persons)
    assert (tmp_path / "run/labels.json").exists()


def test_an_unreadable_picture_is_left_out_of_offline_labels(
    people: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(people, tmp_path / "people")
    taught = ["--teacher", "{name: pseudo, kwargs: {gamma: 0.0, offline: true}}", "--teacher_from", str(teacher)]
    steps = [*taught, "--optim.steps", "2"]
    assert semi(few(tmp_path / "people", tmp_path / "probe", *steps)) == 0
    labelled = {Path(name).name for name in json.loads((tmp_path / "probe/labels.json").read_text())["images"]}
    rest = [path for path in sorted((tmp_path / "people/images").iterdir()) if path.name not in labelled]
    for path in rest[:3]:
        path.write_bytes(b"no picture")
    assert semi(few(tmp_path / "people", tmp_path / "few", *steps, "--max_unreadable", "0")) == 3
    assert "on unreadable pictures" in capsys.readouterr().err
    assert semi(few(tmp_path / "people", tmp_path / "run", *steps, "--max_unreadable", "0.9")) == 0
    assert "this person is not taught" in capsys.readouterr().err


def test_two_networks_that_would_stay_one_are_refused(
    people: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--teacher", "{name: dual}", "--init_from", str(teacher), "--optim.steps", "1"]
    assert semi(few(people, tmp_path / "one", *both, "--hard.cutout_joints", "0")) == 2
    assert "stay one" in capsys.readouterr().err
    assert semi(few(people, tmp_path / "two", *both)) == 0
    assert "only their cutouts will tell them apart" in capsys.readouterr().err


WRONG = {
    "no one unlabelled": (["--teacher", "{name: dual}", "--labels", "{ratio: 1.0, count: null}"], "nobody is left"),
    "no one labelled": (["--labels", "{ratio: 0.001, count: null}"], "rounds to none"),
    "unknown teacher": (["--teacher", "{name: duel}"], "teacher 'duel' is not known; choose from none, pseudo"),
    "unknown argument": (["--teacher", "{name: dual, kwargs: {gama: 1}}"], "has no 'gama'"),
    "untrained": (["--teacher", "{name: pseudo}"], "needs teacher_from"),
    "unused": (["--teacher_from", "x.safetensors"], "teacher_from is for the teachers pseudo and distill"),
    "decay": (["--teacher", "{name: mean, kwargs: {decay: 2.0}}"], "teacher.kwargs.decay is 2.0"),
    "no contrast": (["--icon", "{lambda_p: 1, lambda_1: 0, lambda_2: 0}"], "both 0"),
    "list": (["--labels", "{file: nowhere.json, count: null}"], "nowhere.json"),
    "tau": (["--icon.tau", "0"], "icon.tau is 0"),
    "gamma": (["--teacher", "{name: dual, kwargs: {gamma: .nan}}"], "teacher.kwargs.gamma is nan"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_end_before_anything_is_written(
    people: Path, tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more, said = WRONG[wrong]
    assert semi(few(people, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_joints_or_size(
    people: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught = ["--teacher", "{name: pseudo}", "--teacher_from", str(teacher)]
    assert semi(few(people, tmp_path / "run", *taught, "--model.input.height", "96")) == 2
    assert "goes from 64 x 64 (hrnet) to heatmaps of 8 x 8, the student from 96 x 64" in capsys.readouterr().err
    finer = ("--model.head", "{name: simple, kwargs: {deconv_channels: [8, 8, 8]}}")
    assert semi(few(people, tmp_path / "run", *taught, *finer)) == 2
    assert "the student from 64 x 64 (hrnet) to heatmaps of 16 x 16" in capsys.readouterr().err
    fish = tmp_path / "fish.yaml"
    fish.write_text(yaml.safe_dump({"name": "fish", "joints": ["fin", "tail"]}))
    annotations = json.loads((people / "annotations.json").read_text())
    annotations["categories"][0]["keypoints"] = ["fin", "tail"]
    for person in annotations["annotations"]:
        person["keypoints"] = person["keypoints"][15:21]
    (tmp_path / "fish.json").write_text(json.dumps(annotations))
    more = ("--model.skeleton", str(fish), "--data.annotations", str(tmp_path / "fish.json"))
    assert semi(few(people, tmp_path / "run", *taught, *more)) == 2
    assert "has no joint in common with fish (fin, tail)" in capsys.readouterr().err


def test_the_upstream_files_are_recorded_and_watched(
    people: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "teacher.safetensors"
    kept.write_bytes(teacher.read_bytes())
    arguments = few(people, tmp_path / "run", "--teacher", "{name: pseudo, kwargs: {gamma: 0.0}}")
    arguments += ["--teacher_from", str(kept)]
    assert semi(arguments) == 0
    assert semi(arguments) == 0
    assert "already finished" in capsys.readouterr().err
    other = tmp_path / "other"
    assert finetune(finetune_arguments(people, other, "--optim.epochs", "1", "--seed", "5")) == 0
    kept.write_bytes((other / "export/model.safetensors").read_bytes())
    assert semi(arguments) == 2
    assert "changed since this run started" in capsys.readouterr().err


def test_a_written_config_names_everything(people: Path, tmp_path: Path) -> None:
    assert semi(few(people, tmp_path / "run")) == 0
    config = read_config(tmp_path / "run")
    again = write(tmp_path / "again", {**config, "run_dir": str(tmp_path / "again")}, ())
    assert semi(again) == 0
    exports = [tmp_path / run / "export/model.safetensors" for run in ("run", "again")]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    assert load_model(exports[0]).skeleton.name == "coco17"
