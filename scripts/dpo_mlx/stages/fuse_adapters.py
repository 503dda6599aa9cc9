"""Stage 11: fuse the adapters into the base model, and before how much of their effect is left."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.utils import get_total_parameters

from ..config import NEAREST, ROUNDINGS, STOCHASTIC, Config
from ..data import encoding, pairs
from ..data.encoding import EncodedPair, Encoder
from ..files import atomic, fingerprint, jsonl, ownership, results
from ..files.errors import UserError
from ..files.fingerprint import FUSING, TRAINING
from ..files.model_files import require_folder
from ..model import fusing
from ..model.adapters import adapters_off, chat_command
from ..model.loading import LoadedModel, load_model
from ..model.saving import config_for, dtype_name, save_model_folder
from ..parallel import worker
from ..report import card
from ..scoring import memory
from ..scoring.losses import Sides

# Below this margin, in nats, a kept share would only be rounding noise.
MIN_MARGIN = 1e-3

Report = dict[str, Any]


def fuse_adapters(config: Config) -> None:
    """Write `run_dir/fused`, and `run_dir/fuse.json` with what fusing changed.

    Raises UserError when the adapters are missing or belong to another model, and, after writing
    everything, when fusing kept less of their margin than `fuse.min_margin_kept`.
    """
    fused, report_path = config.run.fused, config.run.fuse_report
    adapters = results.require_adapters(config.run)
    require_folder(config.model)
    stamp, current = config.run.stamp(FUSING), fingerprint.of(FUSING, config.flat)
    if fingerprint.is_current(stamp, current, [fused, report_path]):
        print(f"11: {fused} is up to date, skipped")
        report: Report = {**results.read_fuse_report(config.run)}
    else:
        trained = fingerprint.read(config.run.stamp(TRAINING))
        if trained is not None and trained.get("model files") != current["model files"]:
            raise UserError(
                f"{adapters}: were trained on another version of {config.model}; set model to the "
                "model that they were trained on, or run 10_train_dpo.py again"
            )
        ownership.require_untouched(fused)
        report = _fuse(config)
        jsonl.write_json(report_path, report)
        training = asdict(results.read_outcome(config.run))
        card.write(config, fused, {"fuse": report, "training": training})
        fingerprint.write(stamp, current)
    _print(report)
    require_kept(report, config)


def _fuse(config: Config) -> Report:
    """Fuse and save the model. Returns how much of the margin each rounding and the folder keep."""
    settings, before = config.fuse, _measure_adapters(config)
    # Measure both roundings, unless nothing is rounded; save the configured one.
    others = {*ROUNDINGS} - {settings.rounding} if before.dtype != mx.float32 else set()
    by_rounding = {rounding: _measure_fused(config, rounding, before) for rounding in others}
    by_rounding[settings.rounding] = _measure_fused(config, settings.rounding, before, save=True)
    quantized_base = _quantized_base(config, before)
    return {
        "pairs": len(before.pairs),
        "dtype": dtype_name(before.dtype),
        "rounding": settings.rounding,
        "quantize": settings.quantize,
        **_measure_folder(config, before, quantized_base),
        "by_rounding": by_rounding,
    }


@dataclass(frozen=True)
class _BeforeFusing:
    """The pairs to compare models on, their log-probs before fusing, and the dtype to fuse into."""

    pairs: list[EncodedPair]
    base: Sides
    with_adapters: Sides
    dtype: mx.Dtype

    def compare(self, fused: LoadedModel, fused_base: Sides | None = None) -> Report:
        return compare(self.base, self.with_adapters, log_probs(fused, self.pairs), fused_base)


# One model is in memory at a time: each function below loads one and drops it when it returns.


def _measure_adapters(config: Config) -> _BeforeFusing:
    """Score the valid pairs with and without the adapters.

    Raises UserError when the disk or the memory is too small for fusing.
    """
    loaded = _load(config)
    encoder = Encoder.of(loaded.tokenizer, config)
    raw = pairs.read(config.pairs.valid)
    valid, _ = encoding.encode_all(raw, encoder, config.data.max_length)
    encoding.require_pairs(config.pairs.valid, valid)
    checked = valid[: config.fuse.check_pairs]
    dtype = fusing.target_dtype(loaded.model, config.fuse.dtype)
    _require_room(config, loaded, checked, dtype)
    with adapters_off(loaded.model):
        base = log_probs(loaded, checked)
    return _BeforeFusing(checked, base, log_probs(loaded, checked), dtype)


def _require_room(
    config: Config, loaded: LoadedModel, checked: list[EncodedPair], dtype: mx.Dtype
) -> None:
    """Raises UserError when the disk or the memory is too small for fusing."""
    size = get_total_parameters(loaded.model) * dtype.size
    atomic.require_space(config.run.path, size + atomic.SMALL_FILES, "run_dir")
    longest = max(encoding.sequences(checked), key=lambda sequence: len(sequence.ids))
    need = memory.require(memory.stage_11(loaded.model, config, longest), config.model)
    print(f"11: {memory.describe(need)}")


def _load(config: Config) -> LoadedModel:
    """The base model with the adapters."""
    return load_model(
        config.model, config.run.adapters, lazy=True, scan_chunk=config.train.scan_chunk
    )


def _measure_fused(
    config: Config, rounding: str, before: _BeforeFusing, save: bool = False
) -> Report:
    """How much of the margin fusing with a rounding keeps. `save` also writes the model."""
    loaded = _load(config)
    fusing.fuse(loaded.model, rounding, before.dtype, config.seed)
    if config.fuse.dtype:
        fusing.cast(loaded.model, before.dtype)
    report = before.compare(loaded)
    if save:
        _save(loaded, config, before.dtype)
    return report


def _save(loaded: LoadedModel, config: Config, dtype: mx.Dtype) -> None:
    """Write the fused model as an ordinary folder, quantised if fuse.quantize is set."""
    about = config_for(jsonl.read_json(loaded.folder / "config.json"), dtype)
    if bits := config.fuse.quantize:
        about = fusing.quantize(loaded.model, about, bits)
    with ownership.new_folder(config.run.fused) as temporary:
        save_model_folder(
            loaded.model, loaded.folder, temporary, about, _new_stop_ids(loaded, config)
        )


def _new_stop_ids(loaded: LoadedModel, config: Config) -> list[int] | None:
    """The stop tokens of the fused model. None if they are the base model's."""
    encoder = Encoder.of(loaded.tokenizer, config)
    return sorted(loaded.tokenizer.eos_token_ids) if encoder.is_new_stop else None


