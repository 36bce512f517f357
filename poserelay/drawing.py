"""Skeletons drawn on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from .keypoints import Skeleton

# RGB. Orange against blue stays apart for colour-blind readers, and both stand out on skin, grass and sky.
FIRST_SIDE, SECOND_SIDE, MIDLINE = (255, 128, 0), (0, 114, 255), (60, 220, 90)
OUTLINE = (20, 20, 20)
FAINTEST = 1 / 3
"""Opacity of a joint that is drawn at a score of 0."""
FONT = cv2.FONT_HERSHEY_SIMPLEX
_SUBPIXEL_BITS = 4


class Stroke(NamedTuple):
    """A limb to draw."""

    start: tuple[int, int]
    """cv2's fixed point, as `end`."""
    end: tuple[int, int]
    colour: tuple[int, int, int]
    opacity: float


class Dot(NamedTuple):
    """A joint to draw."""

    centre: tuple[int, int]
    """cv2's fixed point."""
    colour: tuple[int, int, int]
    opacity: float


def draw_poses(
    image: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray,
    skeleton: Skeleton,
    *,
    threshold: float = 0.2,
    confidence: bool = False,
    pose_scores: np.ndarray | None = None,
) -> np.ndarray:
    """A copy of `image` with limbs and joints drawn, antialiased, as thick as the person is large.

    image: `[H, W, 3]` uint8 RGB; keypoints: `[N, K, 2]` image pixels; scores: `[N, K]`. A joint is drawn where its
    score is at least `threshold` and its coordinates are finite, a limb where both its joints are. The first joint of
    each flip pair (the left one in the packaged skeletons) is orange, the second blue, joints on the midline green; a
    limb between two sides takes the midline's colour. The least confident pose is drawn first, so that better ones
    cover it.

    With `confidence` a joint is as opaque as its score says, from a third at 0 to fully at 1, and a limb as the less
    certain of its joints. `pose_scores` `[N]` are written above the poses.
    """
    canvas = np.ascontiguousarray(image).copy()
    colours = _joint_colours(skeleton)
    limbs = [(first, second) for first, second in map(skeleton.indices, skeleton.limbs)]
    drawn = (scores >= threshold) & np.isfinite(keypoints).all(-1)
    opacity = FAINTEST + (1 - FAINTEST) * np.clip(scores, 0, 1) if confidence else np.ones_like(scores, dtype=float)
    order = [person for person in np.argsort(scores.mean(1), kind="stable") if drawn[person].any()]
    for person in order:
        visible, opaque = drawn[person], opacity[person]
        thickness = _thickness(keypoints[person][visible])
        points = _fixed_point(keypoints[person], canvas.shape[:2])
        strokes = [
            Stroke(points[a], points[b], _limb_colour(colours[a], colours[b]), min(opaque[a], opaque[b]))
            for a, b in limbs
            if visible[a] and visible[b]
        ]
        dots = [Dot(points[joint], colours[joint], opaque[joint]) for joint in np.flatnonzero(visible)]
        if confidence:
            _blend(canvas, strokes, dots, thickness)
        else:
            _paint(canvas, strokes, dots, thickness)
    if pose_scores is not None:
        for person in order:
            _label(canvas, keypoints[person][drawn[person]], f"{pose_scores[person]:.2f}")
    return canvas


def _thickness(points: np.ndarray) -> int:
    """Of the limbs of a person with the joints `[J, 2]`, pixels."""
    return int(np.clip(round(np.ptp(points, axis=0).max() / 60), 1, 12))


