"""Stage 06: questions in, pairs out; the rejected answer is what the base model says itself."""

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
from ..data import questions
from ..data.encoding import MEASURED_ANSWERS, Encoder, max_characters
from ..data.pairs import Pair
from ..data.questions import Question
from ..files import atomic, fingerprint, jsonl, lock, model_files, ownership, records
from ..files.errors import UserError
from ..files.fingerprint import PAIRS, SAMPLES, Fingerprint
from ..files.ownership import Status
from ..files.results import PERCENTILES, PairsReport, read_pairs_report
from ..files.run_folder import SPLITS, PairFiles
from ..files.schema import Count
from ..model import device
from ..model.sampling import Answer, batches, limited
from ..parallel import distributed
from ..parallel.worker import Worker
from ..scoring import memory

# Characters of a system message to print before cutting it.
SHOWN = 200


class SampledBatch(TypedDict):
    """A row of the sampled answers: a batch's number, its questions, an answer to each."""

    batch: Count
    questions: list[str]
    answers: list[Answer]


def make_pairs(config: Config) -> None:
    """Write the train and valid pairs and their report, sampling what is not there yet.

    Raises UserError for a source or a model that cannot be used, when nothing is left to train
    or to validate on, and rather than overwrite what other settings, or the user, made.
    """
    files = config.pairs
    rows = questions.read(Path(config.data.source))
    current = fingerprint.of(PAIRS, config)
    restart = config.generation.restart
    if not restart and current["model files"] and _is_current(files, current):
        print(f"06: {files.train} and {files.valid} are up to date, skipped")
        return
    _refuse_foreign(files, restart)
    loaded, worker = distributed.load(config, train=False)
    if current["model files"] is None:  # the model was downloaded only now
        current["model files"] = model_files.fingerprint(config.model)
    dropped: Counter[str] = Counter()
    encoder = Encoder.of(loaded.tokenizer, config)
    usable = usable_rows(rows, config, encoder, dropped)
    generation = generation_settings(rows, config, encoder)
    sampling = fingerprint.of(SAMPLES, replace(config, generation=generation), current)
    _refuse_other_samples(files, sampling, restart)
    _require_memory(config, worker, encoder, usable, generation)
    _print_prompt(encoder, usable, config)
    files.train.parent.mkdir(parents=True, exist_ok=True)
    atomic.require_space(files.train.parent, atomic.SMALL_FILES, "data.train_pairs")
    with lock.hold(files.lock, "data.train_pairs"):
        known = _open_samples(files, sampling)
        settings = replace(config, generation=generation)
        answers = _sample(worker, usable, settings, encoder, files, known)
        made = _join(usable, answers, config, encoder, dropped)
        _write(files, made, config, encoder, dropped, current)


def _require_memory(
    config: Config,
    worker: Worker,
    encoder: Encoder,
    rows: list[Question],
    generation: GenerationConfig,
) -> None:
    sequences = [encoder.sequence(row.question, row.answer) for row in rows]
    lengths = memory.Lengths(
        questions=len(rows),
        prompt=max(sequence.prompt_length for sequence in sequences),
        answer=generation.max_tokens or 0,
        longest=max(sequences, key=lambda sequence: len(sequence.ids)),
    )
    needs = memory.stage_06(worker.model, config, lengths, worker.local_processes)
    need = memory.require(needs, config.model)
    print(f"06: peak memory {need}; {device.available() / 1e9:.2f} GB available")


def _is_current(files: PairFiles, current: Fingerprint) -> bool:
    report = read_pairs_report(files)
    return (
        report is not None
        and not fingerprint.differences(report["inputs"], current)
        and files.train.exists()
        and files.valid.exists()
    )


def _refuse_foreign(files: PairFiles, restart: bool) -> None:
    """Raises UserError for files that were not made here, or were changed since; `restart` lets
    edited pairs pass, which are set aside later.
    """
    for path in files.all:
        is_edited = path in files.splits.values() and ownership.status(path) is Status.CHANGED
        if is_edited and not restart:
            ownership.require(
                path,
                "move it away (sampled answers are kept), or --set generation.restart=true, which "
                "sets edited pairs aside and samples anew",
            )
        elif not is_edited:
            ownership.require(path, "move it away")


