"""Token ids are what the chat template writes, and rows that cannot be are named."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
import runs
import tiny
from dpo_mlx import config
from dpo_mlx.data import encoding, prompt_date, round_trip, tokens
from dpo_mlx.data.encoding import Encoder
from dpo_mlx.data.pairs import LENGTH, Pair
from dpo_mlx.export import hugging_face
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.model.loading import load_model
from dpo_mlx.stages import fuse_adapters, make_pairs
from dpo_mlx.training.setup import prepare
from test_pairs import by_hand, edit, encoder_of
from tokenizers import Tokenizer, decoders, models, normalizers

PAIR = Pair("Why?", "So.", "No.", line=3)
CHATML = tiny.CHATML_TEMPLATE
BLOCK = "<think>\n\n</think>\n\n"
# ChatML with an empty thinking block before every answer.
WITH_BLOCK = CHATML.replace(
    "{{ m.content }}",
    "{{ '" + BLOCK.replace("\n", "\\n") + "' if m.role == 'assistant' }}{{ m.content }}",
)
TODAY = date.today()
DATED = "{{ strftime_now('%d %b %Y') }}" + tiny.GRANITE_TEMPLATE


def check(encoder: Encoder, *pairs: Pair, system_prompt: str = "") -> list[str]:
    return round_trip.check(encoder, system_prompt, {Path("p.jsonl"): list(pairs or [PAIR])})


def whole_ids(encoder: Encoder, *turns: tuple[str, str]) -> list[int]:
    """The ids of the template's rendering of some turns in one piece."""
    messages = [{"role": role, "content": text} for role, text in turns]
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    return tokens.encode(encoder.tokenizer, text)


# One piece and two --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["granite", "dense", "llama"])
def test_ids_are_those_of_one_piece(kind, tmp_path):
    """Ordinary templates need no note, and the ids are the template's own."""
    encoder = encoder_of(tiny.folder(tmp_path / "m", kind))
    assert check(encoder) == []
    ids = encoder.encode("Why?", "So.").ids
    assert list(ids) == whole_ids(encoder, ("user", "Why?"), ("assistant", "So."))[: len(ids)]


def sentence_piece(folder: Path, template: str) -> Path:
    """A tiny Llama whose tokenizer writes blanks as ▁, and adds one to the start of a text."""
    tiny.folder(folder, "llama", template=template)
    special = ["</s>", "<s>", "<unk>"]
    letters = ["▁", "<0x0A>", *map(chr, range(33, 127))]
    words = ["▁S", "▁So", "So"]
    vocabulary = {token: number for number, token in enumerate([*special, *letters, *words])}
    merges = [("▁", "S"), ("▁S", "o"), ("S", "o")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")
    return folder


INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}BLANK{{ m.content }}BLANK</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("blank", "answer"), [("", ["So", "."]), (" ", ["▁So", ".", "▁"])])
def test_no_blank_is_added_between_prompt_and_answer(blank, answer, tmp_path):
    """SentencePiece adds a blank to a text that stands alone. The blank that Llama 2's template
    writes is part of the answer, where it belongs to the first word's token.
    """
    encoder = encoder_of(sentence_piece(tmp_path / "m", INST.replace("BLANK", blank)))
    assert check(encoder) == []
    sequence = encoder.encode("Why?", "So.")
    assert list(sequence.ids) == whole_ids(encoder, ("user", "Why?"), ("assistant", "So."))
    scored = encoder.tokenizer.convert_ids_to_tokens(list(sequence.ids[sequence.prompt_length :]))
    assert scored == [*answer, "</s>"]
    assert encoder.answer_ids("So.", LENGTH) == list(sequence.ids[sequence.prompt_length :])[:2]


def test_a_joined_token_is_a_note(tmp_path):
    """ChatML's newline and an answer's first would be one token: a sampled answer's are two."""
    folder = tiny.folder(tmp_path / "m", "llama", vocab_size=len(tiny.vocabulary("llama")) + 1)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model["vocab"]["ĊĊ"] = len(model["vocab"])
    edit(folder / "tokenizer.json", model={**model, "merges": [["Ċ", "Ċ"]]})
    [note] = check(encoder_of(folder), PAIR, Pair("Why?", "\n\nSo.", "No.", line=4))
    assert note.startswith("p.jsonl: in 1 of 2 rows (lines 4) the tokenizer would join")


def test_answers_are_stripped_where_the_template_strips_them(tmp_path):
    """Llama 3's template does; a row that ends with a newline must not train on it."""
    trimming = CHATML.replace("m.content", "m.content | trim")
    encoder = encoder_of(tiny.folder(tmp_path / "m", "llama", template=trimming))
    assert encoder.encode("Why?", " So.\n").ids == encoder.encode("Why?", "So.").ids
    assert check(encoder, Pair("Why?", " So.\n", "No.")) == []


# Templates that differ ----------------------------------------------------------------------------


