"""Estimate what a run needs on this machine before it starts: download size, disk space, and each
stage's memory and minutes. A probe of a few seconds times the machine.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from mlx_lm.utils import get_total_parameters

from .. import config as configs
from ..config import Config
from ..data import questions, source
from ..data.encoding import EncodedAnswer, Encoder
from ..files import atomic, jsonl
from ..files.errors import UserError
from ..files.model_files import folder_of, is_hub_name
from ..model import device, fusing
from ..model.adapters import attach_lora
from ..model.gradient_checkpointing import gradient_checkpointing
from ..model.loading import LoadedModel, load_model
from ..model.sampling import EVALUATED_AT_ONCE, Batch, sample_batch
from ..parallel.worker import Worker
from ..process import signals
from ..process.supervisor import LAUNCH, has_cpu_for_two
from ..report.sections import OTHER_SYSTEM_QUESTIONS
from ..scoring import memory
from ..scoring.objectives import Dpo, Sft
from ..training import checkpoint, replay
from ..training.phases import PROMPTS
from ..training.schedule import count_updates
from ..training.trainer import updates_between_evaluations
from ..voice import cost as tasks
from .make_pairs import generation_settings, template_notes, usable_rows

T = TypeVar("T")

MAKE_PAIRS, TRAIN_DPO = "06_generate_dpo_pairs.py", "10_train_dpo.py"
FUSE, SMOKE = "11_fuse_adapters.py", "12_smoke_test.py"

# Tokens in an answer of the probe; pairs whose gradients the preflight computes.
PROBED_TOKENS, PREFLIGHT_PAIRS = 16, 12
# Writing a model takes about this many times as long as reading it.
WRITE_OVER_READ = 2.0


@dataclass(frozen=True)
class Workload:
    """The rows of a run, each a prompt with its chosen answer as token ids. `layers` is the total
    size of the layers to fuse, divided by the size of the largest.
    """

    train: list[EncodedAnswer]
    valid: list[EncodedAnswer]
    layers: float

    @property
    def rows(self) -> list[EncodedAnswer]:
        return self.train + self.valid


@dataclass(frozen=True)
class Cost:
    """What this machine needs for each piece of work, in seconds."""

    model: float  # load the model
    prompts: float  # read a batch of prompts
    step: float  # sample one more token of every answer in a batch
    scored_token: float  # score one token
    gradient_token: float  # compute a gradient, per token
    layer: float  # fuse the largest layer


def check_run(config: Config) -> None:
    """Print what the run needs, and write its minutes to `run_dir/plan.json`.

    Raises UserError when a stage would refuse to start, and when disk or memory are too small.
    """
    data = source.read(Path(config.data.source), config.data.skip_bad_rows)
    rows = data.questions
    for line in (data.description, *data.notes()):
        print(f"check: {line}")
    print(
        f"check: {device.name()}: {device.available() / 1e9:.2f} GB of memory for models; "
        f"MLX {version('mlx')}, mlx-lm {version('mlx-lm')}"
    )
    _print_download(config.model)
    loaded = load_model(config.model, lazy=True, scan_chunk=config.train.scan_chunk)
    encoder = Encoder.of(loaded.tokenizer, config)
    usable = usable_rows(rows, config, encoder, Counter())
    for note in template_notes(usable, config, encoder):
        print(f"check: note: {note}")
    sampled = replace(config, generation=generation_settings(rows, config, encoder))
    splits: tuple[list[EncodedAnswer], list[EncodedAnswer]] = [], []
    for row in usable:
        held_out = questions.is_held_out(row.question, config.data.valid_fraction)
        splits[held_out].append(encoder.encode(row.question, row.answer))
    if not all(splits):
        raise UserError(
            f"{config.data.source}: {len(splits[0])} rows to train on and {len(splits[1])} held "
            "out; raise data.limit or change data.valid_fraction"
        )
    _check_memory(sampled, loaded.model, [*splits[0], *splits[1]], replay.longest(encoder))
    _check_disk(config, loaded.model)
    signals.check()
    workload = Workload(*splits, layers=fusing.size_in_largest_layers(loaded.model))
    print(f"check: timing {config.model} on this machine", flush=True)
    minutes = minutes_of(sampled, workload, _probe(sampled, loaded, workload.rows))
    _print_minutes(minutes, workload, sampled)
    jsonl.write_json(config.run.plan, {"config": configs.digest(config), "minutes": minutes})


def _print_download(name: str) -> None:
    """Print the size of the download. Raises UserError when the disk has no room for it."""
    try:
        print(f"check: download: none, the model is in {folder_of(name)}", flush=True)
    except (OSError, ValueError):
        if not is_hub_name(name):
            return  # loading the model reports what is wrong
        size, reason = download_size(name)
        print(f"check: download: {name}, {f'{size / 1e9:.2f} GB' if size else reason}", flush=True)
        atomic.require_space(Path(HF_HUB_CACHE), size, "the environment variable HF_HOME")


def download_size(name: str) -> tuple[int, str]:
    """Bytes of a model on the hub; or 0 and the reason when the hub does not answer."""
    try:
        files = HfApi().model_info(name, files_metadata=True).siblings or []
    except Exception as error:  # the hub's client raises several libraries' errors
        return 0, f"size unknown (the hub does not answer: {type(error).__name__})"
    return sum(file.size or 0 for file in files), ""


def _check_memory(
    config: Config, model: nn.Module, chosen: list[EncodedAnswer], replayed: EncodedAnswer
) -> None:
    """Print each stage's peak memory. `replayed` is the longest sequence of the replay.
    Attaches adapters to the model, as stages 10 and 11 do. Raises UserError with one line for each
    stage that does not fit.
    """
    prompt = max(sequence.prompt_length for sequence in chosen)
    answer = config.generation.max_tokens or 0
    longest = max(prompt + answer, *(len(sequence.ids) for sequence in chosen))
    longest = min(longest, config.data.max_length)
    lengths = memory.LargestSizes(
        len(chosen), prompt, answer, EncodedAnswer((0,) * longest, prompt)
    )
    # As the runner would start the stages with this --launch.
    two = os.environ.get(LAUNCH, "auto") == "auto" and has_cpu_for_two()
    processes = 2 if two else 1
    needs = {
        MAKE_PAIRS: memory.stage_06(model, config, lengths, processes),
        SMOKE: memory.stage_12(model, config, lengths, _fused_bytes(config, model)),
    }
    signals.check()
    mx.random.seed(config.seed)
    attach_lora(model, config.lora)
    needs[TRAIN_DPO] = memory.stage_10(model, config, lengths, replayed, processes)
    signals.check()
    needs[FUSE] = memory.stage_11(model, config, lengths.longest)
    faults = []
    print(f"check: peak memory of each stage; {device.available() / 1e9:.2f} GB available")
    for script in sorted(needs):
        print(f"    {script}  {memory.largest(needs[script])}", flush=True)
        try:
            memory.require(needs[script], f"{script}: {config.model}")
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise UserError("\n".join(faults))


def _check_disk(config: Config, model: nn.Module) -> None:
    """Print what the run's folder will hold. Raises UserError when the disk has no room for it."""
    fused = _fused_bytes(config, model)
    checkpoints = checkpoint.MAX_CHECKPOINTS * checkpoint.size(model)
    total = fused + checkpoints + atomic.SMALL_FILES
    free = shutil.disk_usage(config.run.path).free
    print(
        f"check: disk: up to {total / 1e9:.2f} GB in {config.run.path} "
        f"(fused model {fused / 1e9:.2f}, checkpoints {checkpoints / 1e9:.2f}), "
        f"{free / 1e9:.0f} GB free"
    )
    atomic.require_space(config.run.path, total, "run_dir")


