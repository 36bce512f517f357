"""From whole images to scored poses with a single-stage model: peaks of the score map, the poses that they predict.

An image is seen at each scale and, with `decoding.flip`, mirrored. Every such view has an affine map from the image,
so that averaging and going back are the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .batch import PyramidBatch
from .config import Decoding
from .datasets.coco import CocoAnnotations
from .datasets.fullimage import PyramidDataset, PyramidRecord, collate_pyramids, pyramid
from .datasets.sampling import read_image
from .heads.cir import CIRMaps, pixel_grid
from .inference import Poses, check_finite, evaluation_batches, suppress, to_results
from .model import SingleStageModel
from .scoring import order_of_file, sigma_source


class View(NamedTuple):
    """B images as the network sees them."""

    images: Tensor
    """`[B, 3, H, W]` uint8, RGB."""
    affine: Tensor
    """`[B, 2, 3]` float64, image -> input pixels."""
    mirrored: bool


class Found(NamedTuple):
    """At most P poses of each of B images, on the device."""

    keypoints: Tensor
    """`[B, P, K, 2]`, image pixels, of the affine maps' type: float64."""
    scores: Tensor
    """`[B, P]`, best first; a slot at or under the threshold, or off the image, holds -inf."""


def views_of(batch: PyramidBatch, flip: bool, stride: int) -> list[View]:
    """The batch's scales, each followed by its mirror image where `flip`."""
    views = []
    for images, affine in zip(batch.images, batch.affine, strict=True):
        views.append(View(images, affine, False))
        if flip:
            # Map pixel i looks at input pixel stride * i. Moved by stride - 1, the mirrored image's map pixels look
            # at the same places, so that its maps are the mirrored ones exactly (DEKR's code shifts by 3, too).
            shift = stride - 1
            moved = functional.pad(images.flip(-1)[..., shift:], (0, shift))
            mirror = affine.clone()
            mirror[:, 0] = -affine[:, 0]
            mirror[:, 0, 2] += images.shape[-1] - 1 - shift
            views.append(View(moved, mirror, True))
    return views


@torch.inference_mode()
def find_poses(model: SingleStageModel, batch: PyramidBatch, decoding: Decoding) -> Found:
    """The poses at the highest peaks of each image's score map. The model is in eval mode, the batch on its device.

    Raises CheckFailed where a map is not finite.
    """
    return poses_of(model, batch, decoding)


def poses_of(model: SingleStageModel, batch: PyramidBatch, decoding: Decoding) -> Found:
    """What `find_poses` returns and raises; an exported graph is made of this (`deployment`)."""
    views = views_of(batch, decoding.flip, model.stride)
    return decode_views(model, batch, views, [model.maps(model.preprocess(view.images)) for view in views], decoding)


