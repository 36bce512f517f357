"""`python -m poserelay export-model`: a pose model as one graph from pixels to joints, for ONNX Runtime or torch alone.

The graph is traced from the code that predicts (`inference`, `whole_images`), so that there is one decoding.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .batch import PyramidBatch
from .checkpoint import read_export, verify_handoff
from .config import Decoding, ExportModelConfig
from .datasets.fullimage import pyramid
from .datasets.sampling import read_image
from .datasets.topdown import warp
from .datasets.unlabelled import list_images
from .errors import CheckFailed, UserError
from .geometry import box_to_affine
from .heads import CCMHead
from .inference import crop_joints, crop_maps, flip_shift
from .model import PoseModel, SingleStageModel, load_model
from .run import write_atomic
from .whole_images import poses_of

OPSET = 18
"""Of ONNX: the one that torch's exporter writes; the first with all that the decoding needs is 16."""
CHECKED = 16
"""Crops of each kind on which a graph is compared with its model."""
NEAR = 0.05
"""Input pixels. Rounding moves a joint by less, unless it decides between two peaks, pixels or steps that are equal."""
EQUALS = 0.02
"""Share of the joints where rounding may decide; more is a wrong graph."""
SCORES = 1e-3
"""How far a score may be from the model's, as a share of the largest."""


class CropGraph(nn.Module):
    """Crops `[B, 3, H, W]`, uint8 RGB, to joints `[B, K, 2]` in pixels of the crop, and their scores `[B, K]`."""

    inputs = ("images",)

    def __init__(self, model: PoseModel, decoding: Decoding) -> None:
        super().__init__()
        self.model = model
        self.decoding = decoding

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `inference.predict_crops`, before the way back to the picture."""
        found = crop_maps(self.model, images, self.decoding)
        return crop_joints(self.model, images.shape[-2:], found, self.decoding)[:2]


class ImageGraph(nn.Module):
    """Images `[B, 3, H, W]`, uint8 RGB, and their sizes without padding, `[B, 2]` int64 (height, width), to N poses
    each: joints `[B, N, K, 2]` in pixels of the input, and scores `[B, N]`, best first, -inf where there is no pose."""

    inputs = ("images", "sizes")

    def __init__(self, model: SingleStageModel, decoding: Decoding) -> None:
        super().__init__()
        self.model = model
        self.decoding = decoding

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """As `whole_images.find_poses`, for images that have the input's size."""
        affine = torch.eye(2, 3, device=images.device).expand(images.shape[0], 2, 3)
        found = poses_of(self.model, PyramidBatch([images], [affine], sizes.float(), []), self.decoding)
        return found.keypoints, found.scores


class Difference(NamedTuple):
    """How far a graph's answers are from its model's."""

    joints: int
    """That were compared."""
    pixels: float
    """Largest distance of a joint, input pixels, of those within NEAR."""
    elsewhere: int
    """Joints beyond NEAR."""
    scores: float
    """Largest difference of a score, of crops at the joints within NEAR."""
    highest: float
    """Largest score, positive or negative."""

    def __str__(self) -> str:
        ties = f" but {self.elsewhere} (between equals rounding decides)" if self.elsewhere else ""
        return f"{self.joints} joints within {self.pixels:.1g} px{ties}, scores within {self.scores:.1g}"


Inputs = tuple[Tensor, ...]
Runner = Callable[[Inputs], Sequence[np.ndarray]]


