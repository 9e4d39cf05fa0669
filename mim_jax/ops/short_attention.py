"""Self-attention over short sequences as a Pallas kernel for TPUs: logits and probabilities never leave the chip's fast memory.

One program holds all tokens of one image. Heads are not cut apart: a head of 32 or 64 features fills only part of the 128 lanes of a
register, and moving it to the front would cost more than the product. Instead the lanes of the other heads are set to zero in one factor;
the matrix unit contracts 128 lanes in the time that it needs for 32. A head of 80 lies in one register or across two, both of which are
contracted. The backward kernel computes the probabilities again, so nothing of
size N x N is stored between the passes. Biases are added in the kernel and their gradients summed there, which saves a pass over memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LONGEST = 640  # tokens; six float32 arrays N x N of the backward kernel stay below the 16 MB that a program may use


def fits(tokens: int, heads: int, head_dim: int) -> bool:
  """Whether the kernel takes these shapes: heads that fill whole registers together, not too many tokens."""
  return tokens <= LONGEST and head_dim <= LANES and (heads * head_dim) % LANES == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def self_attention(qkv, bias, heads, interpret=False):
  """softmax(q k^T / sqrt(d)) v with softmax in float32: qkv [B, N, 3 H d] plus bias [3 H d] -> [B, N, H d] in its dtype.

  `interpret` runs the kernel without a TPU (tests). Only for shapes that pass `fits`.
  """
  return _forward(qkv, bias, heads, interpret)


def _forward(qkv, bias, heads, interpret):
  batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
  return pl.pallas_call(
    functools.partial(_forward_kernel, width=width, head_dim=width // heads),
    grid=(batch,),
    in_specs=[_image(tokens, 3 * width), _row(3 * width)],
    out_specs=_image(tokens, width),
    out_shape=jax.ShapeDtypeStruct((batch, tokens, width), qkv.dtype),
    cost_estimate=cost(batch, tokens, heads, width // heads, qkv.dtype.itemsize, products=2, arrays=4),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    interpret=interpret,
    name='short_attention_forward',
  )(qkv, bias[None])


def _save(qkv, bias, heads, interpret):
  return _forward(qkv, bias, heads, interpret), (qkv, bias)


def _backward(heads, interpret, saved, grad):
  qkv, bias = saved
  batch, tokens, width = grad.shape
  d_qkv, d_bias = pl.pallas_call(
    functools.partial(_backward_kernel, width=width, head_dim=width // heads),
    grid=(batch,),
    in_specs=[_image(tokens, 3 * width), _row(3 * width), _image(tokens, width)],
    out_specs=[_image(tokens, 3 * width), _image(1, 3 * width)],
    out_shape=[
      jax.ShapeDtypeStruct((batch, tokens, 3 * width), qkv.dtype),
      jax.ShapeDtypeStruct((batch, 1, 3 * width), jnp.float32),
    ],
    cost_estimate=cost(batch, tokens, heads, width // heads, qkv.dtype.itemsize, products=5, arrays=7),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    interpret=interpret,
    name='short_attention_backward',
  )(qkv, bias[None], grad)
  return d_qkv, jnp.sum(d_bias, axis=(0, 1)).astype(bias.dtype)


self_attention.defvjp(_save, _backward)


def _row(features):
  return pl.BlockSpec((1, features), lambda i: (0, 0))


def _image(tokens, features):
  return pl.BlockSpec((1, tokens, features), lambda i: (i, 0, 0))


def cost(batch, tokens, heads, head_dim, itemsize, products, arrays) -> pl.CostEstimate:
  """What the matrix unit really does: products of N x N with all lanes of every head's registers, N rounded up to whole tiles.

  `arrays` counts transfers of [B, N, D] from and to main memory.
  """
  padded = -(-tokens // LANES) * LANES
  windows = list(_windows(head_dim))
  lanes = sum(stop - start for start, stop in windows) * heads // len(windows)
  return pl.CostEstimate(
    flops=products * 2 * batch * tokens * padded * lanes,
    transcendentals=batch * heads * tokens * padded,
    bytes_accessed=arrays * batch * tokens * heads * head_dim * itemsize,
  )


def _windows(head_dim):
  """(first, last + 1) lane of the whole registers that hold each head of a group, the fewest heads that fill registers together."""
  for start in range(0, math.lcm(LANES, head_dim), head_dim):
    yield start // LANES * LANES, -(-(start + head_dim) // LANES) * LANES


def _dot(a, b, contract):
  """Product over axis contract[0] of a and contract[1] of b, accumulated in float32."""
  return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def _softmax(logits):
  weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
  return weights / jnp.sum(weights, axis=1, keepdims=True)


def _groups(qkv, bias, width, head_dim):
  """Groups of heads: (lanes [start, stop), [q, k, v])."""
  size = math.lcm(LANES, head_dim)
  for start in range(0, width, size):
    lanes = [slice(part * width + start, part * width + start + size) for part in range(3)]
    yield slice(start, start + size), [qkv[0, :, own] + bias[:, own] for own in lanes]


def _heads(head_dim, *arrays):
  """For each head of a group: its window, each array [N, group] there, and which of its lanes are the head's own [1, window]."""
  for head, (first, stop) in enumerate(_windows(head_dim)):
    lanes = jax.lax.broadcasted_iota(jnp.int32, (1, stop - first), 1) + first
    own = (lanes >= head * head_dim) & (lanes < (head + 1) * head_dim)
    yield slice(first, stop), [x[:, first:stop] for x in arrays], own


