"""Checkpoints: a run that is killed at any moment resumes and ends in the same bits.

`checkpoints/PHASE-UPDATE` holds the adapters in mlx-lm's format, the optimizer's state as tensors,
and the rest as JSON. A checkpoint holds no random state, because each shuffle, each update's
dropout and each batch of answers has a seed that its number determines.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from ..config import LoraConfig
from ..files import jsonl, ownership, records
from ..files.errors import UserError, doing
from ..files.fingerprint import Fingerprint
from ..files.model_files import ADAPTERS
from ..files.results import Evaluation, Measures
from ..files.schema import Count
from ..model.adapters import adapter_bytes, load_adapters, save_adapters
from ..model.tensors import load_tensors, save_tensors
from ..scoring.objectives import PHASES, SFT
from ..voice.answers import NAMES

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
VERSION = 4  # of the contents of STATE

NEWEST = 2  # checkpoints to keep
# The most on the disk at a time: the newest two, the one being saved, the end of SFT, up to three
# that are the best for one of these, and the adapters that the run keeps.
MAX_CHECKPOINTS = 8

# Limits on how often the clock saves: seconds between two checkpoints, share of the time that
# saving may take, and bytes written per second on average.
MIN_SECONDS, TIME_SHARE, WRITE_RATE = 300, 0.01, 1e6


@dataclass
class State:
    """Where a run is, besides its tensors.

    `update` counts the updates of all phases, `phase_start` those before this phase. `rows` counts
    the rows of metrics.jsonl. `evaluated` says whether this update has been evaluated. `measures`
    are the measures of the current model's answers, None before the evaluation; `base` are the
    base model's measures. `best` is the best evaluation of the run, `end_of_sft` the last one of
    SFT, `last` the last one of all. `skipped` counts the updates that gave NaN or an infinity,
    `skipped_in_a_row` how many of them came last in a row. `stopped` says why the run must not go
    on.
    """

    phase: str
    phase_start: Count = 0
    update: Count = 0
    rows: Count = 0
    evaluated: bool = False
    measures: Measures | None = None
    base: Measures | None = None
    best: Evaluation | None = None
    end_of_sft: Evaluation | None = None
    last: Evaluation | None = None
    skipped: Count = 0
    skipped_in_a_row: Count = 0
    stopped: list[str] = field(default_factory=list)

    @property
    def updates_of_phase(self) -> int:
        return self.update - self.phase_start

    def at_phase(self, phase: str) -> State:
        """The state at the start of the next phase."""
        return State(
            phase,
            phase_start=self.update,
            update=self.update,
            rows=self.rows,
            measures=self.measures,
            base=self.base,
            best=self.best,
            end_of_sft=self.end_of_sft,
            last=self.last,
        )


class SaveClock:
    """Says when a checkpoint is due, so that saving takes a small share of the time and wears out
    no disk. Times are in seconds of `clock`, sizes in bytes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = clock() + MIN_SECONDS

    def is_due(self) -> bool:
        return self._clock() >= self._next

    @contextmanager
    def saving(self, size: int) -> Iterator[None]:
        """Time the body, which writes `size` bytes, and set when the next checkpoint is due."""
        started = self._clock()
        yield
        ended = self._clock()
        self._next = ended + max(MIN_SECONDS, (ended - started) / TIME_SHARE, size / WRITE_RATE)


@dataclass(frozen=True)
class CheckpointFingerprints:
    """The inputs that determine a checkpoint's adapters, and those that determine which is best."""

    adapters: Fingerprint = field(default_factory=dict)
    choice: Fingerprint = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """The contents of STATE.

    Raises ValueError for a state that no run can have: the first checkpoint comes after the first
    evaluation, which has measures of the base model and makes a best one.
    """

    version: int
    state: State
    fingerprints: CheckpointFingerprints

    def __post_init__(self) -> None:
        state = self.state
        for key in ("base", "best", "last"):
            if getattr(state, key) is None:
                raise ValueError(f'"state.{key}" is null, but an evaluation has filled it')
        assert state.base is not None
        self._require_measures("base", state.base)
        for key, evaluation in self._evaluations():
            self._require_measures(f"{key}.measures", evaluation.measures)
        if state.measures:
            self._require_measures("measures", state.measures)
        if state.phase_start > state.update:
            raise ValueError('"state.phase_start" is greater than "state.update"')

    def _evaluations(self) -> Iterator[tuple[str, Evaluation]]:
        for key in ("best", "last", "end_of_sft"):
            if (evaluation := getattr(self.state, key)) is not None:
                yield key, evaluation

    def _require_measures(self, key: str, measures: Measures) -> None:
        for name in NAMES:
            if name not in measures.means:
                raise ValueError(
                    f'lacks "state.{key}.means.{name}"; another version may have written it'
                )


def size(model: nn.Module) -> int:
    """Bytes of a checkpoint: the adapters and AdamW's two moments."""
    return 3 * adapter_bytes(model)


