"""How SCIO's search moves a distal joint: its way over the self-constraint loss (Kan et al., section 3.4, Fig. 6a)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from poserelay.config import Decoding
from poserelay.datasets.topdown import collate
from poserelay.drawing import draw_poses
from poserelay.errors import UserError
from poserelay.inference import decode_crops, forward_crops, self_constraint
from poserelay.local_search import Search, search_distal

from .ccm_figures import Shown, enlarged_crops, in_enlarged, open_model
from .cir_figures import short_name
from .config import ScioConfig, VisualizeConfig
from .pose_figures import show
from .reliance import Distal, networks_of, true_distal
from .scio import Frame, choose_persons, search_starts, with_output

GRID = 17
"""Points of the landscape along a side."""
BANDS = 24
"""Of loss that the landscape tells apart."""
BEYOND = 1.25
"""Reach of the landscape, in radii of the search (a pixel at least, and no more than the map)."""
PATH, START, END, TRUTH = "white", "#56B4E9", "#E69F00", "#009E73"
PATH_SIZE = 1.6


class Traces(NamedTuple):
    """The searches of B persons with G groups."""

    search: Search
    """Heatmap pixels; positions `[S + 1, B, G, 2]`."""
    confident: np.ndarray
    """`[B, G]`, whether the proximal joints are, so that `test` would search."""
    offsets: np.ndarray
    """`[GRID]`, heatmap pixels about the start, of the landscape."""
    landscape: np.ndarray
    """`[GRID, GRID, B, G]`, the loss with D at the start moved by an offset in y and in x; NaN off the map."""
    keypoints: np.ndarray
    """`[B, K, 2]`, the head's own pose, image pixels."""
    scores: Tensor
    """`[B, K]`, its peaks."""
    to_image: Any
    """From heatmap `[B, M, 2]` to image pixels."""