def _refuse_other_samples(files: PairFiles, sampling: Fingerprint, restart: bool) -> None:
    """Raises UserError for samples of other settings, unless they are to be thrown away."""
    if restart:
        return
    old = fingerprint.read(files.samples_stamp)
    if old is None:
        if files.samples.exists() and files.samples.stat().st_size:
            raise UserError(
                f"{files.samples_stamp}: no such file, so the settings behind {files.samples} are "
                "unknown; move that away, or --set generation.restart=true to sample anew"
            )
        return
    if changed := fingerprint.differences(old, sampling):
        raise UserError(
            f"{files.samples}: was sampled with other settings ({'; '.join(changed)}); set them "
            "back, name other files in data, or --set generation.restart=true to sample anew"
        )


def generation_settings(rows: list[Question], config: Config, encoder: Encoder) -> GenerationConfig:
    """How answers are sampled. `max_tokens` comes from the first rows of all that fit, so that
    raising data.limit does not sample any answer again.
    """
    if config.generation.max_tokens is not None:
        return config.generation
    fitting = (row for row in _short(rows, config, encoder) if _fits(encoder, row, config))
    counted = islice(fitting, MEASURED_ANSWERS)
    return limited(config.generation, [len(encoder.answer(row.answer)) for row in counted])


def usable_rows(
    rows: list[Question], config: Config, encoder: Encoder, dropped: Counter[str]
) -> list[Question]:
    """The questions to sample for: the first `data.limit` that fit and are not duplicates."""
    if others := sum(1 for row in rows if row.system not in ("", config.system_prompt)):
        print(f"06: {others} rows carry another system message than system_prompt; it is not used")
    first: dict[tuple[str, str], Question] = {}
    for row in rows:
        first.setdefault((row.question, row.answer), row)
    unique = list(first.values())
    dropped["copy of another row"] = len(rows) - len(unique)
    limited = unique[: config.data.limit]
    dropped["beyond data.limit"] = len(unique) - len(limited)
    fitting = [row for row in _short(limited, config, encoder) if _fits(encoder, row, config)]
    dropped["chosen longer than data.max_length"] = len(limited) - len(fitting)
    if not fitting:
        raise UserError(
            f"{config.data.source}: no question and answer fits in data.max_length = "
            f"{config.data.max_length} tokens; raise it"
        )
    return fitting


def _short(rows: list[Question], config: Config, encoder: Encoder) -> list[Question]:
    """Rows that are not too long by their characters alone: to tokenise 10 MB takes a minute."""
    most = max_characters(encoder, config.data.max_length)
    return [row for row in rows if len(row.question) + len(row.answer) <= most]


def _fits(encoder: Encoder, row: Question, config: Config) -> bool:
    return len(encoder.sequence(row.question, row.answer).ids) <= config.data.max_length


def _print_prompt(encoder: Encoder, rows: list[Question], config: Config) -> None:
    """Print the prompt that the model sees: it learns the voice under this system message."""
    for note in encoder.template.notes():
        print(f"06: note: {note}")
    print(f"06: {_system_line(encoder.template.system_message(), config.system_prompt)}")
    print("06: the prompt of the first question, as the model sees it:")
    for line in encoder.render(rows[0].question).splitlines():
        print(f"    {line}")


def _system_line(message: str | None, system_prompt: str) -> str:
    """One line that says which system message the prompts have, cut to SHOWN characters."""
    if message is None and system_prompt:
        return "no system message: the model's chat template leaves system_prompt out"
    if message is None:
        return "no system message (the model has no default; system_prompt is empty)"
    words = " ".join(message.split())
    start = words if len(words) <= SHOWN else f"{words[:SHOWN]} ..."
    whose = "system_prompt" if system_prompt else "the model's own default; system_prompt is empty"
    return f'system message: "{start}" ({whose})'


