"""Chat templates like Granite's: what the model sees, and how a run's settings reach it."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import REPOSITORY
from dpo_mlx import config
from dpo_mlx.data import chat_template, pairs
from dpo_mlx.data.encoding import Encoder
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.model.loading import load_model
from dpo_mlx.process import time_limit
from dpo_mlx.stages import make_pairs
from dpo_mlx.training.setup import prepare
from test_pairs import by_hand, edit, encoder_of

OFF = {"enable_thinking": False}


def turn(role: str, text: str) -> str:
    """A turn in Granite's markup."""
    return f"<|start_of_role|>{role}<|end_of_role|>{text}<|end_of_text|>\n"


ASKED = turn("user", "Why?") + "<|start_of_role|>assistant<|end_of_role|>"


@pytest.fixture(scope="module")
def granite_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny hybrid Granite with a template that behaves like 4.0's."""
    path = tmp_path_factory.mktemp("models") / "granite-4"
    return tiny.folder(path, template=tiny.GRANITE_4_TEMPLATE)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense Granite that thinks unless told not to."""
    return tiny.folder(tmp_path_factory.mktemp("models") / "thinking", "thinking")


def with_template(path: Path, template: str, kind: str = "granite") -> Encoder:
    return encoder_of(tiny.folder(path / "m", kind, template=template))


# What the model sees ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system_prompt", "seen"), [("", tiny.GRANITE_4_SYSTEM), ("Be brief.", "Be brief.")]
)
def test_the_prompt_has_a_system_message_in_any_case(system_prompt, seen, granite_4):
    """Granite writes its default when none is given; either is part of the prompt, id by id."""
    encoder = encoder_of(granite_4, system_prompt=system_prompt)
    prompt = turn("system", seen) + ASKED
    assert encoder.render("Why?") == prompt
    sequence = encoder.encode("Why?", "So.")
    assert list(sequence.ids) == by_hand("granite", f"{prompt}So.<|end_of_text|>")
    assert sequence.answer_length == len("So.") + 1
    assert encoder.template.system_message() == seen


def test_the_test_s_template_is_the_real_one_s_kind(granite_4):
    """An empty system message counts as none; newlines join parts; tools and documents change the
    system text; an answer ends with the end of turn and a newline.
    """
    tokenizer = load_model(str(granite_4)).tokenizer

    def text(messages: list[dict[str, Any]], **more: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **more)

    user = {"role": "user", "content": "Why?"}
    default = turn("system", tiny.GRANITE_4_SYSTEM)
    assert text([{"role": "system", "content": ""}, user]) == default + turn("user", "Why?")
    parts = [{"type": "text", "text": part} for part in ("Why", "not?")]
    parts.insert(1, {"type": "image", "text": "left out"})
    assert text([{**user, "content": parts}]) == default + turn("user", "Why\nnot?")
    answered = text([user, {"role": "assistant", "content": "So."}])
    assert answered.endswith(turn("assistant", "So."))
    for name in ("documents", "tools", "available_tools"):
        found = text([user], **{name: [{"doc_id": 1, "text": "a fact"}]})
        assert "a fact" in found and tiny.GRANITE_4_SYSTEM not in found, name


def test_the_end_of_turn_is_the_end_of_text(granite_4):
    """The token scored after an answer is the one on which Granite stops."""
    encoder = encoder_of(granite_4)
    assert encoder.tokenizer.decode([encoder.end_of_turn]) == "<|end_of_text|>"


USER = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
OWN = "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
SYSTEM_MESSAGES = {
    "no default": (tiny.GRANITE_TEMPLATE, None, "Be brief."),
    "a default amid other words": (
        "Year 2026. Rules: " + OWN + "{% else %}Be good.{% endif %} That is all.\n" + USER,
        "Be good.",
        "Be brief.",
    ),
    "no turn of its own": (
        "[INST] " + OWN + "\n\n{% endif %}" + USER + " [/INST]",
        None,
        "Be brief.",
    ),
    "leaves it out": ("Q: " + USER + " A:", None, None),
    "bare": (OWN + "{% endif %}" + USER, None, "Be brief."),
}


@pytest.mark.parametrize("name", SYSTEM_MESSAGES)
def test_the_system_message_is_found_by_rendering(name, tmp_path):
    """Finds the model's default, or that it has none, whatever the template's words and marks."""
    template, default, own = SYSTEM_MESSAGES[name]
    folder = tiny.folder(tmp_path / "m", template=template)
    assert encoder_of(folder).template.system_message() == default
    assert encoder_of(folder, system_prompt="Be brief.").template.system_message() == own


def test_a_template_that_refuses_system_messages_has_none(tmp_path):
    """Gemma's template rejects them, so none is sent to it."""
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    assert (
        with_template(tmp_path, refusing + tiny.GRANITE_TEMPLATE).template.system_message() is None
    )


