"""The set-up of stage 10: reads the pairs, loads the model, and finds or computes references."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import mlx.nn as nn
from tqdm import tqdm

from ..config import Config, GenerationConfig
from ..data import check_pairs, encoding, pairs, prompt_date, round_trip
from ..data.check_pairs import list_lines
from ..data.encoding import EncodedPair, Encoder
from ..data.pairs import Pair
from ..files import digest, fingerprint, model_files
from ..files.errors import UserError
from ..files.fingerprint import REFERENCE, TRAINING, Fingerprint
from ..files.model_files import ADAPTERS
from ..files.run_folder import AFTER_SFT, SPLITS, TRAIN, VALID
from ..model import device
from ..model.sampling import with_max_tokens
from ..parallel import distributed
from ..parallel.worker import Worker
from ..scoring import memory, reference
from ..scoring.losses import Sides
from ..voice import cost
from ..voice.answers import Author
from ..voice.voice_classifier import VoiceClassifier, fit_classifier
from . import replay
from .schedule import pairs_per_update


@dataclass(frozen=True)
class Setup:
    """Everything that stage 10 works on.

    `worker` holds the model with fresh adapters. `raw` and `pairs` are the pairs by split, as text
    and as token ids. `notes` says what is wrong with the pairs. `need` is the peak memory.
    `fingerprint` is what the training depends on.
    """

    config: Config
    worker: Worker
    encoder: Encoder
    raw: dict[str, list[Pair]]
    pairs: dict[str, list[EncodedPair]]
    classifier: VoiceClassifier
    author: Author
    notes: list[str]
    need: memory.Need
    fingerprint: Fingerprint

    @cached_property
    def generation(self) -> GenerationConfig:
        """The sampling settings of the evaluations."""
        return answer_settings(self.config, self.raw, self.encoder)

    @cached_property
    def dpo_pairs(self) -> dict[str, list[EncodedPair]]:
        """The pairs as DPO sees them. `dpo.match_length` does not cut valid pairs: their metrics
        must be those of the whole file.
        """
        if not self.config.dpo.match_length:
            return self.pairs
        return {**self.pairs, TRAIN: [pair.match_lengths() for pair in self.pairs[TRAIN]]}

    @property
    def evaluated_pairs(self) -> list[EncodedPair]:
        """The valid pairs that evaluations score."""
        return self.pairs[VALID][: self.config.train.eval_questions]

    @property
    def model(self) -> nn.Module:
        return self.worker.model


def prepare(config: Config, current: Fingerprint | None = None) -> Setup:
    """Read and check the pairs, load the model, and check that training it fits in memory.

    `current` is the fingerprint of training, taken before anything is read. Raises UserError for
    pairs, a model or settings that cannot be trained.
    """
    current = current or fingerprint.of(TRAINING, config.flat)
    all_pairs = {split: pairs.read(path) for split, path in config.pairs.splits.items()}
    notes = check_pairs.check(all_pairs[TRAIN], all_pairs[VALID], config)
    for note in notes:
        print(f"10: note: {note}")
    loaded, worker = distributed.load(config, train=True)
    if current["model files"] is None:  # the model was downloaded only now
        current = {**current, "model files": model_files.fingerprint(config.model)}
    encoder = Encoder.of(loaded.tokenizer, config)
    rows = {path: all_pairs[split] for split, path in config.pairs.splits.items()}
    template_notes = round_trip.check(encoder, config.system_prompt, rows)
    for note in [*template_notes, *prompt_date.keep(config.pairs, encoder.template)]:
        print(f"10: note: {note}")
    raw, encoded = encode_splits(all_pairs, encoder, config.data.max_length)
    _print_dropped(all_pairs, raw, config.data.max_length)
    _require_pairs(config, encoded)
    need = _require_memory(config, worker, encoder, raw, encoded)
    chosen, rejected = ([getattr(p, side) for p in raw[TRAIN]] for side in ("chosen", "rejected"))
    classifier = fit_classifier(chosen, rejected)
    author = Author.of(raw[TRAIN], raw[VALID])
    return Setup(config, worker, encoder, raw, encoded, classifier, author, notes, need, current)


def encode_splits(
    raw: dict[str, list[Pair]], encoder: Encoder, max_length: int
) -> tuple[dict[str, list[Pair]], dict[str, list[EncodedPair]]]:
    """(pairs, encoded pairs) by split, without the pairs that are too long."""
    short, encoded = {}, {}
    for split in SPLITS:
        encoded[split], long_lines = encoding.encode_all(raw[split], encoder, max_length)
        short[split] = [pair for pair in raw[split] if pair.line not in {*long_lines}]
    return short, encoded


def _print_dropped(
    raw: dict[str, list[Pair]], short: dict[str, list[Pair]], max_length: int
) -> None:
    for split in SPLITS:
        short_lines = {pair.line for pair in short[split]}
        long_lines = [pair.line for pair in raw[split] if pair.line not in short_lines]
        if long_lines:
            print(
                f"10: dropped {len(long_lines)} {split} pairs that are longer than "
                f"data.max_length = {max_length} tokens (lines {list_lines(long_lines)})"
            )


def _require_pairs(config: Config, encoded: dict[str, list[EncodedPair]]) -> None:
    """Raises UserError when there are too few pairs to train on or none to evaluate."""
    size = pairs_per_update(config.train)
    if len(encoded[TRAIN]) < size:
        raise UserError(
            f"{config.data.train_pairs}: {len(encoded[TRAIN])} pairs, but one update takes {size} "
            "(train.batch_size x train.grad_accumulation); add pairs or lower these settings"
        )
    encoding.require_pairs(config.pairs.valid, encoded[VALID])


def _require_memory(
    config: Config,
    worker: Worker,
    encoder: Encoder,
    raw: dict[str, list[Pair]],
    encoded: dict[str, list[EncodedPair]],
) -> memory.Need:
    """The stage's peak memory. Raises UserError when the machine has less."""
    everything = [*encoding.sequences(encoded[TRAIN]), *encoding.sequences(encoded[VALID])]
    lengths = memory.LargestSizes(
        questions=len(encoded[VALID]),
        prompt=max(sequence.prompt_length for sequence in everything),
        answer=max(answer_settings(config, raw, encoder).max_tokens or 0, cost.MAX_TOKENS),
        longest=max(everything, key=lambda sequence: len(sequence.ids)),
    )
    replayed = replay.longest(encoder)
    needs = memory.stage_10(worker.model, config, lengths, replayed, worker.local_processes)
    return memory.require(needs, config.model)


