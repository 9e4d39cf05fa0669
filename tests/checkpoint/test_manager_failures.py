"""Damaged checkpoints, full disks and crashes: nothing wrong is restored, nothing good is lost."""

import errno
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import manager_cases as cases
import orbax.checkpoint as ocp
import pytest

from mim_jax.checkpoint.manager import Manager, list_steps
from mim_jax.errors import CheckpointError

ROOT = pathlib.Path(__file__).parents[2]


# ---- damage ----


def damage(path, how):
  content = bytearray(path.read_bytes())
  if how == 'flip':
    content[len(content) // 2] ^= 1
  elif how == 'truncate':
    del content[len(content) // 2 :]
  path.write_bytes(content)


@pytest.mark.parametrize('how', ['flip', 'truncate', 'delete'])
def test_no_damaged_file_gives_wrong_content(make, tmp_path, caplog, how):
  """Every file in turn: the step is refused, or nothing is read from that file and the content is what was saved."""
  mesh = cases.mesh_of(2)
  cases.saved(make(), mesh, 1, 2)
  wanted = cases.abstract(cases.state_of(0, mesh))
  contents = {step: cases.bits(cases.state_of(step, mesh)) for step in (1, 2)}
  folder = tmp_path / 'run' / '2'
  files = {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}
  refused = []
  for path, original in files.items():
    if how == 'delete':
      path.unlink()
    else:
      damage(path, how)
    caplog.clear()
    manager = make()
    restored, meta = manager.restore(wanted)
    assert cases.bits(restored) == contents[meta['step']], path
    assert [step for step, _ in manager.refused] == ([2] if meta['step'] == 1 else []), path
    if manager.refused:
      refused.append(path)
      assert str(folder) in caplog.text and 'damaged' in caplog.text
      assert manager.steps() == [1]
    path.write_bytes(original)
  assert {folder / 'meta' / 'metadata', folder / 'state' / 'manifest.ocdbt'} <= set(refused)
  assert any(path.parent.name == 'd' for path in refused)  # where the arrays are


def test_wrong_content_in_sound_files_is_noticed(make, tmp_path):
  mesh = cases.mesh_of(2)
  cases.saved(make(), mesh, 1, 2, 3)
  shutil.rmtree(tmp_path / 'run' / '3' / 'state')
  shutil.copytree(tmp_path / 'run' / '2' / 'state', tmp_path / 'run' / '3' / 'state')
  manager = make()
  _, meta = manager.restore(cases.abstract(cases.state_of(0, mesh)))
  assert meta['step'] == 2
  [(step, reason)] = manager.refused
  assert step == 3 and 'params/encoder/kernel' in reason and 'not what was saved' in reason
  assert 'scale' not in reason  # the same in both steps


def test_a_damaged_step_is_replaced_and_does_not_count(make, tmp_path):
  mesh = cases.mesh_of(1)
  cases.saved(make(), mesh, 1, 2, 3)
  (tmp_path / 'run' / '3' / 'meta' / 'metadata').write_text('{}')
  wanted = cases.abstract(cases.state_of(0, mesh))
  manager = make(keep=1)
  assert manager.restore(wanted)[1]['step'] == 2
  manager.save(4, cases.state_of(4, mesh), {})
  manager.wait()
  assert list_steps(tmp_path / 'run') == [4]

  (tmp_path / 'run' / '4' / 'meta' / 'metadata').unlink()
  cases.saved(make(), mesh, 2)  # something to fall back to
  manager = make()
  assert manager.restore(wanted)[1]['step'] == 2
  assert manager.save(4, cases.state_of(44, mesh), {})
  restored, meta = manager.restore(wanted)
  assert meta['step'] == 4 and cases.bits(restored) == cases.bits(cases.state_of(44, mesh))


def test_a_damaged_newer_step_does_not_push_out_good_ones(make, tmp_path):
  mesh = cases.mesh_of(1)
  cases.saved(make(), mesh, 10, 20)
  (tmp_path / 'run' / '20' / 'meta' / 'metadata').write_text('')
  manager = make(keep=1)
  assert manager.restore(cases.abstract(cases.state_of(0, mesh)))[1]['step'] == 10
  manager.save(15, cases.state_of(15, mesh), {})
  manager.wait()
  assert list_steps(tmp_path / 'run') == [15]


def test_all_damaged_is_an_error(make, tmp_path):
  mesh = cases.mesh_of(1)
  cases.saved(make(), mesh, 1, 2)
  for step in '12':
    (tmp_path / 'run' / step / 'meta' / 'metadata').unlink()
  with pytest.raises(CheckpointError, match='(?s)every checkpoint in .* is damaged.*step 2.*step 1'):
    make().restore(cases.abstract(cases.state_of(0, mesh)))


def test_another_config_is_not_damage(make):
  mesh = cases.mesh_of(1)
  cases.saved(make(), mesh, 1, 2)
  other = cases.state_of(0, mesh)
  other['params']['encoder']['kernel'] = jnp.zeros((64, 16))
  other['params']['head'] = jnp.zeros(3)
  other['step'] = jnp.float32(0)
  del other['params']['half']
  manager = make()
  with pytest.raises(CheckpointError) as caught:
    manager.restore(other)
  text = str(caught.value)
  assert 'run/2' in text and '4 of 11 arrays differ' in text
  assert 'params/encoder/kernel: checkpoint float32[64, 8], config float32[64, 16]' in text
  assert 'params/head: checkpoint has none, config float32[3]' in text
  assert 'params/half: checkpoint bfloat16[4, 2], config has none' in text
  assert 'step: checkpoint int32[], config float32[]' in text
  assert '--workdir' in text and 'init_from' in text
  assert manager.refused == []


# ---- disks and crashes ----


@pytest.fixture
def small_disk(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', disk]
  if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('only root can mount a small disk to fill')
  try:
    if _takes(disk / 'probe', 5 << 20):
      pytest.skip('this system does not hold a tmpfs to its size')
    yield disk
  finally:
    subprocess.run(['umount', '-l', disk], check=True)


def _takes(path, size):
  try:
    path.write_bytes(bytes(size))
  except OSError:
    return False
  finally:
    path.unlink(missing_ok=True)
  return True


def test_a_full_disk_stops_the_run_and_spares_the_older_checkpoint(small_disk):
  mesh = cases.mesh_of(2)
  size = 1 << 14  # 2 arrays of 0.5 MB that do not compress
  manager = Manager(small_disk / 'run', keep=8)
  with pytest.raises(CheckpointError) as caught:
    for step in range(1, 9):
      manager.save(step, cases.state_of(step, mesh, size=size), {})
  manager.close()
  text = str(caught.value)
  named = re.search(r'no space left on the disk for the checkpoint of step (\d+) \(1.0 MB', text)
  assert named, text
  failed = int(named[1])
  assert failed in (step - 1, step)  # mostly noticed by the save after it, as writing goes on beside the steps
  assert f'step {failed - 1} is the newest complete one and intact' in text
  assert any('tmp' in path.name for path in (small_disk / 'run').iterdir())

  manager = Manager(small_disk / 'run', keep=1)  # started again once there is room
  restored, meta = manager.restore(cases.abstract(cases.state_of(0, mesh, size=size)))
  assert meta['step'] == failed - 1 and cases.bits(restored) == cases.bits(cases.state_of(failed - 1, mesh, size=size))
  assert manager.refused == []
  for step in range(1, failed - 1):  # all but the newest: what the failed one left behind takes room, too
    shutil.rmtree(small_disk / 'run' / str(step))
  manager.save(failed, cases.state_of(failed, mesh, size=size), {})
  manager.close()
  assert [path.name for path in (small_disk / 'run').iterdir()] == [str(failed)]


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'x'), ValueError('EXHAUSTED: No space left on device')])
def test_no_space_is_recognised_in_whatever_is_raised(make, monkeypatch, error):
  mesh = cases.mesh_of(1)
  manager = make()
  manager.save(1, cases.state_of(1, mesh), {})
  manager.wait()

  def fail(*args, **kwargs):
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'save', fail)
    with pytest.raises(CheckpointError, match='no space left.*step 2 .*step 1 is the newest complete one and intact'):
      manager.save(2, cases.state_of(2, mesh), {})
    patch.setattr(ocp.CheckpointManager, 'save', lambda *args, **kwargs: (_ for _ in ()).throw(OSError('disk on fire')))
    with pytest.raises(CheckpointError, match='could not write.*disk on fire'):
      manager.save(2, cases.state_of(2, mesh), {})
  assert manager.restore(cases.abstract(cases.state_of(0, mesh)))[1]['step'] == 1


