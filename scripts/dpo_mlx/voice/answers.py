"""Measures the voice and the fluency of a model's answers to held-out questions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from ..config import GenerationConfig
from ..data.encoding import EncodedAnswer, Encoder
from ..data.pairs import STOP, Pair
from ..files.results import Measures
from ..model.sampling import EVALUATED_AT_ONCE, Answer
from ..parallel.worker import Worker, answer_all
from .cost import base_answers, divergence
from .fluency import distinct_bigrams, longest_loop
from .habits import Trait, find_habits, measure_habits
from .sense import LogProbs, log_probs_per_token, other_questions, sense
from .voice_scale import VoiceScale, voice_scale

# The means of an evaluation: "voice" (place on the voice scale), "habits" (share of the author's
# habits that carried over), "distinct2" (share of word pairs that are different), "longest_loop"
# (words), "self_ended" (share of answers), "base_logprob_per_token" and "sense" (nats),
# "median_tokens", and in training "divergence" (from the base model on unrelated prompts, nats).
DIVERGENCE = "divergence"
NAMES = (
    "voice",
    "habits",
    "distinct2",
    "longest_loop",
    "self_ended",
    "base_logprob_per_token",
    "sense",
    "median_tokens",
    DIVERGENCE,
)


@dataclass(frozen=True)
class Author:
    """What distinguishes the author's answers from the base model's, from a run's pairs."""

    scale: VoiceScale
    habits: list[Trait]

    @classmethod
    def of(cls, train: list[Pair], valid: list[Pair]) -> Author:
        return cls(voice_scale(train, valid), habits_of(train))


def habits_of(train: list[Pair]) -> list[Trait]:
    """The author's habits in the train pairs."""
    return find_habits(
        [pair.chosen for pair in train],
        [pair.rejected for pair in train],
        [pair.rejected_finish == STOP for pair in train],
    )


def measure(
    answers: list[Answer],
    questions: list[Pair],
    author: Author,
    log_probs: LogProbs,
    encoder: Encoder,
) -> Measures:
    """The measures of answers, one for each question. `log_probs` are the base model's.

    "base_logprob_per_token" is -inf when every answer is empty.
    """
    texts = [answer.text for answer in answers]
    after_own, after_other = (
        log_probs_per_token(asked, answers, log_probs, encoder)
        for asked in (questions, other_questions(questions))
    )
    voice = author.scale.places(texts)
    means = {
        "voice": float(voice.mean()),
        "habits": _carried_share(author.habits, questions, texts),
        "distinct2": float(np.mean([distinct_bigrams(text) for text in texts])),
        "longest_loop": float(np.mean([longest_loop(text) for text in texts])),
        "self_ended": float(np.mean([answer.finish == STOP for answer in answers])),
        "base_logprob_per_token": _mean_of_numbers(after_own),
        "sense": float(sense(after_own, after_other).mean()),
        "median_tokens": float(np.median([answer.tokens for answer in answers])),
    }
    return Measures(voice.tolist(), means)


def _carried_share(habits: list[Trait], questions: list[Pair], texts: list[str]) -> float:
    """The share of the habits that carried over into the texts. 1 when there is no habit."""
    sides = [pair.chosen for pair in questions], [pair.rejected for pair in questions]
    results = measure_habits(habits, *sides, texts)
    return float(np.mean([result["carried"] for result in results])) if results else 1.0


def _mean_of_numbers(values: np.ndarray) -> float:
    """The mean without NaN, which stands for an empty answer; -inf when nothing else is there."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("-inf")


class AnswerEvaluator:
    """Asks a model held-out questions while it trains, and measures its answers.

    The model answers as it does in stage 06. `prompts` are unrelated to the questions; the base
    model answers them once, and then each evaluation measures the divergence on these answers.
    Sampling seeds MLX's random state.
    """

    def __init__(
        self,
        worker: Worker,
        encoder: Encoder,
        author: Author,
        questions: list[Pair],
        prompts: list[str],
        generation: GenerationConfig,
        seed: int,
    ) -> None:
        self._worker = worker
        self._encoder = encoder
        self._author = author
        self._questions = questions
        self._batch_size = min(EVALUATED_AT_ONCE, len(questions))
        self._prompts = prompts
        self._generation = generation
        self._seed = seed

    def __call__(self) -> Measures:
        """The measures of the model's answers now."""
        measures = self._measure_answers(without_adapters=False)
        base_answers, base_log_probs = self._unrelated
        log_probs = self._worker.log_probs(base_answers)
        now = divergence(base_answers, base_log_probs, log_probs)["value"]
        return replace(measures, means={**measures.means, DIVERGENCE: now})

    def base(self) -> Measures:
        """The same measures for the model without its adapters."""
        measures = self._measure_answers(without_adapters=True)
        return replace(measures, means={**measures.means, DIVERGENCE: 0.0})

    @cached_property
    def _unrelated(self) -> tuple[list[EncodedAnswer], list[float]]:
        """The base model's answers to the unrelated prompts, and its log-probs of them in nats."""
        answers = base_answers(
            self._worker, self._encoder, self._prompts, self._batch_size, self._seed, True
        )
        return answers, self._worker.log_probs(answers, without_adapters=True)

    def _measure_answers(self, without_adapters: bool) -> Measures:
        prompts = [self._encoder.prompt_ids(question.prompt) for question in self._questions]
        settings = replace(self._generation, batch_size=self._batch_size)
        answers = answer_all(
            self._worker, prompts, settings, self._seed, without_adapters=without_adapters
        )
        log_probs = partial(self._worker.log_probs, without_adapters=True)
        return measure(answers, self._questions, self._author, log_probs, self._encoder)
