"""`python -m evaluation test`: a pose model on annotated pictures, with the numbers and how they were made."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from poserelay.checkpoint import verify_handoff
from poserelay.datasets.coco import CocoAnnotations, read_coco, read_detections, read_json
from poserelay.datasets.fullimage import PyramidDataset
from poserelay.datasets.topdown import TopDownDataset
from poserelay.datasets.unlabelled_persons import read_images
from poserelay.distributed import start
from poserelay.ensemble import Ensemble, load_predictor
from poserelay.errors import UserError
from poserelay.inference import Poses, predict_poses, protocol, suppress, to_results
from poserelay.keypoints import Skeleton, match_joints
from poserelay.model import PoseModel, SingleStageModel
from poserelay.run import write_json
from poserelay.scoring import (
    IOU_RANGES,
    Truth,
    has_crowd_index,
    has_max_iou,
    in_iou_range,
    mean_pose,
    oks_metrics,
    order_of_file,
    parsed_truth,
    pck_reference,
    place_joints,
    place_pose,
    poses_of_persons,
    results_that_count,
    scored_truth,
)
from poserelay.whole_images import predict_images, whole_batches
from poserelay.whole_images import protocol as whole_protocol

from .calibration import NOT_MEASURED, calibration, format_scores
from .config import TestConfig
from .joint_accuracy import format_joints
from .reliance import blindness, format_reliance, reliance, reliance_crops
from .score import PERSON_METRICS, accuracy_of_joints, format_report, person_metrics, warn_of_oks, without_nan
from .submission import check_submission, write_submission

CROPS, IMAGES = 64, 8
"""Per forward pass, where the configuration does not say."""


class Predicted(NamedTuple):
    """What a model finds in the pictures, in the joints that are scored, before the NMS."""

    poses: Poses
    own: bool
    """Whether the poses are those of the file's persons, in their order."""
    baseline: Poses | None
    """The mean pose in the boxes that the model was given, or else in the annotated ones."""
    protocol: dict[str, Any]


def main(config: TestConfig) -> dict[str, Any]:
    """Print, write and return {"metrics", "protocol", "joints", "scores"}; the baseline's metrics are prefixed
    "mean pose ".

    "joints" are `joint_means` of the poses that PCK measures, "scores" is the `calibration` of all poses. Where the
    model carries SCIO's networks there is also "scio", their `reliance`, null where no group is labelled.

    Of a file without annotations, a hidden test set, the predictions are written and nothing is scored: no metrics.

    Raises UserError for input that cannot be used and for a picture that cannot be read, CheckFailed for heatmaps that
    are not finite.
    """
    paths = [config.checkpoint] if isinstance(config.checkpoint, str) else config.checkpoint
    for path in paths:
        verify_handoff(path)
    model = load_predictor(paths)
    data = read_json(Path(config.annotations))
    hidden = is_hidden(data)
    check_fields(config, paths[0], hidden, isinstance(model, SingleStageModel))
    model = model.to(start(config.device, "fp32", config.threads).device)
    annotations = (
        read_hidden(config.annotations, data, model.skeleton) if hidden else read_coco(config.annotations, data)
    )
    truth = scored_truth(annotations, model.skeleton, config.joints, config.labelled_joints, data)
    if not hidden:
        pck_reference(truth.common, model.skeleton, config.pck_reference)  # said before the pictures are looked at
    if config.submit is not None:
        single_stage = isinstance(model, SingleStageModel)
        check_submission(config.submit, truth, config.boxes, config.box_threshold, single_stage=single_stage)
    mean = None if config.baseline_annotations is None else mean_pose_of(config.baseline_annotations, truth.common)
    refined = model if isinstance(model, PoseModel) and model.refiner is not None and not hidden else None
    crops = None if refined is None else reliance_crops(refined, annotations, config.images)

    if isinstance(model, SingleStageModel):
        found = single_stage_poses(model, truth, mean, config)
    else:
        found = top_down_poses(model, truth, mean, config)
    results = suppressed(found.poses, truth, model.skeleton, config)
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {"instances": None, "truth": "hidden, nothing is scored", "poses": len(results)}
    joints: dict[str, dict[str, Any]] = {}
    scores = NOT_MEASURED
    if not hidden:
        predicted = measured_poses(found.poses, results, truth, found.own)
        ranges = own_poses_of_ranges(found.poses, truth, model.skeleton, config) if found.own else None
        metrics, details = measure(predicted, results, truth, model.skeleton, config, ranges)
        details["matching"] = "the box's own pose" if found.own else "nearest pose of the image"
        warn_of_oks(truth, results, model.skeleton, "the model's poses")
        joints = accuracy_of_joints(predicted[..., :2], truth, model.skeleton)
        scores = calibration(truth, results, model.skeleton)
    if found.baseline is not None:
        left = suppressed(found.baseline, truth, model.skeleton, config)
        own = config.boxes == "gt"
        its_poses = measured_poses(found.baseline, left, truth, own)
        its_ranges = own_poses_of_ranges(found.baseline, truth, model.skeleton, config) if own else None
        its_metrics, _ = measure(its_poses, left, truth, model.skeleton, config, its_ranges)
        metrics |= {f"mean pose {name}": value for name, value in its_metrics.items()}
    report: dict[str, Any] = {
        "metrics": without_nan(metrics),
        "protocol": {
            **found.protocol,
            **({"ensemble": len(paths)} if len(paths) > 1 else {}),
            **details,
            **truth.protocol,
            "baseline": None if config.baseline_annotations is None else Path(config.baseline_annotations).stem,
        },
        "joints": joints,
        "scores": scores,
    }
    if refined is not None:
        batch_size = config.batch_size or CROPS
        report["scio"] = None if crops is None else reliance(refined, crops, batch_size, config.workers)
        warning = blindness(report["scio"])
        if warning and config.decoding.scio.output == "optimisation":
            print(warning, file=sys.stderr)
    if config.out is not None:
        written = place_joints(results, truth.columns, len(annotations.joints))
        write_json(Path(config.out) / "predictions.json", written)
        write_json(Path(config.out) / "metrics.json", report)
        if config.submit is not None:
            file = write_submission(config.submit, Path(config.out), found.poses, results, truth, config.boxes)
            print(f"submission: {file}", file=sys.stderr)
    if hidden and not config.json:
        print(f"{config.annotations} holds no annotations: nothing is scored. {len(results)} poses are in {config.out}")
    print(json.dumps(report) if config.json else format_all(report))
    return report


