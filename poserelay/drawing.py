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
CLEAR = 0.17
"""Around the highest joint, what a label keeps free for the head, of the person's size."""
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
    certain of its joints. `pose_scores` `[N]` are written above the poses, or beside them where joints, limbs or
    another's label are in the way; not those of persons so small that the text would be over a quarter as high.
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
        _label(
            canvas,
            [keypoints[person][drawn[person]] for person in reversed(order)],
            [f"{pose_scores[person]:.2f}" for person in reversed(order)],
            _occupied(keypoints, drawn, limbs, canvas.shape[:2]),
        )
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


def _occupied(
    keypoints: np.ndarray, drawn: np.ndarray, limbs: Sequence[tuple[int, int]], size: tuple[int, int]
) -> np.ndarray:
    """How much a label would hide at each pixel of a picture of (height, width): `[H, W]` uint8.

    A head most, then joints, limbs, and what the joints enclose. keypoints: `[N, K, 2]`, drawn: `[N, K]`.
    """
    cover = np.zeros(size, np.uint8)
    persons = [person for person in range(len(keypoints)) if drawn[person].any()]
    fixed = [_fixed_point(points, size) for points in keypoints]
    shown = [keypoints[person][drawn[person]] for person in persons]
    for person in persons:
        ends = np.array([point for point, there in zip(fixed[person], drawn[person], strict=True) if there], np.int32)
        cv2.fillConvexPoly(cover, cv2.convexHull(ends), 30, cv2.LINE_8, _SUBPIXEL_BITS)
    for person, points in zip(persons, shown, strict=True):
        for first, second in limbs:
            if drawn[person][first] and drawn[person][second]:
                ends = (fixed[person][first], fixed[person][second])
                cv2.line(cover, *ends, 120, _thickness(points) + 2, cv2.LINE_8, _SUBPIXEL_BITS)
    for person, points in zip(persons, shown, strict=True):
        radius = (_thickness(points) + 2) << _SUBPIXEL_BITS
        for joint in np.flatnonzero(drawn[person]):
            cv2.circle(cover, fixed[person][joint], radius, 200, -1, cv2.LINE_8, _SUBPIXEL_BITS)
    for points in shown:
        centre = _fixed_point(points[points[:, 1].argmin()][None], size)[0]
        radius = round(CLEAR * _extent(points, size) * (1 << _SUBPIXEL_BITS))
        cv2.circle(cover, centre, radius, 255, -1, cv2.LINE_8, _SUBPIXEL_BITS)
    return cover


def _extent(points: np.ndarray, size: tuple[int, int]) -> float:
    """The longer side of what joints `[J, 2]` span, pixels; at most twice that of the picture of (height, width)."""
    return min(float(np.ptp(points, axis=0).max()), 2.0 * max(size))


def _label(canvas: np.ndarray, poses: Sequence[np.ndarray], texts: Sequence[str], occupied: np.ndarray) -> None:
    """Write a text at each pose's joints `[J, 2]`, in the picture, as large as the person is but legible.

    occupied: `[H, W]` as `_occupied`, to which the labels are added; the first pose has the first choice of places.
    """
    size = height, width = occupied.shape
    for points, text in zip(poses, texts, strict=True):
        extent = _extent(points, size)
        # With its border the text is at most 37 pixels high at a scale of 1.
        scale = min(max(float(np.clip(extent / 700, 0.35, 0.7)), max(size) / 3000), extent / 4 / 37)
        (text_width, text_height), _ = cv2.getTextSize(text, FONT, scale, 1)
        border = 2 + text_height // 8
        wide, high = text_width + 2 * border, text_height + 2 * border
        if scale < 0.35 or wide > width or high > height:
            continue
        best, lowest = (0, 0), np.inf
        for number, centre in enumerate(_places(points, wide, high, CLEAR * extent + 2)):
            left = int(np.clip(centre[0] - wide / 2, 0, width - wide))
            top = int(np.clip(centre[1] - high / 2, 0, height - high))
            # Nearer places are tried first, and preferred where they hide a little more.
            cost = occupied[top : top + high, left : left + wide].mean() + number
            if cost < lowest:
                best, lowest = (left, top), cost
        left, top = best
        occupied[top : top + high, left : left + wide] = 255
        cv2.rectangle(canvas, best, (left + wide - 1, top + high - 1), OUTLINE, -1)
        foot = top + border + text_height
        cv2.putText(canvas, text, (left + border, foot), FONT, scale, (255, 255, 255), 1, cv2.LINE_AA)


def _places(points: np.ndarray, wide: float, high: float, clear: float) -> list[tuple[float, float]]:
    """Centres for a label of `wide` x `high` pixels, the best first: over the head, around it, around the person."""
    x, y = points[points[:, 1].argmin()]
    (low_x, low_y), (high_x, high_y) = points.min(0), points.max(0)
    places = []
    for reach in (clear, 1.5 * clear):
        across, down = reach + wide / 2, reach + high / 2
        places += [(x, y - down), (x + across, y - reach / 2), (x - across, y - reach / 2)]
        places += [(x + across, y - down), (x - across, y - down), (x + across, y + down), (x - across, y + down)]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        level = low_y + share * (high_y - low_y)
        places += [(high_x + clear / 2 + wide / 2, level), (low_x - clear / 2 - wide / 2, level)]
    return [*places, ((low_x + high_x) / 2, high_y + clear / 2 + high / 2)]


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
