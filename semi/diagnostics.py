"""How a teacher is doing: its peaks, what it teaches, whether it and its student agree; and when it has collapsed.

Collapse is that of Xie et al., ICCV 2021 (section 3): the networks agree on maps without peaks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from poserelay.heatmaps import decode

FIGURES = ("peak", "peak_q10", "peak_q50", "peak_q90", "kept", "agreement")
"""Of the teacher on unlabelled crops: mean and quantiles of its peaks' heights over the joints that it knows, the share
of joints that is taught, and the share of those on which student and teacher agree (`SAME_PLACE`)."""
SAME_PLACE = 0.05
"""Two peaks agree that are nearer than this share of the map's height."""

FLAT = 0.1
"""Median peak, of the labelled crops' mean peak, under which a teacher's maps are flat."""
LEARNT = 0.2
"""Mean peak of the labelled crops from which on the network has learnt something that a flat teacher lacks."""


@torch.no_grad()
def figures(taught: Tensor, confidence: Tensor, mask: Tensor, predicted: Tensor) -> Tensor:
    """`FIGURES` of one student: the teacher's maps of its view and the student's own, `[B, K, h, w]`, and the teacher's
    confidence (NaN: not known) and mask, `[B, K]`."""
    (teacher_xy, _), (student_xy, _) = decode(taught), decode(predicted)
    near = (teacher_xy - student_xy).norm(dim=-1) < SAME_PLACE * taught.shape[-2]
    agreement = (near * mask).sum() / mask.sum().clamp(min=1)
    quantiles = torch.nanquantile(confidence.flatten(), confidence.new_tensor([0.1, 0.5, 0.9]))
    return torch.stack([confidence.nanmean(), *quantiles, mask.mean(), agreement])


@torch.no_grad()
def labelled_peak(predicted: Tensor, weight: Tensor) -> Tensor:
    """Mean largest value of the student's maps `[B, K, h, w]` of labelled joints (weight `[B, K]` above 0)."""
    used = (weight > 0).float()
    return (predicted.amax((-2, -1)) * used).sum() / used.sum().clamp(min=1)


class Watch:
    """Turns the figures of a training row into warnings, each said when it begins to hold.

    Args:
        gamma: of the teacher.
        changes: whether the teacher is in training itself, and so can collapse.
    """

    def __init__(self, gamma: float, *, changes: bool) -> None:
        self._gamma = gamma
        self._changes = changes
        self._said: set[str] = set()

    def warnings(self, row: Mapping[str, float]) -> list[str]:
        """What `row` (of metrics.jsonl) gives reason to say, that the row before did not."""
        texts: dict[str, str] = {}
        if "kept" in row and row["kept"] == 0:
            texts["silent"] = (
                f"no unlabelled joint passes the teacher's gamma of {self._gamma:g} (nine of ten peaks are under "
                f"{row['peak_q90']:.3g}): these steps train on the labels alone. Lower teacher.kwargs.gamma, or train "
                "the teacher longer"
            )
        if self._changes and row["labelled_peak"] > LEARNT and row["peak_q50"] < FLAT * row["labelled_peak"]:
            texts["flat"] = (
                f"the teacher's heatmaps of unlabelled crops have gone flat (median peak {row['peak_q50']:.3g}, of "
                f"labelled crops {row['labelled_peak']:.3g}): teacher and student agree on maps without joints, as "
                "consistency of a network with itself tends to. Lower lambda_u, make hard views harder than easy ones, "
                "or use teacher dual"
            )
        if "queries" in row and row["queries"] == 0:
            texts["contrast"] = (
                "ICON contrasts nothing in these steps: no joint is labelled visible (2) in two persons of a batch, "
                "and no unlabelled one passes icon.gamma; lower icon.gamma, or raise optim.batch_size"
            )
        new = [text for name, text in texts.items() if name not in self._said]
        self._said = set(texts)
        return new
