"""What each output depends on. A stage runs again when one of these files or config keys changes.

A fingerprint maps the name of each dependency ("dpo.beta", "train pairs") to the key's value or the
file's digest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import digest, jsonl, model_files, ownership, records, text_folder
from .model_files import ADAPTERS, CARD
from .run_folder import SPLITS, RunFolder
from .text import shown

Fingerprint = dict[str, Any]
Settings = Mapping[str, Any]  # every config value by its dotted key

# The names of the stages' stamps.
TRAINING, FUSING = "10_train_dpo", "11_fuse_adapters"
SMOKE_TEST, EXPORT = "12_smoke_test", "13_export_hf"
# Other outputs: the pairs and the sampled answers behind them, the references, the adapters of each
# phase, and the choice of the best checkpoint (BEST_CHECKPOINT).
PAIRS, SAMPLES = "pairs", "samples"
REFERENCE = {split: f"reference of {split}" for split in SPLITS}
SFT_ADAPTERS, DPO_ADAPTERS, BEST_CHECKPOINT = "SFT's adapters", "DPO's adapters", "best checkpoint"


@dataclass(frozen=True)
class Dependencies:
    """Names of FILES, and config keys ("dpo.*" is all keys of a section). `except_keys` have no
    effect on the output.
    """

    files: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    except_keys: tuple[str, ...] = ()


PROMPT = ("system_prompt", "chat_template_args.*")
DPO_KEYS = ("dpo.*", "train.learning_rate", "train.epochs")
EVAL_KEYS = ("train.eval_every", "train.eval_questions")
# These change neither the adapters nor the choice of the best checkpoint.
KEYS_WITHOUT_EFFECT = ("train.force", "train.restart", "train.save_every")
ADAPTER_FILES = ("train pairs", "valid pairs", "model files")
ADAPTER_KEYS = (*PROMPT, "data.max_length", "seed", "lora.*", "sft.*", "dpo.*", "train.*")
BEST_KEYS = ("guard.*", "generation.*", *EVAL_KEYS)
BEST_EXCEPT = ("generation.restart", "generation.batch_size")

TABLE = {
    PAIRS: Dependencies(
        ("source", "model files"),
        (
            *PROMPT,
            "seed",
            "data.limit",
            "data.valid_fraction",
            "data.max_length",
            "generation.*",
        ),
        ("generation.restart",),
    ),
    SAMPLES: Dependencies(
        ("model files",), (*PROMPT, "seed", "generation.*"), ("generation.restart",)
    ),
    **{
        REFERENCE[split]: Dependencies(
            (f"{split} pairs", "model files"), (*PROMPT, "data.max_length", "train.scan_chunk")
        )
        for split in SPLITS
    },
    SFT_ADAPTERS: Dependencies(
        ADAPTER_FILES, ADAPTER_KEYS, (*KEYS_WITHOUT_EFFECT, *EVAL_KEYS, *DPO_KEYS)
    ),
    DPO_ADAPTERS: Dependencies(ADAPTER_FILES, ADAPTER_KEYS, (*KEYS_WITHOUT_EFFECT, *EVAL_KEYS)),
    BEST_CHECKPOINT: Dependencies((), BEST_KEYS, BEST_EXCEPT),
    TRAINING: Dependencies(
        ADAPTER_FILES, (*ADAPTER_KEYS, *BEST_KEYS), (*KEYS_WITHOUT_EFFECT, *BEST_EXCEPT)
    ),
    FUSING: Dependencies(
        ("adapters", "model files", "valid pairs"),
        (*PROMPT, "seed", "data.max_length", "fuse.*"),
        ("fuse.min_margin_kept",),
    ),
    SMOKE_TEST: Dependencies(
        ("fused", "model files", "train pairs", "valid pairs", "metrics", "outcome"),
        (
            *PROMPT,
            "seed",
            "data.max_length",
            "generation.*",
            "smoke.*",
            "dpo.*",
        ),
        ("generation.restart",),
    ),
    EXPORT: Dependencies(("fused", "model files", "card")),
}

FILES: dict[str, Callable[[Settings], Any]] = {
    "source": lambda settings: _digest(Path(settings["data.source"])),
    "model files": lambda settings: model_files.fingerprint(settings["model"]),
    "train pairs": lambda settings: _digest(Path(settings["data.train_pairs"])),
    "valid pairs": lambda settings: _digest(Path(settings["data.valid_pairs"])),
    "adapters": lambda settings: _digest(_run(settings).adapters / ADAPTERS),
    "metrics": lambda settings: _digest(_run(settings).metrics),
    "outcome": lambda settings: _digest(_run(settings).outcome),
    "fused": lambda settings: model_files.fingerprint(str(_run(settings).fused)),
    "card": lambda settings: _digest(_run(settings).fused / CARD),
}


def _run(settings: Settings) -> RunFolder:
    return RunFolder(Path(settings["run_dir"]))


def of(output: str, settings: Settings, digests: Fingerprint | None = None) -> Fingerprint:
    """Compute the fingerprint of an output of TABLE from the current files and settings.

    `settings` are those of `Config.flat`. Files whose digests are in `digests`, an earlier
    fingerprint, are not read again.
    """
    dependencies, digests = TABLE[output], digests or {}
    files = {
        name: digests[name] if name in digests else FILES[name](settings)
        for name in dependencies.files
    }
    return {**files, **{key: settings[key] for key in settings if depends(output, key)}}


def depends(output: str, key: str) -> bool:
    """Whether an output of TABLE depends on a config key."""
    dependencies = TABLE[output]
    return _matches(key, dependencies.keys) and not _matches(key, dependencies.except_keys)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, or of a folder of text files. None when it does not exist."""
    if path.is_dir():
        return text_folder.digest_of(path)
    return digest.of_file(path) if path.is_file() else None


def read(path: Path) -> Fingerprint | None:
    """Read a stored fingerprint. None if there is none. Raises UserError when it is damaged or not
    ours.
    """
    return records.read_if_exists(path, Fingerprint)


def write(path: Path, fingerprint: Fingerprint) -> None:
    jsonl.write_json(path, fingerprint)


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """List the differences: `name: old -> new` for short values, only the name for long ones."""
    new = json.loads(json.dumps(new))  # tuples become lists, as in a file
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [_difference(name, old.get(name), new.get(name)) for name in names]


def is_current(path: Path, fingerprint: Fingerprint, outputs: list[Path]) -> bool:
    """Whether the fingerprint stored at `path` is the same, and every output is still complete."""
    old = read(path)
    return old is not None and not differences(old, fingerprint) and all(map(_exists, outputs))


def _exists(output: Path) -> bool:
    return ownership.is_complete(output) if output.is_dir() else output.exists()


def _difference(name: str, old: Any, new: Any) -> str:
    if any(isinstance(value, dict | list) or len(str(value)) > 60 for value in (old, new)):
        return shown(name)
    return shown(f"{name}: {old} -> {new}")
