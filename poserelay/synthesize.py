"""Rendered pictures of articulated people with COCO-keypoint annotations, for demonstrations and tests.

A person is a 3-D skeleton with sampled proportions, joint angles and clothing. Every body part is a shaded solid, a
`Tube` or a `Head`; they are painted far to near together with clutter and occluders, and a map of what each pixel shows
is painted along: visibility, box, area and mask are read from it.

Frames: a body's own is (left, up, front), the camera's (right, down, away), both in metres; all else is image pixels.
Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from tqdm import tqdm

from .errors import UserError
from .keypoints import Skeleton, load_skeleton
from .run import write_json

Array: TypeAlias = NDArray[Any]

RENDERER = 1  # raise it when the pictures of a seed change, so that an old folder is not taken for a new one

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

# Joints that face the camera while they are at most so far (metres) behind the middle of these points.
TURNED = (
    (("nose",), ("head",), 0.05),  # sticks out of the profile
    (("left_eye", "right_eye"), ("head",), -0.02),
    (("left_ear", "right_ear"), ("head",), 0.02),
    (("left_shoulder", "right_shoulder"), ("left_shoulder", "right_shoulder"), 0.13),
    (("left_hip", "right_hip"), ("left_hip", "right_hip"), 0.07),
)
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

# RGB palettes; a colour is drawn between two neighbours.
SKIN = np.array([[250, 220, 200], [236, 190, 160], [208, 152, 116], [160, 108, 76], [112, 74, 52], [74, 50, 38]], float)
HAIR = np.array([[28, 22, 20], [60, 40, 26], [104, 70, 42], [170, 130, 76], [120, 52, 28], [176, 172, 168]], float)

STATURE = 1.72  # metres, of an average adult
# Half axes (lateral, vertical, frontal) at the lower and the upper end, metres.
TORSO_AXES = np.array([[0.130, 0.06, 0.10], [0.155, 0.03, 0.095]])
PELVIS_AXES = np.array([[0.150, 0.06, 0.115], [0.132, 0.03, 0.10]])
BAG_AXES = np.array([[0.13, 0.04, 0.08], [0.12, 0.04, 0.07]])
HEAD_AXES = np.array([0.082, 0.118, 0.10])
# Points of the head in units of its half axes; five of them are joints.
HEAD_POINTS = {
    "nose": (0, -0.10, 1.16), "left_eye": (0.36, 0.10, 0.93), "right_eye": (-0.36, 0.10, 0.93),
    "left_ear": (1.0, -0.02, -0.08), "right_ear": (-1.0, -0.02, -0.08),
    "bridge": (0, 0.12, 0.95), "crown": (0, 0.6, -0.5), "nape": (0, -0.7, -0.2),
}  # fmt: skip


@dataclass(frozen=True)
class SynthesizeConfig:
    """Render pictures of people with COCO-keypoint annotations (17 joints)."""

    out: str
    """Folder for images/ and annotations.json; created, or continued where the same command was interrupted."""
    images: int = 1000
    """Number of pictures, with one to four people each."""
    seed: int = 0
    """Every picture depends on this and its index alone; another seed gives another set."""
    size: int = 256
    """Height and width of the pictures, pixels."""
    workers: int = os.cpu_count() or 1
    """Processes; their number changes nothing in the pictures."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images is {self.images}, expected at least 1")
        if self.size < 32:
            raise ValueError(f"size is {self.size}, expected at least 32 pixels")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}, expected at least 1")


class Cloth(NamedTuple):
    """Colours of a tube (RGB, 0..255)."""

    color: Array
    accent: Array
    """Second colour of the pattern."""
    beyond: Array
    """Colour past `cut`, where a sleeve or a trouser leg ends."""
    cut: float = 2.0
    """Share of the tube's length."""
    along: float = 0.0
    """Angular frequency of the pattern along the tube, per pixel; with both 0 there is none."""
    across: float = 0.0


class Tube(NamedTuple):
    """A limb, a trunk, a box, a ball: a band around a line with elliptic ends, in image pixels."""

    label: int
    depth: float
    """Metres away from the camera; the nearer one is painted later."""
    start: Array
    end: Array
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
    center: Array
    frame: Array
    """[3, 3], columns left, up, front in the camera frame."""
    radii: Array
    """Half axes in that frame, pixels."""
    skin: Array
    hair: Array
    hairline: float
    """Larger is less hair; above 1.5 is bald."""
    beard: bool
    glasses: bool


Solid: TypeAlias = Tube | Head


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
    spine: Array
    """[3] bend forward, turn, tilt of the chest."""
    head: Array
    """[3] likewise."""
    arms: Array
    """[2, 4] abduction, flexion, inward twist, elbow."""
    legs: Array
    """[2, 4] abduction, flexion, inward twist, knee."""
    feet: Array
    """[2] toes down."""
    stretch: Array
    """[7] trunk, shoulders, upper arms, forearms, hips, thighs, shins relative to an average adult."""
    girth: float
    """Relative to an average adult."""


