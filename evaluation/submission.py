"""`python -m evaluation test --submit`: what the keepers of hidden test sets take.

COCO (test-dev2017) takes person_keypoints_TESTSET_NAME_results.json, zipped: a list of image_id, category_id, keypoints
(x, y, v of 17 joints, pixels from 0) and score. Its page on the format advises tenths of a pixel, and 1 for every v,
which is not read. TESTSET is of the annotation file's name, NAME is that of the folder that is written into.

MPII takes pred_keypoints_mpii.mat by mail. Its `pred` is a struct array with an element for each picture of the test
part, as RELEASE.annolist(RELEASE.img_train == 0) lists them, and pred(i).annorect(r).annopoints.point(k) has x, y,
pixels from 1, and id, the joint from 0 to 15. The evaluator reads the persons of RELEASE.single_person and compares the
lengths of the two lists, so that every test picture must be in the file of images, in that order. Which annorect a box
is of tells its field `annorect` in the boxes' JSON, from 1; without it an image's boxes are its annorects in turn.
Whether more of annolist is read than these fields cannot be known: the test part's evaluation is not public.

CrowdPose publishes the joints of its test part and runs no server that we could find: this is the results list that its
API reads, 14 joints in its order.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from poserelay.datasets.coco import read_detections, read_json
from poserelay.errors import UserError
from poserelay.inference import Poses
from poserelay.keypoints import load_skeleton, match_joints
from poserelay.run import write_atomic
from poserelay.scoring import Truth

Kind = Literal["coco", "mpii", "crowdpose"]
SKELETONS: dict[Kind, str] = {"coco": "coco17", "mpii": "mpii16", "crowdpose": "crowdpose14"}


def check_submission(
    kind: Kind, truth: Truth, boxes: str, box_threshold: float = 0.0, *, single_stage: bool = False
) -> None:
    """Raises UserError where a submission cannot be made: joints that do not fit, or boxes that MPII would miss."""
    _order(kind, truth)
    if kind != "mpii":
        return
    if single_stage:
        raise UserError("submit mpii: MPII tells where each person stands; it takes a top-down model and boxes")
    _annorects(truth, boxes)
    if boxes != "gt" and (left_out := read_detections(boxes, truth.file, box_threshold).skipped):
        raise UserError(
            f"{boxes}: {left_out} of its boxes are of another image or category or scored under box_threshold; "
            "MPII wants a pose for every one, so mend them or lower the threshold"
        )


def write_submission(
    kind: Kind, folder: Path, poses: Poses, results: Sequence[Mapping[str, Any]], truth: Truth, boxes: str
) -> Path:
    """Write the file into `folder` and return its path; what is asked of it, `check_submission` has looked at.

    Args:
        poses: before the OKS-NMS, in the joints of `truth.common`: MPII's, one for each box in their order.
        results: what it leaves of them, likewise: COCO's and CrowdPose's.
    """
    order = _order(kind, truth)
    if kind == "mpii":
        path = folder / "pred_keypoints_mpii.mat"
        data = mpii_mat(poses, truth, _annorects(truth, boxes), order)
        write_atomic(path, lambda temporary: temporary.write_bytes(data))
        return path
    records = [
        {
            "image_id": record["image_id"],
            "category_id": 1,
            "keypoints": _tenths(record["keypoints"], order),
            "score": record["score"],
        }
        for record in results
    ]
    text = json.dumps(records)
    if kind == "crowdpose":
        path = folder / "crowdpose_results.json"
        write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return path
    part = re.sub(r"^(image_info|person_keypoints)_", "", truth.file.path.stem)
    method = re.sub(r"[^A-Za-z0-9-]+", "-", folder.resolve().name).strip("-") or "poserelay"
    path = folder / f"person_keypoints_{part}_{method}_results.zip"
    write_atomic(path, lambda temporary: temporary.write_bytes(_zipped(f"{path.stem}.json", text)))
    return path


def mpii_mat(poses: Poses, truth: Truth, annorects: Sequence[int], order: Sequence[int]) -> bytes:
    """MPII's .mat of `poses`, each of the annorect (from 1) of its image; MPII's joints are `order` of theirs."""
    from scipy.io import savemat  # slow to import

    point = np.dtype([("x", object), ("y", object), ("id", object)])
    rows = {image_id: row for row, image_id in enumerate(truth.file.image_ids)}
    rects: list[dict[int, Any]] = [{} for _ in rows]
    for image_id, rect, places in zip(poses.image_ids, annorects, poses.keypoints[:, order] + 1, strict=True):
        points = np.empty((1, len(order)), dtype=point)
        for joint, (x, y) in enumerate(places.tolist()):
            points[0, joint] = (x, y, float(joint))
        rects[rows[image_id]][rect] = {"point": points}
    pred = np.empty((1, len(rects)), dtype=[("image", object), ("annorect", object)])
    for row, (name, its) in enumerate(zip(truth.file.file_names, rects, strict=True)):
        annorect = np.empty((1, max(its, default=0)), dtype=[("annopoints", object)])
        for rect in range(annorect.shape[1]):
            annorect[0, rect] = (its.get(rect + 1, np.zeros((0, 0))),)
        pred[0, row] = ({"name": name}, annorect if its else np.zeros((0, 0)))
    file = io.BytesIO()
    savemat(file, {"pred": pred}, do_compression=True)
    return file.getvalue()


def _order(kind: Kind, truth: Truth) -> list[int]:
    """For each joint of the test set its place among those that are predicted, by name. Raises UserError."""
    wanted = load_skeleton(SKELETONS[kind]).joints
    order = match_joints(truth.common.joints, wanted)
    missing = [joint for joint, place in zip(wanted, order, strict=True) if place is None]
    if missing:
        raise UserError(
            f"submit {kind}: its {len(wanted)} joints are {SKELETONS[kind]}'s, and the model or "
            f"{truth.file.path.name} lacks {', '.join(missing)}; take a model of these joints"
        )
    return [place for place in order if place is not None]


def _annorects(truth: Truth, boxes: str) -> list[int]:
    """Of each box, in their order, the annorect of its image that it is of, from 1. Raises UserError."""
    if boxes == "gt":
        category = truth.file.category["id"]
        annotations = [record for record in truth.parsed["annotations"] if record["category_id"] == category]
        records = [annotations[row] for row in truth.file.persons]
    else:
        records = read_json(Path(boxes))
    source = truth.file.path if boxes == "gt" else boxes
    seen: dict[Any, set[int]] = {}
    found = []
    for number, record in enumerate(records):
        its = seen.setdefault(record.get("image_id"), set())
        rect = record.get("annorect", len(its) + 1)
        if type(rect) is not int or rect < 1 or rect in its:
            raise UserError(
                f"{source}: box {number}: field annorect: {json.dumps(rect)} is not a number from 1 that its image has "
                "once; give the person's place in RELEASE.annolist(...).annorect"
            )
        its.add(rect)
        found.append(rect)
    return found


def _tenths(keypoints: Sequence[float], order: Sequence[int]) -> list[float]:
    return [number for joint in order for number in (*(round(v, 1) for v in keypoints[3 * joint : 3 * joint + 2]), 1)]


def _zipped(name: str, text: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        # A date of its own: the same poses give the same bytes.
        archive.writestr(zipfile.ZipInfo(name, (2017, 9, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
    return file.getvalue()
