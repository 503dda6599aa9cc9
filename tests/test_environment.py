"""scripts/environment.sh with the environments that people have: moved or copied folders, no pip,
conda, variables that lead Python elsewhere. No test needs a network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_runner import Sandbox
from test_supervisor import fake_program

OURS = ".made-by-dpo-mlx"
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)  # of the tests' own environment

# A pip that writes down where it works, and installs one script as pip does.
FAKE_PIP = r"""
import os, pathlib, sys

names = ("PIP_USER", "PIP_TARGET", "PYTHONPATH")
with open(os.environ["HOME"] + "/installed.txt", "a") as file:
    print(sys.prefix, *(f"{name}={os.environ.get(name)}" for name in names), file=file)
python = f"{sys.prefix}/bin/python"
start = f"#!{python}\n"
if " " in python:
    start = f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n"
script = pathlib.Path(sys.prefix, "bin/tool")
script.write_text(start + "import sys\nprint(sys.prefix, *sys.argv[1:])\n")
script.chmod(0o755)
"""


class Project(Sandbox):
    """The runner's sandbox with one Python, 3.12, on PATH, and no environment."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        del self.environment["VIRTUAL_ENV"]
        shutil.rmtree(self.venv)
        self.python(self.programs, "python3.12", "3 12 x86_64")

    def set_up(self, repository: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Call use_venv as the runner does; it then prints the Python that comes first on PATH."""
        commands = (
            "set -euo pipefail; . scripts/environment.sh; use_venv .venv requirements.txt;"
            "command -v python"
        )
        return subprocess.run(
            ["bash", "-c", commands],
            cwd=repository or self.repository,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def works(self, repository: Path | None = None) -> str:
        """Set up, and return the output, which ends with the path of Python."""
        process = self.set_up(repository)
        assert process.returncode == 0, process.stderr
        return process.stdout

    def fails(self) -> str:
        """Set up in vain, and return the one error line."""
        process = self.set_up()
        (line,) = process.stderr.splitlines()
        assert process.returncode == 1 and line.startswith("error: "), process
        return line

    def own_venv(self) -> Path:
        """Give the repository a real environment, which this script made, with a fake pip."""
        venv = self.repository / ".venv"
        subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", venv], check=True)
        (venv / OURS).touch()
        (package,) = venv.glob("lib/python*/site-packages")
        (package / "pip/_internal").mkdir(parents=True)
        for name in ("__init__.py", "_internal/__init__.py"):
            (package / "pip" / name).touch()
        (package / "pip/__main__.py").write_text(FAKE_PIP)
        return venv

    def active_venv(self) -> None:
        """Activate an environment that lacks the packages."""
        self.activate("3 12 x86_64")
        (self.venv / ".installed-.venv").unlink()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


# Folders that move ------------------------------------------------------------------------------


def move(old: Path, new: Path) -> None:
    old.rename(new)


def copy(old: Path, new: Path) -> None:
    shutil.copytree(old, new, symlinks=True)


def copy_without_links(old: Path, new: Path) -> None:
    shutil.copytree(old, new)


@pytest.mark.parametrize(("relocate", "name"), [
    (move, "moved"), (copy, "copied"), (copy_without_links, "copied"),
    (move, "it's a \"new\" $name"), (copy, "-n *"),
])  # fmt: skip
def test_a_moved_or_copied_project_stays_within_itself(relocate, name, project):
    """pip installs into the folder that is being used. Neither the folder where the environment was
    made nor another Python gets anything. Installed programs work even before the next set-up.
    """
    project.own_venv()
    assert project.works().splitlines()[-1] == f"{project.repository}/.venv/bin/python"
    new = project.home / name
    relocate(project.repository, new)
    tool = [new / ".venv/bin/tool", "an argument"]
    if relocate is not copy_without_links:
        assert subprocess.check_output(tool, text=True) == f"{new}/.venv an argument\n"
    (project.home / "installed.txt").unlink()

    out = project.works(new)

    assert f"setting up {new}/.venv from" in out and out.endswith(f"{new}/.venv/bin/python\n")
    assert [line.partition(" PIP_")[0] for line in project.installed.splitlines()] == [
        f"{new}/.venv"
    ]
    assert subprocess.check_output(tool, text=True) == f"{new}/.venv an argument\n"
    assert project.works(new).count("\n") == 1, "nothing is left to set up"
    if name.isalpha():  # the activate of some Pythons cannot cope with quotes
        activate = f'. "{new}/.venv/bin/activate"; echo "$VIRTUAL_ENV"'
        assert subprocess.check_output(["bash", "-c", activate], text=True) == f"{new}/.venv\n"


def test_programs_that_pip_did_not_write_are_left_alone(project):
    """Only scripts that begin with the environment's own Python change."""
    venv = project.own_venv()
    others = {"binary": b"\x7fELF /.venv/bin/python\n", "mine": b"#!/usr/bin/python3\nprint()\n"}
    for name, content in others.items():
        (venv / "bin" / name).write_bytes(content)
    project.works()
    assert {name: (venv / "bin" / name).read_bytes() for name in others} == others


def test_a_folder_with_a_colon_is_refused(project):
    """PATH cannot hold it. The Finder shows the colon as a slash."""
    folder = project.home / "DPO 1:2"
    project.repository.rename(folder)
    project.repository = folder
    line = project.fails()
    assert str(folder) in line and "colon" in line and project.installed == ""


def test_an_active_environment_that_is_ours_is_repaired(project):
    """The user has activated .venv, and then its Python was removed."""
    venv = project.repository / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / OURS).touch()
    project.environment["VIRTUAL_ENV"] = str(venv)
    out = project.works()
    assert "making .venv again" in out and f"{venv}/bin/python -m pip" in project.installed


