"""`python -m evaluation score`: metrics of any COCO results file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poserelay.datasets.coco import read_coco
from poserelay.errors import UserError
from poserelay.keypoints import resolve_skeleton
from poserelay.pckh import head_sizes, pckh, pckh_of_persons, read_mpii
from poserelay.scoring import (
    check_results,
    match_results,
    oks_metrics,
    parsed_truth,
    pck_of_truth,
    read_results,
    results_that_count,
    scored_truth,
    sigma_source,
    take_joints,
)

from .config import ScoreConfig


def main(config: ScoreConfig) -> dict[str, Any]:
    """Print and return {"metrics", "protocol"}. Raises UserError for a file or record that cannot be used."""
    metrics, protocol = score_mpii(config) if config.annotations.endswith(".mat") else score_coco(config)
    report = {"metrics": without_nan(metrics), "protocol": protocol}
    print(json.dumps(report) if config.json else format_report(report))
    return report


def score_coco(config: ScoreConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and protocol of a COCO results list."""
    if config.predictions.endswith(".mat"):
        raise UserError(f"{config.predictions}: a .mat of predictions needs MPII's gt_valid.mat as annotations")
    annotations = read_coco(config.annotations)
    skeleton = resolve_skeleton(config.skeleton, annotations.category, config.annotations)
    truth = scored_truth(annotations, skeleton, config.joints, config.labelled_joints)
    if config.metric == "pckh":
        head_sizes(truth.counted)  # said before the predictions are read
    results = read_results(config.predictions)
    joints = len(annotations.joints)
    check_results(results, annotations.image_ids, annotations.category["id"], joints, config.predictions)
    results = take_joints(results, truth.columns)
    protocol = {
        "metric": config.metric,
        "split": Path(config.annotations).stem,
        "predictions": Path(config.predictions).name,
        "poses": len(results),
        "instances": len(truth.counted.persons),
        # What the file does not tell about how its poses were made.
        **dict.fromkeys(("boxes", "flip", "decode", "rescoring", "nms")),
        **truth.protocol,
    }
    if config.metric == "oks":
        results = results_that_count(truth, results)
        metrics, details = oks_metrics(parsed_truth(truth), results, skeleton, config.crowd_levels, config.predictions)
        return metrics, {**protocol, "sigmas": sigma_source(skeleton), **details}
    predicted = match_results(truth.common, results)[truth.rows]
    if config.metric == "pck":
        metrics, details = pck_of_truth(truth, predicted, skeleton, config.pck_threshold)
    else:
        metrics, details = pckh_of_persons(truth.counted, predicted)
    return metrics, {**protocol, **details, "matching": "nearest pose of the image"}


def score_mpii(config: ScoreConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and protocol of MPII's own files, whose predictions are in the order of the persons."""
    if config.metric != "pckh":
        raise UserError(f"{config.annotations}: MPII's .mat files are scored by --metric pckh, not {config.metric}")
    if config.joints != "all" or config.labelled_joints is not None:
        raise UserError(
            f"{config.annotations}: joints and labelled_joints choose among the labels of COCO JSON; `poserelay "
            "convert` makes it of MPII's files"
        )
    poses = read_mpii(config.annotations, config.predictions)
    if not (poses.head_sizes > 0).any():
        raise UserError(f"{config.annotations}: no person has a head box of a size, which PCKh is measured by")
    metrics, details = pckh(poses.predicted, poses.truth, poses.visibility, poses.head_sizes, poses.joints)
    names = {"split": Path(config.annotations).stem, "predictions": Path(config.predictions).name}
    instances = {"poses": len(poses.predicted), "instances": len(poses.truth)}
    return metrics, {"metric": config.metric, **names, **instances, **details, "matching": "order of the file"}


def format_report(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics, if any, in lines and the protocol under them; "-" where a metric has nothing to measure.

    Four digits each, and five of PCKh, which is printed in per cent with three.
    """
    width = max(map(len, report["metrics"]), default=0)

    def shown(name: str, value: float | None) -> str:
        return "-" if value in (None, -1.0) else f"{value:.{5 if 'PCKh' in name else 4}f}"

    lines = [f"{name:<{width}}  {shown(name, value)}" for name, value in report["metrics"].items()]
    listed = {
        n: " and ".join(map(str, v)) if isinstance(v, list) else v
        for n, v in report["protocol"].items()
        if v is not None
    }
    protocol = ", ".join(f"{name} {v}" for name, v in listed.items())
    return "\n".join([*lines, f"({protocol})"])


def without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """NaN as null, which JSON can hold."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}
