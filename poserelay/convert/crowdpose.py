"""CrowdPose: crowdpose_train.json, val, test and trainval are COCO files already.

Their limbs are COCO's and point outside the 14 joints, which is mended. `crowdIndex` of the images stays: the scores by
crowding (easy, medium, hard) need it.
"""

from __future__ import annotations

from pathlib import Path

from ..datasets.coco import read_json
from ..keypoints import load_skeleton
from . import Conversion, tidy_coco


def read_crowdpose(path: Path) -> Conversion:
    """The persons of the file, with its ids; its boxes without labelled joints stay as well. Raises UserError."""
    found = tidy_coco(path, read_json(path), load_skeleton("crowdpose14"))
    without = sum("crowdIndex" not in image for image in found.images)
    if without:
        found.notes.append(f"{without} pictures have no crowdIndex, which the scores by crowding need")
    return found
