"""Schedules against hand-computed values."""

from __future__ import annotations

import pytest

from poserelay.schedules import cosine, drops


def test_cosine() -> None:
    assert [cosine(0.4, epoch, 4) for epoch in range(4)] == pytest.approx([0.4, 0.341421356, 0.2, 0.058578644])


def test_drops() -> None:
    assert [drops(1.0, epoch, (2, 4)) for epoch in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
