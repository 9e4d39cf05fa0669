#!/usr/bin/env bash
# Builds the image that trains, for one kind of device.
#   bash launch/docker/build.sh [--device=cpu|tpu|cuda] [--tag=mim_jax:DEVICE] [--python=3.12] [--push] [--dry-run]
# Run it as `docker run --rm -v "$PWD/runs:/mim_jax/runs" TAG --config=configs/mae.py:debug --workdir=runs/mae`, for GPUs with
# `--gpus all --shm-size=8g`. --push also pushes TAG, which must then name your registry.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

device=cpu tag='' python=3.12 push=0
for arg in "$@"; do
  case $arg in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --device=*) device=${arg#*=} ;;
    --tag=*) tag=${arg#*=} ;;
    --python=*) python=${arg#*=} ;;
    --push) push=1 ;;
    *) die "found '$arg', which is no option; see bash launch/docker/build.sh --help" ;;
  esac
done
case $device in
  cpu) extra='' ;;
  tpu | cuda) extra=$device ;;
  *) die "found --device=$device, expected cpu, tpu or cuda" ;;
esac
tag=${tag:-mim_jax:$device}

run docker build --file="$ROOT/launch/docker/Dockerfile" --build-arg=PYTHON="$python" --build-arg=EXTRA="$extra" \
  --tag="$tag" "$ROOT"
[[ $push == 0 ]] || run docker push "$tag"
