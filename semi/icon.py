"""ICON: joints and pairs of joints contrasted between persons (Xu et al., AAAI 2023), Eq. 1-5.

A category is a joint (SKCC, Eq. 1) or a pair of adjacent joints (PRCC, Eq. 3-4); K counts them. An instance is a
person; with several pixels per joint it has that many rows, and N counts rows. All draws come from a generator on the
CPU, so that a resumed run repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from lightly.models.utils import concat_all_gather
from lightly.utils import dist
from torch import Tensor, nn
from torch.nn.functional import grid_sample, normalize, softplus

Sampler = Literal["all", "random", "hard"]
Contrast = Literal["inter", "intra"]
Negatives = Literal["all", "others"]


class ProjectionHead(nn.Module):
    """1x1 convolution, batch norm, ReLU, 1x1 convolution; for training only (readings ICON 1).

    Args:
        in_channels: of the backbone's map, and of the hidden layer.
        channels: m, of the embeddings.
    """

    def __init__(self, in_channels: int, channels: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, channels, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Turn a map `[N, C, h, w]` into embeddings `[N, m, h, w]`, each pixel's of length 1."""
        return normalize(self.layers(maps), dim=1)


class SamplerCounts(NamedTuple):
    """How many categories the samplers choose for an instance; less where it has fewer."""

    hard_queries: int | None
    """Q; None: all."""
    hard_negatives: int
    """H."""
    random_queries: tuple[int, int]
    """Least and most."""
    random_negatives: tuple[int, int]


JOINTS = SamplerCounts(hard_queries=5, hard_negatives=6, random_queries=(6, 9), random_negatives=(5, 10))
PAIRS = SamplerCounts(hard_queries=None, hard_negatives=4, random_queries=(3, 5), random_negatives=(4, 8))


class Pool(NamedTuple):
    """What is contrasted: the rows of one process, or of all processes in their order."""

    embeddings: Tensor
    """`[N, K, m]`, zero where not valid."""
    valid: Tensor
    """`[N, K]`."""
    instances: Tensor
    """For each row the first row of its instance, `[N]`."""
    hardness: Tensor | None
    """`[N, K]`."""
    own: slice
    """The rows of this process; only these does it query."""
    world: int
    """Number of processes."""
    generator: torch.Generator
    """The same on every process."""


class Selection(NamedTuple):
    """Queries, Q of this process, and what may be their negatives."""

    rows: Tensor
    """Of the pool, `[Q]`."""
    categories: Tensor
    """`[Q]`."""
    total: Tensor
    """Number of queries of all processes."""
    negative_categories: Tensor
    """`[Q, K]`."""
    drawn: Tensor
    """Which of the pool are negatives of other categories' queries, `[N, K]`."""
    queries_per_class: Tensor
    """Mean over the categories that have any, all processes."""
    negatives_per_class: Tensor
    """Mean over this process's queries and their negative categories."""


class IconLoss(NamedTuple):
    """Scalars. Over several processes the mean of the losses is that of one process with all of the batch."""

    total: Tensor
    """Of Eq. 5."""
    skcc: Tensor
    """Eq. 1."""
    prcc: Tensor
    """Eq. 4."""
    queries: Tensor
    """Per joint (per pair where SKCC is off), of all processes; without gradient, as is the next."""
    negatives: Tensor
    """That a query meets per negative joint (pair)."""


