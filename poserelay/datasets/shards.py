"""Pictures packed into tars (webdataset's shards), for pretraining from a network file system.

An epoch's order goes through the shards in turn and mixes the pictures of a few neighbouring ones, so that whole files
are asked for within a short time and the kernel reads each front to back into the page cache, which all workers share.
Pictures are still read one by one, each by its offset.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UnreadableImage, UserError
from .sampling import draw_generator
from .unlabelled import SUFFIXES, FilePictures, Pictures, list_images

INDEX = "index.json"
MARKER = "preparation.json"
"""Written by `poserelay prepare` before the first shard; without an index beside it the set is unfinished."""
FORMAT = 1

WINDOW = 10_000
OPEN_SHARDS = 128

_ORDER_VIEW = 2**64 - 2  # beside ORDER_VIEW and STEP_VIEW; samples have those from 0
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Shard(NamedTuple):
    """A tar and where its pictures lie in it."""

    path: Path
    size: int
    """Of the whole file, bytes."""
    members: list[str]
    offsets: list[int]
    """Of each member's data from the start of the file, bytes."""
    sizes: list[int]
    """Of each member's data, bytes."""


class ShardPictures:
    """The pictures of uncompressed tars, read by their offsets; not for several threads.

    Args:
        shards: of `read_index` or `scan_shard`.
        window: pictures that `order` mixes; as many whole shards as fit, at least one.

    Raises:
        UserError: no picture in the shards.
    """

    def __init__(self, shards: Sequence[Shard], window: int = WINDOW) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()
        self.paths = [shard.path for shard in shards]
        self.window = window
        counts = [len(shard.members) for shard in shards]
        if not sum(counts):
            where = f"{self.paths[0].parent}: no picture in the {len(shards)} tars" if shards else "no shards"
            raise UserError(f"{where}; give shards that hold pictures")
        # Arrays and one text, as every forked worker would come to copy millions of Python objects.
        self._first = np.cumsum([0, *counts])
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._offset = np.concatenate([np.asarray(shard.offsets, dtype=np.int64) for shard in shards])
        self._size = np.concatenate([np.asarray(shard.sizes, dtype=np.int64) for shard in shards])
        names = [member.encode("utf-8", "surrogateescape") for shard in shards for member in shard.members]
        self._names, self._name_end = b"".join(names), np.cumsum([0, *map(len, names)])
        self._epoch: tuple[tuple[int, int], np.ndarray] | None = None
        self._ahead: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._shard)

    def name(self, index: int) -> str:
        """Name of the shard's file and of its member: `shard-000001.tar/n01440764/n01440764_18.jpg`."""
        member = self._names[self._name_end[index] : self._name_end[index + 1]].decode("utf-8", "surrogateescape")
        return f"{self.paths[self._shard[index]].name}/{member}"

    def read(self, index: int) -> bytes:
        """The encoded picture; raises UnreadableImage."""
        size = int(self._size[index])
        try:
            data = os.pread(self._descriptor(int(self._shard[index])), size, int(self._offset[index]))
        except OSError as error:
            raise UnreadableImage(self.name(index), f"its shard cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise UnreadableImage(self.name(index), "its shard has been cut short")
        return data

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of the shards, then of the pictures within each window of neighbouring shards; read-only."""
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            generator = draw_generator(seed, epoch, 0, _ORDER_VIEW)
            windows = self._windows(generator.permutation(len(self.paths)))
            spans = [[np.arange(*self._first[shard : shard + 2]) for shard in window] for window in windows]
            order = np.concatenate([generator.permutation(np.concatenate(span)) for span in spans])
            order.flags.writeable = False
            self._epoch = (seed, epoch), order
            # Opening one of a window's shards sends for its part of the next window.
            self._ahead = {
                shard: following[place :: len(window)]
                for window, following in pairwise(windows)
                for place, shard in enumerate(window.tolist())
            }
        return self._epoch[1]

    def _windows(self, shards: np.ndarray) -> list[np.ndarray]:
        """Cut a sequence of shards wherever the next one would make the window too large."""
        cuts, filled = [], 0
        for place, count in enumerate(np.diff(self._first)[shards].tolist()):
            if filled and filled + count > self.window:
                cuts.append(place)
                filled = 0
            filled += count
        return np.split(shards, cuts)

    def _descriptor(self, shard: int) -> int:
        """The open file of a shard; the one unused for longest is closed where too many are open."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.paths[shard], os.O_RDONLY)
        _send_for(self._open[shard])
        for next_shard in self._ahead.get(shard, ()):
            with contextlib.suppress(OSError):  # told when a picture of it is read
                descriptor = os.open(self.paths[next_shard], os.O_RDONLY)
                _send_for(descriptor)
                os.close(descriptor)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_epoch": None, "_ahead": {}}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def find_pictures(folder: str | os.PathLike[str]) -> Pictures:
    """The pictures of a folder: in its tars, with or without our index, or else its picture files.

    Raises:
        UserError: none; both tars and pictures; compressed tars; or as `read_index` and `scan_shard`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    tars = [folder / name for name in names if name.endswith(".tar")]
    compressed = [folder / name for name in names if name.endswith(_COMPRESSED)]
    picture = _first_picture(folder) if tars or compressed else None
    if not tars and not (compressed and picture is None):
        return FilePictures(list_images(folder))
    if tars and picture:
        raise UserError(
            f"{folder}: holds both shards ({tars[0].name}, ...) and pictures ({picture.relative_to(folder)}, ...); "
            "move one or the other to a folder of its own"
        )
    if compressed:
        raise UserError(
            f"{compressed[0]}: pictures cannot be read from the middle of a compressed tar; "
            "decompress it (gunzip, bunzip2, unxz or unzstd)"
        )
    if (folder / INDEX).exists():
        return ShardPictures(read_index(folder))
    if (folder / MARKER).exists():
        raise UserError(f"{folder}: the shards are not finished; start the same `poserelay prepare` again")
    print(f"{folder}: no {INDEX}; looking through {len(tars)} tars", file=sys.stderr)
    return ShardPictures([scan_shard(tar) for tar in tars])


def read_index(folder: Path) -> list[Shard]:
    """The shards that the index of `folder` lists.

    Raises:
        UserError: the index is damaged or of another format, or the tars beside it are not those it lists.
    """
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UserError(
                f"{file}: format {index['format']}, expected {FORMAT}; prepare the shards again with this version"
            )
        shards = [Shard(folder / shard.pop("name"), **shard) for shard in index["shards"]]
        whole = all(map(_is_consistent, shards))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        whole, shards = False, []
    if not whole:
        raise UserError(
            f"{file}: not an index of ours, or damaged; remove it, then the tars are looked through instead"
        )
    listed = {shard.path.name for shard in shards}
    found = {entry.name for entry in os.scandir(folder) if entry.name.endswith(".tar")}
    others = sorted(name for name in found - listed if not name.startswith("."))
    if others:
        raise UserError(f"{folder / others[0]}: not in {INDEX} beside it; move it elsewhere, or remove the index")
    for shard in shards:
        size = shard.path.stat().st_size if shard.path.exists() else None
        if size != shard.size:
            state = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"{shard.path}: {state}, but {INDEX} lists it with {shard.size}; copy it again or prepare anew"
            )
    return shards


def write_index(path: Path, shards: Sequence[Shard]) -> None:
    """Write what `read_index` reads, whole."""
    rows = []
    for shard in shards:
        fields = shard._asdict()
        rows.append({"name": fields.pop("path").name, **fields})
    path.write_text(json.dumps({"format": FORMAT, "shards": rows}), encoding="utf-8")


def scan_shard(path: Path) -> Shard:
    """Look through the headers of any uncompressed tar: its pictures by suffix, the first of every webdataset key.

    Raises:
        UserError: not such a tar, truncated or damaged.
    """
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and _is_picture(member.name):
                    members.append(member)
            end = archive.offset
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(end)
            # Where tarfile meets what is no header it stops as if the archive ended there.
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not an uncompressed tar, or truncated ({error}); copy or decompress it") from None
    if not whole:
        raise UserError(f"{path}: truncated or damaged at byte {end}: no end of the archive there; copy it again")
    first = {_key(member.name): member for member in reversed(members)}
    if len(first) < len(members):
        print(
            f"warning: {path}: {len(members) - len(first)} pictures left out, each the second or later one of its key "
            f"(like {_key(next(m.name for m in members if first[_key(m.name)] is not m))}: up to the first dot)",
            file=sys.stderr,
        )
    kept = [member for member in members if first[_key(member.name)] is member]
    return Shard(path, size, [m.name for m in kept], [m.offset_data for m in kept], [m.size for m in kept])


def _key(member: str) -> str:
    """Webdataset's: up to the first dot of the file's name."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.split(".")[0]


def _is_picture(name: str) -> bool:
    """By suffix; hidden files (macOS packs ._x.jpg beside x.jpg) are none, as for `list_images` and webdataset."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.basename(name).startswith(".")


def _is_consistent(shard: Shard) -> bool:
    offsets, sizes = np.array(shard.offsets, dtype=np.int64), np.array(shard.sizes, dtype=np.int64)
    return (
        all(isinstance(member, str) for member in shard.members)
        and len(shard.members) == len(offsets) == len(sizes)
        and bool((offsets >= 0).all() and (sizes >= 0).all() and (offsets + sizes <= shard.size).all())
    )


def _first_picture(folder: Path) -> Path | None:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if _is_picture(name):
                return Path(parent, name)
    return None


def _send_for(descriptor: int) -> None:
    """Ask the kernel to read a file into the page cache, front to back."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
