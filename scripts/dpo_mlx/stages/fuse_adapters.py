"""Stage 11: adapters into the base weights, and a check that the fused model is the same model."""

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
from ..model import device, fusing
from ..model.adapters import adapters_off
from ..model.loading import LoadedModel, load_model
from ..model.saving import config_for, dtype_name, save_model_folder
from ..parallel import worker
from ..report import card
from ..scoring import memory
from ..scoring.losses import Sides

# A margin smaller than this, in nats, is no margin that a share of could be kept.
LEAST_MARGIN = 1e-3

Report = dict[str, Any]


def fuse_adapters(config: Config) -> None:
    """Write `run_dir/fused` and what fusing changed, `run_dir/fuse.json`.

    Raises UserError when the adapters are missing or belong to another model, and, with all
    written, when less of their margin is kept than `fuse.min_margin_kept`.
    """
    fused, report_path = config.run.fused, config.run.fuse_report
    adapters = results.require_adapters(config.run)
    require_folder(config.model)
    stamp, current = config.run.stamp(FUSING), fingerprint.of(FUSING, config)
    if fingerprint.is_current(stamp, current, [fused, report_path]):
        print(f"11: {fused} is up to date, skipped")
        report: Report = {**results.read_fuse_report(config.run)}
    else:
        trained = fingerprint.read(config.run.stamp(TRAINING))
        if trained is not None and trained.get("model files") != current["model files"]:
            raise UserError(
                f"{adapters}: were not trained on {config.model} as it is now; set model to the "
                "one they were trained on, or run 10_train_dpo.py again"
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
    """Fuse and save; how much of the adapters' margin each rounding, and the folder, keeps."""
    settings, measure = config.fuse, _measure_adapters(config)
    # Measure both roundings, unless nothing is rounded; save the configured one.
    others = [how for how in ROUNDINGS if how != settings.rounding and measure.dtype != mx.float32]
    by_rounding = {how: _measure_fused(config, how, measure) for how in others}
    by_rounding[settings.rounding] = _measure_fused(config, settings.rounding, measure, save=True)
    quantized_base = _quantized_base(config, measure)
    return {
        "pairs": len(measure.pairs),
        "dtype": dtype_name(measure.dtype),
        "rounding": settings.rounding,
        "quantize": settings.quantize,
        **_measure_written(config, measure, quantized_base),
        "by_rounding": by_rounding,
    }


@dataclass(frozen=True)
class _Measure:
    """The pairs that models are compared on, their log-probs before anything is fused, and the
    dtype to fuse into.
    """

    pairs: list[EncodedPair]
    base: Sides
    with_adapters: Sides
    dtype: mx.Dtype

    def of(self, fused: LoadedModel, fused_base: Sides | None = None) -> Report:
        return compare(self.base, self.with_adapters, log_probs(fused, self.pairs), fused_base)


# One model is in memory at a time: each function below loads one and drops it when it returns.


def _measure_adapters(config: Config) -> _Measure:
    """Score the valid pairs with and without the adapters.

    Raises UserError when disk or memory are too small for fusing.
    """
    loaded = _load(config)
    encoder = Encoder.of(loaded.tokenizer, config)
    read = pairs.read(config.pairs.valid)
    valid, _ = encoding.encode_all(read, encoder, config.data.max_length)
    encoding.require_pairs(config.pairs.valid, valid)
    checked = valid[: config.fuse.check_pairs]
    dtype = fusing.target_dtype(loaded.model, config.fuse.dtype)
    _require_room(config, loaded, checked, dtype)
    with adapters_off(loaded.model):
        base = log_probs(loaded, checked)
    return _Measure(checked, base, log_probs(loaded, checked), dtype)


def _require_room(
    config: Config, loaded: LoadedModel, checked: list[EncodedPair], dtype: mx.Dtype
) -> None:
    size = get_total_parameters(loaded.model) * dtype.size
    atomic.require_space(config.run.path, size + atomic.SMALL_FILES, "run_dir")
    longest = max(encoding.sequences(checked), key=lambda sequence: len(sequence.ids))
    need = memory.require(memory.stage_11(loaded.model, config, longest), config.model)
    print(f"11: peak memory {need}; {device.available() / 1e9:.2f} GB available")


def _load(config: Config) -> LoadedModel:
    """The base model with the adapters."""
    return load_model(
        config.model, config.run.adapters, lazy=True, scan_chunk=config.train.scan_chunk
    )


def _measure_fused(config: Config, how: str, measure: _Measure, save: bool = False) -> Report:
    """How much of the margin fusing with this rounding keeps; `save` also writes the model."""
    loaded = _load(config)
    fusing.fuse(loaded.model, how, measure.dtype, config.seed)
    if config.fuse.dtype:
        fusing.cast(loaded.model, measure.dtype)
    report = measure.of(loaded)
    if save:
        _save(loaded, config, measure.dtype)
    return report


def _save(loaded: LoadedModel, config: Config, dtype: mx.Dtype) -> None:
    """Write the fused model as an ordinary folder, quantised if fuse.quantize is set."""
    about = config_for(jsonl.read_json(loaded.folder / "config.json"), dtype)
    if bits := config.fuse.quantize:
        about = fusing.quantize(loaded.model, about, bits)
    with ownership.new_folder(config.run.fused) as temporary:
        save_model_folder(loaded.model, loaded.folder, temporary, about)


def _quantized_base(config: Config, measure: _Measure) -> Sides | None:
    """Log-probs under the base model, quantised like the fused one; None without fuse.quantize.

    Quantising changes every log-prob by far more than a short training does, and by about the same
    in both models. So the fused model must be compared with a base model of the same bits.
    """
    if config.fuse.quantize is None:
        return None
    loaded = load_model(config.model, lazy=True, scan_chunk=config.train.scan_chunk)
    fusing.fuse(loaded.model, NEAREST, measure.dtype)
    fusing.quantize(loaded.model, {}, config.fuse.quantize)
    return log_probs(loaded, measure.pairs)


def _measure_written(config: Config, measure: _Measure, fused_base: Sides | None) -> Report:
    """How much of the margin the saved folder keeps."""
    fused = load_model(str(config.run.fused), lazy=True, scan_chunk=config.train.scan_chunk)
    return measure.of(fused, fused_base)


def compare(
    base: Sides, with_adapters: Sides, fused: Sides, fused_base: Sides | None = None
) -> Report:
    """What fusing changed, from log-probs [pairs] of both sides under three models.

    `margin_kept` is the fused model's mean margin over the adapters', both in nats against the
    base model (the fused one's against `fused_base` where that is given); None when the adapters
    have none. `max_logprob_difference` is in nats.
    """
    margin, margin_fused = _margin(with_adapters, base), _margin(fused, fused_base or base)
    kept = margin_fused / margin if abs(margin) > LEAST_MARGIN else None
    differences = [float(mx.abs(f - a).max()) for f, a in zip(fused, with_adapters, strict=True)]
    return {
        "margin_adapters": margin,
        "margin_fused": margin_fused,
        "margin_kept": kept,
        "max_logprob_difference": max(differences),
    }


def _margin(pi: Sides, ref: Sides) -> float:
    return float(((pi.chosen - ref.chosen) - (pi.rejected - ref.rejected)).mean())


def log_probs(loaded: LoadedModel, encoded: list[EncodedPair]) -> Sides:
    """Log-probs [pairs] of both sides under the weights as they are, in nats.

    In float32 throughout: in bfloat16 the rounding of what flows through the model would hide
    that of its weights.
    """
    with fusing.activations_in_float32(loaded.model):
        chosen, rejected = zip(*worker.log_probs(worker.Worker(loaded.model), encoded), strict=True)
    return Sides(mx.array(chosen), mx.array(rejected))


def _print(report: Report) -> None:
    print(
        f"11: margin on {report['pairs']} valid pairs: {report['margin_adapters']:.3g} nats with "
        "adapters, against the base model"
    )
    for how, found in report["by_rounding"].items():
        print(f"    fused in {report['dtype']}, {how} rounding: {_said(found)}")
    kind = f"{report['quantize']}-bit" if report["quantize"] else report["dtype"]
    print(f"11: fused/ ({kind}): {_said(report)}")


def _said(found: Report) -> str:
    kept = found["margin_kept"]
    share = "no margin to keep" if kept is None else f"{kept:.1%} kept"
    return (
        f"margin {found['margin_fused']:.3g}, {share}, largest log-prob difference "
        f"{found['max_logprob_difference']:.2g} nats"
    )


def require_kept(report: Report, config: Config) -> None:
    """Raises UserError, with a remedy, when fusing kept less than fuse.min_margin_kept."""
    kept, least = report["margin_kept"], config.fuse.min_margin_kept
    if kept is None or kept >= least:
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
        f"{config.run.fused}: keeps {kept:.1%} of the adapters' margin, but "
        f"fuse.min_margin_kept asks for {least:.0%}; {remedy}, or use the adapters as they "
        f"are (--adapter-path {config.run.adapters})"
    )
