"""How well the scores of poses tell how good they are: against their true OKS (CIR, Fig. 1 and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from poserelay.keypoints import Skeleton
from poserelay.scoring import Truth, order_of_file, results_that_count

from .joint_accuracy import oks_areas

BEST = (1, 2, 5)
"""How many of an image's best-scored poses the coefficient is also told of; the paper's Fig. 5 has five."""
UNDEFINED: dict[str, Any] = {"spearman": None, "pearson": None}
NOT_MEASURED: dict[str, Any] = {**UNDEFINED, "poses": 0, "of_best": dict.fromkeys(map(str, BEST))}
"""`calibration` where there is no truth."""


def calibration(truth: Truth, results: Sequence[Mapping[str, Any]], skeleton: Skeleton) -> dict[str, Any]:
    """{"spearman", "pearson", "poses", "of_best"}: coefficients of score and `true_oks` over the results that count.

    "of_best" is Spearman's over the one, two and five best-scored poses of every image alone. `results` are valid and
    in the joints that are scored. A coefficient is None where it is not defined: of fewer than two poses, and where all
    have one score or one OKS.
    """
    counting = results_that_count(truth, results)
    scores, oks = scores_of(counting), true_oks(truth, counting, skeleton)
    place = place_in_image(np.array([record["image_id"] for record in counting], dtype=np.int64), scores)
    of_best = {str(most): correlation(scores[place < most], oks[place < most])["spearman"] for most in BEST}
    return {**correlation(scores, oks), "of_best": of_best}


def place_in_image(image_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """For each of N poses how many of its image come before it, the best score first, the earlier of equals `[N]`."""
    order = np.lexsort((-scores, image_ids))
    starts = np.searchsorted(image_ids[order], image_ids[order])
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order)) - starts
    return place


def correlation(scores: np.ndarray, oks: np.ndarray) -> dict[str, Any]:
    """{"spearman", "pearson", "poses"} of scores `[N]` and OKS `[N]`, as `calibration` has them."""
    if len(scores) < 2 or not np.ptp(scores) or not np.ptp(oks):
        return {**UNDEFINED, "poses": len(scores)}
    ranked: Any = spearmanr(scores, oks)
    linear: Any = pearsonr(scores, oks)
    return {"spearman": float(ranked.statistic), "pearson": float(linear.statistic), "poses": len(scores)}


def scores_of(results: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """`[N]` float64."""
    return np.array([record["score"] for record in results], dtype=np.float64)


def true_oks(truth: Truth, results: Sequence[Mapping[str, Any]], skeleton: Skeleton) -> np.ndarray:
    """The greatest OKS `[N]` of each result with any person of its image; 0 where the image has none.

    Persons are those with a label that counts and no crowd, their areas those of `scoring.oks_metrics`. A person may
    be the best of several poses: a score is to tell how good a pose is, not whether another is as good.
    """
    counted, joints = truth.counted, len(truth.counted.joints)
    variance = 8 * np.square([skeleton.sigmas[joint] for joint in order_of_file(skeleton, counted.joints)])  # 2 k^2
    areas = oks_areas(counted, truth.parsed) + np.spacing(1.0)
    rows = {image_id: row for row, image_id in enumerate(counted.image_ids)}
    image = np.array([rows[record["image_id"]] for record in results], dtype=np.int64)
    triples = np.array([record["keypoints"] for record in results], dtype=np.float64).reshape(-1, joints, 3)

    persons = counted.persons[np.argsort(counted.image_index[counted.persons], kind="stable")]
    count = np.bincount(counted.image_index[persons], minlength=len(rows))
    first = np.cumsum(count) - count
    best = np.zeros(len(results))
    # The first persons of all images at once, then the second ones: as many steps as the fullest image has persons.
    for place in range(count.max(initial=0)):
        having = np.flatnonzero(count[image] > place)
        its = persons[first[image[having]] + place]
        apart = np.square(triples[having, :, :2] - counted.keypoints[its]).sum(-1) / (areas[its, None] * variance)
        labelled = counted.visibility[its] > 0
        # Beyond 700 exp's results are denormal, which takes long: 0, which all poses of nobody share.
        similar = np.where(labelled & (apart < 700), np.exp(-np.minimum(apart, 700)), 0.0)
        best[having] = np.maximum(best[having], similar.sum(1) / labelled.sum(1))
    return best


def format_scores(scores: Mapping[str, Any]) -> str:
    """One line."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:+.4f}"

    of_best = ", ".join(f"{shown(value)} of the best {most}" for most, value in scores["of_best"].items())
    return (
        f"score against true OKS: Spearman {shown(scores['spearman'])}, Pearson {shown(scores['pearson'])} over "
        f"{scores['poses']} poses (Spearman {of_best} of an image)"
    )
