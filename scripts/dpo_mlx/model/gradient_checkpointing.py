"""Switches gradient checkpointing on and off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn
from mlx_lm.tuner.trainer import grad_checkpoint


@contextmanager
def gradient_checkpointing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside the context, recompute each block in the backward pass instead of keeping activations.

    mlx-lm's `grad_checkpoint` replaces `__call__` of the blocks' class for good. This restores it.
    """
    kinds = {type(layer) for layer in model.layers}
    original_calls = {kind: kind.__call__ for kind in kinds}
    try:
        if enabled:
            for kind in kinds:
                grad_checkpoint(next(layer for layer in model.layers if type(layer) is kind))
        yield
    finally:
        for kind, call in original_calls.items():
            kind.__call__ = call
