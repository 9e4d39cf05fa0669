"""Transformer blocks under a condition, such as a time of diffusion (DiT: Peebles and Xie 2023, arXiv 2212.09748)."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import zeros

from mim_jax.models import blocks


def time_embedding(t, width: int):
  """Times t [B], integers or not -> [B, width] float32: sines, then cosines, of t 10000^(-k / (width / 2 - 1))."""
  count = width // 2
  # In float32 from the start, as philippe-eecs/small-vision, models/embeddings.py: an angle of 1000 shows the rounding
  # of its frequency.
  frequency = jnp.exp(jnp.arange(count, dtype=jnp.float32) * -(math.log(10000) / (count - 1)))
  angle = t.astype(jnp.float32)[:, None] * frequency
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class Trunk(nn.Module):
  """Two dense layers with SiLU between, twice as wide inside: [B, width] -> [B, width]."""

  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    y = nn.silu(nn.Dense(2 * x.shape[-1], dtype=self.dtype, name='fc1')(x))
    return nn.Dense(x.shape[-1], dtype=self.dtype, name='fc2')(y)


class Condition(nn.Module):
  """Times t [B] (0: no noise) and labels [B] or None -> condition [B, width] in `dtype`.

  Attributes:
    classes: of the labels; `classes` itself stands for no label, and so does None. With 0 there are no labels.
  """

  width: int
  classes: int = 0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, t, label=None):
    c = Trunk(self.dtype, name='time')(time_embedding(t, self.width).astype(self.dtype))
    if self.classes:
      label = jnp.full(t.shape, self.classes) if label is None else label
      table = nn.Embed(self.classes + 1, self.width, dtype=self.dtype, name='labels')
      c = c + Trunk(self.dtype, name='label')(table(label))
    elif label is not None:
      raise ValueError('labels were given to a condition without classes')
    return c


def modulate(x, shift, scale):
  """x [B, N, D] times 1 + scale [B, D] plus shift [B, D]."""
  return x * (1 + scale[:, None]) + shift[:, None]


class ModulatedBlock(nn.Module):
  """DiT's block with adaLN-Zero: (x [B, N, D], condition [B, D] after its activation) -> (x, None), for a scan.

  The condition sets shift and scale after each norm and a gate of each branch; all start at 0, so the block starts as
  the identity. Norms have scale and bias of their own, as in philippe-eecs/small-vision, models/vit.py.
  """

  heads: int
  mlp_ratio: float = 4
  eps: float = 1e-6
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x, condition):
    parts = nn.Dense(6 * x.shape[-1], kernel_init=zeros, dtype=self.dtype, name='modulation')(condition)
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(parts, 6, axis=-1)
    y = modulate(blocks.LayerNorm(self.eps, self.dtype, name='norm1')(x), shift1, scale1)
    y = blocks.CrossAttention(self.heads, self.dtype, name='attn')(y, y)
    x = x + gate1[:, None] * y
    y = modulate(blocks.LayerNorm(self.eps, self.dtype, name='norm2')(x), shift2, scale2)
    hidden = blocks.hidden_width(x.shape[-1], self.mlp_ratio)
    return x + gate2[:, None] * blocks.Mlp(hidden, self.dtype, 'gelu_tanh', name='mlp')(y), None


class TokenBlock(nn.Module):
  """Plain pre-norm block with the condition [B, D] as one more token, which it drops again ("in-context")."""

  heads: int
  mlp_ratio: float = 4
  eps: float = 1e-6
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x, condition):
    x = jnp.concatenate([condition[:, None], x], axis=1)
    y = blocks.LayerNorm(self.eps, self.dtype, name='norm1')(x)
    x = x + blocks.CrossAttention(self.heads, self.dtype, name='attn')(y, y)
    y = blocks.LayerNorm(self.eps, self.dtype, name='norm2')(x)
    hidden = blocks.hidden_width(x.shape[-1], self.mlp_ratio)
    return (x + blocks.Mlp(hidden, self.dtype, 'gelu_tanh', name='mlp')(y))[:, 1:], None


class Stack(nn.Module):
  """`depth` blocks under one condition, and a norm: (x [B, N, D], condition [B, D]) -> [B, N, D].

  Attributes:
    adaln: ModulatedBlock, else TokenBlock.
  """

  depth: int
  heads: int
  mlp_ratio: float = 4
  eps: float = 1e-6
  dtype: str = 'float32'
  adaln: bool = True
  scan: bool = True
  remat: str = 'none'

  @nn.compact
  def __call__(self, x, condition):
    block = ModulatedBlock if self.adaln else TokenBlock
    layer = blocks.stack(block, self.depth, self.scan, self.remat, nn.broadcast)
    x, _ = layer(self.heads, self.mlp_ratio, self.eps, self.dtype, name='blocks')(x, condition)
    return blocks.LayerNorm(self.eps, self.dtype, name='norm')(x)
