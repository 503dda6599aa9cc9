"""The device that MLX runs on: its name, its memory, and how a stage stays within that memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx

P = ParamSpec("P")
Result = TypeVar("Result")

# Share of the memory that MLX may keep as freed buffers for reuse. Each new sequence length leaves
# buffers behind, which would pile up without a limit.
CACHE_SHARE = 0.1


def name() -> str:
    """The device by name: "Apple M1 (Metal)", "NVIDIA H100 (CUDA)", "x86_64 (CPU)"."""
    info = _info()
    if mx.default_device() == mx.cpu:
        return f"{info.get('architecture', 'unknown')} (CPU)"
    kind = "Metal" if mx.metal.is_available() else "CUDA"
    return f"{info.get('device_name', 'unknown')} ({kind})"


def available() -> int:
    """Bytes that a stage may use: Metal's recommended working set, the GPU's own memory, or the
    machine's.
    """
    info = _info()
    offered = info.get("max_recommended_working_set_size") or info.get("total_memory")
    return int(offered or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def bound() -> None:
    """Keep MLX within what the device offers. Every stage that loads a model calls this.

    At the memory limit MLX waits for running work to free memory before it allocates more. MLX's
    default limit is 1.5 times Metal's recommended working set, and macOS swaps before that. On
    Metal we also wire the model, so that macOS does not page it out while the user does something
    else.
    """
    memory = available()
    mx.set_memory_limit(memory)
    mx.set_cache_limit(int(CACHE_SHARE * memory))
    if "max_recommended_working_set_size" in _info():
        mx.set_wired_limit(memory)


def release() -> None:
    """Free the memory of models that are no longer used.

    Python frees reference cycles only when its garbage collector runs, and MLX keeps freed buffers.
    Without both calls the next model would be loaded beside the last one.
    """
    gc.collect()
    mx.clear_cache()


def releasing(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate a function that loads a model: call `release` after it returns, when nothing refers
    to its model any more.
    """

    @wraps(function)
    def call_and_release(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        finally:
            release()

    return call_and_release


def _info() -> dict[str, Any]:
    return mx.device_info()
