"""Write the tables of config/README.md anew, from the comments of the shipped config.

    .venv/bin/python tests/key_tables.py

The comments are the only place that explains a key. The defaults come from config.py.
"""

from __future__ import annotations

import json
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from dpo_mlx.config import Config  # noqa: E402

CONFIG = ROOT / "config/mlx_granite-4.0-h-micro_dpo.yaml"
README = ROOT / "config/README.md"
MARK = "<!-- Written by tests/key_tables.py from here on. -->\n"
REQUIRED = "(required) "


@dataclass
class Row:
    """Keys that share a comment, and the comment on one line."""

    keys: list[str]
    comment: str


@dataclass
class Section:
    """A section of a config file, "" for the keys outside of any; `comment` stands above it."""

    name: str
    comment: str = ""
    rows: list[Row] = field(default_factory=list)


def read_sections(path: Path) -> list[Section]:
    """The sections of a config file that comments every key. The comment at the top of the file
    belongs to no key.
    """
    _, _, body = path.read_text(encoding="utf-8").partition("\n\n")
    sections, comment = [Section("")], ""
    for line in body.splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment += text.removeprefix("#")
        elif text.endswith(":"):
            sections.append(Section(text.removesuffix(":"), comment.strip()))
            comment = ""
        elif text:
            section, key = sections[-1], text.partition(":")[0]
            dotted = f"{section.name}.{key}" if section.name else key
            if comment:
                section.rows.append(Row([dotted], comment.strip()))
            else:
                section.rows[-1].keys.append(dotted)
            comment = ""
    return sections


def defaults(section: Any = Config, prefix: str = "") -> dict[str, str]:
    """The default of every key as the tables show it."""
    shown: dict[str, str] = {}
    hints = typing.get_type_hints(section)
    for key in fields(section):
        if is_dataclass(hints[key.name]):
            shown |= defaults(hints[key.name], f"{prefix}{key.name}.")
        else:
            shown[f"{prefix}{key.name}"] = _default(key)
    return shown


def _default(key: Field[Any]) -> str:
    if key.default_factory is not MISSING:
        value = key.default_factory()
    elif key.default is not MISSING:
        value = key.default
    else:
        return "required"
    text = value if isinstance(value, str) and value else json.dumps(value)
    return f"`{text}`"


def tables() -> str:
    """Markdown: a heading and a table of key, default and meaning for each section."""
    lines = (line for section in read_sections(CONFIG) for line in _lines(section, defaults()))
    return "\n".join(lines)


def _lines(section: Section, shown: dict[str, str]) -> Iterator[str]:
    yield from (f"## `{section.name}`" if section.name else "## Outside of any section", "")
    if section.comment:
        yield from (section.comment, "")
    yield from ("| key | default | meaning |", "|---|---|---|")
    for row in section.rows:
        meaning = row.comment.removeprefix(REQUIRED).replace("|", "\\|")
        meaning = re.sub(r"\{.*?\}|\[.*?\]", lambda match: f"`{match[0]}`", meaning)
        keys = ", ".join(f"`{key}`" for key in row.keys)
        yield f"| {keys} | {', '.join(shown[key] for key in row.keys)} | {meaning} |"
    yield ""


def write() -> None:
    """Replace what follows MARK in config/README.md."""
    text, _, _ = README.read_text(encoding="utf-8").partition(MARK)
    README.write_text(text + MARK + "\n" + tables(), encoding="utf-8")


if __name__ == "__main__":
    write()
