"""Training on tiny models while the answers it is judged by are written beforehand."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from dpo_mlx.config import Config
from dpo_mlx.data.encoding import Encoder
from dpo_mlx.data.pairs import Pair
from dpo_mlx.files import digest, jsonl, ownership, results
from dpo_mlx.files.model_files import ADAPTERS
from dpo_mlx.files.results import Evaluation, Measures
from dpo_mlx.model.adapters import attach_lora, save_adapters
from dpo_mlx.model.loading import load_model
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.scoring.losses import Sides
from dpo_mlx.scoring.objectives import DPO, Example
from dpo_mlx.scoring.scorer import Scorer
from dpo_mlx.training.checkpoint import Checkpoints, State
from dpo_mlx.training.metrics import MEASURED, MetricsFile
from dpo_mlx.training.trainer import Examples, Trainer
from mlx.utils import tree_flatten

TRAIN = [
    Pair(f"Why {i} {word}?", f"**{word}!** Yes.", f"It is {word}, {i} times.", line=i)
    for i, word in enumerate(["odd", "red", "hot", "big", "shy", "dry", "sad"], start=1)
]
VALID = [Pair("Why 9 old?", "**old!** Yes.", "It is old, 9 times.", line=1)]

SCRIPT = Path(__file__).parents[1] / "scripts/phase4-fine-tune-model/10_train_dpo.py"

# Plain DPO without a phase of SFT before it: what most tests are about.
DPO_ALONE: dict[str, Any] = {
    "sft": {"epochs": 0},
    "dpo": {"nll_weight": 0.0, "match_length": False},
}

# Settings of a run whose paths are relative to the folder it is made in, so that it can be copied
# and compared.
IN_FOLDER: dict[str, Any] = {
    "run_dir": "run",
    "data": {
        "source": "source.jsonl",
        "train_pairs": "run/pairs/train.jsonl",
        "valid_pairs": "run/pairs/valid.jsonl",
        "valid_fraction": 0.25,
        "max_length": 256,
    },
    "lora": {"rank": 4},
    **DPO_ALONE,
}

# Limits of stage 12 that every model keeps, for runs whose answers are of no matter.
NO_LIMITS: dict[str, Any] = {
    "unrelated_tasks": 2,
    "max_distinct2_drop": 1,
    "min_self_ended_ratio": 0,
    "max_base_logprob_drop": 1000,
    "max_length_ratio": 1000,
    "min_sense_ratio": -1e6,
    "max_copied": 1,
    "max_divergence": 1000,
    "min_instructions_ratio": 0,
    "max_choices_drop": 1,
}

Adapters = dict[str, mx.array]


def wrote(**changes: float) -> Measures:
    """What a sound model writes, but for `changes`; numbers that are exact in binary."""
    means = {
        "voice": 0.25,
        "habits": 0.5,
        "distinct2": 1.0,
        "longest_loop": 0.0,
        "self_ended": 1.0,
        "base_logprob_per_token": -1.0,
        "sense": 0.5,
        "median_tokens": 8.0,
        "divergence": 0.0,
        **changes,
    }
    return Measures([means["voice"]], means)


def with_means(measures: Measures, **changes: float) -> Measures:
    """Measures with other means, and with the voice of one answer."""
    means = {**measures.means, **changes}
    return Measures([means["voice"]], means)


class Scripted:
    """In the place of `AnswerEvaluator`: returns a list's measures in turn, its last for ever."""

    def __init__(self, script: Sequence[Measures] = ()) -> None:
        self.script = list(script) or [wrote()]
        self.asked = 0

    def __call__(self) -> Measures:
        self.asked += 1
        return self.script[min(self.asked, len(self.script)) - 1]

    def base(self) -> Measures:
        return wrote()


def swapped(pair: Pair) -> Pair:
    """The opposite preference."""
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen)


