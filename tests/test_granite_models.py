"""The layouts of Granite's models: each trains, fuses and exports like the first one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
import tiny
from dpo_mlx import config as configs
from dpo_mlx.config import Config, LoraConfig
from dpo_mlx.export import llama_cpp
from dpo_mlx.files import jsonl, model_files
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.results import Measures
from dpo_mlx.model import fusing, scan
from dpo_mlx.model.adapters import LORA_LAYERS, attach_lora
from dpo_mlx.model.loading import load_model
from dpo_mlx.model.rounding import NEAREST
from dpo_mlx.model.saving import save_model_folder
from dpo_mlx.scoring.log_probs import check_head, find_head, token_log_probs
from dpo_mlx.stages.evaluate import evaluate
from dpo_mlx.stages.export import export_model, export_peft
from dpo_mlx.stages.fuse_adapters import fuse_adapters
from dpo_mlx.stages.make_pairs import make_pairs
from dpo_mlx.stages.train_dpo import train_dpo
from dpo_mlx.voice.answers import AnswerEvaluator
from mlx.utils import tree_flatten
from mlx_lm.models.granitemoehybrid import GraniteMoeHybridMamba2Mixer
from runs import NO_LIMITS, crossed_limits_of, with_means

ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MAMBA = ["mamba.in_proj", "mamba.out_proj"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
# By model: the changes to a tiny one, and the kind of each of its blocks.
LAYOUTS: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "4.0-h-micro and 1b": ({}, [MAMBA, ATTENTION, MAMBA]),
    "4.0-h-350m": (tiny.NANO, [MAMBA, MAMBA, ATTENTION, MAMBA, ATTENTION]),
    "4.0 without Mamba": (
        {"layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
        [ATTENTION] * 3,
    ),
    "4.1 and 4.2": ({"kind": "dense", "logits_scaling": 10.0}, [ATTENTION] * 3),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, list[list[str]]]:
    """A folder for each layout, and the mixers of its blocks."""
    changes, blocks = LAYOUTS[request.param]
    return tiny.folder(tmp_path_factory.mktemp("models") / "m", **changes), blocks


def test_the_head_is_known(layout):
    """Embedding and logits are scaled, and the head is the embedding; log-probs match the model's
    own logits.
    """
    model = load_model(str(layout[0])).model
    backbone, head = find_head(model)
    check_head(model, backbone, head)
    assert head.scale == 1 / model.args.logits_scaling != 1
    ids = mx.arange(5, 25)
    own = nn.log_softmax(model(ids[None])[0, :-1], axis=-1)
    expected = mx.take_along_axis(own, ids[1:, None], axis=1)[:, 0]
    found = token_log_probs(backbone(ids[None])[0, :-1], ids[1:], head)
    assert mx.allclose(found, expected, rtol=0, atol=1e-4)


def test_every_linear_layer_of_every_block_is_adapted(layout):
    """Without lora.keys and lora.num_layers, every linear layer gets an adapter and nothing else
    does.
    """
    folder, blocks = layout
    model = load_model(str(folder)).model
    attach_lora(model, LoraConfig())
    adapted = {name for name, module in model.named_modules() if isinstance(module, LORA_LAYERS)}
    expected = {
        f"model.layers.{number}.{name}"
        for number, mixer in enumerate(blocks)
        for name in [*mixer, *MLP]
    }
    assert adapted == expected


def test_only_mamba_blocks_scan_in_chunks(layout):
    """A dense model does not change; a hybrid one keeps its answers."""
    folder, blocks = layout
    model = load_model(str(folder)).model
    ids = mx.arange(5, 45)[None]
    before = model(ids)
    kinds = [type(module) for module in model.modules()]
    scan.use_chunks(model, 8)
    changed = [
        was for was, module in zip(kinds, model.modules(), strict=True) if was is not type(module)
    ]
    assert changed == [GraniteMoeHybridMamba2Mixer] * blocks.count(MAMBA)
    assert mx.allclose(model(ids), before, rtol=0, atol=1e-3)


# transformers 5 -----------------------------------------------------------------------------------


def test_a_dense_config_of_transformers_5_loads(tmp_path):
    """transformers 5 nests `rope_theta`, which mlx-lm's dense Granite reads at the top level."""
    old = tiny.folder(tmp_path / "old", "dense", rope_theta=5000.0)
    new = tiny.folder(tmp_path / "new", "dense", rope_theta=5000.0)
    about = jsonl.read_json(new / "config.json")
    del about["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    (new / "config.json").write_text(json.dumps({**about, "rope_parameters": rope}))
    ids = mx.arange(5, 45)[None]
    expected, found = (load_model(str(folder)).model(ids) for folder in (old, new))
    assert mx.array_equal(found, expected)
    # What is saved runs in mlx-lm alone.
    save_model_folder(load_model(str(new)).model, new, tmp_path / "saved")
    model, *_ = mlx_lm.load(str(tmp_path / "saved"))
    assert mx.array_equal(model(ids), expected)


def test_other_rotary_positions_are_not_guessed(tmp_path):
    """Theta alone does not describe scaled positions, so loading fails as it does in mlx-lm."""
    folder = tiny.folder(tmp_path / "m", "dense")
    about = jsonl.read_json(folder / "config.json")
    del about["rope_theta"]
    rope = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps({**about, "rope_parameters": rope}))
    assert model_files.config_additions(folder) == {}
    with pytest.raises(UserError, match="cannot be loaded: .*rope_theta"):
        load_model(str(folder))


