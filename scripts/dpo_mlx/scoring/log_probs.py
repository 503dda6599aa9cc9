"""Log-probs of an answer's tokens, and divergences of two models there, computed without all logits
in memory at once.

The head is frozen, so training needs only a value and its slope in the hidden state at each answer
position. One pass over blocks of the vocabulary gives both. It runs in float32 for every dtype of
the model: a bfloat16 logit of 20 is off by up to 0.06, and a log-prob sums hundreds of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..files.errors import UserError

# Rows of the head in float32 at once: 8192 x 2048 x 4 bytes = 64 MiB for Granite.
VOCABULARY_BLOCK = 8192

# How far the head's logits may be from the model's, as a share of the largest logit.
HEAD_TOLERANCE = 0.1


@dataclass(frozen=True)
class Head:
    """Maps hidden states to logits: softcap(scale * (hidden @ weight.T + bias)).

    `layer` is the linear layer, or the embedding that it is tied to. Either may be quantised.
    """

    layer: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return self.layer.weight.shape[0]

    def weight(self, rows: slice | mx.array, after: list[mx.array] | None = None) -> mx.array:
        """Rows of the weight, [rows, D] float32. MLX computes them after `after`."""
        weight = self.layer.weight[rows]
        if after is not None:
            weight = mx.depends(weight, after)
        if "scales" in self.layer:
            biases = self.layer.get("biases")
            weight = mx.dequantize(
                weight,
                self.layer.scales[rows],
                None if biases is None else biases[rows],
                group_size=self.layer.group_size,
                bits=self.layer.bits,
                mode=self.layer.mode,
            )
        return weight.astype(mx.float32)

    def logits(self, raw: mx.array, rows: slice | mx.array) -> mx.array:
        """The logits of `raw` = hidden @ weight.T, for these rows of the weight (last axis)."""
        if "bias" in self.layer:
            raw = raw + self.layer.bias[rows]
        logits = self.scale * raw
        return logits if self.softcap is None else self.softcap * mx.tanh(logits / self.softcap)

    def slope(self, logits: mx.array) -> mx.array | float:
        """d(logits)/d(raw), in the shape of `logits` or as one number."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - mx.square(logits / self.softcap))


def find_head(model: nn.Module) -> tuple[nn.Module, Head]:
    """(backbone, head) of an mlx-lm model. The backbone maps ids [B, L] to hidden states [B, L, D].

    Raises UserError for a model without these two parts.
    """
    backbone = getattr(model, "model", None)
    args: Any = getattr(model, "args", None)
    if backbone is None or args is None:
        raise _unknown_head(model)
    layer = model["lm_head"] if "lm_head" in model else getattr(backbone, "embed_tokens", None)
    if layer is None or not hasattr(layer, "weight"):
        raise _unknown_head(model)
    scale = getattr(args, "logit_scale", None) or 1 / getattr(args, "logits_scaling", 1.0)
    return backbone, Head(layer, scale, getattr(args, "final_logit_softcapping", None))


def check_head(model: nn.Module, backbone: nn.Module, head: Head) -> None:
    """Raises UserError when the head does not reproduce the model's logits, or they are not finite.

    The head differs if the model scales its logits in a way that `find_head` does not know.
    """
    ids = mx.arange(1, 9)[None] % head.vocabulary
    expected = model(ids)[0].astype(mx.float32)
    if not mx.isfinite(expected).all():
        raise UserError(
            "model: its weights are finite, but its logits are NaN or infinite; correct the "
            "numbers in the model's config.json (multipliers, epsilons), lower lora.scale, or use "
            "another model"
        )
    hidden = backbone(ids)[0].astype(mx.float32)
    blocks: list[mx.array] = []
    for rows in _blocks(head.vocabulary):
        blocks.append(head.logits(hidden @ head.weight(rows).T, rows))
        mx.eval(blocks)  # otherwise the whole head would be in memory in float32
    logits = mx.concatenate(blocks, axis=-1)
    # On a CPU, MLX sums the products of a quantised bfloat16 head in bfloat16. That is off by 3%.
    # An unknown scaling is off by far more.
    if logits.shape != expected.shape or not (
        mx.abs(logits - expected).max() <= HEAD_TOLERANCE * mx.abs(expected).max()
    ):
        raise _unknown_head(model)


def _blocks(vocabulary: int) -> Iterator[slice]:
    """Slices of the head's rows, VOCABULARY_BLOCK rows each."""
    for start in range(0, vocabulary, VOCABULARY_BLOCK):
        yield slice(start, min(start + VOCABULARY_BLOCK, vocabulary))


def _unknown_head(model: nn.Module) -> UserError:
    kind = getattr(model, "model_type", type(model).__name__)
    return UserError(
        f"model: this pipeline cannot train architecture {kind}, because it does not know its "
        "output layer; use a granitemoehybrid, granite, llama, qwen or mistral model"
    )


def token_log_probs(hidden: mx.array, targets: mx.array, head: Head) -> mx.array:
    """log p(target) at each position, [T] float32, from hidden [T, D] and targets [T]."""
    return _scores_and_slopes(hidden, targets, head, slopes=False)[0]


def differentiable_log_probs(hidden: mx.array, targets: mx.array, head: Head) -> mx.array:
    """Like `token_log_probs`, but with a gradient in `hidden` (the head is frozen).

    The forward pass computes d(log p)/d(hidden) [T, D], and the backward pass only scales it.
    """
    return _differentiable(lambda x: _scores_and_slopes(x, targets, head, slopes=True), hidden)