def icon_loss(
    maps: Tensor,
    xy: Tensor,
    valid: Tensor,
    predicted: Tensor,
    targets: Tensor,
    pairs: Sequence[Sequence[int]],
    *,
    radius: float,
    generator: torch.Generator,
    lambda_1: float = 0.3,
    lambda_2: float = 0.7,
    tau: float = 0.07,
    sampler: Sampler = "hard",
    contrast: Contrast = "inter",
    negatives: Negatives = "all",
    pixels_per_joint: int = 1,
    max_queries: int = 256,
    max_negatives: int = 512,
    normalise_pairs: bool = True,
) -> IconLoss:
    """lambda_1 SKCC + lambda_2 PRCC (Eq. 5) of a batch of persons, contrasted with those of all processes.

    Args:
        maps: of the projection head, `[N, m, h, w]`.
        xy: joints `[N, K, 2]` in the map's pixels; those off the map do not take part.
        valid: `[N, K]`; joints that take part.
        predicted: heatmaps `[N, K, H, W]`, which the hard sampler judges; no gradient reaches them.
        targets: of these.
        pairs: of adjacent joints, as indices; none: no PRCC.
        radius: of the disc that further pixels of a joint come from, map pixels.
        generator: on the CPU.
        lambda_1: weight of SKCC; 0 leaves it out.
        lambda_2: weight of PRCC; 0 leaves it out.
        tau: as `skcc_loss`, as all that follow.
        sampler: which joints are queried, and which are their negatives.
        contrast: where positives come from.
        negatives: where negatives come from.
        pixels_per_joint: embeddings sampled for each joint.
        max_queries: per joint or pair.
        max_negatives: per joint or pair.
        normalise_pairs: as `prcc_loss`.

    Raises:
        ValueError: an unknown sampler, contrast or choice of negatives.
    """
    _check(sampler, contrast, negatives)
    height, width = maps.shape[-2:]
    # With the "hrnet" alignment a picture's last pixels lie almost half a map pixel beyond the map's last edge.
    inside = (xy > -0.5) & (xy < xy.new_tensor([width, height]))
    valid = valid & inside.all(-1)
    with torch.autocast(maps.device.type, enabled=False):
        embeddings = sample_embeddings(maps, xy, pixels_per_joint=pixels_per_joint, radius=radius, generator=generator)
        hard = hardness(predicted, targets, valid, gather=True) if sampler == "hard" and lambda_1 else None
        pool = gather_pool(
            embeddings.transpose(1, 2).flatten(0, 1),
            valid.repeat_interleave(pixels_per_joint, 0),
            instances=torch.arange(len(maps), device=maps.device).repeat_interleave(pixels_per_joint),
            hardness=None if hard is None else hard.repeat_interleave(pixels_per_joint, 0),
            generator=generator,
            gather=True,
        )
        # Part of the graph, as processes that wait for each other's gradients need it.
        skcc = prcc = 0 * pool.embeddings.sum()
        found: list[Selection] = []
        if lambda_1:
            found.append(select(pool, sampler, contrast, negatives, JOINTS, max_queries, max_negatives))
            skcc = contrast_loss(pool, found[-1], tau, contrast, negatives)
        if lambda_2 and pairs:
            pair_pool = pool_of_pairs(pool, pairs, normalise_pairs)
            found.append(select(pair_pool, sampler, contrast, negatives, PAIRS, max_queries, max_negatives))
            prcc = contrast_loss(pair_pool, found[-1], tau, contrast, negatives)
        none = skcc.detach() * 0
        queries, met = (found[0].queries_per_class, found[0].negatives_per_class) if found else (none, none)
    return IconLoss(lambda_1 * skcc + lambda_2 * prcc, skcc, prcc, queries.to(skcc), met.to(skcc))


def skcc_loss(
    embeddings: Tensor,
    valid: Tensor,
    *,
    tau: float = 0.07,
    sampler: Sampler = "all",
    instances: Tensor | None = None,
    hardness: Tensor | None = None,
    contrast: Contrast = "inter",
    negatives: Negatives = "all",
    hard_queries: int = 5,
    hard_negatives: int = 6,
    max_queries: int = 256,
    max_negatives: int = 512,
    generator: torch.Generator | None = None,
    gather: bool = False,
) -> Tensor:
    """Single keypoint contrastive consistency, Eq. 1, averaged over the queries.

    One term for each positive, against all negatives of the query; mean over the positives, then over the queries that
    have a positive and a negative. Zero, with zero gradients, where there is none.

    Args:
        embeddings: `[N, K, m]`, L2-normalised.
        valid: `[N, K]`; joints that take part.
        tau: temperature.
        sampler: "all": every valid joint is queried, against all others; "random": of each instance 6 to 9 joints,
            against 5 to 10; "hard": of each instance the `hard_queries` with the highest hardness, against the
            `hard_negatives` joints whose mean embedding is the most similar to the query.
        instances: the number of each row's instance, `[N]`; by default each row is one of its own.
        hardness: `[N, K]`, for the hard sampler.
        contrast: "inter": the same joint of the other instances is positive; "intra": the query itself is, and the
            other joints of its own instance are negative (Table 5).
        negatives: other joints of "all" instances, or of the "others" only.
        hard_queries: Q.
        hard_negatives: H.
        max_queries: of each joint; drawn where there are more.
        max_negatives: of each joint; drawn where there are more. Not for "intra".
        generator: on the CPU; by default torch's global one.
        gather: contrast with the joints of all processes, each of which must call with the same N, and queries its
            own. The mean of their losses, and so DDP's mean of their gradients, is that of one process with all
            joints in the order of the processes and the generator of the first.

    Returns:
        A scalar in the embeddings' dtype, at least float32.

    Raises:
        ValueError: an unknown sampler, contrast or choice of negatives; the hard sampler without hardness.
    """
    _check(sampler, contrast, negatives)
    if sampler == "hard" and hardness is None:
        raise ValueError("sampler 'hard' needs the joints' hardness")
    counts = JOINTS._replace(hard_queries=hard_queries, hard_negatives=hard_negatives)
    with torch.autocast(embeddings.device.type, enabled=False):
        pool = gather_pool(
            embeddings, valid, instances=instances, hardness=hardness, generator=generator, gather=gather
        )
        selection = select(pool, sampler, contrast, negatives, counts, max_queries, max_negatives)
        return contrast_loss(pool, selection, tau, contrast, negatives)


