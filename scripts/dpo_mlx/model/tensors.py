"""Saves tensors to a safetensors file, and loads them with checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from ..files import model_folder, weights_file
from ..files.atomic import disk_errors
from ..files.errors import UserError
from ..files.text import reason
from ..files.weights_file import Damaged


def save_tensors(
    path: Path, tensors: dict[str, mx.array], metadata: dict[str, str] | None = None
) -> None:
    """Save a safetensors file. The same tensors give the same bytes in any order."""
    with disk_errors(path):
        mx.save_safetensors(str(path), dict(sorted(tensors.items())), metadata)


def load_tensors(path: Path, expected: dict[str, mx.array]) -> dict[str, mx.array]:
    """Load the tensors that `save_tensors` saved.

    Raises UserError for a damaged file, or for other names, shapes or dtypes than `expected`.
    """
    try:
        model_folder.require_regular(path)
        weights_file.require_finite(path)
        tensors: Any = mx.load(str(path))
        mx.eval(tensors)  # now, because training may replace the file while they are in use
        if _types(tensors) != _types(expected):
            raise ValueError("its tensors belong to another model or rank")
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


def _types(tensors: dict[str, mx.array]) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
