"""The short-chunk scan against mlx-lm's own, in values and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny
from dpo_mlx.config import LoraConfig
from dpo_mlx.data.encoding import EncodedAnswer
from dpo_mlx.model import scan
from dpo_mlx.model.adapters import attach_lora
from dpo_mlx.model.gradient_checkpointing import gradient_checkpointing
from dpo_mlx.scoring.scorer import Scorer
from mlx.utils import tree_flatten


def mixer(groups: int, dt_bias: float = 1.0) -> Any:
    """The Mamba block of a tiny random Granite."""
    settings = tiny.config("granite", layer_types=["mamba"], num_hidden_layers=1)
    block = tiny.model({**settings, "mamba_n_groups": groups}).layers[0].mamba
    block.dt_bias = mx.full(block.dt_bias.shape, dt_bias)
    return block


def recurrence(x: np.ndarray, dt: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Any:
    """The definition, position by position in float64."""
    state = np.zeros((*x.shape[1:], b.shape[-1]))  # [G, R, P, N]
    outputs = []
    for t in range(len(x)):
        new = (dt[t][..., None] * x[t])[..., None] * b[t][:, None, None, :]
        state = np.exp(dt[t] * a)[..., None, None] * state + new
        outputs.append((state * c[t][:, None, None, :]).sum(-1))
    return np.stack(outputs)


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
@pytest.mark.parametrize("groups", [1, 2])
def test_scan_is_the_recurrence(chunk: int, groups: int) -> None:
    """Whatever the chunk, the outputs are those of h_t = exp(dt A) h + dt B x, y = C h."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(21, groups, 3, 5))
    dt = rng.uniform(0.001, 2, size=(21, groups, 3))
    a = -rng.uniform(0.1, 16, size=(groups, 3))
    b, c = rng.normal(size=(2, 21, groups, 8))
    x32, dt32, a32, b32, c32 = (mx.array(part.astype(np.float32)) for part in (x, dt, a, b, c))
    found = np.array(scan.scan(x32, dt32, a32, b32, c32, chunk))
    np.testing.assert_allclose(found, recurrence(x, dt, a, b, c), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dt_bias", [1.0, -8.0])
def test_block_gives_mlx_lm_s_values_and_gradients(
    length: int, groups: int, dt_bias: float
) -> None:
    """A whole Mamba block, below, at and above the chunk: outputs and input gradients to 5e-5."""
    block = mixer(groups, dt_bias)
    x = mx.random.normal((1, length, 64))
    weight = mx.random.normal((1, length, 64))

    def results() -> list[mx.array]:
        value, gradient = mx.value_and_grad(lambda x: (block(x, None) * weight).sum())(x)
        return [block(x, None), gradient, value]

    expected = results()
    block.__class__, block.chunk = scan.ChunkedMixer, 8
    for found, wanted in zip(results(), expected, strict=True):
        assert mx.abs(found - wanted).max() <= 5e-5 * mx.abs(wanted).max()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_training_gradients_are_the_same(granite: Path, checkpoint: bool) -> None:
    """Log-prob and every adapter's gradient, with and without the short chunks."""
    sequence = EncodedAnswer(tuple(i * 37 % 250 for i in range(90)), 20)
    results = []
    for chunk in (None, 16):
        model, *_ = mlx_lm.load(str(granite))
        mx.random.seed(0)
        attach_lora(model, LoraConfig(rank=4))
        adapters = dict(tree_flatten(model.trainable_parameters()))
        moved = [(k, v + 0.02 * mx.random.normal(v.shape)) for k, v in adapters.items()]
        model.load_weights(moved, strict=False)
        if chunk is not None:
            scan.use_chunks(model, chunk)
        with gradient_checkpointing(model, checkpoint):
            value, gradient = Scorer(model).log_prob_and_gradient(sequence)
        results.append((float(value), dict(tree_flatten(gradient))))
    (plain, plain_gradient), (short, short_gradient) = results
    assert short == pytest.approx(plain, rel=1e-6)
    for name, wanted in plain_gradient.items():
        assert mx.abs(short_gradient[name] - wanted).max() <= 1e-4 * mx.abs(wanted).max(), name


def test_generation_is_left_to_mlx_lm(granite: Path) -> None:
    """With a cache, mlx-lm's own scan runs: greedy answers are the same tokens."""
    model, tokenizer, *_ = mlx_lm.load(str(granite))
    expected = mlx_lm.generate(model, tokenizer, "Why?", max_tokens=12)
    scan.use_chunks(model, 4)
    assert mlx_lm.generate(model, tokenizer, "Why?", max_tokens=12) == expected


def test_other_models_are_left_alone(llama: Path) -> None:
    """A model without Granite's Mamba blocks keeps every class it has."""
    model, *_ = mlx_lm.load(str(llama))
    before = [type(module) for module in model.modules()]
    scan.use_chunks(model, 64)
    assert [type(module) for module in model.modules()] == before


def test_bfloat16_stays_close_to_float32() -> None:
    """Low-precision inputs are scanned in float32 and come back in their own dtype."""
    block = mixer(1)
    x = mx.random.normal((1, 30, 64))
    scan_block: nn.Module = block
    block.__class__, block.chunk = scan.ChunkedMixer, 8
    expected = scan_block(x, None)
    block.set_dtype(mx.bfloat16)
    found = scan_block(x.astype(mx.bfloat16), None)
    assert found.dtype == mx.bfloat16
    assert mx.abs(found - expected).max() <= 0.05 * mx.abs(expected).max()
