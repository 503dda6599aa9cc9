"""Protects the user's files: the pipeline replaces, changes and removes only files that it wrote.

Every folder that a stage writes into has a manifest, MANIFEST. It lists the files we wrote there,
with size and digest. A file is the user's if the manifest does not list it, or if its content has
changed. The manifest is written before the file and lists both the old and the new content, so we
still recognise the file after a kill.

Two limits: we compare only the first part of a file that is being appended to, and only slices of a
file over WHOLE_BYTES.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from . import atomic, digest, schema
from .errors import UserError
from .schema import Range
from .text import reason

MANIFEST = ".made_by_dpo_mlx"
HEADER = b'{"made_by": "dpo_mlx", '  # every manifest begins with this

WHOLE_BYTES = 2**30  # larger files are digested in slices
MANIFEST_LIMIT = 2**20  # bytes; our folders have a few dozen files
LOCK_SECONDS = 10.0  # wait this long for another process that writes a manifest
# Errors of file systems that cannot lock a folder, such as NFS.
NO_LOCK_ERRORS = {errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

# File managers put these into every folder that a user opens. Removing them loses nothing.
LITTER = (".DS_Store", ".localized", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Mark:
    """Size and digest of a file's content. For a file that grows they cover only its beginning,
    because rewriting the manifest would cost more than appending a row.
    """

    size: Annotated[int, Range(0, 2**50)]
    sha256: str
    grows: bool = False

    @classmethod
    def of(cls, content: bytes, grows: bool = False) -> Mark:
        return cls(len(content), hashlib.sha256(content).hexdigest(), grows)


class Status(Enum):
    """Who owns a path: the pipeline or the user."""

    ABSENT = "absent"
    OURS = "ours"
    CHANGED = "has changed since the pipeline wrote it"
    FOREIGN = "was not made by this pipeline"

    def describe(self, path: Path) -> str:
        """The first part of an error line about `path`."""
        may_be_copy = self is Status.FOREIGN and not (path.parent / MANIFEST).exists()
        hint = f" (or was copied without the {MANIFEST} beside it)" if may_be_copy else ""
        return f"{path}: {self.value}{hint}"


Manifest = dict[str, list[Mark]]  # file name -> the contents that the file can have


def status(path: Path) -> Status:
    """Who owns the file at `path`."""
    if not os.path.lexists(path):
        return Status.ABSENT
    marks = read_manifest(path.parent).get(path.name)
    if marks is None or not _is_regular(path):
        return Status.FOREIGN
    return Status.OURS if _has_one_of(path, marks) else Status.CHANGED


def require(path: Path, remedy: str = "move it away, or set run_dir to another folder") -> None:
    """Raises UserError, ending in `remedy`, when a file exists and is not ours."""
    owner = status(path)
    if owner in (Status.CHANGED, Status.FOREIGN):
        raise UserError(f"{owner.describe(path)}; {remedy}")


def write(path: Path, content: bytes) -> None:
    """Replace a file atomically. Raises UserError when it is not ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock_folder(path.parent):
        _claim(path, Mark.of(content))
        atomic.replace(path, content)


def append(path: Path, content: bytes) -> None:
    """Append all of `content` or nothing. Until `seal`, only the file's beginning is compared.

    Raises UserError when the file is not ours.
    """
    if not content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock_folder(path.parent):
        require(path)
        old_content = path.read_bytes() if path.exists() else b""
        if not old_content:
            _claim(path, Mark.of(content, grows=True))
            atomic.replace(path, content)
            return
        if not _has_growing_mark(path):
            _claim(path, Mark.of(old_content, grows=True))
        _break_hard_link(path)
        atomic.append(path, content)


def seal(path: Path) -> None:
    """Put the whole content of a file into the manifest, once nothing more is appended."""
    with _lock_folder(path.parent):
        _claim(path, mark_of(path))


@contextmanager
def growing(path: Path) -> Iterator[None]:
    """Seal a file when the block that appends to it ends, also after an exception."""
    try:
        yield
    finally:
        if path.exists():
            seal(path)


def truncate(path: Path, size: int) -> None:
    """Cut a file of ours to `size` bytes, to remove the torn row that a kill has left."""
    require(path)
    atomic.replace(path, path.read_bytes()[:size])


def _break_hard_link(path: Path) -> None:
    """Replace a file that has a hard link by a copy, so that appending does not change the link,
    which may be the user's backup.
    """
    if path.stat().st_nlink > 1:
        atomic.replace(path, path.read_bytes())


