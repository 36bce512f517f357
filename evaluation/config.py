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
    metric: Literal["oks", "pck", "pckh", "recall", "all"] = "oks"
    """oks: average precision as pycocotools computes it; pck: share of joints near enough, over the persons; pckh:
    MPII's, at 0.5 and 0.1 of the head size (`head_box` or `head_size` of each person); recall: share of the joints
    predicted with a confidence above 0.1, ..., 0.9 (ICON, Table 6); all: each of them that the truth allows, the others
    named, and how well each joint is found. Where every image carries a crowdIndex, oks is CrowdPose's: areas of 0.53
    of the box, and AP easy, medium and hard; where every person carries a max_iou, OCHuman's AP moderate and hard."""
    crowd_levels: Literal["crowdpose", "icon"] = "crowdpose"
    """oks with crowdIndex: images below 0.2 are easy and from 0.8 on hard (crowdpose, as its API has it), or from 0.1
    and 0.8 (icon, as its text has it)."""
    skeleton: SkeletonFile = "auto"
    """Packaged name or YAML file, for the sigmas and the torso; auto: from the annotation file's joints. Joints of the
    file that it lacks are not scored; the predictions hold all joints of the file, in its order, whatever it is."""
    pck_threshold: float = 0.2
    """pck: share of the reference length within which a joint is correct."""
    pck_reference: Literal["auto", "torso", "box"] = "auto"
    """pck: what is its reference length, the person's torso or its box's longer side; auto: the torso, where the
    skeleton has one."""
    joints: Literal["all", "visible", "invisible"] = "all"
    """Score the joints labelled visible (v = 2) or hidden (v = 1) alone; persons without any are left out."""
    labelled_joints: int | None = None
    """Score the persons with exactly so many labelled joints alone, counted before `joints`; null: all persons."""
    json: bool = False
    """Print one JSON object {"metrics", "protocol"} instead of a table; of metric all also "joints" and "scores", as
    `test` has them."""

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
    submit: Literal["coco", "mpii", "crowdpose"] | None = None
    """Also write into `out` what the server of a hidden test set takes: COCO's zipped JSON, which bears the folder's
    name, MPII's .mat, or CrowdPose's JSON; null: no."""
    decoding: Decoding = field(default_factory=Decoding)
    pck_threshold: float = 0.2
    """Share of the reference length within which a joint is correct."""
    pck_reference: Literal["auto", "torso", "box"] = "auto"
    """PCK's reference length, the person's torso or its box's longer side; auto: the torso, where the skeleton has
    one."""
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
        if self.submit is not None and self.out is None:
            raise ValueError(f"submit {self.submit} needs out, the folder to write into")
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
    """COCO results JSON, or a list of them: one per seed. `compare A.json B.json ...` gives a and b without flags."""
    b: list[File] | File
    """Likewise of the other method, as many: the first is compared with the first of `a`, and so on."""
    metric: Literal["oks", "pck", "pckh"] = "oks"
    """oks: average precision (AP); pck and pckh (at 0.5, pelvis and thorax left out): share of correct joints. Images
    are drawn anew, each with all its persons."""
    skeleton: SkeletonFile = "auto"
    """Packaged name or YAML file, for the sigmas and the torso; auto: from the annotation file's joints. Joints of the
    file that it lacks are not compared."""
    pck_threshold: float = 0.2
    """pck: share of the reference length within which a joint is correct."""
    pck_reference: Literal["auto", "torso", "box"] = "auto"
    """pck: what is its reference length, the person's torso or its box's longer side; auto: the torso, where the
    skeleton has one."""
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
class DiagnoseConfig:
    """Tell where poses fail: jitter, inversions, misses, swaps, background, scores, and the AP that each costs."""

    annotations: File
    """COCO-keypoint JSON with the truth."""
    predictions: File
    """COCO results JSON, such as `test` writes."""
    skeleton: SkeletonFile = "auto"
    """Packaged name or YAML file, for the sigmas and the mirror pairs; auto: from the annotation file's joints. Joints
    of the file that it lacks are not diagnosed."""
    out: OptionalFile = None
    """Folder for diagnosis.json and diagnosis.png; null writes nothing."""
    json: bool = False
    """Print one JSON object {"metrics", "protocol", "errors", "gains", "calibration", "background", "by"} instead of
    tables."""


