"""Dropout, masks and arguments that all blocks of a stack share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.models import blocks
from mim_jax.ops import attention


def test_dropout_keeps_the_mean_and_belongs_to_the_example():
  x = jnp.ones((3, 200, 50))
  keys = jax.random.split(jax.random.key(0), 3)
  dropped = blocks.dropout(x, keys, 0.2)
  assert set(np.unique(dropped)) == {np.float32(0), np.float32(1.25)}
  assert abs(float(dropped.mean()) - 1) < 0.02
  assert abs(float((dropped == 0).mean()) - 0.2) < 0.01
  np.testing.assert_array_equal(blocks.dropout(x[1:2], keys[1:2], 0.2), dropped[1:2])
  assert np.any(dropped[0] != dropped[1])
  assert blocks.dropout(x.astype(jnp.bfloat16), keys, 0.2).dtype == jnp.bfloat16


def test_attention_is_dropped_after_the_softmax():
  q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 4)) for i in range(3))
  only_first = lambda shares: shares * (jnp.arange(5) == 0)
  expected = attention.weights(q, k)[..., :1] * v.swapaxes(1, 2)[:, :, :1]
  np.testing.assert_allclose(attention.attention(q, k, v, drop=only_first), expected.swapaxes(1, 2), atol=1e-6)


def test_masked_keys_are_as_if_they_were_not_there():
  layer = blocks.stack(blocks.Block, 2, True, 'none', in_axes=(0, nn.broadcast))(4, 2.0, name='blocks')
  x = jax.random.normal(jax.random.key(0), (2, 6, 16))
  params = layer.init(jax.random.key(1), x, None, None)
  visible = jnp.arange(6) < 4
  masked, _ = layer.apply(params, x, None, attention.mask_out(jnp.broadcast_to(visible, (2, 6))))
  short, _ = layer.apply(params, x[:, :4], None, None)
  np.testing.assert_allclose(masked[:, :4], short, atol=1e-5)
  free, _ = layer.apply(params, x, None, None)
  assert np.abs(free[:, :4] - short).max() > 1e-3
