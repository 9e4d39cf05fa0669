"""The scripts in benchmarks/ run, with settings that take seconds, and print what their docstrings say."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest

PEER = f"""{shlex.quote(sys.executable)} -c 'print("warming up"); print("images_per_second 5")'"""


def run(root, script, *arguments, **environ):
  """Finished process of a script, in an environment without what tests/conftest.py puts there."""
  env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'NPROC', 'JAX_DEFAULT_MATMUL_PRECISION')}
  command = [sys.executable, str(root / 'benchmarks' / script), *map(str, arguments)]
  return subprocess.run(command, cwd=root, env=env | environ, capture_output=True, text=True)


def rows(text):
  """Cells of the Markdown tables in a text, row by row, heads included."""
  lines = [line for line in text.splitlines() if line.startswith('| ')]
  return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def ratio(text):
  """(median, least, most) of the first ratio in a text."""
  return tuple(map(float, re.search(r'ratio ours / \w+: (\S+) \((\S+) to (\S+)\)', text).groups()))


TINY = (
  *('--size', '32/1/2', '--batch', 4, '--steps', 2, '--warmup', 1, '--rounds', 1, '--threads', 1, '--peak-size', 256),
  *('--config.method.decoder=32/1/2', '--config.method.image_size=32'),
)


def test_step_beside_a_peer(root):
  done = run(root, 'cpu_step.py', *TINY, '--peer', PEER)
  assert done.returncode == 0, done.stderr
  head, row = rows(done.stdout)
  figures = dict(zip(head, map(float, row), strict=True))
  assert figures['peer images/s'] == 5
  assert figures['images/s'] > 0 and figures['GFLOP/s of a product'] > 0
  middle, least, most = ratio(done.stdout)
  assert middle == least == most == figures['ours / peer'] == pytest.approx(figures['images/s'] / 5, abs=2e-3)


def test_a_peer_that_says_nothing_is_an_error(root):
  done = run(root, 'cpu_step.py', *TINY, '--peer', f"{shlex.quote(sys.executable)} -c 'print(5)'")
  assert done.returncode == 1
  assert 'expected a last line "images_per_second N"' in done.stderr


def test_input_pipeline_beside_a_peer(root, tmp_path):
  python = tmp_path / 'python'
  python.write_text('#!/bin/sh\necho images_per_second 5\n')
  python.chmod(0o755)
  small = ('--count', 8, '--small-count', 300, '--batch', 8, '--seconds', 0.2, '--rounds', 2)
  done = run(root, 'input_pipeline.py', *small, '--torch-python', python)
  assert done.returncode == 0, done.stderr
  assert '--tf-python is not given: skipped' in done.stdout
  table = rows(done.stdout)
  assert [row[1] for row in table] == ['what', *['ours', 'torch DataLoader'] * 2]
  assert all(float(row[2]) > 0 for row in table[1:])
  middle, least, most = ratio(done.stdout)
  assert 0 < least <= middle <= most
  assert re.search(
    r'^32 x 32 from memory: \d+ \(\d+ to \d+\) images/s; / 20,000: \d+\.\d\d$', done.stdout, re.MULTILINE
  )


@pytest.mark.slow
def test_startup(root, tmp_path):
  world = '--config.data.source=synthetic:shapes/size=64,train=1000,validation=64,textures=false,others=0:train'
  sizes = ('--config.method.size=32/1/2', '--config.method.decoder=32/1/2')
  done = run(root, 'startup.py', '--rounds', 1, '--threads', 1, world, *sizes, MIM_JAX_DATA=str(tmp_path))
  assert done.returncode == 0, done.stderr
  table = {row[0]: row[1:] for row in rows(done.stdout)}
  assert table[''] == ['cold', 'fresh', 'resumed']
  cold, fresh, _ = (float(seconds) for seconds in table['compile'])
  assert cold > fresh > 0
  for name in ('imports', 'data', 'method', 'init / restore', 'first step'):
    assert all(float(seconds) > 0 for seconds in table[name]), name
  assert {'jax', 'all'} <= table.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('script', 'needs', 'arguments'),
  [
    ('torch_mae.py', 'torch', '--size 32/1/2 --decoder 32/1/2 --image-size 32 --batch 4 --steps 2 --threads 1'),
    ('torch_loader.py', 'torch', 'FOLDER --batch 4 --seconds 0.2'),
    ('tf_data.py', 'tensorflow', 'FOLDER --batch 4 --seconds 0.2 --antialias'),
  ],
)
def test_peers(root, tmp_path, rng, script, needs, arguments):
  import cv2

  if importlib.util.find_spec(needs) is None:
    pytest.skip(f'this environment has no {needs}')
  for number in range(6):
    cv2.imwrite(str(tmp_path / f'{number}.jpg'), rng.integers(256, size=(90, 120, 3), dtype='uint8'))
  done = run(root, f'peers/{script}', *arguments.replace('FOLDER', str(tmp_path)).split())
  assert done.returncode == 0, done.stderr
  assert float(re.fullmatch(r'images_per_second (\S+)', done.stdout.splitlines()[-1])[1]) > 0
