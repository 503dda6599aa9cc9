"""What each recipe makes of a model: is the voice learned, is the model still fluent?

    python tests/benchmarks/bench_outcome.py [--data FILE] [--train N --held N] [--seeds 0,1,2]
                                             [--jobs N] [--recipes shipped,plan,...]

Stage 06 samples a rejected answer to every question once. For each seed the pairs are shuffled and
cut to --train pairs and --held held-out ones, and every recipe trains on the same ones by stage 10
with the shipped demo config and the changes in RECIPES. Then the tuned model answers the held-out
questions, sampled as the config says and greedily, and is measured beside the base model. Results
stand in FOLDER/SEED/rows.jsonl as soon as they are there. `SFT alone` and `DPO to its end` after
another recipe measure what that one had at the end of a phase, whatever it kept. The same command
again goes on where stage 10 was stopped.

How to read the table, a row a recipe and seed
  voice       share of questions on which the tuned answer scores above the base's
  score       mean voice score of the tuned answers, and in the JSON of base and real ones
  d2, d2 g    distinct word pairs of tuned minus base answers, sampled and greedy
  ended       share that ends by itself, over the base's
  nats        mean log-prob per token under the base model, of tuned minus base answers
  length      median tokens of tuned answers over those of the real ones
  held        whether all targets are (voice >= 0.90, d2 >= -0.03, ended >= 0.95, nats >= -1.0,
              length within 25%), sampled
  margin      reward margin of the valid pairs at the end, against the phase's reference
  kept, of    the update whose adapters are kept, and the updates done; * stopped by the guard
`control` is the run that collapsed (control.yaml, with the guard and the preflight off); its last
adapters are measured. `caught by` says what preflight and guard say of it when they are on.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import common
import mlx.optimizers as optim
import yaml
from dpo_mlx import config as configs
from dpo_mlx.config import Config, GenerationConfig
from dpo_mlx.data import encoding, pairs
from dpo_mlx.data.encoding import Encoder
from dpo_mlx.data.pairs import LENGTH, STOP, Pair
from dpo_mlx.files import jsonl, ownership
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.run_folder import TRAIN, VALID
from dpo_mlx.model.loading import LoadedModel, load_model
from dpo_mlx.model.sampling import Answer, with_max_tokens
from dpo_mlx.parallel.worker import Worker, answer_all
from dpo_mlx.scoring.objectives import DPO, SFT, Example
from dpo_mlx.stages import make_pairs
from dpo_mlx.stages.train_dpo import train_dpo
from dpo_mlx.training import checkpoint
from dpo_mlx.training.checkpoint import Checkpoints, State
from dpo_mlx.training.guard import crossed_limits
from dpo_mlx.training.metrics import MetricsFile
from dpo_mlx.training.phases import Phases
from dpo_mlx.training.preflight import preflight
from dpo_mlx.training.schedule import groups
from dpo_mlx.training.setup import prepare
from dpo_mlx.training.trainer import Examples, Trainer
from dpo_mlx.voice.answers import Measures, measure
from dpo_mlx.voice.voice_classifier import fit_classifier

DEMO = common.ROOT / "config/smollm2-135m_demo.yaml"
CONTROL = Path(__file__).with_name("control.yaml")
SHIPPED, COLLAPSED = "shipped", "control"
PHASE_ENDS = {"SFT alone": SFT, "DPO to its end": DPO}
SAMPLED, GREEDY = "sampled", "greedy"

# Changes to the demo's config.
WHOLE = "dpo.match_length=false"
NO_SFT = [WHOLE, "sft.epochs=0"]
RECIPES: dict[str, list[str]] = {
    SHIPPED: [],
    "whole rejected": [WHOLE],
    "plan": [*NO_SFT, "dpo.nll_weight=0", "train.learning_rate=1e-6", "train.force=true"],
    "DPO with NLL": [*NO_SFT, "dpo.nll_weight=1", "train.learning_rate=5e-5"],
}

TARGETS = {"voice": 0.90, "d2": -0.03, "ended": 0.95, "nats": -1.0, "length": 0.25}


def main() -> None:
    args = arguments()
    rows = pool(args)
    with ThreadPoolExecutor(args.jobs) as pools:
        found = list(pools.map(lambda seed: of_seed(args, rows, seed), args.seeds))
    results = [row for of_one in found for row in of_one]
    common.table("what each recipe makes of the model", [line(row) for row in results])
    for row in results:
        if row.get("caught"):
            print(f"\n{row['recipe']}, seed {row['seed']}, caught by:", *row["caught"], sep="\n  ")
    common.save(args, {"rows": results})


def arguments() -> Namespace:
    parser = common.parser(__doc__, "bench_outcome")
    sample = common.ROOT / "data/sample/generated_answers.jsonl"
    parser.add_argument("--data", type=Path, default=sample, help="questions and answers")
    parser.add_argument("--pairs", type=Path, help="pairs as stage 06 writes them instead")
    parser.add_argument("--train", type=int, default=100, help="pairs")
    parser.add_argument("--held", type=int, default=30, help="held-out pairs, all answered")
    parser.add_argument("--seeds", type=common.numbers, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, sharing the cores")
    parser.add_argument("--recipes", default=",".join([*RECIPES, COLLAPSED]))
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="for all")
    parser.add_argument("--folder", type=Path, default=common.DATA / "outcome")
    args = parser.parse_args()
    args.recipes = args.recipes.split(",")
    if unknown := set(args.recipes) - {*RECIPES, *PHASE_ENDS, COLLAPSED}:
        parser.error(f"--recipes: no {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    first = next((recipe for recipe in args.recipes if recipe != COLLAPSED), "")
    if first in PHASE_ENDS:
        parser.error(f"--recipes: {first} measures the run of a recipe before it; name one")
    return args


def pool(args: Namespace) -> list[common.Values]:
    """All pairs there are, as rows; what stage 06 has sampled of the same data is used again."""
    if args.pairs is None:
        folder = args.folder / "pool"
        sets = {
            "run_dir": folder,
            "data.source": args.data,
            "data.train_pairs": folder / "train.jsonl",
            "data.valid_pairs": folder / "valid.jsonl",
            "data.valid_fraction": 0.5,
            "data.limit": "null",
        }
        sampled = common.measure("bench_outcome.py", task("pairs", args, sets))
        require(sampled)
        files = [folder / "train.jsonl", folder / "valid.jsonl"]
    else:
        files = [args.pairs]
    return [row for file in files for row in jsonl.read_whole_lines(file)]


def of_seed(args: Namespace, rows: list[common.Values], seed: int) -> list[common.Values]:
    """The results of all recipes for a seed."""
    folder = args.folder / f"{seed}"
    shuffled = random.Random(seed).sample(rows, args.train + args.held)
    train, valid = folder / "train.jsonl", folder / "valid.jsonl"
    parts = {train: shuffled[: args.train], valid: shuffled[args.train :]}
    if any(jsonl.read_whole_lines(file) != part for file, part in parts.items() if file.exists()):
        shutil.rmtree(folder)  # runs on other pairs
    for file, part in parts.items():
        jsonl.write(file, part)
    sets = {
        "run_dir": folder,
        "seed": seed,
        "data.train_pairs": train,
        "data.valid_pairs": valid,
    }
    asked = {**task("seed", args, sets), "recipes": args.recipes, "folder": str(folder)}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    found = common.measure("bench_outcome.py", asked, threads=threads)
    require(found)
    return [{**row, "seed": seed} for row in found["rows"]]


def task(kind: str, args: Namespace, sets: common.Values) -> common.Values:
    changes = [*args.overrides, *(f"{key}={value}" for key, value in sets.items())]
    return {"task": kind, "changes": changes}


def require(found: common.Values) -> None:
    if "failed" in found:
        raise SystemExit(found["failed"])


def worker(task: common.Values) -> common.Values:
    if task["task"] == "pairs":
        make_pairs.make_pairs(configs.load(DEMO, task["changes"]))
        return {}
    return {"rows": list(each_recipe(task))}


def each_recipe(task: common.Values) -> Iterator[common.Values]:
    """What each recipe made, one after the other; rows stand in rows.jsonl as soon as they are."""
    folder = Path(task["folder"])
    (folder / "rows.jsonl").unlink(missing_ok=True)
    asked: Asked | None = None
    previous: Path | None = None
    whole: common.Values = {}
    for recipe in task["recipes"]:
        run = folder / recipe.replace(" ", "_")
        changes = [*task["changes"], f"run_dir={run}"]
        config = configs.load(DEMO, [*RECIPES.get(recipe, []), *changes])
        asked = asked or Asked(config)
        if recipe == COLLAPSED:
            shutil.rmtree(run, ignore_errors=True)  # it goes on from nothing
            row = collapse(changes, asked)
        elif recipe in PHASE_ENDS:
            row = at_end(PHASE_ENDS[recipe], previous, asked, whole)
        else:
            if previous is not None and not run.exists():
                copy_run(previous, run)
            row = whole = by_recipe(config, asked)
            previous = run
        jsonl.append(folder / "rows.jsonl", [line({**row, "recipe": recipe, "seed": "-"})])
        yield {"recipe": recipe, **row}


def copy_run(previous: Path, run: Path) -> None:
    """What is still valid of an earlier recipe's run is not computed again."""
    with ownership.new_folder(run) as temporary:
        shutil.copytree(previous, temporary, dirs_exist_ok=True)


