"""Text on its way to a terminal, which must not obey what stands in someone's data."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from ..files.errors import UserError
from ..files.text import visible

# tqdm begins each drawing of its bar with a return, and moves between bars with newlines and "up".
BETWEEN_BARS = re.compile("\n*(\x1b\\[A)*")


class OutputLost(UserError):
    """Standard output can no longer be written: its reader is gone, or its disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"standard output cannot be written ({error.strerror}); send it to a terminal, or to a "
            "file on a disk with space, and run the same command again"
        )


class Output:
    """Standard output, whose control characters are spelled out.

    Raises OutputLost the first time that it cannot be written; what follows is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = False
        if hasattr(stream, "reconfigure"):  # an ASCII terminal gets \u2019 for what it cannot show
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(self._stream.write, self._shown(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _shown(self, text: str) -> str:
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
        """Python writes what is left when it ends, and if that fails, exits with 120."""
        try:
            self._stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class Messages(Output):
    """Standard error, on which tqdm may draw its bars. While it cannot be written the work goes on;
    a disk that is full now may have space for the next line.
    """

    def _shown(self, text: str) -> str:
        if BETWEEN_BARS.fullmatch(text):
            return text
        start = "\r" if text.startswith("\r") else ""
        return start + visible(text[len(start) :])

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        with suppress(OSError):
            action(*arguments)


@contextmanager
def protected() -> Iterator[None]:
    """Within, all that is printed goes through Output and Messages."""
    before = sys.stdout, sys.stderr
    _open_closed()
    output, messages = Output(sys.stdout or _nowhere()), Messages(sys.stderr or _nowhere())
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, messages)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        output.end()
        messages.end()


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _open_closed() -> None:
    """Open standard streams that were closed (`>&-`): else the next file would get their number,
    and what a library prints would end up in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
