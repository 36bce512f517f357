"""Whole images to poses, with a model that is ideal: it tells from the colours of what it is shown where that lies.

Red - green rises with x of the image and red + green - 2 blue with y (whatever resizing adds to all colours cancels);
red + green + 2 blue is the number of the scene, whose poses the model knows. So it works at every scale and place
alike, and of a mirrored image, on which red - green falls to the right, it says what a true model would: the mirrored
poses, left and right exchanged. It is never told which view it sees.
"""

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
from torch.nn import functional

from poserelay.batch import PyramidBatch
from poserelay.config import Decoding, InputConfig, ModelConfig, Named, WholeImages
from poserelay.datasets.coco import read_coco
from poserelay.datasets.fullimage import PyramidDataset, collate_pyramids, pyramid
from poserelay.errors import CheckFailed, UnreadableImage
from poserelay.heads.cir import CIRMaps, JointMaps
from poserelay.keypoints import Skeleton
from poserelay.model import SingleStageModel
from poserelay.whole_images import apply, decode_views, find_poses, predict_dataset, predict_whole, protocol, views_of

SKELETON = Skeleton(
    name="toy",
    joints=("nose", "left_hand", "right_hand", "tail"),
    flip_pairs=(("left_hand", "right_hand"),),
    sigmas=(0.05, 0.05, 0.05, 0.05),
)
SIZE = 96
ORIGIN, RISE, NOISE = 75.0, 0.6, 2.0
"""Where colours are the scene's grey, how they rise with each pixel, what is added so that rounding averages out."""
STRIDE = 4
BODY = np.array([[0.0, -9.0], [-8.0, 1.5], [7.0, 2.0], [1.0, 10.25]])
SCENES: dict[int, np.ndarray] = {  # [N, K, 2], image pixels; the model is surest of the first
    120: BODY + np.array([[[40.3, 30.0]], [[75.0, 52.7]], [[110.0, 25.0]]]),
    125: 1.5 * BODY + np.array([[[30.0, 90.4]]]),
    130: np.zeros((0, 4, 2)),
    135: BODY + np.array([[[x, y]] for y in (20.0, 50.0, 80.0) for x in (20.0, 55.0, 90.0, 125.0)]),
    140: BODY + np.array([[[60.0, 35.0]], [[68.0, 35.0]]]),  # 2.7 map pixels apart at scale 1
}
FLIP, SCALES, BOTH = (
    Decoding(flip=flip, whole=WholeImages(scales=scales))
    for flip, scales in [(True, (1.0,)), (False, (0.5, 1.0, 2.0)), (True, (0.5, 1.0, 2.0))]
)
PLAIN = Decoding(flip=False)


def picture(scene: int, height: int, width: int) -> np.ndarray:
    y, x = RISE * (np.mgrid[:height, :width] - ORIGIN)
    colours = scene + np.stack([x + y, y - x, -y], -1)
    noise = np.random.default_rng(scene).uniform(-NOISE, NOISE, colours.shape)
    return np.rint(colours + noise).astype(np.uint8)


def line(places: Tensor, values: Tensor) -> tuple[float, float]:
    """Slope and intercept of the least-squares line from places to colours, without where a border is repeated."""
    inner = (places > places.min() + 2) & (places < places.max() - 2)
    values, places = values[inner], places[inner].double()
    centred = places - places.mean()
    slope = (centred * values).sum() / centred.square().sum()
    return slope.item(), (values.mean() - slope * places.mean()).item()


class Backbone(nn.Module):
    """The image as it is, on a map of stride 4 by name."""

    channels = (3,)
    strides = (STRIDE,)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.gain * images]