def test_a_failure_is_told_once_though_several_parts_of_the_save_fail(make, monkeypatch):
  full = OSError(errno.ENOSPC, 'No space left on device')
  more, closed, close = [full, full, full], [], ocp.CheckpointManager.close

  def fail(*args, **kwargs):
    raise full

  def fail_then_close(self):
    if more:
      raise more.pop()
    close(self)
    closed.append(self)

  mesh, manager = cases.mesh_of(1), make()
  manager.save(1, cases.state_of(1, mesh), {})
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'close', fail_then_close)
    patch.setattr(ocp.CheckpointManager, 'save', fail)
    with pytest.raises(CheckpointError, match='no space left'):
      manager.save(2, cases.state_of(2, mesh), {})
    assert len(closed) == 1
    manager.close()
  manager.save(2, cases.state_of(2, mesh), {})  # there is room again
  manager.wait()
  assert manager.steps() == [1, 2]


def script(body):
  return textwrap.dedent(f"""
    import faulthandler, os, pathlib, signal, sys, time
    faulthandler.dump_traceback_later(60, exit=True)
    sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
  """) + textwrap.dedent(body)


def environment(devices):
  return {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }


def test_killed_during_a_save(make, tmp_path):
  child = script("""
    import manager_cases as cases
    from mim_jax.checkpoint.manager import Manager
    run, mesh = pathlib.Path(sys.argv[1]), cases.mesh_of(2)
    manager = Manager(run)
    manager.save(1, cases.state_of(1, mesh, size=1 << 18), {})
    manager.wait()
    manager.save(2, cases.state_of(2, mesh, size=1 << 18), {})
    while not any(path.name.startswith('2.') for path in run.iterdir()):
      time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
  """)
  command = [sys.executable, '-c', child, tmp_path / 'run']
  done = subprocess.run(command, env=environment(2), capture_output=True, text=True)
  assert done.returncode == -signal.SIGKILL, done.stderr
  names = sorted(path.name for path in (tmp_path / 'run').iterdir())
  assert names[0] == '1' and len(names) == 2 and names[1].startswith('2.'), 'the kill came too late to be one'

  mesh = cases.mesh_of(2)
  manager = make()
  state, meta = manager.restore(cases.abstract(cases.state_of(0, mesh, size=1 << 18)))
  assert meta['step'] == 1 and manager.refused == []
  assert cases.bits(state) == cases.bits(cases.state_of(1, mesh, size=1 << 18))
  manager.save(2, cases.state_of(2, mesh), {})
  manager.wait()
  assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == ['1', '2']


