"""A file is ours only if its content says so; nothing else is ever replaced, changed or removed.

Every folder that a stage writes into has a manifest, MANIFEST, which names the files that we wrote
there, with their size and digest. A file that the manifest does not name is somebody else's, and so
is one whose content has changed since. The manifest is written before the file, with both the old
and the new content: after a kill, whichever is there is known as ours.

Two limits: while a file grows, only what stood in it when it began to is compared, and of a file
over WHOLE_BYTES only slices.
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
HEADER = b'{"made_by": "dpo_mlx", '  # how every manifest begins

WHOLE_BYTES = 2**30  # of a larger file only slices are digested
MANIFEST_LIMIT = 2**20  # bytes; a folder of ours holds some dozens of files
PATIENCE = 10.0  # seconds to wait for another process that writes a manifest
# Of file systems that lock no folders, such as NFS.
NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

# File managers leave these in every folder that somebody opens; removing them loses nothing.
LITTER = (".DS_Store", ".localized", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Mark:
    """Size and digest of a file's content. The mark of a file that grows covers only its beginning,
    because writing the manifest again for every row would cost more than the row.
    """

    size: Annotated[int, Range(0, 2**50)]
    sha256: str
    grows: bool = False

    @classmethod
    def of(cls, content: bytes, grows: bool = False) -> Mark:
        return cls(len(content), hashlib.sha256(content).hexdigest(), grows)


class Status(Enum):
    """Whose a path is."""

    ABSENT = "absent"
    OURS = "ours"
    CHANGED = "was changed since the pipeline wrote it"
    FOREIGN = "was not made by this pipeline"

    def of(self, path: Path) -> str:
        """What to say of a path."""
        copied = self is Status.FOREIGN and not (path.parent / MANIFEST).exists()
        hint = f" (or was copied without the {MANIFEST} beside it)" if copied else ""
        return f"{path}: {self.value}{hint}"


Manifest = dict[str, list[Mark]]  # by file: the contents that it may have


def status(path: Path) -> Status:
    """Whose the file under this name is."""
    if not os.path.lexists(path):
        return Status.ABSENT
    known = read_manifest(path.parent).get(path.name)
    if known is None or not _is_regular(path):
        return Status.FOREIGN
    return Status.OURS if _is_one_of(path, known) else Status.CHANGED


def require(path: Path, remedy: str = "move it away, or set run_dir to another folder") -> None:
    """Raises UserError, ending in `remedy`, for a file that is there and is not ours."""
    found = status(path)
    if found in (Status.CHANGED, Status.FOREIGN):
        raise UserError(f"{found.of(path)}; {remedy}")


def write(path: Path, content: bytes) -> None:
    """Replace a file, atomically. Raises UserError for one that is not ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        _claim(path, Mark.of(content))
        atomic.replace(path, content)


def append(path: Path, content: bytes) -> None:
    """Add to a file, all or nothing; what is added is known by what stands before it until `seal`.

    Raises UserError for a file that is not ours.
    """
    if not content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        require(path)
        before = path.read_bytes() if path.exists() else b""
        if not before:
            _claim(path, Mark.of(content, grows=True))
            atomic.replace(path, content)
            return
        if not _is_known_to_grow(path):
            _claim(path, Mark.of(before, grows=True))
        _give_own_content(path)
        atomic.append(path, content)


def seal(path: Path) -> None:
    """Nothing will be added to a file for now: all of it tells it from others."""
    with _alone_in(path.parent):
        _claim(path, mark_of(path))


@contextmanager
def growing(path: Path) -> Iterator[None]:
    """Seals a file that is appended to within, however that ends."""
    try:
        yield
    finally:
        if path.exists():
            seal(path)


def cut(path: Path, size: int) -> None:
    """Shorten a file of ours, of whose last row a kill has left a part."""
    require(path)
    atomic.replace(path, path.read_bytes()[:size])


def _give_own_content(path: Path) -> None:
    """Make a file that somebody's hard link shares one of its own, before it is changed in place:
    the link may be a backup.
    """
    if path.stat().st_nlink > 1:
        atomic.replace(path, path.read_bytes())


