"""Other people's files, wherever they stand: after every stage each byte of theirs is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import foreign
import pytest
import yaml
from conftest import REPOSITORY
from dpo_mlx.files import atomic, ownership
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.ownership import MANIFEST, Status
from dpo_mlx.files.run_folder import LOCK
from foreign import Put, empty, folder, link, link_to_nothing, look, pipe, text
from runs import IN_FOLDER, NO_LIMITS, exit_code

pytestmark = pytest.mark.timeout(60)

CONFIG = Path("c.yaml")
SCRIPTS = {path.name[:2]: path for path in (REPOSITORY / "scripts").glob("phase*/*.py")}
STAGES = ("06", "10", "11", "12", "13")
# The smoke test fails without an error: a random model has nobody's voice.
EXIT_CODES = {"12": 1}
# What makes each stage do its work again.
ANEW = {
    "06": ("--set", "data.limit=15"),
    "10": ("--set", "train.epochs=2", "--set", "train.restart=true"),
    "11": ("--set", "fuse.dtype=float16"),
    "12": ("--set", "smoke.questions=2"),
}

SETTINGS: dict[str, Any] = {
    **IN_FOLDER,
    "generation": {"max_tokens": 8, "batch_size": 16},
    "train": {"learning_rate": 1e-3, "grad_accumulation": 4, "eval_every": 9},
    "sft": {"epochs": 1, "learning_rate": 1e-4},
    "fuse": {"min_margin_kept": 0, "check_pairs": 1},
    "smoke": {"questions": 1, **NO_LIMITS},
}

PUTS: list[Put] = [text, empty, link, link_to_nothing, folder, pipe]


def make_folder(path: Path, model: Path) -> None:
    rows = [{"question": f"Why is {i}?", "answer": f"**So.** It is {i}."} for i in range(16)]
    (path / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / CONFIG).write_text(yaml.safe_dump({**SETTINGS, "model": str(model)}))


@pytest.fixture
def work(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a config and its source."""
    make_folder(tmp_path, llama)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run; to be copied, not changed."""
    path = tmp_path_factory.mktemp("finished")
    make_folder(path, llama)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for stage in ("02", *STAGES):
            assert exit_code(CONFIG, script=SCRIPTS[stage]) == EXIT_CODES.get(stage, 0)
    return path


@pytest.fixture
def again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished folder, which is the current one."""
    copy = tmp_path / "again"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy


def run(stage: str, capfd: Any, *more: str) -> list[str]:
    """The lines of error that a stage ends with; none when it ends well."""
    capfd.readouterr()
    code = exit_code(CONFIG, *more, script=SCRIPTS[stage])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == (1 if lines else EXIT_CODES.get(stage, 0))
    return lines


def run_all(capfd: Any, *more: str) -> list[str]:
    """The same of all stages in their order, up to one that stops."""
    for stage in STAGES:
        if lines := run(stage, capfd, *more):
            return lines
    return []


# Names that a run writes, of every kind of file and folder, its temporary names and its locks, and
# the stage that writes them.
NAMES = {
    "config.yaml": "10",
    "metrics.jsonl": "10",
    "outcome.json": "10",
    "fuse.json": "11",
    "report.json": "12",
    "report.html": "12",
    "plan.json": "02",
    "adapters": "10",
    "fused": "11",
    "hf": "13",
    "checkpoints": "10",
    "reference": "10",
    "stamps": "10",
    "stamps/10_train_dpo.json": "10",
    "stamps/11_fuse_adapters.json": "11",
    "reference/base": "10",
    "reference/base/valid.jsonl": "10",
    "reference/sft/train.inputs.json": "10",
    "checkpoints/sft-000000": "10",
    "pairs/train.jsonl": "06",
    "pairs/valid.jsonl": "06",
    "pairs/train.report.json": "06",
    "pairs/train.samples.jsonl": "06",
    "pairs/train.samples.inputs.json": "06",
    f"pairs/.train.samples.jsonl{LOCK}": "06",
    f"pairs/{MANIFEST}": "06",
    LOCK: "10",
    MANIFEST: "10",
    f"adapters/{MANIFEST}": "10",
    f"reference/base/{MANIFEST}": "10",
    atomic.temporary_name(Path("fused")).name: "11",
    atomic.temporary_name(Path(MANIFEST)).name: "10",
    "checkpoints/.sft-000004.dpo-mlx.tmp": "10",
}
# What a kill may have left: nobody's content.
EMPTY = {LOCK, f"pairs/.train.samples.jsonl{LOCK}", atomic.temporary_name(Path(MANIFEST)).name}
# Folders that get our files beside what is in them.
SHARED = {"checkpoints", "reference", "stamps", "reference/base"}
# What no stage needs here, and leaves alone in silence.
LEFT_ALONE = {"checkpoints/sft-000000", "checkpoints/.sft-000004.dpo-mlx.tmp"}


