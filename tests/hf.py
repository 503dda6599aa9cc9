"""The tiny models in transformers: the same weights under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_mlx.data.encoding import Encoder
from dpo_mlx.data.pairs import Pair
from dpo_mlx.export import hugging_face


def folder(source: Path, path: Path) -> Path:
    """A folder as the hub has it, of the MLX folder `source`; all but the weights as it stands."""
    hugging_face.write(source, source, path)
    return path


def load(path: Path) -> Any:
    """The transformers model of such a folder, float32, every weight found and none left over."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    faults = {k: v for k, v in report.items() if v}
    assert not faults, faults
    return model.eval()


def dpo_config(output: Path, **changes: Any) -> Any:
    """TRL's settings for pairs one by one, in order, on a CPU; nothing is written."""
    import trl

    settings = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "prediction_loss_only": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
        "beta": 0.1,
    }
    return trl.DPOConfig(**{**settings, **changes})


def dpo_pairs(pairs: Sequence[Pair], encoder: Encoder) -> Any:
    """The pairs as a data set for TRL, prompts in the chat template's markup."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"prompt": encoder.render(p.prompt), "chosen": p.chosen, "rejected": p.rejected}
            for p in pairs
        ]
    )
