from __future__ import annotations

import math
from typing import get_args

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poserelay.heatmaps import (
    Alignment,
    Refine,
    average_flip,
    decode,
    encode,
    flip_back,
    gaussian_blur,
    heatmap_to_input,
    input_to_heatmap,
    target_weight,
)

SIZE = (16, 12)
REFINES: tuple[Refine, ...] = get_args(Refine)


def hrnet_target(joint: list[float], visible: int, size: tuple[int, int], sigma: int) -> tuple[np.ndarray, float]:
    """One joint's target and weight as HRNet's generate_target makes them: patch corners, clipped copy."""
    height, width = size
    target = np.zeros(size, np.float32)
    reach = 3 * sigma
    mu_x, mu_y = int(joint[0] + 0.5), int(joint[1] + 0.5)
    left, top, right, bottom = mu_x - reach, mu_y - reach, mu_x + reach + 1, mu_y + reach + 1
    if left >= width or top >= height or right < 0 or bottom < 0:
        return target, 0.0
    if visible:
        for y in range(max(0, top), min(bottom, height)):
            for x in range(max(0, left), min(right, width)):
                target[y, x] = math.exp(-((x - mu_x) ** 2 + (y - mu_y) ** 2) / (2 * sigma**2))
    return target, float(visible > 0)


def random_keypoints(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, 17, 2), generator=generator) * torch.tensor([size[1] - 1.0, size[0] - 1.0])


def gaussians(keypoints: torch.Tensor, size: tuple[int, int], sigma: float) -> torch.Tensor:
    """As `encode` draws them, in float64."""
    columns, rows = torch.arange(size[1]).double(), torch.arange(size[0]).double()[:, None]
    x, y = keypoints.double()[..., None, None].unbind(-3)
    return torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))


coordinate = st.floats(-30, 45, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(coordinate, coordinate, st.integers(0, 2)), min_size=1, max_size=4), st.sampled_from([1, 2]))
def test_quantized_targets_and_weights_are_hrnets(joints: list[tuple[float, float, int]], sigma: int) -> None:
    keypoints = torch.tensor([joint[:2] for joint in joints])
    visibility = torch.tensor([joint[2] for joint in joints])
    pairs = zip(keypoints.tolist(), visibility.tolist(), strict=True)
    expected = [hrnet_target(joint, visible, SIZE, sigma) for joint, visible in pairs]
    heatmaps = encode(keypoints, visibility, SIZE, sigma, quantize=True)
    np.testing.assert_allclose(heatmaps.numpy(), np.stack([target for target, _ in expected]), atol=1e-6)
    assert target_weight(keypoints, visibility, SIZE, sigma).tolist() == [weight for _, weight in expected]


def test_targets_are_the_full_gaussian_on_the_joint() -> None:
    keypoints = torch.tensor([[[3.3, 7.8], [5.0, 2.0], [math.nan, math.nan], [500.0, 3.0]]])
    visibility = torch.tensor([[1, 2, 0, 2]])
    heatmaps = encode(keypoints, visibility, SIZE, 1.5)
    assert heatmaps.shape == (1, 4, *SIZE)
    assert heatmaps.dtype == torch.float32
    for joint in (0, 1):
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                distance = (keypoints[0, joint] - torch.tensor([x, y])).square().sum().item()
                assert heatmaps[0, joint, y, x].item() == pytest.approx(math.exp(-distance / 4.5), abs=1e-6)
    assert heatmaps[0, 1, 2, 5] == 1
    assert not heatmaps[0, 2:].any()  # unlabelled with NaN coordinates; out of reach


def test_encode_refuses_a_sigma_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="sigma"):
        encode(torch.zeros(1, 2), torch.ones(1), SIZE, 0)


