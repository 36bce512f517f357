"""Configuration shared by the stages: the model's dataclasses and the one command-line parser. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class PathField:
    """Marks the type of a field whose texts are paths, each of them where there are several (see `File`)."""

    words: tuple[str, ...] = ()
    """Values that are no paths, such as gt."""
    suffixes: tuple[str, ...] = ()
    """Where there are any, only values that end in one of them are paths."""

    def is_path(self, value: str) -> bool:
        """Whether a value of the field is a path; an empty one names nothing."""
        named = value and value not in self.words
        return bool(named) and (not self.suffixes or PurePath(value).suffix in self.suffixes)


# The types of every field that names a file or a folder: `command.with_absolute_paths` finds them by their mark.
File = Annotated[str, PathField()]
OptionalFile = Annotated[str | None, PathField()]
Boxes = Annotated[str, PathField(words=("gt",))]
# Any other text is the name of a packaged skeleton or auto (`keypoints.load_skeleton`).
SkeletonFile = Annotated[str, PathField(suffixes=(".yaml", ".yml"))]


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
    """Networks on top of the head: {name: scio} predicts and verifies distal joints; null: none."""
    skeleton: SkeletonFile = "auto"
    """Packaged name, path of a YAML file, or auto: derived from the annotation file's categories."""
    input: InputConfig = field(default_factory=InputConfig)


@dataclass(frozen=True)
class DistalJoints:
    """What a model with SCIO's networks does about its distal joints; other models have no use for it."""

    output: Literal["base", "learning", "optimisation"] = "optimisation"
    """base: the head's own joints; learning: those of the prediction networks in their place (SCIO Eq. 3, its SCL);
    optimisation: the local search from there on (Eq. 12, its SCO)."""
    steps: int = 50
    """Of the search."""
    step: float = 1.5
    """Length of a step, in pixels of `unit`."""
    unit: Literal["input", "heatmap"] = "input"
    """Whose pixels `step` is in."""
    radius: float = 6.0
    """delta of Eq. 12: how far a joint may go from where the search starts, heatmap pixels."""
    below: float | None = None
    """Only distal joints whose peak in the head's heatmap is lower than this are replaced; null: all."""
    proximal_threshold: float = 0.2
    """Distal joints of a group with a proximal joint whose peak is lower than this are left as the head found them."""
    confidence: Literal["heatmap", "verification"] = "heatmap"
    """Score of a replaced joint: the peak of its heatmap, or that times its verification score."""

    def __post_init__(self) -> None:
        ranges = {"steps": (1, 10_000), "radius": (0, math.inf), "proximal_threshold": (-math.inf, math.inf)}
        if self.below is not None:
            ranges["below"] = (-math.inf, math.inf)
        check_ranges(self, ranges, "decoding.scio.")
        if not 0 < self.step < math.inf:
            raise ValueError(f"decoding.scio.step is {self.step}, expected a positive number")


@dataclass(frozen=True)
class WholeImages:
    """How a single-stage model (head cir) finds the persons of an image; other models have no use for it."""

    scales: tuple[float, ...] = (1.0,)
    """Short sides that the image is seen at, as factors on the model's input; score maps are averaged, and so are
    poses, by their scores. Peaks are looked for at the scale nearest to 1. Multi-scale rows: [0.5, 1, 2] (readings
    CIR 6)."""
    max_poses: int = 30
    """Highest peaks of an image that are kept before the NMS."""
    score_threshold: float = 0.01
    """Peaks that are lower are left out."""

    def __post_init__(self) -> None:
        ranges = {"max_poses": (1, 10_000), "score_threshold": (-math.inf, math.inf)}
        check_ranges(self, ranges, "decoding.whole.")
        if not self.scales or len(set(self.scales)) < len(self.scales) or not all(0.05 <= s <= 8 for s in self.scales):
            raise ValueError(f"decoding.whole.scales is {list(self.scales)}, expected factors in 0.05..8, each once")


