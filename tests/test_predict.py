"""Videos, patterns, detectors and what cannot be read; pictures and boxes are in test_evaluation.py."""

from __future__ import annotations

import functools
import json
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from evaluation import predict
from evaluation.__main__ import main
from evaluation.config import PredictConfig
from evaluation.predict import Persons, Picture, ahead, in_batches
from evaluation.video import Frame, VideoReader, VideoWriter
from poserelay.checkpoint import describe, write_export
from poserelay.command import to_plain
from poserelay.config import Decoding, InputConfig, ModelConfig, Named, WholeImages
from poserelay.detection import DETECTORS, build_detector, find_persons
from poserelay.drawing import draw_poses
from poserelay.errors import CheckFailed, UserError
from poserelay.keypoints import load_skeleton
from poserelay.model import SingleStageModel, build_model, load_model
from poserelay.whole_images import predict_whole

from .test_evaluation_cir import export_single_stage

SKELETON = load_skeleton("coco17")
FRAMES, FPS = 11, 23.976
HEIGHT, WIDTH = 72, 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights with peaks all over the heatmaps."""
    torch.manual_seed(0)
    head = Named("simple", {"deconv_channels": [8, 8, 8]})
    config = ModelConfig(Named("timm", {"model": "test_resnet"}), head, None, "coco17", InputConfig(32, 32))
    network = build_model(config, SKELETON)
    for parameter in network.head.parameters():
        nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    origin: dict[str, Any] = {"stage": "finetune", "method": "simple", "config": {}, "upstream": None, "metrics": {}}
    write_export(path, network.state_dict(), describe(model=to_plain(config), skeleton=SKELETON, **origin))
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def _loaded_once() -> Iterator[None]:
    """What the tests are about begins with the model in memory."""
    load, verify = functools.cache(predict.load_predictor), predict.verify_handoff
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "load_predictor", lambda files: load(tuple(files)))
        patch.setattr(predict, "verify_handoff", functools.cache(verify))
        yield


@pytest.fixture(scope="module")
def walk(people: Path) -> np.ndarray:
    """`[T, H, W, 3]` RGB: rendered people moved across another rendered picture."""
    background, person = (cv2.imread(str(people / "images" / f"00000{number}.jpg")) for number in (0, 1))
    assert background is not None
    assert person is not None
    frames = []
    for step in range(FRAMES):
        frame = background[:HEIGHT].copy()
        frame[6:66, 4 * step : 4 * step + 50] = person[20:80, 20:70]
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    return np.stack(frames)


@pytest.fixture(scope="module")
def film(walk: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The walk in both of the containers, walk.mp4 and walk.avi."""
    folder = tmp_path_factory.mktemp("film")
    for name, codec in (("walk.mp4", "mp4v"), ("walk.avi", "MJPG")):
        write_film(folder / name, walk, codec)
    return folder


