"""Fields of `python -m semi`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from poserelay.config import (
    AdamConfig,
    Augmentation,
    Boxes,
    DataConfig,
    Decoding,
    File,
    LabelsConfig,
    LoopConfig,
    ModelConfig,
    Named,
    OptionalFile,
    check_ranges,
)

# Teachers that a trained model is (`teacher_from`), and those that are networks in training.
TRAINED = ("pseudo", "distill")
TRAINING = ("consistency", "dual", "mean")


@dataclass(frozen=True)
class UnlabelledConfig:
    """Persons whose joints are not used."""

    annotations: OptionalFile = None
    """COCO JSON with the pictures and the persons' boxes; null: those persons of `data.annotations` that `labels`
    leaves unlabelled. With detections a list of `images` is enough."""
    images: OptionalFile = None
    """Folder of these pictures; null: the same as `data.images`."""
    boxes: Boxes = "gt"
    """gt: the annotated boxes; or a COCO detections JSON (`poserelay detect` writes one)."""
    box_threshold: float = 0.0
    """Detections below this score are left out."""
    keep_labelled: bool = False
    """Without `annotations`: use the labelled persons without their labels as well, as Semi_Human_Pose does; ICON and
    MSCL leave them out."""

    def __post_init__(self) -> None:
        if self.images and not self.annotations:
            raise ValueError("unlabelled.images is given without unlabelled.annotations; give both or neither")
        if self.annotations and self.keep_labelled:
            raise ValueError(
                "unlabelled.keep_labelled is for the persons of data.annotations; drop it or `annotations`"
            )


@dataclass(frozen=True)
class OptimConfig(AdamConfig):
    """Adam without weight decay, as HRNet, SimpleBaseline and Semi_Human_Pose train."""

    unlabelled_batch_size: int = 32
    """Unlabelled persons per process and step, beside `batch_size` labelled ones."""
    epoch_of: Literal["labelled", "unlabelled"] = "unlabelled"
    """Whose number of persons makes an epoch; without a teacher it is the labelled one's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"unlabelled_batch_size": (1, math.inf)}, "optim.")


@dataclass(frozen=True)
class HardViews:
    """What makes the hard view of an unlabelled crop out of the easy one, for teachers in training (ESCP)."""

    rotation: float = 30.0
    """Standard deviation of the further angle in degrees, clipped at twice this."""
    rotation_probability: float = 0.8
    """Share of the crops that are turned further."""
    scale: float = 0.25
    """Standard deviation of the further scale around 1, clipped at 1 - scale and 1 + scale."""
    cutout_joints: int = 5
    """Joints, drawn with replacement, about whose predicted places a square is blacked out; 0 is off."""
    rand_augment: int = 0
    """Colour operations of RandAugment per crop; 0 is off, 2 in the paper's RandAug rows."""
    magnitude: int = 20
    """Of these operations, 0 to 30."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "rotation": (0, 180),
                "rotation_probability": (0, 1),
                "scale": (0, 0.95),
                "cutout_joints": (0, math.inf),
                "rand_augment": (0, math.inf),
                "magnitude": (0, 30),
            },
            "hard.",
        )


@dataclass(frozen=True)
class IconConfig:
    """Inter-image contrastive consistency (ICON, Eq. 1-5)."""

    lambda_p: float = 0.0
    """Weight of the contrast beside the heatmap losses (Eq. 5 and 7): 1 in the paper; 0 trains without ICON."""
    lambda_1: float = 0.3
    """Weight of SKCC, the single joints (Eq. 1)."""
    lambda_2: float = 0.7
    """Weight of PRCC, the skeleton's `prcc_pairs` (Eq. 4)."""
    tau: float = 0.07
    """Temperature."""
    channels: int = 256
    """m, of the embeddings."""
    sampler: Literal["all", "random", "hard"] = "hard"
    """Which joints are queried, and which are their negatives."""
    contrast: Literal["inter", "intra"] = "inter"
    """Positives from other persons, or only the joint itself against its own person's others (Table 5)."""
    negatives: Literal["all", "others"] = "all"
    """Negatives from all persons, the query's own included, or from the others only."""
    gamma: float = 0.75
    """An unlabelled joint takes part only where the teacher's confidence is above this."""
    pixels_per_joint: int = 1
    """Embeddings sampled for each joint: the joint itself, and further ones inside the target's disc (Table 8)."""
    max_queries: int = 256
    """Of each joint or pair and step, over all processes; drawn where there are more."""
    max_negatives: int = 512
    """Of each joint or pair and step, over all processes; drawn where there are more."""
    normalise_pairs: bool = True
    """Bring the mean of a pair's two embeddings (Eq. 3) back to length 1."""

    def __post_init__(self) -> None:
        at_least_one = dict.fromkeys(("channels", "pixels_per_joint", "max_queries", "max_negatives"), (1, math.inf))
        weights = dict.fromkeys(("lambda_p", "lambda_1", "lambda_2"), (0, math.inf))
        check_ranges(self, {**at_least_one, **weights, "gamma": (0, math.inf)}, "icon.")
        if not self.tau > 0:
            raise ValueError(f"icon.tau is {self.tau}, expected a positive number")


