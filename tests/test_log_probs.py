"""The blockwise head against plain log_softmax in float64, and the models whose head it knows."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from dpo_mlx.files.errors import UserError
from dpo_mlx.scoring import log_probs
from dpo_mlx.scoring.log_probs import (
    Head,
    check_head,
    differentiable_divergences,
    differentiable_log_probs,
    find_head,
    token_log_probs,
)
from dpo_mlx.scoring.scorer import Scorer
from mlx.utils import tree_map
from mlx_lm.models import cohere, gemma2, granite, minicpm

WIDTH, VOCABULARY, POSITIONS = 64, 50, 6


def layer_of(kind):
    """A head of random weights, large enough that probabilities are far from uniform."""
    mx.random.seed(3)
    layer: Any
    if kind.endswith("embedding"):
        layer = nn.Embedding(VOCABULARY, WIDTH)
    else:
        layer = nn.Linear(WIDTH, VOCABULARY, bias="bias" in kind)
        if "bias" in kind:
            layer.bias = mx.random.normal((VOCABULARY,))
    layer.weight = 0.4 * mx.random.normal((VOCABULARY, WIDTH))
    bits = next((int(b) for b in "48" if b in kind), None)
    return layer if bits is None else layer.to_quantized(group_size=32, bits=bits)


KINDS = [
    "embedding",
    "linear",
    "linear with bias",
    "4-bit embedding",
    "8-bit embedding",
    "4-bit linear",
    "8-bit linear",
    "8-bit linear with bias",
]


def hidden_and_targets(scale=1.0):
    rng = np.random.default_rng(5)
    hidden = (scale * rng.normal(size=(POSITIONS, WIDTH))).astype(np.float32)
    return hidden, rng.integers(VOCABULARY, size=POSITIONS)


def in_float64(head, hidden, targets):
    """log p(target), in numpy float64."""
    return log_softmax_in_float64(head, hidden)[np.arange(len(targets)), targets]


def divergences_in_float64(head, hidden, base):
    """KL(base || policy) at each position, [T], in numpy float64."""
    policy, reference = (log_softmax_in_float64(head, x) for x in (hidden, base))
    return (np.exp(reference) * (reference - policy)).sum(axis=-1)


def log_softmax_in_float64(head, hidden):
    """log_softmax of all logits at once, [T, V], in numpy float64."""
    layer = head.layer
    weight = layer.weight
    if "scales" in layer:
        weight = mx.dequantize(weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    logits = hidden.astype(np.float64) @ np.array(weight, np.float64).T
    if "bias" in layer:
        logits = logits + np.array(layer.bias, np.float64)
    logits = head.scale * logits
    if head.softcap is not None:
        logits = head.softcap * np.tanh(logits / head.softcap)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def slopes_in_float64(values_of, hidden, weights, step=1e-5):
    """Central differences of sum(weights x values_of(hidden)), [T, D]: no formula shared with the
    library.

    A position's value knows only its own hidden state, so one difference moves a whole column.
    """
    slopes = np.empty(hidden.shape)
    for d in range(hidden.shape[1]):
        move = np.zeros(hidden.shape[1])
        move[d] = step
        up, down = (values_of(hidden + sign * move) for sign in (1, -1))
        slopes[:, d] = weights * (up - down) / (2 * step)
    return slopes


def values_and_slopes(head, hidden, targets, weights=None):
    """The library's log-probs, and the slopes of their sum weighted by `weights`."""
    x, ids = mx.array(hidden), mx.array(targets)
    cotangents = mx.ones(len(targets)) if weights is None else mx.array(weights)
    outputs, slopes = mx.vjp(lambda h: differentiable_log_probs(h, ids, head), [x], [cotangents])
    assert mx.array_equal(outputs[0], token_log_probs(x, ids, head))
    return np.array(outputs[0]), np.array(slopes[0].astype(mx.float32))


def divergences_and_slopes(head, hidden, base, weights=None):
    """The library's divergences, and the slopes of their sum weighted by `weights`."""
    cotangents = mx.ones(len(hidden)) if weights is None else mx.array(weights)
    outputs, slopes = mx.vjp(
        lambda h: differentiable_divergences(h, mx.array(base), head),
        [mx.array(hidden)],
        [cotangents],
    )
    return np.array(outputs[0]), np.array(slopes[0])


