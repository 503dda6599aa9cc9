"""Writes that a crash cannot halve: synced, whole under their names, only over what is ours."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

# In every folder that `new_folder` makes; one without it is never replaced or removed.
MARK = ".made_by_dpo_mlx"

# What a stage writes beside its large files, in bytes: pairs, metrics, the report.
SMALL_FILES = 20_000_000

SWAP, AT_FDCWD = 2, -100  # flag and constant of both systems' calls that swap two names


def sync_file(descriptor: int) -> None:
    """Wait until an open file is on the disk; macOS's fsync leaves it in the drive's own memory."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(descriptor)
    else:
        fcntl.fcntl(descriptor, full)


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


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well.

    At every moment the old one or the new one is there as a whole. Raises UserError rather than
    take the place of a folder that was not made here.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    refuse_foreign(folder)
    temporary = _temporary(folder)
    _delete(temporary)
    temporary.mkdir()
    try:
        (temporary / MARK).touch()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if folder.exists():
            _swap(temporary, folder)
        else:
            temporary.rename(folder)
        sync(folder.parent)
    finally:  # what is under the temporary name now is a half, or the old one
        _delete(temporary)


def remove_folder(folder: Path) -> None:
    """Remove a folder that `new_folder` made; it is never found half removed."""
    refuse_foreign(folder)
    temporary = _temporary(folder)
    _delete(temporary)
    folder.rename(temporary)
    _delete(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill has left in `folder` of the other two functions' temporary folders."""
    for path in folder.glob(".*.tmp"):
        _delete(path)


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")


def refuse_foreign(folder: Path) -> None:
    """Raises UserError for what is there and is neither `new_folder`'s nor an empty folder."""
    if not os.path.lexists(folder) or (folder / MARK).exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()):
        raise UserError(
            f"{folder}: was not made by this pipeline, which would replace it; move it away, or "
            "set run_dir to another folder"
        )


def _delete(folder: Path) -> None:
    """Nothing happens when it is not there; the mark goes last, so that a rest is still ours."""
    refuse_foreign(folder)
    if folder.exists():
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != MARK:
                path.unlink()
        shutil.rmtree(folder)


def _swap(one: Path, other: Path) -> None:
    """Swap two folders' names in one step; where the file system cannot, in three."""
    libc = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        failed = libc.renamex_np(*names, SWAP)
    else:
        failed = libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], SWAP)
    if failed:
        aside = one.with_name(f"{one.name}.old")
        other.rename(aside)
        one.rename(other)
        aside.rename(one)
