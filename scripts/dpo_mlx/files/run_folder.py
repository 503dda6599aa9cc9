"""Every path of a run: in its folder, and beside the pairs.

No other module contains these file names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

LOCK = ".dpo-mlx.lock"

TRAIN, VALID = SPLITS = ("train", "valid")
# The two reference models: the base model, and the model after SFT.
BASE, AFTER_SFT = "base", "sft"


@dataclass(frozen=True)
class ReferenceFiles:
    """The stored reference of one split."""

    folder: Path
    split: str

    @property
    def rows(self) -> Path:
        return self.folder / f"{self.split}.jsonl"

    @property
    def stamp(self) -> Path:
        """The fingerprint of the rows."""
        return self.folder / f"{self.split}.inputs.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder `run_dir` and the paths in it."""

    path: Path

    @property
    def config_copy(self) -> Path:
        """The config of the run, with every key."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """The minutes of each stage, as `--check` estimates them."""
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
        """The share of the adapters' margin that the fused model keeps."""
        return self.path / "fuse.json"

    @property
    def report(self) -> Path:
        """The verdict, its measurements and every answer."""
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The report as an HTML page."""
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
        """The folder of a reference model's log-probs; `model` is BASE or AFTER_SFT."""
        return self.references / model

    def reference_files(self, model: str, split: str) -> ReferenceFiles:
        return ReferenceFiles(self.reference(model), split)

    @property
    def stamps(self) -> Path:
        return self.path / "stamps"

    def stamp(self, stage: str) -> Path:
        """The fingerprint of a stage's last output."""
        return self.stamps / f"{stage}.json"

    @property
    def lock(self) -> Path:
        return self.path / LOCK

    @property
    def sweep(self) -> Path:
        """The folder of a sweep's runs, beside run_dir."""
        run = self.path
        if run.name in ("", ".."):
            run = Path(os.path.realpath(run))
        return run.with_name(f"{run.name}_sweep") if run.name else run  # the root has no sibling

    @property
    def files(self) -> list[Path]:
        """The files that the stages write."""
        return [
            self.config_copy,
            self.fuse_report,
            self.metrics,
            self.outcome,
            self.plan,
            self.page,
            self.report,
        ]

    @property
    def whole_folders(self) -> list[Path]:
        """The folders that a stage replaces completely."""
        return [self.adapters, self.fused, self.hugging_face, self.peft]

    @property
    def shared_folders(self) -> list[Path]:
        """The folders that stages add files to."""
        return [self.checkpoints, self.references, self.stamps]

    @property
    def names(self) -> list[Path]:
        """All files and folders that a stage can write."""
        return [*self.files, *self.whole_folders, *self.shared_folders]


@dataclass(frozen=True)
class PairFiles:
    """The files of stage 06. All but the valid pairs are in the folder of the train pairs."""

    train: Path
    valid: Path

    @property
    def splits(self) -> dict[str, Path]:
        return {TRAIN: self.train, VALID: self.valid}

    @property
    def report(self) -> Path:
        """Counts, answer lengths, and dropped rows by reason."""
        return self.train.with_suffix(".report.json")

    @property
    def samples(self) -> Path:
        """The sampled answers, appended batch by batch."""
        return self.train.with_suffix(".samples.jsonl")

    @property
    def samples_stamp(self) -> Path:
        """The fingerprint of the samples."""
        return self.train.with_suffix(".samples.inputs.json")

    @property
    def prompt_date(self) -> Path:
        """The date in the prompts, if the chat template writes one."""
        return self.train.with_suffix(".date.json")

    @property
    def lock(self) -> Path:
        """Stage 06 holds this lock while it writes, because several runs can share the pairs."""
        return self.samples.with_name(f".{self.samples.name}{LOCK}")

    @property
    def beside_train(self) -> tuple[Path, ...]:
        """The files that stages write beside the train pairs."""
        return self.report, self.samples, self.samples_stamp, self.prompt_date

    @property
    def all(self) -> tuple[Path, ...]:
        return self.train, self.valid, *self.beside_train
