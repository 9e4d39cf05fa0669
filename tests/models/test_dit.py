"""Blocks under a condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models import dit


def test_times_are_sines_then_cosines_of_whole_steps():
  table = dit.time_embedding(jnp.array([0, 3]), 8)
  np.testing.assert_array_equal(table[0], [0, 0, 0, 0, 1, 1, 1, 1])
  angles = 3 * 10000.0 ** (-np.arange(4) / 3)
  np.testing.assert_allclose(table[1], np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-6)


def test_no_label_and_the_null_label_are_the_same():
  module = dit.Condition(8, classes=5)
  t = jnp.array([1, 7])
  params = module.init(jax.random.key(0), t)
  np.testing.assert_array_equal(module.apply(params, t), module.apply(params, t, jnp.array([5, 5])))
  assert np.any(module.apply(params, t) != module.apply(params, t, jnp.array([0, 1])))
  plain = dit.Condition(8)
  with pytest.raises(ValueError, match='without classes'):
    plain.init(jax.random.key(0), t, jnp.array([0, 1]))


def test_modulated_blocks_start_as_the_identity():
  x, c = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.random.normal(jax.random.key(1), (2, 8))
  block = dit.ModulatedBlock(heads=2)
  y, _ = block.apply(block.init(jax.random.key(2), x, c), x, c)
  np.testing.assert_array_equal(x, y)


def test_a_token_block_looks_at_the_condition_and_drops_it():
  x, c = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.random.normal(jax.random.key(1), (2, 8))
  block = dit.TokenBlock(heads=2)
  params = block.init(jax.random.key(2), x, c)
  y, _ = block.apply(params, x, c)
  assert y.shape == x.shape
  assert np.any(block.apply(params, x, -c)[0] != y)


def test_every_block_of_a_stack_gets_the_same_condition():
  x, c = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.random.normal(jax.random.key(1), (2, 8))
  stack = dit.Stack(depth=3, heads=2, adaln=True)
  params = stack.init(jax.random.key(2), x, c)
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
  one = dit.ModulatedBlock(heads=2)
  y = x
  for i in range(3):
    y, _ = one.apply({'params': jax.tree.map(lambda p, i=i: p[i], params['params']['blocks'])}, y, c)
  y = dit.blocks.LayerNorm().apply({'params': params['params']['norm']}, y)
  np.testing.assert_allclose(stack.apply(params, x, c), y, atol=1e-5)
