"""SCIO's networks against plain convolutions, its search against a naive one, and what inference makes of both."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poserelay.batch import CropBatch
from poserelay.checkpoint import describe, init_from, write_export
from poserelay.command import to_plain
from poserelay.config import Decoding, DistalJoints, InputConfig, ModelConfig, Named
from poserelay.errors import CheckFailed, UserError
from poserelay.heads.scio import SCIO, GroupNetworks
from poserelay.inference import Poses, predict_batches, predict_crops, suppress, to_results
from poserelay.keypoints import Group, Skeleton, load_skeleton, packaged_skeletons
from poserelay.local_search import BothCrops, SelfConstraint, local_search, mirror_groups, search_distal
from poserelay.model import PoseModel, build_model, load_model

GROUPS = ((0, 1, 2, 6), (3, 2, 1, 7), (5, 4, 0, 8))
SIZE = 14, 12  # (h, w) of the maps


def shaken(networks: SCIO, seed: int) -> SCIO:
    """With batch norms that have seen something, and heatmaps of about 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in networks.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                assert values is not None
                values.data.uniform_(0.5, 1.5, generator=generator)
    for part in (networks.prediction, networks.verification):
        part.to_heatmap.weight.data.normal_(std=0.3, generator=generator)
    return networks.eval()


def networks(seed: int = 0, groups: Sequence[Sequence[int]] = GROUPS, dilations: Sequence[int] = (2, 1)) -> SCIO:
    torch.manual_seed(seed)
    made = SCIO(5, groups, feature_channels=3, width=4, dilations=dilations, sigma=1.5)
    return shaken(made, seed).double()


def inputs(seed: int = 1, persons: int = 3) -> tuple[Tensor, Tensor]:
    """Heatmaps of 9 joints and f."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(persons, 9, *SIZE, generator=generator, dtype=torch.float64)
    return maps, torch.randn(persons, 5, *SIZE, generator=generator, dtype=torch.float64)


def naive(part: GroupNetworks, group: int, heatmaps: Tensor, features: Tensor) -> Tensor:
    """One group's own network on one person: three heatmaps `[3, h, w]` and f `[C, h, w]` to `[h, w]`."""

    def own(rows: Tensor | None, count: int) -> Tensor:
        assert rows is not None
        return rows[group * count : (group + 1) * count]

    def convolution(layer: nn.Conv2d, count: int) -> nn.Conv2d:
        weight = own(layer.weight, count)
        alone = nn.Conv2d(weight.shape[1], count, weight.shape[2:], dilation=layer.dilation, padding=layer.padding)  # pyright: ignore[reportArgumentType]
        alone.weight.data = weight
        alone.bias.data = own(layer.bias, count) if layer.bias is not None else weight.new_zeros(count)  # pyright: ignore[reportOptionalMemberAccess]
        return alone

    width = part.of_heatmaps.weight.shape[0] // part.groups
    reduced = convolution(part.reduce, part.reduce.weight.shape[0] // part.groups)(features[None])
    hidden = convolution(part.of_features, width)(reduced) + convolution(part.of_heatmaps, width)(heatmaps[None])
    for layer in part.layers:
        if isinstance(layer, nn.Conv2d):
            hidden = convolution(layer, width)(hidden)
        elif isinstance(layer, nn.BatchNorm2d):
            mean, variance = own(layer.running_mean, width), own(layer.running_var, width)
            scale, shift = own(layer.weight, width), own(layer.bias, width)
            normed = (hidden - mean[:, None, None]) / (variance[:, None, None] + layer.eps).sqrt()
            hidden = normed * scale[:, None, None] + shift[:, None, None]
        else:
            hidden = hidden.clamp(min=0)
    return convolution(part.to_heatmap, 1)(hidden)[0, 0]


def gaussian(xy: Sequence[float] | np.ndarray, size: tuple[int, int], sigma: float) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return np.exp(-((x - xy[0]) ** 2 + (y - xy[1]) ** 2) / (2 * sigma**2))


def pass_through(sigma: float = 2.0) -> SCIO:
    """Gamma that says A is exactly where D is."""
    made = SCIO(1, [(0, 1, 2, 3)], feature_channels=1, width=1, dilations=(1,), sigma=sigma).eval()
    gamma = made.verification
    for values in (gamma.reduce.weight, gamma.of_features.weight, gamma.of_heatmaps.weight):
        nn.init.zeros_(values)
    gamma.of_heatmaps.weight.data[0, 2, 1, 1] = 1
    nn.init.ones_(gamma.to_heatmap.weight)
    norm: Any = gamma.layers[0]
    norm.running_var.fill_(1 - norm.eps)
    return made.double()


# --- networks


@torch.no_grad()
def test_the_grouped_networks_are_a_loop_over_groups() -> None:
    made, (maps, features) = networks(), inputs()
    distal = torch.rand(3, 3, *SIZE, dtype=torch.float64)
    verified = torch.rand(3, 3, *SIZE, dtype=torch.float64)
    found = (
        made.predict(maps, features),
        made.verify(maps, distal, features),
        made.predict_from(verified, maps, features),
    )
    for person, (group, (a, b, c, _)) in itertools.product(range(3), enumerate(GROUPS)):
        one, f = maps[person], features[person]
        phi = naive(made.prediction, group, torch.stack((one[a], one[b], one[c])), f)
        gamma = naive(made.verification, group, torch.stack((one[b], one[c], distal[person, group])), f)
        again = naive(made.prediction, group, torch.stack((verified[person, group], one[b], one[c])), f)
        assert phi.std() > 0.01
        for wanted, answer in zip((phi, gamma, again), found, strict=True):
            torch.testing.assert_close(answer[person, group], wanted, rtol=0, atol=1e-12)
    assert made.distal.tolist() == [6, 7, 8]
    assert made.verified.tolist() == [0, 3, 5]


def test_no_group_reaches_another() -> None:
    made, (_, features) = networks(), inputs()
    given = torch.rand(2, 3, 3, *SIZE, dtype=torch.float64, requires_grad=True)
    for part, group in itertools.product((made.prediction, made.verification), range(3)):
        answer = part(given, part.context(features[:2]))[:, group]
        (gradient,) = torch.autograd.grad(answer.square().sum(), given)
        reached = gradient.abs().amax((0, 2, 3, 4)) > 0
        assert reached.tolist() == [index == group for index in range(3)]


@pytest.mark.parametrize("dilations", [(1,), (4, 1, 2)])
@torch.no_grad()
def test_a_moved_heatmap_is_added_to_the_rest(dilations: tuple[int, ...]) -> None:
    made, (_, features) = networks(dilations=dilations), inputs()
    part = made.verification
    given = torch.rand(3, 3, 3, *SIZE, dtype=torch.float64)
    rest = part.without_last(given[:, :, :2], part.context(features))
    before = rest.clone()
    wanted = part(given, part.context(features))
    for _ in range(2):  # the rest is used again at every step of a search
        torch.testing.assert_close(part.with_last(given[:, :, 2], rest), wanted, rtol=0, atol=1e-12)
    assert torch.equal(rest, before)


@torch.no_grad()
def test_the_two_sides_share_nothing() -> None:
    made, (maps, features) = networks(), inputs()
    sides = [
        {value.data_ptr() for value in part.state_dict().values()} for part in (made.prediction, made.verification)
    ]
    assert not sides[0] & sides[1]
    before = made.predict(maps, features)
    for values in made.verification.state_dict().values():
        values.fill_(0)
    assert torch.equal(made.predict(maps, features), before)


def test_a_pixel_sees_the_other_end_of_the_limb() -> None:
    """31 heatmap pixels to each side by default, as the docstring says, and no further."""
    torch.manual_seed(0)
    made = SCIO(1, [(0, 1, 2, 3)], feature_channels=2, width=4).double()
    for values in made.parameters():
        values.data.abs_()  # so that no ReLU is shut
    given = torch.rand(1, 1, 3, 1, 80, dtype=torch.float64, requires_grad=True)
    made.eval()
    answer = made.prediction(given, made.prediction.context(torch.rand(1, 1, 1, 80, dtype=torch.float64)))
    (gradient,) = torch.autograd.grad(answer[0, 0, 0, 40], given)
    reached = gradient[0, 0].abs().sum((0, 1)).nonzero()[:, 0]
    assert (int(reached.min()), int(reached.max())) == (40 - 31, 40 + 31)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"groups": []}, "groups"),
        ({"width": 0}, "width is 0"),
        ({"feature_channels": -1}, "feature_channels is -1"),
        ({"sigma": float("nan")}, "sigma is nan"),
        ({"dilations": ()}, r"dilations is \[\]"),
        ({"dilations": (1, 0)}, r"dilations is \[1, 0\]"),
    ],
)
def test_networks_that_cannot_be(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"model.refiner: .*{says}"):
        SCIO(5, **{"groups": GROUPS, **arguments})


