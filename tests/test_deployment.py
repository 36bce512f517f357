"""Graphs of pose models: what ONNX Runtime and torch alone make of them beside `inference` and `whole_images`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from poserelay import deployment
from poserelay.__main__ import main
from poserelay.backbones import Backbone
from poserelay.batch import CropBatch
from poserelay.checkpoint import describe, write_export
from poserelay.command import to_plain
from poserelay.config import Decoding, DistalJoints, InputConfig, ModelConfig, Named, WholeImages
from poserelay.datasets.fullimage import pyramid
from poserelay.deployment import (
    CropGraph,
    compare,
    describe_graph,
    graph_of,
    run_onnx,
    run_program,
    to_onnx,
    to_program,
    trace,
)
from poserelay.ensemble import Ensemble
from poserelay.errors import CheckFailed, UserError
from poserelay.geometry import apply_affine, invert_affine
from poserelay.heads import SCIO, CIRHead, DeconvHead
from poserelay.inference import predict_crops
from poserelay.keypoints import Group, Skeleton
from poserelay.model import PoseModel, SingleStageModel, build_model, load_model
from poserelay.run import file_sha256
from poserelay.whole_images import predict_whole

SKELETON = Skeleton(
    name="toy",
    joints=("nose", "left_hand", "right_hand", "tail", "left_foot", "right_foot"),
    flip_pairs=(("left_hand", "right_hand"), ("left_foot", "right_foot")),
    sigmas=(0.05,) * 6,
    groups=(
        Group(("nose", "left_hand", "tail"), "left_foot"),
        Group(("nose", "right_hand", "tail"), "right_foot"),
    ),
)
JOINTS = len(SKELETON.joints)
HANDOFF: dict[str, Any] = dict.fromkeys(("stage", "method", "backbone", "head", "refiner", "input"))


class Convolutions(nn.Module):
    """A network of two convolutions: maps of strides 4 and 8."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 9, 4, 4)
        self.coarse = nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(images).relu()
        return [fine, self.coarse(fine)]


def crop_model(seed: int = 0, refined: bool = False, **crop: Any) -> PoseModel:
    """Heatmaps of stride 4 with peaks of about 1."""
    torch.manual_seed(seed)
    config = ModelConfig(Named("two"), Named("simple"), input=InputConfig(**{"height": 64, "width": 48, **crop}))
    head = DeconvHead([8, 8], JOINTS, deconv_channels=[8])
    head.final_layer.weight.data.normal_()
    refiner = None
    if refined:
        groups = [SKELETON.indices((*group.proximal, group.distal)) for group in SKELETON.groups]
        refiner = SCIO(8, groups, feature_channels=2, width=4, dilations=(1, 2))
        for part in (refiner.prediction, refiner.verification):
            part.to_heatmap.weight.data.normal_()
    return PoseModel(Backbone(Convolutions(), [8, 8], [4, 8]), head, SKELETON, config, refiner).eval()


def crops(model: Any, count: int) -> CropBatch:
    """Soft noise, each crop at another place and scale of its picture."""
    rng = np.random.default_rng(count)
    height, width = model.input.height, model.input.width
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, height // 8, width // 8)))
    images = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)
    affine = torch.tensor([[[1.0 + n, 0, 3 * n], [0, 1.0 + n, -5]] for n in range(count)])
    joints = torch.zeros(count, JOINTS)
    boxes = torch.zeros(count, 4)
    ids = list(range(count))
    return CropBatch(
        images, joints[..., None].repeat(1, 1, 2), joints.long(), affine, boxes, boxes[:, 0], boxes[:, 0], ids, [*ids]
    )


def bytes_of(graph: Any, kind: str) -> bytes:
    program, described = trace(graph), describe_graph(graph, HANDOFF, "0")
    return to_onnx(graph, program, described) if kind == "onnx" else to_program(program, described)


