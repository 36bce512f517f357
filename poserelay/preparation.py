"""`poserelay prepare`: pictures re-encoded at a small size and packed into webdataset tars.

OUT/preparation.json   what was asked for, written first
OUT/shard-000000.tar   the first pictures_per_shard pictures of a random order that depends on their number alone
OUT/records/           of the finished shards, until the index is there
OUT/unreadable.txt     the pictures that were left out, where there are any
OUT/index.json         where every picture lies, written last: with it the set is complete
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from PIL import Image
from tqdm import tqdm
from webdataset.writer import TarWriter

from .config import PrepareConfig
from .datasets.sampling import decode_image, epoch_order
from .datasets.shards import FORMAT, INDEX, MARKER, Shard, read_index, scan_shard, write_index
from .datasets.unlabelled import coco_images, list_images
from .distributed import StopSignals
from .errors import CheckFailed, Interrupted, UnreadableImage, UserError
from .run import is_temporary, write_atomic, write_json, write_text

UNREADABLE = "unreadable.txt"
ORIENTATION = 0x0112  # of EXIF; 1 is upright


class Picture(NamedTuple):
    """A picture to be packed."""

    path: Path
    name: str
    """Path relative to the folder of pictures."""
    key: str
    """Webdataset's: its member is called KEY.jpg."""
    size: int
    """Of the file, bytes; 0 where it is not there."""


def main(config: PrepareConfig) -> None:
    """Entry of `poserelay prepare`; prints the folder of the shards."""
    prepare(config)
    print(config.out)


def prepare(config: PrepareConfig) -> list[Shard]:
    """Write the shards of `config.out`, or what is missing of them, say on stderr what they hold, and return them.

    The same pictures and fields give the same bytes, whatever the number of workers and however often interrupted.

    Raises:
        UserError: as `list_pictures`, `is_finished`, `locked` and `pack`.
        CheckFailed: more pictures than `config.max_unreadable` are unreadable.
        Interrupted: by SIGTERM, SIGINT or SIGUSR2; the finished shards are kept.
    """
    out = Path(config.out)
    with StopSignals() as signals:
        pictures = list_pictures(config)
        listed = "\n".join(f"{picture.name}\0{picture.size}" for picture in pictures)
        recipe = {
            "format": FORMAT,
            "short_side": config.short_side,
            "quality": config.quality,
            "pictures_per_shard": config.pictures_per_shard,
            "pictures": len(pictures),
            "pictures_sha256": hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest(),
        }
        if not is_finished(out, recipe, config.resume):
            with locked(out):
                # Asked again: another process may have finished the set before we had the lock.
                if not is_finished(out, recipe, config.resume):
                    pack(out, pictures, recipe, config, signals)
    shards = read_index(out)
    shutil.rmtree(out / "records", ignore_errors=True)  # also where a kill came before it the last time
    size, originals = sum(shard.size for shard in shards), sum(picture.size for picture in pictures)
    count = sum(len(shard.members) for shard in shards)
    left_out = f"; {len(pictures) - count} left out, see {out / UNREADABLE}" if count < len(pictures) else ""
    print(
        f"prepare: {count} pictures in {len(shards)} shards, {size / 1e6:.1f} MB, {size / count / 1e3:.1f} kB each "
        f"(the originals: {originals / 1e6:.1f} MB, {originals / len(pictures) / 1e3:.1f} kB){left_out}",
        file=sys.stderr,
    )
    return shards


def list_pictures(config: PrepareConfig) -> list[Picture]:
    """The pictures in the order in which they go into the shards.

    Raises:
        UserError: as `list_images` and `coco_images`, or a picture or `out` lies where it must not.
    """
    images, out = Path(config.images), Path(config.out)
    if out.resolve().is_relative_to(images.resolve()):
        raise UserError(f"out {out}: lies inside the folder of pictures {images}; name a folder outside it")
    listed = coco_images(config.annotations, images) if config.annotations else list_images(images)
    files = list(dict.fromkeys(listed))
    names = [os.path.relpath(file, images) for file in files]
    outside = [name for name in names if name.startswith("..")]
    if outside:
        raise UserError(
            f"{config.annotations}: picture {outside[0]} lies outside {images}; give a folder that holds it"
        )
    # Folders are classes and sorted names often sequences: a shard shall be a random sample of all.
    order = epoch_order(0, 0, len(files)).tolist()
    keys = unique_keys(names)
    return [Picture(files[i], names[i], keys[i], _file_size(files[i])) for i in order]


