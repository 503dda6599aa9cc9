"""What does each recipe make of a model: is the voice learned, and what did it cost?

    python tests/benchmarks/bench_outcome.py [--data FILE] [--train N --held N] [--seeds 0,1,2]
        [--jobs N] [--recipes "before,SFT alone,shipped"] [--recipe "name=key=value key=value"]
    python tests/benchmarks/bench_outcome.py --again [--seeds 0,1,2] [--recipes ...]

Stage 06 samples a rejected answer to every question once. For each seed the pairs are shuffled and
cut to --train pairs and --held held-out ones. Every recipe trains on the same pairs by stage 10,
with the demo's config and the overrides in RECIPES or --recipe. Recipes with the same SFT share it.
Then the kept adapters and those at the end of SFT answer all held-out questions, with the same
seeds. `SFT alone` in --recipes shows the end of SFT of the recipe before it.

A run's answers stay in FOLDER/SEED/RECIPE/answers.json. The same command again resumes: it trains
and samples only what is missing. --again only measures the answers saved so far, with the measures
of today; it also shows how far a running benchmark is.

How to read the table, a row for each recipe and seed. [] is a 95% interval over the questions.
  way         how far the answers are from the base model's (0) to the author's (1)
  detector    how often a classifier tells the answers from the author's; 0.5 means that it cannot
  habits      habits of the author that carried over, of all
  sense       fit of the answers to their own questions, in nats per token; of the real answers
  copied      share of the answers' 8-word runs that stand in the training answers
  d2          share of distinct word pairs, minus the base model's
  loops       answers that repeat more than 8 words in a row, of all
  ended       share of answers that end by themselves, over the base model's; - if none of its does
  nats        log-prob per token under the base model, minus that of the base model's answers
  length      median tokens of an answer, over those of the real answers
  KL          divergence from the base model on unrelated prompts, in nats per token
  instr       share of instructions followed, minus the base model's
  choices     share of questions of general knowledge answered right, minus the base model's
  DPO - SFT   the place of the kept model's answers on the voice scale, minus that at the end of SFT
  old         whether the five older targets are met: more in the voice than the base model on 90%
              of the questions, d2 >= -0.03, ended >= 0.95, nats >= -1, length within 25%
  grade       the verdict
  minutes     of stage 10; with + when a part of the training was there already
  kept, of    the update whose adapters are kept, and the updates done; * when the guard stopped it
The JSON file has every report: also what the base model and the real answers get, and how often the
detector tells real answers from real answers.

`control` is the run that collapsed (control.py). Its last adapters are measured. Below the table
stands what the preflight and the guard say of it, which are off.
"""

from __future__ import annotations

import os
import random
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import control
import recipe_runs
from dpo_mlx import config as configs
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.stages.make_pairs import make_pairs
from dpo_mlx.voice.intervals import IntervalValues
from recipe_runs import Questions, Run

DEMO = common.ROOT / "config/smollm2-135m_demo.yaml"
SFT_ALONE, CONTROL = "SFT alone", "control"

# Overrides of the demo's config.
RECIPES = {
    # The recipe that was shipped until the verdict had grades.
    "before": [
        "sft.epochs=2",
        "sft.learning_rate=1e-4",
        "train.grad_accumulation=6",
        "train.learning_rate=5e-6",
        "train.epochs=1",
        "train.replay=0",
    ],
    "shipped": [],
    # DPO alone, as it was planned at first.
    "plan": [
        "sft.epochs=0",
        "dpo.match_length=false",
        "dpo.nll_weight=0",
        "train.learning_rate=1e-6",
        "train.replay=0",
        "train.force=true",
    ],
    CONTROL: control.OVERRIDES,
}
ALL = f"before,{SFT_ALONE},shipped,{SFT_ALONE},plan,{CONTROL}"
# Also the name of a folder, on a Mac that does not tell capitals from small letters.
NAME = re.compile(r"[a-z0-9][a-z0-9 _-]*")

# An answer that repeats more words in a row than this loops.
LONGEST_REPETITION = 8


