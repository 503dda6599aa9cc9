"""Where metrics go: mlx-lm's TrainingCallback, a line a report in a file, a bar on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from tqdm import tqdm

from . import jsonl
from .config import Config
from .errors import UserError

Metrics = dict[str, Any]


class MetricsFile(TrainingCallback):
    """Appends every report to a JSON-lines file, which starts empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        jsonl.write(path, [])

    def on_train_loss_report(self, train_info: Metrics) -> None:
        jsonl.append(self._path, [train_info])

    def on_val_loss_report(self, val_info: Metrics) -> None:
        jsonl.append(self._path, [val_info])


class ProgressBar(TrainingCallback):
    """A bar over updates with loss, margin and ETA; each evaluation leaves a line."""

    def __init__(self, updates: int) -> None:
        self._bar = tqdm(total=updates, desc="10 train", unit="update")

    def on_train_loss_report(self, train_info: Metrics) -> None:
        self._bar.set_postfix(
            loss=f"{train_info['loss']:.4f}", margin=f"{train_info['rewards/margins']:.3f}"
        )
        self._bar.update(train_info["iteration"] - self._bar.n)

    def on_val_loss_report(self, val_info: Metrics) -> None:
        self._bar.write(
            f"   update {val_info['iteration']:4d}  valid loss {val_info['eval_loss']:.4f}"
            f"  margin {val_info['eval_rewards/margins']:+.3f}"
            f"  accuracy {val_info['eval_rewards/accuracies']:.2f}"
            f"  nats/token chosen {val_info['eval_logps/chosen_per_token']:.3f}"
            f" rejected {val_info['eval_logps/rejected_per_token']:.3f}"
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


def reporters(config: Config, resolved: Metrics) -> list[TrainingCallback]:
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
            config=resolved,  # type: ignore[arg-type]  # declared str, handed on as a dict
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"report_to: {error}") from error
    return [callback]
