"""A pretraining step: the stage's `training_step` against the bare forward and backward of the same modules.

    python benchmarks/pretrain_step.py [--method mscl|simsiam|moco|densecl] [--backbone resnet50] [--size 224]
        [--batch 64] [--precision bf16|fp32] [--compile] [--rounds 5] [--json]

`ours` is the whole step on uint8 views on the device: normalisation, both forwards, the losses, the backward, the
figures of the monitor, SGD and what the method does after it. `peer` is the same networks on ready views under a dummy
loss (the sum of all outputs), forward and backward, compiled and in channels_last just as ours. Beside it stand the
backbone alone and, for simsiam, lightly's own example loop (its modules over torchvision's network, neither compiled
nor channels_last nor in lower precision). Pictures per second, each seen in two views; the best of rounds in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages belong to the checkout, not to the package
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.distributed import start
from poserelay.model import build_backbone
from pretrain.config import OptimConfig, PretrainConfig, PretrainDataConfig
from pretrain.train import METHODS, build_optimizer, training_step, wrap


class LightlySimSiam(nn.Module):
    """The model of lightly's SimSiam example, over torchvision's network."""

    def __init__(self, name: str) -> None:
        super().__init__()
        network: Any = getattr(torchvision.models, name)()
        channels = network.fc.in_features
        self.backbone = nn.Sequential(*list(network.children())[:-1])
        self.projection_head = SimSiamProjectionHead(channels, 2048, 2048)
        self.prediction_head = SimSiamPredictionHead(2048, 512, 2048)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z.detach(), self.prediction_head(z)


def our_step(fabric: Any, config: PretrainConfig, views: Tensor) -> tuple[Callable[[], object], Any, Any]:
    """The stage's step on uint8 views `[2, B, 3, S, S]`, the method, and the network as the stage calls it."""
    backbone = build_backbone(config.model.backbone)
    method = METHODS[config.method.name](backbone, backbone.channels, **config.method.kwargs).to(fabric.device)
    network = wrap(fabric, method, config)
    optimizer = fabric.setup_optimizers(build_optimizer(method, config.optim, 0.01))
    return lambda: training_step(fabric, network, method, optimizer, views, config), method, network


def bare_step(module: Any, inputs: tuple[Tensor, ...], autocast: Callable[[], Any]) -> Callable[[], object]:
    """Forward and backward of a module under the sum of its outputs."""

    def step() -> None:
        with autocast():
            loss = sum(output.float().sum() for output in tree_leaves(module(*inputs)) if output.requires_grad)
        module.zero_grad()
        loss.backward()  # pyright: ignore[reportAttributeAccessIssue]

    return step


def lightly_step(name: str, views: Tensor) -> Callable[[], object]:
    """A step of lightly's example on normalised views `[2, B, 3, S, S]`."""
    model = LightlySimSiam(name).to(views.device)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    def step() -> None:
        z0, p0 = model(views[0])
        z1, p1 = model(views[1])
        loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
        loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def pictures_per_second(
    steps: dict[str, Callable[[], object]], batch: int, rounds: int, cuda: bool
) -> dict[str, float]:
    """The best rate of each step, taken in turns after two warm-up calls each."""
    seconds = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 2):
        for name, step in steps.items():
            repeats = 10 if cuda and number >= 2 else 1
            started = time.perf_counter()
            for _ in range(repeats):
                step()
            if cuda:
                torch.cuda.synchronize()
            if number >= 2:
                seconds[name] = min(seconds[name], (time.perf_counter() - started) / repeats)
    return {name: batch / best for name, best in seconds.items()}


def matmul_ceiling(dtype: torch.dtype) -> float:
    """Multiply-adds per second of a large matrix product on the GPU."""
    size = 8192
    a, b = torch.randn(2, size, size, device="cuda", dtype=dtype)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return size**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(METHODS), default="mscl")
    parser.add_argument("--backbone", default="resnet50", help="a name that torchvision has too")
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels")
    parser.add_argument("--batch", type=int, default=64, help="pictures per step, each in two views")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    fabric = start("auto", args.precision, 0)
    cuda = fabric.device.type == "cuda"
    torch.manual_seed(0)

    crop = InputConfig(height=args.size, width=args.size)
    model = ModelConfig(Named(args.backbone), input=crop)
    optim = OptimConfig(batch_size=args.batch)
    config = PretrainConfig(
        model, "unused", PretrainDataConfig("unused"), Named(args.method), optim=optim, compile=args.compile
    )
    raw = torch.randint(0, 256, (2, args.batch, 3, args.size, args.size), dtype=torch.uint8, device=fabric.device)
    ready = torch.randn(2, args.batch, 3, args.size, args.size, device=fabric.device)
    views = tuple(view.to(memory_format=torch.channels_last) for view in ready) if cuda else tuple(ready)

    step, method, network = our_step(fabric, config, raw)
    bare: Any = torch.compile(method.backbone) if args.compile else method.backbone
    steps = {
        "ours": step,
        "peer": bare_step(network, views, fabric.autocast),
        "backbone": bare_step(bare, (torch.cat(views),), fabric.autocast),
    }
    if args.method == "simsiam":
        steps["lightly"] = lightly_step(args.backbone, ready)
    rates = pictures_per_second(steps, args.batch, args.rounds, cuda)
    line: dict[str, Any] = {
        "benchmark": "pretrain_step",
        "method": args.method,
        "ours": rates["ours"],
        "peer": rates["peer"],
        "ratio": rates["ours"] / rates["peer"],
        "unit": "pictures per second, two views each",
        "backbone": rates["backbone"],
        "ratio_to_backbone": rates["ours"] / rates["backbone"],
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
    }
    if "lightly" in rates:
        line |= {"lightly": rates["lightly"], "ratio_to_lightly": rates["ours"] / rates["lightly"]}
    if cuda:
        with FlopCounterMode(display=False) as counter:
            step()
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        share = counter.get_total_flops() / 2 / args.batch * rates["ours"] / matmul_ceiling(dtype)
        line |= {"share_of_matmul": share, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    if not args.json:
        print("pictures/s: " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