def set_aside(path: Path) -> Path:
    """Give a file, whoever's it is, a free name beside its own; that name."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    return path.rename(aside)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well.

    At every moment the old one or the new one is there as a whole. Raises UserError rather than
    take the place of a folder that holds anything but what was written like this.
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
        _write_manifest(temporary, {name: [mark_of(temporary / name)] for name in _all(temporary)})
        for path in (*temporary.rglob("*"), temporary):
            atomic.sync(path)
        require_untouched(folder)  # something may have been put there meanwhile
        if folder.exists():
            atomic.swap(temporary, folder)
        else:
            temporary.rename(folder)
        atomic.sync(folder.parent)
    finally:  # what is under the temporary name now is a half, or the old one
        _delete(temporary)


def remove_folder(folder: Path) -> None:
    """Remove a folder that `new_folder` made; it is never found half removed.

    Raises UserError when it holds anything else.
    """
    require_untouched(folder)
    _remove(folder)


def remove_if_untouched(folder: Path) -> None:
    """The same; a folder that holds anything else stays."""
    if is_untouched(folder):
        _remove(folder)


def _remove(folder: Path) -> None:
    temporary = atomic.temporary_name(folder)
    _delete(temporary)
    folder.rename(temporary)
    _delete(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill has left in `folder` of the other two functions' temporary folders."""
    for path in folder.glob(atomic.temporary_name(Path("*")).name):
        if path.is_dir():
            _delete(path)


def require_untouched(folder: Path) -> None:
    """Raises UserError, which names the file at fault, for what is there and is neither an empty
    folder nor one that holds exactly what `new_folder` wrote.
    """
    if not _holds_something(folder):
        return
    if not _has_manifest(folder):
        raise _not_ours(folder, Status.FOREIGN)
    known = read_manifest(folder)
    leftovers = {atomic.temporary_name(Path(name)).as_posix() for name in (MANIFEST, *known)}
    for name in _all(folder):
        if name in leftovers:
            continue
        if name not in known:
            raise _not_ours(folder / name, Status.FOREIGN)
        if not _is_one_of(folder / name, known[name]):
            raise _not_ours(folder / name, Status.CHANGED)


def is_untouched(folder: Path) -> bool:
    """Whether a folder holds nothing but what `new_folder` wrote."""
    try:
        require_untouched(folder)
    except UserError:
        return False
    return True


def is_complete(folder: Path) -> bool:
    """Whether every file that `new_folder` wrote is there, with its size."""
    files = read_manifest(folder).items()
    paths = [(folder / name, {mark.size for mark in marks}) for name, marks in files]
    return bool(paths) and all(
        _is_regular(path) and path.stat().st_size in sizes for path, sizes in paths
    )


def require_our_folder(folder: Path) -> None:
    """Raises UserError when somebody else's folder, or a file, has the name of one of ours. Reads
    only the beginning of its manifest; `require_untouched` looks at everything inside.
    """
    if _holds_something(folder) and not _has_manifest(folder):
        raise _not_ours(folder, Status.FOREIGN)


def require_directory(path: Path) -> None:
    """Raises UserError for a file where a folder for our files goes, which others may use too."""
    if os.path.lexists(path) and not path.is_dir():
        raise _not_ours(path, Status.FOREIGN)


def mark_of(path: Path) -> Mark:
    """Size and digest of a file."""
    return Mark(path.stat().st_size, digest.of_file(path, WHOLE_BYTES))


def read_manifest(folder: Path) -> Manifest:
    """What a folder's manifest names; nothing without one. Raises UserError for a damaged one."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return {}
    try:
        if not _is_regular(path):
            raise ValueError("it is not a file")
        if path.stat().st_size == 0:  # an earlier version marked its folders by an empty file
            return {}
        if path.stat().st_size > MANIFEST_LIMIT:
            raise ValueError("it is too large")
        values = schema.parse(json.loads(path.read_bytes()), dict[str, Any])
        if values.get("made_by") != "dpo_mlx":
            raise ValueError("another program wrote it")
        manifest: Manifest = schema.parse(values.get("files"), dict[str, list[Mark]], "files")
        if any(not _is_below(name) for name in manifest):
            raise ValueError("it names a file outside of its folder")
        return manifest
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: is damaged ({reason(error)}), so the pipeline cannot tell its own files "
            "here; move the folder away, or choose another one"
        ) from error


def _is_below(name: str) -> bool:
    """Whether a manifest's name is a plain path to something inside of its folder."""
    path = PurePosixPath(name)
    return path.as_posix() == name != "." and not path.is_absolute() and ".." not in path.parts


