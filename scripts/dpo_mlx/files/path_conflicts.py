"""Checks that no two paths of a run collide, and that run_dir is a folder of its own."""

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

MAY_BE_FOLDERS = ("model", "run_dir", "data.source")
USE_OWN_FOLDER = "set it to a folder of its own, like data/runs/NAME"
# Folders of this repository that a run must not use.
REPOSITORY_FOLDERS = [
    Path(__file__).resolve().parents[3] / name
    for name in ("config", "scripts", "tests", "data/sample", "data/cost", "data/replay")
]


@dataclass(frozen=True)
class RunPaths:
    """The paths in a config: its own file, and the values of its path keys."""

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
    """A file or a folder, the config key that sets it, and whether stages write it. `purpose` says
    what it is for, unless it is the value of the key itself.
    """

    key: str
    path: Path
    is_output: bool
    purpose: str = ""

    @property
    def description(self) -> str:
        return f"{self.purpose} ({shown(self.path)})" if self.purpose else self.key


def places(paths: RunPaths) -> Iterator[Place]:
    """Yield every path of a run, starting with those in the config."""
    pairs, run = paths.pairs, paths.run
    yield Place("--config", paths.config, is_output=False)
    yield Place("model", Path(paths.model), is_output=paths.demo_model)
    yield Place("data.valid_pairs", pairs.valid, is_output=True)
    yield Place("data.train_pairs", pairs.train, is_output=True)
    yield Place("data.source", Path(paths.source), is_output=False)
    manifests = {pairs.train.with_name(MANIFEST): None, pairs.valid.with_name(MANIFEST): None}
    for path in (*pairs.beside_train, pairs.lock, *manifests):
        yield Place(
            "data.train_pairs", path, True, "a file that stage 06 writes beside data.train_pairs"
        )
    for path in sorted({*run.names, run.lock, run.path / MANIFEST}):
        yield Place("run_dir", path, True, "an output in run_dir")
    yield Place("run_dir", run.sweep, True, "the folder of a sweep")


def conflicts(paths: RunPaths) -> list[str]:
    """Returns an error line for each unusable path: a folder in place of a file, a run_dir that is
    not a folder of its own, two keys that name the same file, a path inside another one.
    """
    # Each check relies on the ones before it.
    return (
        [*_missing_names(paths)]
        or [*_other_kinds(paths), *_bad_run_dir(paths)]
        or [*_collisions(paths)]
        or [*_run_dir_around_inputs(paths)]
    )


def _missing_names(paths: RunPaths) -> Iterator[str]:
    for name in ("source", "train_pairs", "valid_pairs"):
        value = getattr(paths, name)
        is_folder = value.endswith("/") and name != "source"
        if Path(value).name in ("", "..") or is_folder:
            yield f"data.{name}: {shown(value)} is a directory, not a file; give the path of a file"


def _other_kinds(paths: RunPaths) -> Iterator[str]:
    """Yield an error for each path of a file that exists but is none, such as a pipe, which a stage
    would wait for forever.
    """
    for place in places(paths):
        kind = other_kind(place.path)
        if kind and not (kind == DIRECTORY and place.key in MAY_BE_FOLDERS):
            yield f"{place.key}: {shown(place.path)} is {kind}, not a file; choose another path"


def _bad_run_dir(paths: RunPaths) -> Iterator[str]:
    run, value = Path(os.path.realpath(paths.run_dir)), shown(paths.run_dir)
    if not run.name:
        yield f"run_dir: {value} is the root of the disk; {USE_OWN_FOLDER}"
    elif _is_inside(Path(os.path.expanduser("~")), run):
        yield f"run_dir: {value} is your home folder or contains it; {USE_OWN_FOLDER}"
    elif any(_is_inside(path, run) or _is_inside(run, path) for path in REPOSITORY_FOLDERS):
        yield (
            f"run_dir: {value} is inside this project's own folders, or contains one of them; "
            f"{USE_OWN_FOLDER}"
        )
    elif run in RunFolder(run.parent).names and RunFolder(run.parent).lock.exists():
        yield f"run_dir: {value} is a folder that another run writes to; {USE_OWN_FOLDER}"
    elif os.path.lexists(paths.run_dir) and not os.path.isdir(paths.run_dir):
        yield f"run_dir: {value} is not a folder; {USE_OWN_FOLDER}"


def _run_dir_around_inputs(paths: RunPaths) -> Iterator[str]:
    """Yield an error when run_dir contains the folder of the config or the source: it is then
    probably the user's project folder.
    """
    run = Path(os.path.realpath(paths.run_dir))
    for key, path in (("--config", paths.config), ("data.source", Path(paths.source))):
        folder = Path(os.path.realpath(path)).parent
        if folder != run and _is_inside(folder, run):
            yield (
                f"run_dir: {shown(paths.run_dir)} contains the folder of {key} ({shown(path)}); "
                f"{USE_OWN_FOLDER}"
            )
            return


def _collisions(paths: RunPaths) -> Iterator[str]:
    """Yield one error for each pair of keys whose paths collide. Inputs may share a path."""
    reported_keys = set()
    canonical = [(place, _canonical(place.path)) for place in places(paths)]
    for (one, one_path), (other, other_path) in itertools.combinations(canonical, 2):
        if not (one.is_output or other.is_output) or (one.purpose and other.purpose):
            continue
        if one_path == other_path or _is_same_file(one.path, other.path):
            relation = "is also"
        elif one_path.is_relative_to(other_path):
            relation = "is inside"
        elif other_path.is_relative_to(one_path):
            relation = "contains"
        else:
            continue
        if (one.key, other.key) not in reported_keys:
            reported_keys.add((one.key, other.key))
            yield (
                f"{one.key}: {shown(one.path)} {relation} {other.description}; choose another path"
            )


def _canonical(path: Path) -> Path:
    """The path as a Mac compares it: case and the Unicode form of accents make no difference."""
    folded = unicodedata.normalize("NFD", os.path.realpath(path)).casefold()
    return Path(unicodedata.normalize("NFC", folded))


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is the folder or inside it."""
    return _canonical(path).is_relative_to(_canonical(folder))


def _is_same_file(one: Path, other: Path) -> bool:
    """Whether both paths exist and name the same file (a hard link)."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False
