"""Every path of a run: what is in its folder, and what stands beside the pairs.

No other module spells these names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

LOCK = ".dpo-mlx.lock"

TRAIN, VALID = SPLITS = ("train", "valid")
# The models that a reference can be of: the base model, and the model at the end of SFT.
BASE, AFTER_SFT = "base", "sft"


@dataclass(frozen=True)
class RunFolder:
    """The folder `run_dir` and the names in it."""

    path: Path

    @property
    def settings(self) -> Path:
        """The config with every key, as the run used it."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """Each stage's minutes, which `--check` estimates."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def outcome(self) -> Path:
        """How training ended."""
        return self.path / "outcome.json"

    @property
    def fuse_report(self) -> Path:
        """How much of the adapters' margin the fused model keeps."""
        return self.path / "fuse.json"

    @property
    def report(self) -> Path:
        """The verdict, its figures and every answer."""
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The report as a page."""
        return self.path / "report.html"

    @property
    def error_log(self) -> Path:
        return self.path / "error.log"

    @property
    def adapters(self) -> Path:
        """The best adapters of the run."""
        return self.path / "adapters"

    @property
    def fused(self) -> Path:
        return self.path / "fused"

    @property
    def hugging_face(self) -> Path:
        return self.path / "hf"

    @property
    def peft(self) -> Path:
        return self.path / "peft"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def references(self) -> Path:
        return self.path / "reference"

    def reference(self, model: str) -> Path:
        """The log-probs under one model, BASE or AFTER_SFT."""
        return self.references / model

    @property
    def stamps(self) -> Path:
        return self.path / "stamps"

    def stamp(self, stage: str) -> Path:
        """The fingerprint of what a stage last wrote."""
        return self.stamps / f"{stage}.json"

    @property
    def lock(self) -> Path:
        return self.path / LOCK

    @property
    def sweep(self) -> Path:
        """The folder of a sweep's runs, beside this one; the root of a disk has none but itself."""
        run = self.path
        if run.name in ("", ".."):
            run = Path(os.path.realpath(run))
        return run.with_name(f"{run.name}_sweep") if run.name else run

    @property
    def files(self) -> list[Path]:
        """The files that the stages write."""
        return [
            self.settings,
            self.fuse_report,
            self.metrics,
            self.outcome,
            self.plan,
            self.page,
            self.report,
        ]

    @property
    def whole_folders(self) -> list[Path]:
        """The folders that a stage replaces as a whole."""
        return [self.adapters, self.fused, self.hugging_face, self.peft]

    @property
    def shared_folders(self) -> list[Path]:
        """The folders that stages add files and folders to."""
        return [self.checkpoints, self.references, self.stamps]

    @property
    def names(self) -> list[Path]:
        """Everything above that a stage may write."""
        return [*self.files, *self.whole_folders, *self.shared_folders]


@dataclass(frozen=True)
class PairFiles:
    """The files of stage 06. All lie beside the train pairs, except for the valid pairs."""

    train: Path
    valid: Path

    @property
    def splits(self) -> dict[str, Path]:
        return {TRAIN: self.train, VALID: self.valid}

    @property
    def report(self) -> Path:
        """Counts, lengths, and what was dropped and why."""
        return self.train.with_suffix(".report.json")

    @property
    def samples(self) -> Path:
        """Every batch of sampled answers, as soon as it is complete."""
        return self.train.with_suffix(".samples.jsonl")

    @property
    def samples_stamp(self) -> Path:
        """The fingerprint of the samples."""
        return self.train.with_suffix(".samples.inputs.json")

    @property
    def lock(self) -> Path:
        """Held while these files are written, because several runs may share them."""
        return self.samples.with_name(f".{self.samples.name}{LOCK}")

    @property
    def beside_train(self) -> tuple[Path, ...]:
        """What stage 06 keeps beside the train pairs."""
        return self.report, self.samples, self.samples_stamp

    @property
    def all(self) -> tuple[Path, ...]:
        return self.train, self.valid, *self.beside_train
