"""Which sample comes when and with which random draws, from (seed, epoch, index, view) alone; and reading of pictures.

Nothing here keeps random state, so the number of workers changes nothing and a resumed run needs only its step.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, Protocol, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UnreadableImage, UserError

Item = TypeVar("Item", covariant=True)
Draws = Callable[[int], np.random.Generator]
"""View number -> fresh generator of that view's draws."""

ORDER_VIEW = 2**64 - 1
"""The view number whose draws order an epoch."""
STEP_VIEW = 2**64 - 3
"""The view number whose draws are of a step and process instead of an epoch and sample."""


def evenly(candidates: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the candidates, spread evenly over them."""
    return candidates[np.linspace(0, len(candidates) - 1, min(count, len(candidates))).round().astype(int)]


def draw_generator(seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """A fresh generator of the draws of one view of one sample in one epoch.

    Philox keyed by the seed, its counter starting at (0, view, index, epoch): the lowest word counts the draws, so the
    streams cannot overlap.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=np.array([0, view, index, epoch], dtype=np.uint64)))


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """A fresh generator of what a process draws for its whole batch in an optimiser step; on the CPU, as the draws of
    a GPU's generator would be others on every model of GPU."""
    key = draw_generator(seed, step, rank, STEP_VIEW).integers(2**63)
    return torch.Generator().manual_seed(int(key))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which an epoch visits the samples: a read-only permutation of 0..length-1."""
    order = draw_generator(seed, epoch, 0, ORDER_VIEW).permutation(length)
    order.flags.writeable = False
    return order


def steps_per_epoch(length: int, global_batch: int) -> int:
    """Whole global batches in `length` samples, at least one (the rest of an epoch's order is left out)."""
    return max(1, length // global_batch)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler over a whole run: step -> this rank's list of (epoch, position in the epoch's order).

    A global batch is `batch_size * world` consecutive positions, of which each rank takes its consecutive share, so
    `world` processes see together what one process with the whole batch would. Positions wrap where a batch is larger
    than the set. One loader serves the run; resuming is `start_step`. `first_epoch` is the number of the first epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        total_steps: int,
        *,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        first_epoch: int = 0,
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.rank = rank
        self.world = world
        self.start_step = start_step
        self.first_epoch = first_epoch

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        global_batch = self.batch_size * self.world
        per_epoch = steps_per_epoch(self.length, global_batch)
        for step in range(self.start_step, self.total_steps):
            epoch, step_in_epoch = divmod(step, per_epoch)
            first = step_in_epoch * global_batch + self.rank * self.batch_size
            positions = range(first, first + self.batch_size)
            yield [(self.first_epoch + epoch, position % self.length) for position in positions]


class PhasedBatches(Sampler[list[tuple[int, int]]]):
    """One batch sampler after the other, for a run whose epochs change their length."""

    def __init__(self, phases: Sequence[EpochBatches]) -> None:
        self.phases = phases

    def __len__(self) -> int:
        return sum(map(len, self.phases))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.chain.from_iterable(self.phases)


class Source(Protocol[Item]):
    """What can be drawn from; `sample` raises UnreadableImage for a picture that cannot be read.

    `order` is what an epoch visits, the same however often it is asked for: mostly a permutation of the indices.
    """

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int) -> np.ndarray: ...

    def sample(self, index: int, generator: Draws) -> Item: ...


class TrainingDraws(Dataset[tuple[Item, list[str]]]):
    """Maps (epoch, position) of `EpochBatches` to (item, messages of the unreadable pictures it stands in for).

    An unreadable picture is replaced by the next readable one in the epoch's order.

    Raises:
        UserError: no picture of the source can be read.
    """

    def __init__(self, source: Source[Item], seed: int) -> None:
        self.source = source
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Item, list[str]]:
        epoch, position = key
        order = self.source.order(self.seed, epoch)
        length = len(order)
        replaced: list[str] = []
        for offset in range(length):
            index = int(order[(position + offset) % length])
            try:
                return self.source.sample(index, partial(draw_generator, self.seed, epoch, index)), replaced
            except UnreadableImage as error:
                replaced.append(str(error))
        raise UserError(f"none of the {length} training pictures can be read; the first: {replaced[0]}")