class Body(NamedTuple):
    """A pose as the camera sees it."""

    number: int
    points: dict[str, Array]
    """Camera frame, metres."""
    pixels: dict[str, Array]
    frames: dict[str, Array]
    """[3, 3] of pelvis, chest and head in the camera frame."""
    scale: dict[str, float]
    """Pixels per metre at each point."""
    girth: float

    def label(self, part: str) -> int:
        return PERSON * self.number + PARTS.index(part)


class Person(NamedTuple):
    """What a picture needs of a person."""

    number: int
    """From 1, near to far."""
    joints: dict[str, Array]
    """Image pixels."""
    facing: dict[str, bool]
    """Whether the joint's side of a round part faces the camera."""
    ground: tuple[float, float]
    """Where the person stands, image pixels."""
    scale: float
    """Pixels per metre."""
    solids: list[Solid]
    """Far to near."""


class Scene(NamedTuple):
    """A picture before it is painted."""

    background: Array
    """[H, W, 3] float32, RGB."""
    grain: Array
    """[H, W] float32 around 1: wrinkles and dirt on every surface."""
    light: Array
    """Unit vector to the light in the camera frame."""
    solids: list[Solid]
    """In the order of painting, far to near."""
    people: list[Person]


def main(config: SynthesizeConfig) -> None:
    """Entry of `poserelay synthesize`; prints the path of the annotations."""
    print(synthesize(Path(config.out), config.images, config.seed, size=config.size, workers=config.workers))


def synthesize(out: Path, images: int, seed: int, *, size: int = 256, workers: int = 1) -> Path:
    """Write `out/images/000000.jpg ...` and `out/annotations.json` (COCO, 17 joints), and return the latter's path.

    The same arguments give the same bytes whatever the number of workers. annotations.json is written last: where it
    exists the set is complete, and a second call returns at once.

    Raises:
        UserError: `out` holds anything but this very set, complete or interrupted, or cannot be written.
    """
    recipe = {"images": images, "seed": seed, "size": size, "renderer": RENDERER}
    annotations = out / "annotations.json"
    if _claim(out, recipe) and annotations.exists():
        return annotations
    skeleton = load_skeleton("coco17")
    render_one = partial(_write_image, out / "images", seed, size, skeleton)
    bar = partial(tqdm, total=images, desc="synthesize", unit="image", disable=None)
    try:
        (out / "images").mkdir(exist_ok=True)
        if workers == 1:
            people = list(bar(map(render_one, range(images))))
        else:
            # Not forked: the caller may hold threads of torch or OpenCV.
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                people = list(bar(pool.map(render_one, range(images), chunksize=8)))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}; start again to continue") from error
    write_json(annotations, _coco(people, size, skeleton, recipe))
    return annotations


def render(scene: Scene) -> tuple[Array, Array]:
    """Paint a scene: picture [H, W, 3] float32 RGB 0..255, and labels [H, W] int32 of what each pixel shows."""
    canvas = scene.background.copy()
    labels = np.zeros(canvas.shape[:2], np.int32)
    for solid in scene.solids:
        if isinstance(solid, Head):
            _paint_head(canvas, labels, solid, scene.light)
        else:
            _paint_tube(canvas, labels, solid, scene.light, scene.grain)
    return canvas, labels


def draw_scene(generator: np.random.Generator, size: int) -> Scene:
    """Sample a scene of 1-4 people for a picture of `size` x `size` pixels."""
    light = _unit(np.array([generator.normal(0, 0.8), -1.0, generator.uniform(-1.4, -0.2)], np.float32))
    horizon = size * generator.uniform(0.15, 0.6)
    camera = _axis_rotation(2, generator.normal(0, 4)) @ _axis_rotation(0, generator.normal(4, 7))
    grain = 1 + generator.uniform(0.05, 0.16) * _noise(generator, size, (size // 6, size // 20))
    people = _draw_people(generator, size, horizon, camera)
    background = _draw_background(generator, size, horizon, people)
    solids: list[Solid] = [_draw_object(generator, size, horizon) for _ in range(generator.integers(1, 6))]
    for person in people:
        solids += person.solids
        if generator.random() < 0.2:
            solids += _draw_occluder(generator, size, person)
    return Scene(background, grain, light, solids, people)


def annotate(person: Person, labels: Array, skeleton: Skeleton) -> dict[str, Any]:
    """COCO fields of a person in the picture with the given labels [H, W].

    A joint is 0 outside the picture (then at 0, 0), 2 where its pixel shows a surface that it lies on, and 1 elsewhere:
    behind an object, another person or the person's own body. Box and area are those of the visible pixels.
    """
    mask = labels // PERSON == person.number
    height, width = labels.shape
    keypoints = []
    for name in skeleton.joints:
        x, y = (round(float(value), 2) for value in person.joints[name])
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            keypoints += [0, 0, 0]
            continue
        pixel = (round(y), round(x))
        part = PARTS[labels[pixel] % PERSON] if mask[pixel] else None
        seen = part in SURFACES[name] and (person.facing[name] or part not in ROUND)
        keypoints += [x, y, 2 if seen else 1]
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = encoded["counts"].decode("ascii")  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "keypoints": keypoints,
        "num_keypoints": sum(flag > 0 for flag in keypoints[2::3]),
        "bbox": coco_mask.toBbox(encoded).tolist(),
        "area": int(mask.sum()),
        "segmentation": {"size": [height, width], "counts": counts},
        "iscrowd": 0,
    }


def _claim(out: Path, recipe: dict[str, int]) -> bool:
    """Whether `out` already belongs to this set; an empty or new folder is marked as belonging to it."""
    marker = out / "synthesis.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be used for synthesised pictures ({error}); choose another folder") from error
    if found is None and any(out.iterdir()):
        raise UserError(f"{out}: is not empty and holds no synthesised pictures; choose a new folder")
    if found is not None and found != recipe:
        raise UserError(
            f"{out}: holds another set ({found}), asked for {recipe}; choose a new folder or delete this one"
        )
    if found is None:
        write_json(marker, recipe)
    return found is not None


