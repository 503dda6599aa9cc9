"""What training cost: how far a tuned model is from the base model outside the voice.

Three measures on tasks that have nothing to do with the voice: the divergence of the tuned model
from the base model, the share of instructions that it follows, and the share of multiple-choice
questions that it answers right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..config import GenerationConfig
from ..data.encoding import EncodedAnswer, Encoder
from ..files import jsonl, schema
from ..files.errors import UserError
from ..files.schema import Count, Share
from ..files.text import shown
from ..model.sampling import batches
from ..parallel.worker import Worker, answer_all
from ..process import signals
from . import intervals
from .choices import Choice, check_choices
from .instructions import Rule, parse_rule
from .intervals import IntervalValues

FOLDER = Path(__file__).resolve().parents[3] / "data" / "cost"
REMEDY = "put back the file that came with this project"

# Tokens of an answer at most, and about how many a prompt and its answer have together.
MAX_TOKENS, USUAL_TOKENS = 64, 90
# Draws from the model's own distribution, which the estimate of the divergence needs. Greedy
# answers use only the length.
SETTINGS = GenerationConfig(temperature=1.0, top_p=1.0, max_tokens=MAX_TOKENS)
# Standard errors on both sides of a 95% interval.
Z_95 = 1.96


@dataclass(frozen=True)
class Instruction:
    """A prompt, and the rule that checks whether an answer follows it."""

    prompt: str
    rule: Rule


@dataclass(frozen=True)
class Tasks:
    """What a model is measured on: prompts for the divergence, instructions and choices."""

    prompts: list[str]
    instructions: list[Instruction]
    choices: list[Choice]


@dataclass(frozen=True)
class ModelResults:
    """One model's log-probs of the base model's answers, in nats, and which instructions it
    followed and which choices it got right.
    """

    log_probs: list[float]
    instructions: list[bool]
    choices: list[bool]


class Comparison(TypedDict):
    """The share of tasks that each model did, of `tasks`. `lost` counts those that only the base
    model did, `gained` those that only the tuned model did. `change` is the tuned model's share
    minus the base model's.
    """

    base: Share
    tuned: Share
    tasks: Count
    lost: Count
    gained: Count
    change: IntervalValues


class Cost(TypedDict):
    """What training cost, for report.json. `divergence` is in nats per token."""

    divergence: IntervalValues
    instructions: Comparison
    choices: Comparison


class _PromptRow(TypedDict):
    prompt: str


class _InstructionRow(_PromptRow):
    rule: dict[str, Any]


def load(limit: int | None = None, folder: Path = FOLDER) -> Tasks:
    """Read the tasks that come with this project, at most `limit` of each kind.

    Raises UserError with `path:line` for a damaged file.
    """
    return Tasks(
        read_prompts(folder / "prompts.jsonl")[:limit],
        _read(folder / "instructions.jsonl", _instruction)[:limit],
        _read(folder / "choices.jsonl", _choice)[:limit],
    )


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file that comes with this project. Raises UserError for a damaged file."""
    prompts: list[str] = _read(path, _prompt)
    return prompts


def base_answers(
    worker: Worker,
    encoder: Encoder,
    prompts: Sequence[str],
    batch_size: int,
    seed: int,
    without_adapters: bool = False,
) -> list[EncodedAnswer]:
    """The base model's answers to prompts, at most MAX_TOKENS long, for `divergence` and
    for replay.

    They are kept as token ids: the ids of their texts can differ, and the estimate is unbiased only
    for the ids that were sampled. Seeds MLX's random state.
    """
    signals.check()
    encoded = [encoder.prompt_ids(prompt) for prompt in prompts]
    sampled = worker.sequences(batches(encoded, batch_size, seed), SETTINGS, without_adapters)
    return [answer for batch in sampled for answer in batch]


def divergence(
    answers: Sequence[EncodedAnswer], base: Sequence[float], tuned: Sequence[float]
) -> IntervalValues:
    """KL(base || tuned) in nats per token, from both models' log-probs of the base model's answers,
    of which there must be two or more.

    Monte Carlo: the mean of log p_base - log p_tuned over the answers' tokens. It is a ratio of two
    sums over answers, so its standard error is that of a ratio estimator (Cochran 1977, "Sampling
    Techniques", section 2.11): with d_i nats and t_i tokens of n answers and r = sum d / sum t,
    SE^2 = sum (d_i - r t_i)^2 / (n (n - 1) mean(t)^2). The estimate can be just below 0.
    """
    tokens = np.array([answer.answer_length for answer in answers])
    nats = np.subtract(base, tuned)
    value = nats.sum() / tokens.sum()
    count = len(answers)
    residuals = nats - value * tokens
    error = math.sqrt((residuals**2).sum() / (count * (count - 1))) / tokens.mean()
    return {
        "value": float(value),
        "low": float(value - Z_95 * error),
        "high": float(value + Z_95 * error),
    }


def measure(
    worker: Worker,
    encoder: Encoder,
    tasks: Tasks,
    answers: list[EncodedAnswer],
    batch_size: int,
) -> ModelResults:
    """The results of the model in memory. `answers` are `base_answers` to the tasks' prompts."""
    return ModelResults(
        worker.log_probs(answers),
        check_instructions(worker, encoder, tasks.instructions, batch_size),
        check_choices(worker.model, encoder, tasks.choices),
    )


def check_instructions(
    worker: Worker, encoder: Encoder, instructions: Sequence[Instruction], batch_size: int
) -> list[bool]:
    """Whether the model's greedy answer to each instruction follows it."""
    prompts = [encoder.prompt_ids(instruction.prompt) for instruction in instructions]
    settings = replace(SETTINGS, batch_size=batch_size)
    answers = answer_all(worker, prompts, settings, seed=0, greedy=True)
    return [
        instruction.rule.is_followed(answer)
        for instruction, answer in zip(instructions, answers, strict=True)
    ]


def compare(answers: Sequence[EncodedAnswer], base: ModelResults, tuned: ModelResults) -> Cost:
    """What the tuned model lost and gained against the base model."""
    return {
        "divergence": divergence(answers, base.log_probs, tuned.log_probs),
        "instructions": _compare(base.instructions, tuned.instructions),
        "choices": _compare(base.choices, tuned.choices),
    }


def _compare(base: Sequence[bool], tuned: Sequence[bool]) -> Comparison:
    pairs = list(zip(base, tuned, strict=True))
    return {
        "base": float(np.mean(base)),
        "tuned": float(np.mean(tuned)),
        "tasks": len(pairs),
        "lost": pairs.count((True, False)),
        "gained": pairs.count((False, True)),
        "change": intervals.difference(np.array(tuned, float), np.array(base, float)).values,
    }


def _prompt(row: dict[str, Any]) -> str:
    prompt = schema.parse(row, _PromptRow)["prompt"]
    if not prompt.strip():
        raise ValueError('"prompt" is empty')
    return prompt


def _instruction(row: dict[str, Any]) -> Instruction:
    rule = schema.parse(row, _InstructionRow)["rule"]
    return Instruction(_prompt(row), parse_rule(rule))


def _choice(row: dict[str, Any]) -> Choice:
    return schema.parse(row, Choice)


def _read(path: Path, parse: Any) -> list[Any]:
    """Each row of a file, parsed. `parse` raises ValueError for a wrong row."""
    tasks = []
    for line, row in jsonl.read(path, REMEDY):
        try:
            tasks.append(parse(row))
        except ValueError as error:
            raise UserError(f"{shown(path)}:{line}: {error}; {REMEDY}") from error
    return tasks
