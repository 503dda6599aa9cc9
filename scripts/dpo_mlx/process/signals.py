"""^C, SIGTERM and a closed terminal: a stage ends at the next point where nothing is lost."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import BinaryIO

CAUGHT = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

# Names a file that the supervisor of this stage keeps locked as long as it lives. With a supervisor
# a stage listens to SIGTERM only: what the terminal sends, the supervisor hands on.
SUPERVISOR = "DPO_SUPERVISOR"

# `timeout` and a closed window send their signal twice at once: that is not a second request.
SECONDS_OF_ONE_REQUEST = 1.0

_received: signal.Signals | None = None
_received_at = 0.0
_supervisor: BinaryIO | None = None  # its file, within `caught`


class Interrupted(BaseException):
    """A signal asked the stage to end; no Exception, so that nothing takes it for a fault."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def check() -> None:
    """Raises Interrupted when a signal has come, or the supervisor is gone; called where a stage
    can be left.
    """
    if _received is not None:
        raise Interrupted(_received)
    if _supervisor_is_gone():
        raise Interrupted(signal.SIGHUP)


@contextmanager
def caught() -> Iterator[None]:
    """Within, a signal is kept for `check`; a second one leaves at once."""
    global _received, _supervisor
    before = {number: signal.signal(number, _receive) for number in _to_catch()}
    _received = None
    try:
        with _supervisor_file() as _supervisor:
            yield
    finally:
        _supervisor = None
        for number, handler in before.items():
            signal.signal(number, handler)
        _received = None


def _to_catch() -> list[signal.Signals]:
    if SUPERVISOR in os.environ:
        return [signal.SIGTERM]
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in CAUGHT if number != signal.SIGHUP or not nohup]


def _receive(number: int, frame: FrameType | None) -> None:
    global _received, _received_at
    if _received is not None:
        again = time.monotonic() - _received_at > SECONDS_OF_ONE_REQUEST
        if SUPERVISOR not in os.environ and (again or number == signal.SIGINT):
            os._exit(128 + _received)
        return
    _received, _received_at = signal.Signals(number), time.monotonic()
    line = (
        f"\n{_received.name}: stopping as soon as the step in progress is saved; press ^C again to "
        "stop at once and lose that step\n"
    )
    with suppress(OSError):  # the terminal may be gone
        os.write(2, line.encode())  # print fails when the signal came in the middle of a print


def _supervisor_file() -> AbstractContextManager[BinaryIO | None]:
    """Opened early, as the runner removes its temporary files when it finds the supervisor dead."""
    try:
        return open(os.environ[SUPERVISOR], "rb")
    except (KeyError, FileNotFoundError):
        return nullcontext()


def _supervisor_is_gone() -> bool:
    """Whether the supervisor's file is unlocked: even SIGKILL unlocks it."""
    if _supervisor is None:
        return False
    try:
        fcntl.flock(_supervisor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