# --- the search


def bowls(count: int, ratio: float | Tensor, seed: int = 0) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Elliptic bowls of any direction, their minima, and starts at most 6 from them; float64."""
    generator = torch.Generator().manual_seed(seed)
    share, angle, turn = torch.rand(3, count, generator=generator, dtype=torch.float64).unbind()
    minimum = 20 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    away = 6 * share.sqrt()[:, None] * torch.stack(((2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()), -1)
    cosine, sine = (math.pi * turn).cos(), (math.pi * turn).sin()

    def loss(xy: Tensor) -> Tensor:
        x, y = (xy - minimum).unbind(-1)
        return ((x * cosine + y * sine).square() + ratio**2 * (y * cosine - x * sine).square()) / 100

    return loss, minimum, minimum + away


ANY_RATIO = 1 + 3 * torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("step", [0.375, 1.5])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 3.0, ANY_RATIO], ids=["1", "2", "3", "1 to 4"])
def test_bowls(step: float, ratio: float | Tensor) -> None:
    """The share of starts that end within one step of the minimum, and what holds for all of them."""
    loss, minimum, start = bowls(2000, ratio)
    found = local_search(loss, start, steps=50, step=step, radius=6)
    near = (found.xy - minimum).norm(dim=-1) <= step
    assert near.double().mean() >= 0.95
    assert ((found.positions - start).norm(dim=-1) <= 6 + 1e-12).all()
    assert (found.losses.diff(dim=0) <= 0).all()
    assert torch.equal(found.losses, torch.stack([loss(xy) for xy in found.positions]))
    moves = found.positions.diff(dim=0).norm(dim=-1)
    assert ((moves == 0) | ((moves - step).abs() < 1e-9)).all()
    assert found.positions.shape == (51, 2000, 2)
    assert torch.equal(found.positions[0], start)
    assert torch.equal(found.positions[-1], found.xy)
    assert torch.equal(found.losses[-1], found.loss)


def test_a_valley_takes_longer() -> None:
    """At ratio 4, steps of 0.375 need 60 where 50 bring nine starts of ten to the minimum."""
    loss, minimum, start = bowls(2000, 4.0)
    found = local_search(loss, start, steps=60, step=0.375, radius=6)
    near = (found.positions - minimum).norm(dim=-1) <= 0.375
    assert near[50].double().mean() >= 0.9
    assert near[60].double().mean() >= 0.95


def naive_search(
    loss: Callable[[float, float], float],
    start: tuple[float, float],
    steps: int,
    step: float,
    radius: float,
    low: float = -math.inf,
    high: float = math.inf,
) -> list[tuple[float, float]]:
    """The search of one point in plain Python."""
    x, y = start
    best, angle, path = loss(x, y), 0.0, [start]
    for _ in range(steps):
        there = x + step * math.cos(angle), y + step * math.sin(angle)
        inside = (
            math.hypot(there[0] - start[0], there[1] - start[1]) <= radius and low <= min(there) <= max(there) <= high
        )
        value = loss(*there)
        if inside and value < best - 1e-9:
            (x, y), best = there, value
        else:
            angle += math.radians(137.50776405003785)  # the golden angle
        path.append((x, y))
    return path


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    step=st.floats(0.1, 3),
    radius=st.floats(0.5, 9.7),
    low=st.floats(-4, 0),
    high=st.floats(1, 5),
)
def test_the_search_is_that_of_one_point_after_the_other(
    seed: int, step: float, radius: float, low: float, high: float
) -> None:
    """On hilly ground with holes of NaN, and within low and high."""
    assume(abs(radius / step - round(radius / step)) > 1e-6)  # straight on to the radius: rounding decides
    rng = np.random.default_rng(seed)
    waves, phase = rng.normal(0, 0.7, (3, 2)), rng.uniform(0, 7, 3)

    def height(x: Any, y: Any, cos: Any) -> Any:
        return sum(cos(a * x + b * y + c) for (a, b), c in zip(waves.tolist(), phase.tolist(), strict=True))

    def alone(x: float, y: float) -> float:
        return math.nan if height(y, x, math.cos) > 1.5 else height(x, y, math.cos)

    def together(xy: Tensor) -> Tensor:
        x, y = xy.unbind(-1)
        return torch.where(height(y, x, torch.cos) > 1.5, torch.nan, height(x, y, torch.cos))

    start = torch.from_numpy(rng.uniform(low, high, (2, 2, 2)))
    limits = {"low": torch.full((2,), low).double(), "high": torch.full((2,), high).double()}
    found = local_search(together, start, steps=25, step=step, radius=radius, **limits)
    for row, column in itertools.product(range(2), range(2)):
        x, y = start[row, column].tolist()
        path = naive_search(alone, (x, y), 25, step, radius, low=limits["low"][0].item(), high=limits["high"][0].item())
        np.testing.assert_allclose(found.positions[:, row, column], path, atol=1e-9)
    moved = (found.positions[1:] != found.positions[:-1]).any(-1)
    assert found.losses[1:][moved].isfinite().all()
    assert (found.positions >= low - 1e-6).all()
    assert (found.positions <= high + 1e-6).all()
    assert ((found.positions - start).norm(dim=-1) <= radius + 1e-9).all()


def test_points_of_a_batch_do_not_depend_on_each_other() -> None:
    """Exactly, in float64."""
    loss, _, start = bowls(40, 3.0)
    together = local_search(loss, start, steps=50, step=0.375, radius=6)
    for row in range(40):
        alone = local_search(
            lambda xy, row=row: loss(xy.expand(40, 2))[row : row + 1],
            start[row : row + 1],
            steps=50,
            step=0.375,
            radius=6,
        )
        assert torch.equal(alone.positions[:, 0], together.positions[:, row])
        assert torch.equal(alone.losses[:, 0], together.losses[:, row])


def test_flat_ground_and_falls_within_rounding_move_nothing() -> None:
    start = torch.rand(5, 2, dtype=torch.float64)
    for loss in (lambda xy: torch.ones(5).double(), lambda xy: -1e-10 * xy.sum(-1), lambda xy: xy.sum(-1) * torch.nan):
        found = local_search(loss, start, steps=30, step=1.5, radius=6)
        assert torch.equal(found.positions, start.expand(31, 5, 2))


def test_a_start_outside_the_limits_goes_in_or_stays() -> None:
    start = torch.tensor([[-1.0, 5.0], [-3.0, 5.0]], dtype=torch.float64)
    low, high = torch.zeros(2).double(), torch.full((2,), 9.0).double()
    found = local_search(lambda xy: -xy[..., 0], start, steps=20, step=1.5, radius=6, low=low, high=high)
    assert float(found.xy[0, 0]) == pytest.approx(3.5 + 1.5)
    assert torch.equal(found.xy[1], start[1])


# --- the self-constraint


@torch.no_grad()
def test_the_loss_is_eq_12_in_a_loop() -> None:
    made, (maps, features) = networks(), inputs()
    xy = torch.from_numpy(np.random.default_rng(0).uniform(-2, 14, (3, 3, 2)))
    constraint = SelfConstraint(made, maps, features)
    found, score = constraint.loss(xy), constraint.score(xy)
    for person, (group, (a, b, c, _)) in itertools.product(range(3), enumerate(GROUPS)):
        rendered = torch.from_numpy(gaussian(xy[person, group].numpy(), SIZE, 1.5))
        given = torch.stack((maps[person, b], maps[person, c], rendered))
        answer = naive(made.verification, group, given, features[person])
        wanted = (maps[person, a] - answer).square().mean()
        assert float(found[person, group]) == pytest.approx(float(wanted), rel=1e-12)
        power = maps[person, a].square().sum() + answer.square().sum()
        agreed = max(0.0, 1 - float((maps[person, a] - answer).square().sum() / power))
        assert float(score[person, group]) == pytest.approx(agreed, abs=1e-12)


def cut_out(whole: SCIO, group: int) -> SCIO:
    """One group as networks of its own."""
    alone = networks(groups=[GROUPS[group]])
    state = {}
    for name, value in whole.state_dict().items():
        rows = alone.state_dict()[name]
        count = rows.shape[0] if rows.ndim else 0
        state[name] = value[group * count : (group + 1) * count] if count else value
    alone.load_state_dict(state)
    return alone


@torch.no_grad()
def test_searching_together_is_searching_person_by_person_and_group_by_group() -> None:
    made, (maps, features) = networks(), inputs(persons=4)
    start = torch.from_numpy(np.random.default_rng(0).uniform(0, 11, (4, 3, 2)))
    config = DistalJoints(steps=25, step=0.75, unit="heatmap", radius=4)
    together = search_distal(SelfConstraint(made, maps, features), start, config, stride=4.0)
    assert (together.positions[-1] != start).any(-1).double().mean() > 0.5
    for person, group in itertools.product(range(4), range(3)):
        one = slice(person, person + 1)
        constraint = SelfConstraint(cut_out(made, group), maps[one], features[one])
        alone = search_distal(constraint, start[one, group : group + 1], config, stride=4.0)
        torch.testing.assert_close(alone.positions[:, 0, 0], together.positions[:, person, group], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.losses[:, 0, 0], together.losses[:, person, group], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("unit", "length"), [("input", 0.375), ("heatmap", 1.5)])
def test_where_the_networks_say_that_a_is_where_d_is_the_search_ends_at_a(unit: Any, length: float) -> None:
    """By hand: |H_A - H_D|^2 has its minimum there, and the score of two Gaussians d apart is exp(-d^2 / 4 sigma^2)."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(16, 32, (30, 2))
    maps = torch.zeros(30, 4, 48, 48, dtype=torch.float64)
    maps[:, 0] = torch.from_numpy(np.stack([gaussian(xy, (48, 48), 2.0) for xy in truth]))
    constraint = SelfConstraint(pass_through(), maps, torch.zeros(30, 1, 48, 48, dtype=torch.float64))
    away = rng.uniform(-3.5, 3.5, (30, 1, 2))
    start = torch.from_numpy(truth[:, None] + away)
    expected = np.exp(-np.square(away).sum(-1) / 16)
    np.testing.assert_allclose(constraint.score(start), expected, atol=1e-6)
    np.testing.assert_allclose(constraint.score(torch.from_numpy(truth[:, None])), 1, atol=1e-9)
    assert float(constraint.score(torch.full((30, 1, 2), 500.0).double()).max()) == 0
    found = search_distal(constraint, start, DistalJoints(unit=unit), stride=4.0)
    moves = found.positions.diff(dim=0).norm(dim=-1)
    assert float(moves.max()) == pytest.approx(length)
    left = np.linalg.norm(found.xy.numpy()[:, 0] - truth, axis=-1)
    assert (left <= length).mean() >= 0.95
    assert len(search_distal(constraint, start, DistalJoints(steps=3), stride=4.0).losses) == 4


