"""Checkpoints: bit-exact on any mesh, kept as asked, and never trusted when damaged."""

import collections
import contextlib
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

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mim_jax.checkpoint.manager import Manager, checksums, flatten, list_steps
from mim_jax.errors import CheckpointError, ConfigError

ROOT = pathlib.Path(__file__).parents[2]
Moments = collections.namedtuple('Moments', ['mu', 'nu'])


def mesh_of(count):
  devices = np.array(jax.devices()[:count]).reshape(-1, 2 if count > 1 else 1)
  return jax.sharding.Mesh(devices, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)


def state_of(step, mesh, size=64):
  """A train state with every kind of leaf that occurs, different at every step."""
  noise = np.random.default_rng(step)
  special = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
  special.view(np.uint32)[0] |= 5  # a NaN with a payload
  arrays = {
    'step': np.int32(step),
    'params': {
      'encoder': {'kernel': noise.normal(size=(size, 8)).astype(np.float32), 'scale': np.ones(6, np.float32)},
      'half': noise.normal(size=(4, 2)).astype(jnp.bfloat16),
      'special': special,
    },
    'opt': (Moments(noise.normal(size=(size, 8)).astype(np.float32), np.zeros((2, 2), np.float32)), {}),
    'flags': noise.integers(0, 2, size=5).astype(bool),
    'bytes': noise.integers(0, 255, size=(3, 3)).astype(np.uint8),
    'ema': {},
  }
  spread = NamedSharding(mesh, PartitionSpec('fsdp'))
  whole = NamedSharding(mesh, PartitionSpec())
  tree = jax.tree.map(lambda x: jax.device_put(x, spread if x.ndim == 2 and x.shape[0] == size else whole), arrays)
  return {**tree, 'key': jax.device_put(jax.random.key(step), whole)}


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(tree):
  """{path: (dtype, shape, bytes)}: equal only for trees that are equal bit for bit."""
  found = {}
  for path, x in flatten(tree).items():
    raw = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    found[path] = str(x.dtype), x.shape, np.asarray(raw).tobytes()
  return found


@pytest.fixture
def make(tmp_path):
  """Manager of `tmp_path/run`, closed at the end."""
  with contextlib.ExitStack() as stack:

    def start(**options):
      manager = Manager(tmp_path / 'run', **options)
      stack.callback(manager.close)
      return manager

    yield start


def saved(manager, mesh, *steps, **options):
  for step in steps:
    manager.save(step, state_of(step, mesh, **options), {'digest': f'd{step}'})
  manager.close()


def test_nothing_to_restore_writes_nothing(make, tmp_path):
  assert make().restore(abstract(state_of(0, mesh_of(1)))) is None
  assert make().steps() == []
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('asynchronous', [True, False])
def test_round_trip_is_bit_exact(make, asynchronous):
  mesh = mesh_of(8)
  state = state_of(7, mesh)
  manager = make(asynchronous=asynchronous)
  assert manager.save(7, state, {'digest': 'abc', 'seed': 3, 'pending': ['knn']})
  restored, meta = manager.restore(abstract(state))
  assert meta == {'step': 7, 'digest': 'abc', 'seed': 3, 'pending': ['knn']}
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert bits(restored) == bits(state)
  assert manager.refused == []


@pytest.mark.parametrize(('before', 'after'), [(8, 1), (8, 4), (1, 8), (4, 2)])
def test_restores_onto_another_mesh(make, before, after):
  state = state_of(3, mesh_of(before))
  saved(make(), mesh_of(before), 3)
  wanted = state_of(0, mesh_of(after))
  restored, _ = make().restore(abstract(wanted))
  assert bits(restored) == bits(state)
  assert [x.sharding for x in jax.tree.leaves(restored)] == [x.sharding for x in jax.tree.leaves(wanted)]


def test_donated_buffers_do_not_reach_a_save_under_way(make):
  mesh = mesh_of(8)
  state = {'params': jax.device_put(jnp.zeros((1 << 18, 8)), NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))}
  update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  state = update(state)
  manager = make()
  manager.save(1, state, {})
  for _ in range(20):
    state = update(state)
  jax.block_until_ready(state)
  restored, _ = manager.restore(abstract(state))
  assert np.unique(restored['params']).tolist() == [1]


