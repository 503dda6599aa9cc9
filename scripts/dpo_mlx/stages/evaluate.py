"""Stage 12: compare the base and the tuned model on held-out questions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

from ..config import Config
from ..data import encoding, pairs
from ..data.encoding import EncodedAnswer, EncodedPair, Encoder
from ..data.pairs import LENGTH, STOP, Pair
from ..files import atomic, fingerprint, jsonl, model_files, ownership, records, results
from ..files.errors import UserError
from ..files.fingerprint import SMOKE_TEST, Fingerprint
from ..files.ownership import Status
from ..files.results import FuseReport, Outcome, read_metrics
from ..files.run_folder import BASE, TRAIN, VALID
from ..model.loading import LoadedModel, load_model
from ..model.sampling import Answer
from ..parallel.worker import Worker, answer_all, log_probs
from ..report import card, sections
from ..report.html_report import write_html
from ..report.sections import (
    OTHER_SYSTEM_MESSAGE,
    OTHER_SYSTEM_QUESTIONS,
    DpoAdded,
    Voice,
)
from ..report.verdict import Verdict, habit_text, verdict
from ..scoring import memory, reference
from ..scoring.losses import Sides
from ..scoring.scorer import score_against, summarise
from ..training.outcome import comparison
from ..training.setup import answer_settings, encode_splits, reference_fingerprint
from ..voice import cost
from ..voice.answers import Author, measure
from ..voice.cost import Cost
from ..voice.habits import HabitResult

Report = dict[str, Any]

# The strongest habits that did not carry over, for the console.
MAX_PRINTED_HABITS = 3

# The measures of answers, as the console names them.
LABELS = {
    "distinct2": "share of word pairs that are distinct",
    "longest_loop": "longest loop, in words",
    "self_ended": "share of answers that end by themselves",
    "base_logprob_per_token": "log-prob under the base model, nats per token",
    "sense": "fit to its own question rather than another, nats per token",
    "median_tokens": "median length, in tokens",
    "copied": "share copied from your training answers, 8 words in a row or more",
}
COST_LABELS = {"instructions": "instructions followed", "choices": "general knowledge"}


class Answers(TypedDict):
    """A held-out question, both models' answers, and yours ("chosen")."""

    question: str
    base: str
    tuned: str
    chosen: str


class SmokeReport(TypedDict):
    """The contents of report.json."""

    verdict: Verdict
    voice: Voice
    fluency: dict[str, dict[str, float]]
    habits: list[HabitResult]
    cost: Cost
    dpo_added: DpoAdded | None
    preference: dict[str, float]
    fuse: FuseReport
    training: dict[str, Any]
    run: dict[str, Any]
    answers: list[Answers]


@dataclass(frozen=True)
class Task:
    """What both models do: answer the held-out questions, and unrelated prompts.

    `encoded` are all valid pairs as token ids. `config` has the number of `generation.max_tokens`.
    """

    config: Config
    encoder: Encoder
    pairs: dict[str, list[Pair]]
    encoded: list[EncodedPair]
    unrelated: cost.Tasks

    @property
    def questions(self) -> list[Pair]:
        """The last held-out ones. The guard asks the first ones and chooses the checkpoint by
        them, so if there are enough, the two have none in common.
        """
        return self.pairs[VALID][-self.config.smoke.questions :]

    @property
    def prompts(self) -> list[str]:
        """Every prompt that a model answers."""
        return [
            *(pair.prompt for pair in self.questions),
            *self.unrelated.prompts,
            *(instruction.prompt for instruction in self.unrelated.instructions),
        ]

    def unrelated_results(self, worker: Worker, answers: list[EncodedAnswer]) -> cost.ModelResults:
        batch_size = self.config.generation.batch_size
        return cost.measure(worker, self.encoder, self.unrelated, answers, batch_size)


@dataclass(frozen=True)
class BaseModel:
    """The base model's answers to the held-out questions and to unrelated prompts, and its results
    on unrelated tasks.
    """

    answers: list[Answer]
    unrelated_answers: list[EncodedAnswer]
    unrelated: cost.ModelResults


@dataclass(frozen=True)
class TunedModel:
    """The fused model's answers to the held-out questions, also under another system message (None
    when the chat template has none), its log-probs of all valid pairs in nats, and its results on
    unrelated tasks.
    """

    answers: list[Answer]
    other_answers: list[Answer] | None
    log_probs: list[Sides[float]]
    unrelated: cost.ModelResults


