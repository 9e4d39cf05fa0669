"""The product of activations and weights in the form that XLA is fast at on CPUs.

The gradients are spelled out, each as one product that reads its arguments as they lie: JAX's own rule asks for the gradient of the weights
transposed, and XLA then computes that and turns it round. In bfloat16 every product is asked for in float32 and rounded afterwards, which is
what the matrix units of CPUs do; asked for in bfloat16, XLA converts the arguments to float32 and takes four times as long.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x, kernel, contract: int):
  """x [R, *c] times kernel [*c, *out] over the `contract` axes c -> [R, *out]; both float32 or both bfloat16, as is the result."""
  inner = range(contract)
  return _dot(x, kernel, [1 + axis for axis in inner], inner)


def _dot(a, b, a_axes, b_axes):
  """a and b summed over these axes, in float32, then in a's dtype."""
  y = jax.lax.dot_general(a, b, ((tuple(a_axes), tuple(b_axes)), ((), ())), preferred_element_type=jnp.float32)
  return y.astype(a.dtype)


def _keep(x, kernel, contract):
  return product(x, kernel, contract), (x, kernel)


def _gradients(contract, kept, grad):
  x, kernel = kept
  outer = range(kernel.ndim - contract)
  to_x = _dot(grad, kernel, [1 + axis for axis in outer], [contract + axis for axis in outer])
  if x.dtype == jnp.float32:
    return to_x, _dot(x, grad, [0], [0])
  return to_x, _over_rows(x.reshape(len(x), -1), grad.reshape(len(grad), -1)).reshape(kernel.shape)


def _over_rows(a, b):
  """a [R, m] and b [R, n] in bfloat16, summed over R -> [m, n].

  XLA's fast products want the summed axis last in the first argument. It never lays a plain transpose out that way, but takes the array as it
  lies and the slow product; so the narrower argument is transposed by a product with the identity, which is exact.
  """
  if a.shape[1] > b.shape[1]:
    return _over_rows(b, a).T
  turned = _dot(jnp.eye(a.shape[1], dtype=a.dtype), a, [1], [1])
  return _dot(jax.lax.optimization_barrier(turned), b, [1], [0])


product.defvjp(_keep, _gradients)
