"""Heads by name: constructors of (in_channels, num_joints, **their own), from a backbone's maps to heatmaps."""

from __future__ import annotations

from .ccm import CCMHead
from .hrnet import HRNetHead
from .scio import SCIO
from .simple import DeconvHead

HEADS: dict[str, type[DeconvHead] | type[HRNetHead] | type[CCMHead]] = {
    "simple": DeconvHead,
    "hrnet": HRNetHead,
    "ccm": CCMHead,
}
REFINERS: dict[str, type[SCIO]] = {"scio": SCIO}
"""Networks on top of a head, by name: constructors of (in_channels, groups, **their own)."""

__all__ = ["HEADS", "REFINERS", "SCIO", "CCMHead", "DeconvHead", "HRNetHead"]
