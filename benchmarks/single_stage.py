"""What CIR's single-stage model costs beside its network, its targets in a loop, and a top-down model.

    python benchmarks/single_stage.py [--annotations A.json --images DIR] [--backbone hrnet_w32] [--size 512]
                                      [--rounds 5] [--figures ...] [--json]

17 joints, networks of random weights; fp32. A JSON line for each figure, `ours` and `peer` medians of rounds in which
the two take turns:

- postprocessing: all that inference does beside the network (the mirrored image, decoding of the maps, OKS-NMS) for one
  square image, against the network, in seconds; `ratio` is the share, ours / peer. The line's own is its largest row.
- targets: centre areas, OKS and displacement targets, weights and regions of 8 maps of --size / 4, in seconds, against
  a loop over images, persons and the pixels of their areas, joints and regions by numpy. `ratio` is peer / ours;
  `loop_of_joints` is the loop's seconds where it fills displacements joint by joint, as DEKR's does. First all must
  agree. The line's own is its first row, as many persons as COCO's images have.
- inference: images/s of a 640x480 picture without flip test, from pixels to results, against the top-down model of the
  same backbone at 256x192, which is given the persons' boxes. `ratio` is ours / peer, of the most persons;
  `crossing_persons` is how many make the two equal.
- head: forward and backward of the head of 2 images, the displacements asked at the centre areas of 4 persons each,
  against all pixels, in seconds. `ratio` is peer / ours; `peak_mib` is what the tensors need at most.
- loader: augmented square crops/s with all that is annotated on them, against a plain pipeline: cv2.imread, mirroring,
  warpAffine, torchvision's ColorJitter on a PIL image. `ratio` is ours / peer. Without --annotations of rendered
  pictures.

A network of random weights has peaks everywhere or nowhere: its score map is computed and then replaced by one with a
peak for each person, and its displacements, computed like a trained one's, are those of a standing person, so that what
follows has a trained one's work. On the CPU seconds are those of the one thread, without its waiting for others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, cycle
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.autograd.profiler import profile
from torchvision.transforms import ColorJitter

from poserelay.config import Decoding, ImageAugmentation, InputConfig, ModelConfig, Named
from poserelay.datasets.coco import read_coco
from poserelay.datasets.fullimage import FullImageDataset, collate_pyramids, pyramid
from poserelay.datasets.sampling import TrainingDraws, epoch_order
from poserelay.geometry import apply_affine, box_to_affine
from poserelay.heads.cir import CIRMaps, pixel_grid
from poserelay.inference import predict_images as predict_crops
from poserelay.inference import suppress
from poserelay.keypoints import load_skeleton, resolve_skeleton
from poserelay.model import SingleStageModel, build_model, build_single_stage
from poserelay.oks import oks_of_pairs
from poserelay.synthesize import synthesize
from poserelay.whole_images import predict_images, predict_whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages belong to the checkout, not to the package
from finetune.cir_targets import BACKGROUND, centre_areas, region_mask, score_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SKELETON = load_skeleton("coco17")
STRIDE, RADIUS = 4, 4.0
ARMS = [(4, -12), (-4, -12), (6, -6), (-6, -6), (6, 0), (-6, 0)]
LEGS = [(3, 1), (-3, 1), (3, 10), (-3, 10), (3, 18), (-3, 18)]
BODY = np.array([(0, -17), (1, -18), (-1, -18), (2, -17), (-2, -17), *ARMS, *LEGS], dtype=np.float32)
"""COCO's joints of a standing person about its centre, map pixels."""


class Told(SingleStageModel):
    """A single-stage model whose score maps, or whose maps, are given."""

    scores: Iterator[Tensor] | None = None
    """`[1, h, w]` for each call, in place of the head's score map."""
    maps_found: Iterator[CIRMaps] | None = None
    """For each call, in place of running the network."""

    def maps(self, images: Tensor) -> CIRMaps:
        if self.maps_found is not None:
            return next(self.maps_found)
        found = super().maps(images)
        return found if self.scores is None else found._replace(score=next(self.scores))


