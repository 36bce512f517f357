"""pycocotools' greedy matching by OKS and its average precision, of all images at once.

A diagnosis matches and accumulates dozens of times (poses corrected, persons ignored), for which pycocotools' loops
over images and poses take minutes. The figures are its own (`tests/test_diagnose.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from poserelay.keypoints import Skeleton
from poserelay.scoring import POSES_PER_IMAGE, Truth, order_of_file

from .joint_accuracy import oks_areas

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""The OKS that AP is the mean over."""
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Scene:
    """N persons and M poses, J joints, each sorted by image; what pycocotools matches of a `Truth` and results.

    Persons are those of `Truth.counted` and the ones that pycocotools ignores, poses the 20 best-scored of each image.
    """

    sigmas: np.ndarray
    """`[J]`."""
    person_rows: np.ndarray
    """`[N]`, into the annotation file's records of the category."""
    person_image: np.ndarray
    """`[N]`, the image's place among those of the file by rising id, as is `pose_image`."""
    truth: np.ndarray
    """`[N, J, 2]`, image pixels."""
    labelled: np.ndarray
    """`[N, J]` bool: the labels that count."""
    areas: np.ndarray
    """`[N]`, s^2 of OKS, image pixels squared."""
    boxes: np.ndarray
    """`[N, 4]`, xywh, image pixels."""
    crowd: np.ndarray
    """`[N]` bool: may be matched more than once."""
    ignored: np.ndarray
    """`[N]` bool: crowds and persons without a label; a pose that is matched to one does not count."""
    pose_rows: np.ndarray
    """`[M]`, into the results; in an image the best score first, the earlier of equals."""
    pose_image: np.ndarray
    """`[M]`."""
    poses: np.ndarray
    """`[M, J, 2]`, image pixels."""
    scores: np.ndarray
    """`[M]`."""
    pose_areas: np.ndarray
    """`[M]`: decides whether a pose that is matched to nobody counts in the AP of a range of areas."""

    def moved(self, poses: np.ndarray) -> Scene:
        """The same poses elsewhere `[M, J, 2]`; their areas stay."""
        return replace(self, poses=poses)

    def rescored(self, scores: np.ndarray) -> Scene:
        """The same poses with other scores `[M]`, in the order that follows from them."""
        order = np.lexsort((self.pose_rows, -scores, self.pose_image))
        fields = {name: getattr(self, name)[order] for name in ("pose_rows", "pose_image", "poses", "pose_areas")}
        return replace(self, scores=scores[order], **fields)

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every pose with every person of its image: the poses `[Q]`, in rising order, and the persons `[Q]`."""
        first, count = self._persons_of_pose
        pose = np.repeat(np.arange(len(count)), count)
        place = np.arange(len(pose)) - np.repeat(np.cumsum(count) - count, count)
        return pose, first[pose] + place

    @cached_property
    def oks(self) -> np.ndarray:
        """`[Q]`, of the `pairs`; by the distance from the enlarged box where a person has no label."""
        pose, person = self.pairs
        found = np.empty(len(pose))
        for begin in range(0, len(pose), 2**15):  # in the CPU's caches
            chunk = slice(begin, begin + 2**15)
            its = person[chunk]
            offset = self.poses[pose[chunk]] - self.truth[its]
            labelled = self.labelled[its]
            without = labelled.sum(1) == 0
            if without.any():
                offset[without] = _beyond_box(self.poses[pose[chunk]][without], self.boxes[its[without]])
                labelled = labelled | without[:, None]
            similar = np.where(labelled, similarity(offset, self.areas[its], self.sigmas), 0)
            found[chunk] = similar.sum(1) / labelled.sum(1)
        return found

    def best_oks(self, persons: np.ndarray) -> np.ndarray:
        """The greatest OKS `[M]` of each pose with any of `persons` `[N]` bool of its image, 0 where there is none."""
        best = np.zeros(len(self.poses))
        pose, person = self.pairs
        np.maximum.at(best, pose, np.where(persons[person], self.oks, 0))
        return best

    @cached_property
    def _persons_of_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """The first person of the image of each pose `[M]`, and how many there are `[M]`."""
        first = np.searchsorted(self.person_image, self.pose_image)
        return first, np.searchsorted(self.person_image, self.pose_image, side="right") - first

    @cached_property
    def _blocks_from(self) -> dict[float, list[_Block]]:
        """What `_blocks` has made: a diagnosis matches at the same thresholds again and again."""
        return {}

    def _blocks(self, least: float) -> list[_Block]:
        """The poses that have this OKS with anybody and all persons of their images, in groups of like size."""
        if least in self._blocks_from:
            return self._blocks_from[least]
        first, count = self._persons_of_pose
        pair_starts = np.cumsum(count) - count
        near = np.unique(self.pairs[0][self.oks >= least])
        starts = np.flatnonzero(np.diff(self.pose_image[near], prepend=-1))
        poses, persons = np.diff(starts, append=len(near)), count[near[starts]]
        size = np.ceil(np.log2(poses)) * 64 + np.ceil(np.log2(persons))
        blocks = self._blocks_from[least] = []
        for its in np.unique(size):
            these = size == its
            place, other = np.arange(poses[these].max()), np.arange(persons[these].max())
            inside, within = place < poses[these, None], other < persons[these, None]
            pose = np.where(inside, near[np.where(inside, starts[these, None] + place, 0)], -1)
            person = np.where(within, first[near[starts[these]], None] + other, -1)
            pair = np.where(inside[..., None] & within[:, None], pair_starts[pose][..., None] + other, -1)
            blocks.append(_Block(pose, person, np.where(pair >= 0, self.oks[pair], -1)))
        return blocks

    def match(self, thresholds: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
        """The person that each pose is matched to at each OKS threshold `[T, M]`, or -1, as COCOeval.evaluateImg.

        Poses choose in the order of their scores: of the persons that are left, and of crowds, the one of greatest OKS
        from the threshold on, the last of equals; an ignored one only where there is no other. `ignored` `[N]` bool is
        in place of the scene's own.
        """
        ignored = self.ignored if ignored is None else ignored
        limits = np.minimum(thresholds, 1 - 1e-10)
        found = np.full((len(limits), len(self.poses)), -1)
        for pose, person, oks in self._blocks(float(limits.min())):
            free = np.ones((len(limits), *person.shape), dtype=bool)
            crowd, regular = self.crowd[person], ~ignored[person]
            for place in range(pose.shape[1]):
                its = oks[:, place]
                open_to = (its >= limits[:, None, None]) & (free | crowd)
                better = open_to & regular
                open_to = np.where(better.any(-1, keepdims=True), better, open_to)
                chosen = person.shape[1] - 1 - np.where(open_to, its, -1)[..., ::-1].argmax(-1)  # the last of equals
                threshold, image = np.nonzero(open_to.any(-1))
                taken = chosen[threshold, image]
                free[threshold, image, taken] = False
                found[threshold, pose[image, place]] = person[image, taken]
        return found


class _Block(NamedTuple):
    """B images with at most D poses and G persons; -1 pads."""

    pose: np.ndarray
    """`[B, D]`."""
    person: np.ndarray
    """`[B, G]`."""
    oks: np.ndarray
    """`[B, D, G]`."""


class Precision(NamedTuple):
    """Over T thresholds; NaN at one where there is no person."""

    precision: np.ndarray
    """`[T, 101]` at the recalls 0, .01 .. 1."""
    recall: np.ndarray
    """`[T]`, the greatest."""

    @property
    def figures(self) -> dict[str, float]:
        """AP, AP50, AP75 and AR of the ten `THRESHOLDS`; NaN where there is no person."""
        some = ~np.isnan(self.recall)
        if not some.any():
            return dict.fromkeys(("AP", "AP50", "AP75", "AR"), math.nan)
        return {
            "AP": float(self.precision[some].mean()),
            "AP50": float(self.precision[0].mean()),
            "AP75": float(self.precision[5].mean()),
            "AR": float(self.recall[some].mean()),
        }


def precision_of(
    scene: Scene, matched: np.ndarray, ignored: np.ndarray | None = None, forgiven: np.ndarray | None = None
) -> Precision:
    """What COCOeval.accumulate makes of the persons that the poses are `matched` to `[T, M]` (`Scene.match`).

    ignored: persons `[N]` or `[T, N]` bool that need not be found, in place of the scene's own. forgiven: poses `[M]`
    bool that are no false positives where they are matched to nobody.
    """
    ignored = np.broadcast_to(scene.ignored if ignored is None else ignored, (len(matched), len(scene.person_rows)))
    forgiven = np.zeros(len(scene.poses), dtype=bool) if forgiven is None else forgiven
    order = np.argsort(-scene.scores, kind="stable")
    precision, recall = np.zeros((len(matched), len(RECALLS))), np.zeros(len(matched))
    for row, (persons, without) in enumerate(zip(matched[:, order], ignored, strict=True)):
        total = np.count_nonzero(~without)
        if not total:
            precision[row] = recall[row] = math.nan
            continue
        found = persons >= 0
        counts = ~forgiven[order]
        counts[found] = ~without[persons[found]]
        at = np.flatnonzero(found & counts)
        right = np.arange(1, len(at) + 1)
        seen = np.cumsum(counts)[at]
        # Between two hits precision only falls, and recall stays.
        envelope = np.maximum.accumulate((right / (seen + np.spacing(1)))[::-1])[::-1]
        reached = np.searchsorted(right / total, RECALLS, side="left")
        inside = reached < len(at)
        precision[row, inside] = envelope[reached[inside]]
        recall[row] = len(at) / total
    return Precision(precision, recall)


def scene_of(truth: Truth, results: Sequence[Mapping[str, Any]], skeleton: Skeleton) -> Scene:
    """What pycocotools matches where `scoring.oks_metrics` scores `results`.

    `results` are valid, in the joints that are scored, and those that count (`scoring.results_that_count`).
    """
    counted = truth.counted
    data = truth.parsed
    kept = np.ones(len(counted.ids), dtype=bool)
    kept[truth.common.persons] = truth.rows
    rank = np.empty(len(counted.image_ids), dtype=np.int64)
    rank[np.argsort(counted.image_ids)] = np.arange(len(rank))
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(rank[counted.image_index[rows]], kind="stable")]
    labelled = counted.visibility > 0

    image_of = dict(zip(counted.image_ids, rank.tolist(), strict=True))
    image = np.array([image_of[record["image_id"]] for record in results], dtype=np.int64)
    scores = np.array([record["score"] for record in results], dtype=np.float64)
    order = np.lexsort((-scores, image))
    place = np.arange(len(order)) - np.searchsorted(image[order], image[order])
    order = order[place < POSES_PER_IMAGE]
    triples = np.array([record["keypoints"] for record in results], dtype=np.float64)
    poses = np.ascontiguousarray(triples.reshape(-1, len(counted.joints), 3)[order, :, :2])
    return Scene(
        sigmas=np.array([skeleton.sigmas[joint] for joint in order_of_file(skeleton, counted.joints)]),
        person_rows=rows,
        person_image=rank[counted.image_index[rows]],
        truth=counted.keypoints[rows],
        labelled=labelled[rows],
        areas=oks_areas(counted, data)[rows],
        boxes=counted.boxes[rows],
        crowd=counted.iscrowd[rows],
        ignored=(counted.iscrowd | _unlabelled(truth, data))[rows],
        pose_rows=order,
        pose_image=image[order],
        poses=poses,
        scores=scores[order],
        pose_areas=_pose_areas(results, poses, order),
    )


def similarity(offset: np.ndarray, areas: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """exp(-d^2 / (2 s^2 k^2)) `[..., J]` of joints `offset` `[..., J, 2]` apart; areas `[...]`, k = 2 sigma."""
    exponent = np.square(offset[..., 0]) + np.square(offset[..., 1])
    exponent /= np.square(2 * sigmas)
    exponent /= (areas + np.spacing(1))[..., None]
    exponent /= -2
    # Below it exp's results are denormal, which takes many times as long; they are 0 to every sum here.
    return np.where(exponent > -700, np.exp(np.maximum(exponent, -700)), 0)


def _unlabelled(truth: Truth, data: Mapping[str, Any]) -> np.ndarray:
    """`[P]` bool of the category's records: pycocotools ignores them, by num_keypoints where the file has it."""
    records = [record for record in data["annotations"] if record["category_id"] == truth.counted.category["id"]]
    stated = [record.get("num_keypoints") for record in records]
    without = ~(truth.counted.visibility > 0).any(1)
    told = np.array([isinstance(number, int | float) for number in stated], dtype=bool)
    none = np.array([number == 0 for number in stated], dtype=bool)
    if truth.counted is truth.file:
        return np.where(told, none, without)
    return none | without


def _pose_areas(results: Sequence[Mapping[str, Any]], poses: np.ndarray, order: np.ndarray) -> np.ndarray:
    if not len(order):
        return np.zeros(0)
    if all("bbox" in record for record in results):
        sides = np.array([record["bbox"] for record in results], dtype=np.float64)[order, 2:]
        return sides[:, 0] * sides[:, 1]
    return extent_areas(poses)


def extent_areas(poses: np.ndarray) -> np.ndarray:
    """The area `[M]` that all joints of each of `poses` `[M, J, 2]` extend over."""
    extent = poses.max(1) - poses.min(1)
    return extent[:, 0] * extent[:, 1]


def _beyond_box(poses: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """How far joints `[n, J, 2]` lie outside boxes `[n, 4]` enlarged threefold; 0 inside."""
    low = (boxes[:, :2] - boxes[:, 2:])[:, None]
    high = (boxes[:, :2] + 2 * boxes[:, 2:])[:, None]
    return np.maximum(low - poses, 0) + np.maximum(poses - high, 0)
