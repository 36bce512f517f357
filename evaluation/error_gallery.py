"""The worst persons of a results file, labels beside prediction, with the kind of error of each joint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from poserelay.errors import UserError
from poserelay.geometry import apply_affine
from poserelay.keypoints import Skeleton
from poserelay.scoring import Truth, results_that_count

from .cir_figures import names_of, read_truth, results_of, short_name
from .config import VisualizeConfig
from .error_types import KINDS, MATCHED_FROM, ErrorTypes, error_types
from .pose_figures import View, in_skeleton, person_name, posed, regions, show, views

# Okabe and Ito's colours; the shapes tell the kinds without them.
MARKS = {"jitter": ("o", "#56B4E9"), "inversion": ("^", "#F0E442"), "miss": ("X", "#D55E00"), "swap": ("s", "#CC79A7")}
WIDTHS = (2.4, 2.4, 2.6)
"""Of a person's two pictures and of the list beside them, inches."""
LINE = 38
"""Characters of the list."""
TITLE = 85
"""Characters over one column of persons."""
DPI = 120
"""Of `draw_worst`."""


class WorstPose(NamedTuple):
    """A pose, the person that it is matched to, and what is wrong with its J joints."""

    name: str
    """The picture's file name and the person's id."""
    image: int
    """Row of the picture in the annotation file."""
    box: np.ndarray
    """`[4]` xywh, image pixels, as annotated."""
    labels: np.ndarray
    """`[J, 2]`, image pixels; NaN where there is none that counts."""
    keypoints: np.ndarray
    """`[J, 2]`, image pixels."""
    kinds: np.ndarray
    """`[J]`, see `ErrorTypes`."""
    confused: np.ndarray
    """`[J]`, see `ErrorTypes`."""
    oks: float
    score: float


def worst_poses(
    truth: Truth, results: Sequence[Mapping[str, Any]], skeleton: Skeleton, errors: ErrorTypes, count: int
) -> list[WorstPose]:
    """The `count` matched persons that lose most, the worst first: in 1 - OKS times their labelled joints.

    That is the sum of what each joint lacks; by OKS alone the persons of a single label would come first. `results` are
    those that `errors` is of.
    """
    counted = truth.counted
    lost = (1 - errors.oks) * (errors.kinds >= 0).sum(1)
    found = []
    for row in np.argsort(-lost, kind="stable")[:count].tolist():
        person = int(counted.persons[errors.persons[row]])
        record = results[int(errors.poses[row])]
        labelled = counted.visibility[person] > 0
        found.append(
            WorstPose(
                person_name(counted, person),
                int(counted.image_index[person]),
                counted.boxes[person],
                np.where(labelled[:, None], counted.keypoints[person], np.nan),
                np.reshape(record["keypoints"], (-1, 3))[:, :2].astype(np.float64),
                errors.kinds[row],
                errors.confused[row],
                float(errors.oks[row]),
                float(record["score"]),
            )
        )
    return found


