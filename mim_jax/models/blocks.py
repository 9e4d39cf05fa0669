"""The transformer block that nearly every method uses. The names in here are the checkpoint format: they never change.

Blocks of one stack share their arrays: every parameter has a leading axis of length depth, whether the loop is compiled once (`scan`) or
unrolled. Attention kernels keep heads as an axis of their own, so that sharding over heads is a statement about one axis.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from mim_jax.ops import activations, attention, bias, cpu_product, layer_norm, placement


def xavier_uniform(fan_in, fan_out):
  """Uniform in +-sqrt(6 / (fan_in + fan_out)) for a kernel of any shape whose matrix form is fan_in x fan_out."""
  bound = math.sqrt(6 / (fan_in + fan_out))
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def matmul(x, kernel, contract=1):
  """Product of x [..., *c] and kernel [*c, *out] over the `contract` axes c -> [..., *out]."""
  lead = x.shape[: x.ndim - contract]
  if placement.on_cpu():
    y = cpu_product.product(x.reshape(-1, *x.shape[len(lead) :]), kernel, contract)
  elif placement.on_tpu() and placement.heads_whole():
    # Tokens stay, as they rarely fill whole tiles; heads in one, as they fill no registers.
    width = math.prod(kernel.shape[:contract])
    # The barrier keeps the compiler from taking the reshape of the gradient into the product, whose layout then costs five times as much.
    y = x.reshape(*lead, width) @ jax.lax.optimization_barrier(kernel.reshape(width, -1))
  else:
    y = jnp.tensordot(x, kernel, contract)
  return placement.by_rows(y.reshape(*lead, *kernel.shape[contract:]))


class Dense(nn.Module):
  """x [..., in] -> [..., out] with xavier-uniform kernel [in, out] and zero bias (unless `use_bias` is off), computed in `dtype`."""

  features: int
  dtype: str = 'float32'
  bias_init: nn.initializers.Initializer = zeros
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    fan_in = x.shape[-1]
    kernel = self.param('kernel', xavier_uniform(fan_in, self.features), (fan_in, self.features))
    y = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
    return bias.add(y, self.param('bias', self.bias_init, (self.features,)).astype(self.dtype)) if self.use_bias else y


class Qkv(nn.Module):
  """Queries, keys and values by one kernel [D, 3, H, d].

  Initialised as one [D, 3 D] matrix, whose bound is smaller than that of three [D, D] ones (facebookresearch/mae, models_mae.py).

  Attributes:
    use_bias: True for one bias of all three; letters of 'qkv' for parameters of their own, `q_bias` and so on, of those that have one
      (BEiT and its descendants: 'qv').
  """

  heads: int
  dtype: str = 'float32'
  use_bias: bool | str = True

  @nn.compact
  def __call__(self, x):
    """x [B, N, D] -> (products [B, N, 3, H, d], biases [3, H, d], zero where there are none), both in `dtype` and to be added."""
    width = x.shape[-1]
    shape = (3, self.heads, width // self.heads)
    kernel = self.param('kernel', xavier_uniform(width, 3 * width), (width, *shape))
    y = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
    if isinstance(self.use_bias, str):
      added = jnp.stack(
        [
          self.param(f'{letter}_bias', zeros, shape[1:]) if letter in self.use_bias else jnp.zeros(shape[1:])
          for letter in 'qkv'
        ]
      )
    else:
      added = self.param('bias', zeros, shape) if self.use_bias else jnp.zeros(shape)
    return y, added.astype(self.dtype)


class MergeHeads(nn.Module):
  """x [B, N, H, d] -> [B, N, features] by a kernel [H, d, features] and a bias: the output projection of attention."""

  features: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    heads, head_dim = x.shape[-2:]
    kernel = self.param('kernel', xavier_uniform(heads * head_dim, self.features), (heads, head_dim, self.features))
    y = matmul(x.astype(self.dtype), kernel.astype(self.dtype), contract=2)
    return bias.add(y, self.param('bias', zeros, (self.features,)).astype(self.dtype))


class SelfAttention(nn.Module):
  """Multi-head self-attention: x [B, N, D] -> [B, N, D].

  `mask` as in `ops.attention.attention`. With `show` the attention comes too, float32 [B, H, rows, N]: of the first token ('cls',
  rows = 1) or of all ('all', rows = N).
  """

  heads: int
  dtype: str = 'float32'
  qkv_bias: bool | str = True  # see `Qkv`
  show: str = ''

  @nn.compact
  def __call__(self, x, mask=None):
    qkv, added = Qkv(self.heads, self.dtype, self.qkv_bias, name='qkv')(x)
    y = MergeHeads(x.shape[-1], self.dtype, name='proj')(attention.self_attention(qkv, added, mask))
    if not self.show:
      return y
    q, k, _ = attention.parts(qkv + added)
    rows = slice(1) if self.show == 'cls' else slice(None)
    return y, attention.weights(q[:, rows], k, None if mask is None else mask[:, :, rows])


class SplitHeads(nn.Module):
  """x [B, N, D] -> [B, N, *shape] by a kernel [D, *shape]: (H, d) for queries, keys or values, (2, H, d) for two of them at once."""

  shape: tuple[int, ...]
  dtype: str = 'float32'
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    kernel = self.param('kernel', xavier_uniform(width, math.prod(self.shape)), (width, *self.shape))
    y = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
    return bias.add(y, self.param('bias', zeros, self.shape).astype(self.dtype)) if self.use_bias else y


class JointCrossAttention(nn.Module):
  """Attention with one matrix for keys and values, as in CrossMAE: x [B, N, D], context [B, M, E] -> [B, N, D]."""

  heads: int
  dtype: str = 'float32'
  kv_bias: bool = True

  @nn.compact
  def __call__(self, x, context):
    shape = (self.heads, x.shape[-1] // self.heads)
    q = SplitHeads(shape, self.dtype, name='q')(x)
    kv = SplitHeads((2, *shape), self.dtype, self.kv_bias, name='kv')(context)
    y = attention.attention(q, kv[:, :, 0], kv[:, :, 1])
    return MergeHeads(x.shape[-1], self.dtype, name='proj')(y)


class CrossAttention(nn.Module):
  """Attention with separate query, key and value matrices: x [B, N, D], context [B, M, E] -> [B, N, D].

  Self-attention of that form (BERT) is `context = x`. `values`, where given, [B, M, E], replace the context for the values alone (CAE
  normalises keys and values apart). `mask` and `drop` as in `ops.attention.attention`. With `show`, the attention [B, H, N, M] float32
  comes too.

  Attributes:
    heads: their number; the width of all together is D.
    bias: which of the projections have one: letters of 'qkv'.
  """

  heads: int
  dtype: str = 'float32'
  bias: str = 'qkv'
  show: bool = False

  @nn.compact
  def __call__(self, x, context, mask=None, values=None, drop=None):
    shape = (self.heads, x.shape[-1] // self.heads)
    split = lambda letter, name: SplitHeads(shape, self.dtype, letter in self.bias, name=name)
    q, k = split('q', 'query')(x), split('k', 'key')(context)
    v = split('v', 'value')(context if values is None else values)
    y = MergeHeads(x.shape[-1], self.dtype, name='proj')(attention.attention(q, k, v, mask, drop))
    return (y, attention.weights(q, k, mask)) if self.show else y


def quick_gelu(x):
  """x sigmoid(1.702 x), the GELU of OpenAI's CLIP."""
  return x * nn.sigmoid(1.702 * x)