def write_film(path: Path, frames: np.ndarray, codec: str, fps: float = FPS, backend: int = cv2.CAP_ANY) -> None:
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), backend, cv2.VideoWriter.fourcc(*codec), fps, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def decoded(path: Path) -> list[np.ndarray]:
    """BGR frames by OpenCV alone."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (found := capture.read())[0]:
        frames.append(found[1])
    return frames


def run(model: str, images: Path | str | list[str], out: Path, **changes: Any) -> list[dict[str, Any]]:
    given = {"checkpoint": model, "images": images if isinstance(images, list) else str(images), "out": str(out)}
    return predict.main(PredictConfig(**{**given, "joint_threshold": -100.0, "device": "cpu", "threads": 1, **changes}))


def write(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def boxes_of(frames: int) -> list[dict[str, Any]]:
    """Two persons in some frames, one or none in others."""
    boxes = [{"image_id": t, "bbox": [4 * t, 6, 50, 60], "score": 0.9} for t in range(frames) if t % 4]
    return boxes + [{"image_id": t, "bbox": [1, 2, 30, 50], "score": 0.5} for t in range(frames) if t % 3 == 1]


def joints_of(records: list[dict[str, Any]]) -> np.ndarray:
    return np.array([record["keypoints"] for record in records])


@pytest.mark.parametrize("with_boxes", [True, False])
def test_a_video_gives_what_its_frames_give_as_pictures(
    model: str, film: Path, tmp_path: Path, with_boxes: bool
) -> None:
    """In batches over several frames and one by one; the frames as OpenCV alone decodes them."""
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(decoded(film / "walk.mp4")):
        cv2.imwrite(str(tmp_path / f"frames/{number:03d}.png"), frame)
    names = [{**box, "file_name": f"{box['image_id']:03d}.png"} for box in boxes_of(FRAMES)]
    names.sort(key=lambda box: box["file_name"])
    of_frames = write(tmp_path / "f.json", boxes_of(FRAMES)) if with_boxes else None
    of_pictures = write(tmp_path / "p.json", names) if with_boxes else None
    found = run(model, film / "walk.mp4", tmp_path / "video", boxes=of_frames, batch_size=4)
    alone = run(model, tmp_path / "frames", tmp_path / "pictures", boxes=of_pictures, batch_size=1)
    assert json.loads((tmp_path / "video/predictions.json").read_text()) == found
    assert len(found) == (len(boxes_of(FRAMES)) if with_boxes else FRAMES)
    assert [f"{record['frame']:03d}.png" for record in found] == [record["file_name"] for record in alone]
    assert [record["image_id"] for record in found] == [record["frame"] for record in found]
    np.testing.assert_allclose(joints_of(found), joints_of(alone), atol=1e-3)
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in alone], rtol=1e-4)
    if not with_boxes:
        assert {tuple(record["bbox"]) for record in found} == {(0, 0, WIDTH, HEIGHT)}


def test_the_drawn_video_keeps_rate_size_and_frames(model: str, film: Path, tmp_path: Path) -> None:
    """Each frame is the drawing of its own poses, up to the codec; a frame without a box stays as it was."""
    results = run(model, film / "walk.mp4", tmp_path, boxes=write(tmp_path / "boxes.json", boxes_of(FRAMES)))
    capture = cv2.VideoCapture(str(tmp_path / "walk.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(FPS, abs=1e-3)
    drawn, originals = decoded(tmp_path / "walk.mp4"), decoded(film / "walk.mp4")
    assert [frame.shape for frame in drawn] == [(HEIGHT, WIDTH, 3)] * FRAMES
    for number, (frame, original) in enumerate(zip(drawn, originals, strict=True)):
        own = [record for record in results if record["frame"] == number]
        triples = joints_of(own).reshape(-1, 17, 3)
        scores = np.array([record["score"] for record in own])
        given = (triples[..., :2], triples[..., 2], SKELETON)
        expected = draw_poses(original[..., ::-1], *given, threshold=-100, confidence=True, pose_scores=scores)
        lost = np.abs(expected[..., ::-1].astype(int) - frame).mean()
        assert lost < 7
        assert (lost < 0.8 * np.abs(original.astype(int) - frame).mean()) == bool(own)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "boxes.json",
        "overview.jpg",
        "predictions.json",
        "walk.mp4",
    ]


def test_a_single_stage_model_on_a_video_and_on_pictures_of_several_sizes(film: Path, tmp_path: Path) -> None:
    """In batches what each gives alone: no picture is padded to the size of another."""
    model = str(export_single_stage(tmp_path / "model.safetensors"))
    loaded, decoding = load_model(model), Decoding(whole=WholeImages(max_poses=3))
    assert isinstance(loaded, SingleStageModel)
    (tmp_path / "in").mkdir()
    frames = [np.ascontiguousarray(frame[..., ::-1]) for frame in decoded(film / "walk.mp4")]
    pictures = [frames[0], frames[1][:60], frames[2][:60], frames[3][:, :50], frames[4]]
    for number, picture in enumerate(pictures):
        cv2.imwrite(str(tmp_path / f"in/{number}.png"), picture[..., ::-1])
    for source, images in ((film / "walk.mp4", frames), (tmp_path / "in", pictures)):
        found = run(model, source, tmp_path / "out", batch_size=4, decoding=decoding)
        first = 0 if source.suffix else 1
        for number, image in enumerate(images):
            own = [record for record in found if record["image_id"] == number + first]
            alone = predict_whole(loaded, [np.ascontiguousarray(image)], decoding)
            assert len(alone) == len(own) > 0
            np.testing.assert_allclose(joints_of(own), joints_of(alone), atol=1e-2)
    with pytest.raises(UserError, match="a single-stage model finds the persons itself; leave detector out"):
        run(model, film / "walk.mp4", tmp_path / "out", detector="retinanet_resnet50_fpn_v2")


def test_plain_drawings_leave_scores_and_opacity_out(model: str, film: Path, tmp_path: Path) -> None:
    image = decoded(film / "walk.mp4")[0]
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (record,) = run(model, tmp_path / "a.png", tmp_path / "out", show_confidence=False)
    triples = np.reshape(record["keypoints"], (1, 17, 3))
    plain = draw_poses(image[..., ::-1], triples[..., :2], triples[..., 2], SKELETON, threshold=-100)
    cv2.imwrite(str(tmp_path / "plain.jpg"), plain[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    assert (tmp_path / "out/pictures/a.png.jpg").read_bytes() == (tmp_path / "plain.jpg").read_bytes()


def damaged(film: Path, out: Path, frames: tuple[int, ...]) -> Path:
    """A copy of walk.avi whose frames hold zeros in place of a JPEG."""
    data = bytearray((film / "walk.avi").read_bytes())
    starts = [place for place in range(data.index(b"movi"), len(data)) if data.startswith(b"00dc", place)]
    for frame in frames:
        length = int.from_bytes(data[starts[frame] + 4 : starts[frame] + 8], "little")
        data[starts[frame] + 8 : starts[frame] + 8 + length] = bytes(length)
    out.write_bytes(data)
    return out


@pytest.mark.parametrize("lost", [(4,), (0, 1, 6)])
def test_unreadable_frames_are_named_and_the_rest_keeps_its_place(
    model: str, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: tuple[int, ...]
) -> None:
    whole = run(model, film / "walk.avi", tmp_path / "whole")
    capsys.readouterr()
    video = damaged(film, tmp_path / "walk.avi", lost)
    found = run(model, video, tmp_path / "out", max_unreadable=0.5, batch_size=3)
    missing = sorted(set(range(FRAMES)) - {record["frame"] for record in found})
    assert missing == list(lost)
    kept = [record for record in whole if record["frame"] not in missing]
    assert [record["frame"] for record in found] == [record["frame"] for record in kept]
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if "left out" in line]
    assert lines == [f"warning: left out: {video}: frame {frame} cannot be decoded" for frame in missing]
    assert len(errors) == len(lost) + 1  # and the summary; FFmpeg says nothing
    drawn = decoded(tmp_path / "out/walk.mp4")
    assert len(drawn) == FRAMES
    assert np.abs(drawn[missing[-1]].astype(int) - drawn[missing[-1] - 1]).mean() < 3  # the one before stands still

    with pytest.raises(CheckFailed, match=rf"{len(lost)} of {FRAMES} frames are unreadable .* the rest is done"):
        run(model, video, tmp_path / "again")
    assert len(json.loads((tmp_path / "again/predictions.json").read_text())) == FRAMES - len(lost)


def test_a_video_that_ends_early_says_so(
    model: str, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (film / "walk.avi").read_bytes()
    (tmp_path / "half.avi").write_bytes(data[: len(data) // 2])
    given = ["predict", "--checkpoint", model, "--images", str(tmp_path / "half.avi"), "--device", "cpu"]
    assert main([*given, "--out", str(tmp_path / "out")]) == 3
    read = len(decoded(tmp_path / "half.avi"))
    assert 0 < read < FRAMES
    error = capsys.readouterr().err
    assert f"the video announces {FRAMES} frames and ends after {read}" in error
    assert f"stopped: {FRAMES - read} of {FRAMES} frames are unreadable" in error
    assert len(decoded(tmp_path / "out/half.mp4")) == read
    assert main([*given, "--out", str(tmp_path / "out"), "--max_unreadable", "0.9"]) == 0


def test_a_film_turned_by_its_metadata_is_seen_upright(film: Path, tmp_path: Path) -> None:
    """The matrix of the track's header, by the file format: a quarter turn in place of the identity."""
    data = (film / "walk.mp4").read_bytes()
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    start = data.index(identity, data.index(b"tkhd"))
    (tmp_path / "turned.mp4").write_bytes(data[:start] + quarter + data[start + len(identity) :])
    upright, stored = (list(VideoReader(path).frames()) for path in (tmp_path / "turned.mp4", film / "walk.mp4"))
    assert len(upright) == FRAMES
    for turned, frame in zip(upright, stored, strict=True):
        assert turned.image is not None
        assert frame.image is not None
        np.testing.assert_array_equal(turned.image, np.rot90(frame.image, -1))


