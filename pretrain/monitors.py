"""Signs that a term of a self-supervised loss collapses: its outputs all alike, in few directions, or solved too early.

Chen and He (SimSiam, 2021, Fig. 2): outputs that are spread out have, once L2-normalised, a standard deviation of
1 / sqrt(d) in each of their d dimensions; collapsed ones have 0. BN at a head's end hides a collapse onto few
directions from that figure: the effective rank shows it. The shortcut of shallow features (MSCL, Fig. 4) leaves both
whole: it shows in a loss that comes near its minimum long before the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Below what healthy runs on a few thousand alike pictures reach, 3 to 4, from batches of 16 and more.
MIN_RANK = 2.5


@torch.no_grad()
def spread(outputs: Tensor) -> Tensor:
    """Standard deviation of the L2-normalised outputs `[B, d]` as a share of 1 / sqrt(d): 1 spread out, 0 collapsed.

    A scalar, averaged over the dimensions; NaN for a batch of one.
    """
    return normalize(outputs.float(), dim=1).std(0).mean() * outputs.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(outputs: Tensor) -> Tensor:
    """Number of directions that the L2-normalised, centred outputs `[B, d]` take up, 1 to min(B - 1, d).

    A scalar, the participation ratio of the covariance's eigenvalues, their squared sum over the sum of their squares;
    below 1 for outputs that are all the same. Vectors without any structure reach about B d / (B + d).
    """
    unit = normalize(outputs.float(), dim=1)
    centred = unit - unit.mean(0)
    gram = centred @ centred.T
    return gram.trace() ** 2 / gram.square().sum().clamp(min=1e-24)


def collapse_warnings(
    terms: Sequence[str],
    spreads: Sequence[float],
    losses: Sequence[float],
    progress: float,
    *,
    ranks: Sequence[float] | None = None,
    loss_range: tuple[float, float] = (0.0, -1.0),
    min_spread: float = 0.3,
    min_rank: float = MIN_RANK,
    near_minimum: float = 0.95,
    early: float = 0.2,
    judged_from: float = 0.0,
) -> dict[str, str]:
    """Return a warning for each term that looks collapsed, by name, in their order.

    Args:
        terms: names for the message.
        spreads: of each term's outputs, see `spread`; their mean over the last steps is steadier than one.
        losses: of each term.
        progress: share of the run that is done, 0..1.
        ranks: of each term's outputs, see `effective_rank`.
        loss_range: the loss of outputs that know nothing of each other, and the least possible one.
        min_spread: below it the outputs are called alike, at any time.
        min_rank: below it they are called alike in all but a few directions, at any time.
        near_minimum: share of the loss's range; beyond it the term is called solved, if `progress` is below `early`.
        early: share of the run, 0..1.
        judged_from: share of the run, 0..1, before which outputs that are alike mean nothing.
    """
    start, least = loss_range
    warnings = {}
    for term, spread_, loss, rank in zip(terms, spreads, losses, ranks or [float("inf")] * len(terms), strict=True):
        if progress >= judged_from and not spread_ >= min_spread:
            warnings[term] = (
                f"{term}: the outputs are nearly alike (std {spread_:.2f} of 1/sqrt(d), below {min_spread:g}): "
                "it is collapsing; lower the learning rate"
            )
        elif progress >= judged_from and not rank >= min_rank:
            warnings[term] = (
                f"{term}: the outputs differ in few directions (effective rank {rank:.1f}, below {min_rank:g}): it is "
                "collapsing; lower the learning rate"
            )
        elif (start - loss) / (start - least) > near_minimum and progress < early:
            warnings[term] = (
                f"{term}: loss {loss:.3f} after {progress:.0%} of the run, near its minimum {least:g} too early: it "
                "collapses or takes a shortcut; lower the learning rate or this term's weight"
            )
    return warnings