@pytest.mark.parametrize("refine", ["parabola", "paraboloid"])
@pytest.mark.parametrize("sigma", [2.0, 3.0, 4.0])
def test_decode_finds_subpixel_joints(refine: Refine, sigma: float) -> None:
    keypoints = random_keypoints(200, (64, 48), seed=0)
    xy, score = decode(encode(keypoints, torch.ones(200, 17), (64, 48), sigma), refine)
    assert (xy - keypoints).norm(dim=-1).mean() < 0.02
    assert score.min() > 0.9


@pytest.mark.parametrize("refine", ["parabola", "paraboloid"])
def test_decode_finds_subpixel_joints_inside_the_map_at_a_small_sigma(refine: Refine) -> None:
    keypoints = 3 + random_keypoints(200, (58, 42), seed=1)
    xy, _ = decode(encode(keypoints, torch.ones(200, 17), (64, 48), 1.6), refine)
    assert (xy - keypoints).norm(dim=-1).mean() < 0.02


def test_dark_is_exact_on_gaussians_but_for_the_outer_two_pixels() -> None:
    keypoints = 2.5 + random_keypoints(10, (59, 43), seed=1)
    xy, score = decode(gaussians(keypoints, (64, 48), 2), "dark")
    assert xy.dtype == score.dtype == torch.float64
    torch.testing.assert_close(xy, keypoints.double(), atol=1e-9, rtol=0)
    single = decode(encode(keypoints, torch.ones(10, 17), (64, 48), 2), "dark")[0]
    assert (single - keypoints).norm(dim=-1).max() < 1e-4
    outer = torch.tensor([[[1.3, 20.2], [20.3, 1.2], [46.2, 30.3], [30.3, 61.6]]])
    assert torch.equal(decode(gaussians(outer, (64, 48), 2), "dark")[0], outer.round().double())


@pytest.mark.parametrize("refine", ["parabola", "paraboloid", "dark"])
def test_noise_of_a_hundredth_of_the_peak_leaves_a_third_of_the_quarters_error(refine: Refine) -> None:
    keypoints = 3 + random_keypoints(100, (58, 42), seed=4)
    noise = torch.randn((100, 17, 64, 48), generator=torch.Generator().manual_seed(5))
    heatmaps = encode(keypoints, torch.ones(100, 17), (64, 48), 2) + 0.01 * noise

    def error(refine: Refine, blur: float) -> float:
        return (decode(heatmaps, refine, blur)[0] - keypoints).norm(dim=-1).mean().item()

    assert 0.19 < error("quarter", 0) < 0.21
    assert error(refine, 0) < error("quarter", 0) / 3
    assert error(refine, 1) < 0.02  # the quarter's stays


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9))
def test_unrefined_peak_is_the_first_of_the_largest_pixels(seed: int, height: int, width: int) -> None:
    heatmaps = np.random.default_rng(seed).integers(-1, 4, (2, 3, height, width)).astype(np.float32)
    xy, score = decode(torch.from_numpy(heatmaps))
    for person, joint in np.ndindex(2, 3):
        heatmap = heatmaps[person, joint]
        y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
        assert xy[person, joint].tolist() == ([x, y] if heatmap.max() > 0 else [0, 0])
        assert score[person, joint] == heatmap.max()


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_quarter_is_hrnets_loop(seed: int) -> None:
    heatmaps = np.random.default_rng(seed).random((1, 5, 6, 5), np.float32)
    xy, _ = decode(torch.from_numpy(heatmaps), "quarter")
    for joint, heatmap in enumerate(heatmaps[0]):
        y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
        expected = np.array([x, y], np.float32)
        if 1 < x < 4 and 1 < y < 5:
            expected[0] += 0.25 * np.sign(heatmap[y, x + 1] - heatmap[y, x - 1])
            expected[1] += 0.25 * np.sign(heatmap[y + 1, x] - heatmap[y - 1, x])
        assert xy[0, joint].tolist() == expected.tolist()


