"""Whole images: crops to train on, whose labels follow the pixels, and pyramids to find persons in."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from poserelay.batch import ImageBatch
from poserelay.config import ImageAugmentation
from poserelay.datasets import fullimage
from poserelay.datasets.coco import CocoAnnotations, read_coco
from poserelay.datasets.fullimage import (
    FullImageDataset,
    ImageRecord,
    PyramidDataset,
    collate_image_draws,
    collate_images,
    collate_pyramids,
    pyramid,
)
from poserelay.datasets.sampling import TrainingDraws, draw_generator
from poserelay.errors import UnreadableImage, UserError
from poserelay.geometry import apply_affine
from poserelay.keypoints import Skeleton

SKELETON = Skeleton(
    name="toy", joints=("nose", "left_hand", "right_hand", "tail"), flip_pairs=(("left_hand", "right_hand"),)
)
SIZE = 128
COLOURS = {"Right-Hand": (255, 0, 0), "nose": (0, 255, 0), "left hand": (0, 0, 255)}
PERSONS = [[(50, 60), (75, 40), (95, 70)], [(130, 100), (150, 120), (115, 130)]]
STILL = ImageAugmentation(rotation=0, scale=(1, 1), shift=0, flip_probability=0, jitter=(0, 0, 0, 0))
STRONG = ImageAugmentation(rotation=40, scale=(0.8, 1.4), shift=20, flip_probability=0.5, jitter=(0, 0, 0, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of 200 x 160 on which each labelled joint is a disc of its own colour, and one with nobody."""
    folder = tmp_path_factory.mktemp("whole")
    images, annotations = [], []

    def annotate(image: int, box: list[float], joints: list[tuple[int, int]], **more: Any) -> None:
        keypoints = [number for joint in joints for number in (*joint, 2)] or [0] * 9
        annotations.append(
            {"id": 90 + len(annotations), "image_id": image, "category_id": 1, "bbox": box, "area": 1000.0}
            | {"keypoints": keypoints, "num_keypoints": len(joints), "iscrowd": 0, **more}
        )

    for number in range(3):
        picture = np.full((160, 200, 3), 20, dtype=np.uint8)
        for joints in PERSONS[: 2 - number]:
            for joint, colour in zip(joints, COLOURS.values(), strict=True):
                cv2.circle(picture, joint, 4, colour, -1)
            annotate(40 + number, [40, 30, 70, 60], joints)
        Image.fromarray(picture).save(folder / f"{number}.png")
        images.append({"id": 40 + number, "file_name": f"{number}.png", "height": 160, "width": 200})
    annotate(40, [10, 100, 30, 50], [])  # no joints
    annotate(40, [150, 5, 40, 30], [(155, 8), (160, 10), (170, 20)], iscrowd=1)
    annotate(42, [1, 2, 3, 4], [])
    category = {"id": 1, "name": "toy", "keypoints": list(COLOURS)}
    data = {"images": images, "annotations": annotations, "categories": [category]}
    (folder / "toy.json").write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def labels(folder: Path) -> CocoAnnotations:
    return read_coco(folder / "toy.json")


def drawn(dataset: FullImageDataset, index: int, epoch: int, seed: int = 0) -> ImageRecord:
    return dataset.sample(index, partial(draw_generator, seed, epoch, index))


def disc_centre(image: np.ndarray, channel: int, near: np.ndarray) -> np.ndarray:
    """Centre of mass of the disc about a place of a crop `[3, H, W]`."""
    weight = np.clip(image[channel].astype(float) - 40, 0, None)
    y, x = np.mgrid[0 : image.shape[1], 0 : image.shape[2]]
    weight[(x - near[0]) ** 2 + (y - near[1]) ** 2 > 81] = 0
    return np.array([(x * weight).sum(), (y * weight).sum()]) / max(weight.sum(), 1)


