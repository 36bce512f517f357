"""What an annotation file holds: persons, joints, sizes, overlaps, and what is missing (CCM, Fig. 1). Imports no torch.

Persons are annotations that show one, with at least one labelled joint, as CCM counts them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .config import InspectConfig
from .convert.ochuman import max_ious
from .datasets.coco import CocoAnnotations, read_coco, read_json
from .errors import UserError
from .keypoints import resolve_skeleton
from .run import write_atomic

SIZES = {"small": 32.0**2, "medium": 96.0**2, "large": float("inf")}
"""COCO's, by area in pixels: up to which, from the one before on."""
OVERLAPS = {"none": sys.float_info.min, "below 0.5": 0.5, "0.5 to 0.75": 0.75, "0.75 to 1": float("inf")}
"""Of a person's box with others' in the picture, MaxIoU, likewise; those of CCM's Table 3 are the last two."""
STATES = ("unlabelled", "hidden", "visible")
"""By visibility: 0, 1, 2."""
COLOURS = {"visible": "#0072B2", "hidden": "#D55E00", "unlabelled": "#CCCCCC"}
NAMED = 20
"""Missing pictures that are named."""


def main(config: InspectConfig) -> None:
    """Print `annotation_statistics`, as text or as one JSON object; with `out` write statistics.png there as well."""
    path = Path(str(config.data))
    figures = annotation_statistics(path, None if config.images is None else Path(config.images))
    print(json.dumps(figures, allow_nan=False) if config.json else format_statistics(figures))
    if config.out is not None:
        chart = Path(config.out) / "statistics.png"
        draw_statistics(figures, chart)
        print(f"inspect: {chart} written", file=sys.stderr)


def annotation_statistics(path: Path, images: Path | None = None) -> dict[str, Any]:
    """Counts of an annotation file.

    Lists that begin at 0 have at place n how many there are with n: pictures with n persons, persons with n labelled
    joints.

    Args:
        images: folder of the pictures, where those that are missing are to be counted.

    Raises:
        UserError: as `read_coco`, no person in the file, or no such folder.
    """
    data = read_json(path)
    annotations = read_coco(path, data)
    rows = annotations.persons
    if not len(rows):
        raise UserError(f"{path}: no person with a labelled joint among its {len(annotations.ids)} annotations")
    skeleton = resolve_skeleton("auto", annotations.category, str(path))
    visibility = annotations.visibility[rows]
    labelled = (visibility > 0).sum(axis=1)
    of_picture = np.bincount(annotations.image_index[rows], minlength=len(annotations.image_ids))
    records = [record for record in data["annotations"] if record["category_id"] == annotations.category["id"]]
    crowds = int(annotations.iscrowd.sum())
    return {
        "pictures": len(annotations.image_ids),
        "pictures_with_persons": int((of_picture > 0).sum()),
        "pictures_missing": None if images is None else _missing(annotations.file_names, images),
        "pictures_without_crowd_index": sum("crowdIndex" not in image for image in data["images"]),
        "persons": len(rows),
        "crowds": crowds,
        "without_labelled_joints": len(annotations.ids) - crowds - len(rows),
        "persons_without_area": sum("area" not in records[row] for row in rows),
        "persons_without_head_size": int(np.isnan(annotations.head_sizes[rows]).sum()),
        "persons_per_picture": np.bincount(of_picture).tolist(),
        "persons_by_labelled_joints": np.bincount(labelled, minlength=len(skeleton.joints) + 1).tolist(),
        "sizes": _histogram(annotations.areas[rows], SIZES),
        "overlaps": _histogram(_overlaps(annotations)[rows], OVERLAPS),
        "joints": {
            joint: {state: int((visibility[:, column] == code).sum()) for code, state in enumerate(STATES)}
            for column, joint in enumerate(annotations.joints)
        },
        "skeleton": skeleton.name,
        "sigmas": dict(zip(annotations.joints, skeleton.sigmas, strict=True)),
        "sigmas_assumed": skeleton.sigmas_assumed,
    }


