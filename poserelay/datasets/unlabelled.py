"""Pictures without annotations, for pretraining."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .coco import check_images_exist, read_image_list
from .sampling import Draws, read_image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


def list_images(folder: str | os.PathLike[str], recursive: bool = True) -> list[Path]:
    """The pictures of a folder, by suffix, sorted by path; hidden files and folders are left out.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        ]
    if not found:
        raise UserError(f"{folder}: no picture in it (looked for {', '.join(sorted(SUFFIXES))})")
    return sorted(found)


def coco_images(path: str | os.PathLike[str], image_dir: str | os.PathLike[str]) -> list[Path]:
    """The pictures that a COCO file lists, with or without annotations, in its order.

    Raises:
        UserError: not a COCO file, or a picture is missing.
    """
    names = read_image_list(path)
    check_images_exist(names, image_dir)
    return [Path(image_dir, name) for name in names]


class UnlabelledImages:
    """Pictures turned upright by their EXIF orientation, then into views.

    Args:
        transform: (RGB uint8 `[H, W, 3]`, view -> generator of its draws) -> uint8 `[V, 3, h, w]`.
    """

    def __init__(self, files: Sequence[Path], transform: Callable[[np.ndarray, Draws], Tensor]) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, generator: Draws) -> Tensor:
        """The views `[V, 3, h, w]` of picture `index`; raises UnreadableImage."""
        return self.transform(read_image(self.files[index], orientation="exif"), generator)


def collate_draws(draws: Sequence[tuple[Tensor, list[str]]]) -> tuple[Tensor, list[str]]:
    """Stack what `TrainingDraws` gives: views `[V, B, 3, h, w]`, and a message per unreadable picture."""
    return torch.stack([views for views, _ in draws], dim=1), [message for _, messages in draws for message in messages]
