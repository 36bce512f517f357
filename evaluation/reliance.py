"""Whether SCIO's verification networks read the distal joint that they verify (readings SCIO 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from poserelay.datasets.coco import CocoAnnotations
from poserelay.datasets.sampling import draw_generator, evenly
from poserelay.datasets.topdown import TopDownDataset
from poserelay.errors import CheckFailed
from poserelay.geometry import apply_affine, box_to_affine
from poserelay.heads import SCIO
from poserelay.heatmaps import input_to_heatmap
from poserelay.inference import crop_batches
from poserelay.local_search import SelfConstraint
from poserelay.model import PoseModel

PERSONS = 1000
"""Looked at, at most: their pictures are read once more, and the means of as many do not move."""
DISPLACED = (2.0, 6.0)
"""Heatmap pixels; 6 is as far as the search goes."""
SEED = 0
BLIND = 0.1
"""Reliance under which the search of a joint is warned about."""


class Distal(NamedTuple):
    """Where the distal joints of N persons truly are."""

    xy: np.ndarray
    """`[N, G, 2]` float64, heatmap pixels; 0 where it is not labelled."""
    inside: np.ndarray
    """`[N, G]` bool: labelled, and on the map."""
    whole: np.ndarray
    """`[N, G]` bool: inside, and the group's A is labelled too."""


class Crops(NamedTuple):
    """The persons that reliance is measured on."""

    dataset: TopDownDataset
    distal: Distal


def networks_of(model: PoseModel) -> SCIO:
    """SCIO's networks of a model that carries them."""
    assert model.refiner is not None
    return model.refiner


def annotated_crops(
    model: PoseModel, annotations: CocoAnnotations, images: str, rows: np.ndarray | None = None
) -> TopDownDataset:
    """The annotated persons as the model sees them; rows: of the annotations, None for all."""
    size = (model.input.height, model.input.width)
    return TopDownDataset(annotations, images, model.skeleton, size, alignment=model.input.alignment, rows=rows)


def true_distal(model: PoseModel, dataset: TopDownDataset) -> Distal:
    """The labels of the crops' distal joints."""
    networks = networks_of(model)
    distal, verified = networks.distal.tolist(), networks.verified.tolist()
    affines = box_to_affine(dataset.boxes, dataset.size, padding=dataset.padding, alignment=dataset.alignment)
    xy = torch.from_numpy(apply_affine(affines, dataset.keypoints[:, distal]))
    xy = input_to_heatmap(xy, dataset.size, model.heatmap_size, dataset.alignment).numpy()
    labelled = dataset.visibility > 0
    inside = labelled[:, distal] & on_map(xy, model.heatmap_size)
    return Distal(np.where(labelled[:, distal, None], xy, 0), inside, inside & labelled[:, verified])


