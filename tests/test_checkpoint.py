"""A stopped run resumes to the same bits; which checkpoints are kept, resumed and refused."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from dpo_mlx.config import Config, LoraConfig
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.model_files import ADAPTERS
from dpo_mlx.files.results import Evaluation
from dpo_mlx.process import signals
from dpo_mlx.stages.train_dpo import ONLY_DPO, train_dpo
from dpo_mlx.training import checkpoint
from dpo_mlx.training.checkpoint import OPTIMIZER, STATE, CheckpointFingerprints, Checkpoints, State
from mlx import nn
from mlx import optimizers as optim
from runs import determined, differences, saved, with_means, wrote
from test_sft import Norm, Shy


@pytest.fixture
def two_phases(job, llama) -> Any:
    """two_phases(key of the train section=value) -> the config of a run with 7 updates of SFT and 7
    of DPO, evaluated after every third update.
    """

    def made(watch: Any = Norm, **train: Any) -> Config:
        sft = {"epochs": 1, "learning_rate": 1e-3}
        changes = {"eval_every": 3, "save_every": 2, **train}
        return job(watch, sft=sft, model=str(llama), train=changes)[0]

    return made


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> list[int]:
    """Send a signal at this safe point, counted from 0. The list gets a 0 for each point passed."""
    passed: list[int] = []

    def check() -> None:
        if len(passed) == call:
            raise signals.Interrupted(signal.SIGTERM)
        passed.append(0)

    monkeypatch.setattr(signals, "check", check)
    return passed


def end(run: Path) -> dict[str, Any]:
    """Everything that a finished stage 10 leaves, without speed and memory."""
    last = run / "checkpoints/dpo-000014"
    return {
        "metrics": determined(run / "metrics.jsonl"),
        "outcome": jsonl.read_json(run / "outcome.json"),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "state": jsonl.read_json(last / STATE),
        **{str(p): (run / p).read_bytes() for p in ("adapters/adapters.safetensors",)},
        OPTIMIZER: (last / OPTIMIZER).read_bytes(),
    }


@pytest.mark.parametrize("watch", [Norm, Shy])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(watch, two_phases, monkeypatch, tmp_path):
    """A signal at every thirteenth safe point, from the references to the last evaluation: each
    resumed run ends with the adapters, optimizer, metrics and outcome of the undisturbed run,
    whether the best evaluation is SFT's first or DPO's last.
    """
    config = two_phases(watch)
    with monkeypatch.context() as patch:
        passed = stop_at(patch, -1)
        assert train_dpo(config)
    expected = end(config.run.path)
    config.run.path.rename(tmp_path / "undisturbed")
    for call in range(4, len(passed), 13):
        config = two_phases(watch)
        with monkeypatch.context() as patch, pytest.raises(signals.Interrupted):
            stop_at(patch, call)
            train_dpo(config)
        assert train_dpo(config)
        assert end(config.run.path) == expected, f"stopped at safe point {call}"
        shutil.rmtree(config.run.path)


def test_a_signal_loses_no_update(two_phases, monkeypatch):
    """Every fourth update is saved. A signal during DPO's sixth update also saves the fifth."""
    config = two_phases(save_every=4, eval_every=100)

    def check() -> None:
        rows = config.run.path / "metrics.jsonl"
        updates = rows.read_text().count('"grad_norm"') if rows.exists() else 0
        if updates == 12:
            raise signals.Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(signals.Interrupted):
        patch.setattr(signals, "check", check)
        train_dpo(config)
    newest = Checkpoints(config.run.path / "checkpoints").newest("dpo")
    assert newest is not None and checkpoint.read(newest)[0].update == 12


# Which are kept ---------------------------------------------------------------------------------


def small(value: float) -> tuple[nn.Module, optim.Optimizer]:
    """A model with two numbers, and its optimizer."""
    model = nn.Linear(2, 1, bias=False)
    model.weight = mx.array([[value, -value]])
    optimizer = optim.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    return model, optimizer


def keep(folder: Path, phase: str, update: int, best: int) -> Checkpoints:
    made = Checkpoints(folder)
    best_evaluation, last = Evaluation(best, wrote(voice=0.5)), Evaluation(update, wrote())
    state = State(phase, update=update, base=wrote(), best=best_evaluation, last=last)
    model, optimizer = small(update)
    model.layers = []
    made.save(state, model, LoraConfig(num_layers=1), optimizer)
    return made


