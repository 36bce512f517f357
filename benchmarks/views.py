"""Two MoCo-v2 views per picture: `TwoViews` against lightly's MoCoV2Transform, pictures per second per core.

    python benchmarks/views.py --images DIR [--count 200] [--size 224] [--rounds 6] [--json]

`ours`, `peer` and `ratio` start from the files, one decode per picture on both sides (ours as training reads, the peer
with PIL), colours fused; `exact` applies them operation by operation, `device` leaves colour and blur to the device,
`transform` is the fused views without the decoding. `error` compares fused with exact views of equal draws, in grey
levels. One thread on both sides, which take turns; seconds are the CPU's, and every picture counts with its best
round, of equal draws. The peer also normalises to float on the CPU; ours leaves that to the device and hands over
uint8, a quarter of the bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from lightly.transforms.moco_transform import MoCoV2Transform
from PIL import Image

from poserelay.datasets.sampling import decode_image, draw_generator
from poserelay.datasets.shards import find_pictures
from poserelay.datasets.unlabelled import UnlabelledImages

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages belong to the checkout, not to the package
from pretrain.views import TwoViews

BLOCK = 20  # pictures in a row, so that a side's code and data are in the caches, as in training


def decode_with_pil(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as file:
        return file.convert("RGB")


def pictures_per_second(sides: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, float]:
    """The rate of each side over `count` pictures, each at its best of `rounds`.

    The sides take turns at BLOCK pictures, and at being the first, which finds these pictures in no cache.
    """
    seconds = {name: np.full(count, np.inf) for name in sides}
    for turn in range(rounds):
        order = [*sides][turn % len(sides) :] + [*sides][: turn % len(sides)]
        for first in range(0, count, BLOCK):
            for name in order:
                for index in range(first, min(first + BLOCK, count)):
                    torch.manual_seed(index)  # of the peer: the best round is not to be that of the cheapest draws
                    np.random.seed(index)  # noqa: NPY002 (lightly's blur draws from it)
                    start = time.process_time()
                    sides[name](index)
                    seconds[name][index] = min(seconds[name][index], time.process_time() - start)
    return {name: count / each.sum() for name, each in seconds.items()}


def compared(rates: dict[str, float], ours: str, peer: str) -> dict[str, float]:
    return {"ours": rates[ours], "peer": rates[peer], "ratio": rates[ours] / rates[peer]}


def pixel_error(size: int, arrays: list[np.ndarray]) -> dict[str, float]:
    """Of fused views against exact ones of the same draws."""
    fused, exact = TwoViews(size), TwoViews(size, colour="exact")
    differences = []
    for index, array in enumerate(arrays):
        draws = partial(draw_generator, 0, 0, index)
        differences.append((fused(array, draws).int() - exact(array, draws).int()).abs().flatten())
    levels = np.bincount(torch.cat(differences).numpy(), minlength=256)
    ranked = levels.cumsum() / levels.sum()
    return {"mean": float(levels @ np.arange(256) / levels.sum()), "p99": int(np.searchsorted(ranked, 0.99))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of pictures, or of shards (poserelay prepare)")
    parser.add_argument("--count", type=int, default=200, help="pictures taken, evenly spread over the folder")
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)

    found = find_pictures(args.images)
    chosen = range(0, len(found), max(1, len(found) // args.count))[: args.count]
    arrays = [decode_image(found.read(row), found.name(row), orientation="exif") for row in chosen]
    pictures = [decode_with_pil(found.read(row)) for row in chosen]
    fused, peer = TwoViews(args.size), MoCoV2Transform(input_size=args.size)

    def draws(index: int) -> partial[np.random.Generator]:
        return partial(draw_generator, 0, 0, index)

    def from_files(transform: TwoViews) -> Callable[[int], object]:
        images = UnlabelledImages(found, transform)
        return lambda index: images.sample(chosen[index], draws(index))

    rates = pictures_per_second(
        {
            "fused": from_files(fused),
            "exact": from_files(TwoViews(args.size, colour="exact")),
            "device": from_files(TwoViews(args.size, colour="device")),
            "peer": lambda index: peer(decode_with_pil(found.read(chosen[index]))),
            "transform": lambda index: fused(arrays[index], draws(index)),
            "peer's transform": lambda index: peer(pictures[index]),
        },
        len(chosen),
        args.rounds,
    )
    parts = {
        "exact": compared(rates, "exact", "peer"),
        "device": compared(rates, "device", "peer"),
        "transform": compared(rates, "transform", "peer's transform"),
    }
    line = {
        "benchmark": "views",
        **compared(rates, "fused", "peer"),
        "unit": "pictures per second per core, two views each, from files",
        **parts,
        "error": pixel_error(args.size, arrays),
        "size": args.size,
        "pictures": len(chosen),
        "mean_height": float(np.mean([array.shape[0] for array in arrays])),
        "mean_width": float(np.mean([array.shape[1] for array in arrays])),
    }
    if not args.json:
        for name, side in {"fused": line, **parts}.items():
            print(f"{name}: {side['ours']:.0f}, lightly {side['peer']:.0f} pictures/s, {side['ratio']:.2f} times")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
