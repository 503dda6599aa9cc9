"""Bad input through the numbered scripts: one clear line, exit code not 0, nothing lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import runs
import tiny
import yaml
from conftest import REPOSITORY
from dpo_mlx import config
from dpo_mlx.files import digest, jsonl, ownership
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.ownership import MANIFEST
from dpo_mlx.model.loading import load_model
from dpo_mlx.stages.evaluate import evaluate
from dpo_mlx.stages.fuse_adapters import fuse_adapters
from dpo_mlx.stages.make_pairs import make_pairs
from dpo_mlx.stages.train_dpo import train_dpo
from runs import IN_FOLDER, exit_code

CONFIG = Path("c.yaml")
SCRIPTS = {path.name[:2]: path for path in (REPOSITORY / "scripts").glob("phase*/*.py")}

SETTINGS: dict[str, Any] = {
    **IN_FOLDER,
    "generation": {"max_tokens": 8, "batch_size": 16},
    "train": {"learning_rate": 1e-3, "grad_accumulation": 4, "eval_every": 9},
    "smoke": {"questions": 2, "unrelated_tasks": 2},
}


# For stage 06 with another model, which must not touch what an earlier one sampled.
NEW_PAIRS = ("--set", "data.train_pairs=new/train.jsonl", "--set", "data.valid_pairs=new/v.jsonl")


@pytest.fixture(scope="module")
def finished(granite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its source and a whole run; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"question": f"Why is {i}?", "answer": f"**So.** It is {i}."} for i in range(16)]
    (folder / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / CONFIG).write_text(yaml.safe_dump({**SETTINGS, "model": str(granite)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        loaded = config.load(CONFIG)
        make_pairs(loaded)
        train_dpo(loaded, "all")
        fuse_adapters(loaded)
        evaluate(loaded)
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, which is the current folder."""
    folder = tmp_path / "work"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Of every file but the locks, which are empty again when nobody holds them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): digest.of_file(path) for path in files if not path.name.endswith(".lock")}


@dataclass(frozen=True)
class Case:
    """What is damaged, which script is called how, and what its one line must hold."""

    script: str
    says: tuple[str, ...]
    damage: Callable[[], object] = lambda: None
    more: tuple[str, ...] = ()


def setting(override: str, *says: str, script: str = "10", more: tuple[str, ...] = ()) -> Case:
    return Case(script, says, more=("--set", override, *more))


def file(path: str, content: bytes | None, *says: str, script: str = "10") -> Case:
    """A file with other content; None takes it away."""

    def damage() -> None:
        Path(path).unlink()
        if content is not None:
            Path(path).write_bytes(content)

    return Case(script, (path, *says), damage)


def directory(path: str, *says: str, script: str = "10") -> Case:
    def damage() -> None:
        Path(path).unlink()
        Path(path).mkdir()

    return Case(script, (path, *says), damage)


def replaced(path: str, make: Callable[[Path], object], *says: str, script: str) -> Case:
    """Something else under a file's name."""

    def damage() -> None:
        Path(path).unlink()
        make(Path(path))

    return Case(script, (path, *says), damage)


def removed(folder: str, script: str, *says: str, more: tuple[str, ...] = ()) -> Case:
    return Case(script, says, lambda: shutil.rmtree(folder), more)


def model(change: Callable[[Path], object], *says: str, script: str = "10") -> Case:
    """Another model folder, changed after it was made."""
    more = ("--set", "model=other", *(NEW_PAIRS if script == "06" else ()))
    return Case(script, says, lambda: change(tiny.folder(Path("other"))), more)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def third_line(line: bytes) -> bytes:
    good = b'{"question": "q", "answer": "a"}\n'
    return good + good + line + b"\n" + good


def source(line: bytes, says: str) -> Case:
    return file("source.jsonl", third_line(line), "source.jsonl:3: ", says, script="06")


