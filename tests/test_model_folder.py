"""A model folder is checked before anything loads it: every fault is one line, and none hangs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from dpo_mlx.data import tokens
from dpo_mlx.data.encoding import Encoder
from dpo_mlx.files import digest, model_files, model_folder, weights_file
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.ownership import MANIFEST
from dpo_mlx.model.adapters import attach_lora, save_adapters
from dpo_mlx.model.loading import load_model
from dpo_mlx.model.saving import INDEX, copy_model_files, save_model_folder
from dpo_mlx.model.tensors import load_tensors
from test_pairs import edit

WEIGHTS = "model.safetensors"
Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A hang is a failure: each test has 20 seconds."""

    def fail(*_: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(granite: Path, tmp_path: Path) -> Path:
    """A copy of a model to be damaged."""
    return Path(shutil.copytree(granite, tmp_path / "m"))


def one_line(call: Callable[[], object]) -> str:
    """What a fault says, which is one line of a bounded length."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


def encoder(folder: Path) -> Encoder:
    return Encoder(load_model(str(folder)).tokenizer)


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def directory(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def text(name: str, content: str | bytes) -> Damage:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def sized(name: str, size: int) -> Damage:
    """A file of that size, which takes no place on the disk."""

    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Another header of the weights, over the same data."""

    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        about = json.loads(raw[8 : 8 + length])
        change(about)
        written = json.dumps(about).encode()
        data = raw[8 + length :]
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(written)) + written + data)

    return damage


def number(**changes: Any) -> Damage:
    return lambda folder: edit(folder / "config.json", **changes)


def tokenizer(**changes: Any) -> Damage:
    return lambda folder: edit(folder / "tokenizer_config.json", **changes)


def weights(change: Callable[[mx.array], mx.array], dtype: Any = None) -> Damage:
    """The last tensor by name, changed."""

    def damage(folder: Path) -> None:
        tensors: Any = mx.load(str(folder / WEIGHTS))
        tensors = {name: t.astype(dtype) if dtype else t for name, t in tensors.items()}
        tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
        mx.save_safetensors(str(folder / "new.safetensors"), tensors)
        (folder / "new.safetensors").rename(folder / WEIGHTS)

    return damage


