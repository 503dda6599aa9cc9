"""The likely cause, and what to do, when a process died without a Python exception."""

from __future__ import annotations

import re
import signal
import sys

# Exit codes as a shell reports them: 128 + the signal that ended the process.
ABORTED, KILLED = 128 + signal.SIGABRT, 128 + signal.SIGKILL
CRASHED = 128 + signal.SIGSEGV, 128 + signal.SIGBUS
# One of several processes died with an unknown exit code (sysexits.h: EX_TEMPFAIL).
LOST = 75
CODES = ABORTED, KILLED, *CRASHED, LOST

LESS_MEMORY = "lower data.max_length or generation.batch_size, or close other programs"


def explain(code: int, platform: str = sys.platform) -> str:
    """The likely cause of one of CODES, and what to do."""
    if code == KILLED:
        return f"the system most likely ran out of memory; {LESS_MEMORY}"
    if code == LOST:
        return (
            "one of its processes died, most likely because memory ran out; use --launch none, "
            f"which needs less memory, or {LESS_MEMORY}"
        )
    if code in CRASHED:
        return (
            "a library crashed; MLX does that on a CPU when memory runs out; "
            f"{LESS_MEMORY}; if it happens again, report it with the lines above"
        )
    if platform == "darwin":
        return (
            "macOS most likely aborted a long GPU command because the display was on; let the "
            'display sleep (README, "When it goes wrong")'
        )
    return "a library aborted; read the lines above for the reason"


def of_gpu_error(error: RuntimeError) -> int | None:
    """Returns the exit code for a failed GPU command, None for any other error.

    MLX 0.31 and earlier abort the process. MLX 0.32 and later raise this error at a later command.
    """
    text = str(error)
    if "[METAL] Command buffer execution failed" not in text:
        return None
    return KILLED if "Insufficient Memory" in text or "OutOfMemory" in text else ABORTED


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or MLX failed to allocate memory."""
    if isinstance(error, RuntimeError):
        return re.match(r"\[[\w:]*malloc\w*\] .*allocate", str(error)) is not None
    return isinstance(error, MemoryError)
