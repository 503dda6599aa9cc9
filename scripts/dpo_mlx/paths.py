"""Which files a run reads and writes, and that no two of them are the same."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .bounded import DIRECTORY, other_kind, shown
from .lock import LOCK, OWN
from .ownership import MANIFEST

if TYPE_CHECKING:
    from .config import Config

# What stage 06 writes beside the train pairs: the suffixes in the place of the file's own.
SAMPLES = ".samples.jsonl"
BESIDE_PAIRS = (".report.json", SAMPLES, ".samples.inputs.json")
SWEEP = "_sweep"
OWN_FOLDER = "name a folder of its own, like data/runs/NAME"
# Folders of this repository in which no run belongs.
SHIPPED = [
    Path(__file__).resolve().parents[2] / name
    for name in ("config", "scripts", "tests", "data/sample")
]


@dataclass(frozen=True)
class Place:
    """A file or a folder, the config's key that it comes from, and whether stages write it.
    `derived` says what it is for when the key does not name it itself.
    """

    key: str
    path: Path
    written: bool
    derived: str = ""

    @property
    def words(self) -> str:
        return f"{self.derived} ({shown(self.path)})" if self.derived else self.key


def places(config: Config, file: Path) -> Iterator[Place]:
    """Every path of a run whose config is `file`, those that the config names first."""
    data = config.data
    yield Place("--config", file, written=False)
    yield Place("model", Path(config.model), written=config.demo_model)
    yield Place("data.valid_pairs", Path(data.valid_pairs), written=True)
    yield Place("data.train_pairs", Path(data.train_pairs), written=True)
    yield Place("data.source", Path(data.source), written=False)
    train, valid = Path(data.train_pairs), Path(data.valid_pairs)
    beside = [train.with_suffix(suffix) for suffix in BESIDE_PAIRS]
    lock = train.with_name(f".{train.with_suffix(SAMPLES).name}{LOCK}")
    beside += [lock, train.with_name(MANIFEST)]
    if valid.parent != train.parent:
        beside.append(valid.with_name(MANIFEST))
    for path in beside:
        yield Place("data.train_pairs", path, True, "a file that stage 06 keeps beside it")
    for name in sorted({*OWN, LOCK, MANIFEST}):
        yield Place("run_dir", config.run / name, True, "what a run writes into run_dir")
    yield Place("run_dir", sweep_folder(config), True, "the folder of a sweep")


def sweep_folder(config: Config) -> Path:
    """Where the runs of a sweep are, beside the run's own folder."""
    run = config.run
    if run.name in ("", ".."):
        run = Path(os.path.realpath(run))
    if not run.name:  # the root of the disk
        return run
    return run.with_name(f"{run.name}{SWEEP}")


def conflicts(config: Config, file: Path) -> list[str]:
    """A line for each path that cannot be used as the config says: a folder where a file must be,
    a run_dir that is no folder of a run's own, two paths that would write one file, or one into
    another.
    """
    # Each of these makes no sense of what the one before refuses.
    return (
        [*_no_names(config)]
        or [*_no_files(config, file), *_no_run_dir(config)]
        or [*_collisions(config, file)]
        or [*_around_others(config, file)]
    )


def _no_names(config: Config) -> Iterator[str]:
    for name in ("source", "train_pairs", "valid_pairs"):
        value = getattr(config.data, name)
        if Path(value).name in ("", "..") or value.endswith("/"):
            yield f"data.{name}: {shown(value)} is a directory, not a file; name a file"


def _no_files(config: Config, file: Path) -> Iterator[str]:
    """A line for each place of a file where something else stands: a stage would wait for ever to
    open a pipe.
    """
    for place in places(config, file):
        kind = other_kind(place.path)
        if kind and not (kind == DIRECTORY and place.key in ("model", "run_dir")):
            yield f"{place.key}: {shown(place.path)} is {kind}, not a file; name another place"


def _no_run_dir(config: Config) -> Iterator[str]:
    run, value = Path(os.path.realpath(config.run)), shown(config.run_dir)
    if not run.name:
        yield f"run_dir: {value} is the root of the disk; {OWN_FOLDER}"
    elif _is_below(Path(os.path.expanduser("~")), run):
        yield f"run_dir: {value} is your home folder, or holds it; {OWN_FOLDER}"
    elif any(_is_below(path, run) or _is_below(run, path) for path in SHIPPED):
        yield f"run_dir: {value} is among the files of this repository; {OWN_FOLDER}"
    elif run.name in OWN and (run.parent / LOCK).exists():
        yield f"run_dir: {value} is a folder that another run writes; {OWN_FOLDER}"
    elif os.path.lexists(config.run) and not os.path.isdir(config.run):
        yield f"run_dir: {value} is no folder; {OWN_FOLDER}"


def _around_others(config: Config, file: Path) -> Iterator[str]:
    """A run's files among a project's folders would be hard to tell from the project's. One line
    is enough of that.
    """
    run = Path(os.path.realpath(config.run))
    for key, path in (("--config", file), ("data.source", Path(config.data.source))):
        folder = Path(os.path.realpath(path)).parent
        if folder != run and _is_below(folder, run):
            yield (
                f"run_dir: {shown(config.run_dir)} holds the folder of {key} ({shown(path)}); "
                f"{OWN_FOLDER}"
            )
            return


def _collisions(config: Config, file: Path) -> Iterator[str]:
    told = set()  # keys: a folder stands in the way of many files, and one line is enough
    every = [(place, _identity(place.path)) for place in places(config, file)]
    for (one, first), (other, second) in itertools.combinations(every, 2):
        if not (one.written or other.written) or (one.derived and other.derived):
            continue
        if first == second or _is_one_file(one.path, other.path):
            how = "is also"
        elif first.is_relative_to(second):
            how = "would lie inside"
        elif second.is_relative_to(first):
            how = "would have to hold"
        else:
            continue
        if (one.key, other.key) not in told:
            told.add((one.key, other.key))
            yield f"{one.key}: {shown(one.path)} {how} {other.words}; name another path"


def _identity(path: Path) -> Path:
    """What a Mac takes for the same path: there `Train.jsonl` is `train.jsonl`, and an accent is
    the same in one character or two.
    """
    folded = unicodedata.normalize("NFD", os.path.realpath(path)).casefold()
    return Path(unicodedata.normalize("NFC", folded))


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a path is the folder or inside of it."""
    return _identity(path).is_relative_to(_identity(folder))


def _is_one_file(one: Path, other: Path) -> bool:
    """Whether both exist and are one file under two names (a hard link)."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False