def draw_worst(worst: WorstPose, truth: Truth, images: str, skeleton: Skeleton) -> np.ndarray:
    """One person as a picture `[H, W, 3]` uint8 RGB: labels, prediction, and what is wrong with its joints.

    images: the folder that the file names of `truth` are relative to. Raises UserError and UnreadableImage.
    """
    figure = Figure(figsize=(sum(WIDTHS), 2.75), layout="constrained", dpi=DPI)
    cells = figure.subplots(1, 3, width_ratios=WIDTHS)
    show_worst(list(cells), worst, worst_views([worst], truth, images)[0], truth.counted.joints, skeleton)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def draw_errors(config: VisualizeConfig) -> Figure:
    """The `count` worst persons of a results file. Raises UserError and UnreadableImage."""
    truth, skeleton = read_truth(config)
    results = results_that_count(truth, results_of(config.predictions[0], truth))
    errors = error_types(truth, results, skeleton)
    worst = worst_poses(truth, results, skeleton, errors, config.count)
    if not worst:
        raise UserError(
            f"{config.predictions[0]}: no pose has an OKS of {MATCHED_FROM} with any person of {config.annotations}, "
            "so there is no error of a joint to show; are the coordinates those of these pictures?"
        )
    across = 2 if len(worst) > 1 else 1
    down = -(-len(worst) // across)
    figure = Figure(figsize=(sum(WIDTHS) * across, 2.75 * down + 0.9), layout="constrained")
    cells = figure.subplots(down, 3 * across, squeeze=False, width_ratios=WIDTHS * across)
    for axes in cells.flat:
        axes.set_axis_off()
    for place, (its, view) in enumerate(zip(worst, worst_views(worst, truth, str(config.images)), strict=True)):
        first = 3 * (place % across)
        show_worst(list(cells[place // across, first : first + 3]), its, view, truth.counted.joints, skeleton)
    persons = len(truth.counted.persons)
    title = (
        f"{short_name(names_of(config.predictions)[0], 40)}: the {len(worst)} worst of {len(errors.persons):,} persons "
        f"that a pose is matched to; {persons - len(errors.persons):,} of {persons:,} have none"
    )
    figure.suptitle("\n".join(wrap(title, TITLE * across)), fontsize=10)
    figure.legend(handles=kind_marks(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def worst_views(worst: Sequence[WorstPose], truth: Truth, images: str) -> list[View]:
    """The persons enlarged, with the joints that are predicted for their labels. Raises UserError, UnreadableImage."""
    points = np.stack([np.concatenate([its.labels, judged_joints(its)]) for its in worst])
    boxes = regions(np.stack([its.box for its in worst]), points)
    return views(truth.counted, images, np.array([its.image for its in worst]), boxes)


def judged_joints(worst: WorstPose) -> np.ndarray:
    """The predicted joints `[J, 2]` that have a label, NaN for the others."""
    return np.where((worst.kinds >= 0)[:, None], worst.keypoints, np.nan)


def show_worst(cells: Sequence[Axes], worst: WorstPose, view: View, joints: Sequence[str], skeleton: Skeleton) -> None:
    """Draw a person into three cells: labels, prediction, and the list of the joints that are not good.

    A mark says what is wrong with a predicted joint, a line leads from it to its label.
    """
    of_labels, of_poses, of_list = cells
    predicted = judged_joints(worst)
    for axes, keypoints in ((of_labels, worst.labels), (of_poses, predicted)):
        axes.set_axis_on()
        show(axes, posed(view, in_skeleton(keypoints, skeleton, joints), skeleton))
        axes.set(xlim=(-0.5, len(view.image) - 0.5), ylim=(len(view.image) - 0.5, -0.5))
    of_labels.set_title("labels", fontsize=9)
    of_labels.set_xlabel(short_name(worst.name, 36), fontsize=8)
    of_poses.set_title(f"OKS {worst.oks:.2f}, score {worst.score:.2f}", fontsize=9)
    true, found = apply_affine(view.affine, worst.labels), apply_affine(view.affine, predicted)
    for joint, kind in enumerate(worst.kinds):
        if KINDS[kind] in MARKS and kind >= 0:
            shape, colour = MARKS[KINDS[kind]]
            ends = np.stack([found[joint], true[joint]])
            of_poses.plot(*ends.T, color="black", linewidth=2.2, zorder=3)
            of_poses.plot(*ends.T, color="white", linewidth=1.0, zorder=4)
            of_poses.plot(
                *found[joint], shape, color=colour, markersize=7, markeredgecolor="black", zorder=5, gid=joints[joint]
            )
    of_list.set_axis_off()
    of_list.text(0, 1, "\n".join(described(worst, joints)), fontsize=8.5, va="top", transform=of_list.transAxes)


def described(worst: WorstPose, joints: Sequence[str]) -> list[str]:
    """The joints of each kind of error, in lines as long as the list is wide, then how many are good."""
    lines = []
    for name in MARKS:
        found = []
        for joint in np.flatnonzero(worst.kinds == KINDS.index(name)).tolist():
            at = int(worst.confused[joint])
            whose = "" if at < 0 else " at its " if name == "inversion" else " at another's "
            found.append(joints[joint] + (f"{whose}{joints[at]}" if at >= 0 else ""))
        if found:
            lines += wrap(f"{name}: {', '.join(found)}".replace("_", " "), LINE, subsequent_indent="   ")
    good = int((worst.kinds == KINDS.index("good")).sum())
    return [*lines, f"good: {good} of {int((worst.kinds >= 0).sum())} labelled joints"]


def kind_marks() -> list[Line2D]:
    """A legend's entries for the kinds of errors."""
    return [
        Line2D([], [], linestyle="", marker=shape, color=colour, markeredgecolor="black", label=kind)
        for kind, (shape, colour) in MARKS.items()
    ]
