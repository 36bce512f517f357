"""The pretraining loop with every method: one step per backbone family, what the optimiser does, what stops a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from poserelay.__main__ import main as poserelay
from poserelay.checkpoint import read_export
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.model import build_backbone
from poserelay.run import read_metrics
from pretrain.__main__ import main as pretrain
from pretrain.comparison import Comparison
from pretrain.config import OptimConfig, PretrainConfig, PretrainDataConfig
from pretrain.train import METHODS, build_optimizer, training_step

from .processes import finish, ranks, start
from .test_training import SMALL, assert_same_run, pretrain_arguments

FAMILIES = [
    Named("resnet18", {"zero_init_residual": True}),
    Named("resnext50_32x4d"),
    Named("hrnet_w32"),
    Named("timm", {"model": "convnext_atto"}),
    Named("mobilenetv2_100"),
    Named("shufflenet_v2_x1_5"),
]
SMALL_METHODS: dict[str, dict[str, Any]] = {
    "mscl": {"width": 16, "prediction_width": 8},
    "simsiam": {"width": 16, "prediction_width": 8},
    "moco": {"width": 8, "hidden_width": 16, "queue_size": 20},
    "densecl": {"width": 8, "hidden_width": 16, "queue_size": 20},
}


def config_for(**optim: Any) -> PretrainConfig:
    model = ModelConfig(Named("resnet18"), input=InputConfig(height=64, width=64))
    return PretrainConfig(model, "unused", PretrainDataConfig("unused"), optim=OptimConfig(**optim))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("backbone", FAMILIES, ids=lambda named: named.kwargs.get("model", named.name))
def test_one_step_at_64_pixels(backbone: Named, method: str) -> None:
    torch.manual_seed(0)
    network = build_backbone(backbone)
    model = METHODS[method](network, network.channels, **SMALL_METHODS[method])
    optimizer = build_optimizer(model, OptimConfig(), 0.01)
    before = {name: value.clone() for name, value in model.named_parameters()}
    views = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
    fabric = Fabric(accelerator="cpu", devices=1)
    values = training_step(fabric, fabric.setup_module(model), model, optimizer, views, config_for(batch_size=2))
    assert values.isfinite().all()
    assert len(values) == 1 + 3 * len(model.terms)
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert any(name.startswith("backbone.") for name in moved)
    assert any("head" in name for name in moved)


class LinearMethod(nn.Module):
    """A method without batch norm, whose steps can be worked out by hand."""

    terms = ("only",)
    loss_range = (0.0, -1.0)
    judged_from = 0.0
    sync_batch_norm = True

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 4)
        self.predictor = nn.Linear(4, 4)
        self.steps = 0

    def forward(self, view1: torch.Tensor, view2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.predictor(self.backbone(view1.mean((2, 3)))), self.backbone(view2.mean((2, 3))).detach()

    def compare(self, outputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
        loss = (outputs[0] - outputs[1]).square().mean()
        return Comparison(loss, loss[None], [outputs[1]])

    def predictors(self) -> list[nn.Parameter]:
        return list(self.predictor.parameters())

    def after_step(self) -> None:
        self.steps += 1


def test_passes_within_a_batch_give_the_whole_batchs_gradient() -> None:
    results = []
    for passes in (1, 3):
        torch.manual_seed(0)
        model = LinearMethod()
        optimizer = build_optimizer(model, OptimConfig(), 0.5)
        views = torch.randint(0, 256, (2, 6, 3, 4, 4), dtype=torch.uint8)
        fabric = Fabric(accelerator="cpu", devices=1)
        config = config_for(batch_size=6, micro_batches=passes)
        values = training_step(fabric, fabric.setup_module(model), model, optimizer, views, config)
        results.append((values[0], *(parameter.detach() for parameter in model.parameters())))
        assert model.steps == 1
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_predictors_rate_stays_and_lars_scales_matrices_only() -> None:
    torch.manual_seed(0)
    model = LinearMethod()
    groups = build_optimizer(model, OptimConfig(), 0.1).param_groups
    assert [group["fixed"] for group in groups] == [False, True]
    assert [len(group["params"]) for group in groups] == [2, 2]
    optimizer = build_optimizer(model, OptimConfig(name="lars", momentum=0.0, weight_decay=0.01), 0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        w, g = before[name], value.grad
        assert g is not None
        if w.ndim > 1:  # You et al. 2017, Eq. 6, trust coefficient 0.001
            rate = 0.001 * w.norm() / (g.norm() + 0.01 * w.norm())
            torch.testing.assert_close(value.detach(), w - 0.1 * rate * (g + 0.01 * w))
        else:
            torch.testing.assert_close(value.detach(), w - 0.1 * g)


def test_none_hands_the_backbone_off_as_it_was_built(people: Path, tmp_path: Path) -> None:
    none = ("--method", "{name: none}", "--optim.epochs", "0")
    arguments = pretrain_arguments(people, tmp_path / "random", *none, "--seed", "3")
    assert pretrain(arguments) == 0
    state, described = read_export(tmp_path / "random/export/model.safetensors")
    torch.manual_seed(3)
    expected = build_backbone(Named(**SMALL)).state_dict()
    assert described["method"] == "none"
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in expected.items())
    assert pretrain(arguments) == 0


def test_a_collapse_is_named_and_can_stop_the_run(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absurd = ("--method", '{"name": "simsiam", "kwargs": {"width": 64}}', "--optim.epochs", "40", "--log_every", "4")
    absurd += ("--optim.base_lr", "300", "--optim.batch_size", "24")
    absurd += ("--model.input.height", "64", "--model.input.width", "64")
    assert pretrain(pretrain_arguments(people, tmp_path / "warned", *absurd)) == 0
    assert "warning: step" in capsys.readouterr().err
    assert pretrain(pretrain_arguments(people, tmp_path / "stopped", *absurd, "--on_collapse", "stop")) == 3
    message = capsys.readouterr().err
    assert "stopped: conv5: " in message
    assert json.loads((tmp_path / "stopped/status.json").read_text())["state"] == "failed"
    rows = read_metrics(tmp_path / "stopped/metrics.jsonl")
    assert 0 < rows[-1]["step"] < 40


def test_a_batch_with_a_loss_that_is_no_number_names_its_pictures(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(pretrain_arguments(people, tmp_path / "run", "--optim.base_lr", "1e30")) == 3
    message = capsys.readouterr().err
    assert "the loss is not a number at step" in message
    assert sum(path.name in message for path in (people / "images").iterdir()) == 6


def test_neighbours_are_watched_and_change_nothing(people: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted((people / "images").iterdir())):
        folder = tmp_path / "classes" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    knn = ("--knn", json.dumps({"images": str(tmp_path / "classes"), "every": 2, "neighbours": 5}))
    assert pretrain(pretrain_arguments(people, tmp_path / "plain", "--optim.epochs", "3")) == 0
    assert pretrain(pretrain_arguments(people, tmp_path / "watched", "--optim.epochs", "3", *knn)) == 0
    assert_same_run(tmp_path / "plain", tmp_path / "watched")
    rows = [row for row in read_metrics(tmp_path / "watched/metrics.jsonl") if row["kind"] == "knn"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(0 <= row["top1"] <= 1 and row["bank"] == 24 for row in rows)
    lonely = ("--knn", json.dumps({"images": str(tmp_path / "classes" / "class0"), "neighbours": 5}))
    assert pretrain(pretrain_arguments(people, tmp_path / "one", *lonely)) == 2
    assert not (tmp_path / "one").exists()


def test_shards_give_the_same_kind_of_run(people: Path, tmp_path: Path) -> None:
    prepare = ["prepare", "--images", str(people / "images"), "--out", str(tmp_path / "shards"), "--short_side", "48"]
    assert poserelay([*prepare, "--pictures_per_shard", "10"]) == 0
    arguments = pretrain_arguments(people, tmp_path / "run", "--data.images", str(tmp_path / "shards"))
    assert pretrain(arguments) == 0
    assert pretrain(pretrain_arguments(people, tmp_path / "two", *arguments[4:], "--workers", "2")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "two")


def test_further_folders_are_visited_too(people: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for number in range(4):
        cv2.imwrite(str(more / f"{number}.png"), np.full((20, 30, 3), 50 * number, np.uint8))
    arguments = pretrain_arguments(people, tmp_path / "run", "--data.more_images", f"[{more}]")
    assert pretrain([*arguments, "--optim.batch_size", "28"]) == 0
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["kind"] == "train"]
    assert rows[-1]["step"] == 2  # 24 and 4 pictures are one batch of 28


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--method", "{name: none}"), "method none trains nothing"),
        (("--optim.epochs", "0"), "optim.epochs is 0"),
        (("--optim.micro_batches", "4"), "micro_batches, 4, does not divide"),
        (("--optim.micro_batches", "6"), "at least 2 pictures"),
        (("--method.kwargs.levels", "[0, 1, 2, 3, 4]"), "levels 0 to 3"),
        (("--method", "{name: moco, kwargs: {queue_size: 0}}"), "queue_size is 0"),
        (("--method", "{name: densecl, kwargs: {dense_weight: 3.0}}"), "dense_weight is 3"),
        (("--method", "{name: simsiam, kwargs: {levels: [0]}}"), "has no 'levels'"),
        (("--data.more_images", "[nowhere]"), "nowhere: no such folder"),
    ],
)
def test_mistakes(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], expected: str
) -> None:
    assert pretrain(pretrain_arguments(people, tmp_path / "run", *more)) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pictures", [0, 1])
def test_too_few_pictures(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: int) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for number in range(pictures):
        cv2.imwrite(str(folder / f"{number}.png"), np.zeros((20, 30, 3), np.uint8))
    assert pretrain(pretrain_arguments(people, tmp_path / "run", "--data.images", str(folder))) == 2
    assert "few: " in capsys.readouterr().err


def test_two_processes_train_what_one_level_leaves_unused(people: Path, tmp_path: Path) -> None:
    """An HRNet's other branches get no gradient under SimSiam, for which DDP would wait."""
    method = {"name": "simsiam", "kwargs": SMALL_METHODS["simsiam"]}
    backbone = {"name": "timm", "kwargs": {"model": "hrnet_w18_small"}}
    more = ("--method", json.dumps(method), "--model.backbone", json.dumps(backbone), "--optim.epochs", "1")
    arguments = pretrain_arguments(people, tmp_path / "run", *more, "--optim.micro_batches", "2")
    processes = [
        start(pretrain, arguments, tmp_path / f"log{rank}", environment) for rank, environment in enumerate(ranks(2))
    ]
    for rank, process in enumerate(processes):
        assert finish(process) == 0, (tmp_path / f"log{rank}").read_text()
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["kind"] == "train"]
    assert all(math.isfinite(row["loss_conv5"]) for row in rows)


