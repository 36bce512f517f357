"""MPII Human Pose: the site's mpii_human_pose_v1_u12_1.mat, or the JSON lists of HRNet, SimpleBaseline and mmpose.

Both give a person's rough centre and its scale (height / 200 pixels). Pixels count from 1, in joints, centres and head
boxes: the site does not say so, but HRNet's authors have asked MPII's (microsoft/human-pose-estimation.pytorch, issue
110). HRNet crops a square of 1.25 * 200 * scale pixels about the centre moved down by 15 * scale
(lib/dataset/mpii.py). Our `bbox` is that square without the factor, which is the padding that `geometry.box_to_affine`
adds: the crop is HRNet's.

Such a square reaches over the picture's edge, and HRNet does not clip it. Boxes that are clipped to the picture, as
COCO's are, give smaller crops about another centre; `bbox_clip: false` in every annotation says that it is not meant.

PCKh divides by 0.6 of the diagonal of `head_box` [x1, y1, x2, y2], image pixels from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..datasets.coco import read_json
from ..errors import UserError
from . import (
    CATEGORY,
    LOST,
    Conversion,
    Pictures,
    as_floats,
    box_problem,
    is_number,
    numbers,
    person,
    place_pictures,
    read_mat,
    require_pictures,
)

JOINTS = 16


class Annotated(NamedTuple):
    """A person as MPII gives it, in its own pixels, which count from 1."""

    where: str
    """How a message calls it."""
    image: str
    center: tuple[float, float] | None
    scale: float | None
    joints: list[tuple[float, float, int]]
    """K of (x, y, our visibility)."""
    head: tuple[float, float, float, float] | None = None
    """x1, y1, x2, y2."""
    single: bool | None = None
    """Whether it stands apart from others (the single-person protocol); None where the layout does not say."""
    place: int = 1
    """Among the picture's annorects in the .mat, from 1."""


def read_mpii(path: Path, pictures: Pictures | None, head_boxes: Path | None = None) -> Conversion:
    """Persons of the training part; ids count the source's persons from 1, and its pictures likewise.

    The .mat tells hidden (1) from visible (2) joints, but not of the head's two, which are 2; the lists tell neither.
    Persons without a position or a scale are left out, as they cannot be cropped.

    Args:
        pictures: they are needed, because no layout gives their sizes.
        head_boxes: gt_valid.mat of the lists, in their order; the .mat of the site has head boxes itself.

    Raises:
        UserError: not such a file, or a record that is not as described; names it.
    """
    pictures = require_pictures(pictures, path)
    if path.suffix == ".mat":
        if head_boxes is not None:
            raise UserError(f"--head_boxes {head_boxes}: {path} has head boxes itself; leave it out")
        names, persons, dropped = _site(path)
    else:
        persons = list(_list(path))
        if head_boxes is not None:
            persons = _with_heads(path, persons, head_boxes)
        names, dropped = [annotated.image for annotated in persons], {}
    found = Conversion()
    found.dropped.update(dropped)
    ids = place_pictures(found, names, pictures)
    sizes = {image["id"]: (image["width"], image["height"]) for image in found.images}
    heads = 0
    for number, annotated in enumerate(persons, 1):
        image = ids.get(annotated.image)
        name = annotated.where.removeprefix(f"{path}: ")
        if image is None or annotated.center is None or annotated.scale is None:
            found.drop(f"persons {LOST}" if image is None else "persons without a position or a scale", name)
            continue
        joints = [(x - 1, y - 1, visibility) for x, y, visibility in annotated.joints]
        record = person(number, image, crop_box(annotated.center, annotated.scale), joints)
        if problem := box_problem(record, sizes[image]):
            found.drop(f"persons {problem}", name)
            continue
        record["bbox_clip"] = False
        if annotated.head is not None and annotated.head[:2] != annotated.head[2:]:
            record["head_box"] = [corner - 1 for corner in annotated.head]
            heads += 1
        if annotated.single is not None:
            record["single_person"] = annotated.single
        found.annotations.append(record)
    found.notes.append(f"{heads} of the persons have a head box" + ("" if heads else ": PCKh needs --head_boxes"))
    return found