@dataclass(frozen=True)
class SemiConfig(LoopConfig):
    """Train a heatmap pose model on few labelled and many unlabelled persons."""

    model: ModelConfig
    data: DataConfig
    run_dir: File
    """Folder of this run; started again in the same folder it resumes."""
    teacher: Named
    """none (labels only), pseudo, distill (of `teacher_from`), consistency, dual, mean; kwargs as in semi/README.md."""
    teacher_from: OptionalFile = None
    """Hand-off file of the trained pose model that teaches, for pseudo and distill."""
    init_from: OptionalFile = None
    """Hand-off file (export/model.safetensors) whose weights the networks start from; null: their initialisation."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    unlabelled: UnlabelledConfig = field(default_factory=UnlabelledConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(rotation=30.0, scale=0.25))
    """Of labelled crops, and of unlabelled ones, whose easy view it makes."""
    hard: HardViews = field(default_factory=HardViews)
    lambda_u: float = 0.1
    """Weight of the unlabelled heatmap loss (Eq. 6): 0.1 with pseudo and distill; Semi_Human_Pose has 1 with
    consistency and dual."""
    icon: IconConfig = field(default_factory=IconConfig)
    sigma: float = 2.0
    """Of the target Gaussians, heatmap pixels (2 at 256x192, 3 at 384x288)."""
    quantize: bool = False
    """Round target centres to whole heatmap pixels, as HRNet's published code does."""
    auxiliary_weight: float = 0.5
    """lambda of CCM's Eq. 9: weight of the loss of the auxiliary decoder, where the head has one, on labelled crops."""
    decoding: Decoding = field(default_factory=Decoding)
    validate_every: int = 10
    """Epochs between validations; the last epoch is always validated."""

    def __post_init__(self) -> None:
        if self.model.refiner is not None:
            raise ValueError("model.refiner: finetune trains it, on the model that this stage makes; leave it out")
        if self.model.head is None:
            raise ValueError("model.head is null: semi-supervised training needs a head, e.g. head: {name: simple}")
        if self.teacher.name in TRAINED and not self.teacher_from:
            raise ValueError(
                f"teacher {self.teacher.name} needs teacher_from, the hand-off file of a model trained on the labels"
            )
        if self.teacher_from and self.teacher.name not in TRAINED:
            raise ValueError(
                f"teacher_from is for the teachers {' and '.join(TRAINED)}, not for {self.teacher.name}; drop it"
            )
        if self.icon.lambda_p and not (self.icon.lambda_1 or self.icon.lambda_2):
            raise ValueError("icon.lambda_1 and icon.lambda_2 are both 0; set one, or icon.lambda_p to 0")
        check_ranges(self, {"lambda_u": (0, math.inf)})
        for name in ("validate_every", "sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        super().__post_init__()