def test_a_dense_base_of_mixed_bits_is_put_together(tmp_path):
    """mlx-lm keeps two layers of each dense block in 8 bits when it quantises to 4. Such a model
    can be loaded, adapted and fused, and answers as before.
    """
    folder = tiny.folder(tmp_path / "m", "dense")
    loaded = load_model(str(folder))
    about = fusing.quantize(loaded.model, jsonl.read_json(folder / "config.json"), 4)
    save_model_folder(loaded.model, folder, tmp_path / "4-bit", about)
    model = load_model(str(tmp_path / "4-bit")).model
    bits = {name: m.bits for name, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}
    assert {*bits.values()} == {4, 8} and len(bits) == 3 * len(ATTENTION + MLP)
    ids = mx.arange(5, 45)[None]
    expected = model(ids)
    attach_lora(model, LoraConfig(rank=4))
    fusing.fuse(model, NEAREST, mx.float32)
    assert not fusing.is_quantized(model)
    assert mx.allclose(model(ids), expected, rtol=0, atol=1e-3)


# The whole chain ----------------------------------------------------------------------------------

OFF = "chat_template_args.enable_thinking=false"
CHAINS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "4.0-h-350m": ({**tiny.NANO, "template": tiny.GRANITE_4_TEMPLATE, "vocab_size": 264}, []),
    "4.1": ({"kind": "dense", "template": tiny.GRANITE_4_TEMPLATE}, []),
    "4.2": ({"kind": "thinking"}, [OFF]),
}
# They decide how a question is rendered.
PROMPT_KEYS = ("system_prompt", "chat_template_args.")
ANYTHING_PASSES = {
    "questions": 2,
    **NO_LIMITS,
}


class Improving(AnswerEvaluator):
    """An evaluator that reports real answers and a voice that improves, so that the last adapters
    are kept although the model is too random to learn a voice.
    """

    evaluations = 0

    def __call__(self) -> Measures:
        self.evaluations += 1
        return with_means(super().__call__(), voice=self.evaluations / 10)


@pytest.fixture(params=CHAINS)
def chain(
    request: pytest.FixtureRequest,
    settings: dict[str, Any],
    write_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Config:
    """A run of all stages and exports, with both phases of the recipe."""
    monkeypatch.setattr("dpo_mlx.training.phases.AnswerEvaluator", Improving)
    changes, overrides = CHAINS[request.param]
    settings |= {
        "model": str(tiny.folder(tmp_path / "m", **changes)),
        "sft": {"epochs": 1, "learning_rate": 1e-3},
        "dpo": {},
        "train": {"learning_rate": 1e-3, "eval_questions": 2, "force": True},
        "guard": {"enabled": False},
        "smoke": ANYTHING_PASSES,
        "data": {**settings["data"], "limit": 18},
    }
    run = configs.load(write_config(settings), overrides)
    make_pairs(run)
    train_dpo(run)
    fuse_adapters(run)
    evaluate(run)
    assert crossed_limits_of(run) == []
    export_model(run)
    export_peft(run)
    return run


def test_the_chain_runs(chain):
    """DPO starts at ln 2, fusing keeps the margin, only the tokenizer stops llama.cpp, and every
    stage's fingerprint includes the settings that decide the prompt.
    """
    rows = jsonl.read_whole_lines(chain.run.path / "metrics.jsonl")
    first = next(row for row in rows if row["phase"] == "dpo")
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    fuse = jsonl.read_json(chain.run.path / "fuse.json")
    assert fuse["margin_kept"] == pytest.approx(1, abs=0.01)
    # All layers were trained and fused.
    base = load_model(chain.model).model
    fused = load_model(str(chain.run.path / "fused")).model
    assert moved(base, fused) == linear_layers(base)
    assert llama_cpp.faults(chain.run.path / "hf") == [
        "tokenizer.json: must be a BPE tokenizer with merges"
    ]
    template = json.loads((Path(chain.model) / "tokenizer_config.json").read_text())[
        "chat_template"
    ]
    exported = json.loads((chain.run.path / "hf" / "tokenizer_config.json").read_text())
    assert exported["chat_template"] == template
    prints = [*fingerprints(chain.run.path)]
    assert len(prints) > 8
    prompt = {key: value for key, value in chain.flat.items() if key.startswith(PROMPT_KEYS)}
    assert prompt and all(prompt.items() <= each.items() for each in prints)
    card = (chain.run.path / "hf/README.md").read_text()
    assert ("trained with these arguments" in card) == bool(chain.chat_template_args)


def moved(base: nn.Module, fused: nn.Module) -> set[str]:
    """Names of the parameters that differ."""
    after = dict(tree_flatten(fused.parameters()))
    before = dict(tree_flatten(base.parameters()))
    return {name for name in before if not mx.array_equal(before[name], after[name])}


def linear_layers(model: nn.Module) -> set[str]:
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def fingerprints(folder: Path) -> Iterator[dict[str, Any]]:
    """The prompt settings that each stage of a run recorded."""
    for path in folder.rglob("*.json"):
        yield from _with_system_prompt(json.loads(path.read_text()))


def _with_system_prompt(value: Any) -> Iterator[dict[str, Any]]:
    """The mappings inside a value that have a system_prompt, except whole configs."""
    if isinstance(value, dict):
        if "system_prompt" in value and "run_dir" not in value:
            yield value
        for inner in value.values():
            yield from _with_system_prompt(inner)
