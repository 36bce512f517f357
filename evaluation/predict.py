"""`python -m evaluation predict`: skeletons drawn on pictures or a video.

Reading and drawing go on in threads beside the network: OpenCV and torch let go of Python's lock.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from poserelay.checkpoint import verify_handoff
from poserelay.config import Decoding
from poserelay.datasets.sampling import read_image
from poserelay.datasets.unlabelled import SUFFIXES, list_images
from poserelay.detection import NARROWEST, build_detector, find_persons
from poserelay.distributed import start
from poserelay.drawing import contact_sheet, draw_poses, thumbnail
from poserelay.ensemble import Ensemble, load_predictor
from poserelay.errors import CheckFailed, UnreadableImage, UserError
from poserelay.inference import predict_images
from poserelay.model import PoseModel, SingleStageModel
from poserelay.run import write_atomic, write_json
from poserelay.whole_images import predict_whole

from .config import PredictConfig
from .video import CONTAINERS, VideoReader, VideoWriter
from .video import SUFFIXES as VIDEO_SUFFIXES

OVERVIEW = 16
READERS = min(4, os.cpu_count() or 1)
"""Threads that read pictures, and as many that draw; a video has one of each."""
DETECTED = 0.5
"""Score from which on a detector's boxes are taken."""
ALONE = "one video at a time; give it as the only one of images"
LONGEST = 65500
"""Pixels of the longest side of a JPEG."""

Item = TypeVar("Item")
Made = TypeVar("Made")
Model = PoseModel | Ensemble | SingleStageModel