def main(config: ExportModelConfig) -> None:
    """Trace a graph, check it, write it, and say what it takes and gives."""
    path, out = Path(config.checkpoint), Path(config.out)
    if os.path.lexists(out):
        raise UserError(f"out {out}: is already there; name a new file")
    if config.checkpoint.startswith("["):
        raise UserError(f"checkpoint {config.checkpoint}: a graph is of one hand-off file, not an ensemble; name one")
    as_onnx = out.suffix == ".onnx"
    if as_onnx:
        onnx_packages()
    sha256 = verify_handoff(path)
    graph = graph_of(load_model(path), config.decoding)
    checked = {"noise": list(_noise(graph))}
    if config.images is not None:
        checked["pictures"] = list(_pictures(graph, config.images))
    described = describe_graph(graph, read_export(path)[1], sha256)
    for line in _lines(graph, described):
        print(line, flush=True)
    program = trace(graph)
    content = to_onnx(graph, program, described) if as_onnx else to_program(program, described)
    run = run_onnx(graph, content) if as_onnx else run_program(content)
    for kind, batches in checked.items():
        found = compare(graph, run, batches)
        _refuse(graph, found, kind)
        print(f"checked      {sum(len(images) for images, *_ in batches)} inputs of {kind}: {found}")
    write_atomic(out, lambda temporary: temporary.write_bytes(content))
    kind = f"ONNX, opset {OPSET}" if as_onnx else f"torch.export of torch {torch.__version__}"
    print(f"wrote        {out}: {kind}, {len(content) / 1e6:.1f} MB")


def graph_of(model: PoseModel | SingleStageModel, decoding: Decoding) -> CropGraph | ImageGraph:
    """The module that becomes a graph; what only training needs is taken off the model.

    Raises:
        UserError: an ensemble, several scales, or weights that are not finite.
    """
    if damaged := [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]:
        raise UserError(f"{damaged[0]} of the model holds NaN or infinity; give a checkpoint that did not diverge")
    if isinstance(model, SingleStageModel):
        if decoding.whole.scales != (1.0,):
            raise UserError(
                f"decoding.whole.scales is {list(decoding.whole.scales)}; a graph sees an image at one scale: leave it "
                "out, or run the graph on the image at each"
            )
        return ImageGraph(model, decoding).eval()
    if not isinstance(model, PoseModel):
        raise UserError("an ensemble has several models, and a graph is one; export them one by one")
    if isinstance(model.head, CCMHead):
        model.head.auxiliary = None
    if decoding.scio.output == "base":
        model.refiner = None
    return CropGraph(model, decoding).eval()


def trace(graph: CropGraph | ImageGraph) -> ExportedProgram:
    """`torch.export` of the graph, for any batch and, single-stage, any height and width that the strides divide."""
    batch = Dim("batch")
    size, shapes = graph.model.input, {0: batch}
    if isinstance(graph, ImageGraph):
        coarsest = max(graph.model.backbone.strides)
        # From two on: torch takes a length of one for a constant.
        shapes |= {2: coarsest * Dim("rows", min=2), 3: coarsest * Dim("columns", min=2)}
        # Each of another length, so that none is taken for another.
        size = replace(size, height=3 * coarsest, width=5 * coarsest)
    images = torch.zeros(2, 3, size.height, size.width, dtype=torch.uint8)
    given: Inputs = (images,)
    dynamic: tuple[Any, ...] = (shapes,)
    if isinstance(graph, ImageGraph):
        given, dynamic = (images, torch.tensor([[size.height, size.width]] * 2)), (shapes, {0: batch})
    with torch.no_grad():
        program = torch.export.export(graph, given, dynamic_shapes=dynamic)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            # Names files of the machine that exports.
            node.meta.pop("stack_trace", None)
    return program


def describe_graph(graph: CropGraph | ImageGraph, handoff: dict[str, Any], sha256: str) -> dict[str, Any]:
    """What the graph's file says of itself under the key `poserelay`.

    handoff: the metadata of the hand-off file; sha256: that file's.
    """
    model, decoding = graph.model, graph.decoding
    shift = None
    kept: dict[str, Any] = {"flip": decoding.flip}
    if isinstance(graph, CropGraph):
        if decoding.flip:
            shift = flip_shift(decoding, model.input.alignment, model.stride)
        kept |= {"refine": decoding.refine, "blur": decoding.blur, "flip_shift": shift}
        if model.refiner is not None:
            kept["scio"] = asdict(decoding.scio)
    else:
        kept |= {"max_poses": decoding.whole.max_poses, "score_threshold": decoding.whole.score_threshold}
    return {
        "format": 1,
        "checkpoint_sha256": sha256,
        "decoding": kept,
        "model": {name: handoff[name] for name in ("stage", "method", "backbone", "head", "refiner")},
        "skeleton": model.skeleton.to_dict(),
        "input": handoff["input"],
        "multiple": max(model.backbone.strides) if isinstance(graph, ImageGraph) else None,
    }


