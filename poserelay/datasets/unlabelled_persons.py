"""Persons whose joints are not used: crops of annotated or detected boxes, for semi-supervised training."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Literal

import numpy as np

from ..config import Augmentation
from ..errors import UserError
from ..keypoints import Skeleton
from .coco import CocoAnnotations, Detections, _images, _persons, read_coco, read_detections, read_json
from .topdown import TopDownDataset


def unlabelled_persons(
    annotations: CocoAnnotations,
    image_dir: str | os.PathLike[str],
    skeleton: Skeleton,
    size: tuple[int, int],
    *,
    augmentation: Augmentation | None,
    alignment: Literal["hrnet", "udp"] = "hrnet",
    boxes: str = "gt",
    box_threshold: float = 0.0,
    labelled_rows: np.ndarray | None = None,
) -> TopDownDataset:
    """Crops without labels: the visibility of every joint is 0, so that neither a target nor a half-body crop sees one.

    With boxes "gt" they are of the persons that have labelled joints but for those of `labelled_rows`, clipped to the
    image as HRNet does: the persons that Semi_Human_Pose takes, which leaves out COCO's many without a joint. In a
    file without any labelled joint they are of all boxes that are no crowd, have an area and lie on their image. With a
    detections JSON they are of all detections scored at least `box_threshold`, unclipped, on the images without a
    labelled person.

    Args:
        size: (height, width) of the crop, input pixels.
        labelled_rows: the labelled persons, indices into `annotations`; None leaves nobody out.

    Raises:
        UserError: nobody is left, no joint in common, a missing picture, or a detections file that cannot be used.
    """
    if boxes == "gt":
        found = _annotated(annotations, labelled_rows)
    else:
        found = _detected(annotations, boxes, box_threshold, labelled_rows)
    return TopDownDataset(
        annotations, image_dir, skeleton, size, augmentation=augmentation, detections=found, alignment=alignment
    )


def with_pseudo_labels(
    dataset: TopDownDataset, keypoints: np.ndarray, confidence: np.ndarray, threshold: float
) -> TopDownDataset:
    """A copy of `dataset` whose crops carry the joints above `threshold` as visible ones, and no other.

    Half-body crops stay off: the unlabelled crops that these are compared with have none.

    Args:
        keypoints: `[N, K, 2]`, image pixels, of the dataset's persons in its order.
        confidence: `[N, K]`.
    """
    if keypoints.shape != dataset.keypoints.shape or confidence.shape != dataset.visibility.shape:
        raise ValueError(
            f"keypoints {keypoints.shape} and confidence {confidence.shape} do not fit {len(dataset)} persons of "
            f"{len(dataset.skeleton.joints)} joints"
        )
    labelled = copy.copy(dataset)
    taken = confidence > threshold
    labelled.keypoints = np.where(taken[..., None], keypoints, 0.0).astype(np.float64)
    labelled.visibility = np.where(taken, 2, 0)
    if dataset.augmentation is not None:
        labelled.augmentation = dataclasses.replace(dataset.augmentation, half_body_probability=0.0)
    return labelled


def read_images(path: str | os.PathLike[str], skeleton: Skeleton) -> CocoAnnotations:
    """The images of a COCO file to crop detections from: as `read_coco` where it has annotations with keypoints, else
    without persons and as if of category 1 with the skeleton's joints (unlabeled2017 lists images alone).

    Raises:
        UserError: not JSON, no list of images in it, or a record that cannot be used.
    """
    path = Path(path)
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("images"), list) or not data["images"]:
        raise UserError(f"{path}: not a COCO file: no list images, or an empty one")
    categories = data.get("categories")
    described = isinstance(categories, list) and any(
        isinstance(category, dict) and category.get("keypoints") for category in categories
    )
    if described and data.get("annotations"):
        return read_coco(path)
    image_ids, file_names, image_sizes = _images(path, data["images"])
    category = {"id": 1, "name": skeleton.name, "keypoints": list(skeleton.joints)}
    nobody = _persons(path, [], len(skeleton.joints))
    return CocoAnnotations(
        path, category, image_ids, file_names, image_sizes, image_index=np.zeros(0, dtype=np.int64), **nobody
    )


def _annotated(annotations: CocoAnnotations, labelled_rows: np.ndarray | None) -> Detections:
    """The annotated boxes of the unlabelled persons, clipped to their images."""
    sizes = annotations.image_sizes[annotations.image_index]
    near, far = annotations.boxes[:, :2], annotations.boxes[:, :2] + annotations.boxes[:, 2:]
    usable = ~annotations.iscrowd & ((near < far) & (near < sizes[:, ::-1]) & (far > 0)).all(axis=1)
    jointless = usable & ~(annotations.visibility > 0).any(axis=1)
    persons = annotations.persons if len(annotations.persons) else np.flatnonzero(jointless)
    if not len(persons):
        raise UserError(
            f"{annotations.path}: no person with a box (they are read of the category that names keypoints); give a "
            "detections JSON as unlabelled.boxes instead of gt"
        )
    rows = persons if labelled_rows is None else np.setdiff1d(persons, labelled_rows)
    if not len(rows):
        others = f" (also a file of the boxes without a labelled joint alone: there are {jointless.sum()})"
        raise UserError(
            f"{annotations.path}: all its {len(persons)} persons with labelled joints are labelled ones, nobody is "
            "left; lower labels.ratio or labels.count, set unlabelled.keep_labelled, or name unlabelled.annotations"
            + (others if jointless.any() else "")
        )
    image_index, boxes = annotations.image_index[rows], annotations.crop_boxes(rows)
    return Detections(image_index, boxes, np.ones(len(rows)), skipped=len(annotations.ids) - len(rows))


def _detected(
    annotations: CocoAnnotations, path: str, threshold: float, labelled_rows: np.ndarray | None
) -> Detections:
    """The detections on the images without a labelled person."""
    found = read_detections(path, annotations, threshold)
    if labelled_rows is None:
        return found
    kept = ~np.isin(found.image_index, annotations.image_index[labelled_rows])
    if not kept.any():
        raise UserError(
            f"{path}: all its {len(kept)} detections are on images with labelled persons, nobody is left; lower "
            "labels.ratio or labels.count, set unlabelled.keep_labelled, or name unlabelled.annotations"
        )
    skipped = found.skipped + int((~kept).sum())
    return Detections(found.image_index[kept], found.boxes[kept], found.scores[kept], skipped)
