"""Peak memory of a training step at Granite's true width, and what the plan said it would be.

    python tests/benchmarks/bench_memory.py [--layers 4,7,10] [--lengths 256,512,1024] [--full]

Each row is a fresh process with random weights: an update of the real trainer (a pair whose sides
both have that many tokens, the optimizer's step) with gradient checkpointing, and
`dpo_mlx.scoring.memory.training` for the same model and length before it. Read `plan / peak` as
the plan's error; RSS is what the operating system counted, more than MLX's own peak.

The figure for all 40 layers comes from a line through the rows: peak - weights - adapters and
their two moments (known by their bytes) = a + b layers + c length + d layers length. `fit / peak`
shows how well it holds. For bfloat16 the weights take 2 bytes each; the adapters, their moments and
the gradients (b) stay float32; d, the input of every block that checkpointing keeps, is in the
model's dtype and halved; a and c, one block's recomputation and the head, mix both and are left as
they are in float32, which errs on the high side. What a bfloat16 head takes more than
one in float32, its rows being cast block by block, is measured with the head alone and added. With
--dtype bfloat16 (for a GPU: slow on a CPU) all of it is measured, nothing is halved or added.
`by bytes` is a second way to the same figure, free of the line: gradients are 2 adapters' bytes,
block inputs are layers x length x 2048 elements, and the rest is the most that any row of that
length took beyond these. The two should agree: b is near an adapter layer's two gradients, d near
8192 bytes. Use layer counts that end in a Mamba block (not 6), as the whole model does.

--full runs one update of the whole 40-layer geometry as well: 12.8 GB of weights in float32.
"""

from __future__ import annotations

import itertools
from argparse import Namespace

import common
import mlx.core as mx
import numpy as np
import ours
from dpo_mlx.model.adapters import attach_lora
from dpo_mlx.scoring import memory
from dpo_mlx.scoring.log_probs import differentiable_log_probs, find_head
from mlx.utils import tree_flatten

LAYERS = 40  # of the whole model
WIDTH = 2048
FLOAT32, BFLOAT16 = "float32", "bfloat16"
ITEMSIZE = {FLOAT32: 4, BFLOAT16: 2}


def main() -> None:
    args = arguments()
    tasks = [
        {"model": layers, "length": length, "dtype": args.dtype}
        for layers, length in itertools.product(args.layers, args.lengths)
    ]
    full = {"model": LAYERS, "length": args.full_length, "dtype": args.dtype}
    results = []
    for task in [*tasks, *([full] if args.full else [])]:
        results.append({**task, **common.measure("bench_memory.py", task)})
        row = results[-1]
        said = row.get("failed") or f"{row['peak'] / 1e9:.2f} GB, {row['seconds']:.0f} s per update"
        print(f"{task['model']} layers, {task['length']} tokens: {said}", flush=True)
    measured = [row for row in results[: len(tasks)] if "failed" not in row]
    line = fit(measured) if can_fit(measured) else None
    done = [row for row in results if "failed" not in row]
    common.table(f"peak of an update, {args.dtype}, checkpointed", rows(done, line))
    extrapolated = []
    if line is not None:
        extrapolated = whole_model(line, measured, args)
        a, b, c, d = line
        found = (
            f"{a / 1e6:.1f} MB + layers {b / 1e6:.2f} MB + length ({c:.0f} + layers {d:.0f}) bytes"
        )
        common.table(f"all {LAYERS} layers, by the line {found}", extrapolated)
    about = {"line": line, "rows": results, "whole_model": extrapolated}
    common.save(args, about)


def arguments() -> Namespace:
    parser = common.parser(__doc__, "bench_memory")
    parser.add_argument("--layers", type=common.numbers, default=[4, 7, 10])
    parser.add_argument("--lengths", type=common.numbers, default=[256, 512, 1024])
    parser.add_argument("--dtype", choices=(FLOAT32, BFLOAT16), default=FLOAT32)
    parser.add_argument("--full", action="store_true", help=f"an update of all {LAYERS} layers")
    parser.add_argument("--full-length", type=int, default=256, help="tokens of each side")
    return parser.parse_args()


def worker(task: common.Values) -> common.Values:
    """The plan and then the peak, of a model that was in no memory before the plan."""
    if "head" in task:
        return {"peak": head_alone(task["head"], task["length"])}
    mx.random.seed(0)
    model = ours.granite(task["model"], task["dtype"])
    attach_lora(model, ours.LORA)
    pair = ours.random_pair(model, task["length"] - ours.PROMPT)
    plan = ours.planned(model, pair, checkpoint=True)
    ours.materialise(model)
    steps = ours.train(model, ours.examples(model, [pair]), checkpoint=True, epochs=2)
    return {
        "peak": max(step.peak for step in steps),
        "plan": plan,
        "seconds": steps[-1].seconds,
        **sizes(model),
    }


