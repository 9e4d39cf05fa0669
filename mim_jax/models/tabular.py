"""Transformers over the columns of a table row, alone and with an image (TIP, arXiv 2407.07582, section 3.1).

A row is [B, N] float32: first the categorical columns as codes 0, 1, ..., then the continuous ones, standardised.
"""

import itertools

import flax.linen as nn
import jax.numpy as jnp

from mim_jax.models import blocks
from mim_jax.ops import attention


def hide_from_others(hidden):
  """Additive attention mask: a hidden token is seen by none but itself: bool [B, N] -> float32 [B, 1, N, N].

  A row in which all are hidden still has one visible key for every query, itself.
  """
  others = ~jnp.eye(hidden.shape[1], dtype=bool)
  return jnp.where(hidden[:, None, :] & others, attention.HIDDEN, 0.0)[:, None]


class Block(nn.Module):
  """Pre-norm block: self-attention, cross-attention if there is a context, MLP: x [B, N, D] -> (x, None) for a scan.

  The context [B, M, D] enters every block as it is. `mask` [B, 1, N, N] is for self-attention alone.
  """

  heads: int
  mlp_ratio: float
  eps: float
  dtype: str
  qkv_bias: bool = False

  @nn.compact
  def __call__(self, x, mask, context):
    norm = lambda name: blocks.LayerNorm(self.eps, self.dtype, name=name)(x)
    x = x + blocks.SelfAttention(self.heads, self.dtype, self.qkv_bias, name='attn')(norm('norm1'), mask)
    if context is not None:
      cross = blocks.JointCrossAttention(self.heads, self.dtype, self.qkv_bias, name='cross_attn')
      x = x + cross(norm('cross_norm'), context)
    hidden = blocks.hidden_width(x.shape[-1], self.mlp_ratio)
    x = x + blocks.Mlp(hidden, self.dtype, name='mlp')(norm('norm2'))
    return x, None


def _stack(module):
  layer = blocks.stack(Block, module.depth, module.scan, module.remat, in_axes=nn.broadcast)
  return layer(module.heads, module.mlp_ratio, module.eps, module.dtype, module.qkv_bias, name='blocks')


class TabularEncoder(nn.Module):
  """Table row [B, N] -> tokens [B, 1 + N, D]: a class token, then the columns in order; no final norm.

  Attributes:
    lengths: number of categories of every categorical column; these come first.
    continuous: number of continuous columns.
  """

  lengths: tuple[int, ...]
  continuous: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  eps: float = 1e-5
  dtype: str = 'float32'
  qkv_bias: bool = False
  scan: bool = True
  remat: str = 'none'

  @property
  def offsets(self) -> tuple[int, ...]:
    """Row of the shared embedding at which the categories of each column begin."""
    return tuple(itertools.accumulate(self.lengths, initial=0))[:-1]

  @nn.compact
  def __call__(self, table, hidden=None):
    """hidden bool [B, N], or None: columns that become a learned token and that the other tokens do not see."""
    init = nn.initializers.normal(0.02)
    count = len(self.lengths)
    codes = table[:, :count].astype(jnp.int32) + jnp.array(self.offsets, jnp.int32)
    embedding = self.param('cat_embedding', init, (sum(self.lengths), self.width))
    numbers = blocks.Dense(self.width, self.dtype, name='con_proj')(table[:, count:, None])
    tokens = jnp.concatenate([embedding[codes].astype(self.dtype), numbers], axis=1)
    mask_token = self.param('mask_token', init, (1, 1, self.width))
    mask = None
    if hidden is not None:
      tokens = jnp.where(hidden[..., None], mask_token.astype(self.dtype), tokens)
      mask = hide_from_others(jnp.pad(hidden, ((0, 0), (1, 0))))
    cls = self.param('cls_token', init, (1, 1, self.width)).astype(self.dtype)
    x = jnp.concatenate([jnp.broadcast_to(cls, (len(tokens), *cls.shape[1:])), tokens], axis=1)
    x = x + self.param('column_embedding', init, (1 + table.shape[1], self.width)).astype(self.dtype)
    x = blocks.LayerNorm(self.eps, self.dtype, name='norm')(x)
    return _stack(self)(x, mask, None)[0]


class MultimodalEncoder(nn.Module):
  """Table tokens that look at an image: tokens [B, N, E], context [B, M, D] from `ImageProjection` -> [B, N, D], normed.

  Tokens of another width than D are brought to it by a layer of their own.
  """

  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  eps: float = 1e-5
  dtype: str = 'float32'
  qkv_bias: bool = False
  scan: bool = True
  remat: str = 'none'

  @nn.compact
  def __call__(self, tokens, context):
    if tokens.shape[-1] != self.width:
      tokens = blocks.Dense(self.width, self.dtype, name='tabular_proj')(tokens)
    x = _stack(self)(tokens, None, context)[0]
    return blocks.LayerNorm(self.eps, self.dtype, name='norm')(x)


class ImageProjection(nn.Module):
  """Image features [B, M, C] -> context [B, M, D] of `MultimodalEncoder`: dense and norm, computed once per image."""

  width: int
  eps: float = 1e-5
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, features):
    x = blocks.Dense(self.width, self.dtype, name='image_proj')(features)
    return blocks.LayerNorm(self.eps, self.dtype, name='image_norm')(x)


class Predictor(nn.Module):
  """Column tokens [B, N, D] -> logits [B, categorical columns, all categories], values [B, continuous columns], float32."""

  lengths: tuple[int, ...]
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, tokens):
    count = len(self.lengths)
    logits = blocks.Dense(sum(self.lengths), self.dtype, name='cat_classifier')(tokens[:, :count])
    values = blocks.Dense(1, self.dtype, name='con_regressor')(tokens[:, count:])
    return logits.astype(jnp.float32), values[..., 0].astype(jnp.float32)


class Projector(nn.Module):
  """Pooled features [B, C] -> [B, out] for a contrastive loss: dense, ReLU, dense, without BatchNorm."""

  out: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    y = nn.relu(blocks.Dense(x.shape[-1], self.dtype, name='fc1')(x))
    return blocks.Dense(self.out, self.dtype, name='fc2')(y)