def main() -> None:
    args = arguments()
    pool = [] if args.again else sampled_pairs(args)
    with ThreadPoolExecutor(args.jobs) as executor:
        by_seed = list(executor.map(lambda seed: rows_of_seed(args, pool, seed), args.seeds))
    rows = sorted((row for rows in by_seed for row in rows), key=lambda row: row["place"])
    common.table("what each recipe makes of the model", [line(row) for row in rows])
    for row in rows:
        if row["caught"]:
            print(f"\n{row['recipe']}, seed {row['seed']}, caught by:", *row["caught"], sep="\n  ")
    common.save(args, {"runs": rows})


def arguments() -> Namespace:
    parser = common.parser(__doc__, "bench_outcome")
    sample = common.ROOT / "data/sample/generated_answers.jsonl"
    parser.add_argument("--data", type=Path, default=sample, help="questions and answers")
    parser.add_argument("--pairs", type=Path, help="pairs as stage 06 writes them instead")
    parser.add_argument("--train", type=int, default=100, help="pairs")
    parser.add_argument("--held", type=int, default=30, help="held-out pairs, all answered")
    parser.add_argument("--seeds", type=common.numbers, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, sharing the cores")
    parser.add_argument("--recipes", default=ALL)
    parser.add_argument("--recipe", action="append", default=[], help="a candidate; repeatable")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="for all")
    parser.add_argument("--folder", type=Path, default=common.DATA / "outcome")
    parser.add_argument("--again", action="store_true", help="only measure saved answers")
    args = parser.parse_args()
    args.recipes = chosen_recipes(parser, args)
    return args


def chosen_recipes(parser: ArgumentParser, args: Namespace) -> list[tuple[str, list[str]]]:
    """(name, overrides) of each recipe. A candidate that --recipes does not name comes last."""
    table = dict(RECIPES)
    for text in args.recipe:
        name, _, overrides = text.partition("=")
        if not NAME.fullmatch(name) or name in table:
            parser.error(f"--recipe {text}: write name=key=value key=value, with a new name")
        table[name] = overrides.split()
    names = args.recipes.split(",")
    names += [name for name in table if name not in {*RECIPES, *names}]
    unknown = set(names) - {*table, SFT_ALONE}
    if unknown and not args.again:  # saved answers need no overrides
        parser.error(f"--recipes: no {', '.join(unknown)}; there are {', '.join(table)}")
    if names[0] == SFT_ALONE:
        parser.error(f"--recipes: {SFT_ALONE} shows the run of the recipe before it; name one")
    recipes = [(name, table.get(name, [])) for name in names]
    for name, overrides_of_recipe in recipes:
        try:
            configs.load(DEMO, [*overrides_of_recipe, *args.overrides])
        except UserError as error:
            parser.error(f"{name}: {error}")
    return recipes


def sampled_pairs(args: Namespace) -> list[common.Values]:
    """All pairs, as rows. What stage 06 has sampled of the same data is used again."""
    if args.pairs is not None:
        return jsonl.read_whole_lines(args.pairs)
    files = [args.folder / "pool/train.jsonl", args.folder / "pool/valid.jsonl"]
    values = {
        "run_dir": args.folder / "pool",
        "data.source": args.data,
        "data.train_pairs": files[0],
        "data.valid_pairs": files[1],
        "data.valid_fraction": 0.5,
        "data.limit": "null",
    }
    in_process({"overrides": overrides(args, values)})
    return [row for file in files for row in jsonl.read_whole_lines(file)]


def rows_of_seed(args: Namespace, pool: list[common.Values], seed: int) -> list[common.Values]:
    """The reports of all recipes for a seed."""
    folder = args.folder / f"{seed}"
    files = [folder / "train.jsonl", folder / "valid.jsonl"]
    if not args.again:
        write_pairs(args, pool, seed, files)
    values = {
        "run_dir": folder,
        "seed": seed,
        "data.train_pairs": files[0],
        "data.valid_pairs": files[1],
    }
    task = {
        "overrides": overrides(args, values),
        "recipes": args.recipes,
        "again": args.again,
    }
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    return [{**row, "seed": seed} for row in in_process(task, threads)["rows"]]


