"""The kinds of a source file: what it was taken for, and its rows."""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import bounded, file_kinds, jsonl, text_folder
from ..files.errors import UserError
from ..files.jsonl import BadJson
from ..files.text import reason, shown
from .source_rows import QUESTION, Fields, clean_name, format_of

REMEDY = "set data.source to your questions and answers"
GZIP, BOM = b"\x1f\x8b", b"\xef\xbb\xbf"
LONGEST_HEADER = 10_000  # bytes of the first line of a table
OPEN_QUOTE = "a quote that opens here is never closed; close it"
BROKEN_ROW = "quotes that do not fit; write each quote in a quoted text twice"
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons"}


@dataclass(frozen=True)
class Row:
    """A row's fields, or why it has none (`fault`). `place` names it in messages; `line` counts
    from 1.
    """

    place: str
    line: int
    fields: Fields
    fault: str = ""


def read(path: Path) -> tuple[str, list[Row]]:
    """Returns (what the source was taken for, its rows). A row that cannot be read has a fault.

    Raises UserError when the source cannot be read at all, or has no rows.
    """
    if os.path.isdir(path):  # a name that no file can have is not one
        return _read_folder(path)
    content = bounded.read(path, bounded.DATA_LIMIT, REMEDY)
    packing = ""
    if content.startswith(GZIP):
        content, packing = _unpack(content, path), ", packed with gzip"
    if kind := file_kinds.by_first_bytes(content):
        raise UserError(f"{shown(path)}: {kind}")
    kind, rows = _rows(content, path)
    if not rows:
        raise UserError(f"{shown(path)}: is empty; {REMEDY}")
    return f"{kind}{packing}", rows


def _rows(content: bytes, path: Path) -> tuple[str, list[Row]]:
    name = shown(path)
    _, first_line = next(jsonl.lines(content), (0, b""))
    start = first_line.lstrip(jsonl.BLANK)
    if not start:
        raise UserError(f"{name}: is empty; {REMEDY}")
    if start.startswith(b"["):
        return "a JSON list", _list_items(content, name)
    if start.startswith(b"{"):
        is_spread = first_line.rstrip().endswith((b"{", b"[", b","))
        if is_spread and _json_line(first_line, name, 1).fault:
            # Objects over several lines are a list without its brackets.
            return "JSON objects", _list_items(b"[%b]" % content.removeprefix(BOM), name)
        return "JSON lines", [_json_line(raw, name, line) for line, raw in jsonl.lines(content)]
    if delimiter := _delimiter(first_line):
        kind = f"a table (CSV) with {DELIMITERS[delimiter]}"
        return kind, list(_table(content, name, delimiter))
    raise UserError(
        f"{name}: is not JSON, and its first line does not name the columns of a table (CSV), such "
        "as question,answer; see the README for the formats"
    )


def _unpack(content: bytes, path: Path) -> bytes:
    """Raises UserError when the file is damaged, or would become too large."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            unpacked = file.read(bounded.DATA_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{shown(path)}: cannot be unpacked ({reason(error)}); copy or download it again"
        ) from error
    if len(unpacked) > bounded.DATA_LIMIT:
        raise UserError(f"{shown(path)}: is larger than 1 GB when unpacked; {REMEDY}")
    return unpacked


def _json_line(raw: bytes, name: str, number: int) -> Row:
    place = f"{name}:{number}"
    try:
        return Row(place, number, jsonl.parse_line(raw))
    except BadJson as error:
        return Row(place, number, {}, str(error))


def _list_items(content: bytes, name: str) -> list[Row]:
    """Raises UserError when the list is broken: what follows the fault cannot be read."""
    text = _decode(content, name)
    is_escaped, rows = "\\u" in text, []
    try:
        for number, value in jsonl.parse_list(text):
            rows.append(_list_item(value, f"{name}:{number}", number, is_escaped))
    except BadJson as error:
        raise UserError(f"{name}:{error.line}: {error}") from error
    return rows


def _list_item(value: object, place: str, number: int, is_escaped: bool) -> Row:
    try:
        return Row(place, number, jsonl.require_object(value, is_escaped))
    except BadJson as error:
        return Row(place, number, {}, str(error))


def _delimiter(first_line: bytes) -> str | None:
    """What stands between the columns of a table's header. None when no column is known."""
    header = first_line[:LONGEST_HEADER].decode("utf-8-sig", "replace").splitlines()[:1]
    for delimiter in DELIMITERS:
        if format_of(map(clean_name, next(csv.reader(header, delimiter=delimiter)))):
            return delimiter
    return None


