from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from webdataset.tariterators import base_plus_ext

from poserelay import preparation
from poserelay.__main__ import main
from poserelay.config import PrepareConfig
from poserelay.datasets.shards import ShardPictures, find_pictures
from poserelay.errors import UserError
from poserelay.preparation import list_pictures, locked, prepare, unique_keys

from .processes import finish, kill, start


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, so that resampling filters agree; no two corners alike."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif, **({"quality": 90} if path.suffix != ".png" else {}))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Thirty pictures of three classes, larger than 32 pixels."""
    for number in range(30):
        save(photograph(64, 48, number), tmp_path / f"many/n{number // 10}/x{number:02d}.jpg")
    return tmp_path / "many"


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    sizes = ("--short_side", "32", "--pictures_per_shard", "7", "--workers", "1")
    return ["prepare", "--images", str(images), "--out", str(out), *sizes, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def stored(out: Path) -> dict[str, bytes]:
    """Member -> bytes, by Python's tarfile."""
    found = {}
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}  # pyright: ignore[reportOptionalMemberAccess]
    return found


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean over blocks of 4 x 4, as JPEG keeps less of the finest detail and of the colours'."""
    return float(np.abs(np.asarray(one.reduce(4), float) - np.asarray(other.reduce(4), float)).mean())


KINDS: dict[str, tuple[str, tuple[int, int], int | None]] = {
    "large.jpg": ("RGB", (640, 480), None),
    "tall.png": ("RGB", (301, 777), None),
    "rotated.jpg": ("RGB", (640, 480), 6),
    "mirrored.jpg": ("RGB", (500, 300), 2),
    "grey.jpg": ("L", (400, 300), None),
    "transparent.png": ("RGBA", (300, 400), None),
    "palette.png": ("P", (300, 400), None),
    "print.jpg": ("CMYK", (400, 300), None),
    "small.png": ("RGB", (90, 60), None),
    "small_grey.jpg": ("L", (90, 60), None),
    "small_rotated.jpg": ("RGB", (90, 60), 8),
    "small_print.jpg": ("CMYK", (90, 60), None),
    "small.jpg": ("RGB", (90, 60), None),
    "small_upright.jpg": ("RGB", (90, 60), 1),
    "just.jpg": ("RGB", (300, 256), None),
    "line.png": ("RGB", (4000, 3), None),
}
KEPT = {"small.jpg", "small_upright.jpg", "just.jpg"}


def test_every_kind_of_picture(tmp_path: Path) -> None:
    """Against PIL: upright, three colours, the shorter side 256 at most, the aspect kept; small JPEGs byte for byte."""
    for number, (name, (mode, size, orientation)) in enumerate(KINDS.items()):
        image = photograph(*size, number)
        if mode == "RGBA":
            image.putalpha(Image.new("L", size, 128))
        save(image.convert(mode), tmp_path / "in" / name, orientation)
    shards = prepare(PrepareConfig(str(tmp_path / "in"), str(tmp_path / "out"), workers=2))
    pictures = ShardPictures(shards)
    found = {Path(pictures.name(index)).name: pictures.read(index) for index in range(len(pictures))}
    assert found == stored(tmp_path / "out")
    assert len(found) == len(KINDS)
    for name, (mode, _, _) in KINDS.items():
        stem, suffix = name.split(".")
        data = found[f"{stem}%%{suffix}.jpg" if stem == "small" else f"{stem}.jpg"]
        assert (data == (tmp_path / "in" / name).read_bytes()) == (name in KEPT)
        original = ImageOps.exif_transpose(Image.open(tmp_path / "in" / name)).convert("RGB")
        result = Image.open(io.BytesIO(data))
        assert (result.format, result.mode) == ("JPEG", "RGB")
        assert result.getexif().get(0x0112, 1) == 1
        scale = min(1, 256 / min(original.size))
        assert np.abs(np.array(result.size) - np.array(original.size) * scale).max() <= 0.5
        assert min(result.size) == min(256, *original.size)
        if mode != "CMYK":  # whose conversion is a matter of taste
            expected = original.resize(result.size, Image.Resampling.BILINEAR)
            assert difference(expected, result) < 2


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    save(Image.fromarray(stripes), tmp_path / "in/a.png")
    prepare(PrepareConfig(str(tmp_path / "in"), str(tmp_path / "out"), short_side=100))
    result = np.asarray(Image.open(io.BytesIO(stored(tmp_path / "out")["a.jpg"])), float)
    assert np.abs(result - 127.5).max() < 32