def random_bump(seed: int) -> tuple[np.ndarray, int, int]:
    """A 7x7 map of small noise whose largest pixel is at (x, y), maybe on the border, and concave around it."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 7, 2)
    centre = np.array([x, y]) + rng.uniform(-0.4, 0.4, 2)
    columns, rows = np.meshgrid(np.arange(7), np.arange(7))
    bump = 1 - 0.02 * (columns - centre[0]) ** 2 - 0.03 * (rows - centre[1]) ** 2
    bump += 0.01 * (columns - centre[0]) * (rows - centre[1]) + rng.uniform(0, 0.002, (7, 7))
    y, x = np.unravel_index(bump.argmax(), bump.shape)
    return bump, int(x), int(y)


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_parabola_is_the_vertex_through_three_pixels(seed: int) -> None:
    bump, x, y = random_bump(seed)
    middle_x, middle_y = np.clip([x, y], 1, 5)
    steps = np.arange(-1, 2)
    expected = []
    for middle, values in (
        (middle_x, bump[y, middle_x + steps]),
        (middle_y, bump[middle_y + steps, x]),
    ):
        second, first, _ = np.polyfit(steps, values, 2)
        expected.append(middle + np.clip(-first / (2 * second), -1, 1))
    xy, _ = decode(torch.from_numpy(bump)[None, None], "parabola")
    np.testing.assert_allclose(xy[0, 0].numpy(), expected, atol=1e-10)
    single, _ = decode(torch.from_numpy(bump)[None, None].float(), "parabola")
    np.testing.assert_allclose(single[0, 0].numpy(), expected, atol=1e-3)


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_paraboloid_is_the_weighted_least_squares_fit(seed: int) -> None:
    bump, x, y = random_bump(seed)
    middle = np.clip([x, y], 1, 5)
    steps = np.arange(-1, 2)
    columns, rows = (axis.ravel().astype(float) for axis in np.meshgrid(steps, steps))
    values = bump[np.ix_(middle[1] + steps, middle[0] + steps)].ravel()
    weights = np.sqrt(np.outer([1, 2, 1], [1, 2, 1]).ravel())
    design = np.stack((columns**2, rows**2, columns * rows, columns, rows, np.ones(9)), -1)
    a, b, c, d, e, _ = np.linalg.lstsq(design * weights[:, None], values * weights)[0]
    offset = np.linalg.solve([[2 * a, c], [c, 2 * b]], [-d, -e])
    xy, _ = decode(torch.from_numpy(bump)[None, None], "paraboloid")
    expected = middle + np.clip(offset, -1, 1)
    np.testing.assert_allclose(xy[0, 0].numpy(), expected, atol=1e-10)
    single, _ = decode(torch.from_numpy(bump)[None, None].float(), "paraboloid")
    np.testing.assert_allclose(single[0, 0].numpy(), expected, atol=2e-3)


def dark_taylor(heatmap: np.ndarray) -> np.ndarray:
    """DARK's taylor() of one map, with its logarithm; not concave: the largest pixel; at most one pixel."""
    height, width = heatmap.shape
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    f = np.log(np.maximum(heatmap, 1e-10))
    if not (1 < x < width - 2 and 1 < y < height - 2):
        return np.array([x, y], float)
    dx = 0.5 * (f[y, x + 1] - f[y, x - 1])
    dy = 0.5 * (f[y + 1, x] - f[y - 1, x])
    dxx = 0.25 * (f[y, x + 2] - 2 * f[y, x] + f[y, x - 2])
    dxy = 0.25 * (f[y + 1, x + 1] - f[y - 1, x + 1] - f[y + 1, x - 1] + f[y - 1, x - 1])
    dyy = 0.25 * (f[y + 2, x] - 2 * f[y, x] + f[y - 2, x])
    hessian = np.array([[dxx, dxy], [dxy, dyy]])
    if np.linalg.eigvalsh(hessian).max() >= 0:
        return np.array([x, y], float)
    return np.array([x, y]) + np.clip(-np.linalg.inv(hessian) @ [dx, dy], -1, 1)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_dark_is_its_authors_loop(seed: int, bump: bool) -> None:
    if bump:
        maps = np.exp(20 * (random_bump(seed)[0][None] - 1))
    else:  # mostly saddles and long steps, values under 1e-10 and below zero
        maps = np.random.default_rng(seed).uniform(-0.2, 1, (8, 7, 7))
    xy, _ = decode(torch.from_numpy(maps)[None], "dark")
    np.testing.assert_allclose(xy[0].numpy(), np.stack([dark_taylor(heatmap) for heatmap in maps]), atol=1e-8)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(REFINES[1:]))
