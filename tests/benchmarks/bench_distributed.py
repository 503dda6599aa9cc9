"""What sharing the work is worth, and what of it is communication.

    python tests/benchmarks/bench_distributed.py [--processes 2] [--pairs 6] [--answer 200]
        [--rounds 3]

An update of the demo model (--model) on --pairs random pairs, whose answers have --answer tokens
more or less, by one process with all of the machine's BLAS threads and by --processes with one
thread each, which talk through MLX's ring on loopback. Rounds alternate; medians are shown.
  s/update      until the adapters are updated on rank 0
  link s        the same update without a pair: adapters passed on and gradients summed, of zeros
  link share    the one in the other: what remains of the gap to a perfect division is work that
                rank 0 does alone, uneven pairs, and the cores' sharing of their memory
  speed         updates per second, over those of one process
Then what a link costs per update: twice the adapters' bytes each way (gradients and adapters; a
ring of N sends 2 (N - 1) / N of them), derived from the bytes at the links' nominal rates.
"""

from __future__ import annotations

import os
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import common
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import ours
import rings
from dpo_mlx.config import Config, DataConfig, LoraConfig, TrainConfig
from dpo_mlx.model.adapters import attach_lora
from dpo_mlx.model.loading import load_model
from dpo_mlx.parallel import distributed
from dpo_mlx.parallel.channel import dismiss, open_channel
from dpo_mlx.scoring import memory
from dpo_mlx.scoring.losses import Sides
from dpo_mlx.scoring.objectives import Dpo, Example
from mlx.utils import tree_flatten

LINKS = {"1 Gbit Ethernet": 0.125e9, "10 Gbit Ethernet": 1.25e9, "Thunderbolt, 20 Gbit": 2.5e9}
GRANITE_RANK = 16  # of the shipped config


def main() -> None:
    args = arguments()
    rows: dict[int, list[common.Values]] = {1: [], args.processes: []}
    for _ in range(args.rounds):
        for count, found in rows.items():
            found.append(measure(args, count))
    table = [row(count, found, rows[1]) for count, found in rows.items()]
    common.table("an update", table)
    links = [by_link(name, rate) for name, rate in LINKS.items()]
    common.table("seconds of communication an update of two machines, derived", links)
    common.save(args, {"rows": table, "links": links})


def arguments() -> Namespace:
    parser = common.parser(__doc__, "bench_distributed")
    default = common.ROOT / "data/models/smollm2-135m-instruct"
    parser.add_argument("--model", type=Path, default=default, help="a model folder")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=6, help="of an update")
    parser.add_argument("--answer", type=int, default=200, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3, help="per round, the first one a warm-up")
    return parser.parse_args()


def measure(args: Namespace, count: int) -> common.Values:
    """The seconds that rank 0 of `count` processes measured."""
    task = {name: getattr(args, name) for name in ("pairs", "answer", "updates")}
    task["model"] = str(args.model)
    threads = 1 if count > 1 else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(count) as started:
        found = list(
            started.map(
                lambda ring: common.measure(
                    "bench_distributed.py", task, threads=threads, more=ring
                ),
                rings.environments(Path(folder), count),
            )
        )
    if failed := [one["failed"] for one in found if "failed" in one]:
        raise SystemExit(failed[0])
    return found[0]


def row(count: int, found: list[common.Values], alone: list[common.Values]) -> common.Values:
    seconds, passed = (median(one[name] for one in found) for name in ("update", "link"))
    return {
        "processes": count,
        "s/update": seconds,
        "link s": passed if count > 1 else None,
        "link share": passed / seconds if count > 1 else None,
        "speed": median(one["update"] for one in alone) / seconds,
    }


def by_link(name: str, rate: float) -> common.Values:
    """Of Granite's adapters and of the demo's, over a link of `rate` bytes per second."""
    granite, demo = adapters_bytes()
    return {
        "link": name,
        f"Granite, rank {GRANITE_RANK}": 2 * granite / rate,
        f"demo, rank {common.LORA_RANK}": 2 * demo / rate,
    }


def adapters_bytes() -> list[int]:
    """Of Granite at the shipped rank, and of the demo model; nothing is computed."""
    granite = ours.granite(layers=40)
    attach_lora(granite, LoraConfig(rank=GRANITE_RANK))
    demo = load_model(str(common.ROOT / "data/models/smollm2-135m-instruct"), lazy=True).model
    attach_lora(demo, ours.LORA)
    return [memory.nbytes(model.trainable_parameters()) for model in (granite, demo)]


# In the measured process ---------------------------------------------------------------------


def worker(task: common.Values) -> common.Values:
    if open_channel().rank:
        distributed.serve()
        return {}
    config = Config(
        model=task["model"],
        run_dir="none",
        data=DataConfig(source="none", train_pairs="none1", valid_pairs="none2"),
        train=TrainConfig(learning_rate=common.LEARNING_RATE, grad_checkpoint=False),
        lora=ours.LORA,
    )
    loaded, shared = distributed.load(config, train=True)
    lengths = np.random.default_rng(0).integers(task["answer"] // 2, 3 * task["answer"] // 2, 99)
    pairs = [ours.random_pair(loaded.model, int(lengths[i]), seed=i) for i in range(task["pairs"])]
    examples = [Example(pair, Sides(0.0, 0.0)) for pair in pairs]
    optimizer = optim.AdamW(common.LEARNING_RATE)
    updates = [seconds(shared, optimizer, Dpo(config), examples) for _ in range(task["updates"])]
    found = {"update": median(updates[1:]), "link": 0.0}
    if shared.size > 1:
        links = []
        for _ in range(5):
            named = dict(tree_flatten(loaded.model.trainable_parameters()))
            anew = [(name, array + 0) for name, array in named.items()]
            loaded.model.load_weights(anew, strict=False)
            mx.eval(loaded.model.trainable_parameters())
            started = time.perf_counter()
            shared.gradient(Dpo(config), [], 0)
            links.append(time.perf_counter() - started)
        found["link"] = median(links)
    dismiss()
    return found


def seconds(shared: Any, optimizer: Any, phase: Dpo, examples: list[Example]) -> float:
    started = time.perf_counter()
    _, gradient, _ = shared.gradient(phase, examples, 0)
    optimizer.update(shared.model, gradient)
    mx.eval(shared.model.trainable_parameters(), optimizer.state)
    return time.perf_counter() - started


if __name__ == "__main__":
    common.start(main, worker)
