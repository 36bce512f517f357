"""Metrics of predicted poses: OKS average precision through pycocotools, PCK, keypoint recall, and the mean pose."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .datasets.coco import AREA_OF_BOX, CocoAnnotations
from .errors import UserError
from .keypoints import Skeleton, match_joints

AP_NAMES = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
CROWDPOSE_NAMES = ("AP", "AP50", "AP75", "AR", "AR50", "AR75")
POSES_PER_IMAGE = 20
CROWD_LEVELS = {"crowdpose": (0.2, 0.8), "icon": (0.1, 0.8)}
"""The crowdIndex from which an image is medium, and from which it is hard: CrowdPose's API, and ICON's text."""
IOU_RANGES = {"moderate": (0.5, 0.75), "hard": (0.75, 1.0)}
"""MaxIoU of OCHuman's persons, from and below (CCM, Table 3); 1 belongs to the last."""
AUC_THRESHOLDS = np.arange(51) / 100
"""MPII's toolkit: the curve of PCK is taken from 0 to 0.5 in steps of 0.01."""
RECALL_THRESHOLDS = tuple(step / 10 for step in range(1, 10))
"""ICON, Table 6."""
PckReference = Literal["auto", "torso", "box"]


class Truth(NamedTuple):
    """What of an annotation file is scored, of its K joints the J that a skeleton has: see `scored_truth`."""

    file: CocoAnnotations
    """All of it."""
    common: CocoAnnotations
    """With the J joints alone."""
    counted: CocoAnnotations
    """`common` with visibility 0 where a label does not count; the file itself where nothing is left out."""
    columns: list[int]
    """`[J]`, the joints' places in the file."""
    protocol: dict[str, Any]
    """What is left out, and the skeleton's joints that the file does not have; empty where there is nothing to say."""
    data: Mapping[str, Any] | None = None
    """The file's JSON, where it was kept."""

    @property
    def parsed(self) -> Mapping[str, Any]:
        """The file's JSON."""
        return read_parsed(self.file.path) if self.data is None else self.data

    @property
    def rows(self) -> np.ndarray:
        """Which of `common.persons` have a label that counts, `[P]` bool: `counted.persons`."""
        return np.isin(self.common.persons, self.counted.persons)


