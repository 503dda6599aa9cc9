"""The runner as a user starts it. Fake versions of uname, sw_vers, sysctl, caffeinate, Python and
the stages stand for the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from test_supervisor import fake_program

STAGES = (
    "phase3-prepare-data-mlx/05_fetch_demo_model.py",
    "phase3-prepare-data-mlx/06_generate_dpo_pairs.py",
    "phase4-fine-tune-model/10_train_dpo.py",
    "phase4-fine-tune-model/11_fuse_adapters.py",
    "phase4-fine-tune-model/12_smoke_test.py",
)
CHECKS = ("phase1-check-machine/01_selftest.py", "phase1-check-machine/02_check_run.py")

# Writes down its name and arguments, then ends with its code in codes.json. With "wait" it goes on
# until SIGTERM; with "stubborn" it ignores SIGTERM too.
FAKE_STAGE = """
import json, os, pathlib, signal, sys, time

home = pathlib.Path(os.environ["HOME"])
name = pathlib.Path(sys.argv[0]).name[:2]

def stop(number, frame):
    with open(home / "signals.txt", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
    sys.exit(128 + number)

code = json.loads((home / "codes.json").read_text()).get(name, 0)
if code == "wait":
    signal.signal(signal.SIGTERM, stop)
if code == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: None)
with open(home / "stages.txt", "a") as file:
    awake, tmp = "DPO_KEPT_AWAKE" in os.environ, pathlib.Path(os.environ["TMPDIR"])
    call = {"stage": name, "arguments": sys.argv[1:], "awake": awake}
    mode = oct(tmp.stat().st_mode & 0o777)
    file.write(json.dumps({**call, "tmp": str(tmp), "mode": mode}) + "\\n")
(tmp / "left over").touch()
while code in ("wait", "stubborn"):
    time.sleep(0.01)
sys.exit(code)
"""

# Answers what scripts/environment.sh asks. Calls that install leave a line in installed.txt. An
# environment that it makes holds a copy of it, and has a pip if there is a file has-pip.
FAKE_PYTHON = """
case "$*" in
  *os.uname*) echo "{version}" ;;
  -V) echo "Python {version}" ;;
  "-c import pip._internal") [ -e "$HOME/has-pip" ] ;;
  "-c import ensurepip, venv") [ ! -e "$HOME/no-ensurepip" ] ;;
  -c*-venv*) echo python3.12-venv ;;
  "-m ensurepip"*) echo "$0 $*" >> "$HOME/installed.txt"; : > "$HOME/has-pip" ;;
  "-m pip"*) echo "$0 $*" >> "$HOME/installed.txt" ;;
  "-m venv"*)
    echo "$0 $*" >> "$HOME/installed.txt"
    for folder; do :; done
    mkdir -p "$folder/bin"
    [ -e "$folder/bin/python" ] || cp "$0" "$folder/bin/python" ;;
  *) exec {python} "$@" ;;
