"""What is wrong with each predicted joint: Ronchi and Perona's taxonomy (ICCV 2017), as their coco-analyze has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from poserelay.keypoints import Skeleton
from poserelay.scoring import Truth, order_of_file

from .oks_matching import Scene, scene_of, similarity

KINDS = ("good", "jitter", "inversion", "miss", "swap")
GOOD, JITTER, INVERSION, MISS, SWAP = range(5)
MATCHED_FROM = 0.1
"""OKS from which a pose and a person belong together."""
NEAR, HUMAN = 0.5, 0.85
"""Keypoint similarity from which a joint is in the proximity of a place, and from which it is good: people who annotate
differ as much."""


class ErrorTypes(NamedTuple):
    """Of the M poses that are matched to a person, J joints."""

    poses: np.ndarray
    """`[M]`, into `results`."""
    persons: np.ndarray
    """`[M]`, positions in `truth.counted.persons`."""
    oks: np.ndarray
    """`[M]`, of the two."""
    kinds: np.ndarray
    """`[M, J]` int8, into `KINDS`; -1 where the joint has no label that counts."""
    confused: np.ndarray
    """`[M, J]` int64: of an inversion or a swap the joint at whose place the prediction lies, else -1."""


def error_types(truth: Truth, results: Sequence[Mapping[str, Any]], skeleton: Skeleton) -> ErrorTypes:
    """The kind of every labelled joint of every person that a pose is matched to.

    `results` are valid, in the joints that are scored, and those that count (`scoring.results_that_count`).

    Matching is COCOeval's (of each image the 20 best-scored poses, the best first, each to the free person of greatest
    OKS) from an OKS of 0.1 on, over persons of all areas: coco-analyze leaves out those below 32^2 pixels. A pose
    that is matched to a crowd or an unlabelled person, or to nobody, has no kinds.

    A joint's keypoint similarity with a labelled place is exp(-d^2 / (2 s^2 k^2)), k = 2 sigma of the predicted joint
    and s^2 the area of the person whose place it is. Compared are the same joint and its mirror image, of the matched
    person and of every other annotation of the image, also a hidden (v = 1) joint, a crowd's, and one whose label does
    not count. The most similar place decides; of equals the own one, then another person's same joint, then the own
    mirror joint. With a similarity below 0.5 the joint is a miss. Else it is, at its own place, good from 0.85 on and
    jitter below; at its mirror joint's, an inversion; at another person's, a swap. So it can be 0.9 similar with its
    own place and yet an inversion, as in coco-analyze's code; by the paper's text a joint above 0.85 is good. A joint
    without a mirror image among those that are scored cannot be inverted. v = 0 is no place and has no kind.
    """
    return classify(scene_of(truth, results, skeleton), truth, skeleton).of_results(truth)


class Classified(NamedTuple):
    """`ErrorTypes` by the rows of a `Scene`, with what correcting them takes."""

    scene: Scene
    poses: np.ndarray
    """`[M]`, rows of the scene's poses, in rising order."""
    persons: np.ndarray
    """`[M]`, rows of the scene's persons."""
    oks: np.ndarray
    """`[M]`."""
    kinds: np.ndarray
    """`[M, J]` int8."""
    confused: np.ndarray
    """`[M, J]` int64."""
    similar: np.ndarray
    """`[M, J]`: the keypoint similarity with the most similar place, 0 where there is none."""

    def of_results(self, truth: Truth) -> ErrorTypes:
        """In the order of the results' images by rising id, in each by falling score."""
        persons = np.searchsorted(truth.counted.persons, self.scene.person_rows[self.persons])
        return ErrorTypes(self.scene.pose_rows[self.poses], persons, self.oks, self.kinds, self.confused)

    def corrected(self, kind: int) -> np.ndarray:
        """The scene's poses `[N, J, 2]` with the joints of one kind corrected as coco-analyze corrects them.

        Such a joint is put beside its true place, along x, sqrt(-2 s^2 sigma^2 ln t) away, with t = 0.85 of a jitter,
        0.5 of a miss, and of inversions and swaps the similarity with the place where it was. This is coco-analyze's
        distance; it has sigma where the similarity has k = 2 sigma, so that the joint's similarity becomes t^(1/4):
        0.96 of a jitter, 0.84 of a miss.
        """
        reached = {JITTER: HUMAN, MISS: NEAR}.get(kind, self.similar.clip(np.spacing(1), 1))
        areas = self.scene.areas[self.persons, None]
        away = np.sqrt(-2 * areas * np.square(self.scene.sigmas) * np.log(reached))
        place = self.scene.truth[self.persons].copy()
        place[..., 0] += away
        poses = self.scene.poses.copy()
        poses[self.poses] = np.where((self.kinds == kind)[..., None], place, poses[self.poses])
        return poses


