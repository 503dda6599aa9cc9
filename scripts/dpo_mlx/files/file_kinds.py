"""Recognises files that are not JSON lines, and says how to convert them."""

from __future__ import annotations

SAVE_AS_UTF_8 = "save it as UTF-8"
EXPORT = "export it as JSON lines, one JSON object per line"
UNPACK = "unpack it and use the file inside"

# (first bytes, kind of file, what to do). A longer prefix comes before a shorter one.
MAGIC = (
    (b"\xff\xfe\0\0", "UTF-32 text", SAVE_AS_UTF_8),
    (b"\0\0\xfe\xff", "UTF-32 text", SAVE_AS_UTF_8),
    (b"\xff\xfe", "UTF-16 text", SAVE_AS_UTF_8),
    (b"\xfe\xff", "UTF-16 text", SAVE_AS_UTF_8),
    (b"{\0", "UTF-16 text", SAVE_AS_UTF_8),
    (b"\0{", "UTF-16 text", SAVE_AS_UTF_8),
    (b"\x1f\x8b", "gzip data", UNPACK),
    (b"BZh", "bzip2 data", UNPACK),
    (b"\xfd7zXZ\0", "xz data", UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstandard data", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"PK\x03\x04", "a zip archive or an Office file (xlsx, docx)", EXPORT),
    (b"PK\x05\x06", "an empty zip archive", EXPORT),
    (b"\xd0\xcf\x11\xe0", "an old Office file (xls, doc)", EXPORT),
    (b"PAR1", "a Parquet file", EXPORT),
    (b"ARROW1", "an Arrow file", EXPORT),
    (b"\xff\xff\xff\xff", "an Arrow stream", EXPORT),
    (b"SQLite format 3\0", "an SQLite database", EXPORT),
    (b"%PDF", "a PDF", EXPORT),
    (b"GGUF", "a GGUF model", EXPORT),
    (b"bplist", "a property list", EXPORT),
    (b"{\\rtf", "rich text (RTF)", EXPORT),
    (b"version https://git-lfs", "a pointer of Git LFS", "run: git lfs pull"),
)

# A command that converts a JSON list to JSON lines.
TO_LINES = (
    "python3 -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]' "
    "< OLD > NEW.jsonl"
)


def by_first_bytes(content: bytes) -> str | None:
    """The kind of a file that is not JSON lines, and what to do. None if it could be JSON lines."""
    start = content[:64].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML); download the file itself"
    for magic, kind, remedy in MAGIC:
        if content.startswith(magic):
            return f"is {kind}; {remedy}"
    return None


def by_first_line(line: bytes) -> str | None:
    """The same, for a file whose first non-blank line is not a JSON object."""
    text = line.strip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"["):
        return f"is a JSON list, not JSON lines; convert it: {TO_LINES}"
    if text.startswith(b"{") and text.endswith((b"{", b"[", b",")) and not text.endswith(b"},"):
        return "has JSON objects over several lines; write each object on one line"
    if not text.startswith(b"{") and any(mark in text for mark in (b",", b"\t", b";")):
        return f"is not JSON lines (a CSV or a table?); {EXPORT}"
    return None
