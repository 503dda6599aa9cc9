"""Samples answers from a model in batches. Each batch has its own seed."""

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

# Default limit of an answer's length: this percentile of the chosen answers' lengths, rounded up to
# a multiple of STEP tokens.
LENGTH_PERCENTILE, STEP = 95, 64

# Questions that an evaluation answers at once. Few, because training uses most of the memory.
EVALUATED_AT_ONCE = 8

# With a smaller top_p, too many draws would fall outside the nucleus.
MIN_TOP_P = 0.5


@dataclass(frozen=True)
class Answer:
    """A sampled answer, why it stopped (pairs.STOP or LENGTH), and its length in tokens."""

    text: str
    finish: Annotated[str, OneOf((STOP, LENGTH))]
    tokens: Count


@dataclass(frozen=True)
class Batch:
    """Prompts (token ids) to answer at once, and their seed.

    `greedy` always takes the likeliest token.
    """

    prompts: list[list[int]]
    seed: int
    greedy: bool = False


def sample_batch(
    model: nn.Module, tokenizer: Any, batch: Batch, settings: GenerationConfig
) -> list[Answer]:
    """Sample one answer per prompt, all at once. The same batch gives the same answers.

    `settings.max_tokens` must be a number; see `with_max_tokens`.
    """
    return [_answer(tokenizer, ids) for ids in sample_ids(model, tokenizer, batch, settings)]


def sample_ids(
    model: nn.Module, tokenizer: Any, batch: Batch, settings: GenerationConfig
) -> list[list[int]]:
    """The same answers as token ids. An answer that ended by itself has its stop token at the end.

    mlx-lm's `batch_generate` does not return why an answer stopped, so this runs its generator.
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
    ids: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            ids[response.uid].append(response.token)
    mx.synchronize(generator.stream)  # raises here if a GPU command failed
    generator.close()
    return [ids[uid] for uid in uids]


def sampler(temperature: float, top_p: float) -> Callable[[mx.array], mx.array]:
    """A function from log-probs [batch, vocabulary] to sampled tokens [batch].

    It has the same distribution as mlx-lm's sampler (nucleus sampling, Holtzman et al. 2020,
    arXiv:1904.09751). mlx-lm sorts the vocabulary for every token, which on a CPU takes as long as
    the model. This one draws a token from the whole vocabulary, and draws again while the more
    probable tokens already have a mass of `top_p`. For a small `top_p`, which would reject most
    draws, it returns mlx-lm's sampler.
    """
    if temperature == 0 or not MIN_TOP_P <= top_p < 1:
        return make_sampler(temp=temperature, top_p=top_p)

    def sample(log_probs: mx.array) -> mx.array:
        # bfloat16 is too coarse for sums over 100,000 tokens and for small probabilities.
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
    token_probs = mx.take_along_axis(probs, token[:, None], axis=-1)
    return mx.where(probs > token_probs, probs, 0).sum(axis=-1)


def _answer(tokenizer: Any, ids: list[int]) -> Answer:
    finish = STOP if ids[-1] in tokenizer.eos_token_ids else LENGTH
    tokens = ids[:-1] if finish == STOP else ids
    # An answer cut within the bytes of a character ends with U+FFFD.
    text = tokenizer.decode(tokens).rstrip("\ufffd").strip()
    return Answer(text, finish, len(tokens))


def batch_seed(seed: int, batch: int) -> int:
    """The seed of a batch, from the run's seed and the batch's number."""
    return seed * 1_000_003 + batch


def with_max_tokens(settings: GenerationConfig, chosen_lengths: list[int]) -> GenerationConfig:
    """The settings with a number for `max_tokens`.

    If it is null, nearly all chosen answers fit, whose lengths in tokens are `chosen_lengths`. The
    number is a multiple of STEP, so a few more answers do not change it.
    """
    if settings.max_tokens is not None:
        return settings
    steps = math.ceil(np.percentile(chosen_lengths, LENGTH_PERCENTILE) / STEP)
    return replace(settings, max_tokens=steps * STEP)


def batches(prompts: list[list[int]], size: int, seed: int, greedy: bool = False) -> list[Batch]:
    """Split the prompts into batches of `size`, in order."""
    return [
        Batch(prompts[start : start + size], batch_seed(seed, number), greedy)
        for number, start in enumerate(range(0, len(prompts), size))
    ]
