"""Layer normalisation that keeps little for its gradient.

Left to differentiation it keeps three float32 arrays of the size of its input, 12 bytes for each number: a quarter to a half of all that a
transformer in bfloat16 keeps. Here the input, in its own dtype, and two numbers per row are kept.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x, scale, bias, eps, dtype):
  """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis (Ba et al. 2016): x [..., D] -> `dtype`.

  Computed in float32, with the two-pass variance that the official codes use. `scale` and `bias` [D] may be None.
  """
  return _forward(x, scale, bias, eps, dtype)[0]


def _forward(x, scale, bias, eps, dtype):
  wide = x.astype(jnp.float32)
  mean = jnp.mean(wide, axis=-1, keepdims=True)
  rate = jax.lax.rsqrt(jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True) + eps)
  y = (wide - mean) * (rate if scale is None else rate * scale)
  y = y if bias is None else y + bias
  return y.astype(dtype), (x, mean, rate, scale, bias)


def _backward(eps, dtype, kept, grad):
  del eps, dtype
  x, mean, rate, scale, bias = kept
  grad = grad.astype(jnp.float32)
  normed = (x.astype(jnp.float32) - mean) * rate
  rows = tuple(range(x.ndim - 1))
  d_scale = None if scale is None else jnp.sum(grad * normed, axis=rows).astype(scale.dtype)
  d_bias = None if bias is None else jnp.sum(grad, axis=rows).astype(bias.dtype)
  inner = grad if scale is None else grad * scale
  share = jnp.mean(inner * normed, axis=-1, keepdims=True)
  d_x = rate * (inner - jnp.mean(inner, axis=-1, keepdims=True) - normed * share)
  return d_x.astype(x.dtype), d_scale, d_bias


layer_norm.defvjp(_forward, _backward)
