"""Splits work among the processes that `mlx.launch` started.

Rank 0 runs the stage: it alone reads, writes and prints. The other ranks need only the model and
this code. They wait for tasks, and every task is split among all ranks. Rank 0 sends the adapters
to the others when they have changed. All ranks add up their gradients once an update.
"""

from __future__ import annotations

import platform
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from .. import config as configs
from ..config import Config, GenerationConfig
from ..data.encoding import EncodedAnswer, EncodedPair
from ..files import model_files
from ..files.errors import UserError
from ..model.adapters import attach_lora
from ..model.loading import LoadedModel, load_model
from ..model.sampling import Answer, Batch
from ..process import signals
from ..scoring.losses import Sides
from ..scoring.objectives import Example, Objective, by_name
from .channel import Channel, open_channel
from .worker import ExampleScore, Worker

Row = dict[str, Any]  # an item or a result as JSON


class DistributedWorker(Worker):
    """A Worker that uses all processes of a run.

    On rank 0 each method shares out its work and returns the results of all ranks. The other ranks
    `perform` the tasks they receive.
    """

    def __init__(
        self, loaded: LoadedModel, config: Config, channel: Channel, local_processes: int
    ) -> None:
        super().__init__(loaded.model, loaded.tokenizer)
        self.size, self.local_processes = channel.size, local_processes
        self._config = config
        self._channel = channel
        self._sent_adapters: list[mx.array] = []  # all ranks have these
        self._gradient_sum: Any = None  # over all ranks, of the last gradient task

    def log_probs(
        self, sequences: list[EncodedAnswer], without_adapters: bool = False
    ) -> list[float]:
        costs = [len(sequence.ids) for sequence in sequences]
        return self._share("log_probs", sequences, costs, without_adapters)

    def gradient(
        self, objective: Objective, examples: list[Example], seed: int
    ) -> tuple[list[Any], Any, list[int]]:
        costs = [objective.tokens(example) for example in examples]
        rows = self._share("gradient", examples, costs, objective=objective.name, seed=seed)
        scores = [ExampleScore(**row) for row in rows]
        return self._mean(objective, examples, scores, self._gradient_sum)

    def answers(
        self,
        batches: list[Batch],
        settings: GenerationConfig,
        without_adapters: bool = False,
    ) -> list[list[Answer]]:
        rows = self._share_batches("answers", batches, settings, without_adapters)
        return [[Answer(**answer) for answer in row] for row in rows]

    def sequences(
        self,
        batches: list[Batch],
        settings: GenerationConfig,
        without_adapters: bool = False,
    ) -> list[list[EncodedAnswer]]:
        rows = self._share_batches("sequences", batches, settings, without_adapters)
        return [[_sequence(sequence) for sequence in row] for row in rows]

    def _share_batches(
        self, kind: str, batches: list[Batch], settings: GenerationConfig, without_adapters: bool
    ) -> list[Any]:
        """The results of all batches. All ranks stop at rank 0's stop tokens."""
        return self._share(
            kind,
            batches,
            [len(batch.prompts) for batch in batches],
            without_adapters,
            settings=asdict(settings),
            stop_ids=sorted(self.tokenizer.eos_token_ids),
        )

    def _share(
        self,
        kind: str,
        items: Sequence[Any],
        costs: list[int],
        without_adapters: bool = False,
        **settings: Any,
    ) -> list[Any]:
        """The results of all items, in the order of the items."""
        signals.check()
        task = {
            "kind": kind,
            "items": [asdict(item) for item in items],
            "shares": shares(costs, self.size),
            "without_adapters": without_adapters,
            "new_adapters": not without_adapters and self._adapters_changed(),
            **settings,
        }
        self._channel.send(task)
        self._channel.busy = True
        results = self.perform(task)
        self._channel.busy = False
        return results

    def perform(self, task: Row) -> list[Any]:
        """Do this rank's share of a task. Returns the results of all ranks, in the items' order."""
        if task["new_adapters"]:
            self._pass_on_adapters()
        places = task["shares"][self._channel.rank]
        items = [task["items"][place] for place in places]
        local_results = getattr(self, f"_local_{task['kind']}")(task, places, items)
        results: list[Any] = [None] * len(task["items"])
        by_rank = self._channel.gather(local_results)
        for share, part in zip(task["shares"], by_rank, strict=True):
            for place, result in zip(share, part, strict=True):
                results[place] = result
        return results

    def _local_log_probs(self, task: Row, places: list[int], items: list[Row]) -> list[float]:
        sequences = [_sequence(item) for item in items]
        return super().log_probs(sequences, task["without_adapters"])

    def _local_gradient(self, task: Row, places: list[int], items: list[Row]) -> list[Row]:
        """The scores of this rank's examples. Leaves all ranks' sum in `_gradient_sum`."""
        objective = by_name(task["objective"], self._config)
        examples = list(zip(places, map(_example, items), strict=True))
        scores, total = self._gradients(objective, examples, task["seed"])
        if total is None:
            total = tree_map(mx.zeros_like, self.model.trainable_parameters())
        self._gradient_sum = tree_map(lambda g: g * self.size, self._channel.mean(total))
        return [asdict(score) for score in scores]

    def _local_answers(self, task: Row, places: list[int], items: list[Row]) -> list[list[Row]]:
        return self._sample(super().answers, task, items)

    def _local_sequences(self, task: Row, places: list[int], items: list[Row]) -> list[list[Row]]:
        return self._sample(super().sequences, task, items)

    def _sample(
        self, sample: Callable[..., list[list[Any]]], task: Row, items: list[Row]
    ) -> list[list[Row]]:
        """What `sample` returns for the batches of a task, as JSON."""
        self.tokenizer.eos_token_ids = task["stop_ids"]  # rank 0's: an Encoder can add one
        batches, settings = [Batch(**item) for item in items], GenerationConfig(**task["settings"])
        results = sample(batches, settings, task["without_adapters"])
        return [[asdict(result) for result in batch] for batch in results]

    def _each(self, items: Any) -> Any:
        """The items. No signal ends a task half done: the other ranks wait for this one."""
        return iter(items)

    def _adapters_changed(self) -> bool:
        """Whether the adapters have changed since they were last sent.

        Training and loading replace arrays, so it is enough to compare identities.
        """
        adapters = list(self._adapters_by_name().values())
        return len(adapters) != len(self._sent_adapters) or any(
            new is not old for new, old in zip(adapters, self._sent_adapters, strict=True)
        )

    def _pass_on_adapters(self) -> None:
        """Send rank 0's adapters to all ranks.

        The ranks add up rank 0's adapters and the others' zeros, which is exact.
        """
        named = self._adapters_by_name()
        flat = mx.concatenate([array.reshape(-1) for array in named.values()])
        flat = self._channel.sum(flat if self._channel.rank == 0 else mx.zeros_like(flat))
        if self._channel.rank > 0:
            ends = np.cumsum([array.size for array in named.values()]).tolist()
            parts = zip(named.items(), mx.split(flat, ends[:-1]), strict=True)
            adapters = [(name, part.reshape(old.shape)) for (name, old), part in parts]
            self.model.load_weights(adapters, strict=False)
            mx.eval(self.model.trainable_parameters())
        self._sent_adapters = list(self._adapters_by_name().values())

    def _adapters_by_name(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.trainable_parameters()))


