"""Object keypoint similarity, and what is done with poses that overlap by it. Batched torch, any device.

Keypoints and areas are in one frame (image pixels in evaluation); k = 2 sigma and s^2 = area, as pycocotools has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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
    scale = math.sqrt(8) * torch.as_tensor(sigmas, dtype=torch.float64).to(keypoints_a)  # sqrt(2) k
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
    keypoints: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor | Sequence[float],
    threshold: float = 0.9,
    *,
    image_index: Tensor | None = None,
) -> Tensor:
    """HRNet's OKS-NMS: a pose whose OKS with a better kept one of its image exceeds threshold goes.

    keypoints `[N, K, 2]`, scores `[N]`, areas `[N]` (a pair's area is their mean), sigmas `[K]`; N may be 0.
    image_index `[N]`, integers in any order, tells which image a pose is of; None: all of one. Returns the indices of
    the kept poses, images in rising order and in each the best score first (the earlier of equals).

    Like its siblings below it computes in float64 on the device of the poses, all images at once. A pose with a joint
    or an area of NaN overlaps no other; a score of NaN is the lowest.
    """
    order, filtered_by, _ = _filtered_by(keypoints, scores, areas, sigmas, threshold, image_index)
    return order[_kept(filtered_by)]


def fuse_poses(
    keypoints: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor | Sequence[float],
    threshold: float = 0.9,
    *,
    image_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """OKS-NMS whose kept poses become the OKS-weighted mean of themselves and what they filter (CCM Eq. 23).

    Arguments as in `nms`. Returns the fused keypoints `[n, K, 2]` and the indices `[n]` of the kept poses, as `nms`
    orders them. CCM calls this Soft-NMS; `soft_nms` is the score decay that goes by that name elsewhere.
    """
    order, filtered_by, weights = _filtered_by(keypoints, scores, areas, sigmas, threshold, image_index)
    kept = _kept(filtered_by)
    target, weight = filtered_by[~kept], weights[~kept, None, None]
    totals, norms = keypoints.detach()[order].double(), torch.ones_like(weights)[:, None, None]
    totals.index_add_(0, target, weight * totals[~kept])
    norms.index_add_(0, target, weight)
    return (totals[kept] / norms[kept]).to(keypoints.dtype), order[kept]


def soft_nms(
    keypoints: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor | Sequence[float],
    threshold: float = 0.9,
    max_poses: int = 20,
    *,
    image_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """HRNet's and mmpose's soft OKS-NMS: no pose goes, the others' scores decay by exp(-OKS^2 / threshold).

    Arguments as in `nms`. Returns the indices of the best `max_poses` of each image, images in rising order and in each
    the poses as they were taken, and their decayed scores (HRNet keeps only the order).
    """
    order, image = _by_image(torch.arange(len(scores), device=scores.device), image_index)
    taken, decayed = torch.full_like(order, -1), torch.empty_like(order, dtype=torch.float64)
    for positions in _batches(image):
        rows = order[positions]
        overlaps = _overlaps(keypoints[rows], areas[rows], sigmas)
        # Never 0, which would make NaN of the -inf of those taken.
        decay = overlaps.square_().div_(-max(threshold, np.spacing(1.0))).clamp_(min=-700).exp_()
        remaining = _numbers(scores[rows])
        for place in positions[:, :max_poses].T:
            best = remaining.argmax(1, keepdim=True)  # the earlier of equals
            taken[place], decayed[place] = rows.gather(1, best)[:, 0], remaining.gather(1, best)[:, 0]
            remaining *= decay.gather(1, best[..., None].expand(-1, 1, rows.shape[1]))[:, 0]
            remaining.scatter_(1, best, -math.inf)
    chosen = taken >= 0
    return taken[chosen], decayed[chosen].to(scores.dtype)


_AT_ONCE = 2**14
"""Pairs of poses treated at once: bounds the memory, and on a CPU keeps the work in its caches."""


def _filtered_by(
    keypoints: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor | Sequence[float],
    threshold: float,
    image_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the poses by image and then best first `[N]`; the position there of the kept pose that filters each,
    its own if it is kept `[N]`; and the OKS of the two `[N]`.
    """
    order, image = _by_image(_numbers(scores).argsort(descending=True, stable=True), image_index)
    filtered_by, weights = torch.empty_like(order), torch.empty_like(order, dtype=torch.float64)
    for positions in _batches(image):
        rows = order[positions]
        overlaps = _overlaps(keypoints[rows], areas[rows], sigmas)
        near = (overlaps > threshold).tril(-1)  # [B, n, n]: of a pose with each better one
        kept = torch.ones_like(rows, dtype=torch.bool)
        # A pose's fate hangs on better ones alone: after r rounds the best r are settled, and mostly all after a few.
        while not torch.equal(kept, settled := ~(near & kept[:, None]).any(-1)):
            kept = settled
        best = (near & kept[:, None]).to(torch.uint8).argmax(-1)
        best = torch.where(kept, torch.arange(rows.shape[1], device=rows.device), best)
        filtered_by[positions] = positions.gather(1, best)
        weights[positions] = overlaps.gather(2, best[..., None])[..., 0]
    return order, filtered_by, weights


def _kept(filtered_by: Tensor) -> Tensor:
    """Which poses `[N]` no other filters, by the positions of `_filtered_by`."""
    return filtered_by == torch.arange(len(filtered_by), device=filtered_by.device)


def _numbers(scores: Tensor) -> Tensor:
    """In float64, NaN as the lowest: sort and argmax take it for the highest."""
    return scores.detach().double().nan_to_num(nan=torch.finfo(torch.float64).min)


def _by_image(order: Tensor, image_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The indices sorted by image, in each image as before, and the images of these poses."""
    if image_index is None:
        return order, torch.zeros_like(order)
    image, by_image = image_index[order].sort(stable=True)
    return order[by_image], image


def _batches(image: Tensor) -> Iterator[Tensor]:
    """Positions `[B, n]` of the poses of B images with n poses each, of poses sorted by image."""
    counts = torch.unique_consecutive(image, return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        positions = starts[counts == count, None] + torch.arange(count, device=image.device)
        yield from positions.split(max(1, _AT_ONCE // count**2))


def _overlaps(keypoints: Tensor, areas: Tensor, sigmas: Tensor | Sequence[float]) -> Tensor:
    """`oks` `[B, n, n]` of the poses `[B, n, K, 2]` of each image with each other, every pair computed once; 0 for NaN.

    1 on the diagonal, also of a pose of NaN.
    """
    images, count, joints = keypoints.shape[:3]
    scale = math.sqrt(8) * torch.as_tensor(sigmas, dtype=torch.float64).to(keypoints.device)  # sqrt(2) k
    x, y = (keypoints.detach().double().permute(3, 0, 1, 2) / scale).contiguous()
    half = areas.detach().double() / -2
    overlaps = torch.zeros((images, count**2), dtype=torch.float64, device=keypoints.device)
    overlaps[:, :: count + 1] = 1
    pairs = torch.triu_indices(count, count, 1, device=keypoints.device)
    for first, second in pairs.split(max(1, _AT_ONCE // images), 1):
        dx = x.index_select(1, first).sub_(x.index_select(1, second))
        dy = y.index_select(1, first).sub_(y.index_select(1, second))
        area = half.index_select(1, first) + half.index_select(1, second) - np.spacing(1.0)
        exponent = dx.square_().addcmul_(dy, dy).div_(area[..., None])
        # Not below -700: there exp's results are denormal, which costs ten times all the rest.
        similarity = exponent.clamp_(min=-700).exp_().sum(-1) / joints
        similarity = torch.where(similarity > 1e-280, similarity, 0)  # NaN to 0 as well
        overlaps.index_copy_(1, first * count + second, similarity)
        overlaps.index_copy_(1, second * count + first, similarity)
    return overlaps.view(images, count, count)
