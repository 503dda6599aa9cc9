"""Check that this machine does what the pipeline relies on: the chain on a tiny random Granite.

Devices differ in how they round, schedule and count memory, and we have tested few of them. Each
check below must hold on every device.
"""

from __future__ import annotations

import io
import math
import platform
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .. import config as configs
from ..config import Config, GenerationConfig
from ..data.encoding import EncodedAnswer, Encoder
from ..data.pairs import Pair
from ..files import digest, jsonl, ownership, results
from ..files.errors import UserError
from ..files.model_files import ADAPTERS
from ..files.ownership import Status
from ..model import device, tiny_granite
from ..model.adapters import copy_adapters
from ..model.gradient_checkpointing import gradient_checkpointing
from ..model.loading import load_model
from ..model.sampling import Batch, sample_batch
from ..parallel import distributed
from ..scoring import memory
from ..scoring.losses import Sides
from ..scoring.objectives import DPO, Dpo, Example
from ..scoring.scorer import MIN_DIFFERENCE
from ..training.checkpoint import Checkpoints
from .evaluate import evaluate
from .fuse_adapters import fuse_adapters
from .make_pairs import make_pairs
from .train_dpo import train_dpo

# Nats that a sequence's log-prob may move before the first update, as in training.
START_TOLERANCE = MIN_DIFFERENCE
# Nats that a token's log-prob may differ between two ways to compute it in bfloat16. On the tiny
# model 0.03 to 0.08 is usual; a lost Mamba state moves it by 1 to 4, a lost attention mask by 0.3.
TOKEN_TOLERANCE = 0.2
# Share by which the peak may exceed the memory plan; the plan's own tests allow the same.
PLAN_TOLERANCE = 0.15

WORDS = ("odd", "red", "hot", "big", "shy", "dry", "sad", "new")
# Prompts of unequal lengths, so that in a batch the short ones are mostly padding.
PROMPTS = (
    "Why?",
    "So?",
    "Who?",
    "Why is number 3 red, and what follows from it?",
    "What is a hot day like, and a wet one, a dry one, a cold one, a long one and a short one?",
    "Who says so, and to whom, in which words?",
)
ANSWER_TOKENS = 24


class Fault(Exception):
    """A check that failed, with the number it measured."""


def run(mark: Path) -> bool:
    """Print a line for each check and the verdict; return whether all of them passed.

    Writes `mark`, which says what was tested and when, or removes it if a check failed.
    """
    started = time.perf_counter()
    machine = describe_machine()
    for name, value in machine.items():
        print(f"{name:10}{value}")
    with TemporaryDirectory(prefix="dpo-selftest-") as folder:
        config = make_run(Path(folder))
        failed = [name for name, check in CHECKS.items() if not _holds(name, check, config)]
    seconds = time.perf_counter() - started
    if failed:
        if ownership.status(mark) is Status.OURS:
            mark.unlink()
        print(
            f"failed: {len(failed)} of {len(CHECKS)} checks, in {seconds:.0f} s. Please report all "
            "lines above: they show where this machine differs."
        )
        return False
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    if ownership.status(mark) in (Status.ABSENT, Status.OURS):
        jsonl.write_json(mark, {**machine, "date": date, "seconds": round(seconds)})
    print(f"passed: all {len(CHECKS)} checks, in {seconds:.0f} s")
    return True


