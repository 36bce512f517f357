"""Exact nearest neighbours by cosine similarity, from faiss or torch with the same answer, and the kNN classifier.

Vectors are rounded to a grid on which float64 similarities are exact, so a tie is a tie in both, in any order of
summation, whatever the number of threads and wherever the blocks end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import UserError

Backend = Literal["auto", "faiss", "torch"]

CHUNK = 4096
GRID = 2.0**24
IN_CACHE = 2**18
"""Numbers of a block that is passed over a few times: larger ones are three times slower on a CPU."""


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors `[N, d]` to length 1, float32 with components that are multiples of 2^-24; a zero vector stays.

    A product of two components is a multiple of 2^-48 and, by Cauchy and Schwarz, every partial sum of a similarity
    stays below 2: float64 holds it without rounding.

    Raises:
        ValueError: not a matrix, or a vector with NaN or infinity.
    """
    if vectors.ndim != 2:
        raise ValueError(f"vectors are {list(vectors.shape)}, expected [N, d]")
    rounded = torch.empty(vectors.shape, device=vectors.device)
    rows = max(1, IN_CACHE // max(1, vectors.shape[1]))
    for start in range(0, len(vectors), rows):
        block = vectors[start : start + rows].detach().double()
        length = torch.linalg.vector_norm(block, dim=1, keepdim=True)
        finite = length.isfinite()
        if not finite.all():
            raise ValueError(f"vector {start + int(finite.int().argmin())} of {len(vectors)} holds NaN or infinity")
        scaled = block / length.where(length > 0, 1.0)
        rounded[start : start + rows] = scaled.mul_(GRID).round_().div_(GRID)
    return rounded


def nearest(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    chunk: int = CHUNK,
    backend: Backend = "auto",
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The k vectors of `bank` `[N, d]` most similar to each of `queries` `[Q, d]`, by cosine similarity.

    Similarity `[Q, k]`, float32, falling, and index `[Q, k]` into the bank, on the queries' device; of equal
    similarities the lower index comes first.

    Args:
        chunk: queries and bank vectors compared at once: about 16 chunk^2 bytes are used beside unit copies of both.
        backend: auto takes faiss on the CPU where it is installed, else torch.
        device: where torch compares, blocks of the bank being moved there; by default the queries' own.

    Raises:
        ValueError: k is not in 1..N, the lengths differ, or a vector holds NaN or infinity.
        UserError: faiss is asked for and not installed.
    """
    if k < 1 or len(bank) < k:
        raise ValueError(f"k is {k}, expected at least 1 and at most the {len(bank)} vectors of the bank")
    found = list(_search(bank, queries, k, chunk, backend, device))
    if not found:
        empty = torch.empty(0, k, device=queries.device)
        return empty, empty.long()
    similarity = torch.cat([block.float() for _, block, _ in found])
    return similarity.to(queries.device), torch.cat([index for _, _, index in found]).to(queries.device)


def knn_classify(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    classes: int,
    k: int = 200,
    temperature: float = 0.07,
    exclude: Tensor | None = None,
    chunk: int = CHUNK,
    backend: Backend = "auto",
    device: torch.device | None = None,
) -> Tensor:
    """Class `[Q]`, int64, of each of `queries` `[Q, d]` by a weighted vote of its k nearest in `bank` `[N, d]`.

    A neighbour of similarity s gives its class exp(s / temperature) (Wu et al., Instance Discrimination, 2018, section
    3.4); equal votes go to the lower class. Their temperature is 0.07; lightly has 0.1, SimSiam's authors took 0.2.

    Args:
        labels: `[N]` int64 in 0..classes - 1.
        exclude: `[Q]` int64, index of the bank's vector that may not vote for the query, e.g. itself.
        chunk, backend, device: as in `nearest`; nothing larger than `[chunk, classes]` is added.

    Raises:
        ValueError: k is not in 1..N (1..N - 1 with `exclude`), or as `nearest`.
    """
    others = len(bank) - (exclude is not None)
    if k < 1 or others < k:
        raise ValueError(f"k is {k}, expected at least 1 and at most the {others} vectors that can vote")
    predicted = []
    for start, similarity, index in _search(bank, queries, k + (exclude is not None), chunk, backend, device):
        if exclude is not None:
            own = exclude[start : start + len(index), None].to(index.device)
            similarity, index = _without(similarity, index, own)
        # relative to the nearest: the ranking of the votes is the same and nothing overflows
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(index), classes, dtype=weights.dtype, device=weights.device)
        votes.scatter_add_(1, labels.to(index.device)[index], weights)
        predicted.append(votes.argmax(1).to(queries.device))
    return torch.cat(predicted) if predicted else torch.empty(0, dtype=torch.int64, device=queries.device)


def _search(
    bank: Tensor, queries: Tensor, k: int, chunk: int, backend: Backend, device: torch.device | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first query, similarity `[q, k]` float64, index `[q, k]`) of each block of queries."""
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")
    if bank.shape[1:] != queries.shape[1:]:
        raise ValueError(f"bank {list(bank.shape)} and queries {list(queries.shape)} differ in length")
    device = device or queries.device
    faiss = _faiss() if backend == "faiss" or (backend == "auto" and device.type == "cpu") else None
    if faiss is None and backend == "faiss":
        raise UserError("faiss is not installed; install the extra cpu (or gpu), or use the backend torch")
    if faiss is not None:
        device = torch.device("cpu")
        bank = bank.to(device)
    bank, queries = unit(bank), unit(queries)
    for start in range(0, len(queries), chunk):
        block = queries[start : start + chunk].to(device)
        found = _with_torch(bank, block, k, chunk) if faiss is None else _with_faiss(faiss, bank, block, k, chunk)
        yield start, *found


def _with_torch(bank: Tensor, queries: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Exact top k of unit vectors, one block of the bank after the other."""
    exact = queries.double()
    similarity = torch.empty(len(queries), 0, dtype=torch.float64, device=queries.device)
    index = similarity.long()
    for start in range(0, len(bank), chunk):
        block = exact @ bank[start : start + chunk].to(queries.device).double().T
        values, columns = _top(block, min(k, block.shape[1]))
        # the blocks before hold the lower indices: a stable sort keeps them first
        similarity, order = torch.cat([similarity, values], 1).sort(dim=1, descending=True, stable=True)
        index = torch.cat([index, columns + start], 1).gather(1, order)[:, :k]
        similarity = similarity[:, :k]
    return similarity, index


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, falling, the lower column first where they are equal."""
    if k == similarity.shape[1]:
        return similarity.sort(dim=1, descending=True, stable=True)
    values, columns = similarity.topk(k + 1, dim=1)
    # topk takes any of equal values; where the last one taken equals the first one left, sort the whole row
    tied = values[:, k - 1] == values[:, k]
    values, columns = _ordered(values[:, :k], columns[:, :k])
    if tied.any():
        whole, order = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = whole[:, :k], order[:, :k]
    return values, columns


def _ordered(similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row by falling similarity, then by rising index."""
    index, order = index.sort(dim=1)
    similarity, by_similarity = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity, index.gather(1, by_similarity)


def _with_faiss(faiss: Any, bank: Tensor, queries: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Exact top k of unit vectors: some more than k by faiss in float32, compared again exactly.

    A vector that faiss left out has at most the last similarity it gave plus its rounding error. Where that may reach
    the k-th exact one, as it does among near-duplicates, torch searches again.
    """
    # the two may bring an OpenMP runtime each, and faiss would take every core
    faiss.omp_set_num_threads(torch.get_num_threads())
    wanted = min(len(bank), k + max(8, k // 8))
    rough, candidates = (
        torch.from_numpy(array)
        for array in faiss.knn(queries.numpy(), bank.numpy(), wanted, metric=faiss.METRIC_INNER_PRODUCT)
    )
    similarity = torch.empty(candidates.shape, dtype=torch.float64)
    rows = max(1, IN_CACHE // (wanted * bank.shape[1]))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        similarity[part] = (bank[candidates[part]].double() @ queries[part, :, None].double())[..., 0]
    similarity, index = (sorted_[:, :k] for sorted_ in _ordered(similarity, candidates))
    if wanted < len(bank):
        error = bank.shape[1] * 2.0**-23
        open_ = similarity[:, -1] <= rough[:, -1].double() + error
        if open_.any():
            similarity[open_], index[open_] = _with_torch(bank, queries[open_], k, chunk)
    return similarity, index


def _without(similarity: Tensor, index: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Take `own` `[q, 1]` out of each row's k + 1 neighbours, or the last where it is not among them."""
    is_own = index == own
    dropped = torch.where(is_own.any(1), is_own.int().argmax(1), index.shape[1] - 1)
    kept = torch.arange(index.shape[1], device=index.device) != dropped[:, None]
    return similarity[kept].view(len(index), -1), index[kept].view(len(index), -1)


def _faiss() -> Any:
    """The module, or None where it is absent or does not load."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss
