# Sourced by train_dpo_run1.sh and tests/run.sh, in the repository's root: a virtual environment
# with what a requirements file names, and OpenBLAS for MLX on Linux CPUs.

# use_venv FOLDER REQUIREMENTS...: activates FOLDER (made if missing) unless a virtual environment
# is active already, and installs the files again only when their text has changed.
use_venv() {
  local folder=$1; shift
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x "$folder/bin/pip" ] || make_venv "$folder"
    . "$folder/bin/activate"
  fi
  PATH="$VIRTUAL_ENV/bin:$PATH"
  local stamp="$VIRTUAL_ENV/.installed-$(basename "$folder")"
  if ! cat "$@" | cmp -s - "$stamp"; then
    echo "setting up $VIRTUAL_ENV from $*"
    local file
    for file in "$@"; do python -m pip install --quiet --disable-pip-version-check -r "$file"; done
    cat "$@" > "$stamp"
  fi
}

# Debian keeps what `python -m venv` needs in a package of its own.
make_venv() {
  local python; python=$(find_python)
  if ! "$python" -c 'import ensurepip' 2> /dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
      apt_install python3-venv
    else
      echo "error: $python cannot make virtual environments; install python3-venv" >&2
      return 1
    fi
  fi
  "$python" -m venv "$1"
}

apt_install() {
  echo "installing $1"
  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "$1" > /dev/null
}

find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: no Python 3.11 or later found; install one" >&2
  return 1
}

# MLX's Linux wheel brings a reference BLAS that is some 60 times slower than OpenBLAS at float32
# matrix products. Sets MLX_PRELOAD, which goes before MLX processes as LD_PRELOAD.
find_openblas() {
  MLX_PRELOAD=""
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
