"""mlx-lm's Granite against transformers' on the same random weights, where dt is small too.

Mamba's step is dt = softplus(projection + dt_bias). mlx-lm clamps it to `time_step_limit`, which is
(0.001, 100) when config.json has no such key; transformers' default is (0, infinity), and llama.cpp
knows no limit.
"""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf  # noqa: E402
import torch  # noqa: E402
from dpo_mlx.files import model_files
from dpo_mlx.model.loading import load_model
from dpo_mlx.model.saving import save_model_folder

INFINITY = float("inf")
IDS = np.random.default_rng(0).integers(4, 250, size=(1, 150))


def granite_folder(path, dt_bias=None, chunk=256, **config):
    """A tiny granitemoehybrid; every head's dt_bias as given."""
    folder = tiny.folder(path, "granite", mamba_chunk_size=chunk, **config)
    if dt_bias is not None:
        weights = mx.load(str(folder / "model.safetensors"))
        assert isinstance(weights, dict)
        changed = {k: mx.full(v.shape, dt_bias) for k, v in weights.items() if "dt_bias" in k}
        assert changed
        mx.save_safetensors(str(folder / "model.safetensors"), weights | changed)
    return folder


def logits_of_both(folder, path):
    """([L, V] of mlx-lm, the same of transformers)."""
    model, *_ = mlx_lm.load(str(folder))
    with torch.no_grad():
        theirs = (
            hf.load(hf.folder(folder, path))(torch.tensor(IDS), use_cache=False).logits[0].numpy()
        )
    return np.array(model(mx.array(IDS))[0]), theirs


def difference(folder, path):
    """The largest one between the two, beside the largest logit."""
    ours, theirs = logits_of_both(folder, path)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunk": 64},
        {"layer_types": ["mamba"] * 3},
        {"layer_types": ["attention"] * 3},
        {"tie_word_embeddings": False},
        {"mamba_n_groups": 1, "mamba_n_heads": 8, "mamba_d_head": 16},
    ],
    ids=["plain", "chunked", "mamba", "attention", "untied", "8 heads"],
)
def test_random_weights_agree(changes, tmp_path):
    """Both layer types, tied and untied heads: logits equal to 1e-5 of the largest."""
    folder = granite_folder(tmp_path / "mlx", **changes)
    assert difference(folder, tmp_path / "hf") < 1e-5


def test_small_steps_differ_by_default(tmp_path):
    """dt_bias -8 makes dt about 0.0003: mlx-lm raises it to 0.001, transformers does not.

    When this fails, mlx-lm has changed its default and the project's choice can go.
    """
    folder = granite_folder(tmp_path / "mlx", dt_bias=-8.0)
    assert "time_step_limit" not in json.loads((folder / "config.json").read_text())
    assert difference(folder, tmp_path / "hf") > 1e-4


@pytest.mark.parametrize("dt_bias", [-8.0, -12.0, 1.0])
@pytest.mark.parametrize(
    "limit",
    [[0.0, 1e9], [0.0, INFINITY], [0.0, {"__float__": "Infinity"}]],
    ids=["1e9", "Infinity", "tagged"],
)
def test_small_steps_agree_without_a_limit(limit, dt_bias, tmp_path):
    """config.json with the limit [0, large] gives transformers' logits, in all three spellings.

    Python's JSON knows Infinity, other readers do not; transformers 5 writes the tagged form.
    """
    folder = granite_folder(tmp_path / "mlx", dt_bias, time_step_limit=limit)
    assert difference(folder, tmp_path / "hf") < 1e-5


def test_a_limit_in_the_config_is_kept_by_both(tmp_path):
    """mlx-lm's own default, written out, makes transformers clamp in the same way."""
    folder = granite_folder(tmp_path / "mlx", -8.0, time_step_limit=[0.001, 100.0])
    assert difference(folder, tmp_path / "hf") < 1e-5


def test_a_limit_given_at_loading_is_that_of_the_config(tmp_path):
    """`mlx_lm.load(model_config=...)` lifts the clamp of a folder that does not mention it."""
    plain = granite_folder(tmp_path / "plain", dt_bias=-8.0)
    written = granite_folder(tmp_path / "written", dt_bias=-8.0, time_step_limit=[0.0, 1e9])
    given, *_ = mlx_lm.load(str(plain), model_config={"time_step_limit": [0.0, 1e9]})
    expected, *_ = mlx_lm.load(str(written))
    ids = mx.array(IDS)
    assert mx.array_equal(given(ids), expected(ids))
    default, *_ = mlx_lm.load(str(plain))
    assert not mx.allclose(default(ids), expected(ids), atol=1e-5)


def test_trained_and_fused_run_without_the_clamp(tmp_path):
    """What is trained has transformers' logits, and so has the fused folder in plain mlx-lm."""
    folder = granite_folder(tmp_path / "mlx", dt_bias=-8.0)
    loaded = load_model(str(folder))
    save_model_folder(loaded.model, loaded.folder, tmp_path / "fused")
    fused, *_ = mlx_lm.load(str(tmp_path / "fused"))
    _, theirs = logits_of_both(folder, tmp_path / "hf")
    for model in (loaded.model, fused):
        ours = np.array(model(mx.array(IDS))[0])
        assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-5


def test_a_limit_of_the_model_s_own_is_not_touched(tmp_path):
    """A config.json that sets the limit, and every other architecture, is left as it is."""
    own = granite_folder(tmp_path / "own", time_step_limit=[0.01, 1.0])
    assert model_files.config_additions(own) == {}
    assert model_files.config_additions(tiny.folder(tmp_path / "llama", "llama")) == {}
