"""MaskAlign: align features of visible patches with a frozen teacher's (Xue et al. 2023, arXiv 2211.08887).

Official code: OpenDriveLab/maskalign, models_pretrain.py. Nothing is reconstructed: the student sees the
patches that the teacher's class token attends to, mixes its levels by a learned matrix and matches each mixture with
one level of the teacher, which saw the whole image. Departures: the teacher's attention is clamped at 1e-12 before it
divides (half precision rounds some of it to 0, on which the official sampling stops); `target_norm='bn'` takes its
statistics over the global batch and not per device.
"""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.errors import ConfigError, nearest
from mim_jax.method import Field, Method
from mim_jax.models import blocks, teachers, vit
from mim_jax.ops import colours, losses, masking, patches, pixels

DEFAULTS = {
  'size': 'B',  # student: Ti S B L H or 'width/depth/heads'
  'patch': 16,  # side, or (height, width)
  'image_size': 224,  # side, or (height, width)
  'channels': 3,
  'mlp_ratio': 4.0,
  'ln_eps': 1e-6,
  'drop_path': 0.1,  # stochastic depth of the student's last block while it is pre-trained; 0.2 for L
  'mask_ratio': 0.7,
  'masking': 'attentive',  # attentive (patches drawn in proportion to the teacher's class attention) | random
  # How student levels become teacher levels: linear (starts near the identity) | sum (at the mean) | simple (fixed).
  'fusion': 'linear',
  'head': 'linear',  # linear | norm_linear | mlp | mlp2
  'target_norm': 'whiten',  # whiten (LayerNorm without scale) | l2 | bn | none
  'distance': 'smoothl1',  # smoothl1 | l2 | l1
  # Weight of each teacher level: top5 (last five, equal) | topK | mean | out (last) | linear_decay | midM (only M).
  'levels': 'top5',
  'teacher': {
    'kind': 'clip',  # clip | dino | dinov2 | mae; batch: teacher_hidden and teacher_importance come with the data
    'size': 'B',
    'patch': 16,
    'image_size': 224,  # what it is fed; must give the student's grid: 196 for CLIP-L/14
  },
}

CHOICES = {
  'masking': ('attentive', 'random'),
  'fusion': ('linear', 'sum', 'simple'),
  'head': ('linear', 'norm_linear', 'mlp', 'mlp2'),
  'target_norm': ('whiten', 'l2', 'bn', 'none'),
  'distance': ('smoothl1', 'l2', 'l1'),
}
STATS = 'imagenet'  # normalisation of the batch's images


class Head(nn.Module):
  """Student features [..., D] -> features of one teacher level [..., out]."""

  kind: str
  out: int
  eps: float = 1e-6
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    if self.kind in ('mlp', 'mlp2'):
      x = blocks.Dense(x.shape[-1], self.dtype, name='hidden')(x)
    if self.kind in ('norm_linear', 'mlp2'):
      x = blocks.LayerNorm(self.eps, self.dtype, name='norm')(x)
    if self.kind == 'mlp':
      x = blocks.ACTIVATIONS['gelu'](x)
    return blocks.Dense(self.out, self.dtype, name='out')(x)


# One head per level, its arrays stacked on a leading axis: x [levels, B, T, D] -> [levels, B, T, out].
Heads = nn.vmap(Head, variable_axes={'params': 0}, split_rngs={'params': True})


def level_weights(name: str, count: int) -> np.ndarray:
  """Weights [count] of the teacher's levels, first block first, for the option `levels`."""
  top, mid = re.fullmatch(r'top(\d+)', name), re.fullmatch(r'mid(\d+)', name)
  ids = np.arange(count)
  if name == 'mean':
    return np.full(count, 1 / count)
  if name == 'out':
    return (ids == count - 1).astype(float)
  if name == 'linear_decay' and count > 1:
    return ids / ids.sum()
  if top and 0 < int(top[1]) <= count:
    return (ids >= count - int(top[1])) / int(top[1])
  if mid and int(mid[1]) < count:
    return (ids == int(mid[1])).astype(float)
  raise ConfigError(
    f"method.levels is {name!r}; expected mean, out, linear_decay, 'topK' with K from 1 to the teacher's {count} "
    f"levels, or 'midM' with M from 0 to {count - 1}"
  )


def initial_mix(fusion: str, levels: int, depth: int) -> jax.Array:
  """Mixture [levels, depth] of the student's blocks for each level: identity plus 0.01 everywhere, or the mean."""
  return jnp.eye(depth) + 0.01 if fusion == 'linear' else jnp.full((levels, depth), 1 / depth)


