#!/usr/bin/env bash
# One host of a TPU slice: launch/tpu_vm.sh copies this checkout there and calls this script on it.
#   bash launch/tpu_host.sh install     environment with the tpu extra; fetches a newer Python if the image has an old one
#   bash launch/tpu_host.sh run --config=... --workdir=... [--config.KEY=VALUE ...]
#                                       starts training in the background, so that it outlives the connection
#   bash launch/tpu_host.sh status      prints "none", "running" or "ended CODE"
#   bash launch/tpu_host.sh logs        prints the end of the log and follows it while training runs
#   bash launch/tpu_host.sh stop        asks training to save and stop, and waits until it has

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

job=$ROOT/runs/tpu_host # python: interpreter to use; shell, trainer: process ids; exit: code of the trainer; log: its output

status() {
  if [[ ! -s $job/shell ]]; then
    echo none
  elif kill -0 "$(cat "$job/shell")" 2>/dev/null; then
    echo running
  elif [[ -s $job/exit ]]; then
    echo "ended $(cat "$job/exit")"
  else
    echo 'ended 137' # killed together with the shell that would have noted the code
  fi
}

case ${1:-} in
  install)
    if ! (find_python) >/dev/null 2>&1; then
      say "this image has no Python 3.11 or newer; fetching 3.12 with uv"
      python3 -m pip install --quiet --user uv
      python3 -m uv python install --quiet 3.12
      PYTHON=$(python3 -m uv python find 3.12)
    fi
    make_env tpu
    mkdir -p "$job"
    echo "$ENV_PYTHON" >"$job/python"
    ;;
  run)
    shift
    [[ -s $job/python ]] || die "this host has no environment yet; first: bash launch/tpu_vm.sh install"
    [[ $(status) != running ]] || die "training runs on this host already; logs shows it, stop ends it"
    rm -f "$job/exit"
    cd "$ROOT"
    # shellcheck disable=SC2016 # the inner shell expands these
    nohup bash -c 'job=$1; shift; "$@" & echo $! >"$job/trainer"; code=0; wait $! || code=$?; echo $code >"$job/exit"' -- \
      "$job" "$(cat "$job/python")" -m mim_jax.train "$@" >>"$job/log" 2>&1 </dev/null &
    echo $! >"$job/shell"
    say "training runs in the background; its output goes to $job/log"
    ;;
  status) status ;;
  logs)
    [[ -e $job/log ]] || die "no run was started on this host"
    if [[ $(status) == running ]]; then
      tail -n 50 -f --pid="$(cat "$job/shell")" "$job/log"
    else
      tail -n 50 "$job/log"
    fi
    ;;
  stop)
    if [[ $(status) == running ]]; then
      kill -TERM "$(cat "$job/trainer")"
      while [[ $(status) == running ]]; do sleep 1; done
    fi
    status
    ;;
  -h | --help) usage "${BASH_SOURCE[0]}" ;;
  *) die "found '${1:-}', expected one of: install run status logs stop" ;;
esac
