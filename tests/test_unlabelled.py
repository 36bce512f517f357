from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from poserelay.datasets.sampling import TrainingDraws, draw_generator, epoch_order
from poserelay.datasets.unlabelled import (
    FilePictures,
    JoinedPictures,
    UnlabelledImages,
    coco_images,
    collate_views,
    list_images,
)
from poserelay.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "sub/c.jpeg", ".hidden.png", ".thumbs/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), len(name), dtype=np.uint8)).save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_list_images(folder: Path) -> None:
    assert list_images(folder) == [folder / "a.JPG", folder / "b.png", folder / "sub" / "c.jpeg"]
    assert list_images(folder, recursive=False) == [folder / "a.JPG", folder / "b.png"]
    with pytest.raises(UserError, match=r"absent: no such folder"):
        list_images(folder / "absent")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no picture in it .looked for \.bmp, \.gif, \.jpeg"):
        list_images(folder / "empty")


def test_coco_images(folder: Path) -> None:
    names = ["sub/c.jpeg", "b.png"]
    data = {
        "images": [{"id": i, "file_name": name, "height": 6, "width": 8} for i, name in enumerate(names)],
    }
    file = folder / "x.json"
    file.write_text(json.dumps(data))
    assert coco_images(file, folder) == [folder / name for name in names]
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png: no such picture .1 of 2"):
        coco_images(file, folder)
    file.write_text(json.dumps({"images": []}))
    with pytest.raises(UserError, match="no list images"):
        coco_images(file, folder)


def two_noisy_views(image: np.ndarray, generator: Callable[[int], np.random.Generator]) -> torch.Tensor:
    shifts = [int(generator(view).integers(0, 100)) for view in range(2)]
    return torch.stack([torch.from_numpy(image.transpose(2, 0, 1) + np.uint8(shift)) for shift in shifts])


def test_views_of_unreadable_pictures_are_replaced(folder: Path) -> None:
    files = list_images(folder)
    files[1].write_bytes(b"broken")
    draws = TrainingDraws(UnlabelledImages(FilePictures(files), two_noisy_views), seed=3)
    views, names, replaced = collate_views([draws[4, position] for position in range(3)])
    assert views.shape == (2, 3, 3, 6, 8)
    assert len(replaced) == 1
    assert "b.png" in replaced[0]
    order = epoch_order(3, 4, 3).tolist()
    for position, index in enumerate(order):
        index = order[(position + 1) % 3] if index == 1 else index
        assert names[position] == str(files[index])
        picture = np.asarray(Image.open(files[index])).transpose(2, 0, 1)
        for view in range(2):
            shift = draw_generator(3, 4, index, view).integers(0, 100)
            np.testing.assert_array_equal(views[view, position], picture + np.uint8(shift))


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((6, 8, 3), dtype=np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    images = UnlabelledImages(FilePictures(list_images(tmp_path)), lambda image, _: torch.from_numpy(image))
    assert images.sample(0, lambda view: draw_generator(0, 0, 0, view))[0].shape == (8, 6, 3)


def test_joined_sources_are_interleaved_each_in_its_own_order(folder: Path, tmp_path: Path) -> None:
    files = list_images(folder)
    one, other = FilePictures(files * 4), FilePictures(files[:2] * 5)
    joined = JoinedPictures([one, other])
    assert len(joined) == 22
    for epoch in range(3):
        order = joined.order(7, epoch)
        assert sorted(order.tolist()) == list(range(22))
        first = order < 12
        np.testing.assert_array_equal(order[first], one.order(7, epoch))
        np.testing.assert_array_equal(order[~first] - 12, other.order(7, epoch))
        assert np.diff(first.astype(int)).astype(bool).sum() > 2
    assert joined.order(7, 0).tolist() != joined.order(7, 1).tolist()
    for index, source, row in ((0, one, 0), (11, one, 11), (12, other, 0), (21, other, 9)):
        assert joined.name(index) == source.name(row)
        assert joined.read(index) == source.read(row)


def test_links_are_followed_but_not_in_circles_and_odd_entries_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").mkdir()
    Image.fromarray(np.zeros((6, 8, 3), dtype=np.uint8)).save(tmp_path / "real" / "a.png")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "d.jpg").mkdir()
    os.mkfifo(tmp_path / "root" / "pipe.jpg")
    assert list_images(tmp_path / "root") == [tmp_path / "root" / "linked" / "a.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refusing(path: str) -> object:  # root, as whom tests may run, can read everything
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="closed: cannot be read: Permission denied"):
        list_images(tmp_path)