def assert_same_poses(model: PoseModel, decoding: Decoding, run: Any, counts: Sequence[int] = (1, 3)) -> None:
    """What a graph finds in crops, brought to the pictures, is what `predict_crops` finds."""
    for count in counts:
        batch = crops(model, count)
        expected = predict_crops(model, batch, decoding)
        keypoints, scores = run((batch.images,))
        places = apply_affine(invert_affine(batch.affine.numpy()), keypoints)
        np.testing.assert_allclose(places, expected.keypoints.numpy(), atol=2e-3)
        np.testing.assert_allclose(scores, expected.scores.numpy(), rtol=1e-4)
        assert np.ptp(keypoints[..., 0]) > 10  # the maps have peaks in many places
        assert np.ptp(keypoints[..., 1]) > 10


slow = pytest.mark.slow
DECODINGS = [
    pytest.param({"refine": "quarter", "flip_shift": 1.0}, {}, id="quarter"),
    pytest.param({"refine": "dark", "blur": 1.0}, {"color": "bgr"}, marks=slow, id="dark"),
    pytest.param({"refine": "none", "flip": False}, {}, marks=slow, id="none"),
    pytest.param({"refine": "paraboloid", "blur": 0.7}, {"alignment": "udp"}, marks=slow, id="paraboloid"),
]


@pytest.mark.parametrize(("options", "crop"), DECODINGS)
def test_onnx_finds_what_predict_crops_finds(options: dict[str, Any], crop: dict[str, Any]) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, decoding = crop_model(**crop), Decoding(**options)
    graph = graph_of(model, decoding)
    content = bytes_of(graph, "onnx")
    assert_same_poses(model, decoding, run_onnx(graph, content), (1, 3, 8))
    assert str(Path(deployment.__file__).parent.parent).encode() not in content


