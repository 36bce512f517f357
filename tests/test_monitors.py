from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.utils.debug import std_of_l2_normalized

from pretrain.monitors import collapse_warnings, effective_rank, spread

LEVELS = ("conv2_x", "conv5_x")


@given(batch=st.integers(2, 40), dimensions=st.integers(2, 64), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_spread_is_lightlys_std_in_units_of_one_over_root_d(batch: int, dimensions: int, seed: int):
    outputs = 3 * torch.randn(batch, dimensions, generator=torch.Generator().manual_seed(seed)) + 1
    torch.testing.assert_close(spread(outputs), std_of_l2_normalized(outputs) * math.sqrt(dimensions))


def test_spread_of_isotropic_and_of_collapsed_outputs():
    outputs = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert spread(outputs).item() == pytest.approx(1, abs=0.02)
    assert not spread(outputs).requires_grad
    assert spread(outputs[:1].expand(50, -1)).item() == pytest.approx(0, abs=1e-4)
    assert spread(outputs.bfloat16()).item() == pytest.approx(1, abs=0.02)


def test_a_healthy_run_warns_of_nothing():
    assert collapse_warnings(LEVELS, [0.9, 0.4], [-0.5, -0.9], progress=0.01) == {}
    assert collapse_warnings(LEVELS, [0.9, 0.9], [-0.99, -0.97], progress=0.9) == {}


def test_outputs_all_alike_are_named_at_any_time():
    for progress in (0.0, 1.0):
        (warning,) = collapse_warnings(LEVELS, [0.9, 0.02], [-0.5, -0.999], progress).values()
        assert warning.startswith("conv5_x: ")
        assert "0.02" in warning
    (warning,) = collapse_warnings(LEVELS, [math.nan, 0.9], [-0.5, -0.5], 0.5).values()
    assert warning.startswith("conv2_x: ")


def test_a_loss_near_its_minimum_too_early_is_named():
    (warning,) = collapse_warnings(LEVELS, [0.9, 0.9], [-0.98, -0.6], progress=0.05).values()
    assert warning.startswith("conv2_x: ")
    assert "-0.980" in warning
    assert "5%" in warning
    assert collapse_warnings(LEVELS, [0.9, 0.9], [-0.98, -0.6], progress=0.05, near_minimum=0.99) == {}


def test_a_contrastive_loss_has_a_range_of_its_own():
    (warning,) = collapse_warnings(["conv5"], [0.9], [0.1], 0.05, loss_range=(math.log(1001), 0.0)).values()
    assert "near its minimum 0" in warning
    assert collapse_warnings(["conv5"], [0.9], [1.0], 0.05, loss_range=(math.log(1001), 0.0)) == {}


@given(batch=st.integers(3, 30), dimensions=st.integers(2, 20), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_effective_rank_is_the_participation_ratio(batch: int, dimensions: int, seed: int):
    outputs = torch.randn(batch, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit = outputs / outputs.norm(dim=1, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(unit.T)).clamp(min=0)
    expected = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    assert effective_rank(outputs).item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_contrastive_head_may_begin_with_outputs_all_alike():
    assert collapse_warnings(["conv5"], [0.1], [5.0], 0.01, ranks=[1.5], judged_from=0.05) == {}
    assert len(collapse_warnings(["conv5"], [0.1], [5.0], 0.06, ranks=[9.0], judged_from=0.05)) == 1
    assert len(collapse_warnings(["conv5"], [0.9], [5.0], 0.06, ranks=[1.5], judged_from=0.05)) == 1


def test_outputs_on_a_line_are_named_although_batch_norm_spreads_them():
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    outputs = torch.linspace(-1, 1, 50)[:, None] * direction
    assert effective_rank(outputs).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(outputs[:1].expand(50, -1)).item() < 1
    outputs = torch.nn.functional.batch_norm(outputs, None, None, training=True)
    assert spread(outputs) > 0.9
    (warning,) = collapse_warnings(["conv5"], [1.0], [-0.6], 0.5, ranks=[effective_rank(outputs).item()]).values()
    assert "effective rank 1.0" in warning


def test_a_siamese_pair_without_stop_gradient_is_caught():
    """Plain similarity between two noisy copies is minimised by a constant, which both signs must show."""
    generator = torch.Generator().manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 24))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0, momentum=0.9)
    inputs = torch.randn(64, 16, generator=generator)
    start = spread(encoder(inputs)).item()
    loss = torch.zeros(())
    for _ in range(200):
        a, b = (encoder(inputs + 0.5 * torch.randn(inputs.shape, generator=generator)) for _ in range(2))
        loss = -torch.nn.functional.cosine_similarity(a, b).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert collapse_warnings(["deepest"], [start], [-0.5], 0.0) == {}
    assert len(collapse_warnings(["deepest"], [spread(encoder(inputs)).item()], [loss.item()], 0.1)) == 1
