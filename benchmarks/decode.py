"""Heatmaps to coordinates: `poserelay.heatmaps` against the per-joint numpy + OpenCV loop, persons per second.

    python benchmarks/decode.py [--device cuda] [--size 64 48] [--json]

Without --size at 64x48 and at 128x96. `ours`, `peer` and `ratio` are for flip average, Gaussian filter and parabola
(peer: the same steps joint by joint) at the first size. `argmax`, argmax + 0.25 px, does what its peer does: HRNet's
vectorised argmax and loop over the joints; `plain`, the parabola without flip and filter, and `paraboloid` and
`dark` likewise, stand beside that same peer. `further_sizes` holds the second size. One thread on the CPU on both
sides; with --device cuda the peer starts, like ours, from maps on the GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch

from poserelay.heatmaps import Refine, average_flip, decode, encode

SIZES = ((64, 48), (128, 96))
SHIFT, BLUR = 0.75, 1.0


def peer_argmax(heatmaps: np.ndarray) -> np.ndarray:
    batch, joints, height, width = heatmaps.shape
    flat = heatmaps.reshape(batch, joints, -1)
    index, score = flat.argmax(2), flat.max(2)
    xy = np.stack((index % width, index // width), -1).astype(np.float32) * (score > 0)[..., None]
    for person in range(batch):
        for joint in range(joints):
            heatmap = heatmaps[person, joint]
            x, y = int(xy[person, joint, 0] + 0.5), int(xy[person, joint, 1] + 0.5)
            if 1 < x < width - 1 and 1 < y < height - 1:
                difference = np.array([heatmap[y, x + 1] - heatmap[y, x - 1], heatmap[y + 1, x] - heatmap[y - 1, x]])
                xy[person, joint] += np.sign(difference) * 0.25
    return xy


def peer_full(heatmaps: np.ndarray, heatmaps_of_flipped: np.ndarray, flip_index: list[int]) -> np.ndarray:
    batch, joints, height, width = heatmaps.shape
    mirrored = heatmaps_of_flipped[:, flip_index, :, ::-1]
    shifted = mirrored.copy()
    shifted[..., 1:] = (1 - SHIFT) * mirrored[..., 1:] + SHIFT * mirrored[..., :-1]
    average = (heatmaps + shifted) * 0.5
    xy = np.zeros((batch, joints, 2), np.float32)
    for person in range(batch):
        for joint in range(joints):
            heatmap = cv2.GaussianBlur(average[person, joint], (0, 0), BLUR, borderType=cv2.BORDER_REPLICATE)
            y, x = divmod(int(heatmap.argmax()), width)
            if heatmap[y, x] <= 0:
                continue
            xy[person, joint] = x, y
            if 0 < x < width - 1:
                before, peak, after = heatmap[y, x - 1 : x + 2].tolist()
                xy[person, joint, 0] += (before - after) / (2 * (before + after - 2 * peak))
            if 0 < y < height - 1:
                before, peak, after = heatmap[y - 1 : y + 2, x].tolist()
                xy[person, joint, 1] += (before - after) / (2 * (before + after - 2 * peak))
    return xy


def alternately(
    ours: Callable[[], object], peer: Callable[[], object], repeats: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """The best seconds of each, taken in turns so that a busy machine hits both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for command, taken in zip((ours, peer), seconds, strict=True):
            start = clock()
            command()
            taken.append(clock() - start)
    return min(seconds[0][1:]), min(seconds[1][1:])


def measure(size: tuple[int, int], batch: int, joints: int, repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Persons per second of ours and of its peer, by name."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((2, batch, joints, height, width), generator=generator)
    keypoints = 4 + torch.rand((batch, joints, 2), generator=generator) * torch.tensor([width - 9, height - 9])
    flip_index = list(range(joints))[::-1]
    visible = torch.ones(batch, joints)
    heatmaps = (encode(keypoints, visible, size, 2) + 0.02 * noise[0]).to(device)
    mirrored = torch.stack((width - 2 + SHIFT - keypoints[..., 0], keypoints[..., 1]), -1)[:, flip_index]
    of_flipped = (encode(mirrored, visible, size, 2) + 0.02 * noise[1]).to(device)

    def ours_full() -> np.ndarray:
        return decode(average_flip(heatmaps, of_flipped, flip_index, SHIFT), "parabola", BLUR)[0].cpu().numpy()

    def ours_alone(refine: Refine) -> Callable[[], np.ndarray]:
        return lambda: decode(heatmaps, refine)[0].cpu().numpy()

    def peer_alone() -> np.ndarray:
        return peer_argmax(heatmaps.cpu().numpy())

    figures = {
        "full": (ours_full, lambda: peer_full(heatmaps.cpu().numpy(), of_flipped.cpu().numpy(), flip_index)),
        "argmax": (ours_alone("quarter"), peer_alone),
        "plain": (ours_alone("parabola"), peer_alone),
        "paraboloid": (ours_alone("paraboloid"), peer_alone),
        "dark": (ours_alone("dark"), peer_alone),
    }
    # Seconds of the one thread: those in which it waited for other programs' turns on the processor do not count.
    clock = time.process_time if device == "cpu" else time.perf_counter
    lines = {}
    for name, (ours, peer) in figures.items():
        difference = float(np.abs(ours() - peer()).max())
        ours_seconds, peer_seconds = alternately(ours, peer, repeats, clock)
        lines[name] = {
            "ours": round(batch / ours_seconds, 1),
            "peer": round(batch / peer_seconds, 1),
            "ratio": round(peer_seconds / ours_seconds, 2),
            "largest_difference_px": round(difference, 5),
        }
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, nargs=2, help="height and width of the maps; without it 64 48 and 128 96")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--joints", type=int, default=17)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    measured = []
    for height, width in [args.size] if args.size else SIZES:
        lines = measure((height, width), args.batch, args.joints, args.repeats, args.device)
        measured.append({**lines.pop("full"), **lines, "size": [height, width]})
        if not args.json:
            for name, line in {"full": measured[-1], **lines}.items():
                rates = f"{line['ours']} persons/s against {line['peer']}, {line['ratio']} times as many"
                print(f"{height}x{width} {name}: {rates}")
    setting = {"unit": "persons/s", "device": args.device, "batch": args.batch}
    print(json.dumps({"benchmark": "decode", **measured[0], **setting, "further_sizes": measured[1:]}))


if __name__ == "__main__":
    main()
