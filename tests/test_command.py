"""The command line: what a user can get wrong ends with exit 2 and says where and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from poserelay.command import parse, run_command, to_plain
from poserelay.config import LabelsConfig, ModelConfig, Named


@dataclass(frozen=True)
class Optim:
    """Optimiser."""

    lr: float = 1e-3
    """Per global batch."""
    drops: tuple[int, ...] = (2, 4)
    """Epochs."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError("optim.lr must be positive")


@dataclass(frozen=True)
class Config:
    """A stage."""

    model: ModelConfig
    run_dir: str
    """Folder of the run."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    optim: Optim = field(default_factory=Optim)
    pictures: list[str] = field(default_factory=list)
    """Folders."""


BASE = (
    "model:\n  backbone: {name: resnet18}\n  head: {name: simple, kwargs: {deconv_channels: [8, 8]}}\nrun_dir: runs/a\n"
)


def error(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, *arguments: str) -> str:
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    called: list[Any] = []
    assert run_command(["--config", str(file), *arguments], "stage", Config, called.append) == 2
    assert not called
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) <= 2
    assert "Traceback" not in message
    return message


def test_file_and_overrides_meet_in_the_dataclass(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(BASE + "optim: {lr: 1e-2}\n", encoding="utf-8")
    config = parse(Config, ["--config", str(file), "--optim.drops", "[7]", "--model.input.width", "96"], "stage")
    assert config.optim == Optim(lr=0.01, drops=(7,))
    assert config.model.head == Named("simple", {"deconv_channels": [8, 8]})
    assert config.model.input.width == 96
    assert config.model.input.height == 256


def test_written_config_reloads_to_an_equal_one(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(BASE + "labels: {ratio: 0.3}\n", encoding="utf-8")
    config = parse(Config, ["--config", str(file)], "stage")
    again = tmp_path / "b.yaml"
    again.write_text(yaml.safe_dump(to_plain(config)), encoding="utf-8")
    assert parse(Config, ["--config", str(again)], "stage") == config


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (BASE + "optim:\n  lrr: 3\n", (), ["a.yaml:6", "'optim.lrr'", "did you mean 'optim.lr'"]),
        ("modell: 3\n" + BASE, (), ["a.yaml:1", "'modell'", "did you mean 'model'"]),
        (
            BASE.replace("head: {name", "head: {nam"),
            (),
            ["a.yaml:3", "'model.head.nam'", "did you mean 'model.head.name'"],
        ),
        (BASE, ("--optim.l", "3"), ["'optim.l'", "did you mean 'optim.lr'"]),
        (BASE, ("--optim.lr", "fast"), ["'optim.lr'", "float", "fast"]),
        (BASE + "optim: {lr: fast}\n", (), ["a.yaml:5", "'optim.lr'", "float", "fast"]),
        (BASE, ("--optim.lr", "-1"), ["optim.lr must be positive"]),
        (BASE, ("--labels.ratio", "1.5"), ["labels.ratio is 1.5"]),
        (BASE, ("--labels.ratio", "0.1", "--labels.count", "3"), ["ratio or count"]),
        (BASE + "run_dir: runs/b\n", (), ["a.yaml:5", "'run_dir'", "twice", "line 4"]),
        (BASE.replace("run_dir: runs/a\n", ""), (), ["required", "run_dir"]),
        ("model: [1\n", (), ["a.yaml", "not valid YAML"]),
        ("", (), ["a.yaml", "nothing"]),
        ("- 1\n", (), ["a.yaml", "expected fields"]),
        (BASE, ("stray",), ["stray"]),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, arguments: tuple[str, ...], expected: list[str]
) -> None:
    message = error(tmp_path, capsys, text, *arguments)
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (BASE.replace("runs/a", "${pretrain}/a"), (), ["a.yaml:4: ", "field 'run_dir' is '${pretrain}/a'"]),
        (BASE, ("--run_dir", "x${a"), ["error: field 'run_dir' is 'x${a'"]),
        (BASE, ("--labels.file", "${select}"), ["error: field 'labels.file'"]),
        (BASE.replace("[8, 8]", "[8, '${a}']"), (), ["a.yaml:3: field 'model.head.kwargs.deconv_channels' is '${a}'"]),
        (BASE + "pictures: [a, '${b}/c']\n", (), ["a.yaml:5: field 'pictures' is '${b}/c'"]),
    ],
)
def test_only_a_launcher_resolves_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, arguments: tuple[str, ...], expected: list[str]
) -> None:
    message = error(tmp_path, capsys, text, *arguments)
    for part in (*expected, "only `python -m launch` resolves ${stage}"):
        assert part in message, message


def test_a_dollar_alone_is_a_text_like_any_other(tmp_path: Path) -> None:
    config = parse(Config, ["--model.backbone.name", "a", "--run_dir", "$a{b}"], "stage")
    assert config.run_dir == "$a{b}"


def test_missing_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--config", str(tmp_path / "no.yaml")], "stage", Config, print) == 2
    assert "No such file" in capsys.readouterr().err


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--help"], "stage", Config, print) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Folder of the run" in shown
    assert "Per global batch" in shown


def test_print_config_reloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(BASE, encoding="utf-8")
    assert run_command(["--config", str(file), "--print_config"], "stage", Config, print) == 0
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert parse(Config, ["--config", str(file)], "stage").model.backbone == Named("resnet18")
