"""Boxes: torchvision's own pipeline, conversions by hand, and the command with a detector that goes by colours."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.ops import MultiScaleRoIAlign, box_convert

from evaluation.predict import read_boxes
from poserelay import detection
from poserelay.__main__ import main
from poserelay.config import DetectConfig
from poserelay.datasets.coco import read_coco, read_detections, read_image_list
from poserelay.datasets.unlabelled_persons import read_images
from poserelay.detection import DETECTORS, build_detector, find_persons, locked
from poserelay.errors import UserError
from poserelay.keypoints import load_skeleton

from .processes import kill, start

SMALLEST = "fasterrcnn_mobilenet_v3_large_320_fpn"
POOL = MultiScaleRoIAlign(["0", "1", "pool"], output_size=1, sampling_ratio=2)
# Fewer pixels, and a box head of a fiftieth of the weights.
TINY = {"min_size": 64, "max_size": 96, "box_detections_per_img": 20, "box_roi_pool": POOL}


class Colours(nn.Module):
    """A detector whose answer depends on nothing but the picture: a person, a bicycle and a likelier person."""

    def __init__(self, before: Callable[[int], None] = lambda seen: None) -> None:
        super().__init__()
        self.seen = 0
        self.before = before

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.before(self.seen)
        self.seen += len(images)
        return [self.answer(image) for image in images]

    @staticmethod
    def answer(image: Tensor) -> dict[str, Tensor]:
        red, green, _ = image.mean((1, 2)).tolist()
        boxes = [[1, 2, 3 + red, 4], [0, 0, 9, 9], [green, 0.5, 20, 30]]
        return {
            "boxes": torch.tensor(boxes),
            "labels": torch.tensor([1, 2, 1]),
            "scores": torch.tensor([red / 2, 0.99, 0.5 + green / 2]),
        }


def paint(path: Path, size: tuple[int, int], seed: int, **fields: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(path, **fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures of several sizes, one of them turned by its EXIF tag."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(10):
        fields = {} if number else {"exif": exif}
        paint(tmp_path / f"in/{'ab'[number % 2]}/{number}.jpg", (40 + number, 30), number, **fields)
    return tmp_path / "in"


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> Colours:
    network = Colours()
    monkeypatch.setattr(detection, "build_detector", lambda *_: network)
    return network


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    fixed = ("--workers", "0", "--threads", "1", "--device", "cpu")
    return ["detect", "--images", str(folder), "--out", str(out), *fixed, *more]


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.parent.iterdir())}


# Boxes


def test_conversion_by_hand() -> None:
    """xyxy to xywh, persons only, likelier ones first, boxes without area left out; the network sees 0..1."""
    seen: list[Tensor] = []

    def network(images: list[Tensor]) -> list[dict[str, Tensor]]:
        seen.extend(images)
        first = {
            "boxes": torch.tensor([[0.5, 1, 4, 8], [10, 20, 30.126, 60], [1, 1, 2, 2], [5, 5, 5.001, 9], [7, 7, 9, 8]]),
            "labels": torch.tensor([1, 1, 3, 1, 1]),
            "scores": torch.tensor([0.25, 0.875, 1.0, 0.6, 0.25]),
        }
        return [first, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}]

    fake: Any = nn.Module()
    fake.forward = network
    pictures = [torch.full((3, 60, 50), 51, dtype=torch.uint8), torch.zeros(3, 20, 90, dtype=torch.uint8)]
    first, second = find_persons(fake, pictures)
    assert first == ([60, 50], [[10, 20, 20.13, 40], [0.5, 1, 3.5, 7], [7, 7, 2, 1]], [0.875, 0.25, 0.25])
    assert second == ([20, 90], [], [])
    assert [image.shape for image in seen] == [(3, 60, 50), (3, 20, 90)]
    assert torch.equal(seen[0], torch.full((3, 60, 50), 0.2))
    assert find_persons(fake, []) == []


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights of the smallest detector, which sees persons."""
    torch.manual_seed(0)
    network: Any = DETECTORS[SMALLEST].build(weights=None, weights_backbone=None, **TINY)
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.bias[1] += 4
    return network.state_dict()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest detector at fewer pixels than its published size."""
    smaller = DETECTORS[SMALLEST]._replace(build=partial(DETECTORS[SMALLEST].build, **TINY))
    monkeypatch.setitem(DETECTORS, SMALLEST, smaller)


@pytest.mark.usefixtures("tiny")
def test_boxes_are_those_of_torchvisions_own_pipeline(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights named as in torchvision's file of 2021, which the constructor of torchvision loads by itself."""
    old: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            renamed = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
            for block in ("inner_blocks", "layer_blocks"):
                parts = renamed.split(f"{block}.")
                renamed = f"{block}.".join([parts[0], *(part[:2] + part[4:] for part in parts[1:])])
            old[renamed] = value
    assert {"rpn.head.conv.weight", "backbone.fpn.inner_blocks.0.weight"} <= set(old)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(old))
    weights = DETECTORS[SMALLEST].weights
    peer = DETECTORS[SMALLEST].build(weights=weights).eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    with torch.inference_mode():
        (found,) = peer([weights.transforms()(picture)])
    person = found["labels"] == 1
    assert person.sum() > 3

    picture.save(tmp_path / "a.png")
    save_file(state, tmp_path / "w.safetensors")
    image = detection._Stored([tmp_path / "a.png"])[0]
    assert isinstance(image, Tensor)
    for file in (None, str(tmp_path / "w.safetensors")):
        network = build_detector(SMALLEST, file, 0.05)
        (ours,) = find_persons(network, [image])
        assert ours.size == [48, 80]
        expected = box_convert(found["boxes"][person], "xyxy", "xywh")
        torch.testing.assert_close(torch.tensor(ours.boxes), expected, atol=0.02, rtol=0)
        torch.testing.assert_close(torch.tensor(ours.scores), found["scores"][person], atol=2e-5, rtol=0)
        # Among others of its size, to which nothing is padded, a picture is as alone.
        both = find_persons(network, [image.flip(2), image])
        torch.testing.assert_close(torch.tensor(both[1].boxes), torch.tensor(ours.boxes), atol=0.05, rtol=0)