@torch.no_grad()
def test_maps_of_nothing_score_nothing_and_equal_maps_score_1() -> None:
    zeros = torch.zeros(1, 4, 20, 20, dtype=torch.float64)
    constraint = SelfConstraint(pass_through(), zeros, zeros[:, :1])
    assert float(constraint.score(torch.full((1, 1, 2), 5000.0).double())) == 0
    constraint = SelfConstraint(networks(), *inputs())
    xy = torch.full((3, 3, 2), 4.0, dtype=torch.float64)
    constraint.target = constraint.verified(xy)
    torch.testing.assert_close(constraint.score(xy), torch.ones(3, 3, dtype=torch.float64))


@torch.no_grad()
def test_a_joint_on_the_border_stays_on_the_map() -> None:
    """Where A's Gaussian has its peak outside, the search is drawn there."""
    maps = torch.zeros(4, 4, 20, 16, dtype=torch.float64)
    outside = [(-2.0, 10.0), (17.0, 10.0), (8.0, -2.0), (8.0, 21.0)]
    border = [(0.0, 10.0), (15.0, 10.0), (8.0, 0.0), (8.0, 19.0)]
    for row, xy in enumerate(outside):
        maps[row, 0] = torch.from_numpy(gaussian(xy, (20, 16), 2.0))
    constraint = SelfConstraint(pass_through(), maps, torch.zeros(4, 1, 20, 16, dtype=torch.float64))
    inner = torch.tensor(border, dtype=torch.float64)[:, None] * 0.8 + 1.5
    for start in (torch.tensor(border, dtype=torch.float64)[:, None], inner):
        found = search_distal(constraint, start, DistalJoints(step=0.5, unit="heatmap"), stride=4.0)
        assert (found.positions >= 0).all()
        assert (found.positions <= torch.tensor([15.0, 19.0])).all()
    assert (found.loss < found.losses[0]).all()
    across = torch.tensor([0, 0, 1, 1])
    at = found.xy[torch.arange(4), 0, across]
    np.testing.assert_allclose(at, [0, 15, 0, 19], atol=0.5)


