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

# use_venv FOLDER REQUIREMENTS...: activates FOLDER, unless the user has activated an environment,
# and installs the requirements when their text has changed.
use_venv() {
  local folder=$1 fault file; shift
  require_mac_for_mlx
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    make_venv "$folder"
    . "$folder/bin/activate"
  fi
  [ -x "$VIRTUAL_ENV/bin/python" ] ||
    fail "the active environment $VIRTUAL_ENV has no Python; open a new terminal and run again"
  PATH="$VIRTUAL_ENV/bin:$PATH"
  fault=$(python_fault python)
  [ -z "$fault" ] ||
    fail "$VIRTUAL_ENV: its $fault, but MLX needs $PYTHONS; deactivate or delete it"
  local installed; installed="$VIRTUAL_ENV/.installed-$(basename "$folder")"
  if cat "$@" | cmp -s - "$installed"; then return; fi
  echo "setting up $VIRTUAL_ENV from $*"
  for file in "$@"; do
    python -m pip install --quiet --no-input --disable-pip-version-check -r "$file" ||
      fail "pip could not install $file, see above; check the network and run again"
  done
  cat "$@" > "$installed"
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

# make_venv FOLDER: makes a virtual environment, unless FOLDER is one that works. The mark says that
# FOLDER is ours to delete; an .installed file alone says only that we installed packages there.
make_venv() {
  local folder=$1 mark=$1/.made-by-dpo-mlx python
  if [ -e "$folder" ] || [ -L "$folder" ]; then
    [ -e "$mark" ] || [ -e "$folder/.installed-$(basename "$folder")" ] ||
      fail "this script did not make $folder; activate it to use it, or move it away"
    if [ -r "$folder/bin/activate" ] &&
      "$folder/bin/python" -c 'import pip._internal' &> /dev/null; then return; fi
    [ -e "$mark" ] || fail "the Python of $folder does not work; delete the folder or move it away"
    echo "-- $folder is incomplete, or its Python does not work: making it again"
  fi
  python=$(find_python)
  "$python" -c 'import ensurepip' 2> /dev/null || apt_install python3-venv ||
    fail "$python cannot make virtual environments; install python3-venv"
  rm -rf "$folder"
  mkdir "$folder"
  : > "$mark"  # before anything else, so that the next run can delete what an interrupted run left
  "$python" -m venv "$folder"
}

# Prints the name of the first Python that MLX has a wheel for.
find_python() {
  local name fault faults="" remedy="install one"
  for name in python3.{11,12,13,14,15} python3; do
    command -v "$name" > /dev/null || continue
    # Apple's Python is too old, and without the developer tools it opens a window to install them.
    if is_mac && [ "$(command -v "$name")" = /usr/bin/python3 ]; then continue; fi
    fault=$(python_fault "$name")
    if [ -z "$fault" ]; then echo "$name"; return; fi
    faults="${faults:+$faults; }$fault"
  done
  ! is_mac || remedy="get one from python.org, or run: brew install python@3.12"
  fail "no $PYTHONS on this machine${faults:+ ($faults)}; $remedy"
}

# python_fault PYTHON: prints why MLX has no wheel for it, or nothing.
python_fault() {
  local version major minor machine
  version=$("$1" -c 'import os, sys; print(*sys.version_info[:2], os.uname().machine)' \
    2> /dev/null) || version=""
  read -r major minor machine <<< "$version"
  if [ -z "$machine" ]; then
    echo "$1 does not run"
  elif ((major != 3 || minor < OLDEST_PYTHON || minor > NEWEST_PYTHON)); then
    echo "$1 is Python $major.$minor"
  elif is_mac && [ "$machine" != arm64 ]; then
    echo "$1 is an Intel Python, or runs under Rosetta"
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
