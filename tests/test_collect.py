"""The table of an experiment: means and spreads by hand, what is kept apart, what is missing, what the curves show."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from launch.__main__ import main
from launch.collect import collect, collect_run
from launch.config import Local, Resources, Slurm
from launch.curves import curve_axis, plot_curves
from launch.graph import Job
from launch.plan import Plan, write_plan
from launch.table import format_markdown
from poserelay.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = {"split": "val", "boxes": "gt", "flip": True, "rescoring": None}


class Experiment:
    """Jobs with what they wrote."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.jobs: list[Job] = []

    def add(self, stage: str, command: str, axes: Mapping[str, Any], upstream: tuple[Job, ...] = ()) -> Job:
        name = f"{stage}/{sum(job.stage == stage for job in self.jobs)}"
        waits = [job.name for job in upstream]
        job = Job(name, stage, command, dict(axes), str(self.run / name), waits, Resources(), Slurm())
        self.jobs.append(job)
        return job

    def test(self, axes: Mapping[str, Any], metrics: Mapping[str, Any] | None, **protocol: Any) -> Job:
        """An evaluation; `metrics` None: not done."""
        job = self.add("evaluate", "evaluation test", axes)
        if metrics is not None:
            write(Path(job.folder) / "metrics.json", {"metrics": metrics, "protocol": {**PROTOCOL, **protocol}})
        return job

    def write(self) -> Path:
        write_plan(
            Plan(
                run=self.run,
                cluster="slurm",
                graph="graph.yaml",
                commit=None,
                code="",
                max_requeues=1,
                local=Local(),
                jobs=self.jobs,
            )
        )
        return self.run


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(tmp_path / "run")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def cells(markdown: str) -> list[dict[str, str]]:
    """Rows of the first Markdown table."""
    block = next(block for block in markdown.split("\n\n") if block.startswith("|"))
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def drawn_lines(figure: Figure, panel: int = 0) -> list[tuple[list[float], list[float]]]:
    """x and y of the curves with error bars."""
    curves: list[Any] = [bars.lines[0] for bars in error_bars(figure, panel)]
    return [(list(curve.get_xdata()), list(curve.get_ydata())) for curve in curves]


def error_bars(figure: Figure, panel: int = 0) -> list[Any]:
    return list(figure.axes[panel].containers)


def test_mean_and_sample_deviation_of_uneven_seeds(experiment: Experiment) -> None:
    for ratio, values in ((0.1, (0.4, 0.5, 0.6)), (0.3, (0.7, 0.9)), (1.0, (0.8,))):
        for seed, value in enumerate(values):
            experiment.test({"labels.ratio": ratio, "seed": seed}, {"AP": value})
    table = collect(experiment.jobs)
    found = [(row.axes, row.summary("AP").mean, row.summary("AP").std, row.summary("AP").n) for row in table.rows]
    assert found == [
        ({"labels.ratio": 0.1}, pytest.approx(0.5), pytest.approx(0.1), 3),
        ({"labels.ratio": 0.3}, pytest.approx(0.8), pytest.approx(0.02**0.5), 2),
        ({"labels.ratio": 1.0}, 0.8, None, 1),
    ]
    rows = cells(format_markdown(table))
    assert [(row["labels.ratio"], row["n"], row["AP"]) for row in rows] == [
        ("0.1", "3", "0.500 ± 0.100"),
        ("0.3", "2", "0.800 ± 0.141"),
        ("1.0", "1", "0.800"),
    ]


