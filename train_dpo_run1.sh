#!/usr/bin/env bash
# From questions and answers to a fused model and its report. Run it again to resume a stopped run.
#
#   ./train_dpo_run1.sh [CONFIG] [--set section.key=value ...] [--launch "-n 2"] [--retries 3]
#
# CONFIG               the run's YAML file (default: config/mlx_granite-4.0-h-micro_dpo.yaml)
# --set KEY=VALUE      override a key of the file; repeat it for more keys
# --launch OPTIONS     options of mlx.launch for stages 06 and 10, which can use several processes
#                      (default: "-n 2" on a CPU with two or more cores); "none" uses one process
# --retries N          how often to start a stage again that the system aborted (default: 3)
# --check              print the minutes, memory and disk space that the run needs, and stop
# --selftest           check this machine with a tiny model, in about 2 minutes, and stop
# --help               print this text and stop
set -euo pipefail
caller=$PWD script=$(readlink -f "${BASH_SOURCE[0]}") || script=${BASH_SOURCE[0]}
# With CDPATH, cd may go elsewhere and print where.
CDPATH="" cd -- "$(dirname -- "$script")" > /dev/null
. scripts/environment.sh

config="" launch=auto retries=3 only="" options=()
while [ $# -gt 0 ]; do
  case $1 in
    --set=* | --launch=* | --retries=*)
      option=${1%%=*} value=${1#*=}; shift
      set -- "$option" "$value" "$@" ;;
    --set | --launch | --retries)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case $1 in --set) options+=(--set "$2") ;; *) printf -v "${1#--}" %s "$2" ;; esac
      shift 2 ;;
    --check) only=02_check_run.py; shift ;;
    --selftest) only=01_selftest.py; shift ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$script"; exit ;;
    -*) fail "unknown option $1; --help lists all options" ;;
    *) [ -z "$config" ] || fail "two config files given, $config and $1; name one"; config=$1; shift ;;
  esac
done
[[ $retries =~ ^[0-9]+$ ]] || fail "--retries: expected a whole number, found $retries"
case $config in
  "") config=$PWD/config/mlx_granite-4.0-h-micro_dpo.yaml ;;
  /*) ;;
  *) config=$caller/$config ;;
esac
[ -f "$config" ] || fail "$config: no such file; name the run's YAML file"
options=(--config "$config" ${options[@]+"${options[@]}"})

# stage LAUNCH SCRIPT: runs a stage in the background, so that this script can pass on signals. The
# stage then saves and ends; after a second signal it ends at once.
child="" signalled="" signalled_at=0 in_stage=""
stage() {
  local code=0
  in_stage=yes
  [ -z "$signalled" ] || exit "$signalled"
  PYTHONPATH="scripts${PYTHONPATH:+:$PYTHONPATH}" python -m dpo_mlx.process.supervisor \
    --launch="$1" --retries "$retries" --runner $$ "$2" ${options[@]+"${options[@]}"} & child=$!
  # The signal may have come before the child had a number.
  [ -z "$signalled" ] || kill -TERM "$child" 2> /dev/null || true
  wait "$child" || code=$?
  while kill -0 "$child" 2> /dev/null; do code=0; wait "$child" || code=$?; done
  child=""
  [ -z "$signalled" ] || exit "$signalled"
  in_stage=""
  return "$code"
}

hand_on() {
  local signal=TERM
  if [ -z "$signalled" ]; then
    signalled=$1 signalled_at=$SECONDS
  # A closed window and `timeout` send their signal twice at once; a hand that presses ^C means it.
  elif [ "$1" = 130 ] || [ $((SECONDS - signalled_at)) -gt 1 ]; then
    signal=USR1
  fi
  [ -n "$in_stage" ] || exit "$signalled"
  [ -z "$child" ] || kill -"$signal" "$child" 2> /dev/null || true
}
trap 'hand_on 129' HUP
trap 'hand_on 130' INT
trap 'hand_on 143' TERM

started=$SECONDS
# MLX compiles libraries into this folder, and loads those it finds there: nobody else may write it.
private=$(mktemp -d "${TMPDIR:-/tmp}/dpo.XXXXXX" 2> /dev/null || mktemp -d /tmp/dpo.XXXXXX) ||
  fail "no temporary folder can be made in ${TMPDIR:-/tmp}; set TMPDIR to a folder you can write to"
trap 'rm -rf "$private"' EXIT
export TMPDIR=$private
use_venv .venv requirements.txt
find_openblas
if [ -n "$only" ]; then
  retries=0
  if [ "$only" = 01_selftest.py ]; then
    options=()
  else  # the demo's model must be there to be checked
    stage none scripts/phase3-prepare-data-mlx/05_fetch_demo_model.py
  fi
  stage none "scripts/phase1-check-machine/$only"
  exit
fi
if is_mac && command -v caffeinate > /dev/null; then
  caffeinate -is -w $$ &
  export DPO_KEPT_AWAKE=1
  echo "-- keeping this Mac awake until the run ends; the display may sleep"
fi
[ -e data/.selftest.json ] || grep -q '^demo_model: true' "$config" ||
  echo "-- new to this machine? ./train_dpo_run1.sh --selftest checks it in about 2 minutes"
echo "-- set-up: $((SECONDS - started)) s"

stage none scripts/phase3-prepare-data-mlx/05_fetch_demo_model.py
stage "$launch" scripts/phase3-prepare-data-mlx/06_generate_dpo_pairs.py
# 3: a guard stopped training. Fuse the best adapters so far; the report says why it stopped.
stopped=0
stage "$launch" scripts/phase4-fine-tune-model/10_train_dpo.py || stopped=$?
[ "$stopped" -eq 0 ] || [ "$stopped" -eq 3 ] || exit "$stopped"
stage none scripts/phase4-fine-tune-model/11_fuse_adapters.py
# 1: the smoke test failed. If a guard had stopped the run already, its exit code stands.
smoke=0
stage none scripts/phase4-fine-tune-model/12_smoke_test.py || smoke=$?
[ "$smoke" -le 1 ] || exit "$smoke"
exit "$((stopped > 0 ? stopped : smoke))"
