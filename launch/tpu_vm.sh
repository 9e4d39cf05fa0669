#!/usr/bin/env bash
# Trains on a Cloud TPU slice, called on your own machine, which needs `gcloud` with a project and a login.
#   bash launch/tpu_vm.sh VERB --name=NAME --zone=ZONE [--project=PROJECT] [--dry-run] ...
# Verbs, in the order of use:
#   create --type=v5litepod-16 [--spot | --reserved] [--version=RUNTIME]   asks for a slice as a queued resource and waits for it
#   install [--prepare=COMMAND]          copies this checkout to all hosts of the slice and installs it there; COMMAND, such as
#                                        one that mounts a shared disk, is run on each host before that
#   run --config=FILE --workdir=DIR [--config.KEY=VALUE ...]               starts training on all hosts, in the background
#   status                               state of the slice and of the run on each host
#   logs [--worker=N]                    log of host N (default 0), followed while training runs
#   resume --every=60 and the options of create, install and run           watches until the run has ended; after a preemption
#                                        it creates the slice again, installs, and runs the same command, which resumes by itself
#   stop                                 training saves and stops, the slice stays
#   delete                               gives the slice back
# --type is the accelerator type (v4-32, v5p-32, v5litepod-16, v6e-16, ...), --version its software version, by default the one
# that Cloud TPU names for that type. NAME and ZONE may also come from $TPU_NAME and $TPU_ZONE. All hosts must see the work
# folder under the same path, and it must survive the slice: a mounted bucket or network disk. --dry-run prints the commands
# instead of running them.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

verb=${1:-}
case $verb in
  create | install | run | status | logs | resume | stop | delete) shift ;;
  -h | --help | '') usage "${BASH_SOURCE[0]}" && exit ;;
  *) die "found '$verb', expected one of: create install run status logs resume stop delete" ;;
esac

name=${TPU_NAME:-} zone=${TPU_ZONE:-} project='' type='' version='' prepare='' worker=0 every=60 capacity=() train=()
for arg in "$@"; do
  case $arg in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --name=*) name=${arg#*=} ;;
    --zone=*) zone=${arg#*=} ;;
    --project=*) project=${arg#*=} ;;
    --type=*) type=${arg#*=} ;;
    --version=*) version=${arg#*=} ;;
    --prepare=*) prepare=${arg#*=} ;;
    --worker=*) worker=${arg#*=} ;;
    --every=*) every=${arg#*=} ;;
    --spot | --reserved) capacity=("$arg") ;;
    --config=* | --config.* | --workdir=*) train+=("$arg") ;;
    *) die "found '$arg', which is no option of $verb; see bash launch/tpu_vm.sh --help" ;;
  esac
done
[[ -n $name && -n $zone ]] || die "expected --name=NAME and --zone=ZONE (or TPU_NAME and TPU_ZONE)"
place=(--zone="$zone")
[[ -z $project ]] || place+=(--project="$project")
if [[ $verb == create || $verb == resume ]]; then
  [[ -n $type ]] || die "expected --type=ACCELERATOR, for example --type=v5litepod-16"
fi
if [[ $verb == run || $verb == resume ]]; then
  case " ${train[*]-} " in
    *" --config="*" --workdir="* | *" --workdir="*" --config="*) ;;
    *) die "expected --config=FILE and --workdir=DIR" ;;
  esac
fi

# Software version for JAX of an accelerator type, after the table of Cloud TPU's page on TPU software versions.
runtime_version() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "found --type=$1, expected v2-, v3-, v4-, v5litepod-, v5p- or v6e- and a size; for others give --version=RUNTIME" ;;
  esac
}

queue() { run gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }
state() { gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)'; }

# on WORKER WORD...: runs launch/tpu_host.sh there (WORKER: a number or all).
on() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" \
    --command="$(quoted bash mim_jax/launch/tpu_host.sh "${@:2}")"
}

create() {
  local found
  found=${version:-$(runtime_version "$type")} || exit $?
  queue create --node-id="$name" --accelerator-type="$type" --runtime-version="$found" ${capacity[@]+"${capacity[@]}"}
  [[ $DRY_RUN == 1 ]] && return
  until found=$(state) && [[ $found == ACTIVE ]]; do
    case $found in
      FAILED | SUSPENDING | SUSPENDED) die "the request for $name ended as $found; bash launch/tpu_vm.sh delete withdraws it" ;;
    esac
    say "waiting for $name: ${found:-no answer}"
    sleep "$every"
  done
  say "$name is there"
}

install() {
  local bundle=/tmp/mim_jax.tgz unpack='mkdir -p mim_jax && tar -C mim_jax -xzf mim_jax.tgz'
  [[ $DRY_RUN == 1 ]] || bundle=$(mktemp -d)/mim_jax.tgz
  run tar -C "$ROOT" --exclude=./.git --exclude='./.venv*' --exclude=./runs --exclude=./build --exclude=__pycache__ \
    -czf "$bundle" .
  run gcloud compute tpus tpu-vm scp "$bundle" "$name:mim_jax.tgz" "${place[@]}" --worker=all
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
    --command="${prepare:+$prepare && }$unpack && bash mim_jax/launch/tpu_host.sh install"
  [[ $DRY_RUN == 1 ]] || rm -r "${bundle%/*}"
}

# resume: one look every $every seconds. A lost connection is no reason to give up, as the slice's state tells what happened.
resume() {
  local found
  if [[ $DRY_RUN == 1 ]]; then
    queue describe --format='value(state.state)'
    echo '# when the state is SUSPENDED or FAILED:'
    queue delete --force --quiet
    create
    install
    on all run "${train[@]}"
    echo "# else, every $every seconds until the run has ended:"
    on 0 status
    return
  fi
  while true; do
    found=$(state) || found=unknown
    case $found in
      ACTIVE)
        found=$(on 0 status | tail -n 1) || found='no connection'
        say "$name: $found"
        case $found in
          'ended 0') return ;;
          none | 'ended 143') on all run "${train[@]}" ;; # 143: told to stop (SIGTERM), as before maintenance of a host
          ended*) die "training stopped with exit code ${found#ended }; see: bash launch/tpu_vm.sh logs" ;;
        esac
        ;;
      SUSPENDED | FAILED)
        say "$name was lost ($found); making it again"
        queue delete --force --quiet
        create
        install
        on all run "${train[@]}"
        ;;
      *) say "$name: $found" ;;
    esac
    sleep "$every"
  done
}

case $verb in
  create) create ;;
  install) install ;;
  run) on all run "${train[@]}" ;;
  status)
    queue describe --format='value(state.state)'
    on all status
    ;;
  logs) on "$worker" logs ;;
  resume) resume ;;
  stop) on all stop ;;
  delete) queue delete --force --quiet ;;
esac
