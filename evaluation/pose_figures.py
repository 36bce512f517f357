"""Persons cut out and enlarged, and several models' poses of the same persons (ICON, Fig. 4 and 7; SCIO, Fig. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from poserelay.datasets.coco import CocoAnnotations, check_images_exist
from poserelay.datasets.sampling import evenly
from poserelay.datasets.topdown import read_annotated
from poserelay.drawing import draw_poses
from poserelay.geometry import apply_affine, box_to_affine
from poserelay.keypoints import Skeleton
from poserelay.oks import oks
from poserelay.scoring import Truth, order_of_file

from .cir_figures import names_of, read_truth, results_of, short_name
from .config import VisualizeConfig
from .joint_accuracy import oks_areas

SIDE = 320
"""Pixels of a side of an enlarged person."""
MARGIN = 1.12
"""Factor on the square about a person and its poses."""


class View(NamedTuple):
    """A square region of a picture, enlarged."""

    image: np.ndarray
    """`[SIDE, SIDE, 3]` uint8 RGB."""
    affine: np.ndarray
    """`[2, 3]`, image pixels to the view's."""


class Owned(NamedTuple):
    """What a results file has for each of P persons."""

    name: str
    pose: np.ndarray
    """`[P]`, index into the results, or -1."""
    keypoints: np.ndarray
    """`[P, J, 2]`, image pixels; NaN without a pose."""
    oks: np.ndarray
    """`[P]`; 0 without a pose."""


