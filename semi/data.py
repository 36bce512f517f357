"""The persons that a run reads: labelled, unlabelled, and those to validate on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file

from poserelay.datasets.coco import CocoAnnotations, read_coco, read_detections
from poserelay.datasets.topdown import TopDownDataset
from poserelay.datasets.unlabelled_persons import read_images, unlabelled_persons, with_pseudo_labels
from poserelay.distributed import on_rank_zero
from poserelay.errors import UserError
from poserelay.inference import predict_poses
from poserelay.keypoints import Skeleton, match_joints, resolve_skeleton
from poserelay.model import PoseModel
from poserelay.run import write_atomic
from poserelay.scoring import order_of_file
from poserelay.subsets import Chosen, choose_labelled

from .config import SemiConfig
from .teachers import matched_rows


@dataclass(frozen=True)
class Data:
    """What a run reads, checked before it starts."""

    skeleton: Skeleton
    labels: Chosen
    labelled: TopDownDataset
    unlabelled: TopDownDataset | None
    validation: TopDownDataset | None


def load_data(config: SemiConfig) -> Data:
    """Read and check the annotation files, and that every picture is there."""
    annotations = read_coco(config.data.annotations)
    skeleton = resolve_skeleton(config.model.skeleton, annotations.category)
    rows = match_joints(annotations.joints, skeleton.joints)
    lacking = [joint for joint, row in zip(skeleton.joints, rows, strict=True) if row is None]
    if lacking:
        raise UserError(
            f"{annotations.path}: its joints lack {', '.join(lacking)} of skeleton {skeleton.name}, which would "
            "never be learnt; name them alike, or choose another skeleton (--model.skeleton auto takes the file's)"
        )
    size, alignment = (config.model.input.height, config.model.input.width), config.model.input.alignment
    chosen = choose_labelled(annotations, config.labels)
    labelled = TopDownDataset(
        annotations,
        Path(config.data.images),
        skeleton,
        size,
        augmentation=config.augmentation,
        alignment=alignment,
        rows=chosen.rows,
    )
    validation = None
    if config.data.validation_annotations:
        truth = read_coco(config.data.validation_annotations)
        order_of_file(skeleton, truth.joints)  # scoring refuses joints that the skeleton does not have
        boxes = config.data.validation_boxes
        validation = TopDownDataset(
            truth,
            Path(config.data.validation_images or config.data.images),
            skeleton,
            size,
            alignment=alignment,
            detections=None if boxes == "gt" else read_detections(boxes, truth),
        )
    unlabelled = load_unlabelled(config, annotations, skeleton, chosen) if config.teacher.name != "none" else None
    return Data(skeleton, chosen, labelled, unlabelled, validation)


def load_unlabelled(
    config: SemiConfig, annotations: CocoAnnotations, skeleton: Skeleton, chosen: Chosen
) -> TopDownDataset:
    """The unlabelled persons: those that `labels` left of `annotations`, or those of a file of their own."""
    images, labelled_rows = config.data.images, None if config.unlabelled.keep_labelled else chosen.rows
    if config.unlabelled.annotations:
        annotations, labelled_rows = read_images(config.unlabelled.annotations, skeleton), None
        images = config.unlabelled.images or images
    return unlabelled_persons(
        annotations,
        images,
        skeleton,
        (config.model.input.height, config.model.input.width),
        augmentation=config.augmentation,
        alignment=config.model.input.alignment,
        boxes=config.unlabelled.boxes,
        box_threshold=config.unlabelled.box_threshold,
        labelled_rows=labelled_rows,
    )


def label_once(fabric: Fabric, data: Data, trained: PoseModel | None, config: SemiConfig) -> Data:
    """The teacher's joints on the unlabelled persons, predicted once and kept in the run directory."""
    assert trained is not None
    assert data.unlabelled is not None
    unlabelled, path = data.unlabelled, Path(config.run_dir) / "pseudo_labels.safetensors"

    def predict() -> None:
        if path.exists():
            return
        poses = predict_poses(
            trained.to(fabric.device), unlabelled, config.decoding, config.optim.unlabelled_batch_size, config.workers
        )
        tensors = {"keypoints": torch.from_numpy(poses.keypoints), "confidence": torch.from_numpy(poses.joint_scores)}
        write_atomic(path, lambda temporary: save_file(tensors, temporary))

    on_rank_zero(fabric, predict)
    fabric.barrier()
    stored = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    rows = matched_rows(trained.skeleton, data.skeleton)
    known = np.array([row is not None for row in rows])
    order = [row or 0 for row in rows]
    confidence = np.where(known, stored["confidence"][:, order], -np.inf)
    gamma = float(config.teacher.kwargs.get("gamma", 0.75))
    taught = with_pseudo_labels(unlabelled, stored["keypoints"][:, order], confidence, gamma)
    return replace(data, unlabelled=taught)
