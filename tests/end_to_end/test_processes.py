"""Two processes on one machine train the same losses as one, save once, and stop together."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from mim_jax.log.writer import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp('processes') / 'images.npz'
  rng = np.random.default_rng(0)
  np.savez(path, image=rng.integers(0, 256, (48, 16, 16, 3), dtype=np.uint8), label=np.arange(48) % 3)
  return path


def launch(root, workdir, data, processes, devices, *overrides, drill=''):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  started = []
  for process in range(processes):
    env = os.environ | {
      'DRILL_DATA': str(data),
      'DRILL': drill if process == processes - 1 else '',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      'PYTHONPATH': str(root),
    }
    if processes > 1:
      env |= {'MIM_COORDINATOR': f'localhost:{port}', 'MIM_PROCESSES': str(processes), 'MIM_PROCESS_ID': str(process)}
    command = [sys.executable, str(root / 'tests/drills/drill.py'), str(workdir), *overrides]
    started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
  outputs = [process.communicate(timeout=400)[0] for process in started]
  return [process.returncode for process in started], outputs


def losses(workdir):
  return {row['step']: row['loss'] for row in read_metrics(workdir) if 'loss' in row}


@pytest.mark.parametrize('mesh', ['data', 'fsdp', 'tensor'])
def test_two_processes_equal_one(root, tmp_path, data, mesh):
  overrides = [f'--config.mesh.{axis}={-1 if axis == mesh else 1}' for axis in ('data', 'fsdp', 'tensor')]
  codes, outputs = launch(root, tmp_path / 'two', data, 2, 1, *overrides)
  assert codes == [0, 0], outputs
  codes, outputs = launch(root, tmp_path / 'one', data, 1, 1, '--config.mesh.data=1')
  assert codes == [0], outputs
  two, one = losses(tmp_path / 'two'), losses(tmp_path / 'one')
  assert two.keys() == one.keys()
  np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
  evals = [[row for row in read_metrics(tmp_path / name) if 'eval/knn/top1' in row] for name in ('one', 'two')]
  assert evals[0] == evals[1] and len(evals[0]) == 3


def test_a_signal_to_one_process_stops_both_and_they_resume(root, tmp_path, data):
  # The processes agree on the step to stop at in the background, so the run must be long enough for them to do so.
  long = (
    '--config.duration=800 steps',
    '--config.log_every=100 steps',
    '--config.checkpoint.every=400 steps',
    '--config.evals.knn.every=never',
  )
  codes, outputs = launch(root, tmp_path / 'two', data, 2, 1, *long, drill='term:step:3')
  assert codes == [143, 143], outputs
  assert all('stopped at step' in output for output in outputs), outputs
  codes, outputs = launch(root, tmp_path / 'two', data, 2, 1, *long)
  assert codes == [0, 0] and 'resuming at step' in outputs[0], outputs
  codes, _ = launch(root, tmp_path / 'one', data, 1, 1, *long)
  two, one = losses(tmp_path / 'two'), losses(tmp_path / 'one')
  np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)
