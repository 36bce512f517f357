from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from poserelay.datasets import shards as module
from poserelay.datasets.sampling import EpochBatches, TrainingDraws
from poserelay.datasets.shards import (
    Shard,
    ShardPictures,
    find_pictures,
    read_index,
    scan_shard,
    write_index,
)
from poserelay.datasets.unlabelled import FilePictures, UnlabelledImages, collate_views
from poserelay.errors import UnreadableImage, UserError


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """With Python's tarfile alone."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Shards as others make them for webdataset: a class number beside every picture; no index."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for number, count in enumerate([3, 1, 5]):
        members: dict[str, bytes] = {"n01/": b"", "__info__.json": b"{}"}
        for i in range(count):
            key = f"n{number:02d}/{'é' * 60 if i == 2 else ''}n{number:02d}_{i}"
            members |= {
                f"{key}.cls": b"7",
                f"{key}.{'JPEG' if i else 'jpg'}": jpeg(10 * number + i),
                f"{key}.json": b"{}",
            }
        write_tar(folder / f"train-{number:04d}.tar", members)
    return folder


def indexed(folder: Path) -> Path:
    """The same with an index of ours."""
    write_index(folder / "index.json", [scan_shard(tar) for tar in sorted(folder.glob("*.tar"))])
    return folder


@pytest.mark.parametrize("prepare", [lambda folder: folder, indexed])
def test_pictures_are_the_members_of_the_tars(
    foreign: Path, prepare: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = find_pictures(prepare(foreign))
    assert isinstance(pictures, ShardPictures)
    found = {pictures.name(index): pictures.read(index) for index in range(len(pictures))}
    expected = {}
    for tar in foreign.glob("*.tar"):
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.name.lower().endswith(("jpg", "jpeg")):
                    expected[f"{tar.name}/{member.name}"] = archive.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
    assert found == expected
    assert len(pictures) == 9
    assert {Path(name).parent.name for name in found} == {"n00", "n01", "n02"}
    assert ("looking through 3 tars" in capsys.readouterr().err) == (prepare is not indexed)


def test_webdataset_finds_the_same_pictures(foreign: Path) -> None:
    pictures = find_pictures(foreign)
    theirs = webdataset.WebDataset([str(tar) for tar in sorted(foreign.glob("*.tar"))], shardshuffle=False)
    data = [sample.get("jpg", sample.get("jpeg")) for sample in theirs if "cls" in sample]
    assert [pictures.read(index) for index in range(len(pictures))] == data


def test_one_picture_of_a_key_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = write_tar(
        tmp_path / "a.tar",
        {"a/x.jpg": jpeg(1), "a/x.seg.png": b"mask", "a/y.png": b"y", "b/x.jpg": b"x", "b/._y.jpg": b""},
    )
    assert scan_shard(tar).members == ["a/x.jpg", "a/y.png", "b/x.jpg"]
    assert "a.tar: 1 pictures left out, each the second or later one of its key (like a/x:" in capsys.readouterr().err


def made_up(counts: list[int], window: int) -> ShardPictures:
    """Shards without files, for `order`."""
    shards = [
        Shard(Path(f"{number}.tar"), 0, [f"{i}.jpg" for i in range(count)], [0] * count, [0] * count)
        for number, count in enumerate(counts)
    ]
    return ShardPictures(shards, window)


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def test_order_is_a_permutation_and_finishes_a_window_before_the_next(
    counts: list[int], window: int, seed: int, epoch: int
) -> None:
    pictures = made_up(counts, window)
    order = pictures.order(seed, epoch)
    assert sorted(order.tolist()) == list(range(sum(counts)))
    assert pictures.order(seed, epoch) is order
    np.testing.assert_array_equal(made_up(counts, window).order(seed, epoch), order)
    # Wherever all pictures of the shards begun so far have come, nothing is pending; in between no more than a window.
    shard_of = np.repeat(np.arange(len(counts)), counts)
    pending: dict[int, int] = {}
    begun: set[int] = set()
    for shard in shard_of[order].tolist():
        begun.add(shard)
        pending[shard] = pending.get(shard, counts[shard]) - 1
        assert len(begun) == 1 or sum(counts[s] for s in begun) <= window
        if not any(pending[s] for s in begun):
            begun.clear()
    assert set(pending.values()) <= {0}


def test_order_mixes() -> None:
    counts = [100] * 40
    pictures = made_up(counts, window=1000)
    orders = [pictures.order(seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert np.mean(orders[one] == orders[other]) < 0.01
    shards = orders[0] // 100
    windows = [shards[first : first + 1000] for first in range(0, 4000, 1000)]
    assert all(len(set(window)) == 10 for window in windows)
    # Within a window a shard's hundred places are uniform: their mean is 499.5 with a standard deviation of 27.4.
    means = [np.flatnonzero(window == shard).mean() for window in windows for shard in set(window)]
    assert np.abs(np.array(means) - 499.5).max() < 5 * 27.4
    # A shard is in the first window of a quarter of the epochs.
    first = np.array([np.bincount(pictures.order(2, epoch)[:1000] // 100, minlength=40) > 0 for epoch in range(200)])
    assert np.abs(first.mean(0) - 0.25).max() < 5 * (0.25 * 0.75 / 200) ** 0.5


def test_a_window_is_sent_for_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [scan_shard(write_tar(tmp_path / f"{n}.tar", {f"{i}.jpg": b"x" for i in range(4)})) for n in range(12)]
    sent: list[int] = []
    monkeypatch.setattr(module, "_send_for", lambda descriptor: sent.append(os.fstat(descriptor).st_ino))
    pictures = ShardPictures(shards, window=8)
    order = pictures.order(0, 0).tolist()
    inodes = [shards[index // 4].path.stat().st_ino for index in order]  # of two shards per window of eight pictures
    for position, index in enumerate(order):
        before = set(sent)
        pictures.read(index)
        window = position - position % 8
        assert inodes[position] in before or position < 8
        assert set(inodes[:position]) <= set(sent) <= set(inodes[: window + 16])
    assert set(sent) == set(inodes)


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=15), window=st.integers(1, 30))
def test_every_shard_after_the_first_window_is_sent_for_by_the_window_before(counts: list[int], window: int) -> None:
    pictures = made_up(counts, window)
    shards = np.repeat(np.arange(len(counts)), counts)[pictures.order(0, 0)].tolist()
    in_turn = list(dict.fromkeys(shards))
    sent = [shard for opened in in_turn for shard in pictures._ahead.get(opened, ())]
    assert len(sent) == len(set(sent))
    assert set(in_turn) - set(sent) == set(in_turn[: len(in_turn) - len(sent)])
    assert sum(counts[shard] for shard in set(in_turn) - set(sent)) <= window or len(in_turn) - len(sent) == 1


def test_few_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [scan_shard(write_tar(tmp_path / f"{n}.tar", {f"{i}.jpg": b"%d" % n for i in range(3)})) for n in range(9)]
    monkeypatch.setattr(module, "OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    pictures = ShardPictures(shards)
    for index in pictures.order(0, 0).tolist():
        assert pictures.read(index) == b"%d" % (index // 3)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    pictures = ShardPictures(shards)
    for index in (0, 3, 0, 6):  # of shards 0, 1, 0, 2: the one unused for longest is closed
        pictures.read(index)
    shards[0].path.unlink()
    shards[1].path.rename(tmp_path / "away")
    assert pictures.read(1) == b"0"
    with pytest.raises(UnreadableImage):
        pictures.read(4)
    (tmp_path / "away").rename(shards[1].path)
    copy = pickle.loads(pickle.dumps(pictures))
    assert copy.read(4) == b"1"
    np.testing.assert_array_equal(copy.order(5, 6), pictures.order(5, 6))
    del copy, pictures
    assert len(os.listdir("/proc/self/fd")) == before


def shifted(image: np.ndarray, generator: Callable[[int], np.random.Generator]) -> torch.Tensor:
    shift = np.uint8(generator(0).integers(0, 100))
    return torch.from_numpy(image.transpose(2, 0, 1) + shift)[None]


def test_workers_change_nothing(foreign: Path) -> None:
    """The files open in the parent are inherited by the forked workers, and read by all at once."""
    pictures = ShardPictures(read_index(indexed(foreign)), window=4)
    source = UnlabelledImages(pictures, shifted)

    def batches(workers: int) -> list[Any]:
        sampler = EpochBatches(len(pictures), 3, 9)
        loader = DataLoader(
            TrainingDraws(source, 1),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate_views,
            multiprocessing_context="fork" if workers else None,
        )
        return list(loader)

    alone, shared = batches(0), batches(2)
    assert sorted(name for batch in alone[:3] for name in batch.names) == sorted(map(pictures.name, range(9)))
    for one, other in zip(alone, shared, strict=True):
        assert one.names == other.names
        assert torch.equal(one.images, other.images)
        assert not one.replaced


def test_a_shard_that_changes_while_it_is_read(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"n01/x.jpg": b"0" * 5000, "n01/y.jpg": b"1" * 5000})
    pictures = ShardPictures([scan_shard(tar)])
    assert pictures.read(0) == b"0" * 5000
    os.truncate(tar, 8000)
    with pytest.raises(UnreadableImage, match=r"^a\.tar/n01/y\.jpg: its shard has been cut short"):
        pictures.read(1)
    pictures = pickle.loads(pickle.dumps(pictures))
    tar.unlink()
    with pytest.raises(UnreadableImage, match=r"^a\.tar/n01/x\.jpg: its shard cannot be read .No such file"):
        pictures.read(0)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 4095))
def test_a_truncated_tar_is_refused_wherever_it_was_cut(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    # Two headers and the data, padded to whole blocks of 512 bytes: the archive's end begins at 4096.
    folder = tmp_path_factory.mktemp("cut")
    tar = write_tar(folder / "a.tar", {"x.jpg": b"0" * 1500, "y.jpg": b"1" * 1300})
    assert tar.read_bytes()[4095 - 235 :].strip(b"\0") == b""
    os.truncate(tar, cut)
    with pytest.raises(UserError, match=r"a\.tar: .*truncated"):
        scan_shard(tar)


def test_a_damaged_tar_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"x.jpg": b"0" * 500, "y.jpg": b"1" * 500})
    data = bytearray(tar.read_bytes())
    data[1024 + 150] ^= 1  # in the checksum of the second header, where tarfile stops without a word
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar: truncated or damaged at byte 1024"):
        scan_shard(tar)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            find_pictures(tmp_path)

    with pytest.raises(UserError, match="absent: no such folder"):
        find_pictures(tmp_path / "absent")
    refused("no picture in it")
    packed = write_tar(tmp_path / "plain", {"x.jpg": jpeg(1)}).read_bytes()
    (tmp_path / "train.tar.gz").write_bytes(gzip.compress(packed))
    refused(r"train\.tar\.gz: pictures cannot be read from the middle of a compressed tar; decompress it .gunzip")
    (tmp_path / "train.tar.gz").rename(tmp_path / "train.tar")
    refused(r"train\.tar: not an uncompressed tar")
    (tmp_path / "train.tar").write_bytes(packed)
    (tmp_path / "n01").mkdir()
    (tmp_path / "n01/x.png").write_bytes(b"x")
    refused(r"holds both shards .train\.tar, \.\.\.. and pictures .n01/x\.png, \.\.\..; move one or the other")
    (tmp_path / "train.tar").rename(tmp_path / "annotations.tar.gz")
    pictures = find_pictures(tmp_path)
    assert isinstance(pictures, FilePictures)
    assert pictures.files == [tmp_path / "n01/x.png"]
    (tmp_path / "n01/x.png").unlink()
    (tmp_path / "annotations.tar.gz").unlink()
    write_tar(tmp_path / "train.tar", {"x.cls": b"1"})
    refused("no picture in the 1 tars")
    (tmp_path / "preparation.json").write_text("{}")
    refused("the shards are not finished; start the same `poserelay prepare` again")


def test_an_index_that_does_not_match(foreign: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            find_pictures(foreign)

    index = indexed(foreign) / "index.json"
    text = index.read_text()
    (foreign / "train-0000.tar").rename(foreign / "train-0009.tar")
    refused(r"train-0009\.tar: not in index\.json beside it")
    (foreign / "train-0009.tar").unlink()
    refused(r"train-0000\.tar: is missing, but index\.json lists it with 20480")
    write_tar(foreign / "train-0000.tar", {"n00/x.jpg": jpeg(1)})
    refused(r"train-0000\.tar: has 10240 bytes, but index\.json lists it with 20480; copy it again")
    fields = json.loads(text)
    for wrong in (
        {"sizes": [10**9] * 3},
        {"offsets": [-1, 0, 0]},
        {"offsets": [0]},
        {"offsets": "abc"},
        {"members": [1, 2, 3]},
        {"more": 1},
    ):
        shards = [{**fields["shards"][0], **wrong}, *fields["shards"][1:]]
        index.write_text(json.dumps({**fields, "shards": shards}))
        refused("not an index of ours, or damaged; remove it")
    index.write_text(text[: len(text) // 2])
    refused("not an index of ours, or damaged; remove it")
    index.write_text("[]")
    refused("not an index of ours, or damaged; remove it")
    index.write_text(json.dumps({**fields, "format": 2}))
    refused("format 2, expected 1; prepare the shards again")
