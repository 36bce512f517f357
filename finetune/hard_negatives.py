"""CCM's hard-negative person detections: boxes that a detector is sure of where nobody is annotated (section 4.1)."""

from __future__ import annotations

import numpy as np

from poserelay.datasets.coco import CocoAnnotations, Detections, read_detections
from poserelay.errors import UserError


def read_hard_negatives(
    path: str, annotations: CocoAnnotations, threshold: float, image_ids: list[int] | None = None
) -> Detections:
    """The detections scored at least `threshold` that touch no annotated box of their image, crowds included.

    Those wholly outside their image, which would be black crops, are skipped.

    image_ids: only these images; None: all of `annotations`, those without a person too.

    Raises:
        UserError: the file cannot be read, or no detection is left.
    """
    found = read_detections(path, annotations, threshold)
    near, far = found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]
    inside = ((far > 0) & (near < annotations.image_sizes[found.image_index][:, ::-1])).all(axis=1)
    chosen = np.ones(len(found.boxes), dtype=bool)
    if image_ids is not None:
        chosen = np.isin(np.array(annotations.image_ids)[found.image_index], image_ids)
    clear = ~touching(found.boxes, found.image_index, annotations.boxes, annotations.image_index)
    kept = inside & chosen & clear
    if not kept.any():
        raise UserError(
            f"{path}: no hard negative among its {len(kept)} detections scored at least {threshold}: "
            f"{(~chosen).sum()} are on pictures without labels of this run, {(chosen & ~inside).sum()} outside their "
            f"picture, {(chosen & inside & ~clear).sum()} touch an annotated box; lower "
            "hard_negatives.score_threshold, or leave hard_negatives out"
        )
    return Detections(
        found.image_index[kept], found.boxes[kept], found.scores[kept], found.skipped + int((~kept).sum())
    )


def touching(boxes: np.ndarray, image_index: np.ndarray, others: np.ndarray, others_image: np.ndarray) -> np.ndarray:
    """`[N]` bool: whether a box shares area with any of `others` on the same image.

    boxes `[N, 4]` and others `[M, 4]` are xywh, image pixels; image_index `[N]` and others_image `[M]` name images.
    """
    order = np.argsort(others_image, kind="stable")
    first = np.searchsorted(others_image[order], image_index, side="left")
    count = np.searchsorted(others_image[order], image_index, side="right") - first
    # Every pair of a box with one of its own image's.
    box = np.repeat(np.arange(len(boxes)), count)
    other = order[np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)]
    near = np.maximum(boxes[box, :2], others[other, :2])
    far = np.minimum(boxes[box, :2] + boxes[box, 2:], others[other, :2] + others[other, 2:])
    return np.bincount(box, (near < far).all(axis=1), minlength=len(boxes)) > 0