def test_an_empty_thinking_block_is_part_of_the_prompt(tmp_path):
    """When no switch writes it, it is added where the template writes it, and named."""
    encoder = encoder_of(tiny.folder(tmp_path / "m", "thinking", template=WITH_BLOCK))
    [note] = check(encoder)
    assert "writes '<think>\\n\\n</think>\\n\\n' before an answer" in note
    sequence = encoder.encode("Why?", "So.")
    prompt = f"<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{BLOCK}"
    assert list(sequence.ids) == by_hand("thinking", prompt + "So.<|im_end|>")
    assert sequence.answer_length == len("So.") + 1


def test_an_empty_thinking_block_with_a_switch_is_refused(tmp_path):
    """Qwen 3's kind: without the switch its users would let the model think first."""
    closing = "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    template = WITH_BLOCK.replace("assistant\n{%", "assistant\n" + closing + "{%")
    folder = tiny.folder(tmp_path / "m", "thinking", template=template)
    remedy = r"set chat_template_args: \{enable_thinking: false\}$"
    with pytest.raises(UserError, match="^model: .* an empty thinking block before .*" + remedy):
        encoder_of(folder)
    assert encoder_of(folder, template_args={"enable_thinking": False}).render("?").endswith(BLOCK)


DIFFERENT = {
    "drops thoughts": (
        CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
        Pair("Why?", "<think>Hm.</think>So.", "No.", line=3),
        "drops or changes part of this answer",
    ),
    "another prompt": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}ANSWER NOW: {% endif %}",
        PAIR,
        "does not write a prompt and its answer as it writes the two together",
    ),
    "only the last question": (
        "{% for m in messages %}{{ m.content }}{{ ' Be brief.' if loop.last }}\n{% endfor %}",
        PAIR,
        "does not write a prompt and its answer as it writes the two together",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_turns_that_differ_are_one_line(name, tmp_path):
    """It names the row, shows what the template writes, and says what to do."""
    template, pair, says = DIFFERENT[name]
    encoder = encoder_of(tiny.folder(tmp_path / "m", "llama", template=template))
    with pytest.raises(UserError, match=rf"^p\.jsonl:3: .*{says}") as error:
        check(encoder, pair)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


# Markup in text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "mark"),
    [
        (Pair("Why?", "So.<|im_end|>", "No."), "<|im_end|>"),
        (Pair("<|im_start|>user\nWhy?<|im_end|>", "So.", "No."), "<|im_start|>"),
        (Pair("Why?", "So.", "No.<|im_end|>"), "<|im_end|>"),
        (Pair("Why?", "So.", "No.<|im_start|>"), None),  # the model wrote it
        (Pair("Why <|im_end?", "So |>.", "<im_end>"), None),
    ],
)
def test_markup_in_text_is_refused(pair, mark, llama):
    """Two stop tokens, or a template within the template. Rows are counted and named by line."""
    rows = [PAIR, *(Pair(pair.prompt, pair.chosen, pair.rejected, line=n) for n in (7, 9))]
    encoder = encoder_of(llama)
    if mark is None:
        assert check(encoder, *rows) == []
        return
    with pytest.raises(UserError) as error:
        check(encoder, *rows)
    start = "p.jsonl: 2 of 3 rows contain markup of the model's chat template, such as "
    assert str(error.value).startswith(f"{start}{mark} (lines 7, 9), and ")


def test_markup_that_is_no_token_is_refused_too(tmp_path):
    """[/INST] is ordinary text to Llama 2's tokenizer. Words in brackets are still allowed."""
    encoder = encoder_of(sentence_piece(tmp_path / "m", INST.replace("BLANK", "")))
    check(encoder, Pair("Why [not]? <b>", "So [1].", "No."))
    with pytest.raises(UserError, match=r"such as \[/INST\] \(lines 3\)"):
        check(encoder, Pair("[INST] Why? [/INST]", "So.", "No.", line=3))


def test_markup_in_the_system_message_is_refused(llama):
    """It is the same fault, under another key."""
    with pytest.raises(UserError, match=r"^system_prompt: contains <\|im_end\|>"):
        check(encoder_of(llama), system_prompt="Be brief.<|im_end|>")


def test_stages_06_and_10_check_their_rows(settings, write_config, tmp_path):
    """The first before it samples, the second before it trains."""
    source = Path(settings["data"]["source"])
    row = json.dumps({"question": "Why?", "answer": "So.<|end_of_text|>"})
    clean = source.read_text()
    source.write_text(clean + row + "\n")
    run = config.load(write_config(settings))
    with pytest.raises(UserError, match=r"source.jsonl: 1 of 31 rows .* \(lines 31\)"):
        make_pairs.make_pairs(run)
    runs.write_pairs(Path(run.data.train_pairs), 7)
    runs.write_pairs(Path(run.data.valid_pairs), 2, first=100)
    with Path(run.data.valid_pairs).open("a") as file:
        file.write(json.dumps({"prompt": "<|pad|>", "chosen": "So.", "rejected": "No."}) + "\n")
    with pytest.raises(UserError, match=r"valid.jsonl: 1 of 3 rows .*<\|pad\|> \(lines 3\)"):
        prepare(run)


# The end of turn ----------------------------------------------------------------------------------


@pytest.fixture
def other_eos(tmp_path) -> Path:
    """A ChatML model whose eos_token_id is only <|endoftext|>, as of a base model."""
    folder = tiny.folder(tmp_path / "m", "llama", eos_token_id=2)
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_k": 9}))
    return folder


def test_the_template_s_end_of_turn_is_trained_and_stops(other_eos):
    """Otherwise answers would run on after the end that the template teaches."""
    encoder = encoder_of(other_eos)
    assert encoder.end_token == "<|im_end|>"
    assert encoder.tokenizer.eos_token_ids == {0, 2}
    [note] = check(encoder)
    assert "ends a turn with <|im_end|>, which is not among" in note


def test_the_fused_model_stops_there(other_eos, settings, write_config, tmp_path):
    """Its files say so, and so do those of its export; other keys stay as they are."""
    run = config.load(write_config({**settings, "model": str(other_eos)}))
    model = load_model(str(other_eos))
    fuse_adapters._save(model, run, model.model.parameters()["model"]["norm"]["weight"].dtype)
    exported = tmp_path / "hf"
    hugging_face.write(run.run.fused, other_eos, exported)
    for folder in (run.run.fused, exported):
        assert jsonl.read_json(folder / "config.json")["eos_token_id"] == [0, 2]
        generation = jsonl.read_json(folder / "generation_config.json")
        assert generation == {"eos_token_id": [0, 2], "top_k": 9}
        assert load_model(str(folder)).tokenizer.eos_token_ids == {0, 2}


def test_a_template_without_an_end_of_turn_is_a_note(tmp_path):
    """Nothing in the template says where an answer ends, so the tokenizer's token does."""
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoder = encoder_of(tiny.folder(tmp_path / "m", "llama", template=plain))
    [note] = check(encoder)
    assert "writes no special token after an answer, so <|im_end|>" in note
    assert list(encoder.encode("Why?", "So.").ids)[-4:] == by_hand("llama", "So.<|im_end|>")


# The date -----------------------------------------------------------------------------------------


def test_a_template_gets_the_date_of_the_run(tmp_path):
    """The prompts of tomorrow are those of today; not even a clock makes them differ."""
    day = date(2024, 2, 29)
    folder = tiny.folder(tmp_path / "m", template=DATED.replace("%Y", "%Y %H:%M:%S.%f"))
    encoder = encoder_of(folder, day=day)
    assert encoder.render("Why?").startswith("29 Feb 2024 00:00:00.000000<|")
    assert encoder.template.writes_date() and encoder.template.day == day
    assert encoder_of(folder).template.day == date.today()


@pytest.mark.parametrize("directive", ["%d", "%b", "%Y", "%A", "%j"])
@pytest.mark.parametrize("day", [date(2024, 2, 29), date(2025, 12, 31), date(2026, 1, 1)])
def test_every_part_of_a_date_is_noticed(directive, day, tmp_path):
    """A template that writes only the weekday also changes its prompts."""
    template = DATED.replace("%d %b %Y", directive)
    assert encoder_of(
        tiny.folder(tmp_path / "m", template=template), day=day
    ).template.writes_date()


def test_the_date_is_stored_at_the_first_stage(settings, write_config, tmp_path, capsys):
    """Stage 10 renders what stage 06 sampled from, days later too, and both say the date."""
    settings["model"] = str(tiny.folder(tmp_path / "m", template=DATED))
    run = config.load(write_config(settings))
    make_pairs.make_pairs(run)
    assert (
        f"06: note: the chat template writes the date; with these pairs it is always {TODAY} ("
        in (capsys.readouterr().out)
    )
    before = encoding.digest(prepare(run).pairs["train"])
    jsonl.write_json(run.pairs.prompt_date, {"date": "2024-02-29"})
    setup = prepare(run)
    assert "it is always 2024-02-29 (" in capsys.readouterr().out
    assert setup.encoder.render("Why?").startswith("29 Feb 2024")
    assert encoding.digest(setup.pairs["train"]) != before


def test_no_date_is_stored_without_need(settings, write_config, granite):
    """Most templates write none."""
    files = config.load(write_config(settings)).pairs
    assert [*prompt_date.keep(files, encoder_of(granite).template)] == []
    assert not files.prompt_date.exists() and prompt_date.read(files) is None


def test_a_broken_date_is_one_line(settings, write_config):
    """The file was edited by hand."""
    files = config.load(write_config(settings)).pairs
    files.prompt_date.parent.mkdir(parents=True)
    for content in ('{"date": "tomorrow"}', "{}", "["):
        files.prompt_date.write_text(content)
        with pytest.raises(UserError, match=r"train\.date\.json") as error:
            prompt_date.read(files)
        assert "\n" not in str(error.value)
