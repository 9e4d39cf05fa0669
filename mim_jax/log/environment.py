"""What a run ran on: versions, code, devices, command. The content of `env.json`."""

import datetime
import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax

import mim_jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
PLUGINS = ('libtpu', 'jax-cuda12-plugin', 'jax-cuda13-plugin')  # told when installed
FLAGS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')


def collect() -> dict:
  """The environment of this process as plain JSON values; 'git' is None when the code is not in a git checkout."""
  devices = jax.devices()
  return {
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'command': shlex.join(sys.orig_argv),
    'directory': os.getcwd(),
    'host': socket.gethostname(),
    'system': platform.platform(),
    'cpus': os.cpu_count(),
    'python': platform.python_version(),
    'versions': {'mim-jax': mim_jax.__version__, **_versions()},
    'git': git(Path(mim_jax.__file__).parent),
    'flags': {name: value for name, value in os.environ.items() if name in FLAGS or name.startswith('JAX_')},
    'devices': {
      'platform': devices[0].platform,
      'kind': devices[0].device_kind,
      'count': len(devices),
      'per_process': jax.local_device_count(),
      'driver': devices[0].client.platform_version,
    },
    'processes': jax.process_count(),
  }


def git(folder: Path) -> dict | None:
  """{'commit', 'dirty'} of the checkout that tracks the files in `folder`; None when there is none, or no git program.

  The files must be tracked because an installed package may lie inside the checkout of something else. Dirty: tracked
  files differ from the commit, or there are new ones that git does not ignore.
  """
  try:
    if not _git(folder, 'ls-files', '.'):
      return None
    return {'commit': _git(folder, 'rev-parse', 'HEAD').strip(), 'dirty': bool(_git(folder, 'status', '--porcelain'))}
  except (OSError, subprocess.SubprocessError):
    return None


def _git(folder, *arguments):
  command = ['git', '-C', str(folder), *arguments]
  return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def _versions():
  installed = {}
  for name in PACKAGES + PLUGINS:
    try:
      installed[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      if name in PACKAGES:
        installed[name] = None
  return installed
