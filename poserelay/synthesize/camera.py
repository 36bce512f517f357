"""What a camera does to a picture."""

from __future__ import annotations

import cv2
import numpy as np


def photograph(generator: np.random.Generator, picture: np.ndarray) -> tuple[np.ndarray, int]:
    """Exposure, colour cast, blur and sensor noise on a square picture [H, W, 3] float32 RGB.

    Returns the picture [H, W, 3] uint8 BGR and its JPEG quality.
    """
    size = picture.shape[0]
    gains = generator.normal(1, 0.06, 3) * generator.uniform(0.75, 1.2)
    slope = 1 + np.linspace(-1, 1, size, dtype=np.float32) * np.float32(generator.normal(0, 0.1))
    picture = picture * (slope[:, None, None] * gains.astype(np.float32))
    picture = cv2.GaussianBlur(picture, (0, 0), size / 256 * generator.uniform(0.35, 1.0))
    picture += generator.standard_normal((size, size, 1), np.float32) * np.float32(generator.uniform(0, 7))
    quality = int(generator.integers(45, 96))
    return cv2.cvtColor(np.clip(picture, 0, 255).astype(np.uint8), cv2.COLOR_RGB2BGR), quality
