"""Object keypoint similarity, and what is done with poses that overlap by it. Batched torch, any device.

Keypoints and areas are in one frame (image pixels in evaluation); k = 2 sigma and s^2 = area, as pycocotools has it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def oks(
    keypoints_a: Tensor,
    keypoints_b: Tensor,
    areas: Tensor,
    sigmas: Tensor | Sequence[float],
    visibility: Tensor | None = None,
) -> Tensor:
    """Mean over the joints of exp(-d^2 / (2 s^2 k^2)), `[N, M]`.

    keypoints_a `[N, K, 2]` (predictions) and keypoints_b `[M, K, 2]` (ground truth) in the same pixels; areas `[M]` or
    `[N, M]` in those pixels squared; sigmas `[K]`; visibility `[M, K]` restricts the mean to the joints of b where it
    is > 0. A pose of b without any such joint has OKS 0 (pycocotools measures the distance to its box there).
    """
    # Joints first and x apart from y: sums over a short last axis are slow on the CPU.
    scale = math.sqrt(8) * torch.as_tensor(sigmas).to(keypoints_a)  # sqrt(2) k
    x_a, y_a = (keypoints_a / scale[:, None]).permute(2, 1, 0)  # [K, N]
    x_b, y_b = (keypoints_b / scale[:, None]).permute(2, 1, 0)  # [K, M]
    distance = (x_a[:, :, None] - x_b[:, None]).square() + (y_a[:, :, None] - y_b[:, None]).square()  # [K, N, M]
    similarity = torch.exp(-distance / (areas + np.spacing(1.0)))
    if visibility is None:
        return similarity.mean(0)
    labelled = (visibility > 0).T  # [K, M]
    # Not a product with the mask: the coordinates of an unlabelled joint may be NaN.
    return torch.where(labelled[:, None], similarity, 0).sum(0) / labelled.sum(0).clamp(min=1)


def nms(
    keypoints: Tensor, scores: Tensor, areas: Tensor, sigmas: Tensor | Sequence[float], threshold: float = 0.9
) -> Tensor:
    """HRNet's OKS-NMS over the poses of one image: a pose whose OKS with a better kept one exceeds threshold goes.

    keypoints `[N, K, 2]`, scores `[N]`, areas `[N]` (a pair's area is their mean), sigmas `[K]`; N may be 0. Returns
    the indices of the kept poses, best score first (the earlier of equals), on the device of the scores. Like its
    siblings below it computes on the CPU in float64: the choice is sequential.
    """
    kept = _kept_with_filtered(_pairwise_oks(keypoints, areas, sigmas), scores, threshold)
    return torch.tensor(list(kept), dtype=torch.long, device=scores.device)


def fuse_poses(
    keypoints: Tensor, scores: Tensor, areas: Tensor, sigmas: Tensor | Sequence[float], threshold: float = 0.9
) -> tuple[Tensor, Tensor]:
    """OKS-NMS whose kept poses become the OKS-weighted mean of themselves and what they filter (CCM Eq. 23).

    Arguments as in `nms`. Returns the fused keypoints `[n, K, 2]` and the indices `[n]` of the kept poses, best first.
    CCM calls this Soft-NMS; `soft_nms` is the score decay that goes by that name elsewhere.
    """
    overlaps = _pairwise_oks(keypoints, areas, sigmas)
    kept = _kept_with_filtered(overlaps, scores, threshold)
    weights = np.zeros((len(kept), len(overlaps)))
    for row, (pose, filtered) in enumerate(kept.items()):
        weights[row, [pose, *filtered]] = overlaps[pose, [pose, *filtered]]
    weights /= weights.sum(-1, keepdims=True)
    fused = np.tensordot(weights, _on_cpu(keypoints), 1)
    return torch.from_numpy(fused).to(keypoints), torch.tensor(list(kept), dtype=torch.long, device=scores.device)


def soft_nms(
    keypoints: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor | Sequence[float],
    threshold: float = 0.9,
    max_poses: int = 20,
) -> tuple[Tensor, Tensor]:
    """HRNet's and mmpose's soft OKS-NMS: no pose goes, the others' scores decay by exp(-OKS^2 / threshold).

    Arguments as in `nms`. Returns the indices of the best `max_poses` in the order they were taken, and their decayed
    scores (HRNet keeps only the order).
    """
    decay = np.exp(-np.square(_pairwise_oks(keypoints, areas, sigmas)) / threshold)
    remaining = _on_cpu(scores)
    order: list[int] = []
    taken: list[float] = []
    for _ in range(min(max_poses, len(remaining))):
        best = int(remaining.argmax())
        order.append(best)
        taken.append(float(remaining[best]))
        remaining = remaining * decay[best]
        remaining[best] = -np.inf
    return torch.tensor(order, dtype=torch.long, device=scores.device), scores.new_tensor(taken)


def _on_cpu(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


# Its own 10 microseconds are a fifth of an image's NMS.
_pairs = functools.lru_cache(maxsize=128)(np.triu_indices)


def _pairwise_oks(keypoints: Tensor, areas: Tensor, sigmas: Tensor | Sequence[float]) -> np.ndarray:
    """`oks` of the poses with each other, `[N, N]`. In numpy: a few poses are too small a job for torch's dispatch."""
    count = len(keypoints)
    first, second = _pairs(count, 1)
    area = _on_cpu(areas)
    scale = np.sqrt(8) * _on_cpu(torch.as_tensor(sigmas))
    scaled = np.ascontiguousarray(_on_cpu(keypoints).swapaxes(1, 2)) / scale  # [N, 2, K]
    squared = np.square(scaled[first] - scaled[second])  # [pairs, 2, K]
    exponent = (squared[:, 0] + squared[:, 1]) / ((area[first] + area[second]) / -2 - np.spacing(1.0))[:, None]
    overlaps = np.eye(count)
    overlaps[first, second] = overlaps[second, first] = np.exp(exponent).mean(-1)
    return overlaps


def _kept_with_filtered(overlaps: np.ndarray, scores: Tensor, threshold: float) -> dict[int, list[int]]:
    """Greedy selection: each kept pose, best first, with the poses it filters."""
    near: list[list[int]] = [[] for _ in range(len(overlaps))]
    for pose, other in np.argwhere(overlaps > threshold).tolist():
        near[pose].append(other)
    kept: dict[int, list[int]] = {}
    gone: set[int] = set()
    for pose in np.argsort(-_on_cpu(scores), kind="stable").tolist():
        if pose not in gone:
            gone.add(pose)
            kept[pose] = [other for other in near[pose] if other not in gone]
            gone.update(kept[pose])
    return kept
