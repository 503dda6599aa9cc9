"""YAML as a config needs it: what it says is what it means, and reading it takes no time.

Refused, with the line: a key that appears twice (the last would win in silence), anchors, aliases
and merge keys (ten lines of them make gigabytes), tags (they make objects), numbers that are not
written in plain decimals (YAML 1.1 reads 010 as 8 and 1:30 as 90), dates, and nesting or length
that no config has.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from .text import reason, shown

# A config has some 80 keys, in sections.
DEEPEST, MOST_VALUES = 10, 2000
# Characters of a number: 2^64 has 20 digits, a float in full some 25.
LONGEST_NUMBER = 100
# Characters of the file's own words in a message.
WORDS = 60

_TAG = "tag:yaml.org,2002:"
STRING, INTEGER, FLOAT, MERGE = (_TAG + name for name in ("str", "int", "float", "merge"))
# What else YAML makes of words that are not in quotes.
NO_TEXT = {_TAG + "timestamp": "a date", _TAG + "value": "a default value", MERGE: "a merge key"}
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


def load(text: str) -> Any:
    """The value that a YAML document holds. Raises ValueError, with one line that says what is
    wrong on which line, for what is not valid YAML and for what is refused here.
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
    """SafeLoader, which checks each value before it makes anything of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._values += 1
        self._depth += 1
        if self._depth > DEEPEST:
            raise _fault(event, f"values nested more than {DEEPEST} deep")
        if self._values > MOST_VALUES:
            raise _fault(event, f"more than {MOST_VALUES} values; a config has some 80 keys")
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise _fault(event, "anchors (&) and aliases (*) are not read here; write it out")
        if event.tag:
            tag = shown(event.tag.replace(_TAG, "!!"), WORDS)
            raise _fault(event, f"tags like {tag} are not read here; remove it")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode):
            _require_plain(node)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != STRING:
                raise _fault(key, f"{_words(key)} is not the name of a key; write a name")
            if key.value in first:
                name = shown(key.value, WORDS)
                earlier = first[key.value]
                raise _fault(
                    key, f"the key {name} is on line {earlier} already; remove one of the two"
                )
            first[key.value] = line
        return super().construct_mapping(node, deep)


def _require_plain(node: yaml.ScalarNode) -> None:
    """Raises an error for a number or a date that could be meant otherwise."""
    quote = "; put it in quotes if it is text"
    words = _words(node)
    if node.tag in NO_TEXT:
        raise _fault(node, f"{words} is {NO_TEXT[node.tag]} in YAML{quote}")
    if node.tag not in (INTEGER, FLOAT):
        return
    if len(node.value) > LONGEST_NUMBER:
        raise _fault(node, f"a number of {len(node.value)} characters; no setting is so large")
    if node.tag == INTEGER and not DECIMAL.fullmatch(node.value):
        raise _fault(node, f"{words} is a number that is not written in plain decimals{quote}")
    if ":" in node.value:
        raise _fault(node, f"{words} is a time in YAML{quote}")


def _words(node: yaml.Node) -> str:
    return shown(node.value, WORDS) if isinstance(node, yaml.ScalarNode) else "a list or a section"


def _fault(at: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
