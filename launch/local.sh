#!/usr/bin/env bash
# From a fresh machine to a trained and evaluated model: makes the environment, installs, trains and evaluates.
#   bash launch/local.sh [CONFIG] [--workdir=DIR] [--config.KEY=VALUE ...] [--dry-run]
#   bash launch/local.sh
#   bash launch/local.sh configs/mae.py:debug --config.seed=1
# CONFIG defaults to configs/mae.py:debug, which needs no data and no accelerator. DIR defaults to a folder in runs/ named
# after config and options; the same command again resumes there. The trainer's last lines say where numbers and pictures are.
# MIM_EXTRAS=cuda (or several: cuda,wandb) installs extras, PYTHON=python3.13 chooses the interpreter, MIM_VENV=DIR the folder
# for environments (default .venv in the checkout).

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

config='' workdir='' options=()
for arg in "$@"; do
  case $arg in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --workdir=*) workdir=${arg#--workdir=} ;;
    --config=*) config=${arg#--config=} ;;
    -*) options+=("$arg") ;;
    *)
      [[ -z $config ]] || die "found two configs, $config and $arg; options have the form --config.KEY=VALUE"
      config=$arg
      ;;
  esac
done

config=${config:-configs/mae.py:debug}
if [[ ! -e ${config%%:*} && -e $ROOT/${config%%:*} ]]; then
  config=$ROOT/$config # called from another folder
fi

if [[ -z $workdir ]]; then
  name=$(basename "${config%%:*}" .py)
  [[ $config == *:* ]] && name+=-${config#*:}
  for arg in ${options[@]+"${options[@]}"}; do
    name+=-${arg#--config.}
  done
  name=${name//[^A-Za-z0-9._=-]/_}
  [[ ${#name} -le 120 ]] || name=${name:0:100}-$(cksum <<<"$name" | cut -d ' ' -f 1)
  workdir=runs/$name
  [[ $PWD == "$ROOT" ]] || workdir=$ROOT/$workdir
fi

extras=()
IFS=, read -r -a extras <<<"${MIM_EXTRAS:-}"
make_env ${extras[@]+"${extras[@]}"}
# Compiled programs are kept beside the environment: the next start of the same program takes seconds.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$(dirname "$ENV_PYTHON")")/compiled}
# Large pages for what a step allocates and frees: a tenth of its time on CPU with glibc 2.35 or later, no effect elsewhere.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
finish "$ENV_PYTHON" -m mim_jax.train --config="$config" --workdir="$workdir" ${options[@]+"${options[@]}"}
