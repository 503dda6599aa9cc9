"""Worker of bench_train, in TRL's own environment: its DPOTrainer with PEFT, timed."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import common
import peft
import torch
import trl
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Timed(trl.DPOTrainer):
    """DPOTrainer, which also times its pass over the reference."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        since = time.perf_counter()
        result = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.perf_counter() - since
        return result


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []
        self.peaks: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peaks.append(torch.cuda.max_memory_allocated())
        self.ends.append(time.perf_counter())


def worker(task: common.Values) -> common.Values:
    clock, pairs = Clock(), task["pairs"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=model_of(task),
            args=trl.DPOConfig(**settings(task, folder)),
            train_dataset=Dataset.from_list(
                [{side: pair[side] for side in ("prompt", "chosen", "rejected")} for pair in pairs]
            ),
            processing_class=AutoTokenizer.from_pretrained(task["folder"]),
            peft_config=peft.LoraConfig(
                r=common.LORA_RANK,
                lora_alpha=round(common.LORA_SCALE * common.LORA_RANK),
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )
        trainer.train()
    model: Any = trainer.model
    steps = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    return {
        "seconds": sum(steps) / len(steps),
        "steps": steps,
        "peaks": clock.peaks[1:],
        "reference_seconds": trainer.reference_seconds / len(pairs),
        "peak_cuda": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "same_ids": same_ids(trainer.train_dataset, pairs),
        "adapters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def model_of(task: common.Values) -> Any:
    """A folder's model, or with `random` a random one of its geometry, made on its device."""
    dtype = getattr(torch, task.get("dtype", "float32"))
    if not task.get("random"):
        return AutoModelForCausalLM.from_pretrained(task["folder"], dtype=dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        geometry = AutoConfig.from_pretrained(task["folder"])
        return AutoModelForCausalLM.from_config(geometry, dtype=dtype)


def settings(task: common.Values, folder: str) -> common.Values:
    return {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": task.get("dtype") == "bfloat16",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": task["checkpoint"],
        # Granite's architecture may have experts, whose loss TRL would add; this model has none.
        "router_aux_loss_coef": 0.0 if task["granite"] else None,
        "learning_rate": common.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "beta": common.BETA,
        "max_length": None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def same_ids(rows: Any, pairs: list[common.Values]) -> bool:
    """Whether TRL made of the text the very ids that the others were given."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    both = zip(rows, pairs, strict=True)
    return all(list(row[name]) == pair[name] for row, pair in both for name in names)


def no_main() -> None:
    raise SystemExit("run bench_train.py")


if __name__ == "__main__":
    common.start(no_main, worker)
