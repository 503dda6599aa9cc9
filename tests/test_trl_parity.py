"""TRL's own DPOTrainer beside ours: its losses, its metrics, and twenty of its updates.

Nothing of TRL is copied here; its trainer runs on the same tiny weights in transformers, with PEFT
adapters of the same values. PEFT's A and B are ours transposed, its alpha is scale x rank.
"""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from dpo_mlx import config as config_module
from dpo_mlx.config import DpoConfig, LoraConfig
from dpo_mlx.data.encoding import Encoder
from dpo_mlx.data.pairs import Pair
from dpo_mlx.files import jsonl
from dpo_mlx.model.adapters import attach_lora
from dpo_mlx.model.loading import load_model
from dpo_mlx.parallel.worker import Worker, log_probs
from dpo_mlx.scoring.losses import Sides, objective
from dpo_mlx.scoring.objectives import DPO, Example
from dpo_mlx.scoring.scorer import Scorer, score_against, summarise
from dpo_mlx.training.checkpoint import Checkpoints, State
from dpo_mlx.training.metrics import MetricsFile
from dpo_mlx.training.schedule import groups
from dpo_mlx.training.trainer import Examples, Trainer
from mlx.utils import tree_flatten, tree_map_with_path
from runs import wrote

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("peft")

import hf  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import trl  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

# Rank and scale of all adapters here; the layers are those that both libraries have. Granite's
# gate and up are one layer in transformers.
RANK, SCALE = 4, 8.0
KEYS = {
    "granite": [
        "mamba.in_proj",
        "mamba.out_proj",
        *(f"self_attn.{x}_proj" for x in "qkvo"),
    ],
    "llama": [
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    ],
}
PAIRS = [
    Pair("Why odd?", "**Odd!** So it is.", "It is odd, and that is all there is to it.", line=1),
    Pair("Why 7 red?", "**Red!**", "7 is red.", line=2),
    Pair("Is it hot?", " Blank first, then hot.", "Hot", line=3),
    Pair("How big?", "\n\nNewlines before big: **big**", "As big as 1234.", line=4),
]


pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder(trl.DPOTrainer):
    """TRL's trainer, which also keeps every batch's metrics before it averages them for a log."""

    def __init__(self, **kwargs):
        self.batches: dict[str, dict[str, list[float]]] = {"train": {}, "eval": {}}
        super().__init__(**kwargs)

    def _compute_loss(self, model, inputs, return_outputs=False):
        mode = "train" if model.training else "eval"
        loss = super()._compute_loss(model, inputs, return_outputs)
        kept = self.batches[mode]
        kept.setdefault("loss", []).append(loss.item())
        for name, values in self._metrics[mode].items():
            kept.setdefault(name, []).append(values[-1])
        return loss


