"""Stage 14: one run per combination, nothing computed twice, the best run first."""

from __future__ import annotations

import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from dpo_mlx import config as configs
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.process.signals import Interrupted
from dpo_mlx.scoring.reference import load_or_compute
from dpo_mlx.stages import sweep, train_dpo
from dpo_mlx.training.trainer import Trainer
from runs import exit_code

SCRIPT = REPOSITORY / "scripts/phase4-fine-tune-model/14_sweep.py"
run_script = partial(exit_code, script=SCRIPT)
GRID = ["dpo.beta=0.1,0.3", "train.learning_rate=1e-3,2e-3"]


@pytest.fixture
def path(settings: dict[str, Any], write_config: Any, llama: Path) -> Path:
    """A config with SFT and four updates in each phase."""
    settings["model"] = str(llama)
    settings["sft"] = {"epochs": 1, "learning_rate": 1e-3}
    settings["guard"] = {"enabled": False}
    settings["train"] |= {"grad_accumulation": 6, "eval_questions": 2}
    return write_config(settings)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often SFT starts, and how many log-probs of references are computed."""
    counts = {"sft": 0, "log-probs": 0}
    run, load = Trainer.run, load_or_compute

    def runs(self: Trainer, *arguments: Any) -> Any:
        counts["sft"] += self.state.phase == "sft"
        return run(self, *arguments)

    def loads(files: Any, pairs: Any, current: Any, log_probs: Any, *more: Any) -> Any:
        def count(sequences: Any) -> Any:
            counts["log-probs"] += len(sequences)
            return log_probs(sequences)

        return load(files, pairs, current, count, *more)

    monkeypatch.setattr(Trainer, "run", runs)
    monkeypatch.setattr("dpo_mlx.scoring.reference.load_or_compute", loads)
    return counts


def grid_options(lines: list[str]) -> list[str]:
    return [word for line in lines for word in ("--grid", line)]


def test_two_by_two_share_pairs_reference_and_sft(path, counted, capsys, tmp_path):
    """SFT is trained once and each log-prob of a reference computed once. The table has four runs,
    the highest voice score first. Each run's files equal those of the same run without a sweep.
    """
    assert run_script(path, *grid_options(GRID)) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "run_sweep"
    pairs = tmp_path / "run/pairs"
    train, valid = (len(jsonl.read_whole_lines(pairs / f"{s}.jsonl")) for s in ("train", "valid"))
    assert counted == {"sft": 1, "log-probs": 2 * (train + valid) + 2 * 2}  # two are watched
    runs = jsonl.read_json(folder / "sweep.json")["runs"]
    assert len({row["name"] for row in runs}) == 4
    voices = [row["evaluation"]["eval_text/voice"] for row in runs]
    assert voices == sorted(voices, reverse=True)
    assert all(row["minutes"] > 0 and row["kept_update"] is not None for row in runs)
    assert said.count("06: ") == said.split("14: run 1")[0].count("06: "), "pairs are made once"
    last = said.splitlines()[-1]
    assert last == (
        f"./train_dpo_run1.sh {path} "
        + " ".join(f"--set {setting}" for setting in runs[0]["settings"])
        + f" --set run_dir={runs[0]['run_dir']}"
    )
    page = (folder / "sweep.html").read_text()
    assert page.count("<section>") == 4 and all(row["name"] in page for row in runs)
    alone = configs.load(
        path, [*runs[-1]["settings"], f"run_dir={tmp_path / 'alone'}", "train.force=true"]
    )
    train_dpo.train_dpo(alone)
    for name in ("adapters/adapters.safetensors", "outcome.json"):
        shared = Path(runs[-1]["run_dir"]) / name
        assert shared.read_bytes() == (alone.run.path / name).read_bytes()
    # Again it trains nothing, and the times are those of the first call.
    results = (folder / "sweep.json").read_bytes()
    counted.update({"sft": 0, "log-probs": 0})
    assert run_script(path, *grid_options(GRID)) == 0
    assert (folder / "sweep.json").read_bytes() == results
    assert counted == {"sft": 0, "log-probs": 0}


def test_another_rank_shares_the_base_reference_alone(path, counted, tmp_path):
    """Adapters of another rank need their own SFT; the base model's reference is the same."""
    assert run_script(path, "--grid", "lora.rank=2,4") == 0
    pairs = tmp_path / "run/pairs"
    train, valid = (len(jsonl.read_whole_lines(pairs / f"{s}.jsonl")) for s in ("train", "valid"))
    assert counted == {"sft": 2, "log-probs": 2 * valid + 2 * (2 * train + 2 * 2)}


