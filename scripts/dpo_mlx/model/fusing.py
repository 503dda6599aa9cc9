"""Fuses adapters into the weights: adds in float32, rounds once, one layer at a time."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import dequantize_model, get_total_parameters, quantize_model

from ..config import STOCHASTIC
from ..files.errors import UserError
from .adapters import LORA_LAYERS
from .rounding import round_to
from .saving import dtype_name

GROUP_SIZE = 64  # weights that share a scale
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


def fuse(model: nn.Module, rounding: str, dtype: mx.Dtype, seed: int = 0) -> None:
    """Replace each layer that has an adapter or is quantised by an ordinary layer of `dtype`.

    Works in place, one layer after the other, so memory holds the model and one more layer.
    `rounding` is one of config.ROUNDINGS. The same seed gives the same weights. A layer without an
    adapter is rounded to nearest.

    Raises UserError when a fused weight is NaN or too large for `dtype`.
    """
    names = _layers_to_fuse(model)
    for name, key in zip(names, mx.random.split(mx.random.key(seed), len(names)), strict=True):
        layer = _fuse_layer(_module(model, name), rounding, dtype, key)
        if not mx.isfinite(layer.weight).all():
            wider = "set fuse.dtype: bfloat16, or " if dtype == mx.float16 else ""
            raise UserError(
                f"{name}: a fused weight is NaN or too large for {dtype_name(dtype)}; {wider}train "
                "again with a lower train.learning_rate"
            )
        model.update_modules(tree_unflatten([(name, layer)]))


def fuse_largest_layer(model: nn.Module, dtype: mx.Dtype) -> None:
    """Fuse the largest layer and discard the result, to measure its memory and time."""
    layers = [_module(model, name) for name in _layers_to_fuse(model)]
    if layers:
        largest = max(layers, key=get_total_parameters)
        _fuse_layer(largest, STOCHASTIC, dtype, mx.random.key(0))


def size_in_largest_layers(model: nn.Module) -> float:
    """The total size of the layers to fuse, divided by the size of the largest."""
    sizes = [get_total_parameters(_module(model, name)) for name in _layers_to_fuse(model)]
    return sum(sizes) / max(sizes, default=1)


def _layers_to_fuse(model: nn.Module) -> list[str]:
    """Names of the outermost layers that have an adapter or are quantised."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LORA_LAYERS + QUANTIZED)
    ]
    return [name for name in names if name.rpartition(".")[0] not in names]


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast every float parameter to `dtype`, rounded to nearest."""
    model.set_dtype(dtype)
    mx.eval(model.parameters())


def quantize(model: nn.Module, config: dict[str, Any], bits: int) -> dict[str, Any]:
    """Quantise a model in place, as mlx-lm does. Returns its new config.json.

    The model must have no adapters and no quantised layers.
    """
    return quantize_model(model, config, GROUP_SIZE, bits)[1]


def dtype_of(model: nn.Module) -> mx.Dtype:
    """The float type of most parameters, without adapters. In quantised layers the scales count."""
    sizes: Counter[mx.Dtype] = Counter()
    for name, array in dict(tree_flatten(model.parameters())).items():
        if "lora_" not in name and mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] += array.size
    return max(sizes, key=lambda dtype: sizes[dtype])


def target_dtype(model: nn.Module, name: str | None) -> mx.Dtype:
    """The dtype that `fuse.dtype` names; null means the dtype of the model."""
    return getattr(mx, name) if name else dtype_of(model)


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of the model is quantised."""
    return any(isinstance(module, QUANTIZED) for module in model.modules())


@contextmanager
def activations_in_float32(model: Any) -> Iterator[None]:
    """Inside the context, the model computes in float32; its weights stay as they are.

    Every product has the wider type of its operands, so a float32 embedding is enough.
    """
    embedding = model.model.embed_tokens
    try:
        model.model.embed_tokens = in_float32(embedding)
        yield
    finally:
        model.model.embed_tokens = embedding


def in_float32(layer: nn.Module) -> nn.Module:
    """A dequantised float32 copy of a layer, with the layers inside it."""
    holder = nn.Sequential(copy.deepcopy(layer))
    holder.set_dtype(mx.float32)  # first the scales: layers are dequantised to their dtype
    dequantize_model(holder)
    holder.set_dtype(mx.float32)
    return holder.layers[0]


def _fuse_layer(layer: nn.Module, rounding: str, dtype: mx.Dtype, key: mx.array) -> nn.Module:
    """The layer dequantised to `dtype`, with its adapter added if it has one."""
    fused: Any = in_float32(layer)
    if isinstance(layer, LORA_LAYERS):
        fused = fused.fuse()
        fused.weight = round_to(fused.weight, dtype, rounding, key)
    fused.set_dtype(dtype)
    mx.eval(fused.parameters())
    return fused


def _module(model: nn.Module, name: str) -> nn.Module:
    """The module with this dotted name."""
    return dict(model.named_modules())[name]