def onnx_packages() -> None:
    """Import what ONNX needs. UserError where it is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"out: ONNX needs the package {error.name}, which is not installed: pip install onnx onnxscript "
            "onnxruntime (the extra poserelay[onnx]), or write a .pt2, which needs torch alone"
        ) from error


def to_onnx(graph: CropGraph | ImageGraph, program: ExportedProgram, described: dict[str, Any]) -> bytes:
    """One ONNX file, weights inside, with `described` as JSON under the metadata key `poserelay`."""
    from onnxscript import optimizer

    names: dict[str, Any] = {name: {0: "batch"} for name in graph.inputs}
    if isinstance(graph, ImageGraph):
        names["images"] |= {2: "height", 3: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=graph.inputs,
            output_names=("keypoints", "scores"),
            dynamic_shapes=names,
            # Its rewriting takes minutes for a search, and what it fuses the runtimes fuse too.
            optimize=False,
            verbose=False,
        )
    optimizer.fold_constants(made.model)
    optimizer.remove_unused_nodes(made.model)
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # where in torch's and our code each was made
    made.model.metadata_props["poserelay"] = json.dumps(described, sort_keys=True)
    return made.model_proto.SerializeToString(deterministic=True)


def to_program(program: ExportedProgram, described: dict[str, Any]) -> bytes:
    """The file of `torch.export.save`, with `described` as its extra file poserelay.json."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"poserelay.json": json.dumps(described, sort_keys=True)})
    return file.getvalue()


def run_onnx(graph: CropGraph | ImageGraph, content: bytes) -> Runner:
    """What ONNX Runtime makes of the file, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Sequence[np.ndarray]:
        given = {name: tensor.numpy() for name, tensor in zip(graph.inputs, inputs, strict=True)}
        return [np.asarray(found) for found in session.run(["keypoints", "scores"], given)]

    return run


def run_program(content: bytes) -> Runner:
    """What torch makes of the file."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(inputs: Inputs) -> Sequence[np.ndarray]:
        with torch.no_grad():
            return [found.numpy() for found in module(*inputs)]

    return run


def compare(graph: CropGraph | ImageGraph, run: Runner, batches: Iterable[Inputs]) -> Difference:
    """The answers of `run` beside those of the model that it was traced from, over all batches."""
    moved, lower, highest = [np.zeros(0)], [np.zeros(0)], 0.0
    for inputs in batches:
        with torch.no_grad():
            keypoints, scores = (found.numpy().astype(np.float64) for found in graph(*inputs))
        theirs, their_scores = run(inputs)
        ours, others = ~np.isneginf(scores), ~np.isneginf(their_scores)
        both = ours & others
        distances = np.linalg.norm(keypoints - theirs, axis=-1)
        if isinstance(graph, ImageGraph):
            # A pose that one of them finds alone has a score beside the threshold: its joints are elsewhere.
            distances = np.where(both[..., None], distances, np.inf)[ours | others]
        else:
            both &= distances <= NEAR  # a verification score belongs to its place
        moved.append(np.nan_to_num(distances, nan=np.inf).ravel())
        lower.append(np.nan_to_num(np.abs(scores[both] - their_scores[both]), nan=np.inf))
        highest = max(highest, np.abs(scores[both]).max(initial=0))
    distance = np.concatenate(moved)
    near = distance[distance <= NEAR]
    return Difference(
        joints=len(distance),
        pixels=float(near.max(initial=0)),
        elsewhere=len(distance) - len(near),
        scores=float(np.concatenate(lower).max(initial=0)),
        highest=float(highest),
    )


