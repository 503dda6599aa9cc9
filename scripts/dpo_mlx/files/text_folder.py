"""A folder of .md and .txt files, one question with its answer in each."""

from __future__ import annotations

import hashlib
from pathlib import Path

from . import digest

SUFFIXES = (".md", ".markdown", ".txt")


def files_in(folder: Path) -> list[Path]:
    """The text files directly in a folder, by name. Hidden files are left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def digest_of(folder: Path) -> str:
    """SHA-256 of the names and the content of the text files in a folder."""
    files = [(path.name, digest.of_file(path)) for path in files_in(folder)]
    return hashlib.sha256(repr(files).encode("utf-8", "surrogatepass")).hexdigest()
