"""Reads other people's PyTorch files without running them.

A .pth or .ckpt is a pickle, a program that may call anything. torch's own `weights_only` reads the harmless ones. The
others (hyperparameters of foreign classes, numpy scalars, a config object) are read here by an unpickler that knows
tensors and plain containers only: whatever else the file names is never imported, and `Inert` takes its place.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UserError

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
ZIP_MAGIC = b"PK\x03\x04"


class _InertType(type):
    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls

    def __setitem__(cls, key: Any, value: Any) -> None:
        pass


class Inert(metaclass=_InertType):
    """Any class, function or object of a foreign file: can be called, built and filled, and does and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return cls

    @staticmethod
    def __setstate__(*_: Any) -> None:
        pass

    append = extend = add = __setstate__


class _State(dict[Any, Any]):
    """An OrderedDict of the file, without the attributes that a pickle may set on one."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage(NamedTuple):
    dtype: torch.dtype
    data: bytearray


def read_pickled(path: Path) -> Any:
    """The object that `torch.save` wrote to `path`, its tensors on the CPU, `Inert` in place of any foreign object.

    Reads the zip format and the one before torch 1.6.

    Raises:
        UserError: a TorchScript program, the tar format of torch 0.1, or a file that is truncated or something else.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == ZIP_MAGIC
    if is_zip and _is_torchscript(path):
        raise UserError(f"{path}: a TorchScript program, not weights; save the network's state_dict() and give that")
    if not is_zip and tarfile.is_tarfile(path):
        raise UserError(f"{path}: the tar format of torch 0.1; load it with an old torch and torch.save it again")
    if is_zip and (damaged := _first_damaged(path)):
        raise UserError(f"{path}: {damaged} in it does not match its checksum: damaged; fetch it again")
    # A damaged or hostile file raises anything; what torch refuses gets the restricted reader's answer.
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pickle protocol that torch does not write
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        pass
    try:
        return read_restricted(path)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{path}: not a readable PyTorch file ({reason[:200]}); it may be truncated: fetch it again"
        ) from error


def _first_damaged(path: Path) -> str | None:
    """The first member of a zip file whose checksum is wrong; torch does not look. None, too, where it is no whole zip,
    of which the readers tell."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except Exception:
        return None


def read_restricted(path: Path) -> Any:
    """`read_pickled` by the restricted unpickler alone; raises whatever a damaged file leads to."""
    with open(path, "rb") as file:
        if file.read(4) == ZIP_MAGIC:
            return _read_zip(path)
        file.seek(0)
        return _read_legacy(file, path.stat().st_size)


class _Unpickler(pickle.Unpickler):
    """Names no object of this process to the pickle but those of `allowed`."""

    def __init__(self, file: Any, storage: Callable[[Any], Any] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self._storage = storage
        self._allowed = _allowed()

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name in ("torch", "torch.cuda", "torch.storage") and global_name in STORAGES:
            return STORAGES[global_name]
        return self._allowed.get((module_name, global_name), Inert)

    def persistent_load(self, pid: Any, /) -> Any:
        if self._storage is None or not isinstance(pid, tuple):
            raise pickle.UnpicklingError("a reference to something outside the file")
        # Files of old torch also refer to the source code of pickled modules.
        return self._storage(pid[1:]) if pid[0] == "storage" else Inert


def _allowed() -> dict[tuple[str, str], Any]:
    """Everything a file may call. Made anew for each file, since a pickle can set attributes on a function."""

    def tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        whole = torch.frombuffer(storage.data, dtype=storage.dtype) if storage.data else torch.empty(0)
        # as_strided checks the bounds.
        return whole.to(storage.dtype).as_strided(tuple(size), tuple(stride), offset)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    return {
        ("collections", "OrderedDict"): _State,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): parameter,
    }


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # a damaged directory raises anything, and is the readers' to tell
        return False


def _read_zip(path: Path) -> Any:
    """torch >= 1.6: NAME/data.pkl, and one record NAME/data/KEY per storage."""
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("written on a big-endian machine")
        records: dict[str, bytearray] = {}

        def storage(pid: tuple[Any, ...]) -> _Storage:
            dtype, key, _, count = pid
            if key not in records:
                records[key] = bytearray(archive.read(f"{root}data/{key}"))
            return _Storage(dtype, _exactly(records[key], dtype, count))

        return _Unpickler(io.BytesIO(archive.read(pickled)), storage).load()


def _read_legacy(file: io.BufferedReader, size: int) -> Any:
    """torch < 1.6: pickles of magic, version, machine, object and storage keys, then each storage with its length."""
    magic, _, machine = (_Unpickler(file).load() for _ in range(3))
    if magic != LEGACY_MAGIC:
        raise ValueError("no PyTorch file")
    if not machine["little_endian"]:
        raise ValueError("written on a big-endian machine")
    storages: dict[str, _Storage] = {}
    room = size

    def storage(pid: tuple[Any, ...]) -> _Storage:
        nonlocal room
        dtype, key, _, count, view = pid
        if view is not None:
            raise ValueError("storage views, which torch has not written since 0.4")
        if key not in storages:
            room -= count * dtype.itemsize
            if count < 0 or room < 0:
                raise ValueError("shorter than its tensors")
            # Filled below, through the memory that the tensors already share.
            storages[key] = _Storage(dtype, bytearray(count * dtype.itemsize))
        return _Storage(dtype, _exactly(storages[key].data, dtype, count))

    saved = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        dtype, data = storages[key]
        if int.from_bytes(file.read(8), "little") * dtype.itemsize != len(data) or file.readinto(data) != len(data):
            raise ValueError("shorter than its tensors")
    return saved


def _exactly(data: bytearray, dtype: torch.dtype, count: int) -> bytearray:
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"a storage of {len(data)} bytes, expected {count} x {dtype.itemsize}")
    return data
