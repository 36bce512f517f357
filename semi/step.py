"""What one optimiser step computes: losses of labelled and unlabelled crops under a teacher, and ICON's contrast.

All of it is one forward call, so that several processes wrap it as one network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poserelay.backbones.penultimate import penultimate_level, with_penultimate
from poserelay.batch import CropBatch
from poserelay.heads import CCMHead
from poserelay.heatmaps import decode, heatmap_to_input, input_to_heatmap
from poserelay.losses import joints_mse
from poserelay.model import PoseModel
from poserelay.supervision import auxiliary_loss, gaussian_targets

from .diagnostics import FIGURES, figures, labelled_peak
from .icon import IconLoss, ProjectionHead
from .teachers import Targets, Teacher
from .views import HardViews

TERMS = ("loss", "supervised", "labelled_peak")
UNLABELLED_TERMS = ("unlabelled", *FIGURES)
CONTRAST_TERMS = ("skcc", "prcc", "queries", "negatives")


class Seen(NamedTuple):
    """What a student made of N crops, for ICON."""

    embedded: Tensor
    """`[N, m, h', w']`."""
    joints: Tensor
    """`[N, K, 2]`, input pixels."""
    valid: Tensor
    """`[N, K]` bool."""
    predicted: Tensor
    """`[N, K, h, w]`."""
    targets: Tensor
    """`[N, K, h, w]`."""


class Answer(NamedTuple):
    """What a student makes of B crops."""

    heatmaps: Tensor
    """`[B, K, h, w]`."""
    embedded: Tensor | None
    """`[B, m, h', w']`, for ICON."""
    auxiliary: Tensor | None
    """`[B, K, h', w']`, of CCM's auxiliary decoder."""


class Student(nn.Module):
    """A pose model in training with ICON's projection head beside its heatmap head, which is never exported.

    The projection head reads the map of the penultimate stage, and so does CCM's auxiliary decoder.

    Args:
        model: the pose model.
        channels: m, of the embeddings; 0 for none.
    """

    def __init__(self, model: PoseModel, channels: int) -> None:
        super().__init__()
        self.model = model
        width = model.backbone.channels[penultimate_level(model.backbone)]
        self.projection = ProjectionHead(width, channels) if channels else None

    def forward(self, images: Tensor, *, labelled: bool) -> Answer:
        """What the model makes of normalised crops `[B, 3, H, W]`; auxiliary maps of labelled ones alone."""
        maps, penultimate = with_penultimate(self.model.backbone, images)
        auxiliary = self.model.head.auxiliary if isinstance(self.model.head, CCMHead) else None
        return Answer(
            self.model.head(maps).float(),
            None if self.projection is None else self.projection(penultimate).float(),
            None if auxiliary is None or not labelled else auxiliary([penultimate]).float(),
        )


