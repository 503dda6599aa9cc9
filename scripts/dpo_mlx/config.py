"""The config of a run: one YAML file, `--set` overrides. Every fault is reported at once."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import reprlib
import types
import typing
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from .files import bounded, path_conflicts, strict_yaml
from .files.errors import UserError
from .files.path_conflicts import RunPaths
from .files.run_folder import PairFiles, RunFolder
from .files.text import shown

# losses.py and rounding.py implement these names. They are listed here so that loading a config
# does not import MLX.
LOSSES = (
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "simpo",
    "apo_zero",
    "apo_down",
    "dpop",
)
STOCHASTIC, NEAREST = ROUNDINGS = ("stochastic", "nearest")
DTYPES = ("bfloat16", "float16", "float32")
SCHEDULES = ("cosine", "constant")
REPORTERS = ("wandb", "swanlab")

NO_FULL_FINE_TUNING = (
    "only adapters are trained: full fine-tuning would need gigabytes for the weights and Adam's "
    "moments, and a second model as the reference; remove the key, and choose what the adapters "
    "change with lora.num_layers and lora.keys"
)
# The types of a chat template's arguments.
Scalar = str | int | float | bool
# tokenizer.apply_chat_template takes these arguments itself and does not pass them to the template.
RESERVED_ARGUMENTS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
)
# Limits in characters. A name is also a path; a text is a system message or a template's argument.
LONGEST_NAME, LONGEST_TEXT, LONGEST_KEY = 1000, 100_000, 100
# Bytes. Disks allow 255, and our temporary names are longer than the file's own.
LONGEST_FILE_NAME = 200
MAX_FAULTS = 20  # faults that one error lists
LARGEST_ARGUMENT = 2**53  # of a chat template
MIN_TEMPERATURE = 0.01  # log-probs divided by less overflow

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80

# Keys of other trainers, and what to use here instead.
REJECTED_KEYS = {
    "sft.replay": "replay now holds both phases; set train.replay",
    "lora.alpha": "mlx-lm has no alpha; set lora.scale, which is alpha / rank",
    "lora.lora_alpha": "mlx-lm has no alpha; set lora.scale, which is alpha / rank",
    "lora.use_dora": "DoRA also rescales the frozen weights, so the model without adapters would "
    "not be the reference; remove the key, and raise lora.rank if LoRA learns too little",
    **dict.fromkeys(
        ("fine_tune_type", "lora.fine_tune_type", "train.fine_tune_type"), NO_FULL_FINE_TUNING
    ),
}


def _number(default: Any = ..., *, low: float | None = None, high: float | None = None) -> Any:
    """A number within [low, high]. The bounds are wide: they catch typing errors that would end in
    an overflow or a run of years.
    """
    return _field(default, low=low, high=high)


def _choice(default: Any = ..., *, of: tuple[Any, ...]) -> Any:
    return _field(default, choices=of)


def _field(default: Any = ..., **metadata: Any) -> Any:
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def _path() -> Any:
    """A path; a leading `~` is the home folder."""
    return _field(is_path=True)


def _prompt() -> Any:
    """A text that may have several lines."""
    return _field("", longest=LONGEST_TEXT, blanks="\n\t")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: str = _path()
    skip_bad_rows: bool = False
    train_pairs: str = _path()
    valid_pairs: str = _path()
    limit: int | None = _number(None, low=1, high=10**7)
    valid_fraction: float = _number(0.1, low=0.0, high=0.9)
    max_length: int = _number(1024, low=8, high=2**20)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    temperature: float = _number(0.7, low=0.0, high=5.0)
    top_p: float = _number(0.95, low=0.01, high=1.0)
    max_tokens: int | None = _number(None, low=1, high=2**15)
    batch_size: int = _number(8, low=1, high=4096)
    restart: bool = False


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = _number(16, low=1, high=4096)
    scale: float = _number(20.0, low=0.0, high=1e4)
    dropout: float = _number(0.0, low=0.0, high=0.9)
    keys: list[str] | None = None
    num_layers: int | None = _number(None, low=1, high=10**4)


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    epochs: int = _number(3, low=0, high=1000)
    learning_rate: float = _number(1e-4, low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    loss: str = _choice("sigmoid", of=LOSSES)
    beta: float = _number(0.1, low=1e-6, high=1e4)
    label_smoothing: float = _number(0.0, low=0.0, high=0.499)
    nll_weight: float = _number(0.2, low=0.0, high=1e4)
    match_length: bool = True
    simpo_gamma: float = _number(1.0, low=0.0, high=1e4)
    dpop_lambda: float = _number(50.0, low=0.0, high=1e6)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    learning_rate: float = _number(low=0.0, high=1.0)
    epochs: int = _number(1, low=1, high=1000)
    batch_size: int = _number(1, low=1, high=10**5)
    grad_accumulation: int = _number(4, low=1, high=10**5)
    schedule: str = _choice("cosine", of=SCHEDULES)
    warmup_ratio: float = _number(0.1, low=0.0, high=1.0)
    weight_decay: float = _number(0.0, low=0.0, high=100.0)
    max_grad_norm: float = _number(1.0, low=1e-9, high=1e9)
    replay: int = _number(2, low=0, high=10**4)
    grad_checkpoint: bool = True
    scan_chunk: int | None = _number(64, low=1, high=4096)
    eval_every: int | None = _number(None, low=1, high=10**9)
    eval_questions: int = _number(16, low=1, high=10**6)
    save_every: int | None = _number(None, low=1, high=10**9)
    restart: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    enabled: bool = True
    max_distinct2_drop: float = _number(0.2, low=0.0, high=1.0)
    min_self_ended_ratio: float = _number(0.5, low=0.0, high=1.0)
    max_chosen_drop: float = _number(0.5, low=0.0, high=1e6)
    max_divergence: float = _number(0.5, low=0.0, high=1e6)


@dataclass(frozen=True, kw_only=True)
class FuseConfig:
    rounding: str = _choice(STOCHASTIC, of=ROUNDINGS)
    dtype: str | None = _choice(None, of=DTYPES)
    quantize: int | None = _choice(None, of=(4, 8))
    check_pairs: int = _number(8, low=1, high=10**6)
    min_margin_kept: float = _number(0.9, low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class SmokeConfig:
    questions: int = _number(16, low=1, high=10**6)
    unrelated_tasks: int | None = _number(None, low=2, high=10**6)
    max_distinct2_drop: float = _number(0.1, low=0.0, high=1.0)
    min_self_ended_ratio: float = _number(0.8, low=0.0, high=1.0)
    max_base_logprob_drop: float = _number(1.5, low=0.0, high=1e6)
    max_length_ratio: float = _number(3.0, low=1.0, high=1e6)
    min_sense_ratio: float = _number(0.3, low=-1e6, high=1.0)
    max_copied: float = _number(0.1, low=0.0, high=1.0)
    max_divergence: float = _number(0.5, low=0.0, high=1e6)
    min_instructions_ratio: float = _number(0.8, low=0.0, high=1.0)
    max_choices_drop: float = _number(0.1, low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run. The comments in config/*.yaml explain each key."""

    model: str = _path()
    run_dir: str = _path()
    data: DataConfig
    train: TrainConfig
    demo_model: bool = False
    seed: int = _number(0, low=0, high=2**32 - 1)
    system_prompt: str = _prompt()
    chat_template_args: dict[str, Scalar] = field(default_factory=dict)
    report_to: str = ""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)
    smoke: SmokeConfig = field(default_factory=SmokeConfig)

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.run_dir))

    @property
    def pairs(self) -> PairFiles:
        return PairFiles(Path(self.data.train_pairs), Path(self.data.valid_pairs))

    @property
    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key, as in `--set`."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                flat |= {f"{name}.{key}": item for key, item in value.items()}
            else:
                flat[name] = value
        return flat

    def paths(self, file: Path) -> RunPaths:
        """Every path in this config, which was read from `file`."""
        data = self.data
        return RunPaths(
            file,
            self.model,
            self.demo_model,
            self.run_dir,
            data.source,
            data.train_pairs,
            data.valid_pairs,
        )


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a config file. An override `section.key=value` replaces the file's value. A leading `~`
    in a path is the home folder.

    Raises UserError that lists every fault: unknown keys (with the closest real key), missing
    keys, wrong types, values out of range, keys that name the same file.
    """
    path = Path(os.path.expanduser(path))
    faults: list[str] = []
    values = _read_yaml(path)
    for override in overrides or []:
        _override(values, override, faults)
    config = _parse(values, faults)
    if config is not None:
        faults += path_conflicts.conflicts(config.paths(path))
    return _require_faultless(config, faults, shown(path))


def from_values(values: dict[str, Any]) -> Config:
    """Rebuild a config from the nested dict that `asdict` returned. Raises UserError for faults."""
    faults: list[str] = []
    return _require_faultless(_parse(values, faults), faults, "config")


def _parse(values: dict[str, Any], faults: list[str]) -> Config | None:
    """Build a config and append to `faults`. Returns None when a key or a value is wrong."""
    config = _build(Config, values, "", faults)
    if config is not None:
        faults += _contradictions(config)
    return config


def _require_faultless(config: Config | None, faults: list[str], name: str) -> Config:
    if faults or config is None:
        more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        lines = [f"{name}: {fault}" for fault in faults[:MAX_FAULTS] + more]
        raise UserError("\n".join(lines))
    return config


def dump(config: Config) -> str:
    """Return the config as YAML, with every key."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def digest(config: Config) -> str:
    """SHA-256 of all settings."""
    return hashlib.sha256(dump(config).encode()).hexdigest()


