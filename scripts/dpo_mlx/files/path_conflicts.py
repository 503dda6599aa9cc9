"""No two files of a run are the same, and none of them lies where it does not belong."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .bounded import DIRECTORY, other_kind
from .ownership import MANIFEST
from .run_folder import PairFiles, RunFolder
from .text import shown

OWN_FOLDER = "name a folder of its own, like data/runs/NAME"
# Folders of this repository in which no run belongs.
SHIPPED = [
    Path(__file__).resolve().parents[3] / name
    for name in ("config", "scripts", "tests", "data/sample")
]


@dataclass(frozen=True)
class RunPaths:
    """What a config says of paths: its own file, and the values of its keys."""

    config: Path
    model: str
    demo_model: bool
    run_dir: str
    source: str
    train_pairs: str
    valid_pairs: str

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.run_dir))

    @property
    def pairs(self) -> PairFiles:
        return PairFiles(Path(self.train_pairs), Path(self.valid_pairs))


@dataclass(frozen=True)
class Place:
    """A file or a folder, the config key that it comes from, and whether stages write it.
    `purpose` says what it is for when the key does not name it itself.
    """

    key: str
    path: Path
    is_output: bool
    purpose: str = ""

    @property
    def words(self) -> str:
        return f"{self.purpose} ({shown(self.path)})" if self.purpose else self.key


def places(paths: RunPaths) -> Iterator[Place]:
    """Every path of a run, those that the config names first."""
    pairs, run = paths.pairs, paths.run
    yield Place("--config", paths.config, is_output=False)
    yield Place("model", Path(paths.model), is_output=paths.demo_model)
    yield Place("data.valid_pairs", pairs.valid, is_output=True)
    yield Place("data.train_pairs", pairs.train, is_output=True)
    yield Place("data.source", Path(paths.source), is_output=False)
    manifests = {pairs.train.with_name(MANIFEST): None, pairs.valid.with_name(MANIFEST): None}
    for path in (*pairs.beside_train, pairs.lock, *manifests):
        yield Place("data.train_pairs", path, True, "a file that stage 06 keeps beside it")
    for path in sorted({*run.names, run.lock, run.path / MANIFEST}):
        yield Place("run_dir", path, True, "what a run writes into run_dir")
    yield Place("run_dir", run.sweep, True, "the folder of a sweep")


def conflicts(paths: RunPaths) -> list[str]:
    """A line for each path that cannot be used as the config says: a folder where a file must be,
    a run_dir that is not a folder of a run's own, two paths that would write one file, or one into
    another.
    """
    # Each of these makes no sense of what the one before refuses.
    return (
        [*_no_names(paths)]
        or [*_no_files(paths), *_no_run_dir(paths)]
        or [*_collisions(paths)]
        or [*_around_others(paths)]
    )


def _no_names(paths: RunPaths) -> Iterator[str]:
    for name in ("source", "train_pairs", "valid_pairs"):
        value = getattr(paths, name)
        if Path(value).name in ("", "..") or value.endswith("/"):
            yield f"data.{name}: {shown(value)} is a directory, not a file; name a file"


def _no_files(paths: RunPaths) -> Iterator[str]:
    """A line for each place of a file where something else stands: a stage would wait for ever to
    open a pipe.
    """
    for place in places(paths):
        kind = other_kind(place.path)
        if kind and not (kind == DIRECTORY and place.key in ("model", "run_dir")):
            yield f"{place.key}: {shown(place.path)} is {kind}, not a file; name another place"


def _no_run_dir(paths: RunPaths) -> Iterator[str]:
    run, value = Path(os.path.realpath(paths.run_dir)), shown(paths.run_dir)
    if not run.name:
        yield f"run_dir: {value} is the root of the disk; {OWN_FOLDER}"
    elif _is_below(Path(os.path.expanduser("~")), run):
        yield f"run_dir: {value} is your home folder, or holds it; {OWN_FOLDER}"
    elif any(_is_below(path, run) or _is_below(run, path) for path in SHIPPED):
        yield f"run_dir: {value} is among the files of this repository; {OWN_FOLDER}"
    elif run in RunFolder(run.parent).names and RunFolder(run.parent).lock.exists():
        yield f"run_dir: {value} is a folder that another run writes; {OWN_FOLDER}"
    elif os.path.lexists(paths.run_dir) and not os.path.isdir(paths.run_dir):
        yield f"run_dir: {value} is not a folder; {OWN_FOLDER}"


def _around_others(paths: RunPaths) -> Iterator[str]:
    """A run's files among a project's folders would be hard to tell from the project's. One line
    is enough of that.
    """
    run = Path(os.path.realpath(paths.run_dir))
    for key, path in (("--config", paths.config), ("data.source", Path(paths.source))):
        folder = Path(os.path.realpath(path)).parent
        if folder != run and _is_below(folder, run):
            yield (
                f"run_dir: {shown(paths.run_dir)} holds the folder of {key} ({shown(path)}); "
                f"{OWN_FOLDER}"
            )
            return


def _collisions(paths: RunPaths) -> Iterator[str]:
    told = set()  # keys: a folder stands in the way of many files, and one line is enough
    every = [(place, _identity(place.path)) for place in places(paths)]
    for (one, first), (other, second) in itertools.combinations(every, 2):
        if not (one.is_output or other.is_output) or (one.purpose and other.purpose):
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
