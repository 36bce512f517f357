"""Pictures read and decoded per second in an epoch's order, one thread: prepared shards and the folder of originals.

    python benchmarks/shards.py --images DIR --json

The shards are prepared in a temporary folder first, which is not timed. With --cold every round begins with the files
put out of the page cache (Linux), so that the disk is read too; the shards' gain is larger where opening a file costs
more than here, on a network file system.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch

from poserelay.config import PrepareConfig
from poserelay.datasets.sampling import decode_image
from poserelay.datasets.shards import ShardPictures
from poserelay.datasets.unlabelled import FilePictures, Pictures, list_images
from poserelay.preparation import prepare


def rate(pictures: Pictures, epoch: int) -> float:
    """Pictures per second over one epoch."""
    start = time.perf_counter()
    for index in pictures.order(0, epoch):
        decode_image(pictures.read(index), pictures.name(index), orientation="exif")
    return len(pictures) / (time.perf_counter() - start)


def evict(files: Sequence[Path]) -> None:
    """Put the files out of the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--short_side", type=int, default=256, help="of the prepared pictures, pixels")
    parser.add_argument("--pictures_per_shard", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5, help="epochs")
    parser.add_argument("--cold", action="store_true", help="from the disk instead of the page cache")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "shards"))
        sizes = {"short_side": arguments.short_side, "pictures_per_shard": arguments.pictures_per_shard}
        shards = prepare(PrepareConfig(images=str(arguments.images), out=out, **sizes))
        files = list_images(arguments.images)
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        for epoch in range(arguments.rounds):
            # Interleaved, so that another load on the machine meets both alike.
            for name in rates:
                if arguments.cold:
                    evict([*files, *(shard.path for shard in shards)])
                rates[name].append(rate(ShardPictures(shards) if name == "ours" else FilePictures(files), epoch))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    if not arguments.json:
        print(f"{len(files)} pictures, {len(shards)} shards, median of {arguments.rounds} epochs")
    print(
        json.dumps(
            {
                "benchmark": "shards",
                "unit": "pictures/s read and decoded, one thread",
                "ours": round(medians["ours"], 1),
                "peer": round(medians["peer"], 1),
                "ratio": round(medians["ours"] / medians["peer"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
