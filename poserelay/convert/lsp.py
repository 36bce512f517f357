"""Leeds Sports Pose and its Extended training set: joints.mat and pictures of one person each.

LSP is 3 x 14 x 2000, pictures im0001.jpg on; Extended is 14 x 3 x 10000, pictures im00001.jpg on. Both count pixels
from 1. Beside x and y each joint has "a binary value specifying joint visibility"; the READMEs say no more, and the two
mean opposite things by it: in LSP 0 is visible and 1 hidden, every joint having a place; in Extended 1 is labelled, and
a joint that is 0 has no place. (Convolutional Pose Machines turns LSP's values around and leaves Extended's.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from . import LOST, Conversion, Pictures, box_problem, joints_box, person, place_pictures, read_mat, require_pictures

JOINTS = 14
MARGIN = 0.1
"""Of the longer side of the joints' extent, added on each side: feet, hands and hair lie beyond the joints."""


def read_lsp(path: Path, pictures: Pictures | None, split: str = "all") -> Conversion:
    """One person per picture; both ids are the picture's number. Boxes are derived from the labelled joints.

    Args:
        pictures: they are needed, because the file does not give their sizes.
        split: all, train or test: of LSP, train is the first half and test the second (1,000 each); all of Extended is
            for training.

    Raises:
        UserError: not such a file, a labelled joint that is not finite, or the test part of Extended.
    """
    pictures = require_pictures(pictures, path)
    (joints,) = read_mat(path, "joints")
    if joints.dtype.kind not in "iuf" or joints.ndim != 3 or joints.shape[:2] not in ((3, JOINTS), (JOINTS, 3)):
        raise UserError(
            f"{path}: joints is {' x '.join(map(str, joints.shape))}, expected 3 x 14 x N (LSP) or 14 x 3 x N "
            "(Extended); give the dataset's own joints.mat"
        )
    extended = joints.shape[0] == JOINTS
    joints = joints.astype(np.float64).transpose(2, 0, 1) if extended else joints.astype(np.float64).transpose(2, 1, 0)
    if not np.isin(joints[..., 2], (0, 1)).all():
        raise UserError(f"{path}: the visibility of a joint is neither 0 nor 1; give the dataset's own joints.mat")
    if extended and split == "test":
        raise UserError(f"--split test: {path} is LSP Extended, which is all for training; leave it out")
    visibility = 2 * joints[..., 2] if extended else 2 - joints[..., 2]
    half = len(joints) // 2
    first, last = {
        "all": (0, len(joints)),
        "train": (0, len(joints) if extended else half),
        "test": (half, len(joints)),
    }[split]
    names = {number: f"im{number:0{5 if extended else 4}d}.jpg" for number in range(first + 1, last + 1)}

    found = Conversion()
    ids = place_pictures(found, list(names.values()), pictures, first + 1)
    sizes = {image["id"]: (image["width"], image["height"]) for image in found.images}
    for number, name in names.items():
        if name not in ids:
            found.drop(f"persons {LOST}", name)
            continue
        places, labels = joints[number - 1, :, :2] - 1, visibility[number - 1]
        labelled = places[labels > 0]
        if not np.isfinite(labelled).all():
            raise UserError(
                f"{path}: joints of picture {number} ({name}): NaN or infinity; give the dataset's own file"
            )
        if len(labelled) < 2 or not np.ptp(labelled, axis=0).any():
            found.drop("persons without two labelled joints, which have no box", name)
            continue
        triples = np.column_stack([places, labels]).tolist()
        margin = MARGIN * float(np.ptp(labelled, axis=0).max())
        record = person(number, number, joints_box(labelled, margin), triples)
        if problem := box_problem(record, sizes[number]):
            found.drop(f"persons {problem}", name)
            continue
        found.annotations.append(record)
    return found
