"""`python -m evaluation diagnose`: where predicted poses fail, and what each kind of error costs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from poserelay.datasets.coco import read_coco, read_json
from poserelay.errors import UserError
from poserelay.keypoints import Skeleton, resolve_skeleton
from poserelay.oks import soft_nms
from poserelay.run import write_atomic, write_json
from poserelay.scoring import (
    POSES_PER_IMAGE,
    Truth,
    check_results,
    oks_area,
    read_results,
    results_that_count,
    scored_truth,
    sigma_source,
    take_joints,
)

from .calibration import correlation
from .config import DiagnoseConfig
from .error_types import HUMAN, KINDS, MATCHED_FROM, NEAR, Classified, classify, mirror_joints
from .oks_matching import THRESHOLDS, Precision, Scene, extent_areas, precision_of, scene_of
from .score import warn_of_oks, warn_of_repeated, without_nan

BINS = 10
"""Of the calibration."""
OVERLAP = 0.1
"""IoU of two boxes above which their persons crowd each other."""
DECAY = 0.5
"""Of the soft NMS over optimal scores."""
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's, pixels squared; both ends belong to a size, as pycocotools has it."""
SIDES = {
    "below 32": (0.0, 32.0**2),
    "32 to 64": (32.0**2, 64.0**2),
    "64 to 96": (64.0**2, 96.0**2),
    "96 to 128": (96.0**2, 128.0**2),
    "from 128": (128.0**2, 1e10),
}
"""coco-analyze's, by the root of the area."""
CROWDS = {"alone": (0, 0), "1 or 2 others": (1, 2), "3 others or more": (3, math.inf)}
JOINTS_STEP = 5
"""Labelled joints: 1 to 5, 6 to 10, 11 to 15, 16 and 17, as coco-analyze groups COCO's."""


def main(config: DiagnoseConfig) -> dict[str, Any]:
    """Print, write and return `diagnose`'s dict. Raises UserError for a file or record that cannot be used."""
    if config.annotations.endswith(".mat"):
        raise UserError(f"{config.annotations}: diagnose reads COCO JSON; `poserelay convert` makes it of MPII's files")
    data = read_json(Path(config.annotations))
    annotations = read_coco(config.annotations, data)
    skeleton = resolve_skeleton(config.skeleton, annotations.category, config.annotations)
    truth = scored_truth(annotations, skeleton, data=data)
    results: Sequence[Mapping[str, Any]] = read_results(config.predictions)
    joints = len(annotations.joints)
    check_results(results, annotations.image_ids, annotations.category["id"], joints, config.predictions)
    if truth.common is not truth.file:
        results = take_joints(results, truth.columns)
    warn_of_repeated(results, config.predictions)
    warn_of_oks(truth, results, skeleton, config.predictions)
    found = diagnose(truth, results, skeleton)
    if not found["errors"]["pairs"]:
        print(
            f"warning: skeleton {skeleton.name} has no mirror pairs: no joint can be inverted; a file with flip_pairs, "
            "given by --skeleton, names them",
            file=sys.stderr,
        )
    found["protocol"] = {"predictions": Path(config.predictions).name, **found["protocol"]}
    if config.out is not None:
        from .diagnosis_figures import overview  # matplotlib takes a second to import

        out = Path(config.out)
        write_json(out / "diagnosis.json", found)
        figure = overview(found)
        write_atomic(out / "diagnosis.png", lambda path: figure.savefig(path, dpi=130, format="png"))
    print(json.dumps(found) if config.json else format_diagnosis(found))
    return found


