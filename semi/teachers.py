"""Who says where the joints of an unlabelled person are: trained models, or networks that are in training themselves.

A teacher is called with a batch of unlabelled crops and answers with `Targets` for those very crops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from poserelay.batch import CropBatch
from poserelay.errors import UserError
from poserelay.heatmaps import average_flip, encode, input_to_heatmap, target_weight
from poserelay.keypoints import Skeleton, match_joints
from poserelay.model import PoseModel

from .views import resample, turn_matrices


class Targets(NamedTuple):
    """What a teacher says of B crops."""

    heatmaps: Tensor
    """`[B, K, h, w]` float32, no gradient."""
    confidence: Tensor
    """`[B, K]`, the height of the teacher's peak; NaN where it does not know the joint."""
    mask: Tensor
    """`[B, K]` float32, 1 where the joint is taught: the weight of its map in the loss."""


class Teacher(Protocol):
    """Anything that answers so; `gamma` is the confidence above which it teaches."""

    gamma: float

    def __call__(self, crops: CropBatch) -> Targets: ...


class TrainedTeacher:
    """PseudoPose (ICON Eq. 6): the heatmaps of a trained model, where their peak is above gamma.

    With `scales`, `rotations` and `flip` DataDistill (Radosavovic et al., "Data Distillation", CVPR 2018): the mean of
    the maps of the crop at every scale and rotation, each brought back to the crop first.

    Args:
        model: in eval mode, on the crops' device.
        skeleton: of the student; joints are matched by name, those that the model lacks are not taught.
        gamma: confidence above which a joint is taught.
        scales: of the crop, 1 being the crop itself.
        rotations: of the crop, degrees.
        flip: take the mean with the mirrored crop as well.

    Raises:
        UserError: the two skeletons have no joint in common.
    """

    def __init__(
        self,
        model: PoseModel,
        skeleton: Skeleton,
        *,
        gamma: float = 0.75,
        scales: Sequence[float] = (1.0,),
        rotations: Sequence[float] = (0.0,),
        flip: bool = False,
    ) -> None:
        self.model = model
        self.gamma = gamma
        self.scales = scales
        self.rotations = rotations
        self.flip = flip
        self.rows = matched_rows(model.skeleton, skeleton)

    @torch.no_grad()
    def __call__(self, crops: CropBatch) -> Targets:
        images = self.model.preprocess(crops.images)
        seen = [self._seen(images, scale, turn) for scale in self.scales for turn in self.rotations]
        # A turned view lacks the crop's corners: the mean is over the views that show a place.
        total, shown = (torch.stack(parts).sum(0) for parts in zip(*seen, strict=True))
        heatmaps = total / shown.clamp(min=0.5)
        heatmaps, known = by_joint(heatmaps, self.rows)
        confidence = torch.where(known, heatmaps.amax((-2, -1)), torch.nan)
        return Targets(heatmaps, confidence, (confidence > self.gamma).float())

    def _seen(self, images: Tensor, scale: float, turn: float) -> tuple[Tensor, Tensor]:
        """Maps `[B, K, h, w]`, in the crop's own frame, of the crop enlarged `scale` times and turned by degrees; and
        how much of each place the view shows, `[1, 1, h, w]`."""
        size, alignment = (images.shape[-2], images.shape[-1]), self.model.input.alignment
        moved = scale != 1 or turn != 0
        angle, factor = images.new_tensor([math.radians(turn)]), images.new_tensor([scale])
        view = resample(images, turn_matrices(angle, 1 / factor).expand(len(images), 2, 2), size) if moved else images
        maps = self.model(view).float()
        if self.flip:
            mirrored = self.model(view.flip(-1)).float()
            shift = 0.0 if alignment == "udp" else 1 - 1 / self.model.stride
            maps = average_flip(maps, mirrored, self.model.skeleton.flip_index, shift)
        whole = torch.ones_like(maps[:1, :1])
        if not moved:
            return maps, whole
        back = turn_matrices(-angle, factor)
        shown = resample(whole, back, size, alignment)
        return resample(maps, back.expand(len(images), 2, 2), size, alignment), shown


