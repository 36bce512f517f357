"""One vector per picture, against torchvision's evaluation pipeline; hand-off files of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize as to_length_one
from torchvision import transforms

from poserelay.backbones import Backbone
from poserelay.checkpoint import describe, read_export, write_export
from poserelay.command import to_plain
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.datasets.unlabelled import FilePictures, list_images
from poserelay.embeddings import embed, evaluating, load_backbone
from poserelay.errors import CheckFailed, UserError
from poserelay.keypoints import load_skeleton
from poserelay.model import build_backbone, build_model

SMALL = Named("timm", {"model": "test_resnet"})
INPUT = InputConfig(height=64, width=64)


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(SMALL)
    with torch.no_grad():  # statistics and weights that make eval mode differ from training mode
        backbone.train()(torch.randn(8, 3, 64, 64))
    return backbone.eval()


@pytest.fixture
def pictures(tmp_path: Path) -> FilePictures:
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate([(90, 130), (200, 80), (64, 64), (30, 41), (75, 75)]):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"{index}.png")
    return FilePictures(list_images(tmp_path))


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_a_vector_is_that_of_torchvisions_evaluation_crop(
    backbone: Backbone, pictures: FilePictures, color: str
) -> None:
    input = InputConfig(height=64, width=64, color=color, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))  # pyright: ignore[reportArgumentType]
    evaluation = transforms.Compose(
        [
            transforms.Resize(73),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Lambda(lambda image: image.flip(0) if color == "bgr" else image),
            transforms.Normalize(input.mean, input.std),
        ]
    )
    embedded = embed(backbone, input, pictures, batch_size=2)
    assert embedded.rows.tolist() == [0, 1, 2, 3, 4]
    assert embedded.unreadable == []
    for path, vector in zip(pictures.files, embedded.vectors, strict=True):
        with Image.open(path) as image, torch.no_grad():
            crop: Any = evaluation(image)
            maps = backbone(crop[None])[-1]
        expected = to_length_one(maps.mean((2, 3)), dim=1)[0]
        assert float((vector - expected).norm()) < 0.01  # PIL rounds between its two passes
    distances = torch.cdist(embedded.vectors, embedded.vectors) + torch.eye(5)
    assert float(distances.min()) > 0.05  # what the pictures differ by


def test_an_oblong_input_is_seen_as_the_square_of_its_longer_side(backbone: Backbone, pictures: FilePictures) -> None:
    square = embed(backbone, INPUT, pictures)
    oblong = embed(backbone, InputConfig(height=64, width=32), pictures)
    assert torch.equal(square.vectors, oblong.vectors)


def test_neither_workers_nor_the_batch_change_anything_but_rounding(backbone: Backbone, pictures: FilePictures) -> None:
    one = embed(backbone, INPUT, pictures, batch_size=2)
    assert torch.equal(one.vectors, embed(backbone, INPUT, pictures, batch_size=2, workers=2).vectors)
    torch.testing.assert_close(one.vectors, embed(backbone, INPUT, pictures, batch_size=5).vectors)


def test_pictures_are_turned_upright(backbone: Backbone, pictures: FilePictures, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(pictures.files[0]) as image:
        image.save(tmp_path / "turned.png", exif=exif)
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    files = [tmp_path / "turned.png", tmp_path / "upright.png", pictures.files[0]]
    turned, upright, plain = embed(backbone, INPUT, FilePictures(files)).vectors
    assert torch.equal(turned, upright)
    assert not torch.equal(turned, plain)


def test_unreadable_pictures_are_left_out_and_named(backbone: Backbone, pictures: FilePictures) -> None:
    before = embed(backbone, INPUT, pictures, batch_size=2)
    for index in (0, 1, 4):
        pictures.files[index].write_bytes(b"broken")
    embedded = embed(backbone, INPUT, pictures, batch_size=2)  # the first and the last batch are empty
    assert embedded.rows.tolist() == [2, 3]
    torch.testing.assert_close(embedded.vectors, before.vectors[2:4])
    assert [message.split(":")[0] for message in embedded.unreadable] == [str(pictures.files[i]) for i in (0, 1, 4)]
    for file in pictures.files:
        file.unlink()
    embedded = embed(backbone, INPUT, pictures)
    assert embedded.vectors.shape == (0, backbone.channels[-1])
    assert len(embedded.unreadable) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_training_is_not_disturbed(backbone: Backbone, pictures: FilePictures, workers: int) -> None:
    expected = embed(backbone, INPUT, pictures).vectors
    backbone.train()
    frozen = next(module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d))
    frozen.eval()
    modes = [module.training for module in backbone.modules()]
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    torch.manual_seed(1)
    following = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(embed(backbone, INPUT, pictures, workers=workers).vectors, expected)
    assert torch.equal(torch.rand(3), following)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    backbone(torch.randn(2, 3, 64, 64))[-1].sum().backward()  # nothing of inference mode is left in it


def test_modes_come_back_after_an_error(backbone: Backbone) -> None:
    backbone.train()

    def fail() -> None:
        with evaluating(backbone):
            assert not backbone.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(module.training for module in backbone.modules())


def test_a_diverged_backbone_is_told(backbone: Backbone, pictures: FilePictures) -> None:
    with torch.no_grad():
        next(backbone.parameters())[0] = torch.nan
    with pytest.raises(CheckFailed, match="the backbone's output holds NaN"):
        embed(backbone, INPUT, pictures)


def export(path: Path, config: ModelConfig, input: InputConfig) -> dict[str, torch.Tensor]:
    """Write a hand-off file of random weights, a backbone's or a pose model's, and return them."""
    torch.manual_seed(0)
    skeleton = load_skeleton("coco17") if config.head else None
    if skeleton:
        state = build_model(config, skeleton).state_dict()
    else:
        state = {f"backbone.{name}": value for name, value in build_backbone(config.backbone).state_dict().items()}
    described = describe(
        stage="a test", method="", model=to_plain(config), skeleton=skeleton, config={}, upstream=None, metrics={}
    )
    write_export(path, state, described)
    return state


@pytest.mark.parametrize(
    ("named", "head", "channels"),
    [
        (SMALL, None, 4),
        (SMALL, Named("simple", {"deconv_channels": [8, 8]}), 4),
        (Named("timm", {"model": "hrnet_w18_small"}), None, 4),
        (Named("timm", {"model": "hrnet_w18_small"}), Named("hrnet"), 1),
    ],
)
def test_the_backbone_of_every_hand_off_file(tmp_path: Path, named: Named, head: Named | None, channels: int) -> None:
    input = InputConfig(height=64, width=32, color="bgr")
    file = tmp_path / "model.safetensors"
    state = export(file, ModelConfig(named, head, skeleton="coco17", input=input), input)
    backbone, found = load_backbone(file)
    assert found == input
    assert not backbone.training
    assert len(backbone.channels) == channels
    own = backbone.state_dict()
    assert {f"backbone.{name}" for name in own} == {name for name in state if name.startswith("backbone.")}
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in own.items())
    maps = backbone(torch.zeros(1, 3, 64, 64))
    assert maps[-1].shape[1] == backbone.channels[-1]


def test_the_backbone_under_a_classifier(tmp_path: Path) -> None:
    """As `python -m pretrain linear` hands off."""
    file = tmp_path / "model.safetensors"
    state = export(file, ModelConfig(SMALL, input=INPUT), INPUT)
    described = {**read_export(file)[1], "head": {"name": "linear", "kwargs": {"classes": 2}}}
    write_export(file, {**state, "head.weight": torch.zeros(2, 3), "head.bias": torch.zeros(2)}, described)
    backbone, _ = load_backbone(file)
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in backbone.state_dict().items())


def test_other_files_are_user_errors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    config = ModelConfig(SMALL, input=INPUT)
    export(file, config, INPUT)
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth: not a hand-off file"):
        load_backbone(tmp_path / "weights.pth")
    with pytest.raises(UserError, match="no such file"):
        load_backbone(tmp_path / "absent")
    described = {"stage": "a test", "backbone": to_plain(config)["backbone"], "head": None, "skeleton": None}
    described["input"] = {"heigth": 3}
    write_export(file, {}, described)
    with pytest.raises(UserError, match=r"model\.safetensors: the metadata 'poserelay' lacks or misnames .*heigth"):
        load_backbone(file)
    described["input"] = to_plain(INPUT)
    write_export(file, {"backbone.conv1.weight": torch.zeros(1)}, described)
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit this model: missing"):
        load_backbone(file)
    described["backbone"] = {"name": "resnet51", "kwargs": {}}
    write_export(file, {}, described)
    with pytest.raises(UserError, match=r"model\.safetensors: .*resnet51"):
        load_backbone(file)
