"""Tiny models in the real formats, made on the spot: random weights, a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import granite, granitemoehybrid, llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GRANITE_TEMPLATE = (
    "{%- for m in messages -%}"
    "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
    "{% endfor -%}"
    "{%- if add_generation_prompt -%}<|start_of_role|>assistant<|end_of_role|>{%- endif -%}"
)
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
GRANITE_SPECIAL = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>"]
# By kind: granite is the hybrid one; dense is Granite 4.1 and thinking 4.2, which share a layout.
SPECIAL = {
    "granite": GRANITE_SPECIAL,
    "dense": GRANITE_SPECIAL,
    "thinking": ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|endoftext|>"],
    "llama": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
}
MODULES = {"llama": llama, "granite": granite, "granitemoehybrid": granitemoehybrid}
# Changes that make a hybrid Granite one in the proportions of 4.0-h-350m: narrow Mamba heads, three
# query heads to a key, attention where the depth is no multiple of anything.
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
    """Special tokens, and the 256 bytes in ByteLevel's alphabet."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL[kind], *letters]


def tokenizer(kind: str) -> Tokenizer:
    tokens = vocabulary(kind)
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL[kind]])
    return tok


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
            "mamba_d_state": 16,
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
    made.update(tree_map_with_path(_spread, made.parameters()))
    mx.eval(made.parameters())
    return made


def _spread(path: str, value: mx.array) -> mx.array:
    if path.endswith(("norm.weight", "A_log", ".D", "dt_bias", "layernorm.weight")):
        return value
    return 0.15 * mx.random.normal(value.shape)


def folder(
    path: Path, kind: str = "granite", seed: int = 0, template: str | None = None, **changes: Any
) -> Path:
    """A model folder as the hub has it: config, weights, tokenizer, chat template (the kind's own
    unless another is given).
    """
    path.mkdir(parents=True)
    settings = config(kind, **changes)
    weights = dict(tree_flatten(model(settings, seed).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(settings))
    save_tokenizer(path, kind, template)
    return path


def save_tokenizer(path: Path, kind: str, template: str | None = None) -> None:
    """The tokenizer's two files, with the chat template, into a folder."""
    tokenizer(kind).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": SPECIAL[kind][0],
                "pad_token": SPECIAL[kind][-1],
                "chat_template": template or TEMPLATES[kind],
            }
        )
    )
