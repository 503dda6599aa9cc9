"""The memory plan against the measured peak of a real training step."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import tiny
from dpo_mlx import config as configs
from dpo_mlx.config import Config, DataConfig, GenerationConfig, LoraConfig, TrainConfig
from dpo_mlx.data.encoding import EncodedAnswer, EncodedPair
from dpo_mlx.files.errors import UserError
from dpo_mlx.model import device, fusing, scan
from dpo_mlx.model.adapters import attach_lora
from dpo_mlx.model.gradient_checkpointing import gradient_checkpointing
from dpo_mlx.model.loading import load_model
from dpo_mlx.model.sampling import Batch, sample_batch
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.scoring import memory
from dpo_mlx.scoring.losses import Sides
from dpo_mlx.scoring.objectives import DPO, Example
from dpo_mlx.scoring.scorer import Scorer
from dpo_mlx.stages.make_pairs import make_pairs
from dpo_mlx.stages.train_dpo import train_dpo
from dpo_mlx.training.checkpoint import Checkpoints, State
from dpo_mlx.training.metrics import MetricsFile
from dpo_mlx.training.trainer import Examples, Trainer
from mlx.utils import tree_map_with_path
from runs import wrote

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "shared_intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
GRANITE = {
    "layer_types": ["mamba", "mamba", "mamba", "attention"] * 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 64,
}

EVERYWHERE = LoraConfig(rank=8)


def loaded(
    kind: str, dtype: mx.Dtype = mx.float32, lora: LoraConfig = EVERYWHERE, **changes: Any
) -> Any:
    """A model wide enough that activations outweigh everything that is not counted."""
    gc.collect()  # or what earlier tests left behind may be freed while the plan is measured
    extra = GRANITE if kind == "granite" else {}
    model = tiny.model(tiny.config(kind, **{**WIDE, **extra, **changes}))
    model.set_dtype(dtype)
    scan.use_chunks(model, 64)
    mx.random.seed(0)
    attach_lora(model, lora)
    return model


def sequence(length: int = 256) -> EncodedAnswer:
    return EncodedAnswer(tuple(i * 37 % 250 for i in range(length)), 40)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_need_is_within_15_percent(kind: str, checkpoint: bool, tmp_path: Path) -> None:
    """The planned peak of an update of two pairs is within 15% of the measured one."""
    model = loaded(kind)
    pair = EncodedPair(sequence(), sequence(), 1)
    config = Config(
        model="",
        run_dir=str(tmp_path),
        data=DataConfig(source="", train_pairs="", valid_pairs=""),
        train=TrainConfig(learning_rate=1e-4, grad_accumulation=2, grad_checkpoint=checkpoint),
    )
    with gradient_checkpointing(model, checkpoint):
        need = memory.training(model, pair.chosen)
    scorer = Scorer(model)
    reference = Sides(scorer.log_prob(pair.chosen), scorer.log_prob(pair.rejected))
    examples = [Example(pair, reference)] * 4
    trainer = Trainer(
        Worker(model),
        config,
        Examples(examples, examples[:1]),
        wrote,
        MetricsFile(tmp_path / "metrics.jsonl"),
        Checkpoints(tmp_path / "checkpoints"),
        State(DPO, base=wrote()),
    )
    gc.collect()  # else what earlier tests left behind may go while this one is measured
    held_by_others = mx.get_active_memory() - memory.nbytes(model.parameters())
    trainer.run()
    assert need.total == pytest.approx(mx.get_peak_memory() - held_by_others, rel=0.15)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=8, num_layers=2),
        LoraConfig(rank=8, num_layers=7),
        LoraConfig(rank=8, keys=["self_attn.q_proj"]),
    ],
    ids=["the last two blocks", "all but the first", "attention alone"],
)
def test_need_when_some_blocks_hold_no_adapters(lora: LoraConfig, checkpoint: bool) -> None:
    """The gradient is measured where there is one; the plan is near the peak of an update."""
    model = loaded("granite", lora=lora)
    with gradient_checkpointing(model, checkpoint):
        need = memory.training(model, sequence())
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        Scorer(model, check=False).log_prob_and_gradient(sequence())
    measured = mx.get_peak_memory() - before
    # Blocks below all adapters count like those of their kind above, which have a gradient.
    assert 0.85 * measured <= need.work <= 2 * measured


def test_refused_when_it_cannot_fit(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run larger than the machine stops before training, and says what to change."""
    config = configs.load(write_config(settings))
    make_pairs(config)
    monkeypatch.setattr(device, "available", lambda: 1000)
    with pytest.raises(UserError, match="data.max_length.* train.grad_checkpoint") as error:
        train_dpo(config)
    assert "\n" not in str(error.value)
    assert not (config.run.path / "adapters").exists()