def test_kept_are_the_last_two_the_end_of_sft_and_their_best(tmp_path):
    """Through both phases, while the best checkpoint changes. `best` finds the one that the newest
    checkpoint names.
    """
    course = [
        ("sft", 0, 0, ["sft-0"]),
        ("sft", 1, 1, ["sft-0", "sft-1"]),
        ("sft", 2, 1, ["sft-1", "sft-2"]),
        ("sft", 3, 1, ["sft-1", "sft-2", "sft-3"]),
        ("dpo", 3, 1, ["sft-1", "sft-3", "dpo-3"]),
        ("dpo", 4, 4, ["sft-1", "sft-3", "dpo-3", "dpo-4"]),
        ("dpo", 5, 4, ["sft-1", "sft-3", "dpo-4", "dpo-5"]),
        ("dpo", 6, 4, ["sft-1", "sft-3", "dpo-4", "dpo-5", "dpo-6"]),
    ]
    for phase, update, best, expected in course:
        made = keep(tmp_path, phase, update, best)
        there = {path.name for path in tmp_path.iterdir()}
        assert there == {f"{n.split('-')[0]}-{int(n.split('-')[1]):06d}" for n in expected}
        assert made.best(best).exists()
    made.clear("dpo")
    assert made.newest("dpo") is None and made.newest("sft") == made.path("sft", 3)
    made.clear("sft")
    assert list(tmp_path.iterdir()) == []


def test_everything_comes_back(tmp_path):
    """State, fingerprints, adapters and optimizer come back to the last bit, NaN too."""
    model, optimizer = small(0.1)
    model.layers = []
    optimizer.update(model, {"weight": mx.array([[0.3, 0.7]])})
    state = State(
        "dpo",
        3,
        7,
        20,
        True,
        wrote(voice=0.1, base_logprob_per_token=float("-inf")),
        wrote(voice=1 / 3),
        Evaluation(7, wrote(voice=0.2)),
        Evaluation(3, wrote(voice=0.1)),
        Evaluation(7, wrote(voice=0.3)),
        4,
        2,
    )
    fingerprints = CheckpointFingerprints({"a": [1, None]}, {"b": "x"})
    made = Checkpoints(tmp_path, {"dpo": fingerprints})
    made.save(state, model, LoraConfig(num_layers=1), optimizer)
    assert checkpoint.read(made.path("dpo", 7)) == (state, fingerprints)
    other, fresh = small(0.5)
    checkpoint.restore(made.path("dpo", 7), other, fresh)
    assert mx.array_equal(other.weight, model.weight)
    assert int(fresh.step) == 1
    for key in ("m", "v"):
        assert mx.array_equal(fresh.state["weight"][key], optimizer.state["weight"][key])


def test_what_a_failed_gpu_command_left_is_not_saved(tmp_path, monkeypatch):
    """Metal reports a failed command late, while its arrays look finished. Saving waits for the GPU
    first, so nothing is written and the previous checkpoint stays the newest.
    """
    made = keep(tmp_path, "dpo", 1, 1)

    def fail() -> None:
        raise RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity")

    monkeypatch.setattr(mx, "synchronize", fail)
    with pytest.raises(RuntimeError, match="METAL"):
        keep(tmp_path, "dpo", 2, 2)
    assert [path.name for path in tmp_path.iterdir()] == [made.path("dpo", 1).name]


# Which are taken up -----------------------------------------------------------------------------


@pytest.fixture
def unfinished(two_phases, monkeypatch) -> Any:
    """The config of a run that was stopped in DPO."""
    config = two_phases()

    def check() -> None:
        if (config.run.path / "checkpoints/dpo-000010").exists():
            raise signals.Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(signals.Interrupted):
        patch.setattr(signals, "check", check)
        train_dpo(config)
    return config


def test_an_unfinished_run_of_other_settings_is_not_thrown_away(unfinished, two_phases, capfd):
    """The error says what changed and touches nothing. With train.restart a new run starts, and
    from then on the same command resumes that run.
    """
    before = checkpoint.read(unfinished.run.path / "checkpoints/dpo-000010")
    with pytest.raises(UserError, match=r"dpo-000010: .*train.epochs: 1 -> 2.*train.restart=true"):
        train_dpo(two_phases(epochs=2))
    assert checkpoint.read(unfinished.run.path / "checkpoints/dpo-000010") == before
    config = two_phases(epochs=2, restart=True)
    assert train_dpo(config)
    assert "not resuming from" in capfd.readouterr().out
    outcome = jsonl.read_json(config.run.path / "outcome.json")
    assert outcome["updates"] == 7 + 14
    rows = determined(config.run.path / "metrics.jsonl")
    assert [row["iteration"] for row in rows if "grad_norm" in row] == list(range(1, 22))


