"""Files and folders that a crash cannot halve, and what is never replaced or removed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from dpo_mlx.files import atomic, jsonl, ownership
from dpo_mlx.files.atomic import require_space
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.ownership import MANIFEST, new_folder, remove_folder
from dpo_mlx.model.tensors import save_tensors

TEMPORARY = ".f.dpo-mlx.tmp"


def fill(folder: Path, text: str) -> Path:
    with new_folder(folder) as temporary:
        (temporary / "file").write_text(text)
        (temporary / "below").mkdir()
        (temporary / "below" / "more").write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 4096 bytes: what a full disk does, as an EFBIG. Not for the whole of
    a test, as pytest's own output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_new_folder_takes_the_old_one_s_place(tmp_path):
    """Twice under one name: the second content alone, and nothing beside it."""
    folder = fill(tmp_path / "a" / "f", "old")
    fill(folder, "new")
    assert names(folder) == {"file", "below", MANIFEST}
    assert (folder / "file").read_text() == (folder / "below" / "more").read_text() == "new"
    assert names(folder.parent) == {"f"}


def test_at_every_moment_a_whole_folder_is_there(tmp_path, monkeypatch):
    """Seen before each sync and each removal, the name holds all of the old or all of the new."""
    folder, seen = fill(tmp_path / "f", "old"), []

    def watched(original: Callable[[Path], None]) -> Callable[[Path], None]:
        def look_first(path: Path) -> None:
            seen.append(((folder / "file").read_text(), (folder / "below/more").read_text()))
            original(path)

        return look_first

    monkeypatch.setattr(atomic, "sync", watched(atomic.sync))
    monkeypatch.setattr(ownership, "_delete", watched(ownership._delete))
    fill(folder, "new")
    assert set(seen) == {("old", "old"), ("new", "new")}


def test_where_names_cannot_be_swapped_in_one_step(tmp_path, monkeypatch):
    """A file system without the call: the same result in three steps."""

    class Refuses:
        def renameat2(self, *_: object) -> int:
            return -1

        renamex_np = renameat2

    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_: Refuses())  # type: ignore[attr-defined]
    folder = fill(tmp_path / "f", "old")
    fill(folder, "new")
    assert (folder / "file").read_text() == "new" and names(tmp_path) == {"f"}
    # A kill after the first of the three steps, and one after the second.
    aside = tmp_path / f"{TEMPORARY}.old"
    folder.rename(aside)
    fill(folder, "newer")
    shutil.copytree(folder, aside)
    assert (fill(folder, "newest") / "file").read_text() == "newest" and names(tmp_path) == {"f"}


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError, ValueError])
def test_a_failed_block_leaves_the_old_folder(fault, tmp_path):
    """Whatever ends the block: the old content, and no half of the new one."""
    folder = fill(tmp_path / "f", "old")
    with pytest.raises(fault), new_folder(folder) as temporary:
        (temporary / "file").write_text("new")
        raise fault
    assert (folder / "file").read_text() == "old" and names(tmp_path) == {"f"}


def foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def foreign_link(path: Path) -> None:
    path.symlink_to(fill(path.with_name("elsewhere"), "mine"))


@pytest.mark.parametrize("make", [foreign_folder, foreign_link, Path.touch])
def test_what_was_not_made_here_stays(make, tmp_path):
    """A folder without a manifest, a link to one, a file: not replaced, not removed, and neither
    under the temporary name.
    """
    for name in ("f", TEMPORARY):
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
        make(tmp_path / name)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=f"{name}: was not made by this pipeline.*run_dir"):
            fill(tmp_path / "f", "new")
        if name == "f":
            with pytest.raises(UserError, match="was not made"):
                remove_folder(tmp_path / "f")
        assert sorted(tmp_path.rglob("*")) == before
        path = tmp_path / name
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def test_leftovers_of_a_crash_are_no_hindrance(tmp_path):
    """A half-made temporary folder, one killed before its manifest, an empty folder."""
    fill(tmp_path / "g", "half").rename(tmp_path / TEMPORARY)
    assert (fill(tmp_path / "f", "new") / "file").read_text() == "new"
    (tmp_path / TEMPORARY).mkdir()
    fill(tmp_path / "f", "newer")
    (tmp_path / "g").mkdir()
    fill(tmp_path / "g", "new")
    assert names(tmp_path) == {"f", "g"}


def test_removed_means_gone(tmp_path):
    """And nothing is left under the temporary name."""
    remove_folder(fill(tmp_path / "f", "old"))
    assert names(tmp_path) == set()


def test_a_full_disk_in_append_leaves_whole_rows(tmp_path):
    """The row that does not fit is not there at all; the error names the file."""
    path = tmp_path / "rows.jsonl"
    jsonl.append(path, [{"a": "x" * 4000}])
    before = path.read_bytes()
    with small_files(), pytest.raises(OSError) as error:
        jsonl.append(path, [{"a": 1}, {"b": "y" * 4000}])
    assert error.value.filename == str(path) and error.value.errno == errno.EFBIG
    assert path.read_bytes() == before


def test_a_full_disk_in_write_leaves_the_old_file(tmp_path):
    """The old rows under the name, and no temporary file that takes the last space."""
    path = tmp_path / "rows.jsonl"
    jsonl.write(path, [{"a": 1}])
    with small_files(), pytest.raises(OSError) as error:
        jsonl.write(path, [{"b": "y" * 5000}])
    assert error.value.errno == errno.EFBIG
    assert path.read_text() == '{"a": 1}\n' and names(tmp_path) == {"rows.jsonl", MANIFEST}


def test_a_full_disk_in_tensors_is_an_oserror(tmp_path):
    """MLX says it as a RuntimeError; here it names the file, as for any other."""
    with small_files(), pytest.raises(OSError) as error:
        save_tensors(tmp_path / "t.safetensors", {"a": mx.zeros(5000)})
    assert error.value.filename == str(tmp_path / "t.safetensors")
    assert error.value.errno == errno.ENOSPC


def test_other_errors_of_mlx_are_not_the_disk_s(tmp_path):
    """A computation that fails while it is saved stays what it is."""
    with pytest.raises(RuntimeError, match="not a disk"), atomic.disk_errors(tmp_path):
        raise RuntimeError("not a disk")


def test_space_is_asked_of_the_disk_it_will_be_on(tmp_path):
    """Also for a folder that is not there yet; too little is said with both sizes and the key."""
    deep = tmp_path / "a" / "b"
    require_space(deep, 1000, "run_dir")
    with pytest.raises(
        UserError,
        match=r"b: the disk has [\d.]+ GB free, but the stage needs up to 1000000.00 GB.*run_dir",
    ):
        require_space(deep, 10**15, "run_dir")
    assert not deep.exists()
    assert os.listdir(tmp_path) == []
