"""OKS-NMS of one image: `poserelay.oks.nms` against HRNet's way, one pose pair after the other, images per second.

    python benchmarks/nms.py [--poses 20] [--json]

Poses as a detector leaves them: distinct persons, and a second detection of every tenth. One thread each.
"""

from __future__ import annotations

import argparse
import json
import timeit

import numpy as np
import torch

from poserelay.oks import nms

THRESHOLD = 0.9


def peer_nms(keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, sigmas: np.ndarray) -> list[int]:
    order = scores.argsort()[::-1]
    variances = (2 * sigmas) ** 2
    keep = []
    while len(order):
        best, rest = order[0], order[1:]
        keep.append(int(best))
        overlaps = np.zeros(len(rest))
        for row, pose in enumerate(rest):
            dx = keypoints[pose, :, 0] - keypoints[best, :, 0]
            dy = keypoints[pose, :, 1] - keypoints[best, :, 1]
            exponent = (dx**2 + dy**2) / variances / ((areas[best] + areas[pose]) / 2 + np.spacing(1)) / 2
            overlaps[row] = np.sum(np.exp(-exponent)) / len(exponent)
        order = rest[overlaps <= THRESHOLD]
    return keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poses", type=int, default=20)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rng = np.random.default_rng(0)
    sigmas = np.full(17, 0.07)
    images = []
    for _ in range(args.images):
        poses = rng.uniform(0, 500, (args.poses, 1, 2)) + rng.uniform(-80, 80, (args.poses, 17, 2))
        again = args.poses // 10
        poses[:again] = poses[again : 2 * again] + rng.normal(0, 2, (again, 17, 2))
        images.append((poses, rng.random(args.poses), np.full(args.poses, 160.0**2), sigmas))
    tensors = [tuple(torch.from_numpy(array) for array in image) for image in images]
    for image, tensor in zip(images, tensors, strict=True):
        if peer_nms(*image) != nms(*tensor, threshold=THRESHOLD).tolist():
            raise SystemExit("the two disagree on the kept poses")

    def ours() -> None:
        for tensor in tensors:
            nms(*tensor, threshold=THRESHOLD)

    def peer() -> None:
        for image in images:
            peer_nms(*image)

    turns = [(timeit.timeit(ours, number=1), timeit.timeit(peer, number=1)) for _ in range(8)]
    ours_seconds, peer_seconds = (min(seconds) for seconds in zip(*turns[1:], strict=True))
    line = {
        "benchmark": "oks_nms",
        "unit": "images/s",
        "ours": round(args.images / ours_seconds, 1),
        "peer": round(args.images / peer_seconds, 1),
        "ratio": round(peer_seconds / ours_seconds, 2),
        "poses": args.poses,
    }
    if not args.json:
        milliseconds = [1000 * seconds / args.images for seconds in (ours_seconds, peer_seconds)]
        print(f"{milliseconds[0]:.3f} ms per image of {args.poses} poses against {milliseconds[1]:.3f} ms")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
