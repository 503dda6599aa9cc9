"""Granite's full geometry on a GPU: the chain's stages, an update, and the peers' updates.

    python tests/benchmarks/bench_gpu.py [--parts model,update,chain,update-plain,lora,trl]
                                         [--layers N] [--width granite|tiny] [--budget SECONDS]

The model has random bfloat16 weights. It stays in --folder, so that a later call can run the
remaining parts. This suits a GPU that you have for minutes only: each part is a fresh process with
a time limit, parts are skipped once the budget is used up, and the JSON file is written after each.

    model         the model folder: 40 layers take 6.4 GB of disk
    update        our Trainer with one pair per update, with gradient checkpointing
    chain         stages 06, 10, 11, 12: their own scripts, the shipped config, 6 + 2 pairs
    update-plain  as `update`, without checkpointing
    lora          mlx-lm-lora on the pairs of `update`, with its reference model, with checkpointing
    trl           TRL with PEFT on the same pairs and geometry, in PyTorch, with checkpointing

`s/update` is the median over --steps updates after a warm-up for each length; both sides of a pair
have that many tokens. Peaks are the process's highest so far, as MLX or PyTorch counts them, and
lengths rise. The plan is what `dpo_mlx.scoring.memory.training` estimates for that length. The
peers must be installed in this environment already, as it may have no network.

Rehearse it on a CPU: --width tiny --layers 3 --lengths 64,128.
"""

from __future__ import annotations

import random
import runpy
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from string import ascii_lowercase
from typing import Any

import common

PARTS = ("model", "update", "chain", "update-plain", "lora", "trl")
SECONDS = 180  # that a part, or a stage of the chain, may take
LEAST = 15  # seconds without which nothing is begun
DTYPE = "bfloat16"
CONFIG = common.ROOT / "config/mlx_granite-4.0-h-micro_dpo.yaml"
STAGES = {
    "06 pairs": "phase3-prepare-data-mlx/06_generate_dpo_pairs.py",
    "10 train": "phase4-fine-tune-model/10_train_dpo.py",
    "11 fuse": "phase4-fine-tune-model/11_fuse_adapters.py",
    "12 smoke test": "phase4-fine-tune-model/12_smoke_test.py",
}
SIDES = ("chosen", "rejected")
TRAIN_PAIRS, VALID_PAIRS, VALID_FRACTION = 6, 2, 0.25
# A random model learns nothing that a stage could be content with.
CHAIN = {
    "system_prompt": "",
    "data.limit": TRAIN_PAIRS + VALID_PAIRS,
    "data.valid_fraction": VALID_FRACTION,
    "generation.max_tokens": 32,
    "sft.epochs": 1,
    "train.grad_accumulation": 2,
    "train.eval_questions": VALID_PAIRS,
    "train.force": "true",
    "guard.enabled": "false",
    "fuse.min_margin_kept": 0,
    "smoke.questions": VALID_PAIRS,
    "smoke.unrelated_tasks": 4,
}


def main() -> None:
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    for part in args.parts:
        bench.run(part)
    common.save(args, bench.results)


def arguments() -> Namespace:
    parser = common.parser(__doc__, "bench_gpu")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--width", choices=("granite", "tiny"), default="granite")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--lengths", type=common.numbers, default=[300, 1024], help="rising")
    parser.add_argument("--steps", type=int, default=3, help="measured updates of each length")
    parser.add_argument("--budget", type=float, default=420, help="seconds of all parts")
    parser.add_argument("--folder", type=Path, default=common.DATA / "gpu", help="model and runs")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts: no {', '.join(sorted(unknown))} among {', '.join(PARTS)}")
    args.log = args.out.with_suffix(".log")
    return args