def top_down_poses(model: PoseModel | Ensemble, truth: Truth, mean: np.ndarray | None, config: TestConfig) -> Predicted:
    """A pose for every annotated or detected box of the file; mean: the baseline's pose, as `mean_pose_of` has it."""
    annotations = truth.file
    detections = None if config.boxes == "gt" else read_detections(config.boxes, annotations, config.box_threshold)
    size, alignment = (model.input.height, model.input.width), model.input.alignment
    dataset = TopDownDataset(
        annotations, config.images, model.skeleton, size, detections=detections, alignment=alignment
    )
    batch_size = config.batch_size or CROPS
    poses = predict_poses(model, dataset, config.decoding, batch_size, config.workers, progress=True).joints(
        order_of_file(model.skeleton, truth.common.joints)
    )
    baseline = None
    if mean is not None:
        placed, ones = place_pose(mean, poses.boxes), np.ones(poses.joint_scores.shape)
        baseline = replace(poses, keypoints=placed, joint_scores=ones, scores=dataset.scores)
    described = {
        **protocol(dataset, config.decoding, config.boxes, refined=model.refiner is not None),
        "box_threshold": None if config.boxes == "gt" else config.box_threshold,
    }
    return Predicted(poses, config.boxes == "gt", baseline, described)


def single_stage_poses(model: SingleStageModel, truth: Truth, mean: np.ndarray | None, config: TestConfig) -> Predicted:
    """All poses that the model finds in the file's images; mean: the baseline's pose, as `mean_pose_of` has it."""
    annotations = truth.file
    dataset = PyramidDataset(annotations, config.images, model.input.height, config.decoding.whole.scales)
    pinned = next(model.parameters()).device.type == "cuda"
    batches = whole_batches(dataset, config.batch_size or IMAGES, config.workers, pinned, progress=True)
    poses = predict_images(model, batches, config.decoding).joints(order_of_file(model.skeleton, truth.common.joints))
    baseline = None
    if mean is not None:
        persons = annotations.persons
        boxes = annotations.crop_boxes(persons)
        baseline = Poses(
            keypoints=place_pose(mean, boxes),
            joint_scores=np.ones((len(boxes), len(mean))),
            scores=np.ones(len(boxes)),
            boxes=boxes,
            areas=boxes[:, 2] * boxes[:, 3],
            image_ids=[annotations.image_ids[row] for row in annotations.image_index[persons]],
            annotation_ids=annotations.ids[persons].tolist(),
        )
    return Predicted(poses, False, baseline, whole_protocol(annotations, model, config.decoding))


def format_all(report: Mapping[str, Any]) -> str:
    """`format_report`, then the scores and the joints, then what is to be told of SCIO."""
    parts = [format_report(report)]
    if report["joints"]:
        parts += [format_scores(report["scores"]), format_joints(report["joints"])]
    if report.get("scio"):
        parts.append(format_reliance(report["scio"]))
    return "\n".join(parts)


