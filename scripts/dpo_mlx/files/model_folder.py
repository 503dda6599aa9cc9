"""Checks the files of a model folder before MLX loads them.

Each file must be regular, limited in size and complete, and the weights finite. The numbers in
config.json must fit the weights, because MLX would build millions of layers or crash.
"""

from __future__ import annotations

import glob
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

from . import weights_file
from .errors import UserError
from .text import reason
from .weights_file import Damaged, Tensor

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
WEIGHTS = "model*.safetensors"  # the files that mlx-lm loads
# Files that can contain a vocabulary, so they can be large.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "*.tiktoken",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# JSON files that contain one object.
OBJECTS = (
    CONFIG,
    "generation_config.json",
    "hf_quant_config.json",
    TOKENIZER,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
TEMPLATES = ("chat_template.jinja", "chat_templates/*.jinja")
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
# All files of a model except its weights. We never read or copy other files, because users upload
# fused/ and hf/, and their private files must not end up there.
SETTINGS = (*OBJECTS, *TEMPLATES, *VOCABULARIES, *LICENCES)
# Also the other files that a tokenizer may read.
READABLE = (*SETTINGS, "*.json", "*.jinja", "*.model", "*.txt", WEIGHTS)

VOCABULARY_LIMIT = 256 * 2**20  # bytes; the largest today are about 35 MB
SETTINGS_LIMIT = 32 * 2**20
DEPTH_LIMIT = 32  # nesting in a settings file

# Keys of config.json that are sizes of tensors or factors of such sizes.
SIZES = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    *("intermediate_size", "shared_intermediate_size", "moe_intermediate_size", "ffn_hidden_size"),
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"),
    *("num_kv_heads", "n_kv_heads", "head_dim", "v_head_dim", "qk_nope_head_dim"),
    *("qk_rope_head_dim", "q_lora_rank", "kv_lora_rank"),
    *("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok"),
    *("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv"),
    *("mamba_expand", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "state_size"),
)
BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
POSITIVE = (*SIZES[:6], "num_attention_heads", "n_head", "n_heads", "num_heads", *BLOCKS)
# Keys of numbers in the model's equations. Larger values overflow a float32.
FACTORS = (
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    *("logit_scale", "rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *("norm_eps", "final_logit_softcapping"),
)
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-30, 1e15
NOT_WEIGHT_TYPES = ("BOOL", "I8", "I16", "I32", "I64", "C64")
# The most numbers that one packed integer of a quantised weight can hold: 32 of one bit.
MAX_PACKED = 32

REPLACE_MODEL = (
    "download the model again, run the stage that writes it again, or set model to another folder"
)


@contextmanager
def _with_remedy(remedy: str) -> Iterator[None]:
    """Turn Damaged into a UserError that ends in the remedy. Also a decorator."""
    try:
        yield
    except Damaged as fault:
        raise UserError(f"{fault}; {remedy}") from fault


@_with_remedy(REPLACE_MODEL)
def check(folder: Path) -> None:
    """Raises UserError unless the folder contains a complete model that is safe to load. Does not
    check that the weights are finite; see `require_finite`.
    """
    if glob.escape(str(folder)) != str(folder):
        raise UserError(
            f"{folder}: mlx-lm cannot load a model from a path with *, ? or [; rename the folder"
        )
    for path in _files(folder, READABLE):
        if not path.is_dir():  # settings_files refuses a directory with the name of a settings file
            require_regular(path)
    settings = {path.relative_to(folder).as_posix(): path for path in settings_files(folder)}
    if CONFIG not in settings:
        raise Damaged(folder / CONFIG, "no such file")
    objects = {name: read_object(settings[name]) for name in OBJECTS if name in settings}
    for name, path in settings.items():
        if name.endswith(".jinja"):
            _read_text(path)
    if TOKENIZER in objects:
        _check_template(objects[TOKENIZER].get("chat_template"), settings[TOKENIZER])
    _check_numbers(objects[CONFIG], _tensors(folder), settings[CONFIG])


@_with_remedy(f"the download or the conversion is damaged; {REPLACE_MODEL}")
def require_finite(folder: Path) -> None:
    """Raises UserError when the weights contain a NaN or an infinity."""
    for path in weights_files(folder):
        weights_file.require_finite(path)


@_with_remedy(REPLACE_MODEL)
def settings_files(folder: Path) -> list[Path]:
    """Returns the files of a model except its weights, sorted by name.

    Raises UserError for a file that is not regular, too large, or a link out of the folder.
    """
    files = sorted(_files(folder, SETTINGS))
    for path in files:
        is_vocabulary = any(fnmatchcase(path.name, pattern) for pattern in VOCABULARIES)
        require_regular(path, VOCABULARY_LIMIT if is_vocabulary else SETTINGS_LIMIT)
        _require_inside(path, folder)
    return files


@_with_remedy(REPLACE_MODEL)
def weights_files(folder: Path) -> list[Path]:
    """Returns the weight files that mlx-lm loads, sorted by name.

    Raises UserError for a file that is not regular.
    """
    files = sorted(_files(folder, (WEIGHTS,)))
    for path in files:
        require_regular(path)
    return files


def _files(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    for path in chain(folder.iterdir(), folder.glob("chat_templates/*")):
        name = path.relative_to(folder).as_posix()
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield path


def require_regular(path: Path, limit: int | None = None) -> None:
    """Raises Damaged unless the path is a regular file, or a link to one, of at most `limit` bytes.

    Does not open the file, because opening a pipe would wait forever.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise Damaged(path, f"cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise Damaged(path, f"is {kind}, not a file")
    if limit is not None and status.st_size > limit:
        raise Damaged(path, f"has {status.st_size} bytes; the limit is {limit}")


def _require_inside(path: Path, folder: Path) -> None:
    """Raises UserError for a link out of the folder, except in the hub's cache.

    We would copy the link's target into fused/ and hf/, which users upload. In the hub's cache,
    models--NAME/snapshots/REVISION/FILE is a link into models--NAME/blobs.
    """
    root, target = folder.resolve(), path.resolve()
    if target.is_relative_to(root):
        return
    cache = root.parent.parent
    in_hub = root.parent.name == "snapshots" and cache.name.startswith("models--")
    if not (in_hub and target.parent == cache / "blobs"):
        raise UserError(
            f"{path}: is a link to {target}, outside the model's folder, and would be copied into "
            "fused/ and hf/; replace the link with a copy of the file"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Damaged(path, f"not UTF-8 (byte {error.start + 1})") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises Damaged for anything else, and for too deep nesting."""
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"broken JSON ({reason(error, 100)})") from error
    if not isinstance(value, dict):
        raise Damaged(path, f"expected a JSON object, found {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(DEPTH_LIMIT):
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise Damaged(path, f"is nested more than {DEPTH_LIMIT} levels deep")
    return value


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_template(template: Any, path: Path) -> None:
    """Raises Damaged unless the chat template is a text, or a list of texts with names."""
    rows = template if isinstance(template, list) else []
    texts = [row.get(key) for row in rows if isinstance(row, dict) for key in ("name", "template")]
    is_list = len(texts) == 2 * len(rows) and all(isinstance(text, str) for text in texts)
    if not isinstance(template, str | None) and not (isinstance(template, list) and is_list):
        raise Damaged(path, "chat_template is neither a text nor a list of texts with names")


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Read the headers of all weight files. Raises Damaged when one or all are missing."""
    paths = weights_files(folder)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        header = weights_file.read_header(path)
        _require_types(header, path)
        tensors |= header
    if not tensors:
        raise Damaged(folder, f"contains no weights ({WEIGHTS})")
    names = {path.name for path in paths}
    for name in sorted(names):
        if missing := next((part for part in _all_parts(name) if part not in names), None):
            raise Damaged(folder / missing, "no such file, so the weights are incomplete")
    return tensors


def _require_types(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises Damaged for a weight that is neither floating point nor packed into unsigned integers
    (MLX's quantisation). Some layers would compute with it and give wrong numbers silently.
    """
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dtype in NOT_WEIGHT_TYPES:
            raise Damaged(
                path, f"tensor {name[:100]} has the type {tensor.dtype}; weights are floating point"
            )


def _all_parts(name: str) -> list[str]:
    """The names of all parts of a model, from one such as model-00001-of-00003.safetensors."""
    match = re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(\.safetensors)", name)
    if match is None:
        return [name]
    prefix, count, suffix = match.groups()
    return [f"{prefix}{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]


def _check_numbers(config: dict[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises Damaged for numbers that are impossible with these tensors.

    The upper bounds hold for every architecture: a block has at least one tensor, and no size is
    larger than MAX_PACKED times the largest dimension of a tensor.
    """
    dimension = max((size for tensor in tensors.values() for size in tensor.shape), default=1)
    limits = dict.fromkeys(SIZES, max(MAX_PACKED * dimension, len(tensors)))
    limits |= dict.fromkeys(BLOCKS, len(tensors))
    for section in (config, config.get("text_config")):
        if not isinstance(section, dict):
            continue
        for key, value in section.items():
            if key in limits:
                fault = _count_fault(key, value, limits[key])
            else:
                fault = _factor_fault(key, value) if key in FACTORS else None
            if fault:
                raise Damaged(path, f"{key} is {_short(value)}, {fault}")


def _count_fault(key: str, value: Any, limit: int) -> str | None:
    """Why a value cannot be a size or a number of blocks. A list has one value per layer."""
    for count in value if isinstance(value, list) else [value]:
        if count is None:
            continue
        if type(count) is not int:
            return "which is not a whole number"
        if count < (key in POSITIVE):
            return "which is too small"
        if count > limit:
            return f"but these weights allow at most {limit}"
    return None


def _factor_fault(key: str, value: Any) -> str | None:
    """Why a value cannot be a factor in float32 arithmetic."""
    if value is None and key not in FACTORS[:4]:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "which is not a number"
    minimum = 0 if key.endswith(("eps", "epsilon")) else SMALLEST_FACTOR
    return None if minimum <= value <= LARGEST_FACTOR else "outside the range that a model can use"


def _short(value: Any) -> str:
    """A value as short JSON."""
    is_huge = isinstance(value, int) and abs(value) >= 10**15
    return f"about 10^{len(str(abs(value))) - 1}" if is_huge else json.dumps(value)[:60]