def test_how_often_it_is_saved_changes_no_bit_and_may_change(unfinished, two_phases, tmp_path):
    """A run resumed with another save_every ends like a whole run with that value."""
    assert train_dpo(two_phases(save_every=1), ONLY_DPO)
    found = end(unfinished.run.path)
    unfinished.run.path.rename(tmp_path / "first")
    config = two_phases(save_every=1)
    assert train_dpo(config)
    assert found == end(config.run.path)


def test_pairs_edited_in_between_are_said(unfinished, two_phases):
    """A run does not resume on pairs that were edited after it began."""
    path = Path(unfinished.data.train_pairs)
    path.write_text(path.read_text().replace("Yes.", "No."))
    with pytest.raises(UserError, match="sft-000007: .*other settings or pairs .train pairs"):
        train_dpo(unfinished)


def test_pairs_edited_while_it_trains_are_said(two_phases, monkeypatch):
    """The adapters are kept, but they count as trained on the old file, not on the new one."""

    class Edits(Norm):
        def base(self):
            path = Path(config.data.train_pairs)
            path.write_text(path.read_text().replace("Yes.", "No."))
            return super().base()

    config = two_phases(Edits)
    with pytest.raises(UserError, match="adapters: the input files changed while .*pairs"):
        train_dpo(config)
    assert (config.run.path / "adapters").exists()


def test_a_stop_is_remembered(two_phases, monkeypatch):
    """A run killed after the guard's stop, before it writes the outcome, stops at the same place on
    the next start.
    """
    config = two_phases(Norm)
    config = replace(config, guard=replace(config.guard, min_self_ended_ratio=1.0))
    monkeypatch.setattr(Norm, "base", lambda self: with_means(Norm.__call__(self), self_ended=1.0))
    original = Norm.__call__
    monkeypatch.setattr(
        Norm, "__call__", lambda self: with_means(original(self), self_ended=0.5, voice=0.1)
    )
    assert not train_dpo(config)
    outcome = jsonl.read_json(config.run.path / "outcome.json")
    shutil.rmtree(config.run.path / "adapters")
    (config.run.path / "outcome.json").unlink()
    rows = determined(config.run.path / "metrics.jsonl")
    assert not train_dpo(config)
    assert jsonl.read_json(config.run.path / "outcome.json") == outcome and outcome["stopped"]
    assert determined(config.run.path / "metrics.jsonl") == rows
    assert (
        differences(
            saved(config.run.path / "adapters"), saved(config.run.path / "checkpoints/sft-000000")
        )
        == 0
    )


# Which are refused ------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def edit_state(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / STATE).read_text())
    edit(folder / STATE, state={**values["state"], **changes})


def scale(path: Path, factor: float = 1.5) -> None:
    tensors: Any = mx.load(str(path))
    mx.save_safetensors(str(path), {name: factor * array for name, array in tensors.items()})


def halve(path: Path) -> None:
    tensors: Any = mx.load(str(path))
    mx.save_safetensors(str(path), {n: array.astype(mx.float16) for n, array in tensors.items()})


