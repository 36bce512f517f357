"""Sampled colours and patterns, RGB, 0..255."""

from __future__ import annotations

import math

import numpy as np

from .solids import Cloth

# RGB palettes; a colour is drawn between two neighbours.
SKIN = np.array([[250, 220, 200], [236, 190, 160], [208, 152, 116], [160, 108, 76], [112, 74, 52], [74, 50, 38]], float)
HAIR = np.array([[28, 22, 20], [60, 40, 26], [104, 70, 42], [170, 130, 76], [120, 52, 28], [176, 172, 168]], float)


def draw_between(generator: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    """A colour [3] float32 about the line through neighbouring entries of a palette [N, 3]."""
    place = generator.uniform(0, len(palette) - 1)
    index = min(int(place), len(palette) - 2)
    mixed = palette[index] + (place - index) * (palette[index + 1] - palette[index])
    return np.clip(mixed + generator.normal(0, 6, 3), 0, 255).astype(np.float32)


def draw_color(generator: np.random.Generator, vivid: float = 1.0) -> np.ndarray:
    """A colour [3] float32, mostly dull; now and then a skin or hair tone, so that colour does not tell a limb."""
    if generator.random() < 0.15:
        return draw_between(generator, SKIN if generator.random() < 0.7 else HAIR)
    hue, saturation, value = generator.uniform(0, 6), vivid * generator.beta(1.2, 2.4), generator.uniform(0.12, 0.98)
    ramp = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return (255 * value * (1 - saturation * (1 - ramp))).astype(np.float32)


def draw_cloth(generator: np.random.Generator, scale: float) -> Cloth:
    """Plain or patterned cloth; a pattern repeats every 3 to 15 cm at `scale` pixels per metre."""
    color, accent = draw_color(generator), draw_color(generator)
    kind = generator.choice(["plain", "rings", "stripes", "checks"], p=[0.7, 0.12, 0.1, 0.08])
    frequency = 2 * math.pi / (generator.uniform(0.03, 0.15) * scale)
    along = frequency if kind in ("rings", "checks") else 0.0
    across = frequency if kind in ("stripes", "checks") else 0.0
    return Cloth(color, accent, color, 2.0, along, across)
