"""Other people's weights: every layout, built from a real network under the names that each project writes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

from poserelay.__main__ import main
from poserelay.checkpoint import init_from, read_export
from poserelay.config import ExportConfig, ImportConfig, InputConfig, ModelConfig, Named
from poserelay.errors import UserError
from poserelay.importers import convert, read_weights
from poserelay.layouts import LAYOUTS, deduce_backbone, recognise
from poserelay.model import build_backbone, build_model, load_model, normalise

State = dict[str, Tensor]
DATA = Path(os.environ.get("POSERELAY_DATA", "nowhere"))


def randomised(network: nn.Module) -> nn.Module:
    """Statistics away from 0 and 1, counters away from 0, so that nothing is right by chance."""
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(hash_of(name))
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
        else:
            nn.init.normal_(buffer, std=0.1)
    return network.eval()


def hash_of(name: str) -> int:
    return sum(map(ord, name))


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return randomised(torchvision.models.resnet18())


@pytest.fixture(scope="module")
def features(resnet18: nn.Module) -> State:
    return {name: value for name, value in resnet18.state_dict().items() if not name.startswith("fc.")}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def noise(*names: str) -> State:
    return {name: torch.randn(3) for name in names}


def sequential(prefix: str, state: State) -> State:
    """Names of nn.Sequential(*list(resnet.children())[:-1])."""
    children = [name for name, _ in torchvision.models.resnet18().named_children()]
    return {
        f"{prefix}{children.index(name.split('.')[0])}.{name.partition('.')[2]}": value for name, value in state.items()
    }


def saved_as(layout: str, features: State) -> dict[str, Any]:
    """What the file of a project holds."""
    other = {name: value + 1 for name, value in features.items() if name.startswith("layer1.")}
    files: dict[str, dict[str, Any]] = {
        "simsiam": {
            "epoch": 100,
            "arch": "resnet18",
            "state_dict": under(
                "module.",
                under("encoder.", features) | noise("encoder.fc.0.weight", "encoder.fc.6.bias", "predictor.3.weight"),
            ),
            "optimizer": {"state": {}, "param_groups": []},
        },
        "moco": {
            "state_dict": under(
                "module.",
                under("encoder_q.", features)
                | under("encoder_k.", other)
                | noise("encoder_q.fc.0.weight", "encoder_k.fc.2.bias", "queue", "queue_ptr"),
            ),
        },
        "densecl": {"state_dict": features, "author": "DenseCL"},
        "mmselfsup": {
            "meta": {"time": "then"},
            "state_dict": under("backbone.", features)
            | under("encoder.0.", features)
            | noise("encoder.1.fc0.weight", "neck.fc0.weight", "head.predictor.fc0.weight"),
        },
        "mmpretrain": {
            "meta": {"mmengine_version": "0.8"},
            "state_dict": under("backbone.", features)
            | under("encoder_k.module.0.", other)
            | noise("neck.fc.weight", "head.fc.weight", "queue", "queue_ptr", "encoder_k.steps"),
        },
        "solo": {
            "pytorch-lightning_version": "2.0",
            "state_dict": under("backbone.", features)
            | under("momentum_backbone.", other)
            | noise("classifier.weight", "projector.0.weight", "predictor.0.bias", "queue"),
        },
        "lightly": {
            "pytorch-lightning_version": "2.0",
            "state_dict": under("backbone.", features)
            | under("backbone_momentum.", other)
            | noise("projection_head.layers.0.weight", "prediction_head.layers.0.bias", "criterion.memory_bank.bank"),
        },
        "torchvision": dict(features) | noise("fc.weight", "fc.bias"),
        "timm": dict(features) | noise("fc.weight", "fc.bias"),
    }
    return files[layout]


BACKBONES = [layout for layout in LAYOUTS if not layout.startswith("pose_") and layout != "mmpose"]


@pytest.fixture
def foreign() -> Iterator[types.ModuleType]:
    """A module that is there while a file is written and gone when it is read."""
    module = types.ModuleType("foreign_project")
    exec("class Config:\n    def __setstate__(self, state): raise SystemExit(9)", module.__dict__)
    sys.modules["foreign_project"] = module
    yield module
    sys.modules.pop("foreign_project", None)


def do(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def test_the_config_offers_exactly_the_layouts() -> None:
    assert set(get_args(get_type_hints(ImportConfig)["layout"])) == {"auto", *LAYOUTS}


@pytest.mark.parametrize("layout", BACKBONES)
def test_a_backbone_of_every_layout_comes_out_bit_by_bit(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    foreign: types.ModuleType,
    features: State,
    layout: str,
) -> None:
    saved = saved_as(layout, features)
    if "state_dict" in saved:
        config = foreign.Config()
        config.args = argparse.Namespace(lr=np.float64(0.1))
        saved["hyper_parameters"] = config
    source, out = tmp_path / "theirs.ckpt", tmp_path / "ours.safetensors"
    torch.save(saved, source)
    del sys.modules["foreign_project"]
    do("import-weights", "--weights", source, "--out", out)
    assert "foreign_project" not in sys.modules
    # timm's names of a ResNet are torchvision's.
    taken = "torchvision" if layout == "timm" else layout
    assert f"layout       {taken} (recognised by its keys)" in capsys.readouterr().out
    state, described = read_export(out)
    same(state, under("backbone.", features))
    assert described["stage"] == "import"
    assert described["method"] == taken
    assert described["backbone"] == {"name": "resnet18", "kwargs": {}}
    assert described["head"] is described["skeleton"] is described["upstream"] is None
    assert described["input"] == {
        "height": 224,
        "width": 224,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "color": "rgb",
        "alignment": "hrnet",
    }
    assert set(described["config"]) == {"layout", "source_sha256"}
    assert str(tmp_path) not in json.dumps(described)
    theirs = saved.get("state_dict", saved)
    told = convert(
        {name.removeprefix("module."): value for name, value in theirs.items()}, source, config_of(layout=layout)
    )
    assert told.layout == layout
    same(told.tensors, state)


def test_the_imported_network_computes_what_the_original_does(
    tmp_path: Path, resnet18: nn.Module, features: State
) -> None:
    torch.save(saved_as("simsiam", features), tmp_path / "a.pth")
    do("import-weights", "--weights", tmp_path / "a.pth", "--out", tmp_path / "a.safetensors")
    state, described = read_export(tmp_path / "a.safetensors")
    backbone = build_backbone(Named(**described["backbone"])).eval()
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in state.items()})
    images = torch.randn(1, 3, 64, 96)
    expected = create_feature_extractor(resnet18, [f"layer{i}" for i in range(1, 5)])(images)
    for found, map_ in zip(backbone(images), expected.values(), strict=True):
        torch.testing.assert_close(found, map_)


def test_a_stage_starts_from_an_imported_backbone(tmp_path: Path, features: State) -> None:
    torch.save(saved_as("moco", features), tmp_path / "a.pth")
    do("import-weights", "--weights", tmp_path / "a.pth", "--out", tmp_path / "a.safetensors")
    small = Named("simple", {"deconv_channels": [8]})
    model = build_model(ModelConfig(Named("resnet18"), small, None, "lsp14", InputConfig(64, 64)))
    report = init_from(model, tmp_path / "a.safetensors")
    assert (report.stage, report.head_copied) == ("import", False)
    same(model.backbone.state_dict(), features)


def config_of(**changes: Any) -> ImportConfig:
    return ImportConfig("a.pth", "a.safetensors", **changes)


def backbone_of(state: State, **changes: Any) -> State:
    tensors = convert(state, Path("a.pth"), config_of(**changes)).tensors
    return {name.removeprefix("backbone."): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("layout", "others"),
    [
        # DenseCL and mmselfsup's MoCo before extraction, BYOL, SimCLR.
        ("mmselfsup", lambda s: under("backbone.", s) | under("encoder_q.0.", s) | noise("encoder_q.1.a", "queue2")),
        ("mmselfsup", lambda s: under("backbone.", s) | under("online_net.0.", s) | noise("target_net.1.fc", "head.a")),
        ("mmpretrain", lambda s: under("backbone.", s) | noise("neck.fc0.weight")),
        ("solo", lambda s: under("encoder.", s) | noise("classifier.bias", "momentum_encoder.conv1.weight")),
        ("lightly", lambda s: sequential("backbone.", s) | noise("projection_head.layers.0.weight")),
        ("lightly", lambda s: under("backbone._orig_mod.", s) | noise("online_classifier.linear.weight")),
        ("torchvision", lambda s: under("_orig_mod.module.", s)),
        ("torchvision", lambda s: under("module._orig_mod.", s)),
    ],
)  # fmt: skip
def test_variants_of_a_layout(features: State, layout: str, others: Any) -> None:
    state, marks = read_state(others(features))
    found = convert(state, Path("a.pth"), config_of(), marks)
    assert found.layout == layout
    same(found.tensors, under("backbone.", features))


def read_state(state: State) -> tuple[dict[str, Any], frozenset[str]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder, "a.pth"))
        return read_weights(Path(folder, "a.pth"))


with torch.device("meta"):
    KEYS = {
        name: (value.shape, value.dtype)
        for name, value in torchvision.models.resnet18().state_dict().items()
        if not name.startswith("fc.")
    }


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_every_corruption_is_named(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(BACKBONES))
    features = {name: torch.zeros((), dtype=dtype).expand(shape) for name, (shape, dtype) in KEYS.items()}
    saved = saved_as(layout, features)
    state = {key.removeprefix("module."): value for key, value in saved.get("state_dict", saved).items()}
    prefix = {"simsiam": "encoder.", "moco": "encoder_q."}.get(layout, "backbone.")
    prefix = "" if layout in ("densecl", "torchvision", "timm") else prefix
    name = data.draw(st.sampled_from(list(features)))
    kind = data.draw(st.sampled_from(["missing", "extra", "misshapen", "mistyped", "no tensor"]))
    if kind == "missing":
        state = {key: value for key, value in state.items() if key not in (prefix + name, f"encoder.0.{name}")}
        expected = f"missing backbone.{name}"
    elif kind == "extra":
        state[prefix + name + "_2"] = torch.zeros(1)
        expected = f"unexpected {prefix}{name}_2"
    elif kind == "misshapen":
        state[prefix + name] = torch.zeros(5, 7)
        expected = rf"{prefix}{name} is [5, 7], expected {list(features[name].shape)}"
    elif kind == "mistyped":
        wrong = torch.int64 if features[name].is_floating_point() else torch.float32
        state[prefix + name] = features[name].to(wrong)
        expected = f"{prefix}{name} is {str(wrong)[6:]}, expected"
    else:
        state[prefix + name] = None
        expected = f"{prefix}{name} is no tensor"
    with pytest.raises(UserError) as caught:
        convert(state, Path("a.pth"), config_of(layout=layout))
    assert expected in str(caught.value)


def test_duplicates_must_be_equal(features: State) -> None:
    state = saved_as("mmselfsup", features)["state_dict"]
    state["encoder.0.layer1.0.conv1.weight"] = state["encoder.0.layer1.0.conv1.weight"] + 1e-3
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight differs from \w+\.(0\.)?layer1\.0\.conv1\.weight"):
        convert(state, Path("a.pth"), config_of())


def test_files_without_counters_get_zeros_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], features: State
) -> None:
    old = {name: value for name, value in features.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    do("import-weights", "--weights", tmp_path / "a.pth", "--out", tmp_path / "a.safetensors")
    assert "20 num_batches_tracked" in capsys.readouterr().out
    state, _ = read_export(tmp_path / "a.safetensors")
    zeros = {name: torch.tensor(0) for name in features if name.endswith("num_batches_tracked")}
    same(state, under("backbone.", old | zeros))


def test_half_precision_stays_and_loads(features: State) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in features.items()}
    found = backbone_of(half)
    same(found, half)
    backbone = build_backbone(Named("resnet18"))
    backbone.load_state_dict(found)
    assert torch.equal(backbone.state_dict()["conv1.weight"], half["conv1.weight"].float())


def test_what_may_not_be_left_out_is_an_error(features: State) -> None:
    for layout, extra in [
        ("simsiam", "encoder_k.conv1.weight"),
        ("moco", "predictor.0.weight"),
        ("densecl", "fc.weight"),
    ]:
        state = saved_as(layout, features)["state_dict"]
        state = {key.removeprefix("module."): value for key, value in state.items()} | noise(extra)
        with pytest.raises(UserError, match=f"unexpected {extra}"):
            convert(state, Path("a.pth"), config_of(layout=layout))
    with pytest.raises(UserError, match="no key fits the layout moco"):
        convert(features, Path("a.pth"), config_of(layout="moco", backbone="resnet18"))


def test_layouts_that_cannot_be_told_are_listed(features: State) -> None:
    with pytest.raises(UserError, match=r"no layout known here.*backbone\. \(120\).*--layout: simsiam, moco"):
        convert(under("backbone.", features), Path("a.pth"), config_of())
    same(backbone_of(under("backbone.", features), layout="solo"), features)
    both = under("backbone.", features) | noise("classifier.weight", "head.final_layer.weight")
    with pytest.raises(UserError, match=r"fits several layouts \(solo, mmpose\)"):
        convert(both, Path("a.pth"), config_of())


@pytest.mark.parametrize(
    "name",
    ["resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "shufflenet_v2_x1_5"],
)
def test_torchvisions_networks_are_told_apart(name: str) -> None:
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    found = convert(state, Path("a.pth"), config_of())
    assert (found.layout, found.model.backbone.name) == ("torchvision", name)
    assert set(found.tensors) == {f"backbone.{key}" for key in state if not key.startswith("fc.")}


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet50"])
def test_timms_networks_are_told_apart(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    found = convert(state, Path("a.pth"), config_of(layout="timm"))
    assert found.model.backbone == Named(name)
    if name == "mobilenetv2_100":
        assert convert(state, Path("a.pth"), config_of()).layout == "timm"


@pytest.mark.parametrize("name", ["convnext_atto", "hrnet_w18_small", "efficientnet_b0", "regnety_002"])
def test_any_four_level_network_of_timm_comes_in_by_name(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name)
        extractor = timm.create_model(
            name, features_only=True, out_indices=(1, 2, 3, 4) if "conv" not in name else None
        )
    found = convert(theirs.state_dict(), Path("a.pth"), config_of(layout="timm", backbone=name))
    assert found.model.backbone == Named("timm", {"model": name})
    again = convert(found.tensors, Path("a.pth"), config_of(layout="mmpretrain", backbone=name))
    assert set(again.tensors) == set(found.tensors)
    if "conv" in name:
        direct = convert(extractor.state_dict(), Path("a.pth"), config_of(layout="timm", backbone=name))
        assert set(direct.tensors) == set(found.tensors)


def test_a_backbone_that_contradicts_the_file(features: State) -> None:
    with pytest.raises(UserError, match=r"backbone 'resnet50': a\.pth holds a resnet18"):
        convert(features, Path("a.pth"), config_of(backbone="resnet50"))
    with pytest.raises(UserError, match="'resnet19' is not known"):
        convert(features, Path("a.pth"), config_of(backbone="resnet19"))
    with torch.device("meta"):
        wide = torchvision.models.wide_resnet50_2().state_dict()
    with pytest.raises(UserError, match=r"3 \+ 4 \+ 6 \+ 3 bottleneck blocks of width \(128, 128\)"):
        convert(wide, Path("a.pth"), config_of())
    assert deduce_backbone({})[0] is None


@pytest.mark.skipif(not (DATA / "checkpoints").exists(), reason="POSERELAY_DATA names no folder with checkpoints")
def test_a_real_file_of_an_unsupported_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = DATA / "checkpoints/resnet20-12fca82f.th", tmp_path / "a.safetensors"
    error = refused(capsys, "import-weights", "--weights", source, "--out", out)
    assert "unsupported backbone: a ResNet of 3 + 3 + 3 basic blocks" in error
    told = ["--layout", "torchvision", "--backbone", "resnet18"]
    error = refused(capsys, "import-weights", "--weights", source, "--out", out, *told)
    assert "missing backbone.layer2.0.downsample.0.weight" in error
    assert not out.exists()


def test_files_that_are_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], features: State) -> None:
    source, out = tmp_path / "a.pth", tmp_path / "a.safetensors"

    def error() -> str:
        return refused(capsys, "import-weights", "--weights", source, "--out", out)

    assert "no such file" in error()
    torch.save(features, source)
    source.write_bytes(source.read_bytes()[:-1000])
    assert "not a readable PyTorch file" in error()
    torch.save(torchvision.models.resnet18(), source)
    assert "save its state_dict() instead" in error()
    torch.save({"epoch": 3, "state_dict": {}}, source)
    assert "holds no weights, only epoch, state_dict" in error()
    torch.save({1: torch.zeros(2)}, source)
    assert "a key of the state dict is 1" in error()
    save_file(features, source)
    do("import-weights", "--weights", source, "--out", out)
    same(read_export(out)[0], under("backbone.", features))
    content = out.read_bytes()
    assert "is already there" in error()
    assert out.read_bytes() == content
    source.write_bytes(source.read_bytes()[:-1000])
    out.unlink()
    assert "damaged safetensors" in error()
    source.write_bytes(content)
    assert "is a hand-off file already" in error()
    assert "ends in .safetensors" in refused(capsys, "import-weights", "--weights", source, "--out", "a.pth")
    assert "input.height is 0" in refused(
        capsys, "import-weights", "--weights", source, "--out", out, "--input.height", 0
    )


# Pose models


@pytest.fixture(scope="module")
def head() -> nn.Sequential:
    """pose_resnet's deconvolutions and last layer (Xiao et al., section 2), narrow."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for width, channels in ((512, 16), (16, 24), (24, 8)):
        layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    network = nn.Sequential()
    network.add_module("deconv_layers", nn.Sequential(*layers))
    network.add_module("final_layer", nn.Conv2d(8, 17, 1))
    return randomised(network)  # pyright: ignore[reportReturnType]


