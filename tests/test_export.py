"""The exported folder in transformers, PEFT and TRL: the same model, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from dpo_mlx.config import NEAREST, STOCHASTIC, LoraConfig
from dpo_mlx.export import hugging_face, llama_cpp
from dpo_mlx.export import peft as peft_export
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.model import fusing
from dpo_mlx.model.adapters import save_adapters
from dpo_mlx.model.loading import load_model
from dpo_mlx.model.saving import INDEX, config_for, save_model_folder
from mlx.utils import tree_flatten
from runs import differences
from test_adapters import adapted
from test_granite_parity import granite_folder

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import hf  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = np.random.default_rng(1).integers(4, 250, size=(1, 90))
LORA = LoraConfig(rank=4, scale=8.0)


def mlx_logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array(IDS))[0])


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS), use_cache=False).logits[0].numpy()


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, divided by the largest value."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def fused_folder(base: Path, path: Path, dtype: mx.Dtype = mx.float32, how: str = NEAREST) -> Path:
    """Adapters as after some training, fused and saved as stage 11 does."""
    model = adapted(base, LORA)
    fusing.fuse(model, how, dtype)
    fusing.cast(model, dtype)
    about = config_for(jsonl.read_json(base / "config.json"), dtype)
    save_model_folder(model, base, path, about)
    return path


# In transformers --------------------------------------------------------------------------------

GRANITES: dict[str, dict[str, Any]] = {
    "both kinds of layer": {},
    "small dt": {"dt_bias": -8.0},
    "untied": {"tie_word_embeddings": False},
    "more heads": {"mamba_n_heads": 8, "mamba_d_head": 16},
}


@pytest.mark.parametrize("name", GRANITES)
def test_granite_answers_alike_in_transformers(name, tmp_path):
    """transformers loads every key, and its logits are the fused MLX model's to 1e-4."""
    base = granite_folder(tmp_path / "base", **GRANITES[name])
    fused = fused_folder(base, tmp_path / "fused")
    hugging_face.write(fused, base, tmp_path / "hf")
    found = mlx_logits(load_model(str(fused)).model)
    assert difference(found, mlx_logits(load_model(str(base)).model)) > 0.01
    assert difference(their_logits(hf.load(tmp_path / "hf")), found) < 1e-4


@pytest.mark.demo_model
def test_smollm2_answers_alike_in_transformers(smollm2, tmp_path):
    """A real model with adapters in all layers, fused and exported, has the same logits to 1e-4."""
    fused = fused_folder(smollm2, tmp_path / "fused")
    hugging_face.write(fused, smollm2, tmp_path / "hf")
    found = mlx_logits(load_model(str(fused)).model)
    assert difference(their_logits(hf.load(tmp_path / "hf")), found) < 1e-4
    assert llama_cpp.faults(tmp_path / "hf") == []


# transformers' config of a tiny model of each architecture. mlx-lm then reads its folder.
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.3},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", OTHERS)
def test_llama_like_models_keep_their_layout(kind, tied, llama, tmp_path):
    """A folder of transformers, loaded in mlx-lm and exported, has the same names and values. The
    shapes that we expect for llama.cpp are those that transformers wrote.
    """
    torch.manual_seed(0)
    sizes = {
        k: v for k, v in tiny.config("llama").items() if k not in ("model_type", "torch_dtype")
    }
    sizes |= {"architectures": None, "tie_word_embeddings": tied, "pad_token_id": 1}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **OTHERS[kind]))
    base = tmp_path / "base"
    theirs.save_pretrained(base)
    # mlx-lm's granite asks for the key of earlier versions of transformers.
    about = jsonl.read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps(about | {"rope_theta": 10000.0}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / file, base / file)
    hugging_face.write(base, base, tmp_path / "hf")
    expected, found = weights_of(base), weights_of(tmp_path / "hf")
    assert differences(found, expected) == 0
    assert (tmp_path / "hf/config.json").read_bytes() == (base / "config.json").read_bytes()
    shapes = llama_cpp.expected_shapes(jsonl.read_json(base / "config.json"))
    assert shapes == {name: tuple(weight.shape) for name, weight in expected.items()}


def weights_of(folder: Path) -> dict[str, mx.array]:
    weights: Any = {}
    for path in folder.glob("*.safetensors"):
        weights |= mx.load(str(path))
    return weights


def test_settings_are_the_base_model_s_to_the_byte(tmp_path):
    """config.json, tokenizer and template are the base model's, although fused/ adds keys."""
    base = granite_folder(tmp_path / "base")
    (base / "chat_template.jinja").write_text(tiny.GRANITE_TEMPLATE)
    fused = fused_folder(base, tmp_path / "fused")
    assert jsonl.read_json(fused / "config.json") != jsonl.read_json(base / "config.json")
    hugging_face.write(fused, base, tmp_path / "hf")
    kept = [path.name for path in base.iterdir() if path.suffix != ".safetensors"]
    for name in kept:
        assert (tmp_path / "hf" / name).read_bytes() == (base / name).read_bytes(), name
    template = AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template
    assert template == tiny.GRANITE_TEMPLATE


