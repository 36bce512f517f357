"""Metrics of predicted poses: OKS average precision through pycocotools, PCK, and the mean pose as a baseline."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
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

    @property
    def rows(self) -> np.ndarray:
        """Which of `common.persons` have a label that counts, `[P]` bool: `counted.persons`."""
        return np.isin(self.common.persons, self.counted.persons)


def scored_truth(
    annotations: CocoAnnotations,
    skeleton: Skeleton,
    joints: Literal["all", "visible", "invisible"] = "all",
    labelled_joints: int | None = None,
) -> Truth:
    """The joints that `annotations` and `skeleton` share by name, and of their labels those that count.

    `joints`: those annotated visible (v = 2) or hidden (v = 1) alone (CCM, Table 13). `labelled_joints`: of persons
    with exactly so many labelled joints alone (CCM, Table 14), counted as annotated: over all joints of the file, seen
    or hidden. Areas and boxes stay. Persons without a label that counts are left out, and so are their poses
    (`results_that_count`): these would be false positives.

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
        return Truth(annotations, annotations, annotations, columns, protocol)
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
    return Truth(annotations, common, counted, columns, protocol)


def parsed_truth(truth: Truth) -> Mapping[str, Any]:
    """The file's JSON with what counts alone, for `oks_metrics`; as it is where all does.

    Persons that are left out are not in it. `num_keypoints` is counted anew, and stays 0 where the file has 0. A person
    with labels on other joints alone is ignored as pycocotools ignores COCO's unlabelled persons: it is not missed, and
    one pose that lies in its box enlarged threefold, and fits no other person, is no false positive.
    """
    data = read_parsed(truth.file.path)
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
            owner = _mean_distances(joints, keypoints, visibility).argmin(0)
            matched = match_poses(joints, keypoints, visibility)
            owner[matched[matched >= 0]] = np.flatnonzero(matched >= 0)
            kept[its_poses] = counts[its_persons[owner]]
    return [record for record, stays in zip(results, kept, strict=True) if stays]


def pck_of_truth(
    truth: Truth, predicted: np.ndarray, skeleton: Skeleton, threshold: float = 0.2
) -> tuple[dict[str, float], dict[str, Any]]:
    """`pck_of_persons` of the labels that count: `predicted` `[P, J, 2]` is of `truth.counted.persons`.

    The reference length is of the person, so that labels which do not count take part in it.
    """
    lengths, name = pck_reference(truth.common, skeleton)
    return pck_of_persons(truth.counted, predicted, skeleton, threshold, (lengths[truth.rows], name))


def take_joints(results: Sequence[Mapping[str, Any]], columns: Sequence[int]) -> list[dict[str, Any]]:
    """Results, which are valid, with the joints `columns` alone, in that order."""
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
            wrong = next((number for number in numbers if not _is_finite_number(number)), None)
            if wrong is not None:
                raise UserError(f"{where}: {field} holds {wrong!r}, expected finite numbers")


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
        ids = [image["id"] for image, of in zip(data["images"], level, strict=True) if of == number]
        evaluation.params.imgIds = ids
        if ids:  # pycocotools takes an empty list for all images
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation.evaluate()
        metrics[f"AP {name}"] = _summary(evaluation)["AP"] if ids else -1.0
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
) -> tuple[dict[str, float], dict[str, Any]]:
    """`crowdpose_ap` where every image carries a crowdIndex, else `coco_ap`, with what the numbers depend on.

    `crowd_levels`: one of CROWD_LEVELS. Raises UserError as `evaluate_oks`.
    """
    data = read_parsed(annotations)
    details = {"oks_area": oks_area(data), "poses_per_image": POSES_PER_IMAGE}
    if not has_crowd_index(data):
        carrying = sum(_is_finite_number(image.get("crowdIndex")) for image in data["images"])
        if carrying:
            details["crowd_levels"] = f"not scored: crowdIndex on {carrying} of {len(data['images'])} images"
        return coco_ap(data, results, skeleton, source), details
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

    fields = {"image_id", "category_id", "keypoints", "score"}
    if all("bbox" in record for record in results):
        fields.add("bbox")
    poses = [{field: record[field] for field in fields} for record in results]
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth: Any = COCO()  # its stubs know neither keypoints nor results in memory
        ground_truth.dataset = {"images": data["images"], "categories": [category], "annotations": truth}
        ground_truth.createIndex()
        # loadRes looks at the first record to tell what the results are.
        predictions = ground_truth.loadRes(poses) if poses else COCO()
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
    for flat in np.argsort(cost, axis=None, kind="stable"):
        person, pose = np.unravel_index(flat, cost.shape)
        if matched[person] < 0 and not taken[pose] and count[person]:
            matched[person], taken[pose] = pose, True
    return matched


