"""Files and settings that nobody planned for: one line, at once, nothing waited for or changed."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import socket
import time
import typing
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from conftest import REPOSITORY
from dpo_mlx import config
from dpo_mlx.data import check_pairs, encoding, pairs, questions, source
from dpo_mlx.data.pairs import Pair
from dpo_mlx.files import bounded, jsonl, path_conflicts, strict_yaml
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.run_folder import LOCK, PairFiles
from dpo_mlx.model.loading import load_model
from test_config import MINIMAL

# No case here may take long; most take a millisecond.
pytestmark = pytest.mark.timeout(20)

MB = 2**20
REMEDY = "REMEDY"


def line_of(fails: Callable[[], object]) -> str:
    """The one line of a UserError, which is short and has no control character."""
    with pytest.raises(UserError) as error:
        fails()
    line = str(error.value)
    assert line.isprintable() and len(line) < 1000
    return line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Files ------------------------------------------------------------------------------------------


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda path: None, "no such file"),
    "directory": (Path.mkdir, "is a directory, not a file"),
    "pipe": (os.mkfifo, "is a pipe, not a file"),
    "socket": (bind, "is a socket, not a file"),
    "device that never ends": (lambda p: p.symlink_to("/dev/zero"), "is a device, not a file"),
    "device": (lambda path: path.symlink_to("/dev/null"), "is a device, not a file"),
    "loop of links": (loop, "cannot be read ("),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "no such file"),
    "a terabyte": (sparse, "is 1024 GB, and the limit is "),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_refused_without_waiting(name, here):
    """Each reader names the path and what is there; a pipe without a writer is not opened."""
    make, says = NO_FILES[name]
    make(Path("x"))
    for read in (
        lambda: bounded.read(Path("x"), MB, REMEDY),
        lambda: pairs.read(Path("x")),
        lambda: config.load(Path("x")),
    ):
        assert line_of(read).startswith(f"x: {says}")
    assert line_of(lambda: bounded.read(Path("x"), MB, REMEDY)).endswith(f"; {REMEDY}")
    says = "is a folder without text files" if name == "directory" else says
    assert line_of(lambda: source.read(Path("x"))).startswith(f"x: {says}")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", ".: is a directory"),
        (".", ".: is a directory"),
        ("a\0b", "a\\x00b: no file can have this name"),
        ("a\nb", "a\\nb: no such file"),
        ("\x1b[31mred", "\\x1b[31mred: no such file"),
        ("\udcff", "\\udcff: no such file"),
        ("n" * 300, "n" * 200 + "...: cannot be read (File name too long"),
        ("a/" * 3000, "...: cannot be read (File name too long"),
        ("file/below", "file/below: cannot be read (Not a directory"),
    ],
    ids=lambda text: repr(text)[:12],
)
def test_a_path_that_cannot_be_is_one_line(path, says, here):
    """Also where the system's own error would be a ValueError, or text that moves the cursor."""
    Path("file").touch()
    assert says in line_of(lambda: bounded.read(Path(path), MB, REMEDY))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(here):
    Path("x").touch(mode=0)
    assert "x: cannot be read (Permission denied)" in line_of(
        lambda: bounded.read(Path("x"), MB, REMEDY)
    )


def test_size_is_bounded_also_when_it_is_not_told(here, monkeypatch):
    """Files that the system makes up say that they have 0 bytes; those that are just as large as
    may be are read whole.
    """
    Path("x").write_bytes(b"x" * 10)
    assert bounded.read(Path("x"), 10, REMEDY) == b"x" * 10
    assert "x: is 10 bytes, and the limit is 9 bytes" in line_of(
        lambda: bounded.read(Path("x"), 9, REMEDY)
    )
    monkeypatch.setattr(bounded, "_require_file", lambda *_: None)
    assert "the limit is 9 bytes" in line_of(lambda: bounded.read(Path("x"), 9, REMEDY))


def test_a_file_that_changes_while_it_is_read_is_refused(here, monkeypatch):
    """Half of one version and half of the next would be read as one."""
    Path("x").write_bytes(b"x" * 10)
    fstat, calls = os.fstat, iter(range(9))

    def grows(number: int) -> os.stat_result:
        if next(calls) == 1:
            os.truncate("x", 20)
        return fstat(number)

    monkeypatch.setattr(os, "fstat", grows)
    assert "changed while it was read" in line_of(lambda: bounded.read(Path("x"), MB, REMEDY))


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return content.getvalue()


