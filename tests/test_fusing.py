"""Fusing: nothing is lost, layer by layer, of plain and of quantised models; and it is measured."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import runs
import tiny
from dpo_mlx.config import NEAREST, ROUNDINGS, STOCHASTIC, Config, LoraConfig
from dpo_mlx.data import pairs
from dpo_mlx.data.encoding import Encoder
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.model import fusing
from dpo_mlx.model.adapters import adapters_off, attach_lora
from dpo_mlx.model.loading import load_model
from dpo_mlx.model.saving import QUANTIZATION, save_model_folder
from dpo_mlx.scoring.scorer import Scorer
from dpo_mlx.stages.fuse_adapters import fuse_adapters, require_kept
from dpo_mlx.stages.train_dpo import train_dpo
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from test_scorer import perturb

IDS = mx.array([[5, 9, 20, 33, 8, 100, 61, 7]])
LORA = LoraConfig(rank=4)
# Bits, group size and mode of the quantised bases.
BASES: dict[str, tuple[int, int, str] | None] = {
    "bfloat16": None,
    "8-bit": (8, 64, "affine"),
    "4-bit": (4, 64, "affine"),
    "mxfp4": (4, 32, "mxfp4"),
    "nvfp4": (4, 16, "nvfp4"),
}


def made(kind: str = "llama", base: str = "bfloat16", size: float | None = None) -> Any:
    """A bfloat16 or quantised model with adapters as after some training."""
    model = tiny.model(tiny.config(kind))
    model.set_dtype(mx.bfloat16)
    if quantised := BASES[base]:
        bits, group_size, mode = quantised
        nn.quantize(model, group_size, bits, mode=mode)
    mx.random.seed(0)
    attach_lora(model, LORA)
    perturb(model, size)
    return model


def weights(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


# The layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["granite", "llama"])
def test_fused_in_float32_is_base_and_adapters(kind, base):
    """Plain layers alone, with the logits of base + adapters; quantised bases are dequantised.

    To 1e-5; on Granite to 1e-3, as mlx-lm takes exp(A_log) in the type that A_log has.
    """
    model = made(kind, base)
    with fusing.activations_in_float32(model):
        expected = model(IDS)
        with adapters_off(model):
            assert mx.abs(model(IDS) - expected).max() > 0.01, "the adapters do nothing here"
    fusing.fuse(model, STOCHASTIC, mx.float32)
    fusing.cast(model, mx.float32)
    tolerance = 1e-5 if kind == "llama" else 1e-3
    assert mx.abs(model(IDS) - expected).max() < tolerance * mx.abs(expected).max()
    left = weights(model)
    assert {w.dtype for w in left.values()} == {mx.float32}
    assert not [name for name in left if "lora" in name or "scales" in name]


def test_in_float32_it_is_mlx_lm_s_fuse():
    """Weight by weight the sum that mlx-lm's own layers make, when all is float32."""
    ours, theirs = (made() for _ in range(2))
    theirs.set_dtype(mx.float32)
    fused = [(name, m.fuse()) for name, m in theirs.named_modules() if hasattr(m, "fuse")]
    theirs.update_modules(tree_unflatten(fused))
    fusing.fuse(ours, NEAREST, mx.float32)
    fusing.cast(ours, mx.float32)
    assert runs.differences(weights(ours), weights(theirs)) == 0


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_rounded_weights_are_within_a_step_of_the_sum(dtype):
    """Whichever rounding: the sum rounded to nearest is within half a step of it, stochastically
    within one, by the largest of a layer; and what has no adapter stays what it was.
    """
    exact, models_by = made(), {how: made() for how in ROUNDINGS}
    before = weights(exact)["model.embed_tokens.weight"]
    fusing.fuse(exact, NEAREST, mx.float32)
    step = 2.0 ** (-7 if dtype == mx.bfloat16 else -10)
    for how, model in models_by.items():
        fusing.fuse(model, how, dtype)
        assert mx.array_equal(weights(model)["model.embed_tokens.weight"], before)
        for name, weight in weights(exact).items():
            found = weights(model)[name]
            if not name.endswith("proj.weight"):
                continue
            assert found.dtype == dtype
            off = mx.abs(found.astype(mx.float32) - weight) / mx.maximum(mx.abs(weight), 2.0**-14)
            assert off.max() <= step * (0.5 if how == NEAREST else 1.0)


