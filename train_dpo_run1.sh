#!/usr/bin/env bash
# From questions and answers to a fused model and its report. Run again, it goes on where it was.
#
#   ./train_dpo_run1.sh [CONFIG] [--set section.key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh

config=config/mlx_granite-4.0-h-micro_dpo.yaml
if [ $# -gt 0 ] && [[ $1 != -* ]]; then config=$1; shift; fi

stage() {
  local script=$1; shift
  local started=$SECONDS
  LD_PRELOAD="$MLX_PRELOAD" python "$script" --config "$config" "$@" || return
  echo "-- $(basename "$script"): $((SECONDS - started)) s"
}

started=$SECONDS
use_venv .venv requirements.txt
find_openblas
echo "-- set-up: $((SECONDS - started)) s"

stage scripts/phase3-prepare-data-mlx/05_fetch_demo_model.py "$@"
stage scripts/phase3-prepare-data-mlx/06_generate_dpo_pairs.py "$@"
# 3: stopped by a guard. The best adapters before that are fused, and the report tells the story.
stopped=0
stage scripts/phase4-fine-tune-model/10_train_dpo.py "$@" || stopped=$?
[ "$stopped" -eq 0 ] || [ "$stopped" -eq 3 ] || exit "$stopped"
stage scripts/phase4-fine-tune-model/11_fuse_adapters.py "$@"
# The report's path once more, as the last line.
stage scripts/phase4-fine-tune-model/12_smoke_test.py "$@" |
  awk '{ print } sub(/^12: report: /, "") { path = $0 } END { if (path) print path }'
exit "$stopped"
