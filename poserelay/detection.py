"""`poserelay detect`: the boxes of a person detector of torchvision, as a COCO results list.

OUT.json            [{image_id, file_name, category_id, bbox, score}], by picture, then by falling score; written last
OUT.meta.json       what made it, and the pictures that were left out
OUT.images.json     without annotations: the COCO `images` list that the ids refer to
OUT.partial.jsonl   of an unfinished list: the detector, then a line per batch of pictures that is done
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import WeightsEnum
from torchvision.models.detection import (
    FasterRCNN_MobileNet_V3_Large_320_FPN_Weights,
    FasterRCNN_ResNet50_FPN_V2_Weights,
    RetinaNet_ResNet50_FPN_V2_Weights,
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_resnet50_fpn_v2,
    retinanet_resnet50_fpn_v2,
)
from torchvision.ops import box_convert
from tqdm import tqdm

from .config import DetectConfig
from .datasets.coco import check_images_exist, read_image_list
from .datasets.sampling import read_image, worker_init
from .datasets.unlabelled import list_images
from .distributed import StopSignals, start
from .errors import CheckFailed, Interrupted, UnreadableImage, UserError
from .importers import read_weights
from .run import file_sha256, write_json

PERSON = 1
"""The label, and COCO's category id."""
NARROWEST = 100
"""Longer over shorter side above which a picture is not looked at: resized, it would have no pixels across."""
SYNC_EVERY = 100
"""Pictures after which the partial list is certain to survive a crash of the machine."""
DOWNLOAD_SECONDS = 30
"""A server that is silent for so long is not waited for; some clusters' nodes have no way out, and no answer either."""

# What torch says of a tensor of another shape: its name, the file's shape, the network's.
MISFIT = re.compile(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)")


class Detector(NamedTuple):
    """A detector of torchvision."""

    build: Callable[..., nn.Module]
    weights: WeightsEnum
    threshold: str
    """Keyword argument of the least score."""


