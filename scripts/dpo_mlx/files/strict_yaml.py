"""A strict YAML reader for configs, without YAML's surprises.

It refuses, with the line number: a key that appears twice (YAML would silently use the last one),
anchors, aliases and merge keys (ten lines can expand to gigabytes), tags (they create objects),
numbers that are not plain decimals (YAML 1.1 reads 010 as 8 and 1:30 as 90), dates, and files that
are too long or too deeply nested for a config.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from .text import reason, shown

# A config has about 80 keys, in sections.
MAX_DEPTH, MAX_VALUES = 10, 2000
# Characters of a number: 2^64 has 20 digits, a float in full some 25.
LONGEST_NUMBER = 100
# Characters of a value that a message quotes.
QUOTE_LENGTH = 60

_TAG = "tag:yaml.org,2002:"
STRING, INTEGER, FLOAT, MERGE = (_TAG + name for name in ("str", "int", "float", "merge"))
# Other types that YAML gives to text without quotes.
UNQUOTED_TYPES = {
    _TAG + "timestamp": "a date",
    _TAG + "value": "a default value",
    MERGE: "a merge key",
}
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


def load(text: str) -> Any:
    """Parse a YAML document. Raises ValueError, with the line number, when it is not valid YAML or
    has a value that this module refuses.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(line + shown(problem)) from error
    except yaml.YAMLError as error:
        raise ValueError(reason(error)) from error


class _Loader(yaml.SafeLoader):
    """A SafeLoader that checks each value before it constructs it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._values += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _fault(event, f"values are nested more than {MAX_DEPTH} deep; reduce the nesting")
        if self._values > MAX_VALUES:
            raise _fault(event, f"more than {MAX_VALUES} values; a config has about 80 keys")
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise _fault(
                event, "anchors (&) and aliases (*) are not supported; write the value out"
            )
        if event.tag:
            tag = shown(event.tag.replace(_TAG, "!!"), QUOTE_LENGTH)
            raise _fault(event, f"tags like {tag} are not supported; remove it")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode):
            _refuse_ambiguous(node)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        line_of_key: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != STRING:
                raise _fault(key, f"{_quote(key)} is not the name of a key; write a name")
            if key.value in line_of_key:
                name = shown(key.value, QUOTE_LENGTH)
                raise _fault(
                    key,
                    f"the key {name} is already on line {line_of_key[key.value]}; remove one of "
                    "them",
                )
            line_of_key[key.value] = line
        return super().construct_mapping(node, deep)


def _refuse_ambiguous(node: yaml.ScalarNode) -> None:
    """Raises an error for a number or a date that the user may have meant as text."""
    remedy = "; put it in quotes if it is text"
    value = _quote(node)
    if node.tag in UNQUOTED_TYPES:
        raise _fault(node, f"{value} is {UNQUOTED_TYPES[node.tag]} in YAML{remedy}")
    if node.tag not in (INTEGER, FLOAT):
        return
    if len(node.value) > LONGEST_NUMBER:
        raise _fault(node, f"the number has {len(node.value)} characters; no setting is that large")
    if node.tag == INTEGER and not DECIMAL.fullmatch(node.value):
        raise _fault(node, f"{value} is a number, but not a plain decimal{remedy}")
    if ":" in node.value:
        raise _fault(node, f"{value} is a time in YAML{remedy}")


def _quote(node: yaml.Node) -> str:
    is_scalar = isinstance(node, yaml.ScalarNode)
    return shown(node.value, QUOTE_LENGTH) if is_scalar else "a list or a section"


def _fault(node: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
