"""Fields of `python -m pretrain linear`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from poserelay.config import File, LoopConfig, check_ranges


@dataclass(frozen=True)
class LinearDataConfig:
    """Pictures in one folder per class; a picture's class is the name of the folder it lies in."""

    train: File
    """Folder of class folders (ImageNet's train)."""
    validation: File
    """Folder of class folders, of the same classes or some of them (ImageNet's val)."""


@dataclass(frozen=True)
class LinearOptimConfig:
    """SimSiam's linear probe; MoCo's is optimizer sgd, base_lr 30 at a batch of 256."""

    optimizer: Literal["lars", "sgd"] = "lars"
    """lars: SGD whose rate is scaled per parameter by 0.001 x its norm / its gradient's norm."""
    base_lr: float = 0.1
    """Learning rate for a global batch of 256; the run uses base_lr x global batch / 256, on a cosine per epoch."""
    momentum: float = 0.9
    """Of either."""
    weight_decay: float = 0.0
    """Of the classifier."""
    batch_size: int = 512
    """Pictures per process and step; SimSiam's 4096 are 8 x 512."""
    epochs: int = 90
    """Passes over the pictures."""

    def __post_init__(self) -> None:
        for name in ("base_lr", "batch_size", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}, expected a positive number")
        check_ranges(self, {"weight_decay": (0, math.inf), "momentum": (0, 1)}, "optim.")


@dataclass(frozen=True)
class LinearConfig(LoopConfig):
    """Train a linear classifier on the frozen features of a backbone and report top-1 and top-5 (SimSiam, 2021)."""

    init_from: File
    """Hand-off file (export/model.safetensors) whose backbone is probed; it is left as it is."""
    data: LinearDataConfig
    run_dir: File
    """Folder of this run; started again in the same folder it resumes."""
    size: int = 224
    """Side of the crops, pixels; validation crops the centre of a picture whose shorter side is 8/7 of this."""
    optim: LinearOptimConfig = field(default_factory=LinearOptimConfig)
    validate_every: int = 10
    """Epochs between validations; the last epoch is always validated."""

    def __post_init__(self) -> None:
        check_ranges(self, {"size": (1, math.inf), "validate_every": (1, math.inf)})
        super().__post_init__()