def test_detectors_are_those_of_the_published_weights() -> None:
    assert set(DETECTORS) == set(get_args(get_type_hints(DetectConfig)["detector"]))
    for name, detector in DETECTORS.items():
        with torch.device("meta"):
            network: Any = detector.build(weights=None, weights_backbone=None, **{detector.threshold: 0.125})
        assert getattr(network, "roi_heads", network).score_thresh == 0.125
        assert detector.weights.meta["categories"][detection.PERSON] == "person"
        # Where the published network's batch norms are frozen their weights do not count as parameters.
        norms = sum(2 * m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d) and name == SMALLEST)
        count = sum(parameter.numel() for parameter in network.parameters())
        assert detector.weights.meta["num_params"] == count - norms


def test_weights_of_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Linear(2, 3)
    monkeypatch.setitem(DETECTORS, SMALLEST, DETECTORS[SMALLEST]._replace(build=lambda **_: network))
    good = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}

    def refused(saved: dict[str, Any], match: str) -> None:
        torch.save(saved, tmp_path / "w.pth")
        with pytest.raises(UserError, match=match):
            build_detector(SMALLEST, str(tmp_path / "w.pth"), 0.05)

    torch.save({"model": good, "epoch": 25}, tmp_path / "w.pth")  # as torchvision's training script does
    assert build_detector(SMALLEST, str(tmp_path / "w.pth"), 0.05) is network
    assert torch.equal(network.weight, good["weight"])
    named = rf"w\.pth: do not fit {SMALLEST}: missing bias; unexpected head\.w; name the --detector .*retinanet"
    refused({"weight": good["weight"], "head.w": torch.ones(1)}, named)
    refused({**good, "bias": torch.ones(2)}, r"do not fit .*: bias is \[2\], expected \[3\]; name the --detector")
    refused({**good, "bias": "text"}, "While copying the parameter named .bias.")
    refused({**good, "bias": torch.full((3,), torch.nan)}, "bias holds NaN or infinity")
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"w\.pth: not a readable PyTorch file"):
        build_detector(SMALLEST, str(tmp_path / "w.pth"), 0.05)


