"""Hi-End-MAE: the decoder rebuilds masked cubes by querying layers of the encoder (Tang et al. 2025, arXiv 2502.08347).

Official code: FengheTan9/Hi-End-MAE, hi_end_mae.py and networks/vit.py. Where a reader may go wrong:
- taps are outputs of the encoder's blocks counted from zero, 3, 6 and 9 being the 4th, 7th and 10th, before any norm;
  the decoder's cross-attention reads them through a linear bridge, deepest first, again without a norm;
- a cube is normalised by its biased variance (MAE takes the unbiased one), and the pictures use the unbiased one;
- everything stays in shuffled order, visible tokens first: all of them pass the decoder, only the masked ones enter
  the loss.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.method import Field, Method
from mim_jax.models import blocks, posemb, vit
from mim_jax.ops import masking, patches, targets

DEFAULTS = {
  'size': '1536/12/16',  # encoder: width/depth/heads
  'patch': 12,  # side of a cube, or (height, width, depth)
  'image_size': 96,  # side of a crop, or (height, width, depth)
  'channels': 1,
  'mlp_ratio': 4.0,
  'ln_eps': 1e-6,
  'mask_ratio': 0.75,
  'pos': 'sincos',  # of the encoder: sincos | learned (the official 'perceptron'); the decoder's table is always sincos
  'decoder': '528/2/16',  # width/depth/heads; depth: blocks of self-attention ahead of those that look at the encoder
  'taps': (3, 6, 9),  # blocks of the encoder, from zero, that the decoder looks at: one block of it for each
}


class Decoder(nn.Module):
  """Predicts every cube from the latent and, by cross-attention, from deeper to shallower layers of the encoder."""

  width: int
  depth: int
  heads: int
  grid: tuple[int, ...]
  out: int  # values per cube
  mlp_ratio: float
  eps: float
  dtype: str
  scan: bool
  remat: str

  @property
  def table(self):
    """Sin-cos table [1, N, width] float32."""
    return posemb.sincos(self.grid, self.width)[None]

  @nn.compact
  def __call__(self, latent, layers, shuffle, taps=False):
    """latent and each of the layers, shallow first, [B, 1 + K, D], shuffle [B, N] -> [B, 1 + N, out], shuffled.

    With `taps` also {'input': [B, 1 + N, width], 'context': [T, B, 1 + K, width] shallow first}.
    """
    bias_init = vit.conv_bias(latent.shape[-1])  # a PyTorch linear's own, which the authors leave as it is
    bridge = [
      blocks.Dense(self.width, self.dtype, bias_init, name=f'bridge{i}')(z) for i, z in enumerate((*layers, latent))
    ]
    context, y = jnp.stack(bridge[:-1]), bridge[-1]
    mask_token = self.param('mask_token', nn.initializers.normal(0.02), (1, 1, self.width))
    batch, count = shuffle.shape
    hidden = jnp.broadcast_to(mask_token.astype(y.dtype), (batch, 1 + count - y.shape[1], self.width))
    table = jnp.broadcast_to(jnp.asarray(self.table, self.dtype), (batch, count, self.width))
    places = jnp.pad(masking.take(table, shuffle), ((0, 0), (1, 0), (0, 0)))  # none for the class token
    tokens = jnp.concatenate([y, hidden], axis=1) + places
    y = tokens
    if self.depth:
      own = blocks.stack(blocks.Block, self.depth, self.scan, self.remat)
      y, _ = own(self.heads, self.mlp_ratio, self.eps, self.dtype, name='blocks1')(y)
    cross = blocks.stack(blocks.CrossBlock, len(layers), self.scan, self.remat)
    y, _ = cross(self.heads, self.mlp_ratio, self.eps, self.dtype, name='blocks2')(y, context[::-1])
    y = blocks.LayerNorm(self.eps, self.dtype, name='norm')(y)
    pred = blocks.Dense(self.out, self.dtype, name='pred')(y)
    return (pred, {'input': tokens, 'context': context}) if taps else pred


def modules(cfg):
  """Encoder and decoder for the options in `cfg`. Raises ConfigError for taps that the encoder does not have."""
  patch = vit.sides(cfg.patch, 3)
  grid = patches.grid_of(vit.sides(cfg.image_size, 3), patch)
  size, taps = vit.size(cfg.size), tuple(cfg.taps)
  if not taps or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < size['depth']:
    raise ConfigError(
      f'method.taps is {taps}; expected rising numbers of blocks from 0 to {size["depth"] - 1} (size {cfg.size!r})'
    )
  if cfg.pos not in ('sincos', 'learned'):
    raise ConfigError(f"method.pos is {cfg.pos!r}; expected 'sincos' or 'learned'")
  shared = dict(grid=grid, mlp_ratio=cfg.mlp_ratio, eps=cfg.ln_eps, dtype=cfg.dtype, scan=cfg.scan, remat=cfg.remat)
  encoder = vit.ViT(**size, patch=patch, pos=cfg.pos, **shared)
  decoder = Decoder(**vit.size(cfg.decoder), out=math.prod(patch) * cfg.channels, **shared)
  return encoder, decoder


def undo_norm(pred, target):
  """Prediction of normalised cubes [B, N, P] in the units of `target`: by their unbiased deviation + 1e-6."""
  mean, var = targets.patch_statistics(target, ddof=1)
  return pred * (jnp.sqrt(var) + 1e-6) + mean


def placed(encoder_params):
  """Encoder parameters whose class token has no position: the row that a learned table has for it is held at zero."""
  if 'pos_embed' not in encoder_params:
    return encoder_params
  table = encoder_params['pos_embed']
  return {**encoder_params, 'pos_embed': jnp.pad(table[:, 1:], ((0, 0), (1, 0), (0, 0)))}


def make(cfg) -> Method:
  encoder, decoder = modules(cfg)
  patch, grid, taps = encoder.patch, encoder.grid, tuple(cfg.taps)
  count = math.prod(grid)
  kept = masking.keep_count(count, cfg.mask_ratio)
  learned = cfg.pos == 'learned'
  image = Field(
    'B H W D C',
    (*vit.sides(cfg.image_size, 3), cfg.channels),
    doc='a crop in [0, 1] of a resampled volume (data.transforms: random_crop_3d, and window for CT numbers)',
  )

  def draw(key, batch):
    return {'noise': jax.random.uniform(key, (batch['image'].shape[0], count))}

  def forward(params, batch, draws):
    """What the loss, the pictures and a replay need, in shuffled order."""
    shuffle, restore_ids, _ = masking.keep_smallest(draws['noise'], count)
    latent, seen = encoder.apply({'params': placed(params['encoder'])}, batch['image'], shuffle[:, :kept], taps=True)
    pred = decoder.apply({'params': params['decoder']}, latent, [seen['layers'][tap] for tap in taps], shuffle)
    cubes = patches.patchify(batch['image'], patch)
    target = targets.norm_pix(masking.take(cubes, shuffle[:, kept:]), ddof=0)
    return {'latent': latent, 'pred': pred, 'target': target, 'restore_ids': restore_ids, 'cubes': cubes}

  def init(key, batch):
    keys = jax.random.split(key, 3)
    shuffle = jnp.arange(count)[None]
    one = jnp.zeros((1, *batch['image'].shape[1:]))
    (latent, seen), variables = encoder.init_with_output(keys[0], one, shuffle[:, :kept], taps=True)
    encoder_params = variables['params']
    if learned:
      table = encoder_params['pos_embed']
      encoder_params = placed({**encoder_params, 'pos_embed': 0.02 * jax.random.normal(keys[2], table.shape)})
    decoder_params = decoder.init(keys[1], latent, [seen['layers'][tap] for tap in taps], shuffle)
    return {'encoder': encoder_params, 'decoder': decoder_params['params']}

  def loss(params, state, frozen, batch, draws, step):
    del state, frozen, step
    out = forward(params, batch, draws)
    value = jnp.mean(jnp.square(out['pred'][:, 1 + kept :].astype(jnp.float32) - out['target']))
    mask = (out['restore_ids'] >= kept).astype(jnp.float32)
    shown = {name: out[name] for name in ('latent', 'pred', 'target')}
    return value, {'metrics': {'loss/pixel': value}, 'out': {**shown, 'mask': mask}}

  def encode(params, batch, state=None, layers=False, drop=None):
    del state
    return vit.encode(encoder, placed(params['encoder']), batch['image'], layers, drop)

  def panels(params, state, frozen, batch, draws):
    del state, frozen
    out = forward(params, batch, draws)
    cubes, hidden = out['cubes'], out['restore_ids'] >= kept
    pred = undo_norm(masking.take(out['pred'][:, 1:].astype(jnp.float32), out['restore_ids']), cubes)
    columns = {'input': batch['image'], **patches.pictures(cubes, pred, hidden, grid, patch)}
    return {name: jnp.moveaxis(volume, 3, 1) for name, volume in columns.items()}  # slices across the last axis

  return Method(fields={'image': image}, init=init, draw=draw, loss=loss, encode=encode, panels=panels)
