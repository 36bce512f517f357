"""Heads by name: constructors of (in_channels, num_joints, **their own), from a backbone's maps to heatmaps."""

from __future__ import annotations

from .hrnet import HRNetHead
from .simple import DeconvHead

HEADS: dict[str, type[DeconvHead] | type[HRNetHead]] = {
    "simple": DeconvHead,
    "hrnet": HRNetHead,
}

__all__ = ["HEADS", "DeconvHead", "HRNetHead"]