# --- inference

SMALL = Named("timm", {"model": "test_resnet"})
SIMPLE = Named("simple", {"deconv_channels": [8, 8, 8]})
REFINER = Named("scio", {"feature_channels": 3, "width": 4, "dilations": [1, 2]})
COCO = load_skeleton("coco17")
DISTAL = COCO.indices(group.distal for group in COCO.groups)
OTHERS = [joint for joint in range(17) if joint not in DISTAL]
STRIDE = 4


def pose_model(seed: int = 0, head: Named = SIMPLE, refiner: Named | None = REFINER, **fields: Any) -> PoseModel:
    """A network that learned nothing, whose maps `[B, 17, 16, 16]` are of about 1 and differ between crops."""
    torch.manual_seed(seed)
    size = InputConfig(**{"height": 64, "width": 64, **fields})
    model = build_model(ModelConfig(SMALL, head, refiner, "coco17", size), COCO).eval()
    with torch.no_grad():
        _, features = model.with_features(model.preprocess(crops(4).images))
    nn.init.normal_(model.head.final_layer.weight, std=0.5 / float(features.norm(dim=1).mean()))
    nn.init.constant_(model.head.final_layer.bias, 0.5)  # pyright: ignore[reportArgumentType]
    if model.refiner is not None:
        shaken(model.refiner, seed)
        for part in (
            model.refiner.prediction,
            model.refiner.verification,
        ):  # f is as small as the initialisation left it
            part.reduce.weight.data /= features.std()
    return model


