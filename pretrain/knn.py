"""Online kNN: how well the neighbours of a labelled picture tell its class, while the backbone trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poserelay.backbones import Backbone
from poserelay.config import InputConfig, KnnConfig
from poserelay.datasets.shards import find_pictures
from poserelay.datasets.unlabelled import Pictures
from poserelay.embeddings import embed
from poserelay.errors import UserError
from poserelay.neighbours import knn_classify

from .class_folders import class_of, find_classes


@dataclass(frozen=True)
class OnlineKnn:
    """Labelled pictures, checked before training starts, and how they are compared."""

    config: KnnConfig
    classes: list[str]
    """Of the bank, sorted; a label is an index into it."""
    bank: Pictures
    queries: Pictures | None
    """None: each picture of the bank is classified by the others."""

    def evaluate(
        self, backbone: Backbone, input: InputConfig, *, batch_size: int = 64, workers: int = 0
    ) -> dict[str, float]:
        """Top-1 accuracy in 0..1, and the numbers behind it, as one row of metrics.

        One process computes all of it. The backbone is left in the modes it was in and no random number is drawn, so
        that training goes on as it would have. Unreadable pictures are left out and counted.

        Raises:
            CheckFailed: the backbone's output is not finite.
            UserError: fewer readable pictures than neighbours.
        """
        bank, labels, unreadable = self._embed(self.bank, backbone, input, batch_size, workers)
        queries, truth, exclude = bank, labels, None
        if self.queries is None:
            exclude = torch.arange(len(bank))
        else:
            queries, truth, more = self._embed(self.queries, backbone, input, batch_size, workers)
            unreadable += more
        _check_numbers(self.config, len(bank), len(queries), "readable pictures")
        predicted = knn_classify(
            bank,
            labels,
            queries,
            classes=len(self.classes),
            k=self.config.neighbours,
            temperature=self.config.temperature,
            exclude=exclude,
            chunk=self.config.chunk,
            device=next(backbone.parameters()).device,
        )
        return {
            "top1": (predicted == truth).double().mean().item(),
            "bank": len(bank),
            "queries": len(queries),
            "unreadable": unreadable,
            "neighbours": self.config.neighbours,
            "temperature": self.config.temperature,
        }

    def _embed(
        self, pictures: Pictures, backbone: Backbone, input: InputConfig, batch_size: int, workers: int
    ) -> tuple[Tensor, Tensor, int]:
        """Vectors `[M, C]` and labels `[M]` of the readable pictures, and the number of the others."""
        embedded = embed(backbone, input, pictures, batch_size=batch_size, workers=workers)
        indices = {name: index for index, name in enumerate(self.classes)}
        labels = [indices[class_of(pictures.name(row))] for row in embedded.rows.tolist()]
        return embedded.vectors, torch.tensor(labels, dtype=torch.int64), len(embedded.unreadable)


def load_online_knn(config: KnnConfig) -> OnlineKnn:
    """List the pictures of class folders, or of shards of them.

    Raises:
        UserError: no pictures, fewer than two classes, classes of the queries that the bank does not have, or fewer
            pictures than neighbours.
    """
    bank = find_pictures(config.images)
    queries = find_pictures(config.queries) if config.queries else None
    classes = find_classes(bank)
    if len(classes) < 2:
        raise UserError(
            f"knn.images {config.images}: all pictures are of one class, {classes[0]!r} (the folder they lie in); give "
            "a folder with one subfolder of pictures per class"
        )
    unknown = sorted(set(find_classes(queries)) - set(classes)) if queries else []
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"knn.queries {config.queries}: class {unknown[0]!r}{more} is not among the {len(classes)} classes of "
            f"{config.images}; name the class folders alike"
        )
    _check_numbers(config, len(bank), len(queries) if queries else len(bank), "pictures")
    return OnlineKnn(config, classes, bank, queries)


def _check_numbers(config: KnnConfig, bank: int, queries: int, noun: str) -> None:
    voting = bank - (config.queries is None)
    if voting < config.neighbours:
        raise UserError(
            f"knn.neighbours is {config.neighbours}, but only {max(voting, 0)} {noun} of {config.images} can vote; "
            "lower it"
        )
    if not queries:
        raise UserError(f"knn.queries {config.queries}: none of its pictures can be read; replace them")