def swiglu(x):
  """silu(first half) times second half: [..., 2 n] -> [..., n] (DINOv2's giant)."""
  gate, value = jnp.split(x, 2, axis=-1)
  return nn.silu(gate) * value


ACTIVATIONS = {
  'gelu': activations.gelu,
  'gelu_tanh': lambda x: nn.gelu(x, approximate=True),
  'quick_gelu': quick_gelu,
  'swiglu': swiglu,
}


class Mlp(nn.Module):
  """Two dense layers with an activation between, by default the exact (erf) GELU: x [..., D] -> [..., D].

  `hidden` is the width that the second layer receives; 'swiglu' makes the first one twice as wide.
  """

  hidden: int
  dtype: str = 'float32'
  activation: str = 'gelu'

  @nn.compact
  def __call__(self, x):
    features = 2 * self.hidden if self.activation == 'swiglu' else self.hidden
    y = ACTIVATIONS[self.activation](Dense(features, self.dtype, name='fc1')(x))
    return Dense(x.shape[-1], self.dtype, name='fc2')(y)


def hidden_width(width: int, ratio: float) -> int:
  """Width inside an MLP; a ratio such as 4096 / 1536 falls short of the whole number in floating point."""
  return int(width * ratio + 1e-6)


class LayerScale(nn.Module):
  """x [..., D] times a learned scale [D] that starts at `initial` (Touvron et al. 2021, "Going deeper")."""

  initial: float
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    return x * self.param('scale', nn.initializers.constant(self.initial), (x.shape[-1],)).astype(self.dtype)


