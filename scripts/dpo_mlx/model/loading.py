"""Loads a model and its tokenizer from a folder or the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, snapshot_download

from ..data import tokens
from ..files import model_folder
from ..files.errors import UserError, doing
from ..files.model_files import config_additions, folder_of, is_hub_name
from ..files.text import reason
from . import device, scan
from .adapters import check_adapters, require_all_adapters
from .lora import round_once

# The pipeline never runs code that comes with a model. Without this setting, the tokenizer's loader
# would ask the user whether to run it.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}


@dataclass
class LoadedModel:
    """A model, its tokenizer (mlx-lm's wrapper) and the folder it was read from."""

    model: nn.Module
    tokenizer: Any
    folder: Path


def load_model(
    name: str, adapters: Path | None = None, lazy: bool = False, scan_chunk: int | None = None
) -> LoadedModel:
    """Load a model from a folder or the hub, and optionally adapters.

    A lazy model reads each weight when it is first used. Pass `train.scan_chunk` if the results
    are compared with training: both must use the same scan.

    Raises UserError when the model cannot be loaded, is damaged, or has another model's tokenizer.
    """
    device.release()
    device.limit_memory()
    try:
        with doing("loading", name):
            return _load(name, adapters, lazy, scan_chunk)
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        if not tokens.is_fault(error):
            raise
        raise UserError(_explain(name, adapters, error)) from error


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
        require_all_adapters(model, adapters)
    round_once(model)
    scan.use_chunks(model, scan_chunk)
    tokens.check(model, tokenizer)
    model(mx.zeros((1, 2), dtype=mx.int32))  # checks types and shapes; computes nothing
    return LoadedModel(model, tokenizer, folder)


def _explain(name: str, adapters: Path | None, error: BaseException) -> str:
    """Why a model did not load, and what to do about it."""
    cause = reason(error, 300)
    if "trust_remote_code" in str(error):
        return (
            f"model {name}: needs the Python code that comes with it, and this pipeline never runs "
            "such code; set model to one whose architecture mlx-lm supports"
        )
    if adapters is not None:
        return (
            f"{adapters}: does not fit model {name}: {cause}; set model to the model that the "
            "adapters were trained on, or move the folder away and run 10_train_dpo.py again"
        )
    if os.path.isdir(name):
        return f"model {name}: cannot be loaded: {cause}; set model to a complete model folder"
    if not is_hub_name(name):
        return f"model {name}: no such folder; set model to a model folder or a hub name owner/name"
    return (
        f"model {name}: cannot be downloaded from the hub ({cause}). Check the name and log in "
        "with `hf auth login`; or download the model on another machine and set model to its "
        "folder; or try config/smollm2-135m_demo.yaml, which needs no hub"
    )


def _fetch(name: str) -> Path:
    """The local folder of a model. Downloads a hub model that is not on this machine yet."""
    try:
        return folder_of(name)
    except (OSError, ValueError):
        snapshot_download(name, allow_patterns=DEFAULT_ALLOW_PATTERNS)  # the files mlx-lm reads
        return folder_of(name)
