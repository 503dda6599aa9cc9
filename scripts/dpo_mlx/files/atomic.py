"""Writes files so that a crash leaves the old content or the new content, never a part."""

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

# Bytes that a stage needs for its small files: pairs, metrics, the report.
SMALL_FILES = 20_000_000

SWAP, AT_FDCWD = 2, -100  # RENAME_SWAP on macOS and RENAME_EXCHANGE on Linux; AT_FDCWD on Linux


def sync_file(descriptor: int) -> None:
    """Wait until an open file is on the disk. On macOS, fsync leaves it in the drive's cache."""
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:
        with suppress(OSError):  # network disks do not support it
            fcntl.fcntl(descriptor, full_sync)
            return
    os.fsync(descriptor)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write into an OSError that names `path`. MLX raises a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if "Unable to write" not in str(error):
            raise
        raise OSError(errno.ENOSPC, str(error), str(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


def require_space(folder: Path, size: int, key: str) -> None:
    """Raises UserError when the disk of `folder` has less than `size` bytes free. The folder need
    not exist. `key` is the setting that names it.
    """
    parents = (folder, *folder.absolute().parents)
    free = shutil.disk_usage(next(path for path in parents if path.exists())).free
    if free < size:
        raise UserError(
            f"{folder}: the disk has {free / 1e9:.2f} GB free, but the stage needs up to "
            f"{size / 1e9:.2f} GB; free some space, or set {key} to a path on another "
            "disk"
        )


def temporary_name(path: Path) -> Path:
    """The temporary file for the new content of `path`."""
    return path.with_name(f".{path.name}.dpo-mlx.tmp")


def replace(path: Path, content: bytes) -> None:
    """Replace a file's content. A reader sees the old file or the whole new one.

    The caller must check that neither `path` nor its temporary file is the user's. Raises OSError
    and keeps the old file when the content cannot be written.
    """
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)  # a killed process may have left it
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
    """Append all of `content` or nothing, and wait until it is on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with disk_errors(path), open(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        old_size = file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[file.write(content) :]
            sync_file(file.fileno())
        except OSError:
            file.truncate(old_size)
            raise


def aside_name(path: Path) -> Path:
    """The name that `swap` gives to the old folder for a moment."""
    return path.with_name(f"{path.name}.old")


def swap(one: Path, other: Path) -> None:
    """Swap the names of two folders in one step, or in three if the disk does not support that."""
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
