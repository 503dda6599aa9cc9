"""Adapters into the weights beneath them: added in float32, rounded once, one layer at a time."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import dequantize_model, get_total_parameters, quantize_model

from ..config import STOCHASTIC
from ..files.errors import UserError
from .adapters import LORA_LAYERS
from .rounding import rounded
from .saving import dtype_name

GROUP_SIZE = 64  # weights that share a scale in what is quantised here
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


def fuse(model: nn.Module, how: str, dtype: mx.Dtype, seed: int = 0) -> None:
    """Put a plain layer of `dtype` in the place of each adapter and each quantised layer.

    In place, one layer after the other, so that memory holds the model and what one layer takes.
    `how` is one of config.ROUNDINGS; the same seed draws the same weights. Layers without an
    adapter are rounded to nearest.

    Raises UserError when a fused weight is NaN or too large for `dtype`.
    """
    names = _layers_to_fuse(model)
    for name, key in zip(names, mx.random.split(mx.random.key(seed), len(names)), strict=True):
        plain = _fused(_module(model, name), how, dtype, key)
        if not mx.isfinite(plain.weight).all():
            wider = "set fuse.dtype: bfloat16, or " if dtype == mx.float16 else ""
            raise UserError(
                f"{name}: a fused weight is NaN or too large for {dtype_name(dtype)}; {wider}train "
                "again with a lower train.learning_rate"
            )
        model.update_modules(tree_unflatten([(name, plain)]))


def fuse_largest_layer(model: nn.Module, dtype: mx.Dtype) -> None:
    """Fuse the largest layer and discard the result, to measure its memory and time."""
    layers = [_module(model, name) for name in _layers_to_fuse(model)]
    if layers:
        largest = max(layers, key=get_total_parameters)
        _fused(largest, STOCHASTIC, dtype, mx.random.key(0))


def in_largest_layers(model: nn.Module) -> float:
    """The total size of the layers to fuse, divided by the size of the largest."""
    sizes = [get_total_parameters(_module(model, name)) for name in _layers_to_fuse(model)]
    return sum(sizes) / max(sizes, default=1)


def _layers_to_fuse(model: nn.Module) -> list[str]:
    """Names of the outermost layers that carry an adapter or are quantised."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LORA_LAYERS + QUANTIZED)
    ]
    return [name for name in names if name.rpartition(".")[0] not in names]


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """All that is left in another float type, rounded to nearest."""
    model.set_dtype(dtype)
    mx.eval(model.parameters())


def quantize(model: nn.Module, config: dict[str, Any], bits: int) -> dict[str, Any]:
    """Quantise a plain model in place, as mlx-lm does; what config.json says of it then."""
    return quantize_model(model, config, GROUP_SIZE, bits)[1]


def dtype_of(model: nn.Module) -> mx.Dtype:
    """The float type of most of the model's own numbers; of a quantised one, of its scales."""
    sizes: Counter[mx.Dtype] = Counter()
    for name, array in dict(tree_flatten(model.parameters())).items():
        if "lora_" not in name and mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] += array.size
    return max(sizes, key=lambda dtype: sizes[dtype])


def target_dtype(model: nn.Module, name: str | None) -> mx.Dtype:
    """The dtype that `fuse.dtype` names; null means the model's own."""
    return getattr(mx, name) if name else dtype_of(model)


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QUANTIZED) for module in model.modules())


@contextmanager
def activations_in_float32(model: Any) -> Iterator[None]:
    """The model as its weights are, without the rounding of what flows through it.

    Every product takes the wider of its operands' types, so a float32 embedding is enough.
    """
    embedding = model.model.embed_tokens
    try:
        model.model.embed_tokens = in_float32(embedding)
        yield
    finally:
        model.model.embed_tokens = embedding


def in_float32(layer: nn.Module) -> nn.Module:
    """A copy of a layer and of what is inside it, dequantised, in float32."""
    holder = nn.Sequential(copy.deepcopy(layer))
    holder.set_dtype(mx.float32)  # the scales first: they say in which type it is dequantised
    dequantize_model(holder)
    holder.set_dtype(mx.float32)
    return holder.layers[0]


def _fused(layer: nn.Module, how: str, dtype: mx.Dtype, key: mx.array) -> nn.Module:
    """The layer that an adapter, or a quantised layer, is put together to."""
    plain: Any = in_float32(layer)
    if isinstance(layer, LORA_LAYERS):
        plain = plain.fuse()
        plain.weight = rounded(plain.weight, dtype, how, key)
    plain.set_dtype(dtype)
    mx.eval(plain.parameters())
    return plain


def _module(model: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name."""

    def step(tree: Any, part: str) -> Any:
        return tree[int(part)] if isinstance(tree, list) else tree[part]

    return reduce(step, name.split("."), model)
