"""The pair: the exact ids that are scored, and what a pair file may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from dpo_mlx.data import encoding, pairs
from dpo_mlx.data.encoding import Encoder
from dpo_mlx.data.pairs import LENGTH, STOP, Pair
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.model.loading import load_model
from dpo_mlx.training.setup import prepare

# The rendered prompt of the question "Why?" and the end-of-turn token, written out by hand.
RENDERED = {
    "granite": (
        "<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>",
        "<|end_of_text|>",
    ),
    "llama": ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
}
KINDS = list(RENDERED)
# Byte-level BPE writes these bytes as other letters; ASCII that can be seen stands for itself.
LETTERS = {" ": "Ġ", "\n": "Ċ"}
ANSWERS = ["So.", " begins with a blank", "\nwith a newline", "42 is it", "\n\n1\n", "Why?", "é🙂"]


def by_hand(kind: str, text: str) -> list[int]:
    """The ids of ASCII text and special tokens, looked up one by one."""
    tokens, ids = tiny.vocabulary(kind), []
    while text:
        special = next((t for t in tiny.SPECIAL[kind] if text.startswith(t)), None)
        ids.append(tokens.index(special or LETTERS.get(text[0], text[0])))
        text = text.removeprefix(special) if special else text[1:]
    return ids


def encoder_of(folder: Path, **settings: Any) -> Encoder:
    return Encoder(load_model(str(folder)).tokenizer, **settings)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def encoders(granite: Path, llama: Path) -> dict[str, Encoder]:
    return {"granite": encoder_of(granite), "llama": encoder_of(llama)}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_by_hand(kind, encoders):
    """Prompt, answer and end of turn are these ids in this order, nothing before or after."""
    prompt, end = RENDERED[kind]
    sequence = encoders[kind].encode("Why?", " 1\nSo")
    assert list(sequence.ids) == by_hand(kind, prompt + " 1\nSo" + end)
    assert sequence.prompt_length == len(by_hand(kind, prompt))
    assert sequence.answer_length == len(" 1\nSo") + 1


@pytest.mark.parametrize("finish", [STOP, LENGTH])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_scored_ids_are_the_answer(kind, answer, finish, encoders):
    """What is scored is the answer and its end, whole; the prompt's ids never change with it."""
    encoder = encoders[kind]
    prompt, end = RENDERED[kind]
    sequence = encoder.encode("Why?", answer, finish)
    scored = encoder.tokenizer.decode(list(sequence.ids[sequence.prompt_length :]))
    assert scored == answer + (end if finish == STOP else "")
    assert encoder.tokenizer.decode(list(sequence.ids[: sequence.prompt_length])) == prompt


@pytest.mark.parametrize("kind", KINDS)
def test_system_prompt_comes_first(kind, granite, llama):
    """The optional system message is in the prompt, never in what is scored."""
    encoder = encoder_of({"granite": granite, "llama": llama}[kind], system_prompt="Be brief.")
    prompt, end = RENDERED[kind]
    turn, rest = prompt.split("user", 1)
    system = f"{turn}system{rest.split('Why?')[0]}Be brief.{end}\n"
    sequence = encoder.encode("Why?", "So.")
    assert list(sequence.ids) == by_hand(kind, system + prompt + "So." + end)
    assert sequence.answer_length == 4


def test_no_token_spans_prompt_and_answer(tmp_path):
    """With a token for two newlines, ChatML's last newline and the answer's first stay apart."""
    folder = tiny.folder(tmp_path / "m", "llama", vocab_size=len(tiny.vocabulary("llama")) + 1)
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    model["vocab"]["ĊĊ"] = double = len(model["vocab"])
    edit(path, model={**model, "merges": [["Ċ", "Ċ"]]})
    encoder = encoder_of(folder)
    assert encoder.tokenizer.encode("\n\n", add_special_tokens=False) == [double]
    newline = by_hand("llama", "\n")[0]
    sequence = encoder.encode("Why?", "\nSo\n\n")
    start = sequence.prompt_length
    assert sequence.ids[start - 1 : start + 1] == (newline, newline)
    assert sequence.ids[start:] == (newline, *by_hand("llama", "So"), double, 0)


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_end_of_turn_is_what_the_template_writes(where, tmp_path):
    """An eos_token of another name does not hide it: base tokenizers call <|endoftext|> eos."""
    folder = tiny.folder(tmp_path / "m", "llama", eos_token_id=2)
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    (folder / "generation_config.json").write_text("{}")
    edit(folder / where, eos_token_id=[2, 0])
    encoder = encoder_of(folder)
    assert encoder.tokenizer.decode([encoder.end_of_turn]) == "<|im_end|>"


