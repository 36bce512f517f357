"""The parts and proportions of a body, and where a pose puts its points.

A body's own frame is (left, up, front), the camera's (right, down, away), both in metres with 0 at the pelvis.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .pose import Pose

SIDES = (("left", 1.0), ("right", -1.0))
PARTS = (
    "torso", "pelvis", "skirt", "neck", "head", "nose", "left_ear", "right_ear", "hair", "bag",
    "left_upper_arm", "left_forearm", "left_hand", "left_thigh", "left_shin", "left_foot",
    "right_upper_arm", "right_forearm", "right_hand", "right_thigh", "right_shin", "right_foot",
)  # fmt: skip
PERSON = 64  # label of a pixel: 0 = no person, else PERSON * its number + index in PARTS

# The parts whose surface a visible joint is seen on; on a ROUND one only while the joint's side of it faces the camera.
SURFACES = {
    "nose": ("nose", "head"),
    **{f"{side}_eye": ("head", "nose") for side, _ in SIDES},
    **{f"{side}_ear": (f"{side}_ear", "head") for side, _ in SIDES},
    **{f"{side}_shoulder": (f"{side}_upper_arm", "torso") for side, _ in SIDES},
    **{f"{side}_elbow": (f"{side}_upper_arm", f"{side}_forearm") for side, _ in SIDES},
    **{f"{side}_wrist": (f"{side}_forearm", f"{side}_hand") for side, _ in SIDES},
    **{f"{side}_hip": (f"{side}_thigh", "pelvis", "torso", "skirt") for side, _ in SIDES},
    **{f"{side}_knee": (f"{side}_thigh", f"{side}_shin") for side, _ in SIDES},
    **{f"{side}_ankle": (f"{side}_shin", f"{side}_foot") for side, _ in SIDES},
}
ROUND = ("head", "nose", "torso", "pelvis", "skirt")

HEAD_AXES = np.array([0.082, 0.118, 0.10])  # half axes (lateral, vertical, frontal), metres
# Points of the head in units of its half axes; five of them are joints.
HEAD_POINTS = {
    "nose": (0, -0.10, 1.16), "left_eye": (0.36, 0.10, 0.93), "right_eye": (-0.36, 0.10, 0.93),
    "left_ear": (1.0, -0.02, -0.08), "right_ear": (-1.0, -0.02, -0.08),
    "bridge": (0, 0.12, 0.95), "crown": (0, 0.6, -0.5), "nape": (0, -0.7, -0.2),
}  # fmt: skip


class Body(NamedTuple):
    """A pose as the camera sees it."""

    number: int
    """Of the person, from 1."""
    points: dict[str, np.ndarray]
    """[3] in the camera frame, metres."""
    pixels: dict[str, np.ndarray]
    """[2] in the image."""
    frames: dict[str, np.ndarray]
    """[3, 3] of pelvis, chest and head in the camera frame."""
    scale: dict[str, float]
    """Pixels per metre at each point."""
    girth: float
    """Relative to an average adult."""

    def label(self, part: str) -> int:
        """What the pixels of `part` hold in the label map."""
        return PERSON * self.number + PARTS.index(part)


def body_points(pose: Pose, camera: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Forward kinematics: points [3] in the camera frame (metres, 0 at the pelvis) and the frames [3, 3] of the trunk.

    `camera` is the rotation [3, 3] of a level camera to the one that looks.
    """
    towards_camera = np.diag([1.0, -1.0, -1.0])  # left is right, up is -down, front is -away
    stance = camera @ axis_rotation(2, pose.roll) @ towards_camera @ axis_rotation(1, pose.yaw)
    pelvis = stance @ axis_rotation(0, pose.lean)
    chest = pelvis @ _trunk_rotation(pose.spine)
    head = chest @ _trunk_rotation(pose.head)
    points = {"pelvis": np.zeros(3)}

    def place(
        name: str,
        origin: str,
        frame: np.ndarray,
        offset: tuple[float, float, float],
        stretch: float | np.ndarray = 1.0,
    ) -> None:
        points[name] = points[origin] + frame @ (np.array(offset) * stretch)

    trunk, shoulder, upper_arm, forearm, hip, thigh, shin = pose.stretch
    place("crotch", "pelvis", pelvis, (0, -0.03, 0))
    place("waist", "pelvis", pelvis, (0, 0.13, 0), trunk)
    place("neck", "waist", chest, (0, 0.38, 0), trunk)
    place("head", "neck", 0.5 * (chest + head), (0, 0.21, 0.025))
    for name, offset in HEAD_POINTS.items():
        place(name, "head", head, offset, HEAD_AXES)
    for (side, sign), arm, leg, ankle in zip(SIDES, pose.arms, pose.legs, pose.feet, strict=True):
        upper = chest @ _limb_rotation(sign, arm)
        fore = upper @ axis_rotation(0, -arm[3])
        lift = 0.05 * max(0.0, math.sin(math.radians(min(arm[0], 90))))  # the collar bone follows a raised arm
        place(f"{side}_shoulder", "neck", chest, (sign * 0.172 * shoulder, lift - 0.045, 0))
        place(f"{side}_elbow", f"{side}_shoulder", upper, (0, -0.285, 0), upper_arm)
        place(f"{side}_wrist", f"{side}_elbow", fore, (0, -0.25, 0), forearm)
        place(f"{side}_fingers", f"{side}_wrist", fore, (0, -0.12, 0.02))
        upper = pelvis @ _limb_rotation(sign, leg)
        lower = upper @ axis_rotation(0, leg[3])
        foot = lower @ axis_rotation(0, ankle)
        place(f"{side}_hip", "pelvis", pelvis, (sign * 0.092 * hip, 0, 0))
        place(f"{side}_knee", f"{side}_hip", upper, (0, -0.42, 0), thigh)
        place(f"{side}_ankle", f"{side}_knee", lower, (0, -0.40, 0), shin)
        place(f"{side}_heel", f"{side}_ankle", foot, (0, -0.045, -0.03))
        place(f"{side}_toe", f"{side}_ankle", foot, (sign * 0.02, -0.06, 0.165))
    return points, {"pelvis": pelvis, "chest": chest, "head": head}


def axis_rotation(axis: int, degrees: float) -> np.ndarray:
    """[3, 3] right-handed rotation about a coordinate axis."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i] = matrix[j, j] = cosine
    matrix[j, i], matrix[i, j] = sine, -sine
    return matrix


def _trunk_rotation(angles: np.ndarray) -> np.ndarray:
    """Frame of the chest in the pelvis' or of the head in the chest's: nod forward, turn, tilt (degrees)."""
    return axis_rotation(1, angles[1]) @ axis_rotation(0, angles[0]) @ axis_rotation(2, angles[2])


def _limb_rotation(sign: float, angles: np.ndarray) -> np.ndarray:
    """Frame of an upper arm or a thigh in its trunk's: abduction, flexion, inward twist (degrees)."""
    return axis_rotation(2, sign * angles[0]) @ axis_rotation(0, -angles[1]) @ axis_rotation(1, -sign * angles[2])