def pair(says: str, **changes: Any) -> Case:
    """A train pair on line 2 with other fields; None takes one away."""
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "rejected_finish": "stop"}
    bad = {key: value for key, value in {**row, **changes}.items() if value is not None}
    content = f"{json.dumps(row)}\n{json.dumps(bad)}\n".encode()
    return file("run/pairs/train.jsonl", content, "train.jsonl:2: ", says)


def other_adapters(hidden_size: int, rank: int) -> None:
    """Adapters as another model or another rank would have them, with the settings as they were."""
    path = "run/adapters/adapters.safetensors"
    mx.save_safetensors(
        path,
        {
            name: mx.zeros([{64: hidden_size, 4: rank}.get(n, n) for n in value.shape])
            for name, value in mx.load(path).items()  # type: ignore[union-attr]
        },
    )


def other_weights(folder: Path) -> None:
    """The same shapes with other values, as another model's would be."""
    path = str(folder / "model.safetensors")
    mx.save_safetensors(path, {n: t + 1 for n, t in mx.load(path).items()})  # type: ignore[union-attr]


def checkpoint(damage: Callable[[Path], object], *says: str, more: tuple[str, ...] = ()) -> Case:
    """The newest checkpoint of a run that did not come to its end."""

    def unfinished() -> None:
        Path("run/stamps/10_train_dpo.json").unlink()
        damage(Path(NEWEST))

    return Case("10", (NEWEST, *says), unfinished, more)


def lacking(path: str, key: str, script: str) -> Case:
    """JSON that another version wrote, or a first row of it, without a key."""

    def damage() -> None:
        first, end, rest = Path(path).read_text().partition("\n" if path.endswith("l") else "\0")
        values = {k: v for k, v in json.loads(first).items() if k != key}
        ownership.write(Path(path), (json.dumps(values) + end + rest).encode())

    return Case(script, (path, f'lacks "{key}"'), damage)


def forged(path: str, script: str, says: str, **changes: Any) -> Case:
    """A file of ours that says something else, or in its first row, with a manifest to match."""

    def damage() -> None:
        first, end, rest = Path(path).read_text().partition("\n" if path.endswith("l") else "\0")
        values = json.dumps({**json.loads(first), **changes})
        ownership.write(Path(path), (values + end + rest).encode())

    return Case(script, (path, says), damage)


TRAIN, VALID, ADAPTERS = "run/pairs/train.jsonl", "run/pairs/valid.jsonl", "run/adapters"
NEWEST, SAMPLES = "run/checkpoints/dpo-000004", "run/pairs/train.samples.jsonl"
REFERENCE = "run/reference/base/train.jsonl"
AGAIN = ("--set", "train.epochs=2")  # so that stage 10 is not skipped
GOOD_PAIR = b'{"prompt": "q", "chosen": "c", "rejected": "r"}\n'
LONG_PAIR = b'{"prompt": "q", "chosen": "' + b"c" * 300 + b'", "rejected": "r"}\n'

