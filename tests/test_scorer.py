"""The scorer against the whole model's own logits, on tiny Granite and llama folders."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from dpo_mlx.config import NEAREST, DpoConfig, LoraConfig
from dpo_mlx.data.encoding import EncodedAnswer, Encoder
from dpo_mlx.data.pairs import Pair
from dpo_mlx.files import model_files
from dpo_mlx.files.errors import UserError
from dpo_mlx.model import fusing
from dpo_mlx.model.adapters import attach_lora, save_adapters
from dpo_mlx.model.gradient_checkpointing import gradient_checkpointing
from dpo_mlx.model.loading import load_model
from dpo_mlx.model.saving import save_model_folder
from dpo_mlx.scoring import scorer as scorer_module
from dpo_mlx.scoring.losses import LOSSES, Sides, objective, preference_loss
from dpo_mlx.scoring.scorer import PairScore, Scorer, summarise
from mlx.utils import tree_flatten, tree_map_with_path

KINDS = ["granite", "llama"]
PAIR = Pair("Why 7?", "**Seven.** So it is.", " 7\nand no more", line=1)
LORA = LoraConfig(rank=4)


def perturb(model, size=None, seed=11):
    """Adapters as after some training: B is not zero, log-probs are a few nats off the base's."""
    if size is None:
        size = 0.01 if model.model_type == "llama" else 0.1
    mx.random.seed(seed)

    def moved(path, value):
        return size * mx.random.normal(value.shape) if path.endswith("lora_b") else value

    model.update(tree_map_with_path(moved, model.trainable_parameters()))
    mx.eval(model.parameters())


class Setting:
    """A tiny model with perturbed adapters, a pair of it and the pair's true reference."""

    def __init__(self, folder, lora=LORA):
        self.folder = folder
        loaded = load_model(str(folder))
        self.model, self.encoder = loaded.model, Encoder(loaded.tokenizer)
        self.pair = self.encoder.pair(PAIR)
        base = Scorer(self.model)
        self.reference = Sides(base.log_prob(self.pair.chosen), base.log_prob(self.pair.rejected))
        mx.random.seed(0)
        attach_lora(self.model, lora)
        perturb(self.model)
        self.scorer = Scorer(self.model)

    def log_probs(self):
        return [self.scorer.log_prob(s) for s in (self.pair.chosen, self.pair.rejected)]


@pytest.fixture(scope="module", params=KINDS)
def setting(request):
    return Setting(request.getfixturevalue(request.param))


@pytest.fixture(params=KINDS)
def fresh(request):
    """A setting that the test may change."""
    return Setting(request.getfixturevalue(request.param))