def write_pairs(
    args: Namespace, pool: list[common.Values], seed: int, files: Sequence[Path]
) -> None:
    """Write a seed's train and valid pairs. Ends the program when its folder has other pairs."""
    if len(pool) < args.train + args.held:
        raise SystemExit(f"{len(pool)} pairs, but --train and --held need {args.train + args.held}")
    shuffled = random.Random(seed).sample(pool, args.train + args.held)
    for file, rows in zip(files, (shuffled[: args.train], shuffled[args.train :]), strict=True):
        if file.exists() and jsonl.read_whole_lines(file) != rows:
            raise SystemExit(f"{file.parent}: has runs on other pairs; give another --folder")
        jsonl.write(file, rows)


def overrides(args: Namespace, values: common.Values) -> list[str]:
    return [*args.overrides, *(f"{key}={value}" for key, value in values.items())]


def in_process(task: common.Values, threads: int | None = None) -> common.Values:
    """What the worker returns for a task. Ends the program when it fails."""
    values = common.measure("bench_outcome.py", task, threads=threads)
    if "failed" in values:
        raise SystemExit(values["failed"])
    return values


def worker(task: common.Values) -> common.Values:
    if "recipes" in task:
        return {"rows": list(reports(task))}
    make_pairs(configs.load(DEMO, task["overrides"]))
    return {}


def reports(task: common.Values) -> Iterator[common.Values]:
    """The report of each recipe that has answers, one after the other."""
    config = configs.load(DEMO, task["overrides"])
    questions, recipe = Questions(config), ""
    run: Run | None = None
    for place, (name, overrides_of_recipe) in enumerate(task["recipes"]):
        if name == SFT_ALONE:
            name, shown_run = f"{recipe}, {SFT_ALONE}", run and run.at_end_of_sft
        else:
            folder = config.run.path / name.replace(" ", "_")
            changes = [*overrides_of_recipe, *task["overrides"], f"run_dir={folder}"]
            if not task["again"]:
                train = recipe_runs.run_control if name == CONTROL else recipe_runs.run_recipe
                train(configs.load(DEMO, changes), questions)
            recipe, shown_run = name, (run := recipe_runs.read(folder))
        if shown_run is not None:
            yield {"recipe": name, "place": place, **questions.report(shown_run)}


# The table -----------------------------------------------------------------------------------


def line(row: common.Values) -> common.Values:
    """A row of the table."""
    voice, fluency, cost, habits = (row[name] for name in ("voice", "fluency", "cost", "habits"))
    detection, loops = voice["detection"], row["longest_loops"]["tuned"]
    d2, nats = (
        fluency[name]["tuned"] - fluency[name]["base"]
        for name in ("distinct2", "base_logprob_per_token")
    )
    ended_by_base = fluency["self_ended"]["base"]
    ended = fluency["self_ended"]["tuned"] / ended_by_base if ended_by_base else None
    length = fluency["median_tokens"]["tuned"] / fluency["median_tokens"]["chosen"]
    meets_old_targets = (
        row["above_base"] >= 0.9
        and d2 >= -0.03
        and (ended is None or ended >= 0.95)
        and nats >= -1
        and abs(length - 1) <= 0.25
    )
    return {
        "recipe": row["recipe"],
        "seed": row["seed"],
        "way": interval(voice["way"]),
        "detector": interval(detection and detection["tuned"]),
        "habits": f"{sum(habit['carried'] for habit in habits)}/{len(habits)}",
        "sense": "{tuned:.2f}/{chosen:.2f}".format(**fluency["sense"]),
        "copied": fluency["copied"]["tuned"],
        "d2": d2,
        "loops": f"{sum(loop > LONGEST_REPETITION for loop in loops)}/{len(loops)}",
        "ended": ended,
        "nats": nats,
        "length": length,
        "KL": cost["divergence"]["value"],
        "instr": cost["instructions"]["tuned"] - cost["instructions"]["base"],
        "choices": cost["choices"]["tuned"] - cost["choices"]["base"],
        "DPO - SFT": interval(row["dpo_added"]),
        "old": "yes" if meets_old_targets else "no",
        "grade": row["verdict"]["grade"],
        "minutes": row["minutes"] and f"{row['minutes']:.1f}{'+' if row['is_partial'] else ''}",
        "kept, of": f"{row['kept_update']}, {row['updates']}{'*' if row['stopped'] else ''}",
    }


def interval(values: IntervalValues | None) -> str | None:
    return values and "{value:.2f} [{low:.2f}..{high:.2f}]".format(**values)


if __name__ == "__main__":
    common.start(main, worker)
