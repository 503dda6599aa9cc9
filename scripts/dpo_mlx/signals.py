"""^C and SIGTERM: a stage ends at the next point where nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

CAUGHT = signal.SIGINT, signal.SIGTERM

_received: signal.Signals | None = None


class Interrupted(BaseException):
    """A signal asked the stage to end; no Exception, so that nothing takes it for a fault."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def check() -> None:
    """Raises Interrupted when a signal has come; called where a stage can be left."""
    if _received is not None:
        raise Interrupted(_received)


@contextmanager
def caught() -> Iterator[None]:
    """Within, a signal is kept for `check`; a second ^C leaves at once."""
    global _received
    before = {number: signal.signal(number, _receive) for number in CAUGHT}
    _received = None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received = None


def _receive(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        if number == signal.SIGINT == _received:
            os._exit(128 + number)
        return
    _received = signal.Signals(number)
    with suppress(OSError):  # the terminal may be gone
        print(
            f"\n{_received.name}: stopping as soon as the step in progress is saved; press ^C "
            "again to stop at once and lose that step",
            file=sys.stderr,
            flush=True,
        )
