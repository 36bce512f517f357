"""Which annotated images are used as labelled, and the lists of pictures to annotate. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import LabelsConfig
from .errors import UserError
from .run import write_text

FORMAT = 1
KIND = "images"


@dataclass(frozen=True)
class Subset:
    """Pictures to annotate, as `poserelay select` writes them; names are relative to the folder of pictures."""

    images: list[str]
    """The pictures chosen, sorted."""
    included: list[str]
    """Those that were labelled before and that the choice complements, sorted."""
    method: str
    count: int
    """Of the pictures chosen."""
    seed: int
    duplicate_similarity: float
    checkpoint_sha256: str
    """Of the hand-off file whose backbone was used."""

    @property
    def labelled(self) -> list[str]:
        """All the pictures that are labelled once the chosen ones are, sorted."""
        return sorted({*self.images, *self.included})


def write_subset(path: Path, subset: Subset) -> None:
    """Replace `path` atomically; equal subsets give equal bytes."""
    fields = dataclasses.asdict(subset)
    document = {"format": FORMAT, "kind": KIND, **fields, "sha256": _digest(fields)}
    write_text(path, json.dumps(document, indent=1) + "\n")


def is_subset(path: str | Path) -> bool:
    """Whether the file says that it is a `Subset`; nothing else in it is checked."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("kind") == KIND and "format" in document


def read_subset(path: str | Path) -> Subset:
    """A list that `write_subset` wrote.

    Raises:
        UserError: absent, not such a list, of another format, or changed since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a list that `poserelay select` wrote")
    if not is_subset(path):
        raise UserError(f"{path}: not a list of pictures; give a file that `poserelay select` wrote")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
    if document["format"] != FORMAT:
        raise UserError(f"{path}: format {document['format']!r}, this version reads {FORMAT}; select again")
    fields: dict[str, Any] = {field.name: document.get(field.name) for field in dataclasses.fields(Subset)}
    if document.get("sha256") != _digest(fields):
        raise UserError(f"{path}: changed since it was written (its sha256 does not fit); select again")
    return Subset(**fields)


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def choose_images(image_ids: Sequence[int], labels: LabelsConfig, names: Mapping[int, str] | None = None) -> list[int]:
    """Ids of the labelled images, in the order of `image_ids`; all of them when `labels` sets no choice.

    An image's rank is the hash of (seed, id): a smaller choice is contained in every larger one of the same seed, and
    the order of the annotation file does not matter. For `labels.file`, `names` gives the file name of every image of
    the annotation file, also of those without a labelled person; the latter are left out where they are listed.

    Raises:
        UserError: more are asked for than there are, the file is no list of ours, it lists an image that the
            annotation file does not have, or none with a labelled person.
    """
    if labels.file is not None:
        return _listed_images(image_ids, labels.file, names or {})
    if labels.ratio is None and labels.count is None:
        return list(image_ids)
    count = labels.count if labels.count is not None else max(1, round(float(labels.ratio or 0) * len(image_ids)))
    if count > len(image_ids):
        raise UserError(f"labels.count is {count}, but only {len(image_ids)} images carry labelled persons; lower it")
    ranked = sorted(image_ids, key=lambda image_id: hashlib.sha256(f"{labels.seed}:{image_id}".encode()).digest())
    chosen = set(ranked[:count])
    return [image_id for image_id in image_ids if image_id in chosen]


def _listed_images(image_ids: Sequence[int], file: str, names: Mapping[int, str]) -> list[int]:
    listed = read_subset(file).labelled
    ids = {posixpath.normpath(name): image_id for image_id, name in names.items()}
    missing = [name for name in listed if name not in ids]
    if missing:
        raise UserError(
            f"labels.file {file}: {missing[0]!r} is not among the images of the annotation file ({len(missing)} of "
            f"{len(listed)} are not); name the pictures as the list does, relative to the folder they were chosen from"
        )
    wanted = {ids[name] for name in listed}
    chosen = [image_id for image_id in image_ids if image_id in wanted]
    if not chosen:
        raise UserError(f"labels.file {file}: none of its {len(listed)} images carries a labelled person")
    return chosen
