"""What fusing keeps of the adapters' margin: rounded to nearest, stochastically, quantised again.

    python tests/benchmarks/bench_fuse.py [--model FOLDER] [--learning-rate R] [--updates 1,2,...]
                                          [--bases bfloat16 4-bit]

SmolLM2 learns the shipped sample's voice by the real trainer, one pair an update, at the plan's
rate. After each of --updates the adapters are fused in every way, and the mean margin (nats, of
held-out pairs, against the base model) of adapters and fused model is measured. Two bases:
1. `bfloat16`: the weights are bfloat16 numbers, as of a model from the hub.
     delta       what the adapters add to a weight, over half its distance to the next bfloat16
                 number; the median. Below 1 rounding to nearest loses it
     moved       share of the adapted weights that change when rounded to nearest
     margin      of the adapters
     mlx-lm      share of it that mlx-lm's own fuse keeps
     nearest, stochastic, spread    the same rounded in these ways from float32; of several seeds
                 the mean and the standard deviation
     f16 near., f16 stoch.    the same into float16
2. `4-bit`: the weights are those of a 4-bit model. To bfloat16 by both roundings, and quantised
   again to 8 and to 4 bits, whose margin is against the base model in the same bits.
All is computed in float32, on the weights as they are, so that only their rounding counts.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import ours
from dpo_mlx.config import NEAREST, STOCHASTIC, GenerationConfig, LoraConfig
from dpo_mlx.data.encoding import EncodedPair, Encoder
from dpo_mlx.data.pairs import Pair
from dpo_mlx.model import fusing
from dpo_mlx.model.adapters import attach_lora
from dpo_mlx.model.loading import load_model
from dpo_mlx.parallel.worker import Worker, answer_all
from dpo_mlx.scoring.scorer import Scorer
from mlx.utils import tree_flatten, tree_unflatten

LORA = LoraConfig(rank=16, scale=20.0)  # the shipped Granite config's
GENERATION = GenerationConfig(max_tokens=64, batch_size=32)
BASES = BFLOAT16, FOUR_BIT = "bfloat16", "4-bit"
GROUP_SIZE = 64


def main() -> None:
    args = arguments()
    results = {}
    for base in args.bases:
        task = {**vars(args), "base": base, "model": str(args.model), "data": str(args.data)}
        found = common.measure("bench_fuse.py", {k: v for k, v in task.items() if k != "out"})
        if "failed" in found:
            raise SystemExit(f"{base}: {found['failed']}")
        results[base] = found["rows"]
        common.table(f"kept of the margin, weights of a {base} model", found["rows"])
    common.save(args, results)


def arguments() -> Namespace:
    parser = common.parser(__doc__, "bench_fuse")
    default = common.ROOT / "data/models/smollm2-135m-instruct"
    sample = common.ROOT / "data/sample/generated_answers.jsonl"
    parser.add_argument("--model", type=Path, default=default, help="a model folder")
    parser.add_argument("--data", type=Path, default=sample, help="questions and answers")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--updates", type=common.numbers, default=[1, 2, 4, 8, 16, 32, 64, 100])
    parser.add_argument("--train", type=int, default=25, help="pairs")
    parser.add_argument("--valid", type=int, default=8, help="pairs")
    parser.add_argument("--seeds", type=int, default=3, help="of stochastic rounding")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    return parser.parse_args()


# In the measured process ---------------------------------------------------------------------


def worker(task: common.Values) -> common.Values:
    base = Base(task["model"], task["base"])
    model, encoder = base.model(), Encoder(base.tokenizer)
    pairs = sampled(task, model, base.tokenizer, encoder)
    train, valid = pairs[task["valid"] :], pairs[: task["valid"]]
    attach_lora(model, LORA)
    examples, rows = ours.examples(model, train), []
    measured = Measured(base, valid, model, task["seeds"])

    def after(update: int) -> None:
        if update in task["updates"]:
            rows.append({"updates": update, **measured.row(model)})

    epochs = -(-max(task["updates"]) // len(train))
    rate = task["learning_rate"]
    ours.train(model, examples, False, epochs, after, rate)
    return {"rows": rows}


def sampled(task: common.Values, model: Any, tokenizer: Any, encoder: Encoder) -> list[EncodedPair]:
    """The sample's answers as chosen, the base model's own as rejected ones."""
    lines = Path(task["data"]).read_text().splitlines()[: task["train"] + task["valid"]]
    rows = [json.loads(line) for line in lines]
    prompts = [encoder.prompt_ids(row["question"]) for row in rows]
    answers = answer_all(Worker(model, tokenizer), prompts, GENERATION, seed=0)
    return [
        encoder.pair(Pair(row["question"], row["answer"], said.text, said.finish, line))
        for line, (row, said) in enumerate(zip(rows, answers, strict=True), start=1)
    ]


class Base:
    """The base model: its weights as of the real thing, and in float32 to compute with."""

    def __init__(self, folder: str, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.tokenizer = load_model(folder).tokenizer

    def real(self) -> Any:
        made = load_model(self.folder).model
        made.set_dtype(mx.bfloat16)
        if self.kind == FOUR_BIT:
            nn.quantize(made, GROUP_SIZE, 4)
        return made

    def model(self) -> Any:
        return computable(self.real())


def computable(model: Any) -> Any:
    """The same numbers in float32, which a CPU is quick with."""
    fusing.fuse(model, NEAREST, mx.float32)
    fusing.cast(model, mx.float32)
    return model


class Measured:
    """Margins of held-out pairs under models that are made of the base model and adapters."""

    def __init__(self, base: Base, valid: list[EncodedPair], model: Any, seeds: int) -> None:
        self.base, self.valid, self.seeds = base, valid, seeds
        self.reference = self.log_ratio(base.model())

    def log_ratio(self, model: Any) -> float:
        """Mean of log p(chosen) - log p(rejected)."""
        scorer = Scorer(model)
        return float(
            np.mean([scorer.log_prob(p.chosen) - scorer.log_prob(p.rejected) for p in self.valid])
        )

    def row(self, model: Any) -> common.Values:
        adapters = model.trainable_parameters()
        margin = self.log_ratio(model) - self.reference

        def kept(change: Callable[[Any], None], reference: float | None = None) -> float:
            made = self.base.real()
            attach_lora(made, LORA)
            made.update(adapters)
            change(made)
            against = self.reference if reference is None else reference
            return (self.log_ratio(computable(made)) - against) / margin

        def fused(how: str, dtype: mx.Dtype = mx.bfloat16, seed: int = 0) -> float:
            return kept(lambda made: fusing.fuse(made, how, dtype, seed))

        stochastic = [fused(STOCHASTIC, seed=seed) for seed in range(self.seeds)]
        columns = {
            "margin": margin,
            "nearest": fused(NEAREST),
            "stochastic": float(np.mean(stochastic)),
            "spread": float(np.std(stochastic)),
        }
        if self.base.kind == FOUR_BIT:
            return columns | {
                f"{bits}-bit": kept(requantized(bits), self.quantized_reference(bits))
                for bits in (8, 4)
            }
        return {
            **deltas(self.base.real(), adapters),
            **columns,
            "mlx-lm": kept(by_mlx_lm),
            "f16 near.": fused(NEAREST, mx.float16),
            "f16 stoch.": fused(STOCHASTIC, mx.float16),
        }

    def quantized_reference(self, bits: int) -> float:
        """That of the base model in so many bits."""
        made = self.base.real()
        requantized(bits)(made)
        return self.log_ratio(computable(made))


def requantized(bits: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        fusing.fuse(model, STOCHASTIC, mx.bfloat16)
        nn.quantize(model, GROUP_SIZE, bits)

    return change


def by_mlx_lm(model: Any) -> None:
    fused = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))


def deltas(real: Any, adapters: Any) -> common.Values:
    """`delta` and `moved` of the docstring."""
    weights, added = dict(tree_flatten(real.parameters())), dict(tree_flatten(adapters))
    sizes, moved = [], []
    for name in added:
        if not name.endswith("lora_a"):
            continue
        module = name.removesuffix(".lora_a")
        weight = weights[f"{module}.weight"].astype(mx.float32)
        delta = LORA.scale * (added[name] @ added[f"{module}.lora_b"]).T
        power = 2 ** mx.floor(mx.log2(mx.maximum(mx.abs(weight), 1e-30)))
        sizes.append(np.array(mx.abs(delta) / (power * 2**-8)).ravel())
        moved.append(np.array((weight + delta).astype(mx.bfloat16) != weight).ravel())
    return {
        "delta": float(np.median(np.concatenate(sizes))),
        "moved": float(np.concatenate(moved).mean()),
    }


if __name__ == "__main__":
    common.start(main, worker)
