#!/usr/bin/env bash
# All checks: ruff, mypy, pytest. Makes its own environment. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

use_venv .venv-tests scripts/requirements.lock tests/requirements.txt
find_openblas

ruff format --check --config tests/pyproject.toml .
ruff check --config tests/pyproject.toml .
mypy --config-file tests/pyproject.toml
# Two processes, each with one thread: models as tiny as the tests' gain nothing from more.
OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 LD_PRELOAD="$MLX_PRELOAD" \
  python -m pytest -c tests/pyproject.toml -n 2 --dist loadfile tests "$@"
