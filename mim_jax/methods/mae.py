"""MAE: predict the pixels of the 75 % of patches that the encoder never saw (He et al. 2022, arXiv 2111.06377).

Official code: facebookresearch/mae, models_mae.py. Paper and code agree on everything in here. The published weights regress normalised
pixels, so `norm_pix` is on by default; the paper's ablations and visualisations use raw pixels.
"""

import math

import jax
import jax.numpy as jnp

from mim_jax.method import Field, Method
from mim_jax.models import vit
from mim_jax.models.decoder import Decoder
from mim_jax.ops import losses, masking, patches, targets

DEFAULTS = {
  'size': 'B',  # encoder: Ti S B L H or 'width/depth/heads'
  'patch': 16,  # side, or (height, width)
  'image_size': 224,  # side, or (height, width)
  'channels': 3,
  'mlp_ratio': 4.0,
  'ln_eps': 1e-6,
  'mask_ratio': 0.75,
  'norm_pix': True,  # target: each patch minus its mean over its standard deviation
  'decoder': '512/8/16',  # width/depth/heads
}


def modules(cfg):
  """Encoder and decoder for the options in `cfg`."""
  patch = vit.sides(cfg.patch, 2)
  grid = patches.grid_of(vit.sides(cfg.image_size, 2), patch)
  shared = dict(grid=grid, mlp_ratio=cfg.mlp_ratio, eps=cfg.ln_eps, dtype=cfg.dtype, scan=cfg.scan, remat=cfg.remat)
  encoder = vit.ViT(**vit.size(cfg.size), patch=patch, **shared)
  decoder = Decoder(**vit.size(cfg.decoder), out=math.prod(patch) * cfg.channels, **shared)
  return encoder, decoder


def make(cfg) -> Method:
  encoder, decoder = modules(cfg)
  patch, grid = encoder.patch, encoder.grid
  count = math.prod(grid)
  kept = masking.keep_count(count, cfg.mask_ratio)
  norm_pix = cfg.norm_pix
  image = Field(
    'B H W C', (*vit.sides(cfg.image_size, 2), cfg.channels), doc='normalised RGB (data.transforms ends in normalize)'
  )

  def draw(key, batch):
    return {'noise': jax.random.uniform(key, (batch['image'].shape[0], count))}

  def init(key, batch):
    keys = jax.random.split(key)
    keep_ids, restore_ids, _ = masking.keep_smallest(jnp.zeros((1, count)), kept)
    one = jnp.zeros((1, *batch['image'].shape[1:]))
    z, encoder_params = encoder.init_with_output(keys[0], one, keep_ids)
    decoder_params = decoder.init(keys[1], z, keep_ids, restore_ids)
    return {'encoder': encoder_params['params'], 'decoder': decoder_params['params']}

  def target_of(images):
    return patches.patchify(images, patch)

  def loss(params, state, frozen, batch, draws, step):
    del state, frozen, step
    keep_ids, restore_ids, mask = masking.keep_smallest(draws['noise'], kept)
    latent = encoder.apply({'params': params['encoder']}, batch['image'], keep_ids)
    pred = decoder.apply({'params': params['decoder']}, latent, keep_ids, restore_ids)
    target = target_of(batch['image'])
    value = losses.masked_mse(pred, targets.norm_pix(target) if norm_pix else target, mask)
    return value, {'metrics': {'loss/pixel': value}, 'out': {'latent': latent, 'pred': pred, 'mask': mask}}

  def encode(params, batch, state=None, layers=False, drop=None):
    del state
    return vit.encode(encoder, params['encoder'], batch['image'], layers, drop)

  def panels(params, state, frozen, batch, draws):
    _, aux = loss(params, state, frozen, batch, draws, 0)
    target = target_of(batch['image'])
    pred = targets.undo_norm_pix(aux['out']['pred'], target) if norm_pix else aux['out']['pred']
    return {'input': batch['image'], **patches.pictures(target, pred, aux['out']['mask'], grid, patch)}

  return Method(fields={'image': image}, init=init, draw=draw, loss=loss, encode=encode, panels=panels)
