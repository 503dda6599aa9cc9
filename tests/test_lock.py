"""One run at a time in a folder, only in a run's own; and what signals do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dpo_mlx import lock, signals
from dpo_mlx.errors import UserError
from dpo_mlx.lock import LOCK, OWN

# Holds a folder until it is killed.
HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dpo_mlx import lock
with lock.run_folder(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_who_holds_it(tmp_path):
    """Another process holds the folder: its number is named. It is killed without warning: the
    folder is free.
    """
    scripts = Path(lock.__file__).parents[1]
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(scripts), str(run)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        told = f"in use by process {holder.pid} on .*run_dir"
        with pytest.raises(UserError, match=told), lock.run_folder(run):
            pass
        holder.kill()
    with lock.run_folder(run):
        assert (run / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert (run / LOCK).read_bytes() == b""


@pytest.mark.parametrize("name", sorted(OWN - {"stamps"}))
def test_a_folder_of_someone_else_is_no_run_s(name, tmp_path):
    """Something under a name that a run would write: refused before anything is touched."""
    (tmp_path / name).mkdir()
    told = f"run_dir: {tmp_path} is no run's folder.* its {name};"
    with pytest.raises(UserError, match=told), lock.run_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == [name]


def test_a_run_s_own_folder_is_taken_again(tmp_path):
    """After its first use, whatever is in it by then; and pairs may have been there before."""
    (tmp_path / "pairs").mkdir()
    with lock.run_folder(tmp_path):
        (tmp_path / "fused").mkdir()
    with lock.run_folder(tmp_path):
        pass


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_a_safe_point(number, code, capfd):
    """Nothing happens but a line, until `check`; SIGTERM after it changes nothing."""
    signals.check()
    with signals.caught():
        signals.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Interrupted) as stop:
            signals.check()
    assert stop.value.exit_code == code
    assert capfd.readouterr().err.count("stopping as soon as") == 1
    signals.check()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_interrupt_leaves_at_once(tmp_path):
    """Without an exception, so that nothing that catches one can hold it up."""
    child = os.fork()
    if child == 0:
        with signals.caught():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