def suppressed(poses: Poses, truth: Truth, skeleton: Skeleton, config: TestConfig) -> list[dict[str, Any]]:
    """The results list that OKS-NMS leaves of `poses`, in the joints that are scored, as both are."""
    sigmas = [skeleton.sigmas[joint] for joint in order_of_file(skeleton, truth.common.joints)]
    return to_results(suppress(poses, sigmas, config.decoding), truth.file.category["id"])


def measured_poses(poses: Poses, results: Sequence[Mapping[str, Any]], truth: Truth, own: bool) -> np.ndarray:
    """The joints `[P, J, 3]` by which each of `truth.counted.persons` is measured: x, y in image pixels, confidence.

    Where `poses`, in the joints that are scored, are the persons' `own` its own pose; else the nearest one that OKS-NMS
    left in `results`, NaN where there is none.
    """
    if own:  # the poses are in the order of the file's persons
        rows = np.isin(truth.file.persons, truth.counted.persons)
        return np.concatenate([poses.keypoints[rows], poses.joint_scores[rows][..., None]], axis=-1)
    return poses_of_persons(truth.common, results)[truth.rows]


def own_poses_of_ranges(
    poses: Poses, truth: Truth, skeleton: Skeleton, config: TestConfig
) -> dict[str, list[dict[str, Any]]] | None:
    """For each of OCHuman's IOU_RANGES what OKS-NMS leaves of its persons' own poses; None of other files.

    `poses` are those of the file's persons, in their order. It is what a file of the range gives with annotated boxes.
    """
    if not has_max_iou(truth.parsed) or has_crowd_index(truth.parsed):
        return None
    records = [r for r in truth.parsed["annotations"] if r["category_id"] == truth.file.category["id"]]
    counted = np.isin(truth.file.persons, truth.counted.persons)
    found = {}
    for name in IOU_RANGES:
        inside = np.array([in_iou_range(records[row]["max_iou"], name) for row in truth.file.persons], dtype=bool)
        found[name] = suppressed(poses.take(np.flatnonzero(inside & counted)), truth, skeleton, config)
    return found


def measure(
    predicted: np.ndarray,
    results: Sequence[Mapping[str, Any]],
    truth: Truth,
    skeleton: Skeleton,
    config: TestConfig,
    of_ranges: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of `results`, what OKS-NMS left of the poses in the joints that are scored, and their protocol.

    OKS AP is of `results`, that of OCHuman's ranges of `of_ranges` where it is given. PCK, keypoint recall, and PCKh
    where persons have head sizes, measure every person by its `measured_poses`.
    """
    counting = results_that_count(truth, results)
    metrics, details = oks_metrics(parsed_truth(truth), counting, skeleton, config.crowd_levels, of_ranges=of_ranges)
    more, its_details, not_scored = person_metrics(
        PERSON_METRICS, truth, predicted, skeleton, config.pck_threshold, config.pck_reference, "the model's poses"
    )
    details |= its_details | ({"not_scored": not_scored} if not_scored else {})
    return metrics | more, {"instances": len(truth.counted.persons), **details}


def is_hidden(data: Any) -> bool:
    """Whether a COCO file's JSON lists images and no annotations, as a test set does whose truth is kept by others."""
    return isinstance(data, dict) and isinstance(data.get("images"), list) and data.get("annotations") in (None, [])


def check_fields(config: TestConfig, path: str, hidden: bool, single_stage: bool) -> None:
    """Raises UserError unless the fields fit a model, of the file `path`, and a file with or without annotations."""
    if single_stage and config.boxes != "gt":
        raise UserError(f"{path}: a single-stage model finds the persons itself; leave boxes out")
    if not hidden:
        return
    without = f"{config.annotations}: holds no annotations, a hidden test set of which nothing can be scored"
    if config.out is None or (config.boxes == "gt" and not single_stage):
        boxes = "" if single_stage else "boxes, a COCO detections JSON, and "
        raise UserError(f"{without}: give {boxes}out, a folder for the predictions")
    if config.baseline_annotations is not None or config.joints != "all" or config.labelled_joints is not None:
        raise UserError(f"{without}: leave out baseline_annotations, joints and labelled_joints, or name another file")


def read_hidden(path: str, data: Mapping[str, Any], skeleton: Skeleton) -> CocoAnnotations:
    """The images of a file without annotations, in the category whose joints it describes, if it does so.

    Else in category 1 with the skeleton's joints, which is what COCO's server wants of a model of its 17.
    """
    images = read_images(path, skeleton)
    categories = data.get("categories") or []
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
