"""COCO-keypoint annotations and detections: read once into arrays and checked in full. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from ..geometry import clip_boxes
from ..keypoints import match_joints

AREA_OF_BOX = 0.53
"""Share of its box that a person without an annotated area is taken to cover (CrowdPose's evaluator)."""
SC_BIAS = 0.6
"""Share of the head box's diagonal that PCKh takes for the head's size (MPII's evaluator)."""


@dataclass(frozen=True)
class CocoAnnotations:
    """The annotations of the one category with keypoints: I images, N persons, K joints, in the file's order."""

    path: Path
    category: dict[str, Any]
    image_ids: list[int]
    file_names: list[str]
    image_sizes: np.ndarray
    """`[I, 2]` int64, (height, width)."""
    ids: np.ndarray
    """`[N]` int64, annotation ids."""
    image_index: np.ndarray
    """`[N]` int64, into the images."""
    boxes: np.ndarray
    """`[N, 4]` float64, xywh, image pixels, as annotated."""
    areas: np.ndarray
    """`[N]` float64, image pixels squared."""
    keypoints: np.ndarray
    """`[N, K, 2]` float64, image pixels; 0 where the visibility is 0."""
    visibility: np.ndarray
    """`[N, K]` int64: 0 not labelled, 1 labelled but hidden, 2 visible."""
    iscrowd: np.ndarray
    """`[N]` bool."""
    bbox_clip: np.ndarray
    """`[N]` bool: whether the box is clipped to its image before the crop; MPII's are not (`convert.mpii`)."""
    head_sizes: np.ndarray
    """`[N]` float64, image pixels, 0.6 of the head box's diagonal (PCKh); NaN without `head_box` or `head_size`."""

    @property
    def joints(self) -> tuple[str, ...]:
        return tuple(self.category["keypoints"])

    @property
    def persons(self) -> np.ndarray:
        """Indices of the annotations that show one person (no crowd) with at least one labelled joint."""
        return np.flatnonzero(~self.iscrowd & (self.visibility > 0).any(axis=1))

    def crop_boxes(self, rows: np.ndarray) -> np.ndarray:
        """The boxes `[n, 4]` of annotations `rows` to crop: clipped to the image, unless `bbox_clip` says not to."""
        boxes = self.boxes[rows]
        clipped = clip_boxes(boxes, self.image_sizes[self.image_index[rows]])
        return np.where(self.bbox_clip[rows, None], clipped, boxes)

    @property
    def labelled_image_ids(self) -> list[int]:
        """Ids of the images with such a person, in the file's order."""
        return [self.image_ids[row] for row in np.unique(self.image_index[self.persons])]


@dataclass(frozen=True)
class Detections:
    """The boxes of a person detector on the images of an annotation file."""

    image_index: np.ndarray
    """`[N]` int64, into the annotation file's images."""
    boxes: np.ndarray
    """`[N, 4]` float64, xywh, image pixels."""
    scores: np.ndarray
    """`[N]` float64."""
    skipped: int
    """Detections left out: of another category, on an image not in the annotations, or scored under the threshold."""


def read_coco(path: str | os.PathLike[str], data: Any = None) -> CocoAnnotations:
    """Read a COCO-keypoint file; `data`: its JSON where it has been read (`read_json`).

    Annotations of categories without keypoints are left out; an absent `area` is 0.53 of the box. `head_box` (x1, y1,
    x2, y2) or `head_size` (0.6 of its diagonal) are read where they are given, and so is `bbox_clip`.

    Raises:
        UserError: not JSON, not COCO, or a record that cannot be used; names the file, the record and the field.
    """
    path = Path(path)
    data = read_json(path) if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a COCO annotation file: a JSON {_kind(data)}, not an object")
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(data.get(key), list)]
    if missing:
        raise UserError(f"{path}: not a COCO annotation file: no list {' and no list '.join(missing)}")
    category = _keypoint_category(path, data["categories"])
    image_ids, file_names, image_sizes = _images(path, data["images"])
    _require(path, "annotation", data["annotations"], "category_id")
    records = [record for record in data["annotations"] if record["category_id"] == category["id"]]
    persons = _persons(path, records, len(category["keypoints"]))
    rows = {image_id: row for row, image_id in enumerate(image_ids)}
    image_index = np.array([rows.get(record["image_id"], -1) for record in records], dtype=np.int64)
    _check(
        path, records, image_index < 0, "image_id", "is not among the images; add the image or remove the annotation"
    )
    near, far = persons["boxes"][:, :2], persons["boxes"][:, :2] + persons["boxes"][:, 2:]
    outside = ((near >= image_sizes[image_index][:, ::-1]) | (far <= 0)).any(axis=1)
    used = (persons["visibility"] > 0).any(axis=1)
    _check(path, records, used & outside, "bbox", "lies outside its image; mend it or remove the record")
    return CocoAnnotations(path, category, image_ids, file_names, image_sizes, image_index=image_index, **persons)


