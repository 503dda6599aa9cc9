"""Work shared by the processes that `mlx.launch` started.

Rank 0 runs the stage: it alone reads, writes and prints. The other ranks need the model and this
code, nothing else: they wait for tasks, and each task is split among all ranks. Adapters go from
rank 0 to the others when they have changed, gradients are summed once an update.
"""

from __future__ import annotations

import platform
import signal
from collections.abc import Sequence as Many
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from . import config as configs
from . import model_files, models, signals
from .config import Config, GenerationConfig
from .errors import UserError
from .link import Link, link
from .pairs import EncodedPair, Sequence
from .phase import Dpo, Example, Sft, of_name
from .reference import Reference
from .sampling import Answer, Batch
from .worker import Scored, Worker


class Team(Worker):
    """All processes of a run. On rank 0 a method hands out its work and gives what all found; the
    other ranks `perform` what they are handed.
    """

    def __init__(
        self, loaded: models.LoadedModel, config: Config, between: Link, here: int
    ) -> None:
        super().__init__(loaded.model, loaded.tokenizer)
        self.size, self.here = between.size, here
        self._config = config
        self._link = between
        self._sent: list[mx.array] = []  # the adapters that all ranks hold
        self._total: Any = None  # of all ranks' gradients, of the last task

    def log_probs(self, sequences: list[Sequence], plain: bool = False) -> list[float]:
        costs = [len(sequence.ids) for sequence in sequences]
        return self._share("log_probs", sequences, costs, plain)

    def gradient(
        self, phase: Sft | Dpo, examples: list[Example], seed: int
    ) -> tuple[list[Any], Any, list[int]]:
        costs = [phase.tokens(example) for example in examples]
        rows = self._share("gradient", examples, costs, False, phase=phase.name, seed=seed)
        found = [Scored(**row) for row in rows]
        return self._mean(phase, examples, found, self._total)

    def answers(
        self, asked: list[Batch], settings: GenerationConfig, plain: bool = False
    ) -> list[list[Answer]]:
        costs = [len(batch.prompts) for batch in asked]
        rows = self._share("answers", asked, costs, plain, settings=asdict(settings))
        return [[Answer(**answer) for answer in row] for row in rows]

    def _share(
        self, what: str, items: Many[Any], costs: list[int], plain: bool, **about: Any
    ) -> list[Any]:
        """What all ranks find of the items, in their order."""
        signals.check()
        task = {
            "what": what,
            "items": [asdict(item) for item in items],
            "shares": shares(costs, self.size),
            "plain": plain,
            "adapters": not plain and self._adapters_changed(),
            **about,
        }
        self._link.send(task)
        self._link.busy = True
        found = self.perform(task)
        self._link.busy = False
        return found

    def perform(self, task: dict[str, Any]) -> list[Any]:
        """This rank's share of a task, and what all ranks found."""
        if task["adapters"]:
            self._pass_on_adapters()
        mine = task["shares"][self._link.rank]
        items = [task["items"][i] for i in mine]
        found = getattr(self, f"_own_{task['what']}")(task, mine, items)
        rows: list[Any] = [None] * len(task["items"])
        for share, part in zip(task["shares"], self._link.gather(found), strict=True):
            for place, row in zip(share, part, strict=True):
                rows[place] = row
        return rows

    def _own_log_probs(
        self, task: dict[str, Any], mine: list[int], items: list[dict[str, Any]]
    ) -> list[float]:
        return super().log_probs([_sequence(item) for item in items], task["plain"])

    def _own_gradient(
        self, task: dict[str, Any], mine: list[int], items: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Leaves the sum of all ranks' gradients in `_total`."""
        phase = of_name(task["phase"], self._config)
        own = list(zip(mine, map(_example, items), strict=True))
        found, total = self._gradients(phase, own, task["seed"])
        if total is None:
            total = tree_map(mx.zeros_like, self.model.trainable_parameters())
        self._total = tree_map(lambda g: g * self.size, self._link.mean(total))
        return [asdict(scored) for scored in found]

    def _own_answers(
        self, task: dict[str, Any], mine: list[int], items: list[dict[str, Any]]
    ) -> list[list[dict[str, Any]]]:
        batches = [Batch(**item) for item in items]
        made = super().answers(batches, GenerationConfig(**task["settings"]), task["plain"])
        return [[asdict(answer) for answer in answers] for answers in made]

    def _each(self, items: Any) -> Any:
        """Other ranks wait for this one, so that a task is always done whole."""
        return iter(items)

    def _adapters_changed(self) -> bool:
        """Since they were passed on: training and loading put new arrays in the old ones' place."""
        now = list(self._adapters_by_name().values())
        return len(now) != len(self._sent) or any(
            new is not old for new, old in zip(now, self._sent, strict=True)
        )

    def _pass_on_adapters(self) -> None:
        """From rank 0 to all: the sum of its adapters and of zeros, which is exact."""
        named = self._adapters_by_name()
        flat = mx.concatenate([array.reshape(-1) for array in named.values()])
        flat = self._link.sum(flat if self._link.rank == 0 else mx.zeros_like(flat))
        if self._link.rank > 0:
            ends = np.cumsum([array.size for array in named.values()]).tolist()
            parts = zip(named.items(), mx.split(flat, ends[:-1]), strict=True)
            passed_on = [(name, part.reshape(old.shape)) for (name, old), part in parts]
            self.model.load_weights(passed_on, strict=False)
            mx.eval(self.model.trainable_parameters())
        self._sent = list(self._adapters_by_name().values())

    def _adapters_by_name(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.trainable_parameters()))