def test_joints_follow_the_pixels(folder: Path, labels: CocoAnnotations) -> None:
    """Whatever is drawn, every person's labels lie on their discs; after a flip the hands have changed names."""
    dataset = FullImageDataset(labels, folder, SKELETON, SIZE, augmentation=STRONG)
    flipped = checked = 0
    for epoch in range(30):
        record = drawn(dataset, 0, epoch)
        assert record.image.shape == (3, SIZE, SIZE)
        assert record.visibility.tolist() == [[2, 2, 2, 0]] * 2
        mirrored = np.linalg.det(record.affine[:, :2]) < 0
        flipped += mirrored
        for joints in record.keypoints:
            for joint, channel in {0: 1, 1: 0 if mirrored else 2, 2: 2 if mirrored else 0}.items():
                if ((joints[joint] > 7) & (joints[joint] < SIZE - 8)).all():
                    found = disc_centre(record.image, channel, joints[joint])
                    np.testing.assert_allclose(found, joints[joint], atol=0.2)
                    checked += 1
            assert not joints[3].any()
        # The affine says the same of the stored picture, in the file's order: right hand, nose, left hand.
        order = [1, 0, 2] if mirrored else [1, 2, 0]
        np.testing.assert_allclose(record.keypoints[:, :3], apply_affine(record.affine, PERSONS)[:, order])
        np.testing.assert_allclose(record.areas, 1000 * abs(np.linalg.det(record.affine[:, :2])))
    assert 8 < flipped < 22
    assert checked > 100


def test_draws_are_the_papers(folder: Path, labels: CocoAnnotations) -> None:
    """Uniform in [-30, 30] degrees, [0.75, 1.5] and [-40, 40] pixels, mirrored half of the time; jitter on top."""
    dataset = FullImageDataset(labels, folder, SKELETON, SIZE, augmentation=ImageAugmentation())
    plain = dataset[0].affine
    zoom = SIZE / 160
    np.testing.assert_allclose(plain, [[zoom, 0, 64 - zoom * 100], [0, zoom, 64 - zoom * 80]])
    affines = np.stack([drawn(dataset, 0, epoch).affine for epoch in range(400)])
    linear = affines[:, :, :2]
    determinant = np.linalg.det(linear)
    turn = np.rad2deg(np.arctan2(linear[:, 0, 1], linear[:, 1, 1]))
    scale = zoom / np.sqrt(np.abs(determinant))
    shift = apply_affine(affines, np.array([[100.0, 80.0]]))[:, 0] - 64
    assert (determinant < 0).mean() == pytest.approx(0.5, abs=0.1)
    for values, low, high in [(turn, -30, 30), (scale, 0.75, 1.5), (shift[:, 0], -40, 40), (shift[:, 1], -40, 40)]:
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high
        np.testing.assert_allclose(np.quantile(values, (0.25, 0.5, 0.75)), low + (high - low) * np.arange(1, 4) / 4,
                                   atol=0.08 * (high - low))  # fmt: skip


def test_jitter_changes_colours_and_nothing_else(folder: Path, labels: CocoAnnotations) -> None:
    still, coloured = (
        drawn(FullImageDataset(labels, folder, SKELETON, SIZE, augmentation=augmentation), 0, 3)
        for augmentation in (STRONG, ImageAugmentation(40, (0.8, 1.4), 20, 0.5, (0.4, 0.4, 0.4, 0.1)))
    )
    np.testing.assert_array_equal(still.affine, coloured.affine)
    np.testing.assert_array_equal(still.keypoints, coloured.keypoints)
    assert np.abs(still.image.astype(int) - coloured.image).mean() > 2
    # Places of one colour keep one colour.
    same = (still.image == 20).all(0)
    assert same.sum() > 1000
    assert np.ptp(coloured.image[:, same], axis=1).max() == 0


def test_jitter_comes_in_every_order_and_within_its_strengths(
    folder: Path, labels: CocoAnnotations, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[tuple[str, float], ...]] = []

    def remember(view: np.ndarray, jitter: tuple[tuple[str, float], ...], **_: Any) -> np.ndarray:
        seen.append(jitter)
        return view

    monkeypatch.setattr(fullimage, "jitter_colour", remember)
    augmentation = ImageAugmentation(jitter=(0.4, 0.0, 0.3, 0.1))
    dataset = FullImageDataset(labels, folder, SKELETON, SIZE, augmentation=augmentation)
    for epoch in range(120):
        drawn(dataset, 0, epoch)
    assert len({tuple(name for name, _ in jitter) for jitter in seen}) == 6  # of three, contrast being off
    for name, low, high in (("brightness", 0.6, 1.4), ("saturation", 0.7, 1.3), ("hue", -0.1, 0.1)):
        factors = [dict(jitter)[name] for jitter in seen]
        assert low <= min(factors) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(factors) <= high


