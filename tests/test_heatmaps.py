from __future__ import annotations

import math

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
    return bump.astype(np.float32), int(x), int(y)


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_parabola_is_the_vertex_through_three_pixels(seed: int) -> None:
    bump, x, y = random_bump(seed)
    middle_x, middle_y = np.clip([x, y], 1, 5)
    steps = np.arange(-1, 2)
    expected = []
    for middle, values in (
        (middle_x, bump[y, middle_x + steps].astype(float)),
        (middle_y, bump[middle_y + steps, x].astype(float)),
    ):
        second, first, _ = np.polyfit(steps, values, 2)
        expected.append(middle + np.clip(-first / (2 * second), -1, 1))
    xy, _ = decode(torch.from_numpy(bump)[None, None], "parabola")
    np.testing.assert_allclose(xy[0, 0].numpy(), expected, atol=1e-3)


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_paraboloid_is_the_weighted_least_squares_fit(seed: int) -> None:
    bump, x, y = random_bump(seed)
    middle = np.clip([x, y], 1, 5)
    steps = np.arange(-1, 2)
    columns, rows = (axis.ravel().astype(float) for axis in np.meshgrid(steps, steps))
    values = bump[np.ix_(middle[1] + steps, middle[0] + steps)].ravel().astype(float)
    weights = np.sqrt(np.outer([1, 2, 1], [1, 2, 1]).ravel())
    design = np.stack((columns**2, rows**2, columns * rows, columns, rows, np.ones(9)), -1)
    a, b, c, d, e, _ = np.linalg.lstsq(design * weights[:, None], values * weights)[0]
    offset = np.linalg.solve([[2 * a, c], [c, 2 * b]], [-d, -e])
    xy, _ = decode(torch.from_numpy(bump)[None, None], "paraboloid")
    np.testing.assert_allclose(xy[0, 0].numpy(), middle + np.clip(offset, -1, 1), atol=2e-3)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["quarter", "parabola", "paraboloid"]))
def test_refined_peaks_stay_on_the_map_and_near_the_largest_pixel(seed: int, refine: Refine) -> None:
    heatmaps = torch.rand((2, 4, 6, 5), generator=torch.Generator().manual_seed(seed))
    xy, _ = decode(heatmaps, refine)
    assert ((xy >= 0) & (xy <= torch.tensor([4, 5]))).all()
    assert ((xy - decode(heatmaps)[0]).abs() <= 2).all()  # at the border the window's far side is two pixels away


@pytest.mark.parametrize("refine", ["none", "quarter", "parabola", "paraboloid"])
def test_maps_without_a_peak(refine: Refine) -> None:
    heatmaps = torch.zeros(1, 5, 6, 8)
    heatmaps[0, 1] = -1
    heatmaps[0, 2] = 0.5  # flat
    heatmaps[0, 3, 2, 3] = math.nan
    heatmaps[0, 4, 2, 3] = math.inf
    xy, score = decode(heatmaps, refine)
    assert xy[0].tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [3, 2]]
    torch.testing.assert_close(score[0], torch.tensor([0, -1, 0.5, math.nan, math.inf]), equal_nan=True)


def test_a_window_that_is_not_concave_leaves_the_largest_pixel() -> None:
    saddle = torch.zeros(1, 1, 5, 5)
    saddle[0, 0, 1:4, 1:4] = torch.tensor([[0.99, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.99]])
    assert decode(saddle, "paraboloid")[0].flatten().tolist() == [2, 2]
    rising = torch.tensor([4.0, 2.0, 1.0]).expand(1, 1, 3, 3)  # convex towards the left border
    assert decode(rising, "parabola")[0].flatten().tolist() == [0, 0]


def test_decode_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="paraboloid"):
        decode(torch.zeros(1, 1, 5, 5), "taylor")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="3x3"):
        decode(torch.zeros(1, 1, 2, 5), "parabola")


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


def test_flip_back_refuses_a_shift_beyond_one_pixel_and_keeps_its_argument() -> None:
    heatmaps = torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    before = heatmaps.clone()
    with pytest.raises(ValueError, match="shift"):
        flip_back(heatmaps, (0,), 1.5)
    average_flip(heatmaps, heatmaps, (0,), 0.5)
    assert torch.equal(heatmaps, before)


def test_alignments_by_hand() -> None:
    xy = torch.tensor([[0.0, 0.0], [191.0, 255.0]])
    assert input_to_heatmap(xy, (256, 192), (64, 48), "hrnet").tolist() == [[0, 0], [47.75, 63.75]]
    assert input_to_heatmap(xy, (256, 192), (64, 48), "udp").tolist() == [[0, 0], [47, 63]]
    for alignment in ("hrnet", "udp"):
        heatmap = input_to_heatmap(xy, (256, 192), (64, 48), alignment)
        torch.testing.assert_close(heatmap_to_input(heatmap, (256, 192), (64, 48), alignment), xy)
    with pytest.raises(ValueError, match="'udp'"):
        input_to_heatmap(xy, (256, 192), (64, 48), "dark")  # pyright: ignore[reportArgumentType]
