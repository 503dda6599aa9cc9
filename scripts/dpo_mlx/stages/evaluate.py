"""Stage 12: base and tuned answers side by side on questions training has not seen."""

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
from ..files.fingerprint import EVALUATION, Fingerprint
from ..files.ownership import Status
from ..files.results import FuseReport, read_metrics
from ..files.run_folder import BASE, SPLITS, TRAIN, VALID
from ..model import device
from ..model.loading import LoadedModel, load_model
from ..model.sampling import Answer, limited
from ..parallel.worker import Worker, answer_all, log_probs
from ..report import card
from ..report.html_report import write_html
from ..scoring import memory, reference
from ..scoring.losses import Sides
from ..scoring.scorer import score_against, summarise
from ..training.setup import reference_fingerprint
from ..voice.answers import measure
from ..voice.voice_classifier import LEAST_ACCURACY, fit_classifier

Report = dict[str, Any]


class Verdict(TypedDict):
    """What the limits of the config say of the tuned model."""

    passed: bool
    outcome: str
    summary: str
    crossed: list[str]


class Answers(TypedDict):
    """A held-out question with the answers of both models and the real one."""

    question: str
    base: str
    tuned: str
    chosen: str


class SmokeReport(TypedDict):
    """What report.json holds."""

    verdict: Verdict
    voice: dict[str, float]
    fluency: dict[str, dict[str, float]]
    preference: dict[str, float]
    fuse: FuseReport
    training: dict[str, Any]
    run: dict[str, Any]
    answers: list[Answers]


@dataclass(frozen=True)
class Tuned:
    """The fused model's answers to the held-out questions, its log-probs of all valid
    pairs, in nats, those pairs as token ids, and the sampling settings.
    """

    answers: list[Answer]
    log_probs: list[Sides[float]]
    encoder: Encoder
    encoded: list[EncodedPair]
    generation: GenerationConfig


def evaluate(config: Config) -> bool:
    """Write `run_dir/report.json` and `report.html`; whether every limit was kept.

    Raises UserError when the fused model is not there.
    """
    run, fused, report_path = config.run, config.run.fused, config.run.report
    if not (fused.is_dir() and run.fuse_report.is_file()):
        raise UserError(f"{fused}: no fused model there; run 11_fuse_adapters.py first")
    results.read_outcome(run)
    stamp, current = run.stamp(EVALUATION), fingerprint.of(EVALUATION, config)
    if fingerprint.is_current(stamp, current, [report_path]):
        print(f"12: {report_path} is up to date, skipped")
        report = records.read(report_path, SmokeReport)
    else:
        atomic.require_space(run.path, atomic.SMALL_FILES, "run_dir")
        read_metrics(run.metrics)  # a broken one is said before the work is done
        report = _report(config, current)
        jsonl.write_json(report_path, report)
        fingerprint.write(stamp, current)
    write_html(run.page, report, run.metrics)
    if ownership.status(fused / model_files.CARD) is Status.CHANGED:
        print(f"12: {fused / model_files.CARD} was edited and stays as it is")
    else:
        card.write(config, fused, report)
    _print(report, config)
    return report["verdict"]["passed"]


def _report(config: Config, digests: Fingerprint) -> Report:
    """The report. One model is in memory at a time."""
    pairs_by_split = {split: pairs.read(path) for split, path in config.pairs.splits.items()}
    return _compare(config, pairs_by_split, _tuned(config, pairs_by_split), digests)


def _tuned(config: Config, pairs_by_split: dict[str, list[Pair]]) -> Tuned:
    """Everything that needs the fused model in memory."""
    loaded = load_model(str(config.run.fused), lazy=True, scan_chunk=config.train.scan_chunk)
    encoder = Encoder.of(loaded.tokenizer, config)
    valid = pairs_by_split[VALID]
    encoded, _ = encoding.encode_all(valid, encoder, config.data.max_length)
    encoding.require_pairs(config.pairs.valid, encoded)
    everything = [pair for split in SPLITS for pair in pairs_by_split[split]]
    lengths = encoding.chosen_lengths(everything, encoder, config.data.max_length)
    generation = limited(config.generation, lengths)
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
    lengths = memory.Lengths(
        questions=len(questions),
        prompt=max(len(encoder.prompt(pair.prompt)) for pair in questions),
        answer=config.generation.max_tokens or 0,
        longest=max(encoding.sequences(encoded), key=lambda sequence: len(sequence.ids)),
    )
    need = memory.require(
        memory.stage_12(loaded.model, config, lengths, model_files.weight_bytes(config.model)),
        config.model,
    )
    print(f"12: peak memory {need}; {device.available() / 1e9:.2f} GB available")


def _compare(
    config: Config, pairs_by_split: dict[str, list[Pair]], tuned: Tuned, digests: Fingerprint
) -> Report:
    """Sample the base model's answers, and compare both models."""
    config = replace(config, generation=tuned.generation)
    encoder, encoded = tuned.encoder, tuned.encoded
    questions = pairs_by_split[VALID][: config.smoke.questions]
    loaded = load_model(config.model, lazy=True, scan_chunk=config.train.scan_chunk)
    worker = Worker(loaded.model, loaded.tokenizer)
    references = reference.load_or_compute(
        config.run.reference(BASE),
        VALID,
        encoded,
        reference_fingerprint(config, VALID, encoded, digests),
        worker.log_probs,
    )
    base = sample_answers(worker, questions, encoder, config)
    scores = [
        score_against(pi, pair, ref, config.dpo)
        for pi, pair, ref in zip(tuned.log_probs, encoded, references, strict=True)
    ]
    preference = summarise(scores, config.dpo.beta)
    answers = {"base": base, "tuned": tuned.answers, "chosen": _real(questions, encoder)}
    report = {
        **_written(pairs_by_split, questions, answers, encoder, worker),
        "preference": {
            "accuracy": preference["rewards/accuracies"],
            "margin": preference["rewards/margins"],
            "chosen_per_token": preference["logps/chosen_per_token"],
            "rejected_per_token": preference["logps/rejected_per_token"],
        },
        "fuse": results.read_fuse_report(config.run),
        "training": asdict(results.read_outcome(config.run)),
        "run": {"config": asdict(config), "pairs": results.read_pairs_report(config.pairs)},
        "answers": [
            {"question": pair.prompt, "base": b.text, "tuned": t.text, "chosen": pair.chosen}
            for pair, b, t in zip(questions, base, tuned.answers, strict=True)
        ],
    }
    return {"verdict": verdict(report, config.smoke, config.fuse), **report}


