"""The commands that a graph may run, with what each writes and hands off. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.config import (
    DiagnoseConfig,
    EmbeddingsConfig,
    PredictConfig,
    ReportConfig,
    ScioConfig,
    TestConfig,
    TimingConfig,
    VisualizeConfig,
)
from finetune.cir_config import CIRConfig
from finetune.config import FinetuneConfig
from finetune.pseudo_labels_config import PseudoLabelsConfig
from poserelay.config import ConvertConfig, DetectConfig, ExportConfig, ImportConfig, PrepareConfig, SelectConfig
from poserelay.synthesize import SynthesizeConfig
from pretrain.config import PretrainConfig
from pretrain.linear_config import LinearConfig
from semi.config import SemiConfig

EXPORT = "export/model.safetensors"


@dataclass(frozen=True)
class Command:
    """A command of a stage or of the shared package."""

    config: type
    """Dataclass of its fields."""
    field: str
    """The field that says where it writes: run_dir or out."""
    written: str
    """What that field names, relative to the job's folder; empty: the folder itself."""
    hands_off: str
    """What `${stage}` stands for, relative to the job's folder; empty: the folder itself."""
    leaves: str
    """File in the job's folder that is there once it is done."""
    trains: bool = False
    """Whether it keeps a run directory, and may run as several processes."""


COMMANDS = {
    "pretrain": Command(PretrainConfig, "run_dir", "", EXPORT, "done.json", trains=True),
    "pretrain linear": Command(LinearConfig, "run_dir", "", EXPORT, "done.json", trains=True),
    "semi": Command(SemiConfig, "run_dir", "", EXPORT, "done.json", trains=True),
    "finetune": Command(FinetuneConfig, "run_dir", "", EXPORT, "done.json", trains=True),
    "finetune cir": Command(CIRConfig, "run_dir", "", EXPORT, "done.json", trains=True),
    "finetune pseudo-labels": Command(
        PseudoLabelsConfig, "out", "annotations.json", "annotations.json", "annotations.json"
    ),
    "evaluation test": Command(TestConfig, "out", "", "", "metrics.json"),
    "evaluation timing": Command(TimingConfig, "out", "", "", "timing.json"),
    "evaluation diagnose": Command(DiagnoseConfig, "out", "", "", "diagnosis.json"),
    "evaluation predict": Command(PredictConfig, "out", "", "", "predictions.json"),
    "evaluation visualize": Command(VisualizeConfig, "out", "", "", ""),
    "evaluation embeddings": Command(EmbeddingsConfig, "out", "", "", "embeddings.json"),
    "evaluation scio": Command(ScioConfig, "out", "", "", "scio.json"),
    "evaluation report": Command(ReportConfig, "out", "report.html", "", "report.html"),
    "poserelay synthesize": Command(SynthesizeConfig, "out", "", "", "annotations.json"),
    "poserelay convert": Command(ConvertConfig, "out", "annotations.json", "annotations.json", "annotations.json"),
    "poserelay prepare": Command(PrepareConfig, "out", "", "", "index.json"),
    "poserelay select": Command(SelectConfig, "out", "chosen.json", "chosen.json", "chosen.json"),
    "poserelay detect": Command(DetectConfig, "out", "detections.json", "detections.json", "detections.json"),
    "poserelay import-weights": Command(ImportConfig, "out", EXPORT, EXPORT, EXPORT),
    "poserelay export-weights": Command(ExportConfig, "out", "weights.pth", "weights.pth", "weights.pth"),
}
