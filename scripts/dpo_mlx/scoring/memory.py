"""Estimate a stage's peak memory by running a few blocks of its model.

A few blocks of a lazily loaded model do what the stage will do: compute a gradient of the
longest sequence, sample a batch, score an answer, fuse a layer. We extrapolate what each further
block adds to the whole model. An estimate takes seconds, and reflects the real device, dtype,
architecture and gradient checkpointing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import get_total_parameters

from ..config import Config
from ..data.encoding import EncodedAnswer
from ..files.errors import UserError
from ..model import device, fusing
from ..model.adapters import adapter_bytes
from ..model.gradient_checkpointing import gradient_checkpointing
from ..model.sampling import EVALUATED_AT_ONCE
from ..model.saving import dtype_name
from .log_probs import find_head
from .scorer import Scorer

# Copies of the adapters at the peak of training: parameters, AdamW's two moments, and two gradients
# (the sum so far and the chosen side's). The rejected side's gradient is counted in the work.
TRAINED_COPIES = 5
# Copies while a training run answers questions: parameters and AdamW's two moments.
HELD_COPIES = 3

# At most this many blocks of a kind are run. The more there are, the less a chance overlap at one
# peak counts.
MEASURED = 5


@dataclass(frozen=True)
class Need:
    """Peak bytes of one activity of a stage, in each of its processes on a machine.

    `what` names the activity, `remedy` says what to change when it does not fit.
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
    """The need that decides a stage's peak memory."""
    return max(needs, key=lambda need: need.total)


def require(needs: List[Need], model: str) -> Need:
    """The largest need. Raises UserError when the device offers less than that."""
    need, offered = largest(needs), device.available()
    if need.total > offered:
        one_process = "start the runner with --launch none, " if need.processes > 1 else ""
        raise UserError(
            f"{model}: needs {need}, but this machine offers {offered / 1e9:.2f} GB; {one_process}"
            f"{need.remedy}, or set model to a smaller or a quantised one"
        )
    return need


def training(model: nn.Module, longest: EncodedAnswer, processes: int = 1) -> Need:
    """The need of one update with the longest sequence; the model carries adapters.

    Call it inside `models.gradient_checkpointing`, as training runs.
    """
    adapters, scorer = adapter_bytes(model), Scorer(model, check=False)
    model.train()
    return Need(
        f"an update with sequences of {len(longest.ids)} tokens",
        "lower data.max_length, set train.grad_checkpoint: true",
        nbytes(model.parameters()) - adapters,
        TRAINED_COPIES * adapters,
        _work(model, lambda: scorer.log_prob_and_gradient(longest), _lowest_adapted(model)),
        processes,
    )


def sampling(
    model: nn.Module, batch: int, prompt: int, answer: int, key: str, processes: int = 1
) -> Need:
    """The need of sampling `batch` answers at once, of up to `answer` tokens, to prompts of up to
    `prompt` tokens. `key` is the config key that lowers the batch. If the model carries adapters,
    their optimizer state counts too.
    """
    find_head(model)  # report a model that cannot be trained before it fails below
    model.eval()
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

    with short_of_memory():
        reading, writing = _work(model, read_prompts), _work(model, write_answers)
    return Need(
        f"sampling {batch} answers at once",
        f"lower {key}",
        nbytes(model.parameters()) - adapters,
        HELD_COPIES * adapters,
        max(reading, writing + sum(growth[kind] for kind in kinds)),
        processes,
    )


@contextmanager
def short_of_memory() -> Iterator[None]:
    """Within, MLX waits for memory as it does at its limit.

    Where there is room, MLX allocates for work that it has only queued, and how far it gets ahead
    depends on the device. Reading a batch of prompts then takes far more than it needs.
    """
    limit = mx.set_memory_limit(1)
    try:
        yield
    finally:
        mx.set_memory_limit(limit)


def scoring(model: nn.Module, longest: EncodedAnswer) -> Need:
    """The need of scoring the longest sequence."""
    adapters, scorer = adapter_bytes(model), Scorer(model, check=False)
    return Need(
        f"scoring answers of {len(longest.ids)} tokens",
        "lower data.max_length",
        nbytes(model.parameters()) - adapters,
        adapters,
        _work(model, lambda: scorer.log_prob(longest), _lowest_adapted(model)),
    )


