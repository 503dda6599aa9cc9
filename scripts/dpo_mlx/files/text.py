"""Prepares text for messages: one line, no control characters, limited length."""

from __future__ import annotations

import re

# Control characters except tab and newline, Unicode's line separators and text direction marks.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

# Characters of a path, a value or an exception's text that a message shows.
MAX_LENGTH = 200


def visible(text: str) -> str:
    """Returns `text` with control characters escaped, as in \\x1b and \\u202e."""
    return CONTROL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def cut(text: str, length: int) -> str:
    """Cut `text` to `length` characters, with "..." at the end."""
    return text if len(text) <= length else text[: length - 3] + "..."


def shown(value: object, length: int = MAX_LENGTH) -> str:
    """Format a value for a message: one line, unprintable characters escaped, cut."""
    text = str(value)
    start = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:length])
    return start if len(text) <= length else f"{start}..."


def one_line(text: str) -> str:
    """Join the lines of `text` with single blanks, and escape control characters."""
    return visible(" ".join(text.split()))


def reason(error: BaseException, length: int = MAX_LENGTH) -> str:
    """The text of an exception, on one line and cut. Its type when the text is empty."""
    try:
        text = str(error)
    except Exception as fault:  # the exception has a broken __str__
        text = f"its text cannot be read: {type(fault).__name__}"
    return cut(one_line(text), length) or type(error).__name__
