"""Every recipe and graph resolves, recipes build on the meta device, and both name their command; one small step per
backbone and head."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from finetune.cir_config import CIRConfig
from finetune.cir_targets import centre_areas, displacement_loss, score_loss, score_weights
from finetune.config import FinetuneConfig
from launch.config import LaunchConfig
from launch.graph import Graph, build_graph
from poserelay.__main__ import main as poserelay
from poserelay.command import parse, to_plain
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.heads import CIRHead
from poserelay.heads.cir import PoseQuery
from poserelay.keypoints import load_skeleton
from poserelay.losses import joints_mse
from poserelay.model import build_backbone, build_model, build_single_stage, check_kwargs, is_single_stage
from pretrain.config import PretrainConfig
from pretrain.linear_config import LinearConfig
from pretrain.simsiam import SimSiam
from pretrain.train import METHODS, build_method
from semi.config import TRAINED, SemiConfig
from semi.teachers import TEACHERS
from semi.train import check_teacher

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"finetune": FinetuneConfig, "pretrain": PretrainConfig, "semi": SemiConfig}
LINEAR_RECIPES = sorted((ROOT / "pretrain/configs/linear").glob("*.yaml"))
ROWS = sorted((ROOT / "pretrain/configs/rows").glob("*.yaml"))
RECIPES = sorted(
    {path for stage in CONFIGS for path in (ROOT / stage / "configs").rglob("*.yaml")} - {*LINEAR_RECIPES, *ROWS}
)
GRAPHS = sorted((ROOT / "launch/configs").glob("*.yaml"))
# Models that each graph scores, counted in the papers' tables: ICON's Table 8 has one number twice, MSCL's Table 2 is
# run by two kinds of transfer.
SCORED = {
    "cir_table1": 2,
    "cir_table2": 5,
    "cir_table3": 5,
    "cir_table4": 6,
    "cir_table5": 2 * 2,
    "cir_table6": 4,
    "ccm_table2": 6 + 4,
    "ccm_table3": 2 * 6,
    "ccm_table4": 4,
    "ccm_table5": 4,
    "ccm_table6": 3,
    "ccm_table7": 5 * 4 + 5,
    "ccm_table8": 5 * 4 + 5,
    "ccm_table9": 0,  # it times them
    "ccm_table10": 7 * 2,
    "ccm_table11": 5,
    "ccm_table12": 3 + 3 * 2 + 3 * 17,
    "icon_table1": 2 * 2,
    "icon_table2": 2,
    "icon_table3": 6 * 2,
    "icon_table4": 5 + 4 * 4,
    "icon_table4_mpii": 5 + 4 * 4,
    "icon_table5": 5 * 2,
    "icon_table7": 7 * 2,
    "icon_table8": 5 + 4 - 1,
    "mscl_table1": 7 * 3,
    "mscl_table2": 5 * 3 * 2,
    "mscl_table3": 5,
    "mscl_table4": 4,
    "mscl_table5": 4,
    "scio_table1": 1,
    "scio_table2": 1,
    "scio_table3": 3 * 2 * 2,  # test-dev, and val2017 whose truth is at hand
    "scio_table4": 1 + 2 + 1,  # and the heatmaps' own joints
    "scio_table5": 2,
}


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 10


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage, text = recipe.parent.parent.name, recipe.read_text(encoding="utf-8")
    head = yaml.safe_load(text)["model"].get("head")
    single_stage = head is not None and is_single_stage(Named(**head))
    command, fields = ("finetune cir", CIRConfig) if single_stage else (stage, CONFIGS[stage])
    config = parse(fields, ["--config", str(recipe)], command)
    assert f"python -m {command} --config {recipe.relative_to(ROOT)}" in text
    written = set(yaml.safe_load(text))
    assert written >= {"model", "run_dir", "optim"}
    if isinstance(config, SemiConfig):
        assert written >= {"data", "teacher"}
        check_teacher(config)
        assert bool(config.teacher_from) == (config.teacher.name in TRAINED)
    if isinstance(config, FinetuneConfig) and config.model.refiner:
        # On a small network, as not every recipe's own is built.
        small = replace(config.model, backbone=Named("resnet18"), head=Named("simple", {"deconv_channels": [8]}))
        with torch.device("meta"):
            refiner = build_model(small).refiner
        assert refiner is not None
        assert len(refiner.distal) == {"coco17": 6, "crowdpose14": 4}[config.model.skeleton]
    if not isinstance(config, PretrainConfig) and BUILDS[network_of(recipe)] != recipe:
        return
    if isinstance(config, PretrainConfig):
        assert ("data" in written) == (config.method.name != "none")
        if config.method.name != "none":
            build_on_meta(config)
    assert poserelay(["inspect", "--config", str(recipe), "--json", "true"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["macs"] > 0
    if not isinstance(config, PretrainConfig):
        assert figures["output"][0] == (1 if single_stage else len(load_skeleton(config.model.skeleton).joints))


def network_of(recipe: Path) -> str:
    """A recipe's backbone and head; where the weights come from changes neither."""
    model = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]
    kwargs = {name: value for name, value in model["backbone"].get("kwargs", {}).items() if name != "pretrained"}
    return json.dumps([model["backbone"]["name"], kwargs, model.get("head")], sort_keys=True)