class LayerNorm(nn.Module):
  """`ops.layer_norm` with its parameters: x [..., D] -> `dtype`, that of x and parameters together where it is None."""

  epsilon: float = 1e-6
  dtype: str | None = None
  use_bias: bool = True
  use_scale: bool = True

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:]) if self.use_scale else None
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:]) if self.use_bias else None
    dtype = jnp.dtype(self.dtype or jnp.promote_types(x.dtype, jnp.float32))
    return layer_norm.layer_norm(x, scale, bias, self.epsilon, dtype)


def drop_path(x, uniform, rate):
  """Stochastic depth per example: x [B, ...] is zero where uniform [B] >= 1 - rate, else divided by 1 - rate (timm's form)."""
  keep = 1 - rate
  kept = jnp.floor(keep + uniform).reshape(-1, *[1] * (x.ndim - 1))
  return x / keep.astype(x.dtype) * kept.astype(x.dtype)


def dropout(x, keys, rate):
  """x [B, ...] with entries zeroed with probability `rate` and the rest divided by 1 - rate, example i by its own key keys[i]."""
  kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Block(nn.Module):
  """Pre-norm transformer block: x [B, N, D] -> (x, x if taps else None); the pair is what a scan over depth needs.

  `drop` is None, or a pair for stochastic depth: uniforms [B, 2] (attention, MLP) and the rate of this block. `mask` as in
  `ops.attention.attention`; in a `stack` all blocks share it: in_axes=(0, nn.broadcast).

  Attributes:
    layer_scale: start of a learned scale of either branch; 0 for none.
    show: see `SelfAttention`; the pair is then (x, (x if taps else None, attention)).
  """

  heads: int
  mlp_ratio: float = 4
  eps: float = 1e-6
  dtype: str = 'float32'
  taps: bool = False
  qkv_bias: bool | str = True  # see `Qkv`
  activation: str = 'gelu'
  layer_scale: float = 0.0
  show: str = ''

  @nn.compact
  def __call__(self, x, drop=None, mask=None):
    def branch(y, i):
      if self.layer_scale:
        y = LayerScale(self.layer_scale, self.dtype, name=f'layer_scale{i + 1}')(y)
      return y if drop is None else drop_path(y, drop[0][:, i], drop[1])

    hidden = hidden_width(x.shape[-1], self.mlp_ratio)
    y = LayerNorm(self.eps, self.dtype, name='norm1')(x)
    y = SelfAttention(self.heads, self.dtype, self.qkv_bias, self.show, name='attn')(y, mask)
    y, weights = y if self.show else (y, None)
    x = x + branch(y, 0)
    y = LayerNorm(self.eps, self.dtype, name='norm2')(x)
    x = x + branch(Mlp(hidden, self.dtype, self.activation, name='mlp')(y), 1)
    taps = x if self.taps else None
    return x, (taps, weights) if self.show else taps


class CrossBlock(nn.Module):
  """Pre-norm block of a decoder that looks at an encoder: (x [B, N, D], context [B, M, E]) -> (x, None), for a scan.

  Branches in order: self-attention, cross-attention, MLP. The context is taken as it is, without a norm. In a `stack` it has depth as its
  leading axis: block i reads context[i].
  """

  heads: int
  mlp_ratio: float = 4
  eps: float = 1e-6
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x, context):
    y = LayerNorm(self.eps, self.dtype, name='norm0')(x)
    x = x + SelfAttention(self.heads, self.dtype, name='self_attn')(y)
    y = LayerNorm(self.eps, self.dtype, name='norm1')(x)
    x = x + JointCrossAttention(self.heads, self.dtype, name='cross_attn')(y, context)
    y = LayerNorm(self.eps, self.dtype, name='norm2')(x)
    return x + Mlp(hidden_width(x.shape[-1], self.mlp_ratio), self.dtype, name='mlp')(y), None


REMAT = {
  'dots': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,  # keeps products with weights, computes the rest again
  'full': jax.checkpoint_policies.nothing_saveable,
}


def stack(block, depth: int, scan: bool, remat: str, in_axes=0):
  """A module class that applies `block` `depth` times: (x, drop) -> (x, taps stacked on a leading axis, or None).

  `drop`, where given, has depth as its leading axis. `in_axes` says so of every argument after x: 0, or `nn.broadcast` for one that
  all blocks share. Raises ValueError for an unknown `remat`.
  """
  if remat != 'none':
    if remat not in REMAT:
      raise ValueError(f'remat {remat!r} is unknown; known: none, {", ".join(REMAT)}')
    block = nn.remat(block, policy=REMAT[remat], prevent_cse=not scan)
  return nn.scan(
    block,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=in_axes,
    length=depth,
    unroll=1 if scan else depth,
  )
