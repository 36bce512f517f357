"""Fields of `python -m finetune cir`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from poserelay.config import (
    AdamConfig,
    DataConfig,
    Decoding,
    File,
    ImageAugmentation,
    LabelsConfig,
    LoopConfig,
    ModelConfig,
    OptionalFile,
    check_ranges,
)


@dataclass(frozen=True)
class CIRLossConfig:
    """What the score map learns, and the two losses."""

    target: Literal["cir", "gaussian", "discrete"] = "cir"
    """Score of a pixel of a person's central area: cir, the OKS of the pose that it predicts (Eq. 2); gaussian, of
    sigma 4 map pixels about the centre, also beyond the area; discrete, 1. Elsewhere it is 0."""
    radius: float = 4.0
    """gamma, of the central area, map pixels."""
    score_weight: float = 1.0
    """Of the score map's loss (Eq. 3) and, where the head has that branch, the quality's."""
    displacement_weight: float = 1.0
    """Of the displacements' loss (Eq. 6)."""

    def __post_init__(self) -> None:
        ranges = {"radius": (0.5, 100), "score_weight": (0, math.inf), "displacement_weight": (0, math.inf)}
        check_ranges(self, ranges, "loss.")


@dataclass(frozen=True)
class CIRConfig(LoopConfig):
    """Train a single-stage pose model (CIR, with its encodings or without) on whole images."""

    model: ModelConfig
    data: DataConfig
    """`validation_boxes` is not used: no boxes are needed."""
    run_dir: File
    """Folder of this run; started again in the same folder it resumes."""
    init_from: OptionalFile = None
    """Hand-off file (export/model.safetensors) whose weights the model starts from; null: its initialisation."""
    freeze_backbone: bool = False
    """Train the head alone, on the backbone as it was handed over, batch norms included."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    """Persons that are not chosen, on images with one who is, count neither as persons nor as background."""
    optim: AdamConfig = field(
        default_factory=lambda: AdamConfig(lr=5e-4, lr_batch=64, batch_size=8, epochs=180, drops=(150, 170))
    )
    """Here images are counted where the fields speak of persons."""
    loss: CIRLossConfig = field(default_factory=CIRLossConfig)
    augmentation: ImageAugmentation = field(default_factory=ImageAugmentation)
    decoding: Decoding = field(default_factory=Decoding)
    validate_every: int = 10
    """Epochs between validations; the last epoch is always validated."""
    export: Literal["last", "best"] = "last"
    """Weights to hand off; best has the highest AP on the validation set, which must not be the reported test set."""

    def __post_init__(self) -> None:
        if self.model.head is None:
            raise ValueError("model.head is null: a single-stage model needs its head; give --model.head '{name: cir}'")
        if self.data.validation_boxes != "gt":
            raise ValueError("data.validation_boxes: a single-stage model needs no boxes; leave it out")
        if self.export == "best" and self.data.validation_annotations is None:
            raise ValueError("export: best needs data.validation_annotations to tell which weights are best")
        if self.labels.drop != "nothing":
            raise ValueError(f"labels.drop is {self.labels.drop}, which only heatmap models are compared by; leave it")
        check_ranges(self, {"validate_every": (1, math.inf)})
        super().__post_init__()