CASES: dict[str, Case] = {
    # the config
    "config missing": file("c.yaml", None, "no such file", "--config", script="06"),
    "config is a directory": directory("c.yaml", "is a directory"),
    "config is not YAML": file("c.yaml", b"a: [\n", "cannot be read as YAML: line", script="11"),
    "config empty": file("c.yaml", b"", "found nothing", script="12"),
    "unknown key": setting("train.learning_rat=1", "c.yaml", "mean train.learning_rate?"),
    "mistyped section": setting("trian.epochs=1", "c.yaml", "trian: unknown key"),
    "--set without =": setting("dpo.beta", "c.yaml", "--set dpo.beta: expected section.key=value"),
    "wrong type": setting("lora.rank=big", "lora.rank: expected a whole number", script="06"),
    "out of range": setting("dpo.beta=0", "dpo.beta", "too small", script="12"),
    "required key empty": setting("data.train_pairs=", "data.train_pairs: is missing", script="06"),
    "dropout": setting("lora.dropout=0.1", "lora.dropout", "train.grad_checkpoint"),
    "report_to": setting("report_to=wnadb", "report_to", "'wnadb'", "wandb, swanlab"),
    "run_dir is a file": setting("run_dir=source.jsonl", "source.jsonl"),
    "config is a pipe": replaced("c.yaml", os.mkfifo, "is a pipe", "--config", script="10"),
    "key twice": file("c.yaml", b"seed: 1\nseed: 2\n", "line 2: the key seed is already on line 1"),
    "alias bomb": file("c.yaml", b"a: &a [x, x]\nb: [*a, *a]\n", "line 1: anchors"),
    "number without end": setting(f"lora.rank=0x{'f' * 9999}", "the number has 10001 characters"),
    "scale of 1e308": setting("lora.scale=1e308", "lora.scale: 1e+308 is too large", script="11"),
    "run_dir holds the data": setting("run_dir=..", "run_dir: .. contains the folder of --config"),
    "valid pairs are the samples": setting(
        "data.valid_pairs=run/pairs/train.samples.jsonl", "data.valid_pairs", "choose another path"
    ),
    "source is the report": setting(
        "data.source=run/pairs/train.report.json", "data.source", "choose another path", script="06"
    ),
    # the source
    "source is a pipe": replaced("source.jsonl", os.mkfifo, "is a pipe, not a file", script="06"),
    "source never ends": replaced(
        "source.jsonl", lambda p: p.symlink_to("/dev/zero"), "is a device", script="06"
    ),
    "source is UTF-16": file(
        "source.jsonl", '{"q": "a"}'.encode("utf-16"), "UTF-16", "save it as UTF-8", script="06"
    ),
    "source is another table": file(
        "source.jsonl", b"title,body\nq,a\n", "a table (CSV)", script="06"
    ),
    "source missing": file("source.jsonl", None, "no such file", "data.source", script="06"),
    "source is a directory": directory("source.jsonl", "data.source", script="06"),
    "source empty": file("source.jsonl", b"\n", "is empty", "data.source", script="06"),
    "broken JSON": source(b'{"question": "q", "ans', "broken JSON at column"),
    "missing field": source(b'{"question": "q"}', '"answer" is missing'),
    "field of wrong type": source(b'{"question": "q", "answer": 4}', "must be text, found int"),
    "answer empty": source(b'{"question": "q", "answer": " "}', '"answer" is empty'),
    "unknown format": source(b'{"q": "q", "a": "a"}', "none of the accepted formats"),
    "invalid UTF-8": source(b'{"question": "q", "answer": "\xe9"}', "not UTF-8"),
    "half a character": source(b'{"question": "q", "answer": "\\ud83d"}', "surrogate"),
    "all too long": setting(
        "data.max_length=8", "source.jsonl", "data.max_length = 8", script="06"
    ),
    "other sampling": setting(
        "generation.temperature=1", "generation.temperature: 0.7 -> 1", script="06"
    ),
    "pairs edited": Case(
        "06",
        (VALID, "has changed since", "generation.restart=true"),
        lambda: Path(VALID).write_bytes(GOOD_PAIR),
        ("--limit", "12"),
    ),
    # the model
    "no such model": setting("model=./absent", "./absent: no such folder"),
    "no such model for 11": setting("model=absent", "model absent: is not on this", script="11"),
    "no such model for 12": setting("model=absent", "model absent: no such folder", script="12"),
    "another model": Case(
        "06",
        ("model files", "generation.restart"),
        lambda: other_weights(tiny.folder(Path("other"))),
        ("--set", "model=other"),
    ),
    "no weights": model(lambda f: (f / "model.safetensors").unlink(), "other: contains no weights"),
    "torn weights": model(
        lambda f: os.truncate(f / "model.safetensors", 5000),
        "other/model.safetensors: is cut short",
    ),
    "no config.json": model(lambda f: (f / "config.json").unlink(), "other/config.json"),
    "unknown architecture": model(
        lambda f: edit(f / "config.json", model_type="nosuch"), "model other", "nosuch", script="06"
    ),
    "no chat template": model(
        lambda f: edit(f / "tokenizer_config.json", chat_template=None),
        "no chat template",
        "instruct",
        script="06",
    ),
    # the pairs
    "train pairs missing": file(TRAIN, None, "no such file", "06_generate_dpo_pairs.py"),
    "valid pairs missing": file(VALID, None, "no such file", "06_generate_dpo_pairs.py"),
    "valid pairs missing for 11": file(VALID, None, script="11"),
    "pairs are a pipe": replaced(TRAIN, os.mkfifo, "is a pipe, not a file", script="10"),
    "pairs are a pipe for 06": replaced(TRAIN, os.mkfifo, "is a pipe", script="06"),
    "valid pairs are a pipe for 11": replaced(VALID, os.mkfifo, "is a pipe", script="11"),
    "valid pairs are a pipe for 12": replaced(VALID, os.mkfifo, "is a pipe", script="12"),
    "samples are a pipe": replaced(SAMPLES, os.mkfifo, "is a pipe", script="06"),
    "metrics are a pipe": replaced("run/metrics.jsonl", os.mkfifo, "is a pipe", script="10"),
    "one file for both splits": Case(
        "10",
        (VALID, "questions are also in run/pairs/train.jsonl", "data.valid_pairs"),
        lambda: shutil.copy(TRAIN, VALID),
    ),
    "pairs are a directory": directory(TRAIN, "is a directory"),
    "pairs empty": file(TRAIN, b"", "is empty", "06_generate_dpo_pairs.py"),
    "no valid pairs": file(VALID, b"", "is empty", "06_generate_dpo_pairs.py"),
    "pairs broken": file(TRAIN, GOOD_PAIR + b"{", "train.jsonl:2: broken JSON"),
    "no rejected": pair('"rejected"', rejected=None),
    "rejected is no text": pair('"rejected"', rejected=["r"]),
    "chosen empty": pair('"chosen"', chosen=" "),
    "rejected_finish": pair('"rejected_finish" must be "stop" or "length"', rejected_finish="eos"),
    "too few pairs": setting(
        "train.grad_accumulation=99", TRAIN, "but one update takes 99 (train.batch_size x"
    ),
    "all train pairs too long": setting(
        "data.max_length=8", TRAIN, "0 pairs, but one update takes"
    ),
    "all valid pairs too long": file(VALID, LONG_PAIR, "every pair is longer", "data.max_length"),
    "all valid pairs too long for 11": setting(
        "data.max_length=8", VALID, "every pair is longer", "data.max_length", script="11"
    ),
    "all valid pairs too long for 12": setting(
        "data.max_length=8", VALID, "every pair is longer", "data.max_length", script="12"
    ),
    # training
    "no reference": removed(
        "run/reference",
        "10",
        "run/reference/base: no complete reference",
        "--only reference",
        more=("--only", "dpo", "--set", "train.epochs=2"),
    ),
    "stale reference": setting(
        "data.max_length=255", "run/reference", "--only reference", more=("--only", "dpo")
    ),
    "lora.keys names nothing": setting("lora.keys=[q_porj]", "lora.keys", "q_porj"),
    "one of lora.keys names nothing": setting(
        "lora.keys=[self_attn.q_proj, q_porj]", "lora.keys", "q_porj"
    ),
    "lora.keys names no linear layer": setting("lora.keys=[input_layernorm]", "lora.keys"),
    "lora.keys names the embedding": setting("lora.keys=[model.embed_tokens]", "lora.keys"),
    # fusing and after
    "no adapters": removed(ADAPTERS, "11", ADAPTERS, "run 10_train_dpo.py first"),
    "adapters of another rank": Case(
        "11", (ADAPTERS, "has changed since", "move"), lambda: other_adapters(64, 8)
    ),
    "adapters of another width": Case(
        "11", (ADAPTERS, "has changed since", "move"), lambda: other_adapters(32, 4)
    ),
    "adapters torn": Case(
        "11", (ADAPTERS,), lambda: os.truncate(f"{ADAPTERS}/adapters.safetensors", 999)
    ),
    "adapters' settings missing": replace(
        file(f"{ADAPTERS}/adapter_config.json", None, "does not fit model", script="11"),
        more=("--set", "fuse.check_pairs=2"),
    ),
    "not fused": removed("run/fused", "12", "run/fused: no fused model", "11_fuse_adapters.py"),
    "never fused": replace(
        file("run/fuse.json", None, script="12"), says=("run/fused: no fused model there",)
    ),
    "no metrics": file("run/metrics.jsonl", None, script="12"),
    # what stages wrote, damaged or of another version
    "samples broken": replace(
        file(SAMPLES, b"{}}\n", "samples.jsonl: has changed since", "move it", script="06"),
        more=("--limit", "12"),
    ),
    "samples of another version": replace(
        lacking(SAMPLES, "questions", "06"), more=("--limit", "12")
    ),
    "samples are not ours": Case(
        "06",
        ("train.samples.inputs.json: no such file", "train.samples.jsonl"),
        lambda: Path("run/pairs/train.samples.inputs.json").unlink(),
        ("--limit", "12"),
    ),
    "pairs are not ours": Case(
        "06",
        ("train.jsonl", "was not made by this pipeline"),
        lambda: Path("run/pairs", MANIFEST).unlink(),
        ("--set", "generation.restart=true"),
    ),
    "reference broken": replace(file(REFERENCE, b"[]\n", ":1: ", "move run/reference"), more=AGAIN),
    "reference of another version": replace(lacking(REFERENCE, "chosen", "10"), more=AGAIN),
    "outcome broken": file("run/outcome.json", b"{", "has changed since", "move it away"),
    "outcome of another version": lacking("run/outcome.json", "stopped", "10"),
    "fuse.json of another version": replace(
        lacking("run/fuse.json", "margin_kept", "12"), more=("--set", "smoke.questions=1")
    ),
    "report.json broken": file("run/report.json", b"{", "has changed since", script="12"),
    "report.json of another version": lacking("run/report.json", "verdict", "12"),
    "metrics broken": replace(
        file("run/metrics.jsonl", b"{\n", "has changed since", script="12"),
        more=("--set", "smoke.questions=1"),
    ),
    "metrics as text": replace(
        forged("run/metrics.jsonl", "12", '"eval_loss" must be a number', eval_loss="x"),
        more=("--set", "smoke.questions=1"),
    ),
    "fewer answers than questions": replace(
        forged(SAMPLES, "06", " 0 answers to ", answers=[]), more=("--limit", "12")
    ),
    "an answer that ended otherwise": replace(
        forged(
            SAMPLES,
            "06",
            '"answers[0].finish" is not one of stop, length',
            answers=[{"text": "x", "finish": "eos", "tokens": 1}],
        ),
        more=("--limit", "12"),
    ),
    "samples of settings with control characters": replace(
        forged(
            "run/pairs/train.samples.inputs.json",
            "06",
            "x\\n\\x1b: 1 -> None",
            **{"x\n\x1b": 1},
        ),
        says=("x\\n\\x1b: 1 -> None",),
        more=("--limit", "12"),
    ),
    "no record of what was kept": forged(
        "run/outcome.json", "10", 'lacks "kept.measures"', kept={"update": 1}
    ),
    "the base model is gone": replace(
        model(lambda f: shutil.rmtree(f), "model other: is not on this machine", script="13")
    ),
    "checkpoint torn": checkpoint(
        lambda f: os.truncate(f / "optimizer.safetensors", 999),
        "optimizer.safetensors: is cut short",
    ),
    "checkpoint's adapters torn": checkpoint(
        lambda f: os.truncate(f / "adapters.safetensors", 999), "adapters.safetensors: is cut short"
    ),
    "checkpoint's state broken": checkpoint(
        lambda f: (f / "state.json").write_text("{"),
        "state.json: broken JSON",
        "the checkpoint before it",
    ),
    "checkpoint of another version": checkpoint(
        lambda f: edit(f / "state.json", version=0),
        "another version (0",
        "continue with that version",
    ),
    "checkpoint of other settings": checkpoint(
        lambda f: None, "dpo.beta: 0.1 -> 0.2", "train.restart", more=("--set", "dpo.beta=0.2")
    ),
    "checkpoint of another model": checkpoint(
        lambda f: other_weights(tiny.folder(Path("other"))),
        "model files",
        "train.restart",
        more=("--set", "model=other"),
    ),
    "checkpoint of other pairs": checkpoint(
        lambda f: runs.write_pairs(Path(TRAIN), 9), "pairs", "train.restart"
    ),
    "adapters of another model": model(
        other_weights, ADAPTERS, "were trained on another version of other", script="11"
    ),
    "adapters' settings of another version": Case(
        "11",
        (ADAPTERS, "has changed since"),
        lambda: Path(f"{ADAPTERS}/adapter_config.json").write_text("{}"),
        ("--set", "fuse.check_pairs=2"),
    ),
    "fused torn": Case(
        "12",
        ("run/fused/model.safetensors: is cut short", "run the stage that writes it again"),
        lambda: os.truncate("run/fused/model.safetensors", 999),
    ),
    "config.json broken": model(
        lambda f: (f / "config.json").write_text("{"), "other/config.json: broken JSON", script="06"
    ),
    "config.json a list": model(
        lambda f: (f / "config.json").write_text("[]"), "other/config.json: expected", script="06"
    ),
    "tokenizer.json broken": model(
        lambda f: (f / "tokenizer.json").write_text("{"), "model other", script="06"
    ),
    # what a config may not do
    "model with code of its own": model(
        lambda f: edit(f / "config.json", model_file="evil.py"),
        "model other",
        "needs the Python code",
    ),
    "run_dir holds someone else's": Case(
        "10",
        ("home: no .made_by_dpo_mlx lists config.yaml", "run_dir"),
        lambda: shutil.copytree("run", "home", ignore=shutil.ignore_patterns(MANIFEST)),
        ("--set", "run_dir=home"),
    ),
    "adapters are someone else's": Case(
        "10",
        (ADAPTERS, "was not made by this pipeline"),
        lambda: Path(ADAPTERS, MANIFEST).unlink(),
        AGAIN,
    ),
    "fused is someone else's": Case(
        "11",
        ("run/fused", "was not made by this pipeline"),
        lambda: Path("run/fused", MANIFEST).unlink(),
        ("--set", "fuse.check_pairs=2"),
    ),
    "model is what the run makes": setting("model=run/fused", "model: run/fused", "run_dir"),
    "source is what the run makes": setting(
        "data.source=run/metrics.jsonl", "data.source: run/metrics.jsonl", script="06"
    ),
}


