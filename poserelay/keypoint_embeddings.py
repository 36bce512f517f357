"""One vector per visible joint, from a pose model's backbone, and how well these vectors tell joints apart (ICON)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .backbones.penultimate import penultimate_level, with_penultimate
from .datasets.sampling import worker_init
from .datasets.topdown import TopDownDataset, collate
from .embeddings import evaluating
from .errors import CheckFailed
from .geometry import apply_affine, box_to_affine
from .heatmaps import input_to_heatmap
from .model import PoseModel
from .neighbours import nearest, unit


class Points(NamedTuple):
    """Which joints P points are, of which persons; no joint of a person is there twice."""

    joints: Tensor
    """`[P]` int64, in 0..K - 1."""
    persons: Tensor
    """`[P]` int64."""


class Shares(NamedTuple):
    """For each of P points a share in 0..1 of its neighbours, NaN where the joint has no mirror joint."""

    same: Tensor
    """`[P]` float64: the same joint."""
    mirror: Tensor
    """`[P]` float64: its mirror joint, left for right."""


def sample_at(maps: Tensor, xy: Tensor) -> Tensor:
    """Vectors `[B, K, C]` of the maps `[B, C, h, w]` at `xy` `[B, K, 2]`, map pixels: bilinear, exact on a pixel.

    Outside the outermost pixels' centres the border is repeated.
    """
    height, width = maps.shape[-2:]
    x, y = xy[..., 0].clamp(0, width - 1), xy[..., 1].clamp(0, height - 1)
    left, top = x.floor().long(), y.floor().long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    flat = maps.flatten(2).transpose(1, 2)

    def at(column: Tensor, row: Tensor) -> Tensor:
        return flat.gather(1, (row * width + column)[..., None].expand(-1, -1, flat.shape[2]))

    across, down = (x - left)[..., None].to(maps.dtype), (y - top)[..., None].to(maps.dtype)
    above = at(left, top).lerp(at(right, top), across)
    below = at(left, bottom).lerp(at(right, bottom), across)
    return above.lerp(below, down)


def visible_joints(dataset: TopDownDataset) -> np.ndarray:
    """`[N, K]` bool: the joints of the persons that are labelled visible (2) and lie on a pixel of the crop."""
    height, width = dataset.size
    affines = box_to_affine(dataset.boxes, dataset.size, padding=dataset.padding, alignment=dataset.alignment)
    xy = apply_affine(affines, dataset.keypoints)
    inside = (xy >= -0.5) & (xy <= np.array([width, height]) - 0.5)
    return (dataset.visibility == 2) & inside.all(-1)


def embed_joints(
    model: PoseModel,
    dataset: TopDownDataset,
    rows: np.ndarray,
    taken: np.ndarray,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> Tensor:
    """Embed joints of persons with the model's backbone, on its device, in eval mode and fp32.

    Args:
        dataset: crops for this model; its joints may be others than the model's.
        rows: `[n]`, indices of the persons.
        taken: `[n, K]` bool, their joints to embed.
        progress: show a bar on a terminal.

    Returns:
        `[P, C]` float32 on the CPU, one for each True of `taken`, row by row, of length 1 (`neighbours.unit`).

    Raises:
        UnreadableImage: a picture that cannot be read.
        CheckFailed: a vector is not finite.
    """
    loader = DataLoader(
        Subset(dataset, rows.tolist()),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # a loader would otherwise draw its workers' seed from the global one
    )
    device = next(model.parameters()).device
    wanted = torch.from_numpy(taken).split(batch_size)
    vectors = [torch.empty(0, model.backbone.channels[penultimate_level(model.backbone)])]
    with evaluating(model), torch.inference_mode():
        bar = tqdm(loader, "embed", unit="batch", leave=False, disable=None if progress else True)
        for batch, mask in zip(bar, wanted, strict=True):
            images = model.preprocess(batch.images.to(device, non_blocking=True))
            maps = with_penultimate(model.backbone, images)[1].float()
            input_size = (batch.images.shape[-2], batch.images.shape[-1])
            map_size = (maps.shape[-2], maps.shape[-1])
            xy = input_to_heatmap(batch.keypoints.to(device), input_size, map_size, model.input.alignment)
            vectors.append(sample_at(maps, xy).cpu()[mask])
    try:
        return unit(torch.cat(vectors))
    except ValueError as error:
        raise CheckFailed(
            f"the backbone's output holds NaN or infinity ({error}); its weights are damaged, or diverged in training"
        ) from error


def neighbouring_joints(vectors: Tensor, points: Points, k: int) -> Tensor:
    """Joints `[P, k]` of the k vectors of other persons most similar to each of `vectors` `[P, C]`, nearest first.

    Raises:
        ValueError: k is not in 1..(the points of all other persons, where these are fewest).
    """
    own = points.persons.bincount().max()
    if k < 1 or len(vectors) - own < k:
        raise ValueError(f"k is {k}, expected at least 1 and at most the {len(vectors) - own} joints of other persons")
    # so many that k are left without the person's own
    _, index = nearest(vectors, vectors, min(len(vectors), k + int(own)))
    is_own = points.persons[index] == points.persons[:, None]
    others_first = is_own.int().sort(dim=1, stable=True).indices
    return points.joints[index.gather(1, others_first)[:, :k]]


def retrieved(vectors: Tensor, points: Points, k: int, flip_index: Sequence[int]) -> Shares:
    """Shares of the k nearest of other persons; `flip_index` names for each joint its mirror joint, or itself.

    Raises as `neighbouring_joints`.
    """
    found = neighbouring_joints(vectors, points, k)
    mirror = _mirror(points, flip_index)
    same = (found == points.joints[:, None]).double().mean(1)
    mirrored = (found == mirror[:, None]).double().mean(1)
    return Shares(same, mirrored.where(mirror != points.joints, torch.nan))


def by_chance(points: Points, flip_index: Sequence[int]) -> Shares:
    """What `retrieved` gives on average where the neighbours are drawn at random from the other persons' points."""
    mirror = _mirror(points, flip_index)
    has = _holdings(points, len(flip_index))
    others = len(points.joints) - has.sum(1)[points.persons]
    same = (has.sum(0)[points.joints] - 1) / others
    mirrored = (has.sum(0)[mirror] - has[points.persons, mirror]) / others
    return Shares(same, mirrored.where(mirror != points.joints, torch.nan))


