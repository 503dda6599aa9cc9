"""Stage 11: adapters into the base weights, and a check that the fused model is the same model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import mlx.core as mx

from . import durable, jsonl, models, pairs, stamp
from .config import Config
from .engine import Engine, log_probs
from .errors import UserError
from .job import VALID, pair_file, require_valid
from .losses import Sides
from .pairs import EncodedPair, Encoder

# A margin smaller than this, in nats, is no margin that a share of could be kept.
LEAST_MARGIN = 1e-3


def fuse_adapters(config: Config) -> None:
    """Write `run_dir/fused` and what fusing changed, `run_dir/fuse.json`.

    Raises UserError when the adapters are missing or belong to another model.
    """
    adapters, fused, report = (config.run / n for n in ("adapters", "fused", "fuse.json"))
    if not (adapters / models.ADAPTERS).is_file():
        raise UserError(f"{adapters}: no adapters there; run 10_train_dpo.py first")
    stamp_path = stamp.path(config.run, "11_fuse_adapters")
    inputs = _inputs(config)
    if stamp.is_current(stamp_path, inputs, [fused, report]):
        print(f"11: {fused} is up to date, skipped")
        return
    trained = stamp.read(stamp.path(config.run, "10_train_dpo"))
    if trained is not None and trained.get("model files") != inputs["model files"]:
        raise UserError(
            f"{adapters}: were not trained on {config.model} as it is now; set model to the one "
            "they were trained on, or run 10_train_dpo.py again"
        )
    durable.refuse_foreign(fused)
    loaded = models.load(config.model)
    size = models.weights_size(loaded.folder)
    durable.require_space(config.run, size + durable.SMALL_FILES, "run_dir")
    encoder = Encoder(loaded.tokenizer, config.system_prompt)
    valid, _ = pairs.encode_all(
        pairs.read(pair_file(config, VALID)), encoder, config.data.max_length
    )
    require_valid(config, valid)
    checked = valid[: config.fuse.check_pairs]
    base = _log_probs(loaded, checked)
    del loaded  # one model in memory at a time
    loaded = models.load(config.model, adapters)
    with_adapters = _log_probs(loaded, checked)
    models.fuse(loaded.model)
    with durable.new_folder(fused) as temporary:
        models.save(loaded.model, loaded.folder, temporary)
        del loaded
        mx.clear_cache()
        found = compare(base, with_adapters, _log_probs(models.load(str(temporary)), checked))
    jsonl.write_json(report, found)
    stamp.write(stamp_path, inputs)
    _print(config, found, len(checked))


def compare(base: Sides, with_adapters: Sides, fused: Sides) -> dict[str, Any]:
    """What fusing changed, from log-probs [pairs] of both sides under three models.

    `margin_kept` is the fused model's mean margin over the adapters', both in nats against the
    base model; None when the adapters have none. `max_logprob_difference` is in nats.
    """
    margin = _margin(with_adapters, base)
    kept = _margin(fused, base) / margin if abs(margin) > LEAST_MARGIN else None
    differences = [float(mx.abs(f - a).max()) for f, a in zip(fused, with_adapters, strict=True)]
    return {
        "margin_adapters": margin,
        "margin_fused": _margin(fused, base),
        "margin_kept": kept,
        "max_logprob_difference": max(differences),
    }


def _margin(pi: Sides, ref: Sides) -> float:
    return float(((pi.chosen - ref.chosen) - (pi.rejected - ref.rejected)).mean())


def _log_probs(loaded: models.LoadedModel, encoded: list[EncodedPair]) -> Sides:
    chosen, rejected = zip(*log_probs(Engine(loaded.model), encoded), strict=True)
    return Sides(mx.array(chosen), mx.array(rejected))


def _inputs(config: Config) -> stamp.Inputs:
    return {
        "adapters": jsonl.digest(config.run / "adapters" / models.ADAPTERS),
        "model files": models.fingerprint(config.model),
        "valid pairs": jsonl.digest(pair_file(config, VALID)),
        "system_prompt": config.system_prompt,
        "data.max_length": config.data.max_length,
        **{f"fuse.{key}": value for key, value in asdict(config.fuse).items()},
    }


def _print(config: Config, found: dict[str, Any], count: int) -> None:
    kept = found["margin_kept"]
    share = "no margin to keep" if kept is None else f"{kept:.1%} of the adapters' margin kept"
    print(
        f"11: {config.run / 'fused'} on {count} valid pairs: {share}, largest log-prob difference "
        f"{found['max_logprob_difference']:.2g} nats"
    )
