"""Where metrics go: a file with one line for each report, a progress bar, and W&B or SwanLab.

All of them are callbacks of mlx-lm's kind.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from tqdm import tqdm

from ..config import Config
from ..files import jsonl
from ..files.errors import UserError
from ..files.results import read_metrics

Metrics = dict[str, Any]

# These depend on what else the machine does. All other metrics are the same bits in every run.
MEASURED = ("tokens_per_second", "peak_memory_gb")


class MetricsFile(TrainingCallback):
    """Appends every report to a JSON-lines file, counts its rows, and passes the report on."""

    def __init__(self, path: Path, *callbacks: TrainingCallback) -> None:
        self.rows = 0
        self._path = path
        self._callbacks = callbacks

    def keep_first(self, rows: int) -> None:
        """Cut the file to its first `rows`, those of the checkpoint that the run goes on from.

        Prints a line when the file has fewer. Raises UserError for a file that is damaged or that
        the pipeline did not write.
        """
        stored = read_metrics(self._path) if rows and self._path.is_file() else []
        if len(stored) < rows:
            print(f"10: {self._path}: {rows - len(stored)} rows of earlier updates are missing")
        jsonl.write(self._path, stored[:rows])
        self.rows = len(stored[:rows])

    def on_train_loss_report(self, train_info: Metrics) -> None:
        self._append(train_info)
        for callback in self._callbacks:
            callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: Metrics) -> None:
        self._append(val_info)
        for callback in self._callbacks:
            callback.on_val_loss_report(val_info)

    def _append(self, row: Metrics) -> None:
        jsonl.append(self._path, [row])
        self.rows += 1


class ProgressBar(TrainingCallback):
    """A bar over updates with loss, margin and remaining time. Each evaluation leaves a line.

    The bar is on the terminal within a `with` block.
    """

    def __init__(self, updates_done: int, updates: int) -> None:
        self._updates_done, self._updates = updates_done, updates

    def __enter__(self) -> None:
        self._bar = tqdm(
            initial=self._updates_done, total=self._updates, desc="10 train", unit="update"
        )

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def on_train_loss_report(self, train_info: Metrics) -> None:
        if "skipped_lines" in train_info:
            lines = train_info["skipped_lines"]
            cause = f"the pairs on lines {lines}" if lines else "the base model's own answers"
            self._bar.write(
                f"   skipped update {train_info['iteration']}: {cause} gave NaN or an infinity"
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
            f"  | answers: voice {val_info['eval_text/voice']:.2f}"
            f"  distinct word pairs {val_info['eval_text/distinct2']:.2f}"
            f"  ended {val_info['eval_text/self_ended']:.0%}"
            f"  tokens {val_info['eval_text/median_tokens']:.0f}"
        )


def reporters(config: Config) -> list[TrainingCallback]:
    """The callbacks that `report_to` names: mlx-lm's own, for W&B and SwanLab.

    Raises UserError for an unknown one, and for one whose package is not installed.
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