@dataclass(frozen=True)
class Lengths:
    """The most that a stage works with: questions to answer, tokens of a prompt, tokens of a
    sampled answer, and the longest prompt with its answer.
    """

    questions: int
    prompt: int
    answer: int
    longest: EncodedAnswer

    @property
    def scored(self) -> EncodedAnswer:
        """The longest sequence to score. Sampled answers are scored too."""
        return max(
            self.longest,
            EncodedAnswer((0,) * (self.prompt + self.answer), self.prompt),
            key=lambda sequence: len(sequence.ids),
        )


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
    return [
        update,
        sampling(model, batch, lengths.prompt, lengths.answer, key, processes),
        replace(scoring(model, lengths.scored), processes=processes),
    ]


def stage_11(model: nn.Module, config: Config, longest: EncodedAnswer) -> list[Need]:
    """Fusing a model that carries adapters, and comparing both by scoring in float32."""
    adapters = adapter_bytes(model)
    dtype = fusing.target_dtype(model, config.fuse.dtype)
    before = nbytes(model.parameters()) - adapters
    after = get_total_parameters(model) * dtype.size
    weights = max(before, after)
    quantized = after * (config.fuse.quantize or 0) // (8 * dtype.size)
    smaller = "set fuse.dtype: null, or " if dtype == mx.float32 and config.fuse.dtype else ""
    remedy = f"{smaller}use the adapters as they are (--adapter-path)"
    with fusing.activations_in_float32(model):
        comparing = scoring(model, longest)
        embedding = nbytes(model.model.embed_tokens.parameters())  # beside the model's own
    # Scoring has loaded the largest layer, so its own weights do not count as work here.
    layer = _peak(lambda: fusing.fuse_largest_layer(model, dtype))
    return [
        Need(f"fusing into {dtype_name(dtype)}", remedy, weights + quantized, adapters, layer),
        replace(comparing, remedy=remedy, weights=weights, work=comparing.work + embedding),
    ]


def stage_12(
    model: nn.Module, config: Config, lengths: Lengths, other_weights: int = 0
) -> list[Need]:
    """Answering the held-out questions, and scoring pairs and answers.

    The base and the fused model take turns in memory: `other_weights` is the other one's bytes.
    """
    batch = min(config.generation.batch_size, config.smoke.questions, lengths.questions)
    key = "generation.batch_size"
    needs = [
        sampling(model, batch, lengths.prompt, lengths.answer, key),
        scoring(model, lengths.scored),
    ]
    return [replace(need, weights=max(need.weights, other_weights)) for need in needs]


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
    """Bytes by which each cache will grow until it holds `length` tokens."""
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


def _work(model: nn.Module, run: Callable[[], Any], first: int = 0) -> int:
    """Peak bytes of `run` on the whole model, beside its weights.

    Runs it on the blocks from `first` on, at least one of each kind, and counts each further block
    like the measured ones of its kind.
    """
    kinds = _kinds(model.layers[first:] + model.layers[:first])
    spans = {kind: _span(kinds, kinds.index(kind)) for kind in set(kinds)}
    peaks = {
        count: _peak_of(model, first, count, run) for count in sorted(set().union(*spans.values()))
    }
    step = {
        kind: (peaks[end] - peaks[start]) // (end - start) if start < end else peaks[end]
        for kind, (start, end) in spans.items()
    }
    most = max(peaks)
    return peaks[most] + sum(step[kind] for kind in kinds[most:])


def _lowest_adapted(model: nn.Module) -> int:
    """The lowest block that holds adapters; 0 when none does. A gradient needs such a block, and
    costs nothing in the blocks below it.
    """
    return next((i for i, layer in enumerate(model.layers) if adapter_bytes(layer)), 0)


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


def _peak_of(model: nn.Module, first: int, count: int, run: Callable[[], Any]) -> int:
    """Peak bytes of `run` on `count` blocks: those from `first` on, then those before it, all in
    the model's order.
    """
    layers = model.model.layers
    after = layers[first : first + count]
    model.model.layers = layers[: count - len(after)] + after
    try:
        mx.eval(model.parameters())  # load these weights now, so that they do not count as work
        return _peak(run)
    finally:
        model.model.layers = layers


def _peak(run: Callable[[], Any]) -> int:
    """Peak bytes of `run` beyond what is in memory already; `models.load` has left no garbage that
    could be freed meanwhile.
    """
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - before


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree of parameters, loaded or not."""
    return sum(array.nbytes for array in dict(tree_flatten(tree)).values())
