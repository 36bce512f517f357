from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from poserelay.oks import fuse_poses, nms, oks, oks_of_pairs, soft_nms

SIGMAS = torch.linspace(0.025, 0.107, 17, dtype=torch.float64)
Poses = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def crowd(seed: int, count: int) -> Poses:
    """Poses around few persons, so that many overlap: keypoints, scores, areas."""
    rng = np.random.default_rng(seed)
    persons = rng.uniform(0, 300, (3, 1, 2)) + rng.uniform(-60, 60, (3, 17, 2))
    spread = rng.choice([1.0, 6.0, 12.0], (count, 1, 1))
    keypoints = persons[rng.integers(0, 3, count)] + spread * rng.normal(size=(count, 17, 2))
    scores, areas = rng.random(count), rng.uniform(80, 120, count) ** 2
    return torch.from_numpy(keypoints), torch.from_numpy(scores), torch.from_numpy(areas)


def pair_oks(pose: np.ndarray, other: np.ndarray, area: float) -> float:
    """One pair, joint by joint."""
    terms = []
    for joint, sigma in enumerate(SIGMAS.tolist()):
        distance = (pose[joint, 0] - other[joint, 0]) ** 2 + (pose[joint, 1] - other[joint, 1]) ** 2
        terms.append(math.exp(-distance / (2 * area * (2 * sigma) ** 2)))
    return sum(terms) / len(terms)