def training_loader(
    source: Source[Item],
    collate: Callable[[list[tuple[Item, list[str]]]], Any],
    batches: EpochBatches | PhasedBatches,
    *,
    seed: int,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """One loader for the rest of a run: `collate` of what `TrainingDraws` gives for each of `batches`."""
    return DataLoader(
        TrainingDraws(source, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=worker_init,
        pin_memory=pin_memory,
    )


def read_image(path: str | os.PathLike[str], orientation: Literal["ignore", "exif"] = "ignore") -> np.ndarray:
    """Decode a picture to RGB uint8 `[H, W, 3]`; grey, palette, RGBA, CMYK and 16-bit pictures are converted.

    Annotations made on the stored pixels need orientation "ignore" (COCO, HRNet); "exif" turns the picture upright.

    Raises:
        UnreadableImage: missing, empty, truncated, or not a picture.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UnreadableImage(path, error.strerror or str(error)) from None
    return decode_image(data, path, orientation)


# The flags of OpenCV by the reduction of each side; a JPEG's pixels are then made at that scale from its coefficients.
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def decode_image(
    data: bytes,
    name: str | os.PathLike[str],
    orientation: Literal["ignore", "exif"] = "ignore",
    reduction: int = 1,
) -> np.ndarray:
    """As `read_image`, from the bytes of the file `name`, which only errors use; of an animation, the first frame.

    A `reduction` of 2, 4 or 8 returns `[ceil(H / reduction), ceil(W / reduction), 3]`; it saves time on a JPEG only.
    """
    if not data:
        raise UnreadableImage(name, "the file is empty")
    if _is_truncated(data):
        raise UnreadableImage(name, "the file is truncated")
    flags = _REDUCED[reduction] | (cv2.IMREAD_IGNORE_ORIENTATION if orientation == "ignore" else 0)
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error as error:
        raise UnreadableImage(name, f"cannot be decoded ({error.err})") from None
    if image is None:
        raise UnreadableImage(name, "not a picture, or damaged")
    return image


def reducible_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels of an encoded JPEG turned upright, read from its header without decoding.

    None for every other file, and for a JPEG whose reduced pixels would not be whole blocks of its full ones: turning
    brings the blocks that its sides cut off to the top or left.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    turn = 1
    for marker, payload in _jpeg_segments(data):
        if marker == 0xE1 and payload.startswith(b"Exif\0\0"):
            turn = _exif_orientation(payload[6:])
        elif marker in (0xC0, 0xC1, 0xC2):  # the ways of coding that are decoded at a reduced scale
            height, width = int.from_bytes(payload[1:3], "big"), int.from_bytes(payload[3:5], "big")
            if height == 0 or width == 0 or (turn > 1 and (height % 8 or width % 8)):
                return None
            return (height, width) if turn < 5 else (width, height)
        elif marker == 0xDA:
            return None
    return None


def _exif_orientation(tiff: bytes) -> int:
    """The orientation 1..8 in the first directory of an Exif block; 1 where there is none."""
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"
    start = int.from_bytes(tiff[4:8], order)
    entries = int.from_bytes(tiff[start : start + 2], order)
    for entry in range(start + 2, min(start + 2 + 12 * entries, len(tiff)), 12):
        if int.from_bytes(tiff[entry : entry + 2], order) == 0x0112:
            found = int.from_bytes(tiff[entry + 8 : entry + 10], order)
            return found if 1 <= found <= 8 else 1
    return 1


_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each marker of a JPEG and the payload of its segment, without those inside a segment (a thumbnail's)."""
    position = 2
    while match := _JPEG_MARKER.search(data, position):  # skips the entropy-coded data after a scan's header
        start = match.end()
        position = start + int.from_bytes(data[start : start + 2], "big")
        yield data[start - 1], data[start + 2 : position]


def _is_truncated(data: bytes) -> bool:
    """Whether a JPEG lacks its end: some versions of OpenCV fill what is missing with grey and only warn."""
    if not data.startswith(b"\xff\xd8") or data.endswith(b"\xff\xd9"):
        return False
    # The end marker is not the last thing: it may be followed by other bytes.
    return all(marker != 0xD9 for marker, _ in _jpeg_segments(data))


def worker_init(worker: int) -> None:
    """`worker_init_fn` of every loader: one thread per worker process, which heeds no signal but its parent's.

    Slurm and a terminal signal every process of a job: a worker that died of it would take the parent along before it
    has saved.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parents_word, daemon=True).start()


def _end_with_parents_word() -> None:
    """Wait for a SIGTERM that the parent sent, by which torch ends a worker that does not end by itself."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
