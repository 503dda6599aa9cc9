"""The emulated Mac is right, and the whole chain passes on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from dpo_mlx import config as configs
from dpo_mlx.config import Config, LoraConfig
from dpo_mlx.data.encoding import EncodedAnswer
from dpo_mlx.files import jsonl
from dpo_mlx.model import device, fusing, tiny_granite
from dpo_mlx.model.adapters import attach_lora
from dpo_mlx.model.gradient_checkpointing import gradient_checkpointing
from dpo_mlx.model.loading import load_model
from dpo_mlx.model.saving import save_model_folder
from dpo_mlx.scoring.scorer import Scorer
from dpo_mlx.stages.evaluate import evaluate
from dpo_mlx.stages.fuse_adapters import fuse_adapters
from dpo_mlx.stages.make_pairs import make_pairs
from dpo_mlx.stages.train_dpo import train_dpo
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.ssm import ssm_update
from runs import NO_LIMITS, crossed_limits_of
from virtual_mac import VirtualMac, in_bfloat16, ssm_step, stand_ins

SCALE = 0.125
BATCH, HEADS, SHARED, LENGTH, WIDTH = 2, 4, 2, 24, 64
STEP = 2**-8  # half the distance of neighbouring bfloat16 numbers, relative to them


def inputs(dtype: mx.Dtype, queries: int = LENGTH, width: int = WIDTH) -> list[mx.array]:
    """q [B, H, queries, D], k and v [B, KV, L, D]."""
    mx.random.seed(3)
    shapes = [(HEADS, queries), (SHARED, LENGTH), (SHARED, LENGTH)]
    return [mx.random.normal((BATCH, *shape, width)).astype(dtype) for shape in shapes]


def masks(queries: int = LENGTH) -> dict[str, Any]:
    """One of each kind that mlx-lm passes."""
    causal = mx.tri(queries, LENGTH, LENGTH - queries, dtype=mx.bool_)
    padded = causal & (mx.arange(LENGTH) >= mx.array([0, 5])[:, None, None, None])
    return {
        "none": None,
        "causal": "causal",
        "boolean": causal,
        "of a padded batch": padded,
        "added": mx.where(causal, 0.0, -1e4).astype(mx.bfloat16),
    }


def attend(arrays: list[mx.array], mask: Any = "causal") -> mx.array:
    q, k, v = arrays
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask=mask)


def attend_traced(arrays: list[mx.array], mask: Any = "causal") -> mx.array:
    """The same attention while gradients are traced, as in training."""
    outputs = []

    def total(q: mx.array) -> mx.array:
        outputs.append(attend([q, *arrays[1:]], mask))
        return outputs[0].astype(mx.float32).sum()

    mx.eval(mx.value_and_grad(total)(arrays[0]))
    return outputs[0]


def by_hand(
    arrays: list[mx.array], mask: Any, rounding: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Attention in float64 with numpy, with `rounding` after each operation."""
    q, k, v = (np.array(x.astype(mx.float32), dtype=np.float64) for x in arrays)
    k, v = (np.repeat(x, HEADS // SHARED, axis=1) for x in (k, v))
    scores = rounding(rounding(SCALE * q) @ np.swapaxes(k, -1, -2))
    if isinstance(mask, str):
        mask = masks(q.shape[2])["boolean"]
    if isinstance(mask, mx.array) and mask.dtype == mx.bool_:
        scores = np.where(np.array(mask), scores, -1e30)
    elif mask is not None:
        scores = rounding(scores + np.array(mask.astype(mx.float32)))
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return rounding(rounding(powers / powers.sum(axis=-1, keepdims=True)) @ v)


def exact(x: np.ndarray) -> np.ndarray:
    return x


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    return np.array(mx.array(x.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32))


def distance(one: mx.array | np.ndarray, other: mx.array | np.ndarray) -> float:
    """The mean difference, relative to the mean size."""
    pair = (x.astype(mx.float32) if isinstance(x, mx.array) else x for x in (one, other))
    a, b = (np.array(x, dtype=np.float64) for x in pair)
    return float(np.abs(a - b).mean() / np.abs(b).mean())


@pytest.mark.parametrize("queries", [1, 8, LENGTH])
@pytest.mark.parametrize("mask", masks())
def test_without_gradients_attention_is_rounded_once(
    mask: str, queries: int, virtual_mac: VirtualMac
) -> None:
    """As with Metal's fused kernels, for one token, for eight and for a sequence, with every mask:
    equal to exact attention rounded once, up to a last bit at halfway points.
    """
    arrays, given = inputs(mx.bfloat16, queries), masks(queries)[mask]
    expected = to_bfloat16(by_hand(arrays, given, exact))
    found = np.array(attend(arrays, given).astype(mx.float32))
    assert (found != expected).mean() < 5e-3
    assert np.abs(found - expected).max() <= 2 * STEP * np.abs(expected).max()


@pytest.mark.parametrize("mask", masks())
def test_with_gradients_each_step_is_rounded(mask: str, virtual_mac: VirtualMac) -> None:
    """As with the unfused operations that Metal uses in training: close to attention with each
    intermediate result in bfloat16, and visibly off exact attention.
    """
    arrays, given = inputs(mx.bfloat16), masks()[mask]
    found = attend_traced(arrays, given)
    stepwise, once = (by_hand(arrays, given, how) for how in (to_bfloat16, exact))
    assert distance(found, stepwise) < 0.2 * distance(found, once)
    assert mx.any(found != attend(arrays, given))


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "of a padded batch"])
def test_in_float32_both_agree(mask: str, virtual_mac: VirtualMac) -> None:
    """The two paths differ only in rounding."""
    arrays, given = inputs(mx.float32), masks()[mask]
    apart = mx.abs(attend(arrays, given) - attend_traced(arrays, given)).max()
    assert float(apart) < 1e-6


