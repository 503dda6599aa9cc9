"""Stage 10: pairs in, adapters out; the reference first, then training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from . import config as configs
from . import jsonl, memory, metrics, models, pairs, reference, scan, stamp
from .config import Config
from .engine import Engine
from .errors import UserError
from .pairs import EncodedPair, Encoder
from .reference import Reference
from .trainer import Example, Outcome, Trainer, count_updates, pairs_per_update

STAGES = PRECOMPUTE, TRAIN_ONLY, ALL = ("precompute", "train", "all")
TRAIN, VALID = SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Job:
    """All that stage 10 works on: the model with fresh adapters, the pairs of both splits."""

    config: Config
    model: nn.Module
    pairs: dict[str, list[EncodedPair]]
    plan: memory.Plan


def train_dpo(config: Config, stage: str) -> None:
    """Run stage 10: one of STAGES.

    Raises UserError for pairs, a model or settings that cannot be trained, and for TRAIN_ONLY
    without a reference.
    """
    stamp_path, adapters = stamp.path(config.run, "10_train_dpo"), config.run / "adapters"
    inputs = training_inputs(config)
    if stage != PRECOMPUTE and stamp.is_current(stamp_path, inputs, [adapters]):
        print(f"10: {adapters} is up to date, skipped")
        return
    job = prepare(config)
    references = _references(job, only_read=stage == TRAIN_ONLY)
    jsonl.write_text(config.run / "config.yaml", configs.dump(config))
    if stage == PRECOMPUTE:
        return
    outcome = _train(job, references)
    stamp.write(stamp_path, training_inputs(config))
    print(
        f"10: {outcome.updates} updates; the adapters of update {outcome.best_update} have the "
        f"lowest valid loss ({outcome.best_loss:.4f}) and are in {adapters}"
    )


def prepare(config: Config) -> Job:
    """Read and check the pairs, load the model, see whether its training fits in memory.

    Raises UserError for pairs, a model or settings that cannot be trained.
    """
    read = {split: pairs.read(pair_file(config, split)) for split in SPLITS}
    loaded = models.load(config.model, lazy=True)
    encoder = Encoder(loaded.tokenizer, config.system_prompt)
    encoded = {}
    for split in SPLITS:
        encoded[split], dropped = pairs.encode_all(read[split], encoder, config.data.max_length)
        if dropped:
            print(
                f"10: {len(dropped)} {split} pairs are longer than data.max_length = "
                f"{config.data.max_length} tokens and dropped (lines {_few(dropped)})"
            )
    need = pairs_per_update(config.train)
    if len(encoded[TRAIN]) < need:
        raise UserError(
            f"{config.data.train_pairs}: {len(encoded[TRAIN])} pairs are fewer than one update "
            f"needs ({need} = train.batch_size x train.grad_accumulation); add pairs or lower these"
        )
    require_valid(config, encoded[VALID])
    memory.bound()
    scan.use_chunks(loaded.model, config.train.scan_chunk)
    mx.random.seed(config.seed)
    models.attach_lora(loaded.model, config.lora)
    plan = _plan(config, loaded.model, encoded)
    return Job(config, loaded.model, encoded, plan)


def require_valid(config: Config, encoded: list[EncodedPair]) -> None:
    """Raises UserError when no valid pair fits in `data.max_length`."""
    if not encoded:
        raise UserError(f"{config.data.valid_pairs}: no valid pairs left; raise data.max_length")


def _plan(config: Config, model: nn.Module, encoded: dict[str, list[EncodedPair]]) -> memory.Plan:
    """The memory plan; UserError when the machine does not offer that much."""
    everything = [*pairs.sequences(encoded[TRAIN]), *pairs.sequences(encoded[VALID])]
    longest = max(everything, key=lambda sequence: len(sequence.ids))
    with models.gradient_checkpointing(model, config.train.grad_checkpoint):
        plan = memory.plan(model, longest)
    if plan.total > memory.available():
        raise UserError(
            f"{config.model}: training needs {plan}, this machine offers "
            f"{memory.available() / 1e9:.2f} GB; lower data.max_length (the longest sequence has "
            f"{len(longest.ids)} tokens), set train.grad_checkpoint: true, or set model to a "
            "quantised one"
        )
    return plan


def describe(job: Job) -> None:
    """What a run would do, before it is done."""
    config = job.config
    for split in SPLITS:
        lengths = [pair.length for pair in job.pairs[split]]
        print(
            f"10: {len(lengths)} {split} pairs, the longer side median {np.median(lengths):.0f}, "
            f"longest {max(lengths)} tokens"
        )
    updates = count_updates(config.train, len(job.pairs[TRAIN]))
    print(
        f"10: {updates} updates of {pairs_per_update(config.train)} pairs, learning rate "
        f"{config.train.learning_rate:g}, loss {config.dpo.loss}, beta {config.dpo.beta:g}, "
        f"LoRA rank {config.lora.rank}, scale {config.lora.scale:g}"
    )
    print(f"10: memory at the peak about {job.plan}, of {memory.available() / 1e9:.2f} GB")


def reference_inputs(config: Config, split: str, encoded: list[EncodedPair]) -> stamp.Inputs:
    """Everything that determines the reference of a split."""
    path = pair_file(config, split)
    return {
        "pairs": jsonl.digest(path),
        "model files": models.fingerprint(config.model),
        "system_prompt": config.system_prompt,
        "data.max_length": config.data.max_length,
        "token ids": pairs.digest(encoded),
    }


def training_inputs(config: Config) -> stamp.Inputs:
    """Everything that determines the adapters."""
    sections = {
        f"{section}.{key}": value
        for section in ("lora", "dpo", "train")
        for key, value in asdict(getattr(config, section)).items()
    }
    files = [pair_file(config, split) for split in SPLITS]
    return {
        "pairs": [jsonl.digest(path) if path.is_file() else None for path in files],
        "model files": models.fingerprint(config.model),
        "system_prompt": config.system_prompt,
        "data.max_length": config.data.max_length,
        "seed": config.seed,
        **sections,
    }


def _references(job: Job, only_read: bool) -> dict[str, list[Reference]]:
    """The reference of both splits; computed where it is not there, unless `only_read`."""
    folder = job.config.run / "reference"
    engine = Engine(job.model)
    made = {}
    for split in SPLITS:
        encoded = job.pairs[split]
        inputs = reference_inputs(job.config, split, encoded)
        if only_read and not reference.is_complete(folder, split, len(encoded), inputs):
            raise UserError(
                f"{folder}: no complete reference of these pairs and this model; run "
                "10_train_dpo.py --stage precompute first"
            )
        for change in reference.changes(folder, split, inputs):
            print(f"10: the stored {split} reference is stale: {change}")
        with tqdm(total=len(encoded), desc=f"10 reference ({split})", unit="pair") as bar:
            made[split] = reference.load_or_compute(
                folder,
                split,
                encoded,
                inputs,
                engine.log_prob,
                lambda done: bar.update(done - bar.n),
            )
            bar.update(len(encoded) - bar.n)
    return made


def _train(job: Job, references: dict[str, list[Reference]]) -> Outcome:
    config = job.config
    reporters = metrics.reporters(config, asdict(config))
    describe(job)
    examples = {
        split: [Example(*both) for both in zip(job.pairs[split], references[split], strict=True)]
        for split in SPLITS
    }
    bar = metrics.ProgressBar(count_updates(config.train, len(examples[TRAIN])))
    callback = metrics.Callbacks(
        metrics.MetricsFile(config.run / "metrics.jsonl"),
        bar,
        *reporters,
    )
    try:
        return Trainer(job.model, config, examples[TRAIN], examples[VALID], callback).run()
    finally:
        bar.close()


def pair_file(config: Config, split: str) -> Path:
    return Path(config.data.train_pairs if split == TRAIN else config.data.valid_pairs)


def _few(lines: list[int]) -> str:
    return ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