def test_tokenizer_without_chat_template_is_refused(tmp_path):
    """A base model has no turns to train on."""
    folder = tiny.folder(tmp_path / "m")
    edit(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(UserError, match="^model: its tokenizer has no chat template"):
        encoder_of(folder)


def test_template_without_system_message_is_named(tmp_path):
    """Gemma's and old Mistral's templates raise on a system message: the key at fault is named."""
    folder = tiny.folder(tmp_path / "m")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    edit(folder / "tokenizer_config.json", chat_template=refusing + tiny.GRANITE_TEMPLATE)
    assert encoder_of(folder).render("Why?") == RENDERED["granite"][0]
    with pytest.raises(UserError, match="^system_prompt: .*no system"):
        encoder_of(folder, system_prompt="Be brief.")


@pytest.mark.parametrize("kind", KINDS)
def test_pair_sides_share_the_prompt(kind, encoders):
    """Chosen always ends its turn; rejected only when it ended by itself."""
    encoder = encoders[kind]
    encoded = encoder.pair(Pair("Why?", "ab", "abcd", LENGTH, 7))
    start = encoded.chosen.prompt_length
    assert encoded.line == 7
    assert encoded.chosen.ids[:start] == encoded.rejected.ids[:start]
    assert encoded.chosen.ids[start:] == (*by_hand(kind, "ab"), encoder.end_of_turn)
    assert encoded.rejected.ids[start:] == tuple(by_hand(kind, "abcd"))
    assert encoded.length == start + 4


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_too_long_are_dropped_by_line(kind, encoders):
    """Either side may be too long; a pair of exactly max_length tokens stays, uncut."""
    made = [
        Pair("Why?", "abc", "x", line=1),
        Pair("Why?", "abcd", "x", line=2),
        Pair("Why?", "x", "abcd", line=3),
        Pair("Why?", "x", "abcd", LENGTH, line=4),
    ]
    limit = len(by_hand(kind, RENDERED[kind][0])) + 4
    fitting, dropped = encoding.encode_all(made, encoders[kind], limit)
    assert ([pair.line for pair in fitting], dropped) == ([1, 4], [2, 3])
    assert [pair.length for pair in fitting] == [limit, limit]
    assert [len(s.ids) for s in encoding.sequences(fitting)] == [limit, limit - 2, limit - 2, limit]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rejected", "finish", "kept"),
    [
        ("cdef", STOP, ("ab", "cd")),  # longer
        ("cdef", LENGTH, ("ab", "cd")),
        ("c", LENGTH, ("ab", "c")),  # no end of turn to learn one from
        ("c", STOP, None),
        ("cd", STOP, None),
    ],
)
def test_a_matched_pair_tells_nothing_by_length(rejected, finish, kept, kind, encoders):
    """Chosen is `ab`. Kept are the texts of both sides without end of turn; None is the whole pair,
    whose rejected answer ends by itself no later.
    """
    pair = encoders[kind].pair(Pair("Why?", "ab", rejected, finish, 7))
    matched = pair.match_lengths()
    assert matched.line == 7
    if kept is None:
        assert matched == pair
    else:
        answers = [list(side.ids[side.prompt_length :]) for side in matched.sides]
        assert answers == [by_hand(kind, text) for text in kept]


def test_only_what_dpo_trains_on_is_matched(job):
    """dpo.match_length: SFT learns to end; what is measured on valid pairs is of whole answers."""
    config, _ = job(dpo={"match_length": True})
    for file, first in ((config.data.train_pairs, 0), (config.data.valid_pairs, 4)):
        long = [
            {"prompt": f"Why {i}?", "chosen": f"Yes{i}", "rejected": f"No, never{i}"}
            for i in range(first, first + 4)
        ]
        jsonl.write(Path(file), long)

    def lengths(encoded: list[encoding.EncodedPair]) -> set[tuple[int, ...]]:
        return {tuple(side.answer_length for side in pair.sides) for pair in encoded}

    found = prepare(config)
    whole = {(len("Yes0") + 1, len("No, never0") + 1)}
    assert lengths(found.pairs["train"]) == lengths(found.dpo_pairs["valid"]) == whole
    assert lengths(found.dpo_pairs["train"]) == {(4, 4)}


def test_digest_tells_ids_and_spans_apart(encoders):
    """The reference's fingerprint changes with a token and with where the answer begins."""
    encoder = encoders["granite"]

    def digest(prompt: str, chosen: str, rejected: str) -> str:
        return encoding.digest([encoder.pair(Pair(prompt, chosen, rejected))])

    assert digest("q", "a", "b") == digest("q", "a", "b")
    moved = encoding.EncodedPair(
        encoding.EncodedAnswer((1, 2, 3), 1), encoding.EncodedAnswer((1, 2, 3), 1), 1
    )
    other = encoding.EncodedPair(
        encoding.EncodedAnswer((1, 2, 3), 2), encoding.EncodedAnswer((1, 2, 3), 1), 1
    )
    distinct = {digest("q", "a", "b"), digest("q", "b", "a"), digest("p", "a", "b")}
    assert len({*distinct, encoding.digest([moved]), encoding.digest([other])}) == 5


def test_file_is_read_and_more_keys_are_ignored(tmp_path):
    """Three keys are enough, rejected_finish is known, others are the user's."""
    path = tmp_path / "p.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "chosen": " c\n", "rejected": "r"},
        {"prompt": "q", "chosen": "c", "rejected": "r", "rejected_finish": "length", "id": [1]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert pairs.read(path) == [Pair("q", " c\n", "r", STOP, 1), Pair("q", "c", "r", LENGTH, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, 'the field "prompt" must be text that is not empty; fill it in'),
        ({"chosen": " \n"}, 'the field "chosen" must be text that is not empty; fill it in'),
        ({"rejected": None}, 'the field "rejected" must be text that is not empty; fill it in'),
        ({"rejected": ["r"]}, 'the field "rejected" must be text that is not empty; fill it in'),
        ({"rejected_finish": "eos"}, '"rejected_finish" must be "stop" or "length"'),
        ({"rejected_finish": None}, '"rejected_finish" must be "stop" or "length"'),
        ({"rejected_finish": ["stop"]}, '"rejected_finish" must be "stop" or "length"'),
    ],
)
def test_row_that_is_no_pair_is_named(change, message, tmp_path):
    """A pair file that was edited is refused by path:line."""
    path, row = tmp_path / "p.jsonl", {"prompt": "q", "chosen": "c", "rejected": "r"}
    path.write_text(json.dumps(row) + "\n\n" + json.dumps({**row, **change}) + "\n")
    with pytest.raises(UserError) as error:
        pairs.read(path)
    assert str(error.value) == f"{path}:3: {message}"
