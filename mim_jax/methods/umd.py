"""UMD: one auto-encoder for hidden patches and for noise (Hansen-Estruch et al. 2024, arXiv 2406.17688).

Official code: philippe-eecs/small-vision, big_vision/models/ae.py and trainers/train_ae.py. A part of the batch is a
MAE step on clean images (time 0, three quarters hidden), the rest a diffusion step (noised, fewer hidden); the network
predicts clean pixels and noise of every patch. With other options the same code is MAE (`clean=1, adaln=False`), DiT
(`clean=0, mask_ratio=0`) or MaskDiT (`clean=0`).
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.method import Field, Method
from mim_jax.models import blocks, dit, vit
from mim_jax.ops import diffusion, masking, patches

DEFAULTS = {
  'size': 'B',  # encoder
  'decoder_depth': 4,  # 8 for L; the decoder is as wide as the encoder
  'patch': 4,  # side, or (height, width)
  'image_size': 64,  # side, or (height, width); of latents where the images are latents
  'channels': 3,
  'mlp_ratio': 4.0,
  'ln_eps': 1e-6,
  'cls_tokens': 4,  # averaged into the one token that the decoder gets and that probes read
  'adaln': True,  # the condition modulates the blocks; else it is a token more in each of them
  'classes': 0,  # of `label`; 0 for training without labels
  'label_drop': 0.1,
  'clean': 0.5,  # share of the batch that stays without noise: the last rows
  'groups': 1,  # equal parts of the batch that are split so, each for itself; the number of devices avoids exchange
  'mask_ratio': 0.375,  # of noised images; 0 hides nothing and counts every patch
  'clean_mask_ratio': 0.75,
  'timesteps': 1000,
  'schedule': 'cosine',  # linear for latents
  'probe_step': -1,  # -1: `encode` sees clean images; s: noised as at step s, always alike (50 where clean=0)
  'sampling_steps': 125,
  'eta': 1.0,  # fresh noise of a sampling step: 0 none, 1 as much as ancestral sampling
  'guidance': 1.0,  # prediction without label plus this times what the label changes
  'clip': True,  # hold predicted clean images in [-1, 1] while sampling; not for latents
}


class Encoder(nn.Module):
  """Image and condition [B, D] -> tokens [B, cls_tokens + K, D] after the final norm, K those of keep_ids."""

  width: int
  patch: tuple[int, ...]
  grid: tuple[int, ...]
  cls_tokens: int
  stack: dit.Stack

  @nn.compact
  def __call__(self, image, condition, keep_ids=None):
    dtype = self.stack.dtype
    x = patches.patchify(image, self.patch)
    table = self.param('pos_embed', table_init(self.grid), (1, x.shape[1], self.width)).astype(dtype)
    table = jnp.broadcast_to(table, (len(x), *table.shape[1:]))
    if keep_ids is not None:
      x, table = masking.take(x, keep_ids), masking.take(table, keep_ids)
    x = nn.Dense(self.width, dtype=dtype, name='patch_embed')(x.astype(dtype)) + table
    cls = self.param('cls_tokens', nn.initializers.zeros, (1, self.cls_tokens, self.width)).astype(dtype)
    x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), *cls.shape[1:])), x], axis=1)
    return self.stack(x, condition)


class Decoder(nn.Module):
  """Summary [B, D], tokens [B, K, D] (all of them where no ids are given), condition -> [B, H, W, out] float32."""

  width: int
  patch: tuple[int, ...]
  grid: tuple[int, ...]
  out: int
  stack: dit.Stack

  @nn.compact
  def __call__(self, summary, tokens, condition, keep_ids=None, restore_ids=None):
    dtype, count = self.stack.dtype, math.prod(self.grid)
    mask_token = self.param('mask_token', nn.initializers.normal(0.02), (1, 1, self.width))
    if keep_ids is not None:
      tokens = masking.place(tokens, mask_token, keep_ids, restore_ids)
    x = tokens + self.param('pos_embed', table_init(self.grid), (1, count, self.width)).astype(dtype)
    x = self.stack(jnp.concatenate([summary[:, None], x], axis=1), condition)[:, 1:]
    if self.stack.adaln:
      parts = nn.Dense(2 * self.width, kernel_init=nn.initializers.zeros, dtype=dtype, name='modulation')(condition)
      x = dit.modulate(x, *jnp.split(parts, 2, axis=-1))
    shape = (self.width, math.prod(self.patch) * self.out)
    kernel = self.param('kernel', nn.initializers.normal(0.02), shape).astype(dtype)
    bias = self.param(
      'bias', nn.initializers.zeros, (self.out,)
    )  # one for all places of a patch, as a transposed convolution has it
    return patches.unpatchify(blocks.matmul(x, kernel), self.grid, self.patch).astype(jnp.float32) + bias


def table_init(grid):
  """Normal with deviation 1 / sqrt(patches): the official table, where others have 1 / sqrt(width)."""
  return nn.initializers.normal(math.prod(grid) ** -0.5)


@dataclasses.dataclass(frozen=True)
class Network:
  """The three modules as one function of params {'condition', 'encoder', 'decoder'}."""

  condition: dit.Condition
  encoder: Encoder
  decoder: Decoder

  @property
  def prefix(self) -> int:
    return self.encoder.cls_tokens

  def init(self, key, image, keep_ids, restore_ids):
    keys = jax.random.split(key, 3)
    label = jnp.zeros(len(image), jnp.int32) if self.condition.classes else None
    condition, first = self.condition.init_with_output(keys[0], jnp.zeros(len(image)), label)
    tokens, second = self.encoder.init_with_output(keys[1], image, condition, keep_ids)
    third = self.decoder.init(keys[2], tokens[:, 0], tokens[:, self.prefix :], condition, keep_ids, restore_ids)
    trees = {'condition': first, 'encoder': second, 'decoder': third}
    return {name: tree['params'] for name, tree in trees.items()}

  def conditions(self, params, t, label=None):
    c = self.condition.apply({'params': params['condition']}, t, label)
    return nn.silu(c) if self.encoder.stack.adaln else c

  def encode(self, params, image, condition, keep_ids=None):
    """Summary [B, D], the mean of the class tokens, and tokens [B, K, D]."""
    tokens = self.encoder.apply({'params': params['encoder']}, image, condition, keep_ids)
    return jnp.mean(tokens[:, : self.prefix], axis=1), tokens[:, self.prefix :]

  def __call__(self, params, image, t, label=None, ids=None):
    """Prediction [B, H, W, 2 C] (clean image, then noise) and summary [B, D].

    Args:
      t: [B], 0 for images without noise, s + 1 for step s.
      ids: (keep_ids [B, K], restore_ids [B, N]) to leave patches out.
    """
    condition, ids = self.conditions(params, t, label), ids or (None, None)
    summary, tokens = self.encode(params, image, condition, ids[0])
    return self.decoder.apply({'params': params['decoder']}, summary, tokens, condition, *ids), summary

  def guided(self, params, x, s, label=None, scale: float = 1.0):
    """Prediction [B, H, W, 2 C] for x at steps s [B]: that without label plus `scale` times what the label changes."""
    if label is None or scale == 1:
      return self(params, x, s + 1, label)[0]
    both = jnp.concatenate([label, jnp.full_like(label, self.condition.classes)])
    pred, _ = self(params, jnp.tile(x, (2, 1, 1, 1)), jnp.tile(s + 1, 2), both)
    told, untold = jnp.split(pred, 2)
    return untold + scale * (told - untold)


def network(cfg) -> Network:
  """The network for the options in `cfg`."""
  size, patch = vit.size(cfg.size), vit.sides(cfg.patch, 2)
  shared = dict(width=size['width'], patch=patch, grid=patches.grid_of(vit.sides(cfg.image_size, 2), patch))
  stack = dict(heads=size['heads'], mlp_ratio=cfg.mlp_ratio, eps=cfg.ln_eps, dtype=cfg.dtype, adaln=cfg.adaln)
  stack |= dict(scan=cfg.scan, remat=cfg.remat, parent=None)
  encoder = Encoder(**shared, cls_tokens=cfg.cls_tokens, stack=dit.Stack(size['depth'], **stack))
  decoder = Decoder(**shared, out=2 * cfg.channels, stack=dit.Stack(cfg.decoder_depth, **stack))
  return Network(dit.Condition(size['width'], cfg.classes, cfg.dtype), encoder, decoder)


def pixel_mask(mask, grid, patch):
  """mask [B, N] -> [B, H, W, 1]."""
  return patches.unpatchify(jnp.repeat(mask[..., None], math.prod(patch), axis=-1), grid, patch)


def masked_mean(error, mask):
  """Mean of error [B, H, W, C] where mask [B, H, W, 1] is 1; every image hides as much."""
  return jnp.mean(error * mask) / jnp.mean(mask)


def make(cfg) -> Method:
  net = network(cfg)
  patch, grid, channels = net.encoder.patch, net.encoder.grid, cfg.channels
  count, classes, label_drop, groups, share = math.prod(grid), cfg.classes, cfg.label_drop, cfg.groups, cfg.clean
  if not 0 <= share <= 1:
    raise ConfigError(f'method.clean is {share}; expected a share of the batch, 0 to 1')
  kept_clean = masking.keep_count(count, cfg.clean_mask_ratio)
  kept_noised = masking.keep_count(count, cfg.mask_ratio) if cfg.mask_ratio else 0  # 0: all of them
  timesteps, probe_step, guidance = cfg.timesteps, cfg.probe_step, cfg.guidance
  a = diffusion.signal(cfg.schedule, timesteps)
  sampler = dict(sampling=cfg.sampling_steps, eta=cfg.eta, clip=cfg.clip)
  diffusion.ddim_times(timesteps, cfg.sampling_steps)  # raises where they do not fit
  shape = (*vit.sides(cfg.image_size, 2), channels)
  fields = {'image': Field('B H W C', shape, doc="pixels in [-1, 1]: data.transforms ends in normalize('half')")}
  if classes:
    fields['label'] = Field('B', (), 'int32', doc=f'class below {classes}')

  def draw(key, batch):
    rows = batch['image'].shape[0]
    keys = jax.random.split(key, 4)
    draws = {
      't': jax.random.randint(keys[0], (rows,), 0, timesteps),
      'eps': jax.random.normal(keys[1], (rows, *shape)),
      'noise': jax.random.uniform(keys[2], (rows, count)),
    }
    return draws | ({'drop_label': jax.random.uniform(keys[3], (rows,)) < label_drop} if classes else {})

  def init(key, batch):
    del batch
    keep_ids, restore_ids, _ = masking.keep_smallest(jnp.zeros((1, count)), kept_clean)
    return net.init(key, jnp.zeros((1, *shape)), keep_ids, restore_ids)

  def split(tree):
    """(rows to be noised, rows that stay clean) of every array."""
    rows = jax.tree.leaves(tree)[0].shape[0]
    if rows % groups:
      raise ConfigError(f'a batch of {rows} cannot be split in method.groups={groups} equal parts')
    each = rows // groups
    noised = each - int(each * share)
    take = lambda x, part: x.reshape(groups, each, *x.shape[1:])[:, part].reshape(-1, *x.shape[1:])
    return tuple(jax.tree.map(lambda x: take(x, part), tree) for part in (slice(noised), slice(noised, None)))

  def restore(params, clean):
    """Loss of hidden pixels of images without noise, and what it came from."""
    keep_ids, restore_ids, mask = masking.keep_smallest(clean['noise'], kept_clean)
    pred, summary = net(params, clean['image'], jnp.zeros(len(mask)), None, (keep_ids, restore_ids))
    mask = pixel_mask(mask, grid, patch)
    value = masked_mean(jnp.square(pred[..., :channels] - clean['image']), mask)
    return value, {'pred_clean': pred, 'mask_clean': mask, 'summary_clean': summary}

  def denoise(params, noised):
    """Losses of noise in visible patches and of clean pixels in hidden ones, and what they came from."""
    image, eps, t = noised['image'], noised['eps'], noised['t']
    label = jnp.where(noised['drop_label'], classes, noised['label']) if classes else None
    x = diffusion.add_noise(a, image, t, eps)
    keep_ids, restore_ids, mask = masking.keep_smallest(noised['noise'], kept_noised or count)
    pred, summary = net(params, x, t + 1, label, (keep_ids, restore_ids) if kept_noised else None)
    errors = jnp.square(pred[..., channels:] - eps), jnp.square(pred[..., :channels] - image)
    mask = pixel_mask(mask, grid, patch)
    values = (masked_mean(errors[0], 1 - mask), masked_mean(errors[1], mask if kept_noised else jnp.ones_like(mask)))
    return values, {'noised': x, 'pred_noised': pred, 'mask_noised': mask, 'summary_noised': summary}

  def loss(params, state, frozen, batch, draws, step):
    del state, frozen, step
    noised, clean = split({**{name: batch[name] for name in fields}, **draws})
    rows = len(noised['image']), len(clean['image'])
    total, metrics, out = jnp.float32(0), {}, {}
    if rows[0]:
      (of_noise, of_image), seen = denoise(params, noised)
      total += (of_noise + of_image) / 2 * (rows[0] / sum(rows))
      metrics, out = {'loss/noise': of_noise, 'loss/clean_from_noised': of_image}, seen
    if rows[1]:
      value, seen = restore(params, clean)
      total += value * (rows[1] / sum(rows))
      metrics, out = metrics | {'loss/pixel': value}, out | seen
    return total, {'metrics': metrics, 'out': out}

  def encode(params, batch, state=None):
    del state
    image = batch['image']
    t = jnp.zeros(len(image), jnp.int32)
    if probe_step >= 0:
      eps = jnp.broadcast_to(jax.random.normal(jax.random.key(0), shape), image.shape)
      image, t = diffusion.add_noise(a, image, t + probe_step, eps), t + probe_step + 1
    summary, tokens = net.encode(params, image, net.conditions(params, t))
    return {'tokens': tokens, 'cls': summary}

  def generate(params, state, frozen, key, cond):
    """Samples [B, H, W, C]; cond: {'label': [B]} for a model with classes, else any array of B rows."""
    del state, frozen
    label = cond['label'] if classes else None
    keys = jax.random.split(key)
    start = jax.random.normal(keys[0], (len(jax.tree.leaves(cond)[0]), *shape))
    predict = lambda x, s: net.guided(params, x, s, label, guidance)[..., channels:]
    return diffusion.ddim(a, predict, start, keys[1], **sampler)

  def panels(params, state, frozen, batch, draws):
    """Both halves of the loss on every image."""
    del state, frozen
    rows = {**{name: batch[name] for name in fields}, **draws}
    image, clean, noised = batch['image'], restore(params, rows)[1], denoise(params, rows)[1]
    pred, mask = noised['pred_noised'], noised['mask_noised']
    from_noise = jnp.clip(diffusion.clean_from_noise(a, noised['noised'], draws['t'], pred[..., channels:]), -1, 1)
    return {
      'input': image,
      'masked': image * (1 - clean['mask_clean']),
      'prediction': jnp.where(clean['mask_clean'] == 1, clean['pred_clean'][..., :channels], image),
      'noised': noised['noised'] * (1 - mask),
      'by both heads': jnp.where(mask == 1, pred[..., :channels], from_noise),
    }

  return Method(fields=fields, init=init, draw=draw, loss=loss, encode=encode, panels=panels, generate=generate)