def error_lines(stderr: str) -> list[str]:
    """What stderr says, but for progress bars and the note that there is no OpenBLAS."""
    others = ("note: running without", "10 reference (")
    return [line for line in stderr.splitlines() if line and not line.startswith(others)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_loses_nothing(name, work, capfd):
    """The script fails with one line that names the culprit, and every file is as it was."""
    case = CASES[name]
    case.damage()
    before = digests(work)
    assert exit_code(CONFIG, *case.more, script=SCRIPTS[case.script]) == 1
    [line] = error_lines(capfd.readouterr().err)
    assert line.startswith("error: ")
    for word in case.says:
        assert word in line
    assert digests(work) == before


def run(*more: str, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS[script]), "--config", str(CONFIG), *more],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_all_faults_of_a_config_are_lines_of_their_own(work):
    """As a process: three mistakes, three lines, exit code 1, no traceback."""
    before = digests(work)
    done = run("--set", "lora.alpha=1", "--set", "seed", "--set", "dpo.beta=x", script="06")
    lines = error_lines(done.stderr)
    assert (done.returncode, done.stdout, len(lines)) == (1, "", 3)
    assert all(line.startswith("error: c.yaml: ") for line in lines)
    assert digests(work) == before


def test_library_that_logs_adds_no_line(work):
    """As a process: mlx-lm and transformers print nothing of their own beside the line."""
    shutil.copytree(Path(yaml.safe_load(CONFIG.read_text())["model"]), "other")
    edit(Path("other/config.json"), model_type="nosuch")
    done = run("--set", "model=other", script="10")
    [line] = error_lines(done.stderr)
    assert done.returncode == 1
    assert line.startswith("error: model other: ") and "nosuch" in line


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=str
)
def test_hub_without_network_names_three_ways_on(environment, work):
    """Offline by choice or by a refused connection: download elsewhere, log in, or the demo."""
    before = digests(work)
    done = run("--set", "model=nobody/nothing", script="10", HF_HOME=str(work), **environment)
    [line] = error_lines(done.stderr)
    assert done.returncode == 1
    for word in ("model nobody/nothing", "set model to ", "log in", "smollm2-135m_demo"):
        assert word in line
    assert digests(work).items() >= before.items()


