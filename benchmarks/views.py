"""Two MoCo-v2 views per picture: `TwoViews` against lightly's MoCoV2Transform, pictures per second per core.

    python benchmarks/views.py --images DIR [--count 200] [--size 224] [--json]

`ours`, `peer` and `ratio` start from the files, one decode per picture on both sides (ours with the reading that
training uses, the peer with PIL); `transform` holds the same without the decoding, which neither can avoid. One thread
on both sides, in turns, the best of several rounds. The peer also normalises to float on the CPU; ours leaves that to
the device and hands over uint8, a quarter of the bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from lightly.transforms.moco_transform import MoCoV2Transform
from PIL import Image

from poserelay.datasets.sampling import draw_generator, read_image
from poserelay.datasets.unlabelled import list_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages belong to the checkout, not to the package
from pretrain.views import TwoViews


def read_with_pil(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def pictures_per_second(
    sides: Sequence[tuple[Callable[[int], object], str]], count: int, rounds: int
) -> dict[str, float]:
    """The best rate of each (command, name) over `count` pictures, the sides taken in turns."""
    seconds = {name: float("inf") for _, name in sides}
    for _ in range(rounds):
        for command, name in sides:
            start = time.perf_counter()
            for index in range(count):
                command(index)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    rates = {name: count / best for name, best in seconds.items()}
    return {**rates, "ratio": rates["ours"] / rates["peer"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of pictures")
    parser.add_argument("--count", type=int, default=200, help="pictures taken, evenly spread over the folder")
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (lightly's blur draws from it)

    found = list_images(args.images)
    files = found[:: max(1, len(found) // args.count)][: args.count]
    ours, peer = TwoViews(size=args.size), MoCoV2Transform(input_size=args.size)

    def our_views(index: int, picture: np.ndarray) -> object:
        return ours(picture, partial(draw_generator, 0, 0, index))

    from_files = pictures_per_second(
        [
            (lambda index: our_views(index, read_image(files[index], orientation="exif")), "ours"),
            (lambda index: peer(read_with_pil(files[index])), "peer"),
        ],
        len(files),
        args.rounds,
    )
    arrays = [read_image(path, orientation="exif") for path in files]
    pictures = [read_with_pil(path) for path in files]
    transform = pictures_per_second(
        [(lambda index: our_views(index, arrays[index]), "ours"), (lambda index: peer(pictures[index]), "peer")],
        len(files),
        args.rounds,
    )
    if not args.json:
        for name, rates in (("from files", from_files), ("transform alone", transform)):
            print(
                f"{name}: ours {rates['ours']:.0f}, lightly {rates['peer']:.0f} pictures/s, {rates['ratio']:.2f} times"
            )
    sides = np.array([array.shape[:2] for array in arrays]).mean(0)
    line = {
        "benchmark": "views",
        **from_files,
        "unit": "pictures per second per core, two views each, from files",
        "transform": transform,
        "size": args.size,
        "pictures": len(files),
        "mean_height": float(sides[0]),
        "mean_width": float(sides[1]),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
