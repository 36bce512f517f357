"""Fields of `python -m finetune pseudo-labels`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from poserelay.config import Decoding, File, OptionalFile, check_ranges


def parabola() -> Decoding:
    """CCM's sub-pixel rule, with the flip test."""
    return Decoding(refine="parabola")


@dataclass(frozen=True)
class PseudoLabelsConfig:
    """Label the persons of unlabelled pictures by the mean heatmaps of trained models (CCM, section 4.2)."""

    checkpoints: list[File]
    """Hand-off files (export/model.safetensors) of pose models with the same joints and crop, one or several."""
    images: File
    """Folder of the pictures."""
    boxes: File
    """COCO detections JSON of the persons in them, as `poserelay detect` writes it."""
    out: File
    """COCO-keypoint JSON to write, for `pseudo_labelled.annotations` of `finetune`; written at the end, so that an
    interrupted command leaves nothing and begins anew."""
    annotations: OptionalFile = None
    """COCO JSON whose `images` list names the pictures that `boxes` are on; null: NAME.images.json beside `boxes`
    NAME.json, as `poserelay detect` writes it for a folder."""
    box_threshold: float | None = None
    """Detections scored below this are left out; give it or `match`. CCM's was 0.9924 on COCO's unlabeled2017."""
    match: OptionalFile = None
    """Labelled COCO-keypoint JSON, for a threshold with as many detections per picture as it has persons (with a
    labelled joint, no crowd) per picture of its `images` list; pictures without a person count on both sides."""
    joint_threshold: float = 0.9
    """Joints with a confidence, the height of the peak of the mean heatmap, above this are labelled visible; the others
    are unlabelled (0, 0, 0), not background, and a person without any is left out."""
    decoding: Decoding = field(default_factory=parabola)
    """`decoding.nms` removes all but the best of the poses that several boxes of a person give, after `joint_threshold`
    has."""
    max_unreadable: float = 0.01
    """Share of the pictures with a person that may be unreadable, and left unlabelled, before the command stops."""
    batch_size: int = 64
    """Crops per forward pass."""
    workers: int = 2
    """Data processes; the labels do not depend on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        if (self.box_threshold is None) == (self.match is None):
            raise ValueError("give either box_threshold or match: both choose which detections are persons")
        if not self.checkpoints:
            raise ValueError("checkpoints is empty, expected at least one hand-off file")
        if not self.out.endswith(".json"):
            raise ValueError(f"out is {self.out!r}, expected a name that ends in .json")
        if self.decoding.nms == "soft":
            raise ValueError("decoding.nms is soft, which keeps every duplicate; choose hard or fuse")
        shares = dict.fromkeys(("joint_threshold", "max_unreadable"), (0.0, 1.0))
        check_ranges(self, {**shares, "batch_size": (1, math.inf), "workers": (0, math.inf), "threads": (0, math.inf)})
        if self.box_threshold is not None:
            check_ranges(self, {"box_threshold": (0, 1)})