def parts(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")


EMBEDDING = "model.embed_tokens.weight"
# Case -> (what is damaged, words of the line).
FAULTS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    # types and numbers that MLX cannot compute with
    "weights are integers": (
        weights(lambda t: t, mx.int8),
        (WEIGHTS, "has the type I8", "set model"),
    ),
    "weights are complex": (weights(lambda t: t, mx.complex64), (WEIGHTS, "the type C64")),
    # files
    "weights are a pipe": (pipe(WEIGHTS), (WEIGHTS, "is a pipe or a device")),
    "config is a pipe": (pipe("config.json"), ("config.json", "is a pipe or a device")),
    "tokenizer is a pipe": (pipe("tokenizer.json"), ("tokenizer.json", "pipe")),
    "template is a pipe": (pipe("chat_template.jinja"), ("chat_template.jinja", "pipe")),
    "another settings file is a pipe": (pipe("spiece_2.model"), ("spiece_2.model", "pipe")),
    "weights are a device": (link(WEIGHTS, "/dev/zero"), (WEIGHTS, "pipe or a device")),
    "config is a device": (link("config.json", "/dev/zero"), ("config.json", "device")),
    "config is a directory": (directory("config.json"), ("config.json", "is a directory")),
    "weights are a directory": (directory(WEIGHTS), (WEIGHTS, "is a directory")),
    "a link to nothing": (link("tokenizer.json", "gone"), ("tokenizer.json", "cannot be read")),
    "a link to itself": (link("tokenizer.json", "tokenizer.json"), ("tokenizer.json", "cannot be")),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json: no such file",)),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("contains no weights",)),
    "a part is missing": (parts, ("model-00002-of-00002.safetensors: no such file",)),
    # sizes and form
    "config too large": (sized("config.json", 2**26), ("config.json", "the limit is")),
    "tokenizer too large": (sized("tokenizer.json", 2**33), ("tokenizer.json", "the limit is")),
    "template too large": (
        sized("chat_template.jinja", 2**33),
        ("chat_template.jinja", "the limit is"),
    ),
    "config empty": (text("config.json", ""), ("config.json: broken JSON",)),
    "config no UTF-8": (text("config.json", b"\xff{}"), ("config.json: not UTF-8",)),
    "config a list": (text("config.json", "[]"), ("config.json: expected a JSON object",)),
    "config a number": (text("config.json", "1" * 5000), ("config.json: broken JSON",)),
    "config nested": (text("config.json", '{"a":' * 500 + "1" + "}" * 500), ("nested more than",)),
    "config nested deep": (text("config.json", "[" * 10**6), ("config.json: broken JSON",)),
    "generation a list": (text("generation_config.json", "[]"), ("generation_config.json: exp",)),
    "template no UTF-8": (
        text("chat_template.jinja", b"\xff"),
        ("chat_template.jinja: not UTF-8",),
    ),
    "tokenizer settings a list": (text("tokenizer_config.json", "[]"), ("expected a JSON object",)),
    "tokenizer broken": (text("tokenizer.json", "{"), ("cannot be loaded",)),
    "tokenizer a list": (text("tokenizer.json", "[]"), ("cannot be loaded",)),
    # weights
    "weights empty": (text(WEIGHTS, ""), (WEIGHTS, "cut short")),
    "weights cut in the header": (lambda f: os.truncate(f / WEIGHTS, 100), ("cut short",)),
    "weights cut": (
        lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1),
        (WEIGHTS, "is cut short", "its tensors end at"),
    ),
    "weights are a pointer": (
        text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        ("is a Git LFS pointer", "git lfs pull"),
    ),
    "header too long": (text(WEIGHTS, b"\xff" * 100), ("cut short, or is not a safetensors",)),
    "header no JSON": (text(WEIGHTS, struct.pack("<Q", 4) + b"nope"), ("header that is not JSON",)),
    "header a list": (text(WEIGHTS, struct.pack("<Q", 2) + b"[]"), ("not a JSON object",)),
    "header without tensors": (text(WEIGHTS, struct.pack("<Q", 2) + b"{}"), ("no weights",)),
    "entry no object": (header(lambda h: h.update(x=1)), ("size for the tensor 'x'",)),
    "shape negative": (header(lambda h: h[EMBEDDING].update(shape=[-1, 2])), (EMBEDDING,)),
    "shape huge": (header(lambda h: h[EMBEDDING].update(shape=[2**40, 0])), (EMBEDDING,)),
    "shape another": (header(lambda h: h[EMBEDDING].update(shape=[260, 65])), (EMBEDDING,)),
    "shape no list": (header(lambda h: h[EMBEDDING].update(shape=5)), (EMBEDDING,)),
    "shape of text": (header(lambda h: h[EMBEDDING].update(shape=["1"])), (EMBEDDING,)),
    "offsets reversed": (header(lambda h: h[EMBEDDING].update(data_offsets=[8, 0])), (EMBEDDING,)),
    "offsets far": (
        header(lambda h: h[EMBEDDING].update(data_offsets=[2**62, 2**62 + 260 * 64 * 4])),
        ("is cut short",),
    ),
    "offsets three": (header(lambda h: h[EMBEDDING].update(data_offsets=[0, 1, 2])), (EMBEDDING,)),
    # numbers in config.json
    **{
        f"{key} {value!r}"[:40]: (number(**{key: value}), ("config.json: " + key, says))
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for value, says in [
            (2**31, "these weights allow at most"),
            (2**40, "these weights allow at most"),
            (10**400, "is about 10^400"),
            (-1, "too small"),
            (3e6, "not a whole number"),
            (True, "not a whole number"),
            ("64", "not a whole number"),
            ({}, "not a whole number"),
        ]
    },
    "layers": (number(num_hidden_layers=3_000_000), ("num_hidden_layers is 3000000, but",)),
    "no layers": (number(num_hidden_layers=0), ("num_hidden_layers", "too small")),
    "no heads": (number(num_attention_heads=0), ("num_attention_heads", "too small")),
    "heads": (number(num_attention_heads=2**40), ("num_attention_heads", "at most")),
    "key heads": (number(num_key_value_heads=[2, 2**40]), ("num_key_value_heads", "at most")),
    "experts": (number(num_local_experts=2**40), ("num_local_experts", "at most")),
    "Mamba heads": (number(mamba_n_heads=2**40), ("mamba_n_heads", "at most")),
    "Mamba convolution": (number(mamba_d_conv=2**31), ("mamba_d_conv", "at most")),
    "text_config": (number(text_config={"hidden_size": 2**40}), ("hidden_size", "at most")),
    "epsilon NaN": (number(rms_norm_eps=float("nan")), ("rms_norm_eps is NaN",)),
    "epsilon text": (number(rms_norm_eps="1e-5"), ("rms_norm_eps", "not a number")),
    "multiplier infinite": (number(embedding_multiplier=float("inf")), ("embedding_multiplier",)),
    "multiplier large": (number(embedding_multiplier=1e308), ("embedding_multiplier is 1e+308",)),
    "multiplier long": (number(embedding_multiplier=2**63), ("embedding_multiplier",)),
    "multiplier null": (number(residual_multiplier=None), ("residual_multiplier is null",)),
    "scaling zero": (number(logits_scaling=0), ("logits_scaling is 0",)),
    # numbers in the weights
    "NaN": (weights(lambda t: t * mx.nan), ("model.norm.weight has a NaN", "damaged")),
    "infinity": (weights(lambda t: -t * mx.inf), ("model.norm.weight has a NaN or an infinity",)),
    "NaN in bfloat16": (weights(lambda t: t * mx.nan, mx.bfloat16), ("model.norm.weight",)),
    "infinity in float16": (weights(lambda t: t * mx.inf, mx.float16), ("model.norm.weight",)),
    # the tokenizer
    "no end": (lambda f: (tokenizer(eos_token=None)(f), number(eos_token_id=None)(f)), ("ends a",)),
    "end beyond": (number(eos_token_id=[0, 10**6]), ("eos_token_id has 1000000",)),
    "end negative": (number(eos_token_id=-5), ("eos_token_id has -5",)),
    "end no number": (number(eos_token_id=[0, "</s>"]), ("eos_token_id",)),
    # the chat template's form
    **{
        f"template {value!r}": (
            tokenizer(chat_template=value),
            ("chat_template is neither a text",),
        )
        for value in (5, True, {"a": 1}, ["x"], [{"name": "default"}], [{"template": "x"}])
    },
    "no default template": (
        tokenizer(chat_template=[{"name": "rag", "template": tiny.GRANITE_TEMPLATE}]),
        ("none of its chat templates (rag) is named default",),
    ),
    "no templates": (tokenizer(chat_template=[]), ("none of its chat templates (an empty list)",)),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_damaged_folder_is_one_line(case, folder):
    """It names the file and what is wrong with it; nothing hangs, and nothing crashes."""
    damage, says = FAULTS[case]
    damage(folder)
    line = one_line(lambda: encoder(folder))
    for words in says:
        assert words in line