@pytest.mark.parametrize(("batch", "prompt", "answer"), [(2, 40, 60), (4, 150, 120)])
@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_sampling_is_planned(kind: str, batch: int, prompt: int, answer: int) -> None:
    """For short and long answers, sampling that is short of memory takes at most 15% more than the
    plan (and a megabyte of small arrays), and the plan at most 40% more than it: of attention the
    plan counts each block's scores, which are not there at once.
    """
    model = loaded(kind)
    need = memory.sampling(model, batch, prompt, answer, "generation.batch_size")
    prompts = [[7 + i for i in range(prompt)] for _ in range(batch)]
    tokenizer = SimpleNamespace(eos_token_ids=set(), decode=lambda ids: "")
    settings = GenerationConfig(max_tokens=answer)
    mx.eval(model.parameters())
    device.release()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with memory.lowest_memory_limit():
        sample_batch(model, tokenizer, Batch(prompts, seed=0), settings)
    peak = mx.get_peak_memory() - before
    assert (peak - 1e6) / 1.15 <= need.work <= 1.4 * peak


def bfloat16_base(path: str, weight: mx.array) -> mx.array:
    return weight if "lora_" in path else weight.astype(mx.bfloat16)


@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_stage_11_is_planned(kind: str) -> None:
    """Fusing and comparing in float32, over a bfloat16 base: the peak is within 15% of the plan."""
    model = loaded(kind)
    model.update(tree_map_with_path(bfloat16_base, model.parameters()))
    config = Config(
        model="",
        run_dir="",
        data=DataConfig(source="", train_pairs="", valid_pairs=""),
        train=TrainConfig(learning_rate=1e-4),
    )
    mx.eval(model.parameters())
    need = memory.largest(memory.stage_11(model, config, sequence(64)))
    device.release()
    held_by_others = mx.get_active_memory() - memory.nbytes(model.parameters())
    mx.reset_peak_memory()
    with fusing.activations_in_float32(model):
        Scorer(model).log_prob(sequence(64))
    fusing.fuse(model, "stochastic", mx.bfloat16)
    with fusing.activations_in_float32(model):
        Scorer(model).log_prob(sequence(64))
    assert need.total == pytest.approx(mx.get_peak_memory() - held_by_others, rel=0.15)


def test_the_larger_of_both_models_counts_in_stage_12(granite: Path) -> None:
    """Base and fused model take turns: what one takes more than the other is planned for both."""
    model = load_model(str(granite)).model
    config = Config(
        model="",
        run_dir="",
        data=DataConfig(source="", train_pairs="", valid_pairs=""),
        train=TrainConfig(learning_rate=1e-4),
    )
    lengths = memory.LargestSizes(questions=2, prompt=30, answer=20, longest=sequence(40))
    own = memory.nbytes(model.parameters())
    for other, expected in ((0, own), (10**9, 10**9)):
        needs = memory.stage_12(model, config, lengths, other)
        assert [need.weights for need in needs] == [expected] * 2
    assert len(lengths.scored.ids) == 50, "a sampled answer is scored, too"


def test_comparing_in_stage_11_is_planned(tmp_path: Path) -> None:
    """Scoring in float32, with the float32 embedding beside the model's own, lies within 15% of the
    plan of a bfloat16 model whose vocabulary is large.
    """
    model = loaded("granite", mx.bfloat16, vocab_size=40_000)
    config = Config(
        model="",
        run_dir=str(tmp_path),
        data=DataConfig(source="", train_pairs="", valid_pairs=""),
        train=TrainConfig(learning_rate=1e-4),
    )
    mx.eval(model.parameters())
    _, need = memory.stage_11(model, config, sequence())
    device.release()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with fusing.activations_in_float32(model):
        Scorer(model).log_prob(sequence())
    assert need.work == pytest.approx(mx.get_peak_memory() - before, rel=0.15)


def test_the_stage_that_needs_most_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the largest need, with its own remedy and figures."""
    small = memory.Need("an update", "lower a", 10**9, 0, 10**9)
    large = memory.Need("sampling 32 answers", "lower b", 10**9, 0, 2 * 10**9, processes=2)
    monkeypatch.setattr(device, "available", lambda: 6 * 10**9)
    assert memory.require([small, large], "m") is large
    monkeypatch.setattr(device, "available", lambda: 5 * 10**9)
    with pytest.raises(UserError) as error:
        memory.require([small, large], "m")
    assert str(error.value) == (
        "m: needs 6.00 GB for sampling 32 answers (weights 1.00, work 2.00, in each of 2 "
        "processes), but this machine has 5.00 GB available; start the runner with --launch none, "
        "lower b, or set model to a smaller or quantised model"
    )
