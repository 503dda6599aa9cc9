"""Stage 06: make pairs. Your answer is chosen; the base model's answer is rejected. Rows of the
source that have a rejected answer of their own keep it.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TypedDict

import numpy as np
from tqdm import tqdm

from ..config import Config, GenerationConfig
from ..data import prompt_date, questions, round_trip, source
from ..data.encoding import MEASURED_ANSWERS, Encoder, max_characters
from ..data.pairs import LENGTH, STOP, Pair
from ..data.questions import Question
from ..files import atomic, fingerprint, jsonl, lock, model_files, ownership, records
from ..files.errors import UserError
from ..files.fingerprint import PAIRS, SAMPLES, Fingerprint
from ..files.ownership import Status
from ..files.results import PERCENTILES, PairsReport, read_pairs_report
from ..files.run_folder import SPLITS, TRAIN, VALID, PairFiles
from ..files.schema import Count
from ..model.sampling import Answer, batches, with_max_tokens
from ..parallel import distributed
from ..parallel.worker import Worker
from ..scoring import memory

# What to do with pairs from elsewhere in the place of ours.
READY_MADE = "move it away; to train on ready-made pairs, set data.source to that file"
# The most characters of a system message to print.
SHOWN = 200


class SampledBatch(TypedDict):
    """A row of the samples file: a batch's number, its questions, and an answer to each."""

    batch: Count
    questions: list[str]
    answers: list[Answer]


def make_pairs(config: Config) -> None:
    """Write the train and valid pairs and their report. Samples only the missing answers.

    Raises UserError for a source or a model that cannot be used, when a split would be empty, and
    when a file to write was edited, is not ours, or comes from other settings.
    """
    files = config.pairs
    data = source.read(Path(config.data.source), config.data.skip_bad_rows)
    rows = data.questions
    current = fingerprint.of(PAIRS, config.flat)
    restart = config.generation.restart
    if not restart and current["model files"] and _is_current(files, current):
        print(f"06: {files.train} and {files.valid} are up to date, skipped")
        return
    for line in (data.description, *data.notes()):
        print(f"06: {line}")
    _refuse_foreign(files, restart)
    loaded, worker = distributed.load(config, train=False)
    if current["model files"] is None:  # the model was downloaded only now
        current["model files"] = model_files.fingerprint(config.model)
    dropped: Counter[str] = Counter({"bad row of data.source": len(data.bad_rows)})
    encoder = Encoder.of(loaded.tokenizer, config)
    usable = usable_rows(rows, config, encoder, dropped)
    notes = template_notes(usable, config, encoder)
    for note in [*notes, *prompt_date.keep(files, encoder.template)]:
        print(f"06: note: {note}")
    generation = generation_settings(rows, config, encoder)
    sampling = fingerprint.of(SAMPLES, replace(config, generation=generation).flat, current)
    unanswered = [row for row in usable if row.rejected is None]
    if unanswered:
        _refuse_other_samples(files, sampling, restart)
        _require_memory(config, worker, encoder, unanswered, generation)
    _print_prompt(encoder, usable, config)
    files.train.parent.mkdir(parents=True, exist_ok=True)
    atomic.require_space(files.train.parent, atomic.SMALL_FILES, "data.train_pairs")
    with lock.hold(files.lock, "data.train_pairs"):
        sampled: list[Answer] = []
        if unanswered:
            finished = _open_samples(files, sampling)
            settings = replace(config, generation=generation)
            sampled = _sample(worker, unanswered, settings, encoder, files, finished)
        else:
            print("06: every row has a rejected answer of its own: nothing to sample")
        answers = _all_answers(usable, sampled)
        usable_answers = _drop_unusable(usable, answers, config, encoder, dropped)
        _write(files, usable_answers, config, encoder, dropped, current)


def template_notes(rows: list[Question], config: Config, encoder: Encoder) -> list[str]:
    """Notes about the chat template and the tokenizer. Raises UserError when the rows do not have
    the token ids that the template writes.
    """
    asked = [Pair(row.question, row.answer, "", line=row.line) for row in rows]
    return round_trip.check(encoder, config.system_prompt, {Path(config.data.source): asked})


