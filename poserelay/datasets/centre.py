"""The centre of a picture, as classifiers of ImageNet are validated on."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of uint8 RGB `[H, W, 3]` as `[size, size, 3]`, its shorter side first brought to 8/7 size.

    For 224 this is torchvision's Resize(256) and CenterCrop(224): PIL's bilinear filter, which widens as it shrinks.
    """
    height, width = image.shape[:2]
    shorter = round(size * 8 / 7)
    height, width = (int(shorter * side / min(height, width)) for side in (height, width))
    top, left = round((height - size) / 2), round((width - size) / 2)
    # torch's vectorised kernel wants channels last, and gives them back
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    resized = interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)
    crop = resized[0, :, top : top + size, left : left + size]
    return np.ascontiguousarray(crop.permute(1, 2, 0).numpy())