def on_map(xy: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether points `[..., 2]`, heatmap pixels, lie on a map of (height, width), where the search may go: `[...]`."""
    return np.asarray(((xy >= 0) & (xy <= np.array(size[::-1]) - 1)).all(-1))


def displaced(
    xy: np.ndarray, distances: tuple[float, float], size: tuple[int, int], generator: np.random.Generator
) -> np.ndarray:
    """Points `[..., 2]` moved by distances drawn evenly from a range, heatmap pixels, in random directions.

    A step off the map, of (height, width), is turned round along that axis: it stays as long.
    """
    distance = generator.uniform(*distances, xy.shape[:-1])
    angle = generator.uniform(0, 2 * np.pi, xy.shape[:-1])
    step = distance[..., None] * np.stack((np.cos(angle), np.sin(angle)), -1)
    moved = xy + step
    last = np.array(size[::-1]) - 1
    return np.where((moved < 0) | (moved > last), xy - step, moved)


def shuffled(xy: np.ndarray, counted: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Another person's point for each of xy `[N, G, 2]`, never its own, among the counted ones `[N, G]` of its group.

    Every counted person lends its point once. Returns the points and, `[N, G]`, which were found: all counted ones but
    those of a group that counts for one person alone. The others keep their own.
    """
    others, found = xy.copy(), np.zeros_like(counted)
    for group in range(xy.shape[1]):
        order = generator.permutation(np.flatnonzero(counted[:, group]))
        if len(order) > 1:
            others[order, group] = xy[np.roll(order, 1), group]
            found[order, group] = True
    return others, found


def reliance_crops(model: PoseModel, annotations: CocoAnnotations, images: str) -> Crops | None:
    """At most PERSONS persons, spread evenly over those with a group whose A and D are labelled; None: there is none.

    Raises UserError as `TopDownDataset`.
    """
    everyone = annotated_crops(model, annotations, images)
    candidates = annotations.persons[true_distal(model, everyone).whole.any(1)]
    if not len(candidates):
        return None
    dataset = annotated_crops(model, annotations, images, evenly(candidates, PERSONS))
    return Crops(dataset, true_distal(model, dataset))


def reliance(model: PoseModel, crops: Crops, batch_size: int, workers: int) -> dict[str, Any]:
    """Mean self-constraint loss (Eq. 8) with H_D at the true D, at another person's D, and at the true D displaced.

    The heatmaps and f are the head's own for these persons, in annotated boxes and without flip test; H_D is rendered.
    The displaced D is 2 to 6 heatmap pixels off in a random direction. `reliance` is 1 - true / displaced. At 0 the
    networks are blind: they predict A without reading D, and a search of their loss finds nothing. Towards 1 the loss
    at a wrong place is many times that at the truth; below 0 they prefer wrong places. A little above 0 is enough for
    a search where the loss varies little otherwise, so read it beside the errors that a search mends (`evaluation
    scio`).

    The draws depend on the persons alone, not on batches. It is a second pass over at most PERSONS persons.

    Returns:
        "groups": by the name of D, and "all": over all groups together, {"count", "true", "shuffled", "displaced",
        "reliance"}, None where there is nothing to measure; "persons", "displaced_by" (heatmap pixels), "seed".
    """
    networks, (dataset, distal) = networks_of(model), crops
    others, found = shuffled(distal.xy, distal.whole, draw_generator(SEED, 0, 0, 0))
    moved = displaced(distal.xy, DISPLACED, model.heatmap_size, draw_generator(SEED, 0, 0, 1))
    places = torch.from_numpy(np.stack([distal.xy, others, moved])).float()
    losses = losses_at(model, dataset, places, batch_size, workers)
    counted = np.stack([distal.whole, found, distal.whole])

    def means(columns: slice) -> dict[str, Any]:
        values = [
            float(loss[rows].mean()) if rows.any() else None
            for loss, rows in zip(losses[..., columns], counted[..., columns], strict=True)
        ]
        true, _, wrong = values
        return {
            "count": int(distal.whole[:, columns].sum()),
            **dict(zip(("true", "shuffled", "displaced"), values, strict=True)),
            "reliance": 1 - true / wrong if true is not None and wrong else None,
        }

    names = [model.skeleton.joints[joint] for joint in networks.distal.tolist()]
    return {
        "groups": {name: means(slice(group, group + 1)) for group, name in enumerate(names)},
        "all": means(slice(None)),
        "persons": len(dataset),
        "displaced_by": list(DISPLACED),
        "seed": SEED,
    }


@torch.inference_mode()
def losses_at(
    model: PoseModel, dataset: TopDownDataset, places: torch.Tensor, batch_size: int, workers: int
) -> np.ndarray:
    """Self-constraint loss `[P, N, G]` of the crops' N persons with their distal joints at P places `[P, N, G, 2]`.

    places: heatmap pixels. Raises UnreadableImage for a picture that cannot be read, CheckFailed where a loss is not
    finite.
    """
    device = next(model.parameters()).device
    networks = networks_of(model.eval())
    losses, first = [], 0
    for batch in crop_batches(dataset, batch_size, workers, device.type == "cuda", progress=True):
        maps, features = model.with_features(model.preprocess(batch.images.to(device)))
        constraint = SelfConstraint(networks, maps.float(), features.float())
        here = places[:, first : first + len(batch)].to(device)
        found = torch.stack([constraint.loss(xy) for xy in here]).cpu()
        if not torch.isfinite(found).all():
            raise CheckFailed(
                "the verification networks' heatmaps hold NaN or infinity; the model's weights are damaged"
            )
        losses.append(found)
        first += len(batch)
    return torch.cat(losses, 1).double().numpy()


def blindness(found: Mapping[str, Any] | None) -> str | None:
    """A warning for the user who searches with networks that hardly read D, naming the joints; None: all is well."""
    groups = {} if found is None else found["groups"]
    blind = [name for name, its in groups.items() if its["reliance"] is not None and its["reliance"] < BLIND]
    if not blind:
        return None
    return (
        f"warning: the verification networks hardly read {', '.join(blind)} (reliance under {BLIND}): a search of "
        "these has little to go by and may lead away from them; --decoding.scio.output learning leaves the search out, "
        "training with --scio.perturb_distal, or for longer with it, teaches the networks"
    )


def format_reliance(found: Mapping[str, Any]) -> str:
    """Two lines: the losses over all groups, and the reliance of all and of each."""
    everywhere = found["all"]
    if everywhere["true"] is None:
        return "SCIO: no group whose A and D are labelled, so nothing tells whether its networks read D"
    low, high = found["displaced_by"]
    shuffled = "" if everywhere["shuffled"] is None else f"{everywhere['shuffled']:.3g} at another person's, "
    groups = ", ".join(
        f"{name} {'-' if its['reliance'] is None else format(its['reliance'], '.3f')}"
        for name, its in found["groups"].items()
    )
    total = "-" if everywhere["reliance"] is None else f"{everywhere['reliance']:.3f}"
    return (
        f"SCIO loss {everywhere['true']:.3g} at the true distal joint, {shuffled}{everywhere['displaced']:.3g} "
        f"{low:g} to {high:g} heatmap pixels off ({everywhere['count']} groups of {found['persons']} persons)\n"
        f"SCIO reliance on the distal joint {total} (0: blind): {groups}"
    )
