"""Estimates a stage's peak memory by running a few blocks of its model.

A few blocks of a lazily loaded model do the stage's work: compute a gradient of the longest
sequence, sample a batch, score an answer, fuse a layer. We measure what each further block adds
and extrapolate to the whole model. An estimate takes seconds. It reflects the real device, dtype,
architecture and gradient checkpointing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
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
from ..model.adapters import adapter_bytes, chat_command
from ..model.gradient_checkpointing import gradient_checkpointing
from ..model.sampling import EVALUATED_AT_ONCE
from ..model.saving import dtype_name
from .log_probs import find_head
from .scorer import Scorer

# Copies of the adapters at the peak of training: parameters, AdamW's two moments, and two gradients
# (the sum so far and the chosen side's, or the pairs' and the replay's). The rejected side's
# gradient is counted in the work.
TRAINED_COPIES = 5
# Copies while a training run answers questions: parameters and AdamW's two moments.
HELD_COPIES = 3

# Run at most this many blocks of a kind. With more blocks, a chance overlap of buffers at one peak
# matters less.
MAX_BLOCKS = 5


@dataclass(frozen=True)
class Need:
    """Peak bytes of one activity of a stage, in each of its processes on a machine.

    `what` names the activity. `remedy` says what to change when it does not fit.
    """

    what: str
    remedy: str
    weights: int
    adapters: int
    work: int
    processes: int = 1

    @property
    def total(self) -> int:
        """Bytes of all processes together."""
        return self.processes * (self.weights + self.adapters + self.work)

    def __str__(self) -> str:
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        adapters = f"adapters {self.adapters / 1e9:.2f}, " if self.adapters else ""
        return (
            f"{self.total / 1e9:.2f} GB for {self.what} (weights {self.weights / 1e9:.2f}, "
            f"{adapters}work {self.work / 1e9:.2f}{each})"
        )


def largest(needs: Sequence[Need]) -> Need:
    """The need that decides a stage's peak memory."""
    return max(needs, key=lambda need: need.total)


def require(needs: Sequence[Need], model: str) -> Need:
    """The largest need. Raises UserError when it exceeds the device's memory."""
    need, available = largest(needs), device.available()
    if need.total > available:
        one_process = "start the runner with --launch none, " if need.processes > 1 else ""
        raise UserError(
            f"{model}: needs {need}, but this machine has {available / 1e9:.2f} GB available; "
            f"{one_process}{need.remedy}, or set model to a smaller or quantised model"
        )
    return need


def describe(need: Need) -> str:
    """The need beside what this machine has, for a stage to print."""
    return f"peak memory {need}; {device.available() / 1e9:.2f} GB available"


