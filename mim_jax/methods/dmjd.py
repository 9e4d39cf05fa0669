"""DMJD: two masks, each hiding what the other shows, and HOG for all tokens (Ma et al. 2022, arXiv 2301.00230).

Official code: mx-mark/DMJD, models_dmjd.py, engine_pretrain.py, util/hog_tensor.py. Departures:
- The official loss of the visible branch pairs each prediction with the HOG of another visible token (predictions are
  in the order of the noise, targets in raster order), from which the branch learns little. Here every token gets its
  own; `visible_targets='raster'` is theirs.
- Officially the second view permutes the units of the first by two permutations that all images of a batch share. The
  order of the noise is uniform already, so this changes no distribution and is left out; `draws` may hold such
  permutations as 'seen_order' and 'hidden_order'.
- `pred_ratio` and `visible_weight` are options; officially 1 and 1, whatever the command line says.
The paper's results with a plain ViT have no published code: `backbone='vit'` puts the same two branches on MAE's
encoder.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.method import Field, Method
from mim_jax.models import blocks, convmae, decoder, vit
from mim_jax.ops import hog, losses, masking, patches

DEFAULTS = {
  'backbone': 'convmae',  # convmae | vit
  'size': 'B',  # convmae: B L or 'WIDTHS/DEPTHS/HEADS' of its stages; vit: Ti S B L H or 'width/depth/heads'
  'patch': 16,  # side of a token, or (height, width)
  'image_size': 224,  # side, or (height, width)
  'channels': 3,
  'conv_mlp_ratios': (8.0, 8.0),  # of the two convolutional stages
  'mlp_ratio': 4.0,  # of the transformer
  'conv_ln_eps': 1e-5,  # in patch embeddings and convolutional stages
  'ln_eps': 1e-6,  # everywhere else
  'mask_ratio': 0.6,
  'pred_ratio': 1.0,  # share of the tokens that is hidden in at least one view, as far as mask_ratio allows
  'unit': 2,  # side in tokens of the squares that are hidden together; 1: single tokens
  'bins': 9,  # directions of a histogram
  'cell': 8,  # pixels of a cell's side
  'whiten_eps': 1e-5,
  'hidden_loss': 'l2',  # l2 | smooth_l1
  'visible_loss': 'smooth_l1',
  'visible_weight': 1.0,
  'visible_targets': 'aligned',  # aligned | raster
  'decoder': '512/8/16',  # width/depth/heads
  'decoder_mlp_ratio': 8.0,
}

DISTANCES = {
  'l2': lambda pred, target: jnp.square(pred.astype(jnp.float32) - target),
  'smooth_l1': lambda pred, target: losses.smooth_l1(pred, target, beta=2.0),
}
CHOICES = {
  'backbone': ('convmae', 'vit'),
  'hidden_loss': tuple(DISTANCES),
  'visible_loss': tuple(DISTANCES),
  'visible_targets': ('aligned', 'raster'),
}


class VisibleHead(nn.Module):
  """Visible tokens [B, K, D] -> [B, K, out]: a projector of three layers and a linear predictor (paper section 3.3)."""

  width: int
  out: int
  eps: float
  dtype: str

  @nn.compact
  def __call__(self, z):
    for i in (1, 2):
      z = blocks.Dense(self.width, self.dtype, name=f'fc{i}')(z)
      z = blocks.ACTIVATIONS['gelu'](blocks.LayerNorm(self.eps, self.dtype, name=f'norm{i}')(z))
    z = blocks.Dense(self.width, self.dtype, name='fc3')(z)
    z = blocks.LayerNorm(self.eps, self.dtype, use_bias=False, use_scale=False, name='norm3')(z)
    return blocks.Dense(self.out, self.dtype, name='pred')(z)


def unit_counts(units: int, mask_ratio: float, pred_ratio: float) -> tuple[int, int]:
  """Units that each view sees, and how many of the first's the second hides; truncated in double precision."""
  kept = masking.keep_count(units, mask_ratio)
  if not mask_ratio <= pred_ratio <= 1:
    raise ConfigError(
      f'method.pred_ratio is {pred_ratio}; expected a share from mask_ratio {mask_ratio} (both views the same) to 1'
    )
  return kept, int(min(pred_ratio - mask_ratio, mask_ratio) * units)