def evaluate(config: Config) -> bool:
    """Write `run_dir/report.json` and `report.html`. Returns whether the grade passes.

    Raises UserError when there is no fused model.
    """
    run, fused, report_path = config.run, config.run.fused, config.run.report
    if not (fused.is_dir() and run.fuse_report.is_file()):
        raise UserError(f"{fused}: no fused model there; run 11_fuse_adapters.py first")
    outcome = results.read_outcome(run)
    stamp, current = run.stamp(SMOKE_TEST), fingerprint.of(SMOKE_TEST, config.flat)
    if fingerprint.is_current(stamp, current, [report_path]):
        print(f"12: {report_path} is up to date, skipped")
        report = records.read(report_path, SmokeReport)
    else:
        atomic.require_space(run.path, atomic.SMALL_FILES, "run_dir")
        read_metrics(run.metrics)  # refuse a damaged file before the work
        report = _report(config, current, outcome)
        jsonl.write_json(report_path, report)
        fingerprint.write(stamp, current)
    write_html(run.page, report, run.metrics)
    if ownership.status(fused / model_files.CARD) is Status.CHANGED:
        print(f"12: you edited {fused / model_files.CARD}; it stays as it is")
    else:
        card.write(config, fused, report)
    _print(report, outcome)
    print(f"12: the report:\n{run.page}")
    return report["verdict"]["passed"]


def _report(config: Config, digests: Fingerprint, outcome: Outcome) -> Report:
    """The contents of report.json. Only one model is in memory at a time, so the base model is
    loaded twice: the tuned model scores its answers, and it scores the tuned model's.
    """
    task, base = _of_base(config)
    return _compare(task, base, _of_tuned(task, base), digests, outcome)


def _of_base(config: Config) -> tuple[Task, BaseModel]:
    """The task of both models, and everything that needs only the base model."""
    raw = {split: pairs.read(path) for split, path in config.pairs.splits.items()}
    loaded = _load(config.model, config)
    encoder = Encoder.of(loaded.tokenizer, config)
    pairs_by_split, by_split = encode_splits(raw, encoder, config.data.max_length)
    encoded = by_split[VALID]
    encoding.require_pairs(config.pairs.valid, encoded)
    generation = answer_settings(config, pairs_by_split, encoder)
    config = replace(config, generation=generation)
    task = Task(config, encoder, pairs_by_split, encoded, cost.load(config.smoke.unrelated_tasks))
    _require_memory(task, loaded)
    worker = Worker(loaded.model, loaded.tokenizer)
    answers = sample_answers(worker, task.questions, encoder, config)
    unrelated_answers = cost.base_answers(
        worker, encoder, task.unrelated.prompts, generation.batch_size, config.seed
    )
    unrelated = task.unrelated_results(worker, unrelated_answers)
    return task, BaseModel(answers, unrelated_answers, unrelated)


def _of_tuned(task: Task, base: BaseModel) -> TunedModel:
    """Everything that needs the fused model in memory."""
    config, encoder = task.config, task.encoder
    loaded = _load(str(config.run.fused), config)
    worker = Worker(loaded.model, loaded.tokenizer)
    other_encoder = Encoder.of(
        loaded.tokenizer, replace(config, system_prompt=OTHER_SYSTEM_MESSAGE)
    )
    other_answers = None
    if other_encoder.template.system_message() == OTHER_SYSTEM_MESSAGE:
        questions = task.questions[:OTHER_SYSTEM_QUESTIONS]
        other_answers = sample_answers(worker, questions, other_encoder, config)
    return TunedModel(
        sample_answers(worker, task.questions, encoder, config),
        other_answers,
        log_probs(worker, task.encoded),
        task.unrelated_results(worker, base.unrelated_answers),
    )


def _load(model: str, config: Config) -> LoadedModel:
    return load_model(model, lazy=True, scan_chunk=config.train.scan_chunk)


def _require_memory(task: Task, loaded: LoadedModel) -> None:
    """Raises UserError when the machine has too little memory for this stage."""
    config = task.config
    lengths = memory.LargestSizes(
        questions=max(len(task.questions), len(task.unrelated.prompts)),
        prompt=max(len(task.encoder.prompt_ids(prompt)) for prompt in task.prompts),
        answer=max(config.generation.max_tokens or 0, cost.MAX_TOKENS),
        longest=max(encoding.sequences(task.encoded), key=lambda sequence: len(sequence.ids)),
    )
    weights = max(map(model_files.weight_bytes, (config.model, str(config.run.fused))))
    need = memory.require(memory.stage_12(loaded.model, config, lengths, weights), config.model)
    print(f"12: {memory.describe(need)}")


