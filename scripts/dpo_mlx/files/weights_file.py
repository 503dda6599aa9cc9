"""Checks a safetensors file before MLX reads it: header, length and numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
LARGEST_DIMENSION = 2**31 - 1  # of an MLX array
LFS_POINTER = b"version https://git-lfs"
# Bits of each dtype. MLX refuses all others.
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# (unsigned type of the same size, exponent bits). NaN and infinity have all exponent bits set.
EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
}
CHUNK = 2**20  # bytes checked at a time; they fit in the processor's cache


class Damaged(Exception):
    """A file cannot be used. The caller adds what to do, which depends on the file's origin."""

    def __init__(self, path: Path, fault: str) -> None:
        super().__init__(f"{path}: {fault}")


@dataclass(frozen=True)
class Tensor:
    """A tensor's dtype, shape and byte range in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a regular file by name. Raises Damaged when the header is not valid,
    or the file ends before its last tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if LFS_POINTER.startswith(prefix) and len(prefix) == 8:
            raise Damaged(
                path, "is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
            )
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(HEADER_LIMIT, size - 8):
            raise Damaged(path, f"is cut short, or is not a safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise Damaged(path, "has a header that is not JSON") from error
    if not isinstance(header, dict):
        raise Damaged(path, "has a header that is not a JSON object")
    tensors = {
        name: _tensor(path, name, entry, 8 + length)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise Damaged(path, f"is cut short: it has {size} bytes, but its tensors end at {end}")
    return tensors


def _tensor(path: Path, name: str, entry: Any, data: int) -> Tensor:
    """Parse one entry of a header. `data` is the offset of the first tensor."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        counts = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        is_valid = counts and start <= end and max(shape, default=0) <= LARGEST_DIMENSION
        if is_valid and dtype in BITS:
            is_valid = math.prod(shape) * BITS[dtype] == 8 * (end - start)
    except (KeyError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise Damaged(path, f"has a header with an impossible size for the tensor {name[:100]!r}")
    return Tensor(dtype, tuple(shape), data + start, data + end)


def require_finite(path: Path) -> None:
    """Raises Damaged, with the tensor's name, when a tensor has a NaN or an infinity.

    Reads the file in small chunks to save memory. A process checks an unchanged file only once.
    """
    status = path.stat()
    _require_finite(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache
def _require_finite(path: Path, *_status: int) -> None:
    tensors = read_header(path)
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            # Old checkpoints contain attention masks, which can have -infinity.
            if tensor.dtype in EXPONENTS and "mask" not in name:
                _require_finite_tensor(path, file, name, tensor)


def _require_finite_tensor(path: Path, file: BinaryIO, name: str, tensor: Tensor) -> None:
    unsigned, exponent = EXPONENTS[tensor.dtype]
    mask = unsigned(exponent)
    buffer = np.empty(CHUNK // mask.itemsize, unsigned)
    file.seek(tensor.start)
    remaining = tensor.end - tensor.start
    while remaining:
        part = buffer[: min(remaining, CHUNK) // mask.itemsize]
        if file.readinto(part) < part.nbytes:  # type: ignore[attr-defined]
            raise Damaged(path, "was cut short while it was read")
        if np.bitwise_and(part, mask, out=part).max() == mask:
            raise Damaged(path, f"tensor {name} has a NaN or an infinity")
        remaining -= part.nbytes
