"""One run at a time in a folder, and only in a run's own folder."""

from __future__ import annotations

import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

LOCK = ".lock"

# What the stages write into a run's folder, under these names.
OWN = {
    "adapters",
    "checkpoints",
    "config.yaml",
    "fuse.json",
    "fused",
    "hf",
    "metrics.jsonl",
    "outcome.json",
    "peft",
    "plan.json",
    "reference",
    "report.html",
    "report.json",
    "stamps",
}


@contextmanager
def run_folder(run: Path) -> Iterator[None]:
    """Hold a run's folder, which is made when it is missing.

    Raises UserError when another process holds it, and for a folder where something stands under
    a name of OWN that no run has written.
    """
    run.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in run.iterdir()}
    if (foreign := sorted(names & OWN)) and not names & {LOCK, "stamps"}:
        raise UserError(
            f"run_dir: {run} is no run's folder, and a run would replace its {foreign[0]}; set "
            "run_dir to a new folder"
        )
    with held(run / LOCK, "run_dir"):
        yield


@contextmanager
def held(path: Path, key: str) -> Iterator[None]:
    """Hold a lock file, which dies with the process however that ends.

    Raises UserError, that says who holds it, when another process does; `key` is the config's key
    to set for working beside it.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{path.parent}: in use by {holder}; wait until that has ended, or set {key} to "
                "another place"
            ) from error
        file.truncate(0)
        file.write(_myself())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _myself() -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {platform.node()} ({Path(sys.argv[0]).name}, {started})"