def test_oks_is_pycocotools() -> None:
    rng = np.random.default_rng(0)
    truths, results = rng.uniform(0, 100, (4, 17, 2)), []
    visibility = rng.integers(0, 3, (4, 17))
    visibility[:, 0] = 2
    areas = rng.uniform(1000, 5000, 4)
    annotations = [
        {
            "id": person + 1,
            "image_id": 1,
            "category_id": 1,
            "iscrowd": 0,
            "area": areas[person],
            "bbox": [0, 0, 100, 100],
            "num_keypoints": int((visibility[person] > 0).sum()),
            "keypoints": np.concatenate((truths[person], visibility[person, :, None]), -1).ravel().tolist(),
        }
        for person in range(4)
    ]
    coco: Any = COCO()
    coco.dataset = {"images": [{"id": 1}], "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    coco.createIndex()
    predictions = truths[[0, 1, 2, 3, 0]] + rng.normal(0, 8, (5, 17, 2))
    for index, pose in enumerate(predictions):
        flat = np.concatenate((pose, np.ones((17, 1))), -1).ravel().tolist()
        results.append({"image_id": 1, "category_id": 1, "keypoints": flat, "score": 1 - index / 10})
    evaluation: Any = COCOeval(coco, coco.loadRes(results), "keypoints")
    evaluation.params.kpt_oks_sigmas = SIGMAS.numpy()
    evaluation._prepare()
    predicted, truth, area = (torch.from_numpy(array) for array in (predictions, truths, areas))
    ours = oks(predicted, truth, area, SIGMAS, torch.from_numpy(visibility))
    np.testing.assert_allclose(ours.numpy(), evaluation.computeOks(1, 1), rtol=1e-12)


def test_oks_by_hand() -> None:
    """At a distance of s k on every joint, OKS is exp(-1/2); at 0 it is 1."""
    truth = torch.zeros(1, 2, 2)
    away = torch.tensor([[[10 * 0.2, 0], [0, -10 * 0.4]]])
    similarity = oks(torch.cat((away, truth)), truth, torch.tensor([100.0]), [0.1, 0.2])
    torch.testing.assert_close(similarity, torch.tensor([[math.exp(-0.5)], [1.0]]))


def test_oks_ignores_unlabelled_joints() -> None:
    truth = torch.tensor([[[0.0, 0.0], [math.nan, math.nan]], [[0.0, 0.0], [0.0, 0.0]]])
    visibility = torch.tensor([[2, 0], [0, 0]])
    assert oks(torch.zeros(1, 2, 2), truth, torch.tensor([9.0, 9.0]), [0.1, 0.1], visibility).tolist() == [[1, 0]]


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**31))
def test_oks_of_pairs_is_each_pair_joint_by_joint(seed: int) -> None:
    """CIR's Eq. 1, of what several pixels predict for each person of several images; a person may have no joint."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0, 60, (2, 3, 1, 17, 2))
    predicted = truth + rng.normal(0, rng.choice([0.0, 2.0, 9.0]), (2, 3, 4, 17, 2))
    areas, visibility = rng.uniform(50, 900, (2, 3, 1)), rng.integers(0, 3, (2, 3, 1, 17))
    visibility[0, 0] = 0
    a, b, scale, labels = (torch.from_numpy(array) for array in (predicted, truth, areas, visibility))
    found = oks_of_pairs(a, b, scale, SIGMAS, labels)
    assert found.shape == (2, 3, 4)
    for image, person, pixel in np.ndindex(2, 3, 4):
        terms = []
        for joint, sigma in enumerate(SIGMAS.tolist()):
            if visibility[image, person, 0, joint] > 0:
                x, y = predicted[image, person, pixel, joint] - truth[image, person, 0, joint]
                terms.append(math.exp(-(x**2 + y**2) / (2 * areas[image, person, 0] * (2 * sigma) ** 2)))
        expected = sum(terms) / len(terms) if terms else 0
        assert found[image, person, pixel].item() == pytest.approx(expected, rel=1e-12)
    one, other, area, labelled = (torch.from_numpy(array[1, 1]) for array in (predicted, truth, areas, visibility))
    expected = oks(one, other, area, SIGMAS, labelled)[:, 0]
    torch.testing.assert_close(found[1, 1], expected, rtol=1e-12, atol=0)


def test_oks_of_pairs_takes_no_harm_from_unlabelled_joints_and_no_area() -> None:
    truth = torch.tensor([[[3.0, 4.0], [math.nan, math.nan]], [[3.0, 4.0], [5.0, 5.0]]])
    predicted = torch.tensor([[3.0, 4.0], [5.0, 6.0]]).expand(2, 2, 2)
    visibility = torch.tensor([[1, 0], [2, 2]])
    assert oks_of_pairs(predicted, truth, torch.tensor([0.0, 0.0]), [0.1, 0.1], visibility).tolist() == [1, 0.5]


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 10), st.floats(-500, 500))
def test_oks_does_not_depend_on_place_or_scale(seed: int, scale: float, offset: float) -> None:
    keypoints, _, areas = crowd(seed, 6)
    moved = scale * keypoints + offset
    expected = oks(keypoints, keypoints, areas, SIGMAS)
    torch.testing.assert_close(oks(moved, moved, scale**2 * areas, SIGMAS), expected, atol=1e-8, rtol=0)


def naive_nms(poses: Poses, threshold: float) -> dict[int, list[int]]:
    """Kept poses with what each filtered, a pair at a time."""
    keypoints, scores, areas = (values.numpy() for values in poses)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    kept = {}
    while order:
        best = order.pop(0)
        similarity = {i: pair_oks(keypoints[best], keypoints[i], (areas[best] + areas[i]) / 2) for i in order}
        kept[best] = [i for i in order if similarity[i] > threshold]
        order = [i for i in order if similarity[i] <= threshold]
    return kept


def naive_fusion(poses: Poses, threshold: float) -> dict[int, np.ndarray]:
    """CCM's Eq. 23: kept poses with what they become."""
    keypoints, _, areas = (values.numpy() for values in poses)
    fused = {}
    for best, filtered in naive_nms(poses, threshold).items():
        total, weights = keypoints[best].copy(), 1.0
        for i in filtered:
            weight = pair_oks(keypoints[best], keypoints[i], (areas[best] + areas[i]) / 2)
            total, weights = total + weight * keypoints[i], weights + weight
        fused[best] = total / weights
    return fused


