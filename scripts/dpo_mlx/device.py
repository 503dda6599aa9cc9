"""The device that computes: its name, the memory it offers, and how a stage stays within that."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx

P = ParamSpec("P")
Result = TypeVar("Result")

# Freed buffers that MLX may keep for the next ones, as a share of the memory: sequences of ever new
# lengths would pile them up.
CACHE_SHARE = 0.1


def name() -> str:
    """What computes: "Apple M1 (Metal)", "NVIDIA H100 (CUDA)", "x86_64 (CPU)"."""
    info = _info()
    if mx.default_device() == mx.cpu:
        return f"{info.get('architecture', 'unknown')} (CPU)"
    kind = "Metal" if mx.metal.is_available() else "CUDA"
    return f"{info.get('device_name', 'unknown')} ({kind})"


def available() -> int:
    """Bytes that the device offers: Metal's recommended working set, a GPU's own memory, or the
    machine's.
    """
    info = _info()
    offered = info.get("max_recommended_working_set_size") or info.get("total_memory")
    return int(offered or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def bound() -> None:
    """Keep MLX within what the device offers. Every stage that loads a model calls this.

    Beyond the memory limit MLX waits for work in progress to free memory before it allocates more;
    its default is 1.5 times Metal's recommended working set, where macOS swaps. On Metal the model
    is also wired, so that it is not paged out while the user does something else.
    """
    memory = available()
    mx.set_memory_limit(memory)
    mx.set_cache_limit(int(CACHE_SHARE * memory))
    if "max_recommended_working_set_size" in _info():
        mx.set_wired_limit(memory)


def release() -> None:
    """Give back the memory of models that nothing refers to any more.

    Python frees what refers to itself in a circle only when its collector happens to run, and MLX
    keeps freed buffers: without both calls a second model would stand beside the first.
    """
    gc.collect()
    mx.clear_cache()


def releasing(function: Callable[P, Result]) -> Callable[P, Result]:
    """`function`, which loads a model, with a `release` once it has returned and its model is out
    of reach.
    """

    @wraps(function)
    def and_release(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        finally:
            release()

    return and_release


def _info() -> dict[str, Any]:
    return mx.device_info()