class Head(nn.Module):
    """Gaussians of 3 map pixels about the centres, and exact displacements to the joints of the nearest person.

    In the padding, `margin` map pixels from the image, the score is `padding`.
    """

    def __init__(self, padding: float = 0.0, margin: int = 0, plateau: bool = False) -> None:
        super().__init__()
        self.padding = padding
        self.margin = margin
        self.plateau = plateau
        self.displaced = 1.0

    def forward(self, levels: list[Tensor]) -> CIRMaps:
        images = levels[0].double() * 255
        scores, poses = [], []
        most = max(len(scene) for scene in SCENES.values())
        y, x = np.mgrid[: images.shape[2] : STRIDE, : images.shape[3] : STRIDE] / STRIDE
        for image in images:
            seen = image.sum(0) > 60
            places = self.seen(image, seen) / STRIDE
            near = functional.max_pool2d(seen[None, ::STRIDE, ::STRIDE].float(), 2 * self.margin + 1, 1, self.margin)[0]
            score = np.where(near.numpy() > 0, 0.0, self.padding)
            for rank, (left, top) in enumerate(places.mean(1)):
                height = 1 - 0.08 * rank
                squared = (x - left) ** 2 + (y - top) ** 2
                gaussian = np.where(squared < 4, 1.0, 0.0) if self.plateau else np.exp(-squared / 18)
                score = np.maximum(score, height * gaussian)
            scores.append(torch.from_numpy(score))
            poses.append(np.concatenate([places, np.full((most - len(places), 4, 2), 1e4)]))
        joints = JointMaps(torch.from_numpy(np.stack(poses)), None)
        return CIRMaps(torch.stack(scores).float() + 0 * levels[0].sum(), None, joints)  # NaN of an image of NaN

    def seen(self, image: Tensor, where: Tensor) -> np.ndarray:
        """The poses `[N, K, 2]` on an image `[3, H, W]` in its own pixels; `where` `[H, W]` it is no padding."""
        red, green, blue = image[:, where]
        grey = (red + green + 2 * blue).mean() / 4 if where.any() else 0
        scene = next((poses for number, poses in SCENES.items() if abs(grey - number) < 2), SCENES[130])
        if not len(scene):
            return scene
        row, column = where.nonzero(as_tuple=True)
        across, down = line(column, (red - green) / 2), line(row, (red + green - 2 * blue) / 4)
        x, y = RISE * (scene - ORIGIN).transpose(2, 0, 1)
        places = np.stack([(x - across[1]) / across[0], (y - down[1]) / down[0]], -1)
        return places if across[0] > 0 else places[:, list(SKELETON.flip_index)]

    def displacements(self, maps: JointMaps, pixels: Tensor) -> Tensor:
        assert pixels.equal(pixels.round())  # the network answers at its maps' pixels
        apart = (maps.features.mean(2)[:, None] - pixels[:, :, None].double()).square().sum(-1)  # [B, P, N]
        nearest = apart.argmin(-1)[..., None, None].expand(-1, -1, *maps.features.shape[2:])
        found = maps.features.gather(1, nearest) - pixels[:, :, None]
        return (self.displaced * found).float()


def model_of(head: Head | None = None) -> SingleStageModel:
    config = ModelConfig(
        Named("resnet18"),
        Named("cir"),
        input=InputConfig(height=SIZE, width=SIZE, mean=(0, 0, 0), std=(1, 1, 1)),
    )
    backbone: Any = Backbone()
    stub: Any = head or Head()
    return SingleStageModel(backbone, stub, SKELETON, config)


def poses_of(results: list[dict[str, Any]], image: int = 0) -> np.ndarray:
    """`[N, K, 2]`, as they come."""
    keypoints = [record["keypoints"] for record in results if record["image_id"] == image]
    return np.reshape(keypoints, (-1, 4, 3))[..., :2]


def mirrored(poses: np.ndarray, width: int) -> np.ndarray:
    """On the mirrored image."""
    return np.stack([width - 1 - poses[..., 0], poses[..., 1]], -1)[:, list(SKELETON.flip_index)]


WAYS = pytest.mark.parametrize("decoding", [PLAIN, FLIP, SCALES, BOTH], ids=["plain", "flip", "scales", "both"])


@WAYS
@pytest.mark.parametrize(("height", "width"), [(72, 144), (81, 150)])
def test_an_ideal_model_gives_the_true_poses(decoding: Decoding, height: int, width: int) -> None:
    """Whatever the width is of the padding."""
    results = predict_whole(model_of(), [picture(120, height, width)], decoding)
    np.testing.assert_allclose(poses_of(results), SCENES[120], atol=0.1)
    assert [record["score"] for record in results] == pytest.approx([0.95, 0.87, 0.8], abs=0.06)
    for record, truth in zip(results, SCENES[120], strict=True):
        assert record["category_id"] == 1
        assert record["keypoints"][2::3] == [record["score"]] * 4  # of joints the model knows no other
        np.testing.assert_allclose(record["bbox"], [*truth.min(0), *np.ptp(truth, axis=0)], atol=0.2)


@WAYS
def test_of_the_mirrored_image_the_mirrored_poses(decoding: Decoding) -> None:
    """144 x 72 is seen as 192 x 96, of which the width is a multiple of the padding at every scale."""
    view = picture(120, 72, 144)
    plain = predict_whole(model_of(), [view], decoding)
    other = predict_whole(model_of(), [np.ascontiguousarray(view[:, ::-1])], decoding)
    np.testing.assert_allclose(poses_of(other), mirrored(SCENES[120], 144), atol=0.1)
    np.testing.assert_allclose(poses_of(other), mirrored(poses_of(plain), 144), atol=0.1)