def diagnose(truth: Truth, results: Sequence[Mapping[str, Any]], skeleton: Skeleton) -> dict[str, Any]:
    """{"metrics", "protocol", "errors", "gains", "calibration", "background", "by"}, as evaluation/README.md tells.

    `results` are valid and in the joints that are scored. Shares are fractions of the labelled joints of matched
    persons; None stands where there is nothing to measure. The rules of matching and of the kinds are `error_types`'s,
    AP is that of `scoring.oks_metrics`.

    Raises UserError where no person is labelled.
    """
    scene = scene_of(truth, results_that_count(truth, results), skeleton)
    if scene.ignored.all():
        raise UserError(f"{truth.file.path}: holds no person with labelled joints: nothing to diagnose")
    classified = classify(scene, truth, skeleton)
    corrected = corrections(classified)
    observed, gained = gains(scene, corrected, Group(~scene.ignored))
    return {
        "metrics": without_nan(observed.figures),
        "protocol": {
            "split": truth.file.path.stem,
            "poses": len(results),
            "poses_that_take_part": len(scene.poses),
            "instances": int((~scene.ignored).sum()),
            "matched": len(classified.poses),
            "matched_from_oks": MATCHED_FROM,
            "near": NEAR,
            "good_from": HUMAN,
            "crowding": f"box IoU above {OVERLAP}",
            "sigmas": sigma_source(skeleton),
            "oks_area": oks_area(truth.parsed),
            "poses_per_image": POSES_PER_IMAGE,
            **truth.protocol,
        },
        "errors": errors(classified, truth.common.joints, skeleton),
        "gains": gained,
        "calibration": calibration(scene),
        "background": background(scene),
        "by": breakdowns(classified, corrected, len(truth.common.joints)),
    }


def errors(classified: Classified, joints: Sequence[str], skeleton: Skeleton) -> dict[str, Any]:
    """Shares of the kinds, over all joints, of each joint and each mirror pair, and which joints were confused."""
    kinds = classified.kinds
    mirror = mirror_joints(joints, skeleton)
    pairs = [(left, right) for left, right in enumerate(mirror.tolist()) if left < right]
    return {
        "all": shares(kinds),
        "labels": int((kinds >= 0).sum()),
        "joints": {
            joint: {**shares(kinds[:, column]), "labels": int((kinds[:, column] >= 0).sum())}
            for column, joint in enumerate(joints)
        },
        "pairs": {
            f"{joints[left]}, {joints[right]}": {
                **shares(kinds[:, [left, right]]),
                "labels": int((kinds[:, [left, right]] >= 0).sum()),
            }
            for left, right in pairs
        },
        "confused": confusions(classified, joints),
    }


def shares(kinds: np.ndarray) -> dict[str, float | None]:
    """Of each of `KINDS` among kinds of any shape, -1 left out; None where there is none."""
    counts = np.bincount(kinds[kinds >= 0].ravel(), minlength=len(KINDS))
    total = int(counts.sum())
    return {kind: int(count) / total if total else None for kind, count in zip(KINDS, counts, strict=True)}


def confusions(classified: Classified, joints: Sequence[str]) -> list[dict[str, Any]]:
    """How often each joint was put at which, of the own person (inversions) or of another (swaps); most often first."""
    row, column = np.nonzero(classified.confused >= 0)
    own = classified.kinds[row, column] == KINDS.index("inversion")
    triples = np.stack([column, classified.confused[row, column], ~own], axis=1)
    found, counts = np.unique(triples, axis=0, return_counts=True)
    return [
        {
            "predicted": joints[found[place, 0]],
            "at": joints[found[place, 1]],
            "whose": "other" if found[place, 2] else "own",
            "count": int(counts[place]),
        }
        for place in np.argsort(-counts, kind="stable").tolist()
    ]


class Group(NamedTuple):
    """Persons whose AP is of interest: the others are ignored, as are poses of nobody whose area is not within."""

    members: np.ndarray
    """`[N]` bool of a scene's persons, none of which the scene ignores."""
    low: float = 0.0
    """Pixels squared, as is `high`; both belong to the range."""
    high: float = math.inf

    def precision(self, scene: Scene, matched: np.ndarray) -> Precision:
        """Of poses `matched` (`Scene.match`) with the others ignored."""
        return precision_of(scene, matched, ~self.members, self.outside(scene))

    def outside(self, scene: Scene) -> np.ndarray:
        """The poses `[M]` bool whose area is not within."""
        return (scene.pose_areas < self.low) | (scene.pose_areas > self.high)