def in_float64(model, sequence):
    """log p(answer | prompt) from the model's own logits of the whole sequence."""
    logits = np.array(model(mx.array(sequence.ids)[None])[0], np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    answer = range(sequence.prompt_length, len(sequence.ids))
    return sum(log_probs[t - 1, sequence.ids[t]] for t in answer)


def plain_log_prob(model, sequence):
    """The same, differentiable: log_softmax of all logits, masked by position."""
    ids = mx.array(sequence.ids)
    log_probs = nn.log_softmax(model(ids[None, :-1])[0], axis=-1)
    scored = mx.take_along_axis(log_probs, ids[1:, None], axis=-1)[:, 0]
    return mx.where(mx.arange(1, len(ids)) >= sequence.prompt_length, scored, 0).sum()


def joint_gradient(setting, settings):
    """The gradient of the pair's loss, both sides in one graph."""
    ref = Sides(mx.array(setting.reference.chosen), mx.array(setting.reference.rejected))
    length = Sides(*(mx.array(float(n)) for n in lengths(setting.pair)))

    def loss(model):
        pi = Sides(
            plain_log_prob(model, setting.pair.chosen), plain_log_prob(model, setting.pair.rejected)
        )
        return objective(pi, ref, length, settings)

    return nn.value_and_grad(setting.model, loss)(setting.model)


def lengths(pair):
    return pair.chosen.answer_length, pair.rejected.answer_length


def largest_difference(found, expected):
    """Over all tensors, beside the largest entry of all."""
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert found.keys() == expected.keys()
    top = max(float(mx.abs(g).max()) for g in expected.values())
    assert top > 0, "nothing to compare"
    return max(float(mx.abs(found[k] - expected[k]).max()) for k in expected) / top


# Log-probs --------------------------------------------------------------------------------------


def test_log_prob_is_the_models_own(setting):
    """The scorer's log-prob is log_softmax of the model's own logits over the answer, to 1e-5."""
    for sequence in (setting.pair.chosen, setting.pair.rejected):
        expected = in_float64(setting.model, sequence)
        assert setting.scorer.log_prob(sequence) == pytest.approx(expected, rel=1e-5)


def test_log_prob_of_a_quantised_model(llama):
    """A 4-bit base under adapters is scored as it answers."""
    model = load_model(str(llama)).model
    nn.quantize(model, group_size=64, bits=4)
    attach_lora(model, LORA)
    perturb(model)
    sequence = EncodedAnswer((5, 9, 20, 33, 8, 100), 3)
    assert Scorer(model).log_prob(sequence) == pytest.approx(in_float64(model, sequence), rel=1e-5)


@pytest.mark.parametrize(
    "sequence", [EncodedAnswer((7, 9), 1), EncodedAnswer((7, *range(20, 60)), 1)]
)
def test_shortest_prompt_and_answer(setting, sequence):
    """One prompt token is enough, and so is one answer token."""
    expected = in_float64(setting.model, sequence)
    assert setting.scorer.log_prob(sequence) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("answer", ["plain", " blank first", "\nnewline first", "7 is a digit"])
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_scored_ids_are_the_answer_s(setting, answer, finish, monkeypatch):
    """Exactly the answer's ids and its end of turn are scored, by the states just before them."""
    scored = []

    def record(hidden, targets, head):
        scored.append((hidden.shape[0], targets.tolist()))
        return mx.zeros(len(targets))

    monkeypatch.setattr(scorer_module, "token_log_probs", record)
    sequence = setting.encoder.encode("Why 7?", answer, finish)
    Scorer(setting.model).log_prob(sequence)
    tokenizer = setting.encoder.tokenizer
    expected = tokenizer.encode(answer, add_special_tokens=False)
    if finish == "stop":
        expected.append(tokenizer.eos_token_id)
    assert scored == [(len(expected), expected)]
    # Nothing comes after the end of turn, though the template writes a newline there.
    assert list(sequence.ids) == setting.encoder.prompt_ids("Why 7?") + expected


def test_prompt_tokens_are_read_but_not_scored(setting):
    """Moving the boundary by one adds exactly one token's log-prob."""
    ids, start = setting.pair.chosen.ids, setting.pair.chosen.prompt_length
    with_one_more = setting.scorer.log_prob(EncodedAnswer(ids, start - 1))
    gained = in_float64(setting.model, EncodedAnswer(ids[:start], start - 1))
    assert with_one_more - setting.scorer.log_prob(EncodedAnswer(ids, start)) == pytest.approx(
        gained, abs=1e-4
    )


# Gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_by_parts_is_that_of_the_joint_loss(setting, loss, checkpoint):
    """dL/dlc grad(lc) + dL/dlr grad(lr) is autodiff's gradient of the whole loss, to 1e-5."""
    settings = DpoConfig(loss=loss, beta=0.1, label_smoothing=0.1, nll_weight=0.0, dpop_lambda=5.0)
    with gradient_checkpointing(setting.model, checkpoint):
        score, gradient = setting.scorer.pair_gradient(setting.pair, setting.reference, settings)
    value, expected = joint_gradient(setting, settings)
    assert score.loss == pytest.approx(value.item(), rel=1e-5)
    assert largest_difference(gradient, expected) <= 1e-5


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_gradient_with_nll(setting, loss, checkpoint):
    """The added likelihood of the chosen answer is part of the gradient, and not of the loss."""
    settings = DpoConfig(loss=loss, beta=0.1, nll_weight=0.7)
    with gradient_checkpointing(setting.model, checkpoint):
        score, gradient = setting.scorer.pair_gradient(setting.pair, setting.reference, settings)
    value, expected = joint_gradient(setting, settings)
    nll = -score.pi.chosen.item() / lengths(setting.pair)[0]
    assert score.loss + 0.7 * nll == pytest.approx(value.item(), rel=1e-5)
    assert largest_difference(gradient, expected) <= 1e-5


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_gradient_of_the_likelihood_alone(setting, checkpoint):
    """SFT's value is the mean of minus log p over the answer's tokens, its gradient autodiff's."""
    sequence = setting.pair.chosen

    def nll(model):
        return -plain_log_prob(model, sequence) / sequence.answer_length

    with gradient_checkpointing(setting.model, checkpoint):
        found, gradient = setting.scorer.nll_gradient(sequence)
    value, expected = nn.value_and_grad(setting.model, nll)(setting.model)
    assert found == pytest.approx(value.item(), rel=1e-5)
    assert largest_difference(gradient, expected) <= 1e-5


def test_gradient_is_of_adapters_alone(setting):
    """Every adapter gets a gradient, and nothing else does."""
    _, gradient = setting.scorer.pair_gradient(setting.pair, setting.reference, DpoConfig())
    paths = dict(tree_flatten(gradient)).keys()
    assert paths and all(path.endswith(("lora_a", "lora_b")) for path in paths)
    assert len(paths) == len(tree_flatten(setting.model.trainable_parameters()))


def test_gradient_on_a_quantised_model(llama):
    """Parts and joint agree over a 4-bit base too."""
    setting = Setting(llama)
    setting.model.freeze()
    model = load_model(str(llama)).model
    nn.quantize(model, group_size=64, bits=4)
    attach_lora(model, LORA)
    perturb(model)
    setting.model, setting.scorer = model, Scorer(model)
    _, gradient = setting.scorer.pair_gradient(setting.pair, setting.reference, DpoConfig())
    _, expected = joint_gradient(setting, DpoConfig())
    assert largest_difference(gradient, expected) <= 1e-5


def test_score_is_the_gradient_s(setting):
    """Evaluation, which takes no gradient, reports the numbers of training."""
    for settings in (DpoConfig(), DpoConfig(loss="ipo", nll_weight=0.3)):
        pi = Sides(*setting.log_probs())
        alone = scorer_module.score_against(pi, setting.pair, setting.reference, settings)
        score, _ = setting.scorer.pair_gradient(setting.pair, setting.reference, settings)
        assert alone.loss == pytest.approx(score.loss, rel=1e-6)
        assert [p.item() for p in alone.pi] == pytest.approx([p.item() for p in score.pi], rel=1e-6)


# Checkpointing ----------------------------------------------------------------------------------


def test_checkpointing_is_undone(setting):
    """The blocks' class method is wrapped inside the block alone, after an error too."""
    kind = type(setting.model.layers[0])
    plain = kind.__call__
    with gradient_checkpointing(setting.model, True):
        assert kind.__call__ is not plain
    assert kind.__call__ is plain
    with pytest.raises(KeyError), gradient_checkpointing(setting.model, True):
        raise KeyError
    assert kind.__call__ is plain
    with gradient_checkpointing(setting.model, False):
        assert kind.__call__ is plain


# Metrics ----------------------------------------------------------------------------------------


def test_summarise_by_hand():
    """Means over pairs, accuracy counted pair by pair.

    Log ratios (chosen, rejected): (2, -1), (-4, 1), (1, 0); margins 3, -5, 1 with sum -1: two of
    three are right although the mean margin is wrong.
    """
    pi, ref = [(-8, -13), (-14, -11), (-9, -12)], (-10, -12)
    scores = [
        PairScore(
            Sides(mx.array(float(c)), mx.array(float(r))),
            Sides(mx.array(float(ref[0])), mx.array(float(ref[1]))),
            Sides(mx.array(2.0), mx.array(4.0)),
            loss,
        )
        for (c, r), loss in zip(pi, (0.5, 1.5, 1.0), strict=True)
    ]
    found = summarise(scores, beta=0.1)
    expected = {
        "loss": 1.0,
        "rewards/chosen": 0.1 * (2 - 4 + 1) / 3,
        "rewards/rejected": 0.1 * (-1 + 1 + 0) / 3,
        "rewards/margins": 0.1 * (3 - 5 + 1) / 3,
        "rewards/accuracies": 2 / 3,
        "logps/chosen": -31 / 3,
        "logps/rejected": -12.0,
        "logps/chosen_per_token": -31 / 6,
        "logps/rejected_per_token": -3.0,
        "logps/chosen_change_per_token": (2 - 4 + 1) / 6,
        "nll_loss": 31 / 6,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_a_tie_is_no_win():
    """A fresh run, all margins zero, has accuracy 0 as in TRL."""
    zero = Sides(mx.array(-3.0), mx.array(-3.0))
    score = PairScore(zero, zero, Sides(mx.array(1.0), mx.array(1.0)), 0.693)
    assert summarise([score], beta=0.1)["rewards/accuracies"] == 0


def test_score_of_given_log_probs(setting):
    """Log-probs measured elsewhere make the same score as the scorer's own."""
    pi = Sides(*setting.log_probs())
    found = scorer_module.score_against(pi, setting.pair, setting.reference, DpoConfig())
    expected = preference_loss(found.pi, found.ref, found.length, DpoConfig()).item()
    assert found.loss == expected
    assert [n.item() for n in found.length] == list(lengths(setting.pair))


# Adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change", [{}, {"num_layers": 1}, {"keys": ["mlp.down_proj", "self_attn.q_proj"]}]
)
def test_mlx_lm_loads_saved_adapters(kind, change, request, tmp_path):
    """mlx-lm's own adapter_path gives the log-probs of the trained model."""
    lora = LoraConfig(**{"rank": 4, **change})
    setting = Setting(request.getfixturevalue(kind), lora)
    expected = setting.log_probs()
    save_adapters(setting.model, lora, tmp_path / "adapters")
    loaded, *_ = mlx_lm.load(str(setting.folder), adapter_path=str(tmp_path / "adapters"))
    setting.scorer = Scorer(loaded)
    assert setting.log_probs() == pytest.approx(expected, rel=1e-6)
    config = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"


def test_fused_and_saved_models_answer_alike(fresh, tmp_path):
    """Fusing keeps the adapters' log-probs, and mlx-lm loads the folder that is saved."""
    base = [fresh.reference.chosen, fresh.reference.rejected]
    expected = fresh.log_probs()
    assert abs(expected[0] - base[0]) > 0.1, "the adapters do nothing here"
    fusing.fuse(fresh.model, NEAREST, mx.float32)
    fresh.scorer = Scorer(fresh.model)
    assert fresh.log_probs() == pytest.approx(expected, rel=1e-4)
    assert not any("lora" in path for path in dict(tree_flatten(fresh.model.parameters())))

    save_model_folder(fresh.model, fresh.folder, tmp_path / "fused")
    loaded, tokenizer, *_ = mlx_lm.load(str(tmp_path / "fused"))
    fresh.scorer = Scorer(loaded)
    assert fresh.log_probs() == pytest.approx(expected, rel=1e-4)
    assert Encoder(tokenizer).pair(PAIR) == fresh.pair
    config = json.loads((tmp_path / "fused/config.json").read_text())
    expected_config = json.loads((fresh.folder / "config.json").read_text())
    assert config == {**expected_config, **model_files.config_additions(fresh.folder)}


def test_lora_starts_as_the_base_model(fresh):
    """With B zero the policy's log-probs are the reference's, to the last bit."""
    perturb(fresh.model, size=0.0)
    assert fresh.log_probs() == [fresh.reference.chosen, fresh.reference.rejected]


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_of_a_block_takes_lora(kind, request):
    """Without keys, LoRA sits on all linear layers of all blocks, and on nothing else."""
    setting = Setting(request.getfixturevalue(kind))
    adapted = {
        name.removesuffix(".linear")
        for name, module in setting.model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(".linear")
    }
    plain = load_model(str(setting.folder)).model
    expected = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    assert adapted == expected


@pytest.mark.parametrize(("kind", "key"), [("llama", "lm_head"), ("granite", "model.embed_tokens")])
def test_keys_outside_the_blocks_are_refused(kind, key, request):
    """The head and the embedding must stay frozen: naming them is a user's error."""
    model = load_model(str(request.getfixturevalue(kind))).model
    with pytest.raises(UserError, match="must stay frozen"):
        attach_lora(model, LoraConfig(keys=[key, "self_attn.q_proj"]))


@pytest.mark.parametrize("others", [[], ["self_attn.q_proj"]], ids=["alone", "beside a right one"])
def test_keys_that_match_nothing_are_refused(others, granite):
    """A misspelt key would leave layers untrained without a word; the message names it."""
    model = load_model(str(granite)).model
    with pytest.raises(UserError, match="k_prj"):
        attach_lora(model, LoraConfig(keys=[*others, "self_attn.k_prj"]))
