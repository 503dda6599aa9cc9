"""Adapters switched off, and taken up again from a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from dpo_mlx.config import LoraConfig
from dpo_mlx.data.encoding import EncodedAnswer
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.model_files import ADAPTER_CONFIG, ADAPTERS
from dpo_mlx.files.ownership import MANIFEST, new_folder
from dpo_mlx.model.adapters import (
    adapters_off,
    attach_lora,
    copy_adapters,
    load_adapters,
    save_adapters,
)
from dpo_mlx.model.loading import load_model
from dpo_mlx.scoring.scorer import Scorer
from mlx.utils import tree_flatten
from runs import differences, saved
from test_scorer import perturb

LORA = LoraConfig(rank=4)
SEQUENCE = EncodedAnswer((5, 9, 20, 33, 8, 100, 61, 7), 3)


def adapted(folder: Path, lora: LoraConfig = LORA, size: float | None = None) -> Any:
    """A model with adapters as after some training; with a size of 0, as before it."""
    model = load_model(str(folder)).model
    mx.random.seed(0)
    attach_lora(model, lora)
    perturb(model, size)
    return model


def adapters(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


# Off --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["granite", "llama"])
def test_without_adapters_it_is_the_base_model(kind, request):
    """To the last bit the log-probs of the base model, in training mode with dropout too; and
    outside of the block those of before.
    """
    folder = request.getfixturevalue(kind)
    expected = Scorer(load_model(str(folder)).model).log_prob(SEQUENCE)
    model = adapted(folder, LoraConfig(rank=4, dropout=0.5))
    scorer = Scorer(model)
    before = scorer.log_prob(SEQUENCE)
    assert abs(before - expected) > 0.1, "the adapters do nothing here"
    with adapters_off(model):
        assert scorer.log_prob(SEQUENCE) == expected
        model.train()
        assert scorer.log_prob(SEQUENCE) == expected
    model.eval()
    assert scorer.log_prob(SEQUENCE) == before


def test_adapters_come_back_after_an_error(llama):
    """Sampling that fails leaves the model as it was; within itself the block is harmless."""
    model = adapted(llama)
    scorer = Scorer(model)
    before = scorer.log_prob(SEQUENCE)
    with pytest.raises(KeyError), adapters_off(model), adapters_off(model):
        raise KeyError
    assert scorer.log_prob(SEQUENCE) == before


# Taken up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["granite", "llama"])
def test_what_is_saved_is_taken_up(kind, request, tmp_path):
    """Saved, and loaded into a fresh model of the same settings: every tensor and every log-prob
    the same to the last bit, and trainable as before.
    """
    folder = request.getfixturevalue(kind)
    trained, fresh = adapted(folder), adapted(folder, size=0.0)
    save_adapters(trained, LORA, tmp_path / "a")
    load_adapters(fresh, tmp_path / "a")
    assert differences(adapters(fresh), adapters(trained)) == 0
    assert Scorer(fresh).log_prob(SEQUENCE) == Scorer(trained).log_prob(SEQUENCE)


def test_what_is_taken_up_does_not_hang_on_the_file(llama, tmp_path):
    """The folder may be replaced or deleted afterwards: nothing is read late."""
    trained, fresh = adapted(llama), adapted(llama, size=0.0)
    save_adapters(trained, LORA, tmp_path / "a")
    load_adapters(fresh, tmp_path / "a")
    os.truncate(tmp_path / "a" / ADAPTERS, 0)
    assert differences(adapters(fresh), adapters(trained)) == 0


def tear(path: Path, kept: float) -> None:
    os.truncate(path, int(path.stat().st_size * kept))


OTHERS = {
    "another rank": lambda folder, path: save_adapters(
        adapted(folder, LoraConfig(rank=8)), LORA, path
    ),
    "fewer layers": lambda folder, path: save_adapters(
        adapted(folder, LoraConfig(rank=4, num_layers=1)), LORA, path
    ),
    "torn at its head": lambda folder, path: tear(path / ADAPTERS, 0.01),
    "torn at its end": lambda folder, path: tear(path / ADAPTERS, 0.9),
    "no safetensors": lambda folder, path: (path / ADAPTERS).write_text("{}"),
    "empty": lambda folder, path: (path / ADAPTERS).write_bytes(b""),
    "missing": lambda folder, path: (path / ADAPTERS).unlink(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_that_do_not_fit_are_refused(name, llama, tmp_path):
    """One line with the file and the remedy, and the model keeps the adapters it has."""
    path = tmp_path / "a"
    save_adapters(adapted(llama), LORA, path)
    OTHERS[name](llama, path)
    model = adapted(llama, size=0.0)
    before = adapters(model)
    with pytest.raises(UserError, match="move .* away and run") as error:
        load_adapters(model, path)
    assert str(error.value).startswith(f"{path / ADAPTERS}: ")
    assert "\n" not in str(error.value)
    assert differences(adapters(model), before) == 0


def test_adapters_that_lack_a_block_are_not_loaded(llama, tmp_path):
    """mlx-lm would leave the block at its random start, without a word."""
    path = tmp_path / "a"
    save_adapters(adapted(llama), LORA, path)
    tensors: Any = mx.load(str(path / ADAPTERS))
    kept = {name: array for name, array in tensors.items() if ".layers.1." not in name}
    mx.save_safetensors(str(path / ADAPTERS), kept)
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\..* is missing.*away"):
        load_model(str(llama), path)


def test_adapters_of_another_model_are_refused(llama, granite, tmp_path):
    """Granite's adapters have no place in llama, though the rank is the same."""
    save_adapters(adapted(granite), LORA, tmp_path / "a")
    with pytest.raises(UserError, match="another model or rank"):
        load_adapters(adapted(llama), tmp_path / "a")


def test_a_copy_takes_the_place_of_a_folder(tmp_path, llama):
    """`adapters` becomes a checkpoint's as a whole: the same tensors, nothing left of what was
    there, nor of the checkpoint's other files.
    """
    source, target = tmp_path / "sft-000001", tmp_path / "adapters"
    save_adapters(adapted(llama), LORA, source)
    (source / "state.json").write_text("{}")
    with new_folder(target) as temporary:
        (temporary / "old").touch()
    copy_adapters(source, target)
    names = {path.name for path in target.iterdir()}
    assert names == {ADAPTERS, ADAPTER_CONFIG, MANIFEST}
    assert differences(saved(target), saved(source)) == 0