@pytest.mark.parametrize("answer", ["3 10 x86_64 True", "3 12 x86_64 False", ""])
def test_an_environment_of_ours_is_made_again(answer, project):
    """Its Python is too old now, uses another folder (pyvenv.cfg is lost), or does not run."""
    project.works()
    venv = project.repository / ".venv"
    (venv / "old").touch()
    fake_program(venv / "bin", "python", f'case "$*" in *os.uname*) echo "{answer}" ;; esac')
    assert "making .venv again" in project.works()
    assert not (venv / "old").exists() and (venv / OURS).exists()


# When packages are installed --------------------------------------------------------------------


def test_an_unchanged_environment_needs_no_network(project):
    """The second run calls neither pip nor venv. A new requirement or a new Python makes it call
    pip, which uses no network for packages that are there.
    """
    requirements = project.repository / "requirements.txt"
    python = project.repository / ".venv/bin/python"
    project.works()
    (project.home / "installed.txt").unlink()
    assert project.works() == f"{python}\n" and project.installed == ""
    requirements.write_text("mlx\nnumpy\n")
    project.works()
    assert project.installed.count(" -m pip ") == 1
    python.write_text(python.read_text().replace("3 12", "3 13"))  # the system's Python was updated
    project.works()
    assert project.installed.count(" -m pip ") == 2


def test_a_failed_installation_is_tried_again(project):
    """The packages count as installed only when all files are."""
    project.active_venv()
    python = (project.venv / "bin/python").read_text()
    fake_program(project.venv / "bin", "python", python.replace('"-m pip"*)', '"-m pip"*) exit 1;'))
    line = project.fails()
    assert "requirements.txt" in line and str(project.venv) in line and "network" in line
    assert "could not install" in project.fails()


def test_an_active_environment_is_told_what_it_gets(project):
    """The user reads what is installed, and where, before pip starts."""
    (project.repository / "requirements.txt").write_text(
        "# comment\nmlx>=0.32; sys_platform == 'darwin'\nmlx[cpu]>=0.32\nmlx-lm<0.33\n"
    )
    project.active_venv()
    out = project.works()
    assert f"installing into the environment {project.venv}: mlx mlx-lm\n" in out
    assert not (project.repository / ".venv").exists() and not (project.venv / OURS).exists()
    assert " -m venv" not in project.installed


# pip --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [True, False])
def test_an_environment_without_pip_gets_it(active, project):
    """uv makes such environments. Python's own pip is added to it; no other Python replaces it."""
    if active:
        project.active_venv()
    venv = project.venv if active else project.repository / ".venv"
    if not active:
        project.works()
        (venv / ".installed-.venv").unlink()
        (project.home / "installed.txt").unlink()
    (project.home / "has-pip").unlink()
    assert f"adding pip to {venv}" in project.works()
    first, second = project.installed.splitlines()[:2]
    assert first == f"{venv}/bin/python -m ensurepip --default-pip"
    assert second.startswith(f"{venv}/bin/python -m pip install")


@pytest.mark.parametrize("active", [True, False])
def test_uv_installs_where_python_brings_no_pip(active, project):
    """Debian keeps ensurepip in a package of its own."""
    fake_program(project.programs, "uv", 'echo "uv $*" >> "$HOME/installed.txt"')
    (project.home / "has-pip").unlink()
    (project.home / "no-ensurepip").touch()
    if active:
        project.active_venv()
    venv = project.venv if active else project.repository / ".venv"
    project.works()
    expected = f"uv pip install --quiet --python {venv}/bin/python -r requirements.txt"
    assert expected in project.installed and "-m pip" not in project.installed


def test_debian_s_package_is_named(project):
    """It is that of the Python that would be used, which need not be Debian's default."""
    (project.home / "no-ensurepip").touch()
    line = project.fails()
    assert "install python3.12-venv or uv" in line and not (project.repository / ".venv").exists()


