"""Skeletons drawn on pictures."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from .keypoints import Skeleton

# RGB. Orange against blue stays apart for colour-blind readers, and both stand out on skin, grass and sky.
FIRST_SIDE, SECOND_SIDE, MIDLINE = (255, 128, 0), (0, 114, 255), (60, 220, 90)
OUTLINE = (20, 20, 20)
_SUBPIXEL_BITS = 4


def draw_poses(
    image: np.ndarray, keypoints: np.ndarray, scores: np.ndarray, skeleton: Skeleton, *, threshold: float = 0.2
) -> np.ndarray:
    """A copy of `image` with limbs and joints drawn, antialiased, as thick as the person is large.

    image: `[H, W, 3]` uint8 RGB; keypoints: `[N, K, 2]` image pixels; scores: `[N, K]`. A joint is drawn where its
    score is at least `threshold` and its coordinates are finite, a limb where both its joints are. The first joint of
    each flip pair (the left one in the packaged skeletons) is orange, the second blue, joints on the midline green; a
    limb between two sides takes the midline's colour. The least confident pose is drawn first, so that better ones
    cover it.
    """
    canvas = np.ascontiguousarray(image).copy()
    colours = _joint_colours(skeleton)
    limbs = [(first, second) for first, second in map(skeleton.indices, skeleton.limbs)]
    drawn = (scores >= threshold) & np.isfinite(keypoints).all(-1)
    for person in np.argsort(scores.mean(1), kind="stable"):
        visible = drawn[person]
        if not visible.any():
            continue
        extent = np.ptp(keypoints[person][visible], axis=0).max()
        thickness = int(np.clip(round(extent / 60), 1, 12))
        points = _fixed_point(keypoints[person], canvas.shape[:2])
        segments = [
            (points[a], points[b], _limb_colour(colours[a], colours[b])) for a, b in limbs if visible[a] and visible[b]
        ]
        for start, end, _ in segments:
            cv2.line(canvas, start, end, OUTLINE, thickness + 2, cv2.LINE_AA, _SUBPIXEL_BITS)
        for start, end, colour in segments:
            cv2.line(canvas, start, end, colour, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
        radius = (thickness + 1) << _SUBPIXEL_BITS
        for joint in np.flatnonzero(visible):
            cv2.circle(canvas, points[joint], radius + (1 << _SUBPIXEL_BITS), OUTLINE, -1, cv2.LINE_AA, _SUBPIXEL_BITS)
            cv2.circle(canvas, points[joint], radius, colours[joint], -1, cv2.LINE_AA, _SUBPIXEL_BITS)
    return canvas


def _joint_colours(skeleton: Skeleton) -> list[tuple[int, int, int]]:
    colours = [MIDLINE] * len(skeleton.joints)
    for pair in skeleton.flip_pairs:
        first, second = skeleton.indices(pair)
        colours[first], colours[second] = FIRST_SIDE, SECOND_SIDE
    return colours


def _limb_colour(first: tuple[int, int, int], second: tuple[int, int, int]) -> tuple[int, int, int]:
    if first == MIDLINE:
        return second
    return first if second in (MIDLINE, first) else MIDLINE


def _fixed_point(points: np.ndarray, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Points [K, 2] in cv2's fixed point; held near the picture of (height, width), as cv2 overflows far outside."""
    limit = 4.0 * max(size)
    near = np.clip(np.nan_to_num(points), -limit, limit)
    return [(int(x), int(y)) for x, y in np.rint(near * (1 << _SUBPIXEL_BITS))]


def contact_sheet(pictures: Sequence[np.ndarray], columns: int = 4, side: int = 256) -> np.ndarray:
    """Pictures `[H, W, 3]` in rows of `columns`, each scaled to fit a square of `side` pixels, white around them."""
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * side, min(columns, len(pictures)) * side, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        factor = side / max(picture.shape[:2])
        height, width = (max(1, round(length * factor)) for length in picture.shape[:2])
        small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
        top = number // columns * side + (side - height) // 2
        left = number % columns * side + (side - width) // 2
        sheet[top : top + height, left : left + width] = small
    return sheet