def test_a_step_is_saved_once(make):
  mesh = mesh_of(1)
  manager = make()
  assert manager.save(5, state_of(5, mesh), {'n': 1})
  assert not manager.save(5, state_of(6, mesh), {'n': 2})
  restored, meta = manager.restore(abstract(state_of(0, mesh)))
  assert meta['n'] == 1 and bits(restored) == bits(state_of(5, mesh))


def test_checksum_does_not_depend_on_sharding():
  one, eight = (checksums(flatten(state_of(1, mesh_of(count)))) for count in (1, 8))
  assert one == eight
  assert one['params/encoder/kernel'] != one['opt/0/mu']


def test_checksum_sees_every_bit_and_every_place(rng):
  words = rng.integers(0, 2**32, size=(3, 5), dtype=np.uint32)
  variants = [words, words[::-1], words[:, ::-1]]
  for place, bit in [(0, 0), (0, 31), (1, 0), (7, 12), (7, 13), (14, 31), (13, 31)]:
    variants.append(words.copy())
    variants[-1].reshape(-1)[place] ^= np.uint32(1 << bit)
  swapped = words.copy()
  swapped[0, [0, 1]] = words[0, [1, 0]]
  sums = checksums({str(i): jnp.asarray(x) for i, x in enumerate([*variants, swapped])})
  assert len(set(sums.values())) == len(variants) + 1


def test_checksum_covers_narrow_types():
  types = (jnp.bfloat16, jnp.float16, jnp.int8, jnp.bool_, jnp.int32, jnp.float8_e4m3fn)
  contents = ((0, 1, 0, 1), (1, 0, 1, 0), (0, 0, 0, 0))
  arrays = {f'{jnp.dtype(t).name} {x}': jnp.asarray(x, t) for t in types for x in contents}
  sums = checksums({**arrays, '+0': jnp.float32(0.0), '-0': jnp.float32(-0.0)})
  assert sums['+0'] != sums['-0']
  for name in {name.split()[0] for name in arrays}:
    assert len({sums[f'{name} {x}'] for x in contents}) == 3, name


# ---- what stays ----


def test_keeps_the_last_ones_and_every_so_often(make):
  manager = make(keep=2, keep_every=30)
  state = state_of(0, mesh_of(1))
  for step in range(10, 101, 10):
    manager.save(step, state, {})
  manager.wait()
  assert manager.steps() == [30, 60, 90, 100]


@pytest.mark.parametrize(('mode', 'best'), [('max', 2), ('min', 4)])
def test_the_best_is_never_deleted(make, mode, best):
  values = {1: 0.5, 2: 0.9, 3: float('nan'), 4: 0.1, 5: 0.4}
  state = state_of(0, mesh_of(1))
  manager = make(keep=1, best='eval/knn/top1', best_mode=mode)
  for step, value in values.items():
    manager.save(step, state, {}, {'eval/knn/top1': value, 'loss': 10 - step})
  manager.close()
  manager = make(keep=1, best='eval/knn/top1', best_mode=mode)  # as after a restart
  for step in (6, 7):
    manager.save(step, state, {}, None)
  manager.wait()
  assert manager.steps() == [best, 7]


def test_a_better_one_takes_the_place_of_the_best(make):
  manager = make(keep=1, best='top1')
  for step, value in enumerate((0.1, 0.3, 0.2, 0.4, 0.3)):
    manager.save(step, state_of(0, mesh_of(1)), {}, {'top1': value})
  manager.wait()
  assert manager.steps() == [3, 4]


def test_options_are_checked(tmp_path):
  with pytest.raises(ConfigError, match='checkpoint.keep is 0'):
    Manager(tmp_path, keep=0)
  with pytest.raises(ConfigError, match='keep_every'):
    Manager(tmp_path, keep_every=0)
  with pytest.raises(ConfigError, match='best_mode'):
    Manager(tmp_path, best_mode='highest')


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
  mesh = mesh_of(2)
  saved(make(), mesh, 1, 2)
  wanted = abstract(state_of(0, mesh))
  contents = {step: bits(state_of(step, mesh)) for step in (1, 2)}
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
    assert bits(restored) == contents[meta['step']], path
    assert [step for step, _ in manager.refused] == ([2] if meta['step'] == 1 else []), path
    if manager.refused:
      refused.append(path)
      assert str(folder) in caplog.text and 'damaged' in caplog.text
      assert manager.steps() == [1]
    path.write_bytes(original)
  assert {folder / 'meta' / 'metadata', folder / 'state' / 'manifest.ocdbt'} <= set(refused)
  assert any(path.parent.name == 'd' for path in refused)  # where the arrays are


