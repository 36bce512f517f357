"""DenseCL: dense contrastive learning (Wang et al., 2021), from lightly's heads and MoCo v2's queue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightly.models.modules.heads import DenseCLProjectionHead
from lightly.models.utils import select_most_similar, update_momentum
from torch import Tensor, nn
from torch.nn.functional import normalize

from poserelay.errors import UserError

from .comparison import Comparison, widen
from .moco import KeyShuffle, Queue, check_contrast, info_nce, momentum_copy


class Encoded(NamedTuple):
    """One view, not normalised; S places of the map."""

    whole: Tensor
    """The global head's output of the pooled map, `[B, d]`."""
    dense: Tensor
    """The dense head's outputs, `[B, S, d]`."""
    features: Tensor
    """The backbone's own, `[B, S, C]`, which say what corresponds to what."""


class DenseHeads(nn.Module):
    """The global and the dense projection head over a map (DenseCL section 3.2).

    Args:
        channels: of the map.
        hidden_width: of the hidden layers.
        width: of the outputs.
    """

    def __init__(self, channels: int, hidden_width: int, width: int) -> None:
        super().__init__()
        self.whole = DenseCLProjectionHead(channels, hidden_width, width)
        self.dense = DenseCLProjectionHead(channels, hidden_width, width)

    def forward(self, maps: Tensor) -> Encoded:
        """Project a map `[B, C, h, w]`."""
        features = maps.flatten(2).transpose(1, 2)
        return Encoded(self.whole(features.mean(1)), self.dense(features), features)


class DenseCL(nn.Module):
    """DenseCL over a backbone's deepest map, at the map's own resolution.

    Args:
        backbone: turns images into a list of maps, fine to coarse.
        channels: of those maps.
        width: of the outputs.
        hidden_width: of the projection heads' hidden layers.
        queue_size: K, keys in each of the two queues.
        momentum: of the key encoder.
        temperature: tau of Eq. 1 and 2.
        dense_weight: lambda of Eq. 3.
        warmup_steps: optimiser steps in which lambda is 0, since correspondences mean nothing at first (the authors'
            code has 1000; the paper none).
    """

    terms = ("global", "dense")
    judged_from = 0.05
    sync_batch_norm = False

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        *,
        width: int = 128,
        hidden_width: int = 2048,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        dense_weight: float = 0.5,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_contrast(width, hidden_width, queue_size, momentum, temperature)
        if not 0 <= dense_weight <= 1 or warmup_steps < 0:
            raise UserError(
                f"dense_weight is {dense_weight} and warmup_steps {warmup_steps}; give a share in 0..1 and at least 0"
            )
        self.backbone = backbone
        self.heads = DenseHeads(channels[-1], hidden_width, width)
        self.momentum = momentum
        self.temperature = temperature
        self.dense_weight = dense_weight
        self.warmup_steps = warmup_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.steps: Tensor
        self.loss_range = (math.log(1 + queue_size), 0.0)
        self.key_backbone = momentum_copy(self.backbone)
        self.key_heads = momentum_copy(self.heads)
        self.queue = Queue(queue_size, width)
        self.dense_queue = Queue(queue_size, width)
        self.shuffle = KeyShuffle()

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Encoded, Encoded]:
        """Encode normalised images `[B, 3, H, W]`: queries of view 1, keys of view 2."""
        query = self.heads(self.backbone(view1)[-1])
        with torch.no_grad():
            key = self.key_heads(self.key_backbone(self.shuffle.apart(view2))[-1])
            return query, Encoded(*(self.shuffle.together(part.flatten(1)).view_as(part) for part in key))

    def compare(self, outputs: tuple[Encoded, Encoded]) -> Comparison:
        """Eq. 3: MoCo's loss of the pictures, and Eq. 2's of their places, each with the key's most similar place.

        The dense queue takes one key per picture, the mean over its places (section 3.3).
        """
        query, key = (Encoded(*map(widen, view)) for view in outputs)
        q, k = normalize(query.whole, dim=1), normalize(key.whole, dim=1)
        places, candidates = normalize(query.dense, dim=2), normalize(key.dense, dim=2)
        with torch.no_grad():
            positives = select_most_similar(
                normalize(query.features, dim=2), normalize(key.features, dim=2), candidates
            )
        whole = info_nce(q, k, self.queue.keys, self.temperature)
        dense = info_nce(places.flatten(0, 1), positives.flatten(0, 1), self.dense_queue.keys, self.temperature)
        self.queue.enqueue(k)
        self.dense_queue.enqueue(normalize(key.dense.mean(1), dim=1))
        weight = self.dense_weight * (self.steps >= self.warmup_steps).to(dense.dtype)
        loss = (1 - weight) * whole + weight * dense
        return Comparison(loss, torch.stack([whole, dense]), [q, normalize(query.dense.mean(1), dim=1)])

    def predictors(self) -> list[nn.Parameter]:
        """None: there is no prediction head."""
        return []

    def after_step(self) -> None:
        """Move the key encoder, and count the step."""
        self.steps += 1
        with torch.no_grad():
            update_momentum(self.backbone, self.key_backbone, self.momentum)
            update_momentum(self.heads, self.key_heads, self.momentum)