def training(model: nn.Module, longest: EncodedAnswer, processes: int = 1) -> Need:
    """The need of one update with the longest sequence. The model must have adapters.

    Call it inside `gradient_checkpointing`, as training does.
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
    """The need of sampling `batch` answers at once.

    Prompts have up to `prompt` tokens, answers up to `answer` tokens. `key` is the config key that
    sets the batch. If the model has adapters, their optimizer state counts too.
    """
    find_head(model)  # raises UserError for a model that would fail below
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

    with lowest_memory_limit():
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
def lowest_memory_limit() -> Iterator[None]:
    """Inside the context, MLX waits for running work before it allocates, as at its memory limit.

    With memory to spare, MLX also allocates for work that it has only queued. How much depends on
    the device, and reading a batch of prompts then takes far more memory than it needs.
    """
    limit = mx.set_memory_limit(1)
    try:
        yield
    finally:
        mx.set_memory_limit(limit)


def scoring(model: nn.Module, longest: EncodedAnswer) -> Need:
    """The need of scoring the longest sequence, without a gradient."""
    adapters, scorer = adapter_bytes(model), Scorer(model, check=False)
    return Need(
        f"scoring answers of {len(longest.ids)} tokens",
        "lower data.max_length",
        nbytes(model.parameters()) - adapters,
        adapters,
        _work(model, lambda: scorer.log_prob(longest), _lowest_adapted(model)),
    )


@dataclass(frozen=True)
class LargestSizes:
    """The largest sizes in a stage.

    `questions` to answer, tokens of a `prompt`, tokens of a sampled `answer`, and the `longest`
    prompt with its answer.
    """

    questions: int
    prompt: int
    answer: int
    longest: EncodedAnswer

    @property
    def scored(self) -> EncodedAnswer:
        """The longest sequence to score, which may be a sampled answer."""
        return max(
            self.longest,
            EncodedAnswer((0,) * (self.prompt + self.answer), self.prompt),
            key=lambda sequence: len(sequence.ids),
        )


def stage_06(
    model: nn.Module, config: Config, lengths: LargestSizes, processes: int = 1
) -> list[Need]:
    """The need of stage 06: sampling the rejected answers."""
    batch = min(config.generation.batch_size, lengths.questions)
    key = "generation.batch_size"
    return [sampling(model, batch, lengths.prompt, lengths.answer, key, processes)]


def stage_10(
    model: nn.Module,
    config: Config,
    lengths: LargestSizes,
    replayed: EncodedAnswer,
    processes: int = 1,
) -> list[Need]:
    """The needs of stage 10: updates, evaluations, and the replay, whose longest sequence is
    `replayed`. The model must have adapters.
    """
    batch = min(EVALUATED_AT_ONCE, config.train.eval_questions, lengths.questions)
    key = "train.eval_questions"
    trained, needs = lengths.longest, []
    if config.train.replay:
        prompt, answer = replayed.prompt_length, replayed.answer_length
        trained = max(trained, replayed, key=lambda sequence: len(sequence.ids))
        needs.append(sampling(model, EVALUATED_AT_ONCE, prompt, answer, "train.replay to 0"))
    with gradient_checkpointing(model, config.train.grad_checkpoint):
        needs.append(training(model, trained, processes))
    return [
        *needs,
        sampling(model, batch, lengths.prompt, lengths.answer, key, processes),
        replace(scoring(model, lengths.scored), processes=processes),
    ]


def stage_11(model: nn.Module, config: Config, longest: EncodedAnswer) -> list[Need]:
    """The needs of stage 11: fusing, and scoring in float32. The model must have adapters."""
    adapters = adapter_bytes(model)
    dtype = fusing.target_dtype(model, config.fuse.dtype)
    before = nbytes(model.parameters()) - adapters
    after = get_total_parameters(model) * dtype.size
    weights = max(before, after)
    quantized = after * (config.fuse.quantize or 0) // (8 * dtype.size)
    smaller = "set fuse.dtype: null, or " if dtype == mx.float32 and config.fuse.dtype else ""
    chat = chat_command(config.model, config.run.adapters)
    remedy = f"{smaller}use the adapters without fusing ({chat})"
    with fusing.activations_in_float32(model):
        comparing = scoring(model, longest)
        # This float32 copy is in memory beside the model's own embedding.
        embedding = nbytes(model.model.embed_tokens.parameters())
    # Scoring has loaded the largest layer, so its own weights do not count as work here.
    layer = _peak(lambda: fusing.fuse_largest_layer(model, dtype))
    return [
        Need(f"fusing into {dtype_name(dtype)}", remedy, weights + quantized, adapters, layer),
        replace(comparing, remedy=remedy, weights=weights, work=comparing.work + embedding),
    ]


# A question of general knowledge has one cache, and each of its four options a copy.
CHOICE_CACHES = 5


def stage_12(
    model: nn.Module, config: Config, lengths: LargestSizes, other_weights: int = 0
) -> list[Need]:
    """The needs of stage 12: answering questions and unrelated prompts, and scoring answers.

    The base model and the fused model take turns in memory. `other_weights` is the size of the
    other model's weights in bytes.
    """
    batch = max(min(config.generation.batch_size, lengths.questions), CHOICE_CACHES)
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
    """Sample two tokens per answer, as mlx-lm's BatchGenerator does."""
    token = mx.zeros((batch, 1), dtype=mx.int32)
    for _ in range(2):
        log_probs = nn.log_softmax(model(token, cache=caches)[:, -1].astype(mx.float32), axis=-1)
        token = mx.random.categorical(log_probs)[:, None]
        mx.eval(token, mx.exp(log_probs))


def _growth(caches: list[Any], length: int) -> list[int]:
    """Bytes that each cache must still allocate to hold `length` tokens."""
    final = -(-length // KVCache.step) * KVCache.step  # tokens, a multiple of KVCache.step
    growth = []
    for cache in caches:
        more = 0
        if isinstance(cache, KVCache) and cache.keys is not None and cache.values is not None:
            allocated = cache.keys.shape[2]
            size = cache.keys.nbytes + cache.values.nbytes
            more = size * max(0, final - allocated) // allocated
        growth.append(more)
    return growth


def _work(model: nn.Module, run: Callable[[], Any], first: int = 0) -> int:
    """Estimate the peak bytes of `run` on the whole model, without its weights.

    Calls `run` on some blocks, from `first` on and at least one of each kind. Every other block
    counts like the measured blocks of its kind.
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
    """The index of the lowest block with adapters; 0 without adapters.

    A gradient needs a block with adapters, and takes no memory in the blocks below the lowest.
    """
    return next((i for i, layer in enumerate(model.layers) if adapter_bytes(layer)), 0)


def _span(kinds: list[str], first: int) -> tuple[int, int]:
    """(start, end) so that runs of `start` and of `end` blocks differ by blocks of one kind.

    The kind is that of the block `first`, and at most MAX_BLOCKS of it are run. `start` is 2 or
    more where possible, because only from the second block on do the blocks' buffers overlap.
    """
    end = first + 1
    while end < min(len(kinds), first + MAX_BLOCKS) and kinds[end] == kinds[first]:
        end += 1
    return max(1, first, min(2, end - 1)), end


def _kinds(layers: Sequence[nn.Module]) -> list[str]:
    """The kind of each block: the names and shapes of its parameters, as text."""
    return [
        str([(name, array.shape) for name, array in dict(tree_flatten(layer.parameters())).items()])
        for layer in layers
    ]


def _peak_of(model: nn.Module, first: int, count: int, run: Callable[[], Any]) -> int:
    """Peak bytes of `run` on `count` blocks, in the model's order.

    They are the blocks from `first` on. If those are too few, the lowest blocks come on top.
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
    """Peak bytes of `run`, beyond the bytes in memory before it.

    `load_model` leaves no garbage, so `run` cannot free memory from before.
    """
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - before


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree of parameters, even if not loaded yet."""
    return sum(array.nbytes for array in dict(tree_flatten(tree)).values())
