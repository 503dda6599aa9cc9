"""Answers sampled from a model, in batches that are seeded one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from ..config import GenerationConfig
from ..data.pairs import LENGTH, STOP
from ..files.schema import Count, OneOf

# An answer may be as long as this share of the real ones, up to the next multiple of STEP tokens.
LONGEST, STEP = 95, 64

# Questions that an evaluation answers at once. Few, because training holds most of the memory, and
# train.eval_questions may be large.
EVALUATED_AT_ONCE = 8

# Under this, too many draws would fall outside the nucleus.
LEAST_TOP_P = 0.5


@dataclass(frozen=True)
class Answer:
    """A sampled answer, why it stopped (pairs.STOP or LENGTH), and its length in tokens."""

    text: str
    finish: Annotated[str, OneOf((STOP, LENGTH))]
    tokens: Count


@dataclass(frozen=True)
class Batch:
    """Prompts (token ids) that are answered at once, and their seed; `greedy` always takes the
    likeliest token.
    """

    prompts: list[list[int]]
    seed: int
    greedy: bool = False


def sample_batch(
    model: nn.Module, tokenizer: Any, batch: Batch, settings: GenerationConfig
) -> list[Answer]:
    """One answer a prompt, all at once; the same batch gives the same.

    `settings.max_tokens` is a number (see `limited`). mlx-lm's `batch_generate` does not tell why
    an answer stopped, so its generator is run here.
    """
    assert settings.max_tokens is not None
    mx.random.seed(batch.seed)
    prompts = batch.prompts
    generator = BatchGenerator(
        model,
        max_tokens=settings.max_tokens,
        stop_tokens=[[i] for i in sorted(tokenizer.eos_token_ids)],
        completion_batch_size=len(prompts),
        prefill_batch_size=len(prompts),
    )
    choose = sampler(0.0 if batch.greedy else settings.temperature, settings.top_p)
    uids = generator.insert(prompts, samplers=[choose] * len(prompts))
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    finish = dict.fromkeys(uids, LENGTH)
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason == "stop":
                finish[response.uid] = STOP
            else:
                tokens[response.uid].append(response.token)
    mx.synchronize(generator.stream)  # raises here if a GPU command failed
    generator.close()
    return [_answer(tokenizer, tokens[uid], finish[uid]) for uid in uids]


def sampler(temperature: float, top_p: float) -> Callable[[mx.array], mx.array]:
    """Log-probs [batch, vocabulary] to sampled tokens [batch], distributed as by mlx-lm's sampler.

    mlx-lm's sorts the vocabulary at each token, which on a CPU takes as long as the model. Here a
    token is drawn from the whole vocabulary, and again while the tokens more probable than it hold
    `top_p` already (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751): the same
    distribution without a sort. Where few draws would be accepted, mlx-lm's is taken.
    """
    if temperature == 0 or not LEAST_TOP_P <= top_p < 1:
        return make_sampler(temp=temperature, top_p=top_p)

    def sample(log_probs: mx.array) -> mx.array:
        # With 100,000 tokens, bfloat16 gets the sum and the small probabilities wrong.
        log_probs = log_probs.astype(mx.float32)
        log_probs = log_probs - mx.logsumexp(log_probs, axis=-1, keepdims=True)
        probs, tempered = mx.exp(log_probs), log_probs / temperature
        token = mx.random.categorical(tempered)
        while (outside := _mass_above(probs, token) >= top_p).any():
            token = mx.where(outside, mx.random.categorical(tempered), token)
        return token

    return sample


def _mass_above(probs: mx.array, token: mx.array) -> mx.array:
    """The probability of all tokens more probable than `token`, [batch]."""
    own = mx.take_along_axis(probs, token[:, None], axis=-1)
    return mx.where(probs > own, probs, 0).sum(axis=-1)


def _answer(tokenizer: Any, tokens: list[int], finish: str) -> Answer:
    # An answer cut between the bytes of one character decodes to U+FFFD at its end.
    text = tokenizer.decode(tokens).rstrip("\ufffd").strip()
    return Answer(text, finish, len(tokens))


def batch_seed(seed: int, batch: int) -> int:
    """The seed of one batch of a run."""
    return seed * 1_000_003 + batch


def limited(settings: GenerationConfig, chosen: list[int]) -> GenerationConfig:
    """The settings with `max_tokens`; where it is null, so that nearly all of the chosen answers,
    which have these lengths in tokens, would fit. In steps, that a few more answers change nothing.
    """
    if settings.max_tokens is not None:
        return settings
    steps = math.ceil(np.percentile(chosen, LONGEST) / STEP)
    return replace(settings, max_tokens=steps * STEP)


def batches(prompts: list[list[int]], size: int, seed: int, greedy: bool = False) -> list[Batch]:
    """The prompts in batches of `size`, in the order given."""
    return [
        Batch(prompts[start : start + size], batch_seed(seed, number), greedy)
        for number, start in enumerate(range(0, len(prompts), size))
    ]