def test_a_run_stopped_by_its_collapse_is_not_handed_on(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = ("--method", json.dumps({"name": "moco", "kwargs": {**SMALL_METHODS["moco"], "queue_size": 48}}))
    more = (*method, "--optim.epochs", "6", "--optim.batch_size", "24", "--optim.base_lr", "1000")
    arguments = pretrain_arguments(people, tmp_path / "run", *more)
    assert pretrain([*arguments, "--on_collapse", "stop"]) == 3
    assert pretrain([*arguments, "--on_collapse", "stop"]) == 3
    assert "has collapsed by step" in capsys.readouterr().err
    assert not (tmp_path / "run/export/model.safetensors").exists()
    assert pretrain(arguments) == 0  # to go on with a warning is another decision, not another run


def test_weights_that_are_no_numbers_are_not_saved(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absurd = ("--optim.base_lr", "1e30", "--optim.weight_decay", "1e38", "--optim.batch_size", "24")
    for epochs in ("1", "3"):
        run = tmp_path / epochs
        assert pretrain(pretrain_arguments(people, run, *absurd, "--save_every", "1", "--optim.epochs", epochs)) == 3
        message = capsys.readouterr().err
        assert "weights are not numbers after step 1 (pictures: " in message
        assert not list((run / "resume").glob("*.pt"))
        assert not (run / "export/model.safetensors").exists()


def test_a_small_batch_is_not_called_collapsed(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--optim.batch_size", "4", "--on_collapse", "stop")
    assert pretrain(pretrain_arguments(people, tmp_path / "run", *more)) == 0
    assert "collapsing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--method", "{name: simsiam, kwargs: {width: 0}}"), "width is 0"),
        (("--method", "{name: moco, kwargs: {hidden_width: -3}}"), "hidden_width -3"),
        (("--method", "{name: moco, kwargs: {width: null}}"), "width is None, expected int"),
        (("--method", "{name: densecl, kwargs: {warmup_steps: -3}}"), "warmup_steps -3"),
        (("--model.input.height", "0", "--model.input.width", "0"), "at least 32 pixels"),
        (("--optim.base_lr", "1e41"), "optim.base_lr is 1e+41"),
        (("--model.refiner", "{name: x}"), "model.refiner"),
    ],
)
def test_more_mistakes(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], expected: str
) -> None:
    assert pretrain(pretrain_arguments(people, tmp_path / "run", *more)) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("LOCAL_WORLD_SIZE", "")])
def test_a_launchers_variables_are_checked(
    people: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
) -> None:
    for variable, number in {**ranks(2)[0], name: value}.items():
        monkeypatch.setenv(variable, number)
    assert pretrain(pretrain_arguments(people, tmp_path / "run")) == 2
    assert f"environment variable {name} is {value!r}" in capsys.readouterr().err
