"""Answers sampled from a model, in batches that are seeded one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from .config import GenerationConfig
from .pairs import LENGTH, STOP


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
) -> list[Answer]:
    """One answer a prompt (token ids), all at once; the same seed and prompts give the same.

    mlx-lm's `batch_generate` does not tell why an answer stopped, so its generator is run here.
    """
    mx.random.seed(seed)
    generator = BatchGenerator(
        model,
        max_tokens=settings.max_tokens,
        stop_tokens=[[i] for i in sorted(tokenizer.eos_token_ids)],
        sampler=make_sampler(temp=settings.temperature, top_p=settings.top_p),
        completion_batch_size=len(prompts),
        prefill_batch_size=len(prompts),
    )
    uids = generator.insert(prompts)
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
            made = sample_batch(model, tokenizer, chunk, settings, batch_seed(seed, batch))
            done(batch, made)
        answers += made
    return answers
