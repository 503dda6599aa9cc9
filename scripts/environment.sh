# Sourced by train_dpo_run1.sh and tests/run.sh in the repository's root. Sets up a virtual
# environment, and OpenBLAS for MLX on Linux CPUs.

# mlx 0.32 has wheels for Apple silicon with macOS 14 or later, and for Python 3.11 to 3.15.
OLDEST_MACOS=14 OLDEST_PYTHON=11 NEWEST_PYTHON=15
PYTHONS="Python 3.$OLDEST_PYTHON to 3.$NEWEST_PYTHON"

fail() {
  echo "error: $*" >&2
  exit 1
}

is_mac() { [ "$(uname -s)" = Darwin ]; }

# use_venv FOLDER REQUIREMENTS...: puts a virtual environment first on PATH: the one that the user
# has activated, or else FOLDER. Installs the requirements when they or the environment have
# changed since the last time; otherwise it needs no network.
use_venv() {
  local folder=$1 installed state; shift
  require_mac_for_mlx
  ignore_python_variables
  if [ -n "${VIRTUAL_ENV:-}" ] && ! { [ "$VIRTUAL_ENV" -ef "$folder" ] && is_ours "$folder"; }; then
    check_active_venv
  else
    make_venv "$folder"
    # bin/activate would not do: in a moved or copied folder it activates the one it was made in.
    export VIRTUAL_ENV=$PWD/$folder
  fi
  PATH="$VIRTUAL_ENV/bin:$PATH"
  installed="$VIRTUAL_ENV/.installed-$(basename "$folder")"
  state=$(echo "# $VIRTUAL_ENV, $(python -V)"; cat "$@")
  if [ "$state" = "$(cat "$installed" 2> /dev/null)" ]; then return; fi
  if is_ours "$VIRTUAL_ENV"; then
    echo "-- setting up $VIRTUAL_ENV from $*"
  else
    echo "-- installing into the environment $VIRTUAL_ENV:" $(packages "$@")
  fi
  install_packages "$@"
  ! is_ours "$VIRTUAL_ENV" || make_movable
  [ ! -w "$VIRTUAL_ENV" ] || echo "$state" > "$installed"  # else pip looks again next time
}

# Checks the environment that the user has activated. The script does not repair it.
check_active_venv() {
  local fault
  [ -x "$VIRTUAL_ENV/bin/python" ] ||
    fail "the active environment $VIRTUAL_ENV has no Python (the environment, or the Python that" \
      "made it, was moved or deleted); open a new terminal and start again"
  fault=$(python_fault "$VIRTUAL_ENV/bin/python" "$VIRTUAL_ENV")
  [ -z "$fault" ] ||
    fail "$fault, but MLX needs $PYTHONS in a virtual environment; run \"deactivate\" or" \
      "\"unset VIRTUAL_ENV\" and start again: this script makes its own"
}

# With PYTHONHOME, a virtual environment's Python works in that folder instead; with PYTHONPATH, it
# takes packages from there.
ignore_python_variables() {
  local name
  for name in PYTHONHOME PYTHONPATH; do
    [ -z "${!name:-}" ] || echo "note: ignoring $name, which is set to ${!name}" >&2
    unset "$name"
  done
}

# packages REQUIREMENTS...: prints the names of the packages in these files.
packages() { sed -n 's/^\([A-Za-z0-9][A-Za-z0-9._-]*\).*/\1/p' "$@" | sort -u; }

# install_packages REQUIREMENTS...: with pip, or with uv where Python brings no pip.
install_packages() {
  local file pip=(python -m pip install --quiet --no-input --disable-pip-version-check)
  if ! has_pip && ! add_pip; then
    has_uv || fail "$VIRTUAL_ENV has no pip that works; install uv, or make that environment again"
    pip=(uv pip install --quiet --python "$VIRTUAL_ENV/bin/python")
  fi
  for file in "$@"; do
    # A user's settings of pip must not send the packages elsewhere.
    PIP_USER=0 PIP_TARGET="" PIP_PREFIX="" PIP_ROOT="" PIP_PYTHON="" "${pip[@]}" -r "$file" ||
      fail "could not install $file into $VIRTUAL_ENV, see above; check the network and run again"
  done
}

has_pip() { python -c 'import pip._internal' &> /dev/null; }

has_uv() { command -v uv > /dev/null; }

# Adds the pip that Python brings.
add_pip() {
  get_ensurepip python || return 1
  echo "-- adding pip to $VIRTUAL_ENV"
  python -m ensurepip --default-pip > /dev/null && has_pip
}

# get_ensurepip PYTHON: Debian has it in a package of its own, which uv makes unnecessary.
get_ensurepip() {
  if "$1" -c 'import ensurepip, venv' &> /dev/null; then return; fi
  ! has_uv && apt_install "$(venv_package "$1")"
}