POSE = {
    "pose_resnet": ("", "", "bgr"),
    "mmpose": ("backbone.", "keypoint_head.", "rgb"),
    "mmpose 1.x": ("backbone.", "head.", "rgb"),
}


@pytest.mark.parametrize("name", POSE)
def test_simple_baselines_come_in_whole(
    tmp_path: Path, resnet18: nn.Module, features: State, head: nn.Sequential, name: str
) -> None:
    backbone_prefix, head_prefix, color = POSE[name]
    state = under(backbone_prefix, features) | under(head_prefix, head.state_dict())
    beside = (
        {"meta": {"CLASSES": np.float32(1)}} if "mmpose" in name else {"best_state_dict": {}, "model": "pose_resnet"}
    )
    wrapped = under("module.", state) if name == "pose_resnet" else state
    torch.save({"state_dict": wrapped, **beside}, tmp_path / "a.pth.tar")
    out = tmp_path / "a.safetensors"
    do("import-weights", "--weights", tmp_path / "a.pth.tar", "--out", out)
    found, described = read_export(out)
    same(found, under("backbone.", features) | under("head.", head.state_dict()))
    assert described["method"] == name.split()[0]
    assert described["head"] == {"name": "simple", "kwargs": {"deconv_channels": [16, 24, 8], "deconv_kernel": 4}}
    model = load_model(out)
    assert (model.skeleton.name, model.input) == ("coco17", InputConfig(color=color))  # pyright: ignore[reportArgumentType]
    trunk = create_feature_extractor(resnet18, ["layer4"])
    pictures = torch.randint(0, 256, (2, 3, 256, 192), dtype=torch.uint8)
    # Their loader: OpenCV's order of channels or its reverse, ToTensor, Normalize with the same three numbers.
    channels = pictures.flip(1) if color == "bgr" else pictures
    images = torch.stack(
        [(channels[:, c] / 255.0 - m) / s for c, (m, s) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)])],
        1,
    )
    with torch.no_grad():
        torch.testing.assert_close(model(normalise(pictures, model.input)), head(trunk(images)["layer4"]))