def shares(costs: list[int], size: int) -> list[list[int]]:
    """The places of the items for each of `size` processes, with similar sums of costs.

    The costliest item goes first, each to the process with the least work so far (Graham 1969,
    longest processing time first).
    """
    load = [0] * size
    shares: list[list[int]] = [[] for _ in range(size)]
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = load.index(min(load))
        shares[least].append(place)
        load[least] += costs[place]
    return [sorted(share) for share in shares]


def load(config: Config, train: bool) -> tuple[LoadedModel, Worker]:
    """(the run's model, with fresh adapters if it is to `train`; the Worker that computes with it).

    The Worker is a DistributedWorker when the run has several processes. Raises UserError for a
    model that cannot be loaded, and when another rank has a different one.
    """
    channel = open_channel()
    if channel.size == 1:
        loaded = _load(config, train)
        return loaded, Worker(loaded.model, loaded.tokenizer)
    if channel.rank == 0:
        channel.send({"config": asdict(config), "train": train})
        channel.busy = True
    loaded = _load(config, train)
    fingerprints = channel.gather(model_files.fingerprint(config.model))
    machines = channel.gather(platform.node())
    channel.busy = False
    if channel.rank == 0:
        _require_same_model(config, fingerprints)
    return loaded, DistributedWorker(
        loaded, config, channel, machines.count(machines[channel.rank])
    )


def _require_same_model(config: Config, fingerprints: list[Any]) -> None:
    """Raises UserError when a rank has other model files than rank 0."""
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise UserError(
                f"model: rank {rank} has other files under {config.model} than rank 0; put the "
                "same model folder on every machine"
            )


def _load(config: Config, train: bool) -> LoadedModel:
    loaded = load_model(config.model, lazy=True, scan_chunk=config.train.scan_chunk)
    if train:
        mx.random.seed(config.seed)
        attach_lora(loaded.model, config.lora)
    return loaded


def serve() -> None:
    """Perform rank 0's tasks until it sends the last one.

    Ignores the signals that end a run: rank 0 gets them too, and needs this process until the
    current task is done. Raises UserError that names this rank and its machine.
    """
    for number in signals.DEFERRED:
        signal.signal(number, signal.SIG_IGN)
    channel, worker = open_channel(), None
    try:
        while (task := channel.receive()) is not None:
            if "config" in task:
                _, worker = load(configs.from_values(task["config"]), task["train"])
            else:
                assert isinstance(worker, DistributedWorker)
                worker.perform(task)
    except UserError as error:
        raise type(error)(f"rank {channel.rank} on {platform.node()}: {error}") from error


def _sequence(row: Row) -> EncodedAnswer:
    return EncodedAnswer(tuple(row["ids"]), row["prompt_length"])


def _example(row: Row) -> Example:
    pair = row["pair"]
    chosen, rejected = (_sequence(pair[side]) for side in ("chosen", "rejected"))
    return Example(EncodedPair(chosen, rejected, pair["line"]), Sides(*row["reference"]))
