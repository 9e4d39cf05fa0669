"""The CPU forms of products and biases: values and gradients are those of the plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models import blocks
from mim_jax.ops import bias, cpu_product

SHAPES = [((48,), (16,)), ((16,), (48,)), ((16,), (3, 4, 8)), ((4, 8), (16,))]  # summed axes, axes of the result


def case(inner, outer, dtype, rows=40):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((rows, *inner), (*inner, *outer), (rows, *outer))
  return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def both(function, grad, *args):
  value, back = jax.vjp(function, *args)
  return value, *back(grad)


@pytest.mark.parametrize('inner, outer', SHAPES)
def test_product_and_gradients_in_float32(inner, outer):
  x, kernel, grad = case(inner, outer, 'float32')
  found = both(lambda x, w: cpu_product.product(x, w, len(inner)), grad, x, kernel)
  expected = both(lambda x, w: jnp.tensordot(x, w, len(inner)), grad, x, kernel)
  for a, b in zip(found, expected, strict=True):
    assert a.shape == b.shape and a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('inner, outer', SHAPES)
def test_bfloat16_is_the_float32_product_rounded_once(inner, outer):
  x, kernel, grad = case(inner, outer, 'bfloat16')
  found = both(lambda x, w: cpu_product.product(x, w, len(inner)), grad, x, kernel)
  exact = both(lambda x, w: jnp.tensordot(x, w, len(inner)), *(a.astype(jnp.float32) for a in (grad, x, kernel)))
  for a, b in zip(found, exact, strict=True):
    assert a.shape == b.shape and a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-5)


def test_layers_use_it_on_cpu(monkeypatch):
  seen = []
  plain = cpu_product.product
  monkeypatch.setattr(cpu_product, 'product', lambda *args: seen.append(args[2]) or plain(*args))
  blocks.matmul(jnp.ones((2, 3, 4, 8)), jnp.ones((4, 8, 5)), contract=2)
  assert seen == [2]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradient_of_a_bias_is_summed_in_float32(dtype):
  """Of 4,096 gradients 1 + 2^-7 a sum that rounds to bfloat16 as it goes stops growing at 256."""
  y, b = jnp.zeros((64, 64, 3, 2), dtype), jnp.arange(6, dtype=dtype).reshape(3, 2)
  value, back = jax.vjp(bias.add, y, b)
  np.testing.assert_array_equal(value, jnp.broadcast_to(b, y.shape))
  grad = jnp.full(y.shape, 1 + 2**-7, dtype)
  to_y, to_b = back(grad)
  np.testing.assert_array_equal(to_y, grad)
  np.testing.assert_array_equal(to_b.astype(jnp.float32), 4096 * (1 + 2**-7))
