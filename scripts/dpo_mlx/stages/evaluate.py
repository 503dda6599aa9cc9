"""Stage 12: compare the base and the tuned model on held-out questions."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

from ..config import Config, FuseConfig, GenerationConfig, SmokeConfig
from ..data import encoding, pairs
from ..data.encoding import EncodedPair, Encoder
from ..data.pairs import LENGTH, STOP, Pair
from ..files import atomic, fingerprint, jsonl, model_files, ownership, records, results
from ..files.errors import UserError
from ..files.fingerprint import SMOKE_TEST, Fingerprint
from ..files.ownership import Status
from ..files.results import FuseReport, read_metrics
from ..files.run_folder import BASE, TRAIN, VALID
from ..model.loading import LoadedModel, load_model
from ..model.sampling import Answer
from ..parallel.worker import Worker, answer_all, log_probs
from ..report import card
from ..report.html_report import write_html
from ..scoring import memory, reference
from ..scoring.losses import Sides
from ..scoring.scorer import score_against, summarise
from ..training.setup import answer_settings, reference_fingerprint
from ..voice.answers import measure
from ..voice.copying import copied_share, runs
from ..voice.habits import HabitResult, find_habits, measure_habits
from ..voice.voice_classifier import MIN_ACCURACY, fit_classifier

Report = dict[str, Any]

# The strongest habits that did not carry over, for the console.
MAX_PRINTED_HABITS = 3

# The measures of answers, as the console names them.
LABELS = {
    "voice": "voice score, 0 to 1",
    "distinct2": "share of word pairs that are distinct",
    "longest_loop": "longest loop, in words",
    "self_ended": "share of answers that end by themselves",
    "base_logprob_per_token": "log-prob under the base model, nats per token",
    "sense": "fit to its own question rather than another, nats per token",
    "median_tokens": "median length, in tokens",
    "copied": "share copied from your training answers, 8 words in a row or more",
}


class Verdict(TypedDict):
    """Whether the tuned model stays within the config's limits."""

    passed: bool
    outcome: str
    summary: str
    crossed: list[str]


class Answers(TypedDict):
    """A held-out question, both models' answers, and yours ("chosen")."""

    question: str
    base: str
    tuned: str
    chosen: str


class SmokeReport(TypedDict):
    """The contents of report.json."""

    verdict: Verdict
    voice: dict[str, float]
    fluency: dict[str, dict[str, float]]
    habits: list[HabitResult]
    preference: dict[str, float]
    fuse: FuseReport
    training: dict[str, Any]
    run: dict[str, Any]
    answers: list[Answers]


@dataclass(frozen=True)
class Tuned:
    """The fused model's answers to the held-out questions and its log-probs of all valid pairs, in
    nats; those pairs as token ids; the sampling settings.
    """

    answers: list[Answer]
    log_probs: list[Sides[float]]
    encoder: Encoder
    encoded: list[EncodedPair]
    generation: GenerationConfig


def evaluate(config: Config) -> bool:
    """Write `run_dir/report.json` and `report.html`. Returns whether no limit was crossed.

    Raises UserError when there is no fused model.
    """
    run, fused, report_path = config.run, config.run.fused, config.run.report
    if not (fused.is_dir() and run.fuse_report.is_file()):
        raise UserError(f"{fused}: no fused model there; run 11_fuse_adapters.py first")
    results.read_outcome(run)
    stamp, current = run.stamp(SMOKE_TEST), fingerprint.of(SMOKE_TEST, config.flat)
    if fingerprint.is_current(stamp, current, [report_path]):
        print(f"12: {report_path} is up to date, skipped")
        report = records.read(report_path, SmokeReport)
    else:
        atomic.require_space(run.path, atomic.SMALL_FILES, "run_dir")
        read_metrics(run.metrics)  # refuse a damaged file before the work
        report = _report(config, current)
        jsonl.write_json(report_path, report)
        fingerprint.write(stamp, current)
    write_html(run.page, report, run.metrics)
    if ownership.status(fused / model_files.CARD) is Status.CHANGED:
        print(f"12: you edited {fused / model_files.CARD}; it stays as it is")
    else:
        card.write(config, fused, report)
    _print(report, config)
    return report["verdict"]["passed"]


