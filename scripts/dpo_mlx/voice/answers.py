"""Measures the voice and the fluency of a model's answers to held-out questions."""

from __future__ import annotations

from functools import partial

import numpy as np

from ..config import GenerationConfig
from ..data.encoding import Encoder
from ..data.pairs import STOP, Pair
from ..model.sampling import EVALUATED_AT_ONCE, Answer, batches
from ..parallel.worker import Worker
from .fluency import distinct_bigrams, longest_loop
from .sense import LogProbs, log_probs_per_token, other_questions, sense
from .voice_classifier import VoiceClassifier

# Values by name: "voice" (mean score, 0 to 1), "distinct2" (share of word pairs that are
# different), "longest_loop" (words), "self_ended" (share of answers), "base_logprob_per_token" and
# "sense" (nats), "median_tokens".
Measures = dict[str, float]

NAMES = (
    "voice",
    "distinct2",
    "longest_loop",
    "self_ended",
    "base_logprob_per_token",
    "sense",
    "median_tokens",
)


def measure(
    answers: list[Answer],
    questions: list[Pair],
    classifier: VoiceClassifier,
    log_probs: LogProbs,
    encoder: Encoder,
) -> Measures:
    """The means over answers, one for each question. `log_probs` are the base model's.

    "base_logprob_per_token" is -inf when every answer is empty.
    """
    texts = [answer.text for answer in answers]
    after_own, after_other = (
        log_probs_per_token(asked, answers, log_probs, encoder)
        for asked in (questions, other_questions(questions))
    )
    return {
        "voice": float(classifier.probability(texts).mean()),
        "distinct2": float(np.mean([distinct_bigrams(text) for text in texts])),
        "longest_loop": float(np.mean([longest_loop(text) for text in texts])),
        "self_ended": float(np.mean([answer.finish == STOP for answer in answers])),
        "base_logprob_per_token": _mean_of_numbers(after_own),
        "sense": float(sense(after_own, after_other).mean()),
        "median_tokens": float(np.median([answer.tokens for answer in answers])),
    }


def _mean_of_numbers(values: np.ndarray) -> float:
    """The mean without NaN, which stands for an empty answer; -inf when nothing else is there."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("-inf")


class AnswerEvaluator:
    """Asks a model held-out questions while it trains, and measures its answers.

    The model answers as it does in stage 06. Sampling seeds MLX's random state.
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
        """The measures of the model's answers now."""
        return self._measures(without_adapters=False)

    def base(self) -> Measures:
        """The same measures for the model without its adapters."""
        return self._measures(without_adapters=True)

    def _measures(self, without_adapters: bool) -> Measures:
        prompts = [self._encoder.prompt_ids(question.prompt) for question in self._questions]
        by_batch = self._worker.answers(
            batches(prompts, EVALUATED_AT_ONCE, self._seed), self._generation, without_adapters
        )
        answers = [answer for batch in by_batch for answer in batch]
        log_probs = partial(self._worker.log_probs, without_adapters=True)
        return measure(answers, self._questions, self._classifier, log_probs, self._encoder)
