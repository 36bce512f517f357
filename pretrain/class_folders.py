"""Pictures in one folder per class, and the crops of them that a linear probe is trained and validated on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from poserelay.datasets.centre import centre_crop
from poserelay.datasets.sampling import Draws, draw_generator, worker_init
from poserelay.datasets.shards import find_pictures
from poserelay.datasets.unlabelled import Pictures, UnlabelledImages, Views, collate_views
from poserelay.errors import UnreadableImage, UserError

from .linear_config import LinearDataConfig
from .views import draw_crop, resize


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, the training augmentation of a linear probe."""

    size: int
    """Side of the crop, pixels."""
    area: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's share of the picture's area."""

    def __call__(self, image: np.ndarray, generator: Draws) -> Tensor:
        """Return one crop, uint8 RGB `[1, 3, size, size]`, of a uint8 RGB picture `[H, W, 3]`."""
        draws = generator(0)
        top, left, height, width = draw_crop(self.area, image.shape[0], image.shape[1], draws)
        crop = resize(image[top : top + height, left : left + width], self.size)
        return as_view(cv2.flip(crop, 1) if draws.random() < 0.5 else crop)


@dataclass(frozen=True)
class CentreCrop:
    """`centre_crop`, which draws nothing."""

    size: int
    """Side of the crop, pixels."""

    def __call__(self, image: np.ndarray, generator: Draws) -> Tensor:
        """Return the crop, uint8 RGB `[1, 3, size, size]`, of a uint8 RGB picture `[H, W, 3]`."""
        return as_view(centre_crop(image, self.size))


def as_view(crop: np.ndarray) -> Tensor:
    """Turn `[h, w, 3]` into `[1, 3, h, w]`."""
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))[None]


@dataclass(frozen=True)
class ClassFolders:
    """What a linear probe reads, checked before it starts."""

    classes: list[str]
    """Of the training pictures, sorted; a label is an index into it."""
    training: UnlabelledImages
    validation: UnlabelledImages

    def labels(self, names: Sequence[str]) -> Tensor:
        """Labels `[B]` of the pictures of these names."""
        indices = {name: index for index, name in enumerate(self.classes)}
        return torch.tensor([indices[class_of(name)] for name in names])


def load_class_folders(config: LinearDataConfig, size: int) -> ClassFolders:
    """List the pictures, to be cropped to `size` pixels.

    Raises:
        UserError: a folder without pictures, fewer than two classes, a validation class that is not trained.
    """
    training, validation = (find_pictures(folder) for folder in (config.train, config.validation))
    classes = find_classes(training)
    if len(classes) < 2:
        raise UserError(
            f"data.train {config.train}: all pictures are of one class, {classes[0]!r} (the folder they lie in); "
            "give a folder with one subfolder of pictures per class"
        )
    unknown = [name for name in find_classes(validation) if name not in classes]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"data.validation {config.validation}: class {unknown[0]!r}{more} is not among the {len(classes)} classes "
            f"of {config.train}; name the class folders alike"
        )
    return ClassFolders(
        classes, UnlabelledImages(training, RandomCrop(size)), UnlabelledImages(validation, CentreCrop(size))
    )


def find_classes(pictures: Pictures) -> list[str]:
    """The classes of the pictures, sorted."""
    return sorted({class_of(pictures.name(index)) for index in range(len(pictures))})


def class_of(name: str) -> str:
    """The class of a picture: the name of the folder it lies in."""
    return os.path.basename(os.path.dirname(name))


def each_once(
    images: UnlabelledImages, batch_size: int, workers: int, *, rank: int = 0, world: int = 1
) -> Iterator[Views]:
    """Batches of this rank's share of the pictures, in their order; raises UnreadableImage."""
    loader = DataLoader(
        _ByIndex(images),
        batch_size=batch_size,
        sampler=range(rank, len(images), world),
        num_workers=workers,
        collate_fn=_views_or_error,
        worker_init_fn=worker_init,
    )
    for views in loader:
        if isinstance(views, UnreadableImage):
            # Not `raise views`: in a cycle with this frame it would keep the loader, whose workers then stop later.
            raise UnreadableImage(str(views))
        yield views


class _ByIndex(Dataset[tuple[Tensor, str] | UnreadableImage]):
    """Hands an error over as an item: raised in a worker it would arrive with a worker's traceback."""

    def __init__(self, images: UnlabelledImages) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, str] | UnreadableImage:
        try:
            return self.images.sample(index, partial(draw_generator, 0, 0, index))
        except UnreadableImage as error:
            return error


def _views_or_error(items: Sequence[tuple[Tensor, str] | UnreadableImage]) -> Views | UnreadableImage:
    views = []
    for item in items:
        if isinstance(item, UnreadableImage):
            return item
        views.append((item, []))
    return collate_views(views)
