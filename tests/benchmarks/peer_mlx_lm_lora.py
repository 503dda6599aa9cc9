"""Worker of bench_train, in mlx-lm-lora's own environment: its `train_dpo`, timed by a callback."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo
from mlx_lm_lora.utils import from_pretrained


class Rows:
    """The pairs one after the other: a data set of one row, which the callback moves on.

    mlx-lm-lora draws a pair with replacement at every step; of one row it draws that one.
    """

    def __init__(self, pairs: list[common.Values]) -> None:
        self._pairs = pairs
        self.position = 0

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> common.Values:
        pair = self._pairs[min(self.position, len(self._pairs) - 1)]
        prompt = len(pair["prompt_ids"])
        return {
            "chosen": pair["prompt_ids"] + pair["chosen_ids"],
            "rejected": pair["prompt_ids"] + pair["rejected_ids"],
            "chosen_prompt_length": prompt,
            "rejected_prompt_length": prompt,
        }


class Clock(TrainingCallback):
    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self._since = time.perf_counter()

    def on_train_loss_report(self, train_info: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since)
        self.peaks.append(mx.get_peak_memory())
        self._rows.position += 1
        self._since = time.perf_counter()


def worker(task: common.Values) -> common.Values:
    _fit_device_info()
    lora = {
        "rank": common.LORA_RANK,
        "scale": common.LORA_SCALE,
        "num_layers": task["layers"],
    }
    model, *_ = from_pretrained(task["folder"], lora_config=lora)
    # As its command line does: a second copy of the model is the reference.
    reference = from_pretrained(task["folder"])[0].freeze() if task["reference"] else None
    rows = Rows(task["pairs"])
    clock = Clock(rows)
    with tempfile.TemporaryDirectory() as folder:
        train_dpo(
            model=model,
            ref_model=reference,
            optimizer=optim.AdamW(learning_rate=common.LEARNING_RATE),
            train_dataset=rows,
            args=DPOTrainingArgs(
                batch_size=1,
                iters=len(task["pairs"]),
                steps_per_report=1,
                steps_per_save=10**9,
                max_seq_length=10**6,
                adapter_file=str(Path(folder, "adapters.safetensors")),
                grad_checkpoint=task["checkpoint"],
                beta=common.BETA,
            ),
            training_callback=clock,
        )
    steps = clock.seconds[1:]
    adapters: Any = dict(tree_flatten(model.trainable_parameters())).values()
    return {
        "seconds": sum(steps) / len(steps),
        "steps": steps,
        "peaks": clock.peaks[1:],
        "peak_mlx": mx.get_peak_memory(),
        "adapters": sum(array.size for array in adapters),
    }


def _fit_device_info() -> None:
    """Its trainer needs a key of mx.device_info that MLX has on Metal alone."""
    info = dict(mx.device_info())
    info.setdefault("max_recommended_working_set_size", 0)
    mx.device_info = lambda *args: info  # type: ignore[assignment]


def no_main() -> None:
    raise SystemExit("run bench_train.py")


if __name__ == "__main__":
    common.start(no_main, worker)
