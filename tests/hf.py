"""The tiny models in transformers: the same weights under Hugging Face's names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx


def folder(source: Path, path: Path) -> Path:
    """A folder as the hub has it, of the MLX folder `source`; all but the weights as it stands."""
    shutil.copytree(source, path)
    weights: Any = mx.load(str(source / "model.safetensors"))
    kind = json.loads((source / "config.json").read_text())["model_type"]
    if kind == "granitemoehybrid":
        weights = dict(_granite(weights))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "pt"})
    return path


def _granite(weights: dict[str, mx.array]) -> Any:
    """conv1d [C, K, 1] -> [C, 1, K]; gate over up in one input_linear; down is output_linear."""
    for name, weight in weights.items():
        if name.endswith("conv1d.weight"):
            yield name, mx.contiguous(mx.swapaxes(weight, 1, 2))
        elif name.endswith("mlp.gate_proj.weight"):
            both = [weight, weights[name.replace("gate_proj", "up_proj")]]
            merged = name.replace("mlp.gate_proj", "shared_mlp.input_linear")
            yield merged, mx.concatenate(both, axis=0)
        elif name.endswith("mlp.down_proj.weight"):
            yield name.replace("mlp.down_proj", "shared_mlp.output_linear"), weight
        elif not name.endswith("mlp.up_proj.weight"):
            yield name, weight


def load(path: Path) -> Any:
    """The transformers model of such a folder, float32, every weight found and none left over."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    faults = {k: v for k, v in report.items() if v}
    assert not faults, faults
    return model.eval()
