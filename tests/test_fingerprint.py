"""What runs again after which change: the table of fingerprints, and what the README says of it."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest
from conftest import REPOSITORY
from dpo_mlx.config import Config, keys
from dpo_mlx.files import fingerprint
from dpo_mlx.files.fingerprint import FUSING, PAIRS, SFT_ADAPTERS, SMOKE_TEST, TABLE, TRAINING

# The outputs of the stages that the runner starts, in its order.
STAGES = {"06": PAIRS, "10": TRAINING, "11": FUSING, "12": SMOKE_TEST}

# Keys that name files: fingerprints hold the files' digests instead.
PATHS = {"model", "demo_model", "run_dir", "data.source", "data.train_pairs", "data.valid_pairs"}
KEYS = sorted({*keys(Config), "chat_template_args.any"} - PATHS - {"chat_template_args"})
# Keys on which no output depends, but which make a stage run although it is finished.
RUNS_STAGE = {"generation.restart": "06"}


def stages_of(key: str) -> list[str]:
    """The stages whose own fingerprint changes with a key."""
    return [stage for stage, output in STAGES.items() if fingerprint.depends(output, key)]


def readme_rows() -> list[tuple[list[str], str]]:
    """(the keys of a row, what the same command does) of the README's table."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme.split("## What runs again after a change")[1].split("\n## ")[0]
    cells = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", row), text) for row, text in cells]


def covers(name: str, key: str) -> bool:
    """Whether a name in the README, `fuse.*` or `chat_template_args`, means this key."""
    return fnmatchcase(key, name) or key.startswith(f"{name}.")


def readme_text(key: str) -> str:
    """What the README says of a key: the last of the rows that match it, as later ones narrow
    earlier ones.
    """
    rows = [text for names, text in readme_rows() if any(covers(name, key) for name in names)]
    assert rows, f"the README's table does not name {key}"
    return rows[-1]


@pytest.mark.parametrize("key", KEYS)
def test_the_readme_names_the_first_stage_that_runs_again(key):
    """Every key is in the README's table, and the table of fingerprints agrees with its row. A key
    of RUNS_STAGE is in no fingerprint.
    """
    text, stages = readme_text(key), stages_of(key)
    if key in RUNS_STAGE:
        assert not stages
        stages = [RUNS_STAGE[key]]
    numbers = re.findall(r"\b(06|10|11|12)\b", text)
    assert numbers[:1] == stages[:1], f"README: {text.strip()}; fingerprints: {stages}"


@pytest.mark.parametrize("key", KEYS)
def test_from_the_end_of_sft_means_that_sft_does_not_depend_on_it(key):
    """A row that promises to keep SFT is true, and no other key could promise it."""
    keeps_sft = TRAINING in [STAGES[s] for s in stages_of(key)] and not fingerprint.depends(
        SFT_ADAPTERS, key
    )
    promised = "from the end of SFT" in readme_text(key)
    assert promised == (keeps_sft and "06" not in stages_of(key))


def test_every_pattern_of_the_table_matches_a_key():
    """A key that was renamed would silently no longer count."""
    names = [*keys(Config), "chat_template_args.any"]
    for dependencies in TABLE.values():
        for pattern in (*dependencies.keys, *dependencies.except_keys):
            assert any(fnmatchcase(name, pattern) for name in names), pattern


def test_every_file_of_the_table_can_be_digested():
    """The names of files in the table are those of FILES."""
    named = {name for dependencies in TABLE.values() for name in dependencies.files}
    assert named == fingerprint.FILES.keys()
