"""Writes that a crash cannot halve: synced, and whole under their names."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

# What a stage writes beside its large files, in bytes: pairs, metrics, the report.
SMALL_FILES = 20_000_000

SWAP, AT_FDCWD = 2, -100  # flag and constant of both systems' calls that swap two names


def sync_file(descriptor: int) -> None:
    """Wait until an open file is on the disk; macOS's fsync leaves it in the drive's own memory."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # network disks do not know it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Makes a failed write an OSError that names `path`; MLX has only a RuntimeError for it."""
    try:
        yield
    except RuntimeError as error:
        if "Unable to write" not in str(error):
            raise
        raise OSError(errno.ENOSPC, str(error), str(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


def require_space(folder: Path, size: int, key: str) -> None:
    """Raises UserError when the disk of `folder`, which may not be there yet, has less than `size`
    bytes free; `key` is the config's key that names it.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise UserError(
            f"{folder}: the disk has {free / 1e9:.2f} GB free, up to {size / 1e9:.2f} GB are "
            f"needed; free some space, or set {key} to another disk"
        )


def temporary_name(path: Path) -> Path:
    """Where the new content of `path` is written before it takes that name."""
    return path.with_name(f".{path.name}.dpo-mlx.tmp")


def replace(path: Path, content: bytes) -> None:
    """Give a file this content: a reader sees the old file or the whole new one.

    The caller has made sure that nobody else's file stands under either name. Raises OSError, and
    leaves the old file, when the content cannot be written.
    """
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)  # a killed process has left it
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with disk_errors(path):
        try:
            with open(os.open(temporary, flags, 0o666), "wb") as file:
                file.write(content)
                file.flush()
                sync_file(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error
        sync(path.parent)


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file, all or nothing, and wait until it is on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with disk_errors(path), open(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[file.write(content) :]
            sync_file(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def aside_name(path: Path) -> Path:
    """Where `swap` puts the other one of two, for a moment."""
    return path.with_name(f"{path.name}.old")


def swap(one: Path, other: Path) -> None:
    """Swap two folders' names in one step; where the file system cannot, in three."""
    libc = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        failed = libc.renamex_np(*names, SWAP)
    else:
        failed = libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], SWAP)
    if failed:
        aside = aside_name(one)
        other.rename(aside)
        one.rename(other)
        aside.rename(one)
