"""From crops, datasets or whole images to scored poses: flip test, decoding, rescoring and OKS-NMS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import heatmaps, oks
from .batch import CropBatch
from .config import Decoding, DistalJoints
from .datasets.sampling import read_image, worker_init
from .datasets.topdown import CropRecord, TopDownDataset, collate, warp
from .errors import CheckFailed, UnreadableImage
from .geometry import apply_affine, box_to_affine, invert_affine
from .heads import SCIO
from .local_search import BothCrops, SelfConstraint, mirror_groups, search_distal
from .scoring import order_of_file, sigma_source

if TYPE_CHECKING:
    from .ensemble import Ensemble
    from .model import PoseModel


@dataclass(frozen=True)
class Poses:
    """N poses of K joints with the boxes they came from, in image pixels."""

    keypoints: np.ndarray
    """`[N, K, 2]`."""
    joint_scores: np.ndarray
    """`[N, K]`, heights of the heatmap peaks."""
    scores: np.ndarray
    """`[N]`, of the whole pose."""
    boxes: np.ndarray
    """`[N, 4]` xywh, before padding."""
    areas: np.ndarray
    """`[N]`, of the padded box that was cropped: what HRNet's OKS-NMS takes for a pose's size."""
    image_ids: list[int]
    annotation_ids: list[int | None]
    """None for detections."""
    verification: np.ndarray | None = None
    """`[N, K]`, SCIO's scores in 0..1 of the distal joints that it replaced, else NaN; None where it did nothing."""

    def joints(self, order: Sequence[int]) -> Poses:
        """The poses with their joints in another order."""
        verification = None if self.verification is None else self.verification[:, order]
        keypoints, scores = self.keypoints[:, order], self.joint_scores[:, order]
        return replace(self, keypoints=keypoints, joint_scores=scores, verification=verification)

    def take(self, rows: np.ndarray) -> Poses:
        """The poses at the indices `rows`."""
        return Poses(
            self.keypoints[rows],
            self.joint_scores[rows],
            self.scores[rows],
            self.boxes[rows],
            self.areas[rows],
            [self.image_ids[row] for row in rows],
            [self.annotation_ids[row] for row in rows],
            None if self.verification is None else self.verification[rows],
        )


class CropMaps(NamedTuple):
    """What the networks give for a batch of crops, float32 on the device."""

    maps: Tensor
    """`[B, K, h, w]`."""
    mirrored: Tensor | None
    """Those of the mirrored crops as they are, where they are averaged."""
    features: Tensor | None
    """f `[B, C, h, w]`, where SCIO's networks are asked."""
    learned: Tensor | None
    """`maps` with the distal joints' as SCIO's prediction networks have them (Eq. 3), where they are asked."""
    learned_mirrored: Tensor | None
    features_mirrored: Tensor | None


class Decoded(NamedTuple):
    """Poses of B crops, float32 on the CPU."""

    keypoints: Tensor
    """`[B, K, 2]`, image pixels."""
    scores: Tensor
    """`[B, K]`, heights of the heatmaps' peaks."""
    verification: Tensor | None
    """`[B, K]`: see `Poses`."""


def flip_shift(decoding: Decoding, alignment: str, stride: float) -> float:
    """Shift of the mirrored picture's heatmaps, heatmap pixels: the configured one, or else what aligns them exactly.

    That is 1 - 1/stride where x_heatmap = x_input / stride (CCM Eq. 25, readings CCM 7), and 0 for udp.
    """
    if decoding.flip_shift is not None:
        return decoding.flip_shift
    return 0.0 if alignment == "udp" else 1.0 - 1.0 / stride


def predict_crops(model: PoseModel | Ensemble, batch: CropBatch, decoding: Decoding) -> Decoded:
    """The poses in the crops of a batch. The model is in eval mode, the batch on its device.

    Raises CheckFailed where a heatmap is not finite.
    """
    return decode_crops(model, batch, forward_crops(model, batch, decoding), decoding)


@torch.inference_mode()
def forward_crops(model: PoseModel | Ensemble, batch: CropBatch, decoding: Decoding) -> CropMaps:
    """Heatmaps of the crops and, with `decoding.flip`, of the mirrored crops; otherwise as `predict_crops`."""
    return crop_maps(model, batch.images, decoding)


