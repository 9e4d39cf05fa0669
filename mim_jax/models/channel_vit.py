"""A transformer with a token per channel and patch, for images whose channels are of types (ChA-MAE, arXiv 2503.19331).

As in chaudatascience/cha_mae_vit, models/cha_mae_vit.py; what differs from the paper is told in `methods/cha_mae.py`.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models import blocks, posemb, vit
from mim_jax.ops import attention, masking, patches


class Encoder(nn.Module):
  """A token per channel and patch, with class and memory tokens (paper section 3.1)."""

  width: int
  depth: int
  heads: int
  patch: tuple[int, int]
  grid: tuple[int, int]
  types: int
  memory: int
  mlp_ratio: float
  eps: float
  layer_scale: float
  copied_gradient: bool
  std: float  # of learned tokens and positions at the start
  dtype: str
  scan: bool
  remat: str

  @nn.compact
  def __call__(self, image, ids, visible=None, budget=None):
    """image [B, H, W, C], ids [B, C] (-1 = padding), visible [B, C P] bool or None for all.

    Returns:
      x: [B, 1 + M + C P, D] outputs after the final norm; those of tokens that are not visible mean nothing.
      emb: [B, C P, D] embedded patches before anything is added.
      rows: [B, C, D] channel tokens; pos: [1, 1 + M + P, D] as used.

    Args:
      budget: most visible tokens of an image where that is less than C P; that many are computed.
    """
    size, channels = image.shape[0], image.shape[-1]
    flat = patches.patchify(jnp.moveaxis(image, -1, 1).reshape(-1, *image.shape[1:3], 1), self.patch)
    emb = blocks.Dense(self.width, self.dtype, vit.conv_bias(flat.shape[-1]), name='patch_embed')(flat)
    emb = emb.reshape(size, channels, -1, self.width)
    table = self.param('channel_tokens', nn.initializers.orthogonal(), (self.types, self.width))
    rows = jnp.where((ids >= 0)[..., None], table[jnp.maximum(ids, 0)], 0.0)
    extra = 1 + self.memory
    normal = nn.initializers.normal(self.std)
    cls = self.param('cls_token', normal, (1, 1, self.width))
    memory = self.param('memory_tokens', normal, (1, self.memory, self.width))
    pos = self.param('pos_embed', normal, (1, extra + math.prod(self.grid), self.width))
    pos = self.warped(pos, extra, patches.grid_of(image.shape[1:3], self.patch), channels)

    first = jnp.concatenate([cls, memory], axis=1) + pos[:, :extra]
    tokens = emb + (rows[:, :, None] + pos[:, None, extra:]).astype(self.dtype)
    emb, tokens = (x.reshape(size, -1, self.width) for x in (emb, tokens))
    count = tokens.shape[1]
    shorter = visible is not None and budget is not None and budget < count
    seen = visible
    if shorter:
      order = jnp.argsort(~visible, axis=1, stable=True).astype(jnp.int32)
      keep_ids, restore_ids = order[:, :budget], jnp.argsort(order, axis=1).astype(jnp.int32)
      tokens, seen = masking.take(tokens, keep_ids), jnp.take_along_axis(visible, keep_ids, axis=1)
    x = jnp.concatenate([jnp.broadcast_to(first, (size, extra, self.width)).astype(self.dtype), tokens], axis=1)
    mask = None if seen is None else key_mask(seen, extra)
    layer = blocks.stack(blocks.Block, self.depth, self.scan, self.remat, in_axes=(0, nn.broadcast))
    layer = layer(self.heads, self.mlp_ratio, self.eps, self.dtype, layer_scale=self.layer_scale, name='blocks')
    x, _ = layer(x, None, mask)
    x = blocks.LayerNorm(self.eps, self.dtype, name='norm')(x)
    if shorter:
      x = jnp.concatenate([x[:, :extra], masking.place(x[:, extra:], jnp.zeros(()), keep_ids, restore_ids)], axis=1)
    return {'x': x, 'emb': emb, 'rows': rows, 'pos': pos}

  def warped(self, pos, extra, grid, channels):
    """The table for a grid of patches; the code moves it by a hair on its own grid too, but for single channels."""
    if channels == 1 and grid == self.grid:
      return pos
    rows, columns = (jnp.asarray(posemb.cubic_matrix(*sides, nudge=0.1)) for sides in zip(self.grid, grid, strict=True))
    places = pos[0, extra:].reshape(*self.grid, self.width)
    moved = jnp.einsum('ya,xb,abd->yxd', rows, columns, places)
    if self.copied_gradient and grid == self.grid:
      moved = places + jax.lax.stop_gradient(moved - places)
    places = moved.reshape(1, -1, self.width)
    return jnp.concatenate([pos[:, :extra], places], axis=1)


def key_mask(seen, extra):
  """Additive mask [B, 1, 1, extra + N] that shows the extra tokens and what is seen [B, N]."""
  return attention.mask_out(jnp.pad(seen, ((0, 0), (extra, 0)), constant_values=True))


class Fusion(nn.Module):
  """Class token [B, D] fused with patch tokens [B, N, D] that count `weight` [B, N] times (paper section 3.2)."""

  heads: int
  kind: str  # sigmoid | add | cls (the class token alone)
  std: float  # of the query at the start

  @nn.compact
  def __call__(self, cls, tokens, weight):
    if self.kind == 'cls':
      return cls.astype(jnp.float32)
    width = cls.shape[-1]
    split = lambda name: lambda x: blocks.Dense(width, name=name)(x).reshape(*x.shape[:-1], self.heads, -1)
    query = self.param('query', nn.initializers.normal(self.std), (1, width))
    tokens = tokens.astype(jnp.float32)
    q, k, v = split('q')(query)[0], split('k')(tokens), split('v')(tokens)  # [h, d], [B, N, h, d] twice
    logits = jnp.einsum('id,bnjd->binj', q, k) / math.sqrt(width)
    logits += jnp.where(weight > 0, jnp.log(jnp.maximum(weight, 1e-9)), attention.HIDDEN)[:, None, :, None]
    # One softmax over tokens and heads.
    shares = jax.nn.softmax(logits.reshape(*logits.shape[:2], -1)).reshape(logits.shape)
    o = (q + jnp.einsum('binj,bnjd->bid', shares, v)).reshape(-1, width)
    pooled = o + nn.relu(blocks.Dense(width, name='o')(o))
    return cls * nn.sigmoid(pooled) if self.kind == 'sigmoid' else cls + pooled


class Decoder(nn.Module):
  """Predicts every patch of every channel, told the channel by its token (paper section 3.3)."""

  depth: int
  heads: int
  extra: int  # class and memory tokens
  out: int
  mlp_ratio: float
  eps: float
  dtype: str
  scan: bool
  remat: str
  std: float  # of the mask token at the start

  @nn.compact
  def __call__(self, x, shown, stand_in, rows, pos, valid=None):
    """x [B, E + C P, D], rows [B, C, D], pos [1, E + P, D], valid [B, C] or None for all -> [B, C P, out].

    shown [B, C P] bool: where the encoder's output is taken; elsewhere is the mask token, or, where stand_in [B, C P]
    (or None) says so, what the encoder made of the first token.
    """
    width, extra = x.shape[-1], self.extra
    z = blocks.Dense(width, self.dtype, name='embed')(x)
    mask_token = self.param('mask_token', nn.initializers.normal(self.std), (1, 1, width))
    fill = mask_token.astype(self.dtype)
    if stand_in is not None:
      fill = jnp.where(stand_in[..., None], z[:, extra : extra + 1], fill)
    tokens = jnp.where(shown[..., None], z[:, extra:], fill)
    added = (rows[:, :, None] + pos[:, None, extra:]).reshape(*tokens.shape[:2], width)
    tokens = tokens + added.astype(self.dtype)
    tokens = jnp.concatenate([z[:, :extra] + pos[:, :extra].astype(self.dtype), tokens], axis=1)
    mask = None
    if valid is not None:
      mask = key_mask(jnp.repeat(valid, (x.shape[1] - extra) // valid.shape[1], axis=1), extra)
    layer = blocks.stack(blocks.Block, self.depth, self.scan, self.remat, in_axes=(0, nn.broadcast))
    layer = layer(self.heads, self.mlp_ratio, self.eps, self.dtype, qkv_bias=False, name='blocks')
    tokens, _ = layer(tokens, None, mask)
    tokens = blocks.LayerNorm(self.eps, self.dtype, name='norm')(tokens)
    return blocks.Dense(self.out, self.dtype, name='pred')(tokens)[:, extra:]
