"""`python -m evaluation test`: a pose model on annotated pictures, with the numbers and how they were made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from poserelay.checkpoint import verify_handoff
from poserelay.datasets.coco import CocoAnnotations, read_coco, read_detections
from poserelay.datasets.topdown import TopDownDataset
from poserelay.distributed import start
from poserelay.errors import UserError
from poserelay.inference import Poses, predict_poses, protocol, suppress, to_results
from poserelay.keypoints import Skeleton, match_joints
from poserelay.model import load_model
from poserelay.pckh import pckh_of_persons
from poserelay.run import write_json
from poserelay.scoring import match_results, mean_pose, oks_metrics, order_of_file, pck_of_persons, place_pose

from .config import TestConfig
from .score import format_report, without_nan


def main(config: TestConfig) -> dict[str, Any]:
    """Print, write and return {"metrics", "protocol"}; the baseline's metrics are prefixed "mean pose ".

    Raises UserError for input that cannot be used and for a picture that cannot be read, CheckFailed for heatmaps that
    are not finite.
    """
    verify_handoff(config.checkpoint)
    annotations = read_coco(config.annotations)
    detections = None if config.boxes == "gt" else read_detections(config.boxes, annotations, config.box_threshold)
    baseline = None if config.baseline_annotations is None else mean_pose_of(config.baseline_annotations, annotations)
    model = load_model(config.checkpoint).to(start(config.device, "fp32", config.threads).device)
    order = order_of_file(model.skeleton, annotations.joints)
    dataset = TopDownDataset(
        annotations,
        config.images,
        model.skeleton,
        (model.input.height, model.input.width),
        detections=detections,
        alignment=model.input.alignment,
    )

    poses = predict_poses(model, dataset, config.decoding, config.batch_size, config.workers, progress=True).joints(
        order
    )
    metrics, details, results = measure(poses, annotations, model.skeleton, config)
    if baseline is not None:
        placed = replace(
            poses,
            keypoints=place_pose(baseline, poses.boxes),
            joint_scores=np.ones(poses.joint_scores.shape),
            scores=dataset.scores,
        )
        its_metrics, _, _ = measure(placed, annotations, model.skeleton, config)
        metrics |= {f"mean pose {name}": value for name, value in its_metrics.items()}
    report = {
        "metrics": without_nan(metrics),
        "protocol": {
            **protocol(dataset, config.decoding, config.boxes),
            "box_threshold": None if config.boxes == "gt" else config.box_threshold,
            **details,
            "baseline": None if config.baseline_annotations is None else Path(config.baseline_annotations).stem,
        },
    }
    if config.out is not None:
        write_json(Path(config.out) / "predictions.json", results)
        write_json(Path(config.out) / "metrics.json", report)
    print(json.dumps(report) if config.json else format_report(report))
    return report


def measure(
    poses: Poses, annotations: CocoAnnotations, skeleton: Skeleton, config: TestConfig
) -> tuple[dict[str, float], dict[str, Any], list[dict[str, Any]]]:
    """Metrics, their part of the protocol, and the results list of `poses`, whose joints are in the file's order.

    OKS AP is taken after OKS-NMS. PCK, and PCKh where persons have head sizes, measure every person: with annotated
    boxes its own pose, with detections the nearest one that is left.
    """
    sigmas = [skeleton.sigmas[joint] for joint in order_of_file(skeleton, annotations.joints)]
    results = to_results(suppress(poses, sigmas, config.decoding), annotations.category["id"])
    metrics, details = oks_metrics(annotations.path, results, skeleton, config.crowd_levels)
    # The poses of annotated boxes are in the order of annotations.persons.
    predicted = poses.keypoints if config.boxes == "gt" else match_results(annotations, results)
    found = [pck_of_persons(annotations, predicted, skeleton, config.pck_threshold)]
    if not np.isnan(annotations.head_sizes[annotations.persons]).all():
        found.append(pckh_of_persons(annotations, predicted))
    for more, its_details in found:
        metrics, details = metrics | more, details | its_details
    details["matching"] = "the box's own pose" if config.boxes == "gt" else "nearest pose of the image"
    return metrics, details, results


def mean_pose_of(path: str, annotations: CocoAnnotations) -> np.ndarray:
    """Mean pose [K, 2] of another file in fractions of the box, in the joints of `annotations`.

    Raises UserError where the file lacks one of the joints or holds no labelled person.
    """
    source = read_coco(path)
    order = match_joints(source.joints, annotations.joints)
    columns = [column for column in order if column is not None]
    if len(columns) < len(order):
        missing = ", ".join(j for j, column in zip(annotations.joints, order, strict=True) if column is None)
        raise UserError(f"{path}: lacks {missing} of {annotations.path}; take a file with the same joints")
    if not len(source.persons):
        raise UserError(f"{path}: no person with a labelled joint to take a mean of")
    persons = source.persons
    return mean_pose(
        source.keypoints[persons][:, columns], source.visibility[persons][:, columns], source.boxes[persons]
    )
