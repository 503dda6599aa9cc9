"""The hours on Macs that the benchmarks' README derives."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "tests/benchmarks"


@pytest.fixture
def derive(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("derive_mac_hours")


def test_the_readme_shows_what_is_derived(derive: Any) -> None:
    """Every line of the derived tables stands in README.md: formula, config and README agree."""
    shown = Path(BENCHMARKS / "README.md").read_text().splitlines()
    derived = [line for line in derive.markdown([100, 1300], 40, 260).splitlines() if line]
    assert len(derived) > 20
    for line in derived:
        assert line in shown


def test_a_machine_is_bound_by_memory_or_by_arithmetic(derive: Any) -> None:
    """By hand, 100 parameters, 10 bytes of state, 8 answers at once, prompts of 5 tokens, sequences
    of 50. A step passes on 200 bytes of weights and 2 x 8 x 10 of states, and takes 1600 FLOPs.
    """
    config = derive.shipped(260)
    model = derive.Model(parameters=100, state=10, checkpoint=0, largest=0, layers=1.0)
    slow_memory = derive.Machine("", bandwidth=1.0, flops=1e9)
    slow_arithmetic = derive.Machine("", bandwidth=1e9, flops=1.0)
    by_memory, by_arithmetic = (
        derive.cost(machine, config, model, prompt=5, length=50)
        for machine in (slow_memory, slow_arithmetic)
    )
    assert by_memory.step == 200 + 2 * 8 * 10
    assert by_arithmetic.step == 2 * 100 * 8
    assert (by_memory.prompts, by_arithmetic.prompts) == (200, 2 * 100 * 8 * 5)
    # A gradient reads the weights three times per sequence, and takes three times a forward's
    # FLOPs.
    assert (by_memory.scored_token, by_memory.gradient_token) == (4, 12)
    assert (by_arithmetic.scored_token, by_arithmetic.gradient_token) == (200, 600)


def test_checkpoints_by_the_clock_are_bounded(derive: Any) -> None:
    """The clock lets a night write at most a megabyte per second, however short the updates are."""
    for update in (1.0, 60.0):
        written = derive.saves(derive.NIGHT, 362_000_000, update) * 362_000_000
        assert 0.5e6 * derive.NIGHT < written <= 1e6 * derive.NIGHT
