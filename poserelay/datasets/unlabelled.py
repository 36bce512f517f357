"""Pictures without annotations, for pretraining."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..errors import UnreadableImage, UserError
from .coco import check_images_exist, read_image_list
from .sampling import ORDER_VIEW, Draws, decode_image, draw_generator, epoch_order, reducible_size

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})


def list_images(folder: str | os.PathLike[str], recursive: bool = True) -> list[Path]:
    """The pictures of a folder, by suffix, sorted by path; hidden files and folders are left out, links followed.

    Raises:
        UserError: no such folder, one below it that cannot be read, or no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    found = [Path(path) for path in _walk(os.fspath(folder), recursive, ())]
    if not found:
        raise UserError(f"{folder}: no picture in it (looked for {', '.join(sorted(SUFFIXES))})")
    return sorted(found)


def _walk(folder: str, recursive: bool, above: tuple[str, ...]) -> Iterator[str]:
    """Paths of the pictures of a folder; `above` are the real paths that a link must not lead back to."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; change its rights, or move it away") from error
    above = (*above, os.path.realpath(folder))
    for entry in visible:
        if entry.is_dir():
            if recursive and not (entry.is_symlink() and os.path.realpath(entry.path) in above):
                yield from _walk(entry.path, recursive, above)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and (entry.is_file() or entry.is_symlink()):
            yield entry.path


def coco_images(path: str | os.PathLike[str], image_dir: str | os.PathLike[str]) -> list[Path]:
    """The pictures that a COCO file lists, with or without annotations, in its order.

    Raises:
        UserError: not a COCO file, or a picture is missing.
    """
    names = read_image_list(path)
    check_images_exist(names, image_dir)
    return [Path(image_dir, name) for name in names]


class Pictures(Protocol):
    """Encoded pictures in a fixed order: files of folders, or members of shards."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls the picture; its parent folder is its class where classes are folders."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded picture; raises UnreadableImage."""
        ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of the indices for an epoch."""
        ...


class FilePictures:
    """Picture files, visited in any order."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The path."""
        return str(self.files[index])

    def read(self, index: int) -> bytes:
        """The file; raises UnreadableImage."""
        try:
            return self.files[index].read_bytes()
        except OSError as error:
            raise UnreadableImage(self.files[index], error.strerror or str(error)) from None

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A uniform permutation."""
        return epoch_order(seed, epoch, len(self))


class JoinedPictures:
    """Several sources as one; an epoch visits them interleaved at random, each in an order of its own."""

    def __init__(self, parts: Sequence[Pictures]) -> None:
        self.parts = parts
        self._first = np.cumsum([0, *map(len, parts)])
        self._epoch: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._first[-1])

    def name(self, index: int) -> str:
        """The source's."""
        part = self._part(index)
        return self.parts[part].name(index - int(self._first[part]))

    def read(self, index: int) -> bytes:
        """From its source; raises UnreadableImage."""
        part = self._part(index)
        return self.parts[part].read(index - int(self._first[part]))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation that keeps each source's own order."""
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            turn = np.repeat(np.arange(len(self.parts)), np.diff(self._first))
            turn = draw_generator(seed, epoch, 1, ORDER_VIEW).permutation(turn)
            order = np.empty(len(self), dtype=np.int64)
            for number, part in enumerate(self.parts):
                order[turn == number] = self._first[number] + part.order(seed, epoch)
            self._epoch = ((seed, epoch), order)
        return self._epoch[1]

    def _part(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1


class Views(NamedTuple):
    """A batch of views."""

    images: Tensor
    """uint8 RGB `[V, B, 3, h, w]`."""
    names: list[str]
    """Of the B pictures."""
    replaced: list[str]
    """A message per unreadable picture that another one stands in for."""


@runtime_checkable
class ScaledTransform(Protocol):
    """A transform that says at which scale it needs a picture before the picture is decoded."""

    def at_scale(self, size: tuple[int, int], decode: Callable[[int], np.ndarray], generator: Draws) -> Tensor:
        """The views of a picture of `size` (height, width) that `decode(reduction)` gives, reduced by 1, 2, 4 or 8."""
        ...


class UnlabelledImages:
    """Pictures turned upright by their EXIF orientation, then into views.

    Args:
        transform: (RGB uint8 `[H, W, 3]`, view -> generator of its draws) -> uint8 `[V, 3, h, w]`; a ScaledTransform
            has a large JPEG decoded at the scale that it needs.
    """

    def __init__(self, pictures: Pictures, transform: Callable[[np.ndarray, Draws], Tensor]) -> None:
        self.pictures = pictures
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order in which an epoch visits the pictures."""
        return self.pictures.order(seed, epoch)

    def sample(self, index: int, generator: Draws) -> tuple[Tensor, str]:
        """The views `[V, 3, h, w]` of picture `index` and its name; raises UnreadableImage."""
        name, data = self.pictures.name(index), self.pictures.read(index)

        def decode(reduction: int) -> np.ndarray:
            return decode_image(data, name, orientation="exif", reduction=reduction)

        if (size := reducible_size(data)) and isinstance(self.transform, ScaledTransform):
            return self.transform.at_scale(size, decode, generator), name
        return self.transform(decode(1), generator), name


def collate_views(draws: Sequence[tuple[tuple[Tensor, str], list[str]]]) -> Views:
    """Stack what `TrainingDraws` gives."""
    return Views(
        torch.stack([views for (views, _), _ in draws], dim=1),
        [name for (_, name), _ in draws],
        [message for _, messages in draws for message in messages],
    )
