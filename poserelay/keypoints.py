"""Skeletons: joint names, their mirror images, OKS sigmas and the groups that the methods use. Imports no torch."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

ASSUMED_SIGMA = 0.05
FOLDER = Path(__file__).parent / "skeletons"


@dataclass(frozen=True)
class Group:
    """A kinematic group of SCIO: the distal joint is predicted from the three proximal ones."""

    proximal: tuple[str, str, str]
    """A, B, C; A is the joint that the verification network predicts back."""
    distal: str
    """D."""


@dataclass(frozen=True)
class Skeleton:
    """The joints of one kind of body, in the order of the model's heatmaps."""

    name: str
    joints: tuple[str, ...]
    flip_pairs: tuple[tuple[str, str], ...] = ()
    """Joints that change places when the picture is mirrored."""
    sigmas: tuple[float, ...] = ()
    """One per joint, as in pycocotools (k = 2 sigma); left out: 0.05 for each, `sigmas_assumed`."""
    sigmas_assumed: bool = False
    """The sigmas were not measured for this body: its OKS compares only with itself."""
    limbs: tuple[tuple[str, str], ...] = ()
    """Lines of a drawing."""
    prcc_pairs: tuple[tuple[str, str], ...] = ()
    """Limbs whose pixels ICON contrasts."""
    upper_body: tuple[str, ...] = ()
    """Joints of a half-body crop; the others are the lower half."""
    groups: tuple[Group, ...] = ()
    """SCIO's groups."""
    torso: tuple[str, str] | None = None
    """The two joints whose distance is PCK's reference length."""

    def __post_init__(self) -> None:
        if not self.sigmas:
            object.__setattr__(self, "sigmas", (ASSUMED_SIGMA,) * len(self.joints))
            object.__setattr__(self, "sigmas_assumed", True)
        if problem := _problem(self):
            raise UserError(f"skeleton {self.name!r}: {problem}")

    @cached_property
    def flip_index(self) -> tuple[int, ...]:
        """Permutation: entry k is the joint that lands in place k when the picture is mirrored."""
        index = list(range(len(self.joints)))
        for left, right in (self.indices(pair) for pair in self.flip_pairs):
            index[left], index[right] = right, left
        return tuple(index)

    def indices(self, names: Iterable[str]) -> tuple[int, ...]:
        """Position of each joint; an unknown name is a UserError that lists the joints."""
        positions = {joint: index for index, joint in enumerate(self.joints)}
        found = []
        for name in names:
            if name not in positions:
                raise UserError(f"skeleton {self.name!r}: {_unknown_joint(name, self.joints)}")
            found.append(positions[name])
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for YAML, JSON and the hand-off file."""
        return {
            "name": self.name,
            "joints": list(self.joints),
            "flip_pairs": [list(pair) for pair in self.flip_pairs],
            "sigmas": list(self.sigmas),
            "sigmas_assumed": self.sigmas_assumed,
            "limbs": [list(pair) for pair in self.limbs],
            "prcc_pairs": [list(pair) for pair in self.prcc_pairs],
            "upper_body": list(self.upper_body),
            "groups": [{"proximal": list(group.proximal), "distal": group.distal} for group in self.groups],
            "torso": None if self.torso is None else list(self.torso),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "skeleton") -> Skeleton:
        """The inverse of `to_dict`; only `name` and `joints` are required.

        Raises:
            UserError: names `source`, the field, what was found and what is expected.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"{source}: expected a mapping with name and joints, found {_shown(data)}")
        for key in data:
            if key not in cls.__dataclass_fields__:
                raise UserError(f"{source}: unknown field {_shown(key)}{_nearest(str(key), cls.__dataclass_fields__)}")
        if not isinstance(data.get("name"), str):
            raise UserError(f"{source}: field name: expected a text, found {_shown(data.get('name'))}")
        assumed = data.get("sigmas_assumed", False)
        if not isinstance(assumed, bool):
            raise UserError(f"{source}: field sigmas_assumed: expected true or false, found {_shown(assumed)}")
        torso = data.get("torso")
        try:
            return cls(
                name=data["name"],
                joints=_names(data.get("joints"), "joints", source),
                flip_pairs=_pairs(data, "flip_pairs", source),
                sigmas=_numbers(data.get("sigmas", []), source),
                sigmas_assumed=assumed,
                limbs=_pairs(data, "limbs", source),
                prcc_pairs=_pairs(data, "prcc_pairs", source),
                upper_body=_names(data.get("upper_body", []), "upper_body", source),
                groups=_groups(data.get("groups", []), source),
                torso=None if torso is None else _pair(torso, "torso", source),
            )
        except UserError as error:
            raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from None


