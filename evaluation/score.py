"""`python -m evaluation score`: metrics of any COCO results file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poserelay.datasets.coco import AREA_OF_BOX, read_coco, read_json
from poserelay.errors import UserError
from poserelay.keypoints import Skeleton, resolve_skeleton
from poserelay.pckh import head_sizes, pckh, pckh_of_persons, read_mpii
from poserelay.scoring import (
    POSES_PER_IMAGE,
    PckReference,
    Truth,
    beyond_best,
    check_results,
    has_crowd_index,
    oks_metrics,
    order_of_file,
    parsed_truth,
    pck_of_truth,
    pck_reference,
    poses_of_persons,
    read_results,
    recall_of_truth,
    repeated_records,
    results_that_count,
    scored_truth,
    sigma_source,
    take_joints,
)

from .config import ScoreConfig
from .joint_accuracy import format_joints, joint_means, oks_areas

PERSON_METRICS = ("pck", "pckh", "recall")
"""Those that look at each person's matched pose."""


def main(config: ScoreConfig) -> dict[str, Any]:
    """Print and return {"metrics", "protocol"}, of metric all also "joints" and "scores" as `test` has them.

    Raises UserError for a file or record that cannot be used, and for a metric that the truth does not allow; of all,
    the protocol names those (`not_scored`).
    """
    report = score_mpii(config) if config.annotations.endswith(".mat") else score_coco(config)
    print(json.dumps(report) if config.json else format_scored(report))
    return report


def score_coco(config: ScoreConfig) -> dict[str, Any]:
    """The report on a COCO results list."""
    if config.predictions.endswith(".mat"):
        raise UserError(f"{config.predictions}: a .mat of predictions needs MPII's gt_valid.mat as annotations")
    data = read_json(Path(config.annotations))
    annotations = read_coco(config.annotations, data)
    skeleton = resolve_skeleton(config.skeleton, annotations.category, config.annotations)
    truth = scored_truth(annotations, skeleton, config.joints, config.labelled_joints, data)
    if config.metric == "pckh":
        head_sizes(truth.counted)  # said before the predictions are read
    elif config.metric == "pck":
        pck_reference(truth.common, skeleton, config.pck_reference)
    results = read_results(config.predictions)
    joints = len(annotations.joints)
    check_results(results, annotations.image_ids, annotations.category["id"], joints, config.predictions)
    results = take_joints(results, truth.columns)
    warn_of_repeated(results, config.predictions)
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
    metrics: dict[str, float] = {}
    not_scored: dict[str, str] = {}
    if config.metric in ("oks", "all"):
        try:
            counting = results_that_count(truth, results)
            metrics, details = oks_metrics(
                parsed_truth(truth), counting, skeleton, config.crowd_levels, config.predictions
            )
            protocol |= {"sigmas": sigma_source(skeleton), **details}
            warn_of_oks(truth, counting, skeleton, config.predictions)
        except UserError as error:
            if config.metric == "oks":
                raise
            not_scored["oks"] = reason(error, config.annotations)
    report: dict[str, Any] = {}
    if config.metric != "oks":
        poses = poses_of_persons(truth.common, results)[truth.rows]
        wanted = PERSON_METRICS if config.metric == "all" else (config.metric,)
        found, details, left_out = person_metrics(
            wanted, truth, poses, skeleton, config.pck_threshold, config.pck_reference, config.predictions
        )
        if config.metric == "all":
            from .calibration import calibration  # imports scipy.stats, which is slow, for this metric alone

            report["joints"] = accuracy_of_joints(poses[..., :2], truth, skeleton)
            report["scores"] = calibration(truth, results, skeleton)
        protocol |= {**details, "matching": "nearest pose of the image"}
        metrics, not_scored = metrics | found, not_scored | left_out
    if not_scored:
        protocol["not_scored"] = not_scored
    return {"metrics": without_nan(metrics), "protocol": protocol, **report}


def score_mpii(config: ScoreConfig) -> dict[str, Any]:
    """The report on MPII's own files, whose predictions are in the order of the persons."""
    if config.metric not in ("pckh", "all"):
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
    protocol = {"metric": config.metric, **names, **instances, **details, "matching": "order of the file"}
    if config.metric == "all":
        lacking = {"oks": "neither areas nor boxes", "pck": "no boxes", "recall": "no confidences of joints"}
        protocol["not_scored"] = {name: f"MPII's .mat files hold {what}" for name, what in lacking.items()}
    return {"metrics": without_nan(metrics), "protocol": protocol}


