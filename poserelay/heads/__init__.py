"""Heads by name: constructors of (in_channels, num_joints, **their own), from a backbone's maps to heatmaps."""

from __future__ import annotations

from .ccm import CCMHead
from .hrnet import HRNetHead
from .simple import DeconvHead

HEADS: dict[str, type[DeconvHead] | type[HRNetHead] | type[CCMHead]] = {
    "simple": DeconvHead,
    "hrnet": HRNetHead,
    "ccm": CCMHead,
}

__all__ = ["HEADS", "CCMHead", "DeconvHead", "HRNetHead"]
