"""Stage 06 on a tiny model: which pairs it writes, which it drops, and that it never loses or
repeats work.
"""

from __future__ import annotations

import copy
import json
import signal
import unicodedata
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from dpo_mlx import config
from dpo_mlx.files import atomic, jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.ownership import MANIFEST
from dpo_mlx.model.sampling import Answer
from dpo_mlx.parallel import worker
from dpo_mlx.process.signals import Interrupted
from dpo_mlx.stages import make_pairs

Settings = dict[str, Any]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every batch that goes through the model, in order."""
    batches: list[int] = []
    original = worker.sample_batch

    def counted(model: Any, tokenizer: Any, batch: Any, settings: Any) -> Any:
        batches.append(len(batch.prompts))
        return original(model, tokenizer, batch, settings)

    monkeypatch.setattr(worker, "sample_batch", counted)
    return batches


def elsewhere(settings: Settings, name: str) -> Settings:
    """The same settings with another run folder."""
    other = copy.deepcopy(settings)
    run = Path(settings["run_dir"]).with_name(name)
    other["run_dir"] = str(run)
    for split in ("train", "valid"):
        other["data"][f"{split}_pairs"] = str(run / f"pairs/{split}.jsonl")
    return other


def make(settings: Settings, *overrides: str) -> Path:
    """Run stage 06 with these settings. Returns the folder of the pairs."""
    path = Path(settings["run_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    make_pairs.make_pairs(config.load(path, list(overrides)))
    return Path(settings["data"]["train_pairs"]).parent


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file except the manifest, which also lists earlier contents."""
    files = (path for path in sorted(folder.iterdir()) if path.name != MANIFEST)
    return {path.name: path.read_bytes() for path in files}


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    return [row for _, row in jsonl.read(folder / f"{split}.jsonl", "")]


def report(folder: Path) -> dict[str, Any]:
    return jsonl.read_json(folder / "train.report.json")


def test_pairs_hold_the_answers_as_written(settings, questions):
    """Every question is in one file, on its side, in order, with its answer verbatim."""
    questions[3]["answer"] = "  **Two** lines:\n\n    indented  \n"
    Path(settings["data"]["source"]).write_text("".join(json.dumps(q) + "\n" for q in questions))
    folder = make(settings)
    expected: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for q in questions:
        held_out = make_pairs.questions.is_held_out(q["question"], 0.25)
        expected[held_out].append((q["question"], q["answer"].strip()))
    for split, held_out in (("train", False), ("valid", True)):
        made = rows(folder, split)
        assert [(row["prompt"], row["chosen"]) for row in made] == expected[held_out]
        for row in made:
            assert list(row) == ["prompt", "chosen", "rejected", "rejected_finish"]
            assert row["rejected"].strip() == row["rejected"] != ""
            assert row["rejected_finish"] in ("stop", "length")
    found = report(folder)
    assert (found["train"], found["valid"]) == tuple(len(expected[side]) for side in (False, True))
    assert found["dropped"] == {}


def test_second_call_is_skipped(settings, sampled, capsys):
    """A second call with nothing changed says so, loads no model and touches no byte."""
    before = contents(make(settings))
    assert "up to date" not in capsys.readouterr().out
    sampled.clear()
    assert contents(make(settings)) == before
    assert "up to date, skipped" in capsys.readouterr().out
    assert sampled == []


