"""The persons that a run reads: labelled, unlabelled, and those to validate on."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from poserelay.datasets.coco import CocoAnnotations
from poserelay.datasets.sampling import worker_init
from poserelay.datasets.topdown import CropRecord, TopDownDataset, collate
from poserelay.datasets.training import read_labelled, validation_persons
from poserelay.datasets.unlabelled_persons import read_images, unlabelled_persons, with_pseudo_labels
from poserelay.distributed import StopSignals
from poserelay.errors import CheckFailed, Interrupted, UnreadableImage, UserError
from poserelay.inference import predict_crops
from poserelay.keypoints import Skeleton
from poserelay.model import PoseModel
from poserelay.run import write_atomic
from poserelay.subsets import Chosen, choose_labelled, drop_labels

from .config import SemiConfig
from .step import SemiStep
from .teachers import StoredTeacher, matched_rows


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
    labelled_annotations, chosen = drop_labels(annotations, chosen, config.labels)
    labelled = TopDownDataset(
        labelled_annotations,
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


def label_once(
    fabric: Fabric,
    data: Data,
    trained: PoseModel,
    step: SemiStep,
    config: SemiConfig,
    upstream: Mapping[str, Any] | None,
) -> Data:
    """The teacher's joints on the unlabelled persons, predicted once and kept in the run directory.

    A person whose picture cannot be read is not taught; more of them than `max_unreadable` is CheckFailed. Raises
    UserError where the file there is of another teacher or other persons, Interrupted at a signal.
    """
    assert data.unlabelled is not None
    unlabelled, path = data.unlabelled, Path(config.run_dir) / "pseudo_labels.safetensors"
    made_of = {"teacher_sha256": str((upstream or {}).get("teacher_sha256")), "persons": persons_sha256(unlabelled)}
    exists = fabric.broadcast(path.exists())
    if not exists:
        keypoints, confidence = predict_all(fabric, trained.to(fabric.device), unlabelled, config)
        if fabric.is_global_zero:
            tensors = {
                name: torch.from_numpy(np.ascontiguousarray(values))
                for name, values in (("keypoints", keypoints), ("confidence", confidence))
            }
            write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=made_of))
        fabric.barrier()
    with safe_open(path, framework="pt") as file:
        if file.metadata() != made_of:
            raise UserError(
                f"{path}: made by another teacher, or of other persons; put them back, name a new run_dir, or remove "
                "this run to train it anew"
            )
        stored = {name: file.get_tensor(name).numpy() for name in ("keypoints", "confidence")}
    rows = matched_rows(trained.skeleton, data.skeleton)
    order = [row or 0 for row in rows]
    confidence = np.where([row is not None for row in rows], stored["confidence"][:, order], np.nan)
    gamma = step.teachers[0].gamma
    sure = np.nan_to_num(confidence, nan=-np.inf)
    taught = with_pseudo_labels(unlabelled, stored["keypoints"][:, order], sure, gamma)
    taught.annotation_ids = list(range(len(taught)))
    teacher = StoredTeacher(
        step.models[0], torch.from_numpy(confidence).float(), gamma=gamma, sigma=config.sigma, quantize=config.quantize
    )
    step.teachers[:] = [teacher]
    return replace(data, unlabelled=taught)


def predict_all(
    fabric: Fabric, trained: PoseModel, unlabelled: TopDownDataset, config: SemiConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints `[N, J, 2]`, image pixels, and confidence `[N, J]`, NaN of unreadable pictures; a share per process."""
    count, world, joints = len(unlabelled), fabric.world_size, len(trained.skeleton.joints)
    share = -(-count // world)
    rows = [row % count for row in range(fabric.global_rank * share, (fabric.global_rank + 1) * share)]
    found = torch.full((share, joints, 3), torch.nan)
    loader = DataLoader(
        ReadablePersons(unlabelled, rows),
        batch_size=config.optim.unlabelled_batch_size,
        num_workers=config.workers,
        collate_fn=list,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # a loader would otherwise draw its workers' seed from the global one
    )
    trained.eval()
    with StopSignals() as signals:
        bar = tqdm(loader, "label", unit="batch", leave=False, disable=None if fabric.is_global_zero else True)
        for number, items in enumerate(bar):
            crops = [item for item in items if isinstance(item, CropRecord)]
            places = [place for place, item in enumerate(items) if isinstance(item, CropRecord)]
            for item in items:
                if isinstance(item, str):
                    print(f"warning: {item}; this person is not taught", file=sys.stderr)
            if crops:
                answer = predict_crops(trained, collate(crops).to(fabric.device), config.decoding)
                first = number * config.optim.unlabelled_batch_size
                found[[first + place for place in places]] = torch.cat([answer.keypoints, answer.scores[..., None]], -1)
            if stop := signals.agreed(fabric):
                raise Interrupted(f"{stop} while the teacher labels; start the same command again to label anew")
    gathered: Tensor = fabric.all_gather(found.to(fabric.device))  # pyright: ignore[reportAssignmentType]
    everyone = gathered.reshape(-1, joints, 3)[:count].cpu().double().numpy()
    unreadable = int(np.isnan(everyone[:, 0, 2]).sum())
    if unreadable > config.max_unreadable * count:
        raise CheckFailed(
            f"{unreadable} of the {count} unlabelled persons are on unreadable pictures (named above); repair them, or "
            f"raise max_unreadable ({config.max_unreadable})"
        )
    return everyone[..., :2], everyone[..., 2]


def persons_sha256(persons: TopDownDataset) -> str:
    """Of the boxes and the pictures' names, in their order."""
    digest = hashlib.sha256(np.ascontiguousarray(persons.boxes).tobytes())
    digest.update(json.dumps([persons.annotations.file_names[row] for row in persons.image_index]).encode())
    return digest.hexdigest()


class ReadablePersons(Dataset[CropRecord | str]):
    """The crops of some persons as they are, or the message of a picture that cannot be read."""

    def __init__(self, persons: TopDownDataset, rows: Sequence[int]) -> None:
        self.persons = persons
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CropRecord | str:
        try:
            return self.persons.evaluation_sample(self.rows[index])
        except UnreadableImage as error:
            return str(error)
