"""^C, SIGTERM and a closed terminal: a stage finishes its step, saves, and then exits."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import BinaryIO

DEFERRED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

# This variable names a file that the stage's supervisor locks while it runs. The supervisor passes
# the terminal's signals on as SIGTERM, so a stage with a supervisor handles SIGTERM only.
SUPERVISOR = "DPO_SUPERVISOR"

# `timeout` and a closed window send a signal twice: within this time two signals are one request.
SECONDS_OF_ONE_REQUEST = 1.0

_received: signal.Signals | None = None
_received_at = 0.0
_supervisor: BinaryIO | None = None  # the supervisor's file, open within `deferred`


class Interrupted(BaseException):
    """A signal asked the stage to stop. Not an Exception, because it is not an error."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def check() -> None:
    """Raises Interrupted when a signal has arrived or the supervisor has died. A stage calls this
    where it can stop without losing work.
    """
    if _received is not None:
        raise Interrupted(_received)
    if _supervisor_is_gone():
        raise Interrupted(signal.SIGHUP)


@contextmanager
def deferred() -> Iterator[None]:
    """Defer signals until the next `check`. A second signal ends the process at once."""
    global _received, _supervisor
    handlers = {number: signal.signal(number, _receive) for number in _to_defer()}
    _received = None
    try:
        with _supervisor_file() as _supervisor:
            yield
    finally:
        _supervisor = None
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _received = None


def _to_defer() -> list[signal.Signals]:
    if SUPERVISOR in os.environ:
        return [signal.SIGTERM]
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in DEFERRED if number != signal.SIGHUP or not nohup]


def _receive(number: int, frame: FrameType | None) -> None:
    global _received, _received_at
    if _received is not None:
        is_new_request = time.monotonic() - _received_at > SECONDS_OF_ONE_REQUEST
        if SUPERVISOR not in os.environ and (is_new_request or number == signal.SIGINT):
            os._exit(128 + _received)
        return
    _received, _received_at = signal.Signals(number), time.monotonic()
    line = (
        "\nstopping after the current step is saved; press ^C again to stop at once and lose that "
        "step\n"
    )
    with suppress(OSError):  # the terminal may be closed
        os.write(2, line.encode())  # print would fail if the signal interrupted a print


def _supervisor_file() -> AbstractContextManager[BinaryIO | None]:
    """Opened at the start, because the runner removes the file once the supervisor has died."""
    try:
        return open(os.environ[SUPERVISOR], "rb")
    except (KeyError, FileNotFoundError):
        return nullcontext()


def _supervisor_is_gone() -> bool:
    """Whether the supervisor's file is unlocked. Even SIGKILL unlocks it."""
    if _supervisor is None:
        return False
    try:
        fcntl.flock(_supervisor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
