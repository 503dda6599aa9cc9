"""Stage 11: adapters into the base weights, and a check that the fused model is the same model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from . import card, durable, fusing, jsonl, models, pairs, stamp, worker
from .config import Config
from .errors import UserError
from .job import VALID, pair_file, require_valid
from .losses import Sides
from .pairs import EncodedPair, Encoder
from .rounding import NEAREST, ROUNDINGS

# A margin smaller than this, in nats, is no margin that a share of could be kept.
LEAST_MARGIN = 1e-3

Report = dict[str, Any]


def fuse_adapters(config: Config) -> None:
    """Write `run_dir/fused` and what fusing changed, `run_dir/fuse.json`.

    Raises UserError when the adapters are missing or belong to another model, and, with all
    written, when less of their margin is kept than `fuse.min_margin_kept`.
    """
    adapters, fused, report_path = (config.run / n for n in ("adapters", "fused", "fuse.json"))
    if not (adapters / models.ADAPTERS).is_file():
        raise UserError(f"{adapters}: no adapters there; run 10_train_dpo.py first")
    stamp_path, inputs = stamp.path(config.run, "11_fuse_adapters"), _inputs(config)
    if stamp.is_current(stamp_path, inputs, [fused, report_path]):
        print(f"11: {fused} is up to date, skipped")
        report = jsonl.read_json(report_path)
    else:
        trained = stamp.read(stamp.path(config.run, "10_train_dpo"))
        if trained is not None and trained.get("model files") != inputs["model files"]:
            raise UserError(
                f"{adapters}: were not trained on {config.model} as it is now; set model to the "
                "one they were trained on, or run 10_train_dpo.py again"
            )
        durable.refuse_foreign(fused)
        report = _fuse(config)
        jsonl.write_json(report_path, report)
        card.write(config, fused, {"fuse": report})
        stamp.write(stamp_path, inputs)
    _print(report)
    require_kept(report, config)


def _fuse(config: Config) -> Report:
    """Fuse and save; how much of the adapters' margin each rounding, and the folder, keeps."""
    settings, loaded = config.fuse, models.load(config.model, config.run / "adapters")
    size = models.weights_size(loaded.folder)
    durable.require_space(config.run, size + durable.SMALL_FILES, "run_dir")
    measure = _measure_of(config, loaded)
    dtype = getattr(mx, settings.dtype) if settings.dtype else fusing.dtype_of(loaded.model)
    # Both roundings where there is something to round; the one that is asked for is saved.
    others = [how for how in ROUNDINGS if how != settings.rounding and dtype != mx.float32]
    by_rounding = {}
    for how in (*others, settings.rounding):
        del loaded  # one model in memory at a time
        mx.clear_cache()
        loaded = _fused(config, how, dtype)
        by_rounding[how] = measure.of(loaded)
    _save(loaded, config, dtype)
    del loaded
    mx.clear_cache()
    same_bits = _quantized_base(config, dtype, measure.pairs)
    written = measure.of(models.load(str(config.run / "fused")), same_bits)
    return {
        "pairs": len(measure.pairs),
        "dtype": models.dtype_name(dtype),
        "rounding": settings.rounding,
        "quantize": settings.quantize,
        **written,
        "by_rounding": by_rounding,
    }


@dataclass(frozen=True)
class _Measure:
    """The pairs that models are compared on, and their log-probs before anything is fused."""

    pairs: list[EncodedPair]
    base: Sides
    with_adapters: Sides

    def of(self, fused: models.LoadedModel, fused_base: Sides | None = None) -> Report:
        return compare(self.base, self.with_adapters, log_probs(fused, self.pairs), fused_base)


def _measure_of(config: Config, loaded: models.LoadedModel) -> _Measure:
    encoder = Encoder.of(loaded.tokenizer, config)
    read = pairs.read(pair_file(config, VALID))
    valid, _ = pairs.encode_all(read, encoder, config.data.max_length)
    require_valid(config, valid)
    checked = valid[: config.fuse.check_pairs]
    with models.adapters_off(loaded.model):
        base = log_probs(loaded, checked)
    return _Measure(checked, base, log_probs(loaded, checked))


def _fused(config: Config, how: str, dtype: mx.Dtype) -> models.LoadedModel:
    loaded = models.load(config.model, config.run / "adapters")
    fusing.fuse(loaded.model, how, dtype, config.seed)
    if config.fuse.dtype:
        fusing.cast(loaded.model, dtype)
    return loaded


def _save(loaded: models.LoadedModel, config: Config, dtype: mx.Dtype) -> None:
    """The fused model as an ordinary folder, quantised when that is wished."""
    about = models.config_for(jsonl.read_json(loaded.folder / "config.json"), dtype)
    if bits := config.fuse.quantize:
        about = fusing.quantize(loaded.model, about, bits)
    with durable.new_folder(config.run / "fused") as temporary:
        models.save(loaded.model, loaded.folder, temporary, about)


def _quantized_base(config: Config, dtype: mx.Dtype, checked: list[EncodedPair]) -> Sides | None:
    """Log-probs under the base model in the bits that the fused one is written in, if in any.

    Quantising moves every answer by far more than a short training does, that of both models
    alike: what was learned shows against the base model in the same bits alone.
    """
    if config.fuse.quantize is None:
        return None
    loaded = models.load(config.model)
    fusing.fuse(loaded.model, NEAREST, dtype)
    fusing.quantize(loaded.model, {}, config.fuse.quantize)
    return log_probs(loaded, checked)


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


def log_probs(loaded: models.LoadedModel, encoded: list[EncodedPair]) -> Sides:
    """Log-probs [pairs] of both sides under the weights as they are, in nats.

    In float32 throughout: in bfloat16 the rounding of what flows through the model would hide
    that of its weights.
    """
    with fusing.activations_in_float32(loaded.model):
        chosen, rejected = zip(*worker.log_probs(worker.Worker(loaded.model), encoded), strict=True)
    return Sides(mx.array(chosen), mx.array(rejected))


def _inputs(config: Config) -> stamp.Inputs:
    settings = asdict(config.fuse)
    del settings["min_margin_kept"]  # changes the judgement, not the model
    return {
        "adapters": jsonl.digest(config.run / "adapters" / models.ADAPTERS),
        "model files": models.fingerprint(config.model),
        "valid pairs": jsonl.digest(pair_file(config, VALID)),
        "seed": config.seed,
        **config.prompt_inputs,
        "data.max_length": config.data.max_length,
        **{f"fuse.{key}": value for key, value in settings.items()},
    }


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
    """Raises UserError, with what to do, when less is kept than the config asks for."""
    kept, least = report["margin_kept"], config.fuse.min_margin_kept
    if kept is None or kept >= least:
        return
    if report["quantize"]:
        remedy = "set fuse.quantize: null"
    elif report["dtype"] != "float32":
        remedy = "set fuse.rounding: stochastic, or fuse.dtype: float32 (or float16)"
    else:
        remedy = "train longer, or raise fuse.check_pairs"
    raise UserError(
        f"{config.run / 'fused'}: keeps {kept:.1%} of the adapters' margin, fuse.min_margin_kept "
        f"asks for {least:.0%}; {remedy}, or use the adapters as they are (--adapter-path "
        f"{config.run / 'adapters'})"
    )