def theirs(folder, path, kind, adapters, pairs, encoder, **arguments):
    """TRL's trainer over PEFT adapters with the values of `adapters`, pairs in the given order."""
    base = hf.load(hf.folder(folder, path / "model"))
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=int(SCALE * RANK),
        lora_dropout=0.0,
        target_modules=[key.split(".")[1] for key in KEYS[kind]],
        task_type="CAUSAL_LM",
    )
    dataset = hf.dpo_pairs(pairs, encoder)
    granite = {"router_aux_loss_coef": 0.0 if kind == "granite" else None}
    trainer: Any = Recorder(
        model=base,
        args=hf.dpo_config(path / "trl", **{**granite, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora,
    )
    trainer.model.load_state_dict(in_peft(adapters, trainer.model), strict=False)
    # The very ids of ours, or nothing below means anything.
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        encoded = encoder.pair(pair)
        for side in ("chosen", "rejected"):
            sequence = getattr(encoded, side)
            assert row["prompt_ids"] + row[f"{side}_ids"] == list(sequence.ids)
            assert len(row["prompt_ids"]) == sequence.prompt_length
    return trainer


def in_peft(adapters, model):
    """Our adapters under the names of a PEFT model; every one of its adapters is given a value."""
    values = {}
    for name, value in adapters.items():
        module, _, matrix = name.rpartition(".lora_")
        key = f"base_model.model.{module}.lora_{matrix.upper()}.default.weight"
        values[key] = torch.tensor(np.array(value).T)
    expected = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert values.keys() == expected
    return values


class Ours:
    """Our side: the tiny model with adapters, all pairs with their reference."""

    def __init__(self, folder, kind, size):
        loaded = load_model(str(folder))
        self.model, self.encoder = loaded.model, Encoder(loaded.tokenizer)
        scorer = Scorer(self.model)
        self.lora = LoraConfig(rank=RANK, scale=SCALE, keys=KEYS[kind])
        self.examples = []
        for pair in PAIRS:
            encoded = self.encoder.pair(pair)
            reference = Sides(scorer.log_prob(encoded.chosen), scorer.log_prob(encoded.rejected))
            self.examples.append(Example(encoded, reference))
        mx.random.seed(2)
        attach_lora(self.model, self.lora)

        def moved(name, value):
            return size * mx.random.normal(value.shape) if name.endswith("lora_b") else value

        self.model.update(tree_map_with_path(moved, self.model.trainable_parameters()))
        self.scorer = Scorer(self.model)

    @property
    def adapters(self):
        return dict(tree_flatten(self.model.trainable_parameters()))

    def scores(self, settings):
        found = log_probs(Worker(self.model), [e.pair for e in self.examples])
        both = zip(found, self.examples, strict=True)
        return [score_against(pi, e.pair, e.reference, settings) for pi, e in both]


@pytest.fixture(scope="module")
def folders(llama, tmp_path_factory):
    """The model folders; Granite's in chunks of 16 tokens, which transformers pads sequences to."""
    path = tmp_path_factory.mktemp("models") / "granite"
    return {"llama": llama, "granite": tiny.folder(path, mamba_chunk_size=16)}


# Perturbations of B that move rewards by 0.05 and more, without making the model ill-conditioned.
SIZES = {"granite": 0.15, "llama": 0.02}


@pytest.fixture(scope="module", params=["granite", "llama"])
def both(request, folders, tmp_path_factory):
    """(our side, TRL's side) at the same policy, which is not the reference."""
    kind, folder = request.param, folders[request.param]
    ours = Ours(folder, kind, SIZES[kind])
    path = tmp_path_factory.mktemp("trl")
    trainer = theirs(folder, path, kind, ours.adapters, PAIRS, ours.encoder)
    return ours, trainer


# The same policy --------------------------------------------------------------------------------

NAMES = [
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "loss",
]


def test_metrics_of_each_pair_are_trl_s(both):
    """Log-probs to 1e-4 relative; loss, rewards, margins and accuracies to 1e-4, pair by pair."""
    ours, trainer = both
    trainer.batches["eval"].clear()
    trainer.evaluate()
    found = [
        summarise([score], beta=0.1) for score in ours.scores(DpoConfig(beta=0.1, nll_weight=0.0))
    ]
    margins = [row["rewards/margins"] for row in found]
    assert max(map(abs, margins)) > 0.05, "a policy at its reference proves nothing"
    for name in NAMES:
        tolerance: dict[str, Any] = {"rel": 1e-4} if name.startswith("logps") else {"abs": 1e-4}
        expected = trainer.batches["eval"][name]
        assert [row[name] for row in found] == pytest.approx(expected, **tolerance), name


def test_means_are_those_of_a_padded_batch(both):
    """TRL pads all pairs to one length in a batch of four; our unpadded pairs have its means."""
    ours, trainer = both
    trainer.args.per_device_eval_batch_size = len(PAIRS)
    try:
        logged = trainer.evaluate()
    finally:
        trainer.args.per_device_eval_batch_size = 1
    found = summarise(ours.scores(DpoConfig(beta=0.1, nll_weight=0.0)), beta=0.1)
    for name in NAMES:
        tolerance: dict[str, Any] = {"rel": 1e-4} if name.startswith("logps") else {"abs": 1e-4}
        assert found[name] == pytest.approx(logged[f"eval_{name}"], **tolerance), name


def test_gradients_are_trl_s(both):
    """backward() of TRL's loss and our gradient by parts agree in every adapter, to 1e-4."""
    ours, trainer = both
    settings = DpoConfig(beta=0.1, nll_weight=0.0)
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    example = ours.examples[0]
    _, gradient = ours.scorer.pair_gradient(example.pair, example.reference, settings)
    expected = {
        name: parameter.grad
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    found = in_peft(dict(tree_flatten(gradient)), trainer.model)
    assert found.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 0
    for name, value in found.items():
        assert (value - expected[name]).abs().max().item() < 1e-4 * largest, name
    trainer.model.zero_grad()


# The losses -------------------------------------------------------------------------------------

SHARED_LOSSES = [
    ("sigmoid", {}),
    ("sigmoid", {"beta": 0.5}),
    ("robust", {"label_smoothing": 0.1}),
    ("robust", {"label_smoothing": 0.3, "beta": 0.3}),
    ("hinge", {}),
    ("hinge", {"beta": 0.02}),
    ("ipo", {}),
    ("ipo", {"beta": 2.0}),
    ("sigmoid_norm", {"beta": 5.0}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("apo_down", {"beta": 0.5}),
    ("sigmoid", {"nll_weight": 0.3}),
    ("ipo", {"nll_weight": 1.5}),
]


def trl_s_loss(trainer, name, settings, log_probs, ref, lengths):
    """The value of TRL's `_compute_loss`, given the log-probs of the answers' tokens [2, T].

    Only the model is a stand-in: it hands out these log-probs.
    """
    ended = torch.tensor([[1.0] * n + [0.0] * (log_probs.shape[1] - n) for n in lengths])

    def model(**kwargs):
        nothing = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs * ended,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )

    # The answer starts at the second token: one token of prompt.
    mask = torch.cat([torch.zeros(2, 1), ended], dim=1).long()
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref[:1],
        "ref_rejected_logps": ref[1:],
    }
    weight = settings.nll_weight
    given = {
        "precompute_ref_logps": True,
        "beta": settings.beta,
        "label_smoothing": settings.label_smoothing,
        "loss_types": [name, "sft"] if weight else [name],
        "loss_weights": [1.0, weight] if weight else [1.0],
    }
    kept = {key: getattr(trainer, key) for key in given}
    vars(trainer).update(given)
    try:
        return trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    finally:
        vars(trainer).update(kept)


@pytest.fixture(scope="module")
def trainer(llama, tmp_path_factory):
    """A TRL trainer for its loss alone."""
    ours = Ours(llama, "llama", 0.0)
    path = tmp_path_factory.mktemp("losses")
    return theirs(llama, path, "llama", ours.adapters, PAIRS[:1], ours.encoder)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "changes"), SHARED_LOSSES)