def corrections(classified: Classified) -> dict[str, Scene]:
    """The scene with each kind of error corrected alone, jitter to swap, and with optimal scores (score)."""
    scene = classified.scene
    corrected = {
        name: scene.moved(classified.corrected(kind)) if (classified.kinds == kind).any() else scene
        for kind, name in enumerate(KINDS)
        if name != "good"
    }
    return {**corrected, "score": scene.rescored(optimal_scores(scene))}


def gains(scene: Scene, corrected: Mapping[str, Scene], group: Group) -> tuple[Precision, dict[str, dict[str, Any]]]:
    """The precision of a group and what its AP, AP50, AP75 and AR gain by correcting each error alone; 0.01 is a point.

    jitter, inversion, miss, swap: the joints of that kind are put where `Classified.corrected` says, in the poses that
    are matched to a person, and all poses are matched anew. score: `optimal_scores`. background_fp: poses that match
    nobody are no false positives at the thresholds at which they are matched to nobody. background_fn: persons whom
    nobody matches need not be found at the thresholds at which nobody does. The last two are of OKS 0.1 (`unmatched`),
    whereas coco-analyze takes all that is unmatched at each threshold, which counts jittered poses too.
    """
    others = ~group.members
    matched = scene.match(THRESHOLDS, others)
    observed = group.precision(scene, matched)
    after = {
        name: observed if better is scene else group.precision(better, better.match(THRESHOLDS, others))
        for name, better in corrected.items()
    }
    alone, unfound = unmatched(scene)
    after["background_fp"] = precision_of(scene, matched, others, group.outside(scene) | alone)
    found_at = np.zeros((len(THRESHOLDS), len(others) + 1), dtype=bool)
    np.put_along_axis(found_at, matched, True, axis=1)  # -1 is the last column
    after["background_fn"] = precision_of(scene, matched, others | (unfound & ~found_at[:, :-1]), group.outside(scene))
    before = observed.figures
    return observed, {
        name: without_nan({figure: value - before[figure] for figure, value in its.figures.items()})
        for name, its in after.items()
    }


def optimal_scores(scene: Scene) -> np.ndarray:
    """coco-analyze's `[M]`: the greatest OKS of each pose with any person that counts, then soft NMS.

    The latter lets exp(-OKS^2 / 0.5) of the two decay the score of a pose beside a better one of the same person, which
    would else be a false positive of high score.
    """
    best = scene.best_oks(~scene.ignored)
    order, decayed = soft_nms(
        torch.from_numpy(scene.poses),
        torch.from_numpy(best),
        torch.from_numpy(extent_areas(scene.poses)),
        scene.sigmas.tolist(),
        DECAY,
        POSES_PER_IMAGE,
        image_index=torch.from_numpy(scene.pose_image),
    )
    scores = np.zeros(len(best))
    scores[order.numpy()] = decayed.numpy()
    return scores