def set_aside(path: Path) -> Path:
    """Rename any file to a free name in the same folder. Returns that name."""
    number = 1
    while os.path.lexists(free_name := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    return path.rename(free_name)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, which replaces `folder` when the block ends without an exception.

    At every moment `folder` is the whole old one or the whole new one. Raises UserError when the
    old one contains anything that this function did not write.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = atomic.temporary_name(folder)
    _finish_swap(temporary, folder)
    require_untouched(folder)
    _delete(temporary)
    temporary.mkdir()
    try:
        _write_manifest(temporary, {})
        yield temporary
        _write_manifest(
            temporary, {name: [mark_of(temporary / name)] for name in _list_files(temporary)}
        )
        for path in (*temporary.rglob("*"), temporary):
            atomic.sync(path)
        require_untouched(folder)  # the user may have put something there meanwhile
        if folder.exists():
            atomic.swap(temporary, folder)
        else:
            temporary.rename(folder)
        atomic.sync(folder.parent)
    finally:  # the temporary folder is incomplete, or is the old one
        _delete(temporary)


def remove_folder(folder: Path) -> None:
    """Remove a folder that `new_folder` wrote, as a whole even if a kill comes.

    Raises UserError when it contains anything else.
    """
    require_untouched(folder)
    _remove(folder)


def remove_if_untouched(folder: Path) -> None:
    """Remove a folder that `new_folder` wrote. Keep it when it contains anything else."""
    if is_untouched(folder):
        _remove(folder)


def _remove(folder: Path) -> None:
    temporary = atomic.temporary_name(folder)
    _delete(temporary)
    folder.rename(temporary)
    _delete(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary folders that a kill has left in `folder`."""
    for path in folder.glob(atomic.temporary_name(Path("*")).name):
        if path.is_dir():
            _delete(path)


def require_untouched(folder: Path) -> None:
    """Raises UserError that names the file, unless `folder` is missing, empty, or contains exactly
    what `new_folder` wrote.
    """
    if not _has_content(folder):
        return
    if not _has_manifest(folder):
        raise _not_ours(folder, Status.FOREIGN)
    manifest = read_manifest(folder)
    leftovers = {atomic.temporary_name(Path(name)).as_posix() for name in (MANIFEST, *manifest)}
    for name in _list_files(folder):
        if name in leftovers:
            continue
        if name not in manifest:
            raise _not_ours(folder / name, Status.FOREIGN)
        if not _has_one_of(folder / name, manifest[name]):
            raise _not_ours(folder / name, Status.CHANGED)


def is_untouched(folder: Path) -> bool:
    """Whether a folder contains nothing but what `new_folder` wrote."""
    try:
        require_untouched(folder)
    except UserError:
        return False
    return True


def is_complete(folder: Path) -> bool:
    """Whether every file that `new_folder` wrote still exists, with its size."""
    files = read_manifest(folder).items()
    paths = [(folder / name, {mark.size for mark in marks}) for name, marks in files]
    return bool(paths) and all(
        _is_regular(path) and path.stat().st_size in sizes for path, sizes in paths
    )


def require_our_folder(folder: Path) -> None:
    """Raises UserError when `folder` is a file or the user's folder. Reads only the start of the
    manifest; `require_untouched` checks every file.
    """
    if _has_content(folder) and not _has_manifest(folder):
        raise _not_ours(folder, Status.FOREIGN)


def require_directory(path: Path) -> None:
    """Raises UserError when `path` is a file. The user may have files in this folder."""
    if os.path.lexists(path) and not path.is_dir():
        raise _not_ours(path, Status.FOREIGN)


def mark_of(path: Path) -> Mark:
    """Returns the size and digest of a file."""
    return Mark(path.stat().st_size, digest.of_file(path, WHOLE_BYTES))


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest. Empty without one. Raises UserError when it is damaged."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return {}
    try:
        if not _is_regular(path):
            raise ValueError("it is not a file")
        if path.stat().st_size == 0:  # an earlier version wrote an empty manifest
            return {}
        if path.stat().st_size > MANIFEST_LIMIT:
            raise ValueError("it is too large")
        values = schema.parse(json.loads(path.read_bytes()), dict[str, Any])
        if values.get("made_by") != "dpo_mlx":
            raise ValueError("another program wrote it")
        manifest: Manifest = schema.parse(values.get("files"), dict[str, list[Mark]], "files")
        if any(not _is_inside(name) for name in manifest):
            raise ValueError("it lists a file outside its folder")
        return manifest
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: is damaged ({reason(error)}), so the pipeline cannot tell its files from "
            "yours; move the folder away, or choose another one"
        ) from error


def _is_inside(name: str) -> bool:
    """Whether a name in a manifest is a normalised path to a file inside its folder."""
    path = PurePosixPath(name)
    return path.as_posix() == name != "." and not path.is_absolute() and ".." not in path.parts


def _claim(path: Path, new: Mark) -> None:
    """Add a file's next content to the manifest, beside its current content.

    Raises UserError when the file, or its temporary file, is not ours.
    """
    require(path)
    manifest = read_manifest(path.parent)
    temporary = atomic.temporary_name(path)
    if path.name not in manifest and os.path.lexists(temporary):
        raise _not_ours(temporary, Status.FOREIGN)
    marks = list(dict.fromkeys([mark_of(path), new] if path.exists() else [new]))
    if manifest.get(path.name) != marks:
        _write_manifest(path.parent, {**manifest, path.name: marks})


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST
    temporary = atomic.temporary_name(path)
    if os.path.lexists(temporary) and not _looks_like_manifest(temporary):
        raise _not_ours(temporary, Status.FOREIGN)
    files = {name: [asdict(mark) for mark in marks] for name, marks in sorted(manifest.items())}
    text = json.dumps({"made_by": "dpo_mlx", "files": files}, ensure_ascii=False)
    atomic.replace(path, text.encode() + b"\n")


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder while its manifest is written, because runs may share a folder.

    Raises UserError when another process keeps the lock for LOCK_SECONDS.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + LOCK_SECONDS
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: another process has locked this folder; end it first")
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Whether the folder is locked now. True where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCK_ERRORS:
            raise
    return True


def _has_one_of(path: Path, marks: list[Mark]) -> bool:
    """Whether a file has one of these contents, or begins with one that grows."""
    if not marks or not _is_regular(path):
        return False
    size = path.stat().st_size
    if any(mark.size == size for mark in marks) and mark_of(path) in marks:
        return True
    return any(_begins_with(path, mark) for mark in marks)


def _begins_with(path: Path, mark: Mark) -> bool:
    if not mark.grows or mark.size > path.stat().st_size:
        return False
    with path.open("rb") as file:
        return Mark.of(file.read(mark.size), grows=True) == mark


def _has_growing_mark(path: Path) -> bool:
    marks = read_manifest(path.parent)[path.name]
    return any(_begins_with(path, mark) for mark in marks)


def _is_regular(path: Path) -> bool:
    return os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)


def _list_files(folder: Path) -> list[str]:
    """The relative paths of all files and links in a folder, without the manifest and LITTER."""
    paths = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        paths += [Path(parent) / name for name in files + links if not _is_litter(name)]
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if name != MANIFEST)


def _is_litter(name: str) -> bool:
    return name in LITTER or name.startswith("._")


def _has_content(folder: Path) -> bool:
    """Whether replacing the folder would lose anything."""
    if folder.is_symlink() or not folder.is_dir():
        return os.path.lexists(folder)
    return any(not _is_litter(path.name) for path in folder.iterdir())


def _has_manifest(folder: Path) -> bool:
    """Whether the folder has a manifest, or the temporary one of a killed process."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    path = folder / MANIFEST
    return any(map(_looks_like_manifest, (path, atomic.temporary_name(path))))


def _looks_like_manifest(path: Path) -> bool:
    """Whether a file begins like a manifest. True for a torn or empty one."""
    if not _is_regular(path):
        return False
    with path.open("rb") as file:
        return HEADER.startswith(file.read(len(HEADER)))


def _not_ours(path: Path, owner: Status) -> UserError:
    return UserError(
        f"{owner.describe(path)}, and the pipeline would replace it; move it away, or set run_dir "
        "to another folder"
    )


def _delete(folder: Path) -> None:
    """Remove a temporary folder. The manifest goes last, so we recognise a half-removed one."""
    require_our_folder(folder)
    if not folder.exists():
        return
    # missing_ok: on a disk that is not APFS, macOS removes `._a` along with `a`.
    for parent, folders, files in os.walk(folder, topdown=False, onerror=_raise):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in files + links:
            if Path(parent, name) != folder / MANIFEST:
                Path(parent, name).unlink(missing_ok=True)
        if Path(parent) != folder:
            Path(parent).rmdir()
    (folder / MANIFEST).unlink(missing_ok=True)
    folder.rmdir()


def _finish_swap(temporary: Path, folder: Path) -> None:
    """Put the old folder back when a kill has interrupted a swap that takes three steps."""
    aside = atomic.aside_name(temporary)
    if os.path.lexists(folder):
        _delete(aside)
    elif os.path.lexists(aside):
        require_our_folder(aside)
        aside.rename(folder)


def _raise(error: OSError) -> None:
    raise error