class StoredTeacher:
    """Gaussians at the joints that a trained model found once (`offline`), which the crops carry as labels.

    Args:
        model: the student, for the sizes of crop and heatmap.
        confidence: of those joints, `[N, K]`; a crop's `annotation_ids` is its row. NaN where they are not known.
        gamma: the confidence above which the crops carry them.
        sigma: of the Gaussians, heatmap pixels.
        quantize: round their centres to whole heatmap pixels.
    """

    def __init__(self, model: PoseModel, confidence: Tensor, *, gamma: float, sigma: float, quantize: bool) -> None:
        self.model = model
        self.confidence = confidence
        self.gamma = gamma
        self.sigma = sigma
        self.quantize = quantize

    @torch.no_grad()
    def __call__(self, crops: CropBatch) -> Targets:
        size, input = self.model.heatmap_size, self.model.input
        keypoints = input_to_heatmap(crops.keypoints, (input.height, input.width), size, input.alignment)
        heatmaps = encode(keypoints, crops.visibility, size, self.sigma, quantize=self.quantize)
        rows = torch.tensor(crops.annotation_ids, dtype=torch.int64)
        confidence = self.confidence[rows].to(heatmaps.device, non_blocking=True)
        mirrored = torch.linalg.det(crops.affine[..., :2]) < 0
        flipped = confidence[:, list(self.model.skeleton.flip_index)]
        confidence = torch.where(mirrored[:, None], flipped, confidence)
        return Targets(heatmaps, confidence, target_weight(keypoints, crops.visibility, size, self.sigma))


class NetworkTeacher:
    """A network that is in training: the student itself (PoseCons) or the other of two (PoseDual, ESCP).

    It normalises by the statistics of these crops, as the published code does; unlike there, whose batch norms also
    take the teacher's crops into their running statistics, these stay as the student's own steps make them (`compat`
    lets them be taken in).

    Args:
        model: in training mode.
        gamma: confidence above which a joint is taught; 0 teaches all, as published.
    """

    def __init__(self, model: PoseModel, *, gamma: float = 0.0, compat: bool = False) -> None:
        self.model = model
        self.gamma = gamma
        self.compat = compat

    @torch.no_grad()
    def __call__(self, crops: CropBatch) -> Targets:
        images = self.model.preprocess(crops.images)
        if self.compat:
            heatmaps = self.model(images).float()
        else:
            with running_statistics_kept(self.model):
                heatmaps = self.model(images).float()
        confidence = heatmaps.amax((-2, -1))
        mask = confidence > self.gamma if self.gamma else torch.ones_like(confidence)
        return Targets(heatmaps, confidence, mask.float())


class MeanTeacher(nn.Module):
    """Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017: the student's running mean teaches.

    Args:
        model: the student.
        decay: of the mean per step; min(decay, (1 + step) / (10 + step)) while that is smaller.
        gamma: confidence above which a joint is taught; 0 teaches all.
    """

    def __init__(self, model: PoseModel, *, decay: float = 0.999, gamma: float = 0.0) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"teacher.kwargs.decay is {decay}, expected at least 0 and below 1")
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.gamma = gamma
        self._answer = NetworkTeacher(self.model, gamma=gamma)

    def forward(self, crops: CropBatch) -> Targets:
        """The answer of the mean network."""
        return self._answer(crops)

    @torch.no_grad()
    def follow(self, model: PoseModel, step: int) -> None:
        """Take in the student's weights after optimiser step `step`; running statistics are the student's own."""
        update_momentum(model, self.model, min(self.decay, (1 + step) / (10 + step)))
        for own, other in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(other)


