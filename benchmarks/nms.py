"""OKS-NMS, hard, soft and fusing: `poserelay.oks` on all images at once against loops over images and pairs of poses.

    python benchmarks/nms.py [--images 500] [--poses 20] [--json]

Poses as a detector leaves them: distinct persons, and a second detection of every tenth. One thread each. The loops are
HRNet's `oks_nms` and `soft_oks_nms`, and the first with CCM's fusion.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from poserelay.oks import fuse_poses, nms, soft_nms

THRESHOLD = 0.9
MAX_POSES = 20
Answer = tuple[list[int], np.ndarray]
"""The kept poses with what comes of them: their keypoints when fused, else their scores."""


def peer_oks(
    best: int, rest: np.ndarray, keypoints: np.ndarray, areas: np.ndarray, variances: np.ndarray
) -> np.ndarray:
    overlaps = np.zeros(len(rest))
    for row, pose in enumerate(rest):
        dx = keypoints[pose, :, 0] - keypoints[best, :, 0]
        dy = keypoints[pose, :, 1] - keypoints[best, :, 1]
        exponent = (dx**2 + dy**2) / variances / ((areas[best] + areas[pose]) / 2 + np.spacing(1)) / 2
        overlaps[row] = np.sum(np.exp(-exponent)) / len(exponent)
    return overlaps


def peer_hard(keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, variances: np.ndarray) -> Answer:
    order, kept = scores.argsort()[::-1], []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        order = rest[peer_oks(best, rest, keypoints, areas, variances) <= THRESHOLD]
    return kept, scores[kept]


def peer_fuse(keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, variances: np.ndarray) -> Answer:
    order, kept, fused = scores.argsort()[::-1], [], []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        overlaps = peer_oks(best, rest, keypoints, areas, variances)
        total, weights = keypoints[best].copy(), 1.0
        for pose, weight in zip(rest, overlaps, strict=True):
            if weight > THRESHOLD:
                total, weights = total + weight * keypoints[pose], weights + weight
        fused.append(total / weights)
        order = rest[overlaps <= THRESHOLD]
    return kept, np.array(fused)


def peer_soft(keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, variances: np.ndarray) -> Answer:
    order, kept, decayed = scores.argsort()[::-1], [], []
    scores = scores[order]
    while len(order) and len(kept) < MAX_POSES:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        decayed.append(scores[0])
        overlaps = peer_oks(best, rest, keypoints, areas, variances)
        scores = scores[1:] * np.exp(-(overlaps**2) / THRESHOLD)
        again = scores.argsort()[::-1]
        order, scores = rest[again], scores[again]
    return kept, np.array(decayed)


def alternately(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The best seconds of each, taken in turns so that a busy machine hits both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for command, taken in zip((ours, peer), seconds, strict=True):
            start = time.perf_counter()
            command()
            taken.append(time.perf_counter() - start)
    return min(seconds[0]), min(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poses", type=int, default=20)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rng = np.random.default_rng(0)
    sigmas = np.full(17, 0.07)
    variances = (2 * sigmas) ** 2
    keypoints = rng.uniform(0, 500, (args.images, args.poses, 1, 2)) + rng.uniform(
        -80, 80, (args.images, args.poses, 17, 2)
    )
    again = args.poses // 10
    keypoints[:, :again] = keypoints[:, again : 2 * again] + rng.normal(0, 2, (args.images, again, 17, 2))
    scores, areas = rng.random((args.images, args.poses)), np.full((args.images, args.poses), 160.0**2)
    images = list(zip(keypoints, scores, areas, strict=True))
    poses, pose_scores, pose_areas = (torch.from_numpy(array).flatten(0, 1) for array in (keypoints, scores, areas))
    # An image alone is a call without them.
    image_index = torch.arange(args.images).repeat_interleave(args.poses) if args.images > 1 else None

    def ours_hard() -> tuple[torch.Tensor, torch.Tensor]:
        kept = nms(poses, pose_scores, pose_areas, sigmas.tolist(), THRESHOLD, image_index=image_index)
        return kept, pose_scores[kept]

    def ours_soft() -> tuple[torch.Tensor, torch.Tensor]:
        return soft_nms(poses, pose_scores, pose_areas, sigmas.tolist(), THRESHOLD, MAX_POSES, image_index=image_index)

    def ours_fuse() -> tuple[torch.Tensor, torch.Tensor]:
        fused, kept = fuse_poses(poses, pose_scores, pose_areas, sigmas.tolist(), THRESHOLD, image_index=image_index)
        return kept, fused

    methods = {"hard": (ours_hard, peer_hard), "soft": (ours_soft, peer_soft), "fuse": (ours_fuse, peer_fuse)}
    lines = {}
    for name, (ours, peer_of_image) in methods.items():

        def peer(peer_of_image: Callable[..., Answer] = peer_of_image) -> list[Answer]:
            return [peer_of_image(*image, variances) for image in images]

        answers = peer()
        indices, values = ours()
        expected = [row * args.poses + pose for row, (kept, _) in enumerate(answers) for pose in kept]
        if indices.tolist() != expected:
            raise SystemExit(f"{name}: the two disagree on the kept poses")
        difference = float(np.abs(values.numpy() - np.concatenate([answer for _, answer in answers])).max())
        if difference > 1e-9:
            raise SystemExit(f"{name}: the two differ by {difference}")
        ours_seconds, peer_seconds = alternately(ours, peer, args.rounds)
        lines[name] = {
            "ours": round(args.images / ours_seconds, 1),
            "peer": round(args.images / peer_seconds, 1),
            "ratio": round(peer_seconds / ours_seconds, 2),
        }
        if not args.json:
            milliseconds = [1000 * seconds / args.images for seconds in (ours_seconds, peer_seconds)]
            print(f"{name}: {milliseconds[0]:.3f} ms per image of {args.poses} poses against {milliseconds[1]:.3f} ms")
    setting = {"unit": "images/s", "images": args.images, "poses": args.poses}
    others = {name: lines[name] for name in ("soft", "fuse")}
    print(json.dumps({"benchmark": "oks_nms", **lines["hard"], **others, **setting}))


if __name__ == "__main__":
    main()
