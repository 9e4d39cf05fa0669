"""Values and gradients against Flax's layer, whose gradient is left to differentiation; what is kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops import layer_norm


def case(dtype='float32'):
  keys = jax.random.split(jax.random.key(0), 4)
  x = 3 + 2 * jax.random.normal(keys[0], (4, 5, 24))
  scale, bias = 1 + jax.random.normal(keys[1], (24,)), jax.random.normal(keys[2], (24,))
  return x.astype(dtype), scale, bias, jax.random.normal(keys[3], x.shape).astype(dtype)


def flax(x, scale, bias, dtype):
  given = {name: value for name, value in (('scale', scale), ('bias', bias)) if value is not None}
  parts = dict(use_scale=scale is not None, use_bias=bias is not None)
  net = nn.LayerNorm(1e-6, dtype, use_fast_variance=False, **parts)
  return net.apply({'params': given}, x)


@pytest.mark.parametrize('without', [(), ('scale',), ('bias',), ('scale', 'bias')])
def test_values_and_gradients(without):
  x, scale, bias, grad = case()
  scale, bias = (None if name in without else value for name, value in (('scale', scale), ('bias', bias)))
  found, back = jax.vjp(lambda *a: layer_norm.layer_norm(*a, 1e-6, jnp.dtype('float32')), x, scale, bias)
  expected, plain = jax.vjp(lambda *a: flax(*a, 'float32'), x, scale, bias)
  np.testing.assert_allclose(found, expected, atol=2e-6)
  for ours, theirs in zip(back(grad), plain(grad), strict=True):
    assert (ours is None) == (theirs is None)
    if ours is not None:
      np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_is_computed_in_float32():
  x, scale, bias, grad = case('bfloat16')
  found, back = jax.vjp(lambda *a: layer_norm.layer_norm(*a, 1e-6, x.dtype), x, scale, bias)
  wide, wide_back = jax.vjp(
    lambda *a: layer_norm.layer_norm(*a, 1e-6, jnp.dtype('float32')), x.astype('float32'), scale, bias
  )
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, wide.astype('bfloat16'))
  d_x, d_scale, d_bias = back(grad)
  expected = wide_back(grad.astype('float32'))
  assert (d_x.dtype, d_scale.dtype, d_bias.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
  np.testing.assert_array_equal(d_x, expected[0].astype('bfloat16'))
  np.testing.assert_allclose(d_scale, expected[1], atol=1e-5)
  np.testing.assert_allclose(d_bias, expected[2], atol=1e-5)


def test_input_and_two_numbers_per_row_are_kept():
  x, scale, bias, _ = case('bfloat16')
  kept = jax.eval_shape(lambda *a: jax.vjp(lambda *b: layer_norm.layer_norm(*b, 1e-6, x.dtype), *a)[1], x, scale, bias)
  sizes = sorted((leaf.size, str(leaf.dtype)) for leaf in jax.tree.leaves(kept))
  assert sizes == [(20, 'float32')] * 2 + [(24, 'float32')] * 2 + [(480, 'bfloat16')]  # statistics, parameters, input
