"""The preflight: each finding on facts made to trigger it, and none on a sound run."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dpo_mlx.config import Config, DataConfig, DpoConfig, LoraConfig, SftConfig, TrainConfig
from dpo_mlx.data.encoding import EncodedAnswer, EncodedPair
from dpo_mlx.data.pairs import LENGTH, STOP, Pair
from dpo_mlx.files import jsonl
from dpo_mlx.scoring.losses import LOSSES, Sides
from dpo_mlx.scoring.objectives import SFT, Example
from dpo_mlx.scoring.scorer import Scorer
from dpo_mlx.training import findings
from dpo_mlx.training.findings import Facts, Probe, gather, probe
from dpo_mlx.voice.voice_classifier import FEATURES, VoiceClassifier
from runs import Run, exit_code, wrote

SOUND = Facts(
    train_pairs=100,
    chosen_per_token=-3.0,
    rejected_per_token=-1.2,
    chosen_tokens=150,
    rejected_tokens=200,
    cut_share=0.1,
    classifier_accuracy=0.95,
    sft_updates=26,
    dpo_updates=13,
    sft_change=1.5,
    sft_update_change=0.1,
    dpo_change=0.1,
)


def config(**sections: Any) -> Config:
    return Config(
        model="m",
        run_dir="r",
        data=DataConfig(source="s", train_pairs="t", valid_pairs="v"),
        **{
            "train": TrainConfig(learning_rate=5e-6),
            "sft": SftConfig(epochs=2),
            "dpo": DpoConfig(nll_weight=0.2),
            **sections,
        },
    )


NO_SFT = SftConfig(epochs=0)
SLOW = TrainConfig(learning_rate=1e-6)


def test_a_sound_run_has_no_finding() -> None:
    """Nobody reads warnings that are always there."""
    assert list(findings.of(SOUND, config())) == []


@pytest.mark.parametrize(
    ("facts", "sections", "text", "fatal"),
    [
        ({"train_pairs": 49}, {}, "49 train pairs", False),
        ({"chosen_per_token": -5.3}, {"sft": NO_SFT}, "4.1 nats per token less likely", False),
        ({"rejected_tokens": 301}, {}, "2.0 times as long", False),
        ({"rejected_tokens": 301}, {}, "set dpo.match_length: true, or dpo.loss", False),
        ({"rejected_tokens": 74}, {}, "0.5 times as long", False),
        ({"rejected_tokens": 74}, {}, "set dpo.loss", False),  # a cut makes none longer
        ({"cut_share": 0.31}, {}, "31% of the rejected answers were cut", False),
        ({"classifier_accuracy": 0.79}, {}, "on only 79%", False),
        ({}, {"dpo": DpoConfig(loss="sigmoid_norm", beta=0.1)}, "dpo.beta 0.1 with", True),
        ({}, {"dpo": DpoConfig(loss="simpo", beta=0.5)}, "dpo.beta 0.5 with simpo", True),
        ({}, {"dpo": DpoConfig(beta=5.0)}, "dpo.beta 5 with sigmoid", True),
        (
            {"dpo_change": 0.01, "sft_updates": 0},
            {"sft": NO_SFT, "train": SLOW},
            "too little to change any answer; set train.learning_rate: 3e-05",
            True,
        ),
        ({"dpo_change": 0.01}, {"train": SLOW}, "too little to change any answer", False),
        ({"sft_change": 0.01}, {}, "sft.learning_rate 0.0001: 26 updates can change", True),
        (
            {"sft_update_change": 4.0},
            {},
            "one update could change held-out answers by 4 nats per token, far more than any voice "
            "needs; set sft.learning_rate: 8e-06",
            True,
        ),
        ({"dpo_change": 30.0}, {}, "could change held-out answers by 30", True),
        ({"dpo_change": -0.1, "sft_updates": 0}, {"sft": NO_SFT}, "chosen and rejected", True),
        ({}, {"lora": LoraConfig(scale=0.5)}, "lora.scale 0.5", False),
        ({}, {"lora": LoraConfig(scale=65.0)}, "lora.scale 65", False),
    ],
)
def test_each_finding(
    facts: dict[str, Any], sections: dict[str, Any], text: str, fatal: bool
) -> None:
    """One departure from a sound run gives one finding, with its number and the right weight."""
    (found,) = findings.of(replace(SOUND, **facts), config(**sections))
    assert text in found.text
    assert found.fatal is fatal


@pytest.mark.parametrize(
    ("facts", "sections"),
    [
        ({"train_pairs": 50}, {}),
        ({"sft_change": 60.0}, {}),  # 1,300 rows take many updates
        ({"chosen_per_token": -9.0}, {}),  # SFT comes first
        ({"rejected_tokens": 300}, {}),
        ({"cut_share": 0.3}, {}),
        ({"classifier_accuracy": 0.8}, {}),
        ({}, {"dpo": DpoConfig(loss="sigmoid_norm", beta=5.0)}),
        ({"dpo_change": 0.021}, {}),
        ({}, {"lora": LoraConfig(scale=64.0)}),
    ],
)
def test_at_the_limit_nothing_is_said(facts: dict[str, Any], sections: dict[str, Any]) -> None:
    """Each finding has data that do not trigger it, up to its limit."""
    assert list(findings.of(replace(SOUND, **facts), config(**sections))) == []


def test_facts_by_hand() -> None:
    """From three train and two valid pairs, five updates of DPO and ten of SFT at constant rates.

    Log-probs per token of the valid pairs: chosen -8/4 and -9/3, rejected -6/6 and -2/1; lengths of
    the train pairs: chosen 2, 5, 6 and rejected 1, 2, 9. Two of their rejected answers were cut,
    one of them before it was as long as the chosen one. A classifier that calls every answer
    rejected is at chance.
    """

    def encoded(chosen: int, rejected: int, line: int = 1) -> EncodedPair:
        first, second = (EncodedAnswer(tuple(range(7 + n)), 7) for n in (chosen, rejected))
        return EncodedPair(first, second, line)

    steady: Any = {"schedule": "constant", "warmup_ratio": 0.0, "grad_accumulation": 1}
    pair, finishes = Pair("q", "chosen", "rejected"), [LENGTH, LENGTH, STOP]
    found = gather(
        config(
            train=TrainConfig(learning_rate=0.1, epochs=5, batch_size=3, **steady),
            sft=SftConfig(epochs=10, learning_rate=0.2),
        ),
        {
            "train": [replace(pair, rejected_finish=f, line=i) for i, f in enumerate(finishes)],
            "valid": [pair, pair],
        },
        {
            "train": [encoded(6, 1, line=0), encoded(5, 9, line=1), encoded(2, 2, line=2)],
            "valid": [encoded(4, 6), encoded(3, 1)],
        },
        [Sides(-8, -6), Sides(-9, -2)],
        VoiceClassifier(np.zeros(FEATURES), -1.0),
        Probe(sft=0.5, dpo=0.25, seconds=0.0),
    )
    assert asdict(found) == pytest.approx(
        {
            "train_pairs": 3,
            "chosen_per_token": -2.5,
            "rejected_per_token": -1.5,
            "chosen_tokens": 5.0,
            "rejected_tokens": 2.0,
            "cut_share": 1 / 3,
            "classifier_accuracy": 0.5,
            "sft_updates": 10,
            "dpo_updates": 5,
            "sft_change": 0.5 * 10 * 0.2,
            "sft_update_change": 0.5 * 0.2,
            "dpo_change": 0.25 * 5 * 0.1,
        },
        rel=1e-5,
    )
    assert any("on only 50%" in finding.text for finding in findings.of(found, config()))


# Pairs whose sides differ in length from one to the next, so that a wrong weight of a side shows.
TRAIN = [
    Pair(f"Why {i} {w}?", f"**{w}!**" + " Yes." * i, f"It is {w}" + f", {w}" * (5 - i), line=i)
    for i, w in enumerate(["odd", "red", "hot", "big"], start=1)
]
UNSEEN = [
    Pair("Why 9 old?", "**old!** Yes. Yes.", "It is old, old", line=1),
    Pair("Why 8 sad?", "**sad!**", "It is sad, sad, sad", line=2),
]
BETAS = {"sigmoid_norm": 5.0, "simpo": 5.0, "ipo": 0.5}


def per_token(scorer: Scorer, examples: list[Example]) -> np.ndarray:
    """Log-probs per token [pairs, (chosen, rejected)]."""
    return np.array(
        [[scorer.log_prob(s) / s.answer_length for s in e.pair.sides] for e in examples]
    )


def first_update(run: Run) -> tuple[Probe, np.ndarray]:
    """What the probe says, and what the real first update at a small rate does to unseen pairs:
    the mean change a token of (chosen, rejected) over the rate.
    """
    scorer, (train, valid) = run.trainer.worker.scorer, (run.train, run.valid)
    foretold = probe(scorer, run.config, [e.pair for e in train], [e.pair for e in valid])
    before = per_token(scorer, valid)
    assert len(run.run().updates) == 1
    return foretold, (per_token(scorer, valid) - before).mean(axis=0) / RATE


RATE = 3e-5
ONE_UPDATE = {"grad_accumulation": len(TRAIN), "learning_rate": RATE}


@pytest.mark.parametrize("nll_weight", [0.0, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_dpo_s_first_update_is_foretold(loss: str, nll_weight: float, make: Any) -> None:
    """An oracle: AdamW's real first update moves unseen pairs apart as far as the probe says, to
    10%, for every loss.
    """
    dpo = {"loss": loss, "beta": BETAS.get(loss, 0.1), "nll_weight": nll_weight}
    run = make({"train": TRAIN, "valid": UNSEEN}, dpo=dpo, **ONE_UPDATE)
    foretold, (chosen, rejected) = first_update(run)
    assert foretold.dpo == pytest.approx(chosen - rejected, rel=0.1)
    assert foretold.seconds > 0


@pytest.mark.parametrize("kind", ["granite", "llama"])
def test_sft_s_first_update_is_foretold(kind: str, make: Any, request: Any) -> None:
    """The same of SFT's update and the chosen answers' gain; DPO's settings have no say."""
    run = make(
        {"phase": SFT, "train": TRAIN, "valid": UNSEEN},
        model=request.getfixturevalue(kind),
        sft={"epochs": 1, "learning_rate": RATE},
        dpo={"beta": 0.9, "nll_weight": 3.0},
        **{**ONE_UPDATE, "learning_rate": 0.5},
    )
    foretold, (chosen, _) = first_update(run)
    assert foretold.sft == pytest.approx(chosen, rel=0.1)