ROW = b'{"question": "q", "answer": "a"}\n'
OTHER_KINDS: dict[str, tuple[bytes, str]] = {
    "UTF-16": (ROW.decode().encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    "UTF-16 without a mark": (ROW.decode().encode("utf-16-le"), "is UTF-16 text"),
    "UTF-32": (ROW.decode().encode("utf-32"), "is UTF-32 text; save it as UTF-8"),
    "gzip, cut off": (gzip.compress(ROW)[:-9], "cannot be unpacked (Compressed file ended"),
    "gzip, damaged": (gzip.compress(ROW)[:-8] + b"\0" * 8, "cannot be unpacked (CRC check failed"),
    "gzip of a zip": (gzip.compress(zipped()), "is a zip archive or an Office file (xlsx, docx)"),
    "xlsx": (zipped(), "is a zip archive or an Office file (xlsx, docx); export it"),
    "Parquet": (b"PAR1\x15\x04", "is a Parquet file; export it as JSON lines"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "HTML": (b"<!DOCTYPE html>\n<html>", "is a web page (HTML)"),
    "CSV": (b"title,body\nq,a\n", "its first line does not name the columns of a table (CSV)"),
    "plain text": (b"Hello.\n", "is not JSON, and its first line does not name the columns"),
    "a list of nothing": (b"[ ]\n", "x: is empty"),
    "a list, cut off": (b"[\n" + ROW, "x:3: the list does not end; the file may be cut off"),
    "a list, broken": (b"[\n" + ROW + b",{'q'}]", "x:3: broken JSON at column 3"),
    "a list and more": (b"[" + ROW + b"]" + ROW, "x:2: there is more text after the end"),
    "a list with a key twice": (b"[\n\n" + b'{"a": 1, "a": 2}]', 'x:3: the key "a" appears twice'),
    "a list, not UTF-8": (b"[\n" + b'"\xe9"]', "x:2: not UTF-8; save the file as UTF-8"),
    "several lines, cut off": (b'{\n "question": "q",\n', "x:3: broken JSON at column 1"),
    "a wrapped list": (b'{"data": [1]}', "found the fields ['data']"),
    "CSV, not UTF-8": (b"question,answer\nq,\xe9\n", "x:2: not UTF-8; save the file as UTF-8"),
    "CSV, column twice": (b"answer,question,Answer\na,q,b\n", 'the column "answer" appears twice'),
    "CSV, only a header": (b"question,answer\n\n", "x: is empty"),
    "CSV, open quote": (
        b'question,answer\nq,a\n\nq,"a\nq,a\n',
        "x:4: a quote that opens here is never closed",
    ),
    "lines without commas inside": (b'{"question": "q" "answer": "a"}\n', "x:1: broken JSON at"),
    "cut off": (b'{"question": "q", "ans', "x:1: broken JSON at column"),
    "key twice": (b'{"answer": "a", "answer": "b"}', 'x:1: the key "answer" appears twice'),
    "key twice below": (b'{"question": {"a": 1, "a": 2}}', 'x:1: the key "a" appears twice'),
    "deep": (
        b'{"question": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        "x:1: the JSON is nested too deeply",
    ),
    "long number": (b'{"question": ' + b"1" * 10**5 + b"}", "x:1: a number has thousands"),
    "NaN": (b'{"question": NaN, "answer": "a"}', "must be text, found float"),
    "10^400": (b'{"question": 1' + b"0" * 400 + b', "answer": "a"}', "must be text, found int"),
    "half a character": (b'{"question": "\\ud800", "answer": "a"}', "x:1: half of a surrogate"),
    "NUL": (b'{"question": "q", "answer": "a\\u0000"}', "contains a NUL character"),
    "a long key": (b'{"' + b"k" * MB + b'": 1, "' + b"k" * MB + b'": 1}', "appears twice"),
    "many roles": (
        json.dumps({"messages": [{"role": "r" * MB, "content": "c"}] * 9}).encode(),
        "expected one user and one assistant message",
    ),
    "a line of 100 MB": (b'{"question": "' + b"q" * 10**8 + b'"}', "x:1: the line has 100 MB"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_what_a_source_is_instead_is_said(name, here):
    content, says = OTHER_KINDS[name]
    Path("x").write_bytes(content)
    assert says in line_of(lambda: source.read(Path("x")))


def test_what_is_ignored_may_be_odd(here):
    """Keys beyond the known ones are nobody's business: pandas writes NaN for nothing there."""
    Path("x").write_text('{"question": "q", "answer": "a", "n": NaN, "i": 1e999, "z": [[[]]]}')
    assert len(source.read(Path("x")).questions) == 1


def test_the_conversion_that_is_named_works(here):
    """A JSON list of pairs becomes JSON lines by the very words of the message."""
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    Path("old.json").write_text(json.dumps([pair] * 3))
    command = line_of(lambda: pairs.read(Path("old.json"))).partition("convert it: ")[2]
    os.system(command.replace("OLD", "old.json").replace("NEW.jsonl", "new.jsonl"))
    assert len(pairs.read(Path("new.jsonl"))) == 3


# Time -------------------------------------------------------------------------------------------

LONG = 10**6
SLOW_TEXTS = {
    "blank lines after the question": "Question:" + "\n" * LONG,
    "blank lines before the question": "\n" * LONG + "Question:",
    "blanks": "Question:" + " " * LONG,
    "blanks and lines": "Question:" + " \n" * LONG,
    "many answers": "Question:" + "Answer:" * LONG,
    "many questions": "Question:\n" * LONG,
    "lines of returns": "Question:" + "\r\n" * LONG,
    "turns": "<|start_of_role|>user<|end_of_role|>" * (LONG // 10),
    "a long role": "<|start_of_role|>" + "r" * LONG,
    "many open roles": "<|start_of_role|>r" * (LONG // 10),
    "ends of turns": "<|start_of_role|>user<|end_of_role|>" + "<|end_of_text|>" * (LONG // 10),
}


@pytest.mark.parametrize("name", SLOW_TEXTS)
def test_time_grows_with_the_length(name, here):
    """A megabyte takes well under a second; what grows with the square would take hours."""
    Path("x").write_text(json.dumps({"text": SLOW_TEXTS[name]}) + "\n")
    started = time.perf_counter()
    line_of(lambda: source.read(Path("x")))
    assert time.perf_counter() - started < 3


def test_a_long_pair_is_not_tokenised(llama, here):
    """10 MB in any field, at both stages: the line is known to be too long by its characters; a
    text that just fits is still encoded.
    """

    class Counting:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer, self.characters = tokenizer, 0

        def encode(self, text: str, **more: Any) -> list[int]:
            self.characters += len(text)
            return self.tokenizer.encode(text, **more)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

    from dpo_mlx.stages.make_pairs import usable_rows

    tokenizer = Counting(load_model(str(llama)).tokenizer)
    encoder = encoding.Encoder(tokenizer)
    huge, fits = "x" * 10**7, "x" * 150
    rows = [
        Pair(huge, "c", "r", line=1),
        Pair("p", huge, "r", line=2),
        Pair("p", "c", huge, line=3),
    ]
    rows += [Pair("p", fits, "r", line=4), Pair("p", "x" * 250, "r", line=5)]
    encoded, dropped = encoding.encode_all(rows, encoder, 200)
    assert ([pair.line for pair in encoded], dropped) == ([4], [1, 2, 3, 5])
    assert encoding.chosen_lengths(rows, encoder, 200) == [2, 151, 251]
    source = [questions.Question(*sides, 1) for sides in (("q", huge), (huge, "a"), ("q", "a"))]
    lost: Counter[str] = Counter()
    assert usable_rows(source, config.from_values(MINIMAL), encoder, lost) == source[2:]
    assert lost["chosen longer than data.max_length"] == 2
    assert tokenizer.characters < 5000


def test_few_answers_are_enough_to_see_how_long_they_are(llama, here, monkeypatch):
    """20,000 rows with data.limit of 20 would all be tokenised for one percentile."""
    from dpo_mlx.stages import make_pairs

    encoder = encoding.Encoder(load_model(str(llama)).tokenizer)
    loaded = config.from_values({**MINIMAL, "data": {**MINIMAL["data"], "limit": 20}})
    rows = [questions.Question(f"q {i}", "a" * (100 if i < 2000 else 500), i) for i in range(3000)]
    started = time.perf_counter()
    assert make_pairs.generation_settings(rows, loaded, encoder).max_tokens == 128
    assert time.perf_counter() - started < 10
    as_said = config.from_values({**MINIMAL, "generation": {"max_tokens": 7}})
    monkeypatch.setattr(make_pairs, "_short", None)  # nothing is looked at
    assert make_pairs.generation_settings(rows, as_said, encoder).max_tokens == 7


# The config -------------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}, *{before}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
BAD_YAML: dict[str, tuple[str, str]] = {
    "key twice": ("a: 1\nb: 2\na: 3\n", "line 3: the key a is already on line 1"),
    "key twice below": (
        "t:\n  a: 1\n  b:\n    c: 1\n    c: 2\n",
        "line 5: the key c is already on line 4",
    ),
    "key twice in a flow": ("{a: {b: 1, b: 2}}", "line 1: the key b is already on line 1"),
    "section twice": ("train:\n  a: 1\ndata:\n  b: 1\ntrain:\n  c: 1\n", "line 5: the key train"),
    "alias bomb": (BOMB, "line 1: anchors (&) and aliases (*)"),
    "anchor": ("a: &x 1\n", "line 1: anchors (&) and aliases (*)"),
    "alias": ("b: 1\na: *x\n", "line 2: anchors (&) and aliases (*)"),
    "merge": ("b: 1\n<<: {a: 1}\n", "line 2: << is a merge key in YAML"),
    "list of lists": ("[" * 5000, "line 1: values are nested more than 10 deep"),
    "sections of sections": ("{a: " * 5000, "line 1: values are nested more than 10 deep"),
    "dashes": ("- " * 5000, "line 1: values are nested more than 10 deep"),
    "question marks": ("? " * 5000, "line 1: values are nested more than 10 deep"),
    "python": (
        "a: !!python/object/apply:os.system [x]\n",
        "line 1: tags like !!python/object/appl",
    ),
    "binary": ("a: !!binary aGk=\n", "line 1: tags like !!binary are not supported"),
    "set": ("a: !!set {b}\n", "line 1: tags like !!set are not"),
    "own tag": ("a: !x 1\n", "line 1: tags like !x are not"),
    "no tag": ("a: ! 1\n", "line 1: tags like ! are not"),
    "date": ("a: 2024-01-01\n", "line 1: 2024-01-01 is a date in YAML; put it in quotes"),
    "no date": ("a: 2024-99-99\n", "line 1: 2024-99-99 is a date in YAML"),
    "two documents": ("a: 1\n---\nb: 1\n", "line 2: expected a single document"),
    "tab": ("a:\n\tb: 1\n", "line 2: "),
    "number as key": ("1: x\n", "line 1: 1 is not the name of a key"),
    "yes as key": ("yes: x\n", "line 1: yes is not the name of a key"),
    "nothing as key": ("~: x\n", "line 1: ~ is not the name of a key"),
    "list as key": ("? [a]\n: x\n", "line 1: a list or a section is not the name of a key"),
    "10^400": ("a: 1" + "0" * 400, "line 1: the number has 401 characters"),
    "a megabyte of digits": ("a: " + "7" * 10**6, "line 1: the number has 1000000 characters"),
    "hexadecimal": ("a: 0x10\n", "line 1: 0x10 is a number, but not a plain decimal"),
    "a megabyte of it": ("a: 0x" + "f" * 10**6, "line 1: the number has 1000002 characters"),
    "octal": ("a: 010\n", "line 1: 010 is a number, but not a plain decimal"),
    "binary number": ("a: 0b1\n", "line 1: 0b1 is a number, but not a plain decimal"),
    "sixties": ("a: 1:30\n", "line 1: 1:30 is a number, but not a plain decimal"),
    "sixties with a point": ("a: 1:30.5\n", "line 1: 1:30.5 is a time in YAML"),
    "long sixties": ("a: 1" + ":59" * 300_000 + ".5", "line 1: the number has 900003 characters"),
    "control character": ("a: \x1b[31m\n", "unacceptable character #x001b"),
    "NUL": ("a: x\0\n", "unacceptable character #x0000"),
    "too many": ("".join(f"k{i}: 1\n" for i in range(50_000)), "more than 2000 values"),
    "a long alias": ("a: *" + "x" * 10**6, "line 1: anchors (&) and aliases (*)"),
    "a long tag": ("a: !" + "x" * 10**6, "line 1: tags like !xxxx"),
    "a long key twice": (f"{'k' * 900}: 1\n{'k' * 900}: 1\n", "is already on line 1"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_yaml_that_is_no_config(name, here):
    """Refused with its line, as a file and, where it fits on a command line, with --set."""
    text, says = BAD_YAML[name]
    Path("c.yaml").write_text(text)
    started = time.perf_counter()
    line = line_of(lambda: config.load(Path("c.yaml")))
    assert line.startswith("c.yaml: cannot be read as YAML: ") and says in line
    Path("c.yaml").write_text(yaml.safe_dump(MINIMAL))
    line = line_of(lambda: config.load(Path("c.yaml"), [f"lora={text}"]))
    assert line.startswith("c.yaml: --set lora=")
    assert time.perf_counter() - started < 5


def test_plain_yaml_is_read_as_by_the_library():
    """The shipped files, and what a config may hold, mean what they always meant."""
    texts = [path.read_text() for path in (REPOSITORY / "config").glob("*.yaml")]
    texts += [
        "a: 1_000\nb: -7\nc: +7\nd: 0\ne: 1.5\nf: 1e-6\ng: 1.0e-6\nh: .5\ni: ~\nj: yes\n",
        'a: "2024-01-01"\nb: "010"\ne: [a, "b"]\nf: {}\n',
        "c: |\n  two\n  lines\nd: >-\n  one\n  line\n",
        "%YAML 1.1\n---\na: {b: {c: [1, 2]}}\n...\n",
        "",
    ]
    for text in texts:
        assert strict_yaml.load(text) == yaml.safe_load(text)


def numeric_fields(section: type = config.Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, field) of every number."""
    hints = typing.get_type_hints(section)
    for field in fields(section):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from numeric_fields(typing.cast(type, hint), f"{prefix}{field.name}.")
        elif {int, float} & {hint, *typing.get_args(hint)} and "choices" not in field.metadata:
            yield prefix + field.name, field


NUMBERS = dict(numeric_fields())


def test_every_number_is_bounded_on_both_sides():
    """A number without a bound ends in an overflow, a crash or a run of years."""
    assert len(NUMBERS) > 30
    assert [k for k, f in NUMBERS.items() if None in (f.metadata["low"], f.metadata["high"])] == []


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_beyond_its_bounds_is_refused(key, here):
    """Just beyond, far beyond, and beyond all that a float can hold."""
    Path("c.yaml").write_text(yaml.safe_dump(MINIMAL))
    low, high = (NUMBERS[key].metadata[side] for side in ("low", "high"))
    config.load(Path("c.yaml"), ["train.grad_checkpoint=false", f"{key}={high}"])
    far = ("1e308", "-1e308") if isinstance(high, float) else (10**30, -(10**30))
    for value in (high + 1, low - 1, *far, "1e999", ".inf", "-.inf", ".nan"):
        line = line_of(partial(config.load, Path("c.yaml"), [f"{key}={value}"]))
        assert line.startswith(f"c.yaml: {key}: ")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("generation.temperature=1e-300", "set 0 for greedy decoding, or at least"),
        ("model=a\nb", "model: contains the control character '\\n'"),
        ("run_dir=a\x1b[31m", "run_dir: contains the control character '\\x1b'"),
        ("run_dir=a\0b", "run_dir: contains the control character '\\x00'"),
        ("data.source=\udcff", "data.source: contains the control character '\\udcff'"),
        ("system_prompt=a\x07", "system_prompt: contains the control character '\\x07'"),
        (f"system_prompt={'x' * 100_001}", "system_prompt: has 100001 characters; shorten it to"),
        (f"chat_template_args.x={'x' * 100_001}", "chat_template_args.x: has 100001 characters"),
        (f"chat_template_args.{'x' * 1000}=1", "is too long for a name"),
        (
            "chat_template_args.x=99999999999999999999",
            "chat_template_args.x: 99999999999999999999 i",
        ),
        ("chat_template_args.x=1e999", None),  # text to YAML
        (f"run_dir={'r/' * 5000}", "run_dir: has 10000 characters; shorten it to at most 1000"),
        (
            f"data.source={'s' * 255}",
            "data.source: the path has a name of 255 bytes; use names of at",
        ),
        (f"data.source={'é' * 120}", "data.source: the path has a name of 240 bytes"),
        ("run_dir=~nobody-here/x", "run_dir: ~nobody-here is not a user's home folder"),
        (f"dpo.loss={'x' * 10**6}", "dpo.loss: has 1000000"),
        (f"lora.rank={'x' * 10**6}", "lora.rank: expected a whole number, found str 'xxx"),
        (f"lora.rank=[{'1, ' * 1000}]", "lora.rank: expected a whole number, found list"),
        (f"lora.keys=[{'x' * 2000}]", "lora.keys: has 2000 characters"),
        ('lora.keys=["a\\e[31m"]', "lora.keys: contains the control character"),
        (f"{'x' * 10**5}=1", "unknown key"),
        (f"{'x.' * 10**4}x=1", "unknown key"),
        (f"lora.rank.{'x.' * 10**4}x=1", "lora.rank: expected a whole number"),
        (f"report_to={'x' * 900}", "report_to: 'xxx"),
        ("a\x1b[31m=1", "a\\x1b[31m: unknown key"),
        ("\x1b[31m", "--set \\x1b[31m: expected section.key=value"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_value_that_no_run_has(override, says, here):
    """Refused in one short line, however long or odd the value."""
    Path("c.yaml").write_text(yaml.safe_dump(MINIMAL))
    if says is None:
        config.load(Path("c.yaml"), [override])
    else:
        assert says in line_of(lambda: config.load(Path("c.yaml"), [override]))


def test_a_thousand_faults_are_twenty_lines(here):
    """A file of another program, which is YAML by chance, fills no screen."""
    Path("c.yaml").write_text("".join(f"train_key_{i}: 1\n" for i in range(990)))
    with pytest.raises(UserError) as error:
        config.load(Path("c.yaml"))
    lines = str(error.value).splitlines()
    assert len(lines) == 21 and re.fullmatch(r"c.yaml: and \d+ more", lines[-1])


def test_tilde_is_the_home_folder(here, monkeypatch):
    """In every path, in the file, with --set, and in --config itself; what it stands for is in the
    dump, so that stages that read that agree.
    """
    monkeypatch.setenv("HOME", str(here / "home"))
    Path("home").mkdir()
    values = {**MINIMAL, "model": "~/m", "run_dir": "~/r"}
    values["data"] = {"source": "~/s", "train_pairs": "~/t", "valid_pairs": "$HOME/v"}
    Path("home/c.yaml").write_text(yaml.safe_dump(values))
    loaded = config.load(Path("~/c.yaml"), ["data.source=~/other"])
    home = str(here / "home")
    assert (loaded.model, loaded.run_dir) == (f"{home}/m", f"{home}/r")
    assert (loaded.data.source, loaded.data.train_pairs) == (f"{home}/other", f"{home}/t")
    assert loaded.data.valid_pairs == "$HOME/v"
    assert config.from_values(yaml.safe_load(config.dump(loaded))) == loaded


# Paths that meet --------------------------------------------------------------------------------

DATA = "data.source=s.jsonl data.train_pairs=t.jsonl data.valid_pairs=v.jsonl run_dir=run model=m"
IN_REPOSITORY = "is inside this project's own folders, or contains one of them"
MEETINGS: dict[str, str] = {
    "data.valid_pairs=t.jsonl": "data.valid_pairs: t.jsonl is also data.train_pairs",
    "data.valid_pairs=t.samples.jsonl": "data.valid_pairs: t.samples.jsonl is also a file ",
    "data.valid_pairs=t.report.json": "data.valid_pairs: t.report.json is also a file that",
    "data.valid_pairs=t.samples.inputs.json": "data.valid_pairs: t.samples.inputs.json is also a f",
    "data.source=.t.samples.jsonl.dpo-mlx.lock": "data.source: .t.samples.jsonl.dpo-mlx.lock is",
    "data.source=.made_by_dpo_mlx": "data.source: .made_by_dpo_mlx is also a file that stage 06",
    "data.source=t.report.json": "data.source: t.report.json is also a file that stage 06 writes",
    "data.source=T.Report.JSON": "data.source: T.Report.JSON is also a file that stage 06 writes",
    "data.valid_pairs=T.JSONL": "data.valid_pairs: T.JSONL is also data.train_pairs",
    "data.valid_pairs=./x/../t.jsonl": "data.valid_pairs: x/../t.jsonl is also data.train_pairs",
    "data.train_pairs=c.yaml": "--config: c.yaml is also data.train_pairs",
    "data.valid_pairs=c.yaml": "--config: c.yaml is also data.valid_pairs",
    "data.train_pairs=m/t.jsonl": "model: m contains data.train_pairs",
    "run_dir=m/run": "model: m contains an output in run_dir",
    "run_dir=m": "model: m contains an output in run_dir",
    "model=run/fused": "model: run/fused is also an output in run_dir",
    "model=run/fused/x": "model: run/fused/x is inside an output in run_dir",
    "data.source=run/metrics.jsonl": "data.source: run/metrics.jsonl is also an output in run_dir",
    "data.source=run/checkpoints/s": "data.source: run/checkpoints/s is inside an output",
    "data.train_pairs=run/report.json": "data.train_pairs: run/report.json is also an output in",
    "data.train_pairs=run_sweep/t": "data.train_pairs: run_sweep/t is inside the folder of",
    "data.valid_pairs=new data.source=new/s": "data.valid_pairs: new contains data.source",
    "data.valid_pairs=run": "data.valid_pairs: run contains an output in run_dir",
    "demo_model=true model=n data.source=n/s": "model: n contains data.source",
    "data.valid_pairs=hard.jsonl data.source=s.jsonl": "data.valid_pairs: hard.jsonl is also data",
    "data.train_pairs=caf\u00e9 data.valid_pairs=cafe\u0301": "is also data.train_pairs",
    "data.valid_pairs=link/t.jsonl": "data.valid_pairs: link/t.jsonl is also data.train_pairs",
    # what stands where a file must be
    "data.source=/": "data.source: / is a directory, not a file",
    "data.train_pairs=.": "data.train_pairs: . is a directory, not a file",
    "data.train_pairs=..": "data.train_pairs: .. is a directory, not a file",
    "data.train_pairs=/": "data.train_pairs: / is a directory, not a file",
    "data.train_pairs=pipe": "data.train_pairs: pipe is a pipe, not a file",
    "data.train_pairs=/dev/null": "data.train_pairs: /dev/null is a device, not a file",
    "data.train_pairs=p.jsonl": "data.train_pairs: p.report.json is a pipe, not a file",
    "run_dir=piped": "run_dir: piped/metrics.jsonl is a pipe, not a file",
    # run_dir
    "run_dir=/": "run_dir: / is the root of the disk",
    "run_dir=~": "is your home folder or contains it",
    "run_dir=~/..": "is your home folder or contains it",
    f"run_dir={REPOSITORY}": IN_REPOSITORY,
    f"run_dir={REPOSITORY}/data": IN_REPOSITORY,
    f"run_dir={REPOSITORY}/config": IN_REPOSITORY,
    f"run_dir={REPOSITORY}/data/cost": IN_REPOSITORY,
    f"run_dir={REPOSITORY}/scripts/dpo_mlx": IN_REPOSITORY,
    "run_dir=s.jsonl": "run_dir: s.jsonl is not a folder",
    "run_dir=loop": "run_dir: loop is not a folder",
    "run_dir=other/fused": "run_dir: other/fused is a folder that another run writes to",
    "model=n run_dir=m data.source=m/below/s.jsonl": "run_dir: m contains the folder of data.so",
}


@pytest.fixture
def places(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of every kind under the names that MEETINGS uses."""
    for folder in ("users/me", "work/piped", "work/m/below"):
        Path(folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(here / "users/me"))
    monkeypatch.chdir(here / "work")
    for pipe in ("pipe", "p.report.json", "piped/metrics.jsonl"):
        os.mkfifo(pipe)
    Path("s.jsonl").touch()
    os.link("s.jsonl", "hard.jsonl")
    Path("other").mkdir(exist_ok=True)
    Path("other", LOCK).touch()
    Path("link").symlink_to(".")
    Path("loop").symlink_to("loop")
    Path("c.yaml").write_text(yaml.safe_dump(MINIMAL))
    return Path("c.yaml")


@pytest.mark.parametrize("changes", MEETINGS)
def test_paths_that_would_meet_are_refused(changes, places):
    """In one line that names the key, before any stage has begun."""
    line = line_of(lambda: config.load(places, [*DATA.split(), *changes.split()]))
    assert line.startswith("c.yaml: ") and MEETINGS[changes] in line


@pytest.mark.parametrize(
    "changes",
    [
        "run_dir=run data.train_pairs=run/pairs/t.jsonl data.valid_pairs=run/pairs/v.jsonl",
        "run_dir=run data.train_pairs=run/t.jsonl data.valid_pairs=run/v.jsonl",
        "run_dir=. data.train_pairs=t.jsonl",
        "run_dir=m model=other/m data.source=m/s.jsonl",
        "run_dir=run_sweep/one data.train_pairs=run/t.jsonl data.valid_pairs=run/v.jsonl",
        "model=run/my-model",
        "data.source=texts/",
        "data.source=s2.jsonl data.train_pairs=s.jsonl.jsonl",
    ],
)
def test_paths_that_do_not_meet_are_fine(changes, places):
    """A run may hold its pairs, its source and its model, and a sweep's run is beside them."""
    config.load(places, [*DATA.split(), *changes.split()])


def test_the_config_of_a_run_is_no_config_to_start_from(here):
    """The run would write over it, and the comments would be gone."""
    Path("run").mkdir()
    Path("run/config.yaml").write_text(yaml.safe_dump(MINIMAL))
    line = line_of(lambda: config.load(Path("run/config.yaml")))
    assert "--config: run/config.yaml is also an output in run_dir" in line


def test_the_table_has_every_file_beside_the_pairs():
    """A file that stage 06 begins to write beside the train pairs must be in the table, too."""
    loaded = config.from_values(MINIMAL)
    files = loaded.pairs
    known = {place.path for place in path_conflicts.places(loaded.paths(Path("c.yaml")))}
    named = {getattr(files, name) for name, kind in vars(PairFiles).items() if _is_path(kind)}
    assert len(named) >= 4 and named <= known


def _is_path(member: object) -> bool:
    return isinstance(member, property) and member.fget.__annotations__["return"] == "Path"


# Pairs ------------------------------------------------------------------------------------------


def some(count: int, first: int = 0, **same: str) -> list[Pair]:
    """Pairs that differ in all but what is given."""
    rows = [
        {"prompt": f"Why {i}?", "chosen": f"So {i}.", "rejected": f"It is {i}.", **same}
        for i in range(first, first + count)
    ]
    return [Pair(**row, line=line) for line, row in enumerate(rows, start=1)]


BAD_PAIRS: dict[str, tuple[list[Pair], list[Pair], str]] = {
    "one file twice": (some(9), some(9), "v.jsonl: 9 of its 9 questions are also in t.jsonl"),
    "mostly the same": (some(9), some(4, 6), "v.jsonl: 3 of its 4 questions are also in t.jsonl"),
    "the same but for case": (
        some(9),
        [Pair("  why 3 ??", "a", "b", line=1)],
        "v.jsonl: 1 of its 1 questions are also",
    ),
    "nothing to learn": (
        some(9, chosen="x", rejected=" x\n"),
        some(2, 50),
        "t.jsonl: chosen and rejected are the same text in 9 of 9 pairs (lines 1, 2, 3,",
    ),
    "nothing to measure": (
        some(9),
        some(2, 50, chosen="x", rejected="x"),
        "v.jsonl: chosen and rejected are the same text in 2 of 2 pairs",
    ),
    "one prompt": (some(9, prompt="p"), some(2, 50), '"prompt" is the same text in all 9 pairs'),
    "one chosen": (some(9, chosen="c"), some(2, 50), '"chosen" is the same text in all 9 pairs'),
    "one rejected": (some(9, rejected="r"), some(2, 50), '"rejected" is the same text in all 9'),
}


def checked(train: list[Pair], valid: list[Pair]) -> list[str]:
    return check_pairs.check(train, valid, config.from_values(MINIMAL))


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_pairs_that_teach_nothing_are_refused(name):
    """With what is wrong with them, and not with what it leads to an hour later."""
    train, valid, says = BAD_PAIRS[name]
    assert says in line_of(lambda: checked(train, valid))


def test_a_few_odd_pairs_are_a_note():
    """They are counted, named by their lines, and training goes on."""
    train, valid = some(9), some(9, 8)
    train[3] = Pair("Why x?", "same", "same", line=4)
    assert checked(train, valid) == [
        "t.jsonl: chosen and rejected are the same text in 1 of 9 pairs (lines 4); the model "
        "learns nothing from these; remove them",
        "v.jsonl: 1 of its 9 questions (lines 1) are also in t.jsonl, so they are not held out; "
        "remove them",
    ]
    assert checked(some(9), some(3, 9)) == []
    assert checked(some(1), some(1, 1)) == []


def test_pairs_are_looked_at_before_a_model_is_loaded(here, settings, write_config):
    """Stage 10 with one file for both splits under two names fails in no time."""
    from dpo_mlx.training.setup import prepare

    settings["model"] = "no/such-model"
    for name in ("train_pairs", "valid_pairs"):
        runs.write_pairs(Path(settings["data"][name]), 9)
    loaded = config.load(write_config(settings))
    assert "9 of its 9 questions are also in" in line_of(lambda: prepare(loaded))


def test_a_nul_is_refused_where_a_user_wrote_it(here):
    """In what the base model said it is what it said."""
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r\0"}, {"prompt": "p\0", "chosen": "c"}]
    jsonl.write(Path("x"), [rows[0], {**rows[0], **rows[1]}])
    assert 'x:2: the field "prompt" contains a NUL' in line_of(lambda: pairs.read(Path("x")))