def sample_answers(
    worker: Worker, asked: list[Pair], encoder: Encoder, config: Config
) -> list[Answer]:
    """One sampled answer to each question, seeded."""
    prompts = [encoder.prompt(pair.prompt) for pair in asked]
    return answer_all(worker, prompts, config.generation, config.seed)


def _written(
    pairs_by_split: dict[str, list[Pair]],
    asked: list[Pair],
    answers: dict[str, list[Answer]],
    encoder: Encoder,
    worker: Worker,
) -> Report:
    """`voice` and `fluency` of the answers of both models, and of the real ones."""
    train, valid = pairs_by_split[TRAIN], pairs_by_split[VALID]
    classifier = fit_classifier([pair.chosen for pair in train], [pair.rejected for pair in train])
    measured = {
        who: measure(given, asked, classifier, worker.log_probs, encoder)
        for who, given in answers.items()
    }
    base, tuned = (
        classifier.score([answer.text for answer in answers[who]]) for who in ("base", "tuned")
    )
    by_name = {
        name: {who: values[name] for who, values in measured.items()} for name in measured["base"]
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


def _real(asked: list[Pair], encoder: Encoder) -> list[Answer]:
    """The real answers, as if sampled."""
    return [Answer(pair.chosen, STOP, len(encoder.answer(pair.chosen, LENGTH))) for pair in asked]


def verdict(report: Report, limits: SmokeConfig, fuse: FuseConfig) -> Report:
    """Which limits of the config were crossed, and what that means in a few words."""
    fluency, voices, kept = report["fluency"], report["voice"], report["fuse"]["margin_kept"]
    distinct, natural, ended, length = (
        fluency[name]
        for name in ("distinct2", "base_logprob_per_token", "self_ended", "median_tokens")
    )
    ratio = max(length["tuned"], 1.0) / length["chosen"]
    # Where the voice itself is further from the base model, so may be what has learned it.
    furthest = max(limits.max_base_logprob_drop, natural["base"] - natural["chosen"])
    degenerated = [
        *_at_most(
            "max_distinct2_drop", distinct["base"] - distinct["tuned"], limits.max_distinct2_drop
        ),
        *_at_most("max_base_logprob_drop", natural["base"] - natural["tuned"], furthest),
        *_at_most("max_length_ratio", max(ratio, 1 / ratio), limits.max_length_ratio),
        *_at_least(
            "min_self_ended_ratio",
            ended["tuned"] / ended["base"] if ended["base"] else math.inf,
            limits.min_self_ended_ratio,
        ),
    ]
    unmoved = [
        *_at_least("min_voice_share", voices["share"], limits.min_voice_share),
        *_at_least("min_voice_gain", voice_gain(voices), limits.min_voice_gain),
    ]
    lost = _at_least(
        "min_margin_kept", 1.0 if kept is None else kept, fuse.min_margin_kept, section="fuse"
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
    else:
        outcome = "learned"
        summary = "The tuned model has learned the voice and is still fluent."
    if voices["classifier_accuracy"] < LEAST_ACCURACY:
        summary += " (The voice cannot be measured on these pairs: the classifier is unsure.)"
    crossed = degenerated + unmoved + lost
    return {"passed": not crossed, "outcome": outcome, "summary": summary, "crossed": crossed}


def _at_most(name: str, value: float, limit: float) -> list[str]:
    """A line when the value is above the limit, or is not a number."""
    return [] if value <= limit else [f"smoke.{name}: {value:.3g}, the most is {limit:.3g}"]


def _at_least(name: str, value: float, limit: float, section: str = "smoke") -> list[str]:
    return [] if value >= limit else [f"{section}.{name}: {value:.3g}, the least is {limit:.3g}"]


def voice_gain(scores: Report) -> float:
    """How far the tuned answers went from the base's mean voice score to the real answers'."""
    gap = scores["chosen"] - scores["base"]
    return (scores["tuned"] - scores["base"]) / gap if gap > 0 else 0.0


def _print(report: Report, config: Config) -> None:
    v, f = report["voice"], report["fluency"]
    print(f"12: {report['verdict']['summary']}")
    for line in report["verdict"]["crossed"]:
        print(f"    crossed {line}")
    print(
        f"    voice: tuned above base on {v['share']:.0%} of questions; score base "
        f"{v['base']:.2f}, tuned {v['tuned']:.2f}, real answers {v['chosen']:.2f}; "
        f"classifier right on {v['classifier_accuracy']:.0%} of held-out answers"
    )
    for name, values in f.items():
        print(f"    {name}: " + ", ".join(f"{who} {value:.3g}" for who, value in values.items()))
    print(f"12: the report:\n{config.run.page}")
