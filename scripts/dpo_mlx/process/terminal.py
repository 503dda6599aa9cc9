"""Makes printed text safe: control characters in the user's data must not reach the terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from ..files.errors import UserError
from ..files.text import visible

# tqdm starts each redraw with a carriage return. Between bars it writes newlines and "cursor up".
CURSOR_MOVES = re.compile("\n*(\x1b\\[A)*")


class OutputLost(UserError):
    """Standard output cannot be written: its reader has exited, or its disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"standard output cannot be written ({error.strerror}); write it to a terminal or to a "
            "disk with free space, and run the same command again"
        )


class Output:
    """Standard output with control characters escaped.

    Raises OutputLost the first time a write fails, and drops all later text.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = False
        if hasattr(stream, "reconfigure"):  # an ASCII terminal shows \u2019
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(self._stream.write, self._escape(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _escape(self, text: str) -> str:
        return visible(text)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        if self._lost:
            return
        try:
            action(*arguments)
        except OSError as error:
            self._lost = True
            raise OutputLost(error) from error

    def end(self) -> None:
        """Flush now: Python would flush at exit, and exit with 120 if that fails."""
        try:
            self._stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class Messages(Output):
    """Standard error, with tqdm's bars let through. A failed write is ignored, because the work can
    continue without it.
    """

    def _escape(self, text: str) -> str:
        if CURSOR_MOVES.fullmatch(text):
            return text
        start = "\r" if text.startswith("\r") else ""
        return start + visible(text[len(start) :])

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        with suppress(OSError):
            action(*arguments)


@contextmanager
def protected() -> Iterator[None]:
    """Send everything printed through Output and Messages."""
    streams = sys.stdout, sys.stderr
    _reopen_closed_streams()
    output, messages = Output(sys.stdout or _null()), Messages(sys.stderr or _null())
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, messages)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        output.end()
        messages.end()


def _null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _reopen_closed_streams() -> None:
    """Open closed standard streams (`>&-`) on /dev/null. Otherwise the next file we open would get
    their number, and a library's output would end up in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
