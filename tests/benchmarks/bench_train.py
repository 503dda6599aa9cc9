"""Training beside mlx-lm-lora and TRL with PEFT: the same pairs, one per update, side by side.

    python tests/benchmarks/bench_train.py [--model FOLDER | --granite-width LAYERS]
                                           [--pairs FILE | --data FILE] [--rounds N --steps N]

Each peer runs its own training function in an environment of its own (data/benchmarks/venvs/, made
here). All get one model in float32, LoRA of rank 8 on all linear layers of all blocks, AdamW, one
pair an update, and the same token ids in the same order. Every measurement is a fresh process whose
first update is a warm-up; competitors take turns within a round, and their order turns as well.

How to read the table, one for each of: with and without gradient checkpointing
  train s/pair   training alone, the optimizer's step included: the mean over a round's pairs, then
                 the median over rounds. mlx-lm-lora's is measured without a reference model.
  run s/pair     with the reference: ours and TRL compute it once, before --epochs epochs;
                 mlx-lm-lora runs a second model in every step.
  x              how many times ours, the median over rounds of the ratio within a round.
  MLX peak GB    mx.get_peak_memory in training, for those on MLX.
  RSS GB         the most memory the process held, the same for all; files it maps count.
Peaks are those of a run with its reference, as a user runs it; mlx-lm-lora's without the reference
model are in the JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median

import common
import hf
import ours
from dpo_mlx.data import pairs, source
from dpo_mlx.data.encoding import EncodedAnswer, EncodedPair, Encoder
from dpo_mlx.data.pairs import Pair
from dpo_mlx.files.run_folder import ReferenceFiles
from dpo_mlx.model.loading import load_model
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.scoring import reference
from dpo_mlx.scoring.objectives import Example

TORCH, TRL, PEFT, MLX_LM_LORA = "2.13.0", "1.16.0", "0.21.2", "5.10.2"
OURS, LORA, LORA_ALONE, TRL_PEFT = "ours", "mlx-lm-lora", "mlx-lm-lora alone", "TRL+PEFT"
SIDES = ("chosen", "rejected")


def main() -> None:
    args = arguments()
    pythons = environments(args.only)
    common.DATA.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=common.DATA) as folder:
        task = prepared(args, Path(folder))
        lengths = [[len(p["prompt_ids"] + p[f"{s}_ids"]) for s in SIDES] for p in task["pairs"]]
        tokens = sum(map(sum, lengths[1:])) / args.steps
        print(f"{args.steps} pairs of {tokens:.0f} tokens on average (both sides), float32")
        results = {}
        for checkpoint in args.checkpoint:
            rounds = measured({**task, "checkpoint": checkpoint}, args, pythons)
            rows = summary(rounds, args.epochs)
            title = f"{'with' if checkpoint else 'without'} gradient checkpointing"
            common.table(title, rows)
            results[title] = {"table": rows, "rounds": rounds}
    common.save(args, {"tokens_per_pair": tokens, "lengths": lengths, "results": results})


def arguments() -> Namespace:
    parser = common.parser(__doc__, "bench_train")
    default = common.ROOT / "data/models/smollm2-135m-instruct"
    parser.add_argument("--model", type=Path, default=default, help="a model folder")
    parser.add_argument(
        "--granite-width",
        type=int,
        metavar="LAYERS",
        help="random weights at Granite's width instead; --model then brings the tokenizer",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pairs", type=Path, help="pairs as stage 06 writes them")
    sample = common.ROOT / "data/sample/generated_answers.jsonl"
    source.add_argument("--data", type=Path, default=sample, help="questions and answers")
    parser.add_argument("--max-length", type=int, default=1024, help="longer pairs are left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="measured updates of a process")
    parser.add_argument("--epochs", type=int, default=1, help="of a whole run")
    parser.add_argument("--checkpoint", choices=("both", "yes", "no"), default="both")
    parser.add_argument("--only", default="ours,mlx-lm-lora,TRL+PEFT", help="competitors")
    args = parser.parse_args()
    args.checkpoint = {"both": [False, True], "yes": [True], "no": [False]}[args.checkpoint]
    args.only = [OURS, *(name for name in (LORA, TRL_PEFT) if name in args.only.split(","))]
    return args


def environments(only: list[str]) -> dict[str, str]:
    """The Python of each peer; what it shares with ours in the same versions."""
    shared = common.pins("transformers")
    made = {}
    if LORA in only:
        wanted = [f"mlx-lm-lora=={MLX_LM_LORA}", *common.pins("mlx"), *shared]
        made[LORA] = made[LORA_ALONE] = common.venv("mlx-lm-lora", wanted)
    if TRL_PEFT in only:
        wanted = [f"torch=={TORCH}", f"trl=={TRL}", f"peft=={PEFT}", *shared]
        made[TRL_PEFT] = common.venv("trl", wanted)
    return made


def prepared(args: Namespace, folder: Path) -> common.Values:
    """The task of all workers: model folders in both layouts, pairs as text and as ids."""
    mlx, torch = args.model, args.model
    if args.granite_width:
        mlx, torch = folder / "mlx", folder / "hf"
        print(f"making random weights, {args.granite_width} layers", flush=True)
        asked = {"make": str(mlx), "hf": str(torch), "layers": args.granite_width}
        made = common.measure("bench_train.py", {**asked, "tokenizer": str(args.model)})
        if "failed" in made:
            raise SystemExit(made["failed"])
    settings = json.loads((mlx / "config.json").read_text())
    encoder = Encoder(load_model(str(mlx), lazy=True).tokenizer)
    rows = [as_values(pair, encoder) for pair in read_pairs(args)]
    fit = args.max_length
    rows = [r for r in rows if all(len(r["prompt_ids"] + r[f"{s}_ids"]) <= fit for s in SIDES)]
    if len(rows) <= args.steps:
        raise SystemExit(f"{len(rows)} pairs fit --max-length; --steps needs one more than it")
    return {
        "mlx": str(mlx),
        "torch": str(torch),
        "layers": settings["num_hidden_layers"],
        "granite": settings["model_type"] == "granitemoehybrid",
        "pairs": rows[: args.steps + 1],  # the first warms up
    }


def read_pairs(args: Namespace) -> list[Pair]:
    """Pairs of a file; of questions and answers, the next question's answer is rejected."""
    if args.pairs:
        return pairs.read(args.pairs)
    rows = source.read(args.data).questions
    shifted = [*rows[1:], rows[0]]
    return [
        Pair(row.question, row.answer, other.answer, line=row.line)
        for row, other in zip(rows, shifted, strict=True)
    ]