def _require_memory(
    config: Config,
    worker: Worker,
    encoder: Encoder,
    rows: list[Question],
    generation: GenerationConfig,
) -> None:
    sequences = [encoder.encode(row.question, row.answer) for row in rows]
    lengths = memory.LargestSizes(
        questions=len(rows),
        prompt=max(sequence.prompt_length for sequence in sequences),
        answer=generation.max_tokens or 0,
        longest=max(sequences, key=lambda sequence: len(sequence.ids)),
    )
    needs = memory.stage_06(worker.model, config, lengths, worker.local_processes)
    need = memory.require(needs, config.model)
    print(f"06: {memory.describe(need)}")


def _is_current(files: PairFiles, current: Fingerprint) -> bool:
    report = read_pairs_report(files)
    return (
        report is not None
        and not fingerprint.differences(report["inputs"], current)
        and files.train.exists()
        and files.valid.exists()
    )


def _refuse_foreign(files: PairFiles, restart: bool) -> None:
    """Raises UserError for files that are not ours or were edited.

    With `restart`, edited pairs pass: `_write` sets them aside.
    """
    for path in files.all:
        is_edited = path in files.splits.values() and ownership.status(path) is Status.CHANGED
        if is_edited and not restart:
            ownership.require(
                path,
                "move it away, or --set generation.restart=true to rename it to NAME.old-1 and "
                "write the pairs again",
            )
        elif not is_edited:
            ownership.require(path, READY_MADE if path in files.splits.values() else "move it away")


def _refuse_other_samples(files: PairFiles, sampling: Fingerprint, restart: bool) -> None:
    """Raises UserError for answers sampled with other settings, unless `restart` discards them."""
    if restart:
        return
    old = fingerprint.read(files.samples_stamp)
    if old is None:
        if files.samples.exists() and files.samples.stat().st_size:
            raise UserError(
                f"{files.samples_stamp}: no such file, so the settings behind {files.samples} are "
                "unknown; move that file away, or --set generation.restart=true to sample again"
            )
        return
    if changes := fingerprint.differences(old, sampling):
        raise UserError(
            f"{files.samples}: was sampled with other settings ({'; '.join(changes)}); set them "
            "back, choose other pair files, or --set generation.restart=true to sample again"
        )


def generation_settings(rows: list[Question], config: Config, encoder: Encoder) -> GenerationConfig:
    """The generation section with `max_tokens` set.

    A default comes from the first rows that fit, whatever data.limit is: raising data.limit must
    not change it and sample every answer again.
    """
    if config.generation.max_tokens is not None:
        return config.generation
    fitting = (row for row in _short(rows, config, encoder) if _fits(encoder, row, config))
    counted = islice(fitting, MEASURED_ANSWERS)
    return with_max_tokens(
        config.generation, [len(encoder.answer_ids(row.answer)) for row in counted]
    )


def usable_rows(
    rows: list[Question], config: Config, encoder: Encoder, dropped: Counter[str]
) -> list[Question]:
    """The rows to sample for: without copies, at most `data.limit`, and not too long.

    Counts the other rows in `dropped`. Raises UserError when no row is left.
    """
    if others := [row.system for row in rows if row.system not in ("", config.system_prompt)]:
        is_one = len(set(others)) == 1
        print(
            f"06: {len(others)} rows have a system message of their own; only system_prompt of the "
            f"config is used{'; set it to that message, the same in all of them' if is_one else ''}"
        )
    by_text: dict[tuple[str, ...], Question] = {}
    for row in rows:
        texts = (row.question, row.answer, row.rejected or "")
        by_text.setdefault(tuple(map(questions.normalise, texts)), row)
    unique = list(by_text.values())
    dropped["copy of another row"] = len(rows) - len(unique)
    first_rows = unique[: config.data.limit]
    dropped["beyond data.limit"] = len(unique) - len(first_rows)
    fitting = [row for row in _short(first_rows, config, encoder) if _fits(encoder, row, config)]
    dropped["chosen longer than data.max_length"] = len(first_rows) - len(fitting)
    if not fitting:
        raise UserError(
            f"{config.data.source}: no question and answer fits in data.max_length = "
            f"{config.data.max_length} tokens; raise it"
        )
    return fitting


def _short(rows: list[Question], config: Config, encoder: Encoder) -> list[Question]:
    """The rows that are not too long by their characters: tokenising 10 MB takes a minute."""
    most = max_characters(encoder, config.data.max_length)
    return [row for row in rows if len(row.question) + len(row.answer) <= most]


