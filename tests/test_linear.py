"""The linear probe against a plain loop, its crops against torchvision's, and the stage's contracts."""

from __future__ import annotations

import json
import signal
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from finetune.__main__ import main as finetune
from poserelay.checkpoint import describe, read_export, upstream_of, write_export
from poserelay.command import to_plain
from poserelay.config import InputConfig, Named
from poserelay.datasets.centre import centre_crop
from poserelay.datasets.sampling import draw_generator, epoch_order
from poserelay.datasets.unlabelled import FilePictures
from poserelay.errors import UserError
from poserelay.model import Backbone, build_backbone, load_model
from poserelay.run import file_sha256, read_metrics
from pretrain.__main__ import main as pretrain
from pretrain.class_folders import RandomCrop, class_of, find_classes

from .processes import finish, ranks, start
from .test_kill import kill_when
from .test_training import SMALL, assert_same_run, finetune_arguments, stop_after

SIZE = 32
COLOURS = {"blue": (40, 60, 200), "green": (30, 170, 60), "red": (210, 50, 40)}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/, each with noisy pictures of three colours in folders named for them."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for colour, rgb in COLOURS.items():
            folder = root / part / colour
            folder.mkdir(parents=True)
            for number in range(count):
                picture = np.clip(rng.normal(rgb, 20, (48, 40 + 8 * number, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / f"{number}.png"), picture[..., ::-1])
    return root


@pytest.fixture(scope="module")
def handed_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hand-off file with a small backbone of random weights."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "model.safetensors")


def write_backbone(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    backbone = build_backbone(Named(**SMALL))
    with torch.no_grad():
        backbone.eval()(torch.randn(1, 3, SIZE, SIZE))
        for name, value in backbone.named_buffers():  # other than the initial ones, so that a change would show
            if "running_mean" in name:
                value.normal_(0, 0.1)
    model = {"backbone": SMALL, "input": to_plain(InputConfig(height=64, width=64))}
    described = describe(
        stage="pretrain", method="mscl", model=model, skeleton=None, config={}, upstream=None, metrics={}
    )
    write_export(path, {f"backbone.{name}": value for name, value in backbone.state_dict().items()}, described)
    return path


def arguments(pictures: Path, handed_off: Path, run_dir: Path, *more: str) -> list[str]:
    config = {
        "init_from": str(handed_off),
        "data": {"train": str(pictures / "train"), "validation": str(pictures / "val")},
        "size": SIZE,
        "optim": {"batch_size": 6, "epochs": 2},
        "threads": 1,
        "workers": 0,
        "save_every": 2,
        "log_every": 1,
    }
    file = run_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return ["linear", "--config", str(file), "--run_dir", str(run_dir), *more]


def load_frozen(path: Path) -> Backbone:
    backbone = build_backbone(Named(**SMALL))
    state, _ = read_export(path)
    backbone.load_state_dict({name.removeprefix("backbone."): v for name, v in state.items() if "backbone" in name})
    return backbone.eval()


def features_of(backbone: Backbone, crops: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        normalised = (crops / 255 - MEAN[:, None, None]) / STD[:, None, None]
        return backbone(normalised)[-1].mean(dim=(2, 3)).double()


def read_rgb(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path))
    assert picture is not None
    return np.ascontiguousarray(picture[..., ::-1])


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_the_probe_is_the_plain_loop(pictures: Path, handed_off: Path, tmp_path: Path, optimizer: str) -> None:
    """Softmax regression on frozen features, its gradient by hand, LARS by the formula of apex's LARC."""
    base_lr = {"lars": "3000", "sgd": "2"}[optimizer]  # so that the weights move by more than their own size
    more = ("--optim.optimizer", optimizer, "--optim.base_lr", base_lr, "--seed", "5")
    assert pretrain(arguments(pictures, handed_off, tmp_path / "run", *more)) == 0
    state, _ = read_export(tmp_path / "run/export/model.safetensors")

    files = sorted((pictures / "train").rglob("*.png"))
    classes = sorted(COLOURS)
    backbone = load_frozen(handed_off)
    channels = backbone.channels[-1]
    weight = torch.empty(3, channels).normal_(0, 0.01, generator=torch.Generator().manual_seed(5)).double()
    parameters, velocities = [weight.clone(), torch.zeros(3).double()], [0.0, 0.0]
    for epoch in range(2):
        lr = float(base_lr) * 6 / 256 * (1 + np.cos(np.pi * epoch / 2)) / 2
        order = epoch_order(5, epoch, 18)
        for step in range(3):
            indices = order[6 * step : 6 * step + 6]
            crops = [
                RandomCrop(SIZE)(read_rgb(files[i]), lambda view, i=i: draw_generator(5, epoch, i, view))[0]  # noqa: B023
                for i in indices
            ]
            inputs = features_of(backbone, torch.stack(crops))
            targets = torch.tensor([classes.index(files[i].parent.name) for i in indices])
            probabilities = torch.softmax(inputs @ parameters[0].T + parameters[1], 1)
            errors = (probabilities - torch.eye(3)[targets]) / 6
            for number, gradient in enumerate((errors.T @ inputs, errors.sum(0))):
                norm = parameters[number].norm()
                if optimizer == "lars" and norm > 0:
                    gradient = gradient * 0.001 * norm / (gradient.norm() + 1e-8)
                velocities[number] = 0.9 * velocities[number] + gradient
                parameters[number] = parameters[number] - lr * velocities[number]
    assert (parameters[0] - weight).norm() > 0.3 * weight.norm()
    torch.testing.assert_close(state["head.weight"].double(), parameters[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state["head.bias"].double(), parameters[1], rtol=1e-6, atol=1e-6)


def test_the_backbone_stays_as_it_was(pictures: Path, handed_off: Path, tmp_path: Path) -> None:
    assert pretrain(arguments(pictures, handed_off, tmp_path / "run")) == 0
    before, _ = read_export(handed_off)
    after, described = read_export(tmp_path / "run/export/model.safetensors")
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert set(after) - set(before) == {"head.weight", "head.bias"}
    assert described["head"] == {"name": "linear", "kwargs": {"classes": ["blue", "green", "red"]}}
    assert (described["stage"], described["method"]) == ("linear", "mscl")
    assert described["upstream"] == {"stage": "pretrain", "sha256": file_sha256(handed_off)}
    assert (described["input"]["height"], described["input"]["width"]) == (SIZE, SIZE)


def test_colours_are_told_apart(pictures: Path, handed_off: Path, tmp_path: Path) -> None:
    more = ("--optim.epochs", "20", "--optim.optimizer", "sgd", "--optim.base_lr", "20", "--validate_every", "5")
    assert pretrain(arguments(pictures, handed_off, tmp_path / "run", *more)) == 0
    done = json.loads((tmp_path / "run/done.json").read_text())
    assert done["metrics"]["top1"] == 1.0
    protocol = done["metrics"]["protocol"]
    assert (protocol["split"], protocol["pictures"], protocol["classes"]) == ("val", 9, 3)
    assert protocol["crop"] == "central 32 pixels, shorter side 37"
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["kind"] == "validation"]
    assert [row["epoch"] for row in rows] == [4, 9, 14, 19]


def test_top1_and_top5_are_counted_over_every_validation_picture(handed_off: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for number in range(7):
        for part in ("train", "val"):
            (tmp_path / part / f"class{number}").mkdir(parents=True)
            for picture in range(3):
                noise = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                cv2.imwrite(str(tmp_path / part / f"class{number}" / f"{picture}.png"), noise)
    assert pretrain(arguments(tmp_path, handed_off, tmp_path / "run", "--optim.base_lr", "500")) == 0
    state, described = read_export(tmp_path / "run/export/model.safetensors")
    backbone, top1, top5 = load_frozen(handed_off), 0, 0
    files = sorted((tmp_path / "val").rglob("*.png"))
    for file in files:
        crop = torch.from_numpy(centre_crop(read_rgb(file), SIZE)).permute(2, 0, 1)
        logits = features_of(backbone, crop[None])[0] @ state["head.weight"].double().T + state["head.bias"]
        better = int((logits > logits[int(file.parent.name.removeprefix("class"))]).sum())
        top1, top5 = top1 + (better < 1), top5 + (better < 5)
    assert 0 < top1 < top5 < 21
    assert described["metrics"]["top1"] == pytest.approx(top1 / 21)
    assert described["metrics"]["top5"] == pytest.approx(top5 / 21)


@pytest.mark.parametrize(("width", "height"), [(640, 427), (333, 500), (256, 256), (100, 90)])
def test_the_central_crop_is_torchvisions(width: int, height: int) -> None:
    rng = np.random.default_rng(2)
    picture = cv2.resize(
        rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    expected = np.asarray(Compose([Resize(256), CenterCrop(224)])(Image.fromarray(picture)), dtype=int)
    assert np.abs(centre_crop(picture, 224) - expected).max() <= 1


def test_training_crops_cover_the_stated_areas_and_flip_half_the_time() -> None:
    """On a picture whose red is x and whose green is y, a crop tells where it came from."""
    ramp = np.arange(256, dtype=np.uint8)
    picture = np.stack([np.tile(ramp, (256, 1)), np.tile(ramp[:, None], (1, 256)), np.zeros((256, 256), np.uint8)], -1)
    areas, flips = [], []
    for index in range(400):
        crop = RandomCrop(16)(picture, lambda view, index=index: draw_generator(0, 0, index, view))[0].double()
        width = (crop[0, 8, 15] - crop[0, 8, 0]) * 16 / 15
        height = (crop[1, 15, 8] - crop[1, 0, 8]) * 16 / 15
        areas.append(float(abs(width) * height) / 256**2)
        flips.append(float(width) < 0)
    assert min(areas) > 0.07
    assert min(areas) < 0.12
    assert max(areas) > 0.9
    assert 0.44 < np.mean(flips) < 0.56


def test_a_signal_saves_and_the_next_start_ends_with_the_same_bytes(
    pictures: Path, handed_off: Path, tmp_path: Path
) -> None:
    more = ("--optim.epochs", "4", "--validate_every", "2")
    assert pretrain(arguments(pictures, handed_off, tmp_path / "whole", *more)) == 0
    with stop_after(tmp_path / "cut", 4, signal.SIGTERM):
        assert pretrain(arguments(pictures, handed_off, tmp_path / "cut", *more)) == 75
    assert json.loads((tmp_path / "cut/status.json").read_text())["state"] == "interrupted"
    assert pretrain(arguments(pictures, handed_off, tmp_path / "cut", *more)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_killed_at_some_steps(pictures: Path, handed_off: Path, tmp_path: Path) -> None:
    more = ("--optim.epochs", "12", "--save_every", "1")  # half of the time is spent on writing resume files
    assert pretrain(arguments(pictures, handed_off, tmp_path / "whole", *more)) == 0
    metrics = tmp_path / "cut/metrics.jsonl"
    for step in (5, 20):
        process = start(pretrain, arguments(pictures, handed_off, tmp_path / "cut", *more), tmp_path / "log")
        assert kill_when(process, lambda step=step: any(row["step"] >= step for row in read_metrics(metrics)))
    assert pretrain(arguments(pictures, handed_off, tmp_path / "cut", *more)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert json.loads((tmp_path / "cut/done.json").read_text())["attempts"] == 3


def test_workers_and_the_written_config_change_nothing(pictures: Path, handed_off: Path, tmp_path: Path) -> None:
    assert pretrain(arguments(pictures, handed_off, tmp_path / "none")) == 0
    assert pretrain(arguments(pictures, handed_off, tmp_path / "two", "--workers", "2")) == 0
    assert_same_run(tmp_path / "none", tmp_path / "two")
    written = tmp_path / "none/config.yaml"
    assert written.read_text().startswith("# python -m pretrain linear --config")
    assert pretrain(["linear", "--config", str(written), "--run_dir", str(tmp_path / "again")]) == 0
    assert_same_run(tmp_path / "none", tmp_path / "again")


def test_a_finished_run_is_left_alone(
    pictures: Path, handed_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain(arguments(pictures, handed_off, run)) == 0
    before = (run / "metrics.jsonl").read_bytes()
    assert pretrain(arguments(pictures, handed_off, run)) == 0
    assert "already finished" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    assert pretrain(arguments(pictures, handed_off, run, "--size", "64")) == 2
    assert "size: 32 -> 64" in capsys.readouterr().err


def test_two_processes_are_one_with_twice_the_batch(pictures: Path, handed_off: Path, tmp_path: Path) -> None:
    more = ("--optim.epochs", "3", "--optim.optimizer", "sgd", "--optim.base_lr", "5", "--optim.batch_size")
    assert pretrain(arguments(pictures, handed_off, tmp_path / "one", *more, "6")) == 0
    argv = arguments(pictures, handed_off, tmp_path / "two", *more, "3")
    processes = [start(pretrain, argv, tmp_path / "log", environment) for environment in ranks(2)]
    assert [finish(process) for process in processes] == [0, 0], (tmp_path / "log").read_text()
    (one, first), (two, second) = (read_export(tmp_path / run / "export/model.safetensors") for run in ("one", "two"))
    assert (one["head.weight"] - two["head.weight"]).abs().max() < 1e-6
    assert first["metrics"]["top1"] == second["metrics"]["top1"]  # 9 pictures: shares of 5 and 4


def test_pictures_that_cannot_be_read(
    pictures: Path, handed_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training another takes its place, with its own class; validation stops: its figure is of every picture."""
    copied = tmp_path / "data"
    for file in pictures.rglob("*.png"):
        (copied / file.relative_to(pictures)).parent.mkdir(parents=True, exist_ok=True)
        (copied / file.relative_to(pictures)).write_bytes(file.read_bytes())
    (copied / "train/red/2.png").write_bytes(b"")
    assert pretrain(arguments(copied, handed_off, tmp_path / "run", "--max_unreadable", "0.5")) == 0
    assert "red/2.png: the file is empty" in capsys.readouterr().err
    assert pretrain(arguments(copied, handed_off, tmp_path / "strict")) == 3
    (copied / "val/green/1.png").write_bytes(b"GIF89a")
    assert pretrain(arguments(copied, handed_off, tmp_path / "val", "--max_unreadable", "1", "--workers", "1")) == 2
    message = capsys.readouterr().err
    assert "green/1.png: not a picture, or damaged; replace or remove it" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--init_from", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("--data.train", "nowhere"), "nowhere: no such folder"),
        (("--data.train", "{train}/red"), "all pictures are of one class, 'red'"),
        (("--data.train", "{train}/..", "--data.validation", "{train}/.."), None),
        (("--size", "40"), "size is 40; give a multiple of 32, the stride of timm"),
        (("--size", "0"), "size is 0"),
        (("--optim.batch_size", "0"), "optim.batch_size is 0"),
        (("--optim.optimizer", "adam"), "optim.optimizer"),
        (("--optim.momentum", "2"), "optim.momentum is 2"),
        (("--validate_every", "0"), "validate_every is 0"),
        (("--model.backbone", "{name: resnet18}"), "model.backbone"),
    ],
)
def test_mistakes_end_before_anything_is_written(
    pictures: Path,
    handed_off: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    expected: str | None,
) -> None:
    more = tuple(part.replace("{train}", str(pictures / "train")) for part in more)
    code = pretrain(arguments(pictures, handed_off, tmp_path / "run", *more))
    if expected is None:
        assert code == 0  # a class may lie at any depth
        return
    assert code == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_validation_classes_must_be_trained(
    pictures: Path, handed_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train/purple").mkdir(parents=True)
    picture = pictures / "train/red/0.png"
    (tmp_path / "train/purple/0.png").write_bytes(picture.read_bytes())
    (tmp_path / "train/blue_").mkdir()
    (tmp_path / "train/blue_/0.png").write_bytes(picture.read_bytes())
    assert pretrain(arguments(pictures, handed_off, tmp_path / "run", "--data.train", str(tmp_path / "train"))) == 2
    assert "and 2 more is not among the 2 classes" in capsys.readouterr().err


def test_classes_may_not_change_under_a_run(
    pictures: Path, handed_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "data"
    for file in pictures.rglob("*.png"):
        (copied / file.relative_to(pictures)).parent.mkdir(parents=True, exist_ok=True)
        (copied / file.relative_to(pictures)).write_bytes(file.read_bytes())
    argv = arguments(copied, handed_off, tmp_path / "run", "--optim.epochs", "4")
    with stop_after(tmp_path / "run", 3, signal.SIGTERM):
        assert pretrain(argv) == 75
    for part in ("train", "val"):
        (copied / part / "red").rename(copied / part / "crimson")
    assert pretrain(argv) == 2
    assert "started on 3 classes and now finds 3 ('crimson' is only in one" in capsys.readouterr().err


def test_another_backbone_under_the_same_path_does_not_resume(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handed_off = write_backbone(tmp_path / "model.safetensors")
    argv = arguments(pictures, handed_off, tmp_path / "run", "--optim.epochs", "4")
    with stop_after(tmp_path / "run", 3, signal.SIGTERM):
        assert pretrain(argv) == 75
    write_backbone(handed_off, seed=1)
    assert pretrain(argv) == 2
    assert "init_from: the file has changed" in capsys.readouterr().err


def test_what_others_make_of_the_file(
    people: Path, pictures: Path, handed_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no pose model, and says so; as a start of fine-tuning, and of another probe, it is its backbone."""
    assert pretrain(arguments(pictures, handed_off, tmp_path / "run")) == 0
    export = tmp_path / "run/export/model.safetensors"
    with pytest.raises(UserError, match="no pose model"):
        load_model(export)
    assert (
        finetune(
            finetune_arguments(
                people, tmp_path / "fine", "--init_from", str(export), "--optim.epochs", "1", "--optim.drops", "[]"
            )
        )
        == 0
    )
    _, described = read_export(tmp_path / "fine/export/model.safetensors")
    assert described["upstream"] == upstream_of(export)
    assert pretrain(arguments(pictures, export, tmp_path / "second")) == 0
    first, second = (read_export(tmp_path / run / "export/model.safetensors")[0] for run in ("run", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_class_folders_in_a_shard(pictures: Path, handed_off: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/train-0.tar", "w") as tar:
        for file in sorted((pictures / "train").rglob("*.png")):
            tar.add(file, file.relative_to(pictures / "train"))
    assert pretrain(arguments(pictures, handed_off, tmp_path / "run", "--data.train", str(tmp_path / "shards"))) == 0
    _, described = read_export(tmp_path / "run/export/model.safetensors")
    assert described["head"]["kwargs"]["classes"] == sorted(COLOURS)


def test_classes_are_folder_names_wherever_the_pictures_are() -> None:
    assert class_of("shards/0001.tar/n02/x.jpg") == "n02"
    files = [Path("b/1.jpg"), Path("deep/a/2.jpg"), Path("c/b/3.jpg")]
    assert find_classes(FilePictures(files)) == ["a", "b"]