def attentive_order(importance, noise):
  """What to give `masking.keep_smallest` so that it draws patches in proportion to `importance` [B, N], none twice.

  An exponential race, as torch.multinomial runs it: `noise` [B, N] ~ Exp(1), largest importance / noise first.
  """
  return -jnp.maximum(importance, 1e-12) / noise


def normalise(hidden, kind: str):
  """Targets from the teacher's hidden states [levels, B, 1 + N, Dt], over all tokens, float32."""
  y = hidden.astype(jnp.float32)
  if kind == 'whiten':
    return (y - jnp.mean(y, -1, keepdims=True)) / jnp.sqrt(jnp.var(y, -1, keepdims=True) + 1e-5)
  if kind == 'l2':
    return y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
  if kind == 'bn':  # one mean and one variance for all of a level
    axes = (1, 2, 3)
    return (y - jnp.mean(y, axes, keepdims=True)) / jnp.sqrt(jnp.var(y, axes, keepdims=True, ddof=1) + 1e-6)
  return y


def distance(pred, target, kind: str):
  """Elementwise; 'smoothl1' is twice the smooth L1, as the official code has it: d^2, and 2 d - 1 from d = 1 on."""
  if kind == 'smoothl1':
    return 2 * losses.smooth_l1(pred, target)
  d = jnp.abs(pred.astype(jnp.float32) - target)
  return d if kind == 'l1' else jnp.square(d)


def modules(cfg):
  """Student, heads and teacher (None when its features come with the batch) for the options in `cfg`."""
  patch = vit.sides(cfg.patch, 2)
  grid = patches.grid_of(vit.sides(cfg.image_size, 2), patch)
  shape = dict(patch=patch, grid=grid, mlp_ratio=cfg.mlp_ratio, drop_path=cfg.drop_path, eps=cfg.ln_eps)
  student = vit.ViT(**vit.size(cfg.size), **shape, dtype=cfg.dtype, scan=cfg.scan, remat=cfg.remat)
  t = cfg.teacher
  teacher = None
  if t.kind != 'batch':
    teacher = teachers.make(t.kind, t.size, t.patch, t.image_size, dtype=cfg.dtype, scan=cfg.scan)
    if teacher.encoder.grid != grid:
      raise ConfigError(
        f'the teacher makes a grid of {teacher.encoder.grid} patches, the student one of {grid}; they must agree: set '
        f'method.teacher.image_size to {tuple(p * g for p, g in zip(teacher.encoder.patch, grid, strict=True))}'
      )
  return student, Heads(cfg.head, vit.size(t.size)['width'], cfg.ln_eps, cfg.dtype), teacher