def test_what_a_pose_file_does_not_say(features: State, head: nn.Sequential) -> None:
    state = dict(features) | head.state_dict()

    def with_joints(count: int) -> State:
        return state | {"final_layer.weight": torch.zeros(count, 8, 1, 1), "final_layer.bias": torch.zeros(count)}

    found = convert(with_joints(16), Path("a.pth"), config_of())
    assert found.skeleton is not None
    assert (found.skeleton.name, found.model.input.height, found.model.input.width) == ("mpii16", 256, 256)
    with pytest.raises(UserError, match="14 joints; say which with --skeleton"):
        convert(with_joints(14), Path("a.pth"), config_of())
    assert len(convert(with_joints(14), Path("a.pth"), config_of(skeleton="lsp14")).tensors) == len(state)
    with pytest.raises(UserError, match=r"coco17: has 17 joints and a\.pth has 14"):
        convert(with_joints(14), Path("a.pth"), config_of(skeleton="coco17"))
    with pytest.raises(UserError, match="hold a backbone without joints"):
        convert(features, Path("a.pth"), config_of(skeleton="coco17"))
    with pytest.raises(UserError, match=r"missing final_layer\.weight"):
        convert(features, Path("a.pth"), config_of(layout="pose_resnet"))
    with pytest.raises(UserError, match=r"kernels \[3, 4\]"):
        convert(state | {"deconv_layers.0.weight": torch.zeros(512, 16, 3, 3)}, Path("a.pth"), config_of())
    with pytest.raises(UserError, match=r"unexpected deconv_layers\.0\.bias"):
        convert(state | {"deconv_layers.0.bias": torch.zeros(16)}, Path("a.pth"), config_of())
    with pytest.raises(UserError, match=r"missing head\.final_layer\.bias"):
        convert({k: v for k, v in state.items() if k != "final_layer.bias"}, Path("a.pth"), config_of())
    assert convert(state, Path("a.pth"), config_of(color="rgb")).model.input.color == "rgb"