DETECTORS = {
    "fasterrcnn_resnet50_fpn_v2": Detector(
        fasterrcnn_resnet50_fpn_v2, FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1, "box_score_thresh"
    ),
    "retinanet_resnet50_fpn_v2": Detector(
        retinanet_resnet50_fpn_v2, RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1, "score_thresh"
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Detector(
        fasterrcnn_mobilenet_v3_large_320_fpn, FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1, "box_score_thresh"
    ),
}


class Picture(NamedTuple):
    """A picture to look at."""

    id: int
    name: str
    """Path relative to the folder of pictures."""
    file_size: int
    """Bytes; 0 where it is not there."""


class Found(NamedTuple):
    """The persons of a picture."""

    size: list[int]
    """(height, width) of the picture as it is stored."""
    boxes: list[list[float]]
    """xywh, pixels of the stored picture."""
    scores: list[float]
    """Falling."""


Key = tuple[tuple[str, int], ...]
"""Names and sizes of the files of a batch."""


def main(config: DetectConfig) -> None:
    """Entry of `poserelay detect`; prints the path of the list.

    The same pictures and fields give the same bytes on the same machine, however often interrupted.

    Raises:
        UserError: as `list_pictures`, `is_finished`, `locked` and `build_detector`.
        CheckFailed: more pictures than `config.max_unreadable` are unreadable.
        Interrupted: by SIGTERM, SIGINT or SIGUSR2; what is done is kept.
    """
    out = Path(config.out)
    with StopSignals() as signals:
        pictures, category = list_pictures(config)
        network = describe_detector(config)
        listed = "\n".join(f"{picture.id}\0{picture.name}\0{picture.file_size}" for picture in pictures)
        recipe = {
            **network,
            "batch_size": config.batch_size,
            "category_id": category,
            "pictures": len(pictures),
            "pictures_sha256": hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest(),
        }
        if not is_finished(out, recipe):
            with locked(partial_path(out)) as partial:
                # Asked again: another process may have finished the list before we had the lock.
                if not is_finished(out, recipe):
                    batches = [
                        pictures[first : first + config.batch_size]
                        for first in range(0, len(pictures), config.batch_size)
                    ]
                    done = read_partial(partial, network, out)
                    try:
                        detect(config, batches, done, partial, signals)
                    except KeyboardInterrupt:
                        raise _interrupted("SIGINT", out) from None
                    write_results(out, config, batches, done, recipe)
        partial_path(out).unlink(missing_ok=True)  # also where a kill came before it the last time
    print(config.out)


def list_pictures(config: DetectConfig) -> tuple[list[Picture], int]:
    """The pictures in the order of the results, and the category id that their readers look for.

    Raises:
        UserError: as `list_images`, `read_image_list` and `check_images_exist`.
    """
    if config.annotations is None:
        names = [file.relative_to(config.images).as_posix() for file in list_images(config.images)]
        ids, category = list(range(1, len(names) + 1)), PERSON
    else:
        names = read_image_list(config.annotations)  # which checks the ids, too
        check_images_exist(names, config.images)
        data = json.loads(Path(config.annotations).read_text(encoding="utf-8-sig"))
        ids, category = [image["id"] for image in data["images"]], person_category(data)
    pictures = []
    for id_, name in zip(ids, names, strict=True):
        try:
            size = Path(config.images, name).stat().st_size
        except OSError:
            size = 0
        pictures.append(Picture(id_, name, size))
    return pictures, category


def person_category(data: Mapping[str, Any]) -> int:
    """The id of the one category with keypoints in a COCO file; COCO's own of a person in a list of images alone."""
    categories = data.get("categories")
    if not data.get("annotations") or not isinstance(categories, list):
        return PERSON
    found = [item.get("id") for item in categories if isinstance(item, dict) and item.get("keypoints")]
    return found[0] if len(found) == 1 and isinstance(found[0], int) else PERSON


def describe_detector(config: DetectConfig) -> dict[str, Any]:
    """What decides the boxes of a batch of pictures. Raises UserError where there is no such file of weights."""
    weights = str(DETECTORS[config.detector].weights)
    if config.weights:
        try:
            weights = f"sha256:{file_sha256(Path(config.weights))}"
        except OSError as error:
            raise UserError(f"weights {config.weights}: cannot be read: {error.strerror}; check the path") from error
    return {"detector": config.detector, "weights": weights, "score_threshold": config.score_threshold}


def is_finished(out: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the list is there, made of these pictures by this detector. Raises UserError where it is another."""
    if not out.exists():
        return False
    try:
        found = json.loads(meta_path(out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--out {out}: exists and is no list of detections of ours; name another file")
    _check_same(found, recipe, f"{out}: holds detections of other pictures or fields", "name another file")
    return True


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], problem: str, remedy: str) -> None:
    changes = [f"{name}: {found.get(name)} -> {wanted[name]}" for name in wanted if found.get(name) != wanted[name]]
    if changes:
        raise UserError(f"{problem} ({'; '.join(changes)}); {remedy}, or delete it")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[io.TextIOWrapper]:
    """The partial list, to be read and appended to by this process alone; the OS lets go of it in the end.

    Raises UserError where another process has it, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; name another file") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{path}: another process is at work on it; wait for it, or stop it") from None
        yield file


def read_partial(file: io.TextIOWrapper, network: Mapping[str, Any], out: Path) -> dict[Key, list[Found | None]]:
    """The batches that are done, by the names and sizes of their files; `network` is noted in a new `file`.

    Raises UserError: it was begun with another detector.
    """
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the torn line of a kill
            rows.append(json.loads(line))
    if len(rows) < 2:  # nothing is done
        file.truncate(0)
        _append(file, network)
        return {}
    _check_same(
        rows[0], network, f"{file.name}: the unfinished list is of another detector", f"name another file than {out}"
    )
    if not lines[-1].endswith("\n"):
        file.write("\n")
    done: dict[Key, list[Found | None]] = {}
    for row in rows[1:]:
        done[tuple((name, size) for name, size in row["pictures"])] = [Found(**found) for found in row["found"]]
    return done


def _append(file: io.TextIOWrapper, row: Mapping[str, Any]) -> None:
    try:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
    except OSError as error:
        raise UserError(f"{file.name}: cannot be written: {error.strerror}; make room, then start again") from error


def detect(
    config: DetectConfig,
    batches: Sequence[Sequence[Picture]],
    done: dict[Key, list[Found | None]],
    partial: io.TextIOWrapper,
    signals: StopSignals,
) -> None:
    """Look at the batches that are not in `done` and add them to it and to `partial`; None is an unreadable picture.

    Raises:
        UserError: as `start` and `build_detector`, or the disk refuses.
        CheckFailed: more pictures than `config.max_unreadable` are unreadable.
        Interrupted: `signals` has received one.
    """
    out, total = Path(config.out), sum(map(len, batches))
    todo = [batch for batch in batches if key_of(batch) not in done]
    if not todo:
        return
    device = start(config.device, "fp32", config.threads).device
    network = build_detector(config.detector, config.weights, config.score_threshold).to(device)
    loader = DataLoader(
        _Stored([Path(config.images, picture.name) for batch in todo for picture in batch]),
        batch_sampler=_consecutive(todo),
        num_workers=config.workers,
        collate_fn=list,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # a loader would otherwise draw its workers' seed from the global one
    )
    # A log is told once a minute, a terminal as usual.
    interval = 0.1 if sys.stderr.isatty() else 60
    unreadable, unsynced = 0, 0
    finished = total - sum(map(len, todo))
    with tqdm(initial=finished, total=total, desc="detect", unit="picture", mininterval=interval, smoothing=0) as bar:
        for batch, loaded in zip(todo, loader, strict=True):
            if signals.received:
                os.fsync(partial.fileno())
                raise _interrupted(signals.received, out)
            readable = iter(find_persons(network, [image for image in loaded if isinstance(image, Tensor)]))
            found = [next(readable) if isinstance(image, Tensor) else None for image in loaded]
            done[key_of(batch)] = found
            whole = [persons._asdict() for persons in found if persons]
            if len(whole) == len(batch):  # an unreadable picture may be mended when we are started again
                _append(partial, {"pictures": key_of(batch), "found": whole})
            for message in loaded:
                if isinstance(message, str):
                    bar.write(f"warning: left out: {message}", file=sys.stderr)
                    unreadable += 1
            if unreadable > config.max_unreadable * total or unreadable == total:
                raise CheckFailed(
                    f"{unreadable} of {total} pictures are unreadable (named above); repair or remove them, or raise "
                    f"max_unreadable ({config.max_unreadable}), and start again: what is done is kept"
                )
            bar.update(len(batch))
            unsynced += len(batch)
            if unsynced >= SYNC_EVERY:
                os.fsync(partial.fileno())
                unsynced = 0


def key_of(batch: Sequence[Picture]) -> Key:
    """By which a batch is found again."""
    return tuple((picture.name, picture.file_size) for picture in batch)


def _consecutive(batches: Sequence[Sequence[Picture]]) -> list[list[int]]:
    """Positions of the pictures of each batch among those of all."""
    first, positions = 0, []
    for batch in batches:
        positions.append(list(range(first, first + len(batch))))
        first += len(batch)
    return positions


def _interrupted(reason: str, out: Path) -> Interrupted:
    return Interrupted(f"{out}: {reason}; what is done is kept; start the same command again to go on")


class _Stored(Dataset[Tensor | str]):
    """uint8 RGB `[3, H, W]` of each file as it is stored, or a message where it cannot be used."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            # Annotations and crops refer to the stored pixels.
            image = torch.from_numpy(read_image(self.files[index], orientation="ignore")).permute(2, 0, 1)
            height, width = image.shape[1:]
            if max(height, width) > NARROWEST * min(height, width):
                raise UnreadableImage(self.files[index], f"{width} x {height} pixels are too narrow for a detector")
        except UnreadableImage as error:
            return str(error)
        return image


def build_detector(name: str, weights: str | None, score_threshold: float, option: str = "--weights") -> nn.Module:
    """A detector of `DETECTORS` on the CPU in eval mode, which returns what is scored above `score_threshold`.

    `weights` is a file with its state dict, None torchvision's COCO weights, from the cache or the internet; `option`
    is what the command calls the file.

    Raises:
        UserError: the weights cannot be fetched or read, are of another network, or hold NaN or infinity.
    """
    detector = DETECTORS[name]
    if weights:
        state, source = read_weights(Path(weights))[0], weights
    else:
        state, source = download(detector.weights, option), str(detector.weights)
    network = detector.build(weights=None, weights_backbone=None, **{detector.threshold: score_threshold})
    try:
        keys = network.load_state_dict(state, strict=False)
        problems = [f"missing {key}" for key in keys.missing_keys]
        problems += [f"unexpected {key}" for key in keys.unexpected_keys]
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        problems = [f"{key} is {theirs}, expected {own}" for key, theirs, own in MISFIT.findall(str(error))] or [last]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"weights {source}: do not fit {name}: {'; '.join(problems[:3])}{more}; name the --detector that they are "
            f"of ({', '.join(DETECTORS)}), trained on COCO's classes"
        )
    broken = [key for key, value in network.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"weights {source}: {broken[0]} holds NaN or infinity; give another file")
    return network.eval()


def download(weights: WeightsEnum, option: str) -> dict[str, Any]:
    """The state dict of torchvision's weights, from torch's cache where they are in it.

    Raises UserError, naming `option`.
    """
    waits = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return weights.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
            )
    except Exception as error:  # not only of the network: a damaged file in the cache raises anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        cache = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
        raise UserError(
            f"{weights}: cannot be fetched or read ({reason}); fetch {weights.url} on a machine with internet access, "
            f"and give it as {option} or put it at {cache}, in place of a damaged one"
        ) from error
    finally:
        socket.setdefaulttimeout(waits)


def find_persons(network: nn.Module, images: Sequence[Tensor]) -> list[Found]:
    """The persons that a detector of torchvision finds in uint8 RGB pictures `[3, H, W]` of any sizes, on its device.

    Boxes are rounded to hundredths of a pixel, as in COCO's files, and those without area left out; scores to 1e-5.
    """
    if not images:
        return []
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        # torchvision's detectors scale, normalise and pad by themselves.
        found = network([image.to(device, non_blocking=True).float() / 255 for image in images])
    return [_persons(image, prediction) for image, prediction in zip(images, found, strict=True)]


def _persons(image: Tensor, prediction: Mapping[str, Tensor]) -> Found:
    """From boxes `[N, 4]` (xyxy), labels `[N]` and scores `[N]`."""
    person = prediction["labels"] == PERSON
    scores, order = prediction["scores"][person].double().sort(descending=True, stable=True)
    boxes = box_convert(prediction["boxes"][person][order].double(), "xyxy", "xywh").cpu()
    found = Found(list(image.shape[1:]), [], [])
    for box, score in zip(boxes.tolist(), scores.tolist(), strict=True):
        x, y, width, height = (round(value, 2) for value in box)
        if width > 0 and height > 0:
            found.boxes.append([x, y, width, height])
            found.scores.append(round(score, 5))
    return found


def write_results(
    out: Path,
    config: DetectConfig,
    batches: Sequence[Sequence[Picture]],
    done: Mapping[Key, Sequence[Found | None]],
    recipe: Mapping[str, Any],
) -> None:
    """Write the list and what goes beside it, and say on stderr what it holds."""
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for batch in batches:
        for picture, found in zip(batch, done[key_of(batch)], strict=True):
            if found is None:
                unreadable.append(picture.name)
                continue
            height, width = found.size
            images.append({"id": picture.id, "file_name": picture.name, "width": width, "height": height})
            placed = {"image_id": picture.id, "file_name": picture.name, "category_id": recipe["category_id"]}
            for box, score in zip(found.boxes, found.scores, strict=True):
                results.append({**placed, "bbox": box, "score": score})
    if config.annotations is None:
        category = {"id": PERSON, "name": "person"}
        write_json(images_path(out), {"images": images, "annotations": [], "categories": [category]})
    versions = {"torchvision": torchvision.__version__}
    write_json(meta_path(out), {**recipe, **versions, "detections": len(results), "unreadable": unreadable})
    write_json(out, results)
    left_out = f"; {len(unreadable)} unreadable left out, see {meta_path(out)}" if unreadable else ""
    shown = len({result["image_id"] for result in results})
    print(
        f"detect: {len(results)} persons in {shown} of {recipe['pictures']} pictures, scored above "
        f"{config.score_threshold}{left_out}",
        file=sys.stderr,
    )


def meta_path(out: Path) -> Path:
    """Beside the list: what made it."""
    return out.with_suffix(".meta.json")


def images_path(out: Path) -> Path:
    """Beside the list: the pictures, where no annotations named them."""
    return out.with_suffix(".images.json")


def partial_path(out: Path) -> Path:
    """Beside the list while it is unfinished."""
    return out.with_suffix(".partial.jsonl")
