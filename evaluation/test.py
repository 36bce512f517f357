"""`python -m evaluation test`: a pose model on annotated pictures, with the numbers and how they were made."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from poserelay.checkpoint import verify_handoff
from poserelay.datasets.coco import CocoAnnotations, read_coco, read_detections, read_json
from poserelay.datasets.topdown import TopDownDataset
from poserelay.datasets.unlabelled_persons import read_images
from poserelay.distributed import start
from poserelay.ensemble import load_models
from poserelay.errors import UserError
from poserelay.inference import Poses, predict_poses, protocol, suppress, to_results
from poserelay.keypoints import Skeleton, match_joints
from poserelay.model import PoseModel
from poserelay.pckh import pckh_of_persons
from poserelay.run import write_json
from poserelay.scoring import (
    Truth,
    match_results,
    mean_pose,
    oks_metrics,
    order_of_file,
    parsed_truth,
    pck_of_truth,
    place_joints,
    place_pose,
    results_that_count,
    scored_truth,
)

from .config import TestConfig
from .joint_accuracy import format_joints, joint_means, oks_areas
from .reliance import blindness, format_reliance, reliance, reliance_crops
from .score import format_report, without_nan


def main(config: TestConfig) -> dict[str, Any]:
    """Print, write and return {"metrics", "protocol", "joints"}; the baseline's metrics are prefixed "mean pose ".

    "joints" are `joint_means` of the poses that PCK measures. Where the model carries SCIO's networks there is also
    "scio", their `reliance`, null where no group is labelled.

    Of a file without annotations, a hidden test set, the predictions are written and nothing is scored: no metrics.

    Raises UserError for input that cannot be used and for a picture that cannot be read, CheckFailed for heatmaps that
    are not finite.
    """
    paths = [config.checkpoint] if isinstance(config.checkpoint, str) else config.checkpoint
    for path in paths:
        verify_handoff(path)
    hidden = is_hidden(config.annotations)
    if hidden:
        check_hidden(config)
    model = load_models(paths).to(start(config.device, "fp32", config.threads).device)
    annotations = read_hidden(config.annotations, model.skeleton) if hidden else read_coco(config.annotations)
    truth = scored_truth(annotations, model.skeleton, config.joints, config.labelled_joints)
    detections = None if config.boxes == "gt" else read_detections(config.boxes, annotations, config.box_threshold)
    baseline = None if config.baseline_annotations is None else mean_pose_of(config.baseline_annotations, truth.common)
    dataset = TopDownDataset(
        annotations,
        config.images,
        model.skeleton,
        (model.input.height, model.input.width),
        detections=detections,
        alignment=model.input.alignment,
    )
    refined = model if isinstance(model, PoseModel) and model.refiner is not None and not hidden else None
    crops = None if refined is None else reliance_crops(refined, annotations, config.images)

    poses = predict_poses(model, dataset, config.decoding, config.batch_size, config.workers, progress=True).joints(
        order_of_file(model.skeleton, truth.common.joints)
    )
    results = suppressed(poses, truth, model.skeleton, config)
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {"instances": None, "truth": "hidden, nothing is scored", "poses": len(results)}
    joints: dict[str, dict[str, Any]] = {}
    if not hidden:
        predicted = measured_poses(poses, results, truth, config)
        metrics, details = measure(predicted, results, truth, model.skeleton, config)
        joints = accuracy_of_joints(predicted, truth, model.skeleton)
    if baseline is not None:
        placed = replace(
            poses,
            keypoints=place_pose(baseline, poses.boxes),
            joint_scores=np.ones(poses.joint_scores.shape),
            scores=dataset.scores,
        )
        left = suppressed(placed, truth, model.skeleton, config)
        its_poses = measured_poses(placed, left, truth, config)
        its_metrics, _ = measure(its_poses, left, truth, model.skeleton, config)
        metrics |= {f"mean pose {name}": value for name, value in its_metrics.items()}
    report: dict[str, Any] = {
        "metrics": without_nan(metrics),
        "protocol": {
            **protocol(dataset, config.decoding, config.boxes, refined=model.refiner is not None),
            "box_threshold": None if config.boxes == "gt" else config.box_threshold,
            **({"ensemble": len(paths)} if len(paths) > 1 else {}),
            **details,
            **truth.protocol,
            "baseline": None if config.baseline_annotations is None else Path(config.baseline_annotations).stem,
        },
        "joints": joints,
    }
    if refined is not None:
        report["scio"] = None if crops is None else reliance(refined, crops, config.batch_size, config.workers)
        warning = blindness(report["scio"])
        if warning and config.decoding.scio.output == "optimisation":
            print(warning, file=sys.stderr)
    if config.out is not None:
        written = place_joints(results, truth.columns, len(annotations.joints))
        write_json(Path(config.out) / "predictions.json", written)
        write_json(Path(config.out) / "metrics.json", report)
    if hidden and not config.json:
        print(f"{config.annotations} holds no annotations: nothing is scored. {len(results)} poses are in {config.out}")
    print(json.dumps(report) if config.json else format_all(report))
    return report


def format_all(report: Mapping[str, Any]) -> str:
    """`format_report`, then the joints, then what is to be told of SCIO."""
    parts = [format_report(report)]
    if report["joints"]:
        parts.append(format_joints(report["joints"]))
    if report.get("scio"):
        parts.append(format_reliance(report["scio"]))
    return "\n".join(parts)


def suppressed(poses: Poses, truth: Truth, skeleton: Skeleton, config: TestConfig) -> list[dict[str, Any]]:
    """The results list that OKS-NMS leaves of `poses`, in the joints that are scored, as both are."""
    sigmas = [skeleton.sigmas[joint] for joint in order_of_file(skeleton, truth.common.joints)]
    return to_results(suppress(poses, sigmas, config.decoding), truth.file.category["id"])


def measured_poses(poses: Poses, results: Sequence[Mapping[str, Any]], truth: Truth, config: TestConfig) -> np.ndarray:
    """The joints `[P, J, 2]` by which each of `truth.counted.persons` is measured, image pixels.

    With annotated boxes its own pose of `poses`, whose joints are those that are scored; with detections the nearest
    one that OKS-NMS left in `results`, NaN where there is none.
    """
    if config.boxes == "gt":  # the poses are in the order of the file's persons
        return poses.keypoints[np.isin(truth.file.persons, truth.counted.persons)]
    return match_results(truth.common, results)[truth.rows]


def measure(
    predicted: np.ndarray, results: Sequence[Mapping[str, Any]], truth: Truth, skeleton: Skeleton, config: TestConfig
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of `results`, what OKS-NMS left of the poses in the joints that are scored, and their protocol.

    OKS AP is of `results`. PCK, and PCKh where persons have head sizes, measure every person by its `measured_poses`.
    """
    counting = results_that_count(truth, results)
    metrics, details = oks_metrics(parsed_truth(truth), counting, skeleton, config.crowd_levels)
    found = [pck_of_truth(truth, predicted, skeleton, config.pck_threshold)]
    if not np.isnan(truth.counted.head_sizes[truth.counted.persons]).all():
        found.append(pckh_of_persons(truth.counted, predicted))
    for more, its_details in found:
        metrics, details = metrics | more, details | its_details
    details["matching"] = "the box's own pose" if config.boxes == "gt" else "nearest pose of the image"
    return metrics, {"instances": len(truth.counted.persons), **details}