def _open_samples(files: PairFiles, sampling: Fingerprint) -> dict[int, SampledBatch]:
    """Finished batches by their number; an empty file when there are none of these settings."""
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
    """An answer a row; batches whose questions are unchanged are taken from `finished`."""
    prompts = [encoder.prompt(row.question) for row in rows]
    size = config.generation.batch_size
    every = batches(prompts, size, config.seed)
    asked = [[row.question for row in rows[i : i + size]] for i in range(0, len(rows), size)]
    known = {
        number: finished[number]["answers"]
        for number, questions_asked in enumerate(asked)
        if number in finished and finished[number]["questions"] == questions_asked
    }
    there = sum(len(answers) for answers in known.values())
    print(f"06: {len(rows)} answers to sample, {there} of them are there already")
    missing = [number for number in range(len(every)) if number not in known]
    with (
        ownership.growing(files.samples),
        tqdm(total=len(rows), initial=there, desc="06 sample", unit="answer") as bar,
    ):
        started = time.perf_counter()
        for start in range(0, len(missing), worker.size):
            numbers = missing[start : start + worker.size]
            made = worker.answers(
                [every[n] for n in numbers], config.generation, without_adapters=True
            )
            for number, answers in zip(numbers, made, strict=True):
                row = {
                    "batch": number,
                    "questions": asked[number],
                    "answers": [asdict(answer) for answer in answers],
                }
                jsonl.append(files.samples, [row])
                known[number] = answers
            bar.update(sum(map(len, made)))
            if not start:
                seconds = (time.perf_counter() - started) / sum(map(len, made))
                left = seconds * (len(rows) - bar.n)
                bar.write(f"06: {seconds:.1f} s an answer, about {left / 60:.1f} minutes to go")
    return [answer for number in range(len(every)) for answer in known[number]]


def _join(
    rows: list[Question],
    answers: list[Answer],
    config: Config,
    encoder: Encoder,
    dropped: Counter[str],
) -> list[tuple[Question, Answer]]:
    """Questions with a rejected answer that can be used; the rest is counted."""
    kept = []
    for row, answer in zip(rows, answers, strict=True):
        if not answer.text:
            dropped["rejected is empty"] += 1
        elif answer.text == row.answer:
            dropped["rejected equals chosen"] += 1
        elif not _fits(encoder, replace(row, answer=answer.text), config):
            dropped["rejected longer than data.max_length"] += 1
        else:
            kept.append((row, answer))
    return kept


def _write(
    files: PairFiles,
    made: list[tuple[Question, Answer]],
    config: Config,
    encoder: Encoder,
    dropped: Counter[str],
    current: Fingerprint,
) -> None:
    splits: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    lost = dict(+dropped)
    for row, answer in made:
        pair = Pair(row.question, row.answer, answer.text, answer.finish)
        held_out = questions.is_held_out(row.question, config.data.valid_fraction)
        splits["valid" if held_out else "train"].append(pair)
    for split, path in files.splits.items():
        if not splits[split]:
            left_out = "".join(f"; {count} dropped: {why}" for why, count in lost.items())
            raise UserError(
                f"{path}: no pair would be left in it ({len(made)} in all{left_out}); raise "
                "data.limit or data.max_length, or change data.valid_fraction"
            )
    for split, path in files.splits.items():
        if ownership.status(path) is Status.CHANGED:
            print(f"06: {path} was edited; it is now {ownership.set_aside(path)}")
        jsonl.write(path, [_row(pair) for pair in splits[split]])
    pairs = splits["train"] + splits["valid"]
    report: PairsReport = {
        "train": len(splits["train"]),
        "valid": len(splits["valid"]),
        "dropped": lost,
        "rejected_finish": dict(Counter(pair.rejected_finish for pair in pairs)),
        "tokens": {
            "percentiles": list(PERCENTILES),
            "chosen": _percentiles([encoder.answer(pair.chosen) for pair in pairs]),
            "rejected": _percentiles(
                [encoder.answer(pair.rejected, pair.rejected_finish) for pair in pairs]
            ),
        },
        "inputs": current,
    }
    jsonl.write_json(files.report, report)
    _print(report, files)


def _row(pair: Pair) -> dict[str, str]:
    row = asdict(pair)
    del row["line"]
    return row


def _percentiles(answers: list[list[int]]) -> list[int]:
    return np.percentile([len(ids) for ids in answers], PERCENTILES).astype(int).tolist()


def _print(report: PairsReport, files: PairFiles) -> None:
    print(f"06: {report['train']} train pairs in {files.train}, {report['valid']} valid pairs")
    for reason, count in report["dropped"].items():
        print(f"    dropped {count}: {reason}")
    print(f"    rejected answers ended: {report['rejected_finish']}")
    tokens = report["tokens"]
    for side, values in (("chosen", tokens["chosen"]), ("rejected", tokens["rejected"])):
        lengths = zip(PERCENTILES, values, strict=True)
        print(f"    {side} tokens: " + "  ".join(f"p{p} {n}" for p, n in lengths))
