"""Fields of the commands of `python -m evaluation`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from poserelay.config import Boxes, Decoding, File, OptionalFile, SkeletonFile, check_ranges


@dataclass(frozen=True)
class ScoreConfig:
    """Score a COCO results file, of any origin, against annotations."""

    annotations: File
    """COCO-keypoint JSON with the truth; for pckh also MPII's gt_valid.mat."""
    predictions: File
    """COCO results JSON: a list of {image_id, category_id, keypoints, score}; with gt_valid.mat a pred.mat (preds)."""
    metric: Literal["oks", "pck", "pckh"] = "oks"
    """oks: average precision as pycocotools computes it; pck: share of joints near enough, over the persons; pckh:
    MPII's, at 0.5 and 0.1 of the head size (`head_box` or `head_size` of each person). Where every image carries a
    crowdIndex, oks is CrowdPose's: areas of 0.53 of the box, and AP easy, medium and hard."""
    crowd_levels: Literal["crowdpose", "icon"] = "crowdpose"
    """oks with crowdIndex: images below 0.2 are easy and from 0.8 on hard (crowdpose, as its API has it), or from 0.1
    and 0.8 (icon, as its text has it)."""
    skeleton: SkeletonFile = "auto"
    """Packaged name or YAML file, for the sigmas and the torso; auto: from the annotation file's joints. Joints of the
    file that it lacks are not scored; the predictions hold all joints of the file, in its order, whatever it is."""
    pck_threshold: float = 0.2
    """pck: share of the reference length (torso, or else the box's longer side) within which a joint is correct."""
    joints: Literal["all", "visible", "invisible"] = "all"
    """Score the joints labelled visible (v = 2) or hidden (v = 1) alone; persons without any are left out."""
    labelled_joints: int | None = None
    """Score the persons with exactly so many labelled joints alone, counted before `joints`; null: all persons."""
    json: bool = False
    """Print one JSON object {"metrics", "protocol"} instead of a table."""

    def __post_init__(self) -> None:
        _require_positive("pck_threshold", self.pck_threshold)
        _require_some_joints(self.labelled_joints)