def crops(count: int, seed: int = 0) -> CropBatch:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return CropBatch(
        images=(nn.functional.interpolate(noise, (64, 64), mode="bilinear") * 255).to(torch.uint8),
        keypoints=torch.zeros(count, 17, 2),
        visibility=torch.zeros(count, 17, dtype=torch.int64),
        affine=torch.tensor([[0.5, 0.0, 3.0], [0.0, 0.5, -7.0]]).repeat(count, 1, 1),
        boxes=torch.zeros(count, 4),
        scores=torch.ones(count),
        areas=torch.ones(count),
        image_ids=list(range(count)),
        annotation_ids=[None] * count,
    )


def on_the_map(keypoints: Tensor) -> np.ndarray:
    """Image pixels of `crops` to heatmap pixels."""
    return (keypoints.numpy() * 0.5 + [3.0, -7.0]) / STRIDE


def decoding(output: Any, *, flip: bool = False, refine: Any = "none", **scio: Any) -> Decoding:
    given = {"proximal_threshold": -1e9, **scio}
    return Decoding(refine=refine, flip=flip, scio=DistalJoints(output=output, **given))


@torch.no_grad()
def naive_maps(model: PoseModel, batch: CropBatch) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """The head's maps, those with Phi's for the distal joints, and f, person by person and group by group."""
    assert model.refiner is not None
    read: list[Tensor] = []
    hook = model.head.final_layer.register_forward_hook(lambda _module, given, _answer: read.append(given[0]))
    maps = model(model.preprocess(batch.images))
    hook.remove()
    learned = maps.clone()
    for person, (group, entry) in itertools.product(range(len(maps)), enumerate(COCO.groups)):
        three = torch.stack([maps[person, joint] for joint in COCO.indices(entry.proximal)])
        learned[person, DISTAL[group]] = naive(model.refiner.prediction, group, three, read[0][person])
    return maps.numpy(), learned.numpy(), read[0]


def mirror_back(maps: np.ndarray) -> np.ndarray:
    """Joints exchanged, columns turned, and moved to the right by 3/4 of a pixel, the first column kept."""
    turned = maps[:, list(COCO.flip_index), :, ::-1].copy()
    turned[..., 1:] = 0.25 * turned[..., 1:] + 0.75 * turned[..., :-1].copy()
    return turned