def _report(config: Config, digests: Fingerprint) -> Report:
    """The contents of report.json. Only one model is in memory at a time."""
    pairs_by_split = {split: pairs.read(path) for split, path in config.pairs.splits.items()}
    return _compare(config, pairs_by_split, _tuned(config, pairs_by_split), digests)


def _tuned(config: Config, pairs_by_split: dict[str, list[Pair]]) -> Tuned:
    """Everything that needs the fused model in memory."""
    loaded = load_model(str(config.run.fused), lazy=True, scan_chunk=config.train.scan_chunk)
    encoder = Encoder.of(loaded.tokenizer, config)
    valid = pairs_by_split[VALID]
    encoded, _ = encoding.encode_all(valid, encoder, config.data.max_length)
    encoding.require_pairs(config.pairs.valid, encoded)
    generation = answer_settings(config, pairs_by_split, encoder)
    config = replace(config, generation=generation)
    questions = valid[: config.smoke.questions]
    _require_memory(config, loaded, encoder, encoded, questions)
    worker = Worker(loaded.model, loaded.tokenizer)
    answers = sample_answers(worker, questions, encoder, config)
    return Tuned(answers, log_probs(worker, encoded), encoder, encoded, generation)


def _require_memory(
    config: Config,
    loaded: LoadedModel,
    encoder: Encoder,
    encoded: list[EncodedPair],
    questions: list[Pair],
) -> None:
    """Raises UserError when the machine has too little memory for this stage."""
    lengths = memory.LargestSizes(
        questions=len(questions),
        prompt=max(len(encoder.prompt_ids(pair.prompt)) for pair in questions),
        answer=config.generation.max_tokens or 0,
        longest=max(encoding.sequences(encoded), key=lambda sequence: len(sequence.ids)),
    )
    need = memory.require(
        memory.stage_12(loaded.model, config, lengths, model_files.weight_bytes(config.model)),
        config.model,
    )
    print(f"12: {memory.describe(need)}")


def _compare(
    config: Config, pairs_by_split: dict[str, list[Pair]], tuned: Tuned, digests: Fingerprint
) -> Report:
    """Sample the base model's answers, and compare both models."""
    config = replace(config, generation=tuned.generation)
    questions = pairs_by_split[VALID][: config.smoke.questions]
    loaded = load_model(config.model, lazy=True, scan_chunk=config.train.scan_chunk)
    worker = Worker(loaded.model, loaded.tokenizer)
    preference = _preference(config, tuned, worker, digests)
    answers = {
        "base": sample_answers(worker, questions, tuned.encoder, config),
        "tuned": tuned.answers,
        "chosen": _your_answers(questions, tuned.encoder),
    }
    report = {
        **_measure_answers(pairs_by_split, questions, answers, tuned.encoder, worker),
        "habits": _habits(pairs_by_split[TRAIN], questions, answers),
        "preference": preference,
        "fuse": results.read_fuse_report(config.run),
        "training": asdict(results.read_outcome(config.run)),
        "run": {"config": asdict(config), "pairs": results.read_pairs_report(config.pairs)},
        "answers": [
            {"question": pair.prompt, "base": b.text, "tuned": t.text, "chosen": pair.chosen}
            for pair, b, t in zip(questions, answers["base"], answers["tuned"], strict=True)
        ],
    }
    return {"verdict": verdict(report, config.smoke, config.fuse), **report}


