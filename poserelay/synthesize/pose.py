"""Joint angles and proportions of a person, sampled from everyday stances. Angles are in degrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Degrees: abduction, flexion (forward), inward twist, elbow; the limb at rest hangs. Left, right, standard deviation,
# and how often it is drawn.
ARMS = {
    "hang": ((10, 2, 10, 18), (10, 2, 10, 18), (6, 12, 15, 12), 0.30),
    "hips": ((42, -25, 70, 95), (42, -25, 70, 95), (8, 8, 12, 12), 0.10),
    "raised": ((150, 15, 0, 30), (150, 15, 0, 30), (20, 15, 20, 20), 0.10),
    "wave": ((125, 15, -10, 65), (10, 5, 10, 25), (20, 15, 20, 20), 0.10),
    "swing": ((8, 40, 10, 80), (8, -42, 10, 65), (6, 15, 15, 20), 0.12),
    "reach": ((8, 75, 0, 25), (8, 75, 0, 25), (12, 20, 20, 20), 0.06),
    "folded": ((12, 35, 65, 105), (12, 30, 65, 100), (6, 10, 10, 12), 0.05),
    "phone": ((25, 55, 10, 140), (10, 0, 10, 20), (10, 15, 15, 10), 0.05),
    "spread": ((88, 0, 0, 15), (88, 0, 0, 15), (12, 12, 20, 15), 0.08),
    "free": ((60, 40, 10, 60), (60, 40, 10, 60), (50, 50, 40, 45), 0.04),
}
ARM_LIMITS = ((0, -50, -80, 0), (178, 175, 90, 148))
# Degrees: abduction, flexion, inward twist, knee; then how far the trunk leans forward and how often it is drawn.
LEGS = {
    "stand": ((6, 3, -8, 5), (6, 3, -8, 5), (4, 6, 8, 6), 2, 0.40),
    "stride": ((3, 27, 0, 12), (3, -18, 0, 20), (4, 10, 8, 10), 3, 0.22),
    "run": ((4, 62, 0, 80), (4, -16, 0, 50), (5, 12, 8, 20), 10, 0.10),
    "sit": ((12, 84, 0, 82), (12, 84, 0, 82), (9, 8, 10, 12), 4, 0.08),
    "squat": ((20, 100, -10, 118), (20, 100, -10, 118), (10, 12, 10, 12), 25, 0.03),
    "lunge": ((6, 75, 0, 75), (4, -22, 0, 40), (5, 10, 8, 12), 6, 0.04),
    "wide": ((24, 4, -12, 8), (24, 4, -12, 8), (8, 8, 8, 10), 3, 0.09),
    "leap": ((22, 45, 0, 60), (22, 20, 0, 60), (15, 30, 15, 30), 5, 0.04),
}
LEG_LIMITS = ((-12, -35, -35, 0), (65, 130, 35, 145))


class Pose(NamedTuple):
    """A body before it is placed; angles in degrees, rows of `arms` and `legs` are left and right."""

    kind: str
    """Key of LEGS."""
    yaw: float
    """0 faces the camera, 90 the right edge of the picture."""
    roll: float
    """Turn in the picture."""
    lean: float
    """Of the pelvis, forward."""
    spine: np.ndarray
    """[3] bend forward, turn, tilt of the chest."""
    head: np.ndarray
    """[3] likewise."""
    arms: np.ndarray
    """[2, 4] abduction, flexion, inward twist, elbow."""
    legs: np.ndarray
    """[2, 4] abduction, flexion, inward twist, knee."""
    feet: np.ndarray
    """[2] toes down."""
    stretch: np.ndarray
    """[7] trunk, shoulders, upper arms, forearms, hips, thighs, shins relative to an average adult."""
    girth: float
    """Relative to an average adult."""


def draw_pose(generator: np.random.Generator) -> Pose:
    """Sample proportions and joint angles."""
    kind = str(generator.choice(list(LEGS), p=[values[-1] for values in LEGS.values()]))
    left_leg, right_leg, leg_spread, lean, _ = LEGS[kind]
    gesture = str(generator.choice(list(ARMS), p=[values[-1] for values in ARMS.values()]))
    left_arm, right_arm, arm_spread, _ = ARMS[gesture]
    bow = generator.uniform(20, 80) if generator.random() < 0.04 else 0.0
    lean = generator.normal(lean, 5) + bow / 2
    spine = generator.normal([bow / 2 + 3, 0, 0], [6, 10, 6])
    legs = _draw_angles(generator, (left_leg, right_leg), leg_spread, LEG_LIMITS)
    legs[:, 1] += lean  # so that the legs keep their place under a leaning trunk
    return Pose(
        kind=kind,
        yaw=generator.uniform(-180, 180) if generator.random() < 0.35 else generator.normal(0, 30),
        roll=generator.uniform(-180, 180) if generator.random() < 0.02 else generator.normal(0, 3),
        lean=lean,
        spine=spine,
        head=generator.normal([4 - 0.5 * (lean + spine[0]), 0, 0], [10, 18, 7]),
        arms=_draw_angles(generator, (left_arm, right_arm), arm_spread, ARM_LIMITS),
        legs=legs,
        feet=generator.normal(8, 10, 2),
        stretch=generator.normal(1, 0.05, 7) * generator.normal(1, 0.06),
        girth=float(np.exp(generator.normal(0, 0.16))),
    )


def _draw_angles(
    generator: np.random.Generator,
    means: Sequence[Sequence[float]],
    spread: Sequence[float],
    limits: tuple[Sequence[float], Sequence[float]],
) -> np.ndarray:
    """[2, 4] degrees, left and right; the two sides of a lopsided pose change places half of the time."""
    order = [0, 1] if generator.random() < 0.5 else [1, 0]
    return np.clip(generator.normal(np.array(means, float)[order], spread), *limits)
