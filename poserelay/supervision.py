"""The heatmaps that labelled crops ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import CropBatch
from .heatmaps import encode, input_to_heatmap, target_weight
from .losses import joints_mse
from .model import PoseModel


def gaussian_targets(
    crops: CropBatch, model: PoseModel, size: tuple[int, int], sigma: float, *, quantize: bool
) -> tuple[Tensor, Tensor]:
    """Gaussians `[B, K, h, w]` of the labels of B crops, and the weight of each map in the loss, `[B, K]`.

    Hard negatives have zero maps with the weight of a labelled joint (CCM section 4.1).

    Args:
        model: for the frame of the crops.
        size: (h, w) of the maps, heatmap pixels.
        sigma: of the Gaussians, heatmap pixels.
        quantize: round their centres to whole heatmap pixels.
    """
    crop = (model.input.height, model.input.width)
    keypoints = input_to_heatmap(crops.keypoints, crop, size, model.input.alignment)
    targets = encode(keypoints, crops.visibility, size, sigma, quantize=quantize)
    weight = target_weight(keypoints, crops.visibility, size, sigma)
    if crops.negative is not None:
        weight = torch.where(crops.negative[:, None], 1.0, weight)
    return targets, weight


def auxiliary_loss(maps: Tensor, crops: CropBatch, model: PoseModel, sigma: float, *, quantize: bool) -> Tensor:
    """L_aux of CCM's Eq. 9, a scalar: HRNet's loss of the auxiliary decoder's maps `[B, K, h, w]`.

    Its Gaussians are as wide on the crop as those of the model's own maps, of whose pixels `sigma` is.
    """
    size = (maps.shape[-2], maps.shape[-1])
    its_sigma = sigma * size[0] / model.heatmap_size[0]
    return joints_mse(maps, *gaussian_targets(crops, model, size, its_sigma, quantize=quantize))
