"""Fields of `python -m finetune`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from poserelay.config import (
    AdamConfig,
    Augmentation,
    DataConfig,
    Decoding,
    File,
    LabelsConfig,
    LoopConfig,
    ModelConfig,
    OptionalFile,
    check_ranges,
)

SOURCES = {"A": "external", "C": "data", "H": "hard_negatives", "U": "pseudo_labelled"}
"""The letters of CCM's training strategies (Eq. 10, Table 5), and the fields that they stand for."""


@dataclass(frozen=True)
class SourceConfig:
    """Persons of another annotation file, to train on beside those of `data`."""

    annotations: OptionalFile = None
    """COCO-keypoint JSON, perhaps of another skeleton: joints are matched by name, those it lacks are not supervised.
    null: none."""
    images: OptionalFile = None
    """Folder that the JSON's file names are relative to."""
    ratio: float | None = None
    """Persons of this source in an epoch for each labelled person of `data`, whether or not that is trained on, drawn
    anew every epoch; null: all once."""


@dataclass(frozen=True)
class HardNegativesConfig:
    """Boxes in which a detector saw a person where there is none: their heatmaps are to be zero (CCM section 4.1)."""

    detections: OptionalFile = None
    """COCO detections JSON on the pictures of `data`, of which those that touch no annotated box are taken; null:
    none."""
    score_threshold: float = 0.5
    """Least score of a detection."""
    ratio: float | None = None
    """Boxes in an epoch for each labelled person of `data`, drawn anew every epoch; null: all once."""


@dataclass(frozen=True)
class PhaseConfig:
    """The second phase, CCM's Finetune|theta (Eq. 10); it starts with a new Adam."""

    train_on: str | None = None
    """Letters of the sources, as of the first phase; null: the same."""
    epochs: int = 0
    """Passes over its persons; 0: no second phase, unless `steps` is given."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    lr: float = 1e-4
    """Learning rate for a global batch of `optim.lr_batch`."""
    drops: tuple[int, ...] = ()
    """Epochs of this phase at which the learning rate is divided by ten; steps where `steps` is given."""


@dataclass(frozen=True)
class StructuralConfig:
    """Training of SCIO's networks, where `model.refiner` is scio. They take turns: the prediction networks learn in
    even epochs, the verification networks in odd ones, while the other side is frozen."""

    freeze_base: bool = False
    """Train them alone, on the model as it was handed over, batch norms included; false: Eq. 9 to 11 reach it too."""
    weight: float = 1.0
    """Of their losses beside the heatmaps' own."""
    norm: Literal["mse", "l2"] = "mse"
    """Of Eq. 9 to 11: the mean squared difference of two maps (halved, as for the heatmaps), or the plain L2 norm."""
    perturb_distal: float = 0.0
    """Reach, in heatmap pixels, of the distal joints' random displacements that the verification networks are also
    shown, with a map of A to give back that fades with the distance; 0 is off, as in the paper."""

    def __post_init__(self) -> None:
        check_ranges(self, {"weight": (0, math.inf), "perturb_distal": (0, math.inf)}, "scio.")


