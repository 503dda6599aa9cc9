"""A limit on the time that a block of Python computes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REPEAT = 0.1  # seconds; a first exception may be lost, as one in a destructor is


class TooSlow(Exception):
    """A block has computed for longer than it may."""


@contextmanager
def computing(seconds: float) -> Iterator[None]:
    """Raises TooSlow where the block is when this process has computed for `seconds` in it. Waiting
    does not count, so that a busy machine changes nothing.

    Python notices between two of its own steps: one long call into a library is not cut short.
    Signals reach the main thread alone; in another one there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"it took over {seconds:g} seconds of CPU time")

    handler = signal.signal(signal.SIGVTALRM, stop)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, REPEAT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, handler or signal.SIG_DFL)
