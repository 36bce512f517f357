"""MoCo v2: momentum contrast (He et al., 2020; Chen et al., 2020), from lightly's heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import concat_all_gather, update_momentum
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from poserelay.errors import UserError

from .comparison import Comparison, widen


class QueryAndKey(NamedTuple):
    """Both views' outputs, not normalised, `[B, d]`."""

    query: Tensor
    """Of view 1, with gradient."""
    key: Tensor
    """Of view 2, from the momentum encoder."""


class Queue(nn.Module):
    """The last `size` keys, first in, first out, over all processes.

    lightly's memory bank is not part of a state dict, so a resumed run would meet random negatives; this one is.

    Args:
        size: number of keys.
        width: their length.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", normalize(torch.randn(size, width), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.keys: Tensor
        self.oldest: Tensor

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put the keys `[B, width]` of every process in the place of the oldest ones; of more than fit, the last."""
        if world_size() > 1:
            keys = concat_all_gather(keys)
        first = max(0, len(keys) - len(self.keys))
        places = (self.oldest + torch.arange(first, len(keys), device=keys.device)) % len(self.keys)
        self.keys[places] = keys[first:].to(self.keys.dtype)
        self.oldest.copy_((self.oldest + len(keys)) % len(self.keys))


class MoCo(nn.Module):
    """MoCo v2 over a backbone's deepest map.

    BN sees one process's part of the batch; between several processes the keys' parts are shuffled (MoCo section 3.3),
    so that a key is not normalised with its query's neighbours. On one process nothing can be shuffled away.

    Args:
        backbone: turns images into a list of maps, fine to coarse.
        channels: of those maps.
        width: of the outputs.
        hidden_width: of the projection head's hidden layer.
        queue_size: K, keys compared with.
        momentum: m of the key encoder.
        temperature: tau of Eq. 1.
    """

    terms = ("conv5",)
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
    ) -> None:
        super().__init__()
        check_contrast(width, hidden_width, queue_size, momentum, temperature)
        self.backbone = backbone
        self.projection_head = MoCoProjectionHead(channels[-1], hidden_width, width)
        self.momentum = momentum
        self.temperature = temperature
        self.loss_range = (math.log(1 + queue_size), 0.0)
        self.key_backbone = momentum_copy(self.backbone)
        self.key_projection_head = momentum_copy(self.projection_head)
        self.queue = Queue(queue_size, width)
        self.shuffle = KeyShuffle()

    def forward(self, view1: Tensor, view2: Tensor) -> QueryAndKey:
        """Encode normalised images `[B, 3, H, W]`: queries of view 1, keys of view 2."""
        query = self.projection_head(self.backbone(view1)[-1].mean((-2, -1)))
        with torch.no_grad():
            images = self.shuffle.apart(view2)
            key = self.key_projection_head(self.key_backbone(images)[-1].mean((-2, -1)))
            return QueryAndKey(query, self.shuffle.together(key))

    def compare(self, outputs: QueryAndKey) -> Comparison:
        """Eq. 1 against the queue, which then takes the keys."""
        query, key = (normalize(widen(output), dim=1) for output in outputs)
        loss = info_nce(query, key, self.queue.keys, self.temperature)
        self.queue.enqueue(key)
        return Comparison(loss, loss[None], [query])

    def predictors(self) -> list[nn.Parameter]:
        """None: there is no prediction head."""
        return []

    def after_step(self) -> None:
        """Eq. 2: move the key encoder."""
        with torch.no_grad():
            update_momentum(self.backbone, self.key_backbone, self.momentum)
            update_momentum(self.projection_head, self.key_projection_head, self.momentum)


class KeyShuffle(nn.Module):
    """Deals the pictures of all processes out anew for the keys' BN; the permutations follow from a count of batches.

    lightly's shuffle draws them from torch's global generator, which a resumed run does not restore.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.batches: Tensor

    def apart(self, images: Tensor) -> Tensor:
        """This process's share `[B, ...]` of the shuffled pictures of all processes."""
        if world_size() == 1:
            return images
        self.batches += 1
        return concat_all_gather(images.contiguous())[self._order(len(images))[rank()]]

    def together(self, keys: Tensor) -> Tensor:
        """The keys `[B, d]` of this process's own pictures, from those of its share; follows `apart`."""
        if world_size() == 1:
            return keys
        order = self._order(len(keys))
        return concat_all_gather(keys.contiguous())[order.flatten().argsort()].view(*order.shape, -1)[rank()]

    def _order(self, batch: int) -> Tensor:
        """A permutation of the pictures of all processes, `[world, B]`."""
        generator = torch.Generator().manual_seed(int(self.batches))
        order = torch.randperm(batch * world_size(), generator=generator)
        return order.view(world_size(), batch).to(self.batches.device)


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """MoCo's Eq. 1 averaged over normalised queries `[N, d]` with their keys `[N, d]`, against negatives `[K, d]`."""
    positive = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([positive, queries @ negatives.clone().T], dim=1) / temperature
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy that no gradient reaches."""
    return copy.deepcopy(module).requires_grad_(False)


def check_contrast(width: int, hidden_width: int, queue_size: int, momentum: float, temperature: float) -> None:
    """Raise UserError for numbers that a momentum contrast cannot have."""
    if min(width, hidden_width) < 1:
        raise UserError(f"width is {width} and hidden_width {hidden_width}; give numbers of at least 1")
    if queue_size < 1 or not 0 <= momentum <= 1 or not temperature > 0:
        raise UserError(
            f"queue_size is {queue_size}, momentum {momentum} and temperature {temperature}; give a positive "
            "queue_size and temperature, and a momentum in 0..1"
        )


def world_size() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
