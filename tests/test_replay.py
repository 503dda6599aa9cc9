"""Replay: training keeps the model near the base model on prompts outside the voice."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from dpo_mlx.data.encoding import EncodedAnswer, EncodedPair, Encoder
from dpo_mlx.data.questions import words
from dpo_mlx.model.adapters import adapters_off
from dpo_mlx.model.loading import load_model
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.scoring.losses import Sides
from dpo_mlx.scoring.objectives import DPO, SFT, Example
from dpo_mlx.scoring.scorer import Scorer
from dpo_mlx.training import replay
from dpo_mlx.voice import cost
from mlx.utils import tree_flatten, tree_map


def examples(count: int) -> list[Example]:
    pairs = [
        EncodedPair(EncodedAnswer((i, i), 1), EncodedAnswer((i, i), 1), i) for i in range(count)
    ]
    return [Example(pair, Sides(math.nan, math.nan)) for pair in pairs]


def test_all_come_up_before_any_comes_up_again() -> None:
    """Over seven updates of two, five examples come up in rounds, each round in another order."""
    of_updates = [replay.of_update(examples(5), update, 2, seed=0) for update in range(1, 8)]
    assert all(len(of_one) == 2 for of_one in of_updates)
    lines = [example.pair.line for of_one in of_updates for example in of_one]
    rounds = lines[:5], lines[5:10]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds) and rounds[0] != rounds[1]
    assert replay.of_update(examples(5), 3, 2, seed=0) == of_updates[2]  # as after a resume


def test_the_prompts_are_not_those_that_the_cost_is_measured_on() -> None:
    """Or the cost would be measured on what was trained."""
    tasks = cost.load()
    instructions, choices = tasks.instructions, tasks.choices
    measured = [
        *tasks.prompts,
        *(instruction.prompt for instruction in instructions),
        *(choice.question for choice in choices),
    ]
    prompts = cost.read_prompts(replay.FILE)
    assert len(prompts) == len({*prompts}) == 189
    for prompt in prompts:
        for other in measured:
            assert overlap(prompt, other) < 0.4, (prompt, other)


def overlap(one: str, other: str) -> float:
    """The share of the words of two texts that are in both (Jaccard)."""
    a, b = ({*words(text).split()} for text in (one, other))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("phase", [SFT, DPO])
def test_an_update_adds_the_mean_of_the_replay(phase: str, make: Any) -> None:
    """The gradient is the mean over the update's own examples plus the mean divergence over the
    replayed answers, and both are logged. Shown for the second update: at the first there is no
    divergence.
    """

    def trained(epochs: int) -> Any:
        changes = {"grad_accumulation": 7, "max_grad_norm": 1e6, "replay": 2}
        sft = {"epochs": epochs, "learning_rate": 1e-2}
        run = make({"phase": phase}, sft=sft, epochs=epochs, learning_rate=1e-2, **changes)
        run.trainer.examples.replay.extend(run.train[:3])
        run.run()
        return run

    before = trained(1)  # its model is the one of the second update
    scorer, objective = Scorer(before.model), before.trainer.objective
    scores, gradients = zip(
        *(objective.gradient(scorer, example) for example in before.train), strict=True
    )
    replayed = [
        scorer.divergence_gradient(example.pair.chosen)
        for example in replay.of_update(before.train[:3], 2, 2, before.config.seed)
    ]
    means = [mean_tree(list(gradients)), mean_tree([gradient for _, gradient in replayed])]
    total = dict(tree_flatten(tree_map(mx.add, *means)))
    first, second = trained(2).updates
    assert first["replay_divergence"] == pytest.approx(0, abs=1e-6)
    divergence = mean(value for value, _ in replayed)
    assert second["replay_divergence"] == pytest.approx(divergence, rel=1e-3) and divergence > 0
    expected = objective.summary(list(scores))
    assert {name: second[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    norm = math.sqrt(sum(float(mx.square(g).sum()) for g in total.values()))
    assert second["grad_norm"] == pytest.approx(norm, rel=1e-4)


def mean_tree(trees: list[Any]) -> Any:
    return tree_map(lambda *g: sum(g) / len(g), *trees)


def move_away(model: Any) -> None:
    """Change the adapters, so that the model is no longer the base model."""
    mx.random.seed(1)
    adapters = model.trainable_parameters()
    model.update(tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), adapters))


def test_the_divergence_is_that_of_the_whole_models(make: Any) -> None:
    """Value and gradient of an answer, against plain logits of both models; 0 at the base model."""
    run = make({"phase": SFT}, sft={"epochs": 1})
    scorer, sequence = Scorer(run.model), run.train[0].pair.chosen
    value, gradient = scorer.divergence_gradient(sequence)
    assert abs(value) < 1e-6
    assert largest(gradient) < 1e-5
    move_away(run.model)
    ids = mx.array(sequence.ids)
    answer = slice(sequence.prompt_length - 1, -1)

    def log_softmax() -> mx.array:
        logits = run.model(ids[None])[0, answer].astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    with adapters_off(run.model):
        base = log_softmax()
        mx.eval(base)

    def divergence() -> mx.array:
        return (mx.exp(base) * (base - log_softmax())).sum(axis=-1).mean()

    expected, slopes = nn.value_and_grad(run.model, divergence)()
    value, gradient = scorer.divergence_gradient(sequence)
    assert value == pytest.approx(float(expected), rel=1e-4) and value > 0.01
    assert largest(tree_map(mx.subtract, gradient, slopes)) < 1e-4 * largest(slopes)


def largest(gradient: Any) -> float:
    """The largest entry of a tree, whatever its sign."""
    return max(float(mx.abs(g).max()) for g in dict(tree_flatten(gradient)).values())


def test_the_base_model_answers_the_same_again(make: Any, llama: Any) -> None:
    """Whatever the adapters, and however many answers are needed: a run that resumes gets those of
    its first start.
    """
    model, tokenizer = (
        make({"phase": SFT}, sft={"epochs": 1}).model,
        load_model(str(llama)).tokenizer,
    )
    worker, encoder = Worker(model, tokenizer), Encoder(tokenizer)
    first = [example.pair for example in replay.base_examples(worker, encoder, 3, seed=1)]
    move_away(model)
    again = [example.pair for example in replay.base_examples(worker, encoder, 9, seed=1)]
    assert (len(first), len(again)) == (8, 16) and again[:8] == first


def test_the_longest_sequence_bounds_all(llama: Any) -> None:
    """The memory plan counts on it."""
    loaded = load_model(str(llama))
    worker, encoder = Worker(loaded.model, loaded.tokenizer), Encoder(loaded.tokenizer)
    examples = replay.base_examples(worker, encoder, 16, seed=1)
    longest = replay.longest(encoder)
    for example in examples:
        assert example.pair.chosen.prompt_length <= longest.prompt_length
        assert len(example.pair.chosen.ids) <= len(longest.ids)