def test_a_stopped_run_keeps_the_reference_that_it_made(path, monkeypatch, tmp_path):
    """A sweep that was stopped in its first run stops at the same place again, even if by now
    another run has a reference that it could copy.
    """

    def stop(*_: Any) -> None:
        raise Interrupted(signal.SIGINT)

    without_sft = ["--set", "sft.epochs=0"]
    monkeypatch.setattr(Trainer, "run", stop)
    assert run_script(path, "--grid", "dpo.beta=0.1", *without_sft) == 128 + signal.SIGINT
    (own,) = tmp_path.glob("run_sweep/*/reference")
    shutil.copytree(own, tmp_path / "run/reference")
    assert run_script(path, "--grid", "dpo.beta=0.1", *without_sft) == 128 + signal.SIGINT


def test_a_refused_run_is_a_row_at_the_end(path, capsys, tmp_path):
    """The preflight refuses a rate that moves nothing. The other run is still compared."""
    grid = ["--grid", "train.learning_rate=1e-12,1e-3", "--set", "sft.epochs=0"]
    assert run_script(path, *grid) == 0
    best, refused = jsonl.read_json(tmp_path / "run_sweep/sweep.json")["runs"]
    assert best["name"] == "train.learning_rate=1e-3" and best["refused"] is None
    assert "sure to waste the run" in refused["refused"]
    assert "sure to waste the run" in (tmp_path / "run_sweep/sweep.html").read_text()
    assert run_script(path, "--grid", "train.learning_rate=1e-12", "--set", "sft.epochs=0") == 1
    assert "no run reached its end" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["data.limit=10,20"], "--grid data.limit=10,20: write section.key=value,value"),
        (["dpo.beta"], "--grid dpo.beta: write section.key=value,value"),
        (["dpo.beta=0.1", "dpo.beta=0.2"], "--grid: dpo.beta is given twice"),
        (["dpo.bta=0.1"], "dpo.bta: unknown key; did you mean dpo.beta?"),
        (["dpo.beta=0.1,x"], "dpo.beta: expected a number"),
        (["dpo.beta=0.1,1e308"], "dpo.beta: 1e+308 is too large"),
        (["dpo.beta=0.1,0.10"], "dpo.beta=0.1 and dpo.beta=0.10 are the same settings"),
        (["train.grad_checkpoint=true,True"], "are the same settings"),
        (["dpo.beta =0.1", "dpo.beta=0.1,0.2"], "--grid: dpo.beta is given twice"),
        (["dpo.beta=0.1\n,0.2"], "--grid dpo.beta=0.1\\n,0.2: write section.key=value"),
        (["train.epochs/../../..=1"], "unknown key"),
        (
            ["lora.rank=" + ",".join(map(str, range(1, 102)))],
            "--grid: 101 combinations, but at most 100 are allowed",
        ),
        ([f"{key}=" + ",".join("1" * 9999) for key in ("lora.rank", "dpo.beta")], "99980001 comb"),
    ],
    ids=str,
)
def test_a_grid_that_cannot_be_run_is_refused(grid, message, path, tmp_path):
    """A bad grid is an error before any file is written."""
    with pytest.raises(UserError) as refused:
        sweep.combinations(path, [], grid)
    assert message in str(refused.value)
    assert not (tmp_path / "run_sweep").exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("1", "train.epochs=1"),  # as ever: a sweep of an earlier version goes on
        ("1 #/../../../y", "train.epochs=1%20%23%2F..%2F..%2F..%2Fy"),
        ("1 #\u00e9", "train.epochs=1%20%23%C3%A9"),
        ("1 # A", "train.epochs=1%20%23%20A_"),
        ("1 #" + "a" * 300, "train.epochs=1%20%23aaaa"),
    ],
)
def test_a_run_stays_in_the_sweep_s_folder(value, name, path, tmp_path):
    """Whatever a value contains, its run is one folder inside the sweep's, with a name that fits on
    any disk.
    """
    [run] = sweep.combinations(path, [], [f"train.epochs={value}"])
    folder = Path(run.config.run_dir)
    assert folder.resolve().parent == (tmp_path / "run_sweep").resolve()
    assert folder.name.startswith(name) and len(folder.name) <= sweep.LONGEST_NAME


def test_names_of_runs_differ_on_a_mac(path):
    """Names differ where capitals equal small letters, and after long names are cut."""
    tails = ["a", "A", *("b" * 200 + end for end in "cd")]
    grid = "lora.keys=" + ",".join(f"[x{tail}]" for tail in tails)
    runs = sweep.combinations(path, [], [grid])
    assert len({run.config.run.path.name.casefold() for run in runs}) == len(tails)