def scored_truth(
    annotations: CocoAnnotations,
    skeleton: Skeleton,
    joints: Literal["all", "visible", "invisible"] = "all",
    labelled_joints: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> Truth:
    """The joints that `annotations` and `skeleton` share by name, and of their labels those that count.

    `joints`: those annotated visible (v = 2) or hidden (v = 1) alone (CCM, Table 13). `labelled_joints`: of persons
    with exactly so many labelled joints alone (CCM, Table 14), counted as annotated: over all joints of the file, seen
    or hidden. Areas and boxes stay. Persons without a label that counts are left out, and so are their poses
    (`results_that_count`): these would be false positives. `data`: the file's JSON, not to be read once more.

    Raises UserError: no joint in common, a file that does not tell visible from hidden joints, or no person left.
    """
    shared = [index is not None for index in match_joints(skeleton.joints, annotations.joints)]
    columns = [column for column, has in enumerate(shared) if has]
    unscored = [joint for joint, has in zip(annotations.joints, shared, strict=True) if not has]
    foreign = match_joints(annotations.joints, skeleton.joints)
    not_in_file = [joint for joint, index in zip(skeleton.joints, foreign, strict=True) if index is None]
    if not columns:
        raise UserError(
            f"{annotations.path}: its joints ({', '.join(annotations.joints)}) have none in common with skeleton "
            f"{skeleton.name} ({', '.join(skeleton.joints)}); choose another or name them alike"
        )
    protocol: dict[str, Any] = {}
    if unscored or not_in_file:
        protocol["joints_scored"] = len(columns)
    protocol |= {name: left for name, left in (("unscored", unscored), ("not_in_file", not_in_file)) if left}
    common = annotations
    if unscored:
        common = replace(
            annotations,
            category={**annotations.category, "keypoints": [annotations.joints[column] for column in columns]},
            keypoints=annotations.keypoints[:, columns],
            visibility=annotations.visibility[:, columns],
        )

    visibility, counts = common.visibility, common.visibility > 0
    if joints != "all":
        found = set(np.unique(visibility[common.persons])) - {0}
        if len(found) < 2:
            only = f"all have v = {found.pop()}" if found else "there is none"
            raise UserError(
                f"{annotations.path}: of its labelled joints {only}, which does not tell visible ones (v = 2) from "
                "hidden ones (v = 1); score it with joints all"
            )
        counts = visibility == (2 if joints == "visible" else 1)
        protocol["joints"] = joints
    if labelled_joints is not None:
        counts = counts & ((annotations.visibility > 0).sum(1) == labelled_joints)[:, None]
        protocol["labelled_joints"] = labelled_joints
    if common is annotations and joints == "all" and labelled_joints is None:
        return Truth(annotations, annotations, annotations, columns, protocol, data)
    counted = replace(
        common, keypoints=np.where(counts[..., None], common.keypoints, 0.0), visibility=np.where(counts, visibility, 0)
    )
    if joints != "all" or labelled_joints is not None:
        protocol["persons_left_out"] = len(common.persons) - len(counted.persons)
    if len(annotations.persons) and not len(counted.persons):
        kind = "labelled joint" if joints == "all" else f"joint labelled {joints}"
        among = "" if labelled_joints is None else f" among those with {labelled_joints} labelled joints"
        raise UserError(
            f"{annotations.path}: none of its {len(annotations.persons)} persons has a {kind} to score{among}; "
            "take another file, or other joints and labelled_joints"
        )
    return Truth(annotations, common, counted, columns, protocol, data)


def parsed_truth(truth: Truth) -> Mapping[str, Any]:
    """The file's JSON with what counts alone, for `oks_metrics`; as it is where all does.

    Persons that are left out are not in it. `num_keypoints` is counted anew, and stays 0 where the file has 0. A person
    with labels on other joints alone is ignored as pycocotools ignores COCO's unlabelled persons: it is not missed, and
    one pose that lies in its box enlarged threefold, and fits no other person, is no false positive.
    """
    data = truth.parsed
    if truth.counted is truth.file:
        return data
    category = {**truth.counted.category, "skeleton": []}
    triples = np.concatenate([truth.counted.keypoints, truth.counted.visibility[..., None]], axis=-1)
    labelled = (truth.counted.visibility > 0).sum(1)
    kept = np.ones(len(labelled), dtype=bool)
    kept[truth.common.persons] = truth.rows
    records = [record for record in data["annotations"] if record["category_id"] == category["id"]]
    persons = [
        {
            **records[row],
            "keypoints": triples[row].ravel().tolist(),
            "num_keypoints": 0 if records[row].get("num_keypoints") == 0 else int(labelled[row]),
        }
        for row in np.flatnonzero(kept)
    ]
    return {**data, "categories": [category], "annotations": persons}


def results_that_count(truth: Truth, results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Valid `results`, of the joints that are scored, without the poses of the persons that are left out.

    A person's poses are the one that is matched to it (`match_poses`) and, of those that are matched to nobody, the
    ones that are nearer to it than to others. On an image without a labelled person nothing is left out.
    """
    if truth.rows.all():
        return list(results)
    kept = np.ones(len(results), dtype=bool)
    persons, counts = truth.common.persons, truth.rows
    for its_persons, its_poses, joints in _by_image(truth.common, results):
        keypoints, visibility = (a[persons[its_persons]] for a in (truth.common.keypoints, truth.common.visibility))
        if len(its_poses):
            owner = _mean_distances(joints[..., :2], keypoints, visibility).argmin(0)
            matched = match_poses(joints[..., :2], keypoints, visibility)
            owner[matched[matched >= 0]] = np.flatnonzero(matched >= 0)
            kept[its_poses] = counts[its_persons[owner]]
    return [record for record, stays in zip(results, kept, strict=True) if stays]


def pck_of_truth(
    truth: Truth,
    predicted: np.ndarray,
    skeleton: Skeleton,
    threshold: float = 0.2,
    reference: PckReference = "auto",
) -> tuple[dict[str, float], dict[str, Any]]:
    """`pck_of_persons` of the labels that count: `predicted` `[P, J, 2]` is of `truth.counted.persons`.

    The reference length (`pck_reference`) is of the person, so that labels which do not count take part in it. Raises
    UserError as `pck_reference`.
    """
    lengths, name = pck_reference(truth.common, skeleton, reference)
    return pck_of_persons(truth.counted, predicted, skeleton, threshold, (lengths[truth.rows], name))


def recall_of_truth(
    truth: Truth, confidences: np.ndarray, source: str = "predictions"
) -> tuple[dict[str, float], dict[str, Any]]:
    """`keypoint_recall` of the labels that count, with its protocol.

    confidences: `[P, J]`, of the joints of the pose of each of `truth.counted.persons`, NaN where there is none. Raises
    UserError, naming `source`, where all are whole numbers: visibilities, or a 1 that stands for none.
    """
    found = confidences[np.isfinite(confidences)]
    if len(found) and (found == np.rint(found)).all():
        whole = " or ".join(f"{value:g}" for value in np.unique(found)[:3])
        raise UserError(
            f"{source}: the third number of every joint is {whole}, no confidence, which keypoint recall goes by; "
            "give predictions whose keypoints are x, y, confidence"
        )
    visibility = truth.counted.visibility[truth.counted.persons]
    shared = len(found) and not np.ptp(confidences[np.isfinite(confidences).all(1)], axis=1).any()
    details = {"recall_confidence": "of the pose, one for all its joints" if shared else "of the joint"}
    return keypoint_recall(confidences, visibility), details


def keypoint_recall(confidences: np.ndarray, visibility: np.ndarray) -> dict[str, float]:
    """Share of the labelled joints whose predicted confidence exceeds 0.1, 0.2, ..., 0.9 (ICON, Table 6).

    No distance enters: a joint far off counts as found. confidences: `[P, K]`, NaN where nothing is predicted, which is
    a miss; visibility: `[P, K]`, labelled where > 0. NaN where nothing is labelled.
    """
    found = np.nan_to_num(confidences[visibility > 0], nan=-np.inf)
    return {
        f"recall@{threshold}": float((found > threshold).mean()) if len(found) else math.nan
        for threshold in RECALL_THRESHOLDS
    }


def take_joints(results: Sequence[Mapping[str, Any]], columns: Sequence[int]) -> list[dict[str, Any]]:
    """Results, which are valid, with the joints `columns` alone, in that order; as they are where these are all."""
    if results and list(columns) == list(range(len(results[0]["keypoints"]) // 3)):
        return [*results]  # pyright: ignore[reportReturnType]
    places = [3 * column + part for column in columns for part in range(3)]
    return [{**record, "keypoints": [record["keypoints"][place] for place in places]} for record in results]


def place_joints(results: Sequence[Mapping[str, Any]], columns: Sequence[int], joints: int) -> list[dict[str, Any]]:
    """The inverse of `take_joints`: results of `joints` joints, 0, 0, 0 for those that are not in `columns`."""
    places = [3 * column + part for column in columns for part in range(3)]
    placed = []
    for record in results:
        keypoints = [0.0] * (3 * joints)
        for place, number in zip(places, record["keypoints"], strict=True):
            keypoints[place] = number
        placed.append({**record, "keypoints": keypoints})
    return placed


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The records of a COCO results file, unchecked beyond being a list; see `check_results`.

    Raises UserError naming the file when it is missing, not JSON, or not a list.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a COCO results file") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); expected a COCO results list") from error
    if not isinstance(records, list):
        raise UserError(
            f"{path}: expected a list of results, found {type(records).__name__} (is it an annotation file?)"
        )
    return records


def check_results(
    results: Sequence[Any], image_ids: Iterable[int | str], category_id: int, joints: int, source: str = "predictions"
) -> None:
    """Check that every record is {image_id, category_id, keypoints of 3 x `joints` numbers, score} of a known image.

    Raises UserError naming `source`, the record's position in the list, the field, and what was found.
    """
    known = set(image_ids)
    if _are_valid(results, known, category_id, joints):
        return
    lengths = {"keypoints": 3 * joints, "bbox": 4}
    for position, record in enumerate(results):
        where = f"{source}: record {position}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, found {type(record).__name__}")
        missing = [key for key in ("image_id", "category_id", "keypoints", "score") if key not in record]
        if missing:
            raise UserError(
                f"{where}: has no {', '.join(missing)}; every pose needs image_id, category_id, keypoints, score"
            )
        if not isinstance(record["image_id"], (int, str)) or record["image_id"] not in known:
            raise UserError(f"{where}: image_id {record['image_id']!r} is not in the annotation file")
        if record["category_id"] != category_id:
            raise UserError(
                f"{where}: category_id is {record['category_id']!r}, the annotations' category is {category_id}"
            )
        if not _is_finite_number(record["score"]):
            raise UserError(f"{where}: score is {record['score']!r}, expected a finite number")
        for field in lengths.keys() & record.keys():
            numbers = record[field]
            if not isinstance(numbers, list) or len(numbers) != lengths[field]:
                found = f"{len(numbers)} numbers" if isinstance(numbers, list) else repr(numbers)
                raise UserError(f"{where}: {field} has {found}, expected a list of {lengths[field]}")
            wrong = [number for number in numbers if not _is_finite_number(number)]
            if wrong:
                shown = repr(wrong[0])
                shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
                raise UserError(f"{where}: {field} holds {shown}, expected finite numbers")


def beyond_best(results: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many images have more than the 20 poses that OKS AP looks at, and how many poses are beyond these."""
    counts = Counter(record["image_id"] for record in results)
    beyond = [count - POSES_PER_IMAGE for count in counts.values() if count > POSES_PER_IMAGE]
    return len(beyond), sum(beyond)


def repeated_records(results: Sequence[Mapping[str, Any]]) -> list[int]:
    """Positions of the records that say the same as an earlier one: image, score and all joints."""
    seen: set[tuple[Any, ...]] = set()
    found = []
    for position, record in enumerate(results):
        said = (record["image_id"], record["score"], *record["keypoints"])
        if said in seen:
            found.append(position)
        seen.add(said)
    return found


def order_of_file(skeleton: Skeleton, joints: Sequence[str]) -> list[int]:
    """For each joint of an annotation file its index in `skeleton`, by name.

    Raises UserError where the skeleton lacks one: its sigma is unknown, and OKS counts an unpredicted joint as missed.
    """
    order = match_joints(skeleton.joints, joints)
    missing = [joint for joint, index in zip(joints, order, strict=True) if index is None]
    if missing:
        raise UserError(
            f"skeleton {skeleton.name!r} lacks {', '.join(missing)} of the annotation file; "
            "name the joints alike, or convert the file to this skeleton"
        )
    return [index for index in order if index is not None]


def sigma_source(skeleton: Skeleton) -> str:
    """How OKS was normalised, for a protocol: the skeleton's name, with a warning where its sigmas are assumed."""
    return f"{skeleton.name} (assumed)" if skeleton.sigmas_assumed else skeleton.name


def coco_ap(
    annotations: str | Path | Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    skeleton: Skeleton,
    source: str = "predictions",
) -> dict[str, float]:
    """OKS average precision and recall of `results` against a COCO keypoint file, by pycocotools.

    Returns the ten figures of COCO's keypoint table as fractions (AP, AP50, AP75, APm, APl, AR, AR50, AR75, ARm, ARl);
    -1, as pycocotools has it, where the annotations hold no person of that size. The rest is `evaluate_oks`'s.
    """
    return _summary(evaluate_oks(annotations, results, skeleton, source))


def crowdpose_ap(
    annotations: str | Path | Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    skeleton: Skeleton,
    levels: tuple[float, float] = CROWD_LEVELS["crowdpose"],
    source: str = "predictions",
) -> dict[str, float]:
    """OKS average precision and recall as CrowdPose's API has them: the area of a person is always 0.53 of its box.

    Returns AP, AP50, AP75, AR, AR50, AR75 as fractions, and the AP over the images of each level alone by their
    crowdIndex: AP easy < levels[0] <= AP medium < levels[1] <= AP hard; -1 where a level has no person.

    Every image has a crowdIndex (`has_crowd_index`). The rest is `evaluate_oks`'s.
    """
    data = read_parsed(annotations)
    evaluation = evaluate_oks(data, results, skeleton, source, area_of_box=True)
    figures = _summary(evaluation)
    metrics = {name: figures[name] for name in CROWDPOSE_NAMES}
    level = np.searchsorted(levels, [image["crowdIndex"] for image in data["images"]], side="right")
    for number, name in enumerate(("easy", "medium", "hard")):
        ids = {image["id"] for image, of in zip(data["images"], level, strict=True) if of == number}
        metrics[f"AP {name}"] = _summary(_of_images(evaluation, ids))["AP"] if ids else -1.0
    return metrics


def has_max_iou(data: Mapping[str, Any]) -> bool:
    """Whether every annotation of a parsed COCO file carries a max_iou, as `convert --dataset ochuman` writes it."""
    return bool(data["annotations"]) and all(_is_finite_number(each.get("max_iou")) for each in data["annotations"])


def in_iou_range(max_iou: float, name: str) -> bool:
    """Whether a person of this MaxIoU belongs to one of IOU_RANGES."""
    low, high = IOU_RANGES[name]
    return low <= max_iou < high or max_iou == high == 1


def of_iou_range(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A parsed file as OCHuman's API writes it for one of IOU_RANGES.

    It has neither the persons outside the range nor the images without one inside.
    """
    persons = [person for person in data["annotations"] if in_iou_range(person["max_iou"], name)]
    shown = {person["image_id"] for person in persons}
    return {**data, "annotations": persons, "images": [image for image in data["images"] if image["id"] in shown]}


def ochuman_ap(
    data: Mapping[str, Any],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    skeleton: Skeleton,
    source: str = "predictions",
) -> dict[str, float]:
    """AP moderate and AP hard, as the files of a range have it (`of_iou_range`); -1 where a range has no person.

    `data`: a file whose persons all have a max_iou; `results`: for each of IOU_RANGES the poses to count. On the images
    that stay these are all counted, so that a pose on a person outside the range is a false positive, as it is with the
    API's files.
    """
    metrics = {}
    for name in IOU_RANGES:
        its = of_iou_range(data, name)
        shown = {image["id"] for image in its["images"]}
        poses = [record for record in results[name] if record["image_id"] in shown]
        labelled = any(_labelled(person) and not person.get("iscrowd") for person in its["annotations"])
        metrics[f"AP {name}"] = coco_ap(its, poses, skeleton, source)["AP"] if labelled else -1.0
    return metrics


def has_crowd_index(data: Mapping[str, Any]) -> bool:
    """Whether every image of a parsed COCO file carries a crowdIndex, as CrowdPose's do."""
    return bool(data["images"]) and all(_is_finite_number(image.get("crowdIndex")) for image in data["images"])


def oks_metrics(
    annotations: str | Path | Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    skeleton: Skeleton,
    crowd_levels: str = "crowdpose",
    source: str = "predictions",
    of_ranges: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """`crowdpose_ap` where every image carries a crowdIndex, else `coco_ap`, with what the numbers depend on.

    Where every person carries a max_iou, `ochuman_ap` goes with `coco_ap`. `of_ranges`: the poses for each of
    IOU_RANGES, those of its persons alone; None: `results`, of whomever they are.

    `crowd_levels`: one of CROWD_LEVELS. Raises UserError as `evaluate_oks`.
    """
    data = read_parsed(annotations)
    details = {"oks_area": oks_area(data), "poses_per_image": POSES_PER_IMAGE, **_instances_of_oks(data)}
    if not has_crowd_index(data):
        carrying = sum(_is_finite_number(image.get("crowdIndex")) for image in data["images"])
        if carrying:
            details["crowd_levels"] = f"not scored: crowdIndex on {carrying} of {len(data['images'])} images"
        metrics = coco_ap(data, results, skeleton, source)
        if has_max_iou(data):
            metrics |= ochuman_ap(data, of_ranges or dict.fromkeys(IOU_RANGES, results), skeleton, source)
            whose = "of its persons alone" if of_ranges else "of the image, also on persons outside the range"
            details["iou_ranges"] = f"moderate [0.5, 0.75) and hard [0.75, 1], poses {whose}"
        elif carrying := sum(_is_finite_number(each.get("max_iou")) for each in data["annotations"]):
            details["iou_ranges"] = f"not scored: max_iou on {carrying} of {len(data['annotations'])} persons"
        return metrics, details
    medium, hard = CROWD_LEVELS[crowd_levels]
    named = f"{crowd_levels} (easy < {medium} <= medium < {hard} <= hard)"
    metrics = crowdpose_ap(data, results, skeleton, (medium, hard), source)
    return metrics, {**details, "crowd_levels": named}


def oks_area(data: Mapping[str, Any]) -> str:
    """Which area of a person normalises OKS in `oks_metrics`, for a protocol."""
    without = sum("area" not in person for person in data["annotations"])
    if has_crowd_index(data) or without == len(data["annotations"]):
        return f"{AREA_OF_BOX} of the box"
    return f"annotated, or {AREA_OF_BOX} of the box ({without} persons)" if without else "annotated"


def read_parsed(annotations: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """An annotation file's JSON, which is taken as valid (`datasets.coco.read_coco`)."""
    if isinstance(annotations, Mapping):
        return annotations
    return json.loads(Path(annotations).read_text(encoding="utf-8-sig"))


def evaluate_oks(
    annotations: str | Path | Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    skeleton: Skeleton,
    source: str = "predictions",
    *,
    area_of_box: bool = False,
) -> COCOeval:
    """pycocotools' evaluation of `results`, matched image by image and not yet accumulated.

    Joints are in the file's order, sigmas the skeleton's by name. Persons without an `area`, and with `area_of_box`
    all, count with 0.53 of their box (CrowdPose). The size of a prediction, which decides whether an unmatched one
    counts in APm and APl, is its `bbox` where all records bring one and the extent of its joints otherwise. The 20
    best-scored poses of an image take part.

    `annotations`: a path or its parsed JSON, taken as valid (`datasets.coco.read_coco`). `source` names the results in
    messages.
    Raises UserError for a malformed record (`check_results`), a joint that the skeleton lacks (`order_of_file`), and
    where no person is labelled.
    """
    data = read_parsed(annotations)
    category = next(category for category in data["categories"] if category.get("keypoints"))
    joints = len(category["keypoints"])
    sigmas = [skeleton.sigmas[joint] for joint in order_of_file(skeleton, category["keypoints"])]
    check_results(results, (image["id"] for image in data["images"]), category["id"], joints, source)
    persons = [person for person in data["annotations"] if person["category_id"] == category["id"]]
    truth = [_ground_truth(person, number, joints, area_of_box) for number, person in enumerate(persons, start=1)]
    if not any(person["num_keypoints"] > 0 and not person["iscrowd"] for person in truth):
        raise UserError("the annotations hold no person with labelled joints: nothing to score against")

    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth: Any = COCO()  # its stubs know neither keypoints nor results in memory
        ground_truth.dataset = {"images": data["images"], "categories": [category], "annotations": truth}
        ground_truth.createIndex()
        predictions: Any = COCO()
        predictions.dataset = {"images": data["images"], "categories": [category], "annotations": _detected(results)}
        predictions.createIndex()
        evaluation = COCOeval(ground_truth, predictions, "keypoints")
        evaluation.params.kpt_oks_sigmas = np.asarray(sigmas, dtype=np.float64)
        evaluation.params.maxDets = [POSES_PER_IMAGE]
        evaluation.evaluate()
    return evaluation


def pck(
    predicted: np.ndarray, truth: np.ndarray, visibility: np.ndarray, reference: np.ndarray, threshold: float = 0.2
) -> dict[str, Any]:
    """Share of labelled joints predicted within `threshold` times their person's reference length.

    predicted, truth: `[N, K, 2]` pixels of one frame; a NaN prediction is a miss. visibility: `[N, K]`, labelled
    where > 0. reference: `[N]`, same pixels; persons whose reference is NaN or 0 are left out.
    Returns {"PCK": over all labelled joints, "per_joint": `[K]`, "persons": how many counted}; a share is NaN where
    nothing is labelled.
    """
    correct, labelled = correct_joints(predicted, truth, visibility, reference, threshold)
    with np.errstate(invalid="ignore"):
        per_joint = correct.sum(0) / labelled.sum(0)
        overall = np.divide(correct.sum(), labelled.sum())
    return {"PCK": float(overall), "per_joint": per_joint, "persons": int(labelled.any(1).sum())}


def correct_joints(
    predicted: np.ndarray, truth: np.ndarray, visibility: np.ndarray, reference: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which joints are correct, and which count, each `[N, K]` bool; the arguments are `pck`'s."""
    counted = np.nan_to_num(reference) > 0
    labelled = (np.asarray(visibility) > 0) & counted[:, None]
    distance = np.linalg.norm(np.asarray(predicted, dtype=np.float64) - truth, axis=-1)
    # Divided before it is compared, as MPII's evaluators do.
    return labelled & (distance / np.where(counted, reference, np.nan)[:, None] <= threshold), labelled


def pck_auc(predicted: np.ndarray, truth: np.ndarray, visibility: np.ndarray, reference: np.ndarray) -> float:
    """Area under the curve of PCK over thresholds from 0 to 0.5, as a share; the arguments are `pck`'s.

    MPII's toolkit: the thresholds are 0, 0.01, ..., 0.5, the curve is straight between them. NaN where nothing is
    labelled.
    """
    counted = np.nan_to_num(reference) > 0
    labelled = (np.asarray(visibility) > 0) & counted[:, None]
    distance = np.linalg.norm(np.asarray(predicted, dtype=np.float64) - truth, axis=-1)
    shares = (distance / np.where(counted, reference, np.nan)[:, None])[labelled]
    if not len(shares):
        return math.nan
    first = np.searchsorted(AUC_THRESHOLDS, np.nan_to_num(shares, nan=np.inf), side="left")  # threshold it is within
    curve = np.bincount(first, minlength=len(AUC_THRESHOLDS) + 1)[:-1].cumsum() / len(shares)
    return float(np.trapezoid(curve, AUC_THRESHOLDS) / AUC_THRESHOLDS[-1])


def torso_reference(keypoints: np.ndarray, visibility: np.ndarray, torso: tuple[int, int]) -> np.ndarray:
    """Distance `[N]` between the two joints `torso` of keypoints `[N, K, 2]`; NaN where either is not labelled."""
    first, second = torso
    length = np.linalg.norm(keypoints[:, first] - keypoints[:, second], axis=-1)
    return np.where((visibility[:, first] > 0) & (visibility[:, second] > 0), length, np.nan)


def box_reference(boxes: np.ndarray) -> np.ndarray:
    """The longer side `[N]` of boxes `[N, 4]` (xywh)."""
    return boxes[:, 2:].max(axis=1)


def match_poses(predicted: np.ndarray, truth: np.ndarray, visibility: np.ndarray) -> np.ndarray:
    """For each of N persons the index of its own among M predictions, or -1: greedy, the closest pair first.

    A pair's distance is the mean over the person's labelled joints.
    predicted: `[M, K, 2]`; truth: `[N, K, 2]`, same pixels, of one image; visibility: `[N, K]`. A person without any
    labelled joint gets -1.
    """
    cost = _mean_distances(predicted, truth, visibility)
    count = (visibility > 0).sum(1)
    matched = np.full(len(truth), -1)
    taken = np.zeros(len(predicted), dtype=bool)
    left = min(int((count > 0).sum()), len(predicted))
    for flat in np.argsort(cost, axis=None, kind="stable").tolist():
        if not left:
            break
        person, pose = divmod(flat, len(predicted))
        if matched[person] < 0 and not taken[pose] and count[person]:
            matched[person], taken[pose] = pose, True
            left -= 1
    return matched


def match_results(annotations: CocoAnnotations, results: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The predicted joints `[P, K, 2]` of each of `annotations.persons`, NaN where none is left for it (`match_poses`).

    `results` are valid (`check_results`), with the joints of the file.
    """
    return poses_of_persons(annotations, results)[..., :2]


def poses_of_persons(annotations: CocoAnnotations, results: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """`match_results` with the joints' confidences: `[P, K, 3]`, x, y in image pixels and the results' third number."""
    persons = annotations.persons
    matched = np.full((len(persons), len(annotations.joints), 3), np.nan)
    for its_persons, _, its_poses in _by_image(annotations, results):
        truth = persons[its_persons]
        pose = match_poses(its_poses[..., :2], annotations.keypoints[truth], annotations.visibility[truth])
        matched[its_persons[pose >= 0]] = its_poses[pose[pose >= 0]]
    return matched


def pck_of_persons(
    annotations: CocoAnnotations,
    predicted: np.ndarray,
    skeleton: Skeleton,
    threshold: float = 0.2,
    reference: tuple[np.ndarray, str] | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """PCK of `predicted` `[P, K, 2]` for `annotations.persons`, joints in the file's order, with its protocol.

    The reference length is the distance of the skeleton's torso joints, persons without both left out; the longer side
    of the box for skeletons without a torso; or it is given, as `pck_reference` has it. Metrics: PCK, AUC (`pck_auc`)
    and PCK/<joint>, fractions (NaN where nothing is labelled).
    """
    persons = annotations.persons
    truth, visibility = annotations.keypoints[persons], annotations.visibility[persons]
    lengths, name = reference or pck_reference(annotations, skeleton)
    found = pck(predicted, truth, visibility, lengths, threshold)
    per_joint = zip(annotations.joints, found["per_joint"].tolist(), strict=True)
    auc = pck_auc(predicted, truth, visibility, lengths)
    metrics = {"PCK": found["PCK"], "AUC": auc, **{f"PCK/{joint}": value for joint, value in per_joint}}
    return metrics, {"pck_threshold": threshold, "pck_reference": name, "pck_instances": found["persons"]}


def pck_reference(
    annotations: CocoAnnotations, skeleton: Skeleton, kind: PckReference = "auto"
) -> tuple[np.ndarray, str]:
    """PCK's reference length `[P]` of `annotations.persons`, image pixels, NaN where it is unknown, and its name.

    auto: the torso where the skeleton and the file have one, else the box. Raises UserError for `torso` where they have
    none.
    """
    persons = annotations.persons
    if kind != "box" and skeleton.torso:
        first, second = match_joints(annotations.joints, skeleton.torso)
        if first is not None and second is not None:
            lengths = torso_reference(annotations.keypoints[persons], annotations.visibility[persons], (first, second))
            return lengths, " to ".join(skeleton.torso)
    if kind == "torso":
        lacks = f"the file lacks {' or '.join(skeleton.torso)}" if skeleton.torso else "the skeleton names no torso"
        raise UserError(
            f"{annotations.path}: PCK by the torso of skeleton {skeleton.name} cannot be had, {lacks}; "
            "take pck_reference box"
        )
    return box_reference(annotations.boxes[persons]), "longer side of the box"


def mean_pose(keypoints: np.ndarray, visibility: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Mean position `[K, 2]` of each labelled joint in its box, as fractions of width and height: the baseline's pose.

    keypoints: `[N, K, 2]`, boxes: `[N, 4]` xywh, same pixels; visibility: `[N, K]`. A joint that is never labelled is
    put at the box's centre.
    """
    labelled = (visibility > 0)[..., None]
    fractions = (keypoints - boxes[:, None, :2]) / boxes[:, None, 2:]
    total = np.where(labelled, fractions, 0.0).sum(0)
    count = labelled.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), 0.5)


def place_pose(pose: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """`pose` `[K, 2]`, in fractions of a box, put into each of boxes `[N, 4]` xywh: `[N, K, 2]`, the boxes' pixels."""
    return boxes[:, None, :2] + pose * boxes[:, None, 2:]


def _by_image(
    annotations: CocoAnnotations, results: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each image with persons: which of `annotations.persons` it shows, which `results`, and their `[M, K, 3]`."""
    rows = {image_id: row for row, image_id in enumerate(annotations.image_ids)}
    image_of_pose = np.array([rows[record["image_id"]] for record in results], dtype=np.int64)
    triples = np.array([record["keypoints"] for record in results], dtype=np.float64)
    triples = triples.reshape(-1, len(annotations.joints), 3)
    image_of_person = annotations.image_index[annotations.persons]
    images = np.unique(image_of_person)
    its_poses, its_persons = (_groups(owner, images) for owner in (image_of_pose, image_of_person))
    for persons, poses in zip(its_persons, its_poses, strict=True):
        yield persons, poses, triples[poses]


def _groups(owner: np.ndarray, names: np.ndarray) -> list[np.ndarray]:
    """For each of `names` the rising places where `owner` has it."""
    order = np.argsort(owner, kind="stable")
    starts, ends = (np.searchsorted(owner[order], names, side=side) for side in ("left", "right"))
    return [order[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _mean_distances(predicted: np.ndarray, truth: np.ndarray, visibility: np.ndarray) -> np.ndarray:
    """Mean distance `[N, M]` over the labelled joints, as `match_poses` takes them; 0 of a person without any."""
    labelled = visibility > 0
    distance = np.linalg.norm(truth[:, None] - predicted[None], axis=-1)  # [N, M, K]
    return (distance * labelled[:, None]).sum(-1) / np.maximum(labelled.sum(1), 1)[:, None]


def _summary(evaluation: COCOeval) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(AP_NAMES, evaluation.stats, strict=True)}


def _of_images(evaluation: COCOeval, ids: set[Any]) -> COCOeval:
    """A matched evaluation as it would be of the images `ids` alone: each image is matched by itself."""
    rows = [row for row, image_id in enumerate(evaluation.params.imgIds) if image_id in ids]
    images, kinds = len(evaluation.params.imgIds), len(evaluation.params.areaRng)
    alone = copy.copy(evaluation)
    alone.params = copy.copy(evaluation.params)
    alone.params.imgIds = [evaluation.params.imgIds[row] for row in rows]
    alone._paramsEval = alone.params  # pyright: ignore[reportAttributeAccessIssue]
    alone.evalImgs = [evaluation.evalImgs[kind * images + row] for kind in range(kinds) for row in rows]
    return alone


def _detected(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Valid results as pycocotools' loadRes makes them, all at once: ids from 1, the area by the box or the joints."""
    if not results:
        return []
    keypoints = np.array([record["keypoints"] for record in results], dtype=np.float64)
    if all("bbox" in record for record in results):
        boxes = np.array([record["bbox"] for record in results], dtype=np.float64)
    else:
        near = np.stack([keypoints[:, part::3].min(1) for part in (0, 1)], axis=1)
        boxes = np.hstack([near, np.stack([keypoints[:, part::3].max(1) for part in (0, 1)], axis=1) - near])
    areas = (boxes[:, 2] * boxes[:, 3]).tolist()
    return [
        {
            "id": number,
            "image_id": record["image_id"],
            "category_id": record["category_id"],
            "keypoints": joints,
            "score": record["score"],
            "area": area,
            "iscrowd": 0,
        }
        for number, (record, joints, area) in enumerate(zip(results, keypoints, areas, strict=True), 1)
    ]


def _ground_truth(person: Mapping[str, Any], number: int, joints: int, area_of_box: bool) -> dict[str, Any]:
    """A person as pycocotools needs it; it marks a match by the annotation's id, so that id 0 would never match."""
    keypoints = person.get("keypoints") or [0] * (3 * joints)
    box = person["bbox"]
    box_area = AREA_OF_BOX * box[2] * box[3]
    return {
        "id": number,
        "image_id": person["image_id"],
        "category_id": person["category_id"],
        "keypoints": keypoints,
        "num_keypoints": _labelled(person),
        "bbox": box,
        "area": box_area if area_of_box else person.get("area", box_area),
        "iscrowd": int(bool(person.get("iscrowd"))),
    }


def _labelled(person: Mapping[str, Any]) -> Any:
    """How many joints are labelled; what the file says decides, as in CrowdPose, also against the visibilities."""
    counted = person.get("num_keypoints")
    return counted if _is_finite_number(counted) else sum(v > 0 for v in (person.get("keypoints") or ())[2::3])


def _are_valid(results: Sequence[Any], known: set[Any], category_id: int, joints: int) -> bool:
    """Whether all records are as `check_results` wants them, which takes a tenth of the time of going through them.

    False also where only going through them can tell.
    """
    if not set(map(type, results)) <= {dict}:
        return False
    try:
        images, categories, keypoints, scores = (
            [record[field] for record in results] for field in ("image_id", "category_id", "keypoints", "score")
        )
        boxes = [record["bbox"] for record in results if "bbox" in record]
        return (
            set(map(type, images)) <= {int, str}
            and known.issuperset(images)
            and set(categories) <= {category_id}
            and set(map(type, chain(keypoints, boxes))) <= {list}
            and set(map(len, keypoints)) <= {3 * joints}
            and set(map(len, boxes)) <= {4}
            and set(map(type, chain(scores, *keypoints, *boxes))) <= {int, float}
            and all(map(math.isfinite, chain(scores, *keypoints, *boxes)))
        )
    except (KeyError, TypeError, OverflowError):
        return False


def _instances_of_oks(data: Mapping[str, Any]) -> dict[str, int]:
    """How many persons AP is taken over, where a num_keypoints of 0 leaves some with labels out, as CrowdPose's do."""
    persons = [each for each in data["annotations"] if not each.get("iscrowd")]
    with_labels = sum(any(v > 0 for v in (each.get("keypoints") or ())[2::3]) for each in persons)
    counted = sum(_labelled(each) > 0 for each in persons)
    return {} if counted == with_labels else {"oks_instances": counted}


def _is_finite_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of an integer that no float can hold
        return False