@pytest.mark.parametrize(
    ("size", "suffix", "expected"),
    [
        ((31, 46), ".mp4", (32, 46)),
        ((1, 1), ".mp4", (2, 2)),
        ((200, 3), ".mp4", (200, 4)),
        ((4, 9000), ".avi", (4, 9000)),
    ],
)
def test_odd_and_extreme_sizes(tmp_path: Path, size: tuple[int, int], suffix: str, expected: tuple[int, int]) -> None:
    """The next even size, the last pixels repeated; where MPEG-4 cannot, as above 8191 pixels, MJPEG."""
    writer = VideoWriter(tmp_path / "a.mov", 25.0, size)
    for level in (40, 90, 200):
        writer.write(np.full((*size, 3), level, np.uint8))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]
    frames = decoded(tmp_path / f"a{suffix}")
    assert [frame.shape[:2] for frame in frames] == [expected] * 3
    for frame, level in zip(frames, (40, 90, 200), strict=True):
        assert np.abs(frame.astype(int) - level).max() <= 6


def test_a_rate_that_mpeg4_cannot_have_is_written_as_mjpeg(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "fast.mp4", 90000.5, (16, 16))
    assert writer.path.suffix == ".avi"
    writer.write(np.zeros((16, 16, 3), np.uint8))
    writer.close()
    assert len(decoded(tmp_path / "fast.avi")) == 1


