"""ICON's losses, forward and backward: against a loop over the joints, as the batch grows, and in a training step.

    python benchmarks/icon.py [--sampler hard] [--batches 16 128 512] [--joints 17 68] [--rounds 2] [--json]

`ours` and `peer` are SKCC and PRCC of `--peer_batch` persons under the sampler "all", which a loop can repeat: the
peer takes one query after the other, its positives and negatives as vectors. `grid` holds milliseconds and the peak of
the tensors' memory beside the embeddings. `share` is that of `icon_loss` at `--loss_batch`, sampling of the embeddings
and hardness included, in a training step of SimpleBaseline (forward, MSE, backward, Adam); `head_share` that of the
projection head. On the CPU the step is timed at `--step_batch` persons and multiplied up, as the JSON line says. The
best of rounds in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages belong to the checkout, not to the package
from poserelay import load_skeleton
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.losses import joints_mse
from poserelay.model import build_model
from semi.icon import ProjectionHead, icon_loss, prcc_loss, skcc_loss

CHANNELS, TAU = 256, 0.07
SKELETON = load_skeleton("coco17")
PAIRS = [SKELETON.indices(pair) for pair in SKELETON.prcc_pairs]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pairs_of(joints: int) -> list[list[int]]:
    """COCO's 8 pairs, again for each further 17 joints."""
    return [[joint + start for joint in pair] for start in range(0, joints - 16, 17) for pair in PAIRS]


