"""What a training run will need of memory, found by running a few blocks before the whole model.

The first blocks of the lazily loaded model take one gradient of the longest sequence; what each
further block adds is extrapolated to all of them. So the plan knows the device, the dtype, the
architecture and checkpointing as they are, and costs seconds.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .engine import Engine
from .pairs import Sequence

# Beside its parameters an adapter has two moments in AdamW, and three gradients at the peak: the
# sum so far, the chosen side's and, counted in the activations, the rejected side's.
ADAPTER_COPIES = 5

# Blocks of a kind that are run at most; the more, the less a peak's chance overlaps count.
MEASURED = 5


@dataclass(frozen=True)
class Plan:
    """Bytes at the peak of a training step, in each of the processes on a machine."""

    weights: int
    adapters: int
    activations: int
    processes: int = 1

    @property
    def total(self) -> int:
        return self.processes * (self.weights + self.adapters + self.activations)

    def __str__(self) -> str:
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.total / 1e9:.2f} GB (weights {self.weights / 1e9:.2f}, adapters with "
            f"optimizer {self.adapters / 1e9:.2f}, activations of the longest sequence "
            f"{self.activations / 1e9:.2f}{each})"
        )


def plan(model: nn.Module, longest: Sequence, processes: int = 1) -> Plan:
    """The plan of a model that carries adapters, for its longest sequence.

    Call it inside `models.gradient_checkpointing` as training will be. Weights that are not in
    memory yet stay out of it, but for those of the blocks that are run.
    """
    adapters = nbytes(model.trainable_parameters())
    weights = nbytes(model.parameters()) - adapters
    return Plan(weights, ADAPTER_COPIES * adapters, _activations(model, longest), processes)


def available() -> int:
    """Bytes that the device offers: Metal's recommended working set, or the machine's memory."""
    return _recommended() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bound() -> None:
    """On Metal, wire the recommended memory so that a large model is not paged out, and keep no
    more freed buffers than a tenth of it: sequences of ever new lengths would pile them up.
    """
    if recommended := _recommended():
        mx.set_wired_limit(recommended)
        mx.set_cache_limit(recommended // 10)


def _recommended() -> int:
    """Bytes of Metal's recommended working set, 0 on other devices."""
    return int(mx.device_info().get("max_recommended_working_set_size", 0))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree of parameters, in memory or not."""
    return sum(array.nbytes for array in dict(tree_flatten(tree)).values())


def _activations(model: nn.Module, longest: Sequence) -> int:
    """Bytes that one gradient of the whole model takes beside weights and adapters' state.

    The first blocks, at least one of each kind, are run; each further one takes what a block of
    its kind took among them.
    """
    kinds = _kinds(model.layers)
    spans = {kind: _span(kinds, kinds.index(kind)) for kind in set(kinds)}
    taken = {count: _taken(model, count, longest) for count in sorted(set().union(*spans.values()))}
    step = {
        kind: (taken[end] - taken[start]) // (end - start) if start < end else taken[end]
        for kind, (start, end) in spans.items()
    }
    most = max(taken)
    return taken[most] + sum(step[kind] for kind in kinds[most:])


def _span(kinds: list[str], first: int) -> tuple[int, int]:
    """(start, end) such that blocks start to end - 1 are alike: up to MEASURED of them from the
    first of a kind on. The very first two blocks are always run: from the second on, one block's
    buffers overlap with another's.
    """
    end = first + 1
    while end < min(len(kinds), first + MEASURED) and kinds[end] == kinds[first]:
        end += 1
    return max(1, first, min(2, end - 1)), end


def _kinds(layers: List[nn.Module]) -> list[str]:
    """What kind of block each is, told by the names and shapes of its parameters."""
    return [
        str([(name, array.shape) for name, array in dict(tree_flatten(layer.parameters())).items()])
        for layer in layers
    ]


def _taken(model: nn.Module, count: int, longest: Sequence) -> int:
    """Bytes that the gradient of the first `count` blocks takes at its peak."""
    engine = Engine(model, check=False)
    layers = model.model.layers
    model.model.layers = layers[:count]
    try:
        mx.eval(model.parameters())  # the weights that are run count as weights
        gc.collect()  # or arrays of others, freed while this is measured, would be taken off
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        result = engine.log_prob_and_gradient(longest)
        del result
        return mx.get_peak_memory() - before
    finally:
        model.model.layers = layers
