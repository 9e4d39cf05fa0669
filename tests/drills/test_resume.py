"""A run that is stopped in any way and started again by the same command ends as one that never stopped, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DRILL = Path(__file__).parent / 'drill.py'
TIMEOUT = 300


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp('drill') / 'images.npz'
  rng = np.random.default_rng(0)
  np.savez(path, image=rng.integers(0, 256, (48, 16, 16, 3), dtype=np.uint8), label=np.arange(48) % 3)
  return path


def start(workdir, data, *overrides, drill='', devices=1):
  env = os.environ | {
    'DRILL_DATA': str(data),
    'DRILL': drill,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  env['PYTHONPATH'] = os.pathsep.join([str(DRILL.parents[2]), env.get('PYTHONPATH', '')])
  return subprocess.run(
    [sys.executable, str(DRILL), str(workdir), *overrides], env=env, capture_output=True, text=True, timeout=TIMEOUT
  )


def record(workdir):
  """Every logged number but times, and the arrays of the last checkpoint."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{key: value for key, value in row.items() if not key.startswith('time/')} for row in rows]


def arrays(workdir, step=12):
  from mim_jax.checkpoint import manager

  contents = manager.read_contents(workdir / 'checkpoints' / str(step))
  return {path: leaf.checksum for path, leaf in contents.leaves.items()}


@pytest.fixture(scope='module')
def whole(tmp_path_factory, data):
  workdir = tmp_path_factory.mktemp('whole')
  done = start(workdir, data)
  assert done.returncode == 0, done.stderr
  assert len(record(workdir)) == 6 + 3  # logged steps and evaluations
  return workdir


@pytest.mark.parametrize(
  'drill',
  [
    'kill:step:7',
    pytest.param('kill:save:8', marks=pytest.mark.slow),
    pytest.param('kill:eval:8', marks=pytest.mark.slow),
    'term:step:7',
    pytest.param('term:save:8', marks=pytest.mark.slow),
    'term:eval:8',
  ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path, data, whole, drill):
  stopped = start(tmp_path, data, drill=drill)
  if drill.startswith('kill'):
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
  else:
    assert stopped.returncode == 143 and 'stopped at step' in stopped.stdout, stopped.stderr
  again = start(tmp_path, data)
  assert again.returncode == 0, again.stderr
  assert 'resuming at step' in again.stderr
  assert record(tmp_path) == record(whole)
  assert arrays(tmp_path) == arrays(whole)


def test_a_finished_run_is_left_alone(tmp_path, data, whole):
  copy = tmp_path / 'copy'
  shutil.copytree(whole, copy)
  again = start(copy, data)
  assert again.returncode == 0 and 'complete' in again.stderr
  assert record(copy) == record(whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, data, whole):
  copy = tmp_path / 'copy'
  shutil.copytree(whole, copy)
  files = [
    file for file in (copy / 'checkpoints' / '12' / 'state').rglob('*') if file.is_file() and '/d/' in file.as_posix()
  ]
  largest = max(files, key=lambda file: file.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 0xFF
  largest.write_bytes(content)
  again = start(copy, data)
  assert again.returncode == 0, again.stderr
  assert 'refused' in again.stderr and 'resuming at step 8' in again.stderr
  assert record(copy) == record(whole) and arrays(copy) == arrays(whole)


@pytest.mark.slow
def test_another_device_count_goes_on_with_the_same_numbers(tmp_path, data, whole):
  for devices, steps in ((8, 'kill:step:6'), (1, 'kill:step:10'), (4, '')):
    last = start(tmp_path, data, '--config.mesh.data=1', '--config.mesh.fsdp=-1', drill=steps, devices=devices)
  assert last.returncode == 0, last.stderr
  for one, other in zip(record(tmp_path), record(whole), strict=True):
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-4, atol=1e-6)


def test_another_config_is_refused_with_the_difference(tmp_path, data, whole):
  copy = tmp_path / 'copy'
  shutil.copytree(whole, copy)
  refused = start(copy, data, '--config.optim.wd=0.2')
  assert refused.returncode == 2
  assert 'optim.wd: 0.05 there, 0.2 here' in refused.stderr and 'Traceback' not in refused.stderr


@pytest.mark.parametrize(
  'override, message',
  [
    ('--config.data.source=tfds:nowhere:train', 'nowhere'),
    ('--config.data.sorce=x', "did you mean 'data.source'"),
    ('--config.optim.momentum=0.5', 'no effect'),
  ],
)
def test_mistakes_end_before_anything_is_compiled(tmp_path, data, override, message):
  failed = start(tmp_path, data, override, devices=1)
  assert failed.returncode == 2
  assert message in failed.stderr and 'Traceback' not in failed.stderr and 'compiling' not in failed.stderr


def test_steps_that_are_not_finite_stop_the_run_with_a_dump_that_replays(tmp_path, data):
  from mim_jax import cli

  stopped = start(tmp_path, data, drill='nan:5:3')
  assert stopped.returncode == 2
  assert 'not finite in 3 steps in a row, the last of them step 7' in stopped.stderr
  rows = record(tmp_path)
  assert rows[-1]['faults/bad_steps'] == 3
  assert 'mim-jax replay' in stopped.stderr
  os.environ['DRILL_DATA'] = str(data)
  assert cli.main(['replay', str(tmp_path / 'dump')]) == 0  # here the images are whole: nothing is bad about the state


def test_two_bad_steps_are_skipped_and_counted(tmp_path, data, whole):
  done = start(tmp_path, data, drill='nan:5:2')
  assert done.returncode == 0, done.stderr
  assert record(tmp_path)[-2]['faults/bad_steps'] == 2


def test_a_broken_image_is_replaced_counted_and_named_and_too_many_stop_the_run(tmp_path, data):
  import cv2

  rng = np.random.default_rng(1)
  for i in range(40):
    folder = tmp_path / 'pictures' / f'class{i % 2}'
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / f'{i:02d}.png'), rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
  broken = tmp_path / 'pictures' / 'class1' / '07.png'
  broken.write_bytes(broken.read_bytes()[:60])
  options = [
    f'--config.data.source=folder:{tmp_path / "pictures"}',
    '--config.data.transforms=decode | random_resized_crop(16) | normalize',
    '--config.data.eval_transforms=decode | resize(16) | normalize',
  ]
  done = start(tmp_path / 'run', data, *options, '--config.data.max_corrupt=0.5')
  assert done.returncode == 0, done.stderr
  assert '07.png' in done.stderr and 'was replaced' in done.stderr
  assert [row['faults/corrupt'] for row in record(tmp_path / 'run') if 'faults/corrupt' in row][
    -1
  ] >= 4  # once an epoch
  stopped = start(tmp_path / 'strict', data, *options, '--config.data.max_corrupt=0.0')
  assert stopped.returncode == 2 and 'data.max_corrupt=0.0' in stopped.stderr and 'Traceback' not in stopped.stderr
