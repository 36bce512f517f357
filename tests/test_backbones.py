"""Backbones: the maps and the names of the networks that published weights belong to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from poserelay.backbones import BACKBONES
from poserelay.backbones.features import fetch
from poserelay.backbones.hrnet import drop_unused_fuse, is_hrnet
from poserelay.checkpoint import UNUSED_FUSE_ROWS
from poserelay.errors import UserError

NAMES = [name for name in BACKBONES if name != "timm"]


def on_meta(name: str, **kwargs: Any):
    with torch.device("meta"):
        return BACKBONES[name](**kwargs)


def randomise(network: nn.Module) -> nn.Module:
    """Statistics and offsets away from 0 and 1, so that a misplaced batch norm shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("name", NAMES)
def test_maps_have_the_declared_channels_and_strides(name: str) -> None:
    backbone = on_meta(name)
    maps = backbone(torch.zeros(2, 3, 96, 160, device="meta"))
    assert backbone.strides == [4, 8, 16, 32]
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, 96 // stride, 160 // stride)
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_resnets_are_torchvisions_by_name_and_value(name: str) -> None:
    torch.manual_seed(0)
    peer = randomise(getattr(torchvision.models, name)())
    backbone = BACKBONES[name]().eval()
    state = {key: value for key, value in peer.state_dict().items() if not key.startswith("fc.")}
    assert list(backbone.state_dict()) == list(state)
    backbone.load_state_dict(state)
    images = torch.randn(1, 3, 64, 96)
    expected = create_feature_extractor(peer, [f"layer{i}" for i in range(1, 5)])(images)
    for found, map_ in zip(backbone(images), expected.values(), strict=True):
        torch.testing.assert_close(found, map_)


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101", "resnet152"])
def test_the_other_resnets_have_torchvisions_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        peer = getattr(torchvision.models, name)().state_dict()
    shapes = {key: value.shape for key, value in peer.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in on_meta(name).state_dict().items()} == shapes


def test_shufflenet_ends_where_torchvisions_classifier_begins() -> None:
    torch.manual_seed(0)
    peer = randomise(torchvision.models.shufflenet_v2_x1_5())
    backbone = BACKBONES["shufflenet_v2_x1_5"]().eval()
    backbone.load_state_dict({key: value for key, value in peer.state_dict().items() if not key.startswith("fc.")})
    images = torch.randn(2, 3, 64, 64)
    maps = backbone(images)
    torch.testing.assert_close(peer.fc(maps[-1].mean((2, 3))), peer(images))
    expected = create_feature_extractor(peer, ["maxpool", "stage2", "stage3"])(images)
    for found, map_ in zip(maps[:3], expected.values(), strict=True):
        torch.testing.assert_close(found, map_)


def test_mobilenet_ends_where_timms_classifier_begins() -> None:
    torch.manual_seed(0)
    peer = randomise(timm.create_model("mobilenetv2_100"))
    backbone = BACKBONES["mobilenetv2_100"]().eval()
    state = {key: value for key, value in peer.state_dict().items() if not key.startswith("classifier.")}
    assert list(backbone.state_dict()) == list(state)
    backbone.load_state_dict(state)
    images = torch.randn(1, 3, 64, 64)
    last, levels = peer.forward_intermediates(images, indices=[1, 2, 3])
    for found, map_ in zip(backbone(images), [*levels, last], strict=True):
        torch.testing.assert_close(found, map_)


def test_hrnet_has_the_official_names() -> None:
    names = set(on_meta("hrnet_w32").state_dict())
    # Written out of the authors' pose_hrnet.py, one of every kind.
    official = {
        "conv1.weight",
        "bn2.running_mean",
        "layer1.0.downsample.0.weight",
        "layer1.3.conv3.weight",
        "transition1.0.0.weight",
        "transition1.1.0.0.weight",
        "transition2.2.0.1.bias",
        "transition3.3.0.0.weight",
        "stage2.0.branches.1.3.conv2.weight",
        "stage3.3.fuse_layers.2.0.0.0.weight",
        "stage3.3.fuse_layers.2.0.1.1.running_var",
        "stage4.2.branches.3.3.bn2.weight",
        "stage4.2.fuse_layers.0.3.0.weight",
    }
    assert official <= names
    assert not any(
        name.startswith(("incre_modules", "downsamp_modules", "final_layer", "classifier")) for name in names
    )


