"""LoRA adapters: attach, switch off, save, load and check them."""

from __future__ import annotations

import shlex
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
    """The LoRA settings in ADAPTER_CONFIG. `keys` is only there if it limits the layers."""

    rank: Annotated[int, Range(1, 10**4)]
    scale: Annotated[float, Range(-model_folder.LARGEST_FACTOR, model_folder.LARGEST_FACTOR)]
    dropout: Annotated[float, Range(0, 1)]


class AdapterSettings(TypedDict):
    """The content of ADAPTER_CONFIG."""

    fine_tune_type: Annotated[str, OneOf(("lora",))]
    num_layers: Annotated[int, Range(1, 10**4)]
    lora_parameters: LoraParameters


def attach_lora(model: nn.Module, lora: LoraConfig) -> None:
    """Freeze the model and add LoRA to its linear layers (Hu et al. 2021, arXiv:2106.09685).

    B starts at zero, so the model's answers do not change before training. Leaves the model in
    evaluation mode.

    Raises UserError when `lora.keys` names a layer that cannot have LoRA.
    """
    model.freeze()
    try:
        linear_to_lora_layers(model, *_lora_arguments(model, lora))
    except ValueError as error:
        raise UserError(
            f"lora.keys: {lora.keys}: {error}; set lora.keys: null for all layers"
        ) from error
    round_once(model)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LORA_LAYERS)]
    unknown = [k for k in lora.keys or [] if not any(f".{a}".endswith(f".{k}") for a in adapted)]
    if unknown or not adapted:
        raise UserError(
            f"lora.keys: {unknown}: none of the blocks with LoRA has a linear layer of this name; "
            "write keys like self_attn.q_proj, or set lora.keys: null for all layers"
        )
    if outside := [name for name in adapted if ".layers." not in name]:
        raise UserError(
            f"lora.keys: {outside[0]} must stay frozen; list only layers inside the blocks"
        )
    model.eval()


def chat_command(model: str, adapters: Path) -> str:
    """The command to chat with a model and its adapters, without fusing them."""
    options = ["--model", model, "--adapter-path", str(adapters), "--max-tokens", "1024"]
    return shlex.join([".venv/bin/mlx_lm.chat", *options])


def _lora_arguments(model: nn.Module, lora: LoraConfig) -> tuple[int, dict[str, Any]]:
    """(number of blocks, LoRA parameters) as mlx-lm takes them."""
    parameters: dict[str, Any] = {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout}
    if lora.keys is not None:
        parameters["keys"] = lora.keys
    return lora.num_layers or len(model.layers), parameters


def save_adapters(model: nn.Module, lora: LoraConfig, folder: Path) -> None:
    """Save the adapters into `folder` in mlx-lm's format, which its --adapter-path loads."""
    folder.mkdir(parents=True, exist_ok=True)
    num_layers, parameters = _lora_arguments(model, lora)
    save_tensors(folder / ADAPTERS, dict(tree_flatten(model.trainable_parameters())))
    settings = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    jsonl.write_json(folder / ADAPTER_CONFIG, settings)


def copy_adapters(source: Path, folder: Path) -> None:
    """Replace `folder` by a copy of a checkpoint's adapters."""
    with new_folder(folder) as temporary, disk_errors(folder):
        for name in (ADAPTERS, ADAPTER_CONFIG):
            shutil.copy(source / name, temporary / name)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Load adapters that `save_adapters` wrote into a model with the same LoRA settings.

    Raises UserError when the folder holds adapters of another model or other settings.
    """
    expected = dict(tree_flatten(model.trainable_parameters()))
    weights = load_tensors(folder / ADAPTERS, expected)
    model.load_weights(list(weights.items()), strict=False)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the context, all adapters have a scale of 0: the model is the base model."""
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
    """Bytes of a model's adapters; 0 if it has none."""
    layers = [module for module in model.modules() if isinstance(module, LORA_LAYERS)]
    return sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in layers)


def check_adapters(folder: Path) -> None:
    """Raises UserError when the adapters in `folder` are damaged."""
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
    """The settings in an ADAPTER_CONFIG. Raises Damaged if `save_adapters` did not write it so."""
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
    """Raises Damaged unless the tensors are pairs of A and B with this rank."""
    tensors = weights_file.read_header(path)
    modules = {name.rpartition(".")[0] for name in tensors}
    expected = {f"{module}.{part}" for module in modules for part in LORA_PARTS}
    if not tensors or tensors.keys() != expected:
        raise Damaged(path, "its tensors are not pairs of lora_a and lora_b")
    for name, tensor in tensors.items():
        if tensor.dtype not in weights_file.EXPONENTS or rank not in tensor.shape[-2:]:
            raise Damaged(path, f"its tensor {name[:200]} is not an adapter of rank {rank}")


def require_all_adapters(model: nn.Module, folder: Path) -> None:
    """Raises Damaged unless the file holds a tensor for each adapter of the model, and no other.

    mlx-lm would leave an adapter without tensors at zero and say nothing.
    """
    path = folder / ADAPTERS
    shapes = {name: tensor.shape for name, tensor in weights_file.read_header(path).items()}
    layers = [name for name, module in model.named_modules() if isinstance(module, LORA_LAYERS)]
    names = [f"{layer}.{part}" for layer in layers for part in LORA_PARTS]
    parameters = dict(tree_flatten(model.parameters()))
    expected = {name: parameters[name].shape for name in names}
    if wrong := sorted(n for n in {**shapes, **expected} if shapes.get(n) != expected.get(n)):
        raise Damaged(path, f"its tensor {wrong[0][:200]} is missing or does not fit this model")