def test_root_on_debian_gets_the_package(project):
    """apt-get installs ensurepip, and then the environment is made."""
    (project.home / "no-ensurepip").touch()
    (project.programs / "id").unlink()
    fake_program(project.programs, "id", "echo 0")
    apt = 'case "$*" in *python3.12-venv) rm "$HOME/no-ensurepip" ;; esac'
    fake_program(project.programs, "apt-get", apt)
    assert "installing python3.12-venv" in project.works()
    assert ".venv/bin/python -m pip" in project.installed


def test_variables_do_not_lead_python_elsewhere(project):
    """With PYTHONHOME Python would not start. With the others packages would go, or come from,
    elsewhere. Each variable of Python's that is ignored is named.
    """
    venv = project.own_venv()
    project.environment |= {
        "PYTHONHOME": "/nowhere",
        "PYTHONPATH": "/elsewhere",
        "PIP_USER": "1",
        "PIP_TARGET": "/tmp/x",
    }
    process = project.set_up()
    assert process.returncode == 0, process.stderr
    assert project.installed == f"{venv} PIP_USER=0 PIP_TARGET= PYTHONPATH=None\n"
    home, path = process.stderr.splitlines()
    assert "ignoring PYTHONHOME" in home and "ignoring PYTHONPATH" in path


# conda ------------------------------------------------------------------------------------------


def conda(project: Project, name: str) -> None:
    project.environment |= {"CONDA_PREFIX": f"/opt/conda/envs/{name}", "CONDA_DEFAULT_ENV": name}


def test_a_conda_environment_is_left_alone(project):
    """One line names it and says what to do. Nothing is made or installed."""
    conda(project, "mine")
    line = project.fails()
    assert "/opt/conda/envs/mine" in line and "conda deactivate" in line
    assert project.installed == "" and not (project.repository / ".venv").exists()


def test_conda_s_base_environment_is_no_obstacle(project):
    """conda activates it in every terminal, so it is not the user's choice."""
    conda(project, "base")
    assert project.works().endswith(f"{project.repository}/.venv/bin/python\n")


def test_our_environment_works_beside_conda(project):
    """Once it is there, it is clear where the packages are."""
    project.works()
    conda(project, "mine")
    assert project.works() == f"{project.repository}/.venv/bin/python\n"


def test_an_active_folder_that_is_no_virtual_environment_is_refused(project):
    """An editor may put a conda environment, or the system's Python, into VIRTUAL_ENV. Its Python
    may not allow pip at all (PEP 668).
    """
    folder = project.home / "conda"
    (folder / "bin").mkdir(parents=True)
    fake_program(
        folder / "bin", "python", 'case "$*" in *os.uname*) echo 3 12 x86_64 False ;; esac'
    )
    project.environment["VIRTUAL_ENV"] = str(folder)
    line = project.fails()
    assert f"no virtual environment in {folder}" in line and "unset VIRTUAL_ENV" in line


def test_a_real_system_python_in_virtual_env_is_refused(project):
    """Only the Python of a virtual environment has two prefixes; a link to the system's has one."""
    folder = project.home / "linked"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(BASE_PYTHON)
    project.environment["VIRTUAL_ENV"] = str(folder)
    assert f"no virtual environment in {folder}" in project.fails()


# Which Python makes the environment -------------------------------------------------------------


@pytest.mark.parametrize("name", ["python3.14", "python3.15", "python3", "python"])
def test_the_only_python_is_used_whatever_its_name(name, project):
    """Only the new environment's pip is called, because the system's may be closed (PEP 668)."""
    (project.programs / "python3.12").unlink()
    project.python(project.programs, name, "3 14 x86_64")
    project.works()
    make, *others = project.installed.splitlines()
    assert make == f"{project.programs}/{name} -m venv --without-pip .venv"
    assert all(line.startswith(f"{project.repository}/.venv/bin/python ") for line in others)


def test_a_shim_of_pyenv_is_passed_over(project):
    """pyenv has a shim for every version, and most end with an error."""
    shim = 'echo "pyenv: $0: command not found" >&2; exit 127'
    for name in ("python3.11", "python3.12", "python"):
        fake_program(project.programs, name, shim)
    project.python(project.programs, "python3", "3 13 x86_64")
    project.works()
    assert f"{project.programs}/python3 -m venv" in project.installed


def test_a_python_of_uv_is_used(project):
    """uv keeps its Pythons off PATH."""
    (project.programs / "python3.12").rename(project.home / "python of uv")
    fake_program(project.programs, "uv", 'echo "$HOME/python of uv"')
    project.works()
    assert f"{project.home}/python of uv -m venv" in project.installed


def test_with_uv_but_no_python_the_remedy_is_uv(project):
    """uv installs a Python in seconds."""
    (project.programs / "python3.12").unlink()
    fake_program(project.programs, "uv", "exit 2")
    project.python(project.programs, "python", "2 7 x86_64")
    line = project.fails()
    assert "python is Python 2.7" in line and "uv python install 3.12" in line
