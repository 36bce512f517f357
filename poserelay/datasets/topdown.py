"""Annotated or detected persons as crops of the network's input size, with HRNet's augmentation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from ..batch import CropBatch
from ..config import Augmentation
from ..errors import UnreadableImage, UserError
from ..geometry import apply_affine, box_to_affine, half_body_box
from ..keypoints import Skeleton, match_joints
from .coco import CocoAnnotations, Detections, check_images_exist
from .sampling import Draws, epoch_order, read_image


@dataclass
class CropRecord:
    """One person; `CropBatch` says what the fields hold."""

    image: np.ndarray
    keypoints: np.ndarray
    visibility: np.ndarray
    affine: np.ndarray
    box: np.ndarray
    score: float
    area: float
    image_id: int
    annotation_id: int | None
    negative: bool = False


class TopDownDataset(Dataset[CropRecord]):
    """Crops of the persons of a COCO-keypoint file, or of a detector's boxes on its images.

    Persons are the annotations with a labelled joint that are no crowd; their boxes are clipped to the image as HRNet
    does, detected ones are not. Joints are matched by name; those that the file lacks have visibility 0.

    Args:
        image_dir: where the file names of `annotations` start.
        size: (height, width) of the crop, input pixels.
        augmentation: what `sample` draws; None draws nothing. Ignored by `evaluation_sample`.
        detections: boxes to crop instead of the persons; their crops carry no labels.
        padding: factor on the box.
        rows: the annotations to take, indices into `annotations`; None takes all persons. Not with detections.
        negative: of detections, that nobody is there.

    A picture of another size than the file says is unreadable: its labels would be in the wrong places.

    Raises:
        UserError: no joint in common, a missing picture, or no person left.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        image_dir: str | os.PathLike[str],
        skeleton: Skeleton,
        size: tuple[int, int],
        *,
        augmentation: Augmentation | None = None,
        detections: Detections | None = None,
        padding: float = 1.25,
        alignment: Literal["hrnet", "udp"] = "hrnet",
        rows: np.ndarray | None = None,
        negative: bool = False,
    ) -> None:
        self.annotations = annotations
        self.image_dir = Path(image_dir)
        self.skeleton = skeleton
        self.size = size
        self.augmentation = augmentation
        self.padding = padding
        self.alignment: Literal["hrnet", "udp"] = alignment
        self.negative = negative
        self._flip_index = np.array(skeleton.flip_index)
        self._upper = np.isin(np.arange(len(skeleton.joints)), skeleton.indices(skeleton.upper_body))

        keypoints, visibility = matched_joints(annotations, skeleton)
        if detections is None:
            persons = annotations.persons
            taken = persons if rows is None else persons[np.isin(persons, rows)]
            self.image_index = annotations.image_index[taken]
            self.boxes = annotations.crop_boxes(taken)
            self.scores = np.ones(len(taken))
            self.areas = annotations.areas[taken]
            self.annotation_ids: list[int | None] = annotations.ids[taken].tolist()
            self.keypoints, self.visibility = keypoints[taken], visibility[taken]
        else:
            self.image_index = detections.image_index
            self.boxes = detections.boxes
            self.scores = detections.scores
            self.areas = self.boxes[:, 2] * self.boxes[:, 3]
            self.annotation_ids = [None] * len(self.boxes)
            self.keypoints = np.zeros((len(self.boxes), *keypoints.shape[1:]))
            self.visibility = np.zeros((len(self.boxes), *visibility.shape[1:]), dtype=np.int64)
        if not len(self.boxes):
            wanted = "person with a labelled joint" if detections is None else "detection"
            chosen = "" if rows is None else f" among the {len(rows)} chosen annotations"
            raise UserError(f"{annotations.path}: no {wanted}{chosen}; check the file or the choice")
        used = np.unique(self.image_index)
        check_images_exist([annotations.file_names[row] for row in used], self.image_dir)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> CropRecord:
        return self.evaluation_sample(index)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A uniform permutation for each epoch."""
        return epoch_order(seed, epoch, len(self))

    def sample(self, index: int, generator: Draws) -> CropRecord:
        """Crop `index` with the augmentation drawn from view 0; raises UnreadableImage."""
        if self.augmentation is None:
            return self.evaluation_sample(index)
        labelled = self.visibility[index] > 0
        draws = generator(0)
        box, rotation, scale, flip = _draw(
            self.augmentation, draws, self.boxes[index], self.keypoints[index], labelled, self._upper, self.padding
        )
        return self._crop(index, box, rotation, scale, flip)

    def evaluation_sample(self, index: int) -> CropRecord:
        """Crop `index` as it is; raises UnreadableImage."""
        return self._crop(index, self.boxes[index], 0.0, 1.0, False)

    def _crop(self, index: int, box: np.ndarray, rotation: float, scale: float, flip: bool) -> CropRecord:
        row = int(self.image_index[index])
        picture = read_annotated(self.annotations, self.image_dir, row)
        affine = box_to_affine(
            box, self.size, padding=self.padding, rotation=rotation, scale=scale, flip=flip, alignment=self.alignment
        )
        keypoints, visibility = apply_affine(affine, self.keypoints[index]), self.visibility[index]
        if flip:
            keypoints, visibility = keypoints[self._flip_index], visibility[self._flip_index]
        return CropRecord(
            image=warp(picture, affine, self.size),
            keypoints=np.where(visibility[:, None] > 0, keypoints, 0.0),
            visibility=visibility,
            affine=affine,
            box=self.boxes[index],
            score=float(self.scores[index]),
            area=float(self.areas[index]),
            image_id=self.annotations.image_ids[row],
            annotation_id=self.annotation_ids[index],
            negative=self.negative,
        )


def matched_joints(annotations: CocoAnnotations, skeleton: Skeleton) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints `[N, K, 2]` and visibility `[N, K]` of all annotations, in the skeleton's order.

    Raises UserError where no joint is in common.
    """
    source = match_joints(annotations.joints, skeleton.joints)
    places = [place for place, index in enumerate(source) if index is not None]
    columns = [index for index in source if index is not None]
    if not places:
        raise UserError(
            f"{annotations.path}: its joints ({', '.join(annotations.joints)}) have none in common with "
            f"skeleton {skeleton.name} ({', '.join(skeleton.joints)}); choose another or name them alike"
        )
    shape = (len(annotations.ids), len(source))
    keypoints, visibility = np.zeros((*shape, 2)), np.zeros(shape, dtype=np.int64)
    keypoints[:, places] = annotations.keypoints[:, columns]
    visibility[:, places] = annotations.visibility[:, columns]
    return keypoints, visibility