def unique_keys(names: Sequence[str]) -> list[str]:
    """A webdataset key for each file name: the name without its suffix, with %2E for further dots.

    Webdataset cuts a member's name at the first dot and skips folders like `__MACOSX__`. Files that differ in nothing
    but their suffix keep it, after %%.
    """
    stems = Counter(os.path.splitext(name)[0] for name in names)
    keys = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        folder, slash, base = stem.replace("%", "%25").rpartition("/")
        key = folder + slash + base.replace(".", "%2E")
        if stems[stem] > 1 and suffix:
            key += "%%" + suffix[1:].replace("%", "%25")
        keys.append(f"%5F{key[1:]}" if key.startswith("__") else key)
    return keys


def is_finished(out: Path, recipe: dict[str, Any], resume: str) -> bool:
    """Whether `out` holds the whole set; False where it is new, empty or unfinished.

    Raises:
        UserError: it holds something else, or `resume` forbids what was found.
    """
    marker = out / MARKER
    try:
        found = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else None
        entries = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be used for shards ({error}); choose another folder") from error
    if found is None:
        others = [name for name in entries if not is_temporary(name) and name != ".lock"]
        if others:
            raise UserError(f"{out}: is not empty ({others[0]!r}) and holds no shards of ours; choose a new folder")
        if resume == "must":
            raise UserError(f"{out}: nothing to resume here and --resume is must; use --resume auto to start")
        return False
    if found != recipe:
        if not isinstance(found, dict):
            raise UserError(f"{marker}: damaged; delete the folder and start again, or choose another")
        changes = [f"{name}: {found.get(name)} -> {recipe[name]}" for name in recipe if found.get(name) != recipe[name]]
        raise UserError(
            f"{out}: holds shards of other pictures or fields ({'; '.join(changes)}); choose a new folder, or delete it"
        )
    if resume == "never":
        raise UserError(f"{out}: shards are already here and --resume is never; choose a new folder")
    return (out / INDEX).exists()


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep `out` to this process; the OS lets go of it however the process ends. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another folder") from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{out}: another process is preparing these shards; wait for it, or stop it") from None
        yield


def pack(
    out: Path, pictures: Sequence[Picture], recipe: dict[str, Any], config: PrepareConfig, signals: StopSignals
) -> None:
    """Write the shards that are not there yet, then the index.

    Raises:
        UserError: the disk refuses.
        CheckFailed: more pictures than `config.max_unreadable` are unreadable.
        Interrupted: `signals` has received one, or a second SIGINT did not wait for the picture to end.
    """
    cv2.setNumThreads(1)  # the threads share the cores
    if not (out / MARKER).exists():
        write_json(out / MARKER, recipe)
    for leftover in [*out.glob(".*.tmp"), *out.glob("records/.*.tmp")]:
        leftover.unlink()
    parts = range(0, len(pictures), config.pictures_per_shard)
    shards, unreadable = [], []
    # A log is told once a minute, a terminal as usual.
    interval = 0.1 if sys.stderr.isatty() else 60
    bar = tqdm(total=len(pictures), desc="prepare", unit="picture", mininterval=interval, smoothing=0)
    pool = ThreadPoolExecutor(config.workers)
    encode = partial(encode_picture, short_side=config.short_side, quality=config.quality)
    try:
        for number, first in enumerate(parts):
            part = pictures[first : first + config.pictures_per_shard]
            finished = read_record(out, number)
            if finished:
                bar.update(len(part))
            shard, left_out = finished or write_shard(out, number, part, pool, encode, bar, signals)
            shards.append(shard)
            unreadable += left_out
            if len(unreadable) > config.max_unreadable * len(pictures) or len(unreadable) == len(pictures):
                write_report(out, unreadable)
                raise CheckFailed(
                    f"{len(unreadable)} of {len(pictures)} pictures are unreadable, named in {out / UNREADABLE}; "
                    f"repair or remove them and choose a new folder, or raise max_unreadable ({config.max_unreadable})"
                )
    except KeyboardInterrupt:
        raise interrupted("SIGINT", out) from None
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    write_report(out, unreadable)
    write_atomic(out / INDEX, lambda temporary: write_index(temporary, shards))