esac
"""

TOOLS = (
    "bash", "sh", "basename", "cat", "cp", "dirname", "grep", "id", "mkdir", "mktemp", "mv",
    "readlink", "realpath", "rm", "sed", "sort", "uname",
)  # fmt: skip


class Sandbox:
    """A copy of the repository with fake stages. PATH holds only the fakes and some TOOLS."""

    def __init__(self, home: Path) -> None:
        self.home, self.repository, self.programs = home, home / "repository", home / "programs"
        for name in (*STAGES, *CHECKS):
            path = self.repository / "scripts" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(FAKE_STAGE)
        shutil.copy(REPOSITORY / "train_dpo_run1.sh", self.repository)
        shutil.copy(REPOSITORY / "scripts/environment.sh", self.repository / "scripts")
        (self.repository / "scripts/dpo_mlx").symlink_to(REPOSITORY / "scripts/dpo_mlx")
        (self.repository / "requirements.txt").write_text("mlx\n")
        (self.repository / "data").mkdir()
        (self.repository / "config").mkdir()
        self.config = self.repository / "config/mlx_granite-4.0-h-micro_dpo.yaml"
        self.config.write_text("demo_model: false\n")
        self.programs.mkdir()
        for tool in TOOLS:
            (self.programs / tool).symlink_to(str(shutil.which(tool)))
        (home / "codes.json").write_text("{}")
        (home / "has-pip").touch()
        self.environment = {"HOME": str(home), "PATH": str(self.programs)}
        self.venv = home / "venv"
        self.activate("3 12 x86_64")

    def activate(self, version: str) -> None:
        """Activate a virtual environment that has all packages."""
        (self.venv / "bin").mkdir(parents=True, exist_ok=True)
        self.python(self.venv / "bin", "python", version)
        (self.venv / ".installed-.venv").write_text(f"# {self.venv}, Python {version} True\nmlx\n")
        self.environment["VIRTUAL_ENV"] = str(self.venv)

    def python(self, folder: Path, name: str, version: str) -> None:
        """Put a fake Python into `folder`; `version` is "major minor machine"."""
        script = FAKE_PYTHON.format(version=f"{version} True", python=sys.executable)
        fake_program(folder, name, script)

    def mac(self, version: str = "15.5", arm64: str = "1") -> None:
        """Make the machine a Mac."""
        (self.programs / "uname").unlink()
        fake_program(self.programs, "uname", "echo Darwin")
        fake_program(self.programs, "sw_vers", f"echo {version}")
        fake_program(self.programs, "sysctl", f"echo {arm64}")
        fake_program(self.programs, "caffeinate", 'echo "$@" > "$HOME/caffeinate.txt"')
        self.activate("3 12 arm64")

    def start(
        self, *arguments: str, cwd: Path | None = None, script: str | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", script or str(self.repository / "train_dpo_run1.sh"), *arguments],
            cwd=cwd or self.home,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell that was started with ^C ignored, as a background job is, cannot trap it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        process = self.start(*arguments, cwd=cwd)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def exit(self, **codes: Any) -> None:
        """Set the exit codes of stages: s10=3."""
        values = {name.removeprefix("s"): code for name, code in codes.items()}
        (self.home / "codes.json").write_text(json.dumps(values))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The stages that the runner started, in order, with their arguments."""
        path = self.home / "stages.txt"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def stages(self) -> list[str]:
        return [call["stage"] for call in self.calls]

    def wait_for(self, stage: str) -> None:
        deadline = time.monotonic() + 30
        while self.stages[-1:] != [stage]:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def installed(self) -> str:
        """All calls of pip and venv, one per line."""
        path = self.home / "installed.txt"
        return path.read_text() if path.exists() else ""

    def refuses(self, *arguments: str) -> str:
        """Return the one error line, after exit code 1, no installation and no stage."""
        code, _, err = self.run(*arguments)
        (line,) = err.splitlines()
        assert code == 1 and line.startswith("error: "), err
        assert self.stages == [] and self.installed == ""
        return line


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


ALONE = ("--launch", "none")

# Options ----------------------------------------------------------------------------------------


def test_options_may_come_in_any_order(sandbox):
    """Options work before or after the config, with a space or an equals sign. Every stage gets the
    config and the overrides, and none of the runner's own options.
    """
    code, _, err = sandbox.run(
        "--set", "seed=1", "--retries=0", "repository/config/" + sandbox.config.name,
        "--launch", "none", "--set=lora.keys=[a b]",
    )  # fmt: skip
    assert code == 0, err
    expected = ["--config", str(sandbox.config), "--set", "seed=1", "--set", "lora.keys=[a b]"]
    assert [call["arguments"] for call in sandbox.calls] == [expected] * len(STAGES)


def test_the_default_config_is_granite(sandbox):
    """The runner finds it from any working directory."""
    assert sandbox.run(*ALONE, cwd=Path("/"))[0] == 0
    assert sandbox.calls[0]["arguments"] == ["--config", str(sandbox.config)]


