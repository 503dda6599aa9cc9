"""`--check`: what a run needs, printed before it starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import REPOSITORY
from dpo_mlx import config as configs
from dpo_mlx.data.encoding import EncodedAnswer
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.model import device
from dpo_mlx.stages import check_run as checks
from dpo_mlx.stages.check_run import FUSE, MAKE_PAIRS, SMOKE, TRAIN_DPO, Cost, Workload, minutes_of
from runs import exit_code

CHECK = REPOSITORY / "scripts/phase1-check-machine/02_check_run.py"


def sequences(count: int) -> list[EncodedAnswer]:
    """Sequences of ten tokens each."""
    return [EncodedAnswer((0,) * 10, 4)] * count


def test_minutes_by_hand(settings: dict[str, Any], write_config: Any) -> None:
    """Each cost is one second in turn, so the sum shows how often a stage pays it.

    8 rows to train on and 2 held out, of 10 tokens; answers of 5 tokens, 4 at once. One update of
    SFT and two of DPO, each phase evaluated at its start and end, and once the base model: 5
    evaluations, each answering 2 questions and scoring 4 sequences for either question.
    """
    settings["sft"] = {"epochs": 1}
    settings["smoke"] = {"unrelated_tasks": 4}
    settings["train"] |= {"grad_accumulation": 8, "eval_every": None, "epochs": 2}
    settings["train"]["replay"] = 3
    settings["generation"] = {"max_tokens": 5, "batch_size": 4}
    settings["fuse"] = {"check_pairs": 1}
    config = configs.load(write_config(settings))
    work = Workload(sequences(8), sequences(2), layers=3.0)

    def seconds(**cost: float) -> dict[str, float]:
        none = Cost(0, 0, 0, 0, 0, 0)
        minutes = minutes_of(config, work, replace(none, **cost))
        return {script: round(60 * value, 6) for script, value in minutes.items()}

    def by_stage(pairs: float, train: float, fuse: float, smoke: float) -> dict[str, float]:
        return {MAKE_PAIRS: pairs, TRAIN_DPO: train, FUSE: fuse, SMOKE: smoke}

    # 06 and 10 read the model once, 12 three times. 11 reads it to measure the adapters, once for
    # each rounding, and once as the saved folder, whose writing counts as two more.
    assert seconds(model=1) == by_stage(1, 1, 4 + 2, 3)
    # Batches of unrelated prompts: 10 has two for the evaluations and one for the replay, 12 one
    # for each model's instructions and one for the prompts, with answers of 64 tokens. 12 has three
    # batches of questions, one of them under another system message.
    assert seconds(prompts=1) == by_stage(3, 5 + 3, 0, 3 + 3)
    assert seconds(step=1) == by_stage(3 * 5, 5 * 5 + 3 * 64, 0, 3 * 5 + 3 * 64)
    # 10 scores the train pairs (2 x 80) and the valid pairs (2 x 20) once, the replayed answers,
    # and 8 x 10 tokens and 16 unrelated answers of 90 in each evaluation. 11 scores its one pair
    # (20 tokens) five times. 12 scores the valid pairs under both models, three answers to each
    # question, after this question and after another one, and four unrelated answers and four
    # choices under both models.
    assert seconds(scored_token=1) == by_stage(
        0, 200 + 5 * (80 + 16 * 90) + 9 * 90, 5 * 20, 80 + 120 + 2 * 8 * 90
    )
    # 12 pairs of 20 tokens in the preflight, one pass of 80 in SFT, two of 160 in DPO, and three
    # replayed answers of 90 tokens in each of three updates.
    assert seconds(gradient_token=1) == by_stage(0, 240 + 80 + 320 + 9 * 90, 0, 0)
    assert seconds(layer=1) == by_stage(0, 0, 2 * 3, 0)


def test_everything_is_told(
    settings: dict[str, Any], write_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints device, download, disk, and each stage's memory and minutes; writes the minutes to
    plan.json; samples no pair.
    """
    config = write_config(settings)
    assert exit_code(config, script=CHECK) == 0
    said = capsys.readouterr().out
    for words in (
        "GB of memory for models",
        "download: none",
        "disk: up to",
        "peak memory",
        "check: about",
    ):
        assert words in said
    run = configs.load(config).run.path
    minutes = jsonl.read_json(run / "plan.json")["minutes"]
    assert list(minutes) == [MAKE_PAIRS, TRAIN_DPO, FUSE, SMOKE]
    for script, value in minutes.items():
        assert value > 0
        assert said.count(f"    {script}  ") == 2, "its memory and its minutes"
    assert not (run / "pairs").exists()


def test_what_does_not_fit_is_told_for_each_stage(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage that does not fit gets one line with a remedy, and the probe does not run."""
    config = configs.load(write_config(settings))
    config.run.path.mkdir()
    monkeypatch.setattr(device, "available", lambda: 1000)
    monkeypatch.setattr(checks, "_probe", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError) as error:
        checks.check_run(config)
    lines = str(error.value).splitlines()
    for script, line in zip(
        sorted([MAKE_PAIRS, TRAIN_DPO, FUSE, SMOKE]), sorted(lines), strict=True
    ):
        assert line.startswith(f"{script}: ")
        assert "use the adapters without fusing" in line if script == FUSE else "lower " in line


def test_a_hub_that_does_not_answer_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the hub does not answer, the check prints that the size is unknown and goes on."""

    class Hub:
        def model_info(self, name: str, files_metadata: bool) -> Any:
            raise ConnectionError

    monkeypatch.setattr(checks, "HfApi", Hub)
    checks._print_download("owner/no-such-model")
    assert "size unknown (the hub does not answer: ConnectionError)" in capsys.readouterr().out


def test_a_download_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check stops before the download, and prints its size."""
    monkeypatch.setattr(checks, "download_size", lambda name: (10**18, ""))
    with pytest.raises(UserError, match="the disk has .* needs up to"):
        checks._print_download("owner/no-such-model")
    assert "owner/no-such-model, 1000000000.00 GB" in capsys.readouterr().out
