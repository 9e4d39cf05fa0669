"""Text networks of the BERT family: embeddings, post-norm layers, pooler and the head that names masked words.

BERT (Devlin et al. 2019, arXiv 1810.04805) and RoBERTa (Liu et al. 2019, arXiv 1907.11692), numbers as in
huggingface/transformers modeling_bert.py and modeling_roberta.py. Dense layers start as everywhere here
(xavier-uniform); the papers draw N(0, 0.02), for which a method puts its params through `initial.normal_kernels`.

Dropout is per example: keys [B], one for each example of a step, so that what is dropped belongs to the example and
  not to the device.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError, nearest
from mim_jax.models import blocks, vit
from mim_jax.ops import attention

# What the networks of a kind have in common: rows of the table of segments, eps of every LayerNorm, the id of padding,
# and whether positions count real tokens from pad + 1 on (padding keeps position pad) or columns from 0.
KINDS = {
  'bert': dict(types=2, eps=1e-12, pad=0, count_real=False),
  'roberta': dict(types=1, eps=1e-5, pad=1, count_real=True),
}
# Published sizes, as options of `encoder`.
PRESETS = {
  'bert-base-uncased': dict(kind='bert', size='B', vocab=30522, positions=512, mlp_ratio=4.0),
  'bert-base-cased': dict(kind='bert', size='B', vocab=28996, positions=512, mlp_ratio=4.0),
  'roberta-base': dict(kind='roberta', size='B', vocab=50265, positions=514, mlp_ratio=4.0),
}


def encoder(kind: str, size: str, vocab: int, positions: int, mlp_ratio: float = 4.0, **options) -> 'Encoder':
  """An `Encoder` of a kind in KINDS; size 'B' or 'width/depth/heads', `options` win over what the kind says.

  Raises ConfigError for an unknown kind or size.
  """
  if kind not in KINDS:
    raise ConfigError(f'text encoder {kind!r} is unknown; {nearest(kind, KINDS)}')
  shape = vit.size(size)
  chosen = {**KINDS[kind], **options}
  return Encoder(
    vocab=vocab, positions=positions, hidden=blocks.hidden_width(shape['width'], mlp_ratio), **shape, **chosen
  )


def places(keys, rate: float):
  """Dropout in several places: place -> function on x [B, ...]; does nothing without keys [B] or with rate 0."""
  if keys is None or not rate:
    return lambda place: lambda x: x
  return lambda place: functools.partial(blocks.dropout, keys=folded(keys, place), rate=rate)


def folded(keys, number):
  """Keys [B], each with `number` folded in."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def per_layer(keys, depth: int):
  """Keys [B] -> keys [depth, B], what a `stack` of layers takes; None stays None."""
  return None if keys is None else jax.vmap(lambda layer: folded(keys, layer))(jnp.arange(depth))


class Layer(nn.Module):
  """Post-norm transformer layer: x [B, L, D] -> (x, taps); the pair is what a scan over depth needs.

  Self-attention; attention to `context` [B, M, E] where `cross` says so; feed-forward. Each adds to its input, is
  followed by a
  LayerNorm and has dropout on its output, attention also on its shares.

  Attributes:
    hidden: width inside the feed-forward part, whose activation is the exact GELU.
    taps: give (x, shares of the self-attention [B, H, L, L]) beside x, else None.
  """

  heads: int
  hidden: int
  eps: float = 1e-12
  dtype: str = 'float32'
  dropout: float = 0.0
  cross: bool = False
  taps: bool = False

  @nn.compact
  def __call__(self, x, mask=None, drop=None, context=None, context_mask=None):
    """mask, context_mask: of keys in x and context, as `ops.attention.mask_out` makes them; drop: keys [B] or None."""
    at = places(drop, self.dropout)
    norm = lambda name: blocks.LayerNorm(self.eps, self.dtype, name=name)
    attn = blocks.CrossAttention(self.heads, self.dtype, show=self.taps, name='attn')
    y = attn(x, x, mask, drop=at(0))
    y, shares = y if self.taps else (y, None)
    x = norm('norm1')(x + at(1)(y))
    if self.cross:
      attn = blocks.CrossAttention(self.heads, self.dtype, name='attn_cross')
      x = norm('norm_cross')(x + at(2)(attn(x, context, context_mask, drop=at(3))))
    x = norm('norm2')(x + at(4)(blocks.Mlp(self.hidden, self.dtype, name='mlp')(x)))
    return x, (x, shares) if self.taps else None


def _table(zero: int | None):
  """Initialiser of an embedding table [rows, D]: N(0, 0.02), row `zero` 0."""

  def init(key, shape, dtype=jnp.float32):
    table = 0.02 * jax.random.normal(key, shape, dtype)
    return table if zero is None else table.at[zero].set(0)

  return init


def position_ids(ids, pad: int, count_real: bool):
  """Position row of each of ids [B, L]: its column, or pad + its number among real tokens (padding: pad)."""
  if not count_real:
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  real = (ids != pad).astype(jnp.int32)
  return jnp.cumsum(real, axis=1) * real + pad


