"""The solids of a body in sampled clothes. Radii and half axes are in metres."""

from __future__ import annotations

import numpy as np

from .body import HEAD_AXES, SIDES, Body
from .colors import HAIR, SKIN, draw_between, draw_cloth
from .solids import Cloth, Head, Solid, Tube, plain

# Half axes (lateral, vertical, frontal) at the lower and the upper end.
TORSO_AXES = np.array([[0.130, 0.06, 0.10], [0.155, 0.03, 0.095]])
PELVIS_AXES = np.array([[0.150, 0.06, 0.115], [0.132, 0.03, 0.10]])
BAG_AXES = np.array([[0.13, 0.04, 0.08], [0.12, 0.04, 0.07]])


def dress(generator: np.random.Generator, body: Body) -> list[Solid]:
    """The solids of a body, in no order."""
    skin = draw_between(generator, SKIN)
    hair = draw_between(generator, HAIR)
    scale = body.scale["pelvis"]
    top, bottom, shoes = (draw_cloth(generator, scale) for _ in range(3))
    if generator.random() < 0.12:
        bottom = top
    # As shares of the upper arm and of the thigh; 2 reaches the hand or the foot.
    sleeve = float(generator.choice([0.0, 0.35, 0.7, 2.0], p=[0.1, 0.2, 0.25, 0.45]))
    trousers = float(generator.choice([0.45, 0.85, 2.0], p=[0.15, 0.15, 0.7]))
    solids = _trunk(body, top, bottom, skin) + _head(generator, body, skin, hair)
    if trousers < 1 and generator.random() < 0.35:
        solids.append(_skirt(body, bottom))
    if generator.random() < 0.12:
        solids.append(_backpack(body, draw_cloth(generator, scale)))
    bare = plain(skin)
    upper = top._replace(beyond=skin, cut=sleeve) if sleeve else bare
    fore = top._replace(beyond=skin, cut=0.92) if sleeve > 1 else bare
    thigh = bottom._replace(beyond=skin, cut=trousers)
    shin = bottom._replace(beyond=shoes.color, cut=0.95) if trousers > 1 else bare
    for side, _ in SIDES:
        solids += [
            _limb(body, f"{side}_upper_arm", f"{side}_shoulder", f"{side}_elbow", (0.055, 0.043), upper, 0.08),
            _limb(body, f"{side}_forearm", f"{side}_elbow", f"{side}_wrist", (0.043, 0.029), fore, 0.10),
            _limb(body, f"{side}_hand", f"{side}_wrist", f"{side}_fingers", (0.03, 0.034), bare, 0.15),
            _limb(body, f"{side}_thigh", f"{side}_hip", f"{side}_knee", (0.086, 0.058), thigh, 0.05),
            _limb(body, f"{side}_shin", f"{side}_knee", f"{side}_ankle", (0.056, 0.038), shin, 0.16),
            _limb(body, f"{side}_foot", f"{side}_heel", f"{side}_toe", (0.044, 0.036), shoes, 0.05),
        ]
    return solids


def _trunk(body: Body, top: Cloth, bottom: Cloth, skin: np.ndarray) -> list[Solid]:
    # Shoulders and hips are bone: they widen less than the waist.
    waist, bone = body.girth, 0.5 + 0.5 * body.girth
    torso = _section(body, "torso", ("waist", "neck"), "chest", TORSO_AXES * [[waist], [bone]], top)
    hips = _section(body, "pelvis", ("crotch", "waist"), "pelvis", PELVIS_AXES * [[bone], [waist]], bottom)
    neck = _limb(body, "neck", "neck", "nape", (0.056, 0.05), plain(skin))
    # The shirt hangs over the trousers, and the head over the neck.
    behind_head = max(neck.depth, float(body.points["head"][2]) + 0.01)
    return [torso._replace(depth=torso.depth - 0.02), hips, neck._replace(depth=behind_head)]