def crop_maps(model: PoseModel | Ensemble, crops: Tensor, decoding: Decoding) -> CropMaps:
    """What `forward_crops` gives for crops `[B, 3, H, W]`, uint8 RGB; an exported graph begins with it too."""
    images = model.preprocess(crops)
    refined: Any = model.refined if model.refiner is not None and decoding.scio.output != "base" else None

    def maps_of(images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if refined is None:
            return model(images).float(), None, None
        maps, features, learned = refined(images)
        return maps.float(), features.float(), learned.float()

    maps, features, learned = maps_of(images)
    mirrored, features_mirrored, learned_mirrored = maps_of(images.flip(-1)) if decoding.flip else (None, None, None)
    return CropMaps(maps, mirrored, features, learned, learned_mirrored, features_mirrored)


@torch.inference_mode()
def decode_crops(model: PoseModel | Ensemble, batch: CropBatch, found: CropMaps, decoding: Decoding) -> Decoded:
    """What `predict_crops` returns and raises, from the heatmaps that `forward_crops` gave for the batch."""
    xy, scores, verification = crop_joints(model, batch.images.shape[-2:], found, decoding)
    # In float64: far from the origin the inverse of a small crop's map loses digits that matter.
    keypoints = apply_affine(invert_affine(batch.affine.cpu().numpy()), xy.cpu().numpy())
    return Decoded(
        torch.from_numpy(keypoints).float(), scores.cpu(), None if verification is None else verification.cpu()
    )


def crop_joints(
    model: PoseModel | Ensemble, size: Sequence[int], found: CropMaps, decoding: Decoding
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`decode_crops` before the way back to the image: joints `[B, K, 2]` in input pixels, on the device.

    size: (height, width) of the crops. An exported graph ends with it too (`deployment`).
    """
    input_size = (size[0], size[1])
    heatmap_size = (found.maps.shape[-2], found.maps.shape[-1])

    def peaks(maps: Tensor, mirrored: Tensor | None, joints: Any = slice(None)) -> tuple[Tensor, Tensor]:
        if mirrored is not None:
            shift = flip_shift(decoding, model.input.alignment, input_size[1] / heatmap_size[1])
            maps = heatmaps.average_flip(maps, mirrored, model.skeleton.flip_index, shift)
        check_finite(maps, "the model's heatmaps hold NaN or infinity; its weights are damaged, or training diverged")
        return heatmaps.decode(maps[:, joints], refine=decoding.refine, blur=decoding.blur)

    xy, scores = peaks(found.maps, found.mirrored)
    verification = None
    if found.learned is not None and model.refiner is not None:
        # A distal joint whose mirror image is in no group has no map in the mirrored crop to be averaged with.
        paired = mirror_groups(model.refiner, model.skeleton.flip_index) is not None
        mirrored = found.learned_mirrored if paired else None
        learned = peaks(found.learned, mirrored, model.refiner.distal)
        xy, scores, verification = _refine_distal(model, found, (xy, scores), learned, decoding)
    return heatmaps.heatmap_to_input(xy, input_size, heatmap_size, model.input.alignment), scores, verification


def check_finite(values: Tensor, problem: str) -> None:
    """Raise CheckFailed with `problem` where a value is NaN or infinite; an exported graph cannot, and does not."""
    if not torch.compiler.is_exporting() and not torch.isfinite(values).all():
        raise CheckFailed(problem)


def chosen_distal(networks: SCIO, scores: Tensor, config: DistalJoints) -> Tensor:
    """Which groups' distal joints are replaced, `[B, G]`, by the peaks of the head's heatmaps, `[B, K]`."""
    confident = (scores[:, networks.proximal] >= config.proximal_threshold).all(-1)
    return confident if config.below is None else confident & (scores[:, networks.distal] < config.below)


def self_constraint(
    model: PoseModel, found: CropMaps, decoding: Decoding, persons: Tensor | slice = slice(None)
) -> SelfConstraint | BothCrops:
    """The loss that the search lowers, of the crops `persons` of a batch: with `decoding.flip` over their mirror images
    too, where the mirror image of every group is a group."""
    networks = model.refiner
    assert networks is not None
    dtype = networks.verification.to_heatmap.weight.dtype

    def of(maps: Any, features: Any) -> SelfConstraint:
        return SelfConstraint(networks, maps[persons].to(dtype), features[persons].to(dtype))

    mirror = None if found.mirrored is None else mirror_groups(networks, model.skeleton.flip_index)
    if mirror is None:
        return of(found.maps, found.features)
    shift = flip_shift(decoding, model.input.alignment, model.stride)
    return BothCrops(of(found.maps, found.features), of(found.mirrored, found.features_mirrored), mirror, shift)


def _refine_distal(
    model: Any, found: CropMaps, base: tuple[Tensor, Tensor], learned: tuple[Tensor, Tensor], decoding: Decoding
) -> tuple[Tensor, Tensor, Tensor]:
    """Joints `[B, K, 2]` in heatmap pixels, their scores and verification scores `[B, K]`, after SCIO.

    base: the head's joints and scores, `[B, K, 2]` and `[B, K]`; learned: the distal ones of the prediction networks,
    `[B, G, 2]` and `[B, G]`. Raises CheckFailed where a verification network's answer is not finite.
    """
    distal = model.refiner.distal
    (xy, scores), (learned_xy, learned_scores) = base, learned
    xy, scores = xy.clone(), scores.clone()
    chosen = chosen_distal(model.refiner, scores, decoding.scio)  # [B, G]
    verification = torch.full_like(scores, float("nan"))
    persons: Any = slice(None)
    if not torch.compiler.is_exporting():  # in a graph, which is the same whatever the crops show, all are searched
        persons = chosen.any(1).nonzero()[:, 0]
        if not len(persons):
            return xy, scores, verification
    constraint = self_constraint(model, found, decoding, persons)
    ends = learned_xy[persons]
    if decoding.scio.output == "optimisation":
        ends = search_distal(constraint, ends, decoding.scio, model.stride).xy
    verified = constraint.score(ends).to(scores)
    check_finite(verified, "the verification networks' heatmaps hold NaN or infinity; the model's weights are damaged")
    heights = learned_scores[persons]
    if decoding.scio.confidence == "verification":
        heights = heights * verified
    for own, found_there in ((xy, ends), (scores, heights), (verification, verified)):
        rows, taken = own[persons], chosen[persons].unflatten(1, (-1, *[1] * (own.ndim - 2)))
        rows[:, distal] = torch.where(taken, found_there.to(own), rows[:, distal])
        own[persons] = rows
    return xy, scores, verification


def predict_poses(
    model: PoseModel | Ensemble,
    dataset: TopDownDataset,
    decoding: Decoding,
    batch_size: int = 64,
    workers: int = 0,
    *,
    progress: bool = False,
) -> Poses:
    """One rescored pose for every crop of the dataset, in its order and the model's joints. No NMS.

    Leaves the model in eval mode. `progress` shows a bar on a terminal.
    Raises UnreadableImage for a picture that cannot be read, CheckFailed as `predict_crops`.
    """
    pinned = _device(model).type == "cuda"
    return predict_batches(model, crop_batches(dataset, batch_size, workers, pinned, progress=progress), decoding)


def crop_batches(
    dataset: TopDownDataset, batch_size: int, workers: int, pin_memory: bool, *, progress: bool = False
) -> Iterator[CropBatch]:
    """The crops of a dataset as they are, in its order. Raises UnreadableImage for a picture that cannot be read."""
    return evaluation_batches(dataset, collate, batch_size, workers, pin_memory, progress=progress)


def evaluation_batches(
    dataset: Dataset[Any],
    function: Callable[[Sequence[Any]], Any],
    batch_size: int,
    workers: int,
    pin_memory: bool,
    *,
    progress: bool = False,
) -> Iterator[Any]:
    """`function` of each `batch_size` items in their order. Raises UnreadableImage as the items do."""
    loader = DataLoader(
        _Evaluated(dataset),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=partial(_collate_or_error, function),
        worker_init_fn=worker_init,
        pin_memory=pin_memory,
    )
    bar = tqdm(loader, "evaluate", unit="batch", leave=False, disable=None if progress else True)
    return map(_raise_or_batch, bar)


def predict_dataset(
    model: PoseModel | Ensemble,
    dataset: TopDownDataset,
    decoding: Decoding,
    batch_size: int = 64,
    workers: int = 0,
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """COCO results of a dataset, after OKS-NMS, in the category and the joints of its annotation file.

    Raises as `predict_poses`, and UserError as `scoring.order_of_file`.
    """
    order = order_of_file(model.skeleton, dataset.annotations.joints)
    poses = predict_poses(model, dataset, decoding, batch_size, workers, progress=progress).joints(order)
    kept = suppress(poses, [model.skeleton.sigmas[joint] for joint in order], decoding)
    return to_results(kept, dataset.annotations.category["id"])


def predict_images(
    model: PoseModel | Ensemble,
    images: Sequence[np.ndarray | str | Path],
    boxes: Sequence[np.ndarray],
    decoding: Decoding | None = None,
    *,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """COCO results of whole images: one record per box, in the order given, with its `bbox`. No NMS.

    images: `[H, W, 3]` uint8 RGB, or paths (read in the stored orientation, which annotations refer to); boxes: for
    each image `[n, 4]` xywh in its pixels. A record's `image_id` is its position in `images`, its joints the model's.
    Leaves the model in eval mode.
    Raises ValueError for another shape or type and for a box without area, UnreadableImage and CheckFailed as
    `predict_poses`.
    """
    if isinstance(images, str | Path):
        raise ValueError(f"images is the one path {str(images)!r}; give a list of pictures, and boxes for each")
    if len(images) != len(boxes):
        raise ValueError(f"{len(images)} images, but boxes for {len(boxes)}; give one array [n, 4] per image")
    crops = (crop for row, image in enumerate(images) for crop in _crops(model, image, boxes[row], row))
    batches = map(collate, iter(lambda: list(islice(crops, batch_size)), []))
    poses = predict_batches(model, batches, decoding or Decoding())
    results = to_results(poses, category_id=1)
    return [{**record, "bbox": box} for record, box in zip(results, poses.boxes.tolist(), strict=True)]


def rescore(box_scores: np.ndarray, joint_scores: np.ndarray, threshold: float) -> np.ndarray:
    """HRNet's score of a pose `[N]`: its box's `[N]` times the mean of its joints' `[N, K]` above threshold, or 0."""
    confident = joint_scores > threshold
    total = np.where(confident, joint_scores, 0).sum(1)
    return box_scores * total / np.maximum(confident.sum(1), 1)


def suppress(poses: Poses, sigmas: Sequence[float], decoding: Decoding) -> Poses:
    """What `decoding.nms` leaves of the poses of each image, in their order: `oks.nms`, `soft_nms` or `fuse_poses`.

    sigmas: `[K]`, of the poses' joints. hard and fuse keep the scores, fuse moves joints, soft lowers scores.
    """
    keypoints, scores, areas = (torch.from_numpy(a).double() for a in (poses.keypoints, poses.scores, poses.areas))
    image_index = torch.tensor(poses.image_ids, dtype=torch.long)
    moved, lowered = poses.keypoints.copy(), poses.scores.copy()
    group = (keypoints, scores, areas, sigmas, decoding.nms_threshold)
    if decoding.nms == "soft":
        kept, decayed = oks.soft_nms(*group, image_index=image_index)
        lowered[kept.numpy()] = decayed.numpy()
    elif decoding.nms == "fuse":
        fused, kept = oks.fuse_poses(*group, image_index=image_index)
        moved[kept.numpy()] = fused.numpy()
    else:
        kept = oks.nms(*group, image_index=image_index)
    return replace(poses, keypoints=moved, scores=lowered).take(np.sort(kept.numpy()))


def to_results(poses: Poses, category_id: int) -> list[dict[str, Any]]:
    """Poses as COCO results: image_id, category_id, keypoints (3 K numbers: x, y, joint score), score.

    Where SCIO replaced joints, also `verification`: for each joint its score in 0..1, or null.
    """
    triples = np.concatenate([poses.keypoints, poses.joint_scores[..., None]], axis=-1)
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_id, "keypoints": keypoints, "score": score}
        for image_id, keypoints, score in zip(
            poses.image_ids,
            triples.reshape(len(triples), 3 * triples.shape[1]).tolist(),
            poses.scores.tolist(),
            strict=True,
        )
    ]
    if poses.verification is None:
        return results
    verified = [[None if np.isnan(score) else score for score in row] for row in poses.verification.tolist()]
    return [{**record, "verification": row} for record, row in zip(results, verified, strict=True)]


