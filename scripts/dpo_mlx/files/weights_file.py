"""A safetensors file, checked before MLX reads it: its header, its length, and its numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

HEADER_LIMIT = 100_000_000  # bytes; what the format's own library allows
LARGEST_DIMENSION = 2**31 - 1  # of an MLX array
LFS_POINTER = b"version https://git-lfs"
# Bits of a number. MLX refuses the types that are not named here.
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# As (unsigned type of the same size, bits of the exponent): they are all 1 in NaN and infinity.
EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
}
CHUNK = 2**20  # bytes that are checked at a time: they stay in the processor's cache


class Damaged(Exception):
    """A file and why it cannot be used, without a remedy: that depends on whose file it is."""

    def __init__(self, path: Path, fault: str) -> None:
        super().__init__(f"{path}: {fault}")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor stands in its file, in bytes, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a regular file by name. Raises Damaged when the header cannot be right, or
    the file ends before its last tensor does.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if LFS_POINTER.startswith(first) and len(first) == 8:
            raise Damaged(
                path, "is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
            )
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(HEADER_LIMIT, size - 8):
            raise Damaged(path, f"is cut short or no safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise Damaged(path, "has a header that is not JSON") from error
    if not isinstance(header, dict):
        raise Damaged(path, "has a header that is not a JSON object")
    tensors = {
        name: _tensor(path, name, about, 8 + length)
        for name, about in header.items()
        if name != "__metadata__"
    }
    needed = max((tensor.end for tensor in tensors.values()), default=0)
    if needed > size:
        raise Damaged(path, f"is cut short: it has {size} bytes, but its tensors end at {needed}")
    return tensors


def _tensor(path: Path, name: str, about: Any, data: int) -> Tensor:
    """One entry of a header; `data` is where the tensors begin."""
    try:
        dtype, shape, (start, end) = about["dtype"], about["shape"], about["data_offsets"]
        counts = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        sound = counts and start <= end and max(shape, default=0) <= LARGEST_DIMENSION
        if sound and dtype in BITS:
            sound = math.prod(shape) * BITS[dtype] == 8 * (end - start)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise Damaged(
            path, f"has a header in which the size of tensor {name[:100]!r} cannot be right"
        )
    return Tensor(dtype, tuple(shape), data + start, data + end)


def require_finite(path: Path) -> None:
    """Raises Damaged, with the tensor's name, for a NaN or an infinity in a file's tensors.

    The file is read in small pieces, so that the check needs no memory; a file that has not changed
    is not read again by this process.
    """
    status = path.stat()
    _require_finite(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache
def _require_finite(path: Path, *_status: int) -> None:
    tensors = read_header(path)
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            # Old checkpoints keep attention masks, whose entries may be -infinity; none is trained.
            if tensor.dtype in EXPONENTS and "mask" not in name:
                _require_finite_tensor(path, file, name, tensor)


def _require_finite_tensor(path: Path, file: BinaryIO, name: str, tensor: Tensor) -> None:
    unsigned, exponent = EXPONENTS[tensor.dtype]
    mask = unsigned(exponent)
    buffer = np.empty(CHUNK // mask.itemsize, unsigned)
    file.seek(tensor.start)
    left = tensor.end - tensor.start
    while left:
        part = buffer[: min(left, CHUNK) // mask.itemsize]
        if file.readinto(part) < part.nbytes:  # type: ignore[attr-defined]
            raise Damaged(path, "was cut short while it was read")
        if np.bitwise_and(part, mask, out=part).max() == mask:
            raise Damaged(path, f"tensor {name} has a NaN or an infinity among its numbers")
        left -= part.nbytes
