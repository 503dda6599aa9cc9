"""Exports mlx-lm's adapters for PEFT, which applies them to the base model in transformers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..files import jsonl, ownership
from ..files.model_files import ADAPTER_CONFIG, ADAPTERS
from ..model.adapters import check_adapters
from ..model.tensors import save_tensors
from .hugging_face import FOR_TORCH, GRANITE_HYBRID, require_layout

PEFT_WEIGHTS = "adapter_model.safetensors"
# transformers merges some of Granite's linear layers. For each layer: (the merged layer, this
# layer's index in it, how many layers it merges).
MERGED = {
    "mlp.gate_proj": ("shared_mlp.input_linear", 0, 2),
    "mlp.up_proj": ("shared_mlp.input_linear", 1, 2),
    "mlp.down_proj": ("shared_mlp.output_linear", 0, 1),
}

LoraPair = tuple[mx.array, mx.array]  # A [rank, in], B [out, rank]
LoraPairs = dict[str, LoraPair]  # by module name


def write(adapters: Path, base: Path, base_name: str, folder: Path) -> None:
    """Export the folder `adapters` to `folder`, for the model in the folder `base`.

    `base_name` is the base model's name in the PEFT config. Raises UserError for damaged adapters
    or an architecture whose layout is unknown.
    """
    model_config = jsonl.read_json(base / "config.json")
    require_layout(model_config)
    check_adapters(adapters)
    parameters = jsonl.read_json(adapters / ADAPTER_CONFIG)["lora_parameters"]
    modules = _read_pairs(adapters / ADAPTERS)
    if model_config["model_type"] == GRANITE_HYBRID:
        modules = merge(modules)
    with ownership.new_folder(folder) as temporary:
        weights = {}
        for name, (a, b) in modules.items():
            weights[f"base_model.model.{name}.lora_A.weight"] = mx.contiguous(a)
            weights[f"base_model.model.{name}.lora_B.weight"] = mx.contiguous(b)
        save_tensors(temporary / PEFT_WEIGHTS, weights, FOR_TORCH)
        jsonl.write_json(temporary / ADAPTER_CONFIG, _settings(modules, parameters, base_name))


def _read_pairs(path: Path) -> LoraPairs:
    """mlx-lm's adapters A [in, rank] and B [rank, out], transposed for PEFT."""
    weights: Any = mx.load(str(path))
    names = {name.rpartition(".lora_")[0] for name in weights}
    return {n: (weights[f"{n}.lora_a"].T, weights[f"{n}.lora_b"].T) for n in sorted(names)}


def merge(modules: LoraPairs) -> LoraPairs:
    """Merge the adapters of layers that transformers merges into one layer.

    The merged layer stacks its parts' outputs. So the merged A stacks the parts' A, and the merged
    B has each part's B on its diagonal. Its rank is the sum of the parts' ranks, and it computes
    exactly the same. A part without an adapter has zeros in its rows of B.
    """
    merged: LoraPairs = {}
    parts: dict[str, dict[int, LoraPair]] = defaultdict(dict)
    counts = {}
    for name, pair in modules.items():
        block, layer = re.fullmatch(r"(.*\.layers\.\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
        if layer in MERGED:
            target, index, count = MERGED[layer]
            parts[f"{block}.{target}"][index], counts[f"{block}.{target}"] = pair, count
        else:
            merged[name] = pair
    return merged | {name: _stack(pairs, counts[name]) for name, pairs in parts.items()}


def _stack(parts: Mapping[int, LoraPair], count: int) -> LoraPair:
    """The merged adapter of `count` layers, from the adapters of some of them by index."""
    rank = sum(a.shape[0] for a, _ in parts.values())
    rows, before = [], 0
    for index in range(count):
        if index not in parts:  # the merged layers all have the same number of outputs
            rows.append(mx.zeros((next(iter(parts.values()))[1].shape[0], rank)))
            continue
        b = parts[index][1]
        after = rank - before - b.shape[1]
        rows.append(mx.pad(b, [(0, 0), (before, after)]))
        before += b.shape[1]
    return mx.concatenate([parts[index][0] for index in sorted(parts)]), mx.concatenate(rows)


def _settings(modules: LoraPairs, parameters: Mapping[str, Any], base_name: str) -> dict[str, Any]:
    """The content of adapter_config.json. PEFT scales by alpha / rank, mlx-lm by `scale`."""
    rank, scale = parameters["rank"], parameters["scale"]
    ranks = {name: a.shape[0] for name, (a, _) in modules.items() if a.shape[0] != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": parameters.get("dropout", 0.0),
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": ranks,
        "alpha_pattern": {name: scale * module_rank for name, module_rank in ranks.items()},
        "target_modules": list(modules),
    }
