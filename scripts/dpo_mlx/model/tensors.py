"""Tensors in a safetensors file: written the same way every time, checked when they are read."""

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
    """A safetensors file; the same tensors are the same bytes, whatever order they come in."""
    with disk_errors(path):
        mx.save_safetensors(str(path), dict(sorted(tensors.items())), metadata)


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