def test_a_video_takes_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 25.0, (16, 16))
    writer.write(np.zeros((16, 16, 3), np.uint8))
    assert not (tmp_path / "a.mp4").exists()
    writer.discard()
    assert list(tmp_path.iterdir()) == []
    writer = VideoWriter(tmp_path / "a.mp4", 25.0, (16, 16))
    writer.write(np.zeros((16, 16, 3), np.uint8))
    writer.written += 1  # a frame that the disk did not take
    with pytest.raises(UserError, match=r"a\.mp4: of 2 frames 1 have been written"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_middle_leaves_no_half_video(
    model: str, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10))

    def failing(*given: Any) -> Any:
        if next(calls) == 1:
            raise CheckFailed("heatmaps")
        return predict_batch(*given)

    predict_batch = predict.predict_batch
    monkeypatch.setattr(predict, "predict_batch", failing)
    before = threading.active_count()
    with pytest.raises(CheckFailed, match="heatmaps"):
        run(model, film / "walk.mp4", tmp_path / "out", batch_size=2)
    assert [path for path in (tmp_path / "out").iterdir() if path.is_file()] == []
    assert threading.active_count() <= before + 2  # their frames' traceback may still be held


def test_mistakes_about_videos_end_with_exit_2(
    model: str, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "empty.avi").touch()
    (tmp_path / "file").touch()
    late = write(tmp_path / "late.json", [{"image_id": FRAMES, "bbox": [1, 2, 3, 4], "score": 1}])
    named = write(tmp_path / "named.json", [{"file_name": "a", "bbox": [1, 2, 3, 4], "score": 1}])
    odd = write(tmp_path / "odd.json", [{"image_id": "7", "bbox": [1, 2, 3, 4], "score": 1}])
    video = str(film / "walk.mp4")
    for images, out, more, message in (
        (str(tmp_path / "noise.mp4"), "out", [], "noise.mp4: cannot be opened as a video"),
        (str(tmp_path / "empty.avi"), "out", [], "empty.avi: cannot be opened as a video"),
        (str(tmp_path / "none.mp4"), "out", [], "none.mp4: no such file"),
        (f"[{video}, {film}/walk.avi]", "out", [], "walk.mp4: one video at a time"),
        (str(film), "out", [], "no picture in it"),
        (f"{film}/*.avi", "out", [], "*.avi: one video at a time"),
        (video, str(film), [], "would be written over"),
        (f"{film}/walk.avi", str(film), [], "would be written over"),
        (video, "file", [], "file is no folder; name another place"),
        (video, "out", ["--boxes", late], "late.json: no box for a frame of"),
        (video, "out", ["--boxes", named], "named.json: neither COCO (images, annotations) nor a list of {image_id"),
        (video, "out", ["--boxes", odd], "odd.json: record 0: image_id '7' is no frame"),
        (video, "out", ["--boxes", odd, "--detector", "retinanet_resnet50_fpn_v2"], "leave one out"),
        (video, "file/below/it", [], "file is no folder; name another place"),
        (video, "out", ["--box_threshold", "0.5"], "box_threshold is given without boxes or detector"),
        (video, "out", ["--detector_weights", odd], "detector_weights is given without detector"),
        (video, "out", ["--detector", "retinanet_resnet50_fpn_v2", "--detector_weights", odd], "odd.json"),
        (video, "out", ["--batch_size", "0"], "batch_size is 0"),
        ("[]", "out", [], "images is empty"),
    ):
        given = ["predict", "--checkpoint", model, "--images", images, "--device", "cpu"]
        assert main([*given, "--out", str(tmp_path / out), *more]) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") <= 2
        assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in film.iterdir()) == ["walk.avi", "walk.mp4"]


