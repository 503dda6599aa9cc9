"""Where metrics go: mlx-lm's TrainingCallback, a line a report in a file, a bar on the terminal."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from tqdm import tqdm

from . import jsonl
from .config import Config
from .errors import UserError
from .results import read_metrics

Metrics = dict[str, Any]

# What depends on the machine's mood; all other metrics of a run that is repeated are the same bits.
MEASURED = ("tokens_per_second", "peak_memory_gb")


class MetricsFile(TrainingCallback):
    """Appends every report to a JSON-lines file, of which the first `rows` are kept."""

    def __init__(self, path: Path, rows: int = 0) -> None:
        self._path = path
        known = read_metrics(path) if rows and path.is_file() else []
        if len(known) < rows:
            print(f"10: {path}: {rows - len(known)} rows of earlier updates are gone from it")
        jsonl.write(path, known[:rows])

    def on_train_loss_report(self, train_info: Metrics) -> None:
        jsonl.append(self._path, [train_info])

    def on_val_loss_report(self, val_info: Metrics) -> None:
        jsonl.append(self._path, [val_info])


class ProgressBar(TrainingCallback):
    """A bar over updates with loss, margin and ETA; each evaluation leaves a line."""

    def __init__(self, first: int, updates: int) -> None:
        self._bar = tqdm(initial=first, total=updates, desc="10 train", unit="update")

    def on_train_loss_report(self, train_info: Metrics) -> None:
        if "skipped_lines" in train_info:
            self._bar.write(
                f"   update {train_info['iteration']} skipped: numbers that are not finite, from "
                f"the pairs on lines {train_info['skipped_lines']}"
            )
        elif "loss" in train_info:
            loss, margin = train_info["loss"], train_info["rewards/margins"]
            self._bar.set_postfix(loss=f"{loss:.4f}", margin=f"{margin:.3f}")
        else:
            self._bar.set_postfix(nll=f"{train_info['nll_loss']:.4f}")
        self._bar.update(train_info["iteration"] - self._bar.n)

    def on_val_loss_report(self, val_info: Metrics) -> None:
        self._bar.write(
            f"   {val_info['phase']} update {val_info['iteration']:4d}"
            f"  margin {val_info['eval_rewards/margins']:+.3f}"
            f"  nats/token chosen {val_info['eval_logps/chosen_per_token']:.2f}"
            f" rejected {val_info['eval_logps/rejected_per_token']:.2f}"
            f"  | writes: voice {val_info['eval_text/voice']:.2f}"
            f"  distinct pairs {val_info['eval_text/distinct2']:.2f}"
            f" (greedy {val_info['eval_text/greedy_distinct2']:.2f})"
            f"  ended {val_info['eval_text/self_ended']:.0%}"
            f"  tokens {val_info['eval_text/median_tokens']:.0f}"
        )

    def close(self) -> None:
        self._bar.close()


class Callbacks(TrainingCallback):
    """Several callbacks as one."""

    def __init__(self, *callbacks: TrainingCallback) -> None:
        self._callbacks = callbacks

    def on_train_loss_report(self, train_info: Metrics) -> None:
        for callback in self._callbacks:
            callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: Metrics) -> None:
        for callback in self._callbacks:
            callback.on_val_loss_report(val_info)


def reporters(config: Config) -> list[TrainingCallback]:
    """The reporters that `report_to` names: mlx-lm's own for W&B and SwanLab.

    Raises UserError for an unknown or not installed one.
    """
    if not config.report_to:
        return []
    try:
        callback = get_reporting_callbacks(
            config.report_to,
            project_name="dpo",
            log_dir=config.run_dir,
            config=asdict(config),  # type: ignore[arg-type]  # declared str, handed on as a dict
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"report_to: {error}") from error
    return [callback]
