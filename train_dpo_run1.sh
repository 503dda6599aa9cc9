#!/usr/bin/env bash
# From questions and answers to a fused model and its report. Run again, it goes on where it was.
#
#   ./train_dpo_run1.sh [CONFIG] [--set section.key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh

config=config/mlx_granite-4.0-h-micro_dpo.yaml
if [ $# -gt 0 ] && [[ $1 != -* ]]; then config=$1; shift; fi

# In the background, so that a signal to this script reaches the stage, which saves and ends; ^C
# reaches both by itself, and the stage takes the second one as the same wish.
stage() {
  local script=$1; shift
  local started=$SECONDS code=0
  LD_PRELOAD="$MLX_PRELOAD" python "$script" --config "$config" "$@" & child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2> /dev/null; do wait "$child" || code=$?; done
  child=""
  [ -z "$signalled" ] || exit "$signalled"
  echo "-- $(basename "$script"): $((SECONDS - started)) s" >&2
  return "$code"
}

child="" signalled=""
hand_on() {
  signalled=$1
  [ -n "$child" ] || exit "$signalled"
  kill -TERM "$child" 2> /dev/null || true
}
trap 'hand_on 130' INT
trap 'hand_on 143' TERM

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
stage scripts/phase4-fine-tune-model/12_smoke_test.py "$@"
exit "$stopped"
