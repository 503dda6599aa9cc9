"""Where the files of a model are, and what tells one model from another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeGuard

from mlx_lm.utils import hf_repo_to_path, load_config

from . import digest, jsonl, model_folder
from .errors import UserError

# The adapters in mlx-lm's format, and their settings.
ADAPTERS, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"
CARD = "README.md"  # the model card
HASHED_WHOLE = 64 * 2**20  # bytes; of a larger file only slices are hashed


def is_hub_name(name: str) -> bool:
    """Whether a model's name has the form owner/name, and is not a path."""
    return name.count("/") == 1 and not name.startswith((".", "/"))


def config_additions(folder: Path) -> dict[str, Any]:
    """Settings that mlx-lm needs and a model's config.json lacks; empty for most models.

    Granite's Mamba blocks were trained with an unbounded time step, and transformers runs them
    so; without `time_step_limit` mlx-lm keeps the step above 0.001. Written as a finite number,
    as strict JSON has no infinity. A limit that the config itself sets is kept.

    transformers 5 writes `rope_theta` into `rope_parameters`, where mlx-lm's dense Granite does not
    look for it.
    """
    config = load_config(folder)
    kind, rope = config.get("model_type"), config.get("rope_parameters")
    if kind == "granitemoehybrid" and "time_step_limit" not in config:
        return {"time_step_limit": [0.0, 1e9]}
    if kind == "granite" and "rope_theta" not in config and _is_plain_rope(rope):
        return {"rope_theta": rope["rope_theta"]}
    return {}


def _is_plain_rope(parameters: Any) -> TypeGuard[dict[str, Any]]:
    """Whether these rotary positions are the usual ones, described by theta alone."""
    return (
        isinstance(parameters, dict)
        and "rope_theta" in parameters
        and parameters.get("rope_type", "default") == "default"
    )


def require_folder(name: str) -> Path:
    """The local folder of a model. Raises UserError when it is not on this machine (any more)."""
    try:
        return folder_of(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {name}: is not on this machine; put its folder back, or run 10_train_dpo.py, "
            "which downloads a hub's"
        ) from error


def folder_of(name: str) -> Path:
    """The local folder of a model. Raises OSError or ValueError when it is not on this machine."""
    return Path(name) if os.path.isdir(name) else hf_repo_to_path(name)


def fingerprint(name: str) -> dict[str, str] | None:
    """What tells one model from another, file by file, by content; None when it is not on this
    machine yet.

    Raises UserError for files that cannot be read without risk.
    """
    try:
        folder = folder_of(name)
    except (OSError, ValueError):
        return None
    files = [*model_folder.settings_files(folder), *model_folder.weights_files(folder)]
    marks = {
        path.relative_to(folder).as_posix(): digest.of_file(path, HASHED_WHOLE) for path in files
    }
    try:
        return {**marks, "config.json, added": jsonl.dumps(config_additions(folder))}
    except (OSError, ValueError, AttributeError):  # a config.json that is not an object
        return None


def weight_bytes(name: str) -> int:
    """Bytes of the weights of a model that is on this machine."""
    return sum(path.stat().st_size for path in require_folder(name).glob("*.safetensors"))
