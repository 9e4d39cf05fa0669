#!/usr/bin/env bash
# Trains on the GPUs of this machine, or of several machines reached by ssh.
#   bash launch/gpu.sh [--hosts=A,B,... [--port=12355]] --config=FILE --workdir=DIR [--config.KEY=VALUE ...] [--dry-run]
# Makes the environment with the cuda extra first (MIM_EXTRAS=cuda,wandb for others). One process drives all GPUs of a host.
# With --hosts, each host must have this checkout and the work folder under the same path, and A's port must be open to the
# others; the output of each goes to runs/gpu_HOST.log. When one host fails, all are stopped; the same command resumes.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

hosts=() port=12355 train=() config='' workdir=''
for arg in "$@"; do
  case $arg in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --hosts=*) IFS=, read -r -a hosts <<<"${arg#*=}" ;;
    --port=*) port=${arg#*=} ;;
    --config=*) config=$arg train+=("$arg") ;;
    --workdir=*) workdir=$arg train+=("$arg") ;;
    --config.*) train+=("$arg") ;;
    *) die "found '$arg', which is no option; see bash launch/gpu.sh --help" ;;
  esac
done
[[ -n $config && -n $workdir ]] || die "expected --config=FILE and --workdir=DIR"

if [[ ${#hosts[@]} == 0 ]]; then
  IFS=, read -r -a extras <<<"${MIM_EXTRAS:-cuda}"
  make_env "${extras[@]}"
  finish "$ENV_PYTHON" -m mim_jax.train "${train[@]}"
fi

processes=()
stop() { # closing the connection ends the remote process, as it has a terminal of its own (ssh -tt)
  local process
  for process in ${processes[@]+"${processes[@]}"}; do kill "$process" 2>/dev/null || true; done
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

[[ $DRY_RUN == 1 ]] || mkdir -p "$ROOT/runs"
for index in "${!hosts[@]}"; do
  setting=(MIM_COORDINATOR="${hosts[0]}:$port" MIM_PROCESSES="${#hosts[@]}" MIM_PROCESS_ID="$index")
  [[ -z ${MIM_EXTRAS:-} ]] || setting+=(MIM_EXTRAS="$MIM_EXTRAS")
  command="cd $(quoted "$ROOT") && $(quoted env "${setting[@]}" bash launch/gpu.sh "${train[@]}")"
  if [[ $DRY_RUN == 1 ]]; then
    run ssh -tt "${hosts[index]}" "$command"
  else
    ssh -tt "${hosts[index]}" "$command" >"$ROOT/runs/gpu_${hosts[index]}.log" 2>&1 </dev/null &
    processes+=($!)
    say "host ${hosts[index]}: output in runs/gpu_${hosts[index]}.log"
  fi
done

for process in ${processes[@]+"${processes[@]}"}; do # as often as there are hosts, whichever ends next
  wait -n || die "a host failed; the others are being stopped; see runs/gpu_*.log"
done
