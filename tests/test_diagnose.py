"""The preflight: each finding on facts made to trigger it, and none on a sound run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from dpo_mlx import models, pairs
from dpo_mlx.config import Config, DataConfig, DpoConfig, LoraConfig, SftConfig, TrainConfig
from dpo_mlx.diagnose import Facts, findings, probe
from dpo_mlx.engine import Engine
from dpo_mlx.pairs import Encoder, Pair
from mlx.utils import tree_map

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
    assert list(findings(SOUND, config())) == []


@pytest.mark.parametrize(
    ("facts", "sections", "text", "fatal"),
    [
        ({"train_pairs": 49}, {}, "49 train pairs", False),
        ({"chosen_per_token": -5.3}, {"sft": NO_SFT}, "4.1 nats a token further", False),
        ({"rejected_tokens": 301}, {}, "2.0 times as long", False),
        ({"rejected_tokens": 74}, {}, "0.5 times as long", False),
        ({"cut_share": 0.31}, {}, "31% of the rejected answers were cut", False),
        ({"classifier_accuracy": 0.79}, {}, "right on 79%", False),
        ({}, {"dpo": DpoConfig(loss="sigmoid_norm", beta=0.1)}, "dpo.beta 0.1 with", True),
        ({}, {"dpo": DpoConfig(loss="simpo", beta=0.5)}, "dpo.beta 0.5 with simpo", True),
        ({}, {"dpo": DpoConfig(beta=5.0)}, "dpo.beta 5 with sigmoid", True),
        (
            {"dpo_change": 0.01, "sft_updates": 0},
            {"sft": NO_SFT, "train": SLOW},
            "which moves nothing; set train.learning_rate: 3e-05",
            True,
        ),
        ({"dpo_change": 0.01}, {"train": SLOW}, "which moves nothing", False),
        ({"sft_change": 0.01}, {}, "sft.learning_rate 0.0001: 26 updates can change", True),
        ({"sft_change": 21.0}, {}, "could change unseen answers by 21", True),
        ({"dpo_change": 30.0}, {}, "could change unseen answers by 30", True),
        ({"dpo_change": -0.1, "sft_updates": 0}, {"sft": NO_SFT}, "chosen and rejected", True),
        ({}, {"lora": LoraConfig(scale=0.5)}, "lora.scale 0.5", False),
        ({}, {"lora": LoraConfig(scale=65.0)}, "lora.scale 65", False),
    ],
)
def test_each_finding(
    facts: dict[str, Any], sections: dict[str, Any], text: str, fatal: bool
) -> None:
    """One departure from a sound run gives one finding, with its number and the right weight."""
    (found,) = findings(replace(SOUND, **facts), config(**sections))
    assert text in found.text
    assert found.fatal is fatal


@pytest.mark.parametrize(
    ("facts", "sections"),
    [
        ({"train_pairs": 50}, {}),
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
    assert list(findings(replace(SOUND, **facts), config(**sections))) == []


@pytest.mark.parametrize("dpo", [DpoConfig(), DpoConfig(nll_weight=1.0), DpoConfig(loss="simpo")])
def test_the_probe_foretells_a_small_update(dpo: DpoConfig, llama: Any) -> None:
    """An oracle: a true sign step of a small rate changes unseen pairs by rate x probe."""
    loaded = models.load(str(llama))
    encoder = Encoder(loaded.tokenizer)
    mx.random.seed(0)
    models.attach_lora(loaded.model, LoraConfig(rank=4))
    engine = Engine(loaded.model)
    made = [
        encoder.pair(Pair(f"Why {i} {w}?", f"**{w}!** Yes, {w}.", f"It is {i} times {w}."))
        for i, w in enumerate(["odd", "red", "hot", "big", "shy", "dry", "sad"])
    ]
    train, valid = made[:4], made[4:]
    settings = config(dpo=dpo)
    foretold = probe(engine, settings, train, valid)
    rate, before = 1e-5, per_token(engine, valid)
    gradient = None
    for pair in train:
        own = engine.nll_gradient(pair.chosen)[1]
        gradient = own if gradient is None else tree_map(mx.add, gradient, own)
    signs = tree_map(mx.sign, gradient)
    stepped = tree_map(lambda p, s: p - rate * s, loaded.model.trainable_parameters(), signs)
    loaded.model.update(stepped)
    after = per_token(engine, valid)
    assert after[0] - before[0] == pytest.approx(rate * foretold.sft, rel=0.1)
    assert foretold.dpo > 0


def per_token(engine: Engine, valid: list[pairs.EncodedPair]) -> tuple[float, float]:
    """Mean log-probs a token of chosen and rejected answers."""
    sides = zip(*(pair.sides for pair in valid), strict=True)
    chosen, rejected = (
        sum(engine.log_prob(s) / s.answer_length for s in side) / len(valid) for side in sides
    )
    return chosen, rejected