def assert_close(found, expected, tolerance):
    """Differences are small beside the largest entry."""
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_slopes_are_log_softmax_s(kind, scale, softcap, monkeypatch):
    """Every kind of head, scaled and capped or not: plain float64 numbers to 1e-5."""
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", 16)
    head = Head(layer_of(kind), scale, softcap)
    hidden, targets = hidden_and_targets(scale=1 / scale)
    weights = np.linspace(-1.5, 2.0, POSITIONS).astype(np.float32)
    values, slopes = values_and_slopes(head, hidden, targets, weights)
    assert_close(values, in_float64(head, hidden, targets), 1e-5)
    expected = slopes_in_float64(lambda x: in_float64(head, x, targets), hidden, weights)
    assert_close(slopes, expected, 1e-5)


@pytest.mark.parametrize("block", [16, 25, 49, 64])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_and_slopes_are_those_of_the_whole_softmax(kind, softcap, block, monkeypatch):
    """KL(base || policy) at each position and its slopes, against plain float64 numbers."""
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", block)
    head = Head(layer_of(kind), 0.5, softcap)
    hidden, _ = hidden_and_targets()
    base = hidden + 0.3 * np.random.default_rng(6).normal(size=hidden.shape).astype(np.float32)
    weights = np.linspace(-1.5, 2.0, POSITIONS).astype(np.float32)
    values, slopes = divergences_and_slopes(head, hidden, base, weights)
    assert_close(values, divergences_in_float64(head, hidden, base), 1e-5)
    expected = slopes_in_float64(lambda x: divergences_in_float64(head, x, base), hidden, weights)
    assert_close(slopes, expected, 1e-5)


def test_a_model_does_not_diverge_from_itself():
    """The divergence and its slope are 0 at the base model, where training starts."""
    hidden, _ = hidden_and_targets(scale=30)  # probabilities near 0 and 1
    values, slopes = divergences_and_slopes(Head(layer_of("linear")), hidden, hidden)
    assert np.abs(values).max() < 1e-5 and np.abs(slopes).max() < 1e-5


@pytest.mark.parametrize("block", [1, 7, 25, 49, 50, 64])
@pytest.mark.parametrize("kind", ["embedding", "4-bit embedding", "linear with bias"])
def test_blocks_do_not_change_the_result(kind, block, monkeypatch):
    """A vocabulary that no block divides, or smaller than a block, gives the sums of one block."""
    head = Head(layer_of(kind), 0.5, 9.0)
    hidden, targets = hidden_and_targets()
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", VOCABULARY)
    whole = values_and_slopes(head, hidden, targets)
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", block)
    for found, expected in zip(values_and_slopes(head, hidden, targets), whole, strict=True):
        assert_close(found, expected, 1e-6)