def test_losses_are_trl_s(name, changes, seed, trainer):
    """Value and slopes of each shared loss equal those of TRL's own code to 1e-6."""
    settings = DpoConfig(loss=name, **{"beta": 0.1, "nll_weight": 0.0, **changes})
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + seed, 7]
    log_probs = -torch.rand(2, 7, generator=generator)
    ended = torch.arange(7) < torch.tensor(lengths)[:, None]
    pi = torch.where(ended, log_probs, 0).sum(dim=1)
    ref = pi + torch.randn(2, generator=generator)

    log_probs.requires_grad_()
    expected = trl_s_loss(trainer, name, settings, log_probs, ref, lengths)
    expected.backward()
    # A side's slope is that of any of its tokens, each of which is added to the sum once.
    assert log_probs.grad is not None
    slopes = log_probs.grad[:, 0].tolist()

    chosen, rejected = (mx.array(value) for value in pi.tolist())
    ref_sides = Sides(*(mx.array(value) for value in ref.tolist()))
    length = Sides(*(mx.array(float(n)) for n in lengths))

    def loss(chosen, rejected):
        return objective(Sides(chosen, rejected), ref_sides, length, settings)

    value, found = mx.value_and_grad(loss, argnums=(0, 1))(chosen, rejected)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    assert [float(g) for g in found] == pytest.approx(slopes, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["robust", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down"])
def test_losses_at_a_real_policy_are_trl_s(name, both):
    """Through model, collator and masks: TRL's evaluation loss of each pair, for other losses."""
    ours, trainer = both
    settings = DpoConfig(loss=name, beta=0.2, label_smoothing=0.1, nll_weight=0.0)
    given = {"loss_types": [name], "beta": 0.2, "label_smoothing": 0.1}
    kept = {key: getattr(trainer, key) for key in given}
    vars(trainer).update(given)
    trainer.batches["eval"].clear()
    try:
        trainer.evaluate()
    finally:
        vars(trainer).update(kept)
    found = [score.loss for score in ours.scores(settings)]
    assert found == pytest.approx(trainer.batches["eval"]["loss"], rel=1e-4, abs=1e-4)


# Twenty updates ---------------------------------------------------------------------------------


# Rate and largest gradient norm. Granite's gradients are a tenth of llama's; both runs are clipped.
RATES = {"granite": (5e-3, 0.1), "llama": (1e-3, 1.0)}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("kind", ["granite", "llama"])
def test_twenty_updates_are_trl_s(kind, schedule, folders, settings, write_config, tmp_path):
    """From one LoRA start and in one order, AdamW, schedule and clipping give TRL's losses.

    Twenty updates of two pairs: losses to 1e-3 relative, and each adapter at the end to 1e-3 of
    the way it has come.
    """
    folder, (rate, largest_norm) = folders[kind], RATES[kind]
    settings["model"], settings["lora"] = str(folder), {"rank": RANK, "scale": SCALE}
    settings["lora"]["keys"] = KEYS[kind]
    settings["train"] = {
        "learning_rate": rate,
        "epochs": 10,
        "batch_size": 1,
        "grad_accumulation": 2,
        "schedule": schedule,
        "warmup_ratio": 0.0,
        "max_grad_norm": largest_norm,
        "grad_checkpoint": False,
        "eval_every": 1000,
    }
    settings["dpo"] |= {"loss": "sigmoid", "beta": 0.1}
    settings["guard"] = {"enabled": False}
    config = config_module.load(write_config(settings))

    ours = Ours(folder, kind, 0.0)
    start = ours.adapters
    metrics = MetricsFile(config.run.path / "metrics.jsonl")
    Trainer(
        Worker(ours.model),
        config,
        Examples(ours.examples, ours.examples),
        wrote,
        metrics,
        Checkpoints(config.run.path / "checkpoints"),
        State(DPO, base=wrote()),
    ).run()
    updates = [r for r in jsonl.read_whole_lines(config.run.path / "metrics.jsonl") if "loss" in r]

    order = [PAIRS[i] for _, indices in groups(config.train, 4, config.seed) for i in indices]
    trainer = theirs(
        folder,
        tmp_path,
        kind,
        start,
        order,
        ours.encoder,
        learning_rate=rate,
        num_train_epochs=1,
        gradient_accumulation_steps=2,
        lr_scheduler_type=schedule,
        warmup_steps=0,
        max_grad_norm=largest_norm,
        weight_decay=0.0,
        optim="adamw_torch",
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(updates) == len(logged) == 20

    losses = np.reshape(trainer.batches["train"]["loss"], (20, 2)).mean(axis=1)
    found = np.array([row["loss"] for row in updates])
    assert found[0] == pytest.approx(np.log(2), abs=1e-5)
    assert found[-1] < 0.8 * found[0], "a run that learns nothing proves nothing"
    np.testing.assert_allclose(found, losses, rtol=1e-3)
    for name, tolerance in (("learning_rate", 1e-5), ("grad_norm", 1e-3)):
        expected = [row[name] for row in logged]
        np.testing.assert_allclose([row[name] for row in updates], expected, rtol=tolerance)
    assert max(row["grad_norm"] for row in updates) > largest_norm, "clipping was never tried"

    parameters = dict(trainer.model.named_parameters())
    before = in_peft(start, trainer.model)
    for name, after in in_peft(ours.adapters, trainer.model).items():
        off = torch.linalg.norm(after - parameters[name].detach())
        assert off < 1e-3 * torch.linalg.norm(after - before[name]), name
