#!/usr/bin/env bash
# Runs the tests, from a fresh machine: makes the environment with the test extra, installs, calls pytest.
#   bash launch/test.sh [--slow | --all] [PYTEST ARGUMENT ...]
#   bash launch/test.sh tests/data -k crop
#   bash launch/test.sh -n 2
# The default leaves out tests marked slow (more than ten seconds each); --slow runs only these, --all runs everything.
# -n 2 runs on two processes. PYTHON=python3.13 chooses the interpreter, MIM_VENV=DIR the folder for environments.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

marker='not slow' options=()
for arg in "$@"; do
  case $arg in
    --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --slow) marker=slow ;;
    --all) marker='' ;;
    *) options+=("$arg") ;;
  esac
done

make_env test
cd "$ROOT"
finish "$ENV_PYTHON" -m pytest -m "$marker" ${options[@]+"${options[@]}"}