def read_annotated(annotations: CocoAnnotations, image_dir: Path, row: int) -> np.ndarray:
    """The picture `[H, W, 3]` of an annotation file's image `row`; raises UnreadableImage, also for another size."""
    path = image_dir / annotations.file_names[row]
    picture = read_image(path)
    height, width = annotations.image_sizes[row].tolist()
    if picture.shape[:2] != (height, width):
        raise UnreadableImage(
            path,
            f"is {picture.shape[1]} x {picture.shape[0]} pixels as stored, but {width} x {height} in "
            f"{annotations.path} (resized, or turned by its EXIF data?)",
        )
    return picture


def warp(picture: np.ndarray, affine: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop `[3, height, width]` of a picture `[H, W, 3]`: bilinear, black outside; `affine` is image -> input."""
    height, width = size
    image = cv2.warpAffine(picture, affine, (width, height), flags=cv2.INTER_LINEAR)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def collate(crops: Sequence[CropRecord]) -> CropBatch:
    """Stack crops; the `collate_fn` of evaluation."""

    def stacked(field: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(crop, field) for crop in crops]))

    return CropBatch(
        images=stacked("image"),
        keypoints=stacked("keypoints").float(),
        visibility=stacked("visibility"),
        affine=stacked("affine").float(),
        boxes=stacked("box").float(),
        scores=torch.tensor([crop.score for crop in crops]),
        areas=torch.tensor([crop.area for crop in crops]),
        image_ids=[crop.image_id for crop in crops],
        annotation_ids=[crop.annotation_id for crop in crops],
        negative=torch.tensor([crop.negative for crop in crops]),
    )


def collate_draws(draws: Sequence[tuple[CropRecord, list[str]]]) -> CropBatch:
    """Stack what `TrainingDraws` gives; the `collate_fn` of training."""
    batch = collate([crop for crop, _ in draws])
    batch.replaced = [message for _, messages in draws for message in messages]
    return batch


def _draw(
    augmentation: Augmentation,
    draws: np.random.Generator,
    box: np.ndarray,
    keypoints: np.ndarray,
    labelled: np.ndarray,
    upper: np.ndarray,
    padding: float,
) -> tuple[np.ndarray, float, float, bool]:
    """HRNet's draws (JointsDataset): box xywh in image pixels, rotation in degrees, scale, flip."""
    # Every number is drawn whether it is used or not, so that one setting does not shift the draws of another.
    half_body, rotated, flipped = draws.random(3)
    preference, turn, zoom = draws.standard_normal(3)
    if labelled.sum() > augmentation.half_body_min_joints and half_body < augmentation.half_body_probability:
        half = half_body_box(keypoints, labelled, upper, bool(preference < 0.5), padding)
        box = box if half is None else half
    rotation = 0.0
    if rotated < augmentation.rotation_probability:
        rotation = float(np.clip(turn, -2, 2)) * augmentation.rotation
    scale = 1 + float(np.clip(zoom, -1, 1)) * augmentation.scale
    return box, rotation, scale, bool(flipped < augmentation.flip_probability)
