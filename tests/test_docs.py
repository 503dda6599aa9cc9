"""The READMEs are short and true: links, paths, commands, options and the tables of every key."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import key_tables
import pytest
from conftest import REPOSITORY
from dpo_mlx import config

README = REPOSITORY / "README.md"
LIBRARY = REPOSITORY / "scripts/dpo_mlx"
DOCS = [
    README,
    *(REPOSITORY / folder / "README.md" for folder in ("config", "scripts", "tests/benchmarks")),
]
each_doc = pytest.mark.parametrize("doc", DOCS, ids=lambda path: str(path.relative_to(REPOSITORY)))

# Programs that a command may start with, apart from those of this repository and of `.venv`.
SYSTEM = {"mkdir", "open", "python3", "llama-cli", "llama-quantize"}
OTHER_ENVIRONMENT = ".venv-gguf/bin/"


def test_the_readme_is_short_and_begins_with_what_matters():
    """200 lines at most. The first 30 say what was not tested, and how to start."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    start = "\n".join(lines[:30])
    for words in (
        "We have not run Granite's real weights yet",
        "./train_dpo_run1.sh config/smollm2-135m_demo.yaml",
        "tests/run.sh",
    ):
        assert words in start


# Links and paths --------------------------------------------------------------------------------


def anchors(doc: Path) -> set[str]:
    """The anchors of the headings, as GitHub forms them."""
    titles = re.findall(r"^#+ (.*)$", doc.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_doc
def test_links_lead_somewhere(doc):
    """Every relative link names a file that exists, and a heading in it."""
    for link in re.findall(r"\]\(([^)]+)\)", doc.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = doc.parent / name if name else doc
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def tree() -> list[Path]:
    """The paths of the README's tree, in which two spaces are a level."""
    _, _, after = README.read_text().partition("## The tree\n\n```\n")
    lines, _, _ = after.partition("```")
    folders: list[Path] = []
    paths = []
    for line in lines.splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        path = Path(*folders[level - 1 : level], line.split()[0])
        paths.append(path)
        folders[level:] = [path]
    return paths


def test_the_tree_is_the_tree():
    """Every path of the README's tree exists, and it has every stage and folder of the library."""
    paths = tree()
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    scripts = [path.relative_to(REPOSITORY) for path in REPOSITORY.glob("scripts/phase*/*.py")]
    folders = [path.parent.relative_to(REPOSITORY) for path in LIBRARY.glob("*/*.py")]
    assert len(scripts) >= 8 and folders
    assert {*scripts, *folders} <= {*paths}


@each_doc
def test_paths_in_the_text_exist(doc):
    """A path in backquotes that begins with one of this repository's folders."""
    for path in re.findall(r"`((?:scripts|config|tests|data/sample)/[\w./-]*)`", doc.read_text()):
        assert (REPOSITORY / path).exists(), path


# Commands ---------------------------------------------------------------------------------------


def commands(doc: Path) -> Iterator[list[str]]:
    """The words of every command: those in shell blocks, and those that start with a program of
    this repository or of `.venv` in the text.
    """
    text = doc.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for line in "\n".join(blocks).splitlines():
        yield shlex.split(line, comments=True)
    for code in re.findall(r"`((?:\.venv|\./|tests/run)[^`]*)`", prose):
        if words := shlex.split(" ".join(code.split())):
            yield words


def source_of(words: list[str]) -> str | None:
    """The text that names the options of a command's program; None for a program of the system."""
    program = words[0]
    if program in SYSTEM or program.startswith(OTHER_ENVIRONMENT):
        return None
    if program in (".venv/bin/python", ".venv-tests/bin/python"):
        script = REPOSITORY / words[1]
        shared = [*LIBRARY.rglob("cli.py"), script.parent / "common.py"]
        return "".join(path.read_text() for path in (script, *shared) if path.exists())
    if program.startswith(".venv/bin/"):
        name = program.removeprefix(".venv/bin/")
        if name == "pip":
            return None
        (entry,) = entry_points(group="console_scripts", name=name)
        spec = find_spec(entry.module)
        assert spec and spec.origin
        return Path(spec.origin).read_text()
    assert program in ("./train_dpo_run1.sh", "tests/run.sh", ".venv"), f"not runnable: {words}"
    return "" if program == ".venv" else (REPOSITORY / program).read_text()


@each_doc
def test_commands_run_as_they_are_written(doc):
    """Nothing activates `.venv`, so a command names its programs in there. Each program exists,
    and has the options that the command gives it.
    """
    for words in filter(None, commands(doc)):
        source = source_of(words)
        if source is None:
            continue
        for word in words[1:]:
            option = word.partition("=")[0]
            if option.startswith("-") and " " not in option:  # not a quoted value
                assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", source), words


# Keys -------------------------------------------------------------------------------------------


def test_the_tables_of_keys_are_current():
    """config/README.md says what the comments say of every key, and its true default."""
    _, mark, tables = key_tables.README.read_text().partition(key_tables.MARK)
    assert mark and tables == f"\n{key_tables.tables()}", "run .venv/bin/python tests/key_tables.py"
    named = re.findall(r"^\| (`.*?`) \| ", tables, re.MULTILINE)
    keys = [key.strip("`") for names in named for key in names.split(", ")]
    assert sorted(keys) == sorted(config.keys()) == sorted(key_tables.defaults())


def test_required_keys_are_called_so():
    """The comments and the dataclasses agree on which keys have no default."""
    rows = [row for s in key_tables.read_sections(key_tables.CONFIG) for row in s.rows]
    said = [k for row in rows for k in row.keys if row.comment.startswith(key_tables.REQUIRED)]
    required = [key for key, shown in key_tables.defaults().items() if shown == "required"]
    assert sorted(said) == sorted(required)


def test_both_full_configs_explain_a_key_in_the_same_words():
    """A key means the same in the demo and on Granite."""
    demo = REPOSITORY / "config/smollm2-135m_demo.yaml"
    assert key_tables.read_sections(demo) == key_tables.read_sections(key_tables.CONFIG)


def test_sections_that_messages_name_are_there():
    """A message that sends the reader to a section of the README names one that exists."""
    sources = [*LIBRARY.rglob("*.py"), *LIBRARY.rglob("*.j2")]
    text = "".join(path.read_text() for path in sources)
    titles = set(re.findall(r'README, "([^"]+)"', text))
    assert titles
    assert titles <= set(re.findall(r"^## (.*)$", README.read_text(), re.MULTILINE))
