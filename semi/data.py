"""The persons that a run reads: labelled, unlabelled, and those to validate on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file

from poserelay.datasets.coco import CocoAnnotations
from poserelay.datasets.topdown import TopDownDataset
from poserelay.datasets.training import read_labelled, validation_persons
from poserelay.datasets.unlabelled_persons import read_images, unlabelled_persons, with_pseudo_labels
from poserelay.distributed import on_rank_zero
from poserelay.errors import UserError
from poserelay.inference import predict_poses
from poserelay.keypoints import Skeleton
from poserelay.model import PoseModel
from poserelay.run import write_atomic
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
    annotations, skeleton = read_labelled(config.data, config.model)
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
    unlabelled = load_unlabelled(config, annotations, skeleton, chosen) if config.teacher.name != "none" else None
    validation = validation_persons(config.data, config.model, skeleton)
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
    if len(stored["keypoints"]) != len(unlabelled):
        raise UserError(
            f"{path}: holds {len(stored['keypoints'])} persons, the data now {len(unlabelled)}; put the data back, or "
            "name a new run_dir"
        )
    rows = matched_rows(trained.skeleton, data.skeleton)
    known = np.array([row is not None for row in rows])
    order = [row or 0 for row in rows]
    confidence = np.where(known, stored["confidence"][:, order], -np.inf)
    gamma = float(config.teacher.kwargs.get("gamma", 0.75))
    taught = with_pseudo_labels(unlabelled, stored["keypoints"][:, order], confidence, gamma)
    return replace(data, unlabelled=taught)
