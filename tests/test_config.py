"""The config: what loads, what is refused and how it is said, and that no key is idle."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from dpo_mlx import config
from dpo_mlx.files.errors import UserError
from dpo_mlx.scoring import losses

FOLDER = REPOSITORY / "config"
GRANITE = FOLDER / "mlx_granite-4.0-h-micro_dpo.yaml"
# Files that show every key, and those that say only what a run needs and what differs.
FULL = [GRANITE, FOLDER / "smollm2-135m_demo.yaml"]
SHORT = sorted({*FOLDER.glob("*.yaml")} - {*FULL})
shipped = pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
short = pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)

MINIMAL: dict[str, Any] = {
    "model": "owner/name",
    "run_dir": "run",
    "data": {"source": "s.jsonl", "train_pairs": "t.jsonl", "valid_pairs": "v.jsonl"},
    "train": {"learning_rate": 1e-6},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def faults(path: Path, *overrides: str) -> list[str]:
    """The faults of a config without the file's name, which every line must carry."""
    with pytest.raises(UserError) as error:
        config.load(path, list(overrides))
    lines = str(error.value).split("\n")
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def dotted(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        is_section = isinstance(value, dict) and name != "chat_template_args"
        found += dotted(value, f"{prefix}{name}.") if is_section else [prefix + name]
    return found


def value_of(loaded: config.Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), loaded)


def test_these_configs_are_shipped():
    """The tables below look at real files."""
    assert all(path.is_file() for path in FULL)
    assert [path.name for path in SHORT] == [
        "mlx_granite-4.0-h-350m_dpo.yaml",
        "mlx_granite-4.1-3b_dpo.yaml",
    ]


@shipped
def test_shipped_config_loads_with_every_key(path):
    """A shipped file shows every key there is, in order, and none that does not exist."""
    config.load(path)
    assert dotted(yaml.safe_load(path.read_text())) == sort_like_file(config.keys())


def sort_like_file(keys: typing.Iterable[str]) -> list[str]:
    """Keys without a section first, then section by section in the files' order."""
    order = ["data", "generation", "lora", "sft", "dpo", "train", "guard", "fuse", "smoke"]
    plain = ["model", "demo_model", "run_dir", "seed"]
    plain += ["system_prompt", "chat_template_args", "report_to"]
    keys = list(keys)
    assert {key.split(".")[0] for key in keys} == {*order, *plain}
    return plain + [key for name in order for key in keys if key.startswith(f"{name}.")]


def test_granite_s_config_is_the_defaults():
    """A config that leaves a key out trains like the shipped recipe.

    The number of rows to begin with is not a part of the recipe.
    """
    own = {*dotted(MINIMAL), "data.limit"}
    shipped, left_out = config.load(GRANITE), config.from_values(MINIMAL)
    keys = [key for key in dotted(yaml.safe_load(GRANITE.read_text())) if key not in own]
    assert {key: value_of(shipped, key) for key in keys} == {
        key: value_of(left_out, key) for key in keys
    }


@short
def test_short_config_says_only_what_differs(path):
    """Except for required keys and data.limit, a short config repeats no value of the recipe."""
    recipe, loaded = config.load(GRANITE), config.load(path)
    said = dotted(yaml.safe_load(path.read_text()))
    assert set(said) >= set(dotted(MINIMAL))
    for key in set(said) - {*dotted(MINIMAL), "data.limit"}:
        assert value_of(loaded, key) != value_of(recipe, key), key


@short
def test_short_config_shares_no_file_with_another_run(path):
    """Two models that shared pairs or a run folder would overwrite each other's work."""
    loaded = config.load(path)
    for other in (config.load(file) for file in [*FULL, *SHORT] if file != path):
        for key in ("run_dir", "data.train_pairs", "data.valid_pairs"):
            assert value_of(loaded, key) != value_of(other, key)


@shipped
def test_every_shipped_key_has_a_comment_above(path):
    """No key without an explanation; grad_accumulation shares its neighbour's."""
    lines = path.read_text().splitlines()
    bare = [
        line.strip().split(":")[0]
        for above, line in zip(lines, lines[1:], strict=False)
        if re.match(r" *\w+: \S", line) and not above.strip().startswith("#")
    ]
    assert bare == ["grad_accumulation"]
    assert "  batch_size: 1\n  grad_accumulation:" in path.read_text()


@shipped
def test_dump_loads_again_equal(path, tmp_path):
    """The resolved config that a run keeps is a config, and the same one."""
    loaded = config.load(path, ["lora.keys=[q_proj]", "train.learning_rate=1e-6"])
    (tmp_path / "resolved.yaml").write_text(config.dump(loaded))
    assert config.load(tmp_path / "resolved.yaml") == loaded


