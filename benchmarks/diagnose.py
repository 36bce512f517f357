"""`evaluation diagnose` of a problem of COCO val's size against pycocotools' one evaluation of the files, images/s.

    python benchmarks/diagnose.py [--images 5000] [--persons 6352] [--poses 63520] [--rounds 2] [--json]

Ours reads, checks and diagnoses, charts included: some thirty matchings. The peer reads, evaluates and accumulates
once. Both come to the same AP. One thread each; seconds are of the CPU, without waiting for others.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages belong to the checkout, not to the package
from evaluation.config import DiagnoseConfig
from evaluation.diagnose import main as diagnose
from poserelay.keypoints import load_skeleton

SIDE = 500


def write_problem(folder: Path, images: int, persons: int, poses: int) -> tuple[str, str]:
    """Annotations and predictions: poses near the persons with every kind of error, the others anywhere."""
    rng = np.random.default_rng(0)
    skeleton = load_skeleton("coco17")
    joints = len(skeleton.joints)
    # As in COCO val, half of the images show nobody and a few show a dozen.
    image_of = rng.integers(0, max(1, images // 2), persons) * 2
    size = rng.uniform(30, 200, persons)
    body = rng.uniform(-0.5, 0.5, (persons, joints, 2)) * size[:, None, None]
    places = (rng.uniform(0, SIDE, (persons, 1, 2)) + body).clip(1, SIDE - 1)
    visible = rng.choice([0, 1, 2], (persons, joints), p=[0.4, 0.1, 0.5])
    visible[:, 0] = 2
    low, high = places.min(1), places.max(1)
    annotations = [
        {
            "id": row + 1,
            "image_id": int(image_of[row]),
            "category_id": 1,
            "iscrowd": 0,
            "keypoints": np.column_stack([places[row] * (visible[row] > 0)[:, None], visible[row]]).ravel().tolist(),
            "num_keypoints": int((visible[row] > 0).sum()),
            "bbox": [*low[row].tolist(), *(high - low)[row].tolist()],
            "area": float(0.53 * np.prod((high - low)[row])),
        }
        for row in range(persons)
    ]
    # A third of the poses of somebody, the others of nobody.
    somebody = rng.integers(0, persons, poses // 3)
    noise = rng.normal(0, 0.06, (len(somebody), joints, 2)) * rng.choice([0.3, 1, 5], (len(somebody), joints, 1))
    near = places[somebody] + noise * size[somebody, None, None]
    turned = rng.random(len(somebody)) < 0.1
    near[turned] = near[turned][:, list(skeleton.flip_index)]
    nobody = rng.uniform(0, SIDE, (poses - len(somebody), 1, 2)) + rng.uniform(
        -60, 60, (poses - len(somebody), joints, 2)
    )
    keypoints = np.concatenate([near, nobody]).round(2)
    where = np.concatenate([image_of[somebody], rng.integers(0, images, len(nobody))])
    scores = np.concatenate([rng.beta(4, 2, len(somebody)), rng.beta(2, 5, len(nobody))]).round(4)
    triples = np.concatenate([keypoints, np.ones((poses, joints, 1))], axis=2).reshape(poses, -1)
    results = [
        {"image_id": int(image), "category_id": 1, "keypoints": triple, "score": score}
        for image, triple, score in zip(where, triples.tolist(), scores.tolist(), strict=True)
    ]
    pictures = [
        {"id": number, "file_name": f"{number:012}.jpg", "width": SIDE, "height": SIDE} for number in range(images)
    ]
    category = {"id": 1, "name": "person", "keypoints": list(skeleton.joints), "skeleton": []}
    truth: dict[str, Any] = {"images": pictures, "annotations": annotations, "categories": [category]}
    paths = folder / "annotations.json", folder / "predictions.json"
    for path, value in zip(paths, (truth, results), strict=True):
        path.write_text(json.dumps(value), encoding="utf-8")
    return str(paths[0]), str(paths[1])


def peer(annotations: str, predictions: str) -> float:
    """pycocotools' AP."""
    truth = COCO(annotations)
    evaluation: Any = COCOeval(truth, truth.loadRes(predictions), "keypoints")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--persons", type=int, default=6352)
    parser.add_argument("--poses", type=int, default=63_520)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    args = parser.parse_args()
    torch.set_num_threads(1)

    seconds: dict[str, list[float]] = {"ours": [], "numbers alone": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        annotations, predictions = write_problem(Path(folder), args.images, args.persons, args.poses)
        found = 0.0, 0.0
        for _ in range(args.rounds):
            with contextlib.redirect_stdout(io.StringIO()):
                start = time.process_time()
                found = diagnose(DiagnoseConfig(annotations, predictions))["metrics"]["AP"], 0.0
                middle = time.process_time()
                diagnose(DiagnoseConfig(annotations, predictions, out=f"{folder}/out"))
                end = time.process_time()
                found = found[0], peer(annotations, predictions)
                seconds["peer"].append(time.process_time() - end)
            seconds["numbers alone"].append(middle - start)
            seconds["ours"].append(end - middle)
    if abs(found[0] - found[1]) > 1e-12:
        raise SystemExit(f"the two disagree on AP: {found}")
    best = {name: min(taken) for name, taken in seconds.items()}
    if not args.json:
        print(", ".join(f"{name} {value:.2f} s" for name, value in best.items()))
    line = {
        "benchmark": "diagnose",
        "unit": "images/s",
        "ours": round(args.images / best["ours"], 1),
        "peer": round(args.images / best["peer"], 1),
        "ratio": float(f"{best['peer'] / best['ours']:.3g}"),
        "seconds": round(best["ours"], 2),
        "images": args.images,
        "persons": args.persons,
        "poses": args.poses,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
