"""Which annotated persons are used as labelled, and the lists of them and of pictures to annotate. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .config import LabelsConfig
from .datasets.coco import CocoAnnotations
from .errors import UserError
from .run import write_text

FORMAT = 1
LABELS = "labels.json"
"""The list of labelled pictures or persons in a run directory."""


@dataclass(frozen=True)
class Subset:
    """Pictures to annotate, as `poserelay select` writes them, or the labelled ones of a run; names are relative to
    the folder of pictures."""

    images: list[str]
    """The pictures chosen, sorted."""
    included: list[str]
    """Those that were labelled before and that the choice complements, sorted."""
    method: str
    """kmeans or kcentre of `poserelay select`; random, first or all of a run."""
    count: int
    """Of the pictures chosen."""
    seed: int
    """0 where nothing was drawn."""
    duplicate_similarity: float
    """1 keeps duplicates."""
    checkpoint_sha256: str
    """Of the hand-off file whose backbone was used; empty where none was."""

    @property
    def labelled(self) -> list[str]:
        """All the pictures that are labelled once the chosen ones are, sorted."""
        return sorted({*self.images, *self.included})


@dataclass(frozen=True)
class PersonSubset:
    """The labelled persons of a run."""

    persons: list[int]
    """Annotation ids, rising."""
    images: list[str]
    """The pictures that they are on, sorted, relative to the folder of pictures."""
    method: str
    """random or first."""
    count: int
    """Of the persons."""
    seed: int
    """0 where nothing was drawn."""


KINDS: dict[str, type[Subset | PersonSubset]] = {"images": Subset, "persons": PersonSubset}
AnySubset = TypeVar("AnySubset", bound=Subset | PersonSubset)


@dataclass(frozen=True)
class Chosen:
    """The labelled persons among those of an annotation file."""

    rows: np.ndarray
    """`[N]` int64, indices into the annotations, rising."""
    images: list[int]
    """Ids of the images that they are on, in the file's order."""
    subset: Subset | PersonSubset
    """The list that makes the same choice from the same file."""


def write_subset(path: Path, subset: Subset | PersonSubset) -> None:
    """Replace `path` atomically; equal subsets give equal bytes."""
    write_text(path, _text(subset))


def write_labels(run_dir: Path, chosen: Chosen) -> None:
    """Write labels.json into a run directory, for people and for `labels.file` of other runs; a resumed run finds it.

    A ratio and a count that choose the same give equal bytes; a list that was given is written as it was.

    Raises:
        UserError: the run was started with other labels.
    """
    path, text = run_dir / LABELS, _text(chosen.subset)
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        write_text(path, text)
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a new run_dir") from None
    if found != text.encode():
        raise UserError(f"{path}: the run here was started with other labels; put the data back, or name a new run_dir")


def is_subset(path: str | Path) -> bool:
    """Whether the file says that it is a `Subset`; nothing else in it is checked."""
    return _kind(Path(path)) == "images"