def _write_image(folder: Path, seed: int, size: int, skeleton: Skeleton, index: int) -> list[dict[str, Any]]:
    cv2.setNumThreads(1)
    generator = np.random.default_rng(np.random.SeedSequence([seed, index]))
    scene = draw_scene(generator, size)
    picture, labels = render(scene)
    photograph, quality = _photograph(generator, picture)
    _, encoded = cv2.imencode(".jpg", photograph, [cv2.IMWRITE_JPEG_QUALITY, quality])
    (folder / f"{index:06d}.jpg").write_bytes(encoded.tobytes())
    return [annotate(person, labels, skeleton) for person in scene.people if np.any(labels // PERSON == person.number)]


def _coco(
    people: Sequence[list[dict[str, Any]]], size: int, skeleton: Skeleton, recipe: dict[str, int]
) -> dict[str, Any]:
    owned = [(image, person) for image, persons in enumerate(people) for person in persons]
    return {
        "info": {"description": "synthesised people", "synthesis": recipe},
        "images": [{"id": i, "file_name": f"{i:06d}.jpg", "height": size, "width": size} for i in range(len(people))],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": 1, **person} for i, (image, person) in enumerate(owned)
        ],
        "categories": [
            {
                "id": 1,
                "name": "person",
                "supercategory": "person",
                "keypoints": list(skeleton.joints),
                "skeleton": [[i + 1 for i in skeleton.indices(limb)] for limb in skeleton.limbs],
            }
        ],
    }


def _photograph(generator: np.random.Generator, picture: Array) -> tuple[Array, int]:
    """Exposure, colour cast, blur and sensor noise: uint8 BGR picture and its JPEG quality."""
    size = picture.shape[0]
    gains = generator.normal(1, 0.06, 3) * generator.uniform(0.75, 1.2)
    slope = 1 + np.linspace(-1, 1, size, dtype=np.float32) * np.float32(generator.normal(0, 0.1))
    picture = picture * (slope[:, None, None] * gains.astype(np.float32))
    picture = cv2.GaussianBlur(picture, (0, 0), size / 256 * generator.uniform(0.35, 1.0))
    picture += generator.standard_normal((size, size, 1), np.float32) * np.float32(generator.uniform(0, 7))
    quality = int(generator.integers(45, 96))
    return cv2.cvtColor(np.clip(picture, 0, 255).astype(np.uint8), cv2.COLOR_RGB2BGR), quality


def _draw_people(generator: np.random.Generator, size: int, horizon: float, camera: Array) -> list[Person]:
    """Far to near. Nobody is placed with under nine joints in the picture or much behind a nearer person."""
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
        return _draw_people(generator, size, horizon, camera)
    return people[::-1]


def draw_pose(generator: np.random.Generator) -> Pose:
    """Sample proportions and joint angles."""
    kind = str(generator.choice(list(LEGS), p=[values[-1] for values in LEGS.values()]))
    left_leg, right_leg, leg_spread, lean, _ = LEGS[kind]
    arms = ARMS[str(generator.choice(list(ARMS), p=[values[-1] for values in ARMS.values()]))]
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
        arms=_draw_angles(generator, arms[:2], arms[2], ARM_LIMITS),
        legs=legs,
        feet=generator.normal(8, 10, 2),
        stretch=generator.normal(1, 0.05, 7) * generator.normal(1, 0.06),
        girth=float(np.exp(generator.normal(0, 0.16))),
    )


