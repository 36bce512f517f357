"""Fields of `python -m finetune`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from poserelay.config import (
    AdamConfig,
    Augmentation,
    DataConfig,
    Decoding,
    File,
    LabelsConfig,
    ModelConfig,
    OptionalFile,
    check_loop_fields,
)


@dataclass(frozen=True)
class FinetuneConfig:
    """Train a heatmap pose model on labelled persons (SimpleBaseline, HRNet)."""

    model: ModelConfig
    data: DataConfig
    run_dir: File
    """Folder of this run; started again in the same folder it resumes."""
    init_from: OptionalFile = None
    """Hand-off file (export/model.safetensors) whose weights the model starts from; null: its initialisation."""
    freeze_backbone: bool = False
    """Train the head alone, on the backbone as it was handed over, batch norms included: a probe of what it knows."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    optim: AdamConfig = field(default_factory=AdamConfig)
    augmentation: Augmentation = field(default_factory=Augmentation)
    sigma: float = 2.0
    """Of the target Gaussians, heatmap pixels (2 at 256x192, 3 at 384x288)."""
    quantize: bool = False
    """Round target centres to whole heatmap pixels, as HRNet's published code does."""
    decoding: Decoding = field(default_factory=Decoding)
    validate_every: int = 10
    """Epochs between validations; the last epoch is always validated."""
    export: Literal["last", "best"] = "last"
    """Weights to hand off; best has the highest AP on the validation set, which must not be the reported test set."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights and losses stay in fp32."""
    seed: int = 0
    """Of initialisation, order and augmentation."""
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
        if self.model.head is None:
            raise ValueError("model.head is null: fine-tuning needs a head; name one, e.g. head: {name: simple}")
        if self.data.validation_images and not self.data.validation_annotations:
            raise ValueError(
                "data.validation_images is given without data.validation_annotations; give both or neither"
            )
        if self.export == "best" and self.data.validation_annotations is None:
            raise ValueError("export: best needs data.validation_annotations to tell which weights are best")
        for name in ("validate_every", "sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        check_loop_fields(self)
