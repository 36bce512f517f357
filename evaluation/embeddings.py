"""`python -m evaluation embeddings`: how well the features of pose models tell joints apart (ICON, Fig. 5)."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from poserelay.backbones.penultimate import penultimate_level
from poserelay.checkpoint import verify_handoff
from poserelay.datasets.coco import CocoAnnotations, read_coco
from poserelay.datasets.sampling import draw_generator
from poserelay.datasets.topdown import TopDownDataset
from poserelay.distributed import start
from poserelay.errors import UserError
from poserelay.keypoint_embeddings import (
    Points,
    at_best,
    by_chance,
    embed_joints,
    mean_cosines,
    retrieved,
    visible_joints,
)
from poserelay.keypoints import Skeleton, match_joints
from poserelay.model import PoseModel, load_top_down
from poserelay.run import write_atomic, write_json

from .config import EmbeddingsConfig
from .curves import distinct_names
from .visualize import run_name, shortened

matplotlib.use("agg")

DRAWN = 2000
"""Points of a panel: more take t-SNE minutes and cover each other."""
REDUCED = 50
"""Principal components that t-SNE starts from, as its authors do."""
PERPLEXITY = 30.0
BATCH = 64


class Panel(NamedTuple):
    """What is drawn of one checkpoint."""

    title: str
    xy: np.ndarray
    """`[D, 2]`, in the unit of the method."""
    axes: tuple[str, str]
    """Their labels; empty where the axes mean nothing."""


class Style(NamedTuple):
    """How a joint is drawn."""

    colour: str
    marker: str
    filled: bool


def main(config: EmbeddingsConfig) -> dict[str, Any]:
    """Write `out`/embeddings.png and embeddings.json; print and return {"metrics", "protocol"}.

    All checkpoints are measured on the same joints of the same persons.

    Raises:
        UserError: input that cannot be used, a picture that cannot be read, or fewer joints than neighbours.
        CheckFailed: embeddings that are not finite.
    """
    hashes = [verify_handoff(path) for path in config.checkpoints]
    annotations = read_coco(config.annotations)
    models = [load_top_down(path) for path in config.checkpoints]
    skeleton = common_skeleton(models, config.checkpoints, annotations)
    datasets = [crops_for(model, annotations, config.images, skeleton) for model in models]
    rows, taken, outside = choose_joints(datasets, config)
    persons, joints = (torch.from_numpy(indices) for indices in taken.nonzero())
    points = Points(joints, persons)
    drawn = draw_points(len(joints), config.seed)
    device = start(config.device, "fp32", config.threads).device

    names = checkpoint_names(config.checkpoints)
    metrics, panels = {}, []
    for name, model, dataset in zip(names, models, datasets, strict=True):
        vectors = embed_joints(
            model.to(device), dataset, rows, taken, batch_size=BATCH, workers=config.workers, progress=True
        )
        measured = measure(vectors, points, config.neighbours, skeleton)
        metrics[name] = measured
        shown = f"{shortened(name, 44)}\n{describe(measured, config.neighbours)}"
        panels.append(Panel(shown, *lay_out(vectors[drawn], config.method, config.seed)))
    report = {
        "metrics": metrics,
        "protocol": {
            "split": Path(config.annotations).stem,
            "boxes": "gt",
            "persons": len(rows),
            "points": len(joints),
            "points_outside_a_crop": outside,
            "visibility": 2,
            "joints": list(skeleton.joints),
            "neighbours": config.neighbours,
            "excluded": "joints of the same person",
            "similarity": "cosine",
            "checkpoints": {
                name: origin(model, sha256) for name, model, sha256 in zip(names, models, hashes, strict=True)
            },
            "picture": {"method": config.method, "points": len(drawn), "seed": config.seed},
        },
    }
    out = Path(config.out)
    figure = draw_panels(panels, joints[drawn].numpy(), skeleton)
    write_atomic(out / "embeddings.png", lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    write_json(out / "embeddings.json", report)
    print(json.dumps(report) if config.json else format_table(report))
    print(f"{out / 'embeddings.png'} and {out / 'embeddings.json'} written", file=sys.stderr)
    return report


def common_skeleton(models: list[PoseModel], paths: list[str], annotations: CocoAnnotations) -> Skeleton:
    """The joints, by name, that the annotation file and every model have, in the first model's order and names.

    Raises UserError naming the first checkpoint that leaves none.
    """
    first = models[0].skeleton
    common = list(first.joints)
    for path, model in zip(paths, models, strict=True):
        known = [match_joints(names, common) for names in (annotations.joints, model.skeleton.joints)]
        common = [joint for joint, *found in zip(common, *known, strict=True) if None not in found]
        if not common:
            raise UserError(
                f"{path}: its joints ({', '.join(model.skeleton.joints)}) have none in common with "
                f"{annotations.path} ({', '.join(annotations.joints)}) and the checkpoints before it; "
                "take a file with this model's joints, or name them alike"
            )
    pairs = tuple(pair for pair in first.flip_pairs if set(pair) <= set(common))
    return Skeleton(name=first.name, joints=tuple(common), flip_pairs=pairs)


def crops_for(model: PoseModel, annotations: CocoAnnotations, images: str, skeleton: Skeleton) -> TopDownDataset:
    """The annotated persons as the model sees them, with the joints of `skeleton`."""
    size = (model.input.height, model.input.width)
    return TopDownDataset(annotations, images, skeleton, size, alignment=model.input.alignment)


def choose_joints(datasets: list[TopDownDataset], config: EmbeddingsConfig) -> tuple[np.ndarray, np.ndarray, int]:
    """`count` persons spread evenly over those with a visible joint, and which of their joints are embedded.

    Returns:
        Rows `[n]` of the persons, bool `[n, K]` of the joints that are visible and inside every model's crop, and how
        many visible ones were not inside.

    Raises UserError where no joint is visible, or fewer than `neighbours` are those of other persons.
    """
    inside = np.logical_and.reduce([visible_joints(dataset) for dataset in datasets])
    candidates = np.flatnonzero(inside.any(1))
    if not len(candidates):
        raise UserError(
            f"{config.annotations}: none of the {len(inside)} persons has a joint that is labelled visible (2) and "
            "lies in its crop; take a file whose visible joints are marked"
        )
    spread = np.linspace(0, len(candidates) - 1, min(config.count, len(candidates)))
    rows = candidates[spread.round().astype(int)]
    taken = inside[rows]
    others = int(taken.sum() - taken.sum(1).max())
    if others < config.neighbours:
        raise UserError(
            f"neighbours is {config.neighbours}, but some person is compared with only {others} joints of the "
            f"{len(rows) - 1} others; take fewer neighbours, or more persons (count)"
        )
    visible = datasets[0].visibility[rows] == 2
    return rows, taken, int(visible.sum() - taken.sum())


def checkpoint_names(paths: list[str]) -> list[str]:
    """The run's name of each, with its folder's where two are alike, or else the whole path."""
    longer = [f"{Path(path).resolve().parents[2].name}/{run_name(path)}" for path in paths]
    return distinct_names(distinct_names([run_name(path) for path in paths], longer), paths)


def draw_points(total: int, seed: int) -> np.ndarray:
    """At most `DRAWN` of `total` points, drawn without replacement, rising: `[D]`."""
    if total <= DRAWN:
        return np.arange(total)
    return np.sort(draw_generator(seed, 0, 0, 0).choice(total, DRAWN, replace=False))


def measure(vectors: Tensor, points: Points, k: int, skeleton: Skeleton) -> dict[str, Any]:
    """Retrieval among the k nearest and mean similarities, over all points and for each joint that has any.

    "same" and "mirror" are shares of the neighbours, "chance" is what neighbours drawn at random give, "ceiling" the
    largest possible share of the same joint. None where there is nothing to measure.
    """
    found, chance = retrieved(vectors, points, k, skeleton.flip_index), by_chance(points, skeleton.flip_index)
    ceiling = at_best(points, k)

    def means(chosen: Tensor) -> dict[str, float | int | None]:
        return {
            "points": int(chosen.sum()),
            "same": _mean(found.same[chosen]),
            "same chance": _mean(chance.same[chosen]),
            "same ceiling": _mean(ceiling[chosen]),
            "mirror": _mean(found.mirror[chosen]),
            "mirror chance": _mean(chance.mirror[chosen]),
        }

    within, between = mean_cosines(vectors, points)
    per_joint = {name: means(points.joints == joint) for joint, name in enumerate(skeleton.joints)}
    return {
        **means(torch.ones(len(points.joints), dtype=torch.bool)),
        "cosine within joints": None if math.isnan(within) else within,
        "cosine between joints": None if math.isnan(between) else between,
        "joints": {name: values for name, values in per_joint.items() if values["points"]},
    }


def origin(model: PoseModel, sha256: str) -> dict[str, Any]:
    """Where the embeddings of a checkpoint come from."""
    level = penultimate_level(model.backbone)
    return {
        "backbone": model.config.backbone.name,
        "map_stride": model.backbone.strides[level],
        "channels": model.backbone.channels[level],
        "input": f"{model.input.height}x{model.input.width}",
        "alignment": model.input.alignment,
        "sha256": sha256,
    }


def lay_out(vectors: Tensor, method: Literal["tsne", "pca"], seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """Places `[D, 2]` of vectors `[D, C]` in a plane and the labels of its axes; one place where all are equal."""
    values = vectors.double().numpy()
    if (values == values[0]).all():
        return np.zeros((len(values), 2)), ("", "")
    wanted = 2 if method == "pca" else REDUCED
    pca = PCA(min(wanted, *values.shape), svd_solver="full")
    reduced = pca.fit_transform(values)
    if method == "pca":
        first, second = pca.explained_variance_ratio_
        return reduced, (f"1st component, {first:.0%} of the variance", f"2nd component, {second:.0%}")
    tsne = TSNE(perplexity=min(PERPLEXITY, (len(values) - 1) / 3), init="pca", random_state=seed)
    return tsne.fit_transform(reduced), ("", "")


def draw_panels(panels: list[Panel], joints: np.ndarray, skeleton: Skeleton) -> Figure:
    """The panels beside each other; `joints` `[D]` of their points give colours and markers, told by one legend."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    styles = joint_styles(skeleton)
    present = [joint for joint in range(len(skeleton.joints)) if (joints == joint).any()]
    of_legend = -(-len(present) // (22 * rows))
    figure = Figure(figsize=(4.4 * columns + 2.1 * of_legend, 4.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for cell, panel in zip(axes, panels, strict=False):
        for joint in present:
            (colour, marker, filled), xy = styles[joint], panel.xy[joints == joint]
            inside = colour if filled else "white"
            cell.scatter(*xy.T, s=13, color=inside, edgecolors=[colour], marker=marker, linewidths=0.8)
        cell.set_title(panel.title, fontsize=9)
        cell.set(xticks=[], yticks=[], xlabel=panel.axes[0], ylabel=panel.axes[1])
    for cell in axes[len(panels) :]:
        cell.set_axis_off()
    handles = [legend_mark(skeleton.joints[joint], styles[joint]) for joint in present]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, ncols=of_legend)
    return figure


def joint_styles(skeleton: Skeleton) -> list[Style]:
    """Mirror joints share a colour, the first a filled circle and the second an open triangle; others are squares."""
    groups = sorted({min(joint, mirror) for joint, mirror in enumerate(skeleton.flip_index)})
    few = len(groups) <= 10
    palette = matplotlib.colormaps["tab10"] if few else matplotlib.colormaps["turbo"].resampled(len(groups))
    seconds = skeleton.indices(second for _, second in skeleton.flip_pairs)
    styles = []
    for joint, mirror in enumerate(skeleton.flip_index):
        marker = "s" if joint == mirror else "^" if joint in seconds else "o"
        styles.append(Style(to_hex(palette(groups.index(min(joint, mirror)))), marker, joint not in seconds))
    return styles


def legend_mark(joint: str, style: Style) -> Line2D:
    """A joint's entry in the legend."""
    inside = style.colour if style.filled else "white"
    return Line2D([], [], linestyle="", marker=style.marker, color=style.colour, mfc=inside, label=shortened(joint))


def describe(measured: dict[str, Any], k: int) -> str:
    """One line below a panel's name."""
    mirror = "" if measured["mirror"] is None else f", {measured['mirror']:.0%} the mirror joint"
    return f"of {k} neighbours {measured['same']:.0%} are the same joint{mirror}"


def format_table(report: dict[str, Any]) -> str:
    """A row per measure, then the share of the same joint for each joint; a column per checkpoint, then chance."""
    metrics, protocol = report["metrics"], report["protocol"]
    first, k = next(iter(metrics.values())), protocol["neighbours"]
    rows = [
        (f"same joint@{k}", [m["same"] for m in metrics.values()], first["same chance"]),
        (f"mirror joint@{k}", [m["mirror"] for m in metrics.values()], first["mirror chance"]),
        ("cosine within joints", [m["cosine within joints"] for m in metrics.values()], None),
        ("cosine between joints", [m["cosine between joints"] for m in metrics.values()], None),
    ]
    for joint, values in first["joints"].items():
        rows.append((f"  {joint}", [m["joints"][joint]["same"] for m in metrics.values()], values["same chance"]))
    columns = [shortened(name) for name in metrics] + ["chance"]
    label = max(len(name) for name, _, _ in rows)
    widths = [max(6, len(column)) for column in columns]
    lines = [" " * label + "".join(f"  {c:>{w}}" for c, w in zip(columns, widths, strict=True))]
    for name, values, chance in rows:
        cells = ["-" if value is None else f"{value:.4f}" for value in (*values, chance)]
        lines.append(f"{name:<{label}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    if first["same ceiling"] < 1:
        lines.append(f"(no embedding reaches more than {first['same ceiling']:.4f}: some joints are shown too rarely)")
    told = ("split", "boxes", "persons", "points", "points_outside_a_crop", "excluded", "similarity")
    return "\n".join([*lines, f"({', '.join(f'{name} {protocol[name]}' for name in told)})"])


def _mean(values: Tensor) -> float | None:
    """Of those that are not NaN, or None."""
    kept = values[~values.isnan()]
    return float(kept.mean()) if len(kept) else None
