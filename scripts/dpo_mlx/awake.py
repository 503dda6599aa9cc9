"""Keep a Mac awake while a stage works. The display may sleep: while it is on, macOS can stop long
GPU commands (see `aborts.py`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

KEPT_AWAKE = "DPO_KEPT_AWAKE"  # set in the environment once the system is kept awake


def keep() -> None:
    """From now until this process ends, unless the runner has done so already."""
    caffeinate = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if caffeinate is None or KEPT_AWAKE in os.environ:
        return
    subprocess.Popen(
        [caffeinate, "-is", "-w", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # ^C stops the stage, which stays awake until its work is saved
    )
    print("the system stays awake until this ends; the display may sleep", file=sys.stderr)
