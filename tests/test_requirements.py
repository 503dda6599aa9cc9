"""The lock file has all that a run needs, one version each, and no file without its hash."""

from __future__ import annotations

import re
from importlib.metadata import version

from conftest import REPOSITORY

LOCK = (REPOSITORY / "scripts/requirements.lock").read_text()
PINNED = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK, re.MULTILINE))


def test_every_line_is_one_version_with_hashes():
    """pip then installs nothing else; an index of somebody's own would be asked by everybody."""
    entries = re.split(r"\n(?=[a-z])", re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE))
    assert len(entries) > 30
    for entry in entries:
        first, *hashes = entry.strip().replace("\\\n", "\n").splitlines()
        assert re.match(r"[a-z0-9-]+==\S+", first), first
        assert hashes and all(
            re.fullmatch(r"\s*--hash=sha256:[0-9a-f]{64}\s*", line) for line in hashes
        )
    assert "://" not in LOCK and "file:" not in LOCK


def test_it_locks_what_requirements_txt_names():
    """Nobody who adds a requirement forgets to lock it; both of MLX's back ends are there."""
    text = (REPOSITORY / "requirements.txt").read_text()
    named = set(re.findall(r"^[a-z-]+", text, re.MULTILINE))
    assert named == {"mlx", "mlx-lm", "numpy", "pyyaml", "tqdm"}
    assert named | {"mlx-cpu", "mlx-metal"} <= PINNED.keys()


def test_the_checks_run_with_the_locked_versions():
    """tests/run.sh installs from the lock; what it installs after that must not replace those."""
    assert "scripts/requirements.lock tests/requirements.txt" in (
        (REPOSITORY / "tests/run.sh").read_text()
    )
    for name in ("mlx", "mlx-lm", "transformers", "tokenizers", "pyyaml"):
        assert version(name) == PINNED[name]
