"""Losses shared by the stages. They take tensors, never configs."""

from __future__ import annotations

from torch import Tensor


def joints_mse(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """HRNet's JointsMSELoss: half the mean squared error of each joint's maps, averaged over the joints.

    predicted and target `[B, K, h, w]`, weight `[B, K]` inside the square (so a weight of 2 counts fourfold, and
    joints of weight 0 still divide). Returns a scalar in the wider dtype of predicted and target.
    """
    return 0.5 * ((predicted - target) * weight[..., None, None]).square().mean()