def as_values(pair: Pair, encoder: Encoder) -> common.Values:
    encoded = encoder.pair(pair)
    prompt = encoded.chosen.prompt_length
    return {
        "prompt": encoder.render(pair.prompt),
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "prompt_ids": list(encoded.chosen.ids[:prompt]),
        "chosen_ids": list(encoded.chosen.ids[prompt:]),
        "rejected_ids": list(encoded.rejected.ids[prompt:]),
    }


def measured(task: common.Values, args: Namespace, pythons: dict[str, str]) -> list[common.Values]:
    """For each round what each competitor measured; they start in turns."""
    scripts = {
        OURS: ("bench_train.py", {"folder": task["mlx"]}),
        LORA: ("peer_mlx_lm_lora.py", {"folder": task["mlx"], "reference": True}),
        LORA_ALONE: ("peer_mlx_lm_lora.py", {"folder": task["mlx"], "reference": False}),
        TRL_PEFT: ("peer_trl.py", {"folder": task["torch"]}),
    }
    names = [name for name in scripts if name == OURS or name in pythons]
    rounds = []
    for turn in range(args.rounds):
        results = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            script, more = scripts[name]
            python = pythons.get(name, sys.executable)
            results[name] = common.measure(script, {**task, **more}, python, mlx=name != TRL_PEFT)
            said = results[name].get("seconds", results[name].get("failed"))
            print(f"round {turn + 1}, {name}: {common.cell(said)} s per pair", flush=True)
        rounds.append(results)
    return rounds


def summary(rounds: list[common.Values], epochs: int) -> list[common.Values]:
    """A row a competitor."""
    rows = []
    for name in (OURS, LORA, TRL_PEFT):
        kept = [r for r in rounds if "seconds" in r.get(name, {}) and "seconds" in r[OURS]]
        if name not in rounds[0]:
            continue
        alone = LORA_ALONE if name == LORA else name
        trained = [(r[alone].get("seconds", float("nan")), r[OURS]["seconds"]) for r in kept]
        whole = [(run_seconds(r[name], epochs), run_seconds(r[OURS], epochs)) for r in kept]
        row = {
            "": name,
            "train s/pair": middle([mine for mine, _ in trained]),
            "x": middle([mine / base for mine, base in trained]),
            "run s/pair": middle([mine for mine, _ in whole]),
            "x run": middle([mine / base for mine, base in whole]),
        }
        for title, key in (("MLX peak GB", "peak_mlx"), ("RSS GB", "peak_rss")):
            peak = middle([r[name][key] for r in kept if key in r[name]])
            ratio = middle([r[name][key] / r[OURS][key] for r in kept if key in r[name]])
            row |= {title: common.gigabytes(peak), f"x {title.split()[0]}": ratio}
        rows.append(row)
    return rows


def run_seconds(result: common.Values, epochs: int) -> float:
    """Seconds per pair and epoch with the reference, which is computed once where it is kept."""
    return result["seconds"] + result.get("reference_seconds", 0.0) / epochs


def middle(values: list[float]) -> float | None:
    return median(values) if values else None


def worker(task: common.Values) -> common.Values:
    """Ours: the reference as stage 10 computes it, then the trainer. Or the random model made."""
    if "make" in task:
        ours.granite_folder(Path(task["make"]), task["layers"], Path(task["tokenizer"]))
        hf.folder(Path(task["make"]), Path(task["hf"]))
        return {}
    model = ours.load({"model": task["folder"]})
    encoded = [encoded_pair(row, line) for line, row in enumerate(task["pairs"])]
    worker = Worker(model)
    since = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        kept = reference.load_or_compute(
            ReferenceFiles(Path(folder), "train"), encoded, {}, worker.log_probs
        )
    seconds = time.perf_counter() - since
    examples = [Example(*both) for both in zip(encoded, kept, strict=True)]
    steps = ours.train(model, examples, task["checkpoint"])
    return {**ours.summary(model, steps), "reference_seconds": seconds / len(encoded)}


def encoded_pair(row: common.Values, line: int) -> EncodedPair:
    prompt = row["prompt_ids"]
    chosen, rejected = (EncodedAnswer((*prompt, *row[f"{s}_ids"]), len(prompt)) for s in SIDES)
    return EncodedPair(chosen, rejected, line)


if __name__ == "__main__":
    common.start(main, worker)
