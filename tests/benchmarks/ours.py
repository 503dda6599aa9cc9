"""This project's side of the benchmarks: models to train, random pairs, and the real trainer."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import common
import mlx.core as mx
import numpy as np
import tiny
from dpo_mlx.config import Config, DataConfig, DpoConfig, GuardConfig, LoraConfig, TrainConfig
from dpo_mlx.data.encoding import EncodedAnswer, EncodedPair
from dpo_mlx.files.results import Measures
from dpo_mlx.model import scan, tiny_granite
from dpo_mlx.model.adapters import attach_lora
from dpo_mlx.model.gradient_checkpointing import gradient_checkpointing
from dpo_mlx.model.loading import load_model
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.scoring import memory
from dpo_mlx.scoring.losses import Sides
from dpo_mlx.scoring.objectives import DPO, Example
from dpo_mlx.scoring.scorer import Scorer
from dpo_mlx.training.checkpoint import Checkpoints, State
from dpo_mlx.training.metrics import MetricsFile
from dpo_mlx.training.schedule import groups
from dpo_mlx.training.trainer import Examples, Trainer
from dpo_mlx.voice.answers import NAMES
from mlx.utils import tree_flatten
from mlx_lm.models import granitemoehybrid
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.utils import save_model

PROMPT = 32  # tokens of a random pair's prompt
SCAN_CHUNK = TrainConfig(learning_rate=0.0).scan_chunk
LORA = LoraConfig(rank=common.LORA_RANK, scale=common.LORA_SCALE)
# Answers are not sampled while training is measured.
SILENT = Measures([1.0], dict.fromkeys(NAMES, 1.0))
OFF = GuardConfig(enabled=False)


@dataclass(frozen=True)
class Step:
    """One update: its seconds, and MLX's peak memory during it in bytes."""

    seconds: float
    peak: int


