"""What a model writes to questions it has not seen, measured: its voice and its fluency."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from . import voice
from .config import GenerationConfig
from .pairs import STOP, Encoder, Pair, Sequence
from .sampling import EVALUATED_AT_ONCE, Answer, batches
from .voice import VoiceClassifier
from .worker import Worker

# Numbers by name: "voice" (mean score 0 to 1), "distinct2", "longest_loop" (words), "self_ended"
# (share), "base_logprob_per_token" (nats), "median_tokens".
Measures = dict[str, float]

# Sequences to their log-probs: Worker.log_probs.
LogProbs = Callable[[list[Sequence]], list[float]]

# Before the names of the measures of greedy answers.
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
    asked: list[Pair],
    classifier: VoiceClassifier,
    log_probs: LogProbs,
    encoder: Encoder,
) -> Measures:
    """The means over the answers to `asked`, one each; `log_probs` are the base model's."""
    texts = [answer.text for answer in answers]
    return {
        "voice": float(classifier.probability(texts).mean()),
        "distinct2": float(np.mean([voice.distinct_bigrams(text) for text in texts])),
        "longest_loop": float(np.mean([voice.longest_loop(text) for text in texts])),
        "self_ended": float(np.mean([answer.finish == STOP for answer in answers])),
        "base_logprob_per_token": _log_prob_per_token(answers, asked, log_probs, encoder),
        "median_tokens": float(np.median([answer.tokens for answer in answers])),
    }


def _log_prob_per_token(
    answers: list[Answer], asked: list[Pair], log_probs: LogProbs, encoder: Encoder
) -> float:
    """Nats a token, the mean of the answers' own means; -inf when nothing was written."""
    both = zip(asked, answers, strict=True)
    sequences = [encoder.sequence(pair.prompt, a.text, a.finish) for pair, a in both]
    written = [sequence for sequence in sequences if sequence.answer_length]
    found = zip(log_probs(written), written, strict=True)
    means = [log_prob / sequence.answer_length for log_prob, sequence in found]
    return float(np.mean(means)) if means else float("-inf")


class Watch:
    """Asks held-out questions of a model while it is trained, and measures the answers.

    Each is answered twice: sampled as stage 06 samples, and greedily. Sampling seeds MLX's random
    state.
    """

    def __init__(
        self,
        worker: Worker,
        encoder: Encoder,
        classifier: VoiceClassifier,
        asked: list[Pair],
        generation: GenerationConfig,
        seed: int,
    ) -> None:
        self._worker = worker
        self._encoder = encoder
        self._classifier = classifier
        self._asked = asked
        self._generation = generation
        self._seed = seed

    def __call__(self) -> Measures:
        """The measures of what the model writes now; those of greedy answers after GREEDY."""
        return self._measures(plain=False)

    def base(self) -> Measures:
        """The same of the model without its adapters."""
        return self._measures(plain=True)

    def _measures(self, plain: bool) -> Measures:
        prompts = [self._encoder.prompt(pair.prompt) for pair in self._asked]
        sampled, greedy = (
            batches(prompts, EVALUATED_AT_ONCE, self._seed, how) for how in (False, True)
        )
        made = self._worker.answers([*sampled, *greedy], self._generation, plain)
        answers = [answer for batch in made for answer in batch]
        log_probs = partial(self._worker.log_probs, plain=True)
        own, likeliest = (
            measure(given, self._asked, self._classifier, log_probs, self._encoder)
            for given in (answers[: len(prompts)], answers[len(prompts) :])
        )
        return own | {f"{GREEDY}{name}": value for name, value in likeliest.items()}
