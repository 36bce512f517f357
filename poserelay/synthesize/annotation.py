"""COCO annotations, read from the map of what each pixel shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..keypoints import Skeleton
from .body import PARTS, PERSON, ROUND, SURFACES
from .people import Person


def annotate(person: Person, labels: np.ndarray, skeleton: Skeleton) -> dict[str, Any]:
    """COCO fields of a person in the picture with the given labels [H, W].

    A joint is 0 outside the picture (then at 0, 0), 2 where its pixel shows a surface that it lies on, and 1 elsewhere:
    behind an object, another person or the person's own body. Box and area are those of the visible pixels.
    """
    mask = labels // PERSON == person.number
    height, width = labels.shape
    keypoints = []
    for name in skeleton.joints:
        x, y = (round(float(value), 2) for value in person.joints[name])
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            keypoints += [0, 0, 0]
            continue
        pixel = (round(y), round(x))
        part = PARTS[labels[pixel] % PERSON] if mask[pixel] else None
        seen = part in SURFACES[name] and (person.facing[name] or part not in ROUND)
        keypoints += [x, y, 2 if seen else 1]
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = encoded["counts"].decode("ascii")  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "keypoints": keypoints,
        "num_keypoints": sum(flag > 0 for flag in keypoints[2::3]),
        "bbox": coco_mask.toBbox(encoded).tolist(),
        "area": int(mask.sum()),
        "segmentation": {"size": [height, width], "counts": counts},
        "iscrowd": 0,
    }


def coco_file(
    people: Sequence[list[dict[str, Any]]], size: int, skeleton: Skeleton, recipe: dict[str, int]
) -> dict[str, Any]:
    """The annotation file of pictures of `size` x `size` pixels; `people` are those of `annotate`, per picture."""
    owned = [(image, person) for image, persons in enumerate(people) for person in persons]
    return {
        "info": {"description": "synthesised people", "synthesis": recipe},
        "images": [{"id": i, "file_name": f"{i:06d}.jpg", "height": size, "width": size} for i in range(len(people))],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 1, **person} for i, (image, person) in enumerate(owned, start=1)
        ],
        "categories": [
            {
                "id": 1,
                "name": "person",
                "supercategory": "person",
                "keypoints": list(skeleton.joints),
                "skeleton": [[i + 1 for i in skeleton.indices(limb)] for limb in skeleton.limbs],
            }
        ],
    }
