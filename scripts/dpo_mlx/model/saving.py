"""Saves a model as an ordinary model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import save_model

from ..files import jsonl, model_folder
from ..files.atomic import disk_errors
from ..files.model_files import config_additions

INDEX = "model.safetensors.index.json"  # lists the files of weights when there are several
GENERATION_CONFIG = "generation_config.json"  # its eos_token_id takes precedence
StopIds = int | list[int]  # the types of eos_token_id
QUANTIZATION = ("quantization", "quantization_config")  # keys in config.json


def save_model_folder(
    model: nn.Module,
    source: Path,
    folder: Path,
    config: dict[str, Any] | None = None,
    stop_ids: StopIds | None = None,
) -> None:
    """Save the model's weights to `folder`, with copies of the other files of `source`.

    config.json comes from `config` if given, else from `source`. Generation stops at `stop_ids` if
    given. `config_additions` make the model run as it was trained. We do not use mlx-lm's `save`,
    because it asks the hub for a model card and rewrites the tokenizer.
    """
    config = jsonl.read_json(source / "config.json") if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    mx.eval(model.parameters())
    mx.synchronize()  # raises here if a GPU command failed, before the first file is written
    with disk_errors(folder):
        copy_model_files(source, folder, {**config, **config_additions(source)}, stop_ids)
        save_model(folder, model)


def copy_model_files(
    source: Path, folder: Path, config: dict[str, Any], stop_ids: StopIds | None = None
) -> None:
    """Copy a model's files other than its weights, byte by byte. config.json becomes `config`.

    `stop_ids`, if given, become eos_token_id in config.json and generation_config.json.

    Copies only files that belong to a model, because users upload the copy. Raises UserError for a
    link that leads out of the model's folder; see `model_folder.settings_files`.
    """
    new_keys = {} if stop_ids is None else {"eos_token_id": stop_ids}
    config = {**config, **new_keys}
    for path in model_folder.settings_files(source):
        if path.name == "config.json":
            continue
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        if new_keys and copy == folder / GENERATION_CONFIG:
            jsonl.write_json(copy, {**jsonl.read_json(path), **new_keys})
        else:
            shutil.copyfile(path, copy)
    if config == jsonl.read_json(source / "config.json"):
        shutil.copyfile(source / "config.json", folder / "config.json")
    else:
        jsonl.write_json(folder / "config.json", config)


def config_for(config: dict[str, Any], dtype: mx.Dtype) -> dict[str, Any]:
    """config.json for weights of `dtype` without quantisation."""
    unquantised = {key: value for key, value in config.items() if key not in QUANTIZATION}
    dtype_keys = [key for key in ("torch_dtype", "dtype") if key in unquantised]
    return unquantised | dict.fromkeys(dtype_keys, dtype_name(dtype))


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of a dtype in config files, such as "float32"."""
    return str(dtype).rpartition(".")[2]
