"""CIR's figures (Xiao et al., AAAI 2022): score against true OKS (Fig. 5), and poses with both beside them (Fig. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from poserelay.datasets.coco import check_images_exist, read_coco, read_json
from poserelay.datasets.sampling import draw_generator, evenly
from poserelay.datasets.topdown import read_annotated
from poserelay.drawing import draw_poses
from poserelay.errors import UserError
from poserelay.keypoints import Skeleton, resolve_skeleton
from poserelay.scoring import Truth, check_results, order_of_file, read_results, scored_truth, take_joints

from .calibration import correlation, scores_of, true_oks
from .config import VisualizeConfig
from .curves import distinct_names

matplotlib.use("agg")

PER_IMAGE = 5
"""Poses of an image, at most: the paper's Fig. 5 has so many."""
COLUMNS = 3
"""Panels beside each other."""
SIDE = 512
"""Pixels of the longer side of a picture in the panel."""
LABEL = (104, 46)
"""Width and height of what is written beside a pose, in these pixels."""
COLOUR = "#0072B2"


class Judged(NamedTuple):
    """The N poses of a results file."""

    name: str
    image_ids: np.ndarray
    """`[N]`."""
    keypoints: np.ndarray
    """`[N, J, 2]` of the joints that are scored, image pixels."""
    scores: np.ndarray
    """`[N]`."""
    oks: np.ndarray
    """`[N]`, `true_oks`."""


def draw_scores(config: VisualizeConfig) -> Figure:
    """Fig. 5: a panel for each results file, its poses by their score and their true OKS.

    Up to 5 poses of an image are drawn, chosen at random; the coefficient in the title is of all. Raises UserError.
    """
    judged = read_judged(config)[2]
    across = min(COLUMNS, len(judged))
    down = -(-len(judged) // across)
    figure = Figure(figsize=(3.3 * across + 0.6, 3.4 * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, its in zip(panels.flat, judged, strict=False):
        rows = few_per_image(its.image_ids, config.seed)
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="dotted")
        axes.scatter(its.scores[rows], its.oks[rows], s=9, alpha=0.45, color=COLOUR, linewidths=0, rasterized=True)
        rho = correlation(its.scores, its.oks)["spearman"]
        found = "-" if rho is None else f"{rho:+.3f}"
        axes.set_title(f"{short_name(its.name, 40)}\nSpearman {found} over {len(its.scores):,} poses", fontsize=9)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(judged) - across : len(judged)]:
        axes.tick_params(labelbottom=True)
    for axes in panels.flat[len(judged) :]:
        axes.set_axis_off()
    chosen = f"up to {PER_IMAGE} poses of an image, drawn at random"
    figure.supxlabel(f"predicted score\n{chosen}\ndotted: equal to the OKS", fontsize=9)
    figure.supylabel("true OKS", fontsize=9)
    return figure


def draw_quality(config: VisualizeConfig) -> Figure:
    """Fig. 1: a row for each image, a column for each results file; its best-scored poses with score and true OKS.

    As many poses as the image has persons, at most 5, all their joints: all of them count in OKS. Raises UserError and
    UnreadableImage.
    """
    truth, skeleton, judged = read_judged(config)
    annotations = truth.file
    with_persons = np.unique(truth.counted.image_index[truth.counted.persons])
    images = evenly(with_persons, config.count)
    check_images_exist([annotations.file_names[row] for row in images], str(config.images))
    sizes = annotations.image_sizes[images]
    heights = np.maximum(sizes[:, 0] / sizes.max(1), 0.2)
    figure = Figure(figsize=(3.1 * len(judged) + 0.2, 3.0 * heights.sum() + 0.4), layout="constrained")
    cells = figure.subplots(len(images), len(judged), squeeze=False, height_ratios=heights)
    for row, image in enumerate(images.tolist()):
        picture = read_annotated(annotations, Path(str(config.images)), image)
        persons = int((truth.counted.image_index[truth.counted.persons] == image).sum())
        for axes, its in zip(cells[row], judged, strict=True):
            poses = np.flatnonzero(its.image_ids == annotations.image_ids[image])
            best = poses[np.argsort(-its.scores[poses], kind="stable")][: min(persons, PER_IMAGE)]
            show_poses(axes, picture, its, best, skeleton, truth.common.joints)
        cells[row, 0].set_ylabel(short_name(annotations.file_names[image]), fontsize=7)
    for axes, its in zip(cells[0], judged, strict=True):
        axes.set_title(short_name(its.name, 36), fontsize=9)
    return figure


def show_poses(
    axes: Axes, picture: np.ndarray, judged: Judged, rows: np.ndarray, skeleton: Skeleton, joints: Sequence[str]
) -> None:
    """Draw some poses on a picture `[H, W, 3]`, score and OKS above each; joints: their names."""
    height, width = picture.shape[:2]
    factor = SIDE / max(height, width)
    size = max(1, round(factor * width)), max(1, round(factor * height))
    enlarged = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    places = (judged.keypoints[rows] + 0.5) * np.array(size) / (width, height) - 0.5
    whole = np.full((len(rows), len(skeleton.joints), 2), np.nan)  # joints that the file lacks are not drawn
    whole[:, order_of_file(skeleton, joints)] = places
    scores = np.repeat(judged.scores[rows, None], whole.shape[1], 1)
    axes.imshow(draw_poses(enlarged, whole, scores, skeleton, threshold=-np.inf))
    axes.set(xticks=[], yticks=[])
    corners: list[np.ndarray] = []
    for place, row in zip(places, rows, strict=True):
        low, high = place.min(0), place.max(0)
        corners.append(free_corner(np.array([(low[0] + high[0] - LABEL[0]) / 2, low[1] - LABEL[1]]), corners, size))
        x, y = corners[-1]
        axes.text(
            x,
            y,
            f"Conf. {judged.scores[row]:.2f}\nOKS {judged.oks[row]:.2f}",
            fontsize=7,
            color="white",
            va="top",
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "black", "alpha": 0.65, "linewidth": 0},
        )


