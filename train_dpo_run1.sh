#!/usr/bin/env bash
# From questions and answers to a fused model and its report. Run again, it goes on where it was.
#
#   ./train_dpo_run1.sh [CONFIG] [--launch "-n 2"] [--set section.key=value ...]
#
# --launch takes options of mlx.launch, which then starts the stages that can share their work. On a
# CPU with cores for it, that is "-n 2" unless it is given; --launch none starts one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh

config=config/mlx_granite-4.0-h-micro_dpo.yaml
if [ $# -gt 0 ] && [[ $1 != -* ]]; then config=$1; shift; fi
launch="" options=()
while [ $# -gt 0 ]; do
  case $1 in
    --launch) launch=${2:?needs options of mlx.launch}; shift 2 ;;
    *) options+=("$1"); shift ;;
  esac
done

# stage SCRIPT: in the background, so that a signal to this script reaches the stage, which saves and
# ends; ^C reaches both by itself, and the stage takes the second one as the same wish.
stage() {
  local started=$SECONDS code=0
  LD_PRELOAD="$MLX_PRELOAD" python "$1" --config "$config" ${options[@]+"${options[@]}"} & child=$!
  await || code=$?
  child=""
  finish "$1" "$started" "$code"
}

# shared_stage SCRIPT: by all processes that --launch asks for. mlx.launch tells nobody how they
# ended, so rank 0 writes its process number and its exit code to a file. Only rank 0 is signalled.
shared_stage() {
  if [ -z "$launch" ]; then stage "$1"; return; fi
  local started=$SECONDS code
  rank_0=$(mktemp)
  mlx.launch $launch --env "DPO_RANK_0=$rank_0" --env "LD_PRELOAD=$MLX_PRELOAD" \
    --env "OPENBLAS_NUM_THREADS=$(blas_threads)" -- \
    "$(command -v python)" "$1" --config "$config" ${options[@]+"${options[@]}"} < <(keep_awake) & child=$!
  await || true
  code=$(sed -n 2p "$rank_0")
  rm "$rank_0"
  child="" rank_0=""
  finish "$1" "$started" "${code:-1}"
}

# The launcher's threads never rest while a process has not refused what is typed.
keep_awake() {
  exec 2> /dev/null
  while sleep 2; do echo; done
}

# Processes on one CPU get in each other's way unless they share its cores.
blas_threads() {
  local here=1
  if [[ $launch =~ (-n|--repeat-hosts)[=\ ]*([0-9]+) ]]; then here=${BASH_REMATCH[2]}; fi
  local each=$(($(getconf _NPROCESSORS_ONLN) / here))
  echo "${OPENBLAS_NUM_THREADS:-$((each > 0 ? each : 1))}"
}

has_cpu_for_two() {
  [ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && python -c '
import sys, mlx.core as mx
sys.exit(mx.default_device() != mx.cpu)'
}

await() {
  local code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2> /dev/null; do wait "$child" || code=$?; done
  return "$code"
}

finish() {
  [ -z "$signalled" ] || exit "$signalled"
  echo "-- $(basename "$1"): $((SECONDS - $2)) s" >&2
  return "$3"
}

child="" signalled="" rank_0=""
hand_on() {
  signalled=$1
  [ -n "$child" ] || exit "$signalled"
  if [ -z "$rank_0" ]; then kill -TERM "$child" 2> /dev/null || true
  else
    while [ ! -s "$rank_0" ] && kill -0 "$child" 2> /dev/null; do sleep 0.1; done
    kill -TERM "$(head -n 1 "$rank_0")" 2> /dev/null || true
  fi
}
trap 'hand_on 130' INT
trap 'hand_on 143' TERM

started=$SECONDS
use_venv .venv requirements.txt
find_openblas
# On a CPU two processes with half of the cores each get more done than one with all. Two runs beside
# each other need ports of their own; Linux gives away none of these by itself.
if [ "$launch" = none ]; then
  launch=""
elif [ -z "$launch" ] && has_cpu_for_two; then
  launch="-n 2 --starting-port $((20000 + RANDOM % 10000))"
  echo "-- two processes share stages 06 and 10; --launch none starts one"
fi
echo "-- set-up: $((SECONDS - started)) s"

stage scripts/phase3-prepare-data-mlx/05_fetch_demo_model.py
shared_stage scripts/phase3-prepare-data-mlx/06_generate_dpo_pairs.py
# 3: stopped by a guard. The best adapters before that are fused, and the report tells the story.
stopped=0
shared_stage scripts/phase4-fine-tune-model/10_train_dpo.py || stopped=$?
[ "$stopped" -eq 0 ] || [ "$stopped" -eq 3 ] || exit "$stopped"
stage scripts/phase4-fine-tune-model/11_fuse_adapters.py
# 1: the report finds a limit crossed, which of a stopped run is no other news.
found=0
stage scripts/phase4-fine-tune-model/12_smoke_test.py || found=$?
[ "$found" -le 1 ] || exit "$found"
exit "$((stopped > 0 ? stopped : found))"