def test_wrong_content_in_sound_files_is_noticed(make, tmp_path):
  mesh = mesh_of(2)
  saved(make(), mesh, 1, 2, 3)
  shutil.rmtree(tmp_path / 'run' / '3' / 'state')
  shutil.copytree(tmp_path / 'run' / '2' / 'state', tmp_path / 'run' / '3' / 'state')
  manager = make()
  _, meta = manager.restore(abstract(state_of(0, mesh)))
  assert meta['step'] == 2
  [(step, reason)] = manager.refused
  assert step == 3 and 'params/encoder/kernel' in reason and 'not what was saved' in reason
  assert 'scale' not in reason  # the same in both steps


def test_a_damaged_step_is_replaced_and_does_not_count(make, tmp_path):
  mesh = mesh_of(1)
  saved(make(), mesh, 1, 2, 3)
  (tmp_path / 'run' / '3' / 'meta' / 'metadata').write_text('{}')
  wanted = abstract(state_of(0, mesh))
  manager = make(keep=1)
  assert manager.restore(wanted)[1]['step'] == 2
  manager.save(4, state_of(4, mesh), {})
  manager.wait()
  assert list_steps(tmp_path / 'run') == [4]

  (tmp_path / 'run' / '4' / 'meta' / 'metadata').unlink()
  saved(make(), mesh, 2)  # something to fall back to
  manager = make()
  assert manager.restore(wanted)[1]['step'] == 2
  assert manager.save(4, state_of(44, mesh), {})
  restored, meta = manager.restore(wanted)
  assert meta['step'] == 4 and bits(restored) == bits(state_of(44, mesh))


def test_a_damaged_newer_step_does_not_push_out_good_ones(make, tmp_path):
  mesh = mesh_of(1)
  saved(make(), mesh, 10, 20)
  (tmp_path / 'run' / '20' / 'meta' / 'metadata').write_text('')
  manager = make(keep=1)
  assert manager.restore(abstract(state_of(0, mesh)))[1]['step'] == 10
  manager.save(15, state_of(15, mesh), {})
  manager.wait()
  assert list_steps(tmp_path / 'run') == [15]


def test_all_damaged_is_an_error(make, tmp_path):
  mesh = mesh_of(1)
  saved(make(), mesh, 1, 2)
  for step in '12':
    (tmp_path / 'run' / step / 'meta' / 'metadata').unlink()
  with pytest.raises(CheckpointError, match='(?s)every checkpoint in .* is damaged.*step 2.*step 1'):
    make().restore(abstract(state_of(0, mesh)))