class Bench:
    """Runs parts within the budget, and saves their results to disk."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._end = time.monotonic() + args.budget
        self._model = args.folder / f"{args.width}-{args.layers}"
        self.results: common.Values = {}

    def run(self, part: str) -> None:
        if part == "chain":
            return self._chain()
        checkpoint = part != "update-plain"
        folder = {"folder": str(self._model)}
        pairs = {"lengths": self._args.lengths, "pairs": self._args.steps + 1}
        task = {"part": part, "checkpoint": checkpoint, **folder, **pairs}
        if part == "model":
            task |= {"layers": self._args.layers, "width": self._args.width}
        result = self._measure(part, "bench_gpu.py", task)
        if result and "rows" in result:
            common.table(f"{part}: {result.get('device', '')}", result["rows"])

    def _chain(self) -> None:
        rows = []
        chain = self._args.folder / f"chain-{self._model.name}"
        shutil.rmtree(chain, ignore_errors=True)  # or its stages would be up to date
        for stage, script in STAGES.items():
            places = {"folder": str(self._model), "chain": str(chain)}
            task = {"part": "stage", "script": script, **places}
            result = self._measure(stage, "bench_gpu.py", task)
            if result is None or "failed" in result:
                break
            row = {
                "stage": stage,
                "seconds": result["wall"],
                "of them computing": result["seconds"],
                "MLX peak GB": common.gigabytes(result["peak_mlx"]),
                "RSS GB": common.gigabytes(result["peak_rss"]),
            }
            rows.append(row)
        if rows:
            common.table("chain", rows)

    def _measure(self, name: str, script: str, task: common.Values) -> common.Values | None:
        """A process's result, saved at once; None when no time is left."""
        left = self._end - time.monotonic()
        if left < LEAST:
            print(f"{name}: skipped, the budget is used up", flush=True)
            return None
        since = time.monotonic()
        limit = min(left, SECONDS)
        mlx = task["part"] != "trl"
        result = common.measure(script, task, mlx=mlx, limit=limit, log=self._args.log)
        result["wall"] = time.monotonic() - since
        print(f"{name}: {result.get('failed', 'done')}, {result['wall']:.1f} s", flush=True)
        self.results[name] = result
        common.write(self._args, self.results)
        return result


# In the measured process ---------------------------------------------------------------------


def worker(task: common.Values) -> common.Values:
    kinds = {"model": make_model, "stage": run_stage, "lora": run_peer, "trl": run_peer}
    return kinds.get(task["part"], run_updates)(task)


def make_model(task: common.Values) -> common.Values:
    """Make the model folder unless an earlier call did, and name the device."""
    import mlx.core as mx
    import ours

    folder = Path(task["folder"])
    kept = ("vocab_size", "num_hidden_layers", "layer_types", "torch_dtype")
    tiny = {k: v for k, v in ours.tiny.config("granite").items() if k not in kept}
    changes = tiny if task["width"] == "tiny" else {}
    if not (folder / "config.json").is_file():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        ours.granite_folder(folder, task["layers"], dtype=DTYPE, **changes)
    info = {key: str(value) for key, value in mx.device_info().items()}
    return {"default_device": str(mx.default_device()), "device_info": info}


def run_stage(task: common.Values) -> common.Values:
    """Run a stage's script in this process. A stage that fails raises SystemExit."""
    import mlx.core as mx
    from dpo_mlx.files import jsonl

    chain = Path(task["chain"])
    source = chain / "source.jsonl"
    if not source.is_file():
        chain.mkdir()
        jsonl.write(source, questions())
    places = {
        "model": task["folder"],
        "run_dir": chain / "run",
        "data.source": source,
        "data.train_pairs": chain / "train.jsonl",
        "data.valid_pairs": chain / "valid.jsonl",
    }
    script = common.ROOT / "scripts" / task["script"]
    sets = [f"--set={key}={value}" for key, value in {**places, **CHAIN}.items()]
    sys.argv = [str(script), "--config", str(CONFIG), *sets]
    since = time.perf_counter()
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    seconds = time.perf_counter() - since
    return {"seconds": seconds, "peak_mlx": mx.get_peak_memory()}


