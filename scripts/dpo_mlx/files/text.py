"""Text for messages: on one line, without control characters, and not too long."""

from __future__ import annotations

import re

# Control characters but tab and newline; Unicode's line separators, and what reverses text.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

# Characters of a path, a value or an error's text that a message shows.
SHOWN = 200


def visible(text: str) -> str:
    """`text` with its control characters spelled out: \\x1b, \\u202e."""
    return CONTROL.sub(_spelled, text)


def _spelled(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def cut(text: str, length: int) -> str:
    """`text`, or its beginning and "..." when it has more characters than `length`."""
    return text if len(text) <= length else text[: length - 3] + "..."


def shown(value: object, length: int = SHOWN) -> str:
    """A value for a message: on one line, what cannot be printed spelled out, and cut."""
    text = str(value)
    start = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:length])
    return start if len(text) <= length else f"{start}..."


def one_line(text: str) -> str:
    """`text` with single blanks in place of line breaks, and control characters spelled out."""
    return visible(" ".join(text.split()))


def reason(error: BaseException, length: int = SHOWN) -> str:
    """What an exception says, on one line and cut; its type when it says nothing."""
    try:
        text = str(error)
    except Exception as fault:  # someone's __str__ is broken
        text = f"its text cannot be read: {type(fault).__name__}"
    return cut(one_line(text), length) or type(error).__name__
