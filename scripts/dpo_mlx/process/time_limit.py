"""A CPU time limit for a block of Python."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REPEAT_SECONDS = 0.1  # an exception raised in a destructor is lost, so raise it again


class TooSlow(Exception):
    """A block has used more CPU time than its limit."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow within the block after `seconds` of CPU time. Waiting does not count, so a
    busy machine makes no difference.

    Python raises it between two of its own instructions: a long call into a library runs to its
    end. Signals reach only the main thread, so there is no limit in other threads.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"it took over {seconds:g} seconds of CPU time")

    handler = signal.signal(signal.SIGVTALRM, stop)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, REPEAT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, handler or signal.SIG_DFL)
