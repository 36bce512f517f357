"""Which annotated images are used as labelled. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from .config import LabelsConfig
from .errors import UserError


def choose_images(image_ids: Sequence[int], labels: LabelsConfig) -> list[int]:
    """Ids of the labelled images, in the order of `image_ids`; all of them when `labels` sets neither ratio nor count.

    An image's rank is the hash of (seed, id): a smaller choice is contained in every larger one of the same seed, and
    the order of the annotation file does not matter. Raises UserError when more are asked for than there are.
    """
    if labels.ratio is None and labels.count is None:
        return list(image_ids)
    count = labels.count if labels.count is not None else max(1, round(float(labels.ratio or 0) * len(image_ids)))
    if count > len(image_ids):
        raise UserError(f"labels.count is {count}, but only {len(image_ids)} images carry labelled persons; lower it")
    ranked = sorted(image_ids, key=lambda image_id: hashlib.sha256(f"{labels.seed}:{image_id}".encode()).digest())
    chosen = set(ranked[:count])
    return [image_id for image_id in image_ids if image_id in chosen]
