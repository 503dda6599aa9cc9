"""What stage 10 works on: the model, the pairs, their reference; and where those are kept."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.nn as nn
from tqdm import tqdm

from . import check_pairs, device, jsonl, memory, models, pairs, reference, stamp, team, voice
from .check_pairs import few
from .config import Config, GenerationConfig
from .errors import UserError
from .losses import Sides
from .pairs import EncodedPair, Encoder, Pair
from .sampling import limited
from .schedule import pairs_per_update
from .voice import VoiceClassifier
from .worker import Worker

TRAIN, VALID = SPLITS = ("train", "valid")
BASE, AFTER_SFT = "base", "sft"  # the models a reference is taken of


@dataclass(frozen=True)
class Job:
    """All that stage 10 works on: the model with fresh adapters and who computes with it, the pairs
    of both splits as text and as ids, the classifier of the voice.
    """

    config: Config
    worker: Worker
    encoder: Encoder
    raw: dict[str, list[Pair]]
    pairs: dict[str, list[EncodedPair]]
    classifier: VoiceClassifier
    need: memory.Need

    @property
    def generation(self) -> GenerationConfig:
        return _generation(self.config, self.raw, self.encoder)

    @property
    def preferences(self) -> dict[str, list[EncodedPair]]:
        """The pairs as DPO sees them. Valid ones stay whole: what is measured on them is what
        others measure on the file.
        """
        if not self.config.dpo.match_length:
            return self.pairs
        return {**self.pairs, TRAIN: [pair.matched() for pair in self.pairs[TRAIN]]}

    @property
    def watched(self) -> list[EncodedPair]:
        """The valid pairs that evaluations look at."""
        return self.pairs[VALID][: self.config.train.eval_questions]

    @property
    def model(self) -> nn.Module:
        return self.worker.model


def prepare(config: Config) -> Job:
    """Read and check the pairs, load the model, and check that training it fits in memory.

    Raises UserError for pairs, a model or settings that cannot be trained.
    """
    read = {split: pairs.read(pair_file(config, split)) for split in SPLITS}
    for note in check_pairs.check(read[TRAIN], read[VALID], config):
        print(f"10: note: {note}")
    loaded, worker = team.load(config, train=True)
    encoder = Encoder.of(loaded.tokenizer, config)
    for note in encoder.template.notes():
        print(f"10: note: {note}")
    encoded = {}
    for split in SPLITS:
        encoded[split], dropped = pairs.encode_all(read[split], encoder, config.data.max_length)
        if dropped:
            print(
                f"10: {len(dropped)} {split} pairs are longer than data.max_length = "
                f"{config.data.max_length} tokens and dropped (lines {few(dropped)})"
            )
            read[split] = [pair for pair in read[split] if pair.line not in {*dropped}]
    need = pairs_per_update(config.train)
    if len(encoded[TRAIN]) < need:
        raise UserError(
            f"{config.data.train_pairs}: {len(encoded[TRAIN])} pairs are fewer than one update "
            f"needs ({need} = train.batch_size x train.grad_accumulation); add pairs or lower these"
        )
    require_valid(config, encoded[VALID])
    memory_need = _require_memory(config, worker, encoder, read, encoded)
    chosen, rejected = ([getattr(p, side) for p in read[TRAIN]] for side in ("chosen", "rejected"))
    classifier = voice.fit(chosen, rejected)
    return Job(config, worker, encoder, read, encoded, classifier, memory_need)


def require_valid(config: Config, encoded: list[EncodedPair]) -> None:
    """Raises UserError when no valid pair fits in `data.max_length`."""
    if not encoded:
        raise UserError(f"{config.data.valid_pairs}: no valid pairs left; raise data.max_length")


def _require_memory(
    config: Config,
    worker: Worker,
    encoder: Encoder,
    raw: dict[str, list[Pair]],
    encoded: dict[str, list[EncodedPair]],
) -> memory.Need:
    """The stage's peak memory. Raises UserError when the machine has less than that."""
    everything = [*pairs.sequences(encoded[TRAIN]), *pairs.sequences(encoded[VALID])]
    lengths = memory.Lengths(
        questions=len(encoded[VALID]),
        prompt=max(sequence.prompt_length for sequence in everything),
        answer=_generation(config, raw, encoder).max_tokens or 0,
        longest=max(everything, key=lambda sequence: len(sequence.ids)),
    )
    needs = memory.stage_10(worker.model, config, lengths, worker.local_processes)
    return memory.require(needs, config.model)


def _generation(config: Config, raw: dict[str, list[Pair]], encoder: Encoder) -> GenerationConfig:
    """How questions are answered."""
    everything = [pair for split in SPLITS for pair in raw[split]]
    lengths = pairs.chosen_lengths(everything, encoder, config.data.max_length)
    return limited(config.generation, lengths)


def reference_inputs(
    config: Config, split: str, encoded: list[EncodedPair], adapters: Path | None = None
) -> stamp.Inputs:
    """Everything that determines the reference of a split; `adapters` are those of SFT."""
    path = pair_file(config, split)
    return {
        "pairs": jsonl.digest(path),
        "model files": models.fingerprint(config.model),
        **config.prompt_inputs,
        "data.max_length": config.data.max_length,
        "token ids": pairs.digest(encoded),
        "adapters of SFT": adapters and jsonl.digest(adapters / models.ADAPTERS),
        "lora.scale": adapters and config.lora.scale,
        # A change in any of these changes the rounding.
        "train.scan_chunk": config.train.scan_chunk,
        "device": device.name(),
        "mlx": version("mlx"),
    }


def load_reference(
    job: Job, taken_of: str, split: str, adapters: Path | None = None, only_read: bool = False
) -> list[Sides[float]]:
    """A split's reference, of the model as it is: BASE, or AFTER_SFT with these `adapters`, whose
    valid part holds only the pairs that evaluations look at.

    Computed where it is not there, unless `only_read`.
    """
    folder = job.config.run / "reference" / taken_of
    encoded = job.watched if (taken_of, split) == (AFTER_SFT, VALID) else job.preferences[split]
    inputs = reference_inputs(job.config, split, encoded, adapters)
    changes = reference.changes(folder, split, inputs)
    if only_read and not reference.is_complete(folder, split, len(encoded), inputs):
        why = f" (what changed: {'; '.join(changes)})" if changes else ""
        raise UserError(
            f"{folder}: no complete reference of these pairs and this model{why}; run "
            "10_train_dpo.py --stage precompute first"
        )
    for change in changes:
        print(f"10: the stored {split} reference is stale: {change}")
    with tqdm(total=len(encoded), desc=f"10 reference ({taken_of}, {split})", unit="pair") as bar:
        made = reference.load_or_compute(
            folder,
            split,
            encoded,
            inputs,
            job.worker.log_probs,
            job.worker.size,
            lambda done: bar.update(done - bar.n),
        )
        bar.update(len(encoded) - bar.n)
    return made


def pair_file(config: Config, split: str) -> Path:
    return Path(config.data.train_pairs if split == TRAIN else config.data.valid_pairs)