def draw_side_by_side(config: VisualizeConfig) -> Figure:
    """A row for each person, its labels and each model's pose with its OKS; of both the labelled joints alone.

    With `choose` difference the persons are those on whom the models differ most, in OKS times the labelled joints: the
    sum that OKS is the mean of, as one joint more or less decides about a person with a single label. Raises UserError
    and UnreadableImage.
    """
    truth, skeleton = read_truth(config)
    files = zip(names_of(config.predictions), config.predictions, strict=True)
    models = [own_poses(name, truth, results_of(path, truth), skeleton) for name, path in files]
    counted = truth.counted
    labels = (counted.visibility[counted.persons] > 0).sum(1)
    chosen = choose_persons(np.stack([its.oks for its in models]), labels, config)
    persons = counted.persons[chosen]
    labelled = counted.visibility[persons] > 0
    true = np.where(labelled[..., None], counted.keypoints[persons], np.nan)
    poses = [np.where(labelled[..., None], its.keypoints[chosen], np.nan) for its in models]
    points = np.concatenate([true, *poses], 1)
    shown = views(counted, str(config.images), counted.image_index[persons], regions(counted.boxes[persons], points))

    columns = 1 + len(models)
    blocks = 2 if columns <= 4 and len(chosen) > 3 else 1  # persons beside each other
    rows = -(-len(chosen) // blocks)
    figure = Figure(figsize=(2.3 * columns * blocks + 0.3, 2.55 * rows + 0.6), layout="constrained")
    cells = figure.subplots(rows, columns * blocks, squeeze=False)
    for axes in cells.flat:
        axes.set_axis_off()
    titles = [f"{short_name(its.name, 24)}\nmean OKS {its.oks.mean():.3f}\n" for its in models]
    titles = [f"labels\n{len(labels):,} persons\n", *titles]
    for place, view in enumerate(shown):
        mine = cells[place // blocks, columns * (place % blocks) :][:columns]
        said = told_of(models, int(chosen[place]))
        for axes, points, text in zip(mine, [true, *poses], ["", *said], strict=True):
            axes.set_axis_on()
            show(axes, posed(view, in_skeleton(points[place], skeleton, counted.joints), skeleton))
            axes.set_title(text, fontsize=10)
        mine[0].set_ylabel(short_name(person_name(counted, persons[place]), 30), fontsize=8)
        if place < blocks:
            for axes, title in zip(mine, titles, strict=True):
                axes.set_title(title + axes.get_title(), fontsize=10)
    return figure


def told_of(models: Sequence[Owned], person: int) -> list[str]:
    """What is written above each model's pose of a person; the best one is marked, unless all are equal."""
    found = [its.oks[person] for its in models]
    best = max(found) if max(found) > min(found) else None
    return [
        "no pose: OKS 0" if its.pose[person] < 0 else f"OKS {value:.2f}{', best' if value == best else ''}"
        for its, value in zip(models, found, strict=True)
    ]


def choose_persons(found: np.ndarray, labels: np.ndarray, config: VisualizeConfig) -> np.ndarray:
    """Which of P persons are drawn, by M models' OKS `[M, P]` and the persons' numbers of labels `[P]`."""
    if config.choose == "even":
        return evenly(np.arange(len(labels)), config.count)
    return np.argsort(-np.ptp(found, axis=0) * labels, kind="stable")[: config.count]


def own_poses(name: str, truth: Truth, results: Sequence[Mapping[str, Any]], skeleton: Skeleton) -> Owned:
    """Each of `truth.counted.persons`' own pose: greedy within an image, the pair of the greatest OKS first.

    `results` are valid and in the joints that are scored. A pose is one person's at most; one whose OKS with all that
    are left is 0 is nobody's.
    """
    counted = truth.counted
    persons, joints = counted.persons, len(counted.joints)
    sigmas = [skeleton.sigmas[joint] for joint in order_of_file(skeleton, counted.joints)]
    areas = torch.from_numpy(oks_areas(counted, truth.parsed)[persons])
    labels, visibility = (torch.from_numpy(values[persons]) for values in (counted.keypoints, counted.visibility))
    triples = np.array([record["keypoints"] for record in results], dtype=np.float64).reshape(-1, joints, 3)
    rows = {image_id: row for row, image_id in enumerate(counted.image_ids)}
    image_of_pose = np.array([rows[record["image_id"]] for record in results], dtype=np.int64)
    by_image = np.argsort(image_of_pose, kind="stable")
    image_of_person = counted.image_index[persons]

    pose, best = np.full(len(persons), -1), np.zeros(len(persons))
    for image in np.unique(image_of_person):
        first, last = np.searchsorted(image_of_pose[by_image], [image, image + 1])
        its_poses, its_persons = by_image[first:last], np.flatnonzero(image_of_person == image)
        places = torch.from_numpy(triples[its_poses, :, :2])
        similar = oks(places, labels[its_persons], areas[its_persons], sigmas, visibility[its_persons]).numpy().copy()
        while similar.size and similar.max() > 0:
            row, column = np.unravel_index(similar.argmax(), similar.shape)
            pose[its_persons[column]], best[its_persons[column]] = its_poses[row], similar[row, column]
            similar[row], similar[:, column] = 0, 0
    keypoints = np.full((len(persons), joints, 2), np.nan)
    keypoints[pose >= 0] = triples[pose[pose >= 0], :, :2]
    return Owned(name, pose, keypoints, best)


def regions(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Squares `[N, 4]` xywh about boxes `[N, 4]` and points `[N, M, 2]` (NaN: none), image pixels.

    They reach beyond a box by half its longer side at most: a pose that lies far away is not shown.
    """
    centre, longest = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:].max(1, keepdims=True)
    corners = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    all_points = np.concatenate([corners, points], 1)
    low = np.maximum(np.nanmin(all_points, 1), centre - longest)
    high = np.minimum(np.nanmax(all_points, 1), centre + longest)
    side = (high - low).max(1, keepdims=True)
    return np.concatenate([(low + high - side) / 2, side, side], 1)


def views(annotations: CocoAnnotations, images: str, rows: np.ndarray, boxes: np.ndarray) -> list[View]:
    """Squares `[N, 4]` xywh of the file's images `rows` `[N]`, enlarged. Raises UserError and UnreadableImage."""
    check_images_exist([annotations.file_names[row] for row in rows], images)
    affines = box_to_affine(boxes, (SIDE, SIDE), padding=MARGIN)
    found: dict[int, View] = {}
    for row in np.unique(rows):
        picture = read_annotated(annotations, Path(images), int(row))
        for place in np.flatnonzero(rows == row):
            found[int(place)] = View(enlarged(picture, affines[place]), affines[place])
    return [found[place] for place in range(len(rows))]


def enlarged(picture: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The region `[SIDE, SIDE, 3]` of a picture `[H, W, 3]` that `affine` fills it with; outside white."""
    shrunk = affine[0, 0] < 0.5
    if shrunk:  # cubic interpolation reads four pixels, and would leave out some of what becomes one
        factor = 2 * affine[0, 0]
        height, width = (max(1, round(length * factor)) for length in picture.shape[:2])
        scale = np.array([picture.shape[1] / width, picture.shape[0] / height])
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        affine = np.concatenate([affine[:, :2] * scale, affine[:, :2] @ (scale - 1)[:, None] / 2 + affine[:, 2:]], 1)
    return cv2.warpAffine(picture, affine, (SIDE, SIDE), flags=cv2.INTER_CUBIC, borderValue=(255, 255, 255))


def posed(view: View, keypoints: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """The view with a pose `[K, 2]`, image pixels, drawn; joints that are NaN are left out."""
    placed = apply_affine(view.affine, keypoints)[None]
    return draw_poses(view.image, placed, np.ones(placed.shape[:2]), skeleton, threshold=-np.inf)


def in_skeleton(keypoints: np.ndarray, skeleton: Skeleton, joints: Sequence[str]) -> np.ndarray:
    """Keypoints `[J, 2]` of a file's joints as the skeleton's `[K, 2]`, NaN for those that the file lacks."""
    whole = np.full((len(skeleton.joints), 2), np.nan)
    whole[order_of_file(skeleton, joints)] = keypoints
    return whole


def person_name(annotations: CocoAnnotations, row: int) -> str:
    """How a person is told in a figure: its picture, and its id."""
    return f"{annotations.file_names[annotations.image_index[row]]} #{annotations.ids[row]}"


def show(axes: Axes, image: np.ndarray) -> None:
    """A picture `[H, W, 3]` without ticks."""
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
