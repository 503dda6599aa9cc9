"""What fusing kept: `fuse.json` in a run's folder, which stage 11 writes for later stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from . import records
from .typed import Count, Finite

FUSE = "fuse.json"  # in a run's folder


class FuseReport(TypedDict):
    """`margin_...` and `max_logprob_difference` are in nats; `margin_kept` is a share, None when
    the adapters have no margin. `by_rounding` holds the same for each rounding.
    """

    pairs: Count
    dtype: str
    rounding: str
    quantize: int | None
    margin_adapters: Finite
    margin_fused: Finite
    margin_kept: Finite | None
    max_logprob_difference: Finite
    by_rounding: dict[str, dict[str, Any]]


def read(run: Path) -> FuseReport:
    """Raises UserError when it is not there, or damaged."""
    return records.read(run / FUSE, FuseReport)