@pytest.mark.parametrize("queries", [1, LENGTH])
def test_widths_without_a_kernel_stay_unfused(queries: int, virtual_mac: VirtualMac) -> None:
    """Metal has no kernel for heads of 16, which most tiny models have, so nothing differs."""
    arrays = inputs(mx.bfloat16, queries, width=16)
    assert mx.array_equal(attend(arrays), attend_traced(arrays))


def test_every_way_to_a_gradient_is_seen(virtual_mac: VirtualMac) -> None:
    """`grad`, `vjp`, `jvp`, module gradients and a checkpoint's second forward pass count as
    tracing. Before and after them nothing does, even if one of them raises.
    """
    seen = []

    def square(x: mx.array) -> mx.array:
        seen.append(virtual_mac.traces_gradients)
        return (x * x).sum()

    def fault(x: mx.array) -> mx.array:
        raise ValueError

    x, module = mx.ones(3), nn.Linear(3, 1)
    mx.grad(square)(x)
    mx.vjp(square, [x], [mx.array(1.0)])
    mx.jvp(square, [x], [x])
    nn.value_and_grad(module, lambda: square(module(x)))()
    mx.eval(mx.grad(lambda x: mx.checkpoint(square)(x))(x))
    assert len(seen) == 6 and all(seen)
    with pytest.raises(ValueError):
        mx.grad(fault)(x)
    square(x)
    assert not seen[-1]


def test_mamba_s_step_is_the_scan_s(virtual_mac: VirtualMac) -> None:
    """The stand-in for mlx-lm's Metal kernel gives what its scan gives for the same token and
    state, in float32 to 1e-5.
    """
    mx.random.seed(1)
    batch, heads, groups, width, size = 2, 4, 2, 8, 32
    x = mx.random.normal((batch, 1, heads, width))
    b, c = mx.random.normal((2, batch, 1, groups, size))
    dt, state = mx.random.normal((batch, 1, heads)), mx.random.normal((batch, heads, width, size))
    a_log, d, bias = mx.random.normal((3, heads))
    arguments = (x, a_log, b, c, d, dt, bias, state, (0.0, 1e9))
    for found, expected in zip(ssm_step(*arguments), ssm_update(*arguments), strict=True):
        assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_mamba_s_kernel_wants_whole_states(virtual_mac: VirtualMac, tmp_path: Path) -> None:
    """mlx-lm's kernel would silently skip a state of 16; the emulation raises."""
    model = load_model(str(tiny_granite.folder(tmp_path / "model", mamba_d_state=16))).model
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1]]), cache=cache))
    with pytest.raises(AssertionError, match="16 are no times 32"):
        model(mx.array([[1]]), cache=cache)


def test_memory_beyond_the_working_set_fails_the_test(virtual_mac: VirtualMac) -> None:
    """At an evaluation, or at the end if only the peak was too high."""
    virtual_mac.working_set = 10**6
    with pytest.raises(pytest.fail.Exception, match="MLX held"):
        mx.eval(mx.zeros(10**6))
    float(mx.zeros(10**6).sum())  # evaluated behind the fixture's back, and freed
    with pytest.raises(pytest.fail.Exception, match="MLX held"):
        mx.reset_peak_memory()
    virtual_mac.working_set = 10**9


def test_the_device_is_a_16_gb_mac(virtual_mac: VirtualMac) -> None:
    """The memory plan sees its working set, and a test can read the limits that were set."""
    assert device.available() == virtual_mac.working_set == 11_450_000_000
    device.limit_memory()
    assert virtual_mac.limits["set_wired_limit"] == [11_450_000_000]
    assert virtual_mac.limits["set_cache_limit"] == [1_145_000_000]