def shares(costs: list[int], size: int) -> list[list[int]]:
    """Places for each of `size` processes, whose sums of costs are near each other: the costliest
    goes first, to whom has least (Graham 1969, longest processing time first).
    """
    load = [0] * size
    places: list[list[int]] = [[] for _ in range(size)]
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = load.index(min(load))
        places[least].append(place)
        load[least] += costs[place]
    return [sorted(own) for own in places]


def load(config: Config, train: bool) -> tuple[models.LoadedModel, Worker]:
    """The model of a run, with fresh adapters in order to `train` it, and who computes with it:
    this process, or a Team on all ranks.

    Raises UserError for a model that cannot be loaded, and when another rank holds another one.
    """
    between = link()
    if between.size == 1:
        loaded = _load(config, train)
        return loaded, Worker(loaded.model, loaded.tokenizer)
    if between.rank == 0:
        between.send({"config": asdict(config), "train": train})
        between.busy = True
    loaded = _load(config, train)
    marks = between.gather(model_files.fingerprint(config.model))
    machines = between.gather(platform.node())
    between.busy = False
    differing = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
    if between.rank == 0 and differing:
        raise UserError(
            f"model: rank {differing[0]} has other files under {config.model} than rank 0; put the "
            "same model folder on every machine"
        )
    return loaded, Team(loaded, config, between, machines.count(machines[between.rank]))


def _load(config: Config, train: bool) -> models.LoadedModel:
    loaded = models.load(config.model, lazy=True, scan_chunk=config.train.scan_chunk)
    if train:
        mx.random.seed(config.seed)
        models.attach_lora(loaded.model, config.lora)
    return loaded


def serve() -> None:
    """Help rank 0 until it dismisses. A signal that ends the run reaches rank 0, which needs this
    process until what is in hand is done.

    Raises UserError, that names this rank and its machine.
    """
    for number in signals.CAUGHT:
        signal.signal(number, signal.SIG_IGN)
    between, team = link(), None
    try:
        while (task := between.receive()) is not None:
            if "config" in task:
                _, team = load(configs.of_values(task["config"]), task["train"])
            else:
                assert isinstance(team, Team)
                team.perform(task)
    except UserError as error:
        raise type(error)(f"rank {between.rank} on {platform.node()}: {error}") from error


def _sequence(row: dict[str, Any]) -> Sequence:
    return Sequence(tuple(row["ids"]), row["prompt_length"])


def _example(row: dict[str, Any]) -> Example:
    pair = row["pair"]
    chosen, rejected = (_sequence(pair[side]) for side in ("chosen", "rejected"))
    return Example(EncodedPair(chosen, rejected, pair["line"]), Reference(**row["reference"]))