def keys(section: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key, in the order of the dataclasses."""
    hints = typing.get_type_hints(section)
    for f in fields(section):
        if is_dataclass(hints[f.name]):
            yield from keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}"


def _read_yaml(path: Path) -> dict[str, Any]:
    content = bounded.read(path, bounded.CONFIG_LIMIT, "give --config the path of a YAML file")
    try:
        values = strict_yaml.load(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)}: is not UTF-8 text; save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{shown(path)}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{shown(path)}: expected `key: value` lines, found {_kind(values)}")
    return values


def _override(values: dict[str, Any], override: str, faults: list[str]) -> None:
    """Put one `section.key=value` into the nested `values`."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted:
        faults.append(f"--set {shown(override)}: expected section.key=value")
        return
    *sections, name = dotted.split(".")
    node = values
    for section in sections:
        if node.get(section) is None:  # missing, or a section without keys
            node[section] = {}
        child = node[section]
        if not isinstance(child, dict):
            faults.append(f"--set {shown(override)}: {shown(section)} is not a section")
            return
        node = child
    try:
        # A text key takes its value literally: `--set model=123` names a folder.
        node[name] = text if _type_of_key(dotted) is str else strict_yaml.load(text)
    except ValueError as error:
        reason = str(error).removeprefix("line 1: ")
        faults.append(f"--set {shown(override)}: the value cannot be read as YAML: {reason}")


def _type_of_key(dotted: str) -> Any:
    """The annotated type of a dotted key, None for an unknown key."""
    kind: Any = Config
    for name in dotted.split("."):
        if not is_dataclass(kind):
            return None
        kind = typing.get_type_hints(kind).get(name)
    return kind


def _build(section: Any, values: Any, prefix: str, faults: list[str]) -> Any:
    """Build the dataclass `section`. Returns None after appending to `faults`."""
    if not isinstance(values, Mapping):
        faults.append(f"{prefix.rstrip('.')}: expected a section of keys, found {_kind(values)}")
        return None
    hints = typing.get_type_hints(section)
    fields_by_name = {f.name: f for f in fields(section)}
    earlier_faults = len(faults)
    for name in values:
        if name not in fields_by_name:
            faults.append(_unknown_key(f"{prefix}{name}"))
    arguments = {}
    for name, f in fields_by_name.items():
        dotted = f"{prefix}{name}"
        if is_dataclass(hints[name]):
            section_values = {} if values.get(name) is None else values[name]
            arguments[name] = _build(hints[name], section_values, f"{dotted}.", faults)
        elif _is_required(f) and values.get(name) in (None, ""):
            faults.append(f"{dotted}: is missing; this key is required")
        elif typing.get_origin(hints[name]) is dict:
            arguments[name] = _template_arguments(values.get(name), dotted, faults)
        elif name in values:
            arguments[name] = _value(values[name], hints[name], f.metadata, dotted, faults)
    return section(**arguments) if len(faults) == earlier_faults else None


def _template_arguments(values: Any, dotted: str, faults: list[str]) -> dict[str, Scalar]:
    """The chat template's arguments by name. Appends a fault for each wrong one."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        faults.append(
            f"{dotted}: expected names and values, like {{enable_thinking: false}}, found "
            f"{_kind(values)}"
        )
        return {}
    for name, value in values.items():
        if fault := _name_fault(name):
            faults.append(f"{dotted}: {fault}")
        elif fault := _argument_fault(name, value):
            faults.append(f"{dotted}.{name}: {fault}")
    return values


def _name_fault(name: Any) -> str | None:
    """Why a template argument cannot have this name."""
    if not (isinstance(name, str) and name.isidentifier()):
        return f"{_short(name)} is not a valid argument name; use letters, digits and _"
    if len(name) > LONGEST_KEY:
        return f"{shown(name)} is too long for a name; the limit is {LONGEST_KEY} characters"
    return None


def _argument_fault(name: str, value: Any) -> str | None:
    """Why a template argument cannot have this value."""
    if name in RESERVED_ARGUMENTS:
        return "this argument belongs to the tokenizer, not to the chat template; remove it"
    if not isinstance(value, Scalar) or (isinstance(value, float) and not math.isfinite(value)):
        return f"expected text, a number, true or false, found {_kind(value)}"
    if isinstance(value, str):
        return _text_fault(value, LONGEST_TEXT, "\n\t")
    if abs(value) > LARGEST_ARGUMENT:
        return f"{value} is too large; the maximum is {LARGEST_ARGUMENT}"
    return None


def _is_required(f: Any) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _unknown_key(dotted: str) -> str:
    if dotted in REJECTED_KEYS:
        return f"{dotted}: {REJECTED_KEYS[dotted]}"
    if len(dotted) > LONGEST_KEY:
        return f"{shown(dotted)}: unknown key; remove it"
    similar = difflib.get_close_matches(dotted, list(keys()), n=1, cutoff=0.5)
    remedy = f"did you mean {similar[0]}?" if similar else "remove it"
    return f"{shown(dotted)}: unknown key; {remedy}"


def _value(value: Any, hint: Any, rules: Mapping[str, Any], dotted: str, faults: list[str]) -> Any:
    """Convert `value` to its type and check it against the rules. Appends to `faults`."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in allowed:
        return None
    try:
        value = _coerce(value, allowed[0])
    except (TypeError, ValueError, OverflowError):
        faults.append(f"{dotted}: expected {_type_name(allowed[0])}, found {_kind(value)}")
        return None
    items = value if isinstance(value, list) else [value]
    for text in filter(lambda item: isinstance(item, str), items):
        if fault := _text_fault(text, rules.get("longest", LONGEST_NAME), rules.get("blanks", "")):
            faults.append(f"{dotted}: {fault}")
            return None
    low, high, choices = rules.get("low"), rules.get("high"), rules.get("choices")
    if low is not None and not value >= low:
        faults.append(f"{dotted}: {_short(value)} is too small; the minimum is {low}")
    if high is not None and not value <= high:
        faults.append(f"{dotted}: {_short(value)} is too large; the maximum is {high}")
    if choices and value not in choices:
        faults.append(f"{dotted}: {_short(value)} is not one of {', '.join(map(str, choices))}")
    return _expand_home(value, dotted, faults) if rules.get("is_path") else value


def _expand_home(path: str, dotted: str, faults: list[str]) -> str:
    """Replace a leading `~` by the home folder. Appends to `faults`."""
    full_path = os.path.expanduser(path)
    if full_path.startswith("~"):
        user = shown(path.partition("/")[0])
        faults.append(
            f"{dotted}: {user} is not a user's home folder; "
            f"write ./{user} if a folder has that name"
        )
    longest = max(len(name.encode()) for name in full_path.split("/"))
    if longest > LONGEST_FILE_NAME:
        faults.append(
            f"{dotted}: the path has a name of {longest} bytes; "
            f"use names of at most {LONGEST_FILE_NAME}"
        )
    return full_path


def _text_fault(text: str, longest: int, blanks: str) -> str | None:
    """Why a text cannot be used: it is too long, or has a control character not in `blanks`."""
    if len(text) > longest:
        return f"has {len(text)} characters; shorten it to at most {longest}"
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in blanks:
            return f"contains the control character {character!r}; remove it"
    return None


def _coerce(value: Any, kind: Any) -> Any:
    """Convert a YAML value to the type `kind`. Raises TypeError, ValueError or OverflowError."""
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        value = float(value)  # YAML 1.1 reads 1e-6 as a string
        if math.isfinite(value):
            return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [_coerce(item, typing.get_args(kind)[0]) for item in value]
    raise TypeError


def _contradictions(config: Config) -> Iterator[str]:
    """Yield faults of combinations of keys."""
    if config.lora.dropout > 0 and config.train.grad_checkpoint:
        yield (
            "lora.dropout: must be 0 with train.grad_checkpoint, because the recomputed forward "
            "pass would draw another dropout mask; turn one of the two off"
        )
    if 0 < config.generation.temperature < MIN_TEMPERATURE:
        yield (
            f"generation.temperature: {config.generation.temperature} is too small; set 0 for "
            f"greedy decoding, or at least {MIN_TEMPERATURE}"
        )
    for name in filter(None, (part.strip() for part in config.report_to.split(","))):
        if name.lower() not in REPORTERS:
            yield f"report_to: {_short(name)} is not one of {', '.join(REPORTERS)}"


def _type_name(kind: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, "a list of names")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {_short(value)}"


def _short(value: Any) -> str:
    """The `repr` of a value, shortened."""
    return shown(_REPR.repr(value))
