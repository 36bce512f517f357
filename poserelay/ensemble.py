"""Several pose models as one: the mean of their heatmaps."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .heatmaps import Alignment
from .keypoints import match_joints
from .model import PoseModel, SingleStageModel, load_model, load_top_down


class Ensemble(nn.Module):
    """Pose models of the same crop and joints, to be used in place of one by `inference`.

    Maps of different strides (ResNet-152's at 4 and HRNet-CCM's at 2, say) are resampled to the finest. Each model gets
    crops in its own channel order, mean and standard deviation; of `input` only size and alignment hold for all.

    Args:
        members: the models by what errors call them, their files; skeleton and `input` are taken from the first.

    Raises:
        UserError: other joints or mirror pairs, another crop size or alignment; names the two models.
    """

    def __init__(self, members: Mapping[str, PoseModel]) -> None:
        super().__init__()
        _check_alike(members)
        models = list(members.values())
        self.members = nn.ModuleList(models)
        self.skeleton = models[0].skeleton
        self.refiner = None
        """An ensemble predicts what its members' heads say: SCIO's networks belong to the features of one model."""
        self.input = models[0].input
        self.stride = min(model.stride for model in models)
        """Input pixels per heatmap pixel."""
        self.heatmap_size = max(model.heatmap_size for model in models)
        """Height and width of the heatmaps, heatmap pixels."""

    def preprocess(self, images: Tensor) -> Tensor:
        """The crops as they are, `[B, 3, H, W]`, uint8 RGB: each member has its own preprocessing."""
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Turn crops `[B, 3, H, W]`, uint8 RGB, into the mean of the members' heatmaps, float32 `[B, K, h, w]`."""
        models: Any = self.members
        maps = [model(model.preprocess(images)).float() for model in models]
        return torch.stack([resample(each, self.heatmap_size, self.input.alignment) for each in maps]).mean(0)


def load_models(paths: str | Path | Sequence[str | Path]) -> PoseModel | Ensemble:
    """The pose model of one hand-off file as `load_model` gives it, or the ensemble of several; on the CPU, to predict.

    Raises:
        UserError: as `load_model` and `Ensemble`, no file, or the same one twice.
    """
    files = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not files:
        raise UserError("checkpoints: none is named; give at least one hand-off file of a pose model")
    seen: dict[str, str] = {}
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            same = "" if seen[real] == file else f" (the same file as {seen[real]})"
            raise UserError(f"{file}: named twice{same}; a model in an ensemble counts once, leave one out")
        seen[real] = file
    if len(files) == 1:
        return load_top_down(files[0])
    loaded = {file: load_model(file) for file in files}
    models = {file: model for file, model in loaded.items() if isinstance(model, PoseModel)}
    if alone := [file for file in files if file not in models]:
        raise UserError(f"{alone[0]}: holds a single-stage model, and an ensemble averages heatmaps; give it alone")
    if refined := [file for file, model in models.items() if model.refiner is not None]:
        print(f"warning: in an ensemble the networks of model.refiner are not asked ({refined[0]})", file=sys.stderr)
    return Ensemble(models).eval()


def load_predictor(paths: str | Path | Sequence[str | Path]) -> PoseModel | Ensemble | SingleStageModel:
    """As `load_models`, but one file may also hold a single-stage model."""
    files = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    return load_model(files[0]) if len(files) == 1 else load_models(files)


def resample(heatmaps: Tensor, size: tuple[int, int], alignment: Alignment) -> Tensor:
    """Heatmaps `[..., h, w]` at another resolution, (height, width) heatmap pixels, by Keys' cubic (a = -0.5).

    A place of the input picture keeps its value: with "hrnet" the pixels (0, 0) lie on each other and x grows with the
    width, with "udp" the corner pixels do; beyond the last pixel its value is repeated. Cubic because a parabola is
    fitted to the peak afterwards, which a bilinear map would draw to the coarse pixel.
    """
    if tuple(heatmaps.shape[-2:]) == tuple(size):
        return heatmaps
    rows, columns = (_interpolation_matrix(to, of, alignment) for to, of in zip(size, heatmaps.shape[-2:], strict=True))
    return rows.to(heatmaps) @ heatmaps @ columns.T.to(heatmaps)


def _interpolation_matrix(target: int, source: int, alignment: Alignment) -> Tensor:
    """`[target, source]`: what each source pixel counts at the target pixels."""
    edge = 1 if alignment == "udp" else 0
    position = torch.arange(target, dtype=torch.float64) * (source - edge) / max(1, target - edge)
    position = position.clamp(max=source - 1)[:, None]
    taps = position.floor().long() + torch.arange(-1, 3)
    distance = (position - taps).abs()
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0))
    return weights.new_zeros(target, source).scatter_add_(1, taps.clamp(0, source - 1), weights)


def _check_alike(members: Mapping[str, PoseModel]) -> None:
    """Raise UserError about the first model whose maps cannot be averaged with those of the first."""
    (first, model), *others = members.items()
    joints = model.skeleton.joints
    for name, other in others:
        both = f"{first} and {name}: cannot be averaged"
        theirs = other.skeleton.joints
        if len(theirs) != len(joints) or match_joints(theirs, joints) != list(range(len(joints))):
            raise UserError(
                f"{both}: the first has the joints {', '.join(joints)}, the second {', '.join(theirs)}; give models of "
                "the same joints in the same order"
            )
        if other.skeleton.flip_index != model.skeleton.flip_index:
            raise UserError(
                f"{both}: the flip_pairs of their skeletons differ ({model.skeleton.name}, {other.skeleton.name}); "
                "give models of the same skeleton"
            )
        for field in ("height", "width", "alignment"):
            ours, found = getattr(model.input, field), getattr(other.input, field)
            if ours != found:
                raise UserError(
                    f"{both}: input.{field} is {ours} of the first and {found} of the second; give models trained on "
                    "the same crops"
                )