def matched_rows(taught: Skeleton, wanted: Skeleton) -> tuple[int | None, ...]:
    """For each joint of `wanted` its place in `taught`, by name; None where it is lacking.

    Raises UserError where none is in common.
    """
    rows = match_joints(taught.joints, wanted.joints)
    if all(row is None for row in rows):
        raise UserError(
            f"teacher_from: its skeleton {taught.name} ({', '.join(taught.joints)}) has no joint in common with "
            f"{wanted.name} ({', '.join(wanted.joints)}); take a teacher of these joints, or name them alike"
        )
    return tuple(rows)


def by_joint(heatmaps: Tensor, rows: Sequence[int | None]) -> tuple[Tensor, Tensor]:
    """Maps `[B, J, h, w]` in another order: `[B, K, h, w]`, zero where a row is None, and which are known, `[K]`."""
    known = torch.tensor([row is not None for row in rows], device=heatmaps.device)
    index = torch.tensor([row or 0 for row in rows], device=heatmaps.device)
    return heatmaps[:, index] * known[:, None, None], known


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within the `with` block batch norms in training mode leave their running statistics as they are."""
    norms: list[Any] = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    before = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracks in zip(norms, before, strict=True):
            norm.track_running_stats = tracks


# By name: (networks in training, the trained model or None; the config's kwargs) -> a teacher for each network.
def none(models: Sequence[PoseModel], trained: PoseModel | None) -> list[Teacher]:
    """Labels only."""
    return []


def pseudo(
    models: Sequence[PoseModel],
    trained: PoseModel | None,
    *,
    gamma: float = 0.75,
    offline: bool = False,
) -> list[Teacher]:
    """`TrainedTeacher` on each crop; `offline`: `StoredTeacher`, in whose place it stands until the labels are made."""
    assert trained is not None
    return [TrainedTeacher(trained, models[0].skeleton, gamma=_finite(gamma))]


def distill(
    models: Sequence[PoseModel],
    trained: PoseModel | None,
    *,
    gamma: float = 0.75,
    scales: tuple[float, ...] = (0.9, 1.0, 1.1),
    rotations: tuple[float, ...] = (-15.0, 0.0, 15.0),
) -> list[Teacher]:
    """`TrainedTeacher` over scales, rotations and mirror images."""
    assert trained is not None
    if not scales or not rotations or min(scales) <= 0:
        raise UserError(f"teacher.kwargs: scales {list(scales)} and rotations {list(rotations)}: give some, above 0")
    skeleton = models[0].skeleton
    return [TrainedTeacher(trained, skeleton, gamma=_finite(gamma), scales=scales, rotations=rotations, flip=True)]


def consistency(
    models: Sequence[PoseModel],
    trained: PoseModel | None,
    *,
    gamma: float = 0.0,
    compat: bool = False,
) -> list[Teacher]:
    """PoseCons: the network's own map of the easy view teaches it on the hard one."""
    return [NetworkTeacher(models[0], gamma=_finite(gamma), compat=compat)]


def dual(
    models: Sequence[PoseModel],
    trained: PoseModel | None,
    *,
    gamma: float = 0.0,
    compat: bool = False,
) -> list[Teacher]:
    """PoseDual: each network's map of the easy view teaches the other on the hard one."""
    return [NetworkTeacher(other, gamma=_finite(gamma), compat=compat) for other in reversed(models)]


def mean(
    models: Sequence[PoseModel],
    trained: PoseModel | None,
    *,
    decay: float = 0.999,
    gamma: float = 0.0,
) -> list[Teacher]:
    """`MeanTeacher`: its map of the easy view teaches the student on the hard one."""
    return [MeanTeacher(models[0], decay=decay, gamma=_finite(gamma))]


def _finite(gamma: float) -> float:
    if not math.isfinite(gamma):
        raise UserError(f"teacher.kwargs.gamma is {gamma}, expected a number")
    return gamma


TEACHERS: dict[str, Callable[..., list[Teacher]]] = {
    "none": none,
    "pseudo": pseudo,
    "distill": distill,
    "consistency": consistency,
    "dual": dual,
    "mean": mean,
}
