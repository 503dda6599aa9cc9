"""Templates into pages: everything from outside is escaped in HTML, a missing value is an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

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


ENVIRONMENT.filters |= {"number": number, "setting": setting}


def render(template: str, **values: Any) -> str:
    """The page of a template of this folder."""
    return ENVIRONMENT.get_template(template).render(**values)