# The first recipe of each network, which builds it: HRNets take seconds.
BUILDS = {network_of(recipe): recipe for recipe in reversed(RECIPES)}


def build_on_meta(config: PretrainConfig) -> Any:
    with torch.device("meta"):
        method = build_method(config, build_backbone(config.model.backbone))
    assert METHODS[config.method.name] is type(method)
    return method


@pytest.mark.parametrize("table", ROWS, ids=lambda path: path.stem)
def test_rows_of_a_table(table: Path) -> None:
    rows = yaml.safe_load(table.read_text(encoding="utf-8"))
    built = {}
    for name, row in rows.items():
        assert set(row) == {"config", "set", "published"}
        overrides = [text for key, value in row["set"].items() for text in (f"--{key}", str(value))]
        config = parse(PretrainConfig, ["--config", row["config"], *overrides], "pretrain")
        built[name] = build_on_meta(config)
    if table.stem == "table4":
        assert [":".join(f"{weight:g}" for weight in method.loss_weights) for method in built.values()] == list(rows)
    else:
        siamese = SimSiam(torch.nn.Identity(), [2048])
        heads = [p.shape for name, p in built["1 ImageNet"].named_parameters() if "head" in name]
        assert heads == [p.shape for p in siamese.parameters()]


@pytest.mark.parametrize("recipe", LINEAR_RECIPES, ids=lambda path: path.stem)
def test_linear_recipe(recipe: Path) -> None:
    parse(LinearConfig, ["--config", str(recipe)], "pretrain linear")
    text = recipe.read_text(encoding="utf-8")
    assert f"python -m pretrain linear --config {recipe.relative_to(ROOT)}" in text
    assert set(yaml.safe_load(text)) >= {"init_from", "data", "run_dir", "optim"}