class Embeddings(nn.Module):
  """ids [B, L] -> LayerNorm(word + position + segment) [B, L, D].

  The look-up sends no gradient into the word row of padding, nor into its position row where padding has one of its
  own, as
  torch.nn.Embedding(padding_idx) does; an output layer tied to the word table still may.
  """

  vocab: int
  width: int
  positions: int
  types: int
  eps: float
  pad: int
  count_real: bool
  dtype: str

  @nn.compact
  def __call__(self, ids, types=None):
    table = lambda name, rows, zero=None: self.param(name, _table(zero), (rows, self.width))
    position_pad = self.pad if self.count_real else None
    at = position_ids(ids, self.pad, self.count_real)
    x = _look_up(table('word', self.vocab, self.pad), ids, self.pad)
    x += _look_up(table('position', self.positions, position_pad), at, position_pad)
    segments = table('type', self.types)
    x += segments[0] if types is None else segments[types]
    return blocks.LayerNorm(self.eps, self.dtype, name='norm')(x)


def _look_up(table, ids, pad=None):
  rows = table[ids]
  return rows if pad is None else jnp.where((ids == pad)[..., None], jax.lax.stop_gradient(rows), rows)


class Encoder(nn.Module):
  """Token ids -> token features, bidirectional.

  Attributes:
    vocab, positions, types: rows of the three tables; `positions` is the longest text (RoBERTa: plus pad + 1).
    width, depth, heads, hidden: of the layers.
    eps: of every LayerNorm.
    pad: id of padding.
    count_real: positions count real tokens from pad + 1 (RoBERTa), not columns from 0 (BERT).
    dropout: rate in its four places, where keys are given.
    scan, remat: see `blocks.stack`.
  """

  vocab: int
  width: int
  depth: int
  heads: int
  hidden: int
  positions: int
  types: int = 2
  eps: float = 1e-12
  pad: int = 0
  count_real: bool = False
  dtype: str = 'float32'
  dropout: float = 0.0
  scan: bool = True
  remat: str = 'none'

  @nn.compact
  def __call__(self, ids, mask, types=None, drop=None, taps=False):
    """ids [B, L] int, mask [B, L] (1 = real token) -> features [B, L, D].

    Args:
      types: segment of every token, all 0 when None.
      drop: keys [B] for dropout, or None for none of it.
      taps: also return {'input': [B, L, D], what the first layer receives, 'layers': [N, B, L, D], 'attention': [N, B,
        H, L, L]}.

    Raises:
      ValueError: a text longer than the position table.
    """
    longest = self.positions - (self.pad + 1) * self.count_real
    if ids.shape[1] > longest:
      raise ValueError(f'texts of {ids.shape[1]} tokens, the position table has room for {longest}')
    tables = (self.vocab, self.width, self.positions, self.types, self.eps, self.pad, self.count_real)
    x = Embeddings(*tables, self.dtype, name='embed')(ids, types)
    x = places(drop, self.dropout)(self.depth)(x)  # the layers have the numbers 0 to depth - 1
    layers = blocks.stack(Layer, self.depth, self.scan, self.remat, in_axes=(nn.broadcast, 0))
    layer = layers(self.heads, self.hidden, self.eps, self.dtype, self.dropout, taps=taps, name='blocks')
    y, seen = layer(x, attention.mask_out(mask), per_layer(drop, self.depth))
    return (y, {'input': x, 'layers': seen[0], 'attention': seen[1]}) if taps else y


class Pooler(nn.Module):
  """First token of h [B, L, D] through a dense layer and tanh -> [B, D]."""

  dtype: str = 'float32'

  @nn.compact
  def __call__(self, h):
    return jnp.tanh(blocks.Dense(h.shape[-1], self.dtype, name='dense')(h[:, 0]))


class MaskedWords(nn.Module):
  """Names the masked words: h [B, L, D] -> logits [B, L, V] float32; dense, exact GELU, LayerNorm, then the vocabulary.

  The last matrix is the word table [V, D] given as `table` (tied), or a parameter of its own, `decoder` [D, V].
  """

  vocab: int
  eps: float = 1e-12
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, h, table=None):
    h = blocks.ACTIVATIONS['gelu'](blocks.Dense(h.shape[-1], self.dtype, name='transform')(h))
    h = blocks.LayerNorm(self.eps, self.dtype, name='norm')(h)
    if table is None:
      matrix = self.param('decoder', nn.initializers.normal(0.02), (h.shape[-1], self.vocab))
    else:
      matrix = table.T
    # Products in `dtype`, sums in float32: the softmax over the vocabulary needs them.
    logits = jnp.einsum('bld,dv->blv', h, matrix.astype(self.dtype), preferred_element_type=jnp.float32)
    return logits + self.param('bias', nn.initializers.zeros, (self.vocab,))
