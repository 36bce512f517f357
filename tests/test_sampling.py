from __future__ import annotations

import io
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from poserelay.datasets.sampling import (
    EpochBatches,
    TrainingDraws,
    decode_image,
    draw_generator,
    epoch_order,
    read_image,
    reducible_size,
    step_generator,
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


def encode(image: Image.Image, name: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


@pytest.mark.parametrize(("name", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_the_first_frame_of_an_animation(picture: np.ndarray, name: str, options: dict) -> None:
    first, second = (Image.fromarray(image).quantize(64).convert("RGB") for image in (picture, 255 - picture))
    data = encode(first, name, save_all=True, append_images=[second], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    np.testing.assert_array_equal(decode_image(data, "x"), np.asarray(first))


MODES = {
    "GIF": ["L", "1", "P"],
    "PNG": ["RGBA", "LA", "1", "P", "I;16"],
    "WEBP": ["RGBA", "L"],
    "TIFF": ["RGB", "L", "1", "P", "CMYK", "RGBA", "I;16", "F"],
    "JPEG": ["RGB", "L", "CMYK"],
    "BMP": ["RGBA", "L", "1", "P"],
}


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in MODES.items() for mode in modes])
def test_every_format_is_read_or_unreadable(picture: np.ndarray, name: str, mode: str) -> None:
    if mode in ("I;16", "F"):
        grey = picture[..., 0]
        image = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.float32))
        expected = np.repeat(grey[..., None], 3, axis=-1)
    else:
        image = Image.fromarray(picture).convert(mode)
        expected = np.asarray(image.convert("RGB"))
    data = encode(image, name, **({"lossless": True} if name == "WEBP" else {}))
    if mode == "F":
        with pytest.raises(UnreadableImage, match="not a picture"):
            decode_image(data, "x")
        return
    found = decode_image(data, "x")
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < (3 if name == "JPEG" else 0.01)
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(UnreadableImage, match=r"x: .*replace or remove"):
            decode_image(data[: int(share * len(data))], "x")


def test_transparency_is_dropped(picture: np.ndarray) -> None:
    alpha = np.linspace(0, 255, picture[..., 0].size).astype(np.uint8).reshape(picture.shape[:2])
    image = Image.fromarray(np.dstack([picture, alpha]))
    for name, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        np.testing.assert_array_equal(decode_image(encode(image, name, **options), "x"), picture)


def smooth(height: int, width: int) -> np.ndarray:
    """RGB, without the fine detail in which scales differ."""
    y, x = np.mgrid[0:height, 0:width] / 16
    return np.stack([127 + 120 * np.sin(x), 127 + 120 * np.cos(y), 127 + 60 * (np.sin(x) + np.cos(x + y))], -1).astype(
        np.uint8
    )


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (45, 70)])
@pytest.mark.parametrize("order", ["II", "MM"])
def test_reducible_size_is_that_of_the_upright_picture(
    orientation: int | None, height: int, width: int, order: str
) -> None:
    exif = Image.Exif()
    exif.endian = "<" if order == "II" else ">"
    exif[0x010F] = "a maker, so that the orientation is not the first entry"
    if orientation:
        exif[0x0112] = orientation
    data = encode(Image.fromarray(smooth(height, width)), "JPEG", exif=exif, quality=95, subsampling=0)
    assert b"Exif\0\0" + order.encode() in data
    full = decode_image(data, "x", "exif")
    size = reducible_size(data)
    if (orientation or 1) > 1 and height % 8:
        assert size is None
        return
    assert size == full.shape[:2]
    for reduction in (2, 4, 8):
        reduced = decode_image(data, "x", "exif", reduction)
        assert reduced.shape == (*(-(-side // reduction) for side in size), 3)
        rows, columns = (side // reduction for side in size)
        blocks = full[: rows * reduction, : columns * reduction].reshape(rows, reduction, columns, reduction, 3)
        assert np.abs(reduced[:rows, :columns] - blocks.mean((1, 3))).mean() < 1.5


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"restart_marker_blocks": 2}])
def test_reducible_size_of_other_codings(options: dict) -> None:
    data = encode(Image.fromarray(smooth(45, 70)), "JPEG", **options)
    assert reducible_size(data) == (45, 70)
    assert decode_image(data, "x", "exif", 4).shape == (12, 18, 3)
    for mode in ("L", "CMYK"):
        data = encode(Image.fromarray(smooth(45, 70)).convert(mode), "JPEG")
        assert reducible_size(data) == (45, 70)
        assert decode_image(data, "x", "exif", 2).shape == (23, 35, 3)


def test_only_a_jpeg_is_reducible(picture: np.ndarray) -> None:
    for name in ("PNG", "WEBP", "BMP", "TIFF", "GIF"):
        assert reducible_size(encode(Image.fromarray(picture), name)) is None
    assert reducible_size(b"") is None
    assert reducible_size(b"\xff\xd8\xff\xd9") is None


@given(position=st.integers(0, 400), garbage=st.binary(min_size=1, max_size=30), length=st.integers(0, 3000))
@settings(max_examples=200, deadline=None)
def test_a_damaged_header_is_no_crash(position: int, garbage: bytes, length: int) -> None:
    data = DAMAGED[:position] + garbage + DAMAGED[position + len(garbage) :]
    size = reducible_size(data[:length])
    assert size is None or min(size) > 0


def _jpeg_with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.fromarray(smooth(48, 64)), "JPEG", exif=exif)


DAMAGED = _jpeg_with_exif()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif"])
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


def test_draws_of_a_step_depend_on_nothing_but_seed_step_and_rank() -> None:
    def draw(*key: int) -> list[float]:
        return torch.rand(3, generator=step_generator(*key)).tolist()

    torch.manual_seed(5)
    first = draw(0, 1, 2)
    torch.manual_seed(6)
    assert draw(0, 1, 2) == first
    assert len({tuple(draw(*key)) for key in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 1), (0, 2, 1)]}) == 5
