"""Which config fields are paths: none is forgotten, and each becomes absolute wherever it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import evaluation.__main__
import finetune.__main__
import poserelay.__main__
import pretrain.__main__
import semi.__main__
from evaluation import config as asked
from finetune.config import FinetuneConfig
from poserelay import config as shared
from poserelay.command import path_mark, with_absolute_paths
from poserelay.config import DataConfig, File, InputConfig, KnnConfig, LabelsConfig, ModelConfig, Named, OptionalFile
from poserelay.errors import UserError
from poserelay.keypoints import load_skeleton, packaged_skeletons
from pretrain.config import PretrainConfig
from pretrain.config import PretrainDataConfig as Pictures

# Texts that name no file: names of constructors and of a class.
NO_PATHS = {
    "Named.name",
    "FinetuneConfig.train_on",
    "PhaseConfig.train_on",
    "ImportConfig.backbone",
    "VisualizeConfig.target",
    "VisualizeConfig.hide",
}
SQUARE = InputConfig(64, 64)


def parts(hint: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    yield hint
    for part in get_args(hint):
        yield from parts(part)


def config_classes(found: type, seen: set[type]) -> set[type]:
    """A dataclass and those nested in it."""
    if found not in seen:
        seen.add(found)
        for hint in get_type_hints(found).values():
            for part in filter(dataclasses.is_dataclass, parts(hint)):
                config_classes(part, seen)
    return seen


@pytest.fixture(scope="module")
def classes() -> set[type]:
    """The config classes of every command, as the commands' modules name them."""
    seen: set[type] = set()
    for module in (evaluation.__main__, finetune.__main__, poserelay.__main__, pretrain.__main__, semi.__main__):
        for name, value in vars(module).items():
            if name.endswith("Config"):
                config_classes(value, seen)
    return seen


def test_every_text_is_marked_as_a_path_or_known_as_none(classes: set[type]) -> None:
    assert {"FinetuneConfig", "LinearConfig", "SynthesizeConfig", "KnnConfig", "LabelsConfig"} <= {
        found.__name__ for found in classes
    }
    unmarked = set()
    for found in classes:
        for name, hint in get_type_hints(found, include_extras=True).items():
            # kwargs hold what a constructor takes, none of which takes a path
            if str in parts(hint) and path_mark(hint) is None and get_origin(hint) is not dict:
                unmarked.add(f"{found.__name__}.{name}")
    assert unmarked == NO_PATHS


def test_every_command_has_its_config_class_among_them(classes: set[type], monkeypatch: pytest.MonkeyPatch) -> None:
    """Were one not imported under its name, the test above would not see it."""
    used: list[type] = []
    for module in (evaluation.__main__, poserelay.__main__):
        monkeypatch.setattr(module, "run_commands", lambda *a, **_: used.extend(c for c, _ in a[2].values()))
        module.main([])
    stages = (finetune.__main__, pretrain.__main__, semi.__main__)
    subcommands = ((pretrain.__main__, ["linear"]), (finetune.__main__, ["pseudo-labels"]))
    for module, argv in (*((stage, []) for stage in stages), *subcommands):
        monkeypatch.setattr(module, "run_command", lambda *a, **_: used.append(a[2]))
        module.main(argv)
    assert len(used) == 24
    assert set(used) <= classes


def test_paths_of_nested_optional_and_listed_fields(tmp_path: Path) -> None:
    config = PretrainConfig(
        model=ModelConfig(Named("resnet18", {"name": "a/b"}), skeleton="skeletons/mouse.yaml", input=SQUARE),
        run_dir="runs/a",
        data=Pictures("../pictures", "/data/list.json", ("more/x", "/y/../z")),
        knn=KnnConfig("classes"),
    )
    there = with_absolute_paths(config, tmp_path / "here")
    assert there == dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, skeleton=f"{tmp_path}/here/skeletons/mouse.yaml"),
        run_dir=f"{tmp_path}/here/runs/a",
        data=Pictures(f"{tmp_path}/pictures", "/data/list.json", (f"{tmp_path}/here/more/x", "/z")),
        knn=KnnConfig(f"{tmp_path}/here/classes"),
    )
    assert with_absolute_paths(there, Path("/elsewhere")) == there
    assert config.run_dir == "runs/a"
    assert with_absolute_paths(asked.ReportConfig(["a", "b"], "c"), Path("/r")) == asked.ReportConfig(
        ["/r/a", "/r/b"], "/r/c"
    )


def test_symbolic_links_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    labels = with_absolute_paths(LabelsConfig(file="link/a.json"), tmp_path)
    assert labels.file == f"{tmp_path}/link/a.json"


def test_words_are_no_paths() -> None:
    base = Path("/base")
    data = DataConfig("a.json", "images")
    model = ModelConfig(Named("resnet18"), Named("simple"))
    for boxes, expected in (("gt", "gt"), ("boxes/gt", "/base/boxes/gt")):
        given = FinetuneConfig(model, dataclasses.replace(data, validation_boxes=boxes), "run", init_from="")
        placed = with_absolute_paths(given, base)
        assert placed.data.validation_boxes == expected
        assert placed.init_from == ""  # which a stage takes for none
        assert placed.model == model
        assert with_absolute_paths(asked.TestConfig("c", "a", "i", boxes), base).boxes == expected


@pytest.mark.parametrize(
    "name", [*packaged_skeletons(), "auto", "coco18", "a.yaml", "b/c.yml", "a.json", "coco17.yaml"]
)
def test_a_skeleton_is_a_path_where_it_is_read_as_one(name: str) -> None:
    """By the very rule of `load_skeleton`, so that the message about a misspelt name is about that name."""
    try:
        load_skeleton(name)
        read = False
    except UserError as error:
        read = "cannot read this skeleton file" in str(error)
    placed = with_absolute_paths(asked.ScoreConfig("a", "b", skeleton=name), Path("/base")).skeleton
    assert placed == (f"/base/{name}" if read else name)


def test_moved_sees_every_path_and_nothing_else() -> None:
    seen: list[str] = []

    def moved(path: Path) -> Path:
        seen.append(str(path))
        return Path("/copy") / path.relative_to("/base") if path.is_relative_to("/base/kept") else path

    config = asked.TestConfig("/base/kept/c", "kept/a.json", "/far/images", baseline_annotations=None)
    placed = with_absolute_paths(config, Path("/base"), moved)
    assert sorted(seen) == ["/base/kept/a.json", "/base/kept/c", "/far/images"]
    assert (placed.checkpoint, placed.annotations, placed.images) == (
        "/copy/kept/c",
        "/copy/kept/a.json",
        "/far/images",
    )


def test_a_mark_is_found_however_a_type_is_written() -> None:
    for hint in (File, OptionalFile, File | None, tuple[File, ...], list[File] | None):
        assert path_mark(hint) == shared.PathField()
    for hint in (str, str | None, list[str], dict[str, Any], int):
        assert path_mark(hint) is None