def _head(generator: np.random.Generator, body: Body, skin: np.ndarray, hair: np.ndarray) -> list[Solid]:
    frame, scale, center = body.frames["head"], body.scale["head"], body.points["head"]
    style = str(generator.choice(["short", "long", "bald", "hat"], p=[0.5, 0.27, 0.08, 0.15]))
    head = Head(
        label=body.label("head"),
        depth=float(center[2]),
        center=body.pixels["head"],
        frame=frame,
        radii=HEAD_AXES * scale,
        skin=skin,
        hair=draw_cloth(generator, scale).color if style == "hat" else hair,
        hairline={"short": -0.03, "long": -0.12, "bald": 2.0, "hat": 0.05}[style] + generator.normal(0, 0.04),
        beard=bool(generator.random() < 0.15),
        glasses=bool(generator.random() < 0.15),
    )
    bare = plain(skin * 0.97)
    solids: list[Solid] = [head, _limb(body, "nose", "bridge", "nose", (0.010, 0.017), bare)]
    if style == "long":
        tip = center + frame @ np.array([0, -0.17, -0.075])
        crown, fall = body.pixels["crown"], body.pixels["head"] + scale * (tip - center)[:2]
        width = (0.085 * scale, 0.075 * scale)
        depth = float(0.5 * (tip + body.points["crown"])[2])
        solids.append(Tube(body.label("hair"), depth, crown, fall, width, width, plain(hair)))
        return solids  # the hair covers the ears
    up = 0.014 * scale * frame[:2, 1]
    width = (0.017 * scale, 0.013 * scale)
    for side, _ in SIDES:
        ear = f"{side}_ear"
        middle, depth = body.pixels[ear], float(body.points[ear][2])
        solids.append(Tube(body.label(ear), depth, middle + up, middle - up, width, width, bare))
    return solids


def _limb(
    body: Body, part: str, start: str, end: str, radii: tuple[float, float], cloth: Cloth, bulge: float = 0.0
) -> Tube:
    width = (radii[0] * body.girth * body.scale[start], radii[1] * body.girth * body.scale[end])
    depth = 0.5 * (body.points[start][2] + body.points[end][2])
    return Tube(body.label(part), depth, body.pixels[start], body.pixels[end], width, width, cloth, bulge)


def _section(body: Body, part: str, ends: tuple[str, str], frame: str, axes: np.ndarray, cloth: Cloth) -> Tube:
    """A tube of elliptic section; `axes` [2, 3]: lateral, vertical and frontal half axes at the two ends, metres."""
    start, end = (body.pixels[name] for name in ends)
    matrix = body.frames[frame]
    line = end - start
    along = np.append(line / max(float(np.linalg.norm(line)), 1e-6), 0.0)
    across = np.array([-along[1], along[0], 0.0])
    axes = axes * [[body.scale[name]] for name in ends]
    width, cap = (tuple(np.linalg.norm(axes * (direction @ matrix), axis=1)) for direction in (across, along))
    seam = float(matrix[:, 2] @ across) if matrix[2, 2] < 0 else 2.0
    depth = sum(float(body.points[name][2]) for name in ends) / 2
    return Tube(body.label(part), depth, start, end, width, cap, cloth, seam=seam)


def _skirt(body: Body, cloth: Cloth) -> Tube:
    left, right, start = body.pixels["left_knee"], body.pixels["right_knee"], body.pixels["waist"]
    end = start + 0.72 * (0.5 * (left + right) - start)
    scale = body.scale["pelvis"]
    depth = min(float(body.points[f"{side}_{joint}"][2]) for side, _ in SIDES for joint in ("hip", "knee")) - 0.05
    spread = 0.5 * float(np.linalg.norm(left - right))
    width = (0.125 * body.girth * scale, 0.8 * spread + 0.12 * body.girth * scale)
    return Tube(body.label("skirt"), depth, start, end, width, (0.03 * scale, 0.03 * scale), cloth)


def _backpack(body: Body, cloth: Cloth) -> Tube:
    bag = _section(body, "bag", ("waist", "neck"), "chest", BAG_AXES, cloth)
    behind = body.frames["chest"] @ np.array([0, -0.05, -0.15])
    shift = behind[:2] * body.scale["neck"]
    return bag._replace(start=bag.start + shift, end=bag.end + shift, depth=bag.depth + behind[2], seam=2.0)