@WAYS
def test_a_batch_is_its_images_one_by_one(decoding: Decoding) -> None:
    """Of several shapes, padded to the largest: also where nobody is."""
    model = model_of()
    scenes = [120, 125, 130, 125]
    sizes = [(72, 144), (144, 72), (60, 170), (130, 110)]
    pictures = [picture(scene, *size) for scene, size in zip(scenes, sizes, strict=True)]
    together = predict_whole(model, pictures, decoding, batch_size=4)
    assert [record["image_id"] for record in together] == [0, 0, 0, 1, 3]
    for number, (view, scene) in enumerate(zip(pictures, scenes, strict=True)):
        alone = predict_whole(model, [view], decoding)
        np.testing.assert_allclose(poses_of(together, number), poses_of(alone), atol=0.01)
        np.testing.assert_allclose(poses_of(together, number), SCENES[scene], atol=0.1)
        scores = [record["score"] for record in together if record["image_id"] == number]
        assert scores == pytest.approx([record["score"] for record in alone], abs=1e-3)


def test_a_mirrored_view_looks_at_the_same_places() -> None:
    """Its map pixels, each at the input pixel of its number times the stride, are the mirrored ones of the image."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 64, 96)).astype(np.uint8))
    affine = torch.tensor([[[0.8, 0.0, -0.1], [0.0, 0.8, -0.1]]], dtype=torch.float64)
    batch = PyramidBatch([images], [affine], torch.tensor([[80.0, 120.0]]), [0])
    for stride in (1, 2, 4):
        plain, other = views_of(batch, True, stride)
        assert plain.images.equal(images)
        assert other.images[..., ::stride].equal(images[..., ::stride].flip(-1))
        place = torch.tensor([[7.0, 9.0]], dtype=torch.float64)
        (across, down), (back, same) = (apply(view.affine[0], place)[0].tolist() for view in (plain, other))
        assert back / stride == pytest.approx(96 / stride - 1 - across / stride)
        assert same == down
    assert len(views_of(batch, False, 4)) == 1


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_views_count_by_their_scores(share: float) -> None:
    """By hand: of 96 x 96 pixels a peak of 0.9 at map pixel (10, 7), and 0.3 at its mirror image (23 - 10, 7).

    The same of the double scores times an estimated quality of 0.5.
    """
    batch = collate_pyramids([pyramid(np.zeros((96, 96, 3), dtype=np.uint8), SIZE, (1.0,), 0)])
    views = views_of(batch, True, STRIDE)
    maps, poses = [], torch.tensor([[9.0, 5.0], [8.0, 7.0], [11.5, 7.0], [10.0, 12.0]], dtype=torch.float64)
    for column, height, shown in (
        (10, 0.9, poses),
        (13, 0.3, torch.tensor([23.0, 0.0]) + torch.tensor([-1, 1]) * poses),
    ):
        score = torch.zeros(1, 24, 24)
        score[0, 7, column] = height / share
        quality = None if share == 1 else torch.full_like(score, share)
        maps.append(CIRMaps(score, quality, JointMaps(shown[None, None], None)))
    found = decode_views(model_of(), batch, views, maps, FLIP)
    assert torch.isfinite(found.scores).sum() == 1
    assert found.scores[0, 0].item() == pytest.approx(0.6)
    # The mirrored view does not exchange left and right here, so that the poses differ in the hands.
    hands = poses[[0, 2, 1, 3]]
    torch.testing.assert_close(found.keypoints[0, 0], 4 * (0.9 * poses + 0.3 * hands) / 1.2)


@pytest.mark.parametrize("scales", [(0.5, 1.0, 2.0), (2.0, 0.5, 1.0), (1.0, 2.0, 0.5)])
def test_peaks_are_those_of_scale_1_in_whatever_order_the_scales_are(scales: tuple[float, ...]) -> None:
    """On the coarsest map the two would be one."""
    view = picture(140, 72, 144)
    results = predict_whole(model_of(), [view], Decoding(whole=WholeImages(scales=scales)))
    np.testing.assert_allclose(poses_of(results), SCENES[140], atol=0.1)
    assert len(predict_whole(model_of(), [view], Decoding(whole=WholeImages(scales=(0.5,))))) == 1
    expected = predict_whole(model_of(), [view], BOTH)
    assert [record["score"] for record in results] == pytest.approx([record["score"] for record in expected], abs=1e-6)


def test_at_most_max_poses_are_kept_and_the_best_first() -> None:
    view = picture(135, 100, 150)
    for most in (1, 5, 30):
        decoding = Decoding(whole=WholeImages(max_poses=most))
        results = predict_whole(model_of(), [view], decoding)
        np.testing.assert_allclose(poses_of(results), SCENES[135][:most], atol=0.1)
        scores = [record["score"] for record in results]
        assert scores == sorted(scores, reverse=True)
    results = predict_whole(model_of(), [view], Decoding(whole=WholeImages(score_threshold=0.55)))
    np.testing.assert_allclose(poses_of(results), SCENES[135][:6], atol=0.1)  # the scores fall by 0.08


@WAYS
def test_nothing_is_found_in_the_padding(decoding: Decoding) -> None:
    """However high the scores are; of several scales from two pixels off on, as the maps' pixels lie between."""
    model = model_of(Head(padding=3.0, margin=2 if len(decoding.whole.scales) > 1 else 0))
    # All but the last are padded by themselves, too.
    pictures = [picture(130, 72, 139), picture(120, 81, 150), picture(125, 144, 72)]
    results = predict_whole(model, pictures, decoding)
    for number, scene in enumerate((130, 120, 125)):
        np.testing.assert_allclose(poses_of(results, number), SCENES[scene], atol=0.1)


