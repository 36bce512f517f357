"""Costs of models against the tables that print them."""

from __future__ import annotations

import json

import pytest
import torchvision

from poserelay.config import InputConfig, InspectConfig, ModelConfig, Named
from poserelay.errors import UserError
from poserelay.inspection import format_inspection, inspect_model, main


def pose(backbone: str, head: str, skeleton: str = "coco17", **kwargs: object) -> ModelConfig:
    return ModelConfig(Named(backbone, kwargs), Named(head), skeleton=skeleton)


@pytest.mark.parametrize(
    ("backbone", "head", "printed"),
    [
        ("resnet50", "simple", 8.9),
        ("resnet101", "simple", 12.4),
        ("resnet152", "simple", 15.7),
        ("hrnet_w32", "hrnet", 7.1),
        ("hrnet_w48", "hrnet", 14.6),
    ],
)
def test_macs_are_as_hrnets_table_prints_them(backbone: str, head: str, printed: float) -> None:
    # Their code divides by 1024^3; the table rounds some rows and cuts others.
    figures = inspect_model(pose(backbone, head))
    assert figures["macs_deconv_at_output"] / 2**30 == pytest.approx(printed, abs=0.1)
    assert figures["output"] == [17, 64, 48]
    assert figures["joints"] == "coco17"


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_a_backbone_costs_what_torchvision_publishes(name: str) -> None:
    figures = inspect_model(ModelConfig(Named(name), input=InputConfig(height=224, width=224)))
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
    width = figures["output"][0]
    assert figures["output"][1:] == [7, 7]
    assert figures["parameters_inference"] == published["num_params"] - (1000 * width + 1000)
    assert (figures["macs"] + 1000 * width) / 1e9 == pytest.approx(published["_ops"], abs=5e-4)


def test_a_deconvolution_spreads_each_input_pixel_and_is_printed_per_output_pixel() -> None:
    model, backbone = inspect_model(pose("resnet18", "simple")), inspect_model(ModelConfig(Named("resnet18")))
    kernels = [512 * 256 * 16, 256 * 256 * 16, 256 * 256 * 16]
    inputs = [8 * 6, 16 * 12, 32 * 24]
    final = 256 * 17 * 64 * 48
    spread = sum(kernel * pixels for kernel, pixels in zip(kernels, inputs, strict=True))
    assert model["macs"] == backbone["macs"] + spread + final
    assert model["macs_deconv_at_output"] == backbone["macs"] + 4 * spread + final


def test_pretrained_weights_are_not_downloaded_for_a_figure() -> None:
    assert inspect_model(pose("resnet18", "simple", pretrained=True)) == inspect_model(pose("resnet18", "simple"))


def test_joints_left_to_the_data_are_assumed_and_said_so() -> None:
    assumed, named = inspect_model(pose("resnet18", "simple", "auto")), inspect_model(pose("resnet18", "simple"))
    assert assumed["joints"] == "coco17 (assumed)"
    assert "assumed" in format_inspection(assumed)
    assert {**assumed, "joints": "coco17"} == named


def test_the_text_and_the_json_hold_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    config = pose("resnet50", "simple", "lsp14")
    main(InspectConfig(config, json=True))
    assert json.loads(capsys.readouterr().out) == inspect_model(config)
    main(InspectConfig(config))
    text = capsys.readouterr().out
    for part in ("34.00 M in training", "5.42 G", "8.99 x 2^30", "14 x 64 x 48", "lsp14"):
        assert part in text


def test_a_wrong_name_is_a_user_error() -> None:
    with pytest.raises(UserError, match="resnet51"):
        inspect_model(pose("resnet51", "simple"))