def test_without_internet_the_remedy_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        assert socket.getdefaulttimeout() == detection.DOWNLOAD_SECONDS
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    assert main(arguments(folder, tmp_path / "out/d.json")) == 2
    assert socket.getdefaulttimeout() is None
    printed = capsys.readouterr()
    assert printed.out == ""
    url = DETECTORS["fasterrcnn_resnet50_fpn_v2"].weights.url
    cache = tmp_path / "home/hub/checkpoints" / url.rpartition("/")[2]
    assert "Name or service not known" in printed.err
    assert (
        f"fetch {url} on a machine with internet access, and give it as --weights or put it at {cache}" in printed.err
    )
    with pytest.raises(UserError, match="and give it as --detector_weights or put it at"):
        build_detector("fasterrcnn_resnet50_fpn_v2", None, 0.5, "--detector_weights")
    cache.write_bytes(b"half")
    assert main(arguments(folder, tmp_path / "out/d.json")) == 2
    assert "in place of a damaged one" in capsys.readouterr().err


# The command


@pytest.mark.usefixtures("colours")
def test_a_folder_becomes_unlabelled_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out/d.json"
    assert main(arguments(folder, out)) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "detect: 20 persons in 10 of 10 pictures, scored above 0.05\n" in printed.err
    assert set(written(out)) == {"d.json", "d.meta.json", "d.images.json"}
    images = tmp_path / "out/d.images.json"
    names = [f"a/{number}.jpg" for number in range(0, 10, 2)] + [f"b/{number}.jpg" for number in range(1, 10, 2)]
    assert read_image_list(images) == names
    listed = json.loads(images.read_text())
    for number, image in enumerate(listed["images"], start=1):
        stored = Image.open(folder / image["file_name"])  # not turned, as crops are cut from the stored pixels
        assert (image["id"], image["width"], image["height"]) == (number, *stored.size)
    # As `semi` reads them, and `evaluation predict`.
    found = read_detections(out, read_images(images, load_skeleton("coco17")))
    assert found.skipped == 0
    assert found.image_index.tolist() == [index for index in range(10) for _ in range(2)]
    for index, name in enumerate(names):
        pixels = np.asarray(Image.open(folder / name), np.float64) / 255
        red, green, _ = pixels.mean((0, 1))
        expected = [[green, 0.5, 20 - green, 29.5], [1, 2, 2 + red, 2]]
        np.testing.assert_allclose(found.boxes[2 * index : 2 * index + 2], expected, atol=0.01)
        np.testing.assert_allclose(found.scores[2 * index : 2 * index + 2], [0.5 + green / 2, red / 2], atol=0.002)
    assert [(name, id_, box) for name, id_, box, _ in read_boxes(str(out))] == [
        (names[index], int(index) + 1, box.tolist()) for index, box in zip(found.image_index, found.boxes, strict=True)
    ]


@pytest.mark.usefixtures("colours")
def test_the_pictures_of_a_coco_file_keep_its_ids(folder: Path, tmp_path: Path) -> None:
    images = [
        {"id": id_, "file_name": name, "width": 40, "height": 30} for id_, name in ((70, "b/3.jpg"), (4, "a/2.jpg"))
    ]
    categories = [{"id": 1, "name": "dog"}, {"id": 7, "name": "child", "keypoints": ["nose"]}]
    file = tmp_path / "a.json"
    box = {"id": 1, "image_id": 4, "category_id": 7, "bbox": [1, 2, 3, 4]}
    file.write_text(json.dumps({"images": images, "annotations": [box], "categories": categories}))
    out = tmp_path / "out/d.json"
    assert main(arguments(folder, out, "--annotations", str(file))) == 0
    assert set(written(out)) == {"d.json", "d.meta.json"}
    found = json.loads(out.read_text())
    assert [(record["image_id"], record["category_id"]) for record in found] == [(70, 7), (70, 7), (4, 7), (4, 7)]
    assert read_detections(out, read_coco(file)).skipped == 0
    # A list of images alone is read as if of COCO's person, whatever its categories.
    file.write_text(json.dumps({"images": images, "categories": categories}))
    out = tmp_path / "out/e.json"
    assert main(arguments(folder, out, "--annotations", str(file))) == 0
    assert read_detections(out, read_images(file, load_skeleton("coco17"))).image_index.tolist() == [0, 0, 1, 1]


