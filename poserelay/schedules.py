"""Learning-rate schedules as pure functions of the epoch, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine(base: float, epoch: int, epochs: int) -> float:
    """Half a cosine from `base` at epoch 0 towards 0 at `epochs`, constant within an epoch as in SimSiam's code."""
    return base * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def drops(base: float, epoch: int, at: Sequence[int], factor: float = 0.1) -> float:
    """`base`, times `factor` for each epoch (or step, where `epoch` is one) of `at` that has been reached."""
    return base * factor ** sum(epoch >= drop for drop in at)