def test_a_folder_that_mlx_lm_takes_for_a_pattern(folder, tmp_path):
    """Brackets in the path; the weights are there, and the line says why they are not seen."""
    assert "rename the folder" in one_line(lambda: encoder(folder.rename(tmp_path / "m[1]")))


@pytest.mark.parametrize("kind", ["granite", "dense", "thinking", "llama"])
def test_sound_models_pass(kind, tmp_path):
    """Plain and quantised, in every architecture that is trained here."""
    folder = tiny.folder(tmp_path / "m", kind)
    model_folder.check(folder)
    model_folder.require_finite(folder)
    loaded = load_model(str(folder))
    quantization: Any = {"group_size": 32, "bits": 2}
    nn.quantize(loaded.model, **quantization)
    config = {**json.loads((folder / "config.json").read_text()), "quantization": quantization}
    save_model_folder(loaded.model, folder, tmp_path / "q", config)
    load_model(str(tmp_path / "q"))


def test_what_the_bounds_do_not_touch(folder):
    """A key that is null, unknown or of a list is no fault; nor is a mask of -infinity, which old
    checkpoints keep; nor an index that names other files.
    """
    number(head_dim=None, text_config=None, max_position_embeddings=10**7)(folder)
    number(layer_sizes=2**50, num_experts=[0, 4])(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone"}}')
    model_folder.check(folder)
    path = folder / "extra.safetensors"
    mx.save_safetensors(str(path), {"causal_mask": mx.array([0.0, -mx.inf]), "ids": mx.array([1])})
    weights_file.require_finite(path)


@pytest.mark.parametrize("place", [0, weights_file.CHUNK // 4 - 1, weights_file.CHUNK // 4, -1])
def test_one_nan_among_millions(place, tmp_path):
    """At the edges of the pieces in which a file is read."""
    values = np.zeros(3 * weights_file.CHUNK // 4 + 7, np.float32)
    values[place] = np.nan
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros(5), "w": mx.array(values)})
    with pytest.raises(weights_file.Damaged, match="tensor w has a NaN"):
        weights_file.require_finite(path)
    values[place] = np.finfo(np.float32).max
    mx.save_safetensors(str(path), {"a": mx.zeros(5), "w": mx.array(values)})
    weights_file.require_finite(path)


# The tokenizer -----------------------------------------------------------------------------------


def test_a_vocabulary_larger_than_the_embedding_is_named(folder):
    """MLX reads beyond the embedding without an error. The line has both sizes."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    line = one_line(lambda: load_model(str(folder)))
    assert "its tokenizer gives the token 'zzz' the id 5000" in line and "has 260 rows" in line


def test_an_added_token_without_a_row_counts_only_in_text(folder):
    """Gemma 3 has one; ordinary text loads and encodes, and a text with it is refused."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 260, "content": "<image>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    loaded = Encoder(load_model(str(folder)).tokenizer)
    assert loaded.prompt_ids("Why?")
    assert "its tokenizer gives the token '<image>' the id 260" in one_line(
        lambda: loaded.prompt_ids("An <image>?")
    )


def test_a_panic_of_the_tokenizer_is_a_fault():
    """The tokenizers library panics in Rust: not an Exception. An interrupt stays one."""
    panic = type("PanicException", (BaseException,), {})

    class Broken:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def encode(self, *_: Any, **__: Any) -> list[int]:
            raise self.error

    line = one_line(lambda: tokens.encode(Broken(panic("index\nout of bounds")), "x"))
    assert line.startswith("model: its tokenizer fails (index out of bounds)")
    with pytest.raises(KeyboardInterrupt):
        tokens.encode(Broken(KeyboardInterrupt()), "x")


# Copies and links --------------------------------------------------------------------------------


def test_only_the_model_s_own_files_are_copied(folder, tmp_path):
    """Into fused/ and hf/, which are uploaded: no other file of the user's."""
    ours = (
        "chat_template.jinja",
        "chat_templates/rag.jinja",
        "merges.txt",
        "LICENSE",
        "x.tiktoken",
    )
    others = ("secrets.json", ".env", "notes.txt", "key.model", "chat_templates/a.json", "x.py")
    for name in (*ours, *others):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    loaded = load_model(str(folder))
    save_model_folder(loaded.model, folder, tmp_path / "copy")
    files = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    copied = {path.relative_to(tmp_path / "copy").as_posix() for path in files} - {MANIFEST}
    assert copied == {
        *("config.json", "tokenizer.json", "tokenizer_config.json"),
        *(WEIGHTS, INDEX),
        *ours,
    }
    for name in ours:
        assert (tmp_path / "copy" / name).read_text() == name


def test_a_link_out_of_the_folder_is_refused_early(folder, tmp_path):
    """Its content would be uploaded. The line names the link; no weights are read before."""
    (tmp_path / "secret").write_text("{}")
    for name in ("added_tokens.json", "chat_template.jinja", "tokenizer.json"):
        copy = Path(shutil.copytree(folder, tmp_path / f"copy-{name}"))
        link(name, str(tmp_path / "secret"))(copy)
        for call in (
            lambda copy=copy: model_folder.check(copy),
            lambda copy=copy: load_model(str(copy)),
            lambda copy=copy: copy_model_files(copy, tmp_path, {}),
        ):
            line = one_line(call)
            assert line.startswith(f"{copy / name}: is a link to {tmp_path / 'secret'}")
            assert "replace the link with a copy" in line


def test_links_within_the_folder_and_the_hub_s_are_followed(folder, tmp_path):
    """The hub's cache is one of links, and may itself be reached through one. Weights may lie on
    another disk: they are never copied.
    """
    cache = tmp_path / "disk/models--a--b"
    snapshot = cache / "snapshots/rev"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, cache / "blobs" / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    (tmp_path / "hub").symlink_to(tmp_path / "disk")
    reached = tmp_path / "hub/models--a--b/snapshots/rev"
    encoder(reached)
    assert model_files.fingerprint(str(reached)) == model_files.fingerprint(str(folder))
    (snapshot / "chat_template.jinja").symlink_to(folder / "config.json")
    assert "chat_template.jinja: is a link" in one_line(lambda: model_folder.check(reached))
    (folder / "x.json").write_text("{}")
    link("added_tokens.json", "x.json")(folder)
    (folder / WEIGHTS).rename(tmp_path / "weights")
    link(WEIGHTS, str(tmp_path / "weights"))(folder)
    load_model(str(folder))


# The fingerprint ---------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_content(folder, tmp_path):
    """A copy, a touch and a link change nothing; one byte does, and so do a file more or less."""
    before = model_files.fingerprint(str(folder))
    os.utime(folder / WEIGHTS, (1, 1))
    assert model_files.fingerprint(str(folder)) == before
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    link(WEIGHTS, str(tmp_path / "elsewhere"))(folder)
    (folder / "secrets.json").write_text("not the model's")
    assert model_files.fingerprint(str(folder)) == model_files.fingerprint(str(copy)) == before
    with (copy / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    assert model_files.fingerprint(str(copy)) != before
    (folder / "generation_config.json").write_text("{}")
    assert model_files.fingerprint(str(folder)) != before
    assert model_files.fingerprint(str(tmp_path / "nosuch")) is None


def test_a_large_file_is_told_by_slices(tmp_path, monkeypatch):
    """Both ends, the size, and every stretch as long as the distance of two slices."""
    monkeypatch.setattr(model_files, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(digest, "SLICES", 10)
    monkeypatch.setattr(digest, "SLICE_BYTES", 16)
    path, content = tmp_path / "w", bytearray(5000)
    marks = set()

    def mark() -> str:
        path.write_bytes(content)
        return digest.of_file(path, model_files.WHOLE_BYTES)

    marks.add(mark())
    for place in (0, 4999, *range(0, 5000 - 600, 600)):
        length = 1 if place in (0, 4999) else 600
        content[place : place + length] = b"\1" * length
        marks.add(mark())
        content[place : place + length] = bytes(length)
    content.append(0)
    marks.add(mark())
    assert len(marks) == 2 + len(range(0, 4400, 600)) + 2 - 1  # place 0 twice, of two lengths


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_pipe_does_not_hold_up_the_fingerprint(name, folder):
    """Stages take it before they load the model."""
    pipe(name)(folder)
    start = time.monotonic()
    assert f"{name}: is a pipe" in one_line(lambda: model_files.fingerprint(str(folder)))
    assert time.monotonic() - start < 5


# Adapters ----------------------------------------------------------------------------------------


def lora(**changes: Any) -> Damage:
    """Sets these of the LoRA parameters."""

    def damage(folder: Path) -> None:
        parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0, **changes}
        edit(folder / "adapter_config.json", lora_parameters=parameters)

    return damage


def tensors_of(change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Damage:
    """Saves other tensors in the place of the adapters."""

    def damage(folder: Path) -> None:
        path = folder / "adapters.safetensors"
        tensors: Any = mx.load(str(path))
        mx.eval(tensors)
        mx.save_safetensors(str(path), change(tensors))

    return damage


ADAPTER_FAULTS: dict[str, tuple[Damage, str]] = {
    "pipe": (pipe("adapters.safetensors"), "is a pipe"),
    "settings pipe": (pipe("adapter_config.json"), "is a pipe"),
    "torn": (lambda f: os.truncate(f / "adapters.safetensors", 99), "is cut short"),
    "settings broken": (text("adapter_config.json", "{"), "broken JSON"),
    "scale": (
        lora(scale=1e308),
        "lora_parameters.scale",
    ),
    "scale NaN": (
        lora(scale=float("nan")),
        "lora_parameters.scale",
    ),
    "scale text": (
        lora(scale="2"),
        "lora_parameters.scale",
    ),
    "rank as text": (lora(rank="2"), "lora_parameters.rank"),
    "a rank of 10^400": (lora(rank=10**400), "lora_parameters.rank"),
    "no rank": (lora(rank=0), "lora_parameters.rank"),
    "another rank": (lora(rank=3), "is not an adapter of rank 3"),
    "dropout": (lora(dropout=2), "lora_parameters.dropout"),
    "keys as text": (lora(keys="self_attn"), "lora_parameters.keys"),
    "parameters as a list": (
        lambda f: edit(f / "adapter_config.json", lora_parameters=[]),
        "lora_parameters",
    ),
    "DoRA": (lambda f: edit(f / "adapter_config.json", fine_tune_type="dora"), "fine_tune_type"),
    "blocks": (lambda f: edit(f / "adapter_config.json", num_layers="all"), "num_layers"),
    "settings empty": (text("adapter_config.json", "{}"), "lacks"),
    "no tensors": (tensors_of(lambda _: {}), "not pairs"),
    "half a pair": (tensors_of(lambda t: dict(list(t.items())[1:])), "not pairs"),
    "a block is missing": (
        tensors_of(lambda t: {n: a for n, a in t.items() if ".layers.1." not in n}),
        ".layers.1.",
    ),
    "integers": (
        tensors_of(lambda t: {n: a.astype(mx.int8) for n, a in t.items()}),
        "is not an adapter of rank 2",
    ),
    "numbers": (tensors_of(lambda t: {n: mx.array(1.0) for n in t}), "is not an adapter of rank 2"),
}


@pytest.fixture(scope="module")
def adapters(granite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the tiny Granite, as training saves them."""
    from dpo_mlx.config import LoraConfig

    folder = tmp_path_factory.mktemp("adapters") / "a"
    loaded = load_model(str(granite))
    attach_lora(loaded.model, LoraConfig(rank=2))
    save_adapters(loaded.model, LoraConfig(rank=2), folder)
    return folder


@pytest.mark.parametrize("case", ADAPTER_FAULTS)
def test_damaged_adapters_are_one_line(case, adapters, granite, tmp_path):
    """It names their folder, and never the model's architecture."""
    damage, says = ADAPTER_FAULTS[case]
    folder = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    damage(folder)
    line = one_line(lambda: load_model(str(granite), folder))
    assert line.startswith(str(folder)) and says in line
    assert "away" in line and line.endswith("run 10_train_dpo.py again")


def test_adapters_with_a_nan_are_named(adapters, granite, tmp_path):
    """By the tensor, when they are loaded and when a checkpoint is resumed."""
    folder = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    path = folder / "adapters.safetensors"
    tensors: Any = mx.load(str(path))
    name = max(tensors)
    tensors[name] = tensors[name] + mx.inf
    mx.save_safetensors(str(tmp_path / "new.safetensors"), tensors)
    (tmp_path / "new.safetensors").rename(path)
    for call in (
        lambda: load_model(str(granite), folder),
        lambda: load_tensors(path, tensors),
    ):
        line = one_line(call)
        assert f"tensor {name} has a NaN or an infinity" in line and "10_train_dpo.py again" in line


def test_types_that_do_not_fit_are_said_when_it_is_loaded(llama, tmp_path):
    """Before anything is planned: the model's blocks are built on two tokens, and not computed."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    edit(folder / "config.json", rope_traditional="x")
    line = one_line(lambda: load_model(str(folder), lazy=True))
    assert line.startswith(f"model {folder}: cannot be loaded: ") and "set model" in line