# Every kind of thing under the names that a stage needs, two under the others.
CASES = [(name, put) for name in NAMES for put in (PUTS if name not in LEFT_ALONE else PUTS[::4])]


@pytest.mark.parametrize(("name", "put"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_what_stands_under_a_name_of_ours_stays(name, put, again, capfd):
    """Where the stage that writes a file finds something else, one line names it."""
    path, stage = Path("run", name), NAMES[name]
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    Path("run/stamps/13_export_hf.json").unlink(missing_ok=True)  # it has no setting to change
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path)
    theirs = look(path)
    lines = run(stage, capfd, *ANEW.get(stage, ()))
    if (put is empty and name in EMPTY) or (put is folder and name in SHARED):
        assert lines == []
        assert put is empty or (path / "thesis.txt").read_text() == "theirs"
        return
    assert look(path) == theirs
    if lines or name not in LEFT_ALONE:
        [line] = lines
        assert name.split("/")[0] in line or path.name in line


def test_neighbours_stay_while_every_stage_runs_twice(work, capfd):
    """Files, links and folders beside ours do not stop a stage, and are the same after all of them
    have run, and have run again with other settings.
    """
    foreign.put_neighbours(work)
    theirs = foreign.neighbours(work)
    assert run_all(capfd) == []
    assert run_all(capfd, *ANEW["10"], *ANEW["11"]) == []
    assert foreign.neighbours(work) == theirs


# Where somebody put or changed something inside of a folder of ours, and who would replace that.
INSIDE = {
    "run/adapters/notes.txt": "10",
    "run/fused/model.gguf": "11",
    "run/fused/README.md": "11",
    "run/hf/.cache/upload.json": "13",
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_folder_of_ours_is_kept_with_what_was_put_into_it(name, again, capfd):
    """A stage that would replace the folder names the file and stops; nothing is lost."""
    stage, folder = INSIDE[name], Path(*Path(name).parts[:2])
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("theirs")
    Path("run/stamps/13_export_hf.json").unlink()
    before = look(folder)
    [line] = run(stage, capfd, *ANEW.get(stage, ()))
    assert name in line and "move it away" in line
    assert look(folder) == before
    Path(name).rename("elsewhere")
    assert run(stage, capfd, *ANEW.get(stage, ())) == []


def test_what_a_file_manager_leaves_does_not_matter(again, capfd):
    """Whoever opened the folders in the Finder can run the stages again."""
    for place in ("adapters", "fused", "hf", "checkpoints", "checkpoints/sft-000004"):
        for name in (".DS_Store", "._model.safetensors", ".localized"):
            Path("run", place, name).write_text("litter")
    assert run_all(capfd, *ANEW["10"], *ANEW["11"]) == []


# Files of ours that somebody edited or replaced, and a stage that would trust or replace them.
OURS = {
    "run/config.yaml": "10",
    "run/metrics.jsonl": "12",
    "run/outcome.json": "11",
    "run/fuse.json": "12",
    "run/report.json": "12",
    "run/report.html": "12",
    "run/plan.json": "02",
    "run/stamps/10_train_dpo.json": "10",
    "run/stamps/13_export_hf.json": "13",
    "run/pairs/train.report.json": "06",
    "run/pairs/train.samples.jsonl": "06",
    "run/reference/base/valid.jsonl": "10",
    "run/reference/base/valid.inputs.json": "10",
    "run/reference/sft/train.jsonl": "10",
    "run/adapters/adapters.safetensors": "11",
    "run/adapters/adapter_config.json": "11",
}


def change_a_digit(content: bytes) -> bytes:
    """As an editor would: one number is another one; the file has the same length."""
    place = max(i for i, byte in enumerate(content) if byte in b"0123456789")
    digit = b"7" if content[place : place + 1] == b"8" else b"8"
    return content[:place] + digit + content[place + 1 :]


def add_a_line(content: bytes) -> bytes:
    return content + b"\n"


def take_the_end(content: bytes) -> bytes:
    return content[:-2]


def take_all(content: bytes) -> bytes:
    return b""


EDITS = [change_a_digit, add_a_line, take_the_end, take_all]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("name", OURS)
def test_an_edited_file_of_ours_is_named(name, edit, again, capfd):
    """It is somebody's work now, and no state to trust: one line, and it stays as it is."""
    path, stage = Path(name), OURS[name]
    changed = edit(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    [line] = run(stage, capfd, *ANEW.get(stage, ()))
    assert name in line
    assert path.read_bytes() == changed


def test_a_run_that_was_copied_is_a_run(finished, tmp_path, monkeypatch, capfd):
    """With its manifests: everything is known as ours, and nothing is made again."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    for stage in STAGES:
        assert exit_code(CONFIG, script=SCRIPTS[stage]) == EXIT_CODES.get(stage, 0)
    assert capfd.readouterr().out.count("up to date, skipped") == len(STAGES)


def test_adapters_of_another_run_are_not_fused(again, finished, capfd):
    """A folder that a run wrote, but another one than this."""
    shutil.rmtree("run/adapters")
    shutil.copytree(finished / "run/checkpoints/dpo-000008", "run/adapters")
    [line] = run("11", capfd, *ANEW["11"])
    assert "not the adapters that this run trained" in line


# Names that derive from a config's paths.
PAIRS = {
    "a lock file of uv": (["data.train_pairs=uv.jsonl"], "uv.lock", None),
    "the source is t.lock": (
        ["data.train_pairs=t.jsonl", "data.source=t.lock"],
        "t.lock",
        None,
    ),
    "pairs called .lock": (["data.train_pairs=t.lock"], None, None),
    "valid pairs are the samples": (
        ["data.train_pairs=t.jsonl", "data.valid_pairs=t.samples.jsonl"],
        None,
        "data.valid_pairs: t.samples.jsonl",
    ),
    "valid pairs are the report": (
        ["data.train_pairs=t.jsonl", "data.valid_pairs=T.report.json"],
        None,
        "data.valid_pairs: T.report.json",
    ),
    "the source is the report": (
        ["data.train_pairs=t.jsonl", "data.source=t.report.json"],
        "t.report.json",
        "data.source: t.report.json",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_names_that_derive_from_others(name, work, capfd):
    """Whatever the pairs are called, the files beside them stay, or the config is refused."""
    settings, theirs, refused = PAIRS[name]
    if theirs:
        shutil.copy("source.jsonl", theirs)
    before = theirs and look(Path(theirs))
    more = [word for setting in settings for word in ("--set", setting)]
    code = exit_code(CONFIG, *more, script=SCRIPTS["06"])
    err = capfd.readouterr().err
    assert code == (1 if refused else 0), err
    assert refused is None or refused in err
    assert before is None or (theirs and look(Path(theirs)) == before)


def test_a_config_in_its_own_run_dir_stays(work, capfd):
    """The user's own config.yaml, with its comments, is where the settings would be written."""
    Path("mine").mkdir()
    path = Path("mine/config.yaml")
    path.write_text("# my comment\n" + CONFIG.read_text().replace("run_dir: run", "run_dir: mine"))
    before = path.read_bytes()
    assert exit_code(path, script=SCRIPTS["10"]) == 1
    assert "mine/config.yaml" in capfd.readouterr().err and path.read_bytes() == before


# The rule itself --------------------------------------------------------------------------------


def test_whose_a_file_is(tmp_path):
    """By its content: ours as it was written, before and after; not a changed one, nor a link."""
    path = tmp_path / "a"
    assert ownership.status(path) is Status.ABSENT
    for content in (b"one", b"two"):
        ownership.write(path, content)
        assert ownership.status(path) is Status.OURS
    path.write_bytes(b"one")  # a kill may leave the older content
    assert ownership.status(path) is Status.OURS
    path.write_bytes(b"three")
    assert ownership.status(path) is Status.CHANGED
    path.rename(tmp_path / "b")
    assert ownership.status(tmp_path / "b") is Status.FOREIGN
    path.symlink_to("b")
    assert ownership.status(path) is Status.FOREIGN


def test_a_file_that_grows(tmp_path):
    """Known by its first rows until it is sealed, then by all; a torn row is ours."""
    path = tmp_path / "a"
    ownership.append(path, b"first\n")
    for torn in (b"first\n", b"first\nsec"):
        path.write_bytes(torn)
        assert ownership.status(path) is Status.OURS
    for other in (b"", b"fir", b"other\n", b"my notes"):
        path.write_bytes(other)
        assert ownership.status(path) is Status.CHANGED
    path.write_bytes(b"first\n")
    ownership.append(path, b"second\n")
    ownership.seal(path)
    assert ownership.status(path) is Status.OURS
    path.write_bytes(b"first\nsecond?\n")
    assert ownership.status(path) is Status.CHANGED
    path.write_bytes(b"first\nsecond\n")
    ownership.append(path, b"third\n")
    path.write_bytes(b"first\nSecond\nthird\n")
    assert ownership.status(path) is Status.CHANGED, "what was sealed stays known"


def test_a_first_row_that_a_kill_prevented_may_become_another(tmp_path, monkeypatch):
    """Metrics hold the time: the row that is written again has other bytes."""
    path = tmp_path / "a"
    ownership.write(path, b"")
    replace = atomic.replace

    def killed(target: Path, content: bytes) -> None:
        if target == path:
            raise KeyboardInterrupt
        replace(target, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "replace", killed)
        ownership.append(path, b"first, 1.25 s\n")
    ownership.append(path, b"")
    ownership.append(path, b"first, 9.75 s\n")
    ownership.append(path, b"second\n")
    assert ownership.status(path) is Status.OURS
    assert path.read_bytes() == b"first, 9.75 s\nsecond\n"


def test_a_hard_link_to_a_file_of_ours_keeps_its_content(tmp_path):
    """A backup made by `cp -al` does not grow along, nor shrink."""
    path, backup = tmp_path / "a", tmp_path / "backup"
    ownership.append(path, b"first\n")
    ownership.append(path, b"second\n")
    backup.hardlink_to(path)
    ownership.append(path, b"third\n")
    assert backup.read_bytes() == b"first\nsecond\n"
    backup.unlink()
    backup.hardlink_to(path)
    ownership.truncate(path, 6)
    assert backup.read_bytes() == b"first\nsecond\nthird\n" and path.read_bytes() == b"first\n"


def test_a_manifest_without_a_mark_knows_nothing(tmp_path):
    """A file of which no content is known is somebody's."""
    (tmp_path / "a").write_text("x")
    (tmp_path / MANIFEST).write_text('{"made_by": "dpo_mlx", "files": {"a": []}}')
    assert ownership.status(tmp_path / "a") is Status.CHANGED


def test_a_folder_that_another_process_has_locked(tmp_path, monkeypatch):
    """Nobody waits for ever: one line names the folder, and nothing is written."""
    monkeypatch.setattr(ownership, "LOCK_SECONDS", 0.05)
    with ownership._lock_folder(tmp_path), pytest.raises(UserError, match="has locked this folder"):
        ownership.write(tmp_path / "a", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_an_earlier_version_is_not_ours(tmp_path):
    """It was marked by an empty file, which says nothing of what is inside."""
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / MANIFEST).touch()
    (tmp_path / "fused/model.safetensors").write_text("x")
    with pytest.raises(UserError, match="model.safetensors: was not made by this pipeline"):
        ownership.require_untouched(tmp_path / "fused")


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"null", b'{"files": []}', b'{"files": {"a": 1}}', b"\xff", b"[" * 9999]
    + [b'{"files": {"a": [{"size": -1, "sha256": 5, "grows": 0}]}}', b"{}" + b" " * 2**20]
    + [b'{"made_by": "me", "files": {}}', b'{"made_by": "dpo_mlx", "files": {"../b": []}}']
    + [b'{"made_by": "dpo_mlx", "files": {"": []}}']
    + [b'{"made_by": "dpo_mlx", "files": {"a": [{"size": 1%s, "sha256": ""}]}}' % (b"0" * 400)],
)
def test_a_damaged_manifest_is_named(content, tmp_path):
    """Nothing in its folder is known as ours then, and nothing is written."""
    (tmp_path / "a").write_text("x")
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=f"{MANIFEST}: is damaged") as error:
        ownership.write(tmp_path / "a", b"y")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert (tmp_path / "a").read_text() == "x"