# venv_package PYTHON: prints the name of Debian's package with PYTHON's ensurepip.
venv_package() { "$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'; }

# venv writes the environment's path into bin/activate, and pip into all scripts in bin/. Writes
# bin/activate again, and lets the scripts look for the Python beside them.
make_movable() {
  python - "$VIRTUAL_ENV" << 'END'
import pathlib, re, sys, venv

folder = pathlib.Path(sys.argv[1])
builder = venv.EnvBuilder()
builder.setup_scripts(builder.ensure_directories(str(folder)))
python = rb"[^\n]*/%s/bin/python[0-9.]*" % re.escape(folder.name).encode()
start = rb"#!(%s|/bin/sh\n'''exec' %s[^\n]*\n' ''')\n" % (python, python)
movable = b"""#!/bin/sh
'''exec' "$(dirname -- "$(realpath -- "$0")")/python" "$0" "$@"
' '''
"""
for file in folder.joinpath("bin").iterdir():
    if file.is_file() and not file.is_symlink() and (match := re.match(start, file.read_bytes())):
        file.write_bytes(movable + file.read_bytes()[match.end() :])
END
}

require_mac_for_mlx() {
  is_mac || return 0
  # uname says x86_64 under Rosetta; this is 1 there too.
  [ "$(sysctl -n hw.optional.arm64 2> /dev/null)" = 1 ] ||
    fail "MLX needs Apple silicon (M1 or later); this Mac has an Intel processor"
  local version; version=$(sw_vers -productVersion)
  [ "${version%%.*}" -ge "$OLDEST_MACOS" ] ||
    fail "MLX needs macOS $OLDEST_MACOS or later; this Mac runs macOS $version, so update it first"
}

# The mark says that FOLDER is ours to delete; an .installed file alone says only that we installed
# packages there.
is_ours() { [ -e "$1/.made-by-dpo-mlx" ]; }

# make_venv FOLDER: makes a virtual environment without packages, unless FOLDER is one that works.
make_venv() {
  local folder=$1 fault python
  [[ $PWD != *:* ]] ||
    fail "no virtual environment can be in $PWD, because of the colon; rename that folder" \
      "(the Finder shows a colon as a slash)"
  if [ -e "$folder" ] || [ -L "$folder" ]; then
    is_ours "$folder" || [ -e "$folder/.installed-$(basename "$folder")" ] ||
      fail "this script did not make $folder; to use it, run \"source $folder/bin/activate\" and" \
        "start again; or else move it away"
    fault=$(python_fault "$folder/bin/python" "$folder")
    if [ -z "$fault" ]; then return; fi
    is_ours "$folder" || fail "$fault; delete the folder $folder or move it away"
    echo "-- $fault: making $folder again"
  fi
  if [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
    fail "the conda environment $CONDA_PREFIX is active, and this script installs into none;" \
      "run \"conda deactivate\" and start again: it makes the virtual environment $folder"
  fi
  python=$(find_python)
  get_ensurepip "$python" || has_uv ||
    fail "$python cannot make environments with pip; install $(venv_package "$python") or uv"
  rm -rf "$folder"
  mkdir "$folder"
  : > "$folder/.made-by-dpo-mlx"  # at once, so that a later run can delete an incomplete folder
  "$python" -m venv --without-pip "$folder" ||
    fail "$python could not make the virtual environment $folder, see above"
}

# Prints the name of the first Python that MLX has a wheel for.
find_python() {
  local name fault faults="" remedy="install one"
  for name in python3.{11,12,13,14,15} python3 python "$(python_of_uv)"; do
    command -v "$name" > /dev/null || continue
    # Apple's Python is too old, and without the developer tools it opens a window to install them.
    if is_mac && [ "$(command -v "$name")" = /usr/bin/python3 ]; then continue; fi
    fault=$(python_fault "$name")
    if [ -z "$fault" ]; then echo "$name"; return; fi
    faults="${faults:+$faults; }$fault"
  done
  ! is_mac || remedy="get one from python.org, or run: brew install python@3.12"
  ! has_uv || remedy="run: uv python install 3.12"
  fail "no $PYTHONS on this machine${faults:+ ($faults)}; $remedy"
}

# Prints the path of a Python that uv has installed. It is not on PATH.
python_of_uv() {
  local versions=">=3.$OLDEST_PYTHON,<3.$((NEWEST_PYTHON + 1))"
  uv python find --system --python-preference only-managed "$versions" 2> /dev/null || true
}

# python_fault PYTHON [VENV]: prints why MLX has no wheel for PYTHON, or why PYTHON does not work in
# the virtual environment VENV. Prints nothing if all is well.
python_fault() {
  local answer major minor machine is_venv
  # Only in a virtual environment are the prefixes two. Python 2 knows no base_prefix.
  answer=$("$1" -c 'import os, sys
is_venv = sys.prefix != getattr(sys, "base_prefix", sys.prefix)
is_venv = is_venv and os.path.samefile(sys.prefix, sys.argv[1])
print("%d %d %s %s" % (sys.version_info[:2] + (os.uname()[4], is_venv)))' "${2:-/}" \
    2> /dev/null) || answer=""
  read -r major minor machine is_venv <<< "$answer"
  if [ -z "$machine" ]; then
    echo "$1 does not run"
  elif ((major != 3 || minor < OLDEST_PYTHON || minor > NEWEST_PYTHON)); then
    echo "$1 is Python $major.$minor"
  elif is_mac && [ "$machine" != arm64 ]; then
    echo "$1 is an Intel Python, or runs under Rosetta"
  elif [ $# -gt 1 ] && [ "$is_venv" != True ]; then
    echo "$1 belongs to no virtual environment in $2"
  fi
}

# MLX's Linux wheel brings a reference BLAS, which multiplies float32 matrices about 60 times slower
# than OpenBLAS. MLX processes get MLX_PRELOAD as their LD_PRELOAD.
find_openblas() {
  export MLX_PRELOAD=""
  [ "$(uname -s)" = Linux ] || return 0
  if has_openblas || { apt_install libopenblas0-pthread && has_openblas; }; then
    MLX_PRELOAD=libopenblas.so.0
  else
    echo "note: without OpenBLAS, matrix products on a CPU are about 60 times slower; install" \
      "libopenblas0-pthread" >&2
  fi
}

has_openblas() { [[ $(PATH=$PATH:/sbin ldconfig -p 2> /dev/null) == *libopenblas.so.0* ]]; }

# apt_install PACKAGE: works for root on Debian and its relatives.
apt_install() {
  [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || return 1
  echo "installing $1"
  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "$1" > /dev/null
}
