"""`python -m evaluation scio`: what SCIO does about distal joints (Kan et al., ECCV 2022: Table 5, Fig. 2, 5 and 6)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from poserelay.batch import CropBatch
from poserelay.checkpoint import verify_handoff
from poserelay.config import Decoding
from poserelay.datasets.coco import read_coco, read_json
from poserelay.datasets.sampling import draw_generator, evenly
from poserelay.datasets.topdown import TopDownDataset
from poserelay.distributed import start
from poserelay.errors import UserError
from poserelay.geometry import apply_affine, invert_affine
from poserelay.heatmaps import heatmap_to_input, input_to_heatmap
from poserelay.inference import CropMaps, crop_batches, decode_crops, forward_crops, protocol, self_constraint
from poserelay.local_search import search_distal
from poserelay.model import PoseModel, load_top_down
from poserelay.run import write_atomic, write_json

from .config import ScioConfig
from .joint_accuracy import joint_means, joint_terms, oks_areas
from .reliance import Distal, annotated_crops, displaced, networks_of, true_distal
from .scio_figures import PAPER, draw_before_after, draw_correlation, draw_joints, draw_planted, draw_search, signed

OUTPUTS = ("base", "learning", "optimisation")
QUANTILES = (10, 25, 50, 75, 90)


class Measured(NamedTuple):
    """What was found about N persons with K joints and G groups, over S steps of the search."""

    poses: dict[str, np.ndarray]
    """By output `[N, K, 2]`, image pixels."""
    scores: np.ndarray
    """`[N, K]`, heights of the head's own peaks."""
    errors: dict[str, np.ndarray]
    """By output `[N, K]`, heatmap pixels; of no meaning where a joint is not labelled."""
    sampled: np.ndarray
    """`[N, G]` bool: D is labelled and on the map, and the group's proximal joints are confident."""
    losses: np.ndarray
    """`[S + 1, N, G]`, self-constraint loss along the search from where the prediction networks find D."""
    accuracy: np.ndarray
    """`[S + 1, N, G]`, of D there."""
    off_losses: np.ndarray
    """`[N, G]`, with the true D displaced by 0 to the largest planted error."""
    off_accuracy: np.ndarray
    """`[N, G]`, there."""
    before: np.ndarray
    """`[N, G]`, planted errors, heatmap pixels."""
    after: np.ndarray
    """`[N, G]`, what the search leaves of them."""


class Persons(NamedTuple):
    """The labels of N persons, and the errors that are made of them."""

    keypoints: np.ndarray
    """`[N, K, 2]`, image pixels."""
    areas: np.ndarray
    """`[N]`, image pixels squared."""
    distal: np.ndarray
    """`[N, G, 2]`, the true distal joints, heatmap pixels."""
    inside: np.ndarray
    """`[N, G]` bool: see `Distal`."""
    planted: np.ndarray
    """`[N, G, 2]`, distal joints displaced as far as planted errors are, heatmap pixels."""
    displaced: np.ndarray
    """`[N, G, 2]`, displaced by 0 to the largest planted error, heatmap pixels."""


class Frame:
    """Between heatmap and image pixels, for the crops of a batch."""

    def __init__(self, model: PoseModel, batch: CropBatch) -> None:
        self._affine = batch.affine.cpu().double().numpy()
        self._sizes: Any = ((model.input.height, model.input.width), model.heatmap_size, model.input.alignment)

    def to_heatmap(self, xy: np.ndarray) -> Tensor:
        """Points `[B, M, 2]` from image to heatmap pixels, float64."""
        return input_to_heatmap(torch.from_numpy(apply_affine(self._affine, xy)), *self._sizes)

    def to_image(self, xy: Tensor) -> np.ndarray:
        """Points `[B, M, 2]` from heatmap to image pixels, float64."""
        placed = heatmap_to_input(xy.cpu().double(), *self._sizes).numpy()
        return apply_affine(invert_affine(self._affine), placed)


