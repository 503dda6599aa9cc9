"""SHA-256 of files. Large files can be hashed in slices."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

# A large file is hashed in slices that are spread evenly from its first to its last byte.
SLICES, SLICE_BYTES = 1024, 4096


def of_file(path: Path, whole: float = math.inf) -> str:
    """SHA-256 of a file. For a file of more than `whole` bytes: SHA-256 of its size and its slices.

    Hashing gigabytes takes many seconds. In a file of 5 GB the slices are 5 MB apart: this notices
    any change to a tensor of more than 5 MB, but can miss a change of a few kilobytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= whole:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(SLICES):
            file.seek(number * (size - SLICE_BYTES) // (SLICES - 1))
            digest.update(file.read(SLICE_BYTES))
        return digest.hexdigest()
