"""The environment that launch/ makes: which Python, when pip runs, and the way from a fresh checkout to pytest and trainer.

A stand-in for Python answers the questions of launch/common.sh, makes "environments" that hold a copy of itself, and logs
the rest.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  '-c '*ensurepip*) [[ -n '{version}' ]] && echo '{version}' "$0" ;;
  '-c import pip') ;;
  '-c '*) exec {real} "$@" ;;
  '-m venv') mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" && echo venv >>'{log}' ;;
  *) printf '%q ' "${{@:2}}" >>'{log}'; echo >>'{log}'; [[ ! -e '{log}.fail' ]] ;;
esac
"""


class Fresh:
  """A checkout without environments in `folder`, and a stand-in for Python on the path."""

  def __init__(self, folder: Path):
    self.root, self.bin, self.log = folder / 'check out', folder / 'bin', folder / 'log'
    shutil.copytree(ROOT / 'launch', self.root / 'launch')
    shutil.copytree(ROOT / '.ci', self.root / '.ci')
    for name in ('setup.py', 'pyproject.toml'):
      shutil.copy(ROOT / name, self.root)
    self.bin.mkdir()
    self.python('python3', '3.11')

  def python(self, name: str, version: str) -> Path:
    """Adds a Python of `version` ('' for one that is too old)."""
    path = self.bin / name
    path.write_text(PYTHON.format(version=version, real=shlex.quote(sys.executable), log=self.log))
    path.chmod(0o755)
    return path

  def __call__(self, *words, code=0, path='', **environ) -> str:
    """Runs a script of the checkout; returns what it logged and what it said."""
    self.log.write_text('')
    clean = {key: value for key, value in os.environ.items() if not key.startswith(('MIM_', 'PYTHON', 'PYENV'))}
    clean['PATH'] = path or f'{self.bin}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(
      ['bash', *words],
      cwd=self.root,
      env={**clean, **environ},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=60,
    )
    self.said = done.stdout + done.stderr
    assert done.returncode == code, self.said
    return self.log.read_text()


@pytest.fixture
def fresh(tmp_path):
  return Fresh(tmp_path)


def installs(log: str) -> list[str]:
  """What pip was asked to install, one entry per call."""
  return re.findall(r'^pip install .*-e (\S+) $', log, re.M)


def test_local_installs_once_and_trains(fresh):
  log = fresh('launch/local.sh', '--config.seed=1')
  assert installs(log) == ['.']
  words = ['mim_jax.train', '--config=configs/mae.py:debug', '--workdir=runs/mae-debug-seed=1', '--config.seed=1']
  assert log.splitlines()[-1].split() == words
  assert (fresh.root / '.venv/py3.11/bin/python').exists()
  assert fresh('launch/local.sh').split() == [*words[:2], '--workdir=runs/mae-debug']


def test_pip_runs_again_only_when_needed(fresh):
  assert installs(fresh('launch/env.sh', 'test')) == [r'.\[test\]']
  assert fresh('launch/env.sh') == ''  # the extra includes the package
  assert fresh('launch/env.sh', 'test') == ''
  assert installs(fresh('launch/env.sh', 'cuda', 'wandb')) == [r'.\[cuda\,wandb\]']
  assert fresh('launch/env.sh', 'wandb', 'test') == ''
  setup = fresh.root / 'setup.py'
  before = setup.read_text()
  setup.write_text('# other dependencies\n')
  log = fresh('launch/env.sh')
  assert installs(log) == ['.']
  assert 'venv' not in log
  assert installs(fresh('launch/env.sh', 'test')) == [r'.\[test\]']  # was installed for the old setup.py
  setup.write_text(before)
  assert installs(fresh('launch/env.sh')) == ['.']


def test_a_failed_installation_is_an_error_and_is_tried_again(fresh, tmp_path):
  Path(f'{fresh.log}.fail').touch()
  fresh('launch/local.sh', code=2)
  assert 'pip could not install' in fresh.said
  assert 'mim_jax.train' not in fresh.log.read_text()
  Path(f'{fresh.log}.fail').unlink()
  assert installs(fresh('launch/env.sh')) == ['.']


def test_every_python_version_has_its_own_environment(fresh, tmp_path):
  fresh.python('python3.13', '3.13')
  assert fresh('launch/env.sh', PYTHON='python3.13', MIM_VENV=str(tmp_path / 'e')) != ''
  assert (tmp_path / 'e/py3.13/bin/python').exists()
  assert not (tmp_path / 'e/py3.11').exists()
  assert installs(fresh('launch/env.sh', MIM_VENV=str(tmp_path / 'e'))) == ['.']
  assert (tmp_path / 'e/py3.11/bin/python').exists()
  assert fresh('launch/env.sh', PYTHON='python3.13', MIM_VENV=str(tmp_path / 'e')) == ''


def test_old_pythons_are_passed_over(fresh):
  fresh.python('python3', '')
  fresh.python('python', '')
  fresh.python('python3.11', '3.11')
  fresh('launch/env.sh')
  assert f'with {fresh.bin}/python3.11' in fresh.said
  fresh('launch/env.sh', PYTHON='python3', code=2)
  assert 'PYTHON=python3 is no Python 3.11 or newer' in fresh.said


def test_a_python_that_pyenv_has_but_did_not_select_is_found(fresh):
  shim, real = fresh.bin / 'python3.13', fresh.python('real', '3.13')
  shim.write_text(f'#!/usr/bin/env bash\n[[ ${{PYENV_VERSION:-}} == 3.13.0 ]] && exec {real} "$@"\nexit 127\n')
  shim.chmod(0o755)
  pyenv = fresh.bin / 'pyenv'
  pyenv.write_text('#!/usr/bin/env bash\n[[ "$*" == "whence python3.13" ]] && printf "3.12.9\\n3.13.0\\n"\n')
  pyenv.chmod(0o755)
  assert installs(fresh('launch/env.sh', PYTHON='python3.13')) == ['.']
  assert (fresh.root / '.venv/py3.13').exists()


def test_ci_runs_the_tests_of_a_fresh_checkout(fresh):
  log = fresh('.ci/run')
  assert installs(log) == [r'.\[test\]']
  assert shlex.split(log.splitlines()[-1])[:3] == ['pytest', '-m', 'not slow']
  Path(f'{fresh.log}.fail').touch()
  fresh('.ci/run', code=1)  # the code of pytest


def test_a_tpu_host_with_an_old_python_fetches_one(fresh, tmp_path):
  new = fresh.python('python_of_uv', '3.12')
  bare = tmp_path / 'bare'  # nothing but what the script needs, so that no other Python is on the path
  bare.mkdir()
  for name in ('bash', 'dirname', 'mkdir', 'cp', 'cat', 'grep', 'tail', 'rm', 'env'):
    (bare / name).symlink_to(shutil.which(name))
  old = bare / 'python3'
  old.write_text(f"""#!/usr/bin/env bash
    [[ $1 == -c ]] && exit 1
    [[ $* == '-m uv python find 3.12' ]] && echo {new} && exit
    echo "old $*" >>{fresh.log}""")
  old.chmod(0o755)
  log = fresh('launch/tpu_host.sh', 'install', path=str(bare), HOME=str(tmp_path))
  assert log.splitlines()[:2] == ['old -m pip install --quiet --user uv', 'old -m uv python install --quiet 3.12']
  assert installs(log) == [r'.\[tpu\]']
  assert (fresh.root / 'runs/tpu_host/python').read_text().strip() == f'{fresh.root}/.venv/py3.12/bin/python'