def pose_hrnet(width: int, joints: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the authors' pose_hrnet: four branches, and the last fusion to the first one alone."""

    def conv_bn(conv: str, norm: str, out: int, into: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{conv}.weight", (out, into, kernel, kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{norm}.{part}", (out,)
        yield f"{norm}.num_batches_tracked", ()

    yield from conv_bn("conv1", "bn1", 64, 3, 3)
    yield from conv_bn("conv2", "bn2", 64, 64, 3)
    for block in range(4):
        into = 64 if block == 0 else 256
        for index, (out, source, kernel) in enumerate([(64, into, 1), (64, 64, 3), (256, 64, 1)], 1):
            yield from conv_bn(f"layer1.{block}.conv{index}", f"layer1.{block}.bn{index}", out, source, kernel)
    yield from conv_bn("layer1.0.downsample.0", "layer1.0.downsample.1", 256, 64, 1)
    widths = [width * 2**branch for branch in range(4)]
    yield from conv_bn("transition1.0.0", "transition1.0.1", width, 256, 3)
    yield from conv_bn("transition1.1.0.0", "transition1.1.0.1", 2 * width, 256, 3)
    yield from conv_bn("transition2.2.0.0", "transition2.2.0.1", 4 * width, 2 * width, 3)
    yield from conv_bn("transition3.3.0.0", "transition3.3.0.1", 8 * width, 4 * width, 3)
    for stage, modules in ((2, 1), (3, 4), (4, 3)):
        for module in range(modules):
            start = f"stage{stage}.{module}"
            for branch in range(stage):
                for block in range(4):
                    for index in (1, 2):
                        name = f"{start}.branches.{branch}.{block}"
                        yield from conv_bn(
                            f"{name}.conv{index}", f"{name}.bn{index}", widths[branch], widths[branch], 3
                        )
            last = stage == 4 and module == modules - 1
            for row in range(1 if last else stage):
                for column in range(stage):
                    name = f"{start}.fuse_layers.{row}.{column}"
                    if column > row:
                        yield from conv_bn(f"{name}.0", f"{name}.1", widths[row], widths[column], 1)
                    for step in range(row - column):
                        out = widths[row] if step == row - column - 1 else widths[column]
                        yield from conv_bn(f"{name}.{step}.0", f"{name}.{step}.1", out, widths[column], 3)
    yield "final_layer.weight", (joints, width, 1, 1)
    yield "final_layer.bias", (joints,)


@pytest.mark.parametrize("width", [32, 48, 40])
def test_hrnets_are_told_apart(width: int) -> None:
    shapes = dict(pose_hrnet(width, 17))
    name, found = deduce_backbone(shapes)
    assert name == {32: "hrnet_w32", 48: "hrnet_w48"}.get(width)
    assert str(width) in found
    assert recognise(shapes, ()) == ["pose_hrnet"]
    trunk = [name for name in shapes if not name.startswith("final_layer.")]
    assert recognise([*trunk, "incre_modules.0.0.conv1.weight", "final_layer.0.weight", "classifier.bias"], ()) == [
        "timm"
    ]
    assert recognise([f"backbone.{name}" for name in shapes], ()) == []


def test_mmposes_hrnet_has_the_same_names_behind_its_prefixes() -> None:
    state = {name: torch.zeros(()).expand(shape) for name, shape in pose_hrnet(32, 17) if "num_batches" not in name}
    theirs = {("keypoint_head." if name.startswith("final") else "backbone.") + name: v for name, v in state.items()}
    found = convert(theirs, Path("a.pth"), config_of())
    assert (found.layout, found.model.backbone, found.model.head) == ("mmpose", Named("hrnet_w32"), Named("hrnet"))
    assert set(found.tensors) == {
        ("head." if name.startswith("final") else "backbone.") + name for name, _ in pose_hrnet(32, 17)
    }
    del theirs["backbone.stage4.2.fuse_layers.0.3.0.weight"]
    with pytest.raises(UserError, match=r"missing backbone\.stage4\.2\.fuse_layers\.0\.3\.0\.weight"):
        convert(theirs, Path("a.pth"), config_of())


@pytest.mark.slow
def test_hrnet_comes_in_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state: State = {}
    for name, shape in pose_hrnet(32, 17):
        # Of a size that keeps the activations from growing through the network.
        fan = max(1, torch.Size(shape[1:]).numel())
        state[name] = torch.rand(shape) + 0.5 if name.endswith(("running_var",)) else torch.randn(shape) / fan**0.5
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(hash_of(name))
    torch.save(under("module.", state), tmp_path / "a.pth")
    out = tmp_path / "a.safetensors"
    do("import-weights", "--weights", tmp_path / "a.pth", "--out", out, "--input.height", 64, "--input.width", 64)
    found, described = read_export(out)
    final = {name: state[name] for name in ("final_layer.weight", "final_layer.bias")}
    backbone = {name: value for name, value in state.items() if name not in final}
    same(found, under("backbone.", backbone) | under("head.", final))
    assert (described["method"], described["input"]["color"]) == ("pose_hrnet", "rgb")
    # timm's classifier computes the branches from the same names.
    with torch.device("meta"):
        peer: Any = timm.create_model("hrnet_w32")
    peer.stage4[-1].fuse_layers = peer.stage4[-1].fuse_layers[:1]
    missing = peer.load_state_dict(backbone, strict=False, assign=True)
    assert missing.unexpected_keys == []
    assert {name.split(".")[0] for name in missing.missing_keys} == {
        "incre_modules",
        "downsamp_modules",
        "final_layer",
        "classifier",
    }
    images = torch.randn(1, 3, 64, 64)
    peer.eval()
    with torch.no_grad():
        x = F.relu(peer.bn2(peer.conv2(F.relu(peer.bn1(peer.conv1(images))))))
        top = peer.stages(x)[0]
        expected = F.conv2d(top, final["final_layer.weight"], final["final_layer.bias"])
        torch.testing.assert_close(load_model(out)(images), expected)
    # timm's names from the pose model: everything but the rows it never had.
    do("export-weights", "--checkpoint", out, "--layout", "timm", "--out", tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), backbone)


# And out again


def exported(tmp_path: Path, features: State, layout: str, suffix: str) -> Path:
    torch.save(features, tmp_path / "a.pth")
    do("import-weights", "--weights", tmp_path / "a.pth", "--out", tmp_path / "a.safetensors")
    out = tmp_path / f"out{suffix}"
    do("export-weights", "--checkpoint", tmp_path / "a.safetensors", "--layout", layout, "--out", out)
    return out


@pytest.mark.parametrize(("layout", "suffix"), [("torchvision", ".pth"), ("timm", ".safetensors")])
def test_a_round_trip_is_bit_exact_and_loads_elsewhere(
    tmp_path: Path, features: State, layout: str, suffix: str
) -> None:
    out = exported(tmp_path, features, layout, suffix)
    state = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    same(state, features)
    network: Any = torchvision.models.resnet18() if layout == "torchvision" else timm.create_model("resnet18")
    report = network.load_state_dict(state, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    extractor = timm.create_model("resnet18", features_only=True)
    extractor.load_state_dict(state)
    do("import-weights", "--weights", out, "--out", tmp_path / "again.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size == (tmp_path / "again.safetensors").stat().st_size
    same(read_export(tmp_path / "again.safetensors")[0], read_export(tmp_path / "a.safetensors")[0])


@pytest.mark.parametrize(
    ("backbone", "model", "missing"),
    [
        (Named("mobilenetv2_100"), "mobilenetv2_100", {"classifier"}),
        (Named("timm", {"model": "convnext_atto"}), "convnext_atto", {"head"}),
        (
            Named("timm", {"model": "hrnet_w18_small"}),
            "hrnet_w18_small",
            {"incre_modules", "downsamp_modules", "final_layer", "classifier"},
        ),
    ],
)
def test_timm_takes_its_backbones_back(tmp_path: Path, backbone: Named, model: str, missing: set[str]) -> None:
    torch.manual_seed(0)
    theirs: Any = randomised(timm.create_model(model))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    given = ["--layout", "timm", "--backbone", model]
    do("import-weights", "--weights", tmp_path / "a.pth", "--out", tmp_path / "a.safetensors", *given)
    assert read_export(tmp_path / "a.safetensors")[1]["backbone"] == {"name": backbone.name, "kwargs": backbone.kwargs}
    out = tmp_path / "out.pth"
    do("export-weights", "--checkpoint", tmp_path / "a.safetensors", "--layout", "timm", "--out", out)
    state = torch.load(out, weights_only=True)
    same(state, {name: value for name, value in theirs.state_dict().items() if name in state})
    report = timm.create_model(model).load_state_dict(state, strict=False)
    assert {name.split(".")[0] for name in report.missing_keys} == missing
    assert report.unexpected_keys == []
    # timm's own way to read a file into a feature extractor.
    extractor = timm.create_model(model, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(out)})
    images = torch.randn(1, 3, 64, 64)
    named = build_backbone(backbone).eval()
    tensors, _ = read_export(tmp_path / "a.safetensors")
    named.load_state_dict({name.removeprefix("backbone."): value for name, value in tensors.items()})
    with torch.no_grad():
        if not is_widened(model):
            torch.testing.assert_close(extractor.eval()(images)[-2], named(images)[-2])


def is_widened(model: str) -> bool:
    """timm's HRNet extractor adds a part of the classifier, which the file does not have."""
    return model.startswith("hrnet")


def test_a_pose_models_backbone_goes_out_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], features: State, head: nn.Sequential
) -> None:
    out = exported(tmp_path, features | head.state_dict(), "torchvision", ".pth")
    same(torch.load(out, weights_only=True), features)
    printed = capsys.readouterr().out
    assert "left out     the pose model's other parts, for which torchvision has no names: head. (20)" in printed
    error = refused(
        capsys, "export-weights", "--checkpoint", tmp_path / "a.safetensors", "--layout", "timm", "--out", out
    )
    assert "is already there" in error