def test_first_and_last_rows_are_scored():
    """Targets at the edges of the vocabulary and of a block are in range of the gather."""
    head = Head(layer_of("linear with bias"))
    hidden, _ = hidden_and_targets()
    targets = np.array([0, VOCABULARY - 1, 6, 7, 13, 14])
    values, _ = values_and_slopes(head, hidden, targets)
    assert_close(values, in_float64(head, hidden, targets), 1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_hidden_states_are_scored_in_float32(dtype):
    """The rounding of bfloat16 stays in the hidden state: log-probs are float32-exact for it."""
    head = Head(layer_of("embedding"))
    hidden, targets = hidden_and_targets()
    rounded = mx.array(hidden).astype(dtype)
    as_float = np.array(rounded.astype(mx.float32))
    outputs, slopes = mx.vjp(
        lambda h: differentiable_log_probs(h, mx.array(targets), head),
        [rounded],
        [mx.ones(POSITIONS)],
    )
    assert outputs[0].dtype == mx.float32
    assert slopes[0].dtype == dtype
    assert_close(np.array(outputs[0]), in_float64(head, as_float, targets), 1e-5)
    expected = slopes_in_float64(
        lambda x: in_float64(head, x, targets), as_float, np.ones(POSITIONS)
    )
    assert_close(np.array(slopes[0].astype(mx.float32)), expected, 2**-8)


def test_a_bfloat16_head_is_read_in_float32():
    """bfloat16 weights are exact in float32, so nothing but their own rounding is lost."""
    layer = layer_of("embedding")
    layer.weight = layer.weight.astype(mx.bfloat16)
    head, (hidden, targets) = Head(layer), hidden_and_targets()
    exact = Head(nn.Embedding(VOCABULARY, WIDTH))
    exact.layer.weight = layer.weight.astype(mx.float32)
    values, _ = values_and_slopes(head, hidden, targets)
    assert_close(values, in_float64(exact, hidden, targets), 1e-5)


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_large_logits_stay_finite(magnitude, monkeypatch):
    """Logits of +-10,000 neither overflow nor turn to NaN, whichever block holds the largest."""
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", 7)
    layer = nn.Embedding(VOCABULARY, WIDTH)
    layer.weight = mx.linspace(0.5, 1.0, VOCABULARY)[:, None] * mx.ones((VOCABULARY, WIDTH)) / WIDTH
    head = Head(layer)
    hidden = np.full((POSITIONS, WIDTH), magnitude, np.float32)
    targets = np.array([0, 1, 6, 7, 48, 49])
    values, slopes = values_and_slopes(head, hidden, targets)
    assert np.isfinite(values).all() and np.isfinite(slopes).all()
    assert_close(values, in_float64(head, hidden, targets), 1e-5)
    # The likeliest token's log-prob is exactly 0, where e^-100 is lost beside 1.
    assert values[-1 if magnitude > 0 else 0] == 0


def test_cotangents_scale_the_slopes():
    """The backward pass is linear in what comes from above, position by position."""
    head, (hidden, targets) = Head(layer_of("linear"), 0.5, 8.0), hidden_and_targets()
    weights = np.array([0.0, 1.0, -2.0, 0.5, 1e-3, 1e3], np.float32)
    _, ones = values_and_slopes(head, hidden, targets)
    _, scaled = values_and_slopes(head, hidden, targets, weights)
    np.testing.assert_allclose(scaled, weights[:, None] * ones, rtol=1e-6)


def test_only_the_hidden_states_get_gradients():
    """The head is frozen: its weight and bias get zeros even when they are asked for."""
    layer, (hidden, targets) = layer_of("linear with bias"), hidden_and_targets()

    def loss(parameters, x):
        layer.update(parameters)
        return differentiable_log_probs(x, mx.array(targets), Head(layer)).sum()

    by_layer, by_hidden = mx.grad(loss, argnums=(0, 1))(layer.parameters(), mx.array(hidden))
    assert all(float(mx.abs(g).max()) == 0 for g in (by_layer["weight"], by_layer["bias"]))
    assert float(mx.abs(by_hidden).max()) > 0


# Models -----------------------------------------------------------------------------------------


def randomised(model, seed=1):
    """The model with weights so large that its logits are far beyond a soft cap of a few units."""
    mx.random.seed(seed)
    model.update(tree_map(lambda w: 0.3 * mx.random.normal(w.shape), model.parameters()))
    return model


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}


def tiny_gemma2(cap):
    args = gemma2.ModelArgs(
        model_type="gemma2",
        head_dim=16,
        rms_norm_eps=1e-5,
        final_logit_softcapping=cap,
        **SHAPE,
    )
    return randomised(gemma2.Model(args))


def tiny_cohere():
    return randomised(cohere.Model(cohere.ModelArgs("cohere", **SHAPE, logit_scale=0.25)))


def tiny_granite():
    args = granite.ModelArgs(
        model_type="granite",
        rms_norm_eps=1e-5,
        logits_scaling=4.0,
        attention_multiplier=0.25,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        max_position_embeddings=64,
        attention_bias=False,
        mlp_bias=False,
        rope_theta=1e4,
        **SHAPE,
    )
    return randomised(granite.Model(args))


