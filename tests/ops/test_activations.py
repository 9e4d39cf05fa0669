"""GELU by an exponential against erf, and which form is taken where."""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.ops import activations

X = jnp.linspace(-9, 9, 4001)


def exact(x):
  return jax.nn.gelu(x, approximate=False)


def test_value_and_slope():
  np.testing.assert_allclose(activations.by_exponential(X), exact(X), atol=1e-6)
  slope = jax.vmap(jax.grad(activations.by_exponential))(X)
  np.testing.assert_allclose(slope, jax.vmap(jax.grad(exact))(X), atol=1e-6)


def test_bfloat16_is_right_to_its_rounding():
  x = X.astype(jnp.bfloat16)
  found = activations.gelu(x)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), exact(x.astype(jnp.float32)), rtol=2**-8, atol=1e-6)


def test_float32_is_right_to_its_rounding():
  """By 1 + erf, as PyTorch has it: to 1e-6 and not to the last digit far left, where x Phi(x) is nearly 0."""
  np.testing.assert_allclose(activations.gelu(X), exact(X), atol=1e-6)
  slope = jax.vmap(jax.grad(activations.gelu))(X)
  np.testing.assert_allclose(slope, jax.vmap(jax.grad(exact))(X), atol=1e-6)