def test_a_seed_draws_the_same_weights():
    """Reproducible: the same seed, the same model; another seed, another one."""
    first, again, other = (made() for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        fusing.fuse(model, STOCHASTIC, mx.bfloat16, seed)
    assert runs.differences(weights(first), weights(again)) == 0
    assert runs.differences(weights(first), weights(other)) > 0


def test_memory_is_the_model_and_a_layer():
    """24 layers of half a megabyte in float32: fusing peaks a few layers above the model, far from
    what all of them would take in float32, and leaves no more than the model.
    """
    model = tiny.model(
        tiny.config("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    )
    model.set_dtype(mx.bfloat16)
    attach_lora(model, LORA)
    perturb(model)
    layer = 4 * 256 * 512
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    fusing.fuse(model, STOCHASTIC, mx.bfloat16)
    assert mx.get_peak_memory() - before < 10 * layer
    assert 8 * (3 * layer + 2 * layer) > 3 * 10 * layer, "all layers at once would not show"
    assert mx.get_active_memory() <= before


def test_activations_in_float32_leave_the_model_as_it_was():
    """The embedding is put back, also after an error; within the block nothing is rounded."""
    model = made(base="4-bit")
    embedding = model.model.embed_tokens
    with pytest.raises(KeyError), fusing.activations_in_float32(model):
        assert model(IDS).dtype == mx.float32
        raise KeyError
    assert model.model.embed_tokens is embedding
    assert model(IDS).dtype == mx.bfloat16


@pytest.mark.parametrize(("value", "dtype"), [(1e5, mx.float16), (float("nan"), mx.float32)])
def test_weights_that_are_no_numbers_are_refused(value, dtype):
    """float16 ends at 65504, and diverged adapters are not worth a folder. One line names the
    layer, and does not advise a folder twice as large.
    """
    model = made()
    layer = model.model.layers[1].mlp.up_proj
    layer.lora_b = mx.full(layer.lora_b.shape, value)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj: .*learning_rate$"):
        fusing.fuse(model, NEAREST, dtype)


# Stage 11 --------------------------------------------------------------------------------------


@pytest.fixture
def trained(make: Any) -> Any:
    """trained(folder, rate, fuse's keys) -> the config of a run after seven updates."""

    def run(model: Path, rate: float, **fuse: Any) -> Config:
        made = make(model=model, learning_rate=rate, grad_accumulation=1, lora={"rank": 8})
        made.run()
        config = made.config
        jsonl.write(Path(config.data.valid_pairs), [asdict(pair) for pair in runs.TRAIN[:4]])
        runs.keep_adapters(made.model, config)
        return with_fuse(config, **fuse)

    return run


def with_fuse(config: Config, **fuse: Any) -> Config:
    return replace(config, fuse=replace(config.fuse, **fuse))


def report_of(config: Config) -> dict[str, Any]:
    return jsonl.read_json(config.run.path / "fuse.json")


@pytest.fixture(scope="module")
def on_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 llama whose weights are bfloat16 numbers, as from a hub, quick on a CPU."""
    folder = tmp_path_factory.mktemp("models") / "grid"
    tiny.folder(folder, "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    loaded: Any = mx.load(str(folder / "model.safetensors"))
    rounded = tree_map(lambda w: w.astype(mx.bfloat16).astype(mx.float32), loaded)
    mx.eval(rounded)
    mx.save_safetensors(str(folder / "model.safetensors"), rounded)
    return folder


def test_nearest_loses_what_stochastic_keeps(on_grid, trained, capsys):
    """Seven small updates, fused into bfloat16: nearest keeps less than half of the margin,
    stochastic at least 0.95; both are told, and a float32 model keeps all of it.
    """
    config = trained(on_grid, 1e-5, dtype="bfloat16")
    fuse_adapters(config)
    report = report_of(config)
    kept = {how: found["margin_kept"] for how, found in report["by_rounding"].items()}
    assert kept[NEAREST] < 0.5 and kept[STOCHASTIC] >= 0.95
    assert report["margin_kept"] == pytest.approx(kept[STOCHASTIC], abs=1e-4)
    said = capsys.readouterr().out
    assert f"nearest rounding: margin {report['by_rounding'][NEAREST]['margin_fused']:.3g}" in said
    fused: Any = mx.load(str(config.run.path / "fused/model.safetensors"))
    assert {w.dtype for w in fused.values()} == {mx.bfloat16}
    assert jsonl.read_json(config.run.path / "fused/config.json")["torch_dtype"] == "bfloat16"

    fuse_adapters(with_fuse(config, dtype="float32"))
    report = report_of(config)
    assert report["margin_kept"] == pytest.approx(1, abs=1e-3)
    assert list(report["by_rounding"]) == [STOCHASTIC], "there is nothing to round"


def test_too_little_kept_fails_with_advice(on_grid, trained, capsys):
    """One line that names the limit and the ways on, everything written, the same when it is run
    again; with a lower limit the same folder is accepted, without fusing again.
    """
    config = trained(on_grid, 1e-5, dtype="bfloat16", rounding=NEAREST)
    for _ in range(2):
        with pytest.raises(UserError) as error:
            fuse_adapters(config)
        assert "fuse.min_margin_kept" in str(error.value) and "\n" not in str(error.value)
        for way in ("fuse.rounding: stochastic", "fuse.dtype: float16", "--adapter-path"):
            assert way in str(error.value)
        assert (config.run.path / "fused/model.safetensors").is_file()
        capsys.readouterr()
    fuse_adapters(with_fuse(config, min_margin_kept=0.0))
    assert "up to date, skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kept", "report", "advice"),
    [
        (0.89, {"quantize": 4}, "fuse.quantize: null"),
        (0.5, {"rounding": NEAREST}, "fuse.rounding: stochastic, or fuse.dtype: float16"),
        (float("nan"), {}, "fuse.dtype: float16"),
        (0.5, {"dtype": "float32"}, "fuse.check_pairs"),
        (0.9, {}, None),
        (None, {}, None),  # no margin, nothing lost
    ],
)
def test_advice_by_hand(kept, report, advice, make):
    """At the limit it is kept; below it, or when it is not a number, what helps is what is said."""
    config = make().config
    report = {"quantize": None, "dtype": "bfloat16", "rounding": STOCHASTIC, **report}
    if advice is None:
        return require_kept({**report, "margin_kept": kept}, config)
    with pytest.raises(UserError, match=advice):
        require_kept({**report, "margin_kept": kept}, config)


# Quantised bases --------------------------------------------------------------------------------


@pytest.fixture
def quantized(granite: Path, tmp_path: Path) -> Any:
    """quantized(bits) -> the tiny Granite as an MLX model of so many bits."""

    def made(bits: int) -> Path:
        model = load_model(str(granite)).model
        about = fusing.quantize(model, jsonl.read_json(granite / "config.json"), bits)
        save_model_folder(model, granite, tmp_path / f"{bits}-bit", about)
        return tmp_path / f"{bits}-bit"

    return made


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_trained_and_fused(bits, quantized, job):
    """Stage 10 as it stands: SFT and DPO in the adapters, against the quantised model itself;
    then fused into plain weights, which keep what was learned and say nothing of quantisation.
    """
    folder = quantized(bits)
    rising = [runs.wrote(voice=0.1 * n) for n in range(20)]
    sft = {"epochs": 1, "learning_rate": 1e-3}
    config, _ = job(rising, model=str(folder), sft=sft)
    assert train_dpo(config, "all")
    rows = jsonl.read_whole_lines(config.run.path / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["phase"] == "dpo" and "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4) and losses[-1] < losses[0]

    base = load_model(str(folder))
    assert fusing.is_quantized(base.model)
    encoder = Encoder(base.tokenizer)
    [first, *_] = pairs.read(Path(config.data.valid_pairs))
    reference = jsonl.read_whole_lines(config.run.path / "reference/base/valid.jsonl")[0]
    own = Scorer(base.model).log_prob(encoder.pair(first).chosen)
    assert reference["chosen"] == pytest.approx(own, rel=1e-5)

    fuse_adapters(config)
    assert report_of(config)["margin_kept"] == pytest.approx(1, abs=1e-3)
    about = jsonl.read_json(config.run.path / "fused/config.json")
    assert not set(QUANTIZATION) & set(about)
    fused, *_ = mlx_lm.load(str(config.run.path / "fused"))
    assert not fusing.is_quantized(fused)


def test_quantising_again_erases_small_changes(quantized, trained, capsys):
    """Dequantised, a small training is kept; quantised again to its 4 bits, little of it: that is
    measured, against the base in as many bits, and refused; the folder is quantised as asked.
    """
    config = trained(quantized(4), 1e-4)
    fuse_adapters(config)
    assert report_of(config)["margin_kept"] == pytest.approx(1, abs=1e-2)
    with pytest.raises(UserError, match="set fuse.quantize: null"):
        fuse_adapters(with_fuse(config, quantize=4))
    report = report_of(config)
    assert report["margin_kept"] < 0.5 < report["by_rounding"][STOCHASTIC]["margin_kept"]
    assert "fused/ (4-bit)" in capsys.readouterr().out
    fused, *_ = mlx_lm.load(str(config.run.path / "fused"))
    assert fusing.is_quantized(fused)
    assert jsonl.read_json(config.run.path / "fused/config.json")["quantization"]["bits"] == 4
