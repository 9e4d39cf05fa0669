"""Evaluators on two processes of four devices each, against one process of eight."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import eval_cases as cases
import pytest

PROGRAM = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import eval_cases as cases
mesh = cases.mesh_of(8)
print('FIGURES', json.dumps([cases.all_figures(mesh), cases.trained_figures(mesh)]))
"""


@pytest.mark.slow
def test_figures_are_the_same_on_two_processes():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    address = f'localhost:{probe.getsockname()[1]}'
  here = Path(__file__).parent
  env = {
    **os.environ,
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    'PYTHONPATH': f'{here}:{here.parent.parent}',
  }
  started = [
    subprocess.Popen(
      [sys.executable, '-c', PROGRAM, address, str(i)],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=900) for process in started]
  finally:
    for process in started:
      process.kill()
  assert [process.returncode for process in started] == [0, 0], outputs
  figures = [json.loads(out.split('FIGURES', 1)[1]) for out, _ in outputs]
  assert figures[0] == figures[1]
  assert figures[0][0] == cases.all_figures(cases.mesh_of(8))
  cases.assert_same_figures(figures[0][1], cases.trained_figures(cases.mesh_of(8)))
