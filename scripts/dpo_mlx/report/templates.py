"""Renders the templates in this folder, and quotes outside text for its place.

Jinja escapes HTML by itself. Markdown, YAML and shell have filters. A missing value is an error.
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
    """A number as text; a dash for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return "–"
    return format(value, spec).replace("-", "−")


def setting(value: Any) -> str:
    """A config value as in the YAML file, but text without quotes."""
    is_text = isinstance(value, str) and value
    return value if is_text else json.dumps(value, ensure_ascii=False, default=str)


def markdown(text: str) -> str:
    """Text escaped for one line of Markdown or one table cell."""
    escaped = re.sub(r"[\\`*_{}\[\]()#!|~$]", r"\\\g<0>", one_line(text))
    # At the start of a line these characters begin a list, a rule or a heading.
    return html.escape(re.sub(r"^(\d*)([-+=.])", r"\1\\\2", escaped), quote=False)


def code(text: str) -> str:
    """Text as inline code in Markdown, on one line."""
    marks = "`" * (_longest_backticks(text) + 1)
    blank = " " if "`" in text else ""
    return f"{marks}{blank}{one_line(text)}{blank}{marks}"


def fenced(text: str) -> str:
    """Text as a code block in Markdown."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return f"{fence}text\n{visible(text)}\n{fence}"


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def yaml_text(text: str) -> str:
    """Text as a double-quoted YAML scalar on one line."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")


def shell(text: str) -> str:
    """Text as one argument of a shell command, on one line. It never reads as an option."""
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
    """Fill a template of this folder with values."""
    return ENVIRONMENT.get_template(template).render(**values)
