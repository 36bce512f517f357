"""PCKh, MPII's metric: the share of joints predicted within a part of the head's size."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .datasets.coco import SC_BIAS, CocoAnnotations
from .errors import UserError
from .scoring import pck, pck_auc

NOT_COUNTED = ("pelvis", "thorax")
"""Joints that the total leaves out."""
GROUPS = {
    "Head": ("head_top",),
    "Shoulder": ("left_shoulder", "right_shoulder"),
    "Elbow": ("left_elbow", "right_elbow"),
    "Wrist": ("left_wrist", "right_wrist"),
    "Hip": ("left_hip", "right_hip"),
    "Knee": ("left_knee", "right_knee"),
    "Ankle": ("left_ankle", "right_ankle"),
}
NAMES_IN_MAT = {
    "rank": "right_ankle",
    "rkne": "right_knee",
    "rhip": "right_hip",
    "lhip": "left_hip",
    "lkne": "left_knee",
    "lank": "left_ankle",
    "pelv": "pelvis",
    "thor": "thorax",
    "neck": "upper_neck",
    "head": "head_top",
    "rwri": "right_wrist",
    "relb": "right_elbow",
    "rsho": "right_shoulder",
    "lsho": "left_shoulder",
    "lelb": "left_elbow",
    "lwri": "left_wrist",
}
"""Joints of gt_valid.mat in our names."""


@dataclass(frozen=True)
class MpiiPoses:
    """Truth and predictions of N persons, from MPII's .mat files: `gt_valid.mat` and the `pred.mat` of HRNet's code."""

    joints: tuple[str, ...]
    predicted: np.ndarray
    """`[N, K, 2]` float64, pixels of the picture, counted from 1 in both files."""
    truth: np.ndarray
    """`[N, K, 2]` float64, likewise."""
    visibility: np.ndarray
    """`[N, K]` bool: labelled."""
    head_sizes: np.ndarray
    """`[N]` float64, 0.6 of the head box's diagonal."""


