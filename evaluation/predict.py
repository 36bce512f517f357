"""`python -m evaluation predict`: skeletons drawn on pictures."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from poserelay.checkpoint import verify_handoff
from poserelay.config import Decoding
from poserelay.datasets.sampling import read_image
from poserelay.datasets.unlabelled import list_images
from poserelay.distributed import start
from poserelay.drawing import contact_sheet, draw_poses
from poserelay.ensemble import Ensemble, load_predictor
from poserelay.errors import UserError
from poserelay.inference import predict_images
from poserelay.model import PoseModel, SingleStageModel
from poserelay.run import write_atomic, write_json
from poserelay.whole_images import predict_whole

from .config import PredictConfig

OVERVIEW = 16


@dataclass
class Picture:
    """A picture and the persons to look for in it."""

    image_id: int
    boxes: list[list[float]] = field(default_factory=list)
    """xywh, pixels of the stored picture; empty: the whole upright picture, or all persons that the model finds."""
    scores: list[float] = field(default_factory=list)


def main(config: PredictConfig) -> list[dict[str, Any]]:
    """Write `out`/pictures, an overview.jpg of the first of them, and predictions.json; return the results.

    predictions.json holds COCO results with file_name and bbox.

    Raises UserError for input that cannot be used and UnreadableImage for a picture that cannot be read.
    """
    checkpoints = [config.checkpoint] if isinstance(config.checkpoint, str) else config.checkpoint
    for checkpoint in checkpoints:
        verify_handoff(checkpoint)
    root, pictures = find_pictures(config)
    model = load_predictor(checkpoints).to(start(config.device, "fp32", config.threads).device)
    if isinstance(model, SingleStageModel) and config.boxes is not None:
        raise UserError(f"{checkpoints[0]}: a single-stage model finds the persons itself; leave boxes out")
    joints = len(model.skeleton.joints)
    out = Path(config.out)
    targets = _targets(config, root, pictures)
    results: list[dict[str, Any]] = []
    overview: list[np.ndarray] = []
    for name, picture in tqdm(pictures.items(), "predict", unit="picture", leave=False, disable=None):
        image = read_image(root / name, orientation="ignore" if picture.boxes else "exif")
        records = poses_of(model, image, picture, config.decoding)
        results += [{**record, "image_id": picture.image_id, "file_name": name} for record in records]
        triples = np.array([record["keypoints"] for record in records]).reshape(-1, joints, 3)
        drawn = draw_poses(image, triples[..., :2], triples[..., 2], model.skeleton, threshold=config.joint_threshold)
        _write_picture(targets[name], drawn)
        if len(overview) < OVERVIEW:
            overview.append(drawn)
    _write_picture(out / "overview.jpg", contact_sheet(overview))
    write_json(out / "predictions.json", results)
    print(f"{len(results)} poses on {len(pictures)} pictures: {out}", file=sys.stderr)
    hidden = sum(max(record["keypoints"][2::3]) < config.joint_threshold for record in results)
    if hidden:
        print(
            f"{hidden} of them are not drawn: no joint is scored {config.joint_threshold} or more (--joint_threshold)",
            file=sys.stderr,
        )
    return results


def poses_of(
    model: PoseModel | Ensemble | SingleStageModel, image: np.ndarray, picture: Picture, decoding: Decoding
) -> list[dict[str, Any]]:
    """COCO results with bbox: a pose for each box of a picture, or of all persons that a single-stage model finds."""
    if isinstance(model, SingleStageModel):
        return predict_whole(model, [image], decoding)
    height, width = image.shape[:2]
    boxes, scores = picture.boxes or [[0.0, 0.0, float(width), float(height)]], picture.scores or [1.0]
    records = predict_images(model, [image], [np.array(boxes)], decoding)
    return [{**record, "score": record["score"] * score} for record, score in zip(records, scores, strict=True)]


def find_pictures(config: PredictConfig) -> tuple[Path, dict[str, Picture]]:
    """The folder, and by file name within it the pictures to work on. Raises UserError."""
    images = Path(config.images)
    root = images if images.is_dir() else images.parent
    files = list_images(images) if images.is_dir() else [images]
    names = [file.relative_to(root).as_posix() for file in files]
    if config.boxes is None:
        return root, {name: Picture(image_id) for image_id, name in enumerate(names, start=1)}
    pictures: dict[str, Picture] = {}
    for name, image_id, box, score in read_boxes(config.boxes):
        if score >= config.box_threshold:
            picture = pictures.setdefault(name, Picture(image_id))
            picture.boxes.append(box)
            picture.scores.append(score)
    chosen = {name: pictures[name] for name in names if name in pictures}
    if not chosen:
        raise UserError(
            f"{config.boxes}: no box of a score of at least {config.box_threshold} for a picture of {config.images}; "
            "file names must be relative to that folder"
        )
    return root, chosen


def read_boxes(path: str) -> list[tuple[str, int, list[float], float]]:
    """(file name, image id, xywh, score) of every box of a COCO file or of a list of {file_name, bbox, score}.

    In a COCO file the score is 1 where there is none. Raises UserError naming the file, the record and the field.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a JSON file with boxes") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    try:
        if isinstance(data, dict):
            file_names = {image["id"]: image["file_name"] for image in data["images"]}
            persons = [person for person in data["annotations"] if not person.get("iscrowd")]
            records = [{**person, "file_name": file_names[person["image_id"]]} for person in persons]
        else:
            ids: dict[str, int] = {}
            records = [
                {**r, "image_id": ids.setdefault(r["file_name"], len(ids) + 1), "score": r["score"]} for r in data
            ]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{path}: neither COCO (images, annotations) nor a list of {{file_name, bbox, score}}: "
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


def _targets(config: PredictConfig, root: Path, names: Collection[str]) -> dict[str, Path]:
    """Where each picture is drawn. Raises UserError where that could be a picture that is read or drawn too."""
    images, out = Path(config.images), Path(config.out)
    folder = out / "pictures"
    targets = {
        name: folder / (name if Path(name).suffix.lower() in (".jpg", ".jpeg") else f"{name}.jpg") for name in names
    }
    own = {(root / name).resolve() for name in names} | {Path(boxes).resolve() for boxes in [config.boxes] if boxes}
    searched = images.is_dir() and images.resolve() in (folder.resolve(), *folder.resolve().parents)
    written = [*targets.values(), out / "overview.jpg", out / "predictions.json"]
    if searched or any(target.resolve() in own for target in written):
        raise UserError(
            f"--out {out}: would write over, or draw among, what it reads ({images}); name a folder outside"
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
