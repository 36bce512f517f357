"""Costs of models against the tables that print them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torchvision

from poserelay.__main__ import main as run_poserelay
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


def ccm(backbone: str, size: tuple[int, int] = (256, 192), *, dilated: bool = False, **kwargs: object) -> ModelConfig:
    own: dict[str, object] = {"output_stride": 16} if dilated else {}
    return ModelConfig(Named(backbone, own), Named("ccm", kwargs), skeleton="coco17", input=InputConfig(*size))


@pytest.mark.parametrize(
    ("config", "counted", "printed", "output"),
    [
        (ccm("resnet50", dilated=True), "training", 40.7, [17, 128, 96]),
        (ccm("resnext50_32x4d", dilated=True), "training", 40.1, [17, 128, 96]),
        (ccm("resnet152", (384, 288), channels=[128, 96, 64]), "training", 63.5, [17, 96, 72]),
        (ccm("hrnet_w32", channels=[32]), "inference", 28.6, [17, 128, 96]),
        (ccm("hrnet_w32", channels=[32, 32], upsampling_mixers=1), "inference", 28.58, [17, 128, 96]),
        (ccm("hrnet_w32", channels=[32, 32, 32], upsampling_mixers=1), "inference", 28.6, [17, 128, 96]),
        (ccm("hrnet_w48", (384, 288), channels=[48]), "inference", 63.7, [17, 192, 144]),
        # Printed as 10.1, which 10.131 rounds to: 0.31 % apart.
        (ccm("mobilenetv2_100"), "inference", 10.13, [17, 64, 48]),
        (ccm("shufflenet_v2_x1_5"), "inference", 9.72, [17, 64, 48]),
    ],
)
def test_ccm_has_the_parameters_of_its_tables(
    config: ModelConfig, counted: str, printed: float, output: list[int]
) -> None:
    figures = inspect_model(config)
    assert figures[f"parameters_{counted}"] / 1e6 == pytest.approx(printed, rel=0.003)
    assert figures["output"] == output


@pytest.mark.parametrize(
    ("backbone", "width", "printed", "gflops"),
    [
        ("hrnet_w32", 32, 27e3, 7.92),
        pytest.param("hrnet_w48", 48, 61e3, 36.6, marks=pytest.mark.slow),
    ],
)
def test_what_ccm_adds_to_hrnet(backbone: str, width: int, printed: float, gflops: float) -> None:
    size = (256, 192) if width == 32 else (384, 288)
    figures = inspect_model(ccm(backbone, size, channels=[width]))
    plain = inspect_model(pose(backbone, "hrnet"))
    assert figures["parameters_inference"] - plain["parameters_inference"] == pytest.approx(printed, rel=0.02)
    assert figures["macs_deconv_at_output"] / 1e9 == pytest.approx(gflops, rel=0.01)


def test_the_rows_of_ccms_ablation_are_apart() -> None:
    """Table 2: with neither branch CCM is SimpleBaseline, parameter by parameter."""
    off = {"se": False, "hdc": False, "auxiliary": False}
    plain = inspect_model(pose("resnet50", "simple"))
    assert inspect_model(ccm("resnet50", **off)) == plain
    grown = [inspect_model(ccm("resnet50", **{**off, name: True})) for name in off]
    assert len({figures["parameters_training"] for figures in [plain, *grown]}) == 4
    assert grown[2]["parameters_inference"] == plain["parameters_inference"]
    assert inspect_model(ccm("resnet50", dilated=True, **off))["output"] == [17, 128, 96]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_a_backbone_costs_what_torchvision_publishes(name: str) -> None:
    figures = inspect_model(ModelConfig(Named(name), input=InputConfig(height=224, width=224)))
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
    width = figures["output"][0]
    assert figures["output"][1:] == [7, 7]
    assert figures["parameters_inference"] == published["num_params"] - (1000 * width + 1000)
    assert (figures["macs"] + 1000 * width) / 1e9 == pytest.approx(published["_ops"], abs=5e-4)


def dekr_head(channels: int, width: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates per pixel of the head of CIR's parent, for 17 joints, layer by layer."""
    block = 15 * 15 * 9 + 15 * 4 * 9 + 15 * 2 * 9  # of one joint: features, and where they are read
    weights = channels * width + 2 * width * width * 9 + width * 18 + channels * 17 * 15 + 17 * (2 * block + 15 * 2)
    norms_and_biases = 3 * 2 * width + 18 + 2 * 17 * 15 + 17 * (2 * (4 + 2 + 2 * 15) + 2)
    return weights + norms_and_biases, weights


def single_stage(backbone: str, side: int, **kwargs: object) -> ModelConfig:
    return ModelConfig(Named(backbone), Named("cir", kwargs), skeleton="coco17", input=InputConfig(side, side))