def test_a_layout_that_cannot_express_the_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, layout, says in [
        ("mobilenetv2_100", "torchvision", "has no names for mobilenetv2_100"),
        ("shufflenet_v2_x1_5", "timm", "timm has no shufflenet_v2_x1_5"),
    ]:
        source = tmp_path / f"{name}.pth"
        torch.save(build_backbone(Named(name)).state_dict(), source)
        hand_off = tmp_path / f"{name}.safetensors"
        do("import-weights", "--weights", source, "--out", hand_off)
        arguments = ["export-weights", "--checkpoint", hand_off, "--layout", layout, "--out", tmp_path / "a.pth"]
        assert says in refused(capsys, *arguments)
    assert "ends in .pth or .safetensors" in refused(capsys, *arguments[:-1], "a.onnx")
    assert set(get_args(get_type_hints(ExportConfig)["layout"])) == {"torchvision", "timm"}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda weight: weight.to_sparse(), "backbone.conv1.weight is a sparse"),
        (lambda weight: torch.full_like(weight, float("nan")), "backbone.conv1.weight holds NaN"),
    ],
)
def test_tensors_without_numbers_to_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Tensor], Tensor], expected: str
) -> None:
    state = torchvision.models.resnet18().state_dict()
    state["conv1.weight"] = spoil(state["conv1.weight"])
    torch.save(state, tmp_path / "a.pth")
    arguments = ["import-weights", "--weights", str(tmp_path / "a.pth"), "--out", str(tmp_path / "b.safetensors")]
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err
    assert main([*arguments, "--layout", "moco"]) == 2
    assert "no key fits the layout moco" in capsys.readouterr().err