@pytest.mark.parametrize(("height", "width"), [(1, 1), (40, 33), (2, 3000), (3000, 8)])
def test_crops_of_tiny_and_endless_images(tmp_path: Path, height: int, width: int) -> None:
    Image.new("RGB", (width, height), (200, 200, 200)).save(tmp_path / "a.png")
    person = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, width, height], "area": height * width}
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": height, "width": width}],
        "annotations": [person | {"keypoints": [width / 2, height / 2, 2], "num_keypoints": 1, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "toy", "keypoints": ["nose"]}],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    dataset = FullImageDataset(read_coco(tmp_path / "a.json"), tmp_path, SKELETON, SIZE, augmentation=STRONG)
    record = drawn(dataset, 0, 1)
    assert record.image.shape == (3, SIZE, SIZE)
    assert record.image.max() > 100
    assert np.abs(record.keypoints[0, 0] - SIZE / 2).max() <= 20  # the middle of the image, shifted
    assert np.isfinite(record.areas).all()


def test_draws_depend_on_seed_epoch_and_index_alone(folder: Path, labels: CocoAnnotations) -> None:
    first, second = (
        FullImageDataset(labels, folder, SKELETON, SIZE, augmentation=ImageAugmentation()) for _ in range(2)
    )
    there = {(index, epoch): drawn(first, index, epoch) for epoch in range(2) for index in range(2)}
    for (index, epoch), record in reversed(there.items()):
        again = drawn(second, index, epoch)
        for field in ("image", "keypoints", "areas", "affine"):
            np.testing.assert_array_equal(getattr(again, field), getattr(record, field))
    affines = [record.affine for record in there.values()] + [drawn(first, 0, 0, seed=1).affine]
    assert len({affine.tobytes() for affine in affines}) == 5
    assert sorted(first.order(0, 1)) == [0, 1]


def test_without_draws_the_middle_of_the_image_is_seen(folder: Path, labels: CocoAnnotations) -> None:
    expected = FullImageDataset(labels, folder, SKELETON, SIZE)[1]
    for augmentation in (None, STILL):
        record = drawn(FullImageDataset(labels, folder, SKELETON, SIZE, augmentation=augmentation), 1, 5)
        np.testing.assert_array_equal(record.image, expected.image)
        np.testing.assert_array_equal(record.keypoints, expected.keypoints)


def test_who_is_no_person_is_a_region(folder: Path, labels: CocoAnnotations) -> None:
    """Crowds, boxes without joints and persons whose labels are not used; an image of such alone is not taken."""
    everyone = FullImageDataset(labels, folder, SKELETON, SIZE)
    assert len(everyone) == 2
    assert everyone.regions == 2
    record = everyone[0]
    assert record.keypoints.shape == (2, 4, 2)
    np.testing.assert_array_equal(record.regions, [[10, 100, 30, 50], [150, 5, 40, 30]])
    assert everyone[1].regions.shape == (0, 4)
    # The first person of the first image alone, and a crowd, which cannot be chosen.
    chosen = FullImageDataset(labels, folder, SKELETON, SIZE, rows=np.array([0, 4]))
    assert len(chosen) == 1
    record = chosen[0]
    np.testing.assert_array_equal(record.keypoints, everyone[0].keypoints[:1])
    np.testing.assert_array_equal(record.regions, [[40, 30, 70, 60], [10, 100, 30, 50], [150, 5, 40, 30]])
    assert (chosen.regions, record.image_id) == (3, 40)


