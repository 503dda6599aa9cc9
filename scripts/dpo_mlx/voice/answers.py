"""Measures the voice and the fluency of a model's answers to held-out questions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ..config import GenerationConfig
from ..data.encoding import EncodedAnswer, Encoder
from ..data.pairs import STOP, Pair
from ..model.sampling import EVALUATED_AT_ONCE, Answer, batches
from ..parallel.worker import Worker
from .fluency import distinct_bigrams, longest_loop
from .voice_classifier import VoiceClassifier

# Values by name: "voice" (mean score, 0 to 1), "distinct2" (share of word pairs that are
# different), "longest_loop" (words), "self_ended" (share of answers), "base_logprob_per_token"
# (nats), "median_tokens".
Measures = dict[str, float]

# Sequences to their log-probs, in nats, as Worker.log_probs.
LogProbs = Callable[[list[EncodedAnswer]], list[float]]

# The measures of greedy answers have this before their names.
GREEDY = "greedy_"
NAMES = (
    "voice",
    "distinct2",
    "longest_loop",
    "self_ended",
    "base_logprob_per_token",
    "median_tokens",
)


def measure(
    answers: list[Answer],
    questions: list[Pair],
    classifier: VoiceClassifier,
    log_probs: LogProbs,
    encoder: Encoder,
) -> Measures:
    """The means over answers, one for each question. `log_probs` are the base model's."""
    texts = [answer.text for answer in answers]
    return {
        "voice": float(classifier.probability(texts).mean()),
        "distinct2": float(np.mean([distinct_bigrams(text) for text in texts])),
        "longest_loop": float(np.mean([longest_loop(text) for text in texts])),
        "self_ended": float(np.mean([answer.finish == STOP for answer in answers])),
        "base_logprob_per_token": _log_prob_per_token(answers, questions, log_probs, encoder),
        "median_tokens": float(np.median([answer.tokens for answer in answers])),
    }


def _log_prob_per_token(
    answers: list[Answer], questions: list[Pair], log_probs: LogProbs, encoder: Encoder
) -> float:
    """The mean over answers of each answer's own mean, in nats per token.

    -inf when every answer is empty.
    """
    sequences = [
        encoder.encode(question.prompt, answer.text, answer.finish)
        for question, answer in zip(questions, answers, strict=True)
    ]
    sequences = [sequence for sequence in sequences if sequence.answer_length]
    values = zip(log_probs(sequences), sequences, strict=True)
    means = [log_prob / sequence.answer_length for log_prob, sequence in values]
    return float(np.mean(means)) if means else float("-inf")


class AnswerEvaluator:
    """Asks a model held-out questions while it trains, and measures its answers.

    The model answers each question twice: sampled as stage 06 samples, and greedily. Sampling
    seeds MLX's random state.
    """

    def __init__(
        self,
        worker: Worker,
        encoder: Encoder,
        classifier: VoiceClassifier,
        questions: list[Pair],
        generation: GenerationConfig,
        seed: int,
    ) -> None:
        self._worker = worker
        self._encoder = encoder
        self._classifier = classifier
        self._questions = questions
        self._generation = generation
        self._seed = seed

    def __call__(self) -> Measures:
        """The measures of the model's answers now. Those of greedy answers start with GREEDY."""
        return self._measures(without_adapters=False)

    def base(self) -> Measures:
        """The same measures for the model without its adapters."""
        return self._measures(without_adapters=True)

    def _measures(self, without_adapters: bool) -> Measures:
        prompts = [self._encoder.prompt_ids(question.prompt) for question in self._questions]
        sampled, greedy = (
            batches(prompts, EVALUATED_AT_ONCE, self._seed, greedy) for greedy in (False, True)
        )
        by_batch = self._worker.answers([*sampled, *greedy], self._generation, without_adapters)
        answers = [answer for batch in by_batch for answer in batch]
        measures = self._measure(answers[: len(prompts)])
        greedy_measures = self._measure(answers[len(prompts) :])
        return measures | {f"{GREEDY}{name}": value for name, value in greedy_measures.items()}

    def _measure(self, answers: list[Answer]) -> Measures:
        log_probs = partial(self._worker.log_probs, without_adapters=True)
        return measure(answers, self._questions, self._classifier, log_probs, self._encoder)