def granite_config(layers: int, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    """Granite 4.0 H-Micro's true geometry with its first `layers` layers."""
    geometry = {
        "vocab_size": 100352,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "shared_intermediate_size": 8192,
        "num_hidden_layers": layers,
        "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(layers)],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attention_multiplier": 0.015625,
        "mamba_n_heads": 64,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "max_position_embeddings": 131072,
        "torch_dtype": dtype,
    }
    return tiny.config("granite", **{**geometry, **changes})


def granite(layers: int, dtype: str = "float32", **changes: Any) -> Any:
    """A random model of that geometry; nothing is in memory until it is evaluated."""
    settings = granite_config(layers, dtype, **changes)
    made = granitemoehybrid.Model(granitemoehybrid.ModelArgs.from_dict(settings))
    made.set_dtype(getattr(mx, dtype))
    scan.use_chunks(made, SCAN_CHUNK)
    return made.eval()


def materialise(model: Any) -> None:
    """Evaluate the weights one by one: random bits take memory of their own."""
    for array in dict(tree_flatten(model.parameters())).values():
        mx.eval(array)


def load(task: common.Values) -> Any:
    """The model of a task, with adapters: `model` is a folder, a number of Granite's layers at its
    true width, or a tiny model's kind.
    """
    mx.random.seed(0)
    name = task["model"]
    if isinstance(name, int):
        model = granite(name, task.get("dtype", "float32"))
        materialise(model)
    elif name in tiny.SPECIAL:
        model = tiny.model(tiny.config(name))
    else:
        model = load_model(name).model
        scan.use_chunks(model, SCAN_CHUNK)
    attach_lora(model, LORA)
    return model


def random_pair(model: Any, answer: int, seed: int = 0, prompt: int = PROMPT) -> EncodedPair:
    """A pair of random ids whose answers both have `answer` tokens."""
    vocabulary = model.model.embed_tokens.weight.shape[0]
    ids = np.random.default_rng(seed).integers(vocabulary, size=(2, answer)).tolist()
    chosen, rejected = (EncodedAnswer((*range(prompt), *side), prompt) for side in ids)
    return EncodedPair(chosen, rejected, seed)


def planned(model: Any, pair: EncodedPair, checkpoint: bool) -> int:
    """Peak bytes of training on this pair, as our memory plan estimates them."""
    longest = max(pair.sides, key=lambda side: len(side.ids))
    with gradient_checkpointing(model, checkpoint):
        return memory.training(model, longest).total


def examples(model: Any, pairs: list[EncodedPair]) -> list[Example]:
    scorer = Scorer(model)
    return [
        Example(p, Sides(scorer.log_prob(p.chosen), scorer.log_prob(p.rejected))) for p in pairs
    ]


def train(
    model: Any,
    examples: list[Example],
    checkpoint: bool,
    epochs: int = 1,
    after: Callable[[int], None] = lambda update: None,
    learning_rate: float = common.LEARNING_RATE,
    accumulation: int = 1,
) -> list[Step]:
    """One update every `accumulation` pairs, in the order given in the first epoch, by the
    project's Trainer.

    Its first update is a warm-up and left out, unless it is the only one. `after` runs after each
    update, untimed.
    """
    settings = TrainConfig(
        learning_rate=learning_rate,
        epochs=epochs,
        grad_accumulation=accumulation,
        schedule="constant",
        warmup_ratio=0.0,
        grad_checkpoint=checkpoint,
        eval_every=10**9,
    )
    ordered = list(examples)  # the trainer's shuffle of the first epoch, undone
    shuffled = itertools.chain.from_iterable(g for _, g in groups(settings, len(examples), 0))
    for example, index in zip(examples, shuffled, strict=False):
        ordered[index] = example
    clock = Clock(after)
    with tempfile.TemporaryDirectory() as run:
        config = Config(
            model="",
            run_dir=run,
            data=DataConfig(source="", train_pairs="", valid_pairs=""),
            train=settings,
            lora=LORA,
            dpo=DpoConfig(beta=common.BETA, nll_weight=0.0),
            guard=OFF,
        )
        shortest = min(examples, key=lambda example: example.pair.length)
        trainer = Trainer(
            Worker(model),
            config,
            Examples(ordered, [shortest]),
            lambda: SILENT,
            MetricsFile(config.run.path / "metrics.jsonl", clock),
            Checkpoints(config.run.path / "checkpoints"),
            State(DPO, base=SILENT),
        )
        # The first update already is of the memory of all others.
        trainer.optimizer.init(model.trainable_parameters())
        mx.eval(trainer.optimizer.state)
        trainer.run()
    return clock.steps[1:] or clock.steps


class Clock(TrainingCallback):
    """Times each update from the report of the one before."""

    def __init__(self, after: Callable[[int], None]) -> None:
        self.steps: list[Step] = []
        self._after = after
        self._since = time.perf_counter()

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        step = Step(time.perf_counter() - self._since, mx.get_peak_memory())
        self.steps.append(step)
        self._after(train_info["iteration"])
        self._since = time.perf_counter()

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        pass


def summary(model: Any, steps: list[Step]) -> common.Values:
    adapters: Any = dict(tree_flatten(model.trainable_parameters())).values()
    return {
        "adapters": sum(array.size for array in adapters),
        "steps": [asdict(step) for step in steps],
        "seconds": float(np.mean([step.seconds for step in steps])),
        "median_seconds": float(np.median([step.seconds for step in steps])),
        "peak_mlx": max(step.peak for step in steps),
    }


def granite_folder(
    path: Path,
    layers: int,
    tokenizer: Path | None = None,
    dtype: str = "float32",
    **changes: Any,
) -> None:
    """Write a random model of Granite's width as an MLX folder, in shards.

    It gets the tokenizer files of the folder `tokenizer`, or a byte-level tokenizer that can decode
    every id of the vocabulary, so that answers can be sampled.
    """
    path.mkdir(parents=True)
    mx.random.seed(0)
    model = granite(layers, dtype, **changes)
    materialise(model)
    save_model(path, model)
    settings = granite_config(layers, dtype, **changes)
    if tokenizer is None:
        tiny_granite.write_tokenizer(path, tiny_granite.SPECIAL_TOKENS, tiny_granite.TEMPLATE)
        _fill_vocabulary(path / "tokenizer.json", settings["vocab_size"])
    else:
        known = json.loads((tokenizer / "config.json").read_text())
        settings |= {key: known[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).write_bytes((tokenizer / name).read_bytes())
    (path / "config.json").write_text(json.dumps(settings))


def _fill_vocabulary(file: Path, size: int) -> None:
    """Give every id below `size` that has no token a word of its own.

    No merge produces these words, so texts are still encoded byte by byte.
    """
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    words = map("".join, itertools.product(ascii_lowercase, repeat=4))
    for word in itertools.islice(words, size - len(vocabulary)):
        vocabulary[f"\u0120{word}"] = len(vocabulary)  # ByteLevel's letter for a space
    file.write_text(json.dumps(content))