def decode_views(
    model: SingleStageModel, batch: PyramidBatch, views: Sequence[View], maps: Sequence[CIRMaps], decoding: Decoding
) -> Found:
    """What `find_poses` returns and raises, from the maps of each view.

    The score maps are averaged on the pixels of the scale nearest to 1. A pose is the mean of what the views predict
    at the pixel nearest to its peak, weighted by the views' own scores there.
    """
    scales, stride = decoding.whole.scales, model.stride
    nearest = min(range(len(scales)), key=lambda number: abs(math.log(scales[number])))
    base = nearest * (2 if decoding.flip else 1)
    confidences = [found.confidence.float() for found in maps]
    own = confidences[base]
    height, width = own.shape[-2:]
    exact = batch.sizes.dtype
    grid = pixel_grid(height, width, own.device).to(exact) * stride
    places = apply(invert(views[base].affine), grid[None])  # image pixels of the map's pixels
    scores = [
        own if number == base else at(apply(view.affine, places) / stride, confidence).unflatten(1, (height, width))
        for number, (view, confidence) in enumerate(zip(views, confidences, strict=True))
    ]
    mean = torch.stack(scores).mean(0)
    check_finite(mean, "the model's score maps hold NaN or infinity; its weights are damaged, or diverged")
    # Half a pixel around the image belongs to its border pixels; beyond there is only padding.
    inside = ((places >= -0.5) & (places <= batch.sizes.flip(-1)[:, None] - 0.5)).all(-1).unflatten(1, (height, width))
    mean = torch.where(inside, mean, -torch.inf)
    peaks = (mean == functional.max_pool2d(mean[:, None], 3, 1, 1)[:, 0]) & (mean > decoding.whole.score_threshold)
    ranked = torch.where(peaks, mean, -torch.inf).flatten(1)
    best, index = ranked.topk(min(decoding.whole.max_poses, height * width), dim=1)
    centres = places.gather(1, index[..., None].expand(-1, -1, 2))  # [B, P, 2], image pixels

    total = torch.zeros(*index.shape, len(model.skeleton.joints), 2, dtype=exact, device=own.device)
    weights = torch.zeros(*index.shape, 1, 1, dtype=exact, device=own.device)
    for view, found, confidence in zip(views, maps, confidences, strict=True):
        last = torch.tensor([found.score.shape[-1] - 1, found.score.shape[-2] - 1], device=own.device)
        pixels = (apply(view.affine, centres) / stride).round().clamp(min=0).minimum(last)
        moved = model.head.displacements(found.joints, pixels.float()).to(exact)  # [B, P, K, 2]
        poses = apply(invert(view.affine)[:, None], (pixels[:, :, None] + moved) * stride)
        if view.mirrored:
            poses = poses[:, :, list(model.skeleton.flip_index)]
        weight = at(pixels, confidence).clamp(min=1e-6).to(exact)[..., None, None]
        total, weights = total + weight * poses, weights + weight
    keypoints = total / weights
    check_finite(keypoints, "the model's displacements hold NaN or infinity; its weights are damaged, or diverged")
    return Found(keypoints, best)


def at(places: Tensor, maps: Tensor) -> Tensor:
    """Bilinear values `[B, P]` of maps `[B, h, w]` at places `[B, P, 2]` (x, y) in map pixels; the border repeated."""
    size = torch.tensor([maps.shape[-1], maps.shape[-2]], device=places.device)
    grid = ((2 * places + 1) / size - 1).float()[:, :, None]
    found = functional.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)
    return found[:, 0, :, 0]


def apply(affine: Tensor, points: Tensor) -> Tensor:
    """Map points `[..., P, 2]` by `[..., 2, 3]`."""
    return points @ affine[..., :2].mT + affine[..., None, :, 2]


def invert(affine: Tensor) -> Tensor:
    """Inverse maps of `[..., 2, 3]`."""
    # Written out because a graph has no inverse of matrices.
    (a, b), (c, d) = (row.unbind(-1) for row in affine[..., :2].unbind(-2))
    adjugate = torch.stack((torch.stack((d, -b), -1), torch.stack((-c, a), -1)), -2)
    linear = adjugate / (a * d - b * c)[..., None, None]
    return torch.cat((linear, -linear @ affine[..., 2:]), -1)


def predict_images(model: SingleStageModel, batches: Iterable[PyramidBatch], decoding: Decoding) -> Poses:
    """The poses of all batches before the NMS, in their order and the model's joints.

    Leaves the model in eval mode. Raises CheckFailed as `find_poses`.
    """
    device = next(model.parameters()).device
    model.eval()
    parts = [_to_poses(find_poses(model, batch.to(device), decoding), batch.image_ids) for batch in batches]
    return _joined(parts, len(model.skeleton.joints))


def whole_batches(
    dataset: PyramidDataset, batch_size: int, workers: int, pin_memory: bool, *, progress: bool = False
) -> Iterator[PyramidBatch]:
    """The images of a dataset, in its order. Raises UnreadableImage for a picture that cannot be read."""
    return evaluation_batches(dataset, collate_pyramids, batch_size, workers, pin_memory, progress=progress)


