#!/usr/bin/env bash
# Makes the environment with the given extras (tpu, cuda, plan, tf, torch, wandb, test) and prints the path of its Python.
#   bash launch/env.sh [EXTRA ...]
# PYTHON=python3.13 chooses the interpreter; MIM_VENV=DIR the folder for environments (default .venv in the checkout).

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
  -*) die "unknown option $1; extras are plain words, as in: bash launch/env.sh cuda" ;;
esac
make_env "$@"
echo "$ENV_PYTHON"
