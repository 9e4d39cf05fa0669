"""CropMAE: fill in a nearly hidden crop from the view it was cut from (Eymaël et al. 2024, arXiv 2403.17823).

Official code: alexandre-eymael/CropMAE, models/SiamMAE.py. With pairs of frames (`data.transforms` with `frame_pair`)
and `mask_ratio` 0.95 the same network is SiamMAE (Gupta et al. 2023, arXiv 2305.14344). Paper and code agree on
everything in here; what the paper leaves open
is as in the code: post-norm decoder blocks in the order cross-attention, MLP, self-attention, with dropout, a hidden
width of 2048 whatever the width of the decoder, and no second position table on what is attended to.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.method import Field, Method
from mim_jax.models import blocks, posemb, vit
from mim_jax.ops import attention, losses, masking, patches, targets

DEFAULTS = {
  'size': 'S',  # encoder: Ti S B L H or 'width/depth/heads'
  'patch': 16,  # side, or (height, width)
  'image_size': 224,  # side, or (height, width)
  'channels': 3,
  'mlp_ratio': 4.0,
  'ln_eps': 1e-6,
  'mask_ratio': 0.985,  # of the second view; 2 of 196 patches stay
  'norm_pix': True,  # target: each patch minus its mean over its standard deviation
  'decoder': '256/4/8',  # width/depth/heads
  'ff_dim': 2048,  # hidden width of the decoder's MLP
  'decoder_dropout': 0.1,
}


class Projections(nn.Module):
  """Queries of x [B, N, D], keys and values of context [B, M, D], each [B, ., H, d], from one array as PyTorch's
  attention keeps them.
  """

  heads: int
  dtype: str

  @nn.compact
  def __call__(self, x, context):
    width = x.shape[-1]
    shape = (3, self.heads, width // self.heads)
    kernel = self.param('kernel', blocks.xavier_uniform(width, 3 * width), (width, *shape)).astype(self.dtype)
    bias = self.param('bias', nn.initializers.zeros, shape).astype(self.dtype)
    kv = blocks.matmul(context.astype(self.dtype), kernel[:, 1:]) + bias[1:]
    return blocks.matmul(x.astype(self.dtype), kernel[:, 0]) + bias[0], kv[:, :, 0], kv[:, :, 1]


class Attention(nn.Module):
  """x [B, N, D] looks at context [B, M, D] -> [B, N, D]; `drop` is done to the attention and to the result."""

  heads: int
  dtype: str

  @nn.compact
  def __call__(self, x, context, drop):
    q, k, v = Projections(self.heads, self.dtype, name='qkv')(x, context)
    y = attention.attention(q, k, v, drop=drop(0))
    return drop(1)(blocks.MergeHeads(x.shape[-1], self.dtype, name='proj')(y))


class FeedForward(nn.Module):
  hidden: int
  dtype: str

  @nn.compact
  def __call__(self, x, drop):
    y = blocks.ACTIVATIONS['gelu'](blocks.Dense(self.hidden, self.dtype, name='fc1')(x))
    return drop(1)(blocks.Dense(x.shape[-1], self.dtype, name='fc2')(drop(0)(y)))


class SiameseBlock(nn.Module):
  """Post-norm block: queries x [B, N, d] look at memory [B, M, d], pass an MLP, and look at each other -> (x, None).

  `keys` [B, 6] are random keys of the six dropouts, or None for no dropout.
  """

  heads: int
  hidden: int
  eps: float
  dropout: float
  dtype: str

  @nn.compact
  def __call__(self, x, memory, keys):
    def drops(first):
      return lambda i: lambda y: y if keys is None else blocks.dropout(y, keys[:, first + i], self.dropout)

    norm = lambda y, name: blocks.LayerNorm(self.eps, self.dtype, name=name)(y)
    attend = lambda name: Attention(self.heads, self.dtype, name=name)
    x = norm(x + attend('cross_attn')(x, memory, drops(0)), 'cross_norm')
    x = norm(x + FeedForward(self.hidden, self.dtype, name='mlp')(x, drops(2)), 'mlp_norm')
    return norm(x + attend('self_attn')(x, x, drops(4)), 'self_norm'), None


class Decoder(nn.Module):
  """Predicts every patch of the second view from its few visible tokens and all tokens of the first."""

  width: int
  depth: int
  heads: int
  hidden: int
  grid: tuple[int, ...]
  out: int  # values per patch
  eps: float
  dropout: float
  dtype: str
  scan: bool
  remat: str

  @nn.compact
  def __call__(self, z, memory, keep_ids, restore_ids, keys=None):
    """z [B, 1 + K, D], memory [B, 1 + N, D], keys [B] or None for no dropout -> [B, N, out]."""
    table = jnp.asarray(posemb.sincos(self.grid, self.width, cls=True)[None], self.dtype)
    mask_token = self.param('mask_token', nn.initializers.normal(0.02), (1, 1, self.width))
    embed = blocks.Dense(self.width, self.dtype, name='embed')
    y, memory = embed(z), embed(memory)  # no positions on the memory: the encoder's output carries them
    tokens = masking.place(y[:, 1:], mask_token, keep_ids, restore_ids)
    tokens = jnp.concatenate([y[:, :1], tokens], axis=1) + table
    if keys is not None:
      keys = jax.vmap(lambda key: jax.random.split(key, (self.depth, 6)))(keys).swapaxes(0, 1)
    layer = blocks.stack(SiameseBlock, self.depth, self.scan, self.remat, in_axes=(nn.broadcast, 0))
    layer = layer(self.heads, self.hidden, self.eps, self.dropout, self.dtype, name='blocks')
    tokens, _ = layer(tokens, memory, keys)
    tokens = blocks.LayerNorm(self.eps, self.dtype, name='norm')(tokens)
    return blocks.Dense(self.out, self.dtype, name='pred')(tokens)[:, 1:]


def modules(cfg):
  """Encoder and decoder for the options in `cfg`."""
  patch = vit.sides(cfg.patch, 2)
  shared = dict(
    grid=patches.grid_of(vit.sides(cfg.image_size, 2), patch),
    eps=cfg.ln_eps,
    dtype=cfg.dtype,
    scan=cfg.scan,
    remat=cfg.remat,
  )
  encoder = vit.ViT(**vit.size(cfg.size), patch=patch, mlp_ratio=cfg.mlp_ratio, **shared)
  decoder = Decoder(
    **vit.size(cfg.decoder),
    hidden=cfg.ff_dim,
    out=math.prod(patch) * cfg.channels,
    dropout=cfg.decoder_dropout,
    **shared,
  )
  return encoder, decoder


def on_grid(encoder, params, grid):
  """(encoder, params) for images of another grid of patches: the position table is resampled as facebookresearch/dino
  does.
  """
  table = posemb.resample(encoder.table, encoder.grid, grid, cls_rows=1, nudge=0.1)
  return encoder.clone(grid=grid, pos='learned'), {**params, 'pos_embed': jnp.asarray(table)}


def make(cfg) -> Method:
  encoder, decoder = modules(cfg)
  patch, grid = encoder.patch, encoder.grid
  count = math.prod(grid)
  kept = masking.keep_count(count, cfg.mask_ratio)
  norm_pix, dropout = cfg.norm_pix, cfg.decoder_dropout
  views = Field(
    'B V H W C',
    (2, *vit.sides(cfg.image_size, 2), cfg.channels),
    doc='normalised views: the one seen whole, the one to fill in (data.transforms with two_views or frame_pair)',
  )

  def draw(key, batch):
    keys = jax.random.split(key)
    size = batch['views'].shape[0]
    draws = {'noise': jax.random.uniform(keys[0], (size, count))}
    return draws | ({'dropout': jax.random.split(keys[1], size)} if dropout else {})

  def init(key, batch):
    keys = jax.random.split(key)
    keep_ids, restore_ids, _ = masking.keep_smallest(jnp.zeros((1, count)), kept)
    one = jnp.zeros((1, *batch['views'].shape[2:]))
    memory, encoder_params = encoder.init_with_output(keys[0], one)
    decoder_params = decoder.init(keys[1], memory[:, : 1 + kept], memory, keep_ids, restore_ids)
    return {'encoder': encoder_params['params'], 'decoder': decoder_params['params']}

  def loss(params, state, frozen, batch, draws, step):
    del state, frozen, step
    keep_ids, restore_ids, mask = masking.keep_smallest(draws['noise'], kept)
    # Two passes of 1 + N and 1 + K tokens: in one, the few visible tokens would be padded to 1 + N.
    memory = encoder.apply({'params': params['encoder']}, batch['views'][:, 0])
    latent = encoder.apply({'params': params['encoder']}, batch['views'][:, 1], keep_ids)
    pred = decoder.apply({'params': params['decoder']}, latent, memory, keep_ids, restore_ids, draws.get('dropout'))
    target = patches.patchify(batch['views'][:, 1], patch)
    value = losses.masked_mse(pred, targets.norm_pix(target) if norm_pix else target, mask)
    out = {'memory': memory, 'latent': latent, 'pred': pred, 'mask': mask}
    return value, {'metrics': {'loss/pixel': value}, 'out': out}

  def encode(params, batch, state=None, layers=False, drop=None):
    del state
    module, variables = on_grid(encoder, params['encoder'], patches.grid_of(batch['image'].shape[1:-1], patch))
    return vit.encode(module, variables, batch['image'], layers, drop)

  def panels(params, state, frozen, batch, draws):
    _, aux = loss(params, state, frozen, batch, {'noise': draws['noise']}, 0)  # pictures are drawn without dropout
    target = patches.patchify(batch['views'][:, 1], patch)
    pred = targets.undo_norm_pix(aux['out']['pred'], target) if norm_pix else aux['out']['pred']
    shown = patches.pictures(target, pred, aux['out']['mask'], grid, patch)
    return {'seen whole': batch['views'][:, 0], 'to fill in': batch['views'][:, 1], **shown}

  return Method(fields={'views': views}, init=init, draw=draw, loss=loss, encode=encode, panels=panels)
