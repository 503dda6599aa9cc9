#!/usr/bin/env bash
# From questions and answers to a fused model and its report. To resume a run, start it again.
#
#   ./train_dpo_run1.sh [CONFIG] [--set section.key=value ...] [--launch "-n 2"] [--retries 3]
#
# CONFIG               the run's YAML file (default: config/mlx_granite-4.0-h-micro_dpo.yaml)
# --set KEY=VALUE      override a key of the file; repeat it for more keys
# --launch OPTIONS     options of mlx.launch for stages 06 and 10, which can use several processes
#                      (default: "-n 2" on a CPU with two or more cores); "none" uses one process
# --retries N          how often to restart a stage that the system aborted (default: 3)
# --check              print the minutes, memory and disk space that the run needs, and stop
# --selftest           check this machine with a tiny model, in about 2 minutes, and stop
# --help               print this text and stop
set -euo pipefail
caller=$PWD script=$(readlink -f "${BASH_SOURCE[0]}") || script=${BASH_SOURCE[0]}
# With CDPATH set, cd could go elsewhere and print a line.
CDPATH="" cd -- "$(dirname -- "$script")" > /dev/null
. scripts/environment.sh

config="" task="" options=(--launch=auto)
while [ $# -gt 0 ]; do
  argument=$1; shift
  case $argument in --set | --launch | --retries)
    [ $# -gt 0 ] || fail "$argument needs a value; see --help"
    argument+="=$1"; shift ;;
  esac
  case $argument in
    --retries= | --retries=*[!0-9]*) fail "$argument: give a whole number, such as --retries 3" ;;
    --set=* | --launch=* | --retries=*) options+=("$argument") ;;
    --check | --selftest) task=$argument ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$script"; exit ;;
    -*) fail "unknown option $argument; --help lists all options" ;;
    *) [ -z "$config" ] || fail "two config files, $config and $argument; give only one"
       config=$argument ;;
  esac
done
[ -n "$config" ] || config=$PWD/config/mlx_granite-4.0-h-micro_dpo.yaml
[[ $config = /* ]] || config=$caller/$config
[ -f "$config" ] || fail "$config: no such file; give the path of the run's YAML file"
options+=(--config="$config")

# stage SCRIPT: runs a stage under its supervisor, in the background so that signals arrive at once.
stage() {
  local code
  PYTHONPATH=scripts \
    python -m dpo_mlx.process.supervisor --runner=$$ "${options[@]}" "scripts/$1" &
  # A signal interrupts `wait`. Without 2>, bash would print how a signal ended the supervisor.
  while code=0; wait "$!" || code=$?; kill -0 "$!"; do :; done 2> /dev/null
  return "${signal_code:-$code}"
}

# on_signal CODE NAME: passes each signal on. The supervisor decides what a second one means.
signal_code=""
on_signal() {
  signal_code=${signal_code:-$1}
  kill "-$2" $(jobs -p) 2> /dev/null || exit "$signal_code"  # kill fails when no stage runs
}
trap 'on_signal 129 HUP' HUP
trap 'on_signal 130 USR1' INT  # bash starts background processes with SIGINT ignored
trap 'on_signal 143 TERM' TERM

# MLX compiles libraries into TMPDIR and loads what it finds there: no other user may write to it.
private=""  # also when the environment has a variable of this name
trap 'rm -rf "$private"' EXIT
private=$(mktemp -d "${TMPDIR:-/tmp}/dpo.XXXXXX" 2> /dev/null || mktemp -d /tmp/dpo.XXXXXX) ||
  fail "cannot make a folder in ${TMPDIR:-/tmp}; set TMPDIR to a folder that you can write to"
export TMPDIR=$private
use_venv .venv requirements.txt
find_openblas

case $task in
  --selftest) options=(--retries=0); stage phase1-check-machine/01_selftest.py; exit ;;
  --check) options+=(--retries=0)
    stage phase3-prepare-data-mlx/05_fetch_demo_model.py  # the check reads the model's files
    stage phase1-check-machine/02_check_run.py; exit ;;
esac
if is_mac && command -v caffeinate > /dev/null; then
  (caffeinate -is -w $$ &)  # in a subshell, or on_signal would end it
  export DPO_KEPT_AWAKE=1
  echo "-- keeping this Mac awake until the run ends; the display may sleep"
fi
[ -e data/.selftest.json ] || grep -q '^demo_model: true' "$config" ||
  echo "-- new to this machine? ./train_dpo_run1.sh --selftest checks it in about 2 minutes"
echo "-- set-up: $SECONDS s"

training=0 smoke_test=0
stage phase3-prepare-data-mlx/05_fetch_demo_model.py
stage phase3-prepare-data-mlx/06_generate_dpo_pairs.py
# 3: a guard stopped training. Fuse the best checkpoint; the report says why training stopped.
stage phase4-fine-tune-model/10_train_dpo.py || training=$?
[[ $training = [03] ]] || exit "$training"
stage phase4-fine-tune-model/11_fuse_adapters.py
# 1: the smoke test failed. If a guard stopped training, keep its exit code.
stage phase4-fine-tune-model/12_smoke_test.py || smoke_test=$?
[ "$smoke_test" -gt 1 ] || [ "$training" -eq 0 ] || exit "$training"
exit "$smoke_test"
