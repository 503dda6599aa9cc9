"""Templates into pages: what comes from outside is quoted for where it stands.

HTML is escaped everywhere; Markdown, YAML and shell have filters. A missing value is an error.
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from ..files.text import one_line, visible

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def number(value: float | None, spec: str = ".2f") -> str:
    """A number for reading, a dash for one that is missing or not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return format(value, spec).replace("-", "−")


def setting(value: Any) -> str:
    """A config value as it stands in the YAML file; a text without quotes."""
    is_text = isinstance(value, str) and value
    return value if is_text else json.dumps(value, ensure_ascii=False, default=str)


def markdown(text: str) -> str:
    """Text as a line of Markdown that shows it as it is, also in a table's cell."""
    escaped = re.sub(r"[\\`*_{}\[\]()#!|~$]", r"\\\g<0>", one_line(text))
    # At the start of a line these would begin a list, a rule or a heading.
    return html.escape(re.sub(r"^(\d*)([-+=.])", r"\1\\\2", escaped), quote=False)


def code(text: str) -> str:
    """Text on one line as code within Markdown."""
    marks = "`" * (_longest_backticks(text) + 1)
    blank = " " if "`" in text else ""
    return f"{marks}{blank}{one_line(text)}{blank}{marks}"


def fenced(text: str) -> str:
    """Text as a block of code in Markdown."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return f"{fence}text\n{visible(text)}\n{fence}"


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def yaml_text(text: str) -> str:
    """Text as a quoted YAML scalar on one line."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")


def shell(text: str) -> str:
    """Text on one line as one word of a shell command, which is not an option."""
    word = one_line(text)
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


FILTERS: dict[str, Any] = {
    "number": number,
    "setting": setting,
    "markdown": markdown,
    "code": code,
    "fenced": fenced,
    "yaml": yaml_text,
    "shell": shell,
}
ENVIRONMENT.filters |= FILTERS


def render(template: str, **values: Any) -> str:
    """The page of a template of this folder."""
    return ENVIRONMENT.get_template(template).render(**values)