def disjoint_views(noise, grid, unit: int, kept: int, swapped: int, seen_order=None, hidden_order=None):
  """Masks of two views, of which the second hides `swapped` units that the first one shows, and shows as many others.

  Paper section 3.2. noise [B, U], one value per unit of unit x unit tokens in raster order: the first view shows the
  `kept` smallest.

  Args:
    grid: tokens per axis.
    seen_order, hidden_order: [B, kept], [B, U - kept] int: permutations of the first view's shown and hidden units
      before the second view takes from them; None for none.

  Returns:
    keep_ids [B, 2, K], restore_ids [B, 2, N] int32, mask [B, 2, N] float32 (1 = hidden), as `masking.keep_smallest` has
    them. Visible tokens are ordered by their place within the unit first, then by unit.
  """
  order = jnp.argsort(noise, axis=1, stable=True).astype(jnp.int32)
  seen, hidden = order[:, :kept], order[:, kept:]
  if seen_order is not None:
    seen, hidden = jnp.take_along_axis(seen, seen_order, 1), jnp.take_along_axis(hidden, hidden_order, 1)
  stay = hidden.shape[1] - swapped
  second = jnp.concatenate([seen[:, swapped:], hidden[:, stay:], seen[:, :swapped], hidden[:, :stay]], axis=1)
  units = jnp.stack([order, second], axis=1)

  columns = grid[1] // unit
  corner = unit * (units // columns) * grid[1] + unit * (units % columns)  # its first token
  within = (jnp.arange(unit)[:, None] * grid[1] + jnp.arange(unit)).reshape(-1, 1)
  tokens = corner[:, :, None, :] + within  # [B, 2, tokens of a unit, U]
  flat = lambda part: part.reshape(*part.shape[:2], -1)
  keep_ids = flat(tokens[..., :kept])
  restore_ids = jnp.argsort(jnp.concatenate([keep_ids, flat(tokens[..., kept:])], axis=-1), axis=-1).astype(jnp.int32)
  return keep_ids, restore_ids, (restore_ids >= keep_ids.shape[-1]).astype(jnp.float32)


def modules(cfg):
  """Encoder, decoder of the hidden tokens and head of the visible ones for the options in `cfg`."""
  for key, known in CHOICES.items():
    if cfg[key] not in known:
      raise ConfigError(f'method.{key} is {cfg[key]!r}; expected {" or ".join(known)}')
  patch = vit.sides(cfg.patch, 2)
  grid = patches.grid_of(vit.sides(cfg.image_size, 2), patch)
  if any(side % cfg.unit for side in grid) or any(side % cfg.cell for side in patch):
    raise ConfigError(
      f'a grid of {grid} tokens of {patch} pixels must be a multiple of method.unit={cfg.unit}, and a token one of '
      f'method.cell={cfg.cell}; change image_size, patch, unit or cell'
    )
  common = dict(dtype=cfg.dtype, scan=cfg.scan, remat=cfg.remat)
  if cfg.backbone == 'vit':
    encoder = vit.ViT(**vit.size(cfg.size), patch=patch, grid=grid, mlp_ratio=cfg.mlp_ratio, eps=cfg.ln_eps, **common)
  else:
    encoder = convmae.ConvMAE(
      **convmae.size(cfg.size),
      patch=patch,
      grid=grid,
      conv_mlp_ratios=tuple(cfg.conv_mlp_ratios),
      mlp_ratio=cfg.mlp_ratio,
      conv_eps=cfg.conv_ln_eps,
      eps=cfg.ln_eps,
      **common,
    )
  out = math.prod(patch) // cfg.cell**2 * cfg.bins * cfg.channels
  size = vit.size(cfg.decoder)
  hidden = decoder.Decoder(
    **size,
    grid=grid,
    out=out,
    mlp_ratio=cfg.decoder_mlp_ratio,
    eps=cfg.ln_eps,
    cls=encoder.prefix > 0,
    **common,
  )
  return encoder, hidden, VisibleHead(size['width'], out, cfg.ln_eps, cfg.dtype)


def make(cfg) -> Method:
  encoder, hidden_head, visible_head = modules(cfg)
  grid, patch, prefix = encoder.grid, encoder.patch, encoder.prefix
  count, cells = math.prod(grid), tuple(side // cfg.cell for side in patch)
  kept, swapped = unit_counts(count // cfg.unit**2, cfg.mask_ratio, cfg.pred_ratio)
  unit, cell, bins, eps, hybrid = cfg.unit, cfg.cell, cfg.bins, cfg.whiten_eps, cfg.backbone == 'convmae'
  hidden_distance, visible_distance = DISTANCES[cfg.hidden_loss], DISTANCES[cfg.visible_loss]
  weight, raster = cfg.visible_weight, cfg.visible_targets == 'raster'
  shape = (*vit.sides(cfg.image_size, 2), cfg.channels)
  fields = {
    'image': Field('B H W C', shape, doc='normalised RGB (data.transforms ends in normalize)'),
    'image_u8': Field('B H W C', shape, 'uint8', "the same pixels, 0..255 (keep('image_u8') before normalize)"),
  }

  def draw(key, batch):
    return {'noise': jax.random.uniform(key, (batch['image'].shape[0], count // unit**2))}

  def fold(x):  # [B, 2, ...] -> [2 B, ...]: the views of an image stay side by side, on its device
    return x.reshape(-1, *x.shape[2:])

  def encode_views(params, image, keep_ids):
    """Latent [2 B, prefix + K, D]."""
    if hybrid:
      return fold(encoder.apply({'params': params}, image, keep_ids))
    both = jnp.broadcast_to(image[:, None], (len(image), 2, *image.shape[1:]))
    return encoder.apply({'params': params}, fold(both), fold(keep_ids))

  def init(key, batch):
    keys = jax.random.split(key, 3)
    keep_ids, restore_ids, _ = disjoint_views(jnp.zeros((1, count // unit**2)), grid, unit, kept, swapped)
    one, first = jnp.zeros((1, *batch['image'].shape[1:])), keep_ids[:, 0]
    z, encoder_params = encoder.init_with_output(keys[0], one, first)
    return {
      'encoder': encoder_params['params'],
      'decoder': hidden_head.init(keys[1], z, first, restore_ids[:, 0])['params'],
      'visible': visible_head.init(keys[2], z[:, prefix:])['params'],
    }

  def histograms(image):
    return hog.histograms(image, bins, cell)

  def tokens_of(histogram):
    """[B, rows, columns, bins, C] -> [B, N, P], a token's values in the order row, column, bin, channel."""
    return patches.patchify(histogram.reshape(*histogram.shape[:3], -1), cells)

  def loss(params, state, frozen, batch, draws, step):
    del state, frozen, step
    orders = {name: draws.get(name) for name in ('seen_order', 'hidden_order')}
    keep_ids, restore_ids, mask = disjoint_views(draws['noise'], grid, unit, kept, swapped, **orders)
    ids = fold(keep_ids)
    latent = encode_views(params['encoder'], batch['image'], keep_ids)
    pred = hidden_head.apply({'params': params['decoder']}, latent, ids, fold(restore_ids))
    pred_visible = visible_head.apply({'params': params['visible']}, latent[:, prefix:])

    target = tokens_of(hog.whiten(histograms(batch['image_u8']), eps))
    both = fold(jnp.broadcast_to(target[:, None], (len(target), 2, *target.shape[1:])))
    per_token = jnp.mean(hidden_distance(pred, both), axis=-1)
    hidden_loss = jnp.sum(per_token * fold(mask)) / jnp.sum(mask)  # every row hides as many
    own = masking.take(both, jnp.sort(ids, axis=-1) if raster else ids)
    visible_loss = jnp.mean(visible_distance(pred_visible, own))
    out = {'latent': latent, 'pred': pred, 'pred_visible': pred_visible}
    out = {name: value.reshape(-1, 2, *value.shape[1:]) for name, value in out.items()}
    out |= {'target': target, 'mask': mask, 'keep_ids': keep_ids, 'restore_ids': restore_ids}
    metrics = {'loss/hidden': hidden_loss, 'loss/visible': visible_loss}
    return hidden_loss + weight * visible_loss, {'metrics': metrics, 'out': out}

  def encode(params, batch, state=None, layers=False, drop=None):
    """Without fusion of the stages and the final norm, which was trained on the fused sum (models_convit.py)."""
    del state
    plain = encoder.clone(fusion=False, final_norm=False) if hybrid else encoder
    return vit.encode(plain, params['encoder'], batch['image'], layers, drop)

  def panels(params, state, frozen, batch, draws):
    """Each view, and the HOG of the whole image as its two branches predict it together: strokes lie along edges."""
    _, aux = loss(params, state, frozen, batch, draws, 0)
    out, image = aux['out'], batch['image']
    exact = histograms(batch['image_u8'])
    black, white = jnp.min(image, (0, 1, 2)), jnp.max(image, (0, 1, 2))
    brightest = jnp.quantile(jnp.mean(exact, -1), 0.98)

    def picture(histogram):
      drawn = jnp.clip(hog.draw(jnp.mean(histogram, -1), cell) / brightest, 0, 1)[..., None]
      return black + (white - black) * drawn

    def predicted(view):
      hidden = out['mask'][:, view, :, None]
      pred_visible = masking.place(
        out['pred_visible'][:, view], jnp.zeros((1, 1, 1)), out['keep_ids'][:, view], out['restore_ids'][:, view]
      )
      tokens = jnp.where(hidden == 1, out['pred'][:, view], pred_visible).astype(jnp.float32)
      whitened = patches.unpatchify(tokens, grid, cells)
      return picture(hog.undo_whiten(whitened.reshape(exact.shape), exact, eps))

    shown = {'input': image, 'HOG': picture(exact)}
    for view in (0, 1):
      pixels = patches.patchify(image, patch) * (1 - out['mask'][:, view, :, None])
      shown |= {f'view {view + 1}': patches.unpatchify(pixels, grid, patch), f'predicted {view + 1}': predicted(view)}
    return shown

  return Method(fields=fields, init=init, draw=draw, loss=loss, encode=encode, panels=panels)
