"""The adapters as PEFT reads them, for the base model in Hugging Face's layout."""

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
# Linear layers of Granite as (where transformers has them, their place among the layers merged
# there, how many are merged there).
MERGED = {
    "mlp.gate_proj": ("shared_mlp.input_linear", 0, 2),
    "mlp.up_proj": ("shared_mlp.input_linear", 1, 2),
    "mlp.down_proj": ("shared_mlp.output_linear", 0, 1),
}

Pairs = dict[str, tuple[mx.array, mx.array]]  # by module: A [rank, in], B [out, rank]


def write(adapters: Path, base: Path, base_name: str, folder: Path) -> None:
    """The PEFT folder of mlx-lm's `adapters`, for the model in `base` that is called base_name."""
    about = jsonl.read_json(base / "config.json")
    require_layout(about)
    check_adapters(adapters)
    parameters = jsonl.read_json(adapters / ADAPTER_CONFIG)["lora_parameters"]
    modules = _modules(adapters / ADAPTERS)
    if about["model_type"] == GRANITE_HYBRID:
        modules = merge(modules)
    with ownership.new_folder(folder) as temporary:
        weights = {}
        for name, (a, b) in modules.items():
            weights[f"base_model.model.{name}.lora_A.weight"] = mx.contiguous(a)
            weights[f"base_model.model.{name}.lora_B.weight"] = mx.contiguous(b)
        save_tensors(temporary / PEFT_WEIGHTS, weights, FOR_TORCH)
        jsonl.write_json(temporary / ADAPTER_CONFIG, _settings(modules, parameters, base_name))


def _modules(path: Path) -> Pairs:
    """mlx-lm's adapters, A [in, rank] and B [rank, out], transposed."""
    weights: Any = mx.load(str(path))
    names = {name.rpartition(".lora_")[0] for name in weights}
    return {n: (weights[f"{n}.lora_a"].T, weights[f"{n}.lora_b"].T) for n in sorted(names)}


def merge(modules: Pairs) -> Pairs:
    """Adapters of layers that are one layer in transformers as one adapter of the summed rank.

    With the layers' outputs one above the other, A stacks the parts' A, and B has their B on its
    diagonal; exactly what the parts did. A part that has no adapter leaves its rows of B zero.
    """
    merged: Pairs = {}
    parts: dict[str, dict[int, tuple[mx.array, mx.array]]] = defaultdict(dict)
    counts = {}
    for name, pair in modules.items():
        block, own = re.fullmatch(r"(.*\.layers\.\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
        if own in MERGED:
            there, place, count = MERGED[own]
            parts[f"{block}.{there}"][place], counts[f"{block}.{there}"] = pair, count
        else:
            merged[name] = pair
    return merged | {name: _stack(found, counts[name]) for name, found in parts.items()}


def _stack(parts: Mapping[int, tuple[mx.array, mx.array]], count: int) -> tuple[mx.array, mx.array]:
    rank = sum(a.shape[0] for a, _ in parts.values())
    rows, before = [], 0
    for place in range(count):
        if place not in parts:  # all of the merged layers have as many outputs
            rows.append(mx.zeros((next(iter(parts.values()))[1].shape[0], rank)))
            continue
        b = parts[place][1]
        after = rank - before - b.shape[1]
        rows.append(mx.pad(b, [(0, 0), (before, after)]))
        before += b.shape[1]
    return mx.concatenate([parts[place][0] for place in sorted(parts)]), mx.concatenate(rows)


def _settings(modules: Pairs, parameters: Mapping[str, Any], base_name: str) -> dict[str, Any]:
    """adapter_config.json: PEFT multiplies by alpha / rank, which is mlx-lm's scale."""
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
        "alpha_pattern": {name: scale * own for name, own in ranks.items()},
        "target_modules": list(modules),
    }
