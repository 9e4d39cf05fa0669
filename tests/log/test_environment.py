"""What a run ran on."""

import json
import subprocess
import sys

import jax
import pytest

from mim_jax.log import environment


def test_environment_is_plain_json_and_complete():
  found = json.loads(json.dumps(environment.collect()))
  assert found['versions']['jax'] == jax.__version__
  assert set(found['versions']) >= {'mim-jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy'}
  assert None not in found['versions'].values()
  assert found['devices']['platform'] == 'cpu' and found['devices']['count'] == jax.device_count()
  assert found['processes'] == 1
  assert 'python' in found['command'] or 'pytest' in found['command']  # a worker of xdist, or pytest itself
  assert found['python'] == '.'.join(map(str, sys.version_info[:3]))
  assert 'xla_force_host_platform_device_count' in found['flags']['XLA_FLAGS']


@pytest.fixture
def checkout(tmp_path):
  package = tmp_path / 'code' / 'package'
  package.mkdir(parents=True)
  (package / 'a.py').write_text('x = 1\n')
  (tmp_path / 'code' / '.gitignore').write_text('*.pyc\n')
  commit = ['-c', 'user.name=n', '-c', 'user.email=e@example.org', 'commit', '-qm', 'first']
  for command in (['init', '-q'], ['add', '.'], commit):
    subprocess.run(['git', *command], cwd=tmp_path / 'code', check=True)
  return package


def test_commit_and_whether_files_differ_from_it(checkout):
  clean = environment.git(checkout)
  assert len(clean['commit']) == 40 and clean['dirty'] is False
  (checkout / 'a.pyc').write_text('ignored')
  assert environment.git(checkout) == clean
  (checkout / 'new.py').write_text('y = 2\n')
  assert environment.git(checkout) == {**clean, 'dirty': True}
  (checkout / 'new.py').unlink()
  (checkout / 'a.py').write_text('x = 2\n')
  assert environment.git(checkout) == {**clean, 'dirty': True}


def test_no_commit_without_checkout_git_or_tracking(checkout, tmp_path, monkeypatch):
  assert environment.git(tmp_path) is None
  installed = checkout / 'venv' / 'package'  # inside a checkout, but not part of it
  installed.mkdir(parents=True)
  (installed / 'a.py').write_text('x = 1\n')
  assert environment.git(installed) is None
  monkeypatch.setenv('PATH', '')
  assert environment.git(checkout) is None