def read_mpii_test(path: Path, pictures: Pictures | None) -> Conversion:
    """All pictures of the test part in the order of annolist, and a box for every person with a position and a scale.

    A box has the fields of a COCO detection and `annorect`, the person's place in its picture from 1, by which
    `evaluation test --submit mpii` gives the pose back.

    Raises:
        UserError: as `read_mpii`; not the site's .mat; a picture that is missing, as a submission holds all of them.
    """
    if path.suffix != ".mat":
        raise UserError(f"{path}: the test part is in the site's .mat alone; give mpii_human_pose_v1_u12_1.mat")
    pictures = replace(require_pictures(pictures, path), max_unreadable=0)
    names, persons, _ = _site(path, test=True)
    found = Conversion()
    ids = place_pictures(found, names, pictures)
    for annotated in persons:
        if annotated.center is None or annotated.scale is None:
            found.drop("persons without a position or a scale", annotated.where.removeprefix(f"{path}: "))
            continue
        box = crop_box(annotated.center, annotated.scale)
        record = {"image_id": ids[annotated.image], "category_id": CATEGORY, "bbox": box, "score": 1.0}
        found.boxes.append({**record, "annorect": annotated.place})
    return found


def crop_box(center: tuple[float, float], scale: float) -> list[float]:
    """Box xywh, pixels from 0, whose crop with a padding of 1.25 is HRNet's; `center` counts pixels from 1."""
    side = 200 * scale
    return [center[0] - 1 - side / 2, center[1] + 15 * scale - 1 - side / 2, side, side]


def _list(path: Path) -> Iterator[Annotated]:
    data = read_json(path)
    if not isinstance(data, list) or not data:
        raise UserError(
            f"{path}: not an MPII list of image, joints, joints_vis, center, scale: a JSON {type(data).__name__}; give "
            "train.json or valid.json of HRNet, or the .mat of the site"
        )
    for number, record in enumerate(data, 1):
        where = f"{path}: person {number}"
        if not isinstance(record, dict) or not isinstance(record.get("image"), str) or not record["image"]:
            raise UserError(f"{where}: expected an object with image, joints, joints_vis, center and scale")
        where += f" ({record['image']})"
        x, y = numbers(record.get("center"), 2, f"{where}: field center")
        scale = record.get("scale")
        if not is_number(scale):
            raise UserError(f"{where}: field scale: found {json.dumps(scale)}, expected a number")
        joints = [(0.0, 0.0, 0)] * JOINTS
        if "joints" in record:  # the test set has none
            joints = _listed_joints(record, where)
        # HRNet's lists mark a person without a position by -1.
        yield Annotated(where, record["image"], None if x == -1 else (x, y), scale if scale > 0 else None, joints)


def _listed_joints(record: dict[str, Any], where: str) -> list[tuple[float, float, int]]:
    places = record["joints"]
    if not isinstance(places, list) or len(places) != JOINTS:
        raise UserError(f"{where}: field joints: expected {JOINTS} pairs x, y")
    pairs = [numbers(place, 2, f"{where}: field joints") for place in places]
    labelled = numbers(record.get("joints_vis"), JOINTS, f"{where}: field joints_vis")
    if not set(labelled) <= {0, 1}:
        raise UserError(f"{where}: field joints_vis: a value is neither 0 nor 1")
    return [(x, y, 2 * int(known)) for (x, y), known in zip(pairs, labelled, strict=True)]


def _with_heads(path: Path, persons: list[Annotated], head_boxes: Path) -> list[Annotated]:
    """The persons with the head boxes of gt_valid.mat, once its joints have shown that it is of the same persons."""
    boxes, joints, missing = read_mat(head_boxes, "headboxes_src", "pos_gt_src", "jnt_missing")
    count = len(persons)
    if not np.isfinite(boxes).all():
        raise UserError(f"{head_boxes}: headboxes_src holds NaN or infinity; give the .mat that came with {path.name}")
    if boxes.shape != (2, 2, count) or joints.shape != (JOINTS, 2, count) or missing.shape != (JOINTS, count):
        raise UserError(
            f"{head_boxes}: {boxes.shape[-1]} head boxes for the {count} persons of {path}; give the .mat of this list"
        )
    known = np.array([[v > 0 for *_, v in annotated.joints] for annotated in persons])
    places = np.array([[(x, y) for x, y, _ in annotated.joints] for annotated in persons])
    off = np.abs(joints.transpose(2, 0, 1) - places).max(-1) > 0.1
    other = ((off & known) | (known != (missing.T == 0))).any(axis=1)
    if other.any():
        raise UserError(
            f"{persons[int(other.argmax())].where}: has other joints in {head_boxes}; give the .mat of this very list"
        )
    corners = boxes.transpose(2, 0, 1).reshape(count, 4).astype(np.float64).tolist()
    return [
        annotated._replace(head=(x1, y1, x2, y2)) for annotated, (x1, y1, x2, y2) in zip(persons, corners, strict=True)
    ]