def read_subset(path: str | Path) -> Subset:
    """A list of pictures that `write_subset` wrote.

    Raises:
        UserError: absent, not such a list, of another format, or changed since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a list that `poserelay select` wrote")
    if not is_subset(path):
        raise UserError(f"{path}: not a list of pictures; give a file that `poserelay select` wrote")
    return _read(path, Subset)


def read_labels(path: str | Path) -> Subset | PersonSubset:
    """A list of pictures or persons: the labels.json of a run, or what `poserelay select` wrote.

    Raises:
        UserError: absent, not such a list, of another format, or changed since it was written.
    """
    path = Path(path)
    advice = "give the labels.json of a run, or a list that `poserelay select` wrote"
    if not path.is_file():
        raise UserError(f"labels.file {path}: no such file; {advice}")
    kind = _kind(path)
    if kind is None:
        raise UserError(f"labels.file {path}: not a list of pictures or persons; {advice}")
    return _read(path, KINDS[kind])


def choose_labelled(annotations: CocoAnnotations, labels: LabelsConfig) -> Chosen:
    """The labelled persons; all of them when `labels` sets no choice. Only persons with a labelled joint count, and
    the images that carry one.

    `random` ranks an image or person by the hash of (seed, id), `first` by its place: images in the file's order,
    persons image by image and on each in the order of its annotations, as the loader of Semi_Human_Pose walks them,
    whose first 1,000 are its "1K". Either way a smaller choice is contained in every larger one of the same kind, and
    what is `random` does not depend on the order of the file.

    Raises:
        UserError: more are asked for than there are, or a share that rounds to none; the file is no list of ours, it
            lists an image or person that the annotation file does not have, or none that is labelled.
    """
    persons = annotations.persons
    if not len(persons):
        raise UserError(f"{annotations.path}: no person with a labelled joint; check the file")
    if labels.file is not None:
        subset = read_labels(labels.file)
        if isinstance(subset, Subset):
            rows = _on_listed_images(annotations, labels.file, subset)
        else:
            rows = _listed_persons(annotations, labels.file, subset)
        return Chosen(rows, _image_ids(annotations, rows), subset)
    if labels.ratio is None and labels.count is None:
        return _of_images(annotations, persons, "all", 0)
    seed = labels.seed if labels.protocol == "random" else 0
    if labels.by == "images":
        chosen = _first(annotations.labelled_image_ids, labels, annotations.path)
        on_chosen = np.isin(annotations.image_ids, chosen)[annotations.image_index[persons]]
        return _of_images(annotations, persons[on_chosen], labels.protocol, seed)
    in_order = persons[np.argsort(annotations.image_index[persons], kind="stable")]
    chosen = _first(annotations.ids[in_order].tolist(), labels, annotations.path)
    rows = persons[np.isin(annotations.ids[persons], chosen)]
    subset = PersonSubset(sorted(chosen), _image_names(annotations, rows), labels.protocol, len(chosen), seed)
    return Chosen(rows, _image_ids(annotations, rows), subset)


def drop_labels(annotations: CocoAnnotations, chosen: Chosen, labels: LabelsConfig) -> tuple[CocoAnnotations, Chosen]:
    """`annotations` without the joints of the chosen persons that `labels.drop` names, which become unlabelled.

    Persons that are left without a labelled joint are chosen no more; the list of the choice stays as it was.

    Raises:
        UserError: there is no such joint, fewer visible than hidden ones, or nothing is left.
    """
    if labels.drop == "nothing":
        return annotations, chosen
    visibility = annotations.visibility.copy()
    hidden, visible = (np.argwhere(visibility[chosen.rows] == value) for value in (1, 2))
    if not len(hidden):
        raise UserError(f"{annotations.path}: labels.drop: no joint of the chosen persons is labelled hidden (v = 1)")
    if labels.drop == "visible":
        if len(visible) < len(hidden):
            raise UserError(
                f"{annotations.path}: labels.drop is visible, but of the chosen persons' joints {len(visible)} are "
                f"visible (v = 2) and {len(hidden)} hidden (v = 1): as many cannot be taken"
            )
        places = visible[np.random.default_rng(labels.seed).permutation(len(visible))[: len(hidden)]]
    else:
        places = hidden
    visibility[chosen.rows[places[:, 0]], places[:, 1]] = 0
    rows = chosen.rows[(visibility[chosen.rows] > 0).any(axis=1)]
    if not len(rows):
        raise UserError(f"{annotations.path}: labels.drop leaves no labelled joint")
    keypoints = np.where(visibility[..., None] > 0, annotations.keypoints, 0.0)
    dropped = dataclasses.replace(annotations, visibility=visibility, keypoints=keypoints)
    return dropped, dataclasses.replace(chosen, rows=rows, images=_image_ids(annotations, rows))


def _first(ids: list[int], labels: LabelsConfig, path: Path) -> list[int]:
    """The ids of highest rank among those of all labelled images or persons, which are in the order of `first`."""
    unit = "images carry labelled persons" if labels.by == "images" else "persons are labelled"
    found = f"only {len(ids)} {unit} in {path}"
    count = labels.count
    if count is None:
        count = round(float(labels.ratio or 0) * len(ids))
        if not count:
            raise UserError(f"labels.ratio is {labels.ratio:g}, which rounds to none: {found}; raise it")
    if count > len(ids):
        raise UserError(f"labels.count is {count}, but {found}; lower it")
    if labels.protocol == "random":
        ids = sorted(ids, key=lambda id_: hashlib.sha256(f"{labels.seed}:{id_}".encode()).digest())
    return ids[:count]


def _of_images(annotations: CocoAnnotations, rows: np.ndarray, method: str, seed: int) -> Chosen:
    """All the labelled persons of some images."""
    names = _image_names(annotations, rows)
    subset = Subset(names, [], method, len(names), seed, duplicate_similarity=1.0, checkpoint_sha256="")
    return Chosen(rows, _image_ids(annotations, rows), subset)


def _on_listed_images(annotations: CocoAnnotations, file: str, subset: Subset) -> np.ndarray:
    listed, names = set(subset.labelled), list(map(posixpath.normpath, annotations.file_names))
    missing = sorted(listed - set(names))
    if missing:
        raise UserError(
            f"labels.file {file}: {missing[0]!r} is not among the images of the annotation file ({len(missing)} of "
            f"{len(listed)} are not); name the pictures as the list does, relative to the folder they were chosen from"
        )
    on_listed = np.array([name in listed for name in names], dtype=bool)
    rows = annotations.persons[on_listed[annotations.image_index[annotations.persons]]]
    if not len(rows):
        raise UserError(f"labels.file {file}: none of its {len(listed)} images carries a labelled person")
    return rows


def _listed_persons(annotations: CocoAnnotations, file: str, subset: PersonSubset) -> np.ndarray:
    listed = np.array(subset.persons, dtype=np.int64)
    missing = listed[~np.isin(listed, annotations.ids)]
    if len(missing):
        raise UserError(
            f"labels.file {file}: person {missing[0]} is not among the annotations of {annotations.path} "
            f"({len(missing)} of {len(listed)} are not); give the file that the persons were chosen from"
        )
    # Ids are often counted from 1: that they are there does not tell that they are the same persons.
    elsewhere = set(_image_names(annotations, np.flatnonzero(np.isin(annotations.ids, listed)))) - set(subset.images)
    if elsewhere:
        raise UserError(
            f"labels.file {file}: in {annotations.path} some of its persons are on {min(elsewhere)!r}, which it does "
            "not list; give the file that the persons were chosen from"
        )
    rows = annotations.persons[np.isin(annotations.ids[annotations.persons], listed)]
    if not len(rows):
        raise UserError(f"labels.file {file}: none of its {len(listed)} persons has a labelled joint")
    return rows


def _image_ids(annotations: CocoAnnotations, rows: np.ndarray) -> list[int]:
    return [annotations.image_ids[image] for image in np.unique(annotations.image_index[rows])]


def _image_names(annotations: CocoAnnotations, rows: np.ndarray) -> list[str]:
    images = np.unique(annotations.image_index[rows])
    return sorted({posixpath.normpath(annotations.file_names[image]) for image in images})


def _kind(path: Path) -> str | None:
    """What the file says that it lists; None where it is no list of ours."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(document, dict) and "format" in document and document.get("kind") in list(KINDS)
    return document["kind"] if known else None


def _read(path: Path, subset_class: type[AnySubset]) -> AnySubset:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
    if document["format"] != FORMAT:
        raise UserError(f"{path}: format {document['format']!r}, this version reads {FORMAT}; select again")
    fields: dict[str, Any] = {field.name: document.get(field.name) for field in dataclasses.fields(subset_class)}
    if document.get("sha256") != _digest(fields):
        raise UserError(f"{path}: changed since it was written (its sha256 does not fit); select again")
    return subset_class(**fields)


def _text(subset: Subset | PersonSubset) -> str:
    kind = next(kind for kind, subset_class in KINDS.items() if isinstance(subset, subset_class))
    fields = dataclasses.asdict(subset)
    return json.dumps({"format": FORMAT, "kind": kind, **fields, "sha256": _digest(fields)}, indent=1) + "\n"


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
