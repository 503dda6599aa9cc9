"""Finds the files of a model, and computes a model's fingerprint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeGuard

from mlx_lm.utils import hf_repo_to_path, load_config

from . import digest, jsonl, model_folder
from .errors import UserError

# Adapters in mlx-lm's format, and their settings.
ADAPTERS, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"
CARD = "README.md"  # the model card
WHOLE_BYTES = 64 * 2**20  # larger files are hashed in slices


def is_hub_name(name: str) -> bool:
    """Whether a model's name has the form owner/name and is not a path."""
    return name.count("/") == 1 and not name.startswith((".", "/"))


def config_additions(folder: Path) -> dict[str, Any]:
    """Returns settings that mlx-lm needs but the model's config.json lacks. Empty for most models.

    Granite's Mamba blocks were trained with an unbounded time step, and transformers runs them like
    that. Without `time_step_limit`, mlx-lm keeps the step above 0.001. The upper limit is a finite
    number because strict JSON has no infinity. A limit in config.json takes precedence.

    transformers 5 writes `rope_theta` into `rope_parameters`, where mlx-lm's dense Granite does not
    read it.
    """
    config = load_config(folder)
    kind, rope = config.get("model_type"), config.get("rope_parameters")
    if kind == "granitemoehybrid" and "time_step_limit" not in config:
        return {"time_step_limit": [0.0, 1e9]}
    if kind == "granite" and "rope_theta" not in config and _is_plain_rope(rope):
        return {"rope_theta": rope["rope_theta"]}
    return {}


def _is_plain_rope(parameters: Any) -> TypeGuard[dict[str, Any]]:
    """Whether the rotary embedding is the default one, which has only theta as a parameter."""
    return (
        isinstance(parameters, dict)
        and "rope_theta" in parameters
        and parameters.get("rope_type", "default") == "default"
    )


def require_folder(name: str) -> Path:
    """Returns a model's local folder. Raises UserError if it is not on this machine (any more)."""
    try:
        return folder_of(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {name}: is not on this machine; put its folder back, or run 10_train_dpo.py, "
            "which downloads a model of the hub"
        ) from error


def folder_of(name: str) -> Path:
    """Returns a model's local folder. Raises OSError or ValueError if it is not on this machine."""
    return Path(name) if os.path.isdir(name) else hf_repo_to_path(name)


def fingerprint(name: str) -> dict[str, str] | None:
    """Returns the digest of each file of a model. None when the model is not on this machine yet.

    Raises UserError for files that are not safe to read.
    """
    try:
        folder = folder_of(name)
    except (OSError, ValueError):
        return None
    files = [*model_folder.settings_files(folder), *model_folder.weights_files(folder)]
    digests = {
        path.relative_to(folder).as_posix(): digest.of_file(path, WHOLE_BYTES) for path in files
    }
    try:
        return {**digests, "config.json, added": jsonl.dumps(config_additions(folder))}
    except (OSError, ValueError, AttributeError):  # config.json is not an object
        return None


def weight_bytes(name: str) -> int:
    """Bytes of a local model's weights."""
    return sum(path.stat().st_size for path in require_folder(name).glob("*.safetensors"))
