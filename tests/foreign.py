"""Files, links and folders of somebody else's, and whether they are still what they were."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Makes something of theirs under a name.
Put = Callable[[Path], None]
Look = tuple[str, str | bytes | list[Any]]

THEIRS = '{"theirs": true}\n'


def text(path: Path) -> None:
    path.write_text(THEIRS)


def empty(path: Path) -> None:
    path.touch()


def link(path: Path) -> None:
    target = path.with_name(f"target of {path.name}")
    target.write_text(THEIRS)
    path.symlink_to(target.name)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("theirs")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def look(path: Path) -> Look:
    """All that could be changed of a path: its kind, and its bytes, its target, what is in it."""
    if path.is_symlink():
        return "link", os.readlink(path)
    if path.is_dir():
        return "folder", [(entry.name, look(entry)) for entry in sorted(path.iterdir())]
    return ("file", path.read_bytes()) if path.is_file() else ("other", "")


# Files that other tools keep beside one of ours, and what people put there.
NEIGHBOURS = [
    "uv.lock",
    "poetry.lock",
    "run/.lock",
    "run/notes.txt",
    "run/.gitignore",
    "run/config.yml",
    "run/adapters.zip",
    "run/fused.gguf",
    "run/.fused.tmp",
    "run/checkpoints/README",
    "run/checkpoints/dpo-000003-my-backup",
    "run/checkpoints/sft-1",
    "run/checkpoints/.dpo-000003.tmp",
    "run/reference/base/valid.csv",
    "run/stamps/mine.txt",
    "run/pairs/train.lock",
    "run/pairs/train.csv",
    "run/pairs/.train.jsonl.tmp",
    "run_sweep_notes",
]


def put_neighbours(where: Path) -> None:
    """A file, a link or a folder under each of NEIGHBOURS."""
    for number, name in enumerate(NEIGHBOURS):
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (text, link, folder)[number % 3](where / name)


def neighbours(where: Path) -> dict[str, Look]:
    """What they are now, with the targets of the links."""
    targets = [str(Path(name).with_name(f"target of {Path(name).name}")) for name in NEIGHBOURS]
    return {
        name: look(where / name)
        for name in [*NEIGHBOURS, *targets]
        if os.path.lexists(where / name)
    }
