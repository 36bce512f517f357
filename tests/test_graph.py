"""From a graph file to its jobs, against naive loops and by hand; what a user can get wrong. Starts nothing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.__main__ import main
from launch.config import LaunchConfig, Resources, Slurm, Stage
from launch.graph import Graph, Job, build_graph, split_arguments
from launch.slurm import arrays, minutes
from launch.snapshot import ROOT, in_snapshot
from poserelay.command import parse
from poserelay.config import PrepareConfig
from poserelay.errors import UserError

BASE = Path("/base")


def stage(command: str = "poserelay prepare", **fields: Any) -> Stage:
    overrides = fields.pop("overrides", {})
    if command == "poserelay prepare" and "images" not in fields.get("sweep", {}):
        overrides = {"images": "pictures", **overrides}
    if command == "pretrain":
        overrides = {"model.backbone.name": "resnet18", "model.input": {"height": 64, "width": 64}, **overrides}
    if command == "finetune":
        wanted = {"model.backbone.name": "resnet18", "model.head.name": "simple"}
        overrides = {**wanted, "data.annotations": "a.json", "data.images": "pictures", **overrides}
    return Stage(command=command, overrides=overrides, **fields)


def build(stages: dict[str, Stage], more: dict[str, list[str]] | None = None, run_dir: str = "runs/a") -> Graph:
    return build_graph(LaunchConfig(run_dir=run_dir, stages=stages), more or {}, BASE)


def of(graph: Graph, name: str) -> list[Job]:
    return [job for job in graph.jobs if job.stage == name]


# Sweeps


def test_a_stage_without_a_sweep_is_one_job_in_its_own_folder() -> None:
    graph = build({"a": stage()})
    (job,) = graph.jobs
    assert (job.name, job.folder, job.upstream, job.axes) == ("a", "/base/runs/a/a", [], {})
    assert graph.configs["a"]["out"] == "/base/runs/a/a"


def test_a_sweep_is_multiplied_out_in_the_order_of_the_file() -> None:
    graph = build({"a": stage(sweep={"quality": [50, 90], "short_side": [64, 128, 256]})})
    expected = [(quality, side) for quality in (50, 90) for side in (64, 128, 256)]
    configs = [graph.configs[job.name] for job in graph.jobs]
    assert [(config["quality"], config["short_side"]) for config in configs] == expected
    assert [job.name for job in graph.jobs] == [f"a/quality={quality}_short_side={side}" for quality, side in expected]
    assert [config["out"] for config in configs] == [f"/base/runs/a/{job.name}" for job in graph.jobs]


def test_linked_fields_change_together() -> None:
    graph = build({"a": stage(sweep={"quality,short_side": [[50, 64], [90, 128]], "pictures_per_shard": [1, 2]})})
    found = [graph.configs[job.name] for job in graph.jobs]
    assert [(c["quality"], c["short_side"], c["pictures_per_shard"]) for c in found] == [
        (50, 64, 1),
        (50, 64, 2),
        (90, 128, 1),
        (90, 128, 2),
    ]
    assert graph.jobs[0].name == "a/quality=50_pictures_per_shard=1"
    # An axis is the same however its fields are separated.
    both = build(
        {
            "a": stage(sweep={"quality,short_side": [[50, 64], [90, 128]]}),
            "b": stage(overrides={"images": "${a}"}, sweep={"quality , short_side": [[90, 128]]}),
        }
    )
    assert [job.upstream for job in of(both, "b")] == [["a/quality=90"]]


FIELDS: tuple[str, ...] = ("short_side", "quality", "pictures_per_shard", "workers")
VALUES = st.lists(st.integers(16, 100), min_size=1, max_size=3, unique=True)
AXES: st.SearchStrategy[dict[str, list[int]]] = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3)


@st.composite
def chains(draw: st.DrawFn) -> list[tuple[list[int], dict[str, list[int]]]]:
    """Per stage the earlier ones that it names, and its sweep; where an axis is upstream too, part of its values."""
    chain: list[tuple[list[int], dict[str, list[int]]]] = []
    effective: list[dict[str, list[int]]] = []
    for number in range(draw(st.integers(2, 3))):
        named = draw(st.lists(st.sampled_from(range(number)), unique=True, max_size=2)) if number else []
        inherited: dict[str, list[int]] = {}
        sweep = draw(AXES)
        for other in named:
            for field, values in effective[other].items():
                if inherited.get(field, values) != values:  # the stage must then say which of them
                    sweep[field] = []
                inherited[field] = [value for value in values if value in inherited.get(field, values)]
        for field, values in inherited.items():
            if field in sweep:
                sweep[field] = draw(st.permutations(values))[: draw(st.integers(1, max(1, len(values))))]
        if any(not values for values in sweep.values()):
            named, inherited, sweep = [], {}, {}
        effective.append({**inherited, **sweep})
        chain.append((named, sweep))
    return chain


@settings(deadline=None, max_examples=40)
@given(chains())
def test_shared_axes_match_and_others_broadcast(chain: list[tuple[list[int], dict[str, list[int]]]]) -> None:
    names = "abc"
    stages = {}
    for number, (named, sweep) in enumerate(chain):
        sources = [f"${{{names[other]}}}" for other in named]
        overrides = dict(zip(("images", "annotations"), sources, strict=False))
        stages[names[number]] = stage(overrides=overrides, sweep=sweep)
    graph = build(stages)
    by_name = {job.name: job for job in graph.jobs}
    assert len(by_name) == len({job.folder for job in graph.jobs}) == len(graph.jobs) == len(graph.configs)

    # Naively: every combination of every field that the stage or one upstream of it sweeps, each once.
    swept: list[dict[str, list[int]]] = []
    for number, (named, sweep) in enumerate(chain):
        axes: dict[str, list[int]] = {}
        for other in named:
            axes |= swept[other]
        axes |= sweep
        swept.append(axes)
        jobs = of(graph, names[number])
        assert len(jobs) == math.prod(map(len, axes.values()))
        expected = {tuple(sorted(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())}
        assert {tuple(sorted(job.axes.items())) for job in jobs} == expected
        for job in jobs:
            config = graph.configs[job.name]
            assert all(config[field] == job.axes[field] for field in sweep)
            assert {name.split("/")[0] for name in job.upstream} == {names[other] for other in named}
            assert len(job.upstream) == len(named)
            for name in job.upstream:
                upstream = by_name[name]
                assert upstream.folder in (config["images"], config["annotations"])
                assert all(job.axes[field] == value for field, value in upstream.axes.items())
            assert graph.jobs.index(job) > max([graph.jobs.index(by_name[name]) for name in job.upstream], default=-1)


def test_a_label_ratio_graph_against_a_naive_loop() -> None:
    stages = {
        "evaluation": stage(
            "evaluation test", overrides={"checkpoint": "${finetune}", "annotations": "t.json", "images": "t"}
        ),
        "finetune": stage(
            "finetune", overrides={"init_from": "${pretrain}"}, sweep={"labels.ratio": [0.1, 0.5], "seed": [0, 1]}
        ),
        "pretrain": stage("pretrain", overrides={"data.images": "pictures"}, sweep={"seed": [0, 1, 2]}),
    }
    graph = build(stages)
    names = [f"pretrain/seed={seed}" for seed in (0, 1, 2)]
    upstream: dict[str, list[str]] = {name: [] for name in names}
    for seed in (0, 1):
        for ratio in (0.1, 0.5):
            upstream[f"finetune/seed={seed}_ratio={ratio}"] = [f"pretrain/seed={seed}"]
    for seed in (0, 1):
        for ratio in (0.1, 0.5):
            upstream[f"evaluation/seed={seed}_ratio={ratio}"] = [f"finetune/seed={seed}_ratio={ratio}"]
    assert {job.name: job.upstream for job in graph.jobs} == upstream
    assert [job.stage for job in graph.jobs] == ["pretrain"] * 3 + ["finetune"] * 4 + ["evaluation"] * 4
    for job in of(graph, "evaluation"):
        assert graph.configs[job.name]["checkpoint"] == f"/base/runs/a/{job.upstream[0]}/export/model.safetensors"
        assert "seed" not in graph.configs[job.name]


def test_after_waits_for_a_whole_stage_and_shares_no_axis() -> None:
    graph = build({"a": stage(sweep={"quality": [1, 2]}), "b": stage(after=["a"], sweep={"quality": [3]})})
    assert [(job.name, job.upstream) for job in of(graph, "b")] == [("b/quality=3", ["a/quality=1", "a/quality=2"])]


# Hand-off


def test_references_stand_for_what_a_stage_hands_off() -> None:
    stages = {
        "pre": stage("pretrain", overrides={"data.images": "p"}),
        "set": stage(),
        "some": stage("poserelay select", overrides={"checkpoint": "${pre}", "images": "${set.run_dir}", "count": 3}),
        "fine": stage(
            "finetune",
            overrides={
                "init_from": "${pre.net2}",
                "labels.file": "${some}",
                "data.images": "${set}/pictures",
                "data": {"annotations": "${set}/annotations.json"},
            },
        ),
    }
    graph = build(stages, {"fine": ["--data.validation_annotations=${set}/${pre.run_dir}.json"]})
    fine = graph.configs["fine"]
    run = "/base/runs/a"
    assert graph.configs["some"]["checkpoint"] == f"{run}/pre/export/model.safetensors"
    assert graph.configs["some"]["images"] == f"{run}/set"
    assert fine["init_from"] == f"{run}/pre/export/net2.safetensors"
    assert fine["labels"]["file"] == f"{run}/some/chosen.json"
    assert fine["data"]["annotations"] == f"{run}/set/annotations.json"
    assert fine["data"]["validation_annotations"] == f"{run}/set{run}/pre.json"
    (job,) = of(graph, "fine")
    assert sorted(job.upstream) == ["pre", "set", "some"]


def test_a_reference_in_a_sweep_is_waited_for_by_its_own_elements_alone() -> None:
    stages = {
        "pretrain": stage("pretrain", overrides={"data.images": "p"}, sweep={"seed": [0, 1]}),
        "finetune": stage("finetune", sweep={"init_from": [None, "${pretrain}"], "seed": [0, 1]}),
        "test": stage("evaluation test", overrides={"checkpoint": "${finetune}", "annotations": "a", "images": "b"}),
    }
    graph = build(stages)
    found = {job.name: (job.upstream, graph.configs[job.name]["init_from"]) for job in of(graph, "finetune")}
    assert found == {
        f"finetune/seed={seed}_init_from={name}": (
            [] if name == "none" else [f"pretrain/seed={seed}"],
            None if name == "none" else f"/base/runs/a/pretrain/seed={seed}/export/model.safetensors",
        )
        for seed in (0, 1)
        for name in ("none", "pretrain")
    }
    assert [job.upstream for job in of(graph, "test")] == [[job.name] for job in of(graph, "finetune")]


def test_a_stage_that_has_been_run_is_no_job(tmp_path: Path) -> None:
    (tmp_path / "old/export").mkdir(parents=True)
    existing = {"pretrain": stage("pretrain", overrides={"data.images": "p"}, existing=str(tmp_path / "old"))}
    named = {"finetune": stage("finetune", overrides={"init_from": "${pretrain}"})}
    with pytest.raises(
        UserError, match=r"stage pretrain: existing .*/old: no finished pretrain there .* give its folder"
    ):
        build({**existing, **named})
    for file in ("export/model.safetensors", "done.json"):
        (tmp_path / "old" / file).touch()
    graph = build({**existing, **named})
    assert [(job.name, job.upstream) for job in graph.jobs] == [("finetune", [])]
    assert graph.configs["finetune"]["init_from"] == str(tmp_path / "old/export/model.safetensors")


def test_arguments_for_a_stage_are_told_from_the_launchers() -> None:
    argv = ["--config", "g.yaml", "--a.x.y", "3", "--b.z=4", "--local.jobs", "2", "--a.w", "--a.b", "--dry_run"]
    assert split_arguments(argv, ["a", "b"]) == (
        ["--config", "g.yaml", "--local.jobs", "2", "--dry_run"],
        {"a": ["--x.y=3", "--w=--a.b"], "b": ["--z=4"]},
    )
    with pytest.raises(UserError, match=r"--a\.x: its value is missing"):
        split_arguments(["--a.x"], ["a"])


def test_the_last_word_is_the_command_lines() -> None:
    graph = build({"a": stage(overrides={"quality": 3})}, {"a": ["--quality=7"]})
    assert graph.configs["a"]["quality"] == 7


def test_paths_are_absolute_and_names_are_not(tmp_path: Path) -> None:
    stages = {"a": stage("finetune", overrides={"model.skeleton": "mpii16", "data.images": "../x/./y"})}
    graph = build(stages)
    assert graph.configs["a"]["data"] == {
        "annotations": "/base/a.json",
        "images": "/x/y",
        "validation_annotations": None,
        "validation_images": None,
        "validation_boxes": "gt",
    }
    assert graph.configs["a"]["model"]["skeleton"] == "mpii16"
    assert graph.configs["a"]["init_from"] is None
    own = build({"a": stage("finetune", overrides={"model.skeleton": "dog.yaml"})})
    assert own.configs["a"]["model"]["skeleton"] == "/base/dog.yaml"


def test_files_of_the_checkout_are_taken_from_the_snapshot() -> None:
    config = LaunchConfig(
        run_dir="/runs/a",
        stages={
            "a": stage(
                "finetune",
                overrides={
                    "model.skeleton": "poserelay/skeletons/mpii16.yaml",
                    "data.images": "poserelay/skeletons",
                    "data.annotations": "poserelay/none.json",
                },
            )
        },
    )
    found = build_graph(config, {}, ROOT, partial(in_snapshot, code=Path("/runs/a/launch/code"))).configs["a"]
    assert found["model"]["skeleton"] == "/runs/a/launch/code/poserelay/skeletons/mpii16.yaml"
    # Only the code is copied.
    assert found["data"]["images"] == str(ROOT / "poserelay/skeletons")
    assert found["data"]["annotations"] == str(ROOT / "poserelay/none.json")


@pytest.mark.parametrize(
    "run_dir", ["/runs/with space", "/runs/a: b #c", "/runs/[x]{y}", '/runs/it\'s "q"', "/runs/1e3"]
)
def test_odd_signs_in_a_path_stay(run_dir: str) -> None:
    graph = build({"a": stage(), "b": stage(overrides={"images": "${a}"})}, run_dir=run_dir)
    assert graph.configs["b"]["images"] == f"{run_dir}/a"
    assert graph.configs["b"]["out"] == f"{run_dir}/b"


def test_a_written_config_is_the_one_that_was_checked(tmp_path: Path) -> None:
    (config,) = build({"a": stage(sweep={"max_unreadable": ["1e-3"]})}).configs.values()
    assert config["max_unreadable"] == 0.001
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    assert parse(PrepareConfig, ["--config", str(file)], "a") == PrepareConfig(**config)


def test_resources_and_slurm_of_a_stage_change_those_of_the_graph() -> None:
    config = LaunchConfig(
        run_dir="/r",
        resources=Resources(gpus=2, cpus=5),
        slurm=Slurm(partition="low", time="60"),
        stages={
            "a": stage("pretrain", overrides={"data.images": "p"}, resources={"nodes": 2}),
            "b": stage(resources={"gpus": 0}, slurm={"time": "1-12", "extra": {"exclude": "n1"}}),
        },
    )
    first, second = build_graph(config, {}, BASE).jobs
    assert (first.resources, first.resources.world) == (Resources(nodes=2, gpus=2, cpus=5), 4)
    assert (second.resources, second.resources.world) == (Resources(gpus=0, cpus=5), 1)
    assert second.slurm == dataclasses.replace(config.slurm, time="1-12", extra={"exclude": "n1"})
    assert first.slurm == config.slurm


# Folder names


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="\0$"), min_size=1), min_size=1, unique=True))
def test_folders_differ_and_stay_below_the_stages_whatever_the_values(values: list[str]) -> None:
    values = [value for value in values if _is_text(value)]
    graph = build({"a": stage(sweep={"images": values or ["x"]})})
    folders = [Path(job.folder) for job in graph.jobs]
    assert len({str(folder) for folder in folders}) == len(graph.configs) == len(values or ["x"])
    for folder in folders:
        assert folder.parent == Path("/base/runs/a/a")
        assert folder.name not in (".", "..")
        assert len(folder.name.encode()) < 200


def _is_text(value: str) -> bool:
    """Whether the value stays what it is as an argument of a command."""
    try:
        return parse(PrepareConfig, [f"--images={value}", "--out=x"], "a").images == value
    except UserError:
        return False


def test_folders_of_values_that_look_alike() -> None:
    graph = build({"a": stage(sweep={"images": ["a!", "a_2", "a?", "a/", "A", "x" * 300, "x" * 301]})})
    assert len({job.folder for job in graph.jobs}) == len(graph.configs) == 7
    signs = build({"a": stage("finetune", sweep={"decoding.flip_shift": [0.5, None], "optim.drops": [[1], [1, 2]]})})
    assert [job.name for job in signs.jobs] == [
        "a/flip_shift=0.5_drops=1",
        "a/flip_shift=0.5_drops=1-2",
        "a/flip_shift=none_drops=1",
        "a/flip_shift=none_drops=1-2",
    ]


def test_a_sign_is_part_of_a_folders_name(tmp_path: Path) -> None:
    graph = build({"a": stage("evaluation test", **_tested(tmp_path), sweep={"box_threshold": [-1, 1]})})
    assert [job.name for job in graph.jobs] == ["a/box_threshold=-1", "a/box_threshold=1"]


def _tested(tmp_path: Path) -> dict[str, Any]:
    return {"overrides": dict.fromkeys(("checkpoint", "annotations", "images"), str(tmp_path))}


def test_fields_with_the_same_last_part_are_named_in_full() -> None:
    graph = build({"a": stage("finetune", sweep={"seed": [3], "labels.seed": [4]})})
    assert graph.jobs[0].name == "a/seed=3_labels.seed=4"


# Arrays of Slurm


def job(name: str, *upstream: str) -> Job:
    return Job(name, name.split("/")[0], "finetune", {}, f"/r/{name}", list(upstream), Resources(), Slurm())


def elements(name: str, number: int, upstream: Callable[[int], tuple[str, ...]] = lambda place: ()) -> list[Job]:
    return [job(f"{name}/{place}", *upstream(place)) for place in range(number)]


IDS = {"p": "7", **{f"a/{place}": f"10_{place}" for place in range(4)}, **{f"b/{n}": f"20_{n}" for n in range(2)}}
SIZES = {"7": 1, "10": 4, "20": 2}


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ([job("x")], [(1, None)]),
        ([job("x", "p")], [(1, "afterok:7")]),
        (elements("x", 3), [(3, None)]),
        (elements("x", 3, lambda _: ("p",)), [(3, "afterok:7")]),
        # Its own element of an array of the same size.
        (elements("x", 4, lambda place: (f"a/{place}",)), [(4, "aftercorr:10")]),
        (elements("x", 4, lambda place: ("p", f"a/{place}")), [(4, "afterok:7,aftercorr:10")]),
        # The same elements in another order are no correspondence.
        (elements("x", 4, lambda place: (f"a/{3 - place}",)), [(1, f"afterok:10_{3 - n}") for n in range(4)]),
        # A smaller array: one group per element.
        (elements("x", 4, lambda place: (f"b/{place // 2}",)), [(2, "afterok:20_0"), (2, "afterok:20_1")]),
        (elements("x", 2, lambda place: (f"a/{place}",)), [(1, "afterok:10_0"), (1, "afterok:10_1")]),
        # Whole arrays by their number.
        ([job("x", *(f"a/{n}" for n in range(4)))], [(1, "afterok:10")]),
        (elements("x", 2, lambda _: tuple(f"a/{n}" for n in range(4))), [(2, "afterok:10")]),
        (elements("x", 2, lambda _: ("b/0", "b/1")), [(2, "afterok:20")]),
        ([job("x", "a/1", "a/2", "p")], [(1, "afterok:10_1:10_2:7")]),
        # Both kinds at once, and jobs that are done, which have no id.
        (
            elements("x", 4, lambda place: (f"a/{place}", f"b/{place % 2}")),
            [(1, f"afterok:10_{n}:20_{n % 2}") for n in range(4)],
        ),
        ([job("x", "done", "p")], [(1, "afterok:7")]),
        ([job("x/0", "done"), job("x/1", "p")], [(1, None), (1, "afterok:7")]),
    ],
)
def test_dependencies_of_arrays(jobs: list[Job], expected: list[tuple[int, str | None]]) -> None:
    found = arrays(jobs, IDS, SIZES)
    assert [(len(array.jobs), array.dependency) for array in found] == expected
    assert sorted(each.name for array in found for each in array.jobs) == sorted(each.name for each in jobs)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 90),
        ("90:00", 90),
        ("90:01", 91),
        ("0:30", 1),
        ("24:00:00", 1440),
        ("1:02:03", 63),
        ("2-3", 2 * 1440 + 180),
        ("2-03:04", 2 * 1440 + 184),
        ("2-03:04:05", 2 * 1440 + 185),
    ],
)
def test_minutes_of_a_time_as_sbatch_takes_it(time: str, expected: int) -> None:
    Slurm(time=time)
    assert minutes(time) == expected


# What a user can get wrong

FROM = "command: poserelay prepare, overrides: {images: x}"
PREPARE = f"{{{FROM}}}"


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, *arguments: str) -> str:
    file = tmp_path / "graph.yaml"
    file.write_text(text, encoding="utf-8")
    argv = ["--config", str(file), "--cluster", "local", "--run_dir", str(tmp_path / "run")]
    assert main([*argv, *arguments]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    message = shown.err.strip()
    assert 1 <= len(message.splitlines()) <= 2, message
    assert message.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.yaml"], "nothing is written"
    return message


@pytest.mark.parametrize(
    ("stages", "arguments", "expected"),
    [
        (
            "a: {command: poserelay prepare, after: [b]}\nb: {command: poserelay prepare, after: [a]}",
            (),
            ["a -> b -> a is a cycle", "`after`"],
        ),
        ("a: {command: poserelay prepare, overrides: {images: '${a}'}}", (), ["a -> a is a cycle"]),
        (
            f"train: {PREPARE}\nb: {{command: poserelay prepare, after: [trian]}}",
            (),
            ["stage b", "'trian'", "did you mean 'train'?"],
        ),
        (f"train: {PREPARE}\nb: {{overrides: {{images: '${{trai}}'}}}}", (), ["stage b", "'trai'", "'train'"]),
        (f"a: {PREPARE}", ("--a.annotations", "${b}/x"), ["stage a", "no stage 'b'", "choose from a"]),
        (
            "a: {command: poserelay prepair}",
            (),
            ["stage a", "'poserelay prepair'", "poserelay prepare, poserelay select"],
        ),
        ("prepare: {}", (), ["stage prepare", "no command 'prepare'", "set its `command`"]),
        (f"a: {{{FROM}, sweep: {{qualty: [1]}}}}", (), ["stage a", "'qualty'", "did you mean 'quality'?"]),
        (
            "finetune: {config: finetune/configs/demo.yaml, sweep: {labels.ration: [0.1]}}",
            (),
            ["stage finetune", "'labels.ration'", "'labels.ratio'"],
        ),
        (
            "finetune: {config: finetune/configs/none.yaml}",
            (),
            ["stage finetune", "none.yaml: no such file", "give the path"],
        ),
        ("finetune: {config: finetune}", (), ["stage finetune", "config finetune: no such file"]),
        (f"a: {{{FROM}, sweep: {{quality: [1, high]}}}}", (), ["stage a (quality=high)", "'quality'", "int"]),
        (
            "a: {command: poserelay prepare, overrides: {images: x, quality: 0}}",
            (),
            ["stage a: quality is 0", "at least 1"],
        ),
        ("a: {command: poserelay prepare}", (), ["stage a", "required", "images"]),
        (f"launch: {PREPARE}", (), ["'launch' cannot name a stage"]),
        (f"collect: {PREPARE}", (), ["'collect' cannot name a stage"]),
        (f"cluster: {PREPARE}", (), ["'cluster' cannot name a stage"]),
        (f"a/b: {PREPARE}", (), ["'a/b' cannot name a stage", "letters"]),
        (f"..: {PREPARE}", (), ["'..' cannot name a stage"]),
        (f"1: {PREPARE}", (), ["1 cannot name a stage"]),
        (
            "a: {command: pretrain, overrides: {run_dir: x}}",
            (),
            ["stage a", "run_dir is chosen by the launcher", "leave it out"],
        ),
        (
            "a: {command: poserelay prepare, overrides: {images: x, out: y}}",
            (),
            ["stage a", "out is chosen by the launcher"],
        ),
        (f"a: {PREPARE}", ("--a.out", "y"), ["stage a", "out is chosen by the launcher"]),
        ("a: {command: poserelay prepare, overrides: {config: x}}", (), ["stage a", "the stage's own `config`"]),
        (
            "a: {command: poserelay prepare, overrides: {images: x, quality: 3}, sweep: {quality: [1]}}",
            (),
            ["stage a", "quality is swept and set"],
        ),
        (f"a: {{{FROM}, sweep: {{quality: [1, 2]}}}}", ("--a.quality", "3"), ["stage a", "quality is swept and set"]),
        (f"a: {{{FROM}, sweep: {{quality: []}}}}", (), ["stage a", "sweep 'quality' has no values"]),
        (f"a: {{{FROM}, sweep: {{quality: 3}}}}", (), ["graph.yaml:3", "'stages.a.sweep'", "list"]),
        (f"a: {{{FROM}, sweep: {{quality: [1, 1]}}}}", (), ["stage a", "a value twice"]),
        (
            f"a: {{{FROM}, sweep: {{'quality, workers': [[1, 2], [3]]}}}}",
            (),
            ["stage a", "2 fields together", "[3]", "give lists of 2"],
        ),
        (f"a: {{{FROM}, sweep: {{'quality, workers': [ab]}}}}", (), ["stage a", "'ab'", "give lists of 2"]),
        (f"a: {{{FROM}, sweep: {{'quality, workers': [[1, 2]], workers: [1]}}}}", (), ["stage a", "two axes"]),
        ("a: {command: poserelay prepare, sweep: }", (), ["stage a", "sweep is empty"]),
        ("a: {command: poserelay prepare, overrides: {on: 1}}", (), ["stage a", "True is no name", "quotes"]),
        ("a: {command: poserelay prepare, resources: {gpu: 1}}", (), ["stage a: resources", "'gpu'", "'gpus'"]),
        ("a: {command: poserelay prepare, resources: {gpus: many}}", (), ["stage a: resources", "int", "many"]),
        ("a: {command: poserelay prepare, resources: {processes: 2}}", (), ["stage a", "runs as one process"]),
        ("a: {command: poserelay prepare, slurm: {partion: x}}", (), ["stage a: slurm", "'partion'", "'partition'"]),
        ("a: {command: poserelay prepare, slurm: {time: 24:00:00}}", (), ["stage a: slurm", "quotes", "86400"]),
        ("a: {command: poserelay prepare, slurm: {time: soon}}", (), ["stage a: slurm", "'soon'", "HH:MM:SS"]),
        (
            "a: {command: poserelay prepare, slurm: {extra: {dependency: x}}}",
            (),
            ["stage a: slurm", "dependency is set by the launcher"],
        ),
        (
            f"a: {PREPARE}\nb: {{command: poserelay prepare, overrides: {{images: '${{a'}}}}",
            (),
            ["stage b", "'${a'", "write ${stage}"],
        ),
        (
            f"a: {PREPARE}\nb: {{command: poserelay prepare, overrides: {{images: '${{a.x/y}}'}}}}",
            (),
            ["stage b", "write ${stage}"],
        ),
        (
            f"a: {PREPARE}\nb: {{command: poserelay prepare, overrides: {{images: '${{a.net2}}'}}}}",
            (),
            ["stage b", "exports no weights", "write ${a}"],
        ),
        (
            "a: {command: poserelay select, overrides: {checkpoint: c, images: p, count: 3}}\n"
            "b: {command: poserelay prepare, overrides: {images: '${a}/labels.json'}}",
            (),
            ["stage b", "${a} is the file chosen.json", "write ${a.run_dir}/labels.json"],
        ),
        (f"a: {PREPARE}", ("--a.quality",), ["--a.quality: its value is missing"]),
        (f"a: {PREPARE}", ("--a.qualty", "3"), ["stage a", "'qualty'", "'quality'"]),
        (f"a: {PREPARE}", ("--b.quality", "3"), ["no stage or option 'b'", "the stages are a"]),
        (f"a: {PREPARE}", ("--resources", "{gpu: 1}"), ["gpu"]),
        ("a: {comand: poserelay prepare}", (), ["graph.yaml:3", "'stages.a.comand'"]),
        ("a: {command: poserelay prepare, after: b}", (), ["graph.yaml:3", "'stages.a.after'", "list"]),
    ],
)
def test_mistakes_in_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stages: str, arguments: tuple[str, ...], expected: list[str]
) -> None:
    text = "run_dir: x\nstages:\n" + "".join(f"  {line}\n" for line in stages.splitlines())
    message = refused(tmp_path, capsys, text, *arguments)
    for part in expected:
        assert part in message, message
    if not arguments:
        assert "graph.yaml" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stages: {}", ["stages is empty"]),
        ("run_dir: x", ["required", "stages"]),
        (f"resources: {{gpu: 1}}\nstages: {{a: {PREPARE}}}", ["graph.yaml:1", "'resources.gpu'", "'resources.gpus'"]),
        (f"resources: {{gpus: 2, processes: 4}}\nstages: {{a: {PREPARE}}}", ["one per GPU"]),
        (f"slurm: {{time: 24:00:00}}\nstages: {{a: {PREPARE}}}", ["slurm.time", "quotes", "24:00:00"]),
        (f"slurm: {{signal_delay: 0}}\nstages: {{a: {PREPARE}}}", ["slurm.signal_delay is 0"]),
        (f"local: {{gpus: [0, 0]}}\nstages: {{a: {PREPARE}}}", ["local.gpus is [0, 0]"]),
        (f"local: {{jobs: 0}}\nstages: {{a: {PREPARE}}}", ["local.jobs is 0"]),
        (f"max_requeues: -1\nstages: {{a: {PREPARE}}}", ["max_requeues is -1"]),
        (f"stages: {{a: {PREPARE}, a: {PREPARE}}}", ["graph.yaml:1", "'stages.a' is given twice"]),
        ("- a", ["graph.yaml", "expected fields"]),
        ("stages: [", ["graph.yaml", "not valid YAML"]),
        ("", ["graph.yaml", "nothing"]),
    ],
)
def test_mistakes_beside_the_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: list[str]
) -> None:
    message = refused(tmp_path, capsys, text)
    for part in expected:
        assert part in message, message


TWO = {
    "a": {"command": "poserelay prepare", "overrides": {"images": "x"}, "sweep": {"quality": [1, 2]}},
    "b": {"command": "poserelay prepare", "overrides": {"images": "${a}"}},
}


def test_a_linked_axis_matches_an_upstream_one_of_a_part_of_its_fields(tmp_path: Path) -> None:
    stages = {"a": TWO["a"], "b": {**TWO["b"], "sweep": {"workers, quality": [[3, 2], [4, 1], [5, 2]]}}}
    file = tmp_path / "graph.yaml"
    file.write_text(yaml.safe_dump({"run_dir": "x", "stages": stages}))
    config = parse(LaunchConfig, ["--config", str(file)], "launch", references=True)
    jobs = {job.name: job.upstream for job in build_graph(config, {}, tmp_path).jobs}
    assert jobs == {
        "a/quality=1": [],
        "a/quality=2": [],
        "b/workers=3": ["a/quality=2"],
        "b/workers=4": ["a/quality=1"],
        "b/workers=5": ["a/quality=2"],
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"b": {"sweep": {"quality": [2, 3]}}}, ["stage b", "quality over 3", "stage a does not have", "[1, 2]"]),
        (
            {"b": {"sweep": {"quality": [2, 1]}}, "c": {**TWO["b"], "overrides": {"images": "${a}/${b}"}}},
            ["stage c", "different values", "[2, 1]", "give c a sweep of quality"],
        ),
        (
            {"b": {"sweep": {"quality, workers": [[1, 1], [3, 1]]}}},
            ["stage b", "quality over 3", "stage a does not have", "[1, 2]"],
        ),
        # A field that is swept with another upstream and alone here would be multiplied with itself.
        (
            {"a": {"sweep": {"quality, workers": [[1, 1], [2, 1]]}}, "b": {"sweep": {"quality": [1, 2]}}},
            ["stage b", "quality is in two axes", "'quality, workers'"],
        ),
    ],
)
def test_axes_that_do_not_match(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: list[str]
) -> None:
    stages = {name: {**TWO.get(name, {}), **changes.get(name, {})} for name in [*TWO, *changes]}
    message = refused(tmp_path, capsys, yaml.safe_dump({"run_dir": "x", "stages": stages}, sort_keys=False))
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize("run_dir", ["", ".", "finetune/runs", "launch"])
def test_a_launch_does_not_go_into_the_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run_dir: str
) -> None:
    monkeypatch.chdir(ROOT)
    message = refused(tmp_path, capsys, f"stages: {{a: {PREPARE}}}\nrun_dir: x\n", "--run_dir", run_dir)
    assert "run_dir" in message
    assert "name another" in message


def test_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "/none/graph.yaml"]) == 2
    assert "/none/graph.yaml: No such file" in capsys.readouterr().err
    assert main(["--cluster", "local"]) == 2
    assert "required: run_dir, stages" in capsys.readouterr().err


def test_a_dry_run_prints_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no Slurm, too
    file = tmp_path / "graph.yaml"
    stages = {**TWO, "b": {**TWO["b"], "slurm": {"partition": "high", "time": "90:30"}}}
    file.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "stages": stages}))
    assert main(["--config", str(file), "--dry_run", "--a.quality_unknown=1"]) == 2
    capsys.readouterr()
    assert main(["--config", str(file), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"4 jobs in {tmp_path / 'run'} on slurm" in shown
    assert "  waits for  a/quality=1\n" in shown
    assert "#SBATCH --partition=high\n" in shown
    assert "#SBATCH --time=91\n" in shown
    assert "#SBATCH --dependency=aftercorr:a/quality=1\n" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["graph.yaml"]


def test_without_slurm_the_local_cluster_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refused(tmp_path, capsys, f"stages: {{a: {PREPARE}}}\nrun_dir: x\n", "--cluster", "slurm")
    assert "sbatch is not on this machine" in message
    assert "--cluster local" in message