def head_alone(dtype: str, length: int) -> int:
    """Bytes that log-probs and their gradient in the hidden states take beside the head."""
    _, head = find_head(ours.granite(1, dtype))
    hidden = mx.random.normal((length - ours.PROMPT, WIDTH)).astype(getattr(mx, dtype))
    targets = mx.arange(hidden.shape[0])
    mx.eval(head.layer.parameters(), hidden, targets)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.value_and_grad(lambda x: differentiable_log_probs(x, targets, head).sum())(hidden))
    return mx.get_peak_memory() - before


def head_s_casts(length: int) -> int:
    """Bytes that a bfloat16 head takes more than a float32 one."""
    peaks = {}
    for dtype in (FLOAT32, BFLOAT16):
        found = common.measure("bench_memory.py", {"head": dtype, "length": length})
        if "failed" in found:
            raise SystemExit(found["failed"])
        peaks[dtype] = found["peak"]
    return max(0, peaks[BFLOAT16] - peaks[FLOAT32])


def sizes(model: object) -> dict[str, int]:
    """Bytes of weights, adapters, and of the weights' elements alone (their count)."""
    adapters = memory.nbytes(model.trainable_parameters())  # type: ignore[attr-defined]
    everything = dict(tree_flatten(model.parameters()))  # type: ignore[attr-defined]
    count = sum(array.size for array in everything.values())
    return {
        "weights": memory.nbytes(everything) - adapters,
        "adapters": adapters,
        "weight_count": count - adapters // 4,
    }


def can_fit(measured: list[common.Values]) -> bool:
    return all(len({row[key] for row in measured}) > 1 for key in ("model", "length"))


def fit(measured: list[common.Values]) -> list[float]:
    """a, b, c, d of the docstring, in bytes: least squares."""
    terms = [predictors(row["model"], row["length"]) for row in measured]
    values = [row["peak"] - held(row) for row in measured]
    return np.linalg.lstsq(np.array(terms), np.array(values), rcond=None)[0].tolist()


def predictors(layers: int, length: int) -> list[float]:
    return [1.0, layers, length, layers * length]


def held(row: common.Values) -> int:
    """Bytes held before a step begins: weights, adapters and the optimizer's two moments."""
    return row["weights"] + 3 * row["adapters"]


def rows(done: list[common.Values], line: list[float] | None) -> list[common.Values]:
    made = []
    for row in done:
        by_line = None
        if line is not None:
            by_line = held(row) + float(np.dot(line, predictors(row["model"], row["length"])))
        made.append(
            {
                "layers": row["model"],
                "tokens": row["length"],
                "weights GB": common.gigabytes(row["weights"]),
                "peak GB": common.gigabytes(row["peak"]),
                "plan GB": common.gigabytes(row["plan"]),
                "plan / peak": round(row["plan"] / row["peak"], 3),
                "fit / peak": None if by_line is None else round(by_line / row["peak"], 3),
                "RSS GB": common.gigabytes(row["peak_rss"]),
                "s/update": row["seconds"],
            }
        )
    return made


def residual(measured: list[common.Values], length: int) -> float:
    """The most that a row of this length took beyond what is known by bytes."""
    return max(
        row["peak"] - held(row) - known_step(row, row["model"], length, ITEMSIZE[row["dtype"]])
        for row in measured
        if row["length"] == length
    )


def known_step(known: common.Values, layers: int, length: int, itemsize: int) -> int:
    """Bytes of both sides' gradients and of the block inputs that checkpointing keeps."""
    return 2 * known["adapters"] + layers * length * WIDTH * itemsize


def whole_model(
    line: list[float], measured: list[common.Values], args: Namespace
) -> list[common.Values]:
    """Bytes at the peak of all layers, part by part, as the docstring derives them."""
    model = ours.granite(LAYERS, args.dtype)  # of which only shapes are looked at
    attach_lora(model, ours.LORA)
    known = sizes(model)
    a, b, c, d = line
    made = []
    for dtype, length in itertools.product(dict.fromkeys([args.dtype, BFLOAT16]), args.lengths):
        same = dtype == args.dtype
        casts = 0 if same else head_s_casts(length)
        weights = known["weight_count"] * ITEMSIZE[dtype]
        parts = {
            "weights GB": weights,
            "adapters, moments GB": 3 * known["adapters"],
            "gradients GB": b * LAYERS,
            "block inputs GB": d * LAYERS * length * (1.0 if same else 0.5),
            "one block, head GB": a + c * length,
            "head's casts GB": casts,
        }
        total = common.gigabytes(sum(parts.values()))
        step = known_step(known, LAYERS, length, ITEMSIZE[dtype])
        other = weights + 3 * known["adapters"] + step + residual(measured, length) + casts
        listed = {name: common.gigabytes(value) for name, value in parts.items()}
        made.append({"dtype": dtype, "tokens": length, **listed, "peak GB": total})
        made[-1]["by bytes GB"] = common.gigabytes(other)
    return made


if __name__ == "__main__":
    common.start(main, worker)
