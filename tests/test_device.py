"""What the device offers, and that every stage stays within it with one model in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from dpo_mlx import config as configs
from dpo_mlx.config import Config
from dpo_mlx.model import device
from dpo_mlx.model.loading import load_model
from dpo_mlx.scoring import memory
from dpo_mlx.stages.evaluate import evaluate
from dpo_mlx.stages.fuse_adapters import fuse_adapters
from dpo_mlx.stages.make_pairs import make_pairs
from dpo_mlx.stages.train_dpo import ONLY_REFERENCE, train_dpo
from dpo_mlx.training import setup

STAGES = {
    "06": make_pairs,
    "10": lambda config: train_dpo(config),
    "11": fuse_adapters,
    "12": evaluate,
}


def test_metal_s_working_set_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal's recommended working set wins, then nearly all of a GPU's own memory, then the
    machine's memory.
    """
    info: dict[str, Any] = {"max_recommended_working_set_size": 11, "total_memory": 100}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert device.available() == 11
    del info["max_recommended_working_set_size"]
    assert device.available() == 95
    del info["total_memory"]
    assert device.available() > 10**8


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Python's garbage collector never runs by itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model of 9 MB, large enough that a second one in memory shows."""
    size: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    return tiny.folder(tmp_path / "wide", "llama", **size)


def test_every_stage_is_bounded_and_holds_one_model(
    settings: dict[str, Any],
    write_config: Any,
    wide: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_collector: None,
) -> None:
    """F3 and F6: stages 06, 10, 11 and 12 set the memory and cache limits before they load a model.
    Stages 11 and 12 free each model before they load the next, even if Python's garbage collector
    never runs.
    """
    settings["model"] = str(wide)
    settings["train"] |= {"grad_accumulation": 8, "eval_every": 100, "eval_questions": 2}
    settings["generation"]["max_tokens"] = 8
    config = configs.load(write_config(settings))
    limits: list[tuple[str, int]] = []
    held: dict[str, list[int]] = {}
    load = load_model

    def watched_load(*arguments: Any, **options: Any) -> Any:
        held[stage].append(mx.get_active_memory())
        return load(*arguments, **options)

    for module in (
        "dpo_mlx.parallel.distributed",
        "dpo_mlx.stages.fuse_adapters",
        "dpo_mlx.stages.evaluate",
    ):
        monkeypatch.setattr(f"{module}.load_model", watched_load)
    for name in ("set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda limit, name=name: limits.append((name, limit)))
    size = 0
    for stage, run in STAGES.items():
        limits.clear()
        held[stage] = []
        device.release()
        before = mx.get_active_memory()
        run(config)
        offered = device.available()
        assert ("set_memory_limit", offered) in limits
        assert ("set_cache_limit", offered // 10) in limits
        size = size or memory.nbytes(load(str(wide)).model.parameters())
        assert all(active - before < size / 2 for active in held[stage]), (stage, held[stage])
    assert len(held["11"]) == 3 and len(held["12"]) == 3, "some model was not loaded"


def test_an_engine_goes_with_its_last_reference(wide: Path, no_collector: None) -> None:
    """An scorer is in no reference cycle, so its model is freed without the garbage collector."""
    from dpo_mlx.scoring.scorer import Scorer
    from test_adapters import SEQUENCE, adapted

    before = mx.get_active_memory()
    scorer = Scorer(adapted(wide))
    scorer.log_prob(SEQUENCE)
    scorer.log_prob_and_gradient(SEQUENCE)
    assert mx.get_active_memory() > before + 8_000_000
    del scorer
    assert mx.get_active_memory() < before + 1_000_000


def test_a_reference_belongs_to_the_device_that_computed_it(
    settings: dict[str, Any],
    write_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """F5: another device, MLX version or scan chunk rounds differently. The stored reference is
    then computed again, and the line says why; otherwise it is kept.
    """
    config = configs.load(write_config(settings))
    make_pairs(config)
    train_dpo(config, ONLY_REFERENCE)
    stored = (config.run.path / "reference/base/train.jsonl").read_bytes()

    def output(config: Config) -> str:
        """What stage 10 prints when it needs the reference again."""
        capsys.readouterr()
        train_dpo(config, ONLY_REFERENCE)
        return capsys.readouterr().out

    assert "again; what changed" not in output(config)
    other_chunk = replace(config, train=replace(config.train, scan_chunk=7))
    assert "again; what changed: train.scan_chunk: 64 -> 7" in output(other_chunk)
    assert (config.run.path / "reference/base/train.jsonl").read_bytes() != stored
    assert "again; what changed: train.scan_chunk: 7 -> 64" in output(config)
    monkeypatch.setattr(device, "name", lambda: "Apple M9 (Metal)")
    assert "-> Apple M9 (Metal)" in output(config)
    monkeypatch.setattr(setup, "version", lambda package: "99.0")
    assert "again; what changed: mlx: " in output(config)
