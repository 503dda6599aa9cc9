"""A fused model in Hugging Face's own layout, as transformers and llama.cpp read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import make_shards

from ..files import jsonl, ownership
from ..files.errors import UserError
from ..model import fusing
from ..model.loading import load_model
from ..model.saving import INDEX, config_for, copy_settings
from ..model.tensors import save_tensors

# Architectures whose weights have the same names and axes in mlx-lm and in transformers.
SAME_LAYOUT = ("granite", "llama", "mistral", "qwen2", "qwen3", "smollm3")
GRANITE_HYBRID = "granitemoehybrid"
FOR_TORCH = {"format": "pt"}  # metadata without which transformers reads no safetensors
SHARD_GB = 2  # each file is put together in memory

Weights = Mapping[str, mx.array]


def write(source: Path, base: Path, folder: Path) -> None:
    """The weights of the folder `source`, with everything else as the base model's folder has it.

    Of config.json's keys only those of dtype and quantisation may change: transformers would
    rewrite others, which llama.cpp and mlx-lm then read wrongly.
    """
    loaded = load_model(str(source), lazy=True)
    if fusing.is_quantized(loaded.model):
        raise UserError(
            f"{source}: is quantised, which transformers and llama.cpp do each in their own way; "
            "set fuse.quantize: null and run 11_fuse_adapters.py again"
        )
    dtype = fusing.dtype_of(loaded.model)
    about = config_for(jsonl.read_json(base / "config.json"), dtype)
    parameters: Any = dict(tree_flatten(loaded.model.parameters()))
    weights = {**hugging_face_layout(about, parameters)}
    del loaded, parameters
    with ownership.new_folder(folder) as temporary:
        copy_settings(base, temporary, about)
        _save_weights(weights, temporary)


def require_layout(config: Mapping[str, Any]) -> None:
    """Raises UserError, which names the architecture, when transformers' layout is not known."""
    kind, experts = config.get("model_type"), config.get("num_local_experts")
    if kind in SAME_LAYOUT or (kind == GRANITE_HYBRID and not experts):
        return
    raise UserError(
        f"model: how architecture {kind}{' with experts' if experts else ''} is laid out in "
        f"transformers is not known here; known are {', '.join((*SAME_LAYOUT, GRANITE_HYBRID))}. "
        "The adapters and fused/ run in mlx-lm as they are"
    )


def hugging_face_layout(config: Mapping[str, Any], weights: Weights) -> Weights:
    """The weights of mlx-lm's model under transformers' names and with its axes."""
    require_layout(config)
    hybrid = config["model_type"] == GRANITE_HYBRID
    return dict(_granite_hybrid(weights)) if hybrid else weights


def _granite_hybrid(weights: Weights) -> Iterator[tuple[str, Any]]:
    """conv1d [C, K, 1] -> [C, 1, K]; gate over up in one input_linear; down is output_linear."""
    for name, weight in weights.items():
        if name.endswith("conv1d.weight"):
            yield name, mx.swapaxes(weight, 1, 2)
        elif ".mlp.gate_proj." in name:
            merged = mx.concatenate([weight, weights[name.replace("gate_proj", "up_proj")]])
            yield name.replace("mlp.gate_proj", "shared_mlp.input_linear"), merged
        elif ".mlp.down_proj." in name:
            yield name.replace("mlp.down_proj", "shared_mlp.output_linear"), weight
        elif ".mlp.up_proj." not in name:
            yield name, weight


def _save_weights(weights: dict[str, Any], folder: Path) -> None:
    """Safetensors with the metadata that transformers asks for, and their index."""
    shards, sizes = make_shards(weights, SHARD_GB), [w.nbytes for w in weights.values()]
    weights.clear()  # each shard is let go once it is on the disk
    index = {}
    for number in range(1, len(shards) + 1):
        shard = shards.pop(0)
        file = f"model-{number:05d}-of-{number + len(shards):05d}.safetensors"
        save_tensors(folder / file, shard, FOR_TORCH)
        index.update(dict.fromkeys(shard, file))
    jsonl.write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": index})