@dataclass
class Persons:
    """The boxes of a picture."""

    image_id: int
    boxes: list[list[float]] = field(default_factory=list)
    """xywh, image pixels."""
    scores: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A picture, or a frame of a video, that has been read."""

    named: dict[str, Any]
    """image_id, and file_name or frame, as its results carry them."""
    image: np.ndarray | None
    """`[H, W, 3]` uint8 RGB; None where it cannot be read."""
    problem: str = ""
    """Why it cannot be read."""
    persons: Persons | None = None
    """None: not known beforehand."""


class Finished(NamedTuple):
    """What is left of a picture."""

    readable: bool
    problem: str
    results: list[dict[str, Any]]
    small: np.ndarray | None
    """Drawn, for the overview."""


class Pictures:
    """Picture files, to be read and drawn in any order and several at a time."""

    unit = "picture"
    threads = READERS
    every = 1

    def __init__(self, config: PredictConfig) -> None:
        self.root, self.persons = find_pictures(config)
        self.targets = _targets(config, self.root, self.persons)
        self.given = config.boxes is not None
        self.total = len(self.persons)

    def items(self) -> Iterable[Any]:
        """The file names, relative to `root`."""
        return self.persons

    def read(self, name: str) -> Picture | None:
        """Upright, or as it is stored where boxes refer to that."""
        persons = self.persons[name]
        named = {"image_id": persons.image_id, "file_name": name}
        try:
            image = read_image(self.root / name, orientation="ignore" if self.given else "exif")
            height, width = image.shape[:2]
            if max(height, width) > LONGEST:
                raise UnreadableImage(self.root / name, f"{width} x {height} pixels are more than a JPEG can have")
        except UnreadableImage as error:
            return Picture(named, None, str(error))
        return Picture(named, image, persons=persons if self.given else None)

    def write(self, picture: Picture, drawn: np.ndarray | None) -> None:
        """As JPEG."""
        if drawn is not None:
            _write_picture(self.targets[picture.named["file_name"]], drawn)

    def close(self) -> None:
        """Every file is written already."""

    def discard(self) -> None:
        """Every file is whole."""


class Video:
    """The frames of a video file, in their order."""

    unit = "frame"
    threads = 1

    def __init__(self, config: PredictConfig, path: Path) -> None:
        self.path, self.out = path, Path(config.out, path.name)
        if any(self.out.with_suffix(suffix).resolve() == path.resolve() for suffix, _ in CONTAINERS):
            raise UserError(f"--out {config.out}: the video would be written over {path}; name another folder")
        self.reader = VideoReader(path)
        self.total = self.reader.announced
        self.every = max(1, (self.total or 0) // OVERVIEW)
        self.persons = None if config.boxes is None else frame_persons(config, path, self.total)
        self._frames = self.reader.frames()
        self._writer: VideoWriter | None = None
        self._last: np.ndarray | None = None
        self._owed = 0
        self._asked = 0

    def items(self) -> Iterable[Any]:
        """Without an end, which only reading finds."""
        return itertools.count()

    def read(self, _: Any) -> Picture | None:
        """The next frame; None at the end."""
        frame = next(self._frames, None)
        if frame is None:
            return None
        self._asked += 1
        problem = "" if frame.image is not None else f"{self.path}: frame {frame.index} cannot be decoded"
        persons = None if self.persons is None else self.persons.get(frame.index, Persons(frame.index))
        return Picture({"image_id": frame.index, "frame": frame.index}, frame.image, problem, persons)

    def write(self, picture: Picture, drawn: np.ndarray | None) -> None:
        """Append a frame; in place of one that cannot be read the one before it (at the start, after it) is shown.

        So the video keeps its time.
        """
        if drawn is None:
            if self._writer is None or self._last is None:
                self._owed += 1
            else:
                self._writer.write(self._last)
            return
        if self._writer is None:
            self._writer = VideoWriter(self.out, self.reader.fps, drawn.shape[:2])
            for _ in range(self._owed):
                self._writer.write(drawn)
        self._writer.write(drawn)
        self._last = drawn

    def close(self) -> None:
        """Give the video its name, and say which boxes are of frames that it has not."""
        beyond = [frame for frame in self.persons or {} if frame >= self._asked]
        if self.persons and beyond:
            print(
                f"{sum(len(self.persons[frame].boxes) for frame in beyond)} boxes belong to no frame of {self.path}, "
                f"which has {self._asked}, counted from 0",
                file=sys.stderr,
            )
        if self._writer is not None:
            self._writer.close()

    def discard(self) -> None:
        """Leave no half video."""
        if self._writer is not None:
            self._writer.discard()


Source = Pictures | Video


def main(config: PredictConfig) -> list[dict[str, Any]]:
    """Write `out`/pictures or the video, an overview.jpg of some of them, and predictions.json; return the results.

    predictions.json holds COCO results with bbox, and file_name or frame.

    Raises:
        UserError: input that cannot be used.
        CheckFailed: more than `config.max_unreadable` of the pictures or frames are unreadable, or all, and the rest is
            done; or as `predict_images`.
    """
    checkpoints = [config.checkpoint] if isinstance(config.checkpoint, str) else config.checkpoint
    check_folder(Path(config.out))
    for checkpoint in checkpoints:
        verify_handoff(checkpoint)
    out, source = Path(config.out), open_source(config)
    device = start(config.device, "fp32", config.threads).device
    model = load_predictor(checkpoints).to(device)
    if isinstance(model, SingleStageModel) and (config.boxes or config.detector):
        given = "boxes" if config.boxes else "detector"
        raise UserError(f"{checkpoints[0]}: a single-stage model finds the persons itself; leave {given} out")
    detector = None
    if config.detector:
        detector = build_detector(config.detector, config.detector_weights, _threshold(config), "--detector_weights")
        detector = detector.to(device)
    results: list[dict[str, Any]] = []
    overview: list[np.ndarray] = []
    readable = lost = 0
    try:
        with (
            tqdm(total=source.total, desc="predict", unit=source.unit, leave=False, disable=None) as bar,
            contextlib.closing(predicted(config, source, model, detector)) as finished,  # its threads end before ours
        ):
            for picture in finished:
                if picture.readable:
                    readable += 1
                else:
                    lost += 1
                    bar.write(f"warning: left out: {picture.problem}", file=sys.stderr)
                results += picture.results
                if picture.small is not None and len(overview) < OVERVIEW:
                    overview.append(picture.small)
                bar.update()
        source.close()
    finally:
        source.discard()
    if overview:
        _write_picture(out / "overview.jpg", contact_sheet(overview))
    write_json(out / "predictions.json", results)
    print(f"{len(results)} poses on {readable} {source.unit}s: {out}", file=sys.stderr)
    hidden = sum(max(record["keypoints"][2::3]) < config.joint_threshold for record in results)
    if hidden:
        print(
            f"{hidden} of them are not drawn: no joint is scored {config.joint_threshold} or more (--joint_threshold)",
            file=sys.stderr,
        )
    total = max(source.total or 0, readable + lost)
    if readable + lost < total:
        print(f"warning: the video announces {total} frames and ends after {readable + lost}", file=sys.stderr)
    if not readable:
        raise CheckFailed(f"none of the {total} {source.unit}s can be read (see above); check --images")
    if total - readable > config.max_unreadable * total:
        raise CheckFailed(
            f"{total - readable} of {total} {source.unit}s are unreadable (see above); the rest is done, in {out}; "
            f"repair or remove them, or raise max_unreadable ({config.max_unreadable})"
        )
    return results


def predicted(
    config: PredictConfig, source: Source, model: Model, detector: nn.Module | None
) -> Generator[Finished, None, None]:
    """Each picture of the source once it is drawn and written, in their order.

    The network runs in the caller's thread, reading ahead and drawing behind in others.
    """
    read: Iterator[Picture | None] = ahead(source.read, source.items(), config.batch_size, source.threads)
    located = (locate(picture, detector) for picture in iter(lambda: next(read, None), None))
    found = (
        pair
        for batch in in_batches(located, config.batch_size)
        for pair in zip(batch, predict_batch(model, batch, config.decoding, config.batch_size), strict=True)
    )

    def finish(numbered: tuple[int, tuple[Picture, list[dict[str, Any]]]]) -> Finished:
        number, (picture, records) = numbered
        if picture.image is None:
            source.write(picture, None)
            return Finished(False, picture.problem, [], None)
        triples = np.array([record["keypoints"] for record in records]).reshape(-1, len(model.skeleton.joints), 3)
        drawn = draw_poses(
            picture.image,
            triples[..., :2],
            triples[..., 2],
            model.skeleton,
            threshold=config.joint_threshold,
            confidence=config.show_confidence,
            pose_scores=np.array([record["score"] for record in records]) if config.show_confidence else None,
        )
        source.write(picture, drawn)
        small = thumbnail(drawn) if number % source.every == 0 and number < OVERVIEW * source.every else None
        return Finished(True, "", [{**record, **picture.named} for record in records], small)

    return ahead(finish, enumerate(found), config.batch_size, source.threads)


def ahead(
    function: Callable[[Item], Made], items: Iterable[Item], depth: int, threads: int
) -> Generator[Made, None, None]:
    """`function` of each item in their order, made in `threads` threads up to `depth` items before they are asked for.

    The items themselves are taken in the caller's thread.
    """
    pending: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def in_batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Pictures in their order until they hold `size` persons, or are so many themselves."""
    batch: list[Picture] = []
    for picture in pictures:
        batch.append(picture)
        if max(len(batch), sum(len(p.persons.boxes) for p in batch if p.persons)) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def locate(picture: Picture, detector: nn.Module | None) -> Picture:
    """The picture with its persons, where a detector is to find them."""
    if detector is None or picture.image is None:
        return picture
    height, width = picture.image.shape[:2]
    name = picture.named.get("file_name", f"frame {picture.named['image_id']}")
    if max(height, width) > NARROWEST * min(height, width):
        problem = f"{name}: {width} x {height} pixels are too narrow for a detector"
        return Picture(picture.named, None, problem)
    # One at a time: padding to another picture's size would move the boxes.
    found = find_persons(detector, [torch.from_numpy(picture.image).permute(2, 0, 1)])[0]
    return Picture(picture.named, picture.image, "", Persons(picture.named["image_id"], found.boxes, found.scores))