def questions() -> list[dict[str, str]]:
    """Rows that split into TRAIN_PAIRS and VALID_PAIRS."""
    from dpo_mlx.data.questions import is_held_out

    rows: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    for number in range(1000):
        question = f"Why is number {number} so?"
        row = {"question": question, "answer": f"**It is {number}.** So take {number} and go on."}
        rows[is_held_out(question, VALID_FRACTION)].append(row)
    return rows[False][:TRAIN_PAIRS] + rows[True][:VALID_PAIRS]


def run_updates(task: common.Values) -> common.Values:
    """Our own update: plan each length, then train on all pairs."""
    import mlx.core as mx
    import ours
    from bench_train import encoded_pair

    model = ours.load({"model": task["folder"]})
    encoded = [encoded_pair(row, line) for line, row in enumerate(pair_rows(task), start=1)]
    first = range(0, len(encoded), task["pairs"])
    plans = [ours.planned(model, encoded[start], task["checkpoint"]) for start in first]
    examples = ours.examples(model, encoded)
    mx.clear_cache()
    mx.reset_peak_memory()
    since = time.perf_counter()

    def say(update: int) -> None:  # so that the log has what was measured before a fault
        seconds, peak = time.perf_counter() - since, mx.get_peak_memory() / 1e9
        print(f"update {update}: {seconds:.2f} s from the start, peak {peak:.2f} GB", flush=True)

    print(f"plans: {plans}", flush=True)
    steps = ours.train(model, examples, task["checkpoint"], after=say)
    seconds, peaks = [s.seconds for s in steps], [s.peak for s in steps]
    device = mx.device_info().get("device_name", "")
    return {"device": device, "rows": rows_of(task, seconds, peaks, plans)}


def run_peer(task: common.Values) -> common.Values:
    """Run a peer's worker on the same pairs, in this process."""
    settings = {
        **task,
        "layers": None,
        "granite": True,
        "reference": True,
        "random": True,
        "dtype": DTYPE,
        "pairs": pair_rows(task),
    }
    if task["part"] == "trl":
        import peer_trl as peer
    else:
        import peer_mlx_lm_lora as peer  # type: ignore[no-redef]
        from mlx_lm.utils import load_config

        settings["layers"] = load_config(Path(task["folder"]))["num_hidden_layers"]
    result = peer.worker(settings)
    return {**result, "rows": rows_of(task, result["steps"], result["peaks"])}


def pair_rows(task: common.Values) -> list[common.Values]:
    """Pairs of each length as text and as ids, shortest first; both sides have that many tokens."""
    from bench_train import as_values
    from dpo_mlx.data.encoding import Encoder
    from dpo_mlx.data.pairs import Pair
    from dpo_mlx.model.loading import load_model

    encoder = Encoder(load_model(task["folder"], lazy=True).tokenizer)
    letters = random.Random(0)

    def text(length: int) -> str:
        return "".join(letters.choices(ascii_lowercase, k=length))

    rows = []
    for length in task["lengths"]:
        for _ in range(task["pairs"]):
            question = text(12)
            answer = length - len(encoder.prompt_ids(question)) - 1  # the end of turn is a token
            row = as_values(Pair(question, text(answer), text(answer)), encoder)
            assert {len(row["prompt_ids"] + row[f"{s}_ids"]) for s in SIDES} == {length}
            rows.append(row)
    return rows


def rows_of(
    task: common.Values, seconds: list[float], peaks: list[int], plans: list[int] | None = None
) -> list[common.Values]:
    """One row per length, from every pair but the first."""
    rows = []
    for place, length in enumerate(task["lengths"]):
        measured = slice(place * task["pairs"], (place + 1) * task["pairs"] - 1)
        plan = plans[place] if plans else None
        peak = peaks[measured][-1] if peaks[measured] else None
        row: dict[str, Any] = {
            "tokens a side": length,
            "checkpointing": "yes" if task["checkpoint"] else "no",
            "s/update": median(seconds[measured]),
            "peak GB": common.gigabytes(peak),
            "plan GB": common.gigabytes(plan),
            "plan / peak": plan / peak if plan and peak else None,
        }
        rows.append(row)
    return rows


if __name__ == "__main__":
    common.start(main, worker)
