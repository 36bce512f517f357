"""Every recipe resolves, builds on the meta device, and names its command; one small step per backbone and head."""

from __future__ import annotations

from pathlib import Path

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
from pretrain.mscl import MSCL, mscl_loss
from pretrain.train import build_method

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"finetune": FinetuneConfig, "pretrain": PretrainConfig}
RECIPES = sorted(path for stage in CONFIGS for path in (ROOT / stage / "configs").rglob("*.yaml"))


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
    assert written >= {"model", "data", "run_dir", "optim"}
    if isinstance(config, PretrainConfig):
        with torch.device("meta"):
            assert len(build_method(config).levels) == len(config.loss_weights)
    else:
        figures = inspect_model(config.model)
        assert figures["output"][0] == len(load_skeleton(config.model.skeleton).joints)
    assert poserelay(["inspect", "--config", str(recipe)]) == 0
    assert "MACs" in capsys.readouterr().out


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


@pytest.mark.parametrize("backbone", [Named("resnet18", {"zero_init_residual": True}), Named("hrnet_w32")])
def test_one_step_of_mscl(backbone: Named) -> None:
    torch.manual_seed(0)
    network = build_backbone(backbone)
    model = MSCL(network, network.channels, width=16, prediction_width=8)
    loss, per_level = mscl_loss(model(torch.randn(3, 3, 64, 64), torch.randn(3, 3, 64, 64)), (1, 2, 2, 5))
    loss.backward()
    assert loss.isfinite()
    assert len(per_level) == 4
    assert all(parameter.grad is not None for parameter in model.parameters())