def test_a_model_in_bfloat16(tmp_path: Path, granite: Path) -> None:
    """All weights and the config change, and mlx-lm can load the result."""
    model = load_model(str(in_bfloat16(granite, tmp_path / "model"))).model
    assert model.layers[0].mamba.in_proj.weight.dtype == mx.bfloat16
    config = jsonl.read_json(tmp_path / "model/config.json")
    assert config["torch_dtype"] == "bfloat16"


def test_stand_ins_answer_as_macos(tmp_path: Path) -> None:
    """Programs on PATH answer like a Mac's, or as a test wants. `caffeinate` records its arguments
    and runs the command it is given.
    """
    folder = stand_ins(tmp_path / "bin", **{"uname -m": "x86_64", "sw_vers -productVersion": None})
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}

    def said(command: str) -> str:
        return subprocess.run(
            command, shell=True, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert said("uname; uname -m") == "Darwin\nx86_64"
    assert said("sysctl -n hw.memsize") == str(16 * 2**30)
    assert said("sw_vers -productVersion || echo none") == "none"
    assert said("caffeinate -is -w 999999999; caffeinate -i echo awake") == "awake"
    asked = (folder / "caffeinate.arguments").read_text()
    assert asked == "-is -w 999999999\n-i echo awake\n"


@pytest.fixture
def write_run(settings: dict[str, Any], write_config: Any, tmp_path: Path) -> Any:
    """write_run(epochs of SFT) -> the config of a run on a tiny Granite in bfloat16."""

    def write(sft_epochs: int) -> Config:
        values = {
            **settings,
            "model": str(tiny_granite.folder(tmp_path / "model")),
            "sft": {"epochs": sft_epochs, "learning_rate": 1e-3},
            "guard": {"enabled": False},
            "smoke": {**settings["smoke"], **NO_LIMITS},
        }
        return configs.load(write_config(values))

    return write


@pytest.mark.parametrize("sft_epochs", [0, 1], ids=["without SFT", "with SFT"])
def test_the_chain_passes(sft_epochs: int, virtual_mac: VirtualMac, write_run: Any) -> None:
    """From questions to the report in bfloat16 with Metal's two kinds of attention: training starts
    at the reference, fusing keeps the margin, and every limit of the smoke test is kept.
    """
    config = write_run(sft_epochs)
    make_pairs(config)
    assert train_dpo(config)
    fuse_adapters(config)
    evaluate(config)
    assert crossed_limits_of(config) == []


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_replay_starts_at_zero(
    grad_checkpoint: bool, virtual_mac: VirtualMac, granite: Path, tmp_path: Path
) -> None:
    """In bfloat16 Metal rounds otherwise in a trace than outside. The base model runs in the same
    trace as the policy, so that fresh adapters neither diverge from it nor are moved.
    """
    model = load_model(str(in_bfloat16(granite, tmp_path / "model"))).model
    attach_lora(model, LoraConfig(rank=4))
    with gradient_checkpointing(model, grad_checkpoint):
        value, gradient = Scorer(model).divergence_gradient(EncodedAnswer(tuple(range(3, 40)), 9))
    assert value == 0
    assert all(not g.any() for g in dict(tree_flatten(gradient)).values())


def test_training_starts_at_the_reference_on_a_quantised_base(
    virtual_mac: VirtualMac, write_run: Any, tmp_path: Path
) -> None:
    """The same on a 4-bit base, which uses other kernels. The rows are few and short, as a CPU is
    slow at them.
    """
    config = write_run(0)
    loaded = load_model(config.model)
    about = fusing.quantize(loaded.model, jsonl.read_json(loaded.folder / "config.json"), 4)
    save_model_folder(loaded.model, loaded.folder, tmp_path / "quantised", about)
    config = replace(
        config,
        model=str(tmp_path / "quantised"),
        data=replace(config.data, limit=8),
        generation=replace(config.generation, max_tokens=4),
        train=replace(config.train, eval_questions=1, grad_accumulation=4, force=True),
    )
    make_pairs(config)
    assert train_dpo(config)


def test_every_stage_bounds_its_memory(virtual_mac: VirtualMac, write_run: Any) -> None:
    """Each stage that loads a model sets all three of MLX's limits."""
    config = write_run(0)
    unbounded = []
    for stage in (make_pairs, train_dpo, fuse_adapters, evaluate):
        for calls in virtual_mac.limits.values():
            calls.clear()
        stage(config)
        unbounded += [(stage, name) for name, calls in virtual_mac.limits.items() if not calls]
    assert unbounded == []