def test_reporter_that_is_not_installed_keeps_the_metrics(work, monkeypatch, capfd):
    """It is found before the earlier run's metrics are written over."""
    monkeypatch.setattr("mlx_lm.tuner.callbacks.wandb", None)
    before = digests(work)
    # What is reported is no part of what determines the adapters: ask for another run.
    assert exit_code(CONFIG, "--set", "report_to=wandb", "--set", "train.epochs=2") == 1
    assert "error: report_to: " in capfd.readouterr().err
    changed = {path for path, digest in digests(work).items() if before.get(path) != digest}
    assert changed <= {str(work / "run/config.yaml"), str(work / "run" / MANIFEST)}


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk is full; free some space"),
        (errno.EROFS, "Read-only file system; make it writable"),
        (errno.EACCES, "Permission denied; make it writable"),
        (errno.ENOENT, "No such file or directory; put back the file or the disk that was moved"),
        (errno.EIO, "Input/output error; put back"),
    ],
)
def test_a_fault_of_the_disk_is_one_line(number, says, work, monkeypatch, capfd):
    """Training cannot add to metrics.jsonl: one line names it with the remedy, and every file that
    was finished before is whole.
    """

    def fails(path: Path, rows: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    before = digests(work)
    monkeypatch.setattr(jsonl, "append", fails)
    assert exit_code(CONFIG, *AGAIN) == 1
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: run/metrics.jsonl: ") and says in line
    kept = ("adapters", "fused", "pairs", "reference", "report", "fuse.json", "outcome.json")
    finished = {p for p in before if p.startswith(tuple(f"{work}/run/{name}" for name in kept))}
    after = digests(work)
    assert finished and {p: after.get(p) for p in finished} == {p: before[p] for p in finished}


def test_code_that_comes_with_a_model_is_never_run(tmp_path, monkeypatch):
    """A tokenizer that names a Python file of its own is read without it, or refused; nobody is
    asked, and the file is not run.
    """
    folder, ran = tiny.folder(tmp_path / "model"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    for name in ("tokenizer_config.json", "config.json"):
        edit(folder / name, auto_map=auto_map)
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil")
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    with contextlib.suppress(UserError):
        load_model(str(folder))
    assert not ran.exists()
