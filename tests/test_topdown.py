from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from poserelay.config import Augmentation
from poserelay.datasets.coco import CocoAnnotations, Detections, read_coco
from poserelay.datasets.sampling import EpochBatches, TrainingDraws, draw_generator, read_image
from poserelay.datasets.topdown import TopDownDataset, collate, collate_draws
from poserelay.errors import UnreadableImage, UserError
from poserelay.keypoints import Skeleton, load_skeleton

SKELETON = Skeleton(
    name="toy",
    joints=("nose", "left_hand", "right_hand", "tail"),
    flip_pairs=(("left_hand", "right_hand"),),
    upper_body=("nose", "left_hand", "right_hand"),
)
SIZE = (128, 96)
STRONG = Augmentation(rotation=30, scale=0.3, rotation_probability=0.7, flip_probability=0.5)


def no_draws(**changes: float) -> Augmentation:
    return Augmentation(
        **{"rotation": 0.0, "scale": 0.0, "rotation_probability": 0.0, "flip_probability": 0.0} | changes
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures on which each labelled joint is a disc of its own colour; in another order than SKELETON's."""
    folder = tmp_path_factory.mktemp("toy")
    colours = {"Right-Hand": (255, 0, 0), "nose": (0, 255, 0), "left hand": (0, 0, 255)}
    images, annotations = [], []
    for number in range(2):
        picture = np.full((160, 200, 3), 20, dtype=np.uint8)
        keypoints: list[float] = []
        for (x, y), colour in zip([(60 + 50 * number, 80), (80, 50), (100, 90)], colours.values(), strict=True):
            cv2.circle(picture, (x, y), 5, colour, -1)
            keypoints += [x, y, 2]
        Image.fromarray(picture).save(folder / f"{number}.png")
        images.append({"id": 40 + number, "file_name": f"{number}.png", "height": 160, "width": 200})
        annotations.append(
            {"id": 90 + number, "image_id": 40 + number, "category_id": 1, "bbox": [50, 40, 70, 60], "area": 1000,
             "keypoints": keypoints}
        )  # fmt: skip
    category = {"id": 1, "name": "toy", "keypoints": list(colours)}
    data = {"images": images, "annotations": annotations, "categories": [category]}
    (folder / "toy.json").write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def annotations(folder: Path) -> CocoAnnotations:
    return read_coco(folder / "toy.json")


def disc_centres(image: np.ndarray, channel: int) -> np.ndarray:
    """Centre of mass of one channel's disc in a crop `[3, H, W]`."""
    weight = np.clip(image[channel].astype(float) - 40, 0, None)
    y, x = np.mgrid[0 : image.shape[1], 0 : image.shape[2]]
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()


@pytest.mark.parametrize("alignment", ["hrnet", "udp"])
def test_joints_follow_the_pixels(folder: Path, annotations: CocoAnnotations, alignment: str) -> None:
    """Whatever is drawn, the labels lie on their discs; after a flip left and right have changed names and places."""
    dataset = TopDownDataset(annotations, folder, SKELETON, SIZE, augmentation=STRONG, alignment=alignment)
    flipped = 0
    for epoch in range(40):
        crop = dataset.sample(1, lambda view, epoch=epoch: draw_generator(0, epoch, 1, view))
        mirrored = np.linalg.det(crop.affine[:, :2]) < 0
        flipped += mirrored
        np.testing.assert_array_equal(crop.visibility, [2, 2, 2, 0])
        channels = {0: 1, 1: 0 if mirrored else 2, 2: 2 if mirrored else 0}
        for joint, channel in channels.items():
            x, y = crop.keypoints[joint]
            if 9 < x < SIZE[1] - 10 and 9 < y < SIZE[0] - 10:
                np.testing.assert_allclose(disc_centres(crop.image, channel), (x, y), atol=0.15)
        np.testing.assert_array_equal(crop.keypoints[3], 0)
    assert 8 < flipped < 32


def test_evaluation_crop_by_hand(folder: Path, annotations: CocoAnnotations) -> None:
    dataset = TopDownDataset(annotations, folder, SKELETON, SIZE, augmentation=STRONG)
    crop = dataset[0]
    # HRNet's clip takes one pixel: 69 x 59 about (84.5, 69.5); at aspect 3/4 the width decides, 69 * 1.25 -> 96.
    np.testing.assert_allclose(crop.box, [50, 40, 69, 59])
    zoom = 96 / (69 * 1.25)
    np.testing.assert_allclose(crop.affine, [[zoom, 0, 48 - zoom * 84.5], [0, zoom, 64 - zoom * 69.5]])
    np.testing.assert_allclose(crop.keypoints[0], [48 + zoom * (80 - 84.5), 64 + zoom * (50 - 69.5)])
    assert (crop.score, crop.area, crop.image_id, crop.annotation_id) == (1.0, 1000.0, 40, 90)
    picture = read_image(folder / "0.png")
    expected = cv2.warpAffine(picture, crop.affine, (96, 128), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    np.testing.assert_array_equal(crop.image, expected.transpose(2, 0, 1))


def test_flipped_crop_is_the_crop_of_the_mirrored_picture(folder: Path, annotations: CocoAnnotations) -> None:
    """HRNet mirrors the whole picture, the joints and the centre, and crops then."""
    dataset = TopDownDataset(annotations, folder, SKELETON, SIZE, augmentation=no_draws(flip_probability=1.0))
    crop = dataset.sample(0, lambda view: draw_generator(0, 0, 0, view))
    plain = dataset[0]
    mirrored_affine = plain.affine.copy()
    mirrored_affine[0, 2] = 48 - plain.affine[0, 0] * (200 - 1 - 84.5)
    mirrored = cv2.warpAffine(np.ascontiguousarray(read_image(folder / "0.png")[:, ::-1]), mirrored_affine, (96, 128))
    # OpenCV rounds the sampling positions to 1/32 pixel, from the other side here.
    assert np.abs(crop.image.astype(int) - mirrored.transpose(2, 0, 1)).mean() < 0.5
    np.testing.assert_allclose(crop.keypoints[0, 0], 96 - plain.keypoints[0, 0])
    np.testing.assert_allclose(crop.keypoints[1, 0], 96 - plain.keypoints[2, 0])


def test_draws_have_hrnets_distribution(folder: Path, annotations: CocoAnnotations) -> None:
    dataset = TopDownDataset(annotations, folder, SKELETON, SIZE, augmentation=STRONG)
    linear = np.stack(
        [dataset.sample(0, lambda view, e=e: draw_generator(1, e, 0, view)).affine[:, :2] for e in range(1500)]
    )
    determinant = np.linalg.det(linear)
    angle = np.rad2deg(np.arctan2(linear[:, 0, 1] * 1.0, linear[:, 1, 1]))
    scale = (96 / (69 * 1.25)) / np.sqrt(np.abs(determinant))
    assert (determinant < 0).mean() == pytest.approx(0.5, abs=0.04)
    turned = np.abs(angle) > 1e-6
    assert turned.mean() == pytest.approx(0.7, abs=0.04)
    generator = np.random.default_rng(0)
    expected = np.clip(generator.standard_normal(100_000) * 30, -60, 60)
    assert angle[turned].std() == pytest.approx(expected.std(), rel=0.07)
    assert np.abs(angle).max() == pytest.approx(60, abs=1e-6)
    expected = np.clip(generator.standard_normal(100_000) * 0.3 + 1, 0.7, 1.3)
    assert scale.mean() == pytest.approx(1, abs=0.02)
    assert scale.std() == pytest.approx(expected.std(), rel=0.07)
    assert (scale.min(), scale.max()) == pytest.approx((0.7, 1.3))


def test_half_body_centres_the_crop_on_the_chosen_joints(folder: Path, annotations: CocoAnnotations) -> None:
    augmentation = no_draws(half_body_probability=1.0, half_body_min_joints=2)
    dataset = TopDownDataset(annotations, folder, SKELETON, SIZE, augmentation=augmentation)
    crop = dataset.sample(0, lambda view: draw_generator(0, 0, 0, view))
    # All three labelled joints are upper-body ones: their mean lands in the centre of the crop.
    np.testing.assert_allclose(crop.keypoints[:3].mean(axis=0), [48, 64])
    # Their extent of 40 x 40 is padded by 1.5; the height decides at aspect 3/4: 40 / (3/4) wide means 60 x 80.
    assert crop.affine[0, 0] == pytest.approx(96 / 60)
    few = TopDownDataset(
        annotations, folder, SKELETON, SIZE, augmentation=no_draws(half_body_probability=1.0, half_body_min_joints=3)
    )
    np.testing.assert_allclose(few.sample(0, lambda view: draw_generator(0, 0, 0, view)).affine, dataset[0].affine)


def test_detections_carry_no_labels(folder: Path, annotations: CocoAnnotations) -> None:
    detections = Detections(np.array([1, 0, 1]), np.array([[0, 0, 300, 300], [5, 6, 7, 8], [1, 2, 3, 4.0]]),
                            np.array([0.5, 0.6, 0.7]), skipped=0)  # fmt: skip
    dataset = TopDownDataset(annotations, folder, SKELETON, SIZE, detections=detections)
    assert len(dataset) == 3
    batch = collate([dataset[0], dataset[1], dataset[2]])
    np.testing.assert_array_equal(batch.boxes, [[0, 0, 300, 300], [5, 6, 7, 8], [1, 2, 3, 4]])  # not clipped
    assert batch.scores.tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert batch.areas.tolist() == [90000, 56, 12]
    assert batch.image_ids == [41, 40, 41]
    assert batch.annotation_ids == [None, None, None]
    assert not batch.visibility.any()


def test_batches_of_a_loader(folder: Path, annotations: CocoAnnotations) -> None:
    dataset = TopDownDataset(annotations, folder, SKELETON, SIZE, augmentation=STRONG)

    def run(workers: int) -> list:
        return list(
            DataLoader(
                TrainingDraws(dataset, 0),
                batch_sampler=EpochBatches(2, 2, 3),
                collate_fn=collate_draws,
                num_workers=workers,
            )
        )

    for one, other in zip(run(0), run(2), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.keypoints, other.keypoints)
        assert one.images.shape == (2, 3, 128, 96)
        assert one.images.dtype == torch.uint8
        assert (one.keypoints.dtype, one.affine.dtype, one.visibility.dtype) == (
            torch.float32,
            torch.float32,
            torch.int64,
        )
        assert one.to("cpu").image_ids == one.image_ids
        assert sorted(one.image_ids) == [40, 41]


def test_rows_choose_the_persons(folder: Path, annotations: CocoAnnotations) -> None:
    dataset = TopDownDataset(annotations, folder, SKELETON, SIZE, rows=np.array([1]))
    assert [crop.annotation_id for crop in (dataset[i] for i in range(len(dataset)))] == [91]
    both = TopDownDataset(annotations, folder, SKELETON, SIZE, rows=np.array([1, 0]))
    assert both.annotation_ids == [90, 91]  # in the file's order
    crowd = dataclasses.replace(annotations, iscrowd=np.array([False, True]))
    assert TopDownDataset(crowd, folder, SKELETON, SIZE, rows=np.array([0, 1])).annotation_ids == [90]
    with pytest.raises(UserError, match=r"toy\.json: no person with a labelled joint among the 1 chosen annotations"):
        TopDownDataset(crowd, folder, SKELETON, SIZE, rows=np.array([1]))


def test_no_joint_in_common(folder: Path, annotations: CocoAnnotations) -> None:
    with pytest.raises(UserError, match=r"toy\.json: its joints .Right-Hand.* none in common with skeleton paws"):
        TopDownDataset(annotations, folder, Skeleton("paws", ("front_paw",)), SIZE)


def test_missing_and_truncated_pictures(folder: Path, annotations: CocoAnnotations, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0\.png: no such picture \(2 of 2 are missing\)"):
        TopDownDataset(annotations, tmp_path, SKELETON, SIZE)
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    (tmp_path / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    dataset = TopDownDataset(annotations, tmp_path, SKELETON, SIZE, augmentation=STRONG)
    with pytest.raises(UnreadableImage, match=r"1\.png"):
        dataset[1]
    draws = TrainingDraws(dataset, 0)
    batch = collate_draws([draws[0, 0], draws[0, 1]])
    assert batch.image_ids == [40, 40]
    assert len(batch.replaced) == 1
    assert "1.png" in batch.replaced[0]


DATA = os.environ.get("POSERELAY_DATA")


@pytest.mark.skipif(not DATA, reason="POSERELAY_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("name", "skeleton", "shared"), [("lspet/val.json", "coco17", 12), ("coco/annotations.json", "coco17", 17)]
)
def test_real_crops(name: str, skeleton: str, shared: int) -> None:
    path = Path(str(DATA), name)
    annotations = read_coco(path)
    dataset = TopDownDataset(annotations, path.parent / "images", load_skeleton(skeleton), (256, 192))
    assert len(dataset) == len(annotations.persons)
    crops = collate([dataset[index] for index in range(0, len(dataset), 60)])
    assert (crops.visibility.numpy().any(axis=0)).sum() == shared
    # The box of a person holds nearly all of its joints, so its crop does.
    inside = (crops.keypoints >= 0) & (crops.keypoints < torch.tensor([192, 256]))
    labelled = crops.visibility > 0
    assert inside.all(dim=-1)[labelled].float().mean() > 0.98
    # And through the affine they return to where they were annotated.
    row = annotations.persons[60]
    columns = [annotations.joints.index(joint) for joint in ("left_hip", "right_knee")]
    places = load_skeleton(skeleton).indices(["left_hip", "right_knee"])
    back = np.linalg.solve(crops.affine[1, :, :2], crops.keypoints[1, list(places)].T - crops.affine[1, :, 2:]).T
    kept = annotations.visibility[row, columns] > 0
    np.testing.assert_allclose(back[kept], annotations.keypoints[row, columns][kept], atol=1e-2)
