"""What a stage will need of memory, found by running a few blocks before the whole model.

The first blocks of a lazily loaded model do what the stage will do: take a gradient of the longest
sequence, sample a batch, score an answer, fuse a layer. What each further block adds is
extrapolated to all of them. So a plan knows the device, the dtype, the architecture and
checkpointing as they are, and costs seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import get_total_parameters

from . import device, fusing
from .config import Config
from .engine import Engine
from .errors import UserError
from .models import adapter_bytes, dtype_name, gradient_checkpointing, nbytes
from .pairs import Sequence
from .sampling import EVALUATED_AT_ONCE

# Beside its parameters an adapter has two moments in AdamW, and three gradients at the peak: the
# sum so far, the chosen side's and, counted in the work, the rejected side's.
TRAINED_COPIES = 5
# While a training run answers questions, it holds the adapters and their moments.
HELD_COPIES = 3

# Blocks of a kind that are run at most; the more, the less a peak's chance overlaps count.
MEASURED = 5


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of one thing that a stage does, in each of its processes on a machine.

    `what` is what the stage does, `remedy` what to change when that is too much.
    """

    what: str
    remedy: str
    weights: int
    adapters: int
    work: int
    processes: int = 1

    @property
    def total(self) -> int:
        return self.processes * (self.weights + self.adapters + self.work)

    def __str__(self) -> str:
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        adapters = f"adapters {self.adapters / 1e9:.2f}, " if self.adapters else ""
        return (
            f"{self.total / 1e9:.2f} GB for {self.what} (weights {self.weights / 1e9:.2f}, "
            f"{adapters}work {self.work / 1e9:.2f}{each})"
        )


def largest(needs: List[Need]) -> Need:
    """What a stage with these needs takes at its peak."""
    return max(needs, key=lambda need: need.total)


def require(needs: List[Need], model: str) -> Need:
    """The largest need. Raises UserError when the device offers less than that."""
    need, offered = largest(needs), device.available()
    if need.total > offered:
        fewer = "start the runner with --launch none, " if need.processes > 1 else ""
        raise UserError(
            f"{model}: needs {need}, this machine offers {offered / 1e9:.2f} GB; {fewer}"
            f"{need.remedy}, or set model to a smaller or a quantised one"
        )
    return need


def training(model: nn.Module, longest: Sequence, processes: int = 1) -> Need:
    """An update of a model that carries adapters, with its longest sequence.

    Call it inside `models.gradient_checkpointing` as training will be.
    """
    adapters, engine = adapter_bytes(model), Engine(model, check=False)
    return Need(
        f"an update with sequences of {len(longest.ids)} tokens",
        "lower data.max_length, set train.grad_checkpoint: true",
        nbytes(model.parameters()) - adapters,
        TRAINED_COPIES * adapters,
        _work(model, lambda: engine.log_prob_and_gradient(longest)),
        processes,
    )


def sampling(
    model: nn.Module, batch: int, prompt: int, answer: int, key: str, processes: int = 1
) -> Need:
    """Sampling `batch` answers at once, of up to `answer` tokens, to prompts of up to `prompt`
    tokens; `key` is the config's key that lowers the batch. A model that carries adapters holds
    their optimizer's state beside them.
    """
    adapters = adapter_bytes(model)
    empty, kinds = make_prompt_cache(model), _kinds(model.layers)
    growth: dict[str, int] = {}

    def read_prompts() -> list[Any]:
        caches = copy.deepcopy(empty)
        _read_prompts(model, caches, batch, prompt)
        return caches

    def write_answers() -> None:
        caches = read_prompts()
        mx.reset_peak_memory()
        _write_two_tokens(model, caches, batch)
        growth.update(
            zip(kinds, _growth(caches[: len(model.layers)], prompt + answer), strict=False)
        )

    reading, writing = _work(model, read_prompts), _work(model, write_answers)
    return Need(
        f"sampling {batch} answers at once",
        f"lower {key}",
        nbytes(model.parameters()) - adapters,
        HELD_COPIES * adapters,
        max(reading, writing + sum(growth[kind] for kind in kinds)),
        processes,
    )


def scoring(model: nn.Module, longest: Sequence) -> Need:
    """The log-prob of the longest sequence."""
    adapters, engine = adapter_bytes(model), Engine(model, check=False)
    return Need(
        f"scoring answers of {len(longest.ids)} tokens",
        "lower data.max_length",
        nbytes(model.parameters()) - adapters,
        adapters,
        _work(model, lambda: engine.log_prob(longest)),
    )


@dataclass(frozen=True)
class Lengths:
    """What a stage will meet at most: questions to answer, tokens of a prompt, tokens of a sampled
    answer, and the longest prompt with its answer.
    """

    questions: int
    prompt: int
    answer: int
    longest: Sequence


def stage_06(model: nn.Module, config: Config, lengths: Lengths, processes: int = 1) -> list[Need]:
    """Sampling the rejected answers."""
    batch = min(config.generation.batch_size, lengths.questions)
    key = "generation.batch_size"
    return [sampling(model, batch, lengths.prompt, lengths.answer, key, processes)]


