"""`python -m finetune pseudo-labels`: labels for unlabelled pictures, predicted by trained models (CCM, section 4.2).

boxes -> those above a threshold -> mean heatmaps -> joints above a threshold -> OKS-NMS -> COCO-keypoint JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from poserelay import __version__
from poserelay.checkpoint import verify_handoff
from poserelay.command import to_plain
from poserelay.datasets.coco import CocoAnnotations, Detections, read_coco, read_detections
from poserelay.datasets.sampling import worker_init
from poserelay.datasets.topdown import TopDownDataset
from poserelay.datasets.unlabelled_persons import read_images
from poserelay.detection import images_path
from poserelay.distributed import start
from poserelay.ensemble import Ensemble, load_models
from poserelay.errors import CheckFailed, UnreadableImage, UserError
from poserelay.inference import Poses, predict_poses, suppress
from poserelay.keypoints import Skeleton
from poserelay.model import PoseModel
from poserelay.run import file_sha256, write_json

from .pseudo_labels_config import PseudoLabelsConfig

DESCRIPTION = "pseudo-labels: joints predicted by models, none of them annotated"


def main(config: PseudoLabelsConfig) -> dict[str, Any]:
    """Write the labels, say on stderr what they hold, print their path, and return what was written.

    The file lists all pictures, also those without a person. Equal runs on one machine write equal bytes; an
    interrupted one writes nothing.

    Raises:
        UserError: input that cannot be used, models that cannot be averaged, or no joint above the threshold.
        CheckFailed: more pictures than `config.max_unreadable` are unreadable, or heatmaps that are not finite.
    """
    listed = list_path(config)
    check_out(config, listed)
    checkpoints = [{"name": Path(path).name, "sha256": verify_handoff(path)} for path in config.checkpoints]
    models = load_models(config.checkpoints)
    images = read_images(listed, models.skeleton)
    detections, threshold, persons_per_picture = choose_persons(config, images)
    sources = {"boxes": config.boxes, "pictures": listed, "match": config.match}
    # What is said of whole images counts for single-stage models, of SCIO where its networks are asked.
    unused = {"whole"} | ({"scio"} if models.refiner is None else set())
    info = {
        "description": DESCRIPTION,
        "poserelay": __version__,
        "checkpoints": checkpoints,
        **{
            name: path and {"name": Path(path).name, "sha256": file_sha256(Path(path))}
            for name, path in sources.items()
        },
        "persons_per_picture": persons_per_picture,
        "box_threshold": threshold,
        "joint_threshold": config.joint_threshold,
        "decoding": {name: value for name, value in to_plain(config.decoding).items() if name not in unused},
    }
    device = start(config.device, "fp32", config.threads).device
    dataset, unreadable = readable_persons(config, images, detections, models)
    poses = predict_poses(models.to(device), dataset, config.decoding, config.batch_size, config.workers, progress=True)
    # The boxes as the file has them: a batch's are float32.
    confident = keep_confident(replace(poses, boxes=dataset.boxes), config.joint_threshold)
    distinct = suppress(confident, models.skeleton.sigmas, config.decoding)
    labels = coco_file(images, distinct, models.skeleton, config.joint_threshold)
    counts = {
        "pictures": len(images.image_ids),
        "pictures_with_persons": len(set(distinct.image_ids)),
        "pictures_unreadable": unreadable,
        "persons": len(distinct.scores),
        "persons_without_joint": len(poses.scores) - len(confident.scores),
        "persons_duplicate": len(confident.scores) - len(distinct.scores),
        "joints": sum(record["num_keypoints"] for record in labels["annotations"]),
        "joints_predicted": poses.joint_scores.size,
    }
    written = {"info": {**info, "counts": counts}, **labels}
    write_json(Path(config.out), written)
    print(summary(counts, threshold, persons_per_picture), file=sys.stderr)
    print(config.out)
    return written


def list_path(config: PseudoLabelsConfig) -> Path:
    """The file that lists the pictures. Raises UserError where it is not named and not beside the boxes."""
    if config.annotations is not None:
        return Path(config.annotations)
    beside = images_path(Path(config.boxes))
    if Path(config.boxes).exists() and not beside.exists():
        raise UserError(
            f"{config.boxes}: no {beside.name} beside it, which lists the pictures that its image ids are of; name the "
            "COCO JSON with that list by --annotations"
        )
    return beside


def check_out(config: PseudoLabelsConfig, listed: Path) -> None:
    """Raise UserError unless `config.out` is a new file, or pseudo-labels, and none of what is read."""
    out = Path(config.out)
    if not out.exists():
        return
    beginning = json.dumps({"info": {"description": DESCRIPTION}})[:-2].encode()
    try:
        with open(out, "rb") as file:
            ours = file.read(len(beginning)) == beginning
    except OSError:  # a folder
        ours = False
    if not ours:
        raise UserError(f"--out {out}: exists and holds no pseudo-labels of ours; name another file")
    for source in (config.match, listed):
        if source is not None and Path(source).exists() and out.samefile(source):
            raise UserError(f"--out {out}: would write over what the labels are made from; name another file")


def choose_persons(config: PseudoLabelsConfig, images: CocoAnnotations) -> tuple[Detections, float, float | None]:
    """The detections that count as persons, the least score of them, and the persons per picture of `config.match`.

    Warns on stderr where there are fewer detections than the match asks for: all are taken.

    Raises:
        UserError: a file that cannot be used, nobody in it, or a box outside its picture.
    """
    if config.match is None:
        assert config.box_threshold is not None, "checked by the config"
        threshold, wanted = config.box_threshold, None
        chosen = read_detections(config.boxes, images, threshold)
    else:
        labelled = read_coco(config.match)
        persons, pictures = len(labelled.persons), len(labelled.image_ids)
        if not persons:
            raise UserError(f"{config.match}: no person with a labelled joint to count; give a labelled file as match")
        found = read_detections(config.boxes, images)
        wanted = persons / pictures
        needed = persons * len(images.image_ids) // pictures
        if len(found.scores) < needed:
            print(
                f"warning: {config.boxes}: {len(found.scores)} detections on {len(images.image_ids)} pictures, but "
                f"{wanted:.4g} persons per picture of {config.match} are {needed}; all are taken. Let the detector "
                "list those with lower scores, too (poserelay detect --score_threshold)",
                file=sys.stderr,
            )
        threshold = nearest_threshold(found.scores, len(images.image_ids), persons, pictures)
        chosen = _rows(found, found.scores >= threshold)
    sizes = images.image_sizes[chosen.image_index][:, ::-1]
    near, far = chosen.boxes[:, :2], chosen.boxes[:, :2] + chosen.boxes[:, 2:]
    outside = np.flatnonzero(((near >= sizes) | (far <= 0)).any(axis=1))
    if len(outside):
        row = outside[0]
        raise UserError(
            f"{config.boxes}: bbox {chosen.boxes[row].tolist()} of image {images.image_ids[chosen.image_index[row]]} "
            f"lies outside its {sizes[row][0]} x {sizes[row][1]} pixels ({len(outside)} such boxes); check that "
            f"{images.path} lists the pictures that were looked at"
        )
    return chosen, threshold, wanted


def nearest_threshold(scores: np.ndarray, pictures: int, persons: int, of_pictures: int) -> float:
    """The score from which on detections on `pictures` are nearest in number to `persons` on `of_pictures`.

    One of `scores` `[N]`, N > 0, so that somebody is left; of two that are equally near the higher. Equal scores stay
    together. Compared in whole numbers.
    """
    levels, counts = np.unique(scores, return_counts=True)
    kept = counts[::-1].cumsum()
    distance = np.abs(kept * of_pictures - persons * pictures)
    return float(levels[::-1][distance.argmin()])


def readable_persons(
    config: PseudoLabelsConfig, images: CocoAnnotations, detections: Detections, models: PoseModel | Ensemble
) -> tuple[TopDownDataset, int]:
    """The persons to predict, and the number of pictures left out because they cannot be read, named on stderr.

    Every picture with a person is read once for this, before the models see any.

    Raises:
        UserError: a picture that is not there.
        CheckFailed: too many cannot be read.
    """
    size, alignment = (models.input.height, models.input.width), models.input.alignment

    def crops(chosen: Detections) -> TopDownDataset:
        return TopDownDataset(images, config.images, models.skeleton, size, detections=chosen, alignment=alignment)

    everyone = crops(detections)
    pictures, first = np.unique(detections.image_index, return_index=True)
    loader = DataLoader(
        _Problems(everyone, first),
        batch_size=16,
        num_workers=config.workers,
        collate_fn=list,
        worker_init_fn=worker_init,
    )
    bar = tqdm(loader, "read", unit="batch", leave=False, disable=None)
    problems = [problem for batch in bar for problem in batch]
    for problem in filter(None, problems):
        print(f"warning: left out: {problem}", file=sys.stderr)
    lost = pictures[[problem is not None for problem in problems]]
    if len(lost) > config.max_unreadable * len(pictures) or len(lost) == len(pictures):
        raise CheckFailed(
            f"{len(lost)} of {len(pictures)} pictures with a person are unreadable (named above); repair or remove "
            f"them, or raise max_unreadable ({config.max_unreadable})"
        )
    if not len(lost):
        return everyone, 0
    return crops(_rows(detections, ~np.isin(detections.image_index, lost))), len(lost)


def keep_confident(poses: Poses, threshold: float) -> Poses:
    """The poses with a joint scored above the threshold. Raises UserError where there is none."""
    rows = np.flatnonzero((poses.joint_scores > threshold).any(axis=1))
    if not len(rows):
        raise UserError(
            f"none of the {poses.joint_scores.size} joints of {len(poses.scores)} persons has a confidence above "
            f"joint_threshold ({threshold}), the best has {poses.joint_scores.max():.3g}; lower it, or give models "
            "that are trained further"
        )
    return poses.take(rows)


def coco_file(images: CocoAnnotations, poses: Poses, skeleton: Skeleton, threshold: float) -> dict[str, Any]:
    """Lists images, annotations and categories of a COCO file with the joints above the threshold.

    All images are listed, in their order. Coordinates are rounded to hundredths of a pixel, the score, that of the
    whole pose, to 1e-5. No `area` is given: `read_coco` then takes 0.53 of the box, as for other files without masks.
    """
    category = {
        "id": images.category["id"],
        "name": images.category.get("name", skeleton.name),
        "keypoints": list(skeleton.joints),
        "skeleton": [[index + 1 for index in skeleton.indices(limb)] for limb in skeleton.limbs],
    }
    listed = [
        {"id": image_id, "file_name": name, "width": width, "height": height}
        for image_id, name, (height, width) in zip(
            images.image_ids, images.file_names, images.image_sizes.tolist(), strict=True
        )
    ]
    confident = poses.joint_scores > threshold
    visibility = np.where(confident, 2, 0).tolist()
    joints = np.where(confident[..., None], poses.keypoints.round(2), 0.0).tolist()
    annotations = [
        {
            "id": row + 1,
            "image_id": image_id,
            "category_id": category["id"],
            "iscrowd": 0,
            "bbox": box,
            "score": round(score, 5),
            "num_keypoints": int(confident[row].sum()),
            "keypoints": [n for (x, y), v in zip(joints[row], visibility[row], strict=True) for n in (x, y, v)],
        }
        for row, (image_id, box, score) in enumerate(
            zip(poses.image_ids, poses.boxes.tolist(), poses.scores.tolist(), strict=True)
        )
    ]
    return {"images": listed, "annotations": annotations, "categories": [category]}


def summary(counts: Mapping[str, int], threshold: float, persons_per_picture: float | None) -> str:
    """What was made, in a line or two."""
    chosen = "" if persons_per_picture is None else f", chosen for {persons_per_picture:.4g} persons per picture"
    text = (
        f"pseudo-labels: {counts['persons']} persons on {counts['pictures_with_persons']} of {counts['pictures']} "
        f"pictures, {counts['joints']} joints kept of {counts['joints_predicted']}, boxes scored at least "
        f"{threshold:g}{chosen}"
    )
    reasons = {
        "persons_without_joint": "persons without a confident joint",
        "persons_duplicate": "duplicates",
        "pictures_unreadable": "unreadable pictures",
    }
    left_out = ", ".join(f"{counts[name]} {reason}" for name, reason in reasons.items() if counts[name])
    return f"{text}\npseudo-labels: left out: {left_out}" if left_out else text


def _rows(detections: Detections, kept: np.ndarray) -> Detections:
    """The detections where `kept` `[N]` is true."""
    skipped = detections.skipped + int((~kept).sum())
    return Detections(detections.image_index[kept], detections.boxes[kept], detections.scores[kept], skipped)


class _Problems(Dataset[str | None]):
    """What is wrong with the picture of each of some persons, or None."""

    def __init__(self, persons: TopDownDataset, rows: np.ndarray) -> None:
        self.persons = persons
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str | None:
        try:
            self.persons.evaluation_sample(int(self.rows[index]))
        except UnreadableImage as error:
            return str(error)
        return None