def test_dropping_the_unused_fuse_rows_keeps_the_top_branch() -> None:
    torch.manual_seed(0)
    backbone = BACKBONES["timm"](model="hrnet_w18_small").eval()
    assert is_hrnet(backbone)
    images = torch.randn(1, 3, 64, 64)
    full, names = backbone(images), set(backbone.state_dict())
    drop_unused_fuse(backbone)
    (top,) = backbone(images)
    assert torch.equal(top, full[0])
    assert (backbone.channels, backbone.strides) == ([16], [4])
    dropped = names - set(backbone.state_dict())
    assert len(dropped) > 0
    assert all(".fuse_layers." in name and name.startswith("stage4.") for name in dropped)


@pytest.mark.parametrize("name", ["hrnet_w32", "hrnet_w48"])
def test_the_dropped_rows_are_those_that_a_hand_off_may_leave_out(name: str) -> None:
    backbone = on_meta(name)
    names = set(backbone.state_dict())
    drop_unused_fuse(backbone)
    assert names - set(backbone.state_dict()) == {key for key in names if UNUSED_FUSE_ROWS.match(key)} != set()


def test_only_an_hrnet_has_rows_to_drop() -> None:
    with pytest.raises(UserError, match="HRNet"):
        drop_unused_fuse(on_meta("resnet18"))


@pytest.mark.parametrize(("name", "stride"), [("resnet50", 16), ("resnext50_32x4d", 8), ("mobilenetv2_100", 16)])
def test_output_stride_dilates_without_new_weights(name: str, stride: int) -> None:
    plain, dilated = on_meta(name), on_meta(name, output_stride=stride)
    assert dilated.strides == [min(s, stride) for s in (4, 8, 16, 32)]
    assert dilated(torch.zeros(1, 3, 64, 64, device="meta"))[-1].shape[-1] == 64 // stride
    assert {k: v.shape for k, v in dilated.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.parametrize("zero", [False, True])
def test_zero_init_residual_starts_every_block_as_the_identity(zero: bool) -> None:
    state = BACKBONES["resnet18"](zero_init_residual=zero).state_dict()
    scales = [state[f"layer{stage}.{block}.bn2.weight"] for stage in range(1, 5) for block in range(2)]
    assert all((scale == (0 if zero else 1)).all() for scale in scales)


def test_names_survive_nesting_copying_and_loading() -> None:
    torch.manual_seed(0)
    whole = nn.ModuleDict({"backbone": BACKBONES["resnet18"]()})
    state = {key: torch.randn_like(value.float()).to(value.dtype) for key, value in whole.state_dict().items()}
    assert "backbone.layer4.1.bn2.running_var" in state
    twin = copy.deepcopy(whole)
    twin.load_state_dict(state)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, state[key])
    assert not torch.equal(whole.state_dict()["backbone.conv1.weight"], state["backbone.conv1.weight"])
    state["backbone.surplus"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="surplus"):
        twin.load_state_dict(state)
    del state["backbone.surplus"], state["backbone.bn1.weight"]
    with pytest.raises(RuntimeError, match=r"bn1\.weight"):
        twin.load_state_dict(state)


def test_any_four_level_model_of_timm_serves() -> None:
    convnext = on_meta("timm", model="convnext_atto")
    assert convnext.channels == [40, 80, 160, 320]
    assert convnext.strides == [4, 8, 16, 32]
    assert len(convnext(torch.zeros(1, 3, 64, 64, device="meta"))) == 4


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("resnet5O", "did you mean 'resnet50'"),
        ("vit_tiny_patch16_224", "0 of them|3 of them"),
        ("swin_tiny_patch4_window7_224", "channels-last"),
        ("hf-hub:someone/something", "no model"),
    ],
)
def test_a_model_of_timm_that_does_not_serve_is_explained(model: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        BACKBONES["timm"](model=model)


def test_weights_that_cannot_be_fetched_are_the_users_to_fetch() -> None:
    def offline() -> nn.Module:
        raise ConnectionError("no route to host")

    with pytest.raises(UserError, match=r"resnet18.*no route to host.*pretrained to false"):
        fetch("resnet18", offline)
