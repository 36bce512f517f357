"""Object keypoint similarity, and what is done with poses that overlap by it. Batched; tensors of any device.

Keypoints and areas are in one frame (image pixels in evaluation); k = 2 sigma and s^2 = area, as pycocotools has it.
"""

from __future__ import annotations

import functools
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


def oks_of_pairs(
    keypoints_a: Tensor, keypoints_b: Tensor, areas: Tensor, sigmas: Tensor | Sequence[float], visibility: Tensor
) -> Tensor:
    """`oks` of each pose of a with its own of b, `[...]`.

    keypoints_a and keypoints_b `[..., K, 2]`, areas `[...]` and visibility `[..., K]` of b, which may be broadcast;
    sigmas `[K]`. A pose of b without a joint whose visibility is > 0 has 0.
    """
    variance = 8 * torch.as_tensor(sigmas, dtype=torch.float64).square().to(keypoints_a)  # 2 k^2
    x, y = (keypoints_a - keypoints_b).square().unbind(-1)
    exponent = (x + y) / (variance * (areas[..., None] + np.spacing(1.0)))
    # Beyond it exp underflows, which on the CPU takes forty times as long.
    least = -1 - math.log(torch.finfo(exponent.dtype).tiny)
    labelled = visibility > 0
    counts = labelled & (exponent < least)
    similarity = torch.where(counts, torch.exp(-exponent.clamp(max=least)), 0)
    return similarity.sum(-1) / labelled.sum(-1).clamp(min=1)


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
    the kept poses, images in rising order and in each the best score first (the earlier of equals), on the device of
    the scores.

    Like its siblings below it computes in float64 on the CPU, where poses are small work for which a GPU's launches
    cost more than they save, all images at once. A pose with a joint or an area of NaN overlaps no other; a score of
    NaN is the lowest.
    """
    order, filtered_by, _ = _filtered_by(keypoints, scores, areas, sigmas, threshold, image_index)
    return torch.from_numpy(order[_kept(filtered_by)]).to(scores.device)


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
    gone = np.flatnonzero(~kept)
    totals, norms = _on_cpu(keypoints)[order], np.ones(len(order))
    np.add.at(totals, filtered_by[gone], weights[gone, None, None] * totals[gone])
    np.add.at(norms, filtered_by[gone], weights[gone])
    fused = torch.from_numpy(totals[kept] / norms[kept, None, None]).to(keypoints)
    return fused, torch.from_numpy(order[kept]).to(scores.device)


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
    order, image = _by_image(np.arange(len(scores)), image_index)
    places, areas_, numbers = _on_cpu(keypoints), _on_cpu(areas), _numbers(scores)
    taken, decayed = np.full(len(order), -1), np.empty(len(order))
    for positions in _batches(len(order), image):
        rows = order[positions]
        # Never 0, which would make NaN of the -inf of those taken.
        exponent = np.square(_overlaps(places[rows], areas_[rows], sigmas)) / -max(threshold, np.spacing(1.0))
        decay = np.exp(np.maximum(exponent, -700))
        remaining, images = numbers[rows], np.arange(len(rows))
        for place in positions[:, :max_poses].T:
            best = remaining.argmax(1)  # the earlier of equals
            taken[place], decayed[place] = rows[images, best], remaining[images, best]
            remaining *= decay[images, best]
            remaining[images, best] = -np.inf
    chosen = taken >= 0
    return torch.from_numpy(taken[chosen]).to(scores.device), torch.from_numpy(decayed[chosen]).to(scores)


_AT_ONCE = 2**12
"""Pairs of poses treated at once: bounds the memory, and keeps the work in the CPU's caches."""