# What a section is called where one function has it to itself.
ALIASES = {
    "": {"config"},
    "train": {"settings"},
    "generation": {"settings"},
    "fuse": {"settings"},
    "dpo": {"s"},
    "guard": {"limits"},
    "smoke": {"limits"},
}


def test_every_key_is_read_somewhere():
    """No key that nothing reads: each is an attribute of what is called like its section."""
    read = {
        (ast.unparse(node.value).rpartition(".")[2], node.attr)
        for path in (REPOSITORY / "scripts").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    unread = []
    for key in list(config.keys()):
        section, _, name = key.rpartition(".")
        if not {(owner, name) for owner in {section, *ALIASES.get(section, ())}} & read:
            unread.append(key)
    assert unread == []


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.learning_rate=1e-6", "train", "learning_rate", 1e-6),  # text to YAML 1.1
        ("dpo.beta=2", "dpo", "beta", 2.0),
        ("data.limit=null", "data", "limit", None),
        ("data.limit=7", "data", "limit", 7),
        ("lora.keys=[a, b]", "lora", "keys", ["a", "b"]),
        ("train.grad_checkpoint=false", "train", "grad_checkpoint", False),
        ("data.source=a=b.jsonl", "data", "source", "a=b.jsonl"),
        ("data.source=123", "data", "source", "123"),
        ("data.valid_fraction=0", "data", "valid_fraction", 0.0),  # the least is within range
        ("data.valid_fraction=0.9", "data", "valid_fraction", 0.9),
    ],
)
def test_override_wins_with_the_right_type(override, section, key, value, file):
    """--set beats the file, and text, numbers and null arrive as the type of the key."""
    found = getattr(getattr(config.load(file, [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_template_arguments_are_set_one_by_one(file):
    """--set chat_template_args.name=value adds to the file's arguments; values are YAML."""
    file.write_text(file.read_text() + "chat_template_args: {enable_thinking: true, date: today}\n")
    sets = ["enable_thinking=false", "depth=3", "share=0.5", "tone=dry"]
    loaded = config.load(file, [f"chat_template_args.{each}" for each in sets])
    expected = {"enable_thinking": False, "date": "today", "depth": 3, "share": 0.5, "tone": "dry"}
    assert loaded.chat_template_args == expected
    assert config.from_values(yaml.safe_load(config.dump(loaded))) == loaded
    whole = config.load(file, ["chat_template_args={depth: 1}"])
    assert whole.chat_template_args == {"depth": 1}


@pytest.mark.parametrize("nothing", ["chat_template_args:", "chat_template_args: {}", ""])
def test_no_template_arguments(nothing, file):
    """An empty or missing key means no arguments, and keeps the fingerprints of older runs."""
    file.write_text(f"{file.read_text()}{nothing}\n")
    assert config.load(file).chat_template_args == {}
    assert "chat_template_args" not in str([*config.load(file).flat])


def test_arguments_of_the_call_are_no_template_arguments():
    """Every named parameter of transformers' apply_chat_template is rejected."""
    from transformers import PreTrainedTokenizerBase

    named = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert {*named} - {"self", "kwargs"} <= {*config.RESERVED_ARGUMENTS}


def test_later_override_wins(file):
    """--limit after --set, or the other way: the last one counts."""
    assert config.load(file, ["data.limit=3", "data.limit=4"]).data.limit == 4


@pytest.mark.parametrize("section", ["lora:", "lora: null", "lora: {}"])
def test_empty_section_takes_defaults_and_overrides(section, file):
    """A section whose keys are all commented out is no fault, with --set or without."""
    file.write_text(file.read_text() + section + "\n")
    assert config.load(file).lora == config.LoraConfig()
    assert config.load(file, ["lora.rank=3"]).lora.rank == 3


@pytest.mark.parametrize("value", ["1e-6", "1.0e-6", ".000001", '"1e-6"'])
def test_number_as_yaml_text_is_a_number(value, file):
    """YAML 1.1 reads 1e-6 as text; that must not pass unnoticed, nor be refused."""
    file.write_text(re.sub("learning_rate: .*", f"learning_rate: {value}", file.read_text()))
    assert config.load(file).train.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean train.learning_r"),
        ("data.limits=1", "data.limits: unknown key; did you mean data.limit?"),
        ("modle=x", "modle: unknown key; did you mean model?"),
        ("zzzzzzzz=1", "zzzzzzzz: unknown key"),
        ("nosection.key=1", "nosection: unknown key"),
        ("lora.alpha=32", "lora.alpha: mlx-lm has no alpha; set lora.scale, which is alpha / rank"),
        ("lora.lora_alpha=32", "lora.lora_alpha: mlx-lm has no alpha; set lora.scale"),
        (
            "lora.use_dora=true",
            "lora.use_dora: DoRA also rescales the frozen weights, so the model",
        ),
        ("fine_tune_type=full", "fine_tune_type: only adapters are trained"),
        ("lora.fine_tune_type=dora", "lora.fine_tune_type: only adapters are trained"),
        ("lora.rank", "--set lora.rank: expected section.key=value"),
        ("=1", "--set =1: expected section.key=value"),
        ("model.name=x", "--set model.name=x: model is not a section"),
        ("lora.rank.x=1", "lora.rank: expected a whole number, found dict {'x': 1}"),
        ("lora=3", "lora: expected a section of keys, found int 3"),
        ("lora=0", "lora: expected a section of keys, found int 0"),
        ("lora=[]", "lora: expected a section of keys, found list []"),
        ("lora.rank=[", "--set lora.rank=[: the value cannot be read as YAML: "),
        ("lora.rank=2020-99-99", "--set lora.rank=2020-99-99: the value cannot be read"),
        ("lora.rank=true", "lora.rank: expected a whole number, found bool True"),
        ("lora.rank=8.0", "lora.rank: expected a whole number, found float 8.0"),
        ("lora.rank=null", "lora.rank: expected a whole number, found nothing"),
        ("lora.rank=", "lora.rank: expected a whole number, found nothing"),
        ("dpo.beta=true", "dpo.beta: expected a number, found bool True"),
        ("dpo.beta=high", "dpo.beta: expected a number, found str 'high'"),
        ("dpo.beta=nan", "dpo.beta: expected a number"),
        ("dpo.beta=.inf", "dpo.beta: expected a number"),
        ("dpo.beta=1" + "0" * 400, "--set dpo.beta=1000000000"),
        ("train.grad_checkpoint=1", "train.grad_checkpoint: expected true or false, found int 1"),
        ("lora.keys=q_proj", "lora.keys: expected a list of names, found str 'q_proj'"),
        ("lora.keys=[1]", "lora.keys: expected a list of names, found list [1]"),
        ("dpo.loss=dpo", "dpo.loss: 'dpo' is not one of sigmoid, "),
        ("train.schedule=linear", "train.schedule: 'linear' is not one of cosine, constant"),
        ("lora.rank=0", "lora.rank: 0 is too small; the minimum is 1"),
        ("data.limit=0", "data.limit: 0 is too small; the minimum is 1"),
        ("data.valid_fraction=0.91", "data.valid_fraction: 0.91 is too large; the maximum is 0.9"),
        ("sft.epochs=-1", "sft.epochs: -1 is too small; the minimum is 0"),
        ("dpo.betas=1", "dpo.betas: unknown key; did you mean dpo.beta?"),
        (
            "guard.max_distinct2_drop=2",
            "guard.max_distinct2_drop: 2.0 is too large; the maximum is 1",
        ),
        ("guard.enabled=1", "guard.enabled: expected true or false, found int 1"),
        ("train.eval_questions=0", "train.eval_questions: 0 is too small; the minimum is 1"),
        ("train.learning_rate=-1e-6", "train.learning_rate: -1e-06 is too small"),
        ("seed=-1", "seed: -1 is too small; the minimum is 0"),
        ("seed=100000000000000000000", "seed: 100000000000000000000 is too large"),
        ("model=", "model: is missing; this key is required"),
        ("data.train_pairs=", "data.train_pairs: is missing; this key is required"),
        ("data.valid_pairs=t.jsonl", "data.valid_pairs: t.jsonl is also data.train_pairs; choose"),
        (
            "data.train_pairs=s.jsonl",
            "data.train_pairs: s.jsonl is also data.source; choose another",
        ),
        (
            "data.valid_pairs=./s.jsonl",
            "data.valid_pairs: s.jsonl is also data.source; choose another",
        ),
        ("lora.dropout=0.1", "lora.dropout: must be 0 with train.grad_checkpoint"),
        ("chat_template_args=3", "chat_template_args: expected names and values, like {enable_thi"),
        ("chat_template_args=[a]", "chat_template_args: expected names and values, like"),
        (
            "chat_template_args.x=[1]",
            "chat_template_args.x: expected text, a number, true or false",
        ),
        (
            "chat_template_args.x=",
            "chat_template_args.x: expected text, a number, true or false",
        ),
        (
            "chat_template_args.x.y=1",
            "chat_template_args.x: expected text, a number, true or false",
        ),
        (
            "chat_template_args.x=.nan",
            "chat_template_args.x: expected text, a number, true or false",
        ),
        ("chat_template_args.x=2020-01-01", "--set chat_template_args.x=2020-01-01: the value"),
        ("chat_template_args.x-y=1", "chat_template_args: 'x-y' is not a valid argument name"),
        ("chat_template_args={1: 2}", "--set chat_template_args={1: 2}: the value cannot be"),
        (
            "chat_template_args.tokenize=true",
            "chat_template_args.tokenize: this argument belongs to the t",
        ),
        ("chat_template_arg.x=1", "chat_template_arg: unknown key; did you mean chat_template_a"),
        ("report_to=wnadb", "report_to: 'wnadb' is not one of wandb, swanlab"),
        ("report_to=wandb,tensorboard", "report_to: 'tensorboard' is not one of wandb, swanlab"),
    ],
)
def test_fault_is_one_line_with_its_remedy(override, fault, file):
    """Each mistake is found, named by its key, and is the only one reported."""
    found = faults(file, override)
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_dropout_is_fine_without_checkpointing(file):
    """The contradiction is between the two keys, not in either."""
    assert config.load(file, ["lora.dropout=0.1", "train.grad_checkpoint=false"]).lora.dropout


def test_all_faults_are_reported_at_once(tmp_path):
    """A file with six mistakes is corrected in one go."""
    path = tmp_path / "c.yaml"
    path.write_text("model: 3\nrun_dir: r\nbeta: 1\nlora: {rank: 0, rnak: 1}\ntrain: {}\n")
    assert sorted(line.split(":")[0] for line in faults(path, "seed", "dpo.loss=x")) == sorted(
        ["model", "beta", "lora.rank", "lora.rnak", "train.learning_rate", "--set seed", "dpo.loss"]
        + ["data.source", "data.train_pairs", "data.valid_pairs"]
    )


def test_required_keys_are_exactly_those_marked(tmp_path):
    """What the files call (required) is what is missing from an empty config."""
    path = tmp_path / "c.yaml"
    path.write_text("{}\n")
    missing = [line.removesuffix(": is missing; this key is required") for line in faults(path)]
    assert sorted(missing) == sorted(dotted(MINIMAL))
    for file in FULL:
        marked = re.findall(r"# \(required\).*\n(?: *#.*\n)* *(\w+):", file.read_text())
        assert sorted(marked) == sorted(key.rpartition(".")[2] for key in missing)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "expected `key: value` lines, found nothing"),
        (b"# nothing\n", "expected `key: value` lines, found nothing"),
        (b"- a\n", "expected `key: value` lines, found list"),
        (b"a: b: c\n", "cannot be read as YAML: line "),
        (b"a: [\n", "cannot be read as YAML: line "),
        (b"a: 2020-99-99\n", "cannot be read as YAML: line "),
        (b"\xff\xfe\x00", "is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_file_that_is_no_config(content, fault, tmp_path):
    """A file of another kind is named with what was found in it, on one line."""
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert [line[: len(fault)] for line in faults(path)] == [fault]


def test_byte_order_mark_and_windows_line_ends_are_fine(file):
    """A config saved by Notepad loads as the same config."""
    plain = config.load(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert config.load(file) == plain


def test_missing_file_and_directory(tmp_path):
    """Both name --config as the remedy."""
    for path, what in ((tmp_path / "no.yaml", "no such file"), (tmp_path, "is a directory")):
        with pytest.raises(UserError, match=f"{what}.*--config"):
            config.load(path)


def test_keys_are_those_of_the_dataclasses():
    """`keys` lists leaves only, one for each field that is not a section."""
    hints = typing.get_type_hints(config.Config)
    sections = [hints[f.name] for f in fields(config.Config) if is_dataclass(hints[f.name])]
    leaves = sum(len(fields(section)) for section in sections)
    assert len(list(config.keys())) == leaves + len(fields(config.Config)) - len(sections)


def test_reading_a_config_imports_no_mlx():
    """The supervisor reads a config before every stage, and MLX is slow to import."""
    program = (
        "import sys; import dpo_mlx.config; print(any(m.startswith('mlx') for m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def test_the_config_names_the_losses_that_there_are():
    """`dpo.loss` takes exactly the names that losses.py implements."""
    assert set(config.LOSSES) == set(losses.LOSSES)