@dataclass(frozen=True)
class TestConfig:
    """Run a pose model on annotated pictures and score it: OKS AP, PCK, PCKh, and the mean pose as a baseline."""

    checkpoint: list[File] | File
    """Hand-off file (export/model.safetensors) of a pose model, or a list of them: an ensemble, whose heatmaps are
    averaged. A single-stage model (head cir) goes alone, and finds the persons itself."""
    annotations: File
    """COCO-keypoint JSON with the truth. Joints that the model does not have are not scored. Persons with a `head_box`
    or `head_size` are measured by PCKh as well; where every image carries a crowdIndex, OKS AP is CrowdPose's: areas of
    0.53 of the box, and AP easy, medium and hard. A file of images alone is a hidden test set: nothing is scored, the
    predictions are written, of a top-down model those on `boxes`."""
    images: File
    """Folder that the JSON's file names are relative to."""
    boxes: Boxes = "gt"
    """gt: the annotated boxes; or a COCO detections JSON. A single-stage model takes neither: leave it out."""
    box_threshold: float = 0.0
    """Detections below this score are left out."""
    baseline_annotations: OptionalFile = None
    """COCO-keypoint JSON whose mean pose, placed in the same boxes (of a single-stage model: in the annotated ones), is
    scored as a baseline; null: no baseline."""
    out: OptionalFile = None
    """Folder for predictions.json and metrics.json; null writes nothing."""
    decoding: Decoding = field(default_factory=Decoding)
    pck_threshold: float = 0.2
    """Share of the reference length (torso, or else the box's longer side) within which a joint is correct."""
    joints: Literal["all", "visible", "invisible"] = "all"
    """Score the joints labelled visible (v = 2) or hidden (v = 1) alone; persons without any are left out."""
    labelled_joints: int | None = None
    """Score the persons with exactly so many labelled joints alone, counted before `joints`; null: all persons."""
    crowd_levels: Literal["crowdpose", "icon"] = "crowdpose"
    """With crowdIndex: images below 0.2 are easy and from 0.8 on hard (crowdpose, as its API has it), or from 0.1 and
    0.8 (icon, as its text has it)."""
    batch_size: int | None = None
    """Crops, or whole images of a single-stage model, per forward pass; null: 64 crops, 8 images."""
    workers: int = 2
    """Data processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    json: bool = False
    """Print one JSON object {"metrics", "protocol", "joints", "scores"}, of a model with SCIO also "scio", instead of a
    table. "scores" tells how well the poses' scores go with their true OKS: {"spearman", "pearson", "poses",
    "of_best"}."""

    def __post_init__(self) -> None:
        _require_positive("pck_threshold", self.pck_threshold)
        _require_some_joints(self.labelled_joints)
        ranges = {"workers": (0, math.inf), "threads": (0, math.inf)}
        check_ranges(self, ranges if self.batch_size is None else {**ranges, "batch_size": (1, math.inf)})
        paths = [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint
        if not paths:
            raise ValueError("checkpoint is an empty list, expected at least one hand-off file")
        for path in paths:
            if paths.count(path) > 1:
                raise ValueError(f"checkpoint names {path} twice")


@dataclass(frozen=True)
class TimingConfig:
    """Time a pose model per person: network forward, heatmaps to coordinates, evaluation (CCM, Table 9)."""

    checkpoint: list[File] | File
    """Hand-off file (export/model.safetensors) of a pose model, or a list of them: the mean of their heatmaps."""
    annotations: File
    """COCO-keypoint JSON with the truth."""
    images: File
    """Folder that the JSON's file names are relative to."""
    boxes: Boxes = "gt"
    """gt: the annotated boxes; or a COCO detections JSON."""
    box_threshold: float = 0.0
    """Detections below this score are left out."""
    decodings: list[Decoding] = field(default_factory=lambda: [Decoding()])
    """What is compared, each with one field or more of `Decoding`: '[{refine: parabola, blur: 1}, {nms: fuse}]'."""
    count: int = 500
    """Persons at most, those of the first images; their crops are held on the device."""
    repeats: int = 3
    """Timed runs of every decoding, after one that is not."""
    out: OptionalFile = None
    """Folder for timing.json; null writes nothing."""
    batch_size: int = 64
    """Crops per forward pass."""
    workers: int = 2
    """Data processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    json: bool = False
    """Print one JSON object {"metrics", "protocol"} instead of a table."""

    def __post_init__(self) -> None:
        if not self.decodings:
            raise ValueError("decodings is empty, expected at least one")
        for number, decoding in enumerate(self.decodings, start=1):
            if decoding in self.decodings[: number - 1]:
                raise ValueError(f"decodings: number {number} is also given before; keep one of them")
        at_least = {"count": 1, "repeats": 1, "batch_size": 1, "workers": 0, "threads": 0}
        check_ranges(self, {name: (low, math.inf) for name, low in at_least.items()})


@dataclass(frozen=True)
class CompareConfig:
    """Tell whether two methods' predictions differ: mean of each over its files, difference, interval, p."""

    annotations: File
    """COCO-keypoint JSON with the truth."""
    a: list[File] | File
    """COCO results JSON, or a list of them: one per seed."""
    b: list[File] | File
    """Likewise of the other method, as many: the first is compared with the first of `a`, and so on."""
    metric: Literal["oks", "pck", "pckh"] = "oks"
    """oks: average precision (AP), drawing images anew; pck and pckh (at 0.5, pelvis and thorax left out): drawing
    persons anew."""
    skeleton: SkeletonFile = "auto"
    """Packaged name or YAML file, for the sigmas and the torso; auto: from the annotation file's joints."""
    pck_threshold: float = 0.2
    """pck: share of the reference length (torso, or else the box's longer side) within which a joint is correct."""
    resamples: int = 1000
    """Bootstrap samples; the smallest p that they can show is 2 / (resamples + 1)."""
    seed: int = 0
    """Of the bootstrap."""
    json: bool = False
    """Print one JSON object {"metrics", "protocol", "files"} instead of a table."""

    def __post_init__(self) -> None:
        _require_positive("pck_threshold", self.pck_threshold)
        check_ranges(self, {"resamples": (100, 1_000_000), "seed": (0, 2**63 - 1)})
        first, second = ([side] if isinstance(side, str) else side for side in (self.a, self.b))
        if len(first) != len(second) or not first:
            raise ValueError(
                f"a names {len(first)} files and b {len(second)}; expected as many of each, at least one: "
                "they are paired in their order, seed by seed"
            )


