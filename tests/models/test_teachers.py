"""Frozen encoders: shapes, what they expose, and that nothing is learned through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.errors import ConfigError
from mim_jax.models import teachers
from mim_jax.ops import pixels

TINY = dict(size='32/2/4', patch=8, image_size=32)


def image(size=32, seed=0):
  return jax.random.normal(jax.random.key(seed), (2, size, size, 3))


@pytest.mark.parametrize('kind', teachers.KINDS)
def test_random_teachers_of_every_kind(kind):
  teacher = teachers.make(kind, **TINY)
  frozen = teacher.init(jax.random.key(0))
  out = teacher(frozen, image(), attention=True)
  assert out['tokens'].shape == (2, 16, 32) and out['cls'].shape == (2, 32)
  assert out['layers'].shape == (2, 2, 17, 32) and out['input'].shape == (2, 17, 32)
  assert out['attention'].shape == (2, 4, 16)
  shares = out['attention'].sum(-1)
  assert np.all(shares > 0) and np.all(shares < 1)  # the rest is the class token's
  assert ('pos_embed' in frozen['encoder']) == (kind != 'mae')


def test_no_gradient_flows_through():
  teacher = teachers.make('clip', **TINY)
  frozen = teacher.init(jax.random.key(0))
  value = lambda tree, x: jnp.sum(teacher(tree, x, attention=True)['layers'])
  for grads in jax.grad(value, argnums=(0, 1))(frozen, image()):
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_pixels_are_brought_to_the_statistics_of_the_teacher():
  teacher = teachers.make('clip', **TINY)
  frozen = teacher.init(jax.random.key(0))
  unit = np.random.default_rng(0).random((2, 32, 32, 3)).astype(np.float32)
  outs = []
  for stats in ('imagenet', 'clip', 'none'):
    mean, std = pixels.stats(stats)
    outs.append(teacher(frozen, (unit - mean) / std, stats=stats)['tokens'])
  np.testing.assert_allclose(outs[0], outs[1], atol=1e-5)
  np.testing.assert_allclose(outs[0], outs[2], atol=1e-5)
  assert np.abs(teacher(frozen, unit, stats='clip')['tokens'] - outs[0]).max() > 1e-2


def test_images_of_another_size_are_resized_first():
  teacher = teachers.make('dino', **TINY)
  frozen = teacher.init(jax.random.key(0))
  flat = jnp.ones((1, 48, 48, 3)) * 0.3
  np.testing.assert_allclose(teacher(frozen, flat)['tokens'], teacher(frozen, flat[:, :32, :32])['tokens'], atol=1e-5)
  ramp = jnp.broadcast_to(jnp.linspace(0, 1, 48)[None, :, None, None], (1, 48, 48, 3))
  small = teachers.resize(ramp, (32, 24))
  assert small.shape == (1, 32, 24, 3)
  np.testing.assert_allclose(
    small[0, 4:-4, 0, 0], (np.arange(4, 28) + 0.5) * 1.5 / 47 - 0.5 / 47, atol=2e-3
  )  # a = -0.75 bends a ramp


def test_registers_come_between_class_token_and_patches():
  teacher = teachers.make('dinov2', **TINY, registers=3)
  frozen = teacher.init(jax.random.key(0))
  out = teacher(frozen, image(), attention=True)
  assert (
    out['layers'].shape == (2, 2, 20, 32)
    and out['tokens'].shape == (2, 16, 32)
    and out['attention'].shape == (2, 4, 16)
  )
  np.testing.assert_array_equal(out['input'][0, 1:4], frozen['encoder']['registers'][0])


def test_wrong_teachers():
  with pytest.raises(ConfigError, match='did you mean'):
    teachers.make('dino2', **TINY)
  with pytest.raises(ConfigError, match='multiple'):
    teachers.make('clip', size='32/2/4', patch=14, image_size=32)
  blind = teachers.make('mae', **TINY, cls=False)
  with pytest.raises(ValueError, match='class token'):
    blind(blind.init(jax.random.key(0)), image(), attention=True)


def test_renormalize_is_undone_by_its_inverse():
  x = np.asarray(image())
  there = pixels.renormalize(x, 'imagenet', 'clip')
  assert np.abs(there - x).max() > 0.05
  np.testing.assert_allclose(pixels.renormalize(there, 'clip', 'imagenet'), x, atol=1e-6)
  assert pixels.renormalize(x, 'clip', 'clip') is x
