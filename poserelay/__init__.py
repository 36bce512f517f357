"""poserelay: label-efficient 2D pose estimation. See README.md for the stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .keypoints import load_skeleton
    from .model import load_model

__all__ = ["load_model", "load_skeleton"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported at first use, so that `--help` and the configuration need no torch.
    if name == "load_skeleton":
        from .keypoints import load_skeleton

        return load_skeleton
    if name == "load_model":
        from .model import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