def predict_batch(
    model: Model, pictures: Sequence[Picture], decoding: Decoding, batch_size: int
) -> list[list[dict[str, Any]]]:
    """For each picture its COCO results with bbox: a pose for each box, or of all persons that the model finds.

    Where neither is known the whole picture is one person's box.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in pictures]
    readable = [
        (row, picture.image, picture.persons) for row, picture in enumerate(pictures) if picture.image is not None
    ]
    if isinstance(model, SingleStageModel):
        # Not with pictures of another size: they would be padded.
        for _, group in itertools.groupby(readable, key=lambda item: item[1].shape):
            rows, images, _ = zip(*group, strict=True)
            for record in predict_whole(model, images, decoding, batch_size=batch_size):
                found[rows[record["image_id"]]].append(record)
        return found
    boxes, scores = [], []
    for _, image, persons in readable:
        height, width = image.shape[:2]
        persons = persons or Persons(0, [[0.0, 0.0, float(width), float(height)]], [1.0])
        boxes.append(np.array(persons.boxes).reshape(-1, 4))
        scores += persons.scores
    records = predict_images(model, [image for _, image, _ in readable], boxes, decoding, batch_size=batch_size)
    for record, score in zip(records, scores, strict=True):
        found[readable[record["image_id"]][0]].append({**record, "score": record["score"] * score})
    return found


def check_folder(out: Path) -> None:
    """Raise UserError where something in the way is no folder, or one that may not be written to."""
    above = next(place for place in (out, *out.absolute().parents) if os.path.lexists(place))
    if not above.is_dir():
        raise UserError(f"--out {out}: {above} is no folder; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {above} may not be written to; name another place")


def open_source(config: PredictConfig) -> Source:
    """The pictures or the video that the command is about. Raises UserError."""
    images = config.images if isinstance(config.images, str) else config.images[0]
    alone = isinstance(config.images, str) or len(config.images) == 1
    if alone and Path(images).suffix.lower() in VIDEO_SUFFIXES and not glob.has_magic(images):
        return Video(config, Path(images))
    return Pictures(config)


def find_pictures(config: PredictConfig) -> tuple[Path, dict[str, Persons]]:
    """The folder, and by file name within it the pictures to work on. Raises UserError."""
    root, names = list_files([config.images] if isinstance(config.images, str) else config.images)
    if config.boxes is None:
        return root, {name: Persons(image_id) for image_id, name in enumerate(names, start=1)}
    boxes = read_boxes(config.boxes)
    there = set(names)
    own = [record for record in boxes if record[0] in there]
    if not own:
        raise UserError(
            f"{config.boxes}: no box for a picture of {config.images}; file names must be relative to {root}"
        )
    check_scores(config, [score for *_, score in own])
    if len(own) < len(boxes):
        absent = next(name for name, *_ in boxes if name not in there)
        print(
            f"{config.boxes}: {len(boxes) - len(own)} of {len(boxes)} boxes belong to no picture of {config.images}, "
            f"such as that of {absent}",
            file=sys.stderr,
        )
    pictures: dict[str, Persons] = {}
    for name, image_id, box, score in own:
        if score >= _threshold(config):
            picture = pictures.setdefault(name, Persons(image_id))
            picture.boxes.append(box)
            picture.scores.append(score)
    chosen = {name: pictures[name] for name in names if name in pictures}
    if len(chosen) < len(names):
        print(f"{len(names) - len(chosen)} of {len(names)} pictures are left out: they have no box", file=sys.stderr)
    return root, chosen


def check_scores(config: PredictConfig, scores: Sequence[float]) -> None:
    """Raise UserError where the threshold leaves none of the boxes."""
    if max(scores) < _threshold(config):
        raise UserError(
            f"{config.boxes}: no box is left: of {len(scores)} the best is scored {max(scores):g}, below "
            f"--box_threshold {_threshold(config):g}; lower it"
        )


def list_files(given: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder that all pictures are in, and their names relative to it, without repetition.

    given: pictures, folders and patterns. Raises UserError where one of them leads to no picture.
    """
    found = [_expanded(text) for text in given]
    if len(found) == 1:
        root, files = found[0]
    else:
        root = Path(os.path.commonpath([os.path.abspath(folder) for folder, _ in found]))
        files = [Path(os.path.abspath(file)) for _, files in found for file in files]
    return root, list(dict.fromkeys(file.relative_to(root).as_posix() for file in files))


