"""What each recipe makes of a model: is the voice learned, is the model still fluent?

    python tests/benchmarks/bench_outcome.py [--data FILE] [--train N --held N] [--seeds 0,1,2]
                                             [--recipes shipped,plan,...] [--questions N]

For each seed the rows are shuffled and cut to about --train pairs and --held held-out questions;
stage 06 samples the rejected answers once, and every recipe trains on the same pairs by stage 10
with the shipped demo config and the changes in RECIPES, in a process of its own. Then base and
tuned model answer --questions held-out questions, sampled as the config says and greedily.

How to read the table, a row a recipe and seed
  voice       share of questions on which the tuned answer scores above the base's
  score       mean voice score of the tuned answers, and in the JSON of base and real ones
  d2, d2 g    distinct word pairs of tuned minus base answers, sampled and greedy
  ended       share that ends by itself, over the base's
  nats        mean log-prob a token under the base model, of tuned minus base answers
  length      median tokens of tuned answers over those of the real ones
  held        whether all targets are (voice >= 0.90, d2 >= -0.03, ended >= 0.95, nats >= -1.0,
              length within 25%), sampled
  margin      reward margin of the valid pairs at the end, against the phase's reference
  kept, of    the update whose adapters are kept, and the updates done; * stopped by the guard
`control` is the run that collapsed (control.yaml, with the guard and the preflight off); its last
adapters are measured. `caught by` says what preflight and guard say of it when they are on.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import mlx.optimizers as optim
import yaml
from dpo_mlx import config as configs
from dpo_mlx import jsonl, make_pairs, models, pairs, voice
from dpo_mlx.config import Config
from dpo_mlx.engine import Engine
from dpo_mlx.job import TRAIN, VALID, pair_file, prepare
from dpo_mlx.metrics import MetricsFile
from dpo_mlx.origin import training_inputs
from dpo_mlx.pairs import LENGTH, STOP, Encoder
from dpo_mlx.sampling import Answer, sample_all
from dpo_mlx.train_dpo import ALL, Phases, preflight, train_dpo
from dpo_mlx.trainer import Dpo, Example, Trainer, groups
from dpo_mlx.writing import measure

DEMO = common.ROOT / "config/smollm2-135m_demo.yaml"
CONTROL = Path(__file__).with_name("control.yaml")
SHIPPED, COLLAPSED = "shipped", "control"

# Changes to the demo's config.
RECIPES: dict[str, list[str]] = {
    SHIPPED: [],
    "plan": ["sft.epochs=0", "dpo.nll_weight=0", "train.learning_rate=1e-6", "train.force=true"],
    "DPO with NLL": ["sft.epochs=0", "dpo.nll_weight=1", "train.learning_rate=5e-5"],
}

TARGETS = {"voice": 0.90, "d2": -0.03, "ended": 0.95, "nats": -1.0, "length": 0.25}


def main() -> None:
    args = arguments()
    shutil.rmtree(args.folder, ignore_errors=True)
    rows = []
    for seed in args.seeds:
        source = args.folder / f"{seed}" / "source.jsonl"
        jsonl.write(source, shuffled(args, seed))
        sampled = common.measure("bench_outcome.py", {"task": "pairs", **shared(args, seed)})
        require(sampled)
        previous: Path | None = None
        for recipe in args.recipes:
            task = {"task": "recipe", "recipe": recipe, **shared(args, seed)}
            run = args.folder / f"{seed}" / recipe
            if previous is not None:  # what is still valid of it is not computed again
                shutil.copytree(previous, run)
            previous = run
            found = common.measure("bench_outcome.py", {**task, "run_dir": str(run)})
            require(found)
            rows.append({"recipe": recipe, "seed": seed, **found})
            common.table(f"{recipe}, seed {seed}", [line(rows[-1])])
    common.table("what each recipe makes of the model", [line(row) for row in rows])
    for row in rows:
        if row.get("caught"):
            print(f"\n{row['recipe']}, seed {row['seed']}, caught by:", *row["caught"], sep="\n  ")
    common.save(args, {"rows": rows})


def arguments() -> Namespace:
    parser = common.parser(__doc__, "bench_outcome")
    sample = common.ROOT / "data/sample/generated_answers.jsonl"
    parser.add_argument("--data", type=Path, default=sample, help="questions and answers")
    parser.add_argument("--train", type=int, default=100, help="pairs, about")
    parser.add_argument("--held", type=int, default=30, help="held-out pairs, about")
    parser.add_argument("--questions", type=int, default=30, help="of them answered in the end")
    parser.add_argument("--seeds", type=common.numbers, default=[0])
    parser.add_argument("--recipes", default=",".join([*RECIPES, COLLAPSED]))
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="for all")
    parser.add_argument("--folder", type=Path, default=common.DATA / "outcome")
    args = parser.parse_args()
    args.recipes = args.recipes.split(",")
    return args


def shuffled(args: Namespace, seed: int) -> list[dict[str, Any]]:
    rows = [json.loads(text) for text in args.data.read_text().splitlines()]
    random.Random(seed).shuffle(rows)
    return rows[: args.train + args.held]


def shared(args: Namespace, seed: int) -> common.Values:
    folder = args.folder / f"{seed}"
    sets = {
        "seed": seed,
        "data.source": folder / "source.jsonl",
        "data.train_pairs": folder / "pairs/train.jsonl",
        "data.valid_pairs": folder / "pairs/valid.jsonl",
        "data.valid_fraction": args.held / (args.train + args.held),
        "data.limit": "null",
    }
    made = [*(f"{key}={value}" for key, value in sets.items()), *args.overrides]
    return {"sets": made, "questions": args.questions, "run_dir": str(folder)}


def require(found: common.Values) -> None:
    if "failed" in found:
        raise SystemExit(found["failed"])


def worker(task: common.Values) -> common.Values:
    if task["task"] == "pairs":
        make_pairs.make_pairs(load(task, []))
        return {}
    return collapse(task) if task["recipe"] == COLLAPSED else by_recipe(task)


def load(task: common.Values, changes: list[str], path: Path = DEMO) -> Config:
    return configs.load(path, [*changes, *task["sets"], f"run_dir={task['run_dir']}"])


def by_recipe(task: common.Values) -> common.Values:
    """The whole of stage 10, and what the kept adapters write."""
    config = load(task, RECIPES[task["recipe"]])
    started = time.perf_counter()
    train_dpo(config, ALL)
    minutes = (time.perf_counter() - started) / 60
    outcome = jsonl.read_json(config.run / "outcome.json")
    return {"minutes": minutes, **outcome, **outcome_of(config, config.run / "adapters", task)}


def outcome_of(
    config: Config, adapters: Path, task: common.Values, encode: type[Encoder] = Encoder
) -> common.Values:
    """What base and tuned model write to held-out questions, measured, with the last margin."""
    loaded = models.load(config.model, adapters)
    encoder = encode(loaded.tokenizer, config.system_prompt)
    splits = {split: pairs.read(pair_file(config, split)) for split in (TRAIN, VALID)}
    asked = splits[VALID][: task["questions"]]
    train = splits[TRAIN]
    classifier = voice.fit([p.chosen for p in train], [p.rejected for p in train])
    engine = Engine(loaded.model)
    real = [Answer(p.chosen, STOP, len(encoder.answer(p.chosen, LENGTH))) for p in asked]
    measured, texts = {}, {}
    for name, temperature in (("sampled", config.generation.temperature), ("greedy", 0.0)):
        settings = replace(config.generation, temperature=temperature)
        prompts = [encoder.prompt(pair.prompt) for pair in asked]
        tuned = sample_all(loaded.model, loaded.tokenizer, prompts, settings, config.seed)
        with models.adapters_off(loaded.model):
            base = sample_all(loaded.model, loaded.tokenizer, prompts, settings, config.seed)
            both = {"base": base, "tuned": tuned, "chosen": real}
            measured[name] = {
                who: measure(answers, asked, classifier, engine, encoder)
                for who, answers in both.items()
            }
        texts[name] = {who: [answer.text for answer in given] for who, given in both.items()}
    scores = {who: classifier.score(given) for who, given in texts["sampled"].items()}
    evaluations = [
        row for row in jsonl.read_whole_lines(config.run / "metrics.jsonl") if "eval_loss" in row
    ]
    return {
        "share": float((scores["tuned"] > scores["base"]).mean()),
        "margin": evaluations[-1]["eval_rewards/margins"],
        "accuracy": evaluations[-1]["eval_rewards/accuracies"],
        "pairs": {split: len(found) for split, found in splits.items()},
        "measured": measured,
        "texts": texts,
    }


def line(row: common.Values) -> common.Values:
    """A row of the table."""
    base, tuned, chosen = (row["measured"]["sampled"][w] for w in ("base", "tuned", "chosen"))
    greedy = row["measured"]["greedy"]
    values = {
        "voice": row["share"],
        "d2": tuned["distinct2"] - base["distinct2"],
        "ended": tuned["self_ended"] / max(base["self_ended"], 1e-9),
        "nats": tuned["base_logprob_per_token"] - base["base_logprob_per_token"],
        "length": tuned["median_tokens"] / chosen["median_tokens"],
    }
    stopped = "*" if row["stopped"] else ""
    return {
        "recipe": row["recipe"],
        "seed": row["seed"],
        "voice": values["voice"],
        "score": tuned["voice"],
        "d2": values["d2"],
        "d2 g": greedy["tuned"]["distinct2"] - greedy["base"]["distinct2"],
        "ended": values["ended"],
        "nats": values["nats"],
        "length": values["length"],
        "held": "yes" if all(holds(name, value) for name, value in values.items()) else "no",
        "margin": row["margin"],
        "kept, of": f"{row['kept_update']}, {row['updates']}{stopped}",
        "minutes": row["minutes"],
    }


def holds(name: str, value: float) -> bool:
    if name == "length":
        return abs(value - 1) <= TARGETS[name]
    return value >= TARGETS[name]


# The run that collapsed ---------------------------------------------------------------------------


class RawEncoder(Encoder):
    """`Question: ... Answer:` without a chat template, and no end of turn."""

    def rendered(self, question: str) -> str:
        return f"Question: {question}\nAnswer:"

    def answer(self, text: str, finish: str = STOP) -> list[int]:
        return super().answer(" " + text, LENGTH)


def collapse(task: common.Values) -> common.Values:
    """The recipe of the run that collapsed, to the end of its pairs, one pair an update.

    What no config can say is done here: raw prompts, no end of turn, AdamW without bias correction,
    pairs in their order. What its last adapters write is measured, and what the preflight and the
    guard would have said of it.
    """
    recipe = yaml.safe_load(CONTROL.read_text())
    changes = [
        f"{part}.{key}={value}" for part, keys in recipe.items() for key, value in keys.items()
    ]
    config = load(task, [*changes, "guard.enabled=false", "train.force=true"])
    config = raw_pairs(config)
    job = prepare(config)
    encoder = RawEncoder(job.encoder.tokenizer)
    encoded = {
        split: pairs.encode_all(raw, encoder, config.data.max_length)[0]
        for split, raw in job.raw.items()
    }
    job = replace(job, encoder=encoder, pairs=encoded)
    caught = [f"preflight: {finding.text}" for finding in preflight(job)]
    phases = Phases(job, training_inputs(config))
    examples = {
        split: [Example(*both) for both in zip(encoded[split], references, strict=True)]
        for split, references in phases.references(only_read=False).items()
    }
    ordered = list(examples[TRAIN])
    shuffle = [i for _, group in groups(config.train, len(ordered), config.seed) for i in group]
    for example, index in zip(examples[TRAIN], shuffle, strict=False):  # of the first epoch, undone
        ordered[index] = example
    file = MetricsFile(config.run / "metrics.jsonl")
    training = Trainer(
        job.model, config, Dpo(config), ordered, examples[VALID], file, phases.watch, phases.guard
    )
    training.optimizer = optim.AdamW(config.train.learning_rate, weight_decay=0.0)
    started = time.perf_counter()
    training.run(phases.base)
    minutes = (time.perf_counter() - started) / 60
    for row in jsonl.read_whole_lines(config.run / "metrics.jsonl"):
        written = {k.removeprefix("eval_text/"): v for k, v in row.items() if "eval_text/" in k}
        if written:
            change = row["eval_logps/chosen_change_per_token"]
            found = phases.guard.crossed(written, change)
            caught += [f"update {row['iteration']}: {text}" for text in found]
    kept = phases.guard.kept
    return {
        "minutes": minutes,
        "updates": training.updates,
        "kept_update": kept.update,
        "stopped": [],
        "caught": caught,
        **outcome_of(config, training.checkpoints.path("dpo", training.updates), task, RawEncoder),
    }


def raw_pairs(config: Config) -> Config:
    """The config on pairs of its own: the same rows, their rejected answers sampled from the raw
    prompts as the config says.
    """
    loaded = models.load(config.model)
    encoder = RawEncoder(loaded.tokenizer)
    files = {split: config.run / f"pairs/{split}.jsonl" for split in (TRAIN, VALID)}
    for split, file in files.items():
        rows = pairs.read(pair_file(config, split))
        prompts = [encoder.prompt(row.prompt) for row in rows]
        answers = sample_all(
            loaded.model, loaded.tokenizer, prompts, config.generation, config.seed
        )
        made = [
            {
                "prompt": row.prompt,
                "chosen": row.chosen,
                "rejected": a.text,
                "rejected_finish": LENGTH,
            }
            for row, a in zip(rows, answers, strict=True)
            if a.text
        ]
        jsonl.write(file, made)
    data = replace(config.data, train_pairs=str(files[TRAIN]), valid_pairs=str(files[VALID]))
    return replace(config, data=data)


if __name__ == "__main__":
    common.start(main, worker)