def _claim(path: Path, new: Mark) -> None:
    """Put the content that a file is about to have into the manifest, beside the one it has.

    Raises UserError for a file, or a temporary file of its name, that is not ours.
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
    if os.path.lexists(temporary) and not _begins_like_a_manifest(temporary):
        raise _not_ours(temporary, Status.FOREIGN)
    files = {name: [asdict(mark) for mark in marks] for name, marks in sorted(manifest.items())}
    text = json.dumps({"made_by": "dpo_mlx", "files": files}, ensure_ascii=False)
    atomic.replace(path, text.encode() + b"\n")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Runs may share a folder, each with files of its own: they write its manifest in turn.

    Raises UserError when another process does not let go of the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    give_up = time.monotonic() + PATIENCE
    try:
        while not _has_locked(descriptor):
            if time.monotonic() > give_up:
                raise UserError(f"{folder}: another process has locked this folder; end it first")
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _has_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _is_one_of(path: Path, marks: list[Mark]) -> bool:
    """Whether a file has one of these contents, or begins like one that grows."""
    if not marks or not _is_regular(path):
        return False
    size = path.stat().st_size
    if any(mark.size == size for mark in marks) and mark_of(path) in marks:
        return True
    return any(_begins_like(path, mark) for mark in marks)


def _begins_like(path: Path, mark: Mark) -> bool:
    if not mark.grows or mark.size > path.stat().st_size:
        return False
    with path.open("rb") as file:
        return Mark.of(file.read(mark.size), grows=True) == mark


def _is_known_to_grow(path: Path) -> bool:
    marks = read_manifest(path.parent)[path.name]
    return any(_begins_like(path, mark) for mark in marks)


def _is_regular(path: Path) -> bool:
    return os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)


def _all(folder: Path) -> list[str]:
    """Every file and link below a folder, by its path from there; not the manifest, nor litter."""
    paths = []
    for where, folders, files in os.walk(folder, onerror=_stop):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        paths += [Path(where) / name for name in files + links if not _is_litter(name)]
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if name != MANIFEST)


def _is_litter(name: str) -> bool:
    return name in LITTER or name.startswith("._")


def _holds_something(folder: Path) -> bool:
    """Whether there is anything that replacing the folder would lose."""
    if folder.is_symlink() or not folder.is_dir():
        return os.path.lexists(folder)
    return any(not _is_litter(path.name) for path in folder.iterdir())


def _has_manifest(folder: Path) -> bool:
    """Whether the manifest is there, or a kill came just before it was."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    path = folder / MANIFEST
    return any(map(_begins_like_a_manifest, (path, atomic.temporary_name(path))))


def _begins_like_a_manifest(path: Path) -> bool:
    """Also a torn one does, which may be empty."""
    if not _is_regular(path):
        return False
    with path.open("rb") as file:
        return HEADER.startswith(file.read(len(HEADER)))


def _not_ours(path: Path, found: Status) -> UserError:
    return UserError(
        f"{found.of(path)}, and would be replaced; move it away, or set run_dir to another folder"
    )


def _delete(folder: Path) -> None:
    """Remove a temporary folder; the manifest goes last, so that a rest is still known as ours."""
    require_our_folder(folder)
    if not folder.exists():
        return
    # On a disk of another format, macOS removes `._a` along with `a`.
    for where, folders, files in os.walk(folder, topdown=False, onerror=_stop):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        for name in files + links:
            if Path(where, name) != folder / MANIFEST:
                Path(where, name).unlink(missing_ok=True)
        if Path(where) != folder:
            Path(where).rmdir()
    (folder / MANIFEST).unlink(missing_ok=True)
    folder.rmdir()


def _finish_swap(temporary: Path, folder: Path) -> None:
    """Where two names cannot be swapped in one step, a kill may have left the old folder aside."""
    aside = atomic.aside_name(temporary)
    if os.path.lexists(folder):
        _delete(aside)
    elif os.path.lexists(aside):
        require_our_folder(aside)
        aside.rename(folder)


def _stop(error: OSError) -> None:
    raise error
