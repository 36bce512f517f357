"""COCO-keypoint files of any joints, as one that `read_coco` takes: AP-10K, Animal Pose, JHMDB, Human-Art, ...

Categories with the same joints become one (AP-10K has one per species), and records that cannot be read are left out
and named in the report, where the readers of known datasets stop. Ids, boxes and keypoints stay the file's. A person
without a `bbox` (MPII-TRB) gets the extent of its labelled joints with a margin, clipped to the picture. Where an
annotation has `keypoints_K` with the category's K joints beside a shorter `keypoints`, it is taken (Human-Art).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..datasets.coco import read_json
from ..errors import UserError
from ..keypoints import Skeleton, match_joints, skeleton_from_category
from . import (
    CATEGORY,
    Conversion,
    Pictures,
    check_lists,
    clipped_box,
    coco_annotation,
    coco_image,
    fill_sizes,
    is_number,
    numbers,
)


class Category(NamedTuple):
    """A category with keypoints."""

    name: str
    joints: tuple[str, ...]
    limbs: list[Any]
    """Pairs of joints, counted from 1, as far as the file gives such."""
    family: Any
    """Its supercategory."""


def read_any_coco(
    path: Path, pictures: Pictures | None, skeleton: Skeleton | None = None, margin: float = 20.0
) -> Conversion:
    """The annotations of the categories with these joints, as one category.

    Args:
        pictures: needed where `images` do not give their sizes.
        skeleton: the joints to take, by name, and limbs; None: the file's, which all categories with any have alike.
        margin: of the boxes of annotations without one, image pixels.

    Raises:
        UserError: not a COCO file, no category with the joints, or categories with different ones.
    """
    data = read_json(path)
    check_lists(path, data)
    categories = _categories(path, data.get("categories"), skeleton)
    joints = next(iter(categories.values())).joints if skeleton is None else skeleton.joints
    found = Conversion()
    known = [record for record in data["images"] if isinstance(record, dict) and type(record.get("id")) is int]
    lost = fill_sizes(known, pictures, path, found)
    sizes: dict[int, tuple[int, int]] = {}
    for record in data["images"]:
        try:
            image = coco_image(path, record)
        except UserError as error:
            if not isinstance(record, dict) or record.get("id") not in lost:
                found.drop("images whose record cannot be read", _short(error, path))
            continue
        if image["id"] in sizes:
            found.drop("images whose id appeared before", f"image {image['id']}")
            continue
        sizes[image["id"]] = image["width"], image["height"]
        found.images.append(image)
    seen: set[int] = set()
    counts: Counter[str] = Counter()
    for record in data["annotations"]:
        try:
            category = _category_of(path, record, categories)
            if category is None:
                found.drop("persons of another category", f"annotation {record.get('id')!r}")
                continue
            record = _with_box(path, _with_joints(path, record, category, joints), sizes, margin)
            annotation, problem = coco_annotation(path, record, CATEGORY, range(len(joints)), sizes, seen)
        except UserError as error:
            found.drop("persons whose record cannot be read", _short(error, path))
            continue
        if problem:
            found.drop(f"persons {problem}", f"annotation {record['id']}")
            continue
        seen.add(annotation["id"])
        counts[category.name] += 1
        found.annotations.append(annotation | _our_fields(record))
    found.skeleton = _skeleton(path, list(categories.values()), skeleton)
    if len(categories) > 1:
        listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
        found.notes.append(f"{len(categories)} categories are one now, {found.skeleton.name}: {listed}")
    return found


def _categories(path: Path, records: Any, skeleton: Skeleton | None) -> dict[Any, Category]:
    """By id, the categories to take."""
    found: dict[Any, Category] = {}
    for record in records if isinstance(records, list) else []:
        joints = record.get("keypoints") if isinstance(record, dict) else None
        if not isinstance(joints, list) or not joints or not all(isinstance(joint, str) for joint in joints):
            continue
        if isinstance(record.get("id"), int | str):
            limbs = record.get("skeleton")
            name, family = str(record.get("name", "unnamed")), record.get("supercategory")
            found[record["id"]] = Category(name, tuple(joints), limbs if isinstance(limbs, list) else [], family)
    if not found:
        raise UserError(f"{path}: no category with an id and a list keypoints of joint names; give a keypoint file")
    if skeleton is not None:
        having = {number: c for number, c in found.items() if None not in match_joints(c.joints, skeleton.joints)}
        if not having:
            first = next(iter(found.values()))
            missing = [joint for joint in skeleton.joints if match_joints(first.joints, [joint]) == [None]]
            raise UserError(
                f"--skeleton {skeleton.name}: {', '.join(missing)} not among the joints of {path}, category "
                f"{first.name!r} ({', '.join(first.joints)})"
            )
        return having
    kinds = {category.joints: category.name for category in reversed(found.values())}
    if len(kinds) > 1:
        listed = ", ".join(f"{name!r}: {len(joints)}" for joints, name in list(kinds.items())[:4])
        raise UserError(
            f"{path}: categories with different joints ({listed}{', ...' if len(kinds) > 4 else ''}); name those to "
            "take by --skeleton, a packaged skeleton or a YAML file"
        )
    return found


def _category_of(path: Path, record: Any, categories: Mapping[Any, Category]) -> Category | None:
    """None where it is another than those; raises UserError where the record is no object."""
    if not isinstance(record, dict):
        raise UserError(f"{path}: annotation {record!r}: expected an object")
    number = record.get("category_id")
    return categories.get(number) if isinstance(number, int | str) else None


def _with_joints(path: Path, record: dict[str, Any], category: Category, joints: Sequence[str]) -> dict[str, Any]:
    """The record with `joints` in their order, of our category."""
    count = len(category.joints)
    longer = f"keypoints_{count}"
    beside = longer in record and record.get("keypoints") != record[longer]
    field = longer if beside else "keypoints"
    where = f"{path}: annotation {record.get('id')!r}: field {field}"
    flat = numbers(record.get(field, [0] * (3 * count)), 3 * count, where)
    places = [place for place in match_joints(category.joints, joints) if place is not None]
    taken = [value for place in places for value in flat[3 * place : 3 * place + 3]]
    made = {**record, "category_id": CATEGORY, "keypoints": taken}
    if beside or len(taken) != len(flat):
        made.pop("num_keypoints", None)  # of other joints
    return made


def _with_box(
    path: Path, record: dict[str, Any], sizes: Mapping[int, tuple[int, int]], margin: float
) -> dict[str, Any]:
    """The record with a box about its labelled joints where it has none."""
    if record.get("bbox") is not None or record.get("image_id") not in sizes:
        return record
    triples = np.array(record["keypoints"], dtype=np.float64).reshape(-1, 3)
    places = triples[triples[:, 2] > 0, :2]
    if not len(places):
        raise UserError(f"{path}: annotation {record.get('id')!r}: neither bbox nor a labelled joint")
    return {**record, "bbox": clipped_box(places, margin, sizes[record["image_id"]])}


def _our_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_coco` and the metrics read beside COCO's fields, where it is what they take."""
    kept = {}
    for field in ("head_size", "max_iou"):
        value = record.get(field)
        if is_number(value) and (value > 0 or field == "max_iou"):
            kept[field] = value
    box = record.get("head_box")
    if isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and box[:2] != box[2:]:
        kept["head_box"] = box
    for field in ("bbox_clip", "single_person"):
        if isinstance(record.get(field), bool):
            kept[field] = record[field]
    return kept


def _skeleton(path: Path, categories: Sequence[Category], skeleton: Skeleton | None) -> Skeleton:
    first = categories[0]
    family = first.family if isinstance(first.family, str) else "merged"
    shared = all(category.family == first.family for category in categories)
    name = first.name if len(categories) == 1 else family if shared else "merged"
    if skeleton is not None:
        return replace(skeleton, name=name)
    try:
        return skeleton_from_category({"name": name, "keypoints": list(first.joints), "skeleton": first.limbs})
    except UserError as error:
        raise UserError(f"{path}: its keypoints cannot be told apart: {error}") from None


def _short(error: UserError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
