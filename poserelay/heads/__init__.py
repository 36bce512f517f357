"""Heads by name: constructors of (in_channels, num_joints, **their own), from a backbone's maps to heatmaps.

Those of SINGLE_STAGE find the persons of a whole image instead.
"""

from __future__ import annotations

from .ccm import CCMHead
from .cir import CIRHead
from .hrnet import HRNetHead
from .scio import SCIO
from .simple import DeconvHead

HEADS: dict[str, type[DeconvHead] | type[HRNetHead] | type[CCMHead]] = {
    "simple": DeconvHead,
    "hrnet": HRNetHead,
    "ccm": CCMHead,
}
SINGLE_STAGE: dict[str, type[CIRHead]] = {"cir": CIRHead}
REFINERS: dict[str, type[SCIO]] = {"scio": SCIO}
"""Networks on top of a head, by name: constructors of (in_channels, groups, **their own)."""

__all__ = ["HEADS", "REFINERS", "SCIO", "SINGLE_STAGE", "CCMHead", "CIRHead", "DeconvHead", "HRNetHead"]
