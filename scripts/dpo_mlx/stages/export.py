"""Stage 13: export the fused model for transformers and llama.cpp, or the adapters for PEFT."""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from ..export import hugging_face, peft
from ..files import fingerprint, jsonl
from ..files.errors import UserError
from ..files.fingerprint import EXPORT
from ..files.model_files import CARD, require_folder
from ..files.results import require_adapters


def export_model(config: Config) -> Path:
    """Write the fused model to `run_dir/hf`, and return that folder.

    Raises UserError without a fused model, for a quantised one, and for an architecture that we
    cannot export.
    """
    fused, folder = config.run.fused, config.run.hugging_face
    if not (fused / "config.json").is_file():
        raise UserError(f"{fused}: no fused model there; run 11_fuse_adapters.py first")
    stamp, current = config.run.stamp(EXPORT), fingerprint.of(EXPORT, config.flat)
    if fingerprint.is_current(stamp, current, [folder]):
        print(f"13: {folder} is up to date, skipped")
        return folder
    hugging_face.write(fused, require_folder(config.model), folder)
    jsonl.write_text(folder / CARD, (fused / CARD).read_text(encoding="utf-8"))
    fingerprint.write(stamp, current)
    print(f"13: {folder} is the fused model in Hugging Face's layout")
    return folder


def export_peft(config: Config) -> Path:
    """Write the adapters to `run_dir/peft`, and return that folder.

    Raises UserError without adapters, and for an architecture that we cannot export.
    """
    adapters, folder = require_adapters(config.run), config.run.peft
    peft.write(adapters, require_folder(config.model), config.model, folder)
    print(f"13: {folder} is a PEFT adapter of {config.model}")
    return folder
