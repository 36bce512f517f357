"""`evaluation predict` on a video, from its file to the drawn one, beside the network alone on the same crops.

    python benchmarks/video.py [--frames 40] [--persons 1] [--size 480 640] [--rounds 5] [--quick] [--json]

A rendered person walks over rendered ground, mp4v; boxes given, flip test, drawn with confidence. A JSON line for each
network and number of threads: SimpleBaseline-ResNet-50 at 256x192 and the quickstart's small one, ResNet-18 at 96x96,
both of random weights. `ours` and `peer` are frames/s, the best of rounds in turns; the peer is `forward_crops` of the
crops, cut beforehand, in batches of the same size. `ratio` is ours / peer. `busy` is the share of our time in which
poses were being found and not waited for, which holds beside other work as well; `cpu_ratio` is the processor time of
the peer by ours: what the ratio would be on one core. Loading the model is left out of both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from poserelay.batch import CropBatch
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.datasets.topdown import collate
from poserelay.inference import _crops, forward_crops
from poserelay.model import PoseModel, build_model
from poserelay.synthesize.body import PERSON
from poserelay.synthesize.painting import render
from poserelay.synthesize.scene import draw_scene

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages belong to the checkout, not to the package
from evaluation import predict
from evaluation.config import PredictConfig
from evaluation.predict import open_source, predict_batch, predicted
from evaluation.video import VideoReader

NETWORKS = {
    "resnet50 256x192": ModelConfig(Named("resnet50"), Named("simple"), skeleton="coco17"),
    "resnet18 96x96": ModelConfig(
        Named("resnet18"),
        Named("simple", {"deconv_channels": [64, 64, 64]}),
        skeleton="coco17",
        input=InputConfig(height=96, width=96),
    ),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FPS = 25.0
"""Of the video; nothing depends on it."""


def film(path: Path, frames: int, size: Sequence[int], persons: int) -> Path:
    """Write a video of persons who walk to the right, and beside it their boxes, whose path is returned."""
    height, width = size
    ground, walkers, boxes = np.zeros((height, width, 3), np.uint8), [], []
    for seed in range(persons + 1):
        scene = draw_scene(np.random.default_rng(seed), height)
        picture, labels = render(scene)
        picture = np.clip(picture, 0, 255).astype(np.uint8)
        if seed == persons:
            ground = np.ascontiguousarray(np.tile(picture, (1, -(-width // height), 1))[:, :width])
            continue
        number = max((person.number for person in scene.people), key=lambda n: int((labels // PERSON == n).sum()))
        rows, columns = (np.flatnonzero((labels // PERSON == number).any(axis)) for axis in (1, 0))
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        walkers.append((picture[window], (labels // PERSON == number)[window], int(rows[0])))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (width, height))
    for frame in range(frames):
        canvas = ground.copy()
        for place, (person, mask, top) in enumerate(walkers):
            tall, wide = mask.shape
            left = (place * 97 + 3 * frame) % max(1, width - wide)
            canvas[top : top + tall, left : left + wide][mask] = person[mask]
            boxes.append({"image_id": frame, "bbox": [left, top, wide, tall], "score": 1.0})
        writer.write(cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR))
    writer.release()
    listed = path.with_suffix(".json")
    listed.write_text(json.dumps(boxes))
    return listed


def cut_out(model: PoseModel, video: Path, boxes: Path, batch_size: int) -> list[CropBatch]:
    """The crops that `predict` makes of the video."""
    of_frame: dict[int, list[list[float]]] = {}
    for record in json.loads(boxes.read_text()):
        of_frame.setdefault(record["image_id"], []).append(record["bbox"])
    crops = [
        crop
        for frame in VideoReader(video).frames()
        if frame.image is not None
        for crop in _crops(model, frame.image, np.array(of_frame[frame.index], dtype=float), frame.index)
    ]
    return [collate(crops[first : first + batch_size]).to(DEVICE) for first in range(0, len(crops), batch_size)]


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """On the wall, and of the processor."""
    started, used = time.perf_counter(), time.process_time()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--persons", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="height and width of the frames")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), help="of torch")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="4 frames of 96x128, the small network, one round")
    parser.add_argument("--json", action="store_true", help="print the JSON lines only")
    args = parser.parse_args()
    if args.quick:
        args.frames, args.size, args.threads, args.rounds = 4, (96, 128), [1], 1
        args.networks = ["resnet18 96x96"]

    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder, "walk.mp4")
        boxes = film(video, args.frames, args.size, args.persons)
        config = PredictConfig("random", str(video), str(Path(folder, "drawn")), str(boxes), joint_threshold=-100.0)
        for name in args.networks:
            torch.manual_seed(0)
            model = build_model(NETWORKS[name]).to(DEVICE).eval()
            batches = cut_out(model, video, boxes, config.batch_size)

            finding = 0.0

            def timed(*given: Any) -> Any:
                nonlocal finding
                started = time.perf_counter()
                found = predict_batch(*given)
                finding += time.perf_counter() - started
                return found

            predict.predict_batch = timed

            def ours(model: PoseModel = model) -> None:
                source = open_source(config)
                poses = sum(len(finished.results) for finished in predicted(config, source, model, None))
                source.close()
                if poses != args.frames * args.persons:
                    raise SystemExit(f"{poses} poses on {args.frames} frames")

            def peer(model: PoseModel = model, batches: list[CropBatch] = batches) -> None:
                for batch in batches:
                    forward_crops(model, batch, config.decoding)

            for threads in args.threads:
                torch.set_num_threads(threads)
                forward_crops(model, batches[0], config.decoding)
                finding = 0.0
                rounds = [(seconds(ours), seconds(peer)) for _ in range(args.rounds)]
                busy = finding / sum(one[0][0] for one in rounds)
                wall, cpu = (
                    [args.frames / min(one[side][clock] for one in rounds) for side in (0, 1)] for clock in (0, 1)
                )
                if not args.json:
                    print(f"{name}, {threads} threads: {wall[0]:.1f} frames/s, the network alone {wall[1]:.1f}")
                setting = {"network": name, "threads": threads, "frames": args.frames, "persons": args.persons}
                figures = {"ours": wall[0], "peer": wall[1], "ratio": wall[0] / wall[1]}
                figures |= {"busy": busy, "cpu_ratio": cpu[0] / cpu[1]}
                device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
                line = {"benchmark": "video", "unit": "frames/s", **figures, **setting, "size": list(args.size)}
                print(json.dumps({**line, "batch_size": config.batch_size, "device": device}))


if __name__ == "__main__":
    main()