class Checkpoints:
    """The checkpoints of a run: the newest two, the end of SFT, and the best checkpoint that each
    of these names.

    `fingerprints` are those that the checkpoints of each phase are saved with.
    """

    def __init__(
        self, folder: Path, fingerprints: Mapping[str, CheckpointFingerprints] | None = None
    ) -> None:
        self.folder = folder
        self.fingerprints = fingerprints or {}

    def path(self, phase: str, update: int) -> Path:
        return self.folder / f"{phase}-{update:06d}"

    def newest(self, phase: str) -> Path | None:
        """The newest checkpoint of a phase."""
        return next(reversed(self._all(phase)), None)

    def best(self, update: int) -> Path:
        """The checkpoint of an update. At the update between two phases, the earlier phase's.

        Raises UserError when it does not exist.
        """
        for phase in PHASES:
            if (path := self.path(phase, update)).exists():
                return path
        raise UserError(
            f"{self.folder}: the best checkpoint, of update {update}, is missing; delete that "
            "folder and run 10_train_dpo.py again"
        )

    def save(self, state: State, model: nn.Module, lora: LoraConfig, optimizer: Optimizer) -> None:
        """Write a checkpoint, then remove those that are no longer needed.

        Raises MLX's RuntimeError, and writes nothing, when a GPU command has failed.
        """
        # Metal reports a failed command late, and until then the arrays hold garbage.
        mx.eval(model.trainable_parameters(), optimizer.state)
        mx.synchronize()
        path = self.path(state.phase, state.update)
        with doing("saving", path), ownership.new_folder(path) as temporary:
            save_adapters(model, lora, temporary)
            tensors: Any = tree_flatten(optimizer.state)
            save_tensors(temporary / OPTIMIZER, dict(tensors))
            fingerprints = self.fingerprints.get(state.phase, CheckpointFingerprints())
            jsonl.write_json(temporary / STATE, asdict(Contents(VERSION, state, fingerprints)))
        self.prune()

    def clear(self, phase: str) -> None:
        """Remove the checkpoints of a phase and of later phases, the newest first.

        Raises UserError for a checkpoint that holds the user's own files.
        """
        for later in reversed(PHASES[PHASES.index(phase) :]):
            for path in reversed(self._all(later)):
                ownership.remove_folder(path)

    def _all(self, phase: str) -> list[Path]:
        """The checkpoints of a phase, by update. A folder with another name is the user's."""
        pattern = re.compile(rf"{phase}-\d{{6,}}")
        paths = self.folder.glob(f"{phase}-*")
        return sorted(path for path in paths if pattern.fullmatch(path.name))

    def prune(self) -> None:
        """Remove checkpoints that are no longer needed, and leftovers of a removal that was killed.

        A checkpoint that holds the user's own files stays.
        """
        ownership.remove_leftovers(self.folder)
        checkpoints = [path for phase in PHASES for path in self._all(phase)]
        needed = {*checkpoints[-NEWEST:], *self._all(SFT)[-1:]}
        needed |= set(self._best_of(needed))
        for path in checkpoints:
            if path not in needed:
                ownership.remove_if_untouched(path)

    def _best_of(self, paths: set[Path]) -> Iterator[Path]:
        for path in paths:
            best = read(path)[0].best
            if best is not None:
                yield self.best(best.update)


def read(path: Path) -> tuple[State, CheckpointFingerprints]:
    """(state, fingerprints) of a checkpoint.

    Raises UserError for one that is damaged, that another version wrote, or that is a copy.
    """
    remedy = _remedy(path)
    values = jsonl.read_json(path / STATE, remedy)
    if isinstance(values, dict) and values.get("version") != VERSION:
        raise UserError(
            f"{path}: was written by another version ({values.get('version')!r:.20}; this one "
            f"reads {VERSION}); continue with that version, or move {path.parent} away to train "
            "again"
        )
    contents = records.parse(path / STATE, values, Contents, remedy)
    state = contents.state
    if path.name != f"{state.phase}-{state.update:06d}":
        raise UserError(
            f"{path}: is a copy of update {state.update} of {state.phase}; give it another name, "
            "or move it away"
        )
    return state, contents.fingerprints


def restore(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load a checkpoint's adapters into the model and its tensors into the optimizer.

    Raises UserError when they are damaged or belong to another model.
    """
    expected: Any = tree_flatten(optimizer.state)
    tensors = load_tensors(path / OPTIMIZER, dict(expected))
    load_adapters(model, path)
    require_unchanged(path)
    optimizer.state = tree_unflatten(list(tensors.items()))
    mx.eval(optimizer.state)


def require_unchanged(path: Path) -> None:
    """Raises UserError when a checkpoint's tensors have changed since they were saved."""
    for name in (ADAPTERS, OPTIMIZER):
        ownership.require(path / name, _remedy(path))


def _remedy(path: Path) -> str:
    return f"move {path} away, and the same command resumes from the checkpoint before it"
