"""A sweep's configurations made from the first one are those that parsing each gives, errors included."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.config import ReportConfig
from evaluation.config import TestConfig as Evaluation  # pytest collects what begins with Test
from finetune.config import FinetuneConfig
from launch import configurations
from launch.configurations import Configurations
from poserelay.command import parse
from poserelay.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = f"--config={ROOT / 'finetune/configs/simple_r50_coco.yaml'}"
TEXTS = st.one_of(
    st.integers(-3, 10**6).map(str),
    st.floats(-2, 1000, allow_nan=False).map(str),
    st.sampled_from(["null", "true", "1e-3", "nan", "/a/b", "gt", "auto", "a/b.yaml", "/s.yaml", "[1, 2]", "{}", ""]),
)
FIELDS = (
    "seed",
    "labels.ratio",
    "labels.seed",
    "optim.lr",
    "optim.epochs",
    "sigma",
    "quantize",
    "init_from",
    "model.skeleton",
    "data.validation_boxes",
    "decoding.refine",
    "decoding.flip_shift",
    "optim.drops",
    "precision",
)


def parsed(config_class: type, arguments: list[str]) -> object:
    try:
        return parse(config_class, arguments, "x")
    except UserError as error:
        return str(error).removeprefix("command line: ")


def made(stage: Configurations, arguments: list[str]) -> object:
    try:
        return stage.parse(arguments, "W")
    except UserError as error:
        return str(error).removeprefix("W: ")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3), st.data())
def test_as_if_each_were_parsed(fields: list[str], data: st.DataObject) -> None:
    stage = Configurations(FinetuneConfig, "x")
    for run in "abc":
        values = [f"--{field}={data.draw(TEXTS)}" for field in fields]
        arguments = [RECIPE, *values, f"--run_dir=/{run}"]
        assert repr(made(stage, arguments)) == repr(parsed(FinetuneConfig, arguments))


@pytest.mark.parametrize(
    ("config_class", "first", "second"),
    [
        (ReportConfig, ["--runs=/a", "--out=/o"], ["--runs=/b", "--out=/o"]),  # a list of paths
        (ReportConfig, ["--runs=[/a]", "--out=/o"], ["--runs=[/a, /b]", "--out=/p"]),
        (
            FinetuneConfig,
            [RECIPE, "--labels={ratio: 0.1}", "--labels.seed=1"],
            [RECIPE, "--labels={}", "--labels.seed=2"],
        ),
        (FinetuneConfig, [RECIPE, "--labels.seed=1", "--labels={}"], [RECIPE, "--labels.seed=2", "--labels={}"]),
        (FinetuneConfig, [RECIPE, "--seed=1", "--seed=3"], [RECIPE, "--seed=2", "--seed=3"]),
        (FinetuneConfig, [RECIPE, "--labels.count=1"], [RECIPE, "--labels.ratio=1"]),
        (FinetuneConfig, [RECIPE, "--labels.count=1"], [RECIPE, "--labels.count=1.5"]),
        (FinetuneConfig, [RECIPE, "--optim.lr=1"], [RECIPE, "--optim.lr=-1"]),
        (FinetuneConfig, [RECIPE, "--init_from=/a"], [RECIPE, "--init_from=/${b}"]),
        (FinetuneConfig, [RECIPE, "--model.input.height=64"], [RECIPE, "--model.input.height=96"]),
    ],
)
def test_what_only_parsing_can_tell(config_class: type, first: list[str], second: list[str]) -> None:
    stage = Configurations(config_class, "x")
    for arguments in (first, second, first):
        assert repr(made(stage, arguments)) == repr(parsed(config_class, arguments))


def test_a_sweep_of_numbers_and_paths_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(configurations, "parse", lambda *arguments: calls.append(1) or parse(*arguments))
    stage = Configurations(Evaluation, "x")
    for seed in range(5):
        arguments = [
            f"--checkpoint=/r/{seed}.safetensors",
            "--annotations=/a",
            "--images=/i",
            f"--pck_threshold=0.{seed + 1}",
        ]
        config = stage.parse(arguments, "W")
        assert (config.checkpoint, config.pck_threshold) == (f"/r/{seed}.safetensors", float(f"0.{seed + 1}"))
    assert len(calls) == 1
