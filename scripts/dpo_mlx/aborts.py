"""Ends of a process that no Python line explains: what each most likely means, what to change."""

from __future__ import annotations

import signal
import sys

# Exit codes as a shell tells them: 128 + the signal that ended the process.
ABORTED, KILLED = 128 + signal.SIGABRT, 128 + signal.SIGKILL
CRASHED = 128 + signal.SIGSEGV, 128 + signal.SIGBUS
CODES = ABORTED, KILLED, *CRASHED

LESS_MEMORY = "lower data.max_length or generation.batch_size, or close other programs"


def explain(code: int, platform: str = sys.platform) -> str:
    """The likely cause of one of CODES, and the remedy."""
    if code == KILLED:
        return f"most likely memory ran out; {LESS_MEMORY}"
    if code in CRASHED:
        return "a library crashed; if it happens again, report it with the lines above"
    if platform == "darwin":
        return (
            "most likely macOS stopped a long GPU command because the display was on; let the "
            'display sleep (README, "When it goes wrong")'
        )
    return "a library gave up; the lines above say why"


def of_gpu_error(error: RuntimeError) -> int | None:
    """The exit code for a GPU command that failed, None for any other error.

    MLX up to 0.31 aborts the process for it; from 0.32 on it raises, at a later command.
    """
    text = str(error)
    if "[METAL] Command buffer execution failed" not in text:
        return None
    return KILLED if "Insufficient Memory" in text or "OutOfMemory" in text else ABORTED