def describe_machine() -> dict[str, str]:
    """What a bug report must say about the machine."""
    macos = platform.mac_ver()[0]
    return {
        "device": device.name(),
        "memory": f"{device.available() / 1e9:.2f} GB offered",
        "system": f"macOS {macos} {platform.machine()}" if macos else platform.platform(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
    }


def _holds(name: str, check: Callable[[Config], str], config: Config) -> bool:
    """Print a check's line and return whether it passed. Drops the stages' own output."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            result, holds = check(config), True
    except Exception as error:  # any error is a finding to report
        result, holds = _reason(error), False
    print(f"{'ok  ' if holds else 'FAIL'} {name} ({result})", flush=True)
    return holds


def _reason(error: Exception) -> str:
    text = "; ".join(str(error).splitlines())
    if isinstance(error, Fault | UserError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text}, at {Path(place.filename).name}:{place.lineno}"


def make_run(folder: Path) -> Config:
    """A run in `folder` that takes seconds, with its own model and rows."""
    source, pairs = folder / "source.jsonl", folder / "pairs"
    rows = [
        {"question": f"Why is number {i} {word}?", "answer": f"**{word}!** So take {i} {word}s."}
        for i, word in enumerate(WORDS * 4)
    ]
    jsonl.write(source, rows)
    return configs.from_values(
        {
            "model": str(tiny_granite.folder(folder / "model")),
            "run_dir": str(folder / "run"),
            "data": {
                "source": str(source),
                "train_pairs": str(pairs / "train.jsonl"),
                "valid_pairs": str(pairs / "valid.jsonl"),
                "valid_fraction": 0.25,
                "max_length": 256,
            },
            "generation": {"max_tokens": ANSWER_TOKENS},
            "lora": {"rank": 4},
            "sft": {"epochs": 1, "learning_rate": 1e-3},
            "train": {"learning_rate": 1e-3, "grad_accumulation": 4, "save_every": 3},
            # A random model has no voice and no fluency to lose.
            "guard": {"enabled": False},
            "smoke": {"questions": 4, "unrelated_tasks": 4},
        }
    )


def check_chain(config: Config) -> str:
    """All stages run to their end; the smoke test's verdict on a random model means nothing."""
    started = time.perf_counter()
    make_pairs(config)
    if not train_dpo(config):
        raise Fault("training was stopped")
    fuse_adapters(config)
    evaluate(config)
    return f"{time.perf_counter() - started:.0f} s"


def check_first_loss(config: Config) -> str:
    """Before DPO's first update the loss is ln 2 and the margin 0.

    The margin is beta times the difference of four log-probs, the loss moves half as much.
    """
    rows = jsonl.read_whole_lines(config.run.metrics)
    first = next((row for row in rows if row["phase"] == DPO and "loss" in row), None)
    if first is None:
        raise Fault("DPO made no update")
    loss, margin = first["loss"], first["rewards/margins"]
    measurement = f"loss - ln 2 = {loss - math.log(2):.1g}, margin {margin:.1g}"
    most = 4 * config.dpo.beta * START_TOLERANCE
    if not (abs(loss - math.log(2)) <= most / 2 and abs(margin) <= most):
        raise Fault(measurement)
    return measurement


def check_reference(config: Config) -> str:
    """The reference's scorer gives the log-probs that training sees before its first update."""
    loaded, worker = distributed.load(config, train=True)
    sequences = _sequences(Encoder.of(loaded.tokenizer, config))
    reference = worker.log_probs(sequences)
    policy = [float(worker.scorer.log_prob_and_gradient(s)[0]) for s in sequences]
    largest = max(abs(p - r) for p, r in zip(policy, reference, strict=True))
    measurement = f"largest difference {largest:.1g} nats per sequence"
    if not largest <= START_TOLERANCE:
        raise Fault(measurement)
    return measurement


def check_batch(config: Config) -> str:
    """Prompts answered in one batch get the answers that each would get alone.

    Two tokens may be equally likely up to rounding. So a token counts as wrong only if another one
    is clearly likelier in a pass over that prompt alone.
    """
    loaded = load_model(config.model)
    encoder = Encoder.of(loaded.tokenizer, config)
    settings = GenerationConfig(max_tokens=ANSWER_TOKENS)
    prompts = [encoder.prompt_ids(question) for question in PROMPTS]
    tokenizer = _Numbers(loaded.tokenizer.eos_token_ids)
    answers = sample_batch(loaded.model, tokenizer, Batch(prompts, 0, greedy=True), settings)
    largest = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [int(number) for number in answer.text.split()]
        log_probs = _log_probs(loaded.model, prompt + tokens)[len(prompt) - 1 : -1]
        gaps = log_probs.max(axis=-1) - _of_tokens(log_probs, tokens)
        largest = max(largest, float(gaps.max()))
    measurement = f"sampled tokens within {largest:.2g} nats of the likeliest"
    if not largest <= TOKEN_TOLERANCE:
        raise Fault(measurement)
    return measurement


def check_memory(config: Config) -> str:
    """The peak of an update of two pairs stays within the memory plan."""
    loaded, worker = distributed.load(config, train=True)
    question, answer = "Why is it so?", "**So it is.** " * 14
    pair = Encoder.of(loaded.tokenizer, config).pair(Pair(question, answer, answer.upper()))
    with gradient_checkpointing(worker.model, config.train.grad_checkpoint):
        plan = memory.training(worker.model, pair.chosen)
    device.release()
    others = mx.get_active_memory() - memory.nbytes(worker.model.parameters())
    mx.reset_peak_memory()
    worker.gradient(Dpo(config), [Example(pair, Sides(0.0, 0.0))] * 2, seed=0)
    peak = mx.get_peak_memory() - others
    measurement = f"peak {peak / 1e6:.1f} MB, plan {plan.total / 1e6:.1f} MB"
    if not 0 < peak <= (1 + PLAN_TOLERANCE) * plan.total:
        raise Fault(measurement)
    return measurement


def check_resume(config: Config) -> str:
    """A run that lost its last updates repeats them bit for bit."""
    again, last = replace(config, run_dir=f"{config.run_dir}-again"), _last_checkpoint(config)
    ignored = shutil.ignore_patterns(last.name, "adapters", "outcome.json", "fused")
    shutil.copytree(config.run.path, again.run.path, ignore=ignored)
    train_dpo(again)
    before: Any = mx.load(str(last / ADAPTERS))
    after: Any = mx.load(str(again.run.checkpoints / last.name / ADAPTERS))
    largest = max(float(mx.abs(before[name] - after[name]).max()) for name in before)
    measurement = f"largest difference {largest:.1g}"
    if largest != 0:
        raise Fault(measurement)
    return measurement


def check_fused(config: Config) -> str:
    """The fused model keeps as much of the adapters' margin as stage 11 asks for.

    Fuses the last update's adapters. The best checkpoint of a random model may be an untrained one,
    which has no margin.
    """
    adapters = config.run.adapters
    copy_adapters(_last_checkpoint(config), adapters)
    end = results.read_outcome(config.run)
    end = replace(end, adapters=digest.of_file(adapters / ADAPTERS))
    results.write_outcome(config.run, end)
    fuse_adapters(config)
    report = results.read_fuse_report(config.run)
    if report["margin_kept"] is None:
        raise Fault(f"the adapters' margin is only {report['margin_adapters']:.1g} nats")
    return f"kept {report['margin_kept']:.1%} of a margin of {report['margin_adapters']:.2f} nats"


def check_decoding(config: Config) -> str:
    """Decoding token by token with a cache gives the log-probs of one pass over all tokens.

    Metal has separate kernels for a single token, in Mamba blocks and in attention.
    """
    loaded = load_model(config.model)
    ids = list(_sequences(Encoder.of(loaded.tokenizer, config))[0].ids)
    cache, rows = make_prompt_cache(loaded.model), []
    for token in ids:
        rows.append(_log_probs(loaded.model, [token], cache))
        mx.eval(rows[-1])
    stepwise = _of_tokens(mx.concatenate(rows)[:-1], ids[1:])
    at_once = _of_tokens(_log_probs(loaded.model, ids)[:-1], ids[1:])
    largest = float(mx.abs(stepwise - at_once).max())
    measurement = f"largest difference {largest:.2g} nats per token"
    if not largest <= TOKEN_TOLERANCE:
        raise Fault(measurement)
    return measurement


CHECKS: dict[str, Callable[[Config], str]] = {
    "pairs, training, fusing and report": check_chain,
    "first DPO loss = ln 2, margin 0": check_first_loss,
    "reference = policy before the first update": check_reference,
    "batched sampling = one by one": check_batch,
    "memory of an update within the plan": check_memory,
    "checkpoint resumed = uninterrupted": check_resume,
    "fused = adapters": check_fused,
    "one token at a time = all at once": check_decoding,
}


class _Numbers:
    """Stands in for a tokenizer: an answer's text is the numbers of its tokens."""

    def __init__(self, eos_token_ids: set[int]) -> None:
        self.eos_token_ids = eos_token_ids

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def _last_checkpoint(config: Config) -> Path:
    last = Checkpoints(config.run.checkpoints).newest(DPO)
    if last is None:
        raise Fault("DPO wrote no checkpoint")
    return last


def _sequences(encoder: Encoder) -> list[EncodedAnswer]:
    """Answers of 60 to 240 tokens."""
    return [
        encoder.encode(question, "**So it is.** Take it as red. " * repeats)
        for question in PROMPTS[-2:]
        for repeats in (2, 4, 8)
    ]


def _log_probs(model: nn.Module, ids: list[int], cache: Any = None) -> mx.array:
    """The model's log-probs of the token after each position, [len(ids), vocabulary] float32."""
    logits = model(mx.array(ids)[None], cache=cache)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _of_tokens(log_probs: mx.array, tokens: list[int]) -> mx.array:
    """Each row's log-prob of its token, [len(tokens)]."""
    return mx.take_along_axis(log_probs, mx.array(tokens)[:, None], axis=-1)[:, 0]
