"""Whole images for single-stage models: augmented square crops to train on, and resized images to find persons in."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from ..batch import ImageBatch, PyramidBatch
from ..colour import JITTER, jitter_colour
from ..config import ImageAugmentation
from ..errors import UserError
from ..geometry import apply_affine, box_to_affine
from ..keypoints import Skeleton
from .coco import CocoAnnotations, check_images_exist
from .sampling import Draws, epoch_order
from .topdown import matched_joints, read_annotated, warp

MULTIPLE = 32
"""Sides of what the network sees in evaluation are padded to a multiple of this, the coarsest stride."""
LONGEST = 4
"""An image whose long side is more than this many times its short one is seen at a smaller scale, so that memory is
bounded."""


@dataclass
class ImageRecord:
    """One image with its n persons and r regions; `ImageBatch` says what the fields hold."""

    image: np.ndarray
    keypoints: np.ndarray
    visibility: np.ndarray
    areas: np.ndarray
    regions: np.ndarray
    affine: np.ndarray
    image_id: int


@dataclass
class PyramidRecord:
    """One image at each scale, `[3, h, w]`; `PyramidBatch` says what the fields hold."""

    images: list[np.ndarray]
    affine: list[np.ndarray]
    size: tuple[int, int]
    image_id: int


class FullImageDataset(Dataset[ImageRecord]):
    """Square crops of the images of a COCO-keypoint file, with all persons in them.

    An image is taken where it has a person with a labelled joint. What else is annotated on it - crowds, boxes without
    labelled joints, persons that are not among `rows` - is a region. Joints are matched by name.

    Args:
        image_dir: where the file names of `annotations` start.
        size: side of the crop, input pixels.
        augmentation: what `sample` draws; None takes the middle of the image as it is.
        rows: the labelled persons, indices into `annotations`; None takes all.

    An image of another size than the file says is unreadable: its labels would be in the wrong places.

    Raises:
        UserError: no joint in common, a missing picture, or no person.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        image_dir: str | os.PathLike[str],
        skeleton: Skeleton,
        size: int,
        *,
        augmentation: ImageAugmentation | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.annotations = annotations
        self.image_dir = Path(image_dir)
        self.skeleton = skeleton
        self.size = size
        self.augmentation = augmentation
        self._flip_index = np.array(skeleton.flip_index)
        self.keypoints, self.visibility = matched_joints(annotations, skeleton)
        known = annotations.persons[(self.visibility[annotations.persons] > 0).any(axis=1)]
        persons = known if rows is None else known[np.isin(known, rows)]
        if not len(persons):
            raise UserError(f"{annotations.path}: no person with a labelled joint; check the file or the choice")
        self.persons = persons
        """`[P]`, indices into the annotations: who is learnt."""
        self.images = np.unique(annotations.image_index[persons])
        """`[I]`, indices into the annotations' images."""
        others = np.setdiff1d(np.arange(len(annotations.ids)), persons)
        self._persons_of = _grouped(annotations.image_index, persons, len(annotations.image_ids))
        self._others_of = _grouped(annotations.image_index, others, len(annotations.image_ids))
        self.regions = sum(len(self._others_of[row]) for row in self.images)
        """Their number on all images."""
        check_images_exist([annotations.file_names[row] for row in self.images], self.image_dir)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageRecord:
        return self._crop(index, 0.0, 1.0, np.zeros(2), False, ())

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A uniform permutation for each epoch."""
        return epoch_order(seed, epoch, len(self))

    def sample(self, index: int, generator: Draws) -> ImageRecord:
        """Image `index` with the augmentation drawn from view 0; raises UnreadableImage."""
        if self.augmentation is None:
            return self[index]
        return self._crop(index, *_draw(self.augmentation, generator(0)))

    def _crop(
        self,
        index: int,
        rotation: float,
        scale: float,
        shift: np.ndarray,
        flip: bool,
        jitter: tuple[tuple[str, float], ...],
    ) -> ImageRecord:
        row = int(self.images[index])
        picture = read_annotated(self.annotations, self.image_dir, row)
        height, width = picture.shape[:2]
        side = min(height, width)
        box = np.array([(width - side) / 2, (height - side) / 2, side, side])
        affine = box_to_affine(box, (self.size, self.size), padding=1.0, rotation=rotation, scale=scale, flip=flip)
        affine[:, 2] += shift
        persons, others = self._persons_of[row], self._others_of[row]
        keypoints, visibility = apply_affine(affine, self.keypoints[persons]), self.visibility[persons]
        if flip:
            keypoints, visibility = keypoints[:, self._flip_index], visibility[:, self._flip_index]
        image = warp(picture, affine, (self.size, self.size))
        if jitter:
            jittered = jitter_colour(np.ascontiguousarray(image.transpose(1, 2, 0)), jitter, grey=False, fused=True)
            image = np.ascontiguousarray(jittered.transpose(2, 0, 1))
        return ImageRecord(
            image=image,
            keypoints=np.where(visibility[..., None] > 0, keypoints, 0.0),
            visibility=visibility,
            areas=self.annotations.areas[persons] * abs(np.linalg.det(affine[:, :2])),
            regions=self.annotations.boxes[others],
            affine=affine,
            image_id=self.annotations.image_ids[row],
        )


class PyramidDataset(Dataset[PyramidRecord]):
    """All images of a COCO file at the scales of an evaluation, in the order of their shapes, so that batches pad
    little.

    Args:
        image_dir: where the file names of `annotations` start.
        size: short side at scale 1, input pixels.
        scales: factors on it.

    Raises:
        UserError: a missing picture.
    """

    def __init__(
        self, annotations: CocoAnnotations, image_dir: str | os.PathLike[str], size: int, scales: Sequence[float]
    ) -> None:
        self.annotations = annotations
        self.image_dir = Path(image_dir)
        self.size = size
        self.scales = scales
        height, width = annotations.image_sizes.T
        self._order = np.argsort(width / height, kind="stable")
        check_images_exist(annotations.file_names, self.image_dir)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> PyramidRecord:
        """Raises UnreadableImage."""
        row = int(self._order[index])
        picture = read_annotated(self.annotations, self.image_dir, row)
        return pyramid(picture, self.size, self.scales, self.annotations.image_ids[row])


def pyramid(picture: np.ndarray, size: int, scales: Sequence[float], image_id: int) -> PyramidRecord:
    """An image `[H, W, 3]` with its short side brought to `size` times each scale, black on the right and below.

    Pixel centres keep their places relative to the image's borders, so that the mirrored image has the mirrored pixels.
    """
    height, width = picture.shape[:2]
    images, affines = [], []
    for scale in scales:
        factor = scale * size / max(min(height, width), max(height, width) / LONGEST)
        rows, columns = (max(1, round(factor * side)) for side in (height, width))
        # A filter that widens, where every other pixel would go unseen.
        resized = cv2.resize(
            picture, (columns, rows), interpolation=cv2.INTER_AREA if factor < 0.5 else cv2.INTER_LINEAR
        )
        image = np.zeros((3, *(math.ceil(side / MULTIPLE) * MULTIPLE for side in (rows, columns))), dtype=np.uint8)
        image[:, :rows, :columns] = resized.transpose(2, 0, 1)
        across, down = columns / width, rows / height
        images.append(image)
        affines.append(np.array([[across, 0.0, (across - 1) / 2], [0.0, down, (down - 1) / 2]]))
    return PyramidRecord(images, affines, (height, width), image_id)


def collate_images(records: Sequence[ImageRecord]) -> ImageBatch:
    """Stack crops, with empty slots for the persons and regions that an image has fewer of than another."""

    def padded(field: str) -> torch.Tensor:
        values = [getattr(record, field) for record in records]
        most = max(1, *(len(value) for value in values))
        result = np.zeros((len(values), most, *values[0].shape[1:]), dtype=values[0].dtype)
        for row, value in enumerate(values):
            result[row, : len(value)] = value
        return torch.from_numpy(result)

    return ImageBatch(
        images=torch.from_numpy(np.stack([record.image for record in records])),
        keypoints=padded("keypoints").float(),
        visibility=padded("visibility"),
        areas=padded("areas").float(),
        regions=padded("regions").float(),
        affine=torch.from_numpy(np.stack([record.affine for record in records])).float(),
        image_ids=[record.image_id for record in records],
    )


def collate_image_draws(draws: Sequence[tuple[ImageRecord, list[str]]]) -> ImageBatch:
    """Stack what `TrainingDraws` gives; the `collate_fn` of training."""
    batch = collate_images([record for record, _ in draws])
    batch.replaced = [message for _, messages in draws for message in messages]
    return batch


def collate_pyramids(records: Sequence[PyramidRecord]) -> PyramidBatch:
    """Stack images of several shapes, each scale padded to its largest height and width."""
    images, affine = [], []
    for scale in range(len(records[0].images)):
        levels = [record.images[scale] for record in records]
        height, width = (max(level.shape[axis] for level in levels) for axis in (1, 2))
        stacked = np.zeros((len(levels), 3, height, width), dtype=np.uint8)
        for row, level in enumerate(levels):
            stacked[row, :, : level.shape[1], : level.shape[2]] = level
        images.append(torch.from_numpy(stacked))
        affine.append(torch.from_numpy(np.stack([record.affine[scale] for record in records])))
    sizes = torch.tensor([record.size for record in records], dtype=torch.float64)
    return PyramidBatch(images, affine, sizes, [record.image_id for record in records])


def _grouped(image_index: np.ndarray, rows: np.ndarray, images: int) -> list[np.ndarray]:
    """For each image the `rows` that are on it, in their order."""
    order = rows[np.argsort(image_index[rows], kind="stable")]
    return np.split(order, np.searchsorted(image_index[order], np.arange(1, images)))


def _draw(
    augmentation: ImageAugmentation, draws: np.random.Generator
) -> tuple[float, float, np.ndarray, bool, tuple[tuple[str, float], ...]]:
    """Rotation in degrees, factor on the region, shift in input pixels, flip, and the jitter's operations in order."""
    # Every number is drawn whether it is used or not, so that one setting does not shift the draws of another.
    turn, x, y = draws.uniform(-1, 1, 3)
    low, high = augmentation.scale
    scale, flipped = low + (high - low) * draws.random(), draws.random()
    factors, places = draws.uniform(-1, 1, len(JITTER)), draws.random(len(JITTER))
    jitter = tuple(
        (JITTER[i][0], JITTER[i][1] + augmentation.jitter[i] * factors[i])
        for i in np.argsort(places)
        if augmentation.jitter[i]
    )
    shift = augmentation.shift * np.array([x, y])
    return augmentation.rotation * turn, scale, shift, bool(flipped < augmentation.flip_probability), jitter
