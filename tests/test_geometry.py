from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from poserelay.geometry import (
    apply_affine,
    box_to_affine,
    box_to_center_size,
    clip_boxes,
    half_body_box,
    invert_affine,
)

SIZE = (256, 192)
boxes = st.tuples(st.floats(-50, 500), st.floats(-50, 500), st.floats(1, 400), st.floats(1, 400)).map(np.array)


def three_point_affine(box: np.ndarray, rotation: float, scale: float, flipped_width: int | None) -> np.ndarray:
    """HRNet's construction, step by step: mirror the picture and the centre, then a map through three points."""
    height, width = SIZE
    x, y, w, h = box
    center = np.array([x + w / 2, y + h / 2])
    if w > width / height * h:
        h = w * height / width
    else:
        w = h * width / height
    source_width = w * 1.25 * scale
    if flipped_width is not None:
        center[0] = flipped_width - center[0] - 1
    angle = np.pi * rotation / 180

    def three_points(point: np.ndarray, direction: np.ndarray) -> np.ndarray:
        second = point + direction
        back = point - second
        return np.stack([point, second, second + np.array([-back[1], back[0]])])

    source = three_points(center, np.array([np.sin(angle), -np.cos(angle)]) * source_width / 2)
    target = three_points(np.array([width / 2, height / 2]), np.array([0, -width / 2]))
    return np.linalg.solve(np.column_stack([source, np.ones(3)]), target).T


@given(box=boxes, rotation=st.floats(-80, 80), scale=st.floats(0.65, 1.35), flip=st.booleans())
def test_affine_is_hrnets(box: np.ndarray, rotation: float, scale: float, flip: bool) -> None:
    picture_width = 640
    expected = three_point_affine(box, rotation, scale, picture_width if flip else None)
    points = box[:2] + np.random.default_rng(0).uniform(-1, 2, (5, 2)) * box[2:]
    seen = points * [-1, 1] + [picture_width - 1, 0] if flip else points
    found = apply_affine(box_to_affine(box, SIZE, rotation=rotation, scale=scale, flip=flip), points)
    np.testing.assert_allclose(found, seen @ expected[:, :2].T + expected[:, 2], atol=1e-3)


@given(box=boxes, alignment=st.sampled_from(["hrnet", "udp"]))
def test_corners_of_the_padded_box(box: np.ndarray, alignment: str) -> None:
    height, width = SIZE
    center, length = box_to_center_size(box, width / height)
    corners = center + np.array([[-0.5, -0.5], [0.5, 0.5]]) * length
    expected = [[0, 0], [width, height]] if alignment == "hrnet" else [[0, 0], [width - 1, height - 1]]
    np.testing.assert_allclose(
        apply_affine(box_to_affine(box, SIZE, alignment=alignment), corners), expected, atol=1e-6
    )


def test_udp_matrix_by_hand() -> None:
    # The height decides (191 < 255 * 3/4), so the box of height 255 grows to width 191.25 about x = 105.5: no zoom
    # along y, where 255 maps to 255, and (W-1)/191.25 along x.
    affine = box_to_affine([10, 20, 191, 255], (256, 192), padding=1.0, alignment="udp")
    np.testing.assert_allclose(affine, [[191 / 191.25, 0, 95.5 - 191 / 191.25 * 105.5], [0, 1, -20]], atol=1e-9)


@given(box=boxes, rotation=st.floats(-180, 180), flip=st.booleans())
def test_inverse(box: np.ndarray, rotation: float, flip: bool) -> None:
    affine = box_to_affine(box, SIZE, rotation=rotation, flip=flip)
    points = np.random.default_rng(1).uniform(0, 500, (4, 2))
    np.testing.assert_allclose(apply_affine(invert_affine(affine), apply_affine(affine, points)), points, atol=1e-6)


def test_vectorised_over_persons() -> None:
    generator = np.random.default_rng(2)
    many = generator.uniform(1, 300, (6, 4))
    rotation, scale, flip = generator.normal(0, 40, 6), generator.uniform(0.7, 1.3, 6), generator.random(6) < 0.5
    points = generator.uniform(0, 300, (6, 3, 2))
    affine = box_to_affine(many, SIZE, rotation=rotation, scale=scale, flip=flip, alignment="udp")
    inverse, moved = invert_affine(affine), apply_affine(affine, points)
    for n in range(6):
        one = box_to_affine(many[n], SIZE, rotation=rotation[n], scale=scale[n], flip=bool(flip[n]), alignment="udp")
        np.testing.assert_allclose(affine[n], one)
        np.testing.assert_allclose(inverse[n], invert_affine(one))
        np.testing.assert_allclose(moved[n], apply_affine(one, points[n]))


@given(box=st.tuples(*[st.floats(-30, 120)] * 2, *[st.floats(0.5, 150)] * 2))
def test_clip_is_hrnets(box: tuple[float, float, float, float]) -> None:
    x, y, w, h = box
    width, height = 100, 80
    x1, y1 = max(0, x), max(0, y)
    x2, y2 = min(width - 1, x1 + max(0, w - 1)), min(height - 1, y1 + max(0, h - 1))
    found = clip_boxes(box, (height, width))
    if x2 > x1 + 1 and y2 > y1 + 1:
        np.testing.assert_allclose(found, [x1, y1, x2 - x1, y2 - y1])
    assert (found[2:] >= 1).all()


def test_whole_picture_loses_one_pixel() -> None:
    np.testing.assert_array_equal(clip_boxes([[0, 0, 100, 80]], [[80, 100]]), [[0, 0, 99, 79]])


def half_body_loop(keypoints: np.ndarray, labelled: np.ndarray, upper: np.ndarray, prefer_upper: bool):
    """JointsDataset.half_body_transform, written out: centre and (width, height) at aspect 3/4, padded by 1.5."""
    above = [keypoints[k] for k in range(len(keypoints)) if labelled[k] and upper[k]]
    below = [keypoints[k] for k in range(len(keypoints)) if labelled[k] and not upper[k]]
    selected = above if prefer_upper and len(above) > 2 else (below if len(below) > 2 else above)
    if len(selected) < 2:
        return None
    w, h = np.max(selected, axis=0) - np.min(selected, axis=0)
    if w > 0.75 * h:
        h = w / 0.75
    elif w < 0.75 * h:
        w = h * 0.75
    return np.mean(selected, axis=0), np.array([w, h]) * 1.5


@given(seed=st.integers(0, 10_000), prefer_upper=st.booleans())
def test_half_body_is_hrnets(seed: int, prefer_upper: bool) -> None:
    generator = np.random.default_rng(seed)
    keypoints = generator.uniform(0, 300, (17, 2))
    labelled = generator.random(17) < generator.choice([0.2, 0.5, 1.0])
    upper = np.arange(17) < 11
    expected = half_body_loop(keypoints, labelled, upper, prefer_upper)
    found = half_body_box(keypoints, labelled, upper, prefer_upper)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        center, size = box_to_center_size(found, 0.75, 1.25)
        np.testing.assert_allclose(center, expected[0])
        np.testing.assert_allclose(size, expected[1])


def test_half_body_of_one_point_is_none() -> None:
    assert half_body_box(np.full((4, 2), 7.0), np.ones(4, bool), np.ones(4, bool), True) is None
