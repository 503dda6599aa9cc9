"""Everything a run is, saved and taken up again: killed anywhere, it goes on to the same bits.

`checkpoints/PHASE-UPDATE` holds the adapters in mlx-lm's format, the optimizer's state as tensors,
and the rest as JSON. Nothing random outlives an update: each shuffle, each update's dropout and
each batch of answers is seeded by its number.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from . import jsonl, models, ownership, records
from .config import LoraConfig
from .errors import UserError, doing
from .fingerprint import Fingerprint
from .guard import Kept
from .model_files import ADAPTERS
from .phase import PHASES, SFT
from .typed import Count
from .writing import GREEDY, NAMES, Measures

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
VERSION = 2  # of what is in STATE

LAST = 2  # checkpoints that are kept

# Limits on saving by the clock: seconds between checkpoints, share of the time spent on saving, and
# bytes written a second on average.
LEAST_SECONDS, TIME_SHARE, WRITE_RATE = 300, 0.01, 1e6


@dataclass
class State:
    """Where a run is, beside its tensors.

    `update` is the last one done, counted through both phases, `evaluated` whether its evaluation
    is done; `rows` are those of metrics.jsonl. `written` are the measures of the last evaluation,
    `base` those of the base model, `best` what the guard keeps. `skipped` updates had numbers that
    are not finite, `in_a_row` of them just now; `stopped` says why the run must not go on.
    """

    phase: str
    update: Count = 0
    rows: Count = 0
    evaluated: bool = False
    written: Measures = field(default_factory=dict)
    base: Measures = field(default_factory=dict)
    best: Kept | None = None
    skipped: Count = 0
    in_a_row: Count = 0
    stopped: list[str] = field(default_factory=list)


class SaveClock:
    """Decides when the next checkpoint is due, from the time since the last one and its cost.

    A checkpoint is hundreds of megabytes. Saving one after every update would slow training down
    and wear the disk. Times are in seconds of `clock`, sizes in bytes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = clock() + LEAST_SECONDS

    def is_due(self) -> bool:
        return self._clock() >= self._next

    @contextmanager
    def saving(self, size: int) -> Iterator[None]:
        """Time the body, which writes a checkpoint of `size` bytes; the next is due after that."""
        started = self._clock()
        yield
        ended = self._clock()
        self._next = ended + max(LEAST_SECONDS, (ended - started) / TIME_SHARE, size / WRITE_RATE)


@dataclass(frozen=True)
class Origin:
    """What determines the adapters of a checkpoint, and what determines which of them are kept."""

    adapters: Fingerprint = field(default_factory=dict)
    judgement: Fingerprint = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """What STATE holds. Raises ValueError for a state in which no run is: a checkpoint comes after
    the first evaluation; a phase has `written` nothing before its own.
    """

    version: int
    state: State
    origin: Origin

    def __post_init__(self) -> None:
        state = self.state
        for name, measures in (("base", state.base), ("written", state.written or state.base)):
            if lacking := [n for m in NAMES for n in (m, f"{GREEDY}{m}") if n not in measures]:
                raise ValueError(
                    f'lacks "state.{name}.{lacking[0]}"; another version may have written it'
                )
        if state.best is None:
            raise ValueError('"state.best" is null, but an evaluation has chosen one')


def size(model: nn.Module) -> int:
    """Bytes of a checkpoint: the adapters and AdamW's two moments."""
    return 3 * models.adapter_bytes(model)


class Checkpoints:
    """The checkpoints of a run: the last two, the end of SFT, and the best that each one knows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, phase: str, update: int) -> Path:
        return self.folder / f"{phase}-{update:06d}"

    def newest(self, phase: str) -> Path | None:
        return next(reversed(self._all(phase)), None)

    def best(self, update: int) -> Path:
        """The checkpoint of an update, of the phase that came to it first."""
        for phase in PHASES:
            if (path := self.path(phase, update)).exists():
                return path
        raise UserError(
            f"{self.folder}: the checkpoint of update {update}, the best so far, is gone; delete "
            "that folder and run 10_train_dpo.py again"
        )

    def save(
        self,
        state: State,
        origin: Origin,
        model: nn.Module,
        lora: LoraConfig,
        optimizer: Optimizer,
    ) -> None:
        """Write a checkpoint, then remove those that are no longer needed.

        Raises MLX's RuntimeError, and writes nothing, when a GPU command has failed.
        """
        # Metal reports a failed command late, and until then its arrays hold garbage.
        mx.eval(model.trainable_parameters(), optimizer.state)
        mx.synchronize()
        path = self.path(state.phase, state.update)
        with doing("saving", path), ownership.new_folder(path) as temporary:
            models.save_adapters(model, lora, temporary)
            tensors: Any = tree_flatten(optimizer.state)
            models.save_tensors(temporary / OPTIMIZER, dict(tensors))
            jsonl.write_json(temporary / STATE, asdict(Saved(VERSION, state, origin)))
        self.prune()

    def clear(self, phase: str) -> None:
        """Remove the checkpoints of a phase and of those after it, the latest first."""
        for later in reversed(PHASES[PHASES.index(phase) :]):
            for path in reversed(self._all(later)):
                ownership.remove_folder(path)

    def _all(self, phase: str) -> list[Path]:
        """Those of a phase by update; a copy under another name is somebody's backup."""
        name = re.compile(rf"{phase}-\d{{6,}}")
        paths = self.folder.glob(f"{phase}-*")
        return sorted(path for path in paths if name.fullmatch(path.name))

    def prune(self) -> None:
        """Remove what need not be kept, also what a kill has left of that. A checkpoint in which
        somebody put something stays.
        """
        ownership.remove_leftovers(self.folder)
        everything = [path for phase in PHASES for path in self._all(phase)]
        kept = {*everything[-LAST:], *self._all(SFT)[-1:]}
        kept |= set(self._known_best(kept))
        for path in everything:
            if path not in kept:
                ownership.remove_if_untouched(path)

    def _known_best(self, paths: set[Path]) -> Iterator[Path]:
        for path in paths:
            best = read(path)[0].best
            if best is not None:
                yield self.best(best.update)


def read(path: Path) -> tuple[State, Origin]:
    """Where a checkpoint is, and what it was made of. Raises UserError for a damaged one, or one
    of another version.
    """
    remedy = _remedy(path)
    values = jsonl.read_json(path / STATE, remedy)
    if isinstance(values, dict) and values.get("version") != VERSION:
        raise UserError(
            f"{path}: was written by another version ({values.get('version')!r:.20}, this one "
            f"reads {VERSION}); go on with that one, or {remedy}"
        )
    saved = records.read(path / STATE, Saved, remedy)
    if path.name != f"{saved.state.phase}-{saved.state.update:06d}":
        raise UserError(
            f"{path}: is a copy of update {saved.state.update} of {saved.state.phase}; give it "
            "another name, or move it away"
        )
    return saved.state, saved.origin


def restore(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """The adapters and the optimizer's state of a checkpoint.

    Raises UserError when they are damaged or of another model, with both as they were.
    """
    expected: Any = tree_flatten(optimizer.state)
    state = models.load_tensors(path / OPTIMIZER, dict(expected))
    models.load_adapters(model, path)
    require_unchanged(path)
    optimizer.state = tree_unflatten(list(state.items()))
    mx.eval(optimizer.state)


def require_unchanged(path: Path) -> None:
    """Raises UserError when the tensors of a checkpoint are not those that were saved."""
    for name in (ADAPTERS, OPTIMIZER):
        ownership.require(path / name, _remedy(path))


def _remedy(path: Path) -> str:
    return f"move {path} away, and the same command goes on from the one before"
