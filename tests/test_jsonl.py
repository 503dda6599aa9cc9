"""JSON-lines files: what is read, what is refused with its line, what a crash cannot break."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from dpo_mlx.files import digest, jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.ownership import MANIFEST

ROW = {"q": "Où? 日本 🙂", "n": 1}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def fault(path: Path) -> str:
    with pytest.raises(UserError) as error:
        list(jsonl.read(path, remedy="REMEDY"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_written_rows_are_read_back(file):
    """Text comes back as it was, and stands in the file as it is written."""
    jsonl.write(file, [ROW, {}])
    assert list(jsonl.read(file, "")) == [(1, ROW), (2, {})]
    assert file.read_bytes() == '{"q": "Où? 日本 🙂", "n": 1}\n{}\n'.encode()


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\n{"a": 2}',
        b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n',
    ],
)
def test_line_ends_and_mark_make_no_difference(content, file):
    """A BOM, CRLF and a missing last line end are fine."""
    file.write_bytes(content)
    assert list(jsonl.read(file, "")) == [(1, {"a": 1}), (2, {"a": 2})]


def test_blank_lines_are_skipped_but_counted(file):
    """Line numbers are those of an editor; U+2028 in a text ends no line."""
    file.write_text('\n{"a": "x\u2028y"}\n \t\r\n\n{"a": 2}\n\n', encoding="utf-8", newline="")
    assert list(jsonl.read(file, "")) == [(2, {"a": "x\u2028y"}), (5, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', ":3: broken JSON at column 8: "),
        (b"{'a': 1}", ":3: broken JSON at column 2: "),
        (b'{"a": 1} {"b": 2}', ":3: broken JSON at column 10: Extra data"),
        (b"[1]", ":3: expected a JSON object, found list"),
        (b"null", ":3: expected a JSON object, found NoneType"),
        (b'"text"', ":3: expected a JSON object, found str"),
        (b'{"a": "\xe9"}', ":3: not UTF-8 (byte 8); save the file as UTF-8"),
        (b'{"a": "\\ud83d"}', ":3: half of a surrogate pair"),
        (b"[" * 100_000, ":3: the JSON is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", ":3: a number has thousands of digits"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_faulty_line_is_named(line, message, file):
    """Every line that is not a JSON object stops the reading at path:line."""
    file.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 3}\n')
    assert fault(file).startswith(f"{file}{message}")


def test_whole_surrogate_pair_is_text(file):
    """JSON's escaped form of an emoji is the emoji."""
    file.write_bytes(b'{"a": "\\ud83d\\ude42"}\n')
    assert list(jsonl.read(file, "")) == [(1, {"a": "🙂"})]


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_file_is_refused(content, file):
    """Nothing to read is a mistake, with the way on."""
    file.write_bytes(content)
    assert fault(file) == f"{file}: is empty; REMEDY"


def test_missing_file_and_directory_are_refused(file, tmp_path):
    """Both are said apart, with the way on."""
    assert fault(file) == f"{file}: no such file; REMEDY"
    assert fault(tmp_path) == f"{tmp_path}: is a directory, not a file; REMEDY"


def test_write_replaces_the_whole_and_leaves_no_temporary(file, tmp_path):
    """After a write there is the final file alone; missing folders are made."""
    deep = tmp_path / "a" / "b" / "rows.jsonl"
    for rows in ([ROW] * 100, [{"a": 1}]):
        jsonl.write(deep, rows)
    assert deep.read_text() == '{"a": 1}\n'
    assert set(deep.parent.iterdir()) == {deep, deep.with_name(MANIFEST)}


def test_failed_write_keeps_the_old_file(file, monkeypatch):
    """A crash before the rename (here: a full disk) leaves the old content under the name."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    jsonl.write(file, [ROW])
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        jsonl.write(file, [{"a": 1}])
    assert file.read_bytes() == before
    monkeypatch.undo()
    jsonl.write(file, [{"a": 1}])
    assert set(file.parent.iterdir()) == {file, file.with_name(MANIFEST)}


def test_append_adds_lines(file):
    """Rows go after those that are there; the first append makes the file."""
    jsonl.append(file, [{"a": 1}])
    jsonl.append(file, [{"a": 2}, {"a": 3}])
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


@pytest.mark.parametrize("cut", range(1, 9))
def test_torn_last_line_is_cut_off(cut, file):
    """Wherever a crash tore the last append, whole rows remain and the next append fits on."""
    jsonl.append(file, [{"a": 1}])
    jsonl.append(file, [{"a": 2}])
    file.write_bytes(file.read_bytes()[:-cut])
    assert jsonl.read_whole_lines(file) == [{"a": 1}]
    jsonl.append(file, [{"a": 3}])
    assert file.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_whole_file_is_left_alone(file):
    """No rewriting where nothing is torn, and an empty file has no rows."""
    jsonl.append(file, [{"a": 1}])
    assert jsonl.read_whole_lines(file) == [{"a": 1}]
    assert file.read_text() == '{"a": 1}\n'
    jsonl.write(file, [])
    assert jsonl.read_whole_lines(file) == []


def test_broken_line_amid_appended_ones_is_named(file):
    """An edited file of the pipeline's own is refused by path:line, not with a traceback."""
    file.write_text('{"a": 1}\nhello\n{"a": 2}\n')
    with pytest.raises(UserError, match=f"{file}:2: broken JSON"):
        jsonl.read_whole_lines(file)


def test_digest_is_sha256_of_the_content(file):
    """The value of `printf abc | sha256sum`."""
    file.write_bytes(b"abc")
    assert (
        digest.of_file(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_json_value(file, tmp_path):
    """One value, written and read; what is broken or absent is named with the remedy."""
    jsonl.write_json(file, {"a": [1, "é"]})
    assert jsonl.read_json(file) == {"a": [1, "é"]} == json.loads(file.read_text())
    for content in (b"{", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="broken JSON; REMEDY"):
            jsonl.read_json(file, "REMEDY")
    with pytest.raises(UserError, match="no such file; REMEDY"):
        jsonl.read_json(tmp_path / "absent.json", "REMEDY")
