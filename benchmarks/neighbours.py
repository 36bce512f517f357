"""kNN classification of embeddings: `poserelay.neighbours.knn_classify` against lightly's `knn_predict`, queries/s.

    python benchmarks/neighbours.py [--bank 50000] [--queries 512] [--classes 1000] [--json]

The peer runs as lightly's KNNClassifier does, in batches of 256 against the whole bank. Vectors are random; one thread
each. The text also says how fast ours is without faiss.
"""

from __future__ import annotations

import argparse
import json
import timeit

import torch
from lightly.utils.benchmarking.knn import knn_predict
from torch.nn.functional import normalize

from poserelay.neighbours import Backend, knn_classify

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--neighbours", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    args = parser.parse_args()
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(0)
    bank = normalize(torch.randn(args.bank, args.dimensions, generator=generator), dim=1)
    queries = normalize(torch.randn(args.queries, args.dimensions, generator=generator), dim=1)
    labels = torch.randint(0, args.classes, (args.bank,), generator=generator)

    def ours(backend: Backend = "auto") -> torch.Tensor:
        return knn_classify(bank, labels, queries, classes=args.classes, k=args.neighbours, backend=backend)

    def peer() -> torch.Tensor:
        batches = (knn_predict(q, bank.T, labels, args.classes, args.neighbours, 0.07) for q in queries.split(BATCH))
        return torch.cat([batch[:, 0] for batch in batches])

    # votes of random vectors are close, and lightly's similarities are rounded to float32
    if (ours() == peer()).double().mean() < 0.99 or not torch.equal(ours(), ours("torch")):
        raise SystemExit("the two disagree on the classes")
    turns = [[timeit.timeit(run, number=1) for run in (ours, peer, lambda: ours("torch"))] for _ in range(args.repeats)]
    ours_seconds, peer_seconds, torch_seconds = (min(seconds) for seconds in zip(*turns, strict=True))
    line = {
        "benchmark": "knn_classify",
        "unit": "queries/s",
        "ours": round(args.queries / ours_seconds, 1),
        "peer": round(args.queries / peer_seconds, 1),
        "ratio": round(peer_seconds / ours_seconds, 2),
        "bank": args.bank,
        "neighbours": args.neighbours,
    }
    if not args.json:
        print(f"ours without faiss: {args.queries / torch_seconds:.1f} queries/s")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