def _site(path: Path, *, test: bool = False) -> tuple[list[str], list[Annotated], dict[str, int]]:
    """Names of the training (or test) pictures, their persons, and what the file has beside the training part."""
    (release,) = read_mat(path, "RELEASE")
    release = np.ravel(release)[0]
    pictures, training, single = (
        np.ravel(getattr(release, name, ())) for name in ("annolist", "img_train", "single_person")
    )
    if not len(pictures) or len(training) != len(pictures) or len(single) != len(pictures):
        raise UserError(
            f"{path}: RELEASE has {len(pictures)} annolist, {len(training)} img_train and {len(single)} single_person, "
            "expected as many of each; give mpii_human_pose_v1_u12_1.mat"
        )
    names, persons = [], []
    for number, (picture, known, apart) in enumerate(zip(pictures, training, single, strict=True), 1):
        if bool(known) == test:
            continue
        name = _text(_part(picture, "image"), "name")
        if not name:
            raise UserError(f"{path}: annolist({number}): field image.name is missing")
        names.append(name)
        alone = {int(index) for index in np.ravel(apart)}
        for index, rect in enumerate(np.ravel(_field(picture, "annorect")), 1):
            where = f"{path}: annolist({number}).annorect({index}) ({name})"
            persons.append(_site_person(rect, where, name, index in alone, index))
    others = 0 if test else len(pictures) - len(names)
    return names, persons, {"pictures of the test set, whose joints are not public": others} if others else {}


def _site_person(rect: Any, where: str, name: str, single: bool, place: int) -> Annotated:
    position, scale = _part(rect, "objpos"), as_floats(_field(rect, "scale"), 1)
    x, y = (as_floats(_field(position, axis), 1) for axis in "xy")
    joints = [(0.0, 0.0, 0)] * JOINTS
    for point in np.ravel(_field(_part(rect, "annopoints"), "point")):
        values = [as_floats(_field(point, axis), 1) for axis in ("x", "y", "id")]
        if any(value is None for value in values) or values[2] is None or not 0 <= values[2][0] < JOINTS:
            raise UserError(f"{where}: a point without x, y or an id of 0 to {JOINTS - 1}")
        px, py, joint = (float(value[0]) for value in values if value is not None)
        joints[int(joint)] = (px, py, _visibility(point, where))
    corners = [as_floats(_field(rect, corner), 1) for corner in ("x1", "y1", "x2", "y2")]
    head = [float(corner[0]) for corner in corners if corner is not None]
    return Annotated(
        where,
        name,
        None if x is None or y is None else (float(x[0]), float(y[0])),
        None if scale is None or scale[0] <= 0 else float(scale[0]),
        joints,
        (head[0], head[1], head[2], head[3]) if len(head) == 4 else None,
        single,
        place,
    )


def _visibility(point: Any, where: str) -> int:
    """is_visible is a number, a text or empty: the head's two points come from its box, which says nothing of it."""
    value = np.ravel(_field(point, "is_visible"))
    if not value.size or not str(value[0]).strip():
        return 2
    try:
        return {0.0: 1, 1.0: 2}[float(value[0])]
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{where}: field is_visible: found {str(value[0])!r}, expected 0 or 1") from None


def _field(struct: Any, name: str) -> Any:
    """A field of a MATLAB struct; nothing where the struct, or the field, is absent."""
    return getattr(struct, name, ())


def _part(struct: Any, name: str) -> Any:
    """The struct in a field of a struct; None where it is empty."""
    values = np.ravel(_field(struct, name))
    return values[0] if values.size else None


def _text(struct: Any, name: str) -> str:
    values = np.ravel(_field(struct, name))
    return str(values[0]) if values.size else ""