@pytest.mark.parametrize(
    ("backbone", "side", "channels", "parameters", "gflops", "parent"),
    [
        ("hrnet_w32", 512, [32, 64, 128, 256], 29.7, 46.4, (32, 29.6, 45.4)),
        ("hrnet_w48", 640, [48, 96, 192, 384], 65.8, 143.4, (48, 65.7, 141.5)),
    ],
)
def test_cir_costs_what_its_table_prints(
    backbone: str, side: int, channels: list[int], parameters: float, gflops: float, parent: tuple[int, float, float]
) -> None:
    """The parent's row, with its head counted by hand, says what "GFLOPs" are: multiply-accumulates over 10^9."""
    figures = inspect_model(single_stage(backbone, side))
    assert figures["output"] == [1, side // 4, side // 4]
    assert figures["parameters_inference"] == figures["parameters_training"]
    assert figures["parameters_training"] / 1e6 == pytest.approx(parameters, rel=0.003)
    joints, pixels = 17, (side // 4) ** 2
    pose = joints * 15 * (2 * 9 + 2)
    branches = 256 * joints * 15 + joints * 15 * 2 + 256 * 32 + joints * 32 * 32 * 9 + 32
    concatenated = sum(channels) * 256
    before = sum(width * 256 * pixels // 4**level for level, width in enumerate(channels))
    norms_and_biases = 2 * (256 + joints * 15 + 32 + 32) + joints * (2 + 18 + 2) + 1
    head = concatenated + branches + pose + norms_and_biases
    assert figures["macs_pose"] == pose
    of_backbone = figures["macs"] - before - branches * pixels
    assert figures["macs_concatenated"] == of_backbone + (concatenated + branches + pose) * pixels
    assert figures["macs_concatenated"] / 1e9 == pytest.approx(gflops, rel=0.016)
    width, its_parameters, its_gflops = parent
    its_head, per_pixel = dekr_head(sum(channels), width)
    assert (head - its_head) / 1e6 == pytest.approx(0.1, abs=0.05)
    assert (figures["parameters_training"] - head + its_head) / 1e6 == pytest.approx(its_parameters, abs=0.05)
    assert (of_backbone + per_pixel * pixels) / 1e9 == pytest.approx(its_gflops, abs=0.05)


def test_displacements_count_where_the_maps_need_them() -> None:
    plain, keypoint = (inspect_model(single_stage("resnet18", 64, pose_query=query)) for query in ("query", "keypoint"))
    assert keypoint["macs"] - plain["macs"] == 16 * 16 * plain["macs_pose"]
    assert keypoint["macs_concatenated"] == plain["macs_concatenated"]
    text = format_inspection(plain)
    assert "0.0051 M per pose" in text
    assert "1 x 16 x 16, joints of coco17" in text
    assert "deconvolutions" not in text


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


def test_what_scio_adds_is_as_counted_by_hand() -> None:
    head = Named("simple", {"deconv_channels": [8, 8]})
    plain = ModelConfig(Named("resnet18"), head, skeleton="crowdpose14", input=InputConfig(64, 96))
    refiner = Named("scio", {"feature_channels": 2, "width": 3, "dilations": [1, 2]})
    figures, without = inspect_model(replace(plain, refiner=refiner)), inspect_model(plain)
    groups, width, reduced, pixels = 4, 3, 2, 8 * 12
    # Per group: f of 8 channels to 2; f and the three heatmaps to 3; 3 to 3; 3 to the heatmap.
    reduce, of_features, of_heatmap, inner, last = 8 * reduced, reduced * width * 9, width * 9, width * width * 9, width
    weights = reduce + of_features + 3 * of_heatmap + inner + last
    parameters = 2 * groups * (weights + reduced + 2 * 2 * width + 1)  # both sides; biases of f and last, batch norms
    step = groups * pixels * (of_heatmap + inner + last)
    once = groups * pixels * (reduce + of_features + 2 * of_heatmap)
    assert {name: value for name, value in figures.items() if name not in without} == {
        "parameters_refiner": parameters,
        "macs_prediction": groups * pixels * weights,
        "macs_step": step,
        "steps": 50,
        "macs_search": once + (1 + 50 + 1) * step,
    }
    grown = {name: without[name] + parameters for name in ("parameters_training", "parameters_inference")}
    assert {name: figures[name] for name in without} == {**without, **grown}
    text = format_inspection({**figures, "macs_search": 1_234_000_000})
    assert "1.234 G to search in 50 steps" in text
    assert "SCIO" not in format_inspection(without)


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


def test_a_model_without_a_backbone_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_poserelay(["inspect", "--data", "x.json", "--model", "{}"]) == 2
    assert capsys.readouterr().err == "error: field 'model.backbone.name' is missing; give it, or leave 'model' out\n"
