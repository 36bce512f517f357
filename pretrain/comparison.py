"""What the training loop knows of a method, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Comparison(NamedTuple):
    """The two views of a batch, compared by a method."""

    loss: Tensor
    """The scalar to minimise."""
    terms: Tensor
    """Its terms `[L]`, one per name in `Method.terms`."""
    outputs: Sequence[Tensor]
    """For each term what the heads made of a view, `[B, d]`: what collapses if something does."""


class LevelOutputs(NamedTuple):
    """One level of both views in a siamese network, each `[B, width]`: p predicts the other view's z."""

    p1: Tensor
    """The prediction head's output of view 1, Z of MSCL's Eq. 4."""
    z1: Tensor
    """The mapping head's output of view 1, F' of MSCL's Eq. 3."""
    p2: Tensor
    z2: Tensor


class Method(Protocol):
    """A self-supervised method around a backbone.

    `forward` runs the networks on two normalised views `[B, 3, H, W]`: it is what torch compiles and what several
    processes wrap. `compare` turns its result into losses, at least in float32, outside of both.
    """

    backbone: nn.Module
    """What is handed off."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss's terms."""
        ...

    @property
    def loss_range(self) -> tuple[float, float]:
        """The loss of outputs that know nothing of each other, and the least possible one."""
        ...

    @property
    def judged_from(self) -> float:
        """Share of the run, 0..1, before which outputs that are alike are no sign of a collapse: without a batch norm
        at their end the heads' outputs of a random network are."""
        ...

    @property
    def sync_batch_norm(self) -> bool:
        """Whether BN's statistics are to be over all GPUs."""
        ...

    def __call__(self, view1: Tensor, view2: Tensor) -> Any: ...

    def compare(self, outputs: Any) -> Comparison: ...

    def predictors(self) -> list[nn.Parameter]:
        """Parameters whose learning rate may stay fixed."""
        ...

    def after_step(self) -> None:
        """Called once after each optimiser step."""
        ...


def widen(tensor: Tensor) -> Tensor:
    """Float16 and bfloat16 as float32; anything wider as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