def make(cfg) -> Method:
  for option, known in CHOICES.items():
    if cfg[option] not in known:
      raise ConfigError(f'method.{option} is {cfg[option]!r}; {nearest(cfg[option], known)}')
  student, heads, teacher = modules(cfg)
  patch, grid, count = student.patch, student.grid, math.prod(student.grid)
  kept = masking.keep_count(count, cfg.mask_ratio)
  t = vit.size(cfg.teacher.size)
  levels, width = t['depth'], t['width']
  if cfg.fusion != 'sum' and levels != student.depth:
    raise ConfigError(
      f'method.fusion={cfg.fusion!r} pairs the levels one to one, but the student has {student.depth} blocks and the '
      f"teacher {levels}; use fusion='sum'"
    )
  weights = level_weights(cfg.levels, levels)
  live = np.flatnonzero(weights > 0)  # no other level is computed: its head and row of the mixture get no gradient
  weights = jnp.asarray(weights[live], jnp.float32)
  fusion, target_norm, kind, drop_path = cfg.fusion, cfg.target_norm, cfg.distance, cfg.drop_path
  attentive = cfg.masking == 'attentive'

  image = (*vit.sides(cfg.image_size, 2), cfg.channels)
  fields = {'image': Field('B H W C', image, doc='normalised RGB (data.transforms ends in normalize)')}
  if teacher is None:
    doc = 'outputs of the blocks of the teacher, class token first'
    fields['teacher_hidden'] = Field('B L N D', (levels, 1 + count, width), doc=doc)
  if teacher is None and attentive:
    doc = "attention of the class token in the teacher's last block, mean over heads"
    fields['teacher_importance'] = Field('B N', (count,), doc=doc)

  def frozen(key, batch):
    del batch
    return {} if teacher is None else teacher.init(key)

  def draw(key, batch):
    size, keys = batch['image'].shape[0], jax.random.split(key)
    noise = jax.random.exponential if attentive else jax.random.uniform
    draws = {'noise': noise(keys[0], (size, count))}
    return draws | ({'drop': jax.random.uniform(keys[1], (size, student.depth, 2))} if drop_path else {})

  def init(key, batch):
    del batch
    keys = jax.random.split(key)
    one = jnp.zeros((1, *fields['image'].shape))
    each = jnp.zeros((levels, 1, 1, student.width))
    params = {'encoder': student.init(keys[0], one)['params'], 'heads': heads.init(keys[1], each)['params']}
    return params | ({} if fusion == 'simple' else {'mix': initial_mix(fusion, levels, student.depth)})

  def teach(frozen, batch):
    """The teacher's live levels [levels, B, 1 + N, Dt] and its class attention [B, N], both without gradient."""
    if teacher is None:
      given = (jnp.moveaxis(batch['teacher_hidden'], 1, 0)[live], batch.get('teacher_importance'))
      return jax.lax.stop_gradient(given)
    out = teacher(frozen, batch['image'], STATS, attention=attentive)
    return out['layers'][live], jnp.mean(out['attention'], axis=1) if attentive else None

  def loss(params, state, frozen, batch, draws, step):
    del state, step
    hidden, importance = teach(frozen, batch)
    order = attentive_order(importance, draws['noise']) if attentive else draws['noise']
    keep_ids, _, mask = masking.keep_smallest(order, kept)
    _, seen = student.apply({'params': params['encoder']}, batch['image'], keep_ids, draws.get('drop'), taps=True)
    layers = seen['layers'].astype(jnp.float32)  # [depth, B, 1 + K, D], before the final norm
    mixed = layers[live] if fusion == 'simple' else jnp.einsum('ab,bnkd->ankd', params['mix'][live], layers)
    pred = heads.apply({'params': jax.tree.map(lambda leaf: leaf[live], params['heads'])}, mixed)
    whole = normalise(hidden, target_norm)
    ids = jnp.concatenate([jnp.zeros_like(keep_ids[:, :1]), 1 + keep_ids], axis=1)
    target = jnp.take_along_axis(whole, ids[None, ..., None], axis=2)
    each = jnp.mean(distance(pred, target, kind), axis=(1, 2, 3))
    value = jnp.sum(weights * each)
    out = {'layers': layers, 'pred': pred, 'target': target, 'teacher': whole}
    out = {name: jnp.moveaxis(x, 0, 1) for name, x in out.items()} | {'keep_ids': keep_ids, 'mask': mask}
    return value, {'metrics': {'loss/align': value, 'loss/last_level': each[-1]}, 'out': out}

  def encode(params, batch, state=None, layers=False, drop=None):
    del state
    return vit.encode(student, params['encoder'], batch['image'], layers, drop)

  def panels(params, state, frozen, batch, draws):
    _, aux = loss(params, state, frozen, batch, draws, 0)
    out, (_, importance) = aux['out'], teach(frozen, batch)
    seen = 1 - out['mask'][..., None]
    raster = lambda x: jnp.zeros((*seen.shape[:2], x.shape[-1])).at[jnp.arange(len(x))[:, None], out['keep_ids']].set(x)
    pred, target = (out[name][:, -1, 1:].astype(jnp.float32) for name in ('pred', 'target'))
    colour = colours.principal(out['teacher'][:, -1, 1:])
    error = raster(jnp.mean(distance(pred, target, kind), -1, keepdims=True))
    maps = {} if importance is None else {'teacher attention': importance / jnp.max(importance, 1, keepdims=True)}
    maps = {name: jnp.repeat(x[..., None], 3, -1) for name, x in maps.items()}
    maps |= {
      'teacher': colour(out['teacher'][:, -1, 1:]),
      'student': colour(raster(pred)) * seen,
      'error (white: 1)': jnp.repeat(jnp.clip(error, 0, 1), 3, -1),
    }
    show = lambda x: patches.unpatchify(jnp.tile(x, math.prod(patch)), grid, patch)
    visible = patches.unpatchify(patches.patchify(batch['image'], patch) * seen, grid, patch)
    pictures = {name: pixels.renormalize(show(x), 'none', STATS) for name, x in maps.items()}
    return {'input': batch['image'], 'visible': visible, **pictures}

  couples = target_norm == 'bn'
  return Method(fields, init, draw, loss, encode, frozen=frozen, panels=panels, couples=couples)
