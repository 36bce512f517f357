from __future__ import annotations

import io
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from poserelay.datasets.sampling import (
    EpochBatches,
    TrainingDraws,
    draw_generator,
    epoch_order,
    read_image,
    steps_per_epoch,
    worker_init,
)
from poserelay.errors import UnreadableImage, UserError


def test_draws_depend_on_each_of_the_four_numbers_only() -> None:
    keys = [(s, e, i, v) for s in (0, 1) for e in (0, 1, 2) for i in (0, 1, 7) for v in (0, 1)]
    draws = {key: tuple(draw_generator(*key).random(4)) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert all(tuple(draw_generator(*key).random(4)) == draws[key] for key in reversed(keys))


def test_neighbouring_draws_are_uncorrelated() -> None:
    first = np.array([[draw_generator(0, e, i, 0).random() for i in range(60)] for e in range(60)])
    assert abs(first.mean() - 0.5) < 0.02
    for a, b in ((first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.06


def test_epoch_order_is_a_new_permutation_each_epoch() -> None:
    orders = [epoch_order(3, epoch, 50) for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    with pytest.raises(ValueError, match="read-only"):
        orders[0][0] = 1


@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 6),
    world=st.integers(1, 4),
    total=st.integers(0, 30),
    start=st.integers(0, 30),
)
def test_batches_of_all_ranks_make_the_global_batch(
    length: int, batch: int, world: int, total: int, start: int
) -> None:
    together = list(EpochBatches(length, batch * world, total))
    ranks = [list(EpochBatches(length, batch, total, rank=rank, world=world)) for rank in range(world)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == together
    # Resuming gives what was left, and the length is that of the iterator.
    resumed = EpochBatches(length, batch * world, total, start_step=start)
    assert list(resumed) == together[start:]
    assert len(resumed) == len(together[start:])
    # Within an epoch no position comes twice, unless the set is smaller than a batch.
    per_epoch = steps_per_epoch(length, batch * world)
    for first in range(0, total, per_epoch):
        keys = list(chain(*together[first : first + per_epoch]))
        assert {epoch for epoch, _ in keys} == {first // per_epoch}
        assert len(set(keys)) == len(keys) or length < batch * world


class Numbers:
    """A source of (index, three draws of view 1), some of them unreadable."""

    def __init__(self, length: int, unreadable: set[int]) -> None:
        self.length, self.unreadable = length, unreadable

    def __len__(self) -> int:
        return self.length

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return epoch_order(seed, epoch, self.length)

    def sample(self, index: int, generator: Callable[[int], np.random.Generator]) -> tuple[int, list[float]]:
        if index in self.unreadable:
            raise UnreadableImage(f"{index}.jpg", "broken")
        return index, generator(1).random(3).tolist()


def test_unreadable_is_replaced_by_the_next_of_the_epochs_order() -> None:
    order = epoch_order(5, 2, 6).tolist()
    bad = {order[4], order[5]}
    item, replaced = TrainingDraws(Numbers(6, bad), 5)[2, 4]
    assert item == (order[0], draw_generator(5, 2, order[0], 1).random(3).tolist())
    assert [message.split(":")[0] for message in replaced] == [f"{order[4]}.jpg", f"{order[5]}.jpg"]
    assert TrainingDraws(Numbers(6, bad), 5)[2, 3] == (
        (order[3], draw_generator(5, 2, order[3], 1).random(3).tolist()),
        [],
    )
    with pytest.raises(UserError, match=r"none of the 6 training pictures can be read; the first: .*\.jpg: broken"):
        TrainingDraws(Numbers(6, set(range(6))), 5)[0, 0]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    def run(workers: int) -> list:
        loader = DataLoader(
            TrainingDraws(Numbers(7, {3}), 0),
            batch_sampler=EpochBatches(7, 2, 8),
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=worker_init if workers else None,
        )
        return list(loader)

    assert run(workers) == run(0)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A smooth RGB picture with different channels, 48 x 64."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([4 * x, 5 * y, 255 - 2 * x - 2 * y], axis=-1).astype(np.uint8)


def save(folder: Path, image: Image.Image, suffix: str, **options) -> Path:
    path = folder / f"picture{suffix}"
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("RGB", ".png", 0),
        ("RGBA", ".png", 0),
        ("RGB", ".bmp", 0),
        ("RGB", ".jpg", 6),
        ("CMYK", ".jpg", 8),
        ("RGB", ".webp", 12),
    ],
)
def test_reads_rgb(tmp_path: Path, picture: np.ndarray, mode: str, suffix: str, tolerance: int) -> None:
    found = read_image(save(tmp_path, Image.fromarray(picture).convert(mode), suffix))
    assert found.dtype == np.uint8
    assert found.shape == picture.shape
    assert np.abs(found.astype(int) - picture).mean() <= tolerance / 3


def test_reads_grey_palette_and_16_bit(tmp_path: Path, picture: np.ndarray) -> None:
    grey = picture[..., 0]
    found = read_image(save(tmp_path, Image.fromarray(grey), ".png"))
    np.testing.assert_array_equal(found, np.repeat(grey[..., None], 3, axis=-1))
    deep = read_image(save(tmp_path, Image.fromarray(grey.astype(np.uint16) * 257), ".png"))
    np.testing.assert_array_equal(deep, found)
    palette = Image.fromarray(picture).convert("P")
    np.testing.assert_array_equal(read_image(save(tmp_path, palette, ".png")), np.asarray(palette.convert("RGB")))


def test_orientation(tmp_path: Path, picture: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = save(tmp_path, Image.fromarray(picture), ".jpg", exif=exif, quality=95)
    assert read_image(path).shape == (48, 64, 3)
    upright = read_image(path, orientation="exif")
    assert upright.shape == (64, 48, 3)
    np.testing.assert_array_equal(upright, np.rot90(read_image(path), -1))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_truncated_picture_is_unreadable(tmp_path: Path, picture: np.ndarray, suffix: str, share: float) -> None:
    path = save(tmp_path, Image.fromarray(picture), suffix)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UnreadableImage, match=f"picture{suffix}: .*replace or remove"):
        read_image(path)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_with_a_thumbnail(tmp_path: Path, picture: np.ndarray, progressive: bool) -> None:
    """The thumbnail's own end marker is not the picture's, and bytes after the end do no harm."""
    thumbnail = io.BytesIO()
    Image.fromarray(picture[::4, ::4]).save(thumbnail, "JPEG")
    path = save(tmp_path, Image.fromarray(picture), ".jpg", progressive=progressive, quality=95)
    plain = read_image(path)
    data = path.read_bytes()
    payload = b"Exif\0\0" + thumbnail.getvalue()
    data = data[:2] + b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload + data[2:]
    path.write_bytes(data + b"\0" * 100 + b"trailer")
    np.testing.assert_array_equal(read_image(path), plain)
    for cut in (len(data) - 2, int(0.8 * len(data))):
        path.write_bytes(data[:cut] + b"\0" * 50)  # as a full disk leaves it
        with pytest.raises(UnreadableImage, match="truncated"):
            read_image(path)


def test_not_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(path)
    with pytest.raises(UnreadableImage, match="directory"):
        read_image(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(UnreadableImage, match="empty"):
        read_image(path)
    path.write_text("hello")
    with pytest.raises(UnreadableImage, match="not a picture"):
        read_image(path)
