"""The run that collapsed, trained again: control.yaml, and what no config can say.

That is raw prompts, no end of turn, AdamW without bias correction, and pairs in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.optimizers as optim
import yaml
from dpo_mlx.config import Config
from dpo_mlx.data import encoding, pairs
from dpo_mlx.data.encoding import EncodedPair, Encoder
from dpo_mlx.data.pairs import LENGTH, STOP, Pair
from dpo_mlx.files import jsonl
from dpo_mlx.files.results import Measures, read_metrics
from dpo_mlx.files.run_folder import SPLITS, TRAIN
from dpo_mlx.model.loading import load_model
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.scoring.objectives import DPO
from dpo_mlx.stages.evaluate import sample_answers
from dpo_mlx.training.guard import crossed_limits
from dpo_mlx.training.phases import Phases
from dpo_mlx.training.preflight import preflight
from dpo_mlx.training.schedule import groups
from dpo_mlx.training.setup import Setup, answer_settings, prepare

OVERRIDES = [
    f"{section}.{key}={value}"
    for section, values in yaml.safe_load(
        Path(__file__).with_name("control.yaml").read_text()
    ).items()
    for key, value in values.items()
]
ADAMW = optim.AdamW


@dataclass(frozen=True)
class Collapsed:
    """The last adapters of the run, the encoder of its prompts, and what the preflight and the
    guard would have said.
    """

    adapters: Path
    updates: int
    encoder: Encoder
    caught: list[str]


class RawEncoder(Encoder):
    """`Question: ... Answer:` without a chat template, and no end of turn."""

    def render(self, question: str) -> str:
        return f"Question: {question}\nAnswer:"

    def answer_ids(self, text: str, finish: str = STOP) -> list[int]:
        return super().answer_ids(" " + text, LENGTH)


def train(config: Config) -> Collapsed:
    """Train the run, or what is missing of it."""
    setup = raw_setup(config)
    caught = [f"preflight: {finding.text}" for finding in preflight(setup)]
    phases = Phases(setup)
    references = phases.references(only_read=False)
    with patch.object(optim, "AdamW", without_bias_correction):
        phases.run_dpo(references)
    return Collapsed(
        phases.checkpoints.path(DPO, phases.updates),
        phases.updates,
        setup.encoder,
        [*caught, *said_by_guard(config, phases)],
    )


def without_bias_correction(learning_rate: Any, weight_decay: float, **_: bool) -> optim.AdamW:
    return ADAMW(learning_rate, weight_decay=weight_decay)


def said_by_guard(config: Config, phases: Phases) -> list[str]:
    """The limits that each evaluation crossed."""
    lines = []
    for row in read_metrics(config.run.metrics):
        means = {k.removeprefix("eval_text/"): v for k, v in row.items() if "eval_text/" in k}
        if means:
            change = row["eval_logps/chosen_change_per_token"]
            crossed = crossed_limits(config.guard, phases.base, Measures([], means), change)
            lines += [f"update {row['iteration']}: {text}" for text in crossed]
    return lines


def raw_setup(config: Config) -> Setup:
    """The set-up of stage 10 with raw prompts, and pairs that training takes in their order."""
    setup = prepare(with_raw_pairs(config))
    encoder = RawEncoder(setup.encoder.tokenizer)
    encoded = {
        split: encoding.encode_all(raw, encoder, config.data.max_length)[0]
        for split, raw in setup.raw.items()
    }
    encoded[TRAIN] = before_shuffling(encoded[TRAIN], config)
    return replace(setup, encoder=encoder, pairs=encoded)


def before_shuffling(pairs_in_order: list[EncodedPair], config: Config) -> list[EncodedPair]:
    """The pairs in an order that the shuffle of the first epoch turns into theirs."""
    count = len(pairs_in_order)
    shuffle = [i for _, group in groups(config.train, count, config.seed) for i in group][:count]
    by_index = dict(zip(shuffle, pairs_in_order, strict=True))
    return [by_index[index] for index in range(count)]


def with_raw_pairs(config: Config) -> Config:
    """The config with pairs of its own: the same rows, with rejected answers sampled from raw
    prompts. Where the base model says nothing to those, the old rejected answer stays.
    """
    files = {split: config.run.path / f"pairs/{split}.jsonl" for split in SPLITS}
    if not all(file.exists() for file in files.values()):
        loaded = load_model(config.model)
        encoder = RawEncoder(loaded.tokenizer)
        rows = {split: pairs.read(config.pairs.splits[split]) for split in SPLITS}
        config_with_limit = replace(config, generation=answer_settings(config, rows, encoder))
        worker = Worker(loaded.model, loaded.tokenizer)
        for split, file in files.items():
            answers = sample_answers(worker, rows[split], encoder, config_with_limit)
            jsonl.write(file, map(raw_row, rows[split], [a.text for a in answers]))
    train_pairs, valid_pairs = map(str, files.values())
    data = replace(config.data, train_pairs=train_pairs, valid_pairs=valid_pairs)
    return replace(config, data=data)


def raw_row(pair: Pair, rejected: str) -> dict[str, str]:
    return {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": rejected or pair.rejected,
        "rejected_finish": LENGTH,
    }
