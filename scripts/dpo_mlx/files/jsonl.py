"""JSON and JSON-lines files: faults name `path:line`, and only files of ours are written."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import bounded, file_kinds, ownership
from .errors import UserError
from .text import shown

# Bytes of a row, which may be an answer that is too long, with each character escaped.
LONGEST_LINE = 2**26


def read_bytes(path: Path, remedy: str, most: int = bounded.STATE) -> bytes:
    """The file's bytes. Raises UserError, ending in `remedy`, when it cannot be read, or has more
    than `most` bytes.
    """
    return bounded.read(path, most, remedy)


def read(path: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line; blank lines, a BOM and CRLF are fine.

    Raises UserError for an unreadable or empty file or one of another kind, and with `path:line`
    for a line that is not UTF-8, no JSON or no object.
    """
    content = read_bytes(path, remedy, bounded.DATA)
    if kind := file_kinds.by_first_bytes(content):
        raise UserError(f"{shown(path)}: {kind}")
    first = True
    for number, raw in enumerate(io.BytesIO(content), start=1):
        line = raw.removesuffix(b"\n")
        if not line.strip(b"\xef\xbb\xbf \t\r"):
            continue
        try:
            row = _parse(line, f"{shown(path)}:{number}")
        except UserError as error:
            if first and (kind := file_kinds.by_first_line(line)):
                raise UserError(f"{shown(path)}: {kind}") from error
            raise
        first = False
        yield number, row
    if first:
        raise UserError(f"{shown(path)}: is empty; {remedy}")


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    if len(raw) > LONGEST_LINE:
        raise UserError(f"{where}: a line of {len(raw) / 1e6:.0f} MB; no row is that long")
    try:
        text = raw.decode("utf-8-sig")
        row = json.loads(text, object_pairs_hook=_without_repetition)
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        if "\\u" in text and not _is_text(row):
            raise UserError(f"{where}: half a surrogate pair (\\ud800 to \\udfff); write it whole")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start + 1}); save as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON that is nested too deeply; write text fields") from error
    except _Repeated as error:
        raise UserError(f"{where}: the key {error} appears twice; remove one") from error
    except ValueError as error:
        raise UserError(
            f"{where}: a number of thousands of digits; shorten or remove it"
        ) from error
    return row


class _Repeated(ValueError):
    """A key that appears twice in an object, as a message shows it."""


def _without_repetition(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        [(key, _)] = Counter(key for key, _ in items).most_common(1)
        raise _Repeated(f'"{shown(key)}"')
    return row


def _is_text(row: Any) -> bool:
    """Whether all of it can be written as UTF-8."""
    try:
        return bool(dumps(row).encode())
    except UnicodeEncodeError:
        return False


def dumps(row: Any) -> str:
    """One line of JSON, text as it is written."""
    return json.dumps(row, ensure_ascii=False)


def _lines(rows: Iterable[Any]) -> str:
    return "".join(dumps(row) + "\n" for row in rows)


def append(path: Path, rows: Iterable[Any]) -> None:
    """Add rows to a file of ours, all or none of them, and wait until they are on the disk."""
    ownership.append(path, _lines(rows).encode())


def write(path: Path, rows: Iterable[Any]) -> None:
    """Replace a file of ours by these rows, atomically."""
    write_text(path, _lines(rows))


def write_json(path: Path, value: Any) -> None:
    """Replace a file of ours by one indented JSON value, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file of ours, atomically: a reader sees the old text or the whole new one.

    Like the functions above, raises UserError for a file that the pipeline did not write, and for
    one that was changed since.
    """
    ownership.write(path, text.encode())


def read_whole_lines(path: Path, remedy: str = "") -> list[dict[str, Any]]:
    """The rows of a file that `append` wrote; a torn last line is cut off the file first.

    Raises UserError with `path:line`, ending in `remedy`, for a row that is not a JSON object.
    """
    raw = read_bytes(path, remedy, bounded.DATA)
    whole = raw[: raw.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(_parse(line, f"{path}:{number}"))
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
    if whole != raw:
        ownership.truncate(path, len(whole))
    return rows


def read_json(path: Path, remedy: str = "put back the whole file") -> Any:
    """One JSON value. Raises UserError, ending in `remedy`, when it is not there or broken."""
    try:
        return json.loads(read_bytes(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON; {remedy}") from error
