"""MSCL: multi-scale contrastive learning for human pose estimation (Bao et al., IEICE Trans. Inf. & Syst., 2024).

A siamese network compares two views of a picture at every level of a backbone, each level fused with the next deeper
one (Eq. 1-2), mapped (Eq. 3) and predicted from the other view (Eq. 4-7). The heads are SimSiam's at other widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from poserelay.errors import UserError

from .comparison import Comparison, LevelOutputs, widen

Fusion = Literal["one_hop", "recursive", "none"]
Pool = Literal["max", "mean"]


class FeaturePyramid(nn.Module):
    """Fuse a backbone's maps and pool each into one vector, Eq. 1-2.

    Per level: a 1x1 convolution to `width`, the next deeper level's added after nearest upsampling, a 3x3 max-pool of
    stride 2, a 3x3 convolution, a global pool. The convolutions have biases and no normalisation.

    Args:
        channels: of the maps, fine to coarse.
        width: channels of the fused maps and length of the vectors.
        fusion: one_hop adds the deeper level's own 1x1 convolution, as Eq. 1 prints; recursive its sum, as FPN does.
        convolve_first: put the 3x3 convolution before the pooling ("Pool-Conv2" of Eq. 1 read right to left).
        pool: the global pool.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int = 512,
        *,
        fusion: Literal["one_hop", "recursive"] = "one_hop",
        convolve_first: bool = False,
        pool: Pool = "max",
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.convolution = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.downsample = nn.MaxPool2d(3, stride=2, padding=1)
        self.fusion = fusion
        self.convolve_first = convolve_first
        self.pool: Pool = pool

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Turn maps `[B, channels[i], H_i, W_i]`, fine to coarse, into vectors `[B, width]`."""
        laterals = [lateral(f) for lateral, f in zip(self.lateral, maps, strict=True)]
        fused = laterals[-1:]
        for i in reversed(range(len(laterals) - 1)):
            deeper = fused[0] if self.fusion == "recursive" else laterals[i + 1]
            fused.insert(0, laterals[i] + interpolate(deeper, size=laterals[i].shape[-2:], mode="nearest"))
        if self.convolve_first:
            fused = [self.downsample(convolution(f)) for convolution, f in zip(self.convolution, fused, strict=True)]
        else:
            fused = [convolution(self.downsample(f)) for convolution, f in zip(self.convolution, fused, strict=True)]
        return [global_pool(f, self.pool) for f in fused]


class MSCL(nn.Module):
    """The siamese network over a backbone, Eq. 1-4.

    With levels (3,), loss_weights (1,), fusion none, pool mean, width 2048 and prediction_width 512 it is SimSiam.

    Args:
        backbone: turns images into a list of maps, fine to coarse.
        channels: of those maps.
        levels: which of the maps are compared, 0 the finest (conv2_x).
        loss_weights: lambda of Eq. 7 for each of the levels; normalised to sum 1.
        width: of the fused maps, the mapping heads and the outputs.
        prediction_width: of the prediction heads' hidden layer.
        fusion: as in FeaturePyramid; none pools the backbone's maps as they are (Table 5, row 2).
        convolve_first: as in FeaturePyramid.
        pool: the global pool.
        shared_heads: one mapping and one prediction head for all levels instead of a pair each.
        concatenate_views: one forward over both views, so that BN statistics are over both, instead of one each.

    Raises:
        UserError: a width below 1, a level that the backbone does not have, weights that do not fit the levels, shared
            heads over levels of unequal widths.
    """

    loss_range = (0.0, -1.0)
    judged_from = 0.0
    sync_batch_norm = True

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        *,
        levels: Sequence[int] = (0, 1, 2, 3),
        loss_weights: Sequence[float] = (1.0, 2.0, 2.0, 5.0),
        width: int = 512,
        prediction_width: int = 128,
        fusion: Fusion = "one_hop",
        convolve_first: bool = False,
        pool: Pool = "max",
        shared_heads: bool = False,
        concatenate_views: bool = False,
    ) -> None:
        super().__init__()
        if min(width, prediction_width) < 1:
            raise UserError(f"width is {width} and prediction_width {prediction_width}; give numbers of at least 1")
        if not levels or list(levels) != sorted(set(levels) & set(range(len(channels)))):
            raise UserError(
                f"levels is {list(levels)}, but this backbone has levels 0 to {len(channels) - 1}: "
                "name those to compare once each, from fine (0) to coarse"
            )
        if fusion not in get_args(Fusion) or pool not in get_args(Pool):
            raise UserError(f"fusion is {fusion!r} and pool {pool!r}; see their Literals for the choices")
        check_weights(loss_weights, len(levels))
        chosen = [channels[level] for level in levels]
        self.backbone = backbone
        self.levels = tuple(levels)
        self.terms = tuple(f"conv{level + 2}" for level in levels)
        self.loss_weights = tuple(loss_weights)
        self.pool: Pool = pool
        self.concatenate_views = concatenate_views
        self.pyramid = None
        if fusion != "none":
            self.pyramid = FeaturePyramid(chosen, width, fusion=fusion, convolve_first=convolve_first, pool=pool)
            chosen = [width] * len(levels)
        if shared_heads and len(set(chosen)) > 1:
            raise UserError(f"shared_heads needs levels of one width, found {chosen}: turn it off or fuse the levels")
        head_inputs = chosen[:1] if shared_heads else chosen
        self.mapping_heads = nn.ModuleList(SimSiamProjectionHead(c, width, width) for c in head_inputs)
        self.prediction_heads = nn.ModuleList(
            SimSiamPredictionHead(width, prediction_width, width) for _ in head_inputs
        )

    def forward(self, view1: Tensor, view2: Tensor) -> list[LevelOutputs]:
        """Encode both views, normalised images `[B, 3, H, W]`; returns one LevelOutputs per level, fine to coarse."""
        if self.concatenate_views:
            both = self.encode(torch.cat([view1, view2]))
            return [LevelOutputs(p1, z1, p2, z2) for (p1, p2), (z1, z2) in ((p.chunk(2), z.chunk(2)) for p, z in both)]
        return [
            LevelOutputs(p1, z1, p2, z2)
            for (p1, z1), (p2, z2) in zip(self.encode(view1), self.encode(view2), strict=True)
        ]

    def encode(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (prediction, mapping), each `[B, width]`, of every level for images `[B, 3, H, W]`."""
        maps = self.backbone(images)
        maps = [maps[level] for level in self.levels]
        vectors = self.pyramid(maps) if self.pyramid is not None else [global_pool(f, self.pool) for f in maps]
        outputs = []
        for i, vector in enumerate(vectors):
            head = i % len(self.mapping_heads)
            z = self.mapping_heads[head](vector)
            outputs.append((self.prediction_heads[head](z), z))
        return outputs

    def compare(self, outputs: Sequence[LevelOutputs]) -> Comparison:
        """Eq. 5-7, with this model's weights."""
        levels = [LevelOutputs(*map(widen, level)) for level in outputs]
        loss, per_level = mscl_loss(levels, self.loss_weights)
        return Comparison(loss, per_level, [level.z1 for level in levels])

    def predictors(self) -> list[nn.Parameter]:
        """The prediction heads' parameters."""
        return list(self.prediction_heads.parameters())

    def after_step(self) -> None:
        """Nothing to do."""