def match_results(annotations: CocoAnnotations, results: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The predicted joints `[P, K, 2]` of each of `annotations.persons`, NaN where none is left for it (`match_poses`).

    `results` are valid (`check_results`), with the joints of the file.
    """
    persons = annotations.persons
    matched = np.full((len(persons), len(annotations.joints), 2), np.nan)
    for its_persons, _, its_poses in _by_image(annotations, results):
        truth = persons[its_persons]
        pose = match_poses(its_poses, annotations.keypoints[truth], annotations.visibility[truth])
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
    of the box for skeletons without a torso; or it is given, as `pck_reference` has it, where labels are left out that
    it is measured by. Metrics: PCK and PCK/<joint>, fractions (NaN where nothing is labelled).
    """
    persons = annotations.persons
    truth, visibility = annotations.keypoints[persons], annotations.visibility[persons]
    lengths, name = reference or pck_reference(annotations, skeleton)
    found = pck(predicted, truth, visibility, lengths, threshold)
    per_joint = zip(annotations.joints, found["per_joint"].tolist(), strict=True)
    metrics = {"PCK": found["PCK"], **{f"PCK/{joint}": value for joint, value in per_joint}}
    return metrics, {"pck_threshold": threshold, "pck_reference": name, "pck_instances": found["persons"]}


def pck_reference(annotations: CocoAnnotations, skeleton: Skeleton) -> tuple[np.ndarray, str]:
    """PCK's reference length `[P]` of `annotations.persons`, image pixels, NaN where it is unknown, and its name."""
    persons = annotations.persons
    if skeleton.torso:
        first, second = match_joints(annotations.joints, skeleton.torso)
        if first is not None and second is not None:
            lengths = torso_reference(annotations.keypoints[persons], annotations.visibility[persons], (first, second))
            return lengths, " to ".join(skeleton.torso)
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
    """For each image with persons: which of `annotations.persons` it shows, which `results`, and their `[M, K, 2]`."""
    rows = {image_id: row for row, image_id in enumerate(annotations.image_ids)}
    image_of_pose = np.array([rows[record["image_id"]] for record in results], dtype=np.int64)
    triples = np.array([record["keypoints"] for record in results], dtype=np.float64)
    triples = triples.reshape(-1, len(annotations.joints), 3)
    image_of_person = annotations.image_index[annotations.persons]
    for image in np.unique(image_of_person):
        its_poses = np.flatnonzero(image_of_pose == image)
        yield np.flatnonzero(image_of_person == image), its_poses, triples[its_poses, :, :2]


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


def _ground_truth(person: Mapping[str, Any], number: int, joints: int, area_of_box: bool) -> dict[str, Any]:
    """A person as pycocotools needs it; it marks a match by the annotation's id, so that id 0 would never match."""
    keypoints = person.get("keypoints") or [0] * (3 * joints)
    box = person["bbox"]
    box_area = AREA_OF_BOX * box[2] * box[3]
    counted = person.get("num_keypoints")
    # num_keypoints of the file decides who is ignored, also where it contradicts the visibilities, as in CrowdPose.
    return {
        "id": number,
        "image_id": person["image_id"],
        "category_id": person["category_id"],
        "keypoints": keypoints,
        "num_keypoints": counted if _is_finite_number(counted) else sum(v > 0 for v in keypoints[2::3]),
        "bbox": box,
        "area": box_area if area_of_box else person.get("area", box_area),
        "iscrowd": int(bool(person.get("iscrowd"))),
    }


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
