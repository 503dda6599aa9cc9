"""Whatever happens in a stage, the user gets one line with a remedy, and an exit code."""

from __future__ import annotations

import argparse
import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from dpo_mlx import cli
from dpo_mlx import config as configs
from dpo_mlx.files.errors import LostProcess, UserError, doing
from dpo_mlx.files.text import CONTROL
from dpo_mlx.process import last_resort, terminal
from runs import exit_code

SCRIPTS = {path.name[:2]: path for path in (REPOSITORY / "scripts").glob("phase*/*.py")}
FAULT = "this is a bug in the pipeline, please report it"


class Panic(BaseException):
    """Like pyo3's PanicException: no Exception."""


class Mute(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file whose run_dir is tmp_path/run."""
    values = {
        "model": "m",
        "run_dir": str(tmp_path / "run"),
        "data": {
            "source": "s.jsonl",
            "train_pairs": str(tmp_path / "train.jsonl"),
            "valid_pairs": str(tmp_path / "valid.jsonl"),
        },
        "train": {"learning_rate": 1e-6},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def end(config: Path, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit code of a stage that does what `run` does."""

    def stage(config: configs.Config, options: argparse.Namespace) -> Any:
        return run()

    monkeypatch.setattr(sys, "argv", ["10_train_dpo.py", "--config", str(config)])
    with pytest.raises(SystemExit) as stopped:
        cli.main(stage, cli.parser("stage"))
    return stopped.value.code


def raises(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def recurse() -> None:
    recurse()


def decode_error() -> UnicodeDecodeError:
    return UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


# What is raised or done, the exit code, words of the line.
FAULTS: dict[str, tuple[Callable[[], Any], int, list[str]]] = {
    "key": (raises(KeyError("prompt")), 1, ["KeyError: 'prompt'", FAULT, "cli.py:"]),
    "no text": (raises(AssertionError()), 1, ["AssertionError (", FAULT]),
    "lines": (raises(ValueError("a\nb\r\nc")), 1, ["ValueError: a b c", FAULT]),
    "escapes": (raises(TypeError("a\x1b[2Jb\u202e")), 1, [r"a\x1b[2Jb\u202e", FAULT]),
    "long": (raises(ValueError("x" * 3_000_000)), 1, ["xxx...", FAULT]),
    "decode": (raises(decode_error()), 1, ["UnicodeDecodeError", FAULT]),
    "panic": (raises(Panic("called unwrap()")), 1, ["Panic: called unwrap()", FAULT]),
    "mute": (raises(Mute()), 1, ["Mute", "cannot be read", FAULT]),
    "group": (raises(BaseExceptionGroup("many", [Panic()])), 1, ["BaseExceptionGroup", FAULT]),
    "stop iteration": (raises(StopIteration()), 1, [FAULT]),
    "generator": (raises(GeneratorExit()), 1, ["GeneratorExit", FAULT]),
    "runtime": (raises(RuntimeError("[matmul] shapes")), 1, ["[matmul] shapes", FAULT]),
    "library": (raises(OSError("Can't load\ntokenizer")), 1, ["Can't load tokenizer", FAULT]),
    "memory": (raises(MemoryError()), 1, ["out of memory", "lower data.max_length"]),
    "MLX memory": (
        raises(RuntimeError("[malloc_or_wait] Unable to allocate 9 bytes.")),
        1,
        ["out of memory", "lower data.max_length"],
    ),
    "Metal's buffer": (
        raises(RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater")),
        1,
        ["out of memory", "lower data.max_length"],
    ),
    "recursion": (recurse, 1, ["nested too deeply", "reduce the nesting"]),
    "package": (
        raises(ModuleNotFoundError("No module named 'mlx_lm'", name="mlx_lm")),
        1,
        ["mlx_lm", "./train_dpo_run1.sh"],
    ),
    "our own import": (
        raises(ImportError("cannot import x", name="dpo_mlx.data.pairs")),
        1,
        [FAULT],
    ),
    "no file named": (raises(OSError(errno.EBADF, "Bad file descriptor")), 1, ["Bad file", FAULT]),
    "too many files": (raises(OSError(errno.EMFILE, "Too many", "f")), 1, ["f: ", "ulimit -n"]),
    "folder": (raises(OSError(errno.EISDIR, "Is a directory", "f")), 1, ["f: Is a dir", "config"]),
    "exit text": (raises(SystemExit("no\x1b way")), 1, [r"no\x1b way"]),
    "many lines": (raises(UserError("a\n" * 80)), 1, ["error: and 31 more"]),
    "wide line": (raises(UserError("x" * 3_000_000)), 1, ["xxx..."]),
    "lost": (raises(LostProcess("a rank was lost")), 75, ["a rank was lost"]),
    "interrupt": (raises(KeyboardInterrupt()), 130, ["stopped"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_an_exit_code(name, config, monkeypatch, capfd):
    """No traceback, no control characters, nothing long, and the words that help."""
    run, expected, words = FAULTS[name]
    code = end(config, run, monkeypatch)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert code == expected and out == ""
    assert len(lines) <= last_resort.MAX_LINES + 1 and "Traceback" not in err
    assert max(map(len, lines)) <= last_resort.MAX_CHARACTERS
    assert not CONTROL.search(err)
    assert all(word in lines[-1] for word in words), lines[-1]
    assert len(lines) == 1 or name == "many lines"
    has_log = (config.parent / "run/error.log").exists()
    assert has_log == lines[-1].endswith(f"the details are in {config.parent}/run/error.log")
    assert has_log or FAULT not in lines[-1]


def test_the_log_holds_what_a_report_needs(config, monkeypatch, capsys):
    """The traceback with what was being done, the command and the versions."""

    def run() -> None:
        with doing("sampling", "answers"), doing("reading", "questions.jsonl"):
            raise KeyError("prompt")

    assert end(config, run, monkeypatch) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: 10_train_dpo.py, while reading questions.jsonl: KeyError")
    log = (config.parent / "run/error.log").read_text()
    for words in ("Traceback", "while sampling answers", f"--config {config}", "mlx 0", "Python 3"):
        assert words in log


def test_an_older_log_is_replaced(config, monkeypatch, capsys):
    """The last fault is what the line speaks of."""
    for text in ("first", "second"):
        end(config, raises(ValueError(text)), monkeypatch)
    log = (config.parent / "run/error.log").read_text()
    assert "second" in log and "first" not in log


def foreign_file(path: Path) -> None:
    path.write_text("my own log\n")


def foreign_link(path: Path) -> None:
    path.with_name("mine.txt").write_text("mine\n")
    path.symlink_to(path.with_name("mine.txt"))


def dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize(
    "put",
    [foreign_file, foreign_link, dangling_link, Path.mkdir, os.mkfifo],
    ids=lambda f: f.__name__,
)
def test_a_log_of_someone_else_s_is_left_alone(put, config, monkeypatch, capsys):
    """The line comes all the same, and does not speak of details."""
    folder = config.parent / "run"
    end(config, lambda: 0, monkeypatch)
    put(folder / "error.log")
    before = {path: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    assert end(config, raises(ValueError("x")), monkeypatch) == 1
    err = capsys.readouterr().err
    assert err.endswith(f"{FAULT}\n") and err.count("error:") == 1
    assert {path: path.is_file() and path.read_bytes() for path in folder.iterdir()} == before


def test_a_disk_that_is_full_for_the_log_is_no_second_fault(config, monkeypatch, capsys):
    """The line tells of the first fault only."""
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(last_resort.jsonl, "write_text", lambda *_: raises(full)())
    assert end(config, raises(ValueError("x")), monkeypatch) == 1
    assert capsys.readouterr().err.endswith(f"{FAULT}\n")


@pytest.mark.parametrize("error", [KeyError("x"), Panic("x"), MemoryError(), RecursionError()])
@pytest.mark.parametrize(("script", "module"), [
    ("01", "stages.selftest.run"),
    ("02", "stages.check_run.check_run"),
    ("05", "model.demo_model.is_complete"),
    ("06", "stages.make_pairs.make_pairs"),
    ("10", "stages.train_dpo.train_dpo"),
    ("11", "stages.fuse_adapters.fuse_adapters"),
    ("12", "stages.evaluate.evaluate"),
    ("13", "stages.export.export_model"),
    ("14", "stages.sweep.combinations"),
])  # fmt: skip
def test_every_script_is_guarded(script, module, error, config, monkeypatch, capfd):
    """Also the one without a config."""
    monkeypatch.setattr(f"dpo_mlx.{module}", lambda *_: raises(error)())
    if script == "01":
        monkeypatch.setattr(cli, "warn_without_blas", lambda: None)
    more = {"05": ["--set", "demo_model=true"], "14": ["--grid", "seed=1,2"]}.get(script, [])
    code = _exit_code_of(SCRIPTS[script], config, more)
    assert code == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "note: " not in line]
    assert line.startswith(f"error: {SCRIPTS[script].name}: ")


def _exit_code_of(script: Path, config: Path, more: list[str]) -> Any:
    if not script.name.startswith("01"):
        return exit_code(config, *more, script=script)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        import runpy

        patch.setattr(sys, "argv", [str(script)])
        runpy.run_path(str(script), run_name="__main__")
    return stopped.value.code


def test_libraries_that_someone_else_may_plant_are_refused(tmp_path, config, monkeypatch, capsys):
    """MLX would load them. A folder that others may write to is named, and keeps its rights."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder, line = tmp_path / "mlx", f"error: {tmp_path}/mlx: other users can write to this folder"
    assert end(config, lambda: 0, monkeypatch) == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o720, 0o702):
        folder.chmod(mode)
        assert end(config, lambda: 0, monkeypatch) == 1
        assert line in capsys.readouterr().err and folder.stat().st_mode & 0o777 == mode
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to("elsewhere")
    assert end(config, lambda: 0, monkeypatch) == 1
    assert line in capsys.readouterr().err
    folder.unlink()
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert end(config, lambda: 0, monkeypatch) == 1
    assert line in capsys.readouterr().err


def test_a_long_argument_is_not_repeated_whole(config, capsys, monkeypatch):
    """argparse and the config's reader name it, and cut it."""
    huge = "seed=" + "9" * 3000 + "\x1b[2J"
    for arguments in (["--set", huge], [huge], ["--set", "x" * 100_000]):
        monkeypatch.setattr(sys, "argv", ["10_train_dpo.py", "--config", str(config), *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main(lambda *_: 0, cli.parser("stage"))
        err = capsys.readouterr().err
        assert stopped.value.code in (1, 2)
        assert max(map(len, err.splitlines())) <= last_resort.MAX_CHARACTERS and "\x1b" not in err


# The terminal -----------------------------------------------------------------------------------

SHOWN = {
    "plain \u2019\u00e9\U0001f600\t\n": "plain \u2019\u00e9\U0001f600\t\n",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "a\x9b2J\x7f\x85": r"a\x9b2J\x7f\x85",
    "\u202eabc\u2066\u2028": r"\u202eabc\u2066\u2028",
    "a\rb": r"a\x0db",
    "\x00\x08": r"\x00\x08",
}


@pytest.mark.parametrize("text", SHOWN)
@pytest.mark.parametrize("kind", [terminal.Output, terminal.Messages])
def test_control_characters_are_spelled_out(kind, text):
    """Everything else stays as it is."""
    stream = io.StringIO()
    print(text, end="", file=kind(stream))
    assert stream.getvalue() == SHOWN[text]


def test_only_a_bar_on_stderr_goes_back_to_the_line_s_start():
    """tqdm begins with a return, and moves up between bars; its text is shown like any other."""
    for kind, expected in (
        (terminal.Messages, "\r10%\\x1b[1m\n\x1b[A"),
        (terminal.Output, "\\x0d10%\\x1b[1m\n\\x1b[A"),
    ):
        stream = io.StringIO()
        output = kind(stream)
        for text in ("\r10%\x1b[1m", "\n\x1b[A"):
            output.write(text)
        assert stream.getvalue() == expected


def test_a_bar_of_tqdm_s_is_drawn_as_before(monkeypatch):
    """The same bytes go to the terminal with the filter and without."""
    from tqdm import tqdm

    drawn = []
    for wrap in (lambda stream: stream, terminal.Messages):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", wrap(stream))
        with tqdm(total=3, desc="10 train", bar_format="{desc} {n}/{total} {bar}") as bar:
            for _ in range(3):
                bar.update()
        drawn.append(stream.getvalue())
    assert drawn[0] == drawn[1] and "\r" in drawn[0]


# Standard streams that are gone -----------------------------------------------------------------

PROGRAM = """
import sys
from dpo_mlx.process.last_resort import run_and_exit

def run():
    print("caf\\u00e9 \\u2019 \\udcff")
    for _ in range(int(sys.argv[1])):
        print("x" * 100)
        print("y" * 100, file=sys.stderr)

run_and_exit(run)
"""
LOST = "error: standard output cannot be written"


@pytest.mark.parametrize("rows", [1, 2000])
@pytest.mark.parametrize(("redirect", "variables", "code", "says"), [
    ("> /dev/full", {}, 1, LOST),
    (">&-", {}, 0, ""),
    ("2> /dev/full", {}, 0, ""),
    ("2>&-", {}, 0, ""),
    (">&- 2>&- <&-", {}, 0, ""),
    ("> /dev/full 2> /dev/full", {}, 1, ""),
    ("> /dev/null", {"PYTHONIOENCODING": "ascii"}, 0, ""),
    ("> /dev/null", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 0, ""),
    ("| true", {}, 1, LOST),
])  # fmt: skip
def test_a_stream_that_is_gone_is_no_traceback(redirect, variables, code, says, rows, tmp_path):
    """A full disk, a closed stream, a reader that has left, a terminal that is not UTF-8."""
    if "/dev/full" in redirect and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    if redirect == "| true":
        redirect = "| (exec <&-; sleep 0.3)"
    command = f'set -o pipefail; "{sys.executable}" "{program}" {rows} {redirect}'
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts"), **variables},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if "y" * 100 not in line]
    assert done.returncode == code, done.stderr
    assert len(lines) == (1 if says else 0) and all(line.startswith(says) for line in lines)


def test_a_deleted_working_directory_is_named(tmp_path):
    """Before anything else is tried in it."""
    program, gone = tmp_path / "program.py", tmp_path / "gone"
    program.write_text(PROGRAM)
    gone.mkdir()
    done = subprocess.run(
        ["bash", "-c", f'rmdir "{gone}"; exec "{sys.executable}" "{program}" 0'],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: the working directory was deleted")
    assert len(done.stderr.splitlines()) == 1