def unmatched(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Poses `[M]` bool that match nobody from OKS 0.1 on, and persons `[N]` bool that count and are not matched."""
    matched = scene.match(np.array([MATCHED_FROM]))[0]
    persons = ~scene.ignored
    persons[matched[matched >= 0]] = False
    return matched < 0, persons


def background(scene: Scene) -> dict[str, int]:
    """Poses of nobody and persons without a pose, at OKS 0.1.

    Of the false positives, `duplicates` have an OKS of 0.1 or more with a person whom a better-scored pose took. Poses
    that are matched to a crowd or to an unlabelled person are no false positives.
    """
    alone, unfound = unmatched(scene)
    near = scene.best_oks(np.ones(len(scene.ignored), dtype=bool)) >= MATCHED_FROM
    return {
        "false_positives": int(alone.sum()),
        "duplicates": int((alone & near).sum()),
        "false_negatives": int(unfound.sum()),
    }


def calibration(scene: Scene) -> dict[str, Any]:
    """Ten bins of score with their mean score and mean OKS, expected calibration error, Spearman's coefficient.

    The OKS of a pose is the greatest with any person that counts. The bins are equally wide, from 0 to 1, or, where
    scores are no fractions, from the least to the greatest; there the error is None. It is the mean of
    |mean score - mean OKS| over the poses.
    """
    scores, oks = scene.scores, scene.best_oks(~scene.ignored)
    fractions = bool(((scores >= 0) & (scores <= 1)).all())
    low, high = (0.0, 1.0) if fractions else (float(scores.min()), float(scores.max()))
    edges = low + (high - low) * np.arange(BINS + 1) / BINS  # 3 / 10 is 0.3, 3 * 0.1 is not
    bin_of = np.searchsorted(edges, scores, side="right").clip(1, BINS) - 1
    bins, error = [], 0.0
    for place in range(BINS):
        its = bin_of == place
        count = int(its.sum())
        score, true = (float(values[its].mean()) if count else None for values in (scores, oks))
        if score is not None and true is not None:
            error += count * abs(score - true) / len(scores)
        ends = {"low": float(edges[place]), "high": float(edges[place + 1])}
        bins.append({**ends, "poses": count, "score": score, "oks": true})
    return {
        "bins": bins,
        "error": error if fractions and len(scores) else None,
        "spearman": correlation(scores, oks)["spearman"],
    }


def breakdowns(classified: Classified, corrected: Mapping[str, Scene], joints: int) -> dict[str, list[dict[str, Any]]]:
    """By size, side, crowding and labelled joints, and the grid of the last two: persons, found ones, AP, shares.

    The AP of some persons ignores the others: a pose that is matched to one of those does not count, but the poses of
    nobody are false positives of every group, as coco-analyze has it; except of size and side, where those outside the
    range do not count, as of pycocotools' APm and APl. Size, crowding and labelled joints have `gains` of AP, too.
    """
    scene = classified.scene
    crowding, labelled = others_around(scene), scene.labelled.sum(1)
    limits = [(low, min(low + JOINTS_STEP - 1, joints)) for low in range(1, joints + 1, JOINTS_STEP)]
    counts = {str(low) if low == high else f"{low} to {high}": (low, high) for low, high in limits}

    def within(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
        return ~scene.ignored & (values >= limits[0]) & (values <= limits[1])

    def whole(groups: Mapping[str, Group]) -> list[dict[str, Any]]:
        rows = []
        for name, group in groups.items():
            observed, gained = gains(scene, corrected, group)
            ap = {error: its["AP"] for error, its in gained.items()}
            rows.append({"name": name, **of_group(classified, group, observed), "gains": ap})
        return rows

    def short(group: Group) -> dict[str, Any]:
        return of_group(classified, group, group.precision(scene, scene.match(THRESHOLDS, ~group.members)))

    def of_areas(ranges: Mapping[str, tuple[float, float]]) -> dict[str, Group]:
        return {name: Group(within(scene.areas, its), *its) for name, its in ranges.items()}

    return {
        "size": whole(of_areas(SIZES)),
        "side": [{"name": name, **short(group)} for name, group in of_areas(SIDES).items()],
        "crowding": whole({name: Group(within(crowding, its)) for name, its in CROWDS.items()}),
        "visible_joints": whole({name: Group(within(labelled, its)) for name, its in counts.items()}),
        "grid": [
            {
                "crowding": crowd,
                "visible_joints": count,
                **short(Group(within(crowding, its) & within(labelled, those))),
            }
            for crowd, its in CROWDS.items()
            for count, those in counts.items()
        ],
    }


def of_group(classified: Classified, group: Group, precision: Precision) -> dict[str, Any]:
    """How many persons a group has, how many of them are matched, its AP and AR, shares of the kinds, labels."""
    its = group.members[classified.persons]
    kinds = classified.kinds[its]
    figures = precision.figures
    return {
        "persons": int(group.members.sum()),
        "found": int(its.sum()),
        **without_nan({name: figures[name] for name in ("AP", "AR")}),
        **shares(kinds),
        "labels": int((kinds >= 0).sum()),
    }


def others_around(scene: Scene) -> np.ndarray:
    """How many other persons' boxes overlap each person's by an IoU above 0.1 `[N]`; unlabelled ones count, crowds do
    not."""
    first = np.searchsorted(scene.person_image, scene.person_image)
    count = np.searchsorted(scene.person_image, scene.person_image, side="right") - first
    low, high = scene.boxes[:, :2], scene.boxes[:, :2] + scene.boxes[:, 2:]
    area = scene.boxes[:, 2] * scene.boxes[:, 3]
    around = np.zeros(len(first), dtype=np.int64)
    # The first persons of all images at once, then the second ones.
    for place in range(count.max(initial=0)):
        rows = np.flatnonzero((count > place) & (first + place != np.arange(len(first))))
        other = first[rows] + place
        sides = (np.minimum(high[rows], high[other]) - np.maximum(low[rows], low[other])).clip(min=0)
        common = sides[:, 0] * sides[:, 1]
        # Not divided: the boxes of unlabelled persons may be empty.
        around[rows] += (common > OVERLAP * (area[rows] + area[other] - common)) & ~scene.crowd[other]
    return around


def format_diagnosis(found: Mapping[str, Any]) -> str:
    """About forty lines."""
    protocol, errors_, background_ = found["protocol"], found["errors"], found["background"]
    figures = ", ".join(f"{name} {_fraction(value)}" for name, value in found["metrics"].items())
    lines = [
        f"{figures}",
        f"{protocol['matched']} of {protocol['instances']} persons found (OKS from {MATCHED_FROM}); "
        f"{protocol['poses_that_take_part']} poses, {background_['false_positives']} of nobody, "
        f"{background_['duplicates']} of these beside a better-scored one",
        "",
        "share of labelled joints of the persons found, %",
        _row("", KINDS, "labels"),
        _row("all joints", [_percent(errors_["all"][kind]) for kind in KINDS], errors_["labels"]),
    ]
    paired = {joint for pair in errors_["pairs"] for joint in pair.split(", ")}
    single = {joint: its for joint, its in errors_["joints"].items() if joint not in paired}
    for name, its in (single | errors_["pairs"]).items():
        # What has no mirror image is never inverted.
        cells = ["-" if kind == "inversion" and name in single else _percent(its[kind]) for kind in KINDS]
        lines.append(_row(name, cells, its["labels"]))
    if errors_["confused"]:
        whose = {"own": "", "other": "another person's "}
        most = [
            f"{its['predicted']} at {whose[its['whose']]}{its['at']} ({its['count']})"
            for its in errors_["confused"][:4]
        ]
        lines.append(f"confused most often: {', '.join(most)}")
    lines += ["", "AP gained by correcting each alone (0.01 is a point)"]
    lines += [f"{name.replace('_', ' '):<16}{_signed(its['AP'])}" for name, its in found["gains"].items()]
    its = found["calibration"]
    lines += [
        "",
        f"score against OKS: calibration error {_fraction(its['error'])}, Spearman {_signed(its['spearman'])}",
    ]
    titles = {"size": "size", "crowding": "boxes around (IoU above 0.1)", "visible_joints": "labelled joints"}
    for key, title in titles.items():
        lines += [
            "",
            f"{title:<28}{'persons':>8}{'found':>8}{'AP':>8}{'AR':>8}" + "".join(f"{kind:>11}" for kind in KINDS),
        ]
        for its in found["by"][key]:
            aps = "".join(f"{_fraction(its[name]):>8}" for name in ("AP", "AR"))
            cells = "".join(f"{_percent(its[kind]):>11}" for kind in KINDS)
            lines.append(f"{its['name']:<28}{its['persons']:>8}{its['found']:>8}{aps}{cells}")
    listed = {name: " and ".join(map(str, v)) if isinstance(v, list) else v for name, v in protocol.items()}
    return "\n".join([*lines, "", f"({', '.join(f'{name} {value}' for name, value in listed.items())})"])


def _row(name: str, cells: Sequence[str], last: object) -> str:
    return f"{name:<32}" + "".join(f"{cell:>11}" for cell in cells) + f"{last:>9}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"