def test_refined_peaks_stay_on_the_map_and_near_the_largest_pixel(seed: int, refine: Refine) -> None:
    heatmaps = torch.rand((2, 4, 6, 5), generator=torch.Generator().manual_seed(seed))
    xy, _ = decode(heatmaps, refine)
    assert ((xy >= 0) & (xy <= torch.tensor([4, 5]))).all()
    assert ((xy - decode(heatmaps)[0]).abs() <= 2).all()  # at the border the window's far side is two pixels away


@pytest.mark.parametrize("refine", REFINES)
def test_maps_without_a_peak(refine: Refine) -> None:
    heatmaps = torch.zeros(1, 5, 6, 8)
    heatmaps[0, 1] = -1
    heatmaps[0, 2] = 0.5  # flat
    heatmaps[0, 3, 2, 3] = math.nan
    heatmaps[0, 4, 2, 3] = math.inf
    xy, score = decode(heatmaps, refine)
    assert xy[0].tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [3, 2]]
    torch.testing.assert_close(score[0], torch.tensor([0, -1, 0.5, math.nan, math.inf]), equal_nan=True)


@pytest.mark.parametrize("blur", [0.0, 1.0])
@pytest.mark.parametrize("refine", REFINES)
def test_bad_maps_give_finite_joints_on_the_map(refine: Refine, blur: float) -> None:
    height, width = 8, 7
    base = torch.rand((height, width), generator=torch.Generator().manual_seed(0))
    border = [(y, x) for y in range(height) for x in range(width) if y in (0, height - 1) or x in (0, width - 1)]
    bad = [base * scale for scale in (1e-45, 1e-40, 1e-20, 1e20, 3e38)] + [-1 - base]
    for y, x in border:
        bad.append(base.clone())
        bad[-1][y, x] = 2
    for rows, columns in ((slice(3, 5), slice(2, 5)), (slice(0, 2), slice(0, 2)), (slice(2, 7), slice(1, 6))):
        bad.append(base / 2)
        bad[-1][rows, columns] = 1  # a plateau of equal maxima
    for value in (math.inf, -math.inf, math.nan):
        bad.append(base.clone())
        bad[-1][4, 3] = value
    xy, score = decode(torch.stack(bad)[None], refine, blur)
    assert ((xy >= 0) & (xy <= torch.tensor([width - 1, height - 1]))).all()
    if blur == 0:
        assert xy[0, 6 : 6 + len(border)].round().tolist() == [[x, y] for y, x in border]
        assert ((xy - decode(torch.stack(bad)[None])[0]).abs() <= 1).all()
    assert score[0, -1].isnan()
    sound = torch.stack([*bad[:-1], base])[None]  # the map of NaN leaves the others alone
    torch.testing.assert_close(xy[:, :-1], decode(sound, refine, blur)[0][:, :-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("refine", REFINES)
def test_small_maps(refine: Refine) -> None:
    for height, width in ((1, 1), (1, 9), (9, 1), (2, 5), (5, 2), (3, 3), (4, 4), (5, 5)):
        pixels = torch.eye(height * width).view(1, -1, height, width)  # a peak at every pixel
        expected = [[x, y] for y in range(height) for x in range(width)]
        xy, score = decode(pixels, refine)
        assert xy[0].round().tolist() == expected
        assert (score == 1).all()
        if min(height, width) < 3:
            assert xy[0].tolist() == expected
        blurred = decode(pixels, refine, blur=1)[0]
        assert ((blurred >= 0) & (blurred <= torch.tensor([width - 1, height - 1]))).all()


def test_a_window_that_is_not_concave_leaves_the_largest_pixel() -> None:
    saddle = torch.zeros(1, 1, 5, 5)
    saddle[0, 0, 1:4, 1:4] = torch.tensor([[0.99, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.99]])
    assert decode(saddle, "paraboloid")[0].flatten().tolist() == [2, 2]
    rising = torch.tensor([4.0, 2.0, 1.0]).expand(1, 1, 3, 3)  # convex towards the left border
    assert decode(rising, "parabola")[0].flatten().tolist() == [0, 0]


def test_decode_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="paraboloid"):
        decode(torch.zeros(1, 1, 5, 5), "taylor")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.3])