def _fused_bytes(config: Config, model: nn.Module) -> int:
    """Bytes of the fused model's weights, before any quantising."""
    return get_total_parameters(model) * fusing.target_dtype(model, config.fuse.dtype).size


def minutes_of(config: Config, work: Workload, cost: Cost) -> dict[str, float]:
    """Minutes of each stage, by script.

    Assumes that a rejected answer is as long as the chosen one, because training cuts it to that
    length, and that some answer of every batch reaches `generation.max_tokens`, as is usual.
    """
    longest_answer = config.generation.max_tokens or 0
    chosen, held_out = _tokens(work.train), _tokens(work.valid)
    sequence = (chosen + held_out) / len(work.rows)

    def answering(questions: int, batch: int) -> float:
        return math.ceil(questions / batch) * (cost.prompts + longest_answer * cost.step)

    def scoring(tokens: float) -> float:
        return tokens * cost.scored_token

    def answering_tasks(count: int, batch: int) -> float:
        return math.ceil(count / batch) * (cost.prompts + tasks.MAX_TOKENS * cost.step)

    eval_count = min(config.train.eval_questions, len(work.valid))
    evaluation = answering(eval_count, EVALUATED_AT_ONCE) + scoring(
        4 * eval_count * sequence + PROMPTS * tasks.USUAL_TOKENS
    )
    prompts = len(tasks.read_prompts(replay.FILE))
    replayed = [  # answers in each phase
        config.train.replay * count_updates(phase.settings, len(work.train))
        for phase in (Sft(config), Dpo(config))
    ]
    unrelated = tasks.load(config.smoke.unrelated_tasks)
    batch = config.generation.batch_size
    smoke_questions = min(config.smoke.questions, len(work.valid))
    fuse_tokens = 2 * sequence * min(config.fuse.check_pairs, len(work.valid))
    roundings = 1 if config.fuse.dtype == "float32" else 2
    seconds = {
        MAKE_PAIRS: cost.model + answering(len(work.rows), batch),
        TRAIN_DPO: cost.model
        + (2 * PREFLIGHT_PAIRS * sequence + config.sft.epochs * chosen) * cost.gradient_token
        + sum(replayed) * tasks.USUAL_TOKENS * (cost.gradient_token + cost.scored_token)
        + answering_tasks(PROMPTS, EVALUATED_AT_ONCE)
        + answering_tasks(min(max(replayed), prompts), EVALUATED_AT_ONCE)
        + config.train.epochs * 2 * chosen * cost.gradient_token
        + scoring(2 * chosen + 2 * held_out)
        + (1 + evaluations(config, len(work.train))) * evaluation,
        FUSE: (2 + roundings) * cost.model
        + (3 + roundings) * scoring(fuse_tokens)
        + roundings * work.layers * cost.layer
        + WRITE_OVER_READ * cost.model,
        SMOKE: 3 * cost.model
        + 2 * answering(smoke_questions, batch)
        + answering(min(OTHER_SYSTEM_QUESTIONS, smoke_questions), batch)
        + answering_tasks(len(unrelated.prompts), batch)
        + 2 * answering_tasks(len(unrelated.instructions), batch)
        + scoring(4 * held_out + 6 * smoke_questions * sequence)
        + 2 * scoring((len(unrelated.prompts) + len(unrelated.choices)) * tasks.USUAL_TOKENS),
    }
    return {script: value / 60 for script, value in seconds.items()}


