"""The exceptions that become one error line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

WHILE = "while "  # the start of the notes that `doing` adds


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong, where, and what to do."""


class LostProcess(UserError):
    """Another process of the run, or its machine, has died."""


@contextmanager
def doing(verb: str, what: object) -> Iterator[None]:
    """Add a note to an exception: what the program was doing. `with doing("reading", path):`

    The error line shows the innermost note, the traceback shows all of them.
    """
    try:
        yield
    except BaseException as error:
        error.add_note(f"{WHILE}{verb} {what}")
        raise