def test_a_person_without_a_joint_of_the_skeleton_is_a_region(folder: Path, labels: CocoAnnotations) -> None:
    """Its labels say nothing to this model."""
    data = json.loads((folder / "toy.json").read_text())
    data["annotations"][0]["keypoints"][3:] = [0] * 6  # the right hand alone
    (folder / "hand.json").write_text(json.dumps(data))
    skeleton = Skeleton(name="two", joints=("nose", "left_hand"))
    record = FullImageDataset(read_coco(folder / "hand.json"), folder, skeleton, SIZE)[0]
    assert record.keypoints.shape == (1, 2, 2)
    assert record.regions.tolist() == [[40, 30, 70, 60], [10, 100, 30, 50], [150, 5, 40, 30]]


def test_nobody_to_learn_is_the_users_mistake(folder: Path, labels: CocoAnnotations) -> None:
    with pytest.raises(UserError, match=r"toy\.json: no person with a labelled joint"):
        FullImageDataset(labels, folder, SKELETON, SIZE, rows=np.array([4]))
    with pytest.raises(UserError, match="none in common"):
        FullImageDataset(labels, folder, Skeleton(name="x", joints=("wing",)), SIZE)
    with pytest.raises(UserError, match="elsewhere"):
        FullImageDataset(labels, folder / "elsewhere", SKELETON, SIZE)


def test_batches_fill_up_with_empty_slots(folder: Path, labels: CocoAnnotations) -> None:
    dataset = FullImageDataset(labels, folder, SKELETON, SIZE)
    batch = collate_images([dataset[0], dataset[1]])
    assert (len(batch), batch.images.shape) == (2, (2, 3, SIZE, SIZE))
    assert batch.keypoints.shape == (2, 2, 4, 2)
    np.testing.assert_array_equal(batch.visibility, [[[2, 2, 2, 0]] * 2, [[2, 2, 2, 0], [0] * 4]])
    np.testing.assert_allclose(batch.areas, [[640, 640], [640, 0]])  # 1000 (128 / 160)^2
    assert not batch.keypoints[1, 1].any()
    np.testing.assert_array_equal(batch.regions, [[[10, 100, 30, 50], [150, 5, 40, 30]], [[0] * 4] * 2])
    np.testing.assert_allclose(batch.affine, [dataset[0].affine, dataset[1].affine], rtol=1e-6)
    assert batch.image_ids == [40, 41]
    alone: ImageBatch = collate_images([dataset[1]])
    assert alone.keypoints.shape == (1, 1, 4, 2)
    assert alone.regions.shape == (1, 1, 4)  # never none, so that nothing is reduced over nothing
    assert batch.to("meta").regions.device.type == "meta"