def load_skeleton(name_or_path: str | Path) -> Skeleton:
    """A packaged skeleton by name, or a user's own from a YAML file.

    Raises:
        UserError: no such skeleton or file, or a field of the file is wrong.
    """
    text = str(name_or_path)
    choices = packaged_skeletons()
    if text in choices:
        return _read_yaml(FOLDER / f"{text}.yaml")
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        return _read_yaml(path)
    raise UserError(
        f"unknown skeleton {text!r}{_nearest(text, choices)}; give one of {', '.join(choices)}, or a .yaml file"
    )


def packaged_skeletons() -> tuple[str, ...]:
    """Names that `load_skeleton` knows."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def skeleton_from_category(category: Mapping[str, Any], source: str = "categories") -> Skeleton:
    """Derive a skeleton from a COCO category: sigmas are assumed, mirror pairs come from the joint names.

    Two joints are a mirror pair if exchanging left and right (or a lone L and R) in one name gives the other. Limbs are
    the category's 1-based `skeleton`, or none if it points outside the joints (CrowdPose's file carries COCO's).
    """
    joints = _names(category.get("keypoints"), "keypoints", source)
    edges = category.get("skeleton") or []
    inside = all(
        isinstance(edge, Sequence)
        and len(edge) == 2
        and all(isinstance(end, int) and 1 <= end <= len(joints) for end in edge)
        for edge in edges
    )
    mirrored = [(joint, _mirror_name(joint)) for joint in joints]
    return Skeleton(
        name=str(category.get("name", "unnamed")),
        joints=joints,
        flip_pairs=tuple((a, b) for a, b in mirrored if b in joints and joints.index(a) < joints.index(b)),
        limbs=tuple((joints[start - 1], joints[end - 1]) for start, end in edges) if inside else (),
    )


def resolve_skeleton(spec: str, category: Mapping[str, Any], source: str = "categories") -> Skeleton:
    """The skeleton of a model: `spec` loaded, or for "auto" the one that the annotation file's category describes.

    "auto" takes the packaged skeleton with the same joints in the same order, for its measured sigmas, and derives one
    (`skeleton_from_category`) if there is none.
    """
    if spec != "auto":
        return load_skeleton(spec)
    derived = skeleton_from_category(category, source)
    identity = list(range(len(derived.joints)))
    for name in packaged_skeletons():
        packaged = load_skeleton(name)
        if len(packaged.joints) == len(identity) and match_joints(derived.joints, packaged.joints) == identity:
            return packaged
    return derived


def match_joints(source: Sequence[str], target: Sequence[str]) -> list[int | None]:
    """For each joint of `target` its index in `source`, by name; case, spaces, hyphens and underscores do not count."""
    positions = {_plain(joint): index for index, joint in enumerate(source)}
    return [positions.get(_plain(joint)) for joint in target]


def _plain(joint: str) -> str:
    return re.sub(r"[\s_-]+", "", joint).casefold()


_WORD = re.compile(r"left|right", re.IGNORECASE)
# A lone L or R: set off by non-letters (l_ear, ear.R), or by a change of case (LEar, earL).
_LETTER = re.compile(r"(?<![A-Za-z])[LRlr](?![A-Za-z])|(?<![A-Za-z])[LR](?=[A-Z][a-z])|(?<=[a-z])[LR](?![A-Za-z])")


def _mirror_name(joint: str) -> str:
    def swap(match: re.Match[str]) -> str:
        found = match.group()
        other = {"left": "right", "right": "left", "l": "r", "r": "l"}[found.lower()]
        return other.upper() if found.isupper() else other.capitalize() if found[0].isupper() else other

    return _WORD.sub(swap, joint) if _WORD.search(joint) else _LETTER.sub(swap, joint)


def _problem(skeleton: Skeleton) -> str | None:
    """What is wrong between the fields of a skeleton, or None."""
    joints = skeleton.joints
    if not joints:
        return "field joints: empty, expected at least one name"
    plain = [_plain(joint) for joint in joints]
    for index, joint in enumerate(joints):
        if plain.index(plain[index]) < index:
            return f"field joints: {joint!r} appears twice (case, spaces, hyphens and underscores do not count)"
    if len(skeleton.sigmas) != len(joints):
        return f"field sigmas: {len(skeleton.sigmas)} values for {len(joints)} joints"
    for sigma in skeleton.sigmas:
        if not (math.isfinite(sigma) and sigma > 0):
            return f"field sigmas: found {sigma}, expected positive numbers"
    used = {
        "flip_pairs": [joint for pair in skeleton.flip_pairs for joint in pair],
        "limbs": [joint for pair in skeleton.limbs for joint in pair],
        "prcc_pairs": [joint for pair in skeleton.prcc_pairs for joint in pair],
        "upper_body": list(skeleton.upper_body),
        "groups": [joint for group in skeleton.groups for joint in (*group.proximal, group.distal)],
        "torso": list(skeleton.torso or ()),
    }
    for field, names in used.items():
        for name in names:
            if name not in joints:
                return f"field {field}: {_unknown_joint(name, joints)}"
    distal = [group.distal for group in skeleton.groups]
    for group in skeleton.groups:
        four = (*group.proximal, group.distal)
        if len(set(four)) < 4:
            return f"field groups: {list(four)} names a joint twice, expected four different ones"
        if distal.count(group.distal) > 1:
            return f"field groups: {group.distal!r} is the distal joint of two groups, expected of one at most"
        if both := set(group.proximal) & set(distal):
            return (
                f"field groups: {min(both)!r} is proximal in one group and distal in another; a distal joint is one "
                "that is found badly, a proximal joint one that others can rest on"
            )
    for name in used["flip_pairs"]:
        if used["flip_pairs"].count(name) > 1:
            return f"field flip_pairs: {name!r} appears twice, expected each joint in one pair at most"
    return None


def _read_yaml(path: Path) -> Skeleton:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read this skeleton file ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    return Skeleton.from_dict(data, str(path))


def _names(value: Any, field: str, source: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{source}: field {field}: expected a list of joint names, found {_shown(value)}")
    return tuple(value)


def _pair(value: Any, field: str, source: str) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(name, str) for name in value):
        raise UserError(f"{source}: field {field}: expected a pair of joint names, found {_shown(value)}")
    return value[0], value[1]


def _pairs(data: Mapping[str, Any], field: str, source: str) -> tuple[tuple[str, str], ...]:
    value = data.get(field, [])
    if not isinstance(value, list):
        raise UserError(f"{source}: field {field}: expected a list of pairs of joint names, found {_shown(value)}")
    return tuple(_pair(pair, field, source) for pair in value)


def _numbers(value: Any, source: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        raise UserError(f"{source}: field sigmas: expected a list of numbers, one per joint, found {_shown(value)}")
    return tuple(float(x) for x in value)


def _groups(value: Any, source: str) -> tuple[Group, ...]:
    expected = "expected a list of {proximal: [A, B, C], distal: D}"
    if not isinstance(value, list):
        raise UserError(f"{source}: field groups: {expected}, found {_shown(value)}")
    groups = []
    for entry in value:
        if (
            not isinstance(entry, Mapping)
            or set(entry) != {"proximal", "distal"}
            or not isinstance(entry["distal"], str)
        ):
            raise UserError(f"{source}: field groups: {expected}, found {_shown(entry)}")
        proximal = _names(entry["proximal"], "groups", source)
        if len(proximal) != 3:
            raise UserError(f"{source}: field groups: {expected}, found {_shown(entry)}")
        groups.append(Group((proximal[0], proximal[1], proximal[2]), entry["distal"]))
    return tuple(groups)


def _unknown_joint(name: str, joints: Sequence[str]) -> str:
    return f"unknown joint {name!r}{_nearest(name, joints)}; the joints are {', '.join(joints)}"


def _nearest(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