def protocol(
    dataset: TopDownDataset, decoding: Decoding, boxes: str = "gt", *, refined: bool = False
) -> dict[str, Any]:
    """What the metrics of a dataset depend on besides the weights; `boxes` is gt or the path of the detections.

    refined: whether the model carries SCIO's networks, so that `decoding.scio` counts.
    """
    skeleton, distal = dataset.skeleton, decoding.scio
    replaced = {"scio_below": distal.below, "scio_proximal_threshold": distal.proximal_threshold}
    replaced |= {"scio_confidence": distal.confidence}
    search = {"scio_steps": distal.steps, "scio_step": f"{distal.step:g} {distal.unit} pixels"}
    search |= {"scio_radius": distal.radius}
    scio = {
        "scio": distal.output,
        **(replaced if distal.output != "base" else {}),
        **(search if distal.output == "optimisation" else {}),
    }
    return {
        "split": dataset.annotations.path.stem,
        "boxes": boxes if boxes == "gt" else Path(boxes).name,
        "boxes_predicted": len(dataset),
        "instances": len(dataset.annotations.persons),
        "flip": decoding.flip,
        "flip_shift": None if not decoding.flip else "exact" if decoding.flip_shift is None else decoding.flip_shift,
        "decode": decoding.refine,
        "blur": decoding.blur,
        "rescoring": decoding.rescore_threshold,
        "nms": decoding.nms_threshold,
        "nms_method": decoding.nms,
        "sigmas": sigma_source(skeleton),
        **(scio if refined else {}),
    }


