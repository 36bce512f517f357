"""`python -m evaluation compare`: whether two methods' predictions of the same pictures differ."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval
from scipy.special import stdtrit

from poserelay.datasets.coco import read_coco, read_json
from poserelay.errors import UserError
from poserelay.keypoints import Skeleton, resolve_skeleton
from poserelay.pckh import NOT_COUNTED, head_sizes
from poserelay.scoring import (
    POSES_PER_IMAGE,
    Truth,
    check_results,
    correct_joints,
    evaluate_oks,
    has_crowd_index,
    match_results,
    oks_area,
    parsed_truth,
    pck_reference,
    read_results,
    scored_truth,
    sigma_source,
    take_joints,
)

from .config import CompareConfig
from .score import format_report, warn_of_oks, warn_of_repeated, without_nan

FEW = 20
"""Images below which a bootstrap's interval is known to be too narrow."""


class Sample(NamedTuple):
    """What is drawn anew: images, `units` of them."""

    units: int
    values: Callable[[np.ndarray], np.ndarray]
    """The metric `[2, S]` of both methods' S files, of a sample in which each unit is so often: `[units]` int64."""
    protocol: dict[str, Any]


class Difference(NamedTuple):
    """Of a metric between two methods, a - b."""

    observed: np.ndarray
    """`[2, S]`, the metric of each file."""
    difference: float
    low: float
    """Of the 95 % interval, as is `high`."""
    high: float
    p: float
    """Two-sided: how often chance alone makes a difference as large, were there none."""
    seed_spread: float | None
    """Standard deviation over the pairs of files; None of a single pair."""


def main(config: CompareConfig) -> dict[str, Any]:
    """Print and return {"metrics", "protocol", "files"}. Raises UserError for a file or record that cannot be used."""
    if config.annotations.endswith(".mat"):
        raise UserError(f"{config.annotations}: compare reads COCO JSON; `poserelay convert` makes it of MPII's files")
    data = read_json(Path(config.annotations))
    annotations = read_coco(config.annotations, data)
    skeleton = resolve_skeleton(config.skeleton, annotations.category, config.annotations)
    truth = scored_truth(annotations, skeleton, data=data)
    sides = {name: [side] if isinstance(side, str) else side for name, side in (("a", config.a), ("b", config.b))}
    sample_of = sample_matches if config.metric == "oks" else sample_joints
    sample = sample_of(truth, skeleton, [sides["a"], sides["b"]], config)
    found = paired_bootstrap(sample.values, sample.units, config.resamples, config.seed)

    name = {"oks": "AP", "pck": "PCK", "pckh": "PCKh@0.5"}[config.metric]
    metrics = {f"{name} {side}": float(values.mean()) for side, values in zip(sides, found.observed, strict=True)}
    metrics |= {
        "difference": found.difference,
        "difference low": found.low,
        "difference high": found.high,
        "p": found.p,
        "smallest difference": (found.high - found.low) / 2,
    }
    report = {
        "metrics": without_nan(metrics),
        "protocol": {
            "metric": config.metric,
            "split": Path(config.annotations).stem,
            "instances": len(truth.counted.persons),
            "files_each": len(sides["a"]),
            "seed_spread": found.seed_spread,
            "drawn": "images",
            "units": sample.units,
            "resamples": config.resamples,
            "seed": config.seed,
            **sample.protocol,
            **truth.protocol,
            # What the files do not tell about how their poses were made.
            **dict.fromkeys(("boxes", "flip", "decode", "rescoring", "nms")),
        },
        "files": {
            side: [{"predictions": file, name: value} for file, value in zip(sides[side], values.tolist(), strict=True)]
            for side, values in zip(sides, found.observed, strict=True)
        },
    }
    print(json.dumps(report) if config.json else f"{format_report(report)}\n{verdict(found, sample.units)}")
    return report


