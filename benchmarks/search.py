"""SCIO's local search of all persons and groups at once: against one by one, and beside what the networks cost.

    python benchmarks/search.py [--threads 1] [--persons 64] [--steps 50] [--rounds 2] [--quick] [--json]

COCO's 17 joints and 6 groups, maps of 64x48, f of 256 channels, networks of random weights in eval mode; fp32. Four
JSON lines, `ours` and `peer` in seconds, each the best of rounds in turns:

- one_by_one: the search, against searching person by person and group by group with that group's networks cut out.
  `ratio` is peer / ours. On the CPU the peer searches for `--peer_persons` and is multiplied up, as the line says.
- forwards: the search, against as many calls of `SCIO.verify` with all persons as it has steps. `ratio` is ours / peer.
- base: the search per person, against the forward of SimpleBaseline without flip test per person. Ours / peer.
- linear: twice the steps, against the steps. Ours / peer.

First both ways of searching are compared in float64, where they must agree. With `--threads 1` the seconds on the CPU
are those of the thread, without its waiting for other programs.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from poserelay.config import DistalJoints, InputConfig, ModelConfig, Named
from poserelay.heads import SCIO
from poserelay.heatmaps import render
from poserelay.local_search import Search, SelfConstraint, search_distal
from poserelay.model import build_model

STRIDE, GROUPS = 4, 6
SEARCH = DistalJoints()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Scene(NamedTuple):
    """Persons: their heatmaps `[B, K, h, w]`, f `[B, C, h, w]` and where the distal joints start `[B, G, 2]`."""

    maps: Tensor
    features: Tensor
    start: Tensor


def cut_out(networks: SCIO, group: int) -> SCIO:
    """The networks of one group alone."""
    joints = networks.get_buffer("joints")[group].tolist()
    one = SCIO(networks.verification.reduce.in_channels, [joints]).to(networks.distal.device)
    # Of every tensor but the batch norms' counts the first dimension is G times something.
    one.load_state_dict(
        {name: value.chunk(GROUPS)[group] if value.ndim else value for name, value in networks.state_dict().items()}
    )
    return one.eval()


def search_all(networks: SCIO, scene: Scene, steps: int) -> Search:
    constraint = SelfConstraint(networks, scene.maps, scene.features)
    return search_distal(constraint, scene.start, replace(SEARCH, steps=steps), STRIDE)


def search_each(singles: list[SCIO], scene: Scene, steps: int) -> Tensor:
    """The traces `[steps + 1, B, G, 2]` of one search after the other, with the networks of each group."""
    persons = []
    for maps, features, start in zip(*(tensor.split(1) for tensor in scene), strict=True):
        alone = [Scene(maps, features, of_group) for of_group in start.split(1, 1)]
        traces = [search_all(one, scene, steps).positions for one, scene in zip(singles, alone, strict=True)]
        persons.append(torch.cat(traces, 2))
    return torch.cat(persons, 1)


def check(networks: SCIO, scene: Scene, steps: int) -> float:
    """Share of the points that moved, of two persons in float64; SystemExit where the two ways disagree."""
    networks = copy.deepcopy(networks).double()
    singles = [cut_out(networks, group).double() for group in range(GROUPS)]
    scene = Scene(*(tensor[:2].double() for tensor in scene))
    found = search_all(networks, scene, steps)
    difference = float((found.positions - search_each(singles, scene, steps)).abs().max())
    if difference > 1e-9:
        raise SystemExit(f"in float64 the search of all and one by one differ by {difference} pixels")
    return float((found.xy != scene.start).any(-1).double().mean())


def best_seconds(
    calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Of each call, taken in turns so that a busy machine hits all."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            started = clock()
            call()
            wait()
            best[name] = min(best[name], clock() - started)
    return best


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--persons", type=int, default=64)
    parser.add_argument("--peer_persons", type=int, default=4, help="searched one by one on the CPU; on a GPU all are")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--backbone", default="resnet50", help="of the base network")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 192), help="of its crops, height and width")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="4 persons, 10 steps, ResNet-18, 128x96, one round")
    parser.add_argument("--json", action="store_true", help="print the JSON lines only")
    args = parser.parse_args()
    if args.quick:
        args.persons, args.steps, args.backbone, args.size, args.rounds = 4, 10, "resnet18", (128, 96), 1
    persons, steps = args.persons, args.steps
    peer_persons = persons if DEVICE.type == "cuda" else min(args.peer_persons, persons)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    crop = InputConfig(height=args.size[0], width=args.size[1])
    config = ModelConfig(Named(args.backbone), Named("simple"), Named("scio"), skeleton="coco17", input=crop)
    model = build_model(config).to(DEVICE).eval()
    networks = model.refiner
    assert networks is not None
    # As they are initialised they answer with next to nothing, wherever the joint is.
    nn.init.normal_(networks.verification.to_heatmap.weight, std=0.05)
    height, width = model.heatmap_size
    joints = torch.rand(persons, 17, 2, device=DEVICE) * torch.tensor([width - 1, height - 1], device=DEVICE)
    maps = render(joints, (height, width), networks.sigma)
    features = torch.randn(persons, networks.verification.reduce.in_channels, height, width, device=DEVICE)
    images = torch.randn(persons, 3, *args.size, device=DEVICE)
    scene = Scene(maps, features, joints[:, networks.distal])
    moved = check(networks, scene, steps)

    singles = [cut_out(networks, group) for group in range(GROUPS)]
    few = Scene(*(tensor[:peer_persons] for tensor in scene))
    together = search_all(networks, scene, steps).positions[:, :peer_persons]
    apart = (together - search_each(singles, few, steps)).abs().amax((0, -1))
    calls = {
        "search": lambda: search_all(networks, scene, steps),
        "one_by_one": lambda: search_each(singles, few, steps),
        "forwards": lambda: [networks.verify(maps, maps[:, networks.distal], features) for _ in range(steps)],
        "base": lambda: model(images),
        "twice": lambda: search_all(networks, scene, 2 * steps),
    }
    clock = time.process_time if DEVICE.type == "cpu" and args.threads == 1 else time.perf_counter
    seconds = best_seconds(calls, args.rounds, clock)
    search, one_by_one = seconds["search"], seconds["one_by_one"] * persons / peer_persons
    searches = [GROUPS * number for number in (peer_persons, persons)]
    setting = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, threads: {args.threads}",
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
    }
    lines = {
        "one_by_one": {
            "ours": search,
            "peer": one_by_one,
            "ratio": one_by_one / search,
            "peer_is": "measured"
            if peer_persons == persons
            else "extrapolated from {} to {} searches".format(*searches),
            "moved_share": round(moved, 3),
            "float32_agreement": round(float((apart < 1e-3).double().mean()), 3),
        },
        "forwards": {"ours": search, "peer": seconds["forwards"], "ratio": search / seconds["forwards"]},
        "base": {"ours": search / persons, "peer": seconds["base"] / persons, "ratio": search / seconds["base"]},
        "linear": {"ours": seconds["twice"], "peer": search, "ratio": seconds["twice"] / search},
    }
    for name, line in lines.items():
        if not args.json:
            print("{0}: {ours:.4g} s against {peer:.4g} s, ratio {ratio:.2f}".format(name, **line))
        print(json.dumps({"benchmark": "search", "figure": name, "unit": "s", **line, **setting}))


if __name__ == "__main__":
    main()