def _refuse(graph: CropGraph | ImageGraph, found: Difference, inputs: str) -> None:
    """Raise CheckFailed where a graph differs from its model by more than rounding."""
    share, refiner = EQUALS, graph.model.refiner
    if refiner is not None and graph.decoding.scio.output == "optimisation":
        # Each step is taken or not: one that hardly lowers the loss is decided by its last digits, and so is the rest.
        share = max(share, 0.5 * len(refiner.groups) / len(graph.model.skeleton.joints))
    if found.elsewhere > max(1, share * found.joints) or not found.scores <= SCORES * max(found.highest, 1e-3):
        raise CheckFailed(
            f"the graph is not the model on {inputs}: {found}; nothing was written. Try the other of .onnx and .pt2, "
            "or other versions of onnxscript, onnxruntime and torch"
        )


def _noise(graph: CropGraph | ImageGraph) -> Iterator[Inputs]:
    """Random pixels, alone and in larger squares, in batches of several lengths and, single-stage, sizes."""
    generator = torch.Generator().manual_seed(0)
    size = graph.model.input
    for count, square in ((1, 1), (3, 16), (CHECKED - 4, 4)):
        height, width = size.height, size.width
        if isinstance(graph, ImageGraph):
            coarsest = max(graph.model.backbone.strides)
            height, width, count = 2 * coarsest * count, 3 * coarsest, min(count, 3)
        cells = (math.ceil(height / square), math.ceil(width / square))
        drawn = torch.randint(0, 256, (count, 3, *cells), dtype=torch.uint8, generator=generator)
        images = drawn.repeat_interleave(square, -2).repeat_interleave(square, -1)[..., :height, :width].contiguous()
        if isinstance(graph, CropGraph):
            yield (images,)
        else:
            yield images, torch.tensor([[height - 5, width - 9]] * count)


def _pictures(graph: CropGraph | ImageGraph, folder: str) -> Iterator[Inputs]:
    """Pictures spread evenly through a folder, each whole. Raises UserError as `list_images` and `read_image`."""
    paths = list_images(folder)
    size = graph.model.input
    for path in paths[:: max(1, len(paths) // CHECKED)][:CHECKED]:
        picture = read_image(path)
        height, width = picture.shape[:2]
        if isinstance(graph, CropGraph):
            affine = box_to_affine([0, 0, width, height], (size.height, size.width), alignment=size.alignment)
            yield (torch.from_numpy(warp(picture, affine, (size.height, size.width)))[None],)
        else:
            record = pyramid(picture, size.height, (1.0,), 0)
            rows, columns = record.affine[0][1, 1] * height, record.affine[0][0, 0] * width
            yield torch.from_numpy(record.images[0])[None], torch.tensor([[round(rows), round(columns)]])


def _lines(graph: CropGraph | ImageGraph, described: dict[str, Any]) -> Iterator[str]:
    model = graph.model
    parts = [f"{model.config.backbone.name} {model.config.backbone.kwargs or ''}".rstrip()]
    parts += [part.name for part in (model.config.head, described["model"]["refiner"] and model.config.refiner) if part]
    joints, size = len(model.skeleton.joints), model.input
    yield f"model        {', '.join(parts)}; {joints} joints of {model.skeleton.name}"
    if isinstance(graph, CropGraph):
        yield f"input        images uint8 [batch, 3, {size.height}, {size.width}], RGB"
        yield f"output       keypoints [batch, {joints}, 2] in pixels of the input, scores [batch, {joints}]"
    else:
        multiple = described["multiple"]
        yield f"input        images uint8 [batch, 3, height, width], RGB; sides {2 * multiple}, {3 * multiple}, ..."
        yield "             sizes int64 [batch, 2], height and width of each image without padding"
        yield f"output       keypoints [batch, poses, {joints}, 2] in pixels of the input"
        yield "             scores [batch, poses], best first, -inf where there is no pose; before the OKS-NMS"
    told = {**described["decoding"], **({"scio": graph.decoding.scio.output} if model.refiner is not None else {})}
    yield "decoding     " + ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)
