"""DeepLabCut and lightning-pose: labels of pictures, CollectedData_SCORER.csv, with one animal or several on each.

The header is the rows scorer, bodyparts and coords, or scorer, individuals, bodyparts and coords. A row begins with the
picture's path, in one column or in three (labeled-data, video, picture), and goes on with x and y of each point; a
point without numbers (empty or NaN) is not labelled. The others become visible (2), as the files do not tell. People
label on pictures that napari or matplotlib draws, where (0, 0) is the centre of the top-left pixel as it is here, so
nothing is shifted: every number stays what the file says.

The boxes are ours: the extent of an animal's labelled points and a margin on each side, clipped to the picture, as
DeepLabCut makes its own (`bbox_margin`, 20 pixels). Unique bodyparts (those of the individual `single`) belong to no
animal and are left out, and so are pictures without a labelled point.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..keypoints import Skeleton, match_joints, skeleton_from_category
from . import LOST, Conversion, Pictures, box_problem, clipped_box, person, place_pictures, require_pictures

HEADERS = (["scorer", "bodyparts", "coords"], ["scorer", "individuals", "bodyparts", "coords"])
AXES = ("x", "y", "likelihood")
UNIQUE = "single"
"""DeepLabCut's name for the individual of the unique bodyparts."""


class Labels(NamedTuple):
    """What the files say, all in their order."""

    columns: dict[tuple[str, str], None]
    """Individual ('' where the file has one animal) and bodypart."""
    pictures: dict[str, dict[tuple[str, str], tuple[float, float]]]
    """Of each picture, by its path with forward slashes, the labelled points (x, y) by column."""
    lines: dict[str, str]
    """Where each picture is: file and line."""


def read_deeplabcut(
    path: Path, pictures: Pictures | None, skeleton: Skeleton | None = None, margin: float = 20.0
) -> Conversion:
    """The animals with labelled points; image ids count the files' rows, annotation ids these animals.

    File names are the rows' paths without the leading folders that the folder of `pictures` lies in: that may be the
    project, its labeled-data or the folder of a video.

    Args:
        path: a CSV file, or the folder of a project, its labeled-data or a video, whose CollectedData*.csv are merged.
        pictures: they are needed, because the files do not give their sizes.
        skeleton: the joints to take, by name, and limbs; None: all bodyparts in the files' order, and no limbs.
        margin: of the boxes, image pixels.

    Raises:
        UserError: no such file, one of predictions, a row that is not as described (names it), a picture in two rows,
            or a joint of the skeleton that is no bodypart.
    """
    pictures = require_pictures(pictures, path)
    labels = Labels({}, {}, {})
    files = _files(path)
    for file in files:
        _read(file, labels)
    individuals = list(dict.fromkeys(individual for individual, _ in labels.columns))
    animals = [individual for individual in individuals if individual != UNIQUE] or individuals
    bodyparts = list(dict.fromkeys(part for individual, part in labels.columns if individual in animals))
    given, skeleton = skeleton, _skeleton(path, bodyparts, skeleton)
    order = [bodyparts[place] for place in match_joints(bodyparts, skeleton.joints) if place is not None]
    found = Conversion(skeleton=skeleton)
    names = _relative(list(labels.pictures), pictures.folder)
    ids = place_pictures(found, list(names.values()), pictures)
    sizes = {image["id"]: (image["width"], image["height"]) for image in found.images}
    number = 0
    for source, points in labels.pictures.items():
        poses = {animal: [points.get((animal, part)) for part in order] for animal in animals}
        poses = {animal: joints for animal, joints in poses.items() if any(joints)}
        image = ids.get(names[source])
        if not poses and image is not None:
            found.drop("pictures without a labelled point", names[source])
            sizes.pop(image)
        for animal, joints in poses.items():
            number += 1
            name = f"{names[source]}, {animal}" if animal else names[source]
            if image is None:
                found.drop(f"animals {LOST}", name)
                continue
            box = clipped_box(np.array([joint for joint in joints if joint]), margin, sizes[image])
            record = person(number, image, box, [(*joint, 2) if joint else (0.0, 0.0, 0) for joint in joints])
            if problem := box_problem(record, sizes[image]):
                found.drop(f"animals {problem}", name)
                continue
            found.annotations.append(record)
    found.images = [image for image in found.images if image["id"] in sizes]
    found.notes += _notes(files, labels, animals, skeleton, set(order), derived=given is None)
    return found


def _files(path: Path) -> list[Path]:
    if path.suffix.lower() in (".h5", ".hdf5"):
        raise UserError(
            f"{path}: HDF5 is not read here; give the CollectedData_SCORER.csv that DeepLabCut keeps beside it, or "
            "write one with pandas: read_hdf(FILE).to_csv(FILE)"
        )
    if not path.is_dir():
        return [path]
    for pattern in ("CollectedData*.csv", "*/CollectedData*.csv", "labeled-data/*/CollectedData*.csv"):
        if files := sorted(path.glob(pattern)):
            return files
    raise UserError(
        f"{path}: no CollectedData*.csv in it, in its folders or in those of its labeled-data; give the folder of a "
        "project, its labeled-data, or a CSV file"
    )