@dataclass(frozen=True)
class Decoding:
    """From heatmaps, or the maps of a single-stage model, to scored poses."""

    refine: Literal["none", "quarter", "parabola", "paraboloid", "dark"] = "quarter"
    """Sub-pixel rule after the argmax; dark is meant for maps with a blur."""
    blur: float = 0.0
    """Sigma of the Gaussian filter before the argmax, heatmap pixels; 0 is off."""
    flip: bool = True
    """Average with the maps of the mirrored crop, or of the mirrored image."""
    flip_shift: float | None = None
    """Shift of the mirrored heatmaps, heatmap pixels; null: the exact alignment (1 - 1/stride, or 0 for udp)."""
    rescore_threshold: float = 0.2
    """A pose's score is its box score times the mean of the joint scores above this."""
    nms: Literal["hard", "soft", "fuse"] = "hard"
    """What is done with the poses of an image that overlap: hard drops the lower-scored one; fuse replaces the kept one
    by the OKS-weighted mean of both (CCM Eq. 23, its "Soft-NMS"); soft drops none and decays scores (HRNet, mmpose)."""
    nms_threshold: float = 0.9
    """hard, fuse: OKS above which the lower-scored pose is dropped; soft: scores fall by exp(-OKS^2 / this)."""
    scio: DistalJoints = field(default_factory=DistalJoints)
    whole: WholeImages = field(default_factory=WholeImages)

    def __post_init__(self) -> None:
        check_ranges(self, {"blur": (0, 100), "rescore_threshold": (0, math.inf), "nms_threshold": (0, 1)}, "decoding.")
        if self.flip_shift is not None:
            check_ranges(self, {"flip_shift": (0, 1)}, "decoding.")


@dataclass(frozen=True)
class ImageAugmentation:
    """Augmentation of a whole image that is cropped to the input's size (CIR, Experimental Setup)."""

    rotation: float = 30.0
    """Largest angle to either side, degrees; uniform."""
    scale: tuple[float, float] = (0.75, 1.5)
    """Least and largest factor on the region that fills the crop, a square of the image's short side at 1 (as in DEKR's
    code: above 1 persons get smaller); uniform."""
    shift: float = 40.0
    """Largest shift in x and in y, input pixels; uniform."""
    flip_probability: float = 0.5
    """Share of the images that are mirrored."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strengths of brightness, contrast, saturation (factors 1 - strength .. 1 + strength) and hue (a turn of -strength
    .. strength of the full circle), applied in random order; the paper names colour jitter without strengths."""

    def __post_init__(self) -> None:
        ranges = {"rotation": (0, 180), "shift": (0, math.inf), "flip_probability": (0, 1)}
        check_ranges(self, ranges, "augmentation.")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"augmentation.scale is {list(self.scale)}, expected two factors above 0 in rising order")
        if not all(0 <= strength <= 1 for strength in self.jitter) or self.jitter[3] > 0.5:
            raise ValueError(f"augmentation.jitter is {list(self.jitter)}, expected strengths in 0..1, of hue to 0.5")


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


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every training stage has."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights and losses stay in fp32."""
    seed: int = 0
    """Of initialisation, order, augmentation and views."""
    max_unreadable: float = 0.01
    """Share of an epoch's pictures that may be unreadable before the run stops."""
    resume: Literal["auto", "never", "must"] = "auto"
    """What to do when the run directory holds a run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice. Bit-identical results need the same number."""
    workers: int = 4
    """Data processes of each loader of a training process; the results do not depend on it."""
    save_every: int = 500
    """Steps between two resume files."""
    log_every: int = 20
    """Steps between two rows of metrics.jsonl."""

    def __post_init__(self) -> None:
        at_least = {"save_every": 1, "log_every": 1, "workers": 0, "threads": 0}
        ranges = {"seed": (0, 2**63 - 1), "max_unreadable": (0, 1)}
        check_ranges(self, {name: (low, math.inf) for name, low in at_least.items()} | ranges)


