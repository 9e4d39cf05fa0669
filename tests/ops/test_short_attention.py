"""The Pallas kernel against the plain form, in interpret mode: values and gradients, in float32 and bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops import attention, short_attention


def plain(qkv, bias):
  return attention.attention(*attention.parts(qkv + bias))


def case(tokens, heads, head_dim, dtype='float32'):
  keys = jax.random.split(jax.random.key(tokens), 3)
  qkv = jax.random.normal(keys[0], (2, tokens, 3, heads, head_dim)).astype(dtype)
  bias = jax.random.normal(keys[1], (3, heads, head_dim)).astype(dtype)
  return qkv, bias, jax.random.normal(keys[2], (2, tokens, heads, head_dim)).astype(dtype)


def both(qkv, bias, grad):
  def kernel(qkv, bias):
    merged = short_attention.self_attention(qkv.reshape(*qkv.shape[:2], -1), bias.reshape(-1), qkv.shape[3], True)
    return merged.reshape(grad.shape)

  found, back = jax.vjp(kernel, qkv, bias)
  expected, plain_back = jax.vjp(plain, qkv, bias)
  return (found, *back(grad)), (expected, *plain_back(grad))


@pytest.mark.parametrize(
  ('tokens', 'heads', 'head_dim'), [(5, 4, 32), (13, 4, 64), (17, 8, 32), (8, 2, 128), (13, 8, 80)]
)
def test_values_and_gradients(tokens, heads, head_dim):
  assert short_attention.fits(tokens, heads, head_dim)
  for found, expected in zip(*both(*case(tokens, heads, head_dim)), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_to_its_rounding():
  for found, expected in zip(*both(*case(13, 4, 32, 'bfloat16')), strict=True):
    assert found.dtype == jnp.bfloat16
    wide = expected.astype(jnp.float32)
    np.testing.assert_allclose(found.astype(jnp.float32), wide, atol=2**-6 * float(jnp.max(jnp.abs(wide))))


@pytest.mark.parametrize(('tokens', 'heads', 'head_dim'), [(16, 3, 32), (16, 12, 80), (16, 1, 256), (641, 4, 32)])
def test_shapes_that_it_leaves_to_the_plain_form(tokens, heads, head_dim):
  assert not short_attention.fits(tokens, heads, head_dim)


def test_the_cost_counts_what_the_matrix_unit_does():
  found = short_attention.cost(2, 197, 16, 32, 2, products=2, arrays=4)
  assert found.flops == 2 * 2 * 2 * 16 * 197 * 256 * 128
  assert found.bytes_accessed == 4 * 2 * 197 * 512 * 2
  across = short_attention.cost(
    2, 65, 16, 80, 2, products=2, arrays=4
  )  # 8 heads of 80 lie in 1, 2, 1, 2, 2, 1, 2 and 1 registers
  assert across.flops == 2 * 2 * 2 * 65 * 128 * (2 * 12 * 128)
