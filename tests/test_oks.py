from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from poserelay.oks import fuse_poses, nms, oks, soft_nms

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


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([0.5, 0.9]))
def test_nms_is_the_loop_over_pairs(seed: int, count: int, threshold: float) -> None:
    poses = crowd(seed, count)
    assert nms(*poses, SIGMAS, threshold).tolist() == list(naive_nms(poses, threshold))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([0.5, 0.9]))
def test_fuse_poses_is_equation_23(seed: int, count: int, threshold: float) -> None:
    poses = crowd(seed, count)
    keypoints, _, areas = (values.numpy() for values in poses)
    groups = naive_nms(poses, threshold)
    fused, kept = fuse_poses(*poses, SIGMAS, threshold)
    assert kept.tolist() == list(groups)
    assert fused.shape == (len(groups), 17, 2)
    for row, (best, filtered) in enumerate(groups.items()):
        total, weights = keypoints[best].copy(), 1.0
        for i in filtered:
            weight = pair_oks(keypoints[best], keypoints[i], (areas[best] + areas[i]) / 2)
            total, weights = total + weight * keypoints[i], weights + weight
        np.testing.assert_allclose(fused[row].numpy(), total / weights, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 12), st.integers(1, 12))
def test_soft_nms_is_the_loop_that_rescales_what_remains(seed: int, count: int, max_poses: int) -> None:
    poses = crowd(seed, count)
    keypoints, scores, areas = (values.numpy() for values in poses)
    remaining = dict(enumerate(scores.tolist()))
    expected, decayed = [], []
    while remaining and len(expected) < max_poses:
        best = max(remaining, key=lambda i: remaining[i])
        expected.append(best)
        decayed.append(remaining.pop(best))
        for i in remaining:
            similarity = pair_oks(keypoints[best], keypoints[i], (areas[best] + areas[i]) / 2)
            remaining[i] *= math.exp(-(similarity**2) / 0.9)
    kept, new_scores = soft_nms(*poses, SIGMAS, 0.9, max_poses)
    assert kept.tolist() == expected
    np.testing.assert_allclose(new_scores.numpy(), decayed, rtol=1e-9)


def test_equal_scores_keep_the_earlier_pose() -> None:
    keypoints, _, areas = crowd(0, 1)
    twice = torch.cat((keypoints, keypoints))
    assert nms(twice, torch.tensor([0.5, 0.5]), areas.expand(2), SIGMAS).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_callers_dtype(dtype: torch.dtype) -> None:
    keypoints, scores, areas = (values.to(dtype) for values in crowd(0, 8))
    assert oks(keypoints, keypoints, areas, SIGMAS).dtype == dtype
    fused, kept = fuse_poses(keypoints, scores, areas, SIGMAS)
    assert fused.dtype == dtype
    assert kept.dtype == torch.long
    assert soft_nms(keypoints, scores, areas, SIGMAS)[1].dtype == dtype
