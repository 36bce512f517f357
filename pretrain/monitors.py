"""Signs that a level of a siamese network collapses: its outputs all alike, or a task solved too early.

Chen and He (SimSiam, 2021, Fig. 2): outputs that are spread out have, once L2-normalised, a standard deviation of
1 / sqrt(d) in each of their d dimensions; collapsed ones have 0. BN at a head's end hides a collapse onto few
dimensions from that figure, and the shortcut of shallow features (MSCL, Fig. 4) leaves it whole too: both show in a
loss that comes near its minimum -1 long before the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def spread(outputs: Tensor) -> Tensor:
    """Standard deviation of the L2-normalised outputs `[B, d]` as a share of 1 / sqrt(d): 1 spread out, 0 collapsed.

    A scalar, averaged over the dimensions; NaN for a batch of one.
    """
    return normalize(outputs.float(), dim=1).std(0).mean() * outputs.shape[1] ** 0.5


def collapse_warnings(
    levels: Sequence[str],
    spreads: Sequence[float],
    losses: Sequence[float],
    progress: float,
    *,
    min_spread: float = 0.3,
    near_minimum: float = -0.95,
    early: float = 0.2,
) -> list[str]:
    """Return one warning per level that looks collapsed, in the order of the levels.

    Args:
        levels: names for the message.
        spreads: of each level's mapping outputs, see `spread`; their mean over the last steps is steadier than one.
        losses: of each level, in -1..1.
        progress: share of the run that is done, 0..1.
        min_spread: below it the outputs are called alike, at any time.
        near_minimum: a loss below it is called solved, if `progress` is below `early`.
        early: share of the run, 0..1.
    """
    warnings = []
    for level, spread_, loss in zip(levels, spreads, losses, strict=True):
        if not spread_ >= min_spread:
            warnings.append(
                f"{level}: the outputs are nearly alike (std {spread_:.2f} of 1/sqrt(d), below {min_spread:g}): "
                "it is collapsing; lower the learning rate"
            )
        elif loss < near_minimum and progress < early:
            warnings.append(
                f"{level}: loss {loss:.3f} after {progress:.0%} of the run, near its minimum -1 too early: it "
                "collapses or takes a shortcut; lower the learning rate or this level's loss weight"
            )
    return warnings
