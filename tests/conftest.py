"""Shared fixtures: a few rendered people, and one thread, so that results do not depend on the machine."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
import torch

from poserelay.synthesize import SynthesizeConfig
from poserelay.synthesize import main as synthesize


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/ and annotations.json: 24 pictures of 96 x 96 with rendered people."""
    folder = tmp_path_factory.mktemp("people") / "data"
    synthesize(SynthesizeConfig(out=str(folder), images=24, seed=3, size=96, workers=1))
    return folder
