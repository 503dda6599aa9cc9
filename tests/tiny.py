"""Tiny models in the real formats, made on the spot: random weights, a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from dpo_mlx.model import tiny_granite
from mlx_lm.models import granite, granitemoehybrid, llama
from tokenizers import Tokenizer

GRANITE_TEMPLATE = tiny_granite.TEMPLATE
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Behaves as the template of Granite 4.0 does: a system text of its own where none is given, other
# ones with tools and documents, and content that may be a list of parts.
GRANITE_4_SYSTEM = (
    "You are a helpful assistant. Please ensure responses are professional, accurate, and safe."
)
GRANITE_4_TEMPLATE = (
    "{%- set g4_default_system_message = '" + GRANITE_4_SYSTEM + "' -%}"
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{{ content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\n') }}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- macro turn(role, text) -%}"
    "{{ '<|start_of_role|>' ~ role ~ '<|end_of_role|>' ~ text ~ '<|end_of_text|>\n' }}"
    "{%- endmacro -%}"
    "{%- set system = namespace(text='') -%}"
    "{%- if messages[0].role == 'system' -%}"
    "{%- set system.text = text_of(messages[0].content) -%}"
    "{%- set messages = messages[1:] -%}"
    "{%- endif -%}"
    "{%- set callable = tools or available_tools -%}"
    "{%- if callable -%}"
    "{%- set system.text = system.text ~ '\nThese tools can be called:\n' ~ callable | tojson -%}"
    "{%- endif -%}"
    "{%- if documents -%}"
    "{%- set system.text = system.text ~ '\nAnswer from these:\n' ~ documents | tojson -%}"
    "{%- endif -%}"
    "{{ turn('system', system.text or g4_default_system_message) }}"
    "{%- for m in messages -%}{{ turn(m.role, text_of(m.content)) }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|start_of_role|>assistant<|end_of_role|>{%- endif -%}"
)
# ChatML that thinks unless told not to, as Granite 4.2 does.
THINKING_TEMPLATE = (
    "{%- set thinks = enable_thinking is not defined or enable_thinking -%}"
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{{- '<think>\n</think>\n' if m.role == 'assistant' -}}"
    "{{ m.content ~ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n<think>\n' ~ ('' if thinks else '</think>\n') }}"
    "{%- endif -%}"
)
TEMPLATES = {
    "granite": GRANITE_TEMPLATE,
    "dense": GRANITE_TEMPLATE,
    "thinking": THINKING_TEMPLATE,
    "llama": CHATML_TEMPLATE,
}
# By kind: granite is the hybrid one; dense is Granite 4.1 and thinking 4.2, which share a layout.
SPECIAL = {
    "granite": tiny_granite.SPECIAL_TOKENS,
    "dense": tiny_granite.SPECIAL_TOKENS,
    "thinking": ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|endoftext|>"],
    "llama": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
}
MODULES = {"llama": llama, "granite": granite, "granitemoehybrid": granitemoehybrid}
# Changes that make a hybrid Granite one in the proportions of 4.0-h-350m: narrow Mamba heads, three
# query heads to a key, attention where the depth is not a multiple of anything.
NANO: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "shared_intermediate_size": 96,
    "num_hidden_layers": 5,
    "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_d_state": 32,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.246,
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
    scales = {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.25,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
    }
    special: dict[str, Any]
    if kind == "llama":
        special = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
        }
    elif kind in ("dense", "thinking"):
        special = {
            "model_type": "granite",
            "architectures": ["GraniteForCausalLM"],
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            **scales,
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
            "hidden_act": "silu",
            **scales,
        }
    return {**shared, **special, **changes}


def model(settings: dict[str, Any], seed: int = 0) -> Any:
    """A random mlx-lm model whose weights are large enough that answers differ."""
    module = MODULES[settings["model_type"]]
    mx.random.seed(seed)
    made = module.Model(module.ModelArgs.from_dict(settings))
    tiny_granite.randomise(made)
    return made


def folder(
    path: Path, kind: str = "granite", seed: int = 0, template: str | None = None, **changes: Any
) -> Path:
    """Write a model folder in the hub's layout: config, weights, tokenizer, and the chat template
    (the kind's own unless one is given).
    """
    settings = config(kind, **changes)
    template = template or TEMPLATES[kind]
    tiny_granite.write(path, model(settings, seed), settings, SPECIAL[kind], template)
    return path