def test_the_files_agree_with_numpy_and_with_each_other(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = np.random.default_rng(0).uniform(0, 1, (2, 3, 4, 2))
    for method, count, seed in np.ndindex(2, 3, 4):
        axes = {"init_from": [None, "a,b|c"][method], "labels.count": [10, 20, 40][count], "seed": seed}
        ap, pck = draws[method, count, seed].tolist()
        experiment.test(axes, {"AP": ap, "PCK": pck, "PCK/nose": pck})
    run = experiment.write()
    collect_run(run, json_only=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run / "collect" / "table.json").read_text(encoding="utf-8"))
    assert printed["protocols"] == [{"number": 1, "protocol": PROTOCOL}]
    assert printed["missing"] == []
    with open(run / "collect" / "table.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(printed["rows"]) == 2 * 3 * 3
    for line, row in zip(lines, printed["rows"], strict=True):
        images = row["axes"]["labels.count"]
        method, count = [None, "a,b|c"].index(row["axes"]["init_from"]), [10, 20, 40].index(images)
        wanted = draws[method, count, :, 0 if row["metric"] == "AP" else 1]
        assert (row["mean"], row["std"]) == pytest.approx((wanted.mean(), wanted.std(ddof=1)))
        assert [(one["seeds"], one["value"]) for one in row["values"]] == [({"seed": s}, wanted[s]) for s in range(4)]
        assert line["init_from"] == ["null", "a,b|c"][method]
        assert (line["labels.count"], line["metric"], line["protocol"]) == (str(images), row["metric"], "1")
        assert [float(line[name]) for name in ("mean", "std", "n", "expected")] == [row["mean"], row["std"], 4, 4]
        assert json.loads(line["values"]) == row["values"]
    markdown = (run / "collect" / "table.md").read_text(encoding="utf-8")
    assert "a,b\\|c" in markdown
    assert "AP" in cells(markdown)[0]
    assert "PCK/nose" not in cells(markdown)[0], "joints have a table of their own"
    assert "PCK/nose" in markdown
    assert (run / "collect" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_field_named_seed_is_a_seed_and_no_other(experiment: Experiment) -> None:
    for seed in (0, 1):
        for labels_seed in (0, 1):
            for other in (1, 2):
                axes = {"seed": seed, "labels.seed": labels_seed, "views.seeds": other}
                experiment.test(axes, {"AP": seed + 10 * labels_seed + 100 * other})
    table = collect(experiment.jobs)
    assert [(row.axes, row.expected, row.summary("AP").mean) for row in table.rows] == [
        ({"views.seeds": 1}, 4, 105.5),
        ({"views.seeds": 2}, 4, 205.5),
    ]
    assert table.rows[0].summary("AP").values[2][0].seeds == {"seed": 1, "labels.seed": 0}


def test_different_protocols_are_never_averaged(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (value, flip) in enumerate(((0.2, True), (0.6, False), (0.4, True))):
        experiment.test({"labels.ratio": 0.1, "seed": seed}, {"AP": value}, flip=flip)
    table = collect_run(experiment.write())
    captured = capsys.readouterr()
    assert [(row.protocol, row.summary("AP").mean, row.summary("AP").n, row.expected) for row in table.rows] == [
        (1, pytest.approx(0.3), 2, 3),
        (2, 0.6, 1, 3),
    ]
    assert "protocols 1 and 2 (flip true / false)" in captured.err
    assert "labels.ratio=0.1" in captured.err
    assert [row["n"] for row in cells(captured.out)] == ["2 of 3", "1 of 3"]
    assert [row["protocol"] for row in cells(captured.out)] == ["1", "2"]
    assert "- protocol 2: split val, boxes gt, flip false, rescoring null" in captured.out
    assert captured.out.count("- protocol") == 2


def test_the_order_of_a_protocols_fields_makes_no_other_protocol(experiment: Experiment) -> None:
    for seed in (0, 1):
        job = experiment.add("evaluate", "evaluation test", {"seed": seed})
        protocol = dict(sorted(PROTOCOL.items(), reverse=bool(seed)))
        write(Path(job.folder) / "metrics.json", {"metrics": {"AP": 0.5}, "protocol": protocol})
    table = collect(experiment.jobs)
    assert [row.summary("AP").n for row in table.rows] == [2]
    assert table.protocols == [PROTOCOL]


def test_what_is_missing_is_named_and_the_rest_kept(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    experiment.test({"labels.ratio": 0.1, "seed": 0}, {"AP": 0.25})
    absent = experiment.test({"labels.ratio": 0.1, "seed": 1}, None)
    experiment.test({"labels.ratio": 0.1, "seed": 2}, {"AP": 0.75})
    torn = experiment.test({"labels.ratio": 0.5, "seed": 0}, {})
    (Path(torn.folder) / "metrics.json").write_text('{"metrics": {"AP": 0.', encoding="utf-8")
    collect_run(experiment.write())
    out = capsys.readouterr().out
    rows = cells(out)
    assert [(row["labels.ratio"], row["n"], row["AP"]) for row in rows] == [
        ("0.1", "2 of 3", "0.500 ± 0.354"),
        ("0.5", "0 of 1", "-"),
    ]
    missing = json.loads((experiment.run / "collect" / "table.json").read_text(encoding="utf-8"))["missing"]
    assert [job["name"] for job in missing] == [absent.name, torn.name]
    assert missing[0]["reason"] == "not done"
    assert str(Path(torn.folder) / "metrics.json") in missing[1]["reason"]
    assert f"- {absent.name}: not done" in out


@pytest.mark.parametrize(
    "content",
    [
        {"metrics": {"AP": "0.5"}, "protocol": {}},
        {"metrics": {"AP": True}, "protocol": {}},
        {"metrics": {"AP": float("nan")}, "protocol": {}},
        {"metrics": {"AP": 0.5}, "protocol": {"nms": float("inf")}},
        {"metrics": {"AP": 0.5}},
        {"metrics": [0.5], "protocol": {}},
        [],
    ],
)
def test_a_damaged_file_is_a_missing_job(experiment: Experiment, content: Any) -> None:
    job = experiment.test({}, None)
    write(Path(job.folder) / "metrics.json", content)
    table = collect(experiment.jobs)
    assert [missing.name for missing in table.missing] == [job.name]
    assert "metrics.json: not what `evaluation test` writes" in table.missing[0].reason
    assert table.protocols == []


def test_an_undefined_metric_is_missing_and_not_zero(experiment: Experiment) -> None:
    experiment.test({"seed": 0}, {"AP": 0.2, "PCK": 0.5, "APm": -1.0})
    experiment.test({"seed": 1}, {"AP": None, "PCK": 0.7, "APm": -1.0})
    experiment.test({"seed": 2}, {"AP": 0.4, "PCK": 0.6, "APm": None})
    table = collect(experiment.jobs)
    (row,) = table.rows
    assert (row.summary("AP").mean, row.summary("AP").n) == (pytest.approx(0.3), 2)
    assert (row.summary("PCK").mean, row.summary("PCK").n) == (pytest.approx(0.6), 3)
    assert (row.summary("APm").mean, row.summary("APm").std, row.summary("APm").n) == (None, None, 0)
    (line,) = cells(format_markdown(table))
    assert line == {
        "stage": "evaluate",
        "n": "3",
        "AP": "0.300 ± 0.141 (n = 2)",
        "PCK": "0.600 ± 0.100",
        "protocol": "1",
    }


def test_axes_that_were_swept_together_are_columns_of_their_own(experiment: Experiment) -> None:
    for ratio, epochs in ((0.1, 300), (1.0, 30)):
        for seed in (0, 1):
            axes = {"labels.ratio, optim.epochs": [ratio, epochs], "seed, labels.seed": [seed, seed + 5]}
            experiment.test(axes, {"AP": ratio + seed / 100})
    table = collect(experiment.jobs)
    assert [row.axes for row in table.rows] == [
        {"labels.ratio": 0.1, "optim.epochs": 300},
        {"labels.ratio": 1.0, "optim.epochs": 30},
    ]
    assert [one.seeds for one in table.rows[0].measured] == [
        {"seed": 0, "labels.seed": 5},
        {"seed": 1, "labels.seed": 6},
    ]
    figure = plot_curves(table, "labels.ratio")
    assert drawn_lines(figure) == [(pytest.approx([0.1, 1.0]), pytest.approx([0.105, 1.005]))], "one line, not two"
    assert "each labels.ratio has its own optim.epochs" in figure.get_supxlabel()


def test_axes_that_do_not_match_their_values_are_refused(experiment: Experiment) -> None:
    experiment.test({"labels.ratio, optim.epochs": [0.1, 300, 7]}, {"AP": 0.5})
    with pytest.raises(UserError, match=r"evaluate/0: axis 'labels.ratio, optim.epochs' .* a list of 2"):
        collect(experiment.jobs)


def test_validation_figures_only_where_no_evaluation_follows(experiment: Experiment) -> None:
    first, second = (experiment.add("finetune", "finetune", {"seed": seed}) for seed in (0, 1))
    pretraining = experiment.add("pretrain", "pretrain", {})
    waiting = experiment.add("probe", "pretrain linear", {})
    experiment.add("evaluate", "evaluation test", {"seed": 0}, (first,))
    for job, value in ((first, 0.9), (second, 0.7)):
        metrics = {"AP": value, "step": 500, "protocol": {"split": "small", "export": "best"}}
        write(Path(job.folder) / "done.json", {"stage": "finetune", "metrics": metrics})
    write(Path(pretraining.folder) / "done.json", {"stage": "pretrain", "metrics": {}})
    table = collect(experiment.jobs)
    assert [(row.stage, row.source, row.expected, row.summary("AP").mean) for row in table.rows] == [
        ("evaluate", "evaluation", 1, None),
        ("finetune", "own validation", 1, 0.7),
    ]
    assert table.metrics == ["AP"], "the step of an export is no metric"
    assert table.protocols == [{"split": "small", "export": "best"}]
    assert [job.name for job in table.missing] == ["evaluate/0", waiting.name]
    assert [row["stage"] for row in cells(format_markdown(table))] == ["evaluate", "finetune (own validation)"]


def test_the_command(experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment.test({"seed": 0}, {"AP": 0.5}, flip=True)
    experiment.test({"seed": 1}, {"AP": 0.5}, flip=False)
    run = experiment.write()
    assert main(["collect", str(run)]) == 0
    assert cells(capsys.readouterr().out)[0]["AP"] == "0.500"
    assert main(["collect", str(run), "--json"]) == 0
    assert [row["mean"] for row in json.loads(capsys.readouterr().out)["rows"]] == [0.5, 0.5], "one object and no more"
    assert main(["collect", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{tmp_path}: no launch here" in captured.err
    assert not (tmp_path / "collect").exists()


def test_an_axis_named_like_a_column_keeps_its_own(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    for metric in ("oks", "pck"):
        experiment.test({"metric": metric}, {"AP": 0.5})
    collect_run(experiment.write())
    text = (experiment.run / "collect" / "table.csv").read_text(encoding="utf-8")
    assert [(line["axes.metric"], line["metric"]) for line in csv.DictReader(text.splitlines())] == [
        ("oks", "AP"),
        ("pck", "AP"),
    ]


def test_curves_show_means_spreads_seeds_and_the_baseline(experiment: Experiment) -> None:
    values = {"mscl": {0.01: (0.3, 0.4), 0.1: (0.5, 0.7), None: (0.8,)}, "random": {0.01: (0.1,), 0.1: (0.2,)}}
    for init, by_ratio in values.items():
        for ratio, found in by_ratio.items():
            for seed, value in enumerate(found):
                axes = {"init_from": f"/runs/{init}/export/model.safetensors", "labels.ratio": ratio, "seed": seed}
                experiment.test(axes, {"AP": value, "mean pose AP": 0.05, "PCK": None})
    table = collect(experiment.jobs)
    assert curve_axis(table) == "labels.ratio"
    figure = plot_curves(table, "labels.ratio")
    (panel,) = figure.axes  # PCK has nothing to show
    (xs, ys), (_, others) = drawn_lines(figure)
    assert ys == pytest.approx([0.35, 0.6, 0.8])
    assert others == pytest.approx([0.1, 0.2])
    assert xs == pytest.approx([0.01, 0.1, 1.0], rel=0.05), "null is all the images"
    assert panel.get_xscale() == "log"
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1 %", "10 %", "100 %"]
    first, second, single = error_bars(figure)[0].lines[2][0].get_segments()
    assert len(single) == 0, "one value has no spread"
    assert [first[:, 1].tolist(), second[:, 1].tolist()] == [
        pytest.approx([0.35 - 0.05 * 2**0.5, 0.35 + 0.05 * 2**0.5]),
        pytest.approx([0.6 - 0.1 * 2**0.5, 0.6 + 0.1 * 2**0.5]),
    ]
    lines: list[Any] = list(panel.lines)
    dots = [y for line in lines if line.get_marker() == "." for y in line.get_ydata()]
    assert sorted(dots) == sorted(value for by in values.values() for found in by.values() for value in found)
    assert [line.get_ydata()[0] for line in lines if line.get_linestyle() == "--"] == [0.05]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["init_from=mscl (n = 1 to 2)", "init_from=random (n = 1)", "mean pose"]


def test_curves_never_join_two_protocols(experiment: Experiment) -> None:
    for count, flip in ((10, True), (20, True), (40, False), (80, False)):
        experiment.test({"labels.count": count}, {"AP": count / 100, "PCK": 0.5}, flip=flip)
    figure = plot_curves(collect(experiment.jobs), "labels.count")
    assert len(figure.axes) == 2
    assert [ys for _, ys in drawn_lines(figure)] == [pytest.approx([0.1, 0.2]), pytest.approx([0.4, 0.8])]


def test_all_images_stand_apart_on_a_scale_of_counts(experiment: Experiment) -> None:
    for count, value in ((1000, 0.4), (5000, 0.5), (None, 0.6)):
        experiment.test({"labels.count": count}, {"AP": value})
    figure = plot_curves(collect(experiment.jobs), "labels.count")
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1,000", "5,000", "all"]
    joined, apart = drawn_lines(figure)
    assert (joined[1], apart[1]) == ([0.4, 0.5], [0.6])
    assert apart[0][0] > 5000


def test_null_chooses_nothing_where_another_field_does(experiment: Experiment) -> None:
    for ratio, count in ((0.1, None), (0.2, None), (None, 500)):
        experiment.test({"labels.ratio, labels.count": [ratio, count]}, {"AP": 0.5})
    ((xs, _),) = drawn_lines(plot_curves(collect(experiment.jobs), "labels.ratio"))
    assert xs == pytest.approx([0.1, 0.2]), "500 images are not all"


def test_no_curves_without_two_measured_values(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    experiment.test({"labels.ratio": 0.1, "model.width": 1}, {"AP": 0.5})
    experiment.test({"labels.ratio": 0.1, "model.width": 2}, {"AP": 0.6})
    experiment.test({"labels.ratio": 0.3, "model.width": 2}, {"AP": None})
    experiment.test({"labels.ratio": 0.5, "model.width": 2}, None)
    run = experiment.write()
    (run / "collect").mkdir()
    (run / "collect" / "curves.png").write_bytes(b"of an earlier state")
    assert curve_axis(collect_run(run)) is None
    assert not (run / "collect" / "curves.png").exists()
    assert "curves.png" not in capsys.readouterr().err


def test_collecting_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, launch.collect; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
