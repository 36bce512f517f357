"""`python -m evaluation score`: metrics of any COCO results file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poserelay.datasets.coco import read_coco
from poserelay.keypoints import resolve_skeleton
from poserelay.scoring import check_results, coco_ap, match_results, pck_of_persons, read_results, sigma_source

from .config import ScoreConfig


def main(config: ScoreConfig) -> dict[str, Any]:
    """Print and return {"metrics", "protocol"}. Raises UserError for a file or record that cannot be used."""
    annotations = read_coco(config.annotations)
    results = read_results(config.predictions)
    skeleton = resolve_skeleton(config.skeleton, annotations.category, config.annotations)
    protocol = {
        "metric": config.metric,
        "split": Path(config.annotations).stem,
        "predictions": Path(config.predictions).name,
        "poses": len(results),
        "instances": len(annotations.persons),
        # What the file does not tell about how its poses were made.
        **dict.fromkeys(("boxes", "flip", "decode", "rescoring", "nms")),
    }
    if config.metric == "oks":
        metrics = coco_ap(config.annotations, results, skeleton, config.predictions)
        protocol |= {"sigmas": sigma_source(skeleton), "poses_per_image": 20}
    else:
        joints = len(annotations.joints)
        check_results(results, annotations.image_ids, annotations.category["id"], joints, config.predictions)
        predicted = match_results(annotations, results)
        metrics, details = pck_of_persons(annotations, predicted, skeleton, config.pck_threshold)
        protocol |= {**details, "matching": "nearest pose of the image"}
    report = {"metrics": without_nan(metrics), "protocol": protocol}
    print(json.dumps(report) if config.json else format_report(report))
    return report


def format_report(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics in lines, four digits each, and the protocol under them; "-" where a metric has nothing to measure."""
    width = max(map(len, report["metrics"]))
    undefined = (None, -1.0)
    lines = [f"{name:<{width}}  {'-' if v in undefined else f'{v:.4f}'}" for name, v in report["metrics"].items()]
    protocol = ", ".join(f"{name} {v}" for name, v in report["protocol"].items() if v is not None)
    return "\n".join([*lines, f"({protocol})"])


def without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """NaN as null, which JSON can hold."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}