def by_recipe(config: Config, asked: Asked) -> common.Values:
    """The whole of stage 10, and what the kept adapters write."""
    started = time.perf_counter()
    train_dpo(config)
    minutes = (time.perf_counter() - started) / 60
    outcome = jsonl.read_json(config.run.path / "outcome.json")
    return {
        "minutes": minutes,
        **outcome,
        **asked.outcome(config.run.path, config.run.path / "adapters"),
    }


def at_end(phase: str, run: Path | None, asked: Asked, whole: common.Values) -> common.Values:
    """What a recipe's run, whose row is given, had at the end of a phase."""
    path = run and Checkpoints(run / "checkpoints").newest(phase)
    if not (run and path):
        raise UserError(f"the end of {phase} of which recipe? name one before it that has {phase}")
    update = checkpoint.read(path)[0].update
    found = {"minutes": 0.0, "updates": update, "kept_update": update, "stopped": []}
    measured = whole if update == whole["kept_update"] else asked.outcome(run, path)
    no_margin = {"margin": None, "accuracy": None} if phase == SFT else {}
    return {**measured, **found, **no_margin}


# What is written ------------------------------------------------------------------------------


def decodings(lengths: list[int]) -> dict[str, GenerationConfig]:
    """How the held-out questions are answered, whose real answers have these lengths: as the
    shipped config samples, and greedily.
    """
    sampled = with_max_tokens(configs.load(DEMO).generation, lengths)
    return {SAMPLED: sampled, GREEDY: replace(sampled, temperature=0.0)}


