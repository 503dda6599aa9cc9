"""Save a model as an ordinary folder."""

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
QUANTIZATION = ("quantization", "quantization_config")  # keys of config.json


def save_model_folder(
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