def _quantized_base(config: Config, before: _BeforeFusing) -> Sides | None:
    """Log-probs under the base model, quantised like the fused model. None without fuse.quantize.

    Quantising changes every log-prob far more than a short training does, and about as much in both
    models. So the fused model must be compared with a base model of the same bits.
    """
    if config.fuse.quantize is None:
        return None
    loaded = load_model(config.model, lazy=True, scan_chunk=config.train.scan_chunk)
    fusing.fuse(loaded.model, NEAREST, before.dtype)
    fusing.quantize(loaded.model, {}, config.fuse.quantize)
    return log_probs(loaded, before.pairs)


def _measure_folder(config: Config, before: _BeforeFusing, fused_base: Sides | None) -> Report:
    """How much of the margin the saved folder keeps."""
    fused = load_model(str(config.run.fused), lazy=True, scan_chunk=config.train.scan_chunk)
    return before.compare(fused, fused_base)


def compare(
    base: Sides, with_adapters: Sides, fused: Sides, fused_base: Sides | None = None
) -> Report:
    """What fusing changed, from log-probs [pairs] of both sides under three models.

    `margin_kept` is the fused model's mean margin divided by the adapters' mean margin. Both are in
    nats against the base model; the fused model's is against `fused_base` if that is given. It is
    None when the adapters have no margin. `max_logprob_difference` is in nats.
    """
    margin, margin_fused = _margin(with_adapters, base), _margin(fused, fused_base or base)
    kept_share = margin_fused / margin if abs(margin) > MIN_MARGIN else None
    differences = [float(mx.abs(f - a).max()) for f, a in zip(fused, with_adapters, strict=True)]
    return {
        "margin_adapters": margin,
        "margin_fused": margin_fused,
        "margin_kept": kept_share,
        "max_logprob_difference": max(differences),
    }


def _margin(pi: Sides, ref: Sides) -> float:
    return float(((pi.chosen - ref.chosen) - (pi.rejected - ref.rejected)).mean())


def log_probs(loaded: LoadedModel, encoded: list[EncodedPair]) -> Sides:
    """Log-probs [pairs] of both sides under the model's current weights, in nats.

    All activations are float32: in bfloat16 their rounding would hide the rounding of the weights.
    """
    with fusing.activations_in_float32(loaded.model):
        chosen, rejected = zip(*worker.log_probs(worker.Worker(loaded.model), encoded), strict=True)
    return Sides(mx.array(chosen), mx.array(rejected))


def _print(report: Report) -> None:
    print(
        f"11: with the adapters the margin on {report['pairs']} valid pairs is "
        f"{report['margin_adapters']:.3g} nats against the base model"
    )
    for rounding, result in report["by_rounding"].items():
        print(f"    fused in {report['dtype']}, {rounding} rounding: {_margin_line(result)}")
    weights = f"{report['quantize']}-bit" if report["quantize"] else report["dtype"]
    print(f"11: the saved model, fused/ ({weights}): {_margin_line(report)}")


def _margin_line(result: Report) -> str:
    share = result["margin_kept"]
    kept = "the adapters have no margin to keep" if share is None else f"{share:.1%} kept"
    return (
        f"margin {result['margin_fused']:.3g} nats, {kept}; log-probs changed by at most "
        f"{result['max_logprob_difference']:.2g} nats"
    )


def require_kept(report: Report, config: Config) -> None:
    """Raises UserError, with a remedy, when fusing kept less than fuse.min_margin_kept."""
    share, least = report["margin_kept"], config.fuse.min_margin_kept
    if share is None or share >= least:
        return
    if report["quantize"]:
        remedy = "set fuse.quantize: null"
    elif report["rounding"] != STOCHASTIC:
        remedy = "set fuse.rounding: stochastic, or fuse.dtype: float16"
    elif report["dtype"] == "bfloat16":
        remedy = "set fuse.dtype: float16"
    else:
        remedy = "train longer, or raise fuse.check_pairs"
    raise UserError(
        f"{config.run.fused}: fusing kept {share:.1%} of the adapters' margin, less than "
        f"fuse.min_margin_kept = {least:.0%}; {remedy}, or use the adapters without fusing: "
        f"{chat_command(config.model, config.run.adapters)}"
    )
