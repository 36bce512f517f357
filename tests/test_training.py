"""Both training stages, run in this process on a few rendered people: exact resume, hand-off, what stops a run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import pytest
import torch
import yaml

from finetune.__main__ import main as finetune
from poserelay.checkpoint import read_export
from poserelay.run import file_sha256, read_metrics
from pretrain.__main__ import main as pretrain
from semi.__main__ import main as semi

SMALL = {"name": "timm", "kwargs": {"model": "test_resnet"}}  # 0.5 M parameters: resume files of a few MB
Stage = Callable[[list[str]], int]


def finetune_arguments(people: Path, run_dir: Path, *more: str) -> list[str]:
    config = {
        "model": {
            "backbone": SMALL,
            "head": {"name": "simple", "kwargs": {"deconv_channels": [8, 8]}},
            "skeleton": "coco17",
            "input": {"height": 64, "width": 64},
        },
        "data": {"annotations": str(people / "annotations.json"), "images": str(people / "images")},
        "optim": {"batch_size": 4, "lr_batch": 4, "epochs": 2, "drops": [1]},
        "labels": {"count": 10},
        "threads": 1,
        "workers": 0,
        "save_every": 2,
        "log_every": 1,
    }
    return write(run_dir, config, more)


def pretrain_arguments(people: Path, run_dir: Path, *more: str) -> list[str]:
    config = {
        "model": {"backbone": SMALL, "input": {"height": 32, "width": 32}},
        "data": {"images": str(people / "images")},
        "method": {"name": "mscl", "kwargs": {"width": 16, "prediction_width": 8}},
        "optim": {"batch_size": 6, "epochs": 2},
        "threads": 1,
        "workers": 0,
        "save_every": 2,
        "log_every": 1,
    }
    return write(run_dir, config, more)


def contrast_arguments(people: Path, run_dir: Path, *more: str) -> list[str]:
    """Pretraining with state beside the weights: a queue, momentum encoders, a step count, draws on the device."""
    kwargs = "{width: 8, hidden_width: 16, queue_size: 20, warmup_steps: 2}"
    method = ("--method", f"{{name: densecl, kwargs: {kwargs}}}", "--views.colour", "device")
    return pretrain_arguments(people, run_dir, *method, *more)


def semi_arguments(people: Path, run_dir: Path, *more: str) -> list[str]:
    """PoseDual with ICON: two networks, two loaders, draws on the device."""
    config = {
        **yaml.safe_load(Path(finetune_arguments(people, run_dir)[1]).read_text()),
        "teacher": {"name": "dual"},
        "optim": {"batch_size": 4, "unlabelled_batch_size": 5, "lr_batch": 4, "epochs": 2, "drops": [1]},
        "hard": {"rand_augment": 2},
        "icon": {"lambda_p": 1.0, "channels": 16, "gamma": 0.0},
    }
    return write(run_dir, config, more)


def ccm_arguments(people: Path, run_dir: Path, *more: str) -> list[str]:
    """Two phases on four sources: another skeleton, false detections, pseudo-labels; an auxiliary decoder; SCIO."""
    truth = json.loads((people / "annotations.json").read_text())
    joints = truth["categories"][0]["keypoints"][5:]
    persons = [{**person, "keypoints": person["keypoints"][15:], "num_keypoints": 0} for person in truth["annotations"]]
    limbs = {**truth, "annotations": persons, "categories": [{"id": 1, "name": "limbs", "keypoints": joints}]}
    (run_dir.parent / "limbs.json").write_text(json.dumps(limbs))
    images = [image["id"] for image in truth["images"]]
    nobody = [{"image_id": image, "category_id": 1, "bbox": [94, 94, 2, 2], "score": 0.9} for image in images]
    (run_dir.parent / "detections.json").write_text(json.dumps(nobody))
    plain = yaml.safe_load(Path(finetune_arguments(people, run_dir)[1]).read_text())
    head = {"name": "ccm", "kwargs": {"channels": [8, 8]}}
    refiner = {"name": "scio", "kwargs": {"feature_channels": 2, "width": 4, "dilations": [1, 2]}}
    config = {
        **plain,
        "model": {**plain["model"], "head": head, "refiner": refiner},
        "scio": {"perturb_distal": 3.0},
        "external": {"annotations": str(run_dir.parent / "limbs.json"), "images": str(people / "images"), "ratio": 0.5},
        "hard_negatives": {"detections": str(run_dir.parent / "detections.json"), "ratio": 0.25},
        "pseudo_labelled": {"annotations": str(people / "annotations.json"), "images": str(people / "images")},
        "train_on": "ACHU",
        "then": {"train_on": "CH", "epochs": 1},
        "optim": {"batch_size": 8, "lr_batch": 8, "epochs": 1, "drops": []},
    }
    return write(run_dir, config, more)


def cir_single_stage(arguments: list[str]) -> int:
    return finetune(["cir", *arguments])


def cir_arguments(people: Path, run_dir: Path, *more: str) -> list[str]:
    """A single-stage model with its quality branch, of some persons: the others are regions of no label."""
    plain = yaml.safe_load(Path(finetune_arguments(people, run_dir)[1]).read_text())
    head = {"name": "cir", "kwargs": {"general_channels": 16, "joint_channels": 4, "quality": True}}
    config = {
        **plain,
        "model": {**plain["model"], "head": head},
        "labels": {"count": 12, "by": "persons"},
        "optim": {"batch_size": 3, "lr_batch": 3, "epochs": 2, "drops": [1]},
    }
    return write(run_dir, config, more)


def write(run_dir: Path, config: dict, more: tuple[str, ...]) -> list[str]:
    file = run_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return ["--config", str(file), "--run_dir", str(run_dir), *more]


STAGES = {
    "finetune": (finetune, finetune_arguments),
    "pretrain": (pretrain, pretrain_arguments),
    "contrast": (pretrain, contrast_arguments),
    "semi": (semi, semi_arguments),
    "ccm": (finetune, ccm_arguments),
    "cir": (cir_single_stage, cir_arguments),
}


@pytest.fixture(params=list(STAGES))
def stage(request: pytest.FixtureRequest) -> tuple[Stage, Callable[..., list[str]]]:
    return STAGES[request.param]


class stop_after:
    """Sends this process a signal once the run has logged `step`."""

    def __init__(self, run_dir: Path, step: int, number: signal.Signals) -> None:
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, args=(run_dir / "metrics.jsonl", step, number))

    def watch(self, metrics: Path, step: int, number: signal.Signals) -> None:
        while not self.done.is_set():
            if any(row["step"] >= step for row in read_metrics(metrics)):
                os.kill(os.getpid(), number)
                return
            time.sleep(0.005)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_error: object) -> None:
        self.done.set()
        self.thread.join()


def test_a_signal_saves_and_the_next_start_ends_with_the_same_bytes(
    people: Path, tmp_path: Path, stage: tuple[Stage, Callable[..., list[str]]]
) -> None:
    main, arguments = stage
    number = signal.SIGUSR2 if main is pretrain else signal.SIGTERM  # all loops have one handler of both
    assert main(arguments(people, tmp_path / "whole", "--optim.epochs", "3")) == 0
    with stop_after(tmp_path / "cut", 3, number):
        assert main(arguments(people, tmp_path / "cut", "--optim.epochs", "3")) == 75
    status = json.loads((tmp_path / "cut" / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert number.name in status["reason"]
    assert not (tmp_path / "cut" / "done.json").exists()
    assert main(arguments(people, tmp_path / "cut", "--optim.epochs", "3")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "export/model.safetensors").read_bytes() == (other / "export/model.safetensors").read_bytes()
    first, second = (torch.load(run / "resume/last.pt", weights_only=True) for run in (one, other))
    assert first["state"] == second["state"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


def test_workers_change_nothing(people: Path, tmp_path: Path, stage: tuple[Stage, Callable[..., list[str]]]) -> None:
    main, arguments = stage
    assert main(arguments(people, tmp_path / "none")) == 0
    assert main(arguments(people, tmp_path / "two", "--workers", "2")) == 0
    assert_same_run(tmp_path / "none", tmp_path / "two")


def test_a_damaged_last_file_falls_back_to_the_one_before(people: Path, tmp_path: Path) -> None:
    assert finetune(finetune_arguments(people, tmp_path / "whole")) == 0
    assert finetune(finetune_arguments(people, tmp_path / "cut")) == 0
    for name in ("done.json", "export/model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    last = tmp_path / "cut" / "resume" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    assert finetune(finetune_arguments(people, tmp_path / "cut")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_is_left_alone(
    people: Path, tmp_path: Path, stage: tuple[Stage, Callable[..., list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments = stage
    run = tmp_path / "run"
    assert main(arguments(people, run)) == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert main(arguments(people, run)) == 0
    assert "already finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    assert main(arguments(people, run, "--resume", "never")) == 2
    assert main(arguments(people, run, "--seed", "5")) == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err
    done = json.loads((run / "done.json").read_text())
    assert done["export_sha256"] == file_sha256(run / "export/model.safetensors")


def test_the_written_config_starts_the_same_run(
    people: Path, tmp_path: Path, stage: tuple[Stage, Callable[..., list[str]]]
) -> None:
    main, arguments = stage
    assert main(arguments(people, tmp_path / "run")) == 0
    assert main(["--config", str(tmp_path / "run" / "config.yaml"), "--run_dir", str(tmp_path / "again")]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "again")


def test_the_backbone_is_handed_on(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(pretrain_arguments(people, tmp_path / "pre")) == 0
    export = tmp_path / "pre/export/model.safetensors"
    state, described = read_export(export)
    assert described["head"] is None
    assert all(name.startswith("backbone.") for name in state)
    more = ("--init_from", str(export), "--optim.lr", "1e-30")
    assert finetune(finetune_arguments(people, tmp_path / "fine", *more)) == 0
    tuned, described = read_export(tmp_path / "fine/export/model.safetensors")
    assert described["upstream"] == {"stage": "pretrain", "sha256": file_sha256(export)}
    for name, value in state.items():  # at a learning rate of nothing the weights are still those handed over
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(value, tuned[name], atol=1e-20), name
    resnet34 = ("--init_from", str(export), "--model.backbone", "{name: resnet34, kwargs: {}}")
    assert finetune(finetune_arguments(people, tmp_path / "other", *resnet34)) == 2
    assert "timm backbone, the config names resnet34" in capsys.readouterr().err
    swapped = ("--init_from", str(export), "--model.input.color", "bgr")
    assert finetune(finetune_arguments(people, tmp_path / "other", *swapped)) == 2
    assert "expects pictures with input.color rgb, the config has bgr" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_frozen_backbone_stays_as_it_was(people: Path, tmp_path: Path) -> None:
    assert pretrain(pretrain_arguments(people, tmp_path / "pre")) == 0
    export = tmp_path / "pre/export/model.safetensors"
    more = ("--init_from", str(export), "--freeze_backbone", "true", "--validate_every", "1")
    validation = ("--data.validation_annotations", str(people / "annotations.json"))
    assert finetune(finetune_arguments(people, tmp_path / "probe", *more, *validation)) == 0
    before, _ = read_export(export)
    after, _ = read_export(tmp_path / "probe/export/model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    losses = [row["loss"] for row in read_metrics(tmp_path / "probe/metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_init_from_must_stay_the_same_file(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(pretrain_arguments(people, tmp_path / "pre")) == 0
    export = tmp_path / "pre/export/model.safetensors"
    arguments = finetune_arguments(people, tmp_path / "fine", "--init_from", str(export), "--optim.epochs", "4")
    with stop_after(tmp_path / "fine", 3, signal.SIGTERM):
        assert finetune(arguments) == 75
    assert pretrain(pretrain_arguments(people, tmp_path / "pre2", "--seed", "9")) == 0
    os.replace(tmp_path / "pre2/export/model.safetensors", export)
    assert finetune(arguments) == 2
    assert f"{export}: has changed since the run {tmp_path / 'pre'} finished" in capsys.readouterr().err
    os.replace(tmp_path / "pre2/done.json", tmp_path / "pre/done.json")  # another run, finished, in its place
    assert finetune(arguments) == 2
    assert "init_from: the file has changed" in capsys.readouterr().err


def test_an_unfinished_upstream_starts_nothing(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted, the earlier stage has no export; gone on with, it has, and the later stage takes it."""
    earlier = pretrain_arguments(people, tmp_path / "pre", "--optim.epochs", "3")
    with stop_after(tmp_path / "pre", 3, signal.SIGTERM):
        assert pretrain(earlier) == 75
    export = tmp_path / "pre/export/model.safetensors"
    later = finetune_arguments(people, tmp_path / "fine", "--init_from", str(export), "--optim.epochs", "1")
    later += ["--optim.drops", "[]"]
    capsys.readouterr()
    assert finetune(later) == 2
    assert f"{export}: the run {tmp_path / 'pre'} has not finished (interrupted, step" in capsys.readouterr().err
    assert not (tmp_path / "fine").exists()
    assert pretrain(earlier) == 0
    assert finetune(later) == 0