def test_a_finished_list_is_left_alone_and_another_refused(
    folder: Path, tmp_path: Path, colours: Colours, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out/d.json"
    assert main(arguments(folder, out)) == 0
    os.utime(out, (1, 1))
    before = written(out)
    assert main(arguments(folder, out, "--max_unreadable", "0.5")) == 0
    assert (colours.seen, out.stat().st_mtime, written(out)) == (10, 1, before)

    def refused(*more: str, words: str) -> None:
        capsys.readouterr()
        assert main(arguments(folder, out, *more)) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert (colours.seen, written(out)) == (10, before)

    refused("--score_threshold", "0.1", words="other pictures or fields (score_threshold: 0.05 -> 0.1); name another")
    refused("--detector", SMALLEST, words="detector: fasterrcnn_resnet50_fpn_v2 -> fasterrcnn_mobilenet")
    refused("--batch_size", "2", words="batch_size: 1 -> 2")
    refused("--weights", str(tmp_path / "absent.pth"), words="absent.pth: cannot be read: No such file")
    refused("--out", str(tmp_path / "d"), words="expected a name that ends in .json")
    refused("--images", str(tmp_path / "out"), words="out: no picture in it")
    refused("--images", str(tmp_path / "absent"), words="absent: no such folder")
    foreign = tmp_path / "foreign.json"
    foreign.write_text("[]")
    refused("--out", str(foreign), words="exists and is no list of detections of ours")
    paint(folder / "c.jpg", (40, 30), 11)
    refused(words="pictures: 10 -> 11")


@pytest.mark.parametrize(("number", "batch"), [(signal.SIGTERM, 1), (signal.SIGINT, 3), (signal.SIGUSR2, 1)])
def test_interrupted_and_started_again(
    folder: Path,
    tmp_path: Path,
    colours: Colours,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    batch: int,
) -> None:
    """Exit 75; the second start looks only at what is left, and gives the same bytes."""
    command = partial(arguments, folder)
    sized = ("--batch_size", str(batch))
    whole, cut = tmp_path / "whole/d.json", tmp_path / "cut/d.json"
    assert main(command(whole, *sized)) == 0

    def stop(seen: int) -> None:
        if seen == 13:
            os.kill(os.getpid(), number)

    colours.before = stop
    assert main(command(cut, *sized)) == 75
    assert f"{cut}: {number.name}; what is done is kept" in capsys.readouterr().err
    assert set(written(cut)) == {"d.partial.jsonl"}
    seen = colours.seen
    assert main(command(cut, *sized)) == 0
    assert colours.seen - seen == 20 - seen < 10
    assert written(cut) == written(whole)


def test_killed_and_started_again(folder: Path, tmp_path: Path, colours: Colours) -> None:
    whole, cut = tmp_path / "whole/d.json", tmp_path / "cut/d.json"
    assert main(arguments(folder, whole)) == 0

    def stay(seen: int) -> None:
        if seen == 16:
            (tmp_path / "reached").touch()
            time.sleep(60)

    colours.before = stay
    process = start(main, arguments(folder, cut), tmp_path / "log")
    wait_for(tmp_path / "reached")
    with pytest.raises(UserError, match=r"d\.partial\.jsonl: another process is at work on it"), locked_of(cut):
        pass
    kill(process)
    colours.before = lambda seen: None
    with open(tmp_path / "cut/d.partial.jsonl", "rb+") as file:
        rows = file.readlines()
        assert len(rows) == 1 + 6
        file.seek(-20, os.SEEK_END)
        file.truncate()  # the last row torn, as by a machine that stopped
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    assert main(arguments(folder, cut)) == 0
    assert colours.seen == 10 + 5
    assert written(cut) == written(whole)
    # Pictures that came meanwhile do not undo what is done.
    paint(folder / "c.jpg", (40, 30), 11)
    assert main(arguments(folder, tmp_path / "other/d.json")) == 0
    assert colours.seen == 15 + 6


def wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.005)


