"""What the training stages read alike: the labelled file with its skeleton, and the persons to validate on."""

from __future__ import annotations

from pathlib import Path

from ..config import DataConfig, ModelConfig
from ..errors import UserError
from ..keypoints import Skeleton, match_joints, resolve_skeleton
from ..scoring import order_of_file
from .coco import CocoAnnotations, read_coco, read_detections
from .topdown import TopDownDataset


def read_labelled(data: DataConfig, model: ModelConfig) -> tuple[CocoAnnotations, Skeleton]:
    """The annotations to train on and the model's skeleton.

    Raises:
        UserError: the file cannot be read, or lacks joints of the skeleton.
    """
    annotations = read_coco(data.annotations)
    skeleton = resolve_skeleton(model.skeleton, annotations.category)
    rows = match_joints(annotations.joints, skeleton.joints)
    lacking = [joint for joint, row in zip(skeleton.joints, rows, strict=True) if row is None]
    if lacking:
        raise UserError(
            f"{annotations.path}: its joints lack {', '.join(lacking)} of skeleton {skeleton.name}, which would "
            "never be learnt; name them alike, or choose another skeleton (--model.skeleton auto takes the file's)"
        )
    return annotations, skeleton


def validation_persons(data: DataConfig, model: ModelConfig, skeleton: Skeleton) -> TopDownDataset | None:
    """The crops to validate on; None where the configuration names none.

    Raises:
        UserError: a file cannot be read, a picture is missing, or the skeleton lacks joints of the file.
    """
    if not data.validation_annotations:
        return None
    annotations = read_coco(data.validation_annotations)
    order_of_file(skeleton, annotations.joints)  # scoring refuses joints that the skeleton does not have
    boxes = data.validation_boxes
    return TopDownDataset(
        annotations,
        Path(data.validation_images or data.images),
        skeleton,
        (model.input.height, model.input.width),
        alignment=model.input.alignment,
        detections=None if boxes == "gt" else read_detections(boxes, annotations),
    )