@dataclass(frozen=True)
class LabelsConfig:
    """Which part of the annotated images or persons is used as labelled."""

    ratio: float | None = None
    """Share in 0..1, which must not round to none; a smaller one is contained in every larger one of the same seed."""
    count: int | None = None
    """Number of images or persons, instead of a share."""
    file: OptionalFile = None
    """List that `poserelay select` or a run (its labels.json) wrote, instead of a share."""
    by: Literal["images", "persons"] = "images"
    """What `ratio` and `count` count: images with all their persons, or single persons. A `file` says it itself."""
    protocol: Literal["random", "first"] = "random"
    """What `ratio` and `count` take: random, drawn with `seed`; first, of the annotation file (with persons and counts
    of 1000, 5000 and 10000, what Semi_Human_Pose trains on)."""
    seed: int = 0
    """Seed of the random choice, apart from the run's own seed."""
    drop: Literal["nothing", "invisible", "visible"] = "nothing"
    """Annotated joints of the chosen persons to take for unlabelled (CCM section 6.5): invisible: all that are labelled
    hidden (v = 1), its COCO-I; visible: as many of the visible ones (v = 2), drawn with `seed`, its COCO-V."""

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "count", "file") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"labels: give {' or '.join(given)}, not both")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"labels.ratio is {self.ratio}, expected a share above 0 and at most 1")
        if self.count is not None and self.count < 1:
            raise ValueError(f"labels.count is {self.count}, expected at least 1")


@dataclass(frozen=True)
class DataConfig:
    """Annotated pictures for training and validation of a pose model."""

    annotations: File
    """COCO-keypoint JSON with the labelled persons."""
    images: File
    """Folder that the JSON's file names are relative to."""
    validation_annotations: OptionalFile = None
    """COCO-keypoint JSON to validate on; null trains without validation."""
    validation_images: OptionalFile = None
    """Folder of the validation pictures; null: the same as `images`."""
    validation_boxes: Boxes = "gt"
    """gt, or a COCO detections JSON."""

    def __post_init__(self) -> None:
        if self.validation_images and not self.validation_annotations:
            raise ValueError(
                "data.validation_images is given without data.validation_annotations; give both or neither"
            )


