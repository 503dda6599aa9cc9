"""Supervised fine-tuning before DPO: what it learns, and what a second run reuses of it."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from dpo_mlx.config import Config
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.scoring.objectives import SFT, Sft
from dpo_mlx.scoring.scorer import Scorer
from dpo_mlx.stages.train_dpo import ONLY_DPO, ONLY_REFERENCE, train_dpo
from dpo_mlx.training.schedule import groups
from mlx.utils import tree_flatten, tree_map
from runs import SCRIPT, Scripted, determined, differences, saved, wrote

WARM = {"epochs": 1, "learning_rate": 1e-3}
END_OF_SFT = "checkpoints/sft-000007"


class Norm(Scripted):
    """Answers whose voice score grows with the distance of the adapters from their start."""

    sign = 1.0

    def __init__(self, worker, *_):
        super().__init__()
        self.model = worker.model

    def base(self):
        return wrote(voice=0.5)

    def __call__(self):
        adapters = dict(tree_flatten(self.model.trainable_parameters()))
        far = sum(float(mx.abs(v).sum()) for n, v in adapters.items() if n.endswith("lora_b"))
        return wrote(voice=0.5 + self.sign * far / 1e6)


class Shy(Norm):
    """Answers whose voice score falls with that distance."""

    sign = -1.0


@pytest.fixture
def warmed(job, llama) -> Any:
    """warmed(key of the sft section=value) -> the config of a run on llama, measured by `Norm`."""

    def made(watch: Any = Norm, dpo: Any = None, **sft: Any) -> Config:
        sections = {"sft": {**WARM, **sft}, "dpo": dpo or {}, "model": str(llama)}
        return job(watch, **sections)[0]

    return made


def of_phase(config: Config, phase: str) -> list[dict[str, Any]]:
    found = jsonl.read_whole_lines(config.run.path / "metrics.jsonl")
    return [row for row in found if row["phase"] == phase]


def numbering(metrics: list[dict[str, Any]]) -> list[tuple[str, int, bool]]:
    """(phase, update, whether it is an evaluation) of every row."""
    return [(row["phase"], row["iteration"], "eval_loss" in row) for row in metrics]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes and the modification time of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# What it learns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", ["granite", "llama"])
def test_chosen_answers_become_likelier(kind, checkpoint, make, request):
    """Six updates on all pairs lower the chosen answers' negative log-likelihood, trained and held
    out, at the rate of `sft`. The rejected answers have no influence.
    """
    run = make(
        {"phase": SFT},
        model=request.getfixturevalue(kind),
        sft={"epochs": 6, "learning_rate": 3e-3},
        learning_rate=0,
        grad_accumulation=7,
        grad_checkpoint=checkpoint,
    ).run()
    losses = [row["nll_loss"] for row in run.updates]
    assert len(losses) == 6 and losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    before, after = run.evaluations
    assert after["eval_nll_loss"] < before["eval_nll_loss"] - 0.05
    assert {row["phase"] for row in run.metrics} == {"sft"}
    assert not any("loss" in row or "rewards/margins" in row for row in run.updates)


def test_an_update_is_the_mean_of_its_answers(make):
    """The logged loss and norm are means over the group of each answer's mean per token."""
    one_group = {"grad_accumulation": 7, "max_grad_norm": 1e6}
    run = make({"phase": SFT}, sft={"epochs": 1, "learning_rate": 0}, **one_group).run()
    scorer = Scorer(run.model)
    [(_, indices)] = groups(run.trainer.objective.settings, 7, run.config.seed)
    values, gradients = zip(
        *(scorer.nll_gradient(run.train[i].pair.chosen) for i in indices), strict=True
    )
    total = dict(tree_flatten(tree_map(lambda *g: sum(g) / 7, *gradients)))
    norm = math.sqrt(sum(float(mx.square(g).sum()) for g in total.values()))
    [row] = run.updates
    assert row["nll_loss"] == pytest.approx(sum(values) / 7, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_only_rate_and_epochs_are_its_own(make):
    """SFT takes every other setting of an update from `train`."""
    config = make(sft={"epochs": 3, "learning_rate": 0.5}, weight_decay=0.1).config
    settings = Sft(config).settings
    assert (settings.epochs, settings.learning_rate) == (3, 0.5)
    assert (settings.weight_decay, settings.schedule) == (0.1, "constant")


# What DPO makes of it ---------------------------------------------------------------------------


def test_dpo_starts_at_what_sft_has_left(warmed):
    """After SFT, DPO's first loss is ln 2 and its margins are 0: its reference is the model after
    SFT, not the base model.
    """
    config = warmed()
    assert train_dpo(config)
    evaluation, update = of_phase(config, "dpo")[:2]
    assert (evaluation["iteration"], update["iteration"]) == (7, 8)
    assert evaluation["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert update["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert update["rewards/margins"] == pytest.approx(0, abs=1e-4)
    base, after = (
        jsonl.read_whole_lines(config.run.path / "reference" / of / "valid.jsonl")
        for of in ("base", "sft")
    )
    assert all(a["chosen"] > b["chosen"] + 1 for a, b in zip(after, base, strict=True))
    assert of_phase(config, "sft")[0]["eval_logps/chosen"] == pytest.approx(
        sum(row["chosen"] for row in base) / len(base), rel=1e-5
    )


def test_updates_are_numbered_through(warmed):
    """SFT has updates 1 to 7, DPO 8 to 14, each once. Evaluations come at every second update of a
    phase and at both its ends.
    """
    config = warmed()
    train_dpo(config)
    found = numbering(jsonl.read_whole_lines(config.run.path / "metrics.jsonl"))
    expected = [("sft", i) for i in range(1, 8)] + [("dpo", i) for i in range(8, 15)]
    assert [(phase, i) for phase, i, evaluation in found if not evaluation] == expected
    expected = [("sft", i) for i in (0, 2, 4, 6, 7)] + [("dpo", i) for i in (7, 9, 11, 13, 14)]
    assert [(phase, i) for phase, i, evaluation in found if evaluation] == expected


def test_sft_that_degenerates_is_not_followed_by_dpo(job, llama):
    """A run stopped in SFT keeps the best of SFT, takes no reference of it, and marks no end of
    SFT. A second start is skipped.
    """
    script = [wrote(voice=0.5), wrote(voice=1.0, self_ended=0.0)]
    config, _ = job(script, sft=WARM, model=str(llama))
    for _ in range(2):
        assert not train_dpo(config)
        outcome = json.loads((config.run.path / "outcome.json").read_text())
        assert (outcome["updates"], outcome["kept"]["update"]) == (4, 2)
        assert outcome["stopped"][0].startswith("guard.min_self_ended_ratio")
        assert of_phase(config, "dpo") == []
        assert not (config.run.path / END_OF_SFT).exists()
        assert not (config.run.path / "reference/sft").exists()
        best = saved(config.run.path / "checkpoints/sft-000002")
        assert differences(saved(config.run.path / "adapters"), best) == 0


# Stages and second runs -------------------------------------------------------------------------


def in_parts(config: Config, *parts: str | None) -> Path:
    """Run these parts of stage 10. Moves the run's folder out of the way of another run, and
    returns it.
    """
    for part in parts:
        assert train_dpo(config, part)
    return config.run.path.rename(config.run.path.with_name("-".join(map(str, parts))))


@pytest.mark.parametrize(("epochs", "watch"), [(0, Norm), (1, Norm), (1, Shy)])
def test_parts_are_one_run(epochs, watch, warmed):
    """`--only reference` and then `--only dpo` give the adapters, outcome and metrics of a
    whole run, to the last bit, whether the best evaluation is DPO's last or SFT's first.
    """
    config = warmed(watch, epochs=epochs)
    whole, apart = in_parts(config, None), in_parts(config, ONLY_REFERENCE, ONLY_DPO)
    assert differences(saved(apart / "adapters"), saved(whole / "adapters")) == 0
    assert jsonl.read_json(apart / "outcome.json") == jsonl.read_json(whole / "outcome.json")
    found, expected = (determined(folder / "metrics.jsonl") for folder in (apart, whole))
    assert found == expected


def test_evaluations_look_at_a_few_valid_pairs(job):
    """Evaluations score the first `train.eval_questions` valid pairs, and the reference after SFT
    holds only these. The base model's reference holds all of them, for the report.
    """
    config = job(Norm, sft=WARM, train={"eval_questions": 1})[0]
    assert train_dpo(config)
    of_base, after_sft = (
        jsonl.read_whole_lines(config.run.path / "reference" / model / "valid.jsonl")
        for model in ("base", "sft")
    )
    assert (len(of_base), len(after_sft)) == (2, 1)
    first = of_phase(config, "sft")[0]["eval_logps/chosen"]
    assert first == pytest.approx(of_base[0]["chosen"], abs=1e-4)


def test_only_reference_trains_no_dpo(warmed):
    """It ends with SFT's adapters and both references; `--only dpo` does the rest."""
    config = warmed()
    assert train_dpo(config, ONLY_REFERENCE)
    assert not (config.run.path / "adapters").exists() and of_phase(config, "dpo") == []
    before = contents(config.run.path / END_OF_SFT)
    assert train_dpo(config, ONLY_DPO)
    assert contents(config.run.path / END_OF_SFT) == before
    assert (config.run.path / "adapters").exists()


def test_only_training_needs_the_adapters_of_sft(warmed):
    """Without SFT's adapters, or with those of other settings, `--only dpo` names what to run
    first.
    """
    with pytest.raises(UserError, match="reference/base: no complete .*--only reference"):
        train_dpo(warmed(), ONLY_DPO)
    config = warmed()
    train_dpo(config, ONLY_REFERENCE)
    changed = "sft-000007: .* other settings .*sft.learning_rate: 0.001 -> 0.002.*train.restart"
    with pytest.raises(UserError, match=changed):
        train_dpo(warmed(learning_rate=2e-3), ONLY_DPO)
    shutil.rmtree(config.run.path / END_OF_SFT)
    with pytest.raises(UserError, match="checkpoints: no finished SFT .*--only reference"):
        train_dpo(warmed(), ONLY_DPO)


def test_other_sft_settings_make_another_sft(warmed):
    """SFT, its reference and DPO run again; the base model's reference stays."""
    config = warmed()
    train_dpo(config)
    base = contents(config.run.path / "reference/base")
    sft, after, adapters = (
        contents(config.run.path / name) for name in (END_OF_SFT, "reference/sft", "adapters")
    )
    config = warmed(learning_rate=2e-3)
    assert train_dpo(config)
    assert contents(config.run.path / "reference/base") == base
    for name, old in ((END_OF_SFT, sft), ("reference/sft", after), ("adapters", adapters)):
        assert contents(config.run.path / name) != old, name
    assert of_phase(config, "dpo")[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    found = numbering(jsonl.read_whole_lines(config.run.path / "metrics.jsonl"))
    assert len(found) == len(set(found))


@pytest.fixture
def dpo_again(warmed) -> Any:
    """(the files that must stay, the metrics) of a run, and of a second run with other DPO
    settings.
    """

    def look(config: Config) -> tuple[Any, list[dict[str, Any]]]:
        names = END_OF_SFT, "reference/sft", "reference/base"
        metrics = jsonl.read_whole_lines(config.run.path / "metrics.jsonl")
        return [contents(config.run.path / name) for name in names], metrics

    found = []
    for dpo in ({}, {"beta": 0.2}):
        config = warmed(dpo=dpo)
        assert train_dpo(config)
        found.append(look(config))
    return found


def test_other_dpo_settings_keep_sft(dpo_again):
    """SFT is not trained again: its checkpoint, both references and its metrics stay, while DPO's
    metrics change.
    """
    (files, metrics), (files_after, metrics_after) = dpo_again
    assert files_after == files and len(files[0]) == 5
    sft, sft_after = ([r for r in rows if r["phase"] == "sft"] for rows in (metrics, metrics_after))
    assert sft_after == sft
    assert metrics_after[-1] != metrics[-1]


def test_dpo_s_rows_take_the_place_of_the_earlier_ones(dpo_again):
    """No update and no evaluation is in the metrics twice."""
    (_, metrics), (_, metrics_after) = dpo_again
    assert numbering(metrics_after) == numbering(metrics)


def test_without_sft_nothing_of_an_earlier_one_is_kept(warmed):
    """The kept adapters are DPO's, even where an earlier run's SFT ended at that update."""
    train_dpo(warmed())
    config = warmed(epochs=0)
    assert train_dpo(config)
    assert jsonl.read_json(config.run.path / "outcome.json")["kept"]["update"] == 7
    assert not (config.run.path / END_OF_SFT).exists()
    kept, own = (saved(config.run.path / name) for name in ("adapters", "checkpoints/dpo-000007"))
    assert differences(kept, own) == 0


@pytest.mark.parametrize(
    ("stage", "only", "note"),
    [
        (
            "precompute",
            "reference",
            "10: --stage precompute is the old spelling; use --only reference",
        ),
        ("train", "dpo", "10: --stage train is the old spelling; use --only dpo"),
        ("all", None, "10: --stage all is the old spelling; leave it out"),
    ],
)
def test_the_old_option_still_works(stage, only, note, warmed, monkeypatch, capsys):
    """A command from an older README still works, and one line gives the new name."""
    parts: list[str | None] = []

    def record(config: Config, only: str | None) -> bool:
        parts.append(only)
        return True

    monkeypatch.setattr("dpo_mlx.stages.train_dpo.train_dpo", record)
    options = Namespace(stage=stage, only=None, check=False)
    assert runpy.run_path(str(SCRIPT))["stage"](warmed(), options) == 0
    assert parts == [only] and note in capsys.readouterr().err
