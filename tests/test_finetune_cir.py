"""What `python -m finetune cir` says to its users: mistakes end before training, and silence would mislead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.__main__ import main
from poserelay.ensemble import load_models
from poserelay.errors import UserError
from poserelay.run import read_metrics

from .test_training import cir_arguments

RECIPES = Path(__file__).parents[1] / "finetune/configs"


def changed(people: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Path of the annotations with `change` made to every person."""
    data = json.loads((people / "annotations.json").read_text())
    for person in data["annotations"]:
        change(person)
    to.write_text(json.dumps(data))
    return str(to)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "cir_synthetic.yaml"], "model.head is 'cir', which `python -m finetune cir` trains"),
        (["cir", "--config", "demo.yaml"], "model.head is 'simple', which `python -m finetune` trains"),
    ],
)
def test_a_recipe_of_the_other_kind(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(RECIPES / argument) if argument.endswith(".yaml") else argument for argument in arguments]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_nobody_to_validate_on(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = changed(people, tmp_path / "nobody.json", lambda person: person.update(keypoints=[0] * 51))
    argv = cir_arguments(people, tmp_path / "run", "--data.validation_annotations", nobody, "--export", "best")
    assert main(["cir", *argv]) == 2
    assert f"{nobody}: no person with a labelled joint to validate on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_areas_of_0_are_told(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = changed(people, tmp_path / "flat.json", lambda person: person.update(area=0))
    argv = cir_arguments(people, tmp_path / "run", "--data.annotations", flat, "--optim.steps", "1")
    assert main(["cir", *argv]) == 0
    assert "warning: 12 persons have area 0" in capsys.readouterr().err


def test_nobody_in_a_crop_is_told(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def far(person: dict[str, Any]) -> None:
        person["keypoints"][::3] = [x + 5000 for x in person["keypoints"][::3]]

    argv = cir_arguments(people, tmp_path / "run", "--optim.steps", "2")
    assert main(["cir", *argv]) == 0
    assert "nobody's centre" not in capsys.readouterr().err
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["persons"] > 0

    away = changed(people, tmp_path / "away.json", far)
    argv = cir_arguments(people, tmp_path / "away", "--data.annotations", away, "--optim.steps", "1")
    assert main(["cir", *argv]) == 0
    assert "warning: nobody's centre lay in any crop" in capsys.readouterr().err


def test_several_single_stage_models_are_no_ensemble(people: Path, tmp_path: Path) -> None:
    assert main(["cir", *cir_arguments(people, tmp_path / "run", "--optim.steps", "1")]) == 0
    export = tmp_path / "run/export/model.safetensors"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(export.read_bytes())
    with pytest.raises(UserError, match="holds a single-stage model, and an ensemble averages heatmaps"):
        load_models([export, copy])


@pytest.mark.parametrize("epochs", [1, 2])  # the failing validation is the last one, or not
def test_a_failed_validation_costs_no_step(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], epochs: int
) -> None:
    truth = json.loads((people / "annotations.json").read_text())
    few = {image["id"]: image["file_name"] for image in truth["images"][:3]}
    part = {key: [r for r in truth[key] if r.get("image_id", r["id"]) in few] for key in ("images", "annotations")}
    (tmp_path / "few.json").write_text(json.dumps({**truth, **part}))
    folder = tmp_path / "few"
    folder.mkdir()
    for name in few.values():
        (folder / name).write_bytes((people / "images" / name).read_bytes())
    settings = ["--data.validation_annotations", str(tmp_path / "few.json"), "--data.validation_images", str(folder)]
    settings += ["--optim.epochs", str(epochs), "--validate_every", "1", "--save_every", "100", "--export", "best"]
    assert main(["cir", *cir_arguments(people, tmp_path / "whole", *settings)]) == 0

    damaged = folder / next(iter(few.values()))
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    again = ["cir", *cir_arguments(people, tmp_path / "cut", *settings)]
    assert main(again) == 2
    assert damaged.name in capsys.readouterr().err
    trained = [row["step"] for row in read_metrics(tmp_path / "cut/metrics.jsonl") if row["kind"] == "train"]
    damaged.write_bytes(content)
    assert main(again) == 0
    rows = read_metrics(tmp_path / "cut/metrics.jsonl")
    assert [row["attempt"] for row in rows if row["kind"] == "train" and row["step"] in trained] == [1] * len(trained)
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [3 * n for n in range(1, epochs + 1)]
    exports = [tmp_path / run / "export/model.safetensors" for run in ("whole", "cut")]
    assert exports[0].read_bytes() == exports[1].read_bytes()