def free_corner(wanted: np.ndarray, taken: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Where a label's upper left corner (x, y) may go in a picture of (width, height): below those that are in its way,
    where there is room."""
    last = np.maximum(np.array(size) - LABEL, 0)
    corner = wanted.clip(0, last)
    for other in sorted(taken, key=lambda its: its[1]):
        if (np.abs(corner - other) < LABEL).all():
            corner = np.array([corner[0], other[1] + LABEL[1]])
    return corner if corner[1] <= last[1] else wanted.clip(0, last)


def read_judged(config: VisualizeConfig) -> tuple[Truth, Skeleton, list[Judged]]:
    """The truth and the poses of each results file. Raises UserError for a file or record that cannot be used."""
    truth, skeleton = read_truth(config)
    named = zip(names_of(config.predictions), config.predictions, strict=True)
    return truth, skeleton, [judge(name, path, truth, skeleton) for name, path in named]


def read_truth(config: VisualizeConfig) -> tuple[Truth, Skeleton]:
    """The truth and its skeleton. Raises UserError for a file without a labelled person, and as `read_coco`."""
    data = read_json(Path(str(config.annotations)))
    annotations = read_coco(str(config.annotations), data)
    skeleton = resolve_skeleton(config.skeleton, annotations.category, str(config.annotations))
    truth = scored_truth(annotations, skeleton, data=data)
    if not len(truth.counted.persons):
        raise UserError(f"{annotations.path}: holds no person with a labelled joint; take a file with the truth")
    return truth, skeleton


def names_of(paths: Sequence[str]) -> list[str]:
    """What results files are called in a figure: their folders' names, as `test` calls all of them predictions.json."""
    files = [Path(path) for path in paths]
    short = [file.parent.name if file.stem == "predictions" else file.stem for file in files]
    return distinct_names(short, [f"{file.parent.parent.name}/{file.parent.name}/{file.stem}" for file in files])


def results_of(path: str, truth: Truth) -> list[dict[str, Any]]:
    """The records of a results file, in the joints that are scored. Raises UserError."""
    annotations = truth.file
    results = read_results(path)
    check_results(results, annotations.image_ids, annotations.category["id"], len(annotations.joints), path)
    return take_joints(results, truth.columns)


def judge(name: str, path: str, truth: Truth, skeleton: Skeleton) -> Judged:
    """The poses of a results file, in the joints that are scored. Raises UserError."""
    results = results_of(path, truth)
    keypoints = np.array([record["keypoints"] for record in results], dtype=np.float64)
    return Judged(
        name,
        np.array([record["image_id"] for record in results], dtype=np.int64),
        keypoints.reshape(-1, len(truth.columns), 3)[..., :2],
        scores_of(results),
        true_oks(truth, results, skeleton),
    )


def few_per_image(image_ids: np.ndarray, seed: int) -> np.ndarray:
    """Indices of up to 5 poses of each image, drawn at random, of poses `[N]` of these images."""
    order = draw_generator(seed, 0, 0, 0).permutation(len(image_ids))
    order = order[np.argsort(image_ids[order], kind="stable")]
    _, first, count = np.unique(image_ids[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, count)
    return np.sort(order[rank < PER_IMAGE])


def short_name(text: str, length: int = 32) -> str:
    """The end of a text that is longer than a picture is high."""
    return text if len(text) <= length else f"...{text[3 - length :]}"