def read_detections(
    path: str | os.PathLike[str], annotations: CocoAnnotations, score_threshold: float = 0.0
) -> Detections:
    """Read a detector's results list (`image_id, category_id, bbox, score`), for the images of `annotations`.

    Detections of another category or image, or scored under the threshold, are left out and counted; those on images
    that `annotations` does not list are named on stderr.

    Raises:
        UserError: not such a list, a record that cannot be used, or no detection left.
    """
    path = Path(path)
    data = read_json(path)
    if not isinstance(data, list):
        raise UserError(f"{path}: not a detection file: a JSON {_kind(data)}, expected a list of image_id, bbox, score")
    for field in ("image_id", "category_id", "bbox", "score"):
        _require(path, "detection", data, field)
    if not data:
        raise UserError(f"{path}: an empty list, no detection in it; was the detector run on these pictures?")
    kind = "detection"
    rows = {image_id: row for row, image_id in enumerate(annotations.image_ids)}
    scores = _numbers(path, data, [record["score"] for record in data], "score", (), kind)
    _check(path, data, ~np.isfinite(scores), "score", "is not a finite number; mend it or remove the record", kind)
    _check(path, data, [type(record["image_id"]) is not int for record in data], "image_id", "is not an integer", kind)
    image_index = np.array([rows.get(record["image_id"], -1) for record in data], dtype=np.int64)
    of_category = np.array([record["category_id"] == annotations.category["id"] for record in data], dtype=bool)
    kept = np.flatnonzero((image_index >= 0) & of_category & (scores >= score_threshold))
    if not len(kept):
        belonging = (image_index >= 0) & of_category
        if belonging.any():
            raise UserError(
                f"{path}: none of its {belonging.sum()} detections on these images is scored at least "
                f"{score_threshold}, the best {scores[belonging].max():g}; lower the threshold"
            )
        raise UserError(
            f"{path}: none of its {len(data)} detections has category {annotations.category['id']} and an image of "
            f"{annotations.path}; check that the two files belong together"
        )
    boxes = _numbers(path, data, [record["bbox"] for record in data], "bbox", (4,), kind)
    _check_boxes(path, data, boxes, np.isin(np.arange(len(data)), kept), kind)
    if unknown := int((image_index < 0).sum()):
        print(
            f"warning: {path}: {unknown} of its {len(data)} detections are on images that {annotations.path} does not "
            "list; they are left out",
            file=sys.stderr,
        )
    return Detections(image_index[kept], boxes[kept], scores[kept], skipped=len(data) - len(kept))


def read_image_list(path: str | os.PathLike[str]) -> list[str]:
    """File names of the `images` of any COCO file, with or without annotations (unlabeled2017's has none).

    Raises:
        UserError: not JSON, or no list of images in it.
    """
    path = Path(path)
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("images"), list) or not data["images"]:
        raise UserError(f"{path}: not a COCO file: no list images, or an empty one")
    return _images(path, data["images"])[1]


def check_images_exist(names: Iterable[str], image_dir: str | os.PathLike[str]) -> None:
    """Look for the pictures `names`, relative to `image_dir`, listing each folder once.

    Raises:
        UserError: names the first missing picture and how many are missing.
    """
    wanted: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        folder, _, base = name.rpartition("/")
        wanted[Path(image_dir, folder)].append(base)
    missing = []
    for folder, names in wanted.items():
        try:
            with os.scandir(folder) as entries:
                present = {entry.name for entry in entries}
        except OSError as error:
            raise UserError(f"{folder}: cannot list this image folder ({error.strerror}); check the path") from None
        missing += [folder / name for name in names if name not in present]
    if missing:
        total = sum(map(len, wanted.values()))
        raise UserError(
            f"{missing[0]}: no such picture ({len(missing)} of {total} are missing); "
            "check the image folder or complete the download"
        )


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises UserError where it cannot be read or is none."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error}); it may be cut short, or not be JSON at all") from None


def _keypoint_category(path: Path, categories: list[Any]) -> dict[str, Any]:
    found = [category for category in categories if isinstance(category, dict) and category.get("keypoints")]
    if len(found) != 1:
        names = ", ".join([repr(category.get("name")) for category in found[:3]] + ["..."] * (len(found) > 3))
        raise UserError(
            f"{path}: {len(found)} categories with keypoints ({names or 'none'}), expected exactly one: keep one, "
            "or let `python -m poserelay convert --dataset coco` make one of those with the same joints"
        )
    category = found[0]
    joints = category["keypoints"]
    if "id" not in category:
        raise UserError(f"{path}: category {category.get('name')!r}: field id is missing")
    if not isinstance(joints, list) or not all(isinstance(joint, str) for joint in joints):
        raise UserError(f"{path}: category {category.get('name')!r}: field keypoints: expected a list of joint names")
    # Joints go by name everywhere: of two that are alike one would stand for the other.
    for index, found in enumerate(match_joints(joints, joints)):
        if found != index:
            raise UserError(
                f"{path}: category {category.get('name')!r}: field keypoints: {joints[index]!r} and "
                f"{joints[found or 0]!r} are one name (case, spaces, hyphens and underscores do not count); rename one"
            )
    return category


def _images(path: Path, records: list[Any]) -> tuple[list[int], list[str], np.ndarray]:
    for field in ("id", "file_name", "width", "height"):
        _require(path, "image", records, field)
    ids = [record["id"] for record in records]
    names = [record["file_name"] for record in records]
    _check(path, records, [type(id_) is not int for id_ in ids], "id", "is not an integer", "image")
    _check(path, records, _repeated(ids), "id", "appears twice; ids must be unique", "image")
    wrong = [not isinstance(name, str) or not name for name in names]
    _check(path, records, wrong, "file_name", "is not a file name", "image")
    sizes = []
    for field in ("height", "width"):
        sizes.append(_numbers(path, records, [record[field] for record in records], field, (), "image"))
        wrong = ~(np.isfinite(sizes[-1]) & (sizes[-1] >= 1))
        _check(path, records, wrong, field, "is not a positive number of pixels", "image")
    return ids, names, np.stack(sizes, axis=1).astype(np.int64)


def _persons(path: Path, records: list[dict[str, Any]], joints: int) -> dict[str, np.ndarray]:
    for field in ("id", "image_id", "bbox"):
        _require(path, "annotation", records, field)
    ids = [record["id"] for record in records]
    _check(path, records, [type(id_) is not int for id_ in ids], "id", "is not an integer")
    _check(path, records, [type(record["image_id"]) is not int for record in records], "image_id", "is not an integer")
    _check(path, records, _repeated(ids), "id", "appears twice; ids must be unique")
    # Boxes without labelled joints (COCO keeps them in the same file) may leave the list out.
    unlabelled = [0] * (3 * joints)
    triples = [record.get("keypoints", unlabelled) for record in records]
    keypoints = _numbers(path, records, triples, "keypoints", (3 * joints,)).reshape(-1, joints, 3)
    wrong = ~np.isfinite(keypoints).all(axis=(1, 2))
    _check(path, records, wrong, "keypoints", "holds NaN or infinity; an unlabelled joint is written 0, 0, 0")
    wrong = ~np.isin(keypoints[..., 2], (0, 1, 2)).all(axis=1)
    _check(path, records, wrong, "keypoints", "holds a visibility that is not 0, 1 or 2")
    visibility = keypoints[..., 2].astype(np.int64)
    boxes = _numbers(path, records, [record["bbox"] for record in records], "bbox", (4,))
    _check_boxes(path, records, boxes, (visibility > 0).any(axis=1))
    clipped = [record.get("bbox_clip", True) for record in records]
    _check(path, records, [type(value) is not bool for value in clipped], "bbox_clip", "is not true or false")
    box_areas = AREA_OF_BOX * boxes[:, 2] * boxes[:, 3]
    stated = [record.get("area", area) for record, area in zip(records, box_areas.tolist(), strict=True)]
    areas = _numbers(path, records, stated, "area", ())
    _check(path, records, ~(np.isfinite(areas) & (areas >= 0)), "area", "is not a number of pixels, 0 or more")
    return {
        "ids": np.array(ids, dtype=np.int64),
        "boxes": boxes,
        "areas": areas,
        "keypoints": np.where(visibility[..., None] > 0, keypoints[..., :2], 0.0),
        "visibility": visibility,
        "iscrowd": np.array([bool(record.get("iscrowd", 0)) for record in records], dtype=bool),
        "bbox_clip": np.array(clipped, dtype=bool),
        "head_sizes": _head_sizes(path, records),
    }


