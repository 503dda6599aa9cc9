"""What a stage says when it cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

WHILE = "while "  # begins the notes that `doing` adds


class UserError(Exception):
    """A fault the user can mend: one line that names the file, line or key and the remedy."""


class LostProcess(UserError):
    """Another process of the run, or its machine, is gone."""


@contextmanager
def doing(verb: str, what: object) -> Iterator[None]:
    """Within, an exception learns what was being done: `with doing("reading", path):`.

    The innermost `doing` is what the error line says; a traceback shows all of them.
    """
    try:
        yield
    except BaseException as error:
        error.add_note(f"{WHILE}{verb} {what}")
        raise
