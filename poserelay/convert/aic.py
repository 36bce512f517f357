"""AI Challenger 2017, keypoints: the competition's lists, or mmpose's COCO-like files.

A list holds per picture the boxes `human_annotations` [x1, y1, x2, y2] and the joints `keypoint_annotations`, 14 times
x, y, v, where v is 1 visible, 2 hidden and 3 not in the picture or not to be guessed: ours are 2, 1 and 0.

The competition's own score takes the whole box as the person's area and only visible joints; ours, as mmpose's, takes
0.53 of the box and all labelled joints, and is not comparable with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..datasets.coco import read_json
from ..errors import UserError
from ..keypoints import load_skeleton
from . import (
    LOST,
    Conversion,
    Pictures,
    box_problem,
    numbers,
    person,
    place_pictures,
    require_pictures,
    tidy_coco,
)

VISIBILITY = {1: 2, 2: 1, 3: 0}
JOINTS = 14


def read_aic(path: Path, pictures: Pictures | None) -> Conversion:
    """The persons of either layout; ids count from 1 in the order of the list, a COCO-like file keeps its own.

    Args:
        pictures: needed by the list, which does not give their sizes.

    Raises:
        UserError: neither layout, or a record that is not as described; names it.
    """
    data = read_json(path)
    if isinstance(data, dict):
        return tidy_coco(path, data, load_skeleton("aic14"))
    if not isinstance(data, list) or not data:
        raise UserError(
            f"{path}: neither AI Challenger's list of pictures nor a COCO file; give the competition's JSON"
        )
    pictures = require_pictures(pictures, path)
    for number, record in enumerate(data, 1):
        _check_record(record, f"{path}: record {number}")
    found = Conversion()
    ids = place_pictures(found, [_file_name(record) for record in data], pictures)
    sizes = {image["id"]: (image["width"], image["height"]) for image in found.images}
    number = 0
    for record in data:
        image = ids.get(_file_name(record))
        boxes, joints = record["human_annotations"], record["keypoint_annotations"]
        for human in dict.fromkeys([*boxes, *joints]):
            number += 1
            name = f"picture {record['image_id']}, {human}"
            if image is None or human not in boxes:
                found.drop(f"persons {LOST}" if image is None else "persons without a box", name)
                continue
            where = f"{path}: {name}"
            x1, y1, x2, y2 = numbers(boxes[human], 4, f"{where}: field human_annotations")
            labels = _joints(joints[human], where) if human in joints else [(0.0, 0.0, 0)] * JOINTS
            annotation = person(number, image, [x1, y1, x2 - x1, y2 - y1], labels)
            if problem := box_problem(annotation, sizes[image]):
                found.drop(f"persons {problem}", name)
                continue
            found.annotations.append(annotation)
    return found


def _check_record(record: Any, where: str) -> None:
    if not isinstance(record, dict) or not isinstance(record.get("image_id"), str) or not record["image_id"]:
        raise UserError(f"{where}: expected an object with image_id, human_annotations and keypoint_annotations")
    for field in ("human_annotations", "keypoint_annotations"):
        if not isinstance(record.get(field), dict):
            raise UserError(f"{where} (picture {record['image_id']}): field {field}: expected {{human1: [...], ...}}")


def _file_name(record: dict[str, Any]) -> str:
    return f"{record['image_id']}.jpg"


def _joints(value: Any, where: str) -> list[tuple[float, float, int]]:
    flat = numbers(value, 3 * JOINTS, f"{where}: field keypoint_annotations")
    if not set(flat[2::3]) <= VISIBILITY.keys():
        raise UserError(f"{where}: field keypoint_annotations: a visibility is not 1, 2 or 3")
    return [(x, y, VISIBILITY[int(v)]) for x, y, v in zip(flat[::3], flat[1::3], flat[2::3], strict=True)]
