"""Tiny models in the real formats, made on the spot: random weights, a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from dpo_mlx import tiny_granite
from mlx_lm.models import granitemoehybrid, llama
from tokenizers import Tokenizer

GRANITE_TEMPLATE = tiny_granite.TEMPLATE
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = {
    "granite": tiny_granite.SPECIAL_TOKENS,
    "llama": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
}


def vocabulary(kind: str) -> list[str]:
    return tiny_granite.vocabulary(SPECIAL[kind])


def tokenizer(kind: str) -> Tokenizer:
    return tiny_granite.byte_tokenizer(SPECIAL[kind])


def config(kind: str, **changes: Any) -> dict[str, Any]:
    shared = {
        "vocab_size": len(vocabulary(kind)),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    special: dict[str, Any]
    if kind == "llama":
        special = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
        }
    else:
        special = {
            "model_type": "granitemoehybrid",
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "layer_types": ["mamba", "attention", "mamba"],
            "shared_intermediate_size": 128,
            "attention_bias": False,
            "position_embedding_type": "nope",
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 32,  # what mlx-lm's Metal kernel can do, times of this
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_chunk_size": 256,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.25,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "hidden_act": "silu",
        }
    return {**shared, **special, **changes}


def model(settings: dict[str, Any], seed: int = 0) -> Any:
    """A random mlx-lm model whose weights are large enough that answers differ."""
    module = llama if settings["model_type"] == "llama" else granitemoehybrid
    mx.random.seed(seed)
    made = module.Model(module.ModelArgs.from_dict(settings))
    tiny_granite.randomise(made)
    return made


def folder(path: Path, kind: str = "granite", seed: int = 0, **changes: Any) -> Path:
    """A model folder as the hub has it: config, weights, tokenizer, chat template."""
    settings = config(kind, **changes)
    template = GRANITE_TEMPLATE if kind == "granite" else CHATML_TEMPLATE
    tiny_granite.write(path, model(settings, seed), settings, SPECIAL[kind], template)
    return path
