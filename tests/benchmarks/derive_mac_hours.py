"""Hours of a run on Macs with the shipped config, derived. Nothing here was measured on a Mac.

    python tests/benchmarks/derive_mac_hours.py [--rows 100,1300] [--prompt 40] [--answer 260]

`dpo_mlx.stages.check_run.minutes_of`, the formula behind `--check`, counts what each stage does;
here the cost of each thing comes from a machine's figures instead of a probe. With P parameters in
bfloat16 (2 P bytes), S bytes of recurrent state a sequence, B answers at once, on a machine of
R bytes/s and F FLOP/s:

  a token of each answer of a batch    the slower of (2 P + 2 B S) / R and 2 P B / F: the weights
                                       are read once, and each state is read and written
  a batch of prompts of T tokens       the slower of 2 P / R and 2 P B T / F
  a token that is scored               2 P / F
  a token of a gradient                6 P / F: forward 2 P, forward again in the backward pass
                                       (checkpointing) 2 P, gradients of activations 2 P; frozen
                                       weights get none
  reading the model                    2 P / DISK
  fusing a layer of W weights          W FUSE_BYTES / R

Left out, as small beside these: LoRA's own products (1% at rank 16), attention and Mamba's scan (a
few percent), caches of keys and values (8 KB a token), dispatch, Python, the start of each stage.
R is what the maker states, F an assumption about large bfloat16 products; a machine that heats up,
or that is used by day, takes longer. `--check` measures instead.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace

import common
import ours
from dpo_mlx import config as configs
from dpo_mlx.data.encoding import EncodedAnswer
from dpo_mlx.model import fusing
from dpo_mlx.model.adapters import LORA_LAYERS, attach_lora
from dpo_mlx.model.sampling import with_max_tokens
from dpo_mlx.scoring import memory
from dpo_mlx.scoring.objectives import Dpo, Sft
from dpo_mlx.stages.check_run import (
    FUSE,
    MAKE_PAIRS,
    SMOKE,
    TRAIN_DPO,
    Cost,
    Workload,
    evaluations,
    minutes_of,
)
from dpo_mlx.training import checkpoint
from dpo_mlx.training.checkpoint import SaveClock
from dpo_mlx.training.schedule import count_updates

CONFIG = common.ROOT / "config/mlx_granite-4.0-h-micro_dpo.yaml"
LAYERS = 40
STAGES = {MAKE_PAIRS: "06", TRAIN_DPO: "10", FUSE: "11", SMOKE: "12"}

DISK = 2e9  # bytes/s that are read from the SSD, assumed
# Bytes that fusing reads and writes for a weight: the weight and its float32 copy (2 + 4), the
# adapters' product (4), the sum (4 + 4 + 4), rounding and its random numbers (some 14).
FUSE_BYTES = 36
NIGHT, UPDATE = 10 * 3600, 60  # seconds; eight pairs of 2 x 300 tokens take an M1 about a minute


@dataclass(frozen=True)
class Machine:
    """Bytes/s of its memory as its maker states them, and FLOP/s of products, assumed."""

    name: str
    bandwidth: float
    flops: float


MACHINES = (
    Machine("M1", 68e9, 1.6e12),
    Machine("M2", 100e9, 2.6e12),
    Machine("M3-class", 150e9, 2.8e12),
)
# Minutes by rows that the project assumed before this derivation; their arithmetic was not kept.
EARLIER_ESTIMATE = {100: (66, 44, 37), 1300: (10.4 * 60, 7.0 * 60, 6.1 * 60)}


@dataclass(frozen=True)
class Model:
    """Parameters, bytes of a sequence's recurrent state and of a checkpoint, weights of the largest
    layer, and all fused layers in its size.
    """

    parameters: int
    state: int
    checkpoint: int
    largest: int
    layers: float

    @property
    def weights(self) -> int:
        """Bytes in bfloat16."""
        return 2 * self.parameters


def main() -> None:
    args = arguments()
    print(markdown(args.rows, args.prompt, args.answer))


def arguments() -> Namespace:
    parser = common.parser(__doc__, "derive_mac_hours")
    parser.add_argument("--rows", type=common.numbers, default=[100, 1300])
    parser.add_argument("--prompt", type=int, default=40, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=260, help="tokens of each answer")
    return parser.parse_args()


def markdown(rows: list[int], prompt: int, answer: int) -> str:
    """The tables of README.md."""
    config, model = shipped(answer), granite()
    works = {count: workload(count, prompt, answer, model, config) for count in rows}
    parts = [
        costs_table(config, model, prompt, prompt + answer),
        work_table(config, model, prompt, works),
        minutes_table(config, model, prompt, works),
        checkpoints_table(config, model, works),
    ]
    return "\n\n".join(parts)


def shipped(answer: int) -> configs.Config:
    """The shipped config; answers are cut where stage 06 would cut them."""
    config = configs.load(CONFIG)
    return replace(config, generation=with_max_tokens(config.generation, [answer]))


def granite() -> Model:
    """The whole model with the shipped adapters; only shapes are looked at."""
    model, settings = ours.granite(LAYERS, "bfloat16"), ours.granite_config(LAYERS)
    parameters = memory.nbytes(model.parameters()) // 2
    attach_lora(model, configs.load(CONFIG).lora)
    width = settings["mamba_n_heads"] * settings["mamba_d_head"]
    state = settings["layer_types"].count("mamba") * width * settings["mamba_d_state"] * 4
    layers = fusing.size_in_largest_layers(model)
    adapted = [m for m in model.modules() if isinstance(m, LORA_LAYERS)]
    largest = max(layer.linear.weight.size for layer in adapted)
    return Model(parameters, state, checkpoint.size(model), largest, layers)


def workload(rows: int, prompt: int, answer: int, model: Model, config: configs.Config) -> Workload:
    held_out = round(rows * config.data.valid_fraction)
    sequence = EncodedAnswer((0,) * (prompt + answer), prompt)
    return Workload([sequence] * (rows - held_out), [sequence] * held_out, model.layers)


def flops(config: configs.Config, model: Model, prompt: int) -> Cost:
    """A cost in FLOPs instead of seconds."""
    forward, batch = 2.0 * model.parameters, config.generation.batch_size
    passes = 3 if config.train.grad_checkpoint else 2
    return Cost(
        model=0,
        prompts=forward * batch * prompt,
        step=forward * batch,
        scored_token=forward,
        gradient_token=passes * forward,
        layer=0,
    )


def traffic(config: configs.Config, model: Model, length: int) -> Cost:
    """A cost in bytes of weights and states that memory passes on, for sequences of `length`
    tokens; what the SSD passes on is left out.
    """
    passes = 3 if config.train.grad_checkpoint else 2
    return Cost(
        model=0,
        prompts=model.weights,
        step=model.weights + 2 * config.generation.batch_size * model.state,
        scored_token=model.weights / length,
        gradient_token=passes * model.weights / length,
        layer=FUSE_BYTES * model.largest,
    )


def cost(machine: Machine, config: configs.Config, model: Model, prompt: int, length: int) -> Cost:
    """Seconds on this machine, bound by its memory or by its arithmetic."""
    by_flops, by_bytes = flops(config, model, prompt), traffic(config, model, length)

    def seconds(name: str) -> float:
        return max(
            getattr(by_flops, name) / machine.flops, getattr(by_bytes, name) / machine.bandwidth
        )

    names = ("prompts", "step", "scored_token", "gradient_token", "layer")
    return Cost(model=model.weights / DISK, **{name: seconds(name) for name in names})


def sums(config: configs.Config, work: Workload, unit: Cost) -> list[float]:
    """What each stage takes in the unit of a cost, and all of them together."""
    minutes = minutes_of(config, work, unit)
    each = [60 * minutes[script] for script in STAGES]
    return [*each, sum(each)]


def costs_table(config: configs.Config, model: Model, prompt: int, length: int) -> str:
    lines = table_head(["machine", "GB/s", "TFLOP/s", "a step of 8 answers", "scored", "gradient"])
    for machine in MACHINES:
        one = cost(machine, config, model, prompt, length)
        cells = [
            machine.name,
            f"{machine.bandwidth / 1e9:.0f}",
            f"{machine.flops / 1e12:.1f}",
            f"{1e3 * one.step:.0f} ms",
            f"{1e3 * one.scored_token:.1f} ms/token",
            f"{1e3 * one.gradient_token:.1f} ms/token",
        ]
        lines.append(table_line(cells))
    return "\n".join(lines)


def work_table(
    config: configs.Config, model: Model, prompt: int, works: dict[int, Workload]
) -> str:
    """FLOPs and bytes of each stage, on any machine."""
    lines = table_head(["rows", "", *STAGES.values(), "all"])
    for rows, work in works.items():
        length = len(work.rows[0].ids)
        by_flops = sums(config, work, flops(config, model, prompt))
        by_bytes = sums(config, work, traffic(config, model, length))
        lines.append(table_line([rows, "TFLOP", *(f"{v / 1e12:,.0f}" for v in by_flops)]))
        lines.append(table_line([rows, "TB", *(f"{v / 1e12:,.1f}" for v in by_bytes)]))
    return "\n".join(lines)


def minutes_table(
    config: configs.Config, model: Model, prompt: int, works: dict[int, Workload]
) -> str:
    lines = table_head(["rows", "machine", *STAGES.values(), "all", "earlier estimate", "ratio"])
    for rows, work in works.items():
        for place, machine in enumerate(MACHINES):
            one = cost(machine, config, model, prompt, len(work.rows[0].ids))
            minutes = [seconds / 60 for seconds in sums(config, work, one)]
            cells = [str(rows), machine.name, *(f"{value:.0f}" for value in minutes[:-1])]
            earlier = EARLIER_ESTIMATE[rows][place] if rows in EARLIER_ESTIMATE else None
            compared = [spoken(earlier), f"{minutes[-1] / earlier:.2f}"] if earlier else ["", ""]
            lines.append(table_line([*cells, spoken(minutes[-1]), *compared]))
    return "\n".join(lines)


def checkpoints_table(config: configs.Config, model: Model, works: dict[int, Workload]) -> str:
    """Bytes of checkpoints with `train.save_every: null`, and what save_every: 1 would write."""
    size, at_night = model.checkpoint, saves(NIGHT, model.checkpoint)
    by_clock = f"{gigabytes(at_night * size)} ({at_night} of {size / 1e6:.0f} MB)"
    lines = table_head(
        ["rows", "updates", "at evaluations", "by the clock, a night", "save_every: 1"]
    )
    for rows, work in works.items():
        phases = (Sft(config), Dpo(config))
        updates = sum(count_updates(phase.settings, len(work.train)) for phase in phases)
        # One before each evaluation and one after it; a phase's first has no update before it.
        at_evaluations = (2 * evaluations(config, len(work.train)) - len(phases)) * size
        every = gigabytes(updates * size)
        lines.append(table_line([rows, updates, gigabytes(at_evaluations), by_clock, every]))
    return "\n".join(lines)


def saves(seconds: float, size: int, update: float = UPDATE) -> int:
    """Checkpoints of so many bytes that the clock allows in a time, with updates of `update`
    seconds.
    """
    now, count = 0.0, 0
    clock = SaveClock(lambda: now)
    while now < seconds:
        now += update
        if clock.is_due():
            with clock.saving(size):
                now += size / DISK
            count += 1
    return count


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def spoken(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def table_head(columns: list[str]) -> list[str]:
    return [table_line(columns), "|" + "---|" * len(columns)]


def table_line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
