"""Boxes, crops and affine maps of the top-down pipeline, with HRNet's conventions; numpy float64, vectorised.

Frames: image pixels of the stored picture, input pixels of the network's crop; (0, 0) is the centre of the top-left
pixel. Boxes are xywh, sizes are (height, width).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def clip_boxes(boxes: ArrayLike, image_sizes: ArrayLike) -> Array:
    """Clip annotated boxes to their image as HRNet does: the far corner is inclusive, so width and height lose 1.

    A box that is left without area keeps one pixel.

    Args:
        boxes: `[..., 4]` xywh, image pixels.
        image_sizes: `[..., 2]` (height, width).
    """
    boxes, sizes = np.asarray(boxes, dtype=np.float64), np.asarray(image_sizes, dtype=np.float64)
    last = sizes[..., ::-1] - 1
    near = np.clip(boxes[..., :2], 0, last)
    # HRNet takes the far corner from the clipped near one, without taking off what was cut there.
    far = np.minimum(last, near + np.maximum(0, boxes[..., 2:] - 1))
    return np.concatenate([near, np.maximum(far - near, 1)], axis=-1)


def box_to_center_size(boxes: ArrayLike, aspect: float, padding: float = 1.25) -> tuple[Array, Array]:
    """Grow each box to `aspect` (width / height) about its centre, then by `padding`.

    Args:
        boxes: `[..., 4]` xywh, image pixels.

    Returns:
        Centres `[..., 2]` (x, y) and sizes `[..., 2]` (width, height), image pixels; sizes are HRNet's scale * 200.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    width = np.maximum(boxes[..., 2], boxes[..., 3] * aspect)
    return boxes[..., :2] + boxes[..., 2:] * 0.5, np.stack([width, width / aspect], axis=-1) * padding


def box_to_affine(
    boxes: ArrayLike,
    size: tuple[int, int],
    *,
    padding: float = 1.25,
    rotation: ArrayLike = 0.0,
    scale: ArrayLike = 1.0,
    flip: ArrayLike = False,
    alignment: Literal["hrnet", "udp"] = "hrnet",
) -> Array:
    """Affine maps from image to input pixels that fill the input with the padded box.

    "hrnet" maps the box's centre to (W/2, H/2) and its padded width to W, with one factor for both axes; "udp" counts
    lengths between pixel centres: ((W-1)/2, (H-1)/2), W-1 and H-1. With `flip` the crop is mirrored about the centre,
    which is what HRNet's mirroring of the whole picture, the joints and the centre amounts to.

    Args:
        boxes: `[..., 4]` xywh, image pixels.
        size: (height, width) of the input.
        rotation: `[...]` degrees; a positive angle turns the content counter-clockwise in the picture.
        scale: `[...]` factor on the padded box.
        flip: `[...]` bool.

    Returns:
        `[..., 2, 3]`.
    """
    height, width = size
    centers, lengths = box_to_center_size(boxes, width / height, padding)
    lengths = lengths * np.asarray(scale, dtype=np.float64)[..., None]
    if alignment == "hrnet":
        target = np.array([width, height]) / 2
        factors = np.broadcast_to(width / lengths[..., :1], lengths.shape)
    else:
        target = np.array([width - 1, height - 1]) / 2
        factors = np.array([width - 1, height - 1]) / lengths
    angle = np.deg2rad(np.asarray(rotation, dtype=np.float64))
    cosine, sine = np.broadcast_arrays(np.cos(angle), np.sin(angle), lengths[..., 0])[:2]
    turn = np.stack([np.stack([cosine, sine], axis=-1), np.stack([-sine, cosine], axis=-1)], axis=-2)
    mirror = np.stack([np.where(flip, -1.0, 1.0), np.ones(np.shape(flip))], axis=-1)
    # The picture is mirrored first, then turned.
    linear = factors[..., :, None] * turn * mirror[..., None, :]
    offset = target - (linear @ centers[..., None])[..., 0]
    return np.concatenate([linear, offset[..., None]], axis=-1)


def apply_affine(affine: ArrayLike, points: ArrayLike) -> Array:
    """Map points `[..., K, 2]` by `[..., 2, 3]`."""
    affine, points = np.asarray(affine, dtype=np.float64), np.asarray(points, dtype=np.float64)
    return points @ np.swapaxes(affine[..., :2], -1, -2) + affine[..., None, :, 2]


def invert_affine(affine: ArrayLike) -> Array:
    """Inverse maps of `[..., 2, 3]`."""
    affine = np.asarray(affine, dtype=np.float64)
    linear = np.asarray(np.linalg.inv(affine[..., :2]), dtype=np.float64)
    return np.concatenate([linear, -linear @ affine[..., 2:]], axis=-1)


def half_body_box(
    keypoints: ArrayLike, labelled: ArrayLike, upper: ArrayLike, prefer_upper: bool, padding: float = 1.25
) -> Array | None:
    """HRNet's half-body crop: a box about the mean of the chosen half's joints, 1.5 times their extent when padded.

    The upper half is taken if preferred and more than two of its joints are labelled, otherwise the lower half under
    the same condition, otherwise the upper.

    Args:
        keypoints: `[K, 2]` image pixels.
        labelled: `[K]` bool.
        upper: `[K]` bool, joints of the upper body.
        padding: the factor that the crop will be padded with; the box is returned without it.

    Returns:
        Box `[4]` xywh, image pixels; None if the half has fewer than two joints or they coincide.
    """
    labelled, upper = np.asarray(labelled, dtype=bool), np.asarray(upper, dtype=bool)
    above, below = labelled & upper, labelled & ~upper
    chosen = above if (prefer_upper and above.sum() > 2) or below.sum() <= 2 else below
    joints = np.asarray(keypoints, dtype=np.float64)[chosen]
    if len(joints) < 2 or not (extent := np.ptp(joints, axis=0)).any():
        return None
    size = extent * (1.5 / padding)
    return np.concatenate([joints.mean(axis=0) - size / 2, size])
