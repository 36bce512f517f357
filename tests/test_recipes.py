"""Every recipe resolves, builds on the meta device, and names its command; one small step per backbone and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetune.config import FinetuneConfig
from poserelay.__main__ import main as poserelay
from poserelay.command import parse
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.inspection import inspect_model
from poserelay.keypoints import load_skeleton
from poserelay.losses import joints_mse
from poserelay.model import build_backbone, build_model
from pretrain.config import PretrainConfig
from pretrain.linear_config import LinearConfig
from pretrain.simsiam import SimSiam
from pretrain.train import METHODS, build_method

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"finetune": FinetuneConfig, "pretrain": PretrainConfig}
LINEAR_RECIPES = sorted((ROOT / "pretrain/configs/linear").glob("*.yaml"))
ROWS = sorted((ROOT / "pretrain/configs/rows").glob("*.yaml"))
RECIPES = sorted(
    {path for stage in CONFIGS for path in (ROOT / stage / "configs").rglob("*.yaml")} - {*LINEAR_RECIPES, *ROWS}
)


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 10


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = recipe.parent.parent.name
    config = parse(CONFIGS[stage], ["--config", str(recipe)], stage)
    assert f"python -m {stage} --config {recipe.relative_to(ROOT)}" in recipe.read_text(encoding="utf-8")
    written = set(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    assert written >= {"model", "run_dir", "optim"}
    if isinstance(config, PretrainConfig):
        assert ("data" in written) == (config.method.name != "none")
        if config.method.name != "none":
            build_on_meta(config)
    else:
        figures = inspect_model(config.model)
        assert figures["output"][0] == len(load_skeleton(config.model.skeleton).joints)
    assert poserelay(["inspect", "--config", str(recipe)]) == 0
    assert "MACs" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        (Named("resnet18"), Named("simple", {"deconv_channels": [8, 8]})),
        (Named("mobilenetv2_100"), Named("simple", {"deconv_channels": [8]})),
        (Named("hrnet_w32"), Named("hrnet")),
    ],
    ids=lambda named: named.name,
)
def test_one_step_of_a_pose_model(backbone: Named, head: Named) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone, head, None, "coco17", InputConfig(height=64, width=64)))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    heatmaps = model(model.preprocess(images))
    loss = joints_mse(heatmaps, torch.zeros_like(heatmaps), torch.ones(heatmaps.shape[:2]))
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
