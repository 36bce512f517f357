"""Solids to pixels: the picture, and beside it a map of what each pixel shows.

Pixel (0, 0) is centred at (0, 0). Every painter lays soft edges one pixel wide.
"""

from __future__ import annotations

import numpy as np

from .scene import Scene
from .solids import Head, Tube


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Paint a scene: picture [H, W, 3] float32 RGB 0..255, and labels [H, W] int32 of what each pixel shows."""
    canvas = scene.background.copy()
    labels = np.zeros(canvas.shape[:2], np.int32)
    for solid in scene.solids:
        if isinstance(solid, Head):
            _paint_head(canvas, labels, solid, scene.light)
        else:
            _paint_tube(canvas, labels, solid, scene.light, scene.grain)
    return canvas, labels


def _paint_tube(canvas: np.ndarray, labels: np.ndarray, tube: Tube, light: np.ndarray, grain: np.ndarray) -> None:
    reach = max(*tube.width, *tube.cap) * (1 + tube.bulge)
    window = _window(labels, np.minimum(tube.start, tube.end) - reach, np.maximum(tube.start, tube.end) + reach)
    if window is None:
        return
    line = tube.end - tube.start
    length = max(float(np.linalg.norm(line)), 1e-3)
    ex, ey = (line / length).astype(np.float32)
    x = np.arange(window[1].start, window[1].stop, dtype=np.float32) - np.float32(tube.start[0])
    y = np.arange(window[0].start, window[0].stop, dtype=np.float32)[:, None] - np.float32(tube.start[1])
    along = x * ex + y * ey
    across = y * ex - x * ey
    inside = np.clip(along, 0, np.float32(length))
    share = inside * np.float32(1 / length)
    width = np.float32(tube.width[0]) + np.float32(tube.width[1] - tube.width[0]) * share
    if tube.bulge:
        width *= 1 + np.float32(4 * tube.bulge) * share * (1 - share)
    beyond = along - inside
    u = across / width
    # Distance to the edge in pixels, to first order: exact enough for a soft edge one pixel wide.
    if tube.flat:
        coverage = np.clip((1 - np.abs(u)) * width + 0.5, 0, 1) * np.clip(1.5 - np.abs(beyond), 0, 1)
        facing = -light[2]
    else:
        v = beyond * np.where(beyond < 0, np.float32(1 / tube.cap[0]), np.float32(1 / tube.cap[1]))
        squared = u * u + v * v
        coverage = np.clip((1 - np.sqrt(squared)) * width + 0.5, 0, 1)
        depth = np.sqrt(np.clip(1 - squared, 0, 1))
        facing = u * (light[1] * ex - light[0] * ey) + v * (light[0] * ex + light[1] * ey) - depth * light[2]
    shade = (0.62 + 0.46 * facing) * grain[window]
    color = tube.cloth.color * shade[..., None]
    if tube.cloth.along or tube.cloth.across:
        wave = np.cos(along * np.float32(tube.cloth.along)) * np.cos(across * np.float32(tube.cloth.across)) > 0
        color = np.where(wave[..., None], color, tube.cloth.accent * shade[..., None])
    if tube.cloth.cut < 1:
        color = np.where((share > tube.cloth.cut)[..., None], tube.cloth.beyond * shade[..., None], color)
    if tube.seam <= 1:
        color *= np.where(np.abs(u - np.float32(tube.seam)) < 0.06, np.float32(0.6), np.float32(1))[..., None]
    _blend(canvas[window], labels[window], tube.label, coverage, color)


def _paint_head(canvas: np.ndarray, labels: np.ndarray, head: Head, light: np.ndarray) -> None:
    reach = float(head.radii.max())
    window = _window(labels, head.center - reach, head.center + reach)
    if window is None:
        return
    x = np.arange(window[1].start, window[1].stop, dtype=np.float32) - np.float32(head.center[0])
    y = np.arange(window[0].start, window[0].stop, dtype=np.float32)[:, None] - np.float32(head.center[1])
    # The near point of the ellipsoid |A p| = 1 on the ray through each pixel, p = (x, y, z).
    to_sphere = (head.frame.T / head.radii[:, None]).astype(np.float32)
    metric = to_sphere.T @ to_sphere
    half_b = metric[0, 2] * x + metric[1, 2] * y
    squared = metric[0, 0] * x * x + 2 * metric[0, 1] * x * y + metric[1, 1] * y * y - half_b * half_b / metric[2, 2]
    coverage = np.clip((1 - np.sqrt(np.maximum(squared, 0))) * np.float32(reach) + 0.5, 0, 1)
    z = (-half_b - np.sqrt(metric[2, 2] * np.maximum(1 - squared, 0))) / metric[2, 2]
    left, up, front = (row[0] * x + row[1] * y + row[2] * z for row in to_sphere)
    local_light = (head.frame.T @ light).astype(np.float32) / head.radii.astype(np.float32) * np.float32(reach)
    facing = np.clip(left * local_light[0] + up * local_light[1] + front * local_light[2], -1, 1)
    shade = (0.62 + 0.42 * facing)[..., None]
    _blend(canvas[window], labels[window], head.label, coverage, _head_color(head, left, up, front) * shade)


def _head_color(head: Head, left: np.ndarray, up: np.ndarray, front: np.ndarray) -> np.ndarray:
    """[h, w, 3] of points on the unit sphere that the head is an image of."""
    to_eye, over_eye, face = np.abs(np.abs(left) - 0.36), np.abs(up - 0.10), front > 0
    hair = 0.66 * up - 0.75 * front > head.hairline
    beard = (up < -0.38) & (front > 0.1) & head.beard
    white = face & ~hair & (to_eye < 0.17) & (over_eye < 0.09)
    pupil = (to_eye < 0.27) & (over_eye < 0.16) if head.glasses else (to_eye < 0.08) & (over_eye < 0.09)
    brow = (to_eye < 0.2) & (np.abs(up - 0.3) < 0.05)
    mouth = (np.abs(left) < 0.26) & (np.abs(up + 0.5) < 0.06)
    color = np.where((hair | beard)[..., None], head.hair, head.skin)
    color = np.where(white[..., None], np.float32(225), color)
    return np.where((face & (pupil | brow | mouth))[..., None], np.float32(0.25) * head.skin, color)


def _window(labels: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[slice, slice] | None:
    """The rows and columns of the picture between two corners (x, y)."""
    height, width = labels.shape
    left, top = max(int(low[0]) - 1, 0), max(int(low[1]) - 1, 0)
    right, bottom = min(int(high[0]) + 3, width), min(int(high[1]) + 3, height)
    return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


def _blend(canvas: np.ndarray, labels: np.ndarray, label: int, coverage: np.ndarray, color: np.ndarray) -> None:
    """Lay `color` over views of the picture; a pixel belongs to what covers half of it or more."""
    canvas += coverage[..., None] * (color - canvas)
    labels[coverage >= 0.5] = label