def test_a_relative_config_is_in_the_caller_s_folder(sandbox):
    """The runner changes to its own folder, but the path means what the user typed."""
    folder = sandbox.home / "elsewhere"
    folder.mkdir()
    (folder / "mine.yaml").write_text("demo_model: false\n")
    assert sandbox.run("mine.yaml", *ALONE, cwd=folder)[0] == 0
    assert sandbox.calls[0]["arguments"] == ["--config", str(folder / "mine.yaml")]


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_describes_the_runner(option, sandbox):
    """--help lists every option, exits with 0 and starts nothing."""
    code, out, err = sandbox.run(option)
    assert code == 0 and err == ""
    names = ("--set", "--launch", "--retries", "--check", "--selftest", "--help")
    assert all(name in out for name in names) and "pipefail" not in out
    assert sandbox.stages == [] and sandbox.installed == ""


@pytest.mark.parametrize(("arguments", "named"), [
    (["--grid", "a=1"], "--grid"),
    (["--retries", "many"], "many"),
    (["--retries="], "--retries="),
    (["--retries", "-1"], "-1"),
    (["--set"], "--set"),
    (["--check", "--launch"], "--launch"),
    (["gone.yaml"], "gone.yaml"),
    (["one.yaml", "two.yaml"], "two.yaml"),
])  # fmt: skip
def test_faulty_arguments_are_refused(arguments, named, sandbox):
    """One line names the faulty argument, before the runner installs anything."""
    (sandbox.venv / ".installed-.venv").unlink()
    assert named in sandbox.refuses(*arguments)


def test_check_and_selftest_replace_the_chain(sandbox):
    """The check gets the config and the overrides; the self-test gets no arguments. The runner
    exits with their code.
    """
    sandbox.exit(s01=1, s02=4)
    assert sandbox.run("--selftest")[0] == 1
    assert sandbox.run("--set", "seed=1", "--check")[0] == 4
    selftest, demo_model, check = sandbox.calls
    assert (selftest["stage"], selftest["arguments"]) == ("01", [])
    assert (demo_model["stage"], check["stage"]) == ("05", "02"), "the check needs the demo's model"
    assert check["arguments"] == ["--config", str(sandbox.config), "--set", "seed=1"]


def test_the_runner_suggests_the_self_test_on_a_new_machine(sandbox):
    """It does not for the short demo, nor after the self-test has written its result."""
    demo = sandbox.home / "demo.yaml"
    demo.write_text("demo_model: true\n")
    offers = []
    for config, result in ((sandbox.config, False), (demo, False), (sandbox.config, True)):
        if result:
            (sandbox.repository / "data/.selftest.json").touch()
        code, out, _ = sandbox.run(str(config), *ALONE)
        assert code == 0
        offers.append("--selftest" in out)
    assert offers == [True, False, False]


# The chain --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codes", "code", "last"), [
    ({}, 0, "12"),
    ({"s06": 1}, 1, "06"),
    ({"s10": 1}, 1, "10"),
    ({"s10": 3}, 3, "12"),
    ({"s10": 3, "s12": 1}, 3, "12"),
    ({"s11": 1}, 1, "11"),
    ({"s12": 1}, 1, "12"),
    ({"s10": 3, "s12": 2}, 2, "12"),
])  # fmt: skip
def test_exit_codes_of_the_chain(codes, code, last, sandbox):
    """An error ends the chain. A stop by a guard (3) does not, and a failed smoke test (1) does not
    hide it.
    """
    sandbox.exit(**codes)
    assert sandbox.run(*ALONE)[0] == code
    order = [Path(stage).name[:2] for stage in STAGES]
    assert sandbox.stages == order[: order.index(last) + 1]