def _rows(file: Path) -> list[tuple[str, list[str]]]:
    """The rows that are not blank, each with its file and line."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            return [(f"{file}: line {reader.line_num}", row) for row in reader if any(row)]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a CSV file ({error}); give a CollectedData_SCORER.csv") from None


def _read(file: Path, labels: Labels) -> None:
    """Add what a file says."""
    rows = _rows(file)
    starts = [cells[0] for _, cells in rows]
    depth = next((len(header) for header in HEADERS if starts[: len(header)] == header), None)
    if depth is None:
        raise UserError(
            f"{file}: its first rows begin with {', '.join(map(repr, starts[:4])) or 'nothing'}, expected scorer, "
            "(individuals,) bodyparts, coords; give a CollectedData_SCORER.csv"
        )
    header, rows = [cells for _, cells in rows[:depth]], rows[depth:]
    for where, cells in rows:
        if len(cells) != len(header[-1]):
            raise UserError(f"{where}: {len(cells)} cells, but {len(header[-1])} in line {depth}; mend the row")
    likely = [index for index, axis in enumerate(header[-1]) if axis == "likelihood"]
    if any(not _is_missing(cells[index]) for _, cells in rows for index in likely):
        raise UserError(
            f"{file}: its points have a likelihood, so that they are predictions and no labels; give a "
            "CollectedData_SCORER.csv (or correct them in DeepLabCut, which writes one)"
        )
    first, columns = _columns(file, header)
    labels.columns.update(dict.fromkeys(columns))
    for where, cells in rows:
        name = "/".join(cells[:first]).replace("\\", "/")
        if not PurePosixPath(name).suffix:
            raise UserError(f"{where}: {name!r} is no picture's name; give labels of pictures, not of a video's frames")
        if name in labels.lines:
            raise UserError(f"{where}: {name} is in {labels.lines[name]} as well; keep one of the rows")
        labels.lines[name] = where
        placed = {
            column: _point(cells[x], cells[y], f"{where}: {' '.join(filter(None, column))}")
            for column, (x, y) in columns.items()
        }
        labels.pictures[name] = {column: point for column, point in placed.items() if point is not None}


def _columns(file: Path, header: Sequence[Sequence[str]]) -> tuple[int, dict[tuple[str, str], tuple[int, int]]]:
    """How many columns the path takes, and where x and y of each individual and bodypart are."""
    coords = header[-1]
    first = next((index for index, axis in enumerate(coords) if axis in AXES), len(coords))
    places: dict[tuple[str, str], dict[str, int]] = {}
    for index in range(first, len(coords)):
        parts = [row[index] if index < len(row) else "" for row in header[1:-1]]
        axes = places.setdefault(("" if len(parts) < 2 else parts[0], parts[-1]), {})
        if coords[index] not in AXES or not all(parts) or coords[index] in axes:
            named = " ".join([*parts, coords[index]])
            raise UserError(f"{file}: column {index + 1}: found {named!r}, expected x and y of a bodypart, once each")
        axes[coords[index]] = index
    for column, axes in places.items():
        if "x" not in axes or "y" not in axes:
            raise UserError(f"{file}: {' '.join(filter(None, column))} has no column {'y' if 'x' in axes else 'x'}")
    return first, {column: (axes["x"], axes["y"]) for column, axes in places.items()}


def _is_missing(text: str) -> bool:
    return text.strip().lower() in ("", "nan")


def _point(x: str, y: str, where: str) -> tuple[float, float] | None:
    if _is_missing(x) and _is_missing(y):
        return None
    try:
        point = float(x), float(y)
    except ValueError:
        point = math.nan, math.nan
    if not all(map(math.isfinite, point)):
        raise UserError(f"{where}: found x {x!r} and y {y!r}, expected two numbers, or none where it is not labelled")
    return point


def _skeleton(path: Path, bodyparts: Sequence[str], skeleton: Skeleton | None) -> Skeleton:
    if skeleton is None:
        try:
            return skeleton_from_category({"name": "animal", "keypoints": list(bodyparts)})
        except UserError as error:
            raise UserError(f"{path}: its bodyparts are no joints: {error}") from None
    places = match_joints(bodyparts, skeleton.joints)
    if missing := [joint for joint, place in zip(skeleton.joints, places, strict=True) if place is None]:
        raise UserError(
            f"--skeleton {skeleton.name}: {', '.join(missing)} not among the bodyparts of {path} "
            f"({', '.join(bodyparts)})"
        )
    return skeleton


def _relative(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Each name without as many leading folders as it takes for one to lie in `folder`; whole where none ever does."""
    parts = {name: [part for part in PurePosixPath(name).parts if part != "/"] for name in names}
    for dropped in range(min(map(len, parts.values()), default=0)):
        shorter = {name: "/".join(path[dropped:]) for name, path in parts.items()}
        if len(set(shorter.values())) == len(names) and any((folder / name).is_file() for name in shorter.values()):
            return shorter
    return {name: "/".join(path) for name, path in parts.items()}


def _notes(
    files: Sequence[Path], labels: Labels, animals: Iterable[str], skeleton: Skeleton, taken: set[str], *, derived: bool
) -> list[str]:
    notes = [f"merged {len(files)} files: {', '.join(map(str, files))}"] if len(files) > 1 else []
    counts: Mapping[str, int] = {
        part: sum((individual, part) in points for points in labels.pictures.values())
        for individual, part in labels.columns
        if individual not in animals
    }
    if counts:
        listed = ", ".join(f"{part} ({count})" for part, count in counts.items())
        notes.append(f"unique bodyparts belong to no animal, and their points are left out: {listed}")
    others = dict.fromkeys(part for individual, part in labels.columns if individual in animals and part not in taken)
    if others:
        notes.append(f"bodyparts that {skeleton.name} does not have are left out: {', '.join(others)}")
    if derived:
        pairs = ", ".join(" and ".join(pair) for pair in skeleton.flip_pairs)
        notes.append(f"mirror pairs by the names: {pairs or 'none; a skeleton file can give them'}")
    return notes
