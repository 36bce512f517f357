"""What a loader hands to a training or evaluation step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass
class CropBatch:
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

    def to(self, device: torch.device | str) -> CropBatch:
        """The batch with its tensors on `device`; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> CropBatch:
        """The batch with its tensors in pinned memory; called by DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> CropBatch:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})
