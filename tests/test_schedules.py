"""Schedules and labelled subsets against hand-computed values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poserelay.config import LabelsConfig
from poserelay.errors import UserError
from poserelay.schedules import cosine, drops
from poserelay.subsets import choose_images


def test_cosine() -> None:
    assert [cosine(0.4, epoch, 4) for epoch in range(4)] == pytest.approx([0.4, 0.341421356, 0.2, 0.058578644])


def test_drops() -> None:
    assert [drops(1.0, epoch, (2, 4)) for epoch in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


@given(
    ids=st.lists(st.integers(0, 10**9), min_size=1, max_size=40, unique=True),
    small=st.floats(0.01, 1),
    large=st.floats(0.01, 1),
    seed=st.integers(0, 100),
)
def test_subsets_are_nested_and_independent_of_order(ids: list[int], small: float, large: float, seed: int) -> None:
    small, large = sorted((small, large))
    few = choose_images(ids, LabelsConfig(ratio=small, seed=seed))
    many = choose_images(ids, LabelsConfig(ratio=large, seed=seed))
    assert set(few) <= set(many) <= set(ids)
    assert len(few) == max(1, round(small * len(ids)))
    assert set(choose_images(ids[::-1], LabelsConfig(ratio=small, seed=seed))) == set(few)


def test_seeds_differ_and_too_many_are_refused() -> None:
    ids = list(range(100))
    assert choose_images(ids, LabelsConfig(count=10, seed=0)) != choose_images(ids, LabelsConfig(count=10, seed=1))
    assert choose_images(ids, LabelsConfig()) == ids
    with pytest.raises(UserError, match="only 100 images"):
        choose_images(ids, LabelsConfig(count=101))