def test_blur_is_opencvs(sigma: float) -> None:
    heatmaps = np.random.default_rng(0).random((3, 2, 9, 14), np.float32)
    blurred = gaussian_blur(torch.from_numpy(heatmaps), sigma).numpy()
    for heatmap, ours in zip(heatmaps.reshape(-1, 9, 14), blurred.reshape(-1, 9, 14), strict=True):
        peer = cv2.GaussianBlur(heatmap, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
        np.testing.assert_allclose(ours, peer, atol=2e-6)
    expected = decode(torch.from_numpy(blurred), "parabola")
    torch.testing.assert_close(decode(torch.from_numpy(heatmaps), "parabola", blur=sigma), expected)


def test_decode_keeps_its_precision_in_autocast_and_half_maps() -> None:
    keypoints = random_keypoints(4, (64, 48), seed=2)
    heatmaps = encode(keypoints, torch.ones(4, 17), (64, 48), 2)
    plain = decode(heatmaps, "parabola", blur=1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(decode(heatmaps, "parabola", blur=1), plain)
    xy, score = decode(heatmaps.bfloat16(), "parabola")
    assert xy.dtype == score.dtype == torch.float32


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0.3, 3), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1))
def test_float64_is_kept(seed: int, sigma: float, height: int, width: int, shift: float) -> None:
    maps = np.random.default_rng(seed).random((3, height, width))
    blurred = gaussian_blur(torch.from_numpy(maps), sigma).numpy()
    for heatmap, ours in zip(maps, blurred, strict=True):
        peer = cv2.GaussianBlur(heatmap, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
        np.testing.assert_allclose(ours, peer, atol=1e-12)
    expected = maps[[1, 0, 2], :, ::-1].copy()
    expected[..., 1:] = (1 - shift) * expected[..., 1:] + shift * expected[..., :-1]  # Eq. 25
    flipped = flip_back(torch.from_numpy(maps)[None], (1, 0, 2), shift)[0]
    np.testing.assert_allclose(flipped.numpy(), expected, atol=1e-12)
    average = average_flip(torch.from_numpy(blurred)[None], torch.from_numpy(maps)[None], (1, 0, 2), shift)[0]
    np.testing.assert_allclose(average.numpy(), (blurred + expected) / 2, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_worked_on_in_float32(dtype: torch.dtype) -> None:
    heatmaps = torch.rand((2, 3, 8, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(gaussian_blur(heatmaps, 1), gaussian_blur(heatmaps.float(), 1))
    assert torch.equal(flip_back(heatmaps, (0, 2, 1), 0.75), flip_back(heatmaps.float(), (0, 2, 1), 0.75))
    average = average_flip(heatmaps, heatmaps, (0, 2, 1), 0.75)
    assert torch.equal(average, average_flip(heatmaps.float(), heatmaps.float(), (0, 2, 1), 0.75))


@pytest.mark.parametrize("blur", [0.0, 1.0])
@pytest.mark.parametrize("count", [0, 1, 41])
def test_persons_are_decoded_apart_from_each_other(count: int, blur: float) -> None:
    heatmaps = encode(random_keypoints(count, (64, 48), seed=6), torch.ones(count, 17), (64, 48), 2)
    assert heatmaps.numel() > 3 * 2**19 or count < 41  # several parts on the CPU
    average = average_flip(heatmaps, heatmaps.flip(0), range(17), 0.75)
    xy, score = decode(average, "paraboloid", blur)
    assert xy.shape == (count, 17, 2)
    for person in range(0, count, 8):
        alone = average_flip(heatmaps[person, None], heatmaps[-1 - person, None], range(17), 0.75)
        assert torch.equal(alone[0], average[person])
        expected = decode(alone, "paraboloid", blur)
        torch.testing.assert_close((xy[person], score[person]), (expected[0][0], expected[1][0]))


def test_flip_back_by_one_pixel_is_hrnets() -> None:
    heatmaps = np.random.default_rng(0).random((2, 3, 4, 5), np.float32)
    expected = heatmaps[:, [0, 2, 1], :, ::-1].copy()
    expected[..., 1:] = expected[..., :-1].copy()
    assert np.array_equal(flip_back(torch.from_numpy(heatmaps), (0, 2, 1), 1).numpy(), expected)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(8, 24), st.floats(8, 24))
def test_flip_back_moves_the_centroid_by_the_shift(shift: float, x: float, y: float) -> None:
    size = (32, 32)
    keypoints = torch.tensor([[[x, y]]])
    maps = flip_back(encode(keypoints, torch.ones(1, 1), size, 1.5), (0,), shift)[0, 0].double()
    grid = torch.arange(32.0).double()
    assert (maps.sum(0) @ grid / maps.sum()).item() == pytest.approx(31 - x + shift, abs=1e-3)
    assert (maps.sum(1) @ grid / maps.sum()).item() == pytest.approx(y, abs=1e-3)


@pytest.mark.parametrize(("alignment", "shift"), [("hrnet", 1 - 1 / 4), ("udp", 0.0)])
def test_the_exact_shift_aligns_the_maps_of_the_mirrored_picture(alignment: Alignment, shift: float) -> None:
    input_size, size, flip_index = (256, 192), (64, 48), [0, 2, 1]
    keypoints = 20 + random_keypoints(50, (216, 152), seed=3)[:, :3]
    mirrored = keypoints.clone()
    mirrored[..., 0] = input_size[1] - 1 - keypoints[..., 0]
    mirrored = mirrored[:, flip_index]

    def maps(joints: torch.Tensor) -> torch.Tensor:
        return encode(input_to_heatmap(joints, input_size, size, alignment), torch.ones(50, 3), size, 2)

    expected, aligned = maps(keypoints), flip_back(maps(mirrored), flip_index, shift)
    # Within what linear interpolation leaves; the leftmost column is not interpolated.
    torch.testing.assert_close(aligned[..., 1:], expected[..., 1:], atol=0.03, rtol=0)
    average = average_flip(expected, maps(mirrored), flip_index, shift)
    torch.testing.assert_close(average, (expected + aligned) / 2)
    xy = heatmap_to_input(decode(average, "paraboloid")[0], input_size, size, alignment)
    assert (xy - keypoints).norm(dim=-1).mean() < 4 * 0.02


def flip_disagreement(
    refine: Refine, stride: int, shift: float, alignment: Alignment = "hrnet", count: int = 10
) -> torch.Tensor:
    """Joints found on the mirrored picture less those found on the picture, input pixels `[count, 3, 2]`."""
    input_size, size, flip_index, away = (256, 192), (256 // stride, 192 // stride), [0, 2, 1], 6 * stride
    keypoints = away + random_keypoints(count, (256 - 2 * away, 192 - 2 * away), seed=7)[:, :3]
    mirrored = torch.stack((input_size[1] - 1 - keypoints[..., 0], keypoints[..., 1]), -1)[:, flip_index]
    of_picture, of_mirrored = (
        encode(input_to_heatmap(joints, input_size, size, alignment), torch.ones(count, 3), size, 2)
        for joints in (keypoints, mirrored)
    )
    found, again = (
        heatmap_to_input(decode(maps, refine)[0], input_size, size, alignment)
        for maps in (of_picture, flip_back(of_mirrored, flip_index, shift))
    )
    return again - found


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("refine", ["parabola", "dark"])
def test_picture_and_mirrored_picture_agree_at_the_exact_shift(refine: Refine, stride: int) -> None:
    assert flip_disagreement(refine, stride, 1 - 1 / stride, count=100).abs().max() < 0.1
    assert flip_disagreement(refine, stride, 0, "udp", count=100).abs().max() < 1e-3


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([2, 4, 8]), st.floats(0, 1))
def test_another_shift_moves_the_mirrored_pictures_joints_by_what_it_lacks(stride: int, shift: float) -> None:
    moved = flip_disagreement("dark", stride, shift) - torch.tensor([stride * shift - (stride - 1), 0])
    assert moved.abs().max() < 0.1  # at stride 8 interpolation alone takes up to 0.096
    if stride == 8:
        return  # there a parabola is off by 0.1 on average
    # On an interpolated map it is off by up to 0.14 input pixels at single joints, by less on average.
    parabola = flip_disagreement("parabola", stride, shift, count=100).mean((0, 1))
    assert parabola[0].item() == pytest.approx(stride * shift - (stride - 1), abs=0.1)


def test_flip_back_refuses_a_shift_beyond_one_pixel_and_keeps_its_argument() -> None:
    heatmaps = torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    before = heatmaps.clone()
    with pytest.raises(ValueError, match="shift"):
        flip_back(heatmaps, (0,), 1.5)
    average_flip(heatmaps, heatmaps, (0,), 0.5)
    assert torch.equal(heatmaps, before)


def test_gradients_pass_through_several_parts() -> None:
    heatmaps = encode(random_keypoints(41, (64, 48), seed=8), torch.ones(41, 17), (64, 48), 2).requires_grad_()
    average = average_flip(heatmaps, heatmaps.flip(-1), range(17), 0)
    torch.testing.assert_close(average, heatmaps)
    decode(average, "parabola", blur=1)[1].sum().backward()
    assert heatmaps.grad is not None
    # Of each score the weights of the kernel.
    torch.testing.assert_close(heatmaps.grad.sum((-2, -1)), torch.ones(41, 17))


def test_alignments_by_hand() -> None:
    xy = torch.tensor([[0.0, 0.0], [191.0, 255.0]])
    assert input_to_heatmap(xy, (256, 192), (64, 48), "hrnet").tolist() == [[0, 0], [47.75, 63.75]]
    assert input_to_heatmap(xy, (256, 192), (64, 48), "udp").tolist() == [[0, 0], [47, 63]]
    for alignment in ("hrnet", "udp"):
        heatmap = input_to_heatmap(xy, (256, 192), (64, 48), alignment)
        torch.testing.assert_close(heatmap_to_input(heatmap, (256, 192), (64, 48), alignment), xy)
    with pytest.raises(ValueError, match="'udp'"):
        input_to_heatmap(xy, (256, 192), (64, 48), "dark")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("blur", [-1.0, float("nan"), float("inf")])
def test_a_blur_that_is_none_is_refused(blur: float) -> None:
    with pytest.raises(ValueError, match="blur must be"):
        decode(torch.rand(1, 1, 8, 8), "parabola", blur=blur)


def test_a_sigma_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma must be positive"):
        encode(torch.zeros(1, 2), torch.ones(1), (8, 8), float("nan"))