# Stage 06 -----------------------------------------------------------------------------------------


def run_06(settings: dict[str, Any], write_config: Any, *overrides: str) -> config.Config:
    loaded = config.load(write_config(settings), list(overrides))
    make_pairs.make_pairs(loaded)
    return loaded


def test_stage_06_on_granite_s_template(settings, write_config, granite_4, questions, capsys):
    """All pairs are made, and the line before the first prompt says where the system message comes
    from.
    """
    run = run_06({**settings, "model": str(granite_4)}, write_config)
    made = [*pairs.read(Path(run.data.train_pairs)), *pairs.read(Path(run.data.valid_pairs))]
    assert sorted(pair.prompt for pair in made) == sorted(q["question"] for q in questions)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("06: the prompt of the first question, as the model sees it:")
    assert lines[start - 1] == (
        f'06: system message: "{tiny.GRANITE_4_SYSTEM}" (the model\'s own default; '
        "system_prompt is empty)"
    )
    assert lines[start + 1] == "    " + turn("system", tiny.GRANITE_4_SYSTEM).rstrip()
    assert not [line for line in lines if "note:" in line]


@pytest.mark.parametrize(
    ("message", "system_prompt", "said"),
    [
        ("Be\nbrief.", "Be\nbrief.", 'system message: "Be brief." (system_prompt)'),
        ("字" * 201, "x", 'system message: "' + "字" * 200 + ' ..." (system_prompt)'),
        (None, "", "no system message (the model has no default; system_prompt is empty)"),
        (None, "x", "no system message: the model's chat template drops system_prompt"),
    ],
)
def test_the_line_is_one_line(message, system_prompt, said):
    """Any system message, or none, gives one line."""
    assert make_pairs._system_line(message, system_prompt) == said


# The template's arguments -------------------------------------------------------------------------


def test_arguments_reach_prompt_and_end_of_turn(thinking, tmp_path):
    """The prompt and the text after an answer are both rendered with them."""
    encoder = encoder_of(thinking, template_args=OFF)
    rendered = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n</think>\n"
    assert encoder.render("Why?") == rendered
    assert list(encoder.encode("Why?", "So.").ids) == by_hand(
        "thinking", rendered + "So.<|im_end|>"
    )
    assert encoder.tokenizer.decode([encoder.end_of_turn]) == "<|im_end|>"
    marked = "{% for m in messages %}{{ m.content ~ end }}{% endfor %}"
    folder = tiny.folder(tmp_path / "m", "thinking", template=marked, eos_token_id=0)
    edit(folder / "config.json", eos_token_id=[0, 4])
    for end, token in (("<|im_end|>", 0), ("<|endoftext|>", 4)):
        assert encoder_of(folder, template_args={"end": end}).end_of_turn == token


def test_arguments_without_effect_are_named(granite_4, thinking):
    """One note lists the arguments that the template does not read, and only those."""
    unread = {"enable_thinking": False, "tone": "dry"}
    assert list(encoder_of(granite_4, template_args=unread).template.notes()) == [
        "chat_template_args: enable_thinking, tone: no effect on this model's prompts; remove them"
    ]
    assert list(encoder_of(granite_4).template.notes()) == []
    assert list(encoder_of(thinking, template_args=OFF).template.notes()) == []


