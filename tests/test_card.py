"""The model card quotes outside text for its place: parsed again, it is the same text."""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import asdict, replace
from typing import Any

import pytest
import yaml
from dpo_mlx import config
from dpo_mlx.files.results import Evaluation
from dpo_mlx.files.text import one_line
from dpo_mlx.report import card, templates
from runs import wrote

FUSE = {
    "pairs": 4,
    "dtype": "bfloat16",
    "rounding": "stochastic",
    "quantize": None,
    "margin_kept": 1.0,
}
HOSTILE = {
    "yaml": "--- \nevil: 1\n---",
    "html": "<script>alert(1)</script> & <!--",
    "shell": "$(touch x) `touch y`; touch z && 'q' \"r\" \\",
    "fence": "``` a\n```\n````\n# title",
    "table": "a | b\n|---|---|",
    "link": "[text](http://x) ![i](j) *b* _i_ ~~s~~",
    "emoji": "🙂 é 日本 \u2028 \ufeff",
    "terminal": "\x1b]0;owned\x07\x1b[31m\x9b1m\r\x00",
    "option": "-rf --model x",
    "number": "1. one",
    "null": "null",
    "quotes": "'''\"\"\"",
    "long": "word " * 100,
}


TRAINING: dict[str, Any] = {
    "updates": 7,
    "sft_updates": 6,
    "end_of_sft": None,
    "last": asdict(Evaluation(7, wrote(voice=0.5))),
    "kept": asdict(Evaluation(6, wrote(voice=0.5))),
    "stopped": [],
    "notes": [],
    "adapters": "0" * 64,
}


@pytest.fixture
def rendered(settings: dict[str, Any], write_config: Any) -> Any:
    """rendered(config's values to replace) -> the card."""
    loaded = config.load(write_config(settings))

    def render(**changes: Any) -> str:
        return card.render(replace(loaded, **changes), {"fuse": FUSE, "training": TRAINING})

    return render


def block(text: str, language: str, last: bool = False) -> str:
    """The first or the last block of code in a language."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)
    return blocks[-1 if last else 0]


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_outside_text_survives_quoting(value, rendered):
    """In the front matter, the prose, the commands and the Python code."""
    arguments = {"tone": value, "flag": True, "count": 2}
    text = rendered(
        model=value,
        run_dir=f"runs/{value.replace('/', ':')}",
        system_prompt=value,
        chat_template_args=arguments,
    )
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", text)
    front = yaml.safe_load(text.split("\n---\n")[0])
    assert front["base_model"] == value and set(front) == {"base_model", "pipeline_tag", "tags"}
    prose = text.split("\n---\n", 1)[1].split("\n## Data")[0]
    assert "<" not in prose and re.match(r"\n# .*\n\n.*taught to answer", prose)
    commands = block(text, "bash", last=True).splitlines()
    name = one_line(f"{value.replace('/', ':')}.gguf")
    outfile = f"{'./' if name.startswith('-') else ''}{name}"
    assert shlex.split(commands[0])[-2:] == ["--outfile", outfile]
    words = shlex.split(commands[1])
    assert words[:3] == ["llama-cli", "--model", outfile] and len(commands) == 2
    assert json.loads(words[words.index("--chat-template-kwargs") + 1]) == arguments
    tree = ast.parse(block(text, "python"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    [call] = [c for c in calls if getattr(c.func, "attr", "") == "apply_chat_template"]
    keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert {key: keywords[key] for key in arguments} == arguments
    shown = templates.fenced(value)
    fence = shown.split("text\n")[0]
    assert f"\n{shown}\n" in text and fence not in shown[len(fence) : -len(fence)]


def test_arguments_that_are_not_python_names(rendered):
    """The card passes them as a dict."""
    text = rendered(chat_template_args={"a-b": "x", "class": 1})
    assert ast.parse(block(text, "python"))
    assert "**{'a-b': 'x', 'class': 1}" in block(text, "python")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ibm-granite/granite-4.0-h-micro", "ibm-granite/granite-4.0-h-micro"),
        ("- a", r"\- a"),
        ("12. a", r"12\. a"),
        ("# a\n b", r"\# a b"),
        ("a|b <c> & `d`", r"a\|b &lt;c&gt; &amp; \`d\`"),
        (r"a\b_c*[d](e)", r"a\\b\_c\*\[d\]\(e\)"),
    ],
)
def test_markdown_shows_text_as_it_is(text, shown):
    """Names of models and runs look as they are, and other text cannot become markup."""
    assert templates.markdown(text) == shown


def test_code_within_a_line():
    """The fence has more backticks than the text. A newline would end the paragraph."""
    assert templates.code("a b") == "`a b`"
    assert templates.code("a``b\n") == "``` a``b ```"


def test_the_card_says_what_dpo_added(rendered: Any) -> None:
    """The weights of SFT's end are named as that."""
    place = "after update 6 (the end of SFT). "
    assert f"{place}This is the supervised model: DPO did not improve on it. |" in rendered()
