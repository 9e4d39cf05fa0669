"""The train step: accumulation, guard, randomness and agreement over meshes, with a method that needs no network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config, method, optim, step
from mim_jax.errors import ConfigError
from mim_jax.method import Field, Method
from mim_jax.parallel import mesh as meshes


def counting_method(couples=False):
  """Loss with a denominator that differs per example: mean over marked entries of (w x - y)^2, y random."""

  def draw(key, batch):
    mask = (jax.random.uniform(key, batch['x'].shape) < 0.5).astype(jnp.float32)
    return {'mask': mask, 'y': jax.random.normal(key, batch['x'].shape), 'counts': {'marked': mask.sum()}}

  def loss(params, state, frozen, batch, draws, step):
    del state, frozen, step
    value = jnp.sum(draws['mask'] * (params['w'] * batch['x'] - draws['y']) ** 2) / draws['counts']['marked']
    return value, {'metrics': {'loss/marked': value}, 'out': {'x': batch['x']}}

  return Method(
    fields={'x': Field('B F', (4,))},
    init=lambda key, batch: {'w': jax.random.normal(key, (4,))},
    draw=draw,
    loss=loss,
    encode=lambda params, batch, state=None: {'tokens': batch['x'][:, None]},
    state=lambda params: {'seen': jnp.zeros((16, 4))},
    after_step=lambda state, params, out, step: {'seen': out['x']},
    couples=couples,
  )


def program(accumulate=1, ema=0.9, max_bad_steps=3):
  built = counting_method()
  cfg = config.section('optim', base_lr=0.1, lr_batch=0)
  optimizer = optim.make(
    cfg,
    config.section('schedule', name='constant'),
    16,
    100,
    10,
    jax.eval_shape(lambda: built.init(jax.random.key(0), None)),
  )
  fn = step.step_function(
    built, optimizer, seed=5, accumulate=accumulate, ema_momentum=ema, max_bad_steps=max_bad_steps
  )
  params = built.init(jax.random.key(0), None)
  zero = jnp.int32(0)
  train = {
    'step': zero,
    'params': params,
    'opt': optimizer.init(params),
    'state': built.state(params),
    'ema': params if ema else {},
    'faults': dict.fromkeys(('bad_steps', 'streak', 'longest', 'last_bad', 'corrupt'), zero),
  }
  return jax.jit(fn), train


def batch_of(seed, bad=False):
  x = jax.random.normal(jax.random.key(seed), (16, 4))
  return {'x': x.at[3, 1].set(jnp.nan) if bad else x, 'corrupt': jnp.zeros(16, bool)}


@pytest.mark.parametrize('parts', [2, 4, 8])
def test_accumulation_equals_the_whole_batch(parts):
  whole, train = program()
  split, _ = program(accumulate=parts)
  one, metrics = whole(train, {}, batch_of(1))
  other, split_metrics = split(train, {}, batch_of(1))
  for a, b in zip(jax.tree.leaves((one, metrics)), jax.tree.leaves((other, split_metrics)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_a_bad_step_changes_no_tree_and_is_counted():
  fn, train = program()
  after, metrics = fn(train, {}, batch_of(1, bad=True))
  for name in ('params', 'opt', 'state', 'ema'):
    for a, b in zip(jax.tree.leaves(train[name]), jax.tree.leaves(after[name]), strict=True):
      np.testing.assert_array_equal(a, b)
  assert not np.isfinite(metrics['loss'])
  assert after['step'] == 1 and after['faults']['bad_steps'] == 1 and after['faults']['streak'] == 1
  good, _ = fn(after, {}, batch_of(2))
  assert good['faults']['streak'] == 0 and good['faults']['longest'] == 1 and good['faults']['bad_steps'] == 1
  assert np.any(good['params']['w'] != after['params']['w'])


def test_a_streak_freezes_the_state_until_the_host_looks():
  fn, train = program(max_bad_steps=3)
  for i in range(3):
    train, _ = fn(train, {}, batch_of(i, bad=True))
  frozen, _ = fn(train, {}, batch_of(9))
  assert frozen['step'] == 4 and frozen['faults']['last_bad'] == 2 and frozen['faults']['longest'] == 3
  np.testing.assert_array_equal(frozen['params']['w'], train['params']['w'])


def test_draws_follow_from_seed_and_step_alone():
  fn, train = program()
  first = fn(train, {}, batch_of(1))[1]['loss']
  assert first == fn(train, {}, batch_of(1))[1]['loss']
  assert first != fn({**train, 'step': jnp.int32(1)}, {}, batch_of(1))[1]['loss']


def test_the_average_of_params_follows_them():
  fn, train = program(ema=0.9)
  after, _ = fn(train, {}, batch_of(1))
  np.testing.assert_allclose(after['ema']['w'], 0.9 * train['ema']['w'] + 0.1 * after['params']['w'], rtol=1e-6)


def tiny_config(**mesh):
  cfg = config.base()
  cfg.method = method.options('mae', size='64/2/4', decoder='32/1/4', patch=8, image_size=32)
  cfg.batch_size, cfg.duration, cfg.mesh = 16, '20 steps', {'data': 1, 'fsdp': 1, 'tensor': 1} | mesh
  cfg.schedule.warmup = '2 steps'
  cfg.optim.base_lr, cfg.optim.lr_batch = 1e-3, 0
  return cfg


def losses_on(devices, steps=20, accumulate=1, **mesh):
  cfg = tiny_config(**mesh)
  cfg.accumulate = accumulate
  cfg.ema = 0.99
  made = step.assemble(cfg, meshes.make_mesh(cfg.mesh, devices), examples=160)
  train = made.init(np.uint32(0))
  found = []
  for i in range(steps):
    images = np.random.default_rng(i).standard_normal((16, 32, 32, 3), np.float32)
    batch = jax.device_put({'image': images, 'corrupt': np.zeros(16, bool)}, made.batch_sharding)
    train, metrics = made.step(train, {}, batch)
    found.append(float(metrics['loss']))
  return np.array(found), train


@pytest.fixture(scope='module')
def reference():
  return losses_on(jax.devices()[:1])


@pytest.mark.parametrize(
  'mesh', [{'data': 2}, {'fsdp': 4}, {'tensor': 2}, {'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 8}], ids=str
)
def test_meshes_agree(reference, mesh):
  count = int(np.prod(list(mesh.values())))
  found, train = losses_on(jax.devices()[:count], **mesh)
  np.testing.assert_allclose(found, reference[0], rtol=1e-5)
  if mesh.get('fsdp', 1) > 1:
    kernel = train['params']['encoder']['blocks']['mlp']['fc1']['kernel']
    assert 'fsdp' in kernel.sharding.spec


def test_accumulated_steps_on_a_mesh_agree(reference):
  found, _ = losses_on(jax.devices()[:4], accumulate=2, data=2, fsdp=2)
  np.testing.assert_allclose(found, reference[0], rtol=1e-5)


def test_refusals():
  cfg = tiny_config(data=8)
  cfg.batch_size = 12
  with pytest.raises(ConfigError, match='12'):
    step.assemble(cfg, meshes.make_mesh(cfg.mesh), examples=160)