def write_shard(
    out: Path,
    number: int,
    pictures: Sequence[Picture],
    pool: ThreadPoolExecutor,
    encode: Callable[[Picture], bytes | UnreadableImage | OSError],
    bar: tqdm[Any],
    signals: StopSignals,
) -> tuple[Shard, list[str]]:
    """Encode the pictures, write their tar, then its record; returns it and the messages of what was left out.

    Raises Interrupted, between two pictures, where `signals` has received one.
    """
    unreadable: list[str] = []
    refused = 0

    def write(temporary: Path) -> None:
        nonlocal refused
        with open(temporary, "wb") as file, TarWriter(file, encoder=False, mtime=0) as archive:
            for picture, encoded in zip(pictures, pool.map(encode, pictures), strict=True):
                if signals.received:
                    raise interrupted(signals.received, out)
                if isinstance(encoded, bytes):
                    archive.write({"__key__": picture.key, "jpg": encoded})
                else:
                    refused += isinstance(encoded, OSError)
                    reason = f"{picture.name}: {encoded.strerror}" if isinstance(encoded, OSError) else str(encoded)
                    # A file name may hold bytes that are no text.
                    unreadable.append(reason.encode("utf-8", "backslashreplace").decode())
                    bar.write(f"warning: left out {unreadable[-1]}", file=sys.stderr)
                bar.update()

    path = shard_path(out, number)
    write_atomic(path, write)
    shard = scan_shard(path)
    # What the file system refused it may give another time, so that such a shard is made again after a restart.
    if not refused:
        write_json(record_path(out, number), {**shard._asdict(), "path": path.name, "unreadable": unreadable})
    return shard, unreadable


def interrupted(reason: str, out: Path) -> Interrupted:
    """The end of a command that a signal stopped, by name."""
    return Interrupted(f"{out}: {reason}; the finished shards are kept; start the same command again to go on")


def read_record(out: Path, number: int) -> tuple[Shard, list[str]] | None:
    """What `write_shard` returned for a shard that is finished."""
    path = shard_path(out, number)
    try:
        fields = json.loads(record_path(out, number).read_text(encoding="utf-8"))
        unreadable = fields.pop("unreadable")
        shard = Shard(**{**fields, "path": path})
        return (shard, unreadable) if path.stat().st_size == shard.size else None
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ):  # none, or damaged: the shard is made again
        return None


def write_report(out: Path, unreadable: Sequence[str]) -> None:
    """Write the messages of the pictures that were left out, one a line; no file where there are none."""
    (out / UNREADABLE).unlink(missing_ok=True)
    if unreadable:
        write_text(out / UNREADABLE, "".join(f"{message}\n" for message in unreadable))


def encode_picture(picture: Picture, short_side: int, quality: int) -> bytes | UnreadableImage | OSError:
    """A JPEG of the picture, upright, its shorter side at most `short_side` pixels; or why there is none."""
    try:
        data = picture.path.read_bytes()
        image = decode_image(data, picture.name, orientation="exif")
    except (UnreadableImage, OSError) as error:
        return error
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1 and is_upright_rgb_jpeg(data):
        return data
    if scale < 1:
        image = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        return UnreadableImage(picture.name, f"{width} x {height} pixels do not make a JPEG (65500 at most)")
    return encoded.tobytes()


def is_upright_rgb_jpeg(data: bytes) -> bool:
    """Whether every decoder shows a JPEG as it is stored, in three colours."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
            upright = header.getexif().get(ORIENTATION, 1) == 1
            return header.format == "JPEG" and header.mode == "RGB" and upright
    except Exception:  # PIL's readers of headers raise many kinds; encoding anew is always right
        return False


def shard_path(out: Path, number: int) -> Path:
    """Of the tar with this number."""
    return out / f"shard-{number:06d}.tar"


def record_path(out: Path, number: int) -> Path:
    """Of what is noted when the tar with this number is finished."""
    return out / "records" / f"{number:06d}.json"


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