@pytest.mark.parametrize("send", [os.kill, os.killpg])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_runner_reaches_the_stage(number, send, sandbox):
    """The signal goes to the runner alone or to the terminal's whole process group. Either way the
    runner passes it on, waits for the stage, exits with the signal's code and starts no more.
    """
    sandbox.exit(s10="wait")
    process = sandbox.start(*ALONE)
    sandbox.wait_for("10")
    send(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert (sandbox.home / "signals.txt").read_text() == "SIGTERM\n"
    assert sandbox.stages[-1] == "10"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_the_stage_at_once(first, sandbox):
    """Even if the stage ignores SIGTERM. The exit code is the first signal's."""
    sandbox.exit(s10="stubborn")
    process = sandbox.start(*ALONE)
    sandbox.wait_for("10")
    os.killpg(process.pid, first)
    time.sleep(0.3)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + first, err
    assert sandbox.stages[-1] == "10"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_same_signal_twice_at_once_is_one_request(number, sandbox):
    """`timeout` and a closed window send it twice. The stage still saves."""
    sandbox.exit(s10="wait")
    process = sandbox.start(*ALONE)
    sandbox.wait_for("10")
    for _ in range(2):
        os.killpg(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "SIGTERM" in (sandbox.home / "signals.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("call", ["-m dpo_mlx.process.supervisor", "-m pip"])
def test_a_signal_before_the_first_stage_ends_the_runner(call, number, sandbox):
    """It comes during the installation, or while the supervisor is starting and cannot handle it
    yet. The runner starts no stage, and bash adds no line about the supervisor's end.
    """
    (sandbox.venv / ".installed-.venv").unlink()
    python = (sandbox.venv / "bin/python").read_text().removeprefix("#!/bin/sh\n")
    kill = f'case "$*" in "{call}"*) kill -{number.value} $PPID; exec sleep 0.5 ;; esac'
    fake_program(sandbox.venv / "bin", "python", f"{kill}\n{python}")
    (sandbox.programs / "sleep").symlink_to(str(shutil.which("sleep")))
    code, _, err = sandbox.run(*ALONE)
    assert code == 128 + number, err
    assert sandbox.stages == [] and all(line.startswith("note: ") for line in err.splitlines())


# Temporary files --------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [ALONE, ("--check",), ("--selftest",)])
@pytest.mark.parametrize("code", [0, 1])
def test_the_stages_get_a_private_temporary_folder(code, arguments, sandbox):
    """No other user can put a library there. The runner removes it, however the run ends."""
    shared = sandbox.home / "shared tmp"
    shared.mkdir()
    sandbox.environment["TMPDIR"] = str(shared)
    sandbox.exit(**dict.fromkeys(("s01", "s02", "s12"), code))
    assert sandbox.run(*arguments)[0] == code
    assert all(Path(call["tmp"]).parent == shared for call in sandbox.calls)
    assert {call["mode"] for call in sandbox.calls} == {"0o700"}
    assert list(shared.iterdir()) == []


def test_a_temporary_folder_is_removed_after_a_signal(sandbox):
    """Also one in /tmp, which the runner uses when TMPDIR does not exist."""
    sandbox.environment["TMPDIR"] = str(sandbox.home / "gone")
    sandbox.exit(s10="wait")
    process = sandbox.start(*ALONE)
    sandbox.wait_for("10")
    (folder,) = {call["tmp"] for call in sandbox.calls}
    assert Path(folder).is_dir() and folder.startswith("/tmp/dpo.")
    process.terminate()
    process.communicate(timeout=30)
    assert not Path(folder).exists()


# Where and how it is started --------------------------------------------------------------------


def test_the_runner_works_through_a_link_and_with_cdpath(sandbox):
    """A link in ~/bin finds the repository. CDPATH changes neither the folder nor the output."""
    (sandbox.home / "bin").mkdir()
    link = sandbox.home / "bin/train"
    link.symlink_to("../repository/train_dpo_run1.sh")
    sandbox.exit(s05=7)
    (sandbox.home / "elsewhere/repository").mkdir(parents=True)
    sandbox.environment |= {
        "CDPATH": str(sandbox.home / "elsewhere"),
        "GLOBIGNORE": "*",
        "IFS": "/",
    }
    for script in (str(link), "repository/train_dpo_run1.sh"):
        process = sandbox.start(*ALONE, script=script)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 7, err
        assert out.splitlines()[0].startswith("-- "), out
    assert {tuple(call["arguments"]) for call in sandbox.calls} == {
        ("--config", str(sandbox.config))
    }


@pytest.mark.parametrize("name", ["a b.yaml", "-n.yaml", "a\nb.yaml", "$(touch x).yaml", "~"])
def test_a_config_may_have_any_name(name, sandbox):
    """A name that starts with a dash needs ./ before it, as in any command."""
    (sandbox.home / name).write_text("demo_model: false\n")
    sandbox.exit(s05=7)
    code, _, err = sandbox.run(f"./{name}", "--set", "x=$(touch y) *", *ALONE)
    assert code == 7, err
    expected = ["--config", f"{sandbox.home}/{name}", "--set", "x=$(touch y) *"]
    assert sandbox.calls[0]["arguments"] == expected
    assert not (sandbox.home / "x").exists() and not (sandbox.home / "y").exists()


def test_a_deleted_working_directory_does_not_matter(sandbox):
    """The runner changes to its own folder. Only bash may print that its folder is gone."""
    gone = sandbox.home / "gone"
    gone.mkdir()
    sandbox.exit(s05=7)
    script = sandbox.repository / "train_dpo_run1.sh"
    process = subprocess.run(
        ["bash", "-c", f'rmdir "{gone}"; exec bash "{script}" --launch none'],
        cwd=gone,
        env=sandbox.environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 7, process.stderr
    assert sandbox.stages == ["05"]


# The environment --------------------------------------------------------------------------------


def file(venv: Path) -> None:
    venv.write_text("mine\n")


def user_environment(venv: Path) -> None:
    (venv / "bin").mkdir(parents=True)
    fake_program(venv / "bin", "pip", "exit 0")
    (venv / "bin/activate").write_text("")
    (venv / "pyvenv.cfg").touch()


def broken_link(venv: Path) -> None:
    venv.symlink_to("nowhere")


@pytest.mark.parametrize("make", [file, user_environment, broken_link], ids=lambda f: f.__name__)
def test_an_environment_that_is_not_ours_is_left_alone(make, sandbox):
    """One line says what the user can do with it."""
    del sandbox.environment["VIRTUAL_ENV"]
    venv = sandbox.repository / ".venv"
    make(venv)
    before = sorted(map(str, sandbox.repository.rglob("*")))
    line = sandbox.refuses()
    assert "this script did not make .venv" in line and "source .venv/bin/activate" in line
    assert sorted(map(str, sandbox.repository.rglob("*"))) == before


def test_an_incomplete_environment_is_made_again(sandbox):
    """An update removed its Python, or ^C interrupted venv."""
    del sandbox.environment["VIRTUAL_ENV"]
    sandbox.python(sandbox.programs, "python3.12", "3 12 x86_64")
    venv = sandbox.repository / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / ".made-by-dpo-mlx").touch()
    (venv / "bin/python").symlink_to("gone")
    (venv / "left over").touch()
    code, out, _ = sandbox.run(*ALONE)
    assert code == 0 and ".venv/bin/python does not run: making .venv again" in out
    assert f"{sandbox.programs}/python3.12 -m venv --without-pip .venv" in sandbox.installed
    assert not (venv / "left over").exists()


def test_an_active_environment_without_a_python_is_refused(sandbox):
    """The user deleted it, and the terminal still has it active."""
    shutil.rmtree(sandbox.venv)
    line = sandbox.refuses()
    assert f"{sandbox.venv} has no Python" in line and "open a new terminal" in line


# A Mac ------------------------------------------------------------------------------------------


def test_a_mac_stays_awake_and_its_display_may_sleep(sandbox):
    """caffeinate runs as long as the runner, and the stages do not start their own."""
    sandbox.mac()
    process = sandbox.start(*ALONE)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (sandbox.home / "caffeinate.txt").read_text() == f"-is -w {process.pid}\n"
    assert out.count("the display may sleep") == 1
    assert all(call["awake"] for call in sandbox.calls)


def test_a_mac_without_caffeinate_can_run(sandbox):
    """The runner does not claim to keep the Mac awake."""
    sandbox.mac()
    (sandbox.programs / "caffeinate").unlink()
    code, out, err = sandbox.run(*ALONE)
    assert code == 0 and "caffeinate" not in err
    assert "the display may sleep" not in out
    assert not any(call["awake"] for call in sandbox.calls)


def test_only_a_mac_is_kept_awake(sandbox):
    """On Linux a program called caffeinate may be anything."""
    fake_program(sandbox.programs, "caffeinate", 'touch "$HOME/caffeinate.txt"')
    assert sandbox.run(*ALONE)[0] == 0
    assert not (sandbox.home / "caffeinate.txt").exists()


# Machines that MLX has no wheel for -------------------------------------------------------------


@pytest.fixture
def bare(sandbox: Sandbox) -> Sandbox:
    """A Mac with Apple silicon and no virtual environment."""
    sandbox.mac()
    del sandbox.environment["VIRTUAL_ENV"]
    return sandbox


def test_a_mac_with_an_intel_processor_is_refused(bare):
    """On an Intel Mac sysctl does not know hw.optional.arm64."""
    fake_program(bare.programs, "sysctl", "exit 1")
    assert "Apple silicon" in bare.refuses()


@pytest.mark.parametrize("version", ["13.6.1", "12.7"])
def test_an_older_macos_is_refused(version, bare):
    """The error names its version and the one that MLX needs."""
    bare.mac(version)
    line = bare.refuses()
    assert version in line and "macOS 14" in line


def test_a_python_under_rosetta_is_refused(bare):
    """Such a Python reports x86_64 on Apple silicon, and pip would find no wheel for it."""
    bare.python(bare.programs, "python3.12", "3 12 x86_64")
    line = bare.refuses()
    assert "python3.12 is an Intel Python" in line and "python.org" in line


def test_a_mac_without_a_python_is_told_how_to_get_one(bare):
    """macOS ships no Python that is new enough."""
    line = bare.refuses()
    assert "3.11 to 3.15" in line and "python.org" in line and "brew install" in line


def test_a_python_that_is_too_old_or_too_new_is_refused(bare):
    """MLX has wheels for Python 3.11 to 3.15."""
    bare.python(bare.programs, "python3.11", "3 16 arm64")
    bare.python(bare.programs, "python3", "3 9 arm64")
    line = bare.refuses()
    assert "python3.11 is Python 3.16; python3 is Python 3.9" in line


def test_the_first_suitable_python_makes_the_environment(bare):
    """The ones before it are broken or Intel builds."""
    fake_program(bare.programs, "python3.11", "exit 127")
    bare.python(bare.programs, "python3.12", "3 12 x86_64")
    bare.python(bare.programs, "python3.14", "3 14 arm64")
    bare.run()
    assert f"{bare.programs}/python3.14 -m venv --without-pip .venv" in bare.installed


@pytest.mark.parametrize("version", ["3 10 arm64", "3 16 arm64", "3 12 x86_64"])
def test_an_active_environment_with_an_unsuitable_python_is_refused(version, sandbox):
    """The error names the environment, so that the user can deactivate it."""
    sandbox.mac()
    sandbox.activate(version)
    (sandbox.venv / ".installed-.venv").unlink()
    line = sandbox.refuses()
    assert str(sandbox.venv) in line and 'run "deactivate"' in line