def naive_soft_nms(poses: Poses, threshold: float, max_poses: int) -> dict[int, float]:
    """Poses as they are taken, with their decayed scores."""
    keypoints, scores, areas = (values.numpy() for values in poses)
    remaining = dict(enumerate(scores.tolist()))
    taken: dict[int, float] = {}
    while remaining and len(taken) < max_poses:
        best = max(remaining, key=lambda i: remaining[i])
        taken[best] = remaining.pop(best)
        for i in remaining:
            similarity = pair_oks(keypoints[best], keypoints[i], (areas[best] + areas[i]) / 2)
            remaining[i] *= math.exp(-(similarity**2) / threshold)
    return taken


def image_by_image(poses: Poses, image_index: torch.Tensor) -> Iterator[tuple[list[int], Poses]]:
    """Rows and poses of each image, images in rising order."""
    for image in sorted(set(image_index.tolist())):
        rows = [row for row, other in enumerate(image_index.tolist()) if other == image]
        yield rows, (poses[0][rows], poses[1][rows], poses[2][rows])


@st.composite
def crowds(draw: st.DrawFn) -> tuple[Poses, torch.Tensor | None]:
    """Poses of one image (None) or of several in any order; half of the time with scores that are equal or negative."""
    poses = crowd(draw(st.integers(0, 2**31)), draw(st.integers(0, 14)))
    if draw(st.booleans()):
        keypoints, scores, areas = poses
        poses = (keypoints, (5 * scores).round() / 5 - 0.4, areas)
    images = st.lists(st.sampled_from([-1, 0, 7, 2**40]), min_size=len(poses[1]), max_size=len(poses[1]))
    return poses, draw(st.none() | images.map(lambda drawn: torch.tensor(drawn, dtype=torch.long)))


def images_of(poses: Poses, image_index: torch.Tensor | None) -> list[tuple[list[int], Poses]]:
    if image_index is None:
        image_index = torch.zeros(len(poses[1]), dtype=torch.long)
    return list(image_by_image(poses, image_index))


@settings(deadline=None, max_examples=40)
@given(crowds(), st.sampled_from([0.5, 0.9]))
def test_nms_is_the_loop_over_pairs(case: tuple[Poses, torch.Tensor | None], threshold: float) -> None:
    poses, image_index = case
    expected = [rows[i] for rows, image in images_of(*case) for i in naive_nms(image, threshold)]
    assert nms(*poses, SIGMAS, threshold, image_index=image_index).tolist() == expected


