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
from jax.sharding import AbstractDevice, AbstractMesh, AxisType  # noqa: E402

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


@pytest.fixture
def abstract():
  """Function (platform, kind, sizes of axes) -> mesh of devices that are not here, to trace for."""

  def make(platform, kind='x', **sizes):
    shape = {'data': 1, 'fsdp': 1, 'tensor': 1} | sizes
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return AbstractMesh((*shape.values(),), (*shape,), (AxisType.Auto,) * 3, abstract_device=device)

  return make


# Records: with --record, the outcome of every test of a method is written down, which `mim-jax methods` shows
# (mim_jax/records.py).


def pytest_addoption(parser):
  parser.addoption(
    '--record', action='store_true', help='write the outcome of every test of a method to tests/records.json'
  )


def pytest_configure(config):
  config.addinivalue_line(
    'markers',
    'verifies(kind): what a test shows of a method, unless it is parity (replays), learning (slow) or properties',
  )
  if config.getoption('--record') and not hasattr(
    config, 'workerinput'
  ):  # workers of xdist report to the first process
    config.pluginmanager.register(Recorder())


def subject(item):
  """[method, kind] of a test, or None: by its marks and its file, tests/{methods,official}/test_NAME*.py.

  A test with the mark `verifies` may stand anywhere; it is of the method that one of its parameters names, if any does.
  """
  from mim_jax import method

  mark = item.get_closest_marker('verifies')
  known = method.names()
  stem = item.path.stem.removeprefix('test_') if item.path.parent.name in ('methods', 'official') else ''
  fits = [name for name in known if stem == name or stem.startswith(f'{name}_')]
  if mark:
    parameters = item.callspec.params.values() if hasattr(item, 'callspec') else ()
    fits = [value for value in parameters if value in known] or fits
  if not fits:
    return None
  usual = 'learning' if item.get_closest_marker('slow') else 'properties'
  return [max(fits, key=len), mark.args[0] if mark else usual]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  if item.config.getoption('--record') and (found := subject(item)):
    item.user_properties.append(('verifies', found))


@pytest.fixture
def record(request):
  """Keeps figures of a test beside its outcome: record(hidden=0.05, mean_target=1.0)."""

  def keep(**figures):
    request.node.user_properties.append(('figures', {name: float(value) for name, value in figures.items()}))

  return keep


@pytest.fixture(autouse=True)
def _replays_are_noted(request, monkeypatch):
  """With --record, a test that compares a reference case (`parity.run`) gets its counts as figures, and is parity."""
  if not request.config.getoption('--record'):
    return
  from mim_jax import parity

  compare_all = parity.run

  def noted(case):
    rows = compare_all(case)
    error = max(min(row.absolute, row.relative) for row in rows)
    figures = {'tensors': len(rows), 'within': sum(row.ok for row in rows), 'error': float(error)}
    request.node.user_properties.append(('replay', {case.name: figures}))
    return rows

  monkeypatch.setattr(parity, 'run', noted)


class Recorder:
  """Gathers the reports of a session and merges them into tests/records.json at its end."""

  def __init__(self):
    self.results = {}

  def pytest_runtest_logreport(self, report):
    told = {}
    for name, value in report.user_properties:
      told.setdefault(name, []).append(value)
    if 'verifies' not in told or (report.when != 'call' and report.passed):
      return
    from mim_jax import records

    name, kind = told['verifies'][0]
    if 'replay' in told and kind == 'properties':
      kind = 'parity'
    figures = {
      key: value for part in (*told.get('replay', ()), *told.get('figures', ())) for key, value in part.items()
    }
    self.results[report.nodeid] = records.result(name, kind, report.nodeid, report.outcome, figures)

  def pytest_sessionfinish(self):
    from mim_jax import records

    path = ROOT / 'tests' / 'records.json'
    old = records.read(path) if path.is_file() else []
    if self.results:
      records.write(path, records.merge(old, self.results.values(), ROOT))
