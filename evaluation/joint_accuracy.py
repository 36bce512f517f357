"""How well each joint is found: SCIO's accuracy per joint (Kan et al., Table 5 and Fig. 2) beside the OKS term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from poserelay.datasets.coco import AREA_OF_BOX, CocoAnnotations
from poserelay.scoring import has_crowd_index


def joint_terms(distance: np.ndarray, areas: np.ndarray, sigmas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy 2 sigmoid(-d / (s k)) and OKS term exp(-d^2 / (2 s^2 k^2)) of joints, each `[..., N, K]` in 0..1.

    The paper says "normalization and sigmoid functions" and no more: the first is our reading (readings SCIO 7), with
    s^2 the person's area and k = 2 sigma as in OKS. Both are 1 at the truth; NaN, no prediction, gives 0.

    Args:
        distance: to the truth, `[..., N, K]`, image pixels.
        areas: `[N]`, image pixels squared.
        sigmas: `[K]`.
    """
    # A person of no area must not divide by 0; pycocotools adds as much.
    length = np.sqrt(areas + np.spacing(1.0))[:, None] * 2 * np.asarray(sigmas)
    ratio = np.nan_to_num(distance, nan=np.inf, posinf=np.inf) / length
    return 2 * expit(-ratio), np.exp(-np.square(ratio) / 2)


def joint_means(
    predicted: np.ndarray,
    truth: np.ndarray,
    labelled: np.ndarray,
    areas: np.ndarray,
    names: Sequence[str],
    sigmas: Sequence[float],
) -> dict[str, dict[str, Any]]:
    """For each joint the means of `joint_terms` over the persons where it is labelled, None where it is of nobody.

    Args:
        predicted: `[N, K, 2]`, image pixels; NaN where there is no pose.
        truth: `[N, K, 2]`, image pixels.
        labelled: `[N, K]` bool.
        areas: `[N]`, image pixels squared.
        names: of the joints.
        sigmas: `[K]`.

    Returns:
        Joint to {"accuracy", "oks", "count"}.
    """
    accuracy, oks = joint_terms(np.linalg.norm(predicted - truth, axis=-1), areas, sigmas)
    return {
        name: {
            "accuracy": float(accuracy[rows, joint].mean()) if rows.any() else None,
            "oks": float(oks[rows, joint].mean()) if rows.any() else None,
            "count": int(rows.sum()),
        }
        for joint, (name, rows) in enumerate(zip(names, labelled.T, strict=True))
    }


def oks_areas(annotations: CocoAnnotations, data: Mapping[str, Any]) -> np.ndarray:
    """The area `[N]` of every annotation that normalises its OKS, image pixels squared; `data`: the file's JSON.

    As `scoring.oks_metrics` has it: 0.53 of the box where every image carries a crowdIndex (CrowdPose).
    """
    if not has_crowd_index(data):
        return annotations.areas
    return AREA_OF_BOX * annotations.boxes[:, 2] * annotations.boxes[:, 3]


def format_joints(joints: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each joint that is labelled somewhere: accuracy, OKS term, how many."""
    width = max(map(len, joints))
    lines = [f"{'joint':<{width}}  accuracy  OKS term   count"]
    for name, found in joints.items():
        if found["count"]:
            lines.append(f"{name:<{width}}  {found['accuracy']:>8.4f}  {found['oks']:>8.4f}  {found['count']:>6}")
    return "\n".join(lines)