@pytest.fixture(scope="module")
def handoff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-off file of a small pose model, and beside it a backbone's."""
    config = ModelConfig(
        Named("timm", {"model": "test_resnet"}),
        Named("simple", {"deconv_channels": [8, 8, 8]}),
        input=InputConfig(64, 64),
    )
    torch.manual_seed(0)
    model = build_model(config, SKELETON)
    model.head.final_layer.weight.data.normal_()  # pyright: ignore[reportCallIssue]
    folder = tmp_path_factory.mktemp("handoff")
    given: dict[str, Any] = {"stage": "finetune", "method": "simple", "config": {}, "upstream": None, "metrics": {}}
    plain = to_plain(config)
    write_export(folder / "pose.safetensors", model.state_dict(), describe(model=plain, skeleton=SKELETON, **given))
    backbone = {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    alone = describe(model={**plain, "head": None}, skeleton=None, **given)
    write_export(folder / "backbone.safetensors", backbone, alone)
    return folder / "pose.safetensors"


@slow
def test_export_model_writes_a_file_that_torch_alone_reads(
    handoff: Path, tmp_path: Path, people: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "pose.pt2"
    argv = ["export-model", "--checkpoint", str(handoff), "--out", str(out), "--decoding.refine", "parabola"]
    assert main([*argv, "--images", str(people / "images")]) == 0
    told = capsys.readouterr().out
    assert "images uint8 [batch, 3, 64, 64]" in told
    assert f"checked      16 inputs of noise: {16 * JOINTS} joints within 0 px" in told
    assert f"checked      16 inputs of pictures: {16 * JOINTS} joints within 0 px" in told
    model: Any = load_model(handoff)
    extra = {"poserelay.json": ""}
    run = torch.export.load(out, extra_files=extra).module()
    assert_same_poses(
        model, Decoding(refine="parabola"), lambda inputs: [found.detach().numpy() for found in run(*inputs)]
    )
    described = json.loads(extra["poserelay.json"])
    assert described["checkpoint_sha256"] == file_sha256(handoff)
    assert described["skeleton"] == SKELETON.to_dict()
    assert described["decoding"] == {"flip": True, "flip_shift": 0.75, "refine": "parabola", "blur": 0.0}
    assert described["input"]["mean"] == list(InputConfig().mean)
    assert main(argv) == 2
    assert "is already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "pose.pt"], "ends in .onnx or .pt2"),
        (["--checkpoint", "none.safetensors"], "no such file"),
        (["--checkpoint", "backbone.safetensors"], "holds a backbone"),
        (["--checkpoint", "[a.safetensors, b.safetensors]"], "not an ensemble"),
        (["--images", "nowhere"], "no such folder"),
        (["--decoding.flip_shift", "2"], "flip_shift"),
    ],
)
def test_mistakes(
    more: list[str], message: str, handoff: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(handoff.parent)
    assert main(["export-model", "--checkpoint", "pose.safetensors", "--out", "pose.pt2", *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (handoff.parent / "pose.pt2").exists()


def test_without_its_packages_onnx_is_refused_before_anything_is_read(
    handoff: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export-model", "--checkpoint", "none", "--out", "pose.onnx"]) == 2
    error = capsys.readouterr().err
    assert "onnxruntime, which is not installed: pip install" in error
    assert ".pt2" in error


def test_what_cannot_be_one_graph_is_refused() -> None:
    model = crop_model()
    with pytest.raises(UserError, match="one by one"):
        graph_of(Ensemble({"a": model, "b": crop_model(1)}), Decoding())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="at one scale"):
        graph_of(single_stage(), Decoding(whole=WholeImages(scales=(1.0, 0.5))))
    model.head.final_layer.weight.data[0, 0] = float("nan")  # pyright: ignore[reportIndexIssue]
    with pytest.raises(UserError, match=r"head.final_layer.weight of the model holds NaN"):
        graph_of(model, Decoding())


def test_a_graph_that_is_not_the_model_is_refused() -> None:
    graph = graph_of(crop_model(), Decoding())
    batches = [(crops(graph.model, 4).images,)]

    def answer(change: Any) -> Any:
        return lambda inputs: change(*(found.detach().numpy() for found in graph(*inputs)))

    same = compare(graph, answer(lambda xy, scores: (xy + np.float32(0.01), scores)), batches)
    assert (same.joints, same.elsewhere) == (4 * JOINTS, 0)
    assert same.pixels == pytest.approx(0.01 * 2**0.5, rel=1e-3)
    deployment._refuse(graph, same, "noise")
    wrong = [
        lambda xy, scores: (xy[..., ::-1], scores),
        lambda xy, scores: (xy * np.nan, scores),
        lambda xy, scores: (xy, scores * 1.01),
        lambda xy, scores: (xy, scores * np.nan),
    ]
    for change in wrong:
        with pytest.raises(CheckFailed, match="is not the model on noise"):
            deployment._refuse(graph, compare(graph, answer(change), batches), "noise")


def single_stage() -> SingleStageModel:
    torch.manual_seed(2)
    head = CIRHead([8, 8], JOINTS, general_channels=8, joint_channels=3, instance_channels=4, points=2)
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.normal_(std=0.3)
    config = ModelConfig(Named("two"), Named("cir"), input=InputConfig(64, 64))
    return SingleStageModel(Backbone(Convolutions(), [8, 8], [4, 8]), head, SKELETON, config).eval()


@slow
def test_single_stage_graph_finds_the_poses_of_predict() -> None:
    """Of two pictures whose sides differ from each other and from those that the graph was traced with."""
    pytest.importorskip("onnxruntime")
    model, rng = single_stage(), np.random.default_rng(0)
    decoding = Decoding(nms_threshold=1.0, whole=WholeImages(max_poses=12))
    graph = graph_of(model, decoding)
    run = run_onnx(graph, bytes_of(graph, "onnx"))
    for shape in ((150, 110, 3), (70, 190, 3)):
        picture = rng.integers(0, 256, shape, dtype=np.uint8)
        expected = predict_whole(model, [picture], decoding)
        record = pyramid(picture, 64, (1.0,), 0)
        affine = record.affine[0]
        size = np.round(np.diag(affine[:, :2])[::-1] * shape[:2]).astype(np.int64)
        found, scores = run((torch.from_numpy(record.images[0])[None], torch.from_numpy(size)[None]))
        keep = np.isfinite(scores[0])
        assert keep.sum() == len(expected) > 3
        places = apply_affine(invert_affine(affine), found[0, keep])
        triples = np.reshape([pose["keypoints"] for pose in expected], (-1, JOINTS, 3))
        np.testing.assert_allclose(places, triples[..., :2], atol=0.05)
        np.testing.assert_allclose(scores[0, keep], [pose["score"] for pose in expected], rtol=1e-3)


@slow
def test_the_search_of_scio_is_in_the_graph() -> None:
    """In crops of which some are sure of their proximal joints."""
    pytest.importorskip("onnxruntime")
    model = crop_model(3, refined=True)
    batch = crops(model, 4)
    base = predict_crops(model, batch, Decoding(scio=DistalJoints("base")))
    sure = base.scores[:, [[0, 1, 3], [0, 2, 3]]].amin(-1)
    threshold = float(sure.flatten().sort().values[2:4].mean())
    scio = DistalJoints(steps=2, step=5.0, proximal_threshold=threshold, confidence="verification")
    found = predict_crops(model, batch, Decoding(scio=scio))
    assert found.verification is not None
    assert found.verification.isfinite().sum() == 6  # of eight
    assert ((found.keypoints - base.keypoints).abs().amax(-1) > 1).sum() > 3
    graph = graph_of(model, Decoding(scio=scio))
    assert_same_poses(model, Decoding(scio=scio), run_onnx(graph, bytes_of(graph, "onnx")), (1, 4))


@slow
@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        (Named("timm", {"model": "hrnet_w18_small"}), Named("hrnet")),
        (Named("timm", {"model": "test_resnet"}), Named("ccm", {"channels": [8, 8, 8]})),
        (Named("mobilenetv2_100"), Named("simple", {"deconv_channels": [8, 8, 8]})),
        (Named("shufflenet_v2_x1_5"), Named("simple", {"deconv_channels": [8, 8, 8]})),
    ],
    ids=["hrnet", "ccm", "mobilenet", "shufflenet"],
)
def test_families_of_networks(backbone: Named, head: Named) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone, head, input=InputConfig(64, 64)), SKELETON).eval()
    model.head.final_layer.weight.data.normal_()  # pyright: ignore[reportCallIssue]
    decoding = Decoding(flip=False)
    graph = graph_of(model, decoding)
    found = compare(graph, run_program(bytes_of(graph, "pt2")), [(crops(model, count).images,) for count in (1, 3)])
    assert (found.elsewhere, found.joints) == (0, 4 * JOINTS)
    assert found.scores <= 1e-5 * found.highest


@slow
def test_a_pt2_file_needs_no_poserelay(tmp_path: Path) -> None:
    graph = graph_of(crop_model(), Decoding())
    assert isinstance(graph, CropGraph)
    (tmp_path / "pose.pt2").write_bytes(bytes_of(graph, "pt2"))
    images = crops(graph.model, 3).images
    np.save(tmp_path / "images.npy", images.numpy())
    program = (
        "import sys, numpy, torch\n"
        "run = torch.export.load('pose.pt2').module()\n"
        "numpy.save('found.npy', run(torch.from_numpy(numpy.load('images.npy')))[0].detach().numpy())\n"
        "assert not [name for name in sys.modules if name.startswith('poserelay')]\n"
    )
    subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, check=True)
    with torch.no_grad():
        np.testing.assert_allclose(np.load(tmp_path / "found.npy"), graph(images)[0].numpy(), atol=1e-4)
