from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from poserelay.colour import JITTER
from poserelay.datasets.sampling import draw_generator
from pretrain.device_views import ColourDraws, DeviceColour, apply_colours, blur_kernels, draw_colours, turn_hue
from pretrain.views import TwoViews, ViewDraw, blur_kernel, draw_view, render_view

from .test_views import OFF, assert_same_moments, lightlys_figures, picture, settings_of, view_figures

COUNT = 4000


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, side: int = 32) -> np.ndarray:
    return np.stack([picture(side, side, seed) for seed in range(count)])


def planes(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def as_view_draw(draws: ColourDraws, index: int, side: int) -> ViewDraw:
    factors = draws.factors[index].tolist()
    jitter = tuple((JITTER[i][0], factors[i]) for i in draws.order[index].tolist() if factors[i] != JITTER[i][1])
    return ViewDraw(0, 0, side, side, False, jitter, bool(draws.grey[index]), float(draws.blur_sigma[index]))


def test_draws_have_the_moments_of_the_cpu_views():
    views = TwoViews()
    draws = draw_colours(views, COUNT, seeded(0))
    jittered, blurred = (draws.factors != torch.tensor([1.0, 1, 1, 0])).all(1), draws.blur_sigma > 0
    reference = [draw_view(views, 300, 400, draw_generator(0, 0, index, 0)) for index in range(COUNT)]
    theirs = [
        [*(dict(draw.jitter).get(name, neutral) for name, neutral in JITTER), draw.grey, draw.blur_sigma]
        for draw in reference
    ]
    mine = torch.cat([draws.factors, draws.grey[:, None], draws.blur_sigma[:, None]], dim=1).double().numpy()
    assert_same_moments(mine, np.array(theirs, dtype=float))
    np.testing.assert_allclose([jittered.double().mean(), blurred.double().mean()], [0.8, 0.5], atol=0.03)
    orders = Counter(tuple(order.tolist()) for order in draws.order)
    assert len(orders) == 24
    assert 0.6 < min(orders.values()) / (COUNT / 24) < max(orders.values()) / (COUNT / 24) < 1.4
    correlation = np.corrcoef(mine[(jittered & blurred).numpy()].T)
    assert np.abs(correlation - np.eye(6)).max() < 0.09
    neighbours = np.corrcoef(mine[1:].T, mine[:-1].T)[:6, 6:]
    assert np.abs(neighbours).max() < 0.06


def naive(image: np.ndarray, draw: ViewDraw) -> np.ndarray:
    """A draw's colours and blur on uint8 `[h, w, 3]`, in float64 and without rounding or clipping."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).double() / 255
    for name, factor in draw.jitter:
        pixels = getattr(tv, f"adjust_{name}")(pixels, factor)
        assert 0 < pixels.min() < pixels.max() < 1
    luma = 0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]
    values = (luma.expand(3, -1, -1) if draw.grey else pixels).numpy() * 255
    if draw.blur_sigma:
        kernel = blur_kernel(draw.blur_sigma)
        radius = len(kernel) // 2
        for axis in (1, 2):
            padded = np.pad(values, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="edge")
            values = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return values


def test_given_draws_equal_the_operations_one_by_one():
    images = (90 + pictures(64, 20) / 255 * 60).astype(np.uint8)
    views = TwoViews(brightness=0.2, contrast=0.2, saturation=0.3)
    draws = draw_colours(views, len(images), seeded(1))
    found = apply_colours(planes(images), draws).numpy()
    for index, image in enumerate(images):
        assert np.abs(found[index] - naive(image, as_view_draw(draws, index, 20))).max() < 0.51


@pytest.mark.parametrize("hue", [0.0, 0.1])
def test_given_draws_equal_the_cpu_views(hue: float):
    images = pictures(100)
    draws = draw_colours(TwoViews(hue=hue), len(images), seeded(2))
    found = apply_colours(planes(images), draws).permute(0, 2, 3, 1).numpy()
    differences = []
    for index, image in enumerate(images):
        expected = render_view(image, as_view_draw(draws, index, 32), 32, "fused")
        differences.append(np.abs(found[index].astype(int) - expected))
    # rounding before the blur and within it; a turn in 8 bits has 256 hues, and contrast and saturation enlarge a step
    assert np.mean(differences) < (0.5 if hue else 0.25)
    assert np.max(differences) <= (25 if hue else 2)


@given(turn=st.floats(-0.5, 0.5), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_hue_is_torchvisions(turn: float, seed: int):
    image = planes(picture(16, 16, seed)[None]).double()
    image[..., :4] = image[:, :1, :, :4]  # grey ones too
    expected = tv.adjust_hue(image / 255, turn) * 255
    torch.testing.assert_close(turn_hue(image, torch.tensor([turn])), expected, atol=1e-3, rtol=0)


def test_blur_kernels_are_those_of_the_cpu_views():
    sigma = torch.cat([torch.linspace(0.1, 3, 59), torch.tensor([2**0.5 - 1e-4, 2**0.5 + 1e-4])])
    kernels = blur_kernels(sigma).double().numpy()
    assert kernels.shape[1] % 2 == 1
    for kernel, each in zip(kernels, sigma.tolist(), strict=True):
        expected = blur_kernel(each)
        margin = (len(kernel) - len(expected)) // 2
        np.testing.assert_allclose(kernel, np.pad(expected, margin), atol=1e-6)


@pytest.mark.parametrize("operation", ["contrast", "saturation", "hue", "grey", "blur", "all"])
def test_device_views_have_the_moments_of_lightlys(operation: str):
    views = TwoViews(size=32, colour="device", **settings_of(operation))
    image = picture(60, 80, seed=3)
    crops = torch.stack([views(image, partial(draw_generator, 0, 0, index)) for index in range(1000)], dim=1)
    mine = view_figures(DeviceColour(views)(crops, seeded(0)).flatten(0, 1).numpy())
    reference = lightlys_figures(operation)
    constant = np.maximum(mine.std(0), reference.std(0)) < 1
    np.testing.assert_allclose(mine.mean(0)[constant], reference.mean(0)[constant], atol=1)
    assert_same_moments(mine[:, ~constant], reference[:, ~constant])


def test_every_view_has_its_own_draws_from_the_generator_alone():
    images = planes(picture(24, 24)[None]).expand(2, 6, 3, 24, 24)
    colour = DeviceColour(TwoViews(size=24))
    views = colour(images, seeded(5))
    assert views.dtype == torch.uint8
    assert views.shape == images.shape
    assert torch.equal(views, colour(images, seeded(5)))
    assert not torch.equal(views, colour(images, seeded(6)))
    distinct = {view.numpy().tobytes() for view in views.flatten(0, 1)}
    assert len(distinct) >= 11  # some may be drawn to stay as they are
    torch.manual_seed(0)
    state = torch.get_rng_state()
    colour(images, seeded(5))
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_drawn_changes_nothing():
    images = planes(pictures(6)).unflatten(0, (2, 3))
    assert torch.equal(DeviceColour(TwoViews(size=32, **OFF))(images, seeded(0)), images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_views_of_the_cpu():
    images = planes(pictures(64, 64)).unflatten(0, (2, 32))
    colour = DeviceColour(TwoViews(size=64))
    on_cpu, on_gpu = colour(images, seeded(3)), colour(images.cuda(), seeded(3))
    assert on_gpu.is_cuda
    difference = (on_gpu.cpu().int() - on_cpu.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01
