"""Builds a tiny Granite model with random weights, in the hub's format, without a network.

The self-test and the tests use it. It is small, but the sizes that select Metal's kernels are those
of the real Granite: heads of 64, and a Mamba state that is a multiple of 32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import granitemoehybrid
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{%- for m in messages -%}"
    "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
    "{% endfor -%}"
    "{%- if add_generation_prompt -%}<|start_of_role|>assistant<|end_of_role|>{%- endif -%}"
)
# The first token ends a turn. The last one pads.
SPECIAL_TOKENS = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>"]

# Parameters that keep mlx-lm's initial values. All others are random.
NOT_RANDOM = ("norm.weight", "A_log", ".D", "dt_bias", "layernorm.weight")
SPREAD = 0.15  # standard deviation of the random weights; large enough that answers differ


def settings(dtype: str = "bfloat16", **changes: Any) -> dict[str, Any]:
    """config.json of a hybrid model with Mamba and attention layers; `changes` override keys."""
    return {
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "torch_dtype": dtype,
        "vocab_size": len(vocabulary(SPECIAL_TOKENS)),
        "hidden_size": 128,
        "intermediate_size": 256,
        "shared_intermediate_size": 256,
        "num_hidden_layers": 5,
        "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_bias": False,
        "position_embedding_type": "nope",
        "max_position_embeddings": 1024,
        "mamba_n_heads": 4,
        "mamba_d_head": 64,
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "tie_word_embeddings": True,
        # The real Granite has 12, 1 / 64 and 8. With these values, random layers would add almost
        # nothing to a token's embedding, and all tokens would be about equally likely.
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1 / 16,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        **changes,
    }


def folder(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a model folder to `path`, which must not exist yet. `changes` override `settings`."""
    config = settings(**changes)
    mx.random.seed(seed)
    model = granitemoehybrid.Model(granitemoehybrid.ModelArgs.from_dict(config))
    randomise(model)
    write(path, model, config, SPECIAL_TOKENS, TEMPLATE)
    return path


def randomise(model: Any) -> None:
    """Give a model random weights, drawn from MLX's random state."""
    model.update(tree_map_with_path(_random_weight, model.parameters()))
    mx.eval(model.parameters())


def _random_weight(path: str, value: mx.array) -> mx.array:
    return value if path.endswith(NOT_RANDOM) else SPREAD * mx.random.normal(value.shape)


def write(
    path: Path, model: Any, config: dict[str, Any], special: list[str], template: str
) -> None:
    """Write a model folder in the hub's layout: config, weights in its `torch_dtype`, tokenizer,
    chat template.

    `special` holds the special tokens: the first ends a turn, the last pads.
    """
    path.mkdir(parents=True)
    dtype = getattr(mx, config["torch_dtype"])
    weights = {name: w.astype(dtype) for name, w in dict(tree_flatten(model.parameters())).items()}
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path, special, template)


def write_tokenizer(path: Path, special: list[str], template: str) -> None:
    """Write the tokenizer's two files, including the chat template, into a folder."""
    byte_tokenizer(special).save(str(path / "tokenizer.json"))
    tokenizer_settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special[0],
        "pad_token": special[-1],
        "chat_template": template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings))


def byte_tokenizer(special: list[str]) -> Tokenizer:
    """A tokenizer with one token per byte, and the special tokens."""
    tokens = vocabulary(special)
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def vocabulary(special: list[str]) -> list[str]:
    """The special tokens, then the 256 bytes in ByteLevel's alphabet."""
    return [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
