"""Adding a bias to the features of every token."""

import jax
import jax.numpy as jnp

from mim_jax.ops import placement


def add(y, bias):
  """y [..., *f] + bias [*f] of the same dtype.

  In bfloat16 on CPUs the gradient of the bias is summed in float32: XLA's own sum rounds at every addition, one at a time.
  """
  return _add(y, bias) if y.dtype == jnp.bfloat16 and placement.on_cpu() else y + bias


@jax.custom_vjp
def _add(y, bias):
  return y + bias


def _keep(y, bias):
  return y + bias, bias.ndim


def _gradients(ndim, grad):
  leading = tuple(range(grad.ndim - ndim))
  return grad, jnp.sum(grad, leading, dtype=jnp.float32).astype(grad.dtype)


_add.defvjp(_keep, _gradients)
