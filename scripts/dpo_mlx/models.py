"""Loading, LoRA, adapters and saving: what the project asks of mlx-lm."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import (
    DEFAULT_ALLOW_PATTERNS,
    save_model,
    snapshot_download,
)

from . import device, jsonl, model_folder, scan, tokens, typed, weights_file
from .config import LoraConfig
from .durable import disk_errors
from .errors import UserError, doing
from .lora import round_once
from .model_files import ADAPTER_CONFIG, ADAPTERS, config_additions, folder_of, is_hub_name
from .ownership import new_folder
from .text import reason
from .typed import OneOf, Range
from .weights_file import Damaged

INDEX = "model.safetensors.index.json"  # of the weights, where they are in several files
QUANTIZATION = ("quantization", "quantization_config")  # keys of config.json
# Code that comes with a model is never run; left unsaid, the tokenizer's loader would ask for it.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
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


@dataclass
class LoadedModel:
    """A model, its tokenizer (mlx-lm's wrapper) and the folder it was read from."""

    model: nn.Module
    tokenizer: Any
    folder: Path


def load(
    name: str, adapters: Path | None = None, lazy: bool = False, scan_chunk: int | None = None
) -> LoadedModel:
    """Load a model from a folder or the hub, with adapters if given. A lazy model reads its weights
    when they are first used. Pass `train.scan_chunk`: results that are compared with training must
    come from the same scan.

    Raises UserError, with remedies, when the model cannot be loaded, is damaged, or its tokenizer
    belongs to another one.
    """
    device.release()
    device.bound()
    try:
        with doing("loading", name):
            return _load(name, adapters, lazy, scan_chunk)
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        if not tokens.is_fault(error):
            raise
        raise UserError(_why_not(name, adapters, error)) from error


def _load(name: str, adapters: Path | None, lazy: bool, scan_chunk: int | None) -> LoadedModel:
    folder = _fetch(name)
    model_folder.check(folder)
    model_folder.require_finite(folder)
    if adapters is not None:
        check_adapters(adapters)
    model, tokenizer, *_ = mlx_lm.load(
        str(folder),
        tokenizer_config=NO_CODE,
        model_config=config_additions(folder),
        adapter_path=None if adapters is None else str(adapters),
        lazy=lazy,
        **NO_CODE,
    )
    if adapters is not None:
        _require_all_adapters(model, adapters)
    round_once(model)
    scan.use_chunks(model, scan_chunk)
    tokens.check(model, tokenizer)
    model(mx.zeros((1, 2), dtype=mx.int32))  # fails when types or shapes do not fit; not computed
    return LoadedModel(model, tokenizer, folder)


def _why_not(name: str, adapters: Path | None, error: BaseException) -> str:
    cause = reason(error, 300)
    if "trust_remote_code" in str(error):
        return (
            f"model {name}: comes with Python code of its own, which is never run here; set model "
            "to one of mlx-lm's architectures"
        )
    if adapters is not None:
        return (
            f"{adapters}: does not fit model {name}: {cause}; set model to the one it was trained "
            "on, or move the folder away and run 10_train_dpo.py again"
        )
    if os.path.isdir(name):
        return f"model {name}: cannot be loaded: {cause}; set model to a complete model folder"
    if not is_hub_name(name):
        return f"model {name}: no such folder; set model to a model folder or a hub name owner/name"
    return (
        f"model {name}: cannot be fetched from the hub. Download it on another machine and set "
        "model to the folder; or check the name and log in with `hf auth login`; or try "
        f"config/smollm2-135m_demo.yaml, which needs no hub. ({cause})"
    )


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
        settings: AdapterSettings = typed.parse(values, AdapterSettings)
        keys = values["lora_parameters"].get("keys")
        typed.parse(keys, list[str] | None, "lora_parameters.keys")
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


def _require_all_adapters(model: nn.Module, folder: Path) -> None:
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


def _fetch(name: str) -> Path:
    """The local folder of a model, which is downloaded when it is not on this machine yet."""
    try:
        return folder_of(name)
    except (OSError, ValueError):
        snapshot_download(
            name, allow_patterns=DEFAULT_ALLOW_PATTERNS
        )  # the files that mlx-lm reads
        return folder_of(name)


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


def save_tensors(
    path: Path, tensors: dict[str, mx.array], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file; the same tensors are the same bytes, whatever order they come in."""
    with disk_errors(path):
        mx.save_safetensors(str(path), dict(sorted(tensors.items())), metadata)


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


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Take up adapters that `save_adapters` wrote of a model with the same LoRA settings.

    Raises UserError when the folder does not hold exactly those of this model.
    """
    expected = dict(tree_flatten(model.trainable_parameters()))
    weights = load_tensors(folder / ADAPTERS, expected)
    model.load_weights(list(weights.items()), strict=False)


def load_tensors(path: Path, expected: dict[str, mx.array]) -> dict[str, mx.array]:
    """What `save_tensors` wrote. Raises UserError for other names, shapes or types than
    `expected`.
    """
    try:
        model_folder.require_regular(path)
        weights_file.require_finite(path)
        tensors: Any = mx.load(str(path))
        mx.eval(tensors)  # now: the file may be written anew while they are in use
        found, right = (
            {name: (tensor.shape, tensor.dtype) for name, tensor in some.items()}
            for some in (tensors, expected)
        )
        if found != right:
            raise ValueError("its tensors are of another model or rank")
    except Damaged as fault:
        raise UserError(
            f"{fault}; move {path.parent} away and run 10_train_dpo.py again"
        ) from fault
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: cannot be used: {reason(error)}; move {path.parent} away and "
            "run 10_train_dpo.py again"
        ) from error
    return tensors


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree of parameters, loaded or not."""
    return sum(array.nbytes for array in dict(tree_flatten(tree)).values())


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of a model's LoRA adapters; 0 if it has none."""
    layers = [module for module in model.modules() if isinstance(module, LORA_LAYERS)]
    return sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in layers)


