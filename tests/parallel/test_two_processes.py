"""Start-up of several processes on this machine: they find each other and reduce over a global array."""

import os
import socket
import subprocess
import sys

import pytest

FIRST_PORT = 2**16 - 2**12  # where JAX puts the coordinator of SLURM job 0

WORKER = """
import pathlib, sys
import jax, numpy as np
from mim_jax.parallel import mesh as meshes

started = meshes.start()
mesh = meshes.make_mesh({'data': -1, 'fsdp': 2, 'tensor': 1})
rows = meshes.local_rows(mesh, 8)
whole = np.arange(8.0, dtype=np.float32) + 1
x = jax.make_array_from_process_local_data(meshes.batch_sharding(mesh), whole[list(rows)], (8,))
total = jax.jit(lambda x: (x * x).sum(), out_shardings=meshes.replicated(mesh))(x)
gpus = jax.config.values['jax_cuda_visible_devices']
result = [*started, len(jax.devices()), rows.start, rows.stop, float(total), meshes.start().how, gpus]
pathlib.Path(sys.argv[1]).write_text(' '.join(map(str, result)))  # the collectives library writes to stdout itself
"""


def free_port():
  """A port that nobody listens on, among those that a SLURM job's id can stand for."""
  for port in range(FIRST_PORT + os.getpid() % 2048, 2**16):
    with socket.socket() as tried:
      if tried.connect_ex(('localhost', port)):
        return port
  return pytest.fail('no free port')


def explicit(port, process):
  return {'MIM_COORDINATOR': f'localhost:{port}', 'MIM_PROCESSES': '2', 'MIM_PROCESS_ID': str(process)}


def slurm(port, process):
  """What srun would set for one task on each of two nodes; JAX makes the port from the job's id."""
  return {
    'SLURM_JOB_ID': str(port - FIRST_PORT),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_STEP_NUM_NODES': '2',
    'SLURM_STEP_NUM_TASKS': '2',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': str(process),
    'SLURM_LOCALID': '0',
  }


@pytest.mark.parametrize('variables', [explicit, slurm])
def test_two_processes_sum_a_global_array(variables, tmp_path):
  port = free_port()
  workers = []
  for process in range(2):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(('MIM_', 'SLURM_'))}
    environ |= {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
      **variables(port, process),
    }
    command = [sys.executable, '-c', WORKER, str(tmp_path / str(process))]
    workers.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
  try:
    said = [worker.communicate(timeout=120)[0] for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  for process, worker in enumerate(workers):
    assert worker.returncode == 0, said[process]
    rows = f'{4 * process} {4 * process + 4}'
    assert (tmp_path / str(process)).read_text() == f'{variables.__name__} {process} 2 4 {rows} 204.0 running all'