DAMAGES = {
    "cut state": (lambda f: (f / STATE).write_text('{"vers'), "state.json: broken JSON"),
    "no state": (lambda f: (f / STATE).unlink(), "state.json: no such file"),
    "a list": (lambda f: (f / STATE).write_text("[]"), "state.json: the file must be an object"),
    "no version": (lambda f: (f / STATE).write_text("{}"), "written by another version .None"),
    "another version": (lambda f: edit(f / STATE, version=99), "another version .99; this one"),
    "an unknown field": (
        lambda f: edit(f / STATE, extra=1),
        'state.json: has the unknown key "extra"',
    ),
    "text for a number": (lambda f: edit_state(f, update="9"), "update. must be a whole number"),
    "a negative number": (lambda f: edit_state(f, rows=-1), "rows. is not between 0 and"),
    "a number of 400 digits": (lambda f: edit_state(f, rows=10**400), "rows. is not between"),
    "a phase that begins after its update": (
        lambda f: edit_state(f, phase_start=11),
        "state.phase_start. is greater than",
    ),
    "a list for measures": (lambda f: edit_state(f, measures=[]), "measures. must be an object"),
    "measures missing": (
        lambda f: edit_state(f, base={"voice": [0.5], "means": {"voice": 0.5, "habits": 1}}),
        "state.base.means.distinct2",
    ),
    "no measures": (lambda f: edit_state(f, base={"voice": [], "means": {}}), "state.base.means."),
    "no base": (lambda f: edit_state(f, base=None), '"state.base" is null'),
    "no best": (lambda f: edit_state(f, best=None), '"state.best" is null'),
    "a best that is not finite": (
        lambda f: edit_state(f, best={"update": 0, "measures": {"voice": ["x"], "means": {}}}),
        "state.best.measures.voice",
    ),
    "half as many bits": (lambda f: halve(f / OPTIMIZER), f"{OPTIMIZER}: cannot be used"),
    "another number": (lambda f: edit_state(f, skipped=1), "state.json: has changed since"),
    "other adapters": (
        lambda f: scale(f / ADAPTERS),
        "adapters.safetensors: has changed since",
    ),
    "adapters that are not finite": (
        lambda f: scale(f / ADAPTERS, float("nan")),
        "adapters.safetensors: .* NaN or an infinity",
    ),
    "cut adapters": (
        lambda f: (f / ADAPTERS).write_bytes((f / ADAPTERS).read_bytes()[:-50]),
        "adapters.safetensors: is cut short",
    ),
    "no optimizer": (lambda f: (f / OPTIMIZER).unlink(), f"{OPTIMIZER}: cannot be read"),
    "optimizer of another model": (
        lambda f: mx.save_safetensors(str(f / OPTIMIZER), {"step": mx.array(1)}),
        f"{OPTIMIZER}: cannot be used: its tensors belong to another model",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(name, unfinished):
    """One line names the folder to move away, and the metrics stay. Without that folder the same
    command resumes from update 9.
    """
    damage, message = DAMAGES[name]
    newest = unfinished.run.path / "checkpoints/dpo-000010"
    metrics = (unfinished.run.path / "metrics.jsonl").read_bytes()
    damage(newest)
    with pytest.raises(UserError, match=message) as error:
        train_dpo(unfinished)
    assert str(newest) in str(error.value) and "away" in str(error.value)
    assert "\n" not in str(error.value) and newest.exists()
    assert (unfinished.run.path / "metrics.jsonl").read_bytes() == metrics
    if name == "cut state":
        shutil.rmtree(newest)
        assert train_dpo(unfinished)
        assert (unfinished.run.path / "checkpoints/dpo-000014").exists()


def test_a_backup_stays_and_is_not_gone_on_from(unfinished):
    """A copied checkpoint is left alone under another name, and refused under a checkpoint's name.
    Pruning keeps a checkpoint that holds the user's notes.
    """
    folder = unfinished.run.path / "checkpoints"
    shutil.copytree(folder / "dpo-000010", folder / "dpo-000010-my-backup")
    shutil.copytree(folder / "dpo-000010", folder / "dpo-000099")
    with pytest.raises(UserError, match="dpo-000099: is a copy of update 10 of dpo"):
        train_dpo(unfinished)
    shutil.rmtree(folder / "dpo-000099")
    (folder / "dpo-000009/notes.txt").write_text("the best so far")
    assert train_dpo(unfinished)
    assert (folder / "dpo-000009/notes.txt").read_text() == "the best so far"
    assert (folder / "dpo-000010-my-backup" / STATE).exists()


# How often -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "size", "pause"),
    [(0.5, 10**6, 300), (5, 10**6, 500), (1, 362 * 10**6, 362)],
    ids=["at least five minutes", "1% of the time", "1 MB per second"],
)
def test_checkpoints_by_the_clock(seconds: float, size: int, pause: float) -> None:
    """The next checkpoint is due once the last one's cost is a small share of the time."""
    now = [0.0]
    clock = checkpoint.SaveClock(lambda: now[0])
    now[0] = 299.0
    assert not clock.is_due()
    now[0] = 300.0
    assert clock.is_due()
    with clock.saving(size):
        now[0] += seconds
    now[0] += pause - 1
    assert not clock.is_due()
    now[0] += 1
    assert clock.is_due()


def test_a_run_saves_by_the_clock(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without save_every a run of seconds only saves at its evaluations. When the clock says a
    checkpoint is always due, it saves every update.
    """
    saved: list[int] = []
    for due, expected in ((False, [0, 7, 7]), (True, [0, 1, 2, 3, 4, 5, 6, 7, 7])):
        run = make(grad_accumulation=1, eval_every=7)
        monkeypatch.setattr(checkpoint.SaveClock, "is_due", lambda self, due=due: due)
        monkeypatch.setattr(
            run.trainer.checkpoints, "save", lambda state, *_: saved.append(state.update)
        )
        saved.clear()
        run.run()
        assert saved == expected