@dataclass(frozen=True)
class FinetuneConfig(LoopConfig):
    """Train a heatmap pose model on labelled persons (SimpleBaseline, HRNet, CCM), perhaps with SCIO's networks."""

    model: ModelConfig
    data: DataConfig
    run_dir: File
    """Folder of this run; started again in the same folder it resumes."""
    init_from: OptionalFile = None
    """Hand-off file (export/model.safetensors) whose weights the model starts from; null: its initialisation."""
    freeze_backbone: bool = False
    """Train the head alone, on the backbone as it was handed over, batch norms included: a probe of what it knows."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    external: SourceConfig = field(default_factory=SourceConfig)
    """A: labelled persons of another data set (CCM section 4.3)."""
    pseudo_labelled: SourceConfig = field(default_factory=SourceConfig)
    """U: persons of unlabelled pictures, as `finetune pseudo-labels` writes them (CCM section 4.2)."""
    hard_negatives: HardNegativesConfig = field(default_factory=HardNegativesConfig)
    """H: false detections."""
    train_on: str | None = None
    """Letters of what the first phase trains on, CCM's Train|phi: A external, C data, H hard_negatives, U
    pseudo_labelled; null: everything that is given. An epoch goes over all of it."""
    optim: AdamConfig = field(default_factory=AdamConfig)
    then: PhaseConfig = field(default_factory=PhaseConfig)
    auxiliary_weight: float = 0.5
    """lambda of CCM's Eq. 9: weight of the loss of the auxiliary decoder, where the head has one."""
    scio: StructuralConfig = field(default_factory=StructuralConfig)
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

    def __post_init__(self) -> None:
        if self.model.head is None:
            raise ValueError("model.head is null: fine-tuning needs a head; name one, e.g. head: {name: simple}")
        if self.export == "best" and self.data.validation_annotations is None:
            raise ValueError("export: best needs data.validation_annotations to tell which weights are best")
        self._check_sources()
        self._check_refiner()
        if self.auxiliary_weight < 0:
            raise ValueError(f"auxiliary_weight is {self.auxiliary_weight}, expected at least 0")
        for name in ("validate_every", "sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        super().__post_init__()

    def _check_refiner(self) -> None:
        refiner = self.model.refiner
        if refiner is None:
            if self.scio != StructuralConfig():
                raise ValueError("scio has fields, but model.refiner is null; give --model.refiner '{name: scio}'")
            return
        if self.scio.freeze_base and self.init_from is None:
            raise ValueError("scio.freeze_base needs init_from: the hand-off file of the model that is left as it is")
        if self.scio.freeze_base and self.freeze_backbone:
            raise ValueError("freeze_backbone and scio.freeze_base are both given; the second freezes the backbone too")
        sigma = refiner.kwargs.get("sigma", 2.0)
        # Another name, or a sigma that is no number, is told when the model is built.
        if refiner.name == "scio" and type(sigma) in (int, float) and sigma != self.sigma:
            default = "" if "sigma" in refiner.kwargs else " (its default)"
            raise ValueError(
                f"model.refiner.kwargs.sigma is {sigma}{default} and sigma {self.sigma}: the search renders Gaussians "
                "like those of training; give both the same"
            )

    def _check_sources(self) -> None:
        given = self._given()
        phases = {"train_on": self.train_on, "then.train_on": self.then.train_on}
        for name, letters in phases.items():
            for letter in letters or ():
                if letter not in SOURCES:
                    known = ", ".join(f"{known} ({source})" for known, source in SOURCES.items())
                    raise ValueError(f"{name} is {letters!r}, expected letters of {known}")
                if letter not in given:
                    part = "detections" if letter == "H" else "annotations"
                    raise ValueError(f"{name} is {letters!r}, but {SOURCES[letter]}.{part} is null; give the file")
            if letters is not None and (not letters or len(set(letters)) < len(letters)):
                raise ValueError(f"{name} is {letters!r}, expected at least one letter, each once")
        for name in ("external", "pseudo_labelled"):
            source: SourceConfig = getattr(self, name)
            if bool(source.annotations) != bool(source.images):
                raise ValueError(f"{name}: annotations and images go together; give both or neither")
        for name in ("external", "pseudo_labelled", "hard_negatives"):
            ratio = getattr(self, name).ratio
            if ratio is not None and not ratio > 0:
                raise ValueError(f"{name}.ratio is {ratio}, expected a number above 0; or null for all once")
        check_ranges(self.hard_negatives, {"score_threshold": (-math.inf, math.inf)}, "hard_negatives.")
        check_ranges(self.then, {"epochs": (0, math.inf)}, "then.")
        for name in ("steps", "lr"):
            value = getattr(self.then, name)
            if value is not None and not value > 0:
                raise ValueError(f"then.{name} is {value}, expected a positive number")
        if list(self.then.drops) != sorted(set(self.then.drops)) or min(self.then.drops, default=1) < 1:
            raise ValueError(f"then.drops is {list(self.then.drops)}, expected numbers from 1 on, in rising order")
        if self.then.epochs and self.then.steps:
            raise ValueError("then.epochs and then.steps are both given; give one of them")
        if not self.has_second_phase and (self.then.train_on or self.then.drops):
            raise ValueError("then.train_on or then.drops is given, but no then.epochs or then.steps; give one of them")

    @property
    def has_second_phase(self) -> bool:
        """Whether there is anything after the first phase."""
        return bool(self.then.epochs or self.then.steps)

    def sources_of(self, letters: str | None) -> str:
        """The letters that a phase trains on, in the order of SOURCES: those named, or all that are given."""
        wanted = self._given() if letters is None else letters
        return "".join(letter for letter in SOURCES if letter in wanted)

    def _given(self) -> set[str]:
        """The letters of the sources that have a file."""
        files = {
            "A": self.external.annotations,
            "C": self.data.annotations,
            "H": self.hard_negatives.detections,
            "U": self.pseudo_labelled.annotations,
        }
        return {letter for letter, file in files.items() if file}
