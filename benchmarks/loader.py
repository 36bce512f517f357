"""Augmented top-down samples per second on one core: ours against the plain read-crop-target pipeline.

    python benchmarks/loader.py --annotations A.json --images DIR --json

The peer works as HRNet's JointsDataset does: cv2.imread, colour conversion and mirroring of the whole picture, warp,
float tensor and normalisation, and a Gaussian per joint in numpy. Ours leaves targets and normalisation to the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import Normalize, ToTensor

from poserelay.config import Augmentation
from poserelay.datasets.coco import read_coco
from poserelay.datasets.sampling import TrainingDraws, epoch_order
from poserelay.datasets.topdown import TopDownDataset, collate_draws
from poserelay.keypoints import resolve_skeleton

SIZE, HEATMAP, SIGMA = (256, 192), (64, 48), 2
ROUNDS, SAMPLES, BATCH = 7, 128, 32


class PlainPipeline(Dataset):
    """The peer, over the persons of a TopDownDataset."""

    def __init__(self, persons: TopDownDataset, augmentation: Augmentation) -> None:
        self.persons = persons
        self.augmentation = augmentation
        self.generator = np.random.default_rng(0)
        self.flip_pairs = [persons.skeleton.indices(pair) for pair in persons.skeleton.flip_pairs]
        self.to_tensor, self.normalize = ToTensor(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        persons = self.persons
        path = persons.image_dir / persons.annotations.file_names[persons.image_index[index]]
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if picture is None:
            raise OSError(f"{path}: cannot be read")
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        joints, visible = persons.keypoints[index].copy(), (persons.visibility[index] > 0).astype(float)
        x, y, w, h = persons.boxes[index]
        height, width = SIZE
        center = np.array([x + w / 2, y + h / 2])
        source_width = max(w, h * width / height) * 1.25
        factor, turn = self.augmentation.scale, self.augmentation.rotation
        source_width *= np.clip(self.generator.standard_normal() * factor + 1, 1 - factor, 1 + factor)
        rotated = self.generator.random() <= self.augmentation.rotation_probability
        angle = np.clip(self.generator.standard_normal() * turn, -2 * turn, 2 * turn) if rotated else 0
        if self.generator.random() <= self.augmentation.flip_probability:
            picture = picture[:, ::-1, :]
            joints[:, 0] = picture.shape[1] - joints[:, 0] - 1
            for left, right in self.flip_pairs:
                joints[left], joints[right] = joints[right], joints[left].copy()
                visible[left], visible[right] = visible[right], visible[left]
            center[0] = picture.shape[1] - center[0] - 1
        radians = np.pi * angle / 180
        up = np.array([np.sin(radians), -np.cos(radians)]) * source_width / 2
        source = np.array([center, center + up, center + up + np.array([up[1], -up[0]])], dtype=np.float32)
        corner = height / 2 - width / 2
        target = np.array([[width / 2, height / 2], [width / 2, corner], [0, corner]], dtype=np.float32)
        affine = cv2.getAffineTransform(source, target)
        image = cv2.warpAffine(picture, affine, (width, height), flags=cv2.INTER_LINEAR)
        for joint in range(len(joints)):
            if visible[joint] > 0:
                joints[joint] = affine @ np.array([*joints[joint], 1])
        heatmaps, weight = self.targets(joints, visible)
        return self.normalize(self.to_tensor(image)), torch.from_numpy(heatmaps), torch.from_numpy(weight)

    def targets(self, joints: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        heatmaps = np.zeros((len(joints), *HEATMAP), dtype=np.float32)
        weight = visible.astype(np.float32)
        height, width = HEATMAP
        reach = SIGMA * 3
        for joint in range(len(joints)):
            mu_x, mu_y = (joints[joint] / 4 + 0.5).astype(int)
            left, top, right, bottom = mu_x - reach, mu_y - reach, mu_x + reach + 1, mu_y + reach + 1
            if left >= width or top >= height or right < 0 or bottom < 0:
                weight[joint] = 0
                continue
            if weight[joint] > 0.5:
                x = np.arange(2 * reach + 1, dtype=np.float32)
                patch = np.exp(-((x - reach) ** 2 + (x[:, None] - reach) ** 2) / (2 * SIGMA**2))
                x0, x1, y0, y1 = max(0, left), min(right, width), max(0, top), min(bottom, height)
                heatmaps[joint, y0:y1, x0:x1] = patch[y0 - top : y1 - top, x0 - left : x1 - left]
        return heatmaps, weight


def seconds(load: Callable[[list[int]], object], indices: np.ndarray) -> float:
    start = time.perf_counter()
    for first in range(0, len(indices), BATCH):
        load(indices[first : first + BATCH].tolist())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO-keypoint JSON")
    parser.add_argument("--images", type=Path, required=True, help="folder of its pictures")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    annotations = read_coco(arguments.annotations)
    augmentation = Augmentation()
    skeleton = resolve_skeleton("auto", annotations.category)
    persons = TopDownDataset(annotations, arguments.images, skeleton, SIZE, augmentation=augmentation)
    draws, plain = TrainingDraws(persons, seed=0), PlainPipeline(persons, augmentation)

    def ours(positions: list[int]) -> object:
        return collate_draws([draws[0, position] for position in positions])

    def peer(indices: list[int]) -> object:
        return default_collate([plain[index] for index in indices])

    order = np.random.default_rng(0).integers(0, len(persons), SAMPLES)
    for load in (ours, peer):
        load(order[:BATCH].tolist())
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(ROUNDS):
        # Interleaved, so that another load on the machine meets both alike; the same persons, through epoch 0's order.
        rates["ours"].append(SAMPLES / seconds(ours, order))
        rates["peer"].append(SAMPLES / seconds(peer, epoch_order(0, 0, len(persons))[order]))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    if not arguments.json:
        print(f"{len(persons)} persons, {SIZE[0]}x{SIZE[1]}, one core, median of {ROUNDS} x {SAMPLES} samples")
    print(
        json.dumps(
            {
                "benchmark": "loader",
                "unit": "augmented samples/s per core",
                "ours": round(medians["ours"], 1),
                "peer": round(medians["peer"], 1),
                "ratio": round(medians["ours"] / medians["peer"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
