# shellcheck shell=bash
# Shared by the scripts of this folder, which source it. Works with the bash 3.2 of macOS.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=0

say() { printf 'mim_jax: %s\n' "$*" >&2; }

# die MESSAGE...: what was found, what was expected, what to do; exit code 2, as for any wrong use.
die() {
  say "error: $*"
  exit 2
}

# usage FILE: prints the comment at the head of a script, which is its manual.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$1"; }

# quoted WORD...: the words as one line that a shell reads back as the same words.
quoted() {
  local word line=''
  for word in "$@"; do
    case $word in
      *\'*) printf -v word '%q' "$word" ;;
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'$word'" ;;
    esac
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# run WORD...: runs the command, or prints it when DRY_RUN is 1.
run() {
  if [[ $DRY_RUN == 1 ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# finish WORD...: the same, as the last act of a script, which the command replaces, so that signals reach it.
finish() {
  if [[ $DRY_RUN == 1 ]]; then
    run "$@"
    exit
  fi
  exec "$@"
}

# probe COMMAND...: prints "VERSION EXECUTABLE" if the command is a Python >= 3.11 that can make environments.
probe() {
  "$@" -c 'import sys
if sys.version_info < (3, 11): sys.exit(1)
import ensurepip, venv
print("%d.%d %s" % (sys.version_info[0], sys.version_info[1], sys.executable))' 2>/dev/null
}

# probe_pyenv NAME: the same for a Python that pyenv has installed but not selected; its command is there and fails.
probe_pyenv() {
  local pyenv versions
  pyenv=$(command -v pyenv || echo "${PYENV_ROOT:-$HOME/.pyenv}/bin/pyenv")
  [[ -x $pyenv ]] || return 1
  versions=$("$pyenv" whence "$1" 2>/dev/null) || return 1
  PYENV_VERSION=$(tail -n 1 <<<"$versions") probe "$1"
}

# find_python: prints "VERSION EXECUTABLE" of $PYTHON, or of the first command that is Python 3.11 or newer.
find_python() {
  local name
  if [[ -n ${PYTHON:-} ]]; then
    probe "$PYTHON" || probe_pyenv "$PYTHON" ||
      die "PYTHON=$PYTHON is no Python 3.11 or newer with the modules venv and ensurepip; give the command or path of one"
    return
  fi
  for name in python3 python python3.11 python3.12 python3.13 python3.14; do
    probe "$name" && return
  done
  die "found no Python 3.11 or newer with the modules venv and ensurepip (tried python3, python and python3.11 to python3.14);" \
    "install one (on Debian and Ubuntu also its python3-venv) or name it: PYTHON=/path/to/python3 bash launch/..."
}

# make_env [EXTRA...]: makes the environment and installs the package with these extras unless that is done already.
# Sets ENV_PYTHON to its interpreter. Environments lie in $MIM_VENV (default: .venv in the checkout), one per Python version.
make_env() {
  local found version base venv stamp key extra extras need=0 began=$SECONDS
  if [[ $DRY_RUN == 1 ]]; then
    ENV_PYTHON=python
    return
  fi
  say "looking for Python 3.11 or newer"
  found=$(find_python) || exit $?
  version=${found%% *} base=${found#* }
  venv=${MIM_VENV:-$ROOT/.venv}
  [[ $venv == /* ]] || venv=$PWD/$venv
  venv=$venv/py$version
  ENV_PYTHON=$venv/bin/python
  stamp=$venv/mim_jax_installed
  key=$("$base" -c 'import hashlib, sys
print(hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[2:]) + (sys.version + sys.argv[1]).encode()).hexdigest())' \
    "$ROOT" "$ROOT/setup.py" "$ROOT/pyproject.toml")
  for extra in base "$@"; do
    grep -qxF "$key $extra" "$stamp" 2>/dev/null || need=1
  done
  if [[ $need == 0 ]]; then
    say "environment $venv is ready"
    return
  fi
  if ! "$ENV_PYTHON" -c 'import pip' 2>/dev/null; then
    say "making the environment $venv with $base"
    "$base" -m venv --clear "$venv" || die "could not make $venv; remove it or give another folder in MIM_VENV"
  fi
  extras=$(IFS=,; echo "$*")
  say "installing mim-jax${extras:+[$extras]} and what it needs: once, takes a minute or so"
  # --no-compile: Python compiles the tenth of the files that is ever imported by itself, which saves a third of the time.
  (cd "$ROOT" && "$ENV_PYTHON" -m pip install -qq --no-compile --no-input --disable-pip-version-check \
    -e ".${extras:+[$extras]}") ||
    die "pip could not install the package, see above; is the package registry reachable? The same command tries again"
  grep -qF "$key " "$stamp" 2>/dev/null || : >"$stamp"
  for extra in base "$@"; do
    echo "$key $extra" >>"$stamp"
  done
  say "installed in $((SECONDS - began)) s"
}