def _tokens(sequences: list[EncodedAnswer]) -> int:
    return sum(len(sequence.ids) for sequence in sequences)


def evaluations(config: Config, pairs: int) -> int:
    """The number of evaluations in both phases: at the start, at the end, and at even distances."""
    count = 0
    for phase in (Sft(config), Dpo(config)):
        if updates := count_updates(phase.settings, pairs):
            every = config.train.eval_every or updates_between_evaluations(updates)
            count += 1 + math.ceil(updates / every)
    return count


def _probe(config: Config, loaded: LoadedModel, rows: list[EncodedAnswer]) -> Cost:
    """Time the model on this machine. Each step runs twice, as the first run compiles kernels."""
    model = loaded.model
    started = time.perf_counter()
    mx.eval(model.parameters())
    reading = time.perf_counter() - started
    batch = Batch(
        [list(row.ids[: row.prompt_length]) for row in rows[: config.generation.batch_size]], seed=0
    )

    def sample(tokens: int) -> int:
        """Length of the longest answer, in tokens."""
        settings = replace(config.generation, max_tokens=tokens)
        answers = sample_batch(model, loaded.tokenizer, batch, settings)
        return max(1, *(answer.tokens for answer in answers))

    sample(2)
    _, prompt_seconds = _timed(lambda: sample(1))
    tokens, sampling_seconds = _timed(lambda: sample(PROBED_TOKENS))
    median = sorted(rows, key=lambda row: len(row.ids))[len(rows) // 2]
    scorer = Worker(model).scorer
    scorer.log_prob(median)
    _, scored = _timed(lambda: scorer.log_prob(median))
    with gradient_checkpointing(model, config.train.grad_checkpoint):
        scorer.log_prob_and_gradient(median)
        _, gradient = _timed(lambda: scorer.log_prob_and_gradient(median))
    dtype = fusing.target_dtype(model, config.fuse.dtype)
    fusing.fuse_largest_layer(model, dtype)
    _, layer = _timed(lambda: fusing.fuse_largest_layer(model, dtype))
    length = len(median.ids)
    step = max(sampling_seconds - prompt_seconds, 0.0) / max(tokens - 1, 1)
    return Cost(reading, prompt_seconds, step, scored / length, gradient / length, layer)


def _timed(run: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def _print_minutes(minutes: dict[str, float], work: Workload, config: Config) -> None:
    print(
        f"check: about {_duration(sum(minutes.values()))} for {len(work.rows)} rows "
        f"({len(work.valid)} of them held out), answers of up to {config.generation.max_tokens} "
        "tokens"
    )
    for script, value in minutes.items():
        print(f"    {script}  {_duration(value)}")


def _duration(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"
