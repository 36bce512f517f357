"""A second look of a report at predictions, with the truth at hand: their diagnosis, and persons to look at."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from poserelay.datasets.coco import check_images_exist, read_coco, read_json
from poserelay.errors import UserError
from poserelay.keypoints import Skeleton, resolve_skeleton
from poserelay.scoring import Truth, results_that_count, scored_truth

from .cir_figures import results_of
from .config import ReportConfig
from .diagnose import diagnose
from .error_gallery import WorstPose, described, judged_joints, worst_poses, worst_views
from .error_types import error_types
from .pose_figures import in_skeleton, posed

PERSONS = 3
"""Of each kind: best, median and worst."""
SIDE = 240
"""Pixels of a side of each of the two pictures of a person."""
GAP = 6
QUALITY = 82


class Shown(NamedTuple):
    """A person, the labels at the left and the prediction at the right."""

    jpeg: str
    """Base64."""
    size: tuple[int, int]
    """Width and height."""
    caption: str
    """OKS, score, picture and person."""
    errors: str
    """The joints by their kind of error."""


class Gallery(NamedTuple):
    """Persons of one evaluation to whom a pose is matched, no person twice."""

    best: list[Shown]
    """Of the greatest OKS times labelled joints: by OKS alone persons of a single label would come first."""
    median: list[Shown]
    """About as many have a greater OKS as have a lower one."""
    worst: list[Shown]
    """`worst_poses`, the worst first."""
    matched: int
    missed: int
    """Persons to whom no pose is matched."""


class Looker:
    """The truth of a report, read once."""

    def __init__(self, config: ReportConfig) -> None:
        """Raises UserError for an annotation file or a folder of pictures that cannot be used."""
        data = read_json(Path(str(config.annotations)))
        annotations = read_coco(str(config.annotations), data)
        self.skeleton: Skeleton = resolve_skeleton(config.skeleton, annotations.category, str(config.annotations))
        self.truth: Truth = scored_truth(annotations, self.skeleton, data=data)
        persons = self.truth.counted.persons
        if not len(persons):
            raise UserError(f"{annotations.path}: holds no person with a labelled joint; take a file with the truth")
        self.images = config.images
        if config.images is not None:
            check_images_exist([annotations.file_names[annotations.image_index[persons[0]]]], config.images)

    def results(self, folder: Path) -> list[Mapping[str, Any]]:
        """The poses that count of an evaluation's predictions.json, in the joints that are scored. Raises UserError."""
        return [*results_that_count(self.truth, results_of(str(folder / "predictions.json"), self.truth))]

    def diagnosis(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`diagnose.diagnose` of them."""
        return diagnose(self.truth, results, self.skeleton)

    def gallery(self, results: Sequence[Mapping[str, Any]]) -> Gallery:
        """Persons found best, worst, and in between. Raises UserError and UnreadableImage."""
        errors = error_types(self.truth, results, self.skeleton)
        poses = worst_poses(self.truth, results, self.skeleton, errors, len(errors.oks))
        count = min(PERSONS, len(poses) // 3)
        worst, rest = (poses[:count], poses[count:]) if count else ([], poses)
        best = sorted(rest, key=lambda its: -its.oks * int((its.kinds >= 0).sum()))[: count or PERSONS]
        left = sorted((its for its in rest if not any(its is other for other in best)), key=lambda its: -its.oks)
        middle = max(0, (len(left) - count) // 2)
        median, missed = left[middle : middle + count], len(self.truth.counted.persons) - len(poses)
        return Gallery(self._shown(best), self._shown(median), self._shown(worst), len(poses), missed)

    def _shown(self, poses: Sequence[WorstPose]) -> list[Shown]:
        if not poses:
            return []
        joints, shown = self.truth.counted.joints, []
        for its, view in zip(poses, worst_views(poses, self.truth, str(self.images)), strict=True):
            both = (its.labels, judged_joints(its))
            sides = [posed(view, in_skeleton(points, self.skeleton, joints), self.skeleton) for points in both]
            small = [cv2.resize(side, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for side in sides]
            drawn = np.concatenate([small[0], np.full((SIDE, GAP, 3), 255, np.uint8), small[1]], axis=1)
            ok, encoded = cv2.imencode(".jpg", drawn[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
            assert ok, "a picture of uint8"
            jpeg = base64.b64encode(encoded.tobytes()).decode()
            caption = f"OKS {its.oks:.2f}, score {its.score:.2f}; {its.name}"
            shown.append(Shown(jpeg, (drawn.shape[1], SIDE), caption, "; ".join(one_line(described(its, joints)))))
        return shown


def one_line(lines: Sequence[str]) -> list[str]:
    """Lines of a list, those that go on in the next one joined again."""
    joined: list[str] = []
    for line in lines:
        if line.startswith(" ") and joined:
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
    return joined
