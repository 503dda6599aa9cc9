"""The training loop on tiny models: which pairs, which rate, from which start, what is kept."""

import itertools
import math
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from dpo_mlx.config import TrainConfig
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.parallel.worker import Worker, log_probs
from dpo_mlx.scoring.losses import Sides
from dpo_mlx.scoring.objectives import Example
from dpo_mlx.scoring.scorer import (
    MIN_DIFFERENCE,
    Scorer,
    rounding_limit,
    score_against,
    summarise,
)
from dpo_mlx.training.metrics import MetricsFile
from dpo_mlx.training.schedule import count_updates, groups, learning_rate
from dpo_mlx.training.trainer import Stopped
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.callbacks import TrainingCallback
from runs import VALID, Adapters, differences, saved, swapped, wrote
from test_scorer import perturb
from virtual_mac import in_bfloat16

# Which pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "size"), [(7, 3), (8, 4), (5, 8), (1, 1)])
def test_groups_cover_every_pair_once_an_epoch(pairs, size):
    """No pair is skipped or repeated within an epoch; only the last group may be smaller."""
    train = TrainConfig(learning_rate=1.0, epochs=3, batch_size=1, grad_accumulation=size)
    made = list(groups(train, pairs, seed=0))
    assert len(made) == count_updates(train, pairs) == 3 * math.ceil(pairs / size)
    for epoch in range(3):
        own = [indices for e, indices in made if e == epoch]
        assert sorted(itertools.chain(*own)) == list(range(pairs))
        assert all(len(indices) == size for indices in own[:-1])


def test_groups_are_seeded_and_differ_by_epoch():
    """The same seed gives the same order, another seed another one, as does another epoch."""
    train = TrainConfig(learning_rate=1.0, epochs=2, grad_accumulation=40)
    (_, first), (_, second) = groups(train, 40, seed=1)
    assert [first, second] == [indices for _, indices in groups(train, 40, seed=1)]
    assert first != second
    assert first != next(groups(train, 40, seed=2))[1]
    assert first != list(range(40))


def test_a_smaller_group_is_averaged_over_its_true_size(make):
    """Seven pairs in fours: the second update is the mean of three gradients, not a sum over 4. The
    gradient of each pair, added by hand at the same adapters, gives the logged norm.
    """
    run = make(grad_accumulation=4, learning_rate=0, max_grad_norm=1e6).run()
    assert [row["pairs"] for row in run.updates] == [4, 3]
    scorer = Scorer(run.model)
    orders = groups(run.config.train, 7, run.config.seed)
    for row, (_, indices) in zip(run.updates, orders, strict=True):
        gradients = [
            scorer.pair_gradient(e.pair, e.reference, run.config.dpo)[1]
            for e in (run.train[i] for i in indices)
        ]
        total = tree_map(lambda *g: sum(g), *gradients)
        squares = sum(float(mx.square(g).sum()) for g in dict(tree_flatten(total)).values())
        norm = math.sqrt(squares) / len(indices)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_every_pair_is_trained_on(make, monkeypatch):
    """Over two epochs each pair's gradient is taken twice, in the order of `groups`."""
    seen = []
    original = Scorer.pair_gradient

    def record(self, pair, *arguments):
        seen.append(pair.line)
        return original(self, pair, *arguments)

    monkeypatch.setattr(Scorer, "pair_gradient", record)
    run = make(epochs=2, grad_accumulation=3).run()
    order = [i + 1 for _, indices in groups(run.config.train, 7, 0) for i in indices]
    assert seen == order and sorted(seen) == sorted(2 * [1, 2, 3, 4, 5, 6, 7])
    assert [row["epoch"] for row in run.updates] == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (4, 1)])
def test_batch_and_accumulation_are_one_thing(batch, accumulation, make):
    """Pairs are summed one by one, so 2 x 2 and 4 x 1 are 1 x 4 to the last bit."""
    expected = make(batch_size=1, grad_accumulation=4).run().adapters
    found = make(batch_size=batch, grad_accumulation=accumulation).run().adapters
    assert differences(found, expected) == 0


