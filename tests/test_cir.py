"""CIR's head, targets and losses: the paper's equations as loops over images, pixels, persons and joints."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from finetune import train_cir
from finetune.cir_config import CIRLossConfig
from finetune.cir_targets import (
    CentreAreas,
    centre_areas,
    displacement_loss,
    gaussian_scores,
    quality_loss,
    region_mask,
    score_loss,
    score_weights,
)
from poserelay.batch import ImageBatch
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.errors import UserError
from poserelay.geometry import apply_affine, box_to_affine
from poserelay.heads.cir import CIRHead, CIRMaps, JointMaps, sample
from poserelay.keypoints import Skeleton
from poserelay.model import build_single_stage

STRIDE = 4


class Scene(NamedTuple):
    """Persons of B images in map pixels, as `ImageBatch` has them in input pixels."""

    keypoints: Tensor
    """`[B, S, K, 2]`, multiples of 1/8, so that sums and differences are exact."""
    visibility: Tensor
    areas: Tensor
    size: tuple[int, int]
    radius: float


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Few persons on a small map, some of them over its border: overlapping, of one centre or one area, or nobody."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images, slots, joints = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    height, width = size = (draw(st.integers(1, 12)), draw(st.integers(1, 16)))
    centres = rng.uniform((-5, -5), (width + 4, height + 4), (images, slots, 1, 2))
    keypoints = np.round(8 * (centres + rng.uniform(-3, 3, (images, slots, joints, 2)))) / 8
    visibility = rng.integers(0, 3, (images, slots, joints)) * (rng.random((images, slots, 1)) < 0.8)
    areas = rng.integers(1, 400, (images, slots)) / 4
    if draw(st.booleans()):
        areas[:] = rng.choice([4.0, 9.0], areas.shape)
    if draw(st.booleans()):
        keypoints[:, 1:], visibility[:, 1:] = keypoints[:, :1], visibility[:, :1]
    keypoints[visibility == 0] = 0
    radius = draw(st.sampled_from([4.0, 4.0, 2.5, 1.0, 0.5]))
    tensors = (torch.from_numpy(keypoints).float(), torch.from_numpy(visibility), torch.from_numpy(areas).float())
    return Scene(*tensors, size, radius)


def centre_of(scene: Scene, image: int, person: int) -> tuple[float, float] | None:
    """Mean of the labelled joints; None: the slot is empty."""
    pairs = zip(scene.keypoints[image, person].tolist(), scene.visibility[image, person].tolist(), strict=True)
    labelled = [joint for joint, visible in pairs if visible > 0]
    if not labelled:
        return None
    return sum(x for x, _ in labelled) / len(labelled), sum(y for _, y in labelled) / len(labelled)


def owners(scene: Scene) -> list[dict[tuple[int, int], int]]:
    """For each image the pixels (x, y) in a person's Omega (Eq. 2), with that person: of several the smallest."""
    found = []
    for image, areas in enumerate(scene.areas.tolist()):
        owner: dict[tuple[int, int], int] = {}
        for person, area in enumerate(areas):
            if (centre := centre_of(scene, image, person)) is None:
                continue
            for y in range(scene.size[0]):
                for x in range(scene.size[1]):
                    near = math.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2) < scene.radius
                    if near and ((x, y) not in owner or area < areas[owner[x, y]]):
                        owner[x, y] = person
        found.append(owner)
    return found


def naive_map(scene: Scene, value: Any) -> Tensor:
    """`[B, h, w]` float32 with value(image, x, y, person) at the owned pixels, 0 elsewhere."""
    result = torch.zeros(len(scene.areas), *scene.size)
    for image, owner in enumerate(owners(scene)):
        for (x, y), person in owner.items():
            result[image, y, x] = value(image, x, y, person)
    return result


def areas_of(scene: Scene) -> CentreAreas:
    return centre_areas(scene.keypoints, scene.visibility, scene.areas, scene.size, scene.radius)


def at_pixels(field: Tensor, pixels: Tensor) -> Tensor:
    """What a map `[B, h, w, ...]` holds at whole pixels `[B, ..., 2]`."""
    x, y = pixels.long().unbind(-1)
    return field[torch.arange(len(field)).view(-1, *[1] * (x.ndim - 1)), y, x]


class Step(NamedTuple):
    """What a training step made of a scene."""

    target: Tensor
    weight: Tensor
    parts: dict[str, Tensor]
    score: Tensor
    displacements: Tensor


