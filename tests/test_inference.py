from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from poserelay.config import Decoding, InputConfig
from poserelay.datasets.coco import Detections, read_coco
from poserelay.datasets.topdown import TopDownDataset, collate
from poserelay.errors import CheckFailed, UnreadableImage, UserError
from poserelay.geometry import apply_affine, box_to_affine
from poserelay.inference import (
    Poses,
    flip_shift,
    predict_crops,
    predict_dataset,
    predict_images,
    predict_poses,
    protocol,
    rescore,
    suppress,
    to_results,
)
from poserelay.keypoints import Skeleton
from poserelay.scoring import coco_ap

STRIDE = 4
SKELETON = Skeleton(name="blobs", joints=("red", "green", "blue"), sigmas=(0.1, 0.1, 0.1))
PLAIN = Decoding(refine="parabola", flip=False)


class ColourModel(nn.Module):
    """Stands in for a trained network: joint k is the brightest place of colour channel k, x_heatmap = x_input / 4."""

    def __init__(self, alignment: Any = "hrnet", gain: float = 1.0) -> None:
        super().__init__()
        self.skeleton = SKELETON
        self.refiner = None
        self.input = InputConfig(height=96, width=64, alignment=alignment)
        self.gain = nn.Parameter(torch.tensor(gain))

    def preprocess(self, images: Tensor) -> Tensor:
        return images.float() / 255

    def forward(self, images: Tensor) -> Tensor:
        if self.input.alignment == "udp":
            size = (images.shape[-2] // STRIDE, images.shape[-1] // STRIDE)
            return self.gain * nn.functional.interpolate(images, size, mode="bilinear", align_corners=True)
        return self.gain * images[..., ::STRIDE, ::STRIDE]


def picture(size: tuple[int, int], *persons: np.ndarray, sigma: float = 8.0) -> np.ndarray:
    """RGB uint8 with a Gaussian blob of colour k at joint k of every person `[3, 2]`."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.zeros((*size, 3))
    for joints in persons:
        for channel, (jx, jy) in enumerate(joints):
            blob = 255 * np.exp(-((x - jx) ** 2 + (y - jy) ** 2) / (2 * sigma**2))
            image[..., channel] = np.maximum(image[..., channel], blob)
    return np.rint(image).astype(np.uint8)


FIRST = np.array([[60.0, 50.0], [80.5, 70.0], [66.0, 95.25]])
SECOND = FIRST[::-1] + np.array([100.0, 20.0])
BOXES = np.array([[40.0, 30.0, 60.0, 90.0], [140.0, 50.0, 60.0, 90.0]])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two pictures: one with both persons, one with the first alone; the file lists the joints in another order."""
    cv2.imwrite(str(tmp_path / "a.png"), picture((180, 240), FIRST, SECOND)[..., ::-1])
    cv2.imwrite(str(tmp_path / "b.png"), picture((180, 240), FIRST)[..., ::-1])
    annotations = [
        {"id": 5 + n, "image_id": image, "category_id": 3, "bbox": BOXES[box].tolist(), "area": 4000.0, "iscrowd": 0}
        | {"keypoints": np.column_stack([joints, [2, 2, 2]])[[2, 0, 1]].ravel().tolist()}
        for n, (image, box, joints) in enumerate([(11, 0, FIRST), (11, 1, SECOND), (12, 0, FIRST)])
    ]
    images = [
        {"id": 11 + n, "file_name": name, "height": 180, "width": 240} for n, name in enumerate(["a.png", "b.png"])
    ]
    category = {"id": 3, "name": "blobs", "keypoints": ["blue", "red", "green"], "skeleton": []}
    (tmp_path / "val.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [category]})
    )
    return tmp_path


def dataset(files: Path, model: ColourModel, detections: Detections | None = None) -> TopDownDataset:
    return TopDownDataset(
        read_coco(files / "val.json"),
        files,
        SKELETON,
        (model.input.height, model.input.width),
        detections=detections,
        alignment=model.input.alignment,
    )


@pytest.mark.parametrize("alignment", ["hrnet", "udp"])
@pytest.mark.parametrize("flip", [False, True])
def test_joints_come_back_in_image_pixels(files: Path, alignment: str, flip: bool) -> None:
    """Through crop, heatmap and back; with the exact shift the flip test moves nothing, for either alignment."""
    model = ColourModel(alignment)
    data = dataset(files, model)
    batch = collate([data[0], data[1]])
    keypoints, scores, verification = predict_crops(model, batch, Decoding(refine="parabola", flip=flip))
    assert keypoints.shape == (2, 3, 2)
    assert verification is None
    heatmap_pixel = 75 * 1.25 / (64 / STRIDE)  # in image pixels: the box is 90 high, so 60 wide x 1.25
    np.testing.assert_allclose(keypoints.numpy(), [FIRST, SECOND], atol=0.1 * heatmap_pixel)
    assert scores.min() > 0.8


def test_another_flip_shift_moves_joints_by_half_of_the_difference(files: Path) -> None:
    model = ColourModel()
    batch = collate([dataset(files, model)[0]])
    exact = predict_crops(model, batch, Decoding(refine="parabola")).keypoints
    early = predict_crops(model, batch, Decoding(refine="parabola", flip_shift=0.25)).keypoints
    heatmap_pixel = STRIDE / batch.affine[0, 0, 0]
    moved = (exact - early)[0] / heatmap_pixel
    np.testing.assert_allclose(moved[:, 0], 0.25, atol=0.06)  # the mean of the two pictures' maps, half a pixel apart
    np.testing.assert_allclose(moved[:, 1], 0.0, atol=0.03)


def test_flip_test_exchanges_paired_joints(files: Path) -> None:
    """The stand-in calls a colour by its name also in the mirror, so paired joints must mix with each other's maps."""
    model = ColourModel()
    model.skeleton = Skeleton(name="paired", joints=SKELETON.joints, flip_pairs=(("red", "green"),))
    batch = collate([dataset(files, model)[0]])
    scores = predict_crops(model, batch, Decoding()).scores
    assert (scores[0, :2] < 0.7).all()
    assert scores[0, 2] > 0.8


def test_default_flip_shift_is_the_exact_one() -> None:
    assert flip_shift(Decoding(), "hrnet", 4) == 0.75
    assert flip_shift(Decoding(), "udp", 4) == 0.0
    assert flip_shift(Decoding(flip_shift=1.0), "hrnet", 4) == 1.0


def test_results_are_in_the_joints_of_the_file_and_score_full_marks(files: Path) -> None:
    model = ColourModel()
    results = predict_dataset(model, dataset(files, model), Decoding(refine="parabola"), batch_size=2)
    assert [record["image_id"] for record in results] == [11, 11, 12]
    assert {record["category_id"] for record in results} == {3}
    np.testing.assert_allclose(np.reshape(results[0]["keypoints"], (3, 3))[:, :2], FIRST[[2, 0, 1]], atol=0.6)
    assert coco_ap(files / "val.json", results, SKELETON)["AP"] == pytest.approx(1.0)


def test_workers_and_batch_size_change_nothing(files: Path) -> None:
    model = ColourModel()
    one = predict_dataset(model, dataset(files, model), PLAIN, batch_size=1)
    assert predict_dataset(model, dataset(files, model), PLAIN, batch_size=3, workers=2) == one


def test_a_doubled_detection_is_suppressed_in_its_image_only(files: Path) -> None:
    model = ColourModel()
    detections = Detections(
        image_index=np.array([0, 0, 0, 1]),
        boxes=BOXES[[0, 0, 1, 0]],
        scores=np.array([0.5, 0.9, 0.8, 0.4]),
        skipped=0,
    )
    data = dataset(files, model, detections)
    results = predict_dataset(model, data, PLAIN)
    assert [record["image_id"] for record in results] == [11, 11, 12]
    joint_scores = [np.reshape(record["keypoints"], (3, 3))[:, 2] for record in results]
    expected = [box * scores.mean() for box, scores in zip([0.9, 0.8, 0.4], joint_scores, strict=True)]
    np.testing.assert_allclose([record["score"] for record in results], expected, rtol=1e-6)
    assert len(predict_dataset(model, data, Decoding(flip=False, nms_threshold=1.0))) == 4


def test_padded_box_is_the_area_of_oks_nms(files: Path) -> None:
    model = ColourModel()
    poses = predict_poses(model, dataset(files, model), PLAIN)
    # HRNet clips an inclusive corner: 59 x 89, widened to the input's 2:3 and padded by 1.25.
    np.testing.assert_allclose(poses.areas, (1.25 * 89) ** 2 * 2 / 3, rtol=1e-5)
    assert poses.annotation_ids == [5, 6, 7]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_stops_the_evaluation_by_name(files: Path, workers: int) -> None:
    model = ColourModel()
    data = dataset(files, model)
    (files / "b.png").write_bytes((files / "b.png").read_bytes()[:200])
    message = ""
    try:  # pytest.raises would keep the loader in a reference cycle, whose collection waits 5 s for the workers
        predict_dataset(model, data, PLAIN, batch_size=1, workers=workers)
    except UnreadableImage as error:
        message = str(error)
    assert "b.png" in message
    assert "Traceback" not in message


def test_heatmaps_that_are_not_finite_stop_the_evaluation(files: Path) -> None:
    model = ColourModel(gain=float("nan"))
    with pytest.raises(CheckFailed, match="NaN or infinity"):
        predict_dataset(model, dataset(files, model), PLAIN)


def test_joints_that_the_model_lacks_are_named(files: Path) -> None:
    model = ColourModel()
    data = dataset(files, model)
    model.skeleton = Skeleton(name="half", joints=("red", "green"))
    with pytest.raises(UserError, match="skeleton 'half' lacks blue"):
        predict_dataset(model, data, PLAIN)


def test_protocol_tells_how_the_numbers_were_made(files: Path) -> None:
    data = dataset(files, ColourModel())
    stated = protocol(data, Decoding(flip_shift=0.8), "folder/detections.json")
    assert stated["split"] == "val"
    assert stated["boxes"] == "detections.json"
    assert (stated["flip"], stated["flip_shift"], stated["decode"]) == (True, 0.8, "quarter")
    assert (stated["rescoring"], stated["nms"], stated["instances"]) == (0.2, 0.9, 3)
    assert json.loads(json.dumps(stated)) == stated


def test_whole_images_give_one_pose_per_box_in_order(files: Path) -> None:
    model = ColourModel()
    image = picture((180, 240), FIRST, SECOND)
    boxes = [BOXES[[1, 0, 0]], [], np.zeros((0, 4)), BOXES[:1]]
    results = predict_images(model, [image, image, image, files / "b.png"], boxes, PLAIN, batch_size=2)
    assert [record["image_id"] for record in results] == [0, 0, 0, 3]
    assert [record["bbox"] for record in results] == BOXES[[1, 0, 0, 0]].tolist()
    found = np.array([record["keypoints"] for record in results]).reshape(4, 3, 3)[..., :2]
    np.testing.assert_allclose(found, [SECOND, FIRST, FIRST, FIRST], atol=0.6)


@pytest.mark.parametrize(
    ("images", "boxes", "message"),
    [
        ([np.zeros((8, 8, 3), np.uint8)], [], "1 images, but boxes for 0"),
        ([np.zeros((8, 8), np.uint8)], [BOXES], r"image 0: uint8 \[8, 8\]"),
        ([np.zeros((8, 8, 3))], [BOXES], "image 0: float64"),
        ([np.zeros((8, 8, 3), np.uint8)], [BOXES[0]], "boxes of image 0"),
        ([np.zeros((8, 8, 3), np.uint8)], [np.zeros((1, 4))], "boxes of image 0"),
    ],
)
def test_images_and_boxes_of_the_wrong_shape(images: list[np.ndarray], boxes: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_images(ColourModel(), images, boxes)


def test_rescoring_equals_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    boxes, joints = rng.uniform(0, 1, 50), rng.uniform(-0.2, 0.6, (50, 5))
    joints[0] = 0.1  # none above
    expected = []
    for box, scores in zip(boxes, joints, strict=True):
        above = [score for score in scores if score > 0.2]
        expected.append(box * sum(above) / len(above) if above else 0.0)
    np.testing.assert_allclose(rescore(boxes, joints, 0.2), expected)


def test_suppression_keeps_the_order_and_the_best_of_each_cluster() -> None:
    keypoints = np.zeros((5, 3, 2)) + np.array([0.0, 500.0, 0.5, 0.0, 0.2])[:, None, None]
    poses = Poses(
        keypoints=keypoints,
        joint_scores=np.ones((5, 3)),
        scores=np.array([0.3, 0.2, 0.9, 0.1, 0.5]),
        boxes=np.zeros((5, 4)),
        areas=np.full(5, 1e4),
        image_ids=[1, 1, 1, 2, 1],
        annotation_ids=[None] * 5,
    )
    kept = suppress(poses, SKELETON.sigmas, Decoding())
    assert kept.keypoints[:, 0, 0].tolist() == [500.0, 0.5, 0.0]
    assert [record["score"] for record in to_results(kept, 1)] == [0.2, 0.9, 0.1]
    assert suppress(poses.take(np.array([], dtype=int)), SKELETON.sigmas, Decoding()).image_ids == []


@pytest.mark.parametrize(
    ("method", "places", "scores"),
    [
        ("hard", [500.0, 0.0, 0.0], [0.2, 0.9, 0.1]),
        ("fuse", [500.0, 1 / 3, 0.0], [0.2, 0.9, 0.1]),
        ("soft", [0.0, 500.0, 0.0, 0.0, 1.0], [0.3 * math.exp(-2), 0.2, 0.9, 0.1, 0.5 * math.exp(-1)]),
    ],
)
def test_suppression_by_hand(method: Any, places: list[float], scores: list[float]) -> None:
    """OKS is 1 among the poses of image 7, whose areas are vast, and 0 between those of image 3 among them."""
    poses = Poses(
        keypoints=np.zeros((5, 3, 2)) + np.array([0.0, 500.0, 0.0, 0.0, 1.0])[:, None, None],
        joint_scores=np.ones((5, 3)),
        scores=np.array([0.3, 0.2, 0.9, 0.1, 0.5]),
        boxes=np.arange(20.0).reshape(5, 4),
        areas=np.array([1e12, 1.0, 1e12, 1.0, 1e12]),
        image_ids=[7, 3, 7, 3, 7],
        annotation_ids=[0, 1, 2, 3, 4],
    )
    kept = suppress(poses, SKELETON.sigmas, Decoding(nms=method, nms_threshold=1.0 if method == "soft" else 0.9))
    np.testing.assert_allclose(kept.keypoints, np.zeros((len(places), 3, 2)) + np.reshape(places, (-1, 1, 1)))
    np.testing.assert_allclose(kept.scores, scores)
    assert kept.annotation_ids == ([0, 1, 2, 3, 4] if method == "soft" else [1, 2, 3])
    assert kept.image_ids == [poses.image_ids[row or 0] for row in kept.annotation_ids]
    assert poses.scores.tolist() == [0.3, 0.2, 0.9, 0.1, 0.5]
    assert poses.keypoints[2].max() == 0


def test_padding_matches_the_dataset() -> None:
    """predict_images and TopDownDataset crop alike: same padding, alignment and interpolation."""
    model = ColourModel()
    affine = box_to_affine(BOXES[0], (96, 64))
    corner = apply_affine(affine, [[70.0, 75.0]])
    np.testing.assert_allclose(corner, [[32.0, 48.0]])
    results = predict_images(model, [picture((180, 240), FIRST)], [BOXES[:1]], PLAIN)
    assert results[0]["score"] > 0.8


def test_one_path_in_place_of_a_list_is_told() -> None:
    with pytest.raises(ValueError, match="give a list of pictures"):
        predict_images(ColourModel(), "picture.jpg", [np.array([[0.0, 0.0, 5.0, 5.0]])])