def _fits(encoder: Encoder, row: Question, config: Config) -> bool:
    return len(encoder.encode(row.question, row.answer).ids) <= config.data.max_length


def _print_prompt(encoder: Encoder, rows: list[Question], config: Config) -> None:
    """Print the first prompt: the model learns the voice under this system message."""
    print(f"06: {_system_line(encoder.template.system_message(), config.system_prompt)}")
    print("06: the prompt of the first question, as the model sees it:")
    for line in encoder.render(rows[0].question).splitlines():
        print(f"    {line}")


def _system_line(message: str | None, system_prompt: str) -> str:
    """One line about the system message of the prompts, cut to SHOWN characters."""
    if message is None and system_prompt:
        return "no system message: the model's chat template drops system_prompt"
    if message is None:
        return "no system message (the model has no default; system_prompt is empty)"
    words = " ".join(message.split())
    start = words if len(words) <= SHOWN else f"{words[:SHOWN]} ..."
    origin = "system_prompt" if system_prompt else "the model's own default; system_prompt is empty"
    return f'system message: "{start}" ({origin})'


def _open_samples(files: PairFiles, sampling: Fingerprint) -> dict[int, SampledBatch]:
    """The finished batches, by number. Starts an empty file for new settings.

    Raises UserError for a row that is damaged.
    """
    if not fingerprint.is_current(files.samples_stamp, sampling, [files.samples]):
        jsonl.write(files.samples, [])
        fingerprint.write(files.samples_stamp, sampling)
    rows: list[SampledBatch] = records.read_rows(files.samples, SampledBatch)
    for number, row in enumerate(rows, start=1):
        if len(row["answers"]) != len(row["questions"]):
            raise UserError(
                f"{files.samples}:{number}: {len(row['answers'])} answers to "
                f"{len(row['questions'])} questions; {records.RUN_AGAIN}"
            )
    return {row["batch"]: row for row in rows}


def _sample(
    worker: Worker,
    rows: list[Question],
    config: Config,
    encoder: Encoder,
    files: PairFiles,
    finished: dict[int, SampledBatch],
) -> list[Answer]:
    """One answer for each row. A batch with the same questions as before comes from `finished`."""
    size = config.generation.batch_size
    prompts = batches([encoder.prompt_ids(row.question) for row in rows], size, config.seed)
    texts = [[row.question for row in rows[i : i + size]] for i in range(0, len(rows), size)]
    answers = {
        number: finished[number]["answers"]
        for number, batch_questions in enumerate(texts)
        if number in finished and finished[number]["questions"] == batch_questions
    }
    missing = [number for number in range(len(prompts)) if number not in answers]
    count = sum(map(len, answers.values()))
    resumed = f"; {count} were sampled before" if count else ""
    print(f"06: sampling {len(rows) - count} answers{resumed}")
    with (
        ownership.growing(files.samples),
        tqdm(total=len(rows), initial=count, desc="06 sample", unit="answer") as bar,
    ):
        started = time.perf_counter()
        for start in range(0, len(missing), worker.size):
            numbers = missing[start : start + worker.size]
            new_answers = worker.answers(
                [prompts[n] for n in numbers], config.generation, without_adapters=True
            )
            for number, batch_answers in zip(numbers, new_answers, strict=True):
                _append(files.samples, number, texts[number], batch_answers)
                answers[number] = batch_answers
            bar.update(sum(map(len, new_answers)))
            if start == 0 and (left := len(rows) - bar.n):
                seconds = (time.perf_counter() - started) / sum(map(len, new_answers))
                minutes = seconds * left / 60
                bar.write(f"06: {seconds:.1f} s per answer, about {minutes:.1f} minutes to go")
    return [answer for number in range(len(prompts)) for answer in answers[number]]


def _all_answers(rows: list[Question], sampled: list[Answer]) -> list[Answer]:
    """The rejected answer of each row: its own, or the next sampled one."""
    rest = iter(sampled)
    return [
        next(rest) if row.rejected is None else Answer(row.rejected, row.rejected_finish, 0)
        for row in rows
    ]


def _append(path: Path, number: int, batch_questions: list[str], answers: list[Answer]) -> None:
    """Add a finished batch to the samples file."""
    row = {
        "batch": number,
        "questions": batch_questions,
        "answers": [asdict(answer) for answer in answers],
    }
    jsonl.append(path, [row])