def largest(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest pixel (x, y) of each map, and its value."""
    flat = maps.reshape(*maps.shape[:2], -1)
    place = flat.argmax(-1)
    return np.stack((place % maps.shape[-1], place // maps.shape[-1]), -1), flat.max(-1)


@pytest.mark.parametrize("head", [SIMPLE, Named("ccm", {"channels": [8, 8, 8]})], ids=lambda head: head.name)
def test_base_is_the_model_without_its_networks(head: Named) -> None:
    model, batch = pose_model(head=head), crops(3)
    bare = PoseModel(model.backbone, model.head, COCO, replace(model.config, refiner=None)).eval()
    for flip in (False, True):
        found = predict_crops(model, batch, decoding("base", flip=flip, refine="dark"))
        wanted = predict_crops(bare, batch, Decoding(refine="dark", flip=flip))
        assert torch.equal(found.keypoints, wanted.keypoints)
        assert torch.equal(found.scores, wanted.scores)
        assert found.verification is None
        assert wanted.verification is None
    with torch.no_grad():
        images = model.preprocess(batch.images)
        maps, features = model.with_features(images)
        assert torch.equal(maps, model(images))
        assert torch.equal(model.head.final_layer(features), maps)


@pytest.mark.parametrize("flip", [False, True])
def test_learning_replaces_the_distal_joints_by_the_prediction_networks_peaks(flip: bool) -> None:
    model, batch = pose_model(), crops(6)
    base = predict_crops(model, batch, decoding("base", flip=flip))
    found = predict_crops(model, batch, decoding("learning", flip=flip))
    _, maps, _ = naive_maps(model, batch)
    if flip:
        _, mirrored, _ = naive_maps(model, replace(batch, images=batch.images.flip(-1)))
        maps = (maps + mirror_back(mirrored)) / 2
    places, heights = largest(maps)
    np.testing.assert_allclose(on_the_map(found.keypoints)[:, DISTAL], places[:, DISTAL], atol=1e-4)
    np.testing.assert_allclose(found.scores[:, DISTAL], heights[:, DISTAL], rtol=1e-4)
    assert torch.equal(found.keypoints[:, OTHERS], base.keypoints[:, OTHERS])
    assert torch.equal(found.scores[:, OTHERS], base.scores[:, OTHERS])
    assert (found.keypoints[:, DISTAL] != base.keypoints[:, DISTAL]).any(-1).float().mean() > 0.8
    assert found.verification is not None
    assert found.verification[:, OTHERS].isnan().all()
    assert found.verification[:, DISTAL].isfinite().all()


def constraint_of(
    model: PoseModel, maps: np.ndarray, features: Tensor, xy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The loss and the score of distal joints at `[B, G, 2]`, heatmap pixels, in loops, each `[B, G]`."""
    assert model.refiner is not None
    losses, scores = np.zeros(xy.shape[:2]), np.zeros(xy.shape[:2])
    for person, (group, entry) in itertools.product(range(len(xy)), enumerate(COCO.groups)):
        a, b, c = (maps[person, joint] for joint in COCO.indices(entry.proximal))
        three = torch.from_numpy(np.stack((b, c, gaussian(xy[person, group], maps.shape[-2:], 2.0)))).float()
        with torch.no_grad():
            answer = naive(model.refiner.verification, group, three, features[person]).numpy()
        losses[person, group] = np.square(a - answer).mean()
        scores[person, group] = 1 - np.square(a - answer).sum() / (np.square(a).sum() + np.square(answer).sum())
    return losses, scores.clip(0)


def mean_constraint(model: PoseModel, batch: CropBatch, xy: np.ndarray, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """`constraint_of` the crops and, with `flip`, its mean with their mirror images': sides exchanged, 15.75 - x."""
    maps, _, features = naive_maps(model, batch)
    own = constraint_of(model, maps, features, xy)
    if not flip:
        return own
    maps, _, features = naive_maps(model, replace(batch, images=batch.images.flip(-1)))
    other_side = [1, 0, 3, 2, 5, 4]  # of the groups: arms, legs, ears
    turned = np.stack((15.75 - xy[..., 0], xy[..., 1]), -1)[:, other_side]
    mirrored = constraint_of(model, maps, features, turned)
    loss, score = ((one + two[:, other_side]) / 2 for one, two in zip(own, mirrored, strict=True))
    return loss, score


def test_both_crops_change_places() -> None:
    """The mean over a crop and its mirror image is that over the mirror image and its own, at the mirrored place."""
    made, (maps, features) = networks(), inputs()
    one, two = (SelfConstraint(made, maps + shift, features) for shift in (0.0, 0.3))
    mirror = torch.tensor([1, 0, 2])
    xy = 2 + 8 * torch.rand(len(maps), 3, 2, dtype=maps.dtype, generator=torch.Generator().manual_seed(0))
    pair, exchanged = BothCrops(one, two, mirror, 0.75), BothCrops(two, one, mirror, 0.75)
    turned = torch.stack((maps.shape[-1] - 0.25 - xy[..., 0], xy[..., 1]), -1)[:, mirror]
    assert torch.allclose(pair.loss(xy), exchanged.loss(turned)[:, mirror], atol=1e-12)
    assert torch.allclose(pair.score(xy), exchanged.score(turned)[:, mirror], atol=1e-12)
    assert not torch.allclose(pair.loss(xy), one.loss(xy))


def test_mirror_groups() -> None:
    """By the joints' sides; None where a group has no mirror image among the groups."""
    flip = COCO.flip_index
    groups = [COCO.indices((*group.proximal, group.distal)) for group in COCO.groups]
    found = mirror_groups(SCIO(4, groups, width=2), flip)
    assert found is not None
    assert found.tolist() == [1, 0, 3, 2, 5, 4]
    half = SCIO(4, groups[::2], width=2)
    assert mirror_groups(half, flip) is None
    assert mirror_groups(half, range(17)) is not None


@pytest.mark.parametrize("flip", [False, True])
def test_optimisation_goes_on_from_there(flip: bool) -> None:
    """Within the radius, to a lower loss, and says how well it is verified; with `flip` in the mirrored crop too."""
    model, batch = pose_model(), crops(4)
    learned = predict_crops(model, batch, decoding("learning", flip=flip))
    found = predict_crops(model, batch, decoding("optimisation", flip=flip, radius=2.5, step=0.5, unit="heatmap"))
    before, after = (on_the_map(each.keypoints)[:, DISTAL] for each in (learned, found))
    distance = np.linalg.norm(after - before, axis=-1)
    assert distance.max() <= 2.5 + 1e-4
    assert (distance > 0.4).mean() > 0.5
    assert after.min() >= 0
    assert after.max() <= 15
    assert torch.equal(found.keypoints[:, OTHERS], learned.keypoints[:, OTHERS])
    assert torch.equal(found.scores, learned.scores)
    first, _ = mean_constraint(model, batch, before, flip)
    last, score = mean_constraint(model, batch, after, flip)
    moved = distance > 0.4
    assert (last[moved] < first[moved]).all()
    assert found.verification is not None
    np.testing.assert_allclose(found.verification[:, DISTAL], score, atol=1e-4)
    weighted = predict_crops(
        model,
        batch,
        decoding("optimisation", flip=flip, radius=2.5, step=0.5, unit="heatmap", confidence="verification"),
    )
    assert torch.equal(weighted.keypoints, found.keypoints)
    np.testing.assert_allclose(weighted.scores[:, DISTAL], found.scores[:, DISTAL].numpy() * score, atol=1e-4)
    assert torch.equal(weighted.scores[:, OTHERS], found.scores[:, OTHERS])


@pytest.mark.parametrize("output", ["learning", "optimisation"])
def test_who_is_left_alone(output: Any) -> None:
    """Groups with a doubtful proximal joint, and with `below` those whose distal joint is sure; bit for bit."""
    model, batch = pose_model(), crops(6)
    base = predict_crops(model, batch, decoding("base"))
    whole = predict_crops(model, batch, decoding(output))
    assert whole.verification is not None
    peaks = base.scores.numpy()
    doubtful = np.stack([peaks[:, COCO.indices(group.proximal)].min(1) for group in COCO.groups], 1)
    threshold, below = float(np.median(doubtful)), float(np.median(peaks[:, DISTAL]))
    best = doubtful.max(1)
    without = float(np.nextafter(best[:-1].min(), np.float32(9)))  # somebody but the last person is left out altogether
    choices: tuple[dict[str, Any], ...] = (
        {"proximal_threshold": threshold},
        {"proximal_threshold": threshold, "below": below},
        {"below": below},
        {"proximal_threshold": without},
    )
    assert not (doubtful[best[:-1].argmin()] >= without).any()
    for limits in choices:
        chosen = (doubtful >= limits.get("proximal_threshold", -1e9)) & (peaks[:, DISTAL] < limits.get("below", 1e9))
        assert 0 < chosen.mean() < 1
        replaced = np.zeros((6, 17), dtype=bool)
        replaced[:, DISTAL] = chosen
        found = predict_crops(model, batch, decoding(output, **limits))
        assert found.verification is not None
        assert np.array_equal(found.verification.isfinite().numpy(), replaced)
        left = torch.from_numpy(~replaced)
        assert torch.equal(found.keypoints[left], base.keypoints[left])
        assert torch.equal(found.scores[left], base.scores[left])
        # Of the chosen ones, as when everybody is: the search of one does not depend on the others.
        torch.testing.assert_close(found.keypoints[~left], whole.keypoints[~left], rtol=0, atol=1e-3)
        torch.testing.assert_close(found.verification[~left], whole.verification[~left], rtol=0, atol=1e-4)
    nobody = predict_crops(model, batch, decoding(output, proximal_threshold=1e9))
    assert torch.equal(nobody.keypoints, base.keypoints)
    assert torch.equal(nobody.scores, base.scores)
    assert nobody.verification is not None
    assert nobody.verification.isnan().all()


@pytest.mark.parametrize("refine", ["quarter", "parabola", "paraboloid", "dark"])
@pytest.mark.parametrize("alignment", ["hrnet", "udp"])
def test_every_decoder_keeps_the_joints_on_the_map(refine: Any, alignment: str) -> None:
    model, batch = pose_model(alignment=alignment), crops(3)
    found = predict_crops(model, batch, decoding("optimisation", flip=True, refine=refine, steps=20, radius=30))
    place = on_the_map(found.keypoints) * (1.0 if alignment == "hrnet" else 15 / 63 * 4)
    assert place.min() >= -1e-4
    assert place.max() <= 15 + 1e-4


@pytest.mark.parametrize("part", ["head", "prediction"])
def test_heatmaps_that_are_no_numbers_are_refused(part: str) -> None:
    model: Any = pose_model()
    last = model.head.final_layer if part == "head" else model.refiner.prediction.to_heatmap
    nn.init.constant_(last.bias, math.nan)
    for output in ("learning", "optimisation"):
        with pytest.raises(CheckFailed, match="NaN or infinity"):
            predict_crops(model, crops(2), decoding(output))


def test_results_carry_the_verification() -> None:
    """Over batches of other sizes; null exactly where nothing was replaced, and no NaN in the JSON."""
    model = pose_model()
    batches = [crops(3, 1), crops(1, 2)]
    base = predict_batches(model, batches, decoding("base"))
    doubtful = np.stack([base.joint_scores[:, COCO.indices(group.proximal)].min(1) for group in COCO.groups], 1)
    threshold = float(np.median(doubtful))
    poses = predict_batches(model, batches, decoding("optimisation", proximal_threshold=threshold))
    results = json.loads(json.dumps(to_results(poses, 1), allow_nan=False))
    assert poses.verification is not None
    assert poses.verification.shape == (4, 17)
    for row, record in enumerate(results):
        chosen = {joint for group, joint in enumerate(DISTAL) if doubtful[row, group] >= threshold}
        assert {joint for joint, score in enumerate(record["verification"]) if score is not None} == chosen
        for joint in chosen:
            assert record["verification"][joint] == pytest.approx(float(poses.verification[row, joint]))
    assert "verification" not in to_results(base, 1)[0]


def test_verification_stays_with_its_pose_and_joint() -> None:
    verification = np.arange(15.0).reshape(5, 3) / 15
    verification[2, 1] = np.nan
    poses = Poses(
        keypoints=np.zeros((5, 3, 2)) + np.array([0.0, 500.0, 0.5, 0.0, 0.2])[:, None, None],
        joint_scores=np.ones((5, 3)),
        scores=np.array([0.3, 0.2, 0.9, 0.1, 0.5]),
        boxes=np.zeros((5, 4)),
        areas=np.full(5, 1e4),
        image_ids=[1, 1, 1, 2, 1],
        annotation_ids=[None] * 5,
        verification=verification,
    )
    methods: dict[Any, list[int]] = {"hard": [1, 2, 3], "fuse": [1, 2, 3], "soft": [0, 1, 2, 3, 4]}
    for nms, kept in methods.items():
        left = suppress(poses, (0.1, 0.1, 0.1), Decoding(nms=nms))
        np.testing.assert_array_equal(left.verification, verification[kept])
    np.testing.assert_array_equal(poses.take(np.array([4, 2])).verification, verification[[4, 2]])
    np.testing.assert_array_equal(poses.joints([2, 0]).verification, verification[:, [2, 0]])
    assert to_results(poses, 1)[2]["verification"] == [6 / 15, None, 8 / 15]


# --- groups


@pytest.mark.parametrize("name", packaged_skeletons())
def test_the_mirror_image_of_a_packaged_group_is_a_group(name: str) -> None:
    skeleton = load_skeleton(name)
    other = {joint: skeleton.joints[skeleton.flip_index[index]] for index, joint in enumerate(skeleton.joints)}
    for group in skeleton.groups:
        a, b, c = (other[joint] for joint in group.proximal)
        assert Group((a, b, c), other[group.distal]) in skeleton.groups
    assert len(skeleton.groups) == len(set(skeleton.groups))
    wanted = {"coco17": 6, "crowdpose14": 4, "lsp14": 4, "mpii16": 4, "aic14": 4}
    assert len(skeleton.groups) >= wanted.get(name, 0)
    if name in ("coco17", "crowdpose14"):
        assert len(skeleton.groups) == wanted[name]


ARM = {"proximal": ["a", "b", "c"], "distal": "d"}
WRONG = [
    ([{**ARM, "proximal": ["a", "b", "x"]}], "unknown joint 'x'"),
    ([{**ARM, "distal": "dd"}], "unknown joint 'dd' .did you mean 'd'"),
    ([{**ARM, "proximal": ["a", "b", "b"]}], "names a joint twice"),
    ([{**ARM, "distal": "a"}], "names a joint twice"),
    ([ARM, {"proximal": ["e", "b", "c"], "distal": "d"}], "'d' is the distal joint of two groups"),
    ([ARM, {"proximal": ["d", "b", "c"], "distal": "e"}], "'d' is proximal in one group and distal in another"),
    ([{"proximal": ["a", "b", "c"]}], "expected a list of {proximal"),
    ([{**ARM, "distal": None}], "expected a list of {proximal"),
    ([{**ARM, "distal": ["d"]}], "expected a list of {proximal"),
    ([{**ARM, "proximal": ["a", "b"]}], "expected a list of {proximal"),
    ([{**ARM, "weight": 1}], "expected a list of {proximal"),
    (ARM, "expected a list of {proximal"),
]


@pytest.mark.parametrize(("groups", "says"), WRONG)
def test_groups_that_cannot_be_are_named(groups: Any, says: str) -> None:
    data = {"name": "toy", "joints": list("abcde"), "groups": groups}
    with pytest.raises(UserError, match=f"toy.yaml: .*field groups: .*{says}"):
        Skeleton.from_dict(data, "toy.yaml")


def test_groups_go_through_a_file() -> None:
    skeleton = Skeleton.from_dict({"name": "toy", "joints": list("abcde"), "groups": [ARM]})
    assert skeleton.groups == (Group(("a", "b", "c"), "d"),)
    assert Skeleton.from_dict(json.loads(json.dumps(skeleton.to_dict()))) == skeleton


# --- hand-over


def export(model: PoseModel, path: Path) -> Path:
    described = describe(
        stage="finetune",
        method="simple",
        model=to_plain(model.config),
        skeleton=model.skeleton,
        config={},
        upstream=None,
        metrics={},
    )
    write_export(path, model.state_dict(), described)
    return path


def test_a_file_says_that_it_carries_the_networks(tmp_path: Path) -> None:
    model, batch = pose_model(), crops(2)
    again = load_model(export(model, tmp_path / "a.safetensors"))
    assert again.config.refiner == REFINER
    wanted, found = (predict_crops(each, batch, decoding("optimisation")) for each in (model, again))
    assert torch.equal(found.keypoints, wanted.keypoints)


def test_the_networks_are_handed_on_where_the_groups_are_the_same(tmp_path: Path) -> None:
    base, scio = pose_model(0, refiner=None), pose_model(1)
    files = {name: export(model, tmp_path / f"{name}.safetensors") for name, model in (("base", base), ("scio", scio))}

    def started(name: str, model: PoseModel) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        report = init_from(model, files[name])
        return before, model.state_dict(), report.news

    before, after, news = started("base", pose_model(2))
    assert news == ["the networks of model.refiner"]
    for key, value in after.items():
        assert torch.equal(value, before[key] if key.startswith("refiner.") else base.state_dict()[key]), key

    _, after, news = started("scio", pose_model(2))
    assert news == []
    assert all(torch.equal(value, after[key]) for key, value in scio.state_dict().items())

    _, after, news = started("scio", pose_model(2, refiner=None))
    assert news == []
    assert set(after) == set(base.state_dict())
    assert all(torch.equal(value, scio.state_dict()[key]) for key, value in after.items())

    torch.manual_seed(3)
    turned = replace(COCO, groups=tuple(reversed(COCO.groups)))
    before, after, news = started("scio", build_model(scio.config, turned))
    assert news == ["the networks of model.refiner"]
    for key, value in after.items():
        assert torch.equal(value, before[key] if key.startswith("refiner.") else scio.state_dict()[key]), key


def test_networks_of_another_width_are_refused(tmp_path: Path) -> None:
    file = export(pose_model(), tmp_path / "scio.safetensors")
    wider = pose_model(refiner=Named("scio", {**REFINER.kwargs, "width": 5}))
    with pytest.raises(UserError, match=r"does not fit this model: .*expected \[30"):
        init_from(wider, file)


def test_damaged_verification_networks_are_refused() -> None:
    model, batch = pose_model(), crops(2)
    assert model.refiner is not None
    model.refiner.verification.to_heatmap.weight.data[0] = torch.nan
    assert predict_crops(model, batch, decoding("base")).verification is None
    for output in ("learning", "optimisation"):
        with pytest.raises(CheckFailed, match="verification networks' heatmaps hold NaN"):
            predict_crops(model, batch, decoding(output))