# Through the script -----------------------------------------------------------------------------

WEAK = {"loss": "sigmoid_norm", "beta": 0.1}


def trained(run: Path) -> bool:
    """Whether anything was trained there."""
    return any((run / name).exists() for name in ("metrics.jsonl", "checkpoints", "adapters"))


@pytest.mark.parametrize("more", [(), ("--check",), ("--only", "reference")], ids=" ".join)
def test_what_is_sure_to_fail_is_not_begun(more: tuple[str, ...], job: Any, capfd: Any) -> None:
    """Exit code 1, the finding among the facts, one line on stderr with the way round it."""
    run, path = job([wrote()], dpo=WEAK)
    assert exit_code(path, *more) == 1
    printed = capfd.readouterr()
    assert "10: sure to fail: dpo.beta 0.1 with sigmoid_norm" in printed.out
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "train.force=true" in errors[0]
    assert not trained(run.run.path)


def test_force_trains_all_the_same(job: Any, capfd: Any) -> None:
    """The finding is still said, and the run is trained to its end."""
    run, path = job([wrote()], dpo=WEAK, train={"force": True})
    assert exit_code(path) == 0
    assert "10: sure to fail: dpo.beta 0.1" in capfd.readouterr().out
    assert jsonl.read_json(run.run.path / "outcome.json")["updates"] == 7


def test_check_says_it_and_does_nothing(job: Any, capfd: Any) -> None:
    """Updates and rates of both phases, memory and every finding are printed, a line each; no
    training is begun.
    """
    run, path = job([wrote()], sft={"epochs": 1, "learning_rate": 1e-2}, lora={"scale": 0.5})
    assert exit_code(path, "--check") == 0
    lines = capfd.readouterr().out.splitlines()
    assert all(line.startswith("10: ") for line in lines)
    notes = [line for line in lines if line.startswith("10: note: ")]
    assert any(note.startswith("10: note: lora.scale 0.5") for note in notes)
    assert any(note.startswith("10: note: 7 train pairs") for note in notes)
    assert any(
        "SFT: 7 updates, answers per update: 1, learning rate 0.01" in line for line in lines
    )
    assert any("DPO: 7 updates, pairs per update: 1, learning rate 0.001" in line for line in lines)
    assert any("peak memory" in line for line in lines)
    assert not trained(run.run.path)