@dataclass(frozen=True)
class PredictConfig:
    """Draw predicted skeletons on pictures and write the poses."""

    checkpoint: list[File] | File
    """Hand-off file (export/model.safetensors) of a pose model, or a list of them: the mean of their heatmaps. A
    single-stage model (head cir) goes alone, and finds the persons itself."""
    images: File
    """A picture, or a folder of pictures (looked through recursively)."""
    out: File
    """Folder for predictions.json, pictures/ and overview.jpg."""
    boxes: OptionalFile = None
    """JSON with the persons' boxes: COCO (images, annotations) or a list of {file_name, bbox, score}, with file names
    relative to `images`; pictures without a box are left out. Null: the whole picture is one person's box, or all
    persons that a single-stage model finds, which takes no boxes."""
    box_threshold: float = 0.0
    """Boxes scored below this are left out."""
    joint_threshold: float = 0.2
    """Joints scored below this are not drawn; those of a single-stage model have their pose's score."""
    decoding: Decoding = field(default_factory=Decoding)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        check_ranges(self, {"threads": (0, math.inf)})


@dataclass(frozen=True)
class ReportConfig:
    """Put runs side by side: a table of their metrics and a plot of their losses."""

    runs: list[File]
    """Run directories; test metrics are read from RUN/evaluation/ (`evaluation test --out RUN/evaluation`)."""
    out: File
    """Folder for report.md and losses.png."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty, expected at least one run directory")


@dataclass(frozen=True)
class VisualizeConfig:
    """Draw where classifiers look (MSCL, Fig. 3), how losses fall (Fig. 4), what scores tell of poses (CIR, Fig. 1, 5).

    Each figure is written as its name says, FIGURE.png.
    """

    figure: Literal["gradcam", "losses", "scores", "quality"]
    """gradcam: the heat of each checkpoint over pictures; losses: over epochs, in all and per level; scores: predicted
    score against true OKS; quality: pictures with their poses, score and true OKS beside each."""
    out: File
    """Folder for FIGURE.png."""
    checkpoints: list[File] = field(default_factory=list)
    """gradcam: hand-off files of `pretrain linear`, a column each."""
    images: OptionalFile = None
    """gradcam: a picture, or a folder of pictures (looked through recursively); quality: folder that the file names of
    `annotations` are relative to."""
    count: int = 8
    """gradcam: pictures of a folder, evenly spread over its sorted files; quality: images, evenly spread over those
    with a person."""
    target: str | None = None
    """gradcam: the class to explain; null: the one that a checkpoint takes the picture for."""
    runs: list[File] = field(default_factory=list)
    """losses: run directories, a line each."""
    annotations: OptionalFile = None
    """scores, quality: COCO-keypoint JSON with the truth."""
    predictions: list[File] = field(default_factory=list)
    """scores, quality: COCO results JSON, such as `test` writes; a panel or a column each."""
    skeleton: SkeletonFile = "auto"
    """scores, quality: packaged name or YAML file, for the sigmas; auto: from the annotation file's joints."""
    seed: int = 0
    """scores: of the poses that are drawn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """gradcam: auto takes a GPU where there is one."""
    threads: int = 0
    """gradcam: CPU threads of torch; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        wanted = {
            "checkpoints": ("gradcam",),
            "images": ("gradcam", "quality"),
            "runs": ("losses",),
            "annotations": ("scores", "quality"),
            "predictions": ("scores", "quality"),
        }
        for name, figures in wanted.items():
            belongs = self.figure in figures
            if bool(getattr(self, name)) != belongs:
                problem = "is missing" if belongs else f"is of figure {' or '.join(figures)}; leave it out"
                raise ValueError(f"figure {self.figure}: {name} {problem}")
        for path in self.predictions:
            if self.predictions.count(path) > 1:
                raise ValueError(f"predictions names {path} twice")
        check_ranges(self, {"count": (1, 64), "threads": (0, math.inf), "seed": (0, 2**63 - 1)})


