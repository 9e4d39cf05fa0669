"""Saving, restoring and what stays."""

import jax
import jax.numpy as jnp
import manager_cases as cases
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax.checkpoint.manager import Manager, checksums, flatten
from mim_jax.errors import ConfigError


def test_nothing_to_restore_writes_nothing(make, tmp_path):
  assert make().restore(cases.abstract(cases.state_of(0, cases.mesh_of(1)))) is None
  assert make().steps() == []
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('asynchronous', [True, False])
def test_round_trip_is_bit_exact(make, asynchronous):
  mesh = cases.mesh_of(8)
  state = cases.state_of(7, mesh)
  manager = make(asynchronous=asynchronous)
  assert manager.save(7, state, {'digest': 'abc', 'seed': 3, 'pending': ['knn']})
  restored, meta = manager.restore(cases.abstract(state))
  assert meta == {'step': 7, 'digest': 'abc', 'seed': 3, 'pending': ['knn']}
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert cases.bits(restored) == cases.bits(state)
  assert manager.refused == []


@pytest.mark.parametrize(('before', 'after'), [(8, 1), (8, 4), (1, 8), (4, 2)])
def test_restores_onto_another_mesh(make, before, after):
  state = cases.state_of(3, cases.mesh_of(before))
  cases.saved(make(), cases.mesh_of(before), 3)
  wanted = cases.state_of(0, cases.mesh_of(after))
  restored, _ = make().restore(cases.abstract(wanted))
  assert cases.bits(restored) == cases.bits(state)
  assert [x.sharding for x in jax.tree.leaves(restored)] == [x.sharding for x in jax.tree.leaves(wanted)]


def test_donated_buffers_do_not_reach_a_save_under_way(make):
  mesh = cases.mesh_of(8)
  state = {'params': jax.device_put(jnp.zeros((1 << 18, 8)), NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))}
  update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  state = update(state)
  manager = make()
  manager.save(1, state, {})
  for _ in range(20):
    state = update(state)
  jax.block_until_ready(state)
  restored, _ = manager.restore(cases.abstract(state))
  assert np.unique(restored['params']).tolist() == [1]


def test_a_step_is_saved_once(make):
  mesh = cases.mesh_of(1)
  manager = make()
  assert manager.save(5, cases.state_of(5, mesh), {'n': 1})
  assert not manager.save(5, cases.state_of(6, mesh), {'n': 2})
  restored, meta = manager.restore(cases.abstract(cases.state_of(0, mesh)))
  assert meta['n'] == 1 and cases.bits(restored) == cases.bits(cases.state_of(5, mesh))


def test_checksum_does_not_depend_on_sharding():
  one, eight = (checksums(flatten(cases.state_of(1, cases.mesh_of(count)))) for count in (1, 8))
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
  state = cases.state_of(0, cases.mesh_of(1))
  for step in range(10, 101, 10):
    manager.save(step, state, {})
  manager.wait()
  assert manager.steps() == [30, 60, 90, 100]


@pytest.mark.parametrize(('mode', 'best'), [('max', 2), ('min', 4)])
def test_the_best_is_never_deleted(make, mode, best):
  values = {1: 0.5, 2: 0.9, 3: float('nan'), 4: 0.1, 5: 0.4}
  state = cases.state_of(0, cases.mesh_of(1))
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
    manager.save(step, cases.state_of(0, cases.mesh_of(1)), {}, {'top1': value})
  manager.wait()
  assert manager.steps() == [3, 4]


def test_options_are_checked(tmp_path):
  with pytest.raises(ConfigError, match='checkpoint.keep is 0'):
    Manager(tmp_path, keep=0)
  with pytest.raises(ConfigError, match='keep_every'):
    Manager(tmp_path, keep_every=0)
  with pytest.raises(ConfigError, match='best_mode'):
    Manager(tmp_path, best_mode='highest')