def test_nobody_is_an_empty_list() -> None:
    assert predict_whole(model_of(), [picture(130, 60, 80)], BOTH) == []
    assert predict_whole(model_of(), []) == []
    assert predict_whole(model_of(), [np.zeros((1, 1, 3), dtype=np.uint8)], FLIP) == []


def test_nms_leaves_one_of_the_poses_of_a_plateau() -> None:
    """All pixels of equal height are peaks, which agree about the pose."""
    model, view = model_of(Head(plateau=True)), picture(125, 144, 72)
    batch = collate_pyramids([pyramid(view, SIZE, (1.0,), 0)])
    assert torch.isfinite(find_poses(model.eval(), batch, PLAIN).scores).sum() > 5
    np.testing.assert_allclose(poses_of(predict_whole(model, [view], PLAIN)), SCENES[125], atol=0.1)
    assert len(predict_whole(model, [view], Decoding(flip=False, nms_threshold=1.0))) > 5


def test_damaged_weights_are_told_of() -> None:
    model = model_of()
    nn.init.constant_(model.backbone.gain, math.nan)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckFailed, match="score maps hold NaN"):
        predict_whole(model, [picture(120, 72, 144)])
    head = Head()
    head.displaced = math.inf
    with pytest.raises(CheckFailed, match="displacements hold NaN"):
        predict_whole(model_of(head), [picture(120, 72, 144)])


def test_predict_takes_arrays_and_paths_and_no_boxes(tmp_path: Path) -> None:
    model, view = model_of(), picture(120, 72, 144)
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), view[..., ::-1])
    expected = model.predict(view)
    assert len(expected) == 3
    assert model.predict([view]) == model.predict(path) == model.predict(str(path)) == expected
    several = model.predict([path, picture(125, 144, 72), view])
    assert [record["image_id"] for record in several] == [0, 0, 0, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="single-stage"):
        model.predict([view], [np.zeros((1, 4))])  # pyright: ignore[reportArgumentType]
    for wrong in (view[..., 0], view.astype(float), view[None], view[:0]):
        with pytest.raises(ValueError, match=r"image 0: .* expected uint8"):
            model.predict(wrong)
    with pytest.raises(UnreadableImage, match=r"missing\.png"):
        model.predict(tmp_path / "missing.png")


def test_results_of_a_file_are_in_its_joints_and_ids(tmp_path: Path) -> None:
    """Another order of joints, its category and image ids; the order of the images is that of their shapes."""
    shapes = {120: (81, 150), 125: (144, 72), 130: (60, 70)}
    for scene, shape in shapes.items():
        cv2.imwrite(str(tmp_path / f"{scene}.png"), picture(scene, *shape)[..., ::-1])
    images = [
        {"id": 7 * scene, "file_name": f"{scene}.png", "height": height, "width": width}
        for scene, (height, width) in shapes.items()
    ]
    category = {"id": 3, "name": "toy", "keypoints": ["tail", "right hand", "nose", "left hand"]}
    (tmp_path / "val.json").write_text(json.dumps({"images": images, "annotations": [], "categories": [category]}))
    annotations = read_coco(tmp_path / "val.json")
    dataset = PyramidDataset(annotations, tmp_path, SIZE, BOTH.whole.scales)
    model = model_of()
    results = predict_dataset(model, dataset, BOTH, batch_size=2)
    assert sorted(record["image_id"] for record in results) == [840, 840, 840, 875]
    assert {record["category_id"] for record in results} == {3}
    for scene in (120, 125):
        np.testing.assert_allclose(poses_of(results, 7 * scene), SCENES[scene][:, [3, 2, 0, 1]], atol=0.1)
    made = protocol(annotations, model, BOTH)
    assert (made["boxes"], made["images"], made["short_side"], made["scales"]) == ("none", 3, SIZE, [0.5, 1.0, 2.0])
