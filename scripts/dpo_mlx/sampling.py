"""Answers sampled from a model, in batches that are seeded one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from . import signals
from .config import GenerationConfig
from .pairs import LENGTH, STOP

# Under this, too many draws would fall outside the nucleus.
LEAST_TOP_P = 0.5


@dataclass(frozen=True)
class Answer:
    """A sampled answer, why it stopped (pairs.STOP or LENGTH), and its length in tokens."""

    text: str
    finish: str
    tokens: int


def sample_batch(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    settings: GenerationConfig,
    seed: int,
    temperatures: list[float] | None = None,
) -> list[Answer]:
    """One answer a prompt (token ids), all at once; the same seed and prompts give the same.

    `temperatures` are the prompts' own; None is settings.temperature for all. mlx-lm's
    `batch_generate` does not tell why an answer stopped, so its generator is run here.
    """
    mx.random.seed(seed)
    generator = BatchGenerator(
        model,
        max_tokens=settings.max_tokens,
        stop_tokens=[[i] for i in sorted(tokenizer.eos_token_ids)],
        completion_batch_size=len(prompts),
        prefill_batch_size=len(prompts),
    )
    wanted = temperatures or [settings.temperature] * len(prompts)
    samplers = {t: sampler(t, settings.top_p) for t in set(wanted)}
    uids = generator.insert(prompts, samplers=[samplers[t] for t in wanted])
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    finish = dict.fromkeys(uids, LENGTH)
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason == "stop":
                finish[response.uid] = STOP
            else:
                tokens[response.uid].append(response.token)
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


def sample_all(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    settings: GenerationConfig,
    seed: int,
    done: Callable[[int, list[Answer]], None] = lambda batch, answers: None,
    known: dict[int, list[Answer]] | None = None,
) -> list[Answer]:
    """One answer a prompt, in batches of settings.batch_size, in the order given.

    Calls done(batch, answers) after each batch; batches in `known` are taken from there.
    """
    answers: list[Answer] = []
    for batch, start in enumerate(range(0, len(prompts), settings.batch_size)):
        chunk = prompts[start : start + settings.batch_size]
        made = (known or {}).get(batch)
        if made is None:
            signals.check()
            made = sample_batch(model, tokenizer, chunk, settings, batch_seed(seed, batch))
            done(batch, made)
        answers += made
    return answers
