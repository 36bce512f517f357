"""Brightness, contrast, saturation, hue and grey of uint8 pictures, as torchvision jitters PIL's. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

# ITU-R 601 luma, the weights of PIL's mode L, on which torchvision's jitter of PIL images rests.
LUMA = np.array([0.299, 0.587, 0.114])

# the operations of the colour jitter, each with the factor that changes nothing
JITTER = (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.0))

GREY = (("saturation", 0.0),)


_DIAGONAL = np.arange(3)


class ColourMap(NamedTuple):
    """An affine map of colours: scale x colour + luma x the colour's luma + shift, alike in all channels.

    Brightness, contrast, saturation and grey are such maps, and so is what they compose to.
    """

    scale: float
    luma: float
    shift: float


UNCHANGED = ColourMap(1.0, 0.0, 0.0)


def jitter_colour(view: np.ndarray, jitter: tuple[tuple[str, float], ...], grey: bool, fused: bool) -> np.ndarray:
    """Apply the jitter's operations in their order, then grey, to uint8 RGB `[h, w, 3]`.

    Colours are rounded and clipped to 0..255 after every operation, as PIL does; `fused` composes all that is affine to
    one map, or two where the turn of the hue comes between, and rounds and clips after a map.
    """
    colours = UNCHANGED
    for name, factor in (*jitter, *GREY[:grey]):
        # The turn of the hue may come first where colours have only been scaled and shifted: it takes such a colour to
        # the turned colour scaled and shifted.
        waits = fused and (name != "hue" or colours.luma == 0)
        if not waits:
            view, colours = map_colours(view, colours), UNCHANGED
        if name == "hue":
            view = turn_hue(view, factor)
        else:
            mean = float(LUMA @ cv2.mean(view)[:3]) if name == "contrast" else 0.0
            colours = blend(colours, name, factor, mean)
    return map_colours(view, colours)


def blend(colours: ColourMap, name: str, factor: float, mean: float) -> ColourMap:
    """Follow a map by brightness, contrast or saturation; `mean` is the mean luma of the picture before the map.

    As PIL's ImageEnhance does, each blends the picture with a reference: black (brightness), its mean luma (contrast),
    its luma (saturation, and grey at factor 0).
    """
    scale, luma, shift = (factor * number for number in colours)
    if name == "contrast":
        shift += (1 - factor) * ((colours.scale + colours.luma) * mean + colours.shift)
    elif name == "saturation":
        luma += (1 - factor) * (colours.scale + colours.luma)
        shift = colours.shift
    return ColourMap(scale, luma, shift)


def map_colours(view: np.ndarray, colours: ColourMap) -> np.ndarray:
    """Apply a map to uint8 RGB `[h, w, 3]`, rounded and clipped."""
    if colours is UNCHANGED:
        return view
    matrix = np.full((3, 4), colours.shift)
    matrix[:, :3] = colours.luma * LUMA
    matrix[_DIAGONAL, _DIAGONAL] += colours.scale
    return cv2.transform(view, matrix)


def turn_hue(view: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue of uint8 RGB `[h, w, 3]` by a share of the full circle, in steps of 1/256.

    A rotation of YIQ would be one more affine map, but holds the luma where this holds the largest channel, so that
    views would differ in the mean, the spread and the saturation of their colours (tests/test_views.py).
    """
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    row = np.zeros(hsv.shape[1:], np.uint8)  # whole rows are added faster than every third byte
    row[:, 0] = round(256 * turn) % 256
    hsv += row
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
