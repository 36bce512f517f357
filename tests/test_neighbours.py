"""Nearest neighbours against exact integer arithmetic, and the kNN classifier against loops and lightly's."""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.utils.benchmarking.knn import knn_predict
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from poserelay.neighbours import Backend, knn_classify, nearest, unit

BACKENDS: list[Backend] = ["torch", "faiss"]


def random_vectors(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_neighbours(bank: Tensor, queries: Tensor, k: int) -> list[list[int]]:
    """By integers of any size, of equal similarities the lower index first."""
    whole = [[[round(float(x) * 2**24) for x in row] for row in unit(vectors)] for vectors in (bank, queries)]
    found = []
    for query in whole[1]:
        similarity = [sum(a * b for a, b in zip(row, query, strict=True)) for row in whole[0]]
        found.append(sorted(range(len(similarity)), key=lambda index: (-similarity[index], index))[:k])
    return found


def test_unit_vectors_have_length_one_on_the_grid() -> None:
    vectors = 1000 * random_vectors(0, 50, 300)
    vectors[7] = 0
    rounded = unit(vectors)
    torch.testing.assert_close(rounded, normalize(vectors.double(), dim=1).float(), atol=2**-25, rtol=0)
    assert torch.equal(rounded * 2**24, (rounded * 2**24).round())
    assert not rounded[7].any()
    double = vectors.double()
    assert torch.equal(unit(double), rounded)
    assert torch.equal(double, vectors.double())  # which it leaves as it was


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 50),
    st.booleans(),
    st.integers(0, 99),
)
def test_neighbours_are_exact_and_of_equals_the_lower_comes_first(
    backend: Backend, n: int, q: int, d: int, k: int, chunk: int, alike: bool, seed: int
) -> None:
    """Vectors of few whole numbers have many ties, those that are nearly alike have near ties."""
    integers = torch.randint(-1, 2, (n + q, d), generator=torch.Generator().manual_seed(seed)).float()
    vectors = 1 + 1e-6 * integers if alike else integers
    bank, queries, k = vectors[:n], vectors[n:], min(k, n)
    similarity, index = nearest(bank, queries, k, chunk=chunk, backend=backend)
    assert index.tolist() == exact_neighbours(bank, queries, k)
    expected = unit(queries).double() @ unit(bank).double().T
    torch.testing.assert_close(similarity, expected.gather(1, index).float(), rtol=0, atol=0)


@pytest.mark.parametrize("collapsed", [False, True])
def test_faiss_and_torch_give_the_same_bits_whatever_the_chunk(collapsed: bool) -> None:
    bank, queries = random_vectors(0, 3000, 64), random_vectors(1, 70, 64)
    if collapsed:
        bank, queries = 1 + 1e-4 * bank, 1 + 1e-4 * queries
    bank[1000:1300] = bank[:300]
    similarity, index = nearest(bank, queries, 20, backend="torch")
    others: list[tuple[Backend, int]] = [("torch", 333), ("faiss", 4096), ("faiss", 33)]
    for backend, chunk in others:
        other_similarity, other = nearest(bank, queries, 20, backend=backend, chunk=chunk)
        assert torch.equal(index, other)
        assert torch.equal(similarity, other_similarity)


