#!/usr/bin/env bash
# All checks: ruff, mypy, pytest. Makes its own environment. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

use_venv .venv-tests requirements.txt tests/requirements.txt
find_openblas

ruff format --check --config tests/pyproject.toml .
ruff check --config tests/pyproject.toml .
mypy --config-file tests/pyproject.toml
LD_PRELOAD="$MLX_PRELOAD" python -m pytest -c tests/pyproject.toml tests "$@"
