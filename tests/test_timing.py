"""Times of the parts by a clock that is read off beforehand; what is timed gives the results of evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import timing
from evaluation.__main__ import main
from evaluation.config import TimingConfig
from poserelay.checkpoint import describe, write_export
from poserelay.command import parse, to_plain
from poserelay.config import Decoding, InputConfig, ModelConfig, Named
from poserelay.datasets.coco import read_coco, read_detections
from poserelay.errors import UserError
from poserelay.inference import predict_dataset, to_results
from poserelay.keypoints import load_skeleton
from poserelay.model import build_model, load_model

DECODINGS = [
    Decoding("parabola", blur=1, flip_shift=0.4, nms="fuse", nms_threshold=0.1),
    Decoding("quarter", flip=False),
    Decoding("paraboloid", nms="soft", nms_threshold=0.5, rescore_threshold=0.0),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random weights with peaks all over its maps."""
    torch.manual_seed(0)
    skeleton = load_skeleton("coco17")
    config = ModelConfig(
        Named("timm", {"model": "test_resnet"}),
        Named("simple", {"deconv_channels": [8, 8]}),
        skeleton="coco17",
        input=InputConfig(height=64, width=64),
    )
    model = build_model(config, skeleton)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    described = describe(
        stage="finetune", method="", model=to_plain(config), skeleton=skeleton, config={}, upstream=None, metrics={}
    )
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    write_export(file, model.state_dict(), described)
    return file


@pytest.fixture
def arguments(checkpoint: Path, people: Path) -> dict[str, Any]:
    """The fields that have no default, and what keeps the test small."""
    files = {"annotations": str(people / "annotations.json"), "images": str(people / "images")}
    return {"checkpoint": str(checkpoint), **files, "count": 20, "batch_size": 8, "workers": 0, "device": "cpu"}


@pytest.fixture
def detections(people: Path, tmp_path: Path) -> Path:
    """Two boxes for every person, so that poses overlap, none of them in the order of the images."""
    persons = json.loads((people / "annotations.json").read_text())["annotations"]
    category = {"category_id": persons[0]["category_id"]}
    boxes = [
        {**category, "image_id": person["image_id"], "bbox": [x + moved, y, w, h], "score": 0.9 - moved / 10}
        for moved in (0, 3)
        for person in reversed(persons)
        for x, y, w, h in [person["bbox"]]
    ]
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(boxes))
    return path


def flags(fields: dict[str, Any]) -> list[str]:
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in fields.items()]


@pytest.mark.parametrize("boxes", ["gt", "detections"])
def test_what_is_timed_gives_the_results_of_evaluation(arguments: dict[str, Any], detections: Path, boxes: str) -> None:
    chosen = "gt" if boxes == "gt" else str(detections)
    config = TimingConfig(**arguments, boxes=chosen, decodings=DECODINGS)
    annotations = read_coco(config.annotations)
    found = None if boxes == "gt" else read_detections(chosen, annotations)
    model = load_model(config.checkpoint)
    dataset = timing.first_persons(annotations, found, model, config)
    assert 16 < len(dataset) <= 20  # a last batch that is not full
    persons = timing.read_persons(dataset, model, config)
    for decoding in DECODINGS:
        times, kept = timing.timed_pass(model, persons, decoding)
        expected = predict_dataset(model, dataset, decoding, config.batch_size)
        assert to_results(kept, annotations.category["id"]) == expected
        assert min(times) > 0
        if boxes == "detections" and decoding.nms == "fuse":
            assert len(expected) < len(dataset)


