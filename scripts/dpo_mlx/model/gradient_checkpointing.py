"""Gradient checkpointing for as long as a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn
from mlx_lm.tuner.trainer import grad_checkpoint


@contextmanager
def gradient_checkpointing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Recompute each block in the backward pass instead of keeping its activations.

    mlx-lm's `grad_checkpoint` replaces the blocks' class method for good; it is put back here.
    """
    kinds = {type(layer) for layer in model.layers}
    plain = {kind: kind.__call__ for kind in kinds}
    try:
        if enabled:
            for kind in kinds:
                grad_checkpoint(next(layer for layer in model.layers if type(layer) is kind))
        yield
    finally:
        for kind, call in plain.items():
            kind.__call__ = call
