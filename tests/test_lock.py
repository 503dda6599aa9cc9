"""One run at a time in a folder, only in a run's own; and what signals do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dpo_mlx.files import lock
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.run_folder import LOCK, RunFolder
from dpo_mlx.process import signals

RUN = RunFolder(Path("."))
FILES, FOLDERS = ([path.name for path in some] for some in (RUN.files, RUN.whole_folders))

# Holds a folder until it is killed.
HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dpo_mlx.files import lock
from dpo_mlx.files.run_folder import RunFolder
with lock.hold_run(RunFolder(Path(sys.argv[2]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_who_holds_it(tmp_path):
    """Another process holds the folder: its number is named. It is killed without warning: the
    folder is free.
    """
    scripts = Path(lock.__file__).parents[2]
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(scripts), str(run)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        told = f"in use by process {holder.pid} on .*run_dir"
        with pytest.raises(UserError, match=told), lock.hold_run(RunFolder(run)):
            pass
        holder.kill()
    with lock.hold_run(RunFolder(run)):
        assert (run / LOCK).read_text().startswith(f"{lock.HEADER}process {os.getpid()} on ")
    assert (run / LOCK).read_text() == lock.HEADER


@pytest.mark.parametrize("name", sorted(FILES + FOLDERS))
def test_a_folder_of_someone_else_is_no_run_s(name, tmp_path):
    """Something under a name that a run would replace: refused before anything is touched."""
    theirs = tmp_path / name if name in FILES else tmp_path / name / "thesis.txt"
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("mine")
    told = f"{tmp_path / name}: was not made by this pipeline.*run_dir"
    with pytest.raises(UserError, match=told), lock.hold_run(RunFolder(tmp_path)):
        pass
    assert set(os.listdir(tmp_path)) == {name, LOCK} and theirs.read_text() == "mine"


def foreign_text(path: Path) -> None:
    path.write_text("held by another tool")


def foreign_link(path: Path) -> None:
    path.with_name("target").write_text("mine")
    path.symlink_to("target")


@pytest.mark.parametrize("make", [foreign_text, foreign_link, os.mkfifo, Path.mkdir])
def test_another_tool_s_lock_stays(make, tmp_path):
    """A text, a link, a pipe or a folder under the lock's name: named, and as it was."""
    path = tmp_path / LOCK
    make(path)
    before = {entry: entry.lstat() for entry in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"{path}: is not a lock file of this pipeline"):
        lock.hold_run(RunFolder(tmp_path)).__enter__()
    assert {entry: entry.lstat().st_size for entry in tmp_path.iterdir()} == {
        entry: stat.st_size for entry, stat in before.items()
    }


def test_a_run_s_own_folder_is_taken_again(tmp_path):
    """After its first use, whatever is in it by then; and pairs may have been there before."""
    (tmp_path / "pairs").mkdir()
    with lock.hold_run(RunFolder(tmp_path)):
        (tmp_path / "fused").mkdir()
    with lock.hold_run(RunFolder(tmp_path)):
        pass


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_a_safe_point(number, code, capfd):
    """Nothing happens but a line, until `check`; SIGTERM after it changes nothing."""
    signals.check()
    with signals.deferred():
        signals.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Interrupted) as stop:
            signals.check()
    assert stop.value.exit_code == code
    assert capfd.readouterr().err.count("stopping after the current step") == 1
    signals.check()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_interrupt_leaves_at_once(tmp_path):
    """Without an exception, so that nothing that catches one can hold it up."""
    child = os.fork()
    if child == 0:
        with signals.deferred():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
