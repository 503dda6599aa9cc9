"""What stage 10 works on: the model, the pairs, their reference; and where those are kept."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.nn as nn
from tqdm import tqdm

from ..config import Config, GenerationConfig
from ..data import check_pairs, encoding, pairs
from ..data.check_pairs import list_lines
from ..data.encoding import EncodedPair, Encoder
from ..data.pairs import Pair
from ..files import digest, fingerprint, model_files
from ..files.errors import UserError
from ..files.fingerprint import REFERENCE, TRAINING, Fingerprint
from ..files.model_files import ADAPTERS
from ..files.run_folder import AFTER_SFT, SPLITS, TRAIN, VALID
from ..model import device
from ..model.sampling import limited
from ..parallel import distributed
from ..parallel.worker import Worker
from ..scoring import memory, reference
from ..scoring.losses import Sides
from ..voice.voice_classifier import VoiceClassifier, fit_classifier
from .schedule import pairs_per_update


@dataclass(frozen=True)
class Setup:
    """All that stage 10 works on: the model with fresh adapters and who computes with it, the pairs
    of both splits as text and as ids, the classifier of the voice, the memory it needs, and the
    fingerprint of its training.
    """

    config: Config
    worker: Worker
    encoder: Encoder
    raw: dict[str, list[Pair]]
    pairs: dict[str, list[EncodedPair]]
    classifier: VoiceClassifier
    need: memory.Need
    fingerprint: Fingerprint

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
        return {**self.pairs, TRAIN: [pair.match_lengths() for pair in self.pairs[TRAIN]]}

    @property
    def watched(self) -> list[EncodedPair]:
        """The valid pairs that evaluations look at."""
        return self.pairs[VALID][: self.config.train.eval_questions]

    @property
    def model(self) -> nn.Module:
        return self.worker.model


def prepare(config: Config, current: Fingerprint | None = None) -> Setup:
    """Read and check the pairs, load the model, and check that training it fits in memory.

    `current` is the fingerprint of training as it was before anything was read.

    Raises UserError for pairs, a model or settings that cannot be trained.
    """
    current = current or fingerprint.of(TRAINING, config)
    read = {split: pairs.read(path) for split, path in config.pairs.splits.items()}
    for note in check_pairs.check(read[TRAIN], read[VALID], config):
        print(f"10: note: {note}")
    loaded, worker = distributed.load(config, train=True)
    if current["model files"] is None:  # the model was downloaded only now
        current = {**current, "model files": model_files.fingerprint(config.model)}
    encoder = Encoder.of(loaded.tokenizer, config)
    for note in encoder.template.notes():
        print(f"10: note: {note}")
    encoded = {}
    for split in SPLITS:
        encoded[split], dropped = encoding.encode_all(read[split], encoder, config.data.max_length)
        if dropped:
            print(
                f"10: {len(dropped)} {split} pairs are longer than data.max_length = "
                f"{config.data.max_length} tokens and dropped (lines {list_lines(dropped)})"
            )
            read[split] = [pair for pair in read[split] if pair.line not in {*dropped}]
    need = pairs_per_update(config.train)
    if len(encoded[TRAIN]) < need:
        raise UserError(
            f"{config.data.train_pairs}: {len(encoded[TRAIN])} pairs are fewer than one update "
            f"needs ({need} = train.batch_size x train.grad_accumulation); add pairs or lower these"
        )
    encoding.require_pairs(config.pairs.valid, encoded[VALID])
    memory_need = _require_memory(config, worker, encoder, read, encoded)
    chosen, rejected = ([getattr(p, side) for p in read[TRAIN]] for side in ("chosen", "rejected"))
    classifier = fit_classifier(chosen, rejected)
    return Setup(config, worker, encoder, read, encoded, classifier, memory_need, current)


def _require_memory(
    config: Config,
    worker: Worker,
    encoder: Encoder,
    raw: dict[str, list[Pair]],
    encoded: dict[str, list[EncodedPair]],
) -> memory.Need:
    """The stage's peak memory. Raises UserError when the machine has less than that."""
    everything = [*encoding.sequences(encoded[TRAIN]), *encoding.sequences(encoded[VALID])]
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
    lengths = encoding.chosen_lengths(everything, encoder, config.data.max_length)
    return limited(config.generation, lengths)


def reference_fingerprint(
    config: Config,
    split: str,
    encoded: list[EncodedPair],
    digests: Fingerprint,
    adapters: Path | None = None,
) -> Fingerprint:
    """What the reference of a split depends on; `adapters` are SFT's, None for the base model.

    `digests` holds digests of files, as `fingerprint.of` takes them.
    """
    return fingerprint.of(REFERENCE[split], config, digests) | {
        "token ids": encoding.digest(encoded),
        "adapters of SFT": adapters and digest.of_file(adapters / ADAPTERS),
        "lora.scale": adapters and config.lora.scale,
        # Another device or version rounds differently.
        "device": device.name(),
        "mlx": version("mlx"),
    }


def load_reference(
    setup: Setup, taken_of: str, split: str, adapters: Path | None = None, only_read: bool = False
) -> list[Sides[float]]:
    """A split's reference, of the model as it is: BASE, or AFTER_SFT with these `adapters`, whose
    valid part holds only the pairs that evaluations look at.

    Computed where it is not there, unless `only_read`.
    """
    folder = setup.config.run.reference(taken_of)
    encoded = setup.watched if (taken_of, split) == (AFTER_SFT, VALID) else setup.preferences[split]
    inputs = reference_fingerprint(setup.config, split, encoded, setup.fingerprint, adapters)
    changes = reference.changes(folder, split, inputs)
    if only_read and not reference.is_complete(folder, split, len(encoded), inputs):
        why = f" (what changed: {'; '.join(changes)})" if changes else ""
        raise UserError(
            f"{folder}: no complete reference of these pairs and this model{why}; run "
            "10_train_dpo.py --only reference first"
        )
    for change in changes:
        print(f"10: the stored {split} reference is stale: {change}")
    with tqdm(total=len(encoded), desc=f"10 reference ({taken_of}, {split})", unit="pair") as bar:
        made = reference.load_or_compute(
            folder,
            split,
            encoded,
            inputs,
            setup.worker.log_probs,
            setup.worker.size,
            lambda done: bar.update(done - bar.n),
        )
        bar.update(len(encoded) - bar.n)
    return made