def locked_of(out: Path) -> Any:
    return locked(detection.partial_path(out))


def test_the_unfinished_list_of_another_detector_is_refused(
    folder: Path, tmp_path: Path, colours: Colours, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where it has looked at nothing yet: such a file stays where, say, the weights could not be fetched."""
    out = tmp_path / "out/d.json"
    colours.before = lambda seen: os.kill(os.getpid(), signal.SIGTERM) if seen == 4 else None
    out.parent.mkdir()
    detection.partial_path(out).write_text('{"detector": "another"}\n')
    assert main(arguments(folder, out)) == 75
    assert main(arguments(folder, out, "--score_threshold", "0.2")) == 2
    assert "d.partial.jsonl: the unfinished list is of another detector (score_threshold: 0.05 -> 0.2)" in (
        capsys.readouterr().err
    )


def test_unreadable_pictures_are_left_out_and_looked_at_once_mended(
    folder: Path, tmp_path: Path, colours: Colours, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole/d.json", tmp_path / "cut/d.json"
    assert main(arguments(folder, whole)) == 0
    mended = (folder / "b/7.jpg").read_bytes()
    (folder / "b/7.jpg").write_bytes(mended[:300])
    assert main(arguments(folder, cut)) == 3
    error = capsys.readouterr().err
    assert f"warning: left out: {folder / 'b/7.jpg'}: the file is truncated" in error
    assert "1 of 10 pictures are unreadable (named above); repair or remove them, or raise max_unreadable" in error
    shutil.copytree(tmp_path / "cut", tmp_path / "short")
    short = tmp_path / "short/d.json"
    assert main(arguments(folder, short, "--max_unreadable", "0.1")) == 0
    assert f"18 persons in 9 of 10 pictures, scored above 0.05; 1 unreadable left out, see {tmp_path}" in (
        capsys.readouterr().err
    )
    assert "b/7.jpg" not in read_image_list(tmp_path / "short/d.images.json")
    assert json.loads((tmp_path / "short/d.meta.json").read_text())["unreadable"] == ["b/7.jpg"]
    assert [r for r in json.loads(whole.read_text()) if r["file_name"] != "b/7.jpg"] == json.loads(short.read_text())
    (folder / "b/7.jpg").write_bytes(mended)
    seen = colours.seen
    assert main(arguments(folder, cut)) == 0
    assert colours.seen - seen == 2  # it, and the one after it
    assert written(cut) == written(whole)


def test_a_line_is_no_picture_for_a_detector(tmp_path: Path, colours: Colours) -> None:
    paint(tmp_path / "in/line.png", (1, 101), 0)
    paint(tmp_path / "in/strip.png", (1, 100), 0)
    assert main(arguments(tmp_path / "in", tmp_path / "out/d.json", "--max_unreadable", "0.5")) == 0
    assert colours.seen == 1
    (tmp_path / "in/strip.png").unlink()
    assert main(arguments(tmp_path / "in", tmp_path / "out/e.json", "--max_unreadable", "1")) == 3


def test_workers_change_nothing(folder: Path, tmp_path: Path, colours: Colours) -> None:
    assert main(arguments(folder, tmp_path / "one/d.json")) == 0
    assert main([*arguments(folder, tmp_path / "two/d.json"), "--workers", "1"]) == 0
    assert written(tmp_path / "one/d.json") == written(tmp_path / "two/d.json")
    assert colours.seen == 20
    names = {field.name for field in dataclasses.fields(DetectConfig)}
    assert {"workers", "device", "threads"} & set(
        json.loads((tmp_path / "one/d.meta.json").read_text())
    ) & names == set()