def test_validation_and_best(people: Path, tmp_path: Path) -> None:
    more = ("--data.validation_annotations", str(people / "annotations.json"), "--validate_every", "1")
    arguments = finetune_arguments(people, tmp_path / "run", *more, "--export", "best", "--optim.epochs", "3")
    assert finetune(arguments) == 0
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["kind"] == "validation"]
    assert len(rows) == 3
    done = json.loads((tmp_path / "run/done.json").read_text())
    assert done["metrics"]["AP"] == max(row["AP"] for row in rows)
    assert done["metrics"]["protocol"]["boxes"] == "gt"
    assert done["metrics"]["protocol"]["export"] == "best"


@pytest.fixture
def damaged(people: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the pictures with two cut short."""
    folder = tmp_path / "damaged"
    (folder / "images").mkdir(parents=True)
    for number, path in enumerate(sorted((people / "images").iterdir())):
        data = path.read_bytes()
        (folder / "images" / path.name).write_bytes(data[: len(data) // 2] if number < 2 else data)
    (folder / "annotations.json").write_bytes((people / "annotations.json").read_bytes())
    return folder


def test_unreadable_pictures_are_replaced_counted_and_limited(
    damaged: Path, tmp_path: Path, stage: tuple[Stage, Callable[..., list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments = stage
    labelled = main in (finetune, cir_single_stage)
    every = ("--labels.count", "24", "--labels.by", "images") if labelled else ()
    assert main(arguments(damaged, tmp_path / "lenient", *every, "--max_unreadable", "0.5")) == 0
    rows = [row for row in read_metrics(tmp_path / "lenient/metrics.jsonl") if row["kind"] == "train"]
    assert max(row["unreadable"] for row in rows) >= 2
    assert "truncated" in capsys.readouterr().err
    assert main(arguments(damaged, tmp_path / "strict", *every)) == 3
    assert "pictures are unreadable" in capsys.readouterr().err
    assert json.loads((tmp_path / "strict/status.json").read_text())["state"] == "failed"


def test_a_loss_that_is_no_number_stops_the_run(
    people: Path, tmp_path: Path, stage: tuple[Stage, Callable[..., list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments = stage
    lr = ("--optim.lr", "1e30") if main is not pretrain else ("--optim.base_lr", "1e30")
    assert main(arguments(people, tmp_path / "run", *lr)) == 3
    assert "the loss is not a number at step" in capsys.readouterr().err
    for path in (tmp_path / "run" / "resume").glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        assert all(torch.isfinite(value).all() for value in saved["model"].values() if value.is_floating_point())


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--model.skeleton", "coco18"), "coco18"),
        (("--model.backbone", "{name: resnet19, kwargs: {}}"), "resnet18"),
        (("--model.head", "{name: simple, kwargs: {deconv: 3}}"), "deconv"),
        (("--data.images", "nowhere"), "nowhere"),
        (("--data.annotations", "nowhere.json"), "nowhere.json"),
        (("--labels.count", "1000"), "labels.count is 1000"),
        (("--init_from", "nowhere.safetensors"), "no such file"),
        (("--optim.batch_size", "0"), "optim.batch_size is 0"),
        (("--model.input.height", "65"), "model.input.height is 65"),
    ],
)
def test_mistakes_end_before_anything_is_written(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], expected: str
) -> None:
    assert finetune(finetune_arguments(people, tmp_path / "run", *more)) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--method.kwargs", "{witdh: 3}"), "width"),
        (("--method.name", "msclr"), "mscl"),
        (("--method.kwargs.loss_weights", "[1, 2]"), "loss_weights"),
        (("--data.images", "nowhere"), "no such folder"),
        (("--model.head", "{name: simple}"), "model.head"),
        (("--model.input.width", "64"), "square"),
        (("--optim.batch_size", "1"), "optim.batch_size is 1"),
    ],
)
def test_pretraining_mistakes(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], expected: str
) -> None:
    assert pretrain(pretrain_arguments(people, tmp_path / "run", *more)) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pictures_of_another_size_than_the_file_says(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for path in (people / "images").iterdir():
        picture = cv2.imread(str(path))
        assert picture is not None
        cv2.imwrite(str(tmp_path / "images" / path.name), cv2.resize(picture, (48, 48)))
    assert finetune(finetune_arguments(people, tmp_path / "run", "--data.images", str(tmp_path / "images"))) == 2
    assert "48 x 48 pixels as stored, but 96 x 96 in" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


def test_joints_that_the_file_lacks_are_refused_and_extra_ones_named(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(finetune_arguments(people, tmp_path / "run", "--model.skeleton", "lsp14")) == 2
    assert "lack neck, head_top of skeleton lsp14" in capsys.readouterr().err
    skeleton = tmp_path / "arms.yaml"
    skeleton.write_text("name: arms\njoints: [left_elbow, left_wrist]\n")
    arguments = finetune_arguments(people, tmp_path / "run", "--model.skeleton", str(skeleton), "--optim.epochs", "1")
    assert finetune([*arguments, "--optim.drops", "[]"]) == 0
    assert "skeleton arms has no nose, left_eye" in capsys.readouterr().err


def test_validation_joints_are_checked_before_training(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skeleton = tmp_path / "arms.yaml"
    skeleton.write_text("name: arms\njoints: [left_elbow, left_wrist]\n")
    more = ("--model.skeleton", str(skeleton), "--data.validation_annotations", str(people / "annotations.json"))
    assert finetune(finetune_arguments(people, tmp_path / "run", *more)) == 2
    assert "nose" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_lost_export_is_written_again(people: Path, tmp_path: Path) -> None:
    arguments = finetune_arguments(people, tmp_path / "run")
    assert finetune(arguments) == 0
    export = tmp_path / "run/export/model.safetensors"
    before = export.read_bytes()
    export.unlink()
    assert finetune(arguments) == 0
    assert export.read_bytes() == before
    assert export.stat().st_mode & 0o777 == (tmp_path / "run/config.yaml").stat().st_mode & 0o777


def test_other_data_under_the_same_path_does_not_resume(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((people / "annotations.json").read_text())
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(data))
    more = ("--data.annotations", str(file), "--labels.count", "20")
    arguments = finetune_arguments(people, tmp_path / "run", *more)
    with stop_after(tmp_path / "run", 3, signal.SIGTERM):
        assert finetune(arguments) == 75
    crowd = [dict(person, iscrowd=int(number % 3 == 0)) for number, person in enumerate(data["annotations"])]
    file.write_text(json.dumps({**data, "annotations": crowd}))
    assert finetune(arguments) == 2
    assert "put the data back" in capsys.readouterr().err


@pytest.mark.parametrize("main", [finetune, pretrain])
def test_no_arguments_at_all(main: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--augmentation.flip_probability", "2"), "augmentation.flip_probability is 2"),
        (("--augmentation.scale", "1.5"), "augmentation.scale is 1.5"),
        (("--decoding.blur", "-1"), "decoding.blur is -1"),
        (("--optim.drops", "[3, 2]"), "optim.drops is [3, 2]"),
        (("--model.input.mean", "[123, 116, 103]"), "intensities in 0..1"),
        (("--model.head.kwargs", "{deconv_channels: [-4]}"), "deconv_channels is [-4]"),
        (("--seed", "99999999999999999999"), "seed is 99999999999999999999"),
        (("--precision", "fp16", "--device", "cpu"), "fp16 needs a GPU"),
        (("--run_dir", "/proc/nowhere"), "/proc/nowhere"),
    ],
)
def test_values_out_of_range(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], expected: str
) -> None:
    assert finetune(finetune_arguments(people, tmp_path / "run", *more)) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.strip().splitlines()) <= 3
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--optim.weight_decay", "-1"), "optim.weight_decay is -1"),
        (("--method.kwargs", "{width: -3}"), "width is -3"),
        (("--method.kwargs.loss_weights", "[0, 0, 0, 0]"), "not all of them 0"),
    ],
)
def test_pretraining_values_out_of_range(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], expected: str
) -> None:
    assert pretrain(pretrain_arguments(people, tmp_path / "run", *more)) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_data_worker_reads_like_any_other(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for path in (people / "images").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes()[:200])
    arguments = finetune_arguments(people, tmp_path / "run", "--data.images", str(tmp_path / "images"))
    assert finetune([*arguments, "--workers", "1"]) == 2
    message = capsys.readouterr().err
    assert "none of the" in message
    assert "truncated" in message
    assert "Traceback" not in message