def pckh(
    predicted: np.ndarray, truth: np.ndarray, visibility: np.ndarray, head_sizes: np.ndarray, joints: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """PCKh@0.5, PCKh@0.1 and the AUC as fractions, PCKh also per group of joints, with their protocol.

    A joint is correct at a distance of at most the threshold times `head_sizes` `[N]`, which is 0.6 of the head box's
    diagonal; persons with NaN or 0 there are left out and counted. The total is taken over all labelled joints but
    pelvis and thorax, so that joints weigh by their number; a group is the plain mean of its two sides, NaN where one
    is never labelled. PCKh@0.11 is what HRNet's and SimpleBaseline's tables call Mean@0.1. PCKh AUC is the area under
    the total's curve, thresholds from 0 to 0.5 (`scoring.pck_auc`).

    predicted, truth: `[N, K, 2]` pixels of one frame, a NaN prediction is a miss; visibility: `[N, K]`, labelled
    where > 0; joints: their K names, MPII's as in the skeleton mpii16.
    """
    counted = np.array([joint not in NOT_COUNTED for joint in joints])
    rows_of = {name: [row for row, joint in enumerate(joints) if joint in members] for name, members in GROUPS.items()}
    groups = {name: rows for name, rows in rows_of.items() if rows}
    metrics, of_groups = {}, {}
    for threshold in (0.5, 0.1, 0.11):
        found = pck(predicted, truth, (np.asarray(visibility) > 0) & counted, head_sizes, threshold)
        metrics[f"PCKh@{threshold}"] = found["PCK"]
        if threshold != 0.11:
            for name, rows in groups.items():
                of_groups[f"PCKh@{threshold}/{name}"] = float(np.mean(found["per_joint"][rows]))
    metrics["PCKh AUC"] = pck_auc(predicted, truth, (np.asarray(visibility) > 0) & counted, head_sizes)
    without = int((~(np.nan_to_num(head_sizes) > 0)).sum())
    details = {
        "pckh_reference": f"{SC_BIAS} of the head box's diagonal",
        "pckh_total_without": " and ".join(NOT_COUNTED),
        "pckh_instances": found["persons"],
        "without_head_size": without,
    }
    return {**metrics, **of_groups}, details


def pckh_of_persons(annotations: CocoAnnotations, predicted: np.ndarray) -> tuple[dict[str, float], dict[str, Any]]:
    """`pckh` of `predicted` `[P, K, 2]` for `annotations.persons`, joints in the file's order.

    Raises UserError where no person has a head size.
    """
    persons = annotations.persons
    sizes = head_sizes(annotations)
    truth, visibility = annotations.keypoints[persons], annotations.visibility[persons]
    return pckh(predicted, truth, visibility, sizes, annotations.joints)


def head_sizes(annotations: CocoAnnotations) -> np.ndarray:
    """The head sizes `[P]` of `annotations.persons`, NaN where absent. Raises UserError where all are."""
    sizes = annotations.head_sizes[annotations.persons]
    if np.isnan(sizes).all():
        raise UserError(
            f"{annotations.path}: no person has a head_box or a head_size, which PCKh measures by; take a file that "
            "`python -m poserelay convert` made of MPII, or another metric"
        )
    return sizes


def read_mpii(annotations: str | os.PathLike[str], predictions: str | os.PathLike[str]) -> MpiiPoses:
    """Read `gt_valid.mat` (dataset_joints, jnt_missing, pos_gt_src, headboxes_src) and `pred.mat` (preds).

    Raises UserError naming the file and the field: unreadable, absent, or not of the other file's persons and joints.
    """
    truth = _read_mat(annotations, ("dataset_joints", "jnt_missing", "pos_gt_src", "headboxes_src"))
    preds = _read_mat(predictions, ("preds",))["preds"]
    names = [str(np.squeeze(name)) for name in truth["dataset_joints"].ravel()]
    unknown = [name for name in names if name not in NAMES_IN_MAT]
    if unknown:
        raise UserError(
            f"{annotations}: field dataset_joints: {', '.join(unknown)} is not a joint of MPII; "
            f"its 16 are {', '.join(NAMES_IN_MAT)}"
        )
    joints, persons = len(names), truth["pos_gt_src"].shape[-1]
    shapes = {"pos_gt_src": (joints, 2, persons), "jnt_missing": (joints, persons), "headboxes_src": (2, 2, persons)}
    for field, shape in shapes.items():
        _check_numbers(annotations, field, truth[field], shape)
    preds = preds[..., :2] if preds.ndim == 3 and preds.shape[-1] == 3 else preds
    _check_numbers(predictions, "preds", preds, (persons, joints, 2), f", as {Path(annotations).name} has")
    corners = truth["headboxes_src"].astype(np.float64)
    return MpiiPoses(
        joints=tuple(NAMES_IN_MAT[name] for name in names),
        predicted=preds.astype(np.float64),
        truth=np.moveaxis(truth["pos_gt_src"].astype(np.float64), -1, 0),
        visibility=truth["jnt_missing"].T == 0,
        head_sizes=SC_BIAS * np.linalg.norm(corners[1] - corners[0], axis=0),
    )


def _read_mat(path: str | os.PathLike[str], fields: Sequence[str]) -> dict[str, np.ndarray]:
    from scipy.io import loadmat  # of this one command, and slow to import

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        found = loadmat(io.BytesIO(data))
    except NotImplementedError:
        raise UserError(f"{path}: a MATLAB 7.3 file; save it again with save(..., '-v7')") from None
    except Exception as error:  # scipy raises all sorts on a file that is cut short
        raise UserError(f"{path}: not a MATLAB file ({error}); it may be cut short") from None
    missing = [field for field in fields if field not in found]
    if missing:
        names = ", ".join(name for name in found if not name.startswith("__")) or "nothing"
        raise UserError(
            f"{path}: has no {', '.join(missing)}, found {names}; PCKh needs MPII's gt_valid.mat as annotations and a "
            "pred.mat with preds"
        )
    return found


def _check_numbers(
    path: str | os.PathLike[str], field: str, values: np.ndarray, shape: tuple[int, ...], why: str = ""
) -> None:
    if values.dtype.kind not in "iufb" or values.shape != shape:
        expected = " x ".join(map(str, shape))
        raise UserError(
            f"{path}: field {field}: {' x '.join(map(str, values.shape))} of {values.dtype}, "
            f"expected {expected} numbers{why}"
        )