def tiny_minicpm():
    args = minicpm.ModelArgs(
        model_type="minicpm",
        dim_model_base=8,
        rms_norm_eps=1e-5,
        scale_depth=1.4,
        scale_emb=12.0,
        **SHAPE,
    )
    return randomised(minicpm.Model(args))


def checked(model):
    """Backbone and head, as the scorer takes them."""
    backbone, head = find_head(model)
    check_head(model, backbone, head)
    return backbone, head


def assert_head_is_the_models(model):
    backbone, head = checked(model)
    ids = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    targets = mx.arange(8)
    expected = nn.log_softmax(model(ids)[0].astype(mx.float32))[mx.arange(8), targets]
    found = differentiable_log_probs(backbone(ids)[0], targets, head)
    assert_close(np.array(found), np.array(expected), 1e-5)


@pytest.mark.parametrize("kind", ["granite", "llama"])
def test_find_head_knows_the_project_s_models(kind, request):
    """Granite's tied, scaled head and llama's untied one give the model's own log-probs."""
    model, *_ = mlx_lm.load(str(request.getfixturevalue(kind)))
    _, head = find_head(model)
    assert head.scale == (1 / 8 if kind == "granite" else 1)
    assert head.layer is (model.model.embed_tokens if kind == "granite" else model.lm_head)
    assert_head_is_the_models(model)


@pytest.mark.parametrize(
    "make", [lambda: tiny_gemma2(3.0), lambda: tiny_gemma2(30.0), tiny_cohere, tiny_granite]
)
def test_find_head_knows_other_final_scalings(make):
    """Soft-capping (gemma2), a multiplier (cohere) and a divisor (granite) are reproduced."""
    assert_head_is_the_models(make())


def test_find_head_knows_a_quantised_model(llama):
    """A 4-bit base model keeps its own logits."""
    model, *_ = mlx_lm.load(str(llama))
    nn.quantize(model, group_size=64, bits=4)
    assert_head_is_the_models(model)


def wrapper(model, logits):
    """A model like `model` whose output layer does something else."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.args, self.model_type = model.model, model.args, "odd"

        def __call__(self, ids):
            return logits(model(ids))

    return Wrapper()


@pytest.mark.parametrize(
    "logits",
    [
        lambda z: 2 * z,
        lambda z: z + mx.arange(z.shape[-1]),
        lambda z: 2 * mx.tanh(z / 2),
        lambda z: z[..., :-3],
    ],
    ids=["scaled", "shifted", "capped", "narrower"],
)
def test_check_head_refuses_an_unknown_final_step(logits, granite):
    """A model whose logits the head does not reproduce is refused by its architecture's name."""
    model, *_ = mlx_lm.load(str(granite))
    with pytest.raises(UserError, match="architecture odd"):
        checked(wrapper(model, logits))


def test_logits_that_are_not_finite_do_not_blame_the_architecture(granite):
    """The weights were checked when they were loaded, so the settings are at fault."""
    model, *_ = mlx_lm.load(str(granite))
    with pytest.raises(UserError, match="logits are NaN or infinite.*config.json.*lora.scale"):
        checked(wrapper(model, lambda z: z * mx.nan))


def test_check_head_refuses_a_real_model_it_does_not_know():
    """MiniCPM divides its hidden states before the head, which the config does not tell us."""
    with pytest.raises(UserError, match="architecture minicpm"):
        checked(tiny_minicpm())


def test_the_engine_refuses_before_any_work():
    """An scorer is not made over a head that is not the model's, unless told not to look."""
    with pytest.raises(UserError, match="architecture minicpm"):
        Scorer(tiny_minicpm())
    Scorer(tiny_minicpm(), check=False)


@pytest.mark.parametrize("missing", ["model", "args", "head"])
def test_find_head_refuses_what_it_cannot_take_apart(missing):
    """No backbone, no arguments or no output layer: refused, never an AttributeError."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            if missing != "model":
                self.model = nn.Identity()
            if missing != "args":
                self.args = SimpleNamespace()

    with pytest.raises(UserError, match="architecture Odd"):
        find_head(Odd())
