"""`python -m evaluation scio`: what SCIO does about distal joints (Kan et al., ECCV 2022: Table 5, Fig. 2, 5 and 6)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from poserelay.batch import CropBatch
from poserelay.checkpoint import verify_handoff
from poserelay.config import Decoding
from poserelay.datasets.coco import read_coco, read_json
from poserelay.datasets.sampling import draw_generator, read_image
from poserelay.datasets.topdown import TopDownDataset, warp
from poserelay.distributed import start
from poserelay.drawing import OUTLINE, draw_poses
from poserelay.errors import UserError
from poserelay.geometry import apply_affine, box_to_affine, invert_affine
from poserelay.heatmaps import heatmap_to_input, input_to_heatmap
from poserelay.inference import crop_batches, decode_crops, forward_crops, protocol, self_constraint
from poserelay.keypoints import Skeleton
from poserelay.local_search import search_distal
from poserelay.model import PoseModel, load_model
from poserelay.run import write_atomic, write_json

from .config import ScioConfig
from .joint_accuracy import joint_means, joint_terms, oks_areas
from .reliance import Distal, annotated_crops, displaced, evenly, networks_of, true_distal

matplotlib.use("agg")

OUTPUTS = ("base", "learning", "optimisation")
PAPER = {"pearson": -0.85, "count": 1000}
"""Of its Fig. 6b."""
QUANTILES = (10, 25, 50, 75, 90)
SHOWN = 6
"""Persons of before_after.jpg."""
ZOOM = 320
"""Pixels of a side of an enlarged region, and of a person's height beside it."""
BASE, OPTIMISED, DISTAL = "#9A9A9A", "#0072B2", "#D55E00"


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
    model = load_model(config.checkpoint)
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
    learned = decode_crops(model, batch, maps, with_output(decoding, "learning", below=None))
    assert learned.verification is not None
    confident = ~learned.verification[:, columns].isnan().numpy()

    def placed(xy: np.ndarray) -> Tensor:
        return torch.from_numpy(xy).float().to(device)

    def accuracy(xy: Tensor) -> np.ndarray:
        distance = np.linalg.norm(frame.to_image(xy) - persons.keypoints[:, columns], axis=-1)
        return joint_terms(distance, persons.areas, sigmas)[0]

    constraint = self_constraint(model, maps, decoding)
    begin = frame.to_heatmap(learned.keypoints.double().numpy())[:, columns]
    # By way of image pixels a peak at the map's edge comes back just outside, from where the search hardly moves.
    begin = placed(begin.clamp(torch.zeros(2), torch.tensor(model.heatmap_size[::-1]) - 1).numpy())
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