@settings(deadline=None, max_examples=40)
@given(crowds(), st.sampled_from([0.5, 0.9]))
def test_fuse_poses_is_equation_23(case: tuple[Poses, torch.Tensor | None], threshold: float) -> None:
    poses, image_index = case
    expected = {rows[i]: pose for rows, im in images_of(*case) for i, pose in naive_fusion(im, threshold).items()}
    fused, kept = fuse_poses(*poses, SIGMAS, threshold, image_index=image_index)
    assert kept.tolist() == list(expected)
    np.testing.assert_allclose(fused.numpy(), np.reshape(list(expected.values()), (-1, 17, 2)), atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(crowds(), st.integers(1, 12))
def test_soft_nms_is_the_loop_that_rescales_what_remains(
    case: tuple[Poses, torch.Tensor | None], max_poses: int
) -> None:
    poses, image_index = case
    expected = [
        (rows[i], score) for rows, im in images_of(*case) for i, score in naive_soft_nms(im, 0.9, max_poses).items()
    ]
    kept, decayed = soft_nms(*poses, SIGMAS, 0.9, max_poses, image_index=image_index)
    assert kept.tolist() == [row for row, _ in expected]
    np.testing.assert_allclose(decayed.numpy(), [score for _, score in expected], rtol=1e-9)


def test_many_images_and_one_of_many_poses() -> None:
    """More than is treated at once, in images and in pairs of one image: still as image by image."""
    generator = torch.Generator().manual_seed(0)
    sizes = [2] * 5000 + [1] * 10 + [250]
    image_index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    image_index = image_index[torch.randperm(len(image_index), generator=generator)]
    persons = 300 * torch.rand(len(sizes), 1, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(image_index), 17, 2, generator=generator, dtype=torch.float64)
    keypoints = persons[image_index] + 4 * noise
    scores = torch.rand(len(image_index), generator=generator, dtype=torch.float64)
    areas = torch.full_like(scores, 1e4)
    kept = nms(keypoints, scores, areas, SIGMAS, 0.8, image_index=image_index)
    fused, fused_of = fuse_poses(keypoints, scores, areas, SIGMAS, 0.8, image_index=image_index)
    order, decayed = soft_nms(keypoints, scores, areas, SIGMAS, 0.8, image_index=image_index)
    assert fused_of.equal(kept)
    assert len(order) == sum(min(size, 20) for size in sizes)
    # `oks` on the pairs of 2; the scores by hand.
    alone = {image: [] for image in range(5000)}
    for row, image in enumerate(image_index.tolist()):
        if image < 5000:
            alone[image].append(row)
    pairs = torch.tensor(list(alone.values()))
    pairs = pairs.gather(1, scores[pairs].argsort(1, descending=True))
    scale = (2 * SIGMAS)[:, None]
    apart = ((keypoints[pairs[:, 0]] - keypoints[pairs[:, 1]]) / scale).square().sum(-1)
    overlap = (-apart / 2e4).exp().mean(-1)
    gone = overlap > 0.8
    assert 0 < gone.sum() < 5000
    is_kept = torch.zeros(len(scores), dtype=torch.bool)
    is_kept[kept] = True
    assert is_kept[pairs[:, 0]].all()
    assert is_kept[pairs[:, 1]].equal(~gone)
    of_row = torch.full((len(scores),), math.nan, dtype=torch.float64)
    of_row[order] = decayed
    torch.testing.assert_close(of_row[pairs[:, 1]], scores[pairs[:, 1]] * (-overlap.square() / 0.8).exp())
    # The crowded image alone, and by its OKS matrix.
    rows = (image_index == len(sizes) - 1).nonzero()[:, 0]
    similarity = oks(keypoints[rows], keypoints[rows], areas[rows], SIGMAS)
    best_first, expected = scores[rows].argsort(descending=True).tolist(), []
    for pose in best_first:
        if not any(similarity[pose, other] > 0.8 for other in expected):
            expected.append(pose)
    assert 1 < len(expected) < 250
    assert kept[-len(expected) :].tolist() == rows[expected].tolist()
    assert fused[-len(expected) :].isfinite().all()


def test_equal_scores_keep_the_earlier_pose() -> None:
    keypoints, _, areas = crowd(0, 1)
    thrice, scores = keypoints.expand(3, -1, -1), torch.full((3,), -0.5)
    assert nms(thrice, scores, areas.expand(3), SIGMAS).tolist() == [0]
    assert nms(thrice, scores, areas.expand(3), SIGMAS, image_index=torch.tensor([1, 0, 1])).tolist() == [1, 0]
    fused, kept = fuse_poses(thrice, scores, areas.expand(3), SIGMAS)
    assert kept.tolist() == [0]
    torch.testing.assert_close(fused, keypoints)
    assert soft_nms(thrice, -scores, areas.expand(3), SIGMAS)[0].tolist() == [0, 1, 2]


def test_an_oks_of_one_is_not_above_a_threshold_of_one() -> None:
    for joints in range(1, 70):  # a mean as a product with 1 / K may exceed 1
        twice = torch.ones(2, joints, 2)
        assert nms(twice, torch.ones(2), torch.ones(2), [0.1] * joints, 1.0).tolist() == [0, 1]


def test_poses_without_an_area_overlap_their_likes_alone() -> None:
    keypoints = torch.tensor([5.0, 5.0, 5.0001])[:, None, None].expand(3, 17, 2)
    scores, areas = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3)
    assert nms(keypoints, scores, areas, SIGMAS, 0.0).tolist() == [0, 2]
    assert fuse_poses(keypoints, scores, areas, SIGMAS)[0].equal(keypoints[[0, 2]])
    order, decayed = soft_nms(keypoints, scores, areas, SIGMAS)
    assert order.tolist() == [0, 2, 1]
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.7, 0.8 * math.exp(-1 / 0.9)]))