def format_statistics(figures: dict[str, Any]) -> str:
    """The figures of `annotation_statistics` as a text."""
    persons, joints = figures["persons"], figures["joints"]
    per_picture = figures["persons_per_picture"]
    many = sum(per_picture[5:])
    listed = [f"{count} with {number}" for number, count in enumerate(per_picture[:5]) if count]
    pictures = ", ".join(listed + [f"{many} with 5 to {len(per_picture) - 1}"] * (many > 0))
    missing = figures["pictures_missing"]
    if missing is not None:
        first = f", such as {missing['names'][0]}" if missing["count"] else ""
        pictures += f"; {missing['count']} missing in the folder{first}"
    total = persons * len(joints)
    states = {state: sum(counts[state] for counts in joints.values()) / total for state in STATES}
    sizes, overlaps = (_shares(figures[name], persons) for name in ("sizes", "overlaps"))
    median = _median(figures["persons_by_labelled_joints"])
    lines = [
        f"pictures     {figures['pictures']}: persons {pictures}",
        f"persons      {persons}; and {figures['crowds']} crowds, {figures['without_labelled_joints']} boxes without a "
        "labelled joint",
        f"area         {sizes} (COCO's, 32^2 and 96^2 pixels); {_given(figures, 'area', '0.53 of the box')}",
        f"overlap      highest IoU with another's box: {overlaps}",
        f"head size    {_given(figures, 'head_size', 'no PCKh')}",
        f"crowdIndex   annotated for {figures['pictures'] - figures['pictures_without_crowd_index']} pictures",
        f"joints       {' '.join(f'{share:.1%} {state},' for state, share in reversed(states.items())).rstrip(',')} of "
        f"{len(joints)} per person; half of the persons have {median} or more",
        f"sigmas       of {figures['skeleton']}"
        + (", assumed: OKS compares only with itself" * figures["sigmas_assumed"]),
        "",
        "labelled joints of a person",
        *_bars(figures["persons_by_labelled_joints"], persons),
        "",
    ]
    width = max(map(len, joints))
    lines.append(f"{'joint':<{width}}   visible   hidden   unlabelled   sigma")
    for joint, counts in joints.items():
        shown = f"{counts['visible']:>9} {counts['hidden']:>8} {counts['unlabelled']:>12}"
        lines.append(f"{joint:<{width}} {shown}   {figures['sigmas'][joint]:.4g}")
    return "\n".join(lines)


def draw_statistics(figures: dict[str, Any], path: Path) -> None:
    """Write CCM's Fig. 1 (a) and (b) as a PNG: persons by labelled joints, and the state of each joint's labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    joints, persons = figures["joints"], figures["persons"]
    figure = Figure(figsize=(11, max(3.6, 0.24 * len(joints) + 1.4)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    counts = np.array(figures["persons_by_labelled_joints"])
    left.bar(np.arange(1, len(counts)), 100 * counts[1:] / persons, color=COLOURS["visible"])
    left.set_title(f"(a) {persons:,} persons by labelled joints")
    left.set(xlabel=f"labelled joints of {len(joints)}", ylabel="% of the persons", xlim=(0.3, len(counts) - 0.3))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(axis="y", alpha=0.3)
    left.set_axisbelow(True)
    start = np.zeros(len(joints))
    for state in reversed(STATES):
        shares = np.array([100 * of[state] / persons for of in joints.values()])
        named = f"{state} {shares.mean():.1f} %"
        right.barh(list(joints), shares, left=start, label=named, color=COLOURS[state])
        start += shares
    right.set_title("(b) labels of each joint", pad=26)
    right.set(xlabel="% of the persons", xlim=(0, 100))
    right.margins(y=0.01)
    right.invert_yaxis()
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, borderaxespad=0.2)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _histogram(values: np.ndarray, bounds: dict[str, float]) -> dict[str, int]:
    places = np.searchsorted(list(bounds.values()), values, side="right")
    return dict(zip(bounds, np.bincount(places, minlength=len(bounds)).tolist(), strict=True))


def _overlaps(annotations: CocoAnnotations) -> np.ndarray:
    """`[N]`, the highest IoU of each box with another one of its picture, crowds aside."""
    found = np.zeros(len(annotations.ids))
    rows = np.flatnonzero(~annotations.iscrowd)
    order = rows[np.argsort(annotations.image_index[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(annotations.image_index[order])) + 1
    for group in np.split(order, starts):
        found[group] = max_ious(annotations.boxes[group].tolist())
    return found


def _missing(names: list[str], folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures; check --images")
    lost = [name for name in names if not (folder / name).is_file()]
    return {"count": len(lost), "names": lost[:NAMED]}


def _shares(counts: dict[str, int], total: int) -> str:
    return ", ".join(f"{name} {count / total:.1%}" for name, count in counts.items())


def _given(figures: dict[str, Any], field: str, otherwise: str) -> str:
    lacking = figures[f"persons_without_{field}"]
    return f"annotated for {figures['persons'] - lacking} persons" + f", {otherwise} for {lacking}" * (lacking > 0)


def _median(counts: list[int]) -> int:
    """The largest number of joints that at least half of the persons have."""
    above = np.cumsum(counts[::-1])[::-1]
    return int(np.flatnonzero(2 * above >= above[0]).max())


def _bars(counts: list[int], total: int) -> list[str]:
    """A line for each number of joints from 1, the longest bar 40 wide."""
    longest = max(counts)
    return [
        f"{number:>5}  {count:>8}  {count / total:>6.1%}  {'#' * round(40 * count / longest)}".rstrip()
        for number, count in enumerate(counts)
        if number
    ]
