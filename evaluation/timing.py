"""`python -m evaluation timing`: milliseconds per person of the network, of decoding and of scoring (CCM, Table 9)."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from poserelay.batch import CropBatch
from poserelay.checkpoint import verify_handoff
from poserelay.command import to_plain
from poserelay.config import Decoding
from poserelay.datasets.coco import CocoAnnotations, Detections, read_coco, read_detections
from poserelay.datasets.topdown import TopDownDataset
from poserelay.distributed import start
from poserelay.ensemble import Ensemble, load_models
from poserelay.inference import (
    Poses,
    crop_batches,
    decode_crops,
    forward_crops,
    predict_batches,
    rescore,
    suppress,
    to_results,
)
from poserelay.model import PoseModel
from poserelay.run import write_json
from poserelay.scoring import oks_metrics, order_of_file, parsed_truth, scored_truth, sigma_source

from .config import TimingConfig

CPUINFO = Path("/proc/cpuinfo")
PARTS = {"forward": "network forward", "coordinates": "map -> coordinates", "evaluation": "evaluation"}


class Times(NamedTuple):
    """Seconds of one pass over the persons."""

    forward: float
    """Normalising the crops and the network, on the mirrored crops too where the decoding flips."""
    coordinates: float
    """From heatmaps to the poses that the NMS leaves, in image pixels."""
    evaluation: float
    """From these poses to OKS AP."""


@dataclass(frozen=True)
class Persons:
    """What is timed: crops on the model's device, and what is needed to score them."""

    batches: list[CropBatch]
    blank: Poses
    """`predict_batches` of the crops: their boxes, areas and ids stay, the rest is replaced in every pass."""
    box_scores: np.ndarray
    """`[N]`."""
    truth: dict[str, Any]
    """The parsed COCO file, with only the images of the crops and the joints that the model has."""
    category_id: int
    order: list[int]
    """For each joint that is scored its index in the model's."""