@dataclass(frozen=True)
class PredictConfig:
    """Draw predicted skeletons on pictures or a video, and write the poses."""

    checkpoint: list[File] | File
    """Hand-off file (export/model.safetensors) of a pose model, or a list of them: the mean of their heatmaps. A
    single-stage model (head cir) goes alone, and finds the persons itself."""
    images: list[File] | File
    """A picture, a folder of pictures (looked through recursively), a pattern ('frames/*.jpg', ** for any depth), or a
    list of these; or a video file."""
    out: File
    """Folder for predictions.json, overview.jpg, and pictures/ or the video, .mp4 or .avi."""
    boxes: OptionalFile = None
    """JSON with the persons' boxes: COCO (images, annotations) or a list of {file_name, bbox, score}, with file names
    relative to `images`; pictures without a box are left out. Of a video a list of {image_id, bbox, score}, or COCO,
    whose image_id is the frame, from 0. Null: those of `detector`, or the whole picture is one person's box, or all
    persons that a single-stage model finds, which takes no boxes."""
    detector: (
        Literal["fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_320_fpn"]
        | None
    ) = None
    """Detector of torchvision that finds the persons' boxes; null: none."""
    detector_weights: OptionalFile = None
    """Its state dict, .pth or .safetensors; null: torchvision's COCO weights, downloaded at first use."""
    box_threshold: float | None = None
    """Boxes scored below this are left out; null: 0.5 of a detector's, of a file's none."""
    joint_threshold: float = 0.2
    """Joints scored below this are not drawn; those of a single-stage model have their pose's score."""
    show_confidence: bool = True
    """Draw joints and limbs the fainter, the lower they are scored, and write a pose's score above it."""
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int = 8
    """Persons, or whole pictures of a single-stage model, per forward pass. Up to about four times as many pictures are
    held in memory."""
    max_unreadable: float = 0.01
    """Share of the pictures or frames that may be unreadable; with more the rest is done too, and the command fails."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        at_least = {"threads": (0, math.inf), "batch_size": (1, math.inf)}
        check_ranges(self, {**at_least, "max_unreadable": (0, 1)})
        for name in ("checkpoint", "images"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, expected at least one path")
        if self.boxes is not None and self.detector is not None:
            raise ValueError("boxes and detector are both given; leave one out")
        if self.detector_weights is not None and self.detector is None:
            raise ValueError("detector_weights is given without detector; name the detector that they are of")
        if self.box_threshold is not None and self.boxes is None and self.detector is None:
            raise ValueError("box_threshold is given without boxes or detector; give one of them, or leave it out")


@dataclass(frozen=True)
class ReportConfig:
    """Write one page about runs, to be read without a network: metrics, curves, errors, pictures, what differs.

    `python -m evaluation report RUN... --out FILE.html` names the runs without --runs.
    """

    runs: list[File]
    """Run directories, whose evaluations lie in RUN/evaluation/ (`evaluation test --out RUN/evaluation`) or belong to
    the same launch; or folders of an evaluation; or a launch's folder, which stands for all of its runs."""
    out: File
    """The page, FILE.html."""
    annotations: OptionalFile = None
    """COCO-keypoint JSON with the truth of the evaluations: each is diagnosed that holds no diagnosis.json yet."""
    images: OptionalFile = None
    """Folder that the JSON's file names are relative to: persons found best, worst and in between are shown."""
    skeleton: SkeletonFile = "auto"
    """With annotations: packaged name or YAML file, for the sigmas; auto: from the annotation file's joints."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty, expected at least one run directory")
        if self.annotations is None and (self.images is not None or self.skeleton != "auto"):
            raise ValueError(
                "images and skeleton want annotations, the truth of the evaluations; give it or leave them out"
            )


@dataclass(frozen=True)
class VisualizeConfig:
    """Draw one of the figures below: the papers', and what shows where a model fails.

    It is written as its name says, FIGURE.png.
    """

    figure: Literal[
        "gradcam",
        "losses",
        "scores",
        "quality",
        "features",
        "masked",
        "search",
        "side_by_side",
        "errors",
        "teacher",
    ]
    """gradcam: the heat of each checkpoint over pictures (MSCL, Fig. 3); losses: over epochs, in all and per level
    (Fig. 4); scores: predicted score against true OKS (CIR, Fig. 5); quality: pictures with their poses, score and true
    OKS beside each (Fig. 1); features: what the context mixers make of persons, of other heads the map that their last
    layer reads (CCM, Fig. 12); masked: poses where joints or half the body are painted over (Fig. 13 and 14); search:
    the way of a distal joint over the loss that SCIO's search lowers; side_by_side: the poses of several models for the
    same persons (ICON, Fig. 4 and 7); errors: the worst persons, with the kind of error of each joint; teacher: how
    much a teacher of `semi` teaches, and how sure it is, over the steps."""
    out: File
    """Folder for FIGURE.png."""
    checkpoints: list[File] = field(default_factory=list)
    """gradcam: hand-off files of `pretrain linear`, a column each; features, masked, search: that of one top-down pose
    model."""
    images: OptionalFile = None
    """gradcam: a picture, or a folder of pictures (looked through recursively); quality, features, masked, search,
    side_by_side, errors: folder that the file names of `annotations` are relative to."""
    count: int = 8
    """gradcam: pictures of a folder, evenly spread over its sorted files; quality: images, evenly spread over those
    with a person; features, masked, search: persons, evenly spread over those that can be shown; side_by_side, errors:
    persons."""
    target: str | None = None
    """gradcam: the class to explain; null: the one that a checkpoint takes the picture for."""
    runs: list[File] = field(default_factory=list)
    """losses, teacher: run directories, a line each."""
    annotations: OptionalFile = None
    """All but gradcam, losses and teacher: COCO-keypoint JSON with the truth."""
    predictions: list[File] = field(default_factory=list)
    """scores, quality, side_by_side: COCO results JSON, such as `test` writes, a panel or a column each; errors: one
    alone."""
    skeleton: SkeletonFile = "auto"
    """scores, quality, side_by_side, errors: packaged name or YAML file, for the sigmas; auto: from the annotation
    file's joints."""
    choose: Literal["difference", "even"] = "difference"
    """side_by_side: the persons whose poses differ most in how well they fit, or persons evenly spread over all."""
    hide: list[str] = field(default_factory=list)
    """masked: what is painted over, a column each: a joint, several (left_knee+left_ankle), or half the body (upper,
    lower)."""
    decoding: Decoding = field(default_factory=Decoding)
    """features, masked, search: how poses are decoded."""
    seed: int = 0
    """scores: of the poses that are drawn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """gradcam, features, masked, search: auto takes a GPU where there is one."""
    threads: int = 0
    """gradcam, features, masked, search: CPU threads of torch; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        of_checkpoint = ("features", "masked", "search")
        of_persons = (*of_checkpoint, "side_by_side", "errors")
        of_predictions = ("scores", "quality", "side_by_side", "errors")
        wanted = {
            "checkpoints": ("gradcam", *of_checkpoint),
            "images": ("gradcam", "quality", *of_persons),
            "runs": ("losses", "teacher"),
            "annotations": ("scores", "quality", *of_persons),
            "predictions": of_predictions,
            "hide": ("masked",),
        }
        for name, figures in wanted.items():
            belongs = self.figure in figures
            if bool(getattr(self, name)) != belongs:
                problem = "is missing" if belongs else f"is of figure {_either(figures)}; leave it out"
                raise ValueError(f"figure {self.figure}: {name} {problem}")
        allowed = {
            "target": (self.target, None, ("gradcam",)),
            "skeleton": (self.skeleton, "auto", of_predictions),
            "choose": (self.choose, "difference", ("side_by_side",)),
            "decoding": (self.decoding, Decoding(), of_checkpoint),
        }
        for name, (value, default, figures) in allowed.items():
            if value != default and self.figure not in figures:
                raise ValueError(f"figure {self.figure}: {name} is of figure {_either(figures)}; leave it out")
        if self.figure in of_checkpoint and len(self.checkpoints) > 1:
            raise ValueError(f"figure {self.figure}: checkpoints names {len(self.checkpoints)} files, expected one")
        if self.figure == "errors" and len(self.predictions) > 1:
            raise ValueError(f"figure errors: predictions names {len(self.predictions)} files, expected one")
        if self.figure == "side_by_side" and len(self.predictions) < 2:
            raise ValueError("figure side_by_side: predictions names 1 file, expected two or more to compare")
        for name, values in {"predictions": self.predictions, "hide": self.hide}.items():
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"{name} names {value} twice")
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


def _either(names: tuple[str, ...]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
