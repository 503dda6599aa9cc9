"""What a model writes, measured: by hand, and without a trace in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from dpo_mlx.config import GenerationConfig, LoraConfig
from dpo_mlx.data.encoding import Encoder
from dpo_mlx.data.pairs import LENGTH, STOP, Pair
from dpo_mlx.model.adapters import LORA_LAYERS, attach_lora
from dpo_mlx.model.loading import LoadedModel, load_model
from dpo_mlx.model.sampling import EVALUATED_AT_ONCE, Answer, Batch, sample_batch
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.scoring.scorer import Scorer
from dpo_mlx.voice.answers import AnswerEvaluator, Author, measure
from dpo_mlx.voice.habits import measure_habits
from runs import TRAIN, differences

ASKED = [Pair(f"Why {w}?", f"**{w}!**", f"It is {w}.") for w in ("odd", "red")]
AUTHOR = Author.of(TRAIN, ASKED)
UNRELATED = ["Say hello.", "Count to three."]


@pytest.fixture
def tuned(llama: Path) -> Any:
    """A model whose adapters change what it says."""
    loaded = load_model(str(llama))
    mx.random.seed(0)
    attach_lora(loaded.model, LoraConfig(rank=4))
    for module in loaded.model.modules():
        if isinstance(module, LORA_LAYERS):
            module.lora_b = mx.random.normal(module.lora_b.shape)
    return loaded


def test_measures_by_hand(llama: Path) -> None:
    """Means over the answers; the log-prob is each answer's own mean under the base model, and the
    sense what it loses after the other question.
    """
    loaded = load_model(str(llama))
    encoder, scorer = Encoder(loaded.tokenizer), Scorer(loaded.model)
    answers = [Answer("a b a b", STOP, 4), Answer("c d", LENGTH, 8)]
    found = measure(answers, ASKED, AUTHOR, Worker(loaded.model).log_probs, encoder)
    sequences = [
        encoder.encode(p.prompt, a.text, a.finish) for p, a in zip(ASKED, answers, strict=True)
    ]
    own = [scorer.log_prob(s) / s.answer_length for s in sequences]
    swapped = [
        encoder.encode(p.prompt, a.text, a.finish)
        for p, a in zip(reversed(ASKED), answers, strict=True)
    ]
    other = [scorer.log_prob(s) / s.answer_length for s in swapped]
    texts = [answer.text for answer in answers]
    places = AUTHOR.scale.places(texts)
    sides = [p.chosen for p in ASKED], [p.rejected for p in ASKED]
    habits = measure_habits(AUTHOR.habits, *sides, texts)
    assert found.voice == pytest.approx(places) and AUTHOR.scale.ceiling > AUTHOR.scale.floor
    assert found.means == {
        "voice": pytest.approx(places.mean()),
        "habits": pytest.approx(sum(habit["carried"] for habit in habits) / len(habits)),
        "distinct2": pytest.approx((2 / 3 + 1) / 2),
        "longest_loop": 1.0,
        "self_ended": 0.5,
        "base_logprob_per_token": pytest.approx(sum(own) / 2),
        "sense": pytest.approx((sum(own) - sum(other)) / 2),
        "median_tokens": 6.0,
    }


def test_a_few_questions_are_answered_at_once(llama: Path, monkeypatch: Any) -> None:
    """However many are asked: most of the memory is training's."""
    loaded = load_model(str(llama))
    asked = [Pair(f"Why {i}?", "c", "d") for i in range(EVALUATED_AT_ONCE + 1)]
    made: list[int] = []

    def answers(_: Any, batches: list[Batch], *__: Any) -> list[list[Answer]]:
        made.extend(len(batch.prompts) for batch in batches)
        return [[Answer("s s s", STOP, 3)] * len(b.prompts) for b in batches]

    monkeypatch.setattr(Worker, "answers", answers)
    worker, encoder = Worker(loaded.model, loaded.tokenizer), Encoder(loaded.tokenizer)
    found = AnswerEvaluator(
        worker, encoder, AUTHOR, asked, UNRELATED, GenerationConfig(max_tokens=8), 0
    )()
    assert made == [EVALUATED_AT_ONCE, 1]
    assert found.means["distinct2"] == 0.5


def test_nothing_written_is_no_log_prob(llama: Path) -> None:
    """Empty answers cannot pass for natural ones."""
    loaded = load_model(str(llama))
    encoder = Encoder(loaded.tokenizer)
    found = measure(
        [Answer("", LENGTH, 0)] * 2, ASKED, AUTHOR, Worker(loaded.model).log_probs, encoder
    )
    assert found.means["base_logprob_per_token"] == float("-inf")
    assert found.means["sense"] == 0


def test_watching_leaves_no_trace(tuned: Any, llama: Path) -> None:
    """The base's measures are those of a model without adapters, and the adapters stay on."""
    scales = [m.scale for m in tuned.model.modules() if isinstance(m, LORA_LAYERS)]

    def watch(loaded: LoadedModel) -> AnswerEvaluator:
        return AnswerEvaluator(
            Worker(loaded.model, loaded.tokenizer),
            Encoder(loaded.tokenizer),
            AUTHOR,
            ASKED,
            UNRELATED,
            GenerationConfig(max_tokens=8),
            0,
        )

    base = watch(tuned).base()
    assert [m.scale for m in tuned.model.modules() if isinstance(m, LORA_LAYERS)] == scales
    plain = watch(load_model(str(llama)))()
    assert base.means == pytest.approx(plain.means)
    assert watch(tuned)().means != pytest.approx(plain.means)


def test_a_greedy_batch_is_no_matter_of_chance(llama: Path) -> None:
    """Two seeds answer alike when greedy, and otherwise when sampled."""
    loaded = load_model(str(llama))
    encoder, settings = Encoder(loaded.tokenizer), GenerationConfig(max_tokens=8, temperature=1.0)
    prompts = [encoder.prompt_ids(pair.prompt) for pair in ASKED]
    model, tokenizer = loaded.model, loaded.tokenizer
    greedy, again = (
        sample_batch(model, tokenizer, Batch(prompts, seed, greedy=True), settings)
        for seed in (0, 1)
    )
    assert greedy == again != sample_batch(model, tokenizer, Batch(prompts, 0), settings)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_watching_changes_nothing_that_is_learned(dropout: float, make: Any) -> None:
    """Watched after every update, which draws random numbers and switches modes, or at the ends
    alone: the same adapters to the last bit, with dropout too.
    """

    def adapters(eval_every: int) -> Any:
        off = {"enabled": False}
        run = make(eval_every=eval_every, grad_accumulation=3, lora={"dropout": dropout}, guard=off)
        short = GenerationConfig(max_tokens=4, temperature=1.0)
        worker = Worker(run.model, run.encoder.tokenizer)
        run.trainer.measure_answers = AnswerEvaluator(
            worker, run.encoder, AUTHOR, ASKED, UNRELATED, short, 0
        )
        return run.run().adapters

    assert differences(adapters(1), adapters(100)) == 0
