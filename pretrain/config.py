"""Fields of `python -m pretrain`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from poserelay.config import File, KnnConfig, LoopConfig, ModelConfig, Named, OptionalFile, check_ranges


@dataclass(frozen=True)
class PretrainDataConfig:
    """Unlabelled pictures."""

    images: OptionalFile = None
    """Folder of pictures, read with its subfolders (ImageNet's train folder), or of tar shards (poserelay prepare)."""
    annotations: OptionalFile = None
    """COCO JSON whose `images` list names the pictures inside the folder; null takes every picture in the folder."""
    more_images: tuple[File, ...] = ()
    """Further folders, pictures like `images`, which an epoch visits too (COCO's unlabeled2017)."""

    def __post_init__(self) -> None:
        if self.images is None and (self.annotations or self.more_images):
            raise ValueError("data.images is missing, beside data.annotations or data.more_images; give the folder")


@dataclass(frozen=True)
class ViewsConfig:
    """How the two views of a picture are made; their distribution is MoCo v2's in every case."""

    colour: Literal["fused", "exact", "device"] = "fused"
    """fused: all that is affine in one colour matrix per view, or two around the turn of the hue, clipped after each;
    exact: PIL's operations one by one; device: colour and blur on the device, batched, each sample with its draws."""


@dataclass(frozen=True)
class OptimConfig:
    """SGD with a cosine schedule and the linear learning-rate rule (MSCL section 4.1, SimSiam)."""

    name: Literal["sgd", "lars"] = "sgd"
    """lars scales each weight matrix's step to its norm, for global batches of thousands; biases and batch norms keep
    plain SGD without weight decay."""
    base_lr: float = 0.05
    """Learning rate for a global batch of 256; the run uses base_lr x global batch / 256."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """On all parameters."""
    batch_size: int = 64
    """Pictures per process and step, each seen in two views."""
    micro_batches: int = 1
    """Passes that the batch is split into, to fit the memory. Gradients are those of the whole batch; batch norm sees
    batch_size / micro_batches pictures, and a step's later passes find its earlier ones in MoCo's queue."""
    epochs: int = 100
    """Passes over the pictures; 0, with method none, hands the backbone off as it was built."""
    fixed_predictor_lr: bool = True
    """Keep the prediction heads at the first learning rate (SimSiam's fix-pred-lr)."""

    def __post_init__(self) -> None:
        for name in ("base_lr", "batch_size", "micro_batches"):
            if not 0 < getattr(self, name) < 1e37:
                raise ValueError(f"optim.{name} is {getattr(self, name)}, expected a positive number")
        ranges = {"weight_decay": (0, math.inf), "momentum": (0, 1), "epochs": (0, math.inf)}
        check_ranges(self, ranges, "optim.")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"optim.batch_size is {self.batch_size}, which optim.micro_batches, {self.micro_batches}, does not "
                "divide; choose another"
            )
        if self.batch_size // self.micro_batches < 2:
            raise ValueError(
                f"optim.batch_size is {self.batch_size} in {self.micro_batches} passes: batch normalisation needs at "
                "least 2 pictures per process and pass"
            )


@dataclass(frozen=True)
class PretrainConfig(LoopConfig):
    """Pretrain a backbone on unlabelled pictures. (`python -m pretrain linear --help` is about the linear probe.)"""

    model: ModelConfig
    """The backbone that is handed off and the size of its views; without a head."""
    run_dir: File
    """Folder of this run; started again in the same folder it resumes."""
    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    method: Named = field(default_factory=lambda: Named("mscl"))
    """What is trained around the backbone: mscl, simsiam, moco, densecl, or none, which trains nothing (a baseline);
    kwargs are the arguments of its class in pretrain/."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    knn: KnnConfig | None = None
    """Classify labelled pictures by their neighbours while the backbone trains; null does not."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """stop ends the run, saved, once a term of the loss has looked collapsed in five rows of metrics.jsonl running."""
    compile: bool = False
    """Let torch compile the networks: minutes at the start, faster steps on a GPU."""

    def __post_init__(self) -> None:
        if self.model.head is not None:
            raise ValueError("model.head: pretraining trains the backbone alone; leave it out")
        if self.model.refiner is not None:
            raise ValueError("model.refiner: pretraining trains the backbone alone; leave it out")
        height, width = self.model.input.height, self.model.input.width
        if min(height, width) < 32:
            raise ValueError(f"model.input is {height}x{width}; views need at least 32 pixels, the deepest stride")
        if height != width:
            raise ValueError(f"model.input is {height}x{width}, but the views are square; give height and width alike")
        if (self.method.name == "none") != (self.optim.epochs == 0):
            raise ValueError(
                f"optim.epochs is {self.optim.epochs} and method.name {self.method.name!r}: method none trains nothing "
                "and goes with 0 epochs, the others with more"
            )
        if self.data.images is None and self.optim.epochs:
            raise ValueError("data.images is missing; give the folder of pictures to train on")
        super().__post_init__()