def scene(batch: int, joints: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings with a gradient, which joints are visible, and their hardness."""
    generator = torch.Generator().manual_seed(0)
    embeddings = normalize(torch.randn(batch, joints, CHANNELS, generator=generator), dim=-1)
    visible = torch.rand(batch, joints, generator=generator) < 0.8
    hardness = torch.randn(batch, joints, generator=generator)
    return embeddings.to(DEVICE).requires_grad_(), visible.to(DEVICE), hardness.to(DEVICE)


def loop_loss(embeddings: Tensor, valid: Tensor) -> Tensor:
    """Eq. 1 with the sampler "all", one query after the other."""
    means = []
    for row, category in valid.nonzero().tolist():
        query = embeddings[row, category]
        positive, negative = valid[:, category].clone(), valid.clone()
        positive[row] = False
        negative[:, category] = False
        if not positive.any() or not negative.any():
            continue
        against = (embeddings[negative] @ query / TAU).exp().sum()
        alike = (embeddings[positive, category] @ query / TAU).exp()
        means.append(-(alike / (alike + against)).log().mean())
    return torch.stack(means).mean()


def ours(embeddings: Tensor, valid: Tensor) -> Tensor:
    return skcc_loss(embeddings, valid, tau=TAU) + prcc_loss(embeddings, valid, PAIRS, tau=TAU)


def peer(embeddings: Tensor, valid: Tensor) -> Tensor:
    first, second = ([pair[end] for pair in PAIRS] for end in (0, 1))
    pairs = normalize((embeddings[:, first] + embeddings[:, second]) / 2, dim=-1)
    return loop_loss(embeddings, valid) + loop_loss(pairs, valid[:, first] & valid[:, second])


def best_seconds(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of each step, taken in turns after a warm-up call each."""
    best = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 1):
        for name, step in steps.items():
            wait()
            started = time.perf_counter()
            step()
            wait()
            if number:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_mib(step: Callable[[], object]) -> float:
    """Peak memory of the tensors that a step makes."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    profiler: Any = profile(profile_memory=True)
    with profiler:
        step()
    events = profiler.kineto_results.events()
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(sizes, key=itemgetter(0)))) / 2**20


def grid_point(batch: int, joints: int, sampler: Any, rounds: int) -> dict[str, float]:
    """Time and memory of both losses under a sampler."""
    embeddings, visible, hardness = scene(batch, joints)
    pairs = pairs_of(joints)

    def step() -> None:
        skcc = skcc_loss(embeddings, visible, tau=TAU, sampler=sampler, hardness=hardness)
        prcc = prcc_loss(embeddings, visible, pairs, tau=TAU, sampler=sampler)
        torch.autograd.grad(skcc + prcc, embeddings)

    seconds = best_seconds({"losses": step}, rounds)["losses"]
    return {"batch": batch, "joints": joints, "ms": round(1000 * seconds, 1), "peak_mib": round(peak_mib(step), 1)}


def shares(backbone: str, size: Sequence[int], step_batch: int, loss_batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of a training step, of the projection head and of `icon_loss`, for `loss_batch` persons."""
    if DEVICE.type == "cuda":
        step_batch = loss_batch
    height, width = size
    crop = InputConfig(height=height, width=width)
    model = build_model(ModelConfig(Named(backbone), Named("simple"), skeleton="coco17", input=crop)).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters())
    head = ProjectionHead(model.backbone.channels[2], CHANNELS).to(DEVICE)
    images = torch.randn(step_batch, 3, height, width, device=DEVICE)
    with torch.no_grad():
        contrasted = model.backbone(images)[2]
    targets = torch.rand(loss_batch, 17, *model.heatmap_size, device=DEVICE)
    predicted = torch.rand_like(targets)
    maps = normalize(torch.randn(loss_batch, CHANNELS, *contrasted.shape[-2:], device=DEVICE), dim=1).requires_grad_()
    places = torch.rand(loss_batch, 17, 2, device=DEVICE) * torch.tensor([width / 16, height / 16], device=DEVICE)
    _, visible, _ = scene(loss_batch, 17)
    generator = torch.Generator().manual_seed(0)

    def train() -> None:
        heatmaps = model(images)
        loss = joints_mse(heatmaps, targets[:step_batch], torch.ones(step_batch, 17, device=DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def project() -> None:
        taken = contrasted.requires_grad_()
        torch.autograd.grad(head(taken).sum(), [taken, *head.parameters()])

    def contrast() -> None:
        loss = icon_loss(maps, places, visible, predicted, targets, PAIRS, radius=0.5, generator=generator).total
        torch.autograd.grad(loss, maps)

    seconds = best_seconds({"step": train, "head": project, "loss": contrast}, rounds)
    step, projection = (seconds[name] * loss_batch / step_batch for name in ("step", "head"))
    return {
        "share": seconds["loss"] / step,
        "head_share": projection / step,
        "loss_ms": round(1000 * seconds["loss"], 1),
        "step_ms": round(1000 * step, 1),
        "step_is": "measured"
        if step_batch == loss_batch
        else f"extrapolated from {step_batch} to {loss_batch} persons",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_batch", type=int, default=16, help="persons, ours against the loop")
    parser.add_argument("--sampler", choices=("all", "random", "hard"), default="hard", help="of the grid")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--joints", type=int, nargs="+", default=[17, 68], help="multiples of 17")
    parser.add_argument("--backbone", default="resnet50", help="of the training step")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 192), help="of its crops, height and width")
    parser.add_argument("--step_batch", type=int, default=8, help="persons of the step on the CPU")
    parser.add_argument("--loss_batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    embeddings, visible, _ = scene(args.peer_batch, 17)
    if not torch.allclose(ours(embeddings, visible), peer(embeddings, visible), rtol=1e-4):
        raise SystemExit("the loop and the losses disagree")
    both = {
        "ours": lambda: torch.autograd.grad(ours(embeddings, visible), embeddings),
        "peer": lambda: torch.autograd.grad(peer(embeddings, visible), embeddings),
    }
    seconds = best_seconds(both, args.rounds)
    grid = [grid_point(batch, joints, args.sampler, args.rounds) for joints in args.joints for batch in args.batches]
    line = {
        "benchmark": "icon",
        "unit": f"SKCC + PRCC of {args.peer_batch} persons per second, forward and backward",
        "ours": 1 / seconds["ours"],
        "peer": 1 / seconds["peer"],
        "ratio": seconds["peer"] / seconds["ours"],
        **shares(args.backbone, args.size, args.step_batch, args.loss_batch, args.rounds),
        "grid": grid,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu, 1 thread",
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
    }
    if not args.json:
        milliseconds = [1000 * seconds[name] for name in ("ours", "peer")]
        print("{} persons of 17 joints, all: {:.1f} ms, in a loop {:.1f} ms".format(args.peer_batch, *milliseconds))
        for point in grid:
            print("{batch:4} persons of {joints} joints: {ms} ms, {peak_mib} MiB".format(**point))
        print(
            f"{args.loss_batch} persons: {line['loss_ms']} ms of a step of {line['step_ms']} ms ({line['step_is']}), "
            f"{100 * line['share']:.2f} %; projection head {100 * line['head_share']:.2f} %"
        )
    print(json.dumps(line))


if __name__ == "__main__":
    main()
