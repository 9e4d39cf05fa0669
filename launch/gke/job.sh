#!/usr/bin/env bash
# Trains on a GKE cluster with JobSet installed, through `kubectl` or, with --xpk=CLUSTER, through `xpk`.
#   bash launch/gke/job.sh create --name=NAME --image=IMAGE --device=v5e:4x4 --claim=CLAIM [--spot] [--restarts=50] [--dry-run]
#                                 --config=FILE --workdir=/data/... [--config.KEY=VALUE ...]
#   bash launch/gke/job.sh create --xpk=CLUSTER --name=NAME --image=IMAGE --device=v5e:4x4 ...
#   bash launch/gke/job.sh status|logs|delete --name=NAME [--xpk=CLUSTER] [--dry-run]
# --device is a TPU slice (v4:2x2x2, v5e:4x4, v5p:4x4x4, v6e:16x16) or GPUs per node (h100:8, or the value of the node label
# cloud.google.com/gke-accelerator as in nvidia-l4:4) with --nodes=N. IMAGE comes from launch/docker/build.sh. CLAIM is a
# PersistentVolumeClaim that all pods may write; it is mounted at /data and must hold the work folder, as pods come and go.
# With xpk, attach the storage to the cluster with `xpk storage`. A restarted job resumes by itself. --dry-run prints the
# commands, and the manifest that kubectl would get.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../common.sh"

verb=${1:-}
case $verb in
  create | status | logs | delete) shift ;;
  -h | --help | '') usage "${BASH_SOURCE[0]}" && exit ;;
  *) die "found '$verb', expected one of: create status logs delete" ;;
esac

name='' image='' device='' claim='' xpk='' nodes=1 restarts=50 spot='' config='' workdir='' options=()
for arg in "$@"; do
  case $arg in
    --dry-run) DRY_RUN=1 ;;
    --name=*) name=${arg#*=} ;;
    --image=*) image=${arg#*=} ;;
    --device=*) device=${arg#*=} ;;
    --claim=*) claim=${arg#*=} ;;
    --xpk=*) xpk=${arg#*=} ;;
    --nodes=*) nodes=${arg#*=} ;;
    --restarts=*) restarts=${arg#*=} ;;
    --spot) spot=1 ;;
    --config=*) config=${arg#*=} ;;
    --workdir=*) workdir=${arg#*=} ;;
    --config.*) options+=("$arg") ;;
    *) die "found '$arg', which is no option of $verb; see bash launch/gke/job.sh --help" ;;
  esac
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "found --name=$name, expected lower-case letters, digits and dashes"

# Sets accelerator (node label), topology, hosts and devices (per host) from --device. Host sizes: GKE's page on planning TPUs.
read_device() {
  local chips=1 side sides
  topology=${device#*:}
  case $device in
    v4:*) accelerator=tpu-v4-podslice ;;
    v5e:*) accelerator=tpu-v5-lite-podslice ;;
    v5p:*) accelerator=tpu-v5p-slice ;;
    v6e:*) accelerator=tpu-v6e-slice ;;
    h100:*) accelerator=nvidia-h100-80gb ;;
    nvidia-*:*) accelerator=${device%%:*} ;;
    *) die "found --device=$device, expected v4:, v5e:, v5p: or v6e: and a topology, or h100:8, or nvidia-...:COUNT" ;;
  esac
  [[ $topology =~ ^[0-9]+(x[0-9]+)*$ ]] || die "found --device=$device, expected a size such as v5e:4x4 or h100:8"
  IFS=x read -r -a sides <<<"$topology"
  for side in "${sides[@]}"; do chips=$((chips * side)); done
  case $accelerator in
    nvidia-*) hosts=$nodes devices=$chips ;;
    tpu-v5-lite-podslice | tpu-v6e-slice)
      devices=$((chips <= 8 ? chips : 4)) # up to 8 chips lie in one host, larger slices are made of hosts with 4
      hosts=$((chips / devices))
      ;;
    *) devices=4 hosts=$((chips / 4)) ;;
  esac
}

# json WORD...: the words as a JSON list, which is YAML as well.
json() {
  local word list=''
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || die "an argument has a line break or another control character: $(quoted "$word")"
    word=${word//\\/\\\\}
    list+=", \"${word//\"/\\\"}\""
  done
  printf '[%s]' "${list#, }"
}

manifest() {
  local template=$here/gpu.yaml text args
  [[ $accelerator == nvidia-* ]] || template=$here/tpu.yaml
  text=$(if [[ -n $spot ]]; then cat "$template"; else sed '/gke-spot: "true"/d' "$template"; fi)
  args=$(json --config="$config" --workdir="$workdir" ${options[@]+"${options[@]}"})
  text=${text//@NAME@/"$name"} text=${text//@RESTARTS@/"$restarts"} text=${text//@HOSTS@/"$hosts"}
  text=${text//@ACCELERATOR@/"$accelerator"} text=${text//@TOPOLOGY@/"$topology"} text=${text//@DEVICES@/"$devices"}
  text=${text//@IMAGE@/"$image"} text=${text//@CLAIM@/"$claim"} text=${text//@ARGS@/"$args"}
  printf '%s\n' "$text"
}

create() {
  local type
  [[ -n $image && -n $config && -n $workdir ]] || die "expected --image=IMAGE, --config=FILE and --workdir=DIR"
  read_device
  if [[ -n $xpk ]]; then
    case $accelerator in # xpk counts cores for v4 and v5p, chips for v5e and v6e
      tpu-v4-podslice) type=v4-$((hosts * devices * 2)) ;;
      tpu-v5p-slice) type=v5p-$((hosts * devices * 2)) ;;
      tpu-v5-lite-podslice) type=v5litepod-$((hosts * devices)) ;;
      tpu-v6e-slice) type=v6e-$((hosts * devices)) ;;
      nvidia-*) die "found --xpk with --device=$device, but only TPU slices are started through xpk; leave out --xpk" ;;
    esac
    run xpk workload create --cluster="$xpk" --workload="$name" --docker-image="$image" --tpu-type="$type" --num-slices=1 \
      --max-restarts="$restarts" ${spot:+--spot} \
      --command="$(quoted python -m mim_jax.train --config="$config" --workdir="$workdir" ${options[@]+"${options[@]}"})"
  else
    [[ -n $claim ]] || die "expected --claim=CLAIM, the PersistentVolumeClaim to mount at /data"
    if [[ $DRY_RUN == 1 ]]; then
      run kubectl apply -f -
      manifest
    else
      manifest | kubectl apply -f -
    fi
  fi
}

case $verb${xpk:+_xpk} in
  create*) create ;;
  status)
    run kubectl get jobset "$name"
    run kubectl get pods -l "jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  logs) run kubectl logs -f -l "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" ;;
  delete) run kubectl delete jobset "$name" ;;
  status_xpk) run xpk workload list --cluster="$xpk" --filter-by-job="$name" ;;
  logs_xpk) die "xpk shows no logs; leave out --xpk=$xpk to read them with kubectl" ;;
  delete_xpk) run xpk workload delete --cluster="$xpk" --workload="$name" ;;
esac
