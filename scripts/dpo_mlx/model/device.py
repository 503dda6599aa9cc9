"""The device that MLX runs on: its name, its memory, and MLX's memory limits."""

from __future__ import annotations

import gc
import os
from typing import Any

import mlx.core as mx

# Share of the memory that MLX may keep as freed buffers for reuse. Every new sequence length leaves
# buffers behind, and without a limit they would pile up.
CACHE_SHARE = 0.1
# Share of an NVIDIA GPU's memory that MLX takes by default.
GPU_SHARE = 0.95


def name() -> str:
    """The device's name, such as "Apple M1 (Metal)", "NVIDIA H100 (CUDA)", "x86_64 (CPU)"."""
    info = _info()
    if mx.default_device() == mx.cpu:
        return f"{info.get('architecture', 'unknown')} (CPU)"
    kind = "Metal" if mx.metal.is_available() else "CUDA"
    return f"{info.get('device_name', 'unknown')} ({kind})"


def available() -> int:
    """Bytes that a stage may use: Metal's recommended working set, nearly all of a GPU's own
    memory, or the machine's memory.
    """
    info = _info()
    if recommended := info.get("max_recommended_working_set_size"):
        return int(recommended)
    if total := info.get("total_memory"):
        return int(GPU_SHARE * total)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_memory() -> None:
    """Set MLX's memory limits to what the device offers. Every stage that loads a model calls this.

    At the memory limit MLX waits for running work to free memory before it allocates more. MLX's
    default limit is 1.5 times Metal's recommended working set, and macOS swaps before that. On
    Metal we also wire the model, so that macOS does not page it out while the user works in
    another program.
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


def _info() -> dict[str, Any]:
    return mx.device_info()