def draw_joints(joints: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Fig. 2: accuracy of every joint, of the head and after the search; distal joints on a tinted ground."""
    figure = Figure(figsize=(2.2 + 0.55 * len(joints), 4.0), layout="constrained")
    axes = figure.subplots()
    for place, found in enumerate(joints.values()):
        if found["distal"]:
            axes.axvspan(place - 0.5, place + 0.5, color=DISTAL, alpha=0.13, linewidth=0)
    bars = (("base", BASE, -0.2), ("optimisation", OPTIMISED, 0.2))
    for output, colour, shift in bars:
        heights = [found[output]["accuracy"] for found in joints.values()]
        axes.bar(np.arange(len(joints)) + shift, heights, 0.38, color=colour, label=output)
    axes.set_xticks(range(len(joints)), [name.replace("_", " ") for name in joints], rotation=45, ha="right")
    for label, found in zip(axes.get_xticklabels(), joints.values(), strict=True):
        label.set_fontweight("bold" if found["distal"] else "normal")
    handles = [Patch(color=colour, label=output) for output, colour, _ in bars]
    figure.legend(
        handles=[*handles, Patch(color=DISTAL, alpha=0.13, label="distal joint")], loc="outside right upper", fontsize=9
    )
    axes.set(ylabel="accuracy, 2 sigmoid(-d / (s k))", xlim=(-0.5, len(joints) - 0.5), ylim=(0, 1))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def draw_search(search: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """Fig. 6a: mean loss and mean accuracy over the steps, of all distal joints and of each."""
    figure = Figure(figsize=(8.6, 3.7), layout="constrained")
    colours = group_colours(names)
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("loss", "accuracy"), ("self-constraint loss", "accuracy"), strict=True):
        steps = range(len(search[key]))
        for name, its in search["groups"].items():
            axes.plot(steps, its[key], color=colours[name], linewidth=1, label=name.replace("_", " "))
        axes.plot(steps, search[key], color="black", linewidth=2.2, label="all")
        axes.set(xlabel="step", ylabel=label, title=f"{search[key][0]:.3g} to {search[key][-1]:.3g} over all", ylim=0)
        axes.set_xlim(0, max(1, len(steps) - 1))
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    figure.legend(handles=panels[0].get_lines(), loc="outside right upper", fontsize=9)
    return figure


def draw_correlation(
    measured: Measured, correlation: Mapping[str, Any], names: Sequence[str], farthest: float
) -> Figure:
    """Fig. 6b: loss against accuracy, of the joints as they are found and of the true ones displaced."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    colours = group_colours(names)
    shown = {
        "found": ("as the prediction networks find them", measured.losses[0], measured.accuracy[0]),
        "displaced": (f"true joints displaced by 0 to {farthest:g} pixels", measured.off_losses, measured.off_accuracy),
    }
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for axes, (key, (title, losses, accuracy)) in zip(panels, shown.items(), strict=True):
        found = correlation[key]
        for group, (name, rows) in enumerate(zip(names, measured.sampled.T, strict=True)):
            place = (losses[rows, group], accuracy[rows, group])
            axes.scatter(
                *place,
                s=7,
                alpha=0.45,
                color=colours[name],
                linewidths=0,
                label=name.replace("_", " "),
                rasterized=True,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:.0e}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("self-constraint loss")
        coefficients = f"Pearson {signed(found['pearson'])}, Spearman {signed(found['spearman'])}, n = {found['count']}"
        axes.set_title(f"{title}\n{coefficients}", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy, 2 sigmoid(-d / (s k))", ylim=(0, 1.02))
    figure.supxlabel(f"the paper's Fig. 6b: {PAPER['pearson']} over {PAPER['count']:,} samples", fontsize=9)
    legend = figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9, markerscale=2.5
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure


def draw_planted(measured: Measured, planted: Mapping[str, Any]) -> Figure:
    """The planted errors before the search and after it, as two histograms."""
    before, after = measured.before[measured.sampled], measured.after[measured.sampled]
    bins: Any = np.linspace(0, max(before.max(), after.max(), 1e-6), 41)
    figure = Figure(figsize=(6.4, 3.7), layout="constrained")
    axes = figure.subplots()
    for errors, colour, key in ((before, BASE, "before"), (after, OPTIMISED, "after")):
        label = f"{key}: mean {planted[key]['mean']:.2f}, median {planted[key]['50']:.2f}"
        axes.hist(errors, bins, color=colour, alpha=0.55, label=label)
        axes.hist(errors, bins, color=colour, histtype="step", linewidth=1.5)
    axes.set(xlabel="distance from the truth, heatmap pixels", ylabel="distal joints", xlim=(0, bins[-1]))
    axes.set_title(f"{planted['reduced']:.1%} of {planted['count']} planted errors reduced by the search", fontsize=10)
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    return figure


def draw_before_after(model: PoseModel, dataset: TopDownDataset, measured: Measured) -> Figure:
    """Fig. 5: the persons whose distal joint moved most, the head's pose above and the refined one below.

    Beside each the region of that joint, with a ring around it and a cross at the truth.
    """
    columns = networks_of(model).distal.tolist()
    base, refined = measured.poses["base"], measured.poses["optimisation"]
    scale = np.sqrt(np.abs(np.linalg.det(crop_affines(dataset, (model.input.height, model.input.width))[..., :2])))
    moved = np.linalg.norm(refined - base, axis=-1)[:, columns] * scale[:, None] * measured.sampled
    persons = np.argsort(-moved.max(1), kind="stable")[:SHOWN]
    across = min(3, len(persons))
    blocks = -(-len(persons) // across)
    aspect = model.input.width / model.input.height
    figure = Figure(figsize=(across * 2.5 * (1 + aspect), blocks * 5.6), layout="constrained")
    cells = figure.subplots(2 * blocks, 2 * across, squeeze=False, width_ratios=[aspect, 1] * across)
    for cell in cells.flat:
        cell.set_axis_off()
    for place, person in enumerate(persons.tolist()):
        joint = columns[int(moved[person].argmax())]
        row, column = 2 * (place // across), 2 * (place % across)
        for output, below in (("base", 0), ("optimisation", 1)):
            whole, near, corner = enlarged(dataset, measured, person, joint, output)
            cells[row + below, column].imshow(whole)
            x, y, side = corner
            cells[row + below, column].add_patch(Rectangle((x, y), side, side, fill=False, edgecolor="white", lw=1.2))
            cells[row + below, column + 1].imshow(near)
            error = measured.errors[output][person, joint]
            name = dataset.skeleton.joints[joint].replace("_", " ")
            cells[row + below, column].set_title("base" if output == "base" else "refined", fontsize=9)
            cells[row + below, column + 1].set_title(f"{name}, {error:.1f} heatmap pixels off", fontsize=9)
    figure.supxlabel("ring: the joint that moved most; cross: where it is labelled", fontsize=9)
    return figure


def crop_affines(dataset: TopDownDataset, size: tuple[int, int]) -> np.ndarray:
    """Image pixels to those of crops of another size, `[N, 2, 3]`."""
    return box_to_affine(dataset.boxes, size, padding=dataset.padding, alignment=dataset.alignment)


def enlarged(
    dataset: TopDownDataset, measured: Measured, person: int, joint: int, output: str
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """A person's crop and the region of one joint, with the pose drawn; and where in the crop that region lies.

    The region holds the joint of both outputs and the truth. Returns two pictures and (x, y, side) in the first.
    """
    height, width = dataset.size
    whole = (ZOOM, max(1, round(ZOOM * width / height)))
    affine = crop_affines(dataset, whole)[person]
    row = dataset.image_index[person]
    picture = read_image(dataset.image_dir / dataset.annotations.file_names[row])
    truth = dataset.keypoints[person, joint]
    places = np.stack([truth, measured.poses["base"][person, joint], measured.poses["optimisation"][person, joint]])
    low, high = places.min(0), places.max(0)
    side = max(1.6 * float((high - low).max()), 0.28 * float(dataset.boxes[person, 2:].max()))
    box = np.array([*(low + high) / 2 - side / 2, side, side])
    near = box_to_affine(box, (ZOOM, ZOOM), padding=1.0)
    scores = measured.scores[person].copy()
    scores[joint] = 1  # the joint that this is about is drawn, however low its peak
    pictures = [
        posed(
            warp(picture, view, size).transpose(1, 2, 0), view, dataset.skeleton, measured.poses[output][person], scores
        )
        for view, size in ((affine, whole), (near, (ZOOM, ZOOM)))
    ]
    ends = apply_affine(near, np.stack([truth, measured.poses[output][person, joint]]))
    mark(pictures[1], *ends)
    corner = apply_affine(affine, box[None, :2])[0]
    return pictures[0], pictures[1], (*corner.tolist(), side * affine[0, 0])


def posed(
    image: np.ndarray, view: np.ndarray, skeleton: Skeleton, keypoints: np.ndarray, scores: np.ndarray
) -> np.ndarray:
    """A picture `[H, W, 3]` with one pose `[K, 2]`, image pixels, drawn; view: from these to its own, `[2, 3]`."""
    return draw_poses(image, apply_affine(view, keypoints)[None], scores[None], skeleton)


def mark(image: np.ndarray, truth: np.ndarray, joint: np.ndarray) -> None:
    """Draw a cross and a ring into an image, at two points `[2]` in its pixels."""
    cross, ring = ((round(float(xy[0])), round(float(xy[1]))) for xy in (truth, joint))
    for colour, thickness in ((OUTLINE, 4), ((255, 255, 255), 2)):
        cv2.drawMarker(image, cross, colour, cv2.MARKER_TILTED_CROSS, 20, thickness, cv2.LINE_AA)
        cv2.circle(image, ring, 22, colour, thickness, cv2.LINE_AA)


def group_colours(names: Sequence[str]) -> dict[str, Any]:
    """A colour for each group."""
    few = len(names) <= 10
    palette = matplotlib.colormaps["tab10"] if few else matplotlib.colormaps["turbo"].resampled(len(names))
    return {name: palette(group) for group, name in enumerate(names)}


def signed(value: float | None) -> str:
    """A coefficient with its sign."""
    return "-" if value is None else f"{value:+.2f}"


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
