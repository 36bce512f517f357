"""What a picture shows: background, clutter, people and what stands in front of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from .body import axis_rotation
from .colors import draw_cloth, draw_color
from .people import Person, draw_people
from .solids import Solid, Tube


class Scene(NamedTuple):
    """A picture before it is painted."""

    background: np.ndarray
    """[H, W, 3] float32, RGB."""
    grain: np.ndarray
    """[H, W] float32 around 1: wrinkles and dirt on every surface but heads."""
    light: np.ndarray
    """Unit vector to the light in the camera frame."""
    solids: list[Solid]
    """In the order of painting, far to near."""
    people: list[Person]


def draw_scene(generator: np.random.Generator, size: int) -> Scene:
    """Sample a scene of 1-4 people for a picture of `size` x `size` pixels."""
    light = np.array([generator.normal(0, 0.8), -1.0, generator.uniform(-1.4, -0.2)], np.float32)
    light /= np.linalg.norm(light)
    horizon = size * generator.uniform(0.15, 0.6)
    camera = axis_rotation(2, generator.normal(0, 4)) @ axis_rotation(0, generator.normal(4, 7))
    grain = 1 + generator.uniform(0.05, 0.16) * _noise(generator, size, (size // 6, size // 20))
    people = draw_people(generator, size, horizon, camera)
    background = _draw_background(generator, size, horizon, people)
    solids: list[Solid] = [_draw_object(generator, size, horizon) for _ in range(generator.integers(1, 6))]
    for person in people:
        solids += person.solids
        if generator.random() < 0.2:
            solids += _draw_occluder(generator, size, person)
    return Scene(background, grain, light, solids, people)


def _draw_background(generator: np.random.Generator, size: int, horizon: float, people: list[Person]) -> np.ndarray:
    """Wall or sky over ground, blurred shapes that stand on it, texture, and the people's shadows."""
    rows = np.arange(size, dtype=np.float32)[:, None, None]
    far, near, haze = (draw_color(generator, vivid=0.6) for _ in range(3))
    above = far + (haze - far) * np.float32(generator.uniform(0, 0.8)) * np.minimum(rows / np.float32(horizon), 1)
    below = near * (1 - np.float32(generator.uniform(0, 0.4)) * (size - rows) / size)
    picture = np.broadcast_to(np.where(rows < horizon, above, below), (size, size, 3)).astype(np.float32, order="C")
    for _ in range(generator.integers(2, 10)):
        color = (0.5 * (far + draw_color(generator, vivid=0.6))).tolist()
        foot = np.array([generator.uniform(0, size), horizon + size * generator.exponential(0.08)])
        half, height = size * generator.uniform(0.02, 0.2), size * generator.uniform(0.05, 0.6)
        if generator.random() < 0.6:
            low, high = foot - np.array([half, height]), foot + np.array([half, 0])
            cv2.rectangle(picture, low.astype(int).tolist(), high.astype(int).tolist(), color, -1)
        else:
            axes = [int(half), int(0.5 * height)]
            cv2.ellipse(picture, foot.astype(int).tolist(), axes, generator.normal(0, 30), 0, 360, color, -1)
    picture = cv2.GaussianBlur(picture, (0, 0), size / 256 * generator.uniform(0.5, 3))
    contrast = np.float32(generator.uniform(0.03, 0.16))
    texture = 1 + contrast * _noise(generator, size, (size // 3, size // 10, size // 40, 2))
    columns = np.arange(size, dtype=np.float32)
    for person in people:
        across = np.exp(-(((columns - person.ground[0]) / (0.38 * person.scale)) ** 2))
        down = np.exp(-(((columns - person.ground[1]) / (0.09 * person.scale)) ** 2))
        texture *= 1 - np.float32(0.55) * np.outer(down, across).astype(np.float32)
    return picture * texture[..., None]


def _draw_object(generator: np.random.Generator, size: int, horizon: float) -> Tube:
    """A box, a ball or a stick behind everybody, in the colours and materials of people."""
    kind = generator.choice(["box", "stick", "ball"], p=[0.3, 0.5, 0.2])
    column, row = generator.uniform(0, size), generator.normal(horizon + 0.2 * size, 0.25 * size)
    start = np.array([column, np.clip(row, 0, size)])
    half = size * generator.uniform(0.03, 0.13)
    cloth = draw_cloth(generator, 0.5 * size)
    if kind == "box":
        end = start + np.array([0, generator.uniform(0.1, 0.5) * size])
        return Tube(0, 0, start, end, (half, half), (1.0, 1.0), cloth, flat=True)
    if kind == "ball":
        return Tube(0, 0, start, start + 0.01, (half, half), (half, half), cloth)
    angle, length = generator.uniform(0, 2 * math.pi), size * generator.uniform(0.1, 0.4)
    end = start + length * np.array([math.cos(angle), math.sin(angle)])
    width = (0.4 * half, 0.4 * half * generator.uniform(0.5, 1))
    return Tube(0, 0, start, end, width, width, cloth, bulge=0.1)


def _draw_occluder(generator: np.random.Generator, size: int, person: Person) -> list[Tube]:
    """Something in front of a part of `person`: a post, a box, a bush, a board."""
    points = np.stack(list(person.joints.values()))
    low, high = points.min(0), points.max(0)
    extent = float(max(high - low))
    kind = generator.choice(["post", "box", "bush", "board"])
    center = low + generator.uniform(0.1, 0.9, 2) * (high - low)
    cloth = draw_cloth(generator, 0.5 * size)
    if kind == "post":
        half = extent * generator.uniform(0.03, 0.07)
        top = np.array([center[0], low[1] - generator.uniform(-0.5, 0.6) * extent])
        foot = np.array([center[0] + generator.normal(0, 0.1) * extent, high[1] + 0.2 * extent])
        return [Tube(0, 0, top, foot, (half, half), (half, half), cloth)]
    if kind == "box":
        half = extent * generator.uniform(0.1, 0.35)
        top = np.array([center[0], max(center[1], 0.5 * (low[1] + high[1]))])
        foot = np.array([center[0], high[1] + 0.1 * extent])
        return [Tube(0, 0, top, foot, (half, half), (1.0, 1.0), cloth, flat=True)]
    if kind == "board":
        half = extent * generator.uniform(0.03, 0.08)
        reach = np.array([extent * generator.uniform(0.3, 0.8), generator.normal(0, 0.1) * extent])
        return [Tube(0, 0, center - reach, center + reach, (half, half), (1.0, 1.0), cloth, flat=True)]
    leaf = cloth._replace(color=cloth.color * np.array([0.5, 0.9, 0.4], np.float32), along=0.0, across=0.0)
    tubes = []
    for offset in generator.normal([0, 0.03 * extent], [0.15 * extent, 0.12 * extent], (14, 2)):
        half = extent * generator.uniform(0.015, 0.05)
        start, blade = np.array([center[0], high[1]]) + offset, generator.normal([0, -0.1 * extent], 0.07 * extent)
        shade = leaf._replace(color=leaf.color * np.float32(generator.uniform(0.6, 1.3)))
        tubes.append(Tube(0, 0, start, start + blade, (half, 0.3 * half), (half, 0.3 * half), shade, bulge=0.3))
    return tubes


def _noise(generator: np.random.Generator, size: int, cells: Sequence[int]) -> np.ndarray:
    """[size, size] float32 smooth noise of about unit variance; `cells` are the grains' sizes in pixels."""
    total = np.zeros((size, size), np.float32)
    for cell in cells:
        count = max(2, round(size / max(cell, 1)))
        grains = generator.standard_normal((count, count), np.float32)
        total += cv2.resize(grains, (size, size), interpolation=cv2.INTER_CUBIC)
    return total / np.float32(math.sqrt(len(cells)))