def step(
    scene: Scene,
    displacements: Tensor,
    *,
    score: Tensor | None = None,
    quality: Tensor | None = None,
    regions: Tensor | None = None,
    affine: Tensor | None = None,
    loss: CIRLossConfig | None = None,
) -> Step:
    """`train_cir.training_step` with a network that says these maps `[B, h, w, K, 2]` and `[B, h, w]`."""
    images, height, width = len(scene.areas), *scene.size
    score = torch.zeros(images, height, width) if score is None else score
    score, displacements = score.clone().requires_grad_(), displacements.clone().requires_grad_()
    batch = ImageBatch(
        images=torch.zeros(images, 3, STRIDE * height, STRIDE * width, dtype=torch.uint8),
        keypoints=STRIDE * scene.keypoints,
        visibility=scene.visibility,
        areas=STRIDE**2 * scene.areas,
        regions=torch.zeros(images, 1, 4) if regions is None else regions,
        affine=torch.eye(3)[:2].repeat(images, 1, 1) if affine is None else affine,
        image_ids=list(range(images)),
    )

    def network(pictures: Tensor, pixels: Tensor) -> tuple[CIRMaps, Tensor]:
        assert pictures.shape == batch.images.shape
        return CIRMaps(score, quality, JointMaps(pictures, None)), at_pixels(displacements, pixels)

    joints = scene.keypoints.shape[2]
    skeleton = Skeleton(name="toy", joints=tuple("abcd"[:joints]), sigmas=(0.1, 0.05, 0.2, 0.03)[:joints])
    model: Any = SimpleNamespace(stride=STRIDE, skeleton=skeleton, preprocess=lambda pictures: pictures)
    fabric: Any = SimpleNamespace(device="cpu", backward=lambda loss: loss.backward())
    optimizer = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    config: Any = SimpleNamespace(loss=loss or CIRLossConfig(radius=scene.radius))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cir, "score_loss", lambda *maps: seen.append(maps) or score_loss(*maps))
        parts = train_cir.training_step(fabric, network, model, optimizer, batch, config)
    ((_, target, weight),) = seen
    return Step(target, weight, parts, score, displacements)


def to_the_owner(scene: Scene) -> Tensor:
    """The right displacements `[B, h, w, K, 2]`: at owned pixels joint - pixel, anything elsewhere."""
    result = torch.full((len(scene.areas), *scene.size, *scene.keypoints.shape[2:]), 7.0)
    for image, owner in enumerate(owners(scene)):
        for (x, y), person in owner.items():
            result[image, y, x] = scene.keypoints[image, person] - torch.tensor([x, y])
    return result


@settings(deadline=None, max_examples=60)
@given(scenes())
def test_centre_areas_are_those_of_the_loop(scene: Scene) -> None:
    """Also: no pixel is given twice, and `spread` puts each person's values at its pixels."""
    areas = areas_of(scene)
    persons = torch.arange(1.0, scene.areas.shape[1] + 1)[:, None].expand(areas.owned.shape)
    assert areas.spread(persons).equal(naive_map(scene, lambda image, x, y, person: person + 1))
    assert areas.owned.sum((1, 2)).tolist() == [len(owner) for owner in owners(scene)]
    assert areas.present.equal((scene.visibility > 0).any(-1))
    place = areas.pixels[..., 0] + 100 * areas.pixels[..., 1]
    assert areas.spread(place).equal(naive_map(scene, lambda image, x, y, person: x + 100 * y))


@settings(deadline=None, max_examples=60)
@given(scenes(), st.integers(0, 2**32))
def test_cir_target_is_exactly_that_of_the_loop(scene: Scene, seed: int) -> None:
    """With joints that are hit or out of all reach, where the OKS is a fraction of whole numbers."""
    hits = torch.rand(len(scene.areas), *scene.size, scene.keypoints.shape[2], generator=generator(seed)) < 0.6
    displacements = to_the_owner(scene) + 4096 * ~hits[..., None]

    def similarity(image: int, x: int, y: int, person: int) -> float:
        labelled = [joint for joint, visible in enumerate(scene.visibility[image, person].tolist()) if visible > 0]
        return sum(hits[image, y, x, joint].item() for joint in labelled) / len(labelled)

    assert step(scene, displacements).target.equal(naive_map(scene, similarity))


