"""Read a file of the user's: a regular file, of bounded size, that does not change meanwhile."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import UserError
from .text import shown

# The most bytes of each kind of file. No real one comes near.
CONFIG, STATE, DATA = 2**20, 2**26, 2**30

# What is not a file, although it has a path.
DIRECTORY = "a directory"
KINDS = {
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read(path: Path, most: int, remedy: str) -> bytes:
    """The bytes of a regular file. Anything else is refused before it is opened, because opening a
    pipe waits for a writer and opening a device may change it.

    Raises UserError, ending in `remedy`, for a file that is not a regular file, cannot be read, has
    more than `most` bytes, or changes while it is read.
    """
    name = shown(path)
    try:
        _require_file(path.stat(), name, most, remedy)
        # Without blocking: a pipe may have taken the file's place.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            before = os.fstat(file.fileno())
            _require_file(before, name, most, remedy)
            content = file.read(most + 1)
            after = os.fstat(file.fileno())
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file; {remedy}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:  # a NUL or half a surrogate pair in the path
        raise UserError(f"{name}: no file can have this name; {remedy}") from error
    if len(content) > most:
        raise UserError(_too_large(name, len(content), most, remedy))
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{name}: changed while it was read; run again when it is complete")
    return content


def other_kind(path: Path) -> str | None:
    """The kind of what is at a path, such as "a pipe". None for a regular file, and where there is
    nothing.
    """
    try:
        return _other_kind(path.stat())
    except (OSError, ValueError):
        return None


def _other_kind(status: os.stat_result) -> str | None:
    if stat.S_ISREG(status.st_mode):
        return None
    return KINDS.get(stat.S_IFMT(status.st_mode), "something else")


def _require_file(status: os.stat_result, name: str, most: int, remedy: str) -> None:
    if kind := _other_kind(status):
        raise UserError(f"{name}: is {kind}, not a file; {remedy}")
    if status.st_size > most:
        raise UserError(_too_large(name, status.st_size, most, remedy))


def _too_large(name: str, size: int, most: int, remedy: str) -> str:
    return f"{name}: is {_size(size)}, and the limit is {_size(most)}; {remedy}"


def _size(size: int) -> str:
    """Bytes with the largest unit that keeps the number over 1."""
    for unit, bytes_ in (("GB", 2**30), ("MB", 2**20), ("kB", 2**10)):
        if size >= bytes_:
            return f"{size / bytes_:.4g} {unit}"
    return f"{size} bytes"