def test_soft_nms_at_a_threshold_of_zero_takes_every_pose_once() -> None:
    keypoints = torch.tensor([0.0, 0.0, 900.0, 0.0])[:, None, None].expand(4, 17, 2)
    order, decayed = soft_nms(keypoints, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.ones(4), SIGMAS, 0.0)
    assert order.tolist() == [0, 2, 1, 3]
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.7, 0.0, 0.0]))


@pytest.mark.parametrize("damaged", ["joint", "area"])
def test_a_damaged_pose_overlaps_no_other(damaged: str) -> None:
    """It stays as it is, and the others are treated as without it."""
    keypoints, scores, areas = crowd(3, 12)
    scores[4] = 2  # the best, so that it would be the first to filter
    if damaged == "area":
        areas[4] = math.nan
    else:
        keypoints[4, 2, 0] = math.nan
    others = torch.tensor([row for row in range(12) if row != 4])
    without = (keypoints[others], scores[others], areas[others])
    assert len(nms(*without, SIGMAS, 0.5)) < 11
    assert nms(keypoints, scores, areas, SIGMAS, 0.5).tolist() == [4, *others[nms(*without, SIGMAS, 0.5)].tolist()]
    fused, kept = fuse_poses(keypoints, scores, areas, SIGMAS, 0.5)
    assert kept[0] == 4
    torch.testing.assert_close(fused[0], keypoints[4], equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(fused[1:], fuse_poses(*without, SIGMAS, 0.5)[0])
    order, decayed = soft_nms(keypoints, scores, areas, SIGMAS, 0.5)
    expected, of_others = soft_nms(*without, SIGMAS, 0.5)
    assert order.tolist() == [4, *others[expected].tolist()]
    torch.testing.assert_close(decayed[1:], of_others)


def test_a_score_of_nan_is_the_lowest() -> None:
    keypoints, _, areas = crowd(0, 1)
    twice, scores = keypoints.expand(2, -1, -1), torch.tensor([math.nan, -3.0])
    assert nms(twice, scores, areas.expand(2), SIGMAS).tolist() == [1]
    assert soft_nms(twice, scores, areas.expand(2), SIGMAS)[0].tolist() == [1, 0]


def test_arguments_stay_as_they_are() -> None:
    poses, image_index = crowd(1, 9), torch.arange(9) % 2
    before = [values.clone() for values in (*poses, image_index)]
    for treat in (nms, fuse_poses, soft_nms):
        treat(*poses, SIGMAS, 0.5, image_index=image_index)
    for values, copy in zip((*poses, image_index), before, strict=True):
        assert values.equal(copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_callers_dtype(dtype: torch.dtype) -> None:
    keypoints, scores, areas = (values.to(dtype) for values in crowd(0, 8))
    assert oks(keypoints, keypoints, areas, SIGMAS).dtype == dtype
    fused, kept = fuse_poses(keypoints, scores, areas, SIGMAS)
    assert fused.dtype == dtype
    assert kept.dtype == torch.long
    assert soft_nms(keypoints, scores, areas, SIGMAS)[1].dtype == dtype


def test_a_negative_area_is_none_and_a_score_of_nan_stays_a_number() -> None:
    keypoints = torch.arange(5.0)[:, None, None].expand(5, 3, 2) * 50
    areas = torch.tensor([-1e4, 100.0, 100.0, -5.0, 100.0])
    assert nms(keypoints, torch.rand(5), areas, [0.1] * 3).sort().values.tolist() == [0, 1, 2, 3, 4]
    scores = torch.tensor([0.5, float("nan"), 0.2, 0.1, 0.3])
    order, decayed = soft_nms(keypoints, scores, areas, [0.1] * 3)
    assert order.tolist() == [0, 4, 2, 3, 1]
    assert decayed.isfinite().all()