def _preference(
    config: Config, tuned: Tuned, worker: Worker, digests: Fingerprint
) -> dict[str, float]:
    """How clearly the tuned model prefers chosen answers, over all valid pairs."""
    references = reference.load_or_compute(
        config.run.reference_files(BASE, VALID),
        tuned.encoded,
        reference_fingerprint(config, VALID, tuned.encoded, digests),
        worker.log_probs,
    )
    scores = [
        score_against(pi, pair, ref, config.dpo)
        for pi, pair, ref in zip(tuned.log_probs, tuned.encoded, references, strict=True)
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


def _measure_answers(
    pairs_by_split: dict[str, list[Pair]],
    questions: list[Pair],
    answers: dict[str, list[Answer]],
    encoder: Encoder,
    worker: Worker,
) -> Report:
    """`voice` and `fluency` of both models' answers and of yours."""
    train, valid = pairs_by_split[TRAIN], pairs_by_split[VALID]
    classifier = fit_classifier([pair.chosen for pair in train], [pair.rejected for pair in train])
    measures = {
        who: measure(texts, questions, classifier, worker.log_probs, encoder)
        for who, texts in answers.items()
    }
    base, tuned = (
        classifier.log_odds([answer.text for answer in answers[who]]) for who in ("base", "tuned")
    )
    by_name = {
        name: {who: values[name] for who, values in measures.items()} for name in measures["base"]
    }
    training_runs = set(runs(pair.chosen for pair in train))
    by_name["copied"] = {
        who: copied_share((answer.text for answer in texts), training_runs)
        for who, texts in answers.items()
    }
    return {
        "voice": {
            "share": float((tuned > base).mean()),
            **by_name.pop("voice"),
            "classifier_accuracy": classifier.accuracy(
                [pair.chosen for pair in valid], [pair.rejected for pair in valid]
            ),
        },
        "fluency": by_name,
    }


def _habits(
    train: list[Pair], questions: list[Pair], answers: dict[str, list[Answer]]
) -> list[HabitResult]:
    """Your habits, found in the train pairs and counted in the answers to held-out questions."""
    habits = find_habits(
        [pair.chosen for pair in train],
        [pair.rejected for pair in train],
        [pair.rejected_finish == STOP for pair in train],
    )
    base, tuned = ([answer.text for answer in answers[who]] for who in ("base", "tuned"))
    return measure_habits(habits, [pair.chosen for pair in questions], base, tuned)


def _your_answers(questions: list[Pair], encoder: Encoder) -> list[Answer]:
    """Your answers in the form of sampled ones."""
    return [
        Answer(pair.chosen, STOP, len(encoder.answer_ids(pair.chosen, LENGTH)))
        for pair in questions
    ]


def verdict(report: Report, limits: SmokeConfig, fuse: FuseConfig) -> Report:
    """Which of the config's limits were crossed, and what that means in a few words."""
    voice = report["voice"]
    degenerated = _degenerated(report["fluency"], limits)
    unmoved = [
        *_at_least("smoke.min_voice_share", voice["share"], limits.min_voice_share),
        *_at_least("smoke.min_voice_gain", voice_gain(voice), limits.min_voice_gain),
    ]
    margin_share = report["fuse"]["margin_kept"]
    lost = _at_least(
        "fuse.min_margin_kept", 1.0 if margin_share is None else margin_share, fuse.min_margin_kept
    )
    if degenerated:
        outcome = "degenerated"
        summary = "The tuned model has degenerated: its answers are no longer fluent."
    elif unmoved:
        outcome = "unmoved"
        summary = "The tuned model did not learn the voice: it answers much like the base model."
    elif lost:
        outcome = "lost in fusing"
        summary = "The adapters learned the voice, but fusing lost much of it."
    elif missing := _missing_habits(report["habits"]):
        outcome = "on the way"
        summary = f"The tuned model is on the way to your voice: {missing}."
    else:
        outcome = "learned"
        summary = "The tuned model has learned the voice and is still fluent."
    if voice["classifier_accuracy"] < MIN_ACCURACY:
        summary += (
            " (The voice cannot be measured on these pairs: the voice classifier cannot tell your "
            "answers from the base model's.)"
        )
    crossed = degenerated + unmoved + lost
    return {"passed": not crossed, "outcome": outcome, "summary": summary, "crossed": crossed}


def _missing_habits(habits: list[HabitResult]) -> str | None:
    """How many habits carried over and the strongest that did not; None if at least half did."""
    missing = [habit for habit in habits if not habit["carried"]]
    if 2 * len(missing) <= len(habits):
        return None
    carried = len(habits) - len(missing)
    return (
        f"{carried} of {len(habits)} of your habits carried over. Missing first of all: "
        f"{_habit_text(missing[0])}"
    )


def _habit_text(habit: HabitResult) -> str:
    spec = ".0%" if habit["is_share"] else ".3g"
    yours, tuned = format(habit["yours"], spec), format(habit["tuned"], spec)
    return f"{habit['name']} (you {yours}, tuned model {tuned})"


def _degenerated(fluency: Report, limits: SmokeConfig) -> list[str]:
    """A line for each limit of fluency that the tuned answers crossed."""
    distinct, log_prob, ended, length = (
        fluency[name]
        for name in ("distinct2", "base_logprob_per_token", "self_ended", "median_tokens")
    )
    ratio = max(length["tuned"], 1.0) / length["chosen"]
    # Your answers are unlikely under the base model, so a model that learned the voice may go as
    # far as they do.
    largest_drop = max(limits.max_base_logprob_drop, log_prob["base"] - log_prob["chosen"])
    return [
        *_at_most(
            "smoke.max_distinct2_drop",
            distinct["base"] - distinct["tuned"],
            limits.max_distinct2_drop,
        ),
        *_at_most(
            "smoke.max_base_logprob_drop", log_prob["base"] - log_prob["tuned"], largest_drop
        ),
        *_at_most("smoke.max_length_ratio", max(ratio, 1 / ratio), limits.max_length_ratio),
        *_at_least(
            "smoke.min_self_ended_ratio",
            ended["tuned"] / ended["base"] if ended["base"] else math.inf,
            limits.min_self_ended_ratio,
        ),
    ]


def _at_most(key: str, value: float, limit: float) -> list[str]:
    """A line when the value is above the limit, or is NaN."""
    return [] if value <= limit else [f"{key}: {value:.3g}, but at most {limit:.3g} is allowed"]


def _at_least(key: str, value: float, limit: float) -> list[str]:
    """A line when the value is below the limit, or is NaN."""
    return [] if value >= limit else [f"{key}: {value:.3g}, but at least {limit:.3g} is required"]


def voice_gain(scores: Report) -> float:
    """How far training moved the mean voice score from the base model's towards your answers': 0 is
    no change, 1 is all the way.
    """
    gap = scores["chosen"] - scores["base"]
    return (scores["tuned"] - scores["base"]) / gap if gap > 0 else 0.0


def _print_habits(habits: list[HabitResult]) -> None:
    """How many habits carried over, and the strongest ones that did not."""
    if not habits:
        return
    missing = [habit for habit in habits if not habit["carried"]]
    print(f"    habits of yours that carried over: {len(habits) - len(missing)} of {len(habits)}")
    for habit in missing[:MAX_PRINTED_HABITS]:
        print(f"        not yet: {_habit_text(habit)}")


def _print(report: Report, config: Config) -> None:
    print(f"12: {report['verdict']['summary']}")
    for line in report["verdict"]["crossed"]:
        print(f"    limit crossed: {line}")
    voice = report["voice"]
    print(
        f"    on {voice['share']:.0%} of the questions the tuned answer sounds more like yours "
        "than the base model's"
    )
    print(
        f"    the voice classifier is right on {voice['classifier_accuracy']:.0%} of held-out "
        "answers"
    )
    _print_habits(report["habits"])
    for name, values in {"voice": voice, **report["fluency"]}.items():
        print(
            f"    {LABELS.get(name, name)}: base model {values['base']:.3g}, tuned model "
            f"{values['tuned']:.3g}, your answers {values['chosen']:.3g}"
        )
    print(f"12: the report:\n{config.run.page}")