@contextmanager
def gradient_checkpointing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Recompute each block in the backward pass instead of keeping its activations.

    mlx-lm's `grad_checkpoint` replaces the blocks' class method for good; it is put back here.
    """
    kinds = {type(layer) for layer in model.layers}
    plain = {kind: kind.__call__ for kind in kinds}
    try:
        if enabled:
            for kind in kinds:
                grad_checkpoint(next(layer for layer in model.layers if type(layer) is kind))
        yield
    finally:
        for kind, call in plain.items():
            kind.__call__ = call


def save(
    model: nn.Module, source: Path, folder: Path, config: dict[str, Any] | None = None
) -> None:
    """Into `folder`, an ordinary model folder: these weights, and the other files of `source` as
    they stand, but for what `config_additions` adds, so that it runs as it was trained. `config` is
    what config.json says instead of the source's.

    mlx-lm's own `save` asks the hub for a model card, and writes the tokenizer anew.
    """
    config = jsonl.read_json(source / "config.json") if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    mx.eval(model.parameters())
    mx.synchronize()  # raises here if a GPU command failed, before anything is written
    with disk_errors(folder):
        copy_settings(source, folder, {**config, **config_additions(source)})
        save_model(folder, model)


def copy_settings(source: Path, folder: Path, config: dict[str, Any]) -> None:
    """The files of a model beside its weights, to the byte; config.json where it must say else.
    Other files of the folder stay where they are: copies of a model are uploaded.

    Raises UserError for a link that leads out of the model; see `model_folder.settings_files`.
    """
    for path in model_folder.settings_files(source):
        if path.name == "config.json":
            continue
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if config == jsonl.read_json(source / "config.json"):
        shutil.copyfile(source / "config.json", folder / "config.json")
    else:
        jsonl.write_json(folder / "config.json", config)


def config_for(config: dict[str, Any], dtype: mx.Dtype) -> dict[str, Any]:
    """What config.json says once the weights are plain ones of `dtype`."""
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION}
    return plain | {key: dtype_name(dtype) for key in ("torch_dtype", "dtype") if key in plain}


def dtype_name(dtype: mx.Dtype) -> str:
    """As config files write it: float32."""
    return str(dtype).rpartition(".")[2]
