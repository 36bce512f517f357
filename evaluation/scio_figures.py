"""The pictures of `evaluation scio`: Fig. 2, 5 and 6 of Kan et al. (ECCV 2022), and what becomes of planted errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from poserelay.datasets.sampling import read_image
from poserelay.datasets.topdown import TopDownDataset, warp
from poserelay.drawing import OUTLINE, draw_poses
from poserelay.geometry import apply_affine, box_to_affine
from poserelay.keypoints import Skeleton
from poserelay.model import PoseModel

from .reliance import networks_of

if TYPE_CHECKING:
    from .scio import Measured

matplotlib.use("agg")

PAPER = {"pearson": -0.85, "count": 1000}
"""Of its Fig. 6b."""
SHOWN = 6
"""Persons of before_after.jpg."""
ZOOM = 320
"""Pixels of a side of an enlarged region, and of a person's height beside it."""
BASE, OPTIMISED, DISTAL = "#9A9A9A", "#0072B2", "#D55E00"


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