class _Evaluated(Dataset[Any]):
    """Hands the error over as an item: raised in a worker it would arrive as another type with a worker's traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except UnreadableImage as error:
            return error


def _collate_or_error(function: Callable[[Sequence[Any]], Any], items: Sequence[Any]) -> Any:
    for item in items:
        if isinstance(item, UnreadableImage):
            return item
    return function(items)


def _raise_or_batch(item: Any) -> Any:
    if isinstance(item, UnreadableImage):
        # Not `raise item`: in a cycle with this frame it would keep the loader, whose workers then stop seconds later.
        raise UnreadableImage(str(item))
    return item


def predict_batches(model: PoseModel | Ensemble, batches: Iterable[CropBatch], decoding: Decoding) -> Poses:
    """`predict_poses` of crops that were read before, on any device."""
    joints, device = len(model.skeleton.joints), _device(model)
    model.eval()
    keypoints, joint_scores = [np.zeros((0, joints, 2))], [np.zeros((0, joints))]
    verification: list[np.ndarray] = []
    box_scores, boxes, areas = [np.zeros(0)], [np.zeros((0, 4))], [np.zeros(0)]
    image_ids: list[int] = []
    annotation_ids: list[int | None] = []
    for batch in batches:
        found = predict_crops(model, batch.to(device), decoding)
        keypoints.append(found.keypoints.numpy())
        joint_scores.append(found.scores.numpy())
        if found.verification is not None:
            verification.append(found.verification.numpy())
        box_scores.append(batch.scores.cpu().numpy())
        boxes.append(batch.boxes.cpu().numpy())
        height, width = batch.images.shape[-2:]
        areas.append(height * width / np.abs(np.linalg.det(batch.affine[..., :2].cpu().double().numpy())))
        image_ids += batch.image_ids
        annotation_ids += batch.annotation_ids
    joint_score = np.concatenate(joint_scores)
    return Poses(
        keypoints=np.concatenate(keypoints),
        joint_scores=joint_score,
        scores=rescore(np.concatenate(box_scores), joint_score, decoding.rescore_threshold),
        boxes=np.concatenate(boxes),
        areas=np.concatenate(areas),
        image_ids=image_ids,
        annotation_ids=annotation_ids,
        verification=np.concatenate(verification) if verification else None,
    )


def _crops(
    model: PoseModel | Ensemble, image: np.ndarray | str | Path, boxes: np.ndarray, row: int
) -> Iterator[CropRecord]:
    picture = image if isinstance(image, np.ndarray) else read_image(image)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"image {row}: {picture.dtype} {list(picture.shape)}, expected uint8 [H, W, 3]")
    boxes = np.asarray(boxes, dtype=np.float64) if len(boxes) else np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all() or (boxes[:, 2:] <= 0).any():
        raise ValueError(
            f"boxes of image {row}: expected [n, 4], finite, x, y, width, height with an area: {boxes.tolist()}"
        )
    size = (model.input.height, model.input.width)
    affines = box_to_affine(boxes, size, alignment=model.input.alignment)
    joints = len(model.skeleton.joints)
    for box, affine in zip(boxes, affines, strict=True):
        yield CropRecord(
            image=warp(picture, affine, size),
            keypoints=np.zeros((joints, 2)),
            visibility=np.zeros(joints, dtype=np.int64),
            affine=affine,
            box=box,
            score=1.0,
            area=float(box[2] * box[3]),
            image_id=row,
            annotation_id=None,
        )


def _device(model: PoseModel | Ensemble) -> torch.device:
    return next(model.parameters()).device