def test_webdataset_reads_it(many: Path, tmp_path: Path) -> None:
    for name in ("n0/x.1.jpg", "n0/x.2.jpg", "n0/x00.png", "__MACOSX__/n0/x00.jpg", "n.3/x.jpg"):
        save(photograph(40, 40), many / name)
    assert main(arguments(many, tmp_path / "out")) == 0
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert len({sample["__key__"] for sample in samples}) == len(samples) == 35
    assert all(min(sample["jpg"].size) == 32 for sample in samples)
    pictures = find_pictures(tmp_path / "out")
    names = [f"{Path(sample['__url__']).name}/{sample['__key__']}.jpg" for sample in samples]
    assert [pictures.name(index) for index in range(35)] == names
    assert Counter(Path(name).parent.name for name in names) == {"n0": 14, "n1": 10, "n2": 10, "n.3": 1}
    # Classes are folders, and every shard of seven has pictures of several.
    assert all(len({Path(name).parent.name for name in names[first : first + 7]}) > 1 for first in range(0, 35, 7))


@given(
    st.sets(
        st.builds(
            "{}{}{}".format,
            st.sampled_from(["", "a/", "a.b/", "__a__/", "%/", "%5F_a__/"]),
            st.text("a2_.%", min_size=1, max_size=4),
            st.sampled_from([".jpg", ".png", ".25", ""]),
        ).filter(lambda name: name.rpartition("/")[2] not in (".", "..")),
        min_size=1,
        max_size=12,
    )
)
def test_keys_are_unique_and_survive_webdataset(names: set[str]) -> None:
    keys = unique_keys(sorted(names))
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert base_plus_ext(f"{key}.jpg") == (key, "jpg")
        assert not re.match(r"__[^/]*__($|/)", f"{key}.jpg")  # what webdataset skips


def test_keys_by_hand() -> None:
    names = ["n01/x.JPEG", "a.b.jpg", "100%.jpg", "y.jpg", "y.png", "__x__/a.jpg"]
    assert unique_keys(names) == ["n01/x", "a%2Eb", "100%25", "y%%jpg", "y%%png", "%5F_x__/a"]


