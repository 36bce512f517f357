"""Pose models: the papers' sizes, what a wrong config is told, and the way back from a hand-off file."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2

from poserelay.checkpoint import describe, write_export
from poserelay.command import to_plain
from poserelay.config import Decoding, InputConfig, ModelConfig, Named
from poserelay.errors import UserError
from poserelay.inference import predict_images
from poserelay.keypoints import Skeleton
from poserelay.model import PoseModel, build_backbone, build_model, check_kwargs, load_model, normalise

SKELETON = Skeleton(name="hand", joints=("root", "left", "right"), flip_pairs=(("left", "right"),))
SMALL = ModelConfig(
    backbone=Named("resnet18"),
    head=Named("simple", {"deconv_channels": [8, 8, 8]}),
    skeleton="auto",
    input=InputConfig(height=64, width=96, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), color="bgr", alignment="udp"),
)


def coco_model(backbone: str, head: str) -> PoseModel:
    with torch.device("meta"):
        return build_model(ModelConfig(Named(backbone), Named(head), skeleton="coco17"))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("backbone", "head", "millions"),
    [
        ("resnet50", "simple", 34.0),
        ("resnet101", "simple", 53.0),
        ("resnet152", "simple", 68.6),
        ("hrnet_w32", "hrnet", 28.5),
        ("hrnet_w48", "hrnet", 63.6),
    ],
)
def test_parameters_are_as_the_papers_print_them(backbone: str, head: str, millions: float) -> None:
    assert round(count(coco_model(backbone, head)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 512), ("resnet50", 2048), ("resnet152", 2048), ("resnext50_32x4d", 2048)]
)
def test_pose_resnet_is_torchvisions_without_classifier_plus_the_head(name: str, width: int) -> None:
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    backbone = published - (width * 1000 + 1000)
    deconvolutions = width * 256 * 16 + 2 * 256 * 256 * 16 + 3 * 2 * 256
    assert count(coco_model(name, "simple")) == backbone + deconvolutions + 17 * 256 + 17


@pytest.mark.parametrize(
    ("backbone", "head", "size"),
    [
        (Named("resnet18"), Named("simple", {"deconv_channels": [8]}), (64, 32)),
        (Named("resnet50", {"output_stride": 16}), SMALL.head, (96, 64)),
        (Named("hrnet_w32"), Named("hrnet"), (64, 96)),
        (Named("timm", {"model": "convnext_atto"}), SMALL.head, (64, 64)),
    ],
)
def test_stride_and_size_are_those_of_the_heatmaps(backbone: Named, head: Named, size: tuple[int, int]) -> None:
    config = ModelConfig(backbone, head, input=InputConfig(height=size[0], width=size[1]))
    with torch.device("meta"):
        model = build_model(config, SKELETON)
        heatmaps = model(torch.zeros(2, 3, *size))
    assert heatmaps.shape == (2, 3, *model.heatmap_size)
    assert (size[0] / model.stride, size[1] / model.stride) == model.heatmap_size


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        (Named("resnet18"), SMALL.head),
        (Named("shufflenet_v2_x1_5"), SMALL.head),
        (Named("timm", {"model": "hrnet_w18_small"}), Named("hrnet")),
    ],
)
def test_every_parameter_takes_part_in_training(backbone: Named, head: Named) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone, head, input=InputConfig(height=64, width=64)), SKELETON)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_normalise_is_torchvisions(color: Literal["rgb", "bgr"]) -> None:
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    config = InputConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), color=color)
    ordered = images if color == "rgb" else images[:, [2, 1, 0]]
    expected = v2.functional.normalize(
        v2.functional.to_dtype(ordered, torch.float32, scale=True), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    )
    torch.testing.assert_close(normalise(images, config), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head": None}, ["model.head is null", "simple, hrnet"]),
        ({"refiner": Named("scoi")}, ["model.refiner 'scoi'", "did you mean 'scio'"]),
        ({"refiner": Named("scio")}, ["model.refiner scio: skeleton 'hand' declares no groups", "proximal: [A, B, C]"]),
        ({"refiner": Named("scio", {"in_channels": 3})}, ["no 'in_channels'"]),
        ({"backbone": Named("resnet_50")}, ["'resnet_50'", "did you mean 'resnet50'", "hrnet_w48"]),
        ({"head": Named("simpel")}, ["did you mean 'simple'"]),
        ({"head": Named("hrnet")}, ["'hrnet' does not go with", "'resnet18'"]),
        ({"backbone": Named("hrnet_w32")}, ["'simple' does not go with", "'hrnet_w32'"]),
        ({"input": InputConfig(height=250)}, ["model.input.height is 250", "multiple of 32"]),
        ({"input": InputConfig(width=0)}, ["model.input.width is 0"]),
        ({"head": Named("simple", {"deconv_channels": [8] * 6})}, ["upsamples by 64", "stride 32"]),
        ({"backbone": Named("timm")}, ["needs 'model'"]),
        (
            {"backbone": Named("resnet18", {"pretraned": True, "output_stride": 17, "zero_init_residual": "false"})},
            ["no 'pretraned'", "pretrained,", "output_stride is 17", "zero_init_residual is 'false', expected bool"],
        ),
        ({"head": Named("simple", {"num_joints": 3})}, ["no 'num_joints'"]),
        ({"head": Named("simple", {"deconv_channels": 256})}, ["deconv_channels is 256, expected Sequence[int]"]),
    ],
)
def test_a_wrong_config_is_told_what_and_what_else(changes: dict[str, Any], says: list[str]) -> None:
    with torch.device("meta"), pytest.raises(UserError) as error:
        build_model(replace(SMALL, **changes), SKELETON)
    for part in says:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_skeleton_comes_from_the_config_unless_given() -> None:
    with torch.device("meta"):
        assert build_model(replace(SMALL, skeleton="crowdpose14")).head.final_layer.out_channels == 14
        with pytest.raises(UserError, match="auto"):
            build_model(SMALL)
        with pytest.raises(UserError, match="unknown skeleton"):
            build_model(replace(SMALL, skeleton="coco71"))


def test_kwargs_that_the_caller_gives_are_not_the_configs() -> None:
    def method(backbone: int, width: int, *, names: tuple[str, ...] = (), rate: float | None = None) -> None: ...

    check = partial(check_kwargs, "method", constructor=method, given=("backbone",))
    check(Named("m", {"width": 3, "names": ["a"], "rate": None}))
    check(Named("m", {"width": 3, "rate": 1}))
    with pytest.raises(UserError, match="needs 'width'"):
        check(Named("m"))
    for wrong in ({"width": True}, {"width": 1.5}, {"width": "3"}, {"rate": "fast"}, {"names": [1]}, {"backbone": 1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            check(Named("m", {"width": 1, **wrong}))


def test_load_model_rebuilds_the_model_from_the_file_alone(tmp_path: Path) -> None:
    model = exported(tmp_path / "model.safetensors")
    torch.manual_seed(1)
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.skeleton == SKELETON
    assert loaded.input == SMALL.input
    assert loaded.config.head == Named("simple", {"deconv_channels": [8, 8, 8]})
    assert not loaded.training
    crops = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    assert torch.equal(loaded(loaded.preprocess(crops)), model(model.preprocess(crops)))


def test_load_model_without_a_model_says_so(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    backbone = build_backbone(SMALL.backbone)
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    write_export(path, state, described(replace(SMALL, head=None), None))
    with pytest.raises(UserError, match=r"backbone\.safetensors: holds a backbone \(stage finetune\).*init_from"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["backbone"].update(name="resnet19"), "resnet19"),
        (
            lambda d: d["head"]["kwargs"].update(deconv_channels=[8, 8, 9]),
            "head.deconv_layers.6.weight is [8, 8, 4, 4], expected [8, 9, 4, 4]",
        ),
        (lambda d: d["backbone"].update(name="resnet34"), "missing backbone.layer1.2"),
        (lambda d: d.pop("input"), "'input'"),
        (lambda d: d["input"].update(depth=3), "depth"),
        (lambda d: d["skeleton"].update(joints=["root"]), "skeleton"),
    ],
)
def test_a_file_that_does_not_fit_its_description_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    path = tmp_path / "model.safetensors"
    exported(path)
    metadata = {"format": 1, **described(SMALL, SKELETON)}
    change(metadata)
    save_file(load_file(path), path, metadata={"poserelay": json.dumps(metadata)})
    with pytest.raises(UserError) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert says in str(error.value)


def test_predict_needs_boxes(tmp_path: Path) -> None:
    model = exported(tmp_path / "model.safetensors")
    images = [np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)] * 2
    with pytest.raises(ValueError, match="give boxes"):
        model.predict(images)
    boxes = [np.array([[10.0, 20, 40, 50], [0, 0, 90, 80]]), np.array([[5.0, 5, 30, 30]])]
    records = model.predict(images, boxes)
    assert [record["image_id"] for record in records] == [0, 0, 1]
    assert all(len(record["keypoints"]) == 9 for record in records)
    assert records == predict_images(model, images, boxes, Decoding())


def exported(path: Path) -> PoseModel:
    """A model with weights of its own, written to `path`."""
    torch.manual_seed(0)
    model = build_model(SMALL, SKELETON).eval()
    torch.nn.init.normal_(model.head.final_layer.weight)
    write_export(path, model.state_dict(), described(SMALL, SKELETON))
    return model


def described(config: ModelConfig, skeleton: Skeleton | None) -> dict[str, Any]:
    return describe(
        stage="finetune",
        method="simple",
        model=to_plain(config),
        skeleton=skeleton,
        config={},
        upstream=None,
        metrics={},
    )