def accuracy_of_joints(predicted: np.ndarray, truth: Truth, skeleton: Skeleton) -> dict[str, dict[str, Any]]:
    """`joint_means` of the `measured_poses` at the labels that count."""
    counted, persons = truth.counted, truth.counted.persons
    areas = oks_areas(counted, read_json(truth.file.path))[persons]
    sigmas = [skeleton.sigmas[joint] for joint in order_of_file(skeleton, counted.joints)]
    labelled = counted.visibility[persons] > 0
    return joint_means(predicted, counted.keypoints[persons], labelled, areas, counted.joints, sigmas)


def is_hidden(path: str) -> bool:
    """Whether a COCO file lists images and no annotations, as a test set does whose truth is kept by others."""
    data = read_json(Path(path))
    return isinstance(data, dict) and isinstance(data.get("images"), list) and data.get("annotations") in (None, [])


def check_hidden(config: TestConfig) -> None:
    """Raises UserError unless the fields fit a file without annotations."""
    without = f"{config.annotations}: holds no annotations, a hidden test set of which nothing can be scored"
    if config.boxes == "gt" or config.out is None:
        raise UserError(f"{without}: give boxes, a COCO detections JSON, and out, a folder for the predictions")
    if config.baseline_annotations is not None or config.joints != "all" or config.labelled_joints is not None:
        raise UserError(f"{without}: leave out baseline_annotations, joints and labelled_joints, or name another file")


def read_hidden(path: str, skeleton: Skeleton) -> CocoAnnotations:
    """The images of a file without annotations, in the category whose joints it describes, if it does so.

    Else in category 1 with the skeleton's joints, which is what COCO's server wants of a model of its 17.
    """
    images = read_images(path, skeleton)
    categories = read_json(Path(path)).get("categories") or []
    described = [category for category in categories if isinstance(category, dict) and category.get("keypoints")]
    if not described:
        return images
    joints = len(described[0]["keypoints"])
    return replace(
        images,
        category={"id": 1, **described[0]},
        keypoints=np.zeros((0, joints, 2)),
        visibility=np.zeros((0, joints), dtype=np.int64),
    )


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
