"""Tiny models in the real formats, made on the spot: random weights, a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import granitemoehybrid, llama
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
SPECIAL = {
    "granite": ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>"],
    "llama": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
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
            "mamba_d_state": 16,
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
    made.update(tree_map_with_path(_spread, made.parameters()))
    mx.eval(made.parameters())
    return made


def _spread(path: str, value: mx.array) -> mx.array:
    if path.endswith(("norm.weight", "A_log", ".D", "dt_bias", "layernorm.weight")):
        return value
    return 0.15 * mx.random.normal(value.shape)


def folder(path: Path, kind: str = "granite", seed: int = 0, **changes: Any) -> Path:
    """A model folder as the hub has it: config, weights, tokenizer, chat template."""
    path.mkdir(parents=True)
    settings = config(kind, **changes)
    weights = dict(tree_flatten(model(settings, seed).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(settings))
    save_tokenizer(path, kind)
    return path


def save_tokenizer(path: Path, kind: str) -> None:
    """The tokenizer's two files, with the chat template, into a folder."""
    tokenizer(kind).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": SPECIAL[kind][0],
                "pad_token": SPECIAL[kind][-1],
                "chat_template": GRANITE_TEMPLATE if kind == "granite" else CHATML_TEMPLATE,
            }
        )
    )
