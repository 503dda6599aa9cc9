# Sourced by train_dpo_run1.sh and tests/run.sh, in the repository's root: a virtual environment
# with what a requirements file names, and OpenBLAS for MLX on Linux CPUs.

# mlx 0.32 has wheels for Apple silicon with macOS 14 or later, and for Python up to 3.15.
OLDEST_MACOS=14 OLDEST_PYTHON=11 NEWEST_PYTHON=15
PYTHONS="Python 3.$OLDEST_PYTHON to 3.$NEWEST_PYTHON"

fail() {
  echo "error: $*" >&2
  exit 1
}

is_mac() { [ "$(uname -s)" = Darwin ]; }

# use_venv FOLDER REQUIREMENTS...: activates FOLDER (made if missing) unless a virtual environment
# is active already, and installs the requirements when their text has changed.
use_venv() {
  local folder=$1; shift
  require_machine
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    is_whole_venv "$folder" || make_venv "$folder"
    . "$folder/bin/activate"
  fi
  [ -x "$VIRTUAL_ENV/bin/python" ] ||
    fail "the active environment $VIRTUAL_ENV has no Python; open a new terminal, and run again"
  PATH="$VIRTUAL_ENV/bin:$PATH"
  local fault; fault=$(python_fault python)
  [ -z "$fault" ] || fail "$VIRTUAL_ENV: its $fault, but MLX needs $PYTHONS; deactivate or delete it"
  local stamp="$VIRTUAL_ENV/.installed-$(basename "$folder")"
  if ! cat "$@" | cmp -s - "$stamp"; then
    echo "setting up $VIRTUAL_ENV from $*"
    local file
    for file in "$@"; do
      python -m pip install --quiet --no-input --disable-pip-version-check -r "$file" ||
        fail "pip could not install $file, see above; mend that (is there a network?), and run again"
    done
    cat "$@" > "$stamp"
  fi
}

# Fails on a Mac that MLX has no wheel for.
require_machine() {
  is_mac || return 0
  # Also 1 under Rosetta, where uname says x86_64.
  [ "$(sysctl -n hw.optional.arm64 2> /dev/null)" = 1 ] ||
    fail "MLX needs Apple silicon (M1 or later); this Mac has an Intel processor"
  local version; version=$(sw_vers -productVersion)
  [ "${version%%.*}" -ge "$OLDEST_MACOS" ] ||
    fail "MLX needs macOS $OLDEST_MACOS or later, and this Mac runs macOS $version; update it and run again"
}

# The mark tells an environment that make_venv made, whole or not, from one of the user's.
VENV_MARK=.made-by-dpo-mlx

# is_whole_venv FOLDER: whether it is an environment of ours that can be used; fails when FOLDER is
# something else.
is_whole_venv() {
  [ -e "$1" ] || [ -L "$1" ] || return 1
  local stamp; stamp="$1/.installed-$(basename "$1")"
  [ -e "$1/$VENV_MARK" ] || [ -e "$stamp" ] ||
    fail "$1 was not made by this script; activate it to install the packages there, or move it away"
  [ -r "$1/bin/activate" ] && "$1/bin/python" -c 'import pip._internal' > /dev/null 2>&1 && return
  # Packages may have been installed into an environment of the user's: only one with the mark goes.
  [ -e "$1/$VENV_MARK" ] || fail "$1: its Python is gone; delete it, or move it away"
  echo "-- $1 was left half-made, or its Python is gone: making it again"
  return 1
}

# Debian keeps what `python -m venv` needs in a package of its own.
make_venv() {
  local python; python=$(find_python)
  if ! "$python" -c 'import ensurepip' 2> /dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
      apt_install python3-venv
    else
      fail "$python cannot make virtual environments; install python3-venv"
    fi
  fi
  rm -rf "$1"
  mkdir "$1"
  : > "$1/$VENV_MARK"  # first: if this is interrupted, the next run knows whose the folder is
  "$python" -m venv "$1"
}

apt_install() {
  echo "installing $1"
  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "$1" > /dev/null
}

# Prints the name of a Python that MLX has a wheel for; fails when there is none.
find_python() {
  local name fault faults="" remedy="install one"
  for name in python3.11 python3.12 python3.13 python3.14 python3.15 python3; do
    command -v "$name" > /dev/null || continue
    # Apple's own Python is too old. Without the developer tools it only offers to install them.
    [ "$(command -v "$name")" != /usr/bin/python3 ] || ! is_mac || continue
    fault=$(python_fault "$name")
    if [ -z "$fault" ]; then echo "$name"; return; fi
    faults="${faults:+$faults; }$fault"
  done
  ! is_mac || remedy="get one from python.org, or run: brew install python@3.12"
  fail "no $PYTHONS found${faults:+ ($faults)}; $remedy"
}

# python_fault PYTHON: prints why MLX has no wheel for it, and nothing when it has one.
python_fault() {
  local major="" minor="" machine=""
  read -r major minor machine < <(
    "$1" -c 'import os, sys; print(*sys.version_info[:2], os.uname().machine)' 2> /dev/null
  ) || true
  if [ -z "$machine" ]; then echo "$1 does not run"
  elif ((major != 3 || minor < OLDEST_PYTHON || minor > NEWEST_PYTHON)); then
    echo "$1 is Python $major.$minor"
  elif is_mac && [ "$machine" != arm64 ]; then
    echo "$1 is an Intel Python, or Rosetta runs it as one"
  fi
}

# MLX's Linux wheel brings a reference BLAS that is some 60 times slower than OpenBLAS at float32
# matrix products. Sets MLX_PRELOAD, which goes before MLX processes as LD_PRELOAD.
find_openblas() {
  export MLX_PRELOAD=""
  [ "$(uname -s)" = Linux ] || return 0
  if ! has_openblas && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    apt_install libopenblas0-pthread || echo "note: apt-get could not install it" >&2
  fi
  if has_openblas; then
    MLX_PRELOAD=libopenblas.so.0
  else
    echo "note: no OpenBLAS; on a CPU matrix products are some 60 times slower without" \
      "(install libopenblas0-pthread)" >&2
  fi
}

has_openblas() { [[ $(PATH=$PATH:/sbin ldconfig -p 2> /dev/null) == *libopenblas.so.0* ]]; }
