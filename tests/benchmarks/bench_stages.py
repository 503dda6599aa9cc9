"""Peak memory of every stage at Granite's true width, beside the plan.

    python tests/benchmarks/bench_stages.py [--layers 10,20] [--stages 06,10,11,12] [--full]

Each row of the table is one activity of a stage with the shipped config. The stage's own code runs
on a few layers with random weights, each count in a fresh process. `work` is MLX's peak beyond the
weights; the line a + b layers through --layers gives the work of all 40. Use multiples of ten:
each ten layers hold nine Mamba blocks and one attention block, as in the whole model. With fewer
than ten the peak rises faster, because MLX allocates for up to some ten blocks that it has queued.
--full also runs all 40 layers: in float32 13 to 17 GB and minutes a row.

  weights   the whole model's in bfloat16, 2 bytes each
  work      everything else: activations, caches, and in stage 10 adapters, moments and gradients.
            Measured in float32, because bfloat16 products are slow on a CPU. That is an upper bound
            for bfloat16, where activations take half. Stage 11 computes in float32 on any machine
            and is measured with bfloat16 weights
  casts     the extra memory of a bfloat16 head, which is cast to float32 block by block. Measured
            on the head alone, with its gradient, and added to the plan too
  plan      the need that dpo_mlx.scoring.memory plans for the 40-layer model. Its weights are
            lazy, and only the first blocks are run
  plan / measured    compares both totals

Prompts have up to 100 tokens, answers 320, the longest sequence 1024 (data.max_length). Sampling
stops after a few tokens: the key and value caches get their final size at once, and nothing else
grows. `fits` compares with 11.45 GB, the recommended working set of a 16 GB M1 or M2.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import common
import mlx.core as mx
import numpy as np
import ours
from bench_memory import BFLOAT16, FLOAT32, LAYERS, head_s_casts
from dpo_mlx import config as configs
from dpo_mlx.data.encoding import EncodedAnswer, EncodedPair
from dpo_mlx.model import fusing
from dpo_mlx.model.adapters import attach_lora
from dpo_mlx.model.sampling import EVALUATED_AT_ONCE, Batch
from dpo_mlx.parallel.worker import Worker, log_probs
from dpo_mlx.scoring import memory
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, KVCache

CONFIG = common.ROOT / "config/mlx_granite-4.0-h-micro_dpo.yaml"
OFFERED = 11.45e9  # bytes: the recommended working set of an M1 or M2 with 16 GB
QUESTIONS, PROMPT, ANSWER = 100, 100, 320
SHORT = 64  # tokens of answers whose length does not matter for the peak
SAMPLED = 4  # tokens after which sampling is stopped
BATCHES = (8, 16, 32)  # values of generation.batch_size


@dataclass(frozen=True)
class Job:
    """One activity of a stage: `run` is a key of RUNS, `place` the index of its need in the stage's
    plan, `batch` generation.batch_size, and `dtype` that of the weights it is measured with.
    """

    stage: str
    run: str
    place: int = 0
    batch: int = BATCHES[0]
    dtype: str = FLOAT32


JOBS = [
    *(Job("06", "sample", batch=batch) for batch in BATCHES),
    Job("10", "update", place=0),
    Job("10", "evaluate", place=1),
    Job("11", "fuse", place=0, dtype=BFLOAT16),
    Job("11", "compare", place=1, dtype=BFLOAT16),
    Job("12", "sample", place=0),
    Job("12", "score", place=1),
]
SCORES = ("update", "score")  # runs that cast a bfloat16 head


def main() -> None:
    args = arguments()
    jobs = [job for job in JOBS if job.stage in args.stages]
    casts = 0
    if any(job.run in SCORES for job in jobs):
        casts = head_s_casts(longest().answer_length)
    results = Results()
    rows, details = [], []
    for job in jobs:
        try:
            row, detail = examined(job, args, results, casts if job.run in SCORES else 0)
        except Failed as failure:
            print(failure, flush=True)
            continue
        rows.append(row)
        details.append({**asdict(job), **detail})
        print(f"{row['stage']} {row['what']}: {row['total GB']} GB", flush=True)
        common.write(args, {"rows": rows, "details": details})
    title = f"all {LAYERS} layers, weights in bfloat16, of {OFFERED / 1e9} GB"
    common.table(title, rows)
    common.save(args, {"rows": rows, "details": details})


def arguments() -> Namespace:
    parser = common.parser(__doc__, "bench_stages")
    parser.add_argument("--layers", type=common.numbers, default=[10, 20])
    parser.add_argument("--stages", type=lambda t: t.split(","), default=["06", "10", "11", "12"])
    parser.add_argument("--full", action="store_true", help=f"also measure all {LAYERS} layers")
    args = parser.parse_args()
    if len(set(args.layers)) < 2 or any(count % 10 for count in args.layers):
        parser.error("--layers: take two multiples of ten or more")
    return args


class Failed(Exception):
    """A measured process did not come to its end."""


class Results:
    """Results of measured processes. Stages that share a task measure it once."""

    def __init__(self) -> None:
        self._known: dict[str, common.Values] = {}

    def of(self, **task: Any) -> common.Values:
        key = str(task)
        if key not in self._known:
            self._known[key] = common.measure("bench_stages.py", task)
        if why := self._known[key].get("failed"):
            raise Failed(f"{task}: {why}")
        return self._known[key]


def examined(
    job: Job, args: Namespace, results: Results, casts: int
) -> tuple[common.Values, common.Values]:
    """(a row of the table, the measurements behind it)."""
    task = {"run": job.run, "batch": job.batch, "dtype": job.dtype}
    work = [results.of(**task, layers=count)["work"] for count in args.layers]
    line = np.polyfit(args.layers, work, 1)
    extrapolated = float(np.polyval(line, LAYERS))
    plans = results.of(plan=job.stage, batch=job.batch, dtype=job.dtype)
    plan = plans["needs"][job.place]
    total = plans["weights"] + extrapolated + casts
    row = {
        "stage": job.stage,
        "what": plan["what"],
        "weights GB": common.gigabytes(plans["weights"]),
        "work GB": common.gigabytes(extrapolated),
        "casts GB": common.gigabytes(casts),
        "total GB": common.gigabytes(total),
        "plan GB": common.gigabytes(plans["weights"] + plan["work"] + casts),
        "plan / measured": (plans["weights"] + plan["work"] + casts) / total,
        "fits": "yes" if total <= OFFERED else "no",
    }
    if args.full:
        row["40 layers GB"] = common.gigabytes(results.of(**task, layers=LAYERS)["work"])
    return row, {"line": line.tolist(), "work": dict(zip(args.layers, work, strict=True))}


def shipped(batch: int) -> configs.Config:
    """The shipped config with this generation.batch_size."""
    config = configs.load(CONFIG)
    generation = replace(config.generation, max_tokens=ANSWER, batch_size=batch)
    return replace(config, generation=generation)


def longest() -> EncodedAnswer:
    """A sequence of the config's data.max_length."""
    length = shipped(BATCHES[0]).data.max_length
    return EncodedAnswer(tuple(range(length)), PROMPT)


