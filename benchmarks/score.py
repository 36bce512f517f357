"""`evaluation score` of a problem of COCO val's size against pycocotools' own loading, evaluation and accumulation.

    python benchmarks/score.py [--images 5000] [--persons 6352] [--poses 10] [--metrics oks pck] [--rounds 3] [--json]

Both sides start from the same two JSON files: persons of random joints in half of the images, and on every image as
many poses, near its persons or of nobody. Ours is the whole command: both files are read and checked, and the metrics
and the protocol printed. Seconds are the process's own, one thread each. A line for each of `--metrics`, the peer's
figures the same in all; the script stops where the two disagree on a figure.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages belong to the checkout, not to the package
from evaluation.config import ScoreConfig
from evaluation.score import main as score
from poserelay.keypoints import load_skeleton

JOINTS = 17


def write_problem(folder: Path, images: int, persons: int, poses: int) -> tuple[Path, Path]:
    """Annotations of `persons` and results of `images` times `poses`, COCO's 17 joints each."""
    rng = np.random.default_rng(0)
    shown = rng.permutation(images)[: max(1, images // 2)]
    image_of = np.sort(np.concatenate([shown, rng.choice(shown, max(0, persons - len(shown)))])[:persons])
    size = np.exp(rng.uniform(np.log(30), np.log(400), len(image_of)))
    corner = rng.uniform(0, 240, (len(image_of), 2))
    joints = corner[:, None] + rng.random((len(image_of), JOINTS, 2)) * size[:, None, None]
    visibility = rng.choice(3, (len(image_of), JOINTS), p=(0.35, 0.1, 0.55))
    records = [
        {
            "id": number,
            "image_id": int(image),
            "category_id": 1,
            "iscrowd": 0,
            "bbox": [*place.tolist(), float(side), float(side)],
            "area": float(side**2 / 2),
            "num_keypoints": int((seen > 0).sum()),
            "keypoints": np.column_stack([at * (seen > 0)[:, None], seen]).ravel().tolist(),
        }
        for number, (image, place, side, at, seen) in enumerate(
            zip(image_of, corner, size, joints, visibility, strict=True), 1
        )
    ]
    results = []
    for image in range(images):
        its = np.flatnonzero(image_of == image)
        for number in range(poses):
            near = number < 2 * len(its)
            person = its[number % len(its)] if near else None
            at = rng.uniform(0, 480, (JOINTS, 2)) if person is None else joints[person]
            spread = 1.0 if person is None else size[person] * rng.uniform(0.01, 0.08)
            placed = np.column_stack([at + rng.normal(0, spread, at.shape), rng.random(JOINTS)])
            score_of_pose = float(rng.uniform(0.2, 1.0) if near else rng.uniform(0.0, 0.4))
            results.append(
                {"image_id": image, "category_id": 1, "keypoints": placed.ravel().tolist(), "score": score_of_pose}
            )
    pictures = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 640, "height": 480} for n in range(images)]
    category = {"id": 1, "name": "person", "keypoints": list(load_skeleton("coco17").joints), "skeleton": []}
    truth, predictions = folder / "truth.json", folder / "results.json"
    truth.write_text(json.dumps({"images": pictures, "annotations": records, "categories": [category]}))
    predictions.write_text(json.dumps(results))
    return truth, predictions


def pycocotools_stats(truth: Path, predictions: Path) -> list[float]:
    """What a script of COCO's own tools does, of the 20 best poses of an image."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth: Any = COCO(str(truth))
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(str(predictions)), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def seconds_of(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--persons", type=int, default=6352)
    parser.add_argument("--poses", type=int, default=10)
    parser.add_argument("--metrics", nargs="+", default=["oks", "all"], choices=["oks", "pck", "recall", "all"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="only the JSON lines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_problem(Path(folder), args.images, args.persons, args.poses)
        truth, predictions = map(str, files)

        def ours(metric: Any) -> dict[str, Any]:
            with contextlib.redirect_stdout(io.StringIO()):
                return score(ScoreConfig(truth, predictions, metric))

        expected = pycocotools_stats(*files)
        turns = []
        for _ in range(args.rounds):
            taken = {metric: seconds_of(lambda metric=metric: ours(metric)) for metric in args.metrics}
            turns.append(taken | {"pycocotools": seconds_of(lambda: pycocotools_stats(*files))})
        best = {name: min(turn[name] for turn in turns) for name in turns[0]}
        for metric in args.metrics:
            figures = list(ours(metric)["metrics"].values())
            if metric in ("oks", "all") and figures[: len(expected)] != expected:
                raise SystemExit(f"{metric}: {figures[: len(expected)]} where pycocotools has {expected}")
            if not args.json:
                print(f"{metric}: {best[metric]:.2f} s where pycocotools alone takes {best['pycocotools']:.2f} s")
            line = {
                "benchmark": f"score_{metric}",
                "unit": "s",
                "ours": round(best[metric], 3),
                "peer": round(best["pycocotools"], 3),
                "ratio": round(best[metric] / best["pycocotools"], 3),
                "images": args.images,
                "persons": args.persons,
                "poses": args.images * args.poses,
            }
            print(json.dumps(line))


if __name__ == "__main__":
    main()
