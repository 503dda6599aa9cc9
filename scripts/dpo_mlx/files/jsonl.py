"""Reads JSON and JSON-lines files with errors that name `path:line`, and writes our own ones."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import bounded, file_kinds, ownership
from .errors import UserError
from .text import shown

# Bytes. A row can be a very long answer with every character escaped.
LONGEST_LINE = 2**26
# What a blank line may have: a BOM and blanks.
BLANK = b"\xef\xbb\xbf \t\r\n"
_VALUE = re.compile(r"[^\s,]")


def read_bytes(path: Path, remedy: str, limit: int = bounded.STATE_LIMIT) -> bytes:
    """Read a file. Raises UserError, ending in `remedy`, when it cannot be read or has more than
    `limit` bytes.
    """
    return bounded.read(path, limit, remedy)


class BadJson(ValueError):
    """Text that is not the JSON that we expect. The message says why. `line` counts from 1."""

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


def read(path: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line. Blank lines, a BOM and CRLF are allowed.

    Raises UserError for an unreadable or empty file, for a file of another kind, and with
    `path:line` for a line that is not UTF-8, not JSON or not an object.
    """
    content = read_bytes(path, remedy, bounded.DATA_LIMIT)
    if kind := file_kinds.by_first_bytes(content):
        raise UserError(f"{shown(path)}: {kind}")
    is_first_row = True
    for number, line in lines(content):
        try:
            row = _parse(line, f"{shown(path)}:{number}")
        except UserError as error:
            if is_first_row and (kind := file_kinds.by_first_line(line)):
                raise UserError(f"{shown(path)}: {kind}") from error
            raise
        is_first_row = False
        yield number, row
    if is_first_row:
        raise UserError(f"{shown(path)}: is empty; {remedy}")


def lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its end) for every line that is not blank."""
    for number, raw in enumerate(io.BytesIO(content), start=1):
        if raw.strip(BLANK):
            yield number, raw.removesuffix(b"\n")


def _parse(raw: bytes, place: str) -> dict[str, Any]:
    try:
        return parse_line(raw)
    except BadJson as error:
        raise UserError(f"{place}: {error}") from error


def parse_line(raw: bytes) -> dict[str, Any]:
    """Parse a line. Raises BadJson when it is not UTF-8, not JSON or not an object."""
    if len(raw) > LONGEST_LINE:
        raise BadJson(f"the line has {len(raw) / 1e6:.0f} MB; split or remove it")
    try:
        text = raw.decode().lstrip("\ufeff")  # joined files have several byte order marks
    except UnicodeDecodeError as error:
        raise BadJson(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    with _explained():
        row = _DECODER.decode(text)
    return require_object(row, "\\u" in text)


def parse_list(text: str) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) for every value of a JSON list. Commas may be missing.

    Raises BadJson when the list is broken or does not end.
    """
    position, line, counted = _next_value(text, text.index("[") + 1), 1, 0
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        if position == len(text):
            raise BadJson("the list does not end; the file may be cut off", line)
        with _explained(line):
            value, position = _DECODER.raw_decode(text, position)
        yield line, value
        position = _next_value(text, position)
    if text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        raise BadJson("there is more text after the end of the list; remove it", line)


def _next_value(text: str, position: int) -> int:
    """The position of the first character that is not a blank or a comma."""
    match = _VALUE.search(text, position)
    return match.start() if match else len(text)


def require_object(row: Any, is_escaped: bool) -> dict[str, Any]:
    """Returns a row. Raises BadJson when it is not an object, and when half of a surrogate pair is
    in it, which is possible only if some characters are `is_escaped`.
    """
    if not isinstance(row, dict):
        raise BadJson(f"expected a JSON object, found {type(row).__name__}")
    if is_escaped and not _is_text(row):
        raise BadJson("half of a surrogate pair (\\ud800 to \\udfff); remove or complete it")
    return row


@contextmanager
def _explained(line: int = 1) -> Iterator[None]:
    """Raise what the JSON decoder raises as BadJson."""
    try:
        yield
    except json.JSONDecodeError as error:
        message = f"broken JSON at column {error.colno}: {error.msg}"
        raise BadJson(message, error.lineno) from error
    except RecursionError as error:
        raise BadJson("the JSON is nested too deeply; use text fields", line) from error
    except _RepeatedKeyError as error:
        raise BadJson(f"the key {error} appears twice; remove one", line) from error
    except ValueError as error:
        raise BadJson("a number has thousands of digits; shorten or remove it", line) from error


class _RepeatedKeyError(ValueError):
    """A key appears twice in an object. The text is the key in quotes."""


def _require_unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        [(key, _)] = Counter(key for key, _ in items).most_common(1)
        raise _RepeatedKeyError(f'"{shown(key)}"')
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_require_unique_keys)


def _is_text(row: Any) -> bool:
    """Whether every text in a row can be encoded as UTF-8."""
    try:
        return bool(dumps(row).encode())
    except UnicodeEncodeError:
        return False


def dumps(row: Any) -> str:
    """Returns one line of JSON, with non-ASCII characters unescaped."""
    return json.dumps(row, ensure_ascii=False)


def _lines(rows: Iterable[Any]) -> str:
    return "".join(dumps(row) + "\n" for row in rows)


def append(path: Path, rows: Iterable[Any]) -> None:
    """Append all rows or none to a file of ours, and wait until they are on the disk."""
    ownership.append(path, _lines(rows).encode())


def write(path: Path, rows: Iterable[Any]) -> None:
    """Replace a file of ours with these rows, atomically."""
    write_text(path, _lines(rows))


def write_json(path: Path, value: Any) -> None:
    """Replace a file of ours with one indented JSON value, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file of ours atomically. A reader sees the old text or the whole new one.

    Like the functions above, raises UserError for a file that the pipeline did not write, or that
    has changed since.
    """
    ownership.write(path, text.encode())


def read_whole_lines(path: Path, remedy: str = "") -> list[dict[str, Any]]:
    """Read a file that `append` wrote, after cutting a torn last line off the file.

    Raises UserError with `path:line`, ending in `remedy`, for a row that is not a JSON object.
    """
    raw = read_bytes(path, remedy, bounded.DATA_LIMIT)
    whole_lines = raw[: raw.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole_lines.splitlines(), start=1):
        try:
            rows.append(_parse(line, f"{path}:{number}"))
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
    if whole_lines != raw:
        ownership.truncate(path, len(whole_lines))
    return rows


def read_json(path: Path, remedy: str = "put back the whole file") -> Any:
    """Read one JSON value. Raises UserError, ending in `remedy`, when it is missing or broken."""
    try:
        return json.loads(read_bytes(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON; {remedy}") from error