class Run:
    """A trainer over a fresh model with its true reference; metrics in run_dir/metrics.jsonl."""

    def __init__(
        self,
        config: Config,
        phase: str = DPO,
        train: Sequence[Pair] = TRAIN,
        valid: Sequence[Pair] = VALID,
        off: float = 0.0,
        script: Sequence[Measures] = (),
    ) -> None:
        self.config = config
        loaded = load_model(config.model)
        self.model, self.encoder = loaded.model, Encoder(loaded.tokenizer)
        scorer = Scorer(self.model)

        def example(pair: Pair) -> Example:
            encoded = self.encoder.pair(pair)
            chosen, rejected = (scorer.log_prob(side) for side in encoded.sides)
            return Example(encoded, Sides(chosen + off, rejected))

        self.train, self.valid = [example(p) for p in train], [example(p) for p in valid]
        mx.random.seed(config.seed)
        attach_lora(self.model, config.lora)
        self.start = self.adapters
        self.answers = Scripted(script)
        self.state = State(phase, base=wrote())
        self.trainer = Trainer(
            Worker(self.model),
            config,
            Examples(self.train, self.valid),
            self.answers,
            MetricsFile(config.run.path / "metrics.jsonl"),
            Checkpoints(config.run.path / "checkpoints"),
            self.state,
        )

    def run(self) -> Run:
        self.trainer.run()
        return self

    @property
    def adapters(self) -> Adapters:
        return dict(tree_flatten(self.model.trainable_parameters()))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return jsonl.read_whole_lines(self.config.run.path / "metrics.jsonl")

    @property
    def updates(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if "grad_norm" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if "eval_loss" in row]

    @property
    def last(self) -> Path:
        """The newest checkpoint of the phase."""
        newest = self.trainer.checkpoints.newest(self.state.phase)
        assert newest is not None
        return newest

    @property
    def best(self) -> Path:
        """The best checkpoint."""
        assert self.state.best is not None
        return self.trainer.checkpoints.best(self.state.best.update)


def determined(metrics: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without what the machine's mood decides."""
    rows = jsonl.read_whole_lines(metrics)
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def crossed_limits_of(config: Config) -> list[str]:
    """The limits that a run's last smoke test found crossed. A random model cannot be in anybody's
    voice, but it can keep to them.
    """
    reasons: list[str] = jsonl.read_json(config.run.report)["verdict"]["reasons"]
    return reasons


def keep_adapters(model: nn.Module, config: Config) -> None:
    """A model's adapters as those that stage 10 kept, with the outcome that stage 11 asks for."""
    folder = config.run.adapters
    with ownership.new_folder(folder) as temporary:
        save_adapters(model, config.lora, temporary)
    kept = Evaluation(7, wrote(voice=1.0))
    sha256 = digest.of_file(folder / ADAPTERS)
    outcome = results.Outcome(7, 0, None, kept, kept, [], [], sha256)
    results.write_outcome(config.run, outcome)


def saved(folder: Path) -> Adapters:
    """The tensors that an adapters' folder holds."""
    found = mx.load(str(folder / ADAPTERS))
    assert isinstance(found, dict)
    return found


def differences(found: Adapters, expected: Adapters) -> float:
    """The largest difference of any entry."""
    assert found.keys() == expected.keys()
    return max(float(mx.abs(found[k] - expected[k]).max()) for k in expected)


def write_pairs(path: Path, count: int, first: int = 0) -> None:
    """A file of so many pairs, whose questions are numbered from `first`."""
    rows = [
        {"prompt": f"Why {i}?", "chosen": f"**So {i}.** Yes.", "rejected": f"It is {i}."}
        for i in range(first, first + count)
    ]
    jsonl.write(path, rows)


def exit_code(config: Path, *more: str, script: Path = SCRIPT) -> Any:
    """A stage's, as its script gives it; stage 10's unless said."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", [str(script), "--config", str(config), *more])
        patch.setattr(sys, "path", sys.path[:])
        runpy.run_path(str(script), run_name="__main__")
    return stopped.value.code
