"""Lets one run at a time use a folder, and only a folder where it replaces no file of the user."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from . import ownership
from .errors import UserError
from .ownership import MANIFEST
from .run_folder import RunFolder

HEADER = "lock of dpo-mlx\n"  # every lock file begins with this; the holder comes next


@contextmanager
def hold_run(run: RunFolder) -> Iterator[None]:
    """Create the run folder if needed, and lock it.

    Raises UserError when another process holds the lock, and when the user has a file, or has
    changed a file, under a name that a run writes.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with hold(run.lock, "run_dir"):
        _require_ours(run)
        yield


def _require_ours(run: RunFolder) -> None:
    names = sorted(path.name for path in run.files if os.path.lexists(path))
    if len(names) > 1 and not ownership.read_manifest(run.path):
        raise UserError(
            f"{run.path}: no {MANIFEST} lists {names[0]} and {len(names) - 1} more files: an "
            "earlier version wrote them, they were copied without it, or they are not the "
            "pipeline's; set run_dir to a new folder"
        )
    for path in (*sorted(run.files), *sorted(run.stamps.glob("*.json"))):
        ownership.require(path)
    for path in run.whole_folders:
        ownership.require_our_folder(path)
    for path in run.shared_folders:
        ownership.require_directory(path)


@contextmanager
def hold(path: Path, key: str) -> Iterator[None]:
    """Lock a file. The lock ends with the process, even after a kill.

    Raises UserError when another process holds the lock (the message names it) and when the file
    is not our lock file. `key` is the config key to change to use another place.
    """
    with open(_open(path), "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read().removeprefix(HEADER).strip() or "another process"
            raise UserError(
                f"{path.parent}: in use by {holder}; wait until it ends, or set {key} to another "
                "place"
            ) from error
        except OSError as error:
            raise UserError(
                f"{path.parent}: this disk cannot lock files ({error.strerror}); set {key} to a "
                "place on a local disk"
            ) from error
        # A new lock file, or one torn by a kill, has only a part of the header.
        if not (content := file.read(len(HEADER))) == HEADER[: len(content)]:
            raise _not_a_lock(path)
        _write(file, HEADER + _this_process())
        try:
            yield
        finally:
            _write(file, HEADER)


def _write(file: TextIO, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _open(path: Path) -> int:
    """Open the lock file. Raises UserError for a link, a pipe or a folder."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_a_lock(path) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # a hard link is the user's
        os.close(descriptor)
        raise _not_a_lock(path)
    return descriptor


def _not_a_lock(path: Path) -> UserError:
    return UserError(f"{path}: is not a lock file of this pipeline; move it away")


def _this_process() -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {platform.node()} ({Path(sys.argv[0]).name}, {started})"