# At which rate ----------------------------------------------------------------------------------


def rates(updates, **settings):
    train = TrainConfig(learning_rate=0.8, **settings)
    schedule = learning_rate(train, updates)
    return [float(schedule(mx.array(step))) for step in range(updates)]


def test_cosine_by_hand():
    """Ten updates, two of warm-up: 1/3 and 2/3 of the peak, then (1 + cos(pi k / 8)) / 2 of it."""
    expected = [0.8 / 3, 1.6 / 3, *(0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]
    found = rates(10, schedule="cosine", warmup_ratio=0.2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[2] == max(found) == pytest.approx(0.8)
    assert found[-1] > 0.03 * 0.8


def test_constant_by_hand():
    """Without warm-up always the peak; with warm-up 1/4, 2/4, 3/4 of the peak first."""
    assert rates(4, schedule="constant", warmup_ratio=0.0) == pytest.approx([0.8] * 4)
    expected = [0.2, 0.4, 0.6, *[0.8] * 7]
    assert rates(10, schedule="constant", warmup_ratio=0.3) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("updates", [1, 2, 3, 11])
def test_no_update_is_wasted(updates, ratio, schedule):
    """Every update, the first and the last too, has a rate above zero, and the peak is reached."""
    found = rates(updates, schedule=schedule, warmup_ratio=ratio)
    assert min(found) > 0
    assert max(found) == pytest.approx(0.8)


def test_logged_rate_is_the_one_used(make):
    """metrics.jsonl shows the rate of the update it belongs to."""
    run = make(grad_accumulation=1, schedule="cosine", warmup_ratio=0.3).run()
    schedule = learning_rate(run.config.train, 7)
    expected = [float(schedule(mx.array(step))) for step in range(7)]
    assert [row["learning_rate"] for row in run.updates] == pytest.approx(expected, rel=1e-6)


# From where -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["granite", "llama"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_fresh_run_starts_at_the_reference(kind, checkpoint, make, request):
    """Before the first update the loss is ln 2 and all margins are 0, on train and valid pairs."""
    folder = request.getfixturevalue(kind)
    run = make(model=folder, grad_accumulation=7, grad_checkpoint=checkpoint).run()
    first, valid = run.updates[0], run.evaluations[0]
    assert first["iteration"] == 1 and valid["iteration"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert valid["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert first[name] == pytest.approx(0, abs=1e-4)
        assert valid[f"eval_{name}"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("off", [0.5, -0.5, math.nan])
def test_a_wrong_reference_stops_the_run(off, make):
    """A reference half a nat off, or none at all, is refused before the first update."""
    run = make({"off": off})
    with pytest.raises(
        UserError, match="pair on line .* the stored log-prob is .*; delete that folder"
    ):
        run.run()
    assert differences(run.adapters, run.start) == 0


def test_a_wrong_reference_of_one_training_pair_stops_the_run(make):
    """Evaluations see only the valid pairs; the train pairs of the first update are checked too."""
    run = make(grad_accumulation=7)
    bad = run.trainer.examples.train[3]
    run.trainer.examples.train[3] = Example(bad.pair, Sides(-1.0, bad.reference.rejected))
    with pytest.raises(UserError, match="pair on line 4: the stored log-prob is .* off"):
        run.run()


def test_two_unlike_machines_do_not_stop_a_run(make, tmp_path, llama, capsys):
    """In bfloat16 another kernel moves an answer's log-prob by tenths of a nat. A reference from
    another machine gets a line, and training goes on.
    """
    run = make({"off": 0.2}, model=in_bfloat16(llama, tmp_path / "model"), grad_accumulation=7)
    run.run()
    assert len(run.updates) == 1
    assert (
        "up to 0.2 nats off the reference's: rounding can explain that" in capsys.readouterr().out
    )


def test_a_wrong_computation_is_told_from_a_wrong_file(make, monkeypatch):
    """If scoring with a gradient is wrong, deleting the reference would not help. The message says
    so, and what to report.
    """
    right = Scorer.log_prob_and_gradient

    def wrong(scorer, sequence):
        value, gradient = right(scorer, sequence)
        return value + 5, gradient

    monkeypatch.setattr(Scorer, "log_prob_and_gradient", wrong)
    with pytest.raises(UserError, match="without and .* with a gradient .*--selftest") as error:
        make().run()
    assert "delete" not in str(error.value)


def test_dropout_is_no_wrong_reference(make):
    """With dropout the log-probs of the first gradient differ from the reference, which has none.
    The valid pairs, scored without dropout, still agree.
    """
    run = make(lora={"dropout": 0.5}, grad_accumulation=7)
    perturb(run.model)
    scorer = Scorer(run.model)
    for examples in (run.trainer.examples.train, run.trainer.examples.valid):
        for i, example in enumerate(examples):
            chosen, rejected = (scorer.log_prob(side) for side in example.pair.sides)
            examples[i] = Example(example.pair, Sides(chosen, rejected))
    assert len(run.run().updates) == 1


def test_what_rounding_explains_by_hand():
    """32 steps of 2^-7 are a quarter of a nat for one bfloat16 token, ten times that for 100; a
    float32 answer must agree to a hundredth of a nat.
    """
    assert rounding_limit(1, mx.bfloat16) == 0.25
    assert rounding_limit(100, mx.bfloat16) == 2.5
    assert rounding_limit(1000, mx.float32) == MIN_DIFFERENCE == 0.01


# Updates ----------------------------------------------------------------------------------------


def test_the_first_update_moves_by_the_rate(make):
    """With bias correction Adam's first step is the rate times the gradient's sign.

    Without it, sqrt(0.001) takes the place of 1 and 0.1 of 1 above it: 3.2 times more. B alone
    moves: A's gradient is zero where B is.
    """
    rate = 1e-3
    run = make(grad_accumulation=7, learning_rate=rate).run()
    assert run.trainer.updates == len(run.updates) == 1
    for name, after in run.adapters.items():
        moved = np.abs(np.array(after - run.start[name]))
        if name.endswith("lora_a"):
            assert moved.max() == 0
        else:
            assert moved.max() <= rate * 1.001
            assert np.median(moved) == pytest.approx(rate, rel=1e-2)


def test_gradients_are_clipped(make):
    """The logged norm is that before clipping; Adam is fed the clipped gradient.

    A limit of 1e-7 leaves gradients near Adam's eps of 1e-8, and the first step falls short of
    the rate.
    """
    loose = make(grad_accumulation=7, max_grad_norm=1e6).run()
    tight = make(grad_accumulation=7, max_grad_norm=1e-7).run()
    assert tight.updates[0]["grad_norm"] == pytest.approx(loose.updates[0]["grad_norm"])
    steps = [
        np.concatenate([np.abs(np.array(a)).ravel() for n, a in run.adapters.items() if "_b" in n])
        for run in (loose, tight)
    ]
    assert np.median(steps[1]) < 0.5 * np.median(steps[0])


def break_gradients(monkeypatch, broken):
    """Put NaN into the gradient of every call of `pair_gradient` whose number, from 0, is in
    `broken`.
    """
    original, calls = Scorer.pair_gradient, itertools.count()

    def given(self, *arguments):
        score, gradient = original(self, *arguments)
        factor = mx.nan if next(calls) in broken else 1
        return score, tree_map(lambda g: g * factor, gradient)

    monkeypatch.setattr(Scorer, "pair_gradient", given)


def test_an_update_that_is_not_finite_is_skipped_and_counted(make, monkeypatch):
    """Seven pairs in twos, with NaN in the third pair's gradient: the adapters stay as the first
    update left them, the row names the line, and training goes on.
    """
    break_gradients(monkeypatch, {3})
    run = make(grad_accumulation=2, save_every=1)
    kept: dict[int, Adapters] = {}
    monkeypatch.setattr(
        run.trainer, "_save", lambda: kept.setdefault(run.trainer.state.update, run.adapters)
    )
    run.run()
    (_, _), (_, second), *_ = groups(run.config.train, 7, 0)
    [row] = [row for row in run.metrics if "skipped_updates" in row]
    assert (row["iteration"], row["skipped_updates"]) == (2, 1)
    assert row["skipped_lines"] == [second[1] + 1]
    assert [row["iteration"] for row in run.updates] == [1, 3, 4]
    assert differences(kept[2], kept[1]) == 0 < differences(kept[3], kept[2])


def test_three_skipped_updates_in_a_row_end_the_run(make, monkeypatch):
    """Two skipped updates, a good one, then three skipped: the sixth ends the run with the last
    pair's line, and the adapters are the third's.
    """
    break_gradients(monkeypatch, {0, 1, 3, 4, 5})
    run = make(grad_accumulation=1)
    with pytest.raises(Stopped) as stop:
        run.run()
    order = [i + 1 for _, indices in groups(run.config.train, 7, 0) for i in indices]
    assert run.trainer.state.update == 6
    [reason] = stop.value.reasons
    assert reason == (
        "3 updates in a row gave NaN or an infinity, the last one from the pairs on lines "
        f"[{order[5]}] of {run.config.data.train_pairs}; look at them, or lower train.learning_rate"
    )
    assert [row["iteration"] for row in run.updates] == [3]
    assert differences(run.adapters, saved(run.last)) == 0 < differences(run.adapters, run.start)
    assert all(bool(mx.isfinite(value).all()) for value in run.adapters.values())


def test_a_replay_that_is_not_finite_is_named(make, monkeypatch):
    """The pairs are not accused when the base model's own answers give NaN."""
    monkeypatch.setattr(
        Scorer,
        "divergence_gradient",
        lambda self, _: (math.nan, tree_map(mx.zeros_like, self.model.trainable_parameters())),
    )
    run = make(grad_accumulation=1, replay=1)
    run.trainer.examples.replay.extend(run.train)
    with pytest.raises(Stopped) as stop:
        run.run()
    assert stop.value.reasons == [
        "3 updates in a row gave NaN or an infinity, the last one from the base model's own "
        "answers; set train.replay: 0, or lower train.learning_rate"
    ]
    assert [row["skipped_lines"] for row in run.metrics if "skipped_lines" in row] == [[]] * 3
    assert differences(run.adapters, run.start) == 0


def test_a_loss_that_is_not_finite_is_skipped_too(make, monkeypatch):
    """It is skipped even if its gradient is finite."""
    original = Scorer.pair_gradient

    def broken(self, pair, *arguments):
        score, gradient = original(self, pair, *arguments)
        return (replace(score, loss=math.inf) if pair.line == 2 else score), gradient

    monkeypatch.setattr(Scorer, "pair_gradient", broken)
    run = make(grad_accumulation=7).run()
    assert run.updates == [] and run.metrics[1]["skipped_lines"] == [2]
    assert differences(run.adapters, run.start) == 0


@pytest.mark.parametrize("epochs, at", [(1, [0, 7]), (3, [0, 11, 21]), (5, [0, 12, 24, 35])])
def test_a_phase_s_evaluations_are_a_third_apart_or_ten_updates(epochs, at, make):
    """Without train.eval_every: at the start, at the end, and between them at least ten updates
    apart.
    """
    run = make(epochs=epochs, grad_accumulation=1, eval_every=None).run()
    assert [row["iteration"] for row in run.evaluations] == at


def test_runs_repeat_to_the_last_bit(make):
    """The same config gives the same adapters; another seed others."""
    first, again = make(grad_accumulation=3).run(), make(grad_accumulation=3).run()
    assert differences(first.adapters, again.adapters) == 0
    assert differences(first.adapters, make(grad_accumulation=3, seed=1).run().adapters) > 0


@pytest.mark.parametrize("kind", ["granite", "llama"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_the_loss_falls(kind, checkpoint, make, request):
    """Six updates on seven pairs lower the loss of all pairs, trained and held out."""
    folder = request.getfixturevalue(kind)
    run = make(
        model=folder,
        epochs=6,
        grad_accumulation=7,
        learning_rate=3e-3,
        grad_checkpoint=checkpoint,
    ).run()
    losses = [row["loss"] for row in run.updates]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.55
    assert run.updates[-1]["rewards/accuracies"] == 1
    assert run.evaluations[-1]["eval_loss"] < 0.6


def norms_of_masks(make, **changes):
    """Norms of three updates on one pair with dropout, which a rate of 0 leaves at the start."""
    run = make(
        {"train": VALID},
        lora={"dropout": 0.5},
        epochs=3,
        grad_accumulation=1,
        learning_rate=0,
        **changes,
    )
    return [row["grad_norm"] for row in run.run().updates]


def test_dropout_depends_on_the_update_alone(make, monkeypatch):
    """Each update has its own masks, whatever random numbers sampling answers has used before."""
    norms = norms_of_masks(make)
    assert len(set(norms)) == 3
    monkeypatch.setattr(
        "runs.Scripted.__call__", lambda self: wrote(voice=float(mx.random.uniform()))
    )
    assert norms_of_masks(make, eval_every=1) == norms


# What is kept -----------------------------------------------------------------------------------


def evaluate_folder(run, folder):
    """The loss of the valid pairs under a checkpoint, loaded by mlx-lm."""
    model, *_ = mlx_lm.load(run.config.model, adapter_path=str(folder))
    found = log_probs(Worker(model), [e.pair for e in run.valid])
    both = zip(found, run.valid, strict=True)
    scores = [score_against(pi, e.pair, e.reference, run.config.dpo) for pi, e in both]
    return summarise(scores, run.config.dpo.beta)["loss"]


def evaluation_of(run):
    """The update and the voice of the best evaluation."""
    return run.state.best.update, run.state.best.voice


def script(*voices):
    return [wrote(voice=voice) for voice in voices]


def test_the_best_adapters_are_kept(make):
    """`best` is the evaluation with the highest voice score, here the second of four; `last` is the
    last. mlx-lm loads both, and they have the valid losses of their evaluations.
    """
    voices = script(0.25, 0.75, 0.5, 0.625)
    run = make({"script": voices}, epochs=2, grad_accumulation=2, eval_every=3).run()
    assert [row["iteration"] for row in run.evaluations] == [0, 3, 6, 8]
    assert evaluation_of(run) == (3, 0.75)
    losses = {row["iteration"]: row["eval_loss"] for row in run.evaluations}
    assert len(set(losses.values())) == 4
    assert evaluate_folder(run, run.best) == pytest.approx(losses[3], rel=1e-5)
    assert evaluate_folder(run, run.last) == pytest.approx(losses[8], rel=1e-5)
    assert differences(saved(run.last), run.adapters) == 0


def test_the_loss_has_no_say(make):
    """A falling valid loss keeps nothing when the voice score does not rise, and a rising one
    forbids nothing.
    """
    falls = make({"script": script(0.5, 0.5, 0.25)}, eval_every=1, grad_accumulation=4).run()
    losses = [row["eval_loss"] for row in falls.evaluations]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert evaluation_of(falls) == (0, 0.5)
    assert differences(saved(falls.best), falls.start) == 0

    opposite = {"valid": [swapped(pair) for pair in VALID], "script": script(0.25, 0.5, 0.75)}
    rises = make(opposite, eval_every=1, grad_accumulation=4, learning_rate=1e-4).run()
    losses = [row["eval_loss"] for row in rises.evaluations]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    assert evaluation_of(rises) == (2, 0.75)
    assert differences(saved(rises.best), rises.adapters) == 0


def test_a_degenerate_evaluation_is_not_kept(make):
    """The evaluation with the highest voice score repeats itself, so it is passed over. Without the
    guard training goes on from it, and a later sound evaluation is kept.
    """
    voices = [wrote(voice=0.25), wrote(voice=0.9, distinct2=0.25), wrote(voice=0.5)]
    given = {"eval_every": 1, "grad_accumulation": 4, "guard": {"enabled": False}}
    run = make({"script": voices}, **given).run()
    assert evaluation_of(run) == (2, 0.5)
    assert differences(saved(run.best), run.adapters) == 0


def test_a_degenerate_evaluation_ends_the_run(make):
    """With the guard the run ends at that evaluation, which is in the metrics and in `last`. `best`
    is the start, and no update follows.
    """
    voices = [wrote(voice=0.25), wrote(voice=0.9, distinct2=0.25), wrote(voice=0.5)]
    run = make({"script": voices}, eval_every=1, grad_accumulation=2)
    with pytest.raises(Stopped) as stop:
        run.run()
    assert run.trainer.state.update == 1
    assert [reason.split(":")[0] for reason in stop.value.reasons] == ["guard.max_distinct2_drop"]
    assert len(run.updates) == 1 and len(run.evaluations) == 2
    assert run.evaluations[-1]["eval_text/distinct2"] == 0.25
    assert differences(saved(run.best), run.start) == 0
    assert differences(saved(run.last), run.adapters) == 0
    assert differences(run.adapters, run.start) > 0


def test_what_is_written_is_asked_once_an_evaluation(make):
    """Sampling takes minutes: one call for each evaluation, none at the start when the measures are
    known.
    """
    run = make(eval_every=1, grad_accumulation=3)
    run.state.measures = wrote(voice=0.0)
    run.run()
    assert run.answers.asked == 3 == len(run.evaluations) - 1
    assert run.evaluations[0]["eval_text/voice"] == 0.0


def test_evaluation_changes_nothing(make):
    """The number of evaluations does not change what the model learns."""
    rare = make(grad_accumulation=2).run().adapters
    often = make(grad_accumulation=2, eval_every=1).run().adapters
    assert differences(rare, often) == 0


def test_metrics_carry_trl_s_names(make):
    """Dashboards for TRL read these files: the names are TRL's, with eval_ before those of
    evaluations.
    """
    run = make(grad_accumulation=4).run()
    shared = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    }
    assert shared | {"grad_norm", "learning_rate", "epoch"} <= run.updates[0].keys()
    assert {f"eval_{name}" for name in shared} <= run.evaluations[0].keys()
    assert {f"eval_text/{name}" for name in wrote().means} <= run.evaluations[0].keys()
    assert {row["phase"] for row in run.metrics} == {"dpo"}
    numbers = [v for row in run.metrics for v in row.values() if isinstance(v, int | float)]
    assert all(math.isfinite(v) for v in numbers)


def test_the_metrics_file_counts_its_own_rows(tmp_path, capsys):
    """It starts with the checkpoint's rows, or with fewer if rows are missing, which a line says.
    Every report adds one row and goes to the other callbacks too.
    """

    class Listener(TrainingCallback):
        def __init__(self):
            self.reports = []

        def on_train_loss_report(self, train_info):
            self.reports.append(train_info)

        def on_val_loss_report(self, val_info):
            self.reports.append(val_info)

    path, listener = tmp_path / "metrics.jsonl", Listener()
    rows = [{"iteration": i} for i in range(5)]
    jsonl.write(path, rows[:3])
    for stored, expected in ((2, 2), (4, 2)):
        file = MetricsFile(path, listener)
        file.keep_first(stored)
        assert file.rows == expected and jsonl.read_whole_lines(path) == rows[:2]
    assert "2 rows of earlier updates are missing" in capsys.readouterr().out
    file.on_train_loss_report(rows[3])
    file.on_val_loss_report(rows[4])
    assert file.rows == 4 and jsonl.read_whole_lines(path) == [*rows[:2], *rows[3:]]
    assert listener.reports == rows[3:]