def _expanded(text: str) -> tuple[Path, list[Path]]:
    """The pictures that a path or a pattern names, and the folder; of a pattern the one before its first wildcard."""
    path = Path(text)
    if path.is_dir():
        videos = [file for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES]
        try:
            pictures = list_images(path)
        except UserError as error:
            raise UserError(f"{error}; {ALONE}, such as {videos[0]}" if videos else str(error)) from error
        _tell_videos(videos)
        return path, pictures
    if path.exists():
        if path.suffix.lower() in VIDEO_SUFFIXES:
            raise UserError(f"{text}: {ALONE}")
        return path.parent, [path]
    if not glob.has_magic(text):
        raise UserError(f"{text}: no such file or folder; check the path")
    named = sorted(Path(file) for file in glob.glob(text, recursive=True))
    videos = [file for file in named if file.suffix.lower() in VIDEO_SUFFIXES]
    files = [file for file in named if file.suffix.lower() in SUFFIXES and file.is_file()]
    if videos and not files:
        raise UserError(f"{text}: {ALONE}, such as {videos[0]}")
    if not files:
        raise UserError(f"{text}: no picture is named so (looked for {', '.join(sorted(SUFFIXES))}); check the pattern")
    _tell_videos(videos)
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts[:-1])
    return Path(*fixed), files


def _tell_videos(videos: Sequence[Path]) -> None:
    if videos:
        more = f" and {len(videos) - 1} more" if len(videos) > 1 else ""
        print(f"left out: {videos[0]}{more}: {ALONE}", file=sys.stderr)


