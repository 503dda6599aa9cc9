"""JSON and JSON-lines files: faults name `path:line`, and only files of ours are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import ownership
from .errors import UserError


def read_bytes(path: Path, remedy: str) -> bytes:
    """The file's bytes. Raises UserError, ending in `remedy`, when it is no readable file."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory, not a file; {remedy}")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {remedy}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def read(path: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line; blank lines, a BOM and CRLF are fine.

    Raises UserError for an unreadable or empty file, and with `path:line` for a line that is no
    UTF-8, no JSON or no object.
    """
    found = False
    for number, raw in enumerate(read_bytes(path, remedy).split(b"\n"), start=1):
        if not raw.strip(b"\xef\xbb\xbf \t\r"):
            continue
        found = True
        yield number, _parse(raw, f"{path}:{number}")
    if not found:
        raise UserError(f"{path}: is empty; {remedy}")


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8-sig")
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start + 1}); save as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise UserError(f"{where}: JSON that cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if "\\u" in text and not _is_text(row):
        raise UserError(f"{where}: half a surrogate pair (\\ud800 to \\udfff); write it whole")
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


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_whole_lines(path: Path, remedy: str = "") -> list[dict[str, Any]]:
    """The rows of a file that `append` wrote; a torn last line is cut off the file first.

    Raises UserError with `path:line`, ending in `remedy`, for a row that is no JSON object.
    """
    raw = read_bytes(path, remedy)
    whole = raw[: raw.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(_parse(line, f"{path}:{number}"))
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
    if whole != raw:
        ownership.cut(path, len(whole))
    return rows


def read_json(path: Path, remedy: str = "put back the whole file") -> Any:
    """One JSON value. Raises UserError, ending in `remedy`, when it is not there or broken."""
    try:
        return json.loads(read_bytes(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON; {remedy}") from error
