from __future__ import annotations

import torch

from poserelay.losses import joints_mse


def maps(seed: int) -> torch.Tensor:
    return torch.randn((3, 4, 5, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_joints_mse_is_the_loop_over_joints() -> None:
    predicted, target = maps(0).requires_grad_(), maps(1)
    weight = torch.tensor([[1, 0, 1, 1.2], [0, 0, 1, 1], [1.5, 1, 1, 0]], dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for joint in range(4):
        squared = torch.zeros((), dtype=torch.float64)
        for person in range(3):
            for y in range(5):
                for x in range(6):
                    difference = predicted[person, joint, y, x] - target[person, joint, y, x]
                    squared = squared + (weight[person, joint] * difference) ** 2
        expected = expected + 0.5 * squared / (3 * 5 * 6) / 4
    loss = joints_mse(predicted, target, weight)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, predicted)
    (expected_gradient,) = torch.autograd.grad(expected, predicted)
    torch.testing.assert_close(gradient, expected_gradient)


def test_joints_of_weight_zero_do_not_pull() -> None:
    predicted = maps(0).requires_grad_()
    weight = torch.ones(3, 4, dtype=torch.float64)
    weight[1, 2] = 0
    joints_mse(predicted, maps(1), weight).backward()
    assert predicted.grad is not None
    assert not predicted.grad[1, 2].any()
    assert predicted.grad[1, 1].all()


def test_half_predictions_are_compared_in_the_targets_precision() -> None:
    predicted = maps(0).bfloat16()
    target, weight = maps(1).float(), torch.ones(3, 4)
    loss = joints_mse(predicted, target, weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, joints_mse(predicted.float(), target, weight))