def test_each_part_is_timed_by_itself_and_the_first_run_left_out(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that the parts move: the network 1 s a batch, decoding 10 s, the NMS 100 s, and scoring 1000 s the first
    time, 2000 s the second, ..."""
    clock, scored = [0.0], count(1)

    def moving(name: str, seconds: Callable[[], float]) -> None:
        function = getattr(timing, name)

        def moves(*given: Any) -> Any:
            clock[0] += seconds()
            return function(*given)

        monkeypatch.setattr(timing, name, moves)

    moving("forward_crops", lambda: 1)
    moving("decode_crops", lambda: 10)
    moving("suppress", lambda: 100)
    moving("oks_metrics", lambda: 1000 * next(scored))
    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])
    config = TimingConfig(**arguments, decodings=DECODINGS[:2])
    report = timing.main(config)
    persons = report["protocol"]["persons"]
    batches = -(-persons // config.batch_size)
    # They take turns: runs 1 and 2 are thrown away, then 3, 5, 7 are the first's and 4, 6, 8 the second's.
    for times, mean in zip(report["metrics"].values(), (5000, 6000), strict=True):
        assert times["forward"] == {"mean": pytest.approx(1000 * batches / persons), "std": 0}
        assert times["coordinates"] == {"mean": pytest.approx(1000 * (10 * batches + 100) / persons), "std": 0}
        expected = {"mean": 1000 * mean / persons, "std": 1000 * 2000 / persons}
        assert times["evaluation"] == pytest.approx(expected)


def test_the_report(arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {**arguments, "decodings": [to_plain(decoding) for decoding in DECODINGS[:2]], "threads": 1}
    assert main(["timing", *flags(given), "--repeats", "2", "--out", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "timing.json").read_text()) == report
    names = ["parabola, blur 1.0, flip_shift 0.4, nms fuse, nms_threshold 0.1", "quarter, flip False"]
    assert list(report["metrics"]) == names
    values = [part["mean"] for parts in report["metrics"].values() for part in parts.values()]
    assert len(values) == 6
    assert min(values) > 0
    protocol = report["protocol"]
    assert protocol["decodings"] == dict(zip(names, given["decodings"], strict=True))
    expected = {"boxes": "gt", "batch_size": 8, "repeats": 2, "skeleton": "coco17", "input": "64x64"}
    assert protocol.items() >= {**expected, "heatmap": "8x8", "threads": 1, "torch": torch.__version__}.items()
    assert protocol["device"]

    assert main(["timing", *flags(arguments), "--repeats", "1"]) == 0
    header, row, below = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "ms per person"
    assert row.split()[0] == "quarter"
    assert len(row.split()) == 4  # one run has no deviation
    assert "repeats 1" in below
    report["metrics"] = {"quarter": {part: {"mean": 1.25, "std": 0.5} for part in timing.PARTS}}
    assert timing.format_table(report).splitlines()[1].split() == ["quarter", *["1.250", "±", "0.500"] * 3]


@pytest.mark.parametrize("boxes", ["gt", "detections"])
def test_whole_images_are_taken_until_the_count(arguments: dict[str, Any], detections: Path, boxes: str) -> None:
    annotations = read_coco(arguments["annotations"])
    found = None if boxes == "gt" else read_detections(detections, annotations)
    model = load_model(arguments["checkpoint"])
    all_of = annotations.image_index[annotations.persons] if found is None else found.image_index
    for wanted in (1, 2, 3, 13, len(all_of), 10**6):
        taken: list[int] = []
        for image in range(len(annotations.image_ids)):
            its = [row for row, of in enumerate(all_of) if of == image]
            if len(taken) + len(its) > wanted:
                taken = taken or its[:wanted]
                break
            taken += its
        dataset = timing.first_persons(annotations, found, model, TimingConfig(**{**arguments, "count": wanted}))
        expected = annotations.crop_boxes(annotations.persons) if found is None else found.boxes
        assert dataset.boxes.tolist() == expected[sorted(taken)].tolist()


def test_decodings_in_a_file_and_on_the_command_line(arguments: dict[str, Any], tmp_path: Path) -> None:
    config = TimingConfig(**arguments, decodings=DECODINGS)
    file = tmp_path / "timing.yaml"
    file.write_text(yaml.safe_dump(to_plain(config)))
    typed = "[{refine: parabola, blur: 1, flip_shift: 0.4, nms: fuse, nms_threshold: 0.1}, {flip: false}]"
    assert parse(TimingConfig, ["--config", str(file)], "evaluation timing") == config
    changed = parse(TimingConfig, ["--config", str(file), "--decodings", typed], "evaluation timing")
    assert changed.decodings == DECODINGS[:2]
    assert parse(TimingConfig, flags(arguments), "evaluation timing").decodings == [Decoding()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decodings": [{"refine": "parabola", "blurr": 1}]}, "unknown field 'blurr'"),
        ({"decodings": [{"refine": "parabol"}]}, "Got value: parabol"),
        ({"decodings": [{"blur": -1}]}, "decoding.blur is -1.0"),
        ({"decodings": {"nms": "fuse"}}, "Expected a list"),
        ({"decodings": []}, "decodings is empty"),
        ({"decodings": [{"blur": 1}, {"blur": 2}, {"blur": 1.0}]}, "decodings: number 3 is also given before"),
        ({"count": 0}, "count is 0, expected at least 1"),
        ({"repeats": 0}, "repeats is 0, expected at least 1"),
        ({"checkpoint": "absent.safetensors"}, "absent.safetensors"),
        ({"annotations": "absent.json"}, "absent.json: cannot be read"),
        ({"images": "absent"}, "absent: cannot list this image folder"),
        ({"boxes": "absent.json"}, "absent.json: cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    arguments: dict[str, Any], changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["timing", *flags({**arguments, **changes})]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_file_without_persons(arguments: dict[str, Any], tmp_path: Path) -> None:
    data = json.loads(Path(arguments["annotations"]).read_text())
    file = tmp_path / "nobody.json"
    file.write_text(json.dumps({**data, "annotations": []}))
    with pytest.raises(UserError, match=r"nobody\.json: no person with a labelled joint"):
        timing.main(TimingConfig(**{**arguments, "annotations": str(file)}))


@settings(max_examples=50, deadline=None)
@given(*2 * [st.builds(Decoding, blur=st.sampled_from([0, 1, 1.5]), flip_shift=st.sampled_from([None, 0.0, 1.0]))])
def test_labels_tell_decodings_apart(first: Decoding, second: Decoding) -> None:
    assert (timing.label(first) == timing.label(second)) == (first == second)


def test_the_processor_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CPUINFO", tmp_path / "cpuinfo")
    assert timing.device_name(torch.device("cpu"))
    timing.CPUINFO.write_text("processor\t: 0\nmodel name\t: A Chip @ 2 GHz\nprocessor\t: 1\nmodel name\t: A Chip\n")
    assert timing.device_name(torch.device("cpu")) == "A Chip @ 2 GHz"