def test_an_unreadable_image_is_replaced_and_told_of(folder: Path, tmp_path: Path) -> None:
    """Also one of another size than the file says, whose labels would be elsewhere."""
    for name in ("0.png", "1.png", "2.png", "toy.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    Image.new("RGB", (160, 200)).save(tmp_path / "0.png")
    dataset = FullImageDataset(read_coco(tmp_path / "toy.json"), tmp_path, SKELETON, SIZE, augmentation=STRONG)
    with pytest.raises(UnreadableImage, match="160 x 200"):
        dataset[0]
    draws = TrainingDraws(dataset, 0)
    batch = collate_image_draws([draws[0, 0], draws[0, 1]])
    assert batch.image_ids == [41, 41]
    (message,) = batch.replaced
    assert "0.png" in message


# Pyramids.


def blob(picture: np.ndarray) -> np.ndarray:
    """Centre of mass of the bright pixels of a level `[3, h, w]`."""
    weight = picture[0].astype(float)
    y, x = np.mgrid[0 : picture.shape[1], 0 : picture.shape[2]]
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()


@pytest.mark.parametrize(("height", "width"), [(90, 120), (333, 250), (64, 64), (700, 900), (40, 31), (30, 118)])
def test_pyramid_has_the_short_side_and_says_where_pixels_went(height: int, width: int) -> None:
    """A soft dot is painted at a place between pixels and found again where the affine says."""
    at = np.array([0.6 * width, 0.3 * height])
    y, x = np.mgrid[:height, :width]
    spread = max(1.5, min(height, width) / 64)
    dot = 255 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * spread**2))
    scales = (1.0, 0.5, 2.0)
    record = pyramid(np.repeat(dot[..., None], 3, 2).astype(np.uint8), 128, scales, 7)
    assert (record.size, record.image_id) == ((height, width), 7)
    for level, affine, scale in zip(record.images, record.affine, scales, strict=True):
        sides = [round(128 * scale * side / min(height, width)) for side in (height, width)]
        assert min(sides) == 128 * scale
        assert level.shape == (3, *(-(-side // 32) * 32 for side in sides))
        assert not level[:, sides[0] :].any()
        assert not level[:, :, sides[1] :].any()
        np.testing.assert_allclose(blob(level), apply_affine(affine, at[None])[0], atol=0.5)
        # The borders of the image, half a pixel beyond its last pixels, are the borders of the level.
        corners = apply_affine(affine, np.array([[-0.5, -0.5], [width - 0.5, height - 0.5]]))
        np.testing.assert_allclose(corners, [[-0.5, -0.5], [sides[1] - 0.5, sides[0] - 0.5]], atol=1e-9)


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        ((1, 1), (64, 64)),
        ((3, 5), (64, 107)),
        ((40, 10), (256, 64)),  # as long as allowed
        ((10, 400), (6, 256)),
        ((5000, 1), (256, 1)),
        ((1, 60_000), (1, 256)),
    ],
)
def test_pyramid_of_a_tiny_or_endless_image(size: tuple[int, int], levels: tuple[int, int]) -> None:
    """Small ones are enlarged; beyond four times the short side the long side rules, so that memory is bounded."""
    (level,) = pyramid(np.full((*size, 3), 200, dtype=np.uint8), 64, (1.0,), 0).images
    assert level.shape == (3, *(-(-side // 32) * 32 for side in levels))
    seen = level[0] == 200
    assert seen[: levels[0], : levels[1]].all()
    assert seen.sum() == levels[0] * levels[1]


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(80, 100, 1.6), (64, 96, 1.0), (150, 200, 0.64), (300, 400, 0.32)]
)
def test_the_mirrored_image_has_the_mirrored_pyramid(height: int, width: int, scale: float) -> None:
    """Where the width is a multiple of the padding."""
    assert round(width * scale) % 32 == 0
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    picture = cv2.GaussianBlur(picture, (0, 0), 1.0)
    size = round(min(height, width) * scale)
    plain, mirrored = (pyramid(view, size, (1.0, 2.0), 0) for view in (picture, picture[:, ::-1]))
    for level, other in zip(plain.images, mirrored.images, strict=True):
        assert np.abs(level.astype(int) - other[..., ::-1]).max() <= 1  # OpenCV's rounding
    np.testing.assert_array_equal(plain.affine, mirrored.affine)


def test_pyramids_come_shape_by_shape_and_are_padded_together(folder: Path, tmp_path: Path) -> None:
    shapes = [(60, 80), (90, 30), (80, 60), (60, 80)]
    images = []
    for number, (height, width) in enumerate(shapes):
        Image.new("RGB", (width, height), (9, 9, 9)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    category = {"id": 1, "name": "toy", "keypoints": ["nose"]}
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [], "categories": [category]}))
    dataset = PyramidDataset(read_coco(tmp_path / "a.json"), tmp_path, 64, (1.0, 0.5))
    records = [dataset[index] for index in range(len(dataset))]
    assert [record.image_id for record in records] == [1, 2, 0, 3]
    batch = collate_pyramids(records[:3])
    assert [tuple(level.shape) for level in batch.images] == [(3, 3, 192, 96), (3, 3, 96, 64)]
    for row, record in enumerate(records[:3]):
        for level, affine, own, own_affine in zip(
            batch.images, batch.affine, record.images, record.affine, strict=True
        ):
            height, width = own.shape[1:]
            np.testing.assert_array_equal(level[row, :, :height, :width], own)
            assert level[row].long().sum() == own.astype(int).sum()
            np.testing.assert_array_equal(affine[row], own_affine)
    assert batch.sizes.tolist() == [[90, 30], [80, 60], [60, 80]]
    with pytest.raises(UserError, match="elsewhere"):
        PyramidDataset(read_coco(tmp_path / "a.json"), tmp_path / "elsewhere", 64, (1.0,))