@dataclass(frozen=True)
class AdamConfig:
    """Adam without weight decay, as HRNet and SimpleBaseline train."""

    lr: float = 1e-3
    """Learning rate for a global batch of `lr_batch`; it is not rescaled, a different batch is warned about."""
    lr_batch: int = 128
    """Global batch, in persons, that `lr` was chosen for. `finetune cir` counts images instead of persons, here and
    below."""
    batch_size: int = 32
    """Persons per process and step."""
    epochs: int = 140
    """Passes over the labelled persons; not used where `steps` is given."""
    steps: int | None = None
    """Optimiser steps of the run, instead of epochs."""
    drops: tuple[int, ...] = (90, 120)
    """Epochs at which the learning rate is divided by ten; steps where `steps` is given."""

    def __post_init__(self) -> None:
        for name in ("lr", "lr_batch", "batch_size", "epochs", "steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"optim.{name} is {value}, expected a positive number")
        if list(self.drops) != sorted(set(self.drops)) or min(self.drops, default=1) < 1:
            unit = "epochs" if self.steps is None else "steps"
            raise ValueError(f"optim.drops is {list(self.drops)}, expected {unit} from 1 on, in rising order")


@dataclass(frozen=True)
class InspectConfig:
    """Print a model's parameters, multiply-accumulates and output size, or what an annotation file holds."""

    model: ModelConfig | None = None
    """The `model:` block of any recipe; the rest of the file is not read."""
    data: OptionalFile = None
    """COCO-keypoint JSON to describe instead: its persons, joints, sizes and overlaps, and what is missing."""
    images: OptionalFile = None
    """Folder of the pictures of `data`, to count those that are missing there."""
    out: OptionalFile = None
    """Folder for a chart of `data`, statistics.png (CCM Fig. 1)."""
    json: bool = False
    """Print one JSON object instead of text."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.data is None):
            raise ValueError("give --config FILE, a recipe with the model to describe, or --data FILE, annotations")
        for name in ("images", "out"):
            if self.data is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is given without data, the annotations to describe; leave it out")


@dataclass(frozen=True)
class ConvertConfig:
    """Turn the annotations of another dataset, as its site ships them, into one COCO JSON."""

    dataset: Literal["mpii", "aic", "lsp", "crowdpose", "ochuman", "posetrack18", "deeplabcut", "coco"]
    """Whose layouts to expect; the joints get the names of the packaged skeleton of that dataset, or keep their own
    (deeplabcut, lightning-pose's too, and coco, any COCO-keypoint file)."""
    annotations: File
    """mpii: the site's .mat, or HRNet's train.json or valid.json; aic: the competition's list, or mmpose's file; lsp:
    joints.mat, of Extended too; crowdpose: its JSON; ochuman: ochuman.json, or its COCO files; posetrack18: the folder
    of one part's videos, or mmpose's file; deeplabcut: CollectedData_SCORER.csv, or the folder of a project; coco: a
    COCO-keypoint JSON that we do not read as it is, such as one with a category per species."""
    out: File
    """JSON file to write, NAME.json, with a report of what was left out, NAME.report.json."""
    images: OptionalFile = None
    """Folder of the pictures (posetrack18: the one that holds `images`), for their sizes; not needed where the
    annotations say them (crowdpose, ochuman, mmpose's aic and posetrack18, most of coco)."""
    head_boxes: OptionalFile = None
    """gt_valid.mat of the same persons as mpii's valid.json, for PCKh; the site's .mat has head boxes itself."""
    split: Literal["all", "train", "val", "test"] = "all"
    """Part of lsp (train is its first half, test its second), of ochuman.json (val is its first 2,500 pictures, test
    the rest) or of mpii's .mat (all is its training part). The joints of mpii's test part are not public: NAME.json
    then holds its pictures, in their order, and NAME.boxes.json its boxes, for `evaluation test --submit mpii`."""
    iou_range: tuple[float, float] | None = None
    """ochuman: only persons with low <= MaxIoU < high, or <= 1: [0.5, 0.75] is moderate, [0.75, 1] hard."""
    ignore_regions: bool = True
    """posetrack18: its ignored regions as boxes marked iscrowd. Set it false to score with annotated boxes: COCO's
    evaluator forgives wrong poses within three times the sides of such a box, which is most of many frames."""
    skeleton: SkeletonFile | None = None
    """deeplabcut, coco: packaged name or YAML file, whose joints to take by name, with its limbs; null: all joints."""
    box_margin: float = 20.0
    """deeplabcut, and coco where a box is missing: pixels that the box goes beyond the labelled joints on each side, as
    far as the picture reaches (DeepLabCut's bbox_margin)."""
    max_unreadable: float = 0.01
    """Share of the pictures that may be missing or unreadable, and left out with their persons."""

    def __post_init__(self) -> None:
        check_ranges(self, {"max_unreadable": (0, 1), "box_margin": (0, 10_000)})
        if not self.out.endswith(".json"):
            raise ValueError(f"out is {self.out!r}, expected a name that ends in .json")
        if self.skeleton is not None and self.dataset not in ("deeplabcut", "coco"):
            raise ValueError(f"skeleton: {self.dataset} has one of its own; leave it out")
        if self.head_boxes is not None and self.dataset != "mpii":
            raise ValueError(f"head_boxes: {self.dataset} has none, they are mpii's; leave it out")
        parts = {"lsp": ("train", "test"), "mpii": ("train", "test"), "ochuman": ("val", "test")}.get(self.dataset, ())
        if self.split not in ("all", *parts):
            known = "only lsp and mpii have train and test, and ochuman val and test"
            raise ValueError(f"split is {self.split}, but {known}; leave it out")
        ours = self.dataset == "ochuman"
        if self.iou_range is not None and not (ours and 0 <= self.iou_range[0] < self.iou_range[1] <= 1):
            raise ValueError(f"iou_range is {list(self.iou_range)}, expected ochuman's MaxIoU, 0 <= low < high <= 1")
        if not self.ignore_regions and self.dataset != "posetrack18":
            raise ValueError(f"ignore_regions: {self.dataset} has none, they are posetrack18's; leave it out")


@dataclass(frozen=True)
class PrepareConfig:
    """Re-encode pictures at a small size and pack them into shards (webdataset tars) for pretraining."""

    images: File
    """Folder of pictures, read with its subfolders."""
    out: File
    """Folder for the shards and index.json; created, or continued where the same command was interrupted."""
    annotations: OptionalFile = None
    """COCO JSON whose `images` list names the pictures inside the folder; null takes every picture in the folder."""
    short_side: int = 256
    """Pixels of the shorter side; smaller pictures keep their size."""
    quality: int = 95
    """Of the JPEGs, 1 to 100; upright RGB JPEGs that are small enough keep their bytes."""
    pictures_per_shard: int = 1000
    """Pictures of a shard, about 35 MB at the default size."""
    max_unreadable: float = 0.01
    """Share of the pictures that may be unreadable, and left out, before the command stops."""
    resume: Literal["auto", "never", "must"] = "auto"
    """What to do when the folder holds shards, finished or begun, of this very command."""
    workers: int = os.cpu_count() or 1
    """Threads; their number changes nothing in the shards."""

    def __post_init__(self) -> None:
        ranges = {"short_side": (16, 65500), "quality": (1, 100), "max_unreadable": (0, 1)}
        check_ranges(self, {**ranges, "pictures_per_shard": (1, math.inf), "workers": (1, 1024)})


@dataclass(frozen=True)
class KnnConfig:
    """Watch a backbone by a weighted kNN classifier on labelled pictures (Wu et al., Instance Discrimination, 2018)."""

    images: File
    """Folder with one subfolder of pictures per class (or shards of one): the bank that votes."""
    queries: OptionalFile = None
    """Folder of other pictures of these classes, to be classified; null classifies each of `images` by the others."""
    every: int = 10
    """Epochs between two evaluations; the last epoch is always evaluated."""
    neighbours: int = 200
    """k, the pictures that vote."""
    temperature: float = 0.07
    """A neighbour of cosine similarity s votes with exp(s / temperature); lightly has 0.1, SimSiam's authors 0.2."""
    chunk: int = 4096
    """Vectors of the bank, and queries, compared at once: 16 chunk^2 bytes are used beside the vectors."""

    def __post_init__(self) -> None:
        check_ranges(self, dict.fromkeys(("every", "neighbours", "chunk"), (1, math.inf)), "knn.")
        if not self.temperature > 0:
            raise ValueError(f"knn.temperature is {self.temperature}, expected a positive number")


@dataclass(frozen=True)
class SelectConfig:
    """Pick the pictures to annotate: those that cover the embedding space of a backbone, near-duplicates left out."""

    checkpoint: File
    """Hand-off file (export/model.safetensors) of a backbone or a pose model."""
    images: File
    """Folder of pictures, read with its subfolders."""
    count: int
    """Pictures to pick."""
    out: File
    """JSON file for the list of them, which `labels.file` of a training stage takes."""
    annotations: OptionalFile = None
    """COCO JSON whose `images` list names the pictures to pick from; null takes every picture in the folder."""
    include: OptionalFile = None
    """Pictures that are labelled already and are to be complemented: an earlier list, or COCO annotations."""
    method: Literal["kmeans", "kcentre"] = "kmeans"
    """kmeans: the picture nearest to each of `count` cluster centres, typical ones, more where there are more; kcentre:
    each the farthest from those before it, so that no picture is far from all, odd ones first."""
    duplicate_similarity: float = 0.95
    """Of two pictures that are more similar only the first by name can be picked: 1 is an identical picture, 0 the mean
    of all pairs; re-encoded and resized copies are above 0.95. 1 keeps all."""
    seed: int = 0
    """Of the first centres of kmeans; kcentre draws nothing."""
    batch_size: int = 64
    """Pictures per forward pass."""
    workers: int = 2
    """Data processes; the choice does not depend on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        at_least = {"count": 1, "batch_size": 1, "workers": 0, "threads": 0}
        ranges = {name: (low, math.inf) for name, low in at_least.items()}
        check_ranges(self, {**ranges, "duplicate_similarity": (0, 1), "seed": (0, 2**63 - 1)})


@dataclass(frozen=True)
class DetectConfig:
    """Find the persons in pictures with a detector of torchvision, for the fields `boxes` of the stages."""

    images: File
    """Folder of pictures, read with its subfolders."""
    out: File
    """COCO detections JSON to write, NAME.json, with NAME.meta.json about it; started again it goes on where it was."""
    annotations: OptionalFile = None
    """COCO JSON whose `images` list names the pictures and their ids; null takes every picture in the folder and also
    writes such a list, NAME.images.json: what `unlabelled.annotations` of `semi` takes."""
    detector: Literal[
        "fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_320_fpn"
    ] = "fasterrcnn_resnet50_fpn_v2"
    """Box AP on COCO of 46.7, 41.5 and 22.8 at 280, 152 and 0.7 billion multiply-adds per picture."""
    weights: OptionalFile = None
    """State dict of this detector, .pth or .safetensors; null: torchvision's COCO weights, downloaded at first use."""
    score_threshold: float = 0.05
    """Persons scored at most this are left out; average precision wants it low, training may want it higher."""
    batch_size: int = 1
    """Pictures per forward pass; they are padded to the largest, which moves boxes by fractions of a pixel."""
    max_unreadable: float = 0.01
    """Share of the pictures that may be unreadable, and left out, before the command stops."""
    workers: int = 2
    """Data processes; the detections do not depend on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        if not self.out.endswith(".json"):
            raise ValueError(f"out is {self.out!r}, expected a name that ends in .json")
        ranges = {"batch_size": (1, math.inf), "workers": (0, math.inf), "threads": (0, math.inf)}
        check_ranges(self, {**ranges, "score_threshold": (0, 1), "max_unreadable": (0, 1)})


@dataclass(frozen=True)
class ImportedInput:
    """What a foreign network was trained to see; its file does not say."""

    height: int | None = None
    """Input pixels; null: 256 of a pose model, 224 of a backbone."""
    width: int | None = None
    """Input pixels; null: 192 of a pose model (256 with MPII's joints), 224 of a backbone."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per channel, of intensities in 0..1, in the order of the colours."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per channel, of intensities in 0..1, in the order of the colours."""
    alignment: Literal["hrnet", "udp"] = "hrnet"
    """How pixels of image, input and heatmap line up: udp for weights of mmpose's UDP configs."""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_ranges(self, {name: (1, math.inf)}, "input.")
        InputConfig(mean=self.mean, std=self.std)


@dataclass(frozen=True)
class ImportConfig:
    """Turn other projects' weights into a hand-off file, without running their pickles."""

    weights: File
    """The .pth, .ckpt or .safetensors file."""
    out: File
    """The hand-off file to write, .safetensors."""
    layout: Literal[
        "auto",
        "simsiam",
        "moco",
        "densecl",
        "mmselfsup",
        "mmpretrain",
        "solo",
        "lightly",
        "torchvision",
        "timm",
        "pose_resnet",
        "pose_hrnet",
        "mmpose",
    ] = "auto"
    """Whose names the keys have; auto tells it by the keys. The last three give pose models, the others backbones."""
    backbone: str = "auto"
    """Our name of the network, or timm's; auto tells ResNets, ResNeXt-50, HRNets and the mobile ones by their keys."""
    skeleton: SkeletonFile = "auto"
    """Of a pose model, in the order of its heatmaps: packaged name or YAML file; auto: coco17 for 17, mpii16 for 16."""
    color: Literal["auto", "rgb", "bgr"] = "auto"
    """Channel order the weights expect; auto: bgr for pose_resnet, whose authors never converted, else rgb."""
    input: ImportedInput = field(default_factory=ImportedInput)

    def __post_init__(self) -> None:
        if not self.out.endswith(".safetensors"):
            raise ValueError(f"out is {self.out!r}, expected a name that ends in .safetensors")


@dataclass(frozen=True)
class ExportConfig:
    """Write a hand-off file's backbone as a plain state dict with torchvision's or timm's names."""

    checkpoint: File
    """The hand-off file of a stage."""
    layout: Literal["torchvision", "timm"]
    """Whose names the keys get."""
    out: File
    """File to write, .pth or .safetensors."""

    def __post_init__(self) -> None:
        if not self.out.endswith((".pth", ".safetensors")):
            raise ValueError(f"out is {self.out!r}, expected a name that ends in .pth or .safetensors")


@dataclass(frozen=True)
class ExportModelConfig:
    """Write a pose model as one graph from uint8 pixels to joints, for ONNX Runtime or for torch without poserelay."""

    checkpoint: File
    """Hand-off file (export/model.safetensors) of a pose model, top-down or single-stage."""
    out: File
    """File to write, .onnx or .pt2 (torch.export)."""
    images: OptionalFile = None
    """Folder of pictures on some of which the graph is compared with the model; null: on noise alone."""
    decoding: Decoding = field(default_factory=Decoding)
    """What the graph does; rescore_threshold and nms are left to who runs it, and there is one of whole.scales."""

    def __post_init__(self) -> None:
        if not self.out.endswith((".onnx", ".pt2")):
            raise ValueError(f"out is {self.out!r}, expected a name that ends in .onnx or .pt2")