def global_pool(maps: Tensor, pool: Pool) -> Tensor:
    """Pool `[B, C, H, W]` over the picture to `[B, C]`."""
    return maps.amax((-2, -1)) if pool == "max" else maps.mean((-2, -1))


def mscl_loss(outputs: Sequence[LevelOutputs], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Symmetric negative cosine similarity per level (Eq. 5-6) and its weighted sum (Eq. 7).

    Eq. 6 stops the gradient on the prediction; section 3 stops it on the other branch, the mapping, and so does this.
    The weights are normalised to sum 1, so the minimum is -1 at any scale of theirs.

    Returns:
        The loss, a scalar, and the loss of each level, `[L]`.

    Raises:
        UserError: weights that do not fit the levels, or are not positive somewhere and nowhere negative.
    """
    check_weights(weights, len(outputs))
    per_level = torch.stack(
        [(negative_cosine(level.p1, level.z2) + negative_cosine(level.p2, level.z1)) / 2 for level in outputs]
    )
    normalised = per_level.new_tensor(weights) / sum(weights)
    return (normalised * per_level).sum(), per_level


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Eq. 5 averaged over a batch `[B, d]`, with the gradient stopped at z."""
    return -cosine_similarity(p, z.detach(), dim=1).mean()


def check_weights(weights: Sequence[float], levels: int) -> None:
    """Raise UserError where `weights` are not one per level, at least 0 and not all 0."""
    if len(weights) != levels or not all(0 <= weight < math.inf for weight in weights) or sum(weights) <= 0:
        raise UserError(
            f"loss_weights is {list(weights)}: give one weight of at least 0 for each of the {levels} levels, "
            "not all of them 0"
        )