def main(config: ScioConfig) -> dict[str, Any]:
    """Write `out`/scio.json and the pictures; print and return {"metrics", "protocol"}.

    Raises UserError for input that cannot be used and for a picture that cannot be read, CheckFailed for heatmaps that
    are not finite.
    """
    sha256 = verify_handoff(config.checkpoint)
    model = load_top_down(config.checkpoint)
    if model.refiner is None:
        raise UserError(
            f"{config.checkpoint}: carries no SCIO networks; give a model that was fine-tuned with model.refiner scio"
        )
    dataset = choose_persons(model, config)
    model = model.to(start(config.device, "fp32", config.threads).device)
    distal = true_distal(model, dataset)
    taken = np.isin(dataset.annotations.ids, np.array(dataset.annotation_ids))
    areas = oks_areas(dataset.annotations, read_json(Path(config.annotations)))[taken]

    measured = measure(model, dataset, distal, areas, config)
    if not measured.sampled.any():
        raise UserError(
            f"{config.annotations}: of {len(dataset)} persons no labelled distal joint is on the heatmap in a group "
            f"whose three others have peaks of {config.decoding.scio.proximal_threshold:g}; lower "
            "decoding.scio.proximal_threshold"
        )
    decoding = with_output(config.decoding, "optimisation")
    names = [model.skeleton.joints[joint] for joint in networks_of(model).distal.tolist()]
    report = {
        "metrics": summarise(measured, dataset, distal, areas, names),
        "protocol": {
            **protocol(dataset, decoding, refined=True),
            "scio": list(OUTPUTS),
            "instances": len(dataset),
            "distal_joints": int(distal.inside.sum()),
            "distal_joints_sampled": int(measured.sampled.sum()),
            "planted": list(config.planted),
            "seed": config.seed,
            "heatmap": "x".join(map(str, model.heatmap_size)),
            "sha256": sha256,
        },
    }
    out = Path(config.out)
    figures = {
        "joints.png": draw_joints(report["metrics"]["joints"]),
        "search.png": draw_search(report["metrics"]["search"], names),
        "correlation.png": draw_correlation(measured, report["metrics"]["correlation"], names, config.planted[1]),
        "planted.png": draw_planted(measured, report["metrics"]["planted"]),
        "before_after.jpg": draw_before_after(model, dataset, measured),
    }
    for name, figure in figures.items():
        save(figure, out / name)
    write_json(out / "scio.json", report)
    print(json.dumps(report) if config.json else format_table(report))
    print(f"{', '.join(['scio.json', *figures])} written to {out}", file=sys.stderr)
    return report


def choose_persons(model: PoseModel, config: ScioConfig) -> TopDownDataset:
    """Crops of `count` persons, spread evenly over those with a distal joint that is labelled and in the crop.

    Raises UserError where there is none.
    """
    annotations = read_coco(config.annotations)
    everyone = annotated_crops(model, annotations, config.images)
    candidates = annotations.persons[true_distal(model, everyone).inside.any(1)]
    if not len(candidates):
        names = ", ".join(group.distal for group in model.skeleton.groups)
        raise UserError(
            f"{config.annotations}: none of its {len(everyone)} persons has a labelled distal joint ({names}); take a "
            "file that labels them"
        )
    return annotated_crops(model, annotations, config.images, evenly(candidates, config.count))


def with_output(decoding: Decoding, output: Any, **changes: Any) -> Decoding:
    """The decoding with another `scio.output`, and other fields of `scio`."""
    return replace(decoding, scio=replace(decoding.scio, output=output, **changes))


def measure(
    model: PoseModel, dataset: TopDownDataset, distal: Distal, areas: np.ndarray, config: ScioConfig
) -> Measured:
    """Run the crops through the networks once, decode them as each output, and search from found and planted places.

    The errors are drawn for all persons beforehand, so that they do not depend on batches. areas: `[N]`, image pixels
    squared.
    """
    size, farthest = model.heatmap_size, config.planted[1]
    persons = Persons(
        keypoints=dataset.keypoints,
        areas=areas,
        distal=distal.xy,
        inside=distal.inside,
        planted=displaced(distal.xy, config.planted, size, draw_generator(config.seed, 0, 0, 0)),
        displaced=displaced(distal.xy, (0.0, farthest), size, draw_generator(config.seed, 0, 0, 1)),
    )
    model.eval()
    pinned = next(model.parameters()).device.type == "cuda"
    found: list[Measured] = []
    first = 0
    for batch in crop_batches(dataset, config.batch_size, config.workers, pinned, progress=True):
        here = Persons(*(values[first : first + len(batch)] for values in persons))
        found.append(measure_batch(model, batch, here, config.decoding))
        first += len(batch)
    return joined(found)