class Annotated(NamedTuple):
    """A batch's persons as `ImageBatch` has them but in map pixels, and what the network says at every map pixel."""

    keypoints: Tensor
    """`[B, S, K, 2]`."""
    visibility: Tensor
    areas: Tensor
    regions: Tensor
    affine: Tensor
    displacements: Tensor
    """`[B, h, w, K, 2]`, map pixels."""


class Targets(NamedTuple):
    """The loop's, as dense maps: score and weight `[B, h, w]`, displacements `[B, h, w, K, 2]`, where a joint is
    learnt `[B, h, w, K]`."""

    score: np.ndarray
    weight: np.ndarray
    displacement: np.ndarray
    supervised: np.ndarray


def median_seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of each call, taken in turns after a warm-up round, so that a busy machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    for _ in range(rounds + 1):
        for name, call in calls.items():
            wait()
            started = clock()
            call()
            wait()
            seconds[name].append(clock() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def single_stage(backbone: str, size: int) -> Told:
    crop = InputConfig(height=size, width=size)
    config = ModelConfig(Named(backbone), Named("cir"), skeleton="coco17", input=crop)
    built = build_single_stage(config)
    # Half of the way to the queries, the rest from there; the semantic points keep the places that they start at.
    half = torch.from_numpy(BODY).flatten() / 2
    for layer in (built.head.to_query, built.head.to_keypoint, built.head.to_points):
        assert layer is not None
        layer.weight.data.zero_()
        if layer is not built.head.to_points:
            assert layer.bias is not None
            layer.bias.data.copy_(half)
    return Told(built.backbone, built.head, built.skeleton, config).to(DEVICE).eval()


def score_map(persons: int, size: tuple[int, int]) -> Tensor:
    """`[1, h, w]` with one peak for each person, spread over the map, of heights 0.9 to 0.3."""
    height, width = size
    columns = min(persons, math.ceil(math.sqrt(persons * width / height)))
    rows = -(-persons // columns)
    slots = torch.arange(persons)
    x = ((slots % columns + 0.5) * width / columns).round()
    y = ((slots // columns + 0.5) * height / rows).round()
    grid = pixel_grid(height, width, x.device).unflatten(0, size)
    distance = (grid[..., 0] - x[:, None, None]).square() + (grid[..., 1] - y[:, None, None]).square()
    heights = torch.linspace(0.9, 0.3, persons)[:, None, None]
    return (heights * torch.exp(-distance / 8)).amax(0)[None].to(DEVICE)


def picture_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@torch.inference_mode()
def postprocessing(backbone: str, size: int, persons: list[int], rounds: int) -> dict[str, Any]:
    model = single_stage(backbone, size)
    batch = collate_pyramids([pyramid(picture_of(size, size), size, (1.0,), 0)]).to(DEVICE)
    images = model.preprocess(batch.images[0])
    rows = []
    for flip in (False, True):
        decoding = Decoding(flip=flip)
        for count in persons:
            model.maps_found, scores = None, score_map(count, (size // STRIDE, size // STRIDE))
            maps = model.maps(images)
            # The mirrored image's map pixels look at the same places from the other side.
            both = [maps._replace(score=scores), maps._replace(score=scores.flip(-1))][: 1 + flip]

            def network(views: int = len(both)) -> None:
                model.maps_found = None
                for _ in range(views):
                    model.maps(images)

            def rest(both: list[CIRMaps] = both, decoding: Decoding = decoding) -> int:
                model.maps_found = cycle(both)
                return len(suppress(predict_images(model, [batch], decoding), SKELETON.sigmas, decoding).scores)

            if rest() != count:
                raise SystemExit(f"{count} persons were put into the map and {rest()} were found")
            taken = median_seconds({"network": network, "rest": rest}, rounds)
            ours, peer = taken["rest"], taken["network"]
            rows.append({"flip": flip, "persons": count, "ours": ours, "peer": peer, "ratio": ours / peer})
    return {**max(rows, key=itemgetter("ratio")), "unit": "s", "rows": rows}


def annotated(persons_of: list[int], size: int) -> Annotated:
    """Images with so many persons of random size and place on maps of `size`, some joints unlabelled, two regions."""
    rng = np.random.default_rng(0)
    batch, slots, joints = len(persons_of), max(persons_of), len(BODY)
    scale = np.exp(rng.uniform(np.log(0.3), np.log(2.5), (batch, slots, 1, 1))) * size / 128
    posed = scale * (BODY + rng.normal(0, 2, (batch, slots, joints, 2)))
    keypoints = rng.uniform(0, size, (batch, slots, 1, 2)) + posed
    filled = np.arange(slots) < np.array(persons_of)[:, None]
    visibility = 2 * (filled[..., None] & (rng.random((batch, slots, joints)) < 0.7))
    areas = 13 * 36 * 0.5 * scale[..., 0, 0] ** 2 * rng.uniform(0.7, 1.3, (batch, slots))
    image = size * STRIDE
    regions = np.concatenate([rng.uniform(0, image, (batch, 2, 2)), rng.uniform(0, image / 4, (batch, 2, 2))], -1)
    box, square = np.array([0.0, 0.0, image, image]), (image, image)
    affine = np.stack([box_to_affine(box, square, padding=1.0, rotation=turn) for turn in rng.uniform(-30, 30, batch)])
    # What a half-trained network says: towards the joints of a person of the middle size, some way off.
    displacements = BODY * size / 128 + rng.normal(0, 1, (batch, size, size, joints, 2))
    keypoints, areas = np.where(visibility[..., None] > 0, keypoints, 0), np.where(filled, areas, 0)
    floats = [torch.from_numpy(array).float() for array in (keypoints, areas, regions, affine, displacements)]
    keypoints, areas, regions, affine, displacements = (tensor.to(DEVICE) for tensor in floats)
    return Annotated(keypoints, torch.from_numpy(visibility).to(DEVICE), areas, regions, affine, displacements)


def batched_targets(scene: Annotated, size: int, predicted: Tensor) -> tuple[Tensor, ...]:
    """As a training step makes them, of displacements `[B, S, W, K, 2]` at the areas' pixels: those pixels and which
    are owned, score and weight maps, displacements and where they are learnt."""
    areas = centre_areas(scene.keypoints, scene.visibility, scene.areas, (size, size), RADIUS)
    poses = areas.pixels[..., None, :] + predicted
    oks = oks_of_pairs(
        poses, scene.keypoints[:, :, None], scene.areas[..., None], SKELETON.sigmas, scene.visibility[:, :, None]
    )
    weight = score_weights(areas, region_mask(scene.regions, scene.affine, STRIDE, (size, size)))
    displacement = scene.keypoints[:, :, None] - areas.pixels[..., None, :]
    supervised = areas.owned[..., None] & (scene.visibility > 0)[:, :, None]
    return areas.pixels, areas.owned, areas.spread(oks), weight, displacement, supervised


def looped_targets(scene: list[np.ndarray], size: int, *, joint_by_joint: bool = False) -> Targets:
    """The same in a loop."""
    batch, joints = len(scene[0]), len(BODY)
    variances = 8 * np.array(SKELETON.sigmas) ** 2
    score, weight = np.zeros((batch, size, size)), np.full((batch, size, size), BACKGROUND)
    displacement = np.zeros((batch, size, size, joints, 2), np.float32)
    supervised = np.zeros((batch, size, size, joints), bool)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1) * STRIDE
    for b, (keypoints, visibility, areas, regions, affine, predicted) in enumerate(zip(*scene, strict=True)):
        places = (grid - affine[:, 2]) @ np.linalg.inv(affine[:, :2]).T
        for x, y, width, height in regions:
            inside = (places[..., 0] >= x) & (places[..., 0] < x + width)
            weight[b, inside & (places[..., 1] >= y) & (places[..., 1] < y + height)] = 0
        owner = np.full((size, size), np.inf)
        for person in range(len(keypoints)):
            labelled = visibility[person] > 0
            if not labelled.any():
                continue
            centre_x, centre_y = keypoints[person][labelled].mean(0)
            for y in range(max(0, int(centre_y - RADIUS)), min(size, int(centre_y + RADIUS) + 2)):
                for x in range(max(0, int(centre_x - RADIUS)), min(size, int(centre_x + RADIUS) + 2)):
                    if (x - centre_x) ** 2 + (y - centre_y) ** 2 >= RADIUS**2 or owner[y, x] <= areas[person]:
                        continue
                    owner[y, x] = areas[person]
                    if joint_by_joint:
                        for joint in range(joints):
                            if labelled[joint]:
                                displacement[b, y, x, joint, 0] = keypoints[person, joint, 0] - x
                                displacement[b, y, x, joint, 1] = keypoints[person, joint, 1] - y
                    else:
                        displacement[b, y, x] = keypoints[person] - (x, y)
                    distances = ((predicted[y, x] + (x, y) - keypoints[person]) ** 2).sum(-1)
                    score[b, y, x] = np.exp(-distances / variances / areas[person])[labelled].mean()
                    weight[b, y, x] = 1
                    supervised[b, y, x] = labelled
    return Targets(score, weight, displacement, supervised)


@torch.inference_mode()
def targets(size: int, persons_of: list[int], rounds: int) -> dict[str, Any]:
    scene = annotated(persons_of, size)
    arrays = [tensor.cpu().numpy() for tensor in scene]
    pixels = centre_areas(scene.keypoints, scene.visibility, scene.areas, (size, size), RADIUS).pixels
    rows = torch.arange(len(pixels), device=DEVICE)[:, None, None]
    predicted = scene.displacements[rows, pixels[..., 1].long(), pixels[..., 0].long()]
    calls = {
        "ours": lambda: batched_targets(scene, size, predicted),
        "peer": lambda: looped_targets(arrays, size),
        "loop_of_joints": lambda: looped_targets(arrays, size, joint_by_joint=True),
    }
    pixels, owned, score, weight, displacement, learnt = (tensor.cpu().numpy() for tensor in calls["ours"]())
    image, person, place = np.nonzero(owned)
    x, y = pixels[image, person, place].astype(int).T
    for name in ("peer", "loop_of_joints"):
        expected = calls[name]()
        supervised = np.zeros_like(expected.supervised)
        supervised[image, y, x] = learnt[image, person, place]
        dense = np.zeros_like(expected.displacement)
        dense[image, y, x] = displacement[image, person, place]
        if not (
            np.allclose(score, expected.score, atol=1e-5)
            and np.array_equal(weight, expected.weight.astype(np.float32))
            and np.array_equal(supervised, expected.supervised)
            and np.array_equal(dense[supervised], expected.displacement[supervised])
        ):
            raise SystemExit(f"the batched targets and the {name}'s disagree")
    taken = median_seconds(calls, rounds)
    return {**taken, "ratio": taken["peer"] / taken["ours"], "unit": "s", "persons": persons_of, "pixels": len(image)}


def inference(backbone: str, size: int, persons: list[int], rounds: int) -> dict[str, Any]:
    model = single_stage(backbone, size)
    head = Named("hrnet" if backbone.startswith("hrnet") else "simple")
    crop = InputConfig(height=size // 2, width=max(32, 3 * size // 256 * 32))
    top_down = build_model(ModelConfig(Named(backbone), head, skeleton="coco17", input=crop)).to(DEVICE).eval()
    picture, decoding = picture_of(480, 640), Decoding(flip=False)
    _, height, width = pyramid(picture, size, (1.0,), 0).images[0].shape
    rng = np.random.default_rng(0)
    rows = []
    for count in persons:
        sides = rng.uniform((60, 150), (160, 400), (count, 2))
        boxes = np.concatenate([rng.uniform(0, (640, 480) - sides), sides], -1)
        # On the map of the image itself, without the padding, where no peak counts.
        scores = torch.zeros(1, height // STRIDE, width // STRIDE, device=DEVICE)
        part = score_map(count, (size // STRIDE, size * 4 // 3 // STRIDE))
        scores[:, : part.shape[1], : part.shape[2]] = part
        model.scores = cycle([scores])
        found = len(predict_whole(model, [picture], decoding))
        if found != count:
            raise SystemExit(f"{count} persons were put into the map and {found} were found")
        calls = {
            "single": lambda: predict_whole(model, [picture], decoding),
            "top_down": lambda boxes=boxes: predict_crops(top_down, [picture], [boxes], decoding),
        }
        taken = median_seconds(calls, rounds)
        ours, peer = 1 / taken["single"], 1 / taken["top_down"]
        rows.append({"persons": count, "ours": ours, "peer": peer, "ratio": ours / peer})
    growth = {
        side: np.polyfit([row["persons"] for row in rows], [1 / row[side] for row in rows], 1).tolist()
        for side in ("ours", "peer")
    }
    crossing = (growth["ours"][1] - growth["peer"][1]) / (growth["peer"][0] - growth["ours"][0])
    return {
        **rows[-1],
        "unit": "images/s",
        "crossing_persons": crossing,
        "seconds_per_person": {side: line[0] for side, line in growth.items()},
        "network_sees": [[height, width], [crop.height, crop.width]],
        "rows": rows,
    }


def peak_mib(step: Callable[[], object]) -> float:
    """Peak memory of the tensors that a step makes."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    profiler: Any = profile(profile_memory=True)
    with profiler:
        step()
    events = profiler.kineto_results.events()
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(sizes, key=itemgetter(0)))) / 2**20


def head(backbone: str, size: int, rounds: int) -> dict[str, Any]:
    model = single_stage(backbone, size).train()
    with torch.no_grad():
        levels = [level.detach() for level in model.backbone(torch.randn(2, 3, size, size, device=DEVICE))]
    for level in levels:
        level.requires_grad_()
    side = size // STRIDE
    scene = annotated([4, 4], side)
    areas = centre_areas(scene.keypoints, scene.visibility, scene.areas, (side, side), RADIUS)
    pixels = {
        "ours": areas.pixels.flatten(1, 2),
        "peer": pixel_grid(side, side, DEVICE).expand(2, -1, -1),
    }
    parameters = [parameter for parameter in model.head.parameters() if parameter.requires_grad]

    def step(asked: Tensor | None) -> None:
        maps = model.head(levels)
        loss = maps.score.square().mean()
        if asked is not None:
            loss = loss + model.head.displacements(maps.joints, asked).square().mean()
        torch.autograd.grad(loss, [*levels, *parameters], allow_unused=asked is None)

    calls = {name: lambda asked=asked: step(asked) for name, asked in pixels.items()}
    taken = median_seconds({**calls, "neither": lambda: step(None)}, rounds)
    return {
        "ours": taken["ours"],
        "peer": taken["peer"],
        "ratio": taken["peer"] / taken["ours"],
        "unit": "s",
        "without_displacements": taken["neither"],
        "pixels_of_an_image": {name: asked.shape[1] for name, asked in pixels.items()},
        "peak_mib": {name: round(peak_mib(call), 1) for name, call in calls.items()},
    }


class PlainPipeline:
    """The loader's peer, over the images of a FullImageDataset; the whole picture is mirrored as in DEKR's loader."""

    def __init__(self, dataset: FullImageDataset, augmentation: ImageAugmentation) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.rng = np.random.default_rng(0)
        self.jitter = ColorJitter(*augmentation.jitter)

    def __getitem__(self, index: int) -> tuple[Tensor, np.ndarray]:
        dataset, augmentation, rng = self.dataset, self.augmentation, self.rng
        row = int(dataset.images[index])
        path = str(dataset.image_dir / dataset.annotations.file_names[row])
        picture = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if picture is None:
            raise OSError(f"{path}: cannot be read")
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        height, width = picture.shape[:2]
        persons = np.flatnonzero(dataset.annotations.image_index == row)
        joints = dataset.keypoints[persons].astype(float)
        if rng.random() < augmentation.flip_probability:
            picture = picture[:, ::-1]
            joints[..., 0] = width - 1 - joints[..., 0]
            joints = joints[:, list(dataset.skeleton.flip_index)]
        turn, region = rng.uniform(-1, 1) * augmentation.rotation, min(height, width) * rng.uniform(*augmentation.scale)
        centre = (width / 2, height / 2)
        affine = cv2.getRotationMatrix2D(centre, turn, dataset.size / region)
        affine[:, 2] += dataset.size / 2 - np.array(centre) + rng.uniform(-1, 1, 2) * augmentation.shift
        image = cv2.warpAffine(picture, affine, (dataset.size, dataset.size), flags=cv2.INTER_LINEAR)
        jittered = np.array(self.jitter(Image.fromarray(image)))
        return torch.from_numpy(jittered.transpose(2, 0, 1).copy()), apply_affine(affine, joints)


def loader(annotations: Path, images: Path, size: int, rounds: int, samples: int) -> dict[str, Any]:
    truth, augmentation = read_coco(annotations), ImageAugmentation()
    skeleton = resolve_skeleton("auto", truth.category)
    dataset = FullImageDataset(truth, images, skeleton, size, augmentation=augmentation)
    draws, plain = TrainingDraws(dataset, seed=0), PlainPipeline(dataset, augmentation)
    positions = np.random.default_rng(0).integers(0, len(dataset), samples).tolist()
    calls = {
        "ours": lambda: [draws[0, position] for position in positions],
        # The same pictures, through epoch 0's order; all draws of a round are other ones.
        "peer": lambda: [plain[index] for index in epoch_order(0, 0, len(dataset))[positions]],
    }
    taken = median_seconds(calls, rounds)
    rates = {name: samples / seconds for name, seconds in taken.items()}
    return {**rates, "ratio": rates["ours"] / rates["peer"], "unit": "samples/s per core", "pictures": len(dataset)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, help="COCO-keypoint JSON for the loader")
    parser.add_argument("--images", type=Path, help="folder of its pictures")
    parser.add_argument("--backbone", default="hrnet_w32", help="of both models; a small one for a slow machine")
    parser.add_argument("--size", type=int, default=512, help="side of the single-stage model's input")
    parser.add_argument("--persons", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="on the picture of inference")
    parser.add_argument("--samples", type=int, default=48, help="of the loader, in a round")
    parser.add_argument("--rounds", type=int, default=5)
    names = ("postprocessing", "targets", "inference", "head", "loader")
    parser.add_argument("--figures", nargs="+", choices=names, default=names)
    parser.add_argument("--json", action="store_true", help="print the JSON lines only")
    args = parser.parse_args()
    if (args.annotations is None) != (args.images is None):
        parser.error("give --annotations and --images, or neither")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:

        def measure_targets() -> dict[str, Any]:
            crowds = ([1, 1, 1, 2, 2, 3, 4, 8], [8] * 8, [30] * 8)
            rows = [targets(args.size // STRIDE, persons_of, args.rounds) for persons_of in crowds]
            return {**rows[0], "rows": rows}

        def measure_loader() -> dict[str, Any]:
            annotations, images = args.annotations, args.images
            if annotations is None:
                annotations = synthesize(Path(folder) / "rendered", 16, 0, size=640)
                images = annotations.parent / "images"
            return loader(annotations, images, args.size, args.rounds, args.samples)

        figures: dict[str, Callable[[], dict[str, Any]]] = {
            "postprocessing": lambda: postprocessing(args.backbone, args.size, [1, 5, 15, 30], args.rounds),
            "targets": measure_targets,
            "inference": lambda: inference(args.backbone, args.size, args.persons, args.rounds),
            "head": lambda: head(args.backbone, args.size, args.rounds),
            "loader": measure_loader,
        }
        for name in args.figures:
            line = figures[name]()
            if not args.json:
                for row in line.get("rows", [line]):
                    at = ", ".join(f"{key} {row[key]}" for key in ("flip", "persons") if key in row)
                    sides = f"{row['ours']:.4g} {line['unit']} against {row['peer']:.4g}, ratio {row['ratio']:.4g}"
                    print(f"{name}: {at and at + ': '}{sides}")
            setting = {
                "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu, 1 thread",
                "load": [round(load, 2) for load in os.getloadavg()],
                "settings": {key: getattr(args, key) for key in ("backbone", "size", "rounds")},
            }
            print(json.dumps({"benchmark": "single_stage", "figure": name, **line, **setting}))


if __name__ == "__main__":
    main()
