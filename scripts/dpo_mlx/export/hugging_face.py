"""Exports a fused model in Hugging Face's layout, for transformers and llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config, make_shards

from ..files import jsonl, ownership
from ..files.errors import UserError
from ..model import fusing
from ..model.loading import load_model
from ..model.saving import INDEX, config_for, copy_model_files
from ..model.tensors import save_tensors

# Architectures whose weights have the same names and axes in mlx-lm and transformers.
SAME_LAYOUT = ("granite", "llama", "mistral", "qwen2", "qwen3", "smollm3")
GRANITE_HYBRID = "granitemoehybrid"
# transformers refuses a safetensors file without this metadata.
FOR_TORCH = {"format": "pt"}
SHARD_GB = 2  # MLX builds each file in memory

Weights = Mapping[str, mx.array]


def write(source: Path, base: Path, folder: Path) -> None:
    """Export the model in `source` to `folder`, with the other files of the folder `base`.

    config.json is the base model's, with changes only to the keys of dtype and quantisation.
    transformers' own `save_pretrained` rewrites other keys, and llama.cpp and mlx-lm then misread
    them. Raises UserError for a quantised model or an architecture whose layout is unknown.
    """
    loaded = load_model(str(source), lazy=True)
    if fusing.is_quantized(loaded.model):
        raise UserError(
            f"{source}: is quantised for MLX, which transformers and llama.cpp cannot read; set "
            "fuse.quantize: null and run 11_fuse_adapters.py again"
        )
    dtype = fusing.dtype_of(loaded.model)
    model_config = config_for(jsonl.read_json(base / "config.json"), dtype)
    parameters: Any = dict(tree_flatten(loaded.model.parameters()))
    weights = {**hugging_face_layout(model_config, parameters)}
    del loaded, parameters  # so that _save_weights can free each tensor
    stop_ids, base_stop_ids = (load_config(path).get("eos_token_id") for path in (source, base))
    with ownership.new_folder(folder) as temporary:
        new_stop_ids = None if stop_ids == base_stop_ids else stop_ids
        copy_model_files(base, temporary, model_config, new_stop_ids)
        _save_weights(weights, temporary)


def require_layout(config: Mapping[str, Any]) -> None:
    """Raises UserError for an architecture whose layout in transformers is unknown."""
    kind, experts = config.get("model_type"), config.get("num_local_experts")
    if kind in SAME_LAYOUT or (kind == GRANITE_HYBRID and not experts):
        return
    raise UserError(
        f"model: cannot export architecture {kind}{' with experts' if experts else ''}; this "
        f"pipeline knows the layout of {', '.join((*SAME_LAYOUT, GRANITE_HYBRID))}. Use fused/ or "
        "the adapters in mlx-lm instead"
    )


def hugging_face_layout(config: Mapping[str, Any], weights: Weights) -> Weights:
    """mlx-lm's weights with the names and axes of transformers."""
    require_layout(config)
    hybrid = config["model_type"] == GRANITE_HYBRID
    return dict(_granite_hybrid(weights)) if hybrid else weights


def _granite_hybrid(weights: Weights) -> Iterator[tuple[str, Any]]:
    """conv1d [C, K, 1] -> [C, 1, K]; gate stacked on up -> input_linear; down -> output_linear."""
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
    """Write the weights as safetensors files and an index. Empties `weights`."""
    shards, sizes = make_shards(weights, SHARD_GB), [w.nbytes for w in weights.values()]
    weights.clear()  # so that each shard is freed once it is on the disk
    index = {}
    for number in range(1, len(shards) + 1):
        shard = shards.pop(0)
        file = f"model-{number:05d}-of-{number + len(shards):05d}.safetensors"
        save_tensors(folder / file, shard, FOR_TORCH)
        index.update(dict.fromkeys(shard, file))
    jsonl.write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": index})