def test_arguments_that_the_template_fails_on_are_named(granite_4, tmp_path):
    """The error blames the arguments, not the system message or the model."""
    counting = "{% for i in range(n or 0) %}{% endfor %}" + tiny.GRANITE_TEMPLATE
    folder = tiny.folder(tmp_path / "m", template=counting)
    with pytest.raises(UserError, match="^chat_template_args: .* fails with them .*remove them$"):
        encoder_of(folder, template_args={"n": "many"}, system_prompt="Be brief.")
    with pytest.raises(UserError, match="^model: its chat template fails .*use another model$"):
        with_template(tmp_path / "broken", "{{ raise_exception('broken') }}")


def test_an_argument_that_a_template_needs_has_an_effect(tmp_path):
    """The template fails without it, which must neither raise nor count as no effect."""
    needing = "{{ raise_exception('no tone') if tone is not defined }}" + tiny.GRANITE_TEMPLATE
    folder = tiny.folder(tmp_path / "m", template=needing)
    assert list(encoder_of(folder, template_args={"tone": "dry"}).template.notes()) == []


# Thinking -----------------------------------------------------------------------------------------

OPEN = "^model: its chat template opens a thinking block before the answer, .*as thoughts; "


def test_an_open_thinking_block_is_refused_with_the_switch(thinking, settings, write_config):
    """Stages 06 and 10 stop with one line before they sample or train."""
    settings["model"] = str(thinking)
    for stage in (make_pairs.make_pairs, prepare):
        if stage is prepare:
            run_06(settings, write_config, "chat_template_args.enable_thinking=false")
        with pytest.raises(UserError, match=OPEN) as error:
            stage(config.load(write_config(settings)))
        remedy = "set chat_template_args: {enable_thinking: false}"
        assert str(error.value).endswith(remedy) and "\n" not in str(error.value)


def test_the_switch_is_offered_only_where_it_works(tmp_path):
    """If a template always opens the block, the error does not suggest the switch."""
    always = tiny.CHATML_TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%")
    with pytest.raises(
        UserError, match=OPEN + r"use another model \(enable_thinking: false does not"
    ):
        with_template(tmp_path, always, "thinking")


def test_words_about_thinking_are_no_open_block(tmp_path):
    """A mark inside the system message or a question does not count."""
    told = tiny.CHATML_TEMPLATE.replace("{% for", "Think between <think> and its end.{% for", 1)
    folder = tiny.folder(tmp_path / "m", "thinking", template=told)
    encoder = encoder_of(folder, system_prompt="<think> first.")
    assert list(encoder.template.notes()) == []
    assert encoder.render("<think>").endswith("<|im_start|>assistant\n")


def test_a_model_that_may_think_gets_a_note(tmp_path):
    """Qwen's kind writes an empty block only with thinking off; otherwise the model opens one."""
    closing = (
        "{% if not (enable_thinking is not defined or enable_thinking) %}<think></think>{% endif %}"
    )
    template = tiny.CHATML_TEMPLATE.replace("assistant\n{%", "assistant\n" + closing + "{%")
    folder = tiny.folder(tmp_path / "m", "thinking", template=template)
    [note] = encoder_of(folder).template.notes()
    assert note.endswith("chat_template_args: {enable_thinking: false}")
    assert list(encoder_of(folder, template_args=OFF).template.notes()) == []


# Every place --------------------------------------------------------------------------------------


# The modules that the encoder is made of.
KNOWING = ("chat_template.py", "encoding.py")


def test_every_stage_makes_its_encoder_of_the_config():
    """Otherwise a stage would render other prompts than training did."""
    library = [path for path in (REPOSITORY / "scripts").rglob("*.py") if path.name not in KNOWING]
    source = {path.name: path.read_text() for path in library}
    assert [name for name, text in source.items() if "Encoder(" in text] == []
    assert [name for name, text in source.items() if ".apply_chat_template(" in text] == []
    users = {name for name, text in source.items() if "Encoder.of(" in text}
    stages = {"make_pairs.py", "setup.py", "fuse_adapters.py", "evaluate.py"}
    assert users == {*stages, "check_run.py", "selftest.py"}