# Pictures


def test_pictures_of_every_kind(model: str, people: Path, tmp_path: Path) -> None:
    """Each is drawn in its upright size, and its poses lie where the same pixels as RGB PNG have them."""
    folder = tmp_path / "in"
    folder.mkdir()
    with Image.open(people / "images/000000.jpg") as opened:
        rgb = opened.convert("RGB").crop((0, 0, 96, 80))
    grey, exif = rgb.convert("L"), Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "a.PNG")
    rgb.save(folder / "b.JPG", quality=95)
    grey.save(folder / "grey.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.convert("P").save(folder / "palette.gif")
    rgb.rotate(90, expand=True).save(folder / "turned.jpeg", exif=exif, quality=95)
    Image.new("RGB", (1, 1), (200, 10, 10)).save(folder / "dot.png")
    Image.new("RGB", (300, 1)).save(folder / "line.png")
    results = {record["file_name"]: record for record in run(model, folder, tmp_path / "out")}
    assert len(results) == 8
    assert results["turned.jpeg"]["bbox"] == [0, 0, 96, 80]
    assert results["dot.png"]["bbox"] == [0, 0, 1, 1]
    assert results["alpha.png"]["keypoints"] == results["a.PNG"]["keypoints"]
    for name, shape in (
        ("b.JPG", (80, 96)),
        ("turned.jpeg", (80, 96)),
        ("dot.png.jpg", (1, 1)),
        ("a.PNG.jpg", (80, 96)),
    ):
        drawn = cv2.imread(str(tmp_path / "out/pictures" / name))
        assert drawn is not None
        assert drawn.shape[:2] == shape
    assert (tmp_path / "out/pictures/line.png.jpg").exists()


def test_unreadable_pictures_are_counted_and_the_rest_is_done(
    model: str, people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    data = (people / "images/000000.jpg").read_bytes()
    for name in ("a.jpg", "c.jpg", "e.jpg"):
        (folder / name).write_bytes(data)
    (folder / "b.jpg").write_bytes(data[: len(data) // 2])
    (folder / "d.png").write_text("no picture")
    given = ["predict", "--checkpoint", model, "--images", str(folder), "--device", "cpu", "--out"]
    assert main([*given, str(tmp_path / "strict")]) == 3
    error = capsys.readouterr().err
    assert "stopped: 2 of 5 pictures are unreadable (see above); the rest is done" in error
    assert main([*given, str(tmp_path / "lenient"), "--max_unreadable", "0.4"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines if str(folder) in line] == ["warning"] * 2
    assert any(f"{folder}/b.jpg: the file is truncated" in line for line in lines)
    for out in ("strict", "lenient"):
        records = json.loads((tmp_path / out / "predictions.json").read_text())
        assert [(record["file_name"], record["image_id"]) for record in records] == [
            ("a.jpg", 1),
            ("c.jpg", 3),
            ("e.jpg", 5),
        ]
        assert len(list((tmp_path / out / "pictures").iterdir())) == 3
    assert main([*given[:4], str(folder / "d.png"), *given[5:], str(tmp_path / "none"), "--max_unreadable", "1"]) == 3
    assert "none of the 1 pictures can be read" in capsys.readouterr().err


def test_patterns_and_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "x/frames/2.jpg",
        "x/frames/10.JPG",
        "x/frames/note.txt",
        "x/b/3.png",
        "y[1]/4.png",
        "x/frames/.5.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def listed(*given: str) -> tuple[Path, list[str]]:
        return predict.list_files(given)

    assert listed("x/frames/*") == (Path("x/frames"), ["10.JPG", "2.jpg"])
    assert listed("x/*/*.jpg") == (Path("x"), ["frames/2.jpg"])
    assert listed("x/**/*.??g") == (Path("x"), ["b/3.png", "frames/2.jpg"])
    assert listed("**/4.png") == (Path(), ["y[1]/4.png"])
    assert listed("y[1]") == (Path("y[1]"), ["4.png"])  # a folder, not a pattern
    assert listed("x/b/3.png") == (Path("x/b"), ["3.png"])
    assert listed("x/frames", "x/b/3.png", "x/frames/2.jpg") == (
        tmp_path / "x",
        ["frames/10.JPG", "frames/2.jpg", "b/3.png"],
    )
    (tmp_path / "x/b/film.AVI").touch()
    capsys.readouterr()
    assert listed("x") == listed("x/**/*.*") == (Path("x"), ["b/3.png", "frames/10.JPG", "frames/2.jpg"])
    assert capsys.readouterr().err.count("left out: x/b/film.AVI: one video at a time") == 2
    for pattern, message in (
        ("x/*.webp", r"x/\*\.webp: no picture is named so"),
        ("x/frames/*.txt", "no picture is named so"),
        ("z", "z: no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            listed("x/b", pattern)


def test_out_may_not_lie_among_what_a_pattern_finds(model: str, people: Path, tmp_path: Path) -> None:
    for pattern in (f"{people}/**/*.jpg", f"{people}/images"):
        with pytest.raises(UserError, match="draw among, what it reads"):
            run(model, [pattern], people / "images/drawn")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.jpg").write_bytes((people / "images/000000.jpg").read_bytes())
    with pytest.raises(UserError, match="would write over"):
        run(model, f"{tmp_path}/pictures/*.jpg", tmp_path)


# Detectors


class TwoBoxes(nn.Module):
    """A box for the left half and a weaker one for the right."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert len(images) == 1  # not padded to the size of another
        height, width = images[0].shape[1:]
        boxes = [[0, 0, width / 2, height], [width / 2, 0, width, height]]
        scores = torch.tensor([0.9, 0.4])
        return [{"boxes": torch.tensor(boxes), "labels": torch.tensor([1, 1]), "scores": scores}]


def test_a_detector_finds_the_persons(
    model: str, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its boxes, of the upright picture, give what they give from a file; a picture too narrow for it is unreadable."""
    asked: list[tuple[Any, ...]] = []

    def build(*given: Any) -> nn.Module:
        asked.append(given)
        return TwoBoxes()

    monkeypatch.setattr(predict, "build_detector", build)
    folder = tmp_path / "in"
    folder.mkdir()
    with Image.open(people / "images/000000.jpg") as opened:
        opened.crop((0, 0, 96, 60)).save(folder / "a.png")
        opened.crop((0, 0, 40, 90)).save(folder / "b.png")
    Image.new("RGB", (600, 2)).save(folder / "c.png")
    detector = {"detector": "fasterrcnn_mobilenet_v3_large_320_fpn", "max_unreadable": 0.4}
    found = run(model, folder, tmp_path / "out", **detector, batch_size=3)
    assert asked == [("fasterrcnn_mobilenet_v3_large_320_fpn", None, 0.5, "--detector_weights")]
    run(model, folder, tmp_path / "low", **detector, box_threshold=0.1)
    assert asked[1][2] == 0.1
    boxes = [
        {"file_name": name, "bbox": box, "score": score}
        for name, width, height in (("a.png", 96, 60), ("b.png", 40, 90))
        for box, score in (([0, 0, width / 2, height], 0.9), ([width / 2, 0, width / 2, height], 0.4))
    ]
    given = run(model, folder, tmp_path / "given", boxes=write(tmp_path / "boxes.json", boxes))
    assert [(r["file_name"], r["bbox"]) for r in found] == [(r["file_name"], r["bbox"]) for r in given]
    np.testing.assert_allclose(joints_of(found), joints_of(given), atol=1e-3)
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in given], rtol=1e-4)


def test_a_detector_of_torchvision_on_a_video(
    model: str, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights from a file; the boxes are those that it gives for each frame alone."""
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    small = functools.partial(DETECTORS[name].build, min_size=64, max_size=96, box_detections_per_img=3)
    monkeypatch.setitem(DETECTORS, name, DETECTORS[name]._replace(build=small))
    torch.manual_seed(0)
    network: Any = small(weights=None, weights_backbone=None)
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.bias[1] += 4
    weights = str(tmp_path / "detector.safetensors")
    save_file(network.state_dict(), weights)
    write_film(tmp_path / "short.avi", np.stack([frame[..., ::-1] for frame in decoded(film / "walk.avi")[:2]]), "MJPG")
    given = {"detector": name, "detector_weights": weights, "box_threshold": 0.01}
    found = run(model, tmp_path / "short.avi", tmp_path / "out", **given)
    detector = build_detector(name, weights, 0.01)
    expected = [
        (number, box)
        for number, frame in enumerate(decoded(tmp_path / "short.avi"))
        for box in find_persons(detector, [torch.from_numpy(frame[..., ::-1].copy()).permute(2, 0, 1)])[0].boxes
    ]
    assert expected
    assert [record["frame"] for record in found] == [number for number, _ in expected]
    np.testing.assert_allclose([record["bbox"] for record in found], [box for _, box in expected], atol=1e-4)


def test_the_detectors_to_choose_from_are_those_there_are() -> None:
    hint = get_type_hints(PredictConfig)["detector"]
    names = {name for part in get_args(hint) for name in get_args(part)}
    assert names == set(DETECTORS)


# What runs beside the network


def test_work_ahead_keeps_the_order_and_its_bound() -> None:
    made: list[int] = []

    def slow_if_even(item: int) -> int:
        time.sleep(0.002 if item % 2 == 0 else 0)
        made.append(item)
        return item * item

    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(20):
            taken += 1
            yield item

    for number, square in enumerate(ahead(slow_if_even, items(), depth=4, threads=3)):
        assert square == number * number
        assert taken <= number + 5
    assert sorted(made) == list(range(20))


def test_work_ahead_goes_on_while_its_reader_is_busy() -> None:
    """All four wait for each other, which no one after the other could."""
    barrier = threading.Barrier(4)
    assert list(ahead(lambda item: barrier.wait(5) * 0 + item, range(4), depth=4, threads=4)) == [0, 1, 2, 3]
    arrived = threading.Event()
    results = ahead(lambda item: item or arrived.set(), [1, 0], depth=1, threads=1)
    assert next(results) == 1
    assert arrived.wait(5)  # the second was made without having been asked for


def test_an_error_ahead_reaches_the_reader_in_its_turn() -> None:
    results = ahead(lambda item: 1 // item, [2, 1, 0, 1], depth=3, threads=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


@settings(max_examples=50)
@given(st.lists(st.none() | st.integers(0, 5), max_size=20), st.integers(1, 6))
def test_batches_hold_all_pictures_in_order_and_as_many_persons_as_needed(persons: list[int | None], size: int) -> None:
    pictures = [
        Picture({"image_id": n}, None, persons=None if count is None else Persons(n, [[0.0, 0, 1, 1]] * count))
        for n, count in enumerate(persons)
    ]
    batches = list(in_batches(pictures, size))
    assert [picture for batch in batches for picture in batch] == pictures

    def full(batch: list[Picture]) -> bool:
        return len(batch) >= size or sum(len(p.persons.boxes) for p in batch if p.persons) >= size

    assert all(full(batch) for batch in batches[:-1])
    assert not any(full(batch[:-1]) for batch in batches)


def test_frames_after_an_unreadable_run_keep_their_numbers(monkeypatch: pytest.MonkeyPatch, film: Path) -> None:
    """By a capture that answers as OpenCV does: nothing for a frame that cannot be decoded, nor after the end."""
    reader = VideoReader(film / "walk.mp4")

    class Capture:
        def __init__(self, answers: str) -> None:
            self.answers = iter(answers)

        def read(self) -> tuple[bool, np.ndarray | None]:
            good = next(self.answers, "-") == "x"
            return good, np.zeros((2, 2, 3), np.uint8) if good else None

        def release(self) -> None:
            pass

    def seen(answers: str, announced: int | None) -> str:
        reader._capture, reader.announced = Capture(answers), announced  # pyright: ignore[reportAttributeAccessIssue]
        frames: list[Frame] = list(reader.frames())
        assert [frame.index for frame in frames] == list(range(len(frames)))
        return "".join("-" if frame.image is None else "x" for frame in frames)

    assert seen("xx-x", 4) == "xx-x"
    assert seen("--x-", 4) == "--x"
    assert seen("xx", 10**9) == "xx"  # a header that lies is not believed for hours
    assert seen("xxxx", 3) == "xxxx"
    assert seen("xx", None) == "xx"
    assert seen("", 5) == ""