def classify(scene: Scene, truth: Truth, skeleton: Skeleton) -> Classified:
    """`error_types` of a scene of `truth`."""
    matched = scene.match(np.array([MATCHED_FROM]))[0]
    countable = np.zeros(len(truth.counted.ids), dtype=bool)
    countable[truth.counted.persons] = True
    countable = countable[scene.person_rows] & ~scene.ignored
    poses = np.flatnonzero((matched >= 0) & np.append(countable, False)[matched])
    persons = matched[poses]
    mirror = mirror_joints(truth.common.joints, skeleton)

    # The labels that do not count are places, too.
    places = truth.common.keypoints[scene.person_rows]
    seen = truth.common.visibility[scene.person_rows] > 0
    joints = np.arange(len(mirror))
    best = np.full((len(poses), len(joints)), -1.0)
    at, own = np.tile(joints, (len(poses), 1)), np.ones((len(poses), len(joints)), dtype=bool)

    def compare(rows: np.ndarray, others: np.ndarray, order: np.ndarray, is_own: bool) -> None:
        """Poses `rows` with the places of persons `others`, joints in this order; an earlier one wins over equals."""
        offset = scene.poses[poses[rows]] - places[others][:, order]
        found = np.where(seen[others][:, order], similarity(offset, scene.areas[others], scene.sigmas), -1)
        better = found > best[rows]
        best[rows] = np.where(better, found, best[rows])
        at[rows] = np.where(better, order, at[rows])
        own[rows] = np.where(better, is_own, own[rows])

    everyone = np.arange(len(poses))
    first = np.searchsorted(scene.person_image, scene.person_image[persons])
    count = np.searchsorted(scene.person_image, scene.person_image[persons], side="right") - first
    for order in (joints, mirror):
        compare(everyone, persons, order, True)
        # The first persons of all images at once, then the second ones.
        for place in range(count.max(initial=0)):
            rows = np.flatnonzero((count > place) & (first + place != persons))
            compare(rows, first[rows] + place, order, False)

    kinds = np.select(
        [best < NEAR, ~own, at != joints, best >= HUMAN], [MISS, SWAP, INVERSION, GOOD], default=JITTER
    ).astype(np.int8)
    kinds[~scene.labelled[persons]] = -1
    confused = np.where((kinds == INVERSION) | (kinds == SWAP), at, -1)
    return Classified(scene, poses, persons, _oks_of(scene, poses, persons), kinds, confused, best.clip(0))


def mirror_joints(joints: Sequence[str], skeleton: Skeleton) -> np.ndarray:
    """For each of a file's scored joints the one of its mirror image `[J]`, by name; itself where there is none."""
    order = order_of_file(skeleton, joints)
    place = {joint: column for column, joint in enumerate(order)}
    return np.array([place.get(skeleton.flip_index[joint], column) for column, joint in enumerate(order)])


def _oks_of(scene: Scene, poses: np.ndarray, persons: np.ndarray) -> np.ndarray:
    """Of poses, each with its person of the same image."""
    labelled = scene.labelled[persons]
    similar = similarity(scene.poses[poses] - scene.truth[persons], scene.areas[persons], scene.sigmas)
    return np.where(labelled, similar, 0).sum(1) / labelled.sum(1).clip(min=1)