def test_another_config_is_not_damage(make):
  mesh = mesh_of(1)
  saved(make(), mesh, 1, 2)
  other = state_of(0, mesh)
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
  mesh = mesh_of(2)
  size = 1 << 14  # 2 arrays of 0.5 MB that do not compress
  manager = Manager(small_disk / 'run', keep=8)
  with pytest.raises(CheckpointError) as caught:
    for step in range(1, 9):
      manager.save(step, state_of(step, mesh, size=size), {})
  manager.close()
  text = str(caught.value)
  named = re.search(r'no space left on the disk for the checkpoint of step (\d+) \(1.0 MB', text)
  assert named, text
  failed = int(named[1])
  assert failed in (step - 1, step)  # mostly noticed by the save after it, as writing goes on beside the steps
  assert f'step {failed - 1} is the newest complete one and intact' in text
  assert any('tmp' in path.name for path in (small_disk / 'run').iterdir())

  manager = Manager(small_disk / 'run', keep=1)  # started again once there is room
  restored, meta = manager.restore(abstract(state_of(0, mesh, size=size)))
  assert meta['step'] == failed - 1 and bits(restored) == bits(state_of(failed - 1, mesh, size=size))
  assert manager.refused == []
  for step in range(1, failed - 1):  # all but the newest: what the failed one left behind takes room, too
    shutil.rmtree(small_disk / 'run' / str(step))
  manager.save(failed, state_of(failed, mesh, size=size), {})
  manager.close()
  assert [path.name for path in (small_disk / 'run').iterdir()] == [str(failed)]


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'x'), ValueError('EXHAUSTED: No space left on device')])
def test_no_space_is_recognised_in_whatever_is_raised(make, monkeypatch, error):
  mesh = mesh_of(1)
  manager = make()
  manager.save(1, state_of(1, mesh), {})
  manager.wait()

  def fail(*args, **kwargs):
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'save', fail)
    with pytest.raises(CheckpointError, match='no space left.*step 2 .*step 1 is the newest complete one and intact'):
      manager.save(2, state_of(2, mesh), {})
    patch.setattr(ocp.CheckpointManager, 'save', lambda *args, **kwargs: (_ for _ in ()).throw(OSError('disk on fire')))
    with pytest.raises(CheckpointError, match='could not write.*disk on fire'):
      manager.save(2, state_of(2, mesh), {})
  assert manager.restore(abstract(state_of(0, mesh)))[1]['step'] == 1


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

  mesh, manager = mesh_of(1), make()
  manager.save(1, state_of(1, mesh), {})
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'close', fail_then_close)
    patch.setattr(ocp.CheckpointManager, 'save', fail)
    with pytest.raises(CheckpointError, match='no space left'):
      manager.save(2, state_of(2, mesh), {})
    assert len(closed) == 1
    manager.close()
  manager.save(2, state_of(2, mesh), {})  # there is room again
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
    from test_manager import Manager, mesh_of, state_of
    run, mesh = pathlib.Path(sys.argv[1]), mesh_of(2)
    manager = Manager(run)
    manager.save(1, state_of(1, mesh, size=1 << 18), {})
    manager.wait()
    manager.save(2, state_of(2, mesh, size=1 << 18), {})
    while not any(path.name.startswith('2.') for path in run.iterdir()):
      time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
  """)
  command = [sys.executable, '-c', child, tmp_path / 'run']
  done = subprocess.run(command, env=environment(2), capture_output=True, text=True)
  assert done.returncode == -signal.SIGKILL, done.stderr
  names = sorted(path.name for path in (tmp_path / 'run').iterdir())
  assert names[0] == '1' and len(names) == 2 and names[1].startswith('2.'), 'the kill came too late to be one'

  mesh = mesh_of(2)
  manager = make()
  state, meta = manager.restore(abstract(state_of(0, mesh, size=1 << 18)))
  assert meta['step'] == 1 and bits(state) == bits(state_of(1, mesh, size=1 << 18)) and manager.refused == []
  manager.save(2, state_of(2, mesh), {})
  manager.wait()
  assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == ['1', '2']


TWO_PROCESSES = """
  import jax
  process, port, run = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
  jax.distributed.initialize(f'localhost:{port}', 2, process)
  import numpy as np
  import orbax.checkpoint as ocp
  from jax.experimental import multihost_utils
  from test_manager import Manager, NamedSharding, PartitionSpec, abstract, mesh_of

  mesh = mesh_of(4)

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
  restored, meta = manager.restore(abstract(state(0)))
  assert meta == {'step': 4, 'digest': 'd'} and equal(restored, state(4))

  # only the second process cannot read step 4: both go back to step 3
  read = ocp.Checkpointer.restore
  def restore(self, directory, *args, **kwargs):
    if process == 1 and directory.parent.name == '4':
      raise OSError('lost')
    return read(self, directory, *args, **kwargs)
  ocp.Checkpointer.restore = restore
  manager = Manager(run, keep=2)
  restored, meta = manager.restore(abstract(state(0)))
  assert meta['step'] == 3 and equal(restored, state(3))
  [(step, reason)] = manager.refused
  assert step == 4 and ('lost' if process else 'another process') in reason, reason

  # both write it again
  ocp.Checkpointer.restore = read
  assert manager.save(4, state(44), {})
  restored, meta = manager.restore(abstract(state(0)))
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
