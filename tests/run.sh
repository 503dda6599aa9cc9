#!/usr/bin/env bash
# Runs all checks in an environment of their own: ruff, mypy and pytest, which gets the arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

use_venv .venv-tests scripts/requirements.lock tests/requirements.txt
find_openblas

ruff format --check --config tests/pyproject.toml .
ruff check --config tests/pyproject.toml .
mypy --config-file tests/pyproject.toml
# Two processes with one thread each: the tests' models are too tiny to gain from more threads.
OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 LD_PRELOAD="$MLX_PRELOAD" \
  python -m pytest -c tests/pyproject.toml -n 2 --dist loadfile tests "$@"
