"""`evaluation report` of ten runs with diagnosis and galleries, against the diagnosis of the same predictions alone.

    python benchmarks/report.py [--annotations FILE --images DIR] [--runs 10] [--json]

Without annotations people are rendered, 300 pictures. A run has 2,000 logged steps and the labels moved at random as
its predictions. One thread. Starting Python and importing torch is told apart: it is the same for any number of runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages belong to the checkout, not to the package

started = time.perf_counter()

import torch  # noqa: E402

from evaluation.config import ReportConfig  # noqa: E402
from evaluation.report import main as report  # noqa: E402
from evaluation.report_pictures import Looker  # noqa: E402
from poserelay.datasets.coco import CocoAnnotations, read_coco  # noqa: E402
from poserelay.synthesize import SynthesizeConfig  # noqa: E402
from poserelay.synthesize import main as synthesize  # noqa: E402

IMPORTED = time.perf_counter() - started
STEPS = 2000


def write_run(folder: Path, annotations: CocoAnnotations, seed: int) -> str:
    """What training and `evaluation test` leave."""
    rng = np.random.default_rng(seed)
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"# python -m finetune --config THIS_FILE\nseed: {seed % 3}\nlr: {seed // 3}\n")
    losses = np.exp(-np.linspace(0, 3, STEPS)) * rng.uniform(0.9, 1.1, STEPS)
    rows = [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses.tolist())]
    rows += [{"kind": "validation", "step": step, "AP": step / STEPS} for step in range(0, STEPS, 100)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    status = {"stage": "finetune", "state": "done", "step": rows[-1]["step"], "total": rows[-1]["step"]}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "done.json").write_text(json.dumps({"stage": "finetune", "metrics": {}}))
    joints, persons = annotations.joints, annotations.persons
    metrics = {"PCK": 0.5 + seed / 100} | {f"PCK/{joint}": rng.uniform() for joint in joints}
    protocol = {"split": "val", "boxes": "gt", "instances": len(persons)}
    (evaluation / "metrics.json").write_text(json.dumps({"metrics": metrics, "protocol": protocol}))
    moved = annotations.keypoints[persons] + rng.normal(0, 2 + seed, (len(persons), len(joints), 2))
    triples = np.concatenate([moved, np.ones((*moved.shape[:2], 1))], axis=-1).reshape(len(persons), -1)
    images = annotations.image_index[persons]
    records = [
        {"image_id": annotations.image_ids[image], "category_id": annotations.category["id"]}
        | {"keypoints": keypoints, "score": score}
        for image, keypoints, score in zip(images, triples.tolist(), rng.random(len(persons)).tolist(), strict=True)
    ]
    (evaluation / "predictions.json").write_text(json.dumps(records))
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations")
    parser.add_argument("--images")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if args.annotations is None:
            synthesize(SynthesizeConfig(out=str(root / "people"), images=300, seed=0, size=160, workers=1))
        file = args.annotations or str(root / "people" / "annotations.json")
        images = args.images or str(root / "people" / "images")
        annotations = read_coco(file)
        runs = [write_run(root / f"run{seed}", annotations, seed) for seed in range(args.runs)]
        config = ReportConfig(runs, str(root / "report.html"), file, images)

        start = time.perf_counter()
        page = report(config)
        ours = time.perf_counter() - start
        if page.warnings or any(entry.closer.gallery is None for entry in page.entries):
            raise SystemExit(f"the page lacks something: {page.warnings}")
        size = (root / "report.html").stat().st_size

        start = time.perf_counter()
        looker = Looker(config)
        for run in runs:
            looker.diagnosis(looker.results(Path(run) / "evaluation"))
        peer = time.perf_counter() - start

    if not args.json:
        print(f"{args.runs} runs, {len(annotations.persons)} persons each: {ours:.2f} s, a page of {size / 1e6:.1f} MB")
        print(f"reading and diagnosing the same alone: {peer:.2f} s; imports, once: {IMPORTED:.2f} s")
    line = {"benchmark": "report", "ours": round(args.runs / ours, 3), "peer": round(args.runs / peer, 3)}
    setting = {"ratio": round(peer / ours, 3), "unit": "runs/s", "runs": args.runs, "persons": len(annotations.persons)}
    print(json.dumps(line | setting | {"seconds": round(ours, 2), "imports": round(IMPORTED, 2)}))


if __name__ == "__main__":
    main()