@dataclass(frozen=True)
class EmbeddingsConfig:
    """Measure and draw how well the features of pose models tell joints apart (ICON, Fig. 5)."""

    checkpoints: list[File]
    """Hand-off files (export/model.safetensors) of pose models, a column each."""
    annotations: File
    """COCO-keypoint JSON; joints are matched by name, those labelled visible are embedded."""
    images: File
    """Folder that the JSON's file names are relative to."""
    out: File
    """Folder for embeddings.png and embeddings.json."""
    count: int = 500
    """Persons, evenly spread over those with a visible joint."""
    neighbours: int = 10
    """k, the nearest joints of other persons among which the same joint is looked for."""
    method: Literal["tsne", "pca"] = "tsne"
    """How the picture lays the embeddings out; the metrics do not depend on it."""
    seed: int = 0
    """Of t-SNE, and of the 2,000 joints drawn where there are more."""
    workers: int = 2
    """Data processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    json: bool = False
    """Print one JSON object {"metrics", "protocol"} instead of a table."""

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ValueError("checkpoints is empty, expected at least one hand-off file")
        for path in self.checkpoints:
            if self.checkpoints.count(path) > 1:
                raise ValueError(f"checkpoints names {path} twice")
        at_least = {"count": 2, "neighbours": 1, "workers": 0, "threads": 0}
        check_ranges(self, {name: (low, math.inf) for name, low in at_least.items()} | {"seed": (0, 2**32 - 1)})


@dataclass(frozen=True)
class ScioConfig:
    """Measure and draw what SCIO does about the distal joints (Table 5, Fig. 2, 5 and 6)."""

    checkpoint: File
    """Hand-off file (export/model.safetensors) of a pose model that carries SCIO's networks."""
    annotations: File
    """COCO-keypoint JSON with the truth; persons are cropped by their annotated boxes."""
    images: File
    """Folder that the JSON's file names are relative to."""
    out: File
    """Folder for scio.json, joints.png, search.png, correlation.png, planted.png and before_after.jpg."""
    count: int = 1000
    """Persons, evenly spread over those with a labelled distal joint."""
    decoding: Decoding = field(default_factory=Decoding)
    """`scio.output` is not read: base, learning and optimisation are all measured."""
    planted: tuple[float, float] = (2.0, 6.0)
    """How far from the truth the errors are planted that the search then mends, heatmap pixels, from and to."""
    seed: int = 0
    """Of the planted errors."""
    batch_size: int = 64
    """Crops per forward pass."""
    workers: int = 2
    """Data processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    json: bool = False
    """Print one JSON object {"metrics", "protocol"} instead of a table."""

    def __post_init__(self) -> None:
        if not 0 <= self.planted[0] <= self.planted[1] < math.inf:
            raise ValueError(f"planted is {list(self.planted)}, expected heatmap pixels, 0 <= from <= to")
        at_least = {"count": 1, "batch_size": 1, "workers": 0, "threads": 0}
        check_ranges(self, {name: (low, math.inf) for name, low in at_least.items()} | {"seed": (0, 2**63 - 1)})


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, expected a positive number")


def _require_some_joints(count: int | None) -> None:
    if count is not None and count < 1:
        raise ValueError(f"labelled_joints is {count}, expected a number of joints, 1 or more")