def test_changed_arguments_are_other_samples(settings, write_config, granite_4):
    """Answers to two kinds of prompt never mix; the error names the argument."""
    settings["model"] = str(granite_4)
    run = run_06(settings, write_config, "data.limit=20")
    stamp = jsonl.read_json(run.pairs.samples_stamp)
    assert not [name for name in stamp if name.startswith("chat_template_args")]
    with pytest.raises(UserError, match="chat_template_args.tone: None -> dry"):
        run_06(settings, write_config, "data.limit=20", "chat_template_args.tone=dry")


# Broken templates ---------------------------------------------------------------------------------

GRANITE = tiny.GRANITE_TEMPLATE
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BROKEN = {
    "syntax": ("{% for", "fails (unexpected"),
    "refuses": ("{{ raise_exception('only\nFrench') }}", "fails (only French)"),
    "filter": ("{{ messages | nosuch }}" + GRANITE, "fails (No filter named 'nosuch'"),
    "attribute": ("{{ messages.nosuch() }}" + GRANITE, "fails ("),
    "division": ("{{ 1 / 0 }}" + GRANITE, "fails (division by zero)"),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}" + GRANITE, "fails (maximum"),
    "range": ("{% for i in range(10**9) %}{% endfor %}" + GRANITE, "fails (Range too big"),
    "import": ("{% import 'x' as x %}" + GRANITE, "fails (no loader"),
    "sandbox": ("{{ messages.pop() }}" + GRANITE, "fails ("),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}" + GRANITE, "fails ("),
    "surrogate": ("{{ '\\ud800' }}" + GRANITE, "surrogates not allowed"),
    "loops": (LOOPS + GRANITE, "it took over 0.5 seconds of CPU time"),
    "long": ("{{ 'x' * 10**8 }}" + GRANITE, "it adds 100000"),
    "empty": ("", "drops or shortens the question"),
    "constant": ("Hello!", "drops or shortens the question"),
    "question cut": (
        "{% for m in messages %}{{ m.content[:999] }}{% endfor %}",
        "or shortens the question",
    ),
    "question changed": (
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "drops or shortens",
    ),
    "answer": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "drops the answer",
    ),
    "answer refused": (
        "{{ raise_exception('no') if messages[-1].role == 'assistant' }}" + GRANITE,
        "fails (no)",
    ),
    "chance": ("{{ ['a', 'b'] | random }}" + GRANITE, "the same question differently each time"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_one_line_in_seconds(name, tmp_path, monkeypatch):
    """It names the template and the remedy, whatever the template does."""
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.5)
    template, says = BROKEN[name]
    folder = tiny.folder(tmp_path / "m")
    edit(folder / "tokenizer_config.json", chat_template=template)
    start = time.process_time()
    with pytest.raises(UserError, match=r"^model: its chat template ") as error:
        encoder_of(folder)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("use another model") and len(str(error.value)) < 500
    assert time.process_time() - start < 8


def test_a_template_that_fails_on_one_question_is_one_line(tmp_path):
    """Later than at the start, when the question is encoded."""
    picky = "{{ raise_exception('rude') if 'damn' in messages[0].content }}" + GRANITE
    encoder = with_template(tmp_path, picky)
    assert encoder.prompt_ids("Why?")
    with pytest.raises(UserError, match=r"chat template fails \(rude\)"):
        encoder.prompt_ids("damn")


# The time limit -----------------------------------------------------------------------------------


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_time_limit_leaves_no_trace():
    """The handler and the timer are as before, whether it ran out or not; waiting is free."""
    before = signal.getsignal(signal.SIGVTALRM)
    with time_limit.cpu_limit(0.05):
        time.sleep(0.2)
    too_slow = pytest.raises(time_limit.TooSlow, match=r"over 0.05 seconds")
    with too_slow, time_limit.cpu_limit(0.05):
        spin(5)
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    spin(0.2)  # no late signal


def test_a_time_limit_is_harmless_in_another_thread():
    """Python handles signals in the main thread alone."""
    ran = []

    def work() -> None:
        with time_limit.cpu_limit(0.01):
            spin(0.05)
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran
