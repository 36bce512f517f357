"""Fields of `python -m pretrain`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from poserelay.config import ModelConfig, Named, check_loop_fields, check_ranges


@dataclass(frozen=True)
class DataConfig:
    """Unlabelled pictures."""

    images: str
    """Folder of pictures, read with its subfolders (ImageNet's train folder)."""
    annotations: str | None = None
    """COCO JSON whose `images` list names the pictures inside the folder; null takes every picture in the folder."""


@dataclass(frozen=True)
class OptimConfig:
    """SGD with a cosine schedule and the linear learning-rate rule (MSCL section 4.1, SimSiam)."""

    base_lr: float = 0.05
    """Learning rate for a global batch of 256; the run uses base_lr x global batch / 256."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """On all parameters."""
    batch_size: int = 64
    """Pictures per process and step, each seen in two views."""
    epochs: int = 100
    """Passes over the pictures."""
    fixed_predictor_lr: bool = True
    """Keep the prediction heads at the first learning rate (SimSiam's fix-pred-lr)."""

    def __post_init__(self) -> None:
        for name in ("base_lr", "batch_size", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}, expected a positive number")
        check_ranges(self, {"weight_decay": (0, math.inf), "momentum": (0, 1)}, "optim.")
        if self.batch_size < 2:
            raise ValueError(
                "optim.batch_size is 1: the heads' batch normalisation needs at least 2 pictures per process"
            )


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a backbone on unlabelled pictures with MSCL."""

    model: ModelConfig
    """The backbone that is handed off and the size of its views; without a head."""
    data: DataConfig
    run_dir: str
    """Folder of this run; started again in the same folder it resumes."""
    method: Named = field(default_factory=lambda: Named("mscl"))
    """What is trained around the backbone; kwargs are the fields of pretrain/mscl.py."""
    loss_weights: tuple[float, ...] = (1.0, 2.0, 2.0, 5.0)
    """Lambda of Eq. 7 for each compared level, fine to coarse; normalised to sum 1."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights and losses stay in fp32."""
    seed: int = 0
    """Of initialisation, order and views."""
    max_unreadable: float = 0.01
    """Share of an epoch's pictures that may be unreadable before the run stops."""
    resume: Literal["auto", "never", "must"] = "auto"
    """What to do when the run directory holds a run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice. Bit-identical results need the same number."""
    workers: int = 4
    """Data processes per training process; the results do not depend on it."""
    save_every: int = 500
    """Steps between two resume files."""
    log_every: int = 20
    """Steps between two rows of metrics.jsonl."""

    def __post_init__(self) -> None:
        if self.model.head is not None:
            raise ValueError("model.head: pretraining trains the backbone alone; leave it out")
        height, width = self.model.input.height, self.model.input.width
        if height != width:
            raise ValueError(f"model.input is {height}x{width}, but the views are square; give height and width alike")
        if not self.loss_weights or min(self.loss_weights) < 0 or sum(self.loss_weights) <= 0:
            raise ValueError(f"loss_weights is {list(self.loss_weights)}, expected weights of at least 0, not all 0")
        check_loop_fields(self)