def _draw_angles(
    generator: np.random.Generator, means: Sequence[Sequence[float]], spread: Sequence[float], limits: Any
) -> Array:
    """[2, 4] degrees, left and right; the two sides of a lopsided pose change places half of the time."""
    order = [0, 1] if generator.random() < 0.5 else [1, 0]
    return np.clip(generator.normal(np.array(means, float)[order], spread), *limits)


def body_points(pose: Pose, camera: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Forward kinematics: points [3] in the camera frame (metres, 0 at the pelvis) and the frames [3, 3] of the trunk.

    `camera` is the rotation [3, 3] of a level camera to the one that looks.
    """
    towards_camera = np.diag([1.0, -1.0, -1.0])  # left is right, up is -down, front is -away
    stance = camera @ _axis_rotation(2, pose.roll) @ towards_camera @ _axis_rotation(1, pose.yaw)
    pelvis = stance @ _axis_rotation(0, pose.lean)
    chest = pelvis @ _trunk_rotation(pose.spine)
    head = chest @ _trunk_rotation(pose.head)
    points = {"pelvis": np.zeros(3)}

    def place(name: str, origin: str, frame: Array, offset: tuple[float, float, float], stretch: float = 1.0) -> None:
        points[name] = points[origin] + frame @ (np.array(offset) * stretch)

    trunk, shoulder, upper_arm, forearm, hip, thigh, shin = pose.stretch
    place("crotch", "pelvis", pelvis, (0, -0.03, 0))
    place("waist", "pelvis", pelvis, (0, 0.13, 0), trunk)
    place("neck", "waist", chest, (0, 0.38, 0), trunk)
    place("head", "neck", 0.5 * (chest + head), (0, 0.21, 0.025))
    for name, offset in HEAD_POINTS.items():
        points[name] = points["head"] + head @ (np.array(offset) * HEAD_AXES)
    for (side, sign), arm, leg, ankle in zip(SIDES, pose.arms, pose.legs, pose.feet, strict=True):
        upper = chest @ _limb_rotation(sign, arm)
        fore = upper @ _axis_rotation(0, -arm[3])
        lift = 0.05 * max(0.0, math.sin(math.radians(min(arm[0], 90))))  # the collar bone follows a raised arm
        place(f"{side}_shoulder", "neck", chest, (sign * 0.172 * shoulder, lift - 0.045, 0))
        place(f"{side}_elbow", f"{side}_shoulder", upper, (0, -0.285, 0), upper_arm)
        place(f"{side}_wrist", f"{side}_elbow", fore, (0, -0.25, 0), forearm)
        place(f"{side}_fingers", f"{side}_wrist", fore, (0, -0.12, 0.02))
        upper = pelvis @ _limb_rotation(sign, leg)
        lower = upper @ _axis_rotation(0, leg[3])
        foot = lower @ _axis_rotation(0, ankle)
        place(f"{side}_hip", "pelvis", pelvis, (sign * 0.092 * hip, 0, 0))
        place(f"{side}_knee", f"{side}_hip", upper, (0, -0.42, 0), thigh)
        place(f"{side}_ankle", f"{side}_knee", lower, (0, -0.40, 0), shin)
        place(f"{side}_heel", f"{side}_ankle", foot, (0, -0.045, -0.03))
        place(f"{side}_toe", f"{side}_ankle", foot, (sign * 0.02, -0.06, 0.165))
    return points, {"pelvis": pelvis, "chest": chest, "head": head}


def draw_person(
    generator: np.random.Generator, pose: Pose, camera: Array, ground: tuple[float, float], scale: float, number: int
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
    solids = _dress(generator, body)
    if pose.kind == "sit":
        solids.append(_seat(generator, body, ground[1]))
    joints = {name: pixels[name] for name in SURFACES}
    return Person(number, joints, facing, ground, scale, sorted(solids, key=lambda solid: -solid.depth))


def _axis_rotation(axis: int, degrees: float) -> Array:
    """[3, 3] right-handed rotation about a coordinate axis."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i] = matrix[j, j] = cosine
    matrix[j, i], matrix[i, j] = sine, -sine
    return matrix


def _trunk_rotation(angles: Array) -> Array:
    """Frame of the chest in the pelvis' or of the head in the chest's: nod forward, turn, tilt (degrees)."""
    return _axis_rotation(1, angles[1]) @ _axis_rotation(0, angles[0]) @ _axis_rotation(2, angles[2])


def _limb_rotation(sign: float, angles: Array) -> Array:
    """Frame of an upper arm or a thigh in its trunk's: abduction, flexion, inward twist (degrees)."""
    return _axis_rotation(2, sign * angles[0]) @ _axis_rotation(0, -angles[1]) @ _axis_rotation(1, -sign * angles[2])


def _unit(vector: Array) -> Array:
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def _dress(generator: np.random.Generator, body: Body) -> list[Solid]:
    """The solids of a body in sampled clothes."""
    skin = _between(generator, SKIN)
    hair = _between(generator, HAIR)
    tall = body.scale["pelvis"]
    top, bottom, shoes = (_draw_cloth(generator, tall) for _ in range(3))
    if generator.random() < 0.12:
        bottom = top
    sleeve = float(generator.choice([0.0, 0.35, 0.7, 2.0], p=[0.1, 0.2, 0.25, 0.45]))
    trousers = float(generator.choice([0.45, 0.85, 2.0], p=[0.15, 0.15, 0.7]))
    bare = Cloth(skin, skin, skin)
    solids = _trunk(body, top, bottom, skin) + _head(generator, body, skin, hair)
    if trousers < 1 and generator.random() < 0.35:
        solids.append(_skirt(body, bottom))
    if generator.random() < 0.12:
        solids.append(_backpack(body, _draw_cloth(generator, tall)))
    for side, _ in SIDES:
        arms = (f"{side}_shoulder", f"{side}_elbow", f"{side}_wrist", f"{side}_fingers")
        upper = top._replace(beyond=skin, cut=sleeve) if sleeve else bare
        fore = top._replace(cut=0.92, beyond=skin) if sleeve > 1 else bare
        solids.append(_limb(body, f"{side}_upper_arm", *arms[0:2], (0.055, 0.043), upper, 0.08))
        solids.append(_limb(body, f"{side}_forearm", *arms[1:3], (0.043, 0.029), fore, 0.10))
        solids.append(_limb(body, f"{side}_hand", *arms[2:4], (0.03, 0.034), bare, 0.15))
        legs = (f"{side}_hip", f"{side}_knee", f"{side}_ankle")
        thigh = bottom._replace(beyond=skin, cut=trousers) if trousers < 1 else bottom
        shin = bottom._replace(cut=0.95, beyond=shoes.color) if trousers > 1 else bare
        solids.append(_limb(body, f"{side}_thigh", *legs[0:2], (0.086, 0.058), thigh, 0.05))
        solids.append(_limb(body, f"{side}_shin", *legs[1:3], (0.056, 0.038), shin, 0.16))
        solids.append(_limb(body, f"{side}_foot", f"{side}_heel", f"{side}_toe", (0.044, 0.036), shoes, 0.05))
    return solids


def _limb(body: Body, part: str, start: str, end: str, radii: tuple[float, float], cloth: Cloth, bulge: float) -> Tube:
    width = (radii[0] * body.girth * body.scale[start], radii[1] * body.girth * body.scale[end])
    depth = 0.5 * (body.points[start][2] + body.points[end][2])
    return Tube(body.label(part), depth, body.pixels[start], body.pixels[end], width, width, cloth, bulge)


def _trunk(body: Body, top: Cloth, bottom: Cloth, skin: Array) -> list[Solid]:
    # Shoulders and hips are bone: they widen less than the waist.
    waist, bone = body.girth, 0.5 + 0.5 * body.girth
    torso = _section(body, "torso", ("waist", "neck"), "chest", TORSO_AXES * [[waist], [bone]], top)
    hips = _section(body, "pelvis", ("crotch", "waist"), "pelvis", PELVIS_AXES * [[bone], [waist]], bottom)
    neck = _limb(body, "neck", "neck", "nape", (0.056, 0.05), Cloth(skin, skin, skin), 0)
    # The shirt hangs over the trousers, and the head over the neck.
    behind_head = max(neck.depth, float(body.points["head"][2]) + 0.01)
    return [torso._replace(depth=torso.depth - 0.02), hips, neck._replace(depth=behind_head)]


def _section(body: Body, part: str, ends: tuple[str, str], frame: str, axes: Array, cloth: Cloth) -> Tube:
    """A tube of elliptic section; `axes` [2, 3]: lateral, vertical and frontal half axes at the two ends, metres."""
    start, end = (body.pixels[name] for name in ends)
    matrix = body.frames[frame]
    along = np.append(_unit(end - start), 0.0)
    across = np.array([-along[1], along[0], 0.0])
    axes = axes * [[body.scale[name]] for name in ends]
    width, cap = (tuple(np.linalg.norm(axes * (direction @ matrix), axis=1)) for direction in (across, along))
    seam = float(matrix[:, 2] @ across) if matrix[2, 2] < 0 else 2.0
    depth = sum(float(body.points[name][2]) for name in ends) / 2
    return Tube(body.label(part), depth, start, end, width, cap, cloth, seam=seam)


def _skirt(body: Body, cloth: Cloth) -> Tube:
    hem = 0.5 * (body.pixels["left_knee"] + body.pixels["right_knee"])
    start = body.pixels["waist"]
    spread = 0.5 * float(np.linalg.norm(body.pixels["left_knee"] - body.pixels["right_knee"]))
    scale = body.scale["pelvis"]
    depth = min(float(body.points[f"{side}_{joint}"][2]) for side, _ in SIDES for joint in ("hip", "knee")) - 0.05
    width = (0.125 * body.girth * scale, 0.8 * spread + 0.12 * body.girth * scale)
    return Tube(
        body.label("skirt"), depth, start, start + 0.72 * (hem - start), width, (0.03 * scale, 0.03 * scale), cloth
    )


def _backpack(body: Body, cloth: Cloth) -> Tube:
    bag = _section(body, "bag", ("waist", "neck"), "chest", BAG_AXES, cloth)
    behind = body.frames["chest"] @ np.array([0, -0.05, -0.15])
    shift = behind[:2] * body.scale["neck"]
    return bag._replace(start=bag.start + shift, end=bag.end + shift, depth=bag.depth + behind[2], seam=2.0)


def _head(generator: np.random.Generator, body: Body, skin: Array, hair: Array) -> list[Solid]:
    frame, scale, center = body.frames["head"], body.scale["head"], body.points["head"]
    style = generator.choice(["short", "long", "bald", "hat"], p=[0.5, 0.27, 0.08, 0.15])
    color = _draw_cloth(generator, scale).color if style == "hat" else hair
    hairline = {"short": -0.03, "long": -0.12, "bald": 2.0, "hat": 0.05}[str(style)] + generator.normal(0, 0.04)
    beard, glasses = bool(generator.random() < 0.15), bool(generator.random() < 0.15)
    place = (body.label("head"), float(center[2]), body.pixels["head"], frame, HEAD_AXES * scale)
    head = Head(*place, skin, color, hairline, beard, glasses)
    bare = Cloth(skin * 0.97, skin, skin)
    solids: list[Solid] = [head, _limb(body, "nose", "bridge", "nose", (0.010, 0.017), bare, 0)]
    if style == "long":
        tip = center + frame @ np.array([0, -0.17, -0.075])
        crown, fall = body.pixels["crown"], body.pixels["head"] + scale * (tip - center)[:2]
        width = (0.085 * scale, 0.075 * scale)
        depth = float(0.5 * (tip + body.points["crown"])[2])
        solids.append(Tube(body.label("hair"), depth, crown, fall, width, width, Cloth(hair, hair, hair)))
        return solids  # and covers the ears
    for side, _ in SIDES:
        ear = f"{side}_ear"
        up = 0.014 * scale * frame[:2, 1]
        width = (0.017 * scale, 0.013 * scale)
        solids.append(
            Tube(
                body.label(ear),
                float(body.points[ear][2]),
                body.pixels[ear] + up,
                body.pixels[ear] - up,
                width,
                width,
                bare,
            )
        )
    return solids


def _seat(generator: np.random.Generator, body: Body, ground: float) -> Tube:
    scale = body.scale["pelvis"]
    top = body.pixels["pelvis"] + np.array([0, 0.13 * scale])
    half = generator.uniform(0.2, 0.45) * scale
    depth = max(float(point[2]) for point in body.points.values()) + 0.1
    bottom = np.array([top[0], max(ground, top[1] + 0.1 * scale)])
    return Tube(0, depth, top, bottom, (half, half), (1.0, 1.0), _draw_cloth(generator, scale), flat=True)


def _between(generator: np.random.Generator, colors: Array) -> Array:
    """A colour on the line through neighbouring entries of the palette."""
    place = generator.uniform(0, len(colors) - 1)
    index = min(int(place), len(colors) - 2)
    mixed = colors[index] + (place - index) * (colors[index + 1] - colors[index])
    return np.clip(mixed + generator.normal(0, 6, 3), 0, 255).astype(np.float32)


def _draw_color(generator: np.random.Generator, vivid: float = 1.0) -> Array:
    """Any hue, mostly dull, now and then a skin or hair tone, so that colour does not tell what is a limb."""
    if generator.random() < 0.15:
        return _between(generator, SKIN if generator.random() < 0.7 else HAIR)
    hue, saturation, value = generator.uniform(0, 6), vivid * generator.beta(1.2, 2.4), generator.uniform(0.12, 0.98)
    ramp = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return (255 * value * (1 - saturation * (1 - ramp))).astype(np.float32)


def _draw_cloth(generator: np.random.Generator, scale: float) -> Cloth:
    """`scale` is in pixels per metre: a pattern repeats every 3 to 15 cm of it."""
    color, accent = _draw_color(generator), _draw_color(generator)
    kind = generator.choice(["plain", "rings", "stripes", "checks"], p=[0.7, 0.12, 0.1, 0.08])
    frequency = 2 * math.pi / (generator.uniform(0.03, 0.15) * scale)
    along = frequency if kind in ("rings", "checks") else 0.0
    across = frequency if kind in ("stripes", "checks") else 0.0
    return Cloth(color, accent, color, 2.0, along, across)


def _noise(generator: np.random.Generator, size: int, cells: Sequence[int]) -> Array:
    """[size, size] float32 smooth noise of about unit variance; `cells` are the grains' sizes in pixels."""
    total = np.zeros((size, size), np.float32)
    for cell in cells:
        count = max(2, round(size / max(cell, 1)))
        total += cv2.resize(
            generator.standard_normal((count, count), np.float32), (size, size), interpolation=cv2.INTER_CUBIC
        )
    return total / np.float32(math.sqrt(len(cells)))


def _draw_background(generator: np.random.Generator, size: int, horizon: float, people: list[Person]) -> Array:
    """Wall or sky over ground, blurred shapes that stand on it, texture, and the people's shadows."""
    rows = np.arange(size, dtype=np.float32)[:, None, None]
    far, near, haze = (_draw_color(generator, vivid=0.6) for _ in range(3))
    above = far + (haze - far) * np.float32(generator.uniform(0, 0.8)) * np.minimum(rows / np.float32(horizon), 1)
    below = near * (1 - np.float32(generator.uniform(0, 0.4)) * (size - rows) / size)
    picture = np.broadcast_to(np.where(rows < horizon, above, below), (size, size, 3)).astype(np.float32, order="C")
    for _ in range(generator.integers(2, 10)):
        color = (0.5 * (far + _draw_color(generator, vivid=0.6))).tolist()
        foot = np.array([generator.uniform(0, size), horizon + size * generator.exponential(0.08)])
        half, height = size * generator.uniform(0.02, 0.2), size * generator.uniform(0.05, 0.6)
        if generator.random() < 0.6:
            low, high = foot - np.array([half, height]), foot + np.array([half, 0])
            cv2.rectangle(picture, low.astype(int).tolist(), high.astype(int).tolist(), color, -1)
        else:
            axes = [int(half), int(0.5 * height)]
            cv2.ellipse(picture, foot.astype(int).tolist(), axes, generator.normal(0, 30), 0, 360, color, -1)
    picture = cv2.GaussianBlur(picture, (0, 0), size / 256 * generator.uniform(0.5, 3))
    texture = 1 + np.float32(generator.uniform(0.03, 0.16)) * _noise(
        generator, size, (size // 3, size // 10, size // 40, 2)
    )
    columns = np.arange(size, dtype=np.float32)
    for person in people:
        across = np.exp(-(((columns - person.ground[0]) / (0.38 * person.scale)) ** 2))
        down = np.exp(-(((columns - person.ground[1]) / (0.09 * person.scale)) ** 2))
        texture *= 1 - np.float32(0.55) * np.outer(down, across).astype(np.float32)
    return picture * texture[..., None]


def _draw_object(generator: np.random.Generator, size: int, horizon: float) -> Tube:
    """A box, a ball or a stick behind everybody, in the colours and materials of people."""
    kind = generator.choice(["box", "stick", "ball"], p=[0.3, 0.5, 0.2])
    start = np.array(
        [generator.uniform(0, size), np.clip(generator.normal(horizon + 0.2 * size, 0.25 * size), 0, size)]
    )
    half = size * generator.uniform(0.03, 0.13)
    cloth = _draw_cloth(generator, 0.5 * size)
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
    cloth = _draw_cloth(generator, 0.5 * size)
    if kind == "post":
        half = extent * generator.uniform(0.03, 0.07)
        top = np.array([center[0], low[1] - generator.uniform(-0.5, 0.6) * extent])
        tilt = generator.normal(0, 0.1) * extent
        return [
            Tube(0, 0, top, np.array([center[0] + tilt, high[1] + 0.2 * extent]), (half, half), (half, half), cloth)
        ]
    if kind == "box":
        half = extent * generator.uniform(0.1, 0.35)
        top = np.array([center[0], max(center[1], 0.5 * (low[1] + high[1]))])
        return [
            Tube(0, 0, top, np.array([center[0], high[1] + 0.1 * extent]), (half, half), (1.0, 1.0), cloth, flat=True)
        ]
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


def _window(labels: Array, low: Array, high: Array) -> tuple[slice, slice] | None:
    """The rows and columns of the picture between two corners (x, y)."""
    height, width = labels.shape
    left, top = max(int(low[0]) - 1, 0), max(int(low[1]) - 1, 0)
    right, bottom = min(int(high[0]) + 3, width), min(int(high[1]) + 3, height)
    return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


def _blend(canvas: Array, labels: Array, label: int, coverage: Array, color: Array) -> None:
    """Lay `color` over views of the picture; a pixel belongs to what covers half of it or more."""
    canvas += coverage[..., None] * (color - canvas)
    labels[coverage >= 0.5] = label


def _paint_tube(canvas: Array, labels: Array, tube: Tube, light: Array, grain: Array) -> None:
    reach = max(*tube.width, *tube.cap) * (1 + max(tube.bulge, 0))
    window = _window(labels, np.minimum(tube.start, tube.end) - reach, np.maximum(tube.start, tube.end) + reach)
    if window is None:
        return
    line = tube.end - tube.start
    length = max(float(np.linalg.norm(line)), 1e-3)
    ex, ey = (line / length).astype(np.float32)
    x = np.arange(window[1].start, window[1].stop, dtype=np.float32) - np.float32(tube.start[0])
    y = np.arange(window[0].start, window[0].stop, dtype=np.float32)[:, None] - np.float32(tube.start[1])
    along = x * ex + y * ey
    across = y * ex - x * ey
    inside = np.clip(along, 0, np.float32(length))
    share = inside * np.float32(1 / length)
    width = np.float32(tube.width[0]) + np.float32(tube.width[1] - tube.width[0]) * share
    if tube.bulge:
        width *= 1 + np.float32(4 * tube.bulge) * share * (1 - share)
    beyond = along - inside
    u = across / width
    v = beyond * np.where(beyond < 0, np.float32(1 / tube.cap[0]), np.float32(1 / tube.cap[1]))
    squared = u * u + v * v
    # Distance to the edge in pixels, to first order: exact enough for a soft edge one pixel wide.
    if tube.flat:
        coverage = np.clip((1 - np.abs(u)) * width + 0.5, 0, 1) * np.clip(1.5 - np.abs(beyond), 0, 1)
        facing = -light[2]
    else:
        coverage = np.clip((1 - np.sqrt(squared)) * width + 0.5, 0, 1)
        depth = np.sqrt(np.clip(1 - squared, 0, 1))
        facing = u * (light[1] * ex - light[0] * ey) + v * (light[0] * ex + light[1] * ey) - depth * light[2]
    shade = (0.62 + 0.46 * facing) * grain[window]
    color = tube.cloth.color * shade[..., None]
    if tube.cloth.along or tube.cloth.across:
        wave = np.cos(along * np.float32(tube.cloth.along)) * np.cos(across * np.float32(tube.cloth.across)) > 0
        color = np.where(wave[..., None], color, tube.cloth.accent * shade[..., None])
    if tube.cloth.cut < 1:
        color = np.where((share > tube.cloth.cut)[..., None], tube.cloth.beyond * shade[..., None], color)
    if tube.seam <= 1:
        color *= np.where(np.abs(u - np.float32(tube.seam)) < 0.06, np.float32(0.6), np.float32(1))[..., None]
    _blend(canvas[window], labels[window], tube.label, coverage, color)


def _paint_head(canvas: Array, labels: Array, head: Head, light: Array) -> None:
    reach = float(head.radii.max())
    window = _window(labels, head.center - reach, head.center + reach)
    if window is None:
        return
    x = np.arange(window[1].start, window[1].stop, dtype=np.float32) - np.float32(head.center[0])
    y = np.arange(window[0].start, window[0].stop, dtype=np.float32)[:, None] - np.float32(head.center[1])
    # The near point of the ellipsoid |A p| = 1 on the ray through each pixel, p = (x, y, z).
    to_sphere = (head.frame.T / head.radii[:, None]).astype(np.float32)
    metric = to_sphere.T @ to_sphere
    half_b = metric[0, 2] * x + metric[1, 2] * y
    squared = metric[0, 0] * x * x + 2 * metric[0, 1] * x * y + metric[1, 1] * y * y - half_b * half_b / metric[2, 2]
    coverage = np.clip((1 - np.sqrt(np.maximum(squared, 0))) * np.float32(reach) + 0.5, 0, 1)
    z = (-half_b - np.sqrt(metric[2, 2] * np.maximum(1 - squared, 0))) / metric[2, 2]
    left, up, front = (row[0] * x + row[1] * y + row[2] * z for row in to_sphere)
    local_light = (head.frame.T @ light).astype(np.float32) / head.radii.astype(np.float32) * np.float32(reach)
    facing = np.clip(left * local_light[0] + up * local_light[1] + front * local_light[2], -1, 1)
    shade = (0.62 + 0.42 * facing)[..., None]
    _blend(canvas[window], labels[window], head.label, coverage, _head_color(head, left, up, front) * shade)


def _head_color(head: Head, left: Array, up: Array, front: Array) -> Array:
    """[h, w, 3] of points on the unit sphere that the head is an image of."""
    to_eye, over_eye, face = np.abs(np.abs(left) - 0.36), np.abs(up - 0.10), front > 0
    hair = 0.66 * up - 0.75 * front > head.hairline
    beard = (up < -0.38) & (front > 0.1) & head.beard
    white = face & ~hair & (to_eye < 0.17) & (over_eye < 0.09)
    pupil = (to_eye < 0.27) & (over_eye < 0.16) if head.glasses else (to_eye < 0.08) & (over_eye < 0.09)
    brow = (to_eye < 0.2) & (np.abs(up - 0.3) < 0.05)
    mouth = (np.abs(left) < 0.26) & (np.abs(up + 0.5) < 0.06)
    color = np.where((hair | beard)[..., None], head.hair, head.skin)
    color = np.where(white[..., None], np.float32(225), color)
    return np.where((face & (pupil | brow | mouth))[..., None], np.float32(0.25) * head.skin, color)