class Asked:
    """The held-out questions of a seed, what the base model and the real answers say to them, and
    how they are measured. By decoding and by who answers.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.pairs = {split: pairs.read(config.pairs.splits[split]) for split in (TRAIN, VALID)}
        train, valid = self.pairs[TRAIN], self.pairs[VALID]
        self.classifier = fit_classifier([p.chosen for p in train], [p.rejected for p in train])
        self.loaded = load_model(config.model)
        self.encoder = Encoder.of(self.loaded.tokenizer, config)
        real = [self.as_sampled(pair.chosen, STOP) for pair in valid]
        self.decodings = decodings(
            encoding.chosen_lengths([*train, *valid], self.encoder, config.data.max_length)
        )
        base = {
            SAMPLED: [self.as_sampled(p.rejected, p.rejected_finish) for p in valid],
            GREEDY: self.answer(self.loaded, self.encoder, GREEDY),
        }
        self.answers = {how: {"base": base[how], "chosen": real} for how in self.decodings}
        chosen = self.measures(real)
        self.measured = {
            how: {"base": self.measures(both["base"]), "chosen": chosen}
            for how, both in self.answers.items()
        }

    def as_sampled(self, text: str, finish: str) -> Answer:
        return Answer(text, finish, len(self.encoder.answer_ids(text, LENGTH)))

    def answer(self, loaded: LoadedModel, encoder: Encoder, how: str) -> list[Answer]:
        return answer(loaded, encoder, self.pairs[VALID], self.decodings[how], self.config.seed)

    def measures(self, answers: list[Answer]) -> Measures:
        """Those of answers, under the base model."""
        log_probs = Worker(self.loaded.model).log_probs
        return measure(answers, self.pairs[VALID], self.classifier, log_probs, self.encoder)

    def outcome(self, run: Path, adapters: Path, encoder: Encoder | None = None) -> common.Values:
        """What the model with `adapters` writes to prompts of `encoder`, measured beside the base
        model's and the real answers, with the margin of the run's last evaluation.
        """
        loaded = load_model(self.config.model, adapters)
        tuned = {how: self.answer(loaded, encoder or self.encoder, how) for how in self.answers}
        texts = {
            how: {
                who: [a.text for a in given] for who, given in {**both, "tuned": tuned[how]}.items()
            }
            for how, both in self.answers.items()
        }
        scores = {who: self.classifier.log_odds(given) for who, given in texts[SAMPLED].items()}
        rows = jsonl.read_whole_lines(run / "metrics.jsonl")
        last = [row for row in rows if "eval_loss" in row][-1]
        return {
            "share": float((scores["tuned"] > scores["base"]).mean()),
            "margin": last["eval_rewards/margins"],
            "accuracy": last["eval_rewards/accuracies"],
            "pairs": {split: len(found) for split, found in self.pairs.items()},
            "measured": {
                how: {**both, "tuned": self.measures(tuned[how])}
                for how, both in self.measured.items()
            },
            "texts": texts,
        }


def answer(
    loaded: LoadedModel,
    encoder: Encoder,
    asked: list[Pair],
    settings: GenerationConfig,
    seed: int,
) -> list[Answer]:
    prompts = [encoder.prompt_ids(pair.prompt) for pair in asked]
    return answer_all(Worker(loaded.model, loaded.tokenizer), prompts, settings, seed)


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

    def answer_ids(self, text: str, finish: str = STOP) -> list[int]:
        return super().answer_ids(" " + text, LENGTH)


def collapse(changes: list[str], asked: Asked) -> common.Values:
    """The recipe of the run that collapsed, one pair an update.

    What no config can say is done here: raw prompts, no end of turn, AdamW without bias correction,
    pairs in their order. What its last adapters write is measured, and what the preflight and the
    guard would have said of it.
    """
    recipe = yaml.safe_load(CONTROL.read_text())
    recipe["guard"] = {"enabled": False}
    recipe["train"]["force"] = True
    control = [
        f"{part}.{key}={value}" for part, keys in recipe.items() for key, value in keys.items()
    ]
    config = configs.load(DEMO, [*control, *changes])
    config = raw_pairs(config)
    job = prepare(config)
    encoder = RawEncoder(job.encoder.tokenizer)
    encoded = {
        split: encoding.encode_all(raw, encoder, config.data.max_length)[0]
        for split, raw in job.raw.items()
    }
    job = replace(job, encoder=encoder, pairs=encoded)
    caught = [f"preflight: {finding.text}" for finding in preflight(job)]
    phases = Phases(job)
    examples = {
        split: [Example(*both) for both in zip(encoded[split], references, strict=True)]
        for split, references in phases.references(only_read=False).items()
    }
    ordered, watched = list(examples[TRAIN]), examples[VALID][: config.train.eval_questions]
    shuffle = [i for _, group in groups(config.train, len(ordered), config.seed) for i in group]
    for example, index in zip(examples[TRAIN], shuffle, strict=True):  # undone
        ordered[index] = example
    training = Trainer(
        job.worker,
        config,
        Examples(ordered, watched),
        phases.evaluator,
        MetricsFile(config.run.path / "metrics.jsonl"),
        Checkpoints(config.run.path / "checkpoints"),
        State(DPO, base=phases.base, measures=phases.base),
    )
    training.optimizer = optim.AdamW(config.train.learning_rate, weight_decay=0.0)
    started = time.perf_counter()
    training.run()
    minutes = (time.perf_counter() - started) / 60
    for row in jsonl.read_whole_lines(config.run.path / "metrics.jsonl"):
        written = {k.removeprefix("eval_text/"): v for k, v in row.items() if "eval_text/" in k}
        if written:
            change = row["eval_logps/chosen_change_per_token"]
            crossed = crossed_limits(config.guard, phases.base, written, change)
            caught += [f"update {row['iteration']}: {text}" for text in crossed]
    best = training.state.best
    assert best is not None
    return {
        "minutes": minutes,
        "updates": training.updates,
        "kept_update": best.update,
        "stopped": [],
        "caught": caught,
        **asked.outcome(config.run.path, training.checkpoints.path(DPO, training.updates), encoder),
    }


def raw_pairs(config: Config) -> Config:
    """The config on pairs of its own: the same rows, their rejected answers sampled from the raw
    prompts as the config says. Where the base model says nothing to those, the pool's is kept.
    """
    loaded = load_model(config.model)
    encoder = RawEncoder(loaded.tokenizer)
    files = {split: config.run.path / f"pairs/{split}.jsonl" for split in (TRAIN, VALID)}
    for split, file in files.items():
        rows = pairs.read(config.pairs.splits[split])
        lengths = encoding.chosen_lengths(rows, encoder, config.data.max_length)
        limits = with_max_tokens(config.generation, lengths)
        answers = answer(loaded, encoder, rows, limits, config.seed)
        made = [
            {"prompt": row.prompt, "chosen": row.chosen, "rejected": a.text or row.rejected}
            for row, a in zip(rows, answers, strict=True)
        ]
        jsonl.write(file, [{**row, "rejected_finish": LENGTH} for row in made])
    data = replace(config.data, train_pairs=str(files[TRAIN]), valid_pairs=str(files[VALID]))
    return replace(config, data=data)


if __name__ == "__main__":
    common.start(main, worker)
