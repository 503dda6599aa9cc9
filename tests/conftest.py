"""Fixtures that many tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny granitemoehybrid folder with both layer types and Granite's chat template."""
    return tiny.folder(tmp_path_factory.mktemp("models") / "granite")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama folder with an untied head and a ChatML template."""
    return tiny.folder(
        tmp_path_factory.mktemp("models") / "llama", "llama", tie_word_embeddings=False
    )


@pytest.fixture
def questions() -> list[dict[str, str]]:
    """Thirty questions and answers."""
    return [
        {"question": f"Why is number {i} {w}?", "answer": f"**{w.title()}.** So take {i} {w}s."}
        for i, w in enumerate(["odd", "red", "hot", "big", "shy"] * 6)
    ]


@pytest.fixture
def settings(tmp_path: Path, granite: Path, questions: list[dict[str, str]]) -> dict[str, Any]:
    """A config's values for a run of seconds in `tmp_path`, to be changed and written."""
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in questions))
    run = tmp_path / "run"
    return {
        "model": str(granite),
        "run_dir": str(run),
        "data": {
            "source": str(source),
            "train_pairs": str(run / "pairs/train.jsonl"),
            "valid_pairs": str(run / "pairs/valid.jsonl"),
            "valid_fraction": 0.25,
            "max_length": 256,
        },
        "generation": {"max_tokens": 24, "batch_size": 8},
        "lora": {"rank": 4},
        "train": {"learning_rate": 1e-3, "grad_accumulation": 4, "eval_every": 3},
        "smoke": {"questions": 4},
    }


@pytest.fixture
def write_config(tmp_path: Path) -> Any:
    """Writes a config's values to a file and gives its path."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write