def prcc_loss(
    embeddings: Tensor,
    valid: Tensor,
    pairs: Sequence[Sequence[int]],
    *,
    tau: float = 0.07,
    sampler: Sampler = "all",
    instances: Tensor | None = None,
    contrast: Contrast = "inter",
    negatives: Negatives = "all",
    hard_negatives: int = 4,
    max_queries: int = 256,
    max_negatives: int = 512,
    normalise_pairs: bool = True,
    generator: torch.Generator | None = None,
    gather: bool = False,
) -> Tensor:
    """Pair relation contrastive consistency, Eq. 2-4: SKCC of the means of adjacent joints.

    `pairs` lists the adjacent joints as indices (those for which Eq. 2 is 1); a pair is valid where both joints are.
    "random" queries 3 to 5 pairs of each instance against 4 to 8, "hard" all pairs against the `hard_negatives` most
    similar ones. `normalise_pairs` brings the means of Eq. 3 back to length 1. Everything else, and the ValueErrors, as
    in `skcc_loss`; zero without pairs.
    """
    _check(sampler, contrast, negatives)
    counts = PAIRS._replace(hard_negatives=hard_negatives)
    with torch.autocast(embeddings.device.type, enabled=False):
        pool = gather_pool(embeddings, valid, instances=instances, generator=generator, gather=gather)
        if not pairs:
            return 0 * pool.embeddings.sum()
        pool = pool_of_pairs(pool, pairs, normalise_pairs)
        selection = select(pool, sampler, contrast, negatives, counts, max_queries, max_negatives)
        return contrast_loss(pool, selection, tau, contrast, negatives)


