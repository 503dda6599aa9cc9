"""What training costs: against answer length, against pairs, against the machine's matmul rate.

    python tests/benchmarks/bench_cost.py [--model FOLDER] [--granite-layers N] [--updates N]

Four tables. All use the real trainer, float32, LoRA of rank 8 on all linear layers, random ids, a
prompt of 32 tokens, one pair an update and a fresh process a row; the first update is a warm-up.
1. Length: seconds and peak memory of a pair against the tokens of each answer. `us/token` that
   stays level means cost linear in length; its slow rise is attention.
2. Pairs: seconds of an epoch against its pairs, and the line through them (`fit / s` near 1).
3. Rate: the share of this machine's float32 matmul rate that training reaches. The rate is the
   median of square matrix products in the same process, one after each update. The work is what
   the maths needs for both sides of a pair, whatever the code does:
   - a linear layer of P weights, T tokens: 2 P T forward, 2 P T for the gradient of its input (none
     for the layers that read the embeddings, which are frozen), none for frozen weights;
   - its adapter of R = rank (in + out) weights: 2 R T forward, 4 R T backward;
   - attention: two products over the causal half, 2 T (T + 1) (heads x head size) forward, twice
     that backward; a Mamba-2 state: 2 x 2 (heads x head size x state) T forward, twice backward;
   - the head, V x D, over the A positions that score an answer alone: 2 V D A for the logits and
     2 V D A for its transpose.
   Norms, activations, the convolution and the optimizer count as nothing. With checkpointing the
   second forward is overhead and not counted either: `share` falls though the processor works as
   hard; `share done` counts it.
4. Flat memory: MLX's active memory after 50 updates of a tiny model, and after --updates.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

import common
import mlx.core as mx
import numpy as np
import ours

EARLY = 50  # updates after which memory must have settled
READS_EMBEDDINGS = ("q_proj", "k_proj", "v_proj", "in_proj")


def main() -> None:
    args = arguments()
    model = str(args.model)
    results = {
        "length": lengths(model, args),
        "pairs": epochs(model, args),
        "rate": rates([model, args.granite_layers], args),
        "memory": memories(args),
    }
    common.save(args, results)


def arguments() -> Namespace:
    parser = common.parser(__doc__, "bench_cost")
    default = common.ROOT / "data/models/smollm2-135m-instruct"
    parser.add_argument("--model", type=Path, default=default, help="a model folder")
    parser.add_argument("--answers", type=common.numbers, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--pairs", type=common.numbers, default=[4, 8, 16, 32], help="of an epoch")
    parser.add_argument("--pairs-answer", type=int, default=128, help="tokens of their answers")
    parser.add_argument("--granite-layers", type=int, default=4, help="at Granite's true width")
    parser.add_argument("--rate-answer", type=int, default=224, help="tokens of an answer there")
    parser.add_argument("--matmul", type=int, default=2048, help="rows of the square matrices")
    parser.add_argument("--steps", type=int, default=4, help="measured updates of a process")
    parser.add_argument("--updates", type=int, default=500, help="of the flat-memory check")
    return parser.parse_args()


def run(task: common.Values) -> common.Values:
    """A measured process; there is nothing to compare when it fails."""
    result = common.measure("bench_cost.py", task)
    if "failed" in result:
        raise SystemExit(f"{task}: {result['failed']}")
    return result


def lengths(model: str, args: Namespace) -> list[common.Values]:
    rows = []
    for checkpoint in (False, True):
        for answer in args.answers:
            task = {"task": "train", "model": model, "checkpoint": checkpoint, "answer": answer}
            found = run({**task, "pairs": args.steps + 1})
            row = {
                "answer tokens": answer,
                "checkpointing": "yes" if checkpoint else "no",
                "s/pair": found["median_seconds"],
                "us/token": found["median_seconds"] * 1e6 / (2 * (answer + ours.PROMPT)),
                "MLX peak GB": common.gigabytes(found["peak_mlx"]),
                "RSS GB": common.gigabytes(found["peak_rss"]),
            }
            rows.append(row)
    common.table("cost of a pair against the length of its answers", rows)
    return rows


def epochs(model: str, args: Namespace) -> list[common.Values]:
    rows = []
    for count in args.pairs:
        task = {"task": "train", "model": model, "checkpoint": False, "answer": args.pairs_answer}
        found = run({**task, "pairs": count + 1})
        seconds = sum(step["seconds"] for step in found["steps"])
        rows.append({"pairs": count, "epoch s": seconds, "MLX peak GB": found["peak_mlx"] / 1e9})
    slope, start = np.polyfit(args.pairs, [row["epoch s"] for row in rows], 1)
    for row in rows:
        row["fit / s"] = float((start + slope * row["pairs"]) / row["epoch s"])
    common.table(f"an epoch: {start:.2f} s + {slope:.3f} s per pair", rows)
    return rows


def rates(names: list[Any], args: Namespace) -> list[common.Values]:
    rows = []
    name = Path(names[0]).name
    for model in names:
        for checkpoint in (False, True):
            task = {"task": "rate", "model": model, "checkpoint": checkpoint, "size": args.matmul}
            found = run({**task, "answer": args.rate_answer, "pairs": args.steps + 1})
            reached = found["needed"] / found["median_seconds"]
            done = found["needed"] + (found["forward"] if checkpoint else 0)
            row = {
                "model": f"Granite's width, {model} layers" if isinstance(model, int) else name,
                "checkpointing": "yes" if checkpoint else "no",
                "GFLOP/pair": round(found["needed"] / 1e9),
                "s/pair": found["median_seconds"],
                "GFLOP/s": round(reached / 1e9),
                "matmul GFLOP/s": round(found["rate"] / 1e9),
                "share": reached / found["rate"],
                "share done": done / found["median_seconds"] / found["rate"],
            }
            rows.append(row)
    common.table("share of the machine's float32 matmul rate", rows)
    return rows


def memories(args: Namespace) -> list[common.Values]:
    rows = []
    for model in ours.tiny.SPECIAL:
        found = run({"task": "memory", "model": model, "updates": args.updates})
        before, after = found["early"], found["late"]
        row = {
            "tiny model": model,
            "updates": args.updates,
            f"MB after {min(EARLY, args.updates)}": round(before / 1e6, 3),
            "MB at the end": round(after / 1e6, 3),
            "grown by bytes": after - before,
            "RSS GB": common.gigabytes(found["peak_rss"]),
        }
        rows.append(row)
    common.table("active memory over updates", rows)
    return rows


# In the measured process ---------------------------------------------------------------------


def worker(task: common.Values) -> common.Values:
    model = ours.load(task)
    if task["task"] == "memory":
        return flat_memory(model, task["updates"])
    pairs = [ours.random_pair(model, task["answer"], seed) for seed in range(task["pairs"])]
    examples = ours.examples(model, pairs)
    if task["task"] == "train":
        return ours.summary(model, ours.train(model, examples, task["checkpoint"]))
    rates: list[float] = []
    products = square_matrices(task["size"])
    steps = ours.train(
        model, examples, task["checkpoint"], after=lambda update: rates.append(products())
    )
    forward, needed = work(model, len(pairs[0].chosen.ids) - 1, task["answer"])
    found = {"rate": median(rates), "forward": 2 * forward, "needed": 2 * needed}  # both sides
    return {**ours.summary(model, steps), **found}


def square_matrices(size: int) -> Any:
    """A function that multiplies two of them and returns the rate in FLOP/s."""
    left, right = mx.random.normal((2, size, size))
    mx.eval(left, right)

    def rate() -> float:
        since = time.perf_counter()
        mx.eval(left @ right)
        return 2 * size**3 / (time.perf_counter() - since)

    rate()
    return rate


def work(model: Any, tokens: int, answer: int) -> tuple[float, float]:
    """(FLOPs of a side's forward through the blocks, FLOPs of a side forward and backward)."""
    forward = backward = 0.0
    for index, block in enumerate(model.layers):
        for name, module in block.named_modules():
            if "lora_a" in module:
                weights = module.linear.weight.size
                adapter = module.lora_a.size + module.lora_b.size
                forward += 2 * (weights + adapter) * tokens
                backward += 4 * adapter * tokens
                if index or not name.endswith(READS_EMBEDDINGS):
                    backward += 2 * weights * tokens
        mixing = mixer(block, tokens)
        forward, backward = forward + mixing, backward + 2 * mixing
    head = 2 * model.model.embed_tokens.weight.size * answer
    return forward, forward + backward + 2 * head


def mixer(block: Any, tokens: int) -> float:
    """FLOPs forward of mixing positions: attention's two products, or the state in and out."""
    if "self_attn" in block:
        width = block.self_attn.q_proj.linear.weight.shape[0]
        return 2 * tokens * (tokens + 1) * width
    state = block.mamba.intermediate_size * block.mamba.ssm_state_size
    return 4 * state * tokens


def flat_memory(model: Any, updates: int) -> common.Values:
    """Active bytes after EARLY updates and after the last, over pairs of many lengths."""
    pairs = [ours.random_pair(model, 8 + 3 * seed, seed) for seed in range(25)]
    active: list[int] = []
    ours.train(
        model,
        ours.examples(model, pairs),
        checkpoint=False,
        epochs=-(-updates // len(pairs)),
        after=lambda update: active.append(mx.get_active_memory()),
    )
    return {"early": active[min(EARLY, updates) - 1], "late": active[updates - 1]}


if __name__ == "__main__":
    common.start(main, worker)
