"""Videos in and out, by OpenCV."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from poserelay.errors import UserError

SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".m2ts", ".mts", ".ts", ".wmv", ".flv", ".3gp"}
)
CONTAINERS = ((".mp4", "mp4v"), (".avi", "MJPG"))
"""Suffix and codec, the better first: OpenCV's wheels can write both everywhere."""
GIVE_UP = 300
"""Frames one after the other that cannot be read, after which nothing more is expected of a video."""
FPS = 25.0
"""Of a video that does not say."""


class Frame(NamedTuple):
    """A frame of a video."""

    index: int
    """From 0, unreadable frames counted."""
    image: np.ndarray | None
    """`[H, W, 3]` uint8 RGB, upright; None where it cannot be read."""


class VideoReader:
    """The frames of a video file in their order, turned upright as the file says.

    Raises:
        UserError: there is no such file, or OpenCV cannot open it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file; check the path")
        # Damaged frames are counted here; FFmpeg would print several lines about each.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        with _silence():
            self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise UserError(
                f"{path}: cannot be opened as a video: damaged, cut off, or of a codec that OpenCV lacks; try to "
                "re-encode it (ffmpeg -i IN OUT.mp4)"
            )
        self._capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if math.isfinite(fps) and fps > 0 else FPS
        """Frames per second; of a variable rate, their mean."""
        announced = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.announced = int(announced) if 0 < announced < 2**53 else None
        """Frames that the file says it has; None where it does not say."""

    def frames(self) -> Iterator[Frame]:
        """Every frame up to the last one that can be read."""
        index, lost = 0, 0
        while True:
            found, image = self._capture.read()
            if found:
                yield from (Frame(number, None) for number in range(index - lost, index))
                yield Frame(index, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
                lost = 0
            else:
                lost += 1
            index += 1
            # A frame that cannot be decoded reads as the end does; only the announced number tells them apart.
            if lost and (index >= (self.announced or 0) or lost > GIVE_UP):
                self._capture.release()
                return


class VideoWriter:
    """A video file that takes its name when it is closed, whole.

    An odd width or height gets its last pixels twice, since the codecs take even ones alone.

    Args:
        path: the file, whose suffix is replaced by that of the container that could be written: .mp4 or .avi.
        fps: frames per second.
        size: (height, width) of the frames, pixels; others are resized to it.

    Raises:
        UserError: OpenCV cannot write a video of that size and rate there.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        self.size = size
        self.written = 0
        """Frames."""
        height, width = (length + length % 2 for length in size)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be made: {error.strerror}; name another folder") from error
        for suffix, codec in CONTAINERS:
            self.path = path.with_suffix(suffix)
            # OpenCV takes the container from the suffix.
            self._temporary = self.path.with_name(f".{path.stem}.{os.getpid()}.tmp{suffix}")
            with _silence():
                self._writer = cv2.VideoWriter(
                    str(self._temporary), cv2.VideoWriter.fourcc(*codec), fps, (width, height)
                )
            if self._writer.isOpened():
                return
            self._temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: OpenCV cannot write a video of {width} x {height} pixels at {fps:g} frames per second there; "
            "make room, name another folder, or take the video apart into pictures"
        )

    def write(self, image: np.ndarray) -> None:
        """Append a frame `[H, W, 3]` uint8 RGB."""
        height, width = self.size
        if image.shape[:2] != self.size:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        if height % 2 or width % 2:
            image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        self.written += 1

    def close(self) -> None:
        """Finish the file; raises UserError where it does not hold what was written, as on a full disk."""
        self._writer.release()
        with _silence():
            capture = cv2.VideoCapture(str(self._temporary))
            found, (readable, _) = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.read()
            capture.release()
        if not readable or round(found) != self.written:
            self.discard()
            raise UserError(
                f"{self.path}: of {self.written} frames {max(0, round(found))} have been written; make room on the disk"
            )
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Leave nothing behind; after `close` this does nothing."""
        self._writer.release()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without OpenCV's own messages: what failed is said in one line by whoever asked."""
    logging = cv2.utils.logging
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(level)