# In the measured process ---------------------------------------------------------------------


def worker(task: common.Values) -> common.Values:
    mx.random.seed(0)
    config = shipped(task["batch"])
    if "plan" in task:
        return planned(task["plan"], config, task["dtype"])
    model = ours.granite(task["layers"], task["dtype"])
    ours.materialise(model)
    weights = memory.nbytes(model.parameters())
    return {"work": RUNS[task["run"]](model, config) - weights}


def planned(stage: str, config: configs.Config, dtype: str) -> common.Values:
    """Bytes of the weights in bfloat16, and of each need of a stage beyond its weights."""
    model = ours.granite(LAYERS, dtype)
    lengths = memory.LargestSizes(QUESTIONS, PROMPT, ANSWER, longest())
    if stage in ("10", "11"):
        attach_lora(model, config.lora)
    if stage == "11":
        needs = memory.stage_11(model, config, lengths.longest)
    elif stage == "10":
        needs = memory.stage_10(model, config, lengths, longest())
    else:
        needs = {"06": memory.stage_06, "12": memory.stage_12}[stage](model, config, lengths)
    parameters = dict(tree_flatten(model.parameters()))
    count = sum(array.size for name, array in parameters.items() if "lora_" not in name)
    return {
        "weights": 2 * count,
        "needs": [{"what": need.what, "work": need.total - need.weights} for need in needs],
    }


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes in memory at the peak of `run`."""
    mx.clear_cache()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory()


def sample(model: Any, config: configs.Config) -> int:
    """Sample a batch of answers, as stages 06 and 12 do."""
    return peak_of(lambda: answer(model, config, config.generation.batch_size))


def evaluate(model: Any, config: configs.Config) -> int:
    """Sample an evaluation's answers while the optimizer's state is in memory."""
    attach_lora(model, config.lora)
    optimizer = AdamW(learning_rate=0.0)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    batch = min(EVALUATED_AT_ONCE, config.train.eval_questions)
    return peak_of(lambda: answer(model, config, batch))


def answer(model: Any, config: configs.Config, batch: int) -> None:
    """Sample answers to prompts of several lengths; no answer ends by itself."""
    whole = -(-(PROMPT + ANSWER) // KVCache.step) * KVCache.step
    KVCache.step = BatchKVCache.step = whole
    tokenizer = SimpleNamespace(eos_token_ids=set(), decode=lambda ids: "")
    prompts = [[1000 + i for i in range(PROMPT - place)] for place in range(batch)]
    Worker(model, tokenizer).answers(
        [Batch(prompts, seed=0)], replace(config.generation, max_tokens=SAMPLED)
    )


def update(model: Any, config: configs.Config) -> int:
    """Train on two pairs in one update. It peaks in the gradient of the second pair's rejected
    answer, when the first pair's gradient and the chosen answer's are in memory.
    """
    attach_lora(model, config.lora)
    short = ours.random_pair(model, SHORT, seed=1, prompt=PROMPT)
    last = EncodedPair(short.chosen, longest(), 2)
    examples = ours.examples(model, [short, last])
    checkpoint = config.train.grad_checkpoint
    steps = ours.train(model, examples, checkpoint, accumulation=len(examples))
    return max(step.peak for step in steps)


def score(model: Any, config: configs.Config) -> int:
    """Score the longest sequence with a model without adapters."""
    return peak_of(lambda: Worker(model).log_probs([longest()]))


def fuse(model: Any, config: configs.Config) -> int:
    attach_lora(model, config.lora)
    mx.eval(model.parameters())
    dtype = fusing.target_dtype(model, config.fuse.dtype)
    return peak_of(lambda: fusing.fuse(model, config.fuse.rounding, dtype))


def compare(model: Any, config: configs.Config) -> int:
    """Score the longest sequence with base and adapters, as stage 11 does."""
    attach_lora(model, config.lora)
    mx.eval(model.parameters())
    short = ours.random_pair(model, SHORT, prompt=PROMPT)

    def in_float32() -> None:
        with fusing.activations_in_float32(model):
            log_probs(Worker(model), [EncodedPair(short.chosen, longest(), 1)])

    return peak_of(in_float32)


RUNS = {run.__name__: run for run in (sample, evaluate, update, score, fuse, compare)}


if __name__ == "__main__":
    common.start(main, worker)