@torch.inference_mode()
def measure_batch(model: PoseModel, batch: CropBatch, persons: Persons, decoding: Decoding) -> Measured:
    """`measure` of the persons of one batch.

    The traces start where the prediction networks find D, whatever `decoding.scio.below` says.
    """
    networks, device = networks_of(model), next(model.parameters()).device
    columns = networks.distal.tolist()
    sigmas = [model.skeleton.sigmas[joint] for joint in columns]
    frame, batch = Frame(model, batch), batch.to(device)
    maps = forward_crops(model, batch, with_output(decoding, "optimisation"))
    decoded = {
        "base": decode_crops(model, batch, maps._replace(learned=None), with_output(decoding, "base")),
        "learning": decode_crops(model, batch, maps, with_output(decoding, "learning")),
        "optimisation": decode_crops(model, batch, maps, with_output(decoding, "optimisation")),
    }
    poses = {output: its.keypoints.double().numpy() for output, its in decoded.items()}
    begin, confident = search_starts(model, batch, maps, decoding)

    def placed(xy: np.ndarray) -> Tensor:
        return torch.from_numpy(xy).float().to(device)

    def accuracy(xy: Tensor) -> np.ndarray:
        distance = np.linalg.norm(frame.to_image(xy) - persons.keypoints[:, columns], axis=-1)
        return joint_terms(distance, persons.areas, sigmas)[0]

    constraint = self_constraint(model, maps, decoding)
    search = search_distal(constraint, begin, decoding.scio, model.stride)
    mended = search_distal(constraint, placed(persons.planted), decoding.scio, model.stride).xy
    off = placed(persons.displaced)
    truth = frame.to_heatmap(persons.keypoints)
    return Measured(
        poses=poses,
        scores=decoded["base"].scores.numpy(),
        errors={output: (frame.to_heatmap(xy) - truth).norm(dim=-1).numpy() for output, xy in poses.items()},
        sampled=persons.inside & confident,
        losses=search.losses.cpu().double().numpy(),
        accuracy=np.stack([accuracy(xy) for xy in search.positions]),
        off_losses=constraint.loss(off).cpu().double().numpy(),
        off_accuracy=accuracy(off),
        before=np.linalg.norm(persons.planted - persons.distal, axis=-1),
        after=np.linalg.norm(mended.cpu().double().numpy() - persons.distal, axis=-1),
    )


def search_starts(model: PoseModel, batch: CropBatch, maps: CropMaps, decoding: Decoding) -> tuple[Tensor, np.ndarray]:
    """Where the prediction networks find the distal joints, whatever `decoding.scio.below` says.

    Returns heatmap pixels `[B, G, 2]`, float32 on the model's device, and whether the group's proximal joints are
    confident, `[B, G]` bool.
    """
    columns = networks_of(model).distal.tolist()
    learned = decode_crops(model, batch, maps, with_output(decoding, "learning", below=None))
    assert learned.verification is not None
    begin = Frame(model, batch).to_heatmap(learned.keypoints.double().numpy())[:, columns]
    # By way of image pixels a peak at the map's edge comes back just outside, from where the search hardly moves.
    begin = begin.clamp(torch.zeros(2), torch.tensor(model.heatmap_size[::-1]) - 1)
    return begin.float().to(maps.maps.device), ~learned.verification[:, columns].isnan().numpy()


def joined(parts: Sequence[Measured]) -> Measured:
    """The batches as one."""

    def of(field: str, axis: int = 0) -> np.ndarray:
        return np.concatenate([getattr(part, field) for part in parts], axis)

    def by_output(field: str) -> dict[str, np.ndarray]:
        return {output: np.concatenate([getattr(part, field)[output] for part in parts]) for output in OUTPUTS}

    return Measured(
        poses=by_output("poses"),
        scores=of("scores"),
        errors=by_output("errors"),
        sampled=of("sampled"),
        losses=of("losses", 1),
        accuracy=of("accuracy", 1),
        off_losses=of("off_losses"),
        off_accuracy=of("off_accuracy"),
        before=of("before"),
        after=of("after"),
    )