def test_workers_change_nothing_and_the_tars_hold_no_time(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(many, tmp_path / "one")) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'one'}\n"
    sizes = [file.stat().st_size for file in (tmp_path / "one").glob("*.tar")]
    originals = sum(file.stat().st_size for file in many.rglob("*.jpg"))
    assert f"30 pictures in 5 shards, {sum(sizes) / 1e6:.1f} MB, {sum(sizes) / 30e3:.1f} kB each" in printed.err
    assert f"(the originals: {originals / 1e6:.1f} MB, {originals / 30e3:.1f} kB)\n" in printed.err
    assert main([*arguments(many, tmp_path / "three"), "--workers", "3"]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    with tarfile.open(tmp_path / "one/shard-000000.tar") as archive:
        assert {(member.mtime, member.uid, member.gid) for member in archive} == {(0, 0, 0)}
    others = {path.name for path in (tmp_path / "one").iterdir() if path.suffix != ".tar"}
    assert others == {"index.json", "preparation.json", ".lock"}


def test_a_finished_set_is_left_alone(many: Path, tmp_path: Path) -> None:
    assert main(arguments(many, tmp_path / "out")) == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    for file in files:
        os.utime(file, (1, 1))
    before = contents(tmp_path / "out")
    assert main([*arguments(many, tmp_path / "out"), "--workers", "2", "--resume", "must"]) == 0
    assert contents(tmp_path / "out") == before
    assert {file.stat().st_mtime for file in files} == {1}


@pytest.mark.parametrize("number", [0, 2, 4])
def test_killed_and_started_again(many: Path, tmp_path: Path, number: int) -> None:
    """kill -9 while a shard is written; those before stay as they are, and the result is the same."""
    assert main(arguments(many, tmp_path / "whole")) == 0
    out = tmp_path / "cut"

    def main_that_stays(argv: list[str]) -> int:
        encode = preparation.encode_picture
        encoded = 0

        def stay(*arguments: Any, **fields: Any) -> Any:
            nonlocal encoded
            encoded += 1
            if encoded == 7 * number + 2:
                (tmp_path / "reached").touch()
                time.sleep(60)
            return encode(*arguments, **fields)

        preparation.encode_picture = stay  # of the forked process alone
        return main(argv)

    process = start(main_that_stays, arguments(many, out), tmp_path / "log")
    until = time.monotonic() + 30
    while not (tmp_path / "reached").exists() and time.monotonic() < until:
        time.sleep(0.005)
    assert (out / f".shard-{number:06d}.tar.{process}.tmp").exists()
    kill(process)
    with pytest.raises(UserError, match=r"not finished|no picture in it"):
        find_pictures(out)
    kept = sorted(out.glob("*.tar"))
    assert len(kept) == number
    for file in kept:
        os.utime(file, (1, 1))
    assert main(arguments(many, out)) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert {file.stat().st_mtime for file in kept} <= {1}


@pytest.mark.slow
def test_killed_at_random_moments(many: Path, tmp_path: Path) -> None:
    smaller = ("--pictures_per_shard", "1", "--workers", "2")
    began = time.monotonic()
    assert finish(start(main, arguments(many, tmp_path / "whole", *smaller), tmp_path / "log")) == 0
    seconds = time.monotonic() - began
    chance = random.Random(7)
    for number in range(6):
        cut = arguments(many, tmp_path / f"cut{number}", *smaller)
        for _ in range(3):
            process = start(main, cut, tmp_path / "log")
            time.sleep(chance.uniform(0, 0.6 * seconds))
            kill(process)
        assert finish(start(main, cut, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
        assert contents(tmp_path / f"cut{number}") == contents(tmp_path / "whole")


def test_another_set_in_the_folder_is_refused(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(command: list[str], *words: str) -> None:
        before = contents(tmp_path)
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert all(word in error for word in words), error
        assert contents(tmp_path) == before

    out = tmp_path / "out"
    refused(arguments(many, out, "--resume", "must"), "nothing to resume here")
    assert main(arguments(many, out)) == 0
    refused(arguments(many, out, "--short_side", "33"), "short_side: 32 -> 33", "choose a new folder, or delete it")
    refused(arguments(many, out, "--quality", "94"), "quality: 95 -> 94")
    refused(arguments(many, out, "--resume", "never"), "shards are already here and --resume is never")
    refused(arguments(many, many / "n0/shards"), "lies inside the folder of pictures")
    refused(arguments(many, many), "lies inside the folder of pictures")
    refused(arguments(many, tmp_path), "is not empty ('many') and holds no shards of ours; choose a new folder")
    refused(arguments(many, many / "n0/x00.jpg" / "out"), "lies inside")
    refused(arguments(tmp_path / "absent", out), "absent: no such folder")
    refused(arguments(many, out, "--quality", "0"), "quality is 0")
    with open(many / "n1/x15.jpg", "ab") as file:
        file.write(b"0")
    refused(arguments(many, out), "pictures_sha256")
    (out / "preparation.json").write_text("[1")
    refused(arguments(many, out), "cannot be used for shards")
    (tmp_path / "file").write_text("")
    refused(arguments(many, tmp_path / "file"), "file: cannot be used for shards")


def test_two_at_once(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hold(_: Any) -> int:
        with locked(tmp_path / "out"):
            (tmp_path / "held").touch()
            time.sleep(60)
        return 0

    process = start(hold, [], tmp_path / "log")
    until = time.monotonic() + 30
    while not (tmp_path / "held").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert main(arguments(many, tmp_path / "out")) == 2
    assert "another process is preparing these shards" in capsys.readouterr().err
    kill(process)
    assert main(arguments(many, tmp_path / "out")) == 0


def test_unreadable_pictures_are_left_out_and_named(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (many / "n0/x03.jpg").write_bytes((many / "n0/x03.jpg").read_bytes()[:300])
    (many / "n2/x22.jpg").write_bytes(b"")
    (many / "n1/absent.jpg").symlink_to("nowhere")
    (many / "n1/x11.jpg").rename(os.fsdecode(os.fsencode(many) + b"/n1/\xff.jpg"))
    Path(os.fsdecode(os.fsencode(many) + b"/n1/\xfe.png")).write_bytes(b"no picture")
    Image.new("L", (65501, 20)).save(many / "n1/wide.png")
    out = tmp_path / "out"
    assert main(arguments(many, out, "--max_unreadable", "0.12")) == 3
    error = capsys.readouterr().err
    assert f"of 33 pictures are unreadable, named in {out / 'unreadable.txt'}" in error
    assert not (out / "index.json").exists()
    assert main(arguments(many, out, "--max_unreadable", "0.16")) == 0
    error = capsys.readouterr().err
    messages = sorted((out / "unreadable.txt").read_text().splitlines())
    assert messages == [
        "n0/x03.jpg: the file is truncated; replace or remove it",
        "n1/\\udcfe.png: not a picture, or damaged; replace or remove it",
        "n1/absent.jpg: No such file or directory",
        "n1/wide.png: 65501 x 20 pixels do not make a JPEG (65500 at most); replace or remove it",
        "n2/x22.jpg: the file is empty; replace or remove it",
    ]
    assert "28 pictures in 5 shards" in error
    assert f"5 left out, see {out / 'unreadable.txt'}" in error
    assert len(stored(out)) == len(find_pictures(out)) == 28
    assert any(name.endswith("n1/\udcff.jpg") for name in map(find_pictures(out).name, range(28)))
    for picture in many.rglob("*.*"):
        picture.write_bytes(b"x")
    assert main(arguments(many, tmp_path / "none", "--max_unreadable", "1")) == 3


def test_what_the_file_system_refused_is_asked_for_again(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(many, tmp_path / "whole")) == 0
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name in ("x03.jpg", "x22.jpg"):
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert main(arguments(many, tmp_path / "cut", "--max_unreadable", "0.05")) == 3
    assert "n0/x03.jpg: Input/output error" in (tmp_path / "cut/unreadable.txt").read_text()
    assert main(arguments(many, tmp_path / "cut")) == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("stop", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, r"shard-000002\.tar: cannot be written: No space left"),
        (KeyboardInterrupt(), 75, "the finished shards are kept; start the same command again"),
    ],
)
def test_stopped_in_the_middle(
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop: BaseException,
    code: int,
    message: str,
) -> None:
    assert main(arguments(many, tmp_path / "whole")) == 0
    write = preparation.TarWriter.write
    written = 0

    def fail(*arguments: Any) -> int:
        nonlocal written
        written += 1
        if written == 17:
            raise stop
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preparation.TarWriter, "write", fail)
        assert main(arguments(many, tmp_path / "cut")) == code
    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in (tmp_path / "cut").glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    # A shard that is damaged meanwhile is made again.
    os.truncate(tmp_path / "cut/shard-000001.tar", 700)
    assert main(arguments(many, tmp_path / "cut")) == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_ends_at_the_next_picture(
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """Exit 75, the finished shards kept; and afterwards this process heeds signals as before."""
    assert main(arguments(many, tmp_path / "whole")) == 0
    before = signal.getsignal(number)
    write = preparation.TarWriter.write
    written = 0

    def send(*arguments: Any) -> int:
        nonlocal written
        written += 1
        if written == 17:
            os.kill(os.getpid(), number)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preparation.TarWriter, "write", send)
        assert main([*arguments(many, tmp_path / "cut"), "--workers", "2"]) == 75
    assert written == 17
    assert f"interrupted: {tmp_path / 'cut'}: {number.name}; the finished shards are kept" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "cut").glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert signal.getsignal(number) is before
    assert main(arguments(many, tmp_path / "cut")) == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_signal_before_the_first_picture_is_not_lost(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing a large folder takes minutes; a finished set is done all the same."""

    def list_slowly(config: PrepareConfig) -> list[preparation.Picture]:
        os.kill(os.getpid(), signal.SIGTERM)
        return list_pictures(config)

    monkeypatch.setattr(preparation, "list_pictures", list_slowly)
    assert main(arguments(many, tmp_path / "out")) == 75
    assert not list((tmp_path / "out").glob("*.tar"))
    monkeypatch.setattr(preparation, "list_pictures", list_pictures)
    assert main(arguments(many, tmp_path / "out")) == 0
    monkeypatch.setattr(preparation, "list_pictures", list_slowly)
    assert main(arguments(many, tmp_path / "out")) == 0


def test_the_pictures_of_a_coco_file(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"

    def write(names: list[str]) -> None:
        images = [{"id": i, "file_name": name, "height": 48, "width": 64} for i, name in enumerate(names)]
        file.write_text(json.dumps({"images": images}))

    write(["n0/x00.jpg", "n2/x25.jpg", "n0/x00.jpg"])
    assert main(arguments(many, tmp_path / "out", "--annotations", str(file))) == 0
    assert set(stored(tmp_path / "out")) == {"n0/x00.jpg", "n2/x25.jpg"}
    write(["../many/n0/x00.jpg", "../outside.jpg"])
    (tmp_path / "outside.jpg").touch()
    assert main(arguments(many, tmp_path / "other", "--annotations", str(file))) == 2
    assert "picture ../outside.jpg lies outside" in capsys.readouterr().err


DATA = Path(os.environ.get("POSERELAY_DATA", "nowhere"))


@pytest.mark.skipif(not (DATA / "coco").exists(), reason="POSERELAY_DATA names no folder with coco")
def test_real_pictures(tmp_path: Path) -> None:
    originals = {file.stem: file for file in (DATA / "coco/images").iterdir()}
    pictures = ShardPictures(prepare(PrepareConfig(str(DATA / "coco/images"), str(tmp_path / "out"), workers=1)))
    assert len(pictures) == len(originals)
    for index in range(len(pictures)):
        original = ImageOps.exif_transpose(Image.open(originals[Path(pictures.name(index)).stem])).convert("RGB")
        result = Image.open(io.BytesIO(pictures.read(index)))
        assert min(result.size) == min(256, *original.size)
        expected = original.resize(result.size, Image.Resampling.BILINEAR)
        assert difference(expected, result) < 2