def _drop_unusable(
    rows: list[Question],
    answers: list[Answer],
    config: Config,
    encoder: Encoder,
    dropped: Counter[str],
) -> list[tuple[Question, Answer]]:
    """The rows with a usable rejected answer. Counts the others in `dropped`."""
    most = max_characters(encoder, config.data.max_length)
    usable = []
    for row, answer in zip(rows, answers, strict=True):
        characters = len(row.question) + len(answer.text)
        if not answer.text:
            dropped["rejected is empty"] += 1
        elif answer.text == row.answer:
            dropped["rejected equals chosen"] += 1
        elif characters > most or not _fits(encoder, replace(row, answer=answer.text), config):
            dropped["rejected longer than data.max_length"] += 1
        else:
            usable.append((row, answer))
    return usable


def _write(
    files: PairFiles,
    answered: list[tuple[Question, Answer]],
    config: Config,
    encoder: Encoder,
    dropped: Counter[str],
    current: Fingerprint,
) -> None:
    """Split the pairs into train and valid, and write them and their report.

    Raises UserError when a split would be empty.
    """
    splits = _split(answered, config.data.valid_fraction)
    reasons = dict(+dropped)
    _require_pairs(files, splits, reasons)
    for split, path in files.splits.items():
        if ownership.status(path) is Status.CHANGED:
            print(f"06: you edited {path}; your version is now {ownership.set_aside(path)}")
        jsonl.write(path, [_row(pair) for pair in splits[split]])
    pairs = splits[TRAIN] + splits[VALID]
    report: PairsReport = {
        "train": len(splits[TRAIN]),
        "valid": len(splits[VALID]),
        "dropped": reasons,
        "rejected_finish": dict(Counter(pair.rejected_finish for pair in pairs)),
        "tokens": {
            "percentiles": list(PERCENTILES),
            "chosen": _percentiles([encoder.answer_ids(pair.chosen) for pair in pairs]),
            "rejected": _percentiles(
                [encoder.answer_ids(pair.rejected, pair.rejected_finish) for pair in pairs]
            ),
        },
        "inputs": current,
    }
    jsonl.write_json(files.report, report)
    _print(report, files)


def _split(answered: list[tuple[Question, Answer]], valid_fraction: float) -> dict[str, list[Pair]]:
    """The pairs by split. A question's text alone decides its split."""
    splits: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for row, answer in answered:
        pair = Pair(row.question, row.answer, answer.text, answer.finish)
        splits[VALID if questions.is_held_out(row.question, valid_fraction) else TRAIN].append(pair)
    return splits


def _require_pairs(
    files: PairFiles, splits: dict[str, list[Pair]], reasons: dict[str, int]
) -> None:
    """Raises UserError when a split has no pair."""
    for split, path in files.splits.items():
        if not splits[split]:
            count = sum(map(len, splits.values()))
            losses = "".join(f"; {number} dropped: {reason}" for reason, number in reasons.items())
            raise UserError(
                f"{path}: no pair is left for this file ({count} in all{losses}); raise "
                "data.limit or data.max_length, or change data.valid_fraction"
            )


def _row(pair: Pair) -> dict[str, str]:
    row = asdict(pair)
    del row["line"]
    return row


def _percentiles(answers: list[list[int]]) -> list[int]:
    return np.percentile([len(ids) for ids in answers], PERCENTILES).astype(int).tolist()


def _print(report: PairsReport, files: PairFiles) -> None:
    print(
        f"06: {report['train']} train pairs in {files.train}, {report['valid']} valid pairs in "
        f"{files.valid}"
    )
    for reason, count in report["dropped"].items():
        print(f"    dropped {count}: {reason}")
    finish = report["rejected_finish"]
    print(
        f"    rejected answers: {finish.get(STOP, 0)} ended by themselves, {finish.get(LENGTH, 0)} "
        "were cut off at generation.max_tokens"
    )
    tokens = report["tokens"]
    for side, values in (("your", tokens["chosen"]), ("rejected", tokens["rejected"])):
        lengths = zip(PERCENTILES, values, strict=True)
        print(f"    {side} answers, tokens: " + "  ".join(f"p{p} {n}" for p, n in lengths))
