"""Configuration shared by the stages: the model's dataclasses and the one command-line parser. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Named:
    """A constructor chosen by name, with its keyword arguments."""

    name: str
    """Key of the literal dict of constructors (BACKBONES, HEADS)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments, checked against the constructor's signature."""


@dataclass(frozen=True)
class InputConfig:
    """What the network sees."""

    height: int = 256
    """Input pixels."""
    width: int = 192
    """Input pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per channel, of intensities in 0..1, in the order of `color`."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per channel, of intensities in 0..1, in the order of `color`."""
    color: Literal["rgb", "bgr"] = "rgb"
    """Channel order the weights expect (the published SimpleBaseline weights are bgr)."""
    alignment: Literal["hrnet", "udp"] = "hrnet"
    """How pixels of image, input and heatmap line up: hrnet divides by the stride, udp aligns the corner pixels."""

    def __post_init__(self) -> None:
        if not all(0 <= value <= 1 for value in self.mean) or not all(0 < value <= 1 for value in self.std):
            raise ValueError(
                f"model.input: mean {list(self.mean)} and std {list(self.std)} are of intensities in 0..1, std above 0"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that rebuilds a model; stored in the hand-off file."""

    backbone: Named
    head: Named | None = None
    refiner: Named | None = None
    skeleton: str = "auto"
    """Packaged name, path of a YAML file, or auto: derived from the annotation file's categories."""
    input: InputConfig = field(default_factory=InputConfig)


@dataclass(frozen=True)
class Decoding:
    """From heatmaps to scored poses."""

    refine: Literal["none", "quarter", "parabola", "paraboloid"] = "quarter"
    """Sub-pixel rule after the argmax."""
    blur: float = 0.0
    """Sigma of the Gaussian filter before the argmax, heatmap pixels; 0 is off."""
    flip: bool = True
    """Average with the heatmaps of the mirrored crop."""
    flip_shift: float | None = None
    """Shift of the mirrored heatmaps, heatmap pixels; null: the exact alignment (1 - 1/stride, or 0 for udp)."""
    rescore_threshold: float = 0.2
    """A pose's score is its box score times the mean of the joint scores above this."""
    nms_threshold: float = 0.9
    """OKS above which the lower-scored pose of an image is dropped."""

    def __post_init__(self) -> None:
        check_ranges(self, {"blur": (0, 100), "rescore_threshold": (0, math.inf), "nms_threshold": (0, 1)}, "decoding.")
        if self.flip_shift is not None:
            check_ranges(self, {"flip_shift": (0, 1)}, "decoding.")


@dataclass(frozen=True)
class Augmentation:
    """Geometric augmentation of a top-down crop, with the draws and clips of HRNet."""

    rotation: float = 40.0
    """Standard deviation of the angle in degrees, clipped at twice this."""
    scale: float = 0.3
    """Standard deviation of the scale around 1, clipped at 1 - scale and 1 + scale."""
    rotation_probability: float = 0.6
    """Share of the crops that are rotated at all."""
    flip_probability: float = 0.5
    """Share of the crops that are mirrored."""
    half_body_probability: float = 0.0
    """Share of the crops cut to the upper or the lower body (0.3 for HRNet on COCO)."""
    half_body_min_joints: int = 8
    """Half-body crops are drawn only for persons with more labelled joints than this."""

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("rotation_probability", "flip_probability", "half_body_probability"), (0.0, 1.0))
        check_ranges(
            self,
            {"rotation": (0, 180), "scale": (0, 0.95), "half_body_min_joints": (0, math.inf), **shares},
            "augmentation.",
        )


def check_ranges(owner: Any, ranges: Mapping[str, tuple[float, float]], prefix: str = "") -> None:
    """Raise ValueError naming the first field of `owner` that lies outside its range (low, high), both included."""
    for name, (low, high) in ranges.items():
        value = getattr(owner, name)
        if not low <= value <= high:
            upper = f" and at most {high:g}" if math.isfinite(high) else ""
            raise ValueError(f"{prefix}{name} is {value}, expected at least {low:g}{upper}")


def check_loop_fields(config: Any) -> None:
    """The ranges of the fields that every training stage has. Raises ValueError naming the field."""
    check_ranges(
        config,
        {
            "save_every": (1, math.inf),
            "log_every": (1, math.inf),
            "workers": (0, math.inf),
            "threads": (0, math.inf),
            "seed": (0, 2**63 - 1),
            "max_unreadable": (0, 1),
        },
    )


@dataclass(frozen=True)
class LabelsConfig:
    """Which part of the annotated images is used as labelled."""

    ratio: float | None = None
    """Share of the images in 0..1; a smaller share is contained in every larger one of the same seed."""
    count: int | None = None
    """Number of images, instead of a share."""
    seed: int = 0
    """Seed of the choice, apart from the run's own seed."""

    def __post_init__(self) -> None:
        if self.ratio is not None and self.count is not None:
            raise ValueError("labels: give ratio or count, not both")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"labels.ratio is {self.ratio}, expected a share above 0 and at most 1")
        if self.count is not None and self.count < 1:
            raise ValueError(f"labels.count is {self.count}, expected at least 1")


@dataclass(frozen=True)
class InspectConfig:
    """Print a model's parameters, multiply-accumulates and output size."""

    model: ModelConfig
    """The `model:` block of any recipe; the rest of the file is not read."""
    json: bool = False
    """Print one JSON object instead of text."""
