"""LoRA adapters: put them on a model, switch them off, save, load and check them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..config import LoraConfig
from ..files import jsonl, model_folder, schema, weights_file
from ..files.atomic import disk_errors
from ..files.errors import UserError
from ..files.model_files import ADAPTER_CONFIG, ADAPTERS
from ..files.ownership import new_folder
from ..files.schema import OneOf, Range
from ..files.weights_file import Damaged
from .lora import round_once
from .tensors import load_tensors, save_tensors

LORA_PARTS = ("lora_a", "lora_b")
LORA_LAYERS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding)


class LoraParameters(TypedDict):
    """What ADAPTER_CONFIG says of every adapter; `keys` is there when not all layers have one."""

    rank: Annotated[int, Range(1, 10**4)]
    scale: Annotated[float, Range(-model_folder.LARGEST_FACTOR, model_folder.LARGEST_FACTOR)]
    dropout: Annotated[float, Range(0, 1)]


class AdapterSettings(TypedDict):
    """What ADAPTER_CONFIG holds."""

    fine_tune_type: Annotated[str, OneOf(("lora",))]
    num_layers: Annotated[int, Range(1, 10**4)]
    lora_parameters: LoraParameters


def attach_lora(model: nn.Module, lora: LoraConfig) -> None:
    """Freeze the model and put LoRA beside its linear layers (Hu et al. 2021, arXiv:2106.09685).

    B starts at zero, so that the model answers as before: it is its own reference until trained.
    The model is left in evaluation mode.

    Raises UserError when no layer takes it.
    """
    model.freeze()
    try:
        linear_to_lora_layers(model, *_lora_arguments(model, lora))
    except ValueError as error:
        raise UserError(f"lora.keys: {lora.keys}: {error}; set null for all layers") from error
    round_once(model)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LORA_LAYERS)]
    unknown = [k for k in lora.keys or [] if not any(f".{a}".endswith(f".{k}") for a in adapted)]
    if unknown or not adapted:
        raise UserError(
            f"lora.keys: {unknown} names no linear layer of the blocks that take LoRA; write keys "
            "like self_attn.q_proj, or set null for all of them"
        )
    if outside := [name for name in adapted if ".layers." not in name]:
        raise UserError(f"lora.keys: {outside[0]} must stay frozen; name layers inside the blocks")
    model.eval()


def _lora_arguments(model: nn.Module, lora: LoraConfig) -> tuple[int, dict[str, Any]]:
    parameters: dict[str, Any] = {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout}
    if lora.keys is not None:
        parameters["keys"] = lora.keys
    return lora.num_layers or len(model.layers), parameters


def save_adapters(model: nn.Module, lora: LoraConfig, folder: Path) -> None:
    """The adapters in mlx-lm's format, which its own --adapter-path loads, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    num_layers, parameters = _lora_arguments(model, lora)
    save_tensors(folder / ADAPTERS, dict(tree_flatten(model.trainable_parameters())))
    settings = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    jsonl.write_json(folder / ADAPTER_CONFIG, settings)


def copy_adapters(source: Path, folder: Path) -> None:
    """The adapters of a checkpoint in the place of `folder`."""
    with new_folder(folder) as temporary, disk_errors(folder):
        for name in (ADAPTERS, ADAPTER_CONFIG):
            shutil.copy(source / name, temporary / name)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Take up adapters that `save_adapters` wrote of a model with the same LoRA settings.

    Raises UserError when the folder does not hold exactly those of this model.
    """
    expected = dict(tree_flatten(model.trainable_parameters()))
    weights = load_tensors(folder / ADAPTERS, expected)
    model.load_weights(list(weights.items()), strict=False)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, by a scale of 0: what it was before `attach_lora`."""
    layers = [module for module in model.modules() if isinstance(module, LORA_LAYERS)]
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of a model's LoRA adapters; 0 if it has none."""
    layers = [module for module in model.modules() if isinstance(module, LORA_LAYERS)]
    return sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in layers)


def check_adapters(folder: Path) -> None:
    """Raises UserError for adapters that are damaged."""
    try:
        weights, settings = folder / ADAPTERS, folder / ADAPTER_CONFIG
        if settings.exists():
            rank = _read_settings(settings)["lora_parameters"]["rank"]
        if weights.exists():
            model_folder.require_regular(weights)
            weights_file.require_finite(weights)
            if settings.exists():
                _require_pairs(weights, rank)
    except Damaged as fault:
        raise UserError(f"{fault}; move {folder} away and run 10_train_dpo.py again") from fault


def _read_settings(path: Path) -> AdapterSettings:
    """What an ADAPTER_CONFIG holds. Raises Damaged for what `save_adapters` does not write."""
    model_folder.require_regular(path, model_folder.SETTINGS_LIMIT)
    values = model_folder.read_object(path)
    try:
        settings: AdapterSettings = schema.parse(values, AdapterSettings)
        keys = values["lora_parameters"].get("keys")
        schema.parse(keys, list[str] | None, "lora_parameters.keys")
    except ValueError as error:
        raise Damaged(path, str(error)) from error
    return settings


def _require_pairs(path: Path, rank: int) -> None:
    """Raises Damaged unless the tensors are pairs of A and B of this rank."""
    tensors = weights_file.read_header(path)
    modules = {name.rpartition(".")[0] for name in tensors}
    expected = {f"{module}.{part}" for module in modules for part in LORA_PARTS}
    if not tensors or tensors.keys() != expected:
        raise Damaged(path, "its tensors are not pairs of lora_a and lora_b")
    for name, tensor in tensors.items():
        if tensor.dtype not in weights_file.EXPONENTS or rank not in tensor.shape[-2:]:
            raise Damaged(path, f"its tensor {name[:200]} is not an adapter of rank {rank}")


def require_all_adapters(model: nn.Module, folder: Path) -> None:
    """Raises Damaged unless the tensors are those that the settings beside them speak of: mlx-lm
    leaves an adapter without tensors at zero.
    """
    path = folder / ADAPTERS
    found = {name: tensor.shape for name, tensor in weights_file.read_header(path).items()}
    names = [name for name, module in model.named_modules() if isinstance(module, LORA_LAYERS)]
    parameters = dict(tree_flatten(model.parameters()))
    right = {f"{n}.{part}": parameters[f"{n}.{part}"].shape for n in names for part in LORA_PARTS}
    if wrong := sorted(n for n in {**found, **right} if found.get(n) != right.get(n)):
        raise Damaged(path, f"its tensor {wrong[0][:200]} is missing, or not of this model")