def _table(content: bytes, name: str, delimiter: str) -> Iterator[Row]:
    """Raises UserError for a header that is broken or names a column twice, and for a quote that is
    not closed: it takes in all that follows.
    """
    header: list[str] = []
    for number, cells, fault in _lines_of_table(_decode(content, name), delimiter):
        place = f"{name}:{number}"
        if fault and (not header or fault == OPEN_QUOTE):
            raise UserError(f"{place}: {fault}")
        if not header:
            header = cells
            _require_unique_columns(header, place)
        elif fault:
            yield Row(place, number, {}, fault)
        else:
            yield _table_row(cells, header, place, number)


def _lines_of_table(text: str, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Yield (line number from 1, cells, "") or (line number, [], fault) for each row that is not
    blank.
    """
    csv.field_size_limit(jsonl.LONGEST_LINE)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            if any(cells := next(reader)):
                yield number, cells, ""
        except StopIteration:
            return
        except csv.Error as error:
            is_open = str(error) == "unexpected end of data"
            yield number, [], OPEN_QUOTE if is_open else f"{BROKEN_ROW} ({shown(error)})"


def _require_unique_columns(header: list[str], place: str) -> None:
    names = Counter(filter(None, map(clean_name, header)))
    column, count = names.most_common(1)[0]
    if count > 1:
        raise UserError(f'{place}: the column "{shown(column)}" appears twice; remove one')


def _table_row(cells: list[str], header: list[str], place: str, number: int) -> Row:
    """Leaves out empty cells: a table has them where a row does not use a column."""
    if len(cells) == len(header):
        pairs = zip(header, cells, strict=True)
        return Row(place, number, {column: cell for column, cell in pairs if cell.strip()})
    fault = (
        f"a row with another number of columns than the header, found {len(cells)} instead of "
        f"{len(header)}; put a text in quotes"
    )
    return Row(place, number, {}, fault)


def _read_folder(folder: Path) -> tuple[str, list[Row]]:
    """Raises UserError when the folder cannot be read or has no text files."""
    name = shown(folder)
    try:
        files = text_folder.files_in(folder)
        others = len(list(folder.iterdir())) - len(files)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); {REMEDY}") from error
    if not files:
        suffixes = ", ".join(text_folder.SUFFIXES)
        raise UserError(f"{name}: is a folder without text files ({suffixes}); {REMEDY}")
    ignored = f"; {others} other files and folders in it are not read" if others else ""
    rows = [_text_file(path, number) for number, path in enumerate(files, start=1)]
    return f"a folder of text files{ignored}", rows


def _text_file(path: Path, number: int) -> Row:
    content = bounded.read(path, bounded.DATA_LIMIT, "move it away")
    place = shown(path)
    try:
        text = _text(content)
    except UnicodeDecodeError as error:
        return Row(place, number, {}, f"not UTF-8 (byte {error.start + 1}); save it as UTF-8")
    text = _without_front_matter(text).strip()
    if text.startswith(QUESTION):
        return Row(place, number, {"text": text})
    heading, _, answer = text.partition("\n")
    underline, _, rest = answer.partition("\n")
    if len(underline) > 1 and set(underline.strip()) in ({"="}, {"-"}):
        answer = rest
    return Row(place, number, {"question": _without_marks(heading), "answer": answer})


def _without_marks(heading: str) -> str:
    """The text of a heading, without the # marks before and after it."""
    marks, _, text = heading.partition(" ")
    if marks.strip("#"):
        return heading
    text, _, end = text.rstrip().rpartition(" ")
    return f"{text} {end}" if end.strip("#") else text


def _without_front_matter(text: str) -> str:
    """The text without the settings between two lines of --- that some programs put first."""
    lines = text.split("\n")
    if lines[0].strip() == "---":
        for number, line in enumerate(lines[1:], start=1):
            if line.strip() == "---":
                return "\n".join(lines[number + 1 :])
    return text


def _decode(content: bytes, name: str) -> str:
    try:
        return _text(content)
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{number}: not UTF-8; save the file as UTF-8") from error


def _text(content: bytes) -> str:
    """The text of a file, with the line ends of any system made \\n."""
    return content.decode().lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