def person_metrics(
    names: Sequence[str],
    truth: Truth,
    poses: np.ndarray,
    skeleton: Skeleton,
    threshold: float,
    reference: PckReference,
    source: str = "predictions",
) -> tuple[dict[str, float], dict[str, Any], dict[str, str]]:
    """Those of PERSON_METRICS in `names`, with their protocol, and why each of the others could not be had.

    Args:
        poses: `[P, J, 3]`, x, y in image pixels and the confidence of the pose of each of `truth.counted.persons`; NaN
            where there is none.
        threshold, reference: of PCK.
        source: what the predictions are called in a message.

    Raises:
        UserError: a single one is asked for, and it cannot be had.
    """
    places, confidences = poses[..., :2], poses[..., 2]
    measures = {
        "pck": lambda: pck_of_truth(truth, places, skeleton, threshold, reference),
        "pckh": lambda: pckh_of_persons(truth.counted, places),
        "recall": lambda: recall_of_truth(truth, confidences, source),
    }
    metrics: dict[str, float] = {}
    protocol: dict[str, Any] = {}
    not_scored: dict[str, str] = {}
    for name in names:
        try:
            found, details = measures[name]()
        except UserError as error:
            if len(names) == 1:
                raise
            not_scored[name] = reason(error, str(truth.file.path), source)
            continue
        if name == "pck" and not details["pck_instances"]:
            not_scored[name] = f"no person has a reference length ({details['pck_reference']})"
        metrics, protocol = metrics | found, protocol | details
    return metrics, protocol, not_scored


def accuracy_of_joints(predicted: np.ndarray, truth: Truth, skeleton: Skeleton) -> dict[str, dict[str, Any]]:
    """`joint_means` at the labels that count of the poses `predicted` `[P, J, 2]` of `truth.counted.persons`."""
    counted, persons = truth.counted, truth.counted.persons
    areas = oks_areas(counted, truth.parsed)[persons]
    sigmas = [skeleton.sigmas[joint] for joint in order_of_file(skeleton, counted.joints)]
    labelled = counted.visibility[persons] > 0
    return joint_means(predicted, counted.keypoints[persons], labelled, areas, counted.joints, sigmas)


def warn_of_oks(truth: Truth, results: Sequence[Mapping[str, Any]], skeleton: Skeleton, source: str) -> None:
    """Tell stderr what makes an OKS AP hard to compare: absent areas, assumed sigmas, poses beyond the 20 best."""
    category, data = truth.file.category["id"], truth.parsed
    persons = [person for person in data["annotations"] if person["category_id"] == category]
    without = sum("area" not in person for person in persons)
    images, poses = beyond_best(results)
    found = []
    if without == 0 and not has_crowd_index(data):
        flat = sum(person["area"] <= 0 and any(person.get("keypoints", ())[2::3]) for person in persons)
        if flat:
            found.append(
                f"{truth.file.path}: {flat} labelled persons have an area of 0: their OKS is 0 for every pose that is "
                "not exact; mend their areas, or take the field out to have 0.53 of the box"
            )
    if without and not has_crowd_index(data):
        found.append(
            f"{truth.file.path}: {without} of its {len(persons)} annotations have no area: OKS takes {AREA_OF_BOX} of "
            "the box instead, and compares with none that takes areas"
        )
    if skeleton.sigmas_assumed:
        found.append(f"the sigmas of skeleton {skeleton.name} are assumed: its AP compares only with itself")
    if images:
        found.append(
            f"{source}: more than {POSES_PER_IMAGE} poses on {images} of the images; AP looks at the {POSES_PER_IMAGE} "
            f"best of each, and so not at {poses} in all"
        )
    for line in found:
        print(f"warning: {line}", file=sys.stderr)


def warn_of_repeated(results: Sequence[Mapping[str, Any]], source: str) -> None:
    """Tell stderr of records that stand in the list twice, as where several processes wrote the same images."""
    repeated = repeated_records(results)
    if repeated:
        print(
            f"warning: {source}: records that say the same as an earlier one: {len(repeated)}, the first is record "
            f"{repeated[0]}; each counts as a pose of its own, so remove them unless they are meant",
            file=sys.stderr,
        )


def reason(error: UserError, *files: str) -> str:
    """What a message says is the matter, without the file that it names and the remedy."""
    text = str(error)
    for file in files:
        text = text.removeprefix(f"{file}: ")
    return text.split(";")[0]


def format_scored(report: Mapping[str, Any]) -> str:
    """`format_report`, then the joints and the scores where there are any."""
    parts = [format_report(report)]
    if report.get("joints"):
        from .calibration import format_scores

        parts += [format_scores(report["scores"]), format_joints(report["joints"])]
    return "\n".join(parts)


def format_report(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics, if any, in lines and the protocol under them; "-" where a metric has nothing to measure.

    Four digits each, and five of PCKh, which is printed in per cent with three. Metrics that could not be had
    (`not_scored`) have a line each.
    """
    width = max(map(len, report["metrics"]), default=0)

    def shown(name: str, value: float | None) -> str:
        return "-" if value in (None, -1.0) else f"{value:.{5 if 'PCKh' in name else 4}f}"

    lines = [f"{name:<{width}}  {shown(name, value)}" for name, value in report["metrics"].items()]
    protocol = dict(report["protocol"])
    lines += [f"no {name}: {why}" for name, why in (protocol.pop("not_scored", None) or {}).items()]
    listed = {n: " and ".join(map(str, v)) if isinstance(v, list) else v for n, v in protocol.items() if v is not None}
    return "\n".join([*lines, f"({', '.join(f'{name} {v}' for name, v in listed.items())})"])


def without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """NaN as null, which JSON can hold."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}
