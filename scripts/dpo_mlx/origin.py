"""What a training run is made of: as its stamp has it, and as its checkpoints do."""

from __future__ import annotations

from dataclasses import asdict

from . import jsonl, models, stamp
from .checkpoint import Origin
from .config import Config
from .job import SPLITS, pair_file
from .objectives import SFT

# Keys whose values change neither the adapters nor which of them are kept.
WITHOUT_EFFECT = {
    "train.force",
    "train.restart",
    "train.save_every",
    "generation.restart",
    "generation.batch_size",
}


def training_inputs(config: Config) -> stamp.Inputs:
    """Everything that determines the adapters."""
    files = [pair_file(config, split) for split in SPLITS]
    made = {
        "pairs": [jsonl.digest(path) if path.is_file() else None for path in files],
        "model files": models.fingerprint(config.model),
        **config.prompt_inputs,
        "data.max_length": config.data.max_length,
        "seed": config.seed,
    }
    for section in ("lora", "sft", "dpo", "train", "guard", "generation"):
        made |= {f"{section}.{k}": v for k, v in asdict(getattr(config, section)).items()}
    return {name: value for name, value in made.items() if name not in WITHOUT_EFFECT}


def origin_of(inputs: stamp.Inputs, phase: str) -> Origin:
    """Of the training's inputs, those that determine the adapters of a phase, and those that
    determine how they are judged.
    """
    judging = ("guard.", "generation.", "train.eval_")
    others = ("dpo.", "train.learning_rate", "train.epochs") if phase == SFT else ()
    return Origin(
        {n: v for n, v in inputs.items() if not n.startswith((*judging, *others))},
        {n: v for n, v in inputs.items() if n.startswith(judging)},
    )
