"""What a loader hands to a training or evaluation step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class Tensors:
    """A dataclass of tensors, perhaps in lists, and of other things."""

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on `device`; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The batch with its tensors in pinned memory; called by DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        batch: Any = self

        def mapped(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                return [function(tensor) for tensor in value]
            return value

        return replace(batch, **{entry.name: mapped(getattr(self, entry.name)) for entry in fields(batch)})


@dataclass
class CropBatch(Tensors):
    """B person crops with K joints each."""

    images: Tensor
    """`[B, 3, H, W]` uint8, RGB."""
    keypoints: Tensor
    """`[B, K, 2]` float32, input pixels; 0 where the visibility is 0."""
    visibility: Tensor
    """`[B, K]` int64: 0 not labelled, 1 hidden, 2 visible."""
    affine: Tensor
    """`[B, 2, 3]` float32, image -> input pixels."""
    boxes: Tensor
    """`[B, 4]` float32, xywh, image pixels, before padding."""
    scores: Tensor
    """`[B]` float32, of the boxes; 1 for annotated ones."""
    areas: Tensor
    """`[B]` float32, image pixels squared; the box's for detections."""
    image_ids: list[int]
    annotation_ids: list[int | None]
    """None for detections."""
    negative: Tensor | None = None
    """`[B]` bool: nobody is there, every joint is known to be absent. None: somebody is in every crop."""
    replaced: list[str] = field(default_factory=list)
    """One message for each unreadable picture that another stands in for."""

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class ImageBatch(Tensors):
    """B square crops of whole images, each with up to S persons of K joints and up to R regions."""

    images: Tensor
    """`[B, 3, H, W]` uint8, RGB; black beyond the image."""
    keypoints: Tensor
    """`[B, S, K, 2]` float32, input pixels, also beyond the crop; 0 where the visibility is 0."""
    visibility: Tensor
    """`[B, S, K]` int64: 0 not labelled, 1 hidden, 2 visible. A slot without a labelled joint holds no person."""
    areas: Tensor
    """`[B, S]` float32, input pixels squared."""
    regions: Tensor
    """`[B, R, 4]` float32 xywh, image pixels: crowds and persons without labels, neither persons nor background. Empty
    slots have no area."""
    affine: Tensor
    """`[B, 2, 3]` float32, image -> input pixels."""
    image_ids: list[int]
    replaced: list[str] = field(default_factory=list)
    """One message for each unreadable picture that another stands in for."""

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class PyramidBatch(Tensors):
    """B whole images, each at the scales of `config.WholeImages`."""

    images: list[Tensor]
    """For each scale `[B, 3, H, W]` uint8, RGB; black beyond the image."""
    affine: list[Tensor]
    """For each scale `[B, 2, 3]` float64, image -> input pixels."""
    sizes: Tensor
    """`[B, 2]` float64, (height, width) of the images, image pixels."""
    image_ids: list[int]