def stage_10(model: nn.Module, config: Config, lengths: Lengths, processes: int = 1) -> list[Need]:
    """Updates, and the answers of the evaluations; the model carries adapters."""
    batch = min(EVALUATED_AT_ONCE, config.train.eval_questions, lengths.questions)
    key = "train.eval_questions"
    with gradient_checkpointing(model, config.train.grad_checkpoint):
        update = training(model, lengths.longest, processes)
    return [update, sampling(model, batch, lengths.prompt, lengths.answer, key, processes)]


def stage_11(model: nn.Module, config: Config, longest: Sequence) -> list[Need]:
    """Fusing a model that carries adapters, and comparing both by scoring in float32."""
    adapters = adapter_bytes(model)
    dtype = fusing.target_dtype(model, config.fuse.dtype)
    before = nbytes(model.parameters()) - adapters
    after = get_total_parameters(model) * dtype.size
    weights = max(before, after)
    quantized = after * (config.fuse.quantize or 0) // (8 * dtype.size)
    remedy = "set fuse.dtype: null or float16, or use the adapters as they are (--adapter-path)"
    with fusing.activations_in_float32(model):  # which keeps the model's own embedding too
        comparing = scoring(model, longest)
        embedding = nbytes(model.model.embed_tokens.parameters())
    # After scoring, which has read that layer: its weights count as weights.
    layer = _peak(lambda: fusing.fuse_largest_layer(model, dtype))
    return [
        Need(f"fusing into {dtype_name(dtype)}", remedy, weights + quantized, adapters, layer),
        replace(comparing, remedy=remedy, weights=weights, work=comparing.work + embedding),
    ]


def stage_12(model: nn.Module, config: Config, lengths: Lengths) -> list[Need]:
    """Answering the held-out questions, and scoring the valid pairs."""
    batch = min(config.generation.batch_size, config.smoke.questions, lengths.questions)
    key = "generation.batch_size"
    return [
        sampling(model, batch, lengths.prompt, lengths.answer, key),
        scoring(model, lengths.longest),
    ]


def _read_prompts(model: nn.Module, caches: list[Any], batch: int, prompt: int) -> None:
    """Fill the caches with prompts, as mlx-lm's BatchGenerator does."""
    model.model(mx.zeros((batch, prompt), dtype=mx.int32), caches)
    mx.eval([cache.state for cache in caches if not cache.empty()])


def _write_two_tokens(model: nn.Module, caches: list[Any], batch: int) -> None:
    token = mx.zeros((batch, 1), dtype=mx.int32)
    for _ in range(2):
        log_probs = nn.log_softmax(model(token, cache=caches)[:, -1].astype(mx.float32), axis=-1)
        token = mx.random.categorical(log_probs)[:, None]
        mx.eval(token, mx.exp(log_probs))


def _growth(caches: list[Any], length: int) -> list[int]:
    """Bytes that each cache will take more when it holds `length` tokens."""
    growth = []
    for cache in caches:
        more = 0
        if isinstance(cache, KVCache) and cache.keys is not None and cache.values is not None:
            allocated = cache.keys.shape[2]
            final = -(-length // KVCache.step) * KVCache.step
            more = (cache.keys.nbytes + cache.values.nbytes) * max(0, final - allocated)
            more //= allocated
        growth.append(more)
    return growth


def _work(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that `run` takes beside the weights of the whole model.

    It is run on the first blocks, at least one of each kind; each further block takes what a block
    of its kind took among them.
    """
    kinds = _kinds(model.layers)
    spans = {kind: _span(kinds, kinds.index(kind)) for kind in set(kinds)}
    taken = {count: _taken(model, count, run) for count in sorted(set().union(*spans.values()))}
    step = {
        kind: (taken[end] - taken[start]) // (end - start) if start < end else taken[end]
        for kind, (start, end) in spans.items()
    }
    most = max(taken)
    return taken[most] + sum(step[kind] for kind in kinds[most:])


def _span(kinds: list[str], first: int) -> tuple[int, int]:
    """(start, end) such that blocks start to end - 1 are alike: up to MEASURED of them from the
    first of a kind on. The very first two blocks are always run: from the second on, one block's
    buffers overlap with another's.
    """
    end = first + 1
    while end < min(len(kinds), first + MEASURED) and kinds[end] == kinds[first]:
        end += 1
    return max(1, first, min(2, end - 1)), end


def _kinds(layers: List[nn.Module]) -> list[str]:
    """What kind of block each is, told by the names and shapes of its parameters."""
    return [
        str([(name, array.shape) for name, array in dict(tree_flatten(layer.parameters())).items()])
        for layer in layers
    ]


def _taken(model: nn.Module, count: int, run: Callable[[], Any]) -> int:
    """Bytes that `run` takes at its peak with the first `count` blocks."""
    layers = model.model.layers
    model.model.layers = layers[:count]
    try:
        mx.eval(model.parameters())  # the weights that are run count as weights
        return _peak(run)
    finally:
        model.model.layers = layers


def _peak(run: Callable[[], Any]) -> int:
    """Bytes that `run` takes at its peak beside what is in memory already."""
    device.release()  # or arrays of others, freed while this is measured, would be taken off
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - before
