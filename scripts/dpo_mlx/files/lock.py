"""One run at a time in a folder, and only in a folder where a run would replace nothing foreign."""

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

HEADER = "lock of dpo-mlx\n"  # how every lock file begins; then comes who holds it


@contextmanager
def hold_run(run: RunFolder) -> Iterator[None]:
    """Hold a run's folder, which is made when it is missing.

    Raises UserError when another process holds it, and when something that is not ours, or that
    was changed since, stands under a name that a run writes.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with hold(run.lock, "run_dir"):
        _require_ours(run)
        yield


def _require_ours(run: RunFolder) -> None:
    names = sorted(path.name for path in run.files if os.path.lexists(path))
    if len(names) > 1 and not ownership.read_manifest(run.path):
        raise UserError(
            f"{run.path}: no {MANIFEST} names {names[0]} and {len(names) - 1} more files there: an "
            "earlier version made them, or they were copied without it, or they are not the "
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
    """Hold a lock file, which dies with the process however that ends.

    Raises UserError when another process holds it, whom the message names, and when the file is
    not one of ours; `key` is the config's key to set for working beside it.
    """
    with open(_open(path), "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read().removeprefix(HEADER).strip() or "another process"
            raise UserError(
                f"{path.parent}: in use by {holder}; wait until that has ended, or set {key} to "
                "another place"
            ) from error
        except OSError as error:
            raise UserError(
                f"{path.parent}: its disk has no locks ({error.strerror}); set {key} to a place on "
                "a disk of this machine"
            ) from error
        # A lock that was made a moment ago, or torn by a kill, holds only a part of the header.
        if not (content := file.read(len(HEADER))) == HEADER[: len(content)]:
            raise _foreign(path)
        _write(file, HEADER + _myself())
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
    """A descriptor of the lock file. Raises UserError for a link, a pipe, a folder."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _foreign(path) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # another name is somebody's file
        os.close(descriptor)
        raise _foreign(path)
    return descriptor


def _foreign(path: Path) -> UserError:
    return UserError(f"{path}: is not a lock of this pipeline; move it away")


def _myself() -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {platform.node()} ({Path(sys.argv[0]).name}, {started})"
