from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from semi.icon import (
    JOINTS,
    PAIRS,
    Pool,
    ProjectionHead,
    SamplerCounts,
    Selection,
    gather_pool,
    hardness,
    icon_loss,
    pool_of_pairs,
    prcc_loss,
    sample_embeddings,
    select,
    skcc_loss,
)

from .processes import finish, ranks, start

KINDS: list[dict[str, Any]] = [
    {"contrast": "inter", "negatives": "all"},
    {"contrast": "inter", "negatives": "others"},
    {"contrast": "intra", "negatives": "all"},
]
SAMPLERS = ("all", "random", "hard")
CAPS: dict[str, Any] = {"max_queries": 256, "max_negatives": 512}
PAIRS_OF_JOINTS = [(0, 1), (1, 2), (3, 4), (4, 5), (2, 5)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choose(
    pool: Pool, sampler: Any, kind: dict[str, Any], counts: SamplerCounts, caps: dict[str, Any] = CAPS
) -> Selection:
    return select(pool, sampler, counts=counts, **kind, **caps)


def scene(seed: int = 0, rows: int = 6, joints: int = 6, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of unit length, which joints are valid, and how hard they are."""
    generator = seeded(seed)
    embeddings = normalize(torch.randn(rows, joints, width, generator=generator, dtype=torch.float64), dim=-1)
    valid = torch.rand(rows, joints, generator=generator) < 0.85
    return embeddings, valid, torch.randn(rows, joints, generator=generator, dtype=torch.float64)


def naive_loss(
    embeddings: Tensor,
    valid: Tensor,
    instances: list[int],
    queries: list[tuple[int, int, set[int]]],
    drawn: Tensor,
    kind: dict[str, Any],
    tau: float,
) -> Tensor:
    """Eq. 1 and 4: query after query, positive after positive, negative after negative."""
    rows, categories = valid.shape
    every = [(row, category) for row in range(rows) for category in range(categories)]
    is_valid, is_drawn, inter = valid.tolist(), drawn.tolist(), kind["contrast"] == "inter"
    means = []
    for row, category, negative_categories in queries:
        i = embeddings[row, category]
        positives, negatives = [] if inter else [i], []
        for other, joint in every:
            same = instances[other] == instances[row]
            if inter and joint == category and is_valid[other][joint] and not same:
                positives.append(embeddings[other, joint])
            met = kind["negatives"] == "all" or not same if inter else same
            if met and is_drawn[other][joint] and joint in negative_categories:
                negatives.append(embeddings[other, joint])
        below = torch.exp(torch.stack(negatives) @ i / tau).sum()
        terms = []
        for positive in positives:
            above = torch.exp(i @ positive / tau)
            terms.append(-torch.log(above / (above + below)))
        means.append(sum(terms) / len(terms))
    return torch.as_tensor(sum(means) / len(means))


def naive_queries(
    valid: Tensor, instances: list[int], kind: dict[str, Any], hard: tuple[Tensor, Tensor], q: int, h: int
) -> list[tuple[int, int, set[int]]]:
    """For embeddings and hardness, the `q` hardest queries and `h` most similar categories; 0 is all."""
    rows, categories = valid.shape
    means = [torch.stack([hard[0][row, k] for row in range(rows) if valid[row, k]]).mean(0) for k in range(categories)]
    queries = []
    for row in range(rows):
        have: dict[str, set[int]] = {"own": set(), "others": set()}
        for other in range(rows):
            whose = "own" if instances[other] == instances[row] else "others"
            have[whose] |= {joint for joint in range(categories) if valid[other, joint]}
        seen = [category for category in range(categories) if valid[row, category]]
        if q:
            seen = sorted(sorted(seen, key=lambda category: -float(hard[1][row, category]))[:q])
        for category in seen:
            negatives = have["own"] - {category}
            if kind["contrast"] == "inter":
                negatives = have["others"] | (have["own"] if kind["negatives"] == "all" else set())
                negatives -= {category}
                if category not in have["others"]:
                    continue
            if h:
                query = hard[0][row, category]
                likeness = [float(query @ mean / mean.norm()) for mean in means]
                negatives = set(sorted(negatives, key=lambda joint: -likeness[joint])[:h])
            if negatives:
                queries.append((row, category, negatives))
    return queries


def as_queries(selection: Selection) -> list[tuple[int, int, set[int]]]:
    return [
        (int(row), int(category), set(chosen.nonzero().flatten().tolist()))
        for row, category, chosen in zip(
            selection.rows, selection.categories, selection.negative_categories, strict=True
        )
    ]


def assert_same_value_and_gradient(ours: Tensor, expected: Tensor, leaf: Tensor) -> None:
    assert abs(float((ours - expected).detach())) < 1e-8
    (gradient,) = torch.autograd.grad(ours, leaf)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-8)
    assert gradient.abs().sum() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("pixels", "caps"), [(1, CAPS), (2, {"max_queries": 3, "max_negatives": 2})])
def test_losses_and_gradients_are_those_of_equations_1_to_4(
    kind: dict[str, Any], sampler: Any, pixels: int, caps: dict[str, int]
) -> None:
    rows = 6
    embeddings, valid, hard = scene(pixels, rows)
    instances = torch.arange(rows) // pixels
    valid, hard = valid[instances], hard[instances]
    leaf = embeddings.clone().requires_grad_()
    common = {"instances": instances, "tau": 0.1, "sampler": sampler, **kind, **caps}
    tau, numbers = common["tau"], instances.tolist()

    joints = JOINTS._replace(hard_queries=3, hard_negatives=2)
    pool = gather_pool(leaf, valid, instances=instances, hardness=hard, generator=seeded(7))
    chosen = choose(pool, sampler, kind, joints, caps)
    expected = naive_loss(leaf, valid, numbers, as_queries(chosen), chosen.drawn, kind, tau)
    loss = skcc_loss(leaf, valid, hardness=hard, hard_queries=3, hard_negatives=2, generator=seeded(7), **common)
    assert_same_value_and_gradient(loss, expected, leaf)

    for normalise in (True, False):
        pair_valid = torch.stack([valid[:, a] & valid[:, b] for a, b in PAIRS_OF_JOINTS], 1)
        means = torch.stack([(leaf[:, a] + leaf[:, b]) / 2 for a, b in PAIRS_OF_JOINTS], 1)
        if normalise:
            means = means / means.square().sum(-1, keepdim=True).sqrt()
        pool = gather_pool(leaf, valid, instances=instances, generator=seeded(7))
        pool = pool_of_pairs(pool, PAIRS_OF_JOINTS, normalise)
        chosen = choose(pool, sampler, kind, PAIRS, caps)
        expected = naive_loss(means, pair_valid, numbers, as_queries(chosen), chosen.drawn, kind, tau)
        loss = prcc_loss(leaf, valid, PAIRS_OF_JOINTS, normalise_pairs=normalise, generator=seeded(7), **common)
        assert_same_value_and_gradient(loss, expected, leaf)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pixels", [1, 2])
def test_all_and_hard_choose_what_a_loop_chooses(kind: dict[str, Any], pixels: int) -> None:
    for seed in range(2):
        embeddings, valid, hard = scene(seed, rows=8)
        instances = torch.arange(8) // pixels
        valid, hard = valid[instances], hard[instances]
        valid[:, 0] = instances == 1  # without a positive
        valid[instances == 2] = torch.arange(6) == 3  # without a negative of its own
        pool = gather_pool(embeddings, valid, instances=instances, hardness=hard)
        counts = JOINTS._replace(hard_queries=3, hard_negatives=2)
        numbers, scores = instances.tolist(), (embeddings, hard)
        every = choose(pool, "all", kind, counts)
        assert as_queries(every) == naive_queries(valid, numbers, kind, scores, 0, 0)
        chosen = choose(pool, "hard", kind, counts)
        assert as_queries(chosen) == naive_queries(valid, numbers, kind, scores, 3, 2)
        assert chosen.total == len(chosen.rows)
        pairs = choose(pool._replace(hardness=None), "hard", kind, PAIRS)
        assert as_queries(pairs) == naive_queries(valid, numbers, kind, scores, 0, 4)


@pytest.mark.parametrize(("counts", "joints"), [(JOINTS, 17), (PAIRS, 8)])
def test_random_draws_for_each_instance_as_many_as_the_paper_says(counts: Any, joints: int) -> None:
    embeddings, valid, _ = scene(0, rows=120, joints=joints)
    valid[:40], valid[40:80, 2:] = True, False  # all, at most two, and some joints
    instances = torch.arange(120) // 2
    valid = valid[instances * 2]
    pool = gather_pool(embeddings, valid, instances=instances, generator=seeded(1))
    queries = as_queries(choose(pool, "random", KINDS[0], counts))
    queried: dict[int, set[int]] = {}
    sizes: dict[int, int] = {}
    joints_met: set[int] = set()
    for row, category, chosen in queries:
        assert valid[row, category]
        assert category not in chosen
        queried.setdefault(row, set()).add(category)
        sizes[row] = len(chosen)
        joints_met |= chosen
    low, high = counts.random_negatives
    negative_sizes = set(range(low, min(high, joints - 1) + 1))
    assert set(sizes.values()) == negative_sizes
    assert joints_met == set(range(joints))
    low, high = counts.random_queries
    query_sizes = {len(queried[row]) for row in range(40)}
    assert query_sizes == set(range(low, high + 1))
    # More combinations than one number in common could give.
    assert len({(len(queried[row]), sizes[row]) for row in range(40)}) > len(query_sizes) + len(negative_sizes) - 1
    assert all(queried[row] == set(valid[row].nonzero().flatten().tolist()) for row in queried if 40 <= row < 80)
    assert all(queried.get(row) == queried.get(row + 1) for row in range(0, 120, 2))
    assert set().union(*(queried[row] for row in range(40))) == set(range(joints))


def test_caps_are_per_joint_and_drawn_anew() -> None:
    embeddings, valid, _ = scene(0, rows=20)
    generator = seeded(3)
    times_drawn, times_queried = torch.zeros(2, *valid.shape, dtype=torch.long)
    for _ in range(30):
        pool = gather_pool(embeddings, valid, generator=generator)
        chosen = select(pool, "all", "inter", "all", JOINTS, 5, 7)
        assert chosen.drawn.sum(0).tolist() == [7] * 6
        assert torch.bincount(chosen.categories, minlength=6).tolist() == [5] * 6
        assert (chosen.queries_per_class, chosen.negatives_per_class, chosen.total) == (5, 7, 30)
        times_drawn += chosen.drawn
        times_queried[chosen.rows, chosen.categories] += 1
    for times in (times_drawn, times_queried):  # of 30, each of the 17 or so comes up about 12 and 9 times
        assert ((times > 0) == valid).all()
        assert times.max() < 25


def test_counts_are_per_joint() -> None:
    embeddings, _, hard = scene(rows=8)
    valid = torch.ones(8, 6, dtype=torch.bool)
    pool = gather_pool(embeddings, valid, instances=torch.arange(8) // 2, hardness=hard)
    met = [choose(pool, "hard", kind, JOINTS).negatives_per_class for kind in KINDS]
    assert met == [8, 6, 2]
    assert choose(pool, "all", KINDS[0], JOINTS).queries_per_class == 8


@pytest.mark.parametrize("sampler", ["all", "hard"])
def test_the_order_of_the_persons_changes_nothing(sampler: Any) -> None:
    embeddings, valid, hard = scene(2, rows=9)
    order = torch.randperm(9, generator=seeded())
    before = skcc_loss(embeddings, valid, sampler=sampler, hardness=hard)
    after = skcc_loss(embeddings[order], valid[order], sampler=sampler, hardness=hard[order])
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(
        prcc_loss(embeddings[order], valid[order], PAIRS_OF_JOINTS, sampler=sampler),
        prcc_loss(embeddings, valid, PAIRS_OF_JOINTS, sampler=sampler),
    )


def test_joints_that_are_not_valid_may_hold_anything() -> None:
    embeddings, valid, _ = scene(4)
    losses, gradients = [], []
    for filling in (0.0, math.nan):
        leaf = torch.where(valid[..., None], embeddings, filling).requires_grad_()
        loss = skcc_loss(leaf, valid) + prcc_loss(leaf, valid, PAIRS_OF_JOINTS)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not gradients[0][~valid].any()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda joints: st.lists(st.lists(st.booleans(), min_size=joints, max_size=joints), min_size=1, max_size=4)
    ),
    st.sampled_from(SAMPLERS),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
    st.integers(1, 3),
)
def test_no_batch_gives_a_nan(
    rows: list[list[bool]], sampler: Any, kind: dict[str, Any], dtype: torch.dtype, alike: bool, cap: int
) -> None:
    valid = torch.tensor(rows)
    count, joints = valid.shape
    vectors = torch.ones(count, joints, 4) if alike else torch.randn(count, joints, 4, generator=seeded())
    leaf = normalize(vectors.to(dtype), dim=-1).requires_grad_()
    caps: dict[str, Any] = {"max_queries": cap, "max_negatives": cap}
    hard = torch.zeros(count, joints)
    pairs = [(a, b) for a in range(joints) for b in range(a)]
    skcc = skcc_loss(leaf, valid, sampler=sampler, hardness=hard, generator=seeded(), **kind, **caps)
    prcc = prcc_loss(leaf, valid, pairs, sampler=sampler, generator=seeded(), **kind, **caps)
    present = valid.sum(0) if kind["contrast"] == "inter" else valid.sum(1)
    for loss, categories in ((skcc, joints), (prcc, len(pairs))):
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.dtype == dtype
        assert loss.isfinite()
        assert gradient.isfinite().all()
        nothing = present.max() < 2 or categories < 2
        if nothing:
            assert loss == 0
            assert not gradient.any()
    somebody = valid.any(1).sum()
    if kind == KINDS[0] and valid.sum(0).max() > 1 and valid.any(0).sum() > 1 and somebody > 1 and sampler == "all":
        assert skcc > 0


def test_unknown_choices_are_refused() -> None:
    embeddings, valid, _ = scene()
    for name in ("sampler", "contrast", "negatives"):
        wrong: dict[str, Any] = {name: "most"}
        with pytest.raises(ValueError, match=f"{name} 'most': choose"):
            skcc_loss(embeddings, valid, **wrong)
    with pytest.raises(ValueError, match="hardness"):
        skcc_loss(embeddings, valid, sampler="hard")


def test_sampling_is_bilinear_and_stays_on_the_map() -> None:
    maps = torch.randn(2, 3, 4, 5, generator=seeded(), dtype=torch.float64).requires_grad_()
    xy = torch.rand(2, 7, 2, generator=seeded(1)) * 8 - 2
    xy[0, 0], xy[0, 1], xy[1, 0] = torch.tensor([4.0, 3.0]), torch.tensor([0.0, 0.0]), math.nan
    sampled = sample_embeddings(maps, xy)
    assert sampled.shape == (2, 7, 1, 3)
    for person in range(2):
        for joint in range(7):
            x, y = (
                min(max(v, 0.0), end) for v, end in zip(xy[person, joint].nan_to_num().tolist(), (4, 3), strict=True)
            )
            left, top = min(int(x), 3), min(int(y), 2)
            value = torch.zeros(3, dtype=torch.float64)
            for j in (left, left + 1):
                for i in (top, top + 1):
                    value = value + maps[person, :, i, j] * (1 - abs(x - j)) * (1 - abs(y - i))
            torch.testing.assert_close(sampled[person, joint, 0], value / value.norm(), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(sampled.sum(), maps)
    assert gradient.isfinite().all()


def test_further_pixels_fill_the_disc() -> None:
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    maps = torch.stack([x, y, torch.full_like(x, 10.0)]).expand(3, -1, -1, -1)  # the direction tells the place
    xy = 12 + 5 * torch.rand(3, 5, 2, generator=seeded())
    sampled = sample_embeddings(maps, xy, pixels_per_joint=200, radius=6, generator=seeded(1))
    assert sampled.shape == (3, 5, 200, 3)
    away = 10 * sampled[..., :2] / sampled[..., 2:] - xy[:, :, None]
    distance = away.norm(dim=-1) / 6
    assert distance[:, :, 0].max() < 1e-4
    assert distance.max() < 1 + 1e-4
    further = distance[:, :, 1:]
    assert abs(further.square().mean() - 0.5) < 0.03  # the squared distance is uniform in a disc
    assert abs(further.square().var() - 1 / 12) < 0.01
    assert away.mean((0, 1, 2)).abs().max() < 0.25
    again = sample_embeddings(maps, xy, pixels_per_joint=200, radius=6, generator=seeded(1))
    assert torch.equal(again, sampled)


def test_the_head_projects_to_unit_length() -> None:
    head = ProjectionHead(6, 4)
    output = head(torch.randn(3, 6, 5, 4, generator=seeded()))
    assert output.shape == (3, 4, 5, 4)
    torch.testing.assert_close(output.square().sum(1), torch.ones(3, 5, 4))
    assert sum(p.numel() for p in head.parameters()) == 6 * 6 + 2 * 6 + (6 * 4 + 4)


def test_hardness_is_entropy_plus_error() -> None:
    predicted = torch.randn(4, 5, 3, 2, generator=seeded(), dtype=torch.float64)
    target = torch.rand(4, 5, 3, 2, generator=seeded(1), dtype=torch.float64)
    predicted[0, 0] = 0
    valid = torch.rand(4, 5, generator=seeded(2)) < 0.8
    valid[0, 0] = True
    entropies, errors = {}, {}
    for place in valid.nonzero().tolist():
        shares = [max(value, 0.0) for value in predicted[*place].flatten().tolist()]
        shares = [share / sum(shares) for share in shares] if sum(shares) else [1 / 6] * 6
        entropies[*place] = -sum(share * math.log(share) for share in shares if share)
        squares = [(p - t) ** 2 for p, t in zip(predicted[*place].flatten(), target[*place].flatten(), strict=True)]
        errors[*place] = float(sum(squares)) / 6
    assert max(entropies, key=lambda place: entropies[place]) == (0, 0)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for scores in (entropies, errors):
        mean = sum(scores.values()) / len(scores)
        deviation = math.sqrt(sum((score - mean) ** 2 for score in scores.values()) / len(scores))
        for place, score in scores.items():
            expected[*place] += (score - mean) / deviation
    torch.testing.assert_close(hardness(predicted, target, valid), expected)


@pytest.mark.parametrize("value", [0.0, -1.0, 0.1])
def test_constant_maps_are_all_as_hard(value: float) -> None:
    predicted, target = torch.full((3, 4, 5, 6), value), torch.zeros(3, 4, 5, 6)
    for valid in (torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)):
        assert not hardness(predicted, target, valid).any()


def batch(seed: int = 0, persons: int = 4) -> dict[str, Any]:
    """What icon_loss takes, in float64."""
    generator = seeded(seed)
    maps = torch.randn(persons, 8, 6, 5, generator=generator, dtype=torch.float64)
    return {
        "maps": normalize(maps, dim=1),
        "xy": torch.rand(persons, 6, 2, generator=generator, dtype=torch.float64) * 4,
        "valid": torch.rand(persons, 6, generator=generator) < 0.8,
        "predicted": torch.rand(persons, 6, 12, 10, generator=generator),
        "targets": torch.rand(persons, 6, 12, 10, generator=generator),
        "pairs": PAIRS_OF_JOINTS,
        "radius": 1.0,
        "tau": 0.2,
    }


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_icon_is_the_sum_of_its_parts(sampler: Any) -> None:
    given_batch, pixels = batch(), 2
    found = icon_loss(**given_batch, sampler=sampler, pixels_per_joint=pixels, generator=seeded(5))
    generator = seeded(5)
    sampled = sample_embeddings(
        given_batch["maps"], given_batch["xy"], pixels_per_joint=pixels, radius=1.0, generator=generator
    )
    rows = torch.cat([sampled[person, :, pixel][None] for person in range(4) for pixel in range(pixels)])
    repeat = [person for person in range(4) for _ in range(pixels)]
    hard = hardness(given_batch["predicted"], given_batch["targets"], given_batch["valid"])[repeat]
    skcc = skcc_loss(
        rows,
        given_batch["valid"][repeat],
        instances=torch.tensor(repeat),
        hardness=hard,
        sampler=sampler,
        tau=0.2,
        generator=generator,
    )
    torch.testing.assert_close(found.skcc, skcc)
    torch.testing.assert_close(found.total, 0.3 * found.skcc + 0.7 * found.prcc)
    if sampler != "random":
        valid, persons = given_batch["valid"][repeat], torch.tensor(repeat)
        prcc = prcc_loss(rows, valid, PAIRS_OF_JOINTS, instances=persons, sampler=sampler, tau=0.2)
        torch.testing.assert_close(found.prcc, prcc)
    assert found.prcc > 0
    assert found.negatives > pixels


def test_a_part_without_weight_or_pairs_is_left_out() -> None:
    whole = batch()
    both = icon_loss(**whole, generator=seeded())
    skcc = icon_loss(**whole, lambda_1=1.0, lambda_2=0.0, generator=seeded())
    prcc = icon_loss(**whole, lambda_1=0.0, lambda_2=0.5, generator=seeded())
    assert (skcc.total, skcc.prcc, skcc.queries) == (both.skcc, 0, both.queries)
    torch.testing.assert_close(prcc.total, 0.5 * both.prcc)
    assert prcc.skcc == 0
    assert prcc.queries != both.queries
    assert icon_loss(**{**whole, "pairs": []}, generator=seeded()).total == 0.3 * both.skcc
    whole["maps"].requires_grad_()
    nothing = icon_loss(**{**whole, "pairs": []}, lambda_1=0.0, lambda_2=1.0, generator=seeded())
    nothing.total.backward()
    assert (nothing.total, nothing.queries, nothing.negatives) == (0, 0, 0)
    assert not whole["maps"].grad.any()


def test_joints_off_the_map_do_not_take_part() -> None:
    inside, outside = batch(), batch()
    inside["valid"][0, 1] = inside["valid"][2, 3] = inside["valid"][3, 0] = False
    outside["valid"][0, 1] = outside["valid"][2, 3] = outside["valid"][3, 0] = True
    outside["xy"][0, 1] = torch.tensor([5.1, 2.0])
    outside["xy"][2, 3] = torch.tensor([2.0, -0.6])
    outside["xy"][3, 0] = math.nan
    assert icon_loss(**outside, generator=seeded()).total == icon_loss(**inside, generator=seeded()).total


def test_bf16_autocast_contrasts_in_float32() -> None:
    given_batch = batch()
    head = ProjectionHead(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        given_batch["maps"] = head(given_batch["maps"].float())
        found = icon_loss(**given_batch, generator=seeded())
    outside = icon_loss(**given_batch, generator=seeded())
    assert found.total.dtype == torch.float32
    assert all(value.isfinite() for value in found)
    assert found.total == outside.total
    found.total.backward()
    gradients = [parameter.grad for parameter in head.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    embeddings, valid, _ = scene()
    loss = skcc_loss(embeddings.bfloat16(), valid)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, skcc_loss(embeddings, valid).float(), rtol=0.05, atol=0.05)


def shared_losses(rank: int, world: int) -> list[Tensor]:
    """Losses and a weight's gradients of several settings, averaged over the processes as DDP does; and hardness."""
    found = []
    whole = batch(3, persons=6)
    share = slice(6 // world * rank, 6 // world * (rank + 1))
    settings: list[dict[str, Any]] = [
        *({"sampler": sampler, **kind} for sampler in SAMPLERS for kind in KINDS),
        {"sampler": "random", "max_queries": 3, "max_negatives": 2},
        {"sampler": "hard", "empty": True},
    ]
    for setting in settings:
        mine = {name: value[share] if isinstance(value, Tensor) else value for name, value in whole.items()}
        if setting.pop("empty", False):
            kept = torch.arange(6) < 3  # the second process has nothing to query
            mine["valid"] = mine["valid"] & kept[share, None]
        weight = torch.randn(8, 8, generator=seeded(), dtype=torch.float64).requires_grad_()
        mine["maps"] = normalize(torch.einsum("nchw,cd->ndhw", mine["maps"], weight), dim=1)
        loss = icon_loss(**mine, **setting, generator=seeded(rank)).total
        loss.backward()
        assert weight.grad is not None
        values = torch.cat([loss.detach()[None], weight.grad.flatten()])
        if world > 1:
            torch.distributed.all_reduce(values)
        found.append(values / world)
    whole["predicted"][3:] *= 5  # other scores in the second process
    scores = torch.zeros(6, 6)
    scores[share] = hardness(whole["predicted"][share], whole["targets"][share], whole["valid"][share], gather=True)
    if world > 1:
        torch.distributed.all_reduce(scores)
    return [*found, scores]


def rank_main(argv: list[str]) -> int:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = shared_losses(rank, 2)
    if rank == 0:
        torch.save(found, argv[0])
    torch.distributed.destroy_process_group()
    return 0


def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(rank_main, [str(tmp_path / "found.pt")], log, environment) for environment in ranks(2)]
    assert [finish(process) for process in processes] == [0, 0], log.read_text()
    together = torch.load(tmp_path / "found.pt")
    alone = shared_losses(0, 1)
    assert len(together) == len(alone) == 12
    for two, one in zip(together[:-1], alone[:-1], strict=True):
        assert one[0] > 0.1
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together[-1], alone[-1])
