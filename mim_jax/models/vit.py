"""Plain vision transformer encoder for images and volumes, with optional dropping of tokens before the first block."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.models import blocks, posemb
from mim_jax.ops import masking, patches

# width, depth, heads. Ti and S: Touvron et al. 2021, table 1; B, L, H: Dosovitskiy et al. 2021, table 1; mu: for tests.
SIZES = {
  'mu': (32, 1, 2),
  'Ti': (192, 12, 3),
  'S': (384, 12, 6),
  'B': (768, 12, 12),
  'L': (1024, 24, 16),
  'H': (1280, 32, 16),
}


def size(name: str) -> dict[str, int]:
  """Width, depth and heads of a named size, or of 'width/depth/heads' such as '128/4/4'."""
  numbers = SIZES.get(name) or tuple(int(part) for part in name.split('/') if part.isdigit())
  if len(numbers) != 3:
    raise ConfigError(f"size {name!r} is neither one of {', '.join(SIZES)} nor 'width/depth/heads' such as '128/4/4'")
  width, depth, heads = numbers
  if width % heads:
    raise ConfigError(f'size {name!r}: width {width} is not a multiple of {heads} heads')
  return dict(width=width, depth=depth, heads=heads)


def conv_bias(fan_in):
  """Uniform in +-1/sqrt(fan_in): how PyTorch starts the bias of a convolution. facebookresearch/mae resets the patch weight only."""
  bound = 1 / math.sqrt(fan_in)
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def sides(value, rank: int) -> tuple[int, ...]:
  """One side for every spatial axis (an int) or a side for each (a tuple of `rank`) -> tuple of `rank`."""
  given = (value,) * rank if isinstance(value, int) else tuple(value)
  if len(given) != rank:
    raise ConfigError(f'{value} gives {len(given)} sides, expected one number or {rank}')
  return given


def with_drop_path(encoder, drop):
  """`drop` of `Method.encode`, (keys [B], rate) or None -> (encoder of that rate, uniforms [B, depth, 2] or None) for its `drop`."""
  if drop is None:
    return encoder, None
  keys, rate = drop
  uniforms = jax.vmap(lambda key: jax.random.uniform(key, (encoder.depth, 2)))(keys)
  return encoder.clone(drop_path=rate), uniforms


def encode(encoder, params, image, layers=False, drop=None):
  """What `Method.encode` gives, by a `ViT` or any encoder that is called alike and says its `prefix`; a class token comes first."""
  module, uniforms = with_drop_path(encoder, drop)
  out = module.apply({'params': params}, image, drop=uniforms, taps=layers)
  tokens, seen = out if layers else (out, {})
  encoded = {'tokens': tokens[:, module.prefix :]} | ({'layers': seen['layers']} if layers else {})
  return encoded | ({'cls': tokens[:, 0]} if module.prefix else {})


def drop_rates(drop, depth: int, last: float):
  """Uniforms [B, depth, 2] or None -> what a stack of blocks takes as `drop`: (uniforms [depth, B, 2], rates from 0 to `last` [depth])."""
  if drop is None:
    return None
  return drop.swapaxes(0, 1), jnp.linspace(0, last, depth, dtype=jnp.float32)


class ViT(nn.Module):
  """Image or volume -> tokens.

  Attributes:
    width, depth, heads, mlp_ratio, eps: of the blocks (eps of every LayerNorm).
    patch, grid: patch side and number of patches per spatial axis.
    pos: 'sincos' (a fixed table, no parameter), 'sincos_rows' (the same with rows before columns: CAE's) or 'learned' (a
      parameter that starts as the first).
    final_norm: LayerNorm after the last block.
    cls: a class token comes first; without one the table has no row for it.
    registers: learned tokens without position after the class token (Darcet et al. 2024).
    patch_bias, qkv_bias: whether these layers have a bias (CLIP's patches have none); qkv_bias may be letters, see `blocks.Qkv`.
    embed_norm: LayerNorm before the first block (CLIP).
    activation: of the MLP, see `blocks.ACTIVATIONS`.
    layer_scale: see `blocks.Block`.
    drop_path: stochastic depth of the last block; it grows linearly from 0 at the first (facebookresearch/mae, models_vit.py).
    scan, remat: see `blocks.stack`.
  """

  width: int
  depth: int
  heads: int
  patch: tuple[int, ...]
  grid: tuple[int, ...]
  mlp_ratio: float = 4
  pos: str = 'sincos'
  final_norm: bool = True
  drop_path: float = 0.0
  eps: float = 1e-6
  dtype: str = 'float32'
  scan: bool = True
  remat: str = 'none'
  cls: bool = True
  registers: int = 0
  patch_bias: bool = True
  qkv_bias: bool | str = True
  embed_norm: bool = False
  activation: str = 'gelu'
  layer_scale: float = 0.0

  @property
  def table(self):
    """Sin-cos table [1, cls + N, D] float32 with a zero row for the class token."""
    order = tuple(range(len(self.grid))) if self.pos == 'sincos_rows' else None
    return posemb.sincos(self.grid, self.width, order, cls=self.cls)[None]

  @property
  def prefix(self) -> int:
    """Tokens before those of the patches."""
    return self.cls + self.registers

  @nn.compact
  def __call__(self, image, keep_ids=None, drop=None, taps=False, show=''):
    """image [B, *spatial, C], keep_ids [B, K] (all patches when None) -> tokens [B, prefix + K, D]: class token, registers, patches.

    Pixels of patches that are not kept are never touched: patches are gathered before they are embedded.

    Args:
      drop: [B, depth, 2] uniforms for stochastic depth, or None for none of it.
      taps: also return {'tokens': embedded patches [B, K, D] before positions, 'input': what the first block receives [B, 1 + K, D],
        'layers': output of every block [L, B, 1 + K, D]}.
      show: 'cls' or 'all': also return the attention of every block, as 'attention' [L, B, H, 1 or all rows, tokens] of that dict.
    """
    x = patches.patchify(image, self.patch)
    if x.shape[1] != math.prod(self.grid):
      raise ValueError(
        f'image {image.shape[1:-1]} gives {x.shape[1]} patches of {self.patch}, the encoder was made for a grid of {self.grid}'
      )
    if keep_ids is not None:
      x = masking.take(x, keep_ids)
    patch_embed = blocks.Dense(self.width, self.dtype, conv_bias(x.shape[-1]), self.patch_bias, name='patch_embed')
    embedded = patch_embed(x)

    table = (
      self.param('pos_embed', lambda key: jnp.asarray(self.table)) if self.pos == 'learned' else jnp.asarray(self.table)
    )
    places = table[:, int(self.cls) :]
    rows = (
      places if keep_ids is None else masking.take(jnp.broadcast_to(places, (x.shape[0], *places.shape[1:])), keep_ids)
    )
    parts = []
    if self.cls:
      parts.append(self.param('cls_token', nn.initializers.normal(0.02), (1, 1, self.width)) + table[:, :1])
    if self.registers:
      parts.append(self.param('registers', nn.initializers.normal(0.02), (1, self.registers, self.width)))
    parts = [jnp.broadcast_to(part, (x.shape[0], *part.shape[1:])).astype(self.dtype) for part in parts]
    tokens = jnp.concatenate([*parts, embedded + rows.astype(self.dtype)], axis=1)
    if self.embed_norm:
      tokens = blocks.LayerNorm(self.eps, self.dtype, name='embed_norm')(tokens)

    drop = drop_rates(drop, self.depth, self.drop_path)
    layer = blocks.stack(blocks.Block, self.depth, self.scan, self.remat)
    layer = layer(
      self.heads,
      self.mlp_ratio,
      self.eps,
      self.dtype,
      taps,
      self.qkv_bias,
      self.activation,
      self.layer_scale,
      show,
      name='blocks',
    )
    y, seen = layer(tokens, drop)
    layers, weights = seen if show else (seen, None)
    if self.final_norm:
      y = blocks.LayerNorm(self.eps, self.dtype, name='norm')(y)
    if not (taps or show):
      return y
    return y, {'tokens': embedded, 'input': tokens, 'layers': layers, **({'attention': weights} if show else {})}