def sample_embeddings(
    maps: Tensor,
    xy: Tensor,
    *,
    pixels_per_joint: int = 1,
    radius: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Embeddings at the joints, bilinear, L2-normalised again: `[N, K, P, m]`, P = `pixels_per_joint`.

    maps `[N, m, h, w]`; xy `[N, K, 2]` in the map's pixels, (0, 0) the centre of the top-left one; off the map, the
    nearest place on it (NaN: the top-left). The first pixel is the joint, further ones are uniform in the disc of
    `radius` map pixels about it, drawn by a generator on the CPU. In the maps' dtype, at least float32.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    height, width = maps.shape[-2:]
    turn, area = torch.rand(2, *xy.shape[:2], pixels_per_joint - 1, generator=generator).to(maps)
    distance, angle = radius * area.sqrt(), 2 * math.pi * turn
    further = torch.stack([distance * angle.cos(), distance * angle.sin()], -1)
    centre = xy.to(maps).nan_to_num()[:, :, None]
    places = torch.cat([centre, centre + further], 2)  # [N, K, P, 2]
    last = maps.new_tensor([width - 1, height - 1])
    grid = 2 * places / last.clamp(min=1) - 1
    sampled = grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return normalize(sampled.permute(0, 2, 3, 1), dim=-1)


@torch.no_grad()
def hardness(predicted: Tensor, target: Tensor, valid: Tensor, *, gather: bool = False) -> Tensor:
    """How hard each joint is: its heatmap's entropy plus its squared error, each standardised (readings ICON 5).

    predicted and target heatmaps `[N, K, h, w]`, valid `[N, K]`. The entropy is of the map divided by its sum, negative
    values taken as 0 and a map without positive ones as uniform. Mean and deviation are of the valid joints, of all
    processes if `gather`. Returns `[N, K]` in the maps' dtype, at least float32; 0 where not valid.
    """
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    positive = predicted.clamp(min=0).flatten(2)
    mass = positive.sum(-1)
    # The entropy of positive / mass without dividing every pixel.
    entropy = mass.log() + torch.special.entr(positive).sum(-1) / mass
    entropy = torch.where(mass > 0, entropy, math.log(positive.shape[-1]))
    error = (predicted - target).square_().mean((-2, -1))
    # In float64, so that scores that are all alike have no deviation but 0.
    scores = torch.stack([entropy, error], -1).double()
    seen, known = scores, valid.double()
    if gather and dist.world_size() > 1:
        seen, known = concat_all_gather(scores), concat_all_gather(known)
    number, known = known.sum().clamp(min=1), known[..., None]
    mean = (seen * known).sum((0, 1)) / number
    deviation = ((seen - mean).square() * known).sum((0, 1)).div(number).sqrt()
    standard = (scores - mean) / deviation.clamp(min=1e-12)
    return torch.where(valid, standard.sum(-1), 0).to(predicted.dtype)


def gather_pool(
    embeddings: Tensor,
    valid: Tensor,
    *,
    instances: Tensor | None = None,
    hardness: Tensor | None = None,
    generator: torch.Generator | None = None,
    gather: bool = False,
) -> Pool:
    """The pool of this process, or if `gather` of all of them; arguments as in `skcc_loss`.

    Gradients go back to the process that an embedding came from, summed over those that met it.
    """
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    embeddings = torch.where(valid[..., None], embeddings, 0)
    rows, device = len(valid), embeddings.device
    if instances is None:
        first = torch.arange(rows, device=device)
    else:
        first = (instances[:, None] == instances).to(torch.uint8).argmax(1)
    seed = torch.randint(2**63 - 1, (1, 1), generator=generator)
    rank, world = (dist.rank(), dist.world_size()) if gather else (0, 1)
    if world > 1:
        described = torch.cat([valid.long(), (first + rank * rows)[:, None], seed.to(device).expand(rows, 1)], 1)
        described = concat_all_gather(described)
        valid, first, seed = described[:, :-2] > 0, described[:, -2], described[0, -1]
        embeddings = torch.cat(dist.gather(embeddings.contiguous()))
        hardness = None if hardness is None else concat_all_gather(hardness.contiguous())
    own = slice(rank * rows, (rank + 1) * rows)
    return Pool(embeddings, valid, first, hardness, own, world, torch.Generator().manual_seed(int(seed)))


def pool_of_pairs(pool: Pool, pairs: Sequence[Sequence[int]], normalise: bool) -> Pool:
    """Eq. 3 for each of the pairs of adjacent joints, which become the categories."""
    first, second = ([pair[end] for pair in pairs] for end in (0, 1))
    embeddings = (pool.embeddings[:, first] + pool.embeddings[:, second]) / 2
    valid = pool.valid[:, first] & pool.valid[:, second]
    if normalise:
        embeddings = normalize(embeddings, dim=-1)
    return pool._replace(embeddings=torch.where(valid[..., None], embeddings, 0), valid=valid, hardness=None)


@torch.no_grad()
def select(
    pool: Pool,
    sampler: Sampler,
    contrast: Contrast,
    negatives: Negatives,
    counts: SamplerCounts,
    max_queries: int,
    max_negatives: int,
) -> Selection:
    """Choose queries and negatives (ICON, "Hard Sampling"); the same on all processes, but for what is their own."""
    valid, instances = pool.valid, pool.instances
    rows, categories = valid.shape
    draws = torch.rand(rows, 4 * categories + 2, generator=pool.generator).to(valid.device)
    query_order, negative_order, query_cap, negative_cap, sizes = draws.split([categories] * 4 + [2], 1)

    drawn = valid if contrast == "intra" else _first(negative_cap.T, max_negatives, valid.T).T
    available = _met(drawn, instances, "own" if contrast == "intra" else negatives)
    candidates = available > 0  # [N, K], for queries of other categories
    queried = valid & (candidates.sum(1, keepdim=True) > candidates.long())
    if contrast == "inter":
        queried &= _met(valid, instances, "others") > 0
    if sampler == "random":
        size = _between(sizes[instances, :1], counts.random_queries)
        queried &= _first(query_order[instances], size, valid)
    elif sampler == "hard" and counts.hard_queries is not None:
        assert pool.hardness is not None
        queried &= _first(-pool.hardness, counts.hard_queries, valid)
    queried = _first(query_cap.T, max_queries, queried.T).T

    row, category = queried[pool.own].nonzero(as_tuple=True)
    row = row + pool.own.start
    chosen = candidates[row].scatter(1, category[:, None], False)  # [Q, K]
    if sampler == "random":
        size = _between(sizes[instances[row], 1:], counts.random_negatives)
        chosen = _first(negative_order[instances[row]], size, chosen)
    elif sampler == "hard":
        means = normalize(pool.embeddings.sum(0), dim=1)  # of the valid, the others being 0; [K, m]
        chosen = _first(-(pool.embeddings[row, category] @ means.T), counts.hard_negatives, chosen)

    queries = queried.sum(0)
    met = torch.where(chosen, available[row], 0).sum(1) / chosen.sum(1)
    return Selection(
        rows=row,
        categories=category,
        total=queries.sum(),
        negative_categories=chosen,
        drawn=drawn,
        queries_per_class=queries.sum() / (queries > 0).sum().clamp(min=1),
        negatives_per_class=met.sum() / max(len(met), 1),
    )


def contrast_loss(pool: Pool, selection: Selection, tau: float, contrast: Contrast, negatives: Negatives) -> Tensor:
    """Eq. 1 and 4: this process's share of the mean over all queries, times the number of processes."""
    rows, categories = selection.rows, selection.categories
    queries = pool.embeddings[rows, categories]  # [Q, m]
    others = pool.instances[rows, None] != pool.instances  # [Q, N]
    contrasted = pool.embeddings.transpose(0, 1)  # [K, N, m]: a category's rows side by side
    similarity = (queries / tau @ contrasted.flatten(0, 1).T).unflatten(1, contrasted.shape[:2])  # [Q, K, N]
    if contrast == "intra":
        positive = (queries.square().sum(1, keepdim=True)) / tau
        is_positive = torch.ones_like(positive, dtype=torch.bool)
    else:
        positive = similarity[torch.arange(len(rows), device=rows.device), categories]  # [Q, N]
        is_positive = others & pool.valid.T[categories]

    # Added in place: masks of the size of the similarities would cost as much as they do. Finite, since a category
    # without any negative has no gradient at -inf.
    floor = torch.finfo(similarity.dtype).min / 4
    similarity += similarity.new_zeros(contrasted.shape[:2]).masked_fill(~selection.drawn.T, floor)
    if contrast == "intra":
        similarity += similarity.new_zeros(others.shape).masked_fill(others, floor)[:, None]
    elif negatives == "others":
        similarity += similarity.new_zeros(others.shape).masked_fill(~others, floor)[:, None]
    by_category = similarity.logsumexp(2).masked_fill(~selection.negative_categories, -math.inf)
    # -log(exp(p) / (exp(p) + sum of the negatives' exp)) = softplus(log of that sum - p)
    terms = softplus(by_category.logsumexp(1)[:, None] - positive)
    mean = torch.where(is_positive, terms, 0).sum(1) / is_positive.sum(1)
    return mean.sum() * pool.world / selection.total.clamp(min=1)


def _check(sampler: str, contrast: str, negatives: str) -> None:
    if sampler not in ("all", "random", "hard"):
        raise ValueError(f"sampler {sampler!r}: choose 'all', 'random' or 'hard'")
    if contrast not in ("inter", "intra"):
        raise ValueError(f"contrast {contrast!r}: choose 'inter' or 'intra'")
    if negatives not in ("all", "others"):
        raise ValueError(f"negatives {negatives!r}: choose 'all' or 'others'")


def _met(present: Tensor, instances: Tensor, whose: Literal["own", "others", "all"]) -> Tensor:
    """How many of each category `[N, K]` each row finds in its own instance, in the others, or in all."""
    own = torch.zeros(present.shape, dtype=torch.long, device=present.device)
    own = own.index_add_(0, instances, present.long())[instances]
    everywhere = present.sum(0).expand_as(own)
    return {"own": own, "others": everywhere - own, "all": everywhere}[whose]


def _between(draws: Tensor, limits: tuple[int, int]) -> Tensor:
    """Whole numbers from the first limit to the second, each as likely, from draws in [0, 1)."""
    low, high = limits
    return low + (draws * (high - low + 1)).long()


def _first(scores: Tensor, count: int | Tensor, allowed: Tensor) -> Tensor:
    """Which of the allowed have the `count` lowest scores along the last axis."""
    order = scores.masked_fill(~allowed, math.inf).sort(dim=-1, stable=True).indices
    return allowed & (order.argsort(-1) < count)