def _paint(canvas: np.ndarray, strokes: Sequence[Stroke], dots: Sequence[Dot], thickness: int) -> None:
    for stroke in strokes:
        cv2.line(canvas, stroke.start, stroke.end, OUTLINE, thickness + 2, cv2.LINE_AA, _SUBPIXEL_BITS)
    for stroke in strokes:
        cv2.line(canvas, stroke.start, stroke.end, stroke.colour, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    radius = (thickness + 1) << _SUBPIXEL_BITS
    for dot in dots:
        cv2.circle(canvas, dot.centre, radius + (1 << _SUBPIXEL_BITS), OUTLINE, -1, cv2.LINE_AA, _SUBPIXEL_BITS)
        cv2.circle(canvas, dot.centre, radius, dot.colour, -1, cv2.LINE_AA, _SUBPIXEL_BITS)


def _blend(canvas: np.ndarray, strokes: Sequence[Stroke], dots: Sequence[Dot], thickness: int) -> None:
    """As `_paint`, each with its opacity: a whole pose is painted apart, so that no limb shines through another."""
    margin = thickness + 5  # of a joint's outline, antialiased
    ends = [end for stroke in strokes for end in (stroke.start, stroke.end)] + [dot.centre for dot in dots]
    low = np.maximum(np.min(ends, axis=0) // (1 << _SUBPIXEL_BITS) - margin, 0)
    high = np.minimum(np.max(ends, axis=0) // (1 << _SUBPIXEL_BITS) + margin + 1, canvas.shape[1::-1])
    if (low >= high).any():
        return
    window = canvas[low[1] : high[1], low[0] : high[0]]

    def moved(point: tuple[int, int]) -> tuple[int, int]:
        x, y = np.subtract(point, low * (1 << _SUBPIXEL_BITS)).tolist()
        return x, y

    strokes = [stroke._replace(start=moved(stroke.start), end=moved(stroke.end)) for stroke in strokes]
    dots = [dot._replace(centre=moved(dot.centre)) for dot in dots]
    layer, opaque = window.copy(), np.zeros(window.shape[:2], np.float32)
    _paint(layer, strokes, dots, thickness)
    # Wider than what is painted, whose soft edges are part of the layer.
    for stroke in strokes:
        cv2.line(opaque, stroke.start, stroke.end, stroke.opacity, thickness + 6, cv2.LINE_8, _SUBPIXEL_BITS)
    for dot in dots:
        cv2.circle(opaque, dot.centre, (thickness + 4) << _SUBPIXEL_BITS, dot.opacity, -1, cv2.LINE_8, _SUBPIXEL_BITS)
    window[:] = cv2.blendLinear(layer, np.ascontiguousarray(window), opaque, 1 - opaque)


def _label(canvas: np.ndarray, points: np.ndarray, text: str) -> None:
    """Write over the highest of the joints `[J, 2]`, in the picture, as large as the person is but legible."""
    height, width = canvas.shape[:2]
    x, y = points[points[:, 1].argmin()]
    scale = max(float(np.clip(np.ptp(points, axis=0).max() / 600, 0.35, 0.8)), max(height, width) / 3000)
    (text_width, text_height), _ = cv2.getTextSize(text, FONT, scale, 1)
    border = 2 + text_height // 4
    left = int(np.clip(x - text_width / 2, border, max(border, width - text_width - border)))
    top = text_height + border
    foot = int(np.clip(y - 3 * _thickness(points) - 6, top, max(top, height - border)))
    corner, opposite = (left - border, foot - text_height - border), (left + text_width + border, foot + border)
    cv2.rectangle(canvas, corner, opposite, OUTLINE, -1)
    cv2.putText(canvas, text, (left, foot), FONT, scale, (255, 255, 255), 1, cv2.LINE_AA)


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


def thumbnail(picture: np.ndarray, side: int = 256) -> np.ndarray:
    """A picture `[H, W, 3]` scaled so that its longer side has `side` pixels."""
    factor = side / max(picture.shape[:2])
    height, width = (max(1, round(length * factor)) for length in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int = 4, side: int = 256) -> np.ndarray:
    """Pictures `[H, W, 3]` in rows of `columns`, each scaled to fit a square of `side` pixels, white around them."""
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * side, min(columns, len(pictures)) * side, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        small = thumbnail(picture, side)
        height, width = small.shape[:2]
        top = number // columns * side + (side - height) // 2
        left = number % columns * side + (side - width) // 2
        sheet[top : top + height, left : left + width] = small
    return sheet