def at_best(points: Points, k: int) -> Tensor:
    """The largest possible `retrieved(...).same`, `[P]` float64: below 1 where fewer than k others show the joint."""
    return (points.joints.bincount()[points.joints] - 1).clamp(max=k).double() / k


def mean_cosines(vectors: Tensor, points: Points) -> tuple[float, float]:
    """Mean cosine similarity of two persons' same joint and of their different joints, over all pairs; NaN without any.

    `vectors` `[P, C]` are of length 1. Sums of vectors stand for the pairs, so that no `[P, P]` matrix is made.
    """
    exact = vectors.double()
    of_joint = exact.new_zeros(int(points.joints.max()) + 1, exact.shape[1]).index_add_(0, points.joints, exact)
    of_person = exact.new_zeros(int(points.persons.max()) + 1, exact.shape[1]).index_add_(0, points.persons, exact)
    alone = exact.square().sum()
    joint_sizes, person_sizes = points.joints.bincount().double(), points.persons.bincount().double()
    size = float(len(vectors))
    same = of_joint.square().sum() - alone
    same_pairs = joint_sizes.square().sum() - size
    different = exact.sum(0).square().sum() - of_joint.square().sum() - of_person.square().sum() + alone
    different_pairs = size**2 - joint_sizes.square().sum() - person_sizes.square().sum() + size
    return (
        float(same / same_pairs) if same_pairs else math.nan,
        float(different / different_pairs) if different_pairs else math.nan,
    )


def _mirror(points: Points, flip_index: Sequence[int]) -> Tensor:
    return torch.tensor(flip_index)[points.joints]


def _holdings(points: Points, joints: int) -> Tensor:
    """`[persons, joints]` float64: 1 where a person's joint is among the points."""
    has = torch.zeros(int(points.persons.max()) + 1, joints, dtype=torch.float64)
    has[points.persons, points.joints] = 1.0
    return has