def differentiable_divergences(hidden: mx.array, base: mx.array, head: Head) -> mx.array:
    """KL(base || policy) of the next token at each position, in nats, [T] float32, with a gradient
    in `hidden`.

    `hidden` [T, D] is the policy's and `base` [T, D] the base model's, of the same tokens.
    """
    return _differentiable(lambda x: _divergences_and_slopes(x, base, head), hidden)


def _differentiable(
    compute: Callable[[mx.array], tuple[mx.array, mx.array | None]], hidden: mx.array
) -> mx.array:
    """The first result of `compute(hidden)`, [T]; its second is that one's slope in `hidden`."""

    @mx.custom_function
    def values(hidden: mx.array) -> tuple[mx.array, mx.array | None]:
        return compute(hidden)

    @values.vjp
    def values_vjp(hidden: Any, cotangents: Any, outputs: Any) -> mx.array:
        return (cotangents[0][:, None] * outputs[1]).astype(hidden.dtype)

    outputs: Any = values(hidden)
    return outputs[0]


def _scores_and_slopes(
    hidden: mx.array, targets: mx.array, head: Head, slopes: bool
) -> tuple[mx.array, mx.array | None]:
    """(log p(target) [T], d(log p)/d(hidden) [T, D]), float32, in blocks of the vocabulary. Without
    `slopes` the second value is None.

    With raw products z and logits l(z), log p = l_target - log sum exp l, and
    d(log p)/d(hidden) = W^T (l'(z) (onehot - softmax(l))). The sums over the softmax run block by
    block, relative to the largest logit so far. They are rescaled when a larger logit comes up.
    """
    x = hidden.astype(mx.float32)
    softmax = _Softmax.empty(x)
    for rows in _blocks(head.vocabulary):
        # `after` orders the blocks. Otherwise all of them could be in memory at once.
        weight = head.weight(rows, after=[softmax.pull if slopes else softmax.total])
        logits = head.logits(x @ weight.T, rows)
        softmax, _, _ = softmax.add(logits, head.slope(logits), weight)
    weight = head.weight(targets)
    logits = head.logits((x * weight).sum(axis=-1), targets)[:, None]
    log_probs = (logits - softmax.log_total)[:, 0]
    return log_probs, head.slope(logits) * weight - softmax.mean_pull if slopes else None


def _divergences_and_slopes(
    hidden: mx.array, base: mx.array, head: Head
) -> tuple[mx.array, mx.array]:
    """(KL(base || policy) [T], its slope in `hidden` [T, D]), float32, in blocks of the vocabulary.

    With logits l of the policy and b of the base model, and their softmaxes p and q,
    KL = sum q (b - l) - log sum exp b + log sum exp l, and d(KL)/d(hidden) = W^T (l'(z) (p - q)).
    """
    x, y = hidden.astype(mx.float32), base.astype(mx.float32)
    policy, reference = _Softmax.empty(x), _Softmax.empty(x)
    gap = mx.zeros((x.shape[0], 1))  # sum of exp(b - top of b) (b - l)
    for rows in _blocks(head.vocabulary):
        weight = head.weight(rows, after=[policy.pull, reference.pull])
        logits, base_logits = head.logits(x @ weight.T, rows), head.logits(y @ weight.T, rows)
        slope = head.slope(logits)
        policy, _, _ = policy.add(logits, slope, weight)
        reference, shrink, share = reference.add(base_logits, slope, weight)
        gap = gap * shrink + (share * (base_logits - logits)).sum(axis=-1, keepdims=True)
    divergences = gap / reference.total - reference.log_total + policy.log_total
    return divergences[:, 0], policy.mean_pull - reference.mean_pull


@dataclass(frozen=True)
class _Softmax:
    """Sums over the softmax of logits l, of the blocks of the vocabulary so far.

    They are relative to the largest logit so far, `top` [T, 1]: `total` [T, 1] is the sum of
    exp(l - top), `pull` [T, D] that of exp(l - top) times the slope of a row's logit.
    """

    top: mx.array
    total: mx.array
    pull: mx.array

    @classmethod
    def empty(cls, hidden: mx.array) -> _Softmax:
        column = mx.zeros((hidden.shape[0], 1))
        return cls(column - mx.inf, column, mx.zeros_like(hidden))

    def add(
        self, logits: mx.array, slope: mx.array | float, weight: mx.array
    ) -> tuple[_Softmax, mx.array, mx.array]:
        """(the sums with a block's logits, the factor on the earlier sums, the block's
        exp(l - top)).
        """
        top = mx.maximum(self.top, logits.max(axis=-1, keepdims=True))
        shrink, share = mx.exp(self.top - top), mx.exp(logits - top)
        total = self.total * shrink + share.sum(axis=-1, keepdims=True)
        return _Softmax(top, total, self.pull * shrink + (share * slope) @ weight), shrink, share

    @property
    def log_total(self) -> mx.array:
        """log sum exp l, [T, 1]."""
        return self.top + mx.log(self.total)

    @property
    def mean_pull(self) -> mx.array:
        """The softmax's mean of the slopes of the logits in the hidden state, [T, D]."""
        return self.pull / self.total