def draw_traces(config: VisualizeConfig) -> Figure:
    """For each person the search of one distal joint: on the crop, over the loss about the start, the loss by steps.

    Persons are spread evenly over those with a labelled distal joint; of their groups the one whose joint moves
    furthest, of those that are searched where there is one. The search starts where the prediction networks find the
    joint, as `evaluation scio` has it. Raises UserError and UnreadableImage.
    """
    model, _ = open_model(config)
    if model.refiner is None:
        raise UserError(
            f"{config.checkpoints[0]}: carries no SCIO networks, so nothing is searched; give a model that was "
            "fine-tuned with model.refiner scio"
        )
    asked = ScioConfig(
        config.checkpoints[0], str(config.annotations), str(config.images), config.out, config.count, config.decoding
    )
    dataset = choose_persons(model, asked)
    batch = collate([dataset[row] for row in range(len(dataset))]).to(next(model.parameters()).device)
    shown = Shown(model, batch, dataset, dataset.areas)
    traces = trace(shown, config.decoding)
    distal = true_distal(model, dataset)
    group = furthest(traces, distal)

    blocks = 2 if len(dataset) > 3 else 1  # persons beside each other
    rows = -(-len(dataset) // blocks)
    aspect = model.input.width / model.input.height
    widths = [2.5 * aspect, 2.9, 2.4]
    figure = Figure(figsize=((sum(widths) + 1.3) * blocks, 2.6 * rows + 0.9), layout="constrained")
    cells = figure.subplots(rows, 3 * blocks, squeeze=False, width_ratios=widths * blocks)
    for axes in cells.flat:
        axes.set_axis_off()
    crops = enlarged_crops(batch.images)
    poses = in_enlarged(shown, traces.keypoints, crops[0])
    for person, its in enumerate(group.tolist()):
        on_crop, over_loss, by_step = cells[person // blocks, 3 * (person % blocks) :][:3]
        truth = distal.xy[person, its]
        draw_on_crop(on_crop, shown, traces, person, crops[person], poses[person], its, truth)
        on_crop.set_title(model.skeleton.joints[int(networks_of(model).distal[its])].replace("_", " "), fontsize=9)
        file = dataset.annotations.file_names[dataset.image_index[person]]
        on_crop.set_ylabel(short_name(file, 28), fontsize=8)
        path = traces.search.positions[:, person, its].cpu().double().numpy()
        drawn = draw_landscape(over_loss, traces, person, its, path, truth, config.decoding.scio.radius)
        bar = figure.colorbar(drawn, ax=over_loss, fraction=0.05, ticks=drawn.levels[[0, -1]], format="%.1e")
        bar.ax.tick_params(labelsize=7)
        bar.ax.minorticks_off()
        draw_losses(by_step, traces.search.losses[:, person, its].cpu().double().numpy())
        if not traces.confident[person, its]:
            by_step.set_xlabel("(its proximal joints are unsure: test leaves it)", fontsize=8)
    figure.supxlabel(
        "middle: the loss about the start, heatmap pixels (dotted: how far the search may go; grey: off the map); "
        "right: the loss at each step",
        fontsize=9,
    )
    handles = cells[0, 1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=9, facecolor="#BBBBBB")
    return figure


@torch.inference_mode()
def trace(shown: Shown, decoding: Decoding) -> Traces:
    """Search the distal joints of all persons, and take the loss on a grid about where each search starts."""
    model, batch = shown.model, shown.batch
    maps = forward_crops(model, batch, with_output(decoding, "optimisation"))
    base = decode_crops(model, batch, maps._replace(learned=None), with_output(decoding, "base"))
    begin, confident = search_starts(model, batch, maps, decoding)
    constraint = self_constraint(model, maps, decoding)
    search = search_distal(constraint, begin, decoding.scio, model.stride)
    reach = BEYOND * min(max(decoding.scio.radius, 1.0), max(model.heatmap_size))
    offsets = np.linspace(-reach, reach, GRID)
    height, width = model.heatmap_size
    last = begin.new_tensor([width - 1, height - 1])
    landscape = np.full((GRID, GRID, *begin.shape[:2]), np.nan)
    for row, dy in enumerate(offsets):
        for column, dx in enumerate(offsets):
            places = begin + begin.new_tensor([dx, dy])
            inside = ((places >= 0) & (places <= last)).all(-1)
            losses = torch.where(inside, constraint.loss(places), torch.nan)
            landscape[row, column] = losses.cpu().double().numpy()
    return Traces(
        search,
        confident,
        offsets,
        landscape,
        base.keypoints.double().numpy(),
        base.scores,
        Frame(model, batch).to_image,
    )


def furthest(traces: Traces, distal: Distal) -> np.ndarray:
    """The group of each person that is drawn `[B]`."""
    positions = traces.search.positions
    moved = (positions[-1] - positions[0]).norm(dim=-1).cpu().double().numpy()
    # a label counts most, as without one nothing tells whether the search is right
    return (moved + 1e3 * traces.confident + 1e6 * distal.inside).argmax(1)


def draw_on_crop(
    axes: Axes,
    shown: Shown,
    traces: Traces,
    row: int,
    crop: np.ndarray,
    pose: np.ndarray,
    group: int,
    truth: np.ndarray,
) -> None:
    """A person's crop with the head's pose, and the search's path in it."""
    axes.set_axis_on()
    scores = traces.scores[row : row + 1].numpy()
    show(axes, draw_poses(crop, pose[None], scores, shown.model.skeleton))
    path = traces.search.positions[:, row, group].cpu().double()
    points = torch.cat([path, torch.from_numpy(truth)[None]])
    batched = points[None].expand(len(shown.batch), -1, -1)
    placed = in_enlarged(shown, traces.to_image(batched), crop)[row]
    draw_path(axes, placed[:-1], placed[-1])
    axes.set(xlim=(-0.5, crop.shape[1] - 0.5), ylim=(crop.shape[0] - 0.5, -0.5))


def draw_landscape(
    axes: Axes, traces: Traces, row: int, group: int, path: np.ndarray, truth: np.ndarray, radius: float
) -> Any:
    """The loss about the start, the path over it; returns what a colour bar is made of."""
    axes.set_axis_on()
    moved = [float(np.linalg.norm(place - truth)) for place in (path[0], path[-1])]
    axes.set_title(f"{moved[0]:.1f} to {moved[1]:.1f} heatmap pixels off", fontsize=9)
    values = np.ma.masked_invalid(traces.landscape[:, :, row, group])
    x, y = path[0, 0] + traces.offsets, path[0, 1] + traces.offsets
    low, high = float(values.min()), float(values.max())
    high = high if high > low else low + 1e-12
    wide = low > 0 and high > 3 * low
    levels = np.geomspace(low, high, BANDS) if wide else np.linspace(low, high, BANDS)
    drawn = axes.contourf(x, y, values, levels, cmap="cividis", norm=LogNorm() if wide else None)
    axes.add_patch(Circle((path[0, 0], path[0, 1]), radius, fill=False, edgecolor="white", linestyle="dotted"))
    draw_path(axes, path, truth)
    axes.set(xlim=(x[0], x[-1]), ylim=(y[-1], y[0]), aspect="equal", facecolor="#888888")
    axes.tick_params(labelsize=7)
    return drawn


def draw_losses(axes: Axes, losses: np.ndarray) -> None:
    """The loss `[S + 1]` after each step."""
    axes.set_axis_on()
    axes.plot(range(len(losses)), losses, color=END, linewidth=1.6, drawstyle="steps-post")
    axes.set(ylim=(0, None), xlim=(0, max(1, len(losses) - 1)))
    axes.set_title(f"loss {losses[0]:.2g} to {losses[-1]:.2g}", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def draw_path(axes: Axes, path: np.ndarray, truth: np.ndarray) -> None:
    """A path `[S + 1, 2]` from its start to its end, and where the joint truly is `[2]`."""
    axes.plot(*path.T, color="black", linewidth=PATH_SIZE + 1.6, zorder=3)
    axes.plot(*path.T, color=PATH, linewidth=PATH_SIZE, zorder=4, label="path")
    outline: dict[str, Any] = {"linestyle": "", "markeredgecolor": "black", "zorder": 5}
    axes.plot(*path[0], marker="o", markersize=7, color=START, label="start", **outline)
    axes.plot(*path[-1], marker="s", markersize=7, color=END, label="end", **outline)
    axes.plot(*truth, marker="*", markersize=11, color=TRUTH, label="truth", **outline)
