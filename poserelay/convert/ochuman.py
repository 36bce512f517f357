"""OCHuman: the site's ochuman.json, or its COCO files, ochuman_coco_format_{val,test}_range_0.00_1.00.json.

ochuman.json becomes what its API (`toCocoFormart`) makes of it: persons with both joints and a mask, 17 of the 19
joints, the whole box as `area`, and visibility 2 where a joint is seen or hidden by its own body, 1 where others hide
it. `val` is the first 2,500 of the pictures with such a person, by image_id, and `test` the rest; ids count from 1 in
that order.

MaxIoU is the highest IoU of a person's box with another's of its picture; every person carries it as `max_iou`. Files
of a range of it (moderate [0.5, 0.75), hard [0.75, 1]) have neither the persons outside nor the pictures without one
inside, as the API's: a pose on a person that was left out is a false positive. Unlike the API's they keep the ids of
the file without a range.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..datasets.coco import read_json
from ..errors import UserError
from ..keypoints import load_skeleton, match_joints
from . import Conversion, box_problem, image_record, is_number, numbers, person, tidy_coco

VISIBILITY = {0: 0, 1: 2, 2: 2, 3: 1}
"""Missing, visible, hidden by the own body, hidden by others."""
VAL = 2500
"""Pictures of val."""
WITHOUT = "joints and a mask, which the dataset's own files leave out"


def read_ochuman(path: Path, split: str = "all", iou_range: tuple[float, float] | None = None) -> Conversion:
    """The persons of either layout; a COCO file keeps its ids.

    Args:
        split: of ochuman.json, all, val or test; a COCO file is one of them already.
        iou_range: only persons with low <= MaxIoU < high, or <= 1. ochuman.json states it, and so does a file of
            ours; where it is absent, it is of the boxes in the file.

    Raises:
        UserError: neither layout, a record that is not as described (names it), or a split of a COCO file.
    """
    data = read_json(path)
    if isinstance(data, dict) and "keypoint_names" in data:
        found, overlaps = _site(path, data, split)
    elif split != "all":
        raise UserError(f"--split {split}: {path} is no ochuman.json but one part already; leave it out")
    else:
        found = tidy_coco(path, data, load_skeleton("coco17"))
        stated = {record.get("id"): record.get("max_iou") for record in data["annotations"] if isinstance(record, dict)}
        known = bool(found.annotations) and all(is_number(stated[record["id"]]) for record in found.annotations)
        overlaps = stated if known else _overlaps(found.annotations)
        if iou_range is not None and not known:
            found.notes.append("MaxIoU is of the boxes in this file; ochuman.json states it, of all persons")
    for annotation in found.annotations:
        annotation["max_iou"] = overlaps[annotation["id"]]
    if iou_range is not None:
        _keep_range(found, *iou_range)
    return found


def max_ious(boxes: Sequence[Sequence[float]]) -> list[float]:
    """Highest IoU of each box (xywh) with another one, 0 where it meets none."""
    found = [0.0] * len(boxes)
    for (i, (x, y, width, height)), (j, (x2, y2, width2, height2)) in itertools.combinations(enumerate(boxes), 2):
        across, down = min(x + width, x2 + width2) - max(x, x2), min(y + height, y2 + height2) - max(y, y2)
        if across > 0 and down > 0:
            iou = across * down / (width * height + width2 * height2 - across * down)
            found[i], found[j] = max(found[i], iou), max(found[j], iou)
    return found


def _overlaps(annotations: Sequence[dict[str, Any]]) -> dict[int, float]:
    """MaxIoU of each by its id, of these boxes."""
    found: dict[int, float] = {}
    by_image = itertools.groupby(sorted(annotations, key=lambda a: a["image_id"]), lambda a: a["image_id"])
    for _, group in by_image:
        its = list(group)
        ious = max_ious([annotation["bbox"] for annotation in its])
        found |= {annotation["id"]: iou for annotation, iou in zip(its, ious, strict=True)}
    return found


def _keep_range(found: Conversion, low: float, high: float) -> None:
    kept = []
    named = f"[{low:g}, {high:g}{']' if high == 1 else ')'}"
    for annotation in found.annotations:
        overlap = annotation["max_iou"]
        if low <= overlap < high or overlap == high == 1:
            kept.append(annotation)
        else:
            found.drop(f"persons with a MaxIoU outside {named}", f"annotation {annotation['id']}")
    with_person = {annotation["image_id"] for annotation in kept}
    for image in found.images:
        if image["id"] not in with_person:
            found.drop("pictures without a person in that range", image["file_name"])
    found.annotations = kept
    found.images = [image for image in found.images if image["id"] in with_person]


def _site(path: Path, data: dict[str, Any], split: str) -> tuple[Conversion, dict[int, float]]:
    """The persons of a split, and the MaxIoU of each by its id."""
    names, pictures = data["keypoint_names"], data.get("images")
    skeleton = load_skeleton("coco17")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    order = [place for place in match_joints(names, skeleton.joints) if place is not None] if known else []
    if len(order) < len(skeleton.joints) or not isinstance(pictures, list):
        raise UserError(f"{path}: no list images, or keypoint_names without COCO's 17 joints; give ochuman.json")
    pictures = _sorted(path, pictures)
    having = [record for record in pictures if any(map(_is_whole, record["annotations"]))]
    first, last = {"all": (0, len(having)), "val": (0, VAL), "test": (VAL, len(having))}[split]
    chosen = having[first:last]
    found = Conversion()
    for record in pictures:
        if not any(map(_is_whole, record["annotations"])):
            found.drop(f"pictures without a person with {WITHOUT}", f"picture {record['image_id']}")
    for record in having[:first] + having[last:]:
        found.drop("pictures of the other split", f"picture {record['image_id']}")

    overlaps: dict[int, float] = {}
    number = 0
    for image_id, record in enumerate(chosen, 1):
        name = f"picture {record['image_id']}"
        where = f"{path}: {name}"
        image = image_record(record, image_id, where)
        found.images.append(image)
        for annotation, iou in zip(record["annotations"], _ious(record["annotations"], where), strict=True):
            if not _is_whole(annotation):
                found.drop(f"persons without {WITHOUT}", f"{name}, one of {len(record['annotations'])}")
                continue
            number += 1
            made = _annotation(annotation, number, image_id, order, len(names), f"{where}, person {number}")
            if problem := box_problem(made, (image["width"], image["height"])):
                found.drop(f"persons {problem}", f"{name}, person {number}")
                continue
            overlaps[number] = iou
            found.annotations.append(made)
    return found, overlaps


def _sorted(path: Path, pictures: list[Any]) -> list[dict[str, Any]]:
    """The pictures by image_id, which is what the splits go by."""
    seen: set[Any] = set()
    for number, record in enumerate(pictures, 1):
        where = f"{path}: picture number {number}"
        image_id = record.get("image_id") if isinstance(record, dict) else None
        if not isinstance(record, dict) or not isinstance(image_id, int | str):
            raise UserError(f"{where}: expected an object with image_id, file_name, width, height and annotations")
        if image_id in seen or type(image_id) is not type(pictures[0]["image_id"]):
            raise UserError(f"{where}: image_id {image_id!r} appears twice, or is of another kind than the first")
        persons = record.get("annotations")
        if not isinstance(persons, list) or not all(isinstance(annotation, dict) for annotation in persons):
            raise UserError(f"{where} ({image_id}): field annotations: expected a list of bbox, keypoints, segms")
        seen.add(image_id)
    return sorted(pictures, key=lambda record: record["image_id"])


def _is_whole(annotation: dict[str, Any]) -> bool:
    return bool(annotation.get("keypoints") and annotation.get("segms"))


def _ious(annotations: Sequence[dict[str, Any]], where: str) -> list[float]:
    """MaxIoU of each person of a picture, as stated, or of the boxes of all of them."""
    stated = [annotation.get("max_iou") for annotation in annotations]
    known = [value for value in stated if is_number(value)]
    if len(known) == len(stated):
        return known
    computed = max_ious([_box(annotation, where) for annotation in annotations])
    return [value if is_number(value) else iou for value, iou in zip(stated, computed, strict=True)]


def _box(annotation: dict[str, Any], where: str) -> list[float]:
    x1, y1, x2, y2 = numbers(annotation.get("bbox"), 4, f"{where}: field bbox")
    return [x1, y1, x2 - x1, y2 - y1]


def _annotation(
    annotation: dict[str, Any], number: int, image_id: int, order: Sequence[int], joints: int, where: str
) -> dict[str, Any]:
    flat = numbers(annotation["keypoints"], 3 * joints, f"{where}: field keypoints")
    if not set(flat[2::3]) <= VISIBILITY.keys():
        raise UserError(f"{where}: field keypoints: a visibility is not 0, 1, 2 or 3")
    box = _box(annotation, where)
    labels = [(flat[3 * place], flat[3 * place + 1], VISIBILITY[int(flat[3 * place + 2])]) for place in order]
    return {**person(number, image_id, box, labels), "area": max(box[2], 0) * max(box[3], 0)}