class SemiStep(nn.Module):
    """The networks in training, their teachers, and the losses of Eq. 5-7.

    The supervised loss is the mean over the networks, the unlabelled one their sum: with two, 0.5 + 0.5 and 1 + 1 as
    Semi_Human_Pose has them.

    Args:
        students: one, or the two of PoseDual.
        teachers: one for each student; none for labels alone.
        views: makes the hard view of teachers in training; None: the student sees the crop that its teacher saw.
        contrast: `icon_loss` with its settings, or None without ICON.
        lambda_p: weight of the contrast (Eq. 5 and 7).
        icon_gamma: confidence above which an unlabelled joint is contrasted.
        lambda_u: weight of the unlabelled loss.
        sigma: of the target Gaussians, heatmap pixels.
        quantize: round their centres to whole heatmap pixels.
        auxiliary_weight: lambda of CCM's Eq. 9, of the labelled crops' auxiliary maps where the head has them.
    """

    def __init__(
        self,
        students: Sequence[Student],
        teachers: Sequence[Teacher],
        *,
        views: HardViews | None,
        contrast: Callable[..., IconLoss] | None,
        lambda_p: float,
        icon_gamma: float,
        lambda_u: float,
        sigma: float,
        quantize: bool,
        auxiliary_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        self.teachers = list(teachers)
        for number, teacher in enumerate(teachers):
            if isinstance(teacher, nn.Module):  # its weights change too, and belong to what is saved
                self.add_module(f"teacher{number + 1}", teacher)
        self.views = views
        self.contrast = contrast
        self.lambda_p = lambda_p
        self.icon_gamma = icon_gamma
        self.lambda_u = lambda_u
        self.sigma = sigma
        self.quantize = quantize
        self.auxiliary_weight = auxiliary_weight
        self.terms: tuple[str, ...] = (
            *TERMS,
            *(UNLABELLED_TERMS if self.teachers else ()),
            *(CONTRAST_TERMS if contrast else ()),
        )
        """Names of what a call returns."""

    @property
    def models(self) -> list[PoseModel]:
        """The pose models of the students."""
        students: Any = self.students
        return [student.model for student in students]

    def forward(self, labelled: CropBatch, unlabelled: CropBatch | None, generator: torch.Generator) -> Tensor:
        """The values of `terms`, `[T]`; the first is the loss, the others carry no gradient.

        generator: of this step and process, on the CPU.
        """
        model = self.models[0]
        targets, weight = gaussian_targets(labelled, model, model.heatmap_size, self.sigma, quantize=self.quantize)
        views = [] if unlabelled is None else self._unlabelled_views(unlabelled, model, generator)
        rows = []
        for number, student in enumerate(self.students):
            predicted, embedded, auxiliary = student(model.preprocess(labelled.images), labelled=True)
            supervised = joints_mse(predicted, targets, weight)
            if auxiliary is not None:
                supervised = supervised + self.auxiliary_weight * auxiliary_loss(
                    auxiliary, labelled, model, self.sigma, quantize=self.quantize
                )
            loss = supervised / len(self.students)
            row = [supervised, labelled_peak(predicted, weight)]
            seen = [Seen(embedded, labelled.keypoints, labelled.visibility == 2, predicted, targets)]
            if views:
                images, taught = views[number]
                answered, embedded, _ = student(images, labelled=False)
                unsupervised = joints_mse(answered, taught.heatmaps, taught.mask)
                loss = loss + self.lambda_u * unsupervised
                row += [unsupervised, *figures(taught.heatmaps, taught.confidence, taught.mask, answered)]
                if self.contrast:
                    seen.append(Seen(embedded, *self._taught_joints(taught, model), answered, taught.heatmaps))
            if self.contrast:
                found = self._contrast(self.contrast, seen, model, generator)
                loss = loss + self.lambda_p * found.total / len(self.students)
                row += [found.skcc, found.prcc, found.queries, found.negatives]
            rows.append(torch.stack([loss, *(value.detach() for value in row)]))
        values = torch.stack(rows)
        return torch.cat([values[:, :1].sum(0), values[:, 1:].mean(0)])

    def _unlabelled_views(
        self, crops: CropBatch, model: PoseModel, generator: torch.Generator
    ) -> list[tuple[Tensor, Targets]]:
        """For each student the normalised crops that it sees, and what its teacher says of them."""
        answers = [teacher(crops) for teacher in self.teachers]
        if self.views is None:
            return [(model.preprocess(crops.images), answer) for answer in answers]
        size = (crops.images.shape[-2], crops.images.shape[-1])
        images = model.preprocess(self.views.colour(crops.images, generator))
        turns = self.views.draw_turns(len(crops), generator, images.device)
        views = []
        for answer in answers:
            peaks, _ = decode(answer.heatmaps)
            joints = heatmap_to_input(peaks, size, model.heatmap_size, model.input.alignment)
            hard = self.views.turn(self.views.cut(images, joints, generator), turns, size)
            views.append((hard, answer._replace(heatmaps=self.views.turn(answer.heatmaps, turns, size))))
        return views

    def _taught_joints(self, taught: Targets, model: PoseModel) -> tuple[Tensor, Tensor]:
        """Input pixels `[B, K, 2]` of the teacher's peaks on the student's view, and which ICON takes, `[B, K]`.

        The confidence must be above gamma; a map that the turn leaves less than half of it has lost its joint.
        """
        peaks, height = decode(taught.heatmaps, refine="parabola")
        size = (model.input.height, model.input.width)
        joints = heatmap_to_input(peaks, size, model.heatmap_size, model.input.alignment)
        sure = taught.confidence > self.icon_gamma
        return joints, (taught.mask > 0) & sure & (height > 0.5 * taught.confidence)

    def _contrast(
        self,
        contrast: Callable[..., IconLoss],
        seen: Sequence[Seen],
        model: PoseModel,
        generator: torch.Generator,
    ) -> IconLoss:
        """ICON over labelled and unlabelled crops together."""
        embedded, joints, valid, predicted, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
        size = (model.input.height, model.input.width)
        places = input_to_heatmap(joints, size, (embedded.shape[-2], embedded.shape[-1]), model.input.alignment)
        skeleton = model.skeleton
        return contrast(
            embedded,
            places,
            valid,
            predicted.detach(),
            targets,
            [(first, second) for first, second in map(skeleton.indices, skeleton.prcc_pairs)],
            radius=self.sigma * embedded.shape[-2] / targets.shape[-2],
            generator=generator,
        )
