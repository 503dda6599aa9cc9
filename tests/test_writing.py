"""What a model writes, measured: by hand, and without a trace in the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from dpo_mlx import models, voice
from dpo_mlx.config import Config, DataConfig, GenerationConfig, LoraConfig, TrainConfig
from dpo_mlx.engine import Engine
from dpo_mlx.models import LORA_LAYERS
from dpo_mlx.pairs import LENGTH, STOP, Encoder, Pair
from dpo_mlx.sampling import Answer, sample_batch
from dpo_mlx.writing import GREEDY, Watch, measure
from runs import differences

ASKED = [Pair(f"Why {w}?", f"**{w}!**", f"It is {w}.") for w in ("odd", "red")]
CLASSIFIER = voice.fit([p.chosen for p in ASKED], [p.rejected for p in ASKED])


@pytest.fixture
def tuned(llama: Path) -> Any:
    """A model whose adapters change what it says."""
    loaded = models.load(str(llama))
    mx.random.seed(0)
    models.attach_lora(loaded.model, LoraConfig(rank=4))
    for module in loaded.model.modules():
        if isinstance(module, LORA_LAYERS):
            module.lora_b = mx.random.normal(module.lora_b.shape)
    return loaded


def test_measures_by_hand(llama: Path) -> None:
    """Means over the answers; the log-prob is each answer's own mean under the base model."""
    loaded = models.load(str(llama))
    encoder, engine = Encoder(loaded.tokenizer), Engine(loaded.model)
    answers = [Answer("a b a b", STOP, 4), Answer("c d", LENGTH, 8)]
    found = measure(answers, ASKED, CLASSIFIER, engine, encoder)
    sequences = [
        encoder.sequence(p.prompt, a.text, a.finish) for p, a in zip(ASKED, answers, strict=True)
    ]
    own = [engine.log_prob(s) / s.answer_length for s in sequences]
    assert found == {
        "voice": pytest.approx(CLASSIFIER.probability(["a b a b", "c d"]).mean()),
        "distinct2": pytest.approx((2 / 3 + 1) / 2),
        "longest_loop": 1.0,
        "self_ended": 0.5,
        "base_logprob_per_token": pytest.approx(sum(own) / 2),
        "median_tokens": 6.0,
    }


def test_nothing_written_is_no_log_prob(llama: Path) -> None:
    """Empty answers cannot pass for natural ones."""
    loaded = models.load(str(llama))
    encoder, engine = Encoder(loaded.tokenizer), Engine(loaded.model)
    found = measure([Answer("", LENGTH, 0)] * 2, ASKED, CLASSIFIER, engine, encoder)
    assert found["base_logprob_per_token"] == float("-inf")


def test_watching_leaves_no_trace(tuned: Any, llama: Path) -> None:
    """The base's measures are those of a model without adapters, and the adapters stay on."""
    config = Config(
        model=str(llama),
        run_dir="r",
        data=DataConfig(source="s", train_pairs="t", valid_pairs="v"),
        train=TrainConfig(learning_rate=1e-6),
        generation=GenerationConfig(max_tokens=8),
    )
    scales = [m.scale for m in tuned.model.modules() if isinstance(m, LORA_LAYERS)]

    def watch(loaded: models.LoadedModel) -> Watch:
        return Watch(loaded.model, Encoder(loaded.tokenizer), CLASSIFIER, ASKED, config)

    base = watch(tuned).base()
    assert [m.scale for m in tuned.model.modules() if isinstance(m, LORA_LAYERS)] == scales
    plain = watch(models.load(str(llama)))()
    assert base == pytest.approx(plain)
    assert {name.removeprefix(GREEDY) for name in base} == {n for n in base if GREEDY not in n}
    assert watch(tuned)() != pytest.approx(plain)


def test_greedy_and_sampled_in_one_batch(llama: Path) -> None:
    """A prompt's own temperature is its own: the greedy half is a greedy batch's answers."""
    loaded = models.load(str(llama))
    encoder, settings = Encoder(loaded.tokenizer), GenerationConfig(max_tokens=8, temperature=1.0)
    prompts = [encoder.prompt(pair.prompt) for pair in ASKED]
    model, tokenizer = loaded.model, loaded.tokenizer
    mixed = sample_batch(model, tokenizer, prompts * 2, settings, 0, [1.0] * 2 + [0.0] * 2)
    greedy = sample_batch(model, tokenizer, prompts, settings, 1, [0.0] * 2)
    assert mixed[2:] == greedy


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_watching_changes_nothing_that_is_learned(dropout: float, make: Any) -> None:
    """Watched after every update, which draws random numbers and switches modes, or at the ends
    alone: the same adapters to the last bit, with dropout too.
    """

    def adapters(eval_every: int) -> Any:
        off = {"enabled": False}
        run = make(eval_every=eval_every, grad_accumulation=3, lora={"dropout": dropout}, guard=off)
        short = replace(run.config, generation=GenerationConfig(max_tokens=4, temperature=1.0))
        run.trainer.watch = Watch(run.model, run.encoder, CLASSIFIER, ASKED, short)
        return run.run().adapters

    assert differences(adapters(1), adapters(100)) == 0
