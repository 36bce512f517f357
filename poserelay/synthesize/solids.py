"""The shaded solids that everything in a picture is made of, in image pixels; colours are RGB, 0..255."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np


class Cloth(NamedTuple):
    """Colours [3] of a tube."""

    color: np.ndarray
    accent: np.ndarray
    """Second colour of the pattern."""
    beyond: np.ndarray
    """Colour past `cut`, where a sleeve or a trouser leg ends."""
    cut: float = 2.0
    """Share of the tube's length."""
    along: float = 0.0
    """Angular frequency of the pattern along the tube, per pixel; with both 0 there is none."""
    across: float = 0.0
    """The same across it."""


def plain(color: np.ndarray) -> Cloth:
    """Cloth, or skin, of one colour [3]."""
    return Cloth(color, color, color)


class Tube(NamedTuple):
    """A limb, a trunk, a box, a ball: a band around a line with elliptic ends."""

    label: int
    depth: float
    """Metres away from the camera; the nearer one is painted later."""
    start: np.ndarray
    end: np.ndarray
    width: tuple[float, float]
    """Half width at start and end."""
    cap: tuple[float, float]
    """How far the rounded ends reach beyond start and end."""
    cloth: Cloth
    bulge: float = 0.0
    """Added to the half width in the middle, as a share of it."""
    seam: float = 2.0
    """Where the garment's front line is across the tube, -1..1; beyond 1 it faces away."""
    flat: bool = False
    """A board: square ends, even light."""


class Head(NamedTuple):
    """An ellipsoid with hair and a face."""

    label: int
    depth: float
    center: np.ndarray
    frame: np.ndarray
    """[3, 3], columns left, up, front in the camera frame."""
    radii: np.ndarray
    """Half axes in that frame, pixels."""
    skin: np.ndarray
    hair: np.ndarray
    hairline: float
    """Larger is less hair; above 1.5 is bald."""
    beard: bool
    glasses: bool


Solid: TypeAlias = Tube | Head