@settings(deadline=None, max_examples=30)
@given(scenes(), st.integers(0, 2**32))
def test_cir_target_is_equations_1_and_2(scene: Scene, seed: int) -> None:
    displacements = to_the_owner(scene)
    displacements += torch.randn(displacements.shape, generator=generator(seed))

    def similarity(image: int, x: int, y: int, person: int) -> float:
        terms = []
        for joint, visible in enumerate(scene.visibility[image, person].tolist()):
            if visible > 0:
                dx, dy = (
                    (torch.tensor([x, y]) + displacements[image, y, x, joint] - scene.keypoints[image, person, joint])
                    .double()
                    .tolist()
                )
                k = 2 * (0.1, 0.05, 0.2, 0.03)[joint]
                terms.append(math.exp(-(dx**2 + dy**2) / (2 * scene.areas[image, person].item() * k**2)))
        return sum(terms) / len(terms)

    torch.testing.assert_close(step(scene, displacements).target, naive_map(scene, similarity), atol=2e-6, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(scenes())
def test_a_perfect_prediction_has_score_1_inside_the_radius_and_0_outside(scene: Scene) -> None:
    found = step(scene, to_the_owner(scene))
    assert found.target.equal(naive_map(scene, lambda *_: 1.0))
    assert found.parts["displacement_loss"] == 0


def test_the_radius_is_strict_and_the_smaller_person_wins() -> None:
    """On whole pixels 49 are within 4 of a point and 4 of these at exactly 4."""
    keypoints = torch.tensor([[[[9.0, 8.0], [11, 12]], [[8, 9], [12, 11]], [[14, 10], [14, 10]]]])
    visibility = torch.ones(1, 3, 2, dtype=torch.long)
    alone = centre_areas(keypoints[:, :1], visibility[:, :1], torch.ones(1, 1), (20, 20))
    assert alone.owned.sum() == 45
    both = centre_areas(keypoints, visibility, torch.tensor([[3.0, 2.0, 2.0]]), (20, 20))
    # The first two share a centre: the larger one has nothing. The third is as small as the second, which comes first.
    assert both.owned.sum(-1)[0, :2].tolist() == [0, 45]
    shared = sum((x - 10) ** 2 + y**2 < 16 and (x - 14) ** 2 + y**2 < 16 for x in range(20) for y in range(-9, 9))
    assert both.owned.sum(-1)[0, 2] == 45 - shared


@settings(deadline=None, max_examples=40)
@given(scenes(), st.integers(0, 2**32))
def test_displacement_loss_is_equations_5_and_6(scene: Scene, seed: int) -> None:
    field = to_the_owner(scene).double()
    field += torch.randn(field.shape, generator=generator(seed), dtype=torch.float64) * 0.2
    total, count = 0.0, 0
    for image, owner in enumerate(owners(scene)):
        for (x, y), person in owner.items():
            for joint, visible in enumerate(scene.visibility[image, person].tolist()):
                for axis, here in enumerate((x, y)):
                    if visible > 0:
                        wanted = scene.keypoints[image, person, joint, axis].item() - here
                        apart = abs(field[image, y, x, joint, axis].item() - wanted)
                        total += apart**2 / (2 / 9) if apart < 1 / 9 else apart - 1 / 18
                        count += 1
    areas = areas_of(scene)
    loss = displacement_loss(at_pixels(field, areas.pixels), scene.keypoints, scene.visibility, areas)
    assert loss.item() == pytest.approx(total / max(1, count), rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(scenes())
def test_gaussian_and_discrete_targets(scene: Scene) -> None:
    """DEKR's Gaussian of sigma 4, cut at 3 sigma, of several the larger; it counts in full wherever it is not 0."""
    expected = torch.zeros(len(scene.areas), *scene.size)
    for image in range(len(expected)):
        for person in range(scene.areas.shape[1]):
            if (centre := centre_of(scene, image, person)) is not None:
                for y in range(scene.size[0]):
                    for x in range(scene.size[1]):
                        squared = (x - centre[0]) ** 2 + (y - centre[1]) ** 2
                        height = math.exp(-squared / 32) if squared < 144 else 0
                        expected[image, y, x] = max(expected[image, y, x].item(), height)
    areas = areas_of(scene)
    torch.testing.assert_close(gaussian_scores(areas), expected)
    found = step(scene, to_the_owner(scene), loss=CIRLossConfig(target="gaussian", radius=scene.radius))
    torch.testing.assert_close(found.target, expected)
    inside = naive_map(scene, lambda *_: 1.0) > 0
    assert found.weight.equal(torch.where((expected > 0) | inside, 1.0, 0.1))
    discrete = step(scene, to_the_owner(scene) + 3, loss=CIRLossConfig(target="discrete", radius=scene.radius))
    assert discrete.target.equal(inside.float())
    assert discrete.weight.equal(torch.where(inside, 1.0, 0.1))


def test_gaussian_ends_at_three_sigma() -> None:
    areas = centre_areas(torch.tensor([[[[15.0, 0.0]]]]), torch.ones(1, 1, 1), torch.ones(1, 1), (1, 40))
    scores = gaussian_scores(areas)[0, 0]
    assert scores[15] == 1
    assert (scores > 0).nonzero()[:, 0].tolist() == list(range(4, 27))
    assert scores[26].item() == pytest.approx(math.exp(-(11**2) / 32))


@pytest.mark.parametrize(("turn", "flip"), [(0.0, False), (25.0, False), (-110.0, True)])
def test_region_mask_is_the_point_test_pixel_by_pixel(turn: float, flip: bool) -> None:
    rng = np.random.default_rng(round(abs(turn)))
    affine = box_to_affine(np.array([10.0, 5, 70, 70]), (64, 64), padding=1.2, rotation=turn, flip=flip)
    regions = np.array([[20.0, 10, 25, 14], [50, 40, 9.5, 60], [-20, 60, 45, 30], [30, 30, 0, 0]])
    seen, unsure = np.zeros((16, 20), dtype=bool), np.zeros((16, 20), dtype=bool)
    for x, y, width, height in regions[:3]:
        corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
        polygon = apply_affine(affine, corners).astype(np.float32)
        for row, column in np.ndindex(seen.shape):
            depth = cv2.pointPolygonTest(polygon, (4.0 * column, 4.0 * row), True)
            seen[row, column] |= depth > 0
            unsure[row, column] |= abs(depth) < 1e-3
    shuffled = torch.from_numpy(rng.permutation(regions)).float()
    other = torch.zeros_like(shuffled)
    affines = torch.from_numpy(affine).float().expand(2, 2, 3)
    mask = region_mask(torch.stack([shuffled, other]), affines, 4, (16, 20))
    assert not mask[1].any()
    assert 20 < seen.sum() < 200
    np.testing.assert_array_equal(mask[0].numpy() | unsure, seen | unsure)


@settings(deadline=None, max_examples=20)
@given(scenes(), st.integers(0, 2**32))
def test_weights_and_score_loss_are_equation_3(scene: Scene, seed: int) -> None:
    """1 in central areas, 0.1 in the background, 0 in regions, which take nothing from an area."""
    images = len(scene.areas)
    rng = np.random.default_rng(seed)
    low = rng.integers(-2, 12, (images, 2, 2))
    regions = np.concatenate([low, rng.integers(0, 10, (images, 2, 2))], -1)  # map pixels
    owner = owners(scene)
    predicted = torch.randn(images, *scene.size, generator=generator(seed))
    found = step(scene, to_the_owner(scene) + 0.1, score=predicted, regions=torch.from_numpy(regions * STRIDE).float())
    total, weights = 0.0, 0.0
    for image, y, x in np.ndindex(images, *scene.size):
        in_region = any(
            left <= x < left + width and top <= y < top + height for left, top, width, height in regions[image]
        )
        weight = 1.0 if (x, y) in owner[image] else 0.0 if in_region else 0.1
        assert found.weight[image, y, x].item() == pytest.approx(weight)
        total += weight * (predicted[image, y, x] - found.target[image, y, x]).item() ** 2
        weights += weight
    assert found.parts["score_loss"].item() == pytest.approx(total / max(1, weights), rel=1e-4)
    areas = areas_of(scene)
    anywhere = torch.ones(images, *scene.size, dtype=torch.bool)
    assert score_weights(areas, anywhere).equal(naive_map(scene, lambda *_: 1.0))


@settings(deadline=None, max_examples=20)
@given(scenes(), st.integers(0, 2**32))
def test_quality_branch_learns_the_oks_in_the_areas_alone(scene: Scene, seed: int) -> None:
    quality = torch.rand(len(scene.areas), *scene.size, generator=generator(seed))
    displacements = to_the_owner(scene) + 0.05
    similarity = step(scene, displacements).target
    found = step(
        scene, displacements, quality=quality, loss=CIRLossConfig(target="discrete", radius=scene.radius)
    ).parts
    pixels = [(image, y, x) for image, owner in enumerate(owners(scene)) for x, y in owner]
    squares = [(quality[pixel] - similarity[pixel]).item() ** 2 for pixel in pixels]
    assert found["quality_loss"].item() == pytest.approx(sum(squares) / max(1, len(squares)), rel=1e-5)
    parts = ("score_loss", "displacement_loss", "quality_loss")
    assert found["loss"].item() == pytest.approx(sum(found[name].item() for name in parts), rel=1e-6)
    assert quality_loss(quality, similarity, areas_of(scene)).item() == found["quality_loss"].item()


def test_the_score_teaches_the_displacements_nothing() -> None:
    """The CIR target is detached: the only way to the displacements is their own loss."""
    keypoints = torch.tensor([[[[6.0, 5.0], [9.0, 8.0]]]])
    scene = Scene(keypoints, torch.ones(1, 1, 2, dtype=torch.long), torch.full((1, 1), 50.0), (12, 14), 4.0)
    score = torch.rand(1, 12, 14, generator=generator(0))
    found = step(scene, to_the_owner(scene) + 0.3, score=score, loss=CIRLossConfig(displacement_weight=0))
    assert found.displacements.grad is not None
    assert found.score.grad is not None
    assert not found.displacements.grad.any()
    expected = 2 * found.weight * (score - found.target) / found.weight.sum()
    torch.testing.assert_close(found.score.grad, expected)
    taught = step(scene, to_the_owner(scene) + 0.3).displacements.grad
    assert taught is not None
    inside = naive_map(scene, lambda *_: 1.0) > 0
    assert (taught != 0).all(-1).all(-1).equal(inside)
    assert (taught != 0).any(-1).any(-1).equal(inside)


@pytest.mark.parametrize("target", ["cir", "gaussian", "discrete"])
@pytest.mark.parametrize("where", ["no joints", "off the map"])
def test_nobody_on_a_batch(target: Any, where: str) -> None:
    """All background: nothing for the displacements, and no NaN."""
    visibility = torch.zeros(2, 3, 4, dtype=torch.long) if where == "no joints" else torch.ones(2, 3, 4).long()
    keypoints = torch.zeros(2, 3, 4, 2) if where == "no joints" else torch.full((2, 3, 4, 2), -900.0)
    scene = Scene(keypoints, visibility, torch.ones(2, 3), (8, 9), 4.0)
    maps = torch.full((2, 8, 9), 0.5)
    found = step(scene, torch.ones(2, 8, 9, 4, 2), score=maps, quality=maps, loss=CIRLossConfig(target=target))
    assert not found.target.any()
    values = {name: value.item() for name, value in found.parts.items()}
    assert values["displacement_loss"] == values["quality_loss"] == values["oks"] == 0
    assert values["loss"] == pytest.approx(0.25)
    assert found.score.grad is not None
    assert found.displacements.grad is not None
    assert found.score.grad.isfinite().all()
    assert not found.displacements.grad.any()


# The head.


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bilinear(field: np.ndarray, x: float, y: float) -> np.ndarray:
    """A map `[C, h, w]` at one place, 0 beyond it."""
    left, top = math.floor(x), math.floor(y)
    total = np.zeros(len(field))
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < field.shape[1] and 0 <= column < field.shape[2]:
                total += (1 - abs(x - column)) * (1 - abs(y - row)) * field[:, row, column]
    return total


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 6))
def test_sample_is_the_bilinear_loop(seed: int, height: int, width: int) -> None:
    """At whole pixels, between them, over the border and far outside."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(2, 3, 4, height, width))
    places = rng.uniform(-2.5, (width + 1.5, height + 1.5), (2, 3, 9, 2))
    places[..., :3, :] = np.round(places[..., :3, :])
    places[..., 3, :] *= 1000
    places[..., 4, :] = (width - 1, height - 1)
    found = sample(torch.from_numpy(maps).float(), torch.from_numpy(places).float())
    for image, group, point in np.ndindex(2, 3, 9):
        x, y = places[image, group, point].astype(np.float32).tolist()
        expected = bilinear(maps[image, group], x, y)
        np.testing.assert_allclose(found[image, group, :, point], expected, atol=2e-5)


WIDTHS, JOINTS, JOINT, INSTANCE, GENERAL = (5, 6), 3, 4, 3, 7


def head_of(seed: int = 0, **kwargs: Any) -> CIRHead:
    """A small head in which nothing is near zero: displacements of some pixels, trained-looking batch norms."""
    widths: dict[str, Any] = {"general_channels": GENERAL, "joint_channels": JOINT, "instance_channels": INSTANCE}
    head = CIRHead(WIDTHS, JOINTS, **widths, **kwargs).eval()
    draws = generator(seed)
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=1.5 / fan_in**0.5, generator=draws)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5, generator=draws)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=draws)
            module.running_var.uniform_(0.5, 2, generator=draws)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=draws)
            nn.init.normal_(module.bias, 0.2, 0.2, generator=draws)
    return head


def levels_of(seed: int = 0, size: tuple[int, int] = (4, 6), images: int = 2) -> list[Tensor]:
    draws = generator(seed)
    halves = (-(-size[0] // 2), -(-size[1] // 2))
    return [
        torch.randn(images, channels, *each, generator=draws)
        for channels, each in zip(WIDTHS, (size, halves), strict=True)
    ]


def normed(values: np.ndarray, norm: Any, channels: slice = slice(None)) -> np.ndarray:
    """ReLU of a batch norm's evaluation, of `[C, h, w]`."""
    mean, var, weight, bias = (
        np.asarray(part.detach()[channels].double())[:, None, None]
        for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return np.maximum((values - mean) / np.sqrt(var + norm.eps) * weight + bias, 0)


def weight_of(layer: Any) -> np.ndarray:
    """Of a 1x1 convolution, `[out, in]`."""
    return layer.weight.detach().double().numpy()[..., 0, 0]


def bias_of(layer: Any) -> np.ndarray:
    return layer.bias.detach().double().numpy()


class Naive:
    """One image through a head's weights, joint by joint and pixel by pixel."""

    def __init__(self, head: CIRHead, levels: list[Tensor], image: int) -> None:
        self.head = head
        self.size = (height, width) = levels[0].shape[-2:]
        upsampled = [
            functional.interpolate(level.double(), size=(height, width), mode="bilinear")[image] for level in levels
        ]
        weights = np.concatenate([weight_of(layer) for layer in head.general], 1)
        general = np.einsum("oc,chw->ohw", weights, torch.cat(upsampled).numpy())
        self.general = normed(general, head.general_norm)  # R_g
        layer: Any = head.joint_features
        rows = [slice(JOINT * k, JOINT * (k + 1)) for k in range(JOINTS)]
        self.joints = [  # R_k
            normed(np.einsum("oc,chw->ohw", weight_of(layer[0])[part], self.general), layer[1], part) for part in rows
        ]
        layer = head.instance
        self.instance = normed(np.einsum("oc,chw->ohw", weight_of(layer[0]), self.general), layer[1])  # R_I

    def branch(self, layer: Any, joint: int, features: np.ndarray) -> np.ndarray:
        """A joint's own part of a layer with a branch for each, of its features `[C]`."""
        each = len(bias_of(layer)) // JOINTS
        part = slice(each * joint, each * (joint + 1))
        return weight_of(layer)[part] @ features + bias_of(layer)[part]

    def query(self, joint: int, x: int, y: int) -> np.ndarray:
        """c + D_{c->q}."""
        return np.array([x, y]) + self.branch(self.head.to_query, joint, self.joints[joint][:, y, x])

    def semantic(self, joint: int, x: int, y: int) -> list[np.ndarray]:
        """The q'."""
        query = self.query(joint, x, y)
        moved = self.branch(self.head.to_points, joint, bilinear(self.joints[joint], *query))
        return [query + moved[2 * n : 2 * n + 2] for n in range(self.head.points)]

    def displacement(self, joint: int, x: int, y: int) -> np.ndarray:
        """D_{c->k} (Eq. 4); without KQE read off the pixel itself."""
        features = self.joints[joint]
        if self.head.to_query is None:
            return self.branch(self.head.to_keypoint, joint, features[:, y, x])
        query = self.query(joint, x, y)
        places = self.semantic(joint, x, y) if self.head.points else [query]
        transformed = np.sum([bilinear(features, *place) for place in places], axis=0)
        return query - (x, y) + self.branch(self.head.to_keypoint, joint, transformed)

    def pose_query(self, x: int, y: int) -> np.ndarray:
        """R'_I(c) (Eq. 7), and Table 6's other constructions of it."""
        kind = self.head.pose_query
        if kind == "none":
            return self.instance[:, y, x]
        automatic: Any = self.head.automatic
        parts = []
        for joint in range(JOINTS):
            if kind == "query":
                places = [self.query(joint, x, y)]
            elif kind == "keypoint":
                places = [np.array([x, y]) + self.displacement(joint, x, y)]
            elif kind == "semantic":
                places = self.semantic(joint, x, y)
            else:
                moved = weight_of(automatic) @ self.instance[:, y, x] + bias_of(automatic)
                places = [np.array([x, y]) + moved[2 * joint : 2 * joint + 2]]
            parts.append(np.sum([bilinear(self.instance, *place) for place in places], axis=0))
        return np.concatenate(parts)

    def maps(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Score and quality, from R'_I by a 3x3 and a 1x1 convolution."""
        height, width = self.size
        layer: Any = self.head.pose
        weight = layer[0].weight.detach().double().numpy()
        encoded = np.zeros((weight.shape[1], height + 2, width + 2))
        for y, x in np.ndindex(height, width):
            encoded[:, y + 1, x + 1] = self.pose_query(x, y)
        pose = np.zeros((len(weight), height, width))
        for y, x in np.ndindex(height, width):
            pose[:, y, x] = (weight * encoded[None, :, y : y + 3, x : x + 3]).sum((1, 2, 3))
        pose = normed(pose, layer[1])
        score, quality = (
            None if layer is None else (weight_of(layer) @ pose.reshape(len(pose), -1) + bias_of(layer)[:, None])
            for layer in (self.head.score, self.head.quality)
        )
        assert score is not None
        return score.reshape(height, width), None if quality is None else quality.reshape(height, width)


CONSTRUCTIONS: list[dict[str, Any]] = [
    {},
    {"points": 2, "pose_query": "semantic", "quality": True},
    {"points": 0, "pose_query": "query"},
    {"points": 1, "pose_query": "keypoint"},
    {"pose_query": "automatic", "points": 3},
    {"pose_query": "none"},
    {"kqe": False, "pose_query": "none"},
    {"kqe": False, "pose_query": "keypoint", "quality": True},
    {"kqe": False, "pose_query": "automatic"},
]


@pytest.mark.parametrize("kwargs", CONSTRUCTIONS, ids=str)
def test_head_is_the_equations_joint_by_joint_and_pixel_by_pixel(kwargs: dict[str, Any]) -> None:
    head, levels = head_of(**kwargs), levels_of()
    with torch.no_grad():
        maps = head(levels)
        pixels = torch.tensor([[[x, y] for y in range(4) for x in range(6)]] * 2)
        moved = head.displacements(maps.joints, pixels)
        some = head.displacements(maps.joints, pixels[:, [17, 3, 3]])
    assert moved.shape == (2, 24, JOINTS, 2)
    torch.testing.assert_close(some, moved[:, [17, 3, 3]])
    for image in range(2):
        naive = Naive(head, levels, image)
        expected = [[naive.displacement(joint, x, y) for joint in range(JOINTS)] for x, y in pixels[0].tolist()]
        assert np.abs(expected).max() > 2  # some of the places lie between pixels, and outside
        np.testing.assert_allclose(moved[image], expected, atol=1e-4)
        for found, wanted in zip((maps.score, maps.quality), naive.maps(), strict=True):
            if wanted is None:
                assert found is None
            else:
                np.testing.assert_allclose(found[image], wanted, atol=1e-4)


def test_confidence_is_the_score_times_the_quality_in_0_to_1() -> None:
    joints = JointMaps(torch.zeros(1), None)
    score = torch.tensor([[[0.5, 0.5, -0.2, 0.8]]])
    assert CIRMaps(score, None, joints).confidence.equal(score)
    quality = torch.tensor([[[1.5, -0.5, 0.5, 0.25]]])
    torch.testing.assert_close(CIRMaps(score, quality, joints).confidence, torch.tensor([[[0.5, 0.0, -0.1, 0.2]]]))


@pytest.mark.parametrize("kqe", [True, False])
def test_branches_do_not_see_each_other(kqe: bool) -> None:
    """Another joint 1 changes the displacements to joint 1 alone."""
    head, levels = head_of(kqe=kqe, points=2, pose_query="none"), levels_of()
    pixels = torch.tensor([[[x, y] for y in range(4) for x in range(6)]] * 2)
    with torch.no_grad():
        before = head.displacements(head(levels).joints, pixels)
        layers: list[Any] = [layer for layer in (head.to_query, head.to_points, head.to_keypoint) if layer is not None]
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        for parameter in (*parameters, *head.joint_features.parameters()):
            each = len(parameter) // JOINTS
            parameter[each : 2 * each] += 0.3
        after = head.displacements(head(levels).joints, pixels)
    changed = (before != after).any(-1).any(1)[0]
    assert changed.tolist() == [False, True, False]


def test_half_precision_spares_the_displacements() -> None:
    """Under autocast the features are rounded; what is in pixels is not rounded again."""
    head, levels = head_of(points=3), levels_of()
    pixels = torch.tensor([[[300, 3], [2, 1]]] * 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        joints = head(levels).joints
        moved = head.displacements(joints, pixels)
    assert joints.features.dtype == torch.bfloat16
    assert joints.to_query is not None
    assert joints.to_query.dtype == moved.dtype == torch.float32
    with torch.no_grad():
        exact = JointMaps(joints.features.float(), joints.to_query)
        queries: Any = head.to_query
        torch.testing.assert_close(joints.to_query, queries(exact.features.flatten(1, 2)).unflatten(1, (-1, 2)))
        torch.testing.assert_close(moved, head.displacements(exact, pixels))


def test_displacements_can_be_learnt_from_the_start() -> None:
    """Gradients reach every layer of a fresh head; its semantic points lie apart, so that they learn apart."""
    torch.manual_seed(0)
    head, levels = CIRHead(WIDTHS, JOINTS, points=4), levels_of(size=(8, 8))
    maps = head(levels)
    pixels = torch.tensor([[[3, 3], [4, 4]]] * 2)
    (head.displacements(maps.joints, pixels).square().sum() + (maps.score - 1).square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    points: Any = head.to_points
    places = points.bias.detach().view(JOINTS, 4, 2)
    assert all(len(places[joint].unique(dim=0)) == 4 for joint in range(JOINTS))
    assert all(len(points.bias.grad.view(JOINTS, 4, 2)[joint].unique(dim=0)) == 4 for joint in range(JOINTS))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"points": -1}, "points is -1"),
        ({"points": 2.5}, "points is 2.5"),
        ({"points": "nine"}, "points is 'nine'"),
        ({"kqe": "maybe"}, "kqe is 'maybe'"),
        ({"pose_query": "center"}, "pose_query is 'center'"),
        ({"instance_channels": 0}, "instance_channels is 0"),
        ({"semantic_points": 9}, "has no 'semantic_points'"),
        ({"num_joints": 3}, "has no 'num_joints'"),
        ({"kqe": False}, "pose_query query needs kqe"),
        ({"kqe": False, "pose_query": "semantic"}, "pose_query semantic needs kqe"),
        ({"points": 0, "pose_query": "semantic"}, "needs points of at least 1"),
    ],
)
def test_a_wrong_head_is_the_users_mistake(kwargs: dict[str, Any], said: str) -> None:
    config = ModelConfig(Named("resnet18"), Named("cir", kwargs), input=InputConfig(height=64, width=64))
    with torch.device("meta"), pytest.raises(UserError, match=r"model\.head") as raised:
        build_single_stage(config, Skeleton(name="toy", joints=("a", "b")))
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ModelConfig(Named("resnet18"), Named("simple")), "single-stage model needs one of cir"),
        (ModelConfig(Named("resnet18")), "model.head is null"),
        (ModelConfig(Named("resnet18"), Named("cir"), Named("scio")), "model.refiner"),
        (ModelConfig(Named("resnet18"), Named("cir")), "256 x 192"),
        (ModelConfig(Named("resnet18"), Named("cir"), input=InputConfig(height=80, width=80)), "multiple of 32"),
        (
            ModelConfig(Named("resnet18"), Named("cir"), input=InputConfig(height=64, width=64, alignment="udp")),
            "alignment",
        ),
    ],
)
def test_a_wrong_single_stage_model_is_the_users_mistake(config: ModelConfig, said: str) -> None:
    with torch.device("meta"), pytest.raises(UserError) as raised:
        build_single_stage(config, Skeleton(name="toy", joints=("a", "b")))
    assert said in str(raised.value)
