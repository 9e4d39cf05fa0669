"""Everything runs on CPU with eight forced devices, in float32, with compiled programs kept between runs."""

import os
import tempfile
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'.strip()
os.environ.setdefault('NPROC', '16')  # threads: see mesh.give_forced_devices_threads
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(Path(tempfile.gettempdir()) / f'mim_jax_test_cache_{os.getuid()}')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
os.environ['JAX_DEFAULT_MATMUL_PRECISION'] = 'highest'

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / 'goldens'


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture(scope='session')
def root():
  """The checkout."""
  return ROOT


@pytest.fixture(scope='session')
def goldens():
  """Folder of reference cases, CASE.safetensors + CASE.json."""
  return GOLDENS


@pytest.fixture(scope='session')
def cifar10():
  """data_dir with CIFAR-10 in TFDS form, beside the checkout; tests that need real images skip without it."""
  path = ROOT.parent / 'shared' / 'data'
  if not (path / 'cifar10').is_dir():
    pytest.skip(f'real images are not on this machine: no CIFAR-10 in {path}')
  return path


@pytest.fixture
def devices():
  assert jax.device_count() == 8
  return jax.devices()