def answer_settings(
    config: Config, raw: dict[str, list[Pair]], encoder: Encoder
) -> GenerationConfig:
    """The generation section, with `max_tokens` from the chosen answers if the config has none."""
    everything = [pair for split in SPLITS for pair in raw[split]]
    lengths = encoding.chosen_lengths(everything, encoder, config.data.max_length)
    return with_max_tokens(config.generation, lengths)


def reference_fingerprint(
    config: Config,
    split: str,
    encoded: list[EncodedPair],
    digests: Fingerprint,
    adapters: Path | None = None,
) -> Fingerprint:
    """What the reference of a split depends on.

    `digests` holds digests of files, as `fingerprint.of` takes them. `adapters` are SFT's, None for
    the base model's reference.
    """
    return fingerprint.of(REFERENCE[split], config.flat, digests) | {
        "token ids": encoding.digest(encoded),
        "adapters of SFT": adapters and digest.of_file(adapters / ADAPTERS),
        "lora.scale": adapters and config.lora.scale,
        # Another device or version rounds differently.
        "device": device.name(),
        "mlx": version("mlx"),
    }


def load_reference(
    setup: Setup, model: str, split: str, adapters: Path | None = None, only_read: bool = False
) -> list[Sides[float]]:
    """Return a split's reference under `model`: BASE, or AFTER_SFT with SFT's `adapters`.

    Computes what is not stored yet, from the model in its current state. For AFTER_SFT the valid
    split has only the pairs that evaluations score. Raises UserError when the reference is not
    stored and `only_read` is set.
    """
    files = setup.config.run.reference_files(model, split)
    encoded = (
        setup.evaluated_pairs if (model, split) == (AFTER_SFT, VALID) else setup.dpo_pairs[split]
    )
    current = reference_fingerprint(setup.config, split, encoded, setup.fingerprint, adapters)
    changes = reference.changes(files, current)
    complete = reference.is_complete(files, len(encoded), current)
    if only_read and not complete:
        why = f" (what changed: {'; '.join(changes)})" if changes else ""
        raise UserError(
            f"{files.folder}: no complete reference of these pairs under this model{why}; run "
            "10_train_dpo.py --only reference first"
        )
    if changes:
        print(f"10: computing the {split} reference again; what changed: {'; '.join(changes)}")
    name = f"10 reference ({model}, {split})"
    with tqdm(total=len(encoded), desc=name, unit="pair", disable=complete) as bar:
        log_probs = reference.load_or_compute(
            files,
            encoded,
            current,
            setup.worker.log_probs,
            setup.worker.size,
            lambda count: bar.update(count - bar.n),
        )
        bar.update(len(encoded) - bar.n)
    return log_probs