def main(config: TimingConfig) -> dict[str, Any]:
    """Print, write and return {"metrics", "protocol"}: for each decoding the mean and deviation of each part.

    The crops are read before anything is timed. In every run the decodings take turns, so that what slows the machine
    for a while does not fall on one of them; a first run of all is thrown away.

    Raises UserError for input that cannot be used and for a picture that cannot be read, CheckFailed for heatmaps that
    are not finite.
    """
    paths = [config.checkpoint] if isinstance(config.checkpoint, str) else config.checkpoint
    sha256 = [verify_handoff(path) for path in paths]
    annotations = read_coco(config.annotations)
    detections = None if config.boxes == "gt" else read_detections(config.boxes, annotations, config.box_threshold)
    model = load_models(paths).to(start(config.device, "fp32", config.threads).device)
    dataset = first_persons(annotations, detections, model, config)
    persons = read_persons(dataset, model, config)

    passes: dict[str, list[Times]] = {label(decoding): [] for decoding in config.decodings}
    for decoding in tqdm([*config.decodings] * (1 + config.repeats), "time", unit="pass", leave=False, disable=None):
        passes[label(decoding)].append(timed_pass(model, persons, decoding)[0])
    report = {
        "metrics": {name: per_person(times[1:], len(dataset)) for name, times in passes.items()},
        "protocol": {
            "unit": "ms per person",
            "split": annotations.path.stem,
            "boxes": config.boxes if config.boxes == "gt" else Path(config.boxes).name,
            "box_threshold": None if config.boxes == "gt" else config.box_threshold,
            "persons": len(dataset),
            "images": len(persons.truth["images"]),
            "batch_size": config.batch_size,
            "repeats": config.repeats,
            "networks": networks(model),
            "skeleton": sigma_source(model.skeleton),
            "input": f"{model.input.height}x{model.input.width}",
            "heatmap": "x".join(map(str, model.heatmap_size)),
            "device": device_name(persons.batches[0].images.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "sha256": sha256[0] if len(sha256) == 1 else sha256,
            "decodings": {label(decoding): to_plain(decoding) for decoding in config.decodings},
        },
    }
    if config.out is not None:
        write_json(Path(config.out) / "timing.json", report)
    print(json.dumps(report) if config.json else format_table(report))
    return report


def first_persons(
    annotations: CocoAnnotations, detections: Detections | None, model: PoseModel | Ensemble, config: TimingConfig
) -> TopDownDataset:
    """The crops of as many of the first images as hold at most `count` persons.

    Images are taken whole, since their persons meet in the NMS; only a first one that holds more is cut.
    Raises UserError where there is no person, or a picture is missing.
    """
    image_index = annotations.image_index[annotations.persons] if detections is None else detections.image_index
    fitting = np.flatnonzero(np.bincount(image_index).cumsum() <= config.count)
    rows = np.flatnonzero(np.isin(image_index, fitting))
    if not len(rows):
        rows = np.flatnonzero(image_index == image_index.min(initial=len(annotations.image_ids)))[: config.count]
    if detections is not None:
        detections = replace(
            detections, image_index=image_index[rows], boxes=detections.boxes[rows], scores=detections.scores[rows]
        )
    return TopDownDataset(
        annotations,
        config.images,
        model.skeleton,
        (model.input.height, model.input.width),
        detections=detections,
        alignment=model.input.alignment,
        rows=annotations.persons[rows] if detections is None else None,
    )


def read_persons(dataset: TopDownDataset, model: PoseModel | Ensemble, config: TimingConfig) -> Persons:
    """The crops on the model's device, with what their poses are scored by.

    Raises UserError where the file has none of the model's joints, UnreadableImage for a picture that cannot be read,
    CheckFailed as `predict_crops`.
    """
    truth = scored_truth(dataset.annotations, model.skeleton)
    device = next(model.parameters()).device
    read = crop_batches(dataset, config.batch_size, config.workers, device.type == "cuda")
    batches = [batch.to(device) for batch in read]
    blank = predict_batches(model, batches, config.decodings[0])
    data, shown = parsed_truth(truth), set(blank.image_ids)
    return Persons(
        batches=batches,
        blank=blank,
        box_scores=torch.cat([batch.scores for batch in batches]).cpu().numpy(),
        truth={
            **data,
            "images": [image for image in data["images"] if image["id"] in shown],
            "annotations": [person for person in data["annotations"] if person["image_id"] in shown],
        },
        category_id=dataset.annotations.category["id"],
        order=order_of_file(model.skeleton, truth.common.joints),
    )


def timed_pass(model: PoseModel | Ensemble, persons: Persons, decoding: Decoding) -> tuple[Times, Poses]:
    """What `evaluation test` does with crops, timed; and the poses that are left, of the joints that are scored.

    Raises UserError where the images show no labelled person, CheckFailed as `decode_crops`.
    """
    device = persons.batches[0].images.device
    forward = coordinates = 0.0
    found = []
    for batch in persons.batches:
        begun = now(device)
        maps = forward_crops(model, batch, decoding)
        computed = now(device)
        found.append(decode_crops(model, batch, maps, decoding)[:2])
        forward += computed - begun
        coordinates += now(device) - computed
    begun = now(device)
    keypoints, joint_scores = (torch.cat(parts).double().numpy() for parts in zip(*found, strict=True))
    scores = rescore(persons.box_scores, joint_scores, decoding.rescore_threshold)
    poses = replace(persons.blank, keypoints=keypoints, joint_scores=joint_scores, scores=scores)
    kept = suppress(poses.joints(persons.order), [model.skeleton.sigmas[joint] for joint in persons.order], decoding)
    placed = now(device)
    oks_metrics(persons.truth, to_results(kept, persons.category_id), model.skeleton)
    return Times(forward, coordinates + placed - begun, now(device) - placed), kept


def now(device: torch.device) -> float:
    """Seconds of the clock once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def per_person(times: Sequence[Times], persons: int) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation of each part over the passes, ms per person; None of a single pass."""
    milliseconds = {part: [1000 * getattr(time, part) / persons for time in times] for part in PARTS}
    return {
        part: {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for part, values in milliseconds.items()
    }


def label(decoding: Decoding) -> str:
    """The refinement, and every other field that is not at its default: no two decodings share one."""
    plain, default = to_plain(decoding), to_plain(Decoding())
    scio = {f"scio.{name}": (value, default["scio"][name]) for name, value in plain.pop("scio").items()}
    fields = {name: (value, default[name]) for name, value in plain.items() if name != "refine"} | scio
    given = [f"{name} {value}" for name, (value, usual) in fields.items() if value != usual]
    return ", ".join([decoding.refine, *given])


def networks(model: PoseModel | Ensemble) -> list[str]:
    """Backbone and head of the model, or of each of an ensemble's."""
    members: Any = model.members if isinstance(model, Ensemble) else [model]
    named = [(member.config.backbone, member.config.head) for member in members]
    return [f"{backbone.kwargs.get('model', backbone.name)} {head.name}" for backbone, head in named]


def device_name(device: torch.device) -> str:
    """What the GPU, or else the processor, is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def format_table(report: dict[str, Any]) -> str:
    """A row per decoding, a column per part, and the protocol under them."""

    def shown(part: dict[str, float | None]) -> str:
        return f"{part['mean']:.3f}" + ("" if part["std"] is None else f" ± {part['std']:.3f}")

    rows = [["ms per person", *PARTS.values()]]
    rows += [[name, *(shown(parts[part]) for part in PARTS)] for name, parts in report["metrics"].items()]
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{first}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        for name, *cells in rows
    ]
    hidden = ("unit", "sha256", "decodings")
    told = (f"{name} {v}" for name, v in report["protocol"].items() if v is not None and name not in hidden)
    return "\n".join([*lines, f"({', '.join(told)})"])
