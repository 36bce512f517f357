"""Where a linear classifier looks: Grad-CAM (Selvaraju et al., 2017) on the deepest map of a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from poserelay.backbones import Backbone
from poserelay.checkpoint import load_exactly, read_export, verify_handoff
from poserelay.config import InputConfig
from poserelay.datasets.centre import centre_crop
from poserelay.embeddings import load_backbone
from poserelay.errors import UserError
from poserelay.model import normalise


class Classifier(NamedTuple):
    """A hand-off file of `pretrain linear`."""

    backbone: Backbone
    head: nn.Linear
    """Reads the average of the backbone's deepest map."""
    classes: list[str]
    """Of the logits, in their order."""
    input: InputConfig
    method: str
    """What the backbone was pretrained with."""

    def logits(self, maps: Tensor) -> Tensor:
        """Logits `[B, K]` of the deepest maps `[B, C, h, w]`."""
        return self.head(maps.mean((-2, -1)))


class Explained(NamedTuple):
    """What a classifier says of B pictures and where it looks for that."""

    heat: Tensor
    """`[B, size, size]` in 0..1, of the central crop; a picture's largest value is 1, or 0 where nothing speaks for
    the class."""
    classes: list[str]
    """The class that is explained."""
    probabilities: list[float]
    """Of that class."""


def load_classifier(path: str | Path, device: torch.device) -> Classifier:
    """Rebuild the classifier of a hand-off file.

    Raises:
        UserError: not a hand-off file, one without a classifier, or one that its run did not leave so.
    """
    verify_handoff(path)
    state, described = read_export(path)
    if (described["head"] or {}).get("name") != "linear":
        raise UserError(
            f"{path}: holds no classifier (stage {described['stage']}); train one on its backbone: "
            f"python -m pretrain linear --init_from {path}"
        )
    classes = described["head"]["kwargs"]["classes"]
    backbone, input = load_backbone(path)
    head = nn.Linear(backbone.channels[-1], len(classes))
    load_exactly(head, {name: state[f"head.{name}"] for name in ("weight", "bias") if f"head.{name}" in state}, path)
    return Classifier(backbone.to(device), head.to(device), classes, input, described["method"])


def explain(classifier: Classifier, images: Sequence[np.ndarray], size: int, target: str | None = None) -> Explained:
    """Explain the class `target`, or else the one that each picture most looks like.

    Args:
        classifier: what is explained.
        images: uint8 RGB `[H, W, 3]`; their central crops are what the classifier sees.
        size: side of the returned heat, pixels.
        target: name of a class.

    Raises:
        UserError: the classifier does not know `target`.
    """
    if target is not None and target not in classifier.classes:
        raise UserError(f"target {target!r} is not among the {len(classifier.classes)} classes of the checkpoint")
    device = classifier.head.weight.device
    crops = np.stack([centre_crop(image, classifier.input.height) for image in images])
    batch = normalise(torch.from_numpy(crops).permute(0, 3, 1, 2).to(device), classifier.input)
    with torch.no_grad():
        maps = classifier.backbone(batch)[-1]
        probabilities = classifier.logits(maps).softmax(1)
    wanted = classifier.classes.index(target) if target is not None else None
    chosen = probabilities.argmax(1) if wanted is None else torch.full((len(images),), wanted, device=device)
    heat = interpolate(grad_cam(maps, classifier.logits, chosen)[:, None], size=(size, size), mode="bilinear")[:, 0]
    heat = heat / heat.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    return Explained(
        heat.cpu(),
        [classifier.classes[index] for index in chosen.tolist()],
        probabilities.gather(1, chosen[:, None])[:, 0].tolist(),
    )


def grad_cam(maps: Tensor, classify: Callable[[Tensor], Tensor], classes: Tensor) -> Tensor:
    """Weigh the maps by the mean gradient of a class's logit and keep what speaks for it, Eq. 1-2.

    Args:
        maps: A, `[B, C, h, w]`.
        classify: turns them into logits `[B, K]`, each picture's from its own maps.
        classes: c, the index `[B]` of the logit to explain.

    Returns:
        The heat `[B, h, w]`, at least 0, not normalised.
    """
    maps = maps.detach().requires_grad_()
    with torch.enable_grad():
        chosen = classify(maps).gather(1, classes[:, None])
    # The pictures' logits are independent, so the gradient of their sum holds each one's own.
    (gradients,) = torch.autograd.grad(chosen.sum(), maps)
    weights = gradients.mean((-2, -1), keepdim=True)
    return (weights * maps.detach()).sum(1).relu()