def predict_dataset(
    model: SingleStageModel,
    dataset: PyramidDataset,
    decoding: Decoding,
    batch_size: int = 8,
    workers: int = 0,
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """COCO results of all images of a file, after OKS-NMS, in the category and the joints of the file.

    Raises UnreadableImage for a picture that cannot be read, CheckFailed as `find_poses`, UserError as
    `scoring.order_of_file`.
    """
    order = order_of_file(model.skeleton, dataset.annotations.joints)
    pinned = next(model.parameters()).device.type == "cuda"
    batches = whole_batches(dataset, batch_size, workers, pinned, progress=progress)
    poses = predict_images(model, batches, decoding).joints(order)
    kept = suppress(poses, [model.skeleton.sigmas[joint] for joint in order], decoding)
    return to_results(kept, dataset.annotations.category["id"])


def predict_whole(
    model: SingleStageModel,
    images: Sequence[np.ndarray | str | Path],
    decoding: Decoding | None = None,
    *,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """COCO results of whole images after OKS-NMS, images in their order and the best pose first, with `bbox`, the
    joints' extent.

    images: `[H, W, 3]` uint8 RGB, or paths (read in the stored orientation, which annotations refer to). A record's
    `image_id` is its position in `images`, its joints the model's. Leaves the model in eval mode.
    Raises ValueError for another shape or type, UnreadableImage and CheckFailed as `predict_dataset`.
    """
    decoding = decoding or Decoding()
    records = (_pyramid(model, image, row, decoding) for row, image in enumerate(images))
    batches = map(collate_pyramids, iter(lambda: list(islice(records, batch_size)), []))
    kept = suppress(predict_images(model, batches, decoding), model.skeleton.sigmas, decoding)
    results = to_results(kept, category_id=1)
    return [{**record, "bbox": box} for record, box in zip(results, kept.boxes.tolist(), strict=True)]


def protocol(annotations: CocoAnnotations, model: SingleStageModel, decoding: Decoding) -> dict[str, Any]:
    """What the metrics of a file depend on besides the weights, as `inference.protocol` for a top-down model."""
    return {
        "split": annotations.path.stem,
        "boxes": "none",
        "images": len(annotations.image_ids),
        "instances": len(annotations.persons),
        "short_side": model.input.height,
        "scales": list(decoding.whole.scales),
        "flip": decoding.flip,
        "max_poses": decoding.whole.max_poses,
        "score_threshold": decoding.whole.score_threshold,
        "nms": decoding.nms_threshold,
        "nms_method": decoding.nms,
        "sigmas": sigma_source(model.skeleton),
    }


def _pyramid(model: SingleStageModel, image: np.ndarray | str | Path, row: int, decoding: Decoding) -> PyramidRecord:
    if not isinstance(image, np.ndarray | str | Path):
        raise ValueError(f"image {row} is a {type(image).__name__}; give an array [H, W, 3] uint8 RGB, or a path")
    picture = image if isinstance(image, np.ndarray) else read_image(image)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise ValueError(f"image {row}: {picture.dtype} {list(picture.shape)}, expected uint8 [H, W, 3]")
    return pyramid(picture, model.input.height, decoding.whole.scales, row)


def _to_poses(found: Found, image_ids: Sequence[int]) -> Poses:
    """The poses of B images whose slots hold one, in their order, as float64 arrays.

    A joint's score is its pose's: the model has no other. A box, and the area for the NMS, is the joints' extent, as
    pycocotools takes it for a prediction.
    """
    rows, slots = torch.isfinite(found.scores).nonzero(as_tuple=True)
    keypoints = found.keypoints[rows, slots].cpu().numpy()
    scores = found.scores[rows, slots].double().cpu().numpy()
    low, high = keypoints.min(1), keypoints.max(1)
    boxes = np.concatenate((low, high - low), -1)
    return Poses(
        keypoints=keypoints,
        joint_scores=np.repeat(scores[:, None], keypoints.shape[1], 1),
        scores=scores,
        boxes=boxes,
        areas=boxes[:, 2] * boxes[:, 3],
        image_ids=[image_ids[row] for row in rows.tolist()],
        annotation_ids=[None] * len(keypoints),
    )


def _joined(parts: Sequence[Poses], joints: int) -> Poses:
    empty = Poses(np.zeros((0, joints, 2)), np.zeros((0, joints)), np.zeros(0), np.zeros((0, 4)), np.zeros(0), [], [])
    parts = [empty, *parts]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return Poses(
        keypoints=joined("keypoints"),
        joint_scores=joined("joint_scores"),
        scores=joined("scores"),
        boxes=joined("boxes"),
        areas=joined("areas"),
        image_ids=[image_id for part in parts for image_id in part.image_ids],
        annotation_ids=[None for part in parts for _ in part.image_ids],
    )