def test_faiss_alone_would_break_ties_otherwise() -> None:
    """What the exact comparison is for; should faiss change, this only says so."""
    bank = 1 + 1e-4 * random_vectors(0, 3000, 64)
    alone = faiss.knn(unit(bank[:50]).numpy(), unit(bank).numpy(), 20, metric=faiss.METRIC_INNER_PRODUCT)[1]
    assert (alone != nearest(bank, bank[:50], 20, backend="faiss")[1].numpy()).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_compared_is_an_error(backend: Backend) -> None:
    bank = random_vectors(0, 5, 3)
    with pytest.raises(ValueError, match="k is 6, expected at least 1 and at most the 5 vectors"):
        nearest(bank, bank, 6, backend=backend)
    with pytest.raises(ValueError, match=r"bank \[5, 3\] and queries \[5, 2\] differ"):
        nearest(bank, bank[:, :2], 1, backend=backend)
    for value in (math.nan, math.inf):
        spoilt = bank.clone()
        spoilt[3, 1] = value
        with pytest.raises(ValueError, match="vector 3 of 5 holds NaN or infinity"):
            nearest(spoilt, bank, 1, backend=backend)
        with pytest.raises(ValueError, match="vector 3 of 5 holds NaN or infinity"):
            nearest(bank, spoilt, 1, backend=backend)
    with pytest.raises(ValueError, match="k is 5, expected at least 1 and at most the 4"):
        knn_classify(bank, torch.zeros(5).long(), bank, classes=1, k=5, exclude=torch.arange(5), backend=backend)
    similarity, index = nearest(bank, bank[:0], 2, backend=backend)
    assert similarity.shape == index.shape == (0, 2)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_bounded_by_the_chunk(backend: Backend) -> None:
    bank, chunk, k, classes = random_vectors(0, 2000, 4), 50, 10, 30
    with Largest() as made:
        predicted = knn_classify(
            bank, torch.arange(2000) % classes, bank, classes=classes, k=k, chunk=chunk, backend=backend
        )
    assert predicted.shape == (2000,)
    # copies of the bank, and blocks; Q x N would be 4,000,000 and the one-hot votes 600,000
    assert made.elements <= max(2000 * 4, chunk * chunk, 2**18 // (2 * k))


def test_faiss_takes_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels on Linux come to share one OpenMP runtime, where asking either is enough; others do not."""
    asked: list[int] = []
    monkeypatch.setattr(faiss, "omp_set_num_threads", asked.append)
    torch.set_num_threads(2)
    try:
        nearest(random_vectors(0, 50, 4), random_vectors(1, 5, 4), 3, backend="faiss")
    finally:
        torch.set_num_threads(1)
    assert asked == [2]


def naive_vote(bank: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float, own: int | None) -> list[float]:
    similarity = [float(a) for a in normalize(bank.double(), dim=1) @ normalize(query.double(), dim=0)]
    order = sorted((i for i in range(len(bank)) if i != own), key=lambda i: -similarity[i])
    votes = [0.0, 0.0, 0.0]
    for neighbour in order[:k]:
        votes[int(labels[neighbour])] += math.exp(similarity[neighbour] / temperature)
    return votes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 5.0), (79, 0.2)])
def test_the_vote_is_instance_discriminations(backend: Backend, k: int, temperature: float) -> None:
    bank, labels = random_vectors(0, 80, 6), torch.arange(80) % 3
    queries = random_vectors(1, 40, 6)
    predicted = knn_classify(bank, labels, queries, classes=3, k=k, temperature=temperature, chunk=17, backend=backend)
    for query, found in zip(queries, predicted.tolist(), strict=True):
        assert found == int(np.argmax(naive_vote(bank, labels, query, k, temperature, None)))
    predicted = knn_classify(
        bank,
        labels,
        bank,
        classes=3,
        k=k,
        temperature=temperature,
        exclude=torch.arange(80),
        chunk=17,
        backend=backend,
    )
    for own, found in enumerate(predicted.tolist()):
        assert found == int(np.argmax(naive_vote(bank, labels, bank[own], k, temperature, own)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lightly_predicts_the_same(backend: Backend) -> None:
    means = random_vectors(0, 10, 32)
    labels = torch.arange(600) % 10
    bank = means[labels] + 2 * random_vectors(1, 600, 32)
    queries = means[labels[:200]] + 2 * random_vectors(2, 200, 32)
    peer = knn_predict(normalize(queries, dim=1), normalize(bank, dim=1).T, labels, 10, knn_k=50, knn_t=0.1)[:, 0]
    ours = knn_classify(bank, labels, queries, classes=10, k=50, temperature=0.1, backend=backend)
    assert torch.equal(ours, peer)
    assert 0.3 < (ours == labels[:200]).double().mean() < 1


def test_a_picture_does_not_vote_for_itself_among_its_copies() -> None:
    """Five copies, of which the asked one comes last: four of them vote."""
    bank = torch.ones(5, 2)
    labels = torch.tensor([0, 0, 1, 1, 1])
    predicted = knn_classify(bank, labels, bank, classes=2, k=4, exclude=torch.arange(5), backend="torch")
    # by hand: without itself a 0 sees 0 1 1 1, a 1 sees 0 0 1 1, a draw that the lower class wins
    assert predicted.tolist() == [1, 1, 0, 0, 0]


def test_a_small_temperature_does_not_overflow() -> None:
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])
    labels = torch.tensor([0, 1, 1])
    queries = torch.tensor([[1.0, -0.1]])
    assert knn_classify(bank, labels, queries, classes=2, k=3, temperature=1e-4).tolist() == [0]
    assert knn_classify(bank, labels, queries, classes=2, k=3, temperature=10).tolist() == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_bits() -> None:
    bank, queries = random_vectors(0, 3000, 64), random_vectors(1, 70, 64)
    bank[1000:1300] = bank[:300]
    expected = nearest(bank, queries, 20, backend="torch", chunk=500)
    blocks = nearest(bank, queries, 20, chunk=500, device=torch.device("cuda"))
    whole = nearest(bank.cuda(), queries.cuda(), 20, chunk=500)
    for found in (blocks, whole):
        assert torch.equal(expected[1], found[1].cpu())
        assert torch.equal(expected[0], found[0].cpu())
    assert (blocks[0].device.type, whole[0].device.type) == ("cpu", "cuda")
