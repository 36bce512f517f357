"""PoseTrack 2018: the folder of one JSON per video (posetrack_data/annotations/val), or one file as mmpose's.

Kept are the labelled frames; all ids stay, since detections go by those of the frames. A joint's third number says
that it is labelled, and no more: ours is 2. Boxes are the files', which are the extent of the joints and 15 % of its
sides at both their ends; a person without one gets the same. `bbox_head` becomes `head_box`, for PCKh.

Persons in the polygons `ignore_regions_x` and `_y` were not annotated: a box about each is marked iscrowd, with an id
above all persons'. pycocotools lets a pose go unpunished that lies within three times the box's sides about its centre,
and PoseTrack's own evaluator within the polygon.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.coco import read_json
from ..errors import UserError
from ..keypoints import load_skeleton
from . import LOST, NAMED, Conversion, Pictures, check_lists, fill_sizes, joints_box, numbers, person, tidy_coco

JOINTS = 17
MARGIN = 0.15
"""Of a side of the joints' extent, added at both its ends."""


def read_posetrack18(path: Path, pictures: Pictures | None, ignore_regions: bool = True) -> Conversion:
    """The persons and ignored regions of the labelled frames, video by video in the order of the files' names.

    Args:
        path: a folder, of which every .json is read, or one file.
        pictures: needed where a file does not give their sizes, as the site's do not; the folder that holds `images`.
        ignore_regions: whether those become boxes marked iscrowd.

    Raises:
        UserError: no such files, a record that is not as described (names it), or an id in two of the files.
    """
    videos = {file: _read_video(file) for file in _files(path)}
    found = Conversion()
    labelled = [frame for data in videos.values() for frame in data["images"] if _is_labelled(frame)]
    lost = fill_sizes(labelled, pictures, path, found)
    owners: dict[tuple[str, int], Path] = {}
    regions: list[tuple[int, list[float]]] = []
    for file, data in videos.items():
        frames = {frame["id"]: frame for frame in data["images"]}
        unlabelled = dict.fromkeys(number for number, frame in frames.items() if not _is_labelled(frame))
        for number in unlabelled:
            found.drop("frames that are not labelled", f"image {number}")
        persons = []
        for record in data["annotations"]:
            record = _with_box(record, file)
            if problem := _problem(record, unlabelled, lost):
                found.drop(f"persons {problem}", f"annotation {record['id']}")
                continue
            persons.append(record)
        left = [frame for frame in data["images"] if frame["id"] not in (*unlabelled, *lost)]
        part = tidy_coco(file, {**data, "images": left, "annotations": persons}, load_skeleton("posetrack18"))
        for kind, records in (("image", part.images), ("annotation", part.annotations)):
            for record in records:
                if (owner := owners.setdefault((kind, record["id"]), file)) != file:
                    raise UserError(f"{file}: {kind} {record['id']} is in {owner} as well; give each video once")
        sources = {record["id"]: record for record in reversed(persons)}  # the first of those with one id
        for record in part.annotations:
            record["keypoints"][2::3] = [2 * (v > 0) for v in record["keypoints"][2::3]]
            _add_head(record, sources[record["id"]], file)
        found.images += part.images
        found.annotations += part.annotations
        found.dropped.update(part.dropped)
        for reason, names in part.names.items():
            found.names[reason] = [*found.names.get(reason, []), *names][:NAMED]
        if ignore_regions:
            regions += [(image["id"], box) for image in part.images for box in _regions(frames[image["id"]], file)]
    first = max((record["id"] for record in found.annotations), default=0) + 1
    for number, (image_id, box) in enumerate(regions, first):
        found.annotations.append({**person(number, image_id, box, [(0, 0, 0)] * JOINTS), "iscrowd": 1})
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.json"))
    if not files:
        raise UserError(f"{path}: no .json in it; give the folder of one part's videos, such as annotations/val")
    return files


def _read_video(file: Path) -> dict[str, Any]:
    data = read_json(file)
    check_lists(file, data)
    for kind in ("images", "annotations"):
        fields = ("id",) if kind == "images" else ("id", "image_id")
        for number, record in enumerate(data[kind], 1):
            if not isinstance(record, dict) or any(type(record.get(field)) is not int for field in fields):
                needed = " and ".join(fields)
                raise UserError(f"{file}: number {number} of its {kind}: expected an object with integer {needed}")
    return data


def _is_labelled(frame: dict[str, Any]) -> bool:
    """Files that do not say it hold labelled frames only, as mmpose's."""
    return bool(frame.get("is_labeled", frame.get("has_labeled_person", True)))


def _with_box(record: dict[str, Any], file: Path) -> dict[str, Any]:
    """The person with a box about its joints where it has none, and there are two."""
    if record.get("bbox") or record.get("keypoints") is None:
        return record
    flat = numbers(record["keypoints"], 3 * JOINTS, f"{file}: annotation {record['id']}: field keypoints")
    places = np.array([flat[start : start + 2] for start in range(0, len(flat), 3) if flat[start + 2] > 0])
    if len(places) < 2:
        return record
    return {**record, "bbox": joints_box(places, MARGIN * np.ptp(places, axis=0))}


def _problem(record: dict[str, Any], unlabelled: Container[int], lost: set[int]) -> str | None:
    """Why a person is left out before its record is looked at; None where it is not."""
    if record["image_id"] in unlabelled:
        return "on a frame that is not labelled"
    if record["image_id"] in lost:
        return LOST
    return None if record.get("bbox") else "without two labelled joints, which have no box"


def _add_head(record: dict[str, Any], source: dict[str, Any], file: Path) -> None:
    if not source.get("bbox_head"):
        return
    x, y, width, height = numbers(source["bbox_head"], 4, f"{file}: annotation {record['id']}: field bbox_head")
    if width > 0 and height > 0:
        record["head_box"] = [x, y, x + width, y + height]


def _regions(frame: dict[str, Any], file: Path) -> list[list[float]]:
    """Boxes xywh about the polygons of a frame in which persons were not annotated."""
    where = f"{file}: image {frame['id']}: fields ignore_regions_x and ignore_regions_y"
    sides = [frame.get(f"ignore_regions_{axis}") or [] for axis in "xy"]
    polygons = [polygon for side in sides if isinstance(side, list) for polygon in side]
    alike = all(isinstance(side, list) for side in sides) and len(sides[0]) == len(sides[1])
    if not alike or not all(isinstance(polygon, list) for polygon in polygons):
        raise UserError(f"{where}: expected as many lists of coordinates in one as in the other")
    boxes = []
    for xs, ys in zip(*sides, strict=True):
        across, down = numbers(xs, len(xs), where), numbers(ys, len(xs), where)
        if xs:
            boxes.append([min(across), min(down), max(across) - min(across), max(down) - min(down)])
    return boxes
