"""Reads the user's files: regular files, limited in size, unchanged while we read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import UserError
from .text import shown

# Limits in bytes, far above the size of any real file.
CONFIG_LIMIT, STATE_LIMIT, DATA_LIMIT = 2**20, 2**26, 2**30

DIRECTORY = "a directory"
KINDS = {
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read(path: Path, limit: int, remedy: str) -> bytes:
    """Read a regular file. Nothing else is opened, because opening a pipe waits for a writer and
    opening a device may change it.

    Raises UserError, ending in `remedy`, when the path is not a regular file, cannot be read, has
    more than `limit` bytes, or changes while we read it.
    """
    name = shown(path)
    try:
        _require_file(path.stat(), name, limit, remedy)
        # Not blocking, in case a pipe has just replaced the file.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            before = os.fstat(file.fileno())
            _require_file(before, name, limit, remedy)
            content = file.read(limit + 1)
            after = os.fstat(file.fileno())
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file; {remedy}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:  # a NUL or half a surrogate pair in the path
        raise UserError(f"{name}: no file can have this name; {remedy}") from error
    if len(content) > limit:
        raise UserError(_too_large(name, len(content), limit, remedy))
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{name}: changed while it was read; run again when the file is complete")
    return content


def other_kind(path: Path) -> str | None:
    """What a path is if it is not a file, such as "a pipe". None for a regular file or a missing
    one.
    """
    try:
        return _other_kind(path.stat())
    except (OSError, ValueError):
        return None


def _other_kind(status: os.stat_result) -> str | None:
    if stat.S_ISREG(status.st_mode):
        return None
    return KINDS.get(stat.S_IFMT(status.st_mode), "something else")


def _require_file(status: os.stat_result, name: str, limit: int, remedy: str) -> None:
    if kind := _other_kind(status):
        raise UserError(f"{name}: is {kind}, not a file; {remedy}")
    if status.st_size > limit:
        raise UserError(_too_large(name, status.st_size, limit, remedy))


def _too_large(name: str, size: int, limit: int, remedy: str) -> str:
    return f"{name}: is {_size(size)}, and the limit is {_size(limit)}; {remedy}"


def _size(size: int) -> str:
    """A number of bytes in GB, MB, kB or bytes."""
    for unit, bytes_ in (("GB", 2**30), ("MB", 2**20), ("kB", 2**10)):
        if size >= bytes_:
            return f"{size / bytes_:.4g} {unit}"
    return f"{size} bytes"