def paired_bootstrap(
    values: Callable[[np.ndarray], np.ndarray], units: int, resamples: int, seed: int = 0
) -> Difference:
    """Difference of the means over the files, with its bootstrap interval and p; arguments are `Sample`'s.

    Each resample draws `units` units with replacement, the same ones for every file: that is the test set's part of
    the chance. With S >= 2 pairs of files it is moved by the seeds' part as well, the standard error of the mean of
    the S paired differences times a quantile of Student's t with S - 1 degrees of freedom; the quantiles are evenly
    spread over the resamples. Resampling the seeds themselves would make the interval too short: S is small. Resamples
    in which the metric is undefined (NaN) are left out.
    """
    rng = np.random.default_rng(seed)
    observed = values(np.ones(units, dtype=np.int64))
    paired = observed[0] - observed[1]
    if units < 2:  # every sample is the same: they say nothing of chance
        spread = float(paired.std(ddof=1)) if len(paired) > 1 else None
        return Difference(observed, float(paired.mean()), math.nan, math.nan, math.nan, spread)
    drawn = np.empty(resamples)
    for resample in range(resamples):
        first, second = values(np.bincount(rng.integers(units, size=units), minlength=units))
        drawn[resample] = (first - second).mean()
    spread = None
    if len(paired) > 1:
        spread = float(paired.std(ddof=1))
        quantiles = stdtrit(len(paired) - 1, (rng.permutation(resamples) + 0.5) / resamples)
        drawn += spread / math.sqrt(len(paired)) * quantiles
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if len(drawn) else (math.nan, math.nan)
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (int(tail) + 1) / (len(drawn) + 1))
    return Difference(observed, float(paired.mean()), low, high, p, spread)


def read_scored(path: str, truth: Truth) -> list[dict[str, Any]]:
    """The records of a results file, in the joints that are compared. Raises UserError."""
    annotations = truth.file
    results = read_results(path)
    check_results(results, annotations.image_ids, annotations.category["id"], len(annotations.joints), path)
    warn_of_repeated(results, path)
    return take_joints(results, truth.columns)


def sample_joints(truth: Truth, skeleton: Skeleton, sides: Sequence[Sequence[str]], config: CompareConfig) -> Sample:
    """Images of PCK or PCKh, each with the correct and the labelled joints of all its persons.

    Persons of an image stand or fall together, with its crowding and its light, so that drawing them one by one would
    make the interval too short. Each has the nearest pose of its image that is left (`match_results`).
    """
    annotations = truth.counted
    persons = annotations.persons
    keypoints, visibility = annotations.keypoints[persons], annotations.visibility[persons]
    if config.metric == "pck":
        reference, name = pck_reference(annotations, skeleton, config.pck_reference)
        threshold = config.pck_threshold
    else:
        reference, name = head_sizes(annotations), "head size"
        threshold = 0.5
        visibility = visibility * np.array([joint not in NOT_COUNTED for joint in annotations.joints])

    counts = []
    labelled = np.zeros((len(persons), len(annotations.joints)), dtype=bool)
    for path in (path for side in sides for path in side):
        predicted = match_results(annotations, read_scored(path, truth))
        correct, labelled = correct_joints(predicted, keypoints, visibility, reference, threshold)
        counts.append(correct.sum(1))
    counted = labelled.any(axis=1)
    if not counted.any():
        raise UserError(f"{annotations.path}: no person has both a labelled joint and a {name}: nothing to measure by")
    images, image_of = np.unique(annotations.image_index[persons[counted]], return_inverse=True)
    sums = [np.bincount(image_of, row[counted], len(images)) for row in (*counts, labelled.sum(1))]
    correct, total = np.array(sums[:-1]).reshape(2, -1, len(images)), sums[-1]

    def values(weights: np.ndarray) -> np.ndarray:
        return correct @ weights / (total @ weights)

    protocol = {"pck_threshold": threshold, "pck_reference": name, "matching": "nearest pose of the image"}
    return Sample(len(images), values, protocol)