def summarise(
    measured: Measured, dataset: TopDownDataset, distal: Distal, areas: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """The figures of scio.json. names: of the groups' distal joints, `[G]`.

    "joints": by joint what each output gives at its labels; the others are over the sampled distal joints.
    """
    sampled = measured.sampled
    samples = (sampled, measured.losses[0], measured.accuracy[0])
    off = (sampled, measured.off_losses, measured.off_accuracy)
    before, after = measured.before[sampled], measured.after[sampled]
    return {
        "joints": joints_of(measured, dataset, areas, names),
        "search": {
            "count": int(sampled.sum()),
            "loss": measured.losses[:, sampled].mean(1).tolist(),
            "accuracy": measured.accuracy[:, sampled].mean(1).tolist(),
            "groups": {
                name: {
                    "loss": measured.losses[:, rows, group].mean(1).tolist(),
                    "accuracy": measured.accuracy[:, rows, group].mean(1).tolist(),
                }
                for group, (name, rows) in enumerate(zip(names, sampled.T, strict=True))
                if rows.any()
            },
        },
        "correlation": {
            "found": correlations(*samples, names),
            "displaced": correlations(*off, names),
            "paper": PAPER,
        },
        "planted": {
            "before": distribution(before),
            "after": distribution(after),
            "reduced": float((after < before).mean()),
            "groups": {
                name: {
                    "before": float(measured.before[rows, group].mean()),
                    "after": float(measured.after[rows, group].mean()),
                }
                for group, (name, rows) in enumerate(zip(names, sampled.T, strict=True))
                if rows.any()
            },
            "count": len(before),
        },
    }


def joints_of(
    measured: Measured, dataset: TopDownDataset, areas: np.ndarray, distal: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each labelled joint {"distal", "count", and by output {"accuracy", "oks", "error"}}, means over its labels.

    error: heatmap pixels.
    """
    skeleton, labelled = dataset.skeleton, dataset.visibility > 0
    means = {
        output: joint_means(xy, dataset.keypoints, labelled, areas, skeleton.joints, skeleton.sigmas)
        for output, xy in measured.poses.items()
    }
    found = {}
    for joint, name in enumerate(skeleton.joints):
        rows = labelled[:, joint]
        if rows.any():
            found[name] = {"distal": name in distal, "count": int(rows.sum())} | {
                output: {
                    "accuracy": means[output][name]["accuracy"],
                    "oks": means[output][name]["oks"],
                    "error": float(measured.errors[output][rows, joint].mean()),
                }
                for output in OUTPUTS
            }
    return found


def correlations(sampled: np.ndarray, losses: np.ndarray, accuracy: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Pearson's and Spearman's coefficients of loss and accuracy `[N, G]` over the sampled joints, and by group."""

    def of(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
            return {"count": len(x), "pearson": None, "spearman": None}
        linear: Any = pearsonr(x, y)
        ranked: Any = spearmanr(x, y)
        return {"count": len(x), "pearson": float(linear.statistic), "spearman": float(ranked.statistic)}

    groups = enumerate(zip(names, sampled.T, strict=True))
    return {
        **of(losses[sampled], accuracy[sampled]),
        "groups": {name: of(losses[rows, group], accuracy[rows, group]) for group, (name, rows) in groups},
    }


def distribution(errors: np.ndarray) -> dict[str, float]:
    """Mean and quantiles, by their per cent, of errors."""
    return {"mean": float(errors.mean())} | {
        str(percent): float(value) for percent, value in zip(QUANTILES, np.percentile(errors, QUANTILES), strict=True)
    }


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the name ends in, atomically."""
    kind = "jpeg" if path.suffix == ".jpg" else "png"
    write_atomic(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=150))


def format_table(report: Mapping[str, Any]) -> str:
    """Table 5 of the distal joints, then a line for the search, each correlation and the planted errors."""
    metrics, protocol = report["metrics"], report["protocol"]
    distal = {name: found for name, found in metrics["joints"].items() if found["distal"]}
    width = max(len("distal joint"), *map(len, distal))
    measures = {"accuracy": "accuracy", "oks": "OKS term", "error": "error, heatmap px"}
    lines = [
        " " * width + "".join(f"  {title:^26}" for title in measures.values()) + "   count",
        f"{'distal joint':<{width}}" + "  {:>8}{:>9}{:>9}".format("base", "learning", "optim.") * 3,
    ]
    for name, found in distal.items():
        cells = "".join(
            "  {:>8.4f}{:>9.4f}{:>9.4f}".format(*(found[output][measure] for output in OUTPUTS)) for measure in measures
        )
        lines.append(f"{name:<{width}}{cells}  {found['count']:>6}")
    search, planted = metrics["search"], metrics["planted"]
    lines.append(
        f"search of {search['count']} joints: loss {search['loss'][0]:.3g} -> {search['loss'][-1]:.3g}, accuracy "
        f"{search['accuracy'][0]:.4f} -> {search['accuracy'][-1]:.4f}"
    )
    for key, title in (("found", "as found"), ("displaced", "true joints displaced")):
        found = metrics["correlation"][key]
        lines.append(
            f"correlation of loss and accuracy, {title}: Pearson {signed(found['pearson'])}, Spearman "
            f"{signed(found['spearman'])} over {found['count']} (paper {PAPER['pearson']} over {PAPER['count']})"
        )
    quantiles = ", ".join(
        f"{percent} % {planted['before'][str(percent)]:.2f} -> {planted['after'][str(percent)]:.2f}"
        for percent in QUANTILES
    )
    lines.append(
        f"planted errors, heatmap px: mean {planted['before']['mean']:.2f} -> {planted['after']['mean']:.2f}, "
        f"{planted['reduced']:.1%} reduced; {quantiles}"
    )
    shown = {name: " and ".join(map(str, v)) if isinstance(v, list) else v for name, v in protocol.items()}
    return "\n".join([*lines, f"({', '.join(f'{name} {v}' for name, v in shown.items() if v is not None)})"])