def frame_persons(config: PredictConfig, path: Path, frames: int | None) -> dict[int, Persons]:
    """By frame, from 0, the boxes of a video. Raises UserError, also where there is none."""
    found: dict[int, Persons] = {}
    boxes = read_boxes(str(config.boxes), of_frames=True)
    for position, (_, index, _, _) in enumerate(boxes):
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise UserError(f"{config.boxes}: record {position}: image_id {index!r} is no frame, counted from 0")
    scores = [score for _, index, _, score in boxes if index < (frames or math.inf)]
    if not scores:
        raise UserError(f"{config.boxes}: no box for a frame of {path}; image_id must be the frame, counted from 0")
    check_scores(config, scores)
    for _, index, box, score in boxes:
        if score >= _threshold(config):
            persons = found.setdefault(index, Persons(index))
            persons.boxes.append(box)
            persons.scores.append(score)
    return found


def read_boxes(path: str, of_frames: bool = False) -> list[tuple[str, int, list[float], float]]:
    """(file name, image id, xywh, score) of every box of a COCO file or of a list of {file_name, bbox, score}.

    In a COCO file the score is 1 where there is none. With `of_frames` a list is of {image_id, bbox, score}, and names
    are empty. Raises UserError naming the file, the record and the field.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a JSON file with boxes") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    wanted = "image_id" if of_frames else "file_name"
    try:
        if isinstance(data, dict):
            file_names = {image["id"]: image["file_name"] for image in data["images"]}
            persons = [person for person in data["annotations"] if not person.get("iscrowd")]
            records = [{**person, "file_name": file_names[person["image_id"]]} for person in persons]
        elif of_frames:
            records = [{**r, "file_name": "", "image_id": r["image_id"], "score": r["score"]} for r in data]
        else:
            ids: dict[str, int] = {}
            records = [
                {**r, "image_id": ids.setdefault(r["file_name"], len(ids) + 1), "score": r["score"]} for r in data
            ]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{path}: neither COCO (images, annotations) nor a list of {{{wanted}, bbox, score}}: "
            f"{error} is missing or of another kind"
        ) from error
    found = []
    for position, record in enumerate(records):
        numbers = [*_as_list(record.get("bbox")), record.get("score", 1.0)]
        if len(numbers) != 5 or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
            raise UserError(f"{path}: record {position}: bbox {record.get('bbox')!r} and score are not 4 and 1 numbers")
        if min(numbers[2:4]) <= 0:
            raise UserError(f"{path}: record {position}: bbox {numbers[:4]} has no area; remove it")
        found.append((record["file_name"], record["image_id"], [float(n) for n in numbers[:4]], float(numbers[4])))
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _threshold(config: PredictConfig) -> float:
    """Score below which boxes are left out."""
    if config.box_threshold is not None:
        return config.box_threshold
    return 0.0 if config.detector is None else DETECTED


def _targets(config: PredictConfig, root: Path, names: Iterable[str]) -> dict[str, Path]:
    """Where each picture is drawn. Raises UserError where that could be a picture that is read or drawn too."""
    out = Path(config.out)
    folder = out / "pictures"
    targets = {
        name: folder / (name if Path(name).suffix.lower() in (".jpg", ".jpeg") else f"{name}.jpg") for name in names
    }
    given = [config.images] if isinstance(config.images, str) else config.images
    own = {(root / name).resolve() for name in targets} | {Path(boxes).resolve() for boxes in [config.boxes] if boxes}
    # Drawn pictures would be read by the next run.
    searched = [Path(text) for text in given if Path(text).is_dir()] + [root for text in given if "**" in text]
    among = any(place.resolve() in (folder.resolve(), *folder.resolve().parents) for place in searched)
    written = [*targets.values(), out / "overview.jpg", out / "predictions.json"]
    if among or any(target.resolve() in own for target in written):
        raise UserError(
            f"--out {out}: would write over, or draw among, what it reads ({', '.join(given)}); name a folder outside"
        )
    if len(set(targets.values())) < len(targets):
        drawn = Counter(targets.values()).most_common(1)[0][0]
        raise UserError(f"{drawn}: two pictures of {root} would be drawn to this file; rename one of them")
    return targets


def _write_picture(path: Path, image: np.ndarray) -> None:
    encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])[1]

    def write(temporary: Path) -> None:
        temporary.write_bytes(encoded.tobytes())

    write_atomic(path, write)