def test_config_names_a_changed_dtype(granite, tmp_path):
    """bfloat16 weights of a float32 base: config.json says so, and nothing else differs."""
    fused = fused_folder(granite, tmp_path / "fused", mx.bfloat16, STOCHASTIC)
    hugging_face.write(fused, granite, tmp_path / "hf")
    about, own = (jsonl.read_json(p / "config.json") for p in (tmp_path / "hf", granite))
    assert about == own | {"torch_dtype": "bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weights = dict(tree_flatten(load_model(str(fused)).model.parameters()))
    name = "model.layers.0.mamba.in_proj.weight"
    own_weight = model.state_dict()[name].float().numpy()
    assert np.array_equal(own_weight, np.array(weights[name].astype(mx.float32)))


def test_large_models_are_split(granite, tmp_path, monkeypatch):
    """No file exceeds SHARD_GB, the index names each tensor's file, and files are for PyTorch."""
    monkeypatch.setattr(hugging_face, "SHARD_GB", 0)  # a file for each tensor
    hugging_face.write(granite, granite, tmp_path / "hf")
    files = list((tmp_path / "hf").glob("*.safetensors"))
    index = jsonl.read_json(tmp_path / "hf" / INDEX)
    assert len(files) == len(index["weight_map"]) > 10
    for path in files:
        loaded: Any = mx.load(str(path), return_metadata=True)
        assert loaded[1] == {"format": "pt"}
        assert {index["weight_map"][name] for name in loaded[0]} == {path.name}
    hf.load(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"model_type": "mamba2"}, "mamba2"), ({"num_local_experts": 8}, "granitemoehybrid with exp")],
)
def test_unknown_layouts_are_refused_by_name(change, named):
    """In a wrong layout, transformers would read random weights."""
    config = {**tiny.config("granite"), **change}
    with pytest.raises(UserError, match=f"architecture {named}.*in mlx-lm instead"):
        hugging_face.hugging_face_layout(config, {})


def test_quantised_models_are_refused(granite, tmp_path):
    """transformers cannot read MLX's quantised weights. The error names the key to change."""
    model = load_model(str(granite)).model
    about = fusing.quantize(model, jsonl.read_json(granite / "config.json"), 4)
    save_model_folder(model, granite, tmp_path / "fused", about)
    with pytest.raises(UserError, match="fuse.quantize: null"):
        hugging_face.write(tmp_path / "fused", granite, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# In PEFT ----------------------------------------------------------------------------------------


def in_peft(base: Path, lora: LoraConfig, path: Path, scale: float | None = None) -> Any:
    """(MLX's logits with adapters, the PEFT model of the same on the exported base)."""
    model = adapted(base, lora)
    save_adapters(model, lora, path / "adapters")
    peft_export.write(path / "adapters", base, "a/name", path / "peft")
    theirs = hf.load(hf.folder(base, path / "hf"))
    return mlx_logits(model), peft.PeftModel.from_pretrained(theirs, path / "peft").eval()


LORAS: dict[str, LoraConfig] = {
    "all layers": LORA,
    "one of the merged": LoraConfig(rank=4, scale=8.0, keys=["mlp.up_proj", "mlp.down_proj"]),
    "the other": LoraConfig(rank=3, scale=7.5, keys=["mlp.gate_proj"]),
    "the last block": LoraConfig(rank=4, scale=8.0, num_layers=1),
}


@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("kind", ["granite", "llama"])
def test_peft_adapters_answer_alike(kind, name, request, tmp_path):
    """PEFT on the exported base model has the logits of MLX with adapters, for any layers."""
    expected, theirs = in_peft(request.getfixturevalue(kind), LORAS[name], tmp_path)
    plain = their_logits(theirs.unload())
    found = their_logits(peft.PeftModel.from_pretrained(theirs.unload(), tmp_path / "peft").eval())
    assert difference(found, expected) < 1e-4
    assert difference(plain, expected) > 1e-2, "the adapters do nothing here"


def test_merged_layers_are_one_block_of_twice_the_rank(granite, tmp_path):
    """gate and up: the merged A stacks both A, and the merged B has both B on its diagonal and
    zeros elsewhere. alpha grows with the rank, so the scale stays.
    """
    save_adapters(adapted(granite, LORA), LORA, tmp_path / "adapters")
    peft_export.write(tmp_path / "adapters", granite, "a/name", tmp_path / "peft")
    own: Any = mx.load(str(tmp_path / "adapters/adapters.safetensors"))
    peft_weights: Any = mx.load(str(tmp_path / "peft" / peft_export.PEFT_WEIGHTS))
    mlp = "model.layers.1.mlp"
    gate, up = (
        (own[f"{mlp}.{x}_proj.lora_a"], own[f"{mlp}.{x}_proj.lora_b"]) for x in ("gate", "up")
    )
    name = "model.layers.1.shared_mlp.input_linear"
    a, b = (peft_weights[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert mx.array_equal(a, mx.concatenate([gate[0].T, up[0].T]))
    width = gate[1].shape[1]
    zero = mx.zeros((width, LORA.rank))
    rows = [mx.concatenate([gate[1].T, zero], axis=1), mx.concatenate([zero, up[1].T], axis=1)]
    assert mx.array_equal(b, mx.concatenate(rows))
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings["rank_pattern"][name] == 2 * settings["r"] == 8
    assert settings["alpha_pattern"][name] / 8 == settings["lora_alpha"] / 4 == LORA.scale
    assert settings["base_model_name_or_path"] == "a/name"
