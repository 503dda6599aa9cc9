"""Keeps a Mac awake while a stage runs. The display may sleep: while it is on, macOS can abort long
GPU commands (see `aborts.py`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

KEPT_AWAKE = "DPO_KEPT_AWAKE"  # set when the runner already keeps the Mac awake


def keep() -> None:
    """Keep the Mac awake until this process exits, unless the runner already does."""
    caffeinate = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if caffeinate is None or KEPT_AWAKE in os.environ:
        return
    subprocess.Popen(
        [caffeinate, "-is", "-w", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # ^C must not end caffeinate before the stage saves
    )
    print("keeping this Mac awake until the stage ends; the display may sleep", file=sys.stderr)