class _Total:
  """Sum [N, group] float32 of what the heads of a group add in their windows, register by register."""

  def __init__(self, tokens, head_dim):
    self.registers = [jnp.zeros((tokens, LANES), jnp.float32) for _ in range(math.lcm(LANES, head_dim) // LANES)]

  def add(self, window, x):
    for start in range(window.start, window.stop, LANES):
      self.registers[start // LANES] += x[:, start - window.start : start - window.start + LANES]

  def value(self):
    return jnp.concatenate(self.registers, axis=1)


def _forward_kernel(qkv, bias, out, *, width, head_dim):
  for group, values in _groups(qkv, bias, width, head_dim):
    total = _Total(qkv.shape[1], head_dim)
    for window, (q, k, v), own in _heads(head_dim, *values):
      weights = _softmax(_dot(q, jnp.where(own, k, 0), (1, 1)) * head_dim**-0.5)
      total.add(window, _dot(weights.astype(v.dtype), jnp.where(own, v, 0), (1, 0)))
    out[0, :, group] = total.value().astype(out.dtype)


def _backward_kernel(qkv, bias, grad, out, d_bias, *, width, head_dim):
  scale = head_dim**-0.5
  for group, values in _groups(qkv, bias, width, head_dim):
    totals = [_Total(qkv.shape[1], head_dim) for _ in range(3)]
    for window, (q, k, v, given), own in _heads(head_dim, *values, grad[0, :, group]):
      weights = _softmax(_dot(q, jnp.where(own, k, 0), (1, 1)) * scale)
      d_weights = _dot(given, jnp.where(own, v, 0), (1, 1))
      d_logits = weights * (d_weights - jnp.sum(weights * d_weights, axis=1, keepdims=True)) * scale
      d_logits = d_logits.astype(q.dtype)
      totals[0].add(window, _dot(d_logits, jnp.where(own, k, 0), (1, 0)))
      totals[1].add(window, _dot(d_logits, jnp.where(own, q, 0), (0, 0)))
      totals[2].add(window, _dot(weights.astype(given.dtype), jnp.where(own, given, 0), (0, 0)))
    for part, total in enumerate(totals):
      lanes = slice(part * width + group.start, part * width + group.stop)
      out[0, :, lanes] = total.value().astype(out.dtype)
      d_bias[0, :, lanes] = jnp.sum(total.value(), axis=0, keepdims=True)