def _compare(
    task: Task, base: BaseModel, tuned: TunedModel, digests: Fingerprint, outcome: Outcome
) -> Report:
    """Compare both models' answers with the base model in memory."""
    config, encoder, questions = task.config, task.encoder, task.questions
    loaded = _load(config.model, config)
    worker = Worker(loaded.model, loaded.tokenizer)
    author = Author.of(task.pairs[TRAIN], task.pairs[VALID])
    answers = {
        sections.BASE: base.answers,
        sections.TUNED: tuned.answers,
        sections.CHOSEN: _your_answers(questions, encoder),
    }
    measures = {
        who: measure(side, questions, author, worker.log_probs, encoder)
        for who, side in answers.items()
    }
    train = task.pairs[TRAIN]
    report = {
        "voice": sections.voice(author, train, answers, tuned.other_answers),
        "fluency": sections.fluency(measures, train, answers),
        "habits": sections.habits(author, answers),
        "cost": cost.compare(base.unrelated_answers, base.unrelated, tuned.unrelated),
        "dpo_added": sections.dpo_added(outcome),
        "preference": _preference(task, tuned, worker, digests),
        "fuse": results.read_fuse_report(config.run),
        "training": asdict(outcome),
        "run": {"config": asdict(config), "pairs": results.read_pairs_report(config.pairs)},
        "answers": [
            {"question": pair.prompt, "base": b.text, "tuned": t.text, "chosen": pair.chosen}
            for pair, b, t in zip(questions, base.answers, tuned.answers, strict=True)
        ],
    }
    return {"verdict": verdict(report, config.smoke), **report}


def _preference(
    task: Task, tuned: TunedModel, worker: Worker, digests: Fingerprint
) -> dict[str, float]:
    """How clearly the tuned model prefers chosen answers, over all valid pairs."""
    config, encoded = task.config, task.encoded
    references = reference.load_or_compute(
        config.run.reference_files(BASE, VALID),
        encoded,
        reference_fingerprint(config, VALID, encoded, digests),
        worker.log_probs,
    )
    scores = [
        score_against(pi, pair, ref, config.dpo)
        for pi, pair, ref in zip(tuned.log_probs, encoded, references, strict=True)
    ]
    summary = summarise(scores, config.dpo.beta)
    return {
        "accuracy": summary["rewards/accuracies"],
        "margin": summary["rewards/margins"],
        "chosen_per_token": summary["logps/chosen_per_token"],
        "rejected_per_token": summary["logps/rejected_per_token"],
    }


def sample_answers(
    worker: Worker, questions: list[Pair], encoder: Encoder, config: Config
) -> list[Answer]:
    """One sampled answer to each question, seeded."""
    prompts = [encoder.prompt_ids(pair.prompt) for pair in questions]
    return answer_all(worker, prompts, config.generation, config.seed)


def _your_answers(questions: list[Pair], encoder: Encoder) -> list[Answer]:
    """Your answers in the form of sampled ones."""
    return [
        Answer(pair.chosen, STOP, len(encoder.answer_ids(pair.chosen, LENGTH)))
        for pair in questions
    ]


def _print_habits(habits: list[HabitResult]) -> None:
    """How many habits carried over, and the strongest ones that did not."""
    if not habits:
        return
    missing = [habit for habit in habits if not habit["carried"]]
    print(f"    habits of yours that carried over: {len(habits) - len(missing)} of {len(habits)}")
    for habit in missing[:MAX_PRINTED_HABITS]:
        print(f"        not yet: {habit_text(habit)}")


def _print_voice(voice: Voice) -> None:
    if detection := voice["detection"]:
        base, tuned = detection["base"]["value"], detection["tuned"]["value"]
        print(
            "    a classifier tells the answers from yours (50%: it cannot): base model "
            f"{base:.0%}, tuned model {tuned:.0%}"
        )
    if other := voice["other_system_message"]:
        print(f"    under another system message: {other['value']:.0%} of the way to your voice")


def _print_cost(values: Cost) -> None:
    for name in ("instructions", "choices"):
        base, tuned = values[name]["base"], values[name]["tuned"]
        print(f"    {COST_LABELS[name]}: base model {base:.0%}, tuned model {tuned:.0%}")
    print(f"    distance from the base model: {values['divergence']['value']:.2f} nats per token")


def _print(report: Report, outcome: Outcome) -> None:
    """Print the measures, then what DPO added, and then the grade."""
    for name, values in report["fluency"].items():
        print(
            f"    {LABELS[name]}: base model {values['base']:.3g}, tuned model "
            f"{values['tuned']:.3g}, your answers {values['chosen']:.3g}"
        )
    _print_habits(report["habits"])
    _print_voice(report["voice"])
    _print_cost(report["cost"])
    for line in report["verdict"]["reasons"]:
        print(f"    limit crossed: {line}")
    print(f"12: {comparison(outcome)}")
    print(f"12: {report['verdict']['grade']}. {report['verdict']['summary']}")