TWO_PROCESSES = """
  import jax
  process, port, run = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
  jax.distributed.initialize(f'localhost:{port}', 2, process)
  import numpy as np
  import orbax.checkpoint as ocp
  from jax.experimental import multihost_utils
  import manager_cases as cases
  from jax.sharding import NamedSharding, PartitionSpec
  from mim_jax.checkpoint.manager import Manager

  mesh = cases.mesh_of(4)

  def put(value, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

  def state(step):
    noise = np.random.default_rng(step).normal(size=(64, 16)).astype(np.float32)
    return {'params': {'kernel': put(noise, ('data', 'fsdp')), 'bias': put(noise[0])}, 'step': put(np.int32(step))}

  def parts(tree):
    return [np.asarray(shard.data).tobytes() for x in jax.tree.leaves(tree) for shard in x.addressable_shards]

  def equal(a, b):
    return parts(a) == parts(b)

  manager = Manager(run, keep=2, best='loss', best_mode='min')
  for step in (1, 2, 3, 4):
    manager.save(step, state(step), {'digest': 'd'}, {'loss': step})
  manager.close()

  manager = Manager(run, keep=2, best='loss', best_mode='min')
  assert manager.steps() == [1, 3, 4]
  restored, meta = manager.restore(cases.abstract(state(0)))
  assert meta == {'step': 4, 'digest': 'd'} and equal(restored, state(4))

  # only the second process cannot read step 4: both go back to step 3
  read = ocp.Checkpointer.restore
  def restore(self, directory, *args, **kwargs):
    if process == 1 and directory.parent.name == '4':
      raise OSError('lost')
    return read(self, directory, *args, **kwargs)
  ocp.Checkpointer.restore = restore
  manager = Manager(run, keep=2)
  restored, meta = manager.restore(cases.abstract(state(0)))
  assert meta['step'] == 3 and equal(restored, state(3))
  [(step, reason)] = manager.refused
  assert step == 4 and ('lost' if process else 'another process') in reason, reason

  # both write it again
  ocp.Checkpointer.restore = read
  assert manager.save(4, state(44), {})
  restored, meta = manager.restore(cases.abstract(state(0)))
  assert meta['step'] == 4 and equal(restored, state(44))
  manager.close()
  print('fine')
"""


def test_two_processes_save_and_refuse_together(tmp_path):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  options = dict(env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  commands = [[sys.executable, '-c', script(TWO_PROCESSES), str(i), str(port), tmp_path / 'run'] for i in range(2)]
  processes = [subprocess.Popen(command, **options) for command in commands]
  try:
    outputs = [process.communicate(timeout=90)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert all(output.rstrip().endswith('fine') for output in outputs), '\n'.join(outputs)