def test_same_seed_same_pairs(settings):
    """Two folders, one seed: the same bytes. Another seed: other answers."""
    first, second = (make(elsewhere(settings, name)) for name in ("one", "two"))
    third = make(elsewhere(settings, "three"), "seed=1")
    for name in ("train.jsonl", "valid.jsonl", "train.samples.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).read_bytes() != (third / name).read_bytes()


def tear_next_append(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a kill in the middle of appending a row."""

    def half(path: Path, content: bytes) -> None:
        with path.open("ab") as file:
            file.write(content[: len(content) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "append", half)
        jsonl.append(path, [{"batch": 1, "questions": ["Why?"] * 8, "answers": []}])


@pytest.mark.parametrize("torn", [False, True])
def test_interrupted_run_goes_on(torn, settings, sampled, monkeypatch):
    """A run stopped in its second batch keeps the first, and ends like a run that was never
    stopped.
    """
    undisturbed = contents(make(elsewhere(settings, "undisturbed")))
    sampled.clear()
    counted = worker.sample_batch

    def stopped(*arguments: Any) -> list[Answer]:
        if len(sampled) == 1:
            raise KeyboardInterrupt
        return counted(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(worker, "sample_batch", stopped)
        make(settings)
    folder = Path(settings["data"]["train_pairs"]).parent
    assert not (folder / "train.jsonl").exists()
    if torn:
        tear_next_append(folder / "train.samples.jsonl", monkeypatch)
    make(settings)
    assert contents(folder) == undisturbed
    assert sampled == [8, 8, 8, 6]  # of which the first before the stop


def test_larger_limit_keeps_what_there_is(settings, sampled):
    """From 16 to 30 questions: every pair stays in its split, and two batches are not sampled
    again.
    """
    folder = make(settings, "data.limit=16")
    before = {split: rows(folder, split) for split in ("train", "valid")}
    assert report(folder)["dropped"] == {"beyond data.limit": 14}
    make(settings, "data.limit=30")
    assert sampled == [8, 8, 8, 6]
    for split, old in before.items():
        assert rows(folder, split)[: len(old)] == old
    assert len(rows(folder, "train") + rows(folder, "valid")) == 30


def test_smaller_limit_samples_nothing(settings, sampled):
    """Back from 30 to 16 questions: all answers are sampled already."""
    folder = make(settings)
    sampled.clear()
    make(settings, "data.limit=16")
    assert sampled == []
    assert len(rows(folder, "train") + rows(folder, "valid")) == 16


def test_copies_are_dropped_where_they_come_again(settings, questions, sampled):
    """The first of two equal rows counts, so a growing source moves no earlier question."""
    folder = make(settings, "data.limit=16")
    before = contents(folder)
    source = Path(settings["data"]["source"])
    source.write_text("".join(json.dumps(q) + "\n" for q in [*questions, questions[0]]))
    sampled.clear()
    make(settings, "data.limit=16")
    assert sampled == []
    for name in ("train.jsonl", "valid.jsonl"):
        assert (folder / name).read_bytes() == before[name]
    assert report(folder)["dropped"] == {"copy of another row": 1, "beyond data.limit": 14}


def test_changed_question_is_asked_anew(settings, questions, sampled):
    """A changed question gets a new answer. Other batches keep theirs."""
    folder = make(settings)
    before = {row["prompt"]: row for split in ("train", "valid") for row in rows(folder, split)}
    questions[9]["question"] = "Why is this one new?"
    Path(settings["data"]["source"]).write_text("".join(json.dumps(q) + "\n" for q in questions))
    sampled.clear()
    make(settings)
    assert sampled == [8]
    made = rows(folder, "train") + rows(folder, "valid")
    others = {q["question"] for q in [*questions[:8], *questions[16:]]}
    assert [row for row in made if row["prompt"] in others and row != before[row["prompt"]]] == []
    assert "Why is this one new?" in {row["prompt"] for row in made}


def test_edited_pairs_are_not_overwritten(settings, sampled):
    """An edited file survives a skip and a change of settings; restart=true sets it aside."""
    folder = make(settings, "data.limit=16")
    original = contents(folder)
    path = folder / "valid.jsonl"
    path.write_text(path.read_text().replace("**", "__"))
    edited = contents(folder)
    make(settings, "data.limit=16")
    with pytest.raises(UserError, match=f"{path}: has changed since.*generation.restart=true"):
        make(settings, "data.limit=30")
    assert contents(folder) == edited
    sampled.clear()
    make(settings, "data.limit=16", "generation.restart=true")
    assert sampled == [], "the samples are of these settings"
    aside = folder / "valid.jsonl.old-1"
    assert aside.read_bytes() == edited["valid.jsonl"]
    aside.unlink()
    assert contents(folder) == original


def test_foreign_pairs_are_not_overwritten(settings):
    """A file of that name that stage 06 did not write belongs to the user."""
    path = Path(settings["data"]["train_pairs"])
    path.parent.mkdir(parents=True)
    path.write_text("mine\n")
    with pytest.raises(
        UserError, match=f"{path}: was not made by this pipeline.*set data.source to that file"
    ):
        make(settings)
    assert contents(path.parent) == {"train.jsonl": b"mine\n"}


def test_pair_files_may_share_a_name(settings):
    """train/pairs.jsonl and valid/pairs.jsonl are two files, and each is known as ours."""
    for split in ("train", "valid"):
        settings["data"][f"{split}_pairs"] = str(Path(settings["run_dir"], split, "pairs.jsonl"))
    make(settings, "data.limit=16")
    make(settings, "data.limit=30")


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("generation.temperature=0.5", "generation.temperature: 0.7 -> 0.5"),
        ("generation.max_tokens=12", "generation.max_tokens: 24 -> 12"),
        ("generation.batch_size=4", "generation.batch_size: 8 -> 4"),
        ("seed=1", "seed: 0 -> 1"),
        ("system_prompt=Be brief.", "system_prompt:  -> Be brief."),
    ],
)
def test_changed_settings_are_refused(override, changed, settings):
    """Answers of two settings are never mixed. The error names the change and touches nothing."""
    folder = make(settings, "data.limit=16")
    before = contents(folder)
    with pytest.raises(UserError) as error:
        make(settings, "data.limit=16", override)
    assert f"({changed})" in str(error.value)
    assert "generation.restart=true" in str(error.value)
    assert contents(folder) == before
    make(settings, "data.limit=16", override, "generation.restart=true")
    assert contents(folder) != before


def test_unusable_answers_are_dropped_and_counted(settings, questions, monkeypatch):
    """An empty answer, one equal to the chosen one, and one too long: three counts, three rows
    fewer.
    """
    made = [Answer(f"no {i}", "stop", 4) for i in range(30)]
    made[0] = Answer("", "stop", 0)
    made[1] = Answer(questions[1]["answer"], "stop", 9)
    made[2] = Answer("x" * 300, "length", 300)
    monkeypatch.setattr(make_pairs, "_sample", lambda *_: made)
    folder = make(settings)
    assert report(folder)["dropped"] == {
        "rejected is empty": 1,
        "rejected equals chosen": 1,
        "rejected longer than data.max_length": 1,
    }
    prompts = {row["prompt"] for split in ("train", "valid") for row in rows(folder, split)}
    assert prompts == {q["question"] for q in questions[3:]}


def test_too_long_chosen_is_dropped_before_sampling(settings, questions, sampled):
    """No side is ever cut: a question with too long an answer is counted and not sampled."""
    questions[5]["answer"] = "x" * 300
    Path(settings["data"]["source"]).write_text("".join(json.dumps(q) + "\n" for q in questions))
    folder = make(settings)
    assert report(folder)["dropped"] == {"chosen longer than data.max_length": 1}
    assert sum(sampled) == 29
    both = rows(folder, "train") + rows(folder, "valid")
    assert questions[5]["question"] not in {row["prompt"] for row in both}


def test_answers_that_do_not_fit_set_no_limit(settings, questions, sampled, monkeypatch):
    """`max_tokens: null` uses the lengths of all answers that can be trained on, so a higher
    data.limit samples nothing again.
    """
    settings["generation"]["max_tokens"] = None
    lengths: list[list[int]] = []
    original = make_pairs.with_max_tokens

    def looked_at(generation: Any, chosen: list[int]) -> Any:
        lengths.append(chosen)
        return original(generation, chosen)

    monkeypatch.setattr(make_pairs, "with_max_tokens", looked_at)
    for question in questions[:10]:
        question["answer"] = "x" * 300
    Path(settings["data"]["source"]).write_text("".join(json.dumps(q) + "\n" for q in questions))
    make(settings, "data.limit=26")
    assert lengths == [[len(q["answer"]) + 1 for q in questions[10:]]]
    make(settings, "data.limit=null")
    assert sum(sampled) == 20


def test_a_restart_that_was_stopped_goes_on(settings, sampled, monkeypatch):
    """Batches that `generation.restart` has sampled already are not sampled again."""
    make(settings, "data.limit=16")
    again = ["data.limit=16", "seed=1", "generation.restart=true"]
    sampled.clear()
    append = jsonl.append

    def stop_after(path: Path, rows: Any) -> None:
        append(path, rows)
        raise Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "append", stop_after)
        with pytest.raises(Interrupted):
            make(settings, *again)
    make(settings, *again)
    assert sampled == [8, 8]


def test_percentiles_by_hand(settings, questions, monkeypatch):
    """Lengths in the report are in tokens, here bytes, and include the end of turn."""
    monkeypatch.setattr(
        make_pairs, "_sample", lambda *_: [Answer("x" * (i + 1), "stop", i) for i in range(30)]
    )
    tokens = report(make(settings))["tokens"]
    assert tokens["percentiles"] == [5, 25, 50, 75, 95, 100]
    assert tokens["rejected"] == [3, 9, 16, 23, 29, 31]  # 2 + 29 p/100, cut
    assert tokens["chosen"][-1] == max(len(q["answer"]) for q in questions) + 1


@pytest.mark.parametrize(("fraction", "split"), [("0", "valid"), ("0.9", "train")])
def test_empty_split_is_refused(fraction, split, settings, questions, monkeypatch):
    """An empty split is an error before any file is written."""
    held = [q for q in questions if make_pairs.questions.is_held_out(q["question"], 0.9)]
    kept = questions if split == "valid" else held
    Path(settings["data"]["source"]).write_text("".join(json.dumps(q) + "\n" for q in kept))
    monkeypatch.setattr(make_pairs, "_sample", lambda *_: [Answer("no", "stop", 2)] * len(kept))
    why = rf"{split}.jsonl: no pair is left for this file \({len(kept)} in all\); raise data.limit"
    with pytest.raises(UserError, match=why):
        make(settings, f"data.valid_fraction={fraction}")
    folder = Path(settings["data"]["train_pairs"]).parent
    assert not (folder / "train.jsonl").exists()


def test_when_no_answer_can_be_used_it_says_why(settings, monkeypatch):
    """If the base model says nothing, the error says so, not only that no pair is left."""
    monkeypatch.setattr(make_pairs, "_sample", lambda *_: [Answer("", "stop", 0)] * 30)
    with pytest.raises(UserError, match=r"\(0 in all; 30 dropped: rejected is empty\)"):
        make(settings)


def test_it_says_how_much_and_how_long(settings, capfd):
    """It prints the number of answers before sampling, and the time left after the first batch."""
    make(settings, "data.limit=16")
    out = capfd.readouterr().out
    assert "06: sampling 16 answers\n" in out
    assert "minutes to go" in out
    assert "<|start_of_role|>user<|end_of_role|>Why is number 0 odd?<|end_of_text|>" in out


def write_source(settings: Settings, source: list[dict[str, Any]]) -> None:
    Path(settings["data"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in source))


def with_rejected(questions: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The questions as preference pairs."""
    return [
        {"prompt": q["question"], "chosen": q["answer"], "rejected": f"No {i}."}
        for i, q in enumerate(questions)
    ]


def test_ready_made_pairs_are_split_and_nothing_is_sampled(settings, questions, sampled, capsys):
    """Preference pairs as the source: stage 06 checks, splits and reports them as they are."""
    pairs = with_rejected(questions)
    pairs[0]["rejected"] = pairs[0]["chosen"]
    pairs[1]["rejected"] = "x" * 300
    pairs[2]["rejected_finish"] = "length"
    write_source(settings, pairs)
    folder = make(settings)
    assert sampled == []
    out = capsys.readouterr().out
    assert "read as JSON lines; rows: 30 with prompt, chosen and rejected" in out
    assert "every row has a rejected answer of its own: nothing to sample" in out
    both = rows(folder, "train") + rows(folder, "valid")
    written = {row["prompt"]: (row["chosen"], row["rejected"]) for row in both}
    assert written == {p["prompt"]: (p["chosen"], p["rejected"]) for p in pairs[2:]}
    for row in rows(folder, "valid"):
        assert make_pairs.questions.is_held_out(row["prompt"], 0.25)
    assert report(folder)["dropped"] == {
        "rejected equals chosen": 1,
        "rejected longer than data.max_length": 1,
    }
    assert report(folder)["rejected_finish"] == {"stop": 27, "length": 1}
    before = contents(folder)
    make(settings)
    assert "up to date, skipped" in capsys.readouterr().out
    assert contents(folder) == before
    make(settings, "generation.temperature=0.5")
    assert sampled == []


def test_rows_without_a_rejected_answer_get_one(settings, questions, sampled):
    """A source that mixes pairs with questions: only the questions are sampled."""
    pairs = with_rejected(questions[:20])
    write_source(settings, [*questions[20:25], *pairs, *questions[25:]])
    folder = make(settings)
    assert sampled == [8, 2]
    rejected = {
        row["prompt"]: row["rejected"]
        for split in ("train", "valid")
        for row in rows(folder, split)
    }
    assert rejected.keys() == {q["question"] for q in questions}
    assert [rejected[p["prompt"]] for p in pairs] == [p["rejected"] for p in pairs]


def test_bad_rows_are_skipped_when_asked(settings, questions, capsys):
    """All are named; with data.skip_bad_rows they are counted, and the rest is used."""
    write_source(settings, [{"question": "q"}, *questions, {"answer": "a"}])
    with pytest.raises(UserError, match=r":1: .*\n.*:32: .*\n.*: 2 bad rows: 1 x .*; 1 x "):
        make(settings)
    folder = make(settings, "data.skip_bad_rows=true")
    assert report(folder)["dropped"] == {"bad row of data.source": 2}
    assert len(rows(folder, "train") + rows(folder, "valid")) == 30
    assert ':32: the field "question" is missing' in capsys.readouterr().out


def test_a_copy_in_another_unicode_form_is_a_copy(settings, questions):
    """The same question and answer, once with accents of their own: the first is used as it is."""
    questions[0] |= {"question": "O\u00f9 ?", "answer": "**L\u00e0.** So go."}
    copies = [
        {key: form(text) for key, text in questions[0].items()}
        for form in (partial(unicodedata.normalize, "NFD"), lambda text: f"\ufeff{text}")
    ]
    write_source(settings, [*questions, *copies])
    folder = make(settings)
    assert report(folder)["dropped"] == {"copy of another row": 2}
    both = rows(folder, "train") + rows(folder, "valid")
    assert questions[0]["question"] in {row["prompt"] for row in both}


def test_a_folder_of_texts_is_a_source(settings, questions, tmp_path, sampled):
    """A file more is sampled for, and the others are not sampled again."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, q in enumerate(questions[:29]):
        (texts / f"{i:02}.md").write_text(f"# {q['question']}\n\n{q['answer']}\n")
    settings["data"]["source"] = f"{texts}/"
    folder = make(settings, "data.limit=24")
    (texts / "29.md").write_text(f"# {questions[29]['question']}\n\n{questions[29]['answer']}\n")
    sampled.clear()
    make(settings, "data.limit=null")
    assert sampled == [6]
    both = rows(folder, "train") + rows(folder, "valid")
    assert {(r["prompt"], r["chosen"]) for r in both} == {
        (q["question"], q["answer"]) for q in questions
    }