def sample_matches(truth: Truth, skeleton: Skeleton, sides: Sequence[Sequence[str]], _config: CompareConfig) -> Sample:
    """Images of OKS AP: matched once by pycocotools, accumulated anew for every sample of them."""
    data = parsed_truth(truth)
    crowdpose = has_crowd_index(data)

    def precision_of(path: str) -> Callable[[np.ndarray], float]:
        results = read_scored(path, truth)
        warn_of_oks(truth, results, skeleton, path)
        return precision_of_sample(evaluate_oks(data, results, skeleton, path, area_of_box=crowdpose))

    precisions = [[precision_of(path) for path in side] for side in sides]

    def values(weights: np.ndarray) -> np.ndarray:
        return np.array([[precision(weights) for precision in side] for side in precisions])

    protocol = {"sigmas": sigma_source(skeleton), "oks_area": oks_area(data), "poses_per_image": POSES_PER_IMAGE}
    return Sample(len(truth.file.image_ids), values, protocol)


def precision_of_sample(evaluation: COCOeval) -> Callable[[np.ndarray], float]:
    """AP as a function of how often each image is in the sample: `[I]` int64, images by rising id.

    It is pycocotools' accumulate() and mean, NaN where no image of the sample holds a labelled person. Precision is
    needed at the hits alone: between two of them it only falls, and recall stays.

    evaluation: matched (`evaluate_oks`).
    """
    images = len(evaluation.params.imgIds)
    matched = [(row, image) for row, image in enumerate(evaluation.evalImgs[:images]) if image]  # of all areas
    persons = np.zeros(images, dtype=np.int64)
    for row, image in matched:
        persons[row] = np.count_nonzero(image["gtIgnore"] == 0)
    thresholds, recalls = len(evaluation.params.iouThrs), evaluation.params.recThrs
    scores = np.concatenate([np.zeros(0), *(image["dtScores"] for _, image in matched)])
    order = np.argsort(-scores, kind="mergesort")
    image_of = np.repeat([row for row, _ in matched], [len(image["dtScores"]) for _, image in matched])[order]
    empty = np.zeros((thresholds, 0), dtype=bool)
    counts = ~np.concatenate([empty, *(image["dtIgnore"] for _, image in matched)], axis=1).astype(bool)[:, order]
    found = np.concatenate([empty, *(image["dtMatches"] for _, image in matched)], axis=1).astype(bool)[:, order]
    hits = [np.flatnonzero(row) for row in found & counts]

    def average_precision(weights: np.ndarray) -> float:
        total = persons @ weights
        if not total:
            return math.nan
        of_poses = weights[image_of]
        precision = np.zeros((thresholds, len(recalls)))
        for row, at in enumerate(hits):
            right = np.cumsum(of_poses[at])
            seen = np.cumsum(of_poses * counts[row])[at]
            envelope = np.maximum.accumulate((right / (seen + np.spacing(1)))[::-1])[::-1]
            reached = np.searchsorted(right / total, recalls, side="left")
            inside = reached < len(at)
            precision[row, inside] = envelope[reached[inside]]
        return float(precision.mean())

    return average_precision


def verdict(found: Difference, units: int) -> str:
    """One or two sentences on what the difference shows, drawn from so many images."""
    if math.isnan(found.low):
        text = "A single image: nothing can be drawn anew, so there is no interval and no p."
    elif found.low == found.high == 0:
        text = "The two score alike in every sample: are they the same predictions?"
    elif found.low > 0 or found.high < 0:
        text = f"a is {'better' if found.difference > 0 else 'worse'} than b: the 95 % interval leaves out 0."
    else:
        text = (
            "No difference shown: the 95 % interval contains 0. "
            f"One below {min(1.0, (found.high - found.low) / 2):.4f} could not have been shown by this comparison."
        )
    if 1 < units < FEW:
        text += f"\nDrawn from {units} images: with fewer than {FEW} the interval is too narrow; do not rely on it."
    if found.seed_spread is None:
        text += "\nOne file each: the interval knows nothing of what another seed would have changed."
    return text