@cache
def jobs_of(graph: Path) -> Graph:
    config = parse(LaunchConfig, ["--config", str(graph), "--run_dir", "nowhere"], "launch", references=True)
    return build_graph(config, {}, ROOT)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_graph(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"python -m launch --config {path.relative_to(ROOT)}" in text
    graph = jobs_of(path)
    # What is missing is data, never a recipe or what a stage was to make.
    missing = [Path(name).relative_to(ROOT).parts[0] for names in graph.missing.values() for name in names]
    assert not set(missing) - {"aic", "coco", "crowdpose", "imagenet", "mpii", "ochuman", "posetrack18", "weights"}
    scored = [graph.configs[job.name] for job in graph.jobs if job.command == "evaluation test"]
    asked = ("checkpoint", "annotations", "decoding", "joints", "labelled_joints")
    assert len({json.dumps([config.get(field) for field in asked]) for config in scored}) == len(scored)
    if "_table" in path.stem:
        assert len(scored) == SCORED[path.stem]
    # Everything that is trained is scored, or hands its weights to what is.
    used = {name for job in graph.jobs for name in job.upstream}
    assert all(job.name in used for job in graph.jobs if job.command in ("semi", "finetune", "finetune cir"))
    for config in scored:
        paper, on_coco = path.stem.split("_table")[0], "coco/" in config["annotations"]
        if paper == "icon":
            assert config["decoding"]["flip"]
            assert ("COCO_val2017_detections_AP_H_56_person" in config["boxes"]) == on_coco
        if paper == "ccm" and on_coco and config["joints"] == "all" and config["labelled_joints"] is None:
            assert "_detections_AP_H_" in config["boxes"]
        if paper == "scio":
            assert config["decoding"]["flip"]
            assert ("_detections_AP_H_" in config["boxes"]) == ("coco/" in config["annotations"])
        if paper == "cir":
            assert config["decoding"]["flip"]
            assert config["boxes"] == "gt"  # none are read
        if paper == "mscl":
            assert not config["decoding"]["flip"]
            assert config["boxes"] == "gt"
    for config in (graph.configs[job.name] for job in graph.jobs if job.command == "semi"):
        teacher = Named(**config["teacher"])
        check_kwargs("teacher", teacher, TEACHERS[teacher.name], given=("models", "trained", "sigma", "quantize"))
        # Nothing is chosen on the split that is reported.
        assert config["data"]["validation_annotations"] is None


def test_the_rows_of_cirs_tables() -> None:
    """What each trains, as the paper's tables say it; none is chosen on val2017, which is reported."""
    rows = {}
    for number in range(1, 7):
        graph = jobs_of(ROOT / f"launch/configs/cir_table{number}.yaml")
        trained = [graph.configs[job.name] for job in graph.jobs if job.command == "finetune cir"]
        assert all(config["data"]["validation_annotations"] is None for config in trained)
        assert all(config["optim"]["lr_batch"] == config["optim"]["batch_size"] * 8 == 64 for config in trained)
        for config in trained:
            check_kwargs("model.head", Named(**config["model"]["head"]), CIRHead, given=("in_channels", "num_joints"))
        rows[number] = [
            (config["model"]["backbone"]["name"], config["loss"]["target"], config["model"]["head"]["kwargs"])
            for config in trained
        ]
    w32 = "hrnet_w32"
    bare, quality = {"kqe": False, "pose_query": "none"}, {"quality": True}
    assert rows[1] == rows[5] == [(w32, "cir", {}), ("hrnet_w48", "cir", {})]
    assert [row[1:] for row in rows[2]] == [
        ("gaussian", bare),
        ("cir", bare),
        ("cir", {"pose_query": "none"}),
        ("gaussian", {}),
        ("cir", {}),
    ]
    targets = ("discrete", "gaussian")
    assert rows[3] == [(w32, target, kwargs) for target in targets for kwargs in ({}, quality)] + [(w32, "cir", {})]
    assert rows[4] == [(w32, "cir", {"points": count}) for count in (0, 3, 6, 9, 12, 15)]
    assert {row[2]["pose_query"] for row in rows[6]} == {*get_args(PoseQuery)} - {"none"}


@pytest.mark.parametrize("table", ROWS, ids=lambda path: path.stem)
def test_graphs_pretrain_the_rows_of_their_tables(table: Path) -> None:
    rows = yaml.safe_load(table.read_text(encoding="utf-8"))
    expected = []
    for row in (row for row in rows.values() if row["published"] is not None):
        overrides = [text for key, value in row["set"].items() for text in (f"--{key}", str(value))]
        config = to_plain(parse(PretrainConfig, ["--config", row["config"], *overrides], "pretrain"))
        expected.append((config["method"], config["optim"]))
    graph = jobs_of(ROOT / f"launch/configs/mscl_{table.stem}.yaml")
    found = [graph.configs[job.name] for job in graph.jobs if job.command == "pretrain"]
    assert [(config["method"], config["optim"]) for config in found] == expected


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        (Named("resnet18"), Named("simple", {"deconv_channels": [8, 8]})),
        (Named("mobilenetv2_100"), Named("simple", {"deconv_channels": [8]})),
        (Named("hrnet_w32"), Named("hrnet")),
        (Named("hrnet_w32"), Named("ccm", {"channels": [8]})),
        (Named("resnet18", {"output_stride": 16}), Named("ccm", {"channels": [8, 8]})),
    ],
    ids=lambda named: named.name,
)
def test_one_step_of_a_pose_model(backbone: Named, head: Named) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone, head, None, "coco17", InputConfig(height=64, width=64)))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    heatmaps, auxiliary, features = model.supervised(model.preprocess(images))
    assert (auxiliary is not None) == (head.name == "ccm")
    assert heatmaps.shape[-2:] == features.shape[-2:] == model.heatmap_size
    maps = [heatmaps] if auxiliary is None else [heatmaps, auxiliary]
    loss = torch.stack([joints_mse(found, torch.zeros_like(found), torch.ones(2, 17)) for found in maps]).sum()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"kqe": False, "pose_query": "none"}, {"points": 0, "quality": True}]
    + [{"pose_query": query} for query in ("automatic", "semantic", "keypoint")],
    ids=str,
)
def test_one_step_of_a_single_stage_model(kwargs: dict[str, Any]) -> None:
    """Also of a picture without a person."""
    torch.manual_seed(0)
    named = Named("timm", {"model": "test_resnet"}), Named("cir", {"general_channels": 8, **kwargs})
    model = build_single_stage(ModelConfig(*named, None, "coco17", InputConfig(height=64, width=64)))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    keypoints, visibility = 16 * torch.rand(2, 1, 17, 2), torch.tensor([2, 0])[:, None, None].expand(2, 1, 17)
    size = (64 // model.stride, 64 // model.stride)
    areas = centre_areas(keypoints, visibility, torch.ones(2, 1), size)
    maps, found = model(model.preprocess(images), areas.pixels.flatten(1, 2))
    assert maps.score.shape[-2:] == size
    assert (maps.quality is not None) == ("quality" in kwargs)
    weights = score_weights(areas, torch.zeros(2, *size, dtype=torch.bool))
    target = areas.spread(areas.owned.float())
    loss = sum(score_loss(each, target, weights) for each in (maps.score, maps.quality) if each is not None)
    loss = loss + displacement_loss(found.unflatten(1, areas.owned.shape[1:]), keypoints, visibility, areas)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert all(parameter.grad.any() for parameter in model.head.parameters() if parameter.grad is not None)