def _head_sizes(path: Path, records: Sequence[dict[str, Any]]) -> np.ndarray:
    sizes = np.full(len(records), np.nan)
    # Where a person has both, the box is what was annotated.
    for field, shape in (("head_size", ()), ("head_box", (4,))):
        rows = [row for row, record in enumerate(records) if record.get(field) is not None]
        having = [records[row] for row in rows]
        found = _numbers(path, having, [record[field] for record in having], field, shape)
        if shape:
            found = SC_BIAS * np.linalg.norm(found[:, 2:] - found[:, :2], axis=1)
        wrong = ~(np.isfinite(found) & (found > 0))
        _check(path, having, wrong, field, "gives no size above 0; mend it or remove the field")
        sizes[rows] = found
    return sizes


def _check_boxes(
    path: Path, records: Sequence[dict[str, Any]], boxes: np.ndarray, used: ArrayLike, kind: str = "annotation"
) -> None:
    wrong = ~np.isfinite(boxes).all(axis=1)
    _check(path, records, wrong, "bbox", "holds NaN or infinity; mend it or remove the record", kind)
    empty = np.asarray(used) & (boxes[:, 2:] <= 0).any(axis=1)
    _check(path, records, empty, "bbox", "(x, y, width, height) has no area; mend it or remove the record", kind)


def _numbers(
    path: Path,
    records: Sequence[dict[str, Any]],
    values: Sequence[Any],
    field: str,
    shape: tuple[int, ...],
    kind: str = "annotation",
) -> np.ndarray:
    """`[len(values), *shape]` float64; a record whose value is not so many numbers is a UserError."""

    def wrong(test: Callable[[Any], bool], problem: Callable[[Any], str]) -> None:
        for record, value in zip(records, values, strict=True):
            if not test(value):
                raise UserError(f"{path}: {_name(kind, record, records)}: field {field}: {problem(value)}")

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    if shape:
        size = shape[0]
        wrong(lambda value: isinstance(value, list), lambda value: f"{_shown(value)} is not a list of {size} numbers")
        wrong(lambda value: len(value) == size, lambda value: f"has {len(value)} numbers, expected {size}")
    try:
        array = np.asarray(values) if len(values) else np.zeros((0, *shape))
    except (ValueError, OverflowError):
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iuf":
        numeric = (lambda value: all(map(number, value))) if shape else number
        wrong(numeric, lambda value: f"{_shown(value)} is not numeric")
    return np.asarray(values, dtype=np.float64).reshape(len(values), *shape)


def _require(path: Path, kind: str, records: Sequence[Any], field: str) -> None:
    for record in records:
        if not isinstance(record, dict):
            raise UserError(f"{path}: an entry of the {kind}s is a JSON {_kind(record)}, expected an object")
        if field not in record:
            raise UserError(f"{path}: {_name(kind, record, records)}: field {field} is missing")


def _check(
    path: Path,
    records: Sequence[dict[str, Any]],
    wrong: ArrayLike,
    field: str,
    problem: str,
    kind: str = "annotation",
) -> None:
    """Raise a UserError about the first record that is wrong."""
    bad = np.flatnonzero(np.asarray(wrong, dtype=bool))
    if len(bad):
        record = records[bad[0]]
        more = f" ({len(bad)} such records)" if len(bad) > 1 else ""
        raise UserError(
            f"{path}: {_name(kind, record, records)}: field {field}: {_shown(record.get(field))} {problem}{more}"
        )


def _name(kind: str, record: dict[str, Any], records: Sequence[Any]) -> str:
    return f"{kind} {record['id']}" if "id" in record else f"{kind} number {records.index(record) + 1} of its list"


def _repeated(ids: Sequence[Any]) -> list[bool]:
    if len(set(ids)) == len(ids):
        return [False] * len(ids)
    seen: set[Any] = set()
    return [id_ in seen or seen.add(id_) is not None for id_ in ids]


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", str: "text", type(None): "null"}.get(type(value), "value")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
