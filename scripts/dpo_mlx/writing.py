"""What a model writes to questions it has not seen, measured: its voice and its fluency."""

from __future__ import annotations

import mlx.nn as nn
import numpy as np

from . import models, voice
from .config import Config
from .engine import Engine
from .pairs import STOP, Encoder, Pair
from .sampling import Answer, sample_batch
from .voice import VoiceClassifier

# Numbers by name: "voice" (mean score 0 to 1), "distinct2", "longest_loop" (words), "self_ended"
# (share), "base_logprob_per_token" (nats), "median_tokens".
Measures = dict[str, float]

# Before the names of the measures of greedy answers.
GREEDY = "greedy_"


def measure(
    answers: list[Answer],
    asked: list[Pair],
    classifier: VoiceClassifier,
    base: Engine,
    encoder: Encoder,
) -> Measures:
    """The means over the answers to `asked`, one each; `base` scores them as the base model."""
    texts = [answer.text for answer in answers]
    return {
        "voice": float(classifier.probability(texts).mean()),
        "distinct2": float(np.mean([voice.distinct_bigrams(text) for text in texts])),
        "longest_loop": float(np.mean([voice.longest_loop(text) for text in texts])),
        "self_ended": float(np.mean([answer.finish == STOP for answer in answers])),
        "base_logprob_per_token": _log_prob_per_token(answers, asked, base, encoder),
        "median_tokens": float(np.median([answer.tokens for answer in answers])),
    }


def _log_prob_per_token(
    answers: list[Answer], asked: list[Pair], base: Engine, encoder: Encoder
) -> float:
    """Nats a token, the mean of the answers' own means; -inf when nothing was written."""
    found = []
    for pair, answer in zip(asked, answers, strict=True):
        sequence = encoder.sequence(pair.prompt, answer.text, answer.finish)
        if sequence.answer_length:
            found.append(base.log_prob(sequence) / sequence.answer_length)
    return float(np.mean(found)) if found else float("-inf")


class Watch:
    """Asks held-out questions of a model while it is trained, and measures the answers.

    Each is answered twice: sampled as stage 06 samples, and greedily. Sampling seeds MLX's random
    state.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        classifier: VoiceClassifier,
        asked: list[Pair],
        config: Config,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._classifier = classifier
        self._asked = asked
        self._generation = config.generation
        self._seed = config.seed
        self._engine = Engine(model)

    def __call__(self) -> Measures:
        """The measures of what the model writes now; those of greedy answers after GREEDY."""
        self._model.eval()
        sampled, greedy = self._answers()
        with models.adapters_off(self._model):
            own, likeliest = (
                measure(answers, self._asked, self._classifier, self._engine, self._encoder)
                for answers in (sampled, greedy)
            )
        return own | {f"{GREEDY}{name}": value for name, value in likeliest.items()}

    def base(self) -> Measures:
        """The same of the model without its adapters."""
        with models.adapters_off(self._model):
            return self()

    def _answers(self) -> tuple[list[Answer], list[Answer]]:
        prompts = [self._encoder.prompt(pair.prompt) for pair in self._asked]
        count = len(prompts)
        answers = sample_batch(
            self._model,
            self._encoder.tokenizer,
            [*prompts, *prompts],
            self._generation,
            self._seed,
            [self._generation.temperature] * count + [0.0] * count,
        )
        return answers[:count], answers[count:]