def _filtered_by(
    keypoints: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor | Sequence[float],
    threshold: float,
    image_index: Tensor | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the poses by image and then best first `[N]`; the position there of the kept pose that filters each,
    its own if it is kept `[N]`; and the OKS of the two `[N]`.
    """
    order, image = _by_image(np.argsort(-_numbers(scores), kind="stable"), image_index)
    places, areas_ = _on_cpu(keypoints), _on_cpu(areas)
    filtered_by, weights = np.arange(len(order)), np.ones(len(order))
    for positions in _batches(len(order), image):
        rows = order[positions]
        overlaps = _overlaps(places[rows], areas_[rows], sigmas)
        near = (overlaps > threshold) & _better(rows.shape[1])  # [B, n, n]: of a pose with each better one
        if not near.any():
            continue
        kept = np.ones(rows.shape, dtype=bool)
        # A pose's fate hangs on better ones alone: after r rounds the best r are settled, and mostly all after a few.
        while (kept != (settled := ~np.logical_or.reduce(near & kept[:, None], axis=-1))).any():
            kept = settled
        images, gone = np.nonzero(~kept)
        best = (near & kept[:, None])[images, gone].argmax(-1)
        filtered_by[positions[images, gone]] = positions[images, best]
        weights[positions[images, gone]] = overlaps[images, gone, best]
    return order, filtered_by, weights


def _kept(filtered_by: np.ndarray) -> np.ndarray:
    """Which poses `[N]` no other filters, by the positions of `_filtered_by`."""
    return filtered_by == np.arange(len(filtered_by))


def _on_cpu(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def _numbers(scores: Tensor) -> np.ndarray:
    """In float64, NaN as the lowest: sort and argmax take it for the highest."""
    values = _on_cpu(scores)
    return np.where(np.isnan(values), np.finfo(np.float32).min, values)  # finite also as the float32 it may become


def _by_image(order: np.ndarray, image_index: Tensor | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The indices sorted by image, in each image as before, and the images of these poses; None: all of one."""
    if image_index is None:
        return order, None
    image = image_index.cpu().numpy()[order]
    by_image = image.argsort(kind="stable")
    return order[by_image], image[by_image]


def _batches(poses: int, image: np.ndarray | None) -> Iterator[np.ndarray]:
    """Positions `[B, n]` of the poses of B images with n poses each, of N poses sorted by their images `[N]`."""
    if image is None:
        yield np.arange(poses)[None]
        return
    starts = np.flatnonzero(np.diff(image, prepend=image[:1] - 1))
    counts = np.diff(starts, append=poses)
    for count in np.unique(counts).tolist():
        positions = starts[counts == count, None] + np.arange(count)
        images = max(1, _AT_ONCE // count**2)
        yield from (positions[first : first + images] for first in range(0, len(positions), images))


@functools.lru_cache(maxsize=128)
def _better(count: int) -> np.ndarray:
    """`[n, n]` bool: below the diagonal. Remembered: making it is a tenth of an image's NMS."""
    return np.tri(count, k=-1, dtype=bool)


_pairs = functools.lru_cache(maxsize=128)(np.triu_indices)


def _overlaps(keypoints: np.ndarray, areas: np.ndarray, sigmas: Tensor | Sequence[float]) -> np.ndarray:
    """`oks` `[B, n, n]` of the poses `[B, n, K, 2]` of each image with each other, every pair computed once; 0 for NaN.

    1 on the diagonal, also of a pose of NaN.
    """
    images, count, joints = keypoints.shape[:3]
    scaled = keypoints.swapaxes(2, 3) / (math.sqrt(8) * np.asarray(sigmas, dtype=np.float64))  # sqrt(2) k; [B, n, 2, K]
    half = np.maximum(areas, 0) / -2 - np.spacing(1.0) / 2
    overlaps = np.zeros((images, count * count))
    overlaps[:, :: count + 1] = 1
    first, second = _pairs(count, 1)
    step = max(1, _AT_ONCE // images)
    for begin in range(0, len(first), step):
        one, other = first[begin : begin + step], second[begin : begin + step]
        apart = scaled.take(one, 1) - scaled.take(other, 1)  # [B, pairs, 2, K]
        apart *= apart
        exponent = apart[:, :, 0] + apart[:, :, 1]
        exponent /= (half.take(one, 1) + half.take(other, 1))[..., None]
        # Not below -700: there exp's results are denormal, which costs ten times all the rest.
        np.exp(np.maximum(exponent, -700, out=exponent), out=exponent)
        similarity = exponent.sum(-1)
        similarity /= joints
        similarity[~(similarity > 1e-280)] = 0  # NaN too
        overlaps[:, one * count + other] = overlaps[:, other * count + one] = similarity
    return overlaps.reshape(images, count, count)
