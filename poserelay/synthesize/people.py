"""People: posed, clothed, and placed in the picture so that enough of each is seen."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .body import SURFACES, Body, body_points
from .clothing import dress
from .colors import draw_cloth
from .pose import Pose, draw_pose
from .solids import Solid, Tube

STATURE = 1.72  # metres, of an average adult

# Joints that face the camera while they are at most so far (metres) behind the middle of these points.
TURNED = (
    (("nose",), ("head",), 0.05),  # sticks out of the profile
    (("left_eye", "right_eye"), ("head",), -0.02),
    (("left_ear", "right_ear"), ("head",), 0.02),
    (("left_shoulder", "right_shoulder"), ("left_shoulder", "right_shoulder"), 0.13),
    (("left_hip", "right_hip"), ("left_hip", "right_hip"), 0.07),
)


class Person(NamedTuple):
    """What a picture needs of a person."""

    number: int
    """From 1, near to far."""
    joints: dict[str, np.ndarray]
    """[2] each, image pixels."""
    facing: dict[str, bool]
    """Whether the joint's side of a round part faces the camera."""
    ground: tuple[float, float]
    """Where the person stands, image pixels."""
    scale: float
    """Pixels per metre."""
    solids: list[Solid]
    """Far to near."""


def draw_people(generator: np.random.Generator, size: int, horizon: float, camera: np.ndarray) -> list[Person]:
    """Sample 1-4 people, far to near, for a picture of `size` x `size` pixels with its horizon in row `horizon`.

    Nobody is placed with under nine joints in the picture or much behind a nearer person. `camera` is the rotation
    [3, 3] of a level camera to the one that looks.
    """
    count = int(generator.choice([1, 2, 3, 4], p=[0.6, 0.24, 0.1, 0.06]))
    tallest = {1: 1.25, 2: 1.0, 3: 0.85, 4: 0.75}[count]
    statures = np.exp(generator.uniform(math.log(0.36), math.log(tallest), count)) * size
    people: list[Person] = []  # near to far while they are placed
    for height in np.sort(statures)[::-1]:
        least = 9 if generator.random() < 0.3 else 15
        for _ in range(12):
            scale = float(height) / STATURE
            # The ground under a person of this size, for a camera about 1.5 m over it.
            ground = (generator.uniform(-0.02, 1.02) * size, horizon + scale * generator.normal(1.5, 0.2))
            person = draw_person(generator, draw_pose(generator), camera, ground, scale, len(people) + 1)
            points = np.stack(list(person.joints.values()))
            inside = np.all((points >= 0) & (points <= size - 1), axis=1)
            hidden = np.zeros(len(points), bool)
            for other in people:
                corners = np.stack(list(other.joints.values()))
                hidden |= np.all((points > corners.min(0)) & (points < corners.max(0)), axis=1)
            if inside.sum() >= least and (inside & ~hidden).sum() >= 0.7 * inside.sum():
                people.append(person)
                break
    if not people:
        return draw_people(generator, size, horizon, camera)
    return people[::-1]


def draw_person(
    generator: np.random.Generator,
    pose: Pose,
    camera: np.ndarray,
    ground: tuple[float, float],
    scale: float,
    number: int,
) -> Person:
    """Clothe a body and stand it on `ground` (image pixels), seen at `scale` pixels per metre."""
    points, frames = body_points(pose, camera)
    distance = generator.uniform(3, 9)  # metres to the camera: how strongly near parts are enlarged
    nearness = {name: distance / (distance + point[2]) for name, point in points.items()}
    lowest = max(float(point[1]) for point in points.values())
    origin = np.array(ground) - [0, lowest * scale]
    pixels = {name: origin + scale * nearness[name] * point[:2] for name, point in points.items()}
    facing = dict.fromkeys(SURFACES, True)
    for names, middle, tolerance in TURNED:
        reference = sum(float(points[name][2]) for name in middle) / len(middle)
        facing |= {name: bool(points[name][2] < reference + tolerance) for name in names}
    body = Body(number, points, pixels, frames, {name: scale * value for name, value in nearness.items()}, pose.girth)
    solids = dress(generator, body)
    if pose.kind == "sit":
        solids.append(_seat(generator, body, ground[1]))
    joints = {name: pixels[name] for name in SURFACES}
    return Person(number, joints, facing, ground, scale, sorted(solids, key=lambda solid: -solid.depth))


def _seat(generator: np.random.Generator, body: Body, ground: float) -> Tube:
    scale = body.scale["pelvis"]
    top = body.pixels["pelvis"] + np.array([0, 0.13 * scale])
    half = generator.uniform(0.2, 0.45) * scale
    depth = max(float(point[2]) for point in body.points.values()) + 0.1
    bottom = np.array([top[0], max(ground, top[1] + 0.1 * scale)])
    return Tube(0, depth, top, bottom, (half, half), (1.0, 1.0), draw_cloth(generator, scale), flat=True)
